"""ResNet (arXiv:1512.03385, version 1.5), a convolutional classifier: a feature map, its mean, class logits.

B batch, C channels, H height, W width, T tokens, D width of the last feature map.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emkum.errors import UnsupportedNetwork
from emkum.models.blocks import in_type_of

MOMENTUM = 0.1  # of batch norm's statistics, as in torch and in the originals


@dataclass(frozen=True)
class ResNetSpec:
    """The shape of a ResNet. JSON round trip by to_json and from_json."""

    stem_width: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    layer: Literal["basic", "bottleneck"] = "bottleneck"
    stride_in_first_stage: bool = False
    stride_in_first_conv: bool = False
    num_classes: int = 0
    family: str = "resnet"
    modality: Literal["image"] = "image"
    kind: str = field(default="resnet", init=False)

    def __post_init__(self) -> None:
        if self.layer not in ("basic", "bottleneck") or len(self.widths) != len(self.depths):
            raise UnsupportedNetwork(f"a ResNet of {self.layer!r} layers, widths {self.widths}, depths {self.depths}")

    @property
    def width(self) -> int:
        return self.widths[-1]

    @property
    def depth(self) -> int:
        """Transformer blocks: none. The whole network is its embedding, so only cut 0 exists."""
        return 0

    @property
    def num_prefix(self) -> int:
        return 1

    @property
    def patch(self) -> int:
        """Pixels a token of the last feature map stands for, each way."""
        return 4 << (len(self.widths) - 1 + self.stride_in_first_stage)

    def build(self) -> ResNet:
        """A network of this shape."""
        return ResNet(self)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        return dataclasses.asdict(self) | {"widths": list(self.widths), "depths": list(self.depths)}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> ResNetSpec:
        """The inverse of `to_json`. Raises UnsupportedNetwork for keys it does not know."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(found) - known):
            raise UnsupportedNetwork(f"an architecture with unknown keys {unknown}", "read it with a newer emkum")
        kept = {key: value for key, value in found.items() if key != "kind"}
        return cls(**{**kept, "widths": tuple(found["widths"]), "depths": tuple(found["depths"])})


class BatchNorm(nn.Module):
    """Batch norm. In evaluation mode, as frozen networks are, its statistics never change.

    In training mode it normalises by the batch, and the statistics follow by MOMENTUM a batch (arXiv:1502.03167).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, features_BCHW: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(features_BCHW, mean, var, self.weight, self.bias, self.training, MOMENTUM, eps=1e-5)


class ConvNorm(nn.Module):
    """A convolution and its batch norm."""

    def __init__(self, num_in: int, num_out: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_in, num_out, size, stride, padding=size // 2, bias=False)
        self.norm = BatchNorm(num_out)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        normed_BCHW: Tensor = self.norm(self.conv(in_type_of(self.conv.weight, features_BCHW)))
        return normed_BCHW


class Layer(nn.Module):
    """A residual layer: basic (3x3, 3x3) or bottleneck (1x1, 3x3, 1x1)."""

    def __init__(self, spec: ResNetSpec, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        if spec.layer == "basic":
            convs = [ConvNorm(num_in, num_out, 3, stride), ConvNorm(num_out, num_out, 3)]
        else:
            inner = num_out // 4
            strides = (stride, 1) if spec.stride_in_first_conv else (1, stride)
            convs = [
                ConvNorm(num_in, inner, 1, strides[0]),
                ConvNorm(inner, inner, 3, strides[1]),
                ConvNorm(inner, num_out, 1),
            ]
        self.convs = nn.ModuleList(convs)
        self.shortcut = ConvNorm(num_in, num_out, 1, stride) if num_in != num_out or stride != 1 else None

    def forward(self, features_BCHW: Tensor) -> Tensor:
        residual = features_BCHW if self.shortcut is None else self.shortcut(features_BCHW)
        for conv in self.convs[:-1]:
            features_BCHW = F.relu(conv(features_BCHW), inplace=True)
        return F.relu(self.convs[-1](features_BCHW) + residual, inplace=True)


class Classifier(nn.Module):
    """A linear layer in float32, under autocast too. No nn.Linear, so that no cast of a network's matrices reaches it.

    Of a logit of 10, bfloat16 keeps steps of 1/16.
    """

    def __init__(self, num_in: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, num_in))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        nn.init.normal_(self.weight, std=num_in**-0.5)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        with torch.autocast(pooled_BD.device.type, enabled=False):
            return F.linear(pooled_BD.float(), self.weight, self.bias)


class ResNet(nn.Module):
    """A ResNet with the calls stage 1 makes of a convolutional teacher: `embed`, then `cls`, `patches`, `logits`."""

    def __init__(self, spec: ResNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stem = ConvNorm(3, spec.stem_width, 7, 2)
        layers, num_in = [], spec.stem_width
        for stage, (width, depth) in enumerate(zip(spec.widths, spec.depths, strict=True)):
            for index in range(depth):
                strided = index == 0 and (stage > 0 or spec.stride_in_first_stage)
                layers.append(Layer(spec, num_in, width, 2 if strided else 1))
                num_in = width
        self.layers = nn.ModuleList(layers)
        self.head = Classifier(spec.width, spec.num_classes) if spec.num_classes else None

    @property
    def depth(self) -> int:
        return 0

    @property
    def width(self) -> int:
        return self.spec.width

    @property
    def num_prefix(self) -> int:
        return 1

    def embed(self, inputs: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """images_BCHW (normalised) -> tokens_BTD: the mean of the last feature map, then the map row by row."""
        features = F.relu(self.stem(inputs), inplace=True)
        features = F.max_pool2d(features, 3, 2, 1)
        for layer in self.layers:
            features = layer(features)
        tokens_BTD = features.flatten(2).transpose(1, 2)
        return torch.cat([tokens_BTD.mean(1, keepdim=True), tokens_BTD], dim=1)

    def finish(self, tokens_BTD: Tensor) -> Tensor:
        """The tokens as they are: a ResNet ends without a norm."""
        return tokens_BTD

    def tokens(self, tokens_BTD: Tensor) -> Tensor:
        """Cut 0: all of them, [B, T, D]."""
        return tokens_BTD

    def cls(self, tokens_BTD: Tensor) -> Tensor:
        """The pooled feature map, [B, D]."""
        return tokens_BTD[:, 0]

    def patches(self, tokens_BTD: Tensor) -> Tensor:
        """The last feature map as tokens, [B, T - 1, D]."""
        return tokens_BTD[:, 1:]

    def logits(self, tokens_BTD: Tensor) -> Tensor:
        """Class logits [B, classes], float32. Raises UnsupportedNetwork if the checkpoint had no classifier."""
        if self.head is None:
            raise UnsupportedNetwork(
                "logits of a ResNet read from a checkpoint without a classifier", "use one with, or drop the target"
            )
        logits_BC: Tensor = self.head(self.cls(tokens_BTD))
        return logits_BC

    def forward(self, inputs: Tensor) -> Tensor:
        """The final tokens_BTD of pictures."""
        return self.finish(self.embed(inputs))
