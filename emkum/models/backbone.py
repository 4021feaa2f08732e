"""A Transformer backbone: embed -> blocks -> final norm; runs to any depth and hands out every layer.

B batch, C colour, H height, W width of a picture, T tokens, L text tokens, D width, P patches.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emkum.errors import UnsupportedNetwork, UsageError
from emkum.models.blocks import Activation, Block, BlockSpec, NormOrder, QkvBias, compute_dtype, in_type_of, spec_json
from emkum.models.positions import Grid, Memo, RelativeBias, interpolate_positions, rotary_table

Modality = Literal["image", "text", "audio", "pair"]  # pair: a picture with a caption
Position = Literal["absolute", "none"]
SharedOrNot = Literal["none", "shared", "per_block"]
Pooled = Literal["first", "eos", "highest"]


@dataclass(frozen=True)
class BlocksOut:
    """What blocks start..stop gave: after each block, and each feed-forward output before LayerScale and residual."""

    hidden: list[Tensor]
    ffn: list[Tensor]


@dataclass(frozen=True)
class StackSpec:
    """Blocks of one kind. With a relative bias, `grid` is that of its tables and CLS is the only prefix.

    words: the grid is one row, of a text. rotary_base: of the periods of rotary positions; 0: none. num_prefix: with
    rotary positions, the tokens before the patches.
    """

    block: BlockSpec
    depth: int
    relative_bias: SharedOrNot = "none"
    grid: Grid = (0, 0)
    words: bool = False
    rotary_base: float = 0.0
    num_prefix: int = 1

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        return spec_json(self, _FIRST_STACK_FIELDS) | {"block": self.block.to_json(), "grid": list(self.grid)}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> StackSpec:
        """The inverse of `to_json`."""
        return cls(**{**found, "block": BlockSpec(**found["block"]), "grid": tuple(found["grid"])})


class BlockStack(nn.Module):
    """Transformer blocks in a row, with their relative position bias if their family has one."""

    def __init__(self, spec: StackSpec) -> None:
        super().__init__()
        self.spec = spec
        self.checkpointing = False  # recompute activations in the backward pass: less memory, a third more time
        self.blocks = nn.ModuleList(Block(spec.block) for _ in range(spec.depth))
        num_biases = {"none": 0, "shared": 1, "per_block": spec.depth}[spec.relative_bias]
        biases = (RelativeBias(spec.grid, spec.block.heads, spec.words) for _ in range(num_biases))
        self.biases = nn.ModuleList(biases)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def width(self) -> int:
        return self.spec.block.width

    def forward(
        self,
        tokens_BTD: Tensor,
        mask_BT: Tensor | None = None,
        start: int = 0,
        stop: int | None = None,
        *,
        grid: Grid | None = None,
        queries: int | None = None,
    ) -> list[Tensor]:
        """The tokens [B, T, D] after each of the blocks start..stop (exclusive). Arguments as in `run`."""
        return self.run(tokens_BTD, start, stop, mask_BT, grid=grid, queries=queries, keep_ffn=False).hidden

    def run(
        self,
        tokens_BTD: Tensor,
        start: int = 0,
        stop: int | None = None,
        mask_BT: Tensor | None = None,
        *,
        grid: Grid | None = None,
        queries: int | None = None,
        keep_ffn: bool = True,
    ) -> BlocksOut:
        """Blocks start..stop (exclusive; None: to the end).

        mask_BT: bool, True = a real token. grid: rows and columns of patches, for blocks with a relative bias; a square
        is assumed. queries: of the last block, hand out the first so many tokens only. keep_ffn: return the
        feed-forward outputs too. Everything returned stays in memory as long as the result is held.
        """
        stop = self.depth if stop is None else stop
        if not 0 <= start <= stop <= self.depth:
            raise ValueError(f"blocks {start} to {stop} of a stack of {self.depth}")
        if (self.biases or self.spec.rotary_base) and grid is None:
            num_others = tokens_BTD.shape[1] - self.spec.num_prefix
            grid = (1, num_others) if self.spec.words else square_grid(num_others)
        turns = self._turns(grid, tokens_BTD) if self.spec.rotary_base and grid is not None else None
        out = BlocksOut([], [])
        for index in range(start, stop):
            block = self.blocks[index]
            assert isinstance(block, Block)
            bias = None
            if self.biases and grid is not None:
                bias = self.biases[index % len(self.biases)](grid, compute_dtype(block.qkv.weight))
            kept = queries if index == stop - 1 else None
            if self.checkpointing and torch.is_grad_enabled():
                tokens_BTD, ffn_BTD = checkpoint(
                    block, tokens_BTD, bias, mask_BT, kept, turns, use_reentrant=False, preserve_rng_state=False
                )
            else:
                tokens_BTD, ffn_BTD = block(tokens_BTD, bias, mask_BT, kept, turns)
            out.hidden.append(tokens_BTD)
            if keep_ffn:
                out.ffn.append(ffn_BTD)
        return out

    def _turns(self, grid: Grid, tokens_BTD: Tensor) -> Tensor:
        spec, num_prefix = self.spec, tokens_BTD.shape[1] - grid[0] * grid[1]
        return rotary_table(grid, num_prefix, spec.block.width // spec.block.heads, spec.rotary_base, tokens_BTD.device)

    def take(self, first: int, count: int, step: int = 1) -> BlockStack:
        """A trainable float32 copy of blocks first, first + step, ... (`count` of them), with its own bias tables."""
        chosen = range(first, first + count * step, step)
        if count < 1 or step < 1 or first < 0 or chosen[-1] >= self.depth:
            raise ValueError(f"blocks {list(chosen)} of a stack of {self.depth}")
        taken = BlockStack(dataclasses.replace(self.spec, depth=0))
        taken.spec = dataclasses.replace(self.spec, depth=count)
        taken.blocks.extend(copy.deepcopy(self.blocks[i]) for i in chosen)
        own_biases = [self.biases[i] for i in chosen] if self.spec.relative_bias == "per_block" else list(self.biases)
        taken.biases = nn.ModuleList(copy.deepcopy(bias) for bias in own_biases)
        return taken.float().requires_grad_(True).train()

    @classmethod
    def random(cls, width: int, heads: int, depth: int, mlp_ratio: float = 4, seed: int = 0) -> BlockStack:
        """New pre-norm ViT blocks: matrices truncated normal with deviation 0.02, biases 0, as timm and BEiT start."""
        stack = cls(StackSpec(BlockSpec(width, heads, round(width * mlp_ratio)), depth))
        generator = torch.Generator().manual_seed(seed)
        for module in stack.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)
        return stack


def square_grid(num_patches: int) -> Grid:
    """The square grid of so many patches."""
    side = round(num_patches**0.5)
    if side * side != num_patches:
        raise ValueError(f"{num_patches} patches do not make a square: pass grid=(rows, columns)")
    return side, side


@dataclass(frozen=True)
class BackboneSpec:
    """Everything that decides what a backbone computes, but its weights. JSON round trip by to_json and from_json.

    Images: `patch` and `image_size` in pixels; `image_size` is the size the position tables were learned at, not the
    size of what is put in. Text: a position table has `max_positions` rows, of which the first token uses row
    `position_offset`; with `position_from_mask` pads stay at row `position_offset - 1` (RoBERTa). A relative bias of
    text knows `max_positions` tokens. zero_pads: pads enter block 0 as zeros. modality_embedding: a vector that is
    added to every embedded token, after the embedding's norm (the token types of ViLT and VLMo).

    gated, causal: see BlockSpec; rotary_base: see StackSpec. pooled: which token stands for the whole: the first, the
    first that is `eos_id`, or the first of the highest id (CLIP, whose end of text is the last of its vocabulary).
    prenet: how many leading blocks belong to the modality's encoder (data2vec 2.0); they compute as all others do.
    """

    family: str
    modality: Modality
    depth: int
    width: int
    heads: int
    mlp_width: int
    norm_order: NormOrder = "pre"
    layer_scale: bool = False
    qkv_bias: QkvBias = "all"
    activation: Activation = "gelu"
    eps: float = 1e-6
    pre_norm: bool = False  # a norm between embedding and block 0
    final_norm: bool = True
    position: Position = "absolute"
    relative_bias: SharedOrNot = "none"
    # images
    patch: int = 0
    image_size: int = 0
    num_registers: int = 0
    patch_bias: bool = True
    position_antialias: bool = False
    # text
    vocab_size: int = 0
    max_positions: int = 0
    position_offset: int = 0
    position_from_mask: bool = False
    token_types: int = 0
    pad_id: int = 0
    zero_pads: bool = False
    # both
    sub_norm: bool = False
    modality_embedding: bool = False
    embedding_eps: float = 0.0  # of the norm between embedding and block 0; 0: as `eps`
    gated: bool = False
    causal: bool = False
    rotary_base: float = 0.0
    pooled: Pooled = "first"
    eos_id: int = 0
    prenet: int = 0
    kind: str = field(default="transformer", init=False)

    def __post_init__(self) -> None:
        needed = ("patch", "image_size") if self.modality == "image" else ("vocab_size", "max_positions")
        missing = [name for name in ("depth", "width", "heads", "mlp_width", *needed) if getattr(self, name) < 1]
        if missing:
            raise UnsupportedNetwork(f"a {self.family} network with {', '.join(f'{name} below 1' for name in missing)}")
        if self.modality == "image" and self.image_size % self.patch:
            raise UnsupportedNetwork(f"a {self.family} of {self.image_size} px in patches of {self.patch} px")
        if self.rotary_base and (self.modality != "image" or self.width // self.heads % 4):
            shape = f"{self.width} channels in {self.heads} heads ({self.modality})"
            raise UnsupportedNetwork(f"rotary positions in a {self.family} of {shape}: a head needs four parts")
        if not 0 <= self.prenet <= self.depth:
            raise UnsupportedNetwork(f"a {self.family} with a prenet of {self.prenet} of its {self.depth} blocks")

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches or words: CLS and registers."""
        return 1 + self.num_registers

    @property
    def block(self) -> BlockSpec:
        return BlockSpec(
            width=self.width,
            heads=self.heads,
            mlp_width=self.mlp_width,
            norm_order=self.norm_order,
            layer_scale=self.layer_scale,
            qkv_bias=self.qkv_bias,
            activation=self.activation,
            eps=self.eps,
            sub_norm=self.sub_norm,
            gated=self.gated,
            causal=self.causal,
        )

    @property
    def stack(self) -> StackSpec:
        if self.rotary_base:
            return StackSpec(self.block, self.depth, rotary_base=self.rotary_base, num_prefix=self.num_prefix)
        if self.relative_bias == "none":
            return StackSpec(self.block, self.depth)
        if self.modality == "text":
            return StackSpec(self.block, self.depth, self.relative_bias, (1, self.max_positions - 1), words=True)
        side = self.image_size // self.patch
        return StackSpec(self.block, self.depth, self.relative_bias, (side, side))

    def build(self) -> Backbone:
        """A network of this shape."""
        return Backbone(self)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; see `spec_json` for what is left out."""
        return spec_json(self, _FIRST_FIELDS)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> BackboneSpec:
        """The inverse of `to_json`. Raises UnsupportedNetwork for keys it does not know."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(found) - known):
            raise UnsupportedNetwork(f"an architecture with unknown keys {unknown}", "read it with a newer emkum")
        return cls(**{key: value for key, value in found.items() if key != "kind"})


# What `to_json` wrote from the first. Never add to it: a new field would change the fingerprints of every old cache.
_FIRST_STACK_FIELDS = "block depth relative_bias grid"
_FIRST_FIELDS = (
    "family modality depth width heads mlp_width norm_order layer_scale qkv_bias activation eps pre_norm final_norm"
    " position relative_bias patch image_size num_registers patch_bias position_antialias vocab_size max_positions"
    " position_offset position_from_mask token_types pad_id kind"
)


class ImageEmbedding(nn.Module):
    """Pictures -> tokens: patches, CLS, registers, positions, and for CLIP a norm."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec
        self.patch = nn.Conv2d(3, spec.width, spec.patch, spec.patch, bias=spec.patch_bias)
        self.cls = nn.Parameter(torch.zeros(spec.width))
        self.registers = nn.Parameter(torch.zeros(spec.num_registers, spec.width)) if spec.num_registers else None
        num_positions = 1 + (spec.image_size // spec.patch) ** 2
        absolute = spec.position == "absolute"
        self.positions = nn.Parameter(torch.zeros(num_positions, spec.width)) if absolute else None
        self.norm = nn.LayerNorm(spec.width, eps=spec.embedding_eps or spec.eps) if spec.pre_norm else None
        self.modality = nn.Parameter(torch.zeros(spec.width)) if spec.modality_embedding else None
        self._memo = Memo()

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of patches of a picture of this size. Raises UsageError if patches do not fill it."""
        patch = self.spec.patch
        if height % patch or width % patch or not height or not width:
            raise UsageError(
                f"pictures of {height} x {width} px do not divide into patches of {patch} px ({self.spec.family})",
                f"choose a size that is a multiple of {patch}, such as {max(1, round(height / patch)) * patch}",
            )
        return height // patch, width // patch

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """tokens_BTD; T = 1 + registers + patches. images_BCHW: normalised, floating point."""
        grid = self.grid(*images_BCHW.shape[2:])
        patches_BPD = self.patch(in_type_of(self.patch.weight, images_BCHW)).flatten(2).transpose(1, 2)
        prefix = self.cls[None]
        if self.positions is not None:
            positions = self._positions(self.positions, grid)
            prefix, patches_BPD = prefix + positions[:1], patches_BPD + positions[1:]
        if self.registers is not None:
            prefix = torch.cat([prefix, self.registers])
        tokens_BTD = torch.cat([prefix.expand(len(patches_BPD), -1, -1).to(patches_BPD.dtype), patches_BPD], dim=1)
        tokens_BTD = tokens_BTD if self.norm is None else self.norm(tokens_BTD)
        return tokens_BTD if self.modality is None else tokens_BTD + self.modality

    def _positions(self, table: Tensor, grid: Grid) -> Tensor:
        def interpolated() -> Tensor:
            return interpolate_positions(table, grid, self.spec.position_antialias).to(table.dtype)

        return self._memo.get(table, grid, interpolated)


class TextEmbedding(nn.Module):
    """Token ids -> tokens: word, position and (first) type embedding, and a norm."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec
        self.tokens = nn.Parameter(torch.zeros(spec.vocab_size, spec.width))
        absolute = spec.position == "absolute"
        self.positions = nn.Parameter(torch.zeros(spec.max_positions, spec.width)) if absolute else None
        self.types = nn.Parameter(torch.zeros(spec.token_types, spec.width)) if spec.token_types else None
        self.norm = nn.LayerNorm(spec.width, eps=spec.embedding_eps or spec.eps) if spec.pre_norm else None
        self.modality = nn.Parameter(torch.zeros(spec.width)) if spec.modality_embedding else None

    @property
    def max_tokens(self) -> int:
        """The longest text there are positions for."""
        return self.spec.max_positions - self.spec.position_offset

    def forward(self, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """tokens_BTD of int ids. mask_BL: bool, True = a real token; without it, ids other than the pad id."""
        if ids_BL.shape[1] > self.max_tokens:
            raise UsageError(
                f"texts of {ids_BL.shape[1]} tokens; {self.spec.family} has positions for {self.max_tokens}",
                f"choose a maximum of {self.max_tokens} tokens or fewer",
            )
        # In the order of the original sum, so that the numbers agree to the last bit.
        tokens_BLD = F.embedding(ids_BL, self.tokens)
        if self.types is not None:
            tokens_BLD = tokens_BLD + self.types[0]
        if self.positions is not None:
            tokens_BLD = tokens_BLD + self._positions(self.positions, ids_BL, mask_BL)
        tokens_BLD = tokens_BLD if self.norm is None else self.norm(tokens_BLD)
        tokens_BLD = tokens_BLD if self.modality is None else tokens_BLD + self.modality
        if self.spec.zero_pads:
            tokens_BLD = tokens_BLD.masked_fill(~self._real(ids_BL, mask_BL)[..., None], 0)
        return tokens_BLD

    def _real(self, ids_BL: Tensor, mask_BL: Tensor | None) -> Tensor:
        return ids_BL != self.spec.pad_id if mask_BL is None else mask_BL

    def _positions(self, table: Tensor, ids_BL: Tensor, mask_BL: Tensor | None) -> Tensor:
        offset = self.spec.position_offset
        if not self.spec.position_from_mask:
            return table[offset : offset + ids_BL.shape[1]]
        real_BL = self._real(ids_BL, mask_BL)
        return F.embedding(real_BL.cumsum(1) * real_BL + (offset - 1), table)


class Backbone(nn.Module):
    """A whole network of one modality: `embed`, the blocks of `stack`, `finish`."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = ImageEmbedding(spec) if spec.modality == "image" else TextEmbedding(spec)
        self.stack = BlockStack(spec.stack)
        self.norm = nn.LayerNorm(spec.width, eps=spec.eps) if spec.final_norm else None

    @property
    def depth(self) -> int:
        return self.stack.depth

    @property
    def width(self) -> int:
        return self.spec.width

    @property
    def num_prefix(self) -> int:
        return self.spec.num_prefix

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of patches of a picture of this size. Raises UsageError if patches do not fill it."""
        if not isinstance(self.embedding, ImageEmbedding):
            raise ValueError(f"{self.spec.family} reads text")
        return self.embedding.grid(height, width)

    def embed(self, inputs: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Cut 0: tokens_BTD as block 0 takes them.

        inputs: images_BCHW (normalised, floating point, any size that patches fill) or ids_BL (int).
        mask_BT: bool, True = a real token; text only.
        """
        is_image = isinstance(self.embedding, ImageEmbedding)
        tokens_BTD: Tensor = self.embedding(inputs) if is_image else self.embedding(inputs, mask_BT)
        return tokens_BTD

    def run(
        self,
        tokens_BTD: Tensor,
        start: int = 0,
        stop: int | None = None,
        mask_BT: Tensor | None = None,
        *,
        grid: Grid | None = None,
    ) -> BlocksOut:
        """Blocks start..stop (exclusive) on tokens of cut `start`; see BlockStack.run."""
        return self.stack.run(tokens_BTD, start, stop, mask_BT, grid=grid)

    def finish(self, tokens_BTD: Tensor) -> Tensor:
        """The final norm on every token, where the family has one.

        CLIP's own code puts its last norm on CLS alone; here every token gets it and CLS agrees.
        """
        return tokens_BTD if self.norm is None else self.norm(tokens_BTD)

    def pool(self, final_BTD: Tensor, ids_BL: Tensor | None = None, mask_BL: Tensor | None = None) -> Tensor:
        """The token that stands for the whole, [B, D], of the final tokens. ids_BL, mask_BL: of texts."""
        if self.spec.pooled == "first":
            return final_BTD[:, 0]
        if ids_BL is None:
            raise ValueError(f"the end of a text of {self.spec.family} is found by its ids")
        real_BL = torch.ones_like(ids_BL, dtype=torch.bool) if mask_BL is None else mask_BL
        sign_BL = ids_BL.masked_fill(~real_BL, -1)
        if self.spec.pooled == "eos":
            sign_BL = (sign_BL == self.spec.eos_id).int()
        return final_BTD[torch.arange(len(final_BTD), device=final_BTD.device), sign_BL.argmax(dim=1)]

    def forward(self, inputs: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """The final tokens_BTD of pictures or texts."""
        grid: Sequence[int] = inputs.shape[2:] if self.spec.modality == "image" else ()
        tokens_BTD = self.embed(inputs, mask_BT)
        for index in range(self.depth):
            run = self.run(tokens_BTD, index, index + 1, mask_BT, grid=self.grid(*grid) if grid else None)
            tokens_BTD = run.hidden[-1]
        return self.finish(tokens_BTD)
