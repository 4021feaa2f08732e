"""Image-text contrast with the features of earlier steps as further negatives.

B batch (of this rank), N candidates (of all ranks, then of the queue), G rows of all ranks, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from emkum.stage2_train.objectives.ctl import FifoBank
from emkum.stage2_train.objectives.gather import gathered, gathered_constants, own_part
from emkum.stage2_train.objectives.itc import MAX_LOG_SCALE, Contrast, choose, same_picture, unit


class FeatureQueue(nn.Module):
    """The features of pictures and of captions of the last `capacity` pairs, unit vectors. Saved with a checkpoint.

    As they were when pushed: the student that made them has moved on since. A capacity larger than the data holds a
    pair as often as it was pushed.
    """

    def __init__(self, capacity: int, width: int) -> None:
        super().__init__()
        self.images = FifoBank(capacity, width)
        self.texts = FifoBank(capacity, width)

    @torch.no_grad()
    def push(self, images_GD: Tensor, texts_GD: Tensor, image_rows_G: Tensor) -> None:
        """Take the pairs of all ranks in (`gathered_constants`), the oldest out. Once a step, after its loss."""
        self.images.push(images_GD, image_rows_G)
        self.texts.push(texts_GD, image_rows_G)


def itc_queue(
    images_BD: Tensor,
    texts_BD: Tensor,
    log_scale: Tensor,
    image_rows_B: Tensor,
    queue: FeatureQueue,
    keys: tuple[Tensor, Tensor] | None = None,
) -> Contrast:
    """1/2 CE(s d(I) [d(T); Q_T]^T, diagonal) + 1/2 CE(s d(T) [d(I); Q_I]^T, diagonal), s = exp(min(log_scale, ln 100)).

    Q_I, Q_T: the queue. keys: the batch's pictures and captions as a momentum encoder sees them [B, D], which stand in
    for d(I) and d(T) between the brackets, without gradient, and are what is pushed then; None: the student's own, as
    in `itc`, which an empty queue gives. A candidate of the sample's own picture is left out of the sum, in the batch
    and in the queue; without that, a queue larger than the data holds every sample's own pair as a negative.
    Sources: He et al. 2020 (MoCo, arXiv:1911.05722), section 3; Li et al. 2021 (ALBEF, arXiv:2107.07651), section 3.2,
    without its soft targets: 65,536 rows, and a momentum encoder that `ema.ema_update_` moves by 0.995 a step.
    """
    rows_G = gathered_constants(image_rows_B)
    labels_B = own_part(torch.arange(len(rows_G), device=rows_G.device))
    image_keys_GD = gathered(unit(images_BD)) if keys is None else gathered_constants(unit(keys[0].detach()))
    text_keys_GD = gathered(unit(texts_BD)) if keys is None else gathered_constants(unit(keys[1].detach()))
    # A FIFO bank does not look at views, so the rows stand in for them.
    image_candidates_ND, rows_N, _ = queue.images.candidates(image_keys_GD, rows_G, rows_G)
    text_candidates_ND, _, _ = queue.texts.candidates(text_keys_GD, rows_G, rows_G)
    with torch.autocast(images_BD.device.type, enabled=False):
        scale = log_scale.clamp(max=MAX_LOG_SCALE).exp()
        image_logits_BN = scale * unit(images_BD) @ text_candidates_ND.T
        text_logits_BN = scale * unit(texts_BD) @ image_candidates_ND.T
    twins_BN = same_picture(image_rows_B, rows_N, labels_B)
    image_loss, image_accuracy = choose(image_logits_BN.masked_fill(twins_BN, -math.inf), labels_B)
    text_loss, text_accuracy = choose(text_logits_BN.masked_fill(twins_BN, -math.inf), labels_B)
    return Contrast(0.5 * (image_loss + text_loss), image_loss, text_loss, image_accuracy, text_accuracy)
