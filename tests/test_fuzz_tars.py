"""Whatever bytes a tar or a picture holds: our own errors, bounded memory, and never a sample that is not there.

EMKUM_FUZZ_MINUTES=60 pytest -s tests/test_fuzz_tars.py runs each of these with new examples for an hour.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from fuzzing import fuzz_settings, memory_below, until_time_is_up
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emkum.errors import BadPicture, EmkumError, InputDataError, UsageError
from emkum.shards import tars, views
from emkum.shards.tars import MAX_NAME_CHARACTERS, find_tars, read_member, scan_tar
from emkum.shards.views import ViewPolicy, box_for, decode_view

BLOCK = 512
T = TypeVar("T")


def result_or_error(call: Callable[[], T]) -> T | EmkumError:
    """What a call returns, or the error of ours that it raises; any other error goes on."""
    try:
        return call()
    except EmkumError as error:
        return error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# ---------------------------------------------------------------------------------------------------------------------
# Tars


def valid_tar(tar_format: int, prefix: str = "") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format, pax_headers={"comment": "x"}) as tar:
        for name, data in [
            ("a.jpg", b"picture a" * 80),
            ("a.json", b'{"captions": ["one", "two"], "label": 3, "more": [1.5, null, {"x": "\\u00e9"}]}'),
            ("b.txt", "drei Äpfel".encode()),
            ("b.png", b""),
            ("c.cls", b"7"),
            ("c.webp", b"picture c"),
            (".hidden", b"x"),
        ]:
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()[: -8 * BLOCK]  # less of the padding


TARS = [
    valid_tar(tarfile.USTAR_FORMAT),
    valid_tar(tarfile.PAX_FORMAT, "é" * 70 + "/"),
    valid_tar(tarfile.GNU_FORMAT, "n" * 130 + "/"),
]

# (where it begins, its length) in a header: name, size, kind, link, magic, prefix
FIELDS = [(0, 100), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)]
KINDS = b"\x00" + b"01234567" + b"LKxXgSAVMNDQ"
SIZES = [
    b"0",
    b"1",
    b"777",
    b"00000001000",
    b"7" * 12,
    b"-1",
    b"8",
    b"1e3",
    b"0x10",
    b"1_0",
    b" 12 ",
    b"",
    b"\xff" * 12,
]
SIZES += [
    b"\x80" + bytes(10) + b"\x07",
    b"\x80" + b"\xff" * 11,
    b"\xff" + bytes(11),
    b"\x81" + bytes(11),
    b"\x80\0\0\0",
]
NAMES = [b"../a.jpg", b"/a.jpg", b"a\0b.jpg", b"a\n.jpg", b"\xff\xfe.jpg", b"./", b".", b"", b"a", b".jpg", b"a.b.jpg"]
NAMES += [b"././@LongLink", b"x" * 100, b"__meta__", b"a.jpg", b"b.json", b"d/", b"d//a.jpg", "\u2028.txt".encode()]
VALUES = {0: NAMES, 124: SIZES, 156: [bytes([kind]) for kind in KINDS]}
PAX = [b"7 a=bc\n", b"99999 path=x\n", b"0 \n", b"16 path=../a.jpg", b"12 path=a\n\n", b"\n", b"9" * 40, b"8 size=1"]
PAX += [b"14 size=99999\n", b"11 size=-1\n", b"18 GNU.sparse.x=1\n", b"10 path=\0\n", b"24 path=" + b"y" * 15 + b"\n"]
JSON = [
    b"[" * 2000,
    b'{"a":' * 900,
    b'{"captions":',
    b'{"label":' + b"9" * 5000 + b"}",
    b'"\xff"',
    b"NaN",
    b"\xef\xbb\xbf{}",
]


def mend(content: bytearray, block: int) -> None:
    """Give a block the checksum that makes it a header."""
    header = content[block * BLOCK : block * BLOCK + BLOCK]
    header[148:156] = b" " * 8
    content[block * BLOCK + 148 : block * BLOCK + 156] = b"%06o\0 " % sum(header)


@st.composite
def mutated_tars(draw: st.DrawFn) -> bytes:
    content = bytearray(draw(st.sampled_from(TARS)))
    for _ in range(draw(st.integers(1, 5))):
        blocks = len(content) // BLOCK
        if not blocks:
            break
        block = draw(st.integers(0, blocks - 1))
        at = block * BLOCK
        match draw(st.integers(0, 9)):
            case 0:  # flip bits anywhere
                for _ in range(draw(st.integers(1, 4))):
                    content[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
            case 1:  # swap two blocks
                other = BLOCK * draw(st.integers(0, blocks - 1))
                first, second = content[at : at + BLOCK], content[other : other + BLOCK]
                content[at : at + BLOCK], content[other : other + BLOCK] = second, first
            case 2:  # drop blocks
                del content[at : at + BLOCK * draw(st.integers(1, 3))]
            case 3:  # say blocks twice
                content[at:at] = content[at : at + BLOCK * draw(st.integers(1, 4))]
            case 4:  # splice in a piece of another tar
                donor = draw(st.sampled_from(TARS))
                start = draw(st.integers(0, len(donor) - 1))
                size = draw(st.sampled_from([1, 100, BLOCK, 3 * BLOCK, len(donor)]))
                content[at : at + draw(st.sampled_from([0, BLOCK, size]))] = donor[start : start + size]
            case 5:  # cut
                del content[draw(st.integers(0, len(content))) :]
            case 6 | 7:  # another value in a header, with a checksum that fits
                headers = [number for number in range(blocks) if content.startswith(b"ustar", number * BLOCK + 257)]
                block = draw(st.sampled_from(headers)) if headers else block
                at = block * BLOCK
                start, length = draw(st.sampled_from(FIELDS))
                value = draw(st.one_of(st.sampled_from(VALUES.get(start, NAMES)), st.binary(max_size=length)))
                content[at + start : at + start + length] = value[:length].ljust(length, b"\0")
                mend(content, block)
            case 8:  # an extended header of some kind before what follows
                raw = draw(st.one_of(st.sampled_from(PAX), st.binary(max_size=40), st.sampled_from(NAMES)))
                info = tarfile.TarInfo("x")
                info.size, info.type = len(raw), bytes([draw(st.sampled_from(b"xXgLK"))])
                content[at:at] = info.tobuf(tarfile.GNU_FORMAT) + raw.ljust(BLOCK, b"\0")
            case 9:  # a text member of its own
                raw = draw(st.one_of(st.sampled_from(JSON), st.binary(max_size=60)))
                info = tarfile.TarInfo(f"z{at}.{draw(st.sampled_from(['json', 'txt', 'cls']))}")
                info.size = len(raw)
                content[at:at] = info.tobuf(tarfile.USTAR_FORMAT) + raw + bytes(-len(raw) % BLOCK)
    return bytes(content)


def by_tarfile(content: bytes) -> dict[int, tuple[str, int]]:
    """Name and size of each member by the offset of its data, as far as tarfile comes, which reads dates as well."""
    listing = {}
    with contextlib.suppress(tarfile.TarError, ValueError), tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for info in tar:
            listing[info.offset_data] = (info.name, info.size)
    return listing


OPTIONS = st.fixed_dictionaries(
    {"on_truncated": st.sampled_from(["error", "keep-complete"]), "allow_missing_eof": st.booleans()}
)


def check_scan(folder: Path, content: bytes, options: dict[str, Any]) -> None:
    """A scan gives an error of ours, or samples whose bytes are there, in memory bounded by the file's size."""
    path = folder / "fuzzed.tar"
    path.write_bytes(content)
    with memory_below((4 << 20) + 40 * len(content)):
        tar = result_or_error(lambda: scan_tar(str(path), **options))
    if isinstance(tar, EmkumError):
        assert isinstance(tar, InputDataError), tar
        assert tar.what.isprintable()
        assert tar.way_out
        assert len(tar.line()) < 10 * MAX_NAME_CHARACTERS
        return
    assert tar.sha256 == hashlib.sha256(content).hexdigest()
    assert tar.bytes == len(content)
    assert tar.truncated_at in (None, len(content))
    if options["on_truncated"] == "error":
        assert tar.truncated_at is None
    assert options["allow_missing_eof"] or not tar.missing_eof
    if not (tar.truncated_at or tar.missing_eof):
        assert content.endswith(bytes(2 * BLOCK))
    assert len({sample.key for sample in tar.samples}) == len(tar.samples)
    listing = by_tarfile(content)
    end = 0
    for sample in tar.samples:
        assert sample.picture or sample.captions
        assert not sample.key.startswith("/")
        assert ".." not in sample.key.split("/")
        assert all(sample.captions)
        "".join([sample.key, *sample.captions, sample.label or "", sample.label_name or ""]).encode()
        if sample.picture:
            assert end < sample.picture.offset <= len(content) - sample.picture.size
            end = sample.picture.offset + sample.picture.size
            start = sample.picture.offset
            assert read_member(str(path), start, sample.picture.size) == content[start:end]
            if start <= max(listing, default=0):
                name, size = listing[start]
                stem, _, ext = name.removeprefix("./").rpartition(".")
                assert (stem, ext.lower(), size) == (sample.key, sample.picture.ext, sample.picture.size)


@until_time_is_up
@fuzz_settings(examples=300)
@given(content=mutated_tars(), options=OPTIONS)
def test_a_mutated_tar_gives_samples_that_are_there_or_an_error_of_ours(
    folder: Path, content: bytes, options: dict[str, Any]
) -> None:
    check_scan(folder, content, options)


def header(name: bytes, size: bytes, kind: int) -> bytes:
    block = bytearray(BLOCK)
    block[: len(name)], block[124 : 124 + len(size)], block[156], block[257:263] = name, size, kind, b"ustar\0"
    mend(block, 0)
    return bytes(block)


HEADERS = st.builds(header, st.sampled_from(NAMES), st.sampled_from(SIZES), st.sampled_from(KINDS))
PIECES = st.one_of(
    HEADERS,
    st.sampled_from([bytes(BLOCK), bytes(2 * BLOCK)]),
    st.sampled_from([*PAX, *JSON]).map(lambda raw: raw + bytes(-len(raw) % BLOCK)),
    st.binary(max_size=BLOCK),
)


@until_time_is_up
@fuzz_settings(examples=300)
@given(pieces=st.lists(PIECES, max_size=8), options=OPTIONS)
def test_random_bytes_and_headers_give_samples_that_are_there_or_an_error_of_ours(
    folder: Path, pieces: list[bytes], options: dict[str, Any]
) -> None:
    check_scan(folder, b"".join(pieces), options)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["x", "caption"]), inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.dictionaries(st.sampled_from(["captions", "caption", "label", "label_name", "x"]), JSON_VALUES, max_size=5)


@until_time_is_up
@fuzz_settings(examples=300)
@given(
    json_bytes=RECORDS.map(lambda record: json.dumps(record).encode()) | st.binary(max_size=40) | st.sampled_from(JSON),
    txt_bytes=st.binary(max_size=20) | st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")),
)
def test_any_text_member_gives_a_sample_or_an_error_of_ours(folder: Path, json_bytes: bytes, txt_bytes: bytes) -> None:
    content = b""
    for name, data in (("a.json", json_bytes), ("a.txt", txt_bytes), ("a.cls", txt_bytes), ("a.jpg", b"x")):
        content += header(name.encode(), b"%011o" % len(data), ord("0")) + data + bytes(-len(data) % BLOCK)
    check_scan(folder, content + bytes(2 * BLOCK), {"on_truncated": "error", "allow_missing_eof": False})


# ---------------------------------------------------------------------------------------------------------------------
# Patterns

PATTERNS = st.one_of(
    st.lists(st.sampled_from(["{", "}", ",", "..", "0", "9", "-1", "a", "*", "?", "[", "]", "!", ".tar", "\\"])).map(
        "".join
    ),
    st.text(max_size=12),
    st.sampled_from(
        ["{" * 2000, "{a," * 600 + "}" * 600, "[" * 2000, "a" * 5000, "{0..9}" * 40, "?" * 300, "*a" * 40 + "b"]
    ),
    st.sampled_from(
        ["{1..9..0}", "{a..z..0}", "{z..a}", "{1..2..99999999999}", "${x}", "{}", "{,}", "pipe:x", "s3://x"]
    ),
)


@until_time_is_up
@fuzz_settings(examples=300)
@given(patterns=st.lists(PATTERNS.filter(lambda text: not text.startswith(("/", "~", ".."))), min_size=1, max_size=3))
def test_any_pattern_finds_tars_or_says_what_is_wrong(folder: Path, patterns: list[str]) -> None:
    house = folder / "house"
    if not house.exists():
        (house / "a").mkdir(parents=True)
        for name in ("a.tar", "0.tar", "a/9.tar"):
            (house / name).write_bytes(TARS[0])
    with pytest.MonkeyPatch.context() as patch, memory_below(16 << 20):
        patch.chdir(house)
        patch.setattr(tars, "MAX_BRACE_PATHS", 1000)  # a million take half a minute
        found = result_or_error(lambda: find_tars(patterns))
        if isinstance(found, EmkumError):
            assert isinstance(found, UsageError), found
            assert found.way_out
            return
        assert found
        assert len({Path(path).name for path in found}) == len(found)
        assert all(Path(path).exists() for path in found)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def picture(kind: str, mode: str = "RGB", **options: object) -> bytes:
    numbers = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    image = Image.fromarray(numbers).resize((40, 30), Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6
PICTURES = [
    picture("JPEG", exif=EXIF.tobytes()),
    picture("JPEG", progressive=True),
    picture("JPEG", "CMYK"),
    picture("JPEG", "L"),
    picture("PNG", exif=EXIF.tobytes()),
    picture("PNG", "P", transparency=3),
    picture("PNG", "LA"),
    picture("PNG", "I;16"),
    picture("PNG", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    picture("WEBP", exif=EXIF.tobytes()),
    picture("WEBP", "RGBA", lossless=True),
    picture("WEBP", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    picture("GIF"),
    picture("GIF", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
]
POLICY = ViewPolicy(crop=(0.3, 1.0), flip=True, jitter=0.4)


@st.composite
def mutated_pictures(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(PICTURES)))
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        at = draw(st.one_of(st.integers(0, min(len(data) - 1, 200)), st.integers(0, len(data) - 1)))
        match draw(st.integers(0, 6)):
            case 0 | 1:
                data[at] ^= draw(st.integers(1, 255))
            case 2:
                value = draw(
                    st.sampled_from([bytes(2), bytes(4), b"\xff" * 2, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\1"])
                )
                data[at : at + len(value)] = value
            case 3:
                del data[at:]
            case 4:
                del data[at : at + draw(st.integers(1, 40))]
            case 5:
                data[at:at] = draw(st.one_of(st.binary(max_size=20), st.just(bytes(data[at : at + 60]))))
            case 6:
                donor = draw(st.sampled_from(PICTURES))
                data[at:] = donor[draw(st.integers(0, len(donor) - 1)) :]
    return bytes(data)


@until_time_is_up
@fuzz_settings(examples=400)
@given(data=mutated_pictures(), key=st.integers(0, 9))
def test_a_mutated_picture_gives_a_crop_or_is_bad(data: bytes, key: int) -> None:
    check_picture(data, key)


def check_picture(data: bytes, key: int) -> None:
    """A crop of the right shape, or BadPicture with a reason of one short line."""
    with pytest.MonkeyPatch.context() as patch, memory_below(64 << 20):
        patch.setattr(views, "MAX_PIXELS", 4_000_000)  # a header that lies may cost milliseconds, not seconds
        found = result_or_error(lambda: decode_view(data, 16, lambda w, h: box_for(POLICY, "a", f"{key}", 0, w, h)))
    if isinstance(found, EmkumError):
        assert isinstance(found, BadPicture), found
        assert found.what.isprintable()
        assert 0 < len(found.what) < 300
        # What Pillow warns of would be decoded outside of these tests, where warnings are no errors.
        assert not isinstance(found.__cause__, Warning) or "Invalid APNG" in found.what
    else:
        assert found[0].shape == (16, 16, 3)
        assert found[1].fits


@until_time_is_up
@fuzz_settings(examples=300)
@given(start=st.sampled_from([data[:size] for data in PICTURES for size in (4, 12, 30)]), seed=st.integers(0, 2**32))
def test_random_bytes_after_a_picture_s_beginning_are_bad_or_a_crop(start: bytes, seed: int) -> None:
    check_picture(start + random.Random(seed).randbytes(seed % 3000), 0)
