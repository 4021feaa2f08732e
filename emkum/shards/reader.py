"""Read a cache: rows by number, committed ones only, from a snapshot taken at open."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa

from emkum.errors import CorruptCache, IncompleteCache, MissingField, UsageError
from emkum.shards.codec import decode_int8
from emkum.shards.layout import (
    RECORDS,
    TEXT_TILE,
    ArraySpec,
    FieldSpec,
    field_from_record,
    field_record_path,
    model_dir,
    object_path,
)
from emkum.shards.ledger import (
    CommittedObject,
    Receipt,
    field_record_paths,
    read_field_record,
    read_receipts,
    receipt_fields,
    require_fingerprint,
)
from emkum.shards.segments import (
    CAPTIONS,
    SAMPLES,
    Segment,
    read_captions,
    read_samples,
    read_segments,
    require_segment,
)
from emkum.shards.store import RangeReader, Store, exists, open_store
from emkum.shards.writer import ABSENT, read_root

MAX_OPEN_SHARDS = 256
_REPAIR = (
    "`emkum cache repair` with this cache's folder drops what is damaged, and the same extract command redoes exactly "
    "that; or restore the object from a copy of the cache"
)


class Cache:
    """A snapshot of one cache. Later commits are not seen; open again to see them."""

    def __init__(
        self, store: Store, uuid: str, rows_per_block: int, segments: Sequence[Segment], fields: dict[str, Field]
    ) -> None:
        self.store = store
        self.path = store.local or store.url
        self.uuid = uuid
        self.rows_per_block = rows_per_block
        self.segments = tuple(segments)
        self.fields = fields
        self._tables: dict[tuple[str, str], pa.Table] = {}
        self._copies: dict[str, tempfile.TemporaryDirectory[str]] = {}

    @classmethod
    def open(cls, place: Store | Path | str, only: Collection[str] | None = None) -> Cache:
        """place: a folder, or a URL that fsspec knows. only: names of the fields to open; None: all.

        Raises NotACache, NewerFormat, CorruptCache.
        """
        store = open_store(place)
        uuid, rows_per_block = read_root(store)
        segments = read_segments(store)
        shards = _OpenShards(store, MAX_OPEN_SHARDS)
        fields = {}
        paths = field_record_paths(store) if only is None else [field_record_path(name) for name in only]
        for path in paths:
            field = Field(store, segments, rows_per_block, read_field_record(store, path), shards)
            fields[field.name] = field
        if only is None:
            for name in receipt_fields(store):
                if name not in fields and not exists(store, field_record_path(name)):
                    raise CorruptCache(
                        f"{store.url} has receipts of the field {name}, whose record is missing",
                        "the same extract command writes the record again and keeps the blocks; or restore it from a "
                        "copy of the cache",
                    )
        return cls(store, uuid, rows_per_block, segments, fields)

    @property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(segment.split for segment in self.segments))

    @property
    def models(self) -> list[str]:
        """Names of the frozen networks kept in the cache."""
        folder = f"{RECORDS}/models"
        names = sorted(n for n in self.store.list(folder) if not n.startswith(".") and not n.endswith(".tmp"))
        return [name for name in names if "model.json" in self.store.list(f"{folder}/{name}")]

    def model_dir(self, name: str) -> Path:
        """The folder of a frozen network; of a remote cache, a copy of it in a temporary folder."""
        if name not in self.models:
            raise MissingField(
                f"{self.path} keeps no network {name!r}; it has: {', '.join(self.models) or 'none'}",
                "extract again with this network as --encoder or --text-encoder",
            )
        if self.store.local is not None:
            return self.store.local / model_dir(name)
        if name not in self._copies:
            self._copies[name] = tempfile.TemporaryDirectory(prefix="emkum-network-")
            for file in self.store.list(model_dir(name)):
                (Path(self._copies[name].name) / file).write_bytes(self.store.read(f"{model_dir(name)}/{file}"))
        return Path(self._copies[name].name)

    def field(self, name: str) -> Field:
        """Raises MissingField listing what there is."""
        if name not in self.fields:
            raise MissingField(
                f"{self.path} has no field {name}; it has: {', '.join(self.fields) or 'none'}",
                "extract it with `emkum extract`, or choose another field",
            )
        return self.fields[name]

    def samples(self, split: str) -> pa.Table:
        """samples.parquet of all segments of the split, in row order."""
        return self._table("samples", split)

    def captions(self, split: str) -> pa.Table:
        """captions.parquet of all segments of the split, in row order."""
        return self._table("captions", split)

    def _table(self, which: str, split: str) -> pa.Table:
        if split not in self.splits:
            raise UsageError(
                f"{self.path} has no split {split!r}; it has: {', '.join(self.splits) or 'none'}",
                f"add it with `emkum extract --split {split} --data ...`",
            )
        if (which, split) not in self._tables:
            read, schema = (read_samples, SAMPLES) if which == "samples" else (read_captions, CAPTIONS)
            parts = [read(self.store, segment) for segment in self.segments if segment.split == split]
            self._tables[which, split] = pa.concat_tables(parts) if parts else schema.empty_table()
        return self._tables[which, split]


class Field:
    """One field of a snapshot. Thread-safe; rows may come in any order and repeat.

    Forked and spawned processes may read from it too: a pickled field takes its snapshot along.
    """

    def __init__(
        self,
        store: Store,
        segments: Sequence[Segment],
        rows_per_block: int,
        record: dict[str, Any],
        shards: _OpenShards,
    ) -> None:
        self.record = record
        self.spec: FieldSpec = field_from_record(record)
        self.fingerprint: dict[str, Any] = record["fingerprint"]
        self._store, self._rows_per_block, self._shards = store, rows_per_block, shards
        self._segments = segments
        known = {segment.number for segment in segments}
        found = read_receipts(store, self.spec.name)
        for number in sorted({receipt.segment for receipt in found.values()} - known):
            require_segment(store, number, self.spec.name)  # one that was added meanwhile is not part of the snapshot
        self.receipts = {place: receipt for place, receipt in found.items() if receipt.segment in known}
        for receipt in self.receipts.values():
            span = segments[receipt.segment].span(self.spec.space)
            if receipt.block not in span.blocks(rows_per_block) or (
                (receipt.first_row, receipt.rows) != span.block_rows(receipt.block, rows_per_block)
            ):
                raise CorruptCache(
                    f"receipt of {self.name} block {receipt.block}-{receipt.view} states rows {receipt.first_row} to "
                    f"{receipt.first_row + receipt.rows - 1}, segment {receipt.segment} has others there",
                    _REPAIR,
                )
        require_fingerprint(store, self.receipts.values(), record["fingerprint_digest"])
        self._blocks: dict[tuple[str, int, int], np.ndarray] = {}
        self._statistics: dict[str, np.ndarray] = {}
        self._bad_rows: dict[tuple[int, int], frozenset[int]] = {}

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def kind(self) -> str:
        return self.spec.kind

    @property
    def space(self) -> str:
        return self.spec.space

    @property
    def storage(self) -> str:
        return self.spec.storage

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.spec.row_shape

    @property
    def num_views(self) -> int:
        """Views of which at least one block is committed; 1 for text fields."""
        return max((view + 1 for _, view in self.receipts), default=0)

    @property
    def num_bytes(self) -> int:
        """Bytes of all committed objects."""
        return sum(o.bytes for receipt in self.receipts.values() for o in receipt.objects)

    @property
    def mean(self) -> np.ndarray:
        """float32 [channel], int8 fields only."""
        return self._static("mean")

    @property
    def std(self) -> np.ndarray:
        """float32 [channel], int8 fields only."""
        return self._static("std")

    def rows(self, split: str, view: int = 0) -> np.ndarray:
        """int64: the split's rows that are committed and not quarantined, ascending."""
        found = []
        for segment in self._segments:
            if segment.split != split:
                continue
            for block in segment.span(self.spec.space).blocks(self._rows_per_block):
                receipt = self.receipts.get((block, view))
                if receipt is not None:
                    rows = np.arange(receipt.first_row, receipt.first_row + receipt.rows, dtype=np.int64)
                    bad = [q.row for q in receipt.quarantined]
                    found.append(np.setdiff1d(rows, bad, assume_unique=True) if bad else rows)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def missing(self, split: str, num_views: int | None = None) -> list[tuple[int, int]]:
        """(block, view) of the split's blocks without a receipt.

        Of each segment the views it was first extracted with are expected, and every view that one of its blocks
        has; or `num_views`.
        """
        found = []
        for segment in self._segments:
            if segment.split != split or not self._covers(segment):
                continue
            blocks = segment.span(self.spec.space).blocks(self._rows_per_block)
            if not self.spec.has_views:
                expected = 1
            else:
                present = (view + 1 for block, view in self.receipts if block in blocks)
                expected = num_views or max(segment.views.count, *present, 0)
            found += [(b, v) for b in blocks for v in range(expected) if (b, v) not in self.receipts]
        return found

    def _covers(self, segment: Segment) -> bool:
        """Boxes belong to one view policy; every other field to all segments."""
        return self.kind != "boxes" or self.name == f"views/{segment.views.name}/boxes"

    def read(self, rows: np.ndarray, view: int | np.ndarray = 0, out: np.ndarray | None = None) -> np.ndarray:
        """Stored numbers [N, *row_shape]; ragged rows are zero past their length.

        Raises IncompleteCache for a row that is not committed, CorruptCache for damage.
        """
        rows = np.asarray(rows, dtype=np.int64)
        views = np.broadcast_to(np.asarray(view, dtype=np.int64), rows.shape)
        if out is None:
            out = np.empty((len(rows), *self.row_shape), dtype=self.storage)
        if not self.spec.sharded:
            self._read_plain("values", rows, views, out)
        elif self.kind == "ragged":
            self._read_ragged(rows, views, out)
        else:
            self._read_tokens(rows, views, out)
        return out

    def read_scale(self, rows: np.ndarray, view: int | np.ndarray = 0) -> np.ndarray:
        """float32 [N, *row_shape[:-1]], int8 fields only."""
        return self._read_sibling("scale", rows, view)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """int32 [N]: valid positions of each row, text ids and ragged fields only."""
        return self._read_sibling("length", rows, 0)

    def values(self, rows: np.ndarray, view: int | np.ndarray = 0) -> np.ndarray:
        """float32 [N, *row_shape]: what was stored, decoded."""
        stored = self.read(rows, view)
        if self.storage != "int8":
            return stored.astype(np.float32)
        values = decode_int8(stored, self.read_scale(rows, view), self.mean, self.std)
        if self.kind == "ragged":
            past = np.arange(self.row_shape[0]) >= self.lengths(rows)[:, None]
            values[past] = 0
        return values

    # --- one row's place -------------------------------------------------------------------------------

    def _receipt(self, row: int, view: int) -> Receipt:
        block = row // self._rows_per_block
        receipt = self.receipts.get((block, view))
        if receipt is None or not receipt.first_row <= row < receipt.first_row + receipt.rows:
            raise IncompleteCache(
                f"{self._store.url} field {self.name}: row {row} view {view} (block {block}) is not committed",
                "run the extract command again to finish it",
            )
        return receipt

    def _left_out(self, row: int, view: int) -> frozenset[int]:
        """The quarantined rows of the row's block."""
        key = row // self._rows_per_block, view
        if key not in self._bad_rows:
            self._bad_rows[key] = frozenset(q.row for q in self._receipt(row, view).quarantined)
        return self._bad_rows[key]

    def _read_sibling(self, name: str, rows: np.ndarray, view: int | np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        array = self.spec.array(name)
        out = np.empty((len(rows), *array.row_shape), dtype=array.dtype)
        self._read_plain(name, rows, np.broadcast_to(np.asarray(view, np.int64), rows.shape), out)
        return out

    def _read_plain(self, name: str, rows: np.ndarray, views: np.ndarray, out: np.ndarray) -> None:
        """Unsharded arrays: whole blocks are checked once and kept in RAM."""
        blocks = rows // self._rows_per_block
        order = np.lexsort((views, blocks))
        changes = np.flatnonzero(np.diff(blocks[order]) | np.diff(views[order])) + 1
        for here in np.split(order, changes) if len(order) else ():
            receipt = self._receipt(int(rows[here].max()), int(views[here[0]]))
            bad = np.intersect1d(rows[here], [q.row for q in receipt.quarantined])
            if len(bad):
                self._refuse_quarantined(receipt, int(bad[0]))
            out[here] = self._block(name, receipt)[rows[here] - receipt.first_row]

    def _block(self, name: str, receipt: Receipt) -> np.ndarray:
        key = (name, receipt.block, receipt.view)
        if key not in self._blocks:
            array = self.spec.array(name)
            path = object_path(self.spec, array, receipt.block, receipt.view)
            data = _read_whole(self._store, path, _stated(receipt, path).bytes, _stated(receipt, path).sha256)
            shape = (self._rows_per_block, *array.row_shape)
            self._blocks[key] = _decode_chunk(data, array, shape, self._store.where(path))
        return self._blocks[key]

    def _static(self, name: str) -> np.ndarray:
        if name not in self._statistics:  # no lock, which a fork could leave held: two threads may both read it
            self._statistics[name] = read_statistic(self._store, self.record, name)
        return self._statistics[name]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_blocks": {}, "_bad_rows": {}}

    def _refuse_quarantined(self, receipt: Receipt, row: int) -> None:
        found = next((q for q in receipt.quarantined if q.row == row), None)
        if found is None:
            raise CorruptCache(
                f"{self._store.url} field {self.name} holds nothing of row {row}, which its receipt says is there",
                _REPAIR,
            )
        raise IncompleteCache(
            f"{self._store.url} field {self.name}: row {row} ({found.tar}, {found.key}) is quarantined: {found.reason}",
            "take rows from Field.rows()",
        )

    # --- sharded values: straight from the file --------------------------------------------------------

    def _shard(self, row: int, view: int) -> _Shard:
        receipt = self._receipt(row, view)
        array = self.spec.array("values")
        path = object_path(self.spec, array, receipt.block, view)
        return self._shards.get(path, _stated(receipt, path), (self._rows_per_block, array.tiles), array.inner_bytes)

    def _read_tokens(self, rows: np.ndarray, views: np.ndarray, out: np.ndarray) -> None:
        flat = out.reshape(len(rows), -1) if len(rows) and out.flags.c_contiguous else None
        for i, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
            shard = self._shard(row, view)
            local = row % self._rows_per_block
            if row in self._left_out(row, view) or shard.offsets[local, 0] == ABSENT:
                self._refuse_quarantined(self._receipt(row, view), row)
            if flat is not None:
                shard.read_into(local, 0, flat[i])
            else:
                buffer = np.empty(self.row_shape, dtype=self.storage)
                shard.read_into(local, 0, buffer)
                out[i] = buffer

    def _read_ragged(self, rows: np.ndarray, views: np.ndarray, out: np.ndarray) -> None:
        out[...] = 0
        lengths = self.lengths(rows)
        for i, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
            shard = self._shard(row, view)
            local = row % self._rows_per_block
            for tile in range(-(-int(lengths[i]) // TEXT_TILE)):
                if shard.offsets[local, tile] == ABSENT:
                    raise CorruptCache(
                        f"{shard.path} lacks tile {tile} of row {row}, whose length is {lengths[i]}", _REPAIR
                    )
                buffer = np.empty((TEXT_TILE, *self.row_shape[1:]), dtype=self.storage)
                shard.read_into(local, tile, buffer)
                out[i, tile * TEXT_TILE : (tile + 1) * TEXT_TILE] = buffer


class _Shard:
    """An open shard file: its index parsed and checked once, its chunks checked at their first read."""

    def __init__(
        self, store: Store, path: str, stated: CommittedObject, grid: tuple[int, int], chunk_bytes: int
    ) -> None:
        self.path = store.where(path)
        expected_bytes = stated.bytes
        self._chunk_bytes = chunk_bytes
        try:
            self._file: RangeReader = store.open(path)
        except FileNotFoundError as error:
            raise CorruptCache(
                f"object {self.path} is missing, its receipt says {expected_bytes} bytes", _REPAIR
            ) from error
        size = self._file.size
        if size != expected_bytes:
            raise CorruptCache(f"object {self.path} has {size} bytes, its receipt says {expected_bytes}", _REPAIR)
        index_bytes = grid[0] * grid[1] * 16
        data = bytearray(min(index_bytes + 4, size))
        count = self._file.read_into([memoryview(data)], max(size - index_bytes - 4, 0))
        if count != index_bytes + 4 or google_crc32c.value(bytes(data[:-4])) != struct.unpack("<I", data[-4:])[0]:
            raise CorruptCache(f"the index of {self.path} fails its checksum", _REPAIR)
        index = np.frombuffer(bytes(data[:-4]), dtype="<u8").reshape(*grid, 2)
        starts, sizes = index[..., 0], index[..., 1]
        present = starts != ABSENT
        last = size - index_bytes - 4 - (chunk_bytes + 4)  # where the last chunk may start
        if (sizes[present] != chunk_bytes + 4).any() or (present.any() and (last < 0 or starts[present].max() > last)):
            raise CorruptCache(f"the index of {self.path} points outside its chunks", _REPAIR)
        self.offsets = starts
        self._checked = np.zeros(grid, dtype=bool)
        for number, crc in stated.marks:
            self._require_mark(number, crc)

    def _require_mark(self, number: int, crc: int) -> None:
        """One chunk bears the checksum that the receipt states: the file was not swapped with another."""
        found = bytearray(4)
        offset = int(self.offsets.flat[number]) if number < self.offsets.size else ABSENT
        if offset == ABSENT or self._file.read_into([memoryview(found)], offset + self._chunk_bytes) != 4:
            raise CorruptCache(f"{self.path} lacks chunk {number}, which its receipt states", _REPAIR)
        if struct.unpack("<I", found)[0] != crc:
            raise CorruptCache(
                f"{self.path}: chunk {number} has checksum {struct.unpack('<I', found)[0]:08x}, the receipt states "
                f"{crc:08x}: it may be the object of another block",
                _REPAIR,
            )

    def read_into(self, row: int, tile: int, out: np.ndarray) -> None:
        """Fills `out` (contiguous, one chunk) from the file."""
        offset = int(self.offsets[row, tile])
        view = out.data.cast("B")
        if self._checked[row, tile]:
            if self._file.read_into([view], offset) != self._chunk_bytes:
                raise CorruptCache(f"{self.path} ended inside a chunk at {offset}", _REPAIR)
            return
        stated = bytearray(4)
        if self._file.read_into([view, memoryview(stated)], offset) != self._chunk_bytes + 4:
            raise CorruptCache(f"{self.path} ended inside a chunk at {offset}", _REPAIR)
        if google_crc32c.value(out) != struct.unpack("<I", stated)[0]:
            raise CorruptCache(
                f"{self.path}: the chunk at byte {offset} (row {row} of the block) fails its checksum", _REPAIR
            )
        self._checked[row, tile] = True


class _OpenShards:
    """At most `limit` shard files open at a time, shared by the fields of a cache; safe across threads and forks."""

    def __init__(self, store: Store, limit: int) -> None:
        self._store, self._limit = store, limit
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Shard] = OrderedDict()
        _ALL_OPEN.add(self)

    def get(self, path: str, stated: CommittedObject, grid: tuple[int, int], chunk_bytes: int) -> _Shard:
        with self._lock:
            shard = self._open.get(path)
            if shard is not None:
                self._open.move_to_end(path)
                return shard
            shard = _Shard(self._store, path, stated, grid, chunk_bytes)
            self._open[path] = shard
            if len(self._open) > self._limit:
                self._open.popitem(last=False)  # closes when the last thread that reads from it lets go
            return shard

    def __getstate__(self) -> dict[str, Any]:
        return {"_store": self._store, "_limit": self._limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


_ALL_OPEN: weakref.WeakSet[_OpenShards] = weakref.WeakSet()


def _renew_after_fork() -> None:
    """A thread of the parent may have held a lock when the child was made: the child starts with its own."""
    for shards in list(_ALL_OPEN):
        shards._start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)


def read_statistic(store: Store, record: dict[str, Any], name: str) -> np.ndarray:
    """The channel `mean` or `std` of an int8 field's record, float32 [channel]."""
    field = field_from_record(record)
    array = field.array(name)
    path = object_path(field, array, 0, 0)
    try:
        num_bytes, sha256 = int(record["statistics"][name]["bytes"]), str(record["statistics"][name]["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCache(f"the record of {field.name} states no {name}", _REPAIR) from error
    return _decode_chunk(_read_whole(store, path, num_bytes, sha256), array, array.row_shape, store.where(path))


def _read_whole(store: Store, path: str, expected_bytes: int, sha256: str) -> bytes:
    """A small object that is just what was committed: not one that another was swapped with."""
    try:
        size = store.size(path)
        data = store.read(path) if size == expected_bytes else b""
    except FileNotFoundError as error:
        raise CorruptCache(
            f"object {store.where(path)} is missing, its record says {expected_bytes} bytes", _REPAIR
        ) from error
    if size != expected_bytes or len(data) != expected_bytes:
        raise CorruptCache(f"object {store.where(path)} has {size} bytes, its record says {expected_bytes}", _REPAIR)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CorruptCache(f"object {store.where(path)} does not hold the bytes that its record states", _REPAIR)
    return data


def _stated(receipt: Receipt, path: str) -> CommittedObject:
    for committed in receipt.objects:
        if committed.path == path:
            return committed
    raise CorruptCache(
        f"the receipt of {receipt.field} block {receipt.block}-{receipt.view} does not list {path}", _REPAIR
    )


def _decode_chunk(data: bytes, array: ArraySpec, shape: tuple[int, ...], path: str) -> np.ndarray:
    if len(data) < 4 or google_crc32c.value(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise CorruptCache(f"object {path} fails its checksum", _REPAIR)
    dtype = np.dtype(array.dtype)
    if len(data) - 4 != math.prod(shape) * dtype.itemsize:
        raise CorruptCache(
            f"object {path} has {len(data)} bytes, its shape {shape} of {dtype} needs another number", _REPAIR
        )
    values = np.frombuffer(data[:-4], dtype=dtype.newbyteorder("<")).reshape(shape).astype(dtype, copy=False)
    values.flags.writeable = False
    return values
