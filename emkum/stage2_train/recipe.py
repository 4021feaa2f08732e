"""A recipe: one experiment as a TOML file, read into frozen dataclasses with every range checked."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from emkum.errors import MissingCaptions, MissingField, UnknownRecipe, UsageError
from emkum.shards.layout import CROPS, ids_of_texts

if TYPE_CHECKING:
    from emkum.shards.reader import Cache

RECIPES_DIR = Path(__file__).parent / "recipes"
BATCH_OF_RATES = 256  # learning rates in a recipe are for this batch and grow in proportion to it

Blocks = int | Literal["half", "all"]


def ranged(default: Any, low: float, high: float = math.inf, *, below: bool = False) -> Any:
    """A dataclass field whose number (or every number of a tuple) lies in [low, high]; below: in [low, high)."""
    return field(default=default, metadata={"range": (low, high), "below": below})


@dataclass(frozen=True)
class DataRecipe:
    """What is read from the cache. "auto" stands for the one field of the cache that fits."""

    split: str = "train"
    inputs: str = "auto"  # image/<encoder>@<cut>/tokens, or image/crops-<size>
    encoder: str = "auto"  # the frozen network in front of crops; with token inputs the field's own
    cut: int | Literal["auto"] = ranged("auto", 0)  # the depth it runs to: "auto" is 0; with tokens the field's own
    ids: str = "auto"  # text/<tokenizer>/ids
    targets: str = "auto"  # teacher/<name>/<image|text>/<cls|layers|logits|logits-top>
    captions: Literal["one", "all"] = "one"  # an epoch: each picture once with a drawn caption, or each caption once
    views: Literal["draw", "first"] = "draw"  # of several views of a picture: one drawn each epoch, or view 0


@dataclass(frozen=True)
class StudentRecipe:
    """The trained network: blocks of the frozen networks, shared blocks, heads.

    `image_blocks`: how many of the encoder's blocks follow the cut. "half" takes those that are left of its first
    half (0 when the cut lies behind it), "all" those to its end. `text_blocks`: the first so many of the text encoder.
    """

    image_blocks: Blocks = "half"
    text_blocks: Blocks = "all"
    frozen_image_blocks: int = ranged(0, 0)  # of the student's image blocks, the first so many stay as they are
    frozen_text_blocks: int = ranged(0, 0)
    train_embeddings: bool = False  # the text encoder's token embedding, positions and their norm
    shared: Literal["blocks", "mlp", "attention-mlp"] = "blocks"  # Transformer blocks, or shared_mlp.py
    shared_blocks: int = ranged(1, 0)
    shared_heads: int | Literal["auto"] = ranged("auto", 1)  # "auto": heads of 64 channels
    shared_mlp_ratio: float = ranged(4.0, 0.25, 16.0)
    token_types: bool = True
    image_pooling: Literal["cls", "mean"] = "cls"
    text_pooling: Literal["cls", "mean"] = "cls"
    head_width: int | Literal["auto"] = ranged("auto", 1)  # "auto": the target's width, else the student's


@dataclass(frozen=True)
class ItcRecipe:
    """Image-text contrast; see objectives/itc.py. `layers`: the student's features, or every layer of its shared MLP,
    each with its own temperature, and the mean of their losses."""

    weight: float = ranged(1.0, 0.0)
    temperature: float = ranged(0.07, 0.01, 10.0)  # the start of the learned one
    layers: Literal["last", "all"] = "last"


@dataclass(frozen=True)
class CtlRecipe:
    """Contrastive target loss; see objectives/ctl.py. `bank`: rows of the FIFO, "all" rows of the cache, or "auto":
    a FIFO of 65,536 rows, and every row where the cache has no more than that."""

    weight: float = ranged(1.0, 0.0)
    temperature: float = ranged(0.07, 0.01, 10.0)
    bank: int | Literal["auto", "all"] = field(default="auto", metadata={"range": (0, 2**31)})


@dataclass(frozen=True)
class ClsMseRecipe:
    """Regression of the teacher's CLS; see objectives/cls_mse.py."""

    weight: float = ranged(1.0, 0.0)


@dataclass(frozen=True)
class LayersMseRecipe:
    """Regression of the teacher's mean layer at every token; see objectives/layers_mse.py."""

    weight: float = ranged(1.0, 0.0)


@dataclass(frozen=True)
class LogitsKlRecipe:
    """The teacher's class distribution, predicted by the head; see objectives/logits_kl.py."""

    weight: float = ranged(1.0, 0.0)
    temperature: float = ranged(1.0, 0.01, 100.0)  # T; fixed


@dataclass(frozen=True)
class RankingRecipe:
    """Hinge on cosines of pairs and others; see objectives/ranking.py. `layers` as for itc."""

    weight: float = ranged(1.0, 0.0)
    margin: float = ranged(0.1, 0.0, 2.0)
    layers: Literal["last", "all"] = "last"


@dataclass(frozen=True)
class ObjectivesRecipe:
    """The terms of the loss. A term whose table is absent is not computed."""

    itc: ItcRecipe | None = None
    ctl: CtlRecipe | None = None
    cls_mse: ClsMseRecipe | None = None
    layers_mse: LayersMseRecipe | None = None
    logits_kl: LogitsKlRecipe | None = None
    ranking: RankingRecipe | None = None


@dataclass(frozen=True)
class OptimiserRecipe:
    """AdamW. Rates are for 256 samples a step. Norms, biases, LayerScale, token types and scales do not decay."""

    lr: float = ranged(5e-4, 0.0, 1.0)  # new parts: shared blocks, projections, heads, temperatures
    encoder_lr: float = ranged(5e-5, 0.0, 1.0)  # blocks that start from a pretrained network
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

    Values are TOML or bare words; `objectives.NAME=none` takes an objective out.
    Raises UnknownRecipe for a name, file or key that does not exist, UsageError for a value out of range.
    """
    path = _recipe_path(str(source))
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} is not TOML: {error}", "docs/training.md shows a recipe") from error
    table.setdefault("name", path.stem)
    return recipe_from_table(table, overrides)


def recipe_from_table(table: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a parsed TOML or JSON table; raises as `load_recipe`."""
    nested: dict[str, Any] = _underscored(table)
    for override in overrides:
        _apply_override(nested, override)
    where = f"recipe {nested.get('name', '')}".strip()
    recipe: Recipe = _build(Recipe, nested, where, "")
    _check_kind(recipe, where)
    return recipe


def _recipe_path(source: str) -> Path:
    shipped = shipped_recipes()
    if source in shipped:
        return RECIPES_DIR / f"{source}.toml"
    path = Path(source)
    if path.suffix == ".toml" and path.is_file():
        return path
    close = difflib.get_close_matches(source, shipped, n=1)
    hint = f"did you mean {close[0]}?" if close else "give one of these, or a .toml file"
    missing = "no such file" if path.suffix == ".toml" else "no such recipe"
    raise UnknownRecipe(f"{missing}: {source} (shipped: {', '.join(shipped)})", hint)


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
    value = None if text.strip() == "none" and keys[0] == "objectives" else _override_value(text.strip())
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


def _override_value(text: str) -> Any:
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
            texts.append(f"{len(get_args(option))} numbers")
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
    "pairs": ("itc", "ctl", "cls_mse", "logits_kl", "ranking"),
    "images": ("layers_mse", "logits_kl"),
    "texts": ("layers_mse",),
}
TARGETS_OF_TERMS = {"ctl": "cls", "cls_mse": "cls", "layers_mse": "layers", "logits_kl": "logits"}
KEYS_WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "pairs": (),
    "images": (
        "data.ids",
        "data.captions",
        "student.text_blocks",
        "student.frozen_text_blocks",
        "student.train_embeddings",
        "student.text_pooling",
    ),
    "texts": (
        "data.inputs",
        "data.encoder",
        "data.cut",
        "data.captions",
        "data.views",
        "student.image_blocks",
        "student.frozen_image_blocks",
        "student.image_pooling",
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
    _check_shared(recipe, where)
    nothing = Recipe(recipe.name, recipe.kind).to_json()
    for path in KEYS_WITHOUT_EFFECT[recipe.kind]:
        table, key = path.split(".")
        value = getattr(getattr(recipe, table), key)
        if value != nothing[table][key]:
            raise UsageError(
                f"{where}: {path} = {value!r} has no effect: a sample of kind {recipe.kind} has no such part",
                f"leave {path} out",
            )
    if recipe.data.targets != "auto" and target_pattern(recipe) is None:
        raise UsageError(
            f"{where}: data.targets = {recipe.data.targets!r} has no effect: no objective reads a target",
            "leave data.targets out, or add an objective: --set objectives.ctl.weight=1",
        )
    if recipe.kind != "pairs" and recipe.student.head_width != "auto" and not recipe.objectives.logits_kl:
        raise UsageError(f"{where}: student.head_width is for pairs", "leave it out: layers_mse reads the blocks")


def target_kind(recipe: Recipe) -> str | None:
    """What the recipe's objectives compare with: a teacher's "cls", "layers" or "logits"; None for nothing."""
    return next((TARGETS_OF_TERMS[term] for term in recipe.terms if term in TARGETS_OF_TERMS), None)


def _check_targets(recipe: Recipe, where: str) -> None:
    """A recipe reads one target: raise UsageError where its objectives ask for several."""
    asked = {term: TARGETS_OF_TERMS[term] for term in recipe.terms if term in TARGETS_OF_TERMS}
    if len(set(asked.values())) > 1:
        reads = ", ".join(f"objectives.{term} reads {kind}" for term, kind in asked.items())
        last = list(asked)[-1]
        raise UsageError(
            f"{where}: {reads}, and a recipe has one target", f"take one out: --set objectives.{last}=none"
        )


def _check_shared(recipe: Recipe, where: str) -> None:
    """Raise UsageError for what a student without a shared MLP, or with one, has no use for."""
    wanted = recipe.student
    if wanted.shared != "blocks" and recipe.kind != "pairs":
        raise UsageError(f"{where}: student.shared = {wanted.shared!r} is for pairs", "leave student.shared out")
    if wanted.shared != "blocks" and wanted.shared_blocks != StudentRecipe.shared_blocks:
        raise UsageError(
            f"{where}: student.shared_blocks = {wanted.shared_blocks} has no effect: student.shared = "
            f"{wanted.shared!r} takes the place of the blocks",
            "leave student.shared_blocks out, or --set student.shared=blocks",
        )
    for term in ("itc", "ranking"):
        found = getattr(recipe.objectives, term)
        if found is not None and found.layers == "all" and wanted.shared == "blocks":
            raise UsageError(
                f"{where}: objectives.{term}.layers = 'all' has no effect: student.shared = 'blocks' has one output",
                f'--set objectives.{term}.layers=last, or student.shared="mlp" or "attention-mlp"',
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


# --- the recipe against a cache ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FieldNames:
    """The fields of the cache a recipe reads; None where its kind needs none.

    `inputs`: image tokens, or crops; `encoder`, `cut`: the frozen network they come from, or go through.
    """

    inputs: str | None = None
    encoder: str | None = None
    cut: int = 0
    ids: str | None = None
    targets: str | None = None

    @property
    def text_encoder(self) -> str | None:
        """The network whose tokenizer made the ids, by the field's name."""
        return self.ids.removeprefix("text/").removesuffix("/ids") if self.ids else None

    @property
    def live_prefix(self) -> bool:
        """Whether the inputs are crops, so that the frozen network runs in training."""
        return self.inputs is not None and not self.inputs.endswith("/tokens")

    def needed(self) -> tuple[str, ...]:
        """All names, in the order inputs, ids, targets."""
        return tuple(name for name in (self.inputs, self.ids, self.targets) if name)


TOKENS = re.compile(r"image/(?P<network>.+)@(?P<cut>\d+)/tokens")
IDS = re.compile(r"text/(?P<network>.+)/ids")
IMAGE_CLS = re.compile(r"teacher/(?P<network>.+)/image/cls")
IMAGE_LOGITS = re.compile(r"teacher/(?P<network>.+)/image/logits(-top)?")
IMAGE_LAYERS = re.compile(r"teacher/(?P<network>.+)/image/layers")
TEXT_LAYERS = re.compile(r"teacher/(?P<network>.+)/text/layers")


def target_pattern(recipe: Recipe) -> re.Pattern[str] | None:
    """The names of fields that can be the recipe's targets, or None if it regresses nothing."""
    kind = target_kind(recipe)
    if kind == "layers":
        return IMAGE_LAYERS if recipe.kind == "images" else TEXT_LAYERS
    return {"cls": IMAGE_CLS, "logits": IMAGE_LOGITS, None: None}[kind]


def required_fields(recipe: Recipe, cache: Cache) -> FieldNames:
    """The names of the fields the recipe reads, with every "auto" settled.

    Raises MissingField naming what is lacking and the command that makes it, UsageError where several fields fit,
    MissingCaptions where pairs are needed and the cache has none in the recipe's split.
    """
    wanted = recipe.data
    inputs, encoder, cut, ids = None, None, 0, None
    if recipe.kind in ("pairs", "images"):
        inputs, encoder, cut = _inputs(recipe, cache)
    if recipe.kind == "pairs":
        check_captions(recipe, cache)
    if recipe.kind in ("pairs", "texts"):
        ids = _choose(
            cache, "data.ids", wanted.ids, IDS, recipe, "--text-encoder <text network>", "token ids of the texts"
        )
    pattern, targets = target_pattern(recipe), None
    if pattern is not None:
        kind = target_kind(recipe)
        teacher = (
            "image classifier" if kind == "logits" else "text network" if recipe.kind == "texts" else "image network"
        )
        flag = f"--teacher <{teacher}> --targets {kind}"
        targets = _choose(cache, "data.targets", wanted.targets, pattern, recipe, flag, f"a teacher's {kind} targets")
        _check_temperature(recipe, targets)
    return FieldNames(inputs, encoder, cut, ids, targets)


def _check_temperature(recipe: Recipe, targets: str) -> None:
    """Raise UsageError for a temperature that the largest logits alone do not have: the rest is a sum at 1."""
    wanted = recipe.objectives.logits_kl
    if wanted is not None and wanted.temperature != 1 and targets.endswith("-top"):
        raise UsageError(
            f"recipe {recipe.name}: objectives.logits_kl.temperature = {wanted.temperature:g}, and of {targets} the "
            "logits that were not kept are known as one sum at temperature 1",
            "--set objectives.logits_kl.temperature=1, or extract all logits, without --logits-top",
        )


def _inputs(recipe: Recipe, cache: Cache) -> tuple[str, str, int]:
    wanted = recipe.data
    tokens_exist = any(TOKENS.fullmatch(name) for name in cache.fields)
    crops_wanted = CROPS.fullmatch(wanted.inputs)
    if crops_wanted or (wanted.inputs == "auto" and not tokens_exist):
        kept = f"--store-inputs crops --size {crops_wanted['size']}" if crops_wanted else "--cut 0"
        name = _choose(
            cache, "data.inputs", wanted.inputs, CROPS, recipe, f"--teacher <image network> {kept}", "image inputs"
        )
        return name, _crops_encoder(recipe, cache), 0 if wanted.cut == "auto" else wanted.cut
    name = _choose(
        cache, "data.inputs", wanted.inputs, TOKENS, recipe, "--teacher <image network> --cut 0", "image inputs"
    )
    found = TOKENS.fullmatch(name)
    assert found is not None  # _choose saw to it
    for key, asked, own in (
        ("encoder", wanted.encoder, found["network"]),
        ("cut", wanted.cut, int(found["cut"])),
    ):
        if asked not in ("auto", own):
            raise UsageError(
                f"recipe {recipe.name}: data.{key} = {asked!r}, and the inputs {name} have {key} {own!r}",
                f"leave data.{key} out, or choose inputs that have it with --set data.inputs=...",
            )
    return name, found["network"], int(found["cut"])


def _crops_encoder(recipe: Recipe, cache: Cache) -> str:
    """The frozen network that runs on the crops: the one named, or the only image network the cache keeps."""
    if recipe.data.encoder != "auto":
        if recipe.data.encoder not in cache.models:
            raise MissingField(
                f"the cache keeps no network {recipe.data.encoder} (it keeps {_listed(cache.models)})",
                f"keep it: emkum extract --cache {cache.path} --split {recipe.data.split} --from-crops --store-inputs "
                f"crops --encoder {recipe.data.encoder} --teacher {recipe.data.encoder}",
            )
        return recipe.data.encoder
    texts = {found["network"] for name in cache.fields if (found := IDS.fullmatch(name))}
    images = [name for name in cache.models if name not in texts]
    if len(images) == 1:
        return images[0]
    raise UsageError(
        f"the inputs are crops and the cache keeps {len(images)} image networks ({_listed(images)})",
        "choose one: --set data.encoder=NAME",
    )


def _choose(
    cache: Cache, key: str, wanted: str, pattern: re.Pattern[str], recipe: Recipe, flags: str, what: str
) -> str:
    """The field for `key`: the one asked for, or the only one that fits."""
    command = extract_command(cache, recipe.data.split, flags)
    if wanted != "auto":
        if wanted not in cache.fields:
            raise MissingField(
                f"recipe {recipe.name} reads {wanted}; the cache {cache.path} has {_listed(cache.fields)}",
                f"make it: {command}",
            )
        if not pattern.fullmatch(wanted):
            patterns = (TOKENS, CROPS) if key == "data.inputs" else (pattern,)
            fitting = sorted(name for name in cache.fields if any(p.fullmatch(name) for p in patterns))
            raise UsageError(
                f"recipe {recipe.name}: {key} = {wanted} is not {what} ({' or '.join(map(_shape_of, patterns))})",
                f"choose one that fits: --set {key}={fitting[0]}" if fitting else f"make one: {command}",
            )
        return wanted
    fitting = sorted(name for name in cache.fields if pattern.fullmatch(name))
    if pattern is IDS:
        fitting = ids_of_texts(cache.fields) or fitting
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise MissingField(
            f"recipe {recipe.name} needs {what}; the cache {cache.path} has {_listed(cache.fields)}",
            f"make it: {command}",
        )
    raise UsageError(
        f"recipe {recipe.name}: {len(fitting)} fields fit {key}: {', '.join(fitting)}",
        f"choose one: --set {key}={fitting[0]}",
    )


def _shape_of(pattern: re.Pattern[str]) -> str:
    """The names a pattern fits, for people: teacher/<network>/image/cls."""
    return re.sub(r"\(\?P(<\w+>)[^)]*\)", r"\1", pattern.pattern).replace("(-top)?", "[-top]")


def extract_command(cache: Cache, split: str, flags: str) -> str:
    """The command that adds what `flags` ask for to the cache, with the encoders, cut and size that it has.

    Of a cache that keeps crops, without the tars.
    """
    if "--teacher" not in flags:
        flags = f"--teacher <network> {flags}"
    asks_for_inputs = "--cut" in flags or "--store-inputs" in flags
    from_crops = any(CROPS.fullmatch(name) for name in cache.fields) and not asks_for_inputs
    text_encoders = ids_of_texts(cache.fields)
    source = "--from-crops" if from_crops else "--data <tars>"
    words = [f"emkum extract --cache {cache.path} --split {split} {source} {flags}"]
    for name, cached in cache.fields.items():
        record = getattr(cached, "record", None) or {"fingerprint": {}, "environment": {}}
        size, max_tokens = record["fingerprint"].get("size"), record["fingerprint"].get("max_tokens")
        if (found := TOKENS.fullmatch(name)) and not asks_for_inputs and not from_crops:
            words.append(f"--encoder {_loadable(record, found['network'])} --cut {found['cut']}")
            words += [f"--size {size}"] if size else []
        if name in text_encoders and (found := IDS.fullmatch(name)) and "--text-encoder" not in flags:
            words.append(f"--text-encoder {_loadable(record, found['network'])}")
            words += [f"--max-tokens {max_tokens}"] if max_tokens else []
    return " ".join(words)


def _loadable(record: Mapping[str, Any], name: str) -> str:
    """What `--encoder` takes to find the network of a field again: where it came from, or its name in the catalogue."""
    source = str(record["environment"].get("source", ""))
    return name if not source or source.startswith(("pypi:", "http:", "https:")) else source


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"


def check_captions(recipe: Recipe, cache: Cache) -> None:
    """Raise MissingCaptions unless the split has at least one caption of a picture."""
    if recipe.data.split not in cache.splits or not has_paired_captions(cache, recipe.data.split):
        splits = ", ".join(cache.splits) or "none"
        raise MissingCaptions(
            f"recipe {recipe.name} trains on picture-caption pairs; split {recipe.data.split!r} of {cache.path} "
            f"has no captions of pictures (splits: {splits})",
            "extract tars whose samples have .txt or .json captions with --text-encoder, or train image-kd",
        )


def has_paired_captions(cache: Cache, split: str) -> bool:
    """Whether a caption of the split belongs to a picture."""
    images = cache.captions(split).column("image_row")
    return int(images.null_count) < len(images)


def choose_recipe(cache: Cache, overrides: Sequence[str] = ()) -> tuple[str, str]:
    """The shipped recipe that the cache's fields allow, and why, for people who name none.

    overrides: those the recipe is to be loaded with; data.split among them says which split must have pairs.

    Raises UsageError when no recipe fits, naming what the cache has.
    """
    names = list(cache.fields)
    has = {
        key: any(pattern.fullmatch(name) for name in names)
        for key, pattern in {
            "tokens": TOKENS,
            "crops": CROPS,
            "cls": IMAGE_CLS,
            "logits": IMAGE_LOGITS,
            "layers": IMAGE_LAYERS,
            "text_layers": TEXT_LAYERS,
        }.items()
    }
    inputs, ids = has["tokens"] or has["crops"], ids_of_texts(names)
    splits = [text for path, _, text in (override.partition("=") for override in overrides) if path == "data.split"]
    split = str(_override_value(splits[-1].strip())) if splits else DataRecipe.split
    pairs = inputs and ids and split in cache.splits and has_paired_captions(cache, split)
    if pairs and has["cls"]:
        return "ssmke", "the cache has picture-caption pairs and a teacher's image CLS"
    if pairs and has["logits"]:
        return "shre-transformer", "the cache has picture-caption pairs and a teacher's class logits"
    if inputs and has["layers"]:
        return "image-kd", "the cache has image inputs and a teacher's layers at all tokens"
    if ids and has["text_layers"]:
        return "text-kd", "the cache has token ids and a text teacher's layers"
    if pairs:
        return "itc-only", "the cache has picture-caption pairs and no teacher targets"
    if inputs and not ids and (of_pairs := [name for name in names if IDS.fullmatch(name)]):
        raise UsageError(
            f"{cache.path} holds no token ids but {_listed(of_pairs)}, of a network of pairs: no student's text side "
            "starts from it",
            f"add those of a text network: {extract_command(cache, split, '--text-encoder <text network>')}",
        )
    if names and all(re.fullmatch(r"teacher/[^/]+/audio/.+", name) for name in names):
        raise UsageError(
            f"{cache.path} holds targets of sounds only: {_listed(names)}",
            "no recipe trains on sounds yet; read them with emkum.shards.reader.Cache, or as plain Zarr",
        )
    raise UsageError(
        f"no shipped recipe fits the fields of {cache.path}: {_listed(names)}",
        "docs/training.md lists what each recipe reads; emkum cache info shows what a cache holds",
    )
