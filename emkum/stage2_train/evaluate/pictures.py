"""Label retrieval among pictures: does a near neighbour show the same class? (CIFAR-10/100, or labelled tars)

The memory bank is the train pictures, the queries are the test pictures, then the other way round. top-k: one or
more of the k nearest has the query's label ("any of k", no vote). Labels are used here only, never in training.
Source: the validation protocol of the S-SMKE thesis, section 4 of its summary in the project's notes.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from emkum.errors import InputDataError, NoData, UsageError
from emkum.shards.tars import SourceSample, find_tars, read_member, scan_tars
from emkum.shards.views import ViewPolicy, box_for, decode_view
from emkum.stage2_train.evaluate.retrieval import SCORES_PER_CHUNK, as_groups, both_ways, chance, on_grid, ranks

KS = (1, 3)
NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
CENTRE = ViewPolicy(crop=(1.0, 1.0))
SHAPES = "an npz holds x_train, x_test: uint8 [n, height, width, 3], and y_train, y_test: whole numbers [n]"


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures that are decoded one by one."""

    labels: np.ndarray  # int64 [n]
    crop: Callable[[int, int], np.ndarray]  # (index, size) -> uint8 [size, size, 3]; may raise BadPicture
    names: Sequence[str] | None = None  # for messages

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class LabelledPictures:
    """A memory bank and queries with labels of one set of classes."""

    name: str
    bank: Pictures  # "train"
    queries: Pictures  # "test"
    num_classes: int
    source: str = ""  # where they lie, for messages and results


def label_retrieval(
    bank_ND: np.ndarray | torch.Tensor,
    bank_labels_N: np.ndarray,
    queries_MD: np.ndarray | torch.Tensor,
    query_labels_M: np.ndarray,
    ks: Sequence[int] = KS,
    scores_per_chunk: int = SCORES_PER_CHUNK,
) -> dict[str, Any]:
    """Any-of-k label recall in percent, queries to bank and bank to queries, its mean, and the chance level.

    Features finite, normalised here; cosine; ties count against (see retrieval.py). A query whose label the other
    side lacks is a miss. Returns {"test_to_train": {"top-1": ...}, "train_to_test": {...}, "mean": ..., "chance":
    {"test_to_train": {...}, "train_to_test": {...}}}; "train" is the bank. Raises NonFiniteFeature.
    """
    bank_labels_N, query_labels_M = as_groups(bank_labels_N), as_groups(query_labels_M)
    if len(bank_labels_N) != len(bank_ND) or len(query_labels_M) != len(queries_MD):
        raise ValueError("one label for each picture")
    if not len(bank_labels_N) or not len(query_labels_M):
        raise InputDataError("label retrieval between no pictures", "give a bank and queries with pictures that decode")
    bank, queries = on_grid(bank_ND, "bank"), on_grid(queries_MD, "query")
    forth = ranks(queries, bank, query_labels_M, bank_labels_N, scores_per_chunk)
    back = ranks(bank, queries, bank_labels_N, query_labels_M, scores_per_chunk)
    return both_ways("test_to_train", forth, "train_to_test", back, ks, at="top-") | {
        "chance": {
            "test_to_train": chance(query_labels_M, bank_labels_N, ks, "top-"),
            "train_to_test": chance(bank_labels_N, query_labels_M, ks, "top-"),
        }
    }


def read_labelled(bank: str | os.PathLike[str], queries: str | os.PathLike[str] | None = None) -> LabelledPictures:
    """An npz of both parts, or labelled tars: one (a path, a pattern or a folder) for the bank and one for queries.

    Raises NoData, UsageError saying which keys or labels are missing. Never unpickles.
    """
    if str(bank).endswith(".npz"):
        if queries is not None:
            raise UsageError(f"{bank} holds bank and queries, so {queries} has no part in it", "give each npz alone")
        return _read_npz(Path(bank))
    if queries is None:
        raise UsageError(
            f"{bank} alone is not enough: label retrieval needs a bank and queries",
            "give two labelled tars, the bank first, or one npz with " + ", ".join(NPZ_KEYS),
        )
    return _read_tars(str(bank), str(queries))


def labelled_sets(paths: Sequence[str | os.PathLike[str]]) -> list[LabelledPictures]:
    """What `--images` names, in order: every npz is a set of its own; tars come in twos, bank then queries."""
    sets, waiting = [], None
    for path in paths:
        if str(path).endswith(".npz"):
            sets.append(read_labelled(path))
        elif waiting is None:
            waiting = path
        else:
            sets.append(read_labelled(waiting, path))
            waiting = None
    if waiting is not None:
        sets.append(read_labelled(waiting))
    return sets


def _read_npz(path: Path) -> LabelledPictures:
    if not path.is_file():
        raise NoData(f"no file {path}", f"{SHAPES}; numpy.savez writes one")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            missing = [key for key in NPZ_KEYS if key not in arrays.files]
            if missing:
                raise UsageError(
                    f"{path} lacks {', '.join(missing)}; it holds {', '.join(arrays.files) or 'nothing'}", SHAPES
                )
            x_train, y_train, x_test, y_test = (arrays[key] for key in NPZ_KEYS)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        # np.load says ValueError for object arrays (which would need pickle) and for text that is no archive.
        raise UsageError(f"{path} cannot be read as an npz of plain arrays: {error}", SHAPES) from error
    for key, pictures, labels in (("train", x_train, y_train), ("test", x_test, y_test)):
        _check_shapes(path, key, pictures, labels)
    num_classes = len(np.union1d(y_train, y_test))
    bank, queries = _array_pictures(x_train, y_train), _array_pictures(x_test, y_test)
    return LabelledPictures(path.stem, bank, queries, num_classes, str(path))


def _check_shapes(path: Path, part: str, pictures: np.ndarray, labels: np.ndarray) -> None:
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3 or 0 in pictures.shape:
        raise UsageError(f"x_{part} of {path} is {pictures.dtype} {list(pictures.shape)}", SHAPES)
    if labels.shape != pictures.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(
            f"y_{part} of {path} is {labels.dtype} {list(labels.shape)} for {len(pictures)} pictures", SHAPES
        )


def _array_pictures(pictures_NHWC: np.ndarray, labels: np.ndarray) -> Pictures:
    def crop(index: int, size: int) -> np.ndarray:
        """The centre square, resized: bicubic, also upwards, as the protocol has it for 32 px pictures."""
        picture = Image.fromarray(pictures_NHWC[index])
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        # Cut before resizing: with `box`, the bicubic kernel would look beyond its edges.
        square = picture.crop((left, top, left + side, top + side))
        return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))

    return Pictures(as_groups(labels), crop)


def _read_tars(bank: str, queries: str) -> LabelledPictures:
    parts = [_labelled_samples(pattern) for pattern in (bank, queries)]
    # Labels are texts in a tar; the numbers stand for the sorted texts of both parts.
    names = sorted({str(sample.label) for part in parts for _, sample in part})
    number = {name: index for index, name in enumerate(names)}
    pictures = [
        tar_pictures(part, np.array([number[str(sample.label)] for _, sample in part], dtype=np.int64))
        for part in parts
    ]
    return LabelledPictures(Path(bank).stem, pictures[0], pictures[1], len(names), f"{bank} and {queries}")


def _labelled_samples(pattern: str) -> list[tuple[str, SourceSample]]:
    """(path of the tar, sample) of every sample with a picture. A picture without a label is an error."""
    tars = scan_tars(find_tars([pattern]))
    samples = [(tar.path, sample) for tar in tars for sample in tar.samples if sample.picture is not None]
    if not samples:
        raise NoData(f"no pictures in {pattern}", "labelled tars hold key.jpg (or png, webp) and key.cls")
    bare = [sample.key for _, sample in samples if sample.label is None]
    if bare:
        raise UsageError(
            f"{len(bare)} of {len(samples)} pictures in {pattern} have no label, the first is {bare[0]!r}",
            "a labelled tar holds key.cls beside each picture",
        )
    return samples


def tar_pictures(samples: Sequence[tuple[str, SourceSample]], labels: np.ndarray) -> Pictures:
    """The centre squares of samples with a picture, (path of the tar, sample) each."""

    def crop(index: int, size: int) -> np.ndarray:
        path, sample = samples[index]
        assert sample.picture is not None
        data = read_member(path, sample.picture.offset, sample.picture.size)
        return decode_view(data, size, lambda width, height: box_for(CENTRE, "", sample.key, 0, width, height))[0]

    return Pictures(labels, crop, [f"{os.path.basename(path)}/{sample.key}" for path, sample in samples])
