"""Augmentations of cached tokens: what is kept, what is mixed, and that targets follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emkum.stage2_train.objectives.latent import draw_mix, drop_tokens, mix_up, take_tokens


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(batch: int, tokens: int, width: int = 3) -> Tensor:
    """Tokens that say which sample and which place they are of."""
    return (torch.arange(batch)[:, None, None] * 1000.0 + torch.arange(tokens)[:, None]).expand(batch, tokens, width)


@pytest.mark.parametrize(("keep", "kept"), [(0.5, 5), (0.01, 1), (1.0, 10), (0.75, 8)])
def test_the_prefix_and_a_share_of_the_patches_are_kept_in_their_order(keep: float, kept: int) -> None:
    tokens = numbered(6, 12)  # CLS, a register, ten patches
    found = drop_tokens(tokens, keep, 2, generator())
    assert found.kept_BK.shape == (6, 2 + kept)
    for row in range(6):
        places = found.kept_BK[row].tolist()
        assert places[:2] == [0, 1]
        assert places == sorted(set(places))
        assert places[-1] < 12
        assert torch.equal(found.tokens_BKD[row], tokens[row, places])


def test_pictures_lose_different_patches_each_as_often_as_the_others() -> None:
    found = drop_tokens(numbered(2000, 9), 0.25, 1, generator())
    counts = torch.bincount(found.kept_BK.flatten(), minlength=9)
    assert counts[0] == 2000
    assert (counts[1:] / 2000).tolist() == pytest.approx([0.25] * 8, abs=0.04)


def test_targets_are_taken_at_the_places_of_the_tokens() -> None:
    tokens, targets = numbered(3, 7), numbered(3, 7, width=2) + 0.5
    found = drop_tokens(tokens, 0.5, 1, generator())
    assert torch.equal(take_tokens(targets, found.kept_BK)[..., 0], found.tokens_BKD[..., 0] + 0.5)
    patches = targets[:, 1:]  # a field without CLS
    taken = take_tokens(patches, found.kept_BK[:, 1:] - 1)
    assert torch.equal(taken[..., 0], found.tokens_BKD[:, 1:, 0] + 0.5)


def test_gradients_reach_the_tokens_that_are_kept() -> None:
    tokens = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    found = drop_tokens(tokens, 0.5, 1, generator())
    found.tokens_BKD.sum().backward()
    kept = torch.zeros(2, 5).scatter(1, found.kept_BK, 1.0)
    assert torch.equal(tokens.grad[..., 0], kept.double())  # type: ignore[index]


def test_the_same_generator_drops_the_same_tokens() -> None:
    first, again, other = (drop_tokens(numbered(4, 20), 0.5, 1, generator(seed)).kept_BK for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_neighbours_are_mixed_by_one_weight_and_the_last_of_an_odd_batch_stays() -> None:
    tokens, weight = torch.randn(5, 2, 3, dtype=torch.float64), torch.tensor(0.3)
    found = mix_up(tokens, weight)
    for row, neighbour in enumerate([1, 0, 3, 2, 4]):
        assert torch.allclose(found[row], 0.3 * tokens[row] + 0.7 * tokens[neighbour])


def test_tokens_and_targets_mix_alike() -> None:
    tokens, weight = torch.randn(4, 3, 2, dtype=torch.float64), draw_mix(0.4, generator(), "cpu")
    targets = tokens @ torch.randn(2, 5, dtype=torch.float64)  # linear in the tokens, so mixing commutes
    matrix = torch.linalg.lstsq(tokens.view(-1, 2), targets.view(-1, 5)).solution
    assert torch.allclose(mix_up(targets, weight), mix_up(tokens, weight) @ matrix)


def test_a_batch_of_one_mixes_with_itself_and_ids_are_not_mixed() -> None:
    one = torch.randn(1, 3)
    assert torch.allclose(mix_up(one, torch.tensor(0.2)), one)
    with pytest.raises(AssertionError):
        mix_up(torch.arange(4), torch.tensor(0.2))


def test_gradients_of_a_mix_are_those_of_finite_differences() -> None:
    values = torch.randn(3, 2, dtype=torch.float64, generator=generator()).requires_grad_()
    weight = torch.tensor(0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: mix_up(x, weight).square(), values)


@pytest.mark.parametrize("alpha", [0.05, 0.4, 1.0, 8.0])
def test_weights_have_the_mean_and_variance_of_beta(alpha: float) -> None:
    source = generator()
    drawn = torch.stack([draw_mix(alpha, source, "cpu") for _ in range(4000)])
    assert torch.isfinite(drawn).all()
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.03)
    assert drawn.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)


def test_the_least_alpha_gives_no_nan_and_a_lesser_one_is_refused() -> None:
    source = generator()
    drawn = torch.stack([draw_mix(0.01, source, "cpu") for _ in range(2000)])
    assert torch.isfinite(drawn).all()
    assert (drawn != 0.5).all()  # which they would be where both Gamma numbers round to the least of all
    with pytest.raises(AssertionError):
        draw_mix(0.0, source, "cpu")
    assert draw_mix(0.4, generator(3), "cpu") == draw_mix(0.4, generator(3), "cpu")
