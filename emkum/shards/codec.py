"""Float numbers <-> stored numbers, in numpy, with the error measured (docs/format.md, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FLOAT16_MAX = 65504.0
INT8_LEVELS = 127


@dataclass(frozen=True)
class Summary:
    """Sums over encoded numbers, from which a receipt's statistics and error are made. Adds up with `+`."""

    count: int = 0
    minimum: float = float("inf")
    maximum: float = float("-inf")
    total: float = 0.0
    squares: float = 0.0  # sum of value^2
    error_squares: float = 0.0  # sum of (decoded - value)^2
    max_abs_error: float = 0.0

    def __add__(self, other: Summary) -> Summary:
        return Summary(
            self.count + other.count,
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
            self.total + other.total,
            self.squares + other.squares,
            self.error_squares + other.error_squares,
            max(self.max_abs_error, other.max_abs_error),
        )

    @property
    def relative_l2(self) -> float:
        """|decoded - value| / |value| over everything summed; 0 for nothing or all zeros."""
        return (self.error_squares / self.squares) ** 0.5 if self.squares > 0 else 0.0


@dataclass(frozen=True)
class Encoded:
    """Rows as they are stored: what quantisers hand to the writer.

    values: [N, *row_shape] of the storage type. scale: float32 [N, *row_shape[:-1]] for int8, else None.
    length: int32 [N] for text fields, else None. classes: int32 [N, K] for the K largest logits, else None.
    """

    values: np.ndarray
    scale: np.ndarray | None
    length: np.ndarray | None
    summary: Summary
    classes: np.ndarray | None = None


def encode(
    values: np.ndarray,
    storage: str,
    mean: np.ndarray | None = None,
    std: np.ndarray | None = None,
    length: np.ndarray | None = None,
) -> Encoded:
    """Encode float32 rows [N, ...] for `storage`: float32 as it is, float16 rounded, int8 per token.

    length: int32 [N] for text; of rows [N, position, channel] the positions from it on are not measured.
    Raises ValueError for inf, NaN or a value outside the storage type; callers name the row and the field.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError("values are not finite")
    scale: np.ndarray | None = None
    decoded: np.ndarray | None = None
    if storage == "float32":
        stored = values
    elif storage == "float16":
        if values.size and float(np.abs(values).max()) > FLOAT16_MAX:
            raise ValueError(f"max |x| = {float(np.abs(values).max()):g} > {FLOAT16_MAX:g} (float16)")
        stored = values.astype(np.float16)
        decoded = stored.astype(np.float32)
    elif storage == "int8":
        assert mean is not None
        assert std is not None
        stored, scale = encode_int8(values, mean, std)
        decoded = decode_int8(stored, scale, mean, std)
    else:
        raise ValueError(f"unknown storage {storage!r}")
    if length is not None and values.ndim == 3:  # padding is not part of the statistics
        real = np.arange(values.shape[1]) < length[:, None]
        values, decoded = values[real], None if decoded is None else decoded[real]
    return Encoded(stored, scale, length, summarise(values, decoded))


def encode_int8(values: np.ndarray, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 per token after standardising each channel: [..., D] -> int8 [..., D], scale float32 [...].

    z = (value - mean) / std; scale = max|z| / 127 (1 where all z are 0); stored = round_half_even(z / scale).
    """
    z = ((values - mean) / std).astype(np.float32)
    scale = np.abs(z).max(axis=-1) / np.float32(INT8_LEVELS)
    scale = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
    stored = np.clip(np.rint(z / scale[..., None]), -INT8_LEVELS, INT8_LEVELS).astype(np.int8)
    return stored, scale


def decode_int8(stored: np.ndarray, scale: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """value = (stored * scale) * std + mean, float32."""
    value = stored.astype(np.float32)
    value *= scale[..., None]
    value *= std
    value += mean
    return value


def summarise(values: np.ndarray, decoded: np.ndarray | None = None) -> Summary:
    """Statistics of float32 values, and of the error of `decoded` if it is given."""
    if values.size == 0:
        return Summary()
    wide = values.astype(np.float64)
    error_squares, max_abs_error = 0.0, 0.0
    if decoded is not None:
        difference = decoded.astype(np.float64) - wide
        error_squares, max_abs_error = float((difference**2).sum()), float(np.abs(difference).max())
    return Summary(
        values.size,
        float(wide.min()),
        float(wide.max()),
        float(wide.sum()),
        float((wide**2).sum()),
        error_squares,
        max_abs_error,
    )
