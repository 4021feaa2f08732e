"""The thread that writes: rows appended to the blocks of their task, complete blocks committed, in order."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from emkum.errors import ClaimLost, StorageFailure
from emkum.shards.codec import Encoded, Summary
from emkum.shards.durable import is_full
from emkum.shards.writer import BlockWriter
from emkum.stage1_extract.claimed import ClaimedBlocks
from emkum.stage1_extract.encode import Rows
from emkum.stage1_extract.plan import Plan, Task

QUEUED_BATCHES = 8  # between the networks and the disk


@dataclass(frozen=True)
class Finished:
    """Consecutive rows of one block, ready to be stored.

    samples: (tar, key) of each row. bad: rows that no field can have, and why. encoded: of each field the other rows,
    in order, less those it refuses. last: the block is complete with them.
    """

    task: Task
    samples: Sequence[tuple[str, str]]
    bad: dict[int, str]
    encoded: dict[str, Rows]
    last: bool


class Writing:
    """A context manager around the thread. What it fails with is raised by the next call of `put` or `settle`."""

    def __init__(self, plan: Plan, blocks: ClaimedBlocks, say: Callable[[str], None]) -> None:
        self._plan, self._blocks, self._say = plan, blocks, say
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUED_BATCHES)
        self._failure: BaseException | None = None
        self._open: dict[str, BlockWriter] = {}
        self._task: Task | None = None
        self._thread = threading.Thread(target=self._run, name="write", daemon=True)
        self.num_blocks = 0
        self.num_rows = 0
        self.num_bytes = 0

    def put(self, finished: Finished) -> None:
        """Hands rows over; waits if the disk is behind."""
        self._put(lambda: self._append(finished))

    def settle(self) -> None:
        """Waits until everything handed over is committed."""
        settled = threading.Event()
        self._put(settled.set)
        while not settled.wait(0.5):
            self._raise_failure()
        self._raise_failure()

    def _put(self, work: Callable[[], None]) -> None:
        while True:
            self._raise_failure()
            try:
                self._queue.put(work, timeout=0.5)
                return
            except queue.Full:
                continue

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while True:
            work = self._queue.get()
            if work is None:
                return
            if self._failure is not None:
                continue
            try:
                work()
            except BaseException as error:
                self._failure = self._with_room(error)

    def _with_room(self, error: BaseException) -> BaseException:
        """The error; if there is no room, with the bytes that are needed and free."""
        if not isinstance(error, StorageFailure) or not is_full(error):
            return error
        needed, free = self._plan.num_bytes - self.num_bytes, self._plan.store.free_bytes()
        room = f"{error.what}; the blocks that are left need at most {needed:,} bytes"
        told = StorageFailure(room + ("" if free is None else f", {free:,} are free"), error.way_out)
        told.__cause__ = error
        return told

    def _append(self, finished: Finished) -> None:
        for name, writer in self._writers(finished.task).items():
            rows = finished.encoded.get(name)
            good = first = 0  # rows of `encoded` already handed over; first row not yet handed over
            taken = 0  # rows that are not `bad`, up to here
            for i, (tar, key) in enumerate(finished.samples):
                reason = finished.bad.get(i)
                if reason is None:
                    reason = rows.refused.get(taken) if rows is not None else None
                    taken += 1
                if reason is not None:
                    if i > first:
                        assert rows is not None
                        writer.append(_slice(rows.encoded, good, good + i - first))
                        good += i - first
                    writer.quarantine(tar, key, reason)
                    first = i + 1
            if len(finished.samples) > first:
                assert rows is not None
                writer.append(_slice(rows.encoded, good, good + len(finished.samples) - first))
            if rows is not None:
                writer.add_summary(rows.encoded.summary)
        if finished.last:
            self._commit(finished.task)

    def _writers(self, task: Task) -> dict[str, BlockWriter]:
        if task != self._task:
            assert not self._open
            self._task = task
            check = self._blocks.claim_of(task).check
            for name in task.fields:
                spec = self._plan.fields[name].spec
                self._open[name] = self._plan.writer.block(spec, task.segment, task.block, task.view, check)
        return self._open

    def _commit(self, task: Task) -> None:
        claim = self._blocks.claim_of(task)
        claim.touched = True
        try:
            try:
                for writer in self._open.values():
                    receipt = writer.commit()
                    self.num_bytes += sum(o.bytes for o in receipt.objects)
            except StorageFailure:
                claim.check()  # whoever took over may have swept what was being written here
                raise
            self.num_blocks += 1
            self.num_rows += task.rows
        except ClaimLost as error:
            self._say(f"left a block to another process: {error}")
        finally:
            self._discard()
        self._blocks.done(task)

    def _discard(self) -> None:
        for writer in self._open.values():
            writer.__exit__(None, None, None)
        self._open = {}
        self._task = None

    def __enter__(self) -> Writing:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)  # behind what was handed over: a block that is complete is still committed
        self._thread.join()
        self._discard()


def _slice(rows: Encoded, start: int, stop: int) -> Encoded:
    """Some of the rows, without the summary of them all."""
    cut = slice(start, stop)
    return dataclasses.replace(
        rows,
        values=rows.values[cut],
        scale=None if rows.scale is None else rows.scale[cut],
        length=None if rows.length is None else rows.length[cut],
        classes=None if rows.classes is None else rows.classes[cut],
        summary=Summary(),
    )
