"""MAE's encoder against transformers, whose model masks three quarters of the patches unless told not to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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
from test_models_dino_originals import original_state, timm_folder, write
from test_models_families import VIT, _quiet_transformers, randomised, respelled, saved  # noqa: F401 - a fixture
from torch import Tensor, nn

from emkum.errors import UnsupportedNetwork
from emkum.models.catalogue import load_network
from emkum.models.convert import convert
from emkum.models.families.checkpoint import Checkpoint
from emkum.models.families.mae import key_map
from emkum.models.families.registry import CATALOGUE
from emkum.models.preprocessing import HALF

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


# --- the authors' files, which name their tensors as DINO's do ---------------------------------------------


def their_sines(width: int, side: int) -> Tensor:
    """The table as MAE's authors compute it: columns first, sines then cosines. CLS has zeros."""
    columns, rows = np.meshgrid(np.arange(side, dtype=np.float32), np.arange(side, dtype=np.float32))
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4.0))
    parts = [np.einsum("m,d->md", positions.reshape(-1), omega) for positions in (columns, rows)]
    table = np.concatenate([wave(part) for part in parts for wave in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros([1, width]), table])).float()[None]


def released_mae() -> nn.Module:
    """768 wide, 12 heads, as the smallest that was released; two blocks, and its own positions."""
    shape = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 2, "intermediate_size": 40}
    model = randomised(transformers.ViTMAEModel(transformers.ViTMAEConfig(**CONFIG | shape)))
    model.embeddings.position_embeddings.data = their_sines(768, 5)
    return model


@pytest.mark.parametrize("grid", [(5, 5), (7, 4)], ids=str)
def test_an_original_file_gives_the_numbers_of_transformers(grid: tuple[int, int], tmp_path: Path) -> None:
    model = released_mae()
    state = original_state(saved(model, tmp_path / "hub"))
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 768)}
    path = write(tmp_path / "mae_pretrain_vit_base.pth", {"model": state | decoder})
    converted = convert(path, tmp_path / "out", family="mae")
    made = converted.network
    assert converted.provenance["inferred"] == {"heads": 12}
    images = pictures(grid)
    theirs = recorded(model, "layers.{}", "layers.{}.mlp", lambda: their_final(model, images))
    assert_same(ours_on_pictures(made, images), theirs)
    assert made.weights_sha256 == load_network(str(tmp_path / "hub")).weights_sha256
    assert (made.family, made.preprocessing) == ("mae", load_network(str(tmp_path / "hub")).preprocessing)
    assert load_network(str(tmp_path / "out")).weights_sha256 == made.weights_sha256


def test_a_file_of_mae_is_not_read_as_dinos(tmp_path: Path) -> None:
    state = original_state(saved(released_mae(), tmp_path / "hub"))
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        path = write(tmp_path / "mae.pth", {name: tensor.to(kind) for name, tensor in state.items()})
        with pytest.raises(
            UnsupportedNetwork, match="has positions of sines and cosines: it is a file of MAE"
        ) as caught:
            load_network(path)
        assert caught.value.way_out == f"say so: emkum teachers convert {path} --family mae"
    trained = state | {"pos_embed": state["pos_embed"] + 0.05}
    assert load_network(write(tmp_path / "dino.pth", trained)).family == "vit"
    with pytest.raises(
        UnsupportedNetwork, match="is no file of MAE: its positions are not sines and cosines"
    ) as caught:
        key_map(Checkpoint("dino.pth", {}, {n: tuple(t.shape) for n, t in trained.items()}, trained.__getitem__))
    assert caught.value.way_out == "leave --family out"


def test_the_huge_one_has_sixteen_heads_of_eighty_channels() -> None:
    tensors = {
        "patch_embed.proj.weight": torch.zeros(1280, 3, 14, 14),
        "pos_embed": their_sines(1280, 4),
        "blocks.0.mlp.fc2.weight": torch.zeros(1280, 5120),
    }
    found = key_map(Checkpoint("file", {}, {n: tuple(t.shape) for n, t in tensors.items()}, tensors.__getitem__))
    assert found.spec.to_json()["heads"] == 16
    assert found.inferred == {"heads": 16}


def test_a_timm_folder_tagged_mae_is_read_as_mae(tmp_path: Path) -> None:
    state = original_state(saved(released_mae(), tmp_path / "hub"))
    folder = timm_folder(tmp_path / "timm", state, "mae", mean=[0.5, 0.5, 0.5])
    network, hub = load_network(str(folder)), load_network(str(tmp_path / "hub"))
    assert (network.family, network.weights_sha256) == ("mae", hub.weights_sha256)
    assert network.preprocessing is not None
    assert network.preprocessing.mean == HALF
