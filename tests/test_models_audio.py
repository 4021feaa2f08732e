"""Networks of sound: data2vec against transformers, data2vec 2 against its equations, a clip alone as in a batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emkum.errors import RefusedTeacher, UnsupportedNetwork
from emkum.models.audio import AudioBackbone, AudioSpec, alibi_slopes
from emkum.models.audio_pass import AudioPass
from emkum.models.catalogue import load_network
from emkum.models.convert import convert
from emkum.models.families import data2vec_audio
from emkum.models.families.checkpoint import of_tensors
from emkum.models.families.registry import CATALOGUE, read_backbone
from emkum.models.listing import show, show_text
from emkum.models.network import Network, load_saved, save_network
from emkum.models.passes import Wanted, default_rule, rule_of
from emkum.models.supervision import Guard
from emkum.models.targets import LayersRule, layers_by_rule

RATE = 16_000
_, SECOND = data2vec_audio.FAMILIES
TOLERANCE = 1e-5
PREFIX = "modality_encoders.AUDIO"


def clips(*num_samples: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, generator=generator) * 0.1 + 0.02 for count in num_samples]


def padded(waves: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    return torch.nn.utils.rnn.pad_sequence(list(waves), batch_first=True), [len(wave) for wave in waves]


def worst(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def audio_backbone(network: Network) -> AudioBackbone:
    assert isinstance(network.backbone, AudioBackbone)
    return network.backbone


# --- data2vec, as transformers stores it ---------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gelu", "bias"])
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """A random Data2VecAudioModel and the folder it is saved in. `bias`: an even kernel, and biased convolutions."""
    from transformers import Data2VecAudioConfig, Data2VecAudioModel

    changes = {"conv_bias": True, "conv_pos_kernel_size": 8} if request.param == "bias" else {}
    config = Data2VecAudioConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(16,) * 7,
        num_conv_pos_embedding_groups=4,
        **changes,
    )
    torch.manual_seed(0)
    model = Data2VecAudioModel(config).eval()
    with torch.no_grad():  # norms and biases that do something
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path_factory.mktemp("data2vec-audio")
    model.save_pretrained(folder)
    return model, folder


def their_outputs(model: torch.nn.Module, wave: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states (embedding first) and feed-forward outputs of one clip, normalised as transformers does."""
    from transformers import Wav2Vec2FeatureExtractor

    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    values = extractor([wave.numpy()], sampling_rate=RATE, return_tensors="pt").input_values
    ffn: list[Tensor] = []
    hooks = [
        layer.feed_forward.register_forward_hook(lambda module, inputs, output: ffn.append(output))
        for layer in model.encoder.layers
    ]
    with torch.no_grad():
        hidden = model(values, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    return list(hidden), ffn


def test_every_layer_and_ffn_is_that_of_transformers(theirs: tuple[torch.nn.Module, Path]) -> None:
    model, folder = theirs
    network = load_network(str(folder))
    assert (network.modality, network.family, network.preprocessing) == ("audio", "data2vec-audio", None)
    backbone = audio_backbone(network)
    for wave in clips(16_000, 9_123, 400):
        hidden, ffn = their_outputs(model, wave)
        tokens, mask = backbone.embed(wave[None], [len(wave)])
        out = backbone.run(tokens, mask_BT=mask)
        assert mask.all()
        assert worst(tokens, hidden[0]) < TOLERANCE
        for ours, other in zip([*out.hidden, *out.ffn], [*hidden[1:], *ffn], strict=True):
            assert worst(ours, other) < TOLERANCE


def test_a_padded_batch_gives_each_clip_what_transformers_gives_it_alone(theirs: tuple[torch.nn.Module, Path]) -> None:
    model, folder = theirs
    backbone = audio_backbone(load_network(str(folder)))
    waves = clips(16_000, 4_000, 401, 12_345)
    tokens, mask = backbone.embed(*padded(waves))
    out = backbone.run(tokens, mask_BT=mask)
    for i, wave in enumerate(waves):
        hidden, ffn = their_outputs(model, wave)
        real = hidden[0].shape[1]
        assert mask[i].sum() == real == backbone.spec.num_frames(len(wave))
        for ours, other in zip([tokens, *out.hidden, *out.ffn], [*hidden, *ffn], strict=True):
            assert worst(ours[i, :real], other[0]) < TOLERANCE


def test_what_transformers_makes_of_a_padded_batch_depends_on_the_padding(
    theirs: tuple[torch.nn.Module, Path],
) -> None:
    """Why parity is asked clip by clip: pads leak in through the second and later convolutions of positions."""
    model, _ = theirs
    wave = clips(4_000)[0]
    values = torch.zeros(1, 16_000)
    values[0, :4_000] = (wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt()
    attention = torch.zeros(1, 16_000, dtype=torch.long)
    attention[0, :4_000] = 1
    with torch.no_grad():
        long = model(values, attention_mask=attention, output_hidden_states=True).hidden_states[0]
    alone = their_outputs(model, wave)[0][0]
    assert worst(long[:, : alone.shape[1]], alone) > 1e-3


def test_the_preprocessor_says_whether_waves_are_normalised(
    theirs: tuple[torch.nn.Module, Path], tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "raw"
    shutil.copytree(theirs[1], folder)
    (folder / "preprocessor_config.json").write_text('{"do_normalize": false, "sampling_rate": 8000}')
    raw = audio_backbone(load_network(str(folder)))
    assert (raw.spec.wave_eps, raw.spec.sample_rate) == (None, 8000)
    assert audio_backbone(load_network(str(theirs[1]))).spec.wave_eps == 1e-7
    wave = clips(4_000)[0]
    with torch.no_grad():
        expected = theirs[0](wave[None], output_hidden_states=True).hidden_states[0]
    assert worst(raw.embed(wave[None], [4_000])[0], expected) < TOLERANCE


def test_what_was_fine_tuned_with_transcripts_is_refused(tmp_path: Path) -> None:
    from transformers import Data2VecAudioConfig, Data2VecAudioForCTC

    config = Data2VecAudioConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,) * 7,
        num_conv_pos_embedding_groups=2,
    )
    Data2VecAudioForCTC(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedNetwork, match=r"is fine-tuned with transcripts: it has lm_head\.bias") as error:
        load_network(str(tmp_path))
    assert "use data2vec-audio" in error.value.way_out
    hidden = of_tensors({}, "hidden", {"architectures": ["Data2VecAudioForCTC"]})
    with pytest.raises(UnsupportedNetwork, match=r"its config\.json says Data2VecAudioForCTC"):
        data2vec_audio.key_map(hidden)


def test_a_network_of_sound_is_saved_and_loaded_whole(theirs: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    network = load_network(str(theirs[1]), name="heard")
    save_network(network, tmp_path / "kept")
    again = load_saved(tmp_path / "kept")
    assert again.backbone.spec == network.backbone.spec
    assert (again.weights_sha256, again.modality, again.patch) == (network.weights_sha256, "audio", 0)


# --- data2vec 2, from an original file ------------------------------------------------------------------------------


def original(
    width: int = 24,
    heads: int = 3,
    blocks: int = 2,
    prenet: int = 0,
    scales: Sequence[int] = (1, 1, 3, 1, 1),
    seed: int = 0,
) -> dict[str, Tensor]:
    """A random state dict under the names that fairseq gives them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, spread: float = 0.3) -> Tensor:
        return torch.randn(shape, generator=generator) * spread

    channels, found = 8, {f"{PREFIX}.alibi_scale": draw(*scales, spread=1.0)}
    for i, kernel in enumerate((10, 3, 3, 3, 3, 2, 2)):
        found[f"{PREFIX}.local_encoder.conv_layers.{i}.0.weight"] = draw(channels, channels if i else 1, kernel)
        found[f"{PREFIX}.local_encoder.conv_layers.{i}.2.1.weight"] = 1 + draw(channels, spread=0.1)
        found[f"{PREFIX}.local_encoder.conv_layers.{i}.2.1.bias"] = draw(channels, spread=0.1)
    found[f"{PREFIX}.project_features.1.weight"] = 1 + draw(channels, spread=0.1)
    found[f"{PREFIX}.project_features.1.bias"] = draw(channels, spread=0.1)
    found[f"{PREFIX}.project_features.2.weight"] = draw(width, channels)
    found[f"{PREFIX}.project_features.2.bias"] = draw(width, spread=0.1)
    for i in range(1, 6):
        found[f"{PREFIX}.relative_positional_encoder.{i}.0.weight"] = draw(width, width // 4, 19)
        found[f"{PREFIX}.relative_positional_encoder.{i}.0.bias"] = draw(width, spread=0.1)
    found[f"{PREFIX}.context_encoder.norm.weight"] = 1 + draw(width, spread=0.1)
    found[f"{PREFIX}.context_encoder.norm.bias"] = draw(width, spread=0.1)
    names = [f"{PREFIX}.context_encoder.blocks.{i}" for i in range(prenet)] + [f"blocks.{i}" for i in range(blocks)]
    for name in names:
        for norm in ("norm1", "norm2"):
            found[f"{name}.{norm}.weight"] = 1 + draw(width, spread=0.1)
            found[f"{name}.{norm}.bias"] = draw(width, spread=0.1)
        for part, out, into in (("attn.qkv", 3 * width, width), ("attn.proj", width, width)):
            found[f"{name}.{part}.weight"], found[f"{name}.{part}.bias"] = draw(out, into), draw(out, spread=0.1)
        for part, out, into in (("mlp.fc1", 4 * width, width), ("mlp.fc2", width, 4 * width)):
            found[f"{name}.{part}.weight"], found[f"{name}.{part}.bias"] = draw(out, into), draw(out, spread=0.1)
    return found


def reference(state: dict[str, Tensor], wave: Tensor, heads: int, prenet: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Data2vec 2 of one clip in float64, straight from arXiv:2212.07525 and its configuration: [T, D] per layer.

    Written without any module of emkum. Returns (embedding, then every block's output), (every FFN output).
    """
    at = {name: tensor.double() for name, tensor in state.items()}
    x = wave.double()
    x = (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)

    def norm(y: Tensor, name: str = "") -> Tensor:  # over the last axis
        y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, correction=0, keepdim=True) + 1e-5)
        return y * at[f"{name}.weight"] + at[f"{name}.bias"] if name else y

    def gelu(y: Tensor) -> Tensor:
        return 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))

    def linear(y: Tensor, name: str) -> Tensor:
        return y @ at[f"{name}.weight"].T + at[f"{name}.bias"]

    y = x[None, :]  # [channels, time]
    for i, stride in enumerate((5, 2, 2, 2, 2, 2, 2)):
        name = f"{PREFIX}.local_encoder.conv_layers.{i}"
        y = F.conv1d(y[None], at[f"{name}.0.weight"], stride=stride)[0]
        y = gelu(norm(y.T, f"{name}.2.1")).T
    h = linear(norm(y.T, f"{PREFIX}.project_features.1"), f"{PREFIX}.project_features.2")
    p = h
    for i in range(1, 6):
        name = f"{PREFIX}.relative_positional_encoder.{i}.0"
        weight = at[f"{name}.weight"]
        p = F.conv1d(p.T[None], weight, at[f"{name}.bias"], padding=9, groups=len(weight) // weight.shape[1])[0].T
        p = gelu(norm(p))
    h = norm(h + p, f"{PREFIX}.context_encoder.norm")
    num_blocks = sum(name.endswith("mlp.fc1.bias") for name in state)
    names = [f"{PREFIX}.context_encoder.blocks.{i}" for i in range(prenet)]
    names += [f"blocks.{i}" for i in range(num_blocks - prenet)]
    slopes = {2: [2**-4, 2**-8], 3: [2**-4, 2**-8, 2**-2], 4: [2**-2, 2**-4, 2**-6, 2**-8]}[heads]
    scale = at[f"{PREFIX}.alibi_scale"].reshape(-1, heads)
    frames, width = h.shape
    distance = torch.tensor([[abs(i - j) for j in range(frames)] for i in range(frames)], dtype=torch.float64)
    hidden, ffn = [h], []
    for index, name in enumerate(names):
        q, k, v = (part.reshape(frames, heads, -1) for part in linear(h, f"{name}.attn.qkv").split(width, -1))
        mixed = torch.zeros(frames, heads, width // heads, dtype=torch.float64)
        for head in range(heads):
            logits = q[:, head] @ k[:, head].T / math.sqrt(width // heads)
            logits -= max(float(scale[index % len(scale), head]), 0.0) * slopes[head] * distance
            mixed[:, head] = logits.softmax(-1) @ v[:, head]
        h = norm(h + linear(mixed.reshape(frames, width), f"{name}.attn.proj"), f"{name}.norm1")
        f = linear(gelu(linear(h, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        h = norm(h + f, f"{name}.norm2")
        hidden.append(h)
        ffn.append(f)
    return hidden, ffn


@pytest.mark.parametrize(
    ("heads", "prenet", "scales"),
    [(3, 0, (1, 1, 3, 1, 1)), (4, 2, (1, 4, 1, 1)), (2, 1, (3, 1, 2, 1, 1))],
    ids=["published", "prenet and an older file", "a scale for each block"],
)
def test_data2vec2_is_its_equations(heads: int, prenet: int, scales: tuple[int, ...], tmp_path: Path) -> None:
    state = original(heads=heads, prenet=prenet, scales=scales)
    shift = {f"{PREFIX}.decoder.proj.weight": torch.zeros(2, 2)}
    extra = {"_ema": {"blocks.0.norm1.weight": torch.zeros(24)}}
    path = tmp_path / "base_libri.pt"
    torch.save({"model": state | shift | extra, "cfg": {"model": {"depth": 2}}, "optimizer_history": []}, path)
    network = load_network(str(path))
    assert (network.family, network.modality, network.name) == ("data2vec2-audio", "audio", "base_libri")
    backbone = audio_backbone(network)
    assert (backbone.spec.heads, backbone.spec.prenet, backbone.depth) == (heads, prenet, 2 + prenet)
    waves = clips(8_000, 3_333, 400)
    tokens, mask = backbone.embed(*padded(waves))
    out = backbone.run(tokens, mask_BT=mask)
    for i, wave in enumerate(waves):
        hidden, ffn = reference(state, wave, heads, prenet)
        real = len(hidden[0])
        assert int(mask[i].sum()) == real
        for ours, other in zip([tokens, *out.hidden, *out.ffn], [*hidden, *ffn], strict=True):
            assert worst(ours[i, :real].double(), other) < TOLERANCE


def test_a_fine_tuned_data2vec2_is_refused() -> None:
    tuned = {f"w2v_encoder.w2v_model.{name}": tensor for name, tensor in original().items()}
    tuned["w2v_encoder.proj.weight"] = torch.zeros(32, 24)
    with pytest.raises(UnsupportedNetwork, match=r"is fine-tuned with transcripts: it has w2v_encoder\.proj\.weight"):
        read_backbone(SECOND, of_tensors(tuned, "file", {}))


def test_a_file_that_does_not_tell_its_heads_is_refused() -> None:
    state = original(scales=(1, 1, 1, 1, 1))
    with pytest.raises(UnsupportedNetwork, match="does not tell the number of heads"):
        read_backbone(SECOND, of_tensors(state, "file", {}))


def test_unknown_tensors_and_other_kernels_are_refused() -> None:
    state = original() | {f"{PREFIX}.relative_positional_encoder.0.weight": torch.zeros(24)}
    with pytest.raises(UnsupportedNetwork, match="unknown tensors"):
        read_backbone(SECOND, of_tensors(state, "file", {}))
    state = original()
    state[f"{PREFIX}.local_encoder.conv_layers.6.0.weight"] = torch.zeros(8, 8, 4)
    with pytest.raises(UnsupportedNetwork, match=r"kernels \[10, 3, 3, 3, 3, 2, 4\] and strides None"):
        read_backbone(SECOND, of_tensors(state, "file", {}))


def test_slopes_of_alibi_are_those_of_the_paper_and_of_fairseq() -> None:
    assert alibi_slopes(8) == [2.0**-h for h in range(1, 9)]  # the paper's own example
    assert alibi_slopes(1) == [2.0**-8]
    twelve = alibi_slopes(12)  # 8 heads, then every other one of 16
    assert twelve[:8] == alibi_slopes(8)
    np.testing.assert_allclose(twelve[8:], [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])


def test_the_names_of_the_catalogue() -> None:
    assert CATALOGUE["data2vec-audio"].modality == CATALOGUE["data2vec2-audio"].modality == "audio"
    assert {CATALOGUE[name].supervision for name in ("data2vec-audio", "data2vec2-audio")} == {"none"}
    assert CATALOGUE["data2vec2-audio"].targets == ("mean", "layers")


@pytest.mark.parametrize("name", ["data2vec-audio", "data2vec2-audio"])
def test_the_list_of_teachers_counts_a_second_of_sound(name: str) -> None:
    known = show(name)
    assert known["bytes_per_sample"] == {"mean": 1536, "patches": 76_800, "layers": 76_800}
    assert "a second of sound in float16" in show_text(known)
    assert "mean over the last 8 blocks of instance-normalised feed-forward outputs" in show_text(known)
    Guard(label_free=True, text_free=True).check([name])


def test_a_file_fine_tuned_with_transcripts_is_refused_by_its_tensors_whatever_its_name(tmp_path: Path) -> None:
    tuned = {f"w2v_encoder.w2v_model.{name}": tensor for name, tensor in original().items()}
    path = tmp_path / "mine.pt"
    torch.save({"model": tuned | {"w2v_encoder.proj.weight": torch.zeros(32, 24)}}, path)
    with pytest.raises(RefusedTeacher, match=r"learned from transcripts of speech \(it has w2v_encoder\.proj\.weight"):
        Guard(label_free=True).check([str(path)])


def test_an_original_file_is_shown_and_converted(tmp_path: Path, small_releases: None) -> None:
    path = tmp_path / "base_libri.pt"
    torch.save({"model": original(prenet=1) | {f"{PREFIX}.decoder.proj.weight": torch.zeros(2, 2)}}, path)
    known = show(str(path))
    assert (known["family"], known["modality"], known["depth"], known["layers_rule"]) == (
        "data2vec2-audio",
        "audio",
        3,
        "data2vec2",
    )
    made = convert(str(path), tmp_path / "out")
    assert made.provenance["dropped"] == [f"{PREFIX}.decoder.proj.weight"]
    read = load_network(str(tmp_path / "out"))
    assert (read.name, read.modality, read.supervision) == ("data2vec2-audio", "audio", "none")
    assert read.weights_sha256 == load_network(str(path)).weights_sha256
    assert show(str(tmp_path / "out"))["modality"] == "audio"


# --- targets --------------------------------------------------------------------------------------------------------


def tiny(depth: int = 10, prenet: int = 0, seed: int = 0) -> Network:
    state = original(blocks=depth - prenet, prenet=prenet, seed=seed)
    backbone = read_backbone(SECOND, of_tensors(state, "file", {}))
    return Network("tiny", "data2vec2-audio", "audio", backbone, None, None, 0, "0" * 64, "", "", "", "none")


WANTED = [Wanted("tiny", "mean"), Wanted("tiny", "layers"), Wanted("tiny", "patches")]


@pytest.mark.parametrize(("depth", "prenet", "first"), [(10, 0, 2), (10, 4, 4), (12, 2, 2), (3, 0, 0)])
def test_targets_against_a_plain_float64_reference(depth: int, prenet: int, first: int) -> None:
    network = tiny(depth, prenet)
    assert default_rule(network).counted(depth) == range(first, depth)
    state = original(blocks=depth - prenet, prenet=prenet)
    waves = clips(6_000, 2_000, 400)
    said = AudioPass([network], WANTED, "float32", "cpu").sounds(*padded(waves))
    for i, wave in enumerate(waves):
        hidden, ffn = reference(state, wave, 3, prenet)
        real = len(hidden[0])
        normed = [(f - f.mean(0)) / torch.sqrt(f.var(0, correction=0) + 1e-5) for f in ffn[first:]]
        expected = sum(normed) / len(normed)
        assert worst(said[0][i].double(), hidden[-1].mean(0)) < TOLERANCE
        if real > 1:  # of one frame, instance norm leaves nothing
            difference = said[1][i, :real].double() - expected
            assert float(difference.norm() / expected.norm()) < 3e-4  # IN amplifies the rounding of quiet channels
        else:
            assert not said[1][i].any()
        assert worst(said[2][i, :real].double(), hidden[-1]) < TOLERANCE
        assert not said[1][i, real:].any()
        assert not said[2][i, real:].any()


@pytest.mark.parametrize(
    "text", ["thesis", "data2vec", "site=block,last=2,norm=layer,final=yes", "site=ffn,skip=1,norm=none"]
)
def test_layers_by_another_rule(text: str) -> None:
    network = tiny(4, 2)
    rule = rule_of(network, text)
    wanted = [Wanted("tiny", "layers", rule=rule), Wanted("tiny", "layers")]
    state, waves = original(blocks=2, prenet=2), clips(6_000, 2_000)
    said = AudioPass([network], wanted, "float32", "cpu").sounds(*padded(waves))
    for i, wave in enumerate(waves):
        hidden, ffn = reference(state, wave, 3, 2)
        for ours, one in zip(said, (rule, default_rule(network)), strict=True):
            expected = layers_by_rule(one, [h[None] for h in hidden[1:]], [f[None] for f in ffn])[0]
            difference = ours[i, : len(expected)].double() - expected
            assert float(difference.norm() / expected.norm()) < 3e-4
            assert not ours[i, len(expected) :].any()


def test_rules_that_a_network_of_sound_cannot_follow() -> None:
    for text, match in (
        ("prefix=drop", "layers of tiny, which hears sounds, without CLS and registers: it has neither"),
        ("skip=10", "layers of tiny but the first 10: it has 10 blocks"),
    ):
        wanted = Wanted("tiny", "layers", rule=rule_of(tiny(), text))
        with pytest.raises(UnsupportedNetwork, match=match):
            AudioPass([tiny()], [wanted], "float32", "cpu")


def test_the_rules_of_the_families() -> None:
    assert default_rule(tiny()) == LayersRule("ffn", 8, 0, "instance")  # base has no prenet: the last 8
    assert default_rule(tiny(12, 2)) == LayersRule("ffn", None, 2, "instance")
    first = dataclasses.replace(tiny(), family="data2vec-audio")
    assert default_rule(first) == LayersRule("ffn", 8, 0, "instance")
    assert default_rule(first) != default_rule(dataclasses.replace(first, family="of its own"))


def test_silence_and_constant_sound_give_finite_targets() -> None:
    waves = torch.zeros(2, 4_000)
    waves[1] = 0.7
    said = AudioPass([tiny()], WANTED, "float32", "cpu").sounds(waves, [4_000, 4_000])
    assert all(torch.isfinite(values).all() for values in said)
    torch.testing.assert_close(said[0][0], said[0][1])


def test_lengths_are_the_frames_of_the_convolutions() -> None:
    spec = audio_backbone(tiny()).spec
    assert [spec.num_frames(n) for n in (399, 400, 719, 720, 16_000, 480_000)] == [0, 1, 1, 2, 49, 1499]
    frozen = AudioPass([tiny()], WANTED, "float32", "cpu")
    assert frozen.least_samples == 400
    assert frozen.lengths(WANTED[1], [400, 16_000]).tolist() == [1, 49]
    assert frozen.lengths(WANTED[1], [400]).dtype == np.int32


def test_only_what_is_asked_for_is_run_and_only_targets_of_sounds_are_known() -> None:
    frozen = AudioPass([tiny()], WANTED, "float32", "cpu")
    waves, num_samples = padded(clips(2_000))
    (mean,) = frozen.sounds(waves, num_samples, WANTED[:1])
    torch.testing.assert_close(mean, frozen.sounds(waves, num_samples)[0])
    assert frozen.only([]) is None
    narrowed = frozen.only(WANTED[:1])
    assert narrowed is not None
    assert narrowed.wanted == (WANTED[0],)
    with pytest.raises(UnsupportedNetwork, match="target cls of tiny, which hears sounds"):
        AudioPass([tiny()], [Wanted("tiny", "cls")], "float32", "cpu")


def test_bfloat16_reads_the_wave_in_float32() -> None:
    frozen = AudioPass([tiny()], WANTED, "bfloat16", "cpu")
    backbone = frozen.backbone(WANTED[0])
    types = [conv.weight.dtype for conv in backbone.embedding.convs]
    assert types == [torch.float32] + [torch.bfloat16] * 6
    waves, num_samples = padded(clips(4_000, 2_000))
    exact = AudioPass([tiny()], WANTED, "float32", "cpu").sounds(waves, num_samples)
    mean, _, frames = zip(frozen.sounds(waves, num_samples), exact, strict=True)  # quiet channels of IN are noise
    for ours, other in (mean, frames):
        assert float(F.cosine_similarity(ours.flatten(), other.flatten(), 0)) > 0.99


def test_an_architecture_of_sound_survives_json() -> None:
    import json

    spec = audio_backbone(tiny(prenet=2)).spec
    assert AudioSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    with pytest.raises(UnsupportedNetwork, match=r"unknown keys \['later'\]"):
        AudioSpec.from_json(spec.to_json() | {"later": 1})
    with pytest.raises(UnsupportedNetwork, match="a tiny network with depth below 1"):
        AudioSpec("tiny", 0, 8, 2, 8, ((8, 10, 5),), 3, 1, 2)
