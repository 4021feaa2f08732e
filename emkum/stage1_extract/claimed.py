"""The missing blocks, each claimed just before work on it begins, so that any number of processes may share them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from emkum.shards.claims import POLL_SECONDS, Claim, Claims, block_key
from emkum.shards.layout import Space, receipt_path
from emkum.shards.ledger import receipt_names
from emkum.stage1_extract.plan import Plan, Task

REMOTE_POLL_SECONDS = 10.0  # between looks at an object store, which cost money
SAY_SECONDS = 60.0  # between two lines about waiting
ASKED_ONE_BY_ONE = 64  # tasks; of more, all receipts of a field are listed
Say = Callable[[str], None]


class ClaimedBlocks:
    """Hands out the plan's blocks that no other process works on; waits for those that one does.

    Every block is committed by somebody once `rounds` ends.
    """

    def __init__(self, plan: Plan, claims: Claims, say: Say) -> None:
        self._plan, self._claims, self._say = plan, claims, say
        self._held: dict[tuple[str, int, int], Claim] = {}
        self._taken = 0

    def rounds(self) -> Iterator[list[Task]]:
        """What is missing, again and again, until nothing is."""
        missing = list(self._plan.tasks)
        seconds = POLL_SECONDS if self._plan.store.local is not None else REMOTE_POLL_SECONDS
        say_again = 0.0
        while missing:
            before = self._taken
            yield missing
            missing = self._missing(missing)
            if missing and self._taken == before:
                if time.monotonic() > say_again:
                    holder = self._claims.holder_of(self._key(missing[0]))
                    self._say(f"waiting for {len(missing)} blocks of other processes, the first of {holder or 'one'}")
                    say_again = time.monotonic() + SAY_SECONDS
                time.sleep(seconds)

    def take(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """The tasks that could be claimed, each with the fields it still lacks."""
        for task in tasks:
            if not any(self._is_missing(task, name) for name in task.fields):
                continue  # another process was here: no claim is made for that
            claim = self._claims.take(self._key(task))
            if claim is None:
                continue
            if claim.generation > 1:
                self._plan.writer.clear_block(claim.key)
            lacking = tuple(name for name in task.fields if self._is_missing(task, name))
            if not lacking:  # committed between the look and the claim
                claim.release()
                continue
            self._taken += 1
            self._held[self._place(task)] = claim
            yield replace(task, fields=lacking)

    def claim_of(self, task: Task) -> Claim:
        return self._held[self._place(task)]

    def done(self, task: Task) -> None:
        """Every field of the task is committed, or another process took it over."""
        self._held.pop(self._place(task)).release()

    def _missing(self, tasks: Sequence[Task]) -> list[Task]:
        if len(tasks) <= ASKED_ONE_BY_ONE:
            lacking = [tuple(name for name in task.fields if self._is_missing(task, name)) for task in tasks]
        else:
            names = {name for task in tasks for name in task.fields}
            committed = {path for name in names for path in receipt_names(self._plan.store, name)}
            lacking = [
                tuple(name for name in task.fields if receipt_path(name, task.block, task.view) not in committed)
                for task in tasks
            ]
        return [replace(task, fields=fields) for task, fields in zip(tasks, lacking, strict=True) if fields]

    def _is_missing(self, task: Task, name: str) -> bool:
        return not self._plan.writer.is_committed(name, task.block, task.view)

    def _key(self, task: Task) -> str:
        return block_key(self._space(task), task.block, task.view)

    def _space(self, task: Task) -> Space:
        return self._plan.fields[task.fields[0]].spec.space

    def _place(self, task: Task) -> tuple[str, int, int]:
        return self._space(task), task.block, task.view
