"""Target-CMLI: each word of a caption regresses the teacher's patch that is most like it.

B batch (of this rank), N patches, L text tokens, D width, E width of the space that words are matched in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from emkum.stage2_train.objectives.gather import gathered, gathered_constants
from emkum.stage2_train.objectives.itc import unit
from emkum.stage2_train.objectives.kept import mean_kept


@dataclass(frozen=True)
class TargetCmli:
    """A loss with its image and its text half. empty_share: of words, those that regress nothing; empty_penalty: what
    keeps it from all of them, before its weight. Both 0 without an empty target. All scalars.
    """

    loss: Tensor
    image_loss: Tensor
    text_loss: Tensor
    empty_share: Tensor
    empty_penalty: Tensor


def empty_target(width: int) -> nn.Parameter:
    """An empty target to begin with: a random direction, further from most words than the best of many patches."""
    return nn.Parameter(unit(torch.randn(width)))


def target_cmli(
    images_BND: Tensor,
    texts_BLD: Tensor,
    words_BL: Tensor,
    targets_BND: Tensor,
    *,
    projection_ED: Tensor | None = None,
    empty_D: Tensor | None = None,
    empty_weight: float = 1.0,
    temperature: float = 0.1,
) -> TargetCmli:
    """1/2 mean_n (I_n - t_n)^2 + 1/2 mean_l (T_l - t_k(l))^2 over channels, k(l) = argmax_n cos(g T_l, g t_n).

    images_BND: the student's patches; targets_BND: the teacher's, constant; neither with CLS. words_BL: bool, of
    `words.words_only`. A caption's words are averaged, then captions; one without words is left out.
    projection_ED: g, a constant matrix, such as the first rows of the targets' PCA; None: the raw space. Words are
    matched without gradient and regressed in the raw space: a g that learns from this loss goes to 0.

    empty_D: u, a learned candidate beside the patches, for words that show nothing. A word more like u than like any
    patch adds 0. As an argmax has no gradient, u learns as if that were a matter of degree, q_l = sigmoid((cos(g T_l,
    g u) - max_n cos(g T_l, g t_n)) / temperature): from (1 - q_l) (T_l - t_k(l))^2, and from the penalty
    empty_weight * -ln p, p = mean of 1 - q_l over the words of all ranks. Both together draw u to a word whose error
    is large, the fewer words are left the less. Words get no gradient through q.
    Source: THESIS.md section 2, `target-cmli`; -ln p is the thesis's, its p a count without gradient; q is emkum's.
    """
    assert images_BND.shape == targets_BND.shape, (images_BND.shape, targets_BND.shape)  # no broadcasting
    exact = texts_BLD if texts_BLD.dtype == torch.float64 else texts_BLD.float()
    exact = exact.masked_fill(~words_BL[..., None], 0)  # padding may hold NaN
    targets_BND = targets_BND.detach().to(exact.dtype)
    image_loss = (images_BND.to(exact.dtype) - targets_BND).square().mean()
    best_BL, cosines_BL = match(exact, targets_BND, projection_ED)
    matched_BLD = targets_BND.gather(1, best_BL[..., None].expand(-1, -1, targets_BND.shape[2]))
    errors_BL = (exact - matched_BLD).square().mean(dim=2)
    share = penalty = errors_BL.new_zeros(())
    if empty_D is not None:
        emptiness_BL = _cosines_to(empty_D, exact.detach(), projection_ED) - cosines_BL
        empty_BL = emptiness_BL.detach() > 0
        soft_BL = torch.sigmoid(emptiness_BL / temperature)
        # The value of the first factor is 0 or 1, its gradient that of 1 - soft (straight-through).
        errors_BL = ((~empty_BL).to(exact.dtype) + soft_BL.detach() - soft_BL) * errors_BL
        share = mean_kept(empty_BL.to(exact.dtype).flatten(), words_BL.flatten())
        penalty = _left_penalty(emptiness_BL / temperature, words_BL)
    caption_errors_B = errors_BL.masked_fill(~words_BL, 0).sum(dim=1) / words_BL.sum(dim=1).clamp(min=1)
    text_loss = mean_kept(caption_errors_B, words_BL.any(dim=1))
    loss = 0.5 * (image_loss + text_loss) + empty_weight * penalty
    return TargetCmli(loss, image_loss, text_loss, share, penalty)


@torch.no_grad()
def match(texts_BLD: Tensor, targets_BND: Tensor, projection_ED: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of each token the patch of its own picture with the largest cosine, int64 [B, L], and that cosine [B, L]."""
    with torch.autocast(texts_BLD.device.type, enabled=False):
        texts_BLE = unit(_projected(texts_BLD, projection_ED))
        targets_BNE = unit(_projected(targets_BND, projection_ED))
        cosines_BL, best_BL = (texts_BLE @ targets_BNE.transpose(1, 2)).max(dim=2)
    return best_BL, cosines_BL


def _cosines_to(empty_D: Tensor, texts_BLD: Tensor, projection_ED: Tensor | None) -> Tensor:
    with torch.autocast(texts_BLD.device.type, enabled=False):
        texts_BLE = unit(_projected(texts_BLD, projection_ED))
        return texts_BLE @ unit(_projected(empty_D.to(texts_BLD.dtype), projection_ED))


def _projected(vectors: Tensor, projection_ED: Tensor | None) -> Tensor:
    return vectors if projection_ED is None else vectors @ projection_ED.detach().to(vectors.dtype).T


def _left_penalty(logits_BL: Tensor, words_BL: Tensor) -> Tensor:
    """-ln of the mean of 1 - sigmoid(logits) over the words of all ranks, with gradient; 0 where there is no word.

    In logarithms, as 1 - q rounds to 0 long before the gradient, which brings u back from having every word, does.
    """
    left_BL = functional.logsigmoid(-logits_BL).masked_fill(~words_BL, -1e9)  # finite: no gradient of -inf less -inf
    left = gathered(left_BL.flatten().logsumexp(dim=0)[None]).logsumexp(dim=0)
    count = gathered_constants(words_BL.sum()[None]).sum()
    return (count.clamp(min=1).to(left.dtype).log() - left).masked_fill(count == 0, 0.0)
