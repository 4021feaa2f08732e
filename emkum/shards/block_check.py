"""One committed block against its receipt: every byte of its objects, and what the bytes must mean."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import google_crc32c
import numpy as np

from emkum.shards.bad_sectors import Unreadable
from emkum.shards.layout import ABSENT, TEXT_TILE, ArraySpec, FieldSpec, object_path
from emkum.shards.ledger import CommittedObject, Receipt
from emkum.shards.store import RangeReader, Store

PIECE_BYTES = 4 << 20  # read at a time
Progress = Callable[[int], None]


@dataclass(frozen=True)
class ObjectDamage:
    """What is wrong with one object, and the rows that suffer from it: numbers within the block."""

    path: str
    what: str
    rows: np.ndarray


def stated_objects(field: FieldSpec, receipt: Receipt) -> dict[str, CommittedObject]:
    """The receipt's objects by array. Raises ValueError unless they are just those that the block must have."""
    expected = {object_path(field, a, receipt.block, receipt.view): a.name for a in field.arrays if a.per_row}
    paths = [stated.path for stated in receipt.objects]
    if sorted(map(str, paths)) != sorted(expected):
        raise ValueError(f"it lists {', '.join(map(repr, paths))[:300]}; the block has {', '.join(expected)}")
    return {expected[stated.path]: stated for stated in receipt.objects}


def check_block(
    store: Store,
    field: FieldSpec,
    receipt: Receipt,
    rows_per_block: int,
    largest: tuple[float, float] = (0.0, 0.0),
    progress: Progress = lambda count: None,
) -> list[ObjectDamage]:
    """Reads every object of the block once. Memory: of an object of one chunk about twice its bytes; of a shard a
    chunk, or PIECE_BYTES of them, and the index.

    largest: of an int8 field, the largest |mean| and |std|. Raises only StorageFailure, and ValueError of
    `stated_objects`.
    """
    stated = stated_objects(field, receipt)
    valid = np.zeros(rows_per_block, dtype=bool)
    valid[: receipt.rows] = True
    valid[[q.row - receipt.first_row for q in receipt.quarantined]] = False
    block = _Block(store, field, valid, largest, progress)
    names = sorted(stated, key=lambda name: name != "length")  # lengths say what the others must hold
    for name in names:
        block.check(field.array(name), stated[name])
    return block.damages


class _Block:
    def __init__(
        self, store: Store, field: FieldSpec, valid: np.ndarray, largest: tuple[float, float], progress: Progress
    ) -> None:
        self._store, self._field, self._valid, self._largest = store, field, valid, largest
        self._progress = progress
        self._all = np.flatnonzero(valid)
        self._lengths: np.ndarray | None = None
        self.damages: list[ObjectDamage] = []

    def check(self, array: ArraySpec, stated: CommittedObject) -> None:
        try:
            self._check(array, stated)
        except FileNotFoundError:
            self._add(stated, f"is missing; its receipt states {stated.bytes} bytes")
        except Unreadable as error:
            self._add(stated, str(error))

    def _check(self, array: ArraySpec, stated: CommittedObject) -> None:
        reader = self._store.open(stated.path)
        if reader.size != stated.bytes:
            self._add(stated, f"has {reader.size} bytes; its receipt states {stated.bytes}")
            return
        before = len(self.damages)
        if array.inner is None:
            sha256 = self._check_plain(reader, array, stated)
        else:
            sha256 = self._check_shard(reader, array, stated)
        if sha256 != stated.sha256 and len(self.damages) == before:
            self._add(stated, f"holds other bytes than were committed: sha256 {sha256[:12]}..., not "
                              f"{str(stated.sha256)[:12]}...")  # fmt: skip

    def _add(self, stated: CommittedObject, what: str, rows: np.ndarray | None = None) -> None:
        self.damages.append(ObjectDamage(stated.path, what, self._all if rows is None else rows))

    # --- one chunk in one object -------------------------------------------------------------------------

    def _check_plain(self, reader: RangeReader, array: ArraySpec, stated: CommittedObject) -> str:
        expected = len(self._valid) * array.row_bytes + 4
        if stated.bytes != expected:
            self._add(stated, f"has {stated.bytes} bytes; {len(self._valid)} rows need {expected}")
            return stated.sha256
        data = bytearray(expected)
        view, digest, checksum = memoryview(data), hashlib.sha256(), 0
        for offset in range(0, expected, PIECE_BYTES):
            piece = view[offset : offset + PIECE_BYTES]
            if reader.read_into([piece], offset) != len(piece):
                self._add(stated, f"ends before byte {offset + len(piece)} while it is read")
                return stated.sha256
            digest.update(piece)
            checksum = google_crc32c.extend(checksum, bytes(piece[: max(0, expected - 4 - offset)]))
            self._progress(len(piece))
        sha256 = digest.hexdigest()
        if checksum != struct.unpack("<I", data[-4:])[0]:
            self._add(stated, "fails its checksum")
            return sha256
        dtype = np.dtype(array.dtype).newbyteorder("<")
        values = np.frombuffer(data, dtype, count=(expected - 4) // dtype.itemsize)
        if sha256 == stated.sha256:
            self._check_numbers(values.reshape(len(self._valid), *array.row_shape), array, stated)
        return sha256

    def _check_numbers(self, values: np.ndarray, array: ArraySpec, stated: CommittedObject) -> None:
        """Valid numbers are finite; rows that are not valid, and positions past a length, hold the fill value."""
        field, positions = self._field, None
        if array.name == "length":
            most = field.row_shape[0]
            wrong = self._valid & ((values < 0) | (values > most))
            self._add_if(stated, wrong, f"states lengths outside 0 to {most}")
            if not wrong.any():
                self._lengths = values
        elif field.has_length and values.ndim > 1:
            if self._lengths is None:
                return
            positions = np.arange(field.row_shape[0]) < self._lengths[:, None]
        real = np.broadcast_to(_wide(self._valid, values.ndim), values.shape)
        if positions is not None:
            real = real & positions
        flat = values.reshape(len(values), -1)
        good = np.isfinite(values) if values.dtype.kind == "f" else np.ones(values.shape, bool)
        if array.name == "scale":
            mean, std = self._largest
            with np.errstate(over="ignore", invalid="ignore"):
                good &= (values > 0) & np.isfinite(values * np.float32(127) * np.float32(std) + np.float32(mean))
        elif values.dtype == np.int8:
            good = values != -128
        elif field.kind == "ids" and array.name == "values":
            good = values >= 0
        elif array.name == "classes":
            good = (values >= 0) & _are_distinct(values)
        elif field.kind == "top_logits":
            good[:, 1:-1] &= values[:, 1:-1] <= values[:, :-2]  # in descending order; the last is the rest
        self._add_if(stated, (real & ~good).reshape(len(flat), -1).any(axis=1), "holds numbers that cannot be")
        filled = np.isnan(values) if values.dtype.kind == "f" else values == 0
        self._add_if(
            stated, (~real & ~filled).reshape(len(flat), -1).any(axis=1), "holds numbers where there is nothing"
        )

    def _add_if(self, stated: CommittedObject, wrong: np.ndarray, what: str) -> None:
        if wrong.any():
            self._add(stated, what, np.flatnonzero(wrong & self._valid))

    # --- many chunks in one object -----------------------------------------------------------------------

    def _check_shard(self, reader: RangeReader, array: ArraySpec, stated: CommittedObject) -> str:
        """Chunk by chunk, in the order of the file. Returns the SHA-256 of the whole."""
        index_bytes = len(self._valid) * array.tiles * 16 + 4
        if stated.bytes < index_bytes:
            self._add(stated, f"has {stated.bytes} bytes; its index alone needs {index_bytes}")
            return stated.sha256
        tail = bytearray(index_bytes)
        count = reader.read_into([memoryview(tail)], stated.bytes - index_bytes)
        places = None
        if count != index_bytes or google_crc32c.value(bytes(tail[:-4])) != struct.unpack("<I", tail[-4:])[0]:
            self._add(stated, "has an index that fails its checksum")
        else:
            index = np.frombuffer(bytes(tail[:-4]), "<u8").reshape(len(self._valid), array.tiles, 2)
            places = self._chunk_rows(index, array, stated)
        digest, offset = hashlib.sha256(), 0
        stride = array.inner_bytes + 4
        step = stride * max(1, PIECE_BYTES // stride) if places is not None else PIECE_BYTES
        body = stated.bytes - index_bytes
        buffer = memoryview(bytearray(min(step, body)))
        broken: list[int] = []
        strange: list[int] = []
        while offset < body:
            piece = buffer[: min(step, body - offset)]
            if reader.read_into([piece], offset) != len(piece):
                self._add(stated, f"ends at byte {offset} while it is read")
                return stated.sha256
            digest.update(piece)
            if places is not None:
                here = places[offset // stride : (offset + len(piece)) // stride]
                self._check_chunks(piece, array, here, broken, strange)
            offset += len(piece)
            self._progress(len(piece))
        digest.update(tail)
        if broken:
            chunks = "chunk" if len(broken) == 1 else "chunks"
            self._add(stated, f"has {len(broken)} {chunks} that fail the checksum", np.unique(broken))
        if strange:
            self._add(stated, "holds numbers that cannot be", np.unique(strange))
        return digest.hexdigest()

    def _chunk_rows(self, index: np.ndarray, array: ArraySpec, stated: CommittedObject) -> np.ndarray | None:
        """(row, tile) of every chunk of the file, in its order; None if the index is not as it must be."""
        starts, sizes = index[..., 0], index[..., 1]
        present = (starts != ABSENT) | (sizes != ABSENT)
        expected: np.ndarray | None = np.repeat(self._valid[:, None], array.tiles, axis=1)
        if self._field.is_ragged:
            expected = None
            if self._lengths is not None:
                tiles = -(-self._lengths // TEXT_TILE)
                expected = (np.arange(array.tiles) < tiles[:, None]) & self._valid[:, None]
        if expected is not None and (present != expected).any():
            lost = (expected & ~present).any(axis=1)
            what = "lacks chunks of rows that are valid" if lost.any() else "holds chunks of rows that are not there"
            self._add(stated, what, np.flatnonzero(lost))
            return None
        stride = array.inner_bytes + 4
        places = np.argwhere(present)
        body = len(places) * stride
        if (
            (sizes[present] != stride).any()
            or (starts[present] != np.arange(len(places), dtype=np.uint64) * np.uint64(stride)).any()
            or body + index.nbytes + 4 != stated.bytes
        ):
            self._add(stated, "has an index whose chunks overlap, leave gaps or lie outside the file")
            return None
        return places

    def _check_chunks(
        self, piece: memoryview, array: ArraySpec, places: np.ndarray, broken: list[int], strange: list[int]
    ) -> None:
        size, dtype = array.inner_bytes, np.dtype(array.dtype).newbyteorder("<")
        for i, (row, tile) in enumerate(places.tolist()):
            chunk = piece[i * (size + 4) : (i + 1) * (size + 4)]
            if google_crc32c.value(bytes(chunk[:size])) != struct.unpack("<I", chunk[size:])[0]:
                broken.append(row)
                continue
            values = np.frombuffer(chunk, dtype, count=size // dtype.itemsize)
            if _strange(values):
                strange.append(row)
            elif self._lengths is not None:
                here = int(self._lengths[row]) - tile * TEXT_TILE
                if here < TEXT_TILE and values.reshape(TEXT_TILE, -1)[max(here, 0) :].any():
                    strange.append(row)


def _are_distinct(values: np.ndarray) -> np.ndarray:
    """bool [N, 1]: whether no number of a row comes twice."""
    ordered = np.sort(values, axis=1)
    distinct: np.ndarray = (ordered[:, 1:] != ordered[:, :-1]).all(axis=1, keepdims=True)
    return distinct


def _wide(rows: np.ndarray, ndim: int) -> np.ndarray:
    return rows.reshape(-1, *[1] * (ndim - 1))


def _strange(values: np.ndarray) -> bool:
    """Whether inf, NaN or -128 is among stored numbers."""
    if values.dtype == np.float16:
        return bool(((values.view("<u2") & 0x7C00) == 0x7C00).any())
    if values.dtype.kind == "f":
        return not np.isfinite(values).all()
    return values.dtype == np.int8 and bool((values == -128).any())


def largest_statistics(statistics: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """The largest |mean| and |std| of an int8 field, for `check_block`."""
    return float(np.abs(statistics["mean"]).max()), float(np.abs(statistics["std"]).max())
