"""The names transformers gives tensors: those on disk, which are stable, from either of its spellings."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from emkum.errors import UnsupportedNetwork
from emkum.models.blocks import Activation

# transformers 5 renamed modules in memory and maps names back when it saves; both spellings are met on disk.
_LAYER = r"^layers\.(\d+)\."
_TO_LEGACY: tuple[tuple[str, str], ...] = (
    (_LAYER + r"relative_position_bias\.", r"encoder.layer.\1.attention.attention.relative_position_bias."),
    (_LAYER + r"mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (_LAYER + r"mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
    (_LAYER, r"encoder.layer.\1."),
    (r"^shared_position_bias\.", "encoder.relative_position_bias."),
    (r"^(encoder\.layer\.\d+\.attention)\.q_proj\.", r"\1.attention.query."),
    (r"^(encoder\.layer\.\d+\.attention)\.k_proj\.", r"\1.attention.key."),
    (r"^(encoder\.layer\.\d+\.attention)\.v_proj\.", r"\1.attention.value."),
    (r"^(encoder\.layer\.\d+\.attention)\.o_proj\.", r"\1.output.dense."),
    (r"\bLayerNorm\.gamma$", "LayerNorm.weight"),  # BERT's first release
    (r"\bLayerNorm\.beta$", "LayerNorm.bias"),
)


def legacy_name(prefix: str) -> Callable[[str], str]:
    """A function from a name on disk to the stable name, without `prefix` (such as "vit.")."""

    def rename(name: str) -> str:
        name = name.removeprefix(prefix)
        for pattern, replacement in _TO_LEGACY:
            name = re.sub(pattern, replacement, name)
        return name

    return rename


def activation(config: dict[str, Any], default: str) -> Activation:
    """Our name of config.json's hidden_act. Raises UnsupportedNetwork for one we do not compute."""
    known: dict[str, Activation] = {
        "gelu": "gelu",
        "quick_gelu": "quick_gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "relu": "relu",
        "silu": "silu",
    }
    found = str(config.get("hidden_act", default))
    if found not in known:
        raise UnsupportedNetwork(f"an activation {found!r}; known are {', '.join(known)}")
    return known[found]


def vision_eps(config: dict[str, Any]) -> float:
    """The epsilon of the norms of a vision network in config.json.

    1e-12 is BERT's, copied as transformers' default: DINO, BEiT and data2vec vision were all trained with 1e-6.
    """
    eps = float(config.get("layer_norm_eps", 1e-12))
    return 1e-6 if eps == 1e-12 else eps


def square(value: object, what: str) -> int:
    """The side of a square given as a number or a pair. Raises UnsupportedNetwork if it is not square."""
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int):
        raise UnsupportedNetwork(f"{what} {value}; only squares are supported")
    return side
