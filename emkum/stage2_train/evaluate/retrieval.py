"""Ranks, recalls and their chance levels: the one retrieval code of training, evaluation and demo.

The rank of a query is 1 + the number of wrong candidates that score at least as high as its best right
candidate. So any right candidate counts, further right ones never stand in the way, and a tie counts against:
features that are all equal give the worst recall, not the best.

Ties are exact. Features are normalised in float64 and rounded to multiples of 2**-26; a product of two is then a
multiple of 2**-52, and every partial sum of a cosine stays below 2 in size, so float64 adds them without
any rounding. The numbers depend on neither chunk size, threads, device nor the order of candidates.

Legend: N queries, M candidates, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from emkum.errors import NonFiniteFeature, UsageError

KS = (1, 5, 10)
GRID = 2.0**26
SCORES_PER_CHUNK = 4_000_000  # float64 scores held at once: 32 MB, and about as much again for the comparisons
NO_GROUP = -1


def image_text_retrieval(
    images_ND: np.ndarray | torch.Tensor,
    texts_MD: np.ndarray | torch.Tensor,
    image_of_text_M: np.ndarray | torch.Tensor | Sequence[int],
    ks: Sequence[int] = KS,
    scores_per_chunk: int = SCORES_PER_CHUNK,
) -> dict[str, Any]:
    """Recall at k in percent, picture to caption and caption to picture, and the mean of all the numbers.

    images_ND, texts_MD: features, finite; normalised here. image_of_text_M: the index in images_ND of each
    caption's picture, -1 for a caption without one. Such captions and pictures without captions are candidates (so:
    distractors), never queries. Any caption of a picture counts.
    Returns {"image_to_text": {"R@1": ...}, "text_to_image": {"R@1": ...}, "mean": ...}.
    Raises NonFiniteFeature for NaN or infinity, UsageError where no caption belongs to a picture.
    """
    image_of_text_M = as_groups(image_of_text_M)
    if len(image_of_text_M) != len(texts_MD):
        raise ValueError(f"{len(texts_MD)} texts but {len(image_of_text_M)} numbers of their pictures")
    if len(image_of_text_M) and image_of_text_M.max() >= len(images_ND):
        raise ValueError(f"a text belongs to picture {image_of_text_M.max()} of only {len(images_ND)}")
    with_picture = image_of_text_M >= 0
    if not with_picture.any():
        raise UsageError(
            "no caption belongs to a picture, so there is nothing to retrieve",
            "evaluate on data with captions (a txt or json member beside each picture)",
        )
    images_ND, texts_MD = on_grid(images_ND, "picture"), on_grid(texts_MD, "text")
    pictures = np.arange(len(images_ND))
    captioned = np.unique(image_of_text_M[with_picture])
    image_ranks = ranks(images_ND[captioned], texts_MD, captioned, image_of_text_M, scores_per_chunk)
    text_ranks = ranks(texts_MD[with_picture], images_ND, image_of_text_M[with_picture], pictures, scores_per_chunk)
    return both_ways("image_to_text", image_ranks, "text_to_image", text_ranks, ks)


def retrieval_chance(
    image_of_text_M: np.ndarray | Sequence[int], num_images: int, ks: Sequence[int] = KS
) -> dict[str, dict[str, float]]:
    """What a random order would reach in `image_text_retrieval`, in percent; the same shape."""
    image_of_text_M = as_groups(image_of_text_M)
    queries = image_of_text_M[image_of_text_M >= 0]
    pictures = np.arange(num_images)
    return {
        "image_to_text": chance(np.unique(queries), image_of_text_M, ks),
        "text_to_image": chance(queries, pictures, ks),
    }


def ranks(
    queries_ND: torch.Tensor,
    candidates_MD: torch.Tensor,
    query_groups_N: np.ndarray,
    candidate_groups_M: np.ndarray,
    scores_per_chunk: int = SCORES_PER_CHUNK,
) -> np.ndarray:
    """The rank of each query's best right candidate, int64 [N], from 1; M + 1 where no candidate is right.

    Features as from `on_grid`. A candidate is right where its group is the query's; a negative group is no one's.
    """
    device = candidates_MD.device
    query_groups = torch.as_tensor(query_groups_N).to(device)
    candidate_groups = torch.as_tensor(candidate_groups_M).to(device)
    # A group of no one must not meet itself: as a candidate it is -1, as a query -2.
    query_groups = torch.where(query_groups < 0, -2, query_groups)
    candidate_groups = torch.where(candidate_groups < 0, NO_GROUP, candidate_groups)
    num_candidates = len(candidates_MD)
    step = max(1, scores_per_chunk // max(1, num_candidates))
    ranks_N = torch.empty(len(queries_ND), dtype=torch.int64, device=device)
    for start in range(0, len(queries_ND), step):
        chunk = slice(start, start + step)
        scores = queries_ND[chunk] @ candidates_MD.T
        right = query_groups[chunk, None] == candidate_groups[None, :]
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        at_least_as_high = scores >= best
        ranks_N[chunk] = 1 + (at_least_as_high & ~right).sum(dim=1)
    return ranks_N.cpu().numpy()


def recall(ranks_N: np.ndarray, ks: Sequence[int], name: str = "R@") -> dict[str, float]:
    """The share of ranks not above k, in percent, for each k."""
    return {f"{name}{k}": 100.0 * float(np.mean(ranks_N <= k)) for k in ks}


def both_ways(
    name: str, ranks_N: np.ndarray, inverse_name: str, inverse_ranks_M: np.ndarray, ks: Sequence[int], at: str = "R@"
) -> dict[str, Any]:
    """Recalls of two directions under their names, and "mean", the mean of all their numbers."""
    there, back = recall(ranks_N, ks, at), recall(inverse_ranks_M, ks, at)
    numbers = [*there.values(), *back.values()]
    return {name: there, inverse_name: back, "mean": sum(numbers) / len(numbers)}


def chance(
    query_groups_N: np.ndarray, candidate_groups_M: np.ndarray, ks: Sequence[int], name: str = "R@"
) -> dict[str, float]:
    """The expected recall of a random order, in percent: 1 - C(M - r, k) / C(M, k) for a query with r right ones."""
    num_candidates = len(candidate_groups_M)
    groups, sizes = np.unique(candidate_groups_M, return_counts=True)
    size_of = {int(g): int(n) for g, n in zip(groups, sizes, strict=True) if g >= 0}
    num_right, num_queries = np.unique([size_of.get(int(g), 0) for g in query_groups_N], return_counts=True)
    result = {}
    for k in ks:
        missed = [_none_right(num_candidates, int(r), k) for r in num_right]
        result[f"{name}{k}"] = 100.0 * (1.0 - float(np.average(missed, weights=num_queries)))
    return result


def _none_right(num_candidates: int, num_right: int, k: int) -> float:
    """The chance that k draws without replacement hold none of the right ones."""
    missed = 1.0
    for drawn in range(min(k, num_candidates)):
        missed *= max(0, num_candidates - num_right - drawn) / (num_candidates - drawn)
    return missed


def on_grid(features_ND: np.ndarray | torch.Tensor, what: str) -> torch.Tensor:
    """Features of length 1 as float64 multiples of 2**-26, on the device they were on; see the top of this file.

    A feature of length 0 stays 0: its cosine with everything is 0.
    Raises NonFiniteFeature naming the first bad row.
    """
    features = torch.as_tensor(features_ND)
    if features.ndim != 2:
        raise ValueError(f"{what} features are [rows, width], not {tuple(features.shape)}")
    if features.device.type == "mps":  # has no float64
        features = features.cpu()
    features = features.detach().to(torch.float64)
    finite = torch.isfinite(features).all(dim=1)
    if not bool(finite.all()):
        row = int(torch.nonzero(~finite)[0, 0])
        raise NonFiniteFeature(
            f"{what} feature {row} of {len(features)} holds NaN or infinity",
            "the student diverged: train again with a lower learning rate or gradient clipping",
        )
    # Scaled by the largest number first, so that the squares of very large or small features stay in range.
    largest = features.abs().amax(dim=1, keepdim=True) if features.shape[1] else features.sum(dim=1, keepdim=True)
    features = features / torch.where(largest > 0, largest, 1.0)
    length = features.norm(dim=1, keepdim=True)
    features = features / torch.where(length > 0, length, 1.0)
    return torch.round(features * GRID) / GRID


def as_groups(groups: np.ndarray | torch.Tensor | Sequence[int]) -> np.ndarray:
    """Groups as int64 on the host."""
    if isinstance(groups, torch.Tensor):
        groups = groups.cpu().numpy()
    array = np.asarray(groups)
    if array.ndim != 1 or not (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"groups are a row of whole numbers, not {array.dtype} {array.shape}")
    return array.astype(np.int64)
