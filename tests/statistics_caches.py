"""Small caches for tests of statistics, and their vectors read row by row."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from emkum.shards.codec import encode
from emkum.shards.fingerprint import Fingerprint
from emkum.shards.layout import FieldSpec
from emkum.shards.reader import Cache
from emkum.shards.statistics import duplicates, vectors
from emkum.shards.views import ViewPolicy
from emkum.shards.writer import CacheWriter
from tests.tiny_cache import _tar, make_cache

CLS = "teacher/tinyvit/image/cls"
LAYERS = "teacher/tinyvit/image/layers"
TEXT = "teacher/tinybert/text/layers"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 pictures in blocks of 16, two views, two rows quarantined."""
    path = tmp_path_factory.mktemp("statistics") / "cache"
    make_cache(path, pictures=72, views=2, quarantined=(3, 20))
    return path


@pytest.fixture
def own(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "own"))


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    yield
    vectors.close_all()
    duplicates.forget_tiles()


def pooled_cache(path: Path, values: np.ndarray, rows_per_block: int = 16, kind: str = "pooled") -> Path:
    """A cache whose only field, CLS, holds these float32 rows [N, ...]."""
    writer = CacheWriter(path, rows_per_block)
    segment = writer.append_segment("train", ViewPolicy(crop=(0.9, 1.0), count=1), [_tar("train", len(values), 1)])
    spec = FieldSpec(CLS, kind, "float32", values.shape[1:])  # type: ignore[arg-type]
    writer.declare_field(spec, Fingerprint(kind, "float32", spec.row_shape), {})
    writer.grow_field(spec, 1)
    for block in segment.image.blocks(rows_per_block):
        first, count = segment.image.block_rows(block, rows_per_block)
        with writer.block(spec, segment, block, 0) as target:
            target.append(encode(values[first : first + count], "float32"))
            target.commit()
    return path


def by_rows(cache: Cache, name: str, split: str = "train") -> np.ndarray:
    """float64 [N, D]: every vector of a field, read row by row."""
    field, found = cache.field(name), []
    for view in range(field.num_views):
        for row in field.rows(split, view):
            value = field.values(np.array([row]), view)[0]
            if field.spec.is_ragged:
                value = value[: int(field.lengths(np.array([row]))[0])]
            found.append(value.reshape(-1, field.row_shape[-1]))
    return np.concatenate(found).astype(np.float64)


def clusters(count: int, centres: int, width: int = 8, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    middle = random.normal(size=(centres, width))
    return (middle[random.integers(centres, size=count)] + 0.01 * random.normal(size=(count, width))).astype(np.float32)
