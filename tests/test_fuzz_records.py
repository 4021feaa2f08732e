"""A hostile cache, all of whose digests fit: reading, verifying and describing it meets only our own errors."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import fuzz_settings, memory_below, until_time_is_up
from hypothesis import given
from hypothesis import strategies as st
from tiny_cache import make_cache

from emkum.errors import EmkumError
from emkum.shards.audit import describe, left_out, left_out_table, report_json, report_table, table
from emkum.shards.digest import digest
from emkum.shards.layout import canonical_json, pretty_json
from emkum.shards.ledger import with_digest
from emkum.shards.reader import Cache
from emkum.shards.segments import segment_digest
from emkum.shards.store import LocalStore
from emkum.shards.verify import verify

MEMORY_BYTES = 50_000_000  # of Python and numpy, for a cache of 60 kB
SEGMENT = "_emkum/segments/0/segment.json"


class Fuzzed:
    """A small cache on disk, its records in memory; every example changes some and puts them back."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.original = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        self.records = {path: json.loads(data) for path, data in self.original.items() if path.endswith(".json")}
        self.receipts = sorted(path for path in self.records if "/receipts/" in path)
        self.fields = sorted(path for path in self.records if "/fields/" in path)
        self.metadata = sorted(path for path in self.records if path.endswith("zarr.json"))
        self.others = sorted(set(self.records) - {*self.receipts, *self.fields, *self.metadata})

    @contextlib.contextmanager
    def changed(self, files: dict[str, bytes]) -> Iterator[None]:
        try:
            for path, data in files.items():
                (self.root / path).write_bytes(data)
            yield
        finally:
            for path in files:
                (self.root / path).write_bytes(self.original[path])


@pytest.fixture(scope="module", params=["int8", "float16"])
def fuzzed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fuzzed:
    root = tmp_path_factory.mktemp("fuzz") / "cache"
    fields = ("tokens", "cls", "ids", "text_layers")
    make_cache(
        root, pictures=18, val_pictures=2, captions=1, views=2, cut=1, storage=request.param, fields=fields,
        quarantined=(3,),
    )  # fmt: skip
    shutil.rmtree(root / "_emkum/claims", ignore_errors=True)
    return Fuzzed(root)


def use(root: Path) -> None:
    """Everything that is done with a cache of unknown origin, each part for itself."""
    _only_our_errors(lambda: _read_all(root))
    _only_our_errors(lambda: table(describe(Cache.open(root))))
    _only_our_errors(lambda: left_out_table(left_out(Cache.open(root))))
    _only_our_errors(lambda: digest(root, trust_receipts=True))
    _only_our_errors(lambda: _verify(root))


def _only_our_errors(call: Callable[[], object]) -> None:
    with contextlib.suppress(EmkumError):
        call()


def _read_all(root: Path) -> None:
    cache = Cache.open(root)
    for split in cache.splits:
        _only_our_errors(lambda split=split: cache.samples(split).to_pylist())
        _only_our_errors(lambda split=split: cache.captions(split).to_pylist())
        for field in cache.fields.values():
            _only_our_errors(lambda field=field, split=split: field.missing(split))
            for view in range(min(field.num_views, 3)):
                _only_our_errors(lambda field=field, split=split, view=view: _read(field, split, view))


def _read(field: Any, split: str, view: int) -> None:
    rows = field.rows(split, view)
    for row in rows[:: max(1, len(rows) // 4)]:
        _only_our_errors(lambda row=row: field.values(np.array([row]), view))
    field.values(rows, view)
    if field.spec.has_length:
        field.lengths(rows)


def _verify(root: Path) -> None:
    store = LocalStore(root)
    report = verify(store, threads=1)  # damage is collected, never raised
    assert all(path in fuzzed_files(root) for finding in report.findings for path in finding.drop)
    json.dumps(report_json(store, report), allow_nan=False)
    report_table(store, report)


def fuzzed_files(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


# --- records --------------------------------------------------------------------------------------------


def _deep(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


NASTY = [
    None, True, False, 0, -1, 1, 2, 15, 16, 17, 1000, 2**16, 2**31, 2**32, 2**40, 2**40 - 1, 2**61, 2**62, 2**63 - 1,
    -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, 5e-324, "", "x", "..", "../..", "/etc/passwd", "a" * 5000, "\x1b[2J",
    "\0", "\ud800", "float16", "int8", "uint8", "ragged", "tokens", "boxes", "values", "mean", "image", "text",
    "0" * 64,
    [], {}, [[]], [0], [-1], [1] * 20, [2**40, 2**40], {"a": 1}, {"": {}}, [None], _deep(60), _deep(200),
]  # fmt: skip


def places(record: Any) -> list[tuple]:
    """Every (container, key) of a record."""
    found, left = [], [record]
    while left:
        container = left.pop()
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        found += [(container, key) for key in keys]
        left += [container[key] for key in keys if isinstance(container[key], dict | list)]
    return found


def mutate(record: Any, draw: Callable[[st.SearchStrategy], Any]) -> None:
    spots = places(record)
    if not spots:
        return
    container, key = draw(st.sampled_from(spots))
    how = draw(st.sampled_from(["replace", "replace", "replace", "delete", "double", "copy", "add", "nudge"]))
    if how == "replace":
        container[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
    elif how == "delete":
        del container[key]
    elif how == "double" and isinstance(container, list):
        container.append(copy.deepcopy(container[key]))
    elif how == "copy":
        other, other_key = draw(st.sampled_from(spots))
        container[key] = copy.deepcopy(other[other_key])
    elif how == "add" and isinstance(container, dict):
        container[draw(st.sampled_from(["digest", "truncated", "x", "length", "scale"]))] = draw(st.sampled_from(NASTY))
    elif how == "nudge" and type(container[key]) is int:
        container[key] += draw(st.sampled_from([-16, -1, 1, 16]))


def sealed(path: str, record: Any) -> bytes:
    """The record with every digest that it states about itself made to fit, as far as it still can be."""
    with contextlib.suppress(Exception):
        if path.endswith("segment.json"):
            record.pop("record_digest", None)
            with contextlib.suppress(Exception):
                record["digest"] = segment_digest(record)
            record["record_digest"] = with_digest(record)["digest"]
        elif path.endswith("zarr.json"):
            ours = record["attributes"].get("emkum")
            if path == "zarr.json":
                ours.pop("digest", None)
                record["attributes"]["emkum"] = with_digest(ours)
            elif record.get("node_type") == "array":
                bare = record | {"attributes": {}}
                record["attributes"] = {"emkum": {"digest": hashlib.sha256(canonical_json(bare)).hexdigest()}}
        else:
            record.pop("digest", None)
            if "/fields/" in path:
                record["fingerprint_digest"] = hashlib.sha256(canonical_json(record["fingerprint"])).hexdigest()
            record = with_digest(record)
    return json.dumps(record, sort_keys=True, indent=1).encode() + b"\n"


@until_time_is_up
@fuzz_settings(examples=40)
@given(data=st.data())
def test_records_that_lie_meet_only_our_errors(fuzzed: Fuzzed, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["receipts", "receipts", "fields", "fields", "metadata", "others"]))
    files: dict[str, bytes] = {}
    for path in data.draw(st.lists(st.sampled_from(getattr(fuzzed, kind)), min_size=1, max_size=2, unique=True)):
        record = copy.deepcopy(fuzzed.records[path])
        for _ in range(data.draw(st.integers(1, 3))):
            mutate(record, data.draw)
        files[path] = sealed(path, record)
        if kind == "fields" and data.draw(st.booleans()):
            files |= _follow(fuzzed, path, record)
    with fuzzed.changed(files), memory_below(MEMORY_BYTES):
        use(fuzzed.root)


def _follow(fuzzed: Fuzzed, path: str, record: Any) -> dict[str, bytes]:
    """Receipts that state the forged field's fingerprint."""
    name = path.removeprefix("_emkum/fields/").removesuffix(".json")
    found = {}
    for receipt in fuzzed.receipts:
        if receipt.startswith(f"_emkum/receipts/{name}/") and isinstance(record, dict):
            changed = fuzzed.records[receipt] | {"fingerprint_digest": record.get("fingerprint_digest")}
            found[receipt] = sealed(receipt, changed)
    return found


@until_time_is_up
@fuzz_settings(examples=40)
@given(data=st.data())
def test_bytes_that_are_no_records_meet_only_our_errors(fuzzed: Fuzzed, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(fuzzed.records)))
    good = fuzzed.original[path]
    cut = data.draw(st.integers(0, len(good)))
    bad = data.draw(
        st.one_of(
            st.binary(max_size=200),
            st.just(good[:cut]),
            st.binary(max_size=20).map(lambda noise: good[:cut] + noise + good[cut:]),
            st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b'{"a":1,"a":2}', b"[1e999]", b"1" * 10_000]),
            st.sampled_from([b"nan", b'"\\ud800"', b"{}", b"[]", b"0", b"null"]),
        )
    )  # fmt: skip
    with fuzzed.changed({path: bad}), memory_below(MEMORY_BYTES):
        use(fuzzed.root)


# --- tables and objects ---------------------------------------------------------------------------------


def with_table(fuzzed: Fuzzed, name: str, data: bytes, change: Callable[[dict], object] = lambda r: None) -> dict:
    """The files of a cache whose segment 0 has this table, all digests fitting."""
    record = copy.deepcopy(fuzzed.records[SEGMENT])
    record["parquet"][name] = hashlib.sha256(data).hexdigest()
    change(record)
    return {SEGMENT: sealed(SEGMENT, record), f"_emkum/segments/0/{name}": data}


@until_time_is_up
@fuzz_settings(examples=40)
@given(data=st.data())
def test_tables_that_lie_meet_only_our_errors(fuzzed: Fuzzed, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["samples.parquet", "captions.parquet"]))
    bad = bytearray(fuzzed.original[f"_emkum/segments/0/{name}"])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(bad) - 1))
        if data.draw(st.booleans()):
            bad[place] = data.draw(st.integers(0, 255))
        else:
            bad[place : place + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
        bad = bad or bytearray(1)
    with fuzzed.changed(with_table(fuzzed, name, bytes(bad))), memory_below(MEMORY_BYTES):
        use(fuzzed.root)


@pytest.mark.parametrize("rows", [2_000_000, 2**40])
def test_a_small_table_that_claims_many_rows_is_not_expanded(fuzzed: Fuzzed, rows: int) -> None:
    """One run of equal lines: a few kB of Parquet, gigabytes in memory."""
    lines = 2_000_000
    with pa.BufferOutputStream() as sink:
        schema = pq.read_schema(io.BytesIO(fuzzed.original["_emkum/segments/0/samples.parquet"]))
        columns = [pa.repeat(pa.scalar("k" if f.type == pa.string() else 7, f.type), lines) for f in schema]
        pq.write_table(pa.table(columns, schema=schema), sink, compression="zstd", max_rows_per_page=1 << 30)
        data = sink.getvalue().to_pybytes()
    assert len(data) < 100_000

    def claim(record: dict) -> None:
        record["image"]["rows"] = record["sources"][0]["samples"] = rows

    del columns
    before = pa.total_allocated_bytes()
    peak = pa.default_memory_pool().max_memory()
    with fuzzed.changed(with_table(fuzzed, "samples.parquet", data, claim)), memory_below(MEMORY_BYTES):
        use(fuzzed.root)
    assert pa.default_memory_pool().max_memory() <= max(peak, before + MEMORY_BYTES)


@until_time_is_up
@fuzz_settings(examples=40)
@given(data=st.data())
def test_objects_that_lie_meet_only_our_errors(fuzzed: Fuzzed, data: st.DataObject) -> None:
    """A block's objects and receipt, all checksums fitting: other numbers, other lengths, other shard indexes."""
    path = data.draw(st.sampled_from(fuzzed.receipts))
    record = copy.deepcopy(fuzzed.records[path])
    files = {}
    for entry in record["objects"]:
        bad = bytearray(fuzzed.original[entry["path"]])
        for _ in range(data.draw(st.integers(0, 3))):
            at = data.draw(st.integers(0, len(bad) - 5))
            size = data.draw(st.sampled_from([1, 2, 4, 8]))
            bad[at : at + size] = data.draw(
                st.sampled_from([b"\xff" * size, b"\0" * size, struct.pack("<Q", len(bad))[:size], b"\x7f" * size])
            )
        if data.draw(st.integers(0, 9)) == 0:
            bad = bad[: data.draw(st.integers(0, len(bad)))] + b"\0" * 4
        bad[-4:] = struct.pack("<I", google_crc32c.value(bytes(bad[:-4])))  # of the chunk, if there is only one
        index = 16 * 16 + 4
        if len(bad) > index:  # of the index, if it is a shard
            bad[-4:] = data.draw(
                st.sampled_from([bytes(bad[-4:]), struct.pack("<I", google_crc32c.value(bytes(bad[-index:-4])))])
            )
        entry["bytes"], entry["sha256"] = len(bad), hashlib.sha256(bad).hexdigest()
        files[entry["path"]] = bytes(bad)
    with fuzzed.changed(files | {path: sealed(path, record)}), memory_below(MEMORY_BYTES):
        use(fuzzed.root)


def test_the_cache_under_the_fuzzers_is_whole(fuzzed: Fuzzed) -> None:
    assert verify(LocalStore(fuzzed.root)).findings == ()
    assert sealed(SEGMENT, copy.deepcopy(fuzzed.records[SEGMENT])) == fuzzed.original[SEGMENT]
    for path in fuzzed.receipts + fuzzed.fields + fuzzed.metadata:
        if json.loads(fuzzed.original[path]).get("node_type") != "group" or path == "zarr.json":
            assert sealed(path, copy.deepcopy(fuzzed.records[path])) == fuzzed.original[path], path
    assert pretty_json(fuzzed.records[SEGMENT]) == fuzzed.original[SEGMENT]
