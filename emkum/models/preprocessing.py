"""How a family wants its pictures: the size of the crop, the numbers its colours are normalised with.

B batch, H height, W width, C colour.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emkum.errors import UnsupportedNetwork

Three = tuple[float, float, float]

IMAGENET_MEAN: Three = (0.485, 0.456, 0.406)
IMAGENET_STD: Three = (0.229, 0.224, 0.225)
CLIP_MEAN: Three = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Three = (0.26862954, 0.26130258, 0.27577711)
HALF: Three = (0.5, 0.5, 0.5)

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers


@dataclass(frozen=True)
class Preprocessing:
    """`image_size` in pixels; `crop_fraction` of the resized short side that the family's evaluation crop keeps.

    `mean` and `std` apply to colours in [0, 1]. Interpolation and fraction say how the family evaluates; which crop is
    taken is the caller's choice of views.
    """

    image_size: int = 224
    mean: Three = IMAGENET_MEAN
    std: Three = IMAGENET_STD
    crop_fraction: float = 1.0
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        numbers = (*self.mean, *self.std)
        if len(numbers) != 6 or not all(math.isfinite(n) for n in numbers) or min(self.std) <= 0:
            raise UnsupportedNetwork(f"colours normalised with mean {self.mean} and deviation {self.std}")
        if self.image_size < 1 or not 0 < self.crop_fraction <= 1:
            raise UnsupportedNetwork(f"a crop of {self.image_size} px that keeps {self.crop_fraction} of the side")

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        return dataclasses.asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_json`."""
        return cls(**{**found, "mean": tuple(found["mean"]), "std": tuple(found["std"])})


def normalised(preprocessing: Preprocessing, crops_BHWC: Tensor) -> Tensor:
    """uint8 crops_BHWC -> float32 images_BCHW: (colour / 255 - mean) / std, on the device of the crops."""
    if crops_BHWC.dtype != torch.uint8 or crops_BHWC.ndim != 4 or crops_BHWC.shape[-1] != 3:
        raise ValueError(f"crops of {crops_BHWC.dtype} {tuple(crops_BHWC.shape)}; uint8 [B, H, W, 3] is meant")
    mean_C, std_C = _colours(preprocessing.mean, preprocessing.std, crops_BHWC.device)
    images_BCHW = crops_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return images_BCHW.mul_((1 / (255 * std_C))[:, None, None]).sub_((mean_C / std_C)[:, None, None])


@functools.lru_cache(maxsize=64)
def _colours(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation on the device, copied there once: each copy would wait for all that is queued there."""
    with torch.inference_mode(False):  # for whoever comes next, with gradients or without
        return torch.tensor(mean, device=device), torch.tensor(std, device=device)


def read_preprocessor(found: dict[str, Any], default: Preprocessing) -> Preprocessing:
    """What preprocessor_config.json says, in any of the spellings transformers has used; `default` for the rest.

    Raises UnsupportedNetwork for colours that are not scaled by 1/255.
    """
    scale = found.get("rescale_factor", 1 / 255)
    if found.get("do_rescale", True) is False or abs(255 * float(scale) - 1) > 1e-3:
        raise UnsupportedNetwork(f"a preprocessor that scales colours by {scale} and not by 1/255")
    mean, std = found.get("image_mean", default.mean), found.get("image_std", default.std)
    if found.get("do_normalize", True) is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    resized = _side(found.get("size")) or default.image_size
    cropped = _side(found.get("crop_size")) if found.get("do_center_crop", "crop_size" in found) else None
    image_size, fraction = cropped or resized, min(1.0, cropped / resized) if cropped else 1.0
    if "crop_pct" in found and resized < 384:  # ConvNext's processor, which ResNet uses
        image_size, fraction = resized, float(found["crop_pct"])
    return Preprocessing(
        image_size=image_size,
        mean=_three(mean),
        std=_three(std),
        crop_fraction=fraction,
        interpolation=_RESAMPLE.get(found.get("resample", -1), default.interpolation),
    )


def read_timm(found: dict[str, Any], default: Preprocessing) -> Preprocessing:
    """What the pretrained_cfg of a timm folder says; `default` for the rest."""
    size, fraction, resample = found.get("input_size"), found.get("crop_pct"), found.get("interpolation")
    return Preprocessing(
        image_size=_side(size[1:] if isinstance(size, list) else None) or default.image_size,  # colours come first
        mean=_three(found.get("mean", default.mean)),
        std=_three(found.get("std", default.std)),
        crop_fraction=float(fraction) if isinstance(fraction, int | float) else default.crop_fraction,
        interpolation=str(resample) if resample in _RESAMPLE.values() else default.interpolation,
    )


def _side(size: Any) -> int | None:
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    if isinstance(size, list | tuple) and size:
        size = size[0]
    return size if isinstance(size, int) and size > 0 else None


def _three(numbers: Any) -> Three:
    if not isinstance(numbers, list | tuple) or len(numbers) != 3:
        raise UnsupportedNetwork(f"{numbers} where one number for each colour is meant")
    red, green, blue = (float(number) for number in numbers)
    return red, green, blue
