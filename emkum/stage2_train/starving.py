"""Steps that wait for their batches: how long, for what, and which flag changes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emkum.stage2_train.loader import BatchLoader

FIRST_STEPS = 10  # of a session: the ring fills, kernels are chosen, blocks are compiled
WATCHED_STEPS = 50
STARVING = 0.1  # of the time
MANY_THREADS = 32
DEEP = 16  # batches read ahead


@dataclass(frozen=True)
class Delivered:
    """What a loader gave in `seconds` of training, and what that took its threads, all of them together."""

    seconds: float = 0.0
    waited_seconds: float = 0.0  # by the steps
    read_seconds: float = 0.0  # by the threads
    busy_seconds: float = 0.0  # of these, on a processor
    rows: int = 0
    num_bytes: int = 0

    def since(self, earlier: Delivered) -> Delivered:
        """The difference."""
        return Delivered(
            self.seconds - earlier.seconds,
            self.waited_seconds - earlier.waited_seconds,
            self.read_seconds - earlier.read_seconds,
            self.busy_seconds - earlier.busy_seconds,
            self.rows - earlier.rows,
            self.num_bytes - earlier.num_bytes,
        )

    @property
    def waited(self) -> float:
        """The fraction of the time that steps stood waiting."""
        return self.waited_seconds / max(self.seconds, 1e-9)

    @property
    def busy(self) -> float:
        """The fraction of their time that threads were on a processor; the rest they waited for storage."""
        return min(1.0, self.busy_seconds / max(self.read_seconds, 1e-9))

    def in_words(self) -> str:
        """For the line of a step: `waits for data 12 % (storage)`."""
        waited = round(100 * self.waited)
        return f"waits for data {waited} %" + (f" ({'processor' if self.busy > 0.5 else 'storage'})" if waited else "")


def delivered(loader: BatchLoader, seconds: float) -> Delivered:
    """What `loader` has given so far, `seconds` of training after its start."""
    return Delivered(
        seconds,
        loader.waited_seconds,
        loader.read_seconds,
        loader.busy_seconds,
        loader.rows_read,
        loader.bytes_read,
    )


@dataclass(frozen=True)
class Setting:
    """What a run could change. storage: of its largest field, "crops" where that is pictures; threads: that read."""

    threads: int
    prefetch: int
    shuffle: str
    storage: str
    live: bool
    cores: int


class Watch:
    """Says once a session that steps starve: when they did over the last WATCHED_STEPS, the first of all apart."""

    def __init__(self, setting: Callable[[], Setting], first_step: int) -> None:
        self.setting, self.warned = setting, False
        self._start_step = first_step + FIRST_STEPS
        self._start: Delivered | None = None

    def look(self, step: int, now: Delivered) -> str:
        """The warning, or "". Called after every step."""
        if self.warned or step < self._start_step:
            return ""
        if self._start is None:
            self._start, self._start_step = now, step
        if step - self._start_step < WATCHED_STEPS:
            return ""
        found = now.since(self._start)
        first, self._start, self._start_step = self._start_step, now, step
        if found.waited <= STARVING:
            return ""
        self.warned = True
        return warning(found, self.setting(), first + 1, step)


def warning(found: Delivered, setting: Setting, first: int, last: int) -> str:
    """The line for people: figures, what the threads did, and what to change."""
    rows, megabytes = found.rows / found.seconds, found.num_bytes / found.seconds / 1e6
    did, change = _cause(found, setting)
    return (
        f"warning: steps {first} to {last} waited for data {100 * found.waited:.0f} % of the time; the loader gave "
        f"{rows:,.0f} rows/s, {megabytes:,.1f} MB/s. Its threads ({setting.threads}) {did}. To change it: {change}"
    )


def _cause(found: Delivered, setting: Setting) -> tuple[str, str]:
    """(what the threads did, what to change)."""
    if setting.live:
        return f"were decoding pictures, {100 * found.busy:.0f} % of that on a processor", (
            "train from the cache, without --live"
        )
    occupied = found.read_seconds / (found.seconds * setting.threads)
    shares = f"{100 * found.busy:.0f} % of the reading on a processor, {100 * (1 - found.busy):.0f} % on storage"
    if occupied < 0.5 and setting.prefetch < DEEP:
        return f"read {100 * occupied:.0f} % of the time, {shares}", (
            f"read further ahead: --prefetch {2 * setting.prefetch}"
        )
    smallest = setting.storage in ("crops", "int8")
    fewer = "extract at a smaller --size" if smallest else "extract with --storage int8, or with --store-inputs crops"
    cores_used = found.busy_seconds / found.seconds
    if found.busy > 0.5 or cores_used > 0.7 * setting.cores:
        did = f"were on {cores_used:.1f} of {setting.cores} processors, {shares}"
        if setting.threads < setting.cores:
            return did, f"--threads {min(2 * setting.threads, setting.cores)}"
        return did, f"fewer bytes a row: {fewer}"
    did = f"waited for storage: {shares}"
    more = []
    if setting.shuffle != "blocks":  # whole blocks are read one after another, by threads of their own
        more += [f"--threads {2 * setting.threads}"] if setting.threads < MANY_THREADS else []
        more += ["--shuffle blocks, in a new run, on a hard disk or network volume"]
    return did, "; or ".join([*more, f"fewer bytes a row: {fewer}"])
