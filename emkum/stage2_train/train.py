"""CACHE -> STUDENT: one training run, from recipe and cache to a run folder."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from emkum.shards.durable import write_file
from emkum.stage2_train.keeper import DurableCheckpoints, RunKeeper, RunResult, result_of
from emkum.stage2_train.loader import Batch, BatchLoader, HostBatch
from emkum.stage2_train.losses import Journal, autocast, step_losses
from emkum.stage2_train.optimiser import parameter_groups, rate
from emkum.stage2_train.resume import check_same_run, resume_point
from emkum.stage2_train.run_folder import RunFolder, new_run_dir, read_info, write_info
from emkum.stage2_train.setup import Say, Setup, TrainConfig, run_info, run_summary, set_up
from emkum.stage2_train.validation import make_validator

__all__ = ["RunResult", "TrainConfig", "train"]

LIGHTNING_ABOUT_ITSELF = (r"`isinstance\(treespec, LeafSpec\)` is deprecated",)  # warnings it causes, as patterns


def train(config: TrainConfig, say: Say = print) -> RunResult:
    """Train the recipe's student from the cache. `say` receives one line a step of the run.

    Raises the errors of emkum.errors: UnknownRecipe, MissingField, MissingCaptions, IncompleteCache, NotARun,
    ResumeMismatch, StorageFailure; Interrupted after SIGINT or SIGTERM, when a checkpoint has been written.
    """
    before = read_info(RunFolder(config.run_dir)) if config.resume and config.run_dir else None
    run = set_up(config, before)
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
    info = run_info(run, folder)
    for line in run_summary(run, info, validator):
        say(line)
    if point is not None and point.step == len(run.order):
        say(f"{folder.dir} is trained to its last step, {point.step}, already")
        info = {**info, **point.measured, "status": "finished"}
        write_info(folder, info)
        return result_of(folder, info)

    write_file(folder.recipe, f"# As run; run.json says how.\n\n{run.recipe.to_toml()}".encode())
    loader = BatchLoader(
        run.order, run.source, threads=config.threads, prefetch=config.prefetch, pin=run.device.type == "cuda"
    )
    module = Distillation(run)
    keeper = RunKeeper(run, folder, info, loader, module.journal, validator, point, say)
    with quiet_lightning(), keeper:
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
        trainer.fit(module, loader, ckpt_path=point.path if point else None)
    return keeper.finish()


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
