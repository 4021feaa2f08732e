"""Where a cache lies: a folder of objects on a local disk, or in an object store through fsspec."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from emkum.errors import StorageFailure
from emkum.shards import durable
from emkum.shards.durable import DurableFile, create_file, create_folder, write_file
from emkum.shards.strict_json import MAX_BYTES


class ObjectWriter(Protocol):
    """One object written front to back; it appears at `commit`, whole, or never. A context manager."""

    num_bytes: int

    def write(self, data: bytes | memoryview) -> None: ...

    def write_all(self, parts: Iterator[memoryview]) -> None:
        """Writes the parts, bytes all, one after another; none is needed any more once this returns."""

    def commit(self) -> str:
        """Makes the object durable under its name, replacing another. Returns its SHA-256."""

    def __enter__(self) -> ObjectWriter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Removes what was not committed."""


class RangeReader(Protocol):
    """An object open for reading at any place, from several threads. Closes when nobody holds it."""

    size: int

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills the buffers from `offset` on. Returns the bytes read, fewer only at the object's end."""

    def expect_random(self) -> None:
        """Reads will come at places in no order: reading ahead of them would be wasted."""

    def expect(self, offset: int, num_bytes: int) -> None:
        """These bytes will be read in a moment: a disk may begin to fetch them."""


class Store(Protocol):
    """A folder of objects. Paths are relative to it, with `/`.

    token: hex, drawn for every opened store; whatever this process leaves unfinished bears it.
    Every method raises StorageFailure when the storage refuses, after retries where that can help; what is not there
    is FileNotFoundError.
    """

    url: str
    token: str
    local: Path | None  # the folder itself, where it is one

    def where(self, path: str) -> str:
        """The object's place, for people."""

    def read(self, path: str) -> bytes: ...

    def open(self, path: str) -> RangeReader: ...

    def size(self, path: str) -> int:
        """Bytes."""

    def list(self, folder: str) -> dict[str, int | None]:
        """What lies directly in the folder: name -> bytes, None for a folder. Empty if there is no such folder."""

    def names(self, folder: str) -> Sequence[str]:
        """As `list`, without the bytes: cheaper in large folders."""

    def modified(self, path: str) -> float:
        """Seconds, on the storage's own clock."""

    def writer(self, path: str) -> ObjectWriter: ...

    def write(self, path: str, data: bytes) -> str:
        """A whole durable object, replacing another. Returns its SHA-256."""

    def create(self, path: str, data: bytes) -> bool:
        """A whole durable object where there is none, atomically. Returns whether the object there is now this one."""

    def create_folder(self, folder: str, files: Mapping[str, bytes]) -> bool:
        """Files that belong together; readers count the folder from its last file on. False if it is there already."""

    def touch(self, path: str) -> None:
        """Sets `modified` to now."""

    def remove(self, path: str) -> None:
        """Removes an object if it is there."""

    def sweep(self, living: Collection[str]) -> int:
        """Removes unfinished writes whose token is not among `living`. Returns how many."""

    def free_bytes(self) -> int | None:
        """Room left; None where that has no meaning."""


def open_store(place: Store | Path | str) -> Store:
    """The store at a folder or at a URL that fsspec knows (s3://bucket/folder). Nothing is created."""
    if not isinstance(place, (str, Path)):
        return place
    if is_url(place):
        from emkum.shards.remote import RemoteStore

        return RemoteStore(str(place))
    return LocalStore(place)


def is_url(place: Path | str) -> bool:
    return isinstance(place, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place) is not None


class LocalStore:
    """A folder on a disk, or on a network file system that is mounted."""

    def __init__(self, folder: Path | str) -> None:
        self.local: Path | None = Path(folder)
        self._folder = Path(folder)
        self.url = str(folder)
        self.token = uuid.uuid4().hex

    def where(self, path: str) -> str:
        return str(self._folder / path)

    def read(self, path: str) -> bytes:
        with self._reading(path):
            reader = _LocalReader(self._folder / path)
            data = bytearray(reader.size)
            return bytes(data[: reader.read_into([memoryview(data)], 0)])

    def open(self, path: str) -> RangeReader:
        with self._reading(path):
            return _LocalReader(self._folder / path)

    def size(self, path: str) -> int:
        with self._reading(path):
            return os.stat(self._folder / path).st_size

    def list(self, folder: str) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        try:
            with self._reading(folder), os.scandir(self._folder / folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # it was renamed meanwhile
                        found[entry.name] = None if entry.is_dir() else entry.stat().st_size
        except FileNotFoundError:
            return {}
        return found

    def names(self, folder: str) -> Sequence[str]:
        try:
            with self._reading(folder):
                return os.listdir(self._folder / folder)
        except FileNotFoundError:
            return []

    def modified(self, path: str) -> float:
        with self._reading(path):
            return os.stat(self._folder / path).st_mtime

    def writer(self, path: str) -> DurableFile:
        return DurableFile(self._folder / path, self.token)

    def write(self, path: str, data: bytes) -> str:
        return write_file(self._folder / path, data, self.token)

    def create(self, path: str, data: bytes) -> bool:
        return create_file(self._folder / path, data, self.token)

    def create_folder(self, folder: str, files: Mapping[str, bytes]) -> bool:
        return create_folder(self._folder / folder, files, self.token)

    def touch(self, path: str) -> None:
        with self._reading(path):
            durable.touch(self._folder / path)

    def remove(self, path: str) -> None:
        durable.remove(self._folder / path)

    def sweep(self, living: Collection[str]) -> int:
        removed = 0
        for path in list(self._folder.rglob(f".*{durable.TEMPORARY_SUFFIX}")):
            owner = re.fullmatch(r"\..*\.([0-9a-f]{32})\.[0-9a-f]{8}\.tmp", path.name)
            if owner is not None and owner[1] not in living:
                durable.remove(path)
                removed += 1
        return removed

    def free_bytes(self) -> int | None:
        return shutil.disk_usage(self._folder).free

    @contextlib.contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(f"{self._folder / path} is not there") from error
        except OSError as error:
            raise StorageFailure(
                f"{self._folder / path} cannot be read: {error.strerror or error}",
                "check the disk and the permissions, then run the same command again",
            ) from error


class _LocalReader:
    """An open file. Reads move no position, so threads and forked children may share it."""

    def __init__(self, path: Path) -> None:
        self._handle: int | None = None
        self._path = path
        self._handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
        status = os.fstat(self._handle)
        if not stat.S_ISREG(status.st_mode):
            raise StorageFailure(f"{path} is not a file", "nothing of emkum's: remove it, or restore what was there")
        self.size = status.st_size

    def expect_random(self) -> None:
        assert self._handle is not None
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # it is advice: some file systems take none
                os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_RANDOM)

    def expect(self, offset: int, num_bytes: int) -> None:
        assert self._handle is not None
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._handle, offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        assert self._handle is not None
        try:
            count = total = os.preadv(self._handle, buffers, offset)
            wanted = sum(map(len, buffers))
            while count and total < wanted:  # one call reads 2 GiB at most
                count = os.preadv(self._handle, _past(buffers, total), offset + total)
                total += count
        except OSError as error:
            raise StorageFailure(
                f"{self._path} cannot be read at byte {offset:,}: {error.strerror}", "check the disk"
            ) from error
        return total

    def __del__(self) -> None:
        if self._handle is not None:
            os.close(self._handle)


def _past(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What of the buffers lies behind their first `count` bytes."""
    rest = []
    for buffer in buffers:
        rest.append(buffer[min(count, len(buffer)) :])
        count = max(0, count - len(buffer))
    return rest


def read_small(store: Store, path: str) -> bytes:
    """A JSON record. Raises ValueError for something too large to be one, FileNotFoundError."""
    size = store.size(path)
    if size > MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes")
    return store.read(path)


def exists(store: Store, path: str) -> bool:
    try:
        store.size(path)
    except FileNotFoundError:
        return False
    return True


def sha256_of(store: Store, path: str) -> tuple[int, str]:
    """(bytes, SHA-256) of an object as it lies there, read in pieces."""
    reader, digest, offset = store.open(path), hashlib.sha256(), 0
    buffer = memoryview(bytearray(4 << 20))
    while count := reader.read_into([buffer], offset):
        digest.update(buffer[:count])
        offset += count
    return offset, digest.hexdigest()
