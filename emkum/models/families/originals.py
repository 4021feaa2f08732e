"""Original checkpoint files, as their authors published them: one file of tensors, without a config.json."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emkum.errors import StorageFailure, UnsupportedNetwork, UsageError
from emkum.models.families.checkpoint import Checkpoint, load_torch, of_tensors, open_safetensors
from emkum.models.fetch import WEIGHTS_DIR

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
    """The tensors of an original file, or of the safetensors file made of it. Nested state dicts: joined by a dot.

    Its `config` is {"model": options} where the file holds those of fairseq's training, else {}.
    Raises UnsupportedNetwork for a file that names anything but tensors and what `_INERT` lists.
    """
    if path.suffix == ".safetensors":
        return open_safetensors([path], str(path), _kept_options(path))
    found = _load_inert(path)
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
    return of_tensors(tensors, str(path), _options(found))


# Options, counters and dictionaries of fairseq's trainer. In place of what a pickle calls so stands an `_Inert`: these
# packages need not be installed, and nothing of them is executed.
_INERT = re.compile(
    r"(omegaconf|fairseq|examples\.data2vec)\.[\w.]+|typing\.Any|builtins\.(dict|list|int|float|str|bool)"
    r"|numpy\.dtype|numpy\._?core\.multiarray\.scalar"
)


class _Inert:
    """Something of a pickle that we do not want: takes whatever it is given and does nothing."""

    state: Any = None

    def __new__(cls, *_: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _load_inert(path: Path) -> Any:
    """What a torch file holds, with stand-ins for what it names. Raises UnsupportedNetwork for a name not foreseen."""
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError):
        names = []  # of the form before torch 1.6, or damaged: loading tells
    if unforeseen := [name for name in names if not _INERT.fullmatch(name) and name != "argparse.Namespace"]:
        raise UnsupportedNetwork(
            f"{path} holds more than tensors and options: it names {', '.join(unforeseen)}",
            "convert it to safetensors where you trust it",
        )
    stand_ins = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in names if _INERT.fullmatch(name)]
    # A Namespace holds options too and can do nothing.
    with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):
        return load_torch(path)


def _options(found: Any) -> dict[str, Any]:
    """{"model": the options of the model} of a fairseq training, as it keeps them in the file under "cfg"."""
    cfg = _plain(found.get("cfg")) if isinstance(found, Mapping) else None
    model = cfg.get("model") if isinstance(cfg, dict) else None
    return {"model": model} if isinstance(model, dict) else {}


def _plain(value: Any) -> Any:
    """Options in JSON types: of dicts, a Namespace, and omegaconf's nodes, which keep theirs in _content or _val."""
    if isinstance(value, _Inert):
        state = value.state if isinstance(value.state, dict) else {}
        return _plain(state.get("_content", state.get("_val")))
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: _plain(option) for key, option in value.items() if isinstance(key, str)}
    if isinstance(value, list | tuple):
        return [_plain(option) for option in value]
    return value if isinstance(value, str | int | float | bool) else None


def _kept_options(path: Path) -> dict[str, Any]:
    """`_options` as `as_safetensors` keeps them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("options", "{}"))
    except (SafetensorError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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
    options = {"options": json.dumps(checkpoint.config, sort_keys=True)} if checkpoint.config else {}
    metadata = {"format": "pt", "made_of": path.name, "made_of_sha256": sha256} | options
    unfinished = made.with_name(f"{made.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, unfinished, metadata=metadata)
        os.replace(unfinished, made)
    except (OSError, SafetensorError) as error:
        raise StorageFailure(
            f"{path.name} cannot be kept as {made}: {error}", f"free space, or choose another place with {WEIGHTS_DIR}"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return made
