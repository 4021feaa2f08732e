"""Network outputs -> stored numbers, rounded on the device, with range and error measured there.

N rows, H height, W width, C colour, K of the logits kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Output:
    """What a network says of a batch, and how its field stores that.

    values: float32 [N, ...] on any device. names: what to call each row in an error. statistics: channel mean and std
    on the device, for int8. length: valid positions of each text. classes: int32 [N, K], beside the K largest logits.
    """

    field: str
    values: Tensor
    storage: str
    names: Sequence[str]
    statistics: tuple[Tensor, Tensor] | None = None
    length: np.ndarray | None = None
    classes: Tensor | None = None

    @property
    def limit(self) -> float:
        """The largest |x| that the storage holds."""
        return FLOAT16_MAX if self.storage == "float16" else float(torch.finfo(torch.float32).max)


def encode_outputs(outputs: Sequence[Output], on_nonfinite: str = "stop") -> Callable[[], dict[str, Rows]]:
    """Queues rounding and measuring on the device; the call of what is returned waits for it, once for all outputs.

    on_nonfinite: rows with inf, NaN or a value outside the storage type are refused one by one ("quarantine"), or
    that call raises NonFiniteFeature naming the first of them ("stop").
    """
    rounded = [_rounded(output) for output in outputs]
    numbers = torch.stack([found.numbers for found in rounded]) if rounded else torch.empty(0)
    parts = ((found.stored, found.scale, output.classes) for found, output in zip(rounded, outputs, strict=True))
    on_host = [_to_host(numbers), *(_to_host(tensor) for of_one in parts for tensor in of_one)]
    copied = _mark(numbers.device)

    def wait() -> dict[str, Rows]:
        if copied is not None:
            copied.synchronize()
        arrays = [None if tensor is None else tensor.numpy() for tensor in on_host]
        assert arrays[0] is not None
        return {
            output.field: _rows(output, on_nonfinite, arrays[0][i].tolist(), *arrays[3 * i + 1 : 3 * i + 4])
            for i, output in enumerate(outputs)
        }

    return wait


def encode_crops(crops_NHWC: np.ndarray) -> Rows:
    """uint8 crops, which are stored as they are."""
    if not len(crops_NHWC):
        return Rows(Encoded(crops_NHWC, None, None, Summary()), {})
    smallest, largest, total = crops_NHWC.min(), crops_NHWC.max(), crops_NHWC.sum(dtype=np.uint64)
    summary = Summary(crops_NHWC.size, float(smallest), float(largest), float(total))
    return Rows(Encoded(crops_NHWC, None, None, summary), {})


def host_buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory on the host that `device` copies to and from while both go on working."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")


def stacked_crops(crops: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """uint8 [N, H, W, 3] on the host, ready to be copied to `device` without waiting."""
    crops_NHWC = host_buffer((len(crops), *crops[0].shape), torch.uint8, device)
    np.stack(crops, out=crops_NHWC.numpy())
    return crops_NHWC


def for_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the host, ready to be copied to `device` without waiting."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


# --- on the device -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rounded:
    """All on the device. numbers: float64 [6], what a Summary holds but for the count; NaN among them if unfit."""

    stored: Tensor
    scale: Tensor | None
    numbers: Tensor


def _rounded(output: Output) -> _Rounded:
    values, storage = output.values, output.storage
    scale = None
    if storage == "int8":
        assert output.statistics is not None
        stored, scale = quantise.quantised(values, *output.statistics)
        decoded = quantise.decode_int8(stored, scale, *output.statistics)
    else:
        stored = values.to(getattr(torch, storage))
        decoded = stored.float()
    if not len(values):
        return _Rounded(stored, scale, torch.zeros(6, dtype=torch.float64, device=values.device))
    if output.length is not None and values.ndim == 3:  # padding is not part of the statistics
        real = np.flatnonzero(np.arange(values.shape[1]) < output.length[:, None])
        places = for_device(real, values.device).to(values.device, non_blocking=True)
        decoded, values = (tensor.flatten(0, 1).index_select(0, places) for tensor in (decoded, values))
    numbers = [values.min(), values.max(), values.sum(dtype=torch.float64), _squares(values)]
    if storage == "float32":
        numbers += [values.new_zeros(())] * 2
    else:
        error = decoded - values
        numbers += [_squares(error), error.abs().max()]
    return _Rounded(stored, scale, torch.stack([number.double() for number in numbers]))


def _squares(values: Tensor) -> Tensor:
    """In float64: in float32 the square of 1e20 is inf."""
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm.square()


def _to_host(tensor: Tensor | None) -> Tensor | None:
    """The tensor in memory of the host, there once what is queued on its device is done."""
    if tensor is None or tensor.device.type == "cpu":
        return tensor
    return host_buffer(tensor.shape, tensor.dtype, tensor.device).copy_(tensor, non_blocking=True)


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """An event after everything queued so far; None on a CPU, which queues nothing."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


# --- on the host -------------------------------------------------------------------------------------------


def _rows(
    output: Output,
    on_nonfinite: str,
    numbers: Sequence[float],
    stored: np.ndarray | None,
    scale: np.ndarray | None,
    classes: np.ndarray | None,
) -> Rows:
    assert stored is not None
    smallest, largest, total, squares, error_squares, worst = numbers
    limit = output.limit
    if not len(output.values):
        return Rows(Encoded(stored, scale, output.length, Summary(), classes), {})
    if -limit <= smallest and largest <= limit and worst <= limit:  # false for NaN
        count = output.values.numel()
        if output.length is not None and output.values.ndim == 3:
            count = int(output.length.sum()) * output.values.shape[-1]
        summary = Summary(count, smallest, largest, total, squares, error_squares, worst)
        return Rows(Encoded(stored, scale, output.length, summary, classes), {})
    refused = _unfit(output)
    if on_nonfinite == "stop":
        row, reason = next(iter(refused.items()))
        raise NonFiniteFeature(
            f"{output.field}, sample {output.names[row]}: {reason}",
            "use --storage float32 for large values, --compute float32 if the network overflows, or leave such samples "
            "out with --on-nonfinite quarantine",
        )
    good = [row for row in range(len(output.values)) if row not in refused]
    kept = replace(
        output,
        values=output.values[good],
        names=[output.names[row] for row in good],
        length=None if output.length is None else output.length[good],
        classes=None if output.classes is None else output.classes[good],
    )
    return Rows(encode_outputs([kept])()[output.field].encoded, refused)


def _unfit(output: Output) -> dict[int, str]:
    """The rows that cannot be stored, and why."""
    values, storage, length, limit = output.values, output.storage, output.length, output.limit
    if length is not None and values.ndim == 3:
        past = torch.from_numpy(np.arange(values.shape[1]) >= length[:, None]).to(values.device)
        values = values.masked_fill(past[..., None], 0)
    flat = values.reshape(len(values), -1)
    fit = (torch.isfinite(flat) & (flat.abs() <= limit)).all(dim=1)
    if storage == "int8":
        assert output.statistics is not None
        fit &= _fits_int8(values, *output.statistics)
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
