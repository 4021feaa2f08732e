"""What is regressed of a frozen network: pure functions of its tokens and layers.

B batch, T tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # of both norms below, as in data2vec


def cls(final_BTD: Tensor) -> Tensor:
    """The CLS token after the final norm, [B, D]: t = h_0 (the target of cls-mse and ctl)."""
    return final_BTD[:, 0]


def patches(final_BTD: Tensor, num_prefix: int) -> Tensor:
    """The tokens after CLS and registers, after the final norm, [B, T - num_prefix, D]."""
    return final_BTD[:, num_prefix:]


def logits(final_BTD: Tensor, head_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """Class logits of a linear head on CLS, [B, C]: z = W h_0 + b (the target of SHRe, arXiv:1706.00932)."""
    return F.linear(cls(final_BTD).to(head_CD.dtype), head_CD, bias_C)


def layers(hidden: Iterable[Tensor], mask_BT: Tensor | None, final_layer_norm: bool) -> Tensor:
    """The mean of all layers, each normalised, [B, T, D] in float32 (float64 if that comes in).

        Y = LN(mean_l IN(H_l))    images: final_layer_norm=True, all tokens (CLS and registers too)
        Y = mean_l IN(H_l)        text: final_layer_norm=False, with a mask

    IN is instance norm over tokens per channel: (h - mean_t h) / sqrt(var_t h + eps), over the real tokens of the mask
    only (bool, True = real), the variance biased; LN is layer norm without parameters. Tokens outside the mask are 0.
    The objective layers-mse (data2vec, arXiv:2202.03555, with all layers instead of the top K).
    `hidden`: tokens_BTD after each block (an iterator is read once, one layer at a time).
    """
    total_BTD: Tensor | None = None
    num_layers = 0
    for hidden_BTD in hidden:
        exact_BTD = hidden_BTD if hidden_BTD.dtype == torch.float64 else hidden_BTD.float()
        normed_BTD = instance_norm(exact_BTD, mask_BT)
        total_BTD = normed_BTD if total_BTD is None else total_BTD.add_(normed_BTD)
        num_layers += 1
    if total_BTD is None:
        raise ValueError("a mean over no layers")
    mean_BTD = total_BTD.div_(num_layers)
    if final_layer_norm:
        mean_BTD = F.layer_norm(mean_BTD, mean_BTD.shape[-1:], eps=EPS)
        if mask_BT is not None:
            mean_BTD = mean_BTD * mask_BT[..., None]
    return mean_BTD


def instance_norm(tokens_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Each channel to mean 0 and variance 1 over the tokens of a sample; only real tokens count, others become 0."""
    if mask_BT is None:
        variance_B1D, mean_B1D = torch.var_mean(tokens_BTD, dim=1, correction=0, keepdim=True)
        return (tokens_BTD - mean_B1D) * torch.rsqrt(variance_B1D + EPS)
    real_BT1 = mask_BT[..., None]
    # Not a product with the mask: a pad may hold inf or NaN.
    tokens_BTD = tokens_BTD.masked_fill(~real_BT1, 0)
    num_real_B11 = real_BT1.sum(1, keepdim=True).clamp(min=1)
    mean_B1D = tokens_BTD.sum(1, keepdim=True) / num_real_B11
    centred_BTD = (tokens_BTD - mean_B1D).masked_fill(~real_BT1, 0)
    variance_B1D = centred_BTD.square().sum(1, keepdim=True) / num_real_B11
    return centred_BTD * torch.rsqrt(variance_B1D + EPS)
