"""Rows of a cache computed again, from their pictures, captions and sounds, and compared with what it holds."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from emkum.errors import SourceChanged
from emkum.models.audio_pass import AudioPass
from emkum.models.pair_pass import PairPass
from emkum.models.passes import FrozenPass, Wanted
from emkum.models.tokenizer import text_ids
from emkum.shards.layout import Space
from emkum.shards.reader import Cache, Field
from emkum.shards.segments import Segment, read_captions
from emkum.shards.tars import read_member
from emkum.stage1_extract.captions import CaptionBatch, CaptionStream, pair_inputs, text_inputs
from emkum.stage1_extract.pictures import (
    Decoded,
    Picture,
    PictureSource,
    PictureStream,
    from_crops,
    from_tars,
    picture_table,
)
from emkum.stage1_extract.plan import Task
from emkum.stage1_extract.sounds import Clip, Ears, SoundStream, sound_table, waves

MIN_COSINE = 0.999
NUMERIC_TOLERANCE = {"float32": 0.01, "float16": 0.01, "bfloat16": 0.05}
"""What hardware, library versions and batch size may change in a number, as a share of the row's largest |x|.

Ten to a hundred times what they do change, and far below what other pixels or weights do. float32 is no tighter than
float16: GPUs convolve it in TF32, which rounds as coarsely.
"""
HEADER_BYTES = 512


@dataclass(frozen=True, order=True)
class Place:
    """A row of one space in one view."""

    row: int
    view: int = 0


Chosen = Mapping[Place, tuple[str, ...]]  # the fields to compare at each place


@dataclass(frozen=True)
class Work:
    """Fields of one space that are computed together: with `pair_pass`, of captions with their pictures.

    wanted: field -> the output it keeps; None for boxes, crops and ids, which no network computes. size: pixels of the
    crops. paths: where the tars lie that are at hand. kept: crops of the cache, for pictures of other tars.
    """

    space: Space
    wanted: Mapping[str, Wanted | None]
    frozen: FrozenPass | None
    paths: Mapping[str, str]
    size: int = 0
    kept: Field | None = None
    tokenizer: bytes = b""
    max_tokens: int = 0
    audio_pass: AudioPass | None = None
    max_seconds: float = 0.0
    pair_pass: PairPass | None = None

    @property
    def reads_tars(self) -> bool:
        """Captions alone lie in the cache."""
        return self.space != "text" or self.pair_pass is not None

    @property
    def source(self) -> PictureSource:
        """Where the pictures come from."""
        tars = from_tars(self.paths, self.size)
        if self.kept is None:
            return tars
        crops = from_crops(self.kept)

        def look(task: Task, pictures: Sequence[Picture]) -> list[Decoded]:
            return [
                found
                for picture in pictures
                for found in (tars if picture.tar in self.paths else crops).look(task, [picture])
            ]

        return PictureSource(look)


@dataclass(frozen=True)
class Compared:
    """One row of one field as it is in the cache, against what it is when computed now.

    cosine: over all valid numbers of the row; None for boxes, crops and ids, which must be equal. error: the largest
    difference of a number. storage_error: what the receipt states for its block. allowed: how large `error` may be.
    problem: why the row does not agree, "" if it does.
    """

    field: str
    place: Place
    tar: str
    key: str
    cosine: float | None
    error: float
    storage_error: float
    allowed: float
    problem: str

    @property
    def name(self) -> str:
        view = f" view {self.place.view}" if self.place.view else ""
        return f"row {self.place.row}{view} ({self.tar}/{self.key})"


# --- which rows ------------------------------------------------------------------------------------------


def holds(field: Field, place: Place, rows_per_block: int) -> bool:
    """Whether the row is committed in this field, and not quarantined."""
    receipt = field.receipts.get((place.row // rows_per_block, place.view))
    return (
        receipt is not None
        and receipt.first_row <= place.row < receipt.first_row + receipt.rows
        and all(q.row != place.row for q in receipt.quarantined)
    )


def segment_of(cache: Cache, space: Space, row: int) -> Segment:
    return next(s for s in cache.segments if s.span(space).first_row <= row < s.span(space).end)


def rows_at_hand(cache: Cache, work: Work, view: int) -> np.ndarray:
    """int64, ascending: the rows that can be computed. Captions lie in the cache, pictures and sounds in tars.

    Pictures of other tars come from the crops that the cache keeps, if it does.
    """
    found = [np.empty(0, np.int64)]
    for segment in cache.segments:
        span = segment.span(work.space)
        rows = np.arange(span.first_row, span.end, dtype=np.int64)
        if work.pair_pass is not None:
            rows = rows[_has_picture_at_hand(cache, work, segment)]
        elif work.reads_tars and not all(source.tar in work.paths for source in segment.sources):
            table = picture_table if work.space == "image" else sound_table
            tars = table(cache.store, segment)["tar"]
            rows = rows[pc.is_in(tars, pa.array(list(work.paths), pa.string())).to_numpy()]
        found.append(rows)
    if work.kept is not None and work.pair_pass is None:
        kept = [work.kept.rows(split, view) for split in cache.splits]
        return np.union1d(np.concatenate(found), np.concatenate(kept))
    return np.concatenate(found)


def _has_picture_at_hand(cache: Cache, work: Work, segment: Segment) -> np.ndarray:
    """Of each caption of the segment."""
    table = read_captions(cache.store, segment)
    found = np.array(pc.is_in(table["tar"], pa.array(list(work.paths), pa.string())))
    if work.kept is not None:
        kept = np.concatenate([work.kept.rows(split, 0) for split in cache.splits])
        found |= pc.is_in(table["image_row"], pa.array(kept, pa.int64())).to_numpy()
    found &= table["image_row"].is_valid().to_numpy()
    return found


def recompute(cache: Cache, work: Work, chosen: Chosen, batch_size: int, threads: int) -> Iterator[Compared]:
    """Every chosen row, computed as the extraction does and compared field by field."""
    if not chosen:
        return
    if work.space == "image":
        yield from _recompute_pictures(cache, work, chosen, batch_size, threads)
    elif work.space == "audio":
        yield from _recompute_sounds(cache, work, chosen, batch_size, threads)
    else:
        yield from _recompute_captions(cache, work, chosen, batch_size, threads)


def _recompute_pictures(cache: Cache, work: Work, chosen: Chosen, batch_size: int, threads: int) -> Iterator[Compared]:
    places = sorted(chosen)
    tasks = [
        Task(segment_of(cache, "image", p.row), p.row // cache.rows_per_block, p.view, chosen[p], p.row, 1)
        for p in places
    ]
    stream = PictureStream(cache.store, tasks, work.source, batch_size, threads)
    try:
        rows = zip(places, (batch.rows[0] for batch in stream), strict=True)
        while batch := list(islice(rows, batch_size)):
            yield from _compare_pictures(cache, work, chosen, batch)
    finally:
        stream.close()


def _compare_pictures(
    cache: Cache, work: Work, chosen: Chosen, batch: Sequence[tuple[Place, Decoded]]
) -> Iterator[Compared]:
    for _, row in batch:
        if row.picture.tar in work.paths:
            _require_member(work.paths[row.picture.tar], row.picture)
    good = [(place, row) for place, row in batch if row.crop is not None]
    outputs = {}
    wanted = _wanted(work, chosen, [place for place, _ in good])
    if work.frozen is not None and wanted:
        crops = np.stack([row.crop for _, row in good if row.crop is not None])
        outputs = dict(zip(wanted, work.frozen.pictures(torch.from_numpy(crops), wanted), strict=True))
    for place, row in batch:
        sample = row.picture.tar, row.picture.key
        if row.crop is None:
            for name in chosen[place]:
                field = cache.field(name)
                yield _not_comparable(field, place, sample, f"its picture cannot be decoded now: {row.reason}")
    for i, (place, row) in enumerate(good):
        sample = row.picture.tar, row.picture.key
        for name in chosen[place]:
            field, want = cache.field(name), work.wanted[name]
            if want is not None:
                yield _compare(field, cache, place, sample, outputs[want][i].cpu().numpy())
            elif row.box is not None:  # crops of the cache are not compared with themselves, and have no boxes
                assert row.crop is not None
                now = row.crop if field.kind == "crops" else row.box.as_row()
                yield _compare_exactly(field, place, sample, now)


def _recompute_captions(cache: Cache, work: Work, chosen: Chosen, batch_size: int, threads: int) -> Iterator[Compared]:
    places = sorted(chosen)
    tasks = [
        Task(segment_of(cache, "text", p.row), p.row // cache.rows_per_block, 0, chosen[p], p.row, 1) for p in places
    ]
    stream = CaptionStream(cache.store, tasks, 1, work.source if work.pair_pass else None, threads=threads)
    try:
        rows = iter(stream)
        while batch := list(islice(rows, batch_size)):
            compare = _compare_pairs if work.pair_pass else _compare_captions
            yield from compare(cache, work, chosen, _joined(batch))
    finally:
        stream.close()


def _joined(batches: Sequence[CaptionBatch]) -> CaptionBatch:
    captions = tuple(caption for batch in batches for caption in batch.captions)
    return CaptionBatch(batches[0].task, captions, tuple(found for batch in batches for found in batch.seen), True)


def _compare_captions(cache: Cache, work: Work, chosen: Chosen, batch: CaptionBatch) -> Iterator[Compared]:
    ids, length = text_ids(work.tokenizer, batch.texts, work.max_tokens)
    places = [Place(caption.row) for caption in batch.captions]
    outputs = {}
    wanted = _wanted(work, chosen, places)
    if work.frozen is not None and wanted:
        said = work.frozen.texts(*text_inputs(ids, length, work.frozen.device), wanted)
        outputs = dict(zip(wanted, said, strict=True))
    for i, (place, sample) in enumerate(zip(places, batch.samples, strict=True)):
        for name in chosen[place]:
            field, want = cache.field(name), work.wanted[name]
            if want is None:
                yield _compare_exactly(field, place, sample, ids[i, : length[i]])
            else:
                now = outputs[want][i].cpu().numpy()
                yield _compare(field, cache, place, sample, now[: length[i]] if field.kind == "ragged" else now)


def _compare_pairs(cache: Cache, work: Work, chosen: Chosen, batch: CaptionBatch) -> Iterator[Compared]:
    assert work.pair_pass is not None
    for found in batch.seen:
        if found is not None and found.picture.tar in work.paths:
            _require_member(work.paths[found.picture.tar], found.picture)
    ids, length = text_ids(work.tokenizer, batch.texts, work.max_tokens)
    places = [Place(caption.row) for caption in batch.captions]
    for i, reason in batch.unpaired.items():
        for name in chosen[places[i]]:
            yield _not_comparable(cache.field(name), places[i], batch.samples[i], reason)
    inputs = pair_inputs(batch, ids, length, work.pair_pass.device)
    if inputs is None:
        return
    wanted = _wanted(work, chosen, [places[i] for i, _ in batch.paired])
    outputs = dict(zip(wanted, work.pair_pass.pairs(*inputs, wanted), strict=True))
    for at, (i, _) in enumerate(batch.paired):
        for name in chosen[places[i]]:
            field, want = cache.field(name), work.wanted[name]
            assert want is not None
            now = outputs[want][at].cpu().numpy()
            yield _compare(field, cache, places[i], batch.samples[i], now[: length[i]] if field.spec.is_ragged else now)


def _recompute_sounds(cache: Cache, work: Work, chosen: Chosen, batch_size: int, threads: int) -> Iterator[Compared]:
    frozen, places = work.audio_pass, sorted(chosen)
    assert frozen is not None
    tasks = [
        Task(segment_of(cache, "audio", p.row), p.row // cache.rows_per_block, 0, chosen[p], p.row, 1) for p in places
    ]
    ears = Ears(work.paths, frozen.rate, work.max_seconds, frozen.least_samples)
    stream = SoundStream(cache.store, tasks, ears, batch_size, threads)
    try:
        for place, batch in zip(places, stream, strict=True):
            row = batch.rows[0]
            _require_member(work.paths[row.clip.tar], row.clip)
            sample = row.clip.tar, row.clip.key
            if row.sound is None:
                for name in chosen[place]:
                    problem = f"its sound cannot be decoded now: {row.reason}"
                    yield _not_comparable(cache.field(name), place, sample, problem)
                continue
            wanted = _wanted(work, chosen, [place])
            waves_NS, num_samples = waves([row.sound])
            said = dict(zip(wanted, frozen.sounds(torch.from_numpy(waves_NS), num_samples, wanted), strict=True))
            for name in chosen[place]:
                want = work.wanted[name]
                assert want is not None
                yield _compare(cache.field(name), cache, place, sample, said[want][0].cpu().numpy())
    finally:
        stream.close()


def _wanted(work: Work, chosen: Chosen, places: Iterable[Place]) -> list[Wanted]:
    """The outputs that the fields chosen at these places need, each once."""
    found = (work.wanted[name] for place in places for name in chosen[place])
    return list(dict.fromkeys(want for want in found if want is not None))


def _require_member(path: str, picture: Picture | Clip) -> None:
    """The tar must hold the picture's member there: the 512 bytes before its data name its key and size."""
    try:
        header = tarfile.TarInfo.frombuf(
            read_member(path, picture.offset - HEADER_BYTES, HEADER_BYTES), "utf-8", "surrogateescape"
        )
    except tarfile.HeaderError:
        header = tarfile.TarInfo("no member")
    folder, slash, base = header.name.rpartition("/")
    key = folder + slash + base.partition(".")[0]
    while key.startswith("./"):
        key = key[2:]
    # A name of more than 100 bytes, `./` and extension included, stands in a header of its own before this one.
    is_long = len(picture.key) > 80 or not picture.key.isascii()
    if header.size != picture.size or (key != picture.key and not is_long):
        raise SourceChanged(
            f"{path} holds {header.name!r} of {header.size} bytes at byte {picture.offset}; the cache was made from "
            f"{picture.key!r} of {picture.size} bytes there",
            "put the original tar back",
        )


# --- one row ---------------------------------------------------------------------------------------------


def _compare(field: Field, cache: Cache, place: Place, sample: tuple[str, str], now: np.ndarray) -> Compared:
    """The numbers of a row, valid ones only, as the cache decodes them and as they are now."""
    rows = np.array([place.row])
    cached = field.values(rows, place.view)[0]
    if field.kind == "top_logits":
        now = _of_classes(field.classes(rows, place.view)[0], now)
    if field.spec.is_ragged:
        length = int(field.lengths(rows)[0])
        if length != len(now):
            what = "frames" if field.space == "audio" else "tokens"
            return _not_comparable(field, place, sample, f"it has {length} {what} in the cache, {len(now)} now")
        cached = cached[:length]
    receipt = field.receipts[place.row // cache.rows_per_block, place.view]
    storage_error = receipt.error["max_abs"] if receipt.error else 0.0
    a, b = cached.reshape(-1).astype(np.float64), now.reshape(-1).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # what is computed now may be inf or NaN
        norm = float(np.linalg.norm(a) * np.linalg.norm(b))
        cosine = float(a @ b) / norm if norm else float(not a.any() and not b.any())
        error = float(np.abs(a - b).max())
    compute = field.fingerprint.get("compute") or "float32"
    allowed = storage_error + NUMERIC_TOLERANCE.get(compute, 0.05) * float(np.abs(a).max())
    problem = ""
    if not np.isfinite(now).all():
        cosine, problem = 0.0, "it holds inf or NaN when computed now"
    elif cosine < MIN_COSINE:
        problem = f"its cosine with the row computed now is {cosine:.6f}, at least {MIN_COSINE} is required"
    elif error > allowed:
        problem = f"a number differs by {error:g} from the one computed now, at most {allowed:g} is allowed"
    return Compared(field.name, place, *sample, cosine, error, storage_error, allowed, problem)


def _of_classes(cached_K: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Packed top logits as the logits of the classes that the cache has, then the rest: two that are nearly equal may
    change places. One that is no longer among them is at most the smallest of them, and at most the rest.
    """
    k = len(cached_K)
    values, rest, classes = now[:k], now[k], now[k + 1 :].astype(np.int64).tolist()
    place = {number: at for at, number in enumerate(classes)}
    below = min(values[-1], rest)
    return np.array([*(values[place[c]] if c in place else below for c in cached_K.tolist()), rest])


def _compare_exactly(field: Field, place: Place, sample: tuple[str, str], now: np.ndarray) -> Compared:
    """Boxes, crops, and ids up to their length."""
    rows = np.array([place.row])
    cached = field.read(rows, place.view)[0]
    if field.kind == "ids":
        cached = cached[: int(field.lengths(rows)[0])]
    error = float(np.abs(cached.astype(np.float64) - now).max()) if cached.shape == now.shape else np.inf
    problem = ""
    if not np.array_equal(cached, now) and field.kind == "crops":
        wrong = int((cached != now).sum())
        problem = f"{wrong:,} of its {now.size:,} numbers are other ones when decoded now, by up to {error:g}"
    elif not np.array_equal(cached, now):
        problem = f"it is {_list(cached)} in the cache, {_list(now)} now"
    return Compared(field.name, place, *sample, None, error, 0.0, 0.0, problem)


def _not_comparable(field: Field, place: Place, sample: tuple[str, str], problem: str) -> Compared:
    return Compared(field.name, place, *sample, 0.0, np.inf, 0.0, 0.0, problem)


def _list(values: np.ndarray) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:12].tolist())
    return f"[{shown}{', ...' if len(values) > 12 else ''}]"
