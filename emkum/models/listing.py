"""The catalogue as people and programs read it: a table, Markdown, JSON, and one network in full."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emkum.errors import CorruptCache, EmkumError
from emkum.models import whole_transformers
from emkum.models.backbone import Modality
from emkum.models.catalogue import outline_of
from emkum.models.families import dinov2_onnx
from emkum.models.families.checkpoint import Checkpoint, open_folder
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.families.originals import open_original, original_file
from emkum.models.families.registry import (
    CATALOGUE,
    FAMILIES,
    family_named,
    family_of,
    family_of_original,
    is_original,
    key_map_of,
    spec_of,
)
from emkum.models.network import MODEL_JSON
from emkum.models.preprocessing import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from emkum.models.sources import Source, read_source
from emkum.models.supervision import judge
from emkum.models.targets import named_rule
from emkum.models.tokenizer import MAX_TOKENS, read_tokenizer
from emkum.models.whole import WholeSpec

BYTES_PER_NUMBER = 2  # float16, the default storage
HEADINGS: dict[Modality, str] = {
    "image": "pictures",
    "text": f"texts, of {MAX_TOKENS} tokens",
    "audio": "sound, a second of it",
    "pair": f"pairs, with texts of {MAX_TOKENS} tokens",
}

_COLOURS = {(IMAGENET_MEAN, IMAGENET_STD): "ImageNet", (CLIP_MEAN, CLIP_STD): "CLIP", (HALF, HALF): "0.5"}
_TEXT_STEP = 16  # `emkum extract --max-tokens` takes multiples of it
_SOUND_TOKENS = 50  # a second: 16,000 values, one token for 320 of them
_LEGEND = (
    "shape: width/blocks/patch. crop: side in pixels, whose mean and deviation. In brackets: where files come from.",
    "kB of targets: what is kept by default of one sample, in float16.",
    "All of it, with the sources: `emkum teachers show NAME`, or --json. Weights with NC in their licence are for",
    "non-commercial use, and so is what is distilled from them.",
)


@dataclasses.dataclass(frozen=True)
class Listed:
    """An entry with what its family adds. bytes_per_sample: of each target it has, in float16.

    Of a text, alone or with a picture, they are those of `MAX_TOKENS` tokens; shorter ones take less. Of a sound, those
    of a second.
    """

    entry: CatalogueEntry
    phrase: str
    preprocessing: Preprocessing | None
    layers_rule: str
    bytes_per_sample: dict[str, int]

    @property
    def what(self) -> str:
        """What it is: its family, and what is its own."""
        return "; ".join(filter(None, (self.phrase, self.entry.notes)))

    @property
    def origin(self) -> str:
        """Where its files come from, in a word or two."""
        package = "package" if self.entry.package else ""
        source = "" if not self.entry.source else "URL" if self.entry.source.startswith("https://") else "hub"
        return " or ".join(filter(None, (package, source)))

    @property
    def family_line(self) -> str:
        """What it is and where it comes from, which its family has in common."""
        return f"{self.phrase} [{self.origin}]"

    @property
    def tokens(self) -> str:
        """Of one sample; of a sound, of a second."""
        return str(self.entry.tokens) if self.entry.tokens else f"{_SOUND_TOKENS}/s"

    @property
    def sizes(self) -> str:
        """Of the targets that are kept by default, in thousands of bytes."""
        thousands = {target: self.bytes_per_sample[target] / 1e3 for target in self.entry.targets}
        return " ".join(f"{target} {size:,.{0 if size >= 10 else 1}f}" for target, size in thousands.items())

    @property
    def colours(self) -> str:
        """Which mean and deviation its pictures are normalised with, in a word where they have one."""
        if self.preprocessing is None or self.entry.modality not in ("image", "pair"):
            return ""
        mean, std = self.preprocessing.mean, self.preprocessing.std
        return _COLOURS.get((mean, std), " ".join(f"{m:g}/{s:g}" for m, s in zip(mean, std, strict=True)))

    def to_json(self) -> dict[str, Any]:
        """All of it, in JSON types."""
        found = dataclasses.asdict(self.entry)
        pictures = self.entry.modality in ("image", "pair")
        seen = self.preprocessing if pictures else None
        return found | {
            "what": self.what,
            "tokens": self.entry.tokens or None,
            "size": self.entry.size if pictures else None,
            "layers_rule": self.layers_rule,
            "mean": list(seen.mean) if seen else None,
            "std": list(seen.std) if seen else None,
            "crop_fraction": seen.crop_fraction if seen else None,
            "interpolation": seen.interpolation if seen else None,
            "bytes_per_sample": self.bytes_per_sample,
        }


def listed() -> list[Listed]:
    """The whole catalogue, grouped by what is read, in the order of the families."""
    found = [_listed(CATALOGUE[entry.name], family) for family in FAMILIES for entry in family.entries]
    return sorted(found, key=lambda one: list(HEADINGS).index(one.entry.modality))


def _listed(entry: CatalogueEntry, family: Family) -> Listed:
    sizes = bytes_per_sample(entry, num_tokens(entry), family.layers_rule)
    return Listed(entry, family.phrase, family.preprocessing, family.layers_rule, sizes)


def num_tokens(entry: CatalogueEntry) -> int:
    """Tokens of a sample as `bytes_per_sample` counts it; of a pair those of its text, which alone are kept."""
    if entry.modality == "text":
        return min(MAX_TOKENS, entry.tokens)
    if entry.modality == "pair":
        return entry.tokens - 1 - (entry.size // entry.patch) ** 2
    return entry.tokens or _SOUND_TOKENS


def bytes_per_sample(entry: CatalogueEntry, tokens: int, layers_rule: str) -> dict[str, int]:
    """Bytes that each target of the entry takes for a sample of so many tokens."""
    numbers = {"cls": entry.width, "patches": tokens * entry.width, "mean": entry.width}
    if entry.modality == "audio":
        del numbers["cls"]  # of sounds there is none
    if entry.modality == "image":
        numbers["patches"] = (entry.size // entry.patch) ** 2 * entry.width
    if entry.depth:
        dropped = named_rule(layers_rule, entry.modality).prefix == "drop"
        numbers["layers"] = numbers["patches"] if dropped else tokens * entry.width
    if entry.classes:
        numbers["logits"] = entry.classes
    return {target: BYTES_PER_NUMBER * count for target, count in numbers.items()}


# --- all of them -----------------------------------------------------------------------------------------


def table(found: Sequence[Listed]) -> str:
    """For people: at most 120 columns; what is read, then the families, each with its networks."""
    lines = []
    for modality, heading in HEADINGS.items():
        group = [one for one in found if one.entry.modality == modality]
        if not group:
            continue
        columns = ("shape", "tokens", "crop") if modality == "image" else ("shape", "tokens")
        rows = [[f"{heading}:", "learned from", "licence", *columns, "kB of targets"], *map(_row, group)]
        head, *aligned = _aligned(rows)
        lines.append(head)
        what = ""
        for one, line in zip(group, aligned, strict=True):
            if one.family_line != what:
                what = one.family_line
                lines.append(what)
            lines.append(line)
        lines.append("")
    return "\n".join([*lines, *_LEGEND])


def _row(one: Listed) -> list[str]:
    entry = one.entry
    shape = "/".join(str(number or "-") for number in (entry.width, entry.depth, entry.patch)).removesuffix("/-")
    seen = [f"{entry.size} {one.colours}"] if entry.modality == "image" else []
    licence = _shortened(entry.licence, 12)
    return [f" {entry.name}", entry.supervision, licence, shape, one.tokens, *seen, one.sizes]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def markdown(found: Sequence[Listed]) -> str:
    """The table of docs/teachers.md."""
    lines = [
        "| name | what it is | source | learned from | licence | width, depth, patch | tokens | default targets, kB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        entry = one.entry
        shape = ", ".join(str(number) for number in (entry.width, entry.depth, entry.patch or "-"))
        source = " or ".join(filter(None, (_package(entry), _short_source(entry.source))))
        cells = (f"`{entry.name}`", one.what, source, entry.supervision, entry.licence, shape, one.tokens, one.sizes)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _package(entry: CatalogueEntry) -> str:
    return f"PyPI `{entry.package.requirement}`" if entry.package else ""


def _short_source(source: str) -> str:
    return f"file `{source.rpartition('/')[2]}`" if source.startswith("https://") else source


# --- one of them -----------------------------------------------------------------------------------------


def show(source: str) -> dict[str, Any]:
    """Everything that is known of one network without fetching or loading it: a name, hub id, folder, file or URL.

    Raises UnknownNetwork for what does not exist, UnsupportedNetwork for a file that is read as nothing.
    """
    found, learned = read_source(source), judge(source)
    known: dict[str, Any] = {"asked": source}
    if found.entry is not None:
        family = next(f for f in FAMILIES if any(e.name == found.entry.name for e in f.entries))
        known |= _listed(found.entry, family).to_json() | {"known_from": "the catalogue; nothing was fetched"}
        if found.logits and not found.entry.classes:
            known["refused"] = f"{found.entry.name} has no classifier: leave #logits out"
    elif found.kind == "path":
        known |= {"known_from": "the names and shapes of its tensors; no weights were loaded"} | _of_path(found)
    else:
        known |= {"known_from": "its name alone, nothing was fetched; more is told once it is loaded"}
        if found.kind == "timm":
            known |= {"modality": "image", "whole": True}
    known |= {"supervision": learned.supervision or "as its function says", "reasons": dict(learned.words)}
    if not known.get("depth"):
        known.pop("layers_rule", None)
    if "refused" in known:
        return known
    return known | {"extract": _extract_line(source, known)}


def show_text(known: dict[str, Any]) -> str:
    """`show` in lines for people."""
    labels = {
        "name": "name",
        "what": "what it is",
        "family": "family",
        "modality": "reads",
        "source": "source",
        "package": "package",
        "revision": "pinned at",
        "sha256": "sha256",
        "companions": "with it",
        "supervision": "learned from",
        "licence": "licence",
        "width": "width",
        "depth": "depth",
        "patch": "patch",
        "tokens": "tokens",
        "size": "crop, px",
        "mean": "mean",
        "std": "deviation",
        "targets": "targets",
        "layers_rule": "layers",
        "bytes_per_sample": "bytes",
        "known_from": "known from",
        "refused": "not read",
        "extract": "to extract",
    }
    lines = []
    for key, label in labels.items():
        value = known.get(key)
        if value not in (None, "", (), [], {}, 0) or (key == "depth" and value == 0):
            lines.append(f"{label:<13} {_words(key, value, known)}")
    return "\n".join(lines)


def _words(key: str, value: Any, known: dict[str, Any]) -> str:
    if key == "supervision":
        reasons = dict.fromkeys(known.get("reasons", {}).values())
        return f"{value} ({'; '.join(reasons)})" if reasons else str(value)
    if key == "bytes_per_sample":
        sample = "a second of sound" if known.get("modality") == "audio" else "a sample"
        return ", ".join(f"{target} {count:,}" for target, count in value.items()) + f" {sample} in float16"
    if key == "layers_rule":
        return f"{value}: {named_rule(value, known['modality']).words}"
    if key == "package":
        return f"{value['requirement']} of PyPI: pip install --no-deps {value['requirement']}"
    if key == "modality":
        return HEADINGS[value].partition(",")[0]
    return ", ".join(str(one) for one in value) if isinstance(value, list | tuple) else str(value)


def _of_path(source: Source) -> dict[str, Any]:
    """What the header of a file, or a folder's configuration and headers, tell."""
    path = source.path
    if (path / MODEL_JSON).is_file():
        saved = _of_saved(path)
        if source.tower not in (None, saved["modality"]):
            saved["refused"] = f"it reads {saved['modality']}, not {source.tower}: leave #{source.tower} out"
        return saved
    if path.suffix == ".onnx":
        checkpoint = dinov2_onnx.open_onnx(path)
        return _of_family(family_of(checkpoint), checkpoint, None)
    original = original_file(path)
    checkpoint = open_original(original) if original is not None else open_folder(path)
    if original is not None and (path.is_file() or is_original(checkpoint.shapes)):
        family = family_of_original(checkpoint.shapes, checkpoint.label, source.tower)
        known = _of_family(family, checkpoint, original.parent)
    elif whole_transformers.is_readable(checkpoint.config):
        return _of_whole(path, checkpoint, source.logits)
    else:
        family = family_of(checkpoint, source.tower)
        if source.logits and "logits" not in family.default_targets:
            return _of_whole(path, checkpoint, source.logits)
        known = _of_family(family, checkpoint, path)
    if source.logits and "logits" not in known["targets"]:
        known.setdefault("refused", "it has no classifier: leave #logits out")
    return known


def _of_saved(folder: Path) -> dict[str, Any]:
    """What the record of a network that emkum saved tells."""
    try:
        record = json.loads((folder / MODEL_JSON).read_text(encoding="utf-8"))
        kept = {key: record[key] for key in ("name", "family", "modality", "source", "revision", "licence")}
        spec = spec_of(record["architecture"])
        preprocessing = Preprocessing.from_json(record["preprocessing"]) if record["preprocessing"] else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCache(f"{folder} holds no whole network: {MODEL_JSON}: {error}", "restore the folder") from error
    found = kept | {"known_from": f"its {MODEL_JSON}; no weights were loaded"}
    if isinstance(spec, WholeSpec):
        found |= {"what": f"{spec.name} of {spec.library}, run in one piece", "width": spec.width, "whole": True}
        return found | {"targets": list(spec.default_targets)} | _seen(preprocessing)
    family = family_named(kept["family"], kept["modality"])
    if family is None:
        return found
    return found | _measures(family, spec, preprocessing)


def _of_whole(folder: Path, checkpoint: Checkpoint, logits: bool) -> dict[str, Any]:
    """Of a folder that no family reads what its configuration tells."""
    config = checkpoint.config
    known: dict[str, Any] = {
        "what": f"{config['model_type']} of transformers, run in one piece",
        "whole": True,
        "known_from": "its config.json; targets and tokens are certain once it is loaded",
        "num_tensors": len(checkpoint.shapes),
    }
    measures = {"width": "hidden_size", "layers": "num_hidden_layers", "patch": "patch_size"}
    known |= {ours: config[theirs] for ours, theirs in measures.items() if isinstance(config.get(theirs), int)}
    try:
        modality, targets, preprocessing = whole_transformers.outline(folder, checkpoint, logits)
        if modality == "text":
            read_tokenizer(folder)
    except EmkumError as error:
        return known | {"refused": _why(error)}
    return known | {"modality": modality, "targets": list(targets)} | _seen(preprocessing)


def _of_family(family: Family, checkpoint: Checkpoint, folder: Path | None) -> dict[str, Any]:
    known: dict[str, Any] = {
        "family": family.name,
        "what": family.phrase,
        "modality": family.modality,
        "targets": list(family.default_targets),
        "num_tensors": len(checkpoint.shapes),
    }
    try:
        known |= _measures(family, key_map_of(family, checkpoint).spec, family.preprocessing)
        spec, preprocessing = outline_of(family, checkpoint, folder)
    except EmkumError as error:
        return known | {"refused": _why(error)}
    return known | _measures(family, spec, preprocessing)


def _why(error: EmkumError) -> str:
    return f"{error.what}; {error.way_out}" if error.way_out else error.what


def _measures(family: Family, spec: Any, preprocessing: Preprocessing | None) -> dict[str, Any]:
    """What an architecture of the family tells, as the catalogue says it of its own."""
    seen = _seen(preprocessing)
    size, patch = seen.get("size", 0), int(getattr(spec, "patch", 0))
    classes = int(getattr(spec, "num_classes", 0))
    tokens = 0
    if family.modality == "image" and patch:
        tokens = (size // patch) ** 2 + int(getattr(spec, "num_prefix", 1))
    elif family.modality == "text":
        tokens = int(spec.max_positions - spec.position_offset)
    elif family.modality == "pair":
        tokens = (size // patch) ** 2 + 1 + min(MAX_TOKENS, int(spec.max_positions - spec.position_offset))
    entry = CatalogueEntry(
        name="",
        source="",
        supervision="unknown",
        licence="",
        width=int(spec.width),
        depth=int(getattr(spec, "depth", 0)),
        patch=patch,
        size=size,
        tokens=tokens,
        classes=classes,
        modality=family.modality,
    )
    found = {key: getattr(entry, key) for key in ("width", "depth", "patch", "tokens")}
    found |= {
        "what": family.phrase,
        "targets": [target for target in family.default_targets if classes or target != "logits"],
        "layers_rule": family.layers_rule,
    }
    found["bytes_per_sample"] = bytes_per_sample(entry, num_tokens(entry), family.layers_rule)
    return found | seen


def _seen(preprocessing: Preprocessing | None) -> dict[str, Any]:
    if preprocessing is None:
        return {}
    found = preprocessing
    return {"size": found.image_size, "mean": list(found.mean), "std": list(found.std)} | {
        "crop_fraction": found.crop_fraction,
        "interpolation": found.interpolation,
    }


def _text_positions(known: dict[str, Any]) -> int | None:
    """The most tokens of a text that the network has positions for, if it reads texts and that is known."""
    tokens, patch = int(known.get("tokens") or 0), int(known.get("patch") or 0)
    if not tokens or known.get("modality") not in ("text", "pair"):
        return None
    return tokens - 1 - (int(known["size"]) // patch) ** 2 if known["modality"] == "pair" and patch else tokens


def _extract_line(source: str, known: dict[str, Any]) -> str:
    """A command that extract takes: of what no student can start from, without inputs for one."""
    targets, modality = known.get("targets"), known.get("modality")
    line = f"emkum extract --teacher {shlex.quote(source)}" + (f" --targets {','.join(targets)}" if targets else "")
    positions = _text_positions(known)
    if positions is not None and positions < MAX_TOKENS:
        line += f" --max-tokens {positions // _TEXT_STEP * _TEXT_STEP}"
    if modality == "image" and (known.get("whole") or known.get("depth") == 0):
        return f"{line} --encoder none"
    return f"{line} --text-encoder none" if known.get("whole") and modality == "text" else line
