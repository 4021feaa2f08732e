"""What pictures and texts share in SHRe: three linear layers on one vector, alone or behind an attention.

The third of them is the student's head, behind its final norm; here are the first two.
B batch, T tokens, D width, F hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emkum.models.blocks import Block, BlockSpec

SHARED_LAYERS = {"blocks": 1, "mome": 1, "mlp": 3, "attention-mlp": 2}  # by `student.shared`: those in contrast


@dataclass(frozen=True)
class SharedMlpSpec:
    """hidden: channels between the two layers. heads: of the attention in front; None: no attention."""

    hidden: int
    heads: int | None = None


class SharedMlp(nn.Module):
    """Linear-GELU-LN-Linear on a vector: h1 = x W1 + b1, h2 = LN(GELU(h1)) W2 + b2.

    Source: the thesis's first SHRe (THESIS.md section 1), where h1, h2 and the head's output meet in contrast.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-6)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, vectors_BD: Tensor) -> tuple[Tensor, Tensor]:
        """h1 [B, F] and h2 [B, D]; any axes in front."""
        first_BF = self.fc1(vectors_BD)
        return first_BF, self.fc2(self.norm(nn.functional.gelu(first_BF)))


class AttentionMlp(nn.Module):
    """A pre-norm Transformer block with that network in it: x' = x + MHA(LN(x)), out = x' + h2(LN(x')).

    Source: the thesis's SHRe with a shared Transformer block: h1 and h2 of the first token meet in contrast, h2 is
    what retrieval reads, and the head reads `out`.
    """

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.attention = Block(BlockSpec(width, heads, hidden), only="attention")
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = SharedMlp(width, hidden)

    def forward(
        self, tokens_BTD: Tensor, mask_BT: Tensor | None = None, queries: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h1 [B, T, F], h2 [B, T, D] and out [B, T, D], of the first `queries` tokens if given."""
        attended_BTD = self.attention.attend(self.attention.norm1(tokens_BTD), None, mask_BT, queries)
        tokens_BTD = tokens_BTD[:, :queries] + attended_BTD
        first_BTF, second_BTD = self.mlp(self.norm(tokens_BTD))
        return first_BTF, second_BTD, tokens_BTD + second_BTD


def build_shared_mlp(width: int, spec: SharedMlpSpec) -> SharedMlp | AttentionMlp:
    """The module of a spec."""
    if spec.heads is None:
        return SharedMlp(width, spec.hidden)
    return AttentionMlp(width, spec.hidden, spec.heads)


def start_anew(module: nn.Module) -> None:
    """Matrices truncated normal with deviation 0.02 from torch's generator, biases 0."""
    with torch.no_grad():
        for linear in module.modules():
            if isinstance(linear, nn.Linear):
                nn.init.trunc_normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
