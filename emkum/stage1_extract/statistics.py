"""int8's channel mean and std: measured once, before a field's first block, from rows of the split it is trained on.

N rows, D channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from emkum.errors import NonFiniteFeature, TooManyBadSamples
from emkum.models.passes import FrozenPass
from emkum.models.tokenizer import text_ids
from emkum.shards.layout import Space
from emkum.shards.reader import read_statistic
from emkum.shards.segments import Segment, read_captions
from emkum.stage1_extract.pictures import PictureStream, picture_source
from emkum.stage1_extract.plan import Plan, Task
from emkum.stage1_extract.quarantine import WORDS
from emkum.stage1_extract.scans import ScanMemory
from emkum.stage1_extract.sounds import SoundStream, ears_of, waves

STATISTICS_ROWS = 512  # samples that mean and std are taken from, evenly spread over one segment
OUTLIER = 1000.0  # times the median sample's largest |x|: what is above would take all levels from the others
SPLIT = "train"
Statistics = dict[str, tuple[np.ndarray, np.ndarray]]  # field -> mean, std: float32 [D]


def unmeasured(plan: Plan) -> list[str]:
    """The int8 fields that have no record yet."""
    found = ((name, field) for name, field in plan.fields.items() if field.spec.storage == "int8")
    return [name for name, field in found if plan.writer.field_record(name) is None]


def with_train_segments(plan: Plan, memory: ScanMemory, say: Callable[[str], None]) -> Plan:
    """The plan with the cache's train segments that are at hand before those of the command: where to sample from.

    One line says so where there is none, for a command of another split.
    """
    first: list[Segment] = []
    paths = dict(plan.paths)
    for space in {plan.fields[name].spec.space for name in unmeasured(plan)}:
        segment, found = _train_segment(plan, space, memory)
        if segment is not None:
            first.append(segment)
            paths |= found
        elif plan.config.split != SPLIT:
            what = WORDS[space]
            say(f"int8 statistics of {what} come from split {plan.config.split}: no segment of {SPLIT} is at hand")
    if not first:
        return plan
    return replace(plan, segments=(*sorted(first, key=_number), *plan.segments), paths=paths)


def measure(plan: Plan, names: Sequence[str], threads: int) -> Statistics:
    """Mean and std of each field, from the first of the plan's segments that has rows of its space, and tars.

    Samples with inf or NaN raise NonFiniteFeature naming the first, or are passed over (`on_nonfinite` quarantine);
    so are those OUTLIER times larger than the median one.
    """
    moments = {name: _Moments(name, plan.config.on_nonfinite == "stop") for name in names}
    _measure_pictures(plan, moments, threads)
    _measure_captions(plan, moments)
    _measure_sounds(plan, moments, threads)
    return {name: found.mean_std() for name, found in moments.items()}


def digest_of(statistics: tuple[np.ndarray, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(s.astype("<f4").tobytes() for s in statistics)).hexdigest()


def on_devices(plan: Plan) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The recorded mean and std of int8 fields, on the device that computes them."""
    found = {}
    for name, field in plan.fields.items():
        frozen = {"image": plan.image_pass, "text": plan.text_pass, "audio": plan.audio_pass}[field.spec.space]
        record = plan.writer.field_record(name)
        if field.spec.storage == "int8" and frozen is not None and record is not None:
            mean, std = (np.array(read_statistic(plan.store, record, which)) for which in ("mean", "std"))
            found[name] = torch.from_numpy(mean).to(frozen.device), torch.from_numpy(std).to(frozen.device)
    return found


# --- which rows ------------------------------------------------------------------------------------------


def _train_segment(plan: Plan, space: Space, memory: ScanMemory) -> tuple[Segment | None, dict[str, str]]:
    """The first segment of SPLIT with rows of this space that can be read now, and where its tars lie, if they do."""
    for segment in plan.writer.segments:
        if segment.split != SPLIT or not segment.span(space).rows:
            continue
        if space == "text":  # captions lie in the cache
            return segment, {}
        if plan.crops is not None and space == "image":
            if _has_pictures(plan, segment):
                return segment, {}
            continue
        paths = {s.tar: plan.paths.get(s.tar, s.path) for s in segment.sources}
        if all(tar in plan.paths or _is_unchanged(memory, path) for tar, path in paths.items()):
            return segment, paths
    return None, {}


def _is_unchanged(memory: ScanMemory, path: str) -> bool:
    try:
        return memory.unchanged(path)
    except OSError:
        return False


def _has_pictures(plan: Plan, segment: Segment) -> bool:
    """Whether all of the segment's pictures, in the first view, can be read now."""
    if plan.crops is None:
        return all(source.tar in plan.paths for source in segment.sources)
    return all((block, 0) in plan.crops.receipts for block in segment.image.blocks(plan.writer.rows_per_block))


def _is_at_hand(plan: Plan, segment: Segment, space: Space) -> bool:
    if space == "audio":
        return all(source.tar in plan.paths for source in segment.sources)
    return _has_pictures(plan, segment)


def _number(segment: Segment) -> int:
    return segment.number


def _sampled(plan: Plan, names: Sequence[str], space: Space) -> list[Task]:
    """Small tasks of 16 rows, evenly spread, that together hold about STATISTICS_ROWS rows of one segment."""
    here = tuple(name for name in names if plan.fields[name].spec.space == space)
    if not here:
        return []
    segment = next(s for s in plan.segments if s.span(space).rows and (space == "text" or _is_at_hand(plan, s, space)))
    span = segment.span(space)
    pieces = max(1, min(STATISTICS_ROWS, span.rows) // 16)
    starts = np.linspace(0, max(span.rows - 16, 0), pieces).astype(int)
    return [
        Task(segment, 0, 0, here, span.first_row + int(start), min(16, span.rows - int(start)))
        for start in dict.fromkeys(starts.tolist())
    ]


# --- what the networks say of them -----------------------------------------------------------------------


def _measure_pictures(plan: Plan, moments: dict[str, _Moments], threads: int) -> None:
    tasks = _sampled(plan, list(moments), "image")
    if not tasks:
        return
    assert plan.image_pass is not None
    config = plan.config
    stream = PictureStream(plan.store, tasks, picture_source(plan), config.batch_size, threads)
    try:
        for batch in stream:
            good = [row for row in batch.rows if row.crop is not None]
            if good:
                crops = torch.from_numpy(np.stack([row.crop for row in good if row.crop is not None]))
                names = [row.picture.name for row in good]
                _add_moments(plan, plan.image_pass, plan.image_pass.pictures(crops), moments, names, None)
    finally:
        stream.close()


def _measure_captions(plan: Plan, moments: dict[str, _Moments]) -> None:
    tasks = _sampled(plan, list(moments), "text")
    table = read_captions(plan.store, tasks[0].segment) if tasks else None
    for task in tasks:
        assert table is not None
        assert plan.text_pass is not None
        assert plan.tokenizer is not None
        rows = table.slice(task.first_row - task.segment.text.first_row, task.rows)
        ids, length = text_ids(plan.tokenizer, rows["caption"].to_pylist(), plan.config.max_tokens)
        mask = torch.from_numpy(np.arange(ids.shape[1]) < length[:, None])
        names = [f"{tar}/{key}" for tar, key in zip(rows["tar"].to_pylist(), rows["key"].to_pylist(), strict=True)]
        _add_moments(plan, plan.text_pass, plan.text_pass.texts(torch.from_numpy(ids), mask), moments, names, mask)


def _measure_sounds(plan: Plan, moments: dict[str, _Moments], threads: int) -> None:
    tasks = _sampled(plan, list(moments), "audio")
    if not tasks:
        return
    assert plan.audio_pass is not None
    stream = SoundStream(plan.store, tasks, ears_of(plan), plan.config.batch_size, threads)
    try:
        for batch in stream:
            good = [row for row in batch.rows if row.sound is not None]
            if not good:
                continue
            waves_NS, num_samples = waves([row.sound for row in good if row.sound is not None])
            names = [row.clip.name for row in good]
            for want, values in zip(
                plan.audio_pass.wanted, plan.audio_pass.sounds(torch.from_numpy(waves_NS), num_samples), strict=True
            ):
                length = torch.from_numpy(plan.audio_pass.lengths(want, num_samples))
                mask = None if values.ndim == 2 else torch.arange(values.shape[1]) < length[:, None]
                mask = mask if mask is None else mask.to(values.device)
                for name, found in moments.items():
                    if plan.fields[name].wanted == want:
                        found.add(values, names, mask)
    finally:
        stream.close()


def _add_moments(
    plan: Plan,
    frozen: FrozenPass,
    outputs: Sequence[torch.Tensor],
    moments: dict[str, _Moments],
    samples: Sequence[str],
    mask: torch.Tensor | None,
) -> None:
    by_want = dict(zip(frozen.wanted, outputs, strict=True))
    for name, found in moments.items():
        wanted = plan.fields[name].wanted
        if wanted in by_want:
            values = by_want[wanted]
            ragged = mask is not None and values.ndim == 3
            found.add(values, samples, mask.to(values.device) if mask is not None and ragged else None)


class _Moments:
    """Sums per channel of each sample, in float64."""

    def __init__(self, field: str, stop: bool) -> None:
        self._field, self._stop = field, stop
        self._largest: list[float] = []
        self._counts: list[int] = []
        self._totals: list[np.ndarray] = []
        self._squares: list[np.ndarray] = []

    def add(self, values: torch.Tensor, samples: Sequence[str], mask: torch.Tensor | None) -> None:
        """values: [N, D] or [N, tokens, D]. mask: [N, tokens], where tokens are real."""
        for i, sample in enumerate(samples):
            row_ND = (values[i] if mask is None else values[i][mask[i]]).reshape(-1, values.shape[-1]).double()
            num_bad = int((~torch.isfinite(row_ND)).sum())
            if num_bad and self._stop:
                raise NonFiniteFeature(
                    f"{self._field}, sample {sample}: {num_bad} values are inf or NaN",
                    "use --compute float32 if the network overflows, or leave such samples out with --on-nonfinite "
                    "quarantine",
                )
            if num_bad or not len(row_ND):
                continue
            self._largest.append(float(row_ND.abs().max()))
            self._counts.append(len(row_ND))
            self._totals.append(row_ND.sum(dim=0).cpu().numpy())
            self._squares.append((row_ND**2).sum(dim=0).cpu().numpy())

    def mean_std(self) -> tuple[np.ndarray, np.ndarray]:
        if not self._counts:
            raise TooManyBadSamples(
                f"none of the samples looked at for the channel statistics of {self._field} can be used",
                "look at the data, or store float16: --storage float16",
            )
        largest = np.array(self._largest)
        kept = np.flatnonzero(largest <= max(OUTLIER * float(np.median(largest)), float(largest.min())))
        count = sum(self._counts[i] for i in kept)
        mean = sum((self._totals[i] for i in kept), np.zeros(())) / count
        squares = sum((self._squares[i] for i in kept), np.zeros(())) / count
        std = np.sqrt(np.maximum(squares - mean**2, 0))
        with np.errstate(over="ignore"):
            mean, std = mean.astype(np.float32), np.where(std > 1e-6, std, 1.0).astype(np.float32)
        if not (np.isfinite(mean).all() and np.isfinite(std).all()):
            raise NonFiniteFeature(
                f"the channel statistics of {self._field} are inf or NaN",
                "use --compute float32 if the network overflows, or --storage float32",
            )
        return mean, std
