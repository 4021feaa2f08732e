"""CACHE -> STUDENT: one training run, from recipe and cache to a run folder."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from emkum.errors import StorageFailure
from emkum.shards.durable import sweep_temporaries
from emkum.stage2_train.keeper import DurableCheckpoints, RunKeeper, RunResult, result_of
from emkum.stage2_train.loader import Batch, BatchLoader, HostBatch
from emkum.stage2_train.losses import Journal, autocast, step_losses
from emkum.stage2_train.optimiser import parameter_groups, rate
from emkum.stage2_train.plan import Plan, Say, TrainConfig, make_plan, run_info, run_summary
from emkum.stage2_train.resume import check_same_run, resume_point
from emkum.stage2_train.run_folder import RunFolder, held, new_run, read_info, refuse_used_dir, write_info
from emkum.stage2_train.validation import make_validator

__all__ = ["RunResult", "TrainConfig", "train"]

LIGHTNING_ABOUT_ITSELF = (  # warnings it gives about its own code and our choice of device, as patterns
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"[GT]PU available but not used",
)


def train(config: TrainConfig, say: Say = print) -> RunResult:
    """Train the recipe's student from the cache. `say` receives one line a step of the run.

    Raises the errors of emkum.errors: UnknownRecipe, MissingField, MissingCaptions, IncompleteCache, NotARun,
    ResumeMismatch, AnotherWriter, StorageFailure; Interrupted after SIGINT or SIGTERM, when a checkpoint has been
    written.
    """
    if not config.resume or config.run_dir is None:
        refuse_used_dir(config.run_dir)  # before the work that making a plan is
        plan = make_plan(config, None)
        with new_run(config.run_dir, plan.recipe.name) as folder:
            return _session(plan, folder, None, say)
    folder = RunFolder(config.run_dir)
    read_info(folder)  # nothing is written where no run is
    with held(folder):
        before = read_info(folder)
        sweep_temporaries(folder.dir, 0)
        plan = make_plan(config, before)
        check_same_run(before, plan.identity, config)
        return _session(plan, folder, before, say)


def _session(plan: Plan, folder: RunFolder, before: Mapping[str, Any] | None, say: Say) -> RunResult:
    """From a plan and a folder that is ours to the end of the run; `before`: run.json of the run that goes on."""
    config = plan.config
    point = resume_point(folder, before, plan.identity, say)
    validator = make_validator(
        plan.student,
        plan.recipe,
        plan.cache,
        plan.names,
        plan.prefix,
        plan.compute,
        plan.device,
        allow_partial=config.allow_partial,
        threads=config.threads,
    )
    info = run_info(plan, folder, before, point.step if point else 0)
    for line in run_summary(plan, info, validator):
        say(line)
    if point is not None and point.scored and point.step == len(plan.order):
        say(f"{folder.dir} is trained to its last step, {point.step}, already")
        info = {**info, **point.measured, "status": "finished"}
        write_info(folder, info)
        return result_of(folder, info)

    loader = BatchLoader(
        plan.order, plan.source, threads=config.threads, prefetch=config.prefetch, pin=plan.device.type == "cuda"
    )
    module = Distillation(plan)
    keeper = RunKeeper(plan, folder, info, loader, module.journal, validator, point, say)
    with quiet_lightning(), keeper:
        # One pass over a loader that knows the epochs itself: so every resume is the same, in the middle of a pass.
        trainer = Trainer(
            accelerator="gpu" if plan.device.type == "cuda" else "cpu",
            devices=[plan.device.index or 0] if plan.device.type == "cuda" else 1,
            max_epochs=1,
            gradient_clip_val=plan.recipe.optimiser.clip_norm or None,
            callbacks=[keeper],
            plugins=[DurableCheckpoints(), LightningEnvironment()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder.dir,
        )
        try:
            trainer.fit(module, loader, ckpt_path=point.path if point else None)
            return keeper.finish()
        except StorageFailure as error:
            raise StorageFailure(error.what, f"make room, then continue: {info['continue']}") from error


class Distillation(LightningModule):
    """Lightning's view of a run: step, optimiser, schedule."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.student, self.terms = plan.student, plan.terms
        self.recipe, self.source, self.compute = plan.recipe, plan.source, plan.compute
        self.num_steps = len(plan.order)
        self.journal = Journal()

    def transfer_batch_to_device(self, batch: HostBatch, device: torch.device, dataloader_idx: int) -> Batch:
        return self.source.prepare(batch, device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with autocast(self.compute, self.device):
            losses = step_losses(self.student, self.terms, self.recipe, batch)
        self.journal.add({"loss": losses.total, **losses.parts})
        return losses.total

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.terms.clamp_scales()

    def configure_optimizers(self) -> Any:
        optimiser = torch.optim.AdamW(
            parameter_groups(self.student, self.terms, self.recipe),
            betas=self.recipe.optimiser.betas,
            eps=self.recipe.optimiser.eps,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(self.recipe, step, self.num_steps))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
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
