"""Readers in other threads and processes: the right rows, however those were started, and never a hang."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_cache import make_cache
from torch.utils.data import DataLoader, Dataset

from emkum.errors import CorruptCache, IncompleteCache
from emkum.shards import reader
from emkum.shards.reader import Cache, Field

TORTURE = float(os.environ.get("EMKUM_TORTURE_MINUTES") or 0) > 0
HANG_SECONDS = 30
FIELDS = ("image/tinyvit@2/tokens", "text/tinybert/ids", "teacher/tinyvit/image/cls", "teacher/tinybert/text/layers")

# Forking a process with threads is what is tested here; newer Pythons warn of it.
pytestmark = [
    pytest.mark.timeout(3600 if TORTURE else 300),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


@pytest.fixture(scope="module", params=["float16", "int8"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten blocks of pictures and ten of captions."""
    place = tmp_path_factory.mktemp("readers") / "cache"
    return make_cache(place, pictures=160, captions=1, val_pictures=0, storage=request.param).path


class Rows(Dataset[tuple[int, torch.Tensor]]):
    """A field as PyTorch takes it: sample i is row i, decoded."""

    def __init__(self, field: Field) -> None:
        self.field = field
        self.rows = field.rows("train")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, sample: int) -> tuple[int, torch.Tensor]:
        row = self.rows[sample]
        return int(row), torch.from_numpy(self.field.values(np.array([row]))[0])


def whole(place: Path, name: str) -> torch.Tensor:
    """Every row, through a reader of its own."""
    field = Cache.open(place).field(name)
    return torch.from_numpy(field.values(field.rows("train")))


def read_by_workers(rows: Rows, start: str) -> torch.Tensor:
    """All rows, through two worker processes. A worker that gives no sign of life fails."""
    loader = DataLoader(rows, batch_size=32, num_workers=2, multiprocessing_context=start, timeout=HANG_SECONDS)
    parts = list(loader)
    assert torch.cat([numbers for numbers, _ in parts]).tolist() == rows.rows.tolist()
    return torch.cat([values for _, values in parts])


@contextlib.contextmanager
def busy_reader(field: Field) -> Iterator[None]:
    """Another thread reads all the time, rows of one block after another, so that shards open and close."""
    done, started = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        try:
            rows = field.rows("train")
            while not done.is_set():
                for row in rows[::16]:
                    field.values(np.array([row]))
                started.set()
        except BaseException as error:
            failures.append(error)
            started.set()

    thread = threading.Thread(target=read)
    thread.start()
    started.wait(HANG_SECONDS)
    try:
        yield
    finally:
        done.set()
        thread.join(HANG_SECONDS)
    assert not thread.is_alive()
    assert not failures


# --- processes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_forked_workers_read_what_their_parent_was_reading(path: Path, name: str) -> None:
    rows = Rows(Cache.open(path).field(name))
    expected = whole(path, name)
    for _ in range(50 if TORTURE else 3):
        assert torch.equal(torch.from_numpy(rows.field.values(rows.rows)), expected)
        assert torch.equal(read_by_workers(rows, "fork"), expected)


@pytest.mark.parametrize("name", FIELDS)
def test_forked_workers_never_wait_for_a_thread_that_stayed_in_the_parent(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 1)  # every other block is opened again, under the lock
    rows = Rows(Cache.open(path).field(name))
    expected = whole(path, name)
    with busy_reader(rows.field):
        for _ in range(50 if TORTURE else 10):
            assert torch.equal(read_by_workers(rows, "fork"), expected)


def test_forked_workers_do_not_wait_for_channel_statistics_that_a_thread_was_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_cache(tmp_path / "cache", val_pictures=0, storage="int8").path
    rows, expected = Rows(Cache.open(place).field(FIELDS[0])), whole(place, FIELDS[0])
    read, parent = reader.read_statistic, os.getpid()
    asked, go_on = threading.Event(), threading.Event()

    def slow_in_the_parent(*arguments: Any) -> np.ndarray:
        if os.getpid() == parent:
            asked.set()
            go_on.wait(2 * HANG_SECONDS)
        return read(*arguments)

    monkeypatch.setattr(reader, "read_statistic", slow_in_the_parent)
    thread = threading.Thread(target=lambda: rows.field.mean)
    thread.start()
    try:
        assert asked.wait(HANG_SECONDS)
        assert torch.equal(read_by_workers(rows, "fork"), expected)
    finally:
        go_on.set()
        thread.join(HANG_SECONDS)


@pytest.mark.parametrize("start", ["forkserver", "spawn"])
def test_workers_started_afresh_read_the_same_rows(path: Path, start: str) -> None:
    rows = Rows(Cache.open(path).field(FIELDS[0]))
    expected = torch.from_numpy(rows.field.values(rows.rows))
    with busy_reader(rows.field):
        for _ in range(10 if TORTURE else 1):
            assert torch.equal(read_by_workers(rows, start), expected)


def sums(field: Field) -> float:
    return float(field.values(field.rows("train")).sum())


def test_a_pool_of_processes_takes_fields_and_caches(path: Path) -> None:
    cache = Cache.open(path)
    here = [sums(cache.field(name)) for name in FIELDS]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        there = pool.map_async(sums, [cache.field(name) for name in FIELDS]).get(2 * HANG_SECONDS)
        assert pool.apply_async(Cache.open, (path,)).get(2 * HANG_SECONDS).uuid == cache.uuid
    assert there == here


def test_a_pickled_cache_takes_its_snapshot_along_and_no_open_file(tmp_path: Path) -> None:
    place = make_cache(tmp_path / "cache", pictures=40, val_pictures=0, views=1).path
    cache = Cache.open(place)
    field = cache.field(FIELDS[0])
    expected = field.values(np.arange(40))
    receipt = place / f"_emkum/receipts/{FIELDS[0]}/000001-0.json"
    kept = receipt.read_bytes()
    receipt.unlink()  # what the snapshot has seen stays seen
    taken = pickle.loads(pickle.dumps(cache))
    assert np.array_equal(taken.field(FIELDS[0]).values(np.arange(40)), expected)
    with pytest.raises(IncompleteCache):
        Cache.open(place).field(FIELDS[0]).values(np.arange(40))
    earlier = pickle.dumps(Cache.open(place))
    receipt.write_bytes(kept)  # what it has not seen stays unseen
    with pytest.raises(IncompleteCache):
        pickle.loads(earlier).field(FIELDS[0]).values(np.arange(40))
    (place / FIELDS[0] / "values/c.1.0.0.0").unlink()
    assert np.array_equal(field.values(np.arange(40)), expected)  # open already
    with pytest.raises(CorruptCache):
        pickle.loads(pickle.dumps(field)).values(np.arange(40))


# --- threads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 256])
def test_threads_share_a_reader(path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", limit)
    cache = Cache.open(path)
    expected = {name: whole(path, name).numpy() for name in FIELDS}

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(20):
            for name in FIELDS:
                rows = random.integers(160, size=24)
                assert np.array_equal(cache.field(name).values(rows), expected[name][rows])

    with ThreadPoolExecutor(6) as pool:
        for reading in [pool.submit(read, seed) for seed in range(12)]:
            reading.result(HANG_SECONDS)
