"""Masked modelling: the words hidden in a caption are named from its picture, and hidden patches from the caption.

    loss = -1/|M| sum_{i in M} log softmax(z_i)_{y_i}

in nats; M the hidden places of the batch, y the word or the patch's code. Words: z = E LN(GELU(W h + b)) + b', E the
embedding matrix of the text encoder. Patches: z = W h + b over the J codes of a codebook of the teacher's patches
(codes.py). Source: BERT (arXiv:1810.04805) and BEiT (arXiv:2106.08254); pictures and texts at once as BEiT-3
(arXiv:2208.10442). What is hidden: masking.py.
B batch, T tokens, K places, D width, E width of an embedding, V vocabulary, J codes, N patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from emkum.stage2_train.objectives.masking import IGNORED
from emkum.stage2_train.objectives.token_share import token_share


@dataclass(frozen=True)
class MaskedModelling:
    """Mean cross-entropy of the hidden places, in nats, and the fraction of them that were named right. Scalars.

    Of several ranks, each has its part of the mean over all: the mean over ranks is that of the joined batch.
    """

    loss: Tensor
    accuracy: Tensor


def tokens_at(tokens_BTD: Tensor, places_BK: Tensor, labels_BK: Tensor) -> Tensor:
    """The tokens at the places, [B, K, D]; zeros, without gradient, where the label is IGNORED."""
    taken_BKD = tokens_BTD.gather(1, places_BK[..., None].expand(-1, -1, tokens_BTD.shape[2]))
    return taken_BKD.masked_fill((labels_BK == IGNORED)[..., None], 0)


def masked_ce(logits_BKV: Tensor, labels_BK: Tensor) -> MaskedModelling:
    """The loss in this file's opening over the labels that are not IGNORED, in float32 (float64 stays); 0 of none."""
    exact_BKV = logits_BKV if logits_BKV.dtype == torch.float64 else logits_BKV.float()
    count = (labels_BK != IGNORED).sum()
    summed = functional.cross_entropy(
        exact_BKV.flatten(0, 1), labels_BK.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    right = (exact_BKV.detach().argmax(dim=-1) == labels_BK).sum()  # no code is IGNORED
    share = token_share(count) / count.clamp(min=1)
    return MaskedModelling(summed * share, right * share)


class MaskedWordHead(nn.Module):
    """Linear-GELU-LN to the width of the embeddings, then products with them and a bias (BERT's head)."""

    def __init__(self, width: int, vocabulary: int, embedding_width: int | None = None) -> None:
        super().__init__()
        self.transform = nn.Linear(width, embedding_width or width)
        self.norm = nn.LayerNorm(embedding_width or width, eps=1e-12)
        self.bias_V = nn.Parameter(torch.zeros(vocabulary))
        nn.init.trunc_normal_(self.transform.weight, std=0.02)
        nn.init.zeros_(self.transform.bias)

    def forward(self, tokens_BKD: Tensor, embeddings_VE: Tensor) -> Tensor:
        """Logits [B, K, V]. embeddings_VE: the word embeddings that the text encoder reads; learned if it learns them.

        They are an argument and not a part of the module, which would else save and count them twice.
        """
        words_BKE = self.norm(functional.gelu(self.transform(tokens_BKD)))
        return functional.linear(words_BKE, embeddings_VE.to(words_BKE.dtype), self.bias_V.to(words_BKE.dtype))


class MaskedPatchHead(nn.Linear):
    """A linear layer from tokens [.., D] to the logits of J codes, and the learned token that hides a patch."""

    def __init__(self, width: int, codes: int) -> None:
        super().__init__(width, codes)
        self.mask_token_D = nn.Parameter(torch.empty(width))
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
        nn.init.trunc_normal_(self.mask_token_D, std=0.02)

    def hide(self, tokens_BTD: Tensor, mask_BN: Tensor, positions_TD: Tensor | None = None) -> Tensor:
        """The cached tokens with the learned one in place of each hidden patch; CLS and registers stay in front.

        positions_TD: the position embeddings that are in the cached tokens, which a hidden patch keeps. Without them
        hidden patches know their place only from a position bias in the attention.
        """
        num_prefix = tokens_BTD.shape[1] - mask_BN.shape[1]
        hidden_BT1 = functional.pad(mask_BN, (num_prefix, 0))[..., None]
        shown_D = self.mask_token_D if positions_TD is None else self.mask_token_D + positions_TD
        return torch.where(hidden_BT1, shown_D.to(tokens_BTD.dtype), tokens_BTD)
