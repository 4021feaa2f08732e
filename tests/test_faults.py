"""Every call that changes the disk fails in turn, or takes the power with it: nothing committed is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from emkum.errors import EmkumError, StorageFailure
from emkum.shards import durable, staging
from emkum.shards.claims import CLAIMS, Claims, block_key
from emkum.shards.codec import encode
from emkum.shards.digest import digest
from emkum.shards.fingerprint import Fingerprint
from emkum.shards.layout import FieldSpec
from emkum.shards.store import LocalStore
from emkum.shards.tars import PictureMember, SourceSample, SourceTar
from emkum.shards.verify import verify
from emkum.shards.views import ViewPolicy
from emkum.shards.writer import CacheWriter
from tests.conftest import TORTURE_MINUTES
from tests.faulty_os import FaultyOs, PowerCut

CLS = FieldSpec("teacher/t/image/cls", "pooled", "float32", (4,))
TOKENS = FieldSpec("teacher/t/image/patches", "tokens", "int8", (40, 4))
BLOCKS = 2
PIECE_BYTES = 1024  # a block of tokens has two and a half
STATISTICS = np.zeros(4, np.float32), np.ones(4, np.float32)


@pytest.fixture(scope="module", autouse=True)
def small_pieces() -> Iterator[None]:
    """Threads fill and hash; whole pieces pass by the page cache, what follows a write that was cut short does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "PIECE_BYTES", PIECE_BYTES)
        patch.setattr(durable, "PIECE_BYTES", PIECE_BYTES)
        yield


def fill(path: Path, committed: list[tuple[str, int]]) -> None:
    """Makes a cache with a network, a segment, two fields and two blocks, or finishes one, as an extraction does.

    committed: receives what `commit` has promised, as it is promised.
    """
    store = LocalStore(path)
    with Claims(store) as claims:
        with claims.planning(join=False):
            writer = CacheWriter(store, 16)
            writer.keep_network("t", {"model.safetensors": b"weights", "model.json": b"{}\n"})
            if not writer.segments:
                pictures = [PictureMember(512 * i, 9, "jpg") for i in range(20)]
                samples = tuple(SourceSample(f"k{p.offset}", p, (), "", None, None) for p in pictures)
                writer.append_segment("train", ViewPolicy(), [SourceTar("a.tar", "a.tar", 9, "0" * 64, samples, {}, 0)])
            for field, statistics in ((CLS, None), (TOKENS, STATISTICS)):
                fingerprint = Fingerprint(field.kind, field.storage, field.row_shape)
                writer.declare_field(field, fingerprint, {}, statistics)
                writer.grow_field(field, 1)
        for block in range(BLOCKS):
            claim = claims.take(block_key("image", block, 0))
            assert claim is not None
            claim.touched = True
            for field, statistics in ((CLS, (None, None)), (TOKENS, STATISTICS)):
                if writer.is_committed(field.name, block, 0):
                    continue
                with writer.block(field, writer.segments[0], block, 0, claim.check) as rows:
                    count = 16 if block == 0 else 4
                    values = np.full((count, *field.row_shape), block + 0.5, np.float32)
                    rows.append(encode(values, field.storage, *statistics))
                    rows.commit()
                    committed.append((field.name, block))
            claim.release()


def bury(path: Path) -> None:
    """The process of all claims is dead from now on."""
    for claim in (path / CLAIMS).glob("*.json"):
        try:
            claim.write_text(json.dumps(json.loads(claim.read_text()) | {"started": 1}))
        except ValueError:
            claim.unlink()  # emptied by the power cut; its age would decide


def run(path: Path, monkeypatch: pytest.MonkeyPatch, faulty: FaultyOs) -> list[tuple[str, int]]:
    """`fill` under a fault. Returns what was committed."""
    committed: list[tuple[str, int]] = []
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", faulty)
        with contextlib.suppress(PowerCut, StorageFailure):  # anything else is a bug of ours
            fill(path, committed)
    if "power" in faulty.mode:
        faulty.cut_power()
    bury(path)
    return committed


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """(digest of an uninterrupted run, number of calls that change the disk in it)."""
    path, faulty = tmp_path_factory.mktemp("whole") / "cache", FaultyOs(fail_at=10**9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "os", faulty)
        fill(path, [])
    assert len(faulty.calls) > 200
    return digest(LocalStore(path)), len(faulty.calls)


def test_the_calls_come_in_one_order_whatever_the_threads_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[str, int]
) -> None:
    """Otherwise the sweep below would not meet every call. Names apart, which bear tokens and process numbers."""
    orders = []
    for number in range(3):
        faulty = FaultyOs(fail_at=10**9)
        run(tmp_path / f"cache{number}", monkeypatch, faulty)
        orders.append([re.sub(r"(cache\d|[0-9a-f]{8,})", "", call) for call in faulty.calls])
    assert orders[0] == orders[1] == orders[2]
    assert len(orders[0]) == whole[1]
    writes = sum(re.match(r"write .*/patches/values/\.c\.0\.", call) is not None for call in orders[0])
    assert writes >= 4, "the first is cut short by this os; the rest of it, another piece, and the remainder"


def go_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fill` without faults, and without waiting for the disk."""
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", FaultyOs(fail_at=10**9))
        fill(path, [])


def check_survival(path: Path, committed: list[tuple[str, int]], what: str) -> None:
    """Whatever was promised is there and whole; nothing that is there is damaged."""
    if not (path / "zarr.json").exists():
        assert not committed, what
        return
    report = verify(LocalStore(path))
    assert not report.findings, (what, report.findings)
    writer = CacheWriter(path)
    for field, block in committed:
        assert writer.is_committed(field, block, 0), (what, field, block)


@pytest.mark.parametrize(
    ("mode", "sticky", "stride"),
    [
        ("error", True, 7),
        ("error", False, 9),
        ("torn", True, 11),
        ("power", True, 5),
        ("power, data only", True, 9),
    ],
)
def test_a_fault_at_every_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[str, int], mode: str, sticky: bool, stride: int
) -> None:
    expected, calls = whole
    for n in range(0, calls, 1 if TORTURE_MINUTES else stride):  # strides: every kind of call is met; all in torture
        path = tmp_path / "cache"
        faulty = FaultyOs(n, mode, sticky, errno.ENOSPC if n % 2 else errno.EIO)
        committed = run(path, monkeypatch, faulty)
        assert faulty.failed
        what = f"{mode} at call {n}: {faulty.calls[n]}"
        check_survival(path, committed, what)
        go_on(path, monkeypatch)
        assert digest(LocalStore(path)) == expected, what
        assert not list(path.rglob("*.tmp")), what
        shutil.rmtree(path)


@pytest.mark.parametrize("seed", range(400 if TORTURE_MINUTES else 20))
def test_faults_while_going_on_after_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[str, int], seed: int
) -> None:
    expected, calls = whole
    draw, path, promised = random.Random(seed), tmp_path / "cache", []
    for _ in range(4):
        mode = draw.choice(["error", "torn", "power", "power, data only"])
        promised += run(path, monkeypatch, FaultyOs(draw.randrange(calls), mode, draw.random() < 0.5))
        check_survival(path, promised, f"seed {seed}")
    go_on(path, monkeypatch)
    assert digest(LocalStore(path)) == expected


def test_the_power_cut_finds_a_protocol_without_syncs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[str, int]
) -> None:
    """The test of the test: without fsync, of files or of folders, a cut loses what was promised."""
    _, calls = whole

    class NoFileSync(FaultyOs):
        def fsync(self, handle: int) -> None:
            if not self._paths[handle].is_file():
                super().fsync(handle)

    class NoFolderSync(FaultyOs):
        def fsync(self, handle: int) -> None:
            if self._paths[handle].is_file():
                super().fsync(handle)

    for kind in (NoFileSync, NoFolderSync):
        losses = 0
        for n in range(calls // 2, calls - 40, 13):
            path = tmp_path / "cache"
            committed = run(path, monkeypatch, kind(n, "power", True))
            try:
                check_survival(path, committed, "")
            except (AssertionError, EmkumError):
                losses += 1
            shutil.rmtree(path, ignore_errors=True)
        assert losses
