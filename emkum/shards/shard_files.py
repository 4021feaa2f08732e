"""Shard files read at the speed of the disk: chunks go straight into the caller's memory, each checked at first sight.

A chunk is known by its number in its shard, row by row and within a row tile by tile; its place in the file is looked
up in the shard's index. N chunks.
"""

from __future__ import annotations

import itertools
import mmap
import os
import resource
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import google_crc32c
import numpy as np

from emkum.errors import CorruptCache
from emkum.shards.layout import ABSENT
from emkum.shards.ledger import CommittedObject
from emkum.shards.store import RangeReader, Store

Verify = Literal["first", "always", "never"]
VERIFY: tuple[Verify, ...] = ("first", "always", "never")
MISSING = 2**32 - 1  # in `Shard.places`
MAX_OPEN_SHARDS = min(4096, max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))  # each may hold two files
MAPPED_SHARE = 0.25  # of the machine's memory: a field that takes more is never mapped
REMOTE_GAP_BYTES = 512 << 10  # fewer bytes than this cost less to read along than another request
REMOTE_READ_BYTES = 16 << 20  # of one request
REMOTE_THREADS = 16  # requests under way at once
MAX_BUFFERS = 1000  # of one preadv; the system's limit is 1,024
REPAIR = (
    "`emkum cache repair` with this cache's folder drops what is damaged, and the same extract command redoes exactly "
    "that; or restore the object from a copy of the cache"
)


class Shard:
    """One committed shard: its index, parsed and checked once, and which of its chunks have been checked.

    Kept for as long as the cache is open, in a few kilobytes; its file is opened and closed as files are needed.
    """

    def __init__(
        self,
        files: ShardFiles,
        path: str,
        stated: CommittedObject,
        grid: tuple[int, int],
        chunk_bytes: int,
        map_it: bool,
        in_order: bool = False,
    ) -> None:
        self.path, self.grid, self.chunk_bytes = path, grid, chunk_bytes
        self._stated, self._map_it, self._in_order = stated, map_it, in_order
        self.file: RangeReader | None = None
        self.mapped: np.ndarray | None = None  # uint8, the whole file
        self._marks: tuple[tuple[int, int], ...] = ()  # offset and checksum of those that every opened file must bear
        file = files.file(self)
        self.places = self._read_index(file, files.where(path))  # uint32 [chunk]: its number in the file, or MISSING
        self.checked = np.zeros(len(self.places), dtype=bool)
        self._marks = tuple((self._mark_offset(files.where(path), *mark), mark[1]) for mark in stated.marks)
        self._require_marks(file, files.where(path))

    def open(self, store: Store) -> RangeReader:
        """Raises CorruptCache where the object is gone, or is not the one that the receipt states."""
        try:
            file = store.open(self.path)
        except FileNotFoundError as error:
            raise CorruptCache(
                f"object {store.where(self.path)} is missing, its receipt says {self._stated.bytes} bytes", REPAIR
            ) from error
        if not self._in_order:
            file.expect_random()
        if file.size != self._stated.bytes:
            raise CorruptCache(
                f"object {store.where(self.path)} has {file.size} bytes, its receipt says {self._stated.bytes}", REPAIR
            )
        self._require_marks(file, store.where(self.path))  # another may lie there by now
        return file

    def map(self, store: Store) -> np.ndarray | None:
        """The file as memory, if it is to be read so."""
        if not self._map_it or store.local is None:
            return None
        try:
            with open(store.local / self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size != self._stated.bytes:  # reading past its end would kill us
                    return None
                return np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
        except OSError:  # a file system, or a limit, that allows none: rows are read instead
            return None

    def _read_index(self, file: RangeReader, where: str) -> np.ndarray:
        size = self._stated.bytes
        index_bytes = self.grid[0] * self.grid[1] * 16
        data = bytearray(min(index_bytes + 4, size))
        count = file.read_into([memoryview(data)], max(size - index_bytes - 4, 0))
        if count != index_bytes + 4 or google_crc32c.value(bytes(data[:-4])) != struct.unpack("<I", data[-4:])[0]:
            raise CorruptCache(f"the index of {where} fails its checksum", REPAIR)
        index = np.frombuffer(bytes(data[:-4]), dtype="<u8").reshape(-1, 2)
        starts, sizes = index[:, 0], index[:, 1]
        present, stride = starts != ABSENT, self.chunk_bytes + 4
        last = size - index_bytes - 4 - stride  # where the last chunk may start
        if (sizes[present] != stride).any() or (present.any() and (last < 0 or starts[present].max() > last)):
            raise CorruptCache(f"the index of {where} points outside its chunks", REPAIR)
        if (starts[present] % stride).any():
            raise CorruptCache(f"the index of {where} has gaps between its chunks", REPAIR)
        return np.where(present, starts // stride, MISSING).astype(np.uint32)

    def _mark_offset(self, where: str, number: int, crc: int) -> int:
        """Where the checksum of a chunk lies that the receipt states."""
        place = int(self.places[number]) if number < len(self.places) else MISSING
        if place == MISSING:
            raise CorruptCache(f"{where} lacks chunk {number}, which its receipt states", REPAIR)
        return place * (self.chunk_bytes + 4) + self.chunk_bytes

    def _require_marks(self, file: RangeReader, where: str) -> None:
        """A few chunks bear the checksums that the receipt states: the file was not swapped with another."""
        for offset, crc in self._marks:
            found = bytearray(4)
            if file.read_into([memoryview(found)], offset) != 4:
                raise CorruptCache(f"{where} ended inside a chunk at {offset}", REPAIR)
            if int.from_bytes(found, "little") != crc:
                raise CorruptCache(
                    f"{where}: the chunk before byte {offset} has checksum {int.from_bytes(found, 'little'):08x}, the "
                    f"receipt states {crc:08x}: it may be the object of another block",
                    REPAIR,
                )


class ShardFiles:
    """The files behind shards, a limited number of them open; shared by the fields of a cache, by threads and forks."""

    def __init__(self, store: Store, limit: int, verify: Verify = "first") -> None:
        self.store, self.verify, self._limit = store, verify, limit
        self._opened: deque[Shard] = deque()
        self._remote: ReadThreads | None = None
        self.renew_after_fork()
        RENEWED.add(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.Lock()

    def where(self, path: str) -> str:
        return self.store.where(path)

    def file(self, shard: Shard) -> RangeReader:
        """The shard's open file. Beyond the limit the one that was opened first is closed, once nobody reads from it.

        First opened, first closed: rows come in random order, and then no other choice is better.
        """
        file = shard.file
        if file is not None:
            return file
        file = shard.open(self.store)
        mapped = shard.map(self.store)
        with self._lock:
            if shard.file is None:
                shard.file, shard.mapped = file, mapped
                self._opened.append(shard)
            while len(self._opened) > self._limit and self.store.local is not None:
                closed = self._opened.popleft()
                closed.file = closed.mapped = None
        return file

    def threads(self) -> ReadThreads | None:
        """Threads of the cache's own for an object store, where a read is mostly waiting; None for a disk."""
        if self.store.local is not None:
            return None
        with self._lock:
            if self._remote is None:
                self._remote = ReadThreads(REMOTE_THREADS)
            return self._remote

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "verify": self.verify, "_limit": self._limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["store"], state["_limit"], state["verify"])  # type: ignore[misc]


class ReadThreads:
    """Threads that share the reading of one batch; what they spend is counted.

    seconds: of all of them together; busy_seconds: of these, on a processor, copying and checking. The rest they
    waited for storage, or for their turn.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.seconds = 0.0
        self.busy_seconds = 0.0
        self.renew_after_fork()
        RENEWED.add(self)

    def renew_after_fork(self) -> None:
        self._pool = ThreadPoolExecutor(self.number, thread_name_prefix="emkum-read")
        self._lock = threading.Lock()

    def share(self, work: Callable[[int, int], None], count: int, most: int | None = None) -> None:
        """Calls work(start, stop) for parts that make up range(count); raises the first failure, when all ended.

        most: parts at most, for work that never waits.
        """
        parts = min(self.number, count, most or count)
        if parts <= 1:
            self._timed(work, 0, count)
            return
        edges = np.linspace(0, count, parts + 1).astype(int).tolist()
        running = [self._pool.submit(self._timed, work, a, b) for a, b in itertools.pairwise(edges)]
        failures = [error for one in running if (error := one.exception()) is not None]
        if failures:
            raise failures[0]

    def _timed(self, work: Callable[[int, int], None], start: int, stop: int) -> None:
        began, began_busy = time.perf_counter(), time.thread_time()
        try:
            work(start, stop)
        finally:
            with self._lock:
                self.seconds += time.perf_counter() - began
                self.busy_seconds += time.thread_time() - began_busy

    def close(self) -> None:
        """Ends the threads without waiting for one that hangs; only the end of the interpreter waits for it."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Renewed(Protocol):
    """What holds a lock. A thread of the parent may hold it when a child is forked: the child starts with its own."""

    def renew_after_fork(self) -> None: ...


RENEWED: weakref.WeakSet[Renewed] = weakref.WeakSet()


def _renew_after_fork() -> None:
    for one in list(RENEWED):
        one.renew_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)


@dataclass(frozen=True)
class Chunks:
    """Chunks to read, all of one size, ascending by shard and within it by number: the i-th lies at places[i] of
    shards[shard_of[i]], is chunk numbers[i] of it, and goes to byte targets[i] of the output.
    """

    shards: Sequence[Shard]
    shard_of: np.ndarray  # int64 [N]
    numbers: np.ndarray  # int64 [N]
    places: np.ndarray  # int64 [N]
    targets: np.ndarray  # int64 [N]
    checked: np.ndarray  # bool [N]: whether its checksum was looked at before

    def only(self, which: np.ndarray) -> Chunks:
        """Those at these indices."""
        return Chunks(
            self.shards,
            self.shard_of[which],
            self.numbers[which],
            self.places[which],
            self.targets[which],
            self.checked[which],
        )


def read_chunks(files: ShardFiles, chunks: Chunks, out: np.ndarray, threads: ReadThreads | None) -> None:
    """Fills `out`, uint8 [bytes]. Chunks that lie side by side are read in one call; `threads` share the work.

    Raises CorruptCache for a chunk that fails its checksum.
    """
    if files.verify != "always":
        chunks = _copy_mapped(chunks, out, threads)
    if not len(chunks.numbers):
        return
    local = files.store.local is not None
    stride = chunks.shards[0].chunk_bytes + 4
    groups = _groups(chunks.shard_of, chunks.places, stride, local)
    shard_of, places = chunks.shard_of.tolist(), chunks.places.tolist()
    wanted = list(zip(chunks.numbers.tolist(), places, chunks.targets.tolist(), strict=True))

    def read(start: int, stop: int) -> None:
        for first, end in groups[start:stop] if local and stop - start > 1 else ():  # the disk has all of them to do
            span = (places[end - 1] - places[first] + 1) * stride
            files.file(chunks.shards[shard_of[first]]).expect(places[first] * stride, span)
        for first, end in groups[start:stop]:
            _read_group(files, chunks.shards[shard_of[first]], wanted[first:end], out)

    threads = threads or files.threads()
    if threads is None:
        read(0, len(groups))
    else:
        threads.share(read, len(groups))


def _copy_mapped(chunks: Chunks, out: np.ndarray, threads: ReadThreads | None) -> Chunks:
    """Copies the chunks that have been checked and lie in mapped memory; gives back the others."""
    mapped = [shard.mapped for shard in chunks.shards]  # held here: another thread may close files meanwhile
    is_mapped = np.array([memory is not None for memory in mapped], dtype=bool)
    ready = chunks.checked & is_mapped[chunks.shard_of] if len(mapped) else chunks.checked
    which = np.flatnonzero(ready)
    if len(which):
        size, stride = chunks.shards[0].chunk_bytes, chunks.shards[0].chunk_bytes + 4
        shard_of = chunks.shard_of[which].tolist()
        starts, targets = (chunks.places[which] * stride).tolist(), chunks.targets[which].tolist()

        def copy(first: int, stop: int) -> None:
            for i in range(first, stop):
                memory = mapped[shard_of[i]]
                assert memory is not None
                out[targets[i] : targets[i] + size] = memory[starts[i] : starts[i] + size]

        if threads is None:
            copy(0, len(which))
        else:
            threads.share(copy, len(which), most=cores())
    return chunks.only(np.flatnonzero(~ready)) if len(which) else chunks


def _groups(shard_of: np.ndarray, places: np.ndarray, stride: int, local: bool) -> list[tuple[int, int]]:
    """Ranges of chunks that one call reads: neighbours on a disk, near ones in an object store."""
    far = 1 if local else 1 + REMOTE_GAP_BYTES // stride
    step = np.diff(places)
    apart = (np.diff(shard_of) != 0) | (step > far) | (step < 1)
    edges = [0, *(np.flatnonzero(apart) + 1).tolist(), len(places)]
    span = len(places) if local else max(1, REMOTE_READ_BYTES // stride)  # places that one request may reach over
    groups = []
    for start, end in itertools.pairwise(edges):
        first, spots = start, places[start:end]
        while first < end:
            reach = start + int(np.searchsorted(spots, places[first] + span))
            stop = min(end if local else reach, first + MAX_BUFFERS // 3)
            groups.append((first, stop))
            first = stop
    return groups


def _read_group(files: ShardFiles, shard: Shard, chunks: list[tuple[int, int, int]], out: np.ndarray) -> None:
    """chunks: (number, place in the file, place in `out`), ascending in the file."""
    size, stride = shard.chunk_bytes, shard.chunk_bytes + 4
    seen = files.verify != "always" and all(shard.checked[number] for number, _, _ in chunks)
    check = files.verify == "always" or (files.verify == "first" and not seen)
    first = chunks[0][1] * stride
    end, buffers, stated = first, [], []
    for _, place, target in chunks:
        if place * stride > end:  # checksums and chunks between those that are wanted
            buffers.append(memoryview(bytearray(place * stride - end)))
        buffers.append(out[target : target + size].data)
        end = place * stride + size
        if check:
            stated.append(bytearray(4))
            buffers.append(memoryview(stated[-1]))
            end += 4
    count = files.file(shard).read_into(buffers, first)
    if count != end - first:
        raise CorruptCache(f"{files.where(shard.path)} ended inside a chunk at {first + count}", REPAIR)
    for (number, place, target), checksum in zip(chunks, stated, strict=False):
        if google_crc32c.value(out[target : target + size]) != int.from_bytes(checksum, "little"):
            raise CorruptCache(
                f"{files.where(shard.path)}: the chunk at byte {place * stride} (row {number // shard.grid[1]} of the "
                "block) fails its checksum",
                REPAIR,
            )
    for number, _, _ in chunks:
        shard.checked[number] = True


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory_bytes() -> int:
    """Memory of this machine, or of the container that this process is in."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # control groups, version 2 and 1
        try:
            with open(f"/sys/fs/cgroup/{limit}") as file:
                found = min(found, int(file.read()))
        except (OSError, ValueError):  # none, or "max"
            continue
    return found
