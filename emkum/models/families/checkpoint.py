"""A checkpoint on disk, and the strict renaming of its tensors into a network's."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from emkum.errors import UnsupportedNetwork, WeightsUnavailable

Shapes = Mapping[str, tuple[int, ...]]
SAFETENSORS, TORCH_BIN = "model.safetensors", "pytorch_model.bin"


class Architecture(Protocol):
    """Everything that decides what a network computes, but its weights: BackboneSpec, ResNetSpec or a family's own."""

    @property
    def family(self) -> str: ...

    def build(self) -> Any:
        """A network of this shape, a torch module."""

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types, with its `kind`; the class's from_json reads it."""


@dataclass(frozen=True)
class KeyMap:
    """How a checkpoint becomes a network.

    sources: our tensor -> the checkpoint's; of several, the rows one after the other (query, key, value).
    drop: patterns of tensors that are known and not needed; any other tensor left over is refused.
    changes: of some of ours, what is done with the tensor read: a part cut out, axes exchanged.
    inferred: what neither a shape nor a config tells, such as the attention heads, and what was taken for it.
    """

    spec: Architecture
    sources: Mapping[str, str | tuple[str, ...]]
    drop: tuple[str, ...] = ()
    changes: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    inferred: Mapping[str, int] = field(default_factory=dict)


class Checkpoint:
    """config.json and the tensors of a folder (or one file), read when asked for.

    `shapes`: tensor name -> shape, under the names that `rename` makes of those on disk.
    """

    def __init__(self, label: str, config: dict[str, Any], shapes: Shapes, read: Callable[[str], Tensor]) -> None:
        self.label = label
        self.config = config
        self.shapes = dict(shapes)
        self._read = read

    def tensor(self, name: str) -> Tensor:
        """One tensor, as stored."""
        return self._read(name)

    def renamed(self, rename: Callable[[str], str]) -> Checkpoint:
        """The same tensors under other names. Raises UnsupportedNetwork if two fall together."""
        old_names: dict[str, str] = {}
        for old in self.shapes:
            new = rename(old)
            if new in old_names:
                raise UnsupportedNetwork(f"{self.label} holds {new} twice: as {old_names[new]} and as {old}")
            old_names[new] = old
        shapes = {new: self.shapes[old] for new, old in old_names.items()}
        return Checkpoint(self.label, self.config, shapes, lambda name: self._read(old_names[name]))


def open_folder(folder: Path) -> Checkpoint:
    """A Hugging Face checkpoint folder: config.json with model.safetensors or pytorch_model.bin, sharded or not."""
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise WeightsUnavailable(f"{folder} has no config.json", "name a folder that holds a whole checkpoint")
    config = read_json(config_path)
    for name in (SAFETENSORS, TORCH_BIN):
        opened = open_safetensors if name == SAFETENSORS else open_torch
        if (folder / name).is_file():
            return opened([folder / name], str(folder), config)
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = sorted(set(read_json(index).get("weight_map", {}).values()))
            if missing := [file for file in files if not (folder / file).is_file()]:
                raise WeightsUnavailable(f"{folder} lacks {', '.join(missing)}", "complete the download of the folder")
            return opened([folder / file for file in files], str(folder), config)
    raise WeightsUnavailable(
        f"{folder} has neither {SAFETENSORS} nor {TORCH_BIN}", "put the weights beside config.json"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UnsupportedNetwork if it is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UnsupportedNetwork(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UnsupportedNetwork(f"{path} holds no JSON object")
    return found


def open_safetensors(paths: Iterable[Path], label: str, config: dict[str, Any]) -> Checkpoint:
    """Tensors of safetensors files; only those asked for are read."""
    from safetensors import SafetensorError, safe_open

    shapes, where = {}, {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    shapes[name], where[name] = tuple(file.get_slice(name).get_shape()), path
        except SafetensorError as error:
            raise UnsupportedNetwork(f"{path} is not a whole safetensors file: {error}", "fetch it again") from error

    def read(name: str) -> Tensor:
        with safe_open(where[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    return Checkpoint(label, config, shapes, read)


def open_torch(paths: Iterable[Path], label: str, config: dict[str, Any]) -> Checkpoint:
    """Tensors of torch files: plain dicts of tensors only, nothing in them is executed."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors.update(only_tensors(load_torch(path)))
    return of_tensors(tensors, label, config)


def of_tensors(tensors: Mapping[str, Tensor], label: str, config: dict[str, Any]) -> Checkpoint:
    """A checkpoint of tensors in memory."""
    return Checkpoint(label, config, {n: tuple(t.shape) for n, t in tensors.items()}, tensors.__getitem__)


def load_torch(path: Path) -> Any:
    """What a torch file holds, unpickled with weights_only. Raises UnsupportedNetwork for anything else in it.

    Tensors stay in the file until they are used, so that names and shapes cost nothing; not of files of torch < 1.6.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"a {foreign.group(1)}" if foreign else str(error).splitlines()[0]
        raise UnsupportedNetwork(
            f"{path} is damaged or holds more than tensors ({reason})",
            "fetch it again, or convert it to safetensors where you trust it",
        ) from error


def only_tensors(found: Any) -> dict[str, Tensor]:
    """The tensors of a state dict."""
    if not isinstance(found, Mapping):
        return {}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def read_tensors(checkpoint: Checkpoint, key_map: KeyMap, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict in float32, strictly: every tensor of `wanted` found, of its shape, and none left over.

    Raises UnsupportedNetwork that names what is missing, left over or of another shape.
    """
    sources = {ours: (s,) if isinstance(s, str) else s for ours, s in key_map.sources.items()}
    needed = {name for names in sources.values() for name in names}
    present = set(checkpoint.shapes)
    dropped = {name for name in present - needed if any(re.search(pattern, name) for pattern in key_map.drop)}
    problems = [
        _listed("lacks", needed - present),
        _listed("has unknown tensors", present - needed - dropped),
        _listed("gives nothing for", set(wanted) - set(sources)),
        _listed("gives what the network has not", set(sources) - set(wanted)),
    ]
    if any(problems):
        raise UnsupportedNetwork(
            f"{checkpoint.label} is not a {key_map.spec.family} as we know it: it {'; '.join(filter(None, problems))}",
            "use a checkpoint of the plain network; docs/teachers.md lists them",
        )
    state = {}
    for ours, names in sources.items():
        tensor = torch.cat([checkpoint.tensor(n) for n in names]) if len(names) > 1 else checkpoint.tensor(names[0])
        if ours in key_map.changes:
            tensor = key_map.changes[ours](tensor)
        if _squeezed(tensor.shape) != _squeezed(wanted[ours].shape):
            raise UnsupportedNetwork(
                f"{checkpoint.label}: {' + '.join(names)} has shape {tuple(tensor.shape)}, "
                f"config.json implies {tuple(wanted[ours].shape)}"
            )
        # A copy: safetensors hands out pages of the file, which may be replaced under us.
        state[ours] = tensor.to(torch.float32, copy=True).reshape(wanted[ours].shape)
    return state


def refuse_fine_tuned(checkpoint: Checkpoint, heads: str, instead: str) -> None:
    """Raises UnsupportedNetwork if a self-supervised family's checkpoint carries the head of a supervised task."""
    found = sorted(name for name in checkpoint.shapes if re.search(heads, name))
    trained_as = [a for a in checkpoint.config.get("architectures") or () if re.search(_SUPERVISED, str(a))]
    if found or trained_as:
        sign = f"it has {found[0]}" if found else f"its config.json says {trained_as[0]}"
        raise UnsupportedNetwork(f"{checkpoint.label} is fine-tuned with labels: {sign}", f"use {instead}")


def heads_of_64(label: str, width: int) -> int:
    """The attention heads where every released size has them 64 channels wide. Raises UnsupportedNetwork for others."""
    if width > 1024 or width % 64:
        raise UnsupportedNetwork(
            f"{label} is {width} wide and does not say how many heads its attention has; 64 channels a head are known "
            "of widths up to 1024 alone",
            "use a released file; docs/teachers.md lists them",
        )
    return width // 64


def is_untrained_norm(checkpoint: Checkpoint, prefix: str) -> bool:
    """Whether `prefix`.weight is all 1 and `prefix`.bias all 0, as a norm that was added and never trained."""
    weight, bias = checkpoint.tensor(f"{prefix}.weight"), checkpoint.tensor(f"{prefix}.bias")
    return bool((weight == 1).all()) and bool((bias == 0).all())


_SUPERVISED = r"For(Image|Sequence|Token|Audio)Classification|ForQuestionAnswering|ForMultipleChoice|Segmentation|Depth"


def _listed(what: str, names: set[str]) -> str:
    if not names:
        return ""
    first = sorted(names)[:6]
    return f"{what} {', '.join(first)}" + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
