"""What both modalities of a student share: MoME, pairs at once, final tokens, blocks that start as an encoder's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_students import build, gradients_agree, message, networks, rebuilt, texts, tokens
from tiny_cache import NUM_TOKENS, WIDTH

from emkum.errors import UsageError
from emkum.models.backbone import BlockStack, StackSpec
from emkum.models.blocks import Block
from emkum.models.multiway import Layout, MultiwayBlock, MultiwayStack
from emkum.stage2_train.student import Student

# --- MoME --------------------------------------------------------------------------------------------------------


def tower(mome: MultiwayStack, modality: str) -> BlockStack:
    """Plain blocks with the attention and the feed-forward networks that serve one modality."""
    stack = BlockStack(StackSpec(mome.spec.block, mome.depth))
    for block, multiway in zip(stack.blocks, mome.blocks, strict=True):
        assert isinstance(multiway, MultiwayBlock)
        halves = [
            experts["both"] if "both" in experts else experts[modality]
            for experts in (multiway.attentions, multiway.feed_forwards)
        ]
        block.load_state_dict({**halves[0].state_dict(), **halves[1].state_dict()}, strict=True)
    return stack


MOMES = [
    (),
    ("student.mome_attention=own",),
    ("student.shared_blocks=3", "student.mome_fused=1"),
]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("overrides", MOMES)
def test_mome_on_one_modality_is_that_modalitys_own_tower(overrides: tuple[str, ...], pooling: str) -> None:
    more = (f"student.image_pooling={pooling}", f"student.text_pooling={pooling}")
    student = build("student.shared=mome", *overrides, *more)
    assert student.shared_mome is not None
    assert student.shared_blocks is None
    (ids, mask), own = texts(), student.spec
    for modality, encode in (
        ("image", lambda s: s.encode_images(tokens())),
        ("text", lambda s: s.encode_texts(ids, mask)),
    ):
        plain = Student(dataclasses.replace(own, shared_mome=None, shared=tower(student.shared_mome, modality).spec))
        state = {k: v for k, v in student.state_dict().items() if not k.startswith("shared_mome")}
        blocks = tower(student.shared_mome, modality).state_dict()
        plain.load_state_dict({**state, **{f"shared_blocks.{k}": v for k, v in blocks.items()}}, strict=True)
        found, expected = encode(student), encode(plain)
        torch.testing.assert_close(found.features_BD, expected.features_BD, rtol=1e-5, atol=1e-6)
        assert [tuple(h.shape) for h in found.hidden] == [tuple(h.shape) for h in expected.hidden]
    assert student.depth == 2 + len(student.shared_mome.blocks)


def test_each_modality_trains_its_own_experts_and_both_train_the_shared_attention() -> None:
    student = build("student.shared=mome", "student.shared_blocks=2", "student.mome_fused=1")
    student.encode_images(tokens()).features_BD.sum().backward()
    with_gradient = {n for n, p in student.named_parameters() if n.startswith("shared_mome") and p.grad is not None}
    assert any(".feed_forwards.image." in name for name in with_gradient)
    assert not any(".feed_forwards.text." in name for name in with_gradient)
    assert any(".attentions.both." in name for name in with_gradient)
    assert any("blocks.1.feed_forwards.both." in name for name in with_gradient)
    student.encode_texts(*texts()).features_BD.sum().backward()
    assert all(p.grad is not None for n, p in student.named_parameters() if p.requires_grad), "all are reached"


def test_mome_starts_from_the_seed_with_small_matrices_and_is_rebuilt_from_json() -> None:
    student, again = build("student.shared=mome"), build("student.shared=mome")
    assert student.shared_mome is not None
    expert = student.shared_mome.blocks[0].feed_forwards["text"]  # type: ignore[index,union-attr]
    assert isinstance(expert, Block)
    assert expert.fc1.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not expert.fc1.bias.any()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in student.state_dict().items())
    other = rebuilt(student)
    assert other.spec == student.spec
    assert torch.equal(other.encode_images(tokens()).features_BD, student.encode_images(tokens()).features_BD)


def test_recomputed_activations_of_mome_give_the_same_gradients() -> None:
    gradients, passes = [], []
    for wanted in (False, True):
        student = build("student.shared=mome")
        student.checkpoint_activations(wanted)
        assert student.shared_mome is not None
        passes.append(0)
        student.shared_mome.blocks[0].register_forward_pre_hook(lambda *_: passes.append(passes.pop() + 1))
        student.encode_images(tokens()).features_BD.square().sum().backward()
        gradients.append([p.grad for p in student.shared_mome.parameters() if p.grad is not None])
    assert passes == [1, 2]
    assert gradients[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_first_tokens_of_a_pair_are_not_handed_out_alone() -> None:
    student = build("student.shared=mome")
    assert student.shared_mome is not None
    with pytest.raises(ValueError, match="those of its picture alone"):
        student.shared_mome.run(tokens(), Layout(2), queries=1)


# --- pictures and captions at once -------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [(), *(("student.shared=mome", *more) for more in MOMES)])
def test_a_pair_attends_to_both_and_pads_change_nothing(overrides: tuple[str, ...]) -> None:
    student, (ids, mask) = build(*overrides), texts()
    out = student.encode_pairs(tokens(), ids, mask)
    assert out.image_BTD.shape == (3, NUM_TOKENS, WIDTH)
    assert out.text_BLD.shape == (3, 7, WIDTH)
    assert len(out.hidden) == (3 if "student.shared_blocks=3" in overrides else 1)
    other_caption = student.encode_pairs(tokens(), torch.where(mask, ids.roll(1, 0), 0), mask)
    assert not torch.allclose(out.image_BTD, other_caption.image_BTD, atol=1e-4)
    other_picture = student.encode_pairs(tokens().roll(1, 0), ids, mask)
    assert not torch.allclose(out.text_BLD[mask], other_picture.text_BLD[mask], atol=1e-4)
    longer = torch.nn.functional.pad(ids, (0, 4), value=5), torch.nn.functional.pad(mask, (0, 4))
    padded = student.encode_pairs(tokens(), *longer)
    torch.testing.assert_close(padded.image_BTD, out.image_BTD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded.text_BLD[:, :7][mask], out.text_BLD[mask], rtol=1e-5, atol=1e-5)


def test_a_pair_is_the_shared_blocks_on_typed_tokens_of_both() -> None:
    student, (ids, mask) = build("student.token_type_scale=0.5"), texts()
    image = student.image_blocks(tokens())[-1]  # type: ignore[misc]
    text = student.text_blocks(student.text_embedding(ids, mask), mask)[-1]  # type: ignore[misc]
    assert student.token_types is not None
    assert student.token_type_scale is not None
    both = [
        part + student.token_type_scale * kind for part, kind in zip((image, text), student.token_types, strict=True)
    ]
    whole = torch.cat([torch.ones(3, NUM_TOKENS, dtype=torch.bool), mask], dim=1)
    expected = student.norm(student.shared_blocks(torch.cat(both, dim=1), whole)[-1])  # type: ignore[misc]
    found = student.encode_pairs(tokens(), ids, mask)
    torch.testing.assert_close(found.image_BTD, expected[:, :NUM_TOKENS], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.text_BLD[mask], expected[:, NUM_TOKENS:][mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        ("shre", (), "pictures and captions at once, by a student with a shared MLP"),
        ("shre-transformer", (), "pictures and captions at once, by a student with a shared MLP"),
        ("ssmke", ("student.shared_blocks=0",), "pictures and captions at once, by a student with no shared block"),
    ],
)
def test_a_student_without_shared_blocks_takes_no_pairs(recipe: str, overrides: tuple[str, ...], expected: str) -> None:
    student, (ids, mask) = build(*overrides, recipe=recipe), texts()
    with pytest.raises(UsageError) as error:
        student.encode_pairs(tokens(), ids, mask)
    assert message(error).startswith(f"UsageError: {expected} | --set student.shared=blocks or mome")


# --- final tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("ssmke", ()),
        ("ssmke", ("student.shared=mome",)),
        ("ssmke", ("student.shared_blocks=0",)),
        ("shre-transformer", ()),
        ("image-kd", ()),
    ],
)
def test_final_tokens_come_when_asked_and_the_features_are_pooled_from_them(
    recipe: str, overrides: tuple[str, ...]
) -> None:
    student = build(*overrides, recipe=recipe)
    plain = student.encode_images(tokens())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert student.encode_images(tokens(), keep_tokens=True).tokens_BTD.dtype == torch.float32  # type: ignore[union-attr]
    out = student.encode_images(tokens(), keep_tokens=True)
    assert plain.tokens_BTD is None
    assert out.tokens_BTD is not None
    assert out.tokens_BTD.shape == (3, NUM_TOKENS, WIDTH)
    assert all(layer.shape == (3, NUM_TOKENS, WIDTH) for layer in out.hidden)
    torch.testing.assert_close(out.features_BD, plain.features_BD, rtol=1e-5, atol=1e-5)
    pooled = out.tokens_BTD[:, 0]
    expected = pooled if student.head is None else student.head(pooled)
    torch.testing.assert_close(out.predicted_BD, expected, rtol=1e-5, atol=1e-5)


def test_final_tokens_of_texts_do_not_depend_on_pads() -> None:
    student, (ids, mask) = build(), texts()
    out = student.encode_texts(ids, mask, keep_tokens=True).tokens_BTD
    longer = torch.nn.functional.pad(ids, (0, 4), value=5), torch.nn.functional.pad(mask, (0, 4))
    padded = student.encode_texts(*longer, keep_tokens=True).tokens_BTD
    assert out is not None
    assert padded is not None
    torch.testing.assert_close(padded[:, :7][mask], out[mask], rtol=1e-5, atol=1e-5)


def test_an_mlp_on_one_vector_has_no_final_tokens() -> None:
    with pytest.raises(UsageError) as error:
        build(recipe="shre").encode_images(tokens(), keep_tokens=True)
    assert message(error) == (
        'UsageError: student.shared = "mlp" reads one vector of each sample: it has no final tokens | --set '
        "student.shared=blocks"
    )


# --- shared blocks that start as those of an encoder --------------------------------------------------------------


@pytest.mark.parametrize("lender", ["text", "image"])
def test_shared_blocks_start_as_the_next_ones_of_an_encoder(lender: str) -> None:
    student = build("student.text_blocks=2", f"student.shared_start={lender}", "student.shared_blocks=2")
    stack = networks()[0 if lender == "image" else 1].backbone.stack  # type: ignore[union-attr]
    assert student.shared_blocks is not None
    for own, theirs in zip(student.shared_blocks.blocks, stack.blocks[2:], strict=True):
        assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    assert all(p.requires_grad for p in student.shared_blocks.parameters())
    gradients_agree(student)
    rebuilt(student)


def test_experts_start_as_the_halves_of_the_next_blocks() -> None:
    student = build("student.shared=mome", "student.shared_start=image")
    block = networks()[0].backbone.stack.blocks[2]  # type: ignore[union-attr]
    assert student.shared_mome is not None
    own = student.shared_mome.blocks[0]
    assert isinstance(own, MultiwayBlock)
    for modality in ("image", "text"):
        assert torch.equal(own.feed_forwards[modality].fc1.weight, block.fc1.weight)  # type: ignore[arg-type]
        assert torch.equal(own.feed_forwards[modality].scale2, block.scale2)  # type: ignore[arg-type]
    assert torch.equal(own.attentions["both"].qkv.weight, block.qkv.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "text", "expected"),
    [
        (["student.shared_start=text"], {},
         'student.shared_start = "text": tinybert has 4 blocks, 0 of them behind those taken, and '
         "student.shared_blocks = 1 | take fewer in front: --set student.text_blocks=N"),
        (["student.shared_start=text", "student.text_blocks=2"], {"width": 12},
         "tinybert has 12 channels, the student 16 | choose another start"),
        (["student.shared_start=text", "student.text_blocks=2", "student.shared=mome"], {},
         "blocks of tinybert have their norms behind (post-norm), and cannot serve experts"),
        (["student.shared_start=text", "student.text_blocks=2"],
         {"relative_bias": "per_block", "position": "none"},
         "blocks of tinybert have a relative position bias, and cannot serve both modalities | --set "
         "student.shared_start=random"),
        (["student.shared_start=text", "student.text_blocks=2"], {"causal": True},
         "have tokens that see only what stands before them, and cannot serve both modalities"),
    ],
)  # fmt: skip
def test_what_is_said_of_blocks_that_cannot_be_shared(
    overrides: list[str], text: dict[str, object], expected: str
) -> None:
    with pytest.raises(UsageError) as error:
        build(*overrides, **text)
    assert expected in message(error)
