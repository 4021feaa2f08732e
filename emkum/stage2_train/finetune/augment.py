"""Pictures changed at random, the same way for the same seed, epoch and batch; what is drawn comes from timm.

timm imports torchvision, whose wheel on PyPI is a build for CUDA. The three files used here need torch, numpy and
Pillow alone, so they are loaded from where timm lies, without timm itself.

Legend: B batch, C colours or classes, H height, W width.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from emkum.errors import MissingPackage
from emkum.models.network import normalise
from emkum.models.preprocessing import Preprocessing
from emkum.stage2_train.finetune.settings import ClassifySettings

PACKAGE = "timm"
INSTALL = (
    "pip install 'emkum[finetune]', or pip install --no-deps timm where no torchvision is wanted; --no-augment "
    "trains on the pictures as they are"
)
ASPECT = 4 / 3  # of random crops, from its inverse on: Inception's


@dataclass(frozen=True)
class Library:
    """The parts of timm that are used."""

    auto_augment: ModuleType
    mixup: ModuleType
    random_erasing: ModuleType


def library() -> Library:
    """The library of augmentations. Raises MissingPackage, which says how to get it or do without."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(f"{PACKAGE} is not installed, and augmentation needs it", INSTALL)
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    return Library(*(_loaded(folder / f"{name}.py") for name in ("auto_augment", "mixup", "random_erasing")))


def _loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"emkum_{PACKAGE}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (OSError, ImportError) as error:
        raise MissingPackage(f"{path} of {PACKAGE} cannot be used here: {error}", INSTALL) from error
    return module


@contextlib.contextmanager
def drawn_from(*numbers: int) -> Iterator[None]:
    """Every random generator of the process starts from these numbers within, and goes on as before behind."""
    seed = int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "little")
    kept = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])


class Augment:
    """Batches of crops and classes -> pictures as the network takes them, and how much of each class they are."""

    def __init__(self, settings: ClassifySettings, size: int, preprocessing: Preprocessing, num_classes: int) -> None:
        self.settings, self.size, self.preprocessing, self.num_classes = settings, size, preprocessing, num_classes
        found = library() if settings.needs_library else None
        self._rand = self._erase = self._mix = None
        if found is not None and settings.randaugment:
            # Magnitudes with a deviation of 0.5, growing in strength: as BEiT fine-tunes.
            name = f"rand-m{settings.randaugment}-n{settings.randaugment_layers}-mstd0.5-inc1"
            mean = tuple(round(255 * value) for value in preprocessing.mean)
            options = {
                "magnitude_max": 9.9,  # at 10 posterize would keep 0 bits of a colour, which Pillow 13 refuses
                "translate_const": int(size * 0.45),
                "img_mean": mean,
                "interpolation": Image.Resampling.BICUBIC,
            }
            self._rand = found.auto_augment.rand_augment_transform(name, options)
        if found is not None and settings.erasing:
            self._erase = found.random_erasing.RandomErasing(settings.erasing, mode="pixel", device="cpu")
        if found is not None and settings.mixes:
            self._mix = found.mixup.Mixup(
                settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=num_classes
            )

    @property
    def crop_size(self) -> int:
        """The side that pictures are decoded at: larger than what is trained on, where crops are cut of it."""
        return self.size if self.settings.smallest_crop == 1 else math.ceil(self.size * 8 / 7)

    def __call__(self, crops: Sequence[np.ndarray], classes_B: np.ndarray, *key: int) -> tuple[Tensor, Tensor]:
        """uint8 crops of side `crop_size` and int64 classes -> float32 images_BCHW, and float32 targets_BC.

        key: the numbers of this batch; the same ones give the same pictures. Mixing takes an even number of pictures:
        the last of an odd one is left out.
        """
        if self._mix is not None:
            crops, classes_B = crops[: len(crops) // 2 * 2], classes_B[: len(crops) // 2 * 2]
        classes = torch.from_numpy(np.ascontiguousarray(classes_B))
        with drawn_from(*key):
            pixels_BHWC = torch.from_numpy(np.stack([self._changed(crop) for crop in crops]))
            images_BCHW = normalise(self.preprocessing, pixels_BHWC)
            if self._erase is not None:
                images_BCHW = self._erase(images_BCHW)
            if self._mix is not None:
                mixed: tuple[Tensor, Tensor] = self._mix(images_BCHW, classes)
                return mixed[0], mixed[1].float()
        return images_BCHW, smoothed(classes, self.num_classes, self.settings.smoothing)

    def _changed(self, crop_HWC: np.ndarray) -> np.ndarray:
        settings = self.settings
        picture: Any = Image.fromarray(crop_HWC)
        if settings.smallest_crop < 1:
            box = _random_box(picture.width, settings.smallest_crop)
            picture = picture.crop(box).resize((self.size, self.size), Image.Resampling.BICUBIC)
        if settings.flip and random.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self._rand is not None:
            picture = self._rand(picture)
        return np.array(picture, dtype=np.uint8)


def smoothed(classes_B: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """float32 [B, C]: 1 - smoothing at the class, and `smoothing` shared by all classes (Szegedy et al. 2016)."""
    targets_BC = torch.full((len(classes_B), num_classes), smoothing / num_classes)
    return targets_BC.scatter_add_(1, classes_B[:, None], torch.full((len(classes_B), 1), 1 - smoothing))


def _random_box(side: int, smallest: float) -> tuple[int, int, int, int]:
    """A box of a square that has a share of its area between `smallest` and all, and a shape between 3:4 and 4:3."""
    for _ in range(10):
        area = side * side * random.uniform(smallest, 1.0)
        shape = math.exp(random.uniform(-math.log(ASPECT), math.log(ASPECT)))
        width, height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < width <= side and 0 < height <= side:
            left, top = random.randint(0, side - width), random.randint(0, side - height)
            return left, top, left + width, top + height
    return 0, 0, side, side
