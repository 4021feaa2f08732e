"""DINO's and DINOv2's original files, made of transformers' models by renaming, against these models."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parity import GRIDS, assert_pictures_pass, assert_same, assert_saved_whole, ours_on_pictures, pictures, recorded
from safetensors.torch import save_file
from test_models_families import _quiet_transformers, randomised, saved  # noqa: F401 - a fixture
from torch import Tensor, nn

from emkum.errors import UnsupportedNetwork
from emkum.models.backbone import BackboneSpec
from emkum.models.catalogue import load_network
from emkum.models.families.checkpoint import Checkpoint
from emkum.models.families.dino_originals import dinov2_key_map
from emkum.models.families.registry import FAMILIES
from emkum.models.preprocessing import HALF, Preprocessing

WIDTH, DEPTH = 384, 2  # of a width that was released: no other says how many heads it has
SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 6, "patch_size": 4, "image_size": 20}


def dino() -> nn.Module:
    config = transformers.ViTConfig(**SHAPE, intermediate_size=40, layer_norm_eps=1e-6)
    return randomised(transformers.ViTModel(config, add_pooling_layer=False))


def dinov2(**more: Any) -> nn.Module:
    return randomised(transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE, mlp_ratio=1, **more)))


def dinov2_registers(**more: Any) -> nn.Module:
    config = transformers.Dinov2WithRegistersConfig(**SHAPE, mlp_ratio=1, num_register_tokens=4, **more)
    return randomised(transformers.Dinov2WithRegistersModel(config))


MODELS = {
    "dino": dino,
    "dinov2": dinov2,
    "dinov2-reg4": dinov2_registers,
    "dinov2-giant": lambda: dinov2(use_swiglu_ffn=True),
    "dinov2-giant-reg4": lambda: dinov2_registers(use_swiglu_ffn=True),
}


def original_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder that transformers saved, under the names of the original repositories."""
    from safetensors.torch import load_file

    theirs = load_file(folder / "model.safetensors")
    state = {
        "cls_token": theirs["embeddings.cls_token"],
        "pos_embed": theirs["embeddings.position_embeddings"],
        "patch_embed.proj.weight": theirs["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": theirs["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": theirs["layernorm.weight"],
        "norm.bias": theirs["layernorm.bias"],
    }
    for old, new in (("mask_token", "mask_token"), ("register_tokens", "register_tokens")):
        if f"embeddings.{old}" in theirs:
            state[new] = theirs[f"embeddings.{old}"]
    renamed = {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "attention.output.dense": "attn.proj",
        "norm1": "norm1",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "mlp.weights_in": "mlp.w12",
        "mlp.weights_out": "mlp.w3",
    }
    for i in range(DEPTH):
        layer, block = f"encoder.layer.{i}", f"blocks.{i}"
        for end in ("weight", "bias"):
            qkv = [theirs[f"{layer}.attention.attention.{name}.{end}"] for name in ("query", "key", "value")]
            state[f"{block}.attn.qkv.{end}"] = torch.cat(qkv)
            for old, new in renamed.items():
                if f"{layer}.{old}.{end}" in theirs:
                    state[f"{block}.{new}.{end}"] = theirs[f"{layer}.{old}.{end}"]
        for which in ("1", "2"):
            if f"{layer}.layer_scale{which}.lambda1" in theirs:
                state[f"{block}.ls{which}.gamma"] = theirs[f"{layer}.layer_scale{which}.lambda1"]
    return state


def timm_folder(folder: Path, state: dict[str, Tensor], tag: str, **cfg: Any) -> Path:
    """As timm keeps it on the hub: a config.json without model_type."""
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    config = {"architecture": "vit_small_patch16_224", "num_classes": 0, "pretrained_cfg": {"tag": tag} | cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_original_file_gives_the_numbers_and_the_digest_of_transformers(
    name: str, grid: tuple[int, int], tmp_path: Path
) -> None:
    model: Any = MODELS[name]()
    folder = saved(model, tmp_path / "hub")
    network = load_network(write(tmp_path / "original.pth", original_state(folder)))
    images = pictures(grid)
    flag = {"interpolate_pos_encoding": True} if name == "dino" else {}
    block = "layers.{}" if name == "dino" else "encoder.layer.{}"
    theirs = recorded(model, block, f"{block}.mlp", lambda: model(images, **flag).last_hidden_state)
    assert_same(ours_on_pictures(network, images), theirs)
    hub = load_network(str(folder))
    assert (network.weights_sha256, network.backbone.spec) == (hub.weights_sha256, hub.backbone.spec)
    assert (network.family, network.preprocessing) == (hub.family, hub.preprocessing)
    shapes = {n: tuple(t.shape) for n, t in original_state(folder).items()}
    assert sum(bool(family.recognises and family.recognises(shapes)) for family in FAMILIES) == 1


@pytest.mark.parametrize("name", MODELS)
def test_it_is_saved_whole_and_runs_in_a_pass(name: str, tmp_path: Path) -> None:
    state = original_state(saved(MODELS[name](), tmp_path / "hub"))
    network = load_network(write(tmp_path / "original.pth", state))
    assert_saved_whole(network, tmp_path / "saved")
    assert_pictures_pass(network)


def test_of_a_full_checkpoint_of_dino_the_teacher_is_read(tmp_path: Path) -> None:
    state = original_state(saved(dino(), tmp_path / "hub"))
    alone = load_network(write(tmp_path / "alone.pth", state))
    full = {
        "student": {f"module.backbone.{n}": torch.zeros_like(t) for n, t in state.items()}
        | {"module.head.mlp.0.weight": torch.zeros(2, 2)},
        "teacher": {f"backbone.{n}": t for n, t in state.items()} | {"head.last_layer.weight_v": torch.zeros(2, 2)},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}}, "param_groups": []},
        "dino_loss": {"center": torch.zeros(1, 4)},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_base"),
    }
    network = load_network(write(tmp_path / "full_checkpoint.pth", full))
    assert network.weights_sha256 == alone.weights_sha256


@pytest.mark.parametrize("name", ["dino", "dinov2-reg4"])
def test_only_the_whole_and_nothing_else_is_read(name: str, tmp_path: Path) -> None:
    state = original_state(saved(MODELS[name](), tmp_path / "hub"))
    without = {n: t for n, t in state.items() if n != "blocks.1.mlp.fc1.bias"}
    with pytest.raises(UnsupportedNetwork, match=r"lacks blocks\.1\.mlp\.fc1\.bias"):
        load_network(write(tmp_path / "a.pth", without))
    with pytest.raises(UnsupportedNetwork, match=r"unknown tensors decoder_pred\.bias"):
        load_network(write(tmp_path / "b.pth", state | {"decoder_pred.bias": torch.zeros(2)}))
    with pytest.raises(UnsupportedNetwork, match=r"norm\.bias has shape \(7,\)"):
        load_network(write(tmp_path / "c.pth", state | {"norm.bias": torch.zeros(7)}))
    with pytest.raises(UnsupportedNetwork, match=r"pos_embed has 28 rows, which is not CLS and a square of patches"):
        load_network(write(tmp_path / "d.pth", state | {"pos_embed": torch.zeros(1, 28, WIDTH)}))


@pytest.mark.parametrize("name", ["dino", "dinov2"])
@pytest.mark.parametrize("head", ["head.weight", "fc_norm.weight"])
def test_a_file_with_a_classifier_is_refused(name: str, head: str, tmp_path: Path) -> None:
    state = original_state(saved(MODELS[name](), tmp_path / "hub")) | {head: torch.zeros(5, WIDTH)}
    with pytest.raises(UnsupportedNetwork, match=f"fine-tuned with labels: it has {head}") as caught:
        load_network(write(tmp_path / "ft.pth", state))
    assert caught.value.way_out == f"use the backbone alone, such as {name if name != 'dino' else 'dino-b16'}" + (
        "-b" if name == "dinov2" else ""
    )


@pytest.mark.parametrize("prefix", ["module.linear", "linear"])
def test_a_linear_classifier_alone_is_refused_for_what_it_is(prefix: str, tmp_path: Path) -> None:
    state = {f"{prefix}.weight": torch.zeros(5, 8), f"{prefix}.bias": torch.zeros(5)}
    path = write(tmp_path / "dino_vitbase16_linearweights.pth", {"state_dict": state, "epoch": 100})
    with pytest.raises(UnsupportedNetwork, match=f"fine-tuned with labels: it has {prefix}.bias"):
        load_network(path)


@pytest.mark.parametrize("name", ["dino", "dinov2"])
@pytest.mark.parametrize("width", [128, 1280])
def test_a_width_that_was_not_released_is_refused_for_its_heads(name: str, width: int, tmp_path: Path) -> None:
    shapes = {n: list(t.shape) for n, t in original_state(saved(MODELS[name](), tmp_path / "hub")).items()}
    wide = {n: [width * s // WIDTH if s % WIDTH == 0 else s for s in shape] for n, shape in shapes.items()}
    with pytest.raises(UnsupportedNetwork, match=f"is {width} wide and does not say how many heads") as caught:
        load_network(write(tmp_path / "wide.pth", {n: torch.ones(shape) for n, shape in wide.items()}))
    assert "those of widths 384, 768, 1024, 1536 are known" in caught.value.what
    assert caught.value.way_out == "use a released file, or a folder of transformers, whose config.json says it"


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1536, 24)])
def test_the_heads_are_those_of_the_release_and_said_to_be_inferred(width: int, heads: int) -> None:
    shapes = {
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "pos_embed": (1, 10, width),
        "blocks.0.ls1.gamma": (width,),
        "blocks.0.mlp.fc2.weight": (width, 4 * width),
    }
    key_map = dinov2_key_map(Checkpoint("file", {}, shapes, lambda name: torch.zeros(shapes[name])))
    assert isinstance(key_map.spec, BackboneSpec)
    assert key_map.spec.heads == heads
    assert key_map.inferred == {"heads": heads}


def test_a_timm_folder_is_dinos_if_its_name_says_so(tmp_path: Path) -> None:
    state = original_state(saved(dino(), tmp_path / "hub"))
    network = load_network(str(timm_folder(tmp_path / "dino", state, "dino")))
    assert (network.family, network.weights_sha256) == ("vit", load_network(str(tmp_path / "hub")).weights_sha256)
    for tag in ("augreg_in21k", "dinov2", ""):
        other = timm_folder(tmp_path / f"other-{tag}", state, tag)
        with pytest.raises(UnsupportedNetwork, match="its tensors are named as DINO's, but it was trained") as caught:
            load_network(str(other))
        name = f"vit_small_patch16_224.{tag}".rstrip(".")
        assert caught.value.what.startswith(f"{other} is timm's {name}: ")
        assert caught.value.way_out == f"run it as timm does: --teacher timm:{name} (pip install 'emkum[timm]')"


def test_a_timm_folder_says_how_it_wants_its_pictures(tmp_path: Path) -> None:
    state = original_state(saved(dino(), tmp_path / "hub"))
    half = [0.5, 0.5, 0.5]
    cfg = {"input_size": [3, 384, 384], "mean": half, "std": half, "crop_pct": 0.9, "interpolation": "bilinear"}
    said = load_network(str(timm_folder(tmp_path / "said", state, "dino", **cfg))).preprocessing
    assert said == Preprocessing(384, HALF, HALF, 0.9, "bilinear")
    silent = load_network(str(timm_folder(tmp_path / "silent", state, "dino", crop_pct=None))).preprocessing
    assert silent == load_network(write(tmp_path / "lone.pth", state)).preprocessing
