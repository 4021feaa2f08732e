"""MAE's encoder against transformers, whose model masks three quarters of the patches unless told not to."""

from __future__ import annotations

from pathlib import Path

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
)
from test_models_families import VIT, _quiet_transformers, randomised, respelled, saved  # noqa: F401 - a fixture
from torch import Tensor, nn

from emkum.errors import UnsupportedNetwork
from emkum.models.catalogue import load_network
from emkum.models.families.registry import CATALOGUE

CONFIG = VIT | {"image_size": 20, "layer_norm_eps": 1e-6, "mask_ratio": 0.0}
DECODER = {"decoder_hidden_size": 12, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 3}


def mae() -> nn.Module:
    return randomised(transformers.ViTMAEModel(transformers.ViTMAEConfig(**CONFIG)))


def their_final(model: nn.Module, images: Tensor) -> Tensor:
    """Every patch kept, in its place: masking shuffles even where it leaves none out."""
    in_order = torch.arange(images.shape[2] * images.shape[3] // 16, dtype=torch.float32).expand(len(images), -1)
    final: Tensor = model(images, noise=in_order, interpolate_pos_encoding=True).last_hidden_state
    return final


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_mae_equals_transformers_without_its_masking_on_any_grid(grid: tuple[int, int], tmp_path: Path) -> None:
    model = mae()
    network = load_network(str(saved(model, tmp_path)))
    images = pictures(grid)
    theirs = recorded(model, "layers.{}", "layers.{}.mlp", lambda: their_final(model, images))
    assert_same(ours_on_pictures(network, images), theirs)


def test_it_is_saved_whole_runs_in_a_pass_and_has_the_names_in_memory_too(tmp_path: Path) -> None:
    model = mae()
    network = load_network(str(saved(model, tmp_path / "disk")))
    assert_saved_whole(network, tmp_path / "saved")
    assert_pictures_pass(network)
    memory = load_network(str(respelled(saved(model, tmp_path / "memory"), model)))
    assert memory.weights_sha256 == network.weights_sha256


def test_only_the_whole_and_nothing_else_is_read(tmp_path: Path) -> None:
    assert_strict(saved(mae(), tmp_path), "encoder.layer.1.intermediate.dense.weight")


def test_the_decoder_is_read_past_and_the_positions_are_those_of_the_file(tmp_path: Path) -> None:
    whole = randomised(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**CONFIG, **DECODER)))
    network = load_network(str(saved(whole, tmp_path)))
    images = pictures((5, 5))
    theirs = recorded(whole.vit, "layers.{}", "layers.{}.mlp", lambda: their_final(whole.vit, images))
    assert_same(ours_on_pictures(network, images), theirs)
    table = whole.state_dict()["vit.embeddings.position_embeddings"][0]
    assert torch.equal(network.backbone.state_dict()["embedding.positions"], table)


def test_a_fine_tuned_mae_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(mae(), tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file(state | {"fc_norm.weight": torch.zeros(24)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedNetwork, match=r"fine-tuned with labels: it has fc_norm.weight") as caught:
        load_network(str(folder))
    assert caught.value.way_out == "use mae-b"


def test_the_catalogue_says_that_mae_is_not_for_commerce() -> None:
    assert {CATALOGUE[name].licence for name in ("mae-b", "mae-l")} == {"CC-BY-NC-4.0"}
    assert [CATALOGUE[name].source for name in ("mae-b", "mae-l")] == [
        "facebook/vit-mae-base",
        "facebook/vit-mae-large",
    ]
