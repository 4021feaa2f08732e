"""Tiny students and what they read, for tests of their parts."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_cache import NUM_TOKENS, VOCABULARY, WIDTH, tiny_network
from torch import Tensor

from emkum.errors import EmkumError
from emkum.models.network import Network
from emkum.stage2_train.recipe import load_recipe
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.student import Student, StudentSpec, build_student

CLS = "teacher/tinyvit/image/cls"
LENGTHS = (7, 3, 5)


def names(cut: int = 0) -> FieldNames:
    return FieldNames(f"image/tinyvit@{cut}/tokens", "tinyvit", cut, "text/tinybert/ids", {"cls": CLS})


def networks(**text: object) -> tuple[Network, Network]:
    return tiny_network("tinyvit", "image"), tiny_network("tinybert", "text", seed=1, **{"width": WIDTH, **text})  # type: ignore[arg-type]


def build(*overrides: str, recipe: str = "ssmke", cut: int = 0, target: int | None = 9, **text: object) -> Student:
    loaded = load_recipe(recipe, overrides)
    image, words = networks(**text)
    return build_student(
        loaded,
        names(cut),
        None if loaded.kind == "texts" else image,
        None if loaded.kind == "images" else words,
        target if loaded.kind == "pairs" else None,
        0,
    )


def tokens(batch: int = 3) -> Tensor:
    return torch.randn(batch, NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))


def texts() -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(4))
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    return torch.where(mask, ids, 0), mask


def message(error: pytest.ExceptionInfo[EmkumError]) -> str:
    return error.value.line()


def rebuilt(student: Student) -> Student:
    other = Student(StudentSpec.from_json(json.loads(json.dumps(student.spec.to_json(), sort_keys=True))))
    other.load_state_dict(student.state_dict(), strict=True)
    return other


def trained(student: Student) -> set[str]:
    return {name for name, parameter in student.named_parameters() if parameter.requires_grad}


def gradients_agree(student: Student) -> None:
    """Every trained parameter has a gradient, and no other."""
    out = student.encode_images(tokens()).features_BD.square().sum()
    (out + student.encode_texts(*texts()).features_BD.square().sum()).backward()
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
