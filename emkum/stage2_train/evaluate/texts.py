"""Text-pair retrieval: does a sentence find its paraphrase? (QQP, MRPC: positive pairs only)

Sentence 1 is looked for with sentence 2 and the other way round, among all sentences of the other side. The strict
number is the headline: only the pair's own line counts, as published. Texts that repeat make that number too low (the
same text on another line is a wrong answer, and ties with the right one), so it is also given with any identical
text counted as right. Source: the validation protocol of the S-SMKE thesis.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emkum.errors import InputDataError, NoData, UsageError
from emkum.stage2_train.evaluate.retrieval import SCORES_PER_CHUNK, both_ways, chance, on_grid, ranks

KS = (1, 5)
MAX_PAIRS = 25_000
# The published QQP files hold some questions with a line break inside; those lines have too few columns.
MAX_BROKEN = 0.01
FORMATS = (
    "a tab-separated file with a header: QQP (question1, question2, is_duplicate), MRPC (Quality, #1 String, "
    "#2 String), or sentence1, sentence2, label"
)
# The names of (text a, text b, is a pair) in the headers we know, in lower case.
HEADERS = (
    ("question1", "question2", "is_duplicate"),
    ("#1 string", "#2 string", "quality"),
    ("sentence1", "sentence2", "label"),
)


@dataclass(frozen=True)
class TextPairs:
    """Sentences that say the same, line by line: a[i] and b[i]."""

    name: str
    a: tuple[str, ...]
    b: tuple[str, ...]
    num_broken: int = 0  # lines left out, see MAX_BROKEN
    source: str = ""  # the file, for messages and results

    def __len__(self) -> int:
        return len(self.a)


def read_text_pairs(path: str | os.PathLike[str], max_pairs: int = MAX_PAIRS) -> TextPairs:
    """The first `max_pairs` positive pairs of a QQP or MRPC file; the header tells which it is.

    UTF-8 with or without a byte order mark. Broken lines are left out and counted. Raises NoData, UsageError for
    another header, InputDataError where more than 1 % of the lines are broken (naming the first) or no pair is there.
    """
    path = Path(path)
    if not path.is_file():
        raise NoData(f"no file {path}", f"text pairs are {FORMATS}")
    pairs, num_broken = _read_positives(path, max_pairs)
    if not pairs:
        raise InputDataError(f"{path} holds no positive pair", "pairs with a 1 in the label column are used")
    a, b = zip(*pairs, strict=True)
    return TextPairs(path.stem, a, b, num_broken, str(path))


def text_pair_retrieval(
    a_ND: np.ndarray | torch.Tensor,
    b_ND: np.ndarray | torch.Tensor,
    texts_a: Sequence[str] | None = None,
    texts_b: Sequence[str] | None = None,
    ks: Sequence[int] = KS,
    scores_per_chunk: int = SCORES_PER_CHUNK,
) -> dict[str, Any]:
    """Recall at k in percent, sentence 1 to sentence 2 and back, the mean, and the chance level.

    Row i of a_ND belongs to row i of b_ND. With the texts there is also "same_text": the same numbers where a
    candidate whose text is identical to the right one's is right too. Features finite, normalised here; ties count
    against (see retrieval.py). Returns {"1_to_2": {"R@1": ...}, "2_to_1": {...}, "mean": ..., "chance": {...},
    "same_text": {"1_to_2": ..., "2_to_1": ..., "mean": ...}}. Raises NonFiniteFeature.
    """
    if len(a_ND) != len(b_ND):
        raise ValueError(f"{len(a_ND)} sentences against {len(b_ND)}")
    a, b = on_grid(a_ND, "sentence 1"), on_grid(b_ND, "sentence 2")
    lines = np.arange(len(a))
    by_chance = chance(lines, lines, ks)
    result = both_ways(
        "1_to_2", ranks(a, b, lines, lines, scores_per_chunk), "2_to_1", ranks(b, a, lines, lines, scores_per_chunk), ks
    )
    result["chance"] = {"1_to_2": by_chance, "2_to_1": dict(by_chance)}
    if texts_a is not None and texts_b is not None:
        same_a, same_b = _numbers_of(texts_a), _numbers_of(texts_b)
        result["same_text"] = both_ways(
            "1_to_2",
            ranks(a, b, same_b, same_b, scores_per_chunk),
            "2_to_1",
            ranks(b, a, same_a, same_a, scores_per_chunk),
            ks,
        )
    return result


def _numbers_of(texts: Sequence[str]) -> np.ndarray:
    """One number for each different text."""
    number: dict[str, int] = {}
    return np.array([number.setdefault(text, len(number)) for text in texts], dtype=np.int64)


def _read_positives(path: Path, max_pairs: int) -> tuple[list[tuple[str, str]], int]:
    """The first positive pairs, and how many broken lines stood before the last of them."""
    pairs: list[tuple[str, str]] = []
    broken: list[int] = []
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            names = [name.strip().lower() for name in _cells(file.readline())]
            columns = next((known for known in HEADERS if all(name in names for name in known)), None)
            if columns is None:
                raise UsageError(f"{path} begins with {names[:8]}, which is no header known here", f"give {FORMATS}")
            first, second, label = (names.index(name) for name in columns)
            quoted = columns[0] == "question1"
            number = 1
            for number, line in enumerate(file, start=2):
                cells = _cells(line)
                if cells == [""]:
                    continue
                if len(cells) != len(names) or cells[label] not in ("0", "1"):
                    broken.append(number)
                elif cells[label] == "1":
                    texts = cells[first], cells[second]
                    pairs.append((_unquoted(texts[0]), _unquoted(texts[1])) if quoted else texts)
                    if len(pairs) == max_pairs:
                        break
    except UnicodeDecodeError as error:
        raise InputDataError(f"{path} is not UTF-8: {error}", f"give {FORMATS}") from error
    if len(broken) > MAX_BROKEN * number:
        raise InputDataError(
            f"{len(broken)} of {number} lines of {path} have no {len(names)} columns with a label 0 or 1; the first is "
            f"line {broken[0]}",
            f"give {FORMATS}",
        )
    return pairs, len(broken)


def _cells(line: str) -> list[str]:
    """A line cut at tabs, without any quoting: in MRPC a quotation mark is a letter of the sentence."""
    return line.rstrip("\r\n").split("\t")


def _unquoted(cell: str) -> str:
    """QQP's cells, some of which are quoted as in a CSV file. One cell at a time: a stray mark must not eat lines."""
    inner = cell[1:-1]
    if len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell
