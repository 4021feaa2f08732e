"""Classification of quantised targets: picture and caption name the S codes of the teacher's CLS, one for each part.

    t = [t_1 .. t_S], parts of C = D/S channels      c_s = argmax_j cos(t_s, e_sj)
    loss = 1/2 mean_s CE(z_v,s, c_s) + 1/2 mean_s CE(z_w,s, c_s)

A product quantiser (Jegou et al. 2011, "Product quantization for nearest neighbor search") whose codebooks are learned
while the student is: e_sj = m_sj / |m_sj|, with moving averages of what falls to each code,

    n_sj <- g n_sj + (1 - g) #{rows of code j}      m_sj <- g m_sj + (1 - g) sum of u(t_s) over them      g = 0.99

(van den Oord et al. 2017, arXiv:1711.00937, appendix A.1, on the unit sphere as VQ-KD of BEiT-2, arXiv:2208.06366).
The thesis's own quantiser (`codes-vq`, THESIS.md section 2) projects t by a learned matrix and trains it with a decoder
beforehand; this one splits the channels, and needs neither. B batch (of this rank), G of all ranks, D width, S parts,
C channels of a part, J codes of a part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emkum.errors import UsageError
from emkum.stage2_train.objectives.codes import Classification, codes_ce
from emkum.stage2_train.objectives.gather import gathered_constants
from emkum.stage2_train.objectives.itc import unit

OWN_CODE = 0.9999  # cosine from which a row has a code of its own, and needs no other


@dataclass(frozen=True)
class Usage:
    """How much of the codebooks is in use, means over the S of them. All scalars.

    perplexity: exp of the entropy of the codes' frequencies, in [1, J]. used: share of the codes that are not dead.
    restarted: share of the codes that were dead and begin again at a row of this batch.
    """

    perplexity: Tensor
    used: Tensor
    restarted: Tensor


def codes_vq(image_logits_BSJ: Tensor, text_logits_BSJ: Tensor, codes_BS: Tensor) -> Classification:
    """1/2 CE + 1/2 CE over J codes, in nats, mean over batch and parts; accuracies count parts."""
    return codes_ce(image_logits_BSJ.flatten(0, 1), text_logits_BSJ.flatten(0, 1), codes_BS.flatten())


class SubCodeHead(nn.Linear):
    """A linear layer from the student's feature [B, D] to the logits of every part's codes [B, S, J]."""

    def __init__(self, width: int, groups: int, codes: int) -> None:
        super().__init__(width, groups * codes)
        self.groups = groups

    def forward(self, features_BD: Tensor) -> Tensor:
        logits_B: Tensor = super().forward(features_BD)
        return logits_B.view(*logits_B.shape[:-1], self.groups, -1)


class ProductCodebooks(nn.Module):
    """The S codebooks as moving averages. Saved with a checkpoint; nothing in them is random.

    A code whose average count falls below `dead` of the even share G/J begins again at a row of the batch: dead codes
    take the rows that their codes fit worst, each row once, and none that has a code of its own. So begin all codes.
    Raises UsageError where the target's channels do not divide into so many parts.
    """

    def __init__(self, width: int, groups: int, codes: int, momentum: float = 0.99, dead: float = 0.1) -> None:
        super().__init__()
        if width % groups:
            fitting = max(number for number in range(1, groups) if width % number == 0)
            raise UsageError(
                f"objectives.codes-vq.groups = {groups}: the {width} channels of the target do not divide into "
                f"{groups} equal parts",
                f"use a number that divides them: --set objectives.codes-vq.groups={fitting}",
            )
        self.momentum, self.dead = momentum, dead
        self.sums_SJC: Tensor
        self.counts_SJ: Tensor
        self.register_buffer("sums_SJC", torch.zeros(groups, codes, width // groups))
        self.register_buffer("counts_SJ", torch.zeros(groups, codes))

    @torch.no_grad()
    def codes(self, targets_BD: Tensor) -> Tensor:
        """int64 [B, S], the code of each part. Meaningless before the first `update_`."""
        return self._cosines(self._parts(targets_BD)).argmax(dim=-1)

    @torch.no_grad()
    def update_(self, targets_BD: Tensor) -> Usage:
        """Take the targets of all ranks in. Called once a step, before `codes`, so that the first step has codes.

        The rows are gathered, not the sums: they are fewer numbers than the codebooks, dead codes need them, and every
        rank then computes the same, bit by bit.
        """
        parts_GSC = self._parts(gathered_constants(targets_BD))
        cosines_GSJ = self._cosines(parts_GSC)
        fits_GS, codes_GS = cosines_GSJ.max(dim=-1)
        self._follow(parts_GSC, codes_GS, fits_GS > -math.inf)
        even_share = len(parts_GSC) / self.counts_SJ.shape[1]
        dead_SJ = self.counts_SJ < self.dead * even_share
        restarted_SJ = self._restart(dead_SJ, parts_GSC, fits_GS, even_share)
        shares_SJ = self.counts_SJ / self.counts_SJ.sum(dim=1, keepdim=True).clamp(min=1e-12)
        perplexity = torch.special.entr(shares_SJ).sum(dim=1).exp().mean()
        return Usage(perplexity, 1 - dead_SJ.float().mean(), restarted_SJ.float().mean())

    def _follow(self, parts_GSC: Tensor, codes_GS: Tensor, there_GS: Tensor) -> None:
        """The moving averages. One-hot products, not index_add, whose order of summation a GPU does not fix."""
        chosen_GSJ = codes_GS[..., None] == torch.arange(self.counts_SJ.shape[1], device=codes_GS.device)
        chosen_GSJ = (chosen_GSJ & there_GS[..., None]).to(self.sums_SJC.dtype)
        with torch.autocast(parts_GSC.device.type, enabled=False):
            sums_SJC = torch.einsum("gsj,gsc->sjc", chosen_GSJ, parts_GSC)
        self.counts_SJ.lerp_(chosen_GSJ.sum(dim=0), 1 - self.momentum)
        self.sums_SJC.lerp_(sums_SJC, 1 - self.momentum)

    def _restart(self, dead_SJ: Tensor, parts_GSC: Tensor, fits_GS: Tensor, count: float) -> Tensor:
        """Dead codes, in their order, begin at the rows that fit worst; the codes that did."""
        worst_GS = fits_GS.argsort(dim=0, stable=True)
        row_SJ = (dead_SJ.cumsum(dim=1) - 1).clamp(min=0)  # the dead code's place among the dead
        enough_SJ = row_SJ < len(parts_GSC)
        row_SJ = worst_GS.T.gather(1, row_SJ.clamp(max=len(parts_GSC) - 1))
        restarted_SJ = dead_SJ & enough_SJ & (fits_GS.T.gather(1, row_SJ) < OWN_CODE)
        rows_SJC = parts_GSC.transpose(0, 1).gather(1, row_SJ[..., None].expand_as(self.sums_SJC))
        self.sums_SJC.copy_(torch.where(restarted_SJ[..., None], count * rows_SJC, self.sums_SJC))
        self.counts_SJ.copy_(torch.where(restarted_SJ, count, self.counts_SJ))
        return restarted_SJ

    def _parts(self, targets_BD: Tensor) -> Tensor:
        """Unit vectors [B, S, C], in the codebooks' dtype."""
        return unit(targets_BD.reshape(len(targets_BD), self.sums_SJC.shape[0], -1)).to(self.sums_SJC.dtype)

    def _cosines(self, parts_BSC: Tensor) -> Tensor:
        """[B, S, J]; -inf for codes at which nothing ever was."""
        with torch.autocast(parts_BSC.device.type, enabled=False):
            cosines_BSJ = torch.einsum("bsc,sjc->bsj", parts_BSC, unit(self.sums_SJC))
        return cosines_BSJ.masked_fill(self.counts_SJ == 0, -math.inf)
