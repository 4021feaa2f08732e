"""How far students are from the teacher's targets: token by token, or in what they say of a picture's class.

B batch, T tokens, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tqdm import tqdm

from emkum.stage2_train.evaluate.encode import quiet
from emkum.stage2_train.loader import BatchLoader, BatchSource
from emkum.stage2_train.losses import autocast, step_losses
from emkum.stage2_train.order import Order
from emkum.stage2_train.recipe import Recipe, target_roles
from emkum.stage2_train.student import Student
from emkum.stage2_train.terms.build import Setting, make_terms


@torch.no_grad()
def token_distances(
    students: Mapping[str, Student],
    recipe: Recipe,
    order: Order,
    source: BatchSource,
    compute: str,
    device: torch.device,
    *,
    threads: int = 2,
    progress: bool | None = False,
) -> dict[str, float]:
    """The recipe's one term for each student, whatever the batches are.

    `layers_mse` over every real token of the order's rows, `logits_kl` over the rows.
    """
    terms = {name: make_terms(Setting(recipe, student)) for name, student in students.items()}
    (role,) = target_roles(recipe)
    totals = {name: torch.zeros((), device=device) for name in students}
    tokens = torch.zeros((), device=device)
    loader = BatchLoader(order, source, threads=threads, pin=device.type == "cuda")
    for host in tqdm(loader, "distillation", unit="batch", disable=quiet(progress), leave=False):
        # Outside of autocast, as in training: a frozen prefix has a precision of its own.
        batch = source.prepare(host, device)
        targets = batch.targets[role]
        count = batch.mask_BL.sum() if batch.mask_BL is not None else targets.shape[0] * targets.shape[1]
        for name, student in students.items():
            with autocast(compute, device):
                totals[name] += step_losses(student, terms[name], recipe, batch).parts[recipe.terms[0]] * count
        tokens += count
    return {name: float(total / tokens) for name, total in totals.items()}
