"""The table `student` of a recipe: what the trained network is made of, where its weights start, what stays frozen."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from emkum.errors import UsageError
from emkum.stage2_train.objective_recipes import ranged

if TYPE_CHECKING:
    from emkum.stage2_train.recipe import Recipe

Blocks = int | Literal["half", "all"]
Start = Literal["first", "every-second", "random"]
Frozen = Literal["none", "all", "all-but-last", "attention"]
Where = Literal["after", "before", "none"]
SHARED_MLPS = ("mlp", "attention-mlp")
POOLED_TERMS = (  # those that read a pooled feature; the first in use has the head that evaluation compares
    "itc",
    "itc_queue",
    "ranking",
    "ctl",
    "cls_mse",
    "logits_kl",
    "itm",
    "reduced",
    "codes",
    "codes_vq",
    "dino",
)


@dataclass(frozen=True)
class StudentRecipe:
    """The trained network: blocks of the frozen networks, shared blocks, heads.

    `image_blocks`: how many of the encoder's blocks follow the cut. "half" takes those that are left of its first
    half (0 when the cut lies behind it), "all" those to its end. `text_blocks`: the first so many of the text encoder.
    `image_start`, `text_start`: consecutive blocks, every second of them, or as many new ones of their shape.

    `init`: "encoder", the networks named above; "teacher", the recipe's teacher for its modality; or a folder, of an
    earlier run or of a network. `init_image`, `init_text`: the same for one modality; "auto" is `init`.

    `pixels`: a network of the cache or of the catalogue, or a folder; "random:NAME": its shape with new weights.
    """

    pixels: str = ""  # a whole network that reads pictures, in place of blocks: pixels.py
    image_blocks: Blocks = "half"
    text_blocks: Blocks = "all"
    image_start: Start = "first"
    text_start: Start = "first"
    init: str = "encoder"
    init_image: str = "auto"
    init_text: str = "auto"
    text_attention: str = "auto"  # "own"; "image", or a network's name: that network's; "auto": see `attention_of`
    frozen_image: Frozen = "none"
    frozen_text: Frozen = "none"
    frozen_image_blocks: int = ranged(0, 0)  # of the student's image blocks, the first so many stay as they are
    frozen_text_blocks: int = ranged(0, 0)
    train_embeddings: bool = False  # the text encoder's token embedding, positions and their norm
    projection: bool = False  # a norm and a linear layer behind each modality's blocks, in front of the shared part
    shared: Literal["blocks", "mome", "mlp", "attention-mlp"] = "blocks"  # Transformer blocks, ..., or shared_mlp.py
    shared_blocks: int = ranged(1, 0)
    shared_start: Literal["random", "text", "image"] = "random"  # or the encoder's blocks behind those taken
    shared_heads: int | Literal["auto"] = ranged("auto", 1)  # "auto": heads of 64 channels
    shared_mlp_ratio: float = ranged(4.0, 0.25, 16.0)
    mome_attention: Literal["shared", "own"] = "shared"  # one for both modalities (VLMo), or each its own (BEiT-3)
    mome_fused: int = ranged(0, 0)  # the last so many shared blocks have one feed-forward network
    positions: Literal["own", "shared"] = "own"  # "shared": one more table, in front of the shared part
    token_types: bool | Where = True  # of the modalities' blocks; true: after, false: none
    token_type_scale: float = ranged(1e-5, 0.0, 1.0)  # LayerScale's start; 0: no LayerScale
    image_pooling: Literal["cls", "mean"] = "cls"
    text_pooling: Literal["cls", "mean"] = "cls"
    heads: Literal["one", "separate"] = "one"  # "separate": one for each objective that reads a pooled feature
    head_width: int | Literal["auto"] = ranged("auto", 1)  # "auto": the target's width, else the student's

    @property
    def pixels_start_anew(self) -> bool:
        """Whether a student of pixels begins with new weights."""
        return self.pixels.startswith("random:")

    @property
    def types_where(self) -> Where:
        """Where token types are added, true and false translated."""
        if isinstance(self.token_types, bool):
            return "after" if self.token_types else "none"
        return self.token_types

    @property
    def origin_of_images(self) -> str:
        """Where the image blocks start from."""
        return self.init if self.init_image == "auto" else self.init_image

    @property
    def origin_of_texts(self) -> str:
        """Where text embedding and blocks start from."""
        return self.init if self.init_text == "auto" else self.init_text

    @property
    def attention_of(self) -> str:
        """Whose attention the text blocks have: "own", "image", or a network's name.

        "auto" is the image network's where the attention alone is frozen (VLMo, arXiv:2111.02358), else their own.
        """
        if self.text_attention == "auto":
            return "image" if self.frozen_text == "attention" else "own"
        return self.text_attention


IMAGE_KEYS = (
    "pixels",
    "image_blocks",
    "image_start",
    "init_image",
    "frozen_image",
    "frozen_image_blocks",
    "image_pooling",
)
TEXT_KEYS = (
    "text_blocks",
    "text_start",
    "init_text",
    "text_attention",
    "frozen_text",
    "frozen_text_blocks",
    "train_embeddings",
    "text_pooling",
)
PAIR_KEYS = ("projection", "positions", "mome_attention", "mome_fused")


def check_student(recipe: Recipe, where: str) -> None:
    """Raise UsageError for keys that contradict each other, or that nothing would read."""
    wanted = recipe.student
    _check_shared(recipe, where)
    if recipe.kind != "pairs":
        for key in PAIR_KEYS:
            _refuse(wanted, key, where, "is for pairs", f"leave student.{key} out")
    for modality, blocks in (("image", wanted.frozen_image_blocks), ("text", wanted.frozen_text_blocks)):
        frozen = getattr(wanted, f"frozen_{modality}")
        if frozen in ("all", "all-but-last") and blocks:
            raise UsageError(
                f"{where}: student.frozen_{modality}_blocks = {blocks} beside student.frozen_{modality} = {frozen!r}: "
                "one of them says how many blocks are frozen",
                f"leave student.frozen_{modality}_blocks out",
            )
        if getattr(wanted, f"{modality}_start") == "random":
            why = f"has no effect: student.{modality}_start = 'random'"
            _refuse(wanted, f"init_{modality}", where, why, f"leave student.init_{modality} out")
    if wanted.frozen_text == "all" and wanted.train_embeddings:
        raise UsageError(
            f"{where}: student.train_embeddings = true beside student.frozen_text = 'all'",
            "leave student.train_embeddings out, or freeze the blocks alone with student.frozen_text_blocks",
        )
    if wanted.types_where == "none" and wanted.token_type_scale != StudentRecipe.token_type_scale:
        raise UsageError(
            f"{where}: student.token_type_scale = {wanted.token_type_scale:g} has no effect without token types",
            "leave it out, or --set student.token_types=after",
        )
    if wanted.heads == "separate" and not pooled_terms(recipe):
        raise UsageError(
            f"{where}: student.heads = 'separate': no objective reads a pooled feature", "leave student.heads out"
        )


def _check_shared(recipe: Recipe, where: str) -> None:
    wanted = recipe.student
    if wanted.shared != "blocks" and recipe.kind != "pairs":
        raise UsageError(f"{where}: student.shared = {wanted.shared!r} is for pairs", "leave student.shared out")
    if wanted.shared in SHARED_MLPS:
        why = f"has no effect: student.shared = {wanted.shared!r} takes the place of the blocks"
        for key in ("shared_blocks", "shared_start"):
            _refuse(wanted, key, where, why, f"leave student.{key} out, or --set student.shared=blocks")
    if wanted.shared != "mome":
        for key in ("mome_attention", "mome_fused"):
            why = f"has no effect: student.shared = {wanted.shared!r}"
            _refuse(wanted, key, where, why, f"leave student.{key} out, or --set student.shared=mome")
    if wanted.shared == "mome" and not wanted.shared_blocks:
        raise UsageError(
            f"{where}: student.shared = 'mome' with student.shared_blocks = 0", "--set student.shared_blocks=1 or more"
        )
    if wanted.mome_fused > wanted.shared_blocks:
        raise UsageError(
            f"{where}: student.mome_fused = {wanted.mome_fused} of student.shared_blocks = {wanted.shared_blocks}",
            f"use at most {wanted.shared_blocks}",
        )
    if wanted.shared_start != "random" and not wanted.shared_blocks:
        raise UsageError(
            f"{where}: student.shared_start = {wanted.shared_start!r} has no effect: student.shared_blocks = 0",
            "leave student.shared_start out, or --set student.shared_blocks=1",
        )
    if wanted.shared_start != "random":
        why = f"has no effect: student.shared_start = {wanted.shared_start!r} says what the shared blocks are like"
        for key in ("shared_heads", "shared_mlp_ratio"):
            _refuse(wanted, key, where, why, f"leave student.{key} out")
    if wanted.shared_start in ("image", "text") and recipe.kind == {"image": "texts", "text": "images"}.get(
        wanted.shared_start
    ):
        raise UsageError(
            f"{where}: student.shared_start = {wanted.shared_start!r}: a sample of kind {recipe.kind} has no such part",
            "leave student.shared_start out",
        )
    if wanted.heads == "separate" and wanted.shared in SHARED_MLPS:
        raise UsageError(
            f"{where}: student.heads = 'separate' beside student.shared = {wanted.shared!r}, whose last layer is the "
            "one head",
            "leave student.heads out, or --set student.shared=blocks",
        )
    for term in ("itc", "ranking"):
        found = getattr(recipe.objectives, term)
        if found is not None and found.layers == "all" and wanted.shared not in SHARED_MLPS:
            raise UsageError(
                f"{where}: objectives.{term}.layers = 'all' has no effect: student.shared = {wanted.shared!r} has one "
                "output",
                f'--set objectives.{term}.layers=last, or student.shared="mlp" or "attention-mlp"',
            )


def _refuse(wanted: StudentRecipe, key: str, where: str, why: str, way_out: str) -> None:
    """Raise UsageError where the key differs from its default."""
    value: Any = getattr(wanted, key)
    if value != next(f.default for f in dataclasses.fields(wanted) if f.name == key):
        said = str(value).lower() if isinstance(value, bool) else repr(value)
        raise UsageError(f"{where}: student.{key} = {said} {why}", way_out)


def pooled_terms(recipe: Recipe) -> tuple[str, ...]:
    """The recipe's objectives that read a pooled feature: first the one whose head evaluation compares."""
    return tuple(term for term in POOLED_TERMS if term in recipe.terms)
