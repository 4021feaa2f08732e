"""Ranking: a picture is closer to its own caption than to any other by a margin, and a caption to its picture.

B batch (of this rank), N candidates (of all ranks), D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emkum.stage2_train.objectives.gather import gathered, gathered_constants, num_ranks, own_part
from emkum.stage2_train.objectives.itc import Contrast, unit


def ranking(images_BD: Tensor, texts_BD: Tensor, margin: float, image_rows_B: Tensor) -> Contrast:
    """1/B sum_i sum_j [m - S_ii + S_ij]_+ + [m - S_ii + S_ji]_+, S = d(I) d(T)^T, j over the other pictures' pairs.

    The first half is the image loss, the second the text loss: `loss` is their sum, as published, not their mean, and
    grows with the candidates. image_rows_B: int64, the picture of each pair; another caption of the same picture is no
    negative. Several ranks choose among the pairs of all of them (gather.py); each has the loss of its own rows.
    Source: SHRe (Aytar et al. 2017), section 3, on one layer.
    """
    rows_N = gathered_constants(image_rows_B)
    labels_B = own_part(torch.arange(len(rows_N), device=rows_N.device))
    with torch.autocast(images_BD.device.type, enabled=False):
        images_BD, texts_BD = unit(images_BD), unit(texts_BD)
        image_cosines_BN = images_BD @ gathered(texts_BD).T
        text_cosines_BN = image_cosines_BN.T if num_ranks() == 1 else texts_BD @ gathered(images_BD).T
    own_BN = image_rows_B[:, None] == rows_N[None, :]  # the pair itself, and its picture's other captions
    image_loss, image_accuracy = _hinge(image_cosines_BN, own_BN, labels_B, margin)
    text_loss, text_accuracy = _hinge(text_cosines_BN, own_BN, labels_B, margin)
    return Contrast(image_loss + text_loss, image_loss, text_loss, image_accuracy, text_accuracy)


def _hinge(cosines_BN: Tensor, own_BN: Tensor, labels_B: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """The mean over rows of the sum of violations, and the fraction of rows whose label is closest."""
    right_B1 = cosines_BN.gather(1, labels_B[:, None])
    loss = (margin - right_B1 + cosines_BN).clamp(min=0).masked_fill(own_BN, 0).sum(dim=1).mean()
    best_B = cosines_BN.detach().masked_fill(own_BN, -math.inf).amax(dim=1)
    return loss, (right_B1.detach()[:, 0] > best_B).float().mean()
