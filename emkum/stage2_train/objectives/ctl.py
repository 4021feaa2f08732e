"""Contrastive target loss: picture and caption each find the teacher's CLS of their picture among many.

B batch, N candidates, G rows of the bank, V views, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from emkum.stage2_train.objectives.itc import MAX_LOG_SCALE, Contrast, choose, same_picture, unit


def ctl(
    images_BD: Tensor,
    texts_BD: Tensor,
    candidates_ND: Tensor,
    candidate_rows_N: Tensor,
    labels_B: Tensor,
    image_rows_B: Tensor,
    log_scale: Tensor,
) -> Contrast:
    """1/2 CE(s d(I) C^T, labels) + 1/2 CE(s d(W) C^T, labels), s = exp(min(log_scale, ln 100)).

    candidates_ND: the teacher's targets as unit vectors, float32, constant. candidate_rows_N: the picture each is
    of. labels_B: the candidate of each sample's own picture and view. Other candidates of the same picture are left
    out of the sum. THESIS.md section 2, `ctl`; printed there without s, with which logits in [-1, 1] barely train.
    """
    with torch.autocast(images_BD.device.type, enabled=False):
        scale = log_scale.clamp(max=MAX_LOG_SCALE).exp()
        image_logits_BN = scale * unit(images_BD) @ candidates_ND.T
        text_logits_BN = scale * unit(texts_BD) @ candidates_ND.T
    twins_BN = same_picture(image_rows_B, candidate_rows_N, labels_B)
    image_loss, image_accuracy = choose(image_logits_BN.masked_fill(twins_BN, -math.inf), labels_B)
    text_loss, text_accuracy = choose(text_logits_BN.masked_fill(twins_BN, -math.inf), labels_B)
    return Contrast(0.5 * (image_loss + text_loss), image_loss, text_loss, image_accuracy, text_accuracy)


class FifoBank(nn.Module):
    """The targets of the last `capacity` samples, besides those of the batch. Saved with a checkpoint.

    A frozen teacher's targets never go stale, so no momentum encoder is needed. Capacity 0: the batch alone.
    """

    def __init__(self, capacity: int, width: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.targets_GD: Tensor
        self.rows_G: Tensor
        self.register_buffer("targets_GD", torch.zeros(capacity, width))
        self.register_buffer("rows_G", torch.full((capacity,), -1, dtype=torch.int64))
        self.pushed = 0  # samples ever pushed; on the host, so that the loop never waits for the device

    def candidates(self, targets_BD: Tensor, rows_B: Tensor, views_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(candidates_ND, candidate_rows_N, labels_B): the batch's own targets first, then the bank's."""
        filled = min(self.pushed, self.capacity)
        own_BD, labels_B = unit(targets_BD), torch.arange(len(rows_B), device=rows_B.device)
        if not filled:
            return own_BD, rows_B, labels_B
        return torch.cat([own_BD, self.targets_GD[:filled]]), torch.cat([rows_B, self.rows_G[:filled]]), labels_B

    @torch.no_grad()
    def push(self, targets_BD: Tensor, rows_B: Tensor) -> None:
        """Take the batch in, the oldest out. Called once a step, after its loss."""
        if not self.capacity:
            return
        targets_BD, rows_B = unit(targets_BD[-self.capacity :]), rows_B[-self.capacity :]
        places_B = torch.arange(self.pushed, self.pushed + len(rows_B), device=rows_B.device) % self.capacity
        self.targets_GD[places_B] = targets_BD
        self.rows_G[places_B] = rows_B
        self.pushed += len(rows_B)

    def get_extra_state(self) -> dict[str, int]:
        """What `state_dict` keeps besides the buffers."""
        return {"pushed": self.pushed}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """The inverse of `get_extra_state`."""
        self.pushed = state["pushed"]


class WholeBank(nn.Module):
    """The targets of every training row and view, each once. Rebuilt from the cache, so not saved.

    rows_N: ascending image rows; targets_NVD: their targets, float32. fresh: the batch's own targets stand in for the
    bank's copies of them (they differ by rounding when a teacher computes them live).
    """

    def __init__(self, rows_N: Tensor, targets_NVD: Tensor, *, fresh: bool = False) -> None:
        super().__init__()
        self.fresh = fresh
        self.num_views = targets_NVD.shape[1]
        self.targets_GD: Tensor
        self.rows_N: Tensor
        self.rows_G: Tensor
        self.register_buffer("rows_N", rows_N, persistent=False)
        self.register_buffer("rows_G", rows_N.repeat_interleave(self.num_views), persistent=False)
        self.register_buffer("targets_GD", unit(targets_NVD).flatten(0, 1), persistent=False)

    def candidates(self, targets_BD: Tensor, rows_B: Tensor, views_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(candidates_ND, candidate_rows_N, labels_B): all rows; a label is the place of the sample's row and view."""
        labels_B = torch.searchsorted(self.rows_N, rows_B) * self.num_views + views_B
        candidates_ND = self.targets_GD.index_copy(0, labels_B, unit(targets_BD)) if self.fresh else self.targets_GD
        return candidates_ND, self.rows_G, labels_B

    def push(self, targets_BD: Tensor, rows_B: Tensor) -> None:
        """Nothing to do: every row is here already."""
