"""All-token regression: the mean of the student's layers meets the mean of the teacher's, token by token.

B batch, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def layers_mse(student_BTD: Tensor, targets_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Sum over real tokens of |student - target|^2, over (D x real tokens); 0 where no token is real.

    Both sides are means of normalised layers as made by `emkum.models.targets.layers`: instance norm over the real
    tokens of each layer, mean over layers, and for pictures a layer norm. mask_BT: bool, True = real; None = all.
    Source: data2vec 2.0 (Baevski et al. 2022), section 3, with every layer and with CLS in the loss (THESIS.md
    section 2, `layers-mse`).
    """
    exact = student_BTD if student_BTD.dtype == torch.float64 else student_BTD.float()
    difference_BTD = exact - targets_BTD.to(exact.dtype)
    if mask_BT is None:
        return difference_BTD.square().mean()
    # Before the square, and not by a product: padding may hold NaN, whose gradient would be NaN even times 0.
    difference_BTD = difference_BTD.masked_fill(~mask_BT[..., None], 0)
    return difference_BTD.square().sum() / (mask_BT.sum() * exact.shape[-1]).clamp(min=1)
