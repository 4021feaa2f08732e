"""Evaluating a student: label retrieval, text pairs, and whole runs from cache, tars, pictures and texts."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_cache import make_cache, tiny_network
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import emkum.cli as cli
from emkum.errors import (
    BadPicture,
    FingerprintMismatch,
    IncompleteCache,
    InputDataError,
    MissingCaptions,
    NoData,
    NonFiniteFeature,
    TooManyBadSamples,
    UsageError,
)
from emkum.models.network import load_saved, normalise, save_network
from emkum.models.passes import FrozenPass
from emkum.shards.reader import Cache
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.extract import extract
from emkum.stage2_train import validation
from emkum.stage2_train.evaluate import run as run_module
from emkum.stage2_train.evaluate.contestants import Contestants
from emkum.stage2_train.evaluate.encode import Settings
from emkum.stage2_train.evaluate.pictures import label_retrieval, labelled_sets, read_labelled
from emkum.stage2_train.evaluate.results import (
    BEFORE,
    ENCODER,
    STUDENT,
    TEACHER,
    merge_results,
    refuse_equal_names,
    table,
    write_results,
)
from emkum.stage2_train.evaluate.retrieval import image_text_retrieval
from emkum.stage2_train.evaluate.run import (
    cache_features,
    evaluate_cache,
    evaluate_pictures,
    evaluate_tars,
    evaluate_texts,
)
from emkum.stage2_train.evaluate.texts import TextPairs, read_text_pairs, text_pair_retrieval
from emkum.stage2_train.run_folder import LoadedRun, load_run
from emkum.stage2_train.train import TrainConfig, train

# --- label retrieval -------------------------------------------------------------------------------------


def naive_top(bank: np.ndarray, bank_labels: list[int], query: np.ndarray, label: int, k: int) -> bool:
    """Any of the k nearest has the label; features without ties."""
    cosines = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
    return label in [bank_labels[i] for i in np.argsort(-cosines)[:k]]


def test_label_retrieval_equals_plain_nearest_neighbours_both_ways() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(7, 6))
    bank_labels, query_labels = rng.integers(7, size=60), rng.integers(7, size=25)
    bank = centres[bank_labels] + rng.normal(size=(60, 6))
    queries = centres[query_labels] + rng.normal(size=(25, 6))
    result = label_retrieval(bank, bank_labels, queries, query_labels)
    for k in (1, 3):
        there = [naive_top(bank, bank_labels.tolist(), q, y, k) for q, y in zip(queries, query_labels, strict=True)]
        back = [naive_top(queries, query_labels.tolist(), q, y, k) for q, y in zip(bank, bank_labels, strict=True)]
        assert result["test_to_train"][f"top-{k}"] == pytest.approx(100 * np.mean(there))
        assert result["train_to_test"][f"top-{k}"] == pytest.approx(100 * np.mean(back))
    numbers = [*result["test_to_train"].values(), *result["train_to_test"].values()]
    assert result["mean"] == pytest.approx(np.mean(numbers))


def test_top_3_is_any_of_three_not_a_vote() -> None:
    angles = np.array([0.1, 0.2, 0.3, 3.0])
    bank = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    result = label_retrieval(bank, np.array([1, 1, 0, 0]), np.array([[1.0, 0.0]]), np.array([0]))
    assert result["test_to_train"] == {"top-1": 0.0, "top-3": 100.0}


def test_chance_of_balanced_classes_is_the_published_one() -> None:
    # CIFAR-10 as published: 10 % and 27 % for k = 1 and 3.
    labels = np.repeat(np.arange(10), 500)
    result = label_retrieval(np.ones((5000, 2)), labels, np.ones((10, 2)), np.arange(10))
    assert result["chance"]["test_to_train"] == pytest.approx({"top-1": 10.0, "top-3": 27.1}, abs=0.05)
    # One query of each class: the bank looks for its one right picture of ten.
    assert result["chance"]["train_to_test"] == pytest.approx({"top-1": 10.0, "top-3": 30.0})
    assert result["mean"] == 0.0  # all features equal: worst, not best


def test_chance_follows_the_class_distribution() -> None:
    result = label_retrieval(np.eye(4), np.array([0, 0, 0, 1]), np.eye(4)[:2], np.array([0, 2]))
    # Query 0 has 3 of 4 right, query 1 none.
    assert result["chance"]["test_to_train"] == pytest.approx({"top-1": 37.5, "top-3": 50.0})


def test_label_retrieval_refuses_nan_and_nothing() -> None:
    with pytest.raises(NonFiniteFeature, match="query feature 0 of 1"):
        label_retrieval(np.ones((2, 2)), np.zeros(2, int), np.full((1, 2), np.nan), np.zeros(1, int))
    with pytest.raises(InputDataError, match="between no pictures"):
        label_retrieval(np.ones((0, 2)), np.zeros(0, int), np.ones((1, 2)), np.zeros(1, int))
    with pytest.raises(ValueError, match="one label for each"):
        label_retrieval(np.ones((2, 2)), np.zeros(1, int), np.ones((1, 2)), np.zeros(1, int))


# --- labelled pictures -----------------------------------------------------------------------------------


def write_npz(path: Path, **changes: np.ndarray) -> Path:
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(256, size=(6, 8, 8, 3), dtype=np.uint8),
        "y_train": np.arange(6) % 3,
        "x_test": rng.integers(256, size=(4, 8, 8, 3), dtype=np.uint8),
        "y_test": np.arange(4) % 3,
    } | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_an_npz_is_read_and_resized_to_any_size(tmp_path: Path) -> None:
    pictures = read_labelled(write_npz(tmp_path / "tiny.npz"))
    assert (pictures.name, pictures.num_classes, len(pictures.bank), len(pictures.queries)) == ("tiny", 3, 6, 4)
    assert pictures.queries.labels.tolist() == [0, 1, 2, 0]
    with np.load(tmp_path / "tiny.npz") as arrays:
        assert (pictures.bank.crop(2, 8) == arrays["x_train"][2]).all()
    assert pictures.bank.crop(0, 28).shape == (28, 28, 3)


def test_of_a_wide_picture_the_centre_square_is_taken(tmp_path: Path) -> None:
    wide = np.zeros((1, 4, 12, 3), np.uint8)
    wide[:, :, 4:8] = 200
    path = write_npz(tmp_path / "wide.npz", x_train=wide, y_train=np.zeros(1, int))
    assert (read_labelled(path).bank.crop(0, 16) == 200).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": None, "y_test": None}, "lacks x_test, y_test; it holds x_train, y_train"),
        ({"x_train": np.zeros((6, 8, 8, 3), np.float32)}, r"x_train of .* is float32 \[6, 8, 8, 3\]"),
        ({"x_test": np.zeros((4, 8, 8), np.uint8)}, r"x_test of .* is uint8 \[4, 8, 8\]"),
        ({"y_test": np.arange(5)}, r"y_test of .* is int64 \[5\] for 4 pictures"),
        ({"y_train": np.linspace(0, 1, 6)}, r"y_train of .* is float64 \[6\]"),
        ({"y_train": np.array([{}] * 6)}, "cannot be read as an npz of plain arrays"),
    ],
)
def test_an_npz_of_another_kind_is_refused_naming_what_it_holds(
    tmp_path: Path, changes: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_labelled(write_npz(tmp_path / "odd.npz", **changes))
    assert "x_train" in caught.value.way_out


def test_a_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("this is no archive")
    with pytest.raises(UsageError, match="cannot be read as an npz"):
        read_labelled(tmp_path / "text.npz")
    (tmp_path / "torn.npz").write_bytes(write_npz(tmp_path / "whole.npz").read_bytes()[:700])
    with pytest.raises(UsageError, match="cannot be read as an npz"):
        read_labelled(tmp_path / "torn.npz")
    with pytest.raises(NoData, match="no file"):
        read_labelled(tmp_path / "absent.npz")


def png(colour: tuple[int, int, int], size: int = 12) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def labelled_tar(path: Path, labels: list[str], broken: int | None = None) -> Path:
    members = []
    for number, label in enumerate(labels):
        picture = b"no picture" if number == broken else png((10 * number, 0, 0))
        members += [(f"{number:03d}.png", picture), (f"{number:03d}.cls", label.encode())]
    return write_tar(path, members)


def test_two_labelled_tars_are_a_bank_and_queries_with_one_numbering(tmp_path: Path) -> None:
    bank = labelled_tar(tmp_path / "bank.tar", ["cat", "dog", "cat"], broken=1)
    queries = labelled_tar(tmp_path / "queries.tar", ["emu", "cat"])
    pictures = read_labelled(bank, queries)
    assert (pictures.name, pictures.num_classes) == ("bank", 3)
    assert pictures.bank.labels.tolist() == [0, 1, 0]
    assert pictures.queries.labels.tolist() == [2, 0]
    assert (pictures.bank.crop(2, 14) == (20, 0, 0)).all()
    with pytest.raises(BadPicture):
        pictures.bank.crop(1, 14)


def test_one_tar_alone_and_tars_without_labels_are_refused(tmp_path: Path) -> None:
    bank = labelled_tar(tmp_path / "bank.tar", ["cat", "dog"])
    bare = write_tar(tmp_path / "bare.tar", [("0.png", png((0, 0, 0))), ("1.png", png((0, 0, 0))), ("1.cls", b"cat")])
    with pytest.raises(UsageError, match="needs a bank and queries"):
        read_labelled(bank)
    with pytest.raises(UsageError, match=r"1 of 2 pictures in .*bare\.tar have no label, the first is '0'"):
        read_labelled(bank, bare)
    texts = write_tar(tmp_path / "texts.tar", [("0.txt", b"words")])
    with pytest.raises(NoData, match=r"no pictures in .*texts\.tar"):
        read_labelled(bank, texts)


def test_images_flags_are_grouped_into_sets(tmp_path: Path) -> None:
    npz = write_npz(tmp_path / "tiny.npz")
    bank = labelled_tar(tmp_path / "bank.tar", ["cat", "dog"])
    queries = labelled_tar(tmp_path / "queries.tar", ["cat"])
    assert [s.name for s in labelled_sets([npz, bank, queries, npz])] == ["tiny", "bank", "tiny"]
    with pytest.raises(UsageError, match="needs a bank and queries"):
        labelled_sets([npz, bank])
    with pytest.raises(UsageError, match="holds bank and queries"):
        read_labelled(npz, bank)


@pytest.mark.real
def test_the_published_chance_levels_of_the_real_sets(shared: Path) -> None:
    cifar10 = read_labelled(shared / "data" / "images" / "cifar10.npz")
    assert (len(cifar10.bank), len(cifar10.queries), cifar10.num_classes) == (5000, 1000, 10)
    crop = cifar10.queries.crop(0, 112)
    assert crop.shape == (112, 112, 3)
    assert crop.dtype == np.uint8


# --- text pairs ------------------------------------------------------------------------------------------

MRPC = (
    "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    '1\t1\t2\tHe said "no , and left .\tHe said no .\n'
    "0\t3\t4\ta\tb\n"
    '1\t5\t6\t"Yes" , she said .\t"Yes .\n'
)
QQP = (
    "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    '0\t1\t2\t"What is ""this""?"\tWhat is this?\t1\n'
    '1\t3\t4\t"What" is that?\t"a "b" c"\t1\n'
    "2\t5\t6\ta\tb\t0\n"
)


def test_mrpc_is_raw_and_only_positive_pairs_count(tmp_path: Path) -> None:
    path = tmp_path / "msr.txt"
    path.write_bytes(b"\xef\xbb\xbf" + MRPC.encode())
    pairs = read_text_pairs(path)
    assert pairs.name == "msr"
    assert pairs.a == ('He said "no , and left .', '"Yes" , she said .')
    assert pairs.b == ("He said no .", '"Yes .')


def test_qqp_cells_lose_their_csv_quotes_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "qqp.tsv"
    path.write_text(QQP.replace("\n", "\r\n"), encoding="utf-8", newline="")
    pairs = read_text_pairs(path)
    assert pairs.a == ('What is "this"?', '"What" is that?')
    assert pairs.b == ("What is this?", '"a "b" c"')


def test_at_most_the_first_pairs_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "long.tsv"
    path.write_text("sentence1\tsentence2\tlabel\n" + "".join(f"a{i}\tb{i}\t{i % 2}\n" for i in range(20)))
    assert read_text_pairs(path, max_pairs=3).a == ("a1", "a3", "a5")


def test_a_few_broken_lines_are_counted_and_many_are_refused(tmp_path: Path) -> None:
    header, line = "question1\tquestion2\tis_duplicate\n", "a\tb\t1\n"
    path = tmp_path / "qqp.tsv"
    path.write_text(header + line * 300 + "a question cut by\n" + "a line break\tb\t1\n" + "\n")
    pairs = read_text_pairs(path)
    assert (len(pairs), pairs.num_broken) == (301, 1)
    path.write_text(header + line * 3 + "a\tb\n")
    with pytest.raises(InputDataError, match=r"1 of 5 lines .* the first is line 5"):
        read_text_pairs(path)


def test_files_that_are_no_pairs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.tsv"
    with pytest.raises(NoData, match="no file"):
        read_text_pairs(path)
    for text in ("", "one\ttwo\nthree\tfour\n"):
        path.write_text(text)
        with pytest.raises(UsageError, match="which is no header known here"):
            read_text_pairs(path)
    path.write_text(MRPC.splitlines()[0] + "\n0\t1\t2\ta\tb\n")
    with pytest.raises(InputDataError, match="no positive pair"):
        read_text_pairs(path)
    path.write_bytes(MRPC.encode() + b"1\t1\t2\t\xff\xfe\tb\n")
    with pytest.raises(InputDataError, match="not UTF-8"):
        read_text_pairs(path)


def test_text_pairs_both_ways_strict_and_with_identical_texts() -> None:
    # Line 1 repeats line 0's second text: their features are equal, so they tie.
    a = np.array([[1.0, 0.0], [0.9, 0.2], [0.0, 1.0]])
    b = np.array([[1.0, 0.1], [1.0, 0.1], [0.1, 1.0]])
    result = text_pair_retrieval(a, b, ["p", "q", "r"], ["x", "x", "y"], ks=(1, 2))
    assert result["1_to_2"] == pytest.approx({"R@1": 100 / 3, "R@2": 100.0})
    assert result["same_text"]["1_to_2"] == {"R@1": 100.0, "R@2": 100.0}
    # Back, line 1 asks with the features of line 0 and finds line 0 first.
    assert result["2_to_1"] == pytest.approx({"R@1": 200 / 3, "R@2": 100.0})
    assert result["same_text"]["2_to_1"] == result["2_to_1"]
    assert result["mean"] == pytest.approx((100 / 3 + 200 / 3 + 200) / 4)
    assert result["chance"]["1_to_2"] == pytest.approx({"R@1": 100 / 3, "R@2": 200 / 3})


def test_text_pairs_of_equal_features_are_never_found() -> None:
    result = text_pair_retrieval(np.ones((40, 5)), np.ones((40, 5)))
    assert result["mean"] == 0.0
    assert "same_text" not in result


@pytest.mark.real
def test_the_real_files_hold_the_published_numbers_of_pairs(shared: Path) -> None:
    texts = shared / "data" / "text"
    assert len(read_text_pairs(texts / "msr_paraphrase_train.txt")) == 2753
    assert len(read_text_pairs(texts / "msr_paraphrase_test.txt")) == 1147
    qqp = read_text_pairs(texts / "qqp_dev.tsv")
    assert len(qqp) == 729
    assert qqp.num_broken == 0


# --- whole runs ------------------------------------------------------------------------------------------

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "red", "blue", "green", "square", "circle", "on", "left", "of", "big"]


def jpeg(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def pairs_tar(path: Path, num: int, seed: int, broken: tuple[int, ...] = (), captions: int = 2) -> Path:
    rng = np.random.default_rng(seed)
    members = []
    for number in range(num):
        lines = [" ".join(rng.choice(WORDS[4:], rng.integers(2, 9))) for _ in range(captions)]
        picture = jpeg(rng)
        members.append((f"{number:03d}.jpg", picture[:150] if number in broken else picture))
        if captions:
            members.append((f"{number:03d}.json", json.dumps({"captions": lines}).encode()))
    return write_tar(path, members)


def word_tokenizer() -> bytes:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer.to_str().encode()


@dataclass(frozen=True)
class World:
    """A cache of 24 + 12 random pictures made by stage 1 with tiny networks, and a run of each kind on it."""

    root: Path
    cache: Cache
    pairs: LoadedRun
    images: LoadedRun
    texts: LoadedRun


def extract_config(root: Path, split: str, cache: str = "cache") -> ExtractConfig:
    return ExtractConfig(
        teacher=(str(root / "vit"),),
        data=(str(root / f"{split}.tar"),),
        cache=root / cache,
        split=split,
        text_encoder=str(root / "bert"),
        targets=("cls", "layers"),
        cut=2,
        size=16,
        storage="float32",
        compute="float32",
        max_tokens=16,
        rows_per_block=16,
        device="cpu",
    )


def trained(root: Path, recipe: str, name: str, *overrides: str) -> LoadedRun:
    wanted = ("training.epochs=2", "training.batch=8", *overrides)
    run_dir = root / "runs" / name
    train(
        TrainConfig(root / "cache", recipe, wanted, run_dir, seed=3, precision="float32", device="cpu"), lambda _: None
    )
    return load_run(run_dir)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    save_network(tiny_network("vit", "image"), root / "vit")
    save_network(replace(tiny_network("bert", "text"), tokenizer=word_tokenizer()), root / "bert")
    for split, num, seed in (("train", 24, 0), ("val", 12, 1)):
        pairs_tar(root / f"{split}.tar", num, seed)
        config = extract_config(root, split)
        extract(config, lambda _: None)
        extract(replace(config, teacher=(str(root / "bert"),), text_encoder=None, targets=("layers",)), lambda _: None)
    return World(
        root,
        Cache.open(root / "cache"),
        trained(root, "ssmke", "pairs"),
        trained(root, "image-kd", "images", "student.image_blocks=1"),
        trained(root, "text-kd", "texts"),
    )


def one_by_one(world: World, run: LoadedRun, split: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Features of a split, each picture and each caption alone, unpadded: the slow oracle."""
    cache = world.cache
    tokens, ids = cache.field("image/vit@2/tokens"), cache.field("text/bert/ids")
    rows = tokens.rows(split)
    captions = cache.captions(split).to_pylist()
    with torch.no_grad():
        images = [run.student.encode_images(torch.from_numpy(tokens.values(rows[i : i + 1]))) for i in range(len(rows))]
        texts = []
        for caption in captions:
            row = np.array([caption["text_row"]])
            length = int(ids.lengths(row)[0])
            text = torch.from_numpy(ids.read(row)[:, :length].astype(np.int64))
            texts.append(run.student.encode_texts(text, torch.ones(1, length, dtype=torch.bool)))
    owners = [int(np.searchsorted(rows, caption["image_row"])) for caption in captions]
    return torch.cat([o.features_BD for o in images]), torch.cat([o.features_BD for o in texts]), owners


def assert_same_retrieval(found: dict, expected: dict) -> None:
    for way in ("image_to_text", "text_to_image"):
        assert found[way] == expected[way]
    assert found["mean"] == pytest.approx(expected["mean"])


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_cache_is_evaluated_as_row_by_row(world: World, split: str) -> None:
    images, texts, owners = one_by_one(world, world.pairs, split)
    features = cache_features(world.pairs, world.cache, split, Settings(batch_size=5))
    np.testing.assert_allclose(features.images[STUDENT], images, atol=1e-5)
    np.testing.assert_allclose(features.texts[STUDENT], texts, atol=1e-5)
    assert features.image_of_text.tolist() == owners
    found = evaluate_cache(world.pairs, split=split)["retrieval"]
    assert_same_retrieval(found, image_text_retrieval(images, texts, owners))
    assert (found["on"], found["pictures"], found["captions"]) == (f"split {split}", len(images), len(texts))
    assert found["chance"]["text_to_image"]["R@5"] == pytest.approx(500 / len(images))


def test_evaluation_gives_the_score_that_validation_gave(world: World) -> None:
    found = evaluate_cache(world.pairs)["retrieval"]
    assert world.pairs.info["score"]["name"] == "mean recall"
    assert found["mean"] == pytest.approx(world.pairs.info["score"]["value"])


def trained_and_seen(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> tuple[LoadedRun, list[tuple[np.ndarray, ...]]]:
    """A run, and the features and owners of each of its validations."""
    seen = []

    def spy(images, texts, owners):  # type: ignore[no-untyped-def]
        seen.append((images, texts, owners))
        return image_text_retrieval(images, texts, owners)

    monkeypatch.setattr(validation, "image_text_retrieval", spy)
    train(config, lambda _: None)
    assert config.run_dir is not None
    return load_run(config.run_dir), seen


def assert_validation_is_evaluation(run: LoadedRun, seen: list[tuple[np.ndarray, ...]]) -> None:
    """The one validation of the run had the very features that evaluation has."""
    (images, texts, owners) = seen[0]
    features = cache_features(run, Cache.open(run.cache_path), "val", Settings(batch_size=5))
    np.testing.assert_array_equal(features.images[STUDENT], images)
    np.testing.assert_array_equal(features.texts[STUDENT], texts)
    np.testing.assert_array_equal(features.image_of_text, owners)
    found = evaluate_cache(run, settings=Settings(batch_size=5))["retrieval"]
    assert (len(seen), found["mean"]) == (1, run.info["score"]["value"])


ONCE = ("training.epochs=1", "training.batch=8", "evaluation.batch=5")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_validation_and_evaluation_encode_repeated_captions_alike(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    for split, num in (("train", 16), ("val", 12)):
        rng = np.random.default_rng(num)
        members = []
        for i in range(num):
            lines = [["a red square", "on left of a big blue circle"][i % 2], "a " + " ".join(["big"] * (i % 5))]
            members += [(f"{i}.jpg", jpeg(rng)), (f"{i}.json", json.dumps({"captions": lines}).encode())]
        tar = write_tar(tmp_path / f"{split}.tar", members)
        config = replace(extract_config(world.root, split), data=(str(tar),), cache=tmp_path / "cache")
        extract(replace(config, targets=("cls",)), lambda _: None)
    wanted = TrainConfig(tmp_path / "cache", "ssmke", ONCE, tmp_path / "run", precision=precision, device="cpu")
    run, seen = trained_and_seen(wanted, monkeypatch)
    assert_validation_is_evaluation(run, seen)
    texts = seen[0][1]
    assert len(np.unique(texts, axis=0)) == 7  # equal captions tie exactly, whatever batch they fell into


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_cache_of_crops_is_evaluated_through_the_frozen_network_as_in_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    make_cache(tmp_path / "cache", fields=("crops", "ids", "cls"))
    wanted = (*ONCE, "data.cut=2")
    config = TrainConfig(tmp_path / "cache", "ssmke", wanted, tmp_path / "run", precision=precision, device="cpu")
    refuse_autocast_in_frozen_networks(monkeypatch)
    run, seen = trained_and_seen(config, monkeypatch)
    assert_validation_is_evaluation(run, seen)
    assert (len(seen[0][0]), len(seen[0][1])) == (12, 24)


def refuse_autocast_in_frozen_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have a precision of their own: in training, in validation and in evaluation."""
    real = FrozenPass.pictures

    def pictures(self: FrozenPass, *arguments: torch.Tensor) -> list[torch.Tensor]:
        assert not torch.is_autocast_enabled("cpu")
        return real(self, *arguments)

    monkeypatch.setattr(FrozenPass, "pictures", pictures)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_student_distilled_from_crops_has_one_loss_in_validation_and_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    make_cache(tmp_path / "cache", fields=("crops", "layers"))
    wanted = (*ONCE, "data.cut=2", "data.encoder=tinyvit", "student.image_blocks=1")
    refuse_autocast_in_frozen_networks(monkeypatch)
    train(
        TrainConfig(tmp_path / "cache", "image-kd", wanted, tmp_path / "run", precision=precision, device="cpu"),
        lambda _: None,
    )
    run = load_run(tmp_path / "run")
    found = evaluate_cache(run, settings=Settings(batch_size=5))["distillation"]
    assert found["layers_mse"] == run.info["score"]["value"]


def test_a_score_that_is_no_number_is_never_the_best() -> None:
    for higher in (True, False):
        validator = validation.Validator("score", higher, (), "", lambda: validation.Score(0.0, {}))
        assert not validator.better(float("nan"), None)
        assert not validator.better(float("nan"), 1.0)
        assert validator.better(1.0, None)
        assert validator.better(2.0, 1.0) == higher
        assert not validator.better(1.0, 1.0)


@pytest.mark.parametrize(("what", "other"), [("max_tokens", 12), ("tokenizer", "0" * 64)])
def test_targets_of_other_tokens_than_the_ids_are_refused(world: World, what: str, other: object) -> None:
    cache = Cache.open(world.root / "cache")
    ids, target = cache.field("text/bert/ids"), cache.field("teacher/bert/text/layers")
    read = ids.fingerprint[what]
    target.fingerprint[what] = other
    with pytest.raises(UsageError, match=f"text/bert/ids of .* has {what} {read}, the targets .* have {other}"):
        evaluate_cache(world.texts, cache)


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_a_distilled_network_is_scored_by_its_loss(world: World, kind: str) -> None:
    run = getattr(world, kind)
    found = evaluate_cache(run, settings=Settings(batch_size=7, baselines=True))["distillation"]
    assert found["layers_mse"] == pytest.approx(run.info["score"]["value"], rel=1e-5)
    assert found["rows"] == (12 if kind == "images" else 24)
    before = found["baselines"][BEFORE]["layers_mse"]
    assert found["layers_mse"] < before
    assert f"{before:.4f}" in table({"distillation": found})


def test_tars_end_to_end_give_what_the_cache_gives(world: World) -> None:
    from_cache = evaluate_cache(world.pairs, settings=Settings(baselines=True))["retrieval"]
    from_tars = evaluate_tars(
        world.pairs, [str(world.root / "val.tar")], settings=Settings(baselines=True, batch_size=5)
    )
    assert_same_retrieval(from_tars["retrieval"], from_cache)
    assert_same_retrieval(from_tars["retrieval"]["baselines"][BEFORE], from_cache["baselines"][BEFORE])
    assert from_tars["retrieval"]["on"].endswith("val.tar")


def test_broken_pictures_are_left_out_named_and_counted(world: World, tmp_path: Path) -> None:
    tar = pairs_tar(tmp_path / "torn.tar", 10, 5, broken=(3, 7))
    found = evaluate_tars(world.pairs, [str(tar)], settings=Settings(max_bad=0.2))["retrieval"]
    assert (found["pictures"], found["captions"], found["distractors"]) == (8, 20, 4)
    assert [line.split(":")[0] for line in found["quarantined"]] == ["torn.tar/003", "torn.tar/007"]
    assert "2 pictures left out, the first: torn.tar/003" in table({"retrieval": found})
    with pytest.raises(TooManyBadSamples, match="1 of 10 pictures cannot be used") as caught:
        evaluate_tars(world.pairs, [str(tar)])
    assert "--max-bad 0.2" in caught.value.way_out


def test_quarantined_rows_of_the_cache_are_left_out_too(world: World, tmp_path: Path) -> None:
    pairs_tar(tmp_path / "torn.tar", 10, 5, broken=(3,))
    config = replace(extract_config(world.root, "torn"), data=(str(tmp_path / "torn.tar"),), cache=tmp_path / "cache")
    extract(replace(config, max_bad=0.5), lambda _: None)
    cache = Cache.open(tmp_path / "cache")
    found = evaluate_cache(world.pairs, cache, "torn")["retrieval"]
    assert (found["pictures"], found["captions"], found["distractors"]) == (9, 20, 2)
    assert found["quarantined"][0].startswith("torn.tar/003: ")
    # The same pictures end to end: the same distractors, the same numbers. (The split is not `train`: centre crops.)
    direct = evaluate_tars(world.pairs, [str(tmp_path / "torn.tar")], settings=Settings(max_bad=0.5))["retrieval"]
    assert_same_retrieval(direct, found)


def test_what_cannot_be_evaluated_is_refused(world: World, tmp_path: Path) -> None:
    bare = pairs_tar(tmp_path / "bare.tar", 4, 0, captions=0)
    with pytest.raises(MissingCaptions, match="no captions in"):
        evaluate_tars(world.pairs, [str(bare)])
    texts = write_tar(tmp_path / "texts.tar", [("0.txt", b"a red square")])
    with pytest.raises(NoData, match="no pictures in"):
        evaluate_tars(world.pairs, [str(texts)])
    with pytest.raises(UsageError, match="trained on images"):
        evaluate_tars(world.images, [str(bare)])
    with pytest.raises(UsageError, match="trained on texts only"):
        evaluate_pictures(world.texts, read_labelled(write_npz(tmp_path / "tiny.npz")))
    with pytest.raises(UsageError, match="trained on images only"):
        evaluate_texts(world.images, TextPairs("t", ("a",), ("b",)))
    with pytest.raises(UsageError, match="no split 'test'"):
        evaluate_cache(world.pairs, split="test")
    with pytest.raises(UsageError, match="--device abacus cannot be used here"):
        evaluate_cache(world.pairs, settings=Settings(device="abacus"))
    with pytest.raises(UsageError, match="batch size 0, None threads"):
        Settings(batch_size=0)


def test_a_cache_computed_otherwise_is_refused(world: World, tmp_path: Path) -> None:
    config = replace(extract_config(world.root, "val"), cache=tmp_path / "cache", storage="float16")
    extract(config, lambda _: None)
    with pytest.raises(FingerprintMismatch, match="image/vit@2/tokens has fingerprint") as caught:
        evaluate_cache(world.pairs, Cache.open(tmp_path / "cache"))
    assert str(world.pairs.cache_path) in caught.value.way_out


def test_an_unfinished_split_is_refused(world: World, tmp_path: Path) -> None:
    config = replace(extract_config(world.root, "train"), cache=tmp_path / "cache")
    extract(config, lambda _: None)
    (tmp_path / "cache/_emkum/receipts/image/vit@2/tokens/000001-0.json").unlink()
    with pytest.raises(IncompleteCache, match="lacks 1 blocks of split 'train'"):
        evaluate_cache(world.pairs, Cache.open(tmp_path / "cache"), "train")


# --- baselines -------------------------------------------------------------------------------------------


def test_a_student_that_did_not_learn_is_its_own_baseline(world: World) -> None:
    run = trained(world.root, "ssmke", "idle", "optimiser.lr=0.0", "optimiser.encoder_lr=0.0", "training.epochs=1")
    features = cache_features(run, world.cache, "val", Settings(baselines=True))
    np.testing.assert_array_equal(features.images[STUDENT], features.images[BEFORE])
    np.testing.assert_array_equal(features.texts[STUDENT], features.texts[BEFORE])
    found = evaluate_cache(run, settings=Settings(baselines=True))["retrieval"]
    assert_same_retrieval(found, found["baselines"][BEFORE])
    assert TEACHER not in found["baselines"]  # it reads no captions


def test_label_retrieval_end_to_end_of_teacher_and_student(world: World, tmp_path: Path) -> None:
    pictures = read_labelled(write_npz(tmp_path / "tiny.npz"))
    found = evaluate_pictures(world.images, pictures, 24, settings=Settings(baselines=True, batch_size=4))
    result = found["pictures"]["tiny@24"]
    assert (result["bank"], result["queries"], result["classes"], result["size"]) == (6, 4, 3, 24)
    vit = load_saved(world.root / "vit")
    crops = [np.stack([part.crop(i, 24) for i in range(len(part))]) for part in (pictures.bank, pictures.queries)]
    with torch.no_grad():
        inputs = [normalise(vit, torch.from_numpy(crop)) for crop in crops]
        final = [vit.backbone(images)[:, 0] for images in inputs]
        tokens = [vit.backbone.run(vit.backbone.embed(images), 0, 2).hidden[-1] for images in inputs]
        student = [world.images.student.encode_images(t).features_BD for t in tokens]
    for name, (bank, queries) in {TEACHER: final, STUDENT: student}.items():
        expected = label_retrieval(bank, pictures.bank.labels, queries, pictures.queries.labels)
        numbers = result if name == STUDENT else result["baselines"][name]
        assert numbers["test_to_train"] == expected["test_to_train"]
        assert numbers["train_to_test"] == expected["train_to_test"]
    assert result["chance"] == expected["chance"]
    shown = table(found)
    assert "label retrieval, tiny at 24 px: 4 queries, 6 in the bank" in shown
    assert [line.split("  ")[1] for line in shown.splitlines()[3:]] == [STUDENT, BEFORE, TEACHER, "chance"]


def test_a_network_that_made_no_targets_is_not_called_the_teacher(world: World, tmp_path: Path) -> None:
    settings = Settings(baselines=True)
    # The pairs run regresses vit's CLS: vit is its teacher, bert only reads its captions.
    texts = evaluate_texts(world.pairs, TextPairs("tiny", ("a red", "a"), ("red", "on a")), settings=settings)
    assert set(texts["texts"]["tiny"]["baselines"]) == {BEFORE, ENCODER}
    pictures = evaluate_pictures(world.pairs, read_labelled(write_npz(tmp_path / "tiny.npz")), settings=settings)
    assert set(pictures["pictures"]["tiny@16"]["baselines"]) == {BEFORE, TEACHER}
    contestants = Contestants(world.images, world.cache, settings, with_frozen=True)
    vit = load_saved(world.root / "vit")
    assert contestants.frozen_name(vit) == TEACHER
    assert contestants.frozen_name(replace(vit, weights_sha256="0" * 64)) == ENCODER


def test_the_whole_encoder_stands_beside_a_student_of_another_teacher(world: World, tmp_path: Path) -> None:
    save_network(tiny_network("big", "image", seed=9), tmp_path / "big")
    for split in ("train", "val"):
        config = replace(extract_config(world.root, split), cache=tmp_path / "cache")
        extract(
            replace(config, teacher=(str(tmp_path / "big"),), encoder=str(world.root / "vit"), targets=("layers",)),
            lambda _: None,
        )
    wanted = (*ONCE, "student.image_blocks=1")
    train(
        TrainConfig(tmp_path / "cache", "image-kd", wanted, tmp_path / "run", precision="float32", device="cpu"),
        lambda _: None,
    )
    pictures = read_labelled(write_npz(tmp_path / "tiny.npz"))
    found = evaluate_pictures(load_run(tmp_path / "run"), pictures, settings=Settings(baselines=True))
    assert set(found["pictures"]["tiny@16"]["baselines"]) == {BEFORE, ENCODER}


def test_the_size_of_pictures_must_fit_the_patches(world: World, tmp_path: Path) -> None:
    pictures = read_labelled(write_npz(tmp_path / "tiny.npz"))
    with pytest.raises(UsageError, match="20 x 20 px do not divide into patches of 8 px"):
        evaluate_pictures(world.images, pictures, 20)
    found = evaluate_pictures(world.images, pictures)["pictures"]["tiny@16"]
    assert found["size"] == 16  # the cache's


def test_a_broken_labelled_picture_is_left_out_with_its_label(world: World, tmp_path: Path) -> None:
    bank = labelled_tar(tmp_path / "bank.tar", ["cat", "dog", "cat", "dog"], broken=1)
    queries = labelled_tar(tmp_path / "queries.tar", ["cat", "dog"])
    settings = Settings(max_bad=0.5)
    found = evaluate_pictures(world.images, read_labelled(bank, queries), settings=settings)["pictures"]["bank@16"]
    assert (found["bank"], found["queries"]) == (3, 2)
    assert found["quarantined"][0].startswith("bank.tar/001: ")


def test_text_pairs_end_to_end_of_teacher_and_student(world: World) -> None:
    pairs = TextPairs("tiny", ("a red square", "a blue circle", "a big green"), ("red square", "a red square", "on a"))
    found = evaluate_texts(world.texts, pairs, settings=Settings(baselines=True, batch_size=2))["texts"]["tiny"]
    bert = load_saved(world.root / "bert")
    encoder = Tokenizer.from_str(word_tokenizer().decode())
    features: dict[str, list[torch.Tensor]] = {STUDENT: [], TEACHER: []}
    for text in (*pairs.a, *pairs.b):
        ids = torch.tensor([encoder.encode(text).ids])
        mask = torch.ones_like(ids, dtype=torch.bool)
        with torch.no_grad():
            features[STUDENT].append(world.texts.student.encode_texts(ids, mask).features_BD)
            features[TEACHER].append(bert.backbone(ids, mask).mean(dim=1))  # text-kd pools the mean
    for name, rows in features.items():
        both = torch.cat(rows)
        expected = text_pair_retrieval(both[:3], both[3:], pairs.a, pairs.b)
        numbers = found if name == STUDENT else found["baselines"][name]
        for key in ("1_to_2", "2_to_1", "same_text"):
            assert numbers[key] == expected[key]
    assert (found["pairs"], found["broken_lines"]) == (3, 0)


def test_equal_texts_have_equal_features_whatever_their_neighbours(world: World) -> None:
    contestants = Contestants(world.texts, world.cache, Settings(batch_size=3))
    texts = ["a red square", "on left of a big blue circle", "a", "a red square", "a big circle", "a red square"]
    features = run_module._encode_texts(contestants, texts, contestants.settings)[STUDENT]
    assert (features[0] == features[3]).all()
    assert (features[0] == features[5]).all()


# --- results ---------------------------------------------------------------------------------------------


def test_results_are_merged_into_the_run_folder(tmp_path: Path) -> None:
    path = write_results(tmp_path, {"retrieval": {"mean": 1.0}, "pictures": {"cifar10": {"mean": 2.0}}})
    write_results(tmp_path, {"pictures": {"cifar100": {"mean": 3.0}}, "texts": {"qqp": {"mean": 4.0}}})
    write_results(tmp_path, {"retrieval": {"mean": 5.0}})
    assert json.loads(path.read_text()) == {
        "retrieval": {"mean": 5.0},
        "pictures": {"cifar10": {"mean": 2.0}, "cifar100": {"mean": 3.0}},
        "texts": {"qqp": {"mean": 4.0}},
    }
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


def test_a_damaged_results_file_is_replaced(tmp_path: Path) -> None:
    for damaged in ("{", "[1]", "\xff"):
        (tmp_path / "evaluation.json").write_bytes(damaged.encode("latin-1"))
        write_results(tmp_path, {"retrieval": {"mean": 5.0}})
        assert json.loads((tmp_path / "evaluation.json").read_text()) == {"retrieval": {"mean": 5.0}}


def test_merging_leaves_its_arguments_alone() -> None:
    first = {"pictures": {"a": 1}}
    assert merge_results(first, {"pictures": {"b": 2}}) == {"pictures": {"a": 1, "b": 2}}
    assert first == {"pictures": {"a": 1}}


def test_the_results_are_json(world: World, tmp_path: Path) -> None:
    settings = Settings(baselines=True)
    pairs = TextPairs("tiny", ("a red", "a blue"), ("red", "blue"))
    results = merge_results(
        evaluate_cache(world.pairs, settings=settings),
        evaluate_pictures(world.pairs, read_labelled(write_npz(tmp_path / "tiny.npz")), settings=settings),
        evaluate_texts(world.pairs, pairs, settings=settings),
    )
    assert json.loads(write_results(tmp_path, results).read_text()) == results
    assert list(results["retrieval"])[:2] == ["image_to_text", "text_to_image"]
    assert list(results["retrieval"]["image_to_text"]) == ["R@1", "R@5", "R@10"]
    shown = table(results)
    assert shown.count(STUDENT) >= 3
    assert max(len(line) for line in shown.splitlines()) <= 100


def test_data_sets_of_one_name_are_refused_with_both_paths(world: World, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_npz(tmp_path / folder / "tiny.npz")
        (tmp_path / folder / "qqp.tsv").write_text("sentence1\tsentence2\tlabel\na red\tred\t1\n")
    both = [str(tmp_path / folder / "tiny.npz") for folder in ("a", "b")]
    with pytest.raises(UsageError, match=r"--images .*a/tiny\.npz and .*b/tiny\.npz would both be called 'tiny'"):
        cli.evaluate(world.pairs.dir, images=both)
    with pytest.raises(UsageError, match=r"--texts .*a/qqp\.tsv and .*b/qqp\.tsv would both be called 'qqp'"):
        cli.evaluate(world.pairs.dir, texts=[tmp_path / "a/qqp.tsv", tmp_path / "b/qqp.tsv"])
    refuse_equal_names("--texts", [("a", "x"), ("b", "y")])


def test_one_picture_set_at_two_sizes_gives_two_results(world: World, tmp_path: Path) -> None:
    pictures = read_labelled(write_npz(tmp_path / "tiny.npz"))
    for size in (16, 24):
        write_results(tmp_path, evaluate_pictures(world.images, pictures, size))
    found = json.loads((tmp_path / "evaluation.json").read_text())["pictures"]
    assert {name: result["size"] for name, result in found.items()} == {"tiny@16": 16, "tiny@24": 24}
    assert found["tiny@16"]["on"] == str(tmp_path / "tiny.npz")


def test_flags_that_would_lose_a_result_or_do_nothing_are_refused(world: World) -> None:
    with pytest.raises(UsageError, match=r"--split val and --data x\.tar: evaluation\.json holds one"):
        cli.evaluate(world.pairs.dir, split="val", data=["x.tar"])
    with pytest.raises(UsageError, match="--size 32 without --images"):
        cli.evaluate(world.pairs.dir, size=32)
