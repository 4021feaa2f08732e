"""Everything that can change one cached byte of a field, and the difference of two in words."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

from emkum.errors import FingerprintMismatch
from emkum.shards.layout import FORMAT, canonical_json


@dataclass(frozen=True)
class Fingerprint:
    """How a field is computed. None where a value does not apply to the field.

    Data and view policy are not here: the segments hold them. Device, library versions and batch size are not
    here either: they may change the last bits of an output, and are recorded beside the fingerprint.
    """

    kind: str
    storage: str
    row_shape: tuple[int, ...]
    format: int = FORMAT
    weights: str | None = None  # sha256 of the network's tensors
    family: str | None = None
    architecture: str | None = None  # sha256 of the network's shape: eps, activation and the like, which weights lack
    output: str | None = None  # what of the network is kept: "block 6", "final norm, CLS", ...
    compute: str | None = None  # type of the matrix products: float32, bfloat16, float16
    size: int | None = None  # pixels, side of the square crop
    mean: tuple[float, ...] | None = None  # pixel normalisation, RGB in 0..1
    std: tuple[float, ...] | None = None
    decoder: str | None = None  # rule from file bytes to uint8 crop
    tokenizer: str | None = None  # sha256 of tokenizer.json
    max_tokens: int | None = None
    statistics: str | None = None  # int8: sha256 of the channel mean and std
    max_seconds: float | None = None  # of a sound; longer ones are cut
    layers: dict[str, Any] | None = (
        None  # of a field `layers`: which layers, how normalised; None: as docs/format.md says
    )

    def to_json(self) -> dict[str, Any]:
        """Without the entries that came after emkum 0.1 where they say nothing: old digests stay as they are."""
        found = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}
        return {key: value for key, value in found.items() if key not in _LATER or value is not None}

    @property
    def digest(self) -> str:
        return digest_of(self.to_json())


_LATER = ("layers", "max_seconds")
_WORDS = {
    "weights": "weights with sha256",
    "architecture": "architecture with sha256",
    "output": "output",
    "compute": "compute type",
    "size": "crop size",
    "storage": "storage",
    "max_tokens": "text positions",
    "max_seconds": "seconds of a sound",
    "tokenizer": "tokenizer with sha256",
    "statistics": "channel statistics with sha256",
    "layers": "rule of layers",
}


def digest_of(fingerprint: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(fingerprint)).hexdigest()


def differing(cached: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """The keys whose values differ, in the order of the dataclass."""
    order = [field.name for field in dataclasses.fields(Fingerprint)]
    keys = order + sorted((set(cached) | set(asked)) - set(order))
    return [key for key in keys if cached.get(key) != asked.get(key)]


def differences(cached: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """One phrase per differing entry, both values shown, in the order of the dataclass."""
    return [
        f"{_WORDS.get(key, key)} {_short(cached.get(key))} in the cache, {_short(asked.get(key))} asked for"
        for key in differing(cached, asked)
    ]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {value[key]}" for key in sorted(value)) + "}"
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 and text.isalnum() else text


def require_same(field: str, cached: dict[str, Any], asked: Fingerprint, cache: str, way_out: str = "") -> None:
    """Raises FingerprintMismatch with the differences in words and the way out, the usual one unless it is given."""
    found = differences(cached, asked.to_json())
    if found:
        raise FingerprintMismatch(
            f"{cache} field {field} was computed differently: " + "; ".join(found),
            way_out
            or "repeat the settings of the cache (`emkum cache info --json` shows them), give another teacher another "
            "name with --name, or write to another folder with --cache",
        )
