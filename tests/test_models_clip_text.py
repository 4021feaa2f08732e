"""The text half of CLIP against transformers: causal blocks, the end of the text pooled, its tokenizer."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parity import (
    assert_same,
    assert_saved_whole,
    assert_strict,
    assert_texts_pass,
    ours_on_texts,
    recorded,
    relative,
    texts,
)
from test_models_families import TEXT, VIT, _quiet_transformers, randomised, saved  # noqa: F401 - a fixture
from tiny_cache import tiny_network
from torch import Tensor, nn

from emkum.errors import UnsupportedNetwork, UsageError, WeightsUnavailable
from emkum.models.backbone import Backbone
from emkum.models.catalogue import load_network
from emkum.models.families.registry import CATALOGUE
from emkum.models.sources import read_source
from emkum.models.tokenizer import text_ids
from emkum.stage2_train.recipe import load_recipe
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.student import build_student

EOT = 59  # the highest of the vocabulary, as in CLIP's own
CONFIG = TEXT | {"max_position_embeddings": 77, "bos_token_id": 58}
BLOCK, FFN = "encoder.layers.{}", "encoder.layers.{}.mlp"


def clip_text(eos: int) -> nn.Module:
    return randomised(transformers.CLIPTextModel(transformers.CLIPTextConfig(**CONFIG, eos_token_id=eos)))


def captions(pads: int | None = None, end: int = EOT) -> tuple[Tensor, Tensor]:
    """Ids that end in `end`; the pads are `pads`, or random."""
    ids, mask = texts(58, lengths=(9, 4, 2, 16))
    ids = ids if pads is None else ids.masked_fill(~mask, pads)
    return ids.scatter(1, mask.sum(1, keepdim=True) - 1, end), mask


@pytest.mark.parametrize("pads", [None, EOT, 0], ids=["random", "eot", "zero"])
@pytest.mark.parametrize("eos", [EOT, 40, 2], ids=["by-its-id", "by-an-id-among-others", "as-the-highest-id"])
def test_clip_equals_transformers_layer_by_layer_and_pools_the_end_of_the_text(
    eos: int, pads: int | None, tmp_path: Path
) -> None:
    model = clip_text(eos)
    network = load_network(str(saved(model, tmp_path, tokenizer=True)))
    ids, mask = captions(pads, EOT if eos == 2 else eos)
    pooled: list[Tensor] = []

    def run() -> Tensor:
        out = model(ids, attention_mask=mask.long())
        pooled.append(out.pooler_output)
        final: Tensor = out.last_hidden_state
        return final

    theirs = recorded(model, BLOCK, FFN, run)
    assert_same(ours_on_texts(network, ids, mask), theirs, mask)
    assert_texts_pass(network, ids, mask, pooled[0])
    assert network.backbone.spec.pooled == ("highest" if eos == 2 else "eos")


@pytest.mark.parametrize("eos", [EOT, 2], ids=["by-its-id", "as-the-highest-id"])
def test_the_first_end_of_a_text_is_pooled_and_never_one_in_the_pads(eos: int, tmp_path: Path) -> None:
    network = load_network(str(saved(clip_text(eos), tmp_path, tokenizer=True)))
    backbone = network.backbone
    assert isinstance(backbone, Backbone)
    final = torch.arange(12.0).view(2, 6, 1)
    ids = torch.tensor([[58, 7, EOT, 8, EOT, EOT], [58, EOT, EOT, EOT, EOT, EOT]])
    assert backbone.pool(final, ids).flatten().tolist() == [2, 7]
    # Where a caption spells the end out, transformers pools there, in spite of what follows.
    inside = torch.tensor([[True] * 5 + [False], [True, False, False, False, False, False]])
    assert backbone.pool(final, ids, inside).flatten().tolist() == [2, 6]
    with pytest.raises(ValueError, match="the end of a text of clip-text is found by its ids"):
        backbone.pool(final)


def test_no_token_sees_what_comes_later_with_a_mask_or_without_or_trained(tmp_path: Path) -> None:
    network = load_network(str(saved(clip_text(EOT), tmp_path, tokenizer=True)))
    ids, mask = captions()
    changed = ids.clone()
    changed[:, 9:] = 6
    for given in (None, mask):
        one, other = network.backbone(ids, given), network.backbone(changed, given)
        assert torch.equal(one[:, :9], other[:, :9])
        assert not torch.equal(one[3, 9:], other[3, 9:])
    backbone = network.backbone
    assert isinstance(backbone, Backbone)
    tokens = backbone.embed(ids, mask)
    whole = backbone.run(tokens, mask_BT=mask).hidden[-1]
    trained = backbone.stack.take(0, backbone.depth)  # with gradients, attention is computed in another way
    assert relative(trained(tokens, mask)[-1][mask], whole[mask]) < 1e-5
    few = backbone.stack(tokens, mask, queries=2)[-1]
    assert relative(few, whole[:, :2]) < 1e-5
    nothing = torch.zeros_like(mask)
    assert backbone.run(tokens, mask_BT=nothing).hidden[-1].isfinite().all()
    assert trained(tokens, nothing)[-1].isfinite().all()


def whole_clip() -> nn.Module:
    vision = VIT | {"image_size": 20}
    config = transformers.CLIPConfig(text_config=CONFIG | {"eos_token_id": 2}, vision_config=vision, projection_dim=8)
    return randomised(transformers.CLIPModel(config))


def test_both_halves_are_read_out_of_the_whole(tmp_path: Path) -> None:
    model = whole_clip()
    folder = saved(model, tmp_path / "clip", tokenizer=True)
    network, pictured = load_network(f"{folder}#text"), load_network(str(folder))
    ids, mask = captions()
    tower: Any = model.text_model
    theirs = recorded(tower, BLOCK, FFN, lambda: tower(ids, attention_mask=mask.long()).last_hidden_state)
    assert_same(ours_on_texts(network, ids, mask), theirs, mask)
    assert (network.name, network.family, network.modality) == ("clip-text", "clip-text", "text")
    assert (pictured.name, pictured.family, pictured.modality) == ("clip", "clip-vision", "image")
    assert_saved_whole(network, tmp_path / "saved")


def test_only_the_whole_and_nothing_else_is_read(tmp_path: Path) -> None:
    folder = saved(whole_clip(), tmp_path, tokenizer=True)
    assert_strict(folder, "text_model.encoder.layers.2.self_attn.k_proj.bias", "#text")


def test_several_ends_of_a_text_are_refused(tmp_path: Path) -> None:
    folder = saved(clip_text(EOT), tmp_path, tokenizer=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 59]}))
    with pytest.raises(UnsupportedNetwork, match=r"texts that end in any of \[2, 59\]; one id is supported"):
        load_network(str(folder))


def write_vocabulary(folder: Path) -> int:
    """A vocabulary of bytes, as CLIP's begins, with one merge; returns how many ids it has."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "do", "dog</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\n")
    return len(words)


def test_captions_are_cut_so_that_the_end_of_text_stays_and_is_pooled(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    size = write_vocabulary(old)
    start, end = size - 2, size - 1
    config = CONFIG | {"vocab_size": size, "bos_token_id": start, "eos_token_id": end}
    model = randomised(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)))
    saved(model, old)
    network = load_network(str(old))
    assert network.tokenizer is not None
    assert network.max_tokens == 64
    ids, length = text_ids(network.tokenizer, ["A dog", "dog " * 200, ""], network.max_tokens)
    vocabulary = json.loads((old / "vocab.json").read_text())
    assert ids[0, :4].tolist() == [start, vocabulary["a</w>"], vocabulary["dog</w>"], end]
    assert length.tolist() == [4, 64, 2]
    assert ids[1].tolist() == [start, *[vocabulary["dog</w>"]] * 62, end]
    mask = torch.arange(ids.shape[1]) < torch.from_numpy(length)[:, None]
    rows = list(zip(ids, length, strict=True))
    with torch.no_grad():
        cls_BD = torch.cat([model(torch.from_numpy(row[:n])[None].long()).pooler_output for row, n in rows])
    assert_texts_pass(network, torch.from_numpy(ids), mask, cls_BD)
    # The same from tokenizer.json, as the hub has it.
    new = tmp_path / "new"
    shutil.copytree(old, new)
    (new / "vocab.json").unlink()
    (new / "merges.txt").unlink()
    (new / "tokenizer.json").write_bytes(network.tokenizer)
    again = load_network(str(new))
    assert again.tokenizer is not None
    assert (text_ids(again.tokenizer, ["A dog"], 77)[0][0, :4] == ids[0, :4]).all()
    with pytest.raises(UsageError, match="texts of 80 tokens; clip-text has positions for 77"):
        again.backbone.embed(torch.full((1, 80), 5))


def test_a_vocabulary_that_is_none_and_a_folder_without_one_are_told_apart(tmp_path: Path) -> None:
    folder = saved(clip_text(EOT), tmp_path)
    with pytest.raises(WeightsUnavailable, match="has no tokenizer"):
        load_network(str(folder))
    (folder / "vocab.json").write_text("{")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UnsupportedNetwork, match=r"vocab\.json and merges\.txt are no vocabulary of CLIP's"):
        load_network(str(folder))


def test_a_student_of_causal_blocks_does_not_pool_the_token_that_has_seen_no_other() -> None:
    bert = tiny_network("tinybert", "text")
    backbone = Backbone(dataclasses.replace(bert.backbone.spec, causal=True))
    causal = dataclasses.replace(bert, backbone=backbone.eval().requires_grad_(False))
    names = FieldNames("image/tinyvit@2/tokens", "tinyvit", 2, "text/tinybert/ids")
    with pytest.raises(UsageError, match='text_pooling = "cls": a token of tinybert sees only what') as caught:
        build_student(load_recipe("text-kd", ["student.text_pooling=cls"]), names, None, causal, None, 0)
    assert caught.value.way_out == "pool the mean: --set student.text_pooling=mean"
    build_student(load_recipe("text-kd", ["student.text_pooling=mean"]), names, None, causal, None, 0)
    # Shared blocks look both ways, so behind them the first token has seen the text.
    build_student(load_recipe("ssmke"), names, tiny_network("tinyvit", "image"), causal, None, 0)


def test_the_catalogue_names_the_text_halves_beside_those_for_pictures() -> None:
    for name, width in (("clip-b32", 512), ("clip-b16", 512), ("clip-l14", 768)):
        text = CATALOGUE[f"{name}-text"]
        assert (text.source, text.supervision) == (CATALOGUE[name].source, "paired_text")
        assert (text.width, text.depth, text.tokens, text.targets) == (width, 12, 77, ("cls",))
        assert read_source(f"{name}#text").entry == text
