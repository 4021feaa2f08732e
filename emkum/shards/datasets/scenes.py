"""Makes picture-caption scenes from a seed: coloured shapes on a ground, described by a small grammar.

They are the data of `emkum demo`: real enough that retrieval means something, and needing no download. No two
pictures of a call show the same scene, and no two pictures share a caption.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias, TypeVar

from PIL import Image, ImageDraw

from emkum.errors import StorageFailure, UsageError

SAMPLES_PER_TAR = 500
JPEG_QUALITY = 90
OVERSAMPLING = 3  # shapes are drawn larger and reduced, so that their edges are smooth

Colour: TypeAlias = tuple[int, int, int]
Point: TypeAlias = tuple[float, float]
Item = TypeVar("Item")

COLOURS: Mapping[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (244, 140, 6),
    "yellow": (250, 215, 30),
    "green": (46, 150, 60),
    "blue": (38, 84, 214),
    "purple": (130, 50, 170),
    "pink": (245, 120, 175),
    "brown": (120, 72, 34),
    "black": (22, 22, 22),
    "white": (250, 250, 250),
}
GROUNDS: Mapping[str, Colour] = {
    "grey": (128, 128, 128),
    "beige": (226, 208, 172),
    "light blue": (165, 212, 240),
    "light green": (176, 224, 168),
    "lavender": (208, 192, 236),
    "dark blue": (20, 28, 74),
    "dark green": (14, 60, 40),
    "maroon": (88, 16, 36),
}
PATTERNS = ("plain", "striped", "dotted")
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring", "hexagon", "moon")
SIZES = ("small", "large")
# Centres of the places, as shares of the side, and how each is said.
PLACES: Mapping[str, tuple[Point, tuple[str, ...]]] = {
    "top left": ((0.27, 0.27), ("at the top left", "in the upper left corner")),
    "top right": ((0.73, 0.27), ("at the top right", "in the upper right corner")),
    "bottom left": ((0.27, 0.73), ("at the bottom left", "in the lower left corner")),
    "bottom right": ((0.73, 0.73), ("at the bottom right", "in the lower right corner")),
    "centre": ((0.5, 0.5), ("in the centre", "in the middle")),
}
NUMBERS = ("no", "one", "two", "three", "four")
MIN_CONTRAST = 110.0  # distance in RGB between a shape's colour and its ground's


@dataclass(frozen=True)
class ShapeGroup:
    """`count` equal shapes at one place."""

    shape: str
    colour: str
    size: str
    count: int
    place: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows and its captions say. Groups are ordered by place, so equal scenes compare equal."""

    ground: str
    pattern: str
    groups: tuple[ShapeGroup, ...]


def write_scenes(
    folder: str | os.PathLike[str],
    num_train: int,
    num_val: int,
    seed: int,
    size: int = 160,
    captions_per_picture: int = 3,
) -> dict[str, list[str]]:
    """Write scenes as WebDataset tars, 500 samples each, and return their paths by split, "train" and "val".

    A sample is KEY.jpg (size x size, quality 90), KEY.txt (its first caption) and KEY.json with `captions` and the
    scene. The same arguments give the same scenes and captions everywhere, and the same bytes with the same Pillow.
    A tar appears under its name when it is whole; one that was there is replaced. Raises UsageError.
    """
    if min(num_train, num_val) < 0 or size < 32 or not 1 <= captions_per_picture <= 8:
        raise UsageError(
            f"{num_train} + {num_val} scenes of {size} px with {captions_per_picture} captions each",
            "give 0 or more scenes, at least 32 px, 1 to 8 captions",
        )
    os.makedirs(folder, exist_ok=True)
    scenes: set[Scene] = set()
    said: set[str] = set()
    paths: dict[str, list[str]] = {"train": [], "val": []}
    # The validation split draws first: it stays the same when the number of training scenes changes.
    for split, count in (("val", num_val), ("train", num_train)):
        for number, first in enumerate(range(0, count, SAMPLES_PER_TAR)):
            path = os.path.join(folder, f"scenes_{split}_{number:05d}.tar")
            indices = range(first, min(first + SAMPLES_PER_TAR, count))
            samples = [_sample(split, index, seed, size, captions_per_picture, scenes, said) for index in indices]
            _write_tar(path, samples)
            paths[split].append(path)
    return paths


def _sample(
    split: str, index: int, seed: int, size: int, num_captions: int, scenes: set[Scene], said: set[str]
) -> dict[str, str | bytes]:
    """One sample for TarWriter; its scene and captions are new, and are added to `scenes` and `said`."""
    for attempt in range(1000):
        draw = random.Random(f"emkum scenes/{seed}/{split}/{index}/{attempt}")
        scene = draw_scene(draw)
        captions = describe(scene, draw, num_captions)
        if scene not in scenes and said.isdisjoint(captions):
            break
    else:
        raise UsageError(f"no new scene is left after {len(scenes)}", "ask for fewer")
    scenes.add(scene)
    said.update(captions)
    picture = io.BytesIO()
    render(scene, draw, size).save(picture, "JPEG", quality=JPEG_QUALITY)
    record = {"captions": captions, "dataset": "emkum-scenes", "split": split, "scene": asdict(scene)}
    return {
        "__key__": f"scene_{split}_{index:06d}",
        "jpg": picture.getvalue(),
        "txt": captions[0].encode(),
        "json": json.dumps(record, sort_keys=True).encode(),
    }


def _write_tar(path: str, samples: Sequence[dict[str, str | bytes]]) -> None:
    from webdataset import TarWriter  # imports torch

    unfinished = f"{path}.tmp"
    try:
        with open(unfinished, "wb") as file:
            with TarWriter(file, user="emkum", group="emkum", mtime=0, encoder=False) as writer:
                for sample in samples:
                    writer.write(sample)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise StorageFailure(
            f"{path} cannot be written: {error.strerror}", "make room, or name another folder"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Scenes. Of random.Random only random() is used: its numbers are promised to stay the same in every Python.


def _pick(draw: random.Random, items: Sequence[Item]) -> Item:
    return items[int(draw.random() * len(items))]


def _between(draw: random.Random, low: float, high: float) -> float:
    return low + (high - low) * draw.random()


def draw_scene(draw: random.Random) -> Scene:
    """A scene of one, two or three groups of shapes at different places, each unlike the others and visible."""
    ground = _pick(draw, tuple(GROUNDS))
    visible = [name for name, colour in COLOURS.items() if math.dist(colour, GROUNDS[ground]) >= MIN_CONTRAST]
    num_groups = _pick(draw, (1, 2, 2, 3))
    places = list(PLACES)
    if num_groups > 1:
        places.remove("centre")  # it overlaps the corners
    groups: list[ShapeGroup] = []
    while len(groups) < num_groups:
        size = _pick(draw, SIZES)
        count = 1 if size == "large" else _pick(draw, (1, 2, 3, 4))
        group = ShapeGroup(_pick(draw, SHAPES), _pick(draw, visible), size, count, _pick(draw, places))
        if any((group.shape, group.colour) == (other.shape, other.colour) for other in groups):
            continue
        places.remove(group.place)
        groups.append(group)
    return Scene(
        ground, _pick(draw, PATTERNS), tuple(sorted(groups, key=lambda group: list(PLACES).index(group.place)))
    )


def describe(scene: Scene, draw: random.Random, count: int) -> list[str]:
    """`count` different captions. Each says all of the scene: the ground, and every group's five properties."""
    captions: list[str] = []
    while len(captions) < count:
        caption = _caption(scene, draw)
        if caption not in captions:
            captions.append(caption)
    return captions


def _caption(scene: Scene, draw: random.Random) -> str:
    phrases = [_phrase(group, draw) for group in scene.groups]
    start = int(draw.random() * len(phrases))
    phrases = phrases[start:] + phrases[:start]
    things = " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
    colour = f"{scene.pattern} {scene.ground}"
    article = "an" if colour[0] in "aeiou" else "a"
    templates = (
        "{things} on {article} {colour} background",
        "{article} {colour} background with {things}",
        "a picture of {things} on {colour}",
        "there {verb} {things}, the background is {colour}",
        "{things}, drawn on {article} {colour} ground",
        "on {article} {colour} background, {things}",
    )
    verb = "are" if phrases[0].split()[0] in NUMBERS[2:] else "is"
    return _pick(draw, templates).format(things=things, article=article, colour=colour, verb=verb)


def _phrase(group: ShapeGroup, draw: random.Random) -> str:
    size = _pick(draw, {"small": ("small", "little"), "large": ("large", "big")}[group.size])
    noun = group.shape
    if group.count > 1:
        noun = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    number = "a" if group.count == 1 else NUMBERS[group.count]
    where = _pick(draw, PLACES[group.place][1])
    return f"{number} {size} {group.colour} {noun} {where}"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def render(scene: Scene, draw: random.Random, size: int) -> Image.Image:
    """The scene as an RGB picture of size x size pixels; exact position, tilt and shade are drawn from `draw`."""
    side = size * OVERSAMPLING
    image = Image.new("RGB", (side, side), _shade(GROUNDS[scene.ground], draw))
    canvas = ImageDraw.Draw(image)
    _draw_pattern(canvas, scene, draw, side)
    for group in scene.groups:
        colour = _shade(COLOURS[group.colour], draw)
        centre_x, centre_y = PLACES[group.place][0]
        centre = (side * (centre_x + _between(draw, -0.02, 0.02)), side * (centre_y + _between(draw, -0.02, 0.02)))
        radius = side * ({"small": 0.085, "large": 0.19}[group.size] * _between(draw, 0.92, 1.08))
        for x, y in _spots(group.count):
            tilt = _between(draw, -0.15, 0.15)
            _draw_shape(canvas, group.shape, (centre[0] + x * side, centre[1] + y * side), radius, tilt, colour)
    return image.resize((size, size), Image.Resampling.BOX)


def _shade(colour: Colour, draw: random.Random) -> Colour:
    red, green, blue = (min(255, max(0, round(value + _between(draw, -10, 10)))) for value in colour)
    return red, green, blue


def _spots(count: int) -> Sequence[Point]:
    """Where the shapes of a group lie around its centre, as shares of the side."""
    step = 0.1
    return {
        1: ((0.0, 0.0),),
        2: ((-step, 0.0), (step, 0.0)),
        3: ((-step, step), (step, step), (0.0, -step)),
        4: ((-step, -step), (step, -step), (-step, step), (step, step)),
    }[count]


def _draw_pattern(canvas: ImageDraw.ImageDraw, scene: Scene, draw: random.Random, side: int) -> None:
    red, green, blue = GROUNDS[scene.ground]
    dark = red + green + blue < 300
    mark = tuple(min(255, value + 34) if dark else max(0, value - 28) for value in (red, green, blue))
    step = side / 10
    phase = draw.random() * step
    for row in range(-1, 12):
        across = row * step + phase
        if scene.pattern == "striped":
            canvas.rectangle((0, across, side, across + step / 2), fill=mark)
        elif scene.pattern == "dotted":
            for column in range(-1, 12):
                down = column * step + phase
                canvas.ellipse((across, down, across + step / 3, down + step / 3), fill=mark)


def _draw_shape(
    canvas: ImageDraw.ImageDraw, shape: str, centre: Point, radius: float, tilt: float, colour: Colour
) -> None:
    x, y = centre
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "ring":
        canvas.ellipse(
            (x - radius, y - radius, x + radius, y + radius), outline=colour, width=max(1, round(radius * 0.36))
        )
    else:
        cos, sin = math.cos(tilt), math.sin(tilt)
        canvas.polygon(
            [(x + radius * (u * cos - v * sin), y + radius * (u * sin + v * cos)) for u, v in _outline(shape)],
            fill=colour,
        )


def _outline(shape: str) -> list[Point]:
    """Corners of a shape in the unit circle, y downward."""
    if shape == "square":
        return [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]
    if shape == "diamond":
        return [(0.0, -1.0), (0.66, 0.0), (0.0, 1.0), (-0.66, 0.0)]
    if shape == "cross":
        arm, end = 0.3, 0.95
        quarter = [(arm, -arm), (end, -arm), (end, arm)]
        return [corner for turn in range(4) for corner in (_turned(point, turn * math.pi / 2) for point in quarter)]
    if shape == "heart":
        angles = [2 * math.pi * step / 60 for step in range(60)]
        return [
            (
                math.sin(angle) ** 3,
                -(13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)) / 16,
            )
            for angle in angles
        ]
    if shape == "moon":
        outer = [_turned((0.0, -1.0), -math.pi * step / 30) for step in range(31)]
        inner = [(-0.45 * math.sin(math.pi * step / 30), math.cos(math.pi * step / 30)) for step in range(31)]
        return [(x + 0.6, y) for x, y in outer + inner]
    corners, dent = {"triangle": (3, 0.0), "hexagon": (6, 0.0), "star": (5, 0.42)}[shape]
    if not dent:
        return [_turned((0.0, -1.0), 2 * math.pi * step / corners) for step in range(corners)]
    return [_turned((0.0, -dent if step % 2 else -1.0), math.pi * step / corners) for step in range(2 * corners)]


def _turned(point: Point, angle: float) -> Point:
    return (
        point[0] * math.cos(angle) - point[1] * math.sin(angle),
        point[0] * math.sin(angle) + point[1] * math.cos(angle),
    )
