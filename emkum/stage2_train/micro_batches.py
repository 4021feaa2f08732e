"""The batches of a step in parts, for accumulated gradients and for several ranks: what one loader reads in turn."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from emkum.stage2_train.order import rank_part

if TYPE_CHECKING:
    from emkum.stage2_train.order import BatchRows, TrainOrder


class MicroBatches:
    """An order whose batch `i` is the (i mod accumulate)-th part of batch i // accumulate of `steps`.

    So `accumulate` micro-batches put together are the rows of one step, whichever batch size a recipe reaches them
    with, and none spans two epochs. Of each micro-batch this is the part of one rank: those of all ranks, put together
    in their order, are the micro-batch. Raises UsageError where ranks would get unequal parts.
    """

    def __init__(self, steps: TrainOrder, accumulate: int, rank: int = 0, num_ranks: int = 1) -> None:
        self.steps, self.accumulate = steps, accumulate
        self.part = rank_part(steps.batch // accumulate, rank, num_ranks)

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate

    @property
    def look_ahead(self) -> int:
        return self.steps.look_ahead * self.accumulate

    def rows(self, step: int) -> BatchRows:
        whole, part = divmod(step, self.accumulate)
        rows = self.steps.rows(whole)
        start = part * (len(rows) // self.accumulate)
        here = slice(start + self.part.start, start + self.part.stop)

        def taken(column: np.ndarray | None) -> np.ndarray | None:
            return None if column is None else column[here]

        return dataclasses.replace(
            rows,
            image_rows_B=taken(rows.image_rows_B),
            views_B=taken(rows.views_B),
            text_rows_B=taken(rows.text_rows_B),
        )
