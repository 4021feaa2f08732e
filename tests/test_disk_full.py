"""A disk that is full, over quota, read-only or not ours: said beforehand where it can be known, else survived."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emkum.errors import StorageFailure
from emkum.shards import durable
from emkum.shards.claims import Claims
from emkum.shards.digest import digest
from emkum.shards.reader import Cache
from emkum.shards.store import LocalStore
from emkum.shards.verify import verify
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.extract import extract
from emkum.stage1_extract.writing import Writing
from tests.extraction import Extraction, Running, make_pictures, save_teacher, temporaries

TOKENS = "image/wide@0/tokens"
ROWS, BLOCKS = 64, 3
OBJECT_BYTES = ROWS * (257 * 64 * 4 + 4) + ROWS * 16 + 4

BLOCK_BYTES = OBJECT_BYTES + ROWS * 64 * 4 + 4 + ROWS * 10 * 4 + 4  # with cls and boxes


@pytest.fixture(scope="module")
def extraction(tmp_path_factory: pytest.TempPathFactory) -> Extraction:
    """Three blocks whose largest object has 4.0 MiB."""
    folder = tmp_path_factory.mktemp("source")
    make_pictures(folder / "a.tar", ROWS * BLOCKS)
    return Extraction(save_teacher(folder / "wide"), folder / "a.tar", ROWS, more=("--batch-size", "16"))


@pytest.fixture(scope="module")
def config(extraction: Extraction) -> ExtractConfig:
    """The same extraction as a call."""
    return ExtractConfig(
        teacher=(str(extraction.teacher),),
        data=(str(extraction.data),),
        targets=("cls",),
        storage="float32",
        compute="float32",
        size=64,
        rows_per_block=ROWS,
        batch_size=16,
        threads=2,
        device="cpu",
    )


@pytest.fixture(scope="module")
def whole(config: ExtractConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of an uninterrupted run."""
    cache = tmp_path_factory.mktemp("whole") / "cache"
    extract(replace(config, cache=cache), say=lambda line: None)
    return digest(str(cache))


def blocks(cache: Path) -> int:
    return len(Cache.open(cache).fields[TOKENS].receipts)


def check_stopped(cache: Path, num_blocks: int) -> None:
    """Nothing unfinished is left; what was committed is whole."""
    assert temporaries(cache) == []
    assert not verify(LocalStore(cache)).findings
    assert blocks(cache) == num_blocks


# --- before anything is extracted --------------------------------------------------------------------------


def test_too_little_room_is_said_to_the_byte_before_anything_is_extracted(
    config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    needed = BLOCKS * BLOCK_BYTES
    monkeypatch.setattr(LocalStore, "free_bytes", lambda self: needed - 1)
    with pytest.raises(StorageFailure, match=rf"need {needed:,} bytes in {cache}, {needed - 1:,} are free") as caught:
        extract(replace(config, cache=cache), say=lambda line: None)
    assert caught.value.exit_code == 7
    assert caught.value.way_out.startswith("free 1 bytes more")
    assert not (cache / "_emkum" / "fields").exists()
    monkeypatch.setattr(LocalStore, "free_bytes", lambda self: needed)
    extract(replace(config, cache=cache), say=lambda line: None)
    written = sum(o.bytes for f in Cache.open(cache).fields.values() for r in f.receipts.values() for o in r.objects)
    assert written == needed


def test_room_that_others_have_begun_to_fill_is_not_asked_for_twice(
    config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    with Claims(LocalStore(cache)) as others:
        with others.planning(join=False):
            pass
        monkeypatch.setattr(LocalStore, "free_bytes", lambda self: BLOCKS * BLOCK_BYTES - 1)
        extract(replace(config, cache=cache, join=True), say=lambda line: None)
    assert blocks(cache) == BLOCKS


# --- in the middle -----------------------------------------------------------------------------------------


class FullOs:
    """The `os` of durable on a disk with room for so many bytes."""

    def __init__(self, room: int, number: int) -> None:
        self.room, self.number, self.writes_after = room, number, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, handle: int, data: memoryview) -> int:
        if self.room <= 0:
            self.writes_after += 1
            raise OSError(self.number, os.strerror(self.number))
        count = os.write(handle, data[: self.room])
        self.room -= count
        return count


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=["disk full", "over quota"])
def test_no_room_in_the_middle_stops_within_a_batch_and_keeps_what_is_committed(
    number: int, config: ExtractConfig, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room runs out in the first batch of the second block."""
    cache = tmp_path / "cache"
    extract(replace(config, cache=cache), say=lambda line: None)  # all that is not blocks is there
    for path in [*(cache / "_emkum" / "receipts").rglob("*.json"), *cache.rglob("c.*")]:
        path.unlink()
    full = FullOs(OBJECT_BYTES + 200_000, number)
    seen: list[int] = []
    monkeypatch.setattr(durable, "os", full)
    monkeypatch.setattr(LocalStore, "free_bytes", lambda self: 10**12)
    put = Writing.put
    monkeypatch.setattr(Writing, "put", lambda self, finished: (put(self, finished), seen.append(full.writes_after))[0])
    room = (
        f"no room to write {cache}/.*: {os.strerror(number)}; the blocks that are left need at most {{}}, {{}} are free"
    )
    left = 2 * BLOCK_BYTES
    with pytest.raises(StorageFailure, match=room.format(f"{left:,} bytes", f"{10**12:,}")) as caught:
        extract(replace(config, cache=cache), say=lambda line: None)
    assert caught.value.exit_code == 7
    assert "run the same command again: committed blocks are kept" in caught.value.way_out
    assert sum(writes > 0 for writes in seen) <= 1, "it went on for more than a batch"
    monkeypatch.undo()
    check_stopped(cache, 1)
    extract(replace(config, cache=cache), say=lambda line: None)
    assert digest(str(cache)) == whole


def test_a_file_size_limit_ends_with_7_and_the_same_command_goes_on(
    extraction: Extraction, whole: str, tmp_path: Path
) -> None:
    """RLIMIT_FSIZE with SIGXFSZ ignored: a write beyond it fails with EFBIG, as one beyond a quota does."""
    cache = tmp_path / "cache"

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (OBJECT_BYTES - 1000, resource.RLIM_INFINITY))

    done = _run(extraction, cache, preexec_fn=limited)
    assert done.returncode == 7, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(r"emkum: StorageFailure: no room to write \S+: File too large; .* same command again: .*", last)
    assert "Traceback" not in done.stderr
    check_stopped(cache, 0)
    extraction.finish(cache)
    assert digest(str(cache)) == whole


def _run(extraction: Extraction, cache: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "emkum.cli", *extraction.arguments(cache)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, **more)


# --- real file systems -------------------------------------------------------------------------------------


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this user may not mount here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 8 MiB: not enough for two blocks."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("a small tmpfs needs root, to mount it")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk))
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_small_disk_is_refused_first_and_survived_when_others_fill_it(
    extraction: Extraction, whole: str, small_disk: Path
) -> None:
    cache = small_disk / "cache"
    done = _run(extraction, cache)
    assert done.returncode == 7, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(r"the missing blocks need [\d,]+ bytes in .*, [\d,]+ are free \| free [\d,]+ bytes more", last)
    assert not (cache / "_emkum" / "fields").exists()

    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    hog, module = small_disk / "hog", "emkum.stage1_extract.extract"
    # Between the preflight and the first block somebody else fills the disk but for 6 MiB.
    driver = f"""
import {module} as extraction, os
real = extraction._declare
def declare(*arguments):
    real(*arguments)
    status = os.statvfs({str(small_disk)!r})
    with open({str(hog)!r}, "wb") as file:
        file.write(bytes(status.f_bavail * status.f_frsize - (6 << 20)))
extraction._declare = declare
from emkum.cli import main
main()
"""
    log = small_disk.with_name("small.log")
    with log.open("wb") as handle:
        process = subprocess.Popen([sys.executable, "-c", driver, *extraction.arguments(cache)], stderr=handle)
        running = Running(process, log)
        try:
            assert running.wait() == 7, running.text()
        finally:
            process.kill()
    assert re.search(r"StorageFailure: no room to write \S+: No space left on device; the blocks", running.last_line)
    assert temporaries(cache) == []
    assert not verify(LocalStore(cache)).findings
    before = blocks(cache)
    assert before < BLOCKS
    hog.unlink()
    assert _run(extraction, cache).returncode == 0
    assert digest(str(cache)) == whole


def test_a_read_only_disk_ends_with_7_and_changes_nothing(extraction: Extraction, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = _run(extraction, small_disk / "cache")
    assert done.returncode == 7, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "StorageFailure: cannot write" in last
    assert last.endswith("Read-only file system | make the folder writable or choose another")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES], ids=["read-only", "no permission"])
def test_a_folder_that_may_not_be_written_is_named(
    number: int, config: ExtractConfig, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle: a disk that turns read-only after an error, a folder of somebody else."""
    cache = tmp_path / "cache"
    full = FullOs(2 * OBJECT_BYTES, number)
    monkeypatch.setattr(durable, "os", full)
    with pytest.raises(StorageFailure, match=rf"cannot write {cache}/.*: {os.strerror(number)}") as caught:
        extract(replace(config, cache=cache), say=lambda line: None)
    assert caught.value.way_out == "make the folder writable or choose another"
    monkeypatch.undo()
    assert temporaries(cache) == []
    assert not verify(LocalStore(cache)).findings
    extract(replace(config, cache=cache), say=lambda line: None)
    assert digest(str(cache)) == whole
