"""Training that is killed, meets a full or failing disk, finds its files damaged, or is asked to stop.

Whatever happens, the run that goes on ends with the weights, the losses and the files of one that was never disturbed.
A session of training here is a process of its own, forked from a server that has imported what takes long.
EMKUM_TORTURE_MINUTES=1 or more: every I/O call instead of some, and many more kills.
"""

from __future__ import annotations

import csv
import errno
import functools
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_cache import TinyCache, make_cache

from emkum.errors import NotARun, ResumeMismatch, StorageFailure
from emkum.shards import durable
from emkum.stage2_train import run_folder
from emkum.stage2_train.resume import ResumePoint, resume_point
from emkum.stage2_train.run_folder import RunFolder, load_run, read_checkpoint, write_checkpoint
from emkum.stage2_train.train import TrainConfig

MINUTES = float(os.environ.get("EMKUM_TORTURE_MINUTES") or 0)
STOP_SECONDS, TOO_LATE = 20, 99  # a signal ends a command within this time; exit code of one that goes on
HANG_SECONDS = 120

pytestmark = pytest.mark.timeout(60 * MINUTES + 900)

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["emkum.cli", "emkum.stage2_train.train"])

SETTINGS = ("training.batch=8", "training.epochs=4", "optimiser.lr=0.3", "objectives.ctl.bank=20")
NUM_STEPS = 20
IO_CALLS = ("open", "write", "fsync", "close", "replace", "link", "unlink", "mkdir")


# --- a session and what befalls it -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What happens to a session: one of these, or nothing.

    kill_at_step, after_seconds: SIGKILL so long after that step of the session (from 1) has begun.
    kill_at_call: SIGKILL instead of the n-th call (from 1) that changes the run folder.
    fail_at_call: that call fails with `error`, and all that follow if `for_good`.
    file_bytes: no file may grow beyond, as with a quota or a full disk.
    signal_in: SIGTERM or SIGINT (`number`) when this function is called for the `nth` time, which then takes for ever
    if `stalls`; or `after_seconds`.
    checkpoint_minutes: between two checkpoints; 0 for one after every step.
    """

    kill_at_step: int = 0
    after_seconds: float = 0.0
    kill_at_call: int = 0
    fail_at_call: int = 0
    error: int = errno.ENOSPC
    for_good: bool = False
    file_bytes: int = 0
    signal_in: str = ""
    stalls: bool = False
    nth: int = 1
    number: int = signal.SIGTERM
    checkpoint_minutes: float = 0


UNDISTURBED = Fault()


class CountedOs:
    """The module `os`, but `before` is called before each call that changes files."""

    def __init__(self, before: Callable[[], None]) -> None:
        self._before = before

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in IO_CALLS:
            return function

        def counted(*arguments: Any, **named: Any) -> Any:
            self._before()
            return function(*arguments, **named)

        return counted


class Countdown:
    """Calls `happen` at the n-th call, and at every one after it if `for_good`."""

    def __init__(self, calls: int, happen: Callable[[], None], for_good: bool = False) -> None:
        self.left, self.happen, self.for_good = calls, happen, for_good

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0 or (self.left < 0 and self.for_good):
            self.happen()


def failing(error: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(error, os.strerror(error))

    return fail


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


PLACES = {  # where a signal comes: module, class or None, function
    "plan": ("emkum.stage2_train.train", None, "make_plan"),
    "first rows": ("emkum.stage2_train.plan", None, "sample_table"),
    "loading": ("emkum.stage2_train.loader", "CachedSource", "read"),
    "step": ("emkum.stage2_train.losses", "Journal", "add"),
    "validation": ("emkum.stage2_train.validation", None, "image_text_retrieval"),
    "export": ("emkum.stage2_train.keeper", None, "write_student"),
    "checkpoint": ("emkum.stage2_train.run_folder", None, "_keep_previous"),
    "end": ("emkum.stage2_train.keeper", None, "result_of"),
}


def befall(fault: Fault) -> None:
    """Arranges in this process for `fault` to happen."""
    from emkum.stage2_train import losses

    if fault.kill_at_step:
        add = losses.Journal.add
        happen = Countdown(fault.kill_at_step, lambda: threading.Timer(fault.after_seconds, kill_myself).start())

        def adding(self: losses.Journal, parts: Any) -> None:
            happen()
            add(self, parts)

        losses.Journal.add = adding  # type: ignore[method-assign]
    if fault.kill_at_call:
        counted = CountedOs(Countdown(fault.kill_at_call, kill_myself))
        durable.os = run_folder.os = counted  # type: ignore[attr-defined]
    if fault.fail_at_call:
        counted = CountedOs(Countdown(fault.fail_at_call, failing(fault.error), fault.for_good))
        durable.os = run_folder.os = counted  # type: ignore[attr-defined]
    if fault.file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_bytes, resource.RLIM_INFINITY))
    if fault.signal_in:
        module, owner, name = PLACES[fault.signal_in]
        holder = sys.modules[module] if owner is None else getattr(sys.modules[module], owner)
        function = getattr(holder, name)

        def ask() -> None:
            late = threading.Timer(fault.after_seconds + STOP_SECONDS, os._exit, (TOO_LATE,))
            late.daemon = True
            late.start()
            send = functools.partial(os.kill, os.getpid(), fault.number)
            threading.Timer(fault.after_seconds, send).start() if fault.after_seconds else send()
            if fault.stalls:
                time.sleep(3600)

        asking = Countdown(fault.nth, ask)

        def stalling(*arguments: Any, **named: Any) -> Any:
            asking()
            return function(*arguments, **named)

        setattr(holder, name, stalling)


def one_session(words: list[str], fault: Fault, log: Path) -> None:
    """The body of a process: `emkum train` with these words, with a line in the log after every second step."""
    from tqdm import tqdm

    from emkum import cli
    from emkum.stage2_train import train as stage

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own are of multiprocessing, which complains of killed owners
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    befall(fault)
    stage.TrainConfig = lambda *given, **named: TrainConfig(  # type: ignore[misc,assignment]
        *given, **{**named, "checkpoint_minutes": fault.checkpoint_minutes, "log_every": 2}
    )
    sys.argv = ["emkum", "train", *words]
    cli.main()


@dataclass(frozen=True)
class Session:
    """How a process of training ended. code: -9 after SIGKILL."""

    code: int
    output: str


def run_session(folder: Path, words: list[str], fault: Fault = UNDISTURBED) -> Session:
    log = folder.with_name(f"{folder.name}.log")
    process = PROCESSES.Process(target=one_session, args=(words, fault, log))
    process.start()
    process.join(HANG_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        pytest.fail(f"{words} still runs after {HANG_SECONDS} s:\n{log.read_text()}")
    return Session(process.exitcode, log.read_text(errors="replace"))


def start(cache: TinyCache, folder: Path) -> list[str]:
    words = ["--cache", str(cache.path), "--recipe", "ssmke", "--run-dir", str(folder), "--device", "cpu"]
    for setting in SETTINGS:
        words += ["--set", setting]
    return [*words, "--precision", "float32"]


def resume(cache: TinyCache, folder: Path, threads: int = 2) -> list[str]:
    words = ["--cache", str(cache.path), "--run-dir", str(folder), "--resume", "--device", "cpu"]
    return [*words, "--threads", str(threads)]


def next_words(cache: TinyCache, folder: Path, threads: int = 2) -> list[str]:
    """What the user types: --resume where the last session said so, which is where a run.json is."""
    return resume(cache, folder, threads) if (folder / "run.json").exists() else start(cache, folder)


def same(a: Any, b: Any) -> bool:
    """Bit for bit, tensors and containers alike."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def untimed(folder: Path) -> list[list[str]]:
    """The metrics less what depends on the clock."""
    clock = ("seconds", "samples_per_second", "waited")
    with (folder / "metrics.csv").open() as file:
        return [[value for name, value in row.items() if name not in clock] for row in csv.DictReader(file)]


def assert_as_if_undisturbed(whole: Path, folder: Path) -> None:
    """All that a finished run leaves is that of the run that nothing happened to."""
    for name in ("last", "best"):
        ours, theirs = (read_checkpoint(getattr(RunFolder(place), name)) for place in (folder, whole))
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            assert same(ours[part], theirs[part]), (name, part)
        for part in ("best_score", "best_step", "scored", "journal", "rng"):
            assert same(ours["emkum"][part], theirs["emkum"][part]), (name, part)
    for name in ("best", "last"):
        assert same(load_run(folder, name).student.state_dict(), load_run(whole, name).student.state_dict())
    assert untimed(folder) == untimed(whole)
    info, expected = (json.loads((place / "run.json").read_text()) for place in (folder, whole))
    assert info["status"] == "finished"
    assert (info["score"], info["steps"]) == (expected["score"], expected["steps"])
    assert not list(folder.rglob("*.tmp"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    return make_cache(tmp_path_factory.mktemp("crashes") / "cache", pictures=40, views=2, cut=1)


@pytest.fixture(scope="module")
def whole(cache: TinyCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    session = run_session(folder, start(cache, folder))
    assert session.code == 0, session.output
    return folder


NUM_CALLS = 600  # that change the folder of such a run; a few more are made


def some_calls(first: int) -> Iterator[int]:
    """Every hundredth call; or, with EMKUM_TORTURE_MINUTES, random ones until the time is up."""
    ends = time.monotonic() + 60 * MINUTES
    if not MINUTES:
        yield from range(first, NUM_CALLS, 100)
    while time.monotonic() < ends:
        yield random.randint(1, NUM_CALLS)


# --- killed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(max(1, int(5 * MINUTES))))
def test_killed_at_ten_random_moments_and_with_other_threads_a_run_ends_as_if_undisturbed(
    cache: TinyCache, tmp_path: Path, whole: Path, seed: int
) -> None:
    chance, folder = random.Random(seed), tmp_path / "run"
    kills = 0
    while kills < 10:
        fault = Fault(kill_at_step=chance.randint(1, 3), after_seconds=chance.choice([0, 0.05]) * chance.random())
        session = run_session(folder, next_words(cache, folder, threads=chance.randint(1, 5)), fault)
        if session.code == 0:  # it came to its end before the timer did
            break
        assert session.code == -signal.SIGKILL, session.output
        kills += 1
    assert kills >= 7
    session = run_session(folder, next_words(cache, folder, threads=4))
    assert session.code == 0, session.output
    assert_as_if_undisturbed(whole, folder)


def test_killed_at_any_call_that_changes_the_folder_and_again_in_the_resume_it_ends_as_if_undisturbed(
    cache: TinyCache, tmp_path: Path, whole: Path
) -> None:
    chance, kills = random.Random(), 0
    for call in some_calls(5):
        folder = tmp_path / f"run-{call}"
        session = run_session(folder, start(cache, folder), Fault(kill_at_call=call))
        assert session.code == -signal.SIGKILL, f"call {call}: {session.output}"
        again = run_session(folder, next_words(cache, folder), Fault(kill_at_call=chance.randint(1, 60)))
        assert again.code in (0, -signal.SIGKILL), again.output
        kills += 1 + (again.code != 0)
        session = run_session(folder, next_words(cache, folder))
        assert session.code == 0, f"killed at call {call}: {session.output}"
        assert_as_if_undisturbed(whole, folder)
        shutil.rmtree(folder)
    print(f"{kills} kills")


# --- a disk that is full or fails --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(whole: Path) -> list[dict[str, Any]]:
    """Three checkpoints of a run."""
    found = read_checkpoint(RunFolder(whole).last)
    return [{**found, "global_step": step} for step in (1, 2, 3)]


@pytest.mark.parametrize(("error", "for_good"), [(errno.ENOSPC, False), (errno.EIO, False), (errno.EIO, True)])
def test_whatever_call_fails_while_a_checkpoint_is_written_there_is_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: list[dict[str, Any]], error: int, for_good: bool
) -> None:
    calls = 0
    while True:
        calls += 1
        folder = RunFolder(tmp_path / f"run-{calls}")
        for checkpoint in checkpoints[:2]:
            write_checkpoint(checkpoint, folder.last)
        countdown = Countdown(calls, failing(error), for_good)
        failures: list[StorageFailure] = []
        with monkeypatch.context() as patch:
            patch.setattr(durable, "os", CountedOs(countdown))
            patch.setattr(run_folder, "os", CountedOs(countdown))
            try:
                write_checkpoint(checkpoints[2], folder.last)
            except StorageFailure as failure:
                failures.append(failure)
        assert all(str(folder.last.parent) in failure.what for failure in failures)
        step = read_checkpoint(folder.last)["global_step"]
        assert step in (2, 3) if failures else step == 3
        assert read_checkpoint(folder.previous)["global_step"] in {2: (1, 2), 3: (2,)}[step]
        if countdown.left > 0:
            break
    assert calls > 15


def test_whatever_call_fails_in_a_run_it_ends_with_7_and_goes_on_when_there_is_room_again(
    cache: TinyCache, tmp_path: Path, whole: Path
) -> None:
    chance, failures = random.Random(), 0
    for call in some_calls(67):
        folder = tmp_path / f"run-{call}"
        fault = Fault(fail_at_call=call, error=chance.choice([errno.ENOSPC, errno.EIO]), for_good=chance.random() < 0.5)
        session = run_session(folder, start(cache, folder), fault)
        failures += session.code == 7
        if session.code != 0:  # 0: where all that failed was to clean up
            assert session.code == 7, f"{fault}: {session.output}"
            assert "StorageFailure: " in session.output.splitlines()[-1]
            session = run_session(folder, next_words(cache, folder))
        assert session.code == 0, f"{fault}: {session.output}"
        assert_as_if_undisturbed(whole, folder)
        shutil.rmtree(folder)
    print(f"{failures} runs that failed")


@pytest.mark.parametrize("file_bytes", [2500, 9000, 40000])
def test_files_that_may_not_grow_end_a_run_with_7_and_it_goes_on_when_they_may(
    cache: TinyCache, tmp_path: Path, whole: Path, file_bytes: int
) -> None:
    folder = tmp_path / "run"
    session = run_session(folder, start(cache, folder), Fault(file_bytes=file_bytes))
    assert session.code == 7, session.output
    assert "StorageFailure: " in session.output.splitlines()[-1]
    session = run_session(folder, next_words(cache, folder))
    assert session.code == 0, session.output
    assert_as_if_undisturbed(whole, folder)


# --- damaged files -----------------------------------------------------------------------------------------------


def flipped(data: bytes, place: int, bit: int = 0) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda data: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "cut by a byte": lambda data: data[:-1],
    "a byte longer": lambda data: data + b"\0",
    "one bit of a weight": lambda data: flipped(data, len(data) // 3),
    "one bit of its directory": lambda data: flipped(data, len(data) - 300),
    "one bit of its digest": lambda data: flipped(data, len(data) - 5),
    "a page of zeros": lambda data: data[:8192] + bytes(4096) + data[12288:],
    "another file": lambda data: b"PK not a checkpoint",
}


def damaged_copy(whole: Path, folder: Path, names: list[str], damage: Callable[[bytes], bytes]) -> RunFolder:
    shutil.copytree(whole, folder)
    for name in names:
        path = folder / "checkpoints" / f"{name}.ckpt"
        path.write_bytes(damage(path.read_bytes()))
    return RunFolder(folder)


def where_to_go_on(folder: RunFolder, said: Callable[[str], None] = print) -> ResumePoint | None:
    before = run_folder.read_info(folder)
    return resume_point(folder, before, before["identity"], said)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before_it(tmp_path: Path, whole: Path, damage: str) -> None:
    folder, said = damaged_copy(whole, tmp_path / "run", ["last"], DAMAGE[damage]), list[str]()
    folder.best.write_bytes(b"")  # so that it can only be the one before
    point = where_to_go_on(folder, said.append)
    assert point is not None
    assert (point.path, point.step) == (folder.previous, NUM_STEPS - 1)
    assert len(said) == 1
    assert said[0].startswith(f"warning: checkpoint {folder.last} cannot be read: ")
    assert said[0].endswith(f"; going on from {folder.previous}, which takes its place, at step {NUM_STEPS - 1}")
    assert folder.last.read_bytes() == folder.previous.read_bytes()


def test_of_two_good_checkpoints_the_later_one_is_taken(tmp_path: Path, whole: Path) -> None:
    folder = damaged_copy(whole, tmp_path / "run", ["last"], DAMAGE["emptied"])
    steps = {path: read_checkpoint(path)["global_step"] for path in (folder.previous, folder.best)}
    point = where_to_go_on(folder)
    assert point is not None
    assert point.step == max(steps.values()) == steps[point.path]


def test_with_a_flipped_bit_in_the_last_checkpoint_the_run_ends_as_if_undisturbed(
    cache: TinyCache, tmp_path: Path, whole: Path
) -> None:
    folder = damaged_copy(whole, tmp_path / "run", ["last"], DAMAGE["one bit of a weight"])
    session = run_session(folder.dir, resume(cache, folder.dir))
    assert session.code == 0, session.output
    assert f"warning: checkpoint {folder.last} cannot be read: its bytes are not those of the digest" in session.output
    assert_as_if_undisturbed(whole, folder.dir)


@pytest.mark.parametrize("damage", ["emptied", "one bit of a weight"])
def test_without_a_good_checkpoint_the_run_is_refused_and_left_as_it_is(
    cache: TinyCache, tmp_path: Path, whole: Path, damage: str
) -> None:
    folder = damaged_copy(whole, tmp_path / "run", ["last", "previous", "best"], DAMAGE[damage])
    before = {path: path.read_bytes() for path in folder.dir.rglob("*") if path.is_file()}
    with pytest.raises(NotARun) as error:
        where_to_go_on(folder)
    assert error.value.what.count("cannot be read") == 3
    assert f"the run was started with: emkum train --cache {cache.path}" in error.value.way_out
    assert {path: path.read_bytes() for path in folder.dir.rglob("*") if path.is_file()} == before


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path: Path, whole: Path) -> None:
    data, path = RunFolder(whole).last.read_bytes(), tmp_path / "flipped.ckpt"
    chance = random.Random()
    flips = 10_000 if MINUTES else 500
    for _ in range(flips):
        path.write_bytes(flipped(data, chance.randrange(len(data)), chance.randrange(8)))
        with pytest.raises(NotARun, match=f"checkpoint {path} cannot be read"):
            read_checkpoint(path)
    print(f"{flips} of {flips} flips found")


def test_every_flipped_bit_of_the_student_is_noticed_or_changes_nothing(tmp_path: Path, whole: Path) -> None:
    """Nothing: blanks between the parts of the header, and the name under which it keeps its digest."""
    shutil.copytree(whole, tmp_path / "run")
    folder, chance = RunFolder(tmp_path / "run"), random.Random()
    data, expected = folder.weights.read_bytes(), load_run(whole).student.state_dict()
    flips, harmless = (10_000, 0) if MINUTES else (300, 0)
    for _ in range(flips):
        folder.weights.write_bytes(flipped(data, chance.randrange(len(data)), chance.randrange(8)))
        try:
            found = load_run(folder.dir).student.state_dict()
        except NotARun:
            continue
        assert same(found, expected)
        harmless += 1
    print(f"{flips - harmless} of {flips} flips found, {harmless} harmless")
    assert harmless < flips / 20


def without_piece(found: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    """A checkpoint that lacks what lies at `path`, and else is what it was."""
    if len(path) == 1:
        return {name: value for name, value in found.items() if name != path[0]}
    inner = found[path[0]]
    if isinstance(inner, list):
        return {**found, path[0]: [without_piece(inner[path[1]], path[2:])]}
    return {**found, path[0]: without_piece(inner, path[1:])}


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (("state_dict",), "state_dict.student."),
        (("optimizer_states",), "optimizer_states.0.param_groups"),
        (("lr_schedulers",), "lr_schedulers.0."),
        (("loops",), "loops."),
        (("global_step",), "global_step"),
        (("emkum",), "emkum.best_score"),
        (("emkum", "identity", "cache"), "emkum.identity.cache"),
        (("emkum", "rng"), "emkum.rng.cuda"),
        (("emkum", "rng", "torch"), "emkum.rng.torch uint8 [5056]"),
        (("emkum", "journal"), "emkum.journal"),
        (("emkum", "scored"), "emkum.scored"),
        (("optimizer_states", 0, "state", 3, "exp_avg"), "optimizer_states.0.state.3.exp_avg float32"),
        (("loops", "fit_loop", "state_dict"), "loops.fit_loop.state_dict.combined_loader.0.num_steps"),
        (("state_dict", "terms.terms.itc.log_scale"), "state_dict.terms.terms.itc.log_scale float32 []"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_checkpoint_that_lacks_a_piece_is_refused_with_5(
    tmp_path: Path, whole: Path, path: tuple[Any, ...], named: str
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    lacking = io.BytesIO()
    torch.save(without_piece(read_checkpoint(folder.last), path), lacking)
    run_folder._seal(lacking)
    folder.last.write_bytes(lacking.getvalue())
    with pytest.raises(ResumeMismatch) as error:
        where_to_go_on(folder)
    assert error.value.exit_code == 5
    assert error.value.what.startswith(f"checkpoint {folder.last} lacks {named}")


def test_a_checkpoint_of_another_run_is_refused_with_5(cache: TinyCache, tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    found = read_checkpoint(folder.last)
    found["emkum"]["identity"]["seed"] = 7
    write_checkpoint(found, folder.last)
    session = run_session(folder.dir, resume(cache, folder.dir))
    assert session.code == 5
    expected = f"checkpoint {folder.last} is of another run (seed: 7 in the checkpoint, 0 in the run)"
    assert expected in session.output.splitlines()[-1]


# --- asked to stop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "number", "stalls", "said"),
    [
        ("plan", signal.SIGTERM, True, "stopped by SIGTERM; what was committed is kept"),
        ("first rows", signal.SIGINT, True, "stopped by SIGINT; what was committed is kept"),
        ("loading", signal.SIGTERM, True, "SIGTERM at step 0 of 20; nothing to keep yet"),
        ("step", signal.SIGINT, False, "SIGINT at step 1 of 20; checkpoint written"),
        ("validation", signal.SIGTERM, True, "SIGTERM at step 5 of 20, before its validation; checkpoint written"),
        ("validation", signal.SIGINT, True, "SIGINT at step 5 of 20, before its validation; checkpoint written"),
        ("export", signal.SIGTERM, False, "SIGTERM at step 5 of 20; checkpoint written"),
        ("checkpoint", signal.SIGTERM, False, "SIGTERM at step 2 of 20; checkpoint written"),
    ],
    ids=lambda value: value if value in PLACES else "",
)
def test_a_signal_in_any_phase_ends_with_75_in_time_and_the_run_goes_on_as_if_undisturbed(
    cache: TinyCache, tmp_path: Path, whole: Path, place: str, number: int, stalls: bool, said: str
) -> None:
    folder = tmp_path / "run"
    session = run_session(folder, start(cache, folder), Fault(signal_in=place, stalls=stalls, number=number))
    assert session.code == 75, session.output
    assert f"emkum: Interrupted: {said}" in session.output.splitlines()[-1]
    if (folder / "run.json").exists():
        assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    session = run_session(folder, next_words(cache, folder))
    assert session.code == 0, session.output
    assert_as_if_undisturbed(whole, folder)


def test_a_signal_in_the_last_validation_leaves_that_alone_for_the_next_session(
    cache: TinyCache, tmp_path: Path, whole: Path
) -> None:
    """And so does another signal in that one, and a kill after it."""
    folder = tmp_path / "run"
    last = Fault(signal_in="validation", stalls=True, nth=4)
    session = run_session(folder, start(cache, folder), last)
    assert session.code == 75, session.output
    for fault, code in ((replace(last, nth=1), 75), (Fault(kill_at_call=60), -9), (UNDISTURBED, 0)):
        assert f"at step {NUM_STEPS} of {NUM_STEPS}, before its validation" in session.output or code == 0
        again = run_session(folder, resume(cache, folder), fault)
        assert again.code == code, again.output
    assert_as_if_undisturbed(whole, folder)


def test_a_signal_after_the_last_step_finds_nothing_to_stop(cache: TinyCache, tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    session = run_session(folder, start(cache, folder), Fault(signal_in="end"))
    assert session.code == 0, session.output
    assert_as_if_undisturbed(whole, folder)


def test_a_signal_while_a_step_waits_for_storage_ends_with_75_and_the_steps_before_are_kept(
    cache: TinyCache, tmp_path: Path, whole: Path
) -> None:
    folder = tmp_path / "run"
    fault = Fault(signal_in="loading", stalls=True, nth=4, after_seconds=2, checkpoint_minutes=60)
    session = run_session(folder, start(cache, folder), fault)
    assert session.code == 75, session.output
    assert "SIGTERM at step 3 of 20; checkpoint written" in session.output.splitlines()[-1]
    assert read_checkpoint(RunFolder(folder).last)["global_step"] == 3
    session = run_session(folder, resume(cache, folder))
    assert session.code == 0, session.output
    assert_as_if_undisturbed(whole, folder)


def catches(process: int, number: int) -> bool:
    """Whether the process has a handler for the signal, as the kernel says."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(mask >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc to see when handlers are in place")
def test_a_signal_while_the_command_starts_ends_it_with_75(cache: TinyCache, tmp_path: Path, whole: Path) -> None:
    """Of the command as the user starts it: while it imports, reads the cache, makes the student, begins to train."""
    folder, chance = tmp_path / "run", random.Random()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(20 if MINUTES else 2):
        words = [sys.executable, "-m", "emkum.cli", "train", *next_words(cache, folder)]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, text=True)
        while not catches(process.pid, signal.SIGTERM):
            time.sleep(0.01)
        time.sleep(chance.choice([0.2, 4]) * chance.random())
        process.terminate()
        _, said = process.communicate(timeout=STOP_SECONDS)
        assert process.returncode in (75, 0), said
        assert process.returncode == 0 or "emkum: Interrupted: " in said.splitlines()[-1]
    session = run_session(folder, next_words(cache, folder))
    assert session.code == 0, session.output
    assert_as_if_undisturbed(whole, folder)
