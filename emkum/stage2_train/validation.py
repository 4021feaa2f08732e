"""How a student is scored during training: retrieval on pairs, the loss itself on one modality.

B batch, N pictures, M captions, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from emkum.stage2_train.evaluate.retrieval import image_text_retrieval
from emkum.stage2_train.loader import (
    BatchLoader,
    BatchSource,
    CachedSource,
    Order,
    PassOrder,
    Prefix,
    SampleTable,
    refuse_missing,
    sample_table,
)
from emkum.stage2_train.losses import autocast, token_losses
from emkum.stage2_train.recipe import FieldNames, Recipe
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
        """Whether a score is the best so far."""
        return than is None or (value > than if self.higher_is_better else value < than)


@dataclass(frozen=True)
class RetrievalRows:
    """Every picture and caption of a split: those without a partner are candidates too. image_of_text_M: -1, none."""

    image_rows_N: np.ndarray
    text_rows_M: np.ndarray
    image_of_text_M: np.ndarray


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

    def loader(order: Order) -> BatchLoader:
        return BatchLoader(order, source, threads=threads, pin=device.type == "cuda")

    @contextlib.contextmanager
    def evaluating() -> Iterator[None]:
        student.eval()
        try:
            with torch.no_grad(), autocast(compute, device):
                yield
        finally:
            student.train()

    if recipe.kind == "pairs":
        if not allow_partial:
            for field in fields:
                refuse_missing(cache, field, split, 1)
        rows = retrieval_rows(cache, names, split)
        if not (rows.image_of_text_M >= 0).any():
            return None

        def retrieval() -> Score:
            with evaluating():
                images_ND = encode_images(student, loader(PassOrder(rows.image_rows_N, None, batch)), source, device)
                texts_MD = encode_texts(student, loader(PassOrder(None, rows.text_rows_M, batch)), source, device)
            found = image_text_retrieval(images_ND, texts_MD, rows.image_of_text_M)
            numbers = {f"val_{way}_{at}": found[way][at] for way, at in RECALLS}
            return Score(found["mean"], {**numbers, "val_mean_recall": found["mean"]})

        columns = (*(f"val_{way}_{at}" for way, at in RECALLS), "val_mean_recall")
        on = f"{split}: {len(rows.image_rows_N):,} pictures, {len(rows.text_rows_M):,} captions"
        return Validator("mean recall", True, columns, on, retrieval)

    table = sample_table(cache, recipe, names, split, allow_partial=allow_partial, first_view=True)

    def loss() -> Score:
        with evaluating():
            value = table_loss(student, recipe, loader(_pass(table, batch)), source, device)
        return Score(value, {"val_loss": value})

    on = f"{split}: {table.num_samples:,} {'pictures' if recipe.kind == 'images' else 'texts'}"
    return Validator("validation loss", False, ("val_loss",), on, loss)


def _pass(table: SampleTable, batch: int) -> PassOrder:
    return PassOrder(table.image_rows_N, table.text_rows_M if table.image_rows_N is None else None, batch)


def retrieval_rows(cache: Cache, names: FieldNames, split: str) -> RetrievalRows:
    """The committed pictures and captions of a split, and which caption is whose."""
    assert names.inputs is not None
    assert names.ids is not None
    image_rows = cache.field(names.inputs).rows(split)
    captions = cache.captions(split)
    text_rows = captions.column("text_row").to_numpy()
    owners = captions.column("image_row").fill_null(-1).to_numpy()
    kept = np.isin(text_rows, cache.field(names.ids).rows(split))
    text_rows, owners = text_rows[kept], owners[kept]
    places = np.searchsorted(image_rows, owners)
    there = np.isin(owners, image_rows)
    return RetrievalRows(image_rows, text_rows, np.where(there, places, -1))


def encode_images(student: Student, loader: BatchLoader, source: BatchSource, device: torch.device) -> Tensor:
    """Features of every picture of the loader, float32 [N, D] on the host."""
    features = []
    for host in loader:
        tokens_BTD = source.prepare(host, device).tokens_BTD
        assert tokens_BTD is not None
        features.append(student.encode_images(tokens_BTD).features_BD.float().cpu())
    return torch.cat(features)


def encode_texts(student: Student, loader: BatchLoader, source: BatchSource, device: torch.device) -> Tensor:
    """Features of every text of the loader, float32 [M, D] on the host."""
    features = []
    for host in loader:
        batch = source.prepare(host, device)
        assert batch.ids_BL is not None
        assert batch.mask_BL is not None
        features.append(student.encode_texts(batch.ids_BL, batch.mask_BL).features_BD.float().cpu())
    return torch.cat(features)


def table_loss(
    student: Student, recipe: Recipe, loader: BatchLoader, source: BatchSource, device: torch.device
) -> float:
    """`layers_mse` over every real token of the loader, whatever the batches are."""
    total, tokens = torch.zeros((), device=device), torch.zeros((), device=device)
    for host in loader:
        batch = source.prepare(host, device)
        assert batch.targets is not None
        count = batch.mask_BL.sum() if batch.mask_BL is not None else batch.targets.shape[0] * batch.targets.shape[1]
        total += token_losses(student, recipe, batch).parts["layers_mse"] * count
        tokens += count
    return float(total / tokens)
