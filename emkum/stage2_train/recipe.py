"""A recipe: one experiment as a TOML file, read into frozen dataclasses with every range checked."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from emkum.errors import UnknownRecipe, UsageError
from emkum.stage2_train.objective_recipes import ObjectivesRecipe, ranged
from emkum.stage2_train.pixel_recipe import check_augmentations, check_pixels
from emkum.stage2_train.student_recipe import IMAGE_KEYS, TEXT_KEYS, StudentRecipe, check_student

RECIPES_DIR = Path(__file__).parent / "recipes"
THESIS_NAMES = {"ssmke-mse": "cls-mse", "no-teacher": "itc-only"}  # what the thesis calls them
BATCH_OF_RATES = 256  # learning rates in a recipe are for this batch and grow in proportion to it


@dataclass(frozen=True)
class DataRecipe:
    """What is read from the cache. "auto" stands for the one field of the cache that fits."""

    split: str = "train"
    inputs: str = "auto"  # image/<encoder>@<cut>/tokens, or image/crops-<size>
    encoder: str = "auto"  # the frozen network in front of crops; with token inputs the field's own
    cut: int | Literal["auto"] = ranged("auto", 0)  # the depth it runs to: "auto" is 0; with tokens the field's own
    ids: str = "auto"  # text/<tokenizer>/ids
    targets: str | tuple[str, ...] = "auto"  # teacher/<name>/<image|text|pair>/<cls|patches|layers|logits|logits-top>
    fraction: float = ranged(1.0, 0.0, 1.0)  # of the split's pictures, or texts; which ones the seed decides
    captions: Literal["one", "all"] = "one"  # an epoch: each picture once with a drawn caption, or each caption once
    views: Literal["draw", "first"] = "draw"  # of several views of a picture: one drawn each epoch, or view 0
    token_dropout: float = ranged(0.0, 0.0, 1.0, below=True)  # share of patches left out of each picture; CLS stays
    mixup: float = ranged(0.0, 0.0, 10.0)  # alpha of the Beta that weighs two mixed samples; 0: none are mixed


@dataclass(frozen=True)
class OptimiserRecipe:
    """AdamW. Rates are for 256 samples a step. Norms, biases, LayerScale, token types and scales do not decay."""

    lr: float = ranged(5e-4, 0.0, 1.0)  # new parts: shared blocks, projections, heads, temperatures
    encoder_lr: float = ranged(5e-5, 0.0, 1.0)  # blocks that start from a pretrained network
    image_encoder_lr: float | Literal["auto"] = ranged("auto", 0.0, 1.0)  # "auto": encoder_lr
    text_encoder_lr: float | Literal["auto"] = ranged("auto", 0.0, 1.0)  # "auto": encoder_lr
    shared_lr: float | Literal["auto"] = ranged("auto", 0.0, 1.0)  # shared blocks or MLP; "auto": lr
    layer_decay: float = ranged(1.0, 0.01, 1.0)  # each block of an encoder has so much of the rate of the next
    betas: tuple[float, float] = ranged((0.9, 0.98), 0.0, 1.0, below=True)
    eps: float = ranged(1e-6, 1e-12, 1.0)
    weight_decay: float = ranged(0.01, 0.0, 10.0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = ranged(0.1, 0.0, 1.0)  # fraction of all steps
    final_lr: float = ranged(0.0, 0.0, 1.0)  # fraction of the rate left at the end of the cosine
    clip_norm: float = ranged(1.0, 0.0)  # 0: no clipping


@dataclass(frozen=True)
class TrainingRecipe:
    """Length and batch."""

    epochs: int = ranged(10, 1)
    batch: int = ranged(256, 1)
    accumulate: int = ranged(1, 1)  # the optimiser steps after so many batches, with the mean of their gradients
    ema: float = ranged(0.0, 0.0, 1.0, below=True)  # decay of the average of the student's weights; 0: none is kept

    @property
    def step_batch(self) -> int:
        """Samples of a step of the optimiser; rates grow with it."""
        return self.batch * self.accumulate


@dataclass(frozen=True)
class EvaluationRecipe:
    """When the student is scored during training, and on what."""

    split: str = "val"  # a split the cache does not have, such as "none": no validation
    every_epochs: int = ranged(1, 1)
    batch: int = ranged(256, 1)
    best: str = "auto"  # the score that decides what is best, a column of the log; "auto": val_mean_recall, or val_loss
    patience: int = ranged(0, 0)  # stop after so many validations in a row that were not the best; 0: never


@dataclass(frozen=True)
class Recipe:
    """One experiment, complete. `kind` says what a sample is: a picture with its captions, a picture, a text."""

    name: str
    kind: Literal["pairs", "images", "texts"]
    data: DataRecipe = field(default_factory=DataRecipe)
    student: StudentRecipe = field(default_factory=StudentRecipe)
    objectives: ObjectivesRecipe = field(default_factory=ObjectivesRecipe)
    optimiser: OptimiserRecipe = field(default_factory=OptimiserRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the objectives in use, as in the TOML file."""
        named = dataclasses.fields(self.objectives)
        return tuple(f.name for f in named if getattr(self.objectives, f.name) is not None)

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON values; absent objectives are left out."""
        plain: dict[str, Any] = _plain(self)
        return plain

    def to_toml(self) -> str:
        """The recipe as a TOML file that loads to an equal recipe."""
        return "\n".join(_toml_lines(self.to_json())) + "\n"


# --- loading -----------------------------------------------------------------------------------------------------


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with emkum."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.toml"))


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a shipped name or a TOML file, with `path=value` overrides applied.

    Values are TOML or bare words; `objectives.NAME=none` takes an objective out. A file may begin with `base = NAME`,
    of a shipped recipe that it says the differences to; `NAME = "none"` under [objectives] takes one out there.
    Raises UnknownRecipe for a name, file or key that does not exist, UsageError for a value out of range.
    """
    path = _recipe_path(str(source))
    table = _read_toml(path)
    if (base := table.pop("base", None)) is not None:
        table = _on_base(base, table, path)
    table.setdefault("name", path.stem)
    return recipe_from_table(table, overrides)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return _underscored(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} is not TOML: {error}", "docs/training.md shows a recipe") from error


def _on_base(base: Any, table: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The shipped recipe `base` with the values of `table` in place of its own."""
    if base not in shipped_recipes():
        raise UnknownRecipe(
            f"recipe {path} has base = {base!r}, which is no shipped recipe ({', '.join(shipped_recipes())})",
            "name one of these, or leave base out",
        )
    found = _read_toml(RECIPES_DIR / f"{base}.toml")
    if "base" in found:
        raise UnknownRecipe(f"recipe {path} has base = {base!r}, which has a base itself", f"use {found['base']!r}")
    return _merged(found, table)


def _merged(base: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in table.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = _merged(base[key], value) if both else value
    return merged


def recipe_from_table(table: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a parsed TOML or JSON table; raises as `load_recipe`."""
    nested: dict[str, Any] = _underscored(table)
    for override in overrides:
        _apply_override(nested, override)
    if isinstance(terms := nested.get("objectives"), Mapping):
        nested["objectives"] = {term: value for term, value in terms.items() if value != "none"}
    where = f"recipe {nested.get('name', '')}".strip()
    recipe: Recipe = _build(Recipe, nested, where, "")
    _check_kind(recipe, where)
    return recipe


def _recipe_path(source: str) -> Path:
    shipped = shipped_recipes()
    source = THESIS_NAMES.get(source, source)
    if source in shipped:
        return RECIPES_DIR / f"{source}.toml"
    path = Path(source)
    if path.suffix == ".toml" and path.is_file():
        return path
    close = difflib.get_close_matches(source, shipped, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    missing = "no such file" if path.suffix == ".toml" else "no such recipe"
    raise UnknownRecipe(f"{missing}: {source}", f"{hint}`emkum recipes` lists those that come with emkum")


def _underscored(table: Mapping[str, Any]) -> dict[str, Any]:
    """Keys may be written `cls-mse` or `cls_mse`."""
    return {
        key.replace("-", "_"): _underscored(value) if isinstance(value, Mapping) else value
        for key, value in table.items()
    }


def _apply_override(table: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = [key.strip().replace("-", "_") for key in path.split(".")]
    if not equals or not all(keys):
        raise UsageError(f"--set {override} is not path=value", "for example --set training.batch=128")
    value = None if text.strip() == "none" and keys[0] == "objectives" else override_value(text.strip())
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise UsageError(f"--set {override}: {key} is a value, not a table", "docs/training.md lists the keys")
    if value is None:
        table.pop(keys[-1], None)
    elif isinstance(value, dict):
        table[keys[-1]] = _underscored(value)
    else:
        table[keys[-1]] = value


def override_value(text: str) -> Any:
    """A TOML value; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _build(cls: Any, table: Mapping[str, Any], where: str, path: str) -> Any:
    """An instance of the dataclass `cls` from `table`; every key known, every value typed and in range."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in table:
        if key not in fields:
            raise _unknown_key(path + key, list(fields), where)
    hints = get_type_hints(cls)
    values = {}
    for name, spec in fields.items():
        if name in table:
            values[name] = _value(hints[name], table[name], spec, where, path + name)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise UsageError(f"{where} lacks {path}{name}", "docs/training.md lists the keys of a recipe")
    return cls(**values)


def _unknown_key(path: str, known: list[str], where: str) -> UnknownRecipe:
    parent, _, key = path.rpartition(".")
    close = difflib.get_close_matches(key, known, n=1)
    prefix = parent + "." if parent else ""
    hint = f"did you mean {prefix}{close[0]}?" if close else f"keys there: {', '.join(known)}"
    return UnknownRecipe(f"{where} has no key {path}", hint)


def _value(hint: Any, value: Any, spec: dataclasses.Field[Any], where: str, path: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option):
            if not isinstance(value, Mapping):
                raise UsageError(f"{where}: {path} = {value!r} is not a table", f"write [{path}] and its keys")
            return _build(option, value, where, path + ".")
    for option in options:
        fits, converted = _fits(option, value)
        if fits:
            _check_range(converted, value, spec, where, path)
            return converted
    raise UsageError(f"{where}: {path} = {value!r} is not {_described(options)}", f"change it with --set {path}=...")


def _fits(option: Any, value: Any) -> tuple[bool, Any]:
    """Whether the TOML value is of the type, and the value as that type (an integer serves as a float)."""
    if get_origin(option) is Literal:
        return value in get_args(option) and type(value) in {type(v) for v in get_args(option)}, value
    if get_origin(option) is tuple:
        members = get_args(option)
        if isinstance(value, (list, tuple)) and members[1:] == (...,):
            members = members[:1] * len(value)
        if not isinstance(value, (list, tuple)) or len(value) != len(members):
            return False, value
        pairs = [_fits(member, item) for member, item in zip(members, value, strict=True)]
        return all(fits for fits, _ in pairs), tuple(item for _, item in pairs)
    if option is float and type(value) is int:
        return True, float(value)
    return type(value) is option, value


def _described(options: Sequence[Any]) -> str:
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    texts: list[str] = []
    for option in options:
        if get_origin(option) is Literal:
            texts += [repr(value) for value in get_args(option)]
        elif get_origin(option) is tuple:
            texts.append("a list of strings" if ... in get_args(option) else f"{len(get_args(option))} numbers")
        else:
            texts.append(words.get(option, str(option)))
    return " or ".join(texts)


def _check_range(value: Any, written: Any, spec: dataclasses.Field[Any], where: str, path: str) -> None:
    bounds = spec.metadata.get("range", (-math.inf, math.inf) if type(value) is not int else (0, math.inf))
    numbers = value if isinstance(value, tuple) else (value,)
    below = spec.metadata.get("below", False)
    for number in numbers:
        if type(number) not in (int, float):
            continue
        within = bounds[0] <= number < bounds[1] if below else bounds[0] <= number <= bounds[1]
        if not within or not math.isfinite(number):
            span = f">= {bounds[0]:g}" if bounds[1] == math.inf else f"within {bounds[0]:g} and {bounds[1]:g}"
            span += " and finite" if not math.isfinite(number) else f", below {bounds[1]:g}" if below else ""
            raise UsageError(f"{where}: {path} = {written!r} is not {span}", f"change it with --set {path}=...")


KIND_TERMS = {
    "pairs": (
        "itc",
        "itc_queue",
        "ctl",
        "cls_mse",
        "logits_kl",
        "ranking",
        "itm",
        "cmli",
        "target_cmli",
        "reduced",
        "codes",
        "codes_vq",
        "dino",
        "mvlm",
        "branches",
    ),
    "images": ("layers_mse", "logits_kl", "cls_mse"),
    "texts": ("layers_mse",),
}
COMPARED = {  # terms that meet their target in the head's output
    "ctl": "cls",
    "cls_mse": "cls",
    "logits_kl": "logits",
    "reduced": "cls",
    "dino": "cls",
}
KEYS_WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "pairs": (),
    "images": (
        "data.ids",
        "data.captions",
        *(f"student.{key}" for key in TEXT_KEYS),
    ),
    "texts": (
        "data.inputs",
        "data.encoder",
        "data.cut",
        "data.captions",
        "data.views",
        "data.token_dropout",
        "data.mixup",
        *(f"student.{key}" for key in IMAGE_KEYS),
    ),
}


def _check_kind(recipe: Recipe, where: str) -> None:
    allowed = KIND_TERMS[recipe.kind]
    for term in recipe.terms:
        if term not in allowed:
            raise UsageError(
                f"{where}: objectives.{term} is not for kind {recipe.kind}", f"{recipe.kind} take {', '.join(allowed)}"
            )
    if not recipe.terms:
        raise UsageError(f"{where} has no objective", f"{recipe.kind} take {', '.join(allowed)}")
    _check_targets(recipe, where)
    check_student(recipe, where)
    check_pixels(recipe, where)
    check_augmentations(recipe, where)
    nothing = Recipe(recipe.name, recipe.kind).to_json()
    for path in KEYS_WITHOUT_EFFECT[recipe.kind]:
        table, key = path.split(".")
        value = getattr(getattr(recipe, table), key)
        if value != nothing[table][key]:
            raise UsageError(
                f"{where}: {path} = {value!r} has no effect: a sample of kind {recipe.kind} has no such part",
                f"leave {path} out",
            )
    if recipe.data.targets != "auto" and not target_roles(recipe):
        raise UsageError(
            f"{where}: data.targets = {recipe.data.targets!r} has no effect: no objective reads a target",
            "leave data.targets out, or add an objective: --set objectives.ctl.weight=1",
        )
    if recipe.kind != "pairs" and recipe.student.head_width != "auto" and not recipe.objectives.logits_kl:
        raise UsageError(f"{where}: student.head_width is for pairs", "leave it out: layers_mse reads the blocks")


def target_roles(recipe: Recipe) -> tuple[str, ...]:
    """What the recipe's objectives read of teachers, each once: cls, patches, layers, logits; text_layers, pair_layers.

    Those without a prefix are of pictures. recipe_fields.py says which fields they are.
    """
    return tuple(dict.fromkeys(role for term in recipe.terms for role in roles_of_term(recipe, term)))


def roles_of_term(recipe: Recipe, term: str) -> tuple[str, ...]:
    """What one objective reads of teachers, as `target_roles`."""
    if term == "layers_mse":
        return ("text_layers",) if recipe.kind == "texts" else ("layers",)
    if term == "branches":
        wanted = recipe.objectives.branches
        assert wanted is not None
        weights = {"layers": wanted.image, "text_layers": wanted.text, "pair_layers": wanted.fused}
        return tuple(role for role, weight in weights.items() if weight)
    if term == "mvlm":
        return ("patches",) if recipe.objectives.mvlm and recipe.objectives.mvlm.patch_share else ()
    others = {"target_cmli": "patches", "codes": "cls", "codes_vq": "cls"}
    role = {**COMPARED, **others}.get(term)
    return (role,) if role else ()


def compared_role(recipe: Recipe) -> str | None:
    """The target that the head's output is compared with: cls or logits; None for none."""
    return next((COMPARED[term] for term in recipe.terms if term in COMPARED), None)


def _check_targets(recipe: Recipe, where: str) -> None:
    """One head is compared with one target: raise UsageError where objectives ask for several."""
    asked = {term: COMPARED[term] for term in recipe.terms if term in COMPARED}
    if recipe.kind != "pairs":  # of one modality, one objective is the loss, and the score
        asked = {term: roles_of_term(recipe, term)[0] for term in recipe.terms}
    if len(set(asked.values())) > 1:
        reads = ", ".join(f"objectives.{term} reads {kind}" for term, kind in asked.items())
        last = list(asked)[-1]
        raise UsageError(
            f"{where}: {reads}, and a recipe has one target", f"take one out: --set objectives.{last}=none"
        )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: _plain(item) for name, item in items if item is not None}
    return list(value) if isinstance(value, tuple) else value


def _toml_lines(table: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines = [f"{key} = {_toml_value(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += ["", f"[{prefix}{key}]", *_toml_lines(value, f"{prefix}{key}.")]
    return lines


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)
