"""Whole blocks in memory, read front to back, from which batches take their rows: for storage slow at single rows."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from emkum.shards.shard_files import RENEWED
from emkum.stage2_train.order import look_ahead

if TYPE_CHECKING:
    from emkum.shards.reader import Field

SPARE_BLOCKS = 2  # beside those that batches are drawn from: the one that comes in and the one that goes out
BLOCKS_AT_ONCE = 2  # read side by side


def blocks_held(window: int, rows_per_block: int, batch: int) -> int:
    """Blocks that must be in memory together so that each is read once.

    Between the step that a block is expected at and the one that takes it, as many batches come and go on both sides.
    """
    steps = 1 + 2 * look_ahead(rows_per_block, batch)
    return window + SPARE_BLOCKS + -(-steps * batch // rows_per_block)


class MixingBuffer:
    """The latest `capacity` blocks of one field, each read whole. Thread-safe.

    A block that is asked for again after it was dropped is read again: the capacity decides on speed alone.
    """

    def __init__(self, field: Field, rows_per_block: int, capacity: int) -> None:
        self.field, self._rows_per_block, self._capacity = field, rows_per_block, capacity
        field.reads_in_order = True
        self.blocks_read = 0
        self.renew_after_fork()
        RENEWED.add(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.Lock()
        self._blocks: OrderedDict[tuple[int, int], Future[tuple[np.ndarray, np.ndarray]]] = OrderedDict()
        self._pool = ThreadPoolExecutor(BLOCKS_AT_ONCE, thread_name_prefix="emkum-blocks")

    def expect(self, rows: np.ndarray, views: np.ndarray | int) -> None:
        """Begins to read the blocks of these rows."""
        for block, view in self._keys(rows, views):
            self._block(block, view)

    def take(self, rows: np.ndarray, views: np.ndarray | int, out: np.ndarray) -> None:
        """Fills `out` with the stored numbers of the rows; waits for their blocks."""
        views = np.broadcast_to(np.asarray(views, np.int64), rows.shape)
        blocks = rows // self._rows_per_block
        waiting = [(key, self._block(*key)) for key in self._keys(rows, views)]
        for (block, view), reading in waiting:
            present, values = reading.result()
            here = np.flatnonzero((blocks == block) & (views == view))
            place = np.minimum(np.searchsorted(present, rows[here]), max(len(present) - 1, 0))
            if not len(present) or not np.array_equal(present[place], rows[here]):
                self.field.read(rows[here], view)  # which says what is wrong with them
            out[here] = values[place]

    @property
    def capacity_bytes(self) -> int:
        """Memory it takes at most."""
        return self._capacity * self._rows_per_block * self.field.spec.array("values").row_bytes

    def close(self) -> None:
        """Frees the memory and ends the threads, without waiting for a read that hangs."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._blocks.clear()

    def _keys(self, rows: np.ndarray, views: np.ndarray | int) -> list[tuple[int, int]]:
        views = np.broadcast_to(np.asarray(views, np.int64), rows.shape)
        found = np.unique(np.stack([rows // self._rows_per_block, views]), axis=1)
        return [(block, view) for block, view in found.T.tolist()]

    def _block(self, block: int, view: int) -> Future[tuple[np.ndarray, np.ndarray]]:
        with self._lock:
            reading = self._blocks.get((block, view))
            if reading is None or (reading.done() and not reading.cancelled() and reading.exception() is not None):
                reading = self._blocks[block, view] = self._pool.submit(self._read, block, view)
                self.blocks_read += 1
            self._blocks.move_to_end((block, view))
            while len(self._blocks) > self._capacity:
                self._blocks.popitem(last=False)
            return reading

    def _read(self, block: int, view: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows that are there, ascending; their stored numbers)."""
        present = self.field.block_rows(block, view)
        return present, self.field.read(present, view)
