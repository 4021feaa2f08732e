"""Statistics of whole fields: against plain float64 numpy, over every kind of field, and as a cache keeps them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

from emkum import cli
from emkum.errors import (
    CorruptCache,
    IdentityMismatch,
    IncompleteCache,
    MissingField,
    MissingStatistic,
    SchedulerUnreachable,
    StaleStatistic,
    StorageFailure,
    UsageError,
)
from emkum.shards import durable
from emkum.shards.codec import encode
from emkum.shards.digest import digest
from emkum.shards.fingerprint import Fingerprint, digest_of
from emkum.shards.layout import FieldSpec, pretty_json
from emkum.shards.ledger import with_digest
from emkum.shards.reader import Cache
from emkum.shards.repair import repair
from emkum.shards.statistics import channels, cluster, codebook, duplicates, pca, reading, vectors
from emkum.shards.statistics.compute import compute
from emkum.shards.statistics.kept import kept, load
from emkum.shards.statistics.passes import Threads
from emkum.shards.statistics.request import StatisticRequest
from emkum.shards.statistics.vectors import Source, Vectors, opened, vectors_of
from emkum.shards.store import LocalStore
from emkum.shards.verify import verify
from emkum.shards.views import ViewPolicy
from emkum.shards.writer import CacheWriter
from tests.faulty_os import MODES, FaultyOs
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


# --- the numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [CLS, LAYERS, TEXT, "image/tinyvit@2/tokens"])
@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_channels_are_those_of_all_vectors(
    tmp_path: Path, name: str, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "PIECE_BYTES", 3000)  # several pieces a block
    cache_path = tmp_path / "cache"
    make_cache(cache_path, storage=storage, views=2, quarantined=(3, 20), skipped_blocks=[("cls", 1), ("layers", 2)])
    cache = Cache.open(cache_path)
    wanted = by_rows(cache, name)
    found = compute(cache, StatisticRequest(name, "channels"))
    assert found.record["making"]["vectors"] == len(wanted)
    for array, value in (
        ("mean", wanted.mean(axis=0)),
        ("std", wanted.std(axis=0)),
        ("minimum", wanted.min(axis=0)),
        ("maximum", wanted.max(axis=0)),
    ):
        np.testing.assert_allclose(found.arrays[array], value, rtol=1e-9, atol=1e-12)


def test_patches_of_texts_have_nothing_at_position_0(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "cache", 16)
    segment = writer.append_segment("train", ViewPolicy(crop=(0.9, 1.0), count=1), [_tar("train", 20, 1)])
    spec = FieldSpec("teacher/t/text/patches", "ragged", "float32", (16, 4))
    writer.declare_field(spec, Fingerprint("ragged", "float32", (16, 4)), {})
    writer.grow_field(spec, 1)
    values = np.random.default_rng(0).normal(size=(20, 16, 4)).astype(np.float32)
    length = np.arange(20, dtype=np.int32) % 15 + 1
    values[np.arange(16) >= length[:, None]] = 0
    values[:, 0] = 0
    for block in segment.text.blocks(16):
        first, count = segment.text.block_rows(block, 16)
        with writer.block(spec, segment, block, 0) as target:
            part = slice(first, first + count)
            target.append(encode(values[part], "float32", length=length[part]))
            target.commit()
    real = np.concatenate([row[1:n] for row, n in zip(values, length, strict=True)]).astype(np.float64)
    found = compute(Cache.open(tmp_path / "cache"), StatisticRequest(spec.name, "channels"))
    assert found.record["making"]["vectors"] == len(real)
    np.testing.assert_allclose(found.arrays["mean"], real.mean(axis=0), rtol=1e-9, atol=1e-12)


def test_moments_far_from_zero_keep_their_digits() -> None:
    x = np.random.default_rng(0).normal(size=(5000, 3)) * 1e-3 + 1e4
    x32 = x.astype(np.float32)
    parts = [channels.moments(x32[i : i + 700]) for i in range(0, 5000, 700)]
    total = parts[0]
    for part in parts[1:]:
        total = channels.merge(total, part)
    np.testing.assert_allclose(total.mean_D, x32.astype(np.float64).mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(np.sqrt(total.squares_D / total.count), x32.astype(np.float64).std(axis=0), rtol=1e-9)


@pytest.mark.parametrize("name", [CLS, LAYERS, TEXT])
def test_pca_is_that_of_the_covariance(whole: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "PIECE_BYTES", 3000)
    monkeypatch.setattr(pca, "BATCH_BYTES", 1000)
    cache = Cache.open(whole)
    wanted = by_rows(cache, name)
    found = pca.principal_components(vectors_of(cache, name, "train"), 5, Threads(2))
    variance, directions = np.linalg.eigh(np.cov(wanted, rowvar=False))
    np.testing.assert_allclose(found.explained_variance_d, variance[::-1][:5], rtol=1e-8)
    np.testing.assert_allclose(found.total_variance, variance.sum(), rtol=1e-9)
    np.testing.assert_allclose(found.mean_D, wanted.mean(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.abs(found.components_dD @ directions[:, ::-1][:, :5]), np.eye(5), atol=1e-6)
    np.testing.assert_allclose(found.components_dD @ found.components_dD.T, np.eye(5), atol=1e-12)
    largest = np.abs(found.components_dD).argmax(axis=1)
    assert (found.components_dD[np.arange(5), largest] > 0).all()


def test_pca_far_from_zero_keeps_its_digits(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(300, 4)) * [4, 2, 1, 0.5] + 1e4
    cache = Cache.open(pooled_cache(tmp_path / "cache", x.astype(np.float32)))
    found = pca.principal_components(vectors_of(cache, CLS, "train"), 4, Threads(1))
    wanted = np.linalg.eigvalsh(np.cov(x.astype(np.float32).astype(np.float64), rowvar=False))[::-1]
    np.testing.assert_allclose(found.explained_variance_d, wanted, rtol=1e-9)


def kmeans_by_loops(x: np.ndarray, codes: np.ndarray, passes: int) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Spherical k-means from given codes, without restarts, float64. Moves `passes` times and counts once more."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    history = []
    for number in range(passes + 1):
        code, total = np.empty(len(x), int), 0.0
        for i, vector in enumerate(x):
            cosines = [float(vector @ c) for c in codes]
            code[i] = int(np.argmax(cosines))
            total += max(cosines)
        history.append(total / len(x))
        if number < passes:
            sums = [x[code == j].sum(axis=0) for j in range(len(codes))]
            codes = np.stack([s / np.linalg.norm(s) if s.any() else c for s, c in zip(sums, codes, strict=True)])
    return codes, np.bincount(code, minlength=len(codes)), history


@pytest.mark.parametrize("start", ["rows", "k-means++"])
@pytest.mark.parametrize("name", [CLS, TEXT])
def test_codebook_is_that_of_plain_loops(whole: Path, name: str, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "PIECE_BYTES", 3000)
    monkeypatch.setattr(codebook, "SCORE_BYTES", 200)
    monkeypatch.setattr(codebook, "CONVERGED", -1.0)  # never
    cache = Cache.open(whole)
    first: list[np.ndarray] = []
    real = codebook.assign
    monkeypatch.setattr(codebook, "assign", lambda x, n, codes: first.append(codes) or real(x, n, codes))
    found = codebook.make_codebook(
        vectors_of(cache, name, "train"),
        6,
        Threads(2),
        seed=3,
        start=start,
        iterations=4,  # type: ignore[arg-type]
    )
    codes, counts, history = kmeans_by_loops(by_rows(cache, name), first[0].astype(np.float64), 4)
    assert found.restarted == 0
    np.testing.assert_allclose(found.mean_cosine, history, rtol=1e-6)
    np.testing.assert_array_equal(found.counts_J, counts)
    np.testing.assert_allclose(found.codes_JD, codes, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.codes_JD, axis=1), 1, atol=1e-6)
    assert list(found.mean_cosine) == sorted(found.mean_cosine)


def clusters(count: int, centres: int, width: int = 8, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    middle = random.normal(size=(centres, width))
    return (middle[random.integers(centres, size=count)] + 0.01 * random.normal(size=(count, width))).astype(np.float32)


def test_codes_without_vectors_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = clusters(200, 6)
    cache = Cache.open(pooled_cache(tmp_path / "cache", x))
    monkeypatch.setattr(codebook, "spread", lambda sample, codes, random: np.repeat(sample[:1], codes, axis=0))
    found = codebook.make_codebook(vectors_of(cache, CLS, "train"), 6, Threads(1), iterations=20)
    assert found.usage == 1
    assert found.restarted >= 5
    assert found.mean_cosine[-1] > 0.999
    assert found.perplexity == pytest.approx(np.exp(-sum(p * np.log(p) for p in found.counts_J / 200)))


def test_fewer_different_vectors_than_codes_leaves_codes_unused(tmp_path: Path) -> None:
    x = np.repeat(np.eye(3, 8, dtype=np.float32), 20, axis=0)
    cache = Cache.open(pooled_cache(tmp_path / "cache", x))
    found = codebook.make_codebook(vectors_of(cache, CLS, "train"), 5, Threads(1))
    assert sorted(found.counts_J.tolist()) == [0, 0, 20, 20, 20]
    assert found.usage == 0.6
    assert found.perplexity == pytest.approx(3)
    assert found.mean_cosine[-1] == pytest.approx(1)
    assert np.isfinite(found.codes_JD).all()


def test_vectors_of_zeros_make_no_code(tmp_path: Path) -> None:
    x = clusters(60, 3)
    x[:40] = 0
    cache = Cache.open(pooled_cache(tmp_path / "cache", x))
    found = codebook.make_codebook(vectors_of(cache, CLS, "train"), 3, Threads(1))
    np.testing.assert_allclose(np.linalg.norm(found.codes_JD, axis=1), 1, atol=1e-6)
    nothing = Cache.open(pooled_cache(tmp_path / "zeros", np.zeros((20, 4), np.float32)))
    with pytest.raises(UsageError, match=f"all vectors drawn from {CLS} are zero"):
        codebook.make_codebook(vectors_of(nothing, CLS, "train"), 3, Threads(1))


def test_kmeans_plus_plus_finds_every_cluster() -> None:
    sample = codebook.unit(clusters(400, 12))
    found = codebook.spread(sample, 12, np.random.default_rng(0))
    assert ((found @ found.T - np.eye(12)) < 0.99).all()  # no two of one cluster
    again = codebook.spread(sample, 12, np.random.default_rng(0))
    np.testing.assert_array_equal(found, again)


def test_the_seed_decides_the_codebook(whole: Path) -> None:
    cache = Cache.open(whole)
    all_vectors = vectors_of(cache, CLS, "train")
    one, same, other = (
        codebook.make_codebook(all_vectors, 8, Threads(2), seed=seed, iterations=1).codes_JD for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_a_sample_of_many_tokens_comes_from_many_rows(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "PIECE_BYTES", 640)
    monkeypatch.setattr(vectors, "SAMPLED_ROWS", 30)
    for name in (LAYERS, TEXT, CLS):
        cache = Cache.open(whole)
        everything = {row.tobytes() for row in by_rows(cache, name).astype(np.float32)}
        drawn = vectors_of(cache, name, "train").draw(40, 0)
        assert drawn.shape == (40, cache.field(name).row_shape[-1])
        assert len({row.tobytes() for row in drawn}) == 40  # none twice
        assert {row.tobytes() for row in drawn} <= everything


# --- near-duplicates -----------------------------------------------------------------------------------


def groups_by_loops(x: np.ndarray, threshold: float) -> np.ndarray:
    """int64 [N]: the lowest index that a path of pairs with cos >= threshold leads to."""
    x = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    near, group = x @ x.T >= threshold - 1e-9, np.full(len(x), -1)
    for start in range(len(x)):
        stack = [start] if group[start] < 0 else []
        while stack:
            at = stack.pop()
            if group[at] < 0:
                group[at] = start
                stack += np.flatnonzero(near[at]).tolist()
    return group


def with_duplicates(count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 8))
    for _ in range(count // 2):  # chains among them
        a, b = random.integers(count, size=2)
        x[b] = x[a] * random.uniform(0.5, 2) + 0.1 * random.normal(size=8)
    x[1] = 2 * x[0] + 0.01  # neighbours
    return x.astype(np.float32)


@pytest.mark.parametrize("threshold", [0.9, 0.97, 0.995])
def test_duplicates_are_those_of_plain_loops(tmp_path: Path, threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "TILE_BYTES", 30 * 8 * 4)  # tiles of two blocks
    monkeypatch.setattr(duplicates, "SCORE_BYTES", 500)
    x = with_duplicates(150)
    cache = Cache.open(pooled_cache(tmp_path / "cache", x))
    told: list[tuple[int, int]] = []
    found = duplicates.near_duplicates(
        vectors_of(cache, CLS, "train"), threshold, Threads(2), lambda *both: told.append(both)
    )
    wanted = groups_by_loops(x, threshold)
    np.testing.assert_array_equal(found.group_R, wanted)
    assert len(found.sizes) > 5
    assert found.sizes.tolist() == sorted((n for n in np.bincount(wanted) if n > 1), reverse=True)
    assert told[-1] == (150 * 149 // 2, 150 * 149 // 2)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_pairs_at_the_threshold_are_decided_in_float64() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(400, 16)).astype(np.float32)
    y = (x + 0.4 * random.normal(size=x.shape)).astype(np.float32)
    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    cosine = (x64 * y64).sum(1) / np.sqrt((x64**2).sum(1) * (y64**2).sum(1))
    for threshold in np.sort(cosine)[[100, 200, 300]]:
        linked = duplicates.links(x, 0, y, 400, float(threshold) + 2e-9)
        pairs = {(min(a, b), max(a, b)) for a, b in linked.tolist()}
        assert {i for i in range(400) if (i, i + 400) in pairs} == set(np.flatnonzero(cosine > threshold).tolist())
    rounded_down = 0
    for i in range(400):
        one, other = x[i : i + 1], y[i : i + 1]
        rounded_down += bool(codebook.unit(one) @ codebook.unit(other).T < np.float32(cosine[i]))
        assert len(duplicates.links(one, 0, other, 1, float(cosine[i]))) == 1
    assert rounded_down > 20


def test_identical_rows_are_one_group_at_threshold_1_and_zeros_are_none(tmp_path: Path) -> None:
    x = with_duplicates(90, seed=1)
    x[10:50] = x[10]
    x[50:60] = 0
    cache = Cache.open(pooled_cache(tmp_path / "cache", x))
    found = duplicates.near_duplicates(vectors_of(cache, CLS, "train"), 1.0, Threads(1))
    assert found.sizes.tolist() == [40]
    assert (found.group_R[10:50] == 10).all()
    assert found.group_R[50:60].tolist() == list(range(50, 60))


def test_rows_that_are_not_there_have_no_group(own: Path) -> None:
    cache = Cache.open(own)
    made = compute(cache, StatisticRequest(CLS, "duplicates", split="train", threshold=0.9))
    found, rows = made.arrays["group"], cache.field(CLS).rows("train")
    assert made.record["making"]["vectors"] == len(rows)  # of two views the first
    assert len(found) == rows.max() + 1
    np.testing.assert_array_equal(np.flatnonzero(found >= 0), rows)
    assert found[[3, 20]].tolist() == [-1, -1]
    val = compute(cache, StatisticRequest(CLS, "duplicates", split="val", threshold=1.0)).arrays["group"]
    np.testing.assert_array_equal(np.flatnonzero(val >= 0), cache.field(CLS).rows("val"))
    np.testing.assert_array_equal(val[val >= 0], cache.field(CLS).rows("val"))


# --- workers, memory -----------------------------------------------------------------------------------


def test_any_number_of_workers_gives_the_same_numbers(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "PIECE_BYTES", 640)
    cache = Cache.open(whole)
    all_vectors = vectors_of(cache, LAYERS, "train")
    assert len(all_vectors.pieces) > 60
    one, many = (pca.principal_components(all_vectors, 3, Threads(n)) for n in (1, 5))
    np.testing.assert_array_equal(one.components_dD, many.components_dD)
    books = [codebook.make_codebook(all_vectors, 8, Threads(n), iterations=2) for n in (1, 5)]
    np.testing.assert_array_equal(books[0].codes_JD, books[1].codes_JD)
    assert books[0].mean_cosine == books[1].mean_cosine


def test_workers_of_a_dask_scheduler_give_the_same_numbers(own: Path) -> None:
    from distributed import LocalCluster

    cache = Cache.open(own)
    make: type = LocalCluster
    with (
        make(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50) as local,
        cluster.connected(local.scheduler_address) as engine,
    ):
        assert str(engine) == f"2 workers of {local.scheduler_address}, 2 threads"
        assert engine.workers == 2
        books = [
            codebook.make_codebook(vectors_of(cache, LAYERS, "train"), 8, one, iterations=2)
            for one in (Threads(1), engine)
        ]
        np.testing.assert_array_equal(books[0].codes_JD, books[1].codes_JD)
        groups = [
            duplicates.near_duplicates(vectors_of(cache, CLS, "train", True), 0.9, one) for one in (Threads(1), engine)
        ]
        np.testing.assert_array_equal(groups[0].group_R, groups[1].group_R)
        elsewhere = vectors_of(cache, CLS, "train")
        gone = Vectors(Source("/nowhere", *list(elsewhere.source.__dict__.values())[1:]), elsewhere.pieces, 16)
        with pytest.raises(UsageError, match="/nowhere holds no emkum cache"):
            channels.channel_moments(gone, engine)


def test_no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--scheduler 8786 cannot work"), cluster.connected("8786"):
        pass
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.3)
    address = "tcp://127.0.0.1:9"
    with (
        pytest.raises(SchedulerUnreachable, match=f"no Dask scheduler answers at {address}") as caught,
        cluster.connected(address),
    ):
        pass
    assert "leave --scheduler out: threads of this process" in caught.value.way_out


def test_a_worker_that_sees_another_cache_says_so(whole: Path, tmp_path: Path) -> None:
    source = vectors_of(Cache.open(whole), CLS, "train").source
    other = pooled_cache(tmp_path / "other", np.ones((4, 4), np.float32))
    with pytest.raises(IdentityMismatch, match="as a worker sees it is cache") as caught:
        opened(Source(str(other), source.uuid, source.field, source.fingerprint_digest))
    assert "workers must see the same folder at the same path" in caught.value.way_out


@pytest.mark.parametrize("what", ["channels", "pca", "codebook"])
def test_memory_does_not_grow_with_the_field(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields of 4 and 16 MB in pieces of 0.25 MB: the larger one takes no more memory."""
    monkeypatch.setattr(vectors, "PIECE_BYTES", 1 << 18)
    for module in (channels, pca):
        monkeypatch.setattr(module, "BATCH_BYTES", 1 << 18)
    monkeypatch.setattr(codebook, "SCORE_BYTES", 1 << 18)
    random = np.random.default_rng(0)
    peaks = []
    for rows in (128, 512):
        path = pooled_cache(
            tmp_path / str(rows), random.normal(size=(rows, 128, 64)).astype(np.float32), 64, kind="tokens"
        )
        cache = Cache.open(path, verify="never")
        request = StatisticRequest(CLS, what, components=8, codes=16, iterations=2)  # type: ignore[arg-type]
        tracemalloc.start()
        compute(cache, request, Threads(2))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 8 << 20
    assert peaks[1] < 1.3 * peaks[0] + (1 << 20)


def test_memory_of_duplicates_does_not_grow_with_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "TILE_BYTES", 1 << 17)
    monkeypatch.setattr(duplicates, "SCORE_BYTES", 1 << 19)
    x = np.ones((6000, 16), np.float32)  # 18 million pairs, 290 MB of them
    cache = Cache.open(pooled_cache(tmp_path / "cache", x, 1024))
    tracemalloc.start()
    found = duplicates.near_duplicates(vectors_of(cache, CLS, "train"), 0.95, Threads(1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.sizes.tolist() == [6000]
    assert peak < 24 << 20


# --- what is kept --------------------------------------------------------------------------------------


def test_what_is_kept_is_plain_zarr_and_read_back(own: Path) -> None:
    cache = Cache.open(own)
    said: list[str] = []
    made = compute(cache, StatisticRequest(CLS, "pca", components=3), Threads(2), said.append)
    assert said == [f"{CLS}/pca-3: 140 vectors of 16, with 2 threads"]
    found = reading.pca(Cache.open(own), CLS, 3)
    for name, values in made.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], values)
        array = zarr.open_array(own / "statistics" / CLS / "pca-3" / name, mode="r")
        np.testing.assert_array_equal(array[...], values)
    assert array.metadata.dimension_names == ("component",) if name == "explained_variance" else ("channel",)
    assert found.record["fingerprint"] == made.request.fingerprint(cache)
    assert found.record["making"]["rows"] == 140
    assert not found.arrays["mean"].flags.writeable


def test_the_same_again_does_nothing(own: Path) -> None:
    request, said = StatisticRequest(CLS, "codebook", codes=4), []  # type: ignore[var-annotated]
    compute(Cache.open(own), request)
    before = {path: path.stat().st_mtime_ns for path in (own / "statistics").rglob("*")}
    again = compute(Cache.open(own), request, None, said.append)
    assert said == [f"{CLS}/codebook-4 is kept already, of the same 10 blocks: nothing to do"]
    assert {path: path.stat().st_mtime_ns for path in (own / "statistics").rglob("*")} == before
    assert again.results["usage"] == 1
    assert len(again.results["mean_cosine_by_pass"]) > 1
    assert again.results["mean_cosine"] == again.results["mean_cosine_by_pass"][-1]


def test_a_field_that_has_grown_makes_the_statistic_stale(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    make_cache(path, pictures=72, views=2, quarantined=(3, 20), skipped_blocks=[("cls", 2)])
    said: list[str] = []
    request = StatisticRequest(CLS, "channels")
    old = compute(Cache.open(path), request, None, said.append)
    assert said[0] == f"{CLS} lacks 2 blocks of train: the statistic is of what is committed"
    for name in (f"{CLS}/values", f"_emkum/receipts/{CLS}"):
        shutil.copytree(whole / name, path / name, dirs_exist_ok=True)
    cache = Cache.open(path)
    with pytest.raises(StaleStatistic) as caught:
        reading.channels(cache, CLS)
    assert caught.value.what == (
        f"{path} keeps a {CLS}/channels that is of 8 blocks of the split; 10 are committed now"
    )
    assert caught.value.way_out == f"emkum cache stats {path} --field {CLS} --what channels"
    assert [one.stale for one in kept(cache)] == ["is of 8 blocks of the split; 10 are committed now"]
    said.clear()
    new = compute(cache, request, None, said.append)
    assert said[0].endswith("that is kept is of 8 blocks of the split; 10 are committed now: it is made anew")
    assert new.record["making"]["vectors"] > old.record["making"]["vectors"]
    np.testing.assert_allclose(reading.channels(cache, CLS).arrays["mean"], by_rows(cache, CLS).mean(0), rtol=1e-9)


def test_other_contents_and_other_settings_make_it_stale(own: Path, tmp_path: Path) -> None:
    request = StatisticRequest(CLS, "channels")
    compute(Cache.open(own), request)
    make_cache(tmp_path / "seed", pictures=72, views=2, quarantined=(3, 20), seed=5)
    make_cache(tmp_path / "kind", pictures=72, views=2, quarantined=(3, 20), storage="float16")
    for name, stale in (
        ("seed", "is of a field made otherwise: its fingerprint was"),  # other weights
        ("kind", "is of a field made otherwise: its fingerprint was"),
    ):
        shutil.copytree(own / "statistics", tmp_path / name / "statistics")
        with pytest.raises(StaleStatistic, match=stale):
            load(Cache.open(tmp_path / name), request)


def test_blocks_made_again_make_it_stale(own: Path, tmp_path: Path) -> None:
    pooled_cache(tmp_path / "a", np.ones((40, 4), np.float32))
    compute(Cache.open(tmp_path / "a"), StatisticRequest(CLS, "channels"))
    pooled_cache(tmp_path / "b", np.full((40, 4), 2, np.float32))
    shutil.copytree(tmp_path / "a" / "statistics", tmp_path / "b" / "statistics")
    with pytest.raises(StaleStatistic, match="is of other contents: the 3 blocks of the split were made again since"):
        reading.channels(Cache.open(tmp_path / "b"), CLS)


def test_a_newer_method_makes_it_stale(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emkum.shards.statistics import request

    compute(Cache.open(own), StatisticRequest(CLS, "channels"))
    monkeypatch.setitem(request.METHODS, "channels", 2)
    with pytest.raises(StaleStatistic, match="was computed by method 1; this emkum has method 2"):
        reading.channels(Cache.open(own), CLS)


def test_rows_of_another_split_do_not_matter(own: Path) -> None:
    request = StatisticRequest(CLS, "channels")
    before = request.fingerprint(Cache.open(own))
    shutil.rmtree(own / "_emkum/receipts" / CLS / "none", ignore_errors=True)
    val = next(s for s in Cache.open(own).segments if s.split == "val").image.blocks(16)
    for block in val:
        (own / "_emkum/receipts" / CLS / f"{block:06d}-0.json").unlink()
    assert request.fingerprint(Cache.open(own)) == before


def test_what_is_missing_names_the_command(own: Path) -> None:
    cache = Cache.open(own)
    for call, command in (
        (lambda: reading.channels(cache, CLS, "val"), "--what channels --split val"),
        (lambda: reading.pca(cache, CLS), "--what pca"),
        (lambda: reading.codebook(cache, CLS, 8192, 7), "--what codebook --codes 8192 --seed 7"),
        (lambda: reading.duplicates(cache, CLS, 0.98), "--what duplicates --threshold 0.98"),
    ):
        with pytest.raises(MissingStatistic) as caught:
            call()
        assert caught.value.way_out == f"make it: emkum cache stats {own} --field {CLS} {command}"
    with pytest.raises(MissingField):
        reading.channels(cache, "teacher/none/image/cls")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"what": "channels"}, "channels"),
        ({"what": "pca", "components": 8}, "pca-8"),
        ({"what": "codebook"}, "codebook-1024"),
        (
            {"what": "codebook", "codes": 8, "seed": 2, "start": "rows", "iterations": 3},
            "codebook-8-seed-2-start-rows-iterations-3",
        ),
        ({"what": "duplicates", "threshold": 0.9, "split": "val"}, "duplicates-0.9@val"),
    ],
)
def test_every_setting_has_a_name_of_its_own(changes: dict, name: str) -> None:
    request = StatisticRequest(CLS, **changes)
    assert request.name == f"{CLS}/{name}"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"what": "median"}, "--what median cannot work"),
        ({"what": "pca", "components": 0}, "--components 0 cannot work"),
        ({"what": "codebook", "codes": 1}, "--codes 1 cannot work"),
        ({"what": "codebook", "seed": -1}, "--seed -1 cannot work"),
        ({"what": "codebook", "start": "random"}, "--start random cannot work"),
        ({"what": "codebook", "iterations": 0}, "--iterations 0 cannot work"),
        ({"what": "duplicates", "threshold": 1.5}, "--threshold 1.5 cannot work"),
    ],
)
def test_settings_that_cannot_work(changes: dict, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        StatisticRequest(CLS, **changes)
    assert caught.value.what == text


def test_what_no_statistic_can_be_taken_of(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache.open(own)
    for request, text in (
        (StatisticRequest("text/tinybert/ids", "channels"), "text/tinybert/ids holds ids, of which no statistic"),
        (StatisticRequest(CLS, "channels", split="test"), "has no split 'test'; it has: train, val"),
        (
            StatisticRequest(LAYERS, "duplicates"),
            f"{LAYERS} holds tokens; near-duplicates are looked for in a field of",
        ),
        (StatisticRequest(CLS, "pca", components=17), "--components 17: .* have 16 components at most"),
        (StatisticRequest(CLS, "codebook", codes=141), "--codes 141: .* has 140 vectors in this split"),
    ):
        with pytest.raises(UsageError, match=text):
            compute(cache, request)
    monkeypatch.setattr(pca, "MAX_TOKEN_WIDTH", 15)
    compute(cache, StatisticRequest(CLS, "pca", components=2))
    with pytest.raises(
        UsageError, match=f"{LAYERS} has 16 channels; the covariance is taken of 15 at most where every"
    ):
        compute(cache, StatisticRequest(LAYERS, "pca", components=2))
    make_cache(own.parent / "empty", skipped_blocks=[("cls", block) for block in range(9)])
    with pytest.raises(IncompleteCache, match=f"field {CLS} has no committed row of split train"):
        compute(Cache.open(own.parent / "empty"), StatisticRequest(CLS, "channels"))


# --- beside the rest of the cache ----------------------------------------------------------------------


def test_verify_info_and_digest_know_them(own: Path) -> None:
    plain = digest(own)
    cache = Cache.open(own)
    compute(cache, StatisticRequest(CLS, "pca", components=3))
    compute(cache, StatisticRequest(LAYERS, "channels", split="val"))
    report = verify(LocalStore(own))
    assert report.findings == ()
    assert report.notes == ()
    assert report.statistics == 2
    assert digest(own) == plain
    from emkum.shards.audit import describe, report_table, table

    assert "2 networks, 2 statistics" in report_table(LocalStore(own), report)
    description = describe(Cache.open(own))
    names = [f"{CLS}/pca-3", f"{LAYERS}/channels@val"]
    assert description["statistics"] == [{"name": name, "stale": ""} for name in names]
    assert f"statistic {names[0]}" in table(description)


@pytest.mark.parametrize("victim", ["record.json", "mean/c.0", "zarr.json", "mean/zarr.json", "../zarr.json"])
@pytest.mark.parametrize("harm", ["flip", "remove", "space"])
def test_damage_is_found_and_repaired(own: Path, victim: str, harm: str) -> None:
    request = StatisticRequest(CLS, "channels")
    first = compute(Cache.open(own), request).arrays["mean"].copy()
    path = own / "statistics" / CLS / "channels" / victim
    data = path.read_bytes()
    if harm == "remove":
        path.unlink()
    elif harm == "flip":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    else:
        path.write_bytes(data.replace(b": ", b":  ", 1) if b": " in data else data + b" ")
    report = verify(LocalStore(own))
    if victim == "record.json" and harm == "remove":  # without it there is no statistic
        assert report.findings == ()
        assert "files are not of the format" in report.notes[0]
    else:
        assert [f.path for f in report.findings] == [os.path.normpath(f"statistics/{CLS}/channels/{victim}")]
        assert report.findings[0].repairable
        if victim.endswith(("record.json", "c.0")) and (victim, harm) != ("record.json", "space"):  # the same value
            with pytest.raises(CorruptCache, match=r"cannot be trusted|does not hold the bytes|is missing") as caught:
                load(Cache.open(own), request)
            assert "the same `emkum cache stats` command makes it anew" in caught.value.way_out
        done = repair(LocalStore(own))
        assert done.left == ()
        after = verify(LocalStore(own))
        assert after.findings == ()
        assert after.notes == ()
    np.testing.assert_array_equal(compute(Cache.open(own), request).arrays["mean"], first)
    assert verify(LocalStore(own)).notes == ()


def test_repair_says_which_command_makes_it_anew(own: Path) -> None:
    from emkum.shards.audit import repair_table

    compute(Cache.open(own), StatisticRequest(CLS, "channels"))
    (own / "statistics" / CLS / "channels/std/c.0").write_bytes(b"")
    text = repair_table(repair(LocalStore(own)), False)
    assert "next: the same `emkum cache stats` commands again, for the statistics that were removed" in text
    assert "emkum extract" not in text


def test_a_record_of_another_statistic_is_refused(own: Path) -> None:
    cache = Cache.open(own)
    compute(cache, StatisticRequest(CLS, "pca", components=2))
    compute(cache, StatisticRequest(CLS, "pca", components=3))
    folder = own / "statistics" / CLS
    shutil.copy(folder / "pca-2/record.json", folder / "pca-3/record.json")
    with pytest.raises(CorruptCache, match="it is the record of"):
        load(cache, StatisticRequest(CLS, "pca", components=3))


@pytest.mark.parametrize("mode", MODES)
def test_a_fault_at_any_moment_leaves_a_whole_one_or_none(
    own: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale statistic is replaced; a call that changes the disk fails; then the same command goes on."""
    request = StatisticRequest(CLS, "channels")
    monkeypatch.setattr(durable, "os", FaultyOs(1 << 30))
    wanted = compute(Cache.open(own), request).arrays["mean"].copy()
    record = own / "statistics" / CLS / "channels/record.json"
    stale = {key: value for key, value in json.loads(record.read_text()).items() if key != "digest"}
    stale["fingerprint"]["method"] = 0
    stale["fingerprint_digest"] = digest_of(stale["fingerprint"])

    def replaced(faulty: FaultyOs) -> bool:
        record.write_bytes(pretty_json(with_digest(stale)))
        monkeypatch.setattr(durable, "os", faulty)
        try:
            compute(Cache.open(own), request, Threads(1))
            return True
        except (StorageFailure, OSError):
            return False
        finally:
            if "power" in mode:
                faulty.cut_power()
            monkeypatch.setattr(durable, "os", FaultyOs(1 << 30))
            shutil.rmtree(own / "_emkum/claims", ignore_errors=True)  # as if its process were gone

    counted = FaultyOs(1 << 30)
    assert replaced(counted)
    failures = 0
    for fail_at in np.linspace(0, len(counted.calls) - 1, 9).astype(int).tolist():
        failures += not replaced(FaultyOs(fail_at, mode))
        left = Cache.open(own)
        for one in kept(left):
            if not one.stale:
                np.testing.assert_array_equal(load(left, request).arrays["mean"], wanted)
        np.testing.assert_array_equal(compute(Cache.open(own), request, Threads(1)).arrays["mean"], wanted)
    assert failures > 2


def test_what_another_process_has_kept_meanwhile_stays(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emkum.shards.statistics import compute as module

    request = StatisticRequest(CLS, "channels")
    real = module._make

    def slow(*arguments):  # type: ignore[no-untyped-def]
        monkeypatch.setattr(module, "_make", real)
        compute(Cache.open(own), request, Threads(1))
        return real(*arguments)

    monkeypatch.setattr(module, "_make", slow)
    found = compute(Cache.open(own), request, Threads(2))
    assert found.record["making"]["engine"] == "1 thread"


def test_a_cache_in_an_object_store(own: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").put(f"{own}/", "/statistics-test/", recursive=True)
    cache = Cache.open("memory://statistics-test")
    found = compute(cache, StatisticRequest(CLS, "codebook", codes=4))
    np.testing.assert_array_equal(
        found.arrays["codes"], compute(Cache.open(own), StatisticRequest(CLS, "codebook", codes=4)).arrays["codes"]
    )
    from emkum.shards.store import open_store

    report = verify(open_store("memory://statistics-test"))
    assert (report.findings, report.notes, report.statistics) == ((), (), 1)


# --- the command ---------------------------------------------------------------------------------------


def test_the_command(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> tuple[int, str, str]:
        code = cli.run(["cache", "stats", str(own), *words])
        out = capsys.readouterr()
        return code, out.out, out.err

    assert run() == (0, f"{own} keeps no statistics: --field F --what pca makes one\n", "")
    code, out, err = run("--field", CLS, "--what", "pca", "--components", "3", "--workers", "1")
    assert code == 0
    assert out.startswith(f"{CLS}/pca-3: components 3 x 16, explained_variance 3, mean 16\nof 140 vectors in ")
    assert "the components explain " in out
    assert err == f"{CLS}/pca-3: 140 vectors of 16, with 1 thread\n"
    code, out, err = run("--field", CLS, "--what", "codebook", "--codes", "4", "--json")
    told = json.loads(out)
    assert told["arrays"] == {"codes": [4, 16], "counts": [4]}
    assert told["name"] == f"{CLS}/codebook-4"
    assert 0 < told["results"]["perplexity"] <= 4
    assert "codes used, perplexity" in run("--field", CLS, "--what", "codebook", "--codes", "4")[1]
    assert " groups of " in run("--field", CLS, "--what", "duplicates", "--threshold", "0.9")[1]
    assert run("--field", CLS, "--what", "channels", "--split", "val")[0] == 0
    listing = json.loads(run("--json")[1])["statistics"]
    assert [one["name"].removeprefix(CLS) for one in listing] == [
        "/channels@val",
        "/codebook-4",
        "/duplicates-0.9",
        "/pca-3",
    ]
    assert listing[0]["command"] == f"emkum cache stats {own} --field {CLS} --what channels --split val"
    assert all(one["stale"] == "" for one in listing)
    assert f"{CLS}/pca-3: 140 vectors of 16\n" in run()[1]
    for words, text in (
        (("--what", "pca"), "--field and --what go together"),
        (("--field", CLS, "--what", "mode"), "--what mode cannot work"),
        (("--field", "x/y", "--what", "pca"), "has no field x/y; it has: image/tinyvit@2/tokens"),
        (("--field", CLS, "--what", "pca", "--workers", "0"), "--workers 0 cannot work"),
        (("--field", CLS, "--what", "channels", "--scheduler", "here"), "--scheduler here cannot work"),
    ):
        code, out, err = run(*words)
        assert code == 2
        assert text in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stop_in_between_leaves_nothing_and_the_same_command_begins_anew(
    tmp_path: Path, number: signal.Signals
) -> None:
    path = pooled_cache(tmp_path / "cache", clusters(20_000, 50, 64), 512)
    words = [sys.executable, "-m", "emkum.cli", "cache", "stats", str(path), "--field", CLS, "--what", "codebook"]
    words += ["--codes", "2000", "--iterations", "1000000"]
    code = "import sys; from emkum.shards.statistics import codebook; codebook.CONVERGED = -9.0; "
    code += "from emkum import cli; sys.argv = sys.argv[1:]; cli.main()"
    words[1:3] = ["-c", code, "emkum"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "20,000 vectors of 64" in process.stderr.readline()
        time.sleep(1.0)
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(30) == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    if number == signal.SIGTERM:
        assert rest.startswith("emkum: Interrupted: stopped by SIGTERM")
    assert not (path / "statistics").exists()
    assert verify(LocalStore(path)).findings == ()
    assert compute(Cache.open(path), StatisticRequest(CLS, "codebook", codes=20, iterations=2)).results["usage"] > 0.5
