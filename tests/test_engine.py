"""The engine around a step: averages of weights, rates by layer, best scores, early stops, loggers, short trials."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_cache import TinyCache, make_cache

from emkum.errors import Interrupted, MissingPackage, NotARun, OutOfMemory, UsageError
from emkum.shards.reader import Cache
from emkum.stage2_train import losses, run_log
from emkum.stage2_train.averaging import start_average, update_average
from emkum.stage2_train.distillation import Distillation
from emkum.stage2_train.optimiser import gradient_norms, norm_names, parameter_groups
from emkum.stage2_train.plan import make_plan
from emkum.stage2_train.recipe import load_recipe
from emkum.stage2_train.run_folder import RunFolder, load_run, read_checkpoint
from emkum.stage2_train.train import RunResult, TrainConfig, train
from emkum.stage2_train.validation import Score, Validator

SMALL = ("training.batch=8", "training.epochs=3", "optimiser.lr=0.02", "optimiser.encoder_lr=0.005")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    return make_cache(tmp_path_factory.mktemp("engine") / "cache", pictures=40, cut=1)


def configured(cache: TinyCache, run_dir: Path | None, recipe: str, *overrides: str, **changes: Any) -> TrainConfig:
    common = {"precision": "float32", "device": "cpu", "log_every": 2, "loggers": ("none",)}
    return TrainConfig(cache.path, recipe, (*SMALL, *overrides), run_dir, **{**common, **changes})


def run(config: TrainConfig) -> tuple[RunResult, list[str]]:
    lines: list[str] = []
    return train(config, say=lines.append), lines


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def info(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run.json").read_text()))


def weights(folder: Path, prefix: str = "student.") -> dict[str, torch.Tensor]:
    kept = read_checkpoint(RunFolder(folder).last)["state_dict"]
    return {name.removeprefix(prefix): tensor for name, tensor in kept.items() if name.startswith(prefix)}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sends this process SIGINT while the given batch of the process, from 1, is computed; 0: none."""
    add = losses.Journal.add

    def plan(batch: int) -> None:
        seen = [0]

        def counting(self: losses.Journal, parts: Any) -> None:
            seen[0] += 1
            if seen[0] == batch:
                os.kill(os.getpid(), signal.SIGINT)
            add(self, parts)

        monkeypatch.setattr(losses.Journal, "add", counting)

    return plan


# --- the average of weights --------------------------------------------------------------------------------------


def test_the_average_follows_every_trained_weight_by_its_equation(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a plain loop in float64 over the weights after each step, from those of the start."""
    seen: list[dict[str, torch.Tensor]] = []
    step = Distillation.optimizer_step

    def stepping(self: Distillation, *args: Any) -> None:
        if not seen:
            seen.append({name: tensor.double().clone() for name, tensor in self.student.state_dict().items()})
        step(self, *args)
        seen.append({name: tensor.double().clone() for name, tensor in self.student.state_dict().items()})

    monkeypatch.setattr(Distillation, "optimizer_step", stepping)
    run(configured(cache, tmp_path / "run", "image-kd", "training.ema=0.6"))
    expected = seen[0]
    for number, now in enumerate(seen[1:], start=1):
        decay = min(0.6, (1 + number) / (10 + number))
        expected = {name: decay * expected[name] + (1 - decay) * now[name] for name in expected}
    assert len(seen) == 16
    found = weights(tmp_path / "run", "average.")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not equal(found, weights(tmp_path / "run"))


def test_the_decay_grows_to_what_was_asked(cache: TinyCache) -> None:
    student = make_plan(configured(cache, None, "image-kd"), None).student
    average = start_average(student)
    assert not any(parameter.requires_grad for parameter in average.parameters())
    name, trained = next((n, p) for n, p in student.named_parameters() if p.requires_grad)
    before = trained.detach().clone()
    with torch.no_grad():
        trained += 1
    for step, share in ((1, 9 / 11), (10**9, 0.001)):
        update_average(average, student, 0.999, step)
        moved = (average.get_parameter(name) - before).mean().item()
        assert moved == pytest.approx(share, rel=1e-3)
        average.load_state_dict({**average.state_dict(), name: before})


@pytest.mark.parametrize(("recipe", "column"), [("ssmke", "ema_val_mean_recall"), ("text-kd", "ema_val_loss")])
def test_the_average_is_scored_beside_the_student_and_kept_beside_it(
    cache: TinyCache, tmp_path: Path, recipe: str, column: str
) -> None:
    folder = tmp_path / "run"
    _, lines = run(configured(cache, folder, recipe, "training.ema=0.5", f"evaluation.best={column}"))
    scores = {int(row["step"]): float(row[column]) for row in metrics(folder) if row[column]}
    best = (max if recipe == "ssmke" else min)(scores.values())
    score = info(folder)["score"]
    assert score["value"] == pytest.approx(best, rel=1e-6)
    assert score["column"] == column
    assert "of averaged weights" in score["name"]
    assert scores[score["step"]] == pytest.approx(best, rel=1e-6)
    assert any(str(row[column]) != str(row[column.removeprefix("ema_")]) for row in metrics(folder) if row[column])
    kept = read_checkpoint(RunFolder(folder).best)["state_dict"]
    for which, prefix in (("ema", "average."), ("best", "student.")):
        expected = {n.removeprefix(prefix): t for n, t in kept.items() if n.startswith(prefix)}
        assert equal(dict(load_run(folder, which).student.state_dict()), expected)
    assert str(folder / "student-ema.safetensors") in "\n".join(lines)


def test_a_run_without_an_average_has_none_to_load(cache: TinyCache, tmp_path: Path) -> None:
    run(configured(cache, tmp_path / "run", "image-kd"))
    assert not (tmp_path / "run" / "student-ema.safetensors").exists()
    with pytest.raises(NotARun) as error:
        load_run(tmp_path / "run", "ema")
    assert error.value.what == f"{tmp_path / 'run'} holds no average of weights (no student-ema.safetensors)"
    assert error.value.way_out == "train with one: --set training.ema=0.9999"


EVERYTHING = (
    "training.ema=0.7", "training.batch=4", "training.accumulate=2", "optimiser.layer_decay=0.6",
    "optimiser.text_encoder_lr=0.01", "optimiser.shared_lr=0.03", "optimiser.clip_norm=0.5", "evaluation.patience=3",
)  # fmt: skip


@pytest.mark.parametrize("batch", [1, 13, 14])
def test_with_everything_on_a_stopped_run_is_the_one_that_was_not(
    cache: TinyCache, tmp_path: Path, interrupted_at: Callable[[int], None], batch: int
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run(configured(cache, whole, "ssmke", *EVERYTHING))
    interrupted_at(batch)
    with pytest.raises(Interrupted):
        run(configured(cache, folder, "ssmke", *EVERYTHING))
    interrupted_at(0)
    run(TrainConfig(cache.path, run_dir=folder, resume=True, device="cpu", log_every=2, loggers=("none",)))
    for prefix in ("student.", "average.", "terms."):
        assert weights(whole, prefix)
        ours, theirs = weights(folder, prefix), weights(whole, prefix)
        assert equal(*({n: t for n, t in found.items() if isinstance(t, torch.Tensor)} for found in (ours, theirs)))
    clock = ("seconds", "samples_per_second", "waited")
    ours, theirs = ([{n: v for n, v in row.items() if n not in clock} for row in metrics(f)] for f in (folder, whole))
    assert ours == theirs
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [int(row["step"]) for row in theirs]


# --- rates -------------------------------------------------------------------------------------------------------


def groups_by_name(cache: TinyCache, *overrides: str) -> dict[str, float]:
    plan = make_plan(configured(cache, None, "ssmke", *overrides), None)
    groups = parameter_groups(plan.student, plan.terms, plan.recipe)
    names = {id(p): name for module in (plan.student, plan.terms) for name, p in module.named_parameters()}
    scale = plan.recipe.training.step_batch / 256
    found = {names[id(p)]: group["lr"] / scale for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    return found


def test_each_part_has_the_rate_that_the_recipe_gives_it(cache: TinyCache) -> None:
    rates = groups_by_name(cache, "optimiser.image_encoder_lr=0.001", "optimiser.shared_lr=0.003")
    for name, rate in rates.items():
        side = name.split(".")[0]
        own = {"image_blocks": 0.001, "text_blocks": 0.005, "shared_blocks": 0.003}
        assert rate == pytest.approx(own.get(side, 0.02)), name
    assert {name.split(".")[0] for name in rates} >= {"image_blocks", "text_blocks", "shared_blocks", "head"}


def test_blocks_have_less_of_the_rate_the_deeper_they_lie(cache: TinyCache) -> None:
    """tinybert has four blocks: the last one has 0.5 of the encoder's rate, the first 0.5 ** 4, the embedding ** 5."""
    rates = groups_by_name(cache, "optimiser.layer_decay=0.5", "student.train_embeddings=true")
    for number in range(4):
        found = {rate for name, rate in rates.items() if name.startswith(f"text_blocks.blocks.{number}.")}
        assert sorted(found) == [pytest.approx(0.005 * 0.5 ** (4 - number))]
    embedding = {rate for name, rate in rates.items() if name.startswith("text_embedding.")}
    assert sorted(embedding) == [pytest.approx(0.005 * 0.5**5)]
    assert {rate for name, rate in rates.items() if name.startswith(("shared_blocks.", "head."))} == {0.02}


def test_without_such_keys_groups_are_those_of_older_checkpoints(cache: TinyCache) -> None:
    """The optimiser's state in a checkpoint goes by the place of a parameter in its groups."""
    plan = make_plan(configured(cache, None, "ssmke", "optimiser.lr=0.005"), None)
    groups = parameter_groups(plan.student, plan.terms, plan.recipe)
    assert len(groups) == 4
    assert {group["lr"] for group in groups} == {0.005 * 8 / 256}


def test_gradient_norms_are_logged_as_they_were_before_clipping(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: dict[int, float] = {}
    clip = Distillation.configure_gradient_clipping

    def measuring(self: Distillation, optimizer: Any, *args: Any, **options: Any) -> None:
        gradients = [p.grad.double() for _, p in self.named_parameters() if p.grad is not None]
        expected[self.trainer.global_step + 1] = float(sum(g.square().sum() for g in gradients) ** 0.5)
        clip(self, optimizer, *args, **options)

    monkeypatch.setattr(Distillation, "configure_gradient_clipping", measuring)
    run(configured(cache, tmp_path / "run", "ssmke", "optimiser.clip_norm=0.01", log_every=3))
    rows = [row for row in metrics(tmp_path / "run") if row["lr"]]
    assert [int(row["step"]) for row in rows] == [3, 5, 6, 9, 10, 12, 15]
    parts = [name for name in rows[0] if name.startswith("grad_norm_")]
    assert {"grad_norm_image_blocks", "grad_norm_text_blocks", "grad_norm_shared_blocks", "grad_norm_head"} <= {*parts}
    assert "grad_norm_text_embedding" not in parts  # frozen
    assert "grad_norm_objectives" in parts  # the learned scales
    for row in rows:
        assert float(row["grad_norm"]) == pytest.approx(expected[int(row["step"])], rel=1e-5)
        assert sum(float(row[part]) ** 2 for part in parts) ** 0.5 == pytest.approx(float(row["grad_norm"]), rel=1e-5)
    assert min(float(row["grad_norm"]) for row in rows) > 0.01


def test_a_part_without_a_gradient_has_norm_zero(cache: TinyCache) -> None:
    plan = make_plan(configured(cache, None, "ssmke"), None)
    found = gradient_norms(plan.student, plan.terms)
    assert list(found) == norm_names(plan.student, plan.terms)
    assert not any(float(norm) for norm in found.values())


# --- what is best, and when to stop ------------------------------------------------------------------------------


def scripted(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """Validations that say one after the other of these."""
    left = list(scores)

    def validator(*args: Any, **options: Any) -> Validator:
        return Validator(
            "mean recall",
            True,
            ("val_mean_recall",),
            "a script",
            lambda: Score(left[0], {"val_mean_recall": left.pop(0)}),
        )

    monkeypatch.setattr("emkum.stage2_train.train.make_validator", validator)


def test_a_run_ends_early_where_no_score_is_better(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [1, 3, 2, 3, 9])
    folder = tmp_path / "run"
    config = configured(cache, folder, "ssmke", "training.epochs=5", "evaluation.patience=2")
    result, lines = run(config)
    assert (result.steps, result.best_step, result.score) == (20, 10, 3)
    assert any(line.endswith("mean recall 3; no better one in 2 validations: the run ends") for line in lines)
    assert "validated every 1 epochs on a script; the run ends after 2 without a better mean recall" in lines
    assert (info(folder)["status"], info(folder)["ended_early"], info(folder)["steps"]) == ("finished", True, 20)
    assert read_checkpoint(RunFolder(folder).best)["global_step"] == 10
    again, lines = run(TrainConfig(cache.path, run_dir=folder, resume=True, device="cpu"))
    assert lines[-1] == f"{folder} is trained to its last step, 20, already, where it ended early"
    assert again.steps == 20


def test_patience_counts_on_over_a_stop(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_at: Callable[[int], None]
) -> None:
    scripted(monkeypatch, [3, 2, 1, 9])
    folder = tmp_path / "run"
    interrupted_at(12)
    with pytest.raises(Interrupted):
        run(configured(cache, folder, "ssmke", "training.epochs=5", "evaluation.patience=2"))
    interrupted_at(0)
    result, _ = run(TrainConfig(cache.path, run_dir=folder, resume=True, device="cpu"))
    assert (result.steps, result.best_step) == (15, 5)


def test_best_goes_by_the_score_that_is_named(cache: TinyCache, tmp_path: Path) -> None:
    name = "val_text_to_image_R@10"
    result, _ = run(configured(cache, tmp_path / "run", "ssmke", f"evaluation.best={name}"))
    scores = [float(row[name]) for row in metrics(tmp_path / "run") if row[name]]
    assert result.score == pytest.approx(max(scores))
    assert result.score_name == name


@pytest.mark.parametrize(
    ("override", "what", "way_out"),
    [
        (
            "evaluation.best=val_loss",
            "evaluation.best = 'val_loss' is no score of this run",
            "choose one of val_image_to",
        ),
        ("evaluation.best=ema_val_mean_recall", "is no score of this run", "with training.ema, as ema_val_mean_recall"),
    ],
)
def test_a_score_that_the_run_does_not_have_is_refused(
    cache: TinyCache, tmp_path: Path, override: str, what: str, way_out: str
) -> None:
    with pytest.raises(UsageError) as error:
        run(configured(cache, tmp_path / "run", "ssmke", override))
    assert what in error.value.what
    assert way_out in error.value.way_out


@pytest.mark.parametrize("override", ["evaluation.patience=2", "evaluation.best=val_loss"])
def test_what_goes_by_a_score_is_refused_where_there_is_none(cache: TinyCache, tmp_path: Path, override: str) -> None:
    with pytest.raises(UsageError) as error:
        run(configured(cache, tmp_path / "run", "image-kd", override, "evaluation.split=none"))
    assert "has no score to go by: there is nothing to validate on in a split 'none'" in error.value.what
    assert "name a split to validate on with --set evaluation.split=" in error.value.way_out


# --- loggers -----------------------------------------------------------------------------------------------------


def test_metrics_jsonl_has_the_lines_of_metrics_csv(cache: TinyCache, tmp_path: Path) -> None:
    run(configured(cache, tmp_path / "run", "ssmke"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: float(value) for name, value in row.items() if value} for row in metrics(tmp_path / "run")]
    assert lines == rows
    assert type(lines[0]["step"]) is int
    assert not list((tmp_path / "run").glob("tensorboard*"))  # --logger none


class Stub(types.ModuleType):
    """What emkum asks of wandb."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.given: list[dict[str, Any]] = []
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **given: Any) -> Stub:
        self.given.append(given)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.lines.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Stub:
    stub = Stub()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


@pytest.mark.parametrize(("logger", "mode"), [("wandb", None), ("wandb-offline", "offline")])
def test_weights_and_biases_gets_every_line_and_one_run_over_all_sessions(
    cache: TinyCache, tmp_path: Path, wandb: Stub, interrupted_at: Callable[[int], None], logger: str, mode: str | None
) -> None:
    folder = tmp_path / "run"
    interrupted_at(4)
    with pytest.raises(Interrupted) as error:
        run(configured(cache, folder, "image-kd", loggers=(logger,)))
    assert f"--logger {logger}" in error.value.way_out
    interrupted_at(0)
    run(TrainConfig(cache.path, run_dir=folder, resume=True, device="cpu", log_every=2, loggers=(logger,)))
    first, second = wandb.given
    assert first["id"] == second["id"] == info(folder)["wandb_id"]
    assert (first["name"], first["dir"], first["mode"]) == ("run", str(folder), mode)
    assert first["config"]["recipe"]["optimiser"]["lr"] == 0.02
    rows = [{n: float(v) for n, v in row.items() if v and n != "step"} for row in metrics(folder)]
    assert [pytest.approx(values, rel=1e-6) for _, values in wandb.lines] == rows
    assert [step for step, _ in wandb.lines] == [int(row["step"]) for row in metrics(folder)]
    assert wandb.finished == 2


def test_a_logger_that_fails_leaves_the_run_alone(cache: TinyCache, tmp_path: Path, wandb: Stub) -> None:
    def fails(values: Any, step: int) -> None:
        raise ConnectionError("the network is down\nsecond line")

    wandb.log = fails  # type: ignore[method-assign]
    _, lines = run(configured(cache, tmp_path / "run", "image-kd", loggers=("wandb",)))
    told = [line for line in lines if "Weights & Biases" in line]
    assert told == [
        "warning: Weights & Biases takes no more numbers (ConnectionError: the network is down); metrics.csv has them "
        "all"
    ]
    assert len(metrics(tmp_path / "run")) == 12


def test_weights_and_biases_that_does_not_start_is_said(cache: TinyCache, tmp_path: Path, wandb: Stub) -> None:
    def fails(**given: Any) -> Stub:
        raise RuntimeError("api_key not configured")

    wandb.init = fails  # type: ignore[method-assign]
    with pytest.raises(UsageError) as error:
        run(configured(cache, tmp_path / "run", "image-kd", loggers=("wandb",)))
    assert error.value.what == "Weights & Biases does not start: RuntimeError: api_key not configured"
    assert "--logger wandb-offline" in error.value.way_out


def test_a_logger_that_is_not_installed_is_refused_before_anything_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackage) as error:
        TrainConfig(loggers=("wandb",))
    assert error.value.what == "wandb is not installed, and --logger wandb needs it"
    assert "pip install 'emkum[wandb]'" in error.value.way_out


@pytest.mark.parametrize(
    ("loggers", "what"),
    [
        (("mlflow",), "--logger mlflow"),
        (("none", "tensorboard"), "--logger none --logger tensorboard"),
    ],
)
def test_loggers_that_cannot_be_are_refused(loggers: tuple[str, ...], what: str) -> None:
    with pytest.raises(UsageError) as error:
        TrainConfig(loggers=loggers)
    assert error.value.what == what


def test_numbers_that_json_does_not_know_are_null() -> None:
    assert json.loads(run_log._json_line({"step": 3, "a": float("nan"), "b": 0.1, "c": 2.0})) == {
        "step": 3, "a": None, "b": 0.1, "c": 2,
    }  # fmt: skip


# --- trials, and too little memory -------------------------------------------------------------------------------


def test_a_fast_dev_run_goes_from_end_to_end_and_keeps_nothing(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    result, lines = run(configured(cache, tmp_path / "run", "ssmke", fast_dev_run=True))
    assert result.steps == 3
    assert lines[-1].startswith("everything works: 3 steps, a validation (mean recall ")
    assert "a checkpoint written and read back" in lines[-1]
    assert not any(line.startswith("next: ") for line in lines)
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]


def test_a_fast_dev_run_fails_as_the_run_would(cache: TinyCache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"evaluation\.best = 'nonsense' is no score of this run"):
        run(configured(cache, None, "ssmke", "evaluation.best=nonsense", fast_dev_run=True))
    with pytest.raises(UsageError, match="--fast-dev-run with --resume"):
        TrainConfig(run_dir=tmp_path, resume=True, fast_dev_run=True)


def raising(error: BaseException) -> Callable[..., Any]:
    def raises(*args: Any, **options: Any) -> Any:
        raise error

    return raises


ERRORS = (
    torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24 GiB\nmore"
    ),
    MemoryError("Unable to allocate 3.00 GiB for an array"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_step_that_does_not_fit_names_the_flags_with_smaller_numbers(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("emkum.stage2_train.distillation.step_losses", raising(error))
    with pytest.raises(OutOfMemory) as found:
        run(configured(cache, tmp_path / "run", "ssmke", "objectives.ctl.bank=20"))
    assert found.value.what == (
        f"a batch of 8, computed at once on cpu in float32, does not fit into memory: {str(error).splitlines()[0]}"
    )
    assert found.value.way_out == (
        "use less: --chunk 4 (the same losses for one more forward pass); --activation-checkpointing (the same losses "
        "for about a third more time); --set training.batch=4 training.accumulate=2 (then itc see half the negatives); "
        "--set objectives.ctl.bank=10"
    )
    assert found.value.exit_code == 2


def test_what_is_in_use_already_is_not_advised(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emkum.stage2_train.distillation.step_losses", raising(ERRORS[0]))
    config = configured(cache, tmp_path / "run", "image-kd", "training.batch=6", "training.accumulate=2")
    with pytest.raises(OutOfMemory) as found:
        run(replace(config, chunk=1, activation_checkpointing=True))
    assert found.value.what.startswith("a batch of 6, in chunks of 1 on cpu in float32, does not fit into memory")
    assert found.value.way_out == "use less: --set training.batch=3 training.accumulate=4"


def test_a_validation_that_does_not_fit_has_a_batch_of_its_own(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emkum.stage2_train.validation.encode_rows", raising(ERRORS[0]))
    with pytest.raises(OutOfMemory) as found:
        run(configured(cache, tmp_path / "run", "ssmke", "evaluation.batch=64"))
    assert found.value.what.startswith("a validation in batches of 64 does not fit into memory")
    assert found.value.way_out == "use less: --set evaluation.batch=32"


def test_another_runtime_error_stays_what_it_is(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emkum.stage2_train.distillation.step_losses", raising(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(configured(cache, tmp_path / "run", "ssmke"))


# --- recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("training.ema=1.0", "training.ema = 1.0 is not within 0 and 1, below 1"),
        ("optimiser.layer_decay=0", "optimiser.layer_decay = 0 is not within 0.01 and 1"),
        ("optimiser.shared_lr=fast", "optimiser.shared_lr = 'fast' is not a number or 'auto'"),
        ("evaluation.patience=-1", "evaluation.patience = -1 is not >= 0"),
    ],
)
def test_values_out_of_range_are_refused(override: str, what: str) -> None:
    with pytest.raises(UsageError) as error:
        load_recipe("ssmke", [override])
    assert what in error.value.what


def test_a_run_of_before_these_keys_existed_is_continued(
    cache: TinyCache, tmp_path: Path, interrupted_at: Callable[[int], None]
) -> None:
    folder = tmp_path / "run"
    interrupted_at(7)
    with pytest.raises(Interrupted):
        run(configured(cache, folder, "ssmke"))
    interrupted_at(0)
    old = info(folder)
    for where in (old["recipe"], old["identity"]["recipe"]):
        for table, keys in (
            ("training", ("ema",)),
            ("evaluation", ("best", "patience")),
            ("optimiser", ("shared_lr",)),
        ):
            for key in keys:
                del where[table][key]
    del old["wandb_id"], old["devices"]
    (folder / "run.json").write_text(json.dumps(old))
    result, _ = run(TrainConfig(Cache.open(cache.path).path, run_dir=folder, resume=True, device="cpu", log_every=2))
    assert result.steps == 15
