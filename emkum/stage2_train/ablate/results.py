"""What came of an ablation: mean and deviation over seeds of each variant, as a table, as JSON and as Markdown."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emkum.stage2_train.ablate.bill import Bill, LiveCost
from emkum.stage2_train.ablate.jobs import Job, run_of
from emkum.stage2_train.ablate.spec import Variant
from emkum.stage2_train.runs import (
    Run,
    aligned,
    dollars_text,
    last_score,
    metrics,
    number_text,
    summarise,
    time_text,
    validation,
)

ROUNDING = 1e-12


@dataclass(frozen=True)
class Spread:
    """Mean of `count` seeds, and their standard deviation (over count - 1); None of it for one seed alone."""

    mean: float
    deviation: float | None
    count: int

    def text(self) -> str:
        """`52.4 ± 0.8`."""
        return number_text(self.mean) + ("" if self.deviation is None else f" ± {number_text(self.deviation)}")


@dataclass(frozen=True)
class Line:
    """One variant. asked: its seeds; finished: those that are done; numbers are over these alone.

    best: of the student that each run kept; last: of its last validation; numbers: every number of that validation.
    seconds, dollars: mean of a run, dollars None on a CPU. live: what a run would have cost without the cache.
    """

    variant: Variant
    asked: tuple[int, ...]
    finished: tuple[int, ...]
    score_name: str
    best: Spread | None
    last: Spread | None
    numbers: Mapping[str, Spread]
    steps: int
    seconds: float | None
    dollars: float | None
    device: str
    live: LiveCost | None
    errors: tuple[str, ...]


def spread(values: Sequence[float | None]) -> Spread | None:
    """Over those that are known; None if none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean = statistics.fmean(known)
    deviation = statistics.stdev(known) if len(known) > 1 else None
    if deviation is not None and deviation < ROUNDING * abs(mean):  # equal values, of which the mean is rounded
        deviation = 0.0
    return Spread(mean, deviation, len(known))


def make_lines(jobs: Sequence[Job], errors: Mapping[str, str], bill: Bill) -> list[Line]:
    """One line a variant, in the order of the file. errors: by the name of a job, of this command."""
    by_variant: dict[str, list[Job]] = {}
    for job in jobs:
        by_variant.setdefault(job.variant.name, []).append(job)
    return [_line(found, errors, bill) for found in by_variant.values()]


def _line(jobs: Sequence[Job], errors: Mapping[str, str], bill: Bill) -> Line:
    done = [job for job in jobs if (run_of(job) or {}).get("status") == "finished"]
    runs = [summarise(job.folder, bill.dollars_per_hour) for job in done]
    failed = [f"{job.name}: {errors[job.name]}" for job in jobs if job.name in errors]
    name = runs[0].score_name if runs else ""
    last = [validation(metrics(job.folder)) for job in done]
    columns = list(dict.fromkeys(column for numbers in last for column in numbers))
    numbers = {column: found for column in columns if (found := spread([one.get(column) for one in last]))}
    return Line(
        variant=jobs[0].variant,
        asked=tuple(job.seed for job in jobs),
        finished=tuple(job.seed for job in done),
        score_name=name,
        best=spread([run.best for run in runs]),
        last=spread([last_score(job.folder, name) for job in done]),
        numbers=numbers,
        steps=max((run.steps for run in runs), default=0),
        seconds=_mean([run.seconds for run in runs]),
        dollars=_mean([run.dollars for run in runs]),
        device=_device(runs),
        live=bill.live(jobs[0], done),
        errors=tuple(failed),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    found = spread(values)
    return None if found is None else found.mean


def _device(runs: Sequence[Run]) -> str:
    return ", ".join(sorted({run.device.partition(":")[0] for run in runs if run.device}))


# --- as text -----------------------------------------------------------------------------------------------------

HEAD = ("variant", "seeds", "score", "best", "last", "steps", "a run took", "cost", "live")


def cells(line: Line) -> tuple[str, ...]:
    """A line's cells, under HEAD."""
    seeds = f"{len(line.finished)}/{len(line.asked)}" + (", failed" if line.errors else "")
    cost = dollars_text(line.dollars) if line.dollars is not None else "CPU time" if "cpu" in line.device else "–"
    best, last = (value.text() if value else "–" for value in (line.best, line.last))
    steps = str(line.steps) if line.finished else "–"
    live = line.live.text() if line.live else "–"
    return line.variant.name, seeds, line.score_name or "–", best, last, steps, time_text(line.seconds), cost, live


def table(lines: Sequence[Line], bill: Bill) -> str:
    """For a terminal."""
    return "\n".join([aligned([HEAD, *map(cells, lines)]), "", *notes(lines, bill)])


def markdown(title: str, lines: Sequence[Line], bill: Bill) -> str:
    """For a file: the same table and notes."""
    rows = [HEAD, ("---",) * len(HEAD), *map(cells, lines)]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return f"# {title}\n\n{body}\n\n" + "\n".join(f"- {note}" for note in notes(lines, bill)) + "\n"


def notes(lines: Sequence[Line], bill: Bill) -> list[str]:
    """What the table's numbers mean, what all of it cost, and what failed."""
    said = ["best, last: mean over the finished seeds ± standard deviation; best is of the student that was kept"]
    trained = sum((line.seconds or 0) * len(line.finished) for line in lines)
    count = sum(len(line.finished) for line in lines)
    price = sum((line.dollars or 0) * len(line.finished) for line in lines)
    devices = {line.device for line in lines if line.device}
    if any("cuda" in device for device in devices):
        said.append(
            f"trained: {count} runs, {time_text(trained)}, {dollars_text(price)} at ${bill.dollars_per_hour:g} an "
            "hour; runs that shared a GPU slowed each other, so that together they cost less than this sum"
        )
    elif devices:
        said.append(f"trained: {count} runs, {time_text(trained)} on a CPU, which has no price here")
    said += bill.notes(lines_live=[line.live for line in lines], counts=[len(line.finished) for line in lines])
    said += [f"failed: {error}" for line in lines for error in line.errors]
    return said


def to_json(name: str, lines: Sequence[Line], bill: Bill) -> dict[str, Any]:
    """Everything in the table, with what each variant was."""
    return {
        "ablation": name,
        "variants": [_line_json(line) for line in lines],
        "bill": bill.to_json(),
        "notes": notes(lines, bill),
    }


def _line_json(line: Line) -> dict[str, Any]:
    return {
        "name": line.variant.name,
        "recipe": line.variant.recipe_source,
        "set": list(line.variant.overrides),
        "grid": dict(line.variant.axes),
        "live": line.variant.live,
        "max_steps": line.variant.max_steps,
        "seeds": list(line.asked),
        "finished": list(line.finished),
        "score_name": line.score_name,
        "best": dataclasses.asdict(line.best) if line.best else None,
        "last": dataclasses.asdict(line.last) if line.last else None,
        "last_validation": {key: dataclasses.asdict(value) for key, value in line.numbers.items()},
        "steps": line.steps,
        "seconds": line.seconds,
        "dollars": line.dollars,
        "device": line.device,
        "would_cost_live": dataclasses.asdict(line.live) if line.live else None,
        "errors": list(line.errors),
    }
