"""Targets against their equations written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emkum.models import targets

EPS = 1e-5


def layers_reference(hidden: list[np.ndarray], lengths: list[int], final_layer_norm: bool) -> np.ndarray:
    """Y = LN(mean_l IN(H_l)), sample by sample, over the real tokens."""
    out = np.zeros_like(hidden[0])
    for sample, length in enumerate(lengths):
        normed = []
        for layer in hidden:
            real = layer[sample, :length]
            normed.append((real - real.mean(0)) / np.sqrt(real.var(0) + EPS))
        mean = np.mean(normed, axis=0)
        if final_layer_norm:
            centred = mean - mean.mean(1, keepdims=True)
            mean = centred / np.sqrt(mean.var(1, keepdims=True) + EPS)
        out[sample, :length] = mean
    return out


def random_layers(shape: tuple[int, ...], num: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(loc=index, scale=1 + index, size=shape) for index in range(num)]


@pytest.mark.parametrize("norm", [True, False], ids=["images", "without-norm"])
def test_layers_of_pictures_are_the_normed_mean_over_all_tokens(norm: bool) -> None:
    hidden = random_layers((3, 7, 5))
    found = targets.layers([torch.from_numpy(h).float() for h in hidden], None, final_layer_norm=norm)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), layers_reference(hidden, [7, 7, 7], norm), atol=2e-6)


def test_layers_of_texts_leave_pads_out_of_the_statistics_and_zero() -> None:
    hidden, lengths = random_layers((3, 9, 5)), [9, 4, 1]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    found = targets.layers([torch.from_numpy(h).float() for h in hidden], mask, final_layer_norm=False)
    np.testing.assert_allclose(found.numpy(), layers_reference(hidden, lengths, False), atol=2e-6)
    assert not found[~mask].any()


def test_more_pads_whatever_they_hold_change_nothing() -> None:
    hidden = [torch.from_numpy(h).float() for h in random_layers((2, 6, 5))]
    short = targets.layers(hidden, torch.ones(2, 6, dtype=torch.bool), final_layer_norm=False)
    garbage = torch.full((2, 10, 5), float("nan"))
    garbage[:, ::2] = float("inf")
    mask = torch.arange(16).expand(2, -1) < 6
    long = targets.layers([torch.cat([h, garbage], 1) for h in hidden], mask, final_layer_norm=False)
    torch.testing.assert_close(long[:, :6], short)
    assert not long[:, 6:].any()


def test_layers_without_a_mask_equal_a_mask_of_real_tokens_alone() -> None:
    hidden = [torch.from_numpy(h).float() for h in random_layers((2, 6, 5))]
    for norm in (True, False):
        everything = torch.ones(2, 6, dtype=torch.bool)
        one, other = targets.layers(hidden, None, norm), targets.layers(hidden, everything, norm)
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_layers_are_computed_in_float32_from_bfloat16_and_may_come_one_by_one() -> None:
    hidden = [torch.from_numpy(h).bfloat16() for h in random_layers((2, 6, 5))]
    found = targets.layers(iter(hidden), None, final_layer_norm=True)
    assert found.dtype == torch.float32
    assert torch.equal(found, targets.layers([h.float() for h in hidden], None, final_layer_norm=True))
    with pytest.raises(ValueError, match="no layers"):
        targets.layers([], None, True)


@pytest.mark.parametrize("masked", [False, True])
def test_layers_have_the_right_gradient(masked: bool) -> None:
    hidden = [torch.from_numpy(h).requires_grad_(True) for h in random_layers((2, 4, 3), num=2)]
    mask = torch.tensor([[True] * 4, [True, True, False, False]]) if masked else None
    assert torch.autograd.gradcheck(lambda *h: targets.layers(h, mask, not masked), hidden)


def test_a_channel_that_never_varies_gives_zeros_and_not_nan() -> None:
    constant = torch.full((1, 5, 3), 7.0)
    assert not targets.layers([constant], None, final_layer_norm=True).any()
    mask = torch.zeros(1, 5, dtype=torch.bool)
    assert not targets.layers([constant], mask, final_layer_norm=False).any()


def test_cls_patches_and_logits_are_the_tokens_they_say() -> None:
    final = torch.randn(2, 8, 5)
    assert torch.equal(targets.cls(final), final[:, 0])
    assert torch.equal(targets.patches(final, num_prefix=3), final[:, 3:])
    head, bias = torch.randn(4, 5), torch.randn(4)
    expected = final[:, 0].double().numpy() @ head.double().numpy().T + bias.double().numpy()
    np.testing.assert_allclose(targets.logits(final, head, bias).numpy(), expected, atol=1e-5)
