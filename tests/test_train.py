"""A training run: it learns, can be stopped anywhere and goes on bit for bit, and its folder says what it was."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_cache import TinyCache, make_cache

from emkum.errors import (
    AnotherWriter,
    IncompleteCache,
    Interrupted,
    NotARun,
    ResumeMismatch,
    StorageFailure,
    UsageError,
)
from emkum.shards.ledger import with_digest, without_digest
from emkum.shards.reader import Cache
from emkum.stage2_train import losses, run_folder
from emkum.stage2_train.objectives.itc import MAX_LOG_SCALE
from emkum.stage2_train.optimiser import rate
from emkum.stage2_train.recipe import load_recipe
from emkum.stage2_train.run_folder import RunFolder, held, load_run, new_run, read_checkpoint
from emkum.stage2_train.terms import bank, regress
from emkum.stage2_train.train import Distillation, RunResult, TrainConfig, train
from emkum.stage2_train.validation import Score, make_validator

SMALL = ("training.batch=8", "training.epochs=3", "optimiser.lr=0.3", "optimiser.encoder_lr=0.05")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    return make_cache(tmp_path_factory.mktemp("train") / "cache", pictures=40, views=2, cut=1)


def configured(cache: TinyCache, run_dir: Path, recipe: str = "ssmke", *overrides: str, **changes: Any) -> TrainConfig:
    common = {"precision": "float32", "device": "cpu", "log_every": 2}
    return TrainConfig(cache.path, recipe, (*SMALL, *overrides), run_dir, **{**common, **changes})


def run(config: TrainConfig) -> tuple[RunResult, list[str]]:
    lines: list[str] = []
    return train(config, say=lines.append), lines


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def untimed(folder: Path) -> list[list[str]]:
    """The metrics less what depends on the clock."""
    clock = ("seconds", "samples_per_second", "waited")
    return [[value for name, value in row.items() if name not in clock] for row in metrics(folder)]


def checkpoint(folder: Path) -> dict[str, Any]:
    return read_checkpoint(RunFolder(folder).last)


def same(a: Any, b: Any) -> bool:
    """Bit for bit, tensors and containers alike."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sends this process a signal while the given steps (of the process, from 1) are computed."""

    def plan(*steps: int, number: int = signal.SIGINT) -> None:
        add, seen = losses.Journal.add, [0]

        def counting(self: losses.Journal, parts: Any) -> None:
            seen[0] += 1
            if seen[0] in steps:
                os.kill(os.getpid(), number)
            add(self, parts)

        monkeypatch.setattr(losses.Journal, "add", counting)

    return plan


# --- it learns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "overrides", "loss"),
    [
        ("ssmke", ["optimiser.lr=0.05"], "loss"),
        ("ssmke", ["optimiser.lr=0.1", "objectives.ctl.bank=16"], "loss"),
        ("itc-only", ["optimiser.lr=0.05", "data.captions=all"], "itc"),
        ("cls-mse", ["optimiser.lr=0.05"], "cls_mse"),
        ("image-kd", [], "layers_mse"),
        ("text-kd", [], "layers_mse"),
    ],
)
def test_training_lowers_the_loss(
    cache: TinyCache, tmp_path: Path, recipe: str, overrides: list[str], loss: str
) -> None:
    run(configured(cache, tmp_path / "run", recipe, "training.epochs=10", *overrides))
    values = [float(row[loss]) for row in metrics(tmp_path / "run") if row[loss]]
    assert np.mean(values[-3:]) < 0.9 * np.mean(values[:3])


def test_the_log_shows_both_halves_of_each_term_their_accuracy_and_the_learned_scale(
    cache: TinyCache, tmp_path: Path
) -> None:
    run(configured(cache, tmp_path / "run"))
    row = metrics(tmp_path / "run")[0]
    for term in ("itc", "ctl"):
        half = (float(row[f"{term}_image"]) + float(row[f"{term}_text"])) / 2
        assert float(row[term]) == pytest.approx(half, rel=1e-5)
        assert 0 <= float(row[f"{term}_image_accuracy"]) <= 1
        assert float(row[f"{term}_scale"]) == pytest.approx(1 / 0.07, rel=0.5)
    assert float(row["loss"]) == pytest.approx(float(row["itc"]) + float(row["ctl"]), rel=1e-5)


def test_the_summary_says_what_is_trained_on_what(cache: TinyCache, tmp_path: Path) -> None:
    _, lines = run(configured(cache, tmp_path / "run", "ssmke", "training.batch=16"))
    text = "\n".join(lines)
    assert "recipe ssmke: itc + ctl" in text
    assert "reads image/tinyvit@1/tokens, text/tinybert/ids, teacher/tinyvit/image/cls" in text
    assert "train: 40 pictures with captions, 2 views" in text
    assert "2 batches of 16 an epoch (8 samples of each shuffle are left over), 6 steps in all" in text
    assert "bank of ctl: all 80 targets of the split" in text
    assert "validated every 1 epochs on val: 12 pictures, 24 captions" in text
    assert "text embedding              0 trained          720 frozen" in text
    assert "on cpu in float32, seed 0" in text
    assert re.search(
        r"step 2 of 6: loss \d+\.\d+, [\d.]+ samples/s, waits for data \d+ %( \(\w+\))?; mean recall [\d.]+, the", text
    )
    assert f"next: emkum evaluate {tmp_path / 'run'} --cache {cache.path}" in text


def test_without_a_recipe_the_one_that_fits_is_taken_and_named(cache: TinyCache, tmp_path: Path) -> None:
    _, lines = run(replace(configured(cache, tmp_path / "run"), recipe=None))
    assert "recipe ssmke: itc + ctl (the cache has picture-caption pairs and a teacher's image CLS)" in lines


def test_nothing_of_lightning_is_printed(
    cache: TinyCache, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        run(configured(cache, tmp_path / "run"))
    out = capfd.readouterr()
    assert out.out == ""
    assert "ightning" not in out.err
    assert "GPU" not in out.err
    assert not [record for record in caplog.records if "lightning" in record.name]


# --- the folder --------------------------------------------------------------------------------------------------


def test_the_run_folder_holds_recipe_metrics_checkpoints_and_a_student_that_loads(
    cache: TinyCache, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    result, _ = run(configured(cache, folder))
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found >= {
        "recipe.toml",
        "run.json",
        "metrics.csv",
        "student.safetensors",
        "student.json",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
    }
    assert any(name.startswith("tensorboard/events.out.tfevents") for name in found)
    assert not any("lightning_logs" in name or "version_0" in name or name.endswith(".tmp") for name in found)
    info = json.loads((folder / "run.json").read_text())
    assert info["status"] == "finished"
    assert info["cache"]["uuid"] == info["identity"]["cache"]
    assert set(info["cache"]["fields"]) == {
        "image/tinyvit@1/tokens",
        "text/tinybert/ids",
        "teacher/tinyvit/image/cls",
    }
    assert info["steps"] == info["total_steps"] == result.steps == 15
    assert info["samples_per_second"] > 0
    assert info["peak_memory_bytes"] > 10**7
    assert info["parameters"]["head"] == {"trainable": 17 * 16, "frozen": 0}
    assert info["command"].startswith(f"emkum train --cache {cache.path} --recipe ssmke --set training.batch=8")
    assert load_recipe(folder / "recipe.toml").to_json() == {**info["recipe"], "name": "ssmke"}
    loaded = load_run(folder)
    assert loaded.cache_path == cache.path
    assert loaded.recipe.name == "ssmke"
    assert not loaded.student.training


def test_best_is_the_student_of_the_best_validation_and_last_the_last(cache: TinyCache, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result, _ = run(configured(cache, folder, "ssmke", "training.epochs=6"))
    scores = {int(row["step"]): float(row["val_mean_recall"]) for row in metrics(folder) if row["val_mean_recall"]}
    assert len(scores) == 6
    assert result.score == pytest.approx(max(scores.values()))
    assert scores[result.best_step] == max(scores.values())
    best, last = load_run(folder, "best").student.state_dict(), load_run(folder, "last").student.state_dict()
    kept = read_checkpoint(RunFolder(folder).best)["state_dict"]
    assert same(best, {k.removeprefix("student."): v for k, v in kept.items() if k.startswith("student.")})
    assert same(best, last) == (result.best_step == result.steps)


def test_the_validation_score_is_what_evaluation_says_of_the_same_student(cache: TinyCache, tmp_path: Path) -> None:
    from emkum.stage2_train.evaluate.run import evaluate_cache

    result, _ = run(configured(cache, tmp_path / "run"))
    found = evaluate_cache(load_run(tmp_path / "run"), split="val")
    assert found["retrieval"]["mean"] == pytest.approx(result.score)


def test_the_validation_loss_does_not_depend_on_its_batches(cache: TinyCache, tmp_path: Path) -> None:
    results = [run(configured(cache, tmp_path / b, "text-kd", f"evaluation.batch={b}"))[0] for b in ("5", "24")]
    assert results[0].score == pytest.approx(results[1].score, rel=1e-6)
    assert results[0].score_name == "validation loss"


def test_without_a_validation_split_the_last_student_counts(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", val_pictures=0)
    result, lines = run(configured(made, tmp_path / "run"))
    assert result.score is None
    assert result.best_step == result.steps
    assert "nothing to validate on in a split 'val': the last student is the best" in lines
    assert same(
        load_run(tmp_path / "run").student.state_dict(), load_run(tmp_path / "run", "last").student.state_dict()
    )


def test_a_folder_that_holds_a_run_is_not_written_over(cache: TinyCache, tmp_path: Path) -> None:
    run(configured(cache, tmp_path / "run"))
    with pytest.raises(UsageError) as error:
        run(configured(cache, tmp_path / "run"))
    assert error.value.what == f"{tmp_path / 'run'} holds a run already"
    assert "--resume" in error.value.way_out


def test_runs_without_a_name_get_the_recipes_and_a_number(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [run(replace(configured(cache, tmp_path), run_dir=None))[0].run_dir for _ in range(2)]
    assert folders == [Path("runs/ssmke"), Path("runs/ssmke-2")]


@pytest.mark.parametrize("missing", ["run.json", "student.json", "student.safetensors"])
def test_a_folder_without_a_run_is_refused(cache: TinyCache, tmp_path: Path, missing: str) -> None:
    run(configured(cache, tmp_path / "run"))
    (tmp_path / "run" / missing).unlink()
    with pytest.raises(NotARun):
        load_run(tmp_path / "run")


# --- stopping and going on ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(cache: TinyCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every kind of state: a FIFO bank, draws of captions and views, validation, a schedule."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(configured(cache, folder, "ssmke", "objectives.ctl.bank=20"))
    return folder


@pytest.mark.parametrize("stops", [(1,), (4,), (5,), (7, 1, 2), (14,), (3, 8)])
def test_a_run_stopped_anywhere_goes_on_bit_for_bit(
    cache: TinyCache, tmp_path: Path, uninterrupted: Path, signal_at: Callable[..., None], stops: tuple[int, ...]
) -> None:
    folder = tmp_path / "run"
    config = configured(cache, folder, "ssmke", "objectives.ctl.bank=20")
    for stop in stops:
        signal_at(stop)
        with pytest.raises(Interrupted) as error:
            run(config)
        assert error.value.exit_code == 75
        assert "checkpoint written" in error.value.what
        assert f"--run-dir {folder} --resume" in error.value.way_out
        assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
        config = TrainConfig(cache.path, run_dir=folder, resume=True, device="cpu", log_every=2, threads=3)
        signal_at()
    result, _ = run(config)
    whole, ours = checkpoint(uninterrupted), checkpoint(folder)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert same(whole[part], ours[part]), part
    assert whole["emkum"]["best_score"] == ours["emkum"]["best_score"]
    assert same(load_run(uninterrupted).student.state_dict(), load_run(folder).student.state_dict())
    assert result.steps == 15
    assert untimed(folder) == untimed(uninterrupted)


@pytest.mark.parametrize("recipe", ["image-kd", "text-kd"])
def test_so_does_one_of_another_kind_in_bfloat16(
    cache: TinyCache, tmp_path: Path, signal_at: Callable[..., None], recipe: str
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run(configured(cache, whole, recipe, precision="bfloat16"))
    signal_at(7)
    with pytest.raises(Interrupted):
        run(configured(cache, folder, recipe, precision="bfloat16"))
    signal_at()
    run(TrainConfig(cache.path, run_dir=folder, resume=True, device="cpu", log_every=2))
    assert same(checkpoint(whole)["state_dict"], checkpoint(folder)["state_dict"])
    assert untimed(whole) == untimed(folder)


def test_sigterm_stops_as_sigint_does_and_old_handlers_come_back(
    cache: TinyCache, tmp_path: Path, signal_at: Callable[..., None]
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signal_at(3, number=signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM at step 3 of 15; checkpoint written"):
        run(configured(cache, tmp_path / "run"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


KILLED = """
import os, signal, sys
from pathlib import Path
from emkum.stage2_train import losses
from emkum.stage2_train.train import TrainConfig, train

add, seen = losses.Journal.add, [0]

def dying(self, parts):
    seen[0] += 1
    if seen[0] == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, parts)

losses.Journal.add = dying
cache, folder, *overrides = sys.argv[1:]
train(TrainConfig(Path(cache), "ssmke", tuple(overrides), Path(folder), precision="float32", device="cpu", log_every=2))
"""


def test_a_killed_run_goes_on_from_its_last_checkpoint(cache: TinyCache, tmp_path: Path, uninterrupted: Path) -> None:
    """SIGKILL of a process of its own: no handler runs, and the folder, lock included, stays as it lies."""
    folder = tmp_path / "run"
    words = [sys.executable, "-c", KILLED, str(cache.path), str(folder), *SMALL, "objectives.ctl.bank=20"]
    assert subprocess.run(words, capture_output=True).returncode == -signal.SIGKILL
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    assert checkpoint(folder)["global_step"] == 5
    torn = folder / "checkpoints" / ".last.ckpt.0123.tmp"
    torn.write_bytes(b"half of it")
    os.utime(torn, (0, 0))
    run(TrainConfig(cache.path, run_dir=folder, resume=True, device="cpu", log_every=2))
    assert same(checkpoint(uninterrupted)["state_dict"], checkpoint(folder)["state_dict"])
    assert untimed(folder) == untimed(uninterrupted)
    assert not list(folder.rglob("*.tmp"))


def test_a_run_that_died_before_its_first_checkpoint_starts_again(
    cache: TinyCache, tmp_path: Path, uninterrupted: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "checkpoints")
    run(TrainConfig(cache.path, run_dir=folder, resume=True, device="cpu"))
    assert same(checkpoint(uninterrupted)["state_dict"], checkpoint(folder)["state_dict"])


def test_a_finished_run_is_left_as_it_is(cache: TinyCache, tmp_path: Path, uninterrupted: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    before = (folder / "checkpoints" / "last.ckpt").read_bytes()
    result, lines = run(TrainConfig(cache.path, run_dir=folder, resume=True, device="cpu"))
    assert lines[-1] == f"{folder} is trained to its last step, 15, already"
    assert result.steps == 15
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == before


def test_a_damaged_last_checkpoint_gives_way_to_the_best_one(
    cache: TinyCache, tmp_path: Path, uninterrupted: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    _, lines = run(TrainConfig(cache.path, run_dir=folder, resume=True, device="cpu"))
    assert any(line.startswith(f"warning: checkpoint {last} cannot be read") for line in lines)
    assert same(checkpoint(uninterrupted)["state_dict"], checkpoint(folder)["state_dict"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"recipe": "itc-only"}, "recipe.name: ssmke in the run, itc-only now"),
        ({"overrides": ("training.batch=4",)}, "recipe.training.batch: 8 in the run, 4 now"),
        ({"seed": 1}, "seed: 0 in the run, 1 now"),
        ({"max_steps": 20}, "steps: 15 in the run, 20 now"),
        ({"precision": "bfloat16"}, "precision: float32 in the run, bfloat16 now"),
    ],
)
def test_another_recipe_or_seed_is_refused_with_both_values(
    cache: TinyCache, uninterrupted: Path, changes: dict[str, Any], expected: str
) -> None:
    config = TrainConfig(cache.path, run_dir=uninterrupted, resume=True, device="cpu")
    with pytest.raises(ResumeMismatch) as error:
        run(replace(config, **changes))
    assert expected in error.value.what
    assert error.value.exit_code == 5
    assert f"emkum train --cache {cache.path} --run-dir {uninterrupted} --resume" in error.value.way_out


def test_a_run_of_before_a_key_of_recipes_existed_goes_on_with_its_default(
    cache: TinyCache, tmp_path: Path, uninterrupted: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(uninterrupted, folder.dir)
    info, kept = json.loads(folder.info.read_text()), read_checkpoint(folder.last)
    for recipe in (info["recipe"], info["identity"]["recipe"], kept["emkum"]["identity"]["recipe"]):
        del recipe["training"]["accumulate"]
    folder.info.write_text(json.dumps(info))
    run_folder.write_checkpoint(kept, folder.last)
    _, lines = run(TrainConfig(cache.path, run_dir=folder.dir, resume=True, device="cpu"))
    assert lines[-1] == f"{folder.dir} is trained to its last step, 15, already"


def test_another_cache_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "cache", pictures=40, views=2, cut=1)
    with pytest.raises(ResumeMismatch, match=r"cache: [0-9a-f]+ in the run, [0-9a-f]+ now"):
        run(TrainConfig(other.path, run_dir=uninterrupted, resume=True, device="cpu"))


@contextlib.contextmanager
def without(receipts: list[Path]) -> Iterator[None]:
    """The cache as it was before these blocks were extracted."""
    kept = {path: path.read_bytes() for path in receipts}
    for path in receipts:
        path.unlink()
    yield
    for path, data in kept.items():
        path.write_bytes(data)


def test_a_cache_that_got_a_second_view_is_refused(tmp_path: Path) -> None:
    made, folder = make_cache(tmp_path / "cache", views=2, cut=1), tmp_path / "run"
    with without(sorted((made.path / "_emkum/receipts").rglob("*-1.json"))):
        run(configured(made, folder, "cls-mse"))
    with pytest.raises(ResumeMismatch, match="views: 1 in the run, 2 now"):
        run(TrainConfig(made.path, run_dir=folder, resume=True, device="cpu"))


def test_a_validation_split_that_grew_is_refused(tmp_path: Path) -> None:
    made, folder = make_cache(tmp_path / "cache", val_pictures=24, cut=1), tmp_path / "run"
    with without([made.path / "_emkum/receipts/image/tinyvit@1/tokens/000003-0.json"]):
        run(configured(made, folder, "cls-mse", allow_partial=True))
    with pytest.raises(ResumeMismatch) as error:
        run(TrainConfig(made.path, run_dir=folder, resume=True, device="cpu"))
    assert re.search(r"validation.digest: \w{64} in the run, \w{64} now", error.value.what)
    assert re.search(r"validation.rows.image/tinyvit@1/tokens: \d+ in the run, 24 now", error.value.what)


def test_views_of_one_half_of_a_split_only_name_the_way_out(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", views=2, cut=1)
    with without([made.path / "_emkum/receipts/image/tinyvit@1/tokens/000000-1.json"]):
        with pytest.raises(IncompleteCache) as error:
            run(configured(made, tmp_path / "run", "cls-mse"))
        assert "as view 0 is complete, on that alone: --set data.views=first" in error.value.way_out
        assert not (tmp_path / "run").exists()
        run(configured(made, tmp_path / "run", "cls-mse", "data.views=first"))


IN_IDENTITY = {"cache", "recipe", "overrides", "seed", "precision", "live", "max_steps", "shuffle", "mix_blocks"}
PLACE_OR_SPEED = {
    "run_dir", "device", "data", "resume", "threads", "prefetch", "log_every", "checkpoint_minutes", "verify",
    "activation_checkpointing", "chunk", "compile", "devices", "loggers", "fast_dev_run",
    "allow_partial",  # the rows it lets in are in the identity
}  # fmt: skip


def test_every_field_of_the_configuration_is_in_the_identity_or_changes_no_number(
    cache: TinyCache, uninterrupted: Path, tmp_path: Path
) -> None:
    assert {field.name for field in fields(TrainConfig)} == IN_IDENTITY | PLACE_OR_SPEED
    identity = json.loads((uninterrupted / "run.json").read_text())["identity"]
    assert set(identity) == {
        "recipe", "cache", "fields", "samples", "views", "rows", "steps", "seed", "precision", "live", "shuffle",
        "validation",
    }  # fmt: skip
    other = make_cache(tmp_path / "cache", pictures=40, views=2, cut=1)
    changes: dict[str, Any] = {
        "cache": other.path, "recipe": "itc-only", "overrides": ("optimiser.lr=0.2",), "seed": 3,
        "precision": "bfloat16", "max_steps": 4, "shuffle": "blocks",
    }  # fmt: skip
    for name in sorted(IN_IDENTITY - {"live", "mix_blocks"}):  # tests/test_live.py, tests/test_shuffle.py
        config = TrainConfig(cache.path, run_dir=uninterrupted, resume=True, device="cpu")
        with pytest.raises(ResumeMismatch):
            run(replace(config, **{name: changes[name]}))


# --- one process a folder ----------------------------------------------------------------------------------------


def test_a_folder_somebody_trains_in_is_refused(cache: TinyCache, tmp_path: Path, uninterrupted: Path) -> None:
    with held(RunFolder(uninterrupted)):
        with pytest.raises(AnotherWriter, match=f"another process is training in {uninterrupted}") as error:
            run(TrainConfig(cache.path, run_dir=uninterrupted, resume=True, device="cpu"))
        assert error.value.exit_code == 6
    (tmp_path / "run").mkdir()
    with held(RunFolder(tmp_path / "run")), pytest.raises(AnotherWriter):
        run(configured(cache, tmp_path / "run"))


def test_two_runs_that_begin_at_once_get_two_folders_and_none_stays_of_a_run_that_did_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with new_run(None, "a") as first, new_run(None, "a") as second:
        assert (first.dir, second.dir) == (Path("runs/a"), Path("runs/a-2"))
        second.info.write_text("{}")
    assert not Path("runs/a").exists()
    assert Path("runs/a-2").exists()


# --- what the folder keeps whole ---------------------------------------------------------------------------------


def test_damage_to_the_last_checkpoint_in_place_is_no_damage_to_the_best(
    cache: TinyCache, tmp_path: Path, uninterrupted: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(uninterrupted, folder.dir)
    assert not folder.last.samefile(folder.best)
    with folder.last.open("r+b") as file:
        file.write(b"x" * 1000)
    read_checkpoint(folder.best)


def test_a_best_checkpoint_that_was_not_copied_yet_is_made_again(
    cache: TinyCache, tmp_path: Path, uninterrupted: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(uninterrupted, folder.dir)
    kept = read_checkpoint(folder.last)
    kept["emkum"]["best_step"] = kept["global_step"]
    run_folder.write_checkpoint(kept, folder.last)
    folder.best.unlink()
    run(TrainConfig(cache.path, run_dir=folder.dir, resume=True, device="cpu"))
    assert folder.best.read_bytes() == folder.last.read_bytes()


def test_without_a_checkpoint_that_can_be_read_it_says_what_to_do(
    cache: TinyCache, tmp_path: Path, uninterrupted: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(uninterrupted, folder.dir)
    folder.last.write_bytes(b"x")
    folder.previous.write_bytes(b"")
    folder.best.unlink()
    with pytest.raises(NotARun) as error:
        run(TrainConfig(cache.path, run_dir=folder.dir, resume=True, device="cpu"))
    assert error.value.what == (
        f"no checkpoint is left: checkpoint {folder.last} cannot be read: of 1 bytes, it does not end in the digest "
        f"that emkum writes; checkpoint {folder.previous} cannot be read: of 0 bytes, it does not end in the digest "
        "that emkum writes"
    )
    assert "the run was started with: emkum train --cache" in error.value.way_out


def test_metrics_of_other_columns_are_refused_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.csv", list[str]()
    path.write_text("step,loss\n1,0.5\n2,0.4\n3\n9,0.1\n")
    run_folder.MetricsFile(path, ["loss"], 2, said.append)
    assert path.read_text() == "step,loss\n1,0.5\n2,0.4\n"
    assert said == [f"warning: line 4 of {path} cannot be read and is left out: '3'"]
    with pytest.raises(ResumeMismatch, match="has the columns step,loss; this run writes step,loss,itc"):
        run_folder.MetricsFile(path, ["loss", "itc"], 2, said.append)
    assert path.read_text() == "step,loss\n1,0.5\n2,0.4\n"


@pytest.mark.parametrize("key", ["identity", "continue", "precision"])
def test_a_run_json_that_lacks_a_key_is_not_a_run(
    cache: TinyCache, tmp_path: Path, uninterrupted: Path, key: str
) -> None:
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(uninterrupted, folder.dir)
    info = json.loads(folder.info.read_text())
    del info[key]
    folder.info.write_text(json.dumps(info))
    with pytest.raises(NotARun, match=f"it lacks {key}"):
        run(TrainConfig(cache.path, run_dir=folder.dir, resume=True, device="cpu"))


def test_commands_are_quoted_and_a_resumed_run_keeps_the_one_that_started_it(
    cache: TinyCache, tmp_path: Path, signal_at: Callable[..., None]
) -> None:
    folder = tmp_path / "a run"
    config = configured(cache, folder, "ssmke", "optimiser.betas=[0.8, 0.9]", threads=3, activation_checkpointing=True)
    signal_at(4)
    with pytest.raises(Interrupted):
        run(config)
    signal_at()
    first = json.loads((folder / "run.json").read_text())
    words = shlex.split(first["command"])
    assert words[words.index("optimiser.betas=[0.8, 0.9]") - 1] == "--set"
    assert words[-5:] == ["--device", "cpu", "--threads", "3", "--activation-checkpointing"]
    assert shlex.split(first["continue"])[4:7] == ["--run-dir", str(folder), "--resume"]
    run(TrainConfig(cache.path, run_dir=folder, resume=True, device="cpu"))
    last = json.loads((folder / "run.json").read_text())
    assert last["command"] == first["command"]
    assert [session["from_step"] for session in last["sessions"]] == [0, 4]
    assert "--resume" in last["sessions"][1]["command"]


def test_a_second_signal_ends_at_once_and_the_folder_says_interrupted(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = losses.Journal.add

    def twice(self: losses.Journal, parts: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        add(self, parts)

    monkeypatch.setattr(losses.Journal, "add", twice)
    with pytest.raises(Interrupted, match="stopped at once by a second signal"):
        run(configured(cache, tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"


def test_no_checkpoint_is_written_of_weights_that_are_not_numbers(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal_at: Callable[..., None]
) -> None:
    steps = [0]

    def poison(self: Any) -> None:
        steps[0] += 1
        if steps[0] == 7:  # after its loss: only the weights show it
            self.student.norm.bias.data.fill_(torch.nan)

    step = Distillation.optimizer_step

    def stepping(self: Distillation, *args: Any) -> None:
        step(self, *args)
        poison(self)

    monkeypatch.setattr(Distillation, "optimizer_step", stepping)
    signal_at(7)
    with pytest.raises(UsageError, match="training diverged: weights are not finite after step 7"):
        run(configured(cache, tmp_path / "run"))
    assert checkpoint(tmp_path / "run")["global_step"] == 5


def test_a_validation_that_is_not_a_number_stops_the_run(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad(*args: Any, **options: Any) -> Any:
        return replace(make_validator(*args, **options), run=lambda: Score(float("nan"), {}))

    monkeypatch.setattr("emkum.stage2_train.train.make_validator", bad)
    with pytest.raises(UsageError, match="training diverged: the validation loss is nan after step 5"):
        run(configured(cache, tmp_path / "run", "text-kd", "training.batch=16"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_learned_scale_itself_stays_at_most_100(cache: TinyCache, tmp_path: Path) -> None:
    run(configured(cache, tmp_path / "run", "ssmke", "objectives.itc.temperature=0.01", "optimiser.lr=1"))
    found = checkpoint(tmp_path / "run")["state_dict"]
    assert max(float(found[f"terms.terms.{term}.log_scale"]) for term in ("itc", "ctl")) <= MAX_LOG_SCALE + 1e-6
    assert max(float(row["itc_scale"]) for row in metrics(tmp_path / "run") if row["itc_scale"]) <= 100.001


def test_a_teacher_that_read_other_tokens_is_refused_for_text_kd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_cache(tmp_path / "cache", fields=("ids", "text_layers"))
    field_of = Cache.field

    def altered(self: Cache, name: str) -> Any:
        field = field_of(self, name)
        field.fingerprint = field.fingerprint | ({"max_tokens": 64} if name.endswith("text/layers") else {})
        return field

    monkeypatch.setattr(Cache, "field", altered)
    with pytest.raises(UsageError, match=r"text/tinybert/ids has max_tokens None, .*text/layers has 64"):
        run(configured(made, tmp_path / "run", "text-kd"))
    assert not (tmp_path / "run").exists()


def test_a_bank_that_costs_too_much_is_refused_with_its_bill(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank, "BANK_LIMIT_BYTES", 8 * 60 * bank.LOGIT_BYTES)
    with pytest.raises(UsageError) as error:
        run(configured(cache, tmp_path / "run", "ssmke", "objectives.ctl.bank=all"))
    assert "objectives.ctl.bank = all: a batch of 8 against 80 rows takes 15,360 bytes" in error.value.what
    assert error.value.way_out == "use fewer rows: --set objectives.ctl.bank=60"


def test_another_split_with_pairs_is_seen_when_no_recipe_is_named(cache: TinyCache, tmp_path: Path) -> None:
    config = replace(configured(cache, tmp_path / "run", "", "data.split=val"), recipe=None)
    assert run(config)[0].recipe == "ssmke"


def test_resuming_where_no_run_is_says_so(cache: TinyCache, tmp_path: Path) -> None:
    with pytest.raises(NotARun, match="holds no training run"):
        run(TrainConfig(cache.path, run_dir=tmp_path, resume=True))
    with pytest.raises(UsageError, match="--resume without --run-dir"):
        TrainConfig(cache.path, resume=True)


def test_checkpoints_load_without_running_code_from_them(uninterrupted: Path) -> None:
    for name in ("last", "best"):
        found = torch.load(uninterrupted / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert found["emkum"]["identity"]["seed"] == 0


def test_a_checkpoint_that_cannot_be_written_stops_the_run_and_the_old_one_stays(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = tmp_path / "run", run_folder.DurableFile.write
    wrote: list[str] = []

    def full(self: Any, data: Any) -> None:
        if "last.ckpt" in self.path.name:
            wrote.append("last")
            if len(wrote) == 2:
                raise StorageFailure(f"no room to write {self.path}: No space left on device")
        write(self, data)

    monkeypatch.setattr(run_folder.DurableFile, "write", full)
    with pytest.raises(StorageFailure, match="No space left") as error:
        run(configured(cache, folder))
    assert error.value.way_out.startswith("make room, then continue: emkum train --cache")
    assert checkpoint(folder)["global_step"] == 5
    assert not list(folder.rglob("*.tmp"))
    info = json.loads((folder / "run.json").read_text())
    assert (info["status"], "No space left" in info["error"]) == ("failed", True)


def test_a_loss_that_is_not_a_number_stops_the_run(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regress, "layers_mse", lambda student, *_: student.mean() * torch.nan)
    with pytest.raises(UsageError, match="training diverged: the loss is nan at step"):
        run(
            configured(cache, tmp_path / "run", "text-kd", "objectives.layers-mse.weight=1e38", "optimiser.clip_norm=0")
        )


# --- schedule, groups, sizes -------------------------------------------------------------------------------------


def test_the_rate_warms_up_and_falls_as_a_cosine() -> None:
    recipe = load_recipe("ssmke")
    rates = [rate(recipe, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert max(rates) <= 1.0
    constant = load_recipe("ssmke", ["optimiser.schedule=constant", "optimiser.warmup=0"])
    assert {rate(constant, step, 100) for step in range(100)} == {1.0}
    assert rate(load_recipe("ssmke", ["optimiser.final_lr=0.1"]), 100, 100) == pytest.approx(0.1)


def test_rates_grow_with_the_batch_and_vectors_do_not_decay(cache: TinyCache, tmp_path: Path) -> None:
    run(configured(cache, tmp_path / "run", "ssmke", "training.batch=16", "student.image_blocks=1"))
    groups = checkpoint(tmp_path / "run")["optimizer_states"][0]["param_groups"]
    found = {(group["initial_lr"], group["weight_decay"]) for group in groups}
    new, pretrained = 0.3 * 16 / 256, 0.05 * 16 / 256
    assert found == {(new, 0.0), (new, 0.01), (pretrained, 0.0), (pretrained, 0.01)}


def test_a_teacher_with_other_tokens_is_refused_for_layers_mse(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", fields=("tokens", "layers"))
    record = made.path / "_emkum/fields/teacher/tinyvit/image/layers.json"
    content = without_digest(json.loads(record.read_text()))
    content["arrays"]["values"]["row_shape"] = [7, 16]
    record.write_text(json.dumps(with_digest(content)))
    with pytest.raises(UsageError, match="has 7 tokens of 16 channels, the student 5 of 16"):
        run(configured(made, tmp_path / "run", "image-kd", "student.image_blocks=1"))


def test_max_steps_replaces_the_epochs(cache: TinyCache, tmp_path: Path) -> None:
    result, _ = run(configured(cache, tmp_path / "run", max_steps=7))
    assert result.steps == 7
    assert [row["step"] for row in metrics(tmp_path / "run") if row["loss"]] == ["2", "4", "5", "6", "7"]


def test_bfloat16_trains_too(cache: TinyCache, tmp_path: Path) -> None:
    result, lines = run(configured(cache, tmp_path / "run", precision="bfloat16"))
    assert "on cpu in bfloat16, seed 0" in lines
    assert result.steps == 15
