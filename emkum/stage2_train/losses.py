"""What one batch costs: the recipe's objectives on the student's outputs, weighed and summed.

B batch, T tokens, L text tokens, D width, N candidates.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emkum.errors import UsageError
from emkum.models import targets
from emkum.models.targets import LayersRule
from emkum.stage2_train.loader import Batch, BatchSource
from emkum.stage2_train.objectives.cls_mse import Regression, cls_mse
from emkum.stage2_train.objectives.ctl import FifoBank, WholeBank, ctl
from emkum.stage2_train.objectives.gather import gathered_constants, own_part
from emkum.stage2_train.objectives.itc import MAX_LOG_SCALE, Contrast, clamp_log_scale, itc, start_log_scale
from emkum.stage2_train.objectives.layers_mse import layers_mse
from emkum.stage2_train.objectives.logits_kl import class_kl, logits_kl
from emkum.stage2_train.objectives.ranking import ranking
from emkum.stage2_train.recipe import ItcRecipe, RankingRecipe, Recipe
from emkum.stage2_train.samples import SampleTable
from emkum.stage2_train.shared_mlp import SHARED_LAYERS
from emkum.stage2_train.student import Student, StudentOut

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
    """What the objectives learn or remember: log-scales, the bank of targets.

    itc_log_scale: a scalar, or one number for each layer that itc contrasts.
    """

    def __init__(self, recipe: Recipe, bank: FifoBank | WholeBank | None) -> None:
        super().__init__()
        wanted = recipe.objectives
        self.itc_log_scale = None
        if wanted.itc:
            shape = (num_layers(recipe, wanted.itc),) if wanted.itc.layers == "all" else ()
            self.itc_log_scale = _log_scale(wanted.itc.temperature, shape)
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


def _log_scale(temperature: float, shape: tuple[int, ...] = ()) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, start_log_scale(temperature)))


def num_layers(recipe: Recipe, term: ItcRecipe | RankingRecipe) -> int:
    """On how many of the student's layers the term is computed."""
    return SHARED_LAYERS[recipe.student.shared] if term.layers == "all" else 1


def pair_losses(student: Student, terms: Terms, recipe: Recipe, batch: Batch, chunk: int = 0) -> Losses:
    """Pictures and captions: itc, ranking, ctl, cls-mse and logits-kl, weighted as the recipe says. Fills the bank."""
    assert batch.tokens_BTD is not None
    assert batch.ids_BL is not None
    assert batch.mask_BL is not None
    assert batch.image_rows_B is not None
    assert batch.views_B is not None
    image_layers, images_BD = _encoded(student, student.encode_images, chunk, batch.tokens_BTD)
    text_layers, texts_BD = _encoded(student, student.encode_texts, chunk, batch.ids_BL, batch.mask_BL)
    wanted, parts, total = recipe.objectives, {}, torch.zeros((), device=images_BD.device)
    if wanted.itc and terms.itc_log_scale is not None:
        pairs = _contrasted(recipe, wanted.itc, image_layers, text_layers)
        scales = terms.itc_log_scale.reshape(-1).unbind()
        found = [itc(i_BD, t_BD, scale, batch.image_rows_B) for (i_BD, t_BD), scale in zip(pairs, scales, strict=True)]
        contrast = _mean_of(found)
        total = total + wanted.itc.weight * contrast.loss
        parts.update(_contrast_parts("itc", contrast, terms.itc_log_scale, found))
    if wanted.ranking:
        pairs = _contrasted(recipe, wanted.ranking, image_layers, text_layers)
        found = [ranking(i_BD, t_BD, wanted.ranking.margin, batch.image_rows_B) for i_BD, t_BD in pairs]
        contrast = _mean_of(found)
        total = total + wanted.ranking.weight * contrast.loss
        parts.update(_contrast_parts("ranking", contrast, None, found))
    if wanted.ctl and terms.ctl_log_scale is not None and terms.bank is not None and batch.targets is not None:
        targets_GD, rows_G, views_G = map(gathered_constants, (batch.targets, batch.image_rows_B, batch.views_B))
        candidates_ND, rows_N, labels_G = terms.bank.candidates(targets_GD, rows_G, views_G)
        labels_B = own_part(labels_G)
        contrast = ctl(images_BD, texts_BD, candidates_ND, rows_N, labels_B, batch.image_rows_B, terms.ctl_log_scale)
        total = total + wanted.ctl.weight * contrast.loss
        parts.update(_contrast_parts("ctl", contrast, terms.ctl_log_scale, [contrast]))
        terms.bank.push(targets_GD, rows_G)
    if wanted.cls_mse and batch.targets is not None:
        regression = cls_mse(images_BD, texts_BD, batch.targets)
        total = total + wanted.cls_mse.weight * regression.loss
        parts.update(_regression_parts("cls_mse", regression))
    if wanted.logits_kl and batch.targets is not None:
        regression = logits_kl(images_BD, texts_BD, _classes(batch), wanted.logits_kl.temperature)
        total = total + wanted.logits_kl.weight * regression.loss
        parts.update(_regression_parts("logits_kl", regression))
    return Losses(total, parts)


def _classes(batch: Batch) -> Tensor | targets.TopLogits:
    """What the teacher says of the classes: all its logits, or the largest."""
    assert batch.targets is not None
    return targets.unpacked(batch.targets) if batch.top_logits else batch.targets


def _encoded(
    student: Student, encode: Callable[..., StudentOut], chunk: int, *inputs: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The layers of contrast, and the head's output, which is the last of them or stands apart."""
    widths = list(student.spec.contrast_widths)
    layers = len(widths)

    def joined(*inputs: Tensor) -> Tensor:
        out = encode(*inputs)
        parts = out.layers if out.predicted_BD is out.layers[-1] else [*out.layers, out.predicted_BD]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    joined_BD = in_chunks(joined, chunk, *inputs)
    if joined_BD.shape[1] > sum(widths):
        widths.append(joined_BD.shape[1] - sum(widths))
    parts = torch.split(joined_BD, widths, dim=1) if len(widths) > 1 else [joined_BD]
    return list(parts[:layers]), parts[-1]


def _contrasted(
    recipe: Recipe, term: ItcRecipe | RankingRecipe, image_layers: list[Tensor], text_layers: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Pictures and captions on each layer the term is computed on; the features are the last of all."""
    count = num_layers(recipe, term)
    return list(zip(image_layers[-count:], text_layers[-count:], strict=True))


def _mean_of(found: list[Contrast]) -> Contrast:
    """The mean over layers of every number."""
    if len(found) == 1:
        return found[0]
    return Contrast(*(torch.stack(numbers).mean() for numbers in zip(*(vars(c).values() for c in found), strict=True)))


def _regression_parts(name: str, regression: Regression) -> dict[str, Tensor]:
    return {name: regression.loss, f"{name}_image": regression.image_loss, f"{name}_text": regression.text_loss}


def _contrast_parts(
    name: str, contrast: Contrast, log_scale: Tensor | None, layers: list[Contrast]
) -> dict[str, Tensor]:
    """What is logged of a contrastive term; of several layers their means, then each layer's loss and scale."""
    parts = {
        name: contrast.loss,
        f"{name}_image": contrast.image_loss,
        f"{name}_text": contrast.text_loss,
        f"{name}_image_accuracy": contrast.image_accuracy,
        f"{name}_text_accuracy": contrast.text_accuracy,
    }
    scales = None if log_scale is None else log_scale.clamp(max=MAX_LOG_SCALE).exp()
    if scales is not None:
        parts[f"{name}_scale"] = scales.mean()
    if len(layers) > 1:
        for number, layer in enumerate(layers, start=1):
            parts[f"{name}_{number}"] = layer.loss
            if scales is not None:
                parts[f"{name}_{number}_scale"] = scales[number - 1]
    return parts


def class_losses(student: Student, recipe: Recipe, batch: Batch, chunk: int = 0) -> Losses:
    """Pictures alone: the teacher's class distribution, from the head."""
    assert recipe.objectives.logits_kl is not None
    assert batch.targets is not None
    assert batch.tokens_BTD is not None
    images_BC = in_chunks(lambda tokens: student.encode_images(tokens).predicted_BD, chunk, batch.tokens_BTD)
    loss = class_kl(images_BC, _classes(batch), recipe.objectives.logits_kl.temperature)
    return Losses(recipe.objectives.logits_kl.weight * loss, {"logits_kl": loss})


def token_losses(student: Student, recipe: Recipe, batch: Batch, chunk: int = 0) -> Losses:
    """Pictures or texts alone: layers-mse at every token, both sides made by the rule of the targets."""
    assert recipe.objectives.layers_mse is not None
    assert batch.targets is not None
    rule = students_rule(student, batch.layers_rule)
    keep_ffn = rule.site == "ffn"
    if batch.tokens_BTD is not None:
        assert student.spec.image is not None
        num_prefix = student.spec.image.num_prefix

        def of_images(tokens_BTD: Tensor) -> Tensor:
            out = student.encode_images(tokens_BTD, keep_ffn=keep_ffn)
            return targets.layers_by_rule(rule, out.hidden, out.ffn, None, num_prefix)

        predicted_BTD = in_chunks(of_images, chunk, batch.tokens_BTD)
    else:
        assert batch.ids_BL is not None
        assert batch.mask_BL is not None

        def of_texts(ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
            out = student.encode_texts(ids_BL, mask_BL, keep_ffn=keep_ffn)
            return targets.layers_by_rule(rule, out.hidden, out.ffn, mask_BL)

        predicted_BTD = in_chunks(of_texts, chunk, batch.ids_BL, batch.mask_BL)
    loss = layers_mse(predicted_BTD, batch.targets, batch.mask_BL)
    share = None if batch.mask_BL is None else batch.mask_BL.sum()
    return Losses(recipe.objectives.layers_mse.weight * loss, {"layers_mse": loss}, share)


def students_rule(student: Student, rule: LayersRule | None) -> LayersRule:
    """The rule of the targets (None: the thesis's) for the student's own blocks.

    They follow the blocks in front of the cut, which the rule may count among those to skip.
    """
    image = student.spec.image
    if rule is None:
        return targets.named_rule("thesis", "image" if image is not None else "text")
    return dataclasses.replace(rule, skip=max(0, rule.skip - (image.cut if image is not None else 0)))


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
        names += [term, f"{term}_image", f"{term}_text"] if recipe.kind == "pairs" else [term]
        if term in ("itc", "ctl", "ranking"):
            names += [f"{term}_image_accuracy", f"{term}_text_accuracy"]
        names += [f"{term}_scale"] if term in ("itc", "ctl") else []
        if term in ("itc", "ranking") and (count := num_layers(recipe, getattr(recipe.objectives, term))) > 1:
            for number in range(1, count + 1):
                names += [f"{term}_{number}"] + ([f"{term}_{number}_scale"] if term == "itc" else [])
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
    if recipe.objectives.logits_kl:
        return class_losses(student, recipe, batch, chunk)
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
