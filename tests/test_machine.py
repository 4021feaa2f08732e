"""A cache and a dictionary: whatever happens to the cache, it says what the dictionary says, or that it cannot.

The rules plan, claim, write, commit, kill, pause, take over, copy, damage, repair and read, in any order. What a row
must hold is a pure function of its tar, key and view; which rows must be there is what receipts once promised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from emkum.errors import AnotherWriter, EmkumError, IncompleteCache, StorageFailure
from emkum.shards import claims as claims_module
from emkum.shards import durable
from emkum.shards.claims import CLAIMS, Claims
from emkum.shards.codec import Encoded, encode, summarise
from emkum.shards.digest import digest
from emkum.shards.fingerprint import Fingerprint
from emkum.shards.layout import FieldSpec, receipt_path
from emkum.shards.reader import Cache
from emkum.shards.repair import repair
from emkum.shards.segments import read_segments
from emkum.shards.store import LocalStore
from emkum.shards.tars import PictureMember, SourceSample, SourceTar
from emkum.shards.verify import verify
from emkum.shards.views import ViewPolicy
from emkum.shards.writer import CacheWriter
from emkum.stage1_extract.claimed import ClaimedBlocks
from emkum.stage1_extract.encode import Rows
from emkum.stage1_extract.plan import Task
from emkum.stage1_extract.writing import Finished, Writing
from tests.conftest import TORTURE_MINUTES

S = 16  # rows per block
POSITIONS = 32
FIELDS = {
    field.name: field
    for field in (
        FieldSpec("teacher/t/image/cls", "pooled", "float32", (3,)),
        FieldSpec("teacher/t/image/patches", "tokens", "float16", (2, 3)),
        FieldSpec("image/t@0/tokens", "tokens", "int8", (2, 3)),
        FieldSpec("text/t/ids", "ids", "int32", (POSITIONS,)),
        FieldSpec("teacher/t/text/layers", "ragged", "float16", (POSITIONS, 2)),
    )
}
STATISTICS = np.zeros(3, np.float32), np.ones(3, np.float32)
NETWORK = {"model.safetensors": b"weights", "model.json": b"{}\n", "tokenizer.json": b"{}"}
TARS = {f"{letter}.tar": count for letter, count in zip("abcde", (20, 3, 33, 16, 7), strict=True)}

Row = tuple[str, str]  # tar, key


# --- the model: what a row must hold -----------------------------------------------------------------------


def draw_of(*words: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32("/".join(map(str, words)).encode()))


def keys_of(tar: str, space: str) -> list[Row]:
    """The tar's samples in order. Every second one has a caption."""
    return [(tar, f"s{i}") for i in range(0, TARS[tar], 1 if space == "image" else 2)]


def is_bad(row: Row) -> bool:
    """Pictures that cannot be decoded."""
    return int(draw_of("bad", *row).integers(9)) == 0


def length_of(row: Row) -> int:
    return int(draw_of("length", *row).integers(1, POSITIONS + 1))


def expected(field: FieldSpec, row: Row, view: int) -> np.ndarray:
    """float32 numbers that float16 holds exactly; one row in five is all zeros."""
    draw = draw_of(field.name, *row, view)
    if field.kind == "ids":
        values = draw.integers(1, 50, field.row_shape).astype(np.float32)
    else:
        values = draw.integers(-64, 65, field.row_shape).astype(np.float32) / 8 * (draw.integers(5) > 0)
    if field.has_length:
        values[length_of(row) :] = 0
    return values


def tolerance(field: FieldSpec, noisy: bool) -> float:
    return (0.04 if field.storage == "int8" else 0.0) + (0.02 if noisy and field.kind != "ids" else 0.0)


def rows_of(segments: list[list[str]], space: str) -> dict[int, tuple[int, Row]]:
    """row -> (its segment, tar and key): every segment begins on the grid of blocks."""
    found, first = {}, 0
    for number, tars in enumerate(segments):
        keys = [key for tar in tars for key in keys_of(tar, space)]
        found |= {first + i: (number, key) for i, key in enumerate(keys)}
        first += -(-len(keys) // S) * S
    return found


def source(tar: str) -> SourceTar:
    captioned = set(keys_of(tar, "text"))
    samples = [
        SourceSample(
            key, PictureMember(512 * i, 9, "jpg"), ("words",) if (tar, key) in captioned else (), "json", None, None
        )
        for i, (_, key) in enumerate(keys_of(tar, "image"))
    ]
    return SourceTar(tar, tar, 10**6, f"{zlib.crc32(tar.encode()):064x}", tuple(samples), {}, 0)


# --- processes that can be killed at any call --------------------------------------------------------------


class Killed(BaseException):
    """SIGKILL: nothing that the process does afterwards reaches the disk."""


class MortalOs:
    """The `os` of durable. After `calls_left` calls that change the disk the process is dead; a write may be half done.

    Nothing is synced: a process that dies takes nothing of the page cache with it.
    """

    def __init__(self) -> None:
        self.calls_left: int | None = None
        self.dead = False

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _count(self) -> None:
        if self.calls_left is not None:
            self.calls_left -= 1
            self.dead |= self.calls_left < 0
        if self.dead:
            raise Killed

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            self._count()
        return os.open(path, flags, mode)

    def write(self, handle: int, data: memoryview) -> int:
        if not self.dead and self.calls_left == 0:
            os.write(handle, data[: len(data) // 2])
        self._count()
        return os.write(handle, data)

    def fsync(self, handle: int) -> None:
        self._count()

    def replace(self, source: Any, target: Any) -> None:
        self._count()
        os.replace(source, target)

    def rename(self, source: Any, target: Any) -> None:
        self._count()
        os.rename(source, target)

    def link(self, source: Any, target: Any) -> None:
        self._count()
        os.link(source, target)

    def unlink(self, path: Any) -> None:
        self._count()
        os.unlink(path)

    def mkdir(self, path: Any) -> None:
        self._count()
        os.mkdir(path)

    def rmdir(self, path: Any) -> None:
        self._count()
        os.rmdir(path)

    def utime(self, path: Any, times: Any = None) -> None:
        self._count()
        os.utime(path, times)


@dataclasses.dataclass
class World:
    """What all machines of one test share: the faulty `os`, and which process numbers live."""

    os: MortalOs = dataclasses.field(default_factory=MortalOs)
    alive: set[int] = dataclasses.field(default_factory=set)
    last_pid: int = 10

    def new_pid(self) -> int:
        self.last_pid += 1
        self.alive.add(self.last_pid)
        return self.last_pid


class Waiting(Exception):
    """The process would wait for another one that plans."""


class Process:
    """One extraction, step by step: `plan`, then `begin` and `commit` block after block, `end`.

    elsewhere: on another machine, where nobody can see whether it lives. noise: how its device rounds.
    """

    def __init__(self, world: World, root: Path, elsewhere: bool, noise: float) -> None:
        self.world, self.elsewhere, self.noise = world, elsewhere, noise
        self.pid = world.new_pid()
        self.store = LocalStore(root)
        self.claims = Claims(self.store)
        place = f"machine-{self.pid}" if elsewhere else "here"
        self.claims._me = dataclasses.replace(self.claims._me, pid=self.pid, started=1, place=place)
        self.expired = False  # it gave no heartbeat for so long that it counts as dead
        self.task: Task | None = None
        self.at_check: Callable[[], None] | None = None  # called once after the next check but `checks_before`
        self.checks_before = 0
        self.said: list[str] = []

    def plan(self, tars: list[str], fields: list[str], views: int, join: bool) -> None:
        def waits(line: str) -> None:
            raise Waiting(line)

        with self.claims.planning(join, waits):
            self.writer = CacheWriter(self.store, S)
            self.writer.keep_network("t", NETWORK)
            known = {x.tar for segment in self.writer.segments for x in segment.sources}
            fresh = [source(tar) for tar in tars if tar not in known]
            if fresh:
                self.writer.append_segment("train", ViewPolicy(), fresh)
            for name in fields:
                field = FIELDS[name]
                fingerprint = Fingerprint(
                    field.kind, field.storage, field.row_shape, tokenizer="t" if field.has_length else None
                )
                self.writer.declare_field(field, fingerprint, {}, STATISTICS if field.storage == "int8" else None)
                self.writer.grow_field(field, views)
            self.writer.clear_unfinished(self.claims)
        tasks = []
        for space, num_views in (("text", 1), ("image", views)):
            names = tuple(name for name in fields if FIELDS[name].space == space)
            for segment in self.writer.segments if names else ():
                span = segment.span(space)  # type: ignore[arg-type]
                for block in span.blocks(S):
                    tasks += [Task(segment, block, v, names, *span.block_rows(block, S)) for v in range(num_views)]
        specs = {name: SimpleNamespace(spec=FIELDS[name]) for name in fields}
        self.plan_made = SimpleNamespace(writer=self.writer, store=self.store, tasks=tuple(tasks), fields=specs)
        self.blocks = ClaimedBlocks(self.plan_made, self.claims, self.said.append)  # type: ignore[arg-type]
        self.writing = Writing(self.plan_made, self.blocks, self.said.append)  # type: ignore[arg-type]

    def begin(self) -> bool:
        """Claims the next missing block and writes its rows; their objects are still temporary. False: none is left."""
        assert self.task is None
        self.task = next(iter(self.blocks.take(self.blocks._missing(self.plan_made.tasks))), None)
        if self.task is None:
            return False
        task, claim = self.task, self.blocks.claim_of(self.task)
        check = claim.check

        def checked() -> None:
            check()
            if self.at_check is not None and self.checks_before == 0:
                interruption, self.at_check = self.at_check, None
                interruption()
            self.checks_before -= 1

        claim.check = checked  # type: ignore[method-assign]
        space = FIELDS[task.fields[0]].space
        known = rows_of([[x.tar for x in segment.sources] for segment in self.writer.segments], space)
        rows = [known[row][1] for row in range(task.first_row, task.first_row + task.rows)]
        bad = {i: "broken" for i, row in enumerate(rows) if space == "image" and is_bad(row)}
        good = [row for i, row in enumerate(rows) if i not in bad]
        encoded = {name: Rows(self._encoded(FIELDS[name], good, task.view), {}) for name in task.fields if good}
        self.writing._append(Finished(task, rows, bad, encoded, last=False))
        return True

    def _encoded(self, field: FieldSpec, rows: list[Row], view: int) -> Encoded:
        values = np.stack([expected(field, row, view) for row in rows])
        length = np.array([length_of(row) for row in rows], np.int32) if field.has_length else None
        if field.kind == "ids":
            return Encoded(values.astype(np.int32), None, length, summarise(values))
        if self.noise:
            past = np.zeros(values.shape, bool) if length is None else values == 0
            values = np.where(past, 0, values + np.float32(self.noise))
        return encode(values, field.storage, *(STATISTICS if field.storage == "int8" else (None, None)), length)

    def commit(self) -> None:
        assert self.task is not None
        task, self.task = self.task, None
        self.writing._commit(task)

    def work(self) -> None:
        """All that is left to do, but for blocks in the hands of others."""
        while self.task is not None or self.begin():
            self.commit()

    def end(self) -> None:
        """Leaves in order, as after an error or a signal that is caught."""
        if hasattr(self, "writing"):
            self.writing._discard()
        self.claims.__exit__(None, None, None)
        self.world.alive.discard(self.pid)

    def die(self) -> None:
        self.world.alive.discard(self.pid)
        self.claims._ended.set()
        for writer in self.writing._open.values() if hasattr(self, "writing") else ():
            if writer._shard is not None and writer._shard._handle is not None:  # type: ignore[attr-defined]
                os.close(writer._shard._handle)  # type: ignore[attr-defined]


# --- the machine -------------------------------------------------------------------------------------------

# State of a cache -> digest, of every machine of this test: whatever the order, equal states have equal digests.
DIGESTS: dict[object, str] = {}
STEPS: dict[str, int] = {}
WORLD = World()

KILL = st.one_of(st.none(), st.none(), st.integers(0, 60))
SOME_FIELDS = st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=5, unique=True)
SEEDS = st.integers(0, 2**16)


def count(name: str) -> None:
    STEPS[name] = STEPS.get(name, 0) + 1


class CacheMachine(RuleBasedStateMachine):
    """`self.committed` is what receipts promised: (field, block, view). `self.segments` the tars of each segment."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="machine-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        self.root = self.folder / "cache0"
        self.segments: list[list[str]] = []
        self.committed: set[tuple[str, int, int]] = set()
        self.processes: list[Process] = []
        self.readers: list[tuple[Cache, set[tuple[str, int, int]]]] = []
        self.copy: tuple[Path, list[str]] | None = None
        self.num_copies = 0
        self.noisy = False

    @initialize(noisy=st.booleans(), blocks=st.integers(0, 8), fields=SOME_FIELDS)
    def choose(self, noisy: bool, blocks: int, fields: list[str]) -> None:
        """Some blocks are there already."""
        self.noisy = noisy
        if blocks:
            self.start(["a.tar"], fields, 1, False, False, None)
            process = self.processes[0]
            for _ in range(blocks):
                if process.begin():
                    process.commit()

    # --- processes -----------------------------------------------------------------------------------------

    @rule(
        tars=st.lists(st.sampled_from(sorted(TARS)), max_size=2, unique=True),
        fields=SOME_FIELDS,
        views=st.integers(1, 2),
        join=st.sampled_from((True, True, True, False)),
        elsewhere=st.booleans(),
        kill=KILL,
    )
    @precondition(lambda self: len(self.processes) < 3)
    def start(
        self, tars: list[str], fields: list[str], views: int, join: bool, elsewhere: bool, kill: int | None
    ) -> None:
        tars = tars if tars or self.segments else ["c.tar"]  # a first extraction has tars
        noise = len(self.processes) * 0.004 if self.noisy else 0.0
        process = Process(WORLD, self.root, elsewhere, noise)
        alone = all(process.expired for process in self.processes)
        fresh = [tar for tar in tars if not any(tar in segment for segment in self.segments)]
        self.processes.append(process)
        try:
            if self._run(process, lambda: process.plan(tars, fields, views, join), kill):
                assert join or alone, "two planned beside each other"
        except (AnotherWriter, Waiting):
            count("refused")
            self._leave(process)
        if fresh and self.root.is_dir() and len(read_segments(LocalStore(self.root))) > len(self.segments):
            self.segments.append(fresh)

    def _run(self, process: Process, step: Callable[[], object], kill: int | None) -> bool:
        """One step of a process, killed after so many calls. Whether it lived to the end of it."""
        WORLD.os.calls_left = kill
        try:
            step()
            return True
        except Killed:
            count("killed in a call")
            process.die()
            self.processes.remove(process)
            return False
        finally:
            WORLD.os.calls_left, WORLD.os.dead = None, False

    def _leave(self, process: Process) -> None:
        process.end()
        self.processes.remove(process)

    def _any(self, number: int, wanted: Callable[[Process], bool] = lambda process: True) -> Process | None:
        found = [process for process in self.processes if wanted(process)]
        return found[number % len(found)] if found else None

    @rule(number=SEEDS, kill=KILL)
    @precondition(lambda self: any(process.task is None for process in self.processes))
    def begin(self, number: int, kill: int | None) -> None:
        process = self._any(number, lambda process: process.task is None)
        assert process is not None
        self._run(process, process.begin, kill)

    @rule(number=SEEDS, kill=KILL)
    @precondition(lambda self: any(process.task is not None for process in self.processes))
    def commit(self, number: int, kill: int | None) -> None:
        process = self._any(number, lambda process: process.task is not None)
        assert process is not None
        self._commit(process, kill)

    def _commit(self, process: Process, kill: int | None) -> None:
        try:
            self._run(process, process.commit, kill)
        except StorageFailure:  # whoever took over swept what it had not finished
            assert process.expired
            self._leave(process)

    @rule(number=SEEDS, kill=KILL)
    @precondition(lambda self: self.processes)
    def work(self, number: int, kill: int | None) -> None:
        process = self._any(number)
        assert process is not None
        try:
            self._run(process, process.work, None if kill is None else 20 * kill)
        except StorageFailure:
            assert process.expired
            self._leave(process)

    @rule(
        number=SEEDS,
        fields=SOME_FIELDS,
        tars=st.lists(st.sampled_from(sorted(TARS)), max_size=1),
        elsewhere=st.booleans(),
        kill=KILL,
        order=st.lists(st.integers(0, 2), min_size=2, max_size=6),
    )
    @precondition(lambda self: 0 < len(self.processes) < 3)
    def another_joins_and_they_take_turns(
        self, number: int, fields: list[str], tars: list[str], elsewhere: bool, kill: int | None, order: list[int]
    ) -> None:
        """One has begun a block while the other plans; then each begins or commits in this order."""
        first = self._any(number)
        assert first is not None
        if first.task is None:
            first.begin()
        self.start(tars, fields, 1, True, elsewhere, kill)
        for turn in order:
            process = self._any(turn)
            if process is not None and process.task is not None:
                self._commit(process, None)
            elif process is not None:
                process.begin()
        count("turns")

    @rule(fields=SOME_FIELDS, checks=st.integers(0, 3), heir_kill=KILL, kill=KILL)
    @precondition(lambda self: len(self.processes) < 2)
    def pause_in_a_commit_while_another_takes_over(
        self, fields: list[str], checks: int, heir_kill: int | None, kill: int | None
    ) -> None:
        self.start(["d.tar"], fields, 1, True, True, None)
        zombie = self._any(0, lambda process: process.task is None and process.elsewhere)
        if zombie is None or not zombie.begin():
            return
        assert zombie.task is not None
        fields = list(zombie.task.fields)

        def take_over() -> None:
            count("take-over in a commit")
            self._age(zombie)
            heir = Process(WORLD, self.root, False, 0.01 if self.noisy else 0.0)
            self.processes.append(heir)
            left = WORLD.os.calls_left
            try:
                if self._run(heir, lambda: heir.plan([], fields, 1, True), heir_kill):
                    self._run(heir, heir.work, heir_kill)
            except Waiting:
                pass
            if heir in self.processes:
                self._leave(heir)
            WORLD.os.calls_left = left

        zombie.at_check, zombie.checks_before = take_over, checks
        self._commit(zombie, None if kill is None else kill + 40)
        zombie.at_check = None

    @rule(number=SEEDS)
    @precondition(lambda self: self.processes)
    def kill(self, number: int) -> None:
        process = self._any(number)
        assert process is not None
        process.die()
        self.processes.remove(process)

    @rule(number=SEEDS)
    @precondition(lambda self: self.processes)
    def end(self, number: int) -> None:
        process = self._any(number)
        assert process is not None
        self._leave(process)

    @rule(number=SEEDS)
    def a_minute_passes_in_which_one_is_paused(self, number: int) -> None:
        self._age(self._any(number, lambda process: process.elsewhere))

    def _age(self, paused: Process | None) -> None:
        """The claims of the dead, and of one that gives no heartbeat, grow old."""
        if paused is not None:
            paused.expired = True
        living = {process.store.token for process in self.processes if process is not paused}
        then = time.time() - 2 * claims_module.STALE_SECONDS
        for path in (self.root / CLAIMS).glob("*.json"):
            if not any(token in path.read_text() for token in living):
                os.utime(path, (then, then))

    # --- readers -------------------------------------------------------------------------------------------

    @rule()
    @precondition(lambda self: self._exists() and len(self.readers) < 3)
    def open_reader(self) -> None:
        self.readers.append((Cache.open(self.root), set(self.committed)))

    @rule(number=SEEDS, seed=SEEDS)
    @precondition(lambda self: self.readers)
    def read_from_a_snapshot(self, number: int, seed: int) -> None:
        cache, committed = self.readers[number % len(self.readers)]
        self._read(cache, committed, random.Random(seed))

    @rule(seed=SEEDS)
    @precondition(lambda self: self._exists())
    def read_afresh(self, seed: int) -> None:
        self._read(Cache.open(self.root), self.committed, random.Random(seed))

    def _exists(self) -> bool:
        return (self.root / "zarr.json").exists()

    def _read(
        self, cache: Cache, committed: set[tuple[str, int, int]], draw: random.Random, damaged: bool = False
    ) -> None:
        """Random rows of every field, and that exactly the rows are there which receipts promised."""
        count("read")
        for name, field in cache.fields.items():
            spec = FIELDS[name]
            known = rows_of(self.segments[: len(cache.segments)], spec.space)
            for view in range(2 if spec.has_views else 1):
                with _refusals(damaged):
                    found = field.rows("train", view) if cache.segments else np.empty(0, np.int64)
                    promised = [
                        row
                        for row, (_, key) in sorted(known.items())
                        if (name, row // S, view) in committed and not (spec.space == "image" and is_bad(key))
                    ]
                    assert damaged or found.tolist() == promised, (name, view)
                    for row in draw.sample(found.tolist(), min(6, len(found))):
                        with _refusals(damaged):
                            values = field.values(np.array([row]), view)[0]
                            assert row in known, (name, row)
                            wanted = expected(spec, known[row][1], view)
                            close = np.abs(values - wanted).max(initial=0) <= tolerance(spec, self.noisy)
                            assert close, (name, row, view, values, wanted)
                            if spec.has_length:
                                assert field.lengths(np.array([row]))[0] == length_of(known[row][1])
                holes = [row for row in known if row not in set(found.tolist())] if not damaged else []
                for row in draw.sample(holes, min(3, len(holes))):
                    with pytest.raises(IncompleteCache):
                        field.values(np.array([row]), view)
        with _refusals(damaged):
            if cache.segments:
                table = cache.samples("train")
                rows = zip(*(table[column].to_pylist() for column in ("image_row", "tar", "key")), strict=True)
                known = rows_of(self.segments[: len(cache.segments)], "image")
                assert {row: (tar, key) for row, tar, key in rows} == {row: key for row, (_, key) in known.items()}

    # --- verify, digest, damage, copies --------------------------------------------------------------------

    @rule()
    @precondition(lambda self: self._exists())
    def verify(self) -> None:
        findings = verify(LocalStore(self.root), threads=1).findings
        assert not findings, findings
        count("verified")

    @rule()
    @precondition(lambda self: self._exists())
    def digest(self) -> None:
        found = digest(str(self.root), threads=1)
        if not self.noisy:
            cache = Cache.open(self.root)
            state = str((self.segments, sorted(self.committed), sorted(cache.fields), cache.models))
            assert DIGESTS.setdefault(state, found) == found, state
            count("digest")

    @rule(choice=SEEDS, mode=st.sampled_from(("flip", "cut", "empty", "delete", "swap", "longer")), seed=SEEDS)
    @precondition(lambda self: self.committed)
    def damage_one_file(self, choice: int, mode: str, seed: int) -> None:
        self._bury_all()
        files = self._files(self.root)
        name = files[choice % len(files)]
        path, other = self.root / name, self.root / files[seed % len(files)]
        before = {p: p.read_bytes() for p in (path, other)}
        _damage(path, other, mode, random.Random(seed))
        after = {p: p.read_bytes() if p.exists() else None for p in before}
        if after == before:
            return
        count(f"damage: {mode}")
        for reader, committed in self.readers:
            self._read(reader, committed, random.Random(seed), damaged=True)
        self.readers = []
        with _refusals(True):
            self._read(Cache.open(self.root), self.committed, random.Random(seed), damaged=True)
        try:
            report = verify(LocalStore(self.root), threads=1)
            found = bool(report.findings)
        except EmkumError:
            found = True
        assert found or mode == "delete" or self._is_nobodys(name), f"{mode} of {name} passed unseen"
        try:
            left = bool(repair(LocalStore(self.root), threads=1).left) or not self._exists()
        except EmkumError:
            left = True
        if left:
            count("restored")
            for p, data in before.items():
                p.parent.mkdir(parents=True, exist_ok=True)
                p.write_bytes(data)
            assert not repair(LocalStore(self.root), threads=1).left  # a receipt came back whose objects were dropped
        else:
            count("repaired")
        self._finish_what_was_promised()

    def _is_nobodys(self, name: str) -> bool:
        """An object of a block that is not committed: what it holds matters to nobody."""
        folder, _, last = name.rpartition("/")
        if not last.startswith("c."):
            return False
        numbers = [int(number) for number in last.split(".")[1:3]]
        field = folder.rpartition("/")[0]
        view = numbers[1] if field in FIELDS and FIELDS[field].has_views else 0
        return (field, numbers[0], view) not in self.committed

    def _files(self, root: Path) -> list[str]:
        """What a copy takes along and what rots: all but claims and unfinished writes."""
        names = [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if path.is_file()]
        return [name for name in names if CLAIMS not in name and not name.endswith(".tmp")]

    def _bury_all(self) -> None:
        for process in self.processes:
            process.die()
        self.processes = []
        self._age(None)

    def _finish_what_was_promised(self) -> None:
        """The same command again: afterwards everything is there and whole."""
        self._bury_all()
        committed = self.committed
        process = Process(WORLD, self.root, False, 0.0)
        self.processes.append(process)
        names = sorted({name for name, _, _ in committed})
        process.plan([], names, max(view for _, _, view in committed) + 1, False)
        process.work()
        self._leave(process)
        self.committed = set()
        self.settle()
        assert committed <= self.committed
        self.verify()
        self._read(Cache.open(self.root), self.committed, random.Random(0))

    @rule(seed=SEEDS)
    @precondition(lambda self: self._exists() and self.copy is None)
    def begin_a_copy(self, seed: int) -> None:
        """cp -r in any order, of which some files are done when the rest goes on."""
        files = self._files(self.root)
        draw = random.Random(seed)
        draw.shuffle(files)
        self.num_copies += 1
        self.copy = self.folder / f"cache{self.num_copies}", files[: len(files) // 2]
        for name in files[len(files) // 2 :]:
            _copy(self.root, self.copy[0], name)

    @rule(seed=SEEDS, move=st.booleans())
    @precondition(lambda self: self.copy is not None)
    def finish_the_copy(self, seed: int, move: bool) -> None:
        """A copy made while the cache grew opens or says what is absent; a second pass over it makes it whole."""
        assert self.copy is not None
        target, files = self.copy
        self.copy = None
        with _refusals(True):  # half of it
            self._read(Cache.open(target), self.committed, random.Random(seed), damaged=True)
        for name in files:
            _copy(self.root, target, name)
        with _refusals(True):
            self._read(Cache.open(target), self.committed, random.Random(seed), damaged=True)
        if move:
            count("moved to a copy")
            self._bury_all()
            for name in self._files(self.root):
                _copy(self.root, target, name)
            shutil.rmtree(self.root)
            self.root, self.readers = target, []
            report = verify(LocalStore(self.root), threads=1)
            if report.findings:  # objects of unfinished blocks, whose claims were not copied
                assert all(finding.what.startswith("is missing, and nobody works") for finding in report.findings)
                assert not repair(LocalStore(self.root), threads=1).left
            if self.committed:
                self._finish_what_was_promised()
        else:
            shutil.rmtree(target, ignore_errors=True)

    # --- always --------------------------------------------------------------------------------------------

    @invariant()
    def settle(self) -> None:
        """Receipts are never lost, and no other ones appear than of blocks that exist."""
        count("steps")
        found = set()
        for name, field in FIELDS.items():
            known = {(row // S, view) for row in rows_of(self.segments, field.space) for view in range(2)}
            folder = self.root / Path(receipt_path(name, 0, 0)).parent
            with contextlib.suppress(FileNotFoundError):
                for file in os.listdir(folder):
                    if not file.startswith("."):
                        block, view = map(int, file.removesuffix(".json").split("-"))
                        assert (block, view) in known, (name, file)
                        found.add((name, block, view))
        lost = self.committed - found
        assert not lost, lost
        self.committed = found

    def teardown(self) -> None:
        try:
            if self.committed:
                self._finish_what_was_promised()
                self.digest()
        finally:
            for process in self.processes:
                process.die()
            shutil.rmtree(self.folder)


@contextlib.contextmanager
def _refusals(allowed: bool) -> Iterator[None]:
    """Damage may be refused in our words; it may never pass, nor end in another exception."""
    with contextlib.suppress(EmkumError) if allowed else contextlib.nullcontext():
        yield


def _copy(source: Path, target: Path, name: str) -> None:
    """One file, unless it is gone by now."""
    with contextlib.suppress(FileNotFoundError):
        data = (source / name).read_bytes()
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)


def _damage(path: Path, other: Path, mode: str, draw: random.Random) -> None:
    data = path.read_bytes()
    if mode == "delete":
        path.unlink()
    elif mode == "swap":
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif mode == "flip" and data:
        place = draw.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :])
    elif mode == "longer":
        path.write_bytes(data + b"\n")
    else:
        path.write_bytes(data[: draw.randrange(len(data)) if mode == "cut" and data else 0])


@pytest.fixture
def _simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "os", WORLD.os)
    monkeypatch.setattr(claims_module, "_place", lambda: "here")
    monkeypatch.setattr(claims_module, "_started", lambda pid: int(pid in WORLD.alive))
    monkeypatch.setattr(claims_module, "HEARTBEAT_SECONDS", 3600.0)


def machine_settings(examples: int, steps: int, derandomize: bool) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=derandomize,
        database=None,
        deadline=None,
        print_blob=True,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@pytest.mark.timeout(60 * TORTURE_MINUTES + 900)
@pytest.mark.usefixtures("_simulated")
def test_the_cache_says_what_the_dictionary_says() -> None:
    STEPS.clear()
    if not TORTURE_MINUTES:
        run_state_machine_as_test(CacheMachine, settings=machine_settings(40, 25, True))
    end = time.monotonic() + 60 * TORTURE_MINUTES
    while time.monotonic() < end:
        run_state_machine_as_test(CacheMachine, settings=machine_settings(100, 50, False))
    print("\n" + ", ".join(f"{number} {name}" for name, number in sorted(STEPS.items())))
    assert STEPS["steps"] > 500
