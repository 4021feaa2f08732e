"""Terms that match: pictures with captions as pairs, and their tokens with each other.

B batch, N patches, L text tokens, D width.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from emkum.stage2_train.objective_recipes import CmliRecipe, ItcQueueRecipe, ItmRecipe, TargetCmliRecipe
from emkum.stage2_train.objectives.cmli import cmli
from emkum.stage2_train.objectives.draws import uniform
from emkum.stage2_train.objectives.ema import ema_update_
from emkum.stage2_train.objectives.gather import gathered_constants, num_ranks
from emkum.stage2_train.objectives.itc import clamp_log_scale, start_log_scale
from emkum.stage2_train.objectives.itc_queue import FeatureQueue, itc_queue
from emkum.stage2_train.objectives.itm import MatchHead, itm, similarities
from emkum.stage2_train.objectives.proximal import proximal
from emkum.stage2_train.objectives.target_cmli import empty_target, target_cmli
from emkum.stage2_train.objectives.words import words_only
from emkum.stage2_train.student_network import Student
from emkum.stage2_train.terms.contrast import CONTRAST, contrast_parts, log_scale, scale_of
from emkum.stage2_train.terms.term import Seen, Side, Term


class ItcQueue(Term):
    """objectives/itc_queue.py, its queue filled by the student or by an average of it, and objectives/proximal.py."""

    def __init__(self, recipe: ItcQueueRecipe, student: Student) -> None:
        super().__init__("itc_queue", recipe.weight)
        self.log_scale = log_scale(recipe.temperature)
        self.queue = FeatureQueue(recipe.rows, student.spec.contrast_widths[-1])
        self.average = copy.deepcopy(student).requires_grad_(False) if _averages(recipe) else None
        self.momentum, self.proximal, self.keys = recipe.momentum, recipe.proximal, recipe.keys

    @property
    def columns(self) -> tuple[str, ...]:
        suffixes = [*CONTRAST, "scale", *(["proximal"] if self.proximal else [])]
        return tuple(f"itc_queue_{suffix}" if suffix else "itc_queue" for suffix in suffixes)

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        images_BD, texts_BD = (side.of(self.name) for side in seen.pair)
        slow = self._slow(seen)
        keys = slow if self.keys == "momentum" else None
        contrast = itc_queue(images_BD, texts_BD, self.log_scale, seen.rows_B, self.queue, keys)
        pushed = (*(keys or (images_BD.detach(), texts_BD.detach())), seen.rows_B)
        images_GD, texts_GD, rows_G = map(gathered_constants, pushed)
        self.queue.push(images_GD, texts_GD, rows_G)
        parts = {**contrast_parts(contrast), "scale": scale_of(self.log_scale)}
        if self.proximal:
            assert slow is not None
            near = proximal(images_BD, texts_BD, *slow, self.proximal).loss
            parts |= {"": parts[""] + near, "proximal": near}
        return parts

    @torch.no_grad()
    def _slow(self, seen: Seen) -> tuple[Tensor, Tensor] | None:
        """The batch as the average sees it."""
        if self.average is None:
            return None
        tokens_BTD, ids_BL, mask_BL = seen.inputs
        images, texts = self.average.encode_images(tokens_BTD), self.average.encode_texts(ids_BL, mask_BL)
        return images.of(self.name), texts.of(self.name)

    def after_step(self, student: Student) -> None:
        clamp_log_scale(self.log_scale)
        if self.average is not None:
            ema_update_(self.average, student, self.momentum)

    def summary(self) -> str:
        filled = "a momentum encoder" if self.keys == "momentum" else "the student"
        return f"queue of itc-queue: the last {self.queue.images.capacity:,} pairs, as {filled} saw them"


def _averages(recipe: ItcQueueRecipe) -> bool:
    return recipe.keys == "momentum" or recipe.proximal > 0


class Itm(Term):
    """objectives/itm.py, with its head."""

    draws = True
    suffixes = ("", "pair", "image", "text", "accuracy", "always_no")

    def __init__(self, recipe: ItmRecipe, width: int) -> None:
        super().__init__("itm", recipe.weight)
        self.head = MatchHead(width, recipe.fusion)
        self.hard = recipe.negatives == "hard"
        self.sharpness: Tensor
        self.register_buffer("sharpness", torch.tensor(start_log_scale(0.07)), persistent=False)  # CLIP's start

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        images_BD, texts_BD = (side.of(self.name) for side in seen.pair)
        drawn_BC = uniform(len(images_BD), 2 * len(images_BD) * num_ranks(), seen.random, images_BD.device)
        similar = similarities(images_BD, texts_BD, self.sharpness) if self.hard else None
        found = itm(self.head, images_BD, texts_BD, seen.rows_B, drawn_BC, similar)
        numbers = (found.loss, found.pair_loss, found.image_loss, found.text_loss, found.accuracy, found.always_no)
        return dict(zip(self.suffixes, numbers, strict=True))


class Cmli(Term):
    """objectives/cmli.py."""

    needs = frozenset({"tokens"})
    suffixes = (*CONTRAST, "scale")

    def __init__(self, recipe: CmliRecipe, longest: int) -> None:
        super().__init__("cmli", recipe.weight)
        self.log_scale = log_scale(recipe.temperature)
        self.chunk, self.longest = recipe.chunk, longest

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        patches_BND, texts_BLD = tokens_of(seen)
        words_BL = words_only(seen.mask_BL)
        contrast = cmli(
            patches_BND, texts_BLD, words_BL, self.log_scale, seen.rows_B, chunk=self.chunk, length=self.longest
        )
        return {**contrast_parts(contrast), "scale": scale_of(self.log_scale)}

    def after_step(self, student: Student) -> None:
        clamp_log_scale(self.log_scale)


class TargetCmli(Term):
    """objectives/target_cmli.py: the student's tokens, by a linear layer in the teacher's width, and its patches."""

    needs = frozenset({"tokens"})

    def __init__(self, recipe: TargetCmliRecipe, width: int, target_width: int) -> None:
        super().__init__("target_cmli", recipe.weight)
        self.head = nn.Linear(width, target_width)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.empty_D = empty_target(target_width) if recipe.empty else None

    @property
    def columns(self) -> tuple[str, ...]:
        suffixes = ["", "image", "text", *(["empty_share", "empty_penalty"] if self.empty_D is not None else [])]
        return tuple(f"target_cmli_{suffix}" if suffix else "target_cmli" for suffix in suffixes)

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        patches_BND, texts_BLD = (self.head(tokens) for tokens in tokens_of(seen))
        words_BL = words_only(seen.mask_BL)
        targets_BND = seen.batch.targets["patches"]
        found = target_cmli(patches_BND, texts_BLD, words_BL, targets_BND, empty_D=self.empty_D)
        parts = {"": found.loss, "image": found.image_loss, "text": found.text_loss}
        if self.empty_D is not None:
            parts |= {"empty_share": found.empty_share, "empty_penalty": found.empty_penalty}
        return parts


def tokens_of(seen: Seen) -> tuple[Tensor, Tensor]:
    """The student's last tokens: patches without CLS and registers, and all of the texts."""
    images, texts = seen.pair
    assert seen.student.spec.image is not None
    return _tokens(images)[:, seen.student.spec.image.num_prefix :], _tokens(texts)


def _tokens(side: Side) -> Tensor:
    assert side.tokens_BTD is not None
    return side.tokens_BTD
