"""The same rows of every rank: features with their gradient, everything else without.

Ranks hold equal parts of a batch (order.py), so that the parts in the order of ranks are the batch of one rank. Where
torch.distributed is not set up, or there is one rank, every function gives back what it got.

B rows of this rank, G rows of all ranks, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from torch import Tensor

_alone = False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Meanwhile this rank counts as the only one: for a validation, which the others wait for and take no part in."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def num_ranks() -> int:
    """Processes that train together; 1 without torch.distributed, and where this one is `alone`."""
    there = not _alone and torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def gathered(rows_BD: Tensor) -> Tensor:
    """The rows of all ranks, [G, ...], with the gradient of every rank's loss with respect to our own.

    Each rank's loss is a mean over its own rows, and data parallelism averages gradients over ranks: together that is
    the gradient of the mean over all rows. A collective call: all ranks make it, forward and backward, in one order.
    """
    if num_ranks() == 1:
        return rows_BD
    found: Tensor = _Gather.apply(rows_BD)  # type: ignore[no-untyped-call]
    return found


def gathered_constants(rows_B: Tensor) -> Tensor:
    """The rows of all ranks, [G, ...], without gradient: ids, views, targets."""
    return rows_B if num_ranks() == 1 else _all_rows(rows_B.detach())


def own_part(rows_G: Tensor) -> Tensor:
    """This rank's part of what all ranks hold alike."""
    ranks = num_ranks()
    return rows_G if ranks == 1 else rows_G.chunk(ranks)[torch.distributed.get_rank()]


def _all_rows(rows_B: Tensor) -> Tensor:
    parts = [torch.empty_like(rows_B, memory_format=torch.contiguous_format) for _ in range(num_ranks())]
    torch.distributed.all_gather(parts, rows_B.contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """all_gather; its backward pass sums what each rank found for the same rows."""

    @staticmethod
    def forward(_: Any, rows_BD: Tensor) -> Tensor:
        return _all_rows(rows_BD)

    @staticmethod
    def backward(_: Any, gradient_GD: Tensor) -> Tensor:
        # Not reduce_scatter, which gloo lacks; the features of a batch are small.
        summed_GD = gradient_GD.contiguous().clone()
        torch.distributed.all_reduce(summed_GD)
        return own_part(summed_GD)
