"""The batches of a step in parts, for gradients that are accumulated: what the loader reads one after the other."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from emkum.stage2_train.order import BatchRows, Order


class MicroBatches:
    """An order whose batch `i` is the (i mod accumulate)-th part of batch i // accumulate of `steps`.

    So `accumulate` micro-batches put together are the rows of one step, whichever batch size a recipe reaches them
    with, and none spans two epochs.
    """

    def __init__(self, steps: Order, accumulate: int) -> None:
        self.steps, self.accumulate = steps, accumulate

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate

    @property
    def look_ahead(self) -> int:
        return self.steps.look_ahead * self.accumulate

    def rows(self, step: int) -> BatchRows:
        whole, part = divmod(step, self.accumulate)
        rows = self.steps.rows(whole)
        size = len(rows) // self.accumulate

        def taken(column: np.ndarray | None) -> np.ndarray | None:
            return None if column is None else column[part * size : (part + 1) * size]

        return dataclasses.replace(
            rows,
            image_rows_B=taken(rows.image_rows_B),
            views_B=taken(rows.views_B),
            text_rows_B=taken(rows.text_rows_B),
        )
