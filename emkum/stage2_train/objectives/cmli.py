"""Cross-modal late interaction: picture and caption are as similar as their best matching patches and words.

B batch (of this rank), G pairs of all ranks, C captions, N patches, L text tokens, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from emkum.stage2_train.objectives.gather import gathered, gathered_constants, num_ranks, own_part
from emkum.stage2_train.objectives.itc import MAX_LOG_SCALE, Contrast, same_picture, unit
from emkum.stage2_train.objectives.kept import choose_kept

BELOW = -2.0  # less than any cosine, and finite: the similarity of a patch to a caption without words


def cmli(
    images_BND: Tensor,
    texts_BLD: Tensor,
    words_BL: Tensor,
    log_scale: Tensor,
    image_rows_B: Tensor,
    *,
    chunk: int = 0,
    length: int = 0,
) -> Contrast:
    """1/2 CE(s S^i2t, diagonal) + 1/2 CE(s (S^t2i)^T, diagonal), s = exp(min(log_scale, ln 100)), with
    S^i2t_ij = mean over the patches n of picture i of max over the words l of caption j of cos(I_in, T_jl), and
    S^t2i_ij = mean over the words l of caption j of max over the patches n of picture i of cos(I_in, T_jl).

    images_BND: patches, no CLS. words_BL: bool, of `words.words_only`. A caption without words is a candidate for no
    picture, and its pair has no loss. Another caption of the same picture is no negative. Several ranks choose among
    the pairs of all of them (gather.py); length: the tokens they pad captions to, as each trims to its own longest.
    chunk: captions compared at a time, 0: all at once. All at once holds several arrays of B x C x N x L float32,
    3.3 GB each for 256 pairs of 196 patches and 64 tokens; in chunks, those of one, which the backward pass computes
    again.
    Source: Yao et al. 2021 (FILIP, arXiv:2111.07783), section 3.1; EOS is left out too, as in the thesis.
    """
    if num_ranks() > 1:
        assert texts_BLD.shape[1] <= length, f"{texts_BLD.shape[1]} tokens, padded to {length}"
        texts_BLD = functional.pad(texts_BLD, (0, 0, 0, length - texts_BLD.shape[1]))
        words_BL = functional.pad(words_BL, (0, length - words_BL.shape[1]), value=False)
    rows_G = gathered_constants(image_rows_B)
    labels_B = own_part(torch.arange(len(rows_G), device=rows_G.device))
    words_GL = gathered_constants(words_BL)
    with torch.autocast(images_BND.device.type, enabled=False):
        scale = log_scale.clamp(max=MAX_LOG_SCALE).exp()
        images_BND = unit(images_BND)
        texts_BLD = unit(texts_BLD.masked_fill(~words_BL[..., None], 0))  # padding may hold NaN
        to_texts_BG, to_images_GB = token_similarities(images_BND, gathered(texts_BLD), words_GL, chunk)
        if num_ranks() > 1:
            _, to_images_GB = token_similarities(gathered(images_BND), texts_BLD, words_BL, chunk)
        image_logits_BG, text_logits_BG = scale * to_texts_BG, scale * to_images_GB.T
    kept_B, wordless_G = words_BL.any(dim=1), ~words_GL.any(dim=1)
    twins_BG = same_picture(image_rows_B, rows_G, labels_B)
    others_BG = wordless_G.expand_as(twins_BG).scatter(1, labels_B[:, None], False)
    image_logits_BG = image_logits_BG.masked_fill(twins_BG | others_BG, -math.inf)
    image_loss, image_accuracy = choose_kept(image_logits_BG, labels_B, kept_B)
    text_loss, text_accuracy = choose_kept(text_logits_BG.masked_fill(twins_BG, -math.inf), labels_B, kept_B)
    return Contrast(0.5 * (image_loss + text_loss), image_loss, text_loss, image_accuracy, text_accuracy)


def token_similarities(
    images_BND: Tensor, texts_CLD: Tensor, words_CL: Tensor, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """S^i2t and S^t2i of `cmli`, [B, C] each, of unit vectors. A caption without words: BELOW, and 0."""
    if not chunk or chunk >= len(texts_CLD):
        return _compared(images_BND, texts_CLD, words_CL)
    parts = []
    for some_texts, some_words in zip(torch.split(texts_CLD, chunk), torch.split(words_CL, chunk), strict=True):
        if torch.is_grad_enabled():
            compared = checkpoint(
                _compared, images_BND, some_texts, some_words, use_reentrant=False, preserve_rng_state=False
            )
        else:
            compared = _compared(images_BND, some_texts, some_words)
        parts.append(compared)
    to_texts, to_images = zip(*parts, strict=True)
    return torch.cat(to_texts, dim=1), torch.cat(to_images, dim=1)


def _compared(images_BND: Tensor, texts_CLD: Tensor, words_CL: Tensor) -> tuple[Tensor, Tensor]:
    cosines_PQ = images_BND.flatten(0, 1) @ texts_CLD.flatten(0, 1).T  # every patch and every token
    cosines_BNCL = cosines_PQ.view(*images_BND.shape[:2], *words_CL.shape)
    to_texts_BC = cosines_BNCL.masked_fill(~words_CL, BELOW).amax(dim=3).mean(dim=1)
    of_words_BCL = cosines_BNCL.amax(dim=1).masked_fill(~words_CL, 0)
    return to_texts_BC, of_words_BCL.sum(dim=2) / words_CL.sum(dim=1).clamp(min=1)
