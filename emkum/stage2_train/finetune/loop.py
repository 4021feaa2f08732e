"""The one loop of all fine-tunings with a new head: epochs, a checkpoint after each, the same weights after a resume.

Nothing in it draws at random but the batches, which are functions of seed and epoch: so a resumed job gives the bits,
on a CPU, of one that never stopped.

B batch, C classes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from emkum.errors import NotARun, ResumeMismatch, UsageError
from emkum.shards.durable import remove, write_file
from emkum.stage2_train.finetune.settings import Schedule
from emkum.stage2_train.finetune.trunks import rate_factors
from emkum.stage2_train.losses import autocast
from emkum.stage2_train.run_folder import WEIGHTS_DIGEST, previous_of, read_checkpoint, tensors_digest, write_checkpoint

Say = Callable[[str], None]
Batch = tuple[tuple[Tensor, ...], Tensor]  # what the model takes, and what the loss compares its output with
Scores = dict[str, float]
BETAS, EPS = (0.9, 0.98), 1e-6  # THESIS.md section 3


@dataclass(frozen=True)
class Job:
    """One model from one seed: what is trained, on what, by what it is measured, and where it is kept.

    batches: of an epoch, from 0; as many each time, `steps`. loss: of the model's output and a batch's targets.
    score: of the model in evaluation mode, after every epoch. identity: what a checkpoint must have in common.
    keep_seconds: epochs are checkpointed, and said, when so much time has passed since the last one that was.
    """

    name: str
    dir: Path
    model: nn.Module
    schedule: Schedule
    steps: int
    batches: Callable[[int], Iterator[Batch]]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[nn.Module], Scores]
    compute: str
    device: torch.device
    identity: Mapping[str, Any]
    keep_seconds: float = 0.0

    @property
    def checkpoint(self) -> Path:
        return self.dir / "last.ckpt"

    @property
    def result(self) -> Path:
        return self.dir / "scores.json"

    @property
    def weights(self) -> Path:
        return self.dir / "weights.safetensors"


@dataclass
class Progress:
    """Epochs done, and a line of each: loss, seconds, scores."""

    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def epochs(self) -> int:
        return len(self.history)


def run_job(job: Job, say: Say) -> list[dict[str, float]]:
    """Train the job to its last epoch, or go on where it stopped; its history, a dict an epoch.

    The scores of the last epoch are the job's: no epoch is chosen by what it is measured on. Raises UsageError where
    it diverges, ResumeMismatch for a folder of another job, StorageFailure.
    """
    done = _finished(job)
    if done is not None:
        say(f"{job.name}: is trained already")
        return done
    model = job.model.to(job.device)
    optimiser = torch.optim.AdamW(_groups(model, job.schedule), betas=BETAS, eps=EPS)
    progress = _resumed(job, model, optimiser, say)
    total, kept = job.schedule.epochs * job.steps, time.perf_counter()
    for epoch in range(progress.epochs, job.schedule.epochs):
        started = time.perf_counter()
        loss = _epoch(job, model, optimiser, epoch, total)
        scores = evaluated(job.score, model)
        line = {"epoch": epoch + 1, "loss": loss, "seconds": time.perf_counter() - started, **scores}
        progress.history.append(line)
        if epoch + 1 == job.schedule.epochs or time.perf_counter() - kept >= job.keep_seconds:
            shown = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
            say(f"{job.name}: epoch {epoch + 1} of {job.schedule.epochs}: loss {loss:.4f}, {shown}")
            _keep(job, model, optimiser, progress)
            kept = time.perf_counter()
    _finish(job, model, progress)
    return progress.history


def _epoch(job: Job, model: nn.Module, optimiser: torch.optim.Optimizer, epoch: int, total: int) -> float:
    """One pass; the mean of its losses. Raises UsageError if that is no number."""
    model.train()
    losses = torch.zeros((), device=job.device)
    step = epoch * job.steps
    for inputs, targets in job.batches(epoch):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * rate(step, total, job.schedule.warmup)
        with autocast(job.compute, job.device):
            outputs = model(*inputs)
        loss = job.loss(outputs.float(), targets)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if job.schedule.clip_norm:
            trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(trained, job.schedule.clip_norm)
        optimiser.step()
        losses += loss.detach()
        step += 1
    mean = float(losses) / job.steps
    if not math.isfinite(mean):
        raise UsageError(
            f"fine-tuning diverged: the loss of epoch {epoch + 1} of {job.name} is {mean}",
            f"lower the rate: --lr {job.schedule.lr / 10:g}, or use --precision float32",
        )
    return mean


def rate(step: int, total: int, warmup: float) -> float:
    """The share of the highest rate at `step` (from 0) of `total`: linear up, then half a cosine down to 0."""
    rising = math.ceil(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def evaluated(score: Callable[[nn.Module], Scores], model: nn.Module) -> Scores:
    """The scores of a model, without gradients and in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return score(model)


def _groups(model: nn.Module, schedule: Schedule) -> list[dict[str, Any]]:
    """Trained parameters by rate and weight decay. Vectors, token types, positions and relative biases do not decay."""
    factors = rate_factors(model, schedule.layer_decay)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not any(word in name for word in ("types", "positions", "biases."))
            groups.setdefault((factors[name], decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": factor * schedule.lr,
            "peak": factor * schedule.lr,
            "weight_decay": schedule.weight_decay if decays else 0.0,
        }
        for (factor, decays), parameters in groups.items()
    ]


# --- what is kept ------------------------------------------------------------------------------------------------


def _changed(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes, statistics of a ResNet too; others are those of the run or the cache."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in frozen}


def _keep(job: Job, model: nn.Module, optimiser: torch.optim.Optimizer, progress: Progress) -> None:
    kept = {"identity": dict(job.identity), "history": progress.history, "model": _changed(model)}
    job.dir.mkdir(parents=True, exist_ok=True)
    write_checkpoint({**kept, "optimiser": optimiser.state_dict()}, job.checkpoint)


def _resumed(job: Job, model: nn.Module, optimiser: torch.optim.Optimizer, say: Say) -> Progress:
    """Puts the last checkpoint that can be read into model and optimiser."""
    found, damage = None, []
    for path in (job.checkpoint, previous_of(job.checkpoint)):
        if path.is_file() and found is None:
            try:
                found = read_checkpoint(path)
            except NotARun as error:
                damage.append(error)
                say(f"warning: {error.what}")
    if found is None:
        if damage:
            raise damage[0]
        return Progress()
    _check_identity(job, found["identity"], job.checkpoint)
    model.load_state_dict(found["model"], strict=False)  # frozen tensors are not in it
    optimiser.load_state_dict(found["optimiser"])
    say(f"{job.name}: goes on after epoch {len(found['history'])}")
    return Progress(found["history"])


def _finish(job: Job, model: nn.Module, progress: Progress) -> None:
    """The final weights and the scores, then nothing that only a resume would need."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _changed(model).items()}
    write_file(job.weights, save(tensors, {WEIGHTS_DIGEST: tensors_digest(tensors)}))
    found = {"identity": dict(job.identity), "history": progress.history}
    write_file(job.result, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    for path in (job.checkpoint, previous_of(job.checkpoint)):
        remove(path)


def _finished(job: Job) -> list[dict[str, float]] | None:
    try:
        found = json.loads(job.result.read_text(encoding="utf-8"))
        history: list[dict[str, float]] = found["history"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise NotARun(f"{job.result} cannot be read: {error}", f"remove {job.dir}: it is then trained again") from error
    _check_identity(job, found["identity"], job.result)
    return history


def _check_identity(job: Job, theirs: Mapping[str, Any], path: Path) -> None:
    refuse_other(theirs, job.identity, str(path), f"name another --out, or remove {job.dir}")


def refuse_other(theirs: Mapping[str, Any], ours: Mapping[str, Any], what: str, way_out: str) -> None:
    """Raise ResumeMismatch, both values shown, unless the two are equal as JSON."""
    theirs, ours = (json.loads(json.dumps(one)) for one in (theirs, ours))
    differing = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
    if differing:
        shown = "; ".join(f"{name}: {theirs.get(name)} there, {ours.get(name)} now" for name in differing[:4])
        raise ResumeMismatch(f"{what} is of another fine-tuning ({shown})", way_out)
