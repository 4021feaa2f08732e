"""No objective asks the device for a number: with tensors that have a shape and no values, each gives its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_objectives import random
from torch._subclasses.fake_tensor import FakeTensorMode

from emkum.stage2_train.objectives.cmli import cmli
from emkum.stage2_train.objectives.itc_queue import FeatureQueue, itc_queue
from emkum.stage2_train.objectives.itm import MatchHead, itm, similarities
from emkum.stage2_train.objectives.object import object_contrast, object_mse, objects
from emkum.stage2_train.objectives.proximal import proximal
from emkum.stage2_train.objectives.target_cmli import target_cmli
from emkum.stage2_train.objectives.words import words_only

B, N, L, D, K = 4, 6, 5, 3, 2


def of_itm(images: Any, texts: Any, rows: Any, scale: Any) -> Any:
    hard = similarities(images[:, 0], texts[:, 0], scale)
    return itm(MatchHead(D), images[:, 0], texts[:, 0], rows, torch.rand(B, 2 * B), hard).loss


def of_queue(images: Any, texts: Any, rows: Any, scale: Any) -> Any:
    queue = FeatureQueue(5, D)
    queue.push(images[:, 0], texts[:, 0], rows)
    near = proximal(images[:, 1], texts[:, 1], images[:, 2], texts[:, 2], 1.0).loss
    return near + itc_queue(images[:, 1], texts[:, 1], scale, rows, queue).loss


def of_cmli(images: Any, texts: Any, rows: Any, scale: Any) -> Any:
    return cmli(images, texts, words_only(texts[..., 0] > 0), scale, rows, chunk=3).loss


def of_target_cmli(images: Any, texts: Any, rows: Any, scale: Any) -> Any:
    return target_cmli(images, texts, texts[..., 0] > 0, images + 1, empty_D=images[0, 0]).loss


def of_object(images: Any, texts: Any, rows: Any, scale: Any) -> Any:
    spans, boxes, crops = torch.ones(B, K, 2), torch.ones(B, K, 4), torch.ones(B, 10)
    found = objects(texts, texts[..., 0] > 0, spans, images, boxes, crops, (2, 3))
    mse = object_mse(found.phrases_BKD, found.regions_BKD, found.kept_BK).loss
    return (
        mse
        + object_contrast(
            found.phrases_BKD, found.regions_BKD, found.kept_BK, rows[:, None].expand(B, K), torch.ones(())
        ).loss
    )


@pytest.mark.parametrize("objective", [of_itm, of_queue, of_cmli, of_target_cmli, of_object])
def test_an_objective_needs_no_values_to_be_queued(objective: Callable[..., Any]) -> None:
    """Reading one, as `.item()`, `if tensor` or a boolean index do, raises; a device would be waited for."""
    inputs = random(B, N, D).float(), random(B, L, D, seed=1).float(), torch.arange(B), torch.tensor(1.0)
    with FakeTensorMode() as mode:
        images, texts, rows, scale = map(mode.from_tensor, inputs)
        loss = objective(images.requires_grad_(), texts.requires_grad_(), rows, scale)
        loss.backward()
        assert loss.shape == ()
        with pytest.raises(RuntimeError):
            loss.item()
