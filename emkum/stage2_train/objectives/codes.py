"""Classification of the teacher's CLS: picture and caption both name the code of a codebook nearest to it.

    loss = 1/2 CE(z_v, c) + 1/2 CE(z_w, c)      c = argmax_j cos(t, e_j)

z = W h + b are the logits of a linear layer on the student's feature, in nats. The codebook e is fixed: centres of
spherical k-means over the cached CLS (emkum cache stats --what codebook). Source: THESIS.md section 2, `codes`;
DeepCluster (arXiv:1807.05520) with assignments that stay. B batch, D width, J codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emkum.stage2_train.objectives.itc import choose, unit

ROWS_AT_ONCE = 8_192  # compared with the codebook: 256 MiB of cosines for 8,192 codes


@dataclass(frozen=True)
class Classification:
    """Cross-entropy in nats, its image and its text half, and how often each half was right. All scalars."""

    loss: Tensor
    image_loss: Tensor
    text_loss: Tensor
    image_accuracy: Tensor
    text_accuracy: Tensor


@torch.no_grad()
def nearest_codes(vectors_D: Tensor, codebook_JD: Tensor) -> Tensor:
    """int64, the code with the largest cosine to each vector: [B] of [B, D], [B, N] of patches [B, N, D].

    A vector of length zero has the first code.
    """
    with torch.autocast(vectors_D.device.type, enabled=False):
        codebook_JD = unit(codebook_JD)
        rows = torch.split(unit(vectors_D).flatten(0, -2).to(codebook_JD.dtype), ROWS_AT_ONCE)
        found = torch.cat([(part @ codebook_JD.T).argmax(dim=1) for part in rows])
    return found.view(vectors_D.shape[:-1])


def codes_ce(image_logits_BJ: Tensor, text_logits_BJ: Tensor, codes_B: Tensor) -> Classification:
    """1/2 CE + 1/2 CE over J codes, mean over the batch, in float32 (float64 stays)."""
    image_loss, image_accuracy = choose(_exact(image_logits_BJ), codes_B)
    text_loss, text_accuracy = choose(_exact(text_logits_BJ), codes_B)
    return Classification(0.5 * (image_loss + text_loss), image_loss, text_loss, image_accuracy, text_accuracy)


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
