"""Which trainings of an ablation run when, each in a process of its own, and what happens to them when it is stopped.

A training holds its lock file itself, through a handle that it inherits. So two commands on one folder never train
the same run, and a training whose parent was killed goes on and is waited for by the next command.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from emkum.errors import AblationMismatch, Interrupted, UsageError
from emkum.shards.durable import make_dir, storage_errors
from emkum.stage2_train.ablate.jobs import Job, error_of, run_of
from emkum.stage2_train.runs import number_text, time_text

Say = Callable[[str], None]
End = Literal["finished", "failed", "interrupted"]
EMKUM = (sys.executable, "-m", "emkum.cli")
POLL_SECONDS = 0.2
HELD_SECONDS = 1.0  # between two looks at trainings of other processes
ALLOCATOR_SHARE = 1.25  # of its peak of tensors, that a training's process holds with its allocator's pools
CONTEXT_BYTES = 768 * 2**20  # of a CUDA process, beside its tensors
USED_SHARE = 0.95  # of the memory that is free


@dataclass(frozen=True)
class Outcome:
    """How a job ended in this command. code: of its process, 0 where none was started."""

    job: Job
    end: End
    error: str = ""
    code: int = 0


class Room:
    """How many trainings may run at once: `--jobs` of them; else one on a CPU, as many as fit on a GPU.

    On a GPU the first training of a variant runs alone, and its peak of memory says what the others of it need.
    `free`: bytes of the device that are free, asked once, while nothing of ours runs.
    """

    def __init__(self, jobs: int | None, device: str, free: Callable[[str], int] | None = None) -> None:
        if jobs is not None and jobs < 1:
            raise UsageError(f"--jobs {jobs}", "give 1 or more, or leave it out")
        self._jobs, self._device, self._ask = jobs, device, free or free_bytes
        self._free: int | None = None
        self._needs: dict[str, int] = {}

    def learn(self, job: Job) -> None:
        """What a training that has ended needed."""
        info = run_of(job) or {}
        if str(info.get("device", "")).startswith("cuda") and info.get("peak_memory_bytes"):
            need = round(ALLOCATOR_SHARE * info["peak_memory_bytes"]) + CONTEXT_BYTES
            self._needs[job.variant.name] = max(need, self._needs.get(job.variant.name, 0))

    def has_for(self, job: Job, running: Sequence[Job]) -> bool:
        """Whether the job may start beside those that run."""
        if self._jobs is not None:
            return len(running) < self._jobs
        if not running:
            if self._needs and self._free is None:
                self._free = self._ask(self._device)
            return True
        names = [job.variant.name, *(other.variant.name for other in running)]
        if self._free is None or any(name not in self._needs for name in names) or len(names) > (os.cpu_count() or 1):
            return False
        return sum(self._needs[name] for name in names) <= USED_SHARE * self._free


def free_bytes(device: str) -> int:
    """Free memory of the GPU, asked by a process of its own: to ask takes memory. 0 where it does not answer."""
    code = "import sys, torch; print(torch.cuda.mem_get_info(sys.argv[1])[0])"
    try:
        asked = "cuda" if device == "auto" else device
        done = subprocess.run([sys.executable, "-c", code, asked], capture_output=True, text=True, timeout=120)
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


@dataclass(frozen=True)
class Training:
    """A process at work on a job, since a `time.monotonic()`."""

    job: Job
    process: subprocess.Popen[bytes]
    since: float


def run_jobs(jobs: Sequence[Job], room: Room, say: Say) -> list[Outcome]:
    """Trains every job that is not finished; a failure stops none of the others. One outcome a job, in their order.

    Stopped itself, by a signal or an error, it asks all trainings to stop and waits until they have written their
    checkpoints. Raises AblationMismatch, StorageFailure, Interrupted.
    """
    outcomes: dict[int, Outcome] = {}
    running: dict[int, Training] = {}
    waiting = dict(enumerate(jobs))
    told = False
    with _ended(running):
        while waiting or running:
            held: list[str] = []
            for number, job in list(waiting.items()):
                if not room.has_for(job, [training.job for training in running.values()]):
                    continue
                if job.lacks:
                    outcomes[number] = Outcome(job, "failed", job.lacks, 2)
                    say(f"{job.name}: cannot run: {job.lacks}")
                    del waiting[number]
                    continue
                with _claimed(job) as handle:
                    if handle is None:
                        held.append(job.name)
                        continue
                    del waiting[number]
                    if job.state() == "finished":
                        outcomes[number] = Outcome(job, "finished")
                        room.learn(job)
                        continue
                    running[number] = _start(job, handle, say)
            for number, training in list(running.items()):
                if training.process.poll() is not None:
                    del running[number]
                    outcomes[number] = _outcome(training, say)
                    room.learn(training.job)
            if held and not running and not told:
                more = f" and {len(held) - 3} more" if len(held) > 3 else ""
                say(f"waiting for another process that trains {'; '.join(held[:3])}{more}")
                told = True
            if waiting or running:
                time.sleep(HELD_SECONDS if held and not running else POLL_SECONDS)
    return [outcomes[number] for number in range(len(jobs))]


def _start(job: Job, handle: int, say: Say) -> Training:
    begun = (job.folder / "run.json").exists()
    job.begin()
    command = [*EMKUM, *job.arguments()]
    say(f"{job.name}: {'goes on' if begun else 'starts'}, log in {job.log}")
    with storage_errors(job.log), job.log.open("ab") as log:
        log.write(f"$ emkum {' '.join(job.arguments())}\n".encode())
        log.flush()
        process = subprocess.Popen(  # a session of its own: Ctrl-C comes to us alone, and we stop it once
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(handle,),
            start_new_session=True,
        )
    return Training(job, process, time.monotonic())


def _outcome(training: Training, say: Say) -> Outcome:
    job, code = training.job, training.process.returncode
    took = time_text(time.monotonic() - training.since)
    info = run_of(job) or {}
    if code == 0 and info.get("status") == "finished":
        score = info.get("score") or {}
        best = f": {score['name']} {number_text(score.get('value'))}" if score.get("name") else ""
        say(f"{job.name}: finished in {took}{best}")
        return Outcome(job, "finished")
    if code in (75, -15, -2, -1):
        say(f"{job.name}: stopped after {took}")
        return Outcome(job, "interrupted", error_of(job), code)
    error = f"killed by signal {-code}; {error_of(job)}" if code < 0 else error_of(job)
    say(f"{job.name}: failed after {took}: {error}")
    return Outcome(job, "failed", error, code)


@contextlib.contextmanager
def _claimed(job: Job) -> Iterator[int | None]:
    """The job's lock, as a handle that a process may inherit and then keeps; None while another process has it."""
    make_dir(job.lock.parent)
    with storage_errors(job.lock):
        handle = os.open(job.lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield handle
    finally:
        os.close(handle)  # the lock stays with the training that was started under it


@contextlib.contextmanager
def _ended(running: dict[int, Training]) -> Iterator[None]:
    """No training outlives this, unless this process is killed: each is asked to stop, and waited for."""
    try:
        yield
    except BaseException as error:
        for training in running.values():
            with contextlib.suppress(ProcessLookupError):
                training.process.terminate()
        for training in running.values():
            training.process.wait()
        if isinstance(error, Interrupted) and running:
            names = ", ".join(training.job.name for training in running.values())
            raise Interrupted(f"{error.what}; in the midst of {names}", error.way_out) from error
        raise


def require_no_mixing(jobs: Sequence[Job]) -> dict[str, int]:
    """How many jobs are in each state. Raises AblationMismatch for a folder that holds something else."""
    counts = {"finished": 0, "begun": 0, "new": 0}
    wrong = []
    for job in jobs:
        try:
            counts[job.state()] += 1
        except AblationMismatch as error:
            wrong.append(error)
    if wrong:
        more = f"; {len(wrong) - 1} more folders are like it" if len(wrong) > 1 else ""
        raise AblationMismatch(wrong[0].what + more, wrong[0].way_out)
    return counts
