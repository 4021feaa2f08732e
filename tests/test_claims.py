"""Two writers never harm one cache: claims, heartbeats, take-over of the dead, fencing of those that come back."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from emkum import cli, errors
from emkum.shards import claims as claims_module
from emkum.shards import durable
from emkum.shards.claims import CLAIMS, Claims, block_key
from emkum.shards.codec import encode
from emkum.shards.fingerprint import Fingerprint
from emkum.shards.layout import SPACES, FieldSpec, Space
from emkum.shards.reader import Cache
from emkum.shards.store import LocalStore
from emkum.shards.tars import PictureMember, SourceSample, SourceTar
from emkum.shards.views import ViewPolicy
from emkum.shards.writer import CacheWriter
from tests.conftest import TORTURE_MINUTES
from tests.extraction import make_pictures, save_teacher

FIELD = FieldSpec("teacher/t/image/cls", "pooled", "float32", (4,))


def a_cache(path: Path, rows: int = 32) -> CacheWriter:
    """A cache with one segment and one declared field, nothing committed."""
    writer = CacheWriter(path, 16)
    samples = tuple(SourceSample(f"k{i}", PictureMember(512 * i, 10, "jpg"), (), "", None, None) for i in range(rows))
    writer.append_segment("train", ViewPolicy(), [SourceTar("a.tar", "a.tar", 9, "0" * 64, samples, {}, 0)])
    writer.declare_field(FIELD, Fingerprint("pooled", "float32", (4,)), {})
    writer.grow_field(FIELD, 1)
    return writer


def commit(writer: CacheWriter, block: int, value: float, check=lambda: None) -> None:
    with writer.block(FIELD, writer.segments[0], block, 0, check) as rows:
        rows.append(encode(np.full((16, 4), value, np.float32), "float32"))
        rows.commit()


def committed(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and "claims" not in str(p)}


def holder_elsewhere(store: LocalStore, name: str, seconds_ago: float = 0.0, **changes: object) -> Path:
    """The claim of a process on another machine, as it left it so many seconds ago."""
    record = {"token": "f" * 32, "host": "elsewhere", "pid": 7, "started": 1, "place": "b", "folder": ""}
    record["abandoned"] = False
    path = Path(store.where(f"{CLAIMS}/{name}.json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | changes))
    then = time.time() - seconds_ago
    os.utime(path, (then, then))
    return path


# --- claims alone ------------------------------------------------------------------------------------------


def test_one_of_many_gets_a_claim_and_the_others_do_not(tmp_path: Path) -> None:
    everybody = [Claims(LocalStore(tmp_path)) for _ in range(8)]
    got: list[Claims] = []
    barrier = threading.Barrier(8)

    def race(one: Claims) -> None:
        barrier.wait()
        if one.take("image-000000-0") is not None:
            got.append(one)

    threads = [threading.Thread(target=race, args=(one,)) for one in everybody]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    for one in everybody:
        one.__exit__(None, None, None)
    assert not list((tmp_path / CLAIMS).iterdir())


def test_a_claim_that_was_released_can_be_taken_again(tmp_path: Path) -> None:
    with Claims(LocalStore(tmp_path)) as first, Claims(LocalStore(tmp_path)) as second:
        claim = first.take("image-000000-0")
        assert claim is not None
        assert second.take("image-000000-0") is None
        assert second.take("image-000001-0") is not None
        claim.release()
        assert second.take("image-000000-0") is not None


def test_the_claim_of_a_dead_process_is_taken_over_at_once(tmp_path: Path) -> None:
    code = (
        "import os, sys; from emkum.shards.claims import Claims; from emkum.shards.store import LocalStore\n"
        "assert Claims(LocalStore(sys.argv[1])).take('image-000000-0'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
    assert [p.name for p in (tmp_path / CLAIMS).iterdir()] == ["image-000000-0.1.json"]
    with Claims(LocalStore(tmp_path)) as claims:
        claim = claims.take("image-000000-0")
        assert claim is not None
        assert claim.path.endswith(".2.json")
        claim.release()
    assert not list((tmp_path / CLAIMS).iterdir())


@pytest.mark.parametrize("space", SPACES)
def test_a_process_is_seen_by_its_claim_on_a_block_of_any_space(space: Space, tmp_path: Path) -> None:
    store, key = LocalStore(tmp_path), block_key(space, 3, 1)
    holder_elsewhere(store, f"{key}.1")
    assert (len(Claims(store).writers()), Claims(store).dead_keys()) == (1, [])
    holder_elsewhere(store, f"{key}.1", seconds_ago=120)
    assert (Claims(store).writers(), Claims(store).dead_keys()) == ([], [key])


def test_a_process_number_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with Claims(store) as claims:
        me = claims._me
        holder_elsewhere(store, "image-000000-0.1", host=me.host, pid=me.pid, place=me.place, started=me.started - 1)
        assert claims.take("image-000000-0") is not None


def test_a_holder_on_another_machine_is_dead_after_a_minute_without_heartbeat(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with Claims(store) as claims:
        path = holder_elsewhere(store, "image-000000-0.1", seconds_ago=50)
        assert claims.take("image-000000-0") is None
        os.utime(path, (time.time() - 70, time.time() - 70))
        assert claims.take("image-000000-0") is not None


def test_a_heartbeat_keeps_a_claim_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "HEARTBEAT_SECONDS", 0.05)
    store = LocalStore(tmp_path)
    with Claims(store) as claims:
        claim = claims.take("image-000000-0")
        assert claim is not None
        os.utime(store.where(claim.path), (1.0, 1.0))
        deadline = time.monotonic() + 20
        while store.modified(claim.path) < 2.0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert time.time() - store.modified(claim.path) < 30


def test_the_storages_clock_decides_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "_is_network", lambda folder: True)
    monkeypatch.setattr(time, "time", lambda: 4e9)  # our clock is far ahead of the file server's
    store = LocalStore(tmp_path)
    with Claims(store) as claims:
        path = Path(store.where(f"{CLAIMS}/image-000000-0.1.json"))
        path.parent.mkdir(parents=True)
        record = {"token": "f" * 32, "host": "elsewhere", "pid": 7, "started": 1, "place": "b", "folder": ""}
        path.write_text(json.dumps(record | {"abandoned": False}))
        assert claims.take("image-000000-0") is None


def test_a_copy_of_a_cache_is_not_held_by_who_writes_the_original(tmp_path: Path) -> None:
    a_cache(tmp_path / "cache")
    with Claims(LocalStore(tmp_path / "cache")) as claims:
        with claims.planning(join=False):
            pass
        assert claims.take("image-000000-0") is not None
        shutil.copytree(tmp_path / "cache", tmp_path / "copy")
        with Claims(LocalStore(tmp_path / "copy")) as other, other.planning(join=False):
            assert other.take("image-000000-0") is not None


def test_a_stopped_process_on_this_machine_is_dead_after_a_minute(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with Claims(store) as claims:
        me = claims._me
        alive = {"host": me.host, "pid": me.pid, "place": me.place, "started": me.started}
        path = holder_elsewhere(store, "image-000000-0.1", seconds_ago=50, **alive)
        assert claims.take("image-000000-0") is None
        os.utime(path, (time.time() - 70, time.time() - 70))
        assert claims.take("image-000000-0") is not None


def test_a_process_that_cannot_be_seen_counts_by_its_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    with Claims(store) as claims:
        path = holder_elsewhere(store, "image-000000-0.1", host=claims._me.host, place=claims._me.place, pid=1)
        monkeypatch.setattr(claims_module, "_started", lambda pid: None)  # /proc shows other users nothing
        assert claims.take("image-000000-0") is None
        os.utime(path, (1.0, 1.0))
        assert claims.take("image-000000-0") is not None


def test_two_heirs_of_one_dead_planner_do_not_both_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow heir saw the dead one, and creates its claim after the quick heir is done and a third one plans."""
    store = LocalStore(tmp_path)
    slow, quick, third = (Claims(LocalStore(tmp_path)) for _ in range(3))
    holder_elsewhere(store, "plan.1", seconds_ago=120)
    create = slow.store.create

    def late(path: str, data: bytes) -> bool:
        claim = quick.take("plan")
        assert claim is not None
        claim.release()
        assert third.take("plan") is not None
        return create(path, data)

    monkeypatch.setattr(slow.store, "create", late)
    assert slow.take("plan") is None
    for one in (slow, quick, third):
        one.__exit__(None, None, None)


def test_a_planner_that_was_taken_over_changes_nothing_more(tmp_path: Path) -> None:
    with Claims(LocalStore(tmp_path)) as stalled, stalled.planning(join=False):
        holder_elsewhere(LocalStore(tmp_path), "plan.1", seconds_ago=120, token=stalled._me.token)
        heir = Claims(LocalStore(tmp_path))
        assert heir.take("plan") is not None
        a_cache(tmp_path)
        before = committed(tmp_path)
        with pytest.raises(errors.ClaimLost):
            CacheWriter(tmp_path, None, stalled.check_planning).keep_network("t", {"model.json": b"{}"})
        with pytest.raises(errors.ClaimLost):
            CacheWriter(tmp_path, None, stalled.check_planning).grow_field(FIELD, 3)
        assert committed(tmp_path) == before
        heir.__exit__(None, None, None)


def test_a_writer_that_was_taken_for_dead_is_seen_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "HEARTBEAT_SECONDS", 0.05)
    with Claims(LocalStore(tmp_path)) as paused, paused.planning(join=False):
        pass
    paused = Claims(LocalStore(tmp_path))
    with paused, Claims(LocalStore(tmp_path)) as other:
        with paused.planning(join=False):
            pass
        assert paused._writer is not None
        paused.store.remove(paused._writer)
        deadline = time.monotonic() + 20
        while not other.writers() and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(errors.AnotherWriter):
            other.require_alone()


def test_without_hard_links_one_of_many_still_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: object, target: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(durable.os, "link", no_links)
    first, second = Claims(LocalStore(tmp_path)), Claims(LocalStore(tmp_path))
    assert first.take("plan") is not None
    assert second.take("plan") is None
    for one in (first, second):
        one.__exit__(None, None, None)


def test_a_first_claim_that_was_swept_while_it_was_written_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newcomer, link = Claims(LocalStore(tmp_path)), os.link

    def swept(source: str, target: str) -> None:
        monkeypatch.setattr(durable.os, "link", link)
        with Claims(LocalStore(tmp_path)) as other, other.planning(join=False):
            pass  # another process plans between the newcomer's write and its link
        link(source, target)

    monkeypatch.setattr(durable.os, "link", swept)
    assert newcomer.take("image-000000-0") is not None
    newcomer.__exit__(None, None, None)


def test_a_lost_field_record_is_written_again_only_by_the_settings_that_made_it(tmp_path: Path) -> None:
    writer = a_cache(tmp_path)
    commit(writer, 0, 1.0)
    record = tmp_path / "_emkum/fields" / f"{FIELD.name}.json"
    whole = record.read_bytes()
    record.unlink()
    with pytest.raises(errors.FingerprintMismatch, match="has lost its record"):
        writer.declare_field(FIELD, Fingerprint("pooled", "float32", (4,), size=96), {})
    assert not record.exists()
    writer.declare_field(FIELD, Fingerprint("pooled", "float32", (4,)), {})
    assert record.read_bytes() == whole


def test_a_torn_claim_counts_by_its_age(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with Claims(store) as claims:
        path = holder_elsewhere(store, "image-000000-0.1")
        path.write_bytes(b'{"host"')
        assert claims.take("image-000000-0") is None
        os.utime(path, (1.0, 1.0))
        assert claims.take("image-000000-0") is not None


def test_an_error_gives_untouched_claims_back_and_leaves_touched_ones_to_the_next(tmp_path: Path) -> None:
    claims = Claims(LocalStore(tmp_path))
    untouched, touched = claims.take("image-000000-0"), claims.take("image-000001-0")
    assert untouched is not None
    assert touched is not None
    touched.touched = True
    claims.__exit__(RuntimeError, RuntimeError(), None)
    assert [p.name for p in (tmp_path / CLAIMS).iterdir()] == ["image-000001-0.1.json"]
    with Claims(LocalStore(tmp_path)) as claims:  # by the same process, which is alive
        assert claims.take("image-000001-0") is not None


# --- a zombie: taken over while it paused ------------------------------------------------------------------


def taken_over(writer: CacheWriter) -> tuple[Claims, object, Claims]:
    """A claim on block 0 whose holder paused, and the one of who took over."""
    zombie, heir = Claims(LocalStore(writer.path)), Claims(LocalStore(writer.path))
    claim = zombie.take("image-000000-0")
    assert claim is not None
    record = json.loads(Path(writer.store.where(claim.path)).read_text())
    holder_elsewhere(writer.store, "image-000000-0.1", seconds_ago=120, token=record["token"])
    assert heir.take("image-000000-0") is not None
    return zombie, claim, heir


def test_a_zombie_cannot_commit_over_who_took_over(tmp_path: Path) -> None:
    writer = a_cache(tmp_path)
    zombie, claim, heir = taken_over(writer)
    commit(writer, 0, 1.0)
    before = committed(tmp_path)
    with pytest.raises(errors.ClaimLost, match="image-000000-0 was taken over by process"):
        commit(writer, 0, 2.0, claim.check)
    assert committed(tmp_path) == before
    claim.release()  # must not remove the heir's
    assert [p.name for p in (tmp_path / CLAIMS).iterdir() if p.name.startswith("image")] != []
    for one in (zombie, heir):
        one.__exit__(None, None, None)


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_claim_lost_in_the_middle_of_a_commit_leaves_no_receipt_that_lies(tmp_path: Path, calls: int) -> None:
    writer = a_cache(tmp_path)
    left = calls

    def check() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            commit(writer, 0, 1.0)  # the heir is done between our check and our next write
            raise errors.ClaimLost("lost")

    with pytest.raises(errors.ClaimLost):
        commit(writer, 0, 2.0, check)
    field = Cache.open(tmp_path).field(FIELD.name)
    assert (field.values(np.arange(16)) == 1.0).all()


def test_a_receipt_whose_objects_were_replaced_is_cleared_by_the_next(tmp_path: Path) -> None:
    """The heir was killed after it had replaced our object: our receipt lists other bytes than lie there."""
    writer = a_cache(tmp_path)
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            path = tmp_path / FIELD.name / "values" / "c.0.0.0"
            path.write_bytes(path.read_bytes()[::-1])
        if calls == 3:
            raise errors.ClaimLost("lost")

    with pytest.raises(errors.ClaimLost):
        commit(writer, 0, 2.0, check)
    writer.clear_block("image-000000-0")  # as whoever takes over the heir's claim does
    assert writer.receipts(FIELD.name) == {}
    assert not (tmp_path / FIELD.name / "values" / "c.0.0.0").exists()


def test_a_block_that_holds_together_is_not_cleared(tmp_path: Path) -> None:
    writer = a_cache(tmp_path)
    commit(writer, 0, 1.0)
    before = committed(tmp_path)
    writer.clear_block("image-000000-0")
    assert committed(tmp_path) == before


def test_a_pause_between_check_and_rename_cannot_leave_a_receipt_that_lies(tmp_path: Path) -> None:
    """The heir commits right after our last check: our object replaced its, and our receipt comes too late."""
    writer = a_cache(tmp_path)
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # before the receipt: our object lies there, then the heir writes object and receipt
            commit(writer, 0, 1.0)
        if calls == 3:
            raise errors.ClaimLost("lost")

    with pytest.raises(errors.ClaimLost):
        commit(writer, 0, 2.0, check)
    assert (Cache.open(tmp_path).field(FIELD.name).values(np.arange(16)) == 1.0).all()


# --- commands ----------------------------------------------------------------------------------------------


def test_a_second_command_is_refused_within_seconds_naming_the_first(tmp_path: Path) -> None:
    a_cache(tmp_path)
    with Claims(LocalStore(tmp_path)) as first, first.planning(join=False):
        started = time.monotonic()
        with pytest.raises(errors.AnotherWriter) as caught, Claims(LocalStore(tmp_path)) as second:
            second.planning(join=False).__enter__()
        assert time.monotonic() - started < 5
    assert caught.value.exit_code == 6
    assert re.search(rf"is being written by process {os.getpid()} on .*, last heartbeat \d+ s ago", caught.value.what)
    assert "--join" in caught.value.way_out
    with Claims(LocalStore(tmp_path)) as second, second.planning(join=False):
        pass


def test_a_joining_command_waits_while_another_plans_and_then_works_beside_it(tmp_path: Path) -> None:
    a_cache(tmp_path)
    lines: list[str] = []
    with Claims(LocalStore(tmp_path)) as first, Claims(LocalStore(tmp_path)) as second:
        planning = first.planning(join=False)
        planning.__enter__()
        timer = threading.Timer(0.8, lambda: planning.__exit__(None, None, None))
        timer.start()
        with second.planning(join=True, say=lines.append):
            assert not timer.is_alive() or timer.finished.wait(5)
        assert lines == [f"another process is planning its work on {tmp_path}: waiting for it"]
        assert len(first.writers()) == len(second.writers()) == 1


def test_unfinished_writes_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    store, living = LocalStore(tmp_path), LocalStore(tmp_path)
    with Claims(living) as writer, writer.planning(join=False):
        mine = living.writer("teacher/x/values/c.0")
        mine.write(b"x")
    dead = LocalStore(tmp_path).writer("teacher/x/values/c.1")
    dead.write(b"x")
    with Claims(living) as writer, writer.planning(join=False):
        pass
    with Claims(living) as writer:
        with writer.planning(join=True):
            pass
        with Claims(store) as other, other.planning(join=True):
            pass
    assert len(list(tmp_path.rglob("*.tmp"))) == 1
    assert mine.commit()
    dead.discard()


def refuse(cache: Path, work: Callable[[Claims], object]) -> None:
    """A plan that fails after `work`."""
    with contextlib.suppress(errors.UsageError), Claims(LocalStore(cache)) as claims, claims.planning(join=False):
        work(claims)
        raise errors.UsageError("no")


@pytest.mark.parametrize("made", [[], ["deep"], ["deep", "deep/cache"]], ids=str)
def test_a_plan_that_is_refused_where_no_cache_was_leaves_nothing(made: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "cache"
    for folder in made:
        (tmp_path / folder).mkdir()
    refuse(cache, lambda claims: CacheWriter(cache, None, claims.check_planning))
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == made


def test_a_plan_that_is_refused_leaves_what_others_may_need(tmp_path: Path) -> None:
    """A cache that was there; a network that took minutes to fetch; whatever another process does by now."""
    old, kept, taken = (tmp_path / name for name in ("old", "kept", "taken"))
    CacheWriter(old, 16)
    before = committed(old)
    refuse(old, lambda claims: None)
    assert committed(old) == before
    network = {"model.json": b"{}"}
    refuse(kept, lambda claims: CacheWriter(kept, None, claims.check_planning).keep_network("t", network))
    assert {"zarr.json", "_emkum/models/t/model.json"} < set(committed(kept))
    heir = Claims(LocalStore(taken))

    def lose_the_plan(claims: Claims) -> None:
        CacheWriter(taken)
        holder_elsewhere(LocalStore(taken), "plan.1", seconds_ago=120, token=claims._me.token)
        assert heir.take("plan") is not None

    refuse(taken, lose_the_plan)
    assert set(committed(taken)) == {"zarr.json"}
    heir.__exit__(None, None, None)


def test_a_plan_is_refused_for_its_own_reason_though_nothing_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: LocalStore, path: str) -> None:
        if path == "zarr.json":
            raise errors.StorageFailure("the disk is gone")

    monkeypatch.setattr(LocalStore, "remove", broken)

    def refused(claims: Claims) -> None:
        with claims.planning(join=False):
            CacheWriter(tmp_path / "cache", None, claims.check_planning)
            raise errors.UsageError("the real reason")

    with Claims(LocalStore(tmp_path / "cache")) as claims, pytest.raises(errors.UsageError, match="the real reason"):
        refused(claims)


def test_a_claim_is_created_though_its_empty_folder_is_removed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dir, removed = durable.make_dir, []

    def made_and_removed(folder: Path) -> None:
        make_dir(folder)
        if not removed:
            removed.append(folder)
            folder.rmdir()

    monkeypatch.setattr(durable, "make_dir", made_and_removed)
    assert LocalStore(tmp_path).create("claims/plan.1.json", b"{}")
    assert removed
    assert (tmp_path / "claims/plan.1.json").read_bytes() == b"{}"


@pytest.mark.parametrize("more", [("--targets", "logits"), ("--size", "30"), ("--logits-top", "3")])
def test_a_command_that_is_refused_leaves_no_folder_behind(more: tuple[str, ...], tmp_path: Path) -> None:
    tar, teacher = make_pictures(tmp_path / "a.tar", 2), save_teacher(tmp_path / "wide")
    words = ["--teacher", str(teacher), "--data", str(tar), "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    assert cli.run(["extract", *words, *more]) == 2
    assert not (tmp_path / "cache").exists()


# --- real processes ----------------------------------------------------------------------------------------

WORK = """
import sys, numpy as np, time, random
from tests.test_claims import FIELD, commit
from emkum.errors import ClaimLost
from emkum.shards.claims import Claims, block_key
from emkum.shards.store import LocalStore
from emkum.shards.writer import CacheWriter

path, blocks, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
store = LocalStore(path)
random.seed(seed)
with Claims(store) as claims:
    with claims.planning(join=True):
        writer = CacheWriter(store)
    missing = list(range(blocks))
    while missing:
        for block in list(missing):
            if writer.is_committed(FIELD.name, block, 0):
                missing.remove(block)
                continue
            claim = claims.take(block_key("image", block, 0))
            if claim is None:
                continue
            if not writer.is_committed(FIELD.name, block, 0):
                claim.touched = True
                try:
                    commit(writer, block, float(block), claim.check)
                    print("committed", block, flush=True)
                except ClaimLost:
                    pass
            claim.release()
        time.sleep(0.01 * random.random())
"""


@pytest.mark.parametrize("run", range(50 if TORTURE_MINUTES else 2))
def test_eight_processes_commit_every_block_once(tmp_path: Path, run: int) -> None:
    blocks = 12
    a_cache(tmp_path / "one", 16 * blocks)
    writer = a_cache(tmp_path / "eight", 16 * blocks)
    for block in range(blocks):
        commit(CacheWriter(tmp_path / "one"), block, float(block))
    command = [sys.executable, "-c", WORK, str(tmp_path / "eight"), str(blocks)]
    root = Path(__file__).parents[1]
    started = [
        subprocess.Popen([*command, str(run * 8 + i)], stdout=subprocess.PIPE, text=True, cwd=root) for i in range(8)
    ]
    killed = started[run % 8] if run % 2 else None
    if killed is not None:
        time.sleep(1.0)
        killed.send_signal(signal.SIGKILL)
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert all(process.returncode == 0 for process in started if process is not killed)
    done = [line for output in outputs for line in output.splitlines()]
    assert len(done) == len(set(done))
    assert set(writer.receipts(FIELD.name)) == {(block, 0) for block in range(blocks)}
    objects = [p for p in (tmp_path / "one").rglob("c.*") if p.is_file()]
    for path in objects:
        assert (tmp_path / "eight" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes()
    leftovers = [p.name for p in (tmp_path / "eight" / CLAIMS).iterdir()]
    assert killed is not None or leftovers == []


# --- records that were lost --------------------------------------------------------------------------------


def test_a_lost_segment_is_never_replaced_by_other_samples(tmp_path: Path) -> None:
    writer = a_cache(tmp_path)
    commit(writer, 1, 1.0)
    before = committed(tmp_path)
    shutil.rmtree(tmp_path / "_emkum/segments/0")
    for use in (
        lambda: Cache.open(tmp_path),
        lambda: CacheWriter(tmp_path).require_segments(),
        lambda: a_cache(tmp_path),
    ):
        with pytest.raises(errors.CorruptCache, match=r"segments/0 is missing, and blocks of .* belong to it"):
            use()
    left = {name: data for name, data in before.items() if "segments" not in name}
    assert committed(tmp_path) == left


def test_receipts_without_a_field_record_are_no_cache_without_the_field(tmp_path: Path) -> None:
    commit(a_cache(tmp_path), 0, 1.0)
    (tmp_path / "_emkum/fields" / f"{FIELD.name}.json").unlink()
    with pytest.raises(errors.CorruptCache, match=r"has receipts of the field .*, whose record is missing"):
        Cache.open(tmp_path)
