"""Write the golden cache: a small, complete cache of format 1, made from docs/format.md without any code of emkum.

    python tests/golden/make_golden.py OUT
    python tests/golden/make_golden.py OUT --digests

With --digests it is written as emkum does since 0.2: every JSON file carries a digest and has just one rendering, the
networks list their files, and the second source is one of which only the complete samples were kept.

Every number is a pure function of (field, row, view, index), stated below, so that a test can ask for what it should
read: `expected_row` (stored numbers), `expected_values` (decoded), `expected_array` (a whole array as a plain Zarr
library reads it), `valid_rows`, `committed`, `missing`, `samples`, `captions`. All is exact in its stored type.

What is in it: S = 16. Segment 0, `train`: 20 image rows (blocks 0 and 1, padding in the second) with two views and 37
captions (text blocks 0 to 2); segment 1, `val`: 5 image rows (block 2), one view, 9 captions (text block 3), among them
one sample without a picture and one without captions. Image row 7 is quarantined in every image field of train. Block 1
of `teacher/tiny/image/cls` is not extracted yet; two unfinished files lie in its place. Row 3 of each space is all zero
in every float field (stored zero with scale 1 where the field is int8). Keys repeat across tars, one is not ASCII.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy

UUID = "0123456789abcdef0123456789abcdef"
S = 16  # rows per block
D = 8  # channels
L = 32  # text positions
TILE = 16  # text positions of an inner chunk
QUARANTINED_ROW = 7
QUARANTINE_REASON = "truncated JPEG"
ZERO_ROW = 3
CLS_ID, SEP_ID, FIRST_WORD_ID, NUM_WORDS = 1, 2, 4, 92

CROP_POLICY, CENTER_POLICY = "crop-0.9-1.0-seed-0", "center-1.0"
MODEL = "tiny"


# --- what the cache holds -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """The samples of one extraction; `tars` are (name, number of samples), in the order of the rows."""

    number: int
    split: str
    image_first_row: int
    image_rows: int
    text_first_row: int
    text_rows: int
    num_views: int
    policy: str
    tars: tuple[tuple[str, int], ...]

    def span(self, space: str) -> tuple[int, int]:
        """First row and number of rows in a row space."""
        if space == "image":
            return self.image_first_row, self.image_rows
        return self.text_first_row, self.text_rows


@dataclass(frozen=True)
class Field:
    """One field; `salt` enters its numbers, `num_blocks` is the extent of its first axis, `splits` have its rows."""

    name: str
    kind: str
    storage: str
    row_shape: tuple[int, ...]
    salt: int
    num_blocks: int
    num_views: int = 1
    splits: tuple[str, ...] = ("train", "val")

    @property
    def space(self) -> str:
        return "text" if self.kind in ("text_pooled", "ragged", "ids") else "image"


SEGMENTS = (
    Segment(0, "train", 0, 20, 0, 37, 2, CROP_POLICY, (("train-000.tar", 12), ("train-001.tar", 8))),
    Segment(1, "val", 32, 5, 48, 9, 1, CENTER_POLICY, (("val-000.tar", 6),)),
)
VIEWS = {
    "train": {"crop": [0.9, 1.0], "ratio": [0.75, 4 / 3], "flip": False, "jitter": 0.0, "seed": 0, "count": 2},
    "val": {"crop": [1.0, 1.0], "ratio": [1.0, 1.0], "flip": False, "jitter": 0.0, "seed": 0, "count": 1},
}
FIELDS = {
    field.name: field
    for field in (
        Field("image/tiny@2/tokens", "tokens", "float16", (5, D), 0, 3, 2),
        Field(f"views/{CROP_POLICY}/boxes", "boxes", "float32", (10,), 0, 2, 2, ("train",)),
        Field(f"views/{CENTER_POLICY}/boxes", "boxes", "float32", (10,), 0, 3, 1, ("val",)),
        Field("text/tiny-tokenizer/ids", "ids", "int32", (L,), 0, 4),
        Field("teacher/tiny/image/cls", "pooled", "float32", (D,), 17, 3, 2),
        Field("teacher/tiny/image/patches", "tokens", "int8", (4, D), 23, 3, 2),
        Field("teacher/tiny/text/layers", "ragged", "float16", (L, D), 41, 4),
    )
}
NOT_EXTRACTED = {("teacher/tiny/image/cls", 1)}  # (field, block), in all views


def arrays(field: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape of one row) of a field's arrays with rows (all but `mean` and `std`)."""
    f = FIELDS[field]
    out = {"values": (f.storage, f.row_shape)}
    if f.storage == "int8":
        out["scale"] = ("float32", f.row_shape[:-1])
    if f.kind in ("ragged", "ids"):
        out["length"] = ("int32", ())
    return out


def committed(field: str) -> list[tuple[int, int]]:
    """(block, view) of each receipt of a field, ascending."""
    f = FIELDS[field]
    pairs = []
    for segment in SEGMENTS:
        first_row, rows = segment.span(f.space)
        num_views = segment.num_views if f.space == "image" else 1
        if segment.split in f.splits:
            blocks = range(first_row // S, first_row // S + math.ceil(rows / S))
            pairs += [(b, v) for b in blocks for v in range(num_views) if (field, b) not in NOT_EXTRACTED]
    return sorted(pairs)


def missing(field: str, split: str) -> list[tuple[int, int]]:
    """(block, view) of a split that a field should have and lacks."""
    segment = next(s for s in SEGMENTS if s.split == split)
    first_row, rows = segment.span(FIELDS[field].space)
    num_views = segment.num_views if FIELDS[field].space == "image" else 1
    blocks = range(first_row // S, first_row // S + math.ceil(rows / S))
    return [(b, v) for b in blocks for v in range(num_views) if (b, v) not in committed(field)]


def valid_rows(field: str, split: str, view: int = 0) -> list[int]:
    """Rows that can be read: committed, no padding, not quarantined; ascending."""
    f = FIELDS[field]
    segment = next(s for s in SEGMENTS if s.split == split)
    first_row, rows = segment.span(f.space)
    blocks = {b for b, v in committed(field) if v == view}
    bad = {QUARANTINED_ROW} if f.space == "image" else set()
    return [row for row in range(first_row, first_row + rows) if row // S in blocks and row not in bad]


def is_valid(field: str, row: int, view: int = 0) -> bool:
    return any(row in valid_rows(field, segment.split, view) for segment in SEGMENTS)


# --- the numbers ----------------------------------------------------------------------------------------------------


def length_of(text_row: int) -> int:
    """Tokens of a caption, with CLS and SEP: on, below and above the edge of a tile, and full."""
    return (5, 16, 17, 32, 31, 9, 3)[text_row % 7]


def ids_row(text_row: int) -> np.ndarray:
    """CLS, 4 + (7 row + 3 position) mod 92 ..., SEP, then 0."""
    ids = np.zeros(L, np.int32)
    n = length_of(text_row)
    ids[:n] = FIRST_WORD_ID + (7 * text_row + 3 * np.arange(n)) % NUM_WORDS
    ids[0], ids[n - 1] = CLS_ID, SEP_ID
    return ids


def box_row(policy: str, row: int, view: int) -> np.ndarray:
    """left, top, width, height, flip, brightness, contrast, saturation, source_width, source_height."""
    source_width, source_height = 64 + row % 4, 60 + row % 3
    if policy == CENTER_POLICY:
        side = min(source_width, source_height)
        box = ((source_width - side) / 2, (source_height - side) / 2, side, side)
    else:
        box = (row % 2, (row + view) % 2, source_width - 1 - view, source_height - 1)
    return np.array([*box, 0, 1, 1, 1, source_width, source_height], np.float32)


def float_row(field: str, row: int, view: int) -> np.ndarray:
    """((salt + 37 row + 11 view + 5 index) mod 129 - 64) / 64, index in C order over the row; row 3 is zero."""
    f = FIELDS[field]
    index = np.arange(math.prod(f.row_shape)).reshape(f.row_shape)
    numbers = ((f.salt + 37 * row + 11 * view + 5 * index) % 129 - 64) / 64
    return (numbers * (row != ZERO_ROW)).astype(f.storage) + np.zeros((), f.storage)  # + 0: no negative zeros


def int8_row(field: str, row: int, view: int) -> np.ndarray:
    """(salt + 37 row + 11 view + 5 index) mod 255 - 127, but 127 or -127 at channel (row + token) mod D of each token.

    Hence an encoder with scale = absmax / 127 gives back exactly these numbers and scales from `expected_values`.
    """
    f = FIELDS[field]
    index = np.arange(math.prod(f.row_shape)).reshape(f.row_shape)
    stored = (f.salt + 37 * row + 11 * view + 5 * index) % 255 - 127
    for token in range(f.row_shape[0]):
        stored[token, (row + token) % D] = 127 if token % 2 == 0 else -127
    return (stored * (row != ZERO_ROW)).astype(np.int8)


def scale_row(field: str, row: int, view: int) -> np.ndarray:
    """2 ** -(6 + (row + view + token) mod 3); row 3 has 1."""
    token = np.arange(FIELDS[field].row_shape[0])
    scale = 0.5 ** (6 + (row + view + token) % 3)
    return (scale if row != ZERO_ROW else np.ones_like(scale)).astype(np.float32)


def channel_mean() -> np.ndarray:
    return ((np.arange(D) - 3) / 64).astype(np.float32)


def channel_std() -> np.ndarray:
    return (0.5 ** (np.arange(D) % 3)).astype(np.float32)


def expected_row(field: str, array: str, row: int, view: int = 0) -> np.ndarray | None:
    """The stored numbers of one row of `values`, `scale` or `length`, as plain Zarr reads them; None: not valid.

    Of a ragged field: zero from `length` to the end of its tile, NaN (the fill value) in the absent tiles after it.
    """
    f = FIELDS[field]
    if not is_valid(field, row, view):
        return None
    if array == "length":
        return np.array(length_of(row), np.int32)
    if array == "scale":
        return scale_row(field, row, view)
    if f.kind == "boxes":
        return box_row(field.split("/")[1], row, view)
    if f.kind == "ids":
        return ids_row(row)
    if f.storage == "int8":
        return int8_row(field, row, view)
    numbers = float_row(field, row, view)
    if f.kind == "ragged":
        numbers[length_of(row) :] = 0
        numbers[math.ceil(length_of(row) / TILE) * TILE :] = np.nan
    return numbers


def expected_values(field: str, row: int, view: int = 0) -> np.ndarray | None:
    """The decoded numbers of one row, float32; zero at and past `length`; None: the row is not valid."""
    f = FIELDS[field]
    numbers = expected_row(field, "values", row, view)
    if numbers is None:
        return None
    numbers = numbers.astype(np.float32)
    if f.storage == "int8":
        return (numbers * scale_row(field, row, view)[..., None]) * channel_std() + channel_mean()
    if f.kind == "ragged":
        numbers[length_of(row) :] = 0
    return numbers


def fill_value(dtype: str) -> float | int:
    return math.nan if dtype.startswith("float") else 0


def array_shape(field: str, array: str) -> tuple[int, ...]:
    f = FIELDS[field]
    if array in ("mean", "std"):
        return (D,)
    views = (f.num_views,) if f.space == "image" else ()
    return (f.num_blocks * S, *views, *arrays(field)[array][1])


def expected_array(field: str, array: str) -> np.ndarray:
    """A whole array as a plain Zarr library reads it: fill values where nothing is stored."""
    if array in ("mean", "std"):
        return channel_mean() if array == "mean" else channel_std()
    f = FIELDS[field]
    dtype = arrays(field)[array][0]
    out = np.full(array_shape(field, array), fill_value(dtype), dtype)
    for row in range(out.shape[0]):
        for view in range(f.num_views):
            numbers = expected_row(field, array, row, view)
            if numbers is not None:
                out[(row, view) if f.space == "image" else row] = numbers
    return out


# --- samples and captions -------------------------------------------------------------------------------------------


def samples(segment: Segment) -> list[dict]:
    """The lines of samples.parquet. In val sample 2 has no picture, the last sample no captions."""
    lines, image_row = [], segment.image_first_row
    for tar, num_samples in segment.tars:
        for i in range(num_samples):
            picture = not (segment.split == "val" and i == 2)
            labelled = i % 3 != 2
            lines.append(
                {
                    "key": "bär-07" if image_row == QUARANTINED_ROW else f"k{i:02d}",
                    "tar": tar,
                    "image_row": image_row if picture else None,
                    "offset": 512 + 4096 * i if picture else None,
                    "size": 3000 + i if picture else None,
                    "ext": ("jpg" if i % 2 == 0 else "png") if picture else None,
                    "label": str(i % 3) if labelled else None,
                    "label_name": ("red bear", "blue chair")[i % 3] if labelled else None,
                }
            )
            image_row += picture
    return lines


def captions(segment: Segment) -> list[dict]:
    """The lines of captions.parquet: two a sample; one for three samples of train and for val's without a picture."""
    lines: list[dict] = []
    sample_lines = samples(segment)
    counts = [2] * len(sample_lines)
    if segment.split == "train":
        counts[4] = counts[7] = counts[10] = 1
    else:
        counts[2], counts[-1] = 1, 0
    for sample, count in zip(sample_lines, counts, strict=True):
        for j in range(count):
            text_row = segment.text_first_row + len(lines)
            lines.append(
                {
                    "text_row": text_row,
                    "image_row": sample["image_row"],
                    "tar": sample["tar"],
                    "key": sample["key"],
                    "caption": f"ein Bär, no. {text_row}" if j else f"a bear, no. {text_row}",
                    "source": "json" if count == 2 else "txt",
                }
            )
    return lines


# --- bytes ----------------------------------------------------------------------------------------------------------


def canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode(
        "ascii"
    )


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def with_crc32c(data: bytes) -> bytes:
    return data + struct.pack("<I", google_crc32c.value(data))


def shard(chunks: list[bytes | None]) -> bytes:
    """Inner chunks in C order, None where absent, then the index and its checksum."""
    body, index = b"", b""
    for chunk in chunks:
        if chunk is None:
            index += struct.pack("<QQ", 2**64 - 1, 2**64 - 1)
            continue
        stored = with_crc32c(chunk)
        index += struct.pack("<QQ", len(body), len(stored))
        body += stored
    return body + with_crc32c(index)


def put(root: Path, path: str, data: bytes) -> None:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def put_json(root: Path, path: str, content: dict) -> None:
    text = json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    put(root, path, (text + "\n").encode())


def little_endian(numbers: np.ndarray) -> bytes:
    return np.ascontiguousarray(numbers, numbers.dtype.newbyteorder("<")).tobytes()


def object_bytes(field: str, array: str, block: int, view: int) -> bytes:
    """One object: the shard or chunk of a block and view."""
    f = FIELDS[field]
    dtype, row_shape = arrays(field)[array]
    rows = [expected_row(field, array, row, view) for row in range(block * S, (block + 1) * S)]
    if array == "values" and f.kind in ("tokens", "crops"):
        return shard([None if row is None else little_endian(row) for row in rows])
    if array == "values" and f.kind == "ragged":
        chunks: list[bytes | None] = []
        for row_number, row in zip(range(block * S, (block + 1) * S), rows, strict=True):
            for start in range(0, L, TILE):
                present = row is not None and start < length_of(row_number)
                chunks.append(little_endian(row[start : start + TILE]) if present else None)
        return shard(chunks)
    fill = np.full(row_shape, fill_value(dtype), dtype)
    return with_crc32c(little_endian(np.stack([fill if row is None else row for row in rows])))


# --- the parts of the folder ----------------------------------------------------------------------------------------


def group_json(attributes: dict) -> dict:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def bytes_codec(dtype: str) -> dict:
    endian = {"configuration": {"endian": "little"}} if np.dtype(dtype).itemsize > 1 else {}
    return {"name": "bytes", **endian}


def array_json(field: str, array: str) -> dict:
    f = FIELDS[field]
    crc32c = {"name": "crc32c"}
    if array in ("mean", "std"):
        dtype, shape, chunk_shape, names = "float32", (D,), (D,), ["channel"]
        inner = None
    else:
        dtype, row_shape = arrays(field)[array]
        shape = array_shape(field, array)
        in_row = {"tokens": ["token", "channel"], "boxes": ["parameter"], "pooled": ["channel"], "ids": ["position"]}
        in_row |= {"ragged": ["position", "channel"]}
        row_names = in_row[f.kind][: len(row_shape)]
        names = ["image_row", "view", *row_names] if f.space == "image" else ["text_row", *row_names]
        chunk_shape = (S, 1, *row_shape) if f.space == "image" else (S, *row_shape)
        inner = None
        if array == "values" and f.kind == "tokens":
            inner = (1, 1, *row_shape)
        if array == "values" and f.kind == "ragged":
            inner = (1, TILE, D)
    codecs: list[dict] = [bytes_codec(dtype), crc32c]
    if inner is not None:
        configuration = {
            "chunk_shape": list(inner),
            "codecs": codecs,
            "index_codecs": [bytes_codec("uint64"), crc32c],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": configuration}]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN" if dtype.startswith("float") else 0,
        "codecs": codecs,
        "dimension_names": names,
        "attributes": {},
    }


def fingerprint(field: str) -> dict:
    return {"made_by": "tests/golden/make_golden.py", "salt": FIELDS[field].salt, "storage": FIELDS[field].storage}


def statistics_object(field: str, array: str) -> tuple[str, bytes]:
    return f"{field}/{array}/c.0", with_crc32c(little_endian(expected_array(field, array)))


def write_field(root: Path, field: str) -> None:
    f = FIELDS[field]
    digest = sha256(canonical(fingerprint(field)))
    record = {
        "field": field,
        "kind": f.kind,
        "space": f.space,
        "arrays": {name: {"dtype": dtype, "row_shape": list(shape)} for name, (dtype, shape) in arrays(field).items()},
        "fingerprint": fingerprint(field),
        "fingerprint_digest": digest,
        "environment": {"note": "written by hand"},
    }
    names = list(arrays(field))
    record["statistics"] = {}
    if f.storage == "int8":
        for array in ("mean", "std"):
            names.append(array)
            path, data = statistics_object(field, array)
            put(root, path, data)
            record["statistics"][array] = {"path": path, "bytes": len(data), "sha256": sha256(data)}
    record["digest"] = sha256(canonical(record))
    put_json(root, f"_emkum/fields/{field}.json", record)

    parts = field.split("/")
    for depth in range(1, len(parts)):
        put_json(root, "/".join(parts[:depth]) + "/zarr.json", group_json({}))
    put_json(root, f"{field}/zarr.json", group_json({"emkum": {"field": field, "fingerprint_digest": digest}}))
    for array in names:
        put_json(root, f"{field}/{array}/zarr.json", array_json(field, array))
    for block, view in committed(field):
        write_block(root, field, block, view, digest)


def write_block(root: Path, field: str, block: int, view: int, fingerprint_digest: str) -> None:
    f = FIELDS[field]
    segment = next(s for s in SEGMENTS if s.span(f.space)[0] <= block * S < sum(s.span(f.space)))
    first_row, rows = segment.span(f.space)
    rows_here = range(block * S, min((block + 1) * S, first_row + rows))
    objects = []
    for array, (_, row_shape) in sorted(arrays(field).items()):
        key = [block, view] if f.space == "image" else [block]
        path = f"{field}/{array}/c." + ".".join(map(str, key + [0] * len(row_shape)))
        data = object_bytes(field, array, block, view)
        put(root, path, data)
        objects.append({"path": path, "bytes": len(data), "sha256": sha256(data)})

    numbers = [expected_values(field, row, view) for row in rows_here if is_valid(field, row, view)]
    if f.space == "text":
        valid = [row for row in rows_here if is_valid(field, row, view)]
        numbers = [n[: length_of(row)] for n, row in zip(numbers, valid, strict=True)]
    flat = np.concatenate([n.reshape(-1) for n in numbers]).astype(np.float64)
    keys = {line["image_row"]: line for line in samples(segment)}
    bad = [row for row in rows_here if f.space == "image" and row == QUARANTINED_ROW]
    receipt = {
        "field": field,
        "block": block,
        "view": view,
        "segment": segment.number,
        "first_row": block * S,
        "rows": len(rows_here),
        "fingerprint_digest": fingerprint_digest,
        "objects": objects,
        "statistics": {"min": float(flat.min()), "max": float(flat.max()), "mean": float(flat.mean())},
        "error": {"relative_l2": 0.0, "max_abs": 0.0} if f.storage in ("float16", "int8") else None,
        "quarantined": [
            {"row": row, "tar": keys[row]["tar"], "key": keys[row]["key"], "reason": QUARANTINE_REASON} for row in bad
        ],
    }
    receipt["digest"] = sha256(canonical(receipt))
    put_json(root, f"_emkum/receipts/{field}/{block:06d}-{view}.json", receipt)


SAMPLES_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "tar": pa.string(),
        "image_row": pa.int64(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "ext": pa.string(),
        "label": pa.string(),
        "label_name": pa.string(),
    }
)
CAPTIONS_SCHEMA = pa.schema(
    {
        "text_row": pa.int64(),
        "image_row": pa.int64(),
        "tar": pa.string(),
        "key": pa.string(),
        "caption": pa.string(),
        "source": pa.string(),
    }
)


def write_segment(root: Path, segment: Segment) -> None:
    folder = f"_emkum/segments/{segment.number}"
    tables = {
        "samples.parquet": pa.Table.from_pylist(samples(segment), SAMPLES_SCHEMA),
        "captions.parquet": pa.Table.from_pylist(captions(segment), CAPTIONS_SCHEMA),
    }
    digests = {}
    for name, table in tables.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        pq.write_table(table, root / folder / name, write_page_checksum=True)
        digests[name] = sha256((root / folder / name).read_bytes())
    sources = [
        {
            "tar": tar,
            "bytes": 10240 * n,
            "sha256": sha256(b"golden " + tar.encode()),
            "samples": n,
            "path": f"tars/{tar}",
        }
        for tar, n in segment.tars
    ]
    content = {
        "split": segment.split,
        "image": {"first_row": segment.image_first_row, "rows": segment.image_rows},
        "text": {"first_row": segment.text_first_row, "rows": segment.text_rows},
        "views": VIEWS[segment.split],
        "parquet": digests,
    }
    signed = content | {"sources": [[s["tar"], s["bytes"], s["sha256"], s["samples"]] for s in sources]}
    content |= {"segment": segment.number, "sources": sources, "digest": sha256(canonical(signed))}
    put_json(root, f"{folder}/segment.json", content)


def write_model(root: Path) -> None:
    """A stand-in network, too small to run: enough to see where the files lie."""
    weights = {
        "embedding.weight": float_row("image/tiny@2/tokens", 0, 0).astype(np.float32),
        "norm.weight": np.ones(D, np.float32),
    }
    data = safetensors.numpy.save(weights)
    words = {"[PAD]": 0, "[CLS]": CLS_ID, "[SEP]": SEP_ID, "[UNK]": 3}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "unk_token": "[UNK]",
            "vocab": words | {f"w{i}": 4 + i for i in range(NUM_WORDS)},
        },
        "normalizer": None,
        "padding": None,
        "post_processor": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "truncation": None,
    }
    model = {
        "name": MODEL,
        "architecture": {"depth": 2, "width": D, "heads": 2},
        "preprocessing": {"image_size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        "weights_sha256": sha256(data),
        "source": "tests/golden/make_golden.py",
        "licence": "Apache-2.0",
        "supervision": "none",
    }
    put(root, f"_emkum/models/{MODEL}/model.safetensors", data)
    put_json(root, f"_emkum/models/{MODEL}/tokenizer.json", tokenizer)
    put_json(root, f"_emkum/models/{MODEL}/model.json", model)


def write_golden(root: Path) -> None:
    """Write the whole cache into an empty or absent folder."""
    if root.exists() and any(root.iterdir()):
        raise SystemExit(f"{root} is not empty. Remove it first, or name another folder.")
    put_json(root, "zarr.json", group_json({"emkum": {"format": 1, "uuid": UUID, "rows_per_block": S}}))
    for segment in SEGMENTS:
        write_segment(root, segment)
    write_model(root)
    for field in FIELDS:
        write_field(root, field)
    # What a killed extraction leaves behind; a reader ignores both.
    put(root, "teacher/tiny/image/cls/values/.c.1.0.0", b"half an object")
    put(root, "_emkum/receipts/teacher/tiny/image/cls/000001-0.json.tmp", b'{"field": "teacher/tiny/ima')


# --- the same with digests in every record --------------------------------------------------------------------------


def put_sealed(root: Path, path: str, content: dict) -> None:
    put(root, path, (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii"))


def with_digest(content: dict, key: str = "digest") -> dict:
    return content | {key: sha256(canonical(content))}


def seal(root: Path) -> None:
    """Adds the digests to a cache that `write_golden` wrote."""
    write_network_of_the_tokenizer(root)
    for file in sorted(p for p in root.rglob("*.json") if "models" not in p.parts):
        path, content = file.relative_to(root).as_posix(), json.loads(file.read_text("utf-8"))
        if path == "zarr.json":
            content["attributes"]["emkum"] = with_digest(content["attributes"]["emkum"])
        elif content.get("node_type") == "array":
            content["attributes"] = {"emkum": {"digest": sha256(canonical(content))}}
        elif path.endswith("/segment.json"):
            content = sealed_segment(content)
        put_sealed(root, path, content)
    for folder in sorted((root / "_emkum/models").iterdir()):
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p.read_bytes())} for p in folder.iterdir()}
        put_sealed(root, f"_emkum/models/{folder.name}/files.json", with_digest({"files": files}))
    scans = {f"/data/{tar}": [10240 * n, 1, 2, sha256(b"golden " + tar.encode())] for tar, n in SEGMENTS[0].tars}
    put_sealed(root, "_emkum/hints/scans.json", with_digest({"scans": scans}))


def sealed_segment(content: dict) -> dict:
    del content["digest"]
    if content["segment"] == 0:
        content["sources"][1]["truncated"] = content["sources"][1]["bytes"]
    signed = {key: content[key] for key in ("split", "image", "text", "views", "parquet")}
    signed["sources"] = [
        [s["tar"], s["bytes"], s["sha256"], s["samples"], *([s["truncated"]] if "truncated" in s else [])]
        for s in content["sources"]
    ]
    return with_digest(content | {"digest": sha256(canonical(signed))}, "record_digest")


def write_network_of_the_tokenizer(root: Path) -> None:
    """The network whose name the ids bear."""
    tiny, folder = root / "_emkum/models" / MODEL, "_emkum/models/tiny-tokenizer"
    for name in ("model.safetensors", "tokenizer.json"):
        put(root, f"{folder}/{name}", (tiny / name).read_bytes())
    model = json.loads((tiny / "model.json").read_text("utf-8"))
    put_json(root, f"{folder}/model.json", model | {"name": "tiny-tokenizer"})


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], ["--digests"]):
        raise SystemExit("usage: python tests/golden/make_golden.py OUT [--digests]")
    write_golden(Path(sys.argv[1]))
    if sys.argv[2:]:
        seal(Path(sys.argv[1]))
