"""Parquet tables of a cache, opened as if somebody hostile had written them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MAX_ROWS_PER_BYTE = 20  # an honest line has a key and a row of its own, which compress to two bytes
MAX_EXPANSION = 1000  # bytes of columns, or of text, for a byte of file
FREE_TEXT_BYTES = 64_000_000  # that any file may unpack to
BATCH_ROWS = 16_384
BATCH_TEXT_BYTES = 64_000_000
_READ_ROWS = 8 * BATCH_ROWS  # each read copies its row group's dictionary
_THRIFT_BYTES = 100_000_000


@dataclass(frozen=True)
class OpenTable:
    """A table before its lines are read. most_text_bytes: what they may unpack to."""

    file: pq.ParquetFile
    schema: pa.Schema
    most_text_bytes: int


def open_table(data: bytes, schema: pa.Schema, rows: int) -> OpenTable:
    """A table of just these columns and rows; page checksums are verified as it is read.

    Raises ValueError for another table, and for one that claims far more than its bytes can hold.
    """
    try:
        file = pq.ParquetFile(
            io.BytesIO(data),
            page_checksum_verification=True,
            thrift_string_size_limit=_THRIFT_BYTES,
            thrift_container_size_limit=1_000_000,
        )
        metadata = file.metadata
        if metadata.num_rows != rows:
            raise ValueError(f"it has {metadata.num_rows} lines, segment.json states {rows}")
        if not file.schema_arrow.equals(schema):
            raise ValueError(f"its columns are {_columns(file.schema_arrow)}; they must be {_columns(schema)}")
        if rows > MAX_ROWS_PER_BYTE * len(data):
            raise ValueError(f"it claims {rows} lines in {len(data)} bytes")
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        expanded = sum(group.column(i).total_uncompressed_size for group in groups for i in range(len(schema.names)))
        if expanded > MAX_EXPANSION * len(data) or any(group.num_rows < 0 for group in groups):
            raise ValueError(f"it claims {expanded} bytes of columns in {len(data)} bytes")
        # Text stays encoded until its size is known: a long string is stored once, and any number of lines may name it.
        texts = [field.name for field in schema if pa.types.is_string(field.type)]
        file = pq.ParquetFile(
            io.BytesIO(data), metadata=metadata, read_dictionary=texts, page_checksum_verification=True
        )
    except (pa.ArrowException, OSError) as error:
        raise ValueError(_line(error)) from error
    return OpenTable(file, schema, max(MAX_EXPANSION * len(data), FREE_TEXT_BYTES))


def batches(table: OpenTable) -> Iterator[pa.RecordBatch]:
    """The table in pieces of at most BATCH_ROWS lines, and BATCH_TEXT_BYTES of text or one line.

    Raises ValueError for a page that fails its checksum or cannot be read, and for text that unpacks to too much.
    """
    total = 0
    try:
        for batch in table.file.iter_batches(_READ_ROWS, use_threads=False):
            batch.validate(full=True)
            text_bytes = _text_bytes(batch)
            total += int(text_bytes.sum())
            if total > table.most_text_bytes:
                raise ValueError(f"its text unpacks to {total} bytes or more; {table.most_text_bytes} are allowed")
            for first, end in _pieces(text_bytes):
                yield _decoded(batch.slice(first, end - first), table.schema)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(_line(error)) from error


def _text_bytes(batch: pa.RecordBatch) -> np.ndarray:
    """Bytes of text of each line, once it is decoded."""
    found = np.zeros(len(batch), np.int64)
    for column in batch.columns:
        if isinstance(column, pa.DictionaryArray) and len(column.dictionary):
            lengths = pc.binary_length(column.dictionary).fill_null(0).to_numpy().astype(np.int64)
            named = column.indices.is_valid().to_numpy(zero_copy_only=False)
            found += np.where(named, lengths[column.indices.fill_null(0).to_numpy()], 0)
    return found


def _pieces(text_bytes: np.ndarray) -> Iterator[tuple[int, int]]:
    ends = np.cumsum(text_bytes)
    first = 0
    while first < len(ends):
        before = ends[first - 1] if first else 0
        end = int(np.searchsorted(ends, before + BATCH_TEXT_BYTES, side="right"))
        end = min(max(end, first + 1), first + BATCH_ROWS)
        yield first, end
        first = end


def _decoded(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    columns = [c.dictionary_decode() if isinstance(c, pa.DictionaryArray) else c for c in batch.columns]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)[:300]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
