"""Codebooks: spherical k-means over all vectors.

    code(x)  = argmax_j <x / |x|, c_j>          c_j <- S_j / |S_j|,  S_j = sum of x / |x| over the vectors of code j

Source: Dhillon and Modha 2001, "Concept decompositions for large sparse text data" (doi:10.1023/A:1007612920971).
The mean cosine of vectors and their codes never falls from pass to pass, but for codes that begin anew: a code without
vectors takes the place of a vector that was far from its own code, and from the others that do so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from emkum.errors import UsageError
from emkum.shards.statistics.passes import Engine, fold
from emkum.shards.statistics.vectors import Vectors

Start = Literal["k-means++", "rows"]
SCORE_BYTES = 16 << 20  # of cosines, computed at a time
FARTHEST = 256  # vectors kept of a pass, for codes that begin anew
SAMPLE_A_CODE = 4  # vectors that k-means++ chooses from
CONVERGED = 1e-6  # growth of the mean cosine below which nothing is gained any more
SAME = 1e-6  # of 1 - cosine: vectors that make no two codes


@dataclass(frozen=True)
class Codebook:
    """codes_JD: float32 unit vectors. counts_J: int64, vectors of each in the last pass, made with these codes.

    mean_cosine: of the vectors with their codes, pass by pass; the last of these codes. restarted: codes that began
    anew, over all passes.
    """

    codes_JD: np.ndarray
    counts_J: np.ndarray
    mean_cosine: tuple[float, ...]
    restarted: int

    @property
    def usage(self) -> float:
        """Share of the codes that have a vector."""
        return float((self.counts_J > 0).mean())

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the codes' shares: J where all are used alike."""
        share = self.counts_J[self.counts_J > 0] / self.counts_J.sum()
        return float(np.exp(-(share * np.log(share)).sum()))


@dataclass(frozen=True)
class Assigned:
    """What a pass found: sums of unit vectors by code, their number, and who lies farthest from its code."""

    sums_JD: np.ndarray  # float64
    counts_J: np.ndarray  # int64
    cosine: float  # sum over vectors
    far_cosine_F: np.ndarray  # ascending, with ties by number
    far_number_F: np.ndarray  # int64, of the vector
    far_FD: np.ndarray  # float32 unit vectors


def make_codebook(
    vectors: Vectors,
    codes: int,
    engine: Engine,
    *,
    seed: int = 0,
    start: Start = "k-means++",
    iterations: int = 20,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Codebook:
    """At most `iterations` passes that move the codes, fewer once the mean cosine stands still, and one that counts.

    Raises UsageError for more codes than vectors.
    """
    if codes > vectors.num_vectors:
        raise UsageError(
            f"--codes {codes}: {vectors.source.field} has {vectors.num_vectors:,} vectors in this split",
            "ask for fewer codes, or extract more rows",
        )
    random = np.random.default_rng(seed)
    sample = vectors.draw(codes if start == "rows" else SAMPLE_A_CODE * codes, seed)
    sample = unit(sample[sample.any(axis=1)])
    if not len(sample):
        raise UsageError(f"all vectors drawn from {vectors.source.field} are zero", "choose another field")
    if start == "rows":
        codes_JD = sample[np.resize(random.permutation(len(sample)), codes)]
    else:
        codes_JD = spread(sample, codes, random)
    history: list[float] = []
    restarted = begun_anew = 0
    for number in range(iterations + 1):
        name = f"pass {number + 1} of at most {iterations + 1}"

        def tell(done: int, total: int, name: str = name) -> None:
            progress(name, done, total)

        found = fold(vectors, assign, merge, engine, (engine.share(codes_JD),), tell)
        history.append(found.cosine / found.counts_J.sum())
        stands = len(history) > 1 and history[-1] - history[-2] < CONVERGED
        if number == iterations or (stands and not begun_anew):
            break
        codes_JD, begun_anew = moved(codes_JD, found)
        restarted += begun_anew
    return Codebook(codes_JD, found.counts_J, tuple(history), restarted)


def spread(sample_MD: np.ndarray, codes: int, random: np.random.Generator) -> np.ndarray:
    """`codes` of the sample's unit vectors by k-means++ (Arthur and Vassilvitskii 2007): each drawn in proportion to
    its squared distance, 2 (1 - cosine), from the nearest one drawn before.
    """
    chosen = np.empty(codes, np.int64)
    chosen[0] = random.integers(len(sample_MD))
    distance_M = np.full(len(sample_MD), np.inf)
    for number in range(1, codes):
        distance_M = np.minimum(distance_M, 1 - (sample_MD @ sample_MD[chosen[number - 1]]).astype(np.float64))
        distance_M[distance_M < SAME] = 0
        ends = np.cumsum(distance_M)
        if ends[-1] > 0:
            chosen[number] = np.searchsorted(ends, random.random() * ends[-1], side="right")
        else:  # fewer different vectors than codes
            chosen[number] = random.integers(len(sample_MD))
    return sample_MD[chosen]


def unit(x_ND: np.ndarray) -> np.ndarray:
    """float32: x / |x|; zero vectors stay."""
    norm_N = np.sqrt(np.einsum("nd,nd->n", x_ND, x_ND, dtype=np.float64))
    norm_N[norm_N == 0] = 1
    unit_ND: np.ndarray = (x_ND / norm_N[:, None]).astype(np.float32)
    return unit_ND


def assign(x_ND: np.ndarray, first: int, codes_JD: np.ndarray) -> Assigned:
    """Of one piece, whose first vector has the number `first`."""
    num_codes, width = codes_JD.shape
    step = max(1, SCORE_BYTES // (4 * num_codes))
    sums_JD, counts_J = np.zeros((num_codes, width)), np.zeros(num_codes, np.int64)
    total, far = 0.0, (np.empty(0), np.empty(0, np.int64), np.empty((0, width), np.float32))
    for start in range(0, len(x_ND), step):
        unit_ND = unit(x_ND[start : start + step])
        cosine_NJ = unit_ND @ codes_JD.T
        code_N = cosine_NJ.argmax(axis=1)
        cosine_N = cosine_NJ[np.arange(len(code_N)), code_N].astype(np.float64)
        order = np.argsort(code_N, kind="stable")
        found, begin = np.unique(code_N[order], return_index=True)
        sums_JD[found] += np.add.reduceat(unit_ND[order], begin, axis=0, dtype=np.float64)
        counts_J += np.bincount(code_N, minlength=num_codes)
        total += float(cosine_N.sum())
        far = _farther(far, (cosine_N, np.arange(len(cosine_N)) + first + start, unit_ND))
    return Assigned(sums_JD, counts_J, total, *far)


_Far = tuple[np.ndarray, np.ndarray, np.ndarray]


def _farther(a: _Far, b: _Far) -> _Far:
    """The FARTHEST of both with the lowest cosines."""
    cosine, number = np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]])
    order = np.lexsort((number, cosine))[:FARTHEST]
    from_a, from_b = order[order < len(a[0])], order[order >= len(a[0])] - len(a[0])
    rows = np.empty((len(order), a[2].shape[1]), np.float32)
    rows[order < len(a[0])], rows[order >= len(a[0])] = a[2][from_a], b[2][from_b]
    return cosine[order], number[order], rows


def merge(a: Assigned, b: Assigned) -> Assigned:
    far = _farther((a.far_cosine_F, a.far_number_F, a.far_FD), (b.far_cosine_F, b.far_number_F, b.far_FD))
    return Assigned(a.sums_JD + b.sums_JD, a.counts_J + b.counts_J, a.cosine + b.cosine, *far)


def moved(codes_JD: np.ndarray, found: Assigned) -> tuple[np.ndarray, int]:
    """The codes of the next pass, float32 [J, D], and how many of them begin anew.

    A code without vectors becomes one of the farthest, far from those that others became; else it stays.
    """
    norm_J = np.sqrt(np.einsum("jd,jd->j", found.sums_JD, found.sums_JD))
    alive = (found.counts_J > 0) & (norm_J > 0)
    new_JD = codes_JD.astype(np.float64)
    new_JD[alive] = found.sums_JD[alive] / norm_J[alive, None]
    taken = 0
    nearest_F = np.where(found.far_FD.any(axis=1), found.far_cosine_F, 1.0)  # cosine with the nearest code; zeros: none
    for code in np.flatnonzero(~alive):
        farthest = int(nearest_F.argmin())
        if nearest_F[farthest] > 1 - SAME:
            break
        new_JD[code] = found.far_FD[farthest]
        nearest_F = np.maximum(nearest_F, found.far_FD @ found.far_FD[farthest])
        taken += 1
    return new_JD.astype(np.float32), taken
