"""Caches of random numbers, of any size, written through the real writer: what the reading benchmarks read.

N rows, T tokens, D channels.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from emkum.shards.codec import Encoded, Summary, encode_int8
from emkum.shards.fingerprint import Fingerprint
from emkum.shards.layout import FieldSpec, object_path, receipt_path
from emkum.shards.ledger import receipt_bytes
from emkum.shards.segments import Segment
from emkum.shards.tars import PictureMember, SourceSample, SourceTar
from emkum.shards.views import ViewPolicy
from emkum.shards.writer import CacheWriter

TOKENS = "image/random@0/tokens"
BATCH = 64  # rows appended together
DISTINCT = 256  # rows that differ; later blocks repeat them in another order


def random_cache(
    path: Path,
    rows: int,
    tokens: int = 197,
    width: int = 768,
    storage: str = "float16",
    rows_per_block: int = 1024,
    captions: int = 0,
) -> FieldSpec:
    """A cache whose split `train` has one token field of `rows` rows; returns the field."""
    writer = CacheWriter(path, rows_per_block)
    segment, field = _declare(writer, rows, tokens, width, storage, captions)
    stored = stored_rows(DISTINCT, tokens, width, storage)
    which = which_stored(rows, rows_per_block)
    for block in segment.image.blocks(rows_per_block):
        first_row, count = segment.image.block_rows(block, rows_per_block)
        with writer.block(field, segment, block, 0) as target:
            for first in range(0, count, BATCH):
                here = which[first_row + first : first_row + min(first + BATCH, count)]
                scale = None if stored.scale is None else stored.scale[here]
                target.append(Encoded(stored.values[here], scale, None, Summary()))
            target.commit()
    return field


def repeated_cache(path: Path, rows: int, block: Path) -> FieldSpec:
    """A cache of `rows` float16 rows that takes hardly more of the disk than one block: every block is a hard link to
    the one of the cache at `block`, with a receipt of its own.
    """
    one = CacheWriter(block)
    rows_per_block = one.rows_per_block
    assert rows % rows_per_block == 0, f"whole blocks of {rows_per_block} rows"
    receipt = one.receipts(TOKENS)[0, 0]
    tokens, width = one.field_record(TOKENS)["arrays"]["values"]["row_shape"]  # type: ignore[index]
    writer = CacheWriter(path, rows_per_block)
    segment, field = _declare(writer, rows, tokens, width, "float16", 0)
    values = field.array("values")
    for number in segment.image.blocks(rows_per_block):
        place = object_path(field, values, number, 0)
        (path / place).parent.mkdir(parents=True, exist_ok=True)
        (path / place).hardlink_to(block / receipt.objects[0].path)
        objects = (dataclasses.replace(receipt.objects[0], path=place),)
        here = dataclasses.replace(receipt, block=number, first_row=number * rows_per_block, objects=objects)
        written = path / receipt_path(field.name, number, 0)
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_bytes(receipt_bytes(here))
    return field


def _declare(
    writer: CacheWriter, rows: int, tokens: int, width: int, storage: str, captions: int
) -> tuple[Segment, FieldSpec]:
    """The segment of split `train` and its token field, without blocks."""
    segment = writer.append_segment("train", ViewPolicy(), [_tar(rows, captions)])
    field = FieldSpec(TOKENS, "tokens", storage, (tokens, width))
    statistics = (np.zeros(width, np.float32), np.ones(width, np.float32)) if storage == "int8" else None
    fingerprint = Fingerprint(field.kind, storage, field.row_shape)
    writer.declare_field(field, fingerprint, {"source": "random numbers"}, statistics)
    writer.grow_field(field, 1)
    return segment, field


def which_stored(rows: int, rows_per_block: int = 1024) -> np.ndarray:
    """int64 [N]: which of the distinct rows each row of the cache is."""
    row = np.arange(rows)
    return (row % rows_per_block * 37 + row // rows_per_block) % DISTINCT


def stored_rows(rows: int, tokens: int, width: int, storage: str, seed: int = 0) -> Encoded:
    """Random rows as they are stored."""
    values_NTD = np.random.default_rng(seed).standard_normal((rows, tokens, width), dtype=np.float32)
    if storage == "int8":
        stored, scale = encode_int8(values_NTD, np.zeros(width, np.float32), np.ones(width, np.float32))
        return Encoded(stored, scale, None, Summary())
    return Encoded(values_NTD.astype(storage), None, None, Summary())


def _tar(rows: int, captions: int) -> SourceTar:
    samples = tuple(
        SourceSample(
            f"{i:08d}",
            PictureMember(512 + 1024 * i, 100, "jpg"),
            tuple(f"caption {c} of picture {i}" for c in range(captions)),
            "json" if captions else "",
            None,
            None,
        )
        for i in range(rows)
    )
    return SourceTar("random.tar", "random.tar", 1000, hashlib.sha256(b"random").hexdigest(), samples, {}, 0)
