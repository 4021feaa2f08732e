"""An `os` for emkum.shards.durable that fails at its n-th call, or loses what was not synced, as a power cut does."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODES = ("error", "torn", "power", "power, data only")


class PowerCut(OSError):
    """The machine is gone; nothing after this happens."""


class FaultyOs:
    """Counts every call that changes the disk, and fails at number `fail_at`.

    error: the call does nothing and raises. torn: a write leaves half of its bytes and raises. power: from this call
    on nothing happens, and `cut_power` then undoes every change of a directory that was not synced and empties every
    file that was not. "power, data only": directories were written in time, the files' data was not.
    sticky: every later call fails as well. Syncs are noted, not carried out.
    """

    def __init__(self, fail_at: int, mode: str = "error", sticky: bool = False, number: int = errno.EIO) -> None:
        self.fail_at, self.mode, self.sticky, self.number = fail_at, mode, sticky, number
        self.calls: list[str] = []
        self._paths: dict[int, Path] = {}
        self._unsynced: set[Path] = set()
        self._undo: list[tuple[Path, Callable[[], None]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    @property
    def failed(self) -> bool:
        return len(self.calls) > self.fail_at

    def _count(self, name: str, path: Any) -> None:
        self.calls.append(f"{name} {path}")
        number = len(self.calls) - 1
        if number == self.fail_at or (number > self.fail_at and (self.sticky or "power" in self.mode)):
            kind = PowerCut if "power" in self.mode else OSError
            raise kind(self.number, f"fault at {name}")

    # --- what durable calls ------------------------------------------------------------------------------

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        path = Path(path)
        if flags & os.O_CREAT:
            self._count("open", path)
        handle = os.open(path, flags, mode)
        self._paths[handle] = path
        if flags & os.O_CREAT:
            self._unsynced.add(path)
            self._undo.append((path.parent, lambda: path.unlink(missing_ok=True)))
        return handle

    def write(self, handle: int, data: memoryview) -> int:
        path = self._paths[handle]
        if self.mode == "torn" and len(self.calls) == self.fail_at:
            os.write(handle, data[: len(data) // 2])
        self._count("write", path)
        first = path not in self._unsynced or os.fstat(handle).st_size == 0
        self._unsynced.add(path)
        part = data[: max(1, len(data) // 2)] if first else data  # the kernel may write less than it was asked to
        return os.write(handle, part)

    def fsync(self, handle: int) -> None:
        path = self._paths[handle]
        self._count("fsync", path)
        self._unsynced.discard(path)
        self._undo = [(folder, undo) for folder, undo in self._undo if folder != path]

    def close(self, handle: int) -> None:
        self._paths.pop(handle, None)
        os.close(handle)

    def replace(self, source: Any, target: Any) -> None:
        self._move("replace", Path(source), Path(target), os.replace)

    def rename(self, source: Any, target: Any) -> None:
        self._move("rename", Path(source), Path(target), os.rename)

    def _move(self, name: str, source: Path, target: Path, move: Callable[[Path, Path], None]) -> None:
        self._count(name, target)
        old = target.read_bytes() if target.is_file() else None
        move(source, target)
        for path in [p for p in self._unsynced if p == source or source in p.parents]:
            self._unsynced.discard(path)
            self._unsynced.add(target / path.relative_to(source) if path != source else target)

        def undo() -> None:
            if target.exists():
                os.rename(target, source)
            if old is not None:
                target.write_bytes(old)

        self._undo.append((target.parent, undo))

    def link(self, source: Any, target: Any) -> None:
        self._count("link", target)
        os.link(source, target)
        if Path(source) in self._unsynced:
            self._unsynced.add(Path(target))
        self._undo.append((Path(target).parent, lambda: Path(target).unlink(missing_ok=True)))

    def unlink(self, path: Any) -> None:
        path = Path(path)
        self._count("unlink", path)
        old = path.read_bytes()
        os.unlink(path)
        self._undo.append((path.parent, lambda: path.parent.is_dir() and bool(path.write_bytes(old))))

    def mkdir(self, path: Any) -> None:
        path = Path(path)
        self._count("mkdir", path)
        os.mkdir(path)
        self._undo.append((path.parent, lambda: shutil.rmtree(path, ignore_errors=True)))

    def rmdir(self, path: Any) -> None:
        self._count("rmdir", path)
        os.rmdir(path)

    def utime(self, path: Any) -> None:
        self._count("utime", path)
        os.utime(path)

    # --- afterwards --------------------------------------------------------------------------------------

    def cut_power(self) -> None:
        """What the disk holds when the machine is switched on again."""
        for path in self._unsynced:
            if path.is_file():
                os.truncate(path, 0)
        if self.mode == "power":
            for _, undo in reversed(self._undo):
                undo()
