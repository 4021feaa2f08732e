"""Names, shapes and types of everything on disk (docs/format.md, sections 2 to 5)."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from emkum.errors import UsageError

FORMAT = 1
DEFAULT_ROWS_PER_BLOCK = 1024
MAX_ROWS = 1 << 40  # of a row space; more is a damaged record
MAX_ROWS_PER_BLOCK = 1 << 16
MAX_ROW_BYTES = 1 << 31
MAX_VIEWS = 10_000
TEXT_TILE = 16  # positions (words, or frames of sound) in one inner chunk of a ragged field
RECORDS = "_emkum"
ABSENT = 2**64 - 1  # offset and length of an absent chunk in a shard's index
CROPS = re.compile(r"image/crops-(?P<size>[0-9]+)")  # the name of a field of crops, their side in pixels
PAIRS = re.compile(r"teacher/[^/]+/pair/[^/]+")  # the name of a field of captions with their pictures
_IDS = re.compile(r"text/([^/]+)/ids")

Space = Literal["image", "text", "audio"]
SPACES: tuple[Space, ...] = ("image", "text", "audio")
Kind = Literal[
    "tokens",
    "crops",
    "boxes",
    "pooled",
    "top_logits",
    "ids",
    "ragged",
    "text_pooled",
    "audio_ragged",
    "audio_pooled",
]

KIND_SPACE: dict[Kind, Space] = {
    "tokens": "image",
    "crops": "image",
    "boxes": "image",
    "pooled": "image",
    "top_logits": "image",
    "ids": "text",
    "ragged": "text",
    "text_pooled": "text",
    "audio_ragged": "audio",
    "audio_pooled": "audio",
}
RAGGED_KINDS = ("ragged", "audio_ragged")
SHARDED_KINDS = ("tokens", "crops", *RAGGED_KINDS)
_AXES: dict[Kind, tuple[str, ...]] = {
    "tokens": ("token", "channel"),
    "crops": ("y", "x", "rgb"),
    "boxes": ("parameter",),
    "pooled": ("channel",),
    "top_logits": ("logit",),
    "ids": ("position",),
    "ragged": ("position", "channel"),
    "text_pooled": ("channel",),
    "audio_ragged": ("position", "channel"),
    "audio_pooled": ("channel",),
}
STORAGES = ("float16", "float32", "int8")
_DTYPES = (*STORAGES, "uint8", "int32")


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array of a field. `row_shape` is what one row of one view holds; () for a scalar."""

    name: str
    dtype: str
    row_shape: tuple[int, ...]
    axes: tuple[str, ...]
    inner: tuple[int, ...] | None = None  # inner chunk of one row; None: the array is not sharded
    per_row: bool = True  # False: mean and std, one object for the whole field

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.row_shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def inner_bytes(self) -> int:
        assert self.inner is not None
        return int(np.prod(self.inner, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def tiles(self) -> int:
        """Inner chunks in one row (1 but for ragged fields)."""
        return 1 if self.inner is None else self.row_shape[0] // self.inner[0] if self.row_shape else 1


@dataclass(frozen=True)
class FieldSpec:
    """A field's shape and storage; with `rows_per_block` it fixes every byte offset."""

    name: str
    kind: Kind
    storage: str
    row_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.has_length and self.row_shape[0] % TEXT_TILE:
            raise ValueError(f"positions must be a multiple of {TEXT_TILE}, got {self.row_shape[0]}")
        if self.kind == "top_logits" and (self.row_shape[0] < 2 or self.storage not in ("float16", "float32")):
            raise ValueError(f"{self.row_shape[0]} numbers of {self.storage} are not the largest logits and the rest")

    @property
    def space(self) -> Space:
        return KIND_SPACE[self.kind]

    @property
    def has_views(self) -> bool:
        return self.space == "image"

    @property
    def sharded(self) -> bool:
        return self.kind in SHARDED_KINDS

    @property
    def is_ragged(self) -> bool:
        """Rows of [position, channel], each as long as its text or sound: tiles past the length are not stored."""
        return self.kind in RAGGED_KINDS

    @property
    def has_length(self) -> bool:
        return self.kind == "ids" or self.is_ragged

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """`values` first, then the siblings."""
        axes = _AXES[self.kind]
        inner: tuple[int, ...] | None = None
        if self.is_ragged:
            inner = (TEXT_TILE, *self.row_shape[1:])
        elif self.sharded:
            inner = self.row_shape
        found = [ArraySpec("values", self.storage, self.row_shape, axes, inner)]
        if self.has_length:
            found.append(ArraySpec("length", "int32", (), ()))
        if self.kind == "top_logits":
            found.append(ArraySpec("classes", "int32", (self.row_shape[0] - 1,), ("rank",)))
        if self.storage == "int8":
            channel = self.row_shape[-1:]
            found.append(ArraySpec("scale", "float32", self.row_shape[:-1], axes[:-1]))
            found.append(ArraySpec("mean", "float32", channel, ("channel",), per_row=False))
            found.append(ArraySpec("std", "float32", channel, ("channel",), per_row=False))
        return tuple(found)

    def array(self, name: str) -> ArraySpec:
        return next(array for array in self.arrays if array.name == name)

    def block_bytes(self, rows: int, rows_per_block: int, tiles_per_row: int | None = None) -> int:
        """Bytes on disk of one block of one view that holds `rows` rows, checksums, index and padding included.

        tiles_per_row: of ragged rows, how many tiles a row fills; None: all.
        """
        total = 0
        for array in self.arrays:
            if not array.per_row:
                continue
            if array.inner is None:
                total += rows_per_block * array.row_bytes + 4
            else:
                tiles = array.tiles if tiles_per_row is None else tiles_per_row
                total += rows * tiles * (array.inner_bytes + 4) + rows_per_block * array.tiles * 16 + 4
        return total


def field_from_record(record: dict[str, Any]) -> FieldSpec:
    """The field a record describes. Raises ValueError, KeyError or TypeError for what no field can be."""
    values = record["arrays"]["values"]
    name, kind, dtype, shape = record["field"], record["kind"], values["dtype"], tuple(values["row_shape"])
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9@._-]*(/[A-Za-z0-9][A-Za-z0-9@._-]*){1,7}", name):
        raise ValueError(f"{name!a} is no field name")
    if kind not in KIND_SPACE or dtype not in _DTYPES or not _AXES[kind] or len(shape) != len(_AXES[kind]):
        raise ValueError(f"no field is of kind {kind!a} with rows {shape!a} of {dtype!a}")
    if any(type(n) is not int or not 0 < n < MAX_ROW_BYTES for n in shape):
        raise ValueError(f"rows of shape {shape!a}")
    if math.prod(shape) * np.dtype(dtype).itemsize > MAX_ROW_BYTES:
        raise ValueError(f"rows of {math.prod(shape)} numbers")
    return FieldSpec(name, kind, dtype, shape)


def object_path(field: FieldSpec, array: ArraySpec, block: int, view: int) -> str:
    """Path of one object, from the root of the cache."""
    if not array.per_row:
        return f"{field.name}/{array.name}/c.0"
    indices = [block] + ([view] if field.has_views else []) + [0] * len(array.row_shape)
    return f"{field.name}/{array.name}/c." + ".".join(map(str, indices))


def field_record_path(field: str) -> str:
    return f"{RECORDS}/fields/{field}.json"


def ids_of_texts(fields: Iterable[str]) -> list[str]:
    """Of these fields, the token ids that a student's text side can start beside, sorted.

    Not those made by the tokenizer of a network of pairs, one that has fields of pairs here: it is no text encoder.
    """
    names = list(fields)
    of_pairs = {name.split("/")[1] for name in names if PAIRS.fullmatch(name)}
    return sorted(name for name in names if (found := _IDS.fullmatch(name)) and found[1] not in of_pairs)


def receipt_path(field: str, block: int, view: int) -> str:
    return f"{RECORDS}/receipts/{field}/{block:06d}-{view}.json"


def segment_dir(number: int) -> str:
    return f"{RECORDS}/segments/{number}"


def model_dir(name: str) -> str:
    return f"{RECORDS}/models/{name}"


def check_cache_name(name: str) -> str:
    """A network's name as a part of field names. Raises UsageError for what docs/format.md does not allow there."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name.endswith(".tmp"):
        raise UsageError(
            f"{name!r} cannot name a network in a cache",
            "use letters, digits, '.', '_' and '-', a letter or digit first: --name",
        )
    return name


# --- Zarr metadata -------------------------------------------------------------------------------------


def root_metadata(uuid: str, rows_per_block: int) -> dict[str, Any]:
    """The root's zarr.json. Its digest seals the cache: every JSON file of it carries one."""
    root = {"format": FORMAT, "uuid": uuid, "rows_per_block": rows_per_block}
    return group_metadata({"emkum": root | {"digest": hashlib.sha256(canonical_json(root)).hexdigest()}})


def group_metadata(attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}


def array_metadata(
    field: FieldSpec, array: ArraySpec, num_blocks: int, num_views: int, rows_per_block: int
) -> dict[str, Any]:
    """The zarr.json of one array whose space has `num_blocks` blocks (section 5)."""
    endian: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    if np.dtype(array.dtype).itemsize == 1:
        endian = {"name": "bytes"}
    checked: list[dict[str, Any]] = [endian, {"name": "crc32c"}]
    if not array.per_row:
        shape: list[int] = list(array.row_shape)
        chunk = list(array.row_shape)
        names = list(array.axes)
    else:
        view_axis = field.has_views
        shape = [num_blocks * rows_per_block, *([num_views] if view_axis else []), *array.row_shape]
        chunk = [rows_per_block, *([1] if view_axis else []), *array.row_shape]
        names = [f"{field.space}_row", *(["view"] if view_axis else []), *array.axes]
    codecs: list[dict[str, Any]] = checked
    if array.inner is not None:
        codecs = [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [1, *([1] if field.has_views else []), *array.inner],
                    "codecs": checked,
                    "index_codecs": [
                        {"name": "bytes", "configuration": {"endian": "little"}},
                        {"name": "crc32c"},
                    ],
                    "index_location": "end",
                },
            }
        ]
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": array.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN" if array.dtype.startswith("float") else 0,
        "codecs": codecs,
        "dimension_names": names,
        "attributes": {},
    }
    return metadata | {"attributes": {"emkum": {"digest": hashlib.sha256(canonical_json(metadata)).hexdigest()}}}


def canonical_json(value: object) -> bytes:
    """Sorted keys, no spaces, ASCII: the bytes that digests are taken of. Refuses NaN and Infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def pretty_json(value: object) -> bytes:
    """Sorted keys, for people: what is written to files."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")
