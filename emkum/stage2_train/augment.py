"""Augmentations of a batch as the cache keeps it: patches left out, samples mixed, targets alike.

B batch, T tokens, P prefix (CLS and registers), C classes, D width.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emkum.errors import UsageError
from emkum.stage2_train.loader import Batch
from emkum.stage2_train.objectives.latent import draw_mix, drop_tokens, mix_up, take_tokens
from emkum.stage2_train.recipe import Recipe
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.student import Student

if TYPE_CHECKING:
    from emkum.models.backbone import StackSpec

TOKEN_ROLES = ("layers", "patches")  # targets with a token for each of the picture's


def augments(recipe: Recipe) -> bool:
    """Whether batches are changed before the student sees them in training."""
    return bool(recipe.data.token_dropout or recipe.data.mixup)


@torch.no_grad()
def augmented(batch: Batch, recipe: Recipe, student: Student, generator: torch.Generator) -> Batch:
    """The batch with `data.token_dropout` and `data.mixup`, drawn from the generator; itself where neither is set."""
    if recipe.data.token_dropout:
        assert student.spec.image is not None
        batch = with_fewer_tokens(batch, 1 - recipe.data.token_dropout, student.spec.image.num_prefix, generator)
    if recipe.data.mixup:
        device = next(student.parameters()).device
        temperature = recipe.objectives.logits_kl.temperature if recipe.objectives.logits_kl else 1.0
        batch = mixed(batch, draw_mix(recipe.data.mixup, generator, device), temperature)
    return batch


def with_fewer_tokens(batch: Batch, keep: float, num_prefix: int, generator: torch.Generator) -> Batch:
    """`latent.drop_tokens`, and the targets of tokens at the same places. Of `layers` without a prefix, at theirs.

    The student's side of layers-mse is then normalised over the tokens that are left, the target over all.
    """
    assert batch.tokens_BTD is not None
    num_tokens = batch.tokens_BTD.shape[1]
    kept = drop_tokens(batch.tokens_BTD, keep, num_prefix, generator)
    targets = dict(batch.targets)
    for role in TOKEN_ROLES:
        if role in targets:
            first = num_tokens - targets[role].shape[1]  # tokens in front that the target has not
            assert first in (0, num_prefix), (num_tokens, targets[role].shape)
            targets[role] = take_tokens(targets[role], kept.kept_BK[:, first:] - first)
    return dataclasses.replace(batch, tokens_BTD=kept.tokens_BKD, targets=targets)


def mixed(batch: Batch, weight: Tensor, temperature: float = 1.0) -> Batch:
    """`latent.mix_up` of pictures and targets by one weight; of logits, of the classes' probabilities.

        z <- T log(lambda softmax(z_i / T) + (1 - lambda) softmax(z_j / T)),

    so that softmax(z / T) is the mixture that logits-kl regresses.
    """
    assert not batch.top_logits, "check_batches refuses them"
    targets = {
        role: _mixed_logits(target, weight, temperature) if role == "logits" else mix_up(target, weight)
        for role, target in batch.targets.items()
    }
    tokens, images = (None if inputs is None else mix_up(inputs, weight) for inputs in _pictures(batch))
    return dataclasses.replace(batch, tokens_BTD=tokens, images_BCHW=images, targets=targets)


def _pictures(batch: Batch) -> tuple[Tensor | None, Tensor | None]:
    return batch.tokens_BTD, batch.images_BCHW


def _mixed_logits(logits_BC: Tensor, weight: Tensor, temperature: float) -> Tensor:
    probabilities_BC = (logits_BC.float() / temperature).softmax(dim=1)
    smallest = torch.finfo(torch.float32).tiny
    return temperature * mix_up(probabilities_BC, weight).clamp(min=smallest).log()


def check_student(recipe: Recipe, names: FieldNames, student: Student) -> None:
    """Raise UsageError where the student, or its targets, do not allow what the recipe asks for."""
    if recipe.data.mixup and names.targets.get("logits", "").endswith("-top"):
        raise UsageError(
            f"recipe {recipe.name}: data.mixup = {recipe.data.mixup:g}: of {names.targets['logits']} two pictures have "
            "different classes, and what is left of each is one sum",
            "leave data.mixup out, or extract all logits, without --logits-top",
        )
    spec = student.spec
    stacks: list[StackSpec | None] = [spec.image.stack if spec.image else None, spec.shared]
    placed = [stack for stack in stacks if stack is not None and (stack.relative_bias != "none" or stack.rotary_base)]
    if recipe.data.token_dropout and placed:
        how = "a relative position bias" if placed[0].relative_bias != "none" else "rotary positions"
        raise UsageError(
            f"recipe {recipe.name}: data.token_dropout = {recipe.data.token_dropout:g}: the student's blocks "
            f"have {how}, by the place of each token in the whole picture",
            "leave data.token_dropout out, or extract with an encoder whose positions are added to its tokens",
        )
