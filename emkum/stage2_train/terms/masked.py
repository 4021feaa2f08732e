"""Terms that run pictures and captions through the shared blocks at once: masked modelling, and the three branches.

B batch, T image tokens, L text tokens, D width, J codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emkum.models import targets
from emkum.models.targets import LayersRule
from emkum.stage2_train.objective_recipes import BranchesRecipe, MvlmRecipe
from emkum.stage2_train.objectives.branches import Branches, BranchWeights, branches_mse
from emkum.stage2_train.objectives.codes import nearest_codes
from emkum.stage2_train.objectives.masking import Vocabulary, mask_patches, mask_words
from emkum.stage2_train.objectives.mvlm import MaskedPatchHead, MaskedWordHead, masked_ce, tokens_at
from emkum.stage2_train.student_network import PairOut, Student
from emkum.stage2_train.terms.term import Seen, Term


@dataclass(frozen=True)
class Hidden:
    """What masked patches need: the codebook they are classified by, and what a patch without a picture looks like
    at the student's input, [T, D]: its position."""

    codebook_JD: Tensor
    blank_TD: Tensor


class Mvlm(Term):
    """objectives/mvlm.py: words named from the picture, patches from the caption."""

    draws = True

    def __init__(
        self, recipe: MvlmRecipe, student: Student, words: Vocabulary | None, hidden: Hidden | None, longest: int = 0
    ) -> None:
        super().__init__("mvlm", recipe.weight)
        assert student.text_embedding is not None
        self.recipe, self.longest = recipe, longest
        vocabulary, text_width = student.text_embedding.tokens.shape
        width = student.spec.width
        self.word_head = self.patch_head = None
        if words is not None:
            self.word_head = MaskedWordHead(width, vocabulary, text_width)
            self.mask_id = words.mask_id
            self.special_V: Tensor
            self.words_W: Tensor
            self.register_buffer("special_V", words.special_V, persistent=False)
            self.register_buffer("words_W", words.words_W, persistent=False)
        if hidden is not None:
            self.patch_head = MaskedPatchHead(width, len(hidden.codebook_JD))
            self.codebook_JD: Tensor
            self.blank_TD: Tensor
            self.register_buffer("codebook_JD", hidden.codebook_JD, persistent=False)
            self.register_buffer("blank_TD", hidden.blank_TD, persistent=False)

    @property
    def columns(self) -> tuple[str, ...]:
        words = ["words", "words_accuracy"] if self.word_head is not None else []
        patches = ["patches", "patches_accuracy"] if self.patch_head is not None else []
        return "mvlm", *(f"mvlm_{suffix}" for suffix in [*words, *patches])

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        if self.word_head is not None:
            parts |= self._words(seen)
        if self.patch_head is not None:
            parts |= self._patches(seen)
        return {"": torch.stack([loss for half, loss in parts.items() if half in ("words", "patches")]).sum(), **parts}

    def _words(self, seen: Seen) -> dict[str, Tensor]:
        (tokens_BTD, ids_BL, mask_BL), embedding = seen.inputs, seen.student.text_embedding
        assert self.word_head is not None
        assert embedding is not None
        words = Vocabulary(self.special_V, self.words_W, self.mask_id)
        shown = mask_words(ids_BL, mask_BL, words, self.recipe.word_share, seen.random, self.longest)
        out = seen.student.encode_pairs(tokens_BTD, shown.ids_BL, mask_BL)
        tokens_BKD = tokens_at(out.text_BLD, shown.places_BK, shown.labels_BK)
        found = masked_ce(self.word_head(tokens_BKD, embedding.tokens), shown.labels_BK)
        return {"words": found.loss, "words_accuracy": found.accuracy}

    def _patches(self, seen: Seen) -> dict[str, Tensor]:
        (tokens_BTD, ids_BL, mask_BL), image = seen.inputs, seen.student.spec.image
        assert self.patch_head is not None
        assert image is not None
        side = round((tokens_BTD.shape[1] - image.num_prefix) ** 0.5)
        hidden = mask_patches(len(ids_BL), (side, side), self.recipe.patch_share, seen.random, ids_BL.device)
        shown_BTD = self.patch_head.hide(tokens_BTD, hidden.mask_BN, self.blank_TD)
        out = seen.student.encode_pairs(shown_BTD, ids_BL, mask_BL)
        codes_BN = nearest_codes(seen.batch.targets["patches"], self.codebook_JD)
        labels_BM = codes_BN.gather(1, hidden.places_BM)
        tokens_BMD = tokens_at(out.image_BTD[:, image.num_prefix :], hidden.places_BM, labels_BM)
        found = masked_ce(self.patch_head(tokens_BMD), labels_BM)
        return {"patches": found.loss, "patches_accuracy": found.accuracy}


class BranchesTerm(Term):
    """objectives/branches.py. rule: of the fused targets, for the student's shared blocks."""

    needs = frozenset({"layers"})
    suffixes = ("", "image", "text", "fused")

    def __init__(self, recipe: BranchesRecipe, rule: LayersRule) -> None:
        super().__init__("branches", recipe.weight)
        self.weights, self.rule = BranchWeights(recipe.image, recipe.text, recipe.fused), rule

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        images, texts = seen.pair
        assert images.mean_BTD is not None
        assert texts.mean_BTD is not None
        pairs: PairOut = seen.student.encode_pairs(*seen.inputs)
        num_image = pairs.image_BTD.shape[1]
        hidden = [tokens_BTD[:, num_image:] for tokens_BTD in pairs.hidden]
        fused_BLD = targets.layers_by_rule(self.rule, hidden, [], seen.mask_BL)
        student = Branches(images.mean_BTD, texts.mean_BTD, fused_BLD)
        taught = seen.batch.targets
        teacher = Branches(taught["layers"], taught["text_layers"], taught["pair_layers"])
        found = branches_mse(student, teacher, seen.mask_BL, self.weights)
        return dict(zip(self.suffixes, (found.loss, found.image_loss, found.text_loss, found.fused_loss), strict=True))
