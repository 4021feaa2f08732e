"""Text blocks with the attention of an image network, which stays frozen while their feed-forward networks learn."""

from __future__ import annotations

import pytest
import torch
from small_students import build, gradients_agree, message, names, networks, rebuilt, texts, trained
from tiny_cache import POSITIONS, WIDTH, tiny_network

from emkum.errors import UsageError
from emkum.stage2_train.recipe import load_recipe
from emkum.stage2_train.student import build_student

# --- the image network's attention in the text blocks -------------------------------------------------------------


def equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    return all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())


def test_frozen_text_attention_is_the_image_networks_while_the_feed_forward_network_learns() -> None:
    student = build("student.frozen_text=attention")
    image, text = (network.backbone.stack.blocks for network in networks())  # type: ignore[union-attr]
    assert student.text_blocks is not None
    assert student.text_blocks.spec.block.norm_order == "pre"
    for index, own in enumerate(student.text_blocks.blocks):
        for name in ("norm1", "qkv", "proj"):
            assert equal(getattr(own, name), getattr(image[index], name))
        assert torch.equal(own.scale1, image[index].scale1)
        for name in ("fc1", "fc2"):
            assert equal(getattr(own, name), getattr(text[index], name))
        assert equal(own.norm2, text[index].norm1)  # post-norm: what its feed-forward network reads went through it
    names_trained = {name.split(".")[3] for name in trained(student) if name.startswith("text_blocks")}
    assert names_trained == {"norm2", "fc1", "fc2", "scale2"}
    gradients_agree(student)
    other = rebuilt(student)
    # Not bit for bit: attention takes another path where its keys are frozen.
    ours, theirs = student.encode_texts(*texts()).features_BD, other.encode_texts(*texts()).features_BD
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_new_feed_forward_networks_beside_the_image_networks_attention() -> None:
    student = build("student.text_attention=image", "student.text_start=random")
    image, text = (network.backbone.stack.blocks[1] for network in networks())  # type: ignore[union-attr]
    assert student.text_blocks is not None
    own = student.text_blocks.blocks[1]
    assert torch.equal(own.qkv.weight, image.qkv.weight)
    assert not torch.equal(own.fc1.weight, text.fc1.weight)
    assert own.fc1.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert any(name.startswith("text_blocks.blocks.1.qkv") for name in trained(student))  # taken, and trained


def test_the_image_networks_position_bias_stays_with_pictures_and_texts_get_their_own() -> None:
    image = tiny_network("tinyvit", "image", relative_bias="per_block", position="none")
    text = networks()[1]
    student = build_student(load_recipe("ssmke", ["student.frozen_text=attention"]), names(), image, text, 9, 0)
    assert student.text_blocks is not None
    assert student.text_blocks.spec.words
    assert len(student.text_blocks.biases) == 4
    assert not student.text_blocks.biases[0].table.any()
    assert student.text_blocks.biases[0].table.requires_grad
    ids, mask = torch.ones(2, POSITIONS, dtype=torch.int64), torch.ones(2, POSITIONS, dtype=torch.bool)
    assert student.encode_texts(ids, mask).features_BD.shape == (2, 9)


def test_attention_of_another_width_or_depth_is_refused_with_both_numbers() -> None:
    with pytest.raises(UsageError) as error:
        build("student.frozen_text=attention", width=12)
    assert message(error) == (
        "UsageError: student.frozen_text: the image network tinyvit has 16 channels, the text network tinybert 12, and "
        "the text blocks would have the attention of one and the rest of the other | extract with two networks of one "
        "width"
    )
    with pytest.raises(UsageError) as error:
        build("student.text_attention=image", depth=6)
    assert "blocks [0, 1, 2, 3, 4, 5] of tinybert" in message(error)
    assert "tinyvit, whose attention they take, has 4 | use at most 4" in message(error)
    turning = tiny_network("tinyvit", "image", rotary_base=100.0, position="none")
    recipe = load_recipe("ssmke", ["student.frozen_text=attention"])
    with pytest.raises(UsageError, match="turns by the place in the picture"):
        build_student(recipe, names(), turning, networks()[1], 9, 0)


@pytest.mark.parametrize(("image_order", "text_order", "taken"), [("post", "post", True), ("post", "pre", False)])
def test_behind_a_post_norm_attention_only_a_post_norm_network_gives_its_last_norm(
    image_order: str, text_order: str, taken: bool
) -> None:
    image = tiny_network("tinyvit", "image", norm_order=image_order, layer_scale=False)
    text = tiny_network("tinybert", "text", seed=1, width=WIDTH, norm_order=text_order)
    student = build_student(load_recipe("ssmke", ["student.text_attention=image"]), names(), image, text, 9, 0)
    assert student.text_blocks is not None
    own, theirs = student.text_blocks.blocks[1].norm2, text.backbone.stack.blocks[1].norm2  # type: ignore[union-attr]
    assert equal(own, theirs) == taken  # type: ignore[arg-type]
    assert bool(own.bias.any()) == taken  # type: ignore[union-attr]
