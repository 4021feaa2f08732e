"""Files that are whole or not there: temporary name in the same folder, sync, rename, sync the folder.

Whatever changes a local cache goes through the `os` of this module, so that tests can fail every call of it in turn.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from emkum.errors import StorageFailure
from emkum.shards.staging import PIECE_BYTES, Staging

TEMPORARY_SUFFIX = ".tmp"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}  # answers to a write past the page cache
_O_DIRECT = getattr(os, "O_DIRECT", 0)  # 0: the system has none
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


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


def is_full(error: BaseException) -> bool:
    """Whether a StorageFailure says that there is no room: the disk is full, or a quota or limit is reached."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _NO_SPACE


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
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    sync_dir(folder.parent)


def missing_dirs(folder: Path) -> list[Path]:
    """Those of the folder and its ancestors that `make_dir` would create, the innermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    return missing


def remove_empty_dirs(folders: Sequence[Path]) -> None:
    """Removes them in this order, up to the first that holds something. Never raises."""
    with contextlib.suppress(OSError):
        for folder in folders:
            os.rmdir(folder)


def temporary_path(path: Path, token: str) -> Path:
    """Where `path` is written first: beside it, hidden, and bearing the token of the process that writes it."""
    return path.parent / f".{path.name}.{token}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}"


class DurableFile:
    """One object written front to back; appears under its name at `commit`, whole, or never.

    token: of the writing process, part of the temporary name. Use as a context manager: leaving without `commit`
    removes the temporary file. What is written is copied, and up to a few pieces of it (`staging`) are held until a
    piece is full, or until `commit`.
    """

    def __init__(self, path: Path, token: str = "0") -> None:
        self.path = path
        self.num_bytes = 0
        self.swept = False  # the temporary file was taken for one of a dead process
        self._staging = Staging()
        self._direct: bool | None = None  # whether writes pass by the page cache; None: not tried yet, False: no more
        self._temporary = temporary_path(path, token)
        with storage_errors(path):
            make_dir(path.parent)
            self._handle: int | None = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def write(self, data: bytes | memoryview) -> None:
        self.write_all(iter([memoryview(data).cast("B")]))

    def write_all(self, parts: Iterator[memoryview]) -> None:
        """Writes the parts one after another; the next are drawn, in a thread, while those before are written.

        Raises StorageFailure; what drawing raises.
        """
        assert self._handle is not None
        for piece in self._staging.pieces(parts):
            self._write_piece(piece)
        self.num_bytes = self._staging.num_bytes

    def commit(self) -> str:
        """Syncs and renames. Returns the SHA-256 of the contents. Raises StorageFailure."""
        self._finish()
        digest = self._staging.hexdigest()
        with storage_errors(self.path):
            os.replace(self._temporary, self.path)
            sync_dir(self.path.parent)
        return digest

    def commit_new(self) -> bool:
        """Syncs and gives the file its name if nothing has it yet. Returns whether it did."""
        self._finish()
        with storage_errors(self.path):
            try:
                os.link(self._temporary, self.path)
            except FileExistsError:
                return False
            except FileNotFoundError:
                self.swept = not self._temporary.exists()
                if not self.swept:
                    raise
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                try:  # a file system without hard links: the name is taken first, then filled
                    os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
                except FileExistsError:
                    return False
                os.replace(self._temporary, self.path)
            sync_dir(self.path.parent)
        return True

    def discard(self) -> None:
        self._staging.close()
        with contextlib.suppress(OSError):
            self._close()
        with contextlib.suppress(OSError):
            os.unlink(self._temporary)

    def _finish(self) -> None:
        """Writes what is staged, then syncs."""
        assert self._handle is not None
        self._write_piece(self._staging.rest())
        with storage_errors(self.path):
            os.fsync(self._handle)  # a new file's fdatasync does as much: the length is written in any case
            self._close()

    def _write_piece(self, piece: memoryview) -> None:
        """Whole pieces pass by the page cache, where the file system can; the last one is no multiple of its blocks.

        A GB costs 0.05 s of processor so, through the page cache 0.3 to 1.5 s; and the last sync has little to do.
        """
        assert self._handle is not None
        whole = len(piece) == PIECE_BYTES
        if (whole and self._direct is None) or (self._direct and not whole):
            self._set_direct(whole)
        with storage_errors(self.path):
            while piece:
                try:
                    piece = piece[os.write(self._handle, piece) :]
                except OSError as error:
                    if not self._direct or error.errno not in _NOT_DIRECT:
                        raise
                    self._set_direct(False)  # after a write that was cut short; or the file system cannot after all

    def _set_direct(self, direct: bool) -> None:
        assert self._handle is not None
        self._direct = direct and _O_DIRECT != 0
        try:
            flags = fcntl.fcntl(self._handle, fcntl.F_GETFL) & ~_O_DIRECT
            fcntl.fcntl(self._handle, fcntl.F_SETFL, flags | (_O_DIRECT if self._direct else 0))
        except OSError:  # a file system that cannot
            self._direct = False

    def _close(self) -> None:
        """Closes once, even if that fails: by then another thread may have the number."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def write_file(path: Path, data: bytes, token: str = "0") -> str:
    """Writes `data` as one durable file and returns its SHA-256."""
    with DurableFile(path, token) as file:
        file.write(data)
        return file.commit()


def create_file(path: Path, data: bytes, token: str = "0") -> bool:
    """Writes a durable file unless one is there. Returns whether the file there is now ours.

    A network file system may carry the link out and lose the reply: what is there is read back and compared.
    A process that writes its first claim is unknown to others, which may sweep what it has not yet named.
    """
    for attempt in range(3):
        try:
            with DurableFile(path, token) as file:
                file.write(data)
                if file.commit_new():
                    return True
        except StorageFailure as error:
            # Another process may remove an empty folder between the moment it is made and the first file in it.
            if attempt < 2 and isinstance(error.__cause__, FileNotFoundError):
                continue
            raise
        if not file.swept:
            break
    with storage_errors(path):
        try:
            return path.read_bytes() == data
        except FileNotFoundError:  # it was there, and somebody removed it: not ours
            return False


def create_folder(path: Path, files: Mapping[str, bytes], token: str = "0") -> bool:
    """Writes a folder of files that appears whole, by one rename, unless one is there. Returns whether it did."""
    temporary = temporary_path(path, token)
    try:
        with storage_errors(path):
            make_dir(path.parent)
            os.mkdir(temporary)
        for name, data in files.items():
            write_file(temporary / name, data, token)
        with storage_errors(path):
            try:
                os.rename(temporary, path)
            except OSError:
                if path.is_dir():
                    return False
                raise
            sync_dir(path.parent)
        return True
    finally:
        remove(temporary)


def touch(path: Path) -> None:
    os.utime(path)


def remove(path: Path) -> None:
    """Removes a file, or a folder of files, if it is there. Never raises."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            for child in list(path.iterdir()):
                remove(child)
            os.rmdir(path)
        else:
            os.unlink(path)


def sweep_temporaries(folder: Path, older_than_seconds: float) -> int:
    """Removes unfinished writes below `folder` that nobody has touched for a while; returns how many."""
    removed = 0
    for path in list(folder.rglob(f".*{TEMPORARY_SUFFIX}")):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > older_than_seconds:
                remove(path)
                removed += 1
    return removed
