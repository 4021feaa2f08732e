"""The loader: the right rows, in an order that threads cannot change, from any step on."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_cache import SIZE, make_cache

from emkum.errors import CorruptCache, IncompleteCache, NoData, ResumeMismatch, UsageError
from emkum.shards.reader import Cache
from emkum.stage2_train.loader import (
    BatchLoader,
    BatchRows,
    Buffers,
    CachedSource,
    HostBatch,
    PassOrder,
    SampleTable,
    TrainOrder,
    sample_table,
)
from emkum.stage2_train.recipe import FieldNames, Recipe, load_recipe, required_fields

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


# --- from rows to tensors ----------------------------------------------------------------------------------------


def loaded(path: Path, recipe: Recipe, steps: int = 6, **loader: int) -> list[tuple[BatchRows, list[torch.Tensor]]]:
    cache, names, table = opened(path, recipe)
    source = CachedSource(cache, names, table)
    found = []
    for host in BatchLoader(TrainOrder(table, 8, 1, num_steps=steps), source, **loader):
        batch = source.prepare(host, CPU)
        tensors = [batch.tokens_BTD, batch.ids_BL, batch.mask_BL, batch.targets, batch.views_B, batch.image_rows_B]
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
        assert names.targets is not None
        assert batch.targets is not None
        wanted = (rows.image_rows_B, rows.views_B) if recipe is not TEXTS else (rows.text_rows_B,)
        values = cache.field(names.targets).values(*wanted)  # type: ignore[arg-type]
        if recipe is TEXTS:
            assert batch.mask_BL is not None
            values = values[:, : batch.mask_BL.shape[1]]
            assert np.array_equal(batch.targets[batch.mask_BL].numpy(), values[batch.mask_BL.numpy()])
        else:
            assert np.allclose(batch.targets.numpy(), values, rtol=0, atol=1e-6)
        assert batch.targets.dtype == torch.float32


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
    assert names.targets is not None
    for view in range(2):
        assert np.array_equal(found[:, view].numpy(), cache.field(names.targets).values(table.image_rows_N, view))  # type: ignore[arg-type]


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
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("emkum-loader")]
