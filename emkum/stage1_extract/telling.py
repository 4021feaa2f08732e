"""What a run says of itself: what there is, the bill, the bars, what was done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType

import torch
from tqdm import tqdm

from emkum.models.passes import FrozenPass
from emkum.shards.audit import readable_bytes
from emkum.shards.layout import Space, ids_of_texts
from emkum.shards.ledger import read_field_records
from emkum.stage1_extract.plan import Plan, Task
from emkum.stage1_extract.quarantine import WORDS, Quarantine

Say = Callable[[str], None]
Watch = Callable[[int], None]


@dataclass(frozen=True)
class ExtractResult:
    """What one run did. Rows count pictures (each view), captions and sounds.

    seconds: all of it. loop_seconds: decoding, forward and writing, without scans and the loading of networks.
    """

    rows: int
    blocks: int
    bytes: int
    seconds: float
    loop_seconds: float
    quarantined: int


def space_of(plan: Plan, task: Task) -> Space:
    return plan.fields[task.fields[0]].spec.space


# --- before ----------------------------------------------------------------------------------------------


def contents_line(plan: Plan) -> str:
    pictures = sum(s.image.rows for s in plan.segments)
    captions = sum(s.text.rows for s in plan.segments)
    tars = sum(len(s.sources) for s in plan.segments)
    notes = []
    if plan.filtered:
        notes.append(f"{plan.filtered} samples with neither picture, caption nor sound left out")
    if plan.duplicate_keys:
        notes.append(f"{plan.duplicate_keys} keys appear in several tars (identity is tar and key)")
    both = {f.wanted.network for f in plan.fields.values() if f.wanted and f.wanted.what == "tokens"}
    both &= {f.wanted.network for f in plan.fields.values() if f.wanted and f.wanted.what != "tokens"}
    notes += [f"{name} is encoder and teacher: one pass" for name in sorted(both)]
    notes += [f"pictures come from {plan.crops.name}, no tar is read"] if plan.crops is not None else []
    sounds = sum(s.audio.rows for s in plan.segments)
    what = f"{pictures:,} pictures and {captions:,} captions"
    what = f"{pictures:,} pictures, {captions:,} captions and {sounds:,} sounds" if sounds else what
    text = f"split {plan.config.split}: {what} in {tars} tars"
    return "; ".join([text, *notes])


def bill(plan: Plan) -> list[str]:
    """Rows, bytes and, for one process, time before they are spent; the time is measured on one batch."""
    lines = ["to extract:"]
    for name, field in plan.fields.items():
        rows = sum(task.rows for task in plan.tasks if name in task.fields)
        if rows:
            size = plan.field_bytes(name)
            bound = "at most " if field.spec.is_ragged else ""
            lines.append(f"  {name}: {rows:,} rows, {bound}{readable_bytes(size)} as {field.spec.storage}")
    lines += [f"  {line}" for line in (*plan.notes, *sharing_lines(plan))]
    alone = plan.config.workers is None and plan.config.scheduler is None
    seconds = _expected_seconds(plan) if alone else None
    time_text = f", about {duration(seconds)} (forward only, measured on one batch)" if seconds is not None else ""
    lines.append(f"  in all {plan.num_rows:,} rows, {readable_bytes(plan.num_bytes)}{time_text}")
    return lines


def sharing_lines(plan: Plan) -> list[str]:
    """What several networks share and what runs for each: one line for pictures, one for captions, if there is one."""
    lines = []
    for what, frozen in (("picture", plan.image_pass), ("caption", plan.text_pass)):
        if frozen is not None and len(frozen.networks) > 1:
            lines.append(f"a {what} runs through " + "; ".join(_part_of(frozen, name) for name in frozen.networks))
    return lines


def _part_of(frozen: FrozenPass, name: str) -> str:
    """What the pass runs of one of its networks."""
    network, count = frozen.networks[name], frozen.own_blocks(name)
    if name not in frozen.shared_blocks:
        return f"{name} (whole)" if not network.depth else f"{name} ({count} blocks)"
    lender, shared = frozen.shared_blocks[name]
    what = f"the first {shared} blocks" if shared else "the embedding"
    return f"{name} ({count} blocks of its own, {what} shared with {lender})"


def _expected_seconds(plan: Plan) -> float | None:
    batch = plan.config.batch_size
    seconds, known = 0.0, False
    if plan.image_pass is not None:
        rows = sum(task.rows for task in plan.tasks if space_of(plan, task) == "image")
        if rows > 8 * batch:
            crops = torch.zeros(batch, plan.config.side, plan.config.side, 3, dtype=torch.uint8)
            plan.image_pass.pictures(crops[:1])[0].cpu()  # the first pass sets the device up
            started = time.perf_counter()
            plan.image_pass.pictures(crops)[0].cpu()
            seconds += (time.perf_counter() - started) * rows / batch
            known = True
    if plan.text_pass is not None:
        rows = sum(task.rows for task in plan.tasks if space_of(plan, task) == "text")
        if rows > 8 * batch:
            ids = torch.zeros(batch, 16, dtype=torch.int64)
            started = time.perf_counter()
            plan.text_pass.texts(ids, torch.ones(batch, 16, dtype=torch.bool))[0].cpu()
            seconds += (time.perf_counter() - started) * rows / batch
            known = True
    if plan.pair_pass is not None:
        of_pairs = {name for name, field in plan.fields.items() if field.is_of_pairs}
        rows = sum(task.rows for task in plan.tasks if of_pairs & set(task.fields))
        if rows > 8 * batch:
            crops = torch.zeros(batch, plan.config.side, plan.config.side, 3, dtype=torch.uint8)
            ids, mask = torch.zeros(batch, 16, dtype=torch.int64), torch.ones(batch, 16, dtype=torch.bool)
            plan.pair_pass.pairs(crops[:1], ids[:1], mask[:1])[0].cpu()
            started = time.perf_counter()
            plan.pair_pass.pairs(crops, ids, mask)[0].cpu()
            seconds += (time.perf_counter() - started) * rows / batch
            known = True
    return seconds if known and plan.audio_pass is None else None  # how long sounds last is not known


# --- meanwhile -------------------------------------------------------------------------------------------


class Progress:
    """One bar: samples a second, time left, and what the loop mostly waits for. It opens with the first task.

    watch: called with the rows of every batch, in place of the bar.
    """

    def __init__(self, what: str, watch: Watch | None) -> None:
        self._what, self._watch = what, watch
        self._left = 0
        self._bar: tqdm | None = None
        self._seconds = {"decode": 0.0, "forward": 0.0, "write": 0.0}

    def left(self, rows: int) -> None:
        """So many rows are missing yet: what others commit shortens the bar."""
        self._left = rows
        if self._bar is not None and self._bar.total != self._bar.n + rows:
            self._bar.total = self._bar.n + rows
            self._bar.refresh()

    def opened_by(self, tasks: Iterable[Task]) -> Iterator[Task]:
        for task in tasks:
            if self._bar is None and self._watch is None:
                self._bar = tqdm(total=self._left, unit="samples", desc=self._what, smoothing=0.05, mininterval=0.5)
            yield task

    def waiting(self, stage: str) -> _Stopwatch:
        return _Stopwatch(self._seconds, stage)

    def advance(self, rows: int) -> None:
        if self._watch is not None:
            self._watch(rows)
        if self._bar is not None:
            total = sum(self._seconds.values()) or 1.0
            slowest = max(self._seconds, key=lambda stage: self._seconds[stage])
            self._bar.set_postfix_str(f"waits for {slowest} {self._seconds[slowest] / total:.0%}", refresh=False)
            self._bar.update(rows)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


class _Stopwatch:
    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self._seconds, self._stage = seconds, stage

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seconds[self._stage] += time.perf_counter() - self._started


def beside_bars(say: Say) -> Say:
    """Says lines without tearing the bars that are open."""

    def said(line: str) -> None:
        with tqdm.external_write_mode():
            say(line)

    return said


# --- afterwards ------------------------------------------------------------------------------------------


def closing_lines(plan: Plan, bad: Quarantine, result: ExtractResult) -> list[str]:
    """What a finished run says of itself."""
    rate = result.rows / result.seconds if result.seconds else 0.0
    lines = [
        *(line for space in bad.spaces for line in _conservation(plan, bad, space)),
        *([_alone_line(plan, bad)] if bad.without_picture else []),
        f"committed {result.blocks} blocks of rows, {readable_bytes(result.bytes)}, {result.rows:,} rows "
        f"in {duration(result.seconds)} ({rate:,.0f} rows/s)",
    ]
    rest = [f for f in plan.fields.values() if f.spec.space != "audio" and f.spec.kind not in ("ids", "boxes")]
    trains = not all(f.is_of_pairs for f in rest) and _has_ids_of_texts(plan)  # no recipe reads sounds or pairs
    if plan.config.split == "train" and trains:
        lines.append(f"next: emkum train --cache {plan.config.cache}")
    return lines


def _has_ids_of_texts(plan: Plan) -> bool:
    """Whether a student's text side can start beside the ids of the cache, where it has any."""
    names = list(read_field_records(plan.store))
    return bool(ids_of_texts(names)) or not any(name.startswith("text/") for name in names)


def _conservation(plan: Plan, bad: Quarantine, space: Space) -> list[str]:
    """Those left out, and that everything seen is accounted for; of captions only if some are left out."""
    count, total = bad.count(space), bad.total(space)
    if space == "text" and not count:
        return []
    is_first = space == "image" or (space == "audio" and "image" not in bad.spaces)
    filtered = plan.filtered if is_first else 0
    left_out = f" + {filtered} filtered" if is_first else ""
    named = bad.first(space)
    more = count - len(named)
    return [
        *(f"quarantined {reason}" for reason in named),
        *([f"and {more} more: emkum cache quarantine {plan.store.url}"] if more > 0 else []),
        f"seen {total + filtered:,} = {total - count:,} ok + {count} quarantined{left_out} ({WORDS[space]})",
    ]


def _alone_line(plan: Plan, bad: Quarantine) -> str:
    names = ", ".join(name for name, field in plan.fields.items() if field.is_of_pairs)
    return (
        f"{bad.without_picture:,} of {bad.total('text'):,} captions have no picture: no rows of {names}; "
        "--max-bad does not count them"
    )


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
