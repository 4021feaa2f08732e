"""Run folders from outside, without torch: what was trained, where it stands, what it cost, how two differ."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emkum.errors import NotARun

DOLLARS_PER_HOUR = 0.69  # RTX 4090, on demand, September 2024
DEPTH = 6  # folders below the one named in which runs are looked for
LOST = "killed"  # the status of a run that says it is running while nobody trains in its folder
DESCRIBED = ("seed", "precision", "device", "device_name", "live", "total_steps", "samples", "git_revision")


@dataclass(frozen=True)
class Run:
    """One line of `emkum runs`. None: not known, or not yet.

    best, last: the validation score `score_name` of the student kept, and of the last validation. dollars: None on a
    CPU, which has no price here. status: running, finished, interrupted, failed, killed, or unreadable, then `error`.
    """

    dir: str
    status: str
    recipe: str = ""
    teacher: str = ""
    cache: str = ""
    steps: int = 0
    total_steps: int = 0
    score_name: str = ""
    best: float | None = None
    last: float | None = None
    seconds: float | None = None
    dollars: float | None = None
    device: str = ""
    seed: int | None = None
    git_revision: str | None = None
    error: str = ""


def find_runs(places: Sequence[Path]) -> list[Path]:
    """Run folders: those named, and those up to six folders below. Raises NotARun for a place that holds none."""
    found: list[Path] = []
    for place in places:
        here = sorted(_below(place, DEPTH))
        if not here:
            missing = "" if place.is_dir() else ", which is no folder"
            raise NotARun(f"no training run in {place}{missing}", "name the folder that runs lie in: emkum runs DIR")
        found += here
    return list(dict.fromkeys(found))


def _below(place: Path, depth: int) -> Iterable[Path]:
    if (place / "run.json").is_file():
        yield place
    elif depth and place.is_dir():
        for inner in place.iterdir():
            if inner.is_dir() and not inner.is_symlink() and not inner.name.startswith("."):
                yield from _below(inner, depth - 1)


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a folder. Raises NotARun."""
    path = folder / "run.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotARun(f"{folder} holds no training run (no run.json)", "give a folder that emkum runs lists") from error
    except ValueError as error:
        raise NotARun(f"{path} is not JSON: {error}", "restore the folder, or train again") from error
    for key in ("recipe", "cache", "identity"):
        if not isinstance(found, dict) or not isinstance(found.get(key), dict):
            raise NotARun(f"{path} is not of an emkum run: it lacks {key}", "give a folder that emkum runs lists")
    return dict(found)


def is_held(lock: Path) -> bool:
    """Whether a process holds the lock file."""
    try:
        handle = os.open(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def status_of(folder: Path, info: Mapping[str, Any]) -> str:
    """run.json's status; `killed` for one that claims to run while nobody does."""
    status = str(info.get("status", "running"))
    return LOST if status == "running" and not is_held(folder / ".lock") else status


def summarise(folder: Path, dollars_per_hour: float = DOLLARS_PER_HOUR) -> Run:
    """What `emkum runs` says of one folder."""
    try:
        info = read_run(folder)
    except NotARun as error:
        return Run(str(folder), "unreadable", error=error.what)
    score, last = info.get("score") or {}, last_line(folder)
    steps = int(info.get("steps") or last.get("step") or 0)
    seconds = info.get("seconds") or last.get("seconds")
    device = str(info.get("device", ""))
    name = str(score.get("name") or "")
    return Run(
        dir=str(folder),
        status=status_of(folder, info),
        recipe=str(info["recipe"].get("name", "")),
        teacher=", ".join(teachers_of(info)),
        cache=str(info["cache"].get("path", "")),
        steps=steps,
        total_steps=int(info.get("total_steps") or 0),
        score_name=name,
        best=score.get("value"),
        last=last_score(folder, name),
        seconds=seconds,
        dollars=seconds / 3600 * dollars_per_hour if seconds is not None and device.startswith("cuda") else None,
        device=device,
        seed=info.get("seed"),
        git_revision=info.get("git_revision"),
        error=str(info.get("error", "")),
    )


def teachers_of(info: Mapping[str, Any]) -> list[str]:
    """Names of the networks whose targets the run learns from, by the fields it reads."""
    names = [name.split("/")[1] for name in info["identity"].get("fields", {}) if name.startswith("teacher/")]
    return list(dict.fromkeys(names))


# --- metrics.csv -------------------------------------------------------------------------------------------------


def last_line(folder: Path) -> dict[str, float]:
    """The numbers of the last line of training."""
    return next((line for line in reversed(metrics(folder)) if "lr" in line), {})


def last_score(folder: Path, name: str) -> float | None:
    """The score of that name (run.json's `score.name`) in the last validation; None if there was none."""
    words = name.replace(" ", "_")
    columns = (words, f"val_{words}", "val_loss" if name == "validation loss" else words)
    for line in reversed(metrics(folder)):
        for column in columns:
            if column in line:
                return line[column]
    return None


def validation(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The numbers of the last line of validation; {} if there was none."""
    last = next((line for line in reversed(lines) if any(key.startswith("val_") for key in line)), {})
    return {key: value for key, value in last.items() if key.startswith("val_")}


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.csv, empty cells and cells that are no numbers left out; [] where there is none."""
    try:
        text = (folder / "metrics.csv").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in csv.DictReader(text.splitlines()):
        numbers = {key: number for key, cell in line.items() if key and (number := _number(cell)) is not None}
        found.append(numbers)
    return found


def _number(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


# --- two runs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One value in which two runs differ; None where a run lacks it."""

    path: str
    first: Any
    second: Any


def compare_runs(first: Path, second: Path) -> dict[str, list[Difference]]:
    """In what two runs differ: recipe, cache, versions and how they were run; then their scores, alike or not.

    Raises NotARun.
    """
    one, other = read_run(first), read_run(second)
    places = [{key: info["cache"].get(key) for key in ("path", "uuid", "fields")} for info in (one, other)]
    run_keys = {key: (one.get(key), other.get(key)) for key in DESCRIBED}
    found = {
        "recipe": differences(one["recipe"], other["recipe"]),
        "cache": differences(places[0], places[1]),
        "versions": differences(one.get("versions", {}), other.get("versions", {})),
        "run": [Difference(key, a, b) for key, (a, b) in run_keys.items() if a != b],
    }
    same_rows = (one["identity"].get("rows"), other["identity"].get("rows"))
    if same_rows[0] != same_rows[1]:
        found["cache"].append(Difference("rows trained on (digest)", *(str(rows)[:12] for rows in same_rows)))
    runs = [asdict(summarise(folder)) for folder in (first, second)]
    keys = ("status", "steps", "score_name", "best", "last", "seconds")
    found["result"] = [Difference(key, runs[0][key], runs[1][key]) for key in keys]
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    """What differs between two nested tables, by dotted path."""
    found: list[Difference] = []
    for key in sorted({*one, *other}):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) or isinstance(b, Mapping):
            tables = [value if isinstance(value, Mapping) else {} for value in (a, b)]
            inner = differences(tables[0], tables[1], f"{prefix}{key}.")
            found += inner or ([Difference(prefix + key, a, b)] if a != b else [])
        elif a != b:
            found.append(Difference(prefix + key, a, b))
    return found


# --- in words ----------------------------------------------------------------------------------------------------


def runs_table(runs: Sequence[Run]) -> str:
    """The runs as a table for people."""
    head = ("run", "recipe", "teacher", "cache", "status", "steps", "score", "best", "last", "time", "cost", "commit")
    lines = [
        (
            run.dir,
            run.recipe,
            run.teacher or "–",
            Path(run.cache).name or "–",
            run.status,
            f"{run.steps}/{run.total_steps}",
            run.score_name or "–",
            number_text(run.best),
            number_text(run.last),
            time_text(run.seconds),
            cost_text(run),
            (run.git_revision or "–")[:10] + ("+" if (run.git_revision or "").endswith("+") else ""),
        )
        for run in runs
    ]
    errors = [f"{run.dir}: {run.error}" for run in runs if run.error]
    return "\n".join([aligned([head, *lines]), *errors])


def comparison_table(first: Path, second: Path, found: Mapping[str, Sequence[Difference]]) -> str:
    """The differences as text for people, by heading."""
    parts = []
    for title, entries in found.items():
        if not entries:
            parts.append(f"{title}: the same")
            continue
        lines = [("", str(first), str(second))]
        lines += [(entry.path, _value_text(entry.first), _value_text(entry.second)) for entry in entries]
        parts.append(f"{title}\n{aligned(lines)}")
    return "\n\n".join(parts)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, two spaces apart."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def number_text(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def time_text(seconds: float | None) -> str:
    """12.3 s, 4 min 5 s, 3 h 20 min."""
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def dollars_text(dollars: float) -> str:
    return f"${dollars:.2f}" if dollars >= 0.1 else f"${dollars:.4f}"


def cost_text(run: Run) -> str:
    """Dollars; of a run on a CPU, that it has no price."""
    if run.dollars is not None:
        return dollars_text(run.dollars)
    return "CPU" if run.device.startswith("cpu") else "–"


def _value_text(value: Any) -> str:
    if isinstance(value, float):
        return number_text(value)
    text = "–" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "…"
