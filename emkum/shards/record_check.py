"""What the records of a cache may say: rules of docs/format.md that no digest checks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from emkum.errors import CorruptCache
from emkum.shards.block_check import stated_objects
from emkum.shards.layout import FORMAT, MAX_ROWS_PER_BLOCK, SPACES, FieldSpec, object_path
from emkum.shards.ledger import Receipt
from emkum.shards.reader import Cache
from emkum.shards.segments import CAPTIONS, SAMPLES, SOUNDS, Segment
from emkum.shards.strict_parquet import batches, open_table
from emkum.shards.writer import NETWORK_FILES

_HEX = re.compile(r"[0-9a-f]{64}")


def check_root(content: Mapping[str, Any]) -> None:
    """Raises ValueError for another root than this format's."""
    rows = content["rows_per_block"]
    if set(content) != {"format", "uuid", "rows_per_block"}:
        raise ValueError(f"it holds {sorted(content)}")
    if content["format"] != FORMAT or not re.fullmatch(r"[0-9a-f]{32}", str(content["uuid"])):
        raise ValueError(f"it states format {content['format']!r} and uuid {content['uuid']!r}"[:200])
    if type(rows) is not int or not 0 < rows <= MAX_ROWS_PER_BLOCK or rows % 16:
        raise ValueError(f"it states blocks of {rows!r} rows"[:200])


def wrong_segment(segment: Segment, rows_per_block: int) -> str | None:
    """What of a segment.json cannot be."""
    if not isinstance(segment.split, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", segment.split):
        return f"its split is {segment.split!r}"[:200]
    if any(segment.span(space).first_row % rows_per_block for space in SPACES):
        return "its rows do not begin with a block"
    for source in segment.sources:
        numbers = (source.bytes, source.samples, *(() if source.truncated is None else (source.truncated,)))
        if any(type(number) is not int or number < 0 for number in numbers):
            return f"its source {source.tar!r} has numbers that cannot be"[:200]
        if (
            not isinstance(source.tar, str)
            or not isinstance(source.path, str)
            or not _HEX.fullmatch(str(source.sha256))
        ):
            return f"its source {source.tar!r} has no name, path or sha256"[:200]
    names = [source.tar for source in segment.sources]
    if len(set(names)) != len(names):
        return "it names a tar twice"
    if segment.image.rows > sum(source.samples for source in segment.sources):
        return f"it has {segment.image.rows} pictures in fewer samples"
    if segment.audio.rows > segment.num_samples:
        return f"it has {segment.audio.rows} sounds in fewer samples"
    return None


def wrong_record(record: Mapping[str, Any], spec: FieldSpec) -> str | None:
    """What of a field's record cannot be."""
    arrays = {a.name: {"dtype": a.dtype, "row_shape": list(a.row_shape)} for a in spec.arrays if a.per_row}
    if record.get("arrays") != arrays or record.get("space") != spec.space:
        return f"a field of kind {spec.kind} in {spec.storage} has other arrays, or is of another space"
    fixed = {"crops": ("uint8", 3), "boxes": ("float32", 10)}.get(spec.kind)
    if fixed is not None and (spec.storage, spec.row_shape[-1]) != fixed:
        return f"a field of kind {spec.kind} holds {fixed[1]} {fixed[0]} numbers"
    if (spec.kind == "ids") != (spec.storage == "int32") or (spec.kind == "crops") != (spec.storage == "uint8"):
        return f"a field of kind {spec.kind} does not hold {spec.storage}"
    if not isinstance(record.get("fingerprint"), dict) or not isinstance(record.get("environment"), dict):
        return "its fingerprint or environment is none"
    statistics = record.get("statistics")
    names = {"mean", "std"} if spec.storage == "int8" else set()
    if not isinstance(statistics, dict) or set(statistics) != names:
        return f"its statistics are {sorted(statistics) if isinstance(statistics, dict) else statistics!r}"[:200]
    for name, stated in statistics.items():
        array = spec.array(name)
        expected = {"path": object_path(spec, array, 0, 0), "bytes": array.row_bytes + 4}
        if not isinstance(stated, dict) or {k: stated.get(k) for k in expected} != expected:
            return f"its {name} is not at {expected['path']} with {expected['bytes']} bytes"
        if not _HEX.fullmatch(str(stated.get("sha256"))):
            return f"its {name} has no sha256"
    return None


def wrong_receipt(spec: FieldSpec, fingerprint_digest: str, receipt: Receipt, rows_per_block: int) -> str | None:
    """What of a receipt cannot be, whatever the segments are; then `check_block` may be asked."""
    if receipt.fingerprint_digest != fingerprint_digest:
        return f"it belongs to fingerprint {str(receipt.fingerprint_digest)[:12]}..."
    if receipt.view and not spec.has_views:
        return f"it is of view {receipt.view}"
    try:
        stated_objects(spec, receipt)
    except (ValueError, TypeError) as error:
        return str(error)
    if any(not _HEX.fullmatch(str(stated.sha256)) for stated in receipt.objects):
        return "it states something else than a sha256"
    if not _are_numbers(receipt.statistics, {"min", "max", "mean"}):
        return "its statistics are none"
    if not _are_numbers(receipt.error, {"relative_l2", "max_abs"}):
        return "its error is none"
    rows = [q.row for q in receipt.quarantined]
    if receipt.first_row != receipt.block * rows_per_block or not 0 < receipt.rows <= rows_per_block:
        return f"it states {receipt.rows} rows from {receipt.first_row} on"
    if any(a >= b for a, b in pairwise([receipt.first_row - 1, *rows, receipt.first_row + receipt.rows])):
        return f"its quarantined rows {str(rows)[:100]} are not in order, or not of the block"
    if any(not isinstance(text, str) for q in receipt.quarantined for text in (q.tar, q.key, q.reason)):
        return "its quarantined samples have no names"
    return None


def wrong_place(spec: FieldSpec, receipt: Receipt, segment: Segment, rows_per_block: int) -> str | None:
    """What of a receipt does not fit the segment it names."""
    span = segment.span(spec.space)
    if receipt.block not in span.blocks(rows_per_block):
        return f"segment {segment.number} has no {spec.space} block {receipt.block}"
    if (receipt.first_row, receipt.rows) != span.block_rows(receipt.block, rows_per_block):
        return f"it states {receipt.rows} rows from {receipt.first_row} on, segment {segment.number} has others"
    if spec.kind == "boxes" and spec.name != f"views/{segment.views.name}/boxes":
        return f"segment {segment.number} has views {segment.views.name}"
    return None


def _are_numbers(found: Any, names: set[str]) -> bool:
    if found is None:
        return True
    return (
        isinstance(found, dict)
        and set(found) == names
        and all(type(number) in (int, float) and math.isfinite(number) for number in found.values())
    )


def wrong_files(stated: Any) -> str | None:
    """What of a network's files.json cannot be."""
    if not isinstance(stated, dict):
        return f"it lists {stated!r}"[:200]
    for name, entry in stated.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name == NETWORK_FILES:
            return f"it lists {name!r}"[:200]
        if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
            return f"it states {entry!r} of {name}"[:200]
    return None if "model.json" in stated else "it lists no model.json"


def require_sound(cache: Cache) -> None:
    """Raises CorruptCache for the first record whose numbers and names are not what they must be."""
    for name, field in cache.fields.items():
        wrong = wrong_record(field.record, field.spec)
        if wrong:
            raise _unsound(cache, f"the record of {name} cannot be trusted: {wrong}")
        for (block, view), receipt in field.receipts.items():
            wrong = wrong_receipt(field.spec, field.record["fingerprint_digest"], receipt, cache.rows_per_block)
            if wrong:
                raise _unsound(cache, f"the receipt of {name} block {block}-{view} cannot be trusted: {wrong}")


def _unsound(cache: Cache, what: str) -> CorruptCache:
    return CorruptCache(f"{cache.path}: {what}", f"see all that is damaged: emkum cache verify {cache.path}")


def check_samples(segment: Segment, data: bytes) -> None:
    """Raises ValueError unless the lines are the sources' samples, their pictures numbered without gaps."""
    tars = iter(segment.sources)
    source, left = None, 0
    keys: set[str] = set()
    row = segment.image.first_row
    for batch in batches(open_table(data, SAMPLES, sum(s.samples for s in segment.sources))):
        numbers = batch["image_row"].drop_null().to_numpy()
        if (numbers != np.arange(row, row + len(numbers))).any():
            raise ValueError(f"its pictures from row {row} on are not numbered one after the other")
        row += len(numbers)
        columns = ("tar", "key", "image_row", "offset", "size", "ext")
        for tar, key, number, offset, size, ext in zip(*(batch[c].to_pylist() for c in columns), strict=True):
            while not left:
                source = next(tars)
                left, keys = source.samples, set()
            assert source is not None
            left -= 1
            if tar != source.tar or key is None or key in keys:
                raise ValueError(f"its sample {tar!a}/{key!a} is not the next of {source.tar}, or comes twice"[:300])
            keys.add(key)
            if len({value is None for value in (number, offset, size, ext)}) > 1:
                raise ValueError(f"its sample {tar}/{key} has half a picture"[:300])
            if number is not None and (offset < 0 or size < 0):
                raise ValueError(f"the picture of {tar}/{key} lies at byte {offset} of its tar"[:300])
    if row != segment.image.end:
        raise ValueError(f"it has {row - segment.image.first_row} pictures, segment.json states {segment.image.rows}")


def check_captions(segment: Segment, data: bytes, samples: bytes | None) -> None:
    """Raises ValueError unless the captions are numbered without gaps and follow their samples, if those are known."""
    known = None if samples is None else _sample_rows(segment, samples)
    sample: tuple[str, str, int | None] = ("", "", None)
    row = segment.text.first_row
    for batch in batches(open_table(data, CAPTIONS, segment.text.rows)):
        columns = ("text_row", "image_row", "tar", "key", "caption")
        for text_row, image_row, tar, key, caption in zip(*(batch[c].to_pylist() for c in columns), strict=True):
            if text_row != row or caption is None:
                raise ValueError(f"its line of row {row} is numbered {text_row!a}, or has no caption")
            row += 1
            while known is not None and sample[:2] != (tar, key):
                found = next(known, None)
                if found is None:
                    raise ValueError(f"row {text_row} is a caption of {tar!a}/{key!a}, which is not there"[:300])
                sample = found
            if known is not None and image_row != sample[2]:
                raise ValueError(f"row {text_row} belongs to picture {image_row}; {tar}/{key} is {sample[2]}"[:300])


def check_sounds(segment: Segment, data: bytes, samples: bytes | None) -> None:
    """Raises ValueError unless the sounds are numbered without gaps and follow their samples, if those are known."""
    known = None if samples is None else _sample_rows(segment, samples)
    row = segment.audio.first_row
    for batch in batches(open_table(data, SOUNDS, segment.audio.rows)):
        columns = ("audio_row", "image_row", "tar", "key", "offset", "size", "ext")
        for audio_row, image_row, tar, key, offset, size, ext in zip(
            *(batch[c].to_pylist() for c in columns), strict=True
        ):
            if audio_row != row or ext is None:
                raise ValueError(f"its line of row {row} is numbered {audio_row!a}, or has no extension")
            row += 1
            if offset is None or size is None or offset < 0 or size < 0:
                raise ValueError(f"the sound of {tar}/{key} lies at byte {offset} of its tar"[:300])
            sample = None if known is None else next((s for s in known if s[:2] == (tar, key)), ("", "", None))
            if sample is not None and sample[:2] != (tar, key):
                raise ValueError(f"row {audio_row} is a sound of {tar!a}/{key!a}, which is not there"[:300])
            if sample is not None and image_row != sample[2]:
                raise ValueError(f"row {audio_row} belongs to picture {image_row}; {tar}/{key} is {sample[2]}"[:300])


def _sample_rows(segment: Segment, data: bytes) -> Iterator[tuple[str, str, int | None]]:
    for batch in batches(open_table(data, SAMPLES, sum(s.samples for s in segment.sources))):
        yield from zip(*(batch[c].to_pylist() for c in ("tar", "key", "image_row")), strict=True)
