"""Self-distillation: picture and caption predict over learned prototypes what the teacher's CLS is taken for.

    loss = -1/2 sum_k p_t,k (log p_v,k + log p_w,k)
    p_v = softmax(z_v / tau_s), p_w likewise      p_t = softmax((z_t - c) / tau_t)
    z = cos(g(x), w_k)                            g three linear layers, w_k K prototypes
    c <- m c + (1 - m) mean(z_t)                  over the rows of all ranks, m = 0.9

z_t comes from the cached CLS by a head that is the moving average of the student's. Centring keeps one prototype from
winning everywhere, sharpening (tau_t < tau_s) keeps all from being equal. Entropies, in nats, show a collapse:
`target_entropy` near ln K is an even answer to everything, `marginal_entropy` near 0 one prototype for everything.
Source: Caron et al. 2021 (arXiv:2104.14294), section 3.1 and algorithm 1. There the teacher is the average of the whole
student and each view predicts the others; here the backbone behind the target is frozen. B batch (of this rank),
D width, K prototypes, E width of the bottleneck.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emkum.stage2_train.objectives.ema import ema_update_
from emkum.stage2_train.objectives.gather import gathered_constants
from emkum.stage2_train.objectives.itc import unit


@dataclass(frozen=True)
class SelfDistillation:
    """The cross-entropy and its halves; CE = KL + target_entropy in each. All scalars, in nats.

    target_entropy: of each target, the mean; marginal_entropy: of the mean target of all ranks.
    """

    loss: Tensor
    image_loss: Tensor
    text_loss: Tensor
    image_kl: Tensor
    text_kl: Tensor
    target_entropy: Tensor
    marginal_entropy: Tensor


def dino(
    image_logits_BK: Tensor,
    text_logits_BK: Tensor,
    teacher_logits_BK: Tensor,
    centre_K: Tensor,
    *,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> SelfDistillation:
    """The loss as in this file's opening, mean over the batch. The teacher's logits and the centre get no gradient."""
    with torch.no_grad():
        taught_BK = ((_exact(teacher_logits_BK) - centre_K) / teacher_temperature).softmax(dim=1)
        target_entropy = torch.special.entr(taught_BK).sum(dim=1).mean()
        marginal_K = gathered_constants(taught_BK.mean(dim=0, keepdim=True)).mean(dim=0)
        marginal_entropy = torch.special.entr(marginal_K).sum()
    image_loss = _cross_entropy(taught_BK, image_logits_BK, student_temperature)
    text_loss = _cross_entropy(taught_BK, text_logits_BK, student_temperature)
    image_kl, text_kl = (found.detach() - target_entropy for found in (image_loss, text_loss))
    loss = 0.5 * (image_loss + text_loss)
    return SelfDistillation(loss, image_loss, text_loss, image_kl, text_kl, target_entropy, marginal_entropy)


def _cross_entropy(taught_BK: Tensor, logits_BK: Tensor, temperature: float) -> Tensor:
    assert taught_BK.shape == logits_BK.shape, (taught_BK.shape, logits_BK.shape)  # no broadcasting
    return -(taught_BK * (_exact(logits_BK) / temperature).log_softmax(dim=1)).sum(dim=1).mean()


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class DinoHead(nn.Module):
    """Linear-GELU-Linear-GELU-Linear to E channels, made a unit vector; then cosines with K prototypes.

    The prototypes are the weight-normed last layer without bias, each of length 1: DINO with `norm_last_layer`.
    """

    def __init__(self, width: int, prototypes: int, hidden: int, bottleneck: int) -> None:
        super().__init__()
        sizes = [width, hidden, hidden, bottleneck]
        linears = [nn.Linear(inner, outer) for inner, outer in itertools.pairwise(sizes)]
        self.mlp = nn.Sequential(linears[0], nn.GELU(), linears[1], nn.GELU(), linears[2])
        self.prototypes_KE = nn.Parameter(torch.empty(prototypes, bottleneck))
        for weight in (*(linear.weight for linear in linears), self.prototypes_KE):
            nn.init.trunc_normal_(weight, std=0.02)
        for linear in linears:
            nn.init.zeros_(linear.bias)

    def forward(self, features_BD: Tensor) -> Tensor:
        """z, [B, K], cosines in float32: at tau_t = 0.04 the rounding of bfloat16 would show."""
        bottleneck_BE = self.mlp(features_BD.to(self.prototypes_KE.dtype))
        with torch.autocast(features_BD.device.type, enabled=False):
            return unit(bottleneck_BE) @ unit(self.prototypes_KE).T


class DinoHeads(nn.Module):
    """The student's head, the teacher's that follows it (equal at the start), and the centre. Saved with a checkpoint.

    width: channels of the student's feature and of the teacher's CLS, which must be the same, as the heads are.
    """

    def __init__(self, width: int, prototypes: int = 4096, hidden: int = 2048, bottleneck: int = 256) -> None:
        super().__init__()
        self.student = DinoHead(width, prototypes, hidden, bottleneck)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.centre_K: Tensor
        self.register_buffer("centre_K", torch.zeros(prototypes))

    def forward(self, images_BD: Tensor, texts_BD: Tensor, targets_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits of pictures, captions and teacher, each [B, K]: what `dino` compares."""
        with torch.no_grad():
            teacher_BK = self.teacher(targets_BD)
        return self.student(images_BD), self.student(texts_BD), teacher_BK

    @torch.no_grad()
    def update_centre_(self, teacher_logits_BK: Tensor, momentum: float = 0.9) -> None:
        """c <- m c + (1 - m) mean(z_t) over the rows of all ranks. Called once a batch, after its loss."""
        mean_K = gathered_constants(teacher_logits_BK.mean(dim=0, keepdim=True)).mean(dim=0)
        self.centre_K.lerp_(mean_K.to(self.centre_K.dtype), 1.0 - momentum)

    def update_teacher_(self, momentum: float = 0.996) -> None:
        """The teacher's head follows the student's. Called once a step, after the optimiser's."""
        ema_update_(self.teacher, self.student, momentum)
