"""Three branches of a multimodal teacher: pictures, texts, and texts that see their picture, token by token.

    loss = a L(image) + b L(text) + c L(fused)      L = layers-mse: 1/(D n) sum over n real tokens |y_s - y_t|^2

Both sides are means of normalised layers (`emkum.models.targets.layers`): of all tokens of the picture alone; of the
real tokens of the text alone; of the real text tokens where picture and text ran together. Source: THESIS.md section 2,
`distil-beit3`; its text was not found, so the choice of branches and their plain sum are ours.
B batch, T image tokens, L text tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from emkum.stage2_train.objectives.layers_mse import layers_mse
from emkum.stage2_train.objectives.token_share import token_share


@dataclass(frozen=True)
class Branches:
    """Mean layers of a network for each branch: image_BTD, text_BLD, fused_BLD."""

    image_BTD: Tensor
    text_BLD: Tensor
    fused_BLD: Tensor


@dataclass(frozen=True)
class BranchWeights:
    """How much each branch counts in the sum."""

    image: float = 1.0
    text: float = 1.0
    fused: float = 1.0


@dataclass(frozen=True)
class BranchLosses:
    """The weighted sum, and each branch before its weight. All scalars."""

    loss: Tensor
    image_loss: Tensor
    text_loss: Tensor
    fused_loss: Tensor


def branches_mse(student: Branches, teacher: Branches, mask_BL: Tensor, weights: BranchWeights) -> BranchLosses:
    """The loss in this file's opening. mask_BL: bool, True = real text token; a batch of padding alone costs no text.

    Texts have different lengths: of several ranks each has its part of the mean over all their tokens.
    """
    for name in ("image_BTD", "text_BLD", "fused_BLD"):
        shapes = getattr(student, name).shape, getattr(teacher, name).shape
        assert shapes[0] == shapes[1], (name, shapes)  # no broadcasting
    share = token_share(mask_BL.sum())
    image_loss = layers_mse(student.image_BTD, teacher.image_BTD, None)
    text_loss = share * layers_mse(student.text_BLD, teacher.text_BLD, mask_BL)
    fused_loss = share * layers_mse(student.fused_BLD, teacher.fused_BLD, mask_BL)
    loss = weights.image * image_loss + weights.text * text_loss + weights.fused * fused_loss
    return BranchLosses(loss, image_loss, text_loss, fused_loss)
