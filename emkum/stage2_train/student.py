"""The student: pretrained blocks of each modality, shared blocks, and a head; rebuilt from its spec alone.

B batch, T tokens, L text tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emkum.errors import UsageError
from emkum.models.backbone import Backbone, BackboneSpec, BlocksOut, BlockStack, StackSpec, TextEmbedding
from emkum.models.network import Network
from emkum.stage2_train.recipe import Blocks, FieldNames, Recipe
from emkum.stage2_train.shared_mlp import AttentionMlp, SharedMlp, SharedMlpSpec, build_shared_mlp, start_anew

Pooling = Literal["cls", "mean"]
TOKEN_TYPE_SCALE = 1e-5  # THESIS.md section 1: LayerScale start of the token-type embedding


@dataclass(frozen=True)
class ImageSide:
    """The student's blocks for pictures; they start from tokens of `encoder` at depth `cut`. None: no block."""

    encoder: str
    cut: int
    num_prefix: int
    stack: StackSpec | None
    pooling: Pooling


@dataclass(frozen=True)
class TextSide:
    """The student's embedding and blocks for texts, from the start of `encoder`; `width` is theirs."""

    encoder: str
    embedding: BackboneSpec
    stack: StackSpec | None
    pooling: Pooling

    @property
    def width(self) -> int:
        return self.embedding.width


@dataclass(frozen=True)
class StudentSpec:
    """Everything that decides what a student computes, but its weights. JSON round trip by to_json and from_json.

    width: of the image side, the shared blocks and the head's input. head_width None: no final norm and no head,
    features are pooled from the last block (unimodal students). shared_mlp: in place of shared blocks.
    """

    image: ImageSide | None
    text: TextSide | None
    width: int
    shared: StackSpec | None
    token_types: bool
    head_width: int | None
    shared_mlp: SharedMlpSpec | None = None

    @property
    def contrast_widths(self) -> tuple[int, ...]:
        """Channels of each of `StudentOut.layers`."""
        if self.shared_mlp is None:
            return (self.head_width or self.width,)
        widths = self.shared_mlp.hidden, self.width
        return widths if self.shared_mlp.heads else (*widths, self.head_width or self.width)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        return {"format": 1, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> StudentSpec:
        """The inverse of `to_json`."""
        image, text = found["image"], found["text"]
        return cls(
            image=ImageSide(**{**image, "stack": _stack_from(image["stack"])}) if image else None,
            text=TextSide(
                **{
                    **text,
                    "embedding": BackboneSpec.from_json(text["embedding"]),
                    "stack": _stack_from(text["stack"]),
                }
            )
            if text
            else None,
            width=found["width"],
            shared=_stack_from(found["shared"]),
            token_types=found["token_types"],
            head_width=found["head_width"],
            shared_mlp=SharedMlpSpec(**found["shared_mlp"]) if found.get("shared_mlp") else None,  # emkum 0.2: no key
        )


def _stack_from(found: dict[str, Any] | None) -> StackSpec | None:
    return StackSpec.from_json(found) if found else None


@dataclass(frozen=True)
class StudentOut:
    """What the student makes of a batch of pictures or texts.

    features_BD: for retrieval and contrast, float32, not normalised. hidden: the tokens after every block of the
    student, shared ones included; where features are pooled from CLS and nothing else is read, the last block hands
    out CLS alone, [B, 1, D]. predicted_BD: the head's output, which is compared with the teacher's; the features
    themselves, but of a student of pictures alone and of one with attention in its shared MLP. layers: of a shared
    MLP, all that can meet in contrast, the features last; else the features alone. ffn: beside `hidden`, the output of
    every block's feed-forward network before LayerScale and residual, if it was asked for.
    """

    features_BD: Tensor
    hidden: list[Tensor]
    predicted_BD: Tensor
    layers: list[Tensor]
    ffn: list[Tensor] = field(default_factory=list)


class Student(nn.Module):
    """A student of one or two modalities. Weights are random until `build_student` or `load_state_dict`."""

    def __init__(self, spec: StudentSpec) -> None:
        super().__init__()
        self.spec = spec
        self.compiled = False  # compiled.py
        self.image_blocks = BlockStack(spec.image.stack) if spec.image and spec.image.stack else None
        self.text_embedding = TextEmbedding(spec.text.embedding) if spec.text else None
        self.text_blocks = BlockStack(spec.text.stack) if spec.text and spec.text.stack else None
        self.text_projection = nn.Linear(spec.text.width, spec.width) if _projects(spec) and spec.text else None
        self.token_types = nn.Parameter(torch.zeros(2, spec.width)) if spec.token_types else None
        self.token_type_scale = nn.Parameter(torch.full((spec.width,), TOKEN_TYPE_SCALE)) if spec.token_types else None
        self.shared_blocks = BlockStack(spec.shared) if spec.shared else None
        self.shared_mlp = build_shared_mlp(spec.width, spec.shared_mlp) if spec.shared_mlp else None
        self.norm = nn.LayerNorm(spec.width, eps=1e-6) if spec.head_width is not None else None
        self.head = nn.Linear(spec.width, spec.head_width) if spec.head_width is not None else None

    @property
    def image_encoder(self) -> str | None:
        """The frozen network in front of the image side, by its name in the cache."""
        return self.spec.image.encoder if self.spec.image else None

    @property
    def text_encoder(self) -> str | None:
        """The network whose tokenizer, embedding and first blocks the text side has."""
        return self.spec.text.encoder if self.spec.text else None

    @property
    def depth(self) -> int:
        """Blocks a sample goes through; of a student of both modalities those of pictures."""
        own = self.image_blocks if self.spec.image else self.text_blocks
        return sum(stack.depth for stack in (own, self.shared_blocks) if stack is not None)

    def encode_images(
        self, tokens_BTD: Tensor, *, grid: tuple[int, int] | None = None, keep_ffn: bool = False
    ) -> StudentOut:
        """Tokens of the frozen encoder at the cut, floating point -> features.

        grid: rows and columns of patches, for blocks with a relative position bias; a square is assumed.
        """
        side = self.spec.image
        if side is None:
            raise ValueError("this student reads texts only")
        queries = self._queries(side)
        out = BlocksOut([], [])
        if self.image_blocks is not None:
            out = self.image_blocks.run(tokens_BTD, grid=grid, queries=self._early(queries), keep_ffn=keep_ffn)
        tokens_BTD = self._typed(out.hidden[-1] if out.hidden else tokens_BTD, 0)

        def pooled(tokens_BTD: Tensor) -> Tensor:
            return tokens_BTD[:, 0] if side.pooling == "cls" else tokens_BTD[:, side.num_prefix :].mean(dim=1)

        return self._through_shared(tokens_BTD, None, out, queries, pooled, keep_ffn)

    def encode_texts(self, ids_BL: Tensor, mask_BL: Tensor, *, keep_ffn: bool = False) -> StudentOut:
        """Token ids, int64, and which of them are real, bool -> features. Pads change nothing."""
        side = self.spec.text
        if side is None or self.text_embedding is None:
            raise ValueError("this student reads pictures only")
        tokens_BLD = self.text_embedding(ids_BL, mask_BL)
        queries = self._queries(side)
        out = BlocksOut([], [])
        if self.text_blocks is not None:
            early = self._early(queries)
            out = self.text_blocks.run(tokens_BLD, mask_BT=mask_BL, queries=early, keep_ffn=keep_ffn)
        tokens_BLD = out.hidden[-1] if out.hidden else tokens_BLD
        if self.text_projection is not None:
            tokens_BLD = self.text_projection(tokens_BLD).float()  # the residual stream, not rounded

        def pooled(tokens_BLD: Tensor) -> Tensor:
            return tokens_BLD[:, 0] if side.pooling == "cls" else masked_mean(tokens_BLD, mask_BL)

        return self._through_shared(self._typed(tokens_BLD, 1), mask_BL, out, queries, pooled, keep_ffn)

    def _queries(self, side: ImageSide | TextSide) -> int | None:
        """Tokens needed of the last block: CLS alone where features are pooled from it, else all (None).

        A student without a head learns from every token.
        """
        learns_from_all = self.head is None and self.shared_mlp is None
        return 1 if side.pooling == "cls" and not learns_from_all else None

    def _early(self, queries: int | None) -> int | None:
        """Tokens needed of the last block of a modality: every one, where a shared block or attention follows."""
        return None if self.shared_blocks is not None or isinstance(self.shared_mlp, AttentionMlp) else queries

    def _typed(self, tokens_BTD: Tensor, modality: int) -> Tensor:
        if self.token_types is None or self.token_type_scale is None:
            return tokens_BTD
        return tokens_BTD + self.token_type_scale * self.token_types[modality]

    def _through_shared(
        self,
        tokens_BTD: Tensor,
        mask_BT: Tensor | None,
        out: BlocksOut,
        queries: int | None,
        pooled: Callable[[Tensor], Tensor],
        keep_ffn: bool,
    ) -> StudentOut:
        """Shared blocks (after those of `out`) or the shared MLP, final norm, head."""
        hidden, ffn = out.hidden, out.ffn
        if isinstance(self.shared_mlp, SharedMlp):
            first_BF, second_BD = self.shared_mlp(pooled(tokens_BTD))
            head_BD = self._head(self._normed(second_BD))
            return StudentOut(head_BD, hidden, head_BD, [first_BF.float(), second_BD.float(), head_BD], ffn)
        if isinstance(self.shared_mlp, AttentionMlp):
            first_BTF, second_BTD, out_BTD = self.shared_mlp(tokens_BTD, mask_BT, queries)
            features_BD = pooled(second_BTD.float())
            head_BD = self._head(self._normed(pooled(out_BTD)))
            return StudentOut(features_BD, hidden, head_BD, [pooled(first_BTF.float()), features_BD], ffn)
        if self.shared_blocks is not None:
            shared = self.shared_blocks.run(tokens_BTD, mask_BT=mask_BT, queries=queries, keep_ffn=keep_ffn)
            hidden, ffn = [*hidden, *shared.hidden], [*ffn, *shared.ffn]
            tokens_BTD = hidden[-1]
        pooled_BD = pooled(self._normed(tokens_BTD)).float()
        head_BD = self._head(pooled_BD)
        features_BD = pooled_BD if self.spec.text is None else head_BD
        return StudentOut(features_BD, hidden, head_BD, [features_BD], ffn)

    def _normed(self, tokens_BTD: Tensor) -> Tensor:
        if self.norm is None:
            return tokens_BTD
        with torch.autocast(tokens_BTD.device.type, enabled=False):
            normed_BTD: Tensor = self.norm(tokens_BTD.float())
        return normed_BTD

    def _head(self, pooled_BD: Tensor) -> Tensor:
        """The head's output, float32; without a head what it got."""
        if self.head is None:
            return pooled_BD.float()
        with torch.autocast(pooled_BD.device.type, enabled=False):
            head_BD: Tensor = self.head(pooled_BD.float())
        return head_BD

    def checkpoint_activations(self, wanted: bool) -> None:
        """Recompute activations in the backward pass: less memory, a third more time, the same numbers."""
        for stack in (self.image_blocks, self.text_blocks, self.shared_blocks):
            if stack is not None:
                stack.checkpointing = wanted

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The student's parameters by part, for the table and the optimiser's groups; only parts it has."""
        named = {
            "image blocks": self.image_blocks,
            "text embedding": self.text_embedding,
            "text blocks": self.text_blocks,
            "text projection": self.text_projection,
            "shared blocks": self.shared_blocks,
            "shared MLP": self.shared_mlp,
            "final norm": self.norm,
            "head": self.head,
        }
        parts = {name: list(module.parameters()) for name, module in named.items() if module is not None}
        if self.token_types is not None and self.token_type_scale is not None:
            parts["token types"] = [self.token_types, self.token_type_scale]
        return parts


PRETRAINED_PARTS = ("image blocks", "text embedding", "text blocks")


def masked_mean(tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """The mean of the real tokens [B, D]; zero where there is none."""
    summed_BD = torch.where(mask_BL[..., None], tokens_BLD, tokens_BLD.new_zeros(())).sum(dim=1)
    return summed_BD / mask_BL.sum(dim=1, keepdim=True).clamp(min=1)


def _projects(spec: StudentSpec) -> bool:
    return spec.text is not None and spec.text.width != spec.width


# --- from a recipe and the frozen networks -----------------------------------------------------------------------


@dataclass(frozen=True)
class PartCount:
    """Numbers of one part of the student."""

    part: str
    trainable: int
    frozen: int


def parameter_table(student: Student) -> list[PartCount]:
    """Trainable and frozen numbers of each part."""
    return [
        PartCount(
            part,
            sum(p.numel() for p in parameters if p.requires_grad),
            sum(p.numel() for p in parameters if not p.requires_grad),
        )
        for part, parameters in student.parts().items()
    ]


def build_student(
    recipe: Recipe,
    names: FieldNames,
    image_network: Network | None,
    text_network: Network | None,
    target_width: int | None,
    seed: int,
) -> Student:
    """The recipe's student with its starting weights: blocks of the networks, the rest random from `seed`.

    target_width: channels of the pooled target its features are compared with, if any.
    Raises UsageError where the recipe asks for blocks the networks do not have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = _random_student(student_spec(recipe, names, image_network, text_network, target_width), seed)
    spec = student.spec
    if image_network is not None and spec.image is not None and spec.image.stack is not None:
        student.image_blocks = transformer(image_network).stack.take(spec.image.cut, spec.image.stack.depth)
    if text_network is not None and student.text_embedding is not None and spec.text is not None:
        backbone = transformer(text_network)
        student.text_embedding.load_state_dict(backbone.embedding.state_dict())
        if spec.text.stack is not None:
            student.text_blocks = backbone.stack.take(0, spec.text.stack.depth)
    freeze(student, recipe)
    return student.float()


def _random_student(spec: StudentSpec, seed: int) -> Student:
    """Every part new: matrices truncated normal with deviation 0.02, biases 0."""
    student = Student(spec)
    for linear in (student.text_projection, student.head):
        if linear is not None:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
    if student.token_types is not None:
        nn.init.trunc_normal_(student.token_types, std=0.02)
    if student.shared_mlp is not None:
        start_anew(student.shared_mlp)
    if spec.shared is not None:
        block = spec.shared.block
        ratio = block.mlp_width / block.width
        student.shared_blocks = BlockStack.random(block.width, block.heads, spec.shared.depth, ratio, seed)
    return student


def student_spec(
    recipe: Recipe,
    names: FieldNames,
    image_network: Network | None,
    text_network: Network | None,
    target_width: int | None,
) -> StudentSpec:
    """The spec of the recipe's student on these networks; raises as `build_student`."""
    wanted, image, text = recipe.student, None, None
    if image_network is not None:
        backbone, left = transformer(image_network), image_network.depth - names.cut
        blocks = _count(wanted.image_blocks, image_network.depth, names.cut, left, "image", image_network.name)
        stack = dataclasses.replace(backbone.stack.spec, depth=blocks) if blocks else None
        image = ImageSide(image_network.name, names.cut, image_network.num_prefix, stack, wanted.image_pooling)
    if text_network is not None:
        depth = text_network.depth
        blocks = _count(wanted.text_blocks, depth, 0, depth, "text", text_network.name)
        backbone = transformer(text_network)
        stack = dataclasses.replace(backbone.stack.spec, depth=blocks) if blocks else None
        text = TextSide(text_network.name, backbone.spec, stack, wanted.text_pooling)
    width = image_network.width if image_network is not None else text_network.width if text_network else 0
    shared = _shared_spec(recipe, width) if wanted.shared == "blocks" else None
    shared_mlp = _shared_mlp_spec(recipe, width) if wanted.shared != "blocks" else None
    trained_blocks = shared or shared_mlp or (image and image.stack) or (text and text.stack)
    if not trained_blocks:
        asked = f"cut {names.cut}, image_blocks {wanted.image_blocks!r}"
        if recipe.kind != "images":
            asked = f"text_blocks {wanted.text_blocks!r}" + (f", {asked}" if recipe.kind == "pairs" else "")
        raise UsageError(
            f"recipe {recipe.name}: a student without a block ({asked}, shared_blocks 0)",
            f"ask for some: --set student.{'text' if recipe.kind == 'texts' else 'image'}_blocks=all",
        )
    _check_frozen(recipe, image, text)
    if text_network is not None and not shared and not (shared_mlp and shared_mlp.heads):
        _check_pooled(text_network, wanted.text_pooling)
    head_width = None
    # Behind an attention the features come from in front of the head, and those of one modality too: without a target
    # nothing would read it.
    if target_width or (recipe.kind == "pairs" and wanted.shared != "attention-mlp"):
        head_width = (target_width or width) if wanted.head_width == "auto" else wanted.head_width
        if target_width and head_width != target_width:
            raise UsageError(
                f"student.head_width = {head_width}: the target {names.targets} has {target_width} channels, and "
                "features are compared with it",
                f"leave student.head_width out, or set it to {target_width}",
            )
    return StudentSpec(image, text, width, shared, wanted.token_types, head_width, shared_mlp)


def _check_pooled(network: Network, pooling: Pooling) -> None:
    """Raises UsageError where the first token, which is pooled, has seen no other."""
    if transformer(network).spec.causal and pooling == "cls":
        raise UsageError(
            f'student.text_pooling = "cls": a token of {network.name} sees only what stands before it, so its first '
            "token is the same for every text",
            "pool the mean: --set student.text_pooling=mean",
        )


def transformer(network: Network) -> Backbone:
    """The network's Transformer. Raises UsageError for one of pairs, or a convolutional one: they have none to give."""
    if network.modality == "pair":
        raise UsageError(
            f"{network.name} is a network of pairs, which reads a caption with its picture: no student can start from "
            "its blocks",
            "add ids of a text network to the cache with emkum extract and --text-encoder, for example beit3-text",
        )
    if not isinstance(network.backbone, Backbone):
        raise UsageError(
            f"{network.name} is a {network.family}, not a Transformer: no student can start from its blocks",
            "extract with a Transformer as --encoder; a convolutional network can be the teacher",
        )
    return network.backbone


def _count(wanted: Blocks, depth: int, cut: int, left: int, modality: str, network: str) -> int:
    """How many blocks follow the cut; see StudentRecipe."""
    if wanted == "all":
        return left
    if wanted == "half":
        return max(0, depth // 2 - cut)
    if wanted > left:
        raise UsageError(
            f"student.{modality}_blocks = {wanted}: {network} has {depth} blocks, {left} of them after cut {cut}",
            f'use at most {left}: --set student.{modality}_blocks={left}, or "all"',
        )
    return wanted


def _shared_spec(recipe: Recipe, width: int) -> StackSpec | None:
    wanted = recipe.student
    if not wanted.shared_blocks:
        return None
    random = BlockStack.random(width, _shared_heads(recipe, width), 1, wanted.shared_mlp_ratio)
    return dataclasses.replace(random.spec, depth=wanted.shared_blocks)


def _shared_mlp_spec(recipe: Recipe, width: int) -> SharedMlpSpec:
    hidden = round(width * recipe.student.shared_mlp_ratio)
    return SharedMlpSpec(hidden, _shared_heads(recipe, width) if recipe.student.shared == "attention-mlp" else None)


def _shared_heads(recipe: Recipe, width: int) -> int:
    wanted = recipe.student
    heads = max(1, width // 64) if wanted.shared_heads == "auto" else wanted.shared_heads
    if not heads or width % heads:
        raise UsageError(
            f"student.shared_heads = {heads} does not divide the student's width {width}",
            "choose a divisor: --set student.shared_heads=...",
        )
    return heads


def _check_frozen(recipe: Recipe, image: ImageSide | None, text: TextSide | None) -> None:
    wanted = recipe.student
    for modality, frozen, side in (
        ("image", wanted.frozen_image_blocks, image),
        ("text", wanted.frozen_text_blocks, text),
    ):
        there = side.stack.depth if side is not None and side.stack is not None else 0
        if side is not None and frozen > there:
            raise UsageError(
                f"student.frozen_{modality}_blocks = {frozen}: the student has {there} {modality} blocks",
                f"use at most {there}",
            )


def freeze(student: Student, recipe: Recipe) -> None:
    """Take the gradient from what the recipe keeps as it is."""
    student.requires_grad_(True)
    if student.text_embedding is not None and not recipe.student.train_embeddings:
        student.text_embedding.requires_grad_(False)
    for stack, frozen in (
        (student.image_blocks, recipe.student.frozen_image_blocks),
        (student.text_blocks, recipe.student.frozen_text_blocks),
    ):
        if stack is not None and frozen:
            stack.blocks[:frozen].requires_grad_(False)
            if stack.spec.relative_bias == "per_block":
                stack.biases[:frozen].requires_grad_(False)
