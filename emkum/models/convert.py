"""An original checkpoint made into a folder of emkum's own form, with a record of where it comes from."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emkum
from emkum.errors import StorageFailure, UnsupportedNetwork, UsageError
from emkum.models import fetch
from emkum.models.backbone import Modality
from emkum.models.catalogue import entry_folder, network_of
from emkum.models.families.checkpoint import Checkpoint, KeyMap
from emkum.models.families.family import Family
from emkum.models.families.originals import SUFFIXES, open_original, original_file
from emkum.models.families.registry import FAMILIES, key_map_of
from emkum.models.network import Network, network_name, save_network
from emkum.models.sources import Source, read_source, tower_suffix
from emkum.models.supervision import judge_weights

PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class Converted:
    """The network now in `folder`, and what PROVENANCE there says."""

    network: Network
    folder: Path
    provenance: dict[str, Any]


def convert(
    source: str, out: Path | str, family: str | None = None, tokenizer: Path | None = None, name: str | None = None
) -> Converted:
    """Makes a folder of an original file: safetensors under emkum's names, model.json, the tokenizer, PROVENANCE.

    source: a file, or "FILE#text" for one of its towers. family: of several that recognise the file, or where none
    does. tokenizer: a folder with the tokenizer of a network that reads texts, by default that of the file. Nothing in
    the file is executed. `out` appears whole or not at all. Raises UsageError, UnsupportedNetwork or StorageFailure.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists", "name a folder that does not, or delete it first")
    path, tower = _file_of(source)
    checkpoint = open_original(path)
    chosen = _family(checkpoint, family, tower)
    entry = judge_weights((read_source(source).place,), checkpoint, chosen).release
    if tokenizer is not None and chosen.modality not in ("text", "pair"):
        raise UsageError(f"--tokenizer for {path}, which reads {chosen.modality}", "leave it out")
    called = name or (entry.name if entry is not None else path.stem + tower_suffix(tower))
    origin = entry.source if entry is not None else path.name
    folder = tokenizer if tokenizer is not None else path.parent
    asked = read_source(source).place
    network = network_of(chosen, checkpoint, folder, origin, _sha256(path), network_name(called), asked)
    key_map = key_map_of(chosen, checkpoint)
    provenance = {
        "source": path.name,
        "sha256": network.revision,
        "bytes": path.stat().st_size,
        "family": network.family,
        "modality": network.modality,
        "weights_sha256": network.weights_sha256,
        "converted": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "emkum": emkum.__version__,
        "dropped": _dropped(chosen, checkpoint, key_map),
    }
    if key_map.inferred:
        provenance["inferred"] = dict(key_map.inferred)
    _write(network, provenance, out)
    return Converted(network, out, provenance)


def _file_of(source: str) -> tuple[Path, Modality | None]:
    found = read_source(source)
    path = original_file(found.path) if found.kind == "path" else None
    if path is None and found.kind in ("entry", "url"):
        raise UsageError(f"{source} is no file here", _fetched(found))
    if path is None:
        what = "holds no original file" if found.kind == "path" else "is no file here"
        raise UsageError(f"{source} {what}", f"name a file ending in {', '.join(SUFFIXES)}, fetched before")
    return path, found.tower


def _fetched(found: Source) -> str:
    """What makes a file of a name or URL, and where that lies then."""
    command = f"nothing has to be converted: emkum extract --teacher {found.asked} fetches it"
    url = found.entry.source if found.entry is not None else found.place
    if not url.startswith("https://") and not url.startswith("http://"):
        return command
    folder = entry_folder(found.entry) if found.entry is not None else fetch.folder_of(url)
    return f"{command}; the file then lies at {fetch.place_of(url, folder)}"


def _family(checkpoint: Checkpoint, name: str | None, tower: Modality | None) -> Family:
    """The family that was named, or the only one that recognises the file; of its towers that of pictures first."""
    known = ", ".join(sorted({family.name for family in FAMILIES}))
    named = [family for family in FAMILIES if name is not None and family.name == name.lower()]
    if name is not None and not named:
        raise UsageError(f"--family {name} is none we know", f"choose one of {known}")
    fitting = [family for family in FAMILIES if family.recognises is not None and family.recognises(checkpoint.shapes)]
    if named:
        recognised, fitting = fitting, [family for family in named if family in fitting]
        fitting = fitting or [_taken_at_word(family, checkpoint, recognised) for family in named]
    if not fitting:
        raise UnsupportedNetwork(
            f"{checkpoint.label} is no original file we know: it has {', '.join(list(checkpoint.shapes)[:3])}",
            f"if it is one, say of what with --family: {known}",
        )
    of_tower = [family for family in fitting if family.modality == tower] if tower else fitting
    if not of_tower:
        found = ", ".join(family.modality for family in fitting)
        raise UsageError(f"{checkpoint.label} has no tower {tower}; it reads {found}", f"leave #{tower} out")
    if len({family.name for family in of_tower if family.modality == of_tower[0].modality}) > 1:
        names = sorted({family.name for family in of_tower})
        raise UsageError(f"{checkpoint.label} may be one of {', '.join(names)}", f"say which: --family {names[0]}")
    return next((family for family in of_tower if family.modality == "image"), of_tower[0])


def _taken_at_word(family: Family, checkpoint: Checkpoint, recognised: Sequence[Family]) -> Family:
    """A family that does not recognise the file by itself, as those that are read only if somebody says so.

    Raises UnsupportedNetwork if others recognise the file and this one lacks tensors in it, or has rules of its own.
    """
    if not recognised:
        return family
    others = " or ".join(sorted({other.name for other in recognised}))
    way_out = "leave --family out"
    refusal = UnsupportedNetwork(f"{checkpoint.label} is recognised as {others}, not as {family.name}", way_out)
    if family.recognises is not None:
        raise refusal
    renamed = checkpoint.renamed(family.rename)
    try:
        key_map = family.key_map(renamed)
    except (KeyError, IndexError, ValueError) as error:
        raise refusal from error
    present = renamed.shapes
    if any(name not in present for names in key_map.sources.values() for name in _several(names)):
        raise refusal
    return family


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _dropped(family: Family, checkpoint: Checkpoint, key_map: KeyMap) -> list[str]:
    """The file's tensors that the network does not need: heads of pre-training, decoders, averaged copies."""
    used = {n for names in key_map.sources.values() for n in _several(names)}
    return sorted(name for name in checkpoint.shapes if family.rename(name) not in used)


def _write(network: Network, provenance: dict[str, Any], out: Path) -> None:
    """All files into a hidden folder beside `out`, which gets the name when it is whole."""
    unfinished = out.parent / f".{out.name}.unfinished"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        save_network(network, unfinished)
        with open(unfinished / PROVENANCE, "w", encoding="utf-8") as file:
            file.write(json.dumps(provenance, indent=1, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.rename(unfinished, out)
    except OSError as error:
        raise StorageFailure(f"{out} cannot be written: {error}", "free space or choose another place") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def told(converted: Converted) -> dict[str, Any]:
    """What was made, for programs: PROVENANCE, and what the network is called and comes with."""
    network = converted.network
    made = {"name": network.name, "supervision": network.supervision, "licence": network.licence}
    return made | {"out": str(converted.folder)} | converted.provenance


def summary(converted: Converted) -> str:
    """What was made, in lines for people."""
    network, dropped = converted.network, converted.provenance["dropped"]
    heads = sorted({re.sub(r"\..*", "", name) for name in dropped})
    lines = [
        f"{converted.folder}: {network.name}, a {network.family} of {network.depth} blocks for {network.modality}",
        f"  from {converted.provenance['source']}, sha256 {converted.provenance['sha256']}",
        f"  {len(dropped)} of its tensors were not needed" + (f": {', '.join(heads)}" if heads else ""),
        f"  supervision {network.supervision}, licence {network.licence}",
        f"next: emkum extract --teacher {converted.folder}",
    ]
    return "\n".join(lines)
