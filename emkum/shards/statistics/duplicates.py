"""Near-duplicates: rows of a pooled field whose cosine is at least a threshold, and what is linked through others.

Groups are the connected components of the graph that has an edge between two rows where cos(x, y) >= threshold. Every
pair is looked at: N^2 / 2 products, tile by tile, so that memory does not grow with them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from emkum.errors import UsageError
from emkum.shards.statistics.codebook import unit
from emkum.shards.statistics.passes import Engine, fold
from emkum.shards.statistics.vectors import Piece, Source, Vectors

TILE_BYTES = 32 << 20  # of vectors, with which all later ones are compared in one pass
SCORE_BYTES = 16 << 20  # of cosines, computed at a time
UNSURE = 1e-4  # cosines this near to the threshold are computed again in float64
SLACK = 1e-9  # so that a vector has cosine 1 with itself


@dataclass(frozen=True)
class Duplicates:
    """group_R: int64, one number for every row from 0 to the split's last: the lowest row of its group.

    A row alone has its own number; -1 where the field has no row of this split.
    """

    group_R: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """int64: of the groups of more than one row, largest first."""
        _, counts = np.unique(self.group_R[self.group_R >= 0], return_counts=True)
        return np.sort(counts[counts > 1])[::-1]


@dataclass(frozen=True)
class Tile:
    """Neighbouring pieces, and the number of their first vector."""

    pieces: tuple[Piece, ...]
    first: int

    @property
    def vectors(self) -> int:
        return sum(piece.vectors for piece in self.pieces)


def near_duplicates(
    vectors: Vectors,
    threshold: float,
    engine: Engine,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Duplicates:
    """The groups of a pooled field, first views. progress: in pairs of vectors compared."""
    if not 0 < threshold <= 1:
        raise UsageError(f"--threshold {threshold} is no cosine of near-duplicates", "give 0.9 to 1")
    count = vectors.num_vectors
    group_N = np.arange(count)
    for number, tile in _tiles(vectors):
        links = fold(vectors, _Compare(vectors, tile, threshold), _both, engine, (), first_piece=number)
        join(group_N, links[:, 0], links[:, 1])
        end = tile.first + tile.vectors
        progress(count * (count - 1) // 2 - (count - end) * (count - end - 1) // 2, count * (count - 1) // 2)
    rows_N = vectors.rows()
    group_R = np.full(int(rows_N.max()) + 1, -1, np.int64)
    group_R[rows_N] = rows_N[group_N]  # rows ascend, so the first of a group is its lowest
    return Duplicates(group_R)


def _tiles(vectors: Vectors) -> list[tuple[int, Tile]]:
    """(number of its first piece, tile), of about TILE_BYTES each."""
    found, begin, first, size = [], 0, 0, 0
    for number, piece in enumerate(vectors.pieces):
        size += piece.vectors
        if size * vectors.width * 4 >= TILE_BYTES or number + 1 == len(vectors.pieces):
            found.append((begin, Tile(vectors.pieces[begin : number + 1], first)))
            begin, first, size = number + 1, first + size, 0
    return found


class _Compare:
    """A tile with one piece: what a task calls. The tile is read once a process."""

    def __init__(self, vectors: Vectors, tile: Tile, threshold: float) -> None:
        self._source, self._tile, self._threshold = vectors.source, tile, threshold

    def __call__(self, x_ND: np.ndarray, first: int) -> np.ndarray:
        return links(_tile(self._source, self._tile), self._tile.first, x_ND, first, self._threshold)


_HELD: dict[Tile, np.ndarray] = {}
_LOCK = threading.Lock()


def _tile(source: Source, tile: Tile) -> np.ndarray:
    """float32 [n, D]; the last one asked for is held."""
    with _LOCK:
        if tile not in _HELD:
            vectors = Vectors(source, tile.pieces, 0)
            _HELD.clear()
            _HELD[tile] = np.concatenate([vectors.load(piece) for piece in tile.pieces])
        return _HELD[tile]


def forget_tiles() -> None:
    """Frees the tile that this process holds."""
    with _LOCK:
        _HELD.clear()


def links(a_ND: np.ndarray, first_a: int, b_MD: np.ndarray, first_b: int, threshold: float) -> np.ndarray:
    """int64 [E, 2]: pairs of vector numbers that connect all near-duplicates of one from `a` and one from `b`.

    A forest: fewer than N + M pairs, however many near-duplicates there are.
    """
    unit_ND, unit_MD = unit(a_ND), unit(b_MD)
    numbers = np.concatenate([np.arange(len(a_ND)) + first_a, np.arange(len(b_MD)) + first_b])
    label = np.arange(len(numbers))
    step = max(1, SCORE_BYTES // (4 * len(b_MD)))
    for start in range(0, len(a_ND), step):
        cosine = unit_ND[start : start + step] @ unit_MD.T
        i, j = np.nonzero(cosine >= threshold - UNSURE)
        sure = cosine[i, j] >= threshold + UNSURE
        i += start
        keep = i + first_a < j + first_b  # each pair once; not with itself
        i, j, sure = i[keep], j[keep], sure[keep]
        join(label, i[sure], j[sure] + len(a_ND))
        i, j = i[~sure], j[~sure]
        near = _exact(a_ND, b_MD, i, j) >= threshold - SLACK
        join(label, i[near], j[near] + len(a_ND))
    linked = np.flatnonzero(label != np.arange(len(label)))
    return np.stack([numbers[linked], numbers[label[linked]]], axis=1)


def _exact(a_ND: np.ndarray, b_MD: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """float64: the cosines of pairs, some at a time."""
    found = np.empty(len(i))
    step = max(1, SCORE_BYTES // (16 * a_ND.shape[1]))
    for start in range(0, len(i), step):
        x = a_ND[i[start : start + step]].astype(np.float64)
        y = b_MD[j[start : start + step]].astype(np.float64)
        norm = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
        found[start : start + step] = (x * y).sum(axis=1) / np.where(norm > 0, norm, 1)
    return found


def _both(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.concatenate([a, b])


def join(label_N: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Union of the sets that each a[i] and b[i] are in. label_N, changed in place: the lowest member of one's set."""
    while len(a):
        low, high = np.minimum(label_N[a], label_N[b]), np.maximum(label_N[a], label_N[b])
        apart = low != high
        a, b = a[apart], b[apart]
        np.minimum.at(label_N, high[apart], low[apart])
        while (label_N[label_N] != label_N).any():
            label_N[:] = label_N[label_N]
