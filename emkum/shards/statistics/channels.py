"""Mean and standard deviation of every channel, in one pass.

Each batch has its own mean and sum of squared deviations from it, added up as in Chan, Golub and LeVeque (1983),
"Algorithms for computing the sample variance", equation 2.1: no difference of large numbers is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from emkum.shards.statistics.passes import Engine, fold
from emkum.shards.statistics.vectors import Vectors

BATCH_BYTES = 8 << 20  # of float64, converted at a time


@dataclass(frozen=True)
class Moments:
    """Of n vectors: float64 [D] each."""

    count: int
    mean_D: np.ndarray
    squares_D: np.ndarray  # sum of (x - mean)^2
    minimum_D: np.ndarray
    maximum_D: np.ndarray


def channel_moments(
    vectors: Vectors, engine: Engine, progress: Callable[[int, int], None] = lambda done, total: None
) -> Moments:
    """Mean, spread and range of every channel. The standard deviation is sqrt(squares / count): of the population."""
    return fold(vectors, moments, merge, engine, (), progress)


def moments(x_ND: np.ndarray, first: int = 0) -> Moments:
    """Of one piece, float32 [n, D], n > 0."""
    step = max(1, BATCH_BYTES // (8 * x_ND.shape[1]))
    total: Moments | None = None
    for start in range(0, len(x_ND), step):
        wide = x_ND[start : start + step].astype(np.float64)
        mean = wide.mean(axis=0)
        low, high = wide.min(axis=0), wide.max(axis=0)
        wide -= mean
        here = Moments(len(wide), mean, np.einsum("nd,nd->d", wide, wide), low, high)
        total = here if total is None else merge(total, here)
    assert total is not None
    return total


def merge(a: Moments, b: Moments) -> Moments:
    count = a.count + b.count
    step = b.mean_D - a.mean_D
    return Moments(
        count,
        a.mean_D + step * (b.count / count),
        a.squares_D + b.squares_D + step**2 * (a.count * b.count / count),
        np.minimum(a.minimum_D, b.minimum_D),
        np.maximum(a.maximum_D, b.maximum_D),
    )
