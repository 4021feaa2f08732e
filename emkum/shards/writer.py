"""Write a cache: create it, declare fields, and commit one block at a time, whole or not at all."""

from __future__ import annotations

import hashlib
import struct
import uuid as uuid_module
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import google_crc32c
import numpy as np

from emkum.errors import CorruptCache, FingerprintMismatch, IdentityMismatch, NewerFormat, NotACache
from emkum.shards.claims import Claims, block_of
from emkum.shards.codec import Encoded, Summary
from emkum.shards.fingerprint import Fingerprint, require_same
from emkum.shards.layout import (
    ABSENT,
    DEFAULT_ROWS_PER_BLOCK,
    FORMAT,
    MAX_ROWS_PER_BLOCK,
    RECORDS,
    SPACES,
    ArraySpec,
    FieldSpec,
    array_metadata,
    canonical_json,
    field_from_record,
    field_record_path,
    group_metadata,
    model_dir,
    object_path,
    pretty_json,
    receipt_path,
    root_metadata,
)
from emkum.shards.ledger import (
    CommittedObject,
    Quarantined,
    Receipt,
    field_record_paths,
    last_block,
    read_field_record,
    read_receipt,
    read_receipts,
    receipt_bytes,
    require_fingerprint,
    with_digest,
    write_receipt,
)
from emkum.shards.segments import Segment, Span, append_segment, read_segments, require_segment
from emkum.shards.store import Store, exists, open_store, read_small, sha256_of
from emkum.shards.strict_json import loads
from emkum.shards.tars import SourceTar
from emkum.shards.views import ViewPolicy

NETWORK_FILES = "files.json"
MARKS = 4  # chunks of a shard whose checksums its receipt repeats


def read_root(store: Store) -> tuple[str, int]:
    """(uuid, rows per block) of a cache. Raises NotACache, NewerFormat, CorruptCache."""
    try:
        data = read_small(store, "zarr.json")
    except ValueError as error:
        raise CorruptCache(f"{store.where('zarr.json')} cannot be read: {error}", _RESTORE) from error
    except FileNotFoundError:
        if "segments" in store.list(RECORDS):
            raise CorruptCache(f"{store.where('zarr.json')} is missing", _RESTORE) from None
        raise NotACache(
            f"{store.url} holds no emkum cache (no zarr.json)",
            "make one with `emkum extract`, or point --cache at the right folder",
        ) from None
    try:
        attributes = loads(data)["attributes"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCache(f"{store.where('zarr.json')} cannot be read: {error}", _RESTORE) from error
    if not isinstance(attributes, dict) or not isinstance(attributes.get("emkum"), dict):
        raise NotACache(f"{store.url} is a Zarr group, but not an emkum cache", "point --cache at another folder")
    ours = attributes["emkum"]
    try:
        format_version, uuid, rows = ours["format"], ours["uuid"], ours["rows_per_block"]
        sealed = {key: value for key, value in ours.items() if key != "digest"}
        actual = hashlib.sha256(canonical_json(sealed)).hexdigest()
        if type(format_version) is int and format_version > FORMAT:
            raise NewerFormat(
                f"{store.url} has cache format {format_version}; this emkum reads up to {FORMAT}"
                + ("" if ours.get("digest", actual) == actual else " (or zarr.json is damaged: its digest disagrees)"),
                "use the newer emkum that wrote it: pip install --upgrade emkum",
            )
        if ours.get("digest", actual) != actual:  # caches of emkum 0.1 have none
            raise ValueError(f"it was altered: its digest is {actual[:12]}..., it states {str(ours['digest'])[:12]}...")
        if type(format_version) is not int:
            raise ValueError(f"it states format {format_version!r}")
        if type(rows) is not int or not 0 < rows <= MAX_ROWS_PER_BLOCK or rows % 16 or not isinstance(uuid, str):
            raise ValueError(f"it states blocks of {rows!r} rows and uuid {uuid!r}")
    except (KeyError, ValueError, TypeError) as error:
        raise CorruptCache(f"{store.where('zarr.json')} cannot be trusted: {error}", _RESTORE) from error
    return uuid, rows


_RESTORE = "restore it from a copy of the cache"


def require_cache_or_empty(store: Store) -> bool:
    """Whether a cache lies there. Raises NotACache, and changes nothing, where something else does."""
    found = store.list("")
    if "zarr.json" in found:
        return True
    if "segments" in store.list(RECORDS):
        raise CorruptCache(f"{store.where('zarr.json')} is missing", _RESTORE)
    ours = (RECORDS, "lost+found")
    if any(name not in ours and not name.startswith(".") for name in found):
        raise NotACache(
            f"{store.url} is not empty and holds no emkum cache",
            "choose another folder with --cache; nothing in it was changed",
        )
    return False


class CacheWriter:
    """The only planner of a cache. Opens it, or creates it with `rows_per_block`.

    Whoever writes from several processes holds `claims.Claims.planning` meanwhile, and a claim on every block it
    commits. Raises NotACache, NewerFormat, CorruptCache; IdentityMismatch if the cache has other blocks.
    """

    def __init__(
        self, place: Store | Path | str, rows_per_block: int | None = None, check: Callable[[], None] = lambda: None
    ) -> None:
        self.store = open_store(place)
        self._check = check  # called before every change; raises ClaimLost if another process is planning by now
        self.path = self.store.local or self.store.url
        if not require_cache_or_empty(self.store):
            self._create(rows_per_block)
        self.uuid, self.rows_per_block = read_root(self.store)
        self.segments = read_segments(self.store)
        if rows_per_block not in (None, self.rows_per_block):
            if self.segments:
                raise IdentityMismatch(
                    f"{self.store.url} has blocks of {self.rows_per_block} rows; this run asks for {rows_per_block}",
                    "leave --rows-per-block out, or write to another folder with --cache",
                )
            self._create(rows_per_block)  # nothing is in it yet
            self.uuid, self.rows_per_block = read_root(self.store)

    def _create(self, rows_per_block: int | None) -> None:
        rows = rows_per_block or DEFAULT_ROWS_PER_BLOCK
        data = pretty_json(root_metadata(uuid_module.uuid4().hex, rows))
        self._check()
        if exists(self.store, "zarr.json"):
            self.store.write("zarr.json", data)
        else:
            self.store.create("zarr.json", data)

    def keep_network(self, name: str, files: Mapping[str, bytes]) -> None:
        """Keeps a frozen network's files, unless one of this name is kept; files.json says what they must be."""
        listed = {n: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in files.items()}
        record = {NETWORK_FILES: pretty_json(with_digest({"files": listed}))}
        self._check()
        folder, whole = model_dir(name), record | dict(files)  # model.json, by which it is known, last
        if not self.store.create_folder(folder, whole) and not exists(self.store, f"{folder}/model.json"):
            for remainder in self.store.list(folder):  # of a repair that was killed
                self.store.remove(f"{folder}/{remainder}")
            self.store.create_folder(folder, whole)

    def append_segment(self, split: str, views: ViewPolicy, tars: Sequence[SourceTar]) -> Segment:
        """Adds the samples of `tars`; rows exist from now on, their blocks are committed one by one.

        Raises CorruptCache if blocks lie where the new ones would: they belong to a segment that was lost.
        """
        self._check()
        self.require_segments()
        segment = append_segment(self.store, self.segments, split, views, tars, self.rows_per_block)
        self.segments.append(segment)
        return segment

    def require_segments(self) -> None:
        """Raises CorruptCache if a field has blocks of a segment that is not there."""
        ends = {
            space: max((s.span(space).blocks(self.rows_per_block).stop for s in self.segments), default=0)
            for space in SPACES
        }
        for path in field_record_paths(self.store):
            try:
                field = field_from_record(read_field_record(self.store, path))
            except CorruptCache:  # `verify` and whoever opens it speak of it
                continue
            if last_block(self.store, field.name) >= ends[field.space]:
                require_segment(self.store, len(self.segments), field.name)

    def field_record(self, name: str) -> dict[str, Any] | None:
        """The record of a field that exists, or None."""
        path = field_record_path(name)
        return read_field_record(self.store, path) if exists(self.store, path) else None

    def declare_field(
        self,
        field: FieldSpec,
        fingerprint: Fingerprint,
        environment: dict[str, Any],
        statistics: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """Writes a field's record before its first byte, or checks it against the one that is there.

        statistics: float32 channel mean and std, for int8 only.
        Raises FingerprintMismatch with the differences in words; nothing is changed then.
        """
        record = self.field_record(field.name)
        if record is not None:
            require_same(field.name, record["fingerprint"], fingerprint, self.store.url)
            if field_from_record(record) != field:
                cached = field_from_record(record).row_shape
                raise FingerprintMismatch(
                    f"{self.store.url} field {field.name} holds rows of {cached}; this run gives {field.row_shape}",
                    "write to another folder with --cache",
                )
            return
        self._require_no_others_blocks(field, fingerprint)
        self._check()
        static = {}
        if field.storage == "int8":
            assert statistics is not None
            for name, values in zip(("mean", "std"), statistics, strict=True):
                array = field.array(name)
                assert values.shape == array.row_shape, (field.name, name, values.shape)
                self._write_array_metadata(field, array, 0, 0)
                listed = self._write_chunk(field, array, values, 0, 0, self._check)
                static[name] = {"path": listed.path, "bytes": listed.bytes, "sha256": listed.sha256}
        record = {
            "field": field.name,
            "kind": field.kind,
            "space": field.space,
            "arrays": {a.name: {"dtype": a.dtype, "row_shape": list(a.row_shape)} for a in field.arrays if a.per_row},
            "fingerprint": fingerprint.to_json(),
            "fingerprint_digest": fingerprint.digest,
            "statistics": static,
            "environment": environment,
        }
        self._check()
        self.store.write(field_record_path(field.name), pretty_json(with_digest(record)))

    def _require_no_others_blocks(self, field: FieldSpec, fingerprint: Fingerprint) -> None:
        """Blocks of a field whose record was lost may only be taken over by the settings that made them."""
        for receipt in read_receipts(self.store, field.name).values():
            if receipt.fingerprint_digest != fingerprint.digest:
                raise FingerprintMismatch(
                    f"{self.store.url} field {field.name} has lost its record, and its blocks were made with "
                    f"fingerprint {receipt.fingerprint_digest[:12]}...; this run has {fingerprint.digest[:12]}...",
                    "repeat the command that made the field, restore its record from a copy of the cache, or write to "
                    "another folder with --cache",
                )

    def grow_field(self, field: FieldSpec, num_views: int) -> None:
        """Writes or widens the Zarr metadata of a declared field so that it covers all segments."""
        last = self.segments[-1].span(field.space)
        num_blocks = last.blocks(self.rows_per_block).stop
        record = self.field_record(field.name)
        assert record is not None
        folder = ""
        for part in field.name.split("/")[:-1]:
            folder += f"{part}/"
            self._write_if_other(f"{folder}zarr.json", pretty_json(group_metadata()))
        attributes = {"emkum": {"field": field.name, "fingerprint_digest": record["fingerprint_digest"]}}
        self._write_if_other(f"{field.name}/zarr.json", pretty_json(group_metadata(attributes)))
        for array in field.arrays:
            if array.per_row:
                self._write_array_metadata(field, array, num_blocks, num_views)

    def receipts(self, field: str) -> dict[tuple[int, int], Receipt]:
        """The field's committed blocks, by (block, view)."""
        found = read_receipts(self.store, field)
        record = self.field_record(field) if found else None
        if record is not None:
            require_fingerprint(self.store, found.values(), record["fingerprint_digest"])
        return found

    def clear_unfinished(self, claims: Claims) -> None:
        """Removes what dead processes left of blocks, and their claims. The caller alone is planning."""
        for key in claims.dead_keys():
            claim = claims.take(key)
            if claim is not None:
                self.clear_block(key)
                claim.release()

    def clear_block(self, key: str) -> None:
        """Removes what a dead process left of a block in any field: objects without a receipt, and a receipt that lists
        other bytes than lie there. The caller holds the claim on `key`.
        """
        space, block, view = block_of(key)
        for path in field_record_paths(self.store):
            try:
                field = field_from_record(read_field_record(self.store, path))
            except CorruptCache:  # another field's, or ours: whoever opens it, and `verify`, speak of it
                continue
            if field.space == space and not self._holds_together(field.name, block, view):
                self.store.remove(receipt_path(field.name, block, view))
                for array in field.arrays:
                    if array.per_row:
                        self.store.remove(object_path(field, array, block, view))

    def _holds_together(self, field: str, block: int, view: int) -> bool:
        """Whether a block has a receipt, and its objects are those it lists."""
        try:
            receipt = read_receipt(self.store, receipt_path(field, block, view))
            return all(sha256_of(self.store, o.path) == (o.bytes, o.sha256) for o in receipt.objects)
        except (FileNotFoundError, CorruptCache):
            return False

    def is_committed(self, field: str, block: int, view: int) -> bool:
        return exists(self.store, receipt_path(field, block, view))

    def block(
        self, field: FieldSpec, segment: Segment, block: int, view: int, check: Callable[[], None] = lambda: None
    ) -> BlockWriter:
        """A writer of one block of one view, for the rows of `segment` in it.

        check: called before everything that is made durable; raises ClaimLost to stop it.
        """
        record = self.field_record(field.name)
        assert record is not None, f"{field.name} was not declared"
        return BlockWriter(self, field, segment, block, view, record["fingerprint_digest"], check)

    def _write_array_metadata(self, field: FieldSpec, array: ArraySpec, num_blocks: int, num_views: int) -> None:
        path = f"{field.name}/{array.name}/zarr.json"
        if array.per_row and exists(self.store, path):
            try:
                shape = [int(extent) for extent in loads(self.store.read(path))["shape"]]
                num_blocks = max(num_blocks, shape[0] // self.rows_per_block)
                num_views = max(num_views, shape[1]) if field.has_views else num_views
            except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
                raise CorruptCache(
                    f"{self.store.where(path)} cannot be read: {error}",
                    f"`emkum cache repair {self.store.url}` writes it again",
                ) from error
        metadata = array_metadata(field, array, num_blocks, num_views, self.rows_per_block)
        self._write_if_other(path, pretty_json(metadata))

    def _write_if_other(self, path: str, data: bytes) -> None:
        try:
            same = self.store.read(path) == data
        except FileNotFoundError:
            same = False
        if not same:
            self._check()
            self.store.write(path, data)

    def _write_chunk(
        self,
        field: FieldSpec,
        array: ArraySpec,
        values: np.ndarray,
        block: int,
        view: int,
        check: Callable[[], None] = lambda: None,
    ) -> CommittedObject:
        """One unsharded object: the little-endian bytes and their crc32c."""
        path = object_path(field, array, block, view)
        data = _bytes_of(np.asarray(values, dtype=array.dtype))
        with self.store.writer(path) as file:
            file.write(data.data)
            file.write(struct.pack("<I", google_crc32c.value(data)))
            check()
            return CommittedObject(path, file.num_bytes, file.commit())


class BlockWriter:
    """One block of one view of one field: rows in order, then `commit`. Holds one batch in memory for token fields.

    Every row of the segment in the block must come exactly once, through `append` or `quarantine`.
    Leaving the context without `commit` leaves no trace.
    """

    def __init__(
        self,
        cache: CacheWriter,
        field: FieldSpec,
        segment: Segment,
        block: int,
        view: int,
        fingerprint_digest: str,
        check: Callable[[], None],
    ) -> None:
        self._cache, self._field, self._segment, self._check = cache, field, segment, check
        self._block, self._view, self._fingerprint_digest = block, view, fingerprint_digest
        span: Span = segment.span(field.space)
        self._first_row, self._num_rows = span.block_rows(block, cache.rows_per_block)
        self._row = 0  # rows seen so far
        self._summary = Summary()
        self._quarantined: list[Quarantined] = []
        self._values = field.array("values")
        self._plain = {
            array.name: _filled((cache.rows_per_block, *array.row_shape), array.dtype)
            for array in field.arrays
            if array.per_row and array.inner is None
        }
        self._shard = None
        if self._values.inner is not None:
            self._shard = cache.store.writer(object_path(field, self._values, block, view))
            self._offset = 0  # of the next chunk
            self._chunks: list[tuple[int, int]] = []  # number and crc32c of every chunk written
            self._index = np.full((cache.rows_per_block, self._values.tiles, 2), ABSENT, dtype="<u8")

    def append(self, rows: Encoded) -> None:
        """The next `len(rows.values)` rows."""
        count = len(rows.values)
        assert self._row + count <= self._num_rows, f"{self._field.name}: more rows than the block holds"
        assert rows.values.shape[1:] == self._field.row_shape, (rows.values.shape, self._field.row_shape)
        assert rows.values.dtype == np.dtype(self._field.storage), (rows.values.dtype, self._field.storage)
        here = slice(self._row, self._row + count)
        if rows.length is not None and "length" in self._plain:
            self._plain["length"][here] = rows.length
        if rows.scale is not None:
            self._plain["scale"][here] = rows.scale
            if rows.length is not None and rows.scale.ndim == 2:
                self._plain["scale"][here][_past(rows.length, rows.scale.shape[1])] = np.nan
        if rows.classes is not None:
            self._plain["classes"][here] = rows.classes
        if self._shard is not None:
            self._shard.write_all(self._chunks_of(rows))
        else:
            values = rows.values
            if rows.length is not None and self._field.has_length:
                values = np.where(_past(rows.length, values.shape[1]), 0, values)
            self._plain["values"][here] = values
        self._row += count
        self._summary = self._summary + rows.summary

    def add_summary(self, summary: Summary) -> None:
        """Adds the statistics of rows that were appended without theirs."""
        self._summary = self._summary + summary

    def quarantine(self, tar: str, key: str, reason: str) -> None:
        """The next row is left out; readers never return it."""
        assert self._row < self._num_rows
        self._quarantined.append(Quarantined(self._first_row + self._row, tar, key, reason))
        self._row += 1

    def commit(self) -> Receipt:
        """Makes the block's objects durable, then its receipt. The block exists once this returns.

        Raises ClaimLost, and commits nothing more, if another process works on the block by now.
        """
        assert self._row == self._num_rows, f"{self._field.name}: {self._row} of {self._num_rows} rows were given"
        objects = []
        if self._shard is not None:
            index = self._index.tobytes()
            self._shard.write(index)
            self._shard.write(struct.pack("<I", google_crc32c.value(index)))
            path = object_path(self._field, self._values, self._block, self._view)
            self._check()
            objects.append(CommittedObject(path, self._shard.num_bytes, self._shard.commit(), _spread(self._chunks)))
        for name, values in self._plain.items():
            array = self._field.array(name)
            chunk = self._cache._write_chunk(self._field, array, values, self._block, self._view, self._check)
            objects.append(chunk)
        receipt = Receipt(
            self._field.name,
            self._block,
            self._view,
            self._segment.number,
            self._first_row,
            self._num_rows,
            self._fingerprint_digest,
            tuple(objects),
            _statistics(self._summary),
            _error(self._field, self._summary),
            tuple(self._quarantined),
        )
        self._check()
        if not write_receipt(self._cache.store, receipt):
            self._check()  # whoever wrote the other receipt had lost the claim: the objects that lie there are ours
            self._cache.store.write(self._receipt_path, receipt_bytes(receipt))
        self._check()  # lost by now: whoever took over, or clears up after it, compares receipt and objects
        return receipt

    @property
    def _receipt_path(self) -> str:
        return receipt_path(self._field.name, self._block, self._view)

    def _chunks_of(self, rows: Encoded) -> Iterator[memoryview]:
        """The rows' chunks, each followed by its crc32c: one a row, or the tiles of text that its length reaches."""
        assert self._values.inner is not None
        size, tiles, positions = self._values.inner_bytes, self._values.tiles, self._values.inner[0]
        data = _bytes_of(rows.values).reshape(len(rows.values), tiles, size)
        for i, row in enumerate(data):
            num_tiles, past = tiles, 0  # past: bytes of the last tile at or past the length
            if rows.length is not None:
                num_tiles = -(-int(rows.length[i]) // positions)
                past = (num_tiles * positions - int(rows.length[i])) * (size // positions)
            for tile in range(num_tiles):
                chunk = row[tile]
                if past and tile == num_tiles - 1:
                    chunk = chunk.copy()
                    chunk[-past:] = 0
                checksum = google_crc32c.value(chunk)
                self._index[self._row + i, tile] = (self._offset, size + 4)
                self._offset += size + 4
                self._chunks.append(((self._row + i) * tiles + tile, checksum))
                yield chunk.data
                yield memoryview(struct.pack("<I", checksum))

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard is not None:
            self._shard.__exit__(kind, error, trace)


def _spread(chunks: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """At most MARKS of them, from the first to the last."""
    places = np.linspace(0, len(chunks) - 1, min(MARKS, len(chunks))).astype(int)
    return tuple(chunks[place] for place in places.tolist())


def _bytes_of(values: np.ndarray) -> np.ndarray:
    """uint8 [n]: the numbers as they are stored, little-endian and in C order; not copied if they lie so."""
    stored = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return stored.reshape(-1).view(np.uint8)


def _filled(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.full(shape, np.nan if dtype.startswith("float") else 0, dtype=dtype)


def _past(length: np.ndarray, positions: int) -> np.ndarray:
    """bool [N, positions]: at or past each row's length."""
    return np.arange(positions) >= length[:, None]


def _statistics(summary: Summary) -> dict[str, float] | None:
    if summary.count == 0:
        return None
    return {"min": summary.minimum, "max": summary.maximum, "mean": summary.total / summary.count}


def _error(field: FieldSpec, summary: Summary) -> dict[str, float] | None:
    if field.storage not in ("float16", "int8") or summary.count == 0:
        return None
    return {"relative_l2": summary.relative_l2, "max_abs": summary.max_abs_error}
