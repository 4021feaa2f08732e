"""Statistics of whole fields: against plain float64 numpy, over every kind of field; workers; memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from emkum.errors import (
    IdentityMismatch,
    SchedulerUnreachable,
    UsageError,
)
from emkum.shards.codec import encode
from emkum.shards.fingerprint import Fingerprint
from emkum.shards.layout import FieldSpec
from emkum.shards.reader import Cache
from emkum.shards.statistics import channels, cluster, codebook, duplicates, pca, vectors
from emkum.shards.statistics.compute import compute
from emkum.shards.statistics.passes import Threads
from emkum.shards.statistics.request import StatisticRequest
from emkum.shards.statistics.vectors import Source, Vectors, opened, vectors_of
from emkum.shards.views import ViewPolicy
from emkum.shards.writer import CacheWriter
from tests.statistics_caches import CLS, LAYERS, TEXT, _nothing_stays_open, by_rows, clusters, own, pooled_cache, whole
from tests.tiny_cache import _tar, make_cache

__all__ = ["_nothing_stays_open", "own", "whole"]  # fixtures


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
