"""Files that are whole or not there: temporary name in the same folder, sync, rename, sync the folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from emkum.errors import StorageFailure

TEMPORARY_SUFFIX = ".tmp"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns an OSError of a write into StorageFailure that names the path, the cause and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise StorageFailure(
                f"no room to write {path}: {error.strerror}",
                "free space or raise the quota, then run the same command again: committed blocks are kept",
            ) from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise StorageFailure(
                f"cannot write {path}: {error.strerror}", "make the folder writable or choose another"
            ) from error
        raise StorageFailure(
            f"cannot write {path}: {error}", "check the disk, then run the same command again"
        ) from error


def sync_dir(folder: Path) -> None:
    """Makes renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_dir(folder: Path) -> None:
    """Creates a folder and its ancestors so that they survive a power loss."""
    if folder.is_dir():
        return
    make_dir(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_dir(folder.parent)


class DurableFile:
    """One object written front to back; appears under its name at `commit`, whole, or never.

    Use as a context manager: leaving without `commit` removes the temporary file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self._digest = hashlib.sha256()
        self._temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
        with storage_errors(path):
            make_dir(path.parent)
            self._handle: int | None = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def write(self, data: bytes | memoryview) -> None:
        assert self._handle is not None
        view = memoryview(data).cast("B") if not isinstance(data, bytes) else memoryview(data)
        self._digest.update(view)
        self.num_bytes += len(view)
        with storage_errors(self.path):
            while view:
                view = view[os.write(self._handle, view) :]

    def commit(self) -> str:
        """Syncs and renames. Returns the SHA-256 of the contents."""
        assert self._handle is not None
        with storage_errors(self.path):
            os.fsync(self._handle)
            os.close(self._handle)
            self._handle = None
            os.replace(self._temporary, self.path)
            sync_dir(self.path.parent)
        return self._digest.hexdigest()

    def discard(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def write_file(path: Path, data: bytes) -> str:
    """Writes `data` as one durable file and returns its SHA-256."""
    with DurableFile(path) as file:
        file.write(data)
        return file.commit()


def sweep_temporaries(folder: Path, older_than_seconds: float) -> int:
    """Removes unfinished writes below `folder` that nobody has touched for a while; returns how many."""
    removed = 0
    for path in list(folder.rglob(f".*{TEMPORARY_SUFFIX}")):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > older_than_seconds:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed += 1
    return removed
