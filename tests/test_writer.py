"""The writer: large files in pieces that are filled, hashed and written at once; whatever happens, the same bytes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
import time
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emkum.errors import StorageFailure
from emkum.shards import durable, staging
from emkum.shards.codec import Encoded, Summary, encode
from emkum.shards.durable import DurableFile
from emkum.shards.fingerprint import Fingerprint
from emkum.shards.layout import FieldSpec
from emkum.shards.reader import Cache
from emkum.shards.staging import NUM_PIECES, PIECE_BYTES
from emkum.shards.tars import PictureMember, SourceSample, SourceTar
from emkum.shards.views import ViewPolicy
from emkum.shards.writer import BlockWriter, CacheWriter
from emkum.stage1_extract.encode import Output, encode_outputs

SMALL = 4096  # bytes of a piece, where a test asks for `small_pieces`
ROWS = 32
TOKENS = FieldSpec("image/t@0/tokens", "tokens", "float16", (17, 40))
RAGGED = FieldSpec("teacher/t/text/layers", "ragged", "float16", (48, 24))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PIECE_BYTES", SMALL)
    monkeypatch.setattr(durable, "PIECE_BYTES", SMALL)


def block_of(path: Path, field: FieldSpec, rows: int = ROWS) -> BlockWriter:
    """Of a new cache with one field and one block of so many rows."""
    writer = CacheWriter(path, ROWS)
    samples = tuple(
        SourceSample(f"k{i}", PictureMember(512 * (i + 1), 9, "jpg"), ("a caption",), "txt", None, None)
        for i in range(rows)
    )
    writer.append_segment("train", ViewPolicy(), [SourceTar("a.tar", "a.tar", 9, "0" * 64, samples, {}, 0)])
    statistics = None
    if field.storage == "int8":
        statistics = np.full(field.row_shape[-1], 0.25, np.float32), np.full(field.row_shape[-1], 1.5, np.float32)
    writer.declare_field(field, Fingerprint(field.kind, field.storage, field.row_shape), {}, statistics)
    writer.grow_field(field, 1)
    return writer.block(field, writer.segments[0], 0, 0)


def random_rows(field: FieldSpec, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(5).normal(0, 2, (rows, *field.row_shape)).astype(np.float32)


def stored_rows(field: FieldSpec, rows: int = ROWS) -> Encoded:
    return Encoded(random_rows(field, rows).astype(field.storage), None, None, Summary())


def unfinished(folder: Path) -> list[Path]:
    return list(folder.rglob("*.tmp"))


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [1000, SMALL, 3 * SMALL + 5, 10**6])
@pytest.mark.parametrize("size", [0, 1, SMALL - 1, SMALL, SMALL + 1, 5 * SMALL, 11 * SMALL + 7])
def test_a_file_is_what_was_written_in_parts_of_any_size(
    size: int, part: int, tmp_path: Path, small_pieces: None
) -> None:
    data = np.random.default_rng(size).bytes(size)
    with DurableFile(tmp_path / "file") as file:
        for start in range(0, size, part):
            file.write(data[start : start + part])
        assert file.num_bytes == size
        assert file.commit() == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "file").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_pieces_of_the_size_in_use(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes((NUM_PIECES + 2) * PIECE_BYTES + 12_345)
    with DurableFile(tmp_path / "file") as file:
        file.write_all(iter([memoryview(data)[i : i + 302_596] for i in range(0, len(data), 302_596)]))
        assert len(file._staging._buffers) == NUM_PIECES, "memory: these pieces, whatever the file's length"
        assert file.commit() == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "file").read_bytes() == data


def test_numbers_are_written_as_their_bytes_and_let_go(tmp_path: Path) -> None:
    numbers = np.arange(24, dtype=np.float32).reshape(4, 6)
    data, gone = numbers.tobytes(), weakref.ref(numbers)
    with DurableFile(tmp_path / "file") as file:
        file.write(numbers.data)
        del numbers
        assert gone() is None
        assert file.num_bytes == len(data)
        file.commit()
    assert (tmp_path / "file").read_bytes() == data


class WatchedOs:
    """The `os` of durable. Notes who writes, and which writes pass by the page cache; refuses and shortens some.

    short: of each write at most so many bytes are carried out. refuse: writes that pass by the page cache fail so.
    """

    def __init__(self, short: int = 1 << 40, refuse: int = 0) -> None:
        self.short, self.refuse = short, refuse
        self.direct: list[bool] = []
        self.threads: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        self.threads.add(threading.get_ident())
        return getattr(os, name)

    def write(self, handle: int, data: memoryview) -> int:
        self.threads.add(threading.get_ident())
        direct = bool(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT)
        if direct and self.refuse:
            raise OSError(self.refuse, os.strerror(self.refuse))
        self.direct.append(direct)
        return os.write(handle, data[: self.short])


def passes_the_page_cache(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
        return True
    except OSError:
        return False


def write_watched(folder: Path, watched: WatchedOs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten pieces and a half."""
    data = np.random.default_rng(1).bytes(10 * SMALL + 77)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", watched)
        with DurableFile(folder / "file") as file:
            file.write(data)
            file.commit()
    assert (folder / "file").read_bytes() == data


def test_whole_pieces_pass_by_the_page_cache_and_the_rest_does_not(
    tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not passes_the_page_cache(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    watched = WatchedOs()
    write_watched(tmp_path, watched, monkeypatch)
    assert watched.direct == [True] * 10 + [False]


@pytest.mark.parametrize("short", [1, 700, 2048, SMALL - 1])
def test_writes_that_are_cut_short_go_on(
    short: int, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not all of a disk's block was written: the rest of the file goes through the page cache."""
    watched = WatchedOs(short)
    write_watched(tmp_path, watched, monkeypatch)
    assert len(watched.direct) > 11
    assert not watched.direct[-1]


def test_a_file_system_that_refuses_such_writes_gets_others(
    tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = WatchedOs(refuse=errno.EINVAL)
    write_watched(tmp_path, watched, monkeypatch)
    assert watched.direct == [False] * 11


def test_a_file_system_without_the_flag_gets_other_writes(
    tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fcntl.fcntl

    def refuse(handle: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return plain(handle, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    watched = WatchedOs()
    write_watched(tmp_path, watched, monkeypatch)
    assert watched.direct == [False] * 11


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_is_not_asked_again_in_another_way(
    number: int, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not passes_the_page_cache(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    with pytest.raises(StorageFailure, match=os.strerror(number)):
        write_watched(tmp_path, WatchedOs(refuse=number), monkeypatch)
    assert not unfinished(tmp_path)


# --- threads -----------------------------------------------------------------------------------------------


def test_one_thread_makes_all_calls_that_change_the_disk(
    tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = WatchedOs()
    with block_of(tmp_path / "c", TOKENS) as block:
        monkeypatch.setattr(durable, "os", watched)
        for first in range(0, ROWS, 8):
            rows = stored_rows(TOKENS)
            block.append(Encoded(rows.values[first : first + 8], None, None, Summary()))
        block.commit()
    assert len(watched.direct) > 10
    assert watched.threads == {threading.get_ident()}


def test_a_piece_is_written_while_the_next_is_filled(
    tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, filling, met = threading.Event(), threading.Event(), []

    class Meeting(WatchedOs):
        def write(self, handle: int, data: memoryview) -> int:
            writing.set()
            met.append(filling.wait(5))
            return super().write(handle, data)

    def parts() -> Iterator[memoryview]:
        yield memoryview(bytes(SMALL))
        filling.set()
        met.append(writing.wait(5))
        yield memoryview(bytes(SMALL))

    monkeypatch.setattr(durable, "os", Meeting())
    with DurableFile(tmp_path / "file") as file:
        file.write_all(parts())
        file.commit()
    assert met == [True] * 3


def test_no_thread_is_left_and_a_file_of_one_piece_needs_none(
    tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    with DurableFile(tmp_path / "large") as large:
        large.write(bytes(10 * SMALL))
        assert {thread.name for thread in set(threading.enumerate()) - before} == {"sha256_0", "stage_0"}
    assert set(threading.enumerate()) == before
    with DurableFile(tmp_path / "small") as small:
        small.write(bytes(SMALL - 1))
        assert set(threading.enumerate()) == before
        small.commit()


class SlowHash:
    """Reads what it is given some time after it got it."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        time.sleep(0.01)
        self.digest.update(data)

    def hexdigest(self) -> str:
        return self.digest.hexdigest()


def test_no_piece_is_filled_again_before_it_is_hashed(tmp_path: Path, small_pieces: None) -> None:
    data = np.random.default_rng(3).bytes(12 * SMALL)
    with DurableFile(tmp_path / "file") as file:
        file._staging._digest = SlowHash()  # type: ignore[assignment]
        file.write(data)
        assert file.commit() == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "file").read_bytes() == data


class Unhashable:
    def update(self, data: memoryview) -> None:
        raise MemoryError("no hash")


@pytest.mark.parametrize("pieces", [1, 2, 10], ids=["at commit", "at commit, of a thread", "at the next write"])
def test_what_the_hash_fails_with_is_raised(pieces: int, tmp_path: Path, small_pieces: None) -> None:
    def work() -> None:
        with DurableFile(tmp_path / "file") as file:
            file._staging._digest = Unhashable()  # type: ignore[assignment]
            file.write(bytes(pieces * SMALL - 1))
            assert pieces < 10
            file.commit()

    with pytest.raises(MemoryError, match="no hash"):
        work()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("good", [0, 2, 30])
def test_what_the_parts_fail_with_is_raised_and_nothing_is_left(good: int, tmp_path: Path, small_pieces: None) -> None:
    def parts() -> Iterator[memoryview]:
        for _ in range(good):
            yield memoryview(bytes(1000))
        raise ValueError("no such part")

    with pytest.raises(ValueError, match="no such part"), DurableFile(tmp_path / "file") as file:
        file.write_all(parts())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_waits_for_the_thread_that_fills(
    tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would read the caller's rows after they were given back."""
    begun = threading.Event()

    class Broken(WatchedOs):
        def write(self, handle: int, data: memoryview) -> int:
            begun.wait(5)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def parts() -> Iterator[memoryview]:
        yield memoryview(bytes(SMALL))
        begun.set()
        time.sleep(0.2)
        yield memoryview(bytes(SMALL))

    monkeypatch.setattr(durable, "os", Broken())
    with pytest.raises(StorageFailure), DurableFile(tmp_path / "file") as file:
        file.write_all(parts())
    assert begun.is_set()
    assert all(thread.name != "stage_0" for thread in threading.enumerate())
    assert list(tmp_path.iterdir()) == []


# --- blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [TOKENS, RAGGED], ids=lambda field: field.kind)
@pytest.mark.parametrize("batch", [1, 5, ROWS])
def test_a_block_has_the_same_bytes_in_batches_of_any_size_and_pieces_of_any_size(
    field: FieldSpec, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = random_rows(field)
    length = np.random.default_rng(2).integers(0, 49, ROWS).astype(np.int32) if field is RAGGED else None
    digests = set()
    for name, piece_bytes, rows in (("whole", PIECE_BYTES, ROWS), ("pieces", SMALL, batch)):
        monkeypatch.setattr(staging, "PIECE_BYTES", piece_bytes)
        monkeypatch.setattr(durable, "PIECE_BYTES", piece_bytes)
        with block_of(tmp_path / name, field) as block:
            for first in range(0, ROWS, rows):
                here = slice(first, first + rows)
                block.append(encode(values[here], "float16", length=None if length is None else length[here]))
            receipt = block.commit()
        digests.add(tuple(o.sha256 for o in receipt.objects))
        for listed in receipt.objects:
            data = (tmp_path / name / listed.path).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (listed.bytes, listed.sha256)
        read = Cache.open(tmp_path / name).field(field.name).values(np.arange(ROWS))
        want = values.astype(np.float16).astype(np.float32)
        if length is not None:
            want[np.arange(48) >= length[:, None]] = 0
        np.testing.assert_array_equal(read, want)
    assert len(digests) == 1


def test_rows_may_be_overwritten_once_they_are_appended(tmp_path: Path, small_pieces: None) -> None:
    """The loop that computes them uses its buffers again."""
    rows = stored_rows(TOKENS)
    buffer = np.empty((8, *TOKENS.row_shape), np.float16)
    with block_of(tmp_path / "c", TOKENS) as block:
        for first in range(0, ROWS, 8):
            buffer[:] = rows.values[first : first + 8]
            block.append(Encoded(buffer, None, None, Summary()))
            buffer[:] = -1
        block.commit()
    np.testing.assert_array_equal(Cache.open(tmp_path / "c").field(TOKENS.name).read(np.arange(ROWS)), rows.values)


def test_rows_that_lie_in_another_order_are_stored_alike(tmp_path: Path) -> None:
    rows = stored_rows(TOKENS)
    turned = np.ascontiguousarray(rows.values.transpose(2, 1, 0)).transpose(2, 1, 0)
    digests = set()
    for name, values in (("plain", rows.values), ("turned", turned)):
        with block_of(tmp_path / name, TOKENS) as block:
            block.append(Encoded(values, None, None, Summary()))
            digests.add(block.commit().objects[0].sha256)
    assert len(digests) == 1


def test_text_past_its_length_is_stored_as_zeros_and_stays_as_it_is_in_memory(tmp_path: Path) -> None:
    values = np.ones((ROWS, *RAGGED.row_shape), np.float16)
    length = np.full(ROWS, 17, np.int32)
    with block_of(tmp_path / "c", RAGGED) as block:
        block.append(Encoded(values, None, length, Summary()))
        path = tmp_path / "c" / block.commit().objects[0].path
    assert (values == 1).all()
    tile = np.dtype([("values", "<f2", (16, 24)), ("crc32c", "<u4")])
    tiles = np.fromfile(path, tile, count=2 * ROWS)["values"]
    assert (tiles[0::2] == 1).all()
    assert (tiles[1::2, 0] == 1).all()
    assert not tiles[1::2, 1:].any()


def test_a_block_is_written_with_a_few_pieces_of_memory(tmp_path: Path, small_pieces: None) -> None:
    """Beside the rows that the caller holds: nothing of their size is made of them."""
    field = FieldSpec("image/t@0/tokens", "tokens", "float16", (257, 384))
    rows = stored_rows(field)
    with block_of(tmp_path / "c", field) as block:
        tracemalloc.start()
        try:
            block.append(rows)
            block.commit()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert rows.values.nbytes > 6_000_000
    assert peak < 300_000


# --- the error of what is stored ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tokens", "pooled", "ragged", "text_pooled"])
@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize("by", ["numpy", "torch"])
def test_a_receipt_states_the_error_that_plain_float64_finds_in_the_stored_numbers(
    kind: Any, storage: str, by: str, tmp_path: Path
) -> None:
    """The numbers are decoded by the formula of docs/format.md, from the arrays as plain zarr reads them."""
    import zarr

    shape = {"tokens": (5, 24), "pooled": (24,), "ragged": (32, 24), "text_pooled": (24,)}[kind]
    space = "text" if "text" in kind or kind == "ragged" else "image"
    field = FieldSpec(f"teacher/t/{space}/layers", kind, storage, shape)
    values = random_rows(field) * np.exp(np.random.default_rng(8).normal(0, 1, 24)).astype(np.float32)
    length = np.random.default_rng(9).integers(1, 33, ROWS).astype(np.int32) if space == "text" else None
    statistics = (np.full(24, 0.25, np.float32), np.full(24, 1.5, np.float32)) if storage == "int8" else None
    with block_of(tmp_path / "c", field) as block:
        for first in range(0, ROWS, 10):  # sums over batches of different size
            here = slice(first, first + 10)
            cut = None if length is None else length[here]
            if by == "numpy":
                block.append(encode(values[here], storage, *(statistics or ()), length=cut))
            else:
                on_device = None if statistics is None else tuple(torch.from_numpy(s) for s in statistics)
                names = [f"k{i}" for i in range(len(values[here]))]
                output = Output(field.name, torch.from_numpy(values[here]), storage, names, on_device, cut)
                block.append(encode_outputs([output])()[field.name].encoded)
        error = block.commit().error

    group = zarr.open_group(tmp_path / "c", mode="r")
    read = {a: group[f"{field.name}/{a}"][:].astype(np.float64) for a in group[field.name].array_keys()}
    decoded = read["values"]
    if storage == "int8":
        decoded = decoded * read["scale"][..., None] * read["std"] + read["mean"]
    if space == "image":
        decoded = decoded[:, 0]
    decoded, exact = decoded[:ROWS], values.astype(np.float64)
    if kind == "ragged":
        assert length is not None
        real = np.arange(32) < length[:, None]
        decoded, exact = decoded[real], exact[real]
    assert error is not None
    assert error["relative_l2"] == pytest.approx(np.linalg.norm(decoded - exact) / np.linalg.norm(exact), rel=1e-4)
    assert error["max_abs"] == pytest.approx(np.abs(decoded - exact).max(), rel=1e-4)
    assert error["relative_l2"] < {"float16": 3e-4, "int8": 0.02}[storage]
