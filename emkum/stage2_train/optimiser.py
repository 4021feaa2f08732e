"""Parameter groups, the learning rate as a function of the step, and how large gradients are."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from emkum.errors import UsageError
from emkum.models.resnet import ResNet
from emkum.stage2_train.recipe import BATCH_OF_RATES, Recipe
from emkum.stage2_train.student import Student, pretrained_parts
from emkum.stage2_train.terms.term import Terms

BLOCK = re.compile(r"(image_blocks|text_blocks|network\.stack)\.(?:blocks|biases)\.(\d+)\.")
IN_FRONT = ("image_blocks.", "text_blocks.", "text_embedding.", "network.stack.", "network.embedding.")
UNDECAYED = ("types", "positions", "registers", "biases.")  # in the names of tables
SHARED_PARTS = ("shared blocks", "shared MoME", "shared MLP")


def parameter_groups(student: Student, terms: Terms, recipe: Recipe) -> list[dict[str, Any]]:
    """Pretrained blocks and new parts, each with and without weight decay; more groups where they have other rates.

    Vectors (biases, norms, LayerScale), scales, token types, position tables and relative biases do not decay.
    """
    part_of = {id(p): part for part, parameters in student.parts().items() for p in parameters}
    factors = layer_factors(student, recipe.optimiser.layer_decay)
    groups: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    for name, parameter in [*student.named_parameters(), *terms.named_parameters()]:
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not any(word in name for word in UNDECAYED)
            key = rate_key(recipe, part_of.get(id(parameter), "")), factors.get(name, 1.0), decays
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": factor * getattr(recipe.optimiser, rate_name) * recipe.training.step_batch / BATCH_OF_RATES,
            "weight_decay": recipe.optimiser.weight_decay if decays else 0.0,
        }
        for (rate_name, factor, decays), parameters in groups.items()
    ]


def rate_key(recipe: Recipe, part: str) -> str:
    """Which rate of [optimiser] a part of the student has: its own, where the recipe gives one."""
    own = dict.fromkeys(("image blocks", "network"), "image_encoder_lr")
    own |= dict.fromkeys(("text embedding", "text blocks"), "text_encoder_lr")
    key = own.get(part, "shared_lr" if part in SHARED_PARTS else "lr")
    if getattr(recipe.optimiser, key) != "auto":
        return key
    return "encoder_lr" if part in pretrained_parts(recipe) else "lr"


def layer_factors(student: Student, decay: float) -> dict[str, float]:
    """By the name of a pretrained block's parameter: decay ** (1 + blocks of its encoder behind it).

    The text embedding lies in front of all text blocks. BEiT (arXiv:2106.08254), appendix H: there too the topmost
    block has one factor of `decay`, and what comes after the encoder has none. 1 for all: no parameter is named.
    Raises UsageError for a ResNet.
    """
    if decay == 1:
        return {}
    if isinstance(student.network, ResNet):
        raise UsageError(
            f"optimiser.layer_decay = {decay:g} is by blocks, and a ResNet as student has none",
            "leave optimiser.layer_decay out",
        )
    names = [name for name, _ in student.named_parameters()]
    found = {name: (match[1], int(match[2])) for name in names if (match := BLOCK.match(name))}
    depth = {side: 1 + max(number for s, number in found.values() if s == side) for side, _ in found.values()}
    factors = {name: decay ** (depth[side] - number) for name, (side, number) in found.items()}
    for name in names:  # what lies in front of the blocks, or is common to them
        if name not in factors and name.startswith(IN_FRONT):
            factors[name] = decay ** (depth.get(_side(name), 0) + 1)
    return factors


def _side(name: str) -> str:
    """The stack that a parameter in front of blocks belongs to, as BLOCK names it."""
    return next((side for side in ("image_blocks", "network.stack") if name[:5] == side[:5]), "text_blocks")


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


# --- gradients ---------------------------------------------------------------------------------------------------


def trained_parts(student: Student, terms: Terms) -> dict[str, list[nn.Parameter]]:
    """What is trained, by the name of its column: each part of the student, and what the objectives learn."""
    parts = {part.replace(" ", "_").lower(): parameters for part, parameters in student.parts().items()}
    parts["objectives"] = list(terms.parameters())
    trained = {part: [p for p in parameters if p.requires_grad] for part, parameters in parts.items()}
    return {f"grad_norm_{part}": parameters for part, parameters in trained.items() if parameters}


def gradient_norms(student: Student, terms: Terms) -> dict[str, Tensor]:
    """Euclidean norms of the gradient as it is, `grad_norm` of the whole and one a part, scalars on the device."""
    parts = trained_parts(student, terms)
    norms = {part: _norm([p.grad for p in parameters if p.grad is not None]) for part, parameters in parts.items()}
    device = next(student.parameters()).device
    norms = {part: norm.to(device) for part, norm in norms.items()}
    return {"grad_norm": torch.linalg.vector_norm(torch.stack(list(norms.values()))), **norms}


def _norm(gradients: list[Tensor]) -> Tensor:
    if not gradients:
        return torch.zeros(())
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)).float())
    return norm


def norm_names(student: Student, terms: Terms) -> list[str]:
    """The columns of the log that `gradient_norms` fills."""
    return ["grad_norm", *trained_parts(student, terms)]
