"""Class distributions: picture and caption both predict what a classifier says of the picture.

B batch, C classes, K classes that are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from emkum.models.targets import TopLogits
from emkum.stage2_train.objectives.cls_mse import Regression


def logits_kl(images_BC: Tensor, texts_BC: Tensor, teacher: Tensor | TopLogits, temperature: float = 1.0) -> Regression:
    """1/2 KL(p || picture) + 1/2 KL(p || caption), p = softmax(teacher / T); each KL as in `class_kl`.

    THESIS.md section 2, `logits-kl`; SHRe (Aytar et al. 2017), section 3.
    """
    image_loss = class_kl(images_BC, teacher, temperature)
    text_loss = class_kl(texts_BC, teacher, temperature)
    return Regression(0.5 * (image_loss + text_loss), image_loss, text_loss)


def class_kl(student_BC: Tensor, teacher: Tensor | TopLogits, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the batch, in float32 (float64 stays).

    T^2 keeps the gradient's size when T changes (Hinton et al. 2015, section 2). Of `TopLogits` the K + 1 outcomes are
    compared: the K classes, and any other. The rest is a sum at T = 1, so that is the only temperature they have.
    """
    exact_BC = student_BC if student_BC.dtype == torch.float64 else student_BC.float()
    if isinstance(teacher, TopLogits):
        assert temperature == 1.0, "logits-top has no other temperature"
        exact_BC, teacher = _with_rest(exact_BC, teacher)
    assert exact_BC.shape == teacher.shape, (exact_BC.shape, teacher.shape)  # no broadcasting
    taught_BC = (teacher.to(exact_BC.dtype) / temperature).softmax(dim=1)
    found_BC = (exact_BC / temperature).log_softmax(dim=1)
    return functional.kl_div(found_BC, taught_BC, reduction="batchmean") * temperature**2


def _with_rest(student_BC: Tensor, teacher: TopLogits) -> tuple[Tensor, Tensor]:
    """The logits of K + 1 outcomes, of the student and of the teacher; of K where that is every class."""
    kept_BK = student_BC.gather(1, teacher.classes_BK)
    if kept_BK.shape[1] == student_BC.shape[1]:
        return kept_BK, teacher.values_BK
    others_B = student_BC.scatter(1, teacher.classes_BK, -torch.inf).logsumexp(dim=1)
    rest_B = teacher.rest_B.to(teacher.values_BK.dtype)
    return torch.cat([kept_BK, others_B[:, None]], 1), torch.cat([teacher.values_BK, rest_B[:, None]], 1)
