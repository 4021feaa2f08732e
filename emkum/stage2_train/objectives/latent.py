"""Augmentations of what is cached: tokens left out, and samples mixed, with their targets.

Pixels are gone, so crops and flips are recorded views; a flip of features is no flip of the picture. What is left are
operations that hold for tokens as they are. B batch, T tokens, K tokens kept, N patches, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from emkum.stage2_train.objectives.draws import uniform


@dataclass(frozen=True)
class Kept:
    """tokens_BKD: what is left of the tokens; kept_BK: int64, where they stood, ascending, CLS and registers first."""

    tokens_BKD: Tensor
    kept_BK: Tensor


def drop_tokens(tokens_BTD: Tensor, keep: float, num_prefix: int, generator: torch.Generator) -> Kept:
    """Keep the first `num_prefix` tokens and round(keep N) of the N patches of each picture, at least one.

    keep: in (0, 1]; 1 leaves all. Every picture loses other patches, and every picture as many. What is compared with
    these tokens is taken at the same places by `take_tokens`. Source: PatchDropout (arXiv:2208.07220), FLIP
    (arXiv:2212.00794). A position bias in the attention of a student (BEiT) is a table over all T places: it must be
    taken at kept_BK too.
    """
    batch, num_tokens = tokens_BTD.shape[:2]
    num_patches = num_tokens - num_prefix
    num_kept = min(max(1, math.floor(keep * num_patches + 0.5)), num_patches)
    drawn_BN = uniform(batch, num_patches, generator, tokens_BTD.device)
    patches_BK = drawn_BN.argsort(dim=1, stable=True)[:, :num_kept].sort(dim=1).values + num_prefix
    prefix_P = torch.arange(num_prefix, device=tokens_BTD.device)
    kept_BK = torch.cat([prefix_P.expand(batch, -1), patches_BK], dim=1)
    return Kept(take_tokens(tokens_BTD, kept_BK), kept_BK)


def take_tokens(values_BTD: Tensor, kept_BK: Tensor) -> Tensor:
    """[B, K, D] of a field with the same tokens. Of `patches`, without CLS: at kept_BK[:, P:] - P, P the prefix."""
    return values_BTD.gather(1, kept_BK[..., None].expand(-1, -1, values_BTD.shape[2]))


@torch.no_grad()
def draw_mix(alpha: float, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """lambda ~ Beta(alpha, alpha), a float32 scalar for the whole batch, the same on ranks with equal generators.

    As X / (X + Y), X and Y from Gamma(alpha, 1): torch's Beta takes no generator. alpha at least 0.01: far below, both
    round to 0.
    """
    assert alpha >= 0.01, alpha
    shapes = torch.full((2,), alpha, dtype=torch.float64, device=generator.device)
    first, second = torch._standard_gamma(shapes, generator=generator)
    weight: Tensor = first / (first + second)
    return weight.float().to(device, non_blocking=True)


def mix_up(values: Tensor, weight: Tensor) -> Tensor:
    """x_i <- lambda x_i + (1 - lambda) x_j, of tokens, of targets, of anything [B, ...] that is a float.

    weight: lambda from `draw_mix`, one for tokens and targets of a batch. j is i's neighbour: samples 0 and 1 mix with
    each other, 2 and 3, and so on; the last of an odd batch stays. Batches are shuffled, so a neighbour is as random as
    a permutation would give, and it lies on the same rank whatever their number. A picture and a caption of one pair
    have the same neighbour. Source: Zhang et al. 2018 (arXiv:1710.09412); of latents, FuseMix (arXiv:2312.10144).
    """
    assert values.is_floating_point(), values.dtype
    neighbour_B = (torch.arange(len(values), device=values.device) ^ 1).clamp(max=len(values) - 1)
    return torch.lerp(values[neighbour_B], values, weight.to(values.dtype))
