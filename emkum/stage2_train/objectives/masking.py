"""Which words and which patches are hidden from a student that is to name them.

B batch, L text tokens, K places a text has at most, V vocabulary, W words of it, N patches, M masked patches.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from emkum.stage2_train.objectives.draws import uniform

IGNORED = -100  # the label of a place that is not in the loss
MASKED, REPLACED = 0.8, 0.1  # of the chosen words become the mask token, another word; the rest stays (BERT)
BLOCK_PATCHES, BLOCK_ASPECT = 16, 0.3  # BEiT: the smallest block, and the least of height/width (1/0.3 the most)
BLOCKS_TRIED = 24  # for each picture


@dataclass(frozen=True)
class Vocabulary:
    """What masking must know of a tokenizer, on the device of the ids: see `vocabulary`."""

    special_V: Tensor
    words_W: Tensor
    mask_id: int


def vocabulary(size: int, special_ids: Collection[int], mask_id: int, device: torch.device | str) -> Vocabulary:
    """Of a tokenizer with so many ids, of which `special_ids` and the mask token are no words. Made once."""
    special_V = torch.zeros(size, dtype=torch.bool)
    special_V[sorted({*special_ids, mask_id})] = True
    return Vocabulary(special_V.to(device), (~special_V).nonzero()[:, 0].to(device), mask_id)


@dataclass(frozen=True)
class MaskedWords:
    """ids_BL: the texts as the student reads them. places_BK: where words were chosen; labels_BK: what stood there.

    Shorter texts have fewer words chosen than there are places: the label of the rest is IGNORED.
    """

    ids_BL: Tensor
    places_BK: Tensor
    labels_BK: Tensor


@torch.no_grad()
def mask_words(
    ids_BL: Tensor, mask_BL: Tensor, words: Vocabulary, share: float, generator: torch.Generator, length: int = 0
) -> MaskedWords:
    """Choose round(share n) of the n real words of each text, at least one: 80 % masked, 10 % another word, 10 % kept.

    mask_BL: bool, True = real token. Special tokens are neither chosen nor put in a word's place. share: in (0, 1];
    0.15 for BERT, to 0.5 for texts with their picture (BEiT-3). A text without words has none chosen. The number of
    places is fixed by L and share, so nothing waits for the device. length: positions drawn for, where L may differ
    between ranks that pad to their own longest text; at least L are.
    Source: Devlin et al. 2019 (arXiv:1810.04805), section 3.1.
    """
    batch, longest = ids_BL.shape
    drawn_BC = uniform(batch, 3 * max(length, longest), generator, ids_BL.device)
    drawn_BL, fate_BL, other_BL = (part[:, :longest] for part in drawn_BC.chunk(3, dim=1))
    word_BL = mask_BL & ~words.special_V[ids_BL]
    num_words_B = word_BL.sum(dim=1)
    num_chosen_B = torch.minimum(_rounded(num_words_B.double() * share).clamp(min=1), num_words_B)
    places = max(1, math.floor(longest * share + 0.5))
    places_BK = drawn_BL.masked_fill(~word_BL, 2.0).argsort(dim=1, stable=True)[:, :places]
    chosen_BK = torch.arange(places_BK.shape[1], device=ids_BL.device) < num_chosen_B[:, None]
    stood_BK, fate_BK = ids_BL.gather(1, places_BK), fate_BL[:, : places_BK.shape[1]]
    other_BK = words.words_W[(other_BL[:, : places_BK.shape[1]] * len(words.words_W)).long()].to(ids_BL.dtype)
    shown_BK = torch.where(fate_BK < MASKED, words.mask_id, stood_BK)
    shown_BK = torch.where((fate_BK >= MASKED) & (fate_BK < MASKED + REPLACED), other_BK, shown_BK)
    shown_BL = ids_BL.scatter(1, places_BK, torch.where(chosen_BK, shown_BK, stood_BK))
    return MaskedWords(shown_BL, places_BK, torch.where(chosen_BK, stood_BK, IGNORED).long())


def _rounded(numbers: Tensor) -> Tensor:
    """To the nearest integer, half up, as `places` is counted."""
    return (numbers + 0.5).floor().long()


@dataclass(frozen=True)
class MaskedPatches:
    """mask_BN: bool, True = hidden. places_BM: the hidden patches of each picture, ascending; as many in every one."""

    mask_BN: Tensor
    places_BM: Tensor


@torch.no_grad()
def mask_patches(
    batch: int, grid: tuple[int, int], share: float, generator: torch.Generator, device: torch.device | str
) -> MaskedPatches:
    """Hide round(share N) patches of each picture of a grid (rows, columns), at least one, in rectangular blocks.

    A block has between 16 patches and what is still to hide, drawn evenly, and an aspect between 0.3 and 1/0.3, drawn
    evenly in its logarithm; one that would hide too much is not taken. What the blocks leave open is filled with single
    patches, drawn evenly (0.3 % of the hidden ones on 14 x 14 at a share of 0.4), so that every picture hides as many.
    The middle is hidden more often than a corner (0.7 and 0.05 there), as few blocks reach the corners.
    Source: BEiT (arXiv:2106.08254), algorithm 1; the exact number as in BEiT-2.
    """
    rows, columns = grid
    target = max(1, math.floor(share * rows * columns + 0.5))
    drawn_BC = uniform(batch, 4 * BLOCKS_TRIED + rows * columns, generator, device)
    tries, fill_BN = drawn_BC[:, : 4 * BLOCKS_TRIED], drawn_BC[:, 4 * BLOCKS_TRIED :]
    row_R1, column_C = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)
    mask_BRC = torch.zeros(batch, rows, columns, dtype=torch.bool, device=device)
    for area_B, aspect_B, top_B, left_B in tries.reshape(batch, BLOCKS_TRIED, 4).permute(1, 2, 0):
        left_to_hide_B = target - mask_BRC.sum(dim=(1, 2))
        patches_B = BLOCK_PATCHES + area_B * (left_to_hide_B - BLOCK_PATCHES)
        ratio_B = torch.exp((2 * aspect_B - 1) * math.log(1 / BLOCK_ASPECT))
        height_B = _rounded(torch.sqrt(patches_B * ratio_B)).clamp(1, rows)[:, None, None]
        width_B = _rounded(torch.sqrt(patches_B / ratio_B)).clamp(1, columns)[:, None, None]
        top_B = (top_B[:, None, None] * (rows - height_B + 1)).long()
        left_B = (left_B[:, None, None] * (columns - width_B + 1)).long()
        block_BRC = (row_R1 >= top_B) & (row_R1 < top_B + height_B)
        block_BRC = block_BRC & (column_C >= left_B) & (column_C < left_B + width_B)
        fits_B = (block_BRC & ~mask_BRC).sum(dim=(1, 2)) <= left_to_hide_B
        mask_BRC = mask_BRC | (block_BRC & fits_B[:, None, None])
    places_BM = (fill_BN + mask_BRC.flatten(1)).topk(target, dim=1).indices.sort(dim=1).values
    mask_BN = torch.zeros(batch, rows * columns, dtype=torch.bool, device=device)
    return MaskedPatches(mask_BN.scatter(1, places_BM, True), places_BM)
