"""Data2vec 2.0 from fairseq's files, against its equations and transformers; originals of version 1 and of BEiT-2.

B batch, T tokens, D width, H heads, P patches.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F
import transformers
from test_models_beit2 import original_state as beit2_state
from test_models_families import TOLERANCE, randomised, relative, saved
from torch import Tensor

from emkum.errors import UnsupportedNetwork, WeightsUnavailable
from emkum.models import fetch
from emkum.models.backbone import BackboneSpec
from emkum.models.catalogue import load_network
from emkum.models.convert import convert
from emkum.models.families import originals
from emkum.models.families.checkpoint import Checkpoint, of_tensors
from emkum.models.families.data2vec2 import heads_of, key_map
from emkum.models.families.fairseq_bpe import tokenizer
from emkum.models.families.registry import CATALOGUE
from emkum.models.network import load_saved, normalise, save_network
from emkum.models.passes import FrozenPass, Wanted
from emkum.models.preprocessing import IMAGENET_MEAN
from emkum.models.tokenizer import count_of_ids, text_ids

WIDTH, HEADS, MLP, PRENET, DEPTH, PATCH, GRID, WORDS = 128, 2, 72, 2, 3, 4, 5, 271  # words: as write_bpe lists
IMAGE, TEXT = "modality_encoders.IMAGE", "modality_encoders.TEXT.local_encoder"

# --- files as fairseq writes them ------------------------------------------------------------------------


class Weights:
    """Random tensors by name; nothing at 0 or 1."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.state: dict[str, Any] = {}

    def add(self, name: str, *shape: int, scale: float = 0.15, around: float = 0.0) -> None:
        self.state[name] = around + scale * torch.randn(*shape, generator=self.generator)

    def norm(self, name: str) -> None:
        self.add(f"{name}.weight", WIDTH, scale=0.3, around=0.8)
        self.add(f"{name}.bias", WIDTH)

    def linear(self, name: str, rows: int, columns: int) -> None:
        self.add(f"{name}.weight", rows, columns)
        self.add(f"{name}.bias", rows)

    def block(self, name: str) -> None:
        self.norm(f"{name}.norm1")
        self.linear(f"{name}.attn.qkv", 3 * WIDTH, WIDTH)
        self.linear(f"{name}.attn.proj", WIDTH, WIDTH)
        self.norm(f"{name}.norm2")
        self.linear(f"{name}.mlp.fc1", MLP, WIDTH)
        self.linear(f"{name}.mlp.fc2", WIDTH, MLP)


def sincos(grid: int) -> Tensor:
    """The 2-D sin-cos table [1, P, D]: a quarter of the channels each to the sine and cosine of column, then of row."""
    frequency = 10000.0 ** -(torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH / 4))
    rows, columns = torch.meshgrid(*(2 * [torch.arange(grid, dtype=torch.float64)]), indexing="ij")
    parts = [wave(place.reshape(-1, 1) * frequency) for place in (columns, rows) for wave in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1).float()[None]


def image_weights(seed: int, prenet: int = PRENET) -> dict[str, Any]:
    weights = Weights(seed)
    weights.add(f"{IMAGE}.local_encoder.proj.weight", WIDTH, 3, PATCH, PATCH)
    weights.add(f"{IMAGE}.local_encoder.proj.bias", WIDTH)
    weights.add(f"{IMAGE}.extra_tokens", 1, 1, WIDTH, scale=1.0)
    weights.state[f"{IMAGE}.fixed_positional_encoder.positions"] = sincos(GRID)
    weights.norm(f"{IMAGE}.context_encoder.norm")
    for index in range(prenet):
        weights.block(f"{IMAGE}.context_encoder.blocks.{index}")
    for index in range(DEPTH):
        weights.block(f"blocks.{index}")
    return weights.state


def image_state(prenet: int = PRENET) -> dict[str, Any]:
    """What `data2vec_multi` saves of pictures: the network, its decoder, and a whole teacher without one."""
    decoder = {
        f"{IMAGE}.decoder.blocks.0.0.weight": torch.zeros(8, 8, 3, 3),
        f"{IMAGE}.decoder.proj.bias": torch.zeros(9),
    }
    return image_weights(0, prenet) | decoder | {"_ema": image_weights(1, prenet)}


def text_state() -> dict[str, Any]:
    weights = Weights(2)
    weights.add(f"{TEXT}.embed_tokens.weight", WORDS, WIDTH, scale=0.5)
    weights.add(f"{TEXT}.embed_positions.weight", 34, WIDTH, scale=0.5)
    weights.norm(f"{TEXT}.layernorm_embedding")
    teacher = Weights(3)
    for index in range(DEPTH):
        weights.block(f"blocks.{index}")
        teacher.block(f"{index}")
    decoder = {"modality_encoders.TEXT.decoder.blocks.0.0.weight": torch.zeros(8, 8, 9)}
    return weights.state | decoder | {"_ema": teacher.state}


def options(**model: Any) -> dict[str, Any]:
    return {"_name": None, "model": {"_name": "data2vec_multi", "depth": DEPTH} | model, "task": {"data": "/data"}}


def write(path: Path, state: dict[str, Any], **more: Any) -> Path:
    """A file of fairseq's trainer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = {"args": None, "optimizer_history": [{"num_updates": 375300}], "extra_state": {"epoch": 1}}
    torch.save({"cfg": options(), "model": state} | rest | more, path)
    return path


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    return write(tmp_path / "release/base_imagenet.pt", image_state())


# --- the equations ---------------------------------------------------------------------------------------


def layer_norm(x: Tensor, state: dict[str, Any], name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def block(x_BTD: Tensor, state: dict[str, Any], name: str, eps: float, heads: int) -> tuple[Tensor, Tensor]:
    """x = norm1(x + attn(x)); t = mlp(x); x = norm2(x + t). Hands out x and t."""

    def linear(x: Tensor, part: str) -> Tensor:
        return x @ state[f"{name}.{part}.weight"].T + state[f"{name}.{part}.bias"]

    q, k, v = (torch.stack(part.chunk(heads, dim=-1), dim=1) for part in linear(x_BTD, "attn.qkv").chunk(3, dim=-1))
    weights_BHTT = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    attended_BTD = torch.cat((weights_BHTT @ v).unbind(1), dim=-1)
    x_BTD = layer_norm(x_BTD + linear(attended_BTD, "attn.proj"), state, f"{name}.norm1", eps)
    t_BTD = linear(F.gelu(linear(x_BTD, "mlp.fc1")), "mlp.fc2")
    return layer_norm(x_BTD + t_BTD, state, f"{name}.norm2", eps), t_BTD


def image_reference(
    images: Tensor, state: dict[str, Any], heads: int = HEADS, eps: float = 1e-6
) -> tuple[list[Tensor], list[Tensor]]:
    """The tokens in front of the prenet and after each block, and the feed-forward outputs."""
    weight, bias = state[f"{IMAGE}.local_encoder.proj.weight"], state[f"{IMAGE}.local_encoder.proj.bias"]
    patches = F.conv2d(images, weight, bias, stride=PATCH)
    table = state[f"{IMAGE}.fixed_positional_encoder.positions"].reshape(GRID, GRID, WIDTH).permute(2, 0, 1)[None]
    if patches.shape[2:] != (GRID, GRID):
        table = F.interpolate(table, size=patches.shape[2:], mode="bicubic", align_corners=False)
    x = (patches + table).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{IMAGE}.extra_tokens"].expand(len(x), -1, -1), x], dim=1)
    hidden, ffn = [layer_norm(x, state, f"{IMAGE}.context_encoder.norm", eps)], []
    names = [f"{IMAGE}.context_encoder.blocks.{i}" for i in range(PRENET)] + [f"blocks.{i}" for i in range(DEPTH)]
    for name in names:
        if f"{name}.norm1.weight" in state:
            x, t = block(hidden[-1], state, name, eps, heads)
            hidden.append(x)
            ffn.append(t)
    return hidden, ffn


def instance_normed(x_BTD: Tensor) -> Tensor:
    return F.instance_norm(x_BTD.transpose(1, 2)).transpose(1, 2)


def some_images(rows: int = GRID, columns: int = GRID) -> Tensor:
    return torch.randn(2, 3, rows * PATCH, columns * PATCH, generator=torch.Generator().manual_seed(9))


def assert_same(network: Any, images: Tensor, hidden: list[Tensor], ffn: list[Tensor]) -> None:
    with torch.no_grad():
        tokens = network.backbone.embed(images)
        out = network.backbone.run(tokens, grid=network.backbone.grid(*images.shape[2:]))
        final = network.backbone.finish(out.hidden[-1])
    for ours, theirs in zip([tokens, *out.hidden, final], [*hidden, hidden[-1]], strict=True):
        assert relative(ours, theirs) < TOLERANCE
    for ours, theirs in zip(out.ffn, ffn, strict=True):
        assert relative(ours, theirs) < TOLERANCE


# --- pictures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(5, 5), (8, 8), (3, 7)], ids=str)
@pytest.mark.parametrize("prenet", [PRENET, 0], ids=["base", "large"])
def test_a_file_of_pictures_gives_the_numbers_of_the_equations(
    prenet: int, grid: tuple[int, int], tmp_path: Path
) -> None:
    network = load_network(str(write(tmp_path / "file.pt", image_state(prenet))))
    images = some_images(*grid)
    assert_same(network, images, *image_reference(images, image_weights(0, prenet)))
    spec = network.backbone.spec
    assert isinstance(spec, BackboneSpec)
    assert (network.family, spec.depth, spec.prenet, spec.heads) == ("data2vec2-image", prenet + DEPTH, prenet, HEADS)
    assert (spec.norm_order, spec.layer_scale, spec.final_norm, spec.pre_norm) == ("post", False, False, True)
    assert network.preprocessing is not None
    assert (network.preprocessing.mean, network.preprocessing.crop_fraction) == (IMAGENET_MEAN, 224 / 256)


def test_cls_has_no_position(image_file: Path) -> None:
    positions = load_network(str(image_file)).backbone.embedding.positions
    assert not positions[0].any()
    assert torch.equal(positions[1:], sincos(GRID)[0])


def test_the_heads_and_the_epsilon_are_those_of_the_training_where_the_file_tells(tmp_path: Path) -> None:
    path = write(tmp_path / "file.pt", image_state(), cfg=options(num_heads=4, norm_eps=1e-3))
    reference = image_reference(some_images(), image_weights(0), heads=4, eps=1e-3)
    assert_same(load_network(str(path)), some_images(), *reference)
    kept = originals.as_safetensors(path, "abc")
    assert_same(load_network(str(kept)), some_images(), *reference)


def test_the_huge_network_has_sixteen_heads_of_eighty_channels() -> None:
    nothing = Checkpoint("file.pt", {}, {}, lambda name: torch.zeros(0))
    assert [heads_of(nothing, width) for width in (768, 1024, 1280)] == [12, 16, 16]


@pytest.mark.parametrize("width", [100, 1408, 1536])
def test_other_heads_are_not_guessed(width: int) -> None:
    with pytest.raises(UnsupportedNetwork, match=f"is {width} wide and does not say how many heads its attention has"):
        heads_of(Checkpoint("file.pt", {}, {}, lambda name: torch.zeros(0)), width)


def test_the_heads_are_said_to_be_inferred_unless_the_file_tells_them() -> None:
    for config, inferred in (({}, {"heads": HEADS}), ({"model": {"num_heads": 4}}, {})):
        assert key_map(of_tensors(originals._flat(image_state()), "file.pt", config)).inferred == inferred


def test_all_targets_come_out_of_one_pass_and_layers_are_those_of_the_training(image_file: Path) -> None:
    network = load_network(str(image_file))
    crops = torch.randint(0, 256, (2, 20, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    wanted = [Wanted(network.name, "cls"), Wanted(network.name, "patches"), Wanted(network.name, "layers")]
    cls, patches, layers = FrozenPass([network], wanted, "float32", "cpu").pictures(crops)
    hidden, ffn = image_reference(normalise(network, crops), image_weights(0))
    assert relative(cls, hidden[-1][:, 0]) < TOLERANCE
    assert relative(patches, hidden[-1][:, 1:]) < TOLERANCE
    # make_targets of data2vec2.py: blocks after the prenet, without CLS; instance norm, mean, layer norm.
    mean = torch.stack([instance_normed(t[:, 1:].double()) for t in ffn[PRENET:]]).mean(0)
    assert relative(layers, F.layer_norm(mean, [WIDTH]).float()) < 5 * TOLERANCE


def test_the_moving_average_is_another_network_of_the_same_file(
    image_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_releases: None
) -> None:
    teacher = convert(str(image_file), tmp_path / "teacher", family="data2vec2-image-ema").network
    assert_same(teacher, some_images(), *image_reference(some_images(), image_weights(1)))
    assert teacher.name == "data2vec2-image-ema"
    assert load_saved(tmp_path / "teacher").weights_sha256 == teacher.weights_sha256
    monkeypatch.setenv(fetch.WEIGHTS_DIR, str(image_file.parent))
    by_name = load_network("data2vec2-image-ema", offline=True)
    student = load_network("data2vec2-image", offline=True)
    assert by_name.weights_sha256 == load_network("data2vec2-image-ema#image").weights_sha256 == teacher.weights_sha256
    assert student.weights_sha256 == load_network(str(image_file)).weights_sha256 != teacher.weights_sha256
    assert (by_name.licence, by_name.supervision) == ("CC-BY-NC-4.0", "none")


def test_a_file_without_a_moving_average_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "file.pt", image_weights(0))
    assert load_network(str(path)).depth == PRENET + DEPTH
    with pytest.raises(UnsupportedNetwork, match=r"holds no moving average of the weights \(_ema\)") as caught:
        convert(str(path), tmp_path / "out", family="data2vec2-image-ema")
    assert "without -ema" in caught.value.way_out


def renamed(state: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {name.replace(old, new): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("end", ["positions", "pos_embed"])
def test_the_names_of_older_files_are_read(end: str, tmp_path: Path, image_file: Path) -> None:
    state = renamed(image_state(), "fixed_positional_encoder.positions", f"positional_encoder.{end}")
    state[f"{IMAGE}.encoder_mask"] = torch.zeros(1, 1, WIDTH)
    path = write(tmp_path / "old.pt", state)
    assert load_network(str(path)).weights_sha256 == load_network(str(image_file)).weights_sha256


def test_half_precision_is_read_as_it_was_rounded(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in image_weights(0).items()}
    network = load_network(str(write(tmp_path / "half.pt", state)))
    rounded = {name: tensor.float() for name, tensor in state.items()}
    assert_same(network, some_images(), *image_reference(some_images(), rounded))


def test_attention_biases_are_refused_with_their_name(tmp_path: Path) -> None:
    state = image_state() | {f"{IMAGE}.alibi_bias": torch.zeros(1, HEADS, 25, 25)}
    with pytest.raises(
        UnsupportedNetwork, match=r"adds biases to its attention \(modality_encoders\.IMAGE\.alibi_bias"
    ):
        load_network(str(write(tmp_path / "file.pt", state)))


def test_a_fine_tuned_file_is_refused(tmp_path: Path) -> None:
    state = {f"model.{name}": tensor for name, tensor in image_weights(0).items()}
    heads = {"fc_norm.weight": torch.ones(WIDTH), "head.weight": torch.zeros(10, WIDTH)}
    path = write(tmp_path / "base_imagenet_ft.pt", state | heads)
    with pytest.raises(UnsupportedNetwork, match=r"fine-tuned with labels: it has fc_norm\.weight") as caught:
        load_network(str(path))
    assert caught.value.way_out == "use a file without _ft in its name: base_imagenet.pt"


Edit = Callable[[dict[str, Any]], object]
EDITS: dict[str, tuple[Edit, str]] = {
    "missing": (lambda s: s.pop("blocks.1.norm2.bias"), r"it lacks blocks\.1\.norm2\.bias"),
    "missing in the shapes": (lambda s: s.pop(f"{IMAGE}.extra_tokens"), r"it lacks .*extra_tokens"),
    "left over": (lambda s: s.update({"norm.weight": torch.ones(WIDTH)}), r"unknown tensors norm\.weight"),
    "wrong shape": (lambda s: s.update({"blocks.0.norm1.bias": torch.zeros(7)}), r"norm1\.bias has shape \(7,\)"),
    "two extra tokens": (
        lambda s: s.update({f"{IMAGE}.extra_tokens": torch.zeros(1, 2, WIDTH)}),
        r"extra_tokens has shape \(1, 2, 128\)",
    ),
    "no table": (
        lambda s: s.pop(f"{IMAGE}.fixed_positional_encoder.positions"),
        r"is no data2vec 2\.0 of pictures: it lacks .*positions",
    ),
    "a table with a row for cls": (
        lambda s: s.update({f"{IMAGE}.fixed_positional_encoder.positions": torch.zeros(1, 26, WIDTH)}),
        r"positions has shape \(27, 128\), config.json implies \(26, 128\)",
    ),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_file_that_is_not_exactly_the_network_is_refused(case: str, tmp_path: Path) -> None:
    edit, message = EDITS[case]
    state = image_state()
    edit(state)
    with pytest.raises(UnsupportedNetwork, match=message):
        load_network(str(write(tmp_path / "file.pt", state)))


def test_saved_and_loaded_again_it_is_the_same_and_bfloat16_stays_near(image_file: Path, tmp_path: Path) -> None:
    network = load_network(str(image_file))
    save_network(network, tmp_path / "kept")
    again = load_saved(tmp_path / "kept")
    assert (again.weights_sha256, again.backbone.spec) == (network.weights_sha256, network.backbone.spec)
    with torch.inference_mode():
        exact = network.backbone(some_images())
        assert torch.equal(again.backbone(some_images()), exact)
        assert relative(network.placed("cpu", torch.bfloat16).backbone(some_images()), exact) < 0.03


def test_a_prenet_is_told_in_the_architecture_only_where_there_is_one(image_file: Path, tmp_path: Path) -> None:
    assert load_network(str(image_file)).backbone.spec.to_json()["prenet"] == PRENET
    without = load_network(str(write(tmp_path / "large.pt", image_state(0))))
    assert "prenet" not in without.backbone.spec.to_json()
    with pytest.raises(UnsupportedNetwork, match="with a prenet of 6 of its 5 blocks"):
        BackboneSpec("x", "image", 5, 8, 2, 8, patch=4, image_size=8, prenet=6)


# --- what a pickle may name ------------------------------------------------------------------------------


def fake_package(monkeypatch: pytest.MonkeyPatch, module: str, *names: str) -> list[type]:
    """Classes as of an installed package, while a file is written."""
    classes = [type(name, (), {"__module__": module}) for name in names]
    parts = module.split(".")
    for depth in range(1, len(parts)):
        outer = ".".join(parts[:depth])
        monkeypatch.setitem(sys.modules, outer, sys.modules.get(outer) or ModuleType(outer))
    made = ModuleType(module)
    for cls in classes:
        setattr(made, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, module, made)
    return classes


def test_options_in_omegaconf_are_read_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as writing:
        (config,) = fake_package(writing, "omegaconf.dictconfig", "DictConfig")
        (node,) = fake_package(writing, "omegaconf.nodes", "AnyNode")
        (metadata,) = fake_package(writing, "omegaconf.base", "ContainerMetadata")
        (dictionary,) = fake_package(writing, "fairseq.data.dictionary", "Dictionary")

        def built(cls: type, **state: Any) -> Any:
            made = cls()
            made.__dict__.update(state)
            return made

        def wrapped(value: Any) -> Any:
            if isinstance(value, dict):
                content = {key: wrapped(inner) for key, inner in value.items()}
                return built(config, _content=content, _metadata=built(metadata, ref_type=Any, object_type=dict))
            return built(node, _val=value)

        path = write(
            tmp_path / "file.pt",
            image_state(),
            cfg=wrapped(options(num_heads=4)),
            task_state={"words": built(dictionary, symbols=["<s>"]), "loss": np.float64(0.25)},
            args=argparse.Namespace(arch="data2vec_multi"),
        )
    assert "omegaconf" not in sys.modules
    network = load_network(str(path))
    assert network.backbone.spec.heads == 4
    assert_same(network, some_images(), *image_reference(some_images(), image_weights(0), heads=4))


@pytest.mark.parametrize("module", ["omegaconf_of_another", "shutil_like.inner", "numpy_like"])
def test_any_other_name_in_a_pickle_is_refused_and_told(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as writing:
        (trap,) = fake_package(writing, module, "Trap")
        path = write(tmp_path / "file.pt", image_state(), extra=trap())
    with pytest.raises(UnsupportedNetwork, match=rf"more than tensors and options: it names {module}\.Trap") as caught:
        load_network(str(path))
    assert caught.value.way_out == "convert it to safetensors where you trust it"


def test_a_call_in_a_pickle_is_refused_and_not_made(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return Path.mkdir, (tmp_path / "made",)

    path = write(tmp_path / "file.pt", image_state(), extra=Trap())
    with pytest.raises(UnsupportedNetwork, match=r"it names .*getattr"):
        load_network(str(path))
    assert not (tmp_path / "made").exists()


def test_a_file_in_the_form_before_torch_1_6_is_read_with_options_in_a_namespace(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    state = image_state()
    found = {"model": state, "args": argparse.Namespace(arch="data2vec_multi")}
    torch.save(found, path, _use_new_zipfile_serialization=False)
    assert load_network(str(path)).backbone.spec.prenet == PRENET


# --- texts -----------------------------------------------------------------------------------------------

BPE_FILES = ("dict.txt", "encoder.json", "vocab.bpe")


def text_reference(state: dict[str, Any]) -> Any:
    """transformers' model with the same weights."""
    config = transformers.Data2VecTextConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
        max_position_embeddings=34,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
    )
    model = transformers.Data2VecTextModel(config, add_pooling_layer=False).eval()
    theirs = {
        "embeddings.word_embeddings.weight": state[f"{TEXT}.embed_tokens.weight"],
        "embeddings.position_embeddings.weight": state[f"{TEXT}.embed_positions.weight"],
        "embeddings.LayerNorm.weight": state[f"{TEXT}.layernorm_embedding.weight"],
        "embeddings.LayerNorm.bias": state[f"{TEXT}.layernorm_embedding.bias"],
        "embeddings.token_type_embeddings.weight": torch.zeros(1, WIDTH),
    }
    for i in range(DEPTH):
        for end in ("weight", "bias"):
            qkv = state[f"blocks.{i}.attn.qkv.{end}"].chunk(3)
            for name, part in zip(("query", "key", "value"), qkv, strict=True):
                theirs[f"encoder.layer.{i}.attention.self.{name}.{end}"] = part
            for ours, their in (
                ("attn.proj", "attention.output.dense"),
                ("norm1", "attention.output.LayerNorm"),
                ("mlp.fc1", "intermediate.dense"),
                ("mlp.fc2", "output.dense"),
                ("norm2", "output.LayerNorm"),
            ):
                theirs[f"encoder.layer.{i}.{their}.{end}"] = state[f"blocks.{i}.{ours}.{end}"]
    missing, unexpected = model.load_state_dict(theirs, strict=False)
    assert not unexpected
    assert all("position_ids" in name or "token_type_ids" in name for name in missing)
    return model


def some_texts() -> tuple[Tensor, Tensor]:
    """Ids with garbage in the pads, and the mask of real ones; one text has a gap, which counts for no position."""
    mask = torch.arange(16) < torch.tensor([9, 4, 1, 16])[:, None]
    mask[3, 5:8] = False
    return torch.randint(5, WORDS, (4, 16), generator=torch.Generator().manual_seed(2)), mask


def assert_same_texts(network: Any, model: Any) -> None:
    ids, mask = some_texts()
    theirs_ffn: list[Tensor] = []
    for index in range(DEPTH):
        module = model.get_submodule(f"encoder.layer.{index}.output.dense")
        module.register_forward_hook(lambda _module, _inputs, output: theirs_ffn.append(output))
    with torch.no_grad():
        theirs = model(ids.masked_fill(~mask, 1), attention_mask=mask.long(), output_hidden_states=True)
        tokens = network.backbone.embed(ids.int(), mask)
        out = network.backbone.run(tokens, mask_BT=mask)
    for ours, their in zip([tokens, *out.hidden], theirs.hidden_states, strict=True):
        assert relative(ours[mask], their[mask]) < TOLERANCE
    for ours, their in zip(out.ffn, theirs_ffn, strict=True):
        assert relative(ours[mask], their[mask]) < TOLERANCE
    wanted = [Wanted(network.name, "cls"), Wanted(network.name, "patches"), Wanted(network.name, "layers")]
    cls, patches, layers = FrozenPass([network], wanted, "float32", "cpu").texts(ids.int(), mask)
    assert relative(cls, theirs.last_hidden_state[:, 0]) < TOLERANCE
    assert relative(patches[:, 1:][mask[:, 1:]], theirs.last_hidden_state[:, 1:][mask[:, 1:]]) < TOLERANCE
    for row, real in enumerate(mask):
        if network.family == "data2vec2-text" and real.sum() > 1:  # make_targets without pads: instance norm, mean
            parts = [instance_normed(t[row : row + 1, real].double()) for t in theirs_ffn]
            assert relative(layers[row, real], torch.stack(parts).mean(0)[0].float()) < 5 * TOLERANCE
        assert not layers[row, ~real].any()


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    folder = tmp_path / "release"
    write_bpe(folder)
    return write(folder / "nlp_base.pt", text_state())


def test_a_file_of_texts_gives_the_numbers_of_transformers(text_file: Path) -> None:
    network = load_network(str(text_file))
    assert_same_texts(network, text_reference(text_state()))
    spec = network.backbone.spec
    assert isinstance(spec, BackboneSpec)
    assert (network.family, network.modality, spec.vocab_size, spec.heads) == ("data2vec2-text", "text", WORDS, HEADS)
    assert network.max_tokens == 32


def test_the_moving_average_of_texts_has_the_embedding_that_was_trained(
    text_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = text_state()
    averaged = state | {f"blocks.{name}": tensor for name, tensor in state["_ema"].items()}
    monkeypatch.setenv(fetch.WEIGHTS_DIR, str(tmp_path / "kept"))
    (tmp_path / "kept").mkdir()
    text_file.parent.rename(tmp_path / "kept/data2vec2")
    network = load_network("data2vec2-text-ema", offline=True)
    assert_same_texts(network, text_reference(averaged))
    student = load_network("data2vec2-text", offline=True)
    assert_same_texts(student, text_reference(state))
    assert student.tokenizer == network.tokenizer
    assert (student.licence, student.name) == ("MIT", "data2vec2-text")


def test_texts_survive_saving_and_bfloat16_and_refuse_what_does_not_fit(text_file: Path, tmp_path: Path) -> None:
    network = load_network(str(text_file))
    save_network(network, tmp_path / "kept")
    again = load_saved(tmp_path / "kept")
    assert (again.weights_sha256, again.tokenizer) == (network.weights_sha256, network.tokenizer)
    ids, mask = some_texts()
    with torch.inference_mode():
        exact = network.backbone(ids, mask)
        near = network.placed("cpu", torch.bfloat16).backbone(ids, mask)
    assert relative(near[mask], exact[mask]) < 0.03
    text_edits: list[tuple[Edit, str]] = [
        (lambda s: s.pop("blocks.2.mlp.fc2.bias"), r"it lacks blocks\.2\.mlp\.fc2\.bias"),
        (lambda s: s.update({"modality_encoders.TEXT.alibi_scale": torch.ones(1)}), "unknown tensors .*alibi_scale"),
        (lambda s: s.update({"blocks.0.attn.proj.bias": torch.ones(3)}), r"proj\.bias has shape \(3,\)"),
        (lambda s: s.pop(f"{TEXT}.embed_positions.weight"), "is no data2vec 2.0 of texts: it lacks .*embed_positions"),
        (lambda s: s.update({"classification_heads.x.dense.weight": torch.ones(1)}), "fine-tuned with labels"),
    ]
    for edit, message in text_edits:
        state = text_state()
        edit(state)
        with pytest.raises(UnsupportedNetwork, match=message):
            load_network(str(write(text_file, state)))


# --- the tokenizer of texts ------------------------------------------------------------------------------

MERGES = [("d", "o"), ("do", "g"), ("Ġ", "dog"), ("Ã", "©"), ("Ġ", "a"), ("1", "2"), ("'", "s"), ("Ġa", "b")]


def byte_letters() -> dict[int, str]:
    """Each byte as one visible letter: itself if it is one, else the next free one from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def write_bpe(folder: Path, unlisted: tuple[str, ...] = ()) -> None:
    """The three files of a small release. unlisted: byte pairs that the dictionary lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*byte_letters().values(), *("".join(merge) for merge in MERGES), "<|endoftext|>"]
    encoder = {token: number for number, token in enumerate(tokens)}
    (folder / "encoder.json").write_text(json.dumps(encoder))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in MERGES), ""]
    (folder / "vocab.bpe").write_text("\n".join(lines), encoding="utf-8")
    # By frequency, as fairseq writes it: another order than GPT-2's.
    listed = [encoder[token] for token in reversed(tokens) if token not in unlisted]
    words = [f"{number} {9999 - i}\n" for i, number in enumerate(listed)]
    (folder / "dict.txt").write_text("".join([*words, "madeupword0000 0\n"]))


def plain_ids(folder: Path, text: str) -> list[int]:
    """What fairseq gives: byte pairs joined in the order of the merges, then the number of the dictionary's line."""
    encoder = json.loads((folder / "encoder.json").read_text())
    symbols = [line.split(" ")[0] for line in (folder / "dict.txt").read_text().splitlines()]
    numbers = {symbol: 4 + index for index, symbol in enumerate(symbols)}
    letters, ids = byte_letters(), [0]
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for word in regex.findall(pattern, text):
        parts = [letters[byte] for byte in word.encode("utf-8")]
        for left, right in MERGES:
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == (left, right):
                    joined[-1] = left + right
                else:
                    joined.append(part)
            parts = joined
        ids += [numbers.get(str(encoder[part]), 3) for part in parts]
    return ids


CAPTIONS = ["dog", "a dog's dog", " dog  ab 12 é", "été 東京 \u200d🐕", "tab\tnew\nline ", "<s> <pad> <mask> </s>", ""]


@pytest.mark.parametrize("unlisted", [(), ("do", "Ġa", "x")], ids=["whole", "with holes"])
def test_captions_get_the_ids_of_fairseq(unlisted: tuple[str, ...], tmp_path: Path) -> None:
    write_bpe(tmp_path, unlisted)
    captions = [*CAPTIONS, "do x a Ġ abx"]
    ids, length = text_ids(tokenizer(tmp_path), captions, 64)
    for row, caption in enumerate(captions):
        expected = plain_ids(tmp_path, caption)
        assert ids[row, : length[row]].tolist() == expected
        assert set(ids[row, length[row] :].tolist()) == {1}  # pads
    num_words = 4 + len((tmp_path / "dict.txt").read_text().splitlines()) + 1
    assert ids.max() < num_words
    assert bool((ids[-1] == 3).any()) == bool(unlisted)


def test_a_caption_begins_with_bos_and_has_no_eos_even_where_it_is_cut(tmp_path: Path) -> None:
    write_bpe(tmp_path)
    ids, length = text_ids(tokenizer(tmp_path), ["dog", "dog " * 40], 16)
    assert length.tolist() == [2, 16]
    assert ids[:, 0].tolist() == [0, 0]
    assert 2 not in ids


def test_the_tokenizer_is_the_same_bytes_every_time_and_others_for_another_dictionary(tmp_path: Path) -> None:
    write_bpe(tmp_path)
    made = tokenizer(tmp_path)
    assert tokenizer(tmp_path) == made
    write_bpe(tmp_path, ("do",))
    assert tokenizer(tmp_path) != made


@pytest.mark.parametrize(("lines", "num_ids"), [("madeupword0001 0\n", WORDS + 1), ("", WORDS - 1)])
def test_a_dictionary_of_another_length_than_the_table_is_refused(lines: str, num_ids: int, text_file: Path) -> None:
    listed = text_file.with_name("dict.txt")
    longer = "madeupword0000 0\n" + lines if lines else ""
    listed.write_text(listed.read_text().replace("madeupword0000 0\n", longer))
    with pytest.raises(
        UnsupportedNetwork, match=f"has a tokenizer of {num_ids} ids, up to {num_ids - 1}; the"
    ) as caught:
        load_network(str(text_file))
    assert caught.value.what.endswith(f"the network knows {WORDS} words")


def test_a_dictionary_with_holes_is_counted_by_its_lines(text_file: Path) -> None:
    write_bpe(text_file.parent, ("do", "x"))
    listed = text_file.with_name("dict.txt")
    listed.write_text(listed.read_text() + "madeupword0001 0\nmadeupword0002 0\n")
    network = load_network(str(text_file))
    assert network.tokenizer is not None
    assert b"unknown_from" in network.tokenizer
    assert count_of_ids(network.tokenizer) == WORDS


def test_a_release_without_its_tokenizer_or_with_a_foreign_one_says_so(text_file: Path) -> None:
    folder = text_file.parent
    for name, content, message in (
        ("vocab.bpe", "#version\nd q\n", "joins 'd q', which encoder.json does not know"),
        ("vocab.bpe", "#version\ndog\n", "joins 'dog'"),
        ("encoder.json", "[1]", "is no table of byte pairs"),
        ("encoder.json", "{", "is not JSON"),
        ("encoder.json", '{"<s>": 1}', "has a byte pair <s>, which is a special token"),
        ("dict.txt", "5 1\n5 2\n", "line 2 is '5 2', not a new symbol and its count"),
        ("dict.txt", "five\n", "line 1 is 'five'"),
    ):
        write_bpe(folder)
        (folder / name).write_text(content)
        with pytest.raises(UnsupportedNetwork, match=message):
            tokenizer(folder)
    for name in BPE_FILES[1:]:
        (folder / name).unlink()
    with pytest.raises(WeightsUnavailable, match=r"has no tokenizer: it lacks encoder\.json, vocab\.bpe") as caught:
        load_network(str(text_file))
    assert "put dict.txt, encoder.json, vocab.bpe of the network's release beside the weights" in caught.value.way_out


def test_data2vec_text_of_transformers_keeps_its_own_older_vocabulary_files(tmp_path: Path) -> None:
    saved(text_reference(text_state()), tmp_path)
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "d", "o", "g", "do", "dog", "Ġ", "Ġdog"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nd o\ndo g\nĠ dog\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    tokenizer_of_hub = load_network(str(tmp_path)).tokenizer
    assert tokenizer_of_hub is not None
    assert text_ids(tokenizer_of_hub, ["dog dog"], 16)[0][0, :5].tolist() == [0, 9, 11, 2, 1]


def test_the_entry_of_texts_names_the_files_of_its_tokenizer() -> None:
    companions = [url.rpartition("/")[2] for url in CATALOGUE["data2vec2-text"].companions]
    assert companions == list(BPE_FILES)


# --- version 1, from its authors' files ------------------------------------------------------------------


def vision_1() -> Any:
    config = transformers.Data2VecVisionConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        patch_size=PATCH,
        image_size=GRID * PATCH,
        layer_norm_eps=1e-6,
        use_shared_relative_position_bias=True,
        use_mean_pooling=False,
    )
    return randomised(transformers.Data2VecVisionModel(config))


def vision_1_state(model: Any) -> dict[str, Tensor]:
    """BEiT's names and a head as wide as the network."""
    theirs = model.state_dict()
    state = {
        "cls_token": theirs["embeddings.cls_token"],
        "mask_token": torch.zeros(1, 1, 24),
        "patch_embed.proj.weight": theirs["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": theirs["embeddings.patch_embeddings.projection.bias"],
        "rel_pos_bias.relative_position_index": torch.zeros(26, 26, dtype=torch.int64),
        "rel_pos_bias.relative_position_bias_table": theirs[
            "encoder.relative_position_bias.relative_position_bias_table"
        ],
        "norm.weight": theirs["layernorm.weight"],
        "norm.bias": theirs["layernorm.bias"],
        "lm_head.weight": torch.zeros(24, 24),
        "lm_head.bias": torch.zeros(24),
    }
    for i in range(2):
        layer, block = f"encoder.layer.{i}", f"blocks.{i}"
        attention = f"{layer}.attention.attention"
        qkv = [theirs[f"{attention}.{name}.weight"] for name in ("query", "key", "value")]
        state |= {
            f"{block}.attn.qkv.weight": torch.cat(qkv),
            f"{block}.attn.q_bias": theirs[f"{attention}.query.bias"],
            f"{block}.attn.v_bias": theirs[f"{attention}.value.bias"],
            f"{block}.gamma_1": theirs[f"{layer}.lambda_1"],
            f"{block}.gamma_2": theirs[f"{layer}.lambda_2"],
        }
        for ours, their in (
            ("attn.proj", "attention.output.dense"),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ):
            state |= {f"{block}.{ours}.{end}": theirs[f"{layer}.{their}.{end}"] for end in ("weight", "bias")}
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("grid", [(5, 5), (3, 7)], ids=str)
def test_data2vec_vision_of_its_authors_is_that_of_transformers(grid: tuple[int, int], tmp_path: Path) -> None:
    model = vision_1()
    path = tmp_path / "checkpoint-799.pth"
    torch.save({"model": vision_1_state(model), "args": argparse.Namespace(epochs=800)}, path)
    network = load_network(str(path))
    images = some_images(*grid)
    with torch.no_grad():
        theirs = model(images, output_hidden_states=True)
        tokens = network.backbone.embed(images)
        hidden = network.backbone.run(tokens, grid=grid).hidden
    for ours, their in zip([tokens, *hidden], theirs.hidden_states, strict=True):
        assert relative(ours, their) < TOLERANCE
    assert network.weights_sha256 == load_network(str(saved(model, tmp_path / "hub"))).weights_sha256
    assert (network.family, network.backbone.spec.family) == ("data2vec-vision", "data2vec-vision")
    assert network.preprocessing is not None
    assert network.preprocessing.mean == IMAGENET_MEAN


def test_files_with_the_names_of_beit_are_told_apart_by_their_heads(tmp_path: Path) -> None:
    data2vec = vision_1_state(vision_1())
    beit2 = beit2_state(_beit(depth=2))
    path = tmp_path / "file.pth"
    for state, family in ((data2vec, "data2vec-vision"), (beit2, "beit2")):
        torch.save({"model": state}, path)
        assert load_network(str(path)).family == family
    # BEiT of the first version predicts codes and gathers nothing into CLS; without its head, nobody can tell.
    for state in (
        {name: tensor for name, tensor in beit2.items() if not name.startswith("cls_pt_layers")},
        {name: tensor for name, tensor in data2vec.items() if not name.startswith("lm_head")},
    ):
        torch.save({"model": state}, path)
        with pytest.raises(UnsupportedNetwork, match="is no original file we know") as caught:
            load_network(str(path))
        assert caught.value.way_out.endswith("say so: emkum teachers convert FILE --family NAME")
        with pytest.raises(UnsupportedNetwork) as caught:
            convert(str(path), tmp_path / "out")
        assert "say of what with --family" in caught.value.way_out
    made = convert(str(path), tmp_path / "out", family="data2vec-vision").network
    torch.save({"model": data2vec}, path)
    assert made.weights_sha256 == load_network(str(path)).weights_sha256


def text_1_state() -> dict[str, Any]:
    """The same weights as `text_state`, as version 1 names them."""
    encoder, old = "encoder.sentence_encoder", text_state()
    state = {
        "encoder.sentence_encoder.version": torch.zeros(1),
        "encoder.regression_head.0.weight": torch.zeros(9, WIDTH),
        "encoder._ema": {"embed_tokens.weight": torch.zeros(WORDS, WIDTH)},
        f"{encoder}.embed_tokens.weight": old[f"{TEXT}.embed_tokens.weight"],
        f"{encoder}.embed_positions.weight": old[f"{TEXT}.embed_positions.weight"],
    }
    for end in ("weight", "bias"):
        state[f"{encoder}.layernorm_embedding.{end}"] = old[f"{TEXT}.layernorm_embedding.{end}"]
        for i in range(DEPTH):
            layer, block = f"{encoder}.layers.{i}", f"blocks.{i}"
            for name, part in zip("qkv", old[f"{block}.attn.qkv.{end}"].chunk(3), strict=True):
                state[f"{layer}.self_attn.{name}_proj.{end}"] = part.clone()
            for ours, their in (
                ("attn.proj", "self_attn.out_proj"),
                ("norm1", "self_attn_layer_norm"),
                ("mlp.fc1", "fc1"),
                ("mlp.fc2", "fc2"),
                ("norm2", "final_layer_norm"),
            ):
                state[f"{layer}.{their}.{end}"] = old[f"{block}.{ours}.{end}"]
    return state


def test_data2vec_text_of_its_authors_is_that_of_transformers(tmp_path: Path) -> None:
    write_bpe(tmp_path)
    network = load_network(str(write(tmp_path / "nlp_base.pt", text_1_state())))
    assert (network.family, network.backbone.spec.family) == ("data2vec-text", "data2vec-text")
    assert_same_texts(network, text_reference(text_state()))
    four = options(transformer={"encoder": {"attention_heads": 4}})
    assert load_network(str(write(tmp_path / "nlp_base.pt", text_1_state(), cfg=four))).backbone.spec.heads == 4


def test_a_roberta_of_fairseq_and_a_fine_tuned_data2vec_text_are_not_taken_for_one(tmp_path: Path) -> None:
    write_bpe(tmp_path)
    state = text_1_state()
    fine_tuned = state | {"classification_heads.cola.dense.weight": torch.zeros(4, WIDTH)}
    with pytest.raises(UnsupportedNetwork, match="fine-tuned with labels: it has classification_heads"):
        load_network(str(write(tmp_path / "a.pt", fine_tuned)))
    roberta = {name.replace("regression_head", "lm_head"): tensor for name, tensor in state.items()}
    with pytest.raises(UnsupportedNetwork, match="is no original file we know"):
        load_network(str(write(tmp_path / "b.pt", roberta)))
    left_over = state | {"encoder.sentence_encoder.layer_norm.weight": torch.ones(WIDTH)}
    with pytest.raises(UnsupportedNetwork, match=r"unknown tensors encoder\.sentence_encoder\.layer_norm\.weight"):
        load_network(str(write(tmp_path / "c.pt", left_over)))


# --- BEiT-2 of other shapes ------------------------------------------------------------------------------


def _beit(depth: int, absolute: bool = False, scale: float = 0.1) -> Any:
    config = transformers.BeitConfig(
        hidden_size=24,
        num_hidden_layers=depth,
        num_attention_heads=3,
        intermediate_size=40,
        patch_size=PATCH,
        image_size=GRID * PATCH,
        layer_norm_eps=1e-6,
        use_shared_relative_position_bias=True,
        use_absolute_position_embeddings=absolute,
        use_mask_token=True,
        use_mean_pooling=False,
    )
    model = randomised(transformers.BeitModel(config, add_pooling_layer=False))
    for name, tensor in model.state_dict().items():
        if "lambda" in name:
            tensor.mul_(scale)
    return model


@pytest.mark.parametrize(("absolute", "scale"), [(False, 1e-5), (True, 1.0)], ids=["large", "absolute positions"])
@pytest.mark.parametrize("grid", [(5, 5), (3, 7)], ids=str)
def test_beit2_of_another_depth_layer_scale_and_positions_gives_the_numbers_of_transformers(
    grid: tuple[int, int], absolute: bool, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_models_beit2.DEPTH", 5)
    model = _beit(5, absolute, scale)
    state = beit2_state(model)
    if absolute:
        state["pos_embed"] = model.state_dict()["embeddings.position_embeddings"].clone()
    path = tmp_path / "beitv2_large.pth"
    torch.save({"model": state}, path)
    network = load_network(str(path))
    images = some_images(*grid)
    with torch.no_grad():
        theirs = model(images, output_hidden_states=True)
        tokens = network.backbone.embed(images)
        hidden = network.backbone.run(tokens, grid=grid).hidden
    for ours, their in zip([tokens, *hidden], theirs.hidden_states, strict=True):
        assert relative(ours, their) < TOLERANCE
    assert relative(network.backbone.finish(hidden[-1]), theirs.last_hidden_state) < TOLERANCE
    assert (network.depth, network.family) == (5, "beit2")
