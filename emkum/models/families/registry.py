"""The families, one file each in this folder: found by themselves, with their entries of the catalogue."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any, TypeVar

import torch
from torch import nn

from emkum.errors import UnsupportedNetwork
from emkum.models import families
from emkum.models.audio import AudioBackbone
from emkum.models.backbone import Backbone, BackboneSpec, Modality
from emkum.models.families.checkpoint import Architecture, Checkpoint, KeyMap, Shapes, read_tensors
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.families.timm_folders import tag_of
from emkum.models.resnet import ResNet
from emkum.models.whole import WholeSpec

Module = TypeVar("Module", bound=nn.Module)


def _found() -> tuple[Family, ...]:
    """What every module of the folder lists as FAMILIES, by the name of the module."""
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__) if module.name != "registry")
    modules = [importlib.import_module(f"{families.__name__}.{name}") for name in names]
    return tuple(family for module in modules for family in getattr(module, "FAMILIES", ()))


FAMILIES = _found()

CATALOGUE: dict[str, CatalogueEntry] = {
    entry.name: dataclasses.replace(
        entry, family=family.name, modality=family.modality, targets=entry.targets or family.default_targets
    )
    for family in FAMILIES
    for entry in family.entries
}

_SPECS: dict[str, type[Any]] = {
    str(next(f.default for f in dataclasses.fields(spec) if f.name == "kind")): spec
    for spec in (BackboneSpec, WholeSpec, *(family.spec for family in FAMILIES if family.spec is not None))
}


def family_of(checkpoint: Checkpoint, modality: Modality | None = None) -> Family:
    """The family that reads config.json's model_type: that of `modality`, else of pictures where several towers are.

    Without a model_type, as timm keeps its folders, that of its tag or that which recognises the tensors. Raises
    UnsupportedNetwork if there is none.
    """
    model_type = checkpoint.config.get("model_type")
    if model_type is None and is_original(checkpoint.shapes):
        tag = tag_of(checkpoint.config)
        if tagged := [family for family in FAMILIES if family.timm_tag and family.timm_tag == tag]:
            return _tower(tagged, modality, checkpoint.label, "")
        return family_of_original(checkpoint.shapes, checkpoint.label, modality)
    fitting = [family for family in FAMILIES if model_type in family.model_types]
    known = ", ".join(sorted({t for family in FAMILIES for t in family.model_types}))
    what = f"{checkpoint.label} is of type {model_type!r}"
    return _tower(fitting, modality, what, f"types that can be read: {known}")


def family_of_original(shapes: Shapes, label: str, modality: Modality | None = None) -> Family:
    """The family that recognises these tensors of an original file. Raises UnsupportedNetwork if none does."""
    fitting = _recognising(shapes)
    known = ", ".join(sorted({family.name for family in FAMILIES if family.recognises}))
    what = f"{label} is no original file we know (tensors such as {', '.join(list(shapes)[:3])})"
    way_out = f"original files are read of {known}; others as a folder with config.json; if it is one of these without "
    return _tower(fitting, modality, what, f"{way_out}its heads, say so: emkum teachers convert FILE --family NAME")


def is_original(shapes: Shapes) -> bool:
    """Whether any family recognises these tensors as those of an original file."""
    return bool(_recognising(shapes))


def _recognising(shapes: Shapes) -> list[Family]:
    return [family for family in FAMILIES if family.recognises and family.recognises(shapes)]


def _tower(fitting: list[Family], modality: Modality | None, what: str, way_out: str) -> Family:
    if not fitting:
        raise UnsupportedNetwork(what, way_out)
    if modality is None:
        return next((family for family in fitting if family.modality == "image"), fitting[0])
    for family in fitting:
        if family.modality == modality:
            return family
    found = ", ".join(family.modality for family in fitting)
    raise UnsupportedNetwork(f"{what}: it reads {found}, not {modality}", f"leave #{modality} out")


def family_named(name: str, modality: Modality) -> Family | None:
    """The family of that name and modality; None for a network that belongs to none."""
    return next((f for f in FAMILIES if (f.name, f.modality) == (name, modality)), None)


def read_backbone(family: Family, checkpoint: Checkpoint) -> Backbone | ResNet | AudioBackbone:
    """The checkpoint's network in float32, frozen and in evaluation mode. Raises UnsupportedNetwork."""
    key_map = key_map_of(family, checkpoint)
    checkpoint = checkpoint.renamed(family.rename)
    backbone = empty_backbone(key_map.spec)
    state = read_tensors(checkpoint, key_map, backbone.state_dict())
    backbone.load_state_dict(state, strict=True, assign=True)
    found: Backbone | ResNet | AudioBackbone = frozen(backbone)
    return found


def key_map_of(family: Family, checkpoint: Checkpoint) -> KeyMap:
    """How the family reads this checkpoint. Raises UnsupportedNetwork also where it lacks what the family counts on."""
    try:
        return family.key_map(checkpoint.renamed(family.rename))
    except (KeyError, IndexError, ValueError) as error:
        lacks = f"lacks {error.args[0]}" if isinstance(error, KeyError) else "lacks tensors, or has others of that name"
        raise UnsupportedNetwork(
            f"{checkpoint.label} is no {family.name} as we know it: it {lacks}",
            "use a whole checkpoint, with its config.json where it has one; docs/teachers.md lists them",
        ) from error


def spec_of(architecture: dict[str, Any]) -> Architecture:
    """An architecture from its JSON form. Raises UnsupportedNetwork for a kind we do not know."""
    kind = architecture["kind"]
    if kind not in _SPECS:
        raise UnsupportedNetwork(f"an architecture of kind {kind!r}; known are {', '.join(_SPECS)}", "update emkum")
    found: Architecture = _SPECS[kind].from_json(architecture)
    return found


def empty_backbone(spec: Architecture) -> Any:
    """A network of this shape without numbers, on the meta device; load_state_dict(assign=True) gives it them."""
    with torch.device("meta"):
        return spec.build()


def frozen(backbone: Module) -> Module:
    """The same module, in evaluation mode and without gradients."""
    return backbone.eval().requires_grad_(False)
