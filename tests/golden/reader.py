"""Read a cache of format 1 with json, struct, numpy, pyarrow and a crc32c: written from docs/format.md alone.

A second reader, to hold against emkum's own. It trusts the records, never the Zarr metadata, and checks all it touches.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ABSENT = 2**64 - 1
TILE = 16


class BadCacheError(Exception):
    """Something in the cache disagrees with docs/format.md."""


@dataclass(frozen=True)
class PlainCache:
    """A snapshot: segments in order, field records by name, receipts by (field, block, view)."""

    path: Path
    uuid: str
    rows_per_block: int
    segments: tuple[dict, ...]
    fields: dict[str, dict]
    receipts: dict[tuple[str, int, int], dict]


def digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def check_digest(record: dict, key: str, what: str) -> None:
    """Of records that carry their digest under `key`; those of the first release do not."""
    if key in record:
        require(digest({k: v for k, v in record.items() if k != key}) == record[key], f"{what}: {key}")


def require(condition: bool, what: str) -> None:
    if not condition:
        raise BadCacheError(what)


def finished_json(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.json") if not p.name.startswith("."))


def open_cache(path: Path) -> PlainCache:
    """Read all records, check their digests and that they agree. Reads no numbers."""
    root = json.loads((path / "zarr.json").read_text("utf-8"))["attributes"]["emkum"]
    check_digest(root, "digest", "zarr.json")
    require(root["format"] == 1, f"format {root['format']}, this reader knows 1")
    rows_per_block = root["rows_per_block"]
    segments, next_row = [], {"image": 0, "text": 0}
    while (path / "_emkum/segments" / str(len(segments))).exists():
        folder = path / "_emkum/segments" / str(len(segments))
        segment = json.loads((folder / "segment.json").read_text("utf-8"))
        require(segment["segment"] == len(segments), f"{folder}: segment {segment['segment']}")
        signed = {key: segment[key] for key in ("split", "image", "text", "views", "parquet")}
        signed["sources"] = [
            [s["tar"], s["bytes"], s["sha256"], s["samples"], *([s["truncated"]] if "truncated" in s else [])]
            for s in segment["sources"]
        ]
        check_digest(segment, "record_digest", f"{folder}")
        require(segment["digest"] == digest(signed), f"{folder}: digest")
        for space, row in next_row.items():
            require(segment[space]["first_row"] == row, f"{folder}: first {space} row")
            next_row[space] = row + math.ceil(segment[space]["rows"] / rows_per_block) * rows_per_block
        segments.append(segment)

    fields, receipts = {}, {}
    for file in finished_json(path / "_emkum/fields"):
        record = json.loads(file.read_text("utf-8"))
        name = file.relative_to(path / "_emkum/fields").as_posix().removesuffix(".json")
        require(record["field"] == name and digest(record["fingerprint"]) == record["fingerprint_digest"], f"{file}")
        require(digest({k: v for k, v in record.items() if k != "digest"}) == record["digest"], f"{file}: digest")
        fields[name] = record
        for receipt_file in sorted((path / "_emkum/receipts" / name).glob("[0-9]*-*.json")):
            receipt = json.loads(receipt_file.read_text("utf-8"))
            block, view = map(int, receipt_file.stem.split("-"))
            require(
                (receipt["field"], receipt["block"], receipt["view"]) == (name, block, view), f"{receipt_file}: name"
            )
            unsigned = {key: value for key, value in receipt.items() if key != "digest"}
            require(receipt["digest"] == digest(unsigned), f"{receipt_file}: digest")
            require(receipt["fingerprint_digest"] == record["fingerprint_digest"], f"{receipt_file}: fingerprint")
            span = segments[receipt["segment"]][record["space"]]
            first_row = block * rows_per_block
            rows = min(rows_per_block, span["first_row"] + span["rows"] - first_row)
            require((receipt["first_row"], receipt["rows"]) == (first_row, rows), f"{receipt_file}: rows")
            receipts[name, block, view] = receipt
    return PlainCache(path, root["uuid"], rows_per_block, tuple(segments), fields, receipts)


def read_table(cache: PlainCache, segment: int, name: str) -> pa.Table:
    """`samples.parquet` or `captions.parquet` of a segment, its SHA-256 and page checksums checked."""
    file = cache.path / "_emkum/segments" / str(segment) / name
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    require(sha256 == cache.segments[segment]["parquet"][name], f"{file}: SHA-256")
    return pq.read_table(file, page_checksum_verification=True)


def valid_rows(cache: PlainCache, field: str, split: str, view: int = 0) -> list[int]:
    rows: list[int] = []
    for (name, _, its_view), receipt in sorted(cache.receipts.items()):
        if name == field and its_view == view and cache.segments[receipt["segment"]]["split"] == split:
            bad = {q["row"] for q in receipt["quarantined"]}
            rows += [r for r in range(receipt["first_row"], receipt["first_row"] + receipt["rows"]) if r not in bad]
    return rows


def checked(data: bytes, what: str) -> bytes:
    body, (crc,) = data[:-4], struct.unpack("<I", data[-4:])
    require(google_crc32c.value(body) == crc, f"{what}: crc32c")
    return body


def read_object(cache: PlainCache, entry: dict) -> bytes:
    data = (cache.path / entry["path"]).read_bytes()
    require(len(data) == entry["bytes"], f"{entry['path']}: {len(data)} bytes, receipt has {entry['bytes']}")
    require(hashlib.sha256(data).hexdigest() == entry["sha256"], f"{entry['path']}: SHA-256")
    return data


def inner_chunks(data: bytes, num_chunks: int, what: str) -> list[bytes | None]:
    """The inner chunks of a shard in C order; None where absent. Checks that they lie in order without gaps."""
    index = checked(data[-(16 * num_chunks + 4) :], f"{what} index")
    chunks: list[bytes | None] = []
    end = 0
    for offset, length in struct.iter_unpack("<QQ", index):
        if (offset, length) == (ABSENT, ABSENT):
            chunks.append(None)
            continue
        require(offset == end, f"{what}: chunk {len(chunks)} at {offset}, expected {end}")
        end = offset + length
        chunks.append(checked(data[offset:end], f"{what} chunk {len(chunks)}"))
    require(end + 16 * num_chunks + 4 == len(data), f"{what}: gap before the index")
    return chunks


def read_block(cache: PlainCache, field: str, array: str, block: int, view: int = 0) -> list[np.ndarray | None]:
    """The S rows of one array of a committed block; None where a row has no bytes. Absent ragged tiles are NaN or 0."""
    record, receipt, size = cache.fields[field], cache.receipts[field, block, view], cache.rows_per_block
    dtype = np.dtype(record["arrays"][array]["dtype"]).newbyteorder("<")
    shape = tuple(record["arrays"][array]["row_shape"])
    key = ([block, view] if record["space"] == "image" else [block]) + [0] * len(shape)
    path = f"{field}/{array}/c." + ".".join(map(str, key))
    data = read_object(cache, next(entry for entry in receipt["objects"] if entry["path"] == path))
    if array != "values" or record["kind"] not in ("tokens", "crops", "ragged"):
        return list(np.frombuffer(checked(data, path), dtype).reshape(size, *shape))
    if record["kind"] != "ragged":
        chunks = inner_chunks(data, size, path)
        return [None if chunk is None else np.frombuffer(chunk, dtype).reshape(shape) for chunk in chunks]
    tiles = shape[0] // TILE
    chunks = inner_chunks(data, size * tiles, path)
    rows: list[np.ndarray | None] = []
    for first in range(0, len(chunks), tiles):
        row = np.full(shape, np.nan if dtype.kind == "f" else 0, dtype)
        for tile, chunk in enumerate(chunks[first : first + tiles]):
            if chunk is not None:
                row[tile * TILE : (tile + 1) * TILE] = np.frombuffer(chunk, dtype).reshape(TILE, *shape[1:])
        rows.append(None if chunks[first] is None else row)
    return rows


def read_channels(cache: PlainCache, field: str, name: str) -> np.ndarray:
    """`mean` or `std` of an int8 field, float32."""
    entry = cache.fields[field]["statistics"][name]
    return np.frombuffer(checked(read_object(cache, entry), entry["path"]), "<f4")


def read_values(cache: PlainCache, field: str, row: int, view: int = 0) -> np.ndarray:
    """One row, decoded, float32; zero at and past `length`. Raises BadCacheError for a row that is not valid."""
    splits = {segment["split"] for segment in cache.segments}
    require(any(row in valid_rows(cache, field, split, view) for split in splits), f"{field}: row {row} is not valid")
    block, within = divmod(row, cache.rows_per_block)
    stored = read_block(cache, field, "values", block, view)[within]
    require(stored is not None, f"{field}: row {row} is valid but has no bytes")
    values = stored.astype(np.float32)
    if "scale" in cache.fields[field]["arrays"]:
        scale = read_block(cache, field, "scale", block, view)[within]
        values = (values * scale[..., None]) * read_channels(cache, field, "std") + read_channels(cache, field, "mean")
    if "length" in cache.fields[field]["arrays"]:
        values[int(read_block(cache, field, "length", block)[within]) :] = 0
    return values
