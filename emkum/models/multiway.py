"""A Transformer over a picture and its text at once, with experts: weights that serve the tokens of one modality.

B batch, C colour, H height, W width of a picture; in attention H heads; T tokens (I of the picture, then L of the
text), D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emkum.errors import UnsupportedNetwork
from emkum.models.backbone import BackboneSpec, BlocksOut, ImageEmbedding, TextEmbedding
from emkum.models.blocks import (
    Block,
    BlockSpec,
    add_scaled,
    attention,
    attention_mask,
    compute_dtype,
    spec_json,
)
from emkum.models.positions import Grid, RelativeBias

EACH, BOTH = ("image", "text"), ("both",)


@dataclass(frozen=True)
class Layout:
    """What the tokens of a batch are: the first `num_image` of a picture in `grid`, CLS in front; the rest of a text.

    mask_BT: bool, True = a real token; None: all are. Without a picture, num_image and grid are zeros.
    """

    num_image: int
    grid: Grid = (0, 0)
    mask_BT: Tensor | None = None


@dataclass(frozen=True)
class MultiwayStackSpec:
    """Blocks with experts.

    shared_attention: one attention serves all tokens (VLMo, arXiv:2111.02358), else each modality has its own weights
    there too (BEiT-3, arXiv:2208.10442); tokens attend to both modalities either way. num_fused: the last so many
    blocks have one feed-forward network for all tokens. relative_bias: of every block, for pictures of `grid` and texts
    of up to `max_words` tokens.
    """

    block: BlockSpec
    depth: int
    shared_attention: bool = False
    num_fused: int = 0
    relative_bias: bool = False
    grid: Grid = (0, 0)
    max_words: int = 0

    def __post_init__(self) -> None:
        if self.block.norm_order != "pre" or not 0 <= self.num_fused <= self.depth:
            raise ValueError(f"experts in {self.block.norm_order}-norm blocks, {self.num_fused} of {self.depth} fused")


class MultiwayBlock(nn.Module):
    """One block with experts: `attentions` and `feed_forwards` hold halves of Block, by modality or under "both"."""

    def __init__(self, spec: BlockSpec, shared_attention: bool, fused: bool) -> None:
        super().__init__()
        self.attentions = _halves(BOTH if shared_attention else EACH, lambda: Block(spec, only="attention"))
        self.feed_forwards = _halves(BOTH if fused else EACH, lambda: Block(spec, only="feed_forward"))

    def forward(
        self,
        tokens_BTD: Tensor,
        num_image: int,
        bias: Tensor | None = None,
        mask_BT: Tensor | None = None,
        queries: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As Block's: the tokens after the block, and the feed-forward output before LayerScale and residual.

        queries: only the first so many tokens come out; of pictures or texts alone, not of pairs.
        """
        halves = _routed(self.attentions, tokens_BTD, num_image)
        heads = [half.queries_keys_values(half.norm1(part), queries) for half, part in halves]
        q, k, v = (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in zip(*heads, strict=True))
        bias = bias if bias is None or queries is None else bias[:, :, :queries]
        attended_BHTC = attention(q, k, v, attention_mask(bias, mask_BT, q.dtype))
        halves = [(half, part[:, :queries]) for half, part in halves]
        parts_BHTC = torch.split(attended_BHTC, [part.shape[1] for _, part in halves], dim=2)
        tokens_BTD = _joined(
            add_scaled(part, half.merged(attended), half.scale1)
            for (half, part), attended in zip(halves, parts_BHTC, strict=True)
        )
        halves = _routed(self.feed_forwards, tokens_BTD, num_image)
        ffn = [half.feed_forward(half.norm2(part)) for half, part in halves]
        tokens_BTD = _joined(add_scaled(part, out, half.scale2) for (half, part), out in zip(halves, ffn, strict=True))
        return tokens_BTD, _joined(ffn)


def _halves(names: tuple[str, ...], make: Callable[[], nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({name: make() for name in names})


def _routed(experts: nn.ModuleDict, tokens_BTD: Tensor, num_image: int) -> list[tuple[Any, Tensor]]:
    """Each expert with the tokens it serves; one without tokens is left out."""
    if "both" in experts:
        return [(experts["both"], tokens_BTD)]
    parts = (tokens_BTD[:, :num_image], tokens_BTD[:, num_image:])
    return [(experts[name], part) for name, part in zip(EACH, parts, strict=True) if part.shape[1]]


def _joined(parts: Any) -> Tensor:
    parts = list(parts)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class PairBias(nn.Module):
    """Relative position bias within the picture and within the text, and one number per head across each way."""

    def __init__(self, grid: Grid, max_words: int, heads: int) -> None:
        super().__init__()
        self.image = RelativeBias(grid, heads)
        self.text = RelativeBias((1, max_words - 1), heads, words=True)
        self.cross = nn.Parameter(torch.zeros(2, heads))  # from text to picture, from picture to text

    def forward(self, layout: Layout, num_tokens: int, dtype: torch.dtype) -> Tensor:
        """[1, H, T, T] in `dtype`."""
        num_image, num_text = layout.num_image, num_tokens - layout.num_image
        if not num_text:
            return self.image(layout.grid, dtype)  # type: ignore[no-any-return]
        if not num_image:
            return self.text((1, num_text - 1), dtype)  # type: ignore[no-any-return]
        to_image, to_text = self.cross.to(dtype)[..., None, None]
        heads = len(to_image)
        image_1HII = self.image(layout.grid, dtype)
        text_1HLL = self.text((1, num_text - 1), dtype)
        image_rows = torch.cat([image_1HII, to_text.expand(1, heads, num_image, num_text)], dim=3)
        text_rows = torch.cat([to_image.expand(1, heads, num_text, num_image), text_1HLL], dim=3)
        return torch.cat([image_rows, text_rows], dim=2)


class MultiwayStack(nn.Module):
    """Blocks with experts in a row. Runs on pairs, and on pictures or texts alone through their own experts."""

    def __init__(self, spec: MultiwayStackSpec) -> None:
        super().__init__()
        self.spec = spec
        self.checkpointing = False  # as BlockStack's
        fused_from = spec.depth - spec.num_fused
        self.blocks = nn.ModuleList(
            MultiwayBlock(spec.block, spec.shared_attention, index >= fused_from) for index in range(spec.depth)
        )
        num_biases = spec.depth if spec.relative_bias else 0
        self.biases = nn.ModuleList(PairBias(spec.grid, spec.max_words, spec.block.heads) for _ in range(num_biases))

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def run(
        self,
        tokens_BTD: Tensor,
        layout: Layout,
        start: int = 0,
        stop: int | None = None,
        *,
        queries: int | None = None,
        keep_ffn: bool = True,
    ) -> BlocksOut:
        """Blocks start..stop (exclusive; None: to the end), as BlockStack.run. queries: not of pairs."""
        if queries is not None and 0 < layout.num_image < tokens_BTD.shape[1]:
            raise ValueError("the first tokens of a pair are those of its picture alone")
        stop = self.depth if stop is None else stop
        if not 0 <= start <= stop <= self.depth:
            raise ValueError(f"blocks {start} to {stop} of a stack of {self.depth}")
        out = BlocksOut([], [])
        for index in range(start, stop):
            block = self.blocks[index]
            assert isinstance(block, MultiwayBlock)
            bias = None
            if self.biases:
                bias = self.biases[index](layout, tokens_BTD.shape[1], _compute_dtype(block))
            given = (tokens_BTD, layout.num_image, bias, layout.mask_BT, queries if index == stop - 1 else None)
            if self.checkpointing and torch.is_grad_enabled():
                tokens_BTD, ffn_BTD = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens_BTD, ffn_BTD = block(*given)
            out.hidden.append(tokens_BTD)
            if keep_ffn:
                out.ffn.append(ffn_BTD)
        return out


def _compute_dtype(block: MultiwayBlock) -> torch.dtype:
    half = next(iter(block.attentions.values()))
    assert isinstance(half, Block)
    return compute_dtype(half.qkv.weight)


@dataclass(frozen=True)
class MultiwaySpec:
    """The shape of a network of pairs: how it embeds pictures and texts, and how its blocks serve them.

    Of `image` and `text` the blocks must be of one shape. shared_attention, num_fused: as in MultiwayStackSpec; a
    network that shares its attention shares its final norm too. pooled: whose first token stands for the pair. JSON
    round trip by to_json and from_json.
    """

    family: str
    image: BackboneSpec
    text: BackboneSpec
    shared_attention: bool = False
    num_fused: int = 0
    pooled: Literal["image", "text"] = "image"
    modality: Literal["pair"] = "pair"
    kind: str = field(default="multiway", init=False)

    def __post_init__(self) -> None:
        if (self.image.block, self.image.depth) != (self.text.block, self.text.depth):
            raise UnsupportedNetwork(f"a {self.family} whose blocks differ between pictures and texts")

    @property
    def depth(self) -> int:
        return self.image.depth

    @property
    def width(self) -> int:
        return self.image.width

    @property
    def patch(self) -> int:
        return self.image.patch

    @property
    def num_prefix(self) -> int:
        return self.image.num_prefix

    @property
    def max_positions(self) -> int:
        """As of its text."""
        return self.text.max_positions

    @property
    def position_offset(self) -> int:
        """As of its text."""
        return self.text.position_offset

    @property
    def stack(self) -> MultiwayStackSpec:
        biased = self.image.relative_bias == "per_block"
        return MultiwayStackSpec(
            self.image.block,
            self.depth,
            self.shared_attention,
            self.num_fused,
            biased,
            self.image.stack.grid,
            self.text.max_positions if biased else 0,
        )

    def build(self) -> Multiway:
        """A network of this shape."""
        return Multiway(self)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        of_pair = "family shared_attention num_fused pooled modality kind"
        towers = {"image": self.image.to_json(), "text": self.text.to_json()}
        return {key: value for key, value in spec_json(self, of_pair).items() if key not in towers} | towers

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> MultiwaySpec:
        """The inverse of `to_json`. Raises UnsupportedNetwork for unknown keys, and without `pooled`."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(found) - known):
            raise UnsupportedNetwork(f"an architecture with unknown keys {unknown}", "read it with a newer emkum")
        if "pooled" not in found:  # VLMo's is the text's first token, which no default would say
            raise UnsupportedNetwork(
                f"a {found.get('family')} folder that does not say whose first token stands for the pair: it was made "
                "by an earlier emkum",
                "make it again from the original file: emkum teachers convert",
            )
        towers = {name: BackboneSpec.from_json(found[name]) for name in EACH}
        return cls(**{key: value for key, value in found.items() if key != "kind"} | towers)


class Multiway(nn.Module):
    """A whole network of pairs: `embed`, the blocks of `stack`, `finish`."""

    def __init__(self, spec: MultiwaySpec) -> None:
        super().__init__()
        self.spec = spec
        self.image = ImageEmbedding(spec.image)
        self.text = TextEmbedding(spec.text)
        self.stack = MultiwayStack(spec.stack)
        names = BOTH if spec.shared_attention else EACH
        self.norms = _halves(names, lambda: nn.LayerNorm(spec.width, eps=spec.image.eps))

    @property
    def depth(self) -> int:
        return self.spec.depth

    @property
    def width(self) -> int:
        return self.spec.width

    @property
    def num_prefix(self) -> int:
        return self.spec.num_prefix

    def embed(self, images_BCHW: Tensor, ids_BL: Tensor, mask_BL: Tensor | None = None) -> tuple[Tensor, Layout]:
        """Cut 0: the tokens [picture; text] as block 0 takes them. mask_BL: bool, True = a real token of the text."""
        image_BID = self.image(images_BCHW)
        text_BLD = self.text(ids_BL, mask_BL)
        mask_BT = None
        if mask_BL is not None:
            mask_BT = torch.cat([mask_BL.new_ones(image_BID.shape[:2]), mask_BL], dim=1)
        layout = Layout(image_BID.shape[1], self.image.grid(*images_BCHW.shape[2:]), mask_BT)
        return torch.cat([image_BID, text_BLD], dim=1), layout

    def run(self, tokens_BTD: Tensor, layout: Layout, start: int = 0, stop: int | None = None) -> BlocksOut:
        """Blocks start..stop (exclusive) on tokens of cut `start`; see MultiwayStack.run."""
        return self.stack.run(tokens_BTD, layout, start, stop)

    def finish(self, tokens_BTD: Tensor, layout: Layout) -> Tensor:
        """The final norm, each modality's own where the network has two."""
        return _joined(norm(part) for norm, part in _routed(self.norms, tokens_BTD, layout.num_image))

    def pool(self, final_BTD: Tensor, layout: Layout) -> Tensor:
        """The token that stands for the pair, [B, D], of what `finish` gave."""
        return final_BTD[:, 0 if self.spec.pooled == "image" else layout.num_image]

    def forward(self, images_BCHW: Tensor, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """The final tokens_BTD of pairs: those of the picture, CLS in front, then those of the text."""
        tokens_BTD, layout = self.embed(images_BCHW, ids_BL, mask_BL)
        for index in range(self.depth):
            tokens_BTD = self.run(tokens_BTD, layout, index, index + 1).hidden[-1]
        return self.finish(tokens_BTD, layout)
