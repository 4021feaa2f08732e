"""Crops are a pure function of the policy and the picture's name, decoded by stated rules, replayable bit for bit."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFile, ImageOps

from emkum.errors import BadPicture, SourceChanged, UsageError
from emkum.shards.tars import read_member, scan_tar
from emkum.shards.views import (
    DECODER,
    MAX_SIDE,
    Box,
    ViewPolicy,
    box_for,
    decode_view,
    exif_orientation,
    replay_view,
)

CENTRE = ViewPolicy()
RANDOM = ViewPolicy(crop=(0.3, 1.0), flip=True, jitter=0.4, seed=7, count=4)


def whole(width: int, height: int) -> Box:
    return Box(0, 0, width, height, False, 1.0, 1.0, 1.0, width, height)


def box_at(left: int, top: int, width: int, height: int) -> Callable[[int, int], Box]:
    return lambda w, h: Box(left, top, width, height, False, 1.0, 1.0, 1.0, w, h)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random RGB picture, without symmetry."""
    numbers = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(numbers).resize((width, height), Image.Resampling.BICUBIC)


def pixels(data: bytes, size: int = 1) -> list[tuple[int, ...]]:
    """The colours of the picture squeezed to size x size, row by row."""
    crop, _ = decode_view(data, size, whole)
    return [tuple(colour) for colour in crop.reshape(-1, 3).tolist()]


def png(width: int, height: int, depth: int, kind: int, raw: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand: raw holds the rows, each after its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = b"\x89PNG\r\n\x1a\n"
    for name, data in [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]:
        body += chunk(name, data)
    return body


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def exif(orientation: int, order: str = "<") -> bytes:
    head = b"II*\0" if order == "<" else b"MM\0*"
    entries = struct.pack(f"{order}HHIHH", 0x0100, 3, 1, 5, 0) + struct.pack(
        f"{order}HHIHH", 0x0112, 3, 1, orientation, 0
    )
    return b"Exif\0\0" + head + struct.pack(f"{order}IH", 8, 2) + entries + bytes(4)


# ---------------------------------------------------------------------------------------------------------------------
# Policies


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        (ViewPolicy(), "center-1.0"),
        (ViewPolicy(crop=(0.765, 0.765), seed=5), "center-0.765"),
        (ViewPolicy(crop=(0.9, 1.0), flip=True, jitter=0.4), "crop-0.9-1.0-flip-jitter-0.4-seed-0"),
        (ViewPolicy(crop=(0.9, 1)), "crop-0.9-1.0-seed-0"),
        (ViewPolicy(crop=(1, 1), flip=True, seed=3), "crop-1.0-1.0-flip-seed-3"),
        (ViewPolicy(crop=(0.08, 1.0), ratio=(1, 1), count=2), "crop-0.08-1.0-ratio-1.0-1.0-seed-0"),
    ],
)
def test_a_policy_has_a_name_fit_for_a_folder(policy: ViewPolicy, name: str) -> None:
    assert policy.name == name


def test_the_seed_and_ratio_of_a_deterministic_policy_change_nothing() -> None:
    assert ViewPolicy(seed=3, ratio=(1, 1)) == ViewPolicy()
    assert ViewPolicy(seed=3, flip=True) != ViewPolicy(flip=True)


@pytest.mark.parametrize("policy", [CENTRE, RANDOM, ViewPolicy(crop=(0.9, 1.0), ratio=(1, 1))])
def test_a_policy_survives_its_json(policy: ViewPolicy) -> None:
    assert ViewPolicy.from_json(policy.to_json()) == policy
    assert list(policy.to_json()) == ["crop", "ratio", "flip", "jitter", "seed", "count"]


@pytest.mark.parametrize(
    "change",
    [{"crop": [1.0]}, {"crop": "ab"}, {"flip": 1}, {"seed": 0.5}, {"count": True}, {"jitter": None}, {"zoom": 1}],
)
def test_json_of_another_kind_is_no_policy(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a view policy"):
        ViewPolicy.from_json(RANDOM.to_json() | change)
    with pytest.raises(ValueError, match="not a view policy"):
        ViewPolicy.from_json({"crop": [1.0, 1.0]})


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: ViewPolicy(crop=(0.0, 1.0)), "crop is 0.0-1.0; it is a share of the area"),
        (lambda: ViewPolicy(crop=(0.9, 0.8)), "crop is 0.9-0.8"),
        (lambda: ViewPolicy(crop=(0.9, 1.1)), "crop is 0.9-1.1"),
        (lambda: ViewPolicy(crop=(math.nan, 1.0)), "crop is nan-1.0"),
        (lambda: ViewPolicy(ratio=(0.0, 1.0)), "crop ratio is 0.0-1.0"),
        (lambda: ViewPolicy(jitter=-0.1), "jitter is -0.1"),
        (lambda: ViewPolicy(jitter=1.5), "jitter is 1.5"),
        (lambda: ViewPolicy(flip=True, count=0), "0 views a picture"),
        (lambda: ViewPolicy(flip=True, count=10_001), "10001 views a picture"),
        (lambda: ViewPolicy(flip=True, count=2**40), "1099511627776 views a picture"),
        (lambda: ViewPolicy(count=2), "2 views of a policy that gives one"),
        (lambda: ViewPolicy(flip=True, seed=2**64), "is beyond 64 bits"),
    ],
)
def test_a_policy_out_of_range_is_refused(make: Callable[[], ViewPolicy], what: str) -> None:
    with pytest.raises(UsageError) as error:
        make()
    assert what in error.value.what
    assert error.value.way_out.startswith("give ")


# ---------------------------------------------------------------------------------------------------------------------
# Boxes


@pytest.mark.parametrize(
    ("crop", "size", "expected"),
    [
        (1.0, (224, 224), (0, 0, 224, 224)),
        (1.0, (500, 333), (83, 0, 333, 333)),
        (0.25, (500, 300), (175, 75, 150, 150)),
        (0.01, (3, 2), (1, 0, 1, 1)),
        (1.0, (1, 1), (0, 0, 1, 1)),
    ],
)
def test_a_deterministic_policy_takes_the_centred_square(
    crop: float, size: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    box = box_for(ViewPolicy(crop=(crop, crop)), "a.tar", "k", 0, *size)
    assert (box.left, box.top, box.width, box.height) == expected
    assert (box.flip, box.brightness, box.contrast, box.saturation) == (False, 1.0, 1.0, 1.0)
    assert (box.source_width, box.source_height) == size


def test_boxes_are_the_same_in_every_version() -> None:
    # Golden: a change here makes every cache's views irreproducible.
    expected = [
        [153.0, 45.0, 308.0, 309.0, 0.0, 1.0933552980422974, 1.306933879852295, 1.1167867183685303, 500.0, 375.0],
        [12.0, 7.0, 348.0, 351.0, 1.0, 0.9567259550094604, 0.9801744222640991, 1.2127745151519775, 500.0, 375.0],
    ]
    boxes = [box_for(RANDOM, "a.tar", "é/k", view, 500, 375).as_row().tolist() for view in (0, 1)]
    assert boxes == expected


def test_the_random_numbers_are_those_that_the_documentation_tells() -> None:
    def number(index: int) -> float:
        digest = hashlib.blake2b(b'[7, "a.tar", "\\u00e9/k", 1]/%d' % index, digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53

    box = box_for(RANDOM, "a.tar", "é/k", 1, 500, 375)
    assert box.flip == (number(0) < 0.5)
    factors = [0.6 + 0.8 * number(index) for index in (1, 2, 3)]
    assert np.allclose([box.brightness, box.contrast, box.saturation], factors, rtol=1e-7)
    area, ratio = 500 * 375 * (0.3 + 0.7 * number(4)), (3 / 4) * (16 / 9) ** number(5)
    assert (box.width, box.height) == (round((area * ratio) ** 0.5), round((area / ratio) ** 0.5))
    assert (box.left, box.top) == (int(number(6) * (501 - box.width)), int(number(7) * (376 - box.height)))


def test_boxes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    code = (
        "from emkum.shards.views import *; p = ViewPolicy(crop=(0.3, 1.0), flip=True, jitter=0.4, seed=7, count=4)\n"
        "print(box_for(p, 'a.tar', 'k', 2, 640, 480))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert outputs == {f"{box_for(RANDOM, 'a.tar', 'k', 2, 640, 480)}\n"}


@pytest.mark.parametrize("change", ["seed", "tar", "key", "view", "boundary"])
def test_each_of_seed_tar_key_and_view_draws_other_numbers(change: str) -> None:
    base = box_for(RANDOM, "a.tar", "k", 0, 500, 375)
    other_policy = ViewPolicy(RANDOM.crop, RANDOM.ratio, RANDOM.flip, RANDOM.jitter, 8, RANDOM.count)
    others = {
        "seed": box_for(other_policy, "a.tar", "k", 0, 500, 375),
        "tar": box_for(RANDOM, "b.tar", "k", 0, 500, 375),
        "key": box_for(RANDOM, "a.tar", "l", 0, 500, 375),
        "view": box_for(RANDOM, "a.tar", "k", 1, 500, 375),
        "boundary": box_for(RANDOM, "a.tark", "", 0, 500, 375),
    }
    assert others[change] != base


def test_the_number_of_views_changes_no_view() -> None:
    more = ViewPolicy(RANDOM.crop, RANDOM.ratio, RANDOM.flip, RANDOM.jitter, RANDOM.seed, 9)
    assert box_for(more, "a.tar", "k", 1, 500, 375) == box_for(RANDOM, "a.tar", "k", 1, 500, 375)


@given(
    lo=st.floats(0.001, 1),
    hi=st.floats(0.001, 1),
    ratio=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
    flip=st.booleans(),
    jitter=st.floats(0, 1),
    size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    key=st.text(max_size=5),
    view=st.integers(0, 5),
)
def test_every_box_lies_in_its_picture_and_survives_float32(
    lo: float,
    hi: float,
    ratio: tuple[float, float],
    flip: bool,
    jitter: float,
    size: tuple[int, int],
    key: str,
    view: int,
) -> None:
    policy = ViewPolicy((min(lo, hi), max(lo, hi)), (min(ratio), max(ratio)), flip, jitter)
    box = box_for(policy, "a.tar", key, view, *size)
    assert box.fits
    assert Box.from_row(box.as_row()) == box
    assert box.as_row().dtype == np.float32
    for factor in (box.brightness, box.contrast, box.saturation):
        assert 1 - jitter - 1e-6 <= factor <= 1 + jitter + 1e-6


def test_random_crops_follow_the_distribution_of_random_resized_crop() -> None:
    policy = ViewPolicy(crop=(0.2, 0.8), flip=True, jitter=0.3)
    boxes = [box_for(policy, "a.tar", f"{index}", 0, 4000, 4000) for index in range(4000)]
    areas = np.array([box.width * box.height / 4000**2 for box in boxes])
    ratios = np.log([box.width / box.height for box in boxes])
    # Uniform areas and log-uniform ratios (few tries fail on a square picture with these areas).
    assert np.allclose(np.quantile(areas, [0.1, 0.5, 0.9]), [0.26, 0.5, 0.74], atol=0.03)
    assert np.allclose(np.quantile(ratios, [0.1, 0.5, 0.9]), np.log(4 / 3) * np.array([-0.8, 0, 0.8]), atol=0.03)
    free = np.array([(box.left / (4000 - box.width), box.top / (4000 - box.height)) for box in boxes])
    assert np.allclose(np.quantile(free, [0.1, 0.5, 0.9], axis=0).T, [0.1, 0.5, 0.9], atol=0.03)
    assert abs(np.mean([box.flip for box in boxes]) - 0.5) < 0.03
    factors = np.array([(box.brightness, box.contrast, box.saturation) for box in boxes])
    assert np.allclose(np.quantile(factors, [0.1, 0.5, 0.9], axis=0).T, [0.76, 1.0, 1.24], atol=0.03)
    assert np.abs(np.corrcoef(np.column_stack([areas, ratios, free, factors]).T) - np.eye(7)).max() < 0.06


@pytest.mark.parametrize(("size", "expected"), [((1000, 10), (493, 0, 13, 10)), ((10, 1000), (0, 493, 10, 13))])
def test_when_no_try_fits_the_largest_centred_crop_is_taken(
    size: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    box = box_for(ViewPolicy(crop=(0.9, 1.0)), "a.tar", "k", 0, *size)
    assert (box.left, box.top, box.width, box.height) == expected


@pytest.mark.parametrize(
    "row",
    [
        [0, 0, 10, 10, 0, 1, 1, 1, 10],
        [0, 0, 10, 10, 0, 1, 1, 1, 10, 9],
        [0.5, 0, 5, 5, 0, 1, 1, 1, 10, 10],
        [0, 0, 0, 5, 0, 1, 1, 1, 10, 10],
        [-1, 0, 5, 5, 0, 1, 1, 1, 10, 10],
        [0, 0, 5, 5, 2, 1, 1, 1, 10, 10],
        [0, 0, 5, 5, 0, math.nan, 1, 1, 10, 10],
        [math.nan] * 10,
    ],
)
def test_a_row_that_is_no_box_is_refused(row: list[float]) -> None:
    with pytest.raises(ValueError, match="not a crop box"):
        Box.from_row(np.array(row, np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Crops


def test_a_view_is_the_box_resized_with_bicubic_then_flipped_then_jittered() -> None:
    image = photo(300, 200)
    box = Box(20, 10, 150, 120, True, 1.25, 0.75, 1.5, 300, 200)
    crop, used = decode_view(encode(image, "PNG"), 96, lambda w, h: box)
    expected = image.resize((96, 96), Image.Resampling.BICUBIC, box=(20, 10, 170, 130))
    expected = ImageOps.mirror(expected)
    expected = ImageEnhance.Brightness(expected).enhance(1.25)
    expected = ImageEnhance.Contrast(expected).enhance(0.75)
    expected = ImageEnhance.Color(expected).enhance(1.5)
    assert used is box
    assert crop.dtype == np.uint8
    assert crop.flags.c_contiguous
    assert crop.flags.writeable
    assert np.array_equal(crop, np.asarray(expected))


def test_a_picture_of_the_output_size_is_passed_on_unchanged() -> None:
    image = photo(64, 64)
    crop, _ = decode_view(encode(image, "PNG"), 64, lambda w, h: box_for(CENTRE, "a.tar", "k", 0, w, h))
    assert np.array_equal(crop, np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("turned", [1, 6])
def test_a_stored_box_replays_the_view_bit_for_bit(kind: str, turned: int) -> None:
    options = {"exif": exif(turned)} if kind in ("JPEG", "WEBP") else {}
    data = encode(photo(1003, 701), kind, **options)
    for view in range(3):
        crop, box = decode_view(data, 32, lambda w, h, view=view: box_for(RANDOM, "a.tar", "k", view, w, h))  # type: ignore[misc]
        stored = Box.from_row(np.frombuffer(box.as_row().tobytes(), "<f4"))
        assert np.array_equal(replay_view(data, 32, stored), crop)


def test_replaying_on_another_picture_is_refused() -> None:
    _, box = decode_view(encode(photo(64, 48), "PNG"), 16, whole)
    with pytest.raises(SourceChanged, match="a picture has 48 x 48 pixels; its box was chosen on 64 x 48"):
        replay_view(encode(photo(48, 48), "PNG"), 16, box)


def test_a_box_outside_the_picture_is_our_bug() -> None:
    with pytest.raises(ValueError, match="is not a box of a picture of 64 x 48 pixels"):
        decode_view(encode(photo(64, 48), "PNG"), 16, box_at(40, 0, 32, 32))


def test_threads_decode_the_same_crops_as_one() -> None:
    datas = [encode(photo(400, 300, seed), kind) for seed, kind in enumerate(["JPEG", "PNG", "WEBP", "GIF"] * 6)]

    def view(index: int) -> NDArray[np.uint8]:
        return decode_view(datas[index], 64, lambda w, h: box_for(RANDOM, "a.tar", f"{index}", 0, w, h))[0]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(view, range(len(datas))))
    assert all(np.array_equal(crop, view(index)) for index, crop in enumerate(together))


@pytest.mark.parametrize(
    ("side", "reduction"), [(255, 1), (256, 2), (511, 2), (512, 4), (1023, 4), (1024, 8), (2100, 8)]
)
def test_a_jpeg_is_decoded_at_the_largest_reduction_that_keeps_twice_the_output(side: int, reduction: int) -> None:
    image = photo(2203, 2101)
    data = encode(image, "JPEG", quality=95)
    crop, _ = decode_view(data, 64, box_at(101, 1, side, side))
    drafted = Image.open(io.BytesIO(data))
    drafted.draft("RGB", (2203 // reduction, 2101 // reduction))
    assert drafted.size == (-(-2203 // reduction), -(-2101 // reduction))
    edges = (101 / reduction, 1 / reduction, (101 + side) / reduction, (1 + side) / reduction)
    assert np.array_equal(crop, np.asarray(drafted.resize((64, 64), Image.Resampling.BICUBIC, box=edges)))
    full = Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.BICUBIC, box=(101, 1, 101 + side, 1 + side))
    assert np.abs(crop.astype(int) - np.asarray(full)).mean() < 1


def test_the_decode_rule_has_a_name() -> None:
    assert DECODER == "pillow-bicubic-draft2/1"
    assert f"`{DECODER}`" in (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Upright


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_turned_upright_by_its_exif(kind: str, orientation: int, order: str) -> None:
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = encode(photo(402, 301), kind, exif=exif(orientation, order), **options)
    seen: list[tuple[int, int]] = []

    def choose(width: int, height: int) -> Box:
        seen.append((width, height))
        return box_at(17, 31, 200, 240)(width, height)

    crop, _ = decode_view(data, 32, choose)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert seen == [upright.size]
    expected = upright.resize((32, 32), Image.Resampling.BICUBIC, box=(17, 31, 217, 271))
    # Bicubic goes first along rows, then columns, rounding between: turning before or after differs by that rounding.
    # JPEGs are decoded at a half here.
    tolerance = 6 if kind == "JPEG" else 2
    assert np.abs(crop.astype(int) - np.asarray(expected)).max() <= tolerance


@pytest.mark.parametrize(
    "block",
    [
        None,
        "text",
        b"",
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"XX*\0" + bytes(40),
        exif(0),
        exif(9),
        exif(6)[:-18],
        exif(6)[:20],
    ],
)
def test_an_exif_block_that_says_nothing_leaves_the_picture_as_it_is(block: object) -> None:
    assert exif_orientation(block) == 1


@given(block=st.binary(max_size=80))
def test_any_exif_block_gives_an_orientation(block: bytes) -> None:
    assert exif_orientation(b"II*\0" + block) in range(1, 9)
    assert exif_orientation(b"MM\0*" + block) in range(1, 9)


def test_a_damaged_exif_block_does_not_cost_the_picture_nor_a_warning() -> None:
    for length in range(6, 40):
        data = encode(photo(16, 16), "JPEG", exif=exif(6)[:length])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            decode_view(data, 8, whole)


# ---------------------------------------------------------------------------------------------------------------------
# Colours


def test_grey_and_black_and_white_become_rgb() -> None:
    assert pixels(encode(Image.new("L", (4, 4), 77), "PNG")) == [(77, 77, 77)]
    assert pixels(encode(Image.new("L", (4, 4), 77), "JPEG")) == [(77, 77, 77)]
    assert pixels(encode(Image.new("1", (4, 4), 1), "PNG")) == [(255, 255, 255)]


def test_cmyk_becomes_rgb() -> None:
    (colour,) = pixels(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(np.array(colour) - (255, 0, 0)).max() <= 3


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    raw = b"".join(b"\0" + struct.pack(">HHHH", 0, 256, 32768, 65535) for _ in range(4))
    crop, _ = decode_view(png(4, 4, 16, 0, raw), 4, whole)
    assert crop[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_16_bit_colour_is_scaled_not_clipped() -> None:
    raw = b"\0" + struct.pack(">HHH", 0x0100, 0x80FF, 0xFFFF)
    assert pixels(png(1, 1, 16, 2, raw)) == [(1, 128, 255)]
    assert pixels(png(1, 1, 16, 6, raw + b"\xff\xff")) == [(1, 128, 255)]


def test_transparency_goes_over_white() -> None:
    assert pixels(encode(Image.new("RGBA", (2, 2), (200, 0, 0, 0)), "PNG")) == [(255, 255, 255)]
    assert pixels(encode(Image.new("RGBA", (2, 2), (200, 0, 0, 255)), "PNG")) == [(200, 0, 0)]
    assert pixels(encode(Image.new("LA", (2, 2), (0, 51)), "PNG")) == [(204, 204, 204)]
    (half,) = pixels(encode(Image.new("RGBA", (2, 2), (255, 0, 0, 128)), "WEBP", lossless=True))
    assert half == (255, 127, 127)


def test_a_palette_with_transparency_goes_over_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    for transparency in (0, b"\x00\xff"):
        crop, _ = decode_view(encode(image, "PNG", transparency=transparency), 2, lambda w, h: box_at(0, 0, 2, 1)(w, h))
        assert crop[0].tolist() == [[255, 255, 255], [40, 50, 60]]
    assert pixels(encode(image, "PNG"), 2)[:2] == [(10, 20, 30), (40, 50, 60)]


@pytest.mark.parametrize(
    ("depth", "kind", "key", "clear", "solid"),
    [
        (8, 0, ">H", (7,), (8,)),
        (16, 0, ">H", (0x1234,), (0x1235,)),
        (8, 2, ">HHH", (1, 2, 3), (1, 2, 4)),
        (16, 2, ">HHH", (0x0102, 0x0203, 0x0304), (0x0102, 0x0203, 0x0404)),
    ],
)
def test_a_colour_marked_as_transparent_goes_over_white(
    depth: int, kind: int, key: str, clear: tuple[int, ...], solid: tuple[int, ...]
) -> None:
    kinds = key if depth == 16 else ">" + "B" * len(clear)
    raw = b"\0" + struct.pack(kinds, *clear) + struct.pack(kinds, *solid)
    crop, _ = decode_view(png(2, 1, depth, kind, raw, (b"tRNS", struct.pack(key, *clear))), 2, whole)
    high = [value >> (depth - 8) for value in solid] * (3 if kind == 0 else 1)
    assert crop[0].tolist() == [[255, 255, 255], high]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    assert pixels(data) == [(255, 0, 0)]


def test_a_single_pixel_is_a_picture() -> None:
    data = encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")
    crop, _ = decode_view(data, 8, lambda w, h: box_for(RANDOM, "a.tar", "k", 0, w, h))
    assert crop.shape == (8, 8, 3)
    assert pixels(data, 8) == [(1, 2, 3)] * 64


# ---------------------------------------------------------------------------------------------------------------------
# Bad pictures


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty (0 bytes)"),
        (b"\n<!DOCTYPE html><html>404", "a web page or XML, not a picture"),
        (b"<html>", "a web page or XML, not a picture"),
        (b"BM12345678", "not a JPEG, PNG, WebP or GIF; it begins with 42 4d 31 32 33 34 35 36"),
        (b"x", "not a JPEG, PNG, WebP or GIF; it begins with 78"),
        (b"\xff\xd8\xff", "it cannot be decoded: "),
        (b"\x89PNG\r\n\x1a\n", "it cannot be decoded: "),
        (b"RIFF\0\0\0\0WEBPVP8 ", "it cannot be decoded: "),
        (b"RIFF\0\0\0\0WAVEfmt ", "it cannot be decoded: not a WEBP file"),
        (b"GIF89a", "it cannot be decoded: "),
    ],
)
def test_what_is_no_picture_has_a_one_line_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadPicture) as error:
        decode_view(data, 8, whole)
    assert error.value.what.startswith(reason)
    assert error.value.what.isprintable()


@pytest.mark.parametrize("kind", ["JPEG", "JPEG progressive", "PNG", "WEBP", "GIF"])
def test_a_torn_picture_is_bad_or_whole_never_padded(kind: str) -> None:
    options = {"progressive": True} if kind == "JPEG progressive" else {}
    data = encode(photo(61, 47), kind.split()[0], **options)
    entire, _ = decode_view(data, 16, whole)
    refused = 0
    for length in range(len(data)):
        try:
            crop, _ = decode_view(data[:length], 16, whole)
        except BadPicture as error:
            refused += 1
            reason = error.what
        else:
            assert np.array_equal(crop, entire), f"{length} of {len(data)} bytes gave another picture"
    assert refused >= len(data) - 32
    assert "\n" not in reason
    assert len(reason) < 240


def with_chunk(png_bytes: bytes, name: bytes, data: bytes) -> bytes:
    """The PNG with one more chunk, right after its header."""
    return png_bytes[:33] + chunk(name, data) + png_bytes[33:]


def with_sides(jpeg: bytes, width: int, height: int) -> bytes:
    """The JPEG with other dimensions in its frame header."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def animation(kind: str, **options: object) -> bytes:
    first, second = Image.new("RGB", (8, 8), (200, 100, 50)), Image.new("RGB", (8, 8), "blue")
    return encode(first, kind, save_all=True, append_images=[second], duration=9, **options)


def corpus() -> Iterator[tuple[str, bytes, list[int] | str]]:
    """(row of the table in docs/data.md, picture, its one colour or the reason why it is bad) of odd pictures."""
    colour = (200, 100, 50)
    plain = Image.new("RGB", (8, 8), colour)
    jpeg, png_, webp, gif = (encode(plain, kind, quality=95) for kind in ("JPEG", "PNG", "WEBP", "GIF"))
    opaque, clear, half = ((*colour, alpha) for alpha in (255, 0, 128))
    over_white = [round((value * 128 + 255 * 127) / 255) for value in colour]
    undecodable, unknown = "it cannot be decoded: ", "not a JPEG, PNG, WebP or GIF; it begins with "

    row = "wrong extension (a PNG named `.jpg`)"  # a name is no argument of decode_view
    yield row, png_, [*colour]
    row = "progressive JPEG"
    yield row, encode(plain, "JPEG", progressive=True, quality=95), [*colour]
    row = "grey, 1 bit to 8 bits"
    yield row, png(4, 1, 1, 0, b"\0\xf0"), [255] * 3
    yield row, png(4, 1, 2, 0, b"\0\x55"), [85] * 3
    yield row, png(4, 1, 4, 0, b"\0\x77\x77"), [119] * 3
    yield row, encode(Image.new("L", (8, 8), 77), "PNG"), [77] * 3
    yield row, encode(Image.new("L", (8, 8), 77), "JPEG"), [77] * 3
    row = "16 bits a channel"
    yield row, encode(Image.new("I;16", (8, 8), 0x4DFF), "PNG"), [0x4D] * 3
    yield row, png(1, 1, 16, 2, b"\0" + bytes([200, 255, 100, 0, 50, 7])), [*colour]
    yield row, png(1, 1, 16, 6, b"\0" + bytes([200, 255, 100, 0, 50, 7, 255, 255])), [*colour]
    row = "grey or colour with alpha"
    yield row, encode(Image.new("RGBA", (8, 8), opaque), "PNG"), [*colour]
    yield row, encode(Image.new("RGBA", (8, 8), clear), "PNG"), [255] * 3
    yield row, encode(Image.new("RGBA", (8, 8), half), "WEBP", lossless=True), over_white
    yield row, encode(Image.new("LA", (8, 8), (0, 51)), "PNG"), [204] * 3
    yield row, png(1, 1, 16, 4, b"\0\0\0\x33\x33"), [204] * 3
    row = "palette, with or without alpha"
    palette = plain.convert("P", palette=Image.Palette.ADAPTIVE)
    index = palette.getpixel((0, 0))
    yield row, encode(palette, "PNG"), [*colour]
    yield row, gif, [*colour]
    yield row, encode(palette, "PNG", transparency=bytes([255] * int(index) + [128])), over_white
    row = "colour marked as transparent"
    yield row, encode(plain, "PNG", transparency=colour), [255] * 3
    yield row, encode(palette, "GIF", transparency=index), [255] * 3
    row = "CMYK JPEG"
    yield row, encode(Image.new("CMYK", (8, 8), (55, 155, 205, 0)), "JPEG", quality=95), [*colour]
    row = "colour profile"
    for kind in ("JPEG", "PNG", "WEBP"):
        yield row, encode(plain, kind, quality=95, icc_profile=b"not a profile" * 9), [*colour]
    row = "EXIF orientation 1 to 8"  # which way: test_a_picture_is_turned_upright_by_its_exif
    for orientation in range(1, 9):
        yield row, encode(plain, "PNG", exif=exif(orientation)), [*colour]
    row = "EXIF that cannot be read"
    yield row, encode(plain, "JPEG", quality=95, exif=exif(6)[:20]), [*colour]
    yield row, encode(plain, "PNG", exif=b"Exif\0\0nonsense"), [*colour]
    row = "animated GIF, PNG or WebP, whatever its name"
    for data in (animation("GIF"), animation("PNG"), animation("WEBP", lossless=True)):
        yield row, data, [*colour]
    row = "several pictures in one JPEG (MPO)"
    yield row, animation("MPO", quality=95), [*colour]
    row = "bytes after its end"
    for data in (jpeg, png_, webp, gif):
        yield row, data + b"\0garbage\xff\xd8\xff" * 99, [*colour]
        yield row, data + data, [*colour]
    row = "1 x 1 pixel"
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        yield row, encode(Image.new("RGB", (1, 1), colour), kind, quality=95), [*colour]
    row = "slivers, 1 x N and N x 1"
    for side in ((1, 40_000), (40_000, 1), (2, 999), (999, 2)):
        yield row, encode(Image.new("RGB", side, colour), "PNG"), [*colour]
        yield row, encode(Image.new("RGB", side, colour), "JPEG", quality=95), [*colour]
    row = "data longer than the picture"
    yield row, png(1, 1, 8, 2, b"\0" + bytes(colour) + bytes(1 << 20)), [*colour]

    row = "cut anywhere before its last pixels"  # at every byte: test_a_torn_picture_is_bad_or_whole_never_padded
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        data = encode(photo(64, 48), kind)
        for length in (20, len(data) // 3, len(data) * 2 // 3):
            yield row, data[:length], undecodable
    row = "0 bytes"
    yield row, b"", "empty (0 bytes)"
    row = "HTML, XML or SVG"
    for start in (b"<!DOCTYPE html>", b"\n <HTML>", b"<?xml version='1.0'?>", b"<svg xmlns=''>"):
        yield row, start + b" " * 99, "a web page or XML, not a picture"
    row = "BMP, TIFF, AVIF, HEIC, JPEG 2000, PDF, ..."
    for data in (*(encode(plain, kind) for kind in ("BMP", "TIFF", "PDF", "PPM")), b"\0\0\0\x20ftypheic", b"RI"):
        yield row, data, unknown
    row = "bytes before its beginning"
    for data in (jpeg, png_, webp, gif):
        yield row, b"\n" + data, unknown
    row = "more than 200 megapixels or 65,535 pixels a side"
    yield row, png(100_000, 100_000, 8, 2, b""), "100000 x 100000 pixels; at most"
    yield row, with_sides(jpeg, 65_000, 65_000), "65000 x 65000 pixels; at most"
    yield row, gif[:6] + struct.pack("<HH", 60_000, 60_000) + gif[10:], "60000 x 60000 pixels; at most"
    row = "no width or no height"
    for sides in ((0, 8), (8, 0), (0, 0)):
        yield row, with_sides(jpeg, *sides), undecodable
        yield row, png(*sides, 8, 2, bytes(300)), undecodable
    row = "text or profile that unpacks to more than 1 MiB"
    bomb = b"k\0\0" + zlib.compress(bytes(8 << 20))
    for name in (b"zTXt", b"iCCP"):
        yield row, with_chunk(png_, name, bomb), undecodable
    yield row, with_chunk(png_, b"iTXt", b"k\0\1\0\0\0" + bomb[3:]), undecodable


def documented_rules() -> dict[str, str]:
    text = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text()
    table = text.split("| picture | what becomes of it |\n|---|---|\n")[1].split("\n\n")[0]
    return dict(re.fullmatch(r"\| (.+) \| (.+) \|", line).groups() for line in table.splitlines())  # type: ignore[union-attr]


def test_every_odd_picture_follows_the_rule_that_the_documentation_states() -> None:
    rules = documented_rules()
    seen = set()
    for row, data, expected in corpus():
        seen.add(row)
        rule = rules[row]
        if isinstance(expected, str):
            assert rule.startswith("bad"), row
            with pytest.raises(BadPicture) as error:
                decode_view(data, 8, lambda w, h: box_for(CENTRE, "a.tar", "k", 0, w, h))
            assert error.value.what.startswith(expected), row
            assert expected.split("; at most")[0].strip() in rule or "W x H" in rule, row
        else:
            assert not rule.startswith("bad"), row
            for policy in (CENTRE, ViewPolicy(crop=(0.3, 1.0), flip=True)):
                crop, box = decode_view(data, 8, partial(box_for, policy, "a.tar", "k", 0))
                assert np.abs(crop.astype(int) - expected).max() <= 3, (row, crop[0, 0], expected)
                assert np.array_equal(replay_view(data, 8, box), crop)
    assert seen == set(rules)


BOMBS_IN_LITTLE_MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from test_views import *

def vast(width, height):
    return decode_view(png(width, height, 8, 2, b""), 8, lambda w, h: box_for(CENTRE, "a.tar", "k", 0, w, h))

bombs = [(row, data) for row, data, expected in corpus() if "more than" in row]
decode_view(encode(photo(8, 8), "PNG"), 8, whole)
(now,) = (int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (now + (48 << 20),) * 2)
for row, data in bombs:
    try:
        decode_view(data, 8, lambda w, h: box_for(CENTRE, "a.tar", "k", 0, w, h))
    except BadPicture as error:
        print("bad")
try:
    vast(14_000, 14_000)  # allowed, and more than there is memory for: the limit is real
except MemoryError:
    print("no memory")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the size of the process from /proc")
def test_bombs_are_refused_in_a_process_with_little_memory() -> None:
    tests = str(Path(__file__).parent)
    command = [sys.executable, "-c", BOMBS_IN_LITTLE_MEMORY, tests]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert (result.stdout.split("\n"), result.stderr) == (["bad"] * 6 + ["no memory", ""], "")


@pytest.mark.parametrize(
    ("width", "height", "limit"),
    [(100_000, 100_000, "at most"), (20_000, 10_001, "at most"), (MAX_SIDE + 1, 1, "at most")],
)
def test_a_bomb_is_refused_before_it_is_decoded(width: int, height: int, limit: str) -> None:
    bomb = png(width, height, 1, 0, b"\0" * 1000)
    with pytest.raises(BadPicture, match=rf"{width} x {height} pixels; {limit} 200,000,000 and 65,535 a side"):
        decode_view(bomb, 8, whole)


def test_a_large_picture_under_the_limit_is_decoded_without_a_warning() -> None:
    # 100 megapixels, where Pillow's own check would warn; of one bit each, to be quick.
    width, height = 10_000, 10_000
    data = png(width, height, 1, 0, (b"\0" + b"\xff" * (width // 8)) * height)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crop, _ = decode_view(data, 8, box_at(0, 0, 64, 64))
    assert (crop == 255).all()


def test_a_webp_bomb_is_refused() -> None:
    data = bytearray(encode(photo(16, 16), "WEBP", exif=exif(1)))
    data[24:30] = (16_000).to_bytes(3, "little") * 2
    with pytest.raises(BadPicture, match="exceeds limit"):
        decode_view(bytes(data), 8, whole)


def test_pillow_set_to_pass_torn_pictures_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UsageError, match="LOAD_TRUNCATED_IMAGES is set"):
        decode_view(encode(photo(8, 8), "PNG"), 8, whole)


@given(seed=st.integers(0, 2**16), flips=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 255)), max_size=4))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_damaged_headers_give_a_crop_or_a_bad_picture(kind: str, seed: int, flips: list[tuple[int, int]]) -> None:
    data = bytearray(DAMAGED[kind])
    for at, mask in flips:
        data[at % len(data)] ^= mask
    try:
        crop, box = decode_view(bytes(data), 8, lambda w, h: box_for(RANDOM, "a.tar", f"{seed}", 0, w, h))
    except BadPicture:
        return
    assert crop.shape == (8, 8, 3)
    assert box.fits


DAMAGED = {kind: encode(photo(24, 18), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF")}


# ---------------------------------------------------------------------------------------------------------------------
# Real pictures


@pytest.mark.real
@pytest.mark.parametrize("name", ["flickr8k_dev_00000", "emoji_noto_00000", "coco2017_train_mini_00000"])
def test_real_pictures_decode_as_pillow_does_and_replay(shared: Path, name: str) -> None:
    path = str(shared / "data" / "pairs" / f"{name}.tar")
    samples = scan_tar(path).samples
    policy = ViewPolicy(crop=(0.5, 1.0), flip=True, jitter=0.4)

    def random_box(width: int, height: int) -> Box:
        return box_for(policy, name, "k", 0, width, height)

    def centre_box(width: int, height: int) -> Box:
        return box_for(CENTRE, name, "k", 0, width, height)

    for sample in samples[:: len(samples) // 40]:
        assert sample.picture is not None
        data = read_member(path, sample.picture.offset, sample.picture.size)
        crop, box = decode_view(data, 64, random_box)
        assert np.array_equal(replay_view(data, 64, Box.from_row(box.as_row())), crop)
        plain, box = decode_view(data, 224, centre_box)
        image: Image.Image = Image.open(io.BytesIO(data))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        edges = (box.left, box.top, box.left + box.width, box.top + box.height)
        expected = image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC, box=edges)
        assert np.abs(plain.astype(int) - np.asarray(expected)).max() <= 1
