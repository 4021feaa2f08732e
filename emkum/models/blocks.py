"""One Transformer block for every family: pre- or post-norm, LayerScale, relative position bias, any key bias.

B batch, H heads, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormOrder = Literal["pre", "post"]
QkvBias = Literal["all", "none", "qv"]
Activation = Literal["gelu", "quick_gelu", "gelu_tanh", "relu"]


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class BlockSpec:
    """The shape and kind of one block. `qkv_bias` "qv" means that keys have no bias (BEiT)."""

    width: int
    heads: int
    mlp_width: int
    norm_order: NormOrder = "pre"
    layer_scale: bool = False
    qkv_bias: QkvBias = "all"
    activation: Activation = "gelu"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"a width of {self.width} cannot be split over {self.heads} heads")
        if self.norm_order not in ("pre", "post") or self.qkv_bias not in ("all", "none", "qv"):
            raise ValueError(f"unknown norm order {self.norm_order!r} or qkv bias {self.qkv_bias!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}")


class Linear(nn.Linear):
    """A linear layer that computes in the type of its own weight, whatever comes in.

    So a frozen network can keep its residual stream and norms in float32 and its matrices in bfloat16, which is what
    autocast does, without casting every weight in every pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(in_type_of(self.weight, x), self.weight, self.bias)


def in_type_of(weight: Tensor, x: Tensor) -> Tensor:
    """`x` in the type of `weight`; as it is under autocast, which casts both itself."""
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The type matrix products with `weight` are computed in, here and now."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class Block(nn.Module):
    """Attention and a feed-forward network, each with its norm, optional LayerScale, and residual."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
        self.norm1 = nn.LayerNorm(width, eps=spec.eps)
        self.qkv = Linear(width, 3 * width, bias=spec.qkv_bias == "all")
        if spec.qkv_bias == "qv":
            # Apart, not one bias with zeros in the middle: an optimiser would let that middle drift on rounding noise.
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=spec.eps)
        self.fc1 = Linear(width, spec.mlp_width)
        self.fc2 = Linear(spec.mlp_width, width)
        self.scale1 = nn.Parameter(torch.ones(width)) if spec.layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(width)) if spec.layer_scale else None

    def forward(
        self,
        tokens_BTD: Tensor,
        bias: Tensor | None = None,
        mask_BT: Tensor | None = None,
        queries: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The tokens after the block, and the output of its feed-forward network before LayerScale and residual.

        bias: added to the attention logits, [1 or B, H, T, T]. mask_BT: bool, True = a real token; others are not
        attended to (their own outputs are meaningless). queries: only the first so many tokens come out, the same
        numbers for a sixth of the work where that is the CLS token alone.
        """
        if self.spec.norm_order == "pre":
            attended = self.attend(self.norm1(tokens_BTD), bias, mask_BT, queries)
            tokens_BTD = add_scaled(tokens_BTD[:, :queries], attended, self.scale1)
            ffn_BTD = self.feed_forward(self.norm2(tokens_BTD))
            return add_scaled(tokens_BTD, ffn_BTD, self.scale2), ffn_BTD
        attended = self.attend(tokens_BTD, bias, mask_BT, queries)
        tokens_BTD = self.norm1(add_scaled(tokens_BTD[:, :queries], attended, self.scale1))
        ffn_BTD = self.feed_forward(tokens_BTD)
        return self.norm2(add_scaled(tokens_BTD, ffn_BTD, self.scale2)), ffn_BTD

    def attend(
        self, tokens_BTD: Tensor, bias: Tensor | None, mask_BT: Tensor | None, queries: int | None = None
    ) -> Tensor:
        """Multi-head self-attention with its output projection, [B, T, D]; of the first `queries` tokens, if given."""
        batch, _, width = tokens_BTD.shape
        weight = self.qkv.weight
        qkv_bias: Tensor | None = self.qkv.bias
        if self.spec.qkv_bias == "qv":
            qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(weight.dtype)
        x = in_type_of(weight, tokens_BTD)
        if queries is None:
            q, k, v = self._heads(F.linear(x, weight, qkv_bias), 3)
        else:
            q_bias, kv_bias = (None, None) if qkv_bias is None else (qkv_bias[:width], qkv_bias[width:])
            (q,) = self._heads(F.linear(x[:, :queries], weight[:width], q_bias), 1)
            k, v = self._heads(F.linear(x, weight[width:], kv_bias), 2)
            bias = None if bias is None else bias[:, :, :queries]
        attended_BHTC = attention(q, k, v, attention_mask(bias, mask_BT, q.dtype))
        projected_BTD: Tensor = self.proj(attended_BHTC.transpose(1, 2).reshape(batch, -1, width))
        return projected_BTD

    def _heads(self, projected: Tensor, count: int) -> tuple[Tensor, ...]:
        """[B, T, count * D] -> `count` tensors [B, H, T, D / H]."""
        batch, num_tokens, _ = projected.shape
        return projected.view(batch, num_tokens, count, self.spec.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def feed_forward(self, tokens_BTD: Tensor) -> Tensor:
        """The two-layer network, [B, T, D]."""
        ffn_BTD: Tensor = self.fc2(activated(self.fc1(tokens_BTD), self.spec.activation))
        return ffn_BTD


def activated(x: Tensor, activation: Activation) -> Tensor:
    """The activation of x, written over it where no gradient needs it: it is the largest tensor of a block."""
    if not x.requires_grad and activation in ("gelu", "gelu_tanh"):
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        overwritten: Tensor = torch.ops.aten.gelu_(x, approximate=approximate)
        return overwritten
    return ACTIVATIONS[activation](x)


def add_scaled(tokens_BTD: Tensor, update_BTD: Tensor, scale_D: Tensor | None) -> Tensor:
    """tokens + scale * update, in the wider of their types."""
    if scale_D is None:
        return tokens_BTD + update_BTD
    return torch.addcmul(tokens_BTD, update_BTD, scale_D)


def attention(q_BHTC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention, [B, H, T, C]. mask: bool (True = attend) or added to the logits.

    On the CPU the backward pass of torch's fused kernel takes 3 to 16 times as long as these four lines (torch 2.13,
    docs/benchmarks.md), so training there goes without it.
    """
    if q_BHTC.device.type != "cpu" or not (torch.is_grad_enabled() and k_BHSC.requires_grad):
        return F.scaled_dot_product_attention(q_BHTC, k_BHSC, v_BHSC, attn_mask=mask)
    logits_BHTS = (q_BHTC * q_BHTC.shape[-1] ** -0.5) @ k_BHSC.transpose(-1, -2)
    if mask is not None and mask.dtype == torch.bool:
        # The lowest number and not -inf: a row without any real token would give NaN, which the fused kernel does not.
        logits_BHTS = logits_BHTS.masked_fill(~mask, torch.finfo(logits_BHTS.dtype).min)
    elif mask is not None:
        logits_BHTS = logits_BHTS + mask
    attended_BHTC: Tensor = logits_BHTS.softmax(dim=-1, dtype=torch.float32).to(v_BHSC.dtype) @ v_BHSC
    return attended_BHTC


def attention_mask(bias: Tensor | None, mask_BT: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One mask for attention from a bias [1 or B, H, T, T] and a mask of real tokens, or None where neither is."""
    if mask_BT is None:
        return None if bias is None else bias.to(dtype)
    keys_B11T = mask_BT[:, None, None, :]
    return keys_B11T if bias is None else bias.to(dtype).masked_fill(~keys_B11T, float("-inf"))
