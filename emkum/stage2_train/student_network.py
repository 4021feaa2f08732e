"""The student as a network: pretrained blocks of each modality, a shared part, heads; rebuilt from its spec alone.

B batch, T tokens, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from emkum.errors import UsageError
from emkum.models.backbone import Backbone, BlocksOut, BlockStack, TextEmbedding
from emkum.models.multiway import Layout, MultiwayStack
from emkum.models.resnet import ResNet
from emkum.stage2_train.shared_mlp import AttentionMlp, SharedMlp, build_shared_mlp
from emkum.stage2_train.student_spec import ImageSide, StudentSpec, TextSide

Grid = tuple[int, int]


@dataclass(frozen=True)
class StudentOut:
    """What the student makes of a batch of pictures or texts.

    features_BD: for retrieval and contrast, float32, not normalised. hidden: the tokens after every block of the
    student, shared ones included; where features are pooled from CLS and nothing else is read, the last block hands
    out CLS alone, [B, 1, D]. predicted_BD: the head's output, which is compared with the teacher's; the features
    themselves, but of a student of pictures alone and of one with attention in its shared MLP. layers: of a shared
    MLP, all that can meet in contrast, the features last; else the features alone. ffn: beside `hidden`, the output of
    every block's feed-forward network before LayerScale and residual, if it was asked for. heads: of a student with
    separate heads, the output of each, by the objective's name. tokens_BTD: the final tokens, after shared part and
    final norm, float32, if they were asked for.
    """

    features_BD: Tensor
    hidden: list[Tensor]
    predicted_BD: Tensor
    layers: list[Tensor]
    ffn: list[Tensor] = field(default_factory=list)
    heads: dict[str, Tensor] = field(default_factory=dict)
    tokens_BTD: Tensor | None = None

    def of(self, term: str) -> Tensor:
        """What the objective `term` reads: the output of its own head, or of the one head."""
        return self.heads.get(term, self.predicted_BD)


@dataclass(frozen=True)
class PairOut:
    """Final tokens of pictures and captions that went through the shared part together, after its norm, float32.

    hidden: the tokens [B, T + L, D] after every shared block, those of the picture first.
    """

    image_BTD: Tensor
    text_BLD: Tensor
    hidden: list[Tensor]


class Student(nn.Module):
    """A student of one or two modalities. Weights are random until `build_student` or `load_state_dict`."""

    def __init__(self, spec: StudentSpec) -> None:
        super().__init__()
        self.spec = spec
        self.compiled = False  # compiled.py
        self.origins: tuple[str, ...] = ()  # lines for people: where weights came from
        self.in_front = 0  # numbers of the frozen network up to the cut, which is no part of it
        types_after = spec.token_types and not spec.types_before
        self.image_blocks = BlockStack(spec.image.stack) if spec.image and spec.image.stack else None
        self.text_embedding = TextEmbedding(spec.text.embedding) if spec.text else None
        self.text_blocks = BlockStack(spec.text.stack) if spec.text and spec.text.stack else None
        self.text_projection = _text_projection(spec)
        self.token_types = nn.Parameter(torch.zeros(2, spec.width)) if types_after else None
        self.token_type_scale = _scale(spec, spec.width) if types_after else None
        self.shared_blocks = BlockStack(spec.shared) if spec.shared else None
        self.shared_mlp = build_shared_mlp(spec.width, spec.shared_mlp) if spec.shared_mlp else None
        self.norm = nn.LayerNorm(spec.width, eps=1e-6) if spec.head_width is not None and not spec.pixels else None
        one_head = spec.head_width is not None and not spec.heads
        self.head = nn.Linear(spec.width, spec.head_width or 0) if one_head else None
        # What came later stays behind: the starting weights of the parts above are drawn in this order.
        self.image_projection = Projection(spec.width, spec.width) if spec.projection and spec.image else None
        self.shared_mome = MultiwayStack(spec.shared_mome) if spec.shared_mome else None
        rows = spec.shared_positions
        self.shared_positions = nn.Parameter(torch.zeros(rows, spec.width)) if rows else None
        self.types_before = TypesBefore(spec) if spec.token_types and spec.types_before else None
        self.heads = nn.ModuleDict({head.term: nn.Linear(spec.width, head.width) for head in spec.heads})
        self.network: Backbone | ResNet | None = spec.pixels.architecture.build() if spec.pixels else None

    @property
    def image_encoder(self) -> str | None:
        """The frozen network in front of the image side, by its name in the cache; a student of pixels has none."""
        return self.spec.image.encoder if self.spec.image and not self.spec.pixels else None

    @property
    def text_encoder(self) -> str | None:
        """The network whose tokenizer, embedding and first blocks the text side has."""
        return self.spec.text.encoder if self.spec.text else None

    @property
    def depth(self) -> int:
        """Blocks a sample goes through; of a student of both modalities those of pictures."""
        if self.network is not None:
            return self.network.depth
        own = self.image_blocks if self.spec.image else self.text_blocks
        return sum(stack.depth for stack in (own, self.shared_blocks, self.shared_mome) if stack is not None)

    def encode_images(
        self, tokens_BTD: Tensor, *, grid: Grid | None = None, keep_ffn: bool = False, keep_tokens: bool = False
    ) -> StudentOut:
        """Tokens of the frozen encoder at the cut, floating point -> features.

        Of a student of pixels: normalised pictures, images_BCHW, in their place.
        grid: rows and columns of patches, for blocks with a relative position bias; a square is assumed. keep_tokens:
        give `tokens_BTD`, and every token in `hidden`; UsageError for a shared MLP.
        """
        if self.network is not None:
            return self._pictures(self.network, tokens_BTD, keep_ffn, keep_tokens)
        side = self._image_side()
        queries = self._queries(side, keep_tokens)
        out, tokens_BTD = self._images(tokens_BTD, grid, self._early(queries), keep_ffn)

        def pooled(tokens_BTD: Tensor) -> Tensor:
            return tokens_BTD[:, 0] if side.pooling == "cls" else tokens_BTD[:, side.num_prefix :].mean(dim=1)

        layout = Layout(tokens_BTD.shape[1])
        return self._through_shared(tokens_BTD, layout, out, queries, pooled, keep_ffn, keep_tokens)

    def encode_texts(
        self, ids_BL: Tensor, mask_BL: Tensor, *, keep_ffn: bool = False, keep_tokens: bool = False
    ) -> StudentOut:
        """Token ids, int64, and which of them are real, bool -> features. Pads change nothing.

        keep_tokens: as in `encode_images`; the tokens at pads mean nothing.
        """
        side = self._text_side()
        queries = self._queries(side, keep_tokens)
        out, tokens_BLD = self._texts(ids_BL, mask_BL, self._early(queries), keep_ffn)

        def pooled(tokens_BLD: Tensor) -> Tensor:
            return tokens_BLD[:, 0] if side.pooling == "cls" else masked_mean(tokens_BLD, mask_BL)

        layout = Layout(0, mask_BT=mask_BL)
        return self._through_shared(tokens_BLD, layout, out, queries, pooled, keep_ffn, keep_tokens)

    def encode_pairs(self, tokens_BTD: Tensor, ids_BL: Tensor, mask_BL: Tensor, *, grid: Grid | None = None) -> PairOut:
        """Pictures and captions through their own blocks, then through the shared ones at once, [picture; caption].

        Arguments as of `encode_images` and `encode_texts`. Raises UsageError for a student without shared blocks.
        """
        if self.shared_blocks is None and self.shared_mome is None:
            what = "a shared MLP" if self.shared_mlp is not None else "no shared block"
            raise UsageError(
                f"pictures and captions at once, by a student with {what}",
                "--set student.shared=blocks or mome, with student.shared_blocks of 1 or more",
            )
        self._image_side()
        self._text_side()
        image_BTD = self._images(tokens_BTD, grid, None, False)[1]
        text_BLD = self._texts(ids_BL, mask_BL, None, False)[1]
        num_image = image_BTD.shape[1]
        mask_BT = torch.cat([mask_BL.new_ones(image_BTD.shape[:2]), mask_BL], dim=1)
        both_BTD = torch.cat([image_BTD, text_BLD], dim=1)
        hidden = self._shared(both_BTD, Layout(num_image, mask_BT=mask_BT), None, False).hidden
        final_BTD = self._normed(hidden[-1]).float()
        return PairOut(final_BTD[:, :num_image], final_BTD[:, num_image:], hidden)

    def _image_side(self) -> ImageSide:
        if self.spec.image is None:
            raise ValueError("this student reads texts only")
        return self.spec.image

    def _text_side(self) -> TextSide:
        if self.spec.text is None:
            raise ValueError("this student reads pictures only")
        return self.spec.text

    def _images(
        self, tokens_BTD: Tensor, grid: Grid | None, queries: int | None, keep_ffn: bool
    ) -> tuple[BlocksOut, Tensor]:
        """What the image blocks gave, and the tokens as the shared part takes them."""
        if self.types_before is not None:
            tokens_BTD = self.types_before(tokens_BTD, "image")
        out = BlocksOut([], [])
        if self.image_blocks is not None:
            out = self.image_blocks.run(tokens_BTD, grid=grid, queries=queries, keep_ffn=keep_ffn)
            tokens_BTD = out.hidden[-1]
        if self.image_projection is not None:
            tokens_BTD = self.image_projection(tokens_BTD).float()
        return out, self._positioned(self._typed(tokens_BTD, 0))

    def _pictures(
        self, network: Backbone | ResNet, images_BCHW: Tensor, keep_ffn: bool, keep_tokens: bool
    ) -> StudentOut:
        """A student of pixels: its network from end to end, then the head, where it has one."""
        side, out = self._image_side(), BlocksOut([], [])
        tokens_BTD = network.embed(images_BCHW).float()  # the residual stream, not rounded
        if isinstance(network, Backbone):
            height, width = images_BCHW.shape[2:]
            out = network.stack.run(tokens_BTD, grid=network.grid(height, width), keep_ffn=keep_ffn)
            tokens_BTD = out.hidden[-1]
        final_BTD = network.finish(tokens_BTD).float()
        pooled_BD = final_BTD[:, 0] if side.pooling == "cls" else final_BTD[:, side.num_prefix :].mean(dim=1)
        head_BD = self._head(pooled_BD)
        kept_BTD = final_BTD if keep_tokens else None
        return StudentOut(pooled_BD, out.hidden, head_BD, [pooled_BD], out.ffn, tokens_BTD=kept_BTD)

    def _texts(self, ids_BL: Tensor, mask_BL: Tensor, queries: int | None, keep_ffn: bool) -> tuple[BlocksOut, Tensor]:
        """As `_images`."""
        assert self.text_embedding is not None
        tokens_BLD = self.text_embedding(ids_BL, mask_BL)
        if self.types_before is not None:
            tokens_BLD = self.types_before(tokens_BLD, "text")
        out = BlocksOut([], [])
        if self.text_blocks is not None:
            out = self.text_blocks.run(tokens_BLD, mask_BT=mask_BL, queries=queries, keep_ffn=keep_ffn)
            tokens_BLD = out.hidden[-1]
        if self.text_projection is not None:
            tokens_BLD = self.text_projection(tokens_BLD).float()  # the residual stream, not rounded
        return out, self._positioned(self._typed(tokens_BLD, 1))

    def _queries(self, side: ImageSide | TextSide, keep_tokens: bool) -> int | None:
        """Tokens needed of the last block: CLS alone where features are pooled from it, else all (None).

        A student without a head learns from every token.
        """
        if keep_tokens and isinstance(self.shared_mlp, SharedMlp):
            raise UsageError(
                'student.shared = "mlp" reads one vector of each sample: it has no final tokens',
                "--set student.shared=blocks",
            )
        learns_from_all = self.norm is None and self.shared_mlp is None
        return 1 if side.pooling == "cls" and not learns_from_all and not keep_tokens else None

    def _early(self, queries: int | None) -> int | None:
        """Tokens needed of the last block of a modality: every one, where a shared block or attention follows."""
        alone = self.shared_blocks is None and self.shared_mome is None
        return queries if alone and not isinstance(self.shared_mlp, AttentionMlp) else None

    def _typed(self, tokens_BTD: Tensor, modality: int) -> Tensor:
        if self.token_types is None:
            return tokens_BTD
        return _added(tokens_BTD, self.token_types[modality], self.token_type_scale)

    def _positioned(self, tokens_BTD: Tensor) -> Tensor:
        if self.shared_positions is None:
            return tokens_BTD
        rows, num_tokens = len(self.shared_positions), tokens_BTD.shape[1]
        if num_tokens > rows:
            raise UsageError(
                f'student.positions = "shared": a sample has {num_tokens} tokens, and the table {rows} rows',
                "leave student.positions out, or extract smaller pictures",
            )
        return tokens_BTD + self.shared_positions[:num_tokens]

    def _shared(self, tokens_BTD: Tensor, layout: Layout, queries: int | None, keep_ffn: bool) -> BlocksOut:
        """The shared blocks, of either kind; nothing where there are none."""
        if self.shared_mome is not None:
            return self.shared_mome.run(tokens_BTD, layout, queries=queries, keep_ffn=keep_ffn)
        if self.shared_blocks is not None:
            return self.shared_blocks.run(tokens_BTD, mask_BT=layout.mask_BT, queries=queries, keep_ffn=keep_ffn)
        return BlocksOut([], [])

    def _through_shared(
        self,
        tokens_BTD: Tensor,
        layout: Layout,
        out: BlocksOut,
        queries: int | None,
        pooled: Callable[[Tensor], Tensor],
        keep_ffn: bool,
        keep_tokens: bool,
    ) -> StudentOut:
        """Shared blocks (after those of `out`) or the shared MLP, final norm, heads."""
        hidden, ffn = out.hidden, out.ffn
        if isinstance(self.shared_mlp, SharedMlp):
            first_BF, second_BD = self.shared_mlp(pooled(tokens_BTD))
            head_BD = self._head(self._normed(second_BD))
            return StudentOut(head_BD, hidden, head_BD, [first_BF.float(), second_BD.float(), head_BD], ffn)
        if isinstance(self.shared_mlp, AttentionMlp):
            first_BTF, second_BTD, out_BTD = self.shared_mlp(tokens_BTD, layout.mask_BT, queries)
            features_BD = pooled(second_BTD.float())
            head_BD = self._head(self._normed(pooled(out_BTD)))
            layers = [pooled(first_BTF.float()), features_BD]
            kept_BTD = self._normed(out_BTD).float() if keep_tokens else None
            return StudentOut(features_BD, hidden, head_BD, layers, ffn, tokens_BTD=kept_BTD)
        shared = self._shared(tokens_BTD, layout, queries, keep_ffn)
        hidden, ffn = [*hidden, *shared.hidden], [*ffn, *shared.ffn]
        normed_BTD = self._normed(shared.hidden[-1] if shared.hidden else tokens_BTD)
        pooled_BD = pooled(normed_BTD).float()
        heads = {term: _in_float32(head, pooled_BD) for term, head in self.heads.items()}
        head_BD = heads[self.spec.heads[0].term] if heads else self._head(pooled_BD)
        features_BD = pooled_BD if self.spec.text is None else head_BD
        kept_BTD = normed_BTD.float() if keep_tokens else None
        return StudentOut(features_BD, hidden, head_BD, [features_BD], ffn, heads, kept_BTD)

    def _normed(self, tokens_BTD: Tensor) -> Tensor:
        return tokens_BTD if self.norm is None else _in_float32(self.norm, tokens_BTD)

    def _head(self, pooled_BD: Tensor) -> Tensor:
        """The head's output, float32; without a head what it got."""
        return pooled_BD.float() if self.head is None else _in_float32(self.head, pooled_BD)

    def checkpoint_activations(self, wanted: bool) -> None:
        """Recompute activations in the backward pass: less memory, a third more time, the same numbers.

        Raises UsageError for a ResNet that is trained.
        """
        if wanted and isinstance(self.network, ResNet):
            raise UsageError(
                "--activation-checkpointing with a ResNet as student: its statistics would count each batch twice",
                "leave it out; --set training.accumulate=2 with half the batch needs less memory",
            )
        own = self.network.stack if isinstance(self.network, Backbone) else None
        for stack in (self.image_blocks, self.text_blocks, self.shared_blocks, self.shared_mome, own):
            if stack is not None:
                stack.checkpointing = wanted

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The student's parameters by part, for the table and the optimiser's groups; only parts it has."""
        by_name = dict(self.named_parameters())
        found = {part: [p for name, p in by_name.items() if name_in_part(name, part)] for part in PARTS}
        return {part: parameters for part, parameters in found.items() if parameters}


PARTS: dict[str, tuple[str, ...]] = {
    "image blocks": ("image_blocks",),
    "text embedding": ("text_embedding",),
    "text blocks": ("text_blocks",),
    "image projection": ("image_projection",),
    "text projection": ("text_projection",),
    "shared blocks": ("shared_blocks",),
    "shared MoME": ("shared_mome",),
    "shared MLP": ("shared_mlp",),
    "final norm": ("norm",),
    "head": ("head",),
    "heads": ("heads",),
    "token types": ("token_types", "token_type_scale", "types_before"),
    "positions": ("shared_positions",),
    "network": ("network",),
}
"""The parts of a student, and the names of its modules and parameters that each consists of."""
PRETRAINED_PARTS = ("image blocks", "text embedding", "text blocks", "network")


def name_in_part(name: str, part: str) -> bool:
    """Whether the parameter of this name belongs to the part."""
    return name.split(".")[0] in PARTS[part]


class Projection(nn.Module):
    """LN(x)W + b: from the space of a modality's blocks to that of the shared part."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, out_width)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """[B, T, out_width]."""
        projected_BTD: Tensor = self.linear(self.norm(tokens_BTD))
        return projected_BTD


class TypesBefore(nn.Module):
    """Token types in front of the modalities' blocks, whose widths may differ: a vector each, and its LayerScale."""

    def __init__(self, spec: StudentSpec) -> None:
        super().__init__()
        widths = {"image": spec.width if spec.image else 0, "text": spec.text.width if spec.text else 0}
        there = {name: width for name, width in widths.items() if width}
        self.vectors = nn.ParameterDict({name: torch.zeros(width) for name, width in there.items()})
        scales = {name: _scale(spec, width) for name, width in there.items()}
        self.scales = nn.ParameterDict({name: scale for name, scale in scales.items() if scale is not None})

    def forward(self, tokens_BTD: Tensor, modality: str) -> Tensor:
        """tokens + scale * vector of the modality."""
        return _added(tokens_BTD, self.vectors[modality], self.scales.get(modality))


def _scale(spec: StudentSpec, width: int) -> nn.Parameter | None:
    return nn.Parameter(torch.full((width,), spec.token_type_scale)) if spec.token_type_scale else None


def _added(tokens_BTD: Tensor, vector_D: Tensor, scale_D: Tensor | None) -> Tensor:
    return tokens_BTD + (vector_D if scale_D is None else scale_D * vector_D)


def _in_float32(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = module(x.float())
    return out


def _text_projection(spec: StudentSpec) -> nn.Module | None:
    """A linear layer where the widths differ; with `projection`, in any case and behind a norm."""
    if spec.text is None:
        return None
    if spec.projection:
        return Projection(spec.text.width, spec.width)
    return nn.Linear(spec.text.width, spec.width) if spec.text.width != spec.width else None


def masked_mean(tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """The mean of the real tokens [B, D]; zero where there is none."""
    summed_BD = torch.where(mask_BL[..., None], tokens_BLD, tokens_BLD.new_zeros(())).sum(dim=1)
    return summed_BD / mask_BL.sum(dim=1, keepdim=True).clamp(min=1)
