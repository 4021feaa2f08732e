"""The int8 codec on the device against the formula in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emkum.errors import NonFiniteFeature
from emkum.models.quantise import decode_int8, encode_int8


def reference(values: np.ndarray, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """docs/format.md, section 4, in float32."""
    z = (values - mean) / std
    scale = np.abs(z).max(-1) / np.float32(127)
    scale = np.where(scale == 0, np.float32(1), scale)
    return np.clip(np.rint(z / scale[..., None]), -127, 127).astype(np.int8), scale


@pytest.mark.parametrize("shape", [(64, 48), (5, 17, 384), (3, 4, 5, 32)], ids=str)
def test_every_number_and_scale_equals_the_formula_in_numpy_bit_for_bit(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(shape))
    values = (rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1]))).astype(np.float32)
    values[0] = 0
    mean, std = rng.normal(size=shape[-1]).astype(np.float32), rng.uniform(0.1, 3, shape[-1]).astype(np.float32)
    stored, scale = encode_int8(torch.from_numpy(values), torch.from_numpy(mean), torch.from_numpy(std))
    expected_stored, expected_scale = reference(values, mean, std)
    assert stored.dtype == torch.int8
    assert scale.dtype == torch.float32
    np.testing.assert_array_equal(stored.numpy(), expected_stored)
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    decoded = decode_int8(stored, scale, torch.from_numpy(mean), torch.from_numpy(std))
    expected = (expected_stored.astype(np.float32) * expected_scale[..., None]) * std + mean
    np.testing.assert_array_equal(decoded.numpy(), expected)


def test_with_the_statistics_of_the_channels_the_error_is_below_one_percent() -> None:
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.normal(size=(512, 384)) * np.exp(rng.normal(size=384))).float()
    mean, std = values.mean(0), values.std(0)
    decoded = decode_int8(*encode_int8(values, mean, std), mean, std)
    assert float((decoded - values).norm() / values.norm()) < 0.01


def test_halves_round_to_even() -> None:
    z = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    stored, scale = encode_int8(z, torch.zeros(6), torch.ones(6))
    assert scale.tolist() == [1.0]
    assert stored.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_a_token_at_the_mean_has_scale_one_and_comes_back_exactly() -> None:
    mean, std = torch.randn(8), torch.rand(8) + 0.5
    stored, scale = encode_int8(mean[None], mean, std)
    assert scale.tolist() == [1.0]
    assert torch.equal(decode_int8(stored, scale, mean, std), mean[None])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused(bad: float) -> None:
    values = torch.zeros(3, 4)
    values[1, 2] = bad
    with pytest.raises(NonFiniteFeature, match="inf or NaN"):
        encode_int8(values, torch.zeros(4), torch.ones(4))
