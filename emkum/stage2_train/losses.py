"""What one batch costs: the recipe's objectives on the student's outputs, weighed and summed.

B batch, T tokens, L text tokens, D width, N candidates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emkum.errors import UsageError
from emkum.models import targets
from emkum.stage2_train.loader import Batch, BatchSource
from emkum.stage2_train.objectives.cls_mse import cls_mse
from emkum.stage2_train.objectives.ctl import FifoBank, WholeBank, ctl
from emkum.stage2_train.objectives.gather import gathered_constants, own_part
from emkum.stage2_train.objectives.itc import MAX_LOG_SCALE, Contrast, clamp_log_scale, itc, start_log_scale
from emkum.stage2_train.objectives.layers_mse import layers_mse
from emkum.stage2_train.recipe import Recipe
from emkum.stage2_train.samples import SampleTable
from emkum.stage2_train.student import Student

AUTO_BANK_ROWS = 65_536  # THESIS.md section 2: the FIFO of `ctl`
LOGIT_BYTES = (
    6 * 4
)  # of each sample and candidate: float32 logits, masked, and their gradient, of pictures and captions
BANK_LIMIT_BYTES = 8 * 2**30


@dataclass(frozen=True)
class Losses:
    """The weighted sum that is minimised, and what is logged beside it, each a scalar on the device.

    share: how much the batch weighs beside others of its step, where that is not the same for all: its real tokens.
    """

    total: Tensor
    parts: dict[str, Tensor]
    share: Tensor | None = None


class Terms(nn.Module):
    """What the objectives learn or remember: log-scales, the bank of targets."""

    def __init__(self, recipe: Recipe, bank: FifoBank | WholeBank | None) -> None:
        super().__init__()
        wanted = recipe.objectives
        self.itc_log_scale = _log_scale(wanted.itc.temperature) if wanted.itc else None
        self.ctl_log_scale = _log_scale(wanted.ctl.temperature) if wanted.ctl else None
        self.bank = bank

    def clamp_scales(self) -> None:
        """Called after each optimiser step: the learned scales stay at most 100 (objectives/itc.py)."""
        for log_scale in (self.itc_log_scale, self.ctl_log_scale):
            if log_scale is not None:
                clamp_log_scale(log_scale)


def make_bank(
    recipe: Recipe, table: SampleTable, source: BatchSource, width: int | None
) -> FifoBank | WholeBank | None:
    """The bank of `ctl` as the recipe asks for it; None without `ctl`. width: channels of a target."""
    if recipe.objectives.ctl is None or width is None:
        return None
    wanted, rows = recipe.objectives.ctl.bank, table.num_samples * table.num_views
    refuse_costly_bank(recipe, wanted, rows)
    if wanted == "all" or (wanted == "auto" and rows <= AUTO_BANK_ROWS):
        assert table.image_rows_N is not None
        rows_N = torch.from_numpy(table.image_rows_N)
        return WholeBank(rows_N, source.all_targets(), fresh=source.fresh_targets)
    # More than the split holds would only repeat rows.
    return FifoBank(min(AUTO_BANK_ROWS if isinstance(wanted, str) else wanted, rows), width)


def refuse_costly_bank(recipe: Recipe, wanted: int | str, rows: int) -> None:
    """Raise UsageError where the logits against the bank would take more than BANK_LIMIT_BYTES."""
    batch = recipe.training.batch
    candidates = rows if wanted == "all" else min(AUTO_BANK_ROWS if isinstance(wanted, str) else wanted, rows)
    num_bytes = candidates * batch * LOGIT_BYTES
    if num_bytes > BANK_LIMIT_BYTES:
        fitting = min(AUTO_BANK_ROWS, BANK_LIMIT_BYTES // (batch * LOGIT_BYTES))
        raise UsageError(
            f"objectives.ctl.bank = {wanted}: a batch of {batch:,} against {candidates:,} rows takes "
            f"{num_bytes:,} bytes ({num_bytes / 2**30:.1f} GiB), more than {BANK_LIMIT_BYTES / 2**30:g} GiB",
            f"use fewer rows: --set objectives.ctl.bank={fitting}",
        )


def bank_in_words(bank: FifoBank | WholeBank | None) -> str:
    """For the summary."""
    if isinstance(bank, WholeBank):
        return f"all {len(bank.targets_GD):,} targets of the split"
    return f"the last {bank.capacity:,} targets" if bank is not None else ""


def _log_scale(temperature: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(start_log_scale(temperature)))


def pair_losses(student: Student, terms: Terms, recipe: Recipe, batch: Batch, chunk: int = 0) -> Losses:
    """Pictures and captions: itc, ctl and cls-mse, weighted as the recipe says. Fills the bank."""
    assert batch.tokens_BTD is not None
    assert batch.ids_BL is not None
    assert batch.mask_BL is not None
    assert batch.image_rows_B is not None
    assert batch.views_B is not None
    images_BD = in_chunks(lambda tokens: student.encode_images(tokens).features_BD, chunk, batch.tokens_BTD)
    texts_BD = in_chunks(
        lambda ids, mask: student.encode_texts(ids, mask).features_BD, chunk, batch.ids_BL, batch.mask_BL
    )
    wanted, parts, total = recipe.objectives, {}, torch.zeros((), device=images_BD.device)
    if wanted.itc and terms.itc_log_scale is not None:
        contrast = itc(images_BD, texts_BD, terms.itc_log_scale, batch.image_rows_B)
        total = total + wanted.itc.weight * contrast.loss
        parts.update(_contrast_parts("itc", contrast, terms.itc_log_scale))
    if wanted.ctl and terms.ctl_log_scale is not None and terms.bank is not None and batch.targets is not None:
        targets_GD, rows_G, views_G = map(gathered_constants, (batch.targets, batch.image_rows_B, batch.views_B))
        candidates_ND, rows_N, labels_G = terms.bank.candidates(targets_GD, rows_G, views_G)
        labels_B = own_part(labels_G)
        contrast = ctl(images_BD, texts_BD, candidates_ND, rows_N, labels_B, batch.image_rows_B, terms.ctl_log_scale)
        total = total + wanted.ctl.weight * contrast.loss
        parts.update(_contrast_parts("ctl", contrast, terms.ctl_log_scale))
        terms.bank.push(targets_GD, rows_G)
    if wanted.cls_mse and batch.targets is not None:
        regression = cls_mse(images_BD, texts_BD, batch.targets)
        total = total + wanted.cls_mse.weight * regression.loss
        parts["cls_mse"] = regression.loss
        parts["cls_mse_image"], parts["cls_mse_text"] = regression.image_loss, regression.text_loss
    return Losses(total, parts)


def _contrast_parts(name: str, contrast: Contrast, log_scale: Tensor) -> dict[str, Tensor]:
    return {
        name: contrast.loss,
        f"{name}_image": contrast.image_loss,
        f"{name}_text": contrast.text_loss,
        f"{name}_image_accuracy": contrast.image_accuracy,
        f"{name}_text_accuracy": contrast.text_accuracy,
        f"{name}_scale": log_scale.clamp(max=MAX_LOG_SCALE).exp(),
    }


def token_losses(student: Student, recipe: Recipe, batch: Batch, chunk: int = 0) -> Losses:
    """Pictures or texts alone: layers-mse at every token."""
    assert recipe.objectives.layers_mse is not None
    assert batch.targets is not None
    if batch.tokens_BTD is not None:
        predicted_BTD = in_chunks(
            lambda tokens: targets.layers(student.encode_images(tokens).hidden, None, final_layer_norm=True),
            chunk,
            batch.tokens_BTD,
        )
    else:
        assert batch.ids_BL is not None
        assert batch.mask_BL is not None
        predicted_BTD = in_chunks(
            lambda ids, mask: targets.layers(student.encode_texts(ids, mask).hidden, mask, final_layer_norm=False),
            chunk,
            batch.ids_BL,
            batch.mask_BL,
        )
    loss = layers_mse(predicted_BTD, batch.targets, batch.mask_BL)
    share = None if batch.mask_BL is None else batch.mask_BL.sum()
    return Losses(recipe.objectives.layers_mse.weight * loss, {"layers_mse": loss}, share)


def in_chunks(encode: Callable[..., Tensor], chunk: int, *inputs: Tensor) -> Tensor:
    """`encode` of so many samples at a time; 0: of all at once. The same numbers and gradients up to rounding.

    The backward pass computes each chunk again, so that activations of one chunk exist at a time: as in Gao et al.
    2021 (GradCache), a contrastive batch may be as large as its features allow, for one more forward pass.
    """
    if not chunk or chunk >= len(inputs[0]) or not torch.is_grad_enabled():
        return encode(*inputs)
    parts = zip(*(torch.split(whole, chunk) for whole in inputs), strict=True)
    # Nothing in a student is random, so no state of a generator is kept.
    return torch.cat([checkpoint(encode, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def part_names(recipe: Recipe) -> list[str]:
    """Names of everything `step_losses` gives for the recipe, "loss" first: the columns of the log."""
    names = ["loss"]
    for term in recipe.terms:
        halves = ["", "_image", "_text"] if term != "layers_mse" else [""]
        if term in ("itc", "ctl"):
            halves += ["_image_accuracy", "_text_accuracy", "_scale"]
        names += [term + half for half in halves]
    return names


def autocast(compute: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in `compute`; norms, softmax and losses in float32."""
    if compute == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, compute))


def step_losses(student: Student, terms: Terms, recipe: Recipe, batch: Batch, chunk: int = 0) -> Losses:
    """The losses of one batch of the recipe's kind; `chunk` as in `in_chunks`."""
    if recipe.kind == "pairs":
        return pair_losses(student, terms, recipe, batch, chunk)
    return token_losses(student, recipe, batch, chunk)


class Journal:
    """Sums of logged scalars on the device, read once every few steps: the loop never waits for the device."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._sums: Tensor | None = None
        self._count = 0

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """One step's scalars, the same names each time."""
        self.names = list(parts)
        values = torch.stack([part.detach().float() for part in parts.values()])
        self._sums = values if self._sums is None else self._sums.to(values.device) + values
        self._count += 1

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last `take`, so that a resumed run logs what an unbroken one would have."""
        return {"names": self.names, "sums": self._sums, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.names, self._sums, self._count = list(state["names"]), state["sums"], state["count"]

    def means(self) -> dict[str, float]:
        """The means since the last `take`. Waits for the device."""
        if self._sums is None:
            return {}
        return dict(zip(self.names, (self._sums / self._count).tolist(), strict=True))

    def take(self) -> dict[str, float]:
        """The means since the last call. Waits for the device."""
        means = self.means()
        self._sums, self._count = None, 0
        return means
