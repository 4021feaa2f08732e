"""What is not trained costs no activations: nothing of it waits for the backward pass."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny_cache import NUM_TOKENS, POSITIONS, SIZE, VOCABULARY, WIDTH, tiny_network

from emkum.models.backbone import TextEmbedding
from emkum.models.blocks import Block
from emkum.stage2_train.loader import Batch
from emkum.stage2_train.losses import step_losses
from emkum.stage2_train.plan import frozen_prefix
from emkum.stage2_train.recipe import Recipe, load_recipe
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.student import Student, build_student
from emkum.stage2_train.terms.build import Setting, make_terms

NAMES = FieldNames("image/tinyvit@0/tokens", "tinyvit", 0, "text/tinybert/ids", {"cls": "teacher/tinyvit/image/cls"})


def built(recipe: Recipe) -> Student:
    image = tiny_network("tinyvit", "image") if recipe.kind != "texts" else None
    text = tiny_network("tinybert", "text", seed=1) if recipe.kind != "images" else None
    return build_student(recipe, NAMES, image, text, WIDTH if recipe.kind == "pairs" else None, seed=0)


def a_batch(recipe: Recipe) -> Batch:
    pictures, texts = recipe.kind != "texts", recipe.kind != "images"
    rows = torch.arange(6)
    role, shape = {
        "pairs": ("cls", (6, WIDTH)),
        "images": ("layers", (6, NUM_TOKENS, WIDTH)),
        "texts": ("text_layers", (6, POSITIONS, 12)),
    }[recipe.kind]
    return Batch(
        rows if pictures else None,
        torch.zeros(6, dtype=torch.int64) if pictures else None,
        torch.randn(6, NUM_TOKENS, WIDTH) if pictures else None,
        torch.randint(1, VOCABULARY, (6, POSITIONS)) if texts else None,
        torch.arange(POSITIONS) < torch.randint(2, POSITIONS, (6, 1)) if texts else None,
        {role: torch.randn(shape)},
    )


def saved_by(recipe: Recipe) -> Counter[str]:
    """Tensors that the backward pass of a step waits for, by the module they were saved in: `image_blocks 0`."""
    student, inside, saved = built(recipe), [""], Counter[str]()

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        saved[inside[-1]] += 1
        return tensor

    for name, module in student.named_modules():
        if isinstance(module, (Block, TextEmbedding)):
            module.register_forward_pre_hook(lambda *_, name=name: inside.append(name.replace(".blocks.", " ")))
            module.register_forward_hook(lambda *_: inside.pop() and None)
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        step_losses(student, make_terms(Setting(recipe, student)), recipe, a_batch(recipe)).total.backward()
    return saved


@pytest.mark.parametrize(
    ("name", "overrides", "frozen"),
    [
        ("cls-mse", [], ["text_embedding"]),
        ("text-kd", [], ["text_embedding"]),
        ("cls-mse", ["student.frozen_text_blocks=2"], ["text_embedding", "text_blocks 0", "text_blocks 1"]),
        ("image-kd", ["student.image_blocks=3", "student.frozen_image_blocks=2"], ["image_blocks 0", "image_blocks 1"]),
    ],
)
def test_frozen_parts_in_front_keep_nothing_for_the_backward_pass(
    name: str, overrides: list[str], frozen: list[str]
) -> None:
    saved = saved_by(load_recipe(name, overrides))
    assert not [part for part in frozen if saved[part]], saved
    following = [part for part in saved if "_blocks " in part]
    assert following
    assert all(saved[part] > 5 for part in following)


def test_frozen_blocks_behind_trained_embeddings_keep_what_the_embeddings_need() -> None:
    """Their gradient passes through the blocks."""
    saved = saved_by(load_recipe("cls-mse", ["student.train_embeddings=true", "student.frozen_text_blocks=2"]))
    assert saved["text_embedding"]
    assert saved["text_blocks 0"]


def test_the_frozen_network_in_front_of_crops_keeps_nothing() -> None:
    prefix = frozen_prefix(tiny_network("tinyvit", "image"), 2, "float32", torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: pytest.fail("saved"), lambda tensor: tensor):
        tokens_BTD = prefix(torch.randint(0, 256, (3, SIZE, SIZE, 3), dtype=torch.uint8))
    assert not tokens_BTD.requires_grad
    assert not tokens_BTD.is_inference()
