"""The missing blocks, each claimed just before work on it begins, so that any number of processes may share them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from emkum.shards.claims import POLL_SECONDS, Claim, Claims, block_key
from emkum.shards.layout import Space, receipt_path
from emkum.shards.ledger import receipt_names
from emkum.stage1_extract.plan import Plan, Task

SAY_SECONDS = 60.0  # between two lines about waiting
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
                time.sleep(POLL_SECONDS)

    def take(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """The tasks that could be claimed, each with the fields it still lacks."""
        for task in tasks:
            claim = self._claims.take(self._key(task))
            if claim is None:
                continue
            if claim.generation > 1:
                self._plan.writer.clear_block(claim.key)
            lacking = tuple(n for n in task.fields if not self._plan.writer.is_committed(n, task.block, task.view))
            if not lacking:
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
        names = {name for task in tasks for name in task.fields}
        committed = {path for name in names for path in receipt_names(self._plan.store, name)}
        found = []
        for task in tasks:
            lacking = tuple(n for n in task.fields if receipt_path(n, task.block, task.view) not in committed)
            if lacking:
                found.append(replace(task, fields=lacking))
        return found

    def _key(self, task: Task) -> str:
        return block_key(self._space(task), task.block, task.view)

    def _space(self, task: Task) -> Space:
        return self._plan.fields[task.fields[0]].spec.space

    def _place(self, task: Task) -> tuple[str, int, int]:
        return self._space(task), task.block, task.view
