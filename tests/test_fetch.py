"""Files behind URLs: fetched once, gone on with after a break, and never taken for another file."""

from __future__ import annotations

import errno
import hashlib
import http.server
import json
import os
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from emkum.errors import StorageFailure, UnknownNetwork, UsageError, WeightsChanged, WeightsUnavailable
from emkum.models import fetch
from emkum.models.catalogue import load_network
from emkum.models.sources import read_source
from tests.test_models_beit2 import hf_model, original_state, write

CONTENT = bytes(range(256)) * 4000


@dataclass
class Served:
    """What the server answers. breaks: after so many bytes of the next answers the line is cut."""

    content: bytes = CONTENT
    etag: str = '"one"'
    ranges: bool = True
    content_type: str = "application/octet-stream"
    status: int = 200
    breaks: list[int] = field(default_factory=list)
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range
    url: str = ""


@pytest.fixture
def served() -> Iterator[Served]:
    """A server of one file on this machine."""
    state = Served()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.asked.append((self.path, wanted))
            if state.status != 200:
                self.send_error(state.status)
                return
            start = 0
            same = self.headers.get("If-Range") in (None, state.etag)
            if wanted and state.ranges and same:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if start >= len(state.content):
                    self.send_error(416)
                    return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(state.content) - 1}/{len(state.content)}")
            self.send_header("Content-Length", str(len(state.content) - start))
            self.send_header("Content-Type", state.content_type)
            if state.etag:
                self.send_header("ETag", state.etag)
            self.end_headers()
            stop = start + state.breaks.pop(0) if state.breaks else None
            self.wfile.write(state.content[start:stop])

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}/release/weights.pth"
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(fetch.WEIGHTS_DIR, str(tmp_path / "kept"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "kept"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_once_and_its_digest_recorded(served: Served, kept: Path) -> None:
    first, again = fetch.from_url(served.url), fetch.from_url(served.url, offline=True)
    assert first == again == fetch.Fetched(kept / "weights.pth", digest(CONTENT))
    assert first.path.read_bytes() == CONTENT
    assert len(served.asked) == 1
    assert names(kept) == ["weights.pth", "weights.pth.json"]
    record = json.loads((kept / "weights.pth.json").read_text())
    assert record["url"] == served.url
    assert record["sha256"] == digest(CONTENT)
    assert record["bytes"] == len(CONTENT)


def test_a_download_that_breaks_off_goes_on_where_it_stopped(served: Served, kept: Path) -> None:
    served.breaks = [300_000, 1, 200_000]
    assert fetch.from_url(served.url).revision == digest(CONTENT)
    assert [wanted for _, wanted in served.asked] == [None, "bytes=300000-", "bytes=300001-", "bytes=500001-"]
    assert names(kept) == ["weights.pth", "weights.pth.json"]


def test_after_some_breaks_the_next_command_goes_on(served: Served, kept: Path) -> None:
    served.breaks = [100_000] * fetch.ATTEMPTS
    with pytest.raises(WeightsUnavailable) as caught:
        fetch.from_url(served.url)
    assert caught.value.what == (
        f"weights.pth from {served.url}: it broke off 5 times (500,000 of 1,024,000 bytes arrived); "
        "the same command goes on"
    )
    assert not (kept / "weights.pth").exists()
    assert fetch.from_url(served.url).revision == digest(CONTENT)
    assert served.asked[-1][1] == "bytes=500000-"
    assert names(kept) == ["weights.pth", "weights.pth.json"]


@pytest.mark.parametrize("change", ["content", "no ranges", "no tag", "shorter"])
def test_a_part_of_another_file_is_thrown_away(change: str, served: Served) -> None:
    served.breaks = [600_000] + [0] * fetch.ATTEMPTS
    with pytest.raises(WeightsUnavailable):
        fetch.from_url(served.url)
    served.breaks = []
    if change == "no ranges":
        served.ranges = False
    elif change == "no tag":
        served.content, served.etag = CONTENT[::-1], ""
    elif change == "content":
        served.content, served.etag = CONTENT[::-1], '"two"'
    else:
        served.content = CONTENT[:1000]  # under the old tag: the range cannot be satisfied
    assert fetch.from_url(served.url).path.read_bytes() == served.content


def test_without_a_tag_a_download_starts_again(served: Served) -> None:
    served.etag, served.breaks = "", [600_000]
    assert fetch.from_url(served.url).revision == digest(CONTENT)
    assert [wanted for _, wanted in served.asked] == [None, None]


def test_a_weak_tag_does_not_tell_two_files_apart(served: Served) -> None:
    served.etag, served.breaks = 'W/"one"', [600_000]
    assert fetch.from_url(served.url).revision == digest(CONTENT)
    assert [wanted for _, wanted in served.asked] == [None, None]


@pytest.mark.parametrize(
    ("status", "words"), [(404, "the server answers 404 Not Found"), (503, "the server answers 503")]
)
def test_what_the_server_refuses_is_told_and_leaves_nothing(
    status: int, words: str, served: Served, kept: Path
) -> None:
    served.status = status
    with pytest.raises(WeightsUnavailable, match=words) as caught:
        fetch.from_url(served.url)
    assert caught.value.way_out.startswith(f"put the file at {kept / 'weights.pth'}")
    assert names(kept) == []
    assert len(served.asked) == 1


def test_a_web_page_is_no_file(served: Served, kept: Path) -> None:
    served.content, served.content_type = b"<html>log in", "text/html; charset=utf-8"
    with pytest.raises(WeightsUnavailable, match="a web page answers instead of a file"):
        fetch.from_url(served.url)
    assert names(kept) == []


def test_a_file_of_another_digest_than_asked_for_is_refused(served: Served, kept: Path) -> None:
    with pytest.raises(WeightsChanged) as caught:
        fetch.from_url(served.url, sha256="0" * 64)
    assert caught.value.exit_code == 5
    assert caught.value.what == (
        f"{kept / 'weights.pth'} from {served.url} has sha256 {digest(CONTENT)}; {'0' * 64} was asked for"
    )
    assert "to fetch it again" in caught.value.way_out
    assert not (kept / "weights.pth.json").exists()
    assert fetch.from_url(served.url, sha256=digest(CONTENT)).revision == digest(CONTENT)


def test_a_file_that_changed_under_its_url_is_refused_with_both_digests(served: Served, kept: Path) -> None:
    path = fetch.from_url(served.url).path
    path.unlink()
    served.content, served.etag = CONTENT[::-1], '"two"'
    for _ in range(2):  # the second time it is there
        with pytest.raises(WeightsChanged) as caught:
            fetch.from_url(served.url)
        assert digest(served.content) in caught.value.what
        assert f"when it was fetched first it had {digest(CONTENT)}" in caught.value.what
        assert caught.value.way_out == f"restore it; or, if the new file is meant, delete {kept / 'weights.pth.json'}"
    (kept / "weights.pth.json").unlink()
    assert fetch.from_url(served.url).revision == digest(served.content)


def test_a_file_that_changed_on_the_disk_is_refused_even_at_the_same_length(served: Served) -> None:
    path = fetch.from_url(served.url).path
    path.write_bytes(CONTENT)  # another time, the same content
    assert fetch.from_url(served.url).revision == digest(CONTENT)
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(WeightsChanged, match=digest(CONTENT[::-1])):
        fetch.from_url(served.url)
    assert fetch.from_url(served.url, sha256=digest(CONTENT[::-1])).revision == digest(CONTENT[::-1])


def test_an_unchanged_file_is_not_read_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch.from_url(served.url)
    monkeypatch.setattr(fetch, "_sha256", lambda path: pytest.fail("read again"))
    assert fetch.from_url(served.url).revision == digest(CONTENT)


def test_a_torn_record_is_made_again(served: Served, kept: Path) -> None:
    fetch.from_url(served.url)
    (kept / "weights.pth.json").write_text('{"sha256":')
    assert fetch.from_url(served.url).revision == digest(CONTENT)
    assert json.loads((kept / "weights.pth.json").read_text())["sha256"] == digest(CONTENT)


def test_two_processes_fetch_a_file_once(served: Served) -> None:
    found: list[fetch.Fetched] = []
    threads = [threading.Thread(target=lambda: found.append(fetch.from_url(served.url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.revision for one in found] == [digest(CONTENT)] * 4
    assert len(served.asked) == 1


def test_a_disk_without_room_is_said_before_a_byte_is_written(
    served: Served, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5}))
    with pytest.raises(StorageFailure) as caught:
        fetch.from_url(served.url)
    assert caught.value.exit_code == 7
    assert caught.value.what == (f"weights.pth cannot be kept in {kept}: 1,024,000 bytes are to come, 5 are free")
    assert "EMKUM_WEIGHTS" in caught.value.way_out
    assert names(kept) == []


def test_a_disk_that_fills_up_meanwhile_keeps_what_arrived(
    served: Served, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, room = os.write, 400_000

    def full(descriptor: int, data: Any) -> int:
        done = os.fstat(descriptor).st_size
        if done >= room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[: room - done])

    monkeypatch.setattr(fetch.os, "write", full)
    with pytest.raises(StorageFailure, match="No space left on device"):
        fetch.from_url(served.url)
    assert not (kept / "weights.pth").exists()
    monkeypatch.setattr(fetch.os, "write", real)
    assert fetch.from_url(served.url).revision == digest(CONTENT)
    assert served.asked[-1][1] == "bytes=400000-"


def test_a_folder_that_may_not_be_written_is_storage_and_no_lost_network(
    tmp_path: Path, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(fetch.WEIGHTS_DIR, str(tmp_path / "file/under"))
    with pytest.raises(StorageFailure, match=r"weights\.pth cannot be kept in"):
        fetch.from_url(served.url)


def test_the_way_out_names_the_tower_that_was_asked_for(kept: Path) -> None:
    for source, named in (
        ("beit3-pair", "--teacher beit3_base_patch16_224.pth#pair"),
        ("vlmo-text", "--teacher vlmo_base_patch16_224.pt#text"),
        ("beit3", "--teacher beit3_base_patch16_224.pth"),
        ("https://example.org/w.pth#pair", "--teacher w.pth#pair"),
    ):
        with pytest.raises(WeightsUnavailable) as caught:
            load_network(source, offline=True)
        assert caught.value.way_out.endswith(f"such as {named}")
    with pytest.raises(WeightsUnavailable) as caught:
        fetch.from_url("https://example.org/a/beit3.spm", offline=True, folder="a", tower=None)
    assert caught.value.way_out == f"put the file at {kept}/a/beit3.spm"


def test_offline_the_file_its_source_and_its_place_are_named(kept: Path) -> None:
    with pytest.raises(WeightsUnavailable) as caught:
        fetch.from_url("https://example.org/a/weights.pth", offline=True, folder="a")
    assert caught.value.what == (
        f"weights.pth from https://example.org/a/weights.pth: working offline, and it is not at {kept}/a/weights.pth"
    )


def test_a_server_that_is_not_there_is_told_at_once(kept: Path) -> None:
    with pytest.raises(WeightsUnavailable, match="Connection refused"):
        fetch.from_url("http://127.0.0.1:9/weights.pth")
    assert names(kept) == []


def test_equal_names_of_other_hosts_and_folders_do_not_meet() -> None:
    urls = [
        "https://a.org/w.pth",
        "https://b.org/w.pth",
        "https://a.org/x/w.pth",
        "https://a.org/x/w.pth?version=2",
        "https://a.org/x/w.pth?version=3",
    ]
    folders = [fetch.folder_of(url) for url in urls]
    assert len(set(folders)) == len(urls)
    assert folders[2] == "a.org/x"
    assert fetch.folder_of("https://a.org:80/../..//x/w.pth") == "a.org_80/x"


# --- a URL as the source of a network ------------------------------------------------------------------


@pytest.fixture
def beit2_file(tmp_path: Path) -> bytes:
    return write(tmp_path / "made/some.pth", original_state(hf_model())).read_bytes()


def test_a_url_is_a_teacher_and_its_digest_pins_it(served: Served, beit2_file: bytes, kept: Path) -> None:
    served.content = beit2_file
    network = load_network(f"{served.url}#sha256={digest(beit2_file)}")
    pinned = f"{served.url}#sha256={digest(beit2_file)}"  # http:// can be named again with its digest alone
    assert (network.name, network.family, network.source) == ("weights", "beit2", pinned)
    assert network.revision == digest(beit2_file)
    assert network.supervision == "clip_tokenizer+unknown"
    (folder,) = kept.iterdir()
    assert folder.name == f"127.0.0.1_{served.url.split(':')[2].split('/')[0]}"
    assert load_network(f"{served.url}#sha256={digest(beit2_file)}", offline=True) is not None
    with pytest.raises(WeightsChanged):
        load_network(f"{served.url}#sha256={'0' * 64}")


def test_a_url_elsewhere_that_ends_in_the_name_of_a_release_is_unknown(
    served: Served, beit2_file: bytes, kept: Path, small_releases: None
) -> None:
    served.content = beit2_file
    url = f"{served.url.rpartition('/')[0]}/beitv2_base_patch16_224_pt1k.pth#sha256={digest(beit2_file)}"
    assert load_network(url).supervision == "clip_tokenizer+unknown"
    assert load_network(url).licence == "unknown"


def test_the_catalogues_digest_is_held_to(served: Served, beit2_file: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from emkum.models.families.registry import CATALOGUE

    served.content = beit2_file
    real = urllib.request.urlopen
    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda request, timeout: real(served.url, timeout=timeout))
    entry = dataclasses.replace(CATALOGUE["beit2"], sha256="0" * 64)
    monkeypatch.setitem(CATALOGUE, "beit2", entry)
    with pytest.raises(WeightsChanged, match=digest(beit2_file)):
        load_network("beit2")
    monkeypatch.setitem(CATALOGUE, "beit2", dataclasses.replace(entry, sha256=digest(beit2_file)))
    assert load_network("beit2").revision == digest(beit2_file)


@pytest.mark.parametrize(
    ("source", "words", "way_out"),
    [
        ("http://a.org/w.pth", "fetched without encryption", "use https://"),
        ("https://a.org/w.pth#sha256=12", "ends in #sha256=12", "64 hexadecimal digits"),
        ("https://a.org/w.pth#md5=12", "ends in #md5=12", "#sha256="),
        ("https://a.org/", "names no file", "the URL of one file"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_before_it_is_asked(source: str, words: str, way_out: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        read_source(source)
    assert way_out in caught.value.way_out


def test_other_schemes_are_no_urls_of_weights() -> None:
    for source in ("file:///etc/passwd", "ftp://a.org/w.pth", "s3://bucket/w.pth"):
        with pytest.raises(UnknownNetwork):
            read_source(source)
