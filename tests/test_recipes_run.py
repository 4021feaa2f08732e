"""Recipes of pairs from a cache to a finished run: each objective with what it takes from fields and statistics."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from tiny_cache import make_cache
from tokenizers import Tokenizer, models

from emkum.errors import MissingStatistic, UsageError
from emkum.models.tokenizer import special_ids
from emkum.shards.reader import Cache
from emkum.shards.statistics.compute import compute
from emkum.shards.statistics.request import StatisticRequest
from emkum.stage2_train.terms import build
from emkum.stage2_train.train import TrainConfig, train

WORDS = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, **{f"w{number}": number for number in range(3, 15)}}
CLS = "teacher/tinyvit/image/cls"
RUNS: dict[str, list[str]] = {
    "codes-kmeans": ["objectives.codes.codes=4"],
    "reduced": ["objectives.reduced.width=4"],
    "ssmke": ["objectives.ctl.duplicates=0.99"],
    "whole-cache-bank": [],
    "codes-vq": ["objectives.codes-vq.groups=4", "objectives.codes-vq.codes=6"],
    "dino": ["objectives.dino.prototypes=9"],
    "queue": ["objectives.itc-queue.rows=24"],
    "momentum-queue": ["objectives.itc-queue.rows=24"],
    "itm-hard": ["objectives.itm.fusion=product"],
    "filip": [],
    "heads": [],
    "tte-before": [],
    "tte-noscale": [],
    "uni2multi": [],
    "positions-shared": [],
    "no-itc": [],
}


def tokenizer_of(words: dict[str, int]) -> bytes:
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    tokenizer.add_special_tokens([word for word in words if word.startswith("[")])
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the statistics that the recipes above read."""
    place = Path(make_cache(tmp_path_factory.mktemp("recipes") / "cache", fields=("tokens", "ids", "cls")).path)
    for request in (
        StatisticRequest(CLS, "codebook", codes=4),
        StatisticRequest(CLS, "pca", components=16),
        StatisticRequest(CLS, "duplicates", threshold=0.99),
    ):
        compute(Cache.open(place), request)
    return place


@pytest.mark.parametrize("recipe", RUNS)
def test_a_recipe_trains_from_the_cache_with_finite_losses(recipe: str, path: Path, tmp_path: Path) -> None:
    overrides = ("training.batch=8", "student.image_blocks=1", "student.text_blocks=1", *RUNS[recipe])
    config = TrainConfig(path, recipe, overrides, tmp_path / "run", max_steps=3, precision="float32", log_every=1)
    lines: list[str] = []
    train(config, say=lines.append)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    assert [int(row["step"]) for row in rows] == [1, 2, 3]
    assert all(abs(float(value)) < 1e4 for row in rows for name, value in row.items() if value and name != "seconds")


def test_a_statistic_that_is_lacking_is_named_with_the_command_that_makes_it(path: Path, tmp_path: Path) -> None:
    config = TrainConfig(path, "codes-kmeans", ("training.batch=8", "student.image_blocks=1"), tmp_path / "run")
    with pytest.raises(MissingStatistic, match="keeps no teacher/tinyvit/image/cls/codebook-1024") as caught:
        train(config, say=lambda line: None)
    assert caught.value.way_out == f"make it: emkum cache stats {path} --field {CLS} --what codebook"
    assert not (tmp_path / "run").exists()


def test_masking_needs_a_tokenizer_that_can_say_masked(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BERT's can; one without such a token is refused, and so is one of sentencepiece, which says nothing of it."""
    with_mask, without = ({**WORDS, "[MASK]": 15}, WORDS)
    assert special_ids(tokenizer_of(with_mask)) == ({0, 1, 2, 15}, 15)
    assert special_ids(tokenizer_of(without)) == ({0, 1, 2}, None)
    overrides = ("training.batch=8", "student.image_blocks=1", "objectives.mvlm.word_share=0.5")
    config = TrainConfig(path, "mvlm", overrides, tmp_path / "run", max_steps=2, precision="float32", log_every=1)
    monkeypatch.setattr(build, "special_ids", lambda _: special_ids(tokenizer_of(without)))
    with pytest.raises(UsageError, match=r"the tokenizer of tinybert has none of \[MASK\], <mask>"):
        train(config, say=lambda line: None)
    monkeypatch.setattr(build, "special_ids", lambda _: special_ids(tokenizer_of(with_mask)))
    train(config, say=lambda line: None)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert [float(row["mvlm_words"]) > 0 for row in csv.DictReader(file) if row["loss"]] == [True, True]
