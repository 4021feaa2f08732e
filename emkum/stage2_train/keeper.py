"""What happens between the steps of a run: log, validate, write checkpoints, stop on a signal."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from tqdm import tqdm

from emkum.errors import Interrupted, NonFiniteFeature, StorageFailure, UsageError
from emkum.shards.durable import write_file
from emkum.shards.shard_files import cores
from emkum.stage2_train.distillation import Distillation
from emkum.stage2_train.loader import BatchLoader
from emkum.stage2_train.memory import advice_for_validation
from emkum.stage2_train.objectives.gather import alone
from emkum.stage2_train.optimiser import norm_names, peak_rate, rate
from emkum.stage2_train.plan import Plan, Say
from emkum.stage2_train.ranks import Ranks
from emkum.stage2_train.results import RunResult, Spent, peak_memory_bytes, result_lines, result_of
from emkum.stage2_train.resume import ResumePoint, restore_rng, rng_state, seed_rng
from emkum.stage2_train.run_folder import (
    RunFolder,
    copy_durably,
    read_checkpoint,
    write_checkpoint,
    write_info,
    write_student,
)
from emkum.stage2_train.run_log import RunLog
from emkum.stage2_train.starving import Delivered, Setting, Watch, delivered
from emkum.stage2_train.validation import Validator


class RunKeeper(Callback):
    """Between steps: logs, validates, writes checkpoints, stops; a context manager for the signals that ask for it.

    Of several ranks the first writes, speaks and validates; what it decides, the others do at the same step.
    """

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        info: dict[str, Any],
        loader: BatchLoader,
        module: Distillation,
        validator: Validator | None,
        point: ResumePoint | None,
        say: Say,
        ranks: Ranks = Ranks(),
    ) -> None:
        self.config, self.recipe, self.order, self.student = plan.config, plan.recipe, plan.order, plan.student
        self.module, self.journal, self.ranks = module, module.journal, ranks
        module.is_logged = self.is_logged
        fields = [plan.cache.field(name) for name in (plan.names.inputs, *plan.names.targets.values()) if name]
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
        self.stop_signal = 0  # the number of the signal that came
        self.stale = 0  # validations in a row that were not the best
        self.ended = False  # before the last step, for want of a better score
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

    def _listen_again(self) -> None:
        """Lightning puts a handler of its own in front, which calls all ranks in the middle of a step: they hang."""
        for number in self._handlers:
            signal.signal(number, self._on_signal)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if hasattr(self, "bar"):
            self.bar.close()
        if hasattr(self, "run_log"):
            self.run_log.close()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.stop_signal:
            with contextlib.suppress(StorageFailure):
                measured = self._measured(self.trainer_step) if hasattr(self, "started") else {}
                self._write_info({**measured, "status": "interrupted"})
            raise self._interrupted("stopped at once by a second signal; steps since the last checkpoint are lost")
        self.stop_signal = number
        if self.validating:
            raise _Stop

    def _interrupted(self, what: str) -> Interrupted:
        return Interrupted(what, f"continue: {self.info['continue']}")

    # Lightning's hooks, in the order they are called

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint["emkum"]
        self.best_score, self.best_step = kept["best_score"], kept["best_step"]
        self.stale = kept.get("stale", 0)
        self.before, self._rng = Spent(**kept["spent"]), kept["rng"]
        self.journal.load_state_dict(kept["journal"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen_again()
        if self._rng is not None:
            restore_rng(self._rng, pl_module.device)
        else:
            seed_rng(self.info["seed"])
        if self.ranks.leads:
            self._begin_files()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self.now = ""
        self.started = self.saved = time.perf_counter()
        self.logged_step, self.logged = self.start_step, delivered(self.loader, 0.0)
        self.watch = Watch(self._setting, self.start_step)
        self.batches = self.saved_batches = self.loader.step
        if self.ranks.number == 1:  # several stop together, between two batches
            self.loader.while_waiting = lambda: self._stop_if_asked(trainer)
        self.bar = tqdm(
            total=len(self.order),
            initial=self.start_step,
            unit="step",
            dynamic_ncols=True,
            disable=None if self.ranks.leads else True,
            leave=False,
        )
        if self.unscored:
            self._score(trainer, self.start_step)
            self._stop_if_asked(trainer)

    def _begin_files(self) -> None:
        columns = ["epoch", "lr", "seconds", "samples_per_second", "waited", *self.module.terms.columns]
        columns += norm_names(self.student, self.module.terms)
        columns += self.validator.columns if self.validator else ()
        shown = {name: self.info[name] for name in ("recipe", "seed", "precision", "versions", "wandb_id")}
        self.run_log = RunLog(
            self.folder, columns, self.start_step or None, not self.unscored, self.config.loggers, shown, self.say
        )
        self._write_info({"status": "running"})
        write_file(self.folder.recipe, f"# As run; run.json says how.\n\n{self.recipe.to_toml()}".encode())

    def is_scored(self, step: int) -> bool:
        """Whether a validation follows the step."""
        every = self.order.steps_per_epoch * self.recipe.evaluation.every_epochs
        return step == len(self.order) or step % every == 0

    def is_logged(self, step: int) -> bool:
        """Whether the step gets a line: a function of the step, so that a resumed run has the same lines."""
        return self.is_scored(step) or step % self.config.log_every == 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches, step = self.loader.step, trainer.global_step
        if step == self.trainer_step:  # more batches of the same step are to come
            self._stop_if_asked(trainer)
            return
        self.trainer_step = step
        if starving := self.watch.look(step, self._delivered()):
            self.bar.clear()
            self.say(starving)
        if self.is_logged(step):
            self._log(step)
        if self.is_scored(step):
            self._score(trainer, step)
        elif self.ranks.greatest(self.ranks.leads and self._save_is_due()):
            self._save(trainer)
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        """Between two batches: raise Interrupted after a signal, all that is trained on in a checkpoint.

        A run whose last step is done and scored has nothing to stop.
        """
        step = self.trainer_step
        stop_signal = self.ranks.greatest(self.stop_signal)
        if not stop_signal or ((step == len(self.order) or self.ended) and not self.unscored):
            return
        if self.batches != self.saved_batches:
            self._save(trainer)
        self._write_info({**self._measured(step), "status": "interrupted"})
        where = f"at step {step} of {len(self.order)}" + (", before its validation" if self.unscored else "")
        accumulate = self.recipe.training.accumulate
        if self.batches % accumulate:
            where += f" and {self.batches % accumulate} of {accumulate} batches of the next"
        kept = "checkpoint written" if self.batches else "nothing to keep yet"
        raise self._interrupted(f"{signal.Signals(stop_signal).name} {where}; {kept}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.module.join_journal()
        checkpoint["emkum"] = {
            "identity": self.info["identity"],
            "best_score": self.best_score,
            "best_step": self.best_step,
            "stale": self.stale,
            "ended": self.ended,
            "scored": not self.unscored,
            "spent": dataclasses.asdict(self._spent(trainer.global_step)),
            "measured": self._measured(trainer.global_step),
            "journal": self.journal.state_dict(),
            "rng": rng_state(pl_module.device),
        }

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Interrupted) and hasattr(self, "started"):
            with contextlib.suppress(StorageFailure):  # the first failure is the one to report
                self._write_info({"status": "failed", "error": str(exception)})

    # the work

    def _log(self, step: int) -> None:
        self.module.join_journal()
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
        norms = {name: float(norm) for name, norm in self.module.gradient_norms.items()}
        if self.ranks.leads:
            self.run_log.write(step, {**rates, **values, **norms})
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
        self.module.join_journal()
        loss = self.journal.means().get("loss", 0.0)
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss} at step {step}")
        weights = [parameter.detach() for parameter in self.student.parameters() if parameter.requires_grad]
        if not torch.stack([torch.isfinite(weight).all() for weight in weights]).all():
            raise self._diverged(f"weights are not finite after step {step}")

    def _write_info(self, changed: Mapping[str, Any]) -> None:
        if self.ranks.leads:
            write_info(self.folder, {**self.info, **changed})

    def _score(self, trainer: Trainer, step: int) -> None:
        """Validate, keep the student if it is the best yet (or if nothing can say), and write a checkpoint.

        After a signal in the validation: return with `unscored`, for the next session to validate. After
        `evaluation.patience` validations without a better score the run ends.
        """
        started = time.perf_counter()
        self.unscored = True
        self._refuse_divergence(step)
        best, found = self._validated(step) if self.ranks.leads else (None, "")
        best = self.ranks.shared(best)
        if best is None:
            self._paused(started)
            return
        self.stale = 0 if best else self.stale + 1
        self.ended = 0 < self.recipe.evaluation.patience <= self.stale and step < len(self.order)
        if self.ended:
            found += f"; no better one in {self.stale} validations: the run ends"
        self.bar.clear()
        self.say(f"step {step} of {len(self.order)}: {'; '.join(filter(None, (self.now, found)))}")
        if best:
            self.best_step = step
            if self.ranks.leads:
                write_student(self.folder, self.student, self.module.average)
        self.unscored = False
        self._paused(started)
        self._save(trainer)
        if best and self.ranks.leads:
            copy_durably(self.folder.last, self.folder.best)
        if self.ended:
            trainer.should_stop = True

    def _validated(self, step: int) -> tuple[bool | None, str]:
        """Whether the student is the best so far, and its score for people. None: a signal came first."""
        if self.validator is None:
            return True, ""
        try:
            self.validating = True
            if self.stop_signal:
                raise _Stop
            with advice_for_validation(self.recipe), alone():
                score = self.validator.run()
        except _Stop:
            return None, ""
        except NonFiniteFeature as error:
            raise self._diverged(f"{error.what}, in the validation after step {step}") from error
        finally:
            self.validating = False
        if not math.isfinite(score.value):
            raise self._diverged(f"the {self.validator.name} is {score.value} after step {step}")
        self.run_log.write(step, score.numbers)
        best = self.validator.better(score.value, self.best_score)
        if best:
            self.best_score = score.value
        return best, f"{self.validator.name} {score.value:.4g}" + (", the best so far" if best else "")

    def _save_is_due(self) -> bool:
        return time.perf_counter() - self.saved > 60 * self.config.checkpoint_minutes

    def _save(self, trainer: Trainer) -> None:
        started = time.perf_counter()
        self._refuse_divergence(trainer.global_step)
        if self.ranks.leads:
            self.run_log.sync()
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
                "column": self.validator.decides if self.validator else "",
                "value": self.best_score,
                "step": self.best_step,
                "split": self.recipe.evaluation.split if self.validator else None,
            },
        }

    def finish(self) -> RunResult:
        """The last lines and run.json of a run that came to its end."""
        self.bar.close()
        info = {**self.info, **self._measured(self.trainer_step), "ended_early": self.ended, "status": "finished"}
        if self.ranks.leads:
            write_info(self.folder, info)
        result = result_of(self.folder, info)
        for line in result_lines(result, self.folder.weights, self.folder.average if self.module.average else None):
            self.say(line)
        split = "" if self.validator is not None else f" --split {self.recipe.data.split}"
        self.say(f"next: emkum evaluate {self.folder.dir} --cache {self.config.cache}{split}")
        return result


class _Stop(BaseException):
    """Out of a validation, from wherever it is; no handler of `Exception` on the way may take it for its own."""


class DurableCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole and read without running code from them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))
