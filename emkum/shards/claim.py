"""One process writes to a cache at a time: a file that only one can create, with a heartbeat."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType

from emkum.errors import AnotherWriter
from emkum.shards.durable import storage_errors
from emkum.shards.layout import RECORDS

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0  # without a heartbeat for so long, the writer counts as dead


class WriterClaim:
    """Held while writing; a context manager.

    A claim whose process is gone from this host, or whose heartbeat stopped, is taken over.
    Raises AnotherWriter naming host, process and last heartbeat.
    """

    def __init__(self, cache: Path | str) -> None:
        self._path = Path(cache) / RECORDS / "claims" / "writer.json"
        self._token = uuid.uuid4().hex
        self._ended = threading.Event()
        with storage_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._take_over_or_refuse()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        if self._is_ours():
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _create(self) -> bool:
        record = {"host": socket.gethostname(), "pid": os.getpid(), "token": self._token}
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            json.dump(record, file)
        return True

    def _take_over_or_refuse(self) -> None:
        try:
            age = time.time() - self._path.stat().st_mtime
            record = json.loads(self._path.read_bytes())
            host, pid = str(record["host"]), int(record["pid"])
        except FileNotFoundError:
            return  # released meanwhile
        except (OSError, ValueError, KeyError, TypeError):
            host, pid = "unknown", 0  # being written, or torn by a crash
        dead = host == socket.gethostname() and pid > 0 and not _is_alive(pid)
        if not dead and age < STALE_SECONDS:
            raise AnotherWriter(
                f"{self._path.parents[2]} is being written by process {pid} on {host}, last heartbeat {age:.0f} s ago",
                f"wait for it, or stop it; a writer without heartbeat is taken over after {STALE_SECONDS:.0f} s",
            )
        stale = self._path.with_name(f".stale.{self._token}.tmp")
        with contextlib.suppress(FileNotFoundError):  # another process was first
            os.rename(self._path, stale)
            stale.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def _is_ours(self) -> bool:
        try:
            return bool(json.loads(self._path.read_bytes())["token"] == self._token)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def __enter__(self) -> WriterClaim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
