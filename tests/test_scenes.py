"""The demo's scenes: the same from a seed, all different, truly described, and read back by the strict scan."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emkum.errors import StorageFailure, UsageError
from emkum.shards.datasets import scenes
from emkum.shards.datasets.scenes import (
    COLOURS,
    GROUNDS,
    PATTERNS,
    PLACES,
    SHAPES,
    Scene,
    ShapeGroup,
    describe,
    draw_scene,
    render,
    write_scenes,
)
from emkum.shards.tars import find_tars, read_member, scan_tar


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return write_scenes(tmp_path_factory.mktemp("scenes"), num_train=60, num_val=30, seed=3)


def records(path: str) -> list[dict[str, object]]:
    with tarfile.open(path) as tar:
        files = [tar.extractfile(member) for member in tar if member.name.endswith(".json")]
        return [json.loads(file.read()) for file in files if file]


def test_scenes_are_tars_of_pictures_with_captions(written: dict[str, list[str]]) -> None:
    assert {split: [Path(path).name for path in paths] for split, paths in written.items()} == {
        "train": ["scenes_train_00000.tar"],
        "val": ["scenes_val_00000.tar"],
    }
    assert find_tars([str(Path(written["val"][0]).parent)]) == [*written["train"], *written["val"]]
    for split, count in (("train", 60), ("val", 30)):
        (path,) = written[split]
        tar = scan_tar(path)
        assert (len(tar.samples), tar.filtered, tar.ignored) == (count, 0, {})
        assert tar.samples[1].key == f"scene_{split}_000001"
        for sample in tar.samples:
            assert len(set(sample.captions)) == 3
            assert sample.picture is not None
            assert sample.picture.ext == "jpg"
            image = Image.open(io.BytesIO(read_member(path, sample.picture.offset, sample.picture.size)))
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (160, 160))


def test_the_txt_holds_the_first_caption_of_the_json(written: dict[str, list[str]]) -> None:
    with tarfile.open(written["val"][0]) as tar:
        texts = {
            member.name: file.read().decode()
            for member in tar
            if (file := tar.extractfile(member)) and not member.name.endswith(".jpg")
        }
    for name, text in texts.items():
        if name.endswith(".txt"):
            assert json.loads(texts[name.replace(".txt", ".json")])["captions"][0] == text


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    tmp_path: Path, written: dict[str, list[str]]
) -> None:
    again = write_scenes(tmp_path / "again", 60, 30, seed=3)
    for split in ("train", "val"):
        assert Path(again[split][0]).read_bytes() == Path(written[split][0]).read_bytes()
    other = write_scenes(tmp_path / "other", 0, 30, seed=4)
    assert other["train"] == []
    assert Path(other["val"][0]).read_bytes() != Path(written["val"][0]).read_bytes()


def test_scenes_do_not_depend_on_the_hash_seed_of_python() -> None:
    code = (
        "import random, hashlib; from emkum.shards.datasets.scenes import *\n"
        "draw = random.Random('x'); scene = draw_scene(draw); print(scene, describe(scene, draw, 3))\n"
        "print(hashlib.sha256(render(scene, draw, 64).tobytes()).hexdigest())"
    )
    root = str(Path(__file__).resolve().parents[1])
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": root},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1


def test_the_validation_split_stays_when_the_training_split_grows(
    tmp_path: Path, written: dict[str, list[str]]
) -> None:
    more = write_scenes(tmp_path, 61, 30, seed=3)
    assert Path(more["val"][0]).read_bytes() == Path(written["val"][0]).read_bytes()
    assert records(more["train"][0])[:60] == records(written["train"][0])


def test_no_scene_and_no_caption_comes_twice(tmp_path: Path) -> None:
    paths = write_scenes(tmp_path, 700, 300, seed=0, size=32)
    assert len(paths["train"]) == 2
    all_records = [record for split in paths.values() for path in split for record in records(path)]
    assert len(all_records) == 1000
    assert len({json.dumps(record["scene"]) for record in all_records}) == 1000
    captions = Counter(caption for record in all_records for caption in record["captions"])  # type: ignore[attr-defined]
    assert max(captions.values()) == 1


def test_a_seed_covers_all_shapes_colours_places_numbers_and_grounds() -> None:
    drawn = [draw_scene(random.Random(f"{index}")) for index in range(400)]
    groups = [group for scene in drawn for group in scene.groups]
    assert {group.shape for group in groups} == set(SHAPES)
    assert {group.colour for group in groups} == set(COLOURS)
    assert {group.place for group in groups} == set(PLACES)
    assert {group.count for group in groups} == {1, 2, 3, 4}
    assert {scene.ground for scene in drawn} == set(GROUNDS)
    assert {scene.pattern for scene in drawn} == set(PATTERNS)
    assert {len(scene.groups) for scene in drawn} == {1, 2, 3}
    assert max(Counter(drawn).values()) <= 2


def test_every_caption_names_all_that_its_scene_holds() -> None:
    for index in range(200):
        draw = random.Random(f"{index}")
        scene = draw_scene(draw)
        for caption in describe(scene, draw, 4):
            assert f"{scene.pattern} {scene.ground}" in caption
            assert "{" not in caption
            for group in scene.groups:
                number = "a" if group.count == 1 else ("two", "three", "four")[group.count - 2]
                sizes = {"small": ("small", "little"), "large": ("large", "big")}[group.size]
                noun = group.shape if group.count == 1 else group.shape + ("es" if group.shape == "cross" else "s")
                phrases = [
                    f"{number} {size} {group.colour} {noun} {where}"
                    for size in sizes
                    for where in PLACES[group.place][1]
                ]
                assert any(phrase in caption for phrase in phrases), (caption, phrases)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_is_seen_at_its_place_in_its_colour(shape: str) -> None:
    for place, ((centre_x, centre_y), _) in PLACES.items():
        scene = Scene("light blue", "plain", (ShapeGroup(shape, "red", "large", 1, place),))
        image = np.asarray(render(scene, random.Random(shape), 128)).astype(int)
        red = np.abs(image - COLOURS["red"]).max(axis=2) < 30
        rows, columns = np.nonzero(red)
        assert 0.02 < red.mean() < 0.15
        assert abs(columns.mean() / 128 - centre_x) < 0.09
        assert abs(rows.mean() / 128 - centre_y) < 0.09


def test_all_shapes_look_different() -> None:
    pictures = []
    for shape in SHAPES:
        scene = Scene("beige", "plain", (ShapeGroup(shape, "blue", "large", 1, "centre"),))
        pictures.append(np.asarray(render(scene, random.Random(0), 96)).astype(int))
    for first in range(len(SHAPES)):
        for second in range(first):
            different = np.abs(pictures[first] - pictures[second]).max(axis=2) > 60
            assert different.mean() > 0.01, (SHAPES[first], SHAPES[second])


def test_a_count_is_seen_as_separate_shapes() -> None:
    for count in (1, 2, 3, 4):
        scene = Scene("lavender", "plain", (ShapeGroup("circle", "black", "small", count, "centre"),))
        picture = np.asarray(render(scene, random.Random(count), 96)).sum(axis=2) < 200
        assert num_spots(picture) == count


def num_spots(picture: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> int:
    """Connected areas of a picture, by flood fill."""
    left = {(int(row), int(column)) for row, column in zip(*np.nonzero(picture), strict=True)}
    spots = 0
    while left:
        spots += 1
        front = [left.pop()]
        while front:
            row, column = front.pop()
            near = {(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)} & left
            left -= near
            front += near
    return spots


def test_a_shape_always_stands_out_from_its_ground() -> None:
    for index in range(300):
        scene = draw_scene(random.Random(f"contrast {index}"))
        for group in scene.groups:
            distance = np.linalg.norm(np.subtract(COLOURS[group.colour], GROUNDS[scene.ground]))
            assert distance >= scenes.MIN_CONTRAST


@pytest.mark.parametrize("arguments", [(-1, 1, 0), (1, -1, 0), (1, 1, 0, 16), (1, 1, 0, 160, 0), (1, 1, 0, 160, 9)])
def test_impossible_numbers_are_refused(tmp_path: Path, arguments: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="scenes of") as error:
        write_scenes(tmp_path, *arguments)
    assert "at least 32 px, 1 to 8 captions" in error.value.way_out


def test_a_tar_appears_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(StorageFailure, match=r"scenes_val_00000\.tar cannot be written: No space left on device"):
        write_scenes(tmp_path, 0, 2, seed=0)
    assert list(tmp_path.glob("*.tar")) == []


def test_importing_scenes_does_not_import_torch() -> None:
    code = (
        "import sys, emkum.shards.datasets.scenes, emkum.shards.tars, emkum.shards.views; print('torch' in sys.modules)"
    )
    root = str(Path(__file__).resolve().parents[1])
    output = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": root}, check=True, capture_output=True)
    assert output.stdout == b"False\n"
