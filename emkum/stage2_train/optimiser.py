"""Parameter groups and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from emkum.stage2_train.losses import Terms
from emkum.stage2_train.recipe import BATCH_OF_RATES, Recipe
from emkum.stage2_train.student import PRETRAINED_PARTS, Student


def parameter_groups(student: Student, terms: Terms, recipe: Recipe) -> list[dict[str, Any]]:
    """Four groups: pretrained blocks and new parts, each with and without weight decay.

    Vectors (biases, norms, LayerScale), scales, token types, position tables and relative biases do not decay.
    """
    pretrained = {id(p) for part in PRETRAINED_PARTS for p in student.parts().get(part, [])}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in [*student.named_parameters(), *terms.named_parameters()]:
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not any(word in name for word in ("types", "positions", "biases."))
            groups.setdefault((id(parameter) in pretrained, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": peak_rate(recipe, encoder),
            "weight_decay": recipe.optimiser.weight_decay if decays else 0.0,
        }
        for (encoder, decays), parameters in groups.items()
    ]


def peak_rate(recipe: Recipe, pretrained: bool = False) -> float:
    """The highest learning rate of new parts, or of pretrained blocks: the recipe's, grown with the batch."""
    wanted = recipe.optimiser
    return (wanted.encoder_lr if pretrained else wanted.lr) * recipe.training.step_batch / BATCH_OF_RATES


def rate(recipe: Recipe, step: int, num_steps: int) -> float:
    """The fraction of the learning rate at `step` (from 0): linear warm-up, then cosine to `final_lr` or constant."""
    wanted = recipe.optimiser
    warmup = math.ceil(wanted.warmup * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if wanted.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    return wanted.final_lr + (1 - wanted.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
