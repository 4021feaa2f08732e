"""Orders of whole blocks: every row once, well mixed, each block read once; and who chooses them."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from forwarding import ForwardingReader
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_cache import make_cache

from emkum.errors import IncompleteCache, Interrupted, ResumeMismatch, UsageError
from emkum.shards import reader
from emkum.shards.reader import Cache
from emkum.shards.shard_files import ReadThreads
from emkum.shards.store import LocalStore, RangeReader
from emkum.stage2_train import plan as plan_module
from emkum.stage2_train import storage_probe
from emkum.stage2_train.keeper import RunKeeper
from emkum.stage2_train.loader import BatchLoader, CachedSource
from emkum.stage2_train.mixing import SPARE_BLOCKS, MixingBuffer, blocks_held
from emkum.stage2_train.order import Shuffle, TrainOrder
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.samples import SampleTable
from emkum.stage2_train.storage_probe import probe_storage
from emkum.stage2_train.train import TrainConfig, train

TOKENS = "image/tinyvit@1/tokens"
LAYERS = "teacher/tinyvit/image/layers"
TEXTS = "teacher/tinybert/text/layers"


def table_of(kind: str, rows: np.ndarray, captions: int = 1, views: int = 1) -> SampleTable:
    first = np.arange(len(rows) + 1) * captions
    if kind == "texts":
        return SampleTable("texts", "train", None, rows, None, 1, 0)
    if kind == "images":
        return SampleTable("images", "train", rows, None, None, views, 0)
    return SampleTable("pairs", "train", rows, np.arange(len(rows) * captions) + 7, first, views, 0)


def epoch_of(order: TrainOrder, epoch: int = 0) -> list[tuple[int, int, int]]:
    """(image row, view, text row) of every unit of an epoch, -1 for what there is not, in order."""
    found = []
    for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
        rows = order.rows(step)
        columns = (rows.image_rows_B, rows.views_B, rows.text_rows_B)
        found += list(zip(*(np.full(len(rows), -1) if c is None else c for c in columns), strict=True))
    return [tuple(int(n) for n in unit) for unit in found]


# --- the order ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["images", "texts", "pairs"]),
    count=st.integers(8, 300),
    per_block=st.sampled_from([16, 32, 64]),
    window=st.integers(1, 12),
    batch=st.integers(1, 8),
    captions=st.sampled_from(["one", "all"]),
    seed=st.integers(0, 2**40),
)
def test_whatever_the_sizes_every_sample_comes_once_an_epoch(
    kind: str, count: int, per_block: int, window: int, batch: int, captions: Any, seed: int
) -> None:
    holes = np.random.default_rng(seed).random(3 * count).argsort()[:count]
    table = table_of(kind, np.sort(holes), captions=3 if captions == "all" else 1, views=2)
    order = TrainOrder(table, batch, seed, captions, shuffle=Shuffle("blocks", per_block, window))
    for epoch in (0, 1):
        units = epoch_of(order, epoch)
        column = 2 if kind == "texts" or (captions == "all" and kind == "pairs") else 0
        seen = [unit[column] for unit in units]
        assert len(seen) == len(set(seen)) == order.units - order.left_over
        if kind == "pairs" and captions == "all":
            assert all(table.image_rows_N[(text - 7) // 3] == image for image, _, text in units)


def test_the_order_of_blocks_is_a_pure_function_of_seed_and_step() -> None:
    table = table_of("images", np.arange(400), views=3)
    make = lambda seed=5: TrainOrder(table, 16, seed, num_steps=100, shuffle=Shuffle("blocks", 32, 4))  # noqa: E731
    order, again, other = make(), make(), make(6)
    steps = np.random.default_rng(0).permutation(100)
    for step in steps.tolist():
        assert np.array_equal(order.rows(step).image_rows_B, make().rows(step).image_rows_B)
        assert np.array_equal(order.rows(step).views_B, again.rows(step).views_B)
    assert epoch_of(order) != epoch_of(order, 1)
    assert epoch_of(order) != epoch_of(other)


def test_the_parts_of_ranks_are_the_batch_of_one() -> None:
    table, shuffle = table_of("images", np.arange(400)), Shuffle("blocks", 32, 4)
    one = TrainOrder(table, 16, 0, shuffle=shuffle)
    parts = [TrainOrder(table, 16, 0, shuffle=shuffle, rank=rank, num_ranks=2) for rank in range(2)]
    for step in range(one.steps_per_epoch):
        joined = np.concatenate([part.rows(step).image_rows_B for part in parts])
        assert np.array_equal(joined, one.rows(step).image_rows_B)


@pytest.mark.parametrize("window", [1, 4, 16])
def test_every_batch_is_drawn_from_a_window_of_blocks(window: int) -> None:
    """But for the ends of an epoch, where the window fills and empties."""
    blocks, per_block, batch = 160, 128, 64
    table = table_of("images", np.arange(blocks * per_block))
    order = TrainOrder(table, batch, 3, shuffle=Shuffle("blocks", per_block, window))
    used = [order.rows(step).image_rows_B // per_block for step in range(order.steps_per_epoch)]
    filling = 2 * window * per_block // batch
    spread = [len(np.unique(found)) for found in used[filling:-filling]]
    assert min(spread) >= 0.6 * min(window, batch)
    assert min(len(np.unique(found)) for found in used) >= min(window, 2)
    neighbours = np.mean(np.abs(np.diff(np.concatenate([order.rows(s).image_rows_B for s in range(20)]))) == 1)
    assert neighbours < 0.2


class CountedField:
    """A field of random blocks that counts what is read of it."""

    reads_in_order = False

    def __init__(self, per_block: int) -> None:
        self.per_block = per_block
        self.blocks: list[int] = []

    def block_rows(self, block: int, view: int) -> np.ndarray:
        return np.arange(block * self.per_block, (block + 1) * self.per_block)

    def read(self, rows: np.ndarray, view: int) -> np.ndarray:
        self.blocks.append(int(rows[0]) // self.per_block)
        return rows[:, None].astype(np.float16)


@pytest.mark.parametrize(
    ("blocks", "window", "batch"), [(60, 8, 64), (60, 8, 8), (100, 3, 300), (40, 16, 32), (9, 8, 16)]
)
def test_each_block_is_read_once_an_epoch_over_three_epochs(blocks: int, window: int, batch: int) -> None:
    per_block = 64
    table = table_of("images", np.arange(blocks * per_block))
    order = TrainOrder(table, batch, 3, shuffle=Shuffle("blocks", per_block, window))
    field = CountedField(per_block)
    mixed = MixingBuffer(field, per_block, blocks_held(window, per_block, batch))  # type: ignore[arg-type]
    steps = 3 * order.steps_per_epoch
    for step in range(steps):
        mixed.expect(order.rows(min(step + order.look_ahead, steps - 1)).image_rows_B, 0)
        rows = order.rows(step).image_rows_B
        out = np.empty((len(rows), 1), np.float16)
        mixed.take(rows, 0, out)
        assert np.array_equal(out[:, 0], rows.astype(np.float16))
    mixed.close()
    assert len(field.blocks) <= 3 * blocks
    assert set(field.blocks) == set(range(blocks))
    assert field.reads_in_order


def test_a_block_gives_one_view_an_epoch_and_others_later() -> None:
    table = table_of("images", np.arange(320), views=3)
    order = TrainOrder(table, 16, 0, shuffle=Shuffle("blocks", 32, 2))
    seen: dict[int, set[int]] = {}
    for epoch in range(12):
        views: dict[int, set[int]] = {}
        for row, view, _ in epoch_of(order, epoch):
            views.setdefault(row // 32, set()).add(view)
            seen.setdefault(row // 32, set()).add(view)
        assert all(len(found) == 1 for found in views.values())
    assert all(found == {0, 1, 2} for found in seen.values())


# --- the buffer --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["float16", "int8"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten blocks of pictures in two views, twenty of captions, two pictures left out."""
    place = tmp_path_factory.mktemp("shuffle") / "cache"
    storage = request.param
    return make_cache(place, pictures=160, captions=2, views=2, cut=1, storage=storage, quarantined=(3, 40)).path


@pytest.mark.parametrize(
    "names",
    [
        FieldNames(TOKENS, "tinyvit", 1, None, {"layers": LAYERS}),
        FieldNames(None, None, 0, "text/tinybert/ids", {"text_layers": TEXTS}),
    ],
)
def test_batches_of_blocks_hold_the_numbers_of_their_rows_and_each_block_is_read_once(
    path: Path, names: FieldNames
) -> None:
    cache = Cache.open(path)
    text = names.inputs is None
    rows = cache.field(next(iter(names.targets.values()))).rows("train")
    table = table_of("texts" if text else "images", rows, views=1 if text else 2)
    order = TrainOrder(table, 8, 1, shuffle=Shuffle("blocks", cache.rows_per_block, 3))
    source = CachedSource(cache, names, None, threads=3, held_blocks=blocks_held(3, cache.rows_per_block, 8))
    single = CachedSource(Cache.open(path), names, None)
    for batch in BatchLoader(order, source):
        expected = next(iter(BatchLoader(_Only(batch.rows), single, threads=0)))
        read = [(batch.inputs, expected.inputs)]
        read += [(batch.targets[role], expected.targets[role]) for role in names.targets]
        for ours, theirs in read:
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert torch.equal(ours.values, theirs.values)
                if ours.scale is not None:
                    np.testing.assert_array_equal(ours.scale.numpy(), theirs.scale.numpy())
    for mixed in source._mixed.values():
        assert mixed.blocks_read <= len(np.unique(rows // cache.rows_per_block))


class _Only:
    """An order of one batch."""

    look_ahead = 0

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return 1

    def rows(self, step: int) -> Any:
        return self._rows


def test_going_on_in_the_middle_gives_the_batches_that_were_left(path: Path) -> None:
    names = FieldNames(TOKENS, "tinyvit", 1, None, {"layers": LAYERS})
    cache = Cache.open(path)
    table = table_of("images", cache.field(TOKENS).rows("train"), views=2)
    order = TrainOrder(table, 8, 1, num_steps=45, shuffle=Shuffle("blocks", 16, 3))
    whole = [
        batch.inputs.values.clone() for batch in BatchLoader(order, CachedSource(cache, names, None, held_blocks=6))
    ]
    loader = BatchLoader(order, CachedSource(Cache.open(path), names, None, held_blocks=6))
    loader.load_state_dict({"step": 25, "num_steps": 45})
    left = [batch.inputs.values.clone() for batch in loader]
    assert len(left) == 20
    assert all(torch.equal(a, b) for a, b in zip(left, whole[25:], strict=True))


def test_a_row_that_is_left_out_is_refused_by_name_from_a_block_too(path: Path) -> None:
    field = Cache.open(path).field(TOKENS)
    mixed = MixingBuffer(field, 16, 4)
    out = np.empty((2, *field.row_shape), field.storage)
    with pytest.raises(IncompleteCache, match=r"row 3 .* is quarantined: broken"):
        mixed.take(np.array([2, 3]), 0, out)
    with pytest.raises(IncompleteCache, match=r"row 500 view 0 \(block 31\) is not committed"):
        mixed.take(np.array([2, 500]), 0, out)


def test_a_block_that_could_not_be_read_is_read_again_when_it_is_asked_for_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = Cache.open(path).field(TOKENS)
    mixed, read, failures = MixingBuffer(field, 16, 4), field.read, [OSError("gone")]

    def once(*arguments: Any, **named: Any) -> np.ndarray:
        if failures:
            raise failures.pop()
        return read(*arguments, **named)

    monkeypatch.setattr(field, "read", once)
    out = np.empty((1, *field.row_shape), field.storage)
    with pytest.raises(OSError, match="gone"):
        mixed.take(np.array([2]), 0, out)
    mixed.take(np.array([2]), 0, out)
    assert np.array_equal(out, read(np.array([2])))


def test_no_more_blocks_than_the_capacity_stay_in_memory(path: Path) -> None:
    field = Cache.open(path).field(TOKENS)
    mixed = MixingBuffer(field, 16, 2)
    out = np.empty((1, *field.row_shape), field.storage)
    for row in (0, 16, 32, 48, 0):
        mixed.take(np.array([row + 1]), 0, out)
        assert np.array_equal(out, field.read(np.array([row + 1])))
    assert len(mixed._blocks) == 2
    assert mixed.blocks_read == 5
    assert mixed.capacity_bytes == 2 * 16 * out.nbytes


# --- the choice --------------------------------------------------------------------------------------------------


class SlowStore(LocalStore):
    """A folder on a disk whose head must move, in `seek_seconds`, to where the last read of a file did not end.

    seconds: what its reads have taken, at a microsecond a kilobyte.
    """

    def __init__(self, folder: Path, seek_seconds: float) -> None:
        super().__init__(folder)
        self.seek_seconds, self.seconds = seek_seconds, 0.0
        self.lock = threading.Lock()

    def open(self, path: str) -> RangeReader:
        return _SlowReader(self, super().open(path))


class _SlowReader(ForwardingReader):
    def __init__(self, store: SlowStore, file: RangeReader) -> None:
        super().__init__(file)
        self._store, self._ended = store, -1

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        with self._store.lock:
            count = super().read_into(buffers, offset)
            self._store.seconds += count * 1e-9 + (self._store.seek_seconds if offset != self._ended else 0.0)
            self._ended = offset + count
        return count


@pytest.mark.parametrize(("seek_seconds", "slow"), [(0.05, True), (0.0, False)])
def test_a_disk_that_is_slow_at_single_rows_is_found_out_and_another_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seek_seconds: float, slow: bool
) -> None:
    """By a clock that runs with the disk's head alone, not with this machine's."""
    monkeypatch.setattr(reader, "MAPPED_SHARE", 0.0)
    place = make_cache(
        tmp_path / "cache", pictures=2048, val_pictures=0, captions=0, fields=["tokens"], rows_per_block=256
    ).path
    name, store = "image/tinyvit@2/tokens", SlowStore(place, seek_seconds)
    monkeypatch.setattr(storage_probe.time, "perf_counter", lambda: store.seconds)
    threads = ReadThreads(4)
    found = probe_storage(lambda: Cache.open(store, only=[name]).field(name), threads, seconds=1e9)
    threads.close()
    assert found is not None
    assert found.slow_at_single_rows == slow


def test_of_a_field_of_one_block_nothing_is_said(path: Path) -> None:
    field = Cache.open(path).field(TOKENS)
    field.receipts = {(0, 0): field.receipts[0, 0]}
    assert probe_storage(lambda: field, ReadThreads(2), seconds=0.1) is None


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    made = make_cache(tmp_path / "cache", cut=1)
    overrides = ("training.batch=8", "training.epochs=3", "evaluation.every_epochs=3")
    return TrainConfig(made.path, "cls-mse", overrides, tmp_path / "run", device="cpu")


def lines_of(config: TrainConfig) -> list[str]:
    lines: list[str] = []
    train(config, lines.append)
    return lines


def shuffle_of(config: TrainConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((config.run_dir / "run.json").read_text())["identity"]["shuffle"]
    return found


def test_a_cache_that_fits_into_memory_is_shuffled_by_rows_without_a_word(config: TrainConfig) -> None:
    assert not any("shuffled" in line for line in lines_of(config))
    assert shuffle_of(config) == {"mode": "rows"}


@pytest.mark.parametrize(("single", "mode"), [(100.0, "blocks"), (900.0, "rows")])
def test_a_larger_one_as_its_storage_allows_and_that_is_said_and_kept(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, single: float, mode: str
) -> None:
    monkeypatch.setattr(storage_probe, "MEMORY_SHARE", 0.0)
    monkeypatch.setattr(plan_module, "probe_storage", lambda *_: storage_probe.Probe(single, 1000.0))
    said = " ".join(lines_of(replace(config, max_steps=4)))
    assert f"the storage gives {single:,.0f} single rows a second, 1,000 in order" in said
    assert ("shuffled by whole blocks, 8 of them mixed" in said) == (mode == "blocks")
    assert ("--shuffle rows overrides it" in said) == (mode == "blocks")
    assert shuffle_of(config)["mode"] == mode
    monkeypatch.setattr(plan_module, "probe_storage", lambda *_: pytest.fail("the run knows its shuffle"))
    train(TrainConfig(config.cache, run_dir=config.run_dir, resume=True, device="cpu"), lambda line: None)


@pytest.mark.parametrize("stop", [2, 7])
def test_a_run_by_blocks_that_was_stopped_ends_as_if_it_never_had(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """In the middle of the first epoch and of the second."""
    config = replace(config, shuffle="blocks", mix_blocks=1)
    train(config, lambda line: None)
    stopped = replace(config, run_dir=tmp_path / "stopped")
    ended = RunKeeper.on_train_batch_end

    def interrupt(keeper: RunKeeper, *arguments: Any) -> None:
        if keeper.loader.step == stop:
            keeper.stop_signal = signal.SIGTERM
        ended(keeper, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunKeeper, "on_train_batch_end", interrupt)
        with pytest.raises(Interrupted):
            train(stopped, lambda line: None)
    assert json.loads((stopped.run_dir / "run.json").read_text())["steps"] == stop
    train(TrainConfig(config.cache, run_dir=stopped.run_dir, resume=True, device="cpu"), lambda line: None)
    whole, resumed = (folder / "student.safetensors" for folder in (config.run_dir, stopped.run_dir))
    assert resumed.read_bytes() == whole.read_bytes()
    rows = replace(config, run_dir=tmp_path / "rows", shuffle="rows", mix_blocks=None)
    train(rows, lambda line: None)
    assert (rows.run_dir / "student.safetensors").read_bytes() != whole.read_bytes()


def test_a_run_is_not_continued_with_another_shuffle(config: TrainConfig) -> None:
    config = replace(config, shuffle="blocks", mix_blocks=2)
    train(config, lambda line: None)
    resume = TrainConfig(config.cache, run_dir=config.run_dir, resume=True, device="cpu")
    with pytest.raises(ResumeMismatch, match=r"shuffle\.mode: blocks in the run, rows now"):
        train(replace(resume, shuffle="rows"), lambda line: None)
    with pytest.raises(ResumeMismatch, match=r"shuffle\.window: 2 in the run, 3 now"):
        train(replace(resume, mix_blocks=3), lambda line: None)
    train(replace(resume, shuffle="blocks"), lambda line: None)  # the window is the run's


def test_blocks_that_do_not_fit_into_memory_are_refused_with_figures(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "machine_memory_bytes", lambda: 1 << 16)
    with pytest.raises(UsageError, match=r"would hold 13 of 0\.0 MiB, 0\.0 GiB in all; half of this machine's memory"):
        train(replace(config, shuffle="blocks"), lambda line: None)


def test_impossible_choices_are_refused() -> None:
    with pytest.raises(UsageError, match="--shuffle dice"):
        TrainConfig(shuffle="dice")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--mix-blocks 0"):
        TrainConfig(mix_blocks=0)
    with pytest.raises(UsageError, match="--mix-blocks 3 with --shuffle rows"):
        TrainConfig(shuffle="rows", mix_blocks=3)
    with pytest.raises(UsageError, match="--verify sometimes"):
        TrainConfig(verify="sometimes")  # type: ignore[arg-type]


# --- object stores -----------------------------------------------------------------------------------------------


@pytest.fixture
def remote(config: TrainConfig) -> Iterator[str]:
    """The cache of `config` in an object store."""
    url = "memory://shuffle-test/cache"
    fsspec.filesystem("memory").put(str(config.cache), "/shuffle-test/cache", recursive=True)
    yield url
    fsspec.filesystem("memory").rm("/shuffle-test", recursive=True)


def test_training_reads_an_object_store_as_it_reads_a_disk(config: TrainConfig, remote: str, tmp_path: Path) -> None:
    by_blocks = replace(config, shuffle="blocks")
    train(by_blocks, lambda line: None)
    lines = lines_of(replace(config, cache=remote, run_dir=tmp_path / "remote"))
    assert any("an object store answers many requests for single rows slowly" in line for line in lines)
    found = [tmp_path / "remote/student.safetensors", config.run_dir / "student.safetensors"]
    assert found[0].read_bytes() == found[1].read_bytes()
    assert json.loads((tmp_path / "remote/run.json").read_text())["cache"]["path"] == remote
    shutil.rmtree(tmp_path / "remote")
    train(replace(config, cache=remote, run_dir=tmp_path / "remote", shuffle="rows"), lambda line: None)
    train(replace(config, run_dir=tmp_path / "rows"), lambda line: None)
    assert found[0].read_bytes() == (tmp_path / "rows/student.safetensors").read_bytes()


def test_the_buffer_holds_the_window_the_batches_read_ahead_and_some_to_spare(path: Path) -> None:
    cache = Cache.open(path)
    source = CachedSource(
        cache,
        FieldNames(TOKENS, "tinyvit", 1, None, {"layers": LAYERS}),
        None,
        held_blocks=blocks_held(5, cache.rows_per_block, 24),
    )
    rows = sum(cache.field(name).spec.array("values").row_bytes for name in (TOKENS, LAYERS))
    batches = 3 * 24 / 16  # one, and one block's worth on both sides: in blocks
    assert source.mixing_bytes == (5 + SPARE_BLOCKS + -(-batches // 1)) * cache.rows_per_block * rows
