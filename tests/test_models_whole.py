"""Networks that are run in one piece give their library's own numbers, say what they are, and are refused by name.

B batch, H height, W width, T tokens, D width, L text tokens.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_models_families import randomised, relative, write_tokenizer
from tiny_cache import tiny_network
from torch import Tensor, nn

from emkum.errors import RefusedTeacher, UnsupportedNetwork, UsageError
from emkum.models import fetch, targets, whole_transformers
from emkum.models.catalogue import load_network
from emkum.models.families.checkpoint import open_folder
from emkum.models.network import Network, load_saved, normalise, save_network, shares_prefix, weights_digest
from emkum.models.passes import FrozenPass, Wanted
from emkum.models.resnet import ResNet
from emkum.models.supervision import Guard
from emkum.models.whole import Exact, WholeNetwork, WholeSpec

TOLERANCE = 1e-5  # relative, in the L2 norm
SIDE, PATCH = 32, 4
VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "patch_size": PATCH,
    "image_size": SIDE,
}
TEXT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": 60}
PREPROCESSOR = {
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.25],
    "size": {"height": SIDE, "width": SIDE},
    "image_processor_type": "ViTImageProcessor",
}


def swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=SIDE, patch_size=2, embed_dim=12, depths=[1, 2, 1], num_heads=[2, 2, 2], window_size=4
    )
    return transformers.SwinModel(config, add_pooling_layer=False)


CONVNEXT = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "image_size": SIDE}


@dataclass(frozen=True)
class Pictures:
    """A vision model of transformers. prefix: tokens before the patches; cls: the first is one; sizes that it takes."""

    make: Callable[[], nn.Module]
    prefix: int
    cls: bool
    patch: int
    layers: bool
    sizes: tuple[tuple[int, int], ...] = ((SIDE, SIDE),)


ANY = ((SIDE, SIDE), (24, 40))
PICTURES = {
    "swin": Pictures(swin, 0, False, 8, False, ((SIDE, SIDE), (64, 96))),
    "convnext": Pictures(
        lambda: transformers.ConvNextModel(transformers.ConvNextConfig(**CONVNEXT)),
        0,
        False,
        32,
        False,
        ((32, 32), (64, 96)),
    ),
    "vit_msn": Pictures(lambda: transformers.ViTMSNModel(transformers.ViTMSNConfig(**VIT)), 1, True, PATCH, True, ANY),
    "deit": Pictures(
        lambda: transformers.DeiTModel(transformers.DeiTConfig(**VIT), add_pooling_layer=False),
        2,
        True,
        PATCH,
        True,
        ANY,
    ),
    "ijepa": Pictures(
        lambda: transformers.IJepaModel(transformers.IJepaConfig(**VIT), add_pooling_layer=False),
        0,
        False,
        PATCH,
        True,
        ANY,
    ),
}


def distilbert(kind: str = "DistilBertModel", **more: Any) -> nn.Module:
    config = {"dim": 24, "n_layers": 3, "n_heads": 3, "hidden_dim": 40, "vocab_size": 60, **more}
    return getattr(transformers, kind)(transformers.DistilBertConfig(**config))


TEXTS = {
    "distilbert": distilbert,
    "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**TEXT, max_position_embeddings=80)),
    "electra": lambda: transformers.ElectraModel(transformers.ElectraConfig(**TEXT, embedding_size=24)),
    "modernbert": lambda: transformers.ModernBertModel(
        transformers.ModernBertConfig(
            **TEXT, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3, local_attention=4
        )
    ),
}


@pytest.fixture(autouse=True)
def _no_progress_bars() -> None:
    transformers.logging.disable_progress_bar()


def saved(model: nn.Module, folder: Path, **preprocessor: Any) -> Path:
    """As the hub would hold it."""
    model.save_pretrained(folder)  # type: ignore[operator]
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | preprocessor))
    write_tokenizer(folder)
    return folder


def whole(network: Network) -> WholeNetwork:
    assert isinstance(network.backbone, WholeNetwork)
    return network.backbone


def crops_of(height: int, width: int, batch: int = 3) -> Tensor:
    shape = (batch, height, width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def passed(network: Network, names: list[str], crops: Tensor, compute: str = "float32") -> dict[str, Tensor]:
    wanted = [Wanted(network.name, name) for name in names]  # type: ignore[arg-type]
    return dict(zip(names, FrozenPass([network], wanted, compute, "cpu").pictures(crops), strict=True))


def texts() -> tuple[Tensor, Tensor]:
    """ids_BL with garbage at the pads, mask_BL."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, 60, (3, 16), generator=generator)
    ids[:, 0] = 2
    mask = torch.arange(16) < torch.tensor([[16], [9], [4]])
    return ids, mask


# --- transformers: pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PICTURES)
def test_a_vision_model_gives_its_own_tokens_and_cls_by_the_rule(name: str, tmp_path: Path) -> None:
    case = PICTURES[name]
    model = randomised(case.make())
    network = load_network(str(saved(model, tmp_path / name)))
    spec = whole(network).spec
    assert (spec.num_prefix, spec.has_cls, spec.patch, network.depth) == (case.prefix, case.cls, case.patch, 0)
    assert ("layers" in spec.outputs) == case.layers
    for height, width in case.sizes:
        crops = crops_of(height, width)
        images = normalise(network, crops)
        more = {} if (height, width) == (SIDE, SIDE) or name == "convnext" else {"interpolate_pos_encoding": True}
        with torch.no_grad():
            last = model(images, **more).last_hidden_state
        tokens = last.flatten(2).transpose(1, 2) if last.ndim == 4 else last
        ours = passed(network, ["cls", "patches", "mean"], crops)
        patches = tokens[:, case.prefix :]
        assert relative(ours["patches"], patches) < TOLERANCE
        assert relative(ours["mean"], patches.mean(1)) < TOLERANCE
        assert relative(ours["cls"], tokens[:, 0] if case.cls else patches.mean(1)) < TOLERANCE
        if case.layers:
            blocks = hidden_states(model, images, more)
            expected = targets.layers([h.double() for h in blocks], None, final_layer_norm=True)
            assert relative(passed(network, ["layers"], crops)["layers"].double(), expected) < TOLERANCE


def hidden_states(model: nn.Module, images: Tensor, more: dict[str, Any]) -> list[Tensor]:
    """After each block, before the final norm, by hooks of the test's own."""
    kept: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _m, _i, out: kept.append(out if isinstance(out, Tensor) else out[0]))
        for block in next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
    ]
    with torch.no_grad():
        model(images, **more)
    for handle in handles:
        handle.remove()
    return kept


def test_the_last_of_the_layers_is_the_block_and_not_the_final_norm(tmp_path: Path) -> None:
    model = randomised(PICTURES["vit_msn"].make())
    network = load_network(str(saved(model, tmp_path / "msn")))
    images = normalise(network, crops_of(SIDE, SIDE))
    ours = whole(network).outputs(images, None, ("layers",))["layers"]
    with torch.no_grad():
        theirs = model(images, output_hidden_states=True)
    assert relative(ours[-1], hidden_states(model, images, {})[-1]) < TOLERANCE
    assert relative(ours[-1], theirs.last_hidden_state) > 0.1


def test_an_untrained_pooler_changes_nothing(tmp_path: Path) -> None:
    model = randomised(transformers.DeiTModel(transformers.DeiTConfig(**VIT)))
    network = load_network(str(saved(model, tmp_path / "deit")))
    without = load_file(tmp_path / "deit/model.safetensors")
    kept = {name: tensor for name, tensor in without.items() if "pooler" not in name}
    assert len(kept) < len(without)
    save_file(kept, tmp_path / "deit/model.safetensors", metadata={"format": "pt"})
    again = load_network(str(tmp_path / "deit"))
    assert again.weights_sha256 == network.weights_sha256
    assert not [name for name in network.backbone.state_dict() if "pooler" in name]


def test_a_vision_model_runs_in_bfloat16(tmp_path: Path) -> None:
    network = load_network(str(saved(randomised(PICTURES["deit"].make()), tmp_path / "deit")))
    crops = crops_of(SIDE, SIDE)
    names = ["cls", "patches", "mean", "layers"]
    exact, rounded = passed(network, names, crops), passed(network, names, crops, "bfloat16")
    for name in names:
        assert rounded[name].dtype == torch.float32
        assert 0 < relative(rounded[name], exact[name]) < 0.05
    assert whole(network).compute == torch.float32  # the network given is not changed


@pytest.mark.parametrize("name", ["convnext", "vit"])
def test_logits_are_of_a_float32_classifier_whatever_the_rest_computes_in(name: str, tmp_path: Path) -> None:
    model = convnext_classifier() if name == "convnext" else vit_classifier()
    network = load_network(f"{saved(randomised(model), tmp_path / name)}#logits")
    exact, rounded = (passed(network, ["logits"], crops_of(SIDE, SIDE), c)["logits"] for c in ("float32", "bfloat16"))
    assert not torch.equal(rounded, rounded.bfloat16().float())
    assert 0 < relative(rounded, exact) < 0.05


def test_a_layer_as_wide_as_there_are_classes_inside_a_block_is_no_classifier() -> None:
    layer, vectors, tokens = torch.nn.Linear(4, 6), torch.randn(2, 4), torch.randn(2, 3, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with Exact([layer]):
            assert [layer(x).dtype for x in (vectors, tokens, vectors[:, None])] == [
                torch.float32,
                torch.bfloat16,
                torch.float32,
            ]
        assert layer(vectors).dtype == torch.bfloat16  # nothing stays behind


def test_it_runs_beside_others_and_shares_nothing(tmp_path: Path) -> None:
    folder = saved(randomised(PICTURES["deit"].make()), tmp_path / "deit")
    network, twin, vit = load_network(str(folder)), load_network(str(folder), name="twin"), tiny_network("vit", "image")
    wanted = [Wanted("deit", "cls"), Wanted("vit", "tokens", 2), Wanted("twin", "mean"), Wanted("vit", "cls")]
    both = FrozenPass([network, vit, twin], wanted, "float32", "cpu")
    assert both.shared_blocks == {}
    assert [shares_prefix(network, other) for other in (twin, vit)] == [-1, -1]
    crops = crops_of(SIDE, SIDE)
    ours = both.pictures(crops)
    assert torch.equal(ours[0], passed(network, ["cls"], crops)["cls"])
    assert torch.equal(ours[2], passed(twin, ["mean"], crops)["mean"])
    alone = FrozenPass([vit], [Wanted("vit", "cls")], "float32", "cpu").pictures(crops)
    assert torch.equal(ours[3], alone[0])


def test_a_size_it_does_not_take_is_refused(tmp_path: Path) -> None:
    network = load_network(str(saved(randomised(PICTURES["convnext"].make()), tmp_path / "net")))
    with pytest.raises(UsageError, match=r"ConvNextModel does not take pictures of 3 x 3 px: \w+") as caught:
        passed(network, ["cls"], crops_of(3, 3))
    assert caught.value.way_out == "choose the --size it was trained at"


# --- transformers: texts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_model_gives_its_own_tokens_whatever_stands_at_the_pads(name: str, tmp_path: Path) -> None:
    model = randomised(TEXTS[name]())
    network = load_network(str(saved(model, tmp_path / name)))
    ids, mask = texts()
    names = ["cls", "patches", "mean", "layers"]
    frozen = FrozenPass([network], [Wanted(name, what) for what in names], "float32", "cpu")  # type: ignore[arg-type]
    ours = dict(zip(names, frozen.texts(ids, mask), strict=True))
    kept: list[Tensor] = []
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
    for block in blocks:
        block.register_forward_hook(lambda _m, _i, out: kept.append(out if isinstance(out, Tensor) else out[0]))
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    words = theirs * mask[..., None]
    assert relative(ours["cls"], theirs[:, 0]) < TOLERANCE
    assert relative(ours["mean"], words.sum(1) / mask.sum(1, keepdim=True)) < TOLERANCE
    words[:, 0] = 0
    assert relative(ours["patches"], words) < TOLERANCE
    assert not ours["patches"][~mask].any()
    expected = targets.layers([h.double() for h in kept], mask, final_layer_norm=False)
    assert relative(ours["layers"].double(), expected) < TOLERANCE
    other = ids.clone()
    other[~mask] = 59
    for one, two in zip(frozen.texts(other, mask), ours.values(), strict=True):
        assert relative(one, two) < TOLERANCE
    assert network.tokenizer is not None
    assert (network.max_tokens, network.modality, network.supervision) == (64, "text", "unknown")


def test_positions_that_start_after_the_pad_id_are_not_counted(tmp_path: Path) -> None:
    network = load_network(str(saved(randomised(TEXTS["mpnet"]()), tmp_path / "mpnet")))
    assert whole(network).spec.max_tokens == 78  # of 80 rows, the first real token uses row 2
    short = saved(randomised(distilbert(max_position_embeddings=40)), tmp_path / "short")
    assert load_network(str(short)).max_tokens == 40


def test_heads_of_pretraining_are_left_out(tmp_path: Path) -> None:
    model = randomised(distilbert("DistilBertForMaskedLM"))
    network = load_network(str(saved(model, tmp_path / "mlm")))
    trunk = load_network(str(saved(model.distilbert, tmp_path / "trunk")))  # type: ignore[arg-type]
    assert network.weights_sha256 == trunk.weights_sha256


def test_a_text_model_with_the_head_of_a_task_says_so(tmp_path: Path) -> None:
    folder = saved(randomised(distilbert("DistilBertForSequenceClassification")), tmp_path / "sst2")
    network = load_network(str(folder))
    assert network.supervision == "class_labels"
    assert "logits" not in whole(network).spec.outputs


# --- transformers: classifiers -------------------------------------------------------------------------------


def convnext_classifier(**more: Any) -> nn.Module:
    return transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**CONVNEXT, num_labels=7, **more))


def vit_classifier() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=7))


def efficientnet() -> nn.Module:
    config = transformers.EfficientNetConfig(
        image_size=SIDE, width_coefficient=0.25, depth_coefficient=0.2, hidden_dim=320, num_labels=5
    )
    return transformers.EfficientNetForImageClassification(config)


@pytest.mark.parametrize(("make", "mark"), [(convnext_classifier, ""), (vit_classifier, "#logits"), (efficientnet, "")])
def test_a_classifier_gives_its_logits(make: Callable[[], nn.Module], mark: str, tmp_path: Path) -> None:
    model = randomised(make())
    network = load_network(str(saved(model, tmp_path / "net")) + mark)
    crops = crops_of(SIDE, SIDE)
    with torch.no_grad():
        theirs = model(normalise(network, crops)).logits
    assert relative(passed(network, ["logits"], crops)["logits"], theirs) < TOLERANCE
    assert (network.supervision, whole(network).spec.num_classes) == ("class_labels", theirs.shape[1])
    assert whole(network).spec.default_targets == ("cls", "logits")
    wanted = Wanted("net", "top_logits", top=2)
    top = targets.unpacked(FrozenPass([network], [wanted], "float32", "cpu").pictures(crops)[0])
    torch.testing.assert_close(top.values_BK, theirs.topk(2).values, rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedNetwork, match=r"the 9 largest logits of net, which has [57] classes"):
        FrozenPass([network], [Wanted("net", "top_logits", top=9)], "float32", "cpu")


def test_a_trunk_with_a_classifier_is_refused_unless_its_logits_are_asked_for(tmp_path: Path) -> None:
    folder = str(saved(randomised(vit_classifier()), tmp_path / "ft"))
    with pytest.raises(UnsupportedNetwork, match="is fine-tuned with labels"):
        load_network(folder)
    network = load_network(f"{folder}#logits")
    assert (network.name, network.source) == ("ft", f"{folder}#logits")
    bare = str(saved(randomised(PICTURES["vit_msn"].make()), tmp_path / "bare"))
    with pytest.raises(UnsupportedNetwork, match=r"bare has no classifier: its config.json says ViTMSNModel") as caught:
        load_network(f"{bare}#logits")
    assert "leave #logits out" in caught.value.way_out


def test_logits_of_a_catalogue_name_are_supervised_whatever_the_catalogue_says_of_its_trunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(randomised(vit_classifier()), tmp_path / "net")
    monkeypatch.setattr(fetch, "from_hub", lambda repo, offline=False: fetch.Fetched(folder, "c0ffee"))
    network = load_network("dino-s16#logits")
    assert (network.name, network.source, network.supervision) == (
        "dino-s16",
        "facebook/dino-vits16#logits",
        "class_labels",
    )


def test_logits_of_a_resnet_are_its_familys(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=7)
    folder = saved(randomised(transformers.ResNetForImageClassification(config)), tmp_path / "resnet")
    network, marked = load_network(str(folder)), load_network(f"{folder}#logits")
    assert isinstance(marked.backbone, ResNet)
    assert marked.weights_sha256 == network.weights_sha256


def test_names_of_the_classes_are_kept_where_there_are_any(tmp_path: Path) -> None:
    model = convnext_classifier()
    assert whole(load_network(str(saved(model, tmp_path / "plain")))).labels == ()
    model.config.id2label = {i: f"animal {i}" for i in range(7)}
    named = load_network(str(saved(model, tmp_path / "named")))
    assert whole(named).labels == tuple(f"animal {i}" for i in range(7))
    plain = load_network(str(tmp_path / "plain"))
    assert whole(named).spec == whole(plain).spec  # what they are called computes nothing


def test_efficientnets_processor_divides_by_the_deviation_twice(tmp_path: Path) -> None:
    more = {"image_processor_type": "EfficientNetImageProcessor", "include_top": True, "rescale_offset": False}
    folder = saved(randomised(efficientnet()), tmp_path / "net", **more)
    network = load_network(str(folder))
    processor = transformers.EfficientNetImageProcessorPil.from_pretrained(folder)
    crop = crops_of(SIDE, SIDE, 1)
    theirs = processor(crop[0].numpy(), return_tensors="pt", do_resize=False)["pixel_values"]
    torch.testing.assert_close(normalise(network, crop), theirs, rtol=1e-4, atol=1e-4)
    saved(randomised(efficientnet()), tmp_path / "net", **more | {"rescale_offset": True})
    with pytest.raises(UnsupportedNetwork, match="a preprocessor with rescale_offset"):
        load_network(str(folder))


# --- transformers: refusals ----------------------------------------------------------------------------------


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=24, n_layer=2, n_head=3, n_positions=40, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2Model(config)


def t5() -> nn.Module:
    config = transformers.T5Config(d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3, vocab_size=60)
    return transformers.T5Model(config)


def two_towers() -> nn.Module:
    text = {**TEXT, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VIT))


def video() -> nn.Module:
    return transformers.VideoMAEModel(transformers.VideoMAEConfig(**VIT))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (gpt2, r"transformers/GPT2Model reads from left to right: its first token knows nothing of the text"),
        (t5, r"is an encoder with a decoder \(t5\)"),
        (two_towers, r"has several towers or one inside another \(vision_config, text_config\)"),
        (video, r"VideoMAEModel cannot be run on pictures of shape 2 x 3 x 32 x 32"),
    ],
)
def test_what_is_no_teacher_in_one_piece_is_refused(
    make: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedNetwork, match=message) as caught:
        load_network(str(saved(randomised(make()), tmp_path / "net")))
    assert "module:function" in caught.value.way_out


def edited(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> str:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_checkpoint_is_read_strictly(tmp_path: Path) -> None:
    good = saved(randomised(convnext_classifier()), tmp_path / "good")

    def copy(name: str, change: Callable[[dict[str, Tensor]], None]) -> str:
        return edited(Path(shutil.copytree(good, tmp_path / name)), change)

    lacking = copy("lacking", lambda state: state.__delitem__("convnext.encoder.stages.1.layers.0.dwconv.bias"))
    with pytest.raises(UnsupportedNetwork, match=r"it lacks convnext\.encoder\.stages\.1\.layers\.0\.dwconv\.bias"):
        load_network(lacking)
    more = copy("more", lambda state: state.update({"convnext.extra.weight": torch.ones(3)}))
    with pytest.raises(UnsupportedNetwork, match=r"it has unknown tensors convnext\.extra\.weight"):
        load_network(more)
    wrong = copy("wrong", lambda state: state.update({"classifier.weight": torch.ones(7, 19)}))
    with pytest.raises(UnsupportedNetwork, match=r"has of another shape classifier\.weight \(7, 19\) for \(7, 20\)"):
        load_network(wrong)
    text = saved(randomised(distilbert()), tmp_path / "text")
    extra = edited(text, lambda state: state.update({"transformer.layer.9.x.weight": torch.ones(3)}))
    with pytest.raises(UnsupportedNetwork, match=r"it has unknown tensors transformer\.layer\.9\.x\.weight"):
        load_network(extra)


def test_no_normalisation_is_guessed(tmp_path: Path) -> None:
    folder = saved(randomised(PICTURES["deit"].make()), tmp_path / "deit")
    (folder / "preprocessor_config.json").write_text('{"size": 32}')
    with pytest.raises(UnsupportedNetwork, match=r"its preprocessor_config\.json has no image_mean"):
        load_network(str(folder))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UnsupportedNetwork, match=r"there is no preprocessor_config\.json") as caught:
        load_network(str(folder))
    assert "beside config.json" in caught.value.way_out
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": PREPROCESSOR}))
    assert load_network(str(folder)).preprocessing.mean == (0.5, 0.4, 0.3)  # type: ignore[union-attr]


def test_code_beside_the_weights_is_never_run(tmp_path: Path) -> None:
    folder = saved(randomised(PICTURES["deit"].make()), tmp_path / "net")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModel": "modeling_mine.Mine", "AutoConfig": "modeling_mine.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_mine.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    with pytest.raises(UnsupportedNetwork, match="emkum runs no code of data") as caught:
        load_network(str(folder))
    assert "--teacher my_module:function" in caught.value.way_out
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedNetwork, match=r"is of type 'mine', which neither emkum nor transformers 5\S* reads"):
        load_network(str(folder))
    assert not (tmp_path / "was-run").exists()


class Trap:
    """Pickled, an order to make a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


def test_a_torch_file_is_read_like_a_safetensors_file(tmp_path: Path) -> None:
    folder = saved(randomised(distilbert()), tmp_path / "net")
    network = load_network(str(folder))
    only_torch_file(folder)
    assert load_network(str(folder)).weights_sha256 == network.weights_sha256


def test_code_in_a_torch_file_is_never_run(tmp_path: Path) -> None:
    folder, marker = saved(randomised(distilbert()), tmp_path / "net"), tmp_path / "was-run"
    harmless = open_folder(folder)
    only_torch_file(folder, trap=Trap(marker))
    with pytest.raises(UnsupportedNetwork, match="is damaged or holds more than tensors"):
        load_network(str(folder))
    # Nor by transformers, which opens the file again.
    with pytest.raises(UnsupportedNetwork, match=r"net cannot be read by transformers \S+ as DistilBertModel"):
        whole_transformers.read_whole(folder, harmless, classifier=False)
    assert not marker.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert marker.exists()  # it would have been


def only_torch_file(folder: Path, **more: Any) -> None:
    """The weights of the folder as pytorch_model.bin, with more in it."""
    torch.save(load_file(folder / "model.safetensors") | more, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_a_tower_it_has_not_is_refused(tmp_path: Path) -> None:
    folder = saved(randomised(PICTURES["deit"].make()), tmp_path / "net")
    with pytest.raises(UnsupportedNetwork, match="net reads image, not text"):
        load_network(f"{folder}#text")


def test_targets_it_has_not_are_refused(tmp_path: Path) -> None:
    network = load_network(str(saved(randomised(swin()), tmp_path / "swin")))
    for what, message in (
        ("logits", r"target logits of swin \(transformers/SwinModel\)"),
        ("layers", r"target layers of swin \(transformers/SwinModel\)"),
        ("tokens", r"swin as an encoder: it is run in one piece \(transformers/SwinModel\), so no cut of it is known"),
    ):
        with pytest.raises(UnsupportedNetwork, match=message):
            FrozenPass([network], [Wanted("swin", what)], "float32", "cpu")  # type: ignore[arg-type]
    text = load_network(str(saved(randomised(distilbert()), tmp_path / "text")))
    rule = targets.named_rule("data2vec", "text")
    with pytest.raises(UnsupportedNetwork, match="feed-forward outputs of text, which is run in one piece"):
        FrozenPass([text], [Wanted("text", "layers", rule=rule)], "float32", "cpu")
    late = targets.LayersRule(skip=3)
    with pytest.raises(UnsupportedNetwork, match="layers of text but the first 3: it has 3 blocks"):
        FrozenPass([text], [Wanted("text", "layers", rule=late)], "float32", "cpu")


# --- identity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [convnext_classifier, distilbert, swin])
def test_saved_and_loaded_it_is_the_same_network(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    network = load_network(str(saved(randomised(make()), tmp_path / "net")))
    save_network(network, tmp_path / "kept")
    again = load_saved(tmp_path / "kept")
    assert again.weights_sha256 == network.weights_sha256 == weights_digest(again.backbone)
    assert whole(again).spec == whole(network).spec
    assert WholeSpec.from_json(json.loads(json.dumps(whole(network).spec.to_json()))) == whole(network).spec
    if network.modality == "image":
        names = list(whole(network).spec.outputs)
        crops = crops_of(SIDE, SIDE)
        ours, theirs = passed(network, names, crops), passed(again, names, crops)
        assert all(torch.equal(ours[name], theirs[name]) for name in names)
    else:
        ids, mask = texts()
        ours, theirs = (whole(n).outputs(ids, mask, ("cls",))["cls"] for n in (network, again))
        assert torch.equal(ours, theirs)


def test_a_saved_network_of_a_kind_or_class_that_is_not_known_is_refused(tmp_path: Path) -> None:
    network = load_network(str(saved(randomised(swin()), tmp_path / "net")))
    save_network(network, tmp_path / "kept")
    record = json.loads((tmp_path / "kept/model.json").read_text())
    for change, message in (
        ({"name": "NoSuchModel"}, r"transformers/NoSuchModel: transformers 5\S* has no such model"),
        ({"name": "pipeline"}, "has no such model"),
        ({"library": "module", "name": "os:getcwd"}, "module/os:getcwd, which is kept by its name alone"),
        ({"novelty": 1}, r"an architecture with unknown keys \['novelty'\]"),
    ):
        other = record | {"architecture": record["architecture"] | change}
        (tmp_path / "kept/model.json").write_text(json.dumps(other))
        with pytest.raises(UnsupportedNetwork, match=message):
            load_saved(tmp_path / "kept")


def test_what_decides_the_numbers_is_in_the_architecture_and_the_rest_is_not(tmp_path: Path) -> None:
    folder = saved(randomised(swin()), tmp_path / "net")
    spec = whole(load_network(str(folder))).spec
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "9.9", "_name_or_path": "x"}))
    assert whole(load_network(str(folder))).spec == spec
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    other = load_network(str(folder))
    assert whole(other).spec != spec
    assert "transformers" in whole(other).version
    assert transformers.__version__ not in json.dumps(spec.to_json())


# --- supervision ---------------------------------------------------------------------------------------------


def test_label_free_refuses_a_classifier_by_its_mark_and_by_its_tensors(tmp_path: Path) -> None:
    folder = str(saved(randomised(convnext_classifier()), tmp_path / "net"))
    for source in (folder, f"{folder}#logits", "facebook/some-convnext#logits"):
        with pytest.raises(RefusedTeacher, match="learned from labels"):
            Guard(label_free=True).check([source])


def test_a_network_of_transformers_may_be_of_a_type_no_family_reads() -> None:
    assert whole_transformers.is_readable({"model_type": "swin"})
    assert not whole_transformers.is_readable({"model_type": "dinov2"})
    assert not whole_transformers.is_readable({})
