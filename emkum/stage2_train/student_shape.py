"""The shape of the student that a recipe asks for, on the networks at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emkum.errors import UsageError
from emkum.models.backbone import BlockStack, StackSpec
from emkum.models.multiway import MultiwayStackSpec
from emkum.models.network import Network
from emkum.stage2_train.origins import Origins, transformer
from emkum.stage2_train.recipe import COMPARED, Recipe, compared_role
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.shared_mlp import SharedMlpSpec
from emkum.stage2_train.student_recipe import SHARED_MLPS, Blocks, StudentRecipe, pooled_terms
from emkum.stage2_train.student_spec import HeadSpec, ImageSide, StudentSpec, TextSide


@dataclass(frozen=True)
class Picked:
    """Blocks of a network: first, first + step, ..., `count` of them."""

    first: int
    count: int
    step: int

    @property
    def indices(self) -> range:
        return range(self.first, self.first + self.count * self.step, self.step)

    @property
    def next(self) -> int:
        """The first block behind them all."""
        return self.indices[-1] + 1 if self.count else self.first


def picked_image_blocks(wanted: StudentRecipe, network: Network, cut: int) -> Picked:
    """Which blocks of the network the image blocks are, or are like. Raises UsageError for more than there are."""
    return _picked("image", wanted.image_blocks, wanted.image_start, network, cut)


def picked_text_blocks(wanted: StudentRecipe, network: Network) -> Picked:
    """As `picked_image_blocks`."""
    return _picked("text", wanted.text_blocks, wanted.text_start, network, 0)


def _picked(modality: str, wanted: Blocks, start: str, network: Network, cut: int) -> Picked:
    depth, step = network.depth, 2 if start == "every-second" else 1
    left = -(-max(0, depth - cut) // step)
    if wanted == "all":
        return Picked(cut, left, step)
    if wanted == "half":
        return Picked(cut, max(0, depth // 2 - cut), step)
    if wanted > left:
        every = ", every second of which is taken" if step == 2 else ""
        raise UsageError(
            f"student.{modality}_blocks = {wanted}: {network.name} has {depth} blocks, {max(0, depth - cut)} of them "
            f"after cut {cut}{every}",
            f'use at most {left}: --set student.{modality}_blocks={left}, or "all"',
        )
    return Picked(cut, wanted, step)


def student_spec(
    recipe: Recipe,
    names: FieldNames,
    origins: Origins,
    target_width: int | None,
    heads: Mapping[str, int] | None = None,
) -> StudentSpec:
    """The spec of the recipe's student on these networks; arguments and errors as of `build_student`."""
    wanted, image, text = recipe.student, None, None
    if origins.image is not None and origins.image_shape is not None:
        picked = picked_image_blocks(wanted, origins.image_shape, names.cut)
        stack = transformer(origins.image_shape).stack.spec
        stack_or_none = dataclasses.replace(stack, depth=picked.count) if picked.count else None
        num_prefix, name = origins.image.num_prefix, origins.image.name
        transformer(origins.image)
        image = ImageSide(name, names.cut, num_prefix, stack_or_none, wanted.image_pooling)
    if origins.text is not None and origins.text_shape is not None:
        picked = picked_text_blocks(wanted, origins.text_shape)
        backbone = transformer(origins.text_shape)
        stack = backbone.stack.spec
        if origins.attention is not None:
            stack = _with_attention_of(origins.attention, origins.text_shape, picked)
        stack_or_none = dataclasses.replace(stack, depth=picked.count) if picked.count else None
        text = TextSide(origins.text.name, backbone.spec, stack_or_none, wanted.text_pooling)
    width = origins.image.width if origins.image is not None else text.width if text else 0
    shared = _shared_spec(recipe, names, origins, width) if wanted.shared not in SHARED_MLPS else None
    shared_mlp = _shared_mlp_spec(recipe, width) if wanted.shared in SHARED_MLPS else None
    if not (shared or shared_mlp or (image and image.stack) or (text and text.stack)):
        raise _without_blocks(recipe, names)
    _check_frozen(recipe, image, text)
    if origins.text_shape is not None and not shared and not (shared_mlp and shared_mlp.heads):
        _check_pooled(origins.text_shape, wanted.text_pooling)
    separate = _separate_heads(recipe, width, target_width, heads)
    return StudentSpec(
        image,
        text,
        width,
        shared if isinstance(shared, StackSpec) else None,
        wanted.types_where != "none",
        separate[0].width if separate else head_width(recipe, names, width, target_width),
        shared_mlp,
        shared if isinstance(shared, MultiwayStackSpec) else None,
        separate,
        types_before=wanted.types_where == "before",
        token_type_scale=wanted.token_type_scale,
        shared_positions=_shared_positions(origins) if wanted.positions == "shared" else 0,
        projection=wanted.projection,
    )


def _without_blocks(recipe: Recipe, names: FieldNames) -> UsageError:
    asked = f"cut {names.cut}, image_blocks {recipe.student.image_blocks!r}"
    if recipe.kind != "images":
        asked = f"text_blocks {recipe.student.text_blocks!r}" + (f", {asked}" if recipe.kind == "pairs" else "")
    return UsageError(
        f"recipe {recipe.name}: a student without a block ({asked}, shared_blocks 0)",
        f"ask for some: --set student.{'text' if recipe.kind == 'texts' else 'image'}_blocks=all",
    )


def _with_attention_of(attention: Network, text: Network, picked: Picked) -> StackSpec:
    """Blocks like those of the image network, with a feed-forward network like the text network's.

    A relative position bias of pictures says nothing about words: the blocks get tables of their own.
    """
    theirs, own = transformer(attention), transformer(text)
    if picked.count and picked.indices[-1] >= attention.depth:
        raise UsageError(
            f"the text blocks are blocks {list(picked.indices)} of {text.name}, and the image network "
            f"{attention.name}, whose attention they take, has {attention.depth}",
            f"use at most {attention.depth}: --set student.text_blocks={attention.depth}",
        )
    of_text = own.spec.block
    block = dataclasses.replace(
        theirs.spec.block, mlp_width=of_text.mlp_width, activation=of_text.activation, gated=of_text.gated
    )
    stack = StackSpec(block, theirs.depth)
    if theirs.stack.spec.relative_bias == "none":
        return stack
    bias = theirs.stack.spec.relative_bias
    return dataclasses.replace(stack, relative_bias=bias, grid=(1, _longest_text(text) - 1), words=True)


def _shared_spec(
    recipe: Recipe, names: FieldNames, origins: Origins, width: int
) -> StackSpec | MultiwayStackSpec | None:
    wanted = recipe.student
    if not wanted.shared_blocks:
        return None
    lender = shared_lender(recipe, names, origins)
    if lender is not None:
        network, first = lender
        _check_lender(wanted, network, first, width)
        stack = transformer(network).stack.spec
    else:
        stack = BlockStack.random(width, _shared_heads(recipe, width), 1, wanted.shared_mlp_ratio).spec
    stack = dataclasses.replace(stack, depth=wanted.shared_blocks)
    if wanted.shared != "mome":
        return stack
    return MultiwayStackSpec(stack.block, stack.depth, wanted.mome_attention == "shared", wanted.mome_fused)


def shared_lender(recipe: Recipe, names: FieldNames, origins: Origins) -> tuple[Network, int] | None:
    """The network whose blocks the shared ones start as, and the first of them; None where they start anew."""
    wanted = recipe.student
    if wanted.shared_start == "text" and origins.text_shape is not None:
        return origins.text_shape, picked_text_blocks(wanted, origins.text_shape).next
    if wanted.shared_start == "image" and origins.image_shape is not None:
        return origins.image_shape, picked_image_blocks(wanted, origins.image_shape, names.cut).next
    return None


def _check_lender(wanted: StudentRecipe, network: Network, first: int, width: int) -> None:
    """Raise UsageError where blocks from `first` on cannot be the shared ones."""
    key = f'student.shared_start = "{wanted.shared_start}"'
    stack, left = transformer(network).stack.spec, max(0, network.depth - first)
    if wanted.shared_blocks > left:
        raise UsageError(
            f"{key}: {network.name} has {network.depth} blocks, {left} of them behind those taken, and "
            f"student.shared_blocks = {wanted.shared_blocks}",
            f"take fewer in front: --set student.{wanted.shared_start}_blocks=N",
        )
    if network.width != width:
        raise UsageError(
            f"{key}: {network.name} has {network.width} channels, the student {width}", "choose another start"
        )
    bound = [
        word
        for word, found in (
            ("a relative position bias", stack.relative_bias != "none"),
            ("rotary positions", stack.rotary_base),
            ("tokens that see only what stands before them", stack.block.causal),
            ("their norms behind (post-norm)", wanted.shared == "mome" and stack.block.norm_order != "pre"),
        )
        if found
    ]
    if bound:
        whom = "experts" if bound == ["their norms behind (post-norm)"] else "both modalities"
        raise UsageError(
            f"{key}: blocks of {network.name} have {' and '.join(bound)}, and cannot serve {whom}",
            "--set student.shared_start=random",
        )


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


def _shared_positions(origins: Origins) -> int:
    """Rows of the table: tokens of a picture of the size the encoder was trained at, or of the longest text."""
    assert origins.image is not None
    assert origins.text_shape is not None
    spec = transformer(origins.image).spec
    num_tokens = spec.num_prefix + (spec.image_size // spec.patch) ** 2
    return max(num_tokens, _longest_text(origins.text_shape))


def _longest_text(network: Network) -> int:
    """Tokens that there are positions for."""
    spec = transformer(network).spec
    return spec.max_positions - spec.position_offset


def _check_pooled(network: Network, pooling: str) -> None:
    """Raises UsageError where the first token, which is pooled, has seen no other."""
    if transformer(network).spec.causal and pooling == "cls":
        raise UsageError(
            f'student.text_pooling = "cls": a token of {network.name} sees only what stands before it, so its first '
            "token is the same for every text",
            "pool the mean: --set student.text_pooling=mean",
        )


def _check_frozen(recipe: Recipe, image: ImageSide | None, text: TextSide | None) -> None:
    wanted = recipe.student
    sides: tuple[tuple[str, int, ImageSide | TextSide | None], ...] = (
        ("image", wanted.frozen_image_blocks, image),
        ("text", wanted.frozen_text_blocks, text),
    )
    for modality, frozen, side in sides:
        there = side.stack.depth if side is not None and side.stack is not None else 0
        if side is not None and frozen > there:
            raise UsageError(
                f"student.frozen_{modality}_blocks = {frozen}: the student has {there} {modality} blocks",
                f"use at most {there}",
            )


def _separate_heads(
    recipe: Recipe, width: int, target_width: int | None, heads: Mapping[str, int] | None
) -> tuple[HeadSpec, ...]:
    """A head for each objective that reads a pooled feature, as wide as its target; others as `head_width` says."""
    wanted = recipe.student
    if wanted.heads != "separate":
        return ()
    if heads is None:
        own = width if wanted.head_width == "auto" else wanted.head_width
        heads = {term: (target_width or own) if term in COMPARED else own for term in pooled_terms(recipe)}
    return tuple(HeadSpec(term, channels) for term, channels in heads.items())


def head_width(recipe: Recipe, names: FieldNames, width: int, target_width: int | None) -> int | None:
    """Channels of the one head; None: no head."""
    asked: Any = recipe.student.head_width
    # Behind an attention the features come from in front of the head, and those of one modality too: without a target
    # nothing would read it.
    if not target_width and (recipe.kind != "pairs" or recipe.student.shared == "attention-mlp"):
        return None
    found = int((target_width or width) if asked == "auto" else asked)
    if target_width and found != target_width:
        raise UsageError(
            f"student.head_width = {found}: the target {names.targets.get(compared_role(recipe) or '')} has "
            f"{target_width} channels, and features are compared with it",
            f"leave student.head_width out, or set it to {target_width}",
        )
    return found
