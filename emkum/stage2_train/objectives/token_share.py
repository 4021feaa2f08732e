"""How much a rank's mean over tokens weighs beside those of the other ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from emkum.stage2_train.objectives.gather import gathered_constants


@torch.no_grad()
def token_share(count: Tensor) -> Tensor:
    """n / mean over ranks of n, a float32 scalar: 1 on one rank, and 0 where no rank has a token.

    A rank's loss is a mean over its own n tokens. Ranks average their gradients, so that a mean times this share
    becomes, over ranks, the mean over the tokens of all of them. A collective call.
    """
    count = count.float()
    return count / gathered_constants(count[None]).mean().clamp(min=1e-9)
