"""Image-text matching: does a caption belong to a picture, yes or no.

B batch (of this rank), N pairs (of all ranks), P pairs that are judged, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from emkum.stage2_train.objectives.gather import gathered, gathered_constants
from emkum.stage2_train.objectives.itc import MAX_LOG_SCALE, unit
from emkum.stage2_train.objectives.kept import mean_kept

Fusion = Literal["sum", "product"]


@dataclass(frozen=True)
class Matching:
    """The loss over all judged pairs, and over each kind of them: true ones, pictures with a wrong caption, captions
    with a wrong picture. accuracy: how often the answer is right; always_no: how often "no match" is. All scalars.
    """

    loss: Tensor
    pair_loss: Tensor
    image_loss: Tensor
    text_loss: Tensor
    accuracy: Tensor
    always_no: Tensor


class MatchHead(nn.Module):
    """From the features of a picture and of a caption to two logits: no match, match.

    "sum": W (W_v h_v + W_w h_w) + b, the thesis's feature fusion. It is f(picture) + g(caption), so it cannot tell
    pairs apart: swap the captions of two pairs and the sum of both answers is the same. Where each picture and each
    caption is drawn once as the wrong one, no weights have a smaller loss (Jensen) than the constant of always "no
    match", right 2/3 of the time: ln 3 - 2/3 ln 2 = 0.637. The thesis's training stayed at 66.7 %.
    "product": W (W_v h_v * W_w h_w) + b, channel by channel, which can: low-rank bilinear pooling (Kim et al. 2016,
    arXiv:1610.04325).
    """

    def __init__(self, width: int, fusion: Fusion = "sum") -> None:
        super().__init__()
        self.fusion = fusion
        self.image = nn.Linear(width, width)
        self.text = nn.Linear(width, width)
        self.answer = nn.Linear(width, 2)

    def forward(self, images_PD: Tensor, texts_PD: Tensor) -> Tensor:
        """Logits [P, 2]."""
        images_PD, texts_PD = self.image(images_PD), self.text(texts_PD)
        fused_PD = images_PD + texts_PD if self.fusion == "sum" else images_PD * texts_PD
        logits_P2: Tensor = self.answer(fused_PD)
        return logits_P2


def itm(
    head: Callable[[Tensor, Tensor], Tensor],
    images_BD: Tensor,
    texts_BD: Tensor,
    image_rows_B: Tensor,
    uniform_BC: Tensor,
    hard: tuple[Tensor, Tensor] | None = None,
) -> Matching:
    """Cross-entropy of match or no match over B true pairs, B pictures with a wrong caption, B captions with a wrong
    picture, 1 positive to 2 negatives, the mean over all of them.

    head: a MatchHead, or what else gives two logits a pair.
    image_rows_B: int64, the picture of each pair. A wrong caption is one of another picture, and a wrong picture
    another one, among the pairs of all ranks (gather.py); a sample that has none adds its true pair alone.
    uniform_BC: float32 in [0, 1), C = 2 N, what negatives are drawn with: `draws.uniform(B, 2 * N, ...)`.
    hard: what `similarities` gives, by which hard negatives are drawn; None: any wrong one is as likely.
    Sources: THESIS.md section 2, `itm`; Li et al. 2021 (ALBEF, arXiv:2107.07651), section 3.2, which draws within a
    rank; among all ranks as Bao et al. 2022 (VLMo, arXiv:2111.02358).
    """
    allowed_BN = image_rows_B[:, None] != gathered_constants(image_rows_B)[None, :]
    uniform_2BN = uniform_BC.view(len(images_BD), 2, -1).transpose(0, 1)
    to_texts_BN, to_images_BN = hard or (None, None)
    wrong_texts_B = draw(allowed_BN, uniform_2BN[0], to_texts_BN)
    wrong_images_B = draw(allowed_BN, uniform_2BN[1], to_images_BN)
    judged_images_PD = torch.cat([images_BD, images_BD, gathered(images_BD)[wrong_images_B]])
    judged_texts_PD = torch.cat([texts_BD, gathered(texts_BD)[wrong_texts_B], texts_BD])
    logits_P2 = head(judged_images_PD, judged_texts_PD)

    exact_P2 = logits_P2 if logits_P2.dtype == torch.float64 else logits_P2.float()
    has_wrong_B = allowed_BN.any(dim=1)
    kept_P = torch.cat([torch.ones_like(has_wrong_B), has_wrong_B, has_wrong_B])
    matches_P = torch.arange(len(kept_P), device=kept_P.device) < len(images_BD)
    losses_P = functional.cross_entropy(exact_P2, matches_P.long(), reduction="none")
    says_match_P = exact_P2.detach().argmax(dim=1) == 1  # equal logits: no match
    rates_2P = torch.stack([says_match_P == matches_P, ~matches_P]).to(losses_P.dtype)
    pair_losses_B, image_losses_B, text_losses_B = losses_P.chunk(3)
    loss, accuracy, always_no = mean_kept(torch.cat([losses_P[None], rates_2P]), kept_P).unbind()
    image_loss, text_loss = mean_kept(torch.stack([image_losses_B, text_losses_B]), has_wrong_B).unbind()
    return Matching(loss, pair_losses_B.mean(), image_loss, text_loss, accuracy.detach(), always_no.detach())


@torch.no_grad()
def similarities(images_BD: Tensor, texts_BD: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """What `itc` sees, constant: s d(I) d(T)^T of every picture with the captions of all ranks, and of every caption
    with their pictures, s = exp(min(log_scale, ln 100)). Both [B, N].
    """
    with torch.autocast(images_BD.device.type, enabled=False):
        scale, images_BD, texts_BD = log_scale.clamp(max=MAX_LOG_SCALE).exp(), unit(images_BD), unit(texts_BD)
        to_texts_BN = scale * images_BD @ gathered_constants(texts_BD).T
        return to_texts_BN, scale * texts_BD @ gathered_constants(images_BD).T


@torch.no_grad()
def draw(allowed_BN: Tensor, uniform_BN: Tensor, logits_BN: Tensor | None = None) -> Tensor:
    """One allowed candidate a row, with probability softmax(logits) over those allowed; None: each as likely.

    int64 [B]; 0 where none is allowed. By the Gumbel-max trick: argmax of logits - ln(-ln u) falls on a candidate that
    is not allowed never, not even by rounding, as a search in cumulative sums may.
    """
    noise_BN = -torch.log(-torch.log(uniform_BN.clamp(min=torch.finfo(uniform_BN.dtype).tiny)))
    scores_BN = noise_BN if logits_BN is None else noise_BN + logits_BN
    return scores_BN.masked_fill(~allowed_BN, -math.inf).argmax(dim=1)
