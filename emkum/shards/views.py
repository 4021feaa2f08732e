"""Turns picture bytes into uint8 crops: which crop a view takes, and how it is decoded, both replayable.

Legend: a picture has width W and height H in pixels once it stands upright (EXIF orientation applied).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import GifImagePlugin, Image, ImageEnhance, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from emkum.errors import BadPicture, SourceChanged, UsageError
from emkum.shards.layout import MAX_VIEWS

DECODER = "pillow-bicubic-draft2/1"
"""Name of the decode rule. It goes into fingerprints: change what `decode_view` returns, and change this."""

MAX_PIXELS = 200_000_000
MAX_SIDE = 65_535  # of JPEG and GIF; larger ones (PNG) would lose pixels as float32 in the boxes field
DRAFT_FACTOR = 2  # a JPEG is decoded at 1/8, 1/4 or 1/2 only if its box keeps this many times the output's side
DEFAULT_RATIO = (3 / 4, 4 / 3)

Uint8Array: TypeAlias = NDArray[np.uint8]
Float32Array: TypeAlias = NDArray[np.float32]


# ---------------------------------------------------------------------------------------------------------------------
# Which crop


@dataclass(frozen=True, slots=True)
class ViewPolicy:
    """How the views of a split's pictures are cropped, flipped and jittered.

    crop: share of the picture's area, from lo to hi, in (0, 1]. ratio: width / height of the crop, from lo to hi.
    flip: mirror every second view, by chance. jitter: brightness, contrast and saturation by factors in
    [1 - jitter, 1 + jitter], in [0, 1]. count: views a picture.

    With crop = (c, c), no flip and no jitter the policy is deterministic: each picture gives one view, the centred
    square with the share c of the area of the largest centred square. Its seed and ratio change nothing and are set
    to 0 and the default, so that equal policies compare equal. Raises UsageError for values out of range.
    """

    crop: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = DEFAULT_RATIO
    flip: bool = False
    jitter: float = 0.0
    seed: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        crop, ratio = tuple(map(float, self.crop)), tuple(map(float, self.ratio))
        if len(crop) != 2 or not 0 < crop[0] <= crop[1] <= 1:
            raise UsageError(
                f"crop is {_span(crop)}; it is a share of the area", "give 0 < lo <= hi <= 1, like 0.9-1.0"
            )
        if len(ratio) != 2 or not 0.01 <= ratio[0] <= ratio[1] <= 100:
            raise UsageError(f"crop ratio is {_span(ratio)}", "give 0.01 <= lo <= hi <= 100, width over height")
        if not 0 <= self.jitter <= 1:
            raise UsageError(f"jitter is {self.jitter}", "give a number from 0 to 1")
        if not 1 <= self.count <= MAX_VIEWS:
            raise UsageError(f"{self.count} views a picture", f"give 1 to {MAX_VIEWS:,}")
        if not -(2**63) <= self.seed < 2**63:
            raise UsageError(f"seed {self.seed} is beyond 64 bits", "give a smaller one")
        object.__setattr__(self, "crop", crop)
        object.__setattr__(self, "jitter", float(self.jitter))
        object.__setattr__(self, "ratio", DEFAULT_RATIO if self.deterministic else ratio)
        if self.deterministic:
            object.__setattr__(self, "seed", 0)
            if self.count > 1:
                raise UsageError(
                    f"{self.count} views of a policy that gives one: crop {crop[0]}, no flip, no jitter",
                    "give 1 view, or a crop range, flip or jitter",
                )

    @property
    def deterministic(self) -> bool:
        """Whether every view of a picture is the same, whatever the seed."""
        return self.crop[0] == self.crop[1] and not self.flip and self.jitter == 0

    @property
    def name(self) -> str:
        """A name fit for a folder, such as "center-1.0" or "crop-0.9-1.0-flip-jitter-0.4-seed-0"; without `count`."""
        if self.deterministic:
            return f"center-{self.crop[0]!r}"
        parts = [f"crop-{_span(self.crop)}"]
        parts += [f"ratio-{_span(self.ratio)}"] if self.ratio != DEFAULT_RATIO else []
        parts += ["flip"] if self.flip else []
        parts += [f"jitter-{self.jitter!r}"] if self.jitter else []
        return "-".join([*parts, f"seed-{self.seed}"])

    def to_json(self) -> dict[str, object]:
        """The object under `views` in segment.json."""
        return {
            "crop": list(self.crop),
            "ratio": list(self.ratio),
            "flip": self.flip,
            "jitter": self.jitter,
            "seed": self.seed,
            "count": self.count,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, object]) -> ViewPolicy:
        """The policy that `to_json` gave. Raises ValueError for another set of keys or other types."""
        match dict(record):
            case {
                "crop": [int() | float() as low, int() | float() as high],
                "ratio": [int() | float() as narrow, int() | float() as wide],
                "flip": bool() as flip,
                "jitter": int() | float() as jitter,
                "seed": int() as seed,
                "count": int() as count,
                **others,
            } if not others and not any(isinstance(number, bool) for number in (jitter, seed, count)):
                return cls((low, high), (narrow, wide), flip, jitter, seed, count)
        raise ValueError(f"not a view policy: {json.dumps(dict(record), default=repr)}")


@dataclass(frozen=True, slots=True)
class Box:
    """One view of one picture: the crop in whole pixels of the upright picture, the flip, and the jitter's factors.

    Every value is exact in float32, so a stored row gives the same view again, bit for bit.
    """

    left: int
    top: int
    width: int
    height: int
    flip: bool
    brightness: float
    contrast: float
    saturation: float
    source_width: int
    source_height: int

    def as_row(self) -> Float32Array:
        """float32 [10], in the order of docs/format.md, section 4."""
        return np.array([getattr(self, parameter.name) for parameter in fields(self)], np.float32)

    @classmethod
    def from_row(cls, row: NDArray[np.floating]) -> Box:
        """The box of a stored row. Raises ValueError for a row that `as_row` cannot have given."""
        values = [float(value) for value in row]
        if len(values) == 10 and np.isfinite(values).all() and values[4] in (0, 1):
            left, top, width, height = map(int, values[:4])
            source_width, source_height = map(int, values[8:])
            brightness, contrast, saturation = values[5:8]
            flip = bool(values[4])
            box = cls(left, top, width, height, flip, brightness, contrast, saturation, source_width, source_height)
            if box.fits and values == box.as_row().tolist():
                return box
        raise ValueError(f"not a crop box: {values}")

    @property
    def fits(self) -> bool:
        """Whether the crop is at least a pixel and lies within its picture."""
        return (
            min(self.left, self.top) >= 0
            and min(self.width, self.height) >= 1
            and self.left + self.width <= self.source_width
            and self.top + self.height <= self.source_height
        )


def box_for(policy: ViewPolicy, tar: str, key: str, view: int, width: int, height: int) -> Box:
    """The box of a view of the picture `key` in `tar`, width x height upright. A pure function of its arguments.

    Crops as torchvision's RandomResizedCrop does (Szegedy et al. 2015): up to ten tries of an area, uniform in `crop`,
    and a ratio, log-uniform in `ratio`; if none fits, the largest centred crop within `ratio`. The random numbers
    come from BLAKE2b (docs/data.md): no library's generator, version or platform changes them.
    """
    if policy.deterministic:
        side = max(1, round(min(width, height) * math.sqrt(policy.crop[0])))
        return Box((width - side) // 2, (height - side) // 2, side, side, False, 1.0, 1.0, 1.0, width, height)

    uniform = _numbers(policy.seed, tar, key, view)

    def factor(number: int) -> float:
        return float(np.float32(1 + policy.jitter * (2 * uniform(number) - 1)))

    flip = policy.flip and uniform(0) < 0.5
    for number in range(4, 44, 4):
        area = width * height * _between(policy.crop, uniform(number))
        ratio = math.exp(_between((math.log(policy.ratio[0]), math.log(policy.ratio[1])), uniform(number + 1)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(uniform(number + 2) * (width - crop_width + 1))
            top = int(uniform(number + 3) * (height - crop_height + 1))
            break
    else:
        crop_width, crop_height = _largest_crop(policy.ratio, width, height)
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return Box(left, top, crop_width, crop_height, flip, factor(1), factor(2), factor(3), width, height)


def _largest_crop(ratio: tuple[float, float], width: int, height: int) -> tuple[int, int]:
    if width / height < ratio[0]:
        return width, min(height, max(1, round(width / ratio[0])))
    if width / height > ratio[1]:
        return min(width, max(1, round(height * ratio[1]))), height
    return width, height


def _numbers(seed: int, tar: str, key: str, view: int) -> Callable[[int], float]:
    """The random numbers of a view, by their own number: each in [0, 1) and a multiple of 2^-53."""
    view_hash = hashlib.blake2b(json.dumps([seed, tar, key, view]).encode("ascii"), digest_size=8)

    def uniform(number: int) -> float:
        number_hash = view_hash.copy()
        number_hash.update(b"/%d" % number)
        return float((int.from_bytes(number_hash.digest(), "little") >> 11) * 2.0**-53)

    return uniform


def _between(span: tuple[float, float], share: float) -> float:
    return span[0] + (span[1] - span[0]) * share


def _span(values: tuple[float, ...]) -> str:
    return "-".join(map(repr, values))


# ---------------------------------------------------------------------------------------------------------------------
# How it is decoded


def decode_view(data: bytes, size: int, choose_box: Callable[[int, int], Box]) -> tuple[Uint8Array, Box]:
    """Decode a JPEG, PNG, WebP or GIF and return its crop, uint8 [size, size, 3], with the box it was cut by.

    choose_box: called once with the upright picture's width and height. The rules are those of docs/data.md, under
    the name DECODER. Safe in threads; Pillow releases the GIL while it decodes and resizes.
    Raises BadPicture with a one-line reason, a function of `data` alone, when the picture cannot be decoded whole.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UsageError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: torn pictures would pass for whole ones",
            "unset it in the code that imports emkum",
        )
    with _pillow_errors():
        image = _open(data)
    raw_width, raw_height = image.size
    if raw_width * raw_height > MAX_PIXELS or max(raw_width, raw_height) > MAX_SIDE:
        raise BadPicture(
            f"{raw_width} x {raw_height} pixels; at most {MAX_PIXELS:,} and {MAX_SIDE:,} a side are decoded"
        )
    is_jpeg = isinstance(image, JpegImagePlugin.JpegImageFile)
    if not is_jpeg:
        with _pillow_errors():
            deep = any(";16" in str(tile.args) for tile in image.tile)
            image.load()  # PNG and WebP may carry their EXIF after the pixels
        if deep and isinstance(image.info.get("transparency"), tuple):
            # Pillow keeps the high bytes of 16-bit colours, but not of the colour that a PNG marks as transparent.
            image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
    orientation = exif_orientation(image.info.get("exif"))
    turned = orientation >= 5
    width, height = (raw_height, raw_width) if turned else (raw_width, raw_height)
    box = choose_box(width, height)
    if not box.fits or (box.source_width, box.source_height) != (width, height):
        raise ValueError(f"{box} is not a box of a picture of {width} x {height} pixels")
    with _pillow_errors():
        scale = _draft(image, box, size) if is_jpeg else 1.0
        image.load()
        rgb = to_rgb(image)
    edges = [edge / scale for edge in _raw_edges(box, orientation, raw_width, raw_height)]
    crop = rgb.resize((size, size), Image.Resampling.BICUBIC, box=(edges[0], edges[1], edges[2], edges[3]))
    # The crop is square, so it can be turned after it is cut: no whole picture is ever transposed.
    if orientation in _TRANSPOSE:
        crop = crop.transpose(_TRANSPOSE[orientation])
    if box.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance, factor in (
        (ImageEnhance.Brightness, box.brightness),
        (ImageEnhance.Contrast, box.contrast),
        (ImageEnhance.Color, box.saturation),
    ):
        if factor != 1:
            crop = enhance(crop).enhance(factor)
    return np.array(crop, np.uint8), box


def replay_view(data: bytes, size: int, box: Box) -> Uint8Array:
    """The same crop again from its stored box, uint8 [size, size, 3].

    Raises BadPicture, or SourceChanged when the picture has other dimensions than the one the box was chosen for.
    """

    def stored(width: int, height: int) -> Box:
        if (width, height) != (box.source_width, box.source_height):
            chosen = f"{box.source_width} x {box.source_height}"
            raise SourceChanged(
                f"a picture has {width} x {height} pixels; its box was chosen on {chosen}", "put the original tar back"
            )
        return box

    return decode_view(data, size, stored)[0]


class _Jpeg(JpegImagePlugin.JpegImageFile):
    """A JPEG without its resolution, which Pillow looks for in all of the EXIF, warning of what it cannot read."""

    def _read_dpi_from_exif(self) -> None:
        pass


_OPENERS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\xff\xd8\xff", _Jpeg),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
    (b"GIF8", GifImagePlugin.GifImageFile),
)

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _open(data: bytes) -> ImageFile.ImageFile:
    # Not Image.open: it tries dozens of formats, and warns of large pictures through process-wide settings.
    for magic, opener in _OPENERS:
        if data.startswith(magic):
            return opener(io.BytesIO(data))
    if not data:
        raise BadPicture("empty (0 bytes)")
    start = data[:64].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg", b"<head")):
        raise BadPicture("a web page or XML, not a picture")
    raise BadPicture(f"not a JPEG, PNG, WebP or GIF; it begins with {data[:8].hex(' ')}")


@contextmanager
def _pillow_errors() -> Iterator[None]:
    """Turn whatever Pillow raises on bad bytes into BadPicture. MemoryError passes: it says nothing of the picture."""
    try:
        yield
    except (BadPicture, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(re.sub(r" at 0x[0-9a-fA-F]+", "", str(error)).split())[:200]
        raise BadPicture(f"it cannot be decoded: {reason or type(error).__name__}") from error


def _draft(image: ImageFile.ImageFile, box: Box, size: int) -> float:
    """Let libjpeg decode at 1/8, 1/4 or 1/2 where the box stays large enough. Returns the reduction."""
    side = min(box.width, box.height)
    reduction = next((factor for factor in (8, 4, 2) if side >= DRAFT_FACTOR * size * factor), 1)
    if reduction == 1:
        return 1.0
    width, height = image.size
    drafted = image.draft(None, (width // reduction, height // reduction))
    return 1.0 if drafted is None else width / drafted[1][2]


def _raw_edges(box: Box, orientation: int, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a box in the picture as it is stored, width x height, before it is turned upright."""
    across, down = (box.left, box.left + box.width), (box.top, box.top + box.height)
    if orientation >= 5:
        across, down = down, across
    if orientation in (2, 3, 7, 8):
        across = (width - across[1], width - across[0])
    if orientation in (3, 4, 6, 7):
        down = (height - down[1], height - down[0])
    return across[0], down[0], across[1], down[1]


def exif_orientation(exif: object) -> int:
    """The orientation, 1 to 8, in a picture's EXIF block; 1 where there is none, or none that can be read."""
    if not isinstance(exif, bytes):
        return 1
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        for tag, kind, value in _entries(tiff, order):
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _entries(tiff: bytes, order: str) -> Iterator[tuple[int, int, int]]:
    """Tag, type and first 16-bit value of each entry of a TIFF block's first directory."""
    (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, directory)
    for index in range(count):
        tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, directory + 2 + 12 * index)
        yield tag, kind, value


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded picture as 8-bit RGB: 16 bits keep their high byte, transparency goes over white, CMYK is converted."""
    if image.mode.startswith("I"):
        image = _high_byte(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _high_byte(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, with alpha if one of its values is marked transparent."""
    values = np.asarray(image).clip(0, 65535)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey
