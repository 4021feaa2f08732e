"""Two processes that share each batch train what one trains with the whole of it, and stop, resume and fail as one."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_cache import TinyCache, make_cache

from emkum.errors import AnotherWriter, Interrupted, RankLost, UsageError
from emkum.stage2_train import losses
from emkum.stage2_train.objectives.gather import alone, gathered_constants, num_ranks
from emkum.stage2_train.ranks import Ranks, Say, run_on_ranks
from emkum.stage2_train.run_folder import RunFolder, held, read_checkpoint
from emkum.stage2_train.train import RunResult, TrainConfig, train, train_on_rank

RECIPES = {
    "ssmke": ("ssmke",),
    "ssmke-fifo": ("ssmke", "objectives.ctl.bank=20", "training.ema=0.9"),
    "image-kd": ("image-kd",),
    "text-kd": ("text-kd",),
    "text-kd-accumulate": ("text-kd", "training.batch=4", "training.accumulate=2"),
    "itc-accumulate": ("itc-only", "training.batch=4", "training.accumulate=2"),
    "shre": ("shre", "objectives.ranking.layers=all"),
}
SMALL = ("training.batch=8", "training.epochs=2", "optimiser.lr=0.02", "optimiser.encoder_lr=0.005")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    fields = ("tokens", "ids", "cls", "layers", "text_layers", "logits")
    return make_cache(tmp_path_factory.mktemp("ranks") / "cache", pictures=40, views=2, cut=1, fields=fields)


def configured(cache: TinyCache, run_dir: Path, recipe: str = "ssmke-fifo", **changes: Any) -> TrainConfig:
    name, *overrides = RECIPES[recipe]
    common = {"precision": "float32", "device": "cpu", "log_every": 1, "loggers": ("none",), "threads": 2}
    return TrainConfig(cache.path, name, (*SMALL, *overrides), run_dir, **{**common, **changes})


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def numbers(folder: Path) -> dict[tuple[str, int], float]:
    clock = ("seconds", "samples_per_second", "waited")
    return {
        (name, number): float(value)
        for number, row in enumerate(metrics(folder))
        for name, value in row.items()
        if value and name not in clock
    }


def state(folder: Path) -> dict[str, torch.Tensor]:
    found = read_checkpoint(RunFolder(folder).last)
    moments = found["optimizer_states"][0]["state"]
    averages = {f"{n} {key}": value for n, held in moments.items() for key, value in held.items()}
    return {**{k: v for k, v in found["state_dict"].items() if isinstance(v, torch.Tensor)}, **averages}


def assert_same_run(ours: Path, theirs: Path, error: float = 1e-5) -> None:
    """Losses, scores and weights agree; `error` as a fraction."""
    found, expected = numbers(ours), numbers(theirs)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=10 * error if "grad_norm" in key[0] else error, abs=error), key
    found_state, expected_state = state(ours), state(theirs)
    assert found_state.keys() == expected_state.keys()
    for name, tensor in expected_state.items():
        torch.testing.assert_close(found_state[name], tensor, rtol=error, atol=error, msg=lambda m, n=name: f"{n}: {m}")


def all_recipes(given: tuple[TinyCache, Path], ranks: Ranks, say: Say) -> dict[str, RunResult | None]:
    """Every recipe in one pair of processes, which take seconds to start."""
    cache, folder = given
    if ranks.leads:  # the other rank makes no such call: without `alone` this one would wait for it
        with alone():
            assert gathered_constants(torch.ones(2)).shape == (2,)
            assert num_ranks() == 1
    assert num_ranks() == 2
    return {name: train_on_rank(configured(cache, folder / name, name, devices=2), ranks, say) for name in RECIPES}


@pytest.fixture(scope="module")
def on_two(cache: TinyCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_on_ranks(2, all_recipes, (cache, folder), lambda line: None, cuda=False)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_ranks_train_what_one_trains_with_the_joined_batch(
    cache: TinyCache, tmp_path: Path, on_two: Path, recipe: str
) -> None:
    """Every logged number, the weights, the optimiser's moments, the bank, and the average of weights."""
    train(configured(cache, tmp_path / "one", recipe), say=lambda line: None)
    assert len(metrics(tmp_path / "one")) > 8
    assert_same_run(on_two / recipe, tmp_path / "one")


# --- stopping and going on ---------------------------------------------------------------------------------------


def signal_at(batch: int) -> None:
    """This process gets SIGTERM while the given batch, from 1, is computed; 0: never again."""
    add, seen = ADD, [0]

    def counting(self: losses.Journal, parts: Any) -> None:
        seen[0] += 1
        if seen[0] == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        add(self, parts)

    losses.Journal.add = counting if batch else ADD  # type: ignore[method-assign]


ADD = losses.Journal.add
FIFO, ACCUMULATED = "ssmke-fifo", "text-kd-accumulate"


def stops(given: tuple[TinyCache, Path, Path], ranks: Ranks, say: Say) -> list[str]:
    """On two ranks: one is told to stop and both do, twice; one run goes on here, and so do those begun on one rank."""
    cache, folder, begun_on_one = given
    said = []
    for recipe, batch in ((FIFO, 7), (ACCUMULATED, 5)):  # the second in the middle of a step of two batches
        signal_at(batch if ranks.rank == 1 else 0)
        config = configured(cache, folder / recipe, recipe, devices=2)
        try:
            train_on_rank(config, ranks, say)
        except Interrupted as error:
            said.append(error.line())
        signal_at(0)
    train_on_rank(resumed(cache, folder / FIFO, devices=2), ranks, say)
    for recipe in (FIFO, ACCUMULATED):
        train_on_rank(resumed(cache, begun_on_one / recipe, devices=2), ranks, say)
    return said


def resumed(cache: TinyCache, folder: Path, **changes: Any) -> TrainConfig:
    common = {"device": "cpu", "log_every": 1, "loggers": ("none",), "threads": 2}
    return TrainConfig(cache.path, run_dir=folder, resume=True, **{**common, **changes})


@pytest.fixture(scope="module")
def stopped(cache: TinyCache, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("stopped")
    for recipe in (FIFO, ACCUMULATED):
        signal_at(5)  # of the second in the middle of a step
        with pytest.raises(Interrupted):
            train(configured(cache, folder / "begun" / recipe, recipe), say=lambda line: None)
    signal_at(0)
    said = run_on_ranks(2, stops, (cache, folder, folder / "begun"), lambda line: None, cuda=False)
    return folder, said


def test_a_signal_to_one_rank_stops_all_between_two_batches(stopped: tuple[Path, list[str]]) -> None:
    folder, said = stopped
    assert said[0].startswith("Interrupted: SIGTERM at step 7 of 10; checkpoint written | continue: emkum train")
    assert said[0].endswith(f"--run-dir {folder / FIFO} --resume --device cpu --threads 2 --devices 2 --logger none")
    assert said[1].startswith("Interrupted: SIGTERM at step 2 of 20 and 1 of 2 batches of the next; checkpoint written")


def test_a_run_of_two_ranks_goes_on_bit_for_bit(on_two: Path, stopped: tuple[Path, list[str]]) -> None:
    ours, theirs = state(stopped[0] / FIFO), state(on_two / FIFO)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert numbers(stopped[0] / FIFO) == numbers(on_two / FIFO)


@pytest.mark.parametrize("recipe", [FIFO, ACCUMULATED])
def test_a_run_of_one_rank_goes_on_with_two(on_two: Path, stopped: tuple[Path, list[str]], recipe: str) -> None:
    folder = stopped[0] / "begun" / recipe
    assert_same_run(folder, on_two / recipe)
    sessions = json.loads((folder / "run.json").read_text())["sessions"]
    assert [session["devices"] for session in sessions] == [1, 2]


def test_a_run_of_two_ranks_goes_on_with_one_in_the_middle_of_a_step(
    cache: TinyCache, on_two: Path, stopped: tuple[Path, list[str]]
) -> None:
    folder = stopped[0] / ACCUMULATED
    assert "unstepped" in read_checkpoint(RunFolder(folder).last)
    train(resumed(cache, folder), say=lambda line: None)
    assert_same_run(folder, on_two / ACCUMULATED)


# --- what goes wrong ---------------------------------------------------------------------------------------------


def dies(given: TrainConfig, ranks: Ranks, say: Say) -> RunResult | None:
    """Rank 1 is killed in its sixth batch."""

    def killed(self: losses.Journal, parts: Any, seen: list[int] = []) -> None:  # noqa: B006  # it is to remember
        seen.append(1)
        if len(seen) == 6 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ADD(self, parts)

    losses.Journal.add = killed  # type: ignore[method-assign]
    return train_on_rank(given, ranks, say)


def test_a_rank_that_dies_ends_the_others_and_is_named(cache: TinyCache, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(RankLost) as error:
        run_on_ranks(2, dies, configured(cache, tmp_path / "run", FIFO, devices=2), lines.append, cuda=False)
    assert error.value.what == "rank 1 of 2 was ended by SIGKILL; the others were stopped"
    assert error.value.way_out.startswith(f"continue: emkum train --cache {cache.path} --run-dir {tmp_path / 'run'}")
    assert "fewer --devices" in error.value.way_out
    assert "on 2 processes of the CPU in float32, seed 0" in lines
    assert read_checkpoint(RunFolder(tmp_path / "run").last)["global_step"] == 5
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_a_batch_that_cannot_be_shared_out_is_refused_by_its_number(cache: TinyCache, tmp_path: Path) -> None:
    config = configured(cache, tmp_path / "run", FIFO, devices=2)
    with pytest.raises(UsageError, match="a batch of 7 cannot be shared out evenly among 2 ranks") as error:
        train(replace(config, overrides=(*config.overrides, "training.batch=7")), say=lambda line: None)
    assert error.value.way_out == "use a multiple of 2: --set training.batch=8"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "what", "way_out"),
    [
        ({"devices": 0}, "--devices 0", "give 1 or more"),
        ({"devices": 2, "device": "cuda:1"}, "--device cuda:1 with --devices 2", "CUDA_VISIBLE_DEVICES"),
        ({"devices": 2, "device": "cuda"}, "--devices 2: this machine has 1 GPU", "use --devices 1"),
    ],
)
def test_devices_that_are_not_there_are_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], what: str, way_out: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError) as error:
        TrainConfig(**changes)
    assert error.value.what == what
    assert way_out in error.value.way_out


def test_the_command_stops_all_ranks_and_leaves_no_process(cache: TinyCache, tmp_path: Path) -> None:
    """`emkum train --devices 2` whose terminal goes ends with 75; killed, its ranks end too and free the folder."""
    words = [sys.executable, "-m", "emkum.cli", "train", "--cache", str(cache.path), "--recipe", "ssmke"]
    for override in (*SMALL, "training.epochs=100000", "evaluation.every_epochs=1000"):
        words += ["--set", override]
    words += ["--run-dir", str(tmp_path / "run"), "--device", "cpu", "--devices", "2", "--logger", "none"]
    for number, code in ((signal.SIGHUP, 75), (signal.SIGKILL, -signal.SIGKILL)):
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
            _wait_for(lambda: _rows(tmp_path / "run") > 3, process)
            process.send_signal(number)
            _, said = process.communicate(timeout=120)
        assert process.returncode == code, said
        if number == signal.SIGHUP:
            assert "Interrupted: SIGTERM at step" in said
            words += ["--resume"]
            (tmp_path / "run" / "metrics.jsonl").write_text("")
    _wait_for(lambda: _is_free(tmp_path / "run"), None)


def _rows(folder: Path) -> int:
    return len((folder / "metrics.jsonl").read_text().splitlines()) if (folder / "metrics.jsonl").exists() else 0


def _is_free(folder: Path) -> bool:
    try:
        with held(RunFolder(folder)):
            return True
    except AnotherWriter:
        return False


def _wait_for(there: Callable[[], bool], process: subprocess.Popen[str] | None, seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until, "nobody came"
        assert process is None or process.poll() is None, "the command ended early"
        time.sleep(0.1)
