"""Terms that contrast: pictures with captions, and both with the teacher's targets.

B batch, G batch of all ranks, N candidates, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emkum.stage2_train.objective_recipes import CtlRecipe, ItcRecipe, RankingRecipe
from emkum.stage2_train.objectives.ctl import FifoBank, WholeBank, ctl
from emkum.stage2_train.objectives.gather import gathered_constants, own_part
from emkum.stage2_train.objectives.itc import MAX_LOG_SCALE, Contrast, clamp_log_scale, itc, start_log_scale
from emkum.stage2_train.objectives.ranking import ranking
from emkum.stage2_train.student import Student
from emkum.stage2_train.terms.term import Seen, Term

CONTRAST = ("", "image", "text", "image_accuracy", "text_accuracy")


def log_scale(temperature: float, shape: tuple[int, ...] = ()) -> nn.Parameter:
    """The start of a learned scale."""
    return nn.Parameter(torch.full(shape, start_log_scale(temperature)))


def scale_of(log_scale: Tensor) -> Tensor:
    """The scale itself, as it is logged."""
    return log_scale.detach().clamp(max=MAX_LOG_SCALE).exp()


def contrast_parts(contrast: Contrast) -> dict[str, Tensor]:
    """A contrast by the suffixes of CONTRAST."""
    return dict(
        zip(
            CONTRAST,
            (
                contrast.loss,
                contrast.image_loss,
                contrast.text_loss,
                contrast.image_accuracy,
                contrast.text_accuracy,
            ),
            strict=True,
        )
    )


class _Layered(Term):
    """A contrast of pictures and captions on the features, or on several layers: then the mean of them."""

    def __init__(self, name: str, weight: float, num_layers: int) -> None:
        super().__init__(name, weight)
        self.num_layers = num_layers

    def _layers(self, seen: Seen) -> list[tuple[Tensor, Tensor]]:
        images, texts = seen.pair
        if self.num_layers == 1:
            return [(images.of(self.name), texts.of(self.name))]
        return list(zip(images.layers[-self.num_layers :], texts.layers[-self.num_layers :], strict=True))


def _mean_of(found: list[Contrast]) -> Contrast:
    """The mean over layers of every number."""
    if len(found) == 1:
        return found[0]
    return Contrast(*(torch.stack(numbers).mean() for numbers in zip(*(vars(c).values() for c in found), strict=True)))


class Itc(_Layered):
    """objectives/itc.py, on the last or on several layers, each with a learned scale of its own."""

    def __init__(self, recipe: ItcRecipe, num_layers: int) -> None:
        super().__init__("itc", recipe.weight, num_layers)
        self.log_scale = log_scale(recipe.temperature, (num_layers,) if recipe.layers == "all" else ())

    @property
    def columns(self) -> tuple[str, ...]:
        suffixes = [*CONTRAST, "scale"]
        for number in range(1, self.num_layers + 1) if self.num_layers > 1 else ():
            suffixes += [f"{number}", f"{number}_scale"]
        return tuple(f"itc_{suffix}" if suffix else "itc" for suffix in suffixes)

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        scales = self.log_scale.reshape(-1).unbind()
        layers = zip(self._layers(seen), scales, strict=True)
        found = [itc(images_BD, texts_BD, scale, seen.rows_B) for (images_BD, texts_BD), scale in layers]
        logged = scale_of(self.log_scale)
        parts = {**contrast_parts(_mean_of(found)), "scale": logged.mean()}
        for number, layer in enumerate(found, start=1) if len(found) > 1 else ():
            parts |= {f"{number}": layer.loss, f"{number}_scale": logged[number - 1]}
        return parts

    def after_step(self, student: Student) -> None:
        clamp_log_scale(self.log_scale)


class Ranking(_Layered):
    """objectives/ranking.py, on the last or on several layers."""

    def __init__(self, recipe: RankingRecipe, num_layers: int) -> None:
        super().__init__("ranking", recipe.weight, num_layers)
        self.margin = recipe.margin

    @property
    def columns(self) -> tuple[str, ...]:
        numbers = [str(number) for number in range(1, self.num_layers + 1)] if self.num_layers > 1 else []
        return tuple(f"ranking_{suffix}" if suffix else "ranking" for suffix in [*CONTRAST, *numbers])

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        found = [ranking(images_BD, texts_BD, self.margin, seen.rows_B) for images_BD, texts_BD in self._layers(seen)]
        numbered = {str(number): layer.loss for number, layer in enumerate(found, start=1)} if len(found) > 1 else {}
        return {**contrast_parts(_mean_of(found)), **numbered}


class Ctl(Term):
    """objectives/ctl.py, with its bank of targets. groups_R: of each image row the group of its near duplicates."""

    suffixes = (*CONTRAST, "scale")

    def __init__(self, recipe: CtlRecipe, bank: FifoBank | WholeBank, groups_R: Tensor | None = None) -> None:
        super().__init__("ctl", recipe.weight)
        self.log_scale = log_scale(recipe.temperature)
        self.bank = bank
        self.groups_R: Tensor | None
        self.register_buffer("groups_R", groups_R, persistent=False)

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        images, texts = seen.pair
        assert seen.batch.views_B is not None
        own = (seen.batch.targets["cls"], seen.rows_B, seen.batch.views_B)
        targets_GD, rows_G, views_G = map(gathered_constants, own)
        candidates_ND, rows_N, labels_G = self.bank.candidates(targets_GD, rows_G, views_G)
        said = images.said("ctl"), texts.said("ctl")
        pictures_N, pictures_B = self._pictures(rows_N), self._pictures(seen.rows_B)
        contrast = ctl(*said, candidates_ND, pictures_N, own_part(labels_G), pictures_B, self.log_scale)
        self.bank.push(targets_GD, rows_G)
        return {**contrast_parts(contrast), "scale": scale_of(self.log_scale)}

    def _pictures(self, rows: Tensor) -> Tensor:
        """Numbers that are equal for pictures which are no negatives of each other."""
        return rows if self.groups_R is None else self.groups_R[rows]

    def after_step(self, student: Student) -> None:
        clamp_log_scale(self.log_scale)

    def summary(self) -> str:
        return f"bank of ctl: {bank_in_words(self.bank)}"


def bank_in_words(bank: FifoBank | WholeBank) -> str:
    """For the summary."""
    if isinstance(bank, WholeBank):
        return f"all {len(bank.targets_GD):,} targets of the split"
    return f"the last {bank.capacity:,} targets"
