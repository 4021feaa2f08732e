"""A Network of what is run in one piece: a folder that no family reads, a model of timm, a user's function."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from emkum.errors import UnsupportedNetwork
from emkum.models import whole_timm, whole_transformers, whole_user
from emkum.models.families.checkpoint import Checkpoint
from emkum.models.network import Network, network_name, weights_digest
from emkum.models.tokenizer import MAX_TOKENS, read_tokenizer
from emkum.models.whole import WholeNetwork


def network_of_folder(
    folder: Path, checkpoint: Checkpoint, logits: bool, source: str, revision: str, name: str
) -> Network:
    """Whatever transformers reads in a checkpoint folder. logits: it must have a classifier."""
    backbone, preprocessing = whole_transformers.read_whole(folder, checkpoint, logits)
    text = backbone.spec.modality == "text"
    return _network(
        backbone,
        name,
        preprocessing=preprocessing,
        tokenizer=read_tokenizer(folder) if text else None,
        source=source,
        revision=revision,
        licence="unknown",
        supervision=whole_transformers.supervision(checkpoint.config),
    )


def network_of_timm(model: str, source: str) -> Network:
    """A model of timm, called after it: `timm-resnet50.a1_in1k`."""
    backbone, preprocessing, supervision, licence = whole_timm.read_whole(model)
    return _network(
        backbone,
        network_name(f"timm-{backbone.spec.name}"),
        preprocessing=preprocessing,
        tokenizer=None,
        source=source,
        revision=backbone.version,
        licence=licence,
        supervision=supervision,
    )


def network_of_function(source: str) -> Network:
    """What a user's function builds, called module-function unless it says otherwise."""
    backbone, teacher, preprocessing, sha256 = whole_user.read_whole(source)
    return _network(
        backbone,
        network_name(teacher.name or re.sub(r"[.:]", "-", backbone.spec.name)),
        preprocessing=preprocessing,
        tokenizer=teacher.tokenizer,
        source=source,
        revision=sha256,
        licence=teacher.licence,
        supervision=teacher.supervision,
    )


def require_logits(network: Network) -> None:
    """Raises UnsupportedNetwork unless the network has class logits."""
    if not getattr(network.backbone.spec, "num_classes", 0):
        raise UnsupportedNetwork(
            f"{network.name} ({network.family}) has no classifier", "leave #logits out, or name a network with one"
        )


def _network(backbone: WholeNetwork, name: str, **more: Any) -> Network:
    longest = backbone.spec.max_tokens
    return Network(
        name=name,
        family=backbone.spec.family,
        modality=backbone.spec.modality,
        backbone=backbone,
        max_tokens=min(MAX_TOKENS, longest),
        weights_sha256=weights_digest(backbone),
        **more,
    )
