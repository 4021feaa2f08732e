"""CACHE -> STUDENT: one training run, from recipe and cache to a run folder.

B batch, T tokens, L text tokens, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import platform
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import lightning
import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from tqdm import tqdm

import emkum
from emkum.errors import Interrupted, StorageFailure, UsageError
from emkum.models.network import Network, load_saved
from emkum.models.passes import FrozenPass, Wanted, good_compute
from emkum.shards.durable import write_file
from emkum.shards.reader import Cache
from emkum.stage2_train.live import LiveSource
from emkum.stage2_train.loader import (
    Batch,
    BatchLoader,
    BatchSource,
    CachedSource,
    HostBatch,
    Prefix,
    SampleTable,
    TrainOrder,
    sample_table,
)
from emkum.stage2_train.losses import Journal, Terms, autocast, bank_in_words, make_bank, part_names, step_losses
from emkum.stage2_train.recipe import (
    BATCH_OF_RATES,
    FieldNames,
    Recipe,
    choose_recipe,
    load_recipe,
    recipe_from_table,
    required_fields,
)
from emkum.stage2_train.resume import (
    ResumePoint,
    check_same_run,
    continue_command,
    restore_rng,
    resume_point,
    rng_state,
    run_identity,
    start_command,
)
from emkum.stage2_train.run_folder import (
    MetricsFile,
    RunFolder,
    copy_durably,
    git_revision,
    new_run_dir,
    read_checkpoint,
    read_info,
    write_checkpoint,
    write_info,
    write_student,
)
from emkum.stage2_train.student import PRETRAINED_PARTS, Student, build_student, parameter_table
from emkum.stage2_train.validation import Validator, make_validator

LIGHTNING_ABOUT_ITSELF = (r"`isinstance\(treespec, LeafSpec\)` is deprecated",)  # warnings it causes, as patterns
Say = Callable[[str], None]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainConfig:
    """One `emkum train`. Everything that can change the student is in recipe, overrides, seed, precision, live.

    recipe None: what the cache's fields allow, or, on resume, the run's. seed None: 0, or the run's. precision
    "auto": bfloat16 where the device is good at it, else float32, or the run's. max_steps: a length in steps that
    replaces the recipe's epochs. data: where the source tars lie now, for `live`.
    """

    cache: Path = Path("shards")
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    run_dir: Path | None = None
    seed: int | None = None
    precision: Precision = "auto"
    device: str = "auto"
    live: bool = False
    data: tuple[str, ...] = ()
    resume: bool = False
    allow_partial: bool = False
    max_steps: int | None = None
    threads: int = 2
    prefetch: int = 3
    log_every: int = 10
    checkpoint_minutes: float = 10.0
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        _require(self.seed is None or 0 <= self.seed < 2**63, f"--seed {self.seed}", "give a number from 0")
        known = ("auto", "float32", "bfloat16")
        _require(self.precision in known, f"--precision {self.precision}", f"choose one of {', '.join(known)}")
        _require(self.max_steps is None or self.max_steps > 0, f"--max-steps {self.max_steps}", "give 1 or more")
        _require(self.threads > 0, f"--threads {self.threads}", "give 1 or more")
        _require(self.prefetch > 0, f"--prefetch {self.prefetch}", "give 1 or more")
        _require(self.log_every > 0, f"--log-every {self.log_every}", "give 1 or more")
        _require(not self.resume or self.run_dir is not None, "--resume without --run-dir", "name the run's folder")


@dataclass(frozen=True)
class RunResult:
    """What a training gave. score: by validation, None where the cache has no split to validate on."""

    run_dir: Path
    recipe: str
    steps: int
    score_name: str
    score: float | None
    best_step: int
    seconds: float
    samples_per_second: float
    waited_fraction: float
    peak_memory_bytes: int


def _require(good: bool, what: str, way_out: str) -> None:
    if not good:
        raise UsageError(what, way_out)


# --- the run -----------------------------------------------------------------------------------------------------


def train(config: TrainConfig, say: Say = print) -> RunResult:
    """Train the recipe's student from the cache. `say` receives one line a step of the run.

    Raises the errors of emkum.errors: UnknownRecipe, MissingField, MissingCaptions, IncompleteCache, NotARun,
    ResumeMismatch, StorageFailure; Interrupted after SIGINT or SIGTERM, when a checkpoint has been written.
    """
    before = read_info(RunFolder(config.run_dir)) if config.resume and config.run_dir else None
    run = _set_up(config, before)
    if before is not None:
        check_same_run(before, run.identity, config)
    dir_path = config.run_dir if before is not None else new_run_dir(config.run_dir, run.recipe.name)
    folder = RunFolder(dir_path or Path())
    point = resume_point(folder, before, say)
    validator = make_validator(
        run.student,
        run.recipe,
        run.cache,
        run.names,
        run.prefix,
        run.compute,
        run.device,
        allow_partial=config.allow_partial,
        threads=config.threads,
    )
    info = _info(run, folder)
    for line in _summary(run, info, validator):
        say(line)
    if point is not None and point.step == len(run.order):
        say(f"{folder.dir} is trained to its last step, {point.step}, already")
        info = {**info, **point.measured, "status": "finished"}
        write_info(folder, info)
        return _result_of(folder, info)

    write_file(folder.recipe, f"# As run; run.json says how.\n\n{run.recipe.to_toml()}".encode())
    loader = BatchLoader(
        run.order, run.source, threads=config.threads, prefetch=config.prefetch, pin=run.device.type == "cuda"
    )
    keeper = RunKeeper(run, folder, info, loader, validator, point, say)
    with _quiet_lightning(), keeper:
        # One pass over a loader that knows the epochs itself: so every resume is the same, in the middle of a pass.
        trainer = Trainer(
            accelerator="gpu" if run.device.type == "cuda" else "cpu",
            devices=[run.device.index or 0] if run.device.type == "cuda" else 1,
            max_epochs=1,
            gradient_clip_val=run.recipe.optimiser.clip_norm or None,
            callbacks=[keeper],
            plugins=[DurableCheckpoints(), LightningEnvironment()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder.dir,
        )
        trainer.fit(Distillation(run), loader, ckpt_path=point.path if point else None)
    return keeper.finish()


# --- one step ----------------------------------------------------------------------------------------------------


class Distillation(LightningModule):
    """Lightning's view of a run: step, optimiser, schedule."""

    def __init__(self, run: Setup) -> None:
        super().__init__()
        self.student, self.terms = run.student, run.terms
        self.recipe, self.source, self.compute = run.recipe, run.source, run.compute
        self.num_steps = len(run.order)
        self.journal = Journal()

    def transfer_batch_to_device(self, batch: HostBatch, device: torch.device, dataloader_idx: int) -> Batch:
        return self.source.prepare(batch, device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with autocast(self.compute, self.device):
            losses = step_losses(self.student, self.terms, self.recipe, batch)
        self.journal.add({"loss": losses.total, **losses.parts})
        return losses.total

    def configure_optimizers(self) -> Any:
        optimiser = torch.optim.AdamW(
            parameter_groups(self.student, self.terms, self.recipe),
            betas=self.recipe.optimiser.betas,
            eps=self.recipe.optimiser.eps,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(self.recipe, step, self.num_steps))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def parameter_groups(student: Student, terms: Terms, recipe: Recipe) -> list[dict[str, Any]]:
    """Four groups: pretrained blocks and new parts, each with and without weight decay.

    Vectors (biases, norms, LayerScale), scales, token types, position tables and relative biases do not decay.
    """
    pretrained = {id(p) for part in PRETRAINED_PARTS for p in student.parts().get(part, [])}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in [*student.named_parameters(), *terms.named_parameters()]:
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not any(word in name for word in ("types", "positions", "biases."))
            groups.setdefault((id(parameter) in pretrained, decays), []).append(parameter)
    scale, wanted = recipe.training.batch / BATCH_OF_RATES, recipe.optimiser
    return [
        {
            "params": parameters,
            "lr": (wanted.encoder_lr if encoder else wanted.lr) * scale,
            "weight_decay": wanted.weight_decay if decays else 0.0,
        }
        for (encoder, decays), parameters in groups.items()
    ]


def rate(recipe: Recipe, step: int, num_steps: int) -> float:
    """The fraction of the learning rate at `step` (from 0): linear warm-up, then cosine to `final_lr` or constant."""
    wanted = recipe.optimiser
    warmup = math.ceil(wanted.warmup * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if wanted.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    return wanted.final_lr + (1 - wanted.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


# --- what happens between steps ----------------------------------------------------------------------------------


class RunKeeper(Callback):
    """Between steps: logs, validates, writes checkpoints, stops on a signal; a context manager for those signals."""

    def __init__(
        self,
        run: Setup,
        folder: RunFolder,
        info: dict[str, Any],
        loader: BatchLoader,
        validator: Validator | None,
        point: ResumePoint | None,
        say: Say,
    ) -> None:
        self.config, self.recipe, self.order = run.config, run.recipe, run.order
        self.folder, self.info, self.loader, self.validator, self.say = folder, info, loader, validator, say
        self.point, self.start_step = point, point.step if point else 0
        self.best_score: float | None = None
        self.best_step = 0
        self.before = Spent()  # in earlier sessions of this run
        self.validation_seconds = 0.0
        self.stop_signal = ""
        self._rng: dict[str, Any] | None = None
        self._handlers: dict[int, Any] = {}

    # signals

    def __enter__(self) -> RunKeeper:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.stop_signal:
            raise self._interrupted("stopped at once by a second signal; steps since the last checkpoint are lost")
        self.stop_signal = signal.Signals(number).name

    def _interrupted(self, what: str) -> Interrupted:
        return Interrupted(what, f"continue: {self.info['continue']}")

    # Lightning's hooks, in the order they are called

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint["emkum"]
        self.best_score, self.best_step = kept["best_score"], kept["best_step"]
        self.before, self._rng = Spent(**kept["spent"]), kept["rng"]
        if self.point is not None and self.point.path == self.folder.last and self.best_step == self.start_step:
            copy_durably(self.folder.last, self.folder.best)  # the last session may have died just before this

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._rng is not None:
            restore_rng(self._rng)
        columns = ["epoch", "lr", "seconds", "samples_per_second", "waited", *part_names(self.recipe)]
        columns += self.validator.columns if self.validator else ()
        resumed = self.start_step or None
        self.metrics = MetricsFile(self.folder.metrics, columns, resumed)
        self.board = TensorBoardLogger(
            self.folder.dir, name="", version="tensorboard", purge_step=None if resumed is None else resumed + 1
        )
        write_info(self.folder, {**self.info, "status": "running"})
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self.now = ""
        self.started = self.logged = self.saved = time.perf_counter()
        self.logged_step, self.logged_waited = self.start_step, 0.0
        self.bar = tqdm(
            total=len(self.order), initial=self.start_step, unit="step", dynamic_ncols=True, disable=None, leave=False
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Distillation)
        step = trainer.global_step
        last = step == len(self.order)
        scored = last or step % (self.order.steps_per_epoch * self.recipe.evaluation.every_epochs) == 0
        if scored or step % self.config.log_every == 0:
            self._log(pl_module, step)
        if scored:
            self._score(trainer, pl_module, step)
        elif self.stop_signal or time.perf_counter() - self.saved > 60 * self.config.checkpoint_minutes:
            self._save(trainer)
        if self.stop_signal and not last:
            write_info(self.folder, {**self.info, **self._measured(step), "status": "interrupted"})
            raise self._interrupted(f"{self.stop_signal} at step {step} of {len(self.order)}; checkpoint written")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["emkum"] = {
            "identity": self.info["identity"],
            "best_score": self.best_score,
            "best_step": self.best_step,
            "spent": dataclasses.asdict(self._spent(trainer.global_step)),
            "measured": self._measured(trainer.global_step),
            "rng": rng_state(),
        }

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Interrupted) and hasattr(self, "started"):
            with contextlib.suppress(StorageFailure):  # the first failure is the one to report
                write_info(self.folder, {**self.info, "status": "failed", "error": str(exception)})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if hasattr(self, "bar"):
            self.bar.close()
            self.board.finalize("")

    # the work

    def _log(self, module: Distillation, step: int) -> None:
        values = module.journal.take()
        now = time.perf_counter()
        seconds, steps = max(now - self.logged, 1e-9), step - self.logged_step
        waited = (self.loader.waited_seconds - self.logged_waited) / seconds
        if not math.isfinite(values["loss"]):
            raise UsageError(
                f"training diverged: the loss is {values['loss']} at step {step}",
                "lower the rate, for example --set optimiser.lr=1e-4, or train with --precision float32",
            )
        speed = steps * self.order.batch / seconds
        rates = {
            "epoch": (step - 1) // self.order.steps_per_epoch + 1,
            "lr": self.recipe.optimiser.lr * self._batch_scale * rate(self.recipe, step - 1, len(self.order)),
            "seconds": self._spent(step).seconds,
            "samples_per_second": speed,
            "waited": waited,
        }
        self._write(step, {**rates, **values})
        self.bar.update(step - self.bar.n)
        self.now = f"loss {values['loss']:.4f}, {speed:.1f} samples/s, waits for data {100 * waited:.0f} %"
        self.bar.set_postfix_str(self.now)
        self.logged, self.logged_step, self.logged_waited = now, step, self.loader.waited_seconds

    @property
    def _batch_scale(self) -> float:
        return self.order.batch / BATCH_OF_RATES

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        self.metrics.append(step, values)
        self.board.log_metrics(dict(values), step)

    def _score(self, trainer: Trainer, module: Distillation, step: int) -> None:
        """Validate, keep the student if it is the best yet (or if nothing can say), and write a checkpoint."""
        started = time.perf_counter()
        best, found = self.validator is None, ""
        if self.validator is not None:
            score = self.validator.run()
            self._write(step, score.numbers)
            best = self.validator.better(score.value, self.best_score)
            if best:
                self.best_score = score.value
            found = f"; {self.validator.name} {score.value:.4g}" + (", the best so far" if best else "")
        self.bar.clear()
        self.say(f"step {step} of {len(self.order)}: {self.now}{found}")
        if best:
            self.best_step = step
            write_student(self.folder, module.student)
        spent = time.perf_counter() - started
        self.validation_seconds += spent
        self.logged += spent  # the speed in the log is of training alone
        self._save(trainer)
        if best:
            copy_durably(self.folder.last, self.folder.best)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.folder.last)
        self.saved = time.perf_counter()

    def _spent(self, step: int) -> Spent:
        """Times of the whole run, earlier sessions included."""
        seconds = time.perf_counter() - self.started
        return Spent(
            self.before.seconds + seconds,
            self.before.training_seconds + seconds - self.validation_seconds,
            self.before.waited_seconds + self.loader.waited_seconds,
        )

    def _measured(self, step: int) -> dict[str, Any]:
        spent = self._spent(step)
        training_seconds = max(spent.training_seconds, 1e-9)
        return {
            "steps": step,
            "seconds": spent.seconds,
            "samples_per_second": step * self.order.batch / training_seconds,
            "waited_fraction": spent.waited_seconds / training_seconds,
            "peak_memory_bytes": peak_memory_bytes(torch.device(self.info["device"])),
            "score": {
                "name": self.validator.name if self.validator else "",
                "value": self.best_score,
                "step": self.best_step,
                "split": self.recipe.evaluation.split if self.validator else None,
            },
        }

    def finish(self) -> RunResult:
        """The last lines and run.json of a run that came to its end."""
        info = {**self.info, **self._measured(len(self.order)), "status": "finished"}
        write_info(self.folder, info)
        result = _result_of(self.folder, info)
        self.say(
            f"trained {result.steps} steps in {result.seconds:.0f} s: {result.samples_per_second:.1f} samples/s, "
            f"{100 * result.waited_fraction:.1f} % of the time waiting for data; peak memory "
            f"{result.peak_memory_bytes / 2**30:.2f} GiB"
        )
        best = (
            f"{result.score_name} {result.score:.4g} at step {result.best_step}: " if result.score is not None else ""
        )
        self.say(f"{best}{self.folder.weights}")
        self.say(f"next: emkum evaluate {self.folder.dir} --cache {self.config.cache}")
        return result


@dataclass(frozen=True)
class Spent:
    """Seconds of a run: all of them, those outside of validation, and those in which a step waited for its batch."""

    seconds: float = 0.0
    training_seconds: float = 0.0
    waited_seconds: float = 0.0


def _result_of(folder: RunFolder, info: Mapping[str, Any]) -> RunResult:
    return RunResult(
        run_dir=folder.dir,
        recipe=info["recipe"]["name"],
        steps=info["steps"],
        score_name=info["score"]["name"],
        score=info["score"]["value"],
        best_step=info["score"]["step"],
        seconds=info["seconds"],
        samples_per_second=info["samples_per_second"],
        waited_fraction=info["waited_fraction"],
        peak_memory_bytes=info["peak_memory_bytes"],
    )


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held on the device; on the CPU, of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)


class DurableCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole and read without running code from them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))


# --- setting up --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """Everything a run needs, ready. `why`: the reason for the recipe where the user named none."""

    config: TrainConfig
    cache: Cache
    recipe: Recipe
    why: str
    names: FieldNames
    seed: int
    device: torch.device
    compute: str
    table: SampleTable
    order: TrainOrder
    student: Student
    terms: Terms
    source: BatchSource
    prefix: Prefix | None
    identity: dict[str, Any]


def _set_up(config: TrainConfig, before: Mapping[str, Any] | None) -> Setup:
    """Reads recipe and cache and builds the student. `before`: run.json of the run to continue; its choices stand."""
    cache = Cache.open(config.cache)
    recipe, why = _recipe(config, cache, before)
    if before is not None:  # before anything that another recipe would trip over
        check_same_run(before, {**before["identity"], "recipe": recipe.to_json()}, config)
    names = required_fields(recipe, cache)
    device = _device(config.device)
    compute = _compute(config, before, device)
    seed = config.seed if config.seed is not None else int(before["seed"]) if before else 0

    table = sample_table(cache, recipe, names, recipe.data.split, allow_partial=config.allow_partial)
    order = TrainOrder(table, recipe.training.batch, seed, recipe.data.captions)
    order.num_steps = recipe.training.epochs * order.steps_per_epoch
    if config.max_steps or before:
        order.num_steps = config.max_steps or int(before["total_steps"] if before else 0)

    image_network = load_saved(cache.model_dir(names.encoder)) if names.encoder else None
    text_network = load_saved(cache.model_dir(names.text_encoder)) if names.text_encoder else None
    _check_target_shape(cache, recipe, names, image_network, text_network)
    target_width = cache.field(names.targets).row_shape[-1] if names.targets and recipe.kind == "pairs" else None
    student = build_student(recipe, names, image_network, text_network, target_width, seed)
    student.checkpoint_activations(config.activation_checkpointing)

    prefix = frozen_prefix(image_network, names.cut, compute, device) if image_network and names.live_prefix else None
    source: BatchSource
    if config.live:
        source = LiveSource(cache, names, table, device, config.data)
    else:
        source = CachedSource(cache, names, table, prefix)
    terms = Terms(recipe, make_bank(recipe, table, source, target_width))
    identity = run_identity(recipe, cache, names, table, len(order), seed, compute, config.live)
    return Setup(
        config,
        cache,
        recipe,
        why,
        names,
        seed,
        device,
        compute,
        table,
        order,
        student,
        terms,
        source,
        prefix,
        identity,
    )


def _recipe(config: TrainConfig, cache: Cache, before: Mapping[str, Any] | None) -> tuple[Recipe, str]:
    """The recipe, and why it was chosen if the user named none."""
    if config.recipe is not None:
        return load_recipe(config.recipe, config.overrides), ""
    if before is not None:
        return recipe_from_table(before["recipe"], config.overrides), "the run's own"
    name, why = choose_recipe(cache)
    return load_recipe(name, config.overrides), why


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used here: {error}".splitlines()[0], "use --device cpu") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: training runs on cpu and cuda", "use --device cpu")
    return device


def _compute(config: TrainConfig, before: Mapping[str, Any] | None, device: torch.device) -> str:
    if config.precision != "auto":
        return config.precision
    return str(before["precision"]) if before is not None else good_compute(device)


def _check_target_shape(
    cache: Cache, recipe: Recipe, names: FieldNames, image_network: Network | None, text_network: Network | None
) -> None:
    """layers-mse compares token by token: raise UsageError where teacher and student differ in tokens or width."""
    if recipe.objectives.layers_mse is None or names.targets is None:
        return
    teacher = cache.field(names.targets).row_shape
    network = image_network or text_network
    assert network is not None
    student: tuple[int, ...] = (teacher[0], network.width)
    if names.inputs is not None and not names.live_prefix:
        student = cache.field(names.inputs).row_shape
    if tuple(teacher) != tuple(student):
        raise UsageError(
            f"{names.targets} has {teacher[0]} tokens of {teacher[1]} channels, the student {student[0]} of "
            f"{student[1]}: layers-mse compares them one by one",
            "choose a teacher with the encoder's patch size and width, or the encoder itself",
        )


def frozen_prefix(network: Network, cut: int, compute: str, device: torch.device) -> Prefix:
    """uint8 crops [B, y, x, 3] -> tokens_BTD, float32: the frozen network up to the cut, for caches that keep crops."""
    frozen = FrozenPass([network], [Wanted(network.name, "tokens", cut)], compute, device)
    # A copy outside of inference mode, which autograd may save.
    return lambda crops: frozen.pictures(crops)[0].clone()


def _info(run: Setup, folder: RunFolder) -> dict[str, Any]:
    """What run.json says from the start; measurements are added at the end."""
    cuda = run.device.type == "cuda"
    return {
        "command": start_command(run.config, run.recipe, run.seed, folder.dir),
        "continue": continue_command(run.config, folder.dir),
        "recipe": run.recipe.to_json(),
        "cache": {
            "path": str(run.config.cache.resolve()),
            "uuid": run.cache.uuid,
            "fields": run.identity["fields"],
            "supervision": _supervision(run.cache, run.names),
        },
        "identity": run.identity,
        "seed": run.seed,
        "precision": run.compute,
        "device": str(run.device),
        "device_name": torch.cuda.get_device_name(run.device) if cuda else platform.processor() or platform.machine(),
        "live": run.config.live,
        "samples": run.table.num_samples,
        "steps_per_epoch": run.order.steps_per_epoch,
        "total_steps": len(run.order),
        "bank": bank_in_words(run.terms.bank),
        "parameters": {
            count.part: {"trainable": count.trainable, "frozen": count.frozen} for count in parameter_table(run.student)
        },
        "git_revision": git_revision(),
        "versions": {
            "emkum": emkum.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "lightning": str(lightning.__version__),
            "numpy": np.__version__,
        },
    }


def _supervision(cache: Cache, names: FieldNames) -> dict[str, Any]:
    """What each field's network was trained on, as its record says: it goes on into the student."""
    found = {}
    for name in names.needed():
        environment = cache.field(name).record.get("environment", {})
        kept = {key: environment[key] for key in ("source", "licence", "supervision") if key in environment}
        if kept:
            found[name] = kept
    return found


def _summary(run: Setup, info: Mapping[str, Any], validator: Validator | None) -> list[str]:
    recipe, table, order = run.recipe, run.table, run.order
    what = {"pairs": "pictures with captions", "images": "pictures", "texts": "texts"}[recipe.kind]
    units = f"{order.units:,} captions of " if order.units != table.num_samples else ""
    views = f", {table.num_views} views" if table.num_views > 1 else ""
    dropped = f"; {table.dropped:,} more left out, as a field or a partner is lacking" if table.dropped else ""
    left = order.units - order.steps_per_epoch * order.batch
    lines = [
        f"recipe {recipe.name}: {' + '.join(recipe.terms).replace('_', '-')}" + (f" ({run.why})" if run.why else ""),
        f"reads {', '.join(run.names.needed())}",
        f"{table.split}: {units}{table.num_samples:,} {what}{views}{dropped}",
        f"{order.steps_per_epoch} batches of {order.batch} an epoch ({left} samples of each shuffle are left over), "
        f"{len(order)} steps in all",
    ]
    if info["bank"]:
        lines.append(f"bank of ctl: {info['bank']}")
    if validator is not None:
        lines.append(f"validated every {recipe.evaluation.every_epochs} epochs on {validator.on}")
    else:
        lines.append(f"nothing to validate on in a split {recipe.evaluation.split!r}: the last student is the best")
    trainable = frozen = 0
    for part, counts in info["parameters"].items():
        lines.append(f"  {part:16} {counts['trainable']:>12,} trained {counts['frozen']:>12,} frozen")
        trainable, frozen = trainable + counts["trainable"], frozen + counts["frozen"]
    lines.append(f"  {'student':16} {trainable:>12,} trained {frozen:>12,} frozen")
    lines.append(f"on {info['device']} in {info['precision']}, seed {info['seed']}")
    return lines


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning's own lines (devices found, tips) are not ours to print; its errors still come as exceptions.

    Of warnings, only those that Lightning's code raises about itself are silenced, each by its words.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for words in LIGHTNING_ABOUT_ITSELF:
                warnings.filterwarnings("ignore", message=words)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
