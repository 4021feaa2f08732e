"""The int8 codec of the cache on the device, equal bit for bit to the one in numpy (docs/format.md, section 4).

D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emkum.errors import NonFiniteFeature


def encode_int8(values: Tensor, mean_D: Tensor, std_D: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises float32 [..., D] to (int8 [..., D], scale float32 [...]).

        z = (values - mean) / std;  scale = max_D |z| / 127, or 1 where that is 0;  stored = round(z / scale)

    rounding half to even, stored within [-127, 127]. mean, std: float32 [D] on the same device, std > 0.
    Raises NonFiniteFeature if a value, or a scale, is inf or NaN: int8 could not tell.
    """
    stored, scale = quantised(values, mean_D, std_D)
    if not bool(torch.isfinite(scale).all()):
        raise NonFiniteFeature("inf or NaN among the values to quantise", "extract in float32 (--compute float32)")
    return stored, scale


def quantised(values: Tensor, mean_D: Tensor, std_D: Tensor) -> tuple[Tensor, Tensor]:
    """As `encode_int8`, without waiting for the device: of what cannot be stored the scale is inf or NaN."""
    standardised = (values.float() - mean_D) / std_D
    scale = standardised.abs().amax(-1) / 127.0
    scale = torch.where(scale == 0, 1.0, scale)
    stored = torch.round(standardised / scale[..., None]).clamp_(-127, 127).to(torch.int8)
    return stored, scale


def decode_int8(stored: Tensor, scale: Tensor, mean_D: Tensor, std_D: Tensor) -> Tensor:
    """values = (stored * scale) * std + mean, float32 [..., D]; in place, so that it is half the memory traffic."""
    return (stored * scale[..., None]).mul_(std_D).add_(mean_D)
