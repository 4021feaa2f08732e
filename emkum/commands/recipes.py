"""`emkum recipes`: the experiments that come with emkum, and what each of them reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

recipes_app = typer.Typer(rich_markup_mode=None)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A recipe that comes with emkum, or a TOML file.")]


@recipes_app.callback(invoke_without_command=True)
def recipes(
    context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False
) -> None:
    """List the recipes for `emkum train --recipe NAME`: what each is, what it reads, and what was published of it."""
    if context.invoked_subcommand is not None:
        return
    from emkum.stage2_train.recipe_listing import listing, shipped_headers

    headers = shipped_headers()
    print(json.dumps([header.to_json() for header in headers], indent=1) if as_json else listing(headers))


@recipes_app.command("show")
def recipes_show(
    name: NameArgument, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False
) -> None:
    """Explain one recipe: what it reads, trains, costs and reached, then every setting with its value."""
    from emkum.stage2_train.recipe_listing import show, show_json

    print(json.dumps(show_json(name), indent=1) if as_json else show(name))


@recipes_app.command("needs")
def recipes_needs(
    name: NameArgument,
    cache: Annotated[
        Optional[str],  # noqa: UP045 (Typer reads it)
        typer.Option(help="A cache, folder or URL: say what it lacks. Default: the commands that make one from tars."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the extract commands that would feed a recipe, with the teacher that it was published with.

    Example: emkum recipes needs ssmke --cache ./shards
    """
    from emkum.shards.store import is_url
    from emkum.stage2_train.recipe_listing import needs

    opened = None
    if cache is not None:
        from emkum.shards.reader import Cache

        opened = Cache.open(cache if is_url(cache) else Path(cache))
    found = needs(name, opened)
    print(json.dumps(vars(found), indent=1) if as_json else found.text())
