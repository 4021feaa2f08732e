"""What a SOURCE names, told before anything is fetched or opened: an entry, a path, a URL, an id of the hub, code."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from emkum.errors import UnknownNetwork, UnsupportedNetwork, UsageError
from emkum.models.backbone import Modality
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.families.registry import CATALOGUE
from emkum.models.whole_timm import PREFIX as TIMM
from emkum.models.whole_user import is_named

TOWERS: tuple[Modality, ...] = get_args(Modality)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")
_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".onnx", ".npz")  # what networks are kept in
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Source:
    """`asked` as the user wrote it; `place` without tower, revision and digest.

    entry: of the catalogue, by whichever spelling. tower: which of several in one checkpoint. revision: of the hub, ""
    for the one the entry pins or the newest. sha256: that the file behind a URL must have, "" for what is recorded.
    logits: it must have a classifier, and where its family reads the trunk alone it is run in one piece.
    """

    asked: str
    kind: Literal["entry", "path", "url", "hub", "timm", "function"]
    place: str
    entry: CatalogueEntry | None = None
    tower: Modality | None = None
    revision: str = ""
    sha256: str = ""
    logits: bool = False

    @property
    def path(self) -> Path:
        """Of the kind path."""
        return Path(os.path.expanduser(self.place))


def read_source(source: str) -> Source:
    """NAME, owner/name, either with @REVISION; a folder or file; https://...; with #sha256=HEX and #TOWER behind it.

    Or any of them with #logits; timm:NAME; module:function. Raises UnknownNetwork or UsageError with the way out.
    """
    if source.endswith("#logits"):
        return replace(read_source(source.removesuffix("#logits")), asked=source, logits=True)
    if source.startswith(TIMM):
        return Source(source, "timm", source.removeprefix(TIMM))
    if is_named(source):
        return Source(source, "function", source)
    place, tower = _tower(source)
    if re.match(r"https?://", place):
        return _url(source, place, tower)
    name, _, revision = place.partition("@")
    entry = entry_of(name, tower)
    if entry is None and name in CATALOGUE:
        raise UnsupportedNetwork(
            f"{name} has no tower {tower}", f"leave #{tower} out; `emkum teachers` lists the names"
        )
    if entry is not None and (not revision or _REVISION.fullmatch(revision)):
        if revision and not entry.source:
            raise UsageError(f"{source}: {entry.name} comes in a package and has no revisions", f"name {name}")
        if revision and entry.source.startswith("https://"):
            raise UsageError(
                f"{source}: {entry.name} is a file behind a URL, which has no revisions",
                f"name {name}; or pin the file: {entry.source}#sha256=...",
            )
        return Source(source, "entry", name, entry, tower, revision)
    if os.path.exists(os.path.expanduser(place)):
        return Source(source, "path", place, None, tower)
    if _HUB_ID.fullmatch(name) and (not revision or _REVISION.fullmatch(revision)):
        return Source(source, "hub", name, None, tower, revision)
    raise _unknown(place)


def entry_of(place: str, tower: Modality | None = None) -> CatalogueEntry | None:
    """The entry of a name, hub id or URL, or of another tower of it: all spellings give the same network."""
    if place in CATALOGUE and tower in (None, CATALOGUE[place].modality):
        return CATALOGUE[place]
    where = CATALOGUE[place].source if place in CATALOGUE else place
    fitting = [entry for entry in CATALOGUE.values() if where and entry.source == where]
    if tower is None:
        return next((entry for entry in fitting if entry.modality == "image"), next(iter(fitting), None))
    return next((entry for entry in fitting if entry.modality == tower), None)


def entry_of_file(name: str, family: Family) -> CatalogueEntry | None:
    """The entry whose released file has this name, but for its suffix: that of a file which its user fetched himself.

    Other releases use the same name: so the family that recognised the file must be the entry's.
    """
    stem = name.rpartition(".")[0]
    urls = (entry for entry in family.entries if entry.source.startswith("https://"))
    return next((entry for entry in urls if stem and entry.source.rpartition("/")[2].rpartition(".")[0] == stem), None)


def misfit(entry: CatalogueEntry, spec: Any) -> str:
    """In which of its measures an architecture is not the entry's, in words; "" if it fits."""
    measures = {"width": "wide", "depth": "blocks deep", "patch": "px a patch"}
    for key, words in measures.items():
        ours, theirs = getattr(spec, key, None), getattr(entry, key)
        if ours is not None and theirs and ours != theirs:
            return f"{ours} {words} where that has {theirs}"
    return ""


def tower_suffix(tower: Modality | None) -> str:
    """Of a tower's name, that the towers of one checkpoint do not share one."""
    return "" if tower in (None, "image") else f"-{tower}"


def _tower(source: str) -> tuple[str, Modality | None]:
    """ "SOURCE#text" -> ("SOURCE", "text")."""
    place, _, tower = source.rpartition("#")
    return next(((place, known) for known in TOWERS if place and tower == known), (source, None))


def _url(source: str, place: str, tower: Modality | None) -> Source:
    url, _, fragment = place.partition("#")
    sha256 = fragment.removeprefix("sha256=").lower()
    if fragment and not (fragment.startswith("sha256=") and _SHA256.fullmatch(sha256)):
        raise UsageError(f"{source} ends in #{fragment}", "write #sha256= and the 64 hexadecimal digits, or nothing")
    if url.startswith("http://") and not sha256:
        raise UsageError(
            f"{source} is fetched without encryption: anybody between could change it",
            "use https://, or say what the file must be: #sha256=HEX",
        )
    if not url.rpartition("/")[2].partition("?")[0]:
        raise UsageError(f"{source} names no file", "give the URL of one file of weights")
    entry = entry_of(url, tower)
    return Source(source, "url" if entry is None else "entry", url, entry, tower, sha256=sha256)


def _unknown(place: str) -> UnknownNetwork:
    whole, _, mark = place.rpartition("#")
    if whole and os.path.exists(os.path.expanduser(whole)):
        return UnknownNetwork(f"{place}: there is no tower {mark}", f"towers are {', '.join(TOWERS)}")
    path = Path(os.path.expanduser(place))
    is_path = place.startswith((".", "~", os.sep)) or place.endswith(os.sep) or path.suffix in _FILES
    if is_path or (path.parent != Path() and path.parent.is_dir()):
        return UnknownNetwork(f"{place} does not exist", "check the path")
    close = difflib.get_close_matches(place, CATALOGUE, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known names: {', '.join(CATALOGUE)}"
    return UnknownNetwork(
        f"{place!r} is not in the catalogue, no folder, and no hub id (owner/name)", f"{hint}; or name a folder"
    )
