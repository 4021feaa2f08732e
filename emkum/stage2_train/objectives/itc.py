"""Image-text contrast: pictures and captions of a batch find each other.

B batch (of this rank), N candidates (of all ranks), D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from emkum.stage2_train.objectives.gather import gathered, gathered_constants, num_ranks, own_part

MAX_LOG_SCALE = math.log(100.0)


@dataclass(frozen=True)
class Contrast:
    """A contrastive loss, its image and its text half, and how often each half chose right. All scalars."""

    loss: Tensor
    image_loss: Tensor
    text_loss: Tensor
    image_accuracy: Tensor
    text_accuracy: Tensor


def start_log_scale(temperature: float) -> float:
    """The learned log-scale at the start of training: ln(1/temperature), at most ln 100."""
    return min(math.log(1.0 / temperature), MAX_LOG_SCALE)


@torch.no_grad()
def clamp_log_scale(log_scale: Tensor) -> None:
    """Take a learned log-scale back to ln 100, in place: past it the loss has no gradient to bring it back."""
    log_scale.clamp_(max=MAX_LOG_SCALE)


def unit(vectors: Tensor) -> Tensor:
    """d(x) = x/|x| along the last axis, in float32 (float64 stays)."""
    exact = vectors if vectors.dtype == torch.float64 else vectors.float()
    return functional.normalize(exact, dim=-1)


def itc(images_BD: Tensor, texts_BD: Tensor, log_scale: Tensor, image_rows_B: Tensor) -> Contrast:
    """1/2 CE(s d(I) d(T)^T, diagonal) + 1/2 CE of the transpose, s = exp(min(log_scale, ln 100)).

    image_rows_B: int64, the picture of each pair. Another caption of the same picture is no negative: it is left out
    of the sum. Several ranks choose among the pairs of all of them (gather.py); each has the loss of its own rows.
    Source: Radford et al. 2021 (CLIP), figure 3; the clamp is theirs.
    """
    rows_N = gathered_constants(image_rows_B)
    labels_B = own_part(torch.arange(len(rows_N), device=rows_N.device))
    with torch.autocast(images_BD.device.type, enabled=False):
        scale, images_BD, texts_BD = log_scale.clamp(max=MAX_LOG_SCALE).exp(), unit(images_BD), unit(texts_BD)
        image_logits_BN = scale * images_BD @ gathered(texts_BD).T
        text_logits_BN = image_logits_BN.T if num_ranks() == 1 else scale * texts_BD @ gathered(images_BD).T
    twins_BN = same_picture(image_rows_B, rows_N, labels_B)
    image_loss, image_accuracy = choose(image_logits_BN.masked_fill(twins_BN, -math.inf), labels_B)
    text_loss, text_accuracy = choose(text_logits_BN.masked_fill(twins_BN, -math.inf), labels_B)
    return Contrast(0.5 * (image_loss + text_loss), image_loss, text_loss, image_accuracy, text_accuracy)


def same_picture(rows_B: Tensor, candidate_rows_N: Tensor, labels_B: Tensor) -> Tensor:
    """bool [B, N]: the candidate shows the same picture as the sample and is not its label."""
    same_BN = rows_B[:, None] == candidate_rows_N[None, :]
    return same_BN.scatter(1, labels_B[:, None], False)


def choose(logits_BN: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy, and the fraction of samples whose label has the highest logit."""
    loss = functional.cross_entropy(logits_BN, labels_B)
    accuracy = (logits_BN.detach().argmax(dim=1) == labels_B).float().mean()
    return loss, accuracy
