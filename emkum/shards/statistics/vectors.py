"""The numbers of a field as a dask array of vectors [N, D], in pieces of bounded size."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from emkum.errors import IdentityMismatch, IncompleteCache, UsageError
from emkum.shards.reader import Cache, Field

DaskArray = Any  # dask's classes say little to a type checker

PIECE_BYTES = 16 << 20  # of float32, in one piece
KEPT_BYTES = 1 << 30  # of a pooled field that a process keeps in memory between passes; larger ones are read again
VECTOR_KINDS = ("tokens", "pooled", "ragged", "text_pooled", "audio_ragged", "audio_pooled")
POOLED_KINDS = ("pooled", "text_pooled", "audio_pooled")
SAMPLED_ROWS = 2048  # of a token field, from which a sample of its vectors is drawn


@dataclass(frozen=True)
class Source:
    """Which field of which cache: what a worker, here or on another machine, opens for itself."""

    place: str
    uuid: str
    field: str
    fingerprint_digest: str


@dataclass(frozen=True)
class Piece:
    """Some rows of one block and view: the valid rows [first, first + rows) of it, counted without quarantined ones."""

    block: int
    view: int
    first: int
    rows: int
    vectors: int


@dataclass(frozen=True)
class Vectors:
    """All committed vectors of one split, in the order of blocks, views and rows. N vectors of width D.

    A pooled field has one vector a row and view; a token field every token that is stored, those of the prefix
    included; a ragged field the positions before each row's length.
    """

    source: Source
    pieces: tuple[Piece, ...]
    width: int

    @property
    def num_vectors(self) -> int:
        return sum(piece.vectors for piece in self.pieces)

    @property
    def num_rows(self) -> int:
        """Rows, once for every view."""
        return sum(piece.rows for piece in self.pieces)

    def array(self, start: int = 0, stop: int | None = None) -> DaskArray:
        """Pieces [start, stop) as a dask array, float32 [n, D], a chunk each. Nothing is read yet."""
        from dask import array

        from_array: Any = array.from_array
        pieces = self.pieces[start:stop]
        table = np.array([(p.block, p.view, p.first, p.rows) for p in pieces], np.int64).reshape(-1, 4)
        chunks = tuple(piece.vectors for piece in pieces), (self.width,)
        meta = np.empty((0, 0), np.float32)
        return from_array(table, chunks=(1, 4)).map_blocks(
            _load, source=self.source, chunks=chunks, dtype=np.float32, meta=meta
        )

    def load(self, piece: Piece) -> np.ndarray:
        """float32 [n, D], read here and now."""
        return _load(np.array([(piece.block, piece.view, piece.first, piece.rows)]), self.source)

    def rows(self) -> np.ndarray:
        """int64: the row of the cache that each vector of a pooled field is of."""
        field = opened(self.source)
        found = [field.block_rows(p.block, p.view)[p.first : p.first + p.rows] for p in self.pieces]
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def draw(self, count: int, seed: int) -> np.ndarray:
        """float32 [n, D], n <= count: vectors drawn without replacement.

        Of a token field whose numbers are many they come from 2,048 rows at least, as many from each.
        """
        random = np.random.default_rng(seed)
        if self.num_vectors * self.width * 4 <= 4 * PIECE_BYTES:
            everything = np.concatenate([self.load(piece) for piece in self.pieces])
            return everything[np.sort(random.choice(len(everything), min(count, len(everything)), replace=False))]
        per_row = self.num_vectors / self.num_rows
        num_rows = min(self.num_rows, max(math.ceil(2 * count / per_row), min(count, SAMPLED_ROWS)))
        chosen = np.sort(random.choice(self.num_rows, num_rows, replace=False))
        share, found = math.ceil(2 * count / num_rows), []
        for piece, places in self._by_piece(chosen):
            field = opened(self.source)
            for row in field.block_rows(piece.block, piece.view)[places]:
                one = row_vectors(field, np.array([row]), piece.view)
                found.append(one[random.choice(len(one), min(share, len(one)), replace=False)])
        drawn = np.concatenate(found)
        return drawn[np.sort(random.choice(len(drawn), min(count, len(drawn)), replace=False))]

    def _by_piece(self, chosen: np.ndarray) -> Iterator[tuple[Piece, np.ndarray]]:
        """(piece, places in its block) of rows that are counted through all pieces."""
        ends = np.cumsum([piece.rows for piece in self.pieces])
        for number in np.unique(np.searchsorted(ends, chosen, side="right")):
            piece = self.pieces[number]
            begin = ends[number] - piece.rows
            here = chosen[(chosen >= begin) & (chosen < ends[number])]
            yield piece, here - begin + piece.first


def vectors_of(cache: Cache, name: str, split: str, first_view_only: bool = False) -> Vectors:
    """The field's vectors as this snapshot has them committed.

    Raises MissingField, UsageError for a field without vectors or a split that is not there, IncompleteCache if
    nothing of the split is committed.
    """
    field = cache.field(name)
    if field.kind not in VECTOR_KINDS:
        usable = [other for other, one in cache.fields.items() if one.kind in VECTOR_KINDS]
        raise UsageError(
            f"{name} holds {field.kind}, of which no statistic is taken",
            f"fields with vectors here: {', '.join(usable) or 'none'}",
        )
    if split not in cache.splits:
        raise UsageError(
            f"{cache.path} has no split {split!r}; it has: {', '.join(cache.splits) or 'none'}", "choose one: --split"
        )
    place = cache.store.url if cache.store.local is None else os.path.abspath(cache.store.local)
    source = Source(place, cache.uuid, name, field.record["fingerprint_digest"])
    pieces = tuple(piece for at in split_blocks(cache, field, split, first_view_only) for piece in _pieces(field, *at))
    if not any(piece.vectors for piece in pieces):
        raise IncompleteCache(
            f"{cache.path} field {name} has no committed row of split {split}",
            f"`emkum extract --split {split}` adds them; `emkum cache info {cache.path}` shows what is there",
        )
    return Vectors(source, pieces, field.row_shape[-1])


def split_blocks(cache: Cache, field: Field, split: str, first_view_only: bool = False) -> list[tuple[int, int]]:
    """(block, view) of the split's committed blocks, ascending."""
    numbers = {segment.number for segment in cache.segments if segment.split == split}
    places = [place for place, receipt in field.receipts.items() if receipt.segment in numbers]
    return sorted((block, view) for block, view in places if not (first_view_only and view))


def _pieces(field: Field, block: int, view: int) -> Iterator[Piece]:
    rows = field.block_rows(block, view)
    lengths = np.ones(len(rows), np.int64)
    if field.spec.is_ragged:
        lengths = np.maximum(field.lengths(rows).astype(np.int64) - _first_position(field), 0)
    elif len(field.row_shape) > 1:
        lengths *= field.row_shape[0]
    step = max(1, PIECE_BYTES // (math.prod(field.row_shape) * 4))
    for first in range(0, len(rows), step):
        here = lengths[first : first + step]
        if here.sum():
            yield Piece(block, view, first, len(here), int(here.sum()))


def _first_position(field: Field) -> int:
    """1 for the patches of texts: their position 0, that of the CLS token, holds zeros."""
    return int(field.space == "text" and field.name.endswith("/patches"))


def row_vectors(field: Field, rows: np.ndarray, view: int) -> np.ndarray:
    """float32 [n, D]: all vectors of these rows."""
    values = field.values(rows, view)
    if field.spec.is_ragged:
        position = np.arange(values.shape[1])
        values = values[(position >= _first_position(field)) & (position < field.lengths(rows)[:, None])]
    if field.num_bytes > KEPT_BYTES:
        field.forget_plain()
    return values.reshape(-1, values.shape[-1])


# --- in the process that computes ----------------------------------------------------------------------


_OPENED: dict[Source, Field] = {}
_LOCK = threading.Lock()


def opened(source: Source) -> Field:
    """The field, opened once a process. Raises IdentityMismatch where another cache lies at the place."""
    with _LOCK:
        if source not in _OPENED:
            cache = Cache.open(source.place, only=[source.field])
            field = cache.field(source.field)
            if (cache.uuid, field.record["fingerprint_digest"]) != (source.uuid, source.fingerprint_digest):
                raise IdentityMismatch(
                    f"{source.place} as a worker sees it is cache {cache.uuid[:12]} with {source.field} "
                    f"{field.record['fingerprint_digest'][:12]}...; the command has {source.uuid[:12]} with "
                    f"{source.fingerprint_digest[:12]}...",
                    "workers must see the same folder at the same path: use a shared file system or an object store",
                )
            _OPENED.clear()
            _OPENED[source] = field
        return _OPENED[source]


def close_all() -> None:
    """Frees what this process has opened."""
    with _LOCK:
        _OPENED.clear()


def _load(table: np.ndarray, source: Source) -> np.ndarray:
    block, view, first, count = (int(number) for number in table[0])
    field = opened(source)
    rows = field.block_rows(block, view)[first : first + count]
    if len(rows) != count:
        raise IncompleteCache(
            f"{source.place} field {source.field} block {block}-{view} has other rows than when the command began",
            "was the cache repaired meanwhile? The same command begins anew",
        )
    return row_vectors(field, rows, view)
