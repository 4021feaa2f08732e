"""Processes that train one student together: what they tell each other, how they are started, watched and ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor
from tqdm import tqdm

from emkum import errors
from emkum.errors import EmkumError, Interrupted, RankLost, UsageError

T = TypeVar("T")
Say = Callable[[str], None]
LOOK_UP_SECONDS = 0.2  # how often the process that watches looks up
GRACE_SECONDS = 10.0  # for the other ranks to end by themselves once one of them has
NO_TIMEOUT = timedelta(days=365)  # who waits for a rank that is dead is ended by the process that watches
STOPPING = (signal.SIGINT, signal.SIGTERM)
CHILDREN = {
    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",  # all ranks are on this machine
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # DDP warns of looking for parameters without a gradient where there are none
}


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. Its calls are collective: every rank makes them, in one order.

    control: a group on the CPU, so that what the loop has to know never waits for a device.
    """

    rank: int = 0
    number: int = 1
    control: Any = None
    watcher: Connection | None = None  # to the process that started this one

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def device(self, chosen: torch.device) -> torch.device:
        """This rank's device: with several ranks on GPUs, the one of its number."""
        return torch.device("cuda", self.rank) if self.number > 1 and chosen.type == "cuda" else chosen

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over ranks, on the device of `numbers`; never waits for it."""
        if self.number == 1:
            return numbers
        summed = numbers.detach().clone()
        torch.distributed.all_reduce(summed)
        return summed

    def mean(self, numbers: Tensor) -> Tensor:
        """The mean over ranks."""
        return numbers if self.number == 1 else self.total(numbers) / self.number

    def greatest(self, number: int) -> int:
        """The largest of what the ranks give."""
        if self.number == 1:
            return number
        held = torch.tensor([number])
        torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MAX, group=self.control)
        return int(held)

    def shared(self, value: T) -> T:
        """What rank 0 gives, on every rank."""
        if self.number == 1:
            return value
        held = [value]
        torch.distributed.broadcast_object_list(held, 0, group=self.control)
        return held[0]

    def announce(self, command: str) -> None:
        """What goes on with the work, for the process that watches to name should this one die. Not collective."""
        if self.watcher is not None:
            _tell(self.watcher, "continue", command)


def check_devices(number: int, device: str) -> None:
    """Raise UsageError where so many ranks have no device each."""
    if number < 1:
        raise UsageError(f"--devices {number}", "give 1 or more")
    if number == 1:
        return
    if not torch.distributed.is_available():
        raise UsageError(f"--devices {number}: this PyTorch was built without torch.distributed", "use --devices 1")
    if ":" in device:
        raise UsageError(
            f"--device {device} with --devices {number}",
            "leave the number out: rank r takes GPU r. CUDA_VISIBLE_DEVICES says which these are",
        )
    there = torch.cuda.device_count()
    if device in ("cuda", "auto") and there and number > there:
        raise UsageError(
            f"--devices {number}: this machine has {there} GPU{'s' if there > 1 else ''}", f"use --devices {there}"
        )


def on_gpus(device: str) -> bool:
    """Whether ranks run on GPUs: where there are any, unless --device says cpu."""
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


# --- the process that watches ------------------------------------------------------------------------------------


@dataclass
class _Watched:
    """A rank's process as seen from outside. outcome: its last message, or how it ended without one."""

    rank: int
    process: BaseProcess
    messages: Connection | None
    outcome: tuple[Any, ...] | None = None
    ended_at: float = 0.0


@dataclass
class _Signals:
    """Those that came, to be handed on; the ranks do not hear the terminal themselves."""

    came: list[int] = field(default_factory=list)
    given: int = 0

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        def note(number: int, _: FrameType | None) -> None:
            self.came.append(signal.SIGTERM if number == signal.SIGHUP else number)

        here = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, note) for number in (*STOPPING, signal.SIGHUP)} if here else {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def hand_on(self, watched: list[_Watched]) -> None:
        while self.given < len(self.came):
            for one in watched:
                if one.outcome is None and one.process.pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(one.process.pid, self.came[self.given])
            self.given += 1


def run_on_ranks(number: int, work: Callable[[Any, Ranks, Say], T], given: Any, say: Say, *, cuda: bool) -> T:
    """`work(given, ranks, say)` in `number` new processes of this machine; what it returns on rank 0.

    work: a function of a module, which a process that starts anew can import.

    SIGINT and SIGTERM are handed on to every rank. Where a rank ends in an error the others are ended too, after
    GRACE_SECONDS, and the error is raised here; a rank that dies without a word raises RankLost. Ranks end when this
    process dies.
    """
    context = multiprocessing.get_context("spawn")
    signals, watched, command = _Signals(), list[_Watched](), [""]
    with tempfile.TemporaryDirectory(prefix="emkum-ranks-") as folder, signals.caught(), _inherited(CHILDREN):
        try:
            for rank in range(number):
                ours, theirs = context.Pipe()
                seat = (work, given, rank, number, folder, "nccl" if cuda else "gloo", theirs)
                process = context.Process(target=_sit, args=seat, name=f"emkum-rank-{rank}", daemon=True)
                process.start()
                theirs.close()
                watched.append(_Watched(rank, process, ours))
            _watch(watched, signals, say, command)
        finally:
            for one in watched:
                if one.process.is_alive():
                    one.process.kill()
                one.process.join()
    return _verdict(watched, signals, command[0])  # type: ignore[no-any-return]


@contextlib.contextmanager
def _inherited(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for processes that are started meanwhile; what the user has set stands."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _watch(watched: list[_Watched], signals: _Signals, say: Say, command: list[str]) -> None:
    """Until every rank has ended, by itself or by us."""
    deadline = float("inf")
    while any(one.outcome is None for one in watched):
        signals.hand_on(watched)
        there = [one for one in watched if one.outcome is None]
        pipes = [one.messages for one in there if one.messages is not None]
        wait([*pipes, *(one.process.sentinel for one in there)], timeout=LOOK_UP_SECONDS)
        for one in there:
            ended = not one.process.is_alive()  # looked at before its messages: no last one is missed
            for message in _messages_of(one):
                if message[0] == "say":
                    say(message[1])
                elif message[0] == "continue":
                    command[0] = message[1]
                else:
                    one.outcome, one.ended_at = message, time.monotonic()
            if ended and one.outcome is None:
                one.outcome, one.ended_at = ("lost", one.process.exitcode), time.monotonic()
        troubled = signals.given > 1 or any(one.outcome and one.outcome[0] != "done" for one in watched)
        if troubled and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            for one in watched:
                if one.outcome is None:
                    one.process.kill()
                    one.outcome = ("ended",)


def _messages_of(one: _Watched) -> Iterator[tuple[Any, ...]]:
    try:
        while one.messages is not None and one.messages.poll():
            yield one.messages.recv()
    except (EOFError, OSError):
        one.messages = None


def _verdict(watched: list[_Watched], signals: _Signals, command: str) -> Any:
    """Rank 0's result, or the cause among the ends of all ranks: others fail because one is gone."""
    first = sorted(watched, key=lambda one: one.ended_at)
    outcomes = [(one, one.outcome) for one in first if one.outcome is not None]
    way_out = f"continue: {command}" if command else "start it again"
    for one, outcome in outcomes:
        handed_on = signals.given and outcome[-1] in (-number for number in signals.came)  # before it could listen
        if outcome[0] == "lost" and not handed_on:
            raise RankLost(
                f"rank {one.rank} of {len(watched)} {_how(outcome[1])}; the others were stopped",
                f"{way_out}; a machine short of memory ends processes without a word: then with fewer --devices, "
                "--threads or --prefetch",
            )
    failures = [outcome for _, outcome in outcomes if outcome[0] == "failed"]
    for _, name, what, told in sorted(failures, key=lambda outcome: outcome[1] == Interrupted.__name__):
        raise getattr(errors, name)(what, told)
    for one, outcome in outcomes:
        if outcome[0] == "bug":
            raise RuntimeError(f"rank {one.rank} of {len(watched)}:\n{outcome[1]}")
    result = watched[0].outcome
    if result is None or result[0] != "done":
        name = signal.Signals(signals.came[-1]).name if signals.came else "a signal"
        raise Interrupted(f"stopped at once by {name}; steps since the last checkpoint are lost", way_out)
    return result[1]


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was ended by {signal.Signals(-exit_code).name}"
    return f"ended without a word (exit code {exit_code})"


# --- in a rank's process -----------------------------------------------------------------------------------------


def _tell(connection: Connection, *message: Any) -> None:
    """A message to the process that watches, if it is still there."""
    with contextlib.suppress(OSError):
        connection.send(message)


def _sit(
    work: Callable[[Any, Ranks, Say], Any],
    given: Any,
    rank: int,
    number: int,
    folder: str,
    backend: str,
    connection: Connection,
) -> None:
    """The whole life of a rank's process."""
    os.setpgrp()  # the terminal's Ctrl-C goes to the process that watches, which hands it on once
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore that a process which just ends leaves behind
    try:
        for stopping in STOPPING:
            signal.signal(stopping, _stopped_early)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        meet = f"file://{Path(folder) / 'meet'}"
        torch.distributed.init_process_group(
            backend, init_method=meet, rank=rank, world_size=number, timeout=NO_TIMEOUT
        )
        control = torch.distributed.new_group(backend="gloo", timeout=NO_TIMEOUT)
        ranks = Ranks(rank, number, control, connection)
        outcome: tuple[Any, ...] = "done", work(given, ranks, lambda line: _tell(connection, "say", line))
    except (EmkumError, Interrupted) as error:
        outcome = "failed", type(error).__name__, error.what, error.way_out
    except BaseException:
        outcome = "bug", traceback.format_exc()
    _tell(connection, *outcome)
    sys.stderr.flush()
    os._exit(0)  # threads of the communication library may hang where another rank is gone


def _stopped_early(number: int, _: FrameType | None) -> None:
    raise Interrupted(f"stopped by {signal.Signals(number).name} before the first step", "the same command starts it")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
