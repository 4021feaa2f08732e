"""Read a cache: rows by number, committed ones only, from a snapshot taken at open."""

from __future__ import annotations

import hashlib
import math
import shutil
import struct
import tempfile
import threading
import weakref
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
    SOUNDS,
    Segment,
    read_captions,
    read_samples,
    read_segments,
    read_sounds,
    require_segment,
)
from emkum.shards.shard_files import (
    MAPPED_SHARE,
    MAX_OPEN_SHARDS,
    MISSING,
    RENEWED,
    REPAIR,
    Chunks,
    ReadThreads,
    Shard,
    ShardFiles,
    Verify,
    machine_memory_bytes,
    read_chunks,
)
from emkum.shards.store import Store, exists, open_store
from emkum.shards.writer import read_root

PLAIN_SHARE = 0.25  # of the machine's memory: what unsharded arrays may take of it


class Cache:
    """A snapshot of one cache. Later commits are not seen; open again to see them."""

    def __init__(
        self,
        store: Store,
        uuid: str,
        rows_per_block: int,
        segments: Sequence[Segment],
        fields: dict[str, Field],
        plain: _PlainBlocks,
    ) -> None:
        self.store = store
        self.path = store.local or store.url
        self.uuid = uuid
        self.rows_per_block = rows_per_block
        self.segments = tuple(segments)
        self.fields = fields
        self._plain = plain
        self._tables: dict[tuple[str, str], pa.Table] = {}
        self._copies: dict[str, Path] = {}

    @classmethod
    def open(cls, place: Store | Path | str, only: Collection[str] | None = None, verify: Verify = "first") -> Cache:
        """place: a folder, or a URL that fsspec knows. only: names of the fields to open; None: all.

        verify: whether the checksum of a token or crop row is looked at when it is first read, always, or never.
        Raises NotACache, NewerFormat, CorruptCache.
        """
        store = open_store(place)
        uuid, rows_per_block = read_root(store)
        segments = read_segments(store)
        files = ShardFiles(store, MAX_OPEN_SHARDS, verify)
        plain = _PlainBlocks(int(PLAIN_SHARE * machine_memory_bytes()))
        fields: dict[str, Field] = {}
        paths = field_record_paths(store) if only is None else [field_record_path(name) for name in only]
        for path in paths:
            field = Field(store, segments, rows_per_block, read_field_record(store, path), files, plain)
            fields[field.name] = field
        if only is None:
            for name in receipt_fields(store):
                if name not in fields and not exists(store, field_record_path(name)):
                    raise CorruptCache(
                        f"{store.url} has receipts of the field {name}, whose record is missing",
                        "the same extract command writes the record again and keeps the blocks; or restore it from a "
                        "copy of the cache",
                    )
        return cls(store, uuid, rows_per_block, segments, fields, plain)

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
            folder = Path(tempfile.mkdtemp(prefix="emkum-network-"))
            _COPIES.add(folder)
            weakref.finalize(self, _remove_copy, folder)
            for file in self.store.list(model_dir(name)):
                (folder / file).write_bytes(self.store.read(f"{model_dir(name)}/{file}"))
            self._copies[name] = folder
        return self._copies[name]

    @property
    def held_bytes(self) -> int:
        """Memory that unsharded arrays (pooled targets, ids, int8 scales) of all fields take now."""
        return self._plain.num_bytes

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

    def sounds(self, split: str) -> pa.Table:
        """sounds.parquet of all segments of the split, in row order; no lines where there are no sounds."""
        return self._table("sounds", split)

    def _table(self, which: str, split: str) -> pa.Table:
        if split not in self.splits:
            raise UsageError(
                f"{self.path} has no split {split!r}; it has: {', '.join(self.splits) or 'none'}",
                f"add it with `emkum extract --split {split} --data ...`",
            )
        if (which, split) not in self._tables:
            read, schema = _TABLES[which]
            parts = [read(self.store, segment) for segment in self.segments if segment.split == split]
            self._tables[which, split] = pa.concat_tables(parts) if parts else schema.empty_table()
        return self._tables[which, split]


_TABLES = {"samples": (read_samples, SAMPLES), "captions": (read_captions, CAPTIONS), "sounds": (read_sounds, SOUNDS)}
_COPIES: set[Path] = set()


def _remove_copy(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _COPIES.discard(folder)


def remove_copies() -> None:
    """Removes the copies of networks that this process has made, for a process that is about to end at once."""
    for folder in list(_COPIES):
        _remove_copy(folder)


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
        files: ShardFiles,
        plain: _PlainBlocks,
    ) -> None:
        self.record = record
        self.spec: FieldSpec = field_from_record(record)
        self.fingerprint: dict[str, Any] = record["fingerprint"]
        self._store, self._rows_per_block, self._files, self._plain = store, rows_per_block, files, plain
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
                    REPAIR,
                )
        require_fingerprint(store, self.receipts.values(), record["fingerprint_digest"])
        self._statistics: dict[str, np.ndarray] = {}
        self._shards: dict[tuple[int, int], Shard] = {}
        self.reads_in_order = False  # whether blocks are read front to back: then the system may read ahead
        self._is_mapped = files.verify != "always" and self.num_bytes <= MAPPED_SHARE * machine_memory_bytes()

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
        """Views of which at least one block is committed; 1 for fields of texts and sounds."""
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
            blocks = segment.span(self.spec.space).blocks(self._rows_per_block)
            found += [self.block_rows(block, view) for block in blocks]
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def block_rows(self, block: int, view: int = 0) -> np.ndarray:
        """int64: the rows of a block that are committed and not quarantined, ascending."""
        receipt = self.receipts.get((block, view))
        if receipt is None:
            return np.empty(0, np.int64)
        rows = np.arange(receipt.first_row, receipt.first_row + receipt.rows, dtype=np.int64)
        bad = [q.row for q in receipt.quarantined]
        return np.setdiff1d(rows, bad, assume_unique=True) if bad else rows

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

    def read(
        self,
        rows: np.ndarray,
        view: int | np.ndarray = 0,
        out: np.ndarray | None = None,
        threads: ReadThreads | None = None,
    ) -> np.ndarray:
        """Stored numbers [N, *row_shape]; ragged rows are zero past their length.

        out: where to put them, of the storage type. threads: share the reading.
        Raises IncompleteCache for a row that is not committed, CorruptCache for damage.
        """
        rows = np.asarray(rows, dtype=np.int64)
        views = np.broadcast_to(np.asarray(view, dtype=np.int64), rows.shape)
        if out is None:
            out = np.empty((len(rows), *self.row_shape), dtype=self.storage)
        shape = (len(rows), *self.row_shape)
        assert out.shape == shape and out.dtype == self.storage, (out.shape, out.dtype, shape, self.storage)  # noqa: PT018
        if not self.spec.sharded:
            self._read_plain("values", rows, views, out)
        elif out.flags.c_contiguous:
            self._read_sharded(rows, views, out, threads)
        else:
            out[...] = self.read(rows, views, threads=threads)
        return out

    def read_scale(self, rows: np.ndarray, view: int | np.ndarray = 0, out: np.ndarray | None = None) -> np.ndarray:
        """float32 [N, *row_shape[:-1]], int8 fields only."""
        return self._read_sibling("scale", rows, view, out)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """int32 [N]: valid positions of each row, token ids and ragged fields only."""
        return self._read_sibling("length", rows, 0)

    def classes(self, rows: np.ndarray, view: int | np.ndarray = 0, out: np.ndarray | None = None) -> np.ndarray:
        """int32 [N, K]: the classes of the K largest logits, in the order of their values, kind `top_logits` only."""
        return self._read_sibling("classes", rows, view, out)

    def values(self, rows: np.ndarray, view: int | np.ndarray = 0) -> np.ndarray:
        """float32 [N, *row_shape]: what was stored, decoded."""
        stored = self.read(rows, view)
        if self.storage != "int8":
            return stored.astype(np.float32)
        values = decode_int8(stored, self.read_scale(rows, view), self.mean, self.std)
        if self.spec.is_ragged:
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

    # --- unsharded arrays: whole blocks, checked once and kept in RAM ----------------------------------

    def forget_plain(self) -> None:
        """Frees the memory of the unsharded arrays read so far; they are read again when they are asked for."""
        self._plain.forget(self.name)

    def _read_sibling(
        self, name: str, rows: np.ndarray, view: int | np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        array = self.spec.array(name)
        out = np.empty((len(rows), *array.row_shape), dtype=array.dtype) if out is None else out
        self._read_plain(name, rows, np.broadcast_to(np.asarray(view, np.int64), rows.shape), out)
        return out

    def _read_plain(self, name: str, rows: np.ndarray, views: np.ndarray, out: np.ndarray) -> None:
        blocks = rows // self._rows_per_block
        order = np.lexsort((views, blocks))
        changes = np.flatnonzero(np.diff(blocks[order]) | np.diff(views[order])) + 1
        for here in np.split(order, changes) if len(order) else ():
            wanted = rows[here]
            receipt = self._receipt(int(wanted.min()), int(views[here[0]]))
            if wanted.max() >= receipt.first_row + receipt.rows:
                self._receipt(int(wanted.max()), receipt.view)
            if receipt.quarantined:
                bad = np.intersect1d(wanted, [q.row for q in receipt.quarantined])
                if len(bad):
                    self._refuse_quarantined(receipt, int(bad[0]))
            out[here] = self._plain_rows(name, receipt, wanted - receipt.first_row)

    def _plain_rows(self, name: str, receipt: Receipt, local: np.ndarray) -> np.ndarray:
        array = self.spec.array(name)
        path = object_path(self.spec, array, receipt.block, receipt.view)
        block = self._plain.get(self.name, path)
        trusted = self._files.verify != "always" and self._plain.was_checked(self.name, path)
        if block is None and trusted and 8 * len(local) < self._rows_per_block:
            return self._rows_from_file(array, path, _stated(receipt, path), local)
        if block is None:
            data = _read_whole(self._store, path, _stated(receipt, path).bytes, _stated(receipt, path).sha256)
            shape = (self._rows_per_block, *array.row_shape)
            block = _decode_chunk(data, array, shape, self._store.where(path))
            self._plain.keep(self.name, path, block)
        found: np.ndarray = block[local]
        return found

    def _rows_from_file(self, array: ArraySpec, path: str, stated: CommittedObject, local: np.ndarray) -> np.ndarray:
        """Rows of a block that was checked as a whole, and for which there is no room in memory."""
        try:
            file = self._store.open(path)
        except FileNotFoundError as error:
            raise CorruptCache(
                f"object {self._store.where(path)} is missing, its receipt says {stated.bytes} bytes", REPAIR
            ) from error
        rows = np.empty((len(local), *array.row_shape), np.dtype(array.dtype).newbyteorder("<"))
        for i, row in enumerate(local.tolist()):
            piece = rows[i : i + 1].reshape(-1).view(np.uint8).data
            if file.size != stated.bytes or file.read_into([piece], row * array.row_bytes) != array.row_bytes:
                raise CorruptCache(
                    f"object {self._store.where(path)} has {file.size} bytes, its receipt says {stated.bytes}", REPAIR
                )
        return rows.astype(array.dtype, copy=False)

    def _static(self, name: str) -> np.ndarray:
        if name not in self._statistics:  # no lock, which a fork could leave held: two threads may both read it
            self._statistics[name] = read_statistic(self._store, self.record, name)
        return self._statistics[name]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}

    def _refuse_quarantined(self, receipt: Receipt, row: int) -> None:
        found = next((q for q in receipt.quarantined if q.row == row), None)
        if found is None:
            raise CorruptCache(
                f"{self._store.url} field {self.name} holds nothing of row {row}, which its receipt says is there",
                REPAIR,
            )
        raise IncompleteCache(
            f"{self._store.url} field {self.name}: row {row} ({found.tar}, {found.key}) is quarantined: {found.reason}",
            "take rows from Field.rows()",
        )

    # --- sharded values: straight from the file --------------------------------------------------------

    def _read_sharded(self, rows: np.ndarray, views: np.ndarray, out: np.ndarray, threads: ReadThreads | None) -> None:
        values = self.spec.array("values")
        if self.spec.is_ragged:
            tiles = -(-self.lengths(rows) // TEXT_TILE)
            for i, count in enumerate(tiles.tolist()):
                out[i, count * TEXT_TILE :] = 0
        else:
            tiles = np.ones(len(rows), np.int64)
        chunk_row = np.repeat(np.arange(len(rows)), tiles)  # of each chunk, its place in `rows`
        tile = np.arange(len(chunk_row)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
        blocks, local = np.divmod(rows, self._rows_per_block)
        numbers = local[chunk_row] * values.tiles + tile
        targets = chunk_row * values.row_bytes + tile * values.inner_bytes
        order = np.lexsort((numbers, views[chunk_row], blocks[chunk_row]))
        chunk_row, numbers, targets = chunk_row[order], numbers[order], targets[order]
        block_of, view_of = blocks[chunk_row], views[chunk_row]
        changes = np.flatnonzero((np.diff(block_of) != 0) | (np.diff(view_of) != 0)) + 1
        edges = [0, *changes.tolist(), len(numbers)]
        starts = edges[:-1] if len(numbers) else []
        shards = self._opened([(int(rows[chunk_row[start]]), int(view_of[start])) for start in starts], threads)
        places, checked = np.empty(len(numbers), np.int64), np.empty(len(numbers), bool)
        for shard, start, stop in zip(shards, starts, edges[1:], strict=False):
            places[start:stop] = shard.places[numbers[start:stop]]
            checked[start:stop] = shard.checked[numbers[start:stop]]
        absent = np.flatnonzero(places == MISSING)
        if len(absent):
            first = int(absent[0])
            self._refuse_absent(int(rows[chunk_row[first]]), int(view_of[first]), int(numbers[first]))
        shard_of = np.repeat(np.arange(len(shards)), np.diff(edges)) if shards else np.empty(0, np.int64)
        memory = out.reshape(-1).view(np.uint8)
        chunks = Chunks(shards, shard_of, numbers, places, targets, checked)
        read_chunks(self._files, chunks, memory, threads)

    def _opened(self, rows: list[tuple[int, int]], threads: ReadThreads | None) -> list[Shard]:
        """The shard of each (row, view); the indices of those that are new are read by all threads together."""
        new = [(row, view) for row, view in rows if (row // self._rows_per_block, view) not in self._shards]
        threads = threads or self._files.threads()
        if threads is not None and len(new) > 1:

            def open_some(start: int, stop: int) -> None:
                for row, view in new[start:stop]:
                    self._shard(row, view)

            threads.share(open_some, len(new))
        return [self._shard(row, view) for row, view in rows]

    def _shard(self, row: int, view: int) -> Shard:
        key = row // self._rows_per_block, view
        shard = self._shards.get(key)
        if shard is None:
            receipt, array = self._receipt(row, view), self.spec.array("values")
            path = object_path(self.spec, array, receipt.block, view)
            grid = self._rows_per_block, array.tiles
            stated, in_order = _stated(receipt, path), self.reads_in_order
            shard = Shard(self._files, path, stated, grid, array.inner_bytes, self._is_mapped, in_order)
            for quarantined in receipt.quarantined:
                local = quarantined.row % self._rows_per_block
                shard.places[local * array.tiles : (local + 1) * array.tiles] = MISSING
            shard = self._shards.setdefault(key, shard)  # another thread may have been as quick
        return shard

    def _refuse_absent(self, row: int, view: int, number: int) -> None:
        receipt = self._receipt(row, view)
        if self.spec.is_ragged and not any(q.row == row for q in receipt.quarantined):
            path = object_path(self.spec, self.spec.array("values"), receipt.block, view)
            tile = number % self.spec.array("values").tiles
            length = int(self.lengths(np.array([row]))[0])
            raise CorruptCache(
                f"{self._store.where(path)} lacks tile {tile} of row {row}, whose length is {length}", REPAIR
            )
        self._refuse_quarantined(receipt, row)


class _PlainBlocks:
    """Unsharded blocks in memory, shared by the fields of a cache: as many as fit, the oldest dropped first."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._blocks: dict[tuple[str, str], np.ndarray] = {}
        self._checked: set[tuple[str, str]] = set()
        self.num_bytes = 0
        self.renew_after_fork()
        RENEWED.add(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.Lock()

    def get(self, field: str, path: str) -> np.ndarray | None:
        return self._blocks.get((field, path))

    def was_checked(self, field: str, path: str) -> bool:
        return (field, path) in self._checked

    def keep(self, field: str, path: str, block: np.ndarray) -> None:
        with self._lock:
            self._checked.add((field, path))
            if (field, path) in self._blocks:
                return
            self._blocks[field, path] = block
            self.num_bytes += block.nbytes
            while self.num_bytes > self._limit_bytes and len(self._blocks) > 1:
                self._drop(next(iter(self._blocks)))

    def forget(self, field: str) -> None:
        with self._lock:
            for key in [key for key in self._blocks if key[0] == field]:
                self._drop(key)

    def _drop(self, key: tuple[str, str]) -> None:
        self.num_bytes -= self._blocks.pop(key).nbytes

    def __getstate__(self) -> dict[str, Any]:
        return {"_limit_bytes": self._limit_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_limit_bytes"])  # type: ignore[misc]


def read_statistic(store: Store, record: dict[str, Any], name: str) -> np.ndarray:
    """The channel `mean` or `std` of an int8 field's record, float32 [channel]."""
    field = field_from_record(record)
    array = field.array(name)
    path = object_path(field, array, 0, 0)
    try:
        num_bytes, sha256 = int(record["statistics"][name]["bytes"]), str(record["statistics"][name]["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCache(f"the record of {field.name} states no {name}", REPAIR) from error
    return _decode_chunk(_read_whole(store, path, num_bytes, sha256), array, array.row_shape, store.where(path))


def _read_whole(store: Store, path: str, expected_bytes: int, sha256: str) -> bytes:
    """A small object that is just what was committed: not one that another was swapped with."""
    try:
        size = store.size(path)
        data = store.read(path) if size == expected_bytes else b""
    except FileNotFoundError as error:
        raise CorruptCache(
            f"object {store.where(path)} is missing, its record says {expected_bytes} bytes", REPAIR
        ) from error
    if size != expected_bytes or len(data) != expected_bytes:
        raise CorruptCache(f"object {store.where(path)} has {size} bytes, its record says {expected_bytes}", REPAIR)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CorruptCache(f"object {store.where(path)} does not hold the bytes that its record states", REPAIR)
    return data


def _stated(receipt: Receipt, path: str) -> CommittedObject:
    for committed in receipt.objects:
        if committed.path == path:
            return committed
    raise CorruptCache(
        f"the receipt of {receipt.field} block {receipt.block}-{receipt.view} does not list {path}", REPAIR
    )


def _decode_chunk(data: bytes, array: ArraySpec, shape: tuple[int, ...], path: str) -> np.ndarray:
    if len(data) < 4 or google_crc32c.value(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise CorruptCache(f"object {path} fails its checksum", REPAIR)
    dtype = np.dtype(array.dtype)
    if len(data) - 4 != math.prod(shape) * dtype.itemsize:
        raise CorruptCache(
            f"object {path} has {len(data)} bytes, its shape {shape} of {dtype} needs another number", REPAIR
        )
    values = np.frombuffer(data[:-4], dtype=dtype.newbyteorder("<")).reshape(shape).astype(dtype, copy=False)
    values.flags.writeable = False
    return values
