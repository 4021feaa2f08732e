"""The table `student` of a recipe: what is said of keys that contradict each other, and its JSON."""

from __future__ import annotations

import tomllib

import pytest
from small_students import build, message

from emkum.errors import UsageError
from emkum.stage2_train.recipe import Recipe, load_recipe, recipe_from_table
from emkum.stage2_train.student import StudentSpec

# --- the recipe's table -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        ("image-kd", ["student.projection=true"], "student.projection = true is for pairs | leave student.projection"),
        ("text-kd", ["student.positions=shared"], "student.positions = 'shared' is for pairs"),
        ("image-kd", ["student.shared=mome"], "student.shared = 'mome' is for pairs"),
        ("ssmke", ["student.mome_fused=1"],
         "student.mome_fused = 1 has no effect: student.shared = 'blocks' | leave student.mome_fused out, or --set "
         "student.shared=mome"),
        ("ssmke", ["student.shared=mome", "student.mome_fused=2"],
         "student.mome_fused = 2 of student.shared_blocks = 1 | use at most 1"),
        ("ssmke", ["student.shared=mome", "student.shared_blocks=0"],
         "student.shared = 'mome' with student.shared_blocks = 0 | --set student.shared_blocks=1 or more"),
        ("shre", ["student.shared_start=text"],
         "student.shared_start = 'text' has no effect: student.shared = 'mlp' takes the place of the blocks"),
        ("ssmke", ["student.shared_start=text", "student.shared_blocks=0"],
         "student.shared_start = 'text' has no effect: student.shared_blocks = 0"),
        ("ssmke", ["student.shared_start=text", "student.shared_heads=2"],
         "student.shared_heads = 2 has no effect: student.shared_start = 'text' says what the shared blocks are like"),
        ("image-kd", ["student.shared_start=text", "student.shared_blocks=1"],
         "student.shared_start = 'text': a sample of kind images has no such part"),
        ("shre", ["student.heads=separate"],
         "student.heads = 'separate' beside student.shared = 'mlp', whose last layer is the one head"),
        ("image-kd", ["student.heads=separate"], "student.heads = 'separate': no objective reads a pooled feature"),
        ("ssmke", ["student.frozen_image=all", "student.frozen_image_blocks=1"],
         "student.frozen_image_blocks = 1 beside student.frozen_image = 'all': one of them says how many blocks are"),
        ("ssmke", ["student.frozen_text=all", "student.train_embeddings=true"],
         "student.train_embeddings = true beside student.frozen_text = 'all'"),
        ("ssmke", ["student.token_types=none", "student.token_type_scale=0"],
         "student.token_type_scale = 0 has no effect without token types | leave it out, or --set "
         "student.token_types=after"),
        ("ssmke", ["student.token_types=behind"], "is not true or false or 'after' or 'before' or 'none'"),
        ("ssmke", ["student.image_start=random", "student.init_image=teacher"],
         "student.init_image = 'teacher' has no effect: student.image_start = 'random'"),
        ("text-kd", ["student.image_start=random"], "student.image_start = 'random' has no effect: a sample of kind"),
        ("image-kd", ["student.frozen_text=all"], "student.frozen_text = 'all' has no effect: a sample of kind images"),
        ("ssmke", ["student.shared=mome", "objectives.itc.layers=all"],
         "objectives.itc.layers = 'all' has no effect: student.shared = 'mome' has one output"),
    ],
)  # fmt: skip
def test_what_is_said_of_keys_that_contradict_each_other(recipe: str, overrides: list[str], expected: str) -> None:
    with pytest.raises(UsageError) as error:
        load_recipe(recipe, overrides)
    assert expected in message(error)
    assert error.value.way_out


def test_the_json_of_an_older_student_is_as_it_was_and_unknown_keys_are_refused() -> None:
    found = build().spec.to_json()
    assert set(found) == {"format", "image", "text", "width", "shared", "token_types", "head_width", "shared_mlp"}
    without = {key: value for key, value in found.items() if key != "shared_mlp"}  # emkum 0.2
    assert StudentSpec.from_json(without) == build().spec
    with pytest.raises(ValueError, match="unknown keys depths"):
        StudentSpec.from_json({**found, "depths": 3})


def test_all_new_keys_together_come_back_from_toml() -> None:
    overrides = ["student.shared=mome", "student.token_types=before", "student.init=runs/a", "student.heads=separate"]
    recipe: Recipe = load_recipe("ssmke", overrides)
    assert recipe_from_table(tomllib.loads(recipe.to_toml())) == recipe
