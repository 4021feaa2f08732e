"""Reads every byte of a cache and says what is damaged, whom it hits, and what undoes it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import numpy as np

from emkum.errors import CorruptCache
from emkum.shards.bad_sectors import CheckedStore, Unreadable
from emkum.shards.block_check import check_block, largest_statistics, stated_objects
from emkum.shards.claims import CLAIMS, block_key
from emkum.shards.layout import (
    FORMAT,
    MAX_VIEWS,
    RECORDS,
    SPACES,
    ArraySpec,
    FieldSpec,
    Space,
    array_metadata,
    field_from_record,
    field_record_path,
    group_metadata,
    model_dir,
    object_path,
    pretty_json,
    receipt_path,
    segment_dir,
)
from emkum.shards.ledger import REQUESTS_AT_A_TIME, Receipt, read_field_record, read_receipt, without_digest
from emkum.shards.reader import read_statistic
from emkum.shards.record_check import (
    check_captions,
    check_root,
    check_samples,
    check_sounds,
    wrong_files,
    wrong_place,
    wrong_receipt,
    wrong_record,
    wrong_segment,
)
from emkum.shards.row_names import RowNames, read_row_names, table_bytes
from emkum.shards.segments import Segment, read_segment
from emkum.shards.statistics.check import check_statistics
from emkum.shards.statistics.kept import STATISTICS
from emkum.shards.store import Store, sha256_of
from emkum.shards.strict_json import loads
from emkum.shards.writer import NETWORK_FILES, read_root

HINTS = f"{RECORDS}/hints/scans.json"
MAX_DEPTH = 12  # of folders: a field's name has at most eight parts
_RECEIPT = re.compile(r"([0-9]{6,})-([0-9]+)\.json")
_RESTORE = "restore it from a copy of the cache"
_NOTHING_LOST = "restore it from a copy of the cache, or extract the tars into another folder with --cache"

Progress = Callable[[int, int], None]  # bytes checked so far, bytes of all committed objects


@dataclass(frozen=True)
class Finding:
    """One damaged or missing thing.

    path: of the object or record, from the root of the cache. rows: (first, end) of the runs of rows that suffer, of
    one segment and space. drop, rewrite: what `repair` removes, first to last, and writes; with neither, a repairable
    thing is written again by the next extract as it is.
    """

    path: str
    what: str
    way_out: str
    field: str | None = None
    block: int | None = None
    view: int | None = None
    segment: int | None = None
    space: Space | None = None
    rows: tuple[tuple[int, int], ...] = ()
    repairable: bool = False
    drop: tuple[str, ...] = ()
    rewrite: tuple[tuple[str, bytes], ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(end - first for first, end in self.rows)

    def row_numbers(self) -> Iterator[int]:
        for first, end in self.rows:
            yield from range(first, end)


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    sealed: every record of the cache carries a digest. incomplete: field -> blocks that are not committed yet, which
    is no damage; nor are notes.
    """

    url: str
    sealed: bool
    findings: tuple[Finding, ...]
    segments: int = 0
    fields: int = 0
    blocks: int = 0
    objects: int = 0
    bytes: int = 0
    networks: int = 0
    incomplete: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()  # of the rows that suffer
    statistics: int = 0


def verify(store: Store, *, threads: int | None = None, progress: Progress = lambda done, total: None) -> Report:
    """Checks everything there is. Damage never raises; it is collected.

    Memory: one chunk of each thread, the names of all files and the receipts. Raises NotACache, NewerFormat, and
    StorageFailure of a storage that does not answer.
    """
    return _Audit(store, threads or min(4, os.cpu_count() or 1), progress).run()


def sample_keys(store: Store, findings: Sequence[Finding]) -> list[list[tuple[str, str]]]:
    """(tar, key) of each finding's rows, in their order. Empty where the segment's own tables are damaged.

    Every table is read once, and one at a time.
    """
    found: list[list[tuple[str, str]]] = [[] for _ in findings]
    by_table: dict[tuple[int, Space], list[int]] = defaultdict(list)
    for index, finding in enumerate(findings):
        if finding.segment is not None and finding.space is not None and finding.rows:
            by_table[finding.segment, finding.space].append(index)
    for (number, space), indices in sorted(by_table.items()):
        with contextlib.suppress(CorruptCache, ValueError):
            names = read_row_names(_checked(store), read_segment(_checked(store), number), space)
            for index in indices:
                found[index] = names.of(list(findings[index].row_numbers()))
    return found


def _checked(store: Store) -> Store:
    return cast(Store, CheckedStore(store))


def first_rows(finding: Finding, count: int) -> Finding:
    """The finding of its first rows alone."""
    found = []
    for first, end in finding.rows:
        found.append((first, min(end, first + count)))
        count -= found[-1][1] - first
        if not count:
            break
    return dataclasses.replace(finding, rows=tuple(found))


@dataclass(frozen=True)
class _Block:
    """A committed block whose receipt holds together."""

    spec: FieldSpec
    path: str  # of the receipt
    receipt: Receipt


@dataclass
class _KnownField:
    spec: FieldSpec
    record: dict[str, Any]
    largest: tuple[float, float] = (0.0, 0.0)
    committed: set[tuple[int, int]] = field(default_factory=set)


class _Audit:
    """One run over one cache. Records are read after the listing, so that a cache that grows meanwhile is whole."""

    def __init__(self, store: Store, threads: int, progress: Progress) -> None:
        self._store, self._threads, self._progress = _checked(store), threads, progress
        self._root_store = store
        self._findings: list[Finding] = []
        self._notes: list[str] = []
        self._lock = threading.Lock()
        self._sealed = False
        self._rows_per_block = 0
        self._files: dict[str, int] = {}
        self._claims: frozenset[str] = frozenset()
        self._owned: set[str] = set()
        self._segments: dict[int, Segment | None] = {}  # None: damaged
        self._fields: dict[str, _KnownField] = {}
        self._segment_lost = False  # receipts belong to one that is not there
        self._lost_fields: set[str] = set()  # whose record is damaged
        self._blocks: list[_Block] = []
        self._done_bytes = self._all_bytes = self._num_objects = self._num_statistics = 0
        self._names_of: tuple[Any, RowNames | None] = None, None

    def run(self) -> Report:
        if not self._root():
            return self._report()
        self._list_files()
        receipts = self._receipt_files()
        self._read_segments()
        for segment in self._segments.values():
            if segment is not None:
                self._tables(segment)
        self._read_fields()
        self._read_receipts(receipts)
        self._metadata()
        self._lost_receipts()
        self._networks()
        self._kept_statistics()
        self._hints()
        self._nobodys()
        self._objects()
        self._same_lengths()
        return self._report()

    def _report(self) -> Report:
        return Report(
            self._store.url,
            self._sealed,
            tuple(sorted(self._findings, key=lambda finding: finding.path)),
            len(self._segments),
            len(self._fields) + len(self._lost_fields),
            len(self._blocks),
            self._num_objects,
            self._done_bytes,
            len({path.split("/")[2] for path in self._owned if path.startswith(f"{RECORDS}/models/")}),
            self._incomplete(),
            tuple(self._notes),
            self._splits(),
            self._num_statistics,
        )

    def _splits(self) -> tuple[str, ...]:
        numbers = sorted({finding.segment for finding in self._findings if finding.segment is not None})
        found = (self._segments.get(number) for number in numbers)
        return tuple(dict.fromkeys(segment.split for segment in found if segment is not None))

    def _add(self, path: str, what: str, way_out: str = _NOTHING_LOST, **more: Any) -> None:
        with self._lock:
            self._findings.append(Finding(path, what, way_out, **more))

    def _repaired_by(self, what: str) -> str:
        return f"`emkum cache repair {self._store.url}` {what}"

    # --- the root, and what lies where -------------------------------------------------------------------

    def _root(self) -> bool:
        """Whether the rest can be checked: without the root's numbers nothing else has a meaning."""
        ours: Any = None
        try:
            data = self._root_store.read("zarr.json")  # one that cannot be read ends the check
            ours = loads(data)["attributes"]["emkum"]
            content = {key: value for key, value in ours.items() if key != "digest"}
            self._sealed = "digest" in ours
            if self._sealed:
                without_digest(ours)
            if type(content["format"]) is int and content["format"] <= FORMAT:
                check_root(content)
                if loads(data) != group_metadata({"emkum": ours}):
                    raise ValueError("it is not the metadata of a group alone")
                if self._sealed and data != pretty_json(group_metadata({"emkum": ours})):
                    raise ValueError("its bytes were altered")
            read_root(self._store)  # NewerFormat
            self._rows_per_block = content["rows_per_block"]
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, CorruptCache) as error:
            if RECORDS not in self._store.list(""):
                with contextlib.suppress(CorruptCache):
                    read_root(self._store)  # NotACache
            missing = isinstance(error, FileNotFoundError)
            self._add(
                "zarr.json",
                ("is missing" if missing else f"cannot be trusted: {error}") + "; nothing else was checked",
                _RESTORE,
            )
            return False
        self._owned.add("zarr.json")
        if not self._sealed:
            self._notes.append(
                "the cache was made by an emkum whose records carry fewer digests: a flipped bit in zarr.json or in a "
                "path may pass unseen"
            )
        return True

    def _list_files(self) -> None:
        """Objects, then claims, then records: what is being committed meanwhile has its claim or its receipt."""
        top = self._store.list("")
        self._walk("", {name: size for name, size in top.items() if name != RECORDS}, 0)
        self._claims = frozenset(self._store.list(CLAIMS))
        records = {name: size for name, size in self._store.list(RECORDS).items() if name != "claims"}
        self._walk(f"{RECORDS}/", records, 1)
        unfinished = [path for path in self._files if _is_unfinished(path)]
        if unfinished:
            self._notes.append(f"{len(unfinished)} unfinished writes, which the next extract sweeps: {unfinished[0]}")
        for path in unfinished:
            del self._files[path]

    def _walk(self, folder: str, names: Mapping[str, int | None], depth: int) -> None:
        for name, size in sorted(names.items()):
            path = f"{folder}{name}"
            if size is not None:
                self._files[path] = size
            elif _is_unfinished(f"{name}/"):
                self._files[path] = 0
            elif self._store.local is not None and (self._store.local / path).is_symlink():
                self._linked_folder(path)
            elif depth < MAX_DEPTH:
                self._walk(f"{path}/", self._store.list(path), depth + 1)
            else:
                self._notes.append(f"{path} lies deeper than anything of a cache: not looked into")

    def _linked_folder(self, path: str) -> None:
        """It may lead back into the cache, and a few such links make more paths than there is time for."""
        if path.startswith(f"{RECORDS}/"):
            self._add(
                path,
                "is a link to a folder: the records in it were not checked",
                "put the folder itself in its place, or link the whole cache",
            )
        else:
            self._notes.append(f"{path} is a link to a folder: what no record names was not looked for in it")

    def _receipt_files(self) -> dict[str, list[str]]:
        """Field -> paths of its receipts."""
        found: dict[str, list[str]] = defaultdict(list)
        prefix = f"{RECORDS}/receipts/"
        for path in self._files:
            name, _, last = path.removeprefix(prefix).rpartition("/")
            if path.startswith(prefix) and _RECEIPT.fullmatch(last):
                found[name].append(path)
                self._owned.add(path)
        return found

    def _check_bytes(self, data: bytes) -> str | None:
        """Of a sealed cache: what is wrong with a JSON file as it is written; the digest inside is checked elsewhere.

        A flip that parses to the same value (a key's space, an escaped letter) is found here.
        """
        return "its bytes were altered" if self._sealed and data != pretty_json(loads(data)) else None

    # --- segments ----------------------------------------------------------------------------------------

    def _read_segments(self) -> None:
        folder = f"{RECORDS}/segments"
        listed = self._store.list(folder)
        numbers = sorted(int(name) for name in listed if re.fullmatch(r"0|[1-9][0-9]{0,8}", name))
        wanted = range(numbers[-1] + 1 if numbers else 0)
        lost = (
            next((number for number in wanted if number not in numbers), None) if len(wanted) > len(numbers) else None
        )
        if lost is not None:
            self._add(segment_dir(lost), "is missing: segments are numbered without gaps")
        starts: dict[Space, int | None] = dict.fromkeys(SPACES, 0)
        tars: dict[str, int] = {}
        policies: dict[str, str] = {}
        for number in numbers:
            path = f"{segment_dir(number)}/segment.json"
            if self._store.local is None and path not in self._files and number == numbers[-1]:
                self._notes.append(f"segment {number} is not committed yet")
                continue
            self._owned |= {
                f"{segment_dir(number)}/{n}" for n in ("segment.json", "samples.parquet", "captions.parquet")
            }
            self._segments[number] = None
            try:
                kept = CheckedStore(self._root_store)
                segment = read_segment(cast(Store, kept), number)
                data = kept.last
                wrong = self._check_bytes(data) or wrong_segment(segment, self._rows_per_block)
                if self._sealed and "record_digest" not in loads(data):
                    wrong = "it carries no digest of its own"
                wrong = wrong or self._wrong_neighbours(segment, starts, tars, policies)
            except (CorruptCache, ValueError, FileNotFoundError) as error:
                missing = path not in self._files
                self._add(path, "is missing" if missing else _refusal(error))
                self._tables_of_bad_segment(number)
                starts = dict.fromkeys(SPACES)
                continue
            if wrong:
                self._add(path, f"cannot be trusted: {wrong}")
                starts = dict.fromkeys(SPACES)
                continue
            self._segments[number] = segment
            self._owned |= {f"{segment_dir(number)}/{name}" for name in segment.tables}
            for space in starts:
                span = segment.span(space)
                starts[space] = span.first_row + -(-span.rows // self._rows_per_block) * self._rows_per_block

    def _wrong_neighbours(
        self, segment: Segment, starts: Mapping[Space, int | None], tars: dict[str, int], policies: dict[str, str]
    ) -> str | None:
        """What of a segment does not go with those before it."""
        for source in segment.sources:
            if tars.setdefault(source.tar, segment.number) != segment.number:
                return f"it holds {source.tar}, as segment {tars[source.tar]} does"
        name = segment.views.name
        if segment.image.rows and policies.setdefault(segment.split, name) != name:
            return f"its views are {name}, those of {segment.split} are {policies[segment.split]}"
        for space, first in starts.items():
            if first is not None and segment.span(space).first_row != first:
                return f"its {space} rows begin at {segment.span(space).first_row}; they must at {first}"
        return None

    def _tables_of_bad_segment(self, number: int) -> None:
        """Whether at least the bytes of the tables are those that its record states."""
        folder = segment_dir(number)
        try:
            stated = dict(loads(self._store.read(f"{folder}/segment.json"))["parquet"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            stated = {}
        tables = ["samples.parquet", "captions.parquet"]
        tables += ["sounds.parquet"] if "sounds.parquet" in stated else []
        self._owned |= {f"{folder}/{name}" for name in tables}
        for name in tables:
            try:
                _, sha256 = sha256_of(self._store, f"{folder}/{name}")
            except FileNotFoundError:
                self._add(f"{folder}/{name}", "is missing")
            except Unreadable as error:
                self._add(f"{folder}/{name}", str(error))
            else:
                if stated.get(name, sha256) != sha256:
                    self._add(f"{folder}/{name}", f"has sha256 {sha256[:12]}..., segment.json states another")

    def _tables(self, segment: Segment) -> None:
        """Both Parquet files: bytes, pages, columns, and that their rows are numbered as segment.json says."""
        samples = self._table(segment, "samples.parquet", lambda data: check_samples(segment, data))
        self._table(segment, "captions.parquet", lambda data: check_captions(segment, data, samples))
        if segment.audio.rows:
            self._table(segment, "sounds.parquet", lambda data: check_sounds(segment, data, samples))

    def _table(self, segment: Segment, name: str, check: Callable[[bytes], None]) -> bytes | None:
        path = f"{segment_dir(segment.number)}/{name}"
        try:
            data = table_bytes(self._store, segment, name)
            check(data)
        except FileNotFoundError:
            self._add(path, "is missing")
        except ValueError as error:
            self._add(path, _refusal(error))
        else:
            return data
        return None

    # --- fields ------------------------------------------------------------------------------------------

    def _read_fields(self) -> None:
        prefix = f"{RECORDS}/fields/"
        for path in sorted(path for path in self._files if path.startswith(prefix) and path.endswith(".json")):
            self._owned.add(path)
            name = path.removeprefix(prefix).removesuffix(".json")
            try:
                kept = CheckedStore(self._root_store)
                record = read_field_record(cast(Store, kept), path)
                spec = field_from_record(record)
                wrong = self._check_bytes(kept.last) or wrong_record(record, spec)
                if wrong:
                    raise ValueError(wrong)
            except (CorruptCache, ValueError) as error:
                if not isinstance(error.__cause__, FileNotFoundError):  # gone since it was listed
                    self._lost_record(name, _refusal(error), (path,))
                continue
            known = _KnownField(spec, record)
            self._fields[name] = known
            if spec.storage == "int8":
                self._statistics(known)
        for a, b in pairwise(sorted(self._fields)):
            if b.startswith(f"{a}/"):
                self._add(field_record_path(b), f"is a field inside the field {a}")

    def _lost_record(self, name: str, what: str, drop: tuple[str, ...]) -> None:
        """Without its record a field does not exist; the same extract writes it again, but for int8's statistics."""
        self._lost_fields.add(name)
        int8 = any(path.startswith((f"{name}/mean/", f"{name}/std/", f"{name}/scale/")) for path in self._files)
        if int8:
            way_out = f"{_RESTORE}: it holds the statistics that the int8 numbers were made with"
            self._add(field_record_path(name), what, way_out, field=name)
        else:
            way_out = "run the same extract command: it writes the record again and keeps the blocks"
            if drop:
                way_out = self._repaired_by("removes it, and the same extract command writes it again")
            self._add(field_record_path(name), what, way_out, field=name, repairable=True, drop=drop)

    def _statistics(self, known: _KnownField) -> None:
        spec, found = known.spec, {}
        for name in ("mean", "std"):
            path = object_path(spec, spec.array(name), 0, 0)
            self._owned.add(path)
            try:
                stated = known.record["statistics"][name]
                size, sha256 = sha256_of(self._store, path)
                if (size, sha256) != (stated["bytes"], stated["sha256"]):
                    raise ValueError(f"its {size} bytes have another sha256 than the field's record states")
                values = read_statistic(self._store, known.record, name)
                if not np.isfinite(values).all() or (name == "std" and not (values > 0).all()):
                    raise ValueError("it holds numbers that cannot be")
                found[name] = values
            except FileNotFoundError:
                self._add(path, "is missing: without it the int8 numbers cannot be decoded", field=spec.name)
            except (CorruptCache, ValueError) as error:
                self._add(path, _refusal(error), field=spec.name)
        if len(found) == 2:
            known.largest = largest_statistics(found)
            stated = known.record["fingerprint"].get("statistics")
            numbers = b"".join(found[name].astype("<f4").tobytes() for name in ("mean", "std"))
            if stated is not None and stated != hashlib.sha256(numbers).hexdigest():
                self._add(field_record_path(spec.name), "its fingerprint is of other statistics", field=spec.name)

    def _metadata(self) -> None:
        """zarr.json of groups and arrays: what plain Zarr readers go by. All can be written again from the records."""
        groups: dict[str, dict[str, Any]] = {}
        for name, known in sorted(self._fields.items()):
            parts = name.split("/")
            for depth in range(1, len(parts)):
                self._expect(groups, "/".join(parts[:depth]), group_metadata(), known)
            attributes = {"emkum": {"field": name, "fingerprint_digest": known.record["fingerprint_digest"]}}
            self._expect(groups, name, group_metadata(attributes), known)
            blocks = max((block + 1 for block, _ in known.committed), default=0)
            views = max((view + 1 for _, view in known.committed), default=1)
            for array in known.spec.arrays:
                path = f"{name}/{array.name}/zarr.json"
                if known.committed or path in self._files:
                    self._check_array(path, known.spec, array, blocks, views)
        for path, metadata in sorted(groups.items()):
            self._check_group(path, metadata)

    def _expect(
        self, groups: dict[str, dict[str, Any]], folder: str, metadata: dict[str, Any], known: _KnownField
    ) -> None:
        """Metadata is written after the record and before the first block: needed from the first receipt on."""
        if known.committed or f"{folder}/zarr.json" in self._files:
            groups[f"{folder}/zarr.json"] = metadata

    def _check_group(self, path: str, metadata: dict[str, Any]) -> None:
        self._owned.add(path)
        try:
            data = self._store.read(path)
            if data == pretty_json(metadata) or (not self._sealed and loads(data) == metadata):
                return
            what = "differs from what the records say it must be"
        except FileNotFoundError:
            what = "is missing"
        except ValueError as error:
            what = _refusal(error)
        self._add_metadata(path, what, metadata)

    def _check_array(self, path: str, spec: FieldSpec, array: ArraySpec, blocks: int, views: int) -> None:
        """The metadata must be ours for an array of some length, at least that of the committed blocks."""
        self._owned.add(path)
        try:
            data = self._store.read(path)
            found = loads(data)
            extent = (0, 0)
            if array.per_row:
                extent = self._extent(found["shape"], spec, blocks, views)
            wanted = array_metadata(spec, array, *extent, self._rows_per_block)
            if data == pretty_json(wanted) or (not self._sealed and found in (wanted, wanted | {"attributes": {}})):
                return
            what = "differs from what the records say it must be"
        except FileNotFoundError:
            what = "is missing"
        except (ValueError, KeyError, TypeError, IndexError) as error:
            what = _refusal(error)
        self._add_metadata(path, what, array_metadata(spec, array, blocks, views, self._rows_per_block))

    def _extent(self, shape: Any, spec: FieldSpec, blocks: int, views: int) -> tuple[int, int]:
        """(blocks, views) that an array's shape has room for. Raises ValueError if that cannot be."""
        rows, found_views = shape[0], shape[1] if spec.has_views else 1
        if type(rows) is not int or type(found_views) is not int or rows % self._rows_per_block:
            raise ValueError(f"its shape is {shape!r}"[:200])
        most = max((s.span(spec.space).blocks(self._rows_per_block).stop for s in self._good_segments()), default=0)
        if self._segment_lost or None in self._segments.values():
            most = rows
        found_blocks = rows // self._rows_per_block
        if not blocks <= found_blocks <= max(most, blocks) or not views <= found_views <= MAX_VIEWS:
            raise ValueError(
                f"it has room for {found_blocks} blocks and {found_views} views, {blocks} and {views} are committed"
            )
        return found_blocks, found_views

    def _add_metadata(self, path: str, what: str, metadata: dict[str, Any]) -> None:
        rewrite = ((path, pretty_json(metadata)),)
        self._add(path, what, self._repaired_by("writes it again"), repairable=True, rewrite=rewrite)

    # --- receipts ----------------------------------------------------------------------------------------

    def _read_receipts(self, listed: Mapping[str, Sequence[str]]) -> None:
        unknown: dict[int, list[str]] = defaultdict(list)
        known_paths: list[tuple[Space, int, str, _KnownField]] = []
        for name, paths in sorted(listed.items()):
            known = self._fields.get(name)
            if known is None:
                if name not in self._lost_fields:
                    self._lost_record(name, f"is missing: {len(paths)} receipts of the field lie there", ())
                continue
            known_paths += [(known.spec.space, _block_and_view(path)[0], path, known) for path in paths]
        # In the order of the rows, whatever the field: the names of a segment's rows are read once for each space.
        known_paths.sort(key=lambda one: one[:3])
        found = self._read_ahead([path for _, _, path, _ in known_paths])
        for (_, _, path, known), (receipt, refused) in zip(known_paths, found, strict=True):
            self._take_receipt(known, path, receipt, refused, unknown)
        self._segment_lost = bool(unknown)
        for number, paths in sorted(unknown.items()):
            self._add(segment_dir(number), f"is missing: {len(paths)} receipts belong to it, the first {min(paths)}")

    def _read_ahead(self, paths: Sequence[str]) -> Iterator[tuple[Receipt | None, str]]:
        """`_read_receipt` of each, in order; from an object store many at a time."""
        if self._store.local is not None:
            yield from map(self._read_receipt, paths)
            return
        reading: deque[Future[tuple[Receipt | None, str]]] = deque()
        with ThreadPoolExecutor(REQUESTS_AT_A_TIME) as pool:
            try:
                for path in paths:
                    reading.append(pool.submit(self._read_receipt, path))
                    if len(reading) > 4 * REQUESTS_AT_A_TIME:
                        yield reading.popleft().result()
                while reading:
                    yield reading.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _read_receipt(self, path: str) -> tuple[Receipt | None, str]:
        """The receipt, and why it is refused or "". Neither: it was repaired since it was listed."""
        kept = CheckedStore(self._root_store)
        try:
            receipt = read_receipt(cast(Store, kept), path)
        except CorruptCache as error:
            return None, "" if isinstance(error.__cause__, FileNotFoundError) else _refusal(error)
        wrong = self._check_bytes(kept.last)
        return receipt, f"cannot be trusted: {wrong}" if wrong else ""

    def _take_receipt(
        self, known: _KnownField, path: str, receipt: Receipt | None, refused: str, unknown: dict[int, list[str]]
    ) -> None:
        spec = known.spec
        block, view = _block_and_view(path)
        if receipt is not None and not refused:
            wrong = self._wrong_receipt(known, receipt)
            refused = f"cannot be trusted: {wrong}" if wrong else ""
            if not wrong and receipt.segment not in self._segments:
                unknown[receipt.segment].append(path)
                self._owned |= {stated.path for stated in receipt.objects}
                return
        if not refused:
            if receipt is None:
                return
            known.committed.add((block, view))
            self._blocks.append(_Block(spec, path, receipt))
            self._all_bytes += sum(stated.bytes for stated in receipt.objects)
            self._owned |= {stated.path for stated in receipt.objects}
            return
        objects = self._block_objects(spec, block, view)
        self._owned |= set(objects)
        place = self._place(spec, block)
        self._add(
            path,
            refused,
            self._repaired_by(f"drops it, and the same extract command redoes block {block}-{view}"),
            field=spec.name,
            block=block,
            view=view,
            repairable=True,
            drop=(path, *objects),
            **place,
        )

    def _wrong_receipt(self, known: _KnownField, receipt: Receipt) -> str | None:
        spec = known.spec
        wrong = wrong_receipt(spec, known.record["fingerprint_digest"], receipt, self._rows_per_block)
        segment = self._segments.get(receipt.segment)
        if wrong or segment is None:
            return wrong
        return wrong_place(spec, receipt, segment, self._rows_per_block) or self._wrong_quarantine(
            segment, spec.space, receipt
        )

    def _wrong_quarantine(self, segment: Segment, space: Space, receipt: Receipt) -> str | None:
        rows = [q.row for q in receipt.quarantined]
        names = self._row_names(segment, space) if rows else None
        if names is None:
            return None  # or the segment's own finding
        for q, (tar, key) in zip(receipt.quarantined, names.of(rows), strict=True):
            if (tar, key) != (q.tar, q.key):
                return f"it calls row {q.row} {q.tar}/{q.key}; that row is {tar}/{key}"
        return None

    def _row_names(self, segment: Segment, space: Space) -> RowNames | None:
        """Of the segment asked for last: receipts come in the order of their rows. None if its table is damaged."""
        if self._names_of[0] != (segment.number, space):
            self._names_of = (segment.number, space), None
            with contextlib.suppress(CorruptCache):
                self._names_of = (segment.number, space), read_row_names(self._store, segment, space)
        return self._names_of[1]

    def _block_objects(self, spec: FieldSpec, block: int, view: int) -> list[str]:
        paths = [object_path(spec, array, block, view) for array in spec.arrays if array.per_row]
        return [path for path in paths if path in self._files]

    def _place(self, spec: FieldSpec, block: int) -> dict[str, Any]:
        """Segment and rows of a block, as far as the segments can be trusted."""
        for segment in self._good_segments():
            span = segment.span(spec.space)
            if block in span.blocks(self._rows_per_block):
                first, rows = span.block_rows(block, self._rows_per_block)
                return {"segment": segment.number, "space": spec.space, "rows": ((first, first + rows),)}
        return {}

    def _good_segments(self) -> Iterator[Segment]:
        return (segment for segment in self._segments.values() if segment is not None)

    def _lost_receipts(self) -> None:
        """Objects that lie where a block's would, without a receipt."""
        orphans: dict[tuple[str, int, int], list[str]] = defaultdict(list)
        for path in self._files:
            if path not in self._owned and (found := self._block_of(path)):
                orphans[found].append(path)
        for (name, block, view), paths in sorted(orphans.items()):
            spec = self._fields[name].spec
            self._owned |= set(paths)
            key = re.compile(rf"{re.escape(block_key(spec.space, block, view))}\.[0-9]+\.json")
            if not self._sealed or any(key.fullmatch(claim) for claim in self._claims):
                self._notes.append(f"{name} block {block}-{view} is unfinished: {paths[0]} has no receipt yet")
                continue
            self._add(
                receipt_path(name, block, view),
                f"is missing, and nobody works on its block: {', '.join(paths)} lies there",
                self._repaired_by(f"drops what is left, and the same extract command redoes block {block}-{view}"),
                field=name,
                block=block,
                view=view,
                repairable=True,
                drop=tuple(paths),
                **self._place(spec, block),
            )

    def _block_of(self, path: str) -> tuple[str, int, int] | None:
        """(field, block, view) of an object's path; None if no block of a known field has it."""
        folder, _, last = path.rpartition("/")
        name, _, array_name = folder.rpartition("/")
        known = self._fields.get(name)
        numbers = re.fullmatch(r"c\.([0-9]{1,12})((?:\.[0-9]{1,6})*)", last)
        if known is None or numbers is None:
            return None
        array = next((a for a in known.spec.arrays if a.name == array_name and a.per_row), None)
        block = int(numbers[1])
        view = int(numbers[2].split(".")[1]) if known.spec.has_views and numbers[2] else 0
        if array is None or object_path(known.spec, array, block, view) != path or not self._place(known.spec, block):
            return None
        return name, block, view

    # --- objects, in threads -----------------------------------------------------------------------------

    def _objects(self) -> None:
        with ThreadPoolExecutor(self._threads) as pool:
            waiting: set[Future[None]] = set()
            try:
                for block in self._blocks:
                    if len(waiting) >= 2 * self._threads:
                        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                        for future in done:
                            future.result()
                    waiting.add(pool.submit(self._check_block, block))
                for future in waiting:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _check_block(self, block: _Block) -> None:
        spec, receipt = block.spec, block.receipt
        largest = self._fields[spec.name].largest
        damages = check_block(self._store, spec, receipt, self._rows_per_block, largest, self._advance)
        with self._lock:
            self._num_objects += len(receipt.objects)
        way_out = self._repaired_by(
            f"drops its receipt, and the same extract command redoes block {receipt.block}-{receipt.view}"
        )
        for damage in damages:
            rows = _runs(damage.rows, receipt.first_row)
            self._add(
                damage.path,
                damage.what,
                way_out,
                field=spec.name,
                block=receipt.block,
                view=receipt.view,
                segment=receipt.segment,
                space=spec.space,
                rows=rows,
                repairable=True,
                drop=(block.path, *(stated.path for stated in receipt.objects)),
            )

    def _advance(self, count: int) -> None:
        with self._lock:
            self._done_bytes += count
            self._progress(self._done_bytes, self._all_bytes)

    def _same_lengths(self) -> None:
        """The lengths of a ragged field are those of the ids of its tokenizer."""
        found: dict[tuple[Any, int, int], dict[str, tuple[_Block, str]]] = defaultdict(dict)
        for block in self._blocks:
            spec, receipt = block.spec, block.receipt
            tokenizer = self._fields[spec.name].record["fingerprint"].get("tokenizer")
            if spec.has_length and isinstance(tokenizer, str) and not receipt.quarantined:
                sha256 = stated_objects(spec, receipt)["length"].sha256
                found[tokenizer, spec.row_shape[0], receipt.block][spec.name] = block, sha256
        for blocks in found.values():
            if len({sha256 for _, sha256 in blocks.values()}) > 1:
                drop = [p for b, _ in blocks.values() for p in (b.path, *(stated.path for stated in b.receipt.objects))]
                first = next(block for block, _ in blocks.values())
                self._add(
                    first.path,
                    f"{' and '.join(blocks)} state different lengths of the same captions",
                    self._repaired_by("drops these receipts, and the same extract command redoes their blocks"),
                    field=first.spec.name,
                    block=first.receipt.block,
                    view=0,
                    repairable=True,
                    drop=tuple(drop),
                    **self._place(first.spec, first.receipt.block),
                )

    # --- networks, hints, and what belongs to nobody -----------------------------------------------------

    def _networks(self) -> None:
        found: dict[str, dict[str, int]] = defaultdict(dict)
        for path, size in self._files.items():
            parts = path.split("/")
            if path.startswith(f"{RECORDS}/models/") and len(parts) == 4:
                found[parts[2]][parts[3]] = size
        for name, files in sorted(found.items()):
            self._network(name, files)
        if self._sealed:
            for name, known in sorted(self._fields.items()):
                parts = name.split("/")
                network = parts[1].rpartition("@")[0] if known.spec.kind == "tokens" and parts[0] == "image" else ""
                network = parts[1] if known.spec.kind == "ids" else network
                if network and known.committed and network not in found:
                    self._add(
                        model_dir(network),
                        f"is missing: {name} is made for this network",
                        "run the same extract command: it keeps the network again",
                        repairable=True,
                    )

    def _network(self, name: str, files: Mapping[str, int]) -> None:
        folder = model_dir(name)
        first = sorted(files, key=lambda file: file != "model.json")  # without model.json there is no network
        remedy: dict[str, Any] = {
            "way_out": self._repaired_by("removes the network, and the same extract command keeps it again"),
            "repairable": True,
            "drop": tuple(f"{folder}/{file}" for file in first),
        }
        self._owned |= {f"{folder}/{file}" for file in ("model.json", NETWORK_FILES) if file in files}
        path = f"{folder}/{NETWORK_FILES}"
        if NETWORK_FILES not in files:
            known = {"model.json", "model.safetensors", "tokenizer.json"}
            self._owned |= {f"{folder}/{file}" for file in known if file in files}
            if self._sealed:
                self._add(path, "is missing", **remedy)
            else:
                self._old_network(folder, files, remedy)
            return
        try:
            data = self._store.read(path)
            stated = without_digest(loads(data))["files"]
            if wrong := self._check_bytes(data) or wrong_files(stated):
                raise ValueError(wrong)
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as error:
            self._owned |= {f"{folder}/{file}" for file in files}
            self._add(path, _refusal(error), **remedy)
            return
        for file, entry in sorted(stated.items()):
            self._owned.add(f"{folder}/{file}")
            if file not in files:
                self._add(f"{folder}/{file}", "is missing", **remedy)
                continue
            try:
                if sha256_of(self._store, f"{folder}/{file}") != (entry["bytes"], entry["sha256"]):
                    self._add(f"{folder}/{file}", f"holds other bytes than {NETWORK_FILES} states", **remedy)
            except Unreadable as error:
                self._add(f"{folder}/{file}", str(error), **remedy)

    def _old_network(self, folder: str, files: Mapping[str, int], remedy: dict[str, Any]) -> None:
        """Of a network without a list of its files: what model.json says of them."""
        try:
            record = loads(self._store.read(f"{folder}/model.json"))
            wanted = record.get("tokenizer_sha256")
            if wanted and sha256_of(self._store, f"{folder}/tokenizer.json")[1] != wanted:
                raise ValueError("tokenizer.json has another sha256 than it states")
            if "model.safetensors" not in files:
                raise ValueError("model.safetensors is missing")
        except (ValueError, AttributeError) as error:
            self._add(f"{folder}/model.json", _refusal(error), **remedy)
        except FileNotFoundError:
            self._notes.append(f"{folder} is not finished: it lacks model.json or tokenizer.json")

    def _kept_statistics(self) -> None:
        """They can all be computed again: a damaged one is dropped whole."""
        checked = check_statistics(self._store, {p for p in self._files if p.startswith(f"{STATISTICS}/")})
        self._num_statistics = len(checked.names)
        self._owned |= checked.owned
        for one in checked.damages:
            if one.rewrite is not None:
                rewrite = ((one.path, one.rewrite),)
                self._add(one.path, one.what, self._repaired_by("writes it again"), repairable=True, rewrite=rewrite)
            else:
                way_out = self._repaired_by("removes the statistic, and `emkum cache stats` makes it anew")
                self._add(one.path, one.what, way_out, repairable=True, drop=one.drop)

    def _hints(self) -> None:
        if HINTS not in self._files:
            return
        self._owned.add(HINTS)
        try:
            data = self._store.read(HINTS)
            record = loads(data)
            if self._sealed or (isinstance(record, dict) and "digest" in record):
                without_digest(record)
            if wrong := self._check_bytes(data):
                raise ValueError(wrong)
        except FileNotFoundError:
            return
        except ValueError as error:
            self._add(
                HINTS,
                _refusal(error),
                self._repaired_by("removes it: it only saves a scan of the tars"),
                repairable=True,
                drop=(HINTS,),
            )

    def _nobodys(self) -> None:
        lost = tuple(f"{name}/" for name in self._lost_fields)
        others = [p for p in sorted(self._files) if p not in self._owned and not p.startswith(lost)]
        if others:
            self._notes.append(
                f"{len(others)} files are not of the format and were not checked: {', '.join(others[:3])}"
            )

    def _incomplete(self) -> dict[str, int]:
        """Field -> committed blocks that it lacks: of each segment the views it has, at least as many as at first."""
        missing = {}
        for name, known in sorted(self._fields.items()):
            lacking = 0
            for segment in self._good_segments():
                spec = known.spec
                if spec.kind == "boxes" and name != f"views/{segment.views.name}/boxes":
                    continue
                blocks = segment.span(spec.space).blocks(self._rows_per_block)
                here = [(block, view) for block, view in known.committed if block in blocks]
                views = max((view + 1 for _, view in here), default=0)
                lacking += len(blocks) * (max(segment.views.count, views) if spec.has_views else 1) - len(here)
            if lacking:
                missing[name] = lacking
        return missing


def _is_unfinished(path: str) -> bool:
    return any(part.startswith(".") or part.endswith(".tmp") for part in path.split("/") if part)


def _block_and_view(path: str) -> tuple[int, int]:
    """Of a receipt's path."""
    block, _, view = path.rpartition("/")[2].removesuffix(".json").partition("-")
    return int(block), int(view)


def _refusal(error: BaseException) -> str:
    """Why a record was refused, without the place and the way out that its reader adds."""
    cause = error if isinstance(error, Unreadable) else error.__cause__ or error
    return str(cause) if isinstance(cause, Unreadable) else f"cannot be trusted: {cause}"


def _runs(rows: np.ndarray, first_row: int) -> tuple[tuple[int, int], ...]:
    """Numbers within a block -> (first, end) of runs of rows."""
    if not len(rows):
        return ()
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    return tuple((int(run[0]) + first_row, int(run[-1]) + first_row + 1) for run in np.split(rows, cuts))
