"""The supervised teachers that the self-supervised ones are compared with: BEiT-2 fine-tuned, and timm's ResNets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from emkum.errors import UnsupportedNetwork
from emkum.models import fetch
from emkum.models.backbone import Backbone
from emkum.models.catalogue import load_network
from emkum.models.convert import convert
from emkum.models.families.registry import CATALOGUE
from emkum.models.passes import FrozenPass, Wanted
from emkum.models.preprocessing import Preprocessing
from emkum.models.supervision import judge
from tests.beit_originals import trunk
from tests.parity import GRIDS, PATCH, assert_same, ours_on_pictures, pictures, recorded
from tests.test_models_beit2 import write
from tests.test_models_families import randomised, saved

# --- BEiT-2 fine-tuned -------------------------------------------------------------------------------------


def beit() -> Any:
    config = transformers.BeitConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        patch_size=PATCH,
        image_size=5 * PATCH,
        layer_norm_eps=1e-6,
        use_relative_position_bias=True,
        use_mean_pooling=True,
    )
    return randomised(transformers.BeitModel(config))


def fine_tuned_state(model: nn.Module) -> dict[str, Tensor]:
    """What the authors' fine-tuning saves."""
    theirs = model.state_dict()
    state = {
        **trunk(model, depth=3),
        "fc_norm.weight": torch.ones(24),
        "fc_norm.bias": torch.zeros(24),
        "head.weight": torch.zeros(7, 24),
        "head.bias": torch.zeros(7),
    }
    for i in range(3):
        (table,) = [name for name in theirs if name.startswith(f"layers.{i}.") and name.endswith("bias_table")]
        state[f"blocks.{i}.attn.relative_position_bias_table"] = theirs[table].clone()
        state[f"blocks.{i}.attn.relative_position_index"] = torch.zeros(26, 26, dtype=torch.int64)
    return state


@pytest.fixture
def by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file where the catalogue looks for it."""
    monkeypatch.setenv(fetch.WEIGHTS_DIR, str(tmp_path))
    return write(tmp_path / CATALOGUE["beit2-ft"].source.rpartition("/")[2], fine_tuned_state(beit()))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_beit2_fine_tuned_gives_the_numbers_of_transformers(by_name: Path, grid: tuple[int, int]) -> None:
    network, model, images = load_network("beit2-ft", offline=True), beit(), pictures(grid)
    theirs = recorded(model, "layers.{}", "layers.{}.mlp", lambda: model(images).last_hidden_state)
    assert_same(ours_on_pictures(network, images), theirs)
    assert (network.name, network.supervision) == ("beit2-ft", "class_labels")
    assert isinstance(network.backbone, Backbone)
    assert not network.backbone.spec.final_norm


def test_its_default_targets_are_what_it_classifies_by(by_name: Path) -> None:
    network = load_network("beit2-ft", offline=True)
    wanted = [Wanted("beit2-ft", "mean"), Wanted("beit2-ft", "patches"), Wanted("beit2-ft", "layers")]
    crops = torch.zeros(1, 5 * PATCH, 5 * PATCH, 3, dtype=torch.uint8)
    mean, patches, _ = FrozenPass([network], wanted, "float32", "cpu").pictures(crops)
    assert CATALOGUE["beit2-ft"].targets == ("mean", "patches")
    assert torch.allclose(mean, patches.mean(1), atol=1e-6)


def test_the_same_file_is_refused_unless_it_is_named_as_supervised(by_name: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedNetwork, match="fine-tuned with labels"):
        load_network(str(by_name))
    assert "class_labels" in judge(str(by_name)).words
    assert "class_labels" in judge("beit2-ft").words
    made = convert(str(by_name), tmp_path / "out", family="beit2-ft")
    assert made.network.supervision == "class_labels"
    assert {"head.weight", "fc_norm.bias"} <= set(made.provenance["dropped"])
    assert load_network(str(made.folder)).weights_sha256 == load_network("beit2-ft", offline=True).weights_sha256


def test_a_self_supervised_file_is_no_fine_tuned_one(tmp_path: Path) -> None:
    from tests.test_models_beit2 import hf_model, original_state

    path = write(tmp_path / "beitv2.pth", original_state(hf_model()))
    with pytest.raises(UnsupportedNetwork, match="is no beit2-ft: it lacks"):
        convert(str(path), tmp_path / "out", family="beit2-ft")


@pytest.mark.parametrize("change", ["lacks", "has unknown tensors"])
def test_beit2_fine_tuned_is_read_strictly(change: str, by_name: Path) -> None:
    state = fine_tuned_state(beit())
    if change == "lacks":
        del state["blocks.1.attn.relative_position_bias_table"]
    else:
        state["extra.weight"] = torch.zeros(1)
    write(by_name, state)
    with pytest.raises(UnsupportedNetwork, match=change):
        load_network("beit2-ft", offline=True)


# --- timm's ResNets ----------------------------------------------------------------------------------------


def resnet(layer: str) -> Any:
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[8, 12, 16, 20], depths=[2, 1, 1, 2], layer_type=layer, num_labels=5
    )
    return randomised(transformers.ResNetForImageClassification(config))


def timm_folder(model: Any, folder: Path) -> Path:
    """As timm keeps it on the hub: its own names, and a config.json without model_type."""
    names = {"convolution": "conv", "normalization": "bn"}
    state = {}
    for name, tensor in model.state_dict().items():
        parts = name.removeprefix("resnet.").split(".")
        if parts[0] == "classifier":
            state[f"fc.{parts[-1]}"] = tensor
        elif parts[0] == "embedder":
            state[f"{names[parts[2]]}1.{parts[3]}"] = tensor
        else:
            block = f"layer{int(parts[2]) + 1}.{parts[4]}"
            if parts[5] == "shortcut":
                state[f"{block}.downsample.{0 if parts[6] == 'convolution' else 1}.{parts[7]}"] = tensor
            else:
                state[f"{block}.{names[parts[7]]}{int(parts[6]) + 1}.{parts[8]}"] = tensor
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet50", "num_classes": 5}))
    return folder


@pytest.mark.parametrize("layer", ["bottleneck", "basic"])
def test_timms_names_give_the_network_of_transformers(layer: str, tmp_path: Path) -> None:
    model = resnet(layer)
    ours = load_network(str(timm_folder(model, tmp_path / "timm")))
    theirs = load_network(str(saved(model, tmp_path / "hf")))
    assert ours.weights_sha256 == theirs.weights_sha256
    assert ours.backbone.spec == theirs.backbone.spec
    assert (ours.family, ours.supervision) == ("resnet-timm", "class_labels")
    assert "class_labels" in judge(str(tmp_path / "timm")).words
    crops = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    (logits,) = FrozenPass([ours], [Wanted(ours.name, "logits")], "float32", "cpu").pictures(crops)
    from emkum.models.network import normalise

    with torch.no_grad():
        expected = model(normalise(ours, crops)).logits
    assert float((logits - expected).norm() / expected.norm()) < 1e-5


def test_a_timm_file_alone_is_read_too_and_strictly(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = timm_folder(resnet("bottleneck"), tmp_path / "timm")
    whole = load_file(folder / "model.safetensors")
    torch.save(whole, tmp_path / "resnet.pth")
    assert load_network(str(tmp_path / "resnet.pth")).weights_sha256 == load_network(str(folder)).weights_sha256
    save_file({n: t for n, t in whole.items() if n != "layer2.0.bn1.bias"}, folder / "model.safetensors")
    with pytest.raises(UnsupportedNetwork, match=r"lacks layer2\.0\.bn1\.bias"):
        load_network(str(folder))
    save_file(whole | {"attn.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedNetwork, match=r"unknown tensors attn\.weight"):
        load_network(str(folder))


@pytest.mark.parametrize("name", ["resnetblur50.bt_in1k", "resnetaa50.a1h_in1k", "seresnet50", "resnet50d.ra2_in1k"])
def test_a_timm_folder_of_another_resnet_with_the_same_tensors_is_refused(name: str, tmp_path: Path) -> None:
    folder = timm_folder(resnet("bottleneck"), tmp_path / "timm")
    architecture, _, tag = name.partition(".")
    config = {"architecture": architecture, "num_classes": 5, "pretrained_cfg": {"tag": tag}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UnsupportedNetwork, match=rf"is timm's {name}: its tensors are named as a plain ResNet"
    ) as caught:
        load_network(str(folder))
    assert caught.value.way_out == f"run it as timm does: --teacher timm:{name} (pip install 'emkum[timm]')"


def test_a_timm_folder_says_how_it_wants_its_pictures(tmp_path: Path) -> None:
    folder = timm_folder(resnet("bottleneck"), tmp_path / "timm")
    plain = load_network(str(folder)).preprocessing
    assert plain == Preprocessing(crop_fraction=0.95)
    cfg = {"tag": "a1_in1k", "input_size": [3, 288, 288], "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0}
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet50", "pretrained_cfg": cfg}))
    found = load_network(str(folder)).preprocessing
    assert found == Preprocessing(288, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 1.0, "bicubic")
