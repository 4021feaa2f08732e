"""How a student is scored during training: retrieval on pairs, the loss itself on one modality.

The rows, the encoding and the numbers are those of `emkum evaluate`: the score is what it prints for this split.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from emkum.errors import UsageError
from emkum.stage2_train.compiled import uncompiled
from emkum.stage2_train.evaluate.distillation import token_distances
from emkum.stage2_train.evaluate.encode import (
    encode_ids,
    encode_rows,
    features_of,
    out_of_texts,
    out_of_tokens,
    retrieval_rows,
)
from emkum.stage2_train.evaluate.results import STUDENT
from emkum.stage2_train.evaluate.retrieval import image_text_retrieval
from emkum.stage2_train.loader import CachedSource, Prefix
from emkum.stage2_train.order import PassOrder
from emkum.stage2_train.recipe import Recipe
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.replay import Replay
from emkum.stage2_train.samples import SampleTable, refuse_missing, sample_table
from emkum.stage2_train.student import Student

if TYPE_CHECKING:
    from emkum.shards.reader import Cache

AVERAGE = "ema"  # the student whose weights are an average, and the prefix of its columns
RECALLS = tuple((way, f"R@{k}") for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))


@dataclass(frozen=True)
class Score:
    """A validation: the one number that decides what is best, and all of them, for the log."""

    value: float
    numbers: dict[str, float]


@dataclass(frozen=True)
class Validator:
    """How a recipe is scored during training. `on`: the split and its size, for the summary.

    name: of the score that decides, for people; decides: its column.
    """

    name: str
    higher_is_better: bool
    columns: tuple[str, ...]
    on: str
    run: Callable[[], Score]
    decides: str = ""

    def better(self, value: float, than: float | None) -> bool:
        """Whether a score is the best so far. NaN never is, not even as the first."""
        if math.isnan(value):
            return False
        return than is None or (value > than if self.higher_is_better else value < than)


def make_validator(
    student: Student,
    recipe: Recipe,
    cache: Cache,
    names: FieldNames,
    prefix: Prefix | None,
    compute: str,
    device: torch.device,
    *,
    allow_partial: bool,
    threads: int,
    average: Student | None = None,
    replay: Replay | None = None,
) -> Validator | None:
    """How to score `student` on the recipe's validation split; None where the cache has nothing to score on.

    average: the student whose weights are an average, scored beside it in the same pass. replay: of a student of pixels
    whose crops the cache does not keep.
    Raises IncompleteCache where a field holds the split in part, unless `allow_partial`; UsageError where
    `evaluation.best` is no score of such a run, or where it or `evaluation.patience` has nothing to go by.
    """
    split, batch = recipe.evaluation.split, recipe.evaluation.batch
    if recipe.kind == "pairs":
        names = dataclasses.replace(names, targets={})
    fields = [cache.field(name) for name in names.needed()]
    if split not in cache.splits or split == recipe.data.split or not all(len(f.rows(split)) for f in fields):
        _refuse_unscored(recipe)
        return None
    source = CachedSource(cache, names, None, prefix, threads=threads if replay else 0, replay=replay)

    students = {STUDENT: student} if average is None else {STUDENT: student, AVERAGE: average}

    @contextlib.contextmanager
    def evaluating() -> Iterator[None]:
        for one in students.values():
            one.eval()
        try:
            with torch.no_grad(), uncompiled(student):
                yield
        finally:
            for one in students.values():
                one.train()

    if recipe.kind == "pairs":
        if not allow_partial:
            for field in fields:
                refuse_missing(cache, field, split, 1)
        assert names.inputs is not None
        assert names.ids is not None
        ids = cache.field(names.ids)
        rows = retrieval_rows(cache, cache.field(names.inputs), ids, split)
        if not (rows.image_of_text_M >= 0).any():
            _refuse_unscored(recipe)
            return None
        columns = _columns(students, (*(f"val_{way}_{at}" for way, at in RECALLS), "val_mean_recall"))
        best = _decides(recipe, columns, "val_mean_recall")

        def retrieval() -> Score:
            with evaluating():
                images = encode_rows(
                    rows.image_rows_N,
                    source,
                    lambda tokens_BTD: features_of(out_of_tokens(students, tokens_BTD, compute, device)),
                    device,
                    batch,
                    threads=threads,
                )
                texts = encode_ids(
                    ids.read(rows.text_rows_M),
                    ids.lengths(rows.text_rows_M),
                    lambda ids_BL, mask_BL: features_of(out_of_texts(students, ids_BL, mask_BL, compute, device)),
                    device,
                    batch,
                )
            numbers: dict[str, float] = {}
            for one in students:
                found = image_text_retrieval(images[one], texts[one], rows.image_of_text_M)
                scores = {f"val_{way}_{at}": found[way][at] for way, at in RECALLS}
                numbers |= _named(one, {**scores, "val_mean_recall": found["mean"]})
            return Score(numbers[best], numbers)

        on = f"{split}: {len(rows.image_rows_N):,} pictures, {len(rows.text_rows_M):,} captions"
        return Validator(_in_words(best), True, columns, on, retrieval, best)

    table = sample_table(cache, recipe, names, split, allow_partial=allow_partial, first_view=True)
    columns = _columns(students, ("val_loss",))
    best = _decides(recipe, columns, "val_loss")

    def loss() -> Score:
        with evaluating():
            order = _pass(table, batch)
            values = token_distances(students, recipe, order, source, compute, device, threads=threads)
        numbers: dict[str, float] = {}
        for one, value in values.items():
            numbers |= _named(one, {"val_loss": value})
        return Score(numbers[best], numbers)

    on = f"{split}: {table.num_samples:,} {'pictures' if recipe.kind == 'images' else 'texts'}"
    return Validator(_in_words(best), False, columns, on, loss, best)


def _named(student: str, numbers: dict[str, float]) -> dict[str, float]:
    return numbers if student == STUDENT else {f"{student}_{name}": value for name, value in numbers.items()}


def _columns(students: dict[str, Student], columns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for student in students for name in _named(student, dict.fromkeys(columns, 0.0)))


def _decides(recipe: Recipe, columns: tuple[str, ...], usual: str) -> str:
    """The column of the score that decides. Raises UsageError for one that the run does not have."""
    wanted = recipe.evaluation.best
    if wanted == "auto":
        return usual
    if wanted not in columns:
        more = "" if recipe.training.ema else "; of averaged weights with training.ema, as ema_" + usual
        raise UsageError(
            f"recipe {recipe.name}: evaluation.best = {wanted!r} is no score of this run",
            f"choose one of {', '.join(columns)}{more}",
        )
    return wanted


def _in_words(column: str) -> str:
    """A score for people."""
    words = {"val_mean_recall": "mean recall", "val_loss": "validation loss"}
    plain = column.removeprefix(f"{AVERAGE}_")
    return words.get(plain, plain) + (" of averaged weights" if plain != column else "")


def _refuse_unscored(recipe: Recipe) -> None:
    """Raise UsageError where a recipe without validation asks for what goes by its score."""
    wanted = recipe.evaluation
    for key, value, off in (("best", wanted.best, "auto"), ("patience", wanted.patience, 0)):
        if value != off:
            raise UsageError(
                f"recipe {recipe.name}: evaluation.{key} = {value!r} has no score to go by: there is nothing to "
                f"validate on in a split {wanted.split!r}",
                f"name a split to validate on with --set evaluation.split=..., or leave evaluation.{key} out",
            )


def _pass(table: SampleTable, batch: int) -> PassOrder:
    return PassOrder(table.image_rows_N, table.text_rows_M if table.image_rows_N is None else None, batch)
