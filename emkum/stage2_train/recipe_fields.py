"""What a recipe reads of a cache: which fields, which of several, and the command that makes a missing one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from emkum.errors import MissingCaptions, MissingField, UsageError
from emkum.shards.layout import CROPS, ids_of_texts
from emkum.stage2_train.recipe import DataRecipe, Recipe, compared_role, override_value, target_roles

if TYPE_CHECKING:
    from emkum.shards.reader import Cache


TOKENS = re.compile(r"image/(?P<network>.+)@(?P<cut>\d+)/tokens")
IDS = re.compile(r"text/(?P<network>.+)/ids")
ROLES = {
    "cls": re.compile(r"teacher/(?P<network>.+)/image/cls"),
    "patches": re.compile(r"teacher/(?P<network>.+)/image/patches"),
    "layers": re.compile(r"teacher/(?P<network>.+)/image/layers"),
    "logits": re.compile(r"teacher/(?P<network>.+)/image/logits(-top)?"),
    "text_layers": re.compile(r"teacher/(?P<network>.+)/text/layers"),
    "pair_layers": re.compile(r"teacher/(?P<network>.+)/pair/layers"),
}
"""The names of fields that can serve each of `target_roles`."""


@dataclass(frozen=True)
class FieldNames:
    """The fields of the cache a recipe reads; None where its kind needs none.

    `inputs`: image tokens, or crops; `encoder`, `cut`: the frozen network they come from, or go through. `targets`:
    by role (`recipe.target_roles`). crop_size: of a student of pixels, the side of its crops; without `inputs` they are
    cut out of the source tars again.
    """

    inputs: str | None = None
    encoder: str | None = None
    cut: int = 0
    ids: str | None = None
    targets: Mapping[str, str] = field(default_factory=dict)
    crop_size: int = 0

    @property
    def replayed(self) -> bool:
        """Whether the student reads crops that the cache does not keep."""
        return bool(self.crop_size) and self.inputs is None

    @property
    def text_encoder(self) -> str | None:
        """The network whose tokenizer made the ids, by the field's name."""
        return self.ids.removeprefix("text/").removesuffix("/ids") if self.ids else None

    @property
    def live_prefix(self) -> bool:
        """Whether the inputs are crops, so that the frozen network runs in training."""
        return self.inputs is not None and not self.inputs.endswith("/tokens")

    def needed(self) -> tuple[str, ...]:
        """All names, each once, in the order inputs, ids, targets."""
        return tuple(dict.fromkeys(name for name in (self.inputs, self.ids, *self.targets.values()) if name))


def target_pattern(recipe: Recipe) -> re.Pattern[str] | None:
    """The names of fields that can be the target of a recipe of one modality, or of the head; None for none."""
    roles = target_roles(recipe)
    return ROLES[compared_role(recipe) or roles[0]] if roles else None


def required_fields(recipe: Recipe, cache: Cache) -> FieldNames:
    """The names of the fields the recipe reads, with every "auto" settled.

    Raises MissingField naming what is lacking and the command that makes it, UsageError where several fields fit,
    MissingCaptions where pairs are needed and the cache has none in the recipe's split.
    """
    wanted = recipe.data
    if recipe.student.pixels:
        targets = _targets(recipe, cache)
        return _with_crops(recipe, cache, targets)
    inputs, encoder, cut, ids = None, None, 0, None
    if recipe.kind in ("pairs", "images"):
        inputs, encoder, cut = _inputs(recipe, cache)
    if recipe.kind == "pairs":
        check_captions(recipe, cache)
    if recipe.kind in ("pairs", "texts"):
        ids = _choose(
            cache, "data.ids", wanted.ids, IDS, recipe, "--text-encoder <text network>", "token ids of the texts"
        )
    targets = _targets(recipe, cache)
    return FieldNames(inputs, encoder, cut, ids, targets)


def _targets(recipe: Recipe, cache: Cache) -> dict[str, str]:
    """The field of each role: the one of data.targets that fits it, else the only one of the cache."""
    roles = target_roles(recipe)
    if not roles:
        return {}
    asked = recipe.data.targets
    named = [] if asked == "auto" else [asked] if isinstance(asked, str) else list(asked)
    targets = {}
    for role in roles:
        fitting = [name for name in named if ROLES[role].fullmatch(name)]
        if len(fitting) > 1:
            raise UsageError(
                f"recipe {recipe.name}: data.targets names {len(fitting)} fields of one kind: {', '.join(fitting)}",
                f"name one of them: --set data.targets={fitting[0]}",
            )
        alone = named[0] if len(named) == 1 and len(roles) == 1 else "auto"
        chosen = fitting[0] if fitting else alone
        flag, what = _TEACHERS[role]
        targets[role] = _choose(cache, "data.targets", chosen, ROLES[role], recipe, flag, what)
    if unused := [name for name in named if name not in targets.values()]:
        shapes = ", ".join(_shape_of(ROLES[role]) for role in roles)
        raise UsageError(
            f"recipe {recipe.name}: data.targets names {', '.join(unused)}, and its objectives read {shapes}",
            "leave it out of data.targets",
        )
    if "logits" in targets:
        _check_temperature(recipe, targets["logits"])
    return targets


_TEACHERS = {
    "cls": ("--teacher <image network> --targets cls", "a teacher's cls targets"),
    "patches": ("--teacher <image network> --targets patches", "a teacher's patches"),
    "layers": ("--teacher <image network> --targets layers", "a teacher's layers targets"),
    "logits": ("--teacher <image classifier> --targets logits", "a teacher's logits targets"),
    "text_layers": ("--teacher <text network> --targets layers", "a teacher's layers targets"),
    "pair_layers": ("--teacher <network of pairs> --targets layers", "a teacher's layers of texts that see a picture"),
}


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


def _with_crops(recipe: Recipe, cache: Cache, targets: Mapping[str, str]) -> FieldNames:
    """The crops that a student of pixels reads: those that the cache keeps, else what its targets were made from."""
    asked = recipe.data.inputs
    if asked == "auto" and not any(CROPS.fullmatch(name) for name in cache.fields):
        size = cache.field(next(iter(targets.values()))).fingerprint["size"]
        return FieldNames(targets=targets, crop_size=int(size))
    flags = "--teacher <image network> --store-inputs crops"
    if TOKENS.fullmatch(asked):
        raise UsageError(
            f"recipe {recipe.name}: data.inputs = {asked} is no field of crops, and a student of pixels reads them",
            "leave data.inputs out",
        )
    name = _choose(cache, "data.inputs", asked, CROPS, recipe, flags, "crops for a student of pixels")
    found = CROPS.fullmatch(name)
    assert found is not None  # _choose saw to it
    return FieldNames(name, targets=targets, crop_size=int(found["size"]))


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
            "cls": ROLES["cls"],
            "logits": ROLES["logits"],
            "layers": ROLES["layers"],
            "text_layers": ROLES["text_layers"],
        }.items()
    }
    inputs, ids = has["tokens"] or has["crops"], ids_of_texts(names)
    splits = [text for path, _, text in (override.partition("=") for override in overrides) if path == "data.split"]
    split = str(override_value(splits[-1].strip())) if splits else DataRecipe.split
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
