"""Whether the fields of a cache fit each other, the student and its head: what is refused before training begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emkum.errors import UsageError
from emkum.stage2_train.loader import CachedSource, other_layers_rule
from emkum.stage2_train.losses import students_rule
from emkum.stage2_train.recipe import Recipe, compared_role
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.student import Student

if TYPE_CHECKING:
    from emkum.models.network import Network
    from emkum.shards.reader import Cache


def check_tokenizer(cache: Cache, names: FieldNames) -> None:
    """Raise UsageError where the teacher read other tokens than the student's ids."""
    for role in ("text_layers", "pair_layers"):
        if role not in names.targets or names.ids is None:
            continue
        target = cache.field(names.targets[role])
        ids, taught = cache.field(names.ids).fingerprint, target.fingerprint
        for key in ("tokenizer", "max_tokens"):
            if ids.get(key) != taught.get(key):
                raise UsageError(
                    f"{names.ids} has {key} {ids.get(key)}, {target.name} has {taught.get(key)}: layers are compared "
                    "token by token",
                    "choose fields of one tokenizer with --set data.ids=... and data.targets=..., or extract both at "
                    "once with the same --max-tokens",
                )


def target_width_of(cache: Cache, recipe: Recipe, names: FieldNames) -> int | None:
    """Numbers that the student's head compares with the target, channels or classes; None without such a target.

    Raises UsageError where a field of the largest logits does not say of how many classes they are.
    """
    role = compared_role(recipe)
    if role is None:
        return None
    field, asked = cache.field(names.targets[role]), recipe.student.head_width
    if field.kind != "top_logits":
        return field.row_shape[-1]
    classes = field.record.get("environment", {}).get("classes")
    if asked == "auto" and not classes:
        raise UsageError(
            f"{field.name} keeps the {field.row_shape[0] - 1} largest logits, and not how many classes there are",
            "say how many the teacher has: --set student.head_width=1000",
        )
    return int(classes or asked)


def check_classes(names: FieldNames, source: CachedSource, head_width: int | None) -> None:
    """Raise UsageError where one of the largest logits is of a class that the head does not have."""
    if head_width is None or not source.top_logits:
        return
    held = source.pooled["logits"]
    largest = int(held.values_NVD[..., held.width // 2 + 1 :].max())
    if largest >= head_width:
        raise UsageError(
            f"student.head_width = {head_width}: {names.targets['logits']} has class {largest}, the first being 0",
            "say how many classes the teacher has: --set student.head_width=1000",
        )


def check_target_shapes(
    cache: Cache, names: FieldNames, image_network: Network | None, text_network: Network | None
) -> None:
    """Layers are compared token by token: raise UsageError where teacher and student differ in tokens or width."""
    for role in _LAYERS:
        if role not in names.targets or names.crop_size:  # of a student of pixels: check_layers
            continue
        target = cache.field(names.targets[role])
        teacher = tuple(target.row_shape)
        network = image_network if role == "layers" else text_network
        assert network is not None
        # Texts that go through shared blocks have the width of pictures.
        width = image_network.width if role == "pair_layers" and image_network is not None else network.width
        student: tuple[int, ...] = (teacher[0], width)
        if role == "layers" and names.inputs is not None and not names.live_prefix:
            student = cache.field(names.inputs).row_shape
            rule = other_layers_rule(target)
            if rule is not None and rule.prefix == "drop":
                student = (student[0] - network.num_prefix, *student[1:])
        if teacher != tuple(student):
            raise UsageError(
                f"{target.name} has {teacher[0]} tokens of {teacher[1]} channels, the student {student[0]} of "
                f"{student[1]}: layers-mse compares them one by one",
                "choose a teacher with the encoder's patch size and width, or the encoder itself",
            )


_LAYERS = ("layers", "text_layers", "pair_layers")


def check_rule(cache: Cache, recipe: Recipe, names: FieldNames, student: Student) -> None:
    """Raise UsageError where the rule of the targets counts none of the student's blocks."""
    if recipe.objectives.layers_mse is None:
        return
    (role, name), depth = next(iter(names.targets.items())), student.depth
    rule = students_rule(student, role, other_layers_rule(cache.field(name)))
    if not rule.counted(depth):
        raise UsageError(
            f"{name} is the {rule.words}: the student has {depth} blocks, and none is counted",
            "train more of them, or choose other targets: --set data.targets=...",
        )


def check_live(names: FieldNames) -> None:
    """Raise UsageError for targets that only the cache can give."""
    if "pair_layers" in names.targets:
        raise UsageError(
            f"--live with {names.targets['pair_layers']}: networks of pairs are run by extraction alone",
            "train from the cache, without --live",
        )
