"""What an evaluation found: merged into evaluation.json, and as a table for the screen."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from emkum.errors import UsageError
from emkum.shards.durable import write_file

Results = dict[str, Any]

STUDENT, BEFORE = "student", "student before training"
# The frozen network behind the student's inputs: the teacher only where the run's targets came from it.
TEACHER, ENCODER = "teacher", "frozen encoder, whole"
RESULTS_FILE = "evaluation.json"


def with_baselines(by_name: Mapping[str, Results]) -> Results:
    """The student's numbers, and those of the others under "baselines"."""
    others = {}
    for name, numbers in by_name.items():
        if name != STUDENT:
            others[name] = {key: value for key, value in numbers.items() if key != "chance"}
    return dict(by_name[STUDENT]) | ({"baselines": others} if others else {})


def refuse_equal_names(option: str, named: Iterable[tuple[str, str]]) -> None:
    """Raise UsageError where two data sets of one command, (name, path) each, would share a name in the results."""
    paths: dict[str, str] = {}
    for name, path in named:
        if name in paths:
            raise UsageError(
                f"{option} {paths[name]} and {path} would both be called {name!r} in the results",
                "rename one of them; in evaluation.json a name stands for one data set",
            )
        paths[name] = path


def merge_results(*results: Mapping[str, Any]) -> Results:
    """One object of several: later sections replace earlier ones; data sets of one section stand side by side."""
    merged: Results = {}
    for result in results:
        for section, value in result.items():
            if section in ("pictures", "texts"):
                merged[section] = {**merged.get(section, {}), **value}
            else:
                merged[section] = value
    return merged


def write_results(run_dir: str | os.PathLike[str], results: Mapping[str, Any]) -> Path:
    """Adds the results to the run folder's evaluation.json, which is replaced whole. Raises StorageFailure.

    A file that is no JSON object is replaced: it holds nothing that cannot be measured again.
    """
    path = Path(run_dir) / RESULTS_FILE
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    merged = merge_results(before if isinstance(before, dict) else {}, results)
    write_file(path, (json.dumps(merged, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())
    return path


def table(results: Mapping[str, Any]) -> str:
    """The results as aligned text for the screen."""
    parts = []
    if "retrieval" in results:
        found = results["retrieval"]
        heading = f"image-text retrieval, {found['on']}: {found['pictures']} pictures, {found['captions']} captions, %"
        ways = {"image_to_text": "picture to caption", "text_to_image": "caption to picture"}
        parts.append(_recalls(heading, found, ways) + _left_out(found))
    for name, found in results.get("pictures", {}).items():
        heading = (
            f"label retrieval, {name.rpartition('@')[0]} at {found['size']} px: {found['queries']} queries, "
            f"{found['bank']} in the bank, %"
        )
        ways = {"test_to_train": "test to train", "train_to_test": "train to test"}
        parts.append(_recalls(heading, found, ways) + _left_out(found))
    for name, found in results.get("texts", {}).items():
        ways = {"1_to_2": "1st to 2nd", "2_to_1": "2nd to 1st"}
        recalls = _recalls(f"text-pair retrieval, {name}: {found['pairs']} pairs, %", found, ways)
        same = found.get("same_text")
        parts.append(recalls + (f"\n  any identical text counts: mean {same['mean']:.1f}" if same else ""))
    if "distillation" in results:
        found = results["distillation"]
        heading = f"distillation, {found['on']}: {found['rows']} rows against {found['targets']}"
        term = "logits_kl" if "logits_kl" in found else "layers_mse"
        lines = [f"  {name:<24}{numbers[term]:9.4f}" for name, numbers in _rows(found)]
        parts.append("\n".join([heading, f"  {'':<24}{term.replace('_', '-'):>9}", *lines]))
    return "\n\n".join(parts)


def _rows(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The student, then its baselines."""
    return [(STUDENT, found), *found.get("baselines", {}).items()]


def _recalls(heading: str, found: Mapping[str, Any], ways: Mapping[str, str]) -> str:
    measures = list(found[next(iter(ways))])
    groups = "".join(f"  {name:^{8 * len(measures)}}" for name in ways.values())
    columns = "".join("  " + "".join(f"{measure:>8}" for measure in measures) for _ in ways)
    lines = [heading, f"  {'':<24}{groups}", f"  {'':<24}{columns}{'mean':>10}"]
    for name, numbers in [*_rows(found), ("chance", found["chance"])]:
        cells = "".join("  " + "".join(f"{numbers[way][m]:8.1f}" for m in measures) for way in ways)
        mean = f"{numbers['mean']:10.1f}" if "mean" in numbers else ""
        lines.append(f"  {name:<24}{cells}{mean}")
    return "\n".join(line.rstrip() for line in lines)


def _left_out(found: Mapping[str, Any]) -> str:
    bad = found["quarantined"]
    return f"\n  {len(bad)} pictures left out, the first: {bad[0]}" if bad else ""
