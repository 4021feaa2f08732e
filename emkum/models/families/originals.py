"""Original checkpoint files, as their authors published them: one file of tensors, without a config.json."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emkum.errors import UnsupportedNetwork, UsageError
from emkum.models.families.checkpoint import Checkpoint, load_torch, of_tensors, open_safetensors

SUFFIXES = (".safetensors", ".pth", ".pt")
_STATE_DICTS = ("model", "module", "state_dict")  # under which the trainers of unilm, DeepSpeed and others put it


def original_file(path: Path) -> Path | None:
    """`path`, or the one file in that folder, if it may be an original file; None for a folder of another kind.

    Raises UsageError for a folder that holds several.
    """
    if path.is_file():
        return path if path.suffix in SUFFIXES else None
    if (path / "config.json").is_file():
        return None
    for suffix in SUFFIXES:
        found = sorted(path.glob(f"*{suffix}"))
        if len(found) > 1:
            raise UsageError(f"{path} holds {', '.join(f.name for f in found)}", "name one of the files")
        if found:
            return found[0]
    return None


def open_original(path: Path) -> Checkpoint:
    """The tensors of an original file, or of the safetensors file made of it. Nested state dicts: joined by a dot."""
    if path.suffix == ".safetensors":
        return open_safetensors([path], str(path), {})
    # argparse.Namespace holds the options of the training and can do nothing.
    with torch.serialization.safe_globals([argparse.Namespace]):
        found = load_torch(path)
    state = found
    for key in _STATE_DICTS:
        if isinstance(found, dict) and isinstance(found.get(key), Mapping):
            state = found[key]
            break
    tensors = _flat(state)
    if not tensors:
        raise UnsupportedNetwork(
            f"{path} has no state dict, neither under {', '.join(map(repr, _STATE_DICTS))} nor by itself",
            "use an original file; docs/teachers.md lists them",
        )
    return of_tensors(tensors, str(path), {})


def _flat(state: Any, prefix: str = "") -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        return {}
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
        else:
            found |= _flat(value, f"{prefix}{name}.")
    return found


def as_safetensors(path: Path, sha256: str) -> Path:
    """The same tensors as a safetensors file beside `path`, made once. sha256: of `path`, kept in the file made."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    made = path.with_suffix(".safetensors")
    if made == path:
        return path
    if made.is_file():
        try:
            with safe_open(made, framework="pt") as file:
                if (file.metadata() or {}).get("made_of_sha256") == sha256:
                    return made
        except SafetensorError:
            pass  # made again below
    checkpoint = open_original(path)
    tensors = {name: checkpoint.tensor(name).contiguous().clone() for name in checkpoint.shapes}
    unfinished = made.with_name(made.name + ".tmp")
    save_file(tensors, unfinished, metadata={"format": "pt", "made_of": path.name, "made_of_sha256": sha256})
    os.replace(unfinished, made)
    return made
