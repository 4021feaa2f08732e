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
from emkum.shards.durable import is_full, sweep_temporaries
from emkum.stage2_train.compiled import compile_blocks, compiled_decode
from emkum.stage2_train.keeper import DurableCheckpoints, RunKeeper, RunResult, result_of
from emkum.stage2_train.loader import Batch, BatchLoader, CachedSource, HostBatch
from emkum.stage2_train.losses import Journal, autocast, step_losses
from emkum.stage2_train.micro_batches import MicroBatches
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

    if config.compile:
        reason = compile_blocks(plan.student, plan.device)
        say(f"not compiled: {reason}" if reason else "blocks are compiled as they first run, but not for validation")
        if not reason and isinstance(plan.source, CachedSource):
            plan.source.decode = compiled_decode()
    accumulate = plan.recipe.training.accumulate
    batches = MicroBatches(plan.order, accumulate) if accumulate > 1 else plan.order
    loader = BatchLoader(
        batches,
        plan.source,
        threads=plan.source.batches_at_once,
        prefetch=max(config.prefetch, plan.source.batches_at_once) if config.live else config.prefetch,
        pin=plan.device.type == "cuda",
    )
    module = Distillation(plan)
    keeper = RunKeeper(plan, folder, info, loader, module.journal, validator, point, say)
    with quiet_lightning(), keeper:
        # One pass over a loader that knows the epochs itself: so every resume is the same, in the middle of a pass.
        trainer = Trainer(
            accelerator="gpu" if plan.device.type == "cuda" else "cpu",
            devices=[plan.device.index or 0] if plan.device.type == "cuda" else 1,
            max_epochs=1,
            accumulate_grad_batches=accumulate,
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
            way_out = "make room" if is_full(error) or not error.way_out else error.way_out
            raise StorageFailure(error.what, f"{way_out}, then continue: {info['continue']}") from error
        finally:
            plan.source.close()


class Distillation(LightningModule):
    """Lightning's view of a run: step, optimiser, schedule."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.student, self.terms = plan.student, plan.terms
        self.recipe, self.source, self.compute = plan.recipe, plan.source, plan.compute
        self.num_steps, self.chunk = len(plan.order), plan.config.chunk
        self.accumulate = plan.recipe.training.accumulate
        self.unstepped = 0  # batches since the last step, whose gradients wait for the next
        self.shares: Tensor | None = None  # of these batches
        self._gradients: dict[str, Tensor] = {}  # of a checkpoint, until training starts
        self.journal = Journal()

    def transfer_batch_to_device(self, batch: HostBatch, device: torch.device, dataloader_idx: int) -> Batch:
        return self.source.prepare(batch, device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with autocast(self.compute, self.device):
            losses = step_losses(self.student, self.terms, self.recipe, batch, self.chunk)
        self.journal.add({"loss": losses.total, **losses.parts})
        self.unstepped += 1
        if self.accumulate == 1 or losses.share is None:
            return losses.total
        self.shares = losses.share if self.shares is None else self.shares + losses.share
        return losses.total * losses.share

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Batches of texts weigh as much as they have real tokens: the step is that of one batch of them all."""
        if self.shares is not None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, self.accumulate / self.shares)
            self.shares = None

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.terms.clamp_scales()
        self.unstepped = 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """In the middle of a step, what its batches so far have left: a resumed run goes on with the next of them."""
        if self.unstepped:
            gradients = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
            checkpoint["unstepped"] = {"batches": self.unstepped, "gradients": gradients, "shares": self.shares}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "unstepped" in checkpoint:
            kept = checkpoint["unstepped"]
            self.unstepped, self.shares, self._gradients = kept["batches"], kept["shares"], kept["gradients"]

    def on_train_start(self) -> None:
        for name, parameter in self.named_parameters():
            if name in self._gradients:
                parameter.grad = self._gradients[name].to(parameter.device)
        self.shares = self.shares.to(self.device) if self.shares is not None else None
        self._gradients = {}

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
