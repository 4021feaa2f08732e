"""Source tars are read whole and right, or refused by name, key and byte offset."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from fuzzing import memory_below
from hypothesis import given, settings
from hypothesis import strategies as st

from emkum.errors import (
    BadTar,
    DuplicateKey,
    EmkumError,
    NoData,
    SourceChanged,
    SplitKey,
    TruncatedTar,
    UsageError,
)
from emkum.shards import tars
from emkum.shards.tars import (
    MAX_EXTENDED_HEADER_BYTES,
    MAX_JSON_BYTES,
    MAX_NAME_CHARACTERS,
    MAX_PADDING_BYTES,
    MAX_TEXT_BYTES,
    SourceTar,
    find_tars,
    plain_header,
    read_member,
    scan_tar,
    scan_tars,
)

Members = Sequence[tuple[str, bytes]]
PAIRS: Members = [
    ("a.jpg", b"picture a"),
    ("a.json", b'{"captions": ["one", "two"]}'),
    ("b.jpg", b"picture b"),
    ("b.txt", b"three"),
]


def tar_bytes(members: Iterable[tuple[str, bytes] | tarfile.TarInfo], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return file.getvalue()


def save(folder: Path, content: bytes, name: str = "a.tar") -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


def scan(folder: Path, members: Members, tar_format: int = tarfile.USTAR_FORMAT) -> SourceTar:
    return scan_tar(save(folder, tar_bytes(members, tar_format)))


def header_block(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)[-512:]


def with_checksum(block: bytes) -> bytes:
    block = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def with_padding(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


# ---------------------------------------------------------------------------------------------------------------------
# What a good tar gives


def test_a_tar_gives_its_samples_in_order_with_offsets_captions_and_digest(tmp_path: Path) -> None:
    content = tar_bytes(PAIRS)
    path = save(tmp_path, content)
    tar = scan_tar(path)
    assert (tar.path, tar.name, tar.bytes) == (path, "a.tar", len(content))
    assert tar.sha256 == hashlib.sha256(content).hexdigest()
    assert [sample.key for sample in tar.samples] == ["a", "b"]
    assert [sample.captions for sample in tar.samples] == [("one", "two"), ("three",)]
    assert [sample.caption_source for sample in tar.samples] == ["json", "txt"]
    pictures = [sample.picture for sample in tar.samples if sample.picture]
    assert [content[p.offset : p.offset + p.size] for p in pictures] == [b"picture a", b"picture b"]
    assert [read_member(path, p.offset, p.size) for p in pictures] == [b"picture a", b"picture b"]
    assert (tar.ignored, tar.filtered) == ({}, 0)


def test_a_tar_can_be_given_another_name(tmp_path: Path) -> None:
    assert scan_tar(save(tmp_path, tar_bytes(PAIRS)), name="other.tar").name == "other.tar"


def test_extensions_in_capitals_are_the_same_extensions(tmp_path: Path) -> None:
    (sample,) = scan(tmp_path, [("a.JPG", b"x"), ("a.Txt", b"one")]).samples
    assert sample.picture is not None
    assert (sample.picture.ext, sample.captions) == ("jpg", ("one",))


def test_a_leading_dot_slash_belongs_to_no_key(tmp_path: Path) -> None:
    (sample,) = scan(tmp_path, [("./0.jpg", b"x"), ("0.json", b'{"caption": "one"}')]).samples
    assert (sample.key, sample.captions) == ("0", ("one",))


def test_a_folder_is_part_of_the_key_and_may_hold_dots(tmp_path: Path) -> None:
    (sample,) = scan(tmp_path, [("v1.0/x/0.jpg", b"x"), ("v1.0/x/0.txt", b"one")]).samples
    assert (sample.key, sample.captions) == ("v1.0/x/0", ("one",))


def test_folders_in_a_tar_are_skipped(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("./")
    folder.type = tarfile.DIRTYPE
    assert len(scan_tar(save(tmp_path, tar_bytes([folder, *PAIRS]))).samples) == 2


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"captions": ["one", " two \n"]}, ("one", "two")),
        ({"captions": ["", "  ", "one"]}, ("one",)),
        ({"caption": "one"}, ("one",)),
        ({"caption": ["one", "two"]}, ("one", "two")),
        ({"captions": ["one"], "caption": "two"}, ("one",)),
        ({"captions": [" "], "caption": "two"}, ("two",)),
        ({"captions": None, "caption": "two"}, ("two",)),
    ],
)
def test_captions_come_from_the_json(tmp_path: Path, record: object, expected: tuple[str, ...]) -> None:
    (sample,) = scan(tmp_path, [("a.json", json.dumps(record).encode()), ("a.txt", b"from txt")]).samples
    assert (sample.captions, sample.caption_source) == (expected, "json")


@pytest.mark.parametrize("record", [{}, {"captions": []}, {"caption": " "}, {"caption": None, "url": "x"}])
def test_captions_come_from_the_txt_when_the_json_has_none(tmp_path: Path, record: object) -> None:
    (sample,) = scan(tmp_path, [("a.json", json.dumps(record).encode()), ("a.txt", b" from txt\n")]).samples
    assert (sample.captions, sample.caption_source) == (("from txt",), "txt")


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path: Path) -> None:
    members = [("a.txt", "\ufeffé".encode()), ("b.json", '\ufeff{"caption": "é"}'.encode())]
    assert [sample.captions for sample in scan(tmp_path, members).samples] == [("é",), ("é",)]


def test_labels_come_from_cls_or_else_from_the_json(tmp_path: Path) -> None:
    members = [
        ("a.jpg", b"x"),
        ("a.cls", b" 3\n"),
        ("a.json", b'{"label": 4, "label_name": "cat"}'),
        ("b.jpg", b"x"),
        ("b.json", b'{"label": 4, "label_name": " dog "}'),
        ("c.jpg", b"x"),
        ("c.json", b'{"label": "n01", "label_name": null}'),
        ("d.jpg", b"x"),
        ("d.cls", b""),
    ]
    labels = [(sample.label, sample.label_name) for sample in scan(tmp_path, members).samples]
    assert labels == [("3", "cat"), ("4", "dog"), ("n01", None), (None, None)]


def test_samples_without_picture_and_caption_are_counted_and_left_out(tmp_path: Path) -> None:
    members = [("a.json", b"{}"), ("b.npy", b"x"), ("c.txt", b" \n"), ("d.cls", b"1"), ("e.jpg", b"x"), ("f.txt", b"y")]
    tar = scan(tmp_path, members)
    assert ([sample.key for sample in tar.samples], tar.filtered) == (["e", "f"], 4)
    assert tar.samples[1].picture is None


def test_unused_members_are_counted_by_extension(tmp_path: Path) -> None:
    members = [*PAIRS, ("b.npy", b"x"), ("c.seg.npy", b"x"), ("d.pkl", b"x"), (".DS_Store", b"x"), ("._a.jpg", b"x")]
    tar = scan(tmp_path, [*members, ("__index__", b"x"), ("__meta__/a.jpg", b"x")])
    assert tar.ignored == {"npy": 1, "seg.npy": 1, "pkl": 1, "(hidden)": 2, "(meta)": 2}
    assert len(tar.samples) == 2


def test_a_pickle_in_a_tar_stays_bytes(tmp_path: Path) -> None:
    bomb = b"cos\nsystem\n(S'exit 1'\ntR."
    tar = scan(tmp_path, [("a.jpg", b"x"), ("a.pkl", bomb), ("a.pyd", bomb), ("a.pt", bomb)])
    assert tar.ignored == {"pkl": 1, "pt": 1, "pyd": 1}


def test_an_empty_tar_holds_no_samples(tmp_path: Path) -> None:
    assert scan(tmp_path, []).samples == ()


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_tar_formats_are_read(tmp_path: Path, tar_format: int) -> None:
    folder = "/".join(["f" * 60] * 2)
    members = [(f"{folder}/{key}.jpg", key.encode()) for key in ("a", "b")]
    assert [sample.key for sample in scan(tmp_path, members, tar_format).samples] == [f"{folder}/a", f"{folder}/b"]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read_whole(tmp_path: Path, tar_format: int) -> None:
    folder = "é" * 150 + "/" + "f" * 150
    members = [(f"{folder}/a.jpg", b"a" * 600), (f"{folder}/a.txt", b"one"), ("z.txt", b"two")]
    content = tar_bytes(members, tar_format)
    first, second = scan_tar(save(tmp_path, content)).samples
    assert first.picture is not None
    assert (first.key, first.captions, second.key) == (f"{folder}/a", ("one",), "z")
    assert content[first.picture.offset : first.picture.offset + 600] == b"a" * 600


def test_a_long_link_header_is_passed_over(tmp_path: Path) -> None:
    long_link = header_block("././@LongLink", 4, tarfile.GNUTYPE_LONGLINK) + with_padding(b"abc\0")
    assert len(scan_tar(save(tmp_path, long_link + tar_bytes(PAIRS))).samples) == 2


def pax(kind: bytes, records: Mapping[str, str]) -> bytes:
    return tarfile.TarInfo._create_pax_generic_header(dict(records), kind, "utf-8")  # type: ignore[attr-defined,no-any-return]


def test_a_pax_size_counts_where_the_header_field_cannot_hold_it(tmp_path: Path) -> None:
    picture = b"x" * 700
    content = (
        pax(tarfile.XHDTYPE, {"size": "700"}) + header_block("a.jpg", 0) + with_padding(picture) + tar_bytes(PAIRS[2:])
    )
    first, second = scan_tar(save(tmp_path, content)).samples
    assert first.picture is not None
    assert (first.picture.size, second.key) == (700, "b")


def test_a_global_pax_header_is_read(tmp_path: Path) -> None:
    content = pax(tarfile.XGLTYPE, {"comment": "commit"}) + tar_bytes(PAIRS)
    assert len(scan_tar(save(tmp_path, content)).samples) == 2


def test_a_size_beyond_the_octal_field_is_read(tmp_path: Path) -> None:
    # base-256 numbers, as GNU tar writes them from 8 GiB on
    block = bytearray(header_block("a.jpg", 0))
    block[124:136] = b"\x80" + (5).to_bytes(11, "big")
    content = with_checksum(bytes(block)) + with_padding(b"12345") + tar_bytes(PAIRS[2:])
    first, _ = scan_tar(save(tmp_path, content)).samples
    assert first.picture is not None
    assert first.picture.size == 5


@given(
    name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=24),
    size=st.integers(0, 8**11 - 1),
    gnu=st.booleans(),
    damage=st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=3),
    repair=st.booleans(),
)
def test_the_quick_header_parser_agrees_with_tarfile(
    name: str, size: int, gnu: bool, damage: list[tuple[int, int]], repair: bool
) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT if gnu else tarfile.USTAR_FORMAT)[-512:])
    for at, value in damage:
        block[at] = value
    if repair:
        block = bytearray(with_checksum(bytes(block)))
    plain = plain_header(bytes(block))
    try:
        parsed = tarfile.TarInfo.frombuf(bytes(block), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        # tarfile also parses owners, dates and devices, which a scan has no use for
        unused = any(100 <= at < 124 or 136 <= at < 148 or 329 <= at < 345 for at, _ in damage)
        assert plain is None or unused
    else:
        assert plain in (None, (parsed.name, parsed.size, parsed.type))
        assert damage or plain is not None


# ---------------------------------------------------------------------------------------------------------------------
# Truncation


def members_only(members: Iterable[tuple[str, bytes] | tarfile.TarInfo], tar_format: int) -> bytes:
    content = tar_bytes(members, tar_format)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.getmembers()
        return content[: tar.offset]  # where the closing blocks begin


def six_samples() -> bytes:
    """A tar of six samples in fifteen members, with long names in both ways, and what is not read between them."""
    folder = tarfile.TarInfo("d/")
    folder.type = tarfile.DIRTYPE
    long = "é" * 51
    parts = [
        ([("0.jpg", b"picture 0" * 99), ("0.txt", b"caption 0")], tarfile.USTAR_FORMAT),
        ([("1.json", b'{"captions": ["one", "two"]}'), ("1.jpg", b"x" * 512), ("1.cls", b"")], tarfile.USTAR_FORMAT),
        ([("empty.jpg", b""), ("filtered.npy", b"x" * 513), folder], tarfile.USTAR_FORMAT),
        ([(f"d/{long}.jpg", b"picture")], tarfile.PAX_FORMAT),
        ([(".hidden", b"x"), (f"{long}.txt", b"caption"), (f"{long}.jpg", b"picture")], tarfile.GNU_FORMAT),
        ([("./3.webp", b"x"), ("./3.seg.npy", b"x"), ("filtered2.json", b"{}")], tarfile.USTAR_FORMAT),
    ]
    return b"".join(members_only(members, tar_format) for members, tar_format in parts) + bytes(2048)


def landmarks(content: bytes) -> tuple[list[tuple[str, int]], list[int], int]:
    """What tarfile sees in a tar: (key, the bytes from which on the key is known to be complete) in order; the bytes
    at which a member, with its padding, ends; and the bytes with which the end-of-archive marker is whole."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = tar.getmembers()
    ends = [-(-(info.offset_data + info.size) // 512) * 512 for info in members]
    complete: list[tuple[str, int]] = []
    current = ""
    for info in members:
        folder, _, base = info.name.removeprefix("./").rpartition("/")
        key = f"{folder}/{base.split('.')[0]}".lstrip("/")
        if info.isfile() and key and not base.startswith(("__", ".")) and key != current:
            complete += [(current, info.offset_data)] * bool(current)
            current = key
    return [*complete, (current, ends[-1] + 1024)], ends, ends[-1] + 1024


def test_a_tar_cut_at_any_byte_is_refused_or_gives_exactly_what_is_complete(tmp_path: Path) -> None:
    content = six_samples()
    complete, ends, marker = landmarks(content)
    path = save(tmp_path, content)
    whole = scan_tar(path)
    assert len(whole.samples) == 6
    assert (whole.filtered, whole.truncated_at, whole.missing_eof) == (2, None, False)
    samples = {sample.key: sample for sample in whole.samples}
    refusals = set()
    for length in reversed(range(len(content))):
        os.truncate(path, length)
        if length >= marker:
            for options in ({}, {"on_truncated": "keep-complete"}, {"allow_missing_eof": True}):
                tar = scan_tar(path, **options)
                assert (tar.samples, tar.truncated_at, tar.missing_eof) == (whole.samples, None, False)
            continue
        kept = [samples[key] for key, known_at in complete if length >= known_at and key in samples]
        plural = "" if len(kept) == 1 else "s"
        what = f"{path} ends at byte {length} without end-of-archive; {len(kept)} complete sample{plural}"
        with pytest.raises(TruncatedTar) as error:
            scan_tar(path)
        assert error.value.what == (what if length else f"{path} is empty (0 bytes)")
        refusals.add((length in {*ends, ends[-1] + 512}, error.value.way_out))

        if length < 512:
            for options in ({"on_truncated": "keep-complete"}, {"allow_missing_eof": True}):
                with pytest.raises(TruncatedTar):
                    scan_tar(path, **options)
            continue
        tar = scan_tar(path, on_truncated="keep-complete")
        assert list(tar.samples) == kept
        assert tar.filtered == sum(length >= known_at and key not in samples for key, known_at in complete)
        assert (tar.truncated_at, tar.bytes, tar.missing_eof) == (length, length, False)
        if length in {*ends, ends[-1] + 512}:
            both = scan_tar(path, on_truncated="keep-complete", allow_missing_eof=True)
            tar = scan_tar(path, allow_missing_eof=True)
            assert tar == both
            assert (tar.truncated_at, tar.bytes, tar.missing_eof) == (None, length, True)
            assert tar.sha256 == hashlib.sha256(content[:length]).hexdigest()
            # All but the last are those of the whole tar; the last has the members that are there, and no others.
            assert list(tar.samples[: len(kept)]) == kept
            for last in tar.samples[len(kept) :]:
                assert last.key not in {sample.key for sample in kept}
                assert last.picture in (None, samples[last.key].picture)
                assert last.captions in ((), samples[last.key].captions)
            assert len(tar.samples) <= len(kept) + 1
        else:
            with pytest.raises(TruncatedTar):
                scan_tar(path, allow_missing_eof=True)
    copy = "copy or write the tar again and compare its size with the original's"
    keep = f"{copy}; --on-truncated keep-complete keeps its complete samples"
    assert refusals == {
        (False, copy),  # too short for one header: nothing shows that it was a tar
        (False, keep),
        (True, f"{keep}; no member is cut, so --allow-missing-eof takes it as whole"),
    }


def test_a_truncated_tar_is_named_with_the_byte_it_ends_at_and_its_complete_samples(tmp_path: Path) -> None:
    path = save(tmp_path, tar_bytes(PAIRS)[:3000])
    with pytest.raises(TruncatedTar) as error:
        scan_tar(path)
    assert error.value.what == f"{path} ends at byte 3000 without end-of-archive; 1 complete sample"
    assert error.value.exit_code == 3


def test_the_last_sample_of_a_truncated_tar_is_dropped_though_its_members_are_whole(tmp_path: Path) -> None:
    content = tar_bytes(PAIRS)
    whole = scan_tar(save(tmp_path, content))
    path = save(tmp_path, content[:4096], "cut.tar")
    assert scan_tar(path, on_truncated="keep-complete").samples == whole.samples[:1]
    assert scan_tar(path, allow_missing_eof=True).samples == whole.samples


def test_other_damage_is_refused_with_every_option(tmp_path: Path) -> None:
    damaged = bytearray(tar_bytes([*PAIRS, ("c.jpg", b"x")]))
    damaged[2048 + 3] ^= 1
    cases = {
        "no valid tar header": bytes(damaged),
        "data follows the end-of-archive marker": tar_bytes(PAIRS) * 2,
        "a lone block of zeros": tar_bytes(PAIRS)[: 4096 + 512] + tar_bytes(PAIRS),
        "is compressed": gzip.compress(tar_bytes(PAIRS)),
        "is not a tar": b"<html>" * 1000,
        "is split": tar_bytes([("0.jpg", b"x"), ("1.jpg", b"x"), ("0.txt", b"a")])[:2600],
        "ends at byte 120 without end-of-archive": b"<html>" * 20,
        "ends at byte 512 without end-of-archive": bytes(512),
        "is empty": b"",
    }
    for what, content in cases.items():
        with pytest.raises(BadTar, match=what):
            scan_tar(save(tmp_path, content), on_truncated="keep-complete", allow_missing_eof=True)


def test_the_options_reach_every_tar_of_several(tmp_path: Path) -> None:
    content = tar_bytes(PAIRS)
    paths = [save(tmp_path, content[:length], f"{length}.tar") for length in (3000, 4096, 5120)]
    tars = scan_tars(paths, on_truncated="keep-complete", allow_missing_eof=True)
    assert [(tar.truncated_at, tar.missing_eof) for tar in tars] == [(3000, False), (None, True), (None, False)]
    with pytest.raises(TruncatedTar, match=r"4096\.tar"):
        scan_tars(paths[1:], on_truncated="error")


@pytest.mark.parametrize("change", ["grows", "shrinks"])
@pytest.mark.parametrize("cut", [3000, 20480])
def test_a_tar_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, cut: int
) -> None:
    content = tar_bytes([*PAIRS, ("c.jpg", b"x" * 5000)])[:cut]
    path = save(tmp_path, content)
    add = tars._Scan.add

    def add_and_change(scan: Any, member: Any) -> None:
        os.truncate(path, len(content) + 512 if change == "grows" else 2048)
        add(scan, member)

    monkeypatch.setattr(tars, "_PIECE_BYTES", 1024)
    monkeypatch.setattr(tars._Scan, "add", add_and_change)
    with pytest.raises(BadTar, match=f"changed while it was read: {len(content)} bytes, then"):
        scan_tar(path, on_truncated="keep-complete", allow_missing_eof=True)


def test_an_empty_file_is_a_truncated_tar(tmp_path: Path) -> None:
    path = save(tmp_path, b"")
    with pytest.raises(TruncatedTar, match=r"a\.tar is empty \(0 bytes\)"):
        scan_tar(path)


def test_one_block_of_zeros_is_no_end_of_archive(tmp_path: Path) -> None:
    content = tar_bytes(PAIRS)
    end = 512 * 8
    with pytest.raises(TruncatedTar, match="ends at byte 4608"):
        scan_tar(save(tmp_path, content[: end + 512]))
    with pytest.raises(BadTar, match="byte 4096: a lone block of zeros"):
        scan_tar(save(tmp_path, content[: end + 512] + content))


def test_tars_joined_by_cat_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, tar_bytes(PAIRS) + tar_bytes([("z.jpg", b"x")]))
    with pytest.raises(BadTar, match="byte 4096: data follows the end-of-archive marker") as error:
        scan_tar(path)
    assert "keep them as two files" in error.value.way_out


def test_a_long_tail_of_zeros_is_a_hole_not_padding(tmp_path: Path) -> None:
    content = tar_bytes(PAIRS)[: 4096 + 1024]
    assert len(scan_tar(save(tmp_path, content + bytes(MAX_PADDING_BYTES))).samples) == 2
    with pytest.raises(BadTar, match="1048577 bytes of zeros follow the end-of-archive marker"):
        scan_tar(save(tmp_path, content + bytes(MAX_PADDING_BYTES + 1)))


def test_a_damaged_header_is_named_with_its_offset(tmp_path: Path) -> None:
    content = bytearray(tar_bytes(PAIRS))
    content[2048 + 3] ^= 1
    with pytest.raises(BadTar, match=r"byte 2048: no valid tar header \(bad checksum\), after 0 complete samples"):
        scan_tar(save(tmp_path, bytes(content)))


@pytest.mark.parametrize("cut", [20, 10_000])
def test_a_compressed_tar_says_how_to_decompress_it(tmp_path: Path, cut: int) -> None:
    path = save(
        tmp_path, gzip.compress(tar_bytes([*PAIRS, ("z.jpg", random.Random(0).randbytes(9000))]))[:cut], "a.tar.gz"
    )
    with pytest.raises(BadTar, match=r"a\.tar\.gz is compressed \(gzip\)") as error:
        scan_tar(path)
    assert error.value.way_out == f"decompress it first: gunzip {path}"


def test_something_else_is_no_tar(tmp_path: Path) -> None:
    with pytest.raises(BadTar, match=r"a\.tar is not a tar: no valid header at byte 0"):
        scan_tar(save(tmp_path, b"<html>" * 1000))


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def test_interleaved_members_are_a_split_key(tmp_path: Path) -> None:
    path = save(tmp_path, tar_bytes([("0.jpg", b"x"), ("1.jpg", b"x"), ("0.txt", b"a"), ("1.txt", b"b")]))
    with pytest.raises(SplitKey) as error:
        scan_tar(path)
    assert error.value.what == (
        f"{path}: key '0' is split: its members begin at byte 0, and '0.txt' follows at byte 2048, after other keys"
    )
    assert error.value.way_out == "write the tar again, sorted by name: tar --sort=name -cf NEW.tar -C FOLDER ."


def test_a_key_split_by_unused_members_is_split_too(tmp_path: Path) -> None:
    with pytest.raises(SplitKey):
        scan(tmp_path, [("0.jpg", b"x"), ("1.npy", b"x"), ("0.npy", b"x")])


@pytest.mark.parametrize("again", ["0.jpg", "0.JPG", "./0.jpg"])
def test_a_repeated_member_is_a_duplicate(tmp_path: Path, again: str) -> None:
    path = save(tmp_path, tar_bytes([("0.jpg", b"x"), (again, b"y")]))
    with pytest.raises(DuplicateKey) as error:
        scan_tar(path)
    name = again.removeprefix("./")
    assert error.value.what == f"{path}: member {name!r} at byte 1024 repeats one of key '0', begun at byte 0"


def test_a_key_that_comes_again_with_its_members_is_a_duplicate(tmp_path: Path) -> None:
    with pytest.raises(DuplicateKey, match=r"'0\.jpg' at byte 2048 repeats one of key '0', begun at byte 0"):
        scan(tmp_path, [("0.jpg", b"x"), ("1.jpg", b"x"), ("0.jpg", b"x")])


def test_a_duplicate_unused_member_is_a_duplicate(tmp_path: Path) -> None:
    with pytest.raises(DuplicateKey):
        scan(tmp_path, [("0.npy", b"x"), ("0.npy", b"x")])


def test_a_key_of_very_many_members_is_refused_by_name_before_they_are_all_read(tmp_path: Path) -> None:
    members = [(f"k.x{i}", b"") for i in range(20_000)]
    with pytest.raises(BadTar, match="byte 0: key 'k' has more than 1,000 members") as error:
        scan(tmp_path, members)
    assert error.value.way_out.startswith("give each sample its own key")
    assert scan(tmp_path, [*members[:999], ("k.jpg", b"x")]).ignored["x0"] == 1


def test_two_pictures_under_one_key_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadTar, match="byte 1024: key '0' has two pictures, jpg and png") as error:
        scan(tmp_path, [("0.jpg", b"x"), ("0.png", b"x")])
    assert error.value.way_out == "give each picture its own key"


@pytest.mark.parametrize("name", ["img.v1.0001.jpg", "img.v1.TXT", "x/a.b.json"])
def test_a_dotted_name_is_refused_with_a_name_that_would_do(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadTar, match="has more than one dot: WebDataset takes") as error:
        scan(tmp_path, [(name, b"x")])
    better = {"img.v1.0001.jpg": "img_v1_0001.jpg", "img.v1.TXT": "img_v1.TXT", "x/a.b.json": "a_b.json"}[name]
    assert error.value.way_out == f"rename it so that one dot is left: {better}"


@pytest.mark.parametrize(("name", "what"), [("README", "extension"), ("x/a.", "extension"), (".jpg", "key")])
def test_a_name_without_key_or_extension_is_refused(tmp_path: Path, name: str, what: str) -> None:
    with pytest.raises(BadTar, match=f"byte 0: member '.*' has no {what}"):
        scan(tmp_path, [(name, b"x")])


@pytest.mark.parametrize(
    "name", ["/etc/a.jpg", "../a.jpg", "x/../a.jpg", "x//a.jpg", "x/./a.jpg", ".//a.jpg", "a.jpg/"]
)
def test_a_path_that_leaves_its_place_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadTar, match="is not a plain relative path"):
        scan_tar(save(tmp_path, header_block(name, 1) + with_padding(b"x") + tar_bytes([])))


@pytest.mark.parametrize(
    "name", [b"a\n.jpg", b"a\x1b[2J.jpg", b"\xff\xfe.jpg", "a\u2028.jpg".encode(), "\x85.jpg".encode()]
)
def test_control_characters_and_bytes_that_are_no_text_are_refused(tmp_path: Path, name: bytes) -> None:
    content = header_block(name.decode("utf-8", "surrogateescape"), 1) + with_padding(b"x") + tar_bytes([])
    with pytest.raises(BadTar, match="is not plain UTF-8 text") as error:
        scan_tar(save(tmp_path, content))
    assert error.value.what.isprintable()


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.CHRTYPE, "a character device"),
        (tarfile.BLKTYPE, "a block device"),
        (tarfile.FIFOTYPE, "a FIFO"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (b"Q", "of unknown type b'Q'"),
    ],
)
def test_only_files_and_folders_are_read(tmp_path: Path, kind: bytes, what: str) -> None:
    with pytest.raises(BadTar, match=f"byte 0: member 'a.jpg' is {what}"):
        scan_tar(save(tmp_path, header_block("a.jpg", 0, kind) + tar_bytes(PAIRS)))


def test_a_sparse_file_in_a_pax_header_is_refused(tmp_path: Path) -> None:
    content = pax(tarfile.XHDTYPE, {"GNU.sparse.major": "1"}) + tar_bytes(PAIRS)
    with pytest.raises(BadTar, match="is a sparse file"):
        scan_tar(save(tmp_path, content))


def test_an_extended_header_is_bounded(tmp_path: Path) -> None:
    size = MAX_EXTENDED_HEADER_BYTES + 1
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE):
        with pytest.raises(BadTar, match=f"byte 0: an extended header of {size} bytes"):
            scan_tar(save(tmp_path, header_block("x", size, kind) + bytes(1024)))


@pytest.mark.parametrize("raw", [b"nonsense", b"8 size=1\n", b"99 size=1\n", b"0 a=1\n", b"10 size\n   ", b"7 a=bcd"])
def test_a_malformed_pax_header_is_refused(tmp_path: Path, raw: bytes) -> None:
    content = header_block("x", len(raw), tarfile.XHDTYPE) + with_padding(raw) + tar_bytes(PAIRS)
    with pytest.raises(BadTar, match=r"byte 0: a (malformed )?pax header"):
        scan_tar(save(tmp_path, content))


def test_a_header_of_100_megabytes_is_refused_from_its_claim(tmp_path: Path) -> None:
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
        path = save(tmp_path, header_block("x", 100 << 20, kind))
        os.truncate(path, 101 << 20)  # they are there, too: a hole in the file
        with memory_below(4 << 20), pytest.raises(BadTar, match="an extended header of 104857600 bytes"):
            scan_tar(path)


def with_size_field(block: bytes, field: bytes) -> bytes:
    return with_checksum(block[:124] + field.ljust(12, b"\0") + block[136:])


@pytest.mark.parametrize(
    ("field", "what"),
    [
        (b"\xff" * 12, "member 'a.jpg' has size -1"),
        (b"\xff" + bytes(11), f"member 'a.jpg' has size {-(2**88)}"),
        (b"-0000000001", "member 'a.jpg' has size -1"),
        (b"00000000008", "is not a tar: no valid header at byte 0"),
        (b"\x81" + bytes(11), "is not a tar: no valid header at byte 0"),
        (b"\x80" + b"\xff" * 11, "ends at byte 5120 without end-of-archive; 0 complete samples"),
        (b"7" * 12, "ends at byte 5120 without end-of-archive; 0 complete samples"),
    ],
)
def test_a_size_that_cannot_be_is_refused(tmp_path: Path, field: bytes, what: str) -> None:
    content = with_size_field(header_block("a.jpg", 0), field) + tar_bytes(PAIRS[2:])[: 4096 + 512]
    with memory_below(4 << 20), pytest.raises(BadTar) as error:
        scan_tar(save(tmp_path, content))
    assert what in error.value.what


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("field", [b"\xff" * 12, b"\x80" + b"\xff" * 11])
def test_an_extended_header_with_a_size_that_cannot_be_is_refused(tmp_path: Path, kind: bytes, field: bytes) -> None:
    content = with_size_field(header_block("x", 0, kind), field) + tar_bytes(PAIRS)
    with pytest.raises(BadTar, match=r"byte 0: an extended header of -?[0-9]+ bytes; at most"):
        scan_tar(save(tmp_path, content))


def test_a_name_of_a_megabyte_is_refused_in_a_short_message(tmp_path: Path) -> None:
    for path_, tar_format in (
        ("x" * 1_000_000 + ".jpg", tarfile.GNU_FORMAT),
        ("x" * 5000 + ".jpg", tarfile.PAX_FORMAT),
    ):
        with memory_below(16 << 20), pytest.raises(BadTar, match=r"a member name of [0-9]+ characters") as error:
            scan_tar(save(tmp_path, tar_bytes([(path_, b"x")], tar_format)))
        assert len(error.value.what) < 300
    name = "x" * (MAX_NAME_CHARACTERS - 4)
    assert scan(tmp_path, [(f"{name}.jpg", b"x")], tarfile.PAX_FORMAT).samples[0].key == name


@pytest.mark.parametrize("name", ["../a.jpg", "/a.jpg", "a\0.jpg", "a\n.jpg", "d/../../a.jpg", ""])
def test_a_hostile_name_in_a_pax_header_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadTar, match=r"is not plain UTF-8 text|is not a plain relative path"):
        scan_tar(save(tmp_path, pax(tarfile.XHDTYPE, {"path": name}) + tar_bytes(PAIRS)))


@pytest.mark.parametrize("records", [{"path": "a.jpg"}, {"size": "7"}, {"GNU.sparse.major": "1"}])
def test_a_global_header_that_names_or_sizes_all_members_is_refused(tmp_path: Path, records: dict[str, str]) -> None:
    with pytest.raises(BadTar, match=r"byte 0: a global pax header sets '(path|size|GNU\.sparse\.)' of all members"):
        scan_tar(save(tmp_path, pax(tarfile.XGLTYPE, records) + tar_bytes(PAIRS)))


def test_a_member_with_two_extended_names_or_sizes_is_refused(tmp_path: Path) -> None:
    long_name = header_block("././@LongLink", 6, tarfile.GNUTYPE_LONGNAME) + with_padding(b"z.jpg\0")
    path, size = pax(tarfile.XHDTYPE, {"path": "y.jpg"}), pax(tarfile.XHDTYPE, {"size": "9"})
    for headers in (long_name * 2, path * 2, path + size, long_name + path, path + long_name):
        with pytest.raises(BadTar, match="two extended headers for one member"):
            scan_tar(save(tmp_path, headers + tar_bytes(PAIRS)))
    assert scan_tar(save(tmp_path, long_name + size + tar_bytes(PAIRS))).samples[0].key == "z"


def test_a_pax_size_beyond_the_file_is_a_truncated_tar(tmp_path: Path) -> None:
    content = pax(tarfile.XHDTYPE, {"size": "9" * 20}) + tar_bytes(PAIRS)
    with memory_below(4 << 20), pytest.raises(TruncatedTar, match="; 0 complete samples"):
        scan_tar(save(tmp_path, content))


def test_headers_of_all_members_do_not_pile_up(tmp_path: Path) -> None:
    with open(tmp_path / "a.tar", "wb") as file:
        for number in range(100):
            file.write(pax(tarfile.XGLTYPE, {f"comment{number}": "x" * 200_000}))
        file.write(tar_bytes(PAIRS))
    with memory_below(6 << 20):
        assert len(scan_tar(str(tmp_path / "a.tar")).samples) == 2


@pytest.mark.parametrize("size", ["-1", "abc", "1e3", "9" * 30])
def test_a_pax_size_that_is_no_number_is_refused(tmp_path: Path, size: str) -> None:
    with pytest.raises(BadTar, match="a pax header with size"):
        scan_tar(save(tmp_path, pax(tarfile.XHDTYPE, {"size": size}) + tar_bytes(PAIRS)))


def test_an_extended_header_without_its_member_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadTar, match="an extended header without its member"):
        scan_tar(save(tmp_path, tar_bytes([]) and pax(tarfile.XHDTYPE, {"path": "a.jpg"}) + tar_bytes([])))


# ---------------------------------------------------------------------------------------------------------------------
# Hostile captions


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
        (b"[1]", "it is a list, not an object"),
        (b"null", "it is null, not an object"),
        (b'{"captions": "one"}', "'captions' is a string, not a list of strings"),
        (b'{"captions": [1]}', "'captions' holds a number, not a string"),
        (b'{"captions": [null]}', "'captions' holds null, not a string"),
        (b'{"caption": {}}', "'caption' holds an object, not a string"),
        (b'{"caption": true}', "'caption' holds true, not a string"),
        (b'{"caption": "\\ud800"}', "'caption' holds half a surrogate pair"),
        (b'{"label": 1.5}', "'label' holds a number, not a string"),
        (b'{"label": true}', "'label' holds true, not a string"),
        (b'{"label_name": 3}', "'label_name' holds a number, not a string"),
        (b'{"caption": "one", "caption": "two"}', "'caption' appears twice"),
        (b'{"label": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "it is nested too deeply"),
        (b'{"a": ' + b"[" * 1_000_000, "it is nested too deeply"),
        (b'{"caption": NaN}', "'caption' holds a number, not a string"),
        (b'{"label": NaN}', "'label' holds a number, not a string"),
        (b'{"label": 1e999}', "'label' holds a number, not a string"),
        (b'{"label": 1, "label": 2}', "'label' appears twice"),
        (b'{"x": -' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"caption": "one"} {"caption": "two"}', "Extra data"),
    ],
)
def test_bad_json_is_named_by_tar_key_and_offset(tmp_path: Path, raw: bytes, what: str) -> None:
    path = save(tmp_path, tar_bytes([("a.jpg", b"x"), ("a.json", raw)]))
    with pytest.raises(BadTar) as error:
        scan_tar(path)
    assert error.value.what.startswith(f"{path}, byte 1024: the json of key 'a' cannot be used: {what}")
    assert error.value.way_out


def test_unread_json_may_hold_anything(tmp_path: Path) -> None:
    raw = b'{"x": NaN, "x": {"caption": 3}, "caption": "one", "exif": [[[]]]}'
    assert scan(tmp_path, [("a.json", raw)]).samples[0].captions == ("one",)


@pytest.mark.parametrize("ext", ["txt", "json", "cls"])
def test_text_must_be_utf8(tmp_path: Path, ext: str) -> None:
    with pytest.raises(BadTar, match=rf"byte 0: the {ext} of key 'a' is not UTF-8 \(byte 3\)"):
        scan(tmp_path, [(f"a.{ext}", b"caf\xe9")])


@pytest.mark.parametrize("ext", ["json", "txt", "cls"])
def test_text_members_are_bounded(tmp_path: Path, ext: str) -> None:
    path = tmp_path / "a.tar"
    limit = MAX_JSON_BYTES if ext == "json" else MAX_TEXT_BYTES
    for size in (limit + 1, 100 << 20):
        with open(path, "wb") as file:
            file.write(header_block(f"a.{ext}", size))
            file.truncate(size + 4096)  # a hole
        with (
            memory_below(4 << 20),
            pytest.raises(BadTar, match=f"the {ext} of key 'a' has {size} bytes; at most {limit}"),
        ):
            scan_tar(str(path))


@pytest.mark.parametrize(
    "raw",
    [
        b'{"x": [' + b"[]," * 1_000_000 + b"[]]}",
        b'{"x": [' + b"{}," * 1_000_000 + b"{}]}",
        b'{"x": "' + b"\\u0000" * 600_000 + b'"}',
        b"{" + b",".join(b'"%x": 1' % number for number in range(300_000)) + b"}",
    ],
)
def test_json_that_unfolds_in_memory_is_bounded(tmp_path: Path, raw: bytes) -> None:
    assert len(raw) < MAX_JSON_BYTES
    path = save(tmp_path, tar_bytes([("a.json", raw), ("a.txt", b"one")]))
    with memory_below(160 << 20):
        assert scan_tar(path).samples[0].captions == ("one",)


# ---------------------------------------------------------------------------------------------------------------------
# Tars in general

KEYS = st.sampled_from(["a", "b", "a1", "é", "d/a", "d.x/a"])
EXTS = st.sampled_from(["jpg", "png", "json", "txt", "cls", "npy", "JPG", "b.jpg", "b.npy"])
TEXTS = st.sampled_from([b"", b"one", b'{"caption": "one"}', b'{"captions": ["one", "two"]}', b"x" * 513])
PASSED_OVER = st.sampled_from([".hidden", "d/.DS_Store", "._a.jpg", "__meta__", "__meta__/a.jpg"])
JSONS = {b'{"caption": "one"}': ("one",), b'{"captions": ["one", "two"]}': ("one", "two")}


@st.composite
def member_lists(draw: st.DrawFn) -> list[tuple[str, bytes]]:
    """Mostly well-formed lists of members, some with a member moved, repeated, or between others."""
    members = []
    for key in draw(st.lists(KEYS, max_size=4, unique=draw(st.sampled_from([True, True, True, False])))):
        exts = draw(st.lists(EXTS, min_size=1, max_size=3, unique=draw(st.sampled_from([True, True, False]))))
        members += [(f"{key}.{ext}", draw(st.sampled_from(list(JSONS)) if ext == "json" else TEXTS)) for ext in exts]
    for name in draw(st.lists(PASSED_OVER, max_size=2)):
        members.insert(draw(st.integers(0, len(members))), (name, b"x"))
    if len(members) > 1 and draw(st.sampled_from([False, False, True])):
        members.insert(draw(st.integers(0, len(members) - 1)), members.pop(draw(st.integers(0, len(members) - 1))))
    prefixes = draw(st.sampled_from([("",), ("",), ("./",), ("", "./")]))
    return [(draw(st.sampled_from(prefixes)) + name, data) for name, data in members]


@settings(max_examples=400, deadline=None)
@given(members=member_lists(), tar_format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT]))
def test_every_sample_is_one_contiguous_run_and_what_webdataset_mixes_up_is_refused(
    members: list[tuple[str, bytes]], tar_format: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = tar_bytes(members, tar_format)
    path = save(tmp_path_factory.getbasetemp(), content, "generated.tar")
    # The runs, by tarfile: (key, {extension: (offset, size)}) wherever the key changes.
    runs: list[tuple[str, dict[str, tuple[int, int]]]] = []
    wrong = False
    with tarfile.open(path) as tar:
        for info in tar:
            name = info.name.removeprefix("./")
            folder, slash, base = name.rpartition("/")
            key, ext = folder + slash + base.partition(".")[0], base.partition(".")[2].lower()
            if base.startswith(".") or name.startswith("__"):
                continue
            if not runs or runs[-1][0] != key:
                wrong |= any(other == key for other, _ in runs)
                runs.append((key, {}))
            wrong |= ext in runs[-1][1] or ext == "b.jpg" or {ext, *runs[-1][1]} >= {"jpg", "png"}
            runs[-1][1][ext] = (info.offset_data, info.size)
    try:
        found = scan_tar(path)
    except BadTar:
        assert wrong, "a tar without a fault was refused"
        return
    assert not wrong, "a split key, a duplicate, a dotted name or a second picture was let through"

    def data(place: tuple[int, int] | None) -> bytes:
        return content[place[0] : sum(place)] if place else b""

    kept = {sample.key: sample for sample in found.samples}
    assert len(kept) + found.filtered == len(runs)
    assert list(kept) == [key for key, _ in runs if key in kept]
    for key, run in runs:
        picture = next((place for ext, place in run.items() if ext in ("jpg", "png")), None)
        captions = JSONS.get(data(run.get("json"))) or tuple(filter(None, [data(run.get("txt")).decode()]))
        if key in kept:
            ours = kept[key].picture
            assert ((ours.offset, ours.size) if ours else None) == picture
            assert kept[key].captions == captions
            assert kept[key].label == (data(run.get("cls")).decode() or None)
        else:
            assert (picture, captions) == (None, ())

    # Read right, where webdataset does not: ./a and a are one key, d/.hidden and ./__meta__/a.jpg belong to none.
    mixed = len({name.startswith("./") for name, _ in members}) > 1
    if not mixed and not any("d/." in name or name.startswith("./__") for name, _ in members):
        theirs = [
            (sample["__key__"].removeprefix("./"), sample.keys() - {"__key__", "__url__"})
            for sample in read_by_webdataset(path)
        ]
        assert theirs == [(key, run.keys()) for key, run in runs]


@settings(max_examples=200, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 10_239), st.integers(1, 255)), min_size=1, max_size=3))
def test_a_damaged_tar_gives_samples_or_a_named_error_never_another(
    flips: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(tar_bytes(PAIRS, tarfile.PAX_FORMAT))
    for at, mask in flips:
        content[at] ^= mask
    path = save(tmp_path_factory.getbasetemp(), bytes(content), "damaged.tar")
    refused: EmkumError | None = None
    try:
        tar = scan_tar(path)
    except EmkumError as error:
        refused = error
    if refused is not None:
        assert refused.exit_code == 3
        assert refused.what.isprintable()
        assert refused.way_out
    else:
        assert tar.sha256 == hashlib.sha256(content).hexdigest()


def test_a_tar_with_more_members_than_the_buffer_holds_is_read_whole(tmp_path: Path) -> None:
    numbers = random.Random(0)
    members = [(f"{index:04d}.jpg", numbers.randbytes(numbers.randrange(60_000))) for index in range(200)]
    content = tar_bytes(members)
    tar = scan_tar(save(tmp_path, content))
    assert tar.sha256 == hashlib.sha256(content).hexdigest()
    pictures = [sample.picture for sample in tar.samples if sample.picture]
    assert [content[p.offset : p.offset + p.size] for p in pictures] == [data for _, data in members]


def read_by_webdataset(path: str) -> list[dict[str, Any]]:
    from webdataset.tariterators import group_by_keys, tar_file_expander  # imports torch

    with open(path, "rb") as file:  # webdataset's own opener leaves the file to the garbage collector
        return list(group_by_keys(tar_file_expander([{"url": path, "stream": file}])))


@pytest.mark.parametrize(
    ("names", "theirs"),
    [
        (["0.jpg", "1.jpg", "0.txt", "1.txt"], [{"jpg"}, {"jpg"}, {"txt"}, {"txt"}]),
        (["i.v1.1.jpg", "i.v1.2.jpg"], [{"v1.1.jpg", "v1.2.jpg"}]),
        (["./0.jpg", "0.txt"], [{"jpg"}, {"txt"}]),
        (["0.jpg", "README", "0.txt"], [{"jpg", "txt"}]),
    ],
)
def test_what_webdataset_mixes_up_in_silence_is_refused_or_read_right(
    tmp_path: Path, names: list[str], theirs: list[set[str]]
) -> None:
    path = save(tmp_path, tar_bytes([(name, b"x") for name in names]))
    assert [sample.keys() - {"__key__", "__url__"} for sample in read_by_webdataset(path)] == theirs
    if names[0].startswith("./"):
        (sample,) = scan_tar(path).samples
        assert (sample.key, sample.captions) == ("0", ("x",))
    else:
        with pytest.raises(BadTar):
            scan_tar(path)


def test_a_missing_member_is_not_taken_from_a_neighbour(tmp_path: Path) -> None:
    members = [("0.jpg", b"x"), ("1.txt", b"one"), ("2.jpg", b"x"), ("2.txt", b"two"), ("3.jpg", b"x")]
    found = [(s.key, s.picture is not None, s.captions) for s in scan(tmp_path, members).samples]
    assert found == [("0", True, ()), ("1", False, ("one",)), ("2", True, ("two",)), ("3", True, ())]


def test_a_key_in_two_tars_is_two_samples(tmp_path: Path) -> None:
    paths = [save(tmp_path, tar_bytes([("0.jpg", name.encode())]), name) for name in ("a.tar", "b.tar")]
    for tar, name in zip(scan_tars(paths), ("a.tar", "b.tar"), strict=True):
        (sample,) = tar.samples
        assert sample.picture is not None
        assert (tar.name, sample.key) == (name, "0")
        assert read_member(tar.path, sample.picture.offset, sample.picture.size) == name.encode()


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    numbers = random.Random(1)
    members: list[tuple[str, bytes]] = []
    for index in range(20):
        key = f"{'dir.1/' * (index % 2)}{index:03d}"
        members += [(f"{key}.jpg", numbers.randbytes(700)), (f"{key}.txt", f"caption {index}".encode())]
        members += [(f"{key}.cls", b"7")] * (index % 3 == 0)
    path = save(tmp_path, tar_bytes(members))
    theirs = read_by_webdataset(path)
    ours = scan_tar(path).samples
    assert [sample.key for sample in ours] == [sample["__key__"] for sample in theirs]
    for sample, their in zip(ours, theirs, strict=True):
        assert sample.picture is not None
        assert read_member(path, sample.picture.offset, sample.picture.size) == their["jpg"]
        assert sample.captions == (their["txt"].decode(),)
        assert sample.label == (their["cls"].decode() if "cls" in their else None)


# ---------------------------------------------------------------------------------------------------------------------
# Reading pictures


def test_a_picture_can_be_read_through_an_open_file(tmp_path: Path) -> None:
    fd = os.open(save(tmp_path, b"0123456789"), os.O_RDONLY)
    try:
        assert read_member(fd, 2, 3) == b"234"
        assert read_member(fd, 2, 0) == b""
        with pytest.raises(SourceChanged, match="ends at byte 10; a member was found there up to byte 12"):
            read_member(fd, 8, 4)
    finally:
        os.close(fd)


def test_a_tar_that_became_shorter_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, b"0123456789")
    with pytest.raises(SourceChanged, match=r"a\.tar ends at byte 10") as error:
        read_member(path, 4, 100)
    assert error.value.way_out == "put the original tar back"


def test_several_tars_are_scanned_in_order(tmp_path: Path) -> None:
    paths = [save(tmp_path, tar_bytes([(f"{index}.jpg", b"x")]), f"{index}.tar") for index in range(6)]
    assert [tar.samples[0].key for tar in scan_tars(paths, threads=3)] == list("012345")
    for index in (2, 4):
        save(tmp_path, b"", f"{index}.tar")
    with pytest.raises(TruncatedTar, match=r"2\.tar"):
        scan_tars(paths, threads=3)


def test_scanning_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoData, match="no file"):
        scan_tar(str(tmp_path / "none.tar"))
    with pytest.raises(UsageError, match="is not a file"):
        scan_tar(str(tmp_path))
    with pytest.raises(UsageError, match="is no name for a tar"):
        scan_tar(save(tmp_path, tar_bytes(PAIRS), "a\nb.tar"))


# ---------------------------------------------------------------------------------------------------------------------
# Finding tars


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data/00000.tar ... 00003.tar, more/x.tar, more/y.tar, empty/ and other/ without tars."""
    for folder in ("data", "more", "empty", "other"):
        (tmp_path / folder).mkdir()
    for name in ("data/00000", "data/00001", "data/00002", "data/00003", "more/x", "more/y"):
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(PAIRS))
    (tmp_path / "data" / "00000_stats.json").write_text("{}")
    (tmp_path / "data" / ".hidden.tar").write_bytes(b"")
    (tmp_path / "other" / "a.parquet").write_bytes(b"")
    (tmp_path / "other" / "b.txt").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["data"], ["data/00000.tar", "data/00001.tar", "data/00002.tar", "data/00003.tar"]),
        (["data/00002.tar", "data/00001.tar"], ["data/00002.tar", "data/00001.tar"]),
        (["data/*"], ["data/00000.tar", "data/00001.tar", "data/00002.tar", "data/00003.tar"]),
        (["data/0000[12].tar"], ["data/00001.tar", "data/00002.tar"]),
        (["data/{00001..00003}.tar"], ["data/00001.tar", "data/00002.tar", "data/00003.tar"]),
        (["more/{y,x}.tar"], ["more/y.tar", "more/x.tar"]),
        (["{more,data}/*0.tar", "more"], None),
        (["more", "data/00000.tar"], ["more/x.tar", "more/y.tar", "data/00000.tar"]),
        (["more/x.tar", "more", "./more/*.tar"], ["more/x.tar", "more/y.tar"]),
        (["**/x.tar"], ["more/x.tar"]),
    ],
)
def test_folders_files_globs_and_braces_find_tars(house: Path, patterns: list[str], expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(NoData, match=r"no \.tar file matches more/\*0\.tar"):
            find_tars(patterns)
    else:
        assert find_tars(patterns) == expected


@pytest.mark.parametrize(
    ("patterns", "what"),
    [
        ([], "no source tars were named"),
        (["none"], "no file or folder none"),
        (["data/none.tar"], "no file or folder data/none.tar"),
        (
            ["data/{00002..00005}.tar"],
            "no file or folder data/00004.tar (2 of the 4 that data/{00002..00005}.tar names",
        ),
        (["empty"], "no .tar file in empty"),
        (["other"], "no .tar file in other (found: 1 .parquet, 1 .txt)"),
        (["other/*"], "no .tar file matches other/* (found: 1 .parquet, 1 .txt)"),
        (["*"], "no .tar file matches * (found: 4 folders)"),
    ],
)
def test_no_data_says_what_is_expected_and_how_to_get_it(house: Path, patterns: list[str], what: str) -> None:
    with pytest.raises(NoData) as error:
        find_tars(patterns)
    assert what in error.value.what
    for word in ("KEY.jpg with KEY.txt or KEY.json", "img2dataset --output_format webdataset", "emkum demo"):
        assert word in error.value.way_out
    assert error.value.exit_code == 2


def test_a_folder_of_compressed_tars_says_so(house: Path) -> None:
    (house / "empty" / "a.tar.gz").write_bytes(b"")
    with pytest.raises(NoData, match="only compressed ones: decompress them first"):
        find_tars(["empty"])


@pytest.mark.parametrize(
    "pattern", ["pipe:cat a.tar", "https://x.org/a.tar", "s3://bucket/{0..9}.tar", "file:///a.tar"]
)
def test_pipes_and_urls_are_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match="is not a local path") as error:
        find_tars([pattern])
    assert "local tars only" in error.value.way_out


@pytest.mark.parametrize("pattern", ["a\0.tar", "d\0/*.tar", "{a,b\0}", "\ud800.tar", "~\0/a.tar"])
def test_what_no_file_can_be_called_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a file"):
        find_tars([pattern])
    with pytest.raises(UsageError, match="cannot be the name of a file"):
        scan_tar(pattern, name="a.tar")


@pytest.mark.parametrize("pattern", ["data/{0..3.tar", "a}{.tar"])
def test_unbalanced_braces_are_refused(house: Path, pattern: str) -> None:
    with pytest.raises(UsageError):
        find_tars([pattern])


@pytest.mark.parametrize("pattern", ["{0..99999999999999}.tar", "{0..9999}{0..9999}.tar", "{" + "9" * 39 + "..0}.tar"])
def test_braces_that_name_too_many_files_are_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"names more than 1,000,000 files"):
        find_tars([pattern])


def test_braces_far_inside_each_other_are_refused() -> None:
    with pytest.raises(UsageError, match="20000 braces inside each other"):
        find_tars(["{a," * 20_000 + "}" * 20_000])
    with pytest.raises(NoData, match="21 of the 21"):
        find_tars(["{" * 20 + "a" + ",b}" * 20])


def test_a_path_with_braces_in_its_name_is_itself(house: Path) -> None:
    (house / "{a,b}.tar").write_bytes(b"")
    assert find_tars(["{a,b}.tar"]) == ["{a,b}.tar"]


def test_two_tars_of_one_name_are_refused(house: Path) -> None:
    (house / "more" / "00000.tar").write_bytes(b"")
    with pytest.raises(UsageError, match=r"two tars have one name: data/00000\.tar and more/00000\.tar") as error:
        find_tars(["data", "more"])
    assert error.value.way_out == "a tar's name is its identity in the cache: rename one of them"
    with pytest.raises(UsageError, match=r"two tars are named 00000\.tar"):
        scan_tars(["data/00000.tar", "more/00000.tar"])


# ---------------------------------------------------------------------------------------------------------------------
# Real tars


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "pictures", "captions", "ext", "sha256"),
    [
        ("flickr8k_dev_00000", 500, 2500, "jpg", "2b85ee6c1eeca4510ddb567e1899a26b376189ecee5802c4a3f19950933ebd29"),
        (
            "coco2017_train_mini_00000",
            80,
            400,
            "jpg",
            "222929fc81284ba15c41bb219c67c05c78c5dd5cf1ff5ad8bd97d1eccf1a27e6",
        ),
        ("emoji_noto_00000", 1491, 1491, "png", "fb089760d749ad157045d2230af5c3d82cc9f3b513e2c481d604729fe370aa38"),
    ],
)
def test_real_tars_hold_what_they_should(
    shared: Path, name: str, pictures: int, captions: int, ext: str, sha256: str
) -> None:
    path = shared / "data" / "pairs" / f"{name}.tar"
    tar = scan_tar(str(path))
    assert tar.sha256 == sha256
    assert len(tar.samples) == pictures
    assert sum(len(sample.captions) for sample in tar.samples) == captions
    assert {sample.picture.ext if sample.picture else None for sample in tar.samples} == {ext}
    with tarfile.open(path) as reference:
        members = {member.name: member for member in reference}
        for sample in tar.samples[:: pictures // 40]:
            assert sample.picture is not None
            file = reference.extractfile(members[f"{sample.key}.{ext}"])
            assert file is not None
            assert read_member(str(path), sample.picture.offset, sample.picture.size) == file.read()


@pytest.mark.real
def test_webdataset_reads_the_same_samples_from_a_real_tar(shared: Path) -> None:
    path = str(shared / "data" / "pairs" / "flickr8k_dev_00000.tar")
    ours = scan_tar(path).samples
    for sample, their in zip(ours, read_by_webdataset(path), strict=True):
        assert sample.picture is not None
        assert sample.key == their["__key__"]
        assert read_member(path, sample.picture.offset, sample.picture.size) == their["jpg"]
        assert list(sample.captions) == [text.strip() for text in json.loads(their["json"])["captions"]]
