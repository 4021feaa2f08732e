"""Teacher -> cache: decode, forward, quantise and write the missing blocks, all overlapping."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np
import torch
from tqdm import tqdm

from emkum.errors import TooManyBadSamples
from emkum.models.passes import FrozenPass, Wanted
from emkum.models.tokenizer import text_ids
from emkum.shards.audit import readable_bytes
from emkum.shards.claims import Claims
from emkum.shards.codec import Encoded, encode, summarise
from emkum.shards.ledger import read_receipt, receipt_names
from emkum.shards.reader import read_statistic
from emkum.shards.segments import read_captions
from emkum.stage1_extract.claimed import ClaimedBlocks
from emkum.stage1_extract.encode import Rows, encode_batch
from emkum.stage1_extract.pictures import Batch, PictureStream
from emkum.stage1_extract.plan import ExtractConfig, Plan, Survey, Task, make_plan, survey
from emkum.stage1_extract.probe import check_committed
from emkum.stage1_extract.writing import Finished, Writing

STATISTICS_ROWS = 512  # rows that int8's channel mean and std are taken from, evenly spread over the first segment
Say = Callable[[str], None]
Watch = Callable[[int], None]


@dataclass(frozen=True)
class ExtractResult:
    """What one run did. Rows count pictures (each view) and captions.

    seconds: all of it. loop_seconds: decoding, forward and writing, without scans and the loading of networks.
    """

    rows: int
    blocks: int
    bytes: int
    seconds: float
    loop_seconds: float
    quarantined: int


def extract(config: ExtractConfig, say: Say = print, watch: Watch | None = None) -> ExtractResult:
    """Fills the cache with every missing block of the asked fields; does nothing if there is none.

    `say` receives one line a step. watch: called with the rows of every batch, and with 0 while there is nothing to
    do, in place of the bill and the bar; what it raises ends the run. Raises the errors of emkum.errors; whatever was
    committed stays, and the same call continues.
    """
    if config.workers is not None or config.scheduler is not None:
        from emkum.stage1_extract.workers import extract_with_workers

        return extract_with_workers(config, say)
    with contextlib.ExitStack() as held:
        return _run(config, say, watch, held)


def _run(config: ExtractConfig, say: Say, watch: Watch | None, held: contextlib.ExitStack) -> ExtractResult:
    started = time.perf_counter()
    found = survey(config)
    claims = held.enter_context(Claims(found.store))
    with claims.planning(config.join, say):
        plan = planned(found, claims, say, bill=watch is None)
    if not plan.tasks:
        return ExtractResult(0, 0, 0, time.perf_counter() - started, 0.0, 0)
    bad = Quarantine(plan)
    blocks = ClaimedBlocks(plan, claims, say)
    loop_started = time.perf_counter()
    with Writing(plan, blocks, say) as writing:
        for missing in blocks.rounds():
            if watch is not None:
                watch(0)
            text_tasks = [task for task in missing if _space(plan, task) == "text"]
            image_tasks = [task for task in missing if _space(plan, task) == "image"]
            if text_tasks:
                with _Progress("captions", text_tasks, watch) as progress:
                    _extract_captions(plan, blocks.take(text_tasks), writing, progress, bad)
            if image_tasks:
                with _Progress("pictures", image_tasks, watch) as progress:
                    _extract_pictures(plan, blocks.take(image_tasks), writing, progress, bad)
            writing.settle()
    bad.check()
    ended = time.perf_counter()
    result = ExtractResult(
        writing.num_rows, writing.num_blocks, writing.num_bytes, ended - started, ended - loop_started, bad.new
    )
    for line in closing_lines(plan, bad, result):
        say(line)
    return result


def planned(found: Survey, claims: Claims, say: Say, bill: bool = True) -> Plan:
    """The plan of a run, said, with its fields declared. The caller alone is planning (Claims.planning)."""
    beside = claims.writers()  # whoever began has checked, and may have committed more since
    plan = make_plan(found) if beside else make_plan(found, lambda held: check_committed(held, say))
    plan.writer.clear_unfinished(claims)
    say(_contents_line(plan))
    if not plan.tasks:
        say(f"nothing to do: {plan.store.url} holds every block of {', '.join(plan.fields)}")
        return plan
    for line in _bill(plan) if bill else ():
        say(line)
    _declare(plan)
    return plan


def default_threads() -> int:
    return min(16, max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2))


# --- the two loops -------------------------------------------------------------------------------------


def _extract_pictures(
    plan: Plan, tasks: Iterable[Task], writing: Writing, progress: _Progress, bad: Quarantine
) -> None:
    config = plan.config
    statistics = _device_statistics(plan)
    stream = PictureStream(
        plan.store, tasks, plan.paths, config.size, config.batch_size, config.threads or default_threads()
    )
    try:
        batches = iter(stream)
        while True:
            with progress.waiting("decode"):
                batch = next(batches, None)
            if batch is None:
                return
            with progress.waiting("forward"):
                finished = _encode_pictures(plan, batch, statistics)
            bad.add(finished)
            with progress.waiting("write"):
                writing.put(finished)
            progress.advance(len(batch.rows))
    finally:
        stream.close()


def _encode_pictures(plan: Plan, batch: Batch, statistics: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Finished:
    """Every field's rows for the good pictures of the batch."""
    samples = [(row.picture.tar, row.picture.key) for row in batch.rows]
    bad = {i: row.reason for i, row in enumerate(batch.rows) if row.crop is None}
    good = [row for row in batch.rows if row.crop is not None and row.box is not None]
    if not good:
        return Finished(batch.task, samples, bad, {}, batch.last)
    boxes = np.stack([row.box.as_row() for row in good if row.box is not None])
    encoded = {}
    outputs = {}
    if plan.image_pass is not None:
        crops = torch.from_numpy(np.stack([row.crop for row in good if row.crop is not None]))
        wanted = _wanted(plan, batch.task)
        outputs = dict(zip(wanted, plan.image_pass.pictures(crops, wanted), strict=True))
    names = [row.picture.name for row in good]
    for name in batch.task.fields:
        field = plan.fields[name]
        if field.wanted is None:
            encoded[name] = Rows(encode(boxes, "float32"), {})
        else:
            encoded[name] = encode_batch(
                outputs[field.wanted],
                name,
                field.spec.storage,
                names,
                statistics.get(name),
                on_nonfinite=plan.config.on_nonfinite,
            )
    return Finished(batch.task, samples, bad, encoded, batch.last)


def _wanted(plan: Plan, task: Task) -> list[Wanted]:
    """The outputs that the task's missing fields need."""
    return [field.wanted for name in task.fields if (field := plan.fields[name]).wanted is not None]


def _extract_captions(
    plan: Plan, tasks: Iterable[Task], writing: Writing, progress: _Progress, bad: Quarantine
) -> None:
    config = plan.config
    statistics = _device_statistics(plan)
    segment, table = None, None
    for task in tasks:
        if task.segment is not segment:
            segment, table = task.segment, read_captions(plan.store, task.segment)
        assert table is not None
        rows = table.slice(task.first_row - task.segment.text.first_row, task.rows)
        captions = rows["caption"].to_pylist()
        samples = list(zip(rows["tar"].to_pylist(), rows["key"].to_pylist(), strict=True))
        for first in range(0, task.rows, config.batch_size):
            here = slice(first, first + config.batch_size)
            with progress.waiting("forward"):
                encoded = _encode_captions(plan, task, captions[here], samples[here], statistics)
            finished = Finished(task, samples[here], {}, encoded, last=here.stop >= task.rows)
            bad.add(finished)
            with progress.waiting("write"):
                writing.put(finished)
            progress.advance(len(captions[here]))


def _encode_captions(
    plan: Plan,
    task: Task,
    captions: Sequence[str],
    samples: Sequence[tuple[str, str]],
    statistics: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, Rows]:
    assert plan.tokenizer is not None
    ids, length = text_ids(plan.tokenizer, captions, plan.config.max_tokens)
    encoded = {}
    for name in task.fields:
        field = plan.fields[name]
        if field.wanted is None:
            real = np.arange(ids.shape[1]) < length[:, None]
            stored = Encoded(np.where(real, ids, 0), None, length, summarise(ids[real].astype(np.float32)))
            encoded[name] = Rows(stored, {})
    wanted = _wanted(plan, task)
    if plan.text_pass is not None and wanted:
        longest = int(length.max())
        mask = torch.from_numpy(np.arange(longest) < length[:, None])
        outputs = dict(zip(wanted, plan.text_pass.texts(torch.from_numpy(ids[:, :longest]), mask, wanted), strict=True))
        keys = [f"{tar}/{key}" for tar, key in samples]
        for name in task.fields:
            field = plan.fields[name]
            if field.wanted is not None:
                output = outputs[field.wanted]
                if field.spec.kind == "ragged":
                    padding = plan.config.max_tokens - longest
                    output = torch.nn.functional.pad(output, (0, 0, 0, padding))
                encoded[name] = encode_batch(
                    output,
                    name,
                    field.spec.storage,
                    keys,
                    statistics.get(name),
                    length,
                    on_nonfinite=plan.config.on_nonfinite,
                )
    return encoded


# --- fields, and int8's channel statistics ---------------------------------------------------------------


def _declare(plan: Plan) -> None:
    """Writes the field records that are missing, and the arrays' metadata."""
    measured = _measure_statistics(plan)
    for name, field in plan.fields.items():
        statistics = measured.get(name)
        record = plan.writer.field_record(name)
        fingerprint = field.fingerprint
        if record is not None:
            fingerprint = replace(fingerprint, statistics=record["fingerprint"].get("statistics"))
        elif statistics is not None:
            fingerprint = replace(fingerprint, statistics=_statistics_digest(statistics))
        plan.writer.declare_field(field.spec, fingerprint, field.environment, statistics)
        plan.writer.grow_field(field.spec, plan.config.views)


def _statistics_digest(statistics: tuple[np.ndarray, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(s.astype("<f4").tobytes() for s in statistics)).hexdigest()


def _measure_statistics(plan: Plan) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Channel mean and std of int8 fields that have none yet, from rows spread over the first segment."""
    wanting = [
        name
        for name, field in plan.fields.items()
        if field.spec.storage == "int8" and plan.writer.field_record(name) is None
    ]
    sums: dict[str, _Moments] = {name: _Moments() for name in wanting}
    config, tasks = plan.config, _sampled(plan, wanting, "image")
    stream = PictureStream(
        plan.store, tasks, plan.paths, config.size, config.batch_size, config.threads or default_threads()
    )
    try:
        for batch in stream:
            crops = [row.crop for row in batch.rows if row.crop is not None]
            if crops and plan.image_pass is not None:
                outputs = plan.image_pass.pictures(torch.from_numpy(np.stack(crops)))
                _add_moments(plan, plan.image_pass, outputs, sums, None)
    finally:
        stream.close()
    tasks = _sampled(plan, wanting, "text")
    table = read_captions(plan.store, tasks[0].segment) if tasks else None
    for task in tasks:
        assert table is not None
        assert plan.text_pass is not None
        assert plan.tokenizer is not None
        captions = table["caption"].slice(task.first_row - task.segment.text.first_row, task.rows).to_pylist()
        ids, length = text_ids(plan.tokenizer, captions, plan.config.max_tokens)
        mask = torch.from_numpy(np.arange(ids.shape[1]) < length[:, None])
        _add_moments(plan, plan.text_pass, plan.text_pass.texts(torch.from_numpy(ids), mask), sums, mask)
    for name, moments in sums.items():
        if not moments.count:
            raise TooManyBadSamples(
                f"none of the samples looked at for the channel statistics of {name} can be used",
                "look at the data, or store float16: --storage float16",
            )
    return {name: moments.mean_std() for name, moments in sums.items()}


def _sampled(plan: Plan, wanting: Sequence[str], space: str) -> list[Task]:
    """Small tasks of 16 rows, evenly spread, that together hold about STATISTICS_ROWS rows of the first segment."""
    names = tuple(name for name in wanting if plan.fields[name].spec.space == space)
    if not names:
        return []
    segment = next(s for s in plan.segments if (s.image if space == "image" else s.text).rows)
    span = segment.image if space == "image" else segment.text
    pieces = max(1, min(STATISTICS_ROWS, span.rows) // 16)
    starts = np.linspace(0, max(span.rows - 16, 0), pieces).astype(int)
    return [
        Task(segment, 0, 0, names, span.first_row + int(start), min(16, span.rows - int(start)))
        for start in dict.fromkeys(starts.tolist())
    ]


class _Moments:
    """Running sums per channel, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total: np.ndarray | float = 0.0
        self.squares: np.ndarray | float = 0.0

    def add(self, values_ND: torch.Tensor) -> None:
        wide = values_ND.double()
        self.count += len(wide)
        self.total = self.total + wide.sum(dim=0).cpu().numpy()
        self.squares = self.squares + (wide**2).sum(dim=0).cpu().numpy()

    def mean_std(self) -> tuple[np.ndarray, np.ndarray]:
        mean = np.asarray(self.total / max(self.count, 1))
        std = np.sqrt(np.maximum(np.asarray(self.squares / max(self.count, 1)) - mean**2, 0))
        return mean.astype(np.float32), np.where(std > 1e-6, std, 1.0).astype(np.float32)


def _add_moments(
    plan: Plan,
    frozen: FrozenPass,
    outputs: Sequence[torch.Tensor],
    sums: dict[str, _Moments],
    mask: torch.Tensor | None,
) -> None:
    by_want = dict(zip(frozen.wanted, outputs, strict=True))
    for name, moments in sums.items():
        wanted = plan.fields[name].wanted
        if wanted in by_want:
            values = by_want[wanted]
            if mask is not None and values.ndim == 3:
                values = values[mask.to(values.device)]
            moments.add(values.reshape(-1, values.shape[-1]))


def _device_statistics(plan: Plan) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The recorded mean and std of int8 fields, on the device that computes them."""
    found = {}
    for name, field in plan.fields.items():
        frozen = plan.image_pass if field.spec.space == "image" else plan.text_pass
        record = plan.writer.field_record(name)
        if field.spec.storage == "int8" and frozen is not None and record is not None:
            mean, std = (np.array(read_statistic(plan.store, record, which)) for which in ("mean", "std"))
            found[name] = torch.from_numpy(mean).to(frozen.device), torch.from_numpy(std).to(frozen.device)
    return found


# --- what people see --------------------------------------------------------------------------------------


class Quarantine:
    """Counts the samples left out of any field, by this process and by others, against the budget."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        images, texts = (sum(s.span(space).rows for s in plan.segments) for space in ("image", "text"))
        has_pictures = any(field.spec.space == "image" for field in plan.fields.values())
        self._total, self._what = (images, "pictures") if has_pictures else (texts, "captions")
        self._segments = {segment.number for segment in plan.segments}
        self._seen: set[str] = set()
        self._rows: set[tuple[str, str]] = set()
        self._read_receipts()
        self._before = len(self._rows)
        self.examples: list[str] = []

    @property
    def total(self) -> int:
        return len(self._rows)

    @property
    def new(self) -> int:
        return len(self._rows) - self._before

    def add(self, finished: Finished) -> None:
        """Raises TooManyBadSamples once more than max_bad of all pictures (without any: captions) are bad."""
        reasons = dict(finished.bad)
        good = [i for i in range(len(finished.samples)) if i not in finished.bad]
        for name, rows in finished.encoded.items():
            reasons |= {good[i]: f"{name}: {reason}" for i, reason in rows.refused.items()}
        if reasons:
            self.examples += ["/".join(finished.samples[i]) + f": {reason}" for i, reason in sorted(reasons.items())]
            self._rows |= {finished.samples[i] for i in reasons}
            self.check()

    def check(self) -> None:
        """Counts what other processes have left out meanwhile, and raises TooManyBadSamples as `add` does."""
        self._read_receipts()
        allowed = self._plan.config.max_bad * self._total
        if len(self._rows) > allowed:
            raise TooManyBadSamples(
                f"{len(self._rows)} of {self._total} {self._what} cannot be used, --max-bad "
                f"{self._plan.config.max_bad:g} allows {int(allowed)}; the first: " + "; ".join(self.examples[:3]),
                "mend these files and write to a new folder with --cache, or allow more: "
                f"--max-bad {min(1.0, len(self._rows) / self._total * 2):.2g} "
                f"(`emkum cache quarantine {self._plan.store.url}` lists those of committed blocks)",
            )

    def _read_receipts(self) -> None:
        for name in self._plan.fields:
            for path in receipt_names(self._plan.store, name):
                if path not in self._seen:
                    self._seen.add(path)
                    receipt = read_receipt(self._plan.store, path)
                    if receipt.segment in self._segments:
                        self._rows |= {(q.tar, q.key) for q in receipt.quarantined}


class _Progress:
    """One bar: samples a second, time left, and what the loop mostly waits for."""

    def __init__(self, what: str, tasks: Sequence[Task], watch: Watch | None) -> None:
        self._watch = watch
        self._bar = tqdm(
            total=sum(task.rows for task in tasks),
            unit="samples",
            desc=what,
            smoothing=0.05,
            mininterval=0.5,
            disable=watch is not None,
        )
        self._seconds = {"decode": 0.0, "forward": 0.0, "write": 0.0}

    def waiting(self, stage: str) -> _Stopwatch:
        return _Stopwatch(self._seconds, stage)

    def advance(self, rows: int) -> None:
        if self._watch is not None:
            self._watch(rows)
        total = sum(self._seconds.values()) or 1.0
        slowest = max(self._seconds, key=lambda stage: self._seconds[stage])
        share = self._seconds[slowest] / total
        self._bar.set_postfix_str(f"waits for {slowest} {share:.0%}", refresh=False)
        self._bar.update(rows)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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


def _space(plan: Plan, task: Task) -> str:
    return plan.fields[task.fields[0]].spec.space


def _contents_line(plan: Plan) -> str:
    pictures = sum(s.image.rows for s in plan.segments)
    captions = sum(s.text.rows for s in plan.segments)
    tars = sum(len(s.sources) for s in plan.segments)
    notes = []
    if plan.filtered:
        notes.append(f"{plan.filtered} samples with neither picture nor caption left out")
    if plan.duplicate_keys:
        notes.append(f"{plan.duplicate_keys} keys appear in several tars (identity is tar and key)")
    both = {f.wanted.network for f in plan.fields.values() if f.wanted and f.wanted.what == "tokens"}
    both &= {f.wanted.network for f in plan.fields.values() if f.wanted and f.wanted.what != "tokens"}
    notes += [f"{name} is encoder and teacher: one pass" for name in sorted(both)]
    shared = plan.image_pass.shared_blocks if plan.image_pass else {}
    notes += [f"{name} reuses the first {n} blocks of {other}" for name, (other, n) in shared.items()]
    text = f"split {plan.config.split}: {pictures:,} pictures and {captions:,} captions in {tars} tars"
    return "; ".join([text, *notes])


def _bill(plan: Plan) -> list[str]:
    """Rows, bytes and time before they are spent; the time is measured on one batch."""
    lines = ["to extract:"]
    for name, field in plan.fields.items():
        rows = sum(task.rows for task in plan.tasks if name in task.fields)
        if rows:
            size = plan.field_bytes(name)
            bound = "at most " if field.spec.kind == "ragged" else ""
            lines.append(f"  {name}: {rows:,} rows, {bound}{readable_bytes(size)} as {field.spec.storage}")
    seconds = _expected_seconds(plan)
    time_text = f", about {_duration(seconds)} (measured on one batch)" if seconds is not None else ""
    lines.append(f"  in all {plan.num_rows:,} rows, {readable_bytes(plan.num_bytes)}{time_text}")
    return lines


def _expected_seconds(plan: Plan) -> float | None:
    batch = plan.config.batch_size
    seconds, known = 0.0, False
    if plan.image_pass is not None:
        rows = sum(task.rows for task in plan.tasks if _space(plan, task) == "image")
        if rows > 8 * batch:
            crops = torch.zeros(batch, plan.config.size, plan.config.size, 3, dtype=torch.uint8)
            plan.image_pass.pictures(crops[:1])[0].cpu()  # the first pass sets the device up
            started = time.perf_counter()
            plan.image_pass.pictures(crops)[0].cpu()
            seconds += (time.perf_counter() - started) * rows / batch
            known = True
    if plan.text_pass is not None:
        rows = sum(task.rows for task in plan.tasks if _space(plan, task) == "text")
        if rows > 8 * batch:
            ids = torch.zeros(batch, 16, dtype=torch.int64)
            started = time.perf_counter()
            plan.text_pass.texts(ids, torch.ones(batch, 16, dtype=torch.bool))[0].cpu()
            seconds += (time.perf_counter() - started) * rows / batch
            known = True
    return seconds if known else None


def closing_lines(plan: Plan, bad: Quarantine, result: ExtractResult) -> list[str]:
    """What a finished run says of itself."""
    lines = _conservation(plan, bad) + _summary(result)
    if plan.config.split == "train":
        lines.append(f"next: emkum train --cache {plan.config.cache}")
    return lines


def _conservation(plan: Plan, bad: Quarantine) -> list[str]:
    pictures = sum(s.image.rows for s in plan.segments)
    if not any(field.spec.space == "image" for field in plan.fields.values()):
        return []
    seen = pictures + plan.filtered
    return [
        *(f"quarantined {example}" for example in bad.examples[:3]),
        f"seen {seen:,} = {pictures - bad.total:,} ok + {bad.total} quarantined + {plan.filtered} filtered (pictures)",
    ]


def _summary(result: ExtractResult) -> list[str]:
    rate = result.rows / result.seconds if result.seconds else 0.0
    return [
        f"committed {result.blocks} blocks of rows, {readable_bytes(result.bytes)}, {result.rows:,} rows "
        f"in {_duration(result.seconds)} ({rate:,.0f} rows/s)"
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
