"""What a recipe may say whose student reads pixels, and of augmentations of what is cached; torch is not loaded."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from emkum.errors import UsageError

if TYPE_CHECKING:
    from emkum.stage2_train.recipe import Recipe

SMALLEST_MIXUP = 0.01  # far below, both Gamma draws round to 0
MIXED_TERMS = ("cls_mse", "layers_mse", "logits_kl")
UNREAD_BY_PIXELS = {  # keys that speak of blocks behind a frozen network
    "student": (
        *("image_blocks", "image_start", "init", "init_image", "frozen_image", "frozen_image_blocks"),
        *("shared", "shared_start", "shared_heads", "shared_mlp_ratio", "token_type_scale", "heads"),
    ),
    "data": ("encoder", "cut"),
}


def check_pixels(recipe: Recipe, where: str) -> None:
    """Raise UsageError for what a student of pixels does not have."""
    if not recipe.student.pixels:
        return
    said = f'student.pixels = "{recipe.student.pixels}"'
    if recipe.student.pixels == "random:":
        raise UsageError(f"{where}: {said} names no network", "say whose shape: random:resnet50")
    if recipe.kind != "images":
        raise UsageError(
            f"{where}: {said} is for kind images, and this recipe is of {recipe.kind}",
            "leave student.pixels out, or train a student of pictures alone: --recipe resnet-kd or vit-kd",
        )
    for table, keys in UNREAD_BY_PIXELS.items():
        for key in keys:
            _refuse_set(recipe, table, key, f"has no effect: {said} is a whole network", where)
    if recipe.student.shared_blocks > 1 or recipe.student.types_where == "before":
        key = "shared_blocks" if recipe.student.shared_blocks > 1 else "token_types"
        raise UsageError(f"{where}: student.{key} has no effect: {said} is a whole network", f"leave student.{key} out")
    if recipe.data.token_dropout:
        raise UsageError(
            f"{where}: data.token_dropout = {recipe.data.token_dropout:g} is of cached tokens, which {said} has not",
            "leave data.token_dropout out",
        )


def check_augmentations(recipe: Recipe, where: str) -> None:
    """Raise UsageError for augmentations that an objective, or the kind of sample, does not allow."""
    _check_dropout(recipe, where)
    wanted = recipe.data.mixup
    if not wanted:
        return
    said = f"data.mixup = {wanted:g}"
    if wanted < SMALLEST_MIXUP:
        raise UsageError(f"{where}: {said} mixes nothing", f"use {SMALLEST_MIXUP:g} or more, or 0 for none")
    others = [term for term in recipe.terms if term not in MIXED_TERMS]
    if others:
        raise UsageError(
            f"{where}: {said} is for {', '.join(MIXED_TERMS)}: objectives.{others[0]} takes each sample as one of its "
            "own, and a mixed one is two",
            "leave data.mixup out",
        )
    if recipe.kind != "images":
        raise UsageError(
            f"{where}: {said} is for kind images: a sample of {recipe.kind} has words, which do not mix",
            "leave data.mixup out",
        )


def _check_dropout(recipe: Recipe, where: str) -> None:
    share = recipe.data.token_dropout
    if not share:
        return
    said = f"data.token_dropout = {share:g}"
    if recipe.objectives.mvlm is not None and recipe.objectives.mvlm.patch_share:
        raise UsageError(
            f"{where}: {said} beside objectives.mvlm.patch_share, which hides patches itself",
            "leave one of them out: --set objectives.mvlm.patch_share=0",
        )
    if recipe.student.positions == "shared":
        raise UsageError(
            f'{where}: {said} beside student.positions = "shared", which are counted by the place in the row',
            "leave one of them out",
        )


def _refuse_set(recipe: Recipe, table: str, key: str, why: str, where: str) -> None:
    holder: Any = getattr(recipe, table)
    value = getattr(holder, key)
    if value != next(f.default for f in dataclasses.fields(holder) if f.name == key):
        raise UsageError(f"{where}: {table}.{key} = {value!r} {why}", f"leave {table}.{key} out")
