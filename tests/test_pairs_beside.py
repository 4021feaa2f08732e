"""A teacher of pairs beside what a cache holds: whose ids it reads, what it is measured on, what is refused."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from emkum.errors import IdentityMismatch, MissingField, NoData, SourceChanged, UsageError
from emkum.models.network import load_saved, save_network
from emkum.models.pair_pass import PairPass
from emkum.models.passes import Wanted
from emkum.shards.reader import Cache
from emkum.shards.store import open_store
from emkum.shards.verify import verify as verify_store
from emkum.stage1_extract import statistics as int8_statistics
from emkum.stage1_extract.extract import extract
from emkum.stage1_extract.live_check import SampleConfig, check_sample, load_teachers, require_agreement
from emkum.stage2_train.plan import make_plan
from emkum.stage2_train.recipe import load_recipe
from emkum.stage2_train.recipe_fields import required_fields
from emkum.stage2_train.train import TrainConfig
from tests.extraction import content
from tests.pair_files import caption, jpeg, pairs_tar, save_pairs
from tests.sound_files import write_tar
from tests.test_extract_pairs import ALONE, BAD, FIELDS, config, run

OWN, OTHERS = "text/beit3-pair/ids", "text/beit3-text/ids"


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pairs(tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.tar: 24 captions of 16 samples, 6 without a picture and 4 of broken ones; b.tar: 12 of 8."""
    folder = tmp_path_factory.mktemp("data")
    pairs_tar(folder / "a.tar", 16, alone=ALONE, bad=BAD)
    pairs_tar(folder / "b.tar", 8, seed=50)
    return folder


def files(cache: Path) -> set[str]:
    return {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}


def from_crops(networks: dict[str, Path], cache: Path, **changes: Any) -> None:
    asked = config(networks["beit3-pair"], "", cache, size=None, **changes)
    extract(dataclasses.replace(asked, data=(), from_crops=True), lambda line: None)


@pytest.fixture
def beside(networks: dict[str, Path], data: Path, tmp_path: Path) -> Path:
    """The cache of an image teacher and a text encoder on a.tar."""
    cache = tmp_path / "cache"
    texts = {"text_encoder": str(networks["beit3-text"])}
    run(networks["beit3"], data / "a.tar", cache, targets=("cls",), **texts)
    return cache


# --- whose ids ------------------------------------------------------------------------------------------------------


def test_a_teacher_of_pairs_goes_on_with_the_ids_of_a_text_encoder(
    beside: Path, networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    before = content(beside)
    lines = run(networks["beit3-pair"], data / "a.tar", beside, targets=("cls",))
    after = content(beside)
    assert {path: after[path] for path in before} == before
    assert not any("beit3-pair/" in path for path in after if "models" in path)
    assert not any("the cache keeps the network" in line for line in lines)
    cache = Cache.open(beside)
    assert [name for name in cache.fields if name.startswith("text/")] == [OTHERS]
    assert required_fields(load_recipe("ssmke"), cache).ids == OTHERS
    run(networks["beit3-pair"], data, beside, targets=("cls",))  # b.tar has ids now, too
    cache = Cache.open(beside)
    assert cache.models == ["beit3", "beit3-text"]
    assert len(cache.field(OTHERS).rows("train")) == 36
    asked = SampleConfig(rows=9, teacher=(str(networks["beit3-pair"]),), device="cpu")
    require_agreement(check_sample(beside, asked, load_teachers(beside, asked)))
    assert len(cache.field(FIELDS[0]).rows("train")) == 26
    assert not verify_store(open_store(beside)).findings
    run(networks["beit3-pair"], data / "a.tar", tmp_path / "alone", targets=("cls",))
    alone = Cache.open(tmp_path / "alone")
    for name in (FIELDS[0], OTHERS):  # what it would have made of a.tar without them
        other = alone.field(name.replace(OTHERS, OWN))
        rows = other.rows("train")
        np.testing.assert_array_equal(cache.field(name).values(rows), other.values(rows))


def test_a_tokenizer_of_other_bytes_that_gives_the_same_ids_is_the_same(
    networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    text, cache = load_saved(networks["beit3-text"]), tmp_path / "cache"
    assert text.tokenizer is not None
    laid_out = json.dumps(json.loads(text.tokenizer), indent=3).encode()
    assert laid_out != text.tokenizer
    save_network(dataclasses.replace(text, name="other", tokenizer=laid_out), tmp_path / "other")
    run(networks["beit3"], data, cache, targets=("cls",), text_encoder=str(tmp_path / "other"))
    for targets in (("cls",), ("cls", "layers")):
        run(networks["beit3-pair"], data, cache, targets=targets)
        fields = Cache.open(cache).fields
        assert [name for name in fields if name.startswith("text/")] == ["text/other/ids"]
        assert fields[FIELDS[0]].fingerprint["tokenizer"] == fields["text/other/ids"].fingerprint["tokenizer"]
    run(networks["beit3"], data, cache, targets=("cls",), text_encoder=str(networks["beit3-text"]))
    again = run(networks["beit3-pair"], data, cache, targets=("cls", "layers"))
    assert again[-1].endswith(f"holds every block of text/other/ids, {FIELDS[0]}, {FIELDS[2]}")


def test_ids_of_other_lengths_or_tokenizers_are_not_gone_on_with(
    networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    texts = {"text_encoder": str(networks["beit3-text"])}
    run(networks["beit3"], data, tmp_path / "cache", targets=("cls",), max_tokens=16, **texts)
    for name in ("beit3-pair", "vlmo-pair"):
        lines = run(networks[name], data, tmp_path / "cache", targets=("cls",))
        (kept,) = (line for line in lines if "the cache keeps the network" in line)
        assert kept.startswith(f"  the cache keeps the network {name}, whose tokenizer makes the ids, whole: ")
    cache = Cache.open(tmp_path / "cache")
    ids = [name for name in cache.fields if name.startswith("text/")]
    assert ids == [OWN, OTHERS, "text/vlmo-pair/ids"]
    assert required_fields(load_recipe("ssmke"), cache).ids == OTHERS


def test_a_cache_that_had_ids_of_its_own_goes_on_with_them(
    networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "cache"
    run(networks["beit3-pair"], data / "a.tar", alone, targets=("cls",))
    run(networks["beit3"], data / "a.tar", alone, targets=("cls",), text_encoder=str(networks["beit3-text"]))
    before = content(alone)
    lines = run(networks["beit3-pair"], data / "a.tar", alone, targets=("cls",))
    assert lines[-1].endswith(f"holds every block of {OWN}, {FIELDS[0]}")
    assert content(alone) == before


def test_training_that_finds_ids_of_pairs_alone_names_the_flag(
    networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    cache, encoder = tmp_path / "cache", {"encoder": str(networks["beit3"])}
    lines = run(networks["beit3-pair"], data, cache, targets=("cls",), **encoder)
    assert not any("emkum train" in line for line in lines)
    lines = run(networks["beit3"], data, cache, targets=("cls",), text_encoder="none")
    assert not any("emkum train" in line for line in lines)
    with pytest.raises(UsageError, match=r"beit3-pair is a network of pairs, .*: no student can start from") as error:
        make_plan(TrainConfig(cache, "ssmke", ("training.batch=4",), tmp_path / "run", device="cpu"), None)
    assert "--text-encoder" in error.value.way_out
    lines = run(networks["beit3"], data, cache, targets=("cls",), text_encoder=str(networks["beit3-text"]))
    assert lines[-1] == f"next: emkum train --cache {cache}"
    assert required_fields(load_recipe("ssmke"), Cache.open(cache)).ids == OTHERS


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_refused_run_leaves_nothing_in_the_cache(beside: Path, networks: dict[str, Path], data: Path) -> None:
    before = files(beside)
    for changes in ({}, {"max_tokens": 16}):  # ids of 16 positions would be its own
        with pytest.raises(IdentityMismatch, match=r"this run asks for crop-0\.3-0\.4") as error:
            run(networks["beit3-pair"], data / "a.tar", beside, targets=("cls",), crop=(0.3, 0.4), **changes)
        assert error.value.exit_code == 5
    assert files(beside) == before


def test_a_run_that_lacks_a_tar_of_its_segment_leaves_nothing(networks: dict[str, Path], tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    pairs_tar(tars / "a.tar", 8)
    pairs_tar(tars / "b.tar", 8, seed=9)
    run(networks["beit3"], tars, tmp_path / "cache", targets=("cls",), text_encoder="none")
    before = files(tmp_path / "cache")
    (tars / "b.tar").unlink()
    with pytest.raises(SourceChanged, match=r"b\.tar, part of segment 0, is not at"):
        run(networks["beit3-pair"], tars / "a.tar", tmp_path / "cache", targets=("cls",))
    assert files(tmp_path / "cache") == before


def test_a_tar_of_another_split_is_named(beside: Path, networks: dict[str, Path], data: Path) -> None:
    before = files(beside)
    for teacher in ("beit3", "beit3-pair"):
        with pytest.raises(IdentityMismatch, match=r"a\.tar is in the cache as split '?train") as error:
            run(networks[teacher], data / "a.tar", beside, targets=("cls",), split="val", text_encoder="none")
        assert error.value.exit_code == 5
    assert files(beside) == before


def test_pictures_and_captions_of_different_samples_are_no_pairs_in_a_segment_either(
    networks: dict[str, Path], tmp_path: Path
) -> None:
    members = {f"p{i}.jpg": jpeg(i) for i in range(4)} | {f"t{i}.txt": caption(i).encode() for i in range(4)}
    tar, cache = write_tar(tmp_path / "apart.tar", members), tmp_path / "cache"
    texts = {"text_encoder": str(networks["beit3-text"]), "store_inputs": "crops"}
    run(networks["beit3"], tar, cache, targets=("cls",), **texts)
    before = files(cache)
    with pytest.raises(NoData, match="in the data no sample has both"):
        run(networks["beit3-pair"], tar, cache, targets=("cls",))
    with pytest.raises(NoData, match="in the data no sample has both"):
        from_crops(networks, cache, targets=("cls",))
    assert files(cache) == before


def test_teachers_with_different_tokenizers_are_extracted_apart(
    networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    for first, second in (("beit3-text", "vlmo-pair"), ("vlmo-pair", "beit3-pair")):
        asked = config(networks[first], data, tmp_path / "cache", targets=("cls",))
        both = dataclasses.replace(asked, teacher=(str(networks[first]), str(networks[second])))
        with pytest.raises(UsageError, match=f"teachers {first} and {second} have different tokenizers: they") as error:
            extract(both, lambda line: None)
        assert error.value.way_out == "extract them in two commands"
    for name in ("beit3-text", "vlmo-pair", "beit3-pair"):
        run(networks[name], data, tmp_path / "cache", targets=("cls",))
    ids = [name for name in Cache.open(tmp_path / "cache").fields if name.startswith("text/")]
    assert ids == [OTHERS, "text/vlmo-pair/ids"]


def test_commands_that_are_named_leave_out_a_network_of_pairs_as_text_encoder(
    networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    run(networks["beit3-pair"], data, cache, targets=("cls",), encoder=str(networks["beit3"]))
    with pytest.raises(MissingField, match="needs a teacher's cls targets") as missing:
        required_fields(load_recipe("ssmke"), Cache.open(cache))
    with pytest.raises(MissingField, match="keeps no crops") as crops:
        from_crops(networks, cache, targets=("mean",))
    for error in (missing, crops):
        assert "--text-encoder" not in error.value.way_out
    run(networks["beit3"], data, cache, targets=("mean",), text_encoder=str(networks["beit3-text"]))
    with pytest.raises(MissingField) as missing:
        required_fields(load_recipe("ssmke"), Cache.open(cache))
    with pytest.raises(MissingField) as crops:
        from_crops(networks, cache, targets=("mean",))
    source = Cache.open(cache).field(OTHERS).record["environment"]["source"]
    for error in (missing, crops):
        assert error.value.way_out.count("--text-encoder") == 1
        assert f"--text-encoder {source}" in error.value.way_out


def test_a_tar_written_again_at_the_same_size_is_noticed(networks: dict[str, Path], tmp_path: Path) -> None:
    """The pictures are the same bytes at the same places, under other keys."""
    tar, cache = pairs_tar(tmp_path / "a.tar", 8), tmp_path / "cache"
    run(networks["beit3-pair"], tar, cache, targets=("cls",))
    with tarfile.open(tar) as old:
        members = {m.name: found.read() for m in old.getmembers() if (found := old.extractfile(m)) is not None}
    size = tar.stat().st_size
    write_tar(tar, {name.replace("p", "q", 1): found for name, found in members.items()})
    assert tar.stat().st_size == size
    asked = SampleConfig(rows=100, teacher=(str(networks["beit3-pair"]),), device="cpu")
    with pytest.raises(SourceChanged, match=r"a\.tar holds 'q0\d\.jpg' .*the cache was made from 'p0\d'"):
        check_sample(cache, asked, load_teachers(cache, asked))


# --- int8 -----------------------------------------------------------------------------------------------------------


def statistics_of(cache: Path, field: str) -> dict[str, np.ndarray]:
    group = zarr.open_group(cache / field, mode="r")
    return {which: np.asarray(group[which]) for which in ("mean", "std")}


def test_int8_statistics_of_pairs_come_from_the_train_split_while_it_is_at_hand(
    networks: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    said = "int8 statistics of pairs come from split val: no segment of train is at hand"
    small = {"storage": "int8", "targets": ("mean",)}
    assert said in run(networks["beit3-pair"], data / "b.tar", tmp_path / "val", split="val", **small)
    run(networks["beit3-pair"], data / "a.tar", tmp_path / "both", targets=("cls",))
    assert said not in run(networks["beit3-pair"], data / "b.tar", tmp_path / "both", split="val", **small)
    run(networks["beit3-pair"], data / "a.tar", tmp_path / "train", **small)
    val, both, train = (statistics_of(tmp_path / name, FIELDS[1]) for name in ("val", "both", "train"))
    for which, expected in train.items():
        np.testing.assert_array_equal(both[which], expected)
        assert not np.array_equal(val[which], expected)


def test_int8_statistics_of_pairs_come_from_captions_spread_over_the_segment(
    networks: dict[str, Path], tmp_path: Path
) -> None:
    """Of 60 pairs 48, in three stretches of 16: the first, the middle and the last."""
    tar = pairs_tar(tmp_path / "a.tar", 40, alone=(3, 21))
    for storage in ("float32", "int8"):
        run(networks["beit3-pair"], tar, tmp_path / storage, storage=storage, targets=("cls",))
    exact = Cache.open(tmp_path / "float32").field(FIELDS[0])
    rows = exact.rows("train")
    assert len(rows) == 56
    chosen = np.concatenate([rows[first : first + 16] for first in (0, 20, 40)])
    expected = exact.values(chosen).astype(np.float64)
    found = statistics_of(tmp_path / "int8", FIELDS[0])
    np.testing.assert_allclose(found["mean"], expected.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found["std"], expected.std(axis=0), atol=1e-4)


def test_captions_between_two_pairs_are_not_cut_into_tokens_to_measure_pairs(
    networks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members: dict[str, bytes] = {"a.jpg": jpeg(1), "a.txt": b"a dog runs"}
    members |= {f"t{i:03d}.txt": caption(i).encode() for i in range(100)}
    members |= {"z.jpg": jpeg(2), "z.txt": b"the cat"}
    true, seen = int8_statistics.text_ids, []

    def watching(tokenizer: bytes, texts: list[str], max_tokens: int) -> Any:
        seen.append(texts)
        return true(tokenizer, texts, max_tokens)

    monkeypatch.setattr(int8_statistics, "text_ids", watching)
    tar = write_tar(tmp_path / "a.tar", members)
    run(networks["beit3-pair"], tar, tmp_path / "cache", storage="int8", targets=("cls",))
    assert len(seen) == 2
    assert (seen[0][0], seen[1][-1]) == ("a dog runs", "the cat")


# --- the pass -------------------------------------------------------------------------------------------------------


def test_a_pass_is_narrowed_to_what_is_missing(networks: dict[str, Path]) -> None:
    both = [load_saved(networks[name]) for name in ("beit3-pair", "vlmo-pair")]
    wanted = [Wanted("beit3-pair", "cls"), Wanted("beit3-pair", "mean"), Wanted("vlmo-pair", "cls")]
    whole = PairPass(both, wanted, "float32", "cpu")
    assert whole.only(wanted[::-1]) is whole
    assert whole.only([]) is None
    part = whole.only([wanted[1], Wanted("vlmo-pair", "mean")])
    assert part is not None
    assert (part.wanted, list(part.networks)) == ((wanted[1],), ["beit3-pair"])
