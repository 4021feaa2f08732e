"""Reads a cache so that a sector that cannot be read is damage of one file, and no end of the check."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from typing import Any

from emkum.errors import StorageFailure
from emkum.shards.store import RangeReader, Store

_OF_ONE_FILE = (errno.EIO, getattr(errno, "EUCLEAN", errno.EIO), errno.EBADMSG)  # XFS and ext4 report two by the latter


class Unreadable(ValueError):
    """One file of the cache; the storage itself answers."""


class CheckedStore:
    """A store whose bad sectors, and whatever lies in a file's place without being one, are `Unreadable`.

    A permission, and an object store that does not answer, stay StorageFailure: nothing of theirs is damaged. So does
    a disk that is gone: the root is read again before a file is blamed. `last`: the bytes that were read last.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.last = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read(self, path: str) -> bytes:
        with self.one_file():
            self.last = self._store.read(path)
        return self.last

    def size(self, path: str) -> int:
        with self.one_file():
            return self._store.size(path)

    def open(self, path: str) -> RangeReader:
        with self.one_file():
            return _CheckedReader(self, self._store.open(path))

    @contextlib.contextmanager
    def one_file(self) -> Iterator[None]:
        try:
            yield
        except StorageFailure as error:
            cause = error.__cause__
            sector = cause is None or (isinstance(cause, OSError) and cause.errno in _OF_ONE_FILE)
            if self._store.local is None or not sector:
                raise
            self._store.read("zarr.json")
            raise Unreadable("cannot be read: " + (_reason(cause) if cause else "it is not a file")) from error


class _CheckedReader:
    def __init__(self, store: CheckedStore, reader: RangeReader) -> None:
        self._store, self._reader, self.size = store, reader, reader.size

    def expect_random(self) -> None:
        self._reader.expect_random()

    def expect(self, offset: int, num_bytes: int) -> None:
        self._reader.expect(offset, num_bytes)

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        with self._store.one_file():
            return self._reader.read_into(buffers, offset)


def _reason(cause: BaseException) -> str:
    return str(getattr(cause, "strerror", None) or cause)
