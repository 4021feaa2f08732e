"""FLAVA's towers for pictures and for texts against transformers, alone and out of the whole."""

from __future__ import annotations

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
    assert_texts_pass,
    ours_on_pictures,
    ours_on_texts,
    pictures,
    recorded,
    texts,
)
from test_models_families import TEXT, VIT, _quiet_transformers, randomised, saved  # noqa: F401 - a fixture
from torch import Tensor, nn

from emkum.errors import UnsupportedNetwork
from emkum.models.catalogue import load_network
from emkum.models.families.registry import CATALOGUE

IMAGE = VIT | {"image_size": 20}
BLOCK, FFN = "encoder.layer.{}", "encoder.layer.{}.output.dense"


def image_tower() -> nn.Module:
    return randomised(transformers.FlavaImageModel(transformers.FlavaImageConfig(**IMAGE)))


def text_tower() -> nn.Module:
    return randomised(transformers.FlavaTextModel(transformers.FlavaTextConfig(**TEXT)))


def whole(kind: Any = transformers.FlavaForPreTraining) -> nn.Module:
    fused = {name: VIT[name] for name in VIT if name != "patch_size"}
    config = transformers.FlavaConfig(
        image_config=IMAGE,
        text_config=TEXT,
        multimodal_config=fused,
        image_codebook_config={"hidden_size": 4, "vocab_size": 7, "num_groups": 1},
        hidden_size=24,
        projection_dim=8,
    )
    return randomised(kind(config))


def their_words(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    final: Tensor = model(ids, attention_mask=mask.long()).last_hidden_state
    return final


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_image_tower_equals_transformers_layer_by_layer_on_any_grid(grid: tuple[int, int], tmp_path: Path) -> None:
    model = image_tower()
    network = load_network(str(saved(model, tmp_path)))
    images = pictures(grid)
    theirs = recorded(model, BLOCK, FFN, lambda: model(images, interpolate_pos_encoding=True).last_hidden_state)
    assert_same(ours_on_pictures(network, images), theirs)
    assert network.backbone.spec.eps == 1e-12  # no copy of BERT's here: FLAVA was trained with it


def test_the_text_tower_equals_transformers_layer_by_layer_under_a_pad_mask(tmp_path: Path) -> None:
    model = text_tower()
    network = load_network(str(saved(model, tmp_path, tokenizer=True)))
    ids, mask = texts(60, lengths=(9, 4, 1, 16))
    theirs = recorded(model, BLOCK, FFN, lambda: their_words(model, ids, mask))
    assert_same(ours_on_texts(network, ids, mask), theirs, mask)
    assert theirs.final is not None
    assert_texts_pass(network, ids, mask, theirs.final[:, 0])


@pytest.mark.parametrize("kind", [transformers.FlavaForPreTraining, transformers.FlavaModel], ids=lambda k: k.__name__)
def test_both_towers_are_read_out_of_the_whole(kind: Any, tmp_path: Path) -> None:
    model = whole(kind)
    towers = model.flava if kind is transformers.FlavaForPreTraining else model
    folder = saved(model, tmp_path, tokenizer=True)
    images, (ids, mask) = pictures((5, 5)), texts(60)
    pictured, worded = load_network(str(folder)), load_network(f"{folder}#text")
    tower = towers.image_model
    assert_same(
        ours_on_pictures(pictured, images), recorded(tower, BLOCK, FFN, lambda: tower(images).last_hidden_state)
    )
    tower = towers.text_model
    theirs = recorded(tower, BLOCK, FFN, lambda: their_words(tower, ids, mask))
    assert_same(ours_on_texts(worded, ids, mask), theirs, mask)
    assert (pictured.modality, worded.modality) == ("image", "text")
    assert pictured.name != worded.name
    assert_saved_whole(pictured, tmp_path / "image")
    assert_saved_whole(worded, tmp_path / "text")
    assert_pictures_pass(pictured)
    assert pictured.preprocessing is not None
    assert round(pictured.preprocessing.mean[0], 3) == 0.481


def test_only_the_whole_and_nothing_else_is_read(tmp_path: Path) -> None:
    folder = saved(whole(), tmp_path, tokenizer=True)
    assert_strict(folder, "flava.image_model.encoder.layer.0.output.dense.bias")
    assert_strict(folder, "flava.text_model.embeddings.LayerNorm.weight", "#text")


def test_a_classifier_on_either_tower_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(whole(), tmp_path, tokenizer=True)
    state = load_file(folder / "model.safetensors")
    save_file(state | {"classifier.weight": torch.zeros(2, 24)}, folder / "model.safetensors")
    for tower, instead in (("", "flava"), ("#text", "flava-text")):
        with pytest.raises(UnsupportedNetwork, match=r"fine-tuned with labels: it has classifier\.weight") as caught:
            load_network(str(folder) + tower)
        assert caught.value.way_out == f"use {instead}"


def test_the_catalogue_names_both_towers() -> None:
    image, text = CATALOGUE["flava"], CATALOGUE["flava-text"]
    assert (image.modality, text.modality, image.source) == ("image", "text", text.source)
    assert {image.supervision, text.supervision} == {"paired_text"}
    assert (image.tokens, text.tokens, text.patch) == (197, 512, 0)
