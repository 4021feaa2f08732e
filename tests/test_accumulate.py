"""Steps of several batches: the numbers of one batch as large, whatever it is computed in, stopped and resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from short_runs import exact, logged, run, signal_at
from tiny_cache import TinyCache, make_cache

from emkum.errors import Interrupted, UsageError
from emkum.stage2_train.losses import in_chunks
from emkum.stage2_train.micro_batches import MicroBatches
from emkum.stage2_train.order import TrainOrder
from emkum.stage2_train.recipe import load_recipe
from emkum.stage2_train.run_folder import RunFolder, read_checkpoint
from emkum.stage2_train.samples import sample_table
from emkum.stage2_train.train import TrainConfig

SMALL = ("training.epochs=3", "optimiser.lr=0.1", "optimiser.encoder_lr=0.02", "evaluation.split=none")
CLS_MSE_ALONE = ("cls-mse", "objectives.itc=none")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    return make_cache(tmp_path_factory.mktemp("accumulate") / "cache", pictures=40, views=2, cut=1)


def configured(cache: TinyCache, run_dir: Path, recipe: str, *overrides: str, **changes: Any) -> TrainConfig:
    return exact(cache, run_dir, recipe, *SMALL, *overrides, **changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(RunFolder(folder).last)["state_dict"])


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], error: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=error, atol=error)


# --- one step of several batches ---------------------------------------------------------------------------------


def test_the_parts_of_a_step_put_together_are_its_batch(cache: TinyCache) -> None:
    from emkum.shards.reader import Cache
    from emkum.stage2_train.recipe_fields import required_fields

    recipe, opened = load_recipe("ssmke"), Cache.open(cache.path)
    table = sample_table(opened, recipe, required_fields(recipe, opened), "train")
    whole = TrainOrder(table, 12, seed=3, num_steps=5)
    parts = MicroBatches(whole, 3)
    assert len(parts) == 15
    for step in (4, 0, 3):
        found = [parts.rows(3 * step + part) for part in range(3)]
        assert [len(rows) for rows in found] == [4, 4, 4]
        for column in ("image_rows_B", "views_B", "text_rows_B"):
            joined = np.concatenate([getattr(rows, column) for rows in found])
            assert np.array_equal(joined, getattr(whole.rows(step), column)), column


@pytest.mark.parametrize(
    ("recipe", "accumulate"), [(("image-kd",), 4), (CLS_MSE_ALONE, 4), (CLS_MSE_ALONE, 2), (("text-kd",), 4)]
)
def test_losses_without_terms_between_samples_are_those_of_one_big_batch(
    cache: TinyCache, tmp_path: Path, recipe: tuple[str, ...], accumulate: int
) -> None:
    """text-kd too, though its batches have other numbers of real tokens: their gradients weigh as much."""
    name, *overrides = recipe
    run(configured(cache, tmp_path / "big", name, *overrides, "training.batch=16"))
    parts = [f"training.batch={16 // accumulate}", f"training.accumulate={accumulate}"]
    lines = run(configured(cache, tmp_path / "parts", name, *overrides, *parts))
    assert f"batches of {accumulate} x {16 // accumulate} an epoch" in "\n".join(lines)
    assert len(logged(tmp_path / "big")) in (6, 15)  # pictures, texts
    assert_close(weights(tmp_path / "parts"), weights(tmp_path / "big"))
    for column in ("lr", "epoch", "step"):
        assert np.array_equal(logged(tmp_path / "parts", column), logged(tmp_path / "big", column)), column
    if name != "text-kd":  # its log is a plain mean over batches
        np.testing.assert_allclose(logged(tmp_path / "parts"), logged(tmp_path / "big"), rtol=1e-5)


def test_a_bank_of_every_row_makes_ctl_the_same_too(cache: TinyCache, tmp_path: Path) -> None:
    common = ("objectives.itc=none", "objectives.ctl.bank=all")
    run(configured(cache, tmp_path / "big", "ssmke", *common, "training.batch=16"))
    run(configured(cache, tmp_path / "parts", "ssmke", *common, "training.batch=4", "training.accumulate=4"))
    assert_close(weights(tmp_path / "parts"), weights(tmp_path / "big"))


def test_itc_finds_its_negatives_in_the_micro_batch(cache: TinyCache, tmp_path: Path) -> None:
    """What docs/training.md says of it: another loss, and so another student."""
    run(configured(cache, tmp_path / "big", "itc-only", "training.batch=16"))
    run(configured(cache, tmp_path / "parts", "itc-only", "training.batch=4", "training.accumulate=4"))
    assert logged(tmp_path / "big")[0] > 1.3 * logged(tmp_path / "parts")[0]


def test_more_batches_a_step_than_an_epoch_has_are_refused(cache: TinyCache, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        run(configured(cache, tmp_path / "run", "image-kd", "training.batch=8", "training.accumulate=6"))
    assert error.value.what == (
        "training.accumulate = 6: a step of 6 batches of 8 is more than the 40 samples of split 'train'"
    )
    assert error.value.way_out == "use fewer: --set training.accumulate=5"


# --- stopping in the middle of a step ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "overrides"), [("ssmke", ["objectives.ctl.bank=20"]), ("text-kd", ["optimiser.clip_norm=0.1"])]
)
@pytest.mark.parametrize("stop", [1, 5, 6, 7, 8])
def test_a_run_stopped_in_the_middle_of_a_step_goes_on_bit_for_bit(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, overrides: list[str], stop: int
) -> None:
    parts = ("training.batch=5", "training.accumulate=4", *overrides)
    run(configured(cache, tmp_path / "whole", recipe, *parts))
    config = configured(cache, tmp_path / "run", recipe, *parts)
    signal_at(stop, monkeypatch)
    with pytest.raises(Interrupted) as error:
        run(config)
    half = f" and {stop % 4} of 4 batches of the next" if stop % 4 else ""
    assert f"SIGINT at step {stop // 4} of " in error.value.what
    assert f"{half}; checkpoint written" in error.value.what
    found = read_checkpoint(RunFolder(tmp_path / "run").last)
    assert found["global_step"] == stop // 4
    assert ("unstepped" in found) == bool(stop % 4)
    signal_at(-1, monkeypatch)
    run(replace(config, recipe=None, overrides=(), resume=True))
    whole, ours = (read_checkpoint(RunFolder(tmp_path / name).last) for name in ("whole", "run"))
    for name, tensor in whole["state_dict"].items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, ours["state_dict"][name]), name
    assert whole["global_step"] == ours["global_step"]
    assert np.array_equal(logged(tmp_path / "whole"), logged(tmp_path / "run"))


# --- one step of a batch in chunks -------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["ssmke", "image-kd", "text-kd"])
@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}])
def test_a_batch_in_chunks_has_the_losses_and_weights_of_the_whole(
    cache: TinyCache, tmp_path: Path, recipe: str, changes: dict[str, Any]
) -> None:
    """In-batch negatives among them. Chunks of 7: the last of a batch is smaller."""
    run(configured(cache, tmp_path / "whole", recipe, "training.batch=20"))
    run(configured(cache, tmp_path / "chunks", recipe, "training.batch=20", chunk=7, **changes))
    np.testing.assert_allclose(logged(tmp_path / "chunks"), logged(tmp_path / "whole"), rtol=1e-5)
    assert_close(weights(tmp_path / "chunks"), weights(tmp_path / "whole"), 1e-4)


def test_one_chunk_of_activations_exists_at_a_time() -> None:
    """None after the forward pass; in the backward pass a chunk is computed when the one before it is done with."""
    network = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.GELU(), torch.nn.Linear(64, 2))
    rows, events, saved = torch.randn(40, 4), list[str](), list[int]()

    def encode(part: torch.Tensor) -> tuple[torch.Tensor]:
        events.append("computed")
        features = network(part)
        features.register_hook(lambda gradient: events.append("gradient"))
        return (features,)

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        total = in_chunks(encode, 5, rows)[0].sum()
        assert sum(saved) <= rows.nbytes
        in_chunks(encode, 0, rows)
        assert sum(saved) > 20 * rows.nbytes  # what it is worth
    events.clear()
    total.backward()
    assert events == ["gradient", "computed"] * 8
