"""Objects: a phrase of a caption meets what the teacher sees in the phrase's box.

B batch (of this rank), K phrases a caption, P phrases, M phrases of all ranks, T tokens, N patches, L text tokens,
D width, 4 = left, top, right, bottom.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from emkum.stage2_train.objectives.gather import gathered, gathered_constants, own_part
from emkum.stage2_train.objectives.itc import MAX_LOG_SCALE, Contrast, same_picture, unit
from emkum.stage2_train.objectives.kept import choose_kept, mean_kept


@dataclass(frozen=True)
class Objects:
    """Phrases and their regions. kept_BK: bool, False where there is no phrase, or nothing of its box in the crop."""

    phrases_BKD: Tensor
    regions_BKD: Tensor
    kept_BK: Tensor


@dataclass(frozen=True)
class ObjectRegression:
    """The loss, and how many of the K places of a caption hold a phrase that is regressed. Scalars."""

    loss: Tensor
    kept_share: Tensor


def objects(
    texts_BLD: Tensor,
    mask_BL: Tensor,
    spans_BK2: Tensor,
    patches_BND: Tensor,
    boxes_BK4: Tensor,
    crops_BX: Tensor,
    grid: tuple[int, int],
) -> Objects:
    """Phrase feature: the mean of its tokens. Region feature: the mean of the teacher's patches in its box, constant.

    texts_BLD: the student's; mask_BL: bool, True = a real token. spans_BK2: int64, first token of a phrase and the one
    after its last, CLS counted; what the text was trimmed of does not count; an empty span is no phrase.
    patches_BND: the teacher's without CLS, row by row, of `grid` (rows, columns). Boxes and crops as in `in_boxes`.
    """
    places_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    in_span_BKL = (places_L >= spans_BK2[..., :1]) & (places_L < spans_BK2[..., 1:]) & mask_BL[:, None]
    in_box_BKN = in_boxes(boxes_BK4, crops_BX, grid)
    assert in_box_BKN.shape[2] == patches_BND.shape[1], f"{patches_BND.shape[1]} patches, a grid of {grid}"
    phrases_BKD = _mean_of(in_span_BKL, texts_BLD.masked_fill(~mask_BL[..., None], 0))  # padding may hold NaN
    regions_BKD = _mean_of(in_box_BKN, patches_BND.detach())
    return Objects(phrases_BKD, regions_BKD, in_span_BKL.any(dim=2) & in_box_BKN.any(dim=2))


@torch.no_grad()
def in_boxes(boxes_BK4: Tensor, crops_BX: Tensor, grid: tuple[int, int]) -> Tensor:
    """bool [B, K, N]: the patches whose centres lie in a box; none where the crop shows nothing of the box.

    boxes_BK4: left, top, right, bottom in pixels of the upright picture, right and bottom excluded; a box without area
    (padding) has none. crops_BX: rows of the `boxes` field, `emkum.shards.views.Box.as_row`, of which left, top, width,
    height and flip count. What is left of a box may be narrower or lower than a patch, and hold no centre: then it has
    the column, or the row, that the middle of its visible part lies in.
    """
    left_B, top_B, width_B, height_B, flip_B = crops_BX.double()[:, :5].unbind(1)
    left_BK, top_BK, right_BK, bottom_BK = boxes_BK4.double().unbind(2)
    across_BKC = _in_spans(left_BK, right_BK, left_B, width_B, flip_B.bool(), grid[1])
    down_BKR = _in_spans(top_BK, bottom_BK, top_B, height_B, torch.zeros_like(flip_B, dtype=torch.bool), grid[0])
    return (down_BKR[..., :, None] & across_BKC[..., None, :]).flatten(2)


def _in_spans(low_BK: Tensor, high_BK: Tensor, start_B: Tensor, size_B: Tensor, flip_B: Tensor, cells: int) -> Tensor:
    """bool [B, K, cells]: of the equal cells along one axis of a crop, those of which low <= centre < high."""
    low_BK = torch.maximum(low_BK, start_B[:, None])
    high_BK = torch.minimum(high_BK, (start_B + size_B)[:, None])
    cell_C = torch.arange(cells, device=low_BK.device)
    shown_BC = torch.where(flip_B[:, None], cells - 1 - cell_C, cell_C)  # as counted in the unflipped crop
    centres_B1C = (start_B[:, None] + size_B[:, None] * (shown_BC + 0.5) / cells)[:, None]
    inside_BKC = (centres_B1C >= low_BK[..., None]) & (centres_B1C < high_BK[..., None])
    middle_BK = ((low_BK + high_BK) / 2 - start_B[:, None]) / size_B[:, None]
    nearest_BKC = shown_BC[:, None] == (middle_BK * cells).floor().clamp(0, cells - 1)[..., None]
    inside_BKC = torch.where(inside_BKC.any(dim=2, keepdim=True), inside_BKC, nearest_BKC)
    return inside_BKC & (low_BK < high_BK)[..., None]


def _mean_of(chosen_BKT: Tensor, tokens_BTD: Tensor) -> Tensor:
    """[B, K, D]: the mean of the chosen tokens; 0 where none is."""
    with torch.autocast(tokens_BTD.device.type, enabled=False):
        exact = tokens_BTD if tokens_BTD.dtype == torch.float64 else tokens_BTD.float()
        weights_BKT = chosen_BKT.to(exact.dtype)
        return (weights_BKT / weights_BKT.sum(dim=2, keepdim=True).clamp(min=1)) @ exact


def object_mse(phrases_BKD: Tensor, regions_BKD: Tensor, kept_BK: Tensor) -> ObjectRegression:
    """Mean over kept phrases and channels of (h_o - t_o)^2; 0 where none is kept.

    phrases_BKD: of `objects`, as they are or through a head. Several ranks count the phrases of all of them. The thesis
    names the objective (THESIS.md section 2, `object`) and gives no equation: this one is emkum's.
    """
    assert phrases_BKD.shape == regions_BKD.shape, (phrases_BKD.shape, regions_BKD.shape)  # no broadcasting
    exact = phrases_BKD if phrases_BKD.dtype == torch.float64 else phrases_BKD.float()
    errors_BK = (exact - regions_BKD.to(exact.dtype)).square().mean(dim=2)
    return ObjectRegression(mean_kept(errors_BK.flatten(), kept_BK.flatten()), kept_BK.to(exact.dtype).mean())


def object_contrast(
    phrases_BKD: Tensor, regions_BKD: Tensor, kept_BK: Tensor, object_ids_BK: Tensor, log_scale: Tensor
) -> Contrast:
    """1/2 CE(s d(O) d(R)^T, diagonal) + 1/2 CE of the transpose over the kept phrases O and regions R of the batch.

    s = exp(min(log_scale, ln 100)). The text loss is that of phrases that choose a region, the image loss that of
    regions that choose a phrase. Regions of one picture are negatives of each other; phrases with equal object_ids_BK
    (int64: another mention of the same object) are not. Several ranks choose among the phrases of all of them
    (gather.py), each with the same K. The equation is emkum's, as `itc`'s is; see `object_mse`.
    """
    phrases_PD, regions_PD = phrases_BKD.flatten(0, 1), regions_BKD.flatten(0, 1)
    kept_P, ids_P = kept_BK.flatten(), object_ids_BK.flatten()
    kept_M, ids_M = gathered_constants(kept_P), gathered_constants(ids_P)
    labels_P = own_part(torch.arange(len(ids_M), device=ids_M.device))
    with torch.autocast(phrases_PD.device.type, enabled=False):
        scale, phrases_PD, regions_PD = log_scale.clamp(max=MAX_LOG_SCALE).exp(), unit(phrases_PD), unit(regions_PD)
        text_logits_PM = scale * phrases_PD @ gathered_constants(regions_PD).T
        image_logits_PM = scale * regions_PD @ gathered(phrases_PD).T
    absent_PM = (~kept_M).expand_as(text_logits_PM).scatter(1, labels_P[:, None], False)
    out_PM = same_picture(ids_P, ids_M, labels_P) | absent_PM
    image_loss, image_accuracy = choose_kept(image_logits_PM.masked_fill(out_PM, -math.inf), labels_P, kept_P)
    text_loss, text_accuracy = choose_kept(text_logits_PM.masked_fill(out_PM, -math.inf), labels_P, kept_P)
    return Contrast(0.5 * (image_loss + text_loss), image_loss, text_loss, image_accuracy, text_accuracy)
