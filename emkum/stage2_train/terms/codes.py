"""Terms that meet the teacher's CLS through something learned or found in the cache: codes, prototypes, fewer channels.

B batch, D width, J codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emkum.stage2_train.objective_recipes import CodesRecipe, CodesVqRecipe, DinoRecipe, ReducedRecipe
from emkum.stage2_train.objectives.codes import Classification, codes_ce, nearest_codes
from emkum.stage2_train.objectives.codes_vq import ProductCodebooks, SubCodeHead, codes_vq
from emkum.stage2_train.objectives.dino import DinoHeads, dino
from emkum.stage2_train.objectives.reduced import ReducedHeads, reduced
from emkum.stage2_train.student_network import Student
from emkum.stage2_train.terms.contrast import CONTRAST
from emkum.stage2_train.terms.term import Seen, Term


class Codes(Term):
    """objectives/codes.py: a linear classifier of the features, and a codebook from the cache."""

    suffixes = CONTRAST

    def __init__(self, recipe: CodesRecipe, width: int, codebook_JD: Tensor) -> None:
        super().__init__("codes", recipe.weight)
        self.head = nn.Linear(width, len(codebook_JD))
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.codebook_JD: Tensor
        self.register_buffer("codebook_JD", codebook_JD, persistent=False)

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        images, texts = seen.pair
        codes_B = nearest_codes(seen.batch.targets["cls"], self.codebook_JD)
        return _classified(codes_ce(self.head(images.of(self.name)), self.head(texts.of(self.name)), codes_B))


class CodesVq(Term):
    """objectives/codes_vq.py, with its codebooks."""

    suffixes = (*CONTRAST, "perplexity", "used", "restarted")

    def __init__(self, recipe: CodesVqRecipe, width: int, target_width: int) -> None:
        super().__init__("codes_vq", recipe.weight)
        self.codebooks = ProductCodebooks(target_width, recipe.groups, recipe.codes, recipe.momentum)
        self.head = SubCodeHead(width, recipe.groups, recipe.codes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        images, texts = seen.pair
        targets_BD = seen.batch.targets["cls"]
        usage = self.codebooks.update_(targets_BD)
        codes_BS = self.codebooks.codes(targets_BD)
        found = codes_vq(self.head(images.of(self.name)), self.head(texts.of(self.name)), codes_BS)
        used = {"perplexity": usage.perplexity, "used": usage.used, "restarted": usage.restarted}
        return {**_classified(found), **used}


def _classified(found: Classification) -> dict[str, Tensor]:
    numbers = (found.loss, found.image_loss, found.text_loss, found.image_accuracy, found.text_accuracy)
    return dict(zip(CONTRAST, numbers, strict=True))


class Dino(Term):
    """objectives/dino.py, with its heads and the centre."""

    suffixes = ("", "image", "text", "image_kl", "text_kl", "target_entropy", "marginal_entropy")

    def __init__(self, recipe: DinoRecipe, width: int) -> None:
        super().__init__("dino", recipe.weight)
        self.heads = DinoHeads(width, recipe.prototypes)
        self.recipe = recipe

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        images, texts = seen.pair
        said = images.said(self.name), texts.said(self.name)
        images_BK, texts_BK, teacher_BK = self.heads(*said, seen.batch.targets["cls"])
        found = dino(
            images_BK,
            texts_BK,
            teacher_BK,
            self.heads.centre_K,
            student_temperature=self.recipe.student_temperature,
            teacher_temperature=self.recipe.teacher_temperature,
        )
        self.heads.update_centre_(teacher_BK, self.recipe.centre)
        numbers = (
            found.loss,
            found.image_loss,
            found.text_loss,
            found.image_kl,
            found.text_kl,
            found.target_entropy,
            found.marginal_entropy,
        )
        return dict(zip(self.suffixes, numbers, strict=True))

    def after_step(self, student: Student) -> None:
        self.heads.update_teacher_(self.recipe.momentum)


class Reduced(Term):
    """objectives/reduced.py, with its projections; `principal`: components and mean to begin with."""

    suffixes = ("", "image", "text", "image_guard", "text_guard")

    def __init__(self, recipe: ReducedRecipe, width: int, principal: tuple[Tensor, Tensor] | None) -> None:
        super().__init__("reduced", recipe.weight)
        self.heads = ReducedHeads(width, recipe.width)
        if principal is not None:
            self.heads.start(*principal)
        self.recipe = recipe

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        images, texts = seen.pair
        projected = self.heads(images.said(self.name), texts.said(self.name), seen.batch.targets["cls"])
        found = reduced(*projected, guard_weight=self.recipe.variance)
        numbers = (found.loss, found.image_loss, found.text_loss, found.image_guard, found.text_guard)
        return dict(zip(self.suffixes, numbers, strict=True))

    def after_step(self, student: Student) -> None:
        self.heads.update_(self.recipe.momentum)


def as_tensor(array: object) -> Tensor:
    """A float32 copy of a NumPy array."""
    return torch.tensor(array, dtype=torch.float32)
