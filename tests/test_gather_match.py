"""Matching, queues, words and objects: two processes have the losses and gradients of one with the joined batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from emkum.stage2_train.objectives.cmli import cmli
from emkum.stage2_train.objectives.draws import uniform
from emkum.stage2_train.objectives.gather import gathered_constants
from emkum.stage2_train.objectives.itc_queue import FeatureQueue, itc_queue
from emkum.stage2_train.objectives.itm import MatchHead, itm, similarities
from emkum.stage2_train.objectives.object import object_contrast, object_mse
from emkum.stage2_train.objectives.proximal import proximal
from emkum.stage2_train.objectives.target_cmli import target_cmli
from emkum.stage2_train.objectives.words import words_only

RANKS, BATCH, PATCHES, TOKENS, WIDTH, STEPS = 2, 6, 3, 7, 5, 3
ROWS = torch.tensor([4, 1, 3, 1, 0, 4])  # rows 1 and 4 have a caption on each rank
LENGTHS = torch.tensor([7, 2, 4, 5, 2, 2])  # the second rank has fewer words, and shorter texts
KEPT = torch.tensor([[1, 1], [1, 1], [0, 1], [0, 1], [0, 0], [0, 0]]).bool()
IDS = torch.tensor([[40, 41], [10, 10], [0, 30], [0, 10], [0, 0], [0, 0]])


class Parts(torch.nn.Module):
    """What learns: a layer that stands for the student, and what the objectives themselves learn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = torch.nn.Linear(WIDTH, WIDTH)
        self.head = MatchHead(WIDTH, "product")
        self.scale = torch.nn.Parameter(torch.tensor(1.2))
        self.empty = torch.nn.Parameter(torch.randn(WIDTH))
        self.double()


def features(step: int, part: slice, *shape: int) -> Tensor:
    """Of `part` of a joined batch, float64."""
    generator = torch.Generator().manual_seed(1000 * step + sum(shape))
    return torch.randn(BATCH, *shape, dtype=torch.float64, generator=generator)[part]


def texts_and_words(step: int, part: slice) -> tuple[Tensor, Tensor]:
    """Trimmed to the longest of the part, as the loader does."""
    lengths = LENGTHS[part]
    longest = int(lengths.max())
    is_word = words_only(torch.arange(longest) < lengths[:, None])
    return features(step, part, TOKENS, WIDTH)[:, :longest], is_word


def of_itm(parts: Parts, step: int, part: slice, state: dict[str, Any]) -> Any:
    images, texts = parts.layer(features(step, part, WIDTH)), parts.layer(features(step, part, WIDTH + 1)[:, 1:])
    # In step 1 most pairs have one negative, which the second rank holds.
    rows = (torch.tensor([4, 4, 4, 4, 4, 1]) if step == 1 else ROWS)[part]
    generator = state.setdefault("generator", torch.Generator().manual_seed(8))
    drawn = uniform(len(rows), 2 * BATCH, generator, "cpu")
    hard = similarities(images, texts, parts.scale) if step != 2 else None
    return itm(parts.head, images, texts, rows, drawn, hard)


def of_queue(parts: Parts, step: int, part: slice, state: dict[str, Any]) -> Any:
    images, texts = parts.layer(features(step, part, WIDTH)), parts.layer(features(step, part, WIDTH + 1)[:, 1:])
    queue = state.setdefault("queue", FeatureQueue(8, WIDTH).double())
    found = itc_queue(images, texts, parts.scale, ROWS[part], queue)
    queue.push(*map(gathered_constants, (images, texts, ROWS[part])))
    return found


def of_momentum_queue(parts: Parts, step: int, part: slice, state: dict[str, Any]) -> Any:
    inputs = features(step, part, WIDTH), features(step, part, WIDTH + 1)[:, 1:]
    images, texts = map(parts.layer, inputs)
    keys = inputs[0] + 1, inputs[1] - 1  # of an average network, say
    queue = state.setdefault("queue", FeatureQueue(50, WIDTH).double())
    found = itc_queue(images, texts, parts.scale, ROWS[part], queue, keys)
    queue.push(*map(gathered_constants, (*keys, ROWS[part])))
    near = proximal(images, texts, *keys, strength=0.3)
    return {"near": near.loss, **vars(found), "loss": found.loss + near.loss}


def of_cmli(parts: Parts, step: int, part: slice, state: dict[str, Any]) -> Any:
    texts, is_word = texts_and_words(step, part)
    images = parts.layer(features(step, part, PATCHES, WIDTH))
    return cmli(images, parts.layer(texts), is_word, parts.scale, ROWS[part], chunk=2 * step, length=TOKENS)


def of_target_cmli(parts: Parts, step: int, part: slice, state: dict[str, Any]) -> Any:
    texts, is_word = texts_and_words(step, part)
    images, targets = features(step, part, PATCHES, WIDTH), features(step, part, PATCHES + 1, WIDTH)[:, 1:]
    return target_cmli(parts.layer(images), parts.layer(texts), is_word, targets, empty_D=parts.empty)


def of_object(parts: Parts, step: int, part: slice, state: dict[str, Any]) -> Any:
    phrases, regions = parts.layer(features(step, part, 2, WIDTH)), features(step, part, 3, WIDTH)[:, 1:]
    contrast = object_contrast(phrases, regions, KEPT[part], IDS[part], parts.scale)
    mse = object_mse(phrases, regions, KEPT[part])
    return {"mse": mse.loss, "share": mse.kept_share, **vars(contrast), "loss": contrast.loss + mse.loss}


OBJECTIVES: dict[str, Callable[[Parts, int, slice, dict[str, Any]], Any]] = {
    "itm": of_itm,
    "itc-queue": of_queue,
    "momentum": of_momentum_queue,
    "cmli": of_cmli,
    "target-cmli": of_target_cmli,
    "object": of_object,
}


def losses_and_gradients(name: str, part: slice) -> dict[str, Tensor]:
    """Of `part` of each joined batch: every number that is logged, and every gradient."""
    parts, state, found = Parts(), dict[str, Any](), dict[str, Tensor]()
    for step in range(STEPS):
        out = OBJECTIVES[name](parts, step, part, state)
        numbers = out if isinstance(out, dict) else vars(out)
        parts.zero_grad()
        numbers["loss"].backward()
        found |= {f"{step} {key}": value.detach().double().clone() for key, value in numbers.items()}
        for key, parameter in parts.named_parameters():
            found |= {f"{step} {key} gradient": parameter.grad.clone()} if parameter.grad is not None else {}
    return found


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    share = BATCH // RANKS
    for name in OBJECTIVES:
        torch.save(losses_and_gradients(name, slice(rank * share, (rank + 1) * share)), Path(folder) / f"{name} {rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(one_rank, (str(folder),), RANKS)
    return folder


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_ranks_have_the_losses_and_gradients_of_one_with_the_joined_batch(folder: Path, name: str) -> None:
    """Losses and gradients averaged over ranks. Ranks have other numbers of negatives, words and phrases."""
    ranks = [torch.load(folder / f"{name} {rank}") for rank in range(RANKS)]
    whole = losses_and_gradients(name, slice(None))
    assert any(key.endswith("gradient") and value.abs().max() > 1e-3 for key, value in whole.items())
    for key, expected in whole.items():
        mean = torch.stack([found[key] for found in ranks]).mean(0)
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")
    assert any(not torch.equal(ranks[0][key], ranks[1][key]) for key in whole)
