"""Regression in fewer dimensions: pictures and captions meet the teacher's CLS behind a learned linear projection.

    loss = 1/2 (|u(z_v) - u(z_t)|^2 + |u(z_w) - u(z_t)|^2) + w/2 (guard(z_v) + guard(z_w))      u(z) = z/|z|
    z_v = W h_v + b,  z_w = W h_w + b        of the student, learned
    z_t = W' t + b'                          of the teacher, W' and b' the moving average of W and b, no gradient
    guard(z) = 1/R sum_j max(0, floor - sqrt(Var_j(sqrt(R) u(z)) + 1e-4))

Without the guard a projection to one point would be a solution. Source: THESIS.md section 2, `reduced`; the distance of
unit vectors is BYOL's (arXiv:2006.07733, equation 2), the hinge VICReg's (arXiv:2105.04906, equation 1). VICReg asks
numbers as they are for a deviation of 1. As the distance sees directions only, that would be met by W growing while
directions still fall together; so here the directions are asked, whose channels have deviation 1 if they are spread
evenly. The two terms pull against each other: a guard near the floor says that its weight w is too small.

B batch (of this rank), G of all ranks, D width, R the fewer.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emkum.stage2_train.objectives.ema import ema_update_
from emkum.stage2_train.objectives.gather import gathered
from emkum.stage2_train.objectives.itc import unit

VARIANCE_EPS = 1e-4  # VICReg's


@dataclass(frozen=True)
class Reduced:
    """The loss; the squared distances and the guards of each half. All scalars."""

    loss: Tensor
    image_loss: Tensor
    text_loss: Tensor
    image_guard: Tensor
    text_guard: Tensor


def reduced(
    images_BR: Tensor, texts_BR: Tensor, targets_BR: Tensor, *, floor: float = 1.0, guard_weight: float = 1.0
) -> Reduced:
    """The loss of projections, as in this file's opening; distances are in [0, 4], the mean over the batch.

    The guard looks at the pictures (captions) of all ranks; of one row there is no deviation, and it is 0.
    """
    with torch.autocast(images_BR.device.type, enabled=False):
        images_BR, texts_BR, targets_BR = unit(images_BR), unit(texts_BR), unit(targets_BR.detach())
    image_loss, text_loss = _distance(images_BR, targets_BR), _distance(texts_BR, targets_BR)
    image_guard, text_guard = variance_guard(gathered(images_BR), floor), variance_guard(gathered(texts_BR), floor)
    loss = 0.5 * (image_loss + text_loss) + 0.5 * guard_weight * (image_guard + text_guard)
    return Reduced(loss, image_loss, text_loss, image_guard, text_guard)


def variance_guard(units_GR: Tensor, floor: float) -> Tensor:
    """1/R sum_j max(0, floor - sqrt(Var_j + 1e-4)) of unit vectors times sqrt(R), Var over rows with G - 1 below."""
    if len(units_GR) < 2:
        return units_GR.new_zeros(())
    variance_R = units_GR.shape[1] * units_GR.var(dim=0)
    return (floor - (variance_R + VARIANCE_EPS).sqrt()).clamp(min=0).mean()


def _distance(student_BR: Tensor, targets_BR: Tensor) -> Tensor:
    assert student_BR.shape == targets_BR.shape, (student_BR.shape, targets_BR.shape)  # no broadcasting
    return (student_BR - targets_BR).square().sum(dim=1).mean()


class ReducedHeads(nn.Module):
    """The student's projection and the teacher's, which follows it. Both start as the same orthogonal rows."""

    def __init__(self, width: int, reduced_width: int) -> None:
        super().__init__()
        self.student = nn.Linear(width, reduced_width)
        nn.init.orthogonal_(self.student.weight)
        nn.init.zeros_(self.student.bias)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    @torch.no_grad()
    def start(self, components_CD: Tensor, mean_D: Tensor) -> None:
        """Begin as z = P (x - mean), P the first R of the given principal components, the largest first."""
        width = len(self.student.weight)
        assert len(components_CD) >= width, f"{len(components_CD)} components for {width} dimensions"
        for projection in (self.student, self.teacher):
            projection.weight.copy_(components_CD[:width])
            projection.bias.copy_(-components_CD[:width] @ mean_D)

    def forward(self, images_BD: Tensor, texts_BD: Tensor, targets_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z_v, z_w and z_t, each [B, R]: what `reduced` compares."""
        with torch.autocast(images_BD.device.type, enabled=False):
            images_BR, texts_BR = (self.student(side.to(self.student.weight.dtype)) for side in (images_BD, texts_BD))
            with torch.no_grad():
                targets_BR = self.teacher(targets_BD.to(self.teacher.weight.dtype))
        return images_BR, texts_BR, targets_BR

    def update_(self, momentum: float = 0.999) -> None:
        """The teacher's projection follows the student's. Called once a step, after the optimiser's."""
        ema_update_(self.teacher, self.student, momentum)
