"""Committed rows, computed again from their pictures and captions and compared with what the cache holds."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from emkum.errors import IdentityMismatch, SourceChanged
from emkum.models.audio_pass import AudioPass
from emkum.models.passes import FrozenPass, Wanted
from emkum.models.tokenizer import text_ids
from emkum.shards.layout import Space
from emkum.shards.reader import Cache, Field
from emkum.shards.segments import Segment, read_captions
from emkum.shards.tars import read_member
from emkum.stage1_extract.pictures import (
    Decoded,
    Picture,
    PictureSource,
    PictureStream,
    from_crops,
    from_tars,
    picture_table,
)
from emkum.stage1_extract.plan import Committed, Task
from emkum.stage1_extract.sounds import Clip, Ears, SoundStream, sound_table, waves

CHECKED_ROWS = 8  # of each space, before a run adds to a cache
MIN_COSINE = 0.999
NUMERIC_TOLERANCE = {"float32": 0.01, "float16": 0.01, "bfloat16": 0.05}
"""What hardware, library versions and batch size may change in a number, as a share of the row's largest |x|.

Ten to a hundred times what they do change, and far below what other pixels or weights do. float32 is no tighter than
float16: GPUs convolve it in TF32, which rounds as coarsely.
"""
HEADER_BYTES = 512
Say = Callable[[str], None]


@dataclass(frozen=True, order=True)
class Place:
    """A row of one space in one view."""

    row: int
    view: int = 0


Chosen = Mapping[Place, tuple[str, ...]]  # the fields to compare at each place


@dataclass(frozen=True)
class Work:
    """Fields of one space that are computed together.

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


# --- before a run adds to a cache ------------------------------------------------------------------------


def check_committed(held: Committed, say: Say) -> None:
    """Computes CHECKED_ROWS committed rows of each space again, with the networks, tars and settings of this run.

    Does nothing where no row of a tar at hand is committed. Raises IdentityMismatch for rows that do not agree,
    SourceChanged for a tar that holds something else where the picture was.
    """
    names = [name for name, receipts in held.receipts.items() if receipts]
    cache = Cache.open(held.store, only=names)
    compared: list[Compared] = []
    for work in _works(held, names):
        chosen = _spread(cache, work, CHECKED_ROWS)
        compared += recompute(cache, work, chosen, held.config.batch_size, held.config.threads or 2)
    wrong = [found for found in compared if found.problem]
    if wrong:
        raise _mismatch(cache, wrong, compared, held)
    if compared:
        num_rows = len({(found.place, cache.field(found.field).space) for found in compared})
        cosine = min((found.cosine for found in compared if found.cosine is not None), default=1.0)
        say(f"{num_rows} committed rows computed again agree with the cache (lowest cosine {cosine:.6f})")


def _works(held: Committed, names: Sequence[str]) -> list[Work]:
    config, works = held.config, []
    for space, frozen in (("image", held.image_pass), ("text", held.text_pass)):
        wanted = {name: held.fields[name].wanted for name in names if held.fields[name].spec.space == space}
        if wanted and space == "image":
            works.append(Work("image", wanted, frozen, held.paths, size=config.side, kept=held.crops))
        elif wanted:
            assert held.tokenizer is not None
            works.append(Work("text", wanted, frozen, {}, tokenizer=held.tokenizer, max_tokens=config.max_tokens))
    heard = {name: held.fields[name].wanted for name in names if held.fields[name].spec.space == "audio"}
    if heard:
        sounds = held.audio_pass
        works.append(Work("audio", heard, None, held.paths, audio_pass=sounds, max_seconds=config.max_seconds))
    return works


def _spread(cache: Cache, work: Work, count: int) -> Chosen:
    """`count` rows from blocks spread over those committed, every field's among them; other rows as the cache grows."""
    fields = [cache.field(name) for name in work.wanted]
    random = np.random.default_rng(sum(len(field.receipts) for field in fields))
    every = sorted({block for field in fields for block in field.receipts})
    first = [every[i] for i in np.linspace(0, len(every) - 1, count).astype(int)]
    unseen = [sorted(field.receipts) for field in fields if not set(first) & set(field.receipts)]
    order = list(dict.fromkeys([*(blocks[len(blocks) // 2] for blocks in unseen), *first, *every]))
    at_hand = {view: rows_at_hand(cache, work, view) for view in {view for _, view in every}}
    rows: dict[tuple[int, int], np.ndarray] = {}
    chosen: dict[Place, tuple[str, ...]] = {}
    while len(chosen) < count and order:
        for block in list(order):
            if block not in rows:
                rows[block] = _usable(fields, at_hand[block[1]], *block)
            if not len(rows[block]):
                order.remove(block)
                continue
            at = int(random.integers(len(rows[block])))
            place = Place(int(rows[block][at]), block[1])
            rows[block] = np.delete(rows[block], at)
            chosen[place] = tuple(field.name for field in fields if holds(field, place, cache.rows_per_block))
            if len(chosen) == count:
                break
    return chosen


def _usable(fields: Sequence[Field], at_hand: np.ndarray, block: int, view: int) -> np.ndarray:
    """The rows of a block that some field holds, and whose picture or caption is at hand."""
    receipts = [field.receipts[block, view] for field in fields if (block, view) in field.receipts]
    first, end = np.searchsorted(at_hand, [receipts[0].first_row, receipts[0].first_row + receipts[0].rows])
    bad = [{q.row for q in receipt.quarantined} for receipt in receipts]
    return np.setdiff1d(at_hand[first:end], list(set.intersection(*bad)))


def _mismatch(
    cache: Cache, wrong: Sequence[Compared], compared: Sequence[Compared], held: Committed
) -> IdentityMismatch:
    worst = min(wrong, key=lambda found: -1.0 if found.cosine is None else found.cosine)
    field = cache.field(worst.field)
    then, now = field.record["environment"], held.fields[worst.field].environment
    made = f"; made with {_words(then)}, computed again with {_words(now)}" if then and now else ""
    return IdentityMismatch(
        f"{cache.store.url} field {worst.field}, {worst.name}: {worst.problem} ({len(wrong)} of {len(compared)} "
        f"comparisons disagree){made}",
        "nothing was changed; go on with the versions and the device that the cache was made with, or write to another "
        f"folder with --cache; `emkum cache verify {cache.store.url} --sample 100 --teacher ...` shows how far it goes",
    )


def _words(environment: Mapping[str, Any]) -> str:
    known = ("emkum", "torch", "pillow", "device", "revision")
    return ", ".join(f"{key} {environment[key]}" for key in known if environment.get(key))


# --- what both checks share ------------------------------------------------------------------------------


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
        if work.space != "text" and not all(source.tar in work.paths for source in segment.sources):
            table = picture_table if work.space == "image" else sound_table
            tars = table(cache.store, segment)["tar"]
            rows = rows[pc.is_in(tars, pa.array(list(work.paths), pa.string())).to_numpy()]
        found.append(rows)
    if work.kept is not None:
        kept = [work.kept.rows(split, view) for split in cache.splits]
        return np.union1d(np.concatenate(found), np.concatenate(kept))
    return np.concatenate(found)


def recompute(cache: Cache, work: Work, chosen: Chosen, batch_size: int, threads: int) -> Iterator[Compared]:
    """Every chosen row, computed as the extraction does and compared field by field."""
    if not chosen:
        return
    if work.space == "image":
        yield from _recompute_pictures(cache, work, chosen, batch_size, threads)
    elif work.space == "audio":
        yield from _recompute_sounds(cache, work, chosen, batch_size, threads)
    else:
        yield from _recompute_captions(cache, work, chosen, batch_size)


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


def _recompute_captions(cache: Cache, work: Work, chosen: Chosen, batch_size: int) -> Iterator[Compared]:
    lines = _caption_lines(cache, sorted(chosen))
    while batch := list(islice(lines, batch_size)):
        ids, length = text_ids(work.tokenizer, [caption for *_, caption in batch], work.max_tokens)
        longest = int(length.max())
        mask = torch.from_numpy(np.arange(longest) < length[:, None])
        outputs = {}
        wanted = _wanted(work, chosen, [place for place, *_ in batch])
        if work.frozen is not None and wanted:
            tokens = work.frozen.texts(torch.from_numpy(ids[:, :longest]), mask, wanted)
            outputs = dict(zip(wanted, tokens, strict=True))
        for i, (place, sample, _) in enumerate(batch):
            for name in chosen[place]:
                field, want = cache.field(name), work.wanted[name]
                if want is None:
                    yield _compare_exactly(field, place, sample, ids[i, : length[i]])
                else:
                    now = outputs[want][i].cpu().numpy()
                    yield _compare(field, cache, place, sample, now[: length[i]] if field.kind == "ragged" else now)


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


def _caption_lines(cache: Cache, places: Iterable[Place]) -> Iterator[tuple[Place, tuple[str, str], str]]:
    """Place, (tar, key) and caption of each row; places ascend."""
    segment: Segment | None = None
    table: pa.Table = None
    for place in places:
        if segment is None or place.row >= segment.text.end:
            segment = segment_of(cache, "text", place.row)
            table = read_captions(cache.store, segment)
        line = table.slice(place.row - segment.text.first_row, 1).to_pylist()[0]
        yield place, (line["tar"], line["key"]), line["caption"]


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
