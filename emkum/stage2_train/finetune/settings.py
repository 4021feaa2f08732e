"""What a fine-tuning is told: one frozen dataclass a task, every range checked; torch is not loaded.

The published settings are the defaults (THESIS.md section 3): classification 15 epochs, batch 256, rate 1e-3, layer
decay 0.81 (ImageNet) or 0.75 (CIFAR), mixup 0.8, cutmix 1.0, RandAugment(2, 9), erasing 0.25, smoothing 0.1; retrieval
5 epochs, batch 1024, rate 3e-5; GLUE 3 epochs.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_type_hints

from emkum.errors import UsageError

TASKS = ("retrieval", "classify", "glue")


@dataclass(frozen=True)
class Schedule:
    """AdamW with a linear warm-up and a cosine to 0. lr: the highest rate, as it is, whatever the batch.

    betas and eps are those of pre-training. layer_decay: each block has so much of the rate of the next one; what
    lies behind the blocks has the whole rate. clip_norm 0: gradients are not clipped.
    """

    epochs: int = 15
    batch: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    layer_decay: float = 1.0
    clip_norm: float = 1.0
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "epochs": (1, 1e6),
        "batch": (1, 1e6),
        "lr": (0, 10),
        "weight_decay": (0, 10),
        "warmup": (0, 1),
        "layer_decay": (0.01, 1),
        "clip_norm": (0, 1e9),
    }

    def __post_init__(self) -> None:
        for name, (low, high) in self.ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:  # NaN is not either
                raise UsageError(
                    f"{name} = {value:g} is not within {low:g} and {high:g}", f"give another: --set {name}=..."
                )


@dataclass(frozen=True)
class RetrievalSettings(Schedule):
    """Pictures and captions: contrast (itc), 5 epochs."""

    epochs: int = 5
    batch: int = 1024
    lr: float = 3e-5


@dataclass(frozen=True)
class ClassifySettings(Schedule):
    """Classes of pictures: mean of patches, LayerNorm, linear layer.

    smoothing: of the labels. mixup, cutmix: the alphas of their Beta distributions, one of the two is drawn for each
    batch, 0 for none. randaugment: magnitude of the `randaugment_layers` operations on each picture, 0 for none.
    erasing: how probably a rectangle of a picture is filled with noise. smallest_crop: crops at random take between
    this share of the picture's centre square and all of it; 1: the centre square. flip: half the pictures are mirrored.
    """

    layer_decay: float = 0.75
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    randaugment: int = 9
    randaugment_layers: int = 2
    erasing: float = 0.25
    smallest_crop: float = 0.08
    flip: bool = True
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        **Schedule.ranges,
        "smoothing": (0, 0.99),
        "mixup": (0, 100),
        "cutmix": (0, 100),
        "randaugment": (0, 10),
        "randaugment_layers": (1, 10),
        "erasing": (0, 1),
        "smallest_crop": (0.01, 1),
    }

    @property
    def mixes(self) -> bool:
        """Whether two pictures are mixed into one."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def needs_library(self) -> bool:
        """Whether anything is drawn by the library of augmentations."""
        return self.mixes or self.randaugment > 0 or self.erasing > 0

    def unaugmented(self) -> ClassifySettings:
        """The same without any change to a picture: its centre square, each epoch."""
        return dataclasses.replace(
            self, mixup=0.0, cutmix=0.0, randaugment=0, erasing=0.0, smallest_crop=1.0, flip=False
        )


@dataclass(frozen=True)
class GlueSettings(Schedule):
    """Sentences or pairs of them: a linear layer on the pooled output. max_tokens: longer texts are cut."""

    epochs: int = 3
    batch: int = 32
    lr: float = 5e-5
    max_tokens: int = 128
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {**Schedule.ranges, "max_tokens": (8, 4096)}


SETTINGS: Mapping[str, type[Schedule]] = {
    "retrieval": RetrievalSettings,
    "classify": ClassifySettings,
    "glue": GlueSettings,
}


def settings_of(task: str, overrides: Sequence[str] = (), **given: Any) -> Schedule:
    """The settings of a task with `name=value` overrides; `given`: values of flags, None for what was not given.

    Raises UsageError for a task or a name that does not exist, and for a value of another type or out of range.
    """
    if task not in SETTINGS:
        close = difflib.get_close_matches(task, TASKS, n=1)
        raise UsageError(f"no task {task!r}", f"did you mean {close[0]}?" if close else f"tasks: {', '.join(TASKS)}")
    kind = SETTINGS[task]
    values = {name: value for name, value in given.items() if value is not None}
    names = [field.name for field in dataclasses.fields(kind)]
    hints = get_type_hints(kind)
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise UsageError(f"--set {override} is not name=value", "for example --set weight_decay=0.05")
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"settings: {', '.join(names)}"
            raise UsageError(f"{task} has no setting {name}", hint)
        values[name] = _converted(name, text.strip(), hints[name])
    return kind(**values)


def _converted(name: str, text: str, kind: Any) -> Any:
    words = {"true": True, "false": False}
    try:
        return words[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        what = {int: "an integer", float: "a number", bool: "true or false"}[kind]
        raise UsageError(f"{name} = {text} is not {what}", f"change it with --set {name}=...") from None
