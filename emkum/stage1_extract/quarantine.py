"""The rows left out because their source could not be used: counted once each, held against the budget, named."""

from __future__ import annotations

import time

from emkum.errors import TooManyBadSamples
from emkum.shards.layout import SPACES, Space, receipt_path
from emkum.shards.ledger import Receipt, read_receipt, receipt_names
from emkum.stage1_extract.captions import NO_PICTURE
from emkum.stage1_extract.plan import Plan, Task
from emkum.stage1_extract.writing import Finished

LOOK_SECONDS = 5.0  # between two looks at what other processes have left out
WORDS: dict[Space, str] = {"image": "pictures", "text": "captions", "audio": "sounds"}


class Quarantine:
    """What no field of a run, or not every field, can hold: by this process and by others, each space apart.

    A row counts once, however many of its fields and views lack it. Captions that fields of pairs lack because they
    never had a picture are counted apart: they are no fault of the data.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        held = {field.spec.space for field in plan.fields.values()}
        self.spaces = tuple(space for space in SPACES if space in held)
        self._totals = {space: sum(s.span(space).rows for s in plan.segments) for space in self.spaces}
        self._segments = {segment.number for segment in plan.segments}
        self._reasons: dict[Space, dict[int, str]] = {space: {} for space in self.spaces}
        self._alone: set[int] = set()  # captions without a picture
        self._seen: set[str] = set()
        self._looked = time.monotonic()
        self._task: Task | None = None
        self._row = 0  # of the task's next batch
        for receipts in plan.receipts.values():
            for receipt in receipts.values():
                self.add_receipt(receipt)
        self._before = self._count()

    @property
    def new(self) -> int:
        """Rows left out since the plan was made."""
        return self._count() - self._before

    def count(self, space: Space) -> int:
        return len(self._reasons[space])

    @property
    def without_picture(self) -> int:
        """Captions that no field of pairs of the run holds because they have no picture."""
        return len(self._alone)

    def total(self, space: Space) -> int:
        return self._totals[space]

    def first(self, space: Space, num: int = 3) -> list[str]:
        """The first of those left out, as `tar/key: reason`."""
        return [reason for _, reason in sorted(self._reasons[space].items())[:num]]

    def add(self, finished: Finished) -> None:
        """A batch of this process. Raises TooManyBadSamples as `check` does."""
        task = finished.task
        if task != self._task:
            self._task, self._row = task, task.first_row
        reasons = dict(finished.bad)
        good = [i for i in range(len(finished.samples)) if i not in finished.bad]
        for name, rows in finished.encoded.items():
            self._alone |= {self._row + good[i] for i, reason in rows.refused.items() if reason == NO_PICTURE}
            refused = {i: reason for i, reason in rows.refused.items() if reason != NO_PICTURE}
            reasons |= {good[i]: f"{name}: {reason}" for i, reason in refused.items()}
        known = self._reasons[self._space(task)]
        for i, reason in sorted(reasons.items()):
            known.setdefault(self._row + i, "/".join(finished.samples[i]) + f": {reason}")
        self._row += len(finished.samples)
        if finished.last:  # its receipts will say the same
            self._seen |= {receipt_path(name, task.block, task.view) for name in task.fields}
        if reasons:
            if time.monotonic() - self._looked > LOOK_SECONDS:
                self._look()
            self.check()

    def add_receipt(self, receipt: Receipt) -> None:
        self._seen.add(receipt_path(receipt.field, receipt.block, receipt.view))
        if receipt.segment in self._segments:
            known = self._reasons[self._plan.fields[receipt.field].spec.space]
            self._alone |= {q.row for q in receipt.quarantined if q.reason == NO_PICTURE}
            for q in receipt.quarantined:
                if q.reason != NO_PICTURE:
                    known.setdefault(q.row, f"{q.tar}/{q.key}: {q.reason}")

    def finish(self) -> None:
        """Counts everything that other processes have left out as well. Raises TooManyBadSamples as `check` does."""
        self._look()
        self.check()

    def check(self) -> None:
        """Raises TooManyBadSamples if more than max_bad of all pictures, captions or sounds are left out."""
        for space in self.spaces:
            count, total, max_bad = self.count(space), self._totals[space], self._plan.config.max_bad
            if count > max_bad * total:
                raise TooManyBadSamples(
                    f"{count} of {total} {WORDS[space]} cannot be used, --max-bad {max_bad:g} allows "
                    f"{int(max_bad * total)}; the first: " + "; ".join(self.first(space)),
                    "mend these files and write to a new folder with --cache, or allow more: "
                    f"--max-bad {min(1.0, count / total * 2):.2g} "
                    f"(`emkum cache quarantine {self._plan.store.url}` lists those of committed blocks)",
                )

    def _look(self) -> None:
        for name in self._plan.fields:
            for path in receipt_names(self._plan.store, name):
                if path not in self._seen:
                    self.add_receipt(read_receipt(self._plan.store, path))
        self._looked = time.monotonic()

    def _count(self) -> int:
        return sum(len(rows) for rows in self._reasons.values())

    def _space(self, task: Task) -> Space:
        return self._plan.fields[task.fields[0]].spec.space
