"""int8's channel mean and std: measured once, before a field's first block, from rows of the split it is trained on.

N rows, D channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from emkum.errors import NonFiniteFeature, TooManyBadSamples
from emkum.models.passes import Wanted
from emkum.models.tokenizer import text_ids
from emkum.shards.layout import Space
from emkum.shards.reader import read_statistic
from emkum.shards.segments import Segment, read_captions
from emkum.stage1_extract.captions import CaptionBatch, CaptionStream, pair_inputs, text_inputs
from emkum.stage1_extract.pictures import PictureStream, picture_source
from emkum.stage1_extract.plan import Plan, Task
from emkum.stage1_extract.quarantine import WORDS
from emkum.stage1_extract.scans import ScanMemory
from emkum.stage1_extract.sounds import SoundStream, ears_of, waves
from emkum.stage1_extract.sources import blocks_of_pictures

STATISTICS_ROWS = 512  # samples that mean and std are taken from, evenly spread over one segment
PIECE = 16  # of them in a row
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
    fields = [plan.fields[name] for name in unmeasured(plan)]
    for space, of_pairs in sorted({(field.spec.space, field.is_of_pairs) for field in fields}):
        segment, found = _train_segment(plan, space, memory, of_pairs)
        if segment is not None:
            first.append(segment)
            paths |= found
        elif plan.config.split != SPLIT:
            what = "pairs" if of_pairs else WORDS[space]
            say(f"int8 statistics of {what} come from split {plan.config.split}: no segment of {SPLIT} is at hand")
    if not first:
        return plan
    before = sorted({segment.number: segment for segment in first}.values(), key=_number)
    return replace(plan, segments=(*before, *plan.segments), paths=paths)


def measure(plan: Plan, names: Sequence[str], threads: int) -> Statistics:
    """Mean and std of each field, from the first of the plan's segments that has rows of its space, and tars.

    Samples with inf or NaN raise NonFiniteFeature naming the first, or are passed over (`on_nonfinite` quarantine);
    so are those OUTLIER times larger than the median one.
    """
    moments = {name: _Moments(name, plan.config.on_nonfinite == "stop") for name in names}
    _measure_pictures(plan, moments, threads)
    _measure_captions(plan, moments)
    _measure_pairs(plan, moments, threads)
    _measure_sounds(plan, moments, threads)
    return {name: found.mean_std() for name, found in moments.items()}


def digest_of(statistics: tuple[np.ndarray, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(s.astype("<f4").tobytes() for s in statistics)).hexdigest()


def on_devices(plan: Plan) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The recorded mean and std of int8 fields, on the device that computes them."""
    found = {}
    for name, field in plan.fields.items():
        passes = {"image": plan.image_pass, "text": plan.text_pass, "audio": plan.audio_pass}
        frozen = plan.pair_pass if field.is_of_pairs else passes[field.spec.space]
        record = plan.writer.field_record(name)
        if field.spec.storage == "int8" and frozen is not None and record is not None:
            mean, std = (np.array(read_statistic(plan.store, record, which)) for which in ("mean", "std"))
            found[name] = torch.from_numpy(mean).to(frozen.device), torch.from_numpy(std).to(frozen.device)
    return found


# --- which rows ------------------------------------------------------------------------------------------


def _train_segment(
    plan: Plan, space: Space, memory: ScanMemory, of_pairs: bool
) -> tuple[Segment | None, dict[str, str]]:
    """The first segment of SPLIT with rows of this space that can be read now, and where its tars lie, if they do."""
    for segment in plan.writer.segments:
        if segment.split != SPLIT or not segment.span(space).rows:
            continue
        if space == "text" and not of_pairs:  # captions lie in the cache
            return segment, {}
        if of_pairs and not len(_paired_rows(plan, segment)):
            continue
        if plan.crops is not None and space != "audio":
            if _has_pairs(plan, segment) if of_pairs else _has_pictures(plan, segment):
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


def _has_pairs(plan: Plan, segment: Segment) -> bool:
    """Whether there are captions with a picture, and all of these can be read now."""
    blocks = blocks_of_pictures(read_captions(plan.store, segment)["image_row"], plan.writer.rows_per_block)
    if plan.crops is None:
        return bool(blocks) and _has_pictures(plan, segment)
    return bool(blocks) and all((block, 0) in plan.crops.receipts for block in blocks)


def _is_at_hand(plan: Plan, segment: Segment, space: Space) -> bool:
    if space == "audio":
        return all(source.tar in plan.paths for source in segment.sources)
    return _has_pictures(plan, segment)


def _number(segment: Segment) -> int:
    return segment.number


def _sampled(plan: Plan, names: Sequence[str], space: Space) -> list[Task]:
    """Small tasks of PIECE rows, evenly spread, that together hold about STATISTICS_ROWS rows of one segment."""
    here = tuple(name for name in names if plan.fields[name].spec.space == space)
    if not here:
        return []
    segment = next(s for s in plan.segments if s.span(space).rows and (space == "text" or _is_at_hand(plan, s, space)))
    span = segment.span(space)
    pieces = max(1, min(STATISTICS_ROWS, span.rows) // PIECE)
    starts = np.linspace(0, max(span.rows - PIECE, 0), pieces).astype(int)
    return [
        Task(segment, 0, 0, here, span.first_row + int(start), min(PIECE, span.rows - int(start)))
        for start in dict.fromkeys(starts.tolist())
    ]


def _sampled_pairs(plan: Plan, names: tuple[str, ...]) -> list[Task]:
    """As `_sampled`, with PIECE captions that have a picture in each task, and whatever lies between them."""
    segment = next(s for s in plan.segments if s.text.rows and _has_pairs(plan, s))
    rows = _paired_rows(plan, segment)
    pieces = max(1, min(STATISTICS_ROWS, len(rows)) // PIECE)
    starts = np.unique(np.linspace(0, max(len(rows) - PIECE, 0), pieces).astype(int))
    ends = rows[np.minimum(starts + PIECE, len(rows)) - 1] + 1
    return [
        Task(segment, 0, 0, names, first, end - first)
        for first, end in zip(rows[starts].tolist(), ends.tolist(), strict=True)
    ]


def _paired_rows(plan: Plan, segment: Segment) -> np.ndarray:
    """int64, ascending: the segment's captions that have a picture."""
    has_picture = read_captions(plan.store, segment)["image_row"].is_valid().to_numpy()
    return segment.text.first_row + np.flatnonzero(has_picture)


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
                of_pictures = {name: one for name, one in moments.items() if plan.fields[name].spec.space == "image"}
                outputs = plan.image_pass.pictures(crops)
                _add_moments(plan, plan.image_pass.wanted, outputs, of_pictures, names, None)
    finally:
        stream.close()


def _measure_captions(plan: Plan, moments: dict[str, _Moments]) -> None:
    here = {name: found for name, found in moments.items() if not plan.fields[name].is_of_pairs}
    for batch in CaptionStream(plan.store, _sampled(plan, list(here), "text"), PIECE):
        assert plan.text_pass is not None
        ids, mask = text_inputs(*_ids_of(plan, batch), plan.text_pass.device)
        names = [f"{tar}/{key}" for tar, key in batch.samples]
        _add_moments(plan, plan.text_pass.wanted, plan.text_pass.texts(ids, mask), here, names, mask)


def _measure_pairs(plan: Plan, moments: dict[str, _Moments], threads: int) -> None:
    here = {name: found for name, found in moments.items() if plan.fields[name].is_of_pairs}
    if not here:
        return
    assert plan.pair_pass is not None
    tasks = _sampled_pairs(plan, tuple(here))
    stream = CaptionStream(plan.store, tasks, PIECE, picture_source(plan), threads=threads)
    try:
        for batch in stream:
            if not batch.paired:  # most lie between two pairs where few captions have a picture
                continue
            inputs = pair_inputs(batch, *_ids_of(plan, batch), plan.pair_pass.device)
            if inputs is not None:
                names = [f"{tar}/{key}" for tar, key in (batch.samples[i] for i, _ in batch.paired)]
                outputs = plan.pair_pass.pairs(*inputs)
                _add_moments(plan, plan.pair_pass.wanted, outputs, here, names, inputs[-1])
    finally:
        stream.close()


def _ids_of(plan: Plan, batch: CaptionBatch) -> tuple[np.ndarray, np.ndarray]:
    assert plan.tokenizer is not None
    return text_ids(plan.tokenizer, batch.texts, plan.config.max_tokens)


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
    wanted: Iterable[Wanted],
    outputs: Sequence[torch.Tensor],
    moments: dict[str, _Moments],
    samples: Sequence[str],
    mask: torch.Tensor | None,
) -> None:
    by_want = dict(zip(wanted, outputs, strict=True))
    for name, found in moments.items():
        want = plan.fields[name].wanted
        if want in by_want:
            values = by_want[want]
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
