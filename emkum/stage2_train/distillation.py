"""What Lightning calls in a step: losses, gradients of several batches or ranks put together, optimiser, averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from emkum.stage2_train.averaging import update_average
from emkum.stage2_train.loader import Batch, HostBatch
from emkum.stage2_train.losses import Journal, autocast, step_losses
from emkum.stage2_train.optimiser import gradient_norms, parameter_groups, rate
from emkum.stage2_train.plan import Plan
from emkum.stage2_train.ranks import Ranks


class Distillation(LightningModule):
    """Lightning's view of a run: step, optimiser, schedule. `average`: the mean of the student's weights, if any.

    Each rank computes its part of a batch; the mean of their gradients is that of one rank with the whole batch.
    """

    def __init__(self, plan: Plan, ranks: Ranks = Ranks()) -> None:
        super().__init__()
        self.student, self.terms, self.average = plan.student, plan.terms, plan.average
        self.recipe, self.source, self.compute, self.ranks = plan.recipe, plan.source, plan.compute, ranks
        self.num_steps, self.chunk, self.seed = len(plan.order), plan.config.chunk, plan.seed
        self.accumulate = plan.recipe.training.accumulate
        self.unstepped = 0  # batches since the last step, whose gradients wait for the next
        self.shares: Tensor | None = None  # of these batches, on this rank
        self._gradients: dict[str, Tensor] = {}  # of a checkpoint, until training starts
        self.journal = Journal()
        self.is_logged: Callable[[int], bool] = lambda step: False
        self.gradient_norms: dict[str, Tensor] = {}  # of the last step that is logged

    def transfer_batch_to_device(self, batch: HostBatch, device: torch.device, dataloader_idx: int) -> Batch:
        return self.source.prepare(batch, device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with autocast(self.compute, self.device):
            losses = step_losses(self.student, self.terms, self.recipe, batch, self.chunk, self.seed)
        parts, total, share = {"loss": losses.total, **losses.parts}, losses.total, losses.share
        self.unstepped += 1
        if share is not None and self.ranks.number > 1:  # the mean over ranks is then that over the tokens of all
            weight = share * self.ranks.number / self.ranks.total(share)
            parts = {name: part * weight for name, part in parts.items()}
            total = parts["loss"]
        self.journal.add(parts)
        if self.accumulate == 1 or share is None:
            return total
        self.shares = share if self.shares is None else self.shares + share
        return losses.total * (share * self.ranks.number)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Batches of texts weigh as much as they have real tokens: the step is that of one batch of them all."""
        if self.shares is not None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, self.accumulate / self.ranks.total(self.shares))
            self.shares = None
        if self.is_logged(self.trainer.global_step + 1):
            self.gradient_norms = gradient_norms(self.student, self.terms)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.terms.after_step(self.student)
        if self.average is not None:
            update_average(self.average, self.student, self.recipe.training.ema, self.trainer.global_step + 1)
        self.unstepped = 0

    def join_journal(self) -> None:
        """What is logged becomes the mean over ranks, on every rank. A collective call."""
        held = self.journal.state_dict()
        if self.ranks.number > 1 and held["sums"] is not None:
            self.journal.load_state_dict({**held, "sums": self.ranks.mean(held["sums"].to(self.device))})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """In the middle of a step, what its batches so far have left: a resumed run goes on with the next of them.

        The mean of the ranks' gradients and the sum of their shares, so that any number of ranks can go on with them.
        """
        if self.unstepped:
            gradients = {name: self.ranks.mean(p.grad) for name, p in self.named_parameters() if p.grad is not None}
            shares = None if self.shares is None else self.ranks.total(self.shares)
            checkpoint["unstepped"] = {"batches": self.unstepped, "gradients": gradients, "shares": shares}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "unstepped" in checkpoint:
            kept = checkpoint["unstepped"]
            self.unstepped, self._gradients = kept["batches"], kept["gradients"]
            self.shares = kept["shares"] if self.ranks.leads or kept["shares"] is None else kept["shares"] * 0

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
