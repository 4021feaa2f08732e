"""`emkum runs`: what was trained, and how two trainings differ."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from emkum.stage2_train.runs import DOLLARS_PER_HOUR


class ListUnlessNamed(TyperGroup):
    """A group of commands whose `list` is meant where no command is named: `emkum runs ./ablations`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args[:1] != ["--help"] and (not args or args[0] not in self.commands):
            args = ["list", *args]
        return super().parse_args(ctx, args)


runs_app = typer.Typer(
    cls=ListUnlessNamed,
    rich_markup_mode=None,
    no_args_is_help=False,
    help="List training runs, or compare two.\n\n"
    "`emkum runs DIR ...` is short for `emkum runs list DIR ...`; without DIR it looks in ./runs.",
)


@runs_app.command("list")
def list_runs(
    places: Annotated[
        Optional[list[Path]],  # noqa: UP045 (Typer reads it)
        typer.Argument(metavar="[DIR]...", help="Run folders, or folders that hold them. Default: ./runs"),
    ] = None,
    dollars_per_hour: Annotated[
        float, typer.Option(help="What an hour of your GPU costs. Default: an RTX 4090, on demand, in 2024.")
    ] = DOLLARS_PER_HOUR,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List the training runs in folders: recipe, teacher, cache, how far they are, their scores and their cost."""
    from emkum.stage2_train.runs import find_runs, runs_table, summarise

    found = [summarise(folder, dollars_per_hour) for folder in find_runs(places or [Path("runs")])]
    print(json.dumps([dataclasses.asdict(run) for run in found], indent=1) if as_json else runs_table(found))


@runs_app.command("compare")
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(help="Folder of another.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show in what two runs differ: recipe, cache, versions, seed and machine, and what came of them."""
    from emkum.stage2_train.runs import compare_runs, comparison_table

    found = compare_runs(first, second)
    if as_json:
        print(json.dumps({key: [dataclasses.asdict(one) for one in value] for key, value in found.items()}, indent=1))
    else:
        print(comparison_table(first, second, found))
