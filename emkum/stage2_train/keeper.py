"""What happens between the steps of a run: log, validate, write checkpoints, stop on a signal."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from tqdm import tqdm

from emkum.errors import Interrupted, NonFiniteFeature, StorageFailure, UsageError
from emkum.shards.durable import write_file
from emkum.shards.shard_files import cores
from emkum.stage2_train.loader import BatchLoader
from emkum.stage2_train.losses import Journal, part_names
from emkum.stage2_train.optimiser import peak_rate, rate
from emkum.stage2_train.plan import Plan, Say
from emkum.stage2_train.resume import ResumePoint, restore_rng, rng_state, seed_rng
from emkum.stage2_train.run_folder import (
    MetricsFile,
    RunFolder,
    copy_durably,
    read_checkpoint,
    write_checkpoint,
    write_info,
    write_student,
)
from emkum.stage2_train.starving import Delivered, Setting, Watch, delivered
from emkum.stage2_train.validation import Validator


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


class RunKeeper(Callback):
    """Between steps: logs, validates, writes checkpoints, stops on a signal; a context manager for those signals."""

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        info: dict[str, Any],
        loader: BatchLoader,
        journal: Journal,
        validator: Validator | None,
        point: ResumePoint | None,
        say: Say,
    ) -> None:
        self.config, self.recipe, self.order, self.student = plan.config, plan.recipe, plan.order, plan.student
        self.journal = journal
        fields = [plan.cache.field(name) for name in (plan.names.inputs, plan.names.targets) if name]
        largest = max(fields, key=lambda field: field.num_bytes, default=None)
        self.storage = "" if largest is None else "crops" if largest.kind == "crops" else largest.storage
        self.folder, self.info, self.loader, self.validator, self.say = folder, info, loader, validator, say
        self.point, self.start_step = point, point.step if point else 0
        self.best_score: float | None = None
        self.best_step = 0
        self.trainer_step = self.start_step
        self.batches = self.saved_batches = 0  # those of the loader that are trained on, in this step or before it
        self.before = Spent()  # in earlier sessions of this run
        self.paused_seconds = 0.0
        self.stop_signal = ""
        self.unscored = point is not None and not point.scored  # the validation after the last step is yet to come
        self.validating = False
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
        if hasattr(self, "bar"):
            self.bar.close()
            with contextlib.suppress(OSError):  # it is a view of metrics.csv; what broke a run is on its way already
                self.board.finalize("")

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.stop_signal:
            with contextlib.suppress(StorageFailure):
                measured = self._measured(self.trainer_step) if hasattr(self, "started") else {}
                write_info(self.folder, {**self.info, **measured, "status": "interrupted"})
            raise self._interrupted("stopped at once by a second signal; steps since the last checkpoint are lost")
        self.stop_signal = signal.Signals(number).name
        if self.validating:
            raise _Stop

    def _interrupted(self, what: str) -> Interrupted:
        return Interrupted(what, f"continue: {self.info['continue']}")

    # Lightning's hooks, in the order they are called

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint["emkum"]
        self.best_score, self.best_step = kept["best_score"], kept["best_step"]
        self.before, self._rng = Spent(**kept["spent"]), kept["rng"]
        self.journal.load_state_dict(kept["journal"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._rng is not None:
            restore_rng(self._rng, pl_module.device)
        else:
            seed_rng(self.info["seed"])
        columns = ["epoch", "lr", "seconds", "samples_per_second", "waited", *part_names(self.recipe)]
        columns += self.validator.columns if self.validator else ()
        resumed = self.start_step or None
        self.metrics = MetricsFile(self.folder.metrics, columns, resumed, self.say, not self.unscored)
        self.board = TensorBoardLogger(
            self.folder.dir, name="", version="tensorboard", purge_step=None if resumed is None else resumed + 1
        )
        write_info(self.folder, {**self.info, "status": "running"})
        write_file(self.folder.recipe, f"# As run; run.json says how.\n\n{self.recipe.to_toml()}".encode())
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self.now = ""
        self.started = self.saved = time.perf_counter()
        self.logged_step, self.logged = self.start_step, delivered(self.loader, 0.0)
        self.watch = Watch(self._setting, self.start_step)
        self.batches = self.saved_batches = self.loader.step
        self.loader.while_waiting = lambda: self._stop_if_asked(trainer)
        self.bar = tqdm(
            total=len(self.order), initial=self.start_step, unit="step", dynamic_ncols=True, disable=None, leave=False
        )
        if self.unscored:
            self._score(trainer, self.start_step)
            self._stop_if_asked(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches, step = self.loader.step, trainer.global_step
        if step == self.trainer_step:  # more batches of the same step are to come
            self._stop_if_asked(trainer)
            return
        self.trainer_step = step
        last = step == len(self.order)
        scored = last or step % (self.order.steps_per_epoch * self.recipe.evaluation.every_epochs) == 0
        if starving := self.watch.look(step, self._delivered()):
            self.bar.clear()
            self.say(starving)
        if scored or step % self.config.log_every == 0:
            self._log(step)
        if scored:
            self._score(trainer, step)
        elif time.perf_counter() - self.saved > 60 * self.config.checkpoint_minutes:
            self._save(trainer)
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        """Between two batches: raise Interrupted after a signal, all that is trained on in a checkpoint.

        A run whose last step is done and scored has nothing to stop.
        """
        step = self.trainer_step
        if not self.stop_signal or (step == len(self.order) and not self.unscored):
            return
        if self.batches != self.saved_batches:
            self._save(trainer)
        write_info(self.folder, {**self.info, **self._measured(step), "status": "interrupted"})
        where = f"at step {step} of {len(self.order)}" + (", before its validation" if self.unscored else "")
        accumulate = self.recipe.training.accumulate
        if self.batches % accumulate:
            where += f" and {self.batches % accumulate} of {accumulate} batches of the next"
        kept = "checkpoint written" if self.batches else "nothing to keep yet"
        raise self._interrupted(f"{self.stop_signal} {where}; {kept}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["emkum"] = {
            "identity": self.info["identity"],
            "best_score": self.best_score,
            "best_step": self.best_step,
            "scored": not self.unscored,
            "spent": dataclasses.asdict(self._spent(trainer.global_step)),
            "measured": self._measured(trainer.global_step),
            "journal": self.journal.state_dict(),
            "rng": rng_state(pl_module.device),
        }

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Interrupted) and hasattr(self, "started"):
            with contextlib.suppress(StorageFailure):  # the first failure is the one to report
                write_info(self.folder, {**self.info, "status": "failed", "error": str(exception)})

    # the work

    def _log(self, step: int) -> None:
        values = self.journal.take()
        now = self._delivered()
        lately, steps = now.since(self.logged), step - self.logged_step
        if not math.isfinite(values["loss"]):
            raise self._diverged(f"the loss is {values['loss']} at step {step}")
        speed = steps * self.order.batch / max(lately.seconds, 1e-9)
        rates = {
            "epoch": (step - 1) // self.order.steps_per_epoch + 1,
            "lr": peak_rate(self.recipe) * rate(self.recipe, step - 1, len(self.order)),
            "seconds": self._spent(step).seconds,
            "samples_per_second": speed,
            "waited": lately.waited,
        }
        self._write(step, {**rates, **values})
        self.bar.update(step - self.bar.n)
        self.now = f"loss {values['loss']:.4f}, {speed:.1f} samples/s, {lately.in_words()}"
        self.bar.set_postfix_str(self.now)
        self.logged, self.logged_step = now, step

    def _delivered(self) -> Delivered:
        """By the loader so far, with the seconds of training alone."""
        return delivered(self.loader, time.perf_counter() - self.started - self.paused_seconds)

    def _setting(self) -> Setting:
        reading, live = self.loader.source.reading, self.config.live
        threads = reading.number if reading is not None and reading.seconds else self.loader.threads
        return Setting(threads, self.config.prefetch, self.order.shuffle.mode, self.storage, live, cores())

    def _diverged(self, what: str) -> UsageError:
        return UsageError(
            f"training diverged: {what}",
            "lower the rate, for example --set optimiser.lr=1e-4, or train with --precision float32",
        )

    def _refuse_divergence(self, step: int) -> None:
        """Raise UsageError if the loss since the last line, or a weight, is not finite: no checkpoint may keep that.

        Without writing a line: the log is the same wherever checkpoints fall.
        """
        loss = self.journal.means().get("loss", 0.0)
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss} at step {step}")
        weights = [parameter.detach() for parameter in self.student.parameters() if parameter.requires_grad]
        if not torch.stack([torch.isfinite(weight).all() for weight in weights]).all():
            raise self._diverged(f"weights are not finite after step {step}")

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        self.metrics.append(step, values)
        self.board.log_metrics(dict(values), step)

    def _score(self, trainer: Trainer, step: int) -> None:
        """Validate, keep the student if it is the best yet (or if nothing can say), and write a checkpoint.

        After a signal in the validation: return with `unscored`, for the next session to validate.
        """
        started = time.perf_counter()
        self.unscored = True
        best, found = self.validator is None, ""
        self._refuse_divergence(step)
        if self.validator is not None:
            try:
                self.validating = True
                if self.stop_signal:
                    raise _Stop
                score = self.validator.run()
            except _Stop:
                self._paused(started)
                return
            except NonFiniteFeature as error:
                raise self._diverged(f"{error.what}, in the validation after step {step}") from error
            finally:
                self.validating = False
            if not math.isfinite(score.value):
                raise self._diverged(f"the {self.validator.name} is {score.value} after step {step}")
            self._write(step, score.numbers)
            best = self.validator.better(score.value, self.best_score)
            if best:
                self.best_score = score.value
            found = f"{self.validator.name} {score.value:.4g}" + (", the best so far" if best else "")
        self.bar.clear()
        self.say(f"step {step} of {len(self.order)}: {'; '.join(filter(None, (self.now, found)))}")
        if best:
            self.best_step = step
            write_student(self.folder, self.student)
        self.unscored = False
        self._paused(started)
        self._save(trainer)
        if best:
            copy_durably(self.folder.last, self.folder.best)

    def _save(self, trainer: Trainer) -> None:
        started = time.perf_counter()
        self._refuse_divergence(trainer.global_step)
        self.metrics.sync()
        trainer.save_checkpoint(self.folder.last)
        self.saved_batches = self.batches
        self.saved = time.perf_counter()
        self._paused(started)

    def _paused(self, since: float) -> None:
        """Takes the time since then out of the speed, which is of training alone."""
        self.paused_seconds += time.perf_counter() - since

    def _spent(self, step: int) -> Spent:
        """Times of the whole run, earlier sessions included."""
        seconds = time.perf_counter() - self.started
        return Spent(
            self.before.seconds + seconds,
            self.before.training_seconds + seconds - self.paused_seconds,
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
        self.bar.close()
        info = {**self.info, **self._measured(len(self.order)), "status": "finished"}
        write_info(self.folder, info)
        result = result_of(self.folder, info)
        self.say(
            f"trained {result.steps} steps in {result.seconds:.0f} s: {result.samples_per_second:.1f} samples/s, "
            f"{100 * result.waited_fraction:.1f} % of the time waiting for data; peak memory "
            f"{result.peak_memory_bytes / 2**30:.2f} GiB"
        )
        best = (
            f"{result.score_name} {result.score:.4g} at step {result.best_step}: " if result.score is not None else ""
        )
        self.say(f"{best}{self.folder.weights}")
        split = "" if self.validator is not None else f" --split {self.recipe.data.split}"
        self.say(f"next: emkum evaluate {self.folder.dir} --cache {self.config.cache}{split}")
        return result


class _Stop(BaseException):
    """Out of a validation, from wherever it is; no handler of `Exception` on the way may take it for its own."""


@dataclass(frozen=True)
class Spent:
    """Seconds of a run: all; those outside of validation and checkpoints; those of steps waiting for their batch."""

    seconds: float = 0.0
    training_seconds: float = 0.0
    waited_seconds: float = 0.0


def result_of(folder: RunFolder, info: Mapping[str, Any]) -> RunResult:
    """The result of a run whose run.json is complete."""
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
