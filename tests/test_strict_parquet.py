"""Parquet of a cache is opened as if somebody hostile had written it."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emkum.shards import strict_parquet
from emkum.shards.strict_parquet import batches, open_table

SCHEMA = pa.schema([("row", pa.int64()), ("text", pa.string())])


def parquet(texts: list[str | None], **options: object) -> bytes:
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, SCHEMA, compression="zstd", write_page_checksum=True, **options) as writer:
        for first in range(0, len(texts), 1000):
            piece = texts[first : first + 1000]
            writer.write_table(pa.table({"row": range(first, first + len(piece)), "text": piece}, schema=SCHEMA))
    return sink.getvalue()


def read(data: bytes, rows: int) -> pa.Table:
    return pa.Table.from_batches(batches(open_table(data, SCHEMA, rows)), SCHEMA)


def test_a_long_string_that_very_many_lines_name_is_refused_before_it_is_unpacked() -> None:
    data = parquet(["x" * 1_000_000] * 3000)
    assert len(data) < 20_000
    before = pa.default_memory_pool().bytes_allocated()
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    normal = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(ValueError, match=r"its text unpacks to \d+ bytes or more; 64000000 are allowed"):
            read(data, 3000)
    finally:
        pa.set_memory_pool(normal)
    assert pool.max_memory() < 100_000_000
    assert pa.default_memory_pool().bytes_allocated() - before < 100_000_000


def test_many_lines_of_one_short_text_are_read() -> None:
    texts: list[str | None] = ["a photograph of a cat"] * 100_000
    assert read(parquet(texts), 100_000)["text"].to_pylist() == texts


@pytest.mark.parametrize("use_dictionary", [False, True])
def test_what_is_read_is_what_was_written_in_pieces_of_bounded_text(
    use_dictionary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strict_parquet, "BATCH_TEXT_BYTES", 1000)
    monkeypatch.setattr(strict_parquet, "BATCH_ROWS", 90)
    texts = [None if i % 7 == 0 else "\u00fc" * (i % 50) if i % 500 else "long" * 1000 for i in range(2500)]
    pieces = list(batches(open_table(parquet(texts, use_dictionary=use_dictionary), SCHEMA, 2500)))
    assert [text for piece in pieces for text in piece["text"].to_pylist()] == texts
    assert [row for piece in pieces for row in piece["row"].to_pylist()] == list(range(2500))
    assert all(piece.schema == SCHEMA and len(piece) <= 90 for piece in pieces)
    for piece in pieces:
        assert len(piece) == 1 or sum(len((text or "").encode()) for text in piece["text"].to_pylist()) <= 1000


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_texts_that_share_their_beginnings_are_refused_as_no_writer_of_ours_stores_them(encoding: str) -> None:
    data = parquet(["x" * 1000] * 50, use_dictionary=False, column_encoding={"text": encoding})
    with pytest.raises(ValueError, match="Not yet implemented"):
        read(data, 50)
