"""Who writes what at this moment: claims that only one process can hold, kept alive by a heartbeat.

A claim is an object `_emkum/claims/<key>.<generation>.json`, created only where there is none. The highest generation
holds; whoever finds its holder dead creates the next one. Its number fences the old holder off: before it commits
anything it looks whether its own claim still stands.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from emkum.errors import AnotherWriter, ClaimLost, StorageFailure
from emkum.shards.durable import missing_dirs, remove_empty_dirs
from emkum.shards.layout import RECORDS, SPACES, Space
from emkum.shards.store import Store, exists, read_small
from emkum.shards.strict_json import loads

_FOLDER = "claims"
CLAIMS = f"{RECORDS}/{_FOLDER}"
HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0  # without a heartbeat for so long, a holder counts as dead
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Holder:
    """The process that made a claim. place: the boot and process namespace in which its number has a meaning."""

    token: str
    host: str
    pid: int
    started: int  # of the process, in ticks after boot: numbers are used again
    place: str
    folder: str  # the cache's device and inode: a copy of a cache takes claims along that nobody holds there
    abandoned: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass
class Claim:
    """A claim of this process, held until `release` or `abandon`."""

    claims: Claims
    key: str
    path: str
    generation: int  # above 1: taken over from a dead process
    touched: bool = False  # committing began: objects may lie there without a receipt

    def check(self) -> None:
        """Raises ClaimLost if another process has taken over, or the claim was removed."""
        self.claims._check(self)

    def release(self) -> None:
        """The work is done, or nothing of it was begun. Generations that this one replaced go first."""
        self.claims._release(self)

    def abandon(self) -> None:
        """Leaves the claim behind, for whoever goes on: objects without a receipt may lie there."""
        self.claims._abandon(self)


class Claims:
    """All claims of this process on one cache. A context manager: at its end nothing of it counts as held."""

    def __init__(self, store: Store) -> None:
        self.store = store
        pid = os.getpid()
        self._me = Holder(store.token, socket.gethostname(), pid, _started(pid) or 0, _place(), "")
        self._held: dict[str, Claim] = {}
        self._writer: str | None = None
        self._made: list[Path] = []  # folders that came with the first claim, of a plan that came to nothing
        self._planning: Claim | None = None
        self._lock = threading.Lock()
        self._beating = threading.Lock()  # while heartbeats go out
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._own_clock = store.local is not None and not _is_network(store.local)
        self._offset, self._offset_until = 0.0, 0.0  # of the storage's clock from ours

    @contextlib.contextmanager
    def planning(self, join: bool, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
        """The time in which one process alone opens or grows the cache; from then on it counts as a writer.

        `check_planning` belongs before everything that is written meanwhile.
        join: work beside other writers, and wait for one that is planning. Else AnotherWriter is raised if there is
        one, naming host, process and last heartbeat. Unfinished writes of dead processes are removed. Where there was
        no cache, an error leaves none behind, and no folder, unless something was put into it.
        """
        claim, waiting = None, False
        missing = missing_dirs(self.store.local / CLAIMS) if self.store.local is not None else []
        while claim is None:
            if not join:
                self.require_alone()
            claim = self.take("plan")
            if claim is None:
                if not join:
                    self.require_alone()
                if not waiting:
                    say(f"another process is planning its work on {self.store.url}: waiting for it")
                waiting = True
                time.sleep(POLL_SECONDS)
        is_new = not exists(self.store, "zarr.json")
        try:
            self._planning = claim
            if not join:
                self.require_alone()
            if self._writer is None:
                path = f"{CLAIMS}/writer-{self._me.token}.json"
                self.store.create(path, self._record())
                with self._lock:
                    self._writer = path
            living = {holder.token for holder, _ in self.writers(drop_dead=True)} | {self._me.token}
            self.store.sweep(living)
            yield
        except BaseException:
            with contextlib.suppress(StorageFailure):  # it is the other error that counts
                if is_new and self._is_bare(claim):
                    self.store.remove("zarr.json")
                    self._made = missing
            raise
        finally:
            self._planning = None
            claim.release()

    def check_planning(self) -> None:
        """Raises ClaimLost if this process is not planning any more: another took it for dead."""
        assert self._planning is not None
        self._planning.check()

    def _is_bare(self, claim: Claim) -> bool:
        """Whether the cache holds no more than its root and claims, while this process plans, alone."""
        try:
            self._check(claim)
            found = {name for name in self.store.list("") if not name.startswith(".")}
            bare = found <= {"zarr.json", RECORDS, "lost+found"} and set(self.store.list(RECORDS)) <= {_FOLDER}
            return bare and not self.writers()
        except (ClaimLost, StorageFailure):
            return False

    def require_alone(self) -> None:
        """Raises AnotherWriter if another living process writes to, or plans to write to, the cache."""
        for holder, seconds in self.writers():
            raise AnotherWriter(
                f"{self.store.url} is being written by {holder}, last heartbeat {max(seconds, 0):.0f} s ago",
                "work beside it with --join, wait for it, or stop it; a writer without heartbeat is taken over after "
                f"{STALE_SECONDS:.0f} s",
            )

    def writers(self, drop_dead: bool = False) -> list[tuple[Holder, float]]:
        """The other living processes that write or plan, with the seconds since their last heartbeat."""
        found = {}
        for name in self.store.names(CLAIMS):
            if re.fullmatch(r"writer-[0-9a-f]+\.json|plan\.[0-9]+\.json", name) or _BLOCK_CLAIM.fullmatch(name):
                path = f"{CLAIMS}/{name}"
                holder, seconds = self._holder(path)
                if holder is None or holder.token == self._me.token:
                    continue
                if self._is_alive(holder, seconds):
                    found[holder.token] = holder, seconds
                elif drop_dead and name.startswith("writer-"):
                    self.store.remove(path)
        return list(found.values())

    def dead_keys(self) -> list[str]:
        """Keys whose last holder is dead and left its claim behind."""
        keys = {found[1] for name in self.store.names(CLAIMS) if (found := _BLOCK_CLAIM.fullmatch(name))}
        dead = []
        for key in sorted(keys):
            last = self._generations(key)
            holder, seconds = self._holder(self._path(key, last[-1])) if last else (None, 0.0)
            if holder is not None and not self._is_alive(holder, seconds):
                dead.append(key)
        return dead

    def holder_of(self, key: str) -> Holder | None:
        """Who has the claim on `key` at this moment."""
        last = self._generations(key)
        return self._holder(self._path(key, last[-1]))[0] if last else None

    def take(self, key: str) -> Claim | None:
        """The claim on `key`, or None while another living process has it."""
        generation, dead = 0, None
        last = self._generations(key)
        if last:
            dead, seconds = self._holder(self._path(key, last[-1]))
            if dead is None or self._is_alive(dead, seconds):
                return None
            generation = last[-1]
        path = self._path(key, generation + 1)
        if not self.store.create(path, self._record()):
            return None
        if dead is not None:  # another heir may have been faster, and done with it, and the numbers begun again
            found, _ = self._holder(self._path(key, generation))
            if found is None or found.token != dead.token:
                self.store.remove(path)
                return None
        claim = Claim(self, key, path, generation + 1)
        with self._lock:
            self._held[path] = claim
        self._start_beating()
        return claim

    # --- what a claim asks for ---------------------------------------------------------------------------

    def _check(self, claim: Claim) -> None:
        last = self._generations(claim.key)
        holder = self._read(self._path(claim.key, last[-1])) if last else None
        if holder is None or holder.token != self._me.token or last[-1] != claim.generation:
            raise ClaimLost(
                f"{self.store.url}: {claim.key} was taken over by {holder or 'another process'} while this process "
                f"({self._me.pid} on {self._me.host}) gave no heartbeat",
                "nothing to do: the other process commits it; a paused machine or a blocked disk is the usual cause",
            )

    def _release(self, claim: Claim) -> None:
        self._drop(claim)
        with contextlib.suppress(ClaimLost, StorageFailure):
            self._check(claim)
            for generation in self._generations(claim.key):  # ascending: ours is the last
                self.store.remove(self._path(claim.key, generation))

    def _abandon(self, claim: Claim) -> None:
        self._drop(claim)
        with contextlib.suppress(ClaimLost, StorageFailure):
            self._check(claim)
            self.store.write(claim.path, self._record(abandoned=True))

    def _drop(self, claim: Claim) -> None:
        """No heartbeat for it from now on: one that is on its way could bring a removed claim back."""
        with self._lock:
            self._held.pop(claim.path, None)
        if self._beating.acquire(timeout=HEARTBEAT_SECONDS):
            self._beating.release()

    # --- records -----------------------------------------------------------------------------------------

    def _path(self, key: str, generation: int) -> str:
        return f"{CLAIMS}/{key}.{generation}.json"

    def _generations(self, key: str) -> list[int]:
        pattern = re.compile(rf"{re.escape(key)}\.([0-9]{{1,9}})\.json")
        return sorted(int(found[1]) for name in self.store.names(CLAIMS) if (found := pattern.fullmatch(name)))

    def _record(self, abandoned: bool = False) -> bytes:
        me = self._me
        record = {"token": me.token, "host": me.host, "pid": me.pid, "started": me.started, "place": me.place}
        record |= {"folder": _folder(self.store), "abandoned": abandoned}
        return (json.dumps(record, sort_keys=True) + "\n").encode()

    def _holder(self, path: str) -> tuple[Holder | None, float]:
        """The holder that a claim names and the seconds since its heartbeat; None if the claim is gone."""
        try:
            modified = self.store.modified(path)
        except FileNotFoundError:
            return None, 0.0
        holder = self._read(path)
        if holder is None or holder.token == self._me.token or holder.abandoned:
            return holder, 0.0
        return holder, self._now() - modified

    def _read(self, path: str) -> Holder | None:
        """The holder that a claim names; None if the claim is gone."""
        try:
            record = loads(read_small(self.store, path))
            return Holder(
                str(record["token"]),
                str(record["host"]),
                int(record["pid"]),
                int(record["started"]),
                str(record["place"]),
                str(record["folder"]),
                bool(record["abandoned"]),
            )
        except FileNotFoundError:
            return None
        except (KeyError, TypeError, ValueError):
            return Holder("", "an unknown machine", 0, 0, "", "")

    def _is_alive(self, holder: Holder, seconds: float) -> bool:
        if holder.abandoned:
            return False
        if holder.place and holder.place == self._me.place:
            started = _started(holder.pid)
            if started is not None and started != holder.started:
                return False
            if "" != holder.folder != _folder(self.store):
                return False
        return seconds < STALE_SECONDS

    def _now(self) -> float:
        """The storage's own clock: those of two machines may differ. Looked at once in a while."""
        if self._own_clock:
            return time.time()
        if time.monotonic() > self._offset_until:
            path = f"{CLAIMS}/clock-{self._me.token}.json"
            if self.store.create(path, b"{}\n"):
                self._offset = self.store.modified(path) - time.monotonic()
                self._offset_until = time.monotonic() + STALE_SECONDS / 2
            self.store.remove(path)
        return time.monotonic() + self._offset

    # --- the heartbeat -----------------------------------------------------------------------------------

    def _start_beating(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with self._beating:
                with self._lock:
                    paths = [*self._held, *([self._writer] if self._writer else [])]
                for path in paths:
                    if path != self._writer and path not in self._held:
                        continue  # released meanwhile
                    try:
                        self.store.touch(path)
                    except FileNotFoundError:
                        if path == self._writer:  # it was taken for dead; now it is seen again
                            with contextlib.suppress(StorageFailure):
                                self.store.create(path, self._record())
                    except (OSError, StorageFailure):
                        continue

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for claim in list(self._held.values()):
            if claim.touched:
                claim.abandon()
            else:
                claim.release()
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._writer is not None:
            with contextlib.suppress(StorageFailure):
                self.store.remove(self._writer)
        remove_empty_dirs(self._made)


_BLOCK_CLAIM = re.compile(rf"((?:{'|'.join(SPACES)})-[0-9]{{6,}}-[0-9]+)\.[0-9]{{1,9}}\.json")


def block_key(space: Space, block: int, view: int) -> str:
    return f"{space}-{block:06d}-{view}"


def block_of(key: str) -> tuple[str, int, int]:
    """(space, block, view) of a key that `block_key` made."""
    space, block, view = key.split("-")
    return space, int(block), int(view)


def _place() -> str:
    """Names the boot and the process namespace, in which process numbers mean something; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _folder(store: Store) -> str:
    if store.local is None:
        return ""
    try:
        status = os.stat(store.local)
        return f"{status.st_dev}:{status.st_ino}"
    except OSError:
        return ""  # it is about to be made


def _started(pid: int) -> int | None:
    """When a living process of this machine started, in ticks after boot; 0 if there is none, None if we cannot see."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if fields[0] in ("Z", "X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return 0
    except (OSError, OverflowError):
        pass
    return None


def _is_network(folder: Path) -> bool:
    """Whether the folder lies on a mount that another machine serves."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except (OSError, IndexError):
        return True
    here = os.path.realpath(folder)
    inside = [(m, kind) for m, kind in mounts if here == m or here.startswith(m.rstrip("/") + "/")]
    kind = max(inside, key=lambda mount: len(mount[0]), default=("", ""))[1]
    return kind.startswith(("nfs", "cifs", "smb", "fuse", "lustre", "gpfs", "ceph", "9p", "afs", "beegfs", "gluster"))
