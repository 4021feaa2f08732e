"""Teacher -> cache: decode, forward, quantise and write the missing blocks, all overlapping.

N rows, H height, W width, C colour, L text positions.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from emkum.models.passes import Wanted
from emkum.models.tokenizer import text_ids
from emkum.shards.claims import Claims
from emkum.shards.codec import Encoded, encode, summarise
from emkum.shards.layout import Space
from emkum.shards.shard_files import cores
from emkum.stage1_extract import statistics as int8_statistics
from emkum.stage1_extract.captions import CaptionBatch, CaptionStream, pair_inputs, text_inputs
from emkum.stage1_extract.claimed import ClaimedBlocks
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.encode import Output, Rows, encode_crops, encode_outputs, for_device, stacked_crops
from emkum.stage1_extract.pictures import Batch, PictureStream, picture_source
from emkum.stage1_extract.plan import Plan, Survey, Task, make_plan, require_room, survey
from emkum.stage1_extract.probe import check_committed
from emkum.stage1_extract.quarantine import Quarantine
from emkum.stage1_extract.scans import ScanMemory
from emkum.stage1_extract.sounds import SoundBatch, SoundStream, ears_of, waves
from emkum.stage1_extract.telling import (
    ExtractResult,
    Progress,
    Say,
    Watch,
    beside_bars,
    bill,
    closing_lines,
    contents_line,
    space_of,
)
from emkum.stage1_extract.writing import Finished, Writing


def extract(
    config: ExtractConfig,
    say: Say = print,
    watch: Watch | None = None,
    warn: Say | None = None,
    checked: bool = False,
) -> ExtractResult:
    """Fills the cache with every missing block of the asked fields; does nothing if there is none.

    `say` receives one line a step, `warn` (default: `say`) what went otherwise than planned. watch: called with the
    rows of every batch, and with 0 while there is nothing to do, in place of the bill and the bar; what it raises ends
    the run. checked: whoever calls has just computed committed rows again, on this machine. Raises the errors of
    emkum.errors; whatever was committed stays, and the same call continues.
    """
    if config.workers is not None or config.scheduler is not None:
        from emkum.stage1_extract.workers import extract_with_workers

        return extract_with_workers(config, say)
    with contextlib.ExitStack() as held:
        return _run(config, say, watch, warn or say, checked, held)


def _run(
    config: ExtractConfig, say: Say, watch: Watch | None, warn: Say, checked: bool, held: contextlib.ExitStack
) -> ExtractResult:
    started = time.perf_counter()
    found = survey(config)
    claims = held.enter_context(Claims(found.store))
    with claims.planning(config.join, say):
        plan = planned(found, claims, say, with_bill=watch is None, checked=checked)
    bad = Quarantine(plan)
    if not plan.tasks:
        bad.check()
        return ExtractResult(0, 0, 0, time.perf_counter() - started, 0.0, 0)
    blocks = ClaimedBlocks(plan, claims, beside_bars(say))
    loop_started = time.perf_counter()
    cut = 0  # sounds of which only the beginning was heard
    with (
        Writing(plan, blocks, beside_bars(warn)) as writing,
        Progress("captions", watch) as captions,
        Progress("pictures", watch) as pictures,
        Progress("sounds", watch) as sounds,
    ):
        for missing in blocks.rounds():
            if watch is not None:
                watch(0)
            text_tasks, image_tasks = _of(plan, missing, "text"), _of(plan, missing, "image")
            audio_tasks = _of(plan, missing, "audio")
            captions.left(sum(task.rows for task in text_tasks))
            pictures.left(sum(task.rows for task in image_tasks))
            sounds.left(sum(task.rows for task in audio_tasks))
            if text_tasks:
                _extract_captions(plan, captions.opened_by(blocks.take(text_tasks)), writing, captions, bad)
            if audio_tasks:
                cut += _extract_sounds(plan, sounds.opened_by(blocks.take(audio_tasks)), writing, sounds, bad)
            if image_tasks:
                _extract_pictures(plan, pictures.opened_by(blocks.take(image_tasks)), writing, pictures, bad)
            writing.settle()
        captions.left(0)
        pictures.left(0)
        sounds.left(0)
    bad.finish()
    ended = time.perf_counter()
    result = ExtractResult(
        writing.num_rows, writing.num_blocks, writing.num_bytes, ended - started, ended - loop_started, bad.new
    )
    if cut:
        say(f"{cut:,} sounds last longer than {config.max_seconds:g} s and were cut there (--max-seconds)")
    for line in closing_lines(plan, bad, result):
        say(line)
    return result


def planned(found: Survey, claims: Claims, say: Say, with_bill: bool = True, checked: bool = False) -> Plan:
    """The plan of a run, said, with its fields declared. The caller alone is planning (Claims.planning).

    checked: committed rows were computed again just now, on this machine.
    """
    compare = (lambda held: None) if checked else (lambda held: check_committed(held, say))
    plan = make_plan(found, claims, compare)
    if not claims.writers():  # others' unfinished blocks take room already, and are among the missing ones
        require_room(plan)
    for tar in found.tars:
        if tar.truncated_at is not None:
            kept = f"its {len(tar.samples)} whole samples are kept, the rest is lost"
            say(f"{tar.name} ends at byte {tar.truncated_at:,} without end-of-archive: {kept}")
    say(contents_line(plan))
    lost = [name for name in plan.fields if plan.receipts[name] and plan.writer.field_record(name) is None]
    if lost and not plan.tasks:
        _declare(plan, found.memory, say)
        say(f"wrote the lost record of {', '.join(lost)} again")
    if not plan.tasks:
        say(f"nothing to do: {plan.store.url} holds every block of {', '.join(plan.fields)}")
        return plan
    for line in bill(plan) if with_bill else ():
        say(line)
    _declare(plan, found.memory, say)
    return plan


def default_threads() -> int:
    return min(16, max(2, cores()))


def _of(plan: Plan, tasks: Sequence[Task], space: Space) -> list[Task]:
    return [task for task in tasks if space_of(plan, task) == space]


# --- the loops -------------------------------------------------------------------------------------

# A batch is started (queued on the device) and finished (waited for) apart: the device has the next one by then.
Started = Callable[[], Finished]
B = TypeVar("B")  # a batch of pictures, captions or sounds


def _started(batches: Iterator[B], start: Callable[[B], Started], progress: Progress) -> Iterator[Started]:
    """Each batch, started once it is decoded."""
    while True:
        with progress.waiting("decode"):
            batch = next(batches, None)
        if batch is None:
            return
        with progress.waiting("forward"):
            started = start(batch)
        yield started


def _hand_over(batches: Iterator[Started], writing: Writing, progress: Progress, bad: Quarantine) -> None:
    """Each batch to the writer, once the one after it is started."""
    for started in _one_behind(batches):
        with progress.waiting("forward"):
            finished = started()
        bad.add(finished)
        with progress.waiting("write"):
            writing.put(finished)
        progress.advance(len(finished.samples))


def _one_behind(batches: Iterator[Started]) -> Iterator[Started]:
    before = next(batches, None)
    for after in batches:
        assert before is not None
        yield before
        before = after
    if before is not None:
        yield before


def _extract_pictures(plan: Plan, tasks: Iterable[Task], writing: Writing, progress: Progress, bad: Quarantine) -> None:
    config = plan.config
    statistics = int8_statistics.on_devices(plan)
    source = picture_source(plan)
    stream = PictureStream(plan.store, tasks, source, config.batch_size, config.threads or default_threads())
    try:
        batches = _started(iter(stream), lambda batch: _start_pictures(plan, batch, statistics), progress)
        _hand_over(batches, writing, progress, bad)
    finally:
        stream.close()


def _start_pictures(plan: Plan, batch: Batch, statistics: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Started:
    """Every field's rows for the good pictures of the batch."""
    samples = [(row.picture.tar, row.picture.key) for row in batch.rows]
    bad = {i: row.reason for i, row in enumerate(batch.rows) if row.crop is None}
    good = [row for row in batch.rows if row.crop is not None]
    crops = [row.crop for row in good if row.crop is not None]
    if not good:
        return lambda: Finished(batch.task, samples, bad, {}, batch.last)
    names = [row.picture.name for row in good]
    device = torch.device("cpu") if plan.image_pass is None else plan.image_pass.device
    crops_NHWC = stacked_crops(crops, device)
    wanted = _wanted(plan, batch.task)
    said = {}
    if plan.image_pass is not None and wanted:
        said = dict(zip(wanted, plan.image_pass.pictures(crops_NHWC, wanted), strict=True))
    outputs: list[Output] = []
    exact: dict[str, Rows] = {}
    for name in batch.task.fields:
        field = plan.fields[name]
        if field.wanted is not None and field.spec.kind == "top_logits":
            count = field.spec.row_shape[0]  # of values, the rest among them; behind them lie the classes
            values, classes = said[field.wanted][:, :count], said[field.wanted][:, count:].int()
            outputs.append(Output(name, values, field.spec.storage, names, classes=classes))
        elif field.wanted is not None:
            outputs.append(Output(name, said[field.wanted], field.spec.storage, names, statistics.get(name)))
        elif field.spec.kind == "crops":
            exact[name] = encode_crops(crops_NHWC.numpy())
        else:
            boxes = np.stack([row.box.as_row() for row in good if row.box is not None])
            exact[name] = Rows(encode(boxes, "float32"), {})
    encoded = encode_outputs(outputs, plan.config.on_nonfinite)
    return lambda: Finished(batch.task, samples, bad, exact | encoded(), batch.last)


def _wanted(plan: Plan, task: Task, of_pairs: bool = False) -> list[Wanted]:
    """The outputs that the task's missing fields need: those of pairs, or the others."""
    fields = [plan.fields[name] for name in task.fields]
    return [field.wanted for field in fields if field.wanted is not None and field.is_of_pairs == of_pairs]


def _extract_captions(plan: Plan, tasks: Iterable[Task], writing: Writing, progress: Progress, bad: Quarantine) -> None:
    statistics = int8_statistics.on_devices(plan)
    threads = plan.config.threads or default_threads()
    source = None if plan.pair_pass is None else picture_source(plan)

    def needs_pictures(task: Task) -> bool:
        return any(plan.fields[name].is_of_pairs for name in task.fields)

    stream = CaptionStream(plan.store, tasks, plan.config.batch_size, source, needs_pictures, threads)
    try:
        batches = _started(iter(stream), lambda batch: _start_captions(plan, batch, statistics), progress)
        _hand_over(batches, writing, progress, bad)
    finally:
        stream.close()


def _start_captions(
    plan: Plan, batch: CaptionBatch, statistics: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> Started:
    """Every field's rows; those of pairs where the caption's picture could be decoded."""
    task = batch.task
    assert plan.tokenizer is not None
    ids, length = text_ids(plan.tokenizer, batch.texts, plan.config.max_tokens)
    exact: dict[str, Rows] = {}
    for name in task.fields:
        if plan.fields[name].wanted is None:
            real = np.arange(ids.shape[1]) < length[:, None]
            stored = Encoded(np.where(real, ids, 0), None, length, summarise(ids[real].astype(np.float32)))
            exact[name] = Rows(stored, {})
    outputs = _text_outputs(plan, batch, ids, length, statistics)
    place, of_pairs = _pair_outputs(plan, batch, ids, length, statistics)
    encoded = encode_outputs([*outputs, *of_pairs], plan.config.on_nonfinite)

    def finish() -> Finished:
        rows = encoded()
        for name in (output.field for output in of_pairs):
            unfit = {place[i]: reason for i, reason in rows[name].refused.items()}
            rows[name] = replace(rows[name], refused=batch.unpaired | unfit)
        return Finished(task, batch.samples, {}, exact | rows, batch.last)

    return finish


def _text_outputs(
    plan: Plan,
    batch: CaptionBatch,
    ids: np.ndarray,
    length: np.ndarray,
    statistics: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> list[Output]:
    """What the text networks say of the batch."""
    wanted = _wanted(plan, batch.task)
    if plan.text_pass is None or not wanted:
        return []
    inputs = text_inputs(ids, length, plan.text_pass.device)
    said = dict(zip(wanted, plan.text_pass.texts(*inputs, wanted), strict=True))
    names = [f"{tar}/{key}" for tar, key in batch.samples]
    return [
        _caption_output(plan, name, said[want], names, length, statistics)
        for name in batch.task.fields
        if (want := plan.fields[name].wanted) is not None and not plan.fields[name].is_of_pairs
    ]


def _pair_outputs(
    plan: Plan,
    batch: CaptionBatch,
    ids: np.ndarray,
    length: np.ndarray,
    statistics: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> tuple[list[int], list[Output]]:
    """The captions whose picture could be decoded, by their place in the batch, and what networks of pairs say of them.

    Also of none of them, if it comes to that: the fields' rows are then empty.
    """
    wanted = _wanted(plan, batch.task, of_pairs=True)
    if plan.pair_pass is None or not wanted:
        return [], []
    place = [i for i, _ in batch.paired]
    device = plan.pair_pass.device
    inputs = pair_inputs(batch, ids, length, device)
    said = [] if inputs is None else plan.pair_pass.pairs(*inputs, wanted)
    names = [f"{tar}/{key}" for tar, key in (batch.samples[i] for i in place)]
    outputs = []
    for name in batch.task.fields:
        spec, want = plan.fields[name].spec, plan.fields[name].wanted
        if want is not None and plan.fields[name].is_of_pairs:
            values = said[wanted.index(want)] if said else torch.empty(0, *spec.row_shape, device=device)
            outputs.append(_caption_output(plan, name, values, names, length[place], statistics))
    return place, outputs


def _caption_output(
    plan: Plan,
    name: str,
    values: torch.Tensor,
    names: Sequence[str],
    length: np.ndarray,
    statistics: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> Output:
    spec = plan.fields[name].spec
    if spec.is_ragged:
        values = torch.nn.functional.pad(values, (0, 0, 0, plan.config.max_tokens - values.shape[1]))
    return Output(name, values, spec.storage, names, statistics.get(name), length)


def _extract_sounds(plan: Plan, tasks: Iterable[Task], writing: Writing, progress: Progress, bad: Quarantine) -> int:
    """How many sounds were cut."""
    statistics = int8_statistics.on_devices(plan)
    threads = plan.config.threads or default_threads()
    stream = SoundStream(plan.store, tasks, ears_of(plan), plan.config.batch_size, threads)
    cut = 0

    def start(batch: SoundBatch) -> Started:
        nonlocal cut
        cut += sum(row.sound is not None and row.sound.was_cut for row in batch.rows)
        return _start_sounds(plan, batch, statistics)

    try:
        _hand_over(_started(iter(stream), start, progress), writing, progress, bad)
    finally:
        stream.close()
    return cut


def _start_sounds(plan: Plan, batch: SoundBatch, statistics: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Started:
    """Every field's rows for the good sounds of the batch."""
    samples = [(row.clip.tar, row.clip.key) for row in batch.rows]
    bad = {i: row.reason for i, row in enumerate(batch.rows) if row.sound is None}
    good = [row for row in batch.rows if row.sound is not None]
    if not good:
        return lambda: Finished(batch.task, samples, bad, {}, batch.last)
    assert plan.audio_pass is not None
    waves_NS, num_samples = waves([row.sound for row in good if row.sound is not None])
    wanted = _wanted(plan, batch.task)
    said = plan.audio_pass.sounds(for_device(waves_NS, plan.audio_pass.device), num_samples, wanted)
    names = [row.clip.name for row in good]
    outputs = []
    for name in batch.task.fields:
        spec, want = plan.fields[name].spec, plan.fields[name].wanted
        assert want is not None
        values, length = said[wanted.index(want)], None
        if spec.is_ragged:
            values = torch.nn.functional.pad(values, (0, 0, 0, spec.row_shape[0] - values.shape[1]))
            length = plan.audio_pass.lengths(want, num_samples)
        outputs.append(Output(name, values, spec.storage, names, statistics.get(name), length))
    encoded = encode_outputs(outputs, plan.config.on_nonfinite)
    return lambda: Finished(batch.task, samples, bad, encoded(), batch.last)


# --- fields ----------------------------------------------------------------------------------------------


def _declare(plan: Plan, memory: ScanMemory, say: Say) -> None:
    """Writes the field records that are missing, and the arrays' metadata."""
    measured = _measure_statistics(int8_statistics.with_train_segments(plan, memory, say))
    for name, field in plan.fields.items():
        statistics = measured.get(name)
        record = plan.writer.field_record(name)
        fingerprint = field.fingerprint
        if record is not None:
            fingerprint = replace(fingerprint, statistics=record["fingerprint"].get("statistics"))
        elif statistics is not None:
            fingerprint = replace(fingerprint, statistics=int8_statistics.digest_of(statistics))
        plan.writer.declare_field(field.spec, fingerprint, field.environment, statistics)
        plan.writer.grow_field(field.spec, plan.config.views)


def _measure_statistics(plan: Plan) -> int8_statistics.Statistics:
    """Channel mean and std of the int8 fields that have none yet."""
    names = int8_statistics.unmeasured(plan)
    return int8_statistics.measure(plan, names, plan.config.threads or default_threads())
