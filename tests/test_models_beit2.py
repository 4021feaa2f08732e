"""BEiT-2 from its original file, against transformers' BeitModel with the same weights."""

from __future__ import annotations

import argparse
import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from emkum.errors import UnsupportedNetwork, UsageError, WeightsUnavailable
from emkum.models import fetch
from emkum.models.catalogue import load_network
from emkum.models.families import originals, registry
from tests.beit_originals import trunk

WIDTH, DEPTH, HEADS, PATCH, GRID = 24, 2, 3, 4, 5


def hf_model() -> Any:
    config = transformers.BeitConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=40,
        patch_size=PATCH,
        image_size=GRID * PATCH,
        layer_norm_eps=1e-6,
        use_shared_relative_position_bias=True,
        use_relative_position_bias=False,
        use_mask_token=True,
        use_mean_pooling=False,
    )
    model = transformers.BeitModel(config, add_pooling_layer=False).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def original_state(model: Any) -> dict[str, Tensor]:
    """What the authors' pre-training saves, with the heads it has and we do not need."""
    theirs = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {
        **trunk(model, DEPTH),
        "mask_token": theirs["embeddings.mask_token"],
        "rel_pos_bias.relative_position_bias_table": theirs["shared_position_bias.relative_position_bias_table"],
        "rel_pos_bias.relative_position_index": torch.zeros(26, 26, dtype=torch.int64),
        "norm.weight": theirs["layernorm.weight"],
        "norm.bias": theirs["layernorm.bias"],
        "lm_head.weight": torch.zeros(7, WIDTH),
        "cls_pt_layers.0.norm1.weight": torch.zeros(WIDTH),
    }


def write(path: Path, state: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state, "args": argparse.Namespace(epochs=1600)}, path)
    return path


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment of the tests says, nothing real is asked anyway."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return write(tmp_path / "release/beitv2_base_patch16_224_pt1k.pth", original_state(hf_model()))


@pytest.mark.parametrize("grid", [(5, 5), (8, 8), (3, 7)], ids=str)
def test_the_original_file_gives_the_numbers_of_transformers(original: Path, grid: tuple[int, int]) -> None:
    network = load_network(str(original))
    images = torch.randn(2, 3, grid[0] * PATCH, grid[1] * PATCH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = hf_model()(images, output_hidden_states=True)
        tokens = network.backbone.embed(images)
        hidden = network.backbone.run(tokens, grid=grid).hidden
    ours = [tokens, *hidden, network.backbone.finish(hidden[-1])]
    for one, other in zip(ours, [*theirs.hidden_states, theirs.last_hidden_state], strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5
    assert (network.family, network.width, network.depth, network.patch) == ("beit2", WIDTH, DEPTH, PATCH)
    assert network.preprocessing is not None
    assert network.preprocessing.mean == (0.485, 0.456, 0.406)
    assert network.preprocessing.crop_fraction == 0.9


def test_the_folder_of_the_file_and_its_safetensors_copy_are_read_too(original: Path) -> None:
    digest = load_network(str(original)).weights_sha256
    assert load_network(str(original.parent)).weights_sha256 == digest
    made = originals.as_safetensors(original, "abc")
    original.unlink()
    assert load_network(str(made.parent)).weights_sha256 == digest
    write(original.with_name("beitv2_other.pth"), {})
    made.unlink()
    write(original, {})
    with pytest.raises(UsageError, match=r"holds beitv2_base_patch16_224_pt1k\.pth, beitv2_other\.pth"):
        load_network(str(original.parent))


def test_the_safetensors_copy_is_made_once_and_again_when_the_file_is_another(original: Path) -> None:
    made = originals.as_safetensors(original, "one")
    first = made.stat().st_mtime_ns
    assert originals.as_safetensors(original, "one").stat().st_mtime_ns == first
    assert originals.as_safetensors(original, "two").stat().st_mtime_ns > first
    made.write_bytes(b"torn")
    assert load_network(str(originals.as_safetensors(original, "two"))).depth == DEPTH


@pytest.mark.parametrize(
    "sign", ["fc_norm.weight", "head.weight", "blocks.0.attn.relative_position_bias_table"], ids=str
)
def test_a_fine_tuned_file_is_refused(sign: str, tmp_path: Path) -> None:
    state = original_state(hf_model()) | {sign: torch.zeros(84, HEADS)}
    path = write(tmp_path / "beitv2_base_patch16_224_pt1k_ft1k.pth", state)
    with pytest.raises(UnsupportedNetwork, match=f"fine-tuned with labels: it has {sign}") as caught:
        load_network(str(path))
    assert "pt1k.pth" in caught.value.way_out


def test_another_file_under_the_name_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "beitv2_x.pth", {"weight": torch.zeros(2)})
    with pytest.raises(UnsupportedNetwork, match="is no original file we know"):
        load_network(str(path))
    torch.save([1, 2], path)
    with pytest.raises(UnsupportedNetwork, match="has no state dict"):
        load_network(str(path))


def test_the_catalogue_fetches_the_file_once_records_its_digest_and_keeps_it_as_safetensors(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    monkeypatch.setenv(fetch.WEIGHTS_DIR, str(kept))
    fetched: list[str] = []
    real = fetch.urllib.request.urlopen

    def from_release(request: urllib.request.Request, timeout: float) -> Any:
        fetched.append(request.full_url)
        return real(original.as_uri(), timeout=timeout)

    monkeypatch.setattr(fetch.urllib.request, "urlopen", from_release)
    network = load_network("beit2")
    again = load_network("beit2", offline=True)
    assert fetched == [registry.CATALOGUE["beit2"].source]
    assert network.weights_sha256 == again.weights_sha256 == load_network(str(original)).weights_sha256
    name = "beitv2_base_patch16_224_pt1k"
    assert {path.name for path in kept.iterdir()} == {f"{name}.pth", f"{name}.pth.json", f"{name}.safetensors"}
    record = json.loads((kept / f"{name}.pth.json").read_text())
    assert record["sha256"] == network.revision
    assert record["url"] == network.source
    assert (network.name, network.licence, network.supervision) == ("beit2", "MIT", "none+clip_tokenizer")


def test_a_file_put_there_by_hand_is_used_and_its_digest_recorded(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fetch.WEIGHTS_DIR, str(original.parent))
    assert len(load_network("beit2", offline=True).revision) == 64
    assert original.with_name(original.name + ".json").is_file()


def test_without_a_network_the_file_its_source_and_its_place_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fetch.WEIGHTS_DIR, str(tmp_path))

    def no_network(request: urllib.request.Request, timeout: float) -> Any:
        raise fetch.urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(fetch.urllib.request, "urlopen", no_network)
    with pytest.raises(WeightsUnavailable, match=r"beitv2_base_patch16_224_pt1k\.pth from https://") as caught:
        load_network("beit2")
    assert "Name or service not known" in caught.value.what
    assert caught.value.way_out.startswith(f"put the file at {tmp_path / 'beitv2_base_patch16_224_pt1k.pth'}")
    assert "--teacher" in caught.value.way_out
    with pytest.raises(WeightsUnavailable, match="working offline"):
        load_network("beit2", offline=True)
