"""Which sample of which tar each row of a segment is, read from the segment's own tables."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from emkum.errors import CorruptCache
from emkum.shards.layout import Space, segment_dir
from emkum.shards.segments import CAPTIONS, SAMPLES, SOUNDS, Segment
from emkum.shards.store import Store
from emkum.shards.strict_parquet import batches, open_table

TABLES: dict[Space, str] = {"image": "samples.parquet", "text": "captions.parquet", "audio": "sounds.parquet"}
_SCHEMAS = {"image": SAMPLES, "text": CAPTIONS, "audio": SOUNDS}


@dataclass(frozen=True)
class RowNames:
    """Tar and key of every row of one segment and space, from first_row on."""

    first_row: int
    tars: pa.LargeStringArray
    keys: pa.LargeStringArray

    def of(self, rows: Sequence[int]) -> list[tuple[str, str]]:
        """(tar, key) of each. Costs what these rows cost, however long the table is."""
        places = np.asarray(rows, np.int64) - self.first_row
        if len(places) and not 0 <= places.min() <= places.max() < len(self.keys):
            raise ValueError(
                f"rows {min(rows)} to {max(rows)} are not all of {len(self.keys)} from {self.first_row} on"
            )
        taken = pa.array(places)
        return list(zip(self.tars.take(taken).to_pylist(), self.keys.take(taken).to_pylist(), strict=True))


def table_bytes(store: Store, segment: Segment, name: str) -> bytes:
    """One of the segment's tables as it was committed. Raises FileNotFoundError, and ValueError for other bytes."""
    data = store.read(f"{segment_dir(segment.number)}/{name}")
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != segment.parquet[name]:
        raise ValueError(
            f"its {len(data)} bytes have sha256 {sha256[:12]}..., segment.json states "
            f"{str(segment.parquet[name])[:12]}..."
        )
    return data


def read_row_names(store: Store, segment: Segment, space: Space) -> RowNames:
    """Raises CorruptCache for a table that is damaged, or whose rows are not numbered one after the other."""
    name, span = TABLES[space], segment.span(space)
    if name not in segment.tables:  # no sounds
        return RowNames(span.first_row, pa.array([], pa.large_string()), pa.array([], pa.large_string()))
    schema, lines = _SCHEMAS[space], segment.tables[name]
    tars, keys, row = [], [], span.first_row
    try:
        for batch in batches(open_table(table_bytes(store, segment, name), schema, lines)):
            here = batch.filter(batch[f"{space}_row"].is_valid())
            numbers = here[f"{space}_row"].to_numpy()
            if (numbers != np.arange(row, row + len(numbers))).any():
                raise ValueError(f"its rows from {row} on are not numbered one after the other")
            row += len(numbers)
            tars.append(here["tar"].cast(pa.large_string()))
            keys.append(here["key"].cast(pa.large_string()))
        if row != span.end:
            raise ValueError(f"it has {row - span.first_row} rows, segment.json states {span.rows}")
    except (FileNotFoundError, ValueError) as error:
        raise CorruptCache(
            f"{name} of segment {segment.number} cannot be trusted: {error}", "restore it from a copy of the cache"
        ) from error
    nothing = pa.array([], pa.large_string())
    return RowNames(span.first_row, pa.concat_arrays([nothing, *tars]), pa.concat_arrays([nothing, *keys]))
