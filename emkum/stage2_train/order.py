"""In which order rows make batches: a pure function of seed and step.

B batch, N samples, M captions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from emkum.errors import UsageError
from emkum.stage2_train.samples import SampleTable


@dataclass(frozen=True)
class BatchRows:
    """The rows of one batch, int64 [B] each; None for a modality it lacks."""

    image_rows_B: np.ndarray | None
    views_B: np.ndarray | None
    text_rows_B: np.ndarray | None

    def __len__(self) -> int:
        rows = self.text_rows_B if self.image_rows_B is None else self.image_rows_B
        assert rows is not None
        return len(rows)


class Order(Protocol):
    """Which rows batch `step` holds, for every step of a pass. look_ahead: steps before it at which to expect them."""

    @property
    def look_ahead(self) -> int: ...
    def __len__(self) -> int: ...
    def rows(self, step: int) -> BatchRows: ...


@dataclass(frozen=True)
class Shuffle:
    """How an epoch is shuffled.

    "rows": every row at random. "blocks", for storage that is slow at single rows: blocks of `rows_per_block` rows
    in random order, their rows mixed over `window` blocks at a time, one view of each block an epoch.
    """

    mode: Literal["rows", "blocks"] = "rows"
    rows_per_block: int = 0
    window: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"mode": "rows"} if self.mode == "rows" else dataclasses.asdict(self)


class TrainOrder:
    """Shuffled batches over all epochs: batch `step` is a pure function of them and of the step.

    Every epoch is shuffled anew from (seed, epoch). Its last partial batch is left out: a contrastive batch of
    another size has another loss. Captions "one": each picture once an epoch, with one of its captions drawn; "all":
    each caption once.

    Ranks share each batch: rank r of n has its r-th part of batch / n rows, so that the parts put together are the
    batch of one rank, and all ranks have equally many batches of equally many rows: a collective call in every step
    never waits for a rank that has run out. `left_over`: the samples of each shuffle that are left out.
    """

    def __init__(
        self,
        table: SampleTable,
        batch: int,
        seed: int,
        captions: Literal["one", "all"] = "one",
        num_steps: int = 0,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        shuffle: Shuffle = Shuffle(),
    ) -> None:
        """batch: of all ranks together. num_steps: the length of the order; 0 stands for one epoch.

        Raises UsageError if no batch can be filled, or if it cannot be shared out evenly among the ranks.
        """
        self.table, self.batch, self.seed, self.captions = table, batch, seed, captions
        self.shuffle = shuffle
        self.part = rank_part(batch, rank, num_ranks)
        units = table.num_samples
        if captions == "all" and table.kind == "pairs":
            assert table.text_rows_M is not None
            units = len(table.text_rows_M)
        self.steps_per_epoch = units // batch
        if not self.steps_per_epoch:
            raise UsageError(
                f"a batch of {batch} is more than the {units} samples of split {table.split!r}",
                f"use a smaller one: --set training.batch={max(1, units // 2)}",
            )
        self.units = units
        self.left_over = units - self.steps_per_epoch * batch
        self.num_steps = num_steps or self.steps_per_epoch
        self._epochs: dict[int, tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]] = {}

    def __len__(self) -> int:
        return self.num_steps

    @property
    def look_ahead(self) -> int:
        """Steps before a batch at which its blocks should begin to be read."""
        return look_ahead(self.shuffle.rows_per_block, self.batch) if self.shuffle.mode == "blocks" else 0

    def rows(self, step: int) -> BatchRows:
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch not in self._epochs:  # two are kept: who looks ahead is in the next one already
            self._epochs = {old: rows for old, rows in self._epochs.items() if abs(old - epoch) == 1}
            self._epochs[epoch] = self._shuffled(epoch)
        start = place * self.batch
        here = slice(start + self.part.start, start + self.part.stop)
        images, views, texts = (rows[here] if rows is not None else None for rows in self._epochs[epoch])
        return BatchRows(images, views, texts)

    def _shuffled(self, epoch: int) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """Image rows, views and text rows of an epoch."""
        table = self.table
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
        if self.shuffle.mode == "rows":
            order = random.permutation(self.units)
            views = None if table.kind == "texts" else random.integers(table.num_views, size=self.units)
        else:
            order, views = self._mixed_blocks(random)
        if table.kind == "texts":
            assert table.text_rows_M is not None
            return None, None, table.text_rows_M[order]
        assert table.image_rows_N is not None
        if table.kind == "images":
            return table.image_rows_N[order], views, None
        assert table.text_rows_M is not None
        assert table.first_caption_N is not None
        if self.captions == "all":
            return table.image_rows_N[self._picture_of(order)], views, table.text_rows_M[order]
        counts = np.diff(table.first_caption_N)[order]
        caption = table.first_caption_N[:-1][order] + random.integers(counts)
        return table.image_rows_N[order], views, table.text_rows_M[caption]

    def _picture_of(self, units: np.ndarray) -> np.ndarray:
        """captions "all": which picture of the table each caption belongs to."""
        assert self.table.first_caption_N is not None
        picture: np.ndarray = np.searchsorted(self.table.first_caption_N, units, side="right") - 1
        return picture

    def _mixed_blocks(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(units in order, view of each): blocks one after another, every unit delayed by up to a window of units.

        So a block is needed for one window, once an epoch. The first and last batches of an epoch, while the window
        fills and empties, are drawn from fewer blocks: the first from some two.
        """
        units = np.arange(self.units)
        rows = self.table.image_rows_N if self.table.image_rows_N is not None else self.table.text_rows_M
        assert rows is not None
        if self.captions == "all" and self.table.kind == "pairs":
            rows = rows[self._picture_of(units)]
        blocks, block_of = np.unique(rows // self.shuffle.rows_per_block, return_inverse=True)
        stream = np.argsort(random.permutation(len(blocks))[block_of], kind="stable")
        if len(blocks) <= self.shuffle.window + 2:  # all of them are held at once
            order = random.permutation(self.units)
        else:
            window = self.shuffle.window * self.units / len(blocks)
            order = stream[np.argsort(units + window * random.random(self.units), kind="stable")]
        views = random.integers(self.table.num_views, size=len(blocks))
        return order, views[block_of[order]]


def look_ahead(rows_per_block: int, batch: int) -> int:
    """Steps that one block lasts."""
    return -(-rows_per_block // batch)


def rank_part(batch: int, rank: int, num_ranks: int) -> range:
    """Which rows of each batch a rank has. Raises UsageError where ranks would get unequal parts."""
    if not 0 <= rank < num_ranks:
        raise UsageError(f"rank {rank} of {num_ranks} ranks", "ranks are numbered from 0, and there is at least one")
    if batch < num_ranks:
        raise UsageError(
            f"a batch of {batch} is less than one sample for each of {num_ranks} ranks",
            f"use a larger one: --set training.batch={num_ranks}",
        )
    if batch % num_ranks:
        raise UsageError(
            f"a batch of {batch} cannot be shared out evenly among {num_ranks} ranks",
            f"use a multiple of {num_ranks}: --set training.batch={-(-batch // num_ranks) * num_ranks}",
        )
    share = batch // num_ranks
    return range(rank * share, (rank + 1) * share)


class PassOrder:
    """Every row once, in ascending order, the last partial batch included: for evaluation. View 0."""

    look_ahead = 0

    def __init__(self, image_rows: np.ndarray | None, text_rows: np.ndarray | None, batch: int) -> None:
        self.image_rows, self.text_rows, self.batch = image_rows, text_rows, batch
        rows = text_rows if image_rows is None else image_rows
        assert rows is not None
        self.num_rows = len(rows)

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch)

    def rows(self, step: int) -> BatchRows:
        here = slice(step * self.batch, (step + 1) * self.batch)
        images = self.image_rows[here] if self.image_rows is not None else None
        views = np.zeros(len(images), np.int64) if images is not None else None
        return BatchRows(images, views, self.text_rows[here] if self.text_rows is not None else None)
