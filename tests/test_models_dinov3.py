"""DINOv3 against transformers: rotary positions on any grid, registers, keys without bias, SwiGLU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parity import (
    GRIDS,
    assert_pictures_pass,
    assert_same,
    assert_saved_whole,
    assert_strict,
    ours_on_pictures,
    pictures,
    recorded,
    relative,
)
from test_models_families import VIT, _quiet_transformers, randomised, respelled, saved  # noqa: F401 - a fixture
from torch import nn

from emkum.errors import UnsupportedNetwork
from emkum.models.backbone import Backbone, BackboneSpec
from emkum.models.catalogue import load_network
from emkum.models.families.registry import CATALOGUE
from emkum.models.positions import rotary_table

KINDS: dict[str, dict[str, Any]] = {
    "small": {"num_register_tokens": 4},
    "plus": {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
    "no-registers-all-biases": {"key_bias": True},
    "no-biases-other-base": {"query_bias": False, "value_bias": False, "rope_theta": 30.0, "num_register_tokens": 2},
}


def dinov3(**more: Any) -> nn.Module:
    return randomised(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VIT, image_size=20, **more)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_dinov3_equals_transformers_layer_by_layer_on_any_grid(
    kind: str, grid: tuple[int, int], tmp_path: Path
) -> None:
    model = dinov3(**KINDS[kind])
    network = load_network(str(saved(model, tmp_path)))
    images = pictures(grid)
    theirs = recorded(model, "model.layer.{}", "model.layer.{}.mlp", lambda: model(images).last_hidden_state)
    assert_same(ours_on_pictures(network, images), theirs)
    assert network.num_prefix == 1 + KINDS[kind].get("num_register_tokens", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_whole_runs_in_a_pass_and_has_the_names_in_memory_too(kind: str, tmp_path: Path) -> None:
    model = dinov3(**KINDS[kind])
    network = load_network(str(saved(model, tmp_path / "disk")))
    assert_saved_whole(network, tmp_path / "saved")
    assert_pictures_pass(network)
    memory = load_network(str(respelled(saved(model, tmp_path / "memory"), model)))
    assert memory.weights_sha256 == network.weights_sha256


def test_only_the_whole_and_nothing_else_is_read(tmp_path: Path) -> None:
    folder = saved(dinov3(num_register_tokens=4), tmp_path)
    assert_strict(folder, "layer.1.attention.q_proj.bias")
    assert_strict(folder, "embeddings.register_tokens")


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(dinov3(), tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file(state | {"classifier.weight": torch.zeros(2, 24)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedNetwork, match=r"fine-tuned with labels: it has classifier\.weight"):
        load_network(str(folder))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"query_bias": False}, "query_bias = false, key_bias = false, value_bias = true"),
        ({"proj_bias": False}, "proj_bias = false"),
        ({"mlp_bias": False}, "mlp_bias = false"),
    ],
    ids=str,
)
def test_biases_that_no_release_lacks_are_refused(changed: dict[str, bool], said: str, tmp_path: Path) -> None:
    folder = saved(dinov3(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(UnsupportedNetwork, match=f"a DINOv3 with {said}"):
        load_network(str(folder))


def test_queries_of_cls_alone_and_blocks_taken_out_turn_alike(tmp_path: Path) -> None:
    """What a student does: blocks of its own, from the middle, on a square grid that nobody names."""
    network = load_network(str(saved(dinov3(num_register_tokens=4), tmp_path)))
    backbone = network.backbone
    assert isinstance(backbone, Backbone)
    images = pictures((6, 6))
    whole = ours_on_pictures(network, images)
    taken = backbone.stack.take(1, 2)
    rebuilt = type(taken)(type(taken.spec).from_json(json.loads(json.dumps(taken.spec.to_json()))))
    rebuilt.load_state_dict(taken.state_dict())
    for stack in (taken, rebuilt):
        assert relative(stack(whole.hidden[1])[-1], whole.hidden[-1]) < 1e-5
        assert relative(stack(whole.hidden[1], queries=1)[-1], whole.hidden[-1][:, :1]) < 1e-5
    with pytest.raises(ValueError, match="35 patches do not make a square"):
        taken(whole.hidden[1][:, :-1])


def test_rotary_tables_leave_the_prefix_alone_and_know_the_middle_of_the_picture() -> None:
    table = rotary_table((3, 5), 2, 8, 100.0, torch.device("cpu"))
    assert table.shape == (2, 17, 8)
    assert torch.equal(table[:, :2], torch.tensor([1.0, 0.0])[:, None, None].expand(2, 2, 8))
    middle = 2 + 1 * 5 + 2
    assert torch.allclose(table[:, middle], torch.tensor([1.0, 0.0])[:, None].expand(2, 8), atol=1e-6)
    angle = 2 * torch.pi * torch.tensor([-2 / 3, -2 / 30, -4 / 5, -4 / 50])  # the first patch, periods 1 and 10
    assert torch.allclose(table[0, 2], angle.repeat(2).cos(), atol=1e-6)
    assert torch.allclose(table[1, 2], angle.repeat(2).sin(), atol=1e-6)


def test_rotary_positions_need_heads_of_four_parts_and_pictures() -> None:
    with pytest.raises(UnsupportedNetwork, match=r"24 channels in 4 heads \(image\): a head needs four parts"):
        BackboneSpec("dinov3", "image", 1, 24, 4, 8, patch=4, image_size=8, rotary_base=100.0)
    with pytest.raises(UnsupportedNetwork, match=r"\(text\)"):
        BackboneSpec("x", "text", 1, 24, 3, 8, vocab_size=4, max_positions=8, rotary_base=100.0)


def test_the_catalogue_says_that_dinov3_has_its_own_licence() -> None:
    entries = [CATALOGUE[name] for name in ("dinov3-s", "dinov3-b", "dinov3-l")]
    assert [entry.source.split("/")[1][:13] for entry in entries] == ["dinov3-vits16", "dinov3-vitb16", "dinov3-vitl16"]
    assert {entry.licence for entry in entries} == {"DINOv3 licence (custom)"}
    assert {(entry.tokens, entry.supervision) for entry in entries} == {(201, "none")}
