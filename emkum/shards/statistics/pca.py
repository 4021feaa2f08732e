"""Principal components, exact: the eigenvectors of the covariance, whose sums are float64, in one pass.

    C = 1 / (N - 1) sum_n (x_n - mu) (x_n - mu)^T = V diag(lambda) V^T

The sums are taken of x - s, s the mean of the first piece, which cancels in the end: C = (G - N m m^T) / (N - 1) with
G the sum of the outer products and m the mean of x - s. With s near mu, m is small and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from emkum.errors import UsageError
from emkum.shards.statistics.passes import Engine, fold
from emkum.shards.statistics.vectors import Vectors

BATCH_BYTES = 16 << 20  # of float64, multiplied at a time
MAX_TOKEN_WIDTH = 1536  # each token costs D^2 products
MAX_WIDTH = 8192  # a covariance of 0.5 GB


@dataclass(frozen=True)
class Pca:
    """components_dD: orthonormal rows, by falling variance; the largest number of each is positive. All float64."""

    components_dD: np.ndarray
    mean_D: np.ndarray
    explained_variance_d: np.ndarray  # lambda, of N - 1
    total_variance: float  # trace of C


@dataclass(frozen=True)
class Outer:
    """Sums over n vectors x - s."""

    count: int
    total_D: np.ndarray
    products_DD: np.ndarray


def require_components(vectors: Vectors, components: int, is_pooled: bool) -> None:
    """Raises UsageError for more components than there can be, and for vectors that are too wide."""
    most = min(vectors.width, vectors.num_vectors - 1)
    if components > most:
        raise UsageError(
            f"--components {components}: {vectors.source.field} has {vectors.num_vectors:,} vectors of {vectors.width} "
            f"channels, which have {most} components at most",
            f"ask for --components {most} or fewer" if most else "extract more rows",
        )
    widest = MAX_WIDTH if is_pooled else MAX_TOKEN_WIDTH
    if vectors.width > widest:
        raise UsageError(
            f"{vectors.source.field} has {vectors.width} channels; the covariance is taken of {widest} at most"
            + ("" if is_pooled else " where every token counts"),
            "take the components of a pooled field of the teacher (cls, mean)" if not is_pooled else "use cls or mean",
        )


def principal_components(
    vectors: Vectors, components: int, engine: Engine, progress: Callable[[int, int], None] = lambda done, total: None
) -> Pca:
    """The first `components` of all vectors. Raises UsageError as `require_components`."""
    shift_D = vectors.load(vectors.pieces[0]).mean(axis=0, dtype=np.float64)
    sums = fold(vectors, outer, merge, engine, (engine.share(shift_D),), progress)
    m_D = sums.total_D / sums.count
    covariance_DD = (sums.products_DD - sums.count * np.outer(m_D, m_D)) / (sums.count - 1)
    variance, vectors_DD = np.linalg.eigh(covariance_DD)  # ascending
    components_dD = vectors_DD[:, ::-1].T[:components]
    largest = np.abs(components_dD).argmax(axis=1)
    components_dD = components_dD * np.sign(components_dD[np.arange(components), largest])[:, None]
    variance_d = np.maximum(variance[::-1][:components], 0.0)
    return Pca(components_dD, shift_D + m_D, variance_d, float(np.trace(covariance_DD)))


def outer(x_ND: np.ndarray, first: int, shift_D: np.ndarray) -> Outer:
    """Of one piece."""
    width = x_ND.shape[1]
    total_D, products_DD = np.zeros(width), np.zeros((width, width))
    step = max(1, BATCH_BYTES // (8 * width))
    for start in range(0, len(x_ND), step):
        centred = x_ND[start : start + step] - shift_D
        total_D += centred.sum(axis=0)
        products_DD += centred.T @ centred
    return Outer(len(x_ND), total_D, products_DD)


def merge(a: Outer, b: Outer) -> Outer:
    return Outer(a.count + b.count, a.total_D + b.total_D, a.products_DD + b.products_DD)
