"""Reading shards fast and safely: few calls, few files, checksums when they are asked for, memory within limits."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forwarding import ForwardingReader
from tiny_cache import make_cache

from emkum.errors import CorruptCache, IncompleteCache
from emkum.shards import reader, shard_files
from emkum.shards.reader import Cache
from emkum.shards.shard_files import ReadThreads
from emkum.shards.store import LocalStore, RangeReader

TOKENS = "image/tinyvit@2/tokens"
TEXTS = "teacher/tinybert/text/layers"
ROWS_PER_BLOCK = 16


class CountedStore(LocalStore):
    """A folder whose reads are counted, by place and length; `far` makes readers treat it as an object store."""

    def __init__(self, folder: Path, far: bool = False) -> None:
        super().__init__(folder)
        self.reads: list[tuple[str, int, int]] = []
        self.under_way = self.most_at_once = 0
        self.lock = threading.Lock()
        self.pause: threading.Barrier | None = None
        if far:
            self.local = None

    def open(self, path: str) -> RangeReader:
        return CountedReader(self, path, super().open(path))


class CountedReader(ForwardingReader):
    def __init__(self, store: CountedStore, path: str, file: RangeReader) -> None:
        super().__init__(file)
        self._store, self._path = store, path

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        with self._store.lock:
            self._store.under_way += 1
            self._store.most_at_once = max(self._store.most_at_once, self._store.under_way)
        try:
            if self._store.pause is not None:
                self._store.pause.wait(30)
            count = super().read_into(buffers, offset)
            self._store.reads.append((self._path, offset, count))
            return count
        finally:
            with self._store.lock:
                self._store.under_way -= 1


@pytest.fixture(scope="module", params=["float16", "int8"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten blocks of pictures and twenty of captions."""
    place = tmp_path_factory.mktemp("shards") / "cache"
    return make_cache(place, pictures=160, captions=2, val_pictures=0, storage=request.param).path


@pytest.fixture
def unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAPPED_SHARE", 0.0)


def flip(path: Path, name: str, byte: int) -> None:
    with open(path / name / "values/c.0.0.0.0", "r+b") as file:
        file.seek(byte)
        old = file.read(1)
        file.seek(byte)
        file.write(bytes([old[0] ^ 1]))


# --- checksums ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unmapped")
@pytest.mark.parametrize(
    ("verify", "at_first", "later"), [("first", True, False), ("always", True, True), ("never", False, False)]
)
def test_checksums_are_looked_at_first_always_or_never(
    tmp_path: Path, verify: Any, at_first: bool, later: bool
) -> None:
    place = make_cache(tmp_path / "cache", pictures=20, val_pictures=0).path
    field = Cache.open(place, verify=verify).field(TOKENS)
    rows = np.arange(3)
    good = field.read(rows)
    flip(place, TOKENS, 10)  # in row 0, which was read before
    if later:
        with pytest.raises(CorruptCache, match=r"the chunk at byte 0 \(row 0 of the block\) fails its checksum"):
            field.read(rows)
    else:
        assert not np.array_equal(field.read(rows), good)
    fresh = Cache.open(place, verify=verify).field(TOKENS)
    if at_first:
        with pytest.raises(CorruptCache, match="fails its checksum"):
            fresh.read(rows)
        assert np.array_equal(fresh.read(rows[1:]), good[1:])
    else:
        assert not np.array_equal(fresh.read(rows), good)


def test_a_damaged_chunk_is_found_wherever_it_lies_among_its_neighbours(tmp_path: Path) -> None:
    place = make_cache(tmp_path / "cache", pictures=20, val_pictures=0).path
    size = Cache.open(place).field(TOKENS).read(np.array([0])).nbytes
    flip(place, TOKENS, 7 * (size + 4) + 5)
    for threads in (None, ReadThreads(3)):
        field = Cache.open(place).field(TOKENS)
        with pytest.raises(CorruptCache, match=r"\(row 7 of the block\)"):
            field.read(np.arange(16), threads=threads)
        field.read(np.array([6, 8]))
        with pytest.raises(CorruptCache, match=r"\(row 7 of the block\)"):
            field.read(np.array([7]))


# --- how a batch is read -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unmapped")
def test_neighbours_are_read_in_one_call_and_each_checksum_once(path: Path) -> None:
    store = CountedStore(path)
    field = Cache.open(store, only=[TOKENS]).field(TOKENS)
    size = field.row_shape[0] * field.row_shape[1] * np.dtype(field.storage).itemsize
    field.read(np.array([0, 16]))  # opens both shards
    store.reads.clear()
    field.read(np.array([20, 3, 4, 21, 2, 22]))
    assert sorted(store.reads) == [
        (f"{TOKENS}/values/c.0.0.0.0", 2 * (size + 4), 3 * (size + 4)),
        (f"{TOKENS}/values/c.1.0.0.0", 4 * (size + 4), 3 * (size + 4)),
    ]
    store.reads.clear()
    field.read(np.array([3]))
    assert store.reads == [(f"{TOKENS}/values/c.0.0.0.0", 3 * (size + 4), size)]


def test_a_field_that_fits_into_memory_is_read_from_files_once(path: Path) -> None:
    store = CountedStore(path)
    field = Cache.open(store, only=[TOKENS]).field(TOKENS)
    rows = np.random.default_rng(0).permutation(160)
    first = field.read(rows)
    store.reads.clear()
    assert np.array_equal(field.read(rows), first)
    assert store.reads == []


@pytest.mark.parametrize("name", [TOKENS, TEXTS])
def test_threads_change_no_number(path: Path, name: str) -> None:
    rows = np.random.default_rng(1).integers(160, size=300)  # repeated ones too
    expected = np.stack([Cache.open(path).field(name).read(np.array([row]))[0] for row in rows])
    for number in (1, 2, 7, 400):
        threads = ReadThreads(number)
        field = Cache.open(path).field(name)
        assert np.array_equal(field.read(rows, threads=threads), expected)
        assert np.array_equal(field.read(rows, threads=threads), expected)
        assert threads.seconds > 0
        assert threads.busy_seconds > 0
        threads.close()


def test_nothing_is_read_for_no_rows(path: Path) -> None:
    assert Cache.open(path).field(TOKENS).read(np.array([], np.int64)).shape == (0, 5, 16)


def test_memory_that_is_not_contiguous_is_filled_too(path: Path) -> None:
    field = Cache.open(path).field(TOKENS)
    out = np.zeros((8, *field.row_shape), field.storage)
    field.read(np.arange(4), out=out[::2])
    assert np.array_equal(out[::2], field.read(np.arange(4)))
    assert not out[1::2].any()


def test_the_first_failure_of_the_threads_is_raised_once_all_have_ended() -> None:
    threads, ended = ReadThreads(4), []

    def work(start: int, stop: int) -> None:
        if start == 0:
            raise CorruptCache("broken", "mend it")
        ended.append(stop)

    with pytest.raises(CorruptCache, match="broken"):
        threads.share(work, 8)
    assert sorted(ended) == [4, 6, 8]


def test_a_row_without_a_receipt_is_refused_among_others(path: Path) -> None:
    with pytest.raises(IncompleteCache, match=r"row 160 view 0 \(block 10\) is not committed"):
        Cache.open(path).field(TOKENS).read(np.array([3, 160, 4]))
    with pytest.raises(IncompleteCache, match=r"row 3 view 1 \(block 0\) is not committed"):
        Cache.open(path).field(TOKENS).read(np.array([3]), view=1)


# --- files and memory --------------------------------------------------------------------------------------------


def open_files(place: Path) -> int:
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}").startswith(str(place))
        except FileNotFoundError:
            continue
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to count open files")
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_few_files_are_open_however_many_blocks_there_are(
    path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 3)
    monkeypatch.setattr(reader, "MAPPED_SHARE", share)
    field = Cache.open(path).field(TOKENS)
    expected = Cache.open(path).field(TOKENS).read(np.arange(160))
    before = open_files(path)
    with ThreadPoolExecutor(4) as pool:
        shuffled = [np.random.default_rng(seed).permutation(160) for seed in range(12)]
        for rows, found in zip(shuffled, pool.map(field.read, shuffled), strict=True):
            assert np.array_equal(found, expected[rows])
    assert open_files(path) - before <= 3 * (1 if share == 0 else 2)  # the file, and its mapping


@pytest.mark.usefixtures("unmapped")
def test_a_file_that_was_closed_is_opened_again_and_its_index_is_not_read_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 1)
    store = CountedStore(path)
    field = Cache.open(store, only=[TOKENS]).field(TOKENS)
    expected = [field.read(np.array([row])) for row in (0, 16, 0)]
    store.reads.clear()
    assert np.array_equal(field.read(np.array([16])), expected[1])
    assert np.array_equal(field.read(np.array([0])), expected[0])
    marks, rows = ([read for read in store.reads if (read[2] == 4) == small] for small in (True, False))
    size = expected[0].nbytes
    assert rows == [
        (f"{TOKENS}/values/c.1.0.0.0", 0, size),
        (f"{TOKENS}/values/c.0.0.0.0", 0, size),
    ]
    assert len(marks) == 8  # a few checksums, by which the file is known to be the one that was opened before


@pytest.mark.usefixtures("unmapped")
def test_a_file_that_is_replaced_by_a_shorter_one_between_two_reads_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 1)
    place = make_cache(tmp_path / "cache", val_pictures=0).path
    field = Cache.open(place).field(TOKENS)
    field.read(np.array([0]))
    field.read(np.array([16]))
    shard = place / TOKENS / "values/c.0.0.0.0"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptCache, match="bytes, its receipt says"):
        field.read(np.array([0]))


@pytest.mark.usefixtures("unmapped")
@pytest.mark.parametrize("verify", ["first", "always"])
def test_a_file_that_another_took_the_place_of_after_it_was_closed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: Any
) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 1)
    place = make_cache(tmp_path / "cache", val_pictures=0).path
    field = Cache.open(place, verify=verify).field(TOKENS)
    field.read(np.array([0]))
    field.read(np.array([16]))  # closes the first
    first, second = (place / TOKENS / f"values/c.{block}.0.0.0" for block in (0, 1))
    first.rename(tmp_path / "kept")
    first.write_bytes(second.read_bytes())
    with pytest.raises(CorruptCache, match="it may be the object of another block"):
        field.read(np.array([0]))


def test_where_files_cannot_be_mapped_they_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    field = Cache.open(path).field(TOKENS)
    expected = Cache.open(path).field(TOKENS).read(np.arange(160))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr(shard_files.mmap, "mmap", refuse)
    assert np.array_equal(field.read(np.arange(160)), expected)
    assert np.array_equal(field.read(np.arange(160)), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_threads_that_read_survive_a_fork(path: Path) -> None:
    field, threads = Cache.open(path).field(TOKENS), ReadThreads(3)
    expected = field.read(np.arange(160), threads=threads)
    child = os.fork()
    if not child:
        signal.alarm(30)
        os._exit(0 if np.array_equal(field.read(np.arange(160), threads=threads), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_memory_of_another_shape_or_type_is_refused(path: Path) -> None:
    field = Cache.open(path).field(TOKENS)
    for out in (np.empty((2, *field.row_shape), field.storage), np.empty((3, *field.row_shape), np.float64)):
        with pytest.raises(AssertionError):
            field.read(np.arange(3), out=out)


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_an_unsharded_object_that_is_damaged_after_it_was_checked_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(reader, "PLAIN_SHARE", 1e-12)
    name = "teacher/tinyvit/image/cls"
    place = make_cache(tmp_path / "cache", val_pictures=0).path
    field = Cache.open(place).field(name)
    field.values(np.arange(40))
    broken = place / name / "values/c.0.0.0"
    if damage == "gone":
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[:-1])
    with pytest.raises(CorruptCache, match="its receipt says"):
        field.values(np.array([3]))


def test_always_means_unsharded_arrays_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PLAIN_SHARE", 1e-12)
    name = "teacher/tinyvit/image/cls"
    place = make_cache(tmp_path / "cache", val_pictures=0).path
    field = Cache.open(place, verify="always").field(name)
    field.values(np.arange(40))
    broken = place / name / "values/c.0.0.0"
    broken.write_bytes(bytes([broken.read_bytes()[0] ^ 1]) + broken.read_bytes()[1:])
    with pytest.raises(CorruptCache):
        field.values(np.array([3]))


def test_unsharded_arrays_beyond_the_limit_are_read_row_by_row_from_checked_files(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {
        name: Cache.open(path).field(name).values(np.arange(160)) for name in ("teacher/tinyvit/image/cls", TOKENS)
    }
    monkeypatch.setattr(reader, "PLAIN_SHARE", 1e-12)
    store = CountedStore(path)
    cache = Cache.open(store)
    for name, values in expected.items():
        field = cache.field(name)
        assert np.array_equal(field.values(np.arange(160)), values)
        store.reads.clear()
        assert np.array_equal(field.values(np.array([3, 40])), values[[3, 40]])
        plain = {array.name: array.row_bytes for array in field.spec.arrays if array.per_row and array.inner is None}
        reads = [(place.split("/")[-2], count) for place, _, count in store.reads if place.split("/")[-2] in plain]
        assert reads == [(array, plain[array]) for array, _ in reads]
        assert len(reads) == 2 * len(plain)
        rows = np.random.default_rng(2).permutation(160)
        assert np.array_equal(field.values(rows), values[rows])
    assert cache.held_bytes <= 16 * 16 * 4


def test_memory_of_unsharded_arrays_can_be_given_back(path: Path) -> None:
    cache = Cache.open(path)
    field = cache.field("teacher/tinyvit/image/cls")
    expected = field.values(np.arange(160))
    assert cache.held_bytes > 0
    field.forget_plain()
    assert cache.held_bytes == 0
    assert np.array_equal(field.values(np.arange(160)), expected)


# --- object stores -----------------------------------------------------------------------------------------------


def test_near_rows_of_an_object_store_are_one_request_and_far_ones_are_not(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CountedStore(path, far=True)
    field = Cache.open(store, only=[TOKENS]).field(TOKENS)
    expected = Cache.open(path).field(TOKENS)
    stride = expected.read(np.array([0])).nbytes + 4
    monkeypatch.setattr(shard_files, "REMOTE_GAP_BYTES", 3 * stride)
    field.read(np.array([15]))
    store.reads.clear()
    rows = np.array([9, 0, 3, 4])
    assert np.array_equal(field.read(rows), expected.read(rows))
    assert sorted(store.reads) == [
        (f"{TOKENS}/values/c.0.0.0.0", 0, 5 * stride),  # rows 0 to 4: reading 1 and 2 along costs less
        (f"{TOKENS}/values/c.0.0.0.0", 9 * stride, stride),
    ]
    monkeypatch.setattr(shard_files, "REMOTE_READ_BYTES", 8 * stride)
    store.reads.clear()
    field.read(np.arange(16))
    assert sorted(count for _, _, count in store.reads) == [8 * stride, 8 * stride]


def test_requests_to_an_object_store_are_under_way_together(path: Path) -> None:
    store = CountedStore(path, far=True)
    field = Cache.open(store, only=[TOKENS]).field(TOKENS)
    rows = np.arange(0, 160, 16)[:8]
    expected = field.read(rows)
    store.most_at_once, store.pause = 0, threading.Barrier(8)  # each waits for the seven others
    assert np.array_equal(field.read(rows), expected)
    assert store.most_at_once == 8
