"""An ablation as a TOML file: a list or a grid of variants of recipes, and the seeds each is trained with."""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emkum.errors import UnknownAblation, UsageError
from emkum.stage2_train.recipe import Recipe, load_recipe, override_value, target_roles
from emkum.stage2_train.recipe_fields import target_pattern

if TYPE_CHECKING:
    from emkum.shards.reader import Cache

ABLATIONS_DIR = Path(__file__).parents[1] / "ablations"
TOP_KEYS = ("recipe", "seeds", "max_steps", "set", "grid", "variant")
VARIANT_KEYS = ("name", "recipe", "set", "live", "max_steps")
EACH, TARGETS = "each", "data.targets"  # `"data.targets" = "each"` in [grid]: every field of the cache that fits
DOCS = "docs/ablations.md shows a file"


@dataclass(frozen=True)
class Variant:
    """One line of the table: a recipe with changes, trained once a seed.

    base: the name without the grid's values. axes: the grid's value of each of its paths. recipe_source: what
    `emkum train --recipe` takes, overrides: what its `--set` takes. recipe: both, read.
    """

    name: str
    base: str
    recipe_source: str
    overrides: tuple[str, ...]
    recipe: Recipe
    axes: Mapping[str, Any] = field(default_factory=dict)
    live: bool = False
    max_steps: int | None = None


@dataclass(frozen=True)
class Ablation:
    """A file, read. tables: its variants, before the grid. grid: lists of values by path. folder: where it lies."""

    name: str
    recipe: str | None
    seeds: tuple[int, ...]
    max_steps: int | None
    set: Mapping[str, Any]
    grid: Mapping[str, Any]
    tables: tuple[Mapping[str, Any], ...]
    folder: Path


def shipped_ablations() -> list[str]:
    """Names of the ablations that come with emkum."""
    return sorted(path.stem for path in ABLATIONS_DIR.glob("*.toml"))


def read_ablation(source: str | Path) -> Ablation:
    """The ablation of a shipped name or a TOML file.

    Raises UnknownAblation for a name, file or key that does not exist, UsageError for a value that cannot be.
    """
    path = _path(str(source))
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"ablation {path} is not TOML: {error}", DOCS) from error
    where = f"ablation {path.stem}"
    _check_keys(table, TOP_KEYS, where, "")
    variants = _typed(table, "variant", list, where, [])
    for number, one in enumerate(variants, start=1):
        if not isinstance(one, dict) or not isinstance(one.get("name"), str) or not one["name"].strip():
            raise UsageError(f"{where}: variant {number} has no name", 'write name = "..." under its [[variant]]')
        _check_keys(one, VARIANT_KEYS, where, f"variant {one['name']}: ")
        _typed(one, "recipe", str, where, None)
        _typed(one, "live", bool, where, False)
        _typed(one, "set", dict, where, {})
        _check_steps(one, where)
    names = [one["name"] for one in variants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{where} has two variants of the name {twice[0]}", "give each a name of its own")
    _check_steps(table, where)
    grid = _flat(_typed(table, "grid", dict, where, {}))
    for key, values in grid.items():
        if values != EACH or key != TARGETS:
            _check_axis(key, values, where)
    return Ablation(
        name=path.stem,
        recipe=_typed(table, "recipe", str, where, None),
        seeds=_seeds(table, where),
        max_steps=table.get("max_steps"),
        set=_flat(_typed(table, "set", dict, where, {})),
        grid=grid,
        tables=tuple(variants),
        folder=path.parent,
    )


def expand(
    ablation: Ablation, cache: Cache | None, max_steps: int | None = None, overrides: Sequence[str] = ()
) -> list[Variant]:
    """All variants: each table of the file with each combination of the grid, in the file's order.

    cache: what `"data.targets" = "each"` looks at. max_steps, overrides (`path=value`): in place of the file's.
    Raises UnknownRecipe and UsageError, naming the variant, for a recipe or a value that cannot be.
    """
    where = f"ablation {ablation.name}"
    given = dict(map(_given, overrides))
    found = []
    for table in ablation.tables or ({},):
        source = table.get("recipe", ablation.recipe)
        if source is None:
            lacking = f"variant {table['name']} of {where}" if table else where
            raise UsageError(f"{lacking} names no recipe", 'write recipe = "..." at the top of the file, or under it')
        source = _recipe_source(source, ablation.folder)
        changes = {**ablation.set, **_flat(table.get("set", {})), **given}
        for axes in _combinations(ablation, _read(source, changes, where, str(table.get("name", ""))), cache):
            if both := sorted(set(axes) & set(changes)):
                raise UsageError(
                    f"{where}: {both[0]} is in [grid] and set too", "take it out of one: the grid says its values"
                )
            labels = _labels(axes)
            base = table.get("name", "") if table else "" if labels else Path(source).stem
            name = " ".join(filter(None, (base, *labels)))
            settings = {**changes, **axes}
            recipe = _read(source, settings, where, name)
            steps = max_steps or table.get("max_steps", ablation.max_steps)
            overrides = tuple(_override(path, value) for path, value in settings.items())
            found.append(Variant(name, base, source, overrides, recipe, axes, bool(table.get("live")), steps))
    names = [variant.name for variant in found]
    folders = [folder_name(name) for name in names]
    for number, folder in enumerate(folders):
        if folder in folders[:number]:
            first = names[folders.index(folder)]
            raise UsageError(
                f"{where}: two variants have one folder, {folder}: {first!r} and {names[number]!r}",
                "give the variants other names, or take a value out that is in the grid twice",
            )
    return found


def folder_name(variant: str) -> str:
    """A variant's name as the name of its folder: letters, digits and ._=+- of it, the rest as one dash each."""
    return re.sub(r"[^\w.=+-]+", "-", variant).strip("-.") or "variant"


# --- the parts of a file -----------------------------------------------------------------------------------------


def _path(source: str) -> Path:
    shipped = shipped_ablations()
    if source in shipped:
        return ABLATIONS_DIR / f"{source}.toml"
    path = Path(source)
    if path.suffix == ".toml" and path.is_file():
        return path
    close = difflib.get_close_matches(source, shipped, n=1)
    hint = f"did you mean {close[0]}?" if close else "give one of these, or a .toml file"
    missing = "no such file" if path.suffix == ".toml" else "no such ablation"
    raise UnknownAblation(f"{missing}: {source} (shipped: {', '.join(shipped)})", hint)


def _check_keys(table: Mapping[str, Any], known: Sequence[str], where: str, prefix: str) -> None:
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"keys there: {', '.join(known)}"
            raise UnknownAblation(f"{where}: {prefix}there is no key {key}", hint)


def _typed(table: Mapping[str, Any], key: str, kind: type, where: str, default: Any) -> Any:
    value = table.get(key, default)
    if value is not default and type(value) is not kind:
        words = {str: "a string", list: "a list of tables", dict: "a table", bool: "true or false"}
        raise UsageError(f"{where}: {key} = {value!r} is not {words[kind]}", DOCS)
    return value


def _check_steps(table: Mapping[str, Any], where: str) -> None:
    steps = table.get("max_steps")
    if steps is not None and (type(steps) is not int or steps < 1):
        raise UsageError(f"{where}: max_steps = {steps!r} is not a number of steps", "give 1 or more, or leave it out")


def _seeds(table: Mapping[str, Any], where: str) -> tuple[int, ...]:
    seeds = table.get("seeds", [0])
    good = isinstance(seeds, list) and seeds and all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds)
    if not good or len(set(seeds)) < len(seeds):
        raise UsageError(f"{where}: seeds = {seeds!r} is not a list of different numbers from 0", "seeds = [0, 1, 2]")
    return tuple(seeds)


def _check_axis(path: str, values: Any, where: str) -> None:
    if not isinstance(values, list) or not values:
        raise UsageError(
            f"{where}: [grid] {path} = {values!r} is not a list of values", f'write "{path}" = [first, second]'
        )
    written = [_value_text(value) for value in values]
    if len(set(written)) < len(written):
        raise UsageError(f"{where}: [grid] {path} = {values!r} has a value twice", "each stands for a variant")


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted paths; keys may be written `cls-mse` or `cls_mse`."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        path = prefix + key.replace("-", "_")
        found |= _flat(value, path + ".") if isinstance(value, Mapping) else {path: value}
    return found


def _recipe_source(source: str, folder: Path) -> str:
    """A recipe's file may be named from the folder of the ablation's."""
    beside = folder / source
    return str(beside) if source.endswith(".toml") and beside.is_file() else source


def _read(source: str, settings: Mapping[str, Any], where: str, name: str) -> Recipe:
    try:
        return load_recipe(source, [_override(path, value) for path, value in settings.items()])
    except UsageError as error:
        raise type(error)(f"{where}, variant {name}: {error.what}" if name else error.what, error.way_out) from error


def _override(path: str, value: Any) -> str:
    return f"{path}={_value_text(value)}" if value != "none" or not path.startswith("objectives.") else f"{path}=none"


def _given(override: str) -> tuple[str, Any]:
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise UsageError(f"--set {override} is not path=value", "for example --set training.batch=128")
    return path.strip().replace("-", "_"), override_value(text.strip())


def _value_text(value: Any) -> str:
    """A value as TOML, which JSON is for all that a recipe holds."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan"
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:  # a date, which TOML has and no recipe
        return str(value)


def _combinations(ablation: Ablation, recipe: Recipe, cache: Cache | None) -> list[dict[str, Any]]:
    """The grid's values by path, for each combination; {} alone where there is no grid."""
    axes = {}
    for path, values in ablation.grid.items():
        chosen = _fitting_targets(recipe, cache) if values == EACH else values
        if chosen:
            axes[path] = chosen
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _fitting_targets(recipe: Recipe, cache: Cache | None) -> list[str]:
    """The fields of the cache that the recipe can learn from; none for a recipe that has no teacher."""
    roles = target_roles(recipe)
    if len(roles) > 1:
        raise UsageError(
            f'[grid] "{TARGETS}" = "{EACH}": recipe {recipe.name} reads {len(roles)} targets ({", ".join(roles)})',
            "write the lists of fields to compare",
        )
    pattern = target_pattern(recipe)
    if pattern is None or cache is None:
        return []
    return sorted(name for name in cache.fields if pattern.fullmatch(name))


def _labels(axes: Mapping[str, Any]) -> list[str]:
    """`lr=0.0001` of a path and its value; the whole path where two end alike."""
    ends = [path.rpartition(".")[2] for path in axes]
    found = []
    for (path, value), end in zip(axes.items(), ends, strict=True):
        if path == TARGETS and isinstance(value, str) and value.startswith("teacher/"):
            found.append(f"teacher={value.split('/')[1]}")
            continue
        text = value if isinstance(value, str) else _value_text(value)
        found.append(f"{end if ends.count(end) == 1 else path}={text}")
    return found
