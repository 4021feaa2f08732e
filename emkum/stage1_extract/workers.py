"""The same extraction on many processes: Dask starts them and notices their deaths, claims share out the blocks.

A worker is nothing but `extract` with `join`; this process plans, watches over the workers, counts what they commit.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import multiprocessing.connection
import os
import pkgutil
import queue
import re
import signal
import socket
import sys
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import torch
from tqdm import tqdm

import emkum
from emkum.errors import Interrupted, SchedulerUnreachable, WorkersDiffer, WorkersLost
from emkum.models import whole_user
from emkum.models.families.registry import CATALOGUE
from emkum.shards.claims import CLAIMS, Claims, block_key
from emkum.shards.dask_logs import silent_dask
from emkum.shards.layout import receipt_path
from emkum.shards.ledger import REQUESTS_AT_A_TIME, Receipt, read_receipt, receipt_names
from emkum.shards.segments import read_captions
from emkum.shards.shard_files import cores
from emkum.shards.store import is_url, open_store
from emkum.shards.strict_json import loads
from emkum.shards.writer import CacheWriter
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.extract import extract, planned
from emkum.stage1_extract.pictures import picture_table
from emkum.stage1_extract.plan import Plan, Task, survey
from emkum.stage1_extract.quarantine import Quarantine
from emkum.stage1_extract.sounds import sound_table
from emkum.stage1_extract.telling import ExtractResult, Say, beside_bars, closing_lines

Client = Any  # Dask's classes say little to a type checker
Future = Any
Answer = TypeVar("Answer")

POLL_SECONDS = 1.0
REMOTE_POLL_SECONDS = 10.0  # between listings of an object store, which cost money
COMEBACK_SECONDS = 60.0  # for a worker to start, or for a new one to take a dead one's place
RESTART_SECONDS = 20.0  # after which a nanny that has not replaced its worker is no longer waited for
CONNECT_SECONDS = 10.0
CLOSE_SECONDS = 6.0
DEATHS_IN_A_ROW = 3  # of processes that had one block in their hands, with nothing committed in between
DEATHS_OF_A_BLOCK = 10  # whatever others commit meanwhile


def extract_with_workers(config: ExtractConfig, say: Say = print) -> ExtractResult:
    """Fills the cache as `extract` does, with `config.workers` processes here or those of `config.scheduler`.

    With both, at most so many of the scheduler's workers are used. Raises what a worker raised; WorkersLost if none is
    left, or if one block kills whoever takes it; SchedulerUnreachable; WorkersDiffer.
    """
    started = time.perf_counter()
    with contextlib.ExitStack() as held:
        client = held.enter_context(_client_of(config)) if config.scheduler is not None else None
        plan = _plan(config, say, held)
        bad = Quarantine(plan)
        if not plan.tasks:
            bad.check()
            return ExtractResult(0, 0, 0, time.perf_counter() - started, 0.0, 0)
        committed = _Committed(plan)
        loop_started = time.perf_counter()
        client = client or held.enter_context(_client_of(config))
        with _Team(client, config, plan, committed, beside_bars(say)) as team, _bar(plan) as bar:
            while not committed.all():
                team.tend()
                bar.set_postfix_str(f"{team.living} of {team.size} workers", refresh=False)
                bar.update(committed.rows - bar.n)
                time.sleep(POLL_SECONDS)
            bar.update(committed.rows - bar.n)
            team.finish()
        receipts = committed.read()
        for receipt in receipts:
            bad.add_receipt(receipt)
        bad.finish()
        ended = time.perf_counter()
        num_bytes = sum(listed.bytes for receipt in receipts for listed in receipt.objects)
        result = ExtractResult(
            committed.rows, len(plan.tasks), num_bytes, ended - started, ended - loop_started, bad.new
        )
    for line in closing_lines(plan, bad, result):
        say(line)
    return result


# --- the plan ------------------------------------------------------------------------------------------


def _plan(config: ExtractConfig, say: Say, held: contextlib.ExitStack) -> Plan:
    """The plan, without its networks; until `held` ends this process counts as a writer of the cache."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.device_count()):
        found = survey(config)
        claims = held.enter_context(Claims(found.store))
        with claims.planning(config.join, say):
            plan = _without_networks(planned(found, claims, say))
        del found
        gc.collect()
        return plan
    return _plan_apart(config, say, held)


def _without_networks(plan: Plan) -> Plan:
    """The plan of a process that computes nothing itself."""
    return replace(plan, image_pass=None, text_pass=None, audio_pass=None, pair_pass=None, crops=None)


def _plan_apart(config: ExtractConfig, say: Say, held: contextlib.ExitStack) -> Plan:
    """As `_plan`, in a process that ends with it: this one then holds no memory of the GPU that workers need."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_plan_for_parent, args=(config, there), name="emkum plan", daemon=True)
    process.start()
    there.close()
    try:
        while True:
            kind, content = here.recv()
            if kind == "line":
                say(content)
            elif kind == "error":
                raise content
            else:
                break
        plan: Plan = replace(content, writer=CacheWriter(open_store(config.cache)))
        if plan.tasks:
            claims = held.enter_context(Claims(plan.store))
            with claims.planning(True, say):  # from here on this process is a writer; the other one still is
                pass
        here.send(None)
        process.join()
    except EOFError:
        process.join()
        raise WorkersLost(
            f"the process that planned the extraction died with exit status {process.exitcode}",
            "the lines above and the kernel's log (dmesg) may say why; the same command tries again",
        ) from None
    finally:
        process.kill()
        here.close()
    return plan


def _plan_for_parent(config: ExtractConfig, parent: multiprocessing.connection.Connection) -> None:
    """Sends lines as they are said, then the plan or an error; stays a writer of the cache until the answer."""
    _die_with_parent()
    try:
        found = survey(config)
        with Claims(found.store) as claims:
            with claims.planning(config.join, lambda line: parent.send(("line", line))):
                plan = planned(found, claims, lambda line: parent.send(("line", line)))
            parent.send(("plan", replace(_without_networks(plan), writer=None)))  # type: ignore[arg-type]
            parent.recv()
    except Exception as error:
        parent.send(("error", error))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides

    def wait() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


# --- what the workers have committed -----------------------------------------------------------------------


class _Committed:
    """Counts the plan's blocks that have receipts, by what lies on disk."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._names = sorted({name for task in plan.tasks for name in task.fields})
        self._seconds = POLL_SECONDS if plan.store.local is not None else REMOTE_POLL_SECONDS
        self._looked = -self._seconds
        self.missing: list[Task] = list(plan.tasks)
        self.receipts = 0

    @property
    def rows(self) -> int:
        return self._plan.num_rows - sum(task.rows for task in self.missing)

    def all(self) -> bool:
        """Whether nothing is missing; looks at the disk now and then."""
        if time.monotonic() - self._looked >= self._seconds:
            self.look()
        return not self.missing

    def look(self) -> None:
        found = {path for name in self._names for path in receipt_names(self._plan.store, name)}
        self.receipts = len(found)
        self.missing = [
            task
            for task in self.missing
            if any(receipt_path(name, task.block, task.view) not in found for name in task.fields)
        ]
        self._looked = time.monotonic()

    def read(self) -> list[Receipt]:
        """The receipts of all the plan's blocks, once they are there."""
        paths = [receipt_path(name, task.block, task.view) for task in self._plan.tasks for name in task.fields]
        with ThreadPoolExecutor(REQUESTS_AT_A_TIME) as pool:
            return list(pool.map(partial(read_receipt, self._plan.store), paths))


def _bar(plan: Plan) -> tqdm:
    return tqdm(total=plan.num_rows, unit="samples", desc="rows committed", smoothing=0.05, mininterval=0.5)


# --- the workers ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Worker:
    """A place in the team, and the process that fills it at the moment. address: "" while there is none."""

    number: int
    address: str = ""
    pid: int = 0
    host: str = ""
    future: Future | None = None
    since: float = 0.0  # when it became empty
    asked: bool = False  # for another nanny
    given_up: bool = False
    finished: bool = False

    def __str__(self) -> str:
        return f"worker {self.number} (process {self.pid} on {self.host})"


class _Team:
    """The workers: who lives, who died, what each is to do. A context manager: at its end none works any more."""

    def __init__(self, client: Client, config: ExtractConfig, plan: Plan, committed: _Committed, say: Say) -> None:
        self._client, self._config, self._plan, self._committed, self._say = client, config, plan, committed, say
        self._local = config.scheduler is None
        self._limit = config.workers or sys.maxsize
        now = time.monotonic()
        self._workers = [_Worker(i + 1, since=now) for i in range(config.workers or 0)] if self._local else []
        self._started = now
        self._in_a_row: Counter[Hashable] = Counter()
        self._deaths: Counter[Hashable] = Counter()
        self._receipts_at_death = -1
        self._waits = False
        self._nannies = self.size

    @property
    def size(self) -> int:
        return len(self._workers)

    @property
    def living(self) -> int:
        return sum(bool(worker.address) for worker in self._workers)

    def tend(self) -> None:
        """Notices who came, who died and who failed, and gives work to whoever has none.

        Raises the error of a worker, WorkersLost, WorkersDiffer, SchedulerUnreachable.
        """
        present = self._present()
        for worker in self._workers:
            if worker.address:
                self._hear(worker, worker.address in present)
        taken = {worker.address for worker in self._workers}
        for address in present:
            if address not in taken:
                self._welcome(address, present)
        self._require_somebody()

    def finish(self) -> None:
        """Everything is committed: lets the workers end by themselves, if they do it soon."""
        deadline = time.monotonic() + CLOSE_SECONDS
        running = [worker.future for worker in self._workers if worker.future is not None]
        while time.monotonic() < deadline and not all(future.done() for future in running):
            time.sleep(POLL_SECONDS / 10)

    def _present(self) -> dict[str, dict[str, Any]]:
        """The scheduler's workers by address."""
        try:
            info = _within(CONNECT_SECONDS, partial(self._client.scheduler_info, n_workers=-1))
            return dict(info["workers"])
        except (OSError, LookupError, RuntimeError, ValueError, TypeError) as error:  # it lost its scheduler
            if self._local:
                raise
            raise SchedulerUnreachable(
                f"the scheduler at {self._config.scheduler} went away ({type(error).__name__}); what was committed is "
                "kept",
                "start it and its workers again; the same command continues",
            ) from None

    def _hear(self, worker: _Worker, present: bool) -> None:
        """What has become of the worker's task. Raises its error."""
        from distributed.scheduler import KilledWorker

        assert worker.future is not None
        status = worker.future.status
        if status == "finished":
            worker.finished = True
        elif status == "error":
            error = worker.future.exception(timeout=CONNECT_SECONDS)
            if not isinstance(error, KilledWorker):
                assert isinstance(error, BaseException)
                raise error
            present = False
        elif status in ("cancelled", "lost"):
            present = False
        if not present:
            self._lost(worker)

    def _welcome(self, address: str, present: dict[str, dict[str, Any]]) -> None:
        worker = self._place_for(str(present[address].get("name", "")))
        if worker is None:
            return
        try:
            pid, host, version = (
                self._ask(address, os.getpid),
                self._ask(address, socket.gethostname),
                self._ask(address, pkgutil.resolve_name, "emkum:__version__"),
            )
        except TimeoutError:
            return  # it is stopped, or its scheduler is: the next round sees it
        if not isinstance(pid, int) or not isinstance(host, str) or isinstance(version, OSError):
            return  # it died again: the next round sees it
        if version != emkum.__version__:
            raise WorkersDiffer(
                f"the worker at {address} ({host}) has "
                + (f"emkum {version}" if isinstance(version, str) else f"no emkum ({version})")
                + f", this command is emkum {emkum.__version__}",
                f"install the same there: pip install emkum=={emkum.__version__}",
            )
        again = worker.pid != 0
        worker.address, worker.pid, worker.host, worker.asked, worker.given_up = address, pid, host, False, False
        self._say(f"{worker}" + (" takes its place" if again else " begins"))
        if worker not in self._workers:
            self._workers.append(worker)
        if self._local:
            sharing = self.size
        else:
            sharing = sum(other.get("host") == present[address].get("host") for other in present.values())
        worker.future = self._client.submit(
            work,
            self._config_of(worker),
            sharing,
            host == socket.gethostname(),
            key=f"emkum-extract-{worker.number}-{uuid.uuid4().hex}",
            workers=[address],
            allow_other_workers=False,
            pure=False,
            retries=0,
        )

    def _ask(self, address: str, function: Callable[..., object], *arguments: str) -> object:
        run = partial(self._client.run, function, *arguments, workers=[address], on_error="return")
        return _within(CONNECT_SECONDS, run).get(address)

    def _place_for(self, name: str) -> _Worker | None:
        """The empty place that a new process fills: of its own name where a nanny starts one for another.

        Processes for which there is no place are left alone.
        """
        empty = [w for w in self._workers if not w.address and not w.finished]
        if self._local:
            own = (worker for worker in empty if str(worker.number - 1) == name)
            return next(own, next((worker for worker in empty if worker.asked and int(name) >= self.size), None))
        if empty:
            return empty[0]
        return _Worker(self.size + 1) if self.size < self._limit else None

    def _config_of(self, worker: _Worker) -> ExtractConfig:
        """What the worker runs: this command, beside others, on a GPU of its own, with paths that hold anywhere."""
        config, device = self._config, self._config.device
        if self._local and device in ("auto", "cuda"):
            count = torch.cuda.device_count()
            device = f"cuda:{(worker.number - 1) % count}" if count else "cpu" if device == "auto" else device

        def network(source: str | None) -> str | None:
            if source is None or source in CATALOGUE:
                return source
            place, mark, tower = source.rpartition("#") if "#" in source else (source, "", "")
            if os.path.exists(os.path.expanduser(place)):
                return f"{_absolute(place)}{mark}{tower}"
            return whole_user.anywhere(source) if whole_user.is_named(source) else source

        return replace(
            config,
            teacher=tuple(network(teacher) or teacher for teacher in config.teacher),
            encoder=network(config.encoder),
            text_encoder=network(config.text_encoder),
            allow_teacher=tuple(network(teacher) or teacher for teacher in config.allow_teacher),
            data=() if config.from_crops else tuple(_absolute(pattern) for pattern in config.data),
            cache=config.cache if is_url(config.cache) else os.path.abspath(config.cache),
            join=True,
            workers=None,
            scheduler=None,
            device=device,
        )

    # --- deaths --------------------------------------------------------------------------------------------

    def _lost(self, worker: _Worker) -> None:
        if worker.future is not None:
            worker.future.release()
        worker.address, worker.future, worker.since = "", None, time.monotonic()
        if worker.finished:
            return
        self._say(
            f"{worker} died: "
            + ("a new one takes its place" if self._local else "its blocks go to others, a new one may take its place")
        )
        self._committed.look()
        if self._committed.receipts != self._receipts_at_death:
            self._in_a_row.clear()
        self._receipts_at_death = self._committed.receipts
        held: list[Hashable] = [*self._held_by(worker)]
        keys = held or [worker.number]
        self._in_a_row.update(keys)
        self._deaths.update(keys)
        deadly = [k for k in keys if self._in_a_row[k] >= DEATHS_IN_A_ROW or self._deaths[k] >= DEATHS_OF_A_BLOCK]
        if deadly:
            self._give_up(worker, deadly)

    def _held_by(self, worker: _Worker) -> list[str]:
        """Keys of the missing blocks that the dead process had claimed."""
        store, keys = self._plan.store, []
        missing = {self._key(task) for task in self._committed.missing}
        for name in store.list(CLAIMS):
            found = re.fullmatch(r"((?:image|text)-[0-9]+-[0-9]+)\.[0-9]+\.json", name)
            if found is not None and found[1] in missing:
                with contextlib.suppress(FileNotFoundError, ValueError):
                    record = loads(store.read(f"{CLAIMS}/{name}"))
                    if record.get("pid") == worker.pid and record.get("host") == worker.host:
                        keys.append(found[1])
        return sorted(set(keys))

    def _give_up(self, worker: _Worker, keys: Sequence[Hashable]) -> None:
        """keys: of the blocks that it held each time (it reads ahead: one of them is deadly), or its own number."""
        kept = "what was committed is kept"
        if keys[0] == worker.number:
            raise WorkersLost(
                f"worker {worker.number} died {self._deaths[keys[0]]} times before it had begun a block; {kept}",
                "is there memory for so many processes? Try fewer --workers or a smaller --batch-size; the kernel's "
                "log (dmesg) names processes it killed",
            )
        deadly = [task for task in self._committed.missing if self._key(task) in keys]
        blocks = " and ".join(
            f"block {task.block} (view {task.view}) of {task.fields[0]}, rows {task.first_row} to "
            f"{task.first_row + task.rows - 1}, of {_tars(self._plan, task)}"
            for task in deadly
        )
        raise WorkersLost(
            f"{max(self._deaths[key] for key in keys)} workers died with {'this' if len(deadly) == 1 else 'these'} in "
            f"their hands: {blocks}; {kept}",
            "look at these tars, and at the kernel's log (dmesg) for processes killed for memory: a smaller "
            "--batch-size or fewer --workers need less; the same command continues",
        )

    def _key(self, task: Task) -> str:
        return block_key(self._plan.fields[task.fields[0]].spec.space, task.block, task.view)

    def _require_somebody(self) -> None:
        """Says who stays away; raises WorkersLost once all do."""
        now = time.monotonic()
        if self._workers and all(worker.finished for worker in self._workers):
            self._committed.look()
            if self._committed.missing:
                raise RuntimeError(f"every worker ended, and {len(self._committed.missing)} blocks are missing")
        empty = [w for w in self._workers if not w.address and not w.finished]
        if not self._local and not self._workers and not self._waits:
            self._waits = True
            self._say(f"no worker at {self._config.scheduler} yet: waiting up to {COMEBACK_SECONDS:.0f} s for one")
        latest = max((w.since for w in empty), default=self._started)
        if not self.living and not any(w.finished for w in self._workers) and now - latest > COMEBACK_SECONDS:
            raise WorkersLost(
                f"no worker came {'back ' if any(w.pid for w in empty) else ''}within {COMEBACK_SECONDS:.0f} s"
                + (f": all {self.size} are dead" if self.size else f" to {self._config.scheduler}")
                + "; what was committed is kept",
                "the same command starts new ones"
                if self._local
                else f"start some (dask worker {self._config.scheduler} --nthreads 1); the same command continues",
            )
        for worker in empty:
            if self._local and not worker.asked and now - worker.since > RESTART_SECONDS:
                worker.asked = True
                self._nannies += 1
                self._client.cluster.scale(self._nannies)
            if not worker.given_up and now - worker.since > COMEBACK_SECONDS:
                worker.given_up = True
                did = "was not replaced" if worker.pid else "did not start"
                self._say(
                    f"worker {worker.number} {did} within {COMEBACK_SECONDS:.0f} s: {self.living} of {self.size} "
                    "workers go on"
                )

    def __enter__(self) -> _Team:
        return self

    def __exit__(self, *error: object) -> None:
        futures = [worker.future for worker in self._workers if worker.future is not None]
        if futures:
            with contextlib.suppress(Exception):  # the scheduler may be what was lost
                self._client.cancel(futures, force=True)


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _tars(plan: Plan, task: Task) -> str:
    """Names of the tars that the block's rows come from."""
    if plan.fields[task.fields[0]].spec.space == "image":
        table, first = picture_table(plan.store, task.segment), task.segment.image.first_row
    elif plan.fields[task.fields[0]].spec.space == "audio":
        table, first = sound_table(plan.store, task.segment), task.segment.audio.first_row
    else:
        table, first = read_captions(plan.store, task.segment), task.segment.text.first_row
    return ", ".join(dict.fromkeys(table["tar"].slice(task.first_row - first, task.rows).to_pylist()))


# --- what runs in a worker -------------------------------------------------------------------------------


def work(config: ExtractConfig, sharing: int, checked: bool) -> None:
    """The life of a worker, as a Dask task: claims and commits blocks until none is missing.

    sharing: workers on this machine, which divide its cores. checked: the command runs here too, and has computed
    committed rows again. Ends early when the task is cancelled or the client that asked for it is gone.
    """
    from distributed import get_worker

    worker = get_worker()
    key = worker.get_current_task()
    share = max(1, cores() // sharing)

    def watch(rows: int) -> None:
        task = worker.state.tasks.get(key)
        leaving = worker.status.name not in ("running", "paused")  # its scheduler is gone, or it was told to end
        if leaving or task is None or task.state in ("cancelled", "resumed"):
            raise Interrupted("nobody waits for this worker any more", "")

    def say(line: str) -> None:
        pass  # the command says it, once

    def warn(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process leaves behind
    before = torch.get_num_threads()
    torch.set_num_threads(share)
    try:
        extract(replace(config, threads=config.threads or min(16, share)), say, watch, warn, checked)
    finally:
        torch.set_num_threads(before)


# --- Dask ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _client_of(config: ExtractConfig) -> Iterator[Client]:
    """A client of the user's scheduler, or of a cluster of our own that ends with it; both without a word on screen."""
    import dask
    import distributed

    dask_cluster: Any = distributed.LocalCluster
    dask_client: Any = distributed.Client

    settings = {
        "distributed.worker.profile.enabled": False,  # it looks at every thread 100 times a second
        "distributed.admin.tick.limit": "1h",
        "distributed.nanny.pre-spawn-environ": {},  # it would be set in this process too
        "distributed.comm.timeouts.connect": "60s",  # a nanny whose worker cannot connect in time gives it up for good
    }
    with silent_dask(), dask.config.set(settings), contextlib.ExitStack() as held:
        if config.scheduler is not None:
            client = _connect(dask_client, config.scheduler)
            held.callback(_quietly, client.close, timeout=CLOSE_SECONDS)
        else:
            cluster = dask_cluster(
                n_workers=0,
                threads_per_worker=1,
                processes=True,
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"dashboard": False},
                memory_limit=0,  # PyTorch's memory is not Dask's to judge
                silence_logs=logging.CRITICAL,
            )
            held.callback(_kill_workers)
            held.callback(_quietly, cluster.close, timeout=CLOSE_SECONDS)
            cluster.loop.add_callback(_block_sigint)
            client = dask_client(cluster, set_as_default=False)
            held.callback(_quietly, client.close, timeout=CLOSE_SECONDS)
            cluster.scale(config.workers)
        yield client


def _connect(client_class: Any, address: str) -> Client:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # versions of what it and we have installed; ours are compared by _Team
            return client_class(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise SchedulerUnreachable(
            f"no Dask scheduler answers at {address}: {' '.join(str(error).split())}",
            "start one with `dask scheduler`, and workers with `dask worker tcp://host:8786 --nthreads 1`; "
            "or leave --scheduler out and give --workers N",
        ) from None


def _within(seconds: float, call: Callable[[], Answer]) -> Answer:
    """What the call returns or raises. Raises TimeoutError, and leaves the call behind, if it takes longer."""
    answers: queue.SimpleQueue[tuple[Answer | None, BaseException | None]] = queue.SimpleQueue()

    def answer() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=answer, name="dask call", daemon=True).start()
    try:
        found, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return found  # type: ignore[return-value]


def _block_sigint() -> None:
    """Processes that the event loop's thread starts inherit this: Ctrl-C reaches only the one that can end well."""
    resource_tracker.ensure_running()  # which else starts with the first process and unblocks it again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _quietly(close: Callable[..., object], timeout: float) -> None:
    with contextlib.suppress(Exception):  # what is lost need not be closed
        close(timeout=timeout)


def _kill_workers() -> None:
    """For those that did not end by themselves."""
    for process in multiprocessing.active_children():
        if process.name.startswith("Dask Worker"):
            process.kill()
