"""What the weights of a network have learned from, and the refusal of those a study must not use."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emkum.errors import EmkumError, RefusedTeacher, UsageError
from emkum.models import whole_timm
from emkum.models.backbone import Modality
from emkum.models.families.checkpoint import Checkpoint, Shapes, open_folder
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.families.originals import open_original, original_file
from emkum.models.families.registry import CATALOGUE, family_of, family_of_original, is_original, key_map_of
from emkum.models.sources import Source, entry_of_file, misfit, read_source

LABELS = frozenset({"class_labels", "transcripts", "text_pairs"})
"""Words of the supervision that --label-free refuses: somebody said for every sample, or pair, what is right."""

TEXT = frozenset({"paired_text", "clip_tokenizer"})
"""Words that --text-free refuses too: text took part, though no label did."""

UNKNOWN = "unknown"

_SAID = {
    "class_labels": "labels",
    "transcripts": "transcripts of speech",
    "text_pairs": "pairs of texts that people matched",
    "paired_text": "pictures with captions",
    "clip_tokenizer": "the codes of a tokenizer that was distilled from CLIP, which learned from captions",
}
# Parts of the names under which fine-tuned weights are published.
_IN_NAMES = {
    "class_labels": r"ft[a-z0-9]*|fine-?tuned[a-z0-9]*|in1k(?!.*(dino|mae|ijepa))|imagenet-?1k|ade20k|lc"
    r"|linear[a-z0-9]*|vqa[a-z0-9]*|nlvr2|mnli|squad[a-z0-9]*|sst-?2|qqp|mrpc",
    "transcripts": r"10m|1h|10h|100h|960h",
    "paired_text": r"retrieval|captioning|coco|f30k|clip|siglip",
}
# Tensors that only a supervised task leaves behind. Not those of DINO's head (head.mlp, head.last_layer), nor lm_head.
_IN_TENSORS = {
    "class_labels": r"(^|\.)(head|heads\.head|classifier|linear_head|fc_norm|qa_outputs|score)\.(\d+\.)?(weight|bias)$"
    r"|^blocks\.\d+\.attn\.relative_position_bias_table$",
    "paired_text": r"(^|\.)(logit_scale|text_projection|visual_projection|itm_score|itc_\w+_proj)(\.|$)",
}
_CTC_WORDS = 100  # an output of so few rows on a network that hears: letters, where pre-training predicts codes
_IN_ARCHITECTURES = {
    "class_labels": r"For\w*Classification|ForQuestionAnswering|ForMultipleChoice|Segmentation|Depth|Detection",
    "transcripts": r"ForCTC|ForSpeechSeq2Seq",
}


@dataclass(frozen=True)
class Judgement:
    """What a network learned from: words, which a catalogue entry's `supervision` joins with +, and how that is known.

    modality: what it reads, None where only its weights could tell. release: the entry whose released file it is.
    """

    words: Mapping[str, str]
    modality: Modality | None = None
    release: CatalogueEntry | None = None

    @property
    def supervision(self) -> str:
        """As a catalogue entry says it, and as it is recorded. Of what had labels nothing more needs to be known."""
        return "+".join(word for word in self.words if word != UNKNOWN or not LABELS & self.words.keys())


@dataclass(frozen=True)
class Guard:
    """What the networks of a run may have learned from. allowed: exceptions, spelled exactly as the run names them.

    label_free: no labels, transcripts or matched pairs. text_free: nor captions, directly or through a tokenizer.
    Nothing that is stored depends on it.
    """

    label_free: bool = False
    text_free: bool = False
    allowed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.allowed and not self.flag:
            raise UsageError(
                f"--allow-teacher {self.allowed[0]} without --label-free or --text-free",
                "leave it out: nothing is refused",
            )

    @property
    def flag(self) -> str:
        """The stricter of the flags given; "" if none is."""
        return "--text-free" if self.text_free else "--label-free" if self.label_free else ""

    def check(self, sources: Iterable[str]) -> None:
        """Raises RefusedTeacher for sources that learned from what is excluded, or from nobody knows what.

        By their names, and by the tensors of files that lie here; nothing is fetched. UsageError for an exception that
        names none of them.
        """
        if not self.flag:
            return
        named = list(dict.fromkeys(sources))
        self.check_exceptions(named)
        refused = {name: found for name in named if name not in self.allowed and self._excluded(found := judge(name))}
        if refused:
            raise self._refusal(refused)

    def check_exceptions(self, sources: Iterable[str]) -> None:
        """Raises UsageError for an exception that names none of the sources."""
        named = [name for name in dict.fromkeys(sources) if name and name != "none"]
        for name in self.allowed:
            if name not in named:
                raise UsageError(
                    f"--allow-teacher {name}: no network of this command is called that",
                    f"name one of {', '.join(named)}",
                )

    def check_loaded(self, source: str, supervision: str, modality: Modality) -> None:
        """As `check`, by what the network itself says once it is loaded."""
        found = _of_words(supervision, "it says so itself", modality)
        if self.flag and source not in self.allowed and self._excluded(found):
            raise self._refusal({source: found})

    def record(self) -> dict[str, Any]:
        """What a field's record keeps of it; {} without flags."""
        if not self.flag:
            return {}
        allowed = {"allowed_by_name": list(self.allowed)} if self.allowed else {}
        return {"guard": self.flag.removeprefix("--"), **allowed}

    def _excluded(self, found: Judgement) -> list[str]:
        excluded = LABELS | TEXT if self.text_free else LABELS
        return [word for word in found.words if word in excluded] or [w for w in found.words if w == UNKNOWN]

    def _refusal(self, refused: Mapping[str, Judgement]) -> RefusedTeacher:
        reasons = []
        for name, found in refused.items():
            word = self._excluded(found)[0]
            learned = "learned from " + _SAID[word] if word in _SAID else "may have learned from anything"
            reasons.append(f"{name} {learned} ({found.words[word]})")
        modalities = {found.modality or "image" for found in refused.values()}
        good = [
            entry.name
            for entry in CATALOGUE.values()
            if entry.modality in modalities and not self._excluded(_of_words(entry.supervision, ""))
        ]
        instead = f"use {', '.join(good[:8])}{' or others' if len(good) > 8 else ''}; or, " if good else ""
        return RefusedTeacher(
            f"{self.flag}: {'; '.join(reasons)}",
            f"{instead}if you know better, --allow-teacher {next(iter(refused))} takes it all the same, on record",
        )


def judge(source: str) -> Judgement:
    """What a network of this name learned from, as far as can be told without fetching or loading it.

    Entries of the catalogue: what it says. Networks that emkum saved: what their record says. Other files: what their
    family, their tensors and their names show; where none of this tells, `unknown` as well: that no sign of labels was
    found does not prove that there were none. Raises UnknownNetwork for what does not exist.
    """
    found = read_source(source)
    if found.kind == "timm":
        tag = found.place.partition(".")[2]
        return _of_words(whole_timm.supervision(tag), f"its tag in timm is {tag or 'not named'}", "image")
    if found.kind == "function":
        return Judgement({})  # what it says itself is known once it is called
    if found.logits and found.entry is None:
        return Judgement({"class_labels": "#logits asks for its classifier"}, "image")
    if found.entry is not None:
        said = f"the catalogue says {found.entry.supervision}"
        return _of_words(found.entry.supervision, said, found.entry.modality)
    if found.kind == "path":
        return _judge_path(found)
    name = found.place.rpartition("/")[2]
    return Judgement(_by_name(name) | {UNKNOWN: "it is not in the catalogue"}, found.tower)


def judge_weights(named: Iterable[str], checkpoint: Checkpoint, family: Family | None) -> Judgement:
    """What weights at hand learned from, by their tensors, their configuration, their family and their names.

    named: what they were asked for as. family: which reads them, None for none. This alone is what the guard holds a
    file to, what a loaded network records and what `convert` writes down. Only names and shapes are read.
    """
    signs = signs_in_tensors(checkpoint.shapes, checkpoint.config)
    for name in (*named, checkpoint.label):
        signs |= _by_name(_last_part(name))
    nobody_knows = {UNKNOWN: "nothing says what it learned from"}
    if family is None:
        return Judgement(signs | nobody_knows)
    entry = entry_of_file(Path(checkpoint.label).name, family)
    if entry is not None:
        called = f"it is called as the file of {entry.name}"
        try:
            wrong = misfit(entry, key_map_of(family, checkpoint).spec)
        except EmkumError:  # whoever loads it says more
            wrong = f"no {family.name} that can be read"
        if not wrong:
            said = f"{called}, of which the catalogue says {entry.supervision}"
            words = dict.fromkeys(entry.supervision.split("+"), said)
            if signs:
                words.pop("none", None)
            return Judgement(words | signs, family.modality, entry)
        nobody_knows = {UNKNOWN: f"{called} but is {wrong}"}
    of_family = supervision_of_family(family)
    if of_family != UNKNOWN:
        said = f"every {family.name} network of the catalogue has {of_family}"
        signs = {word: said for word in of_family.split("+") if word != "none"} | signs
    return Judgement(signs | nobody_knows, family.modality)


def joined(of_weights: str, of_name: str) -> str:
    """Of weights fetched from where anybody may put them: what they show, and what their name told before."""
    words = dict.fromkeys([*of_weights.split("+"), *of_name.split("+")], "")
    if UNKNOWN in words:
        words.pop("none", None)
    return Judgement(words).supervision


def supervision_of_family(family: Family) -> str:
    """What all networks of the family in the catalogue learned from, if that is something; else unknown."""
    said = {entry.supervision for entry in family.entries}
    return said.pop() if len(said) == 1 and not said & {"none", UNKNOWN} else UNKNOWN


def signs_in_tensors(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, str]:
    """Supervision that the tensors and the configuration of a checkpoint show, with what shows it."""
    signs: dict[str, str] = {}
    for word, pattern in _IN_ARCHITECTURES.items():
        trained_as = [str(a) for a in config.get("architectures") or () if re.search(pattern, str(a))]
        if trained_as:
            signs[word] = f"its config.json says {trained_as[0]}"
    for word, pattern in _IN_TENSORS.items():
        found = sorted(name for name in shapes if re.search(pattern, name))
        if found:
            signs.setdefault(word, f"it has {found[0]}")
    hears = any("conv_layers" in name for name in shapes)
    for name, shape in shapes.items():
        if (
            hears
            and re.search(r"(^|\.)(lm_head|final_proj|(?<!attn\.)(?<!decoder\.)proj)\.weight$", name)
            and 0 < shape[0] < _CTC_WORDS
        ):
            signs.setdefault("transcripts", f"it has {name} with {shape[0]} outputs, as many as letters")
    return signs


def _of_words(supervision: str, reason: str, modality: Modality | None = None) -> Judgement:
    return Judgement(dict.fromkeys(supervision.split("+"), reason), modality)


def _by_name(name: str) -> dict[str, str]:
    """Supervision that the name of a file or a repository tells of."""
    signs = {}
    for word, pattern in _IN_NAMES.items():
        found = re.search(rf"(?<![a-z0-9])({pattern})(?![a-z0-9])", name.lower())
        if found:
            signs[word] = f"its name says {found.group()}"
    return signs


def _judge_path(source: Source) -> Judgement:
    path = source.path
    if (path / "model.json").is_file():
        return _judge_saved(path / "model.json")
    opened = _open(path)
    if opened is None:
        nobody_knows = {UNKNOWN: "nothing says what it learned from"}
        return Judgement(_by_name(_last_part(str(path))) | nobody_knows, source.tower)
    try:
        original = is_original(opened.shapes)
        of_original = family_of_original(opened.shapes, opened.label, source.tower) if original else None
        family = of_original or family_of(opened, source.tower)
    except EmkumError:  # of no family: whoever loads it says so
        family = None
    found = judge_weights((source.place,), opened, family)
    return found if found.modality else replace(found, modality=source.tower)


def _last_part(place: str) -> str:
    """Of a path, where links lead; of a hub id or URL, what stands last."""
    path = Path(os.path.expanduser(place))
    if not path.exists():
        return place.rpartition("/")[2]
    return path.resolve().stem if path.is_file() else path.resolve().name


def _judge_saved(record: Path) -> Judgement:
    try:
        kept = json.loads(record.read_text(encoding="utf-8"))
        supervision, modality = str(kept["supervision"]), kept["modality"]
    except (OSError, ValueError, KeyError, TypeError):  # whoever loads it says so
        return Judgement({UNKNOWN: f"{record} cannot be read"})
    said = "it is not in the catalogue" if supervision == UNKNOWN else f"its model.json says {supervision}"
    return _of_words(supervision, said, modality)


def _open(path: Path) -> Checkpoint | None:
    """The names and shapes in a folder or file; None for one we do not read, which whoever loads it says."""
    try:
        original = original_file(path)
        return open_original(original) if original is not None else open_folder(path)
    except EmkumError:
        return None
