"""How fast a field's storage gives single rows, and how fast whole blocks: what decides on the kind of shuffle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from emkum.shards.shard_files import ReadThreads, machine_memory_bytes

if TYPE_CHECKING:
    from emkum.shards.reader import Field

PROBE_SECONDS = 5.0
MEMORY_SHARE = 0.25  # fields that take less of the machine's memory are read from storage once: rows in any order
SLOW = 0.5  # single rows below this share of the rate of whole blocks: read blocks
BLOCKS = 16  # that single rows are drawn from: a shard's index is read once, and is not what is measured
RUN = 64  # rows in a row


@dataclass(frozen=True)
class Probe:
    """Rows a second: drawn one by one, and in order."""

    single: float
    in_order: float

    @property
    def slow_at_single_rows(self) -> bool:
        return self.single < SLOW * self.in_order


def needs_probe(fields: list[Field]) -> bool:
    """Whether the fields are too large to stay in memory after the first epoch."""
    return sum(field.num_bytes for field in fields) > MEMORY_SHARE * machine_memory_bytes()


def probe_storage(
    open_field: Callable[[], Field], threads: ReadThreads, seconds: float = PROBE_SECONDS, seed: int = 0
) -> Probe | None:
    """Reads rows of committed blocks for so many seconds, half of them singly and half of them in order.

    open_field: opens the field anew, with nothing of it read. The two halves read different blocks, and compare
    checksums alike. None where there are not two.
    """
    field, in_order = open_field(), open_field()
    in_order.reads_in_order = True
    random = np.random.default_rng(seed)
    places = [place for place in sorted(field.receipts) if len(field.block_rows(*place))]
    if len(places) < 2:
        return None
    chosen = [places[i] for i in random.permutation(len(places)).tolist()]
    few, others = chosen[: min(BLOCKS, len(chosen) // 2)], chosen[len(chosen) // 2 :]
    for block, view in few:
        field.read(field.block_rows(block, view)[:1], view)  # opens it
    single = _rate(field, threads, seconds / 2, _single_rows(field, few, random, 4 * threads.number))
    return Probe(single, _rate(in_order, None, seconds / 2, _runs(in_order, others)))


def _rate(
    field: Field, threads: ReadThreads | None, seconds: float, pieces: Iterator[tuple[np.ndarray, np.ndarray]]
) -> float:
    count, started = 0, time.perf_counter()
    for rows, views in pieces:
        field.read(rows, views, threads=threads)
        count += len(rows)
        if time.perf_counter() - started > seconds:
            break
    return count / max(time.perf_counter() - started, 1e-9)


def _single_rows(
    field: Field, places: list[tuple[int, int]], random: np.random.Generator, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of rows that were not drawn before, until all are."""
    rows = np.concatenate([field.block_rows(*place) for place in places])
    views = np.concatenate([np.full(len(field.block_rows(*place)), place[1]) for place in places])
    order = random.permutation(len(rows))
    for start in range(0, len(rows), count):
        here = order[start : start + count]
        yield rows[here], views[here]


def _runs(field: Field, places: list[tuple[int, int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for place in places:
        rows = field.block_rows(*place)
        for start in range(0, len(rows), RUN):
            run = rows[start : start + RUN]
            yield run, np.full(len(run), place[1])
