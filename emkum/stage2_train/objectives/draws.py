"""Random numbers of a batch: a sample gets the same whether one rank holds the batch or several do.

B batch of this rank, C numbers a sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emkum.stage2_train.objectives.gather import num_ranks, own_part


def uniform(rows: int, columns: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """float32 in [0, 1), [B, C], on `device`: drawn for the rows of all ranks, of which this rank takes its part.

    Ranks hold equal parts of a batch and generators in equal states. The generator's device draws: one on the CPU gives
    the same numbers for every device, one on the training device saves the copy.
    """
    drawn_GC = torch.rand(rows * num_ranks(), columns, generator=generator, device=generator.device)
    return own_part(drawn_GC).to(device, non_blocking=True)
