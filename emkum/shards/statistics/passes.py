"""One pass over all vectors: a function of every piece, its results merged in an order that no scheduler changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from emkum.shards.shard_files import cores
from emkum.shards.statistics.vectors import Vectors

Partial = TypeVar("Partial")
Progress = Callable[[str, int, int], None]  # what is done, vectors done, of how many

NODE_PIECES = 8  # whose results are merged before they come back
NODES_A_WORKER = 2  # on the way at a time: what bounds memory, and how often progress is told


class Engine(Protocol):
    """Who computes dask's graphs."""

    workers: int  # tasks at a time

    def share(self, value: np.ndarray) -> Any:
        """An argument that every task gets, sent to each machine once."""

    def run(self, tasks: Sequence[Any]) -> Sequence[Any]:
        """Results of delayed values, in their order."""

    def __str__(self) -> str: ...


class Threads:
    """Threads of this process, one a processor unless `workers` says otherwise."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or cores()

    def share(self, value: np.ndarray) -> Any:
        from dask.delayed import delayed

        return delayed(value, pure=False, traverse=False)

    def run(self, tasks: Sequence[Any]) -> Sequence[Any]:
        from dask import base

        compute: Any = base.compute
        found: Sequence[Any] = compute(*tasks, scheduler="threads", num_workers=self.workers)
        return found

    def __str__(self) -> str:
        return f"{self.workers} thread" + ("s" if self.workers > 1 else "")


def fold(
    vectors: Vectors,
    work: Callable[..., Partial],
    merge: Callable[[Partial, Partial], Partial],
    engine: Engine,
    shared: Sequence[Any] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
    first_piece: int = 0,
) -> Partial:
    """merge(... merge(work(x_0, 0, *shared), work(x_1, n_0, *shared)) ...) over all pieces from `first_piece` on.

    work: of a piece's vectors, float32 [n, D], and the number of the first of them. The order of merging depends on
    the pieces alone: 8 neighbours each, then these from left to right. So any number of workers gives the same sums.
    """
    from dask.delayed import delayed

    starts = np.cumsum([0, *(piece.vectors for piece in vectors.pieces)]).tolist()
    run, combine = delayed(work, pure=False), delayed(merge, pure=False)
    width = NODE_PIECES * NODES_A_WORKER * engine.workers
    total: Partial | None = None
    for slab in range(first_piece, len(vectors.pieces), width):
        stop = min(slab + width, len(vectors.pieces))
        chunks = vectors.array(slab, stop).to_delayed().ravel()
        nodes = []
        for first in range(0, len(chunks), NODE_PIECES):
            node = None
            for number in range(first, min(first + NODE_PIECES, len(chunks))):
                one = run(chunks[number], starts[slab + number], *shared)
                node = one if node is None else combine(node, one)
            nodes.append(node)
        for found in engine.run(nodes):
            total = found if total is None else merge(total, found)
        progress(starts[stop] - starts[first_piece], starts[-1] - starts[first_piece])
    assert total is not None
    return total
