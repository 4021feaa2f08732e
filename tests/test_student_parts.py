"""The parts of a student: which blocks it takes, what is frozen, heads, projections, token types, positions."""

from __future__ import annotations

import pytest
import torch
from small_students import build, gradients_agree, message, names, networks, rebuilt, texts, tokens, trained
from tiny_cache import NUM_TOKENS, POSITIONS, WIDTH

from emkum.errors import UsageError
from emkum.stage2_train.optimiser import parameter_groups
from emkum.stage2_train.recipe import load_recipe
from emkum.stage2_train.student import build_student, parameter_table, pretrained_parts

# --- which blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "cut", "expected"), [("half", 0, [0, 2]), ("all", 0, [0, 2]), ("1", 0, [0]), ("all", 1, [1, 3])]
)
def test_every_second_block_is_taken_from_the_cut_on(wanted: str, cut: int, expected: list[int]) -> None:
    student = build("student.image_start=every-second", f"student.image_blocks={wanted}", cut=cut)
    encoder = networks()[0].backbone
    assert student.image_blocks is not None
    assert student.image_blocks.depth == len(expected)
    for own, index in zip(student.image_blocks.blocks, expected, strict=True):
        assert torch.equal(own.qkv.weight, encoder.stack.blocks[index].qkv.weight)  # type: ignore[union-attr]


def test_every_second_text_block_is_taken() -> None:
    student = build("student.text_start=every-second", "student.text_blocks=2")
    theirs = networks()[1].backbone.stack.blocks  # type: ignore[union-attr]
    assert student.text_blocks is not None
    for own, index in zip(student.text_blocks.blocks, (0, 2), strict=True):
        assert torch.equal(own.fc1.weight, theirs[index].fc1.weight)


def test_random_blocks_have_the_shape_of_the_encoders_and_weights_of_the_seed() -> None:
    student, taken = build("student.image_start=random", "student.text_start=random"), build()
    for own, theirs in ((student.image_blocks, taken.image_blocks), (student.text_blocks, taken.text_blocks)):
        assert own is not None
        assert theirs is not None
        assert own.spec == theirs.spec
        assert not torch.equal(own.blocks[0].fc1.weight, theirs.blocks[0].fc1.weight)
        assert own.blocks[0].fc1.weight.std().item() == pytest.approx(0.02, rel=0.2)
    again = build("student.image_start=random", "student.text_start=random").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in student.state_dict().items())


def test_new_blocks_do_not_take_the_encoders_rate() -> None:
    assert pretrained_parts(load_recipe("ssmke")) == ("image blocks", "text embedding", "text blocks")
    recipe = load_recipe("ssmke", ["student.image_start=random", "student.text_start=random"])
    assert pretrained_parts(recipe) == ("text embedding",)


def test_the_optimiser_gives_new_blocks_the_rate_of_new_parts() -> None:
    recipe = load_recipe("ssmke", ["student.image_start=random", "optimiser.lr=3e-3", "optimiser.encoder_lr=1e-4"])
    student = build("student.image_start=random")
    rates = {
        id(parameter): group["lr"]
        for group in parameter_groups(student, torch.nn.Module(), recipe)  # type: ignore[arg-type]
        for parameter in group["params"]
    }
    assert student.image_blocks is not None
    assert student.text_blocks is not None
    assert rates[id(student.image_blocks.blocks[0].qkv.weight)] == pytest.approx(3e-3)
    assert rates[id(student.text_blocks.blocks[0].qkv.weight)] == pytest.approx(1e-4)


def test_more_than_every_second_block_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        build("student.image_start=every-second", "student.image_blocks=3")
    assert message(error) == (
        "UsageError: student.image_blocks = 3: tinyvit has 4 blocks, 4 of them after cut 0, every second of which is "
        'taken | use at most 2: --set student.image_blocks=2, or "all"'
    )


# --- what is frozen ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"), [("all", []), ("all-but-last", [1]), ("none", [0, 1]), ("attention", [0, 1])]
)
def test_blocks_are_frozen_as_the_recipe_says(how: str, expected: list[int]) -> None:
    student = build(f"student.frozen_image={how}")
    found = {int(name.split(".")[2]) for name in trained(student) if name.startswith("image_blocks.blocks")}
    assert sorted(found) == expected
    gradients_agree(student)


def test_frozen_attention_leaves_the_feed_forward_network_to_learn() -> None:
    student = build("student.frozen_image=attention")
    own = {name.split(".")[3] for name in trained(student) if name.startswith("image_blocks.blocks.1")}
    assert own == {"norm2", "fc1", "fc2", "scale2"}


def test_a_student_of_which_nothing_is_trained_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        build("student.frozen_image=all", recipe="image-kd")
    assert message(error) == (
        "UsageError: recipe image-kd: nothing of the student is trained | freeze less: student.frozen_image, "
        "frozen_text, frozen_image_blocks, frozen_text_blocks"
    )


# --- heads -------------------------------------------------------------------------------------------------------


def test_separate_heads_one_for_each_objective_the_first_is_evaluated() -> None:
    student = build("student.heads=separate")
    out = student.encode_images(tokens())
    assert [(head.term, head.width) for head in student.spec.heads] == [("itc", WIDTH), ("ctl", 9)]
    assert student.head is None
    assert {name: tuple(found.shape) for name, found in out.heads.items()} == {"itc": (3, WIDTH), "ctl": (3, 9)}
    assert out.features_BD is out.of("itc")
    assert out.of("ctl") is out.heads["ctl"]
    assert student.spec.contrast_widths == (WIDTH,)
    table = {count.part: count.trainable for count in parameter_table(student)}
    assert table["heads"] == (WIDTH + 1) * WIDTH + (WIDTH + 1) * 9
    other = rebuilt(student)
    assert [head.term for head in other.spec.heads] == ["itc", "ctl"]
    assert torch.equal(other.encode_images(tokens()).of("ctl"), out.of("ctl"))


def test_each_head_gets_the_gradient_of_its_own_objective() -> None:
    student = build("student.heads=separate")
    student.encode_images(tokens()).of("ctl").square().sum().backward()
    assert student.heads["ctl"].weight.grad is not None
    assert student.heads["itc"].weight.grad is None
    assert student.shared_blocks.blocks[0].qkv.weight.grad is not None  # type: ignore[union-attr]


def test_the_widths_of_heads_can_be_given() -> None:
    recipe = load_recipe("ssmke", ["student.heads=separate", "student.head_width=6"])
    image, text = networks()
    student = build_student(recipe, names(), image, text, 9, 0)
    assert [(head.term, head.width) for head in student.spec.heads] == [("itc", 6), ("ctl", 9)]
    student = build_student(recipe, names(), image, text, 9, 0, heads={"codes": 32, "itc": 5})
    assert {name: found.shape[1] for name, found in student.encode_images(tokens()).heads.items()} == {
        "codes": 32,
        "itc": 5,
    }


def test_with_one_head_every_objective_reads_it() -> None:
    out = build().encode_images(tokens())
    assert out.heads == {}
    assert out.of("itc") is out.predicted_BD
    assert out.of("anything") is out.predicted_BD


# --- projections -------------------------------------------------------------------------------------------------


def test_projections_lead_from_each_modality_to_the_shared_part() -> None:
    student, plain = build("student.projection=true", width=12), build(width=12)
    table = {count.part: count.trainable for count in parameter_table(student)}
    assert table["image projection"] == 2 * WIDTH + (WIDTH + 1) * WIDTH
    assert table["text projection"] == 2 * 12 + (12 + 1) * WIDTH
    assert "image projection" not in {count.part for count in parameter_table(plain)}
    assert student.image_projection is not None
    hidden = student.image_blocks(tokens())[-1]  # type: ignore[misc]
    norm = torch.nn.functional.layer_norm(hidden, (WIDTH,), eps=1e-6)
    projected = norm @ student.image_projection.linear.weight.T + student.image_projection.linear.bias
    typed = projected + student.token_type_scale * student.token_types[0]  # type: ignore[index,operator]
    expected = student.head(student.norm(student.shared_blocks(typed)[-1][:, 0]))  # type: ignore[misc]
    torch.testing.assert_close(student.encode_images(tokens()).features_BD, expected, rtol=1e-5, atol=1e-5)
    gradients_agree(student)
    rebuilt(student)


# --- token types -------------------------------------------------------------------------------------------------


def test_token_types_in_front_of_the_blocks() -> None:
    student = build("student.token_types=before", "student.token_type_scale=0.5", width=12)
    before = student.types_before
    assert student.token_types is None
    assert before is not None
    assert {name: tuple(vector.shape) for name, vector in before.vectors.items()} == {"image": (WIDTH,), "text": (12,)}
    assert all(scale.eq(0.5).all() for scale in before.scales.values())
    moved = tokens() + 0.5 * before.vectors["image"]
    plain = build("student.token_types=none", width=12)
    state = {name: tensor for name, tensor in student.state_dict().items() if not name.startswith("types_before")}
    plain.load_state_dict(state, strict=True)
    torch.testing.assert_close(
        student.encode_images(tokens()).features_BD, plain.encode_images(moved).features_BD, rtol=1e-5, atol=1e-5
    )
    text_before = student.encode_texts(*texts()).features_BD
    assert not torch.allclose(text_before, plain.encode_texts(*texts()).features_BD, atol=1e-5)
    gradients_agree(student)
    assert {count.part: count.trainable for count in parameter_table(student)}["token types"] == 2 * (WIDTH + 12)
    rebuilt(student)


def test_token_types_without_layer_scale_are_added_as_they_are() -> None:
    student = build("student.token_types=after", "student.token_type_scale=0", "student.shared_blocks=0")
    assert student.token_type_scale is None
    assert student.token_types is not None
    hidden = student.image_blocks(tokens())[-1][:, 0] + student.token_types[0]  # type: ignore[misc]
    expected = student.head(student.norm(hidden))  # type: ignore[misc]
    torch.testing.assert_close(student.encode_images(tokens()).features_BD, expected, rtol=1e-5, atol=1e-5)
    rebuilt(student)


def test_true_and_false_mean_after_and_none() -> None:
    for old, new in (("true", "after"), ("false", "none")):
        ours, theirs = build(f"student.token_types={old}"), build(f"student.token_types={new}")
        assert ours.spec == theirs.spec
        assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())


# --- positions ---------------------------------------------------------------------------------------------------


def test_one_table_of_positions_for_both_modalities_in_front_of_the_shared_part() -> None:
    student = build("student.positions=shared", "student.token_types=none", "student.shared_blocks=0")
    table = student.shared_positions
    assert table is not None
    assert table.shape == (POSITIONS, WIDTH)  # the longest text; a picture has 5 tokens
    out = student.encode_images(tokens(), keep_tokens=True).tokens_BTD
    expected = student.norm(student.image_blocks(tokens())[-1] + table[:NUM_TOKENS])  # type: ignore[misc]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    ids, mask = texts()
    words = student.text_blocks(student.text_embedding(ids, mask), mask)[-1]  # type: ignore[misc]
    found = student.encode_texts(ids, mask, keep_tokens=True).tokens_BTD
    assert found is not None
    torch.testing.assert_close(found[mask], student.norm(words + table[:7])[mask], rtol=1e-5, atol=1e-5)  # type: ignore[misc]
    gradients_agree(student)
    rebuilt(student)


def test_more_tokens_than_positions_are_refused_with_both() -> None:
    student = build("student.positions=shared")
    with pytest.raises(UsageError) as error:
        student.encode_images(torch.zeros(1, POSITIONS + 1, WIDTH))
    assert message(error) == (
        f'UsageError: student.positions = "shared": a sample has {POSITIONS + 1} tokens, and the table {POSITIONS} '
        "rows | leave student.positions out, or extract smaller pictures"
    )
