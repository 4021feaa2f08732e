"""Weights from the student of an earlier run: the parts that are alike are taken, all others are named."""

from __future__ import annotations

from typing import Any

from emkum.errors import NothingFits
from emkum.models.backbone import StackSpec
from emkum.models.multiway import MultiwayStackSpec
from emkum.stage2_train.origins import EarlierRun, Origins
from emkum.stage2_train.recipe import Recipe
from emkum.stage2_train.student_network import PARTS, Student, name_in_part

IMAGE_PARTS = ("image blocks",)
TEXT_PARTS = ("text embedding", "text blocks")


def take_from_runs(student: Student, recipe: Recipe, origins: Origins) -> list[str]:
    """Copies what fits of the runs that the recipe names into the student, and says so, in a line a run.

    Raises NothingFits where nothing of a run does.
    """
    wanted = recipe.student
    asked: dict[str, tuple[EarlierRun, list[str]]] = {}
    for source, parts in (
        (origins.image_from, IMAGE_PARTS if wanted.image_start != "random" else ()),
        (origins.text_from, ("text embedding",) if wanted.text_start == "random" else TEXT_PARTS),
        (origins.rest, tuple(part for part in PARTS if part not in IMAGE_PARTS + TEXT_PARTS)),
    ):
        if isinstance(source, EarlierRun):
            asked.setdefault(str(source.dir), (source, []))[1].extend(parts)
    return [_take(student, run, parts) for run, parts in asked.values()]


def _take(student: Student, run: EarlierRun, parts: list[str]) -> str:
    ours, theirs = student.state_dict(), run.student.state_dict()
    taken, left = {}, []
    for part in parts:
        own = {name: tensor for name, tensor in ours.items() if name_in_part(name, part)}
        found = {name: tensor for name, tensor in theirs.items() if name_in_part(name, part)}
        if not own and not found:
            continue
        why = _why_not(part, student, run.student, own, found)
        if why:
            left.append(f"{part} ({why})")
        else:
            taken[part] = found
    rest = f"; not taken: {', '.join(left)}" if left else ""
    if not taken:
        raise NothingFits(
            f"nothing of the student of {run.dir} fits into this one{rest}",
            "name a run of the same networks and shapes, or leave student.init out",
        )
    student.load_state_dict({name: tensor for found in taken.values() for name, tensor in found.items()}, strict=False)
    return f"weights of {run.dir} (sha256 {run.sha256[:12]}): {', '.join(taken)}{rest}"


def _why_not(part: str, student: Student, other: Student, own: dict[str, Any], found: dict[str, Any]) -> str:
    """Why the part of the other student cannot take the place of this one's; "" if it can."""
    if not own:
        return "this student has none"
    if not found:
        return "the run has none"
    ours, theirs = _kind(part, student), _kind(part, other)
    for key, value in ours.items():
        if theirs.get(key) != value:
            return "blocks of another kind" if key == "kind" else f"{key} {theirs.get(key)} there, {value} here"
    for name, tensor in own.items():
        if name not in found or found[name].shape != tensor.shape:
            there = list(found[name].shape) if name in found else "nothing"
            return f"{name} {there} there, {list(tensor.shape)} here"
    return ""


def _kind(part: str, student: Student) -> dict[str, Any]:
    """What must be equal of a part beside its shapes, which do not say what is computed with them."""
    spec = student.spec
    image_stack = spec.image.stack if spec.image is not None else None
    text_stack = spec.text.stack if spec.text is not None else None
    if part == "text embedding" and spec.text is not None:
        return {"tokenizer": spec.text.encoder}
    found: dict[str, Any] = {}
    if part == "image blocks" and spec.image is not None:
        found = {"encoder": spec.image.encoder, "cut": spec.image.cut}
    stacks: dict[str, StackSpec | MultiwayStackSpec | None] = {
        "image blocks": image_stack,
        "text blocks": text_stack,
        "shared blocks": spec.shared,
        "shared MoME": spec.shared_mome,
    }
    stack = stacks.get(part)
    return found if stack is None else {**found, "depth": stack.depth, "kind": {**vars(stack), "depth": 0}}
