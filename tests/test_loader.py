"""The loader: the right rows, in an order that threads cannot change, from any step on."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache as cache_results
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_cache import SIZE, make_cache

from emkum.errors import CorruptCache, IncompleteCache, NoData, ResumeMismatch, UsageError
from emkum.shards.codec import encode
from emkum.shards.fingerprint import Fingerprint
from emkum.shards.layout import FieldSpec
from emkum.shards.reader import Cache
from emkum.shards.tars import PictureMember, SourceSample, SourceTar
from emkum.shards.views import ViewPolicy
from emkum.shards.writer import CacheWriter
from emkum.stage2_train.loader import BatchLoader, Buffers, CachedSource, HostBatch
from emkum.stage2_train.order import BatchRows, PassOrder, TrainOrder
from emkum.stage2_train.recipe import Recipe, load_recipe
from emkum.stage2_train.recipe_fields import FieldNames, required_fields
from emkum.stage2_train.samples import SampleTable, sample_table

CPU = torch.device("cpu")


def opened(path: Path, recipe: Recipe, **table: object) -> tuple[Cache, FieldNames, SampleTable]:
    cache = Cache.open(path)
    names = required_fields(recipe, cache)
    return cache, names, sample_table(cache, recipe, names, "train", **table)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("loader") / "cache", pictures=37, views=2, quarantined=[5, 20]).path


PAIRS, IMAGES, TEXTS = load_recipe("ssmke"), load_recipe("image-kd"), load_recipe("text-kd")


# --- which rows --------------------------------------------------------------------------------------------------


def test_a_quarantined_picture_is_left_out_with_its_captions_and_counted(path: Path) -> None:
    cache, _, table = opened(path, PAIRS)
    assert table.image_rows_N is not None
    assert table.text_rows_M is not None
    assert table.first_caption_N is not None
    assert table.image_rows_N.tolist() == [row for row in range(37) if row not in (5, 20)]
    owner = dict(zip(*(cache.captions("train").column(c).to_pylist() for c in ("text_row", "image_row")), strict=True))
    for i, row in enumerate(table.image_rows_N.tolist()):
        own = table.text_rows_M[table.first_caption_N[i] : table.first_caption_N[i + 1]].tolist()
        assert own == [text for text, image in owner.items() if image == row]
    assert (table.num_samples, table.num_views, table.dropped) == (35, 2, 2)


def test_texts_are_used_with_or_without_a_picture(path: Path) -> None:
    _, _, table = opened(path, TEXTS)
    assert (table.image_rows_N, table.num_samples, table.dropped) == (None, 74, 0)


def test_a_field_that_lacks_blocks_is_refused_by_name_and_used_in_part_when_asked(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", pictures=40, skipped_blocks=[("image/cls", 1), ("image/cls", 2)])
    with pytest.raises(IncompleteCache) as error:
        opened(made.path, PAIRS)
    expected = "teacher/tinyvit/image/cls lacks 2 blocks of split 'train' (1-0, 2-0); 16 rows are committed"
    assert error.value.what == expected
    assert "--allow-partial" in error.value.way_out
    _, _, table = opened(made.path, PAIRS, allow_partial=True)
    assert table.image_rows_N is not None
    assert table.image_rows_N.tolist() == list(range(16))
    assert table.dropped == 24
    assert opened(made.path, load_recipe("itc-only"))[2].num_samples == 40  # needs no teacher, so lacks nothing


def test_a_split_without_usable_rows_is_named(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", pictures=4, quarantined=[0, 1, 2, 3])
    with pytest.raises(NoData, match=r"split 'train' of .* has no row that all of image/tinyvit@2/tokens"):
        opened(made.path, PAIRS)


# --- in which order ----------------------------------------------------------------------------------------------


def all_rows(order: TrainOrder, name: str) -> list[list[int]]:
    return [getattr(order.rows(step), name).tolist() for step in range(len(order))]


def test_an_epoch_has_every_picture_once_less_the_last_partial_batch(path: Path) -> None:
    table = opened(path, PAIRS)[2]
    order = TrainOrder(table, batch=8, seed=0)
    rows = [row for batch in all_rows(order, "image_rows_B") for row in batch]
    assert len(order) == order.steps_per_epoch == 4
    assert len(set(rows)) == len(rows) == 32


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 2**62), st.sampled_from(["one", "all"]))
def test_whatever_the_sizes_no_row_comes_twice_in_an_epoch(pictures: int, batch: int, seed: int, captions: Any) -> None:
    counts = 1 + np.arange(pictures) % 3
    first = np.append(0, np.cumsum(counts))
    table = SampleTable("pairs", "train", np.arange(pictures) * 2, np.arange(first[-1]) + 100, first, 2, 0)
    units = pictures if captions == "one" else int(first[-1])
    assume(batch <= units)
    order = TrainOrder(table, batch, seed, captions, num_steps=3 * (units // batch))
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        texts = np.concatenate([order.rows(step).text_rows_B for step in steps])
        images = np.concatenate([order.rows(step).image_rows_B for step in steps])
        assert len(np.unique(texts)) == len(texts) == units // batch * batch
        owner = np.repeat(np.arange(pictures) * 2, counts)
        assert np.array_equal(owner[texts - 100], images)
        if captions == "one":
            assert len(np.unique(images)) == len(images)


def test_a_caption_drawn_for_a_picture_is_its_own_and_changes_from_epoch_to_epoch(path: Path) -> None:
    cache, _, table = opened(path, PAIRS)
    owner = dict(zip(*(cache.captions("train").column(c).to_pylist() for c in ("text_row", "image_row")), strict=True))
    order = TrainOrder(table, batch=35, seed=0, num_steps=8)
    chosen: dict[int, set[int]] = {}
    for step in range(8):
        batch = order.rows(step)
        for image, text in zip(batch.image_rows_B.tolist(), batch.text_rows_B.tolist(), strict=True):  # type: ignore[union-attr]
            assert owner[text] == image
            chosen.setdefault(image, set()).add(text)
    assert sum(len(texts) for texts in chosen.values()) > 60  # of 70 captions in eight epochs


def test_captions_all_has_every_caption_once_an_epoch_with_its_picture(path: Path) -> None:
    cache, _, table = opened(path, PAIRS)
    owner = dict(zip(*(cache.captions("train").column(c).to_pylist() for c in ("text_row", "image_row")), strict=True))
    order = TrainOrder(table, batch=10, seed=0, captions="all")
    texts = [row for batch in all_rows(order, "text_rows_B") for row in batch]
    images = [row for batch in all_rows(order, "image_rows_B") for row in batch]
    assert sorted(texts) == sorted(text for text, image in owner.items() if image not in (5, 20))
    assert [owner[text] for text in texts] == images


def test_both_views_are_drawn_and_first_takes_view_0(path: Path) -> None:
    drawn = {view for batch in all_rows(TrainOrder(opened(path, PAIRS)[2], 8, 0), "views_B") for view in batch}
    assert drawn == {0, 1}
    first = opened(path, load_recipe("ssmke", ["data.views=first"]))[2]
    assert {view for batch in all_rows(TrainOrder(first, 8, 0), "views_B") for view in batch} == {0}


def test_the_order_is_a_pure_function_of_seed_and_step(path: Path) -> None:
    table = opened(path, PAIRS)[2]
    order, other = TrainOrder(table, 8, seed=3, num_steps=12), TrainOrder(table, 8, seed=3, num_steps=12)
    forwards = [order.rows(step).image_rows_B.tolist() for step in range(12)]  # type: ignore[union-attr]
    backwards = [other.rows(step).image_rows_B.tolist() for step in reversed(range(12))]  # type: ignore[union-attr]
    assert forwards == backwards[::-1]
    assert forwards[0] != forwards[4]  # a new epoch, a new order
    assert all_rows(TrainOrder(table, 8, seed=4), "image_rows_B") != forwards[:4]


def test_the_order_stays_what_it_was_in_earlier_releases() -> None:
    """Runs resumed after an update of numpy or emkum must meet the same batches."""
    table = SampleTable("images", "train", np.arange(10), None, None, 1, 0)
    assert TrainOrder(table, 10, seed=0).rows(0).image_rows_B.tolist() == [8, 0, 3, 7, 6, 4, 1, 5, 2, 9]  # type: ignore[union-attr]


def test_a_batch_larger_than_the_split_is_refused(path: Path) -> None:
    with pytest.raises(UsageError, match="a batch of 36 is more than the 35 samples of split 'train'"):
        TrainOrder(opened(path, PAIRS)[2], 36, 0)


def test_a_pass_for_evaluation_keeps_the_last_partial_batch() -> None:
    order = PassOrder(np.arange(7), None, 3)
    assert [order.rows(step).image_rows_B.tolist() for step in range(len(order))] == [[0, 1, 2], [3, 4, 5], [6]]  # type: ignore[union-attr]


# --- shared out among ranks ---------------------------------------------------------------------------------------

SIZES = (23, 1, 16, 5, 33, 2, 9)  # of segments: one row, one full block, two blocks and a row; others end in padding


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The first so many segments of SIZES as one split, in blocks of 16; row k holds the number k."""

    @cache_results
    def made(segments: int) -> Path:
        place = tmp_path_factory.mktemp("uneven") / "cache"
        writer = CacheWriter(place, 16)
        spec = FieldSpec("image/tinyvit@0/tokens", "tokens", "float32", (2, 3))
        fingerprint = Fingerprint(spec.kind, spec.storage, spec.row_shape, size=SIZE, compute="float32")
        writer.declare_field(spec, fingerprint, {})
        for number, size in enumerate(SIZES[:segments]):
            samples = tuple(
                SourceSample(f"{i:04d}", PictureMember(512 + 1024 * i, 100, "jpg"), (), "json", None, None)
                for i in range(size)
            )
            name = f"{number}.tar"
            tar = SourceTar(name, name, 1000, hashlib.sha256(name.encode()).hexdigest(), samples, {}, 0)
            segment = writer.append_segment("train", ViewPolicy(crop=(0.9, 1.0)), [tar])
            writer.grow_field(spec, 1)
            for block in segment.image.blocks(16):
                first, count = segment.image.block_rows(block, 16)
                rows = np.arange(first, first + count, dtype=np.float32)
                with writer.block(spec, segment, block, 0) as target:
                    target.append(encode(np.broadcast_to(rows[:, None, None], (count, 2, 3)).copy(), "float32"))
                    target.commit()
        return place

    return made


def uneven_table(place: Path) -> tuple[CachedSource, SampleTable]:
    cache, names = Cache.open(place), FieldNames("image/tinyvit@0/tokens", "tinyvit")
    table = sample_table(cache, IMAGES, names, "train")
    return CachedSource(cache, names, table), table


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("segments", range(1, 8))
def test_with_any_number_of_segments_ranks_and_threads_every_sample_comes_once_an_epoch(
    uneven: Callable[[int], Path], segments: int, num_ranks: int
) -> None:
    source, table = uneven_table(uneven(segments))
    assert table.num_samples == sum(SIZES[:segments])
    batch = 6
    whole = TrainOrder(table, batch, seed=5, num_steps=2 * (table.num_samples // batch))
    for threads in range(6):
        parts = []
        for rank in range(num_ranks):
            order = TrainOrder(table, batch, 5, num_steps=len(whole), rank=rank, num_ranks=num_ranks)
            assert len(order) == len(whole)
            hosts = BatchLoader(order, source, threads=threads)
            parts.append([source.prepare(host, CPU).tokens_BTD[:, 0, 0].tolist() for host in hosts])  # type: ignore[index]
        assert {len(rows) for rank in parts for rows in rank} == {batch // num_ranks}
        together = [list(chain(*batches)) for batches in zip(*parts, strict=True)]
        assert together == [whole.rows(step).image_rows_B.tolist() for step in range(len(whole))]  # type: ignore[union-attr]
        for epoch in (0, 1):
            steps = range(epoch * whole.steps_per_epoch, (epoch + 1) * whole.steps_per_epoch)
            seen = list(chain(*(together[step] for step in steps)))
            assert len(set(seen)) == len(seen) == table.num_samples - whole.left_over
            assert set(seen) <= set(table.image_rows_N.tolist())  # type: ignore[union-attr]
        assert whole.left_over == table.num_samples % batch


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 5), st.sampled_from(["one", "all"]))
def test_the_parts_of_all_ranks_put_together_are_the_batch_of_one(
    pictures: int, share: int, num_ranks: int, captions: Any
) -> None:
    counts = 1 + np.arange(pictures) % 3
    first = np.append(0, np.cumsum(counts))
    table = SampleTable("pairs", "train", np.arange(pictures), np.arange(first[-1]) + 100, first, 2, 0)
    batch = share * num_ranks
    assume(batch <= (pictures if captions == "one" else first[-1]))
    whole = TrainOrder(table, batch, 1, captions, num_steps=5)
    orders = [TrainOrder(table, batch, 1, captions, 5, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    for step in range(5):
        for name in ("image_rows_B", "views_B", "text_rows_B"):
            parts = [getattr(order.rows(step), name) for order in orders]
            assert np.array_equal(np.concatenate(parts), getattr(whole.rows(step), name))


@pytest.mark.parametrize(
    ("batch", "rank", "num_ranks", "expected", "way_out"),
    [
        (2, 0, 3, "a batch of 2 is less than one sample for each of 3 ranks", "--set training.batch=3"),
        (8, 1, 3, "a batch of 8 cannot be shared out evenly among 3 ranks", "--set training.batch=9"),
        (8, 2, 2, "rank 2 of 2 ranks", "numbered from 0"),
        (8, -1, 2, "rank -1 of 2 ranks", "numbered from 0"),
        (8, 0, 0, "rank 0 of 0 ranks", "at least one"),
    ],
)
def test_an_impossible_plan_is_refused_before_any_process_waits_for_another(
    batch: int, rank: int, num_ranks: int, expected: str, way_out: str
) -> None:
    table = SampleTable("images", "train", np.arange(30), None, None, 1, 0)
    with pytest.raises(UsageError) as error:
        TrainOrder(table, batch, 0, rank=rank, num_ranks=num_ranks)
    assert (error.value.what, error.value.exit_code) == (expected, 2)
    assert way_out in error.value.way_out


def one_rank(place: Path, rank: int, num_ranks: int, meeting: Path) -> None:
    """What a training process does of it: read its part of each batch, and meet the others in every step."""
    torch.distributed.init_process_group(
        "gloo", init_method=meeting.as_uri(), rank=rank, world_size=num_ranks, timeout=timedelta(seconds=30)
    )
    source, table = uneven_table(place)
    order = TrainOrder(table, 6, 5, num_steps=2 * (table.num_samples // 6), rank=rank, num_ranks=num_ranks)
    for step, host in enumerate(BatchLoader(order, source)):
        total = source.prepare(host, CPU).tokens_BTD[:, 0, 0].sum()  # type: ignore[index]
        torch.distributed.all_reduce(total)
        assert int(total) == TrainOrder(table, 6, 5, num_steps=len(order)).rows(step).image_rows_B.sum()  # type: ignore[union-attr]
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_that_meet_in_every_step_over_uneven_segments_all_come_to_the_end(
    uneven: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    context = multiprocessing.get_context("spawn")
    place = uneven(7)
    ranks = [
        context.Process(target=one_rank, args=(place, rank, num_ranks, tmp_path / "meeting"))
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [0] * num_ranks  # None: still waiting
    finally:
        for process in ranks:
            process.kill()
            process.join()


# --- from rows to tensors ----------------------------------------------------------------------------------------


def loaded(path: Path, recipe: Recipe, steps: int = 6, **loader: int) -> list[tuple[BatchRows, list[torch.Tensor]]]:
    cache, names, table = opened(path, recipe)
    source = CachedSource(cache, names, table)
    found = []
    for host in BatchLoader(TrainOrder(table, 8, 1, num_steps=steps), source, **loader):
        batch = source.prepare(host, CPU)
        tensors = [batch.tokens_BTD, batch.ids_BL, batch.mask_BL, batch.views_B, batch.image_rows_B]
        tensors += batch.targets.values()
        found.append((host.rows, [tensor.clone() for tensor in tensors if tensor is not None]))
    return found


@pytest.mark.parametrize("recipe", [PAIRS, IMAGES, TEXTS])
def test_batches_do_not_depend_on_the_number_of_threads(path: Path, recipe: Recipe) -> None:
    one = loaded(path, recipe, threads=1, prefetch=1)
    many = loaded(path, recipe, threads=4, prefetch=7)
    assert len(one) == len(many) == 6
    for (_, a), (_, b) in zip(one, many, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
@pytest.mark.parametrize("recipe", [PAIRS, IMAGES, TEXTS])
def test_batches_hold_the_values_of_their_rows(tmp_path: Path, storage: str, recipe: Recipe) -> None:
    made = make_cache(tmp_path / "cache", pictures=20, storage=storage, views=2, rows_per_block=16)
    cache, names, table = opened(made.path, recipe)
    source = CachedSource(cache, names, table)
    for host in BatchLoader(TrainOrder(table, 8, 1), source):
        batch, rows = source.prepare(host, CPU), host.rows
        if names.inputs:
            assert batch.tokens_BTD is not None
            values = cache.field(names.inputs).values(rows.image_rows_B, rows.views_B)  # type: ignore[arg-type]
            assert np.array_equal(batch.tokens_BTD.numpy(), values)
        if names.ids:
            assert batch.ids_BL is not None
            assert batch.mask_BL is not None
            lengths = cache.field(names.ids).lengths(rows.text_rows_B)  # type: ignore[arg-type]
            assert batch.ids_BL.shape[1] == lengths.max()  # trimmed to the batch's longest
            assert batch.mask_BL.sum(1).tolist() == lengths.tolist()
            expected = cache.field(names.ids).read(rows.text_rows_B)[:, : lengths.max()]  # type: ignore[arg-type]
            assert np.array_equal(batch.ids_BL.numpy(), expected)
        ((role, name),) = names.targets.items()
        targets = batch.targets[role]
        wanted = (rows.image_rows_B, rows.views_B) if recipe is not TEXTS else (rows.text_rows_B,)
        values = cache.field(name).values(*wanted)  # type: ignore[arg-type]
        if recipe is TEXTS:
            assert batch.mask_BL is not None
            values = values[:, : batch.mask_BL.shape[1]]
            assert np.array_equal(targets[batch.mask_BL].numpy(), values[batch.mask_BL.numpy()])
        else:
            assert np.allclose(targets.numpy(), values, rtol=0, atol=1e-6)
        assert targets.dtype == torch.float32


def test_crops_go_through_the_frozen_prefix(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", pictures=16, fields=("crops", "ids", "cls"))
    cache, names, table = opened(made.path, load_recipe("ssmke", ["data.encoder=tinyvit"]))
    seen = []

    def prefix(crops: torch.Tensor) -> torch.Tensor:
        seen.append((crops.dtype, tuple(crops.shape)))
        return crops.float().flatten(1).unflatten(1, (3, -1))

    source = CachedSource(cache, names, table, prefix)
    host = next(iter(BatchLoader(TrainOrder(table, 8, 0), source)))
    tokens = source.prepare(host, CPU).tokens_BTD
    assert seen == [(torch.uint8, (8, SIZE, SIZE, 3))]
    assert tokens is not None
    assert tokens.shape == (8, 3, 256)


def test_all_targets_are_those_of_every_row_and_view(path: Path) -> None:
    cache, names, table = opened(path, PAIRS)
    found = CachedSource(cache, names, table).all_targets()
    target = cache.field(names.targets["cls"])
    for view in range(2):
        assert np.array_equal(found[:, view].numpy(), target.values(table.image_rows_N, view))  # type: ignore[arg-type]


# --- the loader --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 8])
def test_going_on_from_any_step_gives_the_batches_that_were_left(path: Path, stop: int) -> None:
    cache, names, table = opened(path, PAIRS)
    source = CachedSource(cache, names, table)

    def loader() -> BatchLoader:
        return BatchLoader(TrainOrder(table, 8, 2, num_steps=8), source)

    whole = [host.rows.text_rows_B.tolist() for host in loader()]  # type: ignore[union-attr]
    first, second = loader(), loader()
    batches = iter(first)
    seen = [next(batches).rows.text_rows_B.tolist() for _ in range(stop)]  # type: ignore[union-attr]
    second.load_state_dict(first.state_dict())
    assert seen + [host.rows.text_rows_B.tolist() for host in second] == whole  # type: ignore[union-attr]
    assert len(second) == 8


def test_a_state_of_another_length_is_refused(path: Path) -> None:
    cache, names, table = opened(path, PAIRS)
    source = CachedSource(cache, names, table)
    loader = BatchLoader(TrainOrder(table, 8, 0, num_steps=8), source)
    with pytest.raises(ResumeMismatch, match="a run of 9 steps; this one has 8"):
        loader.load_state_dict({"step": 2, "num_steps": 9})


def test_a_batch_stays_whole_while_the_next_ones_are_read(path: Path) -> None:
    cache, names, table = opened(path, PAIRS)
    source = CachedSource(cache, names, table)
    previous: tuple[HostBatch, torch.Tensor] | None = None
    for host in BatchLoader(TrainOrder(table, 8, 0, num_steps=12), source, threads=2, prefetch=1):
        if previous is not None:
            assert torch.equal(previous[0].inputs.values, previous[1])  # type: ignore[union-attr]
        time.sleep(0.01)  # time for the threads to read further
        assert host.inputs is not None
        previous = host, host.inputs.values.clone()


class SlowSource(CachedSource):
    def read(self, rows: BatchRows, buffers: Buffers) -> HostBatch:
        time.sleep(0.02)
        return super().read(rows, buffers)


def test_waiting_for_data_is_measured(path: Path) -> None:
    cache, names, table = opened(path, PAIRS)
    loader = BatchLoader(TrainOrder(table, 8, 0), SlowSource(cache, names, table), threads=1)
    assert len(list(loader)) == 4
    assert loader.waited_seconds > 0.06


def test_a_loader_that_waits_for_storage_can_be_told_to_give_up_and_goes_on_from_there(path: Path) -> None:
    cache, names, table = opened(path, PAIRS)
    answers = threading.Event()

    class StalledSource(CachedSource):
        def read(self, rows: BatchRows, buffers: Buffers) -> HostBatch:
            assert answers.wait(60)
            return super().read(rows, buffers)

    def give_up() -> None:
        raise TimeoutError("no answer")

    loader = BatchLoader(TrainOrder(table, 8, 0), StalledSource(cache, names, table))
    loader.while_waiting = give_up
    with pytest.raises(TimeoutError, match="no answer"):
        next(iter(loader))
    assert loader.state_dict() == {"step": 0, "num_steps": 4}
    answers.set()
    assert len(list(loader)) == 4


class FailingSource(CachedSource):
    def read(self, rows: BatchRows, buffers: Buffers) -> HostBatch:
        raise CorruptCache("a chunk fails its checksum")


def test_an_error_in_a_thread_reaches_the_training_loop(path: Path) -> None:
    cache, names, table = opened(path, PAIRS)
    with pytest.raises(CorruptCache, match="a chunk fails its checksum"):
        next(iter(BatchLoader(TrainOrder(table, 8, 0), FailingSource(cache, names, table))))


def test_a_loader_that_is_left_early_leaves_no_thread(path: Path) -> None:
    cache, names, table = opened(path, PAIRS)
    batches = iter(BatchLoader(TrainOrder(table, 8, 0), CachedSource(cache, names, table), threads=3))
    next(batches)
    del batches
    gc.collect()
    leave_no_thread()


def leave_no_thread() -> None:
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("emkum-loader")]
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_a_loader_that_is_left_while_a_read_hangs_is_left_at_once(path: Path) -> None:
    cache, names, table = opened(path, PAIRS)
    answers, reading = threading.Event(), threading.Event()
    first = TrainOrder(table, 8, 0).rows(0).image_rows_B

    class StallingSource(CachedSource):
        def read(self, rows: BatchRows, buffers: Buffers) -> HostBatch:
            if not np.array_equal(rows.image_rows_B, first):  # type: ignore[arg-type]
                reading.set()
                assert answers.wait(60)
            return super().read(rows, buffers)

    batches = iter(BatchLoader(TrainOrder(table, 8, 0), StallingSource(cache, names, table)))
    next(batches)
    assert reading.wait(60)
    leaving = threading.Thread(target=batches.close, daemon=True)  # type: ignore[attr-defined]
    leaving.start()
    leaving.join(20)
    hangs = leaving.is_alive()
    answers.set()
    assert not hangs
    leaving.join(60)
    leave_no_thread()
