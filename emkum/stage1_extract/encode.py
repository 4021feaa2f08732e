"""Network outputs -> stored numbers, rounded on the device, with range and error measured there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from emkum.errors import NonFiniteFeature
from emkum.models import quantise
from emkum.shards.codec import FLOAT16_MAX, Encoded, Summary


def encode_batch(
    values: Tensor,
    field: str,
    storage: str,
    names: Sequence[str],
    statistics: tuple[Tensor, Tensor] | None = None,
    length: np.ndarray | None = None,
) -> Encoded:
    """float32 [N, ...] on any device -> rows for the writer.

    names: what to call each row in an error. statistics: channel mean and std on the device, for int8.
    Raises NonFiniteFeature naming the first row with inf, NaN, or a value outside the storage type.
    """
    whole = values
    real = None
    if length is not None and values.ndim == 3:
        real = torch.from_numpy(np.arange(values.shape[1]) < length[:, None]).to(values.device)
    limit = FLOAT16_MAX if storage == "float16" else float(torch.finfo(torch.float32).max)
    scale = None
    if storage == "int8":
        if not torch.isfinite(values).all():
            _refuse(whole, field, storage, names, limit)
        assert statistics is not None
        stored, scale = quantise.encode_int8(values, *statistics)
        decoded = quantise.decode_int8(stored, scale, *statistics)
    else:
        stored = values.to(getattr(torch, storage))
        decoded = stored.float()
    if real is not None:  # padding is not part of the statistics
        decoded, values = decoded[real], values[real]
    error = decoded - values if storage != "float32" else None
    numbers = [values.min(), values.max(), values.sum(dtype=torch.float64), _squares(values)]
    numbers += [_squares(error), error.abs().max()] if error is not None else [torch.zeros(())] * 2
    smallest, largest, total, squares, error_squares, worst = torch.stack([n.double().cpu() for n in numbers]).tolist()
    if not (-limit <= smallest and largest <= limit):  # also false for NaN
        _refuse(whole, field, storage, names, limit)
    summary = Summary(values.numel(), smallest, largest, total, squares, error_squares, worst)
    return Encoded(
        stored.cpu().numpy(), None if scale is None else scale.cpu().numpy().astype(np.float32), length, summary
    )


def _squares(values: Tensor) -> Tensor:
    flat = values.reshape(-1)
    return torch.dot(flat, flat)


def _refuse(values: Tensor, field: str, storage: str, names: Sequence[str], limit: float) -> None:
    flat = values.reshape(len(values), -1)
    good = (torch.isfinite(flat) & (flat.abs() <= limit)).all(dim=1)
    row = int((~good).nonzero()[0])
    finite = flat[row][torch.isfinite(flat[row])]
    worst = float(finite.abs().max()) if len(finite) else float("nan")
    bad = int((~torch.isfinite(flat[row])).sum())
    what = f"{bad} values are inf or NaN" if bad else f"max |x| = {worst:g} > {limit:g} ({storage})"
    raise NonFiniteFeature(
        f"{field}, sample {names[row]}: {what}",
        "use --storage float32 for large values, or --compute float32 if the network overflows",
    )
