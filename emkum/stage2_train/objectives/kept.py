"""Means over the rows that count, where not every row of a batch does.

B rows of this rank, N candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from emkum.stage2_train.objectives.token_share import token_share


def mean_kept(values_XB: Tensor, kept_B: Tensor) -> Tensor:
    """The mean along the last axis of the values that are kept; 0 where none is.

    The average of it over ranks is the mean over the kept values of all ranks, whatever each of them has
    (token_share.py). What is not kept has a zero gradient. A collective call.
    """
    count = kept_B.sum()
    mean_X = values_XB.masked_fill(~kept_B, 0).sum(dim=-1) / count.clamp(min=1)
    return mean_X * token_share(count)


def choose_kept(logits_BN: Tensor, labels_B: Tensor, kept_B: Tensor) -> tuple[Tensor, Tensor]:
    """As `itc.choose`, over the rows that are kept. The logit of a label is finite, kept or not."""
    losses_B = functional.cross_entropy(logits_BN, labels_B, reduction="none")
    right_B = (logits_BN.detach().argmax(dim=1) == labels_B).to(losses_B.dtype)
    loss, accuracy = mean_kept(torch.stack([losses_B, right_B]), kept_B).unbind()
    return loss, accuracy.detach()
