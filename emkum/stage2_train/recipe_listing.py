"""What the shipped recipes are, by the comment each file opens with, and what feeds them; torch is not loaded."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emkum.errors import EmkumError, UsageError
from emkum.shards.statistics.kept import load
from emkum.stage2_train.recipe import RECIPES_DIR, Recipe, load_recipe, shipped_recipes, target_roles
from emkum.stage2_train.recipe_fields import required_fields
from emkum.stage2_train.recipe_statistics import required_statistics

if TYPE_CHECKING:
    from emkum.shards.reader import Cache

SECTIONS = ("Reads", "Trains", "Costs", "Reaches")
WIDTH = 120  # of what is printed
_SECTION = re.compile(rf"({'|'.join(SECTIONS)})\s+(.*)")
# The published teacher of each kind of target, and what of it is kept; the last for recipes that have no teacher.
TEACHERS = {
    "cls": ("beit2", "cls"),
    "patches": ("beit2", "patches"),
    "layers": ("data2vec2-image", "layers"),
    "logits": ("resnet50-a1", "logits"),
    "text_layers": ("bert-base", "layers"),
    "": ("beit2", "cls"),
}
PIXEL_TEACHERS = {"logits": ("resnet101", "logits")}  # of students that read pixels, where it is another
PAIR_TEACHERS = {"layers": "beit3", "text_layers": "beit3-text", "pair_layers": "beit3-pair"}


@dataclass(frozen=True)
class Header:
    """The comment that a recipe opens with. what: one sentence or two; the rest by the words of SECTIONS."""

    name: str
    what: str
    command: str
    reads: str
    trains: str
    costs: str
    reaches: str

    def to_json(self) -> dict[str, str]:
        return dict(vars(self))


def shipped_headers() -> list[Header]:
    """Those of all recipes that come with emkum, by name."""
    return [read_header(RECIPES_DIR / f"{name}.toml") for name in shipped_recipes()]


def read_header(path: Path) -> Header:
    """The opening comment of a recipe's file; parts that are not there are empty."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" ").rstrip())
    what: list[str] = []
    command, found, section = "", dict.fromkeys(SECTIONS, ""), ""
    for line in lines:
        opened = _SECTION.fullmatch(line)
        if opened:
            section = opened[1]
            found[section] = opened[2].strip()
        elif section:
            found[section] = f"{found[section]} {line.strip()}".strip()
        elif line.strip().startswith("emkum train"):
            command = line.strip()
        elif line.strip() and not command:
            what.append(line.strip())
    sentence = " ".join(what).removeprefix(f"{path.stem}: ")
    return Header(path.stem, sentence, command, *(found[section] for section in SECTIONS))


def listing(headers: Sequence[Header]) -> str:
    """The recipes for people: what each is, reads, and reached where it was published."""
    indent = 2 + max(len(header.name) for header in headers)
    lines = []
    for header in headers:
        parts = (f"{header.name:{indent}}{header.what}", f"reads: {header.reads}", header.reaches)
        lines += [_wrapped(parts[0], "", indent), *(_wrapped(part, " " * indent, indent) for part in parts[1:])]
    return "\n".join(lines)


def _wrapped(text: str, first: str, indent: int) -> str:
    wrapper = textwrap.TextWrapper(WIDTH, break_on_hyphens=False, break_long_words=False)
    wrapper.initial_indent, wrapper.subsequent_indent = first, " " * indent
    return wrapper.fill(text)


def show(source: str) -> str:
    """One recipe, shipped or a file: its opening comment, then every setting with its value. Raises UnknownRecipe."""
    recipe, header = load_recipe(source), read_header(_path(source))
    lines = [f"{recipe.name}: {header.what}" if header.what else recipe.name, ""]
    lines += [f"  {header.command}", ""] if header.command else []
    for section in SECTIONS:
        text = getattr(header, section.lower())
        lines += [_wrapped(f"{section:8} {text}", "", 9)] if text else []
    return "\n".join([*lines, "", "Settings, those of the file and all others:", "", recipe.to_toml().rstrip()])


def show_json(source: str) -> dict[str, Any]:
    """The same for programs."""
    return read_header(_path(source)).to_json() | {"settings": load_recipe(source).to_json()}


def _path(source: str) -> Path:
    return RECIPES_DIR / f"{source}.toml" if source in shipped_recipes() else Path(source)


# --- what feeds a recipe -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """What a recipe reads, and the commands that make it. fields: those that a cache has for it, if all are there."""

    recipe: str
    reads: str
    commands: tuple[str, ...]
    fields: tuple[str, ...] = ()
    lacks: str = ""

    def text(self) -> str:
        """For people: commands can be copied as they are."""
        if self.fields:
            return f"{self.recipe} has all it reads: {', '.join(self.fields)}"
        said = [f"{self.recipe} lacks something: {self.lacks}"] if self.lacks else []
        said += [_wrapped(f"reads {self.reads}", "# ", 2).replace("\n", "\n#")] if self.reads and not self.lacks else []
        return "\n".join([*said, *self.commands])


def needs(source: str, cache: Cache | None = None) -> Needs:
    """The commands that would feed a recipe: from nothing, or what a cache lacks, statistics among it.

    Of several things that a cache lacks the first is named; its command often makes the others too. Raises
    UnknownRecipe, and UsageError where several fields fit.
    """
    recipe, reads = load_recipe(source), read_header(_path(source)).reads
    if cache is None:
        return Needs(recipe.name, reads, extract_commands(recipe))
    try:
        names = required_fields(recipe, cache)
        for statistic in required_statistics(recipe, cache, names).values():
            load(cache, statistic)
        return Needs(recipe.name, reads, (), fields=names.needed())
    except EmkumError as error:
        if type(error) is UsageError:  # several fit: nothing is lacking
            raise
        command = re.fullmatch(r"\w+ it: (emkum .*)", error.way_out)
        if command is None:  # as where the split has no captions
            return Needs(recipe.name, reads, (), lacks=f"{error.what}: {error.way_out}")
        return Needs(recipe.name, reads, (command[1],), lacks=error.what)


def extract_commands(recipe: Recipe, cache: str = "./shards") -> tuple[str, ...]:
    """Full commands for the published teachers: the split trained on, then the one validated on."""
    roles = target_roles(recipe)
    if "pair_layers" in roles:
        chosen = [(PAIR_TEACHERS[role], "layers") for role in roles if role in PAIR_TEACHERS]
    else:
        teachers = {**TEACHERS, **(PIXEL_TEACHERS if recipe.student.pixels else {})}
        chosen = [teachers[role] for role in roles or ("",)]
    flags = [f"--teacher {teacher}" for teacher in dict.fromkeys(teacher for teacher, _ in chosen)]
    texts = PAIR_TEACHERS["text_layers"] if "pair_layers" in roles else TEACHERS["text_layers"][0]
    if recipe.kind == "images":
        flags.append("--text-encoder none")
    elif recipe.kind == "pairs":
        flags.append(f"--text-encoder {texts}")
    if recipe.student.pixels:
        flags.append("--store-inputs crops")
    if "logits" in roles:  # a classifier's layers are no tokens for a Transformer to start from
        flags.append(f"--encoder {TEACHERS[''][0]}")
    flags.append(f"--targets {','.join(dict.fromkeys(kept for _, kept in chosen))}")
    splits = (recipe.data.split, recipe.evaluation.split)
    return tuple(
        f"emkum extract --cache {cache} --split {split} --data <tars of {split}> {' '.join(flags)}"
        for split in dict.fromkeys(split for split in splits if split != "none")
    )
