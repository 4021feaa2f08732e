"""Phrases and regions: which patches a box has in a crop, and both objectives, against plain float64 loops."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from test_objectives import plain_cross_entropy, random
from torch import Tensor

from emkum.shards.views import Box, replay_view
from emkum.stage2_train.objectives.object import in_boxes, object_contrast, object_mse, objects

WHOLE = Box(0, 0, 100, 80, False, 1, 1, 1, 100, 80)


def crops(*boxes: Box) -> Tensor:
    return torch.from_numpy(np.stack([box.as_row() for box in boxes]))


def patches_of(box: list[float], crop: Box, grid: tuple[int, int]) -> list[int]:
    return in_boxes(torch.tensor([[box]]), crops(crop), grid)[0, 0].nonzero().flatten().tolist()


# --- boxes -------------------------------------------------------------------------------------------------------


def test_a_box_has_the_patches_whose_centres_lie_in_it() -> None:
    assert patches_of([0, 0, 100, 80], WHOLE, (2, 4)) == list(range(8))
    assert patches_of([0, 0, 50, 40], WHOLE, (2, 4)) == [0, 1]
    assert patches_of([12, 0, 38, 80], WHOLE, (2, 4)) == [0, 1, 4, 5]  # centres at 12.5, 37.5
    assert patches_of([13, 0, 37.5, 80], WHOLE, (2, 4)) == [1, 5]  # neither 12.5 nor 37.5: where 25.25 lies
    assert patches_of([12.5, 20, 37.5, 60], WHOLE, (2, 4)) == [0]  # left and top count, right and bottom do not


def test_a_box_is_seen_through_the_crop_and_its_flip() -> None:
    crop = Box(40, 20, 40, 40, False, 1, 1, 1, 100, 80)
    assert patches_of([40, 20, 60, 40], crop, (4, 4)) == [0, 1, 4, 5]
    assert patches_of([0, 0, 60, 40], crop, (4, 4)) == [0, 1, 4, 5]  # what the crop cuts away changes nothing
    assert patches_of([40, 20, 60, 40], replace(crop, flip=True), (4, 4)) == [2, 3, 6, 7]


def test_a_box_without_a_centre_has_the_patch_its_visible_middle_lies_in() -> None:
    assert patches_of([52, 41, 54, 43], WHOLE, (2, 4)) == [6]
    assert patches_of([52, 41, 54, 43], replace(WHOLE, flip=True), (2, 4)) == [5]
    assert patches_of([0, 41, 100, 43], WHOLE, (2, 4)) == [4, 5, 6, 7]  # a thin one keeps its columns
    assert patches_of([0, 0, 41, 80], Box(40, 0, 60, 80, False, 1, 1, 1, 100, 80), (1, 3)) == [0]  # a last pixel


@pytest.mark.parametrize(
    "box", [[0, 0, 40, 80], [80, 0, 100, 80], [50, 60, 60, 80], [50, 30, 50, 40], [60, 30, 50, 40]]
)
def test_a_box_that_the_crop_cuts_away_or_without_area_has_no_patch(box: list[float]) -> None:
    assert patches_of(box, Box(40, 20, 40, 40, False, 1, 1, 1, 100, 80), (4, 4)) == []


def test_a_nan_box_has_no_patch() -> None:
    assert patches_of([math.nan] * 4, WHOLE, (4, 4)) == []


def plain_patches(box: list[int], crop: Box, grid: tuple[int, int]) -> set[int]:
    """In exact fractions, one patch after the other; only for boxes of more than a patch."""
    found = set()
    for row in range(grid[0]):
        for column in range(grid[1]):
            shown = grid[1] - 1 - column if crop.flip else column
            x = crop.left + Fraction(2 * shown + 1, 2 * grid[1]) * crop.width
            y = crop.top + Fraction(2 * row + 1, 2 * grid[0]) * crop.height
            if box[0] <= x < box[2] and box[1] <= y < box[3]:
                found.add(row * grid[1] + column)
    return found


def test_random_boxes_have_the_patches_of_exact_fractions() -> None:
    numbers, boxes, views, expected = np.random.default_rng(0), [], [], []
    grid = (5, 7)
    while len(boxes) < 300:
        left, top, width, height = numbers.integers([0, 0, 7, 5], [60, 40, 40, 40])
        crop = Box(*map(int, (left, top, width, height)), bool(numbers.integers(2)), 1, 1, 1, 100, 80)
        a, b, c, d = map(int, numbers.integers([0, 0, 0, 0], [100, 80, 100, 80]))
        box = [min(a, c), min(b, d), max(a, c), max(b, d)]
        if patches := plain_patches(box, crop, grid):
            boxes, views, expected = [*boxes, box], [*views, crop], [*expected, patches]
    found = in_boxes(torch.tensor(boxes)[:, None], crops(*views), grid)[:, 0]
    assert [set(row.nonzero().flatten().tolist()) for row in found] == expected


@pytest.mark.parametrize("flip", [False, True])
def test_the_patches_of_a_box_show_what_the_box_shows(flip: bool) -> None:
    """A white rectangle, drawn, cropped and flipped as the cache's crops are, is white in the patches of its box."""
    rectangle, crop = [32, 24, 64, 56], Box(16, 8, 64, 64, flip, 1, 1, 1, 96, 80)
    picture = Image.new("RGB", (96, 80))
    picture.paste("white", tuple(rectangle))  # type: ignore[arg-type]
    file = io.BytesIO()
    picture.save(file, "png")
    pixels = replay_view(file.getvalue(), 64, crop)
    brightness = pixels.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3, 4)).flatten()
    assert patches_of([float(edge) for edge in rectangle], crop, (8, 8)) == np.flatnonzero(brightness > 127).tolist()


# --- features ----------------------------------------------------------------------------------------------------


def batch() -> tuple[Tensor, ...]:
    """Two captions of 6 and 4 tokens, four places for phrases, a 2 x 2 grid. The second crop is the right half."""
    mask = torch.arange(6) < torch.tensor([6, 4])[:, None]
    # Spans: one is empty, one reaches into the padding, one lies in it. Boxes: one without area, one cut away.
    spans = torch.tensor([[[1, 3], [3, 6], [2, 2], [1, 2]], [[1, 2], [3, 9], [4, 6], [1, 2]]])
    boxes = torch.tensor(
        [
            [[0, 0, 50, 80], [0, 0, 100, 40], [0, 0, 9, 9], [9, 9, 9, 9]],
            [[0, 0, 100, 80], [50, 0, 75, 80], [50, 0, 75, 80], [0, 0, 9, 9]],
        ]
    )
    return random(2, 6, 3), mask, spans, random(2, 4, 3, seed=1), boxes, crops(WHOLE, replace(WHOLE, left=50, width=50))


def test_features_are_means_over_the_span_and_the_box_and_what_is_not_there_is_not_kept() -> None:
    texts, mask, spans, patches, boxes, views = batch()
    found = objects(texts, mask, spans, patches, boxes, views, (2, 2))
    assert found.kept_BK.tolist() == [[True, True, False, False], [True, True, False, False]]
    t, p = texts.numpy(), patches.numpy()
    for (b, k), tokens, places in (
        ((0, 0), [1, 2], [0, 2]),
        ((0, 1), [3, 4, 5], [0, 1]),
        ((1, 0), [1], [0, 1, 2, 3]),
        ((1, 1), [3], [0, 2]),
    ):
        assert np.allclose(found.phrases_BKD[b, k].numpy(), np.mean([t[b, i] for i in tokens], axis=0), rtol=1e-12)
        assert np.allclose(found.regions_BKD[b, k].numpy(), np.mean([p[b, i] for i in places], axis=0), rtol=1e-12)
    assert not found.phrases_BKD[0, 2].any()
    assert not found.regions_BKD[1, 3].any()


def test_padding_changes_nothing_not_even_nan_and_patches_get_no_gradient() -> None:
    texts, mask, spans, patches, boxes, views = batch()
    patches.requires_grad_()
    found = []
    for other in (0.0, math.nan):
        some = torch.where(mask[..., None], texts, other).requires_grad_()
        got = objects(some, mask, spans, patches, boxes, views, (2, 2))
        object_mse(got.phrases_BKD, got.regions_BKD, got.kept_BK).loss.backward()
        found.append((got.phrases_BKD.detach(), some.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert patches.grad is None


def test_a_grid_that_is_not_the_patches_is_refused() -> None:
    texts, mask, spans, patches, boxes, views = batch()
    with pytest.raises(AssertionError, match=r"4 patches, a grid of \(2, 3\)"):
        objects(texts, mask, spans, patches, boxes, views, (2, 3))


# --- losses ------------------------------------------------------------------------------------------------------

KEPT = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
IDS = torch.tensor([[4, 5, 9], [4, 4, 4], [5, 5, 5]])  # the one phrase of caption 1 names an object of caption 0


def test_object_mse_equals_the_plain_mean_over_kept_phrases() -> None:
    phrases, regions = random(3, 3, 4), random(3, 3, 4, seed=1)
    found = object_mse(phrases, regions, KEPT)
    pairs = [(phrases[b, k].numpy(), regions[b, k].numpy()) for b, k in ((0, 0), (0, 1), (1, 0))]
    assert found.loss.item() == pytest.approx(float(np.mean([np.mean((h - t) ** 2) for h, t in pairs])), rel=1e-12)
    assert found.kept_share.item() == pytest.approx(3 / 9)


def test_object_contrast_equals_the_plain_sum_over_kept_phrases() -> None:
    phrases, regions = random(3, 3, 4), random(3, 3, 4, seed=1)
    found = object_contrast(phrases, regions, KEPT, IDS, torch.tensor(1.3, dtype=torch.float64))
    places = [(0, 0), (0, 1), (1, 0)]
    h = np.array([phrases[p].numpy() / np.linalg.norm(phrases[p].numpy()) for p in places])
    t = np.array([regions[p].numpy() / np.linalg.norm(regions[p].numpy()) for p in places])
    logits, text_losses, image_losses = math.exp(1.3) * h @ t.T, [], []
    for i in range(3):
        allowed = np.array([i == j or IDS[places[i]] != IDS[places[j]] for j in range(3)])
        text_losses.append(plain_cross_entropy(logits[i], i, allowed))
        image_losses.append(plain_cross_entropy(logits[:, i], i, allowed))
    assert found.text_loss.item() == pytest.approx(float(np.mean(text_losses)), rel=1e-12)
    assert found.image_loss.item() == pytest.approx(float(np.mean(image_losses)), rel=1e-12)
    assert found.loss.item() == pytest.approx(float(np.mean(text_losses + image_losses)), rel=1e-12)


def test_object_gradients_are_those_of_finite_differences() -> None:
    texts, *others = batch()
    ids = torch.arange(8).view(2, 4)

    def mse(texts: Tensor) -> Tensor:
        found = objects(texts, *others, (2, 2))  # type: ignore[arg-type]
        return object_mse(found.phrases_BKD, found.regions_BKD, found.kept_BK).loss

    def contrast(texts: Tensor, log_scale: Tensor) -> Tensor:
        found = objects(texts, *others, (2, 2))  # type: ignore[arg-type]
        return object_contrast(found.phrases_BKD, found.regions_BKD, found.kept_BK, ids, log_scale).loss

    assert torch.autograd.gradcheck(mse, (texts.requires_grad_(),))
    assert torch.autograd.gradcheck(contrast, (texts, torch.tensor(0.7, dtype=torch.float64, requires_grad=True)))


@pytest.mark.parametrize("contrast", [False, True])
def test_a_batch_without_a_phrase_costs_nothing(contrast: bool) -> None:
    phrases, none = random(2, 3, 4).requires_grad_(), torch.zeros(2, 3, dtype=torch.bool)
    arguments = phrases, random(2, 3, 4, seed=1), none
    if contrast:
        loss = object_contrast(*arguments, torch.zeros(2, 3, dtype=torch.int64), torch.tensor(1.0)).loss
    else:
        loss = object_mse(*arguments).loss
    loss.backward()
    assert loss.item() == 0
    assert phrases.grad is not None
    assert not phrases.grad.any()


def test_one_phrase_and_mentions_of_one_object_have_no_negatives() -> None:
    ids = torch.full((2, 3), 7)
    for kept in (torch.tensor([[True, False, False]] * 2), torch.tensor([[False, True, False], [False] * 3])):
        found = object_contrast(random(2, 3, 4), random(2, 3, 4, seed=1), kept, ids, torch.tensor(1.0))
        assert found.loss.item() == 0
        assert found.text_accuracy.item() == found.image_accuracy.item() == 1


def test_object_losses_under_autocast_are_in_float32_with_finite_gradients() -> None:
    texts, *others = batch()
    texts = texts.bfloat16().requires_grad_()
    others[2] = others[2].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objects(texts, *others, (2, 2))  # type: ignore[arg-type]
        mse = object_mse(found.phrases_BKD, found.regions_BKD, found.kept_BK).loss
        contrast = object_contrast(
            found.phrases_BKD, found.regions_BKD, found.kept_BK, torch.arange(8).view(2, 4), torch.tensor(4.0)
        ).loss
    (mse + contrast).backward()
    assert found.phrases_BKD.dtype == mse.dtype == contrast.dtype == torch.float32
    assert texts.grad is not None
    assert torch.isfinite(texts.grad).all()


def test_object_mse_does_not_broadcast() -> None:
    with pytest.raises(AssertionError):
        object_mse(random(2, 3, 4), random(2, 3, 1), torch.ones(2, 3, dtype=torch.bool))
