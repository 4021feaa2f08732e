"""CLS regression: picture and caption both regress the teacher's CLS of the picture.

B batch, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Regression:
    """A regression loss with its image and its text half. All scalars."""

    loss: Tensor
    image_loss: Tensor
    text_loss: Tensor


def cls_mse(images_BD: Tensor, texts_BD: Tensor, targets_BD: Tensor) -> Regression:
    """1/2 mean (h_v - t)^2 + 1/2 mean (h_w - t)^2, over samples and channels.

    The mean over channels, not the sum, so that it weighs about as much as a contrastive term.
    THESIS.md section 2, `cls-mse`.
    """
    image_loss = mse(images_BD, targets_BD)
    text_loss = mse(texts_BD, targets_BD)
    return Regression(0.5 * (image_loss + text_loss), image_loss, text_loss)


def mse(student_BD: Tensor, targets_BD: Tensor) -> Tensor:
    """mean (h - t)^2 over samples and channels: one half of `cls_mse`, as of a student of one modality."""
    assert student_BD.shape == targets_BD.shape, (student_BD.shape, targets_BD.shape)  # no broadcasting
    exact = student_BD if student_BD.dtype == torch.float64 else student_BD.float()
    return (exact - targets_BD.to(exact.dtype)).square().mean()
