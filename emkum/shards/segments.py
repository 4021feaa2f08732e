"""What was extracted from what: the immutable segments of a cache (docs/format.md, section 3)."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from emkum.errors import AnotherWriter, CorruptCache, IdentityMismatch, SourceChanged, UsageError
from emkum.shards.layout import MAX_ROWS, RECORDS, SPACES, Space, canonical_json, pretty_json, segment_dir
from emkum.shards.store import Store, exists, read_small
from emkum.shards.strict_json import loads
from emkum.shards.strict_parquet import MAX_ROWS_PER_BYTE, batches, open_table
from emkum.shards.tars import SourceTar
from emkum.shards.views import ViewPolicy

SAMPLES = pa.schema(
    [
        ("key", pa.string()),
        ("tar", pa.string()),
        ("image_row", pa.int64()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("ext", pa.string()),
        ("label", pa.string()),
        ("label_name", pa.string()),
    ]
)
SEGMENT_JSON = "segment.json"
CAPTIONS = pa.schema(
    [
        ("text_row", pa.int64()),
        ("image_row", pa.int64()),
        ("tar", pa.string()),
        ("key", pa.string()),
        ("caption", pa.string()),
        ("source", pa.string()),
    ]
)
SOUNDS = pa.schema(
    [
        ("audio_row", pa.int64()),
        ("image_row", pa.int64()),
        ("tar", pa.string()),
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("ext", pa.string()),
    ]
)


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one space: a segment's share. `first_row` lies on the grid of blocks."""

    first_row: int
    rows: int

    @property
    def end(self) -> int:
        return self.first_row + self.rows

    def blocks(self, rows_per_block: int) -> range:
        first = self.first_row // rows_per_block
        return range(first, first + -(-self.rows // rows_per_block))

    def block_rows(self, block: int, rows_per_block: int) -> tuple[int, int]:
        """(first row, number of rows that are not padding) of one of the segment's blocks."""
        first = block * rows_per_block
        return first, min(rows_per_block, self.end - first)


@dataclass(frozen=True)
class Source:
    """One source tar as it was when its segment was made. `path` is a hint that may be stale.

    truncated: the byte at which a tar ended of which only the complete samples were kept; None for a whole one.
    """

    tar: str
    bytes: int
    sha256: str
    samples: int
    path: str
    truncated: int | None = None


@dataclass(frozen=True)
class Segment:
    number: int
    split: str
    image: Span
    text: Span
    views: ViewPolicy
    sources: tuple[Source, ...]
    parquet: dict[str, str]
    digest: str
    audio: Span = Span(0, 0)

    def span(self, space: Space) -> Span:
        return {"image": self.image, "text": self.text, "audio": self.audio}[space]

    @property
    def num_samples(self) -> int:
        return sum(source.samples for source in self.sources)

    @property
    def tables(self) -> dict[str, int]:
        """Its Parquet files, and how many lines each has."""
        found = {"samples.parquet": self.num_samples, "captions.parquet": self.text.rows}
        return found | {"sounds.parquet": self.audio.rows} if self.audio.rows else found


def segment_digest(record: dict[str, Any]) -> str:
    """The digest that a segment.json states, of its contents (docs/format.md, section 3)."""
    content: dict[str, Any] = {key: record[key] for key in ("split", "image", "text", "views", "parquet")}
    content |= {"audio": record["audio"]} if "audio" in record else {}
    content["sources"] = [
        [s["tar"], s["bytes"], s["sha256"], s["samples"], *([s["truncated"]] if "truncated" in s else [])]
        for s in record["sources"]
    ]
    return hashlib.sha256(canonical_json(content)).hexdigest()


def read_segments(store: Store) -> list[Segment]:
    """All committed segments in order. Raises CorruptCache for a gap, a torn or an altered record."""
    folder = f"{RECORDS}/segments"
    numbers = sorted(int(name) for name in store.list(folder) if re.fullmatch(r"[0-9]{1,9}", name))
    if numbers != list(range(len(numbers))):
        raise CorruptCache(
            f"{store.where(folder)} holds segments {numbers}; they must be 0, 1, 2, ... without gaps",
            "restore the missing ones from a copy of the cache",
        )
    if store.local is None and numbers and SEGMENT_JSON not in store.list(segment_dir(numbers[-1])):
        numbers.pop()  # an object store shows a folder before its last file
    return [read_segment(store, number) for number in numbers]


def require_segment(store: Store, number: int, field: str) -> None:
    """Raises CorruptCache if a segment that has receipts is not there."""
    if not exists(store, f"{segment_dir(number)}/{SEGMENT_JSON}"):
        raise CorruptCache(
            f"{store.where(segment_dir(number))} is missing, and blocks of {field} belong to it",
            "finish copying the cache, or restore the segment from a copy; without it nobody knows what its rows are",
        )


def read_samples(store: Store, segment: Segment) -> pa.Table:
    return _read_table(store, segment, "samples.parquet", SAMPLES)


def read_captions(store: Store, segment: Segment) -> pa.Table:
    return _read_table(store, segment, "captions.parquet", CAPTIONS)


def read_sounds(store: Store, segment: Segment) -> pa.Table:
    return _read_table(store, segment, "sounds.parquet", SOUNDS) if segment.audio.rows else SOUNDS.empty_table()


def new_sources(segments: Sequence[Segment], split: str, tars: Sequence[SourceTar]) -> list[SourceTar]:
    """The tars that no segment holds yet.

    Raises SourceChanged if a tar of a known name has other contents now, IdentityMismatch if the same tar
    belongs to another split.
    """
    known = {source.tar: (segment, source) for segment in segments for source in segment.sources}
    fresh = []
    for tar in tars:
        if tar.name not in known:
            fresh.append(tar)
            continue
        segment, source = known[tar.name]
        if source.sha256 != tar.sha256:
            was = (
                ""
                if source.truncated is None
                else f" (as far as it was whole: it was cut off at byte {source.truncated})"
            )
            raise SourceChanged(
                f"{tar.path} is not the {tar.name} that segment {segment.number} was extracted from{was}: "
                f"{source.bytes} bytes, sha256 {source.sha256[:12]}... then; "
                f"{tar.bytes} bytes, sha256 {tar.sha256[:12]}... now",
                "restore the old file, give the new one another name, or write to another folder with --cache"
                if source.truncated is None
                else "write to another folder with --cache: under another name its first samples would come twice",
            )
        require_split(segments, split, tar.name)
    return fresh


def require_split(segments: Sequence[Segment], split: str, tar: str) -> None:
    """Raises IdentityMismatch if the cache holds the tar of this name as another split."""
    for segment in segments:
        if segment.split != split and any(source.tar == tar for source in segment.sources):
            raise IdentityMismatch(
                f"{tar} is in the cache as split {segment.split!r}; this run asks for split {split!r}",
                f"use --split {segment.split}, or write to another folder with --cache",
            )


def require_same_views(segments: Sequence[Segment], split: str, views: ViewPolicy) -> None:
    """All segments of a split share one view policy. Raises IdentityMismatch showing both."""
    for segment in segments:
        if segment.split == split and segment.image.rows and segment.views.name != views.name:
            raise IdentityMismatch(
                f"split {split!r} was extracted with views {segment.views.name}; this run asks for {views.name}",
                "repeat the cache's --crop, --flip, --jitter and --seed, or write to another folder with --cache",
            )


def append_segment(
    store: Store,
    segments: Sequence[Segment],
    split: str,
    views: ViewPolicy,
    tars: Sequence[SourceTar],
    rows_per_block: int,
) -> Segment:
    """Commits the samples of `tars` as the next segment, whole. Raises AnotherWriter if it was added meanwhile."""
    require_same_views(segments, split, views)
    check_split_name(split)
    number = len(segments)
    samples, captions, image, text = _tables(segments, tars, rows_per_block)
    sounds, audio = _sounds(segments, tars, rows_per_block, image)
    files = {"samples.parquet": _parquet_bytes(samples), "captions.parquet": _parquet_bytes(captions)}
    if audio.rows:
        files["sounds.parquet"] = _parquet_bytes(sounds)
    parquet = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    sources = tuple(
        Source(t.name, t.bytes, t.sha256, len(t.samples), _plain_text(os.path.abspath(t.path)), t.truncated_at)
        for t in tars
    )
    segment = Segment(number, split, image, text, views, sources, parquet, digest="", audio=audio)
    segment = replace(segment, digest=segment_digest(_to_json(segment)))
    record = _to_json(segment)
    files[SEGMENT_JSON] = pretty_json(record | {"record_digest": hashlib.sha256(canonical_json(record)).hexdigest()})
    if not store.create_folder(segment_dir(number), files):
        raise AnotherWriter(
            f"another process added segment {number} to {store.url} meanwhile", "run the same command again"
        )
    return segment


def _plain_text(path: str) -> str:
    """A path that is no UTF-8 as text that is: the hint is then of no use, and harms nobody."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def check_split_name(split: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", split):
        raise UsageError(f"split {split!r} is not a name: letters, digits, '_', '-' and '.' only", "use --split train")


def _tables(
    segments: Sequence[Segment], tars: Sequence[SourceTar], rows_per_block: int
) -> tuple[pa.Table, pa.Table, Span, Span]:
    first_image, first_text = (_next_row(segments, space, rows_per_block) for space in ("image", "text"))
    samples: dict[str, list[Any]] = {name: [] for name in SAMPLES.names}
    captions: dict[str, list[Any]] = {name: [] for name in CAPTIONS.names}
    image_row, text_row = first_image, first_text
    for tar in tars:
        for sample in tar.samples:
            picture = sample.picture
            row = image_row if picture else None
            image_row += picture is not None
            line = (
                sample.key,
                tar.name,
                row,
                picture.offset if picture else None,
                picture.size if picture else None,
                picture.ext if picture else None,
                sample.label,
                sample.label_name,
            )
            for name, value in zip(SAMPLES.names, line, strict=True):
                samples[name].append(value)
            for caption in sample.captions:
                text = (text_row, row, tar.name, sample.key, caption, sample.caption_source)
                for name, value in zip(CAPTIONS.names, text, strict=True):
                    captions[name].append(value)
                text_row += 1
    return (
        pa.table(samples, schema=SAMPLES),
        pa.table(captions, schema=CAPTIONS),
        Span(first_image, image_row - first_image),
        Span(first_text, text_row - first_text),
    )


def _sounds(
    segments: Sequence[Segment], tars: Sequence[SourceTar], rows_per_block: int, image: Span
) -> tuple[pa.Table, Span]:
    first = _next_row(segments, "audio", rows_per_block)
    sounds: dict[str, list[Any]] = {name: [] for name in SOUNDS.names}
    image_row, audio_row = image.first_row, first
    for tar in tars:
        for sample in tar.samples:
            sound, picture = sample.sound, sample.picture
            if sound is not None:
                line = (audio_row, image_row if picture else None, tar.name, sample.key)
                for name, value in zip(SOUNDS.names, (*line, sound.offset, sound.size, sound.ext), strict=True):
                    sounds[name].append(value)
                audio_row += 1
            image_row += picture is not None
    return pa.table(sounds, schema=SOUNDS), Span(first, audio_row - first)


def _next_row(segments: Sequence[Segment], space: Space, rows_per_block: int) -> int:
    if not segments:
        return 0
    last = segments[-1].span(space)
    return last.first_row + -(-last.rows // rows_per_block) * rows_per_block


def _parquet_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def _span_json(span: Span) -> dict[str, int]:
    return {"first_row": span.first_row, "rows": span.rows}


def _to_json(segment: Segment) -> dict[str, Any]:
    return {
        "segment": segment.number,
        "split": segment.split,
        "image": _span_json(segment.image),
        "text": _span_json(segment.text),
        **({"audio": _span_json(segment.audio)} if segment.audio != Span(0, 0) else {}),
        "views": segment.views.to_json(),
        "sources": [
            {"tar": s.tar, "bytes": s.bytes, "sha256": s.sha256, "samples": s.samples, "path": s.path}
            | ({} if s.truncated is None else {"truncated": s.truncated})
            for s in segment.sources
        ],
        "parquet": segment.parquet,
        "digest": segment.digest,
    }


def read_segment(store: Store, number: int) -> Segment:
    """One segment's record. Raises CorruptCache for one that does not hold together."""
    path = f"{segment_dir(number)}/{SEGMENT_JSON}"
    try:
        record = loads(read_small(store, path))
        content = {key: value for key, value in record.items() if key != "record_digest"}
        actual = hashlib.sha256(canonical_json(content)).hexdigest()
        if record.get("record_digest", actual) != actual:  # caches of emkum 0.1 have none
            raise ValueError(f"it was altered: its digest is {actual[:12]}..., it states {record['record_digest']}")
        segment = Segment(
            record["segment"],
            record["split"],
            Span(record["image"]["first_row"], record["image"]["rows"]),
            Span(record["text"]["first_row"], record["text"]["rows"]),
            ViewPolicy.from_json(record["views"]),
            tuple(
                Source(s["tar"], s["bytes"], s["sha256"], s["samples"], s["path"], s.get("truncated"))
                for s in record["sources"]
            ),
            record["parquet"],
            record["digest"],
            Span(record["audio"]["first_row"], record["audio"]["rows"]) if "audio" in record else Span(0, 0),
        )
        expected = segment_digest(record)
        if expected != segment.digest or segment.number != number:
            raise ValueError(f"its contents have digest {expected[:12]}..., it states {str(segment.digest)[:12]}...")
        for span in map(segment.span, SPACES):
            if any(type(n) is not int or not 0 <= n <= MAX_ROWS for n in (span.first_row, span.rows)):
                raise ValueError(f"it states rows {span.first_row} and {span.rows}")
        lines = segment.tables
        if set(segment.parquet) != set(lines):
            raise ValueError(f"it lists {sorted(segment.parquet)}")
        if any(type(s.samples) is not int or s.samples < 0 for s in segment.sources) or (
            segment.image.rows > lines["samples.parquet"]
        ):
            raise ValueError(f"it states {segment.image.rows} pictures and {lines['samples.parquet']} samples")
        if segment.audio.rows > lines["samples.parquet"]:
            raise ValueError(f"it states {segment.audio.rows} sounds and {lines['samples.parquet']} samples")
        found = store.list(segment_dir(number))
        for name, count in lines.items():  # whoever counts blocks must not count to 2^40 for a few bytes
            if count > MAX_ROWS_PER_BYTE * max(found.get(name) or 0, 100_000):
                raise ValueError(f"it states {count} lines of {name}, which has {found.get(name)} bytes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        raise CorruptCache(
            f"{store.where(path)} cannot be trusted: {error}", "restore it from a copy of the cache"
        ) from error
    return segment


def _read_table(store: Store, segment: Segment, name: str, schema: pa.Schema) -> pa.Table:
    path = f"{segment_dir(segment.number)}/{name}"
    rows = segment.tables[name]
    try:
        data = store.read(path)
        if hashlib.sha256(data).hexdigest() != segment.parquet[name]:
            raise ValueError(f"it has {len(data)} bytes whose sha256 is not the one segment.json states")
        return pa.Table.from_batches(batches(open_table(data, schema, rows)), schema)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise CorruptCache(
            f"{store.where(path)} cannot be trusted: {error}", "restore it from a copy of the cache"
        ) from error
