"""Proximal regularisation: features stay near those of a slower network, so that a queue of them ages less.

B batch, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emkum.stage2_train.objectives.cls_mse import Regression
from emkum.stage2_train.objectives.itc import unit


def proximal(
    images_BD: Tensor, texts_BD: Tensor, old_images_BD: Tensor, old_texts_BD: Tensor, strength: float
) -> Regression:
    """1/2 (P(I, I') + P(T, T')), P(f, f') = strength/2 mean over samples of |d(f) - d(f')|^2, from 0 to 2 strength.

    f' has no gradient. Source: Wu et al. 2018 (arXiv:1805.01978), section 3.3, where f' is what the feature was when
    its sample was seen last, the weight is 30, and the loss has no factor 1/2. A queue shorter than the data never
    holds that, so that the thesis left the term out; f' of an average network (`ema.ema_update_`) is emkum's own.
    """
    image_loss = _distance(images_BD, old_images_BD, strength)
    text_loss = _distance(texts_BD, old_texts_BD, strength)
    return Regression(0.5 * (image_loss + text_loss), image_loss, text_loss)


def _distance(now_BD: Tensor, old_BD: Tensor, strength: float) -> Tensor:
    assert now_BD.shape == old_BD.shape, (now_BD.shape, old_BD.shape)  # no broadcasting
    with torch.no_grad():
        old_BD = unit(old_BD)
    return 0.5 * strength * (unit(now_BD) - old_BD).square().sum(dim=1).mean()
