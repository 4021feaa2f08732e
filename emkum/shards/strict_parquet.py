"""Parquet tables of a cache, opened as if somebody hostile had written them."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

MAX_ROWS_PER_BYTE = 20  # an honest line has a key and a row of its own, which compress to two bytes
MAX_EXPANSION = 1000  # bytes of columns for a byte of file
BATCH_ROWS = 16_384
_THRIFT_BYTES = 100_000_000


def open_table(data: bytes, schema: pa.Schema, rows: int) -> pq.ParquetFile:
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
    except (pa.ArrowException, OSError) as error:
        raise ValueError(_line(error)) from error
    return file


def batches(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """The table in pieces. Raises ValueError for a page that fails its checksum or cannot be read."""
    try:
        for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
            batch.validate(full=True)
            yield batch
    except (pa.ArrowException, OSError) as error:
        raise ValueError(_line(error)) from error


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)[:300]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
