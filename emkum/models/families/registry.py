"""The table of families, and a checkpoint read with the one that fits."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from emkum.errors import UnsupportedNetwork
from emkum.models.audio import AudioBackbone, AudioSpec
from emkum.models.backbone import Backbone, BackboneSpec
from emkum.models.families import (
    beit,
    beit2,
    bert,
    clip_vision,
    data2vec_audio,
    data2vec_vision,
    dinov2,
    resnet,
    roberta,
    vit,
)
from emkum.models.families.checkpoint import Checkpoint, read_tensors
from emkum.models.families.family import Family
from emkum.models.resnet import ResNet, ResNetSpec

Module = TypeVar("Module", bound=nn.Module)

FAMILIES: tuple[Family, ...] = (
    vit.FAMILY,
    dinov2.FAMILY,
    dinov2.REGISTERS_FAMILY,
    beit.FAMILY,
    data2vec_vision.FAMILY,
    beit2.FAMILY,
    clip_vision.FAMILY,
    resnet.FAMILY,
    bert.FAMILY,
    roberta.FAMILY,
    roberta.DATA2VEC_FAMILY,
    data2vec_audio.FAMILY,
    data2vec_audio.SECOND_FAMILY,
)


def family_of(checkpoint: Checkpoint) -> Family:
    """The family that reads config.json's model_type. Raises UnsupportedNetwork if none does."""
    model_type = checkpoint.config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(t for family in FAMILIES for t in family.model_types))
    raise UnsupportedNetwork(f"{checkpoint.label} is of type {model_type!r}", f"types that can be read: {known}")


def read_backbone(family: Family, checkpoint: Checkpoint) -> Backbone | ResNet | AudioBackbone:
    """The checkpoint's network in float32, frozen and in evaluation mode. Raises UnsupportedNetwork."""
    checkpoint = checkpoint.renamed(family.rename)
    key_map = family.key_map(checkpoint)
    backbone = empty_backbone(key_map.spec)
    state = read_tensors(checkpoint, key_map, backbone.state_dict())
    backbone.load_state_dict(state, strict=True, assign=True)
    return frozen(backbone)


def empty_backbone(spec: BackboneSpec | ResNetSpec | AudioSpec) -> Backbone | ResNet | AudioBackbone:
    """A network of this shape without numbers, on the meta device; load_state_dict(assign=True) gives it them."""
    with torch.device("meta"):
        if isinstance(spec, AudioSpec):
            return AudioBackbone(spec)
        return ResNet(spec) if isinstance(spec, ResNetSpec) else Backbone(spec)


def frozen(backbone: Module) -> Module:
    """The same module, in evaluation mode and without gradients."""
    return backbone.eval().requires_grad_(False)
