"""One `emkum ablate`: read the file, train what is not trained yet, write the table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emkum.errors import Interrupted, RunsFailed
from emkum.shards.durable import make_dir, write_file
from emkum.shards.reader import Cache
from emkum.stage2_train.ablate.bill import Bill, make_bill
from emkum.stage2_train.ablate.curve import curve_of, svg
from emkum.stage2_train.ablate.jobs import Job, TrainFlags, make_jobs
from emkum.stage2_train.ablate.results import Line, make_lines, markdown, table, to_json
from emkum.stage2_train.ablate.schedule import Outcome, Room, require_no_mixing, run_jobs
from emkum.stage2_train.ablate.spec import expand, read_ablation
from emkum.stage2_train.runs import DOLLARS_PER_HOUR

Say = Callable[[str], None]


@dataclass(frozen=True)
class AblateConfig:
    """One `emkum ablate`. out None: ablations/<name>. jobs None: one on a CPU, as many as fit on a GPU.

    max_steps, seeds, overrides (`path=value`): in place of the file's. extraction_seconds: what extracting the training
    split took.
    """

    file: str
    cache: Path | str = Path("shards")
    out: Path | None = None
    jobs: int | None = None
    seeds: tuple[int, ...] = ()
    overrides: tuple[str, ...] = ()
    max_steps: int | None = None
    flags: TrainFlags = field(default_factory=TrainFlags)
    dollars_per_hour: float = DOLLARS_PER_HOUR
    extraction_seconds: float | None = None


@dataclass(frozen=True)
class Result:
    """What an ablation gave: `lines` of its table, and the files they were written to."""

    name: str
    lines: tuple[Line, ...]
    bill: Bill
    outcomes: tuple[Outcome, ...]
    out: Path

    def table(self) -> str:
        """For a terminal."""
        return table(self.lines, self.bill)

    def to_json(self) -> dict[str, Any]:
        """As in table.json."""
        return to_json(self.name, self.lines, self.bill)

    def require_all(self) -> None:
        """Raises RunsFailed, with the exit code of the first, if runs failed."""
        failed = [outcome for outcome in self.outcomes if outcome.end == "failed"]
        if failed:
            error = RunsFailed(
                f"{len(failed)} of {len(self.outcomes)} runs failed, the first being {failed[0].job.name}: "
                f"{failed[0].error}",
                f"see {failed[0].job.log}; the same command tries them again and leaves finished ones alone",
            )
            error.exit_code = failed[0].code if failed[0].code > 0 else RunsFailed.exit_code
            raise error


@dataclass(frozen=True)
class Prepared:
    """An ablation, read and checked against its cache and its folder; nothing is written yet."""

    config: AblateConfig
    name: str
    out: Path
    cache: Cache
    jobs: tuple[Job, ...]
    counts: dict[str, int]
    room: Room


def prepare(config: AblateConfig) -> Prepared:
    """Reads the file and looks at every run folder.

    Raises UnknownAblation, UnknownRecipe, UsageError, NotACache, and AblationMismatch for a folder that holds a run
    of something else.
    """
    Bill(config.dollars_per_hour, config.extraction_seconds)  # their ranges, before the work
    room = Room(config.jobs, config.flags.device)
    ablation = read_ablation(config.file)
    cache = Cache.open(config.cache)
    variants = expand(ablation, cache, config.max_steps, config.overrides)
    out = config.out or Path("ablations") / ablation.name
    jobs = make_jobs(variants, config.seeds or ablation.seeds, cache, out, config.flags)
    return Prepared(config, ablation.name, out, cache, tuple(jobs), require_no_mixing(jobs), room)


def plan_lines(prepared: Prepared) -> list[str]:
    """What would run, for --dry-run and for the start."""
    lacking = {job.variant.name: job.lacks for job in prepared.jobs if job.lacks}
    counts, seeds = prepared.counts, sorted({job.seed for job in prepared.jobs})
    variants = list(dict.fromkeys(job.variant.name for job in prepared.jobs))
    said = [
        f"{prepared.name}: {len(variants)} variants x {len(seeds)} seeds = {len(prepared.jobs)} runs in "
        f"{prepared.out}: {counts['finished']} finished, {counts['begun']} begun, {counts['new']} new"
    ]
    for job in prepared.jobs:
        if job.seed == prepared.jobs[0].seed and job.variant.name not in lacking:
            changes = " ".join(job.variant.overrides) or "as it is"
            live = ", live" if job.variant.live else ""
            said.append(f"  {job.variant.name}: {job.variant.recipe_source}{live}: {changes}")
    said += [f"  {name}: cannot run: {lacks}" for name, lacks in lacking.items()]
    return said


def plan_json(prepared: Prepared) -> dict[str, Any]:
    """The same for programs: every run with its command and state."""
    return {
        "ablation": prepared.name,
        "out": str(prepared.out),
        "runs": [
            {
                "variant": job.variant.name,
                "seed": job.seed,
                "state": "lacking" if job.lacks else job.state(),
                "lacks": job.lacks,
                "command": ["emkum", *job.arguments()],
            }
            for job in prepared.jobs
        ],
    }


def ablate(prepared: Prepared, say: Say) -> Result:
    """Trains what is not finished, one process a run, and writes table.md, table.json and, where it has one, curve.svg.

    The same call again continues: finished runs are left alone, begun ones go on where they stopped. Failures are in
    the result, not raised. Raises AblationMismatch, StorageFailure, Interrupted.
    """
    make_dir(prepared.out)
    outcomes = run_jobs(prepared.jobs, prepared.room, say)
    errors = {outcome.job.name: outcome.error for outcome in outcomes if outcome.end == "failed"}
    bill = make_bill(
        prepared.jobs, prepared.cache, prepared.config.dollars_per_hour, prepared.config.extraction_seconds
    )
    lines = make_lines(prepared.jobs, errors, bill)
    result = Result(prepared.name, tuple(lines), bill, tuple(outcomes), prepared.out)
    _write(result, lines)
    if stopped := [outcome for outcome in outcomes if outcome.end == "interrupted"]:
        raise Interrupted(f"{stopped[0].job.name} was stopped from outside", "the same command continues")
    return result


def _write(result: Result, lines: Sequence[Line]) -> None:
    title = f"Ablation {result.name}"
    data = json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n"
    write_file(result.out / "table.json", data.encode())
    text = markdown(title, lines, result.bill)
    curve = curve_of(lines)
    if curve is not None:
        write_file(result.out / "curve.svg", svg(curve, f"{title}: {curve.score_name}").encode())
        text += f"\n![{curve.score_name} over {curve.path}](curve.svg)\n"
    write_file(result.out / "table.md", text.encode())
