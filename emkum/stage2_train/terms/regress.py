"""Terms that regress what the teacher says: its CLS, its classes, its layers.

B batch, T tokens, L text tokens, D width.
"""

from __future__ import annotations

from torch import Tensor

from emkum.models import targets
from emkum.models.targets import TopLogits
from emkum.stage2_train.loader import Batch
from emkum.stage2_train.objective_recipes import ClsMseRecipe, LogitsKlRecipe
from emkum.stage2_train.objectives.cls_mse import Regression, cls_mse, mse
from emkum.stage2_train.objectives.layers_mse import layers_mse
from emkum.stage2_train.objectives.logits_kl import class_kl, logits_kl
from emkum.stage2_train.terms.term import Seen, Term

REGRESSION = ("", "image", "text")


def regression_parts(regression: Regression) -> dict[str, Tensor]:
    """A regression by the suffixes of REGRESSION."""
    return {"": regression.loss, "image": regression.image_loss, "text": regression.text_loss}


class ClsMse(Term):
    """objectives/cls_mse.py, of pictures and captions or of pictures alone."""

    def __init__(self, recipe: ClsMseRecipe, pairs: bool) -> None:
        super().__init__("cls_mse", recipe.weight)
        self.pairs = pairs

    @property
    def columns(self) -> tuple[str, ...]:
        return ("cls_mse", "cls_mse_image", "cls_mse_text") if self.pairs else ("cls_mse",)

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        if not self.pairs:
            assert seen.images is not None
            return {"": mse(seen.images.said(self.name), seen.batch.targets["cls"])}
        images, texts = seen.pair
        said = images.said(self.name), texts.said(self.name)
        return regression_parts(cls_mse(*said, seen.batch.targets["cls"]))


class LogitsKl(Term):
    """objectives/logits_kl.py, of pictures and captions or of pictures alone."""

    def __init__(self, recipe: LogitsKlRecipe, pairs: bool) -> None:
        super().__init__("logits_kl", recipe.weight)
        self.temperature, self.pairs = recipe.temperature, pairs

    @property
    def columns(self) -> tuple[str, ...]:
        return ("logits_kl", "logits_kl_image", "logits_kl_text") if self.pairs else ("logits_kl",)

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        taught = classes(seen.batch)
        assert seen.images is not None
        images_BC = seen.images.said(self.name)
        if not self.pairs:
            return {"": class_kl(images_BC, taught, self.temperature)}
        assert seen.texts is not None
        return regression_parts(logits_kl(images_BC, seen.texts.said(self.name), taught, self.temperature))


def classes(batch: Batch) -> Tensor | TopLogits:
    """What the teacher says of the classes: all its logits, or the largest."""
    logits = batch.targets["logits"]
    return targets.unpacked(logits) if batch.top_logits else logits


class LayersMse(Term):
    """objectives/layers_mse.py, of pictures or of texts; both sides made by the rule of the targets."""

    needs = frozenset({"layers"})

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        side, role = (seen.images, "layers") if seen.images is not None else (seen.texts, "text_layers")
        assert side is not None
        assert side.mean_BTD is not None
        return {"": layers_mse(side.mean_BTD, seen.batch.targets[role], seen.batch.mask_BL)}
