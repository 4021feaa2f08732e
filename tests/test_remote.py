"""Object stores: one contract for a disk, for memory and for S3; S3 on its bad days."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFile
from s3_stub import BUCKET, Fault, S3Stub, s3_stub
from tiny_cache import make_cache

from emkum.errors import StorageFailure, UsageError
from emkum.shards import remote
from emkum.shards.claims import Claims
from emkum.shards.codec import encode
from emkum.shards.digest import digest
from emkum.shards.fingerprint import Fingerprint
from emkum.shards.layout import FieldSpec
from emkum.shards.reader import Cache
from emkum.shards.remote import RemoteStore
from emkum.shards.store import LocalStore, Store, open_store, sha256_of
from emkum.shards.tars import PictureMember, SourceSample, SourceTar
from emkum.shards.verify import verify
from emkum.shards.views import ViewPolicy
from emkum.shards.writer import CacheWriter

FIELD = FieldSpec("teacher/t/image/cls", "pooled", "float32", (4,))
BYTES = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", 3.0)
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(remote, "HTTP_ATTEMPTS", 1)
    (tmp_path / "spool").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool"))


@pytest.fixture
def stub() -> Iterator[S3Stub]:
    with s3_stub() as stub:
        yield stub


@pytest.fixture
def s3(stub: S3Stub) -> RemoteStore:
    return RemoteStore(f"s3://{BUCKET}/folder", **stub.options())


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        (tmp_path / "cache").mkdir()
        return LocalStore(tmp_path / "cache")
    if request.param == "memory":
        return RemoteStore(f"memory://{uuid.uuid4().hex}/cache")
    found: Store = request.getfixturevalue("s3")
    return found


def again(store: Store, stub: S3Stub | None = None) -> Store:
    """The same place, opened a second time."""
    if isinstance(store, RemoteStore):
        return RemoteStore(store._address, **store._options)
    return open_store(store.url)


# One contract


def test_an_object_comes_back_as_it_was_written(store: Store) -> None:
    assert store.write("a/b/c", BYTES) == hashlib.sha256(BYTES).hexdigest()
    assert store.read("a/b/c") == BYTES
    assert store.size("a/b/c") == len(BYTES)
    assert sha256_of(store, "a/b/c") == (len(BYTES), hashlib.sha256(BYTES).hexdigest())
    store.write("a/b/c", b"shorter")
    assert store.read("a/b/c") == b"shorter"
    store.write("a/b/c", b"")
    assert store.read("a/b/c") == b""
    assert store.size("a/b/c") == 0


def test_what_is_not_there_is_called_so(store: Store) -> None:
    store.write("a/b", b"x")
    for ask in (store.read, store.open, store.size, store.modified, store.touch):
        with pytest.raises(FileNotFoundError, match="a/c is not there"):
            ask("a/c")
    assert store.list("c") == {}
    assert store.list("a/b") == {}, "an object is no folder"
    store.remove("a/c")


def test_a_listing_holds_what_lies_directly_in_the_folder_now(store: Store) -> None:
    store.write("a/one", b"1")
    assert store.list("a") == {"one": 1}
    other = again(store)
    other.write("a/two", b"22")
    other.write("a/deeper/three", b"333")
    other.write("ab/four", b"4444")
    assert store.list("a") == {"one": 1, "two": 2, "deeper": None}
    assert store.list("") == {"a": None, "ab": None}
    other.remove("a/two")
    other.write("a/one", b"1111")
    assert store.list("a") == {"one": 4, "deeper": None}
    other.write("a/one", b"12345")
    assert store.size("a/one") == 5


def test_a_written_object_appears_at_commit_or_never(store: Store) -> None:
    with store.writer("a/b") as writer:
        writer.write(BYTES)
        assert "b" not in store.list("a")
    assert "b" not in store.list("a")
    with store.writer("a/b") as writer:
        writer.write(BYTES[:5])
        writer.write(memoryview(BYTES)[5:])
        assert writer.num_bytes == len(BYTES)
        assert writer.commit() == hashlib.sha256(BYTES).hexdigest()
    assert store.read("a/b") == BYTES
    assert store.list("a") == {"b": len(BYTES)}, "nothing unfinished lies beside it"
    with contextlib.suppress(KeyError), store.writer("a/b") as writer:
        writer.write(b"half")
        raise KeyError
    assert store.read("a/b") == BYTES
    assert os.listdir(tempfile.gettempdir()) == []


def test_ranges_are_read_into_several_buffers(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 100)
    store.write("a", BYTES)
    reader = store.open("a")
    assert reader.size == len(BYTES)
    one, two = bytearray(300), bytearray(7)
    assert reader.read_into([memoryview(one), memoryview(two)], 1000) == 307
    assert bytes(one + two) == BYTES[1000:1307]
    assert reader.read_into([memoryview(one), memoryview(two)], len(BYTES) - 302) == 302
    assert bytes(one) + bytes(two[:2]) == BYTES[-302:]
    assert reader.read_into([memoryview(one)], len(BYTES)) == 0


def test_many_threads_read_one_object(store: Store) -> None:
    store.write("a", BYTES)
    reader = store.open("a")

    def part(offset: int) -> bytes:
        buffer = bytearray(64)
        assert reader.read_into([memoryview(buffer)], offset) == 64
        return bytes(buffer)

    offsets = range(0, len(BYTES) - 64, 200)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(part, offsets)) == [BYTES[offset : offset + 64] for offset in offsets]


def test_create_gives_a_name_once(store: Store) -> None:
    assert store.create("claims/3", b"mine")
    assert not store.create("claims/3", b"other")
    assert not again(store).create("claims/3", b"other")
    assert store.create("claims/3", b"mine"), "the object there is this one"
    assert store.read("claims/3") == b"mine"
    assert set(store.list("")) <= {"claims", "_emkum"}


def test_of_racing_creates_exactly_one_wins(store: Store) -> None:
    contenders = [again(store) for _ in range(4)]
    for one in contenders:
        one.create("warm", b"")
    for number in range(5):
        barrier = threading.Barrier(len(contenders), timeout=30)

        def race(index: int, barrier: threading.Barrier = barrier, number: int = number) -> bool:
            barrier.wait()
            return contenders[index].create(f"claims/{number}", b"%d" % index)

        with ThreadPoolExecutor(len(contenders)) as pool:
            won = list(pool.map(race, range(len(contenders))))
        assert sum(won) == 1
        assert store.read(f"claims/{number}") == b"%d" % won.index(True)


def test_a_folder_appears_with_its_last_file_and_once(store: Store) -> None:
    files = {"samples": b"1", "captions": b"22", "segment": b"333"}
    assert store.create_folder("segments/0", files)
    assert store.list("segments/0") == {"samples": 1, "captions": 2, "segment": 3}
    assert not again(store).create_folder("segments/0", dict.fromkeys(files, b"other"))
    assert {name: store.read(f"segments/0/{name}") for name in files} == files


def test_touch_moves_the_time_and_nothing_else(store: Store, request: pytest.FixtureRequest) -> None:
    store.write("a", BYTES)
    if isinstance(store, LocalStore):
        os.utime(store.where("a"), (1e9, 1e9))
    elif store.url.startswith("memory"):
        from datetime import UTC, datetime

        fsspec.filesystem("memory").store[
            "/" + store.url.removeprefix("memory://") + "/a"
        ].modified = datetime.fromtimestamp(1e9, UTC)
    else:
        stub: S3Stub = request.getfixturevalue("stub")
        stub.objects["folder/a"] = (BYTES, 1e9)
    assert store.modified("a") == 1e9
    before = time.time()
    store.touch("a")
    assert store.modified("a") > before - 2
    assert store.read("a") == BYTES


def test_a_sweep_removes_the_unfinished_writes_of_the_dead_only(store: Store) -> None:
    dead, living = again(store), again(store)
    store.write("done", b"x")
    first, second = dead.writer("a/b"), living.writer("a/c")
    second.write(b"alive")
    assert store.sweep({living.token}) == 1
    assert store.sweep({living.token}) == 0
    second.commit()
    assert store.read("a/c") == b"alive"
    assert store.read("done") == b"x"
    first.__exit__(None, None, None)


def test_a_place_is_named_for_people(store: Store) -> None:
    assert store.where("a/b") == f"{store.url}/a/b"
    assert len(store.token) == 32
    assert store.token != again(store).token
    assert (store.local is None) == isinstance(store, RemoteStore)
    assert (store.free_bytes() is None) == isinstance(store, RemoteStore)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_reads_and_writes(store: Store) -> None:
    store.write("a", BYTES)
    reader = store.open("a")
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def child() -> None:
        buffer = bytearray(10)
        reader.read_into([memoryview(buffer)], 3)
        results.put((bytes(buffer), store.read("a"), store.create("from-the-child", b"x")))

    process = context.Process(target=child)
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
        pytest.fail("the child hangs")
    assert process.exitcode == 0
    assert results.get() == (BYTES[3:13], BYTES, True)
    results.close()
    process.close()
    assert store.read("a") == BYTES


def test_a_store_travels_to_another_process(store: Store) -> None:
    store.write("a", BYTES)
    packed = pickle.dumps(store)
    assert b"FileSystem" not in packed, "connections stay here"
    travelled = pickle.loads(packed)
    assert travelled.read("a") == BYTES
    assert travelled.url == store.url


# S3 on its bad days


def test_a_busy_server_is_asked_again(stub: S3Stub, s3: RemoteStore) -> None:
    s3.write("a", BYTES)
    s3.create("warm", b"")
    for code in ("SlowDown", "InternalError", "ServiceUnavailable"):
        stub.faults = [Fault(times=3, status=500 if code == "InternalError" else 503, code=code)]
        assert s3.read("a") == BYTES
        stub.faults[0].times = 3
        assert s3.list("")["a"] == len(BYTES)
        stub.faults[0].times = 3
        s3.write("a", BYTES)
        stub.faults[0].times = 3
        assert s3.create(f"claims/{code}", b"x")
        stub.faults[0].times = 3
        s3.remove("warm")
        assert stub.faults[0].times == 0
    assert "folder/warm" not in stub.objects


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_that_stays_busy_is_never_called_empty(
    stub: S3Stub, s3: RemoteStore, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.3)
    s3.write("a/b", b"x")
    stub.faults = [Fault(times=10**9, status=status, code="SlowDown" if status == 503 else str(status))]
    for ask in (s3.read, s3.open, s3.size, s3.modified, s3.list, s3.touch, s3.remove):
        with pytest.raises(StorageFailure, match=rf"s3://bucket/folder/a.* failed \d+ times .*{status}") as caught:
            ask("a/b" if ask != s3.list else "a")
        assert caught.value.exit_code == 7
        assert "run the same command again: committed blocks are kept" in caught.value.way_out
    with pytest.raises(StorageFailure, match="cannot be written"):
        s3.create("c", b"x")
    with s3.writer("a/d") as writer:
        writer.write(b"x")
        with pytest.raises(StorageFailure, match="a/d cannot be written"):
            writer.commit()
    assert os.listdir(tempfile.gettempdir()) == []


@pytest.mark.parametrize("kind", ["cut", "short"])
def test_half_a_body_is_no_body(stub: S3Stub, s3: RemoteStore, kind: str) -> None:
    s3.write("a", BYTES)
    reader = s3.open("a")
    for num_bytes in (0, 1, len(BYTES) - 1):
        stub.faults = [Fault("GET", times=3, **{kind: num_bytes})]  # type: ignore[arg-type]
        assert s3.read("a") == BYTES
        assert stub.faults[0].times == 0
        stub.faults[0].times = 3
        buffer = bytearray(len(BYTES))
        assert reader.read_into([memoryview(buffer)], 0) == len(BYTES)
        assert bytes(buffer) == BYTES
        assert stub.faults[0].times == 0


def test_an_object_that_is_replaced_while_it_is_read_comes_whole(
    stub: S3Stub, s3: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.write("a", b"short")
    size = remote._file_size

    def replaced_after(filesystem: object, place: str) -> int:
        num_bytes = size(filesystem, place)
        stub.objects["folder/a"] = (b"a longer one", time.time())
        return num_bytes

    monkeypatch.setattr(remote, "_file_size", replaced_after)
    assert s3.read("a") == b"a longer one"


@pytest.mark.parametrize("times", [1, 3])
def test_a_put_whose_answer_is_lost_counts_as_ours(stub: S3Stub, s3: RemoteStore, times: int) -> None:
    s3.create("warm", b"")
    stub.faults = [Fault("PUT", "claims/0", times=times, lost=True)]
    assert s3.create("claims/0", b"mine")
    assert s3.read("claims/0") == b"mine"
    stub.faults[0].times = times
    assert not s3.create("claims/0", b"other")
    stub.faults = [Fault("PUT", "a", times=times, lost=True)]
    assert s3.write("a", BYTES) == hashlib.sha256(BYTES).hexdigest()
    assert stub.faults[0].times == 0
    stub.faults = [Fault("PUT", "segment.json", times=times, lost=True)]
    assert s3.create_folder("segments/0", {"samples": b"1", "segment.json": b"2"})
    assert s3.read("claims/0") == b"mine"


@pytest.mark.parametrize("left", [None, BYTES[:-1]], ids=["nothing", "a part"])
def test_an_object_that_is_not_there_as_written_is_written_again(
    stub: S3Stub, s3: RemoteStore, left: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []

    def drop_first(filesystem: object, path: str, num_bytes: int) -> None:
        if not checked:
            del stub.objects["folder/a"]
        if not checked and left is not None:
            stub.objects["folder/a"] = (left, time.time())
        checked.append(num_bytes)
        RemoteStore._check_written(s3, filesystem, path, num_bytes)

    monkeypatch.setattr(s3, "_check_written", drop_first)
    with s3.writer("a") as writer:
        writer.write(BYTES)
        writer.commit()
    assert checked == [len(BYTES)] * 2
    assert s3.read("a") == BYTES


def test_a_stalled_connection_is_given_up(stub: S3Stub) -> None:
    s3 = RemoteStore(f"s3://{BUCKET}/folder", **stub.options(read_timeout=0.3))
    s3.write("a", BYTES)
    stub.faults = [Fault("GET", times=3, stall_seconds=5)]
    assert s3.read("a") == BYTES
    assert stub.faults[0].times == 0


def test_a_slow_server_is_no_broken_one(stub: S3Stub, s3: RemoteStore) -> None:
    stub.latency_seconds = 0.05
    s3.write("a", BYTES)
    assert s3.create("b", b"x")
    assert s3.read("a") == BYTES
    assert stub.count("PUT folder/a") == 1


@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (400, "ExpiredToken"), (403, "InvalidAccessKeyId")]
)
def test_refused_credentials_are_renewed_once(stub: S3Stub, s3: RemoteStore, status: int, code: str) -> None:
    s3.write("a", BYTES)
    before = s3._filesystem()
    stub.faults = [Fault(times=1, status=status, code=code)]
    assert s3.read("a") == BYTES
    assert s3._filesystem() is not before
    stub.faults = [Fault(times=10**9, status=status, code=code)]
    for ask in (s3.read, s3.list, s3.remove, lambda path: s3.write(path, b"x"), lambda path: s3.create(path, b"x")):
        stub.requests.clear()
        with pytest.raises(StorageFailure, match="the credentials were refused") as caught:
            ask("a")
        assert str(status) in caught.value.what
        assert "renew them" in caught.value.way_out
        assert len(stub.requests) <= 4, "at once, not after a minute"
    assert stub.objects["folder/a"][0] == BYTES


def test_a_renewed_key_is_picked_up(stub: S3Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "dummy")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "old")
    store = RemoteStore(f"s3://{BUCKET}/folder", endpoint_url=stub.endpoint, client_kwargs={"region_name": "us-east-1"})
    store.write("a", BYTES)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "new")
    stub.faults = [Fault(times=1, status=400, code="ExpiredToken")]
    assert store.read("a") == BYTES
    assert set(stub.access_keys[:2]) == {"old"}
    assert stub.access_keys[-1] == "new"


def test_missing_credentials_are_called_so(stub: S3Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    store = RemoteStore(f"s3://{BUCKET}/folder", endpoint_url=stub.endpoint)
    with pytest.raises(StorageFailure, match="credentials were refused: NoCredentialsError"):
        store.read("a")
    assert stub.requests == []


def test_a_server_that_is_gone_is_a_storage_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.3)
    with s3_stub() as stub:
        s3 = RemoteStore(f"s3://{BUCKET}/folder", **stub.options())
        s3.write("a", b"x")
    with pytest.raises(StorageFailure, match=r"s3://bucket/folder/a cannot be read: failed \d+ times"):
        s3.read("a")


def test_a_missing_bucket_is_no_empty_cache(stub: S3Stub) -> None:
    store = RemoteStore("s3://no-such-bucket/folder", **stub.options())
    for ask in (store.read, store.list, lambda path: store.write(path, b"x"), lambda path: store.create(path, b"x")):
        with pytest.raises(StorageFailure, match="there is no such bucket"):
            ask("a")


def test_a_server_that_ignores_the_condition_is_refused(stub: S3Stub, s3: RemoteStore) -> None:
    stub.honours_conditions = False
    for _ in range(2):
        with pytest.raises(StorageFailure, match="created an object over another") as caught:
            s3.create("claims/0", b"x")
    assert "If-None-Match" in caught.value.way_out
    assert "folder/claims/0" not in stub.objects


def test_listings_come_in_pages_and_no_page_is_lost(stub: S3Stub, s3: RemoteStore) -> None:
    stub.page_length = 3
    for number in range(10):
        stub.objects[f"folder/a/{number}"] = (b"x" * number, 0.0)
    stub.faults = [Fault("GET", "continuation-token", times=3, status=503, code="SlowDown")]
    assert s3.list("a") == {str(number): number for number in range(10)}
    assert stub.faults[0].times == 0


def test_large_objects_go_up_in_parts_that_appear_together(
    stub: S3Stub, s3: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: 4096)
    stub.faults = [Fault("PUT", "partNumber=2", times=3, status=503, code="InternalError")]
    with s3.writer("a") as writer:
        writer.write(BYTES)
        assert writer.commit() == hashlib.sha256(BYTES).hexdigest()
    assert s3.read("a") == BYTES
    assert stub.uploads == {}, "parts of a failed upload are dropped"
    stub.faults = [Fault("POST", "uploadId", times=1, lost=True)]
    with s3.writer("b") as writer:
        writer.write(BYTES)
        writer.commit()
    assert s3.read("b") == BYTES


def test_a_large_range_comes_in_pieces(stub: S3Stub, s3: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 4000)
    s3.write("a", BYTES)
    assert sha256_of(s3, "a") == (len(BYTES), hashlib.sha256(BYTES).hexdigest())
    assert stub.count("GET folder/a") == 3


def test_an_object_in_memory_is_never_seen_growing(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    store = RemoteStore(f"memory://{uuid.uuid4().hex}/cache")
    write = MemoryFile.write
    monkeypatch.setattr(MemoryFile, "write", lambda file, data: sizes.append(store.list("a")) or write(file, data))
    with store.writer("a/b") as writer:
        writer.write(BYTES)
        writer.commit()
    assert all("b" not in seen for seen in sizes)
    assert store.read("a/b") == BYTES


def test_touching_a_claim_never_brings_back_what_was_replaced(stub: S3Stub, s3: RemoteStore) -> None:
    s3.write("claims/0", b"mine")
    stub.requests.clear()
    s3.touch("claims/0")
    assert stub.count("GET folder/claims/0") == 0, "the storage copies; no bytes pass through a writer that may be late"


def test_a_loser_cannot_leave_its_files_in_the_winners_folder(s3: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    loser = again(s3)
    create = s3.create

    def create_while_another_writes(path: str, data: bytes) -> bool:
        loser.write("segments/0/samples", b"the loser's")
        return create(path, data)

    monkeypatch.setattr(s3, "create", create_while_another_writes)
    assert s3.create_folder("segments/0", {"samples": b"the winner's", "segment": b"w"})
    assert not loser.create_folder("segments/0", {"samples": b"the loser's", "segment": b"l"})
    assert s3.read("segments/0/samples") == b"the winner's"
    assert s3.read("segments/0/segment") == b"w"


class HttpError(Exception):
    """As gcsfs has it."""

    code = 0


class ResourceNotFoundError(Exception):
    """As azure-core has it."""

    status_code = 404
    error_code = "BlobNotFound"


class ContentLengthError(Exception):
    """As aiohttp has it: 400 says nothing about an answer's status, the body broke off."""

    code = 400


def _with(error: Exception, **attributes: object) -> Exception:
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (_with(HttpError("busy"), code=503), "PASSING"),
        (_with(HttpError("no right"), code=403), "CREDENTIALS"),
        (OSError("Forbidden: bucket/a"), "CREDENTIALS"),
        (ResourceNotFoundError(), "MISSING"),
        (_with(ResourceNotFoundError(), error_code="ContainerNotFound"), "REFUSED"),
        (_with(ResourceNotFoundError(), status_code=409), "PASSING"),
        (ContentLengthError("Not enough data"), "PASSING"),
        (FileNotFoundError("a"), "MISSING"),
        (_with(FileNotFoundError("moved"), status=301), "REFUSED"),
        (OSError("something new"), "PASSING"),
        (ConnectionResetError(), "PASSING"),
        (TimeoutError(), "PASSING"),
        (RuntimeError("Session is closed"), "PASSING"),
        (NotImplementedError(), "REFUSED"),
    ],
)
def test_not_there_needs_the_storages_own_word(error: Exception, trouble: str) -> None:
    assert remote._judge(error)[0].name == trouble


# A cache there


def write_cache(store: Store) -> None:
    """What an extraction does, and does again after a failure: one segment, one field, three blocks."""
    writer = CacheWriter(store, 16)
    if not writer.segments:
        samples = tuple(SourceSample(f"k{i}", PictureMember(512 * i, 9, "jpg"), (), "", None, None) for i in range(40))
        writer.append_segment("train", ViewPolicy(), [SourceTar("a.tar", "a.tar", 9, "0" * 64, samples, {}, 0)])
    writer.declare_field(FIELD, Fingerprint("pooled", "float32", (4,)), {})
    writer.grow_field(FIELD, 1)
    for block, rows in enumerate((16, 16, 8)):
        if not writer.is_committed(FIELD.name, block, 0):
            with writer.block(FIELD, writer.segments[0], block, 0) as target:
                target.append(encode(np.full((rows, 4), block, np.float32), "float32"))
                target.commit()


@pytest.fixture(scope="module")
def expected_digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = LocalStore(tmp_path_factory.mktemp("expected") / "cache")
    write_cache(folder)
    return digest(folder)


def test_a_cache_is_the_same_wherever_it_lies(store: Store, tmp_path: Path) -> None:
    make_cache(tmp_path / "expected", pictures=20, val_pictures=4, captions=1, storage="int8", quarantined=[3])
    make_cache(store, pictures=20, val_pictures=4, captions=1, storage="int8", quarantined=[3])  # type: ignore[arg-type]
    expected, found = Cache.open(tmp_path / "expected"), Cache.open(store)
    assert digest(store) == digest(expected.store)
    assert verify(store).findings == ()
    assert found.splits == expected.splits
    assert found.samples("train").equals(expected.samples("train"))
    assert sorted(found.models) == sorted(expected.models)
    for name, field in expected.fields.items():
        rows = field.rows("train")
        assert np.array_equal(found.field(name).rows("train"), rows)
        assert np.array_equal(found.field(name).read(rows[::-1]), field.read(rows[::-1]))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_cache_written_and_read_in_bad_weather_is_the_same(
    stub: S3Stub, s3: RemoteStore, expected_digest: str, seed: int
) -> None:
    stub.weather = random.Random(seed)
    write_cache(s3)
    assert digest(s3) == expected_digest
    assert verify(s3).findings == ()


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(lost=True)], ids=["refused", "answers lost"])
def test_a_storage_that_fails_from_any_request_on_costs_nothing(
    stub: S3Stub, s3: RemoteStore, expected_digest: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.0)
    num_failures = 0
    while True:
        stub.objects.clear()
        stub.broken, stub.breaks_in = fault, num_failures * 6
        try:
            write_cache(s3)
            break
        except StorageFailure:
            num_failures += 1
        stub.broken = None
        write_cache(s3)
        assert digest(s3) == expected_digest
    assert num_failures > 10


def test_one_of_racing_claims_wins(store: Store) -> None:
    with contextlib.ExitStack() as stack:
        contenders = [stack.enter_context(Claims(again(store))) for _ in range(4)]
        for number in range(3):
            barrier = threading.Barrier(len(contenders), timeout=30)

            def race(claims: Claims, barrier: threading.Barrier = barrier, number: int = number) -> bool:
                barrier.wait()
                return claims.take(f"image-{number:06d}-0") is not None

            with ThreadPoolExecutor(len(contenders)) as pool:
                assert sum(pool.map(race, contenders)) == 1


def test_the_claim_of_a_dead_machine_is_taken_over_and_fenced(stub: S3Stub, s3: RemoteStore) -> None:
    record = {"token": "f" * 32, "host": "elsewhere", "pid": 7, "started": 1, "place": "b", "abandoned": False}
    for seconds_ago, taken in ((5, False), (3600, True)):
        stub.objects["folder/_emkum/claims/image-000000-0.1.json"] = (
            json.dumps(record).encode(),
            time.time() - seconds_ago,
        )
        with Claims(again(s3)) as claims:
            claim = claims.take("image-000000-0")
            assert (claim is not None) == taken
            if claim is not None:
                claim.check()
                assert claim.path.endswith("image-000000-0.2.json")


def test_settings_come_from_the_environment(stub: S3Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", stub.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "dummy")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "dummy")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    store = open_store(f"s3://{BUCKET}/folder")
    store.write("a", BYTES)
    assert stub.objects["folder/a"][0] == BYTES


# What cannot be


def test_an_unknown_protocol_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="Protocol not known: nosuch") as caught:
        open_store("nosuch://bucket/folder")
    assert caught.value.exit_code == 2


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for protocol in ("s3", "s3a"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UsageError, match="s3://bucket/folder cannot be opened") as caught:
        open_store("s3://bucket/folder")
    assert caught.value.way_out == "pip install 'emkum[s3]'"


def test_a_storage_without_conditional_create_is_read_only() -> None:
    store = open_store("http://127.0.0.1:9/folder")
    with pytest.raises(
        StorageFailure, match="http:// is not known to create an object only where there is none"
    ) as caught:
        store.create("a", b"x")
    assert "s3://" in caught.value.way_out
    assert "gs://" in caught.value.way_out


def test_a_file_url_is_a_path() -> None:
    with pytest.raises(UsageError, match="is a local path") as caught:
        open_store("file:///data/cache")
    assert "/data/cache" in caught.value.way_out


def test_no_password_is_shown() -> None:
    store = RemoteStore("memory://user:hush@place/cache")
    assert store.url == "memory://place/cache"
    assert "hush" not in store.where("a")


def test_our_own_mistakes_are_not_retried(s3: RemoteStore, stub: S3Stub) -> None:
    stub.faults = [Fault(times=10**9, status=405, code="MethodNotAllowed")]
    stub.requests.clear()
    with pytest.raises(StorageFailure, match=r"cannot be written: 405 MethodNotAllowed .*"):
        s3.write("a", b"x")
    assert len(stub.requests) == 1
