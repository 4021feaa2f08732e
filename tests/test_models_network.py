"""Networks as wholes: their digest, their files, their common prefix, their preprocessing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from emkum.errors import CorruptCache, IdentityMismatch, NewerFormat, UnsupportedNetwork, UsageError
from emkum.models.backbone import Backbone, BackboneSpec
from emkum.models.network import (
    Network,
    load_saved,
    network_name,
    normalise,
    save_network,
    shares_prefix,
    weights_digest,
)
from emkum.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, read_preprocessor
from emkum.models.resnet import ResNet, ResNetSpec

VIT = BackboneSpec("vit", "image", depth=4, width=16, heads=2, mlp_width=24, patch=4, image_size=20)
BEIT = dataclasses.replace(VIT, family="beit", position="none", relative_bias="per_block", qkv_bias="qv")
BERT = BackboneSpec(
    "bert", "text", depth=2, width=16, heads=2, mlp_width=24, norm_order="post", vocab_size=30, max_positions=32
)
RESNET = ResNetSpec(stem_width=8, widths=(16, 32), depths=(1, 1), num_classes=3)


def tiny(spec: BackboneSpec | ResNetSpec = VIT, seed: int = 0, name: str = "tiny") -> Network:
    torch.manual_seed(seed)
    backbone = ResNet(spec) if isinstance(spec, ResNetSpec) else Backbone(spec)
    for tensor in backbone.state_dict().values():
        tensor.normal_().abs_()
    is_text = spec.modality == "text"
    return Network(
        name=name,
        family=spec.family,
        modality=spec.modality,
        backbone=backbone.eval().requires_grad_(False),
        preprocessing=None if is_text else Preprocessing(image_size=20),
        tokenizer=b'{"version": "1.0"}' if is_text else None,
        max_tokens=32 if is_text else 0,
        weights_sha256=weights_digest(backbone),
        source="hub:someone/tiny",
        revision="c0ffee",
        licence="MIT",
        supervision="none",
    )


def edited(network: Network, tensor: str) -> Network:
    """The same network with one number changed."""
    other = dataclasses.replace(network, backbone=type(network.backbone)(network.backbone.spec))  # type: ignore[arg-type]
    state = {name: value.clone() for name, value in network.backbone.state_dict().items()}
    state[tensor].view(-1)[0] += 1
    other.backbone.load_state_dict(state)
    return dataclasses.replace(other, weights_sha256=weights_digest(other.backbone))


def test_the_digest_is_over_sorted_names_types_shapes_and_bytes_in_float32() -> None:
    network = tiny()
    digest = hashlib.sha256()
    for name, tensor in sorted(network.backbone.state_dict().items()):
        digest.update(f"{name}\0float32\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.numpy().astype("<f4").tobytes())
    assert network.weights_sha256 == digest.hexdigest()


def test_the_digest_does_not_depend_on_the_type_that_holds_the_numbers_but_on_each_number() -> None:
    network = tiny()
    network.backbone.half()
    as_half = weights_digest(network.backbone)
    network.backbone.float()
    assert weights_digest(network.backbone) == as_half
    assert edited(network, "norm.bias").weights_sha256 != as_half


@pytest.mark.parametrize("spec", [VIT, BEIT, BERT, RESNET], ids=["vit", "beit", "bert", "resnet"])
def test_a_network_comes_back_from_its_folder_as_it_was(spec: BackboneSpec | ResNetSpec, tmp_path: Path) -> None:
    network = tiny(spec)
    save_network(network, tmp_path / "deep/tiny")
    found = load_saved(tmp_path / "deep/tiny")
    for field in dataclasses.fields(Network):
        if field.name != "backbone":
            assert getattr(found, field.name) == getattr(network, field.name), field.name
    assert found.backbone.spec == network.backbone.spec
    assert not found.backbone.training
    assert not any(p.requires_grad for p in found.backbone.parameters())
    inputs = torch.tensor([[1, 2, 3]]) if spec.modality == "text" else torch.randn(1, 3, 20, 20)
    assert torch.equal(found.backbone.embed(inputs), network.backbone.embed(inputs))
    names = {path.name for path in (tmp_path / "deep/tiny").iterdir()}
    assert names == {"model.json", "model.safetensors"} | ({"tokenizer.json"} if spec is BERT else set())


def test_saving_again_does_nothing_and_another_network_is_refused(tmp_path: Path) -> None:
    network = tiny()
    save_network(network, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    save_network(dataclasses.replace(network, source="elsewhere", revision="2"), tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    with pytest.raises(IdentityMismatch, match="holds tiny with weights_sha256"):
        save_network(edited(network, "embedding.cls"), tmp_path)
    with pytest.raises(IdentityMismatch, match="with preprocessing"):
        save_network(dataclasses.replace(network, preprocessing=Preprocessing(image_size=24)), tmp_path)


def test_a_save_that_stopped_before_model_json_is_done_again(tmp_path: Path) -> None:
    network = tiny()
    save_network(network, tmp_path)
    (tmp_path / "model.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CorruptCache, match="holds no whole network"):
        load_saved(tmp_path)
    save_network(network, tmp_path)
    assert load_saved(tmp_path).weights_sha256 == network.weights_sha256


def test_a_network_that_was_cast_is_not_saved_as_the_original(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cast or changed"):
        save_network(tiny().placed("cpu", torch.bfloat16), tmp_path)
    assert not (tmp_path / "model.json").exists()


def test_a_flipped_byte_a_changed_tokenizer_and_a_missing_file_are_noticed(tmp_path: Path) -> None:
    for index, name in enumerate(("model.safetensors", "tokenizer.json")):
        folder = tmp_path / str(index)
        save_network(tiny(BERT), folder)
        content = bytearray((folder / name).read_bytes())
        content[-3] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(CorruptCache, match=r"have sha256 .*, model\.json says"):
            load_saved(folder)
        (folder / name).unlink()
        with pytest.raises(CorruptCache, match="holds no whole network"):
            load_saved(folder)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    save_network(tiny(), tmp_path)
    record = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(record | {"format": 2}))
    with pytest.raises(NewerFormat, match="has format 2, this emkum reads 1"):
        load_saved(tmp_path)


def test_equal_networks_share_all_blocks_and_the_first_difference_ends_it() -> None:
    network = tiny()
    assert shares_prefix(network, network) == 4
    assert shares_prefix(network, edited(network, "norm.weight")) == 4
    assert shares_prefix(network, edited(network, "stack.blocks.2.fc1.bias")) == 2
    assert shares_prefix(network, edited(network, "stack.blocks.0.norm1.bias")) == 0
    assert shares_prefix(network, edited(network, "embedding.positions")) == -1
    assert shares_prefix(network, tiny(seed=1)) == -1


def test_a_shallower_network_shares_what_it_has() -> None:
    deep, shallow = tiny(), tiny(dataclasses.replace(VIT, depth=2))
    state = deep.backbone.state_dict()
    shallow.backbone.load_state_dict({name: state[name] for name in shallow.backbone.state_dict()})
    assert shares_prefix(deep, shallow) == shares_prefix(shallow, deep) == 2


@pytest.mark.parametrize(
    ("change", "shared"),
    [({"eps": 1e-5}, -1), ({"position_antialias": True}, -1), ({"activation": "quick_gelu"}, 0), ({"family": "x"}, 4)],
    ids=["eps", "antialias", "activation", "family"],
)
def test_equal_weights_that_compute_something_else_are_not_shared(change: dict[str, object], shared: int) -> None:
    one, other = tiny(), tiny(dataclasses.replace(VIT, **change))  # type: ignore[arg-type]
    assert one.weights_sha256 == other.weights_sha256
    assert shares_prefix(one, other) == shared


def test_equal_weights_over_other_colours_or_another_tokenizer_are_not_shared() -> None:
    pictures, texts = tiny(), tiny(BERT)
    assert shares_prefix(pictures, dataclasses.replace(pictures, preprocessing=Preprocessing(mean=(0.5,) * 3))) == -1
    assert shares_prefix(texts, texts) == 2
    assert shares_prefix(texts, dataclasses.replace(texts, tokenizer=b"{}")) == -1


def test_biases_count_as_part_of_their_block_and_a_shared_one_of_every_block() -> None:
    one = tiny(BEIT)
    assert shares_prefix(one, edited(one, "stack.biases.3.table")) == 3
    shared = tiny(dataclasses.replace(BEIT, relative_bias="shared"))
    assert shares_prefix(shared, edited(shared, "stack.biases.0.table")) == 0


def test_a_resnet_shares_with_itself_only() -> None:
    network = tiny(RESNET)
    assert shares_prefix(network, network) == 0
    assert shares_prefix(network, edited(network, "head.bias")) == -1
    assert shares_prefix(network, tiny()) == -1


def test_crops_are_normalised_as_by_the_definition_and_not_changed() -> None:
    crops = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    before = crops.clone()
    images = normalise(Preprocessing(), crops)
    expected = (crops.double().numpy() / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    np.testing.assert_allclose(images.permute(0, 2, 3, 1).numpy(), expected, atol=2e-6)
    assert torch.equal(crops, before)
    assert torch.equal(normalise(tiny(), crops), images)


def test_only_uint8_pictures_are_normalised_and_only_for_image_networks() -> None:
    for wrong in (torch.zeros(1, 4, 4, 3), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"uint8 \[B, H, W, 3\] is meant"):
            normalise(Preprocessing(), wrong)
    with pytest.raises(UsageError, match="pictures for a text network"):
        normalise(tiny(BERT), torch.zeros(1, 4, 4, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("found", "size", "fraction", "interpolation"),
    [
        (
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3},
            224,
            0.875,
            "bicubic",
        ),
        ({"size": 224, "do_center_crop": False, "crop_size": 224, "resample": 2}, 224, 1.0, "bilinear"),
        ({"size": {"height": 336, "width": 336}}, 336, 1.0, "bicubic"),
        ({"size": 224, "crop_pct": 0.95, "resample": 3}, 224, 0.95, "bicubic"),
        ({}, 224, 1.0, "bicubic"),
    ],
    ids=["dinov2", "beit", "plain", "resnet", "empty"],
)
def test_preprocessors_are_read_in_every_spelling(
    found: dict[str, object], size: int, fraction: float, interpolation: str
) -> None:
    read = read_preprocessor(found | {"image_mean": [0.4, 0.5, 0.6]}, Preprocessing())
    assert (read.image_size, read.crop_fraction, read.interpolation) == (size, fraction, interpolation)
    assert (read.mean, read.std) == ((0.4, 0.5, 0.6), IMAGENET_STD)
    assert Preprocessing.from_json(json.loads(json.dumps(read.to_json()))) == read


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"rescale_factor": 1 / 127.5}, "not by 1/255"),
        ({"do_rescale": False}, "not by 1/255"),
        ({"image_mean": 0.5}, "one number for each colour"),
        ({"image_std": [0.5, 0.0, 0.5]}, "deviation"),
        ({"image_mean": [float("nan")] * 3}, "mean"),
    ],
)
def test_a_preprocessor_that_makes_no_sense_is_refused(found: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedNetwork, match=message):
        read_preprocessor(found, Preprocessing())


def test_names_are_made_safe_for_paths() -> None:
    assert network_name("My Org/DINOv2 (Base)_v1.0") == "my-org-dinov2-base-_v1.0"
    assert network_name("../../etc") == "etc"
    with pytest.raises(UsageError, match="gives no name"):
        network_name("../..")
