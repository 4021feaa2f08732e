"""Extraction on many processes: the bytes of one process, whoever dies, and never a hang."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_extract
from test_extract import make_tar, quiet

import emkum
from emkum import errors
from emkum.shards.digest import digest
from emkum.shards.reader import Cache
from emkum.stage1_extract import workers
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.plan import Plan

config, networks = test_extract.config, test_extract.networks  # fixtures
TORTURE = os.environ.get("EMKUM_TORTURE_MINUTES")


@pytest.fixture
def many(config: ExtractConfig) -> ExtractConfig:
    """240 pictures in three tars, 80 captions: 15 blocks of pictures and 5 of captions."""
    make_tar(Path(config.data[0]) / "c.tar", 200, seed=2, texts=False)
    return config


class Command:
    """`emkum extract` in a process of its own, which must end by itself. A context manager: nothing of it survives."""

    def __init__(self, config: ExtractConfig, *flags: str, log: Path, code: str = "") -> None:
        self.mark = uuid.uuid4().hex
        arguments = ["--teacher", config.teacher[0], "--data", config.data[0], "--cache", str(config.cache)]
        arguments += ["--text-encoder", str(config.text_encoder), "--cut", "2", "--size", "16", "--max-tokens", "16"]
        arguments += ["--storage", config.storage, "--compute", "float32", "--device", "cpu"]
        arguments += ["--batch-size", "8", "--rows-per-block", "16", *flags]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "EMKUM_TEST_MARK": self.mark}
        self.log = log
        with log.open("w") as output:
            program = ["-c", code] if code else ["-m", "emkum.cli"]
            self.process = subprocess.Popen(
                [sys.executable, *program, "extract", *arguments], stderr=output, env=environment, cwd=log.parent
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def last(self) -> str:
        return self.said.strip().splitlines()[-1]

    def end(self, seconds: float = 300) -> int:
        """Its exit code; a hang fails the test."""
        return self.process.wait(seconds)

    def processes(self) -> set[int]:
        """It and its descendants, by what they inherited."""
        found = set()
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    if self.mark.encode() in (folder / "environ").read_bytes():
                        found.add(int(folder.name))
        return found

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *error: object) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(20)


def until(found: Callable[[], Any], what: str, seconds: float = 200) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.01)
    raise AssertionError(f"waited {seconds} s for {what}")


def claimed(config: ExtractConfig, blocks: str = "*") -> set[int]:
    """Processes that hold claims on blocks now."""
    found = set()
    for path in (Path(config.cache) / "_emkum/claims").glob(f"{blocks}-0.*.json"):
        with contextlib.suppress(OSError, ValueError):
            found.add(int(json.loads(path.read_text())["pid"]))
    return found


def num_receipts(config: ExtractConfig) -> int:
    return len(list((Path(config.cache) / "_emkum/receipts").rglob("*.json")))


def stored(cache: Path | str) -> dict[str, bytes]:
    """Every object with numbers, and every array's metadata."""
    root = Path(cache)
    paths = [p for p in root.rglob("*") if p.is_file() and "_emkum" not in p.parts and p.parent != root]
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(paths)}


def same(one: ExtractConfig, other: ExtractConfig) -> bool:
    return digest(one.cache) == digest(other.cache) and stored(one.cache) == stored(other.cache)


@pytest.fixture
def whole(many: ExtractConfig) -> ExtractConfig:
    """What one process writes."""
    alone = replace(many, cache=Path(many.cache).with_name("whole"))
    quiet(alone)
    return alone


# --- on this machine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [4, pytest.param(8, marks=pytest.mark.skipif(not TORTURE, reason="make torture"))])
def test_one_of_many_workers_is_killed_and_replaced_and_the_bytes_are_those_of_one_process(
    many: ExtractConfig, whole: ExtractConfig, tmp_path: Path, num: int
) -> None:
    with Command(many, "--workers", str(num), log=tmp_path / "log") as command:
        victim = until(lambda: claimed(many), "a worker to claim a block").pop()
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        until(lambda: f"(process {victim} on " in command.said.partition(" died: ")[0], "its death to be said", 10)
        assert time.monotonic() - killed < 10
        assert command.end() == 0, command.said
        said = command.said
        assert f"(process {victim} on {socket.gethostname()}) died: a new one takes its place" in said
        assert f"of {num} workers]" in said
        assert said.count(" begins") <= num
        assert "seen 240 = 240 ok + 0 quarantined + 0 filtered (pictures)" in said
        assert "Traceback" not in said
        assert "distributed" not in said
        assert "Warning" not in said
        until(lambda: command.processes() == set(), "its processes to end", 20)
    assert same(many, whole)
    assert Cache.open(many.cache).field("teacher/vit/image/cls").rows("train").tolist() == list(range(240))


def test_killed_and_stopped_commands_leave_no_process_and_another_number_of_workers_goes_on(
    many: ExtractConfig, whole: ExtractConfig, tmp_path: Path
) -> None:
    with Command(many, "--workers", "2", log=tmp_path / "killed") as command:
        until(lambda: claimed(many), "a worker to claim a block")
        assert len(command.processes()) >= 3
        os.kill(command.process.pid, signal.SIGKILL)
        command.end()
        until(lambda: command.processes() == set(), "orphans to end", 20)
    before = num_receipts(many)
    with Command(many, "--workers", "3", log=tmp_path / "stopped") as command:
        until(lambda: num_receipts(many) > before, "a block to be committed")
        command.process.send_signal(signal.SIGTERM)
        assert command.end(20) == 75, command.said
        assert command.last == (
            "emkum: Interrupted: stopped by SIGTERM; what was committed is kept | the same command continues"
        )
        assert "Traceback" not in command.said
        until(lambda: command.processes() == set(), "orphans to end", 5)
    committed = {path: data for path, data in stored(many.cache).items() if "zarr.json" not in path}
    with Command(many, "--workers", "1", log=tmp_path / "one") as command:
        assert command.end() == 0, command.said
    assert same(many, whole)
    after = stored(many.cache)
    wanted = stored(whole.cache)
    assert all(after[path] == wanted[path] for path in committed)
    assert quiet(replace(many, workers=2))[-1].startswith("nothing to do")


def test_a_block_that_kills_whoever_takes_it_is_named(many: ExtractConfig, tmp_path: Path) -> None:
    quiet(many)
    (Path(many.cache) / "_emkum/receipts/teacher/vit/image/cls/000007-0.json").unlink()
    with Command(many, "--workers", "1", log=tmp_path / "log") as command:
        killed: set[int] = set()
        deadline = time.monotonic() + 300
        while command.process.poll() is None and time.monotonic() < deadline:
            for pid in claimed(many, "image-000007") - killed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            time.sleep(0.001)
        assert command.end(1) == 1, command.said
        assert len(killed) == workers.DEATHS_IN_A_ROW, command.said
        line = command.last
        assert line.startswith("emkum: WorkersLost: "), line
        assert "3 workers died with this in their hands: block 7 (view 0) of teacher/vit/image/cls, " in line
        assert "rows 112 to 127, of c.tar; what was committed is kept" in line
        assert "Traceback" not in command.said
        until(lambda: command.processes() == set(), "its processes to end", 20)
    quiet(many)
    assert Cache.open(many.cache).field("teacher/vit/image/cls").rows("train").tolist() == list(range(240))


# --- on a cluster started by hand ------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler and two workers, as three terminals would start them: its address, and the workers."""
    file = tmp_path / "scheduler.json"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def start(*words: str) -> subprocess.Popen[bytes]:
        words = (*words, "--scheduler-file", str(file), "--host", "127.0.0.1", "--no-dashboard")
        with (tmp_path / "dask.log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dask", *words], env=environment, stdout=log, stderr=log, cwd=tmp_path
            )

    processes = [start("scheduler", "--port", "0")]
    try:
        until(lambda: file.exists() and file.read_text().endswith("}"), "the scheduler")
        processes += [start("worker", "--nthreads", "1", "--no-nanny") for _ in range(2)]
        yield json.loads(file.read_text())["address"], processes[1:]
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait(20)


def test_a_cluster_started_by_hand_serves_command_after_command(
    many: ExtractConfig,
    whole: ExtractConfig,
    networks: Path,
    cluster: tuple[str, list[subprocess.Popen[bytes]]],
    tmp_path: Path,
) -> None:
    address, processes = cluster
    broken = replace(many, teacher=(str(networks / "broken"),), storage="float16", cache=tmp_path / "broken")
    with Command(broken, "--scheduler", address, log=tmp_path / "error") as command:
        assert command.end() == 3, command.said
        # Two workers begin with a block each: either may be the one that meets its first sample first.
        assert re.match(r"emkum: NonFiniteFeature: teacher/broken/image/cls, sample [ab]\.tar/s\d+: ", command.last)
        assert " | use --storage float32" in command.last
        assert "Traceback" not in command.said
    left = replace(many, cache=tmp_path / "left")
    with Command(left, "--scheduler", address, log=tmp_path / "killed") as command:
        until(lambda: claimed(left), "a worker to claim a block")
        command.process.kill()
        command.end()
    # The workers notice that nobody waits any more, and give their blocks back: nobody else is needed for that.
    until(lambda: claimed(left) == set(), "the workers to stop", 30)
    assert [process.poll() for process in processes] == [None, None]
    with Command(many, "--scheduler", address, log=tmp_path / "log") as command:
        assert command.end() == 0, command.said
        assert command.said.count(" begins") == 2
        assert "Traceback" not in command.said
    assert same(many, whole)


def test_a_cluster_that_loses_a_worker_for_good_says_so_and_one_without_any_ends_the_command(
    many: ExtractConfig,
    cluster: tuple[str, list[subprocess.Popen[bytes]]],
    tmp_path: Path,
) -> None:
    address, processes = cluster
    impatient = "import emkum.stage1_extract.workers as w; w.COMEBACK_SECONDS = 3; import emkum.cli; emkum.cli.main()"
    pids = {process.pid for process in processes}
    with Command(many, "--scheduler", address, log=tmp_path / "log", code=impatient) as command:
        until(lambda: command.said.count(" begins") == 2, "two workers")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert command.end(60) == 1, command.said
        assert command.said.count("died: its blocks go to others, a new one may take its place") == 2
        assert command.last.startswith("emkum: WorkersLost: no worker came back within 3 s: all 2 are dead; what was ")


def test_a_scheduler_that_is_not_there(many: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CONNECT_SECONDS", 1.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"  # bound, and nobody listens
        with pytest.raises(errors.SchedulerUnreachable, match=f"no Dask scheduler answers at {address}") as caught:
            quiet(replace(many, scheduler=address))
    assert caught.value.exit_code == 7
    assert not Path(many.cache).exists()


# --- the team, with a scheduler played by the test ---------------------------------------------------------------


class Future:
    def __init__(self) -> None:
        self.status = "pending"
        self.error: BaseException | None = None

    def exception(self, timeout: float) -> BaseException | None:
        return self.error

    def done(self) -> bool:
        return self.status != "pending"

    def release(self) -> None:
        pass


class Scheduler:
    """Plays Dask's client: workers by address, and what was submitted to each."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.version: object = emkum.__version__
        self.pid = 1_000_000_000  # of no process
        self.host = "here"
        self.work: list[tuple[ExtractConfig, int]] = []
        self.checked: list[bool] = []
        self.futures: list[Future] = []
        self.scaled: list[int] = []
        self.cluster = self  # of which only `scale` is called

    def scale(self, num: int) -> None:
        self.scaled.append(num)

    def scheduler_info(self, n_workers: int) -> dict[str, Any]:
        return {"workers": {a: {"name": name, "host": "127.0.0.1"} for a, name in self.names.items()}}

    def run(self, function: Callable[..., Any], *words: str, workers: list[str], on_error: str) -> dict[str, Any]:
        self.pid += 1
        known = {"getpid": self.pid, "gethostname": self.host, "resolve_name": self.version}
        return {workers[0]: known[function.__name__]}

    def submit(
        self, function: Callable[..., Any], config: ExtractConfig, sharing: int, checked: bool, **rules: Any
    ) -> Future:
        assert function is workers.work
        assert rules["allow_other_workers"] is rules["pure"] is False
        self.work.append((config, sharing))
        self.checked.append(checked)
        self.futures.append(Future())
        return self.futures[-1]

    def cancel(self, futures: list[Future], force: bool) -> None:
        pass


@pytest.fixture
def plan(config: ExtractConfig) -> Iterator[Plan]:
    with contextlib.ExitStack() as held:
        yield workers._plan(config, lambda line: None, held)


def team_of(plan: Plan, **changes: Any) -> tuple[workers._Team, Scheduler, list[str]]:
    lines: list[str] = []
    scheduler = Scheduler()
    team = workers._Team(scheduler, replace(plan.config, **changes), plan, workers._Committed(plan), lines.append)
    return team, scheduler, lines


def test_who_does_not_come_back_is_said_and_the_last_one_ends_the_command(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "COMEBACK_SECONDS", 0.2)
    team, scheduler, lines = team_of(plan, workers=2)
    scheduler.names = {"a": "0", "b": "1"}
    team.tend()
    assert (team.living, team.size) == (2, 2)
    assert [sharing for _, sharing in scheduler.work] == [2, 2]
    del scheduler.names["a"]
    team.tend()
    assert lines[-1] == "worker 1 (process 1000000001 on here) died: a new one takes its place"
    time.sleep(0.25)
    team.tend()
    team.tend()
    assert lines[3:] == ["worker 1 was not replaced within 0 s: 1 of 2 workers go on"]
    del scheduler.names["b"]
    team.tend()
    scheduler.names["c"] = "0"  # late, and welcome
    team.tend()
    assert lines[-1] == "worker 1 (process 1000000007 on here) takes its place"
    del scheduler.names["c"]
    team.tend()
    time.sleep(0.25)
    with pytest.raises(errors.WorkersLost, match="no worker came back within 0 s: all 2 are dead") as caught:
        team.tend()
    assert caught.value.exit_code == 1


def test_a_nanny_that_does_not_replace_its_worker_is_replaced_itself(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "RESTART_SECONDS", 0.1)
    team, scheduler, lines = team_of(plan, workers=2)
    scheduler.names = {"a": "0", "b": "1"}
    team.tend()
    scheduler.names = {"a": "0"}
    team.tend()
    assert scheduler.scaled == []
    time.sleep(0.15)
    team.tend()
    team.tend()
    assert scheduler.scaled == [3]
    scheduler.names["c"] = "2"
    team.tend()
    assert lines[-1] == "worker 2 (process 1000000007 on here) takes its place"
    scheduler.names["d"] = "1"  # the old one after all: nothing is left to do for it
    team.tend()
    assert (team.living, team.size, len(scheduler.work)) == (2, 2, 3)


def test_a_scheduler_without_workers_is_waited_for_and_then_refused(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "COMEBACK_SECONDS", 0.2)
    team, _, lines = team_of(plan, scheduler="tcp://here:1")
    team.tend()
    team.tend()
    assert lines == ["no worker at tcp://here:1 yet: waiting up to 0 s for one"]
    time.sleep(0.25)
    with pytest.raises(errors.WorkersLost, match="no worker came within 0 s to tcp://here:1") as caught:
        team.tend()
    assert "dask worker tcp://here:1 --nthreads 1" in caught.value.way_out


def test_a_scheduler_that_goes_away_ends_the_command(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    team, scheduler, _ = team_of(plan, scheduler="tcp://here:1")
    scheduler.names = {"a": "a"}
    team.tend()
    monkeypatch.setattr(scheduler, "scheduler_info", lambda n_workers: {})  # what a client says that lost its scheduler
    with pytest.raises(errors.SchedulerUnreachable, match="the scheduler at tcp://here:1 went away") as caught:
        team.tend()
    assert caught.value.exit_code == 7


def test_a_scheduler_that_is_stopped_ends_the_command(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CONNECT_SECONDS", 0.2)
    team, scheduler, _ = team_of(plan, scheduler="tcp://here:1")
    scheduler.names = {"a": "a"}
    goes_on = threading.Event()
    monkeypatch.setattr(scheduler, "run", lambda *words, **rules: goes_on.wait(100))
    team.tend()
    assert team.living == 0  # who does not say its name gets no work
    monkeypatch.setattr(scheduler, "scheduler_info", lambda n_workers: goes_on.wait(100))
    with pytest.raises(errors.SchedulerUnreachable, match=r"tcp://here:1 went away \(TimeoutError\)"):
        team.tend()
    goes_on.set()


def test_only_workers_beside_the_command_trust_its_check_of_committed_rows(plan: Plan) -> None:
    team, scheduler, _ = team_of(plan, scheduler="tcp://here:1")
    scheduler.names = {"a": "a"}
    team.tend()
    assert scheduler.checked == [False]  # its host is called "here"
    team, scheduler, _ = team_of(plan, workers=1)
    scheduler.names, scheduler.host = {"a": "0"}, socket.gethostname()
    team.tend()
    assert scheduler.checked == [True]


def test_workers_join_a_running_command_up_to_the_number_asked_for(plan: Plan) -> None:
    team, scheduler, lines = team_of(plan, scheduler="tcp://here:1", workers=2)
    scheduler.names = {"a": "a"}
    team.tend()
    scheduler.names |= {"b": "b", "c": "c"}
    team.tend()
    assert (team.living, team.size) == (2, 2)
    del scheduler.names["a"]
    team.tend()
    assert lines[-1] == "worker 1 (process 1000000007 on here) takes its place"


@pytest.mark.parametrize(
    ("version", "words"),
    [("0.0.1", "has emkum 0.0.1, this command is emkum"), (ModuleNotFoundError("No module named 'emkum'"), "no emkum")],
)
def test_a_worker_with_another_emkum_is_refused(plan: Plan, version: object, words: str) -> None:
    team, scheduler, _ = team_of(plan, scheduler="tcp://here:1")
    scheduler.names, scheduler.version = {"tcp://there:2": "x"}, version
    with pytest.raises(errors.WorkersDiffer, match=words) as caught:
        team.tend()
    assert caught.value.exit_code == 2
    assert scheduler.work == []


def test_a_worker_that_dies_before_its_first_block_does_not_start_for_ever(plan: Plan) -> None:
    team, scheduler, _ = team_of(plan, workers=1)

    def live_and_die() -> None:
        scheduler.names = {f"life {scheduler.pid}": "0"}
        team.tend()
        scheduler.names = {}
        team.tend()

    for _ in range(workers.DEATHS_IN_A_ROW - 1):
        live_and_die()
    with pytest.raises(errors.WorkersLost, match="worker 1 died 3 times before it had begun a block"):
        live_and_die()


def test_what_others_commit_buys_a_deadly_block_time_but_not_for_ever(plan: Plan) -> None:
    team, scheduler, _ = team_of(plan, workers=1)
    claims = Path(plan.store.url) / "_emkum/claims"
    receipts = Path(plan.store.url) / "_emkum/receipts/teacher/vit/image/cls"
    receipts.mkdir(parents=True)

    def live_and_die(life: int) -> None:
        scheduler.names = {f"life {life}": "0"}
        team.tend()
        claim = {"pid": scheduler.pid - 2, "host": "here"}  # the process was asked for its number first
        (claims / f"image-000001-0.{life}.json").write_text(json.dumps(claim))
        (receipts / f"{life + 100:06d}-0.json").write_text("{}")
        scheduler.names = {}
        team.tend()

    for life in range(1, workers.DEATHS_OF_A_BLOCK):
        live_and_die(life)
    with pytest.raises(errors.WorkersLost, match=r"10 workers died .* block 1 \(view 0\) .* of a.tar, b.tar;"):
        live_and_die(workers.DEATHS_OF_A_BLOCK)


def test_every_block_that_the_dead_had_in_their_hands_is_named(plan: Plan) -> None:
    team, scheduler, _ = team_of(plan, workers=1)
    claims = Path(plan.store.url) / "_emkum/claims"

    def live_and_die(life: int) -> None:
        scheduler.names = {f"life {life}": "0"}
        team.tend()
        for block in ("000000", "000002"):
            claim = {"pid": scheduler.pid - 2, "host": "here"}
            (claims / f"image-{block}-0.{life}.json").write_text(json.dumps(claim))
        scheduler.names = {}
        team.tend()

    for life in range(1, workers.DEATHS_IN_A_ROW):
        live_and_die(life)
    with pytest.raises(
        errors.WorkersLost, match=r"3 workers died with these .* block 0 .* a\.tar and block 2 .* b\.tar;"
    ):
        live_and_die(workers.DEATHS_IN_A_ROW)


def test_every_worker_gets_a_gpu_of_its_own_and_paths_that_hold_anywhere(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.chdir(Path(plan.store.url).parent)
    team, scheduler, _ = team_of(plan, workers=3, device="auto", cache=Path("cache"), data=("tars/{a,b}.tar",))
    scheduler.names = {"a": "0", "b": "1", "c": "2"}
    team.tend()
    configs = [config for config, _ in scheduler.work]
    assert [c.device for c in configs] == ["cuda:0", "cuda:1", "cuda:0"]
    assert {(c.join, c.workers, c.scheduler) for c in configs} == {(True, None, None)}
    assert {str(c.cache) for c in configs} == {os.path.abspath("cache")}
    assert {c.data for c in configs} == {(os.path.abspath("tars/{a,b}.tar"),)}


def test_the_error_of_a_worker_ends_the_command(plan: Plan) -> None:
    team, scheduler, _ = team_of(plan, workers=1)
    scheduler.names = {"a": "0"}
    team.tend()
    scheduler.futures[0].status, scheduler.futures[0].error = "error", errors.StorageFailure("full", "make room")
    with pytest.raises(errors.StorageFailure, match="full"):
        team.tend()


def test_every_error_crosses_processes_whole() -> None:
    from distributed.protocol.pickle import dumps, loads

    for kind in [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, errors.EmkumError)]:
        error = loads(dumps(kind("what it is", "the way out")))
        assert type(error) is kind
        assert (error.what, error.way_out, str(error)) == ("what it is", "the way out", "what it is")


# --- planning in a process of its own, as where there are GPUs ----------------------------------------------------


def test_planning_apart_gives_the_same_plan_and_leaves_a_writer(config: ExtractConfig) -> None:
    lines: list[str] = []
    with contextlib.ExitStack() as held:
        apart = workers._plan_apart(config, lines.append, held)
        assert lines[0].startswith("split train: 40 pictures and 80 captions in 2 tars")
        assert len(apart.tasks) == 8
        with pytest.raises(errors.AnotherWriter):
            quiet(config)
    with contextlib.ExitStack() as held:
        here = workers._plan(config, lambda line: None, held)
    assert here.tasks == apart.tasks
    assert here.fields == apart.fields


def test_what_planning_apart_finds_wrong_is_sent_whole(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_die_with_parent", lambda: None)
    here, there = multiprocessing.Pipe()
    with here, there:
        workers._plan_for_parent(replace(config, data=("nowhere",)), there)
        kind, error = here.recv()
    assert kind == "error"
    assert isinstance(error, errors.NoData)
    assert "no file or folder nowhere" in error.what
    assert error.way_out
