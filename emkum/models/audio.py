"""A network of sound: convolutions over the wave, positions, Transformer blocks; what a clip gives depends on it alone.

B batch, S samples of the wave, T frames, C channels of a convolution, D width, H heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emkum.errors import UnsupportedNetwork
from emkum.models.backbone import BlocksOut, BlockStack, StackSpec
from emkum.models.blocks import Activation, Block, BlockSpec, Linear, activated, in_type_of

CONV_EPS = 1e-5  # of the norms between convolutions, in fairseq and in transformers
EMBEDDED_SAMPLES = 60 * 16_000  # in one go, pads counted: the first convolution makes 400 bytes of each
Conv = tuple[int, int, int]  # channels, kernel, stride


@dataclass(frozen=True)
class AudioSpec:
    """Everything that decides what a network of sound computes, but its weights. JSON round trip.

    wave_eps: each clip is brought to mean 0 and variance 1, var + wave_eps under the root; None: taken as it is.
    convs: over the wave, each followed by a layer norm over its channels and the activation. position_layers
    convolutions of position_kernel frames in position_groups groups give positions, each followed by a layer norm
    without weights and the activation; their result is added, then comes a norm. alibi: of how many blocks the
    distance bias has a scale of its own (1: the same in all; 0: there is none). prenet: leading blocks that count as
    the modality's own, never as targets.
    """

    family: str
    depth: int
    width: int
    heads: int
    mlp_width: int
    convs: tuple[Conv, ...]
    position_kernel: int
    position_layers: int
    position_groups: int
    conv_bias: bool = False
    activation: Activation = "gelu"
    eps: float = 1e-5
    alibi: int = 0
    prenet: int = 0
    wave_eps: float | None = 1e-5
    sample_rate: int = 16_000
    modality: Literal["audio"] = "audio"
    kind: str = field(default="audio", init=False)

    def __post_init__(self) -> None:
        numbers = ("depth", "width", "heads", "mlp_width", "position_kernel", "position_layers", "position_groups")
        below = [name for name in numbers if getattr(self, name) < 1]
        if below or not self.convs or any(n < 1 for conv in self.convs for n in conv):
            raise UnsupportedNetwork(f"a {self.family} network with {', '.join(below) or 'convolutions'} below 1")

    @property
    def block(self) -> BlockSpec:
        return BlockSpec(
            self.width, self.heads, self.mlp_width, norm_order="post", activation=self.activation, eps=self.eps
        )

    def num_frames(self, num_samples: int) -> int:
        """Frames that a wave of so many samples gives: floor((n - kernel) / stride) + 1 in every convolution."""
        for _, kernel, stride in self.convs:
            if num_samples < kernel:
                return 0
            num_samples = (num_samples - kernel) // stride + 1
        return num_samples

    def build(self) -> AudioBackbone:
        """A network of this shape."""
        return AudioBackbone(self)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        return dataclasses.asdict(self) | {"convs": [list(conv) for conv in self.convs]}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> AudioSpec:
        """The inverse of `to_json`. Raises UnsupportedNetwork for keys it does not know."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(found) - known):
            raise UnsupportedNetwork(f"an architecture with unknown keys {unknown}", "read it with a newer emkum")
        convs = tuple((int(channels), int(kernel), int(stride)) for channels, kernel, stride in found["convs"])
        return cls(**{key: value for key, value in found.items() if key != "kind"} | {"convs": convs})


class WaveConv(nn.Conv1d):
    """The first convolution. It reads the wave itself, which bfloat16 would round to 8 bits: it stays float32."""


class WaveEmbedding(nn.Module):
    """Waves -> frames: convolutions, a projection, positions, a norm."""

    def __init__(self, spec: AudioSpec) -> None:
        super().__init__()
        self.spec = spec
        channels = [1, *(channels for channels, _, _ in spec.convs)]
        self.convs = nn.ModuleList(
            (nn.Conv1d if i else WaveConv)(channels[i], count, kernel, stride, bias=spec.conv_bias)
            for i, (count, kernel, stride) in enumerate(spec.convs)
        )
        self.conv_norms = nn.ModuleList(nn.LayerNorm(count, eps=CONV_EPS) for count, _, _ in spec.convs)
        self.feature_norm = nn.LayerNorm(channels[-1], eps=spec.eps)
        self.projection = Linear(channels[-1], spec.width)
        self.positions = nn.ModuleList(
            nn.Conv1d(
                spec.width,
                spec.width,
                spec.position_kernel,
                padding=spec.position_kernel // 2,
                groups=spec.position_groups,
            )
            for _ in range(spec.position_layers)
        )
        self.norm = nn.LayerNorm(spec.width, eps=spec.eps)

    def forward(self, waves_BS: Tensor, num_samples_B: Sequence[int]) -> tuple[Tensor, Tensor]:
        """tokens_BTD in float32 and mask_BT (True: a real frame) of float32 waves, zero past their samples."""
        frames_B = torch.tensor([self.spec.num_frames(int(n)) for n in num_samples_B], device=waves_BS.device)
        mask_BT = torch.arange(self.spec.num_frames(waves_BS.shape[1]), device=waves_BS.device) < frames_B[:, None]
        waves_BS = self._normalised(waves_BS, num_samples_B)
        step = max(1, EMBEDDED_SAMPLES // waves_BS.shape[1])
        parts = [self._features(waves_BS[first : first + step]) for first in range(0, len(waves_BS), step)]
        tokens_BTD = torch.cat(parts) if len(parts) > 1 else parts[0]
        pads_BT1 = ~mask_BT[..., None]
        tokens_BTD = tokens_BTD.masked_fill(pads_BT1, 0)
        positions_BTD = tokens_BTD
        for conv in self.positions:
            positions_BTD = self._position(conv, positions_BTD).masked_fill(pads_BT1, 0)
        return self.norm(tokens_BTD + positions_BTD), mask_BT

    def _normalised(self, waves_BS: Tensor, num_samples_B: Sequence[int]) -> Tensor:
        """Each clip to mean 0 and variance 1 over its own samples, the sums in float64."""
        if self.spec.wave_eps is None:
            return waves_BS
        count_B1 = torch.tensor([[max(int(n), 1)] for n in num_samples_B], device=waves_BS.device)
        real_BS = torch.arange(waves_BS.shape[1], device=waves_BS.device) < count_B1
        exact_BS = waves_BS.double()
        centred_BS = (exact_BS - exact_BS.sum(1, keepdim=True) / count_B1) * real_BS
        variance_B1 = centred_BS.square().sum(1, keepdim=True) / count_B1
        return (centred_BS * torch.rsqrt(variance_B1 + self.spec.wave_eps)).float()

    def _features(self, waves_BS: Tensor) -> Tensor:
        x_BCT = waves_BS[:, None]
        for conv, norm in zip(self.convs, self.conv_norms, strict=True):
            assert isinstance(conv, nn.Conv1d)
            x_BTC = norm(conv(in_type_of(conv.weight, x_BCT)).float().transpose(1, 2))
            x_BCT = activated(x_BTC, self.spec.activation).transpose(1, 2)
        tokens_BTD: Tensor = self.projection(self.feature_norm(x_BCT.transpose(1, 2)))
        return tokens_BTD.float()

    def _position(self, conv: nn.Module, tokens_BTD: Tensor) -> Tensor:
        """One convolution of positions. An even kernel gives one frame too many, which is dropped."""
        assert isinstance(conv, nn.Conv1d)
        x_BDT = conv(in_type_of(conv.weight, tokens_BTD.transpose(1, 2)))[..., : tokens_BTD.shape[1]]
        x_BTD = F.layer_norm(x_BDT.float().transpose(1, 2), (self.spec.width,), eps=CONV_EPS)
        return activated(x_BTD, self.spec.activation)


class AudioBackbone(nn.Module):
    """A whole network of sound: `embed`, then the blocks of `stack`.

    Every output of a clip is what the clip gives alone, whatever it is batched with: pads are zero before every
    convolution that could see them, and not attended to. (transformers zeroes them before the first convolution of
    positions only, fairseq not at all: there the last frames of a clip depend on how far it was padded.)
    """

    def __init__(self, spec: AudioSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = WaveEmbedding(spec)
        self.stack = BlockStack(StackSpec(spec.block, spec.depth))
        self.alibi_scales = nn.Parameter(torch.ones(spec.alibi, spec.heads)) if spec.alibi else None

    @property
    def depth(self) -> int:
        return self.stack.depth

    @property
    def width(self) -> int:
        return self.spec.width

    @property
    def num_prefix(self) -> int:
        return 0

    def embed(self, waves_BS: Tensor, num_samples_B: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Cut 0: tokens_BTD as block 0 takes them, and mask_BT (bool, True = a real frame).

        waves_BS: float32, at the spec's sample rate, zero past each clip's samples.
        """
        found: tuple[Tensor, Tensor] = self.embedding(waves_BS, num_samples_B)
        return found

    def run(
        self, tokens_BTD: Tensor, start: int = 0, stop: int | None = None, mask_BT: Tensor | None = None
    ) -> BlocksOut:
        """Blocks start..stop (exclusive; None: to the end) on tokens of cut `start`."""
        out = BlocksOut([], [])
        for hidden_BTD, ffn_BTD in self.each_block(tokens_BTD, start, stop, mask_BT):
            out.hidden.append(hidden_BTD)
            out.ffn.append(ffn_BTD)
        return out

    def each_block(
        self, tokens_BTD: Tensor, start: int = 0, stop: int | None = None, mask_BT: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `run`, block by block: its output in float32, and that of its feed-forward network."""
        stop = self.depth if stop is None else stop
        if not 0 <= start <= stop <= self.depth:
            raise ValueError(f"blocks {start} to {stop} of a stack of {self.depth}")
        if mask_BT is not None and bool(mask_BT.all()):
            mask_BT = None  # one bias then serves the whole batch
        bias: Tensor | None = None
        for index in range(start, stop):
            if self.alibi_scales is not None and (bias is None or len(self.alibi_scales) > 1):
                bias = self._bias(index, tokens_BTD.shape[1])
            block = self.stack.blocks[index]
            assert isinstance(block, Block)
            tokens_BTD, ffn_BTD = block(tokens_BTD, bias, mask_BT)
            tokens_BTD = tokens_BTD.float()
            yield tokens_BTD, ffn_BTD

    def finish(self, tokens_BTD: Tensor) -> Tensor:
        """Nothing: post-norm blocks end in a norm."""
        return tokens_BTD

    def _bias(self, index: int, num_frames: int) -> Tensor:
        """The distance bias of a block, [1, H, T, T]: b_h(i, j) = -max(scale_h, 0) slope_h |i - j|."""
        assert self.alibi_scales is not None
        scales_H = self.alibi_scales[index % len(self.alibi_scales)].clamp_min(0)
        slopes_H = torch.tensor(alibi_slopes(self.spec.heads), device=scales_H.device)
        at_T = torch.arange(num_frames, device=scales_H.device)
        distance_TT = (at_T[:, None] - at_T).abs().float()
        return (-(scales_H * slopes_H)[:, None, None] * distance_TT)[None]


def alibi_slopes(heads: int) -> list[float]:
    """The slope of each head (Press et al., arXiv:2108.12409).

    2^(-8 h / n), h = 1..n, for n heads, n a power of 2. For other numbers, as the authors' code and fairseq's data2vec
    have it: those of the largest power of 2 below, then every other one of the next power of 2. The symmetric form with
    |i - j| is that of fairseq's data2vec2 (examples/data2vec/models/modalities/base.py, get_alibi).
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2.0 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1, 2)]
    return slopes + between[: heads - power]
