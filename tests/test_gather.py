"""Ranks choose among the samples of all of them: two processes have the losses and gradients of one with the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from emkum.stage2_train.objectives.ctl import FifoBank, WholeBank, ctl
from emkum.stage2_train.objectives.gather import gathered, gathered_constants, num_ranks, own_part
from emkum.stage2_train.objectives.itc import itc
from emkum.stage2_train.objectives.ranking import ranking

RANKS, BATCH, WIDTH, STEPS = 2, 6, 5, 3
BANKS = ("whole", "fifo", "tiny fifo")


def inputs(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of pictures and captions before the last layer, targets, image rows: of the joined batch, float64."""
    random = torch.Generator().manual_seed(step)
    images, texts, targets = torch.randn(3, BATCH, WIDTH, dtype=torch.float64, generator=random)
    return images, texts, targets, torch.tensor([4, 1, 3, 1, 0, 4])  # rows 1 and 4 have a caption on each rank


def losses_and_gradients(bank_kind: str, part: slice) -> dict[str, Tensor]:
    """Of `part` of each joined batch; a layer and the scale stand for the student."""
    layer = torch.nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, WIDTH * WIDTH).view(WIDTH, WIDTH))
        layer.bias.fill_(0.1)
    scale = torch.nn.Parameter(torch.tensor(1.2, dtype=torch.float64))
    bank: Any = FifoBank(4 if bank_kind == "tiny fifo" else 40, WIDTH).double()
    if bank_kind == "whole":
        every = torch.randn(5, 1, WIDTH, generator=torch.Generator().manual_seed(9))
        bank = WholeBank(torch.arange(5), every.double(), fresh=True)
    found = {}
    for step in range(STEPS):
        images_BD, texts_BD, targets_BD, rows_B = (whole[part] for whole in inputs(step))
        images_BD, texts_BD = layer(images_BD), layer(texts_BD)
        contrast = itc(images_BD, texts_BD, scale, rows_B)
        everyone = [gathered_constants(mine) for mine in (targets_BD, rows_B, torch.zeros_like(rows_B))]
        candidates_ND, rows_N, labels_G = bank.candidates(*everyone)
        target = ctl(images_BD, texts_BD, candidates_ND, rows_N, own_part(labels_G), rows_B, scale)
        bank.push(*everyone[:2])
        layer.zero_grad()
        scale.grad = None
        ranked = ranking(images_BD, texts_BD, 0.3, rows_B)
        (contrast.loss + target.loss + ranked.loss).backward()
        found |= {f"{step} itc": contrast.loss.detach(), f"{step} ctl": target.loss.detach()}
        found |= {f"{step} ranking": ranked.loss.detach(), f"{step} ranked": ranked.text_accuracy.double()}
        found |= {f"{step} weight": layer.weight.grad, f"{step} bias": layer.bias.grad, f"{step} scale": scale.grad}
    return {name: tensor.clone() for name, tensor in found.items()}


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    share = BATCH // RANKS
    for bank_kind in BANKS:
        found = losses_and_gradients(bank_kind, slice(rank * share, (rank + 1) * share))
        torch.save(found, Path(folder) / f"{bank_kind} {rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(one_rank, (str(folder),), RANKS)
    return folder


@pytest.mark.parametrize("bank_kind", BANKS)
def test_two_ranks_have_the_losses_and_gradients_of_one_with_the_joined_batch(folder: Path, bank_kind: str) -> None:
    """Gradients averaged over ranks, as data parallelism does. With captions of one picture on both ranks."""
    ranks = [torch.load(folder / f"{bank_kind} {rank}") for rank in range(RANKS)]
    whole = losses_and_gradients(bank_kind, slice(None))
    for name, expected in whole.items():
        torch.testing.assert_close(
            torch.stack([found[name] for found in ranks]).mean(0), expected, rtol=1e-6, atol=1e-9
        )
    assert any(not torch.equal(ranks[0][name], ranks[1][name]) for name in whole)


def test_one_rank_gets_back_what_it_gave() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert num_ranks() == 1
    assert gathered(rows) is rows
    assert gathered_constants(rows) is rows
    assert own_part(rows) is rows
