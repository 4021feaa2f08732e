"""The student of a recipe, built: its shape, its starting weights, what stays frozen, and how many numbers it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from emkum.errors import UsageError
from emkum.models.backbone import Backbone, BlockStack, ImageEmbedding
from emkum.models.blocks import Block
from emkum.models.multiway import MultiwayBlock, MultiwayStack
from emkum.models.network import Network
from emkum.stage2_train.earlier_run import take_from_runs
from emkum.stage2_train.origins import FIXED_POSITIONS, Origins, find_origins, transformer
from emkum.stage2_train.pixels import build_pixel_student
from emkum.stage2_train.recipe import Recipe
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.shared_mlp import start_anew
from emkum.stage2_train.student_network import PRETRAINED_PARTS, PairOut, Student, StudentOut, masked_mean
from emkum.stage2_train.student_shape import picked_image_blocks, picked_text_blocks, shared_lender, student_spec
from emkum.stage2_train.student_spec import StudentSpec

if TYPE_CHECKING:
    from emkum.shards.reader import Cache

__all__ = [
    "PRETRAINED_PARTS",
    "PairOut",
    "PartCount",
    "Student",
    "StudentOut",
    "StudentSpec",
    "build_student",
    "freeze",
    "masked_mean",
    "parameter_table",
    "pretrained_parts",
    "student_spec",
    "transformer",
]

ATTENTION = ("norm1", "qkv", "q_bias", "v_bias", "attention_norm", "proj", "scale1")  # of a Block's parameters


@dataclass(frozen=True)
class PartCount:
    """Numbers of one part of the student."""

    part: str
    trainable: int
    frozen: int


def parameter_table(student: Student, with_encoder: bool = False) -> list[PartCount]:
    """Trainable and frozen numbers of each part. with_encoder: first what runs frozen in front of the image blocks."""
    table = [
        PartCount(
            part,
            sum(p.numel() for p in parameters if p.requires_grad),
            sum(p.numel() for p in parameters if not p.requires_grad),
        )
        for part, parameters in student.parts().items()
    ]
    in_front = [PartCount("image encoder", 0, student.in_front)] if with_encoder and student.in_front else []
    return in_front + table


def build_student(
    recipe: Recipe,
    names: FieldNames,
    image_network: Network | None,
    text_network: Network | None,
    target_width: int | None,
    seed: int,
    *,
    cache: Cache | None = None,
    heads: Mapping[str, int] | None = None,
) -> Student:
    """The recipe's student with its starting weights: blocks of the networks, the rest random from `seed`.

    image_network: the frozen encoder; text_network: that of the tokenizer. target_width: channels of the pooled target
    its features are compared with, if any. cache: where `init` and `text_attention` find networks by name. heads: of
    separate heads, channels by the objective's name, that of evaluation first; None: as the recipe's terms say.
    Raises UsageError where the recipe asks for blocks the networks do not have, NotARun for an `init` that is none.
    """
    if recipe.student.pixels:
        return build_pixel_student(recipe, names, target_width, seed, cache)
    with torch.random.fork_rng(devices=[]):
        origins = find_origins(recipe, names, image_network, text_network, cache)
        torch.manual_seed(seed)
        spec = student_spec(recipe, names, origins, target_width, heads)
        student = _random_student(spec, recipe.student.shared_start == "random", seed)
        _start_blocks(student, recipe, names, origins)
    student.origins = tuple(take_from_runs(student, recipe, origins))
    freeze(student, recipe)
    if not any(p.requires_grad for p in student.parameters()):
        raise UsageError(
            f"recipe {recipe.name}: nothing of the student is trained",
            "freeze less: student.frozen_image, frozen_text, frozen_image_blocks, frozen_text_blocks",
        )
    student.in_front = numbers_in_front(image_network, names.cut) if image_network is not None else 0
    return student.float()


def _random_student(spec: StudentSpec, shared_anew: bool, seed: int) -> Student:
    """Every part new but the blocks of networks: matrices truncated normal with deviation 0.02, biases 0."""
    student = Student(spec)
    for module in (student.text_projection, student.head):
        if module is not None:
            start_anew(module)
    if student.token_types is not None:
        nn.init.trunc_normal_(student.token_types, std=0.02)
    if student.shared_mlp is not None:
        start_anew(student.shared_mlp)
    if spec.shared is not None and shared_anew:
        block = spec.shared.block
        ratio = block.mlp_width / block.width
        student.shared_blocks = BlockStack.random(block.width, block.heads, spec.shared.depth, ratio, seed)
    for later in (student.image_projection, student.shared_mome, student.heads):
        if later is not None:
            start_anew(later)
    tables = [student.shared_positions] if student.shared_positions is not None else []
    tables += list(student.types_before.vectors.values()) if student.types_before is not None else []
    for table in tables:
        nn.init.trunc_normal_(table, std=0.02)
    return student


def _start_blocks(student: Student, recipe: Recipe, names: FieldNames, origins: Origins) -> None:
    """The weights of each modality's blocks, and of shared blocks that start as such."""
    wanted = recipe.student
    if origins.image_shape is not None and student.image_blocks is not None:
        if wanted.image_start == "random":
            start_anew(student.image_blocks)
        else:
            picked = picked_image_blocks(wanted, origins.image_shape, names.cut)
            stack = transformer(origins.image_shape).stack
            student.image_blocks = stack.take(picked.first, picked.count, picked.step)
    if origins.text_shape is not None and student.text_embedding is not None:
        backbone = transformer(origins.text_shape)
        student.text_embedding.load_state_dict(backbone.embedding.state_dict())
        _start_text_blocks(student, recipe, origins, backbone)
    lender = shared_lender(recipe, names, origins)
    if lender is not None:
        network, first = lender
        lent = transformer(network).stack.take(first, wanted.shared_blocks)
        if student.shared_mome is not None:
            _start_experts(student.shared_mome, lent)
        else:
            student.shared_blocks = lent


def _start_text_blocks(student: Student, recipe: Recipe, origins: Origins, backbone: Backbone) -> None:
    if student.text_blocks is None or origins.text_shape is None:
        return
    picked = picked_text_blocks(recipe.student, origins.text_shape)
    anew = recipe.student.text_start == "random"
    if anew or origins.attention is not None:
        start_anew(student.text_blocks)
    if origins.attention is not None:
        attention = transformer(origins.attention).stack.blocks
        for own, index in zip(student.text_blocks.blocks, picked.indices, strict=True):
            _copy(attention[index], own, ATTENTION)
            if not anew:
                _start_feed_forward(own, backbone.stack.blocks[index])
    elif not anew:
        student.text_blocks = backbone.stack.take(picked.first, picked.count, picked.step)


def _start_feed_forward(own: nn.Module, theirs: nn.Module) -> None:
    """The two matrices of a text block's feed-forward network, and the norm of what goes into them.

    In a post-norm block that is the attention's norm. Where both are post-norm, the norm behind is taken; behind an
    attention of another kind it would be of no use.
    """
    assert isinstance(own, Block)
    assert isinstance(theirs, Block)
    _copy(theirs, own, ("fc1", "fc2"))
    order = (own.spec.norm_order, theirs.spec.norm_order)
    if order != ("post", "pre"):
        source = theirs.norm1 if order == ("pre", "post") else theirs.norm2
        own.norm2.load_state_dict(source.state_dict())


def _start_experts(mome: MultiwayStack, lent: BlockStack) -> None:
    """Each expert, and each attention, starts as that half of the block."""
    for multiway, block in zip(mome.blocks, lent.blocks, strict=True):
        assert isinstance(multiway, MultiwayBlock)
        for half in (*multiway.attentions.values(), *multiway.feed_forwards.values()):
            _copy(block, half, tuple(half.state_dict()))


def _copy(source: nn.Module, target: nn.Module, names: tuple[str, ...]) -> None:
    """Parameters of these names, or of modules of these names, that both have."""
    ours, theirs = target.state_dict(), source.state_dict()
    with torch.no_grad():
        for name, tensor in ours.items():
            if name in theirs and (name in names or name.split(".")[0] in names):
                tensor.copy_(theirs[name])


def freeze(student: Student, recipe: Recipe) -> None:
    """Take the gradient from what the recipe keeps as it is."""
    wanted = recipe.student
    student.requires_grad_(True)
    if student.text_embedding is not None and not wanted.train_embeddings:
        student.text_embedding.requires_grad_(False)
    for stack, how, count in (
        (student.image_blocks, wanted.frozen_image, wanted.frozen_image_blocks),
        (student.text_blocks, wanted.frozen_text, wanted.frozen_text_blocks),
    ):
        if stack is None:
            continue
        if how == "all":
            stack.requires_grad_(False)
            continue
        count = stack.depth - 1 if how == "all-but-last" else count
        stack.blocks[:count].requires_grad_(False)
        if stack.spec.relative_bias == "per_block":
            stack.biases[:count].requires_grad_(False)
        if how == "attention":
            for name, parameter in stack.blocks.named_parameters():  # 0.qkv.weight
                if name.split(".")[1] in ATTENTION:
                    parameter.requires_grad_(False)


def pretrained_parts(recipe: Recipe) -> tuple[str, ...]:
    """The parts that start from a pretrained network and take the encoders' rate: no new blocks among them."""
    wanted = recipe.student
    new = {"image blocks": wanted.image_start == "random", "text blocks": wanted.text_start == "random"}
    new["network"] = wanted.pixels_start_anew or not wanted.pixels
    return tuple(part for part in PRETRAINED_PARTS if not new.get(part))


def numbers_in_front(network: Network, cut: int) -> int:
    """Parameters of the frozen network up to the cut: its embedding and `cut` blocks.

    A table of positions that is a fixed sine is none, as the published counts have it.
    """
    backbone = transformer(network)
    embedding, blocks = backbone.embedding, backbone.stack.blocks[:cut]
    count = sum(p.numel() for module in (embedding, blocks) for p in module.parameters())
    fixed = network.family.startswith(FIXED_POSITIONS)
    if fixed and isinstance(embedding, ImageEmbedding) and embedding.positions is not None:
        count -= embedding.positions.numel()
    return count
