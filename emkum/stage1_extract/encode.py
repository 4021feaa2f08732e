"""Network outputs -> stored numbers, rounded on the device, with range and error measured there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from emkum.errors import NonFiniteFeature
from emkum.models import quantise
from emkum.shards.codec import FLOAT16_MAX, Encoded, Summary


@dataclass(frozen=True)
class Rows:
    """Encoded rows, and those of the batch that were refused, by their place in it, with the reason."""

    encoded: Encoded
    refused: dict[int, str]


def encode_batch(
    values: Tensor,
    field: str,
    storage: str,
    names: Sequence[str],
    statistics: tuple[Tensor, Tensor] | None = None,
    length: np.ndarray | None = None,
    on_nonfinite: str = "stop",
) -> Rows:
    """float32 [N, ...] on any device -> rows for the writer.

    names: what to call each row in an error. statistics: channel mean and std on the device, for int8.
    on_nonfinite: rows with inf, NaN or a value outside the storage type are refused one by one ("quarantine"), or
    raise NonFiniteFeature naming the first of them ("stop").
    """
    limit = FLOAT16_MAX if storage == "float16" else float(torch.finfo(torch.float32).max)
    found = _encode(values, storage, statistics, length, limit)
    if found is not None:
        return Rows(found, {})
    refused = _unfit(values, storage, statistics, length, limit)
    if on_nonfinite == "stop":
        row, reason = next(iter(refused.items()))
        raise NonFiniteFeature(
            f"{field}, sample {names[row]}: {reason}",
            "use --storage float32 for large values, --compute float32 if the network overflows, or leave such samples "
            "out with --on-nonfinite quarantine",
        )
    good = [row for row in range(len(values)) if row not in refused]
    kept = _encode(values[good], storage, statistics, None if length is None else length[good], limit)
    assert kept is not None
    return Rows(kept, refused)


def _encode(
    values: Tensor,
    storage: str,
    statistics: tuple[Tensor, Tensor] | None,
    length: np.ndarray | None,
    limit: float,
) -> Encoded | None:
    """The rows as stored, with their summary; None if one of them is unfit."""
    if not len(values):
        shape = tuple(values.shape)
        scale = np.zeros(shape[:-1], np.float32) if storage == "int8" else None
        return Encoded(np.zeros(shape, storage), scale, length, Summary())
    real = None
    if length is not None and values.ndim == 3:
        real = torch.from_numpy(np.arange(values.shape[1]) < length[:, None]).to(values.device)
    scale_values = None
    if storage == "int8":
        assert statistics is not None
        try:
            stored, scale_values = quantise.encode_int8(values, *statistics)
        except NonFiniteFeature:
            return None
        decoded = quantise.decode_int8(stored, scale_values, *statistics)
    else:
        stored = values.to(getattr(torch, storage))
        decoded = stored.float()
    if real is not None:  # padding is not part of the statistics
        decoded, values = decoded[real], values[real]
    error = decoded - values if storage != "float32" else None
    numbers = [values.min(), values.max(), values.sum(dtype=torch.float64), _squares(values)]
    numbers += [_squares(error), error.abs().max()] if error is not None else [values.new_zeros(())] * 2
    smallest, largest, total, squares, error_squares, worst = torch.stack([n.double() for n in numbers]).tolist()
    if not (-limit <= smallest and largest <= limit and worst <= limit):  # also false for NaN
        return None
    summary = Summary(values.numel(), smallest, largest, total, squares, error_squares, worst)
    scale = None if scale_values is None else scale_values.cpu().numpy().astype(np.float32)
    return Encoded(stored.cpu().numpy(), scale, length, summary)


def _squares(values: Tensor) -> Tensor:
    """In float64: in float32 the square of 1e20 is inf."""
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm.square()


def _unfit(
    values: Tensor,
    storage: str,
    statistics: tuple[Tensor, Tensor] | None,
    length: np.ndarray | None,
    limit: float,
) -> dict[int, str]:
    """The rows that cannot be stored, and why."""
    if length is not None and values.ndim == 3 and storage != "int8":
        past = torch.from_numpy(np.arange(values.shape[1]) >= length[:, None]).to(values.device)
        values = values.masked_fill(past[..., None], 0)
    flat = values.reshape(len(values), -1)
    fit = (torch.isfinite(flat) & (flat.abs() <= limit)).all(dim=1)
    if storage == "int8":
        assert statistics is not None
        fit &= _fits_int8(values, *statistics)
    reasons = {}
    for row in (~fit).nonzero().flatten().tolist():
        bad = int((~torch.isfinite(flat[row])).sum())
        largest = "" if bad else f"{float(flat[row].abs().max()):g}"
        if bad:
            reasons[row] = f"{bad} values are inf or NaN"
        elif storage == "int8":
            reasons[row] = f"max |x| = {largest} cannot be standardised within float32 (int8)"
        else:
            reasons[row] = f"max |x| = {largest} > {limit:g} ({storage})"
    return reasons


def _fits_int8(values: Tensor, mean_D: Tensor, std_D: Tensor) -> Tensor:
    """Of each row, whether it and what int8 makes of it are finite."""
    scale = ((values.float() - mean_D) / std_D).abs().amax(-1)
    finite = torch.isfinite(scale)
    kept = torch.where(finite[..., None], values, mean_D)
    decoded = quantise.decode_int8(*quantise.encode_int8(kept, mean_D, std_D), mean_D, std_D)
    finite &= torch.isfinite(decoded - kept).all(-1)
    return finite.reshape(len(values), -1).all(dim=1)
