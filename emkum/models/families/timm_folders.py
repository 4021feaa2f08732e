"""What the config.json of a timm folder says, which has no model_type: the name of the network, and how it is used."""

from __future__ import annotations

import re
from typing import Any

from emkum.errors import UnsupportedNetwork
from emkum.models.families.checkpoint import Checkpoint


def cfg_of(config: dict[str, Any]) -> dict[str, Any]:
    """How the pretrained network is used: size, colours, crop, tag. {} of what is none of timm's."""
    cfg = config.get("pretrained_cfg")
    return cfg if isinstance(cfg, dict) and "model_type" not in config else {}


def tag_of(config: dict[str, Any]) -> str:
    """How the weights were trained, such as "mae" or "a1_in1k"; "" where timm does not say or it is none of timm's."""
    tag = cfg_of(config).get("tag")
    return tag if isinstance(tag, str) else ""


def name_of(config: dict[str, Any]) -> str:
    """As timm lists it, such as "resnet50.a1_in1k"; "" of what is none of timm's."""
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or "model_type" in config:
        return ""
    return f"{architecture}.{tag_of(config)}".removesuffix(".")


def require_name(checkpoint: Checkpoint, pattern: str, reason: str) -> None:
    """Raises UnsupportedNetwork for a folder of timm whose name lacks `pattern`: tensors alone do not tell it apart."""
    name = name_of(checkpoint.config)
    if name and not re.search(pattern, name):
        raise UnsupportedNetwork(
            f"{checkpoint.label} is timm's {name}: {reason}",
            f"run it as timm does: --teacher timm:{name} (pip install 'emkum[timm]')",
        )
