"""GLUE's tasks, and their files read: tab-separated text with a header, or a JSON object a line.

Source of tasks and measures: Wang et al. 2018, arXiv:1804.07461.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emkum.errors import InputDataError, NoData, UsageError

MAX_BROKEN = 0.01  # the share of lines that may lack a column, as in the published QQP
FORMATS = (
    "a tab-separated file with a header, or .jsonl with an object a line: sentence1 (or sentence), sentence2 where the "
    "task has pairs, label; the names of GLUE's own files are known too"
)
FIRST = ("sentence1", "sentence", "question1", "question", "premise", "#1 string", "text")
SECOND = ("sentence2", "question2", "hypothesis", "#2 string")
SECOND_OF_QNLI = ("sentence", *SECOND)
LABEL = ("label", "gold_label", "is_duplicate", "quality", "score")


@dataclass(frozen=True)
class GlueTask:
    """One task. pair: of two sentences. metrics: their mean is the score. regression: labels are numbers."""

    name: str
    pair: bool
    metrics: tuple[str, ...]
    regression: bool = False
    labels: tuple[str, ...] = ("0", "1")


ENTAILS = ("entailment", "not_entailment")
TASKS: Mapping[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask("cola", False, ("Matthews",)),
        GlueTask("sst2", False, ("accuracy",)),
        GlueTask("mrpc", True, ("accuracy", "F1")),
        GlueTask("qqp", True, ("accuracy", "F1")),
        GlueTask("stsb", True, ("Pearson", "Spearman"), regression=True, labels=()),
        GlueTask("mnli", True, ("accuracy",), labels=("contradiction", "entailment", "neutral")),
        GlueTask("qnli", True, ("accuracy",), labels=ENTAILS),
        GlueTask("rte", True, ("accuracy",), labels=ENTAILS),
        GlueTask("wnli", True, ("accuracy",)),
    )
}


@dataclass(frozen=True)
class Sentences:
    """Sentences of one file. second: () for single ones. labels: int64 classes, or float64 of a regression."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    labels: np.ndarray
    num_broken: int
    source: str
    sha256: str

    def __len__(self) -> int:
        return len(self.first)


def glue_task(name: str) -> GlueTask:
    """The task of a name, written with or without `-`. Raises UsageError."""
    key = name.lower().replace("-", "").replace("_", "")
    if key not in TASKS:
        close = difflib.get_close_matches(key, TASKS, n=1)
        raise UsageError(
            f"no GLUE task {name!r}", f"did you mean {close[0]}?" if close else f"tasks: {', '.join(TASKS)}"
        )
    return TASKS[key]


def read_sentences(path: Path, task: GlueTask) -> Sentences:
    """A file of the task. Labels are the task's words, or numbers from 0 in the order of `GlueTask.labels`.

    Lines without a label or a sentence are left out and counted. Raises NoData, UsageError for a file without the
    task's columns, InputDataError where more than 1 % of the lines are broken, or a label is none of the task's.
    """
    if not path.is_file():
        raise NoData(f"no file {path}", f"GLUE data is {FORMATS}")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputDataError(f"{path} is not UTF-8: {error}", f"give {FORMATS}") from error
    rows = _json_rows(path, text) if path.suffix in (".jsonl", ".json") else _tab_rows(path, text, task)
    found: list[tuple[str, str, float]] = []
    broken: list[int] = []
    number = 1
    for number, row in rows:
        if row is None:
            broken.append(number)
            continue
        first, second, label = _columns(path, row, task)
        value = _label(path, number, label, task)
        found.append((first, second, value))
    if len(broken) > MAX_BROKEN * number:
        raise InputDataError(
            f"{len(broken)} of {number} lines of {path} are not whole; the first is line {broken[0]}", f"give {FORMATS}"
        )
    if not found:
        raise InputDataError(f"{path} holds no sentences", f"give {FORMATS}")
    labels = np.array([value for *_, value in found], dtype=np.float64 if task.regression else np.int64)
    second_column = tuple(second for _, second, _ in found) if task.pair else ()
    sha256 = hashlib.sha256(data).hexdigest()
    return Sentences(tuple(first for first, *_ in found), second_column, labels, len(broken), str(path), sha256)


Row = dict[str, str]


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Row | None]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise InputDataError(f"line {number} of {path} is no JSON object: {error}", f"give {FORMATS}") from error
        if not isinstance(found, dict):
            raise InputDataError(f"line {number} of {path} is no JSON object", f"give {FORMATS}")
        yield number, {str(key).lower(): str(value) for key, value in found.items() if value is not None}


def _tab_rows(path: Path, text: str, task: GlueTask) -> Iterator[tuple[int, Row | None]]:
    """Rows by column, None for one that is not whole. No quoting: a quotation mark is a letter of the sentence."""
    lines = [line.rstrip("\r") for line in text.split("\n")]
    names, start = [name.strip().lower() for name in lines[0].split("\t")], 1
    if task.name == "cola" and len(names) == 4 and names[1] in ("0", "1"):  # GLUE's own CoLA has no header
        names, start = ["source", "label", "mark", "sentence"], 0
    for number, line in enumerate(lines[start:], start=start + 1):
        if not line:
            continue
        cells = line.split("\t")
        yield number, dict(zip(names, cells, strict=True)) if len(cells) == len(names) else None


def _columns(path: Path, row: Row, task: GlueTask) -> tuple[str, str, str]:
    firsts = ("question",) if task.name == "qnli" and "question" in row else FIRST
    seconds = (SECOND_OF_QNLI if task.name == "qnli" else SECOND) if task.pair else ()
    places = []
    for names in (firsts, seconds, LABEL):
        name = next((name for name in names if name in row), None)
        if name is None and names:
            raise UsageError(
                f"{path} has the columns {', '.join(row)}, and none of {', '.join(names)} for {task.name}",
                f"give {FORMATS}",
            )
        places.append(row[name] if name else "")
    return places[0], places[1], places[2]


def _label(path: Path, number: int, label: str, task: GlueTask) -> float:
    label = label.strip()
    if task.regression:
        try:
            value = float(label)
        except ValueError:
            value = float("nan")
        if np.isfinite(value):
            return value
        raise InputDataError(f"line {number} of {path}: label {label!r} is no number", f"give {FORMATS}")
    if label in task.labels:
        return task.labels.index(label)
    if label.isdecimal() and int(label) < len(task.labels):
        return int(label)
    raise InputDataError(
        f"line {number} of {path}: label {label!r} is none of {task.name}'s ({', '.join(task.labels)})",
        "test files of GLUE have no labels: measure on the dev file",
    )
