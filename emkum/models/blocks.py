"""One Transformer block for every family: pre-, post- or sub-norm, LayerScale, relative position bias, any key bias.

B batch, H heads, T tokens, D width, C channels of a head, M width inside the feed-forward network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emkum.models.positions import rotated

NormOrder = Literal["pre", "post"]
QkvBias = Literal["all", "none", "qv"]
Activation = Literal["gelu", "quick_gelu", "gelu_tanh", "relu", "silu"]
Half = Literal["attention", "feed_forward"]


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class BlockSpec:
    """The shape and kind of one block. `qkv_bias` "qv" means that keys have no bias (BEiT).

    sub_norm: two more norms, before the projection out of the attention and before the second matrix of the
    feed-forward network (Magneto, arXiv:2210.06423). gated: the first matrix gives two halves of `mlp_width`, of which
    the first, after the activation, multiplies the second (SwiGLU, arXiv:2002.05202). causal: tokens attend to
    themselves and what stands before them.
    """

    width: int
    heads: int
    mlp_width: int
    norm_order: NormOrder = "pre"
    layer_scale: bool = False
    qkv_bias: QkvBias = "all"
    activation: Activation = "gelu"
    eps: float = 1e-6
    sub_norm: bool = False
    gated: bool = False
    causal: bool = False

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        return spec_json(self, _FIRST_FIELDS)

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"a width of {self.width} cannot be split over {self.heads} heads")
        if self.norm_order not in ("pre", "post") or self.qkv_bias not in ("all", "none", "qv"):
            raise ValueError(f"unknown norm order {self.norm_order!r} or qkv bias {self.qkv_bias!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}")


# What was written from the first; fields that came later are left out where they have their default. Never add to it.
_FIRST_FIELDS = "width heads mlp_width norm_order layer_scale qkv_bias activation eps"


def spec_json(spec: Any, first_fields: str) -> dict[str, Any]:
    """The fields of a dataclass by name: those named in `first_fields`, others where they differ from their default.

    The JSON of an architecture is hashed into fingerprints and kept beside weights. With this rule a new field changes
    neither for the networks that do not use it, so the caches and runs made before it stay valid.
    """
    always = first_fields.split()
    return {
        field.name: getattr(spec, field.name)
        for field in dataclasses.fields(spec)
        if field.name in always or getattr(spec, field.name) != field.default
    }


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
    """Attention and a feed-forward network, each with its norm, optional LayerScale, and residual.

    `only` one half of it is made for blocks that put halves together in other ways (emkum.models.multiway).
    """

    def __init__(self, spec: BlockSpec, only: Half | None = None) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
        if only != "feed_forward":
            self.norm1 = nn.LayerNorm(width, eps=spec.eps)
            self.qkv = Linear(width, 3 * width, bias=spec.qkv_bias == "all")
            if spec.qkv_bias == "qv":
                # Apart, not one bias with zeros in it: an optimiser would let that middle drift on rounding noise.
                self.q_bias = nn.Parameter(torch.zeros(width))
                self.v_bias = nn.Parameter(torch.zeros(width))
            self.attention_norm = nn.LayerNorm(width, eps=spec.eps) if spec.sub_norm else None
            self.proj = Linear(width, width)
            self.scale1 = nn.Parameter(torch.ones(width)) if spec.layer_scale else None
        if only != "attention":
            self.norm2 = nn.LayerNorm(width, eps=spec.eps)
            self.fc1 = Linear(width, spec.mlp_width * (2 if spec.gated else 1))
            self.ffn_norm = nn.LayerNorm(spec.mlp_width, eps=spec.eps) if spec.sub_norm else None
            self.fc2 = Linear(spec.mlp_width, width)
            self.scale2 = nn.Parameter(torch.ones(width)) if spec.layer_scale else None

    def forward(
        self,
        tokens_BTD: Tensor,
        bias: Tensor | None = None,
        mask_BT: Tensor | None = None,
        queries: int | None = None,
        turns_2TC: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The tokens after the block, and the output of its feed-forward network before LayerScale and residual.

        bias: added to the attention logits, [1 or B, H, T, T]. mask_BT: bool, True = a real token; others are not
        attended to (their own outputs are meaningless). queries: only the first so many tokens come out, the same
        numbers for a sixth of the work where that is the CLS token alone. turns_2TC: rotary positions (`rotary_table`).
        """
        if self.spec.norm_order == "pre":
            attended = self.attend(self.norm1(tokens_BTD), bias, mask_BT, queries, turns_2TC)
            tokens_BTD = add_scaled(tokens_BTD[:, :queries], attended, self.scale1)
            ffn_BTD = self.feed_forward(self.norm2(tokens_BTD))
            return add_scaled(tokens_BTD, ffn_BTD, self.scale2), ffn_BTD
        attended = self.attend(tokens_BTD, bias, mask_BT, queries, turns_2TC)
        tokens_BTD = self.norm1(add_scaled(tokens_BTD[:, :queries], attended, self.scale1))
        ffn_BTD = self.feed_forward(tokens_BTD)
        return self.norm2(add_scaled(tokens_BTD, ffn_BTD, self.scale2)), ffn_BTD

    def attend(
        self,
        tokens_BTD: Tensor,
        bias: Tensor | None,
        mask_BT: Tensor | None,
        queries: int | None = None,
        turns_2TC: Tensor | None = None,
    ) -> Tensor:
        """Multi-head self-attention with its output projection, [B, T, D]; of the first `queries` tokens, if given."""
        q, k, v = self.queries_keys_values(tokens_BTD, queries)
        if turns_2TC is not None:
            q, k = rotated(q, turns_2TC), rotated(k, turns_2TC)
        bias = bias if bias is None or queries is None else bias[:, :, :queries]
        mask = attention_mask(bias, mask_BT, q.dtype)
        if self.spec.causal:
            mask = causal_mask(mask, q.shape[2], k.shape[2], q.device)
        return self.merged(attention(q, k, v, mask))

    def queries_keys_values(self, tokens_BTD: Tensor, queries: int | None = None) -> tuple[Tensor, ...]:
        """What attention takes, each [B, H, T, D / H]; queries of the first `queries` tokens only, if given."""
        width = tokens_BTD.shape[-1]
        weight = self.qkv.weight
        qkv_bias: Tensor | None = self.qkv.bias
        if self.spec.qkv_bias == "qv":
            qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(weight.dtype)
        x = in_type_of(weight, tokens_BTD)
        if queries is None:
            return self._heads(F.linear(x, weight, qkv_bias), 3)
        q_bias, kv_bias = (None, None) if qkv_bias is None else (qkv_bias[:width], qkv_bias[width:])
        (q,) = self._heads(F.linear(x[:, :queries], weight[:width], q_bias), 1)
        return q, *self._heads(F.linear(x, weight[width:], kv_bias), 2)

    def merged(self, attended_BHTC: Tensor) -> Tensor:
        """The heads side by side and projected, [B, T, D]."""
        merged_BTD = attended_BHTC.transpose(1, 2).flatten(2)
        if self.attention_norm is not None:
            merged_BTD = self.attention_norm(in_type_of(self.attention_norm.weight, merged_BTD))
        projected_BTD: Tensor = self.proj(merged_BTD)
        return projected_BTD

    def _heads(self, projected: Tensor, count: int) -> tuple[Tensor, ...]:
        """[B, T, count * D] -> `count` tensors [B, H, T, D / H]."""
        batch, num_tokens, _ = projected.shape
        return projected.view(batch, num_tokens, count, self.spec.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def feed_forward(self, tokens_BTD: Tensor) -> Tensor:
        """The two-layer network, [B, T, D]."""
        hidden_BTM = self.fc1(tokens_BTD)
        if self.spec.gated:
            gate_BTM, up_BTM = hidden_BTM.chunk(2, dim=-1)
            hidden_BTM = activated(gate_BTM, self.spec.activation) * up_BTM
        else:
            hidden_BTM = activated(hidden_BTM, self.spec.activation)
        if self.ffn_norm is not None:
            hidden_BTM = self.ffn_norm(in_type_of(self.ffn_norm.weight, hidden_BTM))
        ffn_BTD: Tensor = self.fc2(hidden_BTM)
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


def causal_mask(mask: Tensor | None, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """`mask`, and nothing that comes later than the token itself."""
    earlier_TS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril()
    if mask is None:
        return earlier_TS
    return mask & earlier_TS if mask.dtype == torch.bool else mask.masked_fill(~earlier_TS, float("-inf"))
