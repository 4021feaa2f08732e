"""`emkum extract` of captions with their pictures: fused BEiT-3 and VLMo, from tars to fields in the text row space."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from emkum.errors import (
    CorruptCache,
    FingerprintMismatch,
    IdentityMismatch,
    IncompleteCache,
    Interrupted,
    MissingCaptions,
    MissingField,
    NoData,
    NonFiniteFeature,
    RefusedTeacher,
    TooManyBadSamples,
    UnsupportedNetwork,
    UsageError,
)
from emkum.models.families.registry import CATALOGUE
from emkum.models.listing import bytes_per_sample, num_tokens, show
from emkum.models.multiway import Multiway
from emkum.models.network import load_saved, normalise
from emkum.models.pair_pass import PairPass
from emkum.models.passes import Wanted
from emkum.models.targets import LayersRule
from emkum.models.tokenizer import text_ids
from emkum.shards.audit import describe, left_out, table
from emkum.shards.digest import digest
from emkum.shards.layout import TEXT_TILE
from emkum.shards.reader import Cache
from emkum.shards.repair import repair
from emkum.shards.store import open_store
from emkum.shards.verify import verify as verify_store
from emkum.stage1_extract import pictures
from emkum.stage1_extract.captions import NO_PICTURE, CaptionStream
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.extract import extract
from emkum.stage1_extract.live_check import SampleConfig, check_sample, load_teachers, require_agreement
from emkum.stage1_extract.pictures import from_tars
from emkum.stage1_extract.plan import Task
from tests.extraction import Running, content
from tests.pair_files import POSITIONS, SIZE, alone, caption, decoded, jpeg, lines_of, pairs_tar, save_pairs
from tests.sound_files import write_tar

TARGETS = ("cls", "mean", "layers", "patches")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pairs(tmp_path_factory.mktemp("networks"))


ALONE, BAD = (3, 6, 13), (5, 7)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.tar: 24 captions of 16 samples, 6 without a picture and 4 of broken ones; b.tar: 12 of 8."""
    folder = tmp_path_factory.mktemp("data")
    pairs_tar(folder / "a.tar", 16, alone=ALONE, bad=BAD)
    pairs_tar(folder / "b.tar", 8, seed=50)
    return folder


def config(teacher: Path | str, data: Path | str, cache: Path, **changes: Any) -> ExtractConfig:
    common: dict[str, Any] = {
        "targets": TARGETS,
        "storage": "float32",
        "compute": "float32",
        "rows_per_block": 16,
        "size": SIZE,
        "max_tokens": POSITIONS,
        "max_bad": 0.2,
        "batch_size": 5,
        "threads": 2,
        "device": "cpu",
    }
    return ExtractConfig(teacher=(str(teacher),), data=(str(data),), cache=cache, **(common | changes))


def run(*arguments: Any, **changes: Any) -> list[str]:
    lines: list[str] = []
    extract(config(*arguments, **changes), lines.append)
    return lines


def fields_of(name: str, kept: tuple[str, ...] = TARGETS) -> tuple[str, ...]:
    return tuple(f"teacher/{name}/pair/{target}" for target in kept)


FIELDS = fields_of("beit3-pair")


@pytest.fixture(scope="module")
def made(
    networks: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, list[str]]]:
    """A cache of either network, and what the run said."""
    root = tmp_path_factory.mktemp("made")
    return {name: (root / name, run(networks[name], data, root / name)) for name in ("beit3-pair", "vlmo-pair")}


@pytest.fixture
def cache(made: dict[str, tuple[Path, list[str]]], tmp_path: Path) -> Path:
    """A copy of BEiT-3's cache, to be damaged or continued."""
    return Path(shutil.copytree(made["beit3-pair"][0], tmp_path / "cache"))


# --- what is in the cache -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["beit3-pair", "vlmo-pair"])
def test_every_row_is_what_the_network_says_of_that_pair_alone(
    made: dict[str, tuple[Path, list[str]]], networks: dict[str, Path], data: Path, name: str
) -> None:
    cache, network = Cache.open(made[name][0]), load_saved(networks[name])
    ids = cache.field(f"text/{name}/ids")
    assert {field.space for field in cache.fields.values()} == {"text"}
    assert cache.field(f"teacher/{name}/pair/layers").row_shape == (POSITIONS, network.width)
    lines = lines_of(cache)
    assert len(lines) == 36
    valid = [line["text_row"] for line in lines if decoded(cache, data, line) is not None]
    assert len(valid) == 26
    for field_name in fields_of(name):
        assert cache.field(field_name).rows("train").tolist() == valid
    assert len(ids.rows("train")) == 36
    for line in lines:
        found, row = decoded(cache, data, line), np.array([line["text_row"]])
        if found is None:
            continue
        expected = alone(network, found[0], line["caption"])
        length = int(ids.lengths(row)[0])
        for target, one in expected.items():
            field = cache.field(f"teacher/{name}/pair/{target}")
            values = field.values(row)[0]
            if target in ("layers", "patches"):
                assert int(field.lengths(row)[0]) == length == len(one)
                assert not values[length:].any()
                values = values[:length]
            assert np.abs(values - one).max() < 1e-5 * max(1.0, float(np.abs(one).max())), (target, line)


@pytest.mark.parametrize("name", ["beit3-pair", "vlmo-pair"])
def test_plain_zarr_reads_it(made: dict[str, tuple[Path, list[str]]], name: str) -> None:
    cache = Cache.open(made[name][0])
    for field_name in fields_of(name):
        field = cache.field(field_name)
        rows = field.rows("train")
        group = zarr.open_group(made[name][0] / field_name, mode="r")
        values = group["values"]
        assert isinstance(values, zarr.Array)
        assert values.metadata.dimension_names[0] == "text_row"
        found = np.asarray(values[:])
        missing = sorted(set(range(36)) - set(rows.tolist()))
        assert np.isnan(found[missing]).all()
        if not field.spec.is_ragged:
            np.testing.assert_array_equal(found[rows], field.values(rows))
            continue
        lengths = np.asarray(group["length"][:])
        np.testing.assert_array_equal(lengths[rows], field.lengths(rows))
        assert not lengths[missing].any()
        assert len(set(lengths[rows].tolist())) > 5
        for row, one in zip(rows.tolist(), field.values(rows), strict=True):
            np.testing.assert_array_equal(found[row, : lengths[row]], one[: lengths[row]])
            tiles = -(-int(lengths[row]) // TEXT_TILE) * TEXT_TILE
            assert np.isnan(found[row, tiles:]).all()  # not stored


def test_the_run_says_what_it_does(made: dict[str, tuple[Path, list[str]]]) -> None:
    lines = made["beit3-pair"][1]
    assert lines[0].startswith("split train: 21 pictures and 36 captions in 2 tars; 8 keys appear in several tars")
    assert any(line.startswith("  teacher/beit3-pair/pair/cls: 36 rows, ") for line in lines)
    assert any(line.startswith("  teacher/beit3-pair/pair/layers: 36 rows, at most ") for line in lines)
    assert "seen 36 = 32 ok + 4 quarantined (captions)" in lines
    assert f"6 of 36 captions have no picture: no rows of {', '.join(FIELDS)}; --max-bad does not count them" in lines
    assert not any("emkum train" in line for line in lines)  # no recipe reads pairs' fields


def test_the_fingerprint_has_what_pictures_and_what_texts_depend_on(made: dict[str, tuple[Path, list[str]]]) -> None:
    found = {name: Cache.open(path).fields for name, (path, _) in made.items()}
    cls = found["beit3-pair"][FIELDS[0]].fingerprint
    assert (cls["size"], cls["mean"], cls["std"]) == (SIZE, [0.5] * 3, [0.5] * 3)
    assert cls["decoder"]
    assert cls["max_tokens"] == POSITIONS
    assert cls["tokenizer"] == found["beit3-pair"]["text/beit3-pair/ids"].fingerprint["tokenizer"]
    assert cls["output"] == "CLS of the picture after the final norm, of a caption with its picture"
    of_vlmo = found["vlmo-pair"]["teacher/vlmo-pair/pair/cls"].fingerprint
    assert of_vlmo["output"] == "first token of the text after the final norm, of a caption with its picture"
    layers = found["beit3-pair"][FIELDS[2]].fingerprint
    expected = "mean over all blocks of instance-normalised outputs, of the text of a caption with its picture"
    assert layers["output"] == expected
    assert "layers" not in layers


def test_cls_and_layers_are_the_default(networks: dict[str, Path], data: Path, tmp_path: Path) -> None:
    run(networks["vlmo-pair"], data, tmp_path / "cache", targets=())
    kept = ("cls", "layers")
    assert set(Cache.open(tmp_path / "cache").fields) == {"text/vlmo-pair/ids", *fields_of("vlmo-pair", kept)}


def test_show_says_what_a_pair_takes_and_how_to_extract_it(networks: dict[str, Path]) -> None:
    known = show(str(networks["beit3-pair"]))
    assert known["bytes_per_sample"]["layers"] == 2 * 38 * 128  # of the text, for which there are 38 positions
    assert known["extract"].endswith("beit3-pair --targets cls,layers --max-tokens 32")
    assert "refused" not in known
    for name, words, width in (("beit3-pair", 64, 768), ("vlmo-pair", 64, 768), ("vlmo-base-plus-pair", 40, 544)):
        found = bytes_per_sample(CATALOGUE[name], num_tokens(CATALOGUE[name]), "thesis")
        pooled, ragged = 2 * width, 2 * words * width
        assert found == {"cls": pooled, "mean": pooled, "patches": ragged, "layers": ragged}


def test_the_same_command_does_nothing(cache: Path, networks: dict[str, Path], data: Path) -> None:
    before = content(cache)
    assert run(networks["beit3-pair"], data, cache)[-1].startswith("nothing to do")
    assert content(cache) == before


def test_float16_and_int8(
    made: dict[str, tuple[Path, list[str]]], networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    exact = Cache.open(made["beit3-pair"][0])
    rows = exact.field(FIELDS[0]).rows("train")
    for storage, worst in (("float16", 1e-3), ("int8", 0.02)):
        run(networks["beit3-pair"], data, tmp_path / storage, storage=storage)
        stored = Cache.open(tmp_path / storage)
        for name in FIELDS:
            ours, other = stored.field(name).values(rows), exact.field(name).values(rows)
            assert np.linalg.norm(ours - other) < worst * np.linalg.norm(other)
        assert not verify_store(open_store(tmp_path / storage)).findings


def test_bfloat16_is_near(
    made: dict[str, tuple[Path, list[str]]], networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    for name in ("beit3-pair", "vlmo-pair"):
        run(networks[name], data, tmp_path / name, compute="bfloat16")
        exact, found = Cache.open(made[name][0]), Cache.open(tmp_path / name)
        rows = exact.field(fields_of(name)[0]).rows("train")
        for field in fields_of(name):
            ours, other = found.field(field).values(rows), exact.field(field).values(rows)
            assert 0 < np.linalg.norm(ours - other) < 0.05 * np.linalg.norm(other)


def test_info_verify_and_a_live_sample_know_pairs(cache: Path, networks: dict[str, Path], data: Path) -> None:
    described = describe(Cache.open(cache))
    assert described["fields"][FIELDS[2]]["kind"] == "ragged"
    assert described["fields"][FIELDS[0]]["kind"] == "text_pooled"
    assert FIELDS[0] in table(described)
    report = verify_store(open_store(cache))
    assert not report.findings
    assert (report.fields, report.blocks) == (5, 15)
    asked = SampleConfig(rows=9, teacher=(str(networks["beit3-pair"]),), device="cpu")
    found = check_sample(cache, asked, load_teachers(cache, asked))
    require_agreement(found)
    assert {sample.field: sample.rows for sample in found.fields} == dict.fromkeys(FIELDS, 9)


def test_a_live_sample_finds_rows_of_other_pictures(
    cache: Path, networks: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = pictures.decode_view

    def mirrored(*arguments: Any) -> Any:
        crop, box = true(*arguments)
        return crop[:, ::-1].copy(), box

    asked = SampleConfig(rows=9, teacher=(str(networks["beit3-pair"]),), device="cpu")
    teachers = load_teachers(cache, asked)
    monkeypatch.setattr(pictures, "decode_view", mirrored)
    with pytest.raises(CorruptCache, match="rows are not what their networks say: teacher/beit3-pair/pair/"):
        require_agreement(check_sample(cache, asked, teachers))


def test_a_live_sample_takes_the_captions_whose_picture_is_at_hand(
    networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """In a tar that is still there, or among the crops that the cache keeps."""
    tars = Path(shutil.copytree(data, tmp_path / "tars"))
    with_crops = {"store_inputs": "crops", "encoder": str(networks["beit3"])}
    for name, more in (("plain", {}), ("crops", with_crops)):
        run(networks["beit3-pair"], tars, tmp_path / name, targets=("cls",), **more)
    (tars / "a.tar").unlink()
    asked = SampleConfig(rows=100, teacher=(str(networks["beit3-pair"]),), device="cpu")
    for name, count in (("plain", 12), ("crops", 26)):
        found = check_sample(tmp_path / name, asked, load_teachers(tmp_path / name, asked))
        require_agreement(found)
        assert {sample.field: sample.rows for sample in found.fields} == {FIELDS[0]: count}
        assert found.absent == ("a.tar",)


def test_a_damaged_block_is_found_repaired_and_extracted_again(
    cache: Path, networks: dict[str, Path], data: Path
) -> None:
    whole = content(cache)
    path = cache / FIELDS[2] / "values/c.1.0.0"
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 0x40
    path.write_bytes(bytes(damaged))
    (finding,) = verify_store(open_store(cache)).findings
    assert (finding.space, finding.field, finding.block) == ("text", FIELDS[2], 1)
    repair(open_store(cache))
    run(networks["beit3-pair"], data, cache)
    assert content(cache) == whole


# --- which pictures -------------------------------------------------------------------------------------------------


def test_a_picture_is_decoded_once_for_captions_that_follow_each_other(
    made: dict[str, tuple[Path, list[str]]], data: Path
) -> None:
    """Also where a batch or a block ends between them."""
    cache = Cache.open(made["beit3-pair"][0])
    (segment,) = cache.segments
    tars = from_tars({name: str(data / name) for name in ("a.tar", "b.tar")}, SIZE)
    looked: list[int] = []

    def look(task: Task, wanted: Any) -> Any:
        looked.extend(picture.row for picture in wanted)
        return tars.look(task, wanted)

    tasks = [Task(segment, block, 0, (), 16 * block, min(16, 36 - 16 * block)) for block in range(3)]
    for batch_size in (1, 2, 5, 32):
        looked.clear()
        source = dataclasses.replace(tars, look=look)
        stream = CaptionStream(cache.store, tasks, batch_size, source, threads=2)
        batches = list(stream)
        stream.close()
        rows = [line["image_row"] for line in lines_of(cache) if line["image_row"] is not None]
        assert sorted(looked) == sorted(set(rows))
        assert [c.row for batch in batches for c in batch.captions] == list(range(36))
        assert [batch.task.block for batch in batches if batch.last] == [0, 1, 2]
        seen = [found for batch in batches for found in batch.seen]
        assert [None if found is None else found.picture.row for found in seen] == [
            line["image_row"] for line in lines_of(cache)
        ]


def test_the_crops_are_those_whose_boxes_picture_teachers_record(
    made: dict[str, tuple[Path, list[str]]], networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    both = config(networks["beit3"], data, tmp_path / "cache", text_encoder=str(networks["beit3-text"]))
    both = dataclasses.replace(both, teacher=(str(networks["beit3"]), str(networks["beit3-pair"])), targets=("cls",))
    extract(both, lambda line: None)
    cache, apart = Cache.open(tmp_path / "cache"), Cache.open(made["beit3-pair"][0])
    assert set(cache.fields) == {
        "image/beit3@0/tokens",
        "views/crop-0.9-1.0-seed-0/boxes",
        "teacher/beit3/image/cls",
        "text/beit3-text/ids",
        FIELDS[0],
    }
    field, rows = cache.field(FIELDS[0]), apart.field(FIELDS[0]).rows("train")
    np.testing.assert_array_equal(field.rows("train"), rows)
    np.testing.assert_array_equal(field.values(rows), apart.field(FIELDS[0]).values(rows))
    boxes = cache.field("views/crop-0.9-1.0-seed-0/boxes")
    for line in lines_of(cache):
        if (found := decoded(cache, data, line)) is not None:
            assert line["text_row"] in rows
            recorded = boxes.values(np.array([line["image_row"]]))[0]
            np.testing.assert_array_equal(found[1].as_row(), recorded)


def test_a_teacher_of_pairs_can_come_after_an_image_teacher_and_takes_its_crops(
    networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    run(networks["beit3"], data, cache, targets=("cls",), crop=(0.5, 0.6), text_encoder="none")
    before = content(cache)
    run(networks["beit3-pair"], data, cache, targets=("cls",))
    after = content(cache)
    assert {path: after[path] for path in before} == before
    field = Cache.open(cache).field(FIELDS[0])
    opened, network = Cache.open(cache), load_saved(networks["beit3-pair"])
    assert opened.segments[0].views.name == "crop-0.5-0.6-seed-0"
    line = lines_of(opened)[int(field.rows("train")[0])]
    found = decoded(opened, data, line)
    assert found is not None
    expected = alone(network, found[0], line["caption"])["cls"]
    np.testing.assert_allclose(field.values(np.array([line["text_row"]]))[0], expected, atol=1e-4)


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_fields_from_crops_are_byte_for_byte_those_from_tars(
    networks: dict[str, Path], data: Path, tmp_path: Path, storage: str
) -> None:
    texts = {"text_encoder": str(networks["beit3-text"])}
    for name in ("tars", "crops"):
        run(networks["beit3"], data, tmp_path / name, targets=("cls",), store_inputs="crops", **texts)
    run(networks["beit3-pair"], data, tmp_path / "tars", storage=storage, **texts)
    more = {"storage": storage, "from_crops": True, "size": None} | texts
    asked = dataclasses.replace(
        config(networks["beit3-pair"], "", tmp_path / "crops", **(more | {"from_crops": False}))
    )
    lines: list[str] = []
    extract(dataclasses.replace(asked, data=(), from_crops=True), lines.append)
    assert "pictures come from image/crops-20, no tar is read" in lines[0] or any("image/crops-20" in x for x in lines)
    made_of_tars, made_of_crops = content(tmp_path / "tars"), content(tmp_path / "crops")
    assert {p for p in made_of_tars if "models" not in p} == {p for p in made_of_crops if "models" not in p}
    for path, one in made_of_tars.items():
        if "/receipts/" in path or "/c." in path:
            assert made_of_crops[path] == one, path
    assert digest(tmp_path / "tars") == digest(tmp_path / "crops")
    asked_sample = SampleConfig(rows=5, teacher=(str(networks["beit3-pair"]),), data=(), device="cpu")
    require_agreement(check_sample(tmp_path / "crops", asked_sample, load_teachers(tmp_path / "crops", asked_sample)))


def test_a_run_from_crops_that_lacks_those_of_its_captions_is_refused(
    networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    run(networks["beit3"], data, cache, targets=("cls",), store_inputs="crops", text_encoder="none")
    (cache / "_emkum/receipts/image/crops-20/000001-0.json").unlink()
    asked = config(networks["beit3-pair"], "", cache, size=None, targets=("cls",))
    with pytest.raises(IncompleteCache, match=r"lacks image/crops-20 of 1 of the 2 blocks .*first block 1 view 0"):
        extract(dataclasses.replace(asked, data=(), from_crops=True), lambda line: None)


def test_without_crops_the_command_that_makes_them_is_named(
    networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    run(networks["beit3-pair"], data, tmp_path / "cache", targets=("cls",))
    asked = config(networks["beit3-pair"], "", tmp_path / "cache", size=None, targets=("mean",))
    with pytest.raises(MissingField, match="keeps no crops to extract from") as error:
        extract(dataclasses.replace(asked, data=(), from_crops=True), lambda line: None)
    assert "--encoder <network> --store-inputs crops" in error.value.way_out
    assert "--text-encoder" not in error.value.way_out  # a network of pairs made the ids, and is none


# --- what has no row ------------------------------------------------------------------------------------------------


def test_captions_without_a_usable_picture_are_quarantined_in_fields_of_pairs_alone(
    made: dict[str, tuple[Path, list[str]]],
) -> None:
    cache = Cache.open(made["beit3-pair"][0])
    found = left_out(cache)
    assert {(one.key, one.tar, one.space) for one in found} == {(f"p{i:02d}", "a.tar", "text") for i in (*ALONE, *BAD)}
    assert {one.fields for one in found} == {tuple(sorted(FIELDS))}
    reasons = {one.key: one.reason for one in found}
    assert {reasons[f"p{i:02d}"] for i in ALONE} == {NO_PICTURE}
    assert all(reasons[f"p{i:02d}"].startswith("its picture cannot be used: ") for i in BAD)
    assert len(found) == 10


def test_max_bad_counts_broken_pictures_and_not_captions_that_never_had_one(
    networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    with pytest.raises(TooManyBadSamples, match=r"of 36 captions cannot be used, --max-bad 0\.01 allows 0") as error:
        run(networks["beit3-pair"], data, tmp_path / "a", max_bad=0.01)
    assert "its picture cannot be used" in error.value.what
    assert NO_PICTURE not in error.value.what
    only = pairs_tar(tmp_path / "only.tar", 16, alone=(1, 2, 3, 5, 6, 7))
    lines = run(networks["beit3-pair"], only, tmp_path / "b", max_bad=0.0)
    assert any(line.startswith("12 of 24 captions have no picture") for line in lines)
    again = run(networks["beit3-pair"], only, tmp_path / "b", max_bad=0.0, targets=(*TARGETS[:1],))
    assert again[-1].startswith("nothing to do")  # receipts are not counted either


def test_a_batch_without_any_picture_and_a_block_of_them(networks: dict[str, Path], tmp_path: Path) -> None:
    members = {f"t{i:02d}.txt": caption(i).encode() for i in range(20)}
    members |= {"u.jpg": jpeg(3), "u.txt": b"a dog runs"}
    tar = write_tar(tmp_path / "texts.tar", members)
    for storage in ("float16", "int8"):
        run(networks["vlmo-pair"], tar, tmp_path / storage, storage=storage, batch_size=4)
        cache = Cache.open(tmp_path / storage)
        for name in fields_of("vlmo-pair"):
            assert cache.field(name).rows("train").tolist() == [20]
        assert not verify_store(open_store(tmp_path / storage)).findings


def test_a_row_that_overflows_is_quarantined_where_it_lies(
    networks: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, calls = PairPass.pairs, []

    def overflowing(self: PairPass, crops: Any, ids: Any, mask: Any, wanted: Any = None) -> Any:
        outputs = true(self, crops, ids, mask, wanted)
        if len(calls) == 1:  # captions 12 to 14; 10 and 11, before them in the batch, have a broken picture
            outputs[0] = outputs[0].clone()
            outputs[0][1] = torch.inf
        calls.append(len(ids))
        return outputs

    monkeypatch.setattr(PairPass, "pairs", overflowing)
    with pytest.raises(NonFiniteFeature, match=r"teacher/beit3-pair/pair/cls, sample a\.tar/p10"):
        run(networks["beit3-pair"], data, tmp_path / "stop")
    calls.clear()
    run(networks["beit3-pair"], data, tmp_path / "cache", on_nonfinite="quarantine")
    cache = Cache.open(tmp_path / "cache")
    cls, mean = (cache.field(name).rows("train").tolist() for name in FIELDS[:2])
    assert sorted(set(mean) - set(cls)) == [13]
    assert lines_of(cache)[13]["key"] == "p10"


# --- the same bytes -------------------------------------------------------------------------------------------------


def test_two_workers_make_what_one_process_makes(
    made: dict[str, tuple[Path, list[str]]], networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    run(networks["beit3-pair"], data, tmp_path / "cache", workers=2)
    assert digest(tmp_path / "cache") == digest(made["beit3-pair"][0])


def test_another_target_and_more_tars_later_compute_only_that(
    networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    run(networks["beit3-pair"], data / "a.tar", cache, targets=("cls",))
    before = content(cache)
    lines = run(networks["beit3-pair"], data / "a.tar", cache, targets=("cls", "layers"))
    assert any("16 committed rows computed again agree with the cache" in line for line in lines), lines
    after = content(cache)
    assert {path: after[path] for path in before} == before
    run(networks["beit3-pair"], data, cache, targets=("cls", "layers"))
    more = content(cache)
    assert all(more[path] == one for path, one in after.items() if "receipts" in path or "/c." in path)
    assert Cache.open(cache).field(FIELDS[2]).rows("train").tolist()[-12:] == list(range(32, 44))


def test_an_interrupted_run_is_continued_to_the_same_bytes(
    made: dict[str, tuple[Path, list[str]]],
    networks: dict[str, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true, calls = PairPass.pairs, []

    def limited(self: PairPass, *inputs: Any) -> Any:
        calls.append(1)
        if len(calls) > 5:
            raise Interrupted("stopped")
        return true(self, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(PairPass, "pairs", limited)
        with pytest.raises(Interrupted):
            run(networks["beit3-pair"], data, tmp_path / "cache")
    committed = {path for path in content(tmp_path / "cache") if "receipts" in path}
    assert 0 < len(committed) < 15
    run(networks["beit3-pair"], data, tmp_path / "cache")
    assert content(tmp_path / "cache") == content(made["beit3-pair"][0])


def start(teacher: Path, tar: Path, cache: Path) -> Running:
    options = {"--teacher": teacher, "--data": tar, "--cache": cache, "--targets": "cls,layers", "--size": SIZE}
    options |= {"--storage": "float32", "--compute": "float32", "--rows-per-block": 16, "--max-tokens": POSITIONS}
    options |= {"--device": "cpu", "--threads": 1, "--batch-size": 1}
    words = [str(word) for option in options.items() for word in option]
    log = cache.with_name(f"{cache.name}-{time.monotonic_ns()}.log")
    with log.open("wb") as handle:
        process = subprocess.Popen(
            [sys.executable, "-m", "emkum.cli", "extract", *words],
            stdout=handle,
            stderr=handle,
            start_new_session=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    return Running(process, log)


def test_a_killed_run_is_continued_to_the_same_bytes(networks: dict[str, Path], tmp_path: Path) -> None:
    tar = pairs_tar(tmp_path / "k.tar", 120, alone=(2, 3, 40))
    through = start(networks["beit3-pair"], tar, tmp_path / "through")
    assert through.wait() == 0, through.text()
    killed = tmp_path / "killed"
    running = start(networks["beit3-pair"], tar, killed)

    def receipts() -> int:
        return len(list((killed / "_emkum/receipts").rglob("*.json")))

    assert running.wait_for(lambda: receipts() >= 1), running.text()
    running.kill()
    assert 1 <= receipts() < 36
    again = start(networks["beit3-pair"], tar, killed)
    assert again.wait() == 0, again.text()
    assert content(killed) == content(tmp_path / "through")
    assert not verify_store(open_store(killed)).findings


# --- refusals -------------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_with_both_values(cache: Path, networks: dict[str, Path], data: Path) -> None:
    teacher, before = networks["beit3-pair"], content(cache)
    with pytest.raises(FingerprintMismatch, match="crop size 20 in the cache, 24 asked for"):
        run(teacher, data, cache, size=24)
    with pytest.raises(IdentityMismatch, match=r"views crop-0\.9-1\.0-seed-0; this run asks for crop-0\.5-0\.6"):
        run(teacher, data, cache, crop=(0.5, 0.6))
    with pytest.raises(FingerprintMismatch, match="text positions 32 in the cache, 16 asked for"):
        run(teacher, data, cache, max_tokens=16)
    with pytest.raises(FingerprintMismatch, match=r"rule of layers None in the cache, .*last 1") as error:
        run(teacher, data, cache, layers="last=1")
    assert "--layers thesis" in error.value.way_out
    assert content(cache) == before


def test_rows_that_would_come_out_otherwise_are_noticed(
    networks: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(networks["beit3-pair"], data, tmp_path / "cache", targets=("cls",))
    true = pictures.decode_view

    def mirrored(*arguments: Any) -> Any:
        crop, box = true(*arguments)
        return crop[:, ::-1].copy(), box

    monkeypatch.setattr(pictures, "decode_view", mirrored)
    with pytest.raises(IdentityMismatch, match=r"field teacher/beit3-pair/pair/cls, row .* comparisons disagree"):
        run(networks["beit3-pair"], data, tmp_path / "cache", targets=("cls", "mean"))


def test_what_a_teacher_of_pairs_cannot_do_is_said(networks: dict[str, Path], data: Path, tmp_path: Path) -> None:
    teacher = networks["beit3-pair"]
    with pytest.raises(UsageError, match="--targets logits of beit3-pair, which reads a caption with its picture") as u:
        run(teacher, data, tmp_path / "a", targets=("logits",))
    assert u.value.way_out == "choose from cls, mean, layers, patches"
    texts = write_tar(tmp_path / "texts.tar", {"a.txt": b"a dog"})
    with pytest.raises(NoData, match="beit3-pair reads captions with their pictures and the data has no pictures"):
        run(teacher, texts, tmp_path / "b")
    shown = write_tar(tmp_path / "shown.tar", {"a.jpg": jpeg(1)})
    with pytest.raises(MissingCaptions, match="beit3-pair reads captions with their pictures and the data has no capt"):
        run(teacher, shown, tmp_path / "c")
    apart = write_tar(tmp_path / "apart.tar", {"a.jpg": jpeg(1), "b.txt": b"a dog"})
    with pytest.raises(
        NoData, match="beit3-pair reads captions with their pictures; in the data no sample has both"
    ) as n:
        run(teacher, apart, tmp_path / "d")
    assert "the same key" in n.value.way_out
    with pytest.raises(UsageError, match="pictures of 22 x 22 px do not divide into patches of 4 px"):
        run(teacher, data, tmp_path / "e", size=22)
    with pytest.raises(UsageError, match="--max-tokens 48, and beit3-pair has 38 positions") as u:
        run(teacher, data, tmp_path / "f", max_tokens=48)
    assert u.value.way_out == "give at most 32"
    with pytest.raises(UsageError, match="vlmo-pair and text encoder beit3-text have different tokenizers"):
        run(networks["vlmo-pair"], data, tmp_path / "g", text_encoder=str(networks["beit3-text"]))
    with pytest.raises(UnsupportedNetwork, match="layers of beit3-pair, of whose pairs the text is kept, without CLS"):
        run(teacher, data, tmp_path / "h", layers="prefix=drop")
    with pytest.raises(UsageError, match=r"--encoder .*beit3-pair is a network of pairs") as u:
        run(networks["beit3"], data, tmp_path / "i", encoder=str(teacher))
    assert "a network that reads pictures" in u.value.way_out
    with pytest.raises(UsageError, match=r"--text-encoder .*beit3-pair is a network of pairs"):
        run(networks["beit3"], data, tmp_path / "j", text_encoder=str(teacher))
    with pytest.raises(RefusedTeacher, match=r"--text-free: .*beit3-pair learned from pictures with captions"):
        run(teacher, data, tmp_path / "k", text_free=True)
    with pytest.raises(UnsupportedNetwork, match="target logits of beit3-pair, which reads a caption with its picture"):
        PairPass([load_saved(teacher)], [Wanted("beit3-pair", "logits")], "float32", "cpu")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_the_rule_of_layers_is_followed_over_the_text_alone(
    networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    run(networks["beit3-pair"], data, tmp_path / "cache", targets=("layers", "patches"), layers="last=1,norm=layer")
    cache = Cache.open(tmp_path / "cache")
    field = cache.field(FIELDS[2])
    assert field.fingerprint["layers"] == LayersRule("block", 1, 0, "layer").to_json()
    network = load_saved(networks["beit3-pair"])
    backbone: object = network.backbone
    assert isinstance(backbone, Multiway)
    assert network.tokenizer is not None
    line = lines_of(cache)[int(field.rows("train")[0])]
    found = decoded(cache, data, line)
    assert found is not None
    ids, length = text_ids(network.tokenizer, [line["caption"]], POSITIONS)
    tokens, layout = backbone.embed(
        normalise(network, torch.from_numpy(found[0])[None]), torch.from_numpy(ids[:, : length[0]])
    )
    last = backbone.run(tokens, layout).hidden[-1][0, layout.num_image :]
    expected = torch.nn.functional.layer_norm(last, last.shape[-1:]).numpy()
    np.testing.assert_allclose(field.values(np.array([line["text_row"]]))[0][: length[0]], expected, atol=1e-4)


def test_a_run_that_writes_a_students_pictures_says_whose_ids_they_go_with(
    networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    asked = config(networks["beit3-pair"], data, tmp_path / "cache", encoder=str(networks["beit3"]), targets=("cls",))
    lines: list[str] = []
    extract(asked, lines.append)
    assert "  text/beit3-pair/ids: no student's text side starts from beit3-pair: name a --text-encoder for it" in lines
    assert "image/beit3@0/tokens" in Cache.open(tmp_path / "cache").fields
