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
from emkum.stage2_train.recipe import FieldNames, Recipe
from emkum.stage2_train.samples import SampleTable, refuse_missing, sample_table
from emkum.stage2_train.student import Student

if TYPE_CHECKING:
    from emkum.shards.reader import Cache

RECALLS = tuple((way, f"R@{k}") for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))


@dataclass(frozen=True)
class Score:
    """A validation: the one number that decides what is best, and all of them, for the log."""

    value: float
    numbers: dict[str, float]


@dataclass(frozen=True)
class Validator:
    """How a recipe is scored during training. `on`: the split and its size, for the summary."""

    name: str
    higher_is_better: bool
    columns: tuple[str, ...]
    on: str
    run: Callable[[], Score]

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
) -> Validator | None:
    """How to score `student` on the recipe's validation split; None where the cache has nothing to score on.

    Raises IncompleteCache where a field holds the split in part, unless `allow_partial`.
    """
    split, batch = recipe.evaluation.split, recipe.evaluation.batch
    if recipe.kind == "pairs":
        names = dataclasses.replace(names, targets=None)
    fields = [cache.field(name) for name in names.needed()]
    if split not in cache.splits or split == recipe.data.split or not all(len(f.rows(split)) for f in fields):
        return None
    source = CachedSource(cache, names, None, prefix)

    students = {STUDENT: student}

    @contextlib.contextmanager
    def evaluating() -> Iterator[None]:
        student.eval()
        try:
            with torch.no_grad(), uncompiled(student):
                yield
        finally:
            student.train()

    if recipe.kind == "pairs":
        if not allow_partial:
            for field in fields:
                refuse_missing(cache, field, split, 1)
        assert names.inputs is not None
        assert names.ids is not None
        ids = cache.field(names.ids)
        rows = retrieval_rows(cache, cache.field(names.inputs), ids, split)
        if not (rows.image_of_text_M >= 0).any():
            return None

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
            found = image_text_retrieval(images[STUDENT], texts[STUDENT], rows.image_of_text_M)
            numbers = {f"val_{way}_{at}": found[way][at] for way, at in RECALLS}
            return Score(found["mean"], {**numbers, "val_mean_recall": found["mean"]})

        columns = (*(f"val_{way}_{at}" for way, at in RECALLS), "val_mean_recall")
        on = f"{split}: {len(rows.image_rows_N):,} pictures, {len(rows.text_rows_M):,} captions"
        return Validator("mean recall", True, columns, on, retrieval)

    table = sample_table(cache, recipe, names, split, allow_partial=allow_partial, first_view=True)

    def loss() -> Score:
        with evaluating():
            order = _pass(table, batch)
            value = token_distances(students, recipe, order, source, compute, device, threads=threads)[STUDENT]
        return Score(value, {"val_loss": value})

    on = f"{split}: {table.num_samples:,} {'pictures' if recipe.kind == 'images' else 'texts'}"
    return Validator("validation loss", False, ("val_loss",), on, loss)


def _pass(table: SampleTable, batch: int) -> PassOrder:
    return PassOrder(table.image_rows_N, table.text_rows_M if table.image_rows_N is None else None, batch)
