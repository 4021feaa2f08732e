"""`emkum ablate`: many variants of a training from one cache."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from emkum.stage2_train.runs import DOLLARS_PER_HOUR


def ablate(
    file: Annotated[
        str,
        typer.Argument(
            help="A TOML file that lists variants of a recipe (docs/ablations.md), or the name of one that comes with "
            "emkum: teachers, data-fractions, freeze, seeds."
        ),
    ],
    cache: Annotated[
        str, typer.Option("--cache", help="Folder of the cache, or its URL in an object store (s3://bucket/folder).")
    ] = "./shards",
    out: Annotated[
        Optional[Path],  # noqa: UP045 (Typer reads it)
        typer.Option(help="Folder of the runs and the table. Default: ablations/<name of the file>."),
    ] = None,
    jobs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Trainings at once. Default: one on a CPU; on a GPU as many as fit in its free memory, by what the "
            "first training of each variant took."
        ),
    ] = None,
    seeds: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Seeds in place of the file's, as 0,1,2."),
    ] = None,
    set_: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="Change a value in all variants: --set training.batch=64 training.epochs=3"),
    ] = None,
    max_steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Train every variant for so many steps, in place of what the file and its recipes say."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="float32, bfloat16; auto takes bfloat16 where the device is good at it.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu. Default: cuda if there is one.")] = "auto",
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Threads of each training that read batches. Default: that of emkum train."),
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Train on the rows that are there though blocks are missing.")
    ] = False,
    data: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Where the source tars lie now, for variants that train live."),
    ] = None,
    dollars_per_hour: Annotated[
        float, typer.Option(help="What an hour of your GPU costs. Default: an RTX 4090, on demand, in 2024.")
    ] = DOLLARS_PER_HOUR,
    extraction_seconds: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="What emkum extract said that the training split took: it is added to the bill once, and gives an "
            "estimate of what training without the cache would cost."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained, and what is done already; train nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object to stdout, everything else to stderr.")
    ] = False,
) -> None:
    """Train many variants of a recipe from one cache, and print a table with means and deviations over seeds.

    The same command again continues: what is finished is left alone, what was stopped goes on. A run that fails is
    listed with its error and stops no other; the exit code is then that of the first failure. Example:

        emkum ablate data-fractions --cache ./shards
    """
    from emkum.errors import UsageError
    from emkum.shards.store import is_url
    from emkum.stage2_train.ablate.ablate import AblateConfig, plan_json, plan_lines, prepare
    from emkum.stage2_train.ablate.ablate import ablate as run_ablation
    from emkum.stage2_train.ablate.jobs import TrainFlags

    words = [] if seeds is None else [word.strip() for word in seeds.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise UsageError(f"--seeds {seeds} is not a list of different numbers from 0", "give them as 0,1,2")
    prepared = prepare(
        AblateConfig(
            file=file,
            cache=cache if is_url(cache) else Path(cache),
            out=out,
            jobs=jobs,
            seeds=tuple(int(word) for word in words),
            overrides=tuple(set_ or ()),
            max_steps=max_steps,
            flags=TrainFlags(device, precision, threads, allow_partial, tuple(data or ())),  # type: ignore[arg-type]
            dollars_per_hour=dollars_per_hour,
            extraction_seconds=extraction_seconds,
        )
    )
    if dry_run:
        print(json.dumps(plan_json(prepared), indent=1) if as_json else "\n".join(plan_lines(prepared)))
        return
    for line in plan_lines(prepared):
        _say(line)
    result = run_ablation(prepared, say=_say)
    print(json.dumps(result.to_json(), indent=1, allow_nan=False) if as_json else result.table())
    _say(f"written to {result.out / 'table.md'} and table.json")
    result.require_all()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
