"""Evaluating a student: label retrieval, text pairs, and whole runs from cache, tars, pictures and texts."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emkum.errors import BadPicture, InputDataError, NoData, NonFiniteFeature, UsageError
from emkum.stage2_train.evaluate.pictures import label_retrieval, labelled_sets, read_labelled
from emkum.stage2_train.evaluate.texts import read_text_pairs, text_pair_retrieval

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
