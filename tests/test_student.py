"""The student: starts as the blocks it takes, is rebuilt from its spec, and ignores padding."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_cache import NUM_TOKENS, POSITIONS, TEXT_WIDTH, VOCABULARY, WIDTH, tiny_network

from emkum.errors import UsageError
from emkum.models.network import Network
from emkum.stage2_train.recipe import Recipe, load_recipe
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.student import Student, StudentSpec, build_student, masked_mean, parameter_table

CLS = "teacher/tinyvit/image/cls"


def names(cut: int = 2) -> FieldNames:
    return FieldNames(f"image/tinyvit@{cut}/tokens", "tinyvit", cut, "text/tinybert/ids", {"cls": CLS})


def build(recipe: Recipe, cut: int = 2, target_width: int | None = None, seed: int = 0, **network: object) -> Student:
    image = tiny_network("tinyvit", "image", **network) if recipe.kind != "texts" else None  # type: ignore[arg-type]
    text = tiny_network("tinybert", "text", seed=1) if recipe.kind != "images" else None
    return build_student(recipe, names(cut), image, text, target_width, seed)


def pairs(*overrides: str) -> Recipe:
    return load_recipe("ssmke", overrides)


def tokens(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))


def texts(batch: int = 3, length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(4))
    mask = torch.arange(length) < torch.tensor([length, 3, 5][:batch])[:, None]
    return torch.where(mask, ids, 0), mask


def test_it_starts_as_the_encoders_blocks_after_the_cut() -> None:
    recipe = load_recipe("image-kd", ["student.image_blocks=2"])
    student, encoder = build(recipe, cut=1), tiny_network("tinyvit", "image")
    own = student.encode_images(tokens()).hidden
    frozen = encoder.backbone.run(tokens(), 1, 3).hidden  # type: ignore[operator]
    assert len(own) == 2
    # Not bit for bit: attention takes another path where gradients are recorded.
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(own, frozen, strict=True))


def test_its_text_side_starts_as_the_text_encoder() -> None:
    ids, mask = texts()
    student, encoder = build(load_recipe("text-kd")), tiny_network("tinybert", "text", seed=1)
    own = student.encode_texts(ids, mask).hidden
    backbone = encoder.backbone
    frozen = backbone.run(backbone.embed(ids, mask), 0, 2, mask).hidden  # type: ignore[operator]
    assert len(own) == 2
    assert all(torch.allclose(a[mask], b[mask], atol=1e-5) for a, b in zip(own, frozen, strict=True))


@pytest.mark.parametrize(
    ("wanted", "cut", "expected"), [("half", 0, 2), ("half", 1, 1), ("half", 3, 0), ("all", 1, 3), ("2", 1, 2)]
)
def test_how_many_blocks_follow_the_cut(wanted: str, cut: int, expected: int) -> None:
    student = build(pairs(f"student.image_blocks={wanted}"), cut=cut)
    assert (student.image_blocks.depth if student.image_blocks is not None else 0) == expected
    assert len(student.encode_images(tokens()).hidden) == expected + 1  # and the shared one
    assert student.spec.image is not None
    assert student.spec.image.cut == cut


@pytest.mark.parametrize(
    "recipe", [pairs(), load_recipe("image-kd", ["student.image_blocks=1"]), load_recipe("text-kd")]
)
def test_it_is_rebuilt_from_its_spec_and_weights_alone(recipe: Recipe) -> None:
    student = build(recipe, target_width=9 if recipe.kind == "pairs" else None)
    spec = StudentSpec.from_json(json.loads(json.dumps(student.spec.to_json())))
    assert spec == student.spec
    other = Student(spec)
    other.load_state_dict(student.state_dict(), strict=True)
    for encode in ("encode_images", "encode_texts"):
        if (encode == "encode_images" and spec.image) or (encode == "encode_texts" and spec.text):
            inputs = (tokens(),) if encode == "encode_images" else texts()
            assert torch.equal(
                getattr(other, encode)(*inputs).features_BD, getattr(student, encode)(*inputs).features_BD
            )


@pytest.mark.parametrize("bias", ["shared", "per_block"])
def test_blocks_with_a_relative_position_bias_come_with_their_tables(bias: str) -> None:
    network = {"relative_bias": bias, "position": "none", "qkv_bias": "qv"}
    recipe = load_recipe("image-kd", ["student.image_blocks=2"])
    student, encoder = build(recipe, cut=1, **network), tiny_network("tinyvit", "image", **network)  # type: ignore[arg-type]
    own = student.encode_images(tokens()).hidden[-1]
    # Attention whose bias is trained takes another path than with a constant one: equal but for rounding.
    assert torch.allclose(own, encoder.backbone.run(tokens(), 1, 3).hidden[-1], atol=1e-5)  # type: ignore[operator]
    other = Student(StudentSpec.from_json(student.spec.to_json()))
    other.load_state_dict(student.state_dict(), strict=True)
    assert torch.equal(other.encode_images(tokens()).hidden[-1], own)


def test_features_have_the_width_of_the_target_and_unimodal_students_their_own() -> None:
    ids, mask = texts()
    student = build(pairs(), target_width=9)
    assert student.encode_images(tokens()).features_BD.shape == (3, 9)
    assert student.encode_texts(ids, mask).features_BD.shape == (3, 9)
    assert build(pairs()).encode_images(tokens()).features_BD.shape == (3, WIDTH)
    assert build(pairs("student.head_width=5")).encode_images(tokens()).features_BD.shape == (3, 5)
    assert build(load_recipe("text-kd")).encode_texts(ids, mask).features_BD.shape == (3, TEXT_WIDTH)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_changes_no_feature(pooling: str) -> None:
    student = build(pairs(f"student.text_pooling={pooling}"))
    ids, mask = texts()
    longer = torch.nn.functional.pad(ids, (0, POSITIONS - ids.shape[1]), value=7)
    longer_mask = torch.nn.functional.pad(mask, (0, POSITIONS - ids.shape[1]))
    short, long = student.encode_texts(ids, mask).features_BD, student.encode_texts(longer, longer_mask).features_BD
    assert torch.allclose(short, long, atol=1e-6)


def test_mean_pooling_leaves_out_cls_registers_and_padding() -> None:
    recipe = pairs("student.image_pooling=mean", "student.shared_blocks=0", "student.image_blocks=1")
    student = build(recipe, num_registers=1)
    assert student.norm is not None
    assert student.head is not None
    inputs = torch.cat([tokens(), tokens()[:, :1]], 1)
    hidden = student.image_blocks(inputs)[-1]  # type: ignore[misc]
    assert student.token_types is not None
    hidden = hidden + student.token_type_scale * student.token_types[0]
    expected = student.head(student.norm(hidden)[:, 2:].mean(1))
    assert torch.allclose(student.encode_images(inputs).features_BD, expected)
    vectors, mask = torch.arange(6.0).view(1, 3, 2), torch.tensor([[True, True, False]])
    assert masked_mean(vectors, mask).tolist() == [[1.0, 2.0]]
    assert masked_mean(vectors, torch.zeros(1, 3, dtype=torch.bool)).tolist() == [[0.0, 0.0]]


def test_token_types_start_too_small_to_matter_and_tell_modalities_apart() -> None:
    with_types, without = build(pairs()), build(pairs("student.token_types=false"))
    a, b = with_types.encode_images(tokens()).features_BD, without.encode_images(tokens()).features_BD
    assert torch.allclose(a, b, atol=1e-4)
    assert not torch.equal(a, b)
    assert with_types.token_type_scale is not None
    assert with_types.token_type_scale.eq(1e-5).all()


def test_the_table_counts_every_parameter_once_and_says_what_is_frozen() -> None:
    student = build(pairs("student.frozen_text_blocks=1", "student.image_blocks=1"), target_width=9)
    table = {count.part: count for count in parameter_table(student)}
    assert sum(c.trainable + c.frozen for c in table.values()) == sum(p.numel() for p in student.parameters())
    assert table["text embedding"].trainable == 0
    assert table["text embedding"].frozen > 0
    assert table["text blocks"].frozen * 3 == table["text blocks"].trainable  # one of four
    assert table["text projection"].trainable == (TEXT_WIDTH + 1) * WIDTH
    assert table["head"].trainable == (WIDTH + 1) * 9


def test_every_trainable_parameter_gets_a_gradient_and_no_frozen_one() -> None:
    student = build(pairs("student.image_blocks=1", "student.frozen_text_blocks=1"))
    (student.encode_images(tokens()).features_BD.sum() + student.encode_texts(*texts()).features_BD.sum()).backward()
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_embeddings_are_trained_when_asked() -> None:
    assert build(pairs("student.train_embeddings=true")).text_embedding.tokens.requires_grad  # type: ignore[union-attr]


def test_the_seed_decides_the_random_parts_and_nothing_else_does() -> None:
    image, text = tiny_network("tinyvit", "image"), tiny_network("tinybert", "text", seed=1)
    before = torch.get_rng_state()
    first = build_student(pairs(), names(), image, text, None, seed=1).state_dict()
    assert torch.equal(before, torch.get_rng_state())  # nothing was drawn from the global generator
    torch.manual_seed(6)
    again = build_student(pairs(), names(), image, text, None, seed=1).state_dict()
    other = build_student(pairs(), names(), image, text, None, seed=2).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for wanted in (False, True):
        student = build(pairs("student.image_blocks=2"), cut=1)
        student.checkpoint_activations(wanted)
        student.encode_images(tokens()).features_BD.square().sum().backward()
        gradients.append([p.grad for p in student.image_blocks.parameters()])  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("overrides", "cut", "expected"),
    [
        (["student.image_blocks=3"], 2, "student.image_blocks = 3: tinyvit has 4 blocks, 2 of them after cut 2"),
        (["student.text_blocks=5"], 2, "student.text_blocks = 5: tinybert has 4 blocks, 4 of them after cut 0"),
        (["student.shared_heads=3"], 2, "student.shared_heads = 3 does not divide the student's width 16"),
        (["student.frozen_text_blocks=5"], 2, "student.frozen_text_blocks = 5: the student has 4 text blocks"),
        (["student.frozen_image_blocks=1"], 2, "student.frozen_image_blocks = 1: the student has 0 image blocks"),
    ],
)
def test_what_is_said_about_blocks_that_are_not_there(overrides: list[str], cut: int, expected: str) -> None:
    with pytest.raises(UsageError) as error:
        build(pairs(*overrides), cut=cut)
    assert expected in error.value.what
    assert error.value.way_out


def test_a_student_without_a_block_is_refused() -> None:
    with pytest.raises(UsageError, match="a student without a block") as error:
        build(load_recipe("image-kd"), cut=2)
    assert "--set student.image_blocks=all" in error.value.way_out
    with pytest.raises(UsageError, match=r"a student without a block \(text_blocks 0, shared_blocks 0\)") as error:
        build(load_recipe("text-kd", ["student.text_blocks=0"]))
    assert "--set student.text_blocks=all" in error.value.way_out


def test_a_head_of_another_width_than_the_target_is_refused_with_both() -> None:
    with pytest.raises(UsageError, match=r"head_width = 5: the target teacher/tinyvit/image/cls has 9 channels"):
        build(pairs("student.head_width=5"), target_width=9)


def test_features_are_float32_where_products_are_not() -> None:
    student, (ids, mask) = build(pairs(), target_width=9), texts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images, captions = student.encode_images(tokens()), student.encode_texts(ids, mask)
        heads = student.head(torch.zeros(1, WIDTH))  # type: ignore[misc]
    assert (images.features_BD.dtype, captions.features_BD.dtype) == (torch.float32, torch.float32)
    assert heads.dtype == torch.bfloat16  # as it would be without care


def test_a_convolutional_network_gives_no_blocks() -> None:
    text = tiny_network("tinybert", "text")
    network = Network(**{**vars(tiny_network("resnet", "image")), "backbone": torch.nn.Identity(), "family": "resnet"})
    network.backbone.depth, network.backbone.width, network.backbone.num_prefix = 4, 16, 1  # type: ignore[misc,assignment]
    with pytest.raises(UsageError, match="resnet is a resnet, not a Transformer"):
        build_student(pairs(), names(), network, text, None, 0)


def test_a_network_of_pairs_gives_no_blocks() -> None:
    """A Transformer, but of tokens that have seen both."""
    text = Network(**{**vars(tiny_network("tinybert", "text")), "name": "fused-pair", "modality": "pair"})
    with pytest.raises(UsageError, match="fused-pair is a network of pairs, which reads a caption with its") as error:
        build_student(pairs(), names(), tiny_network("tinyvit", "image"), text, None, 0)
    assert error.value.way_out == (
        "add ids of a text network to the cache with emkum extract and --text-encoder, for example beit3-text"
    )


def test_masks_reach_the_attention_kernel_as_one_bool_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broadcast over heads and queries: the kernels that save memory take them so, and nothing of L x L is made."""
    from emkum.models import blocks

    attend, seen = blocks.F.scaled_dot_product_attention, []

    def watching(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None) -> torch.Tensor:
        seen.append(attn_mask)
        return attend(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(blocks.F, "scaled_dot_product_attention", watching)
    student = build(pairs(), target_width=WIDTH)
    ids, mask = texts()
    with torch.no_grad():
        student.encode_images(tokens())
        assert all(found is None for found in seen)
        seen.clear()
        student.encode_texts(ids, mask)
    assert len(seen) > 1
    for found in seen:
        assert found is not None
        assert (found.dtype, tuple(found.shape)) == (torch.bool, (3, 1, 1, 7))
