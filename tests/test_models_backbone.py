"""Backbones and block stacks: depth, slices, biases, precision, gradients; what students and stage 1 rely on."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from torch import Tensor

from emkum.errors import UnsupportedNetwork, UsageError
from emkum.models.backbone import Backbone, BackboneSpec, BlockStack, StackSpec
from emkum.models.blocks import Block, BlockSpec
from emkum.models.positions import RelativeBias, interpolate_positions, relative_index

IMAGE = BackboneSpec("vit", "image", depth=4, width=16, heads=2, mlp_width=24, patch=4, image_size=20, layer_scale=True)
BEIT = dataclasses.replace(IMAGE, family="beit", position="none", relative_bias="per_block", qkv_bias="qv")
TEXT = BackboneSpec(
    "bert",
    "text",
    depth=3,
    width=16,
    heads=2,
    mlp_width=24,
    norm_order="post",
    pre_norm=True,
    final_norm=False,
    vocab_size=30,
    max_positions=32,
    token_types=2,
)


def random_backbone(spec: BackboneSpec, seed: int = 0) -> Backbone:
    backbone = Backbone(spec)
    generator = torch.Generator().manual_seed(seed)
    for parameter in backbone.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return backbone.eval().requires_grad_(False)


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("spec", [IMAGE, BEIT, TEXT], ids=["vit", "beit", "bert"])
def test_a_spec_goes_through_json_unchanged(spec: BackboneSpec) -> None:
    assert BackboneSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    stack = spec.stack
    assert StackSpec.from_json(json.loads(json.dumps(stack.to_json()))) == stack


def test_every_field_of_a_spec_survives_json_and_an_unknown_one_is_refused() -> None:
    found = IMAGE.to_json()
    later = {field.name for field in dataclasses.fields(BackboneSpec)} - set(found)
    for name in later:  # written as soon as it says something
        changed = copy.copy(IMAGE)
        object.__setattr__(changed, name, "other")
        assert changed.to_json() == found | {name: "other"}
    with pytest.raises(UnsupportedNetwork, match=r"unknown keys \['rotary'\]"):
        BackboneSpec.from_json(found | {"rotary": True})


# As emkum 0.2 wrote them: hashed into the fingerprint of every field it extracted.
DINOV2_JSON = (
    '{"activation":"gelu","depth":12,"eps":1e-06,"family":"dinov2","final_norm":true,"heads":6,"image_size":518,'
    '"kind":"transformer","layer_scale":true,"max_positions":0,"mlp_width":1536,"modality":"image","norm_order":"pre",'
    '"num_registers":0,"pad_id":0,"patch":14,"patch_bias":true,"position":"absolute","position_antialias":false,'
    '"position_from_mask":false,"position_offset":0,"pre_norm":false,"qkv_bias":"all","relative_bias":"none",'
    '"token_types":0,"vocab_size":0,"width":384}'
)
BERT_JSON = (
    '{"activation":"gelu","depth":12,"eps":1e-12,"family":"bert","final_norm":false,"heads":12,"image_size":0,'
    '"kind":"transformer","layer_scale":false,"max_positions":512,"mlp_width":3072,"modality":"text",'
    '"norm_order":"post","num_registers":0,"pad_id":0,"patch":0,"patch_bias":true,"position":"absolute",'
    '"position_antialias":false,"position_from_mask":false,"position_offset":0,"pre_norm":true,"qkv_bias":"all",'
    '"relative_bias":"none","token_types":2,"vocab_size":30522,"width":768}'
)
DINOV2_STACK_JSON = (
    '{"block":{"activation":"gelu","eps":1e-06,"heads":6,"layer_scale":true,"mlp_width":1536,"norm_order":"pre",'
    '"qkv_bias":"all","width":384},"depth":12,"grid":[0,0],"relative_bias":"none"}'
)


def test_the_json_of_the_first_architectures_stays_as_it_was_to_the_byte() -> None:
    def text(found: object) -> str:
        return json.dumps(found, sort_keys=True, separators=(",", ":"))

    dinov2 = BackboneSpec(
        "dinov2", "image", 12, width=384, heads=6, mlp_width=1536, layer_scale=True, patch=14, image_size=518
    )
    bert = BackboneSpec("bert", "text", 12, width=768, heads=12, mlp_width=3072, vocab_size=30522, max_positions=512)
    bert = dataclasses.replace(bert, norm_order="post", eps=1e-12, pre_norm=True, final_norm=False, token_types=2)
    assert text(dinov2.to_json()) == DINOV2_JSON
    assert text(bert.to_json()) == BERT_JSON
    assert text(dinov2.stack.to_json()) == DINOV2_STACK_JSON
    assert BackboneSpec.from_json(json.loads(BERT_JSON)) == bert
    assert StackSpec.from_json(json.loads(DINOV2_STACK_JSON)) == dinov2.stack


def test_an_impossible_spec_is_refused() -> None:
    with pytest.raises(UnsupportedNetwork, match="20 px in patches of 3 px"):
        dataclasses.replace(IMAGE, patch=3)
    with pytest.raises(UnsupportedNetwork, match="vocab_size below 1"):
        dataclasses.replace(TEXT, vocab_size=0)
    with pytest.raises(ValueError, match="width of 16 cannot be split over 3 heads"):
        Backbone(dataclasses.replace(IMAGE, heads=3))


@pytest.mark.parametrize("spec", [IMAGE, BEIT], ids=["vit", "beit"])
def test_running_in_parts_equals_running_at_once(spec: BackboneSpec) -> None:
    backbone = random_backbone(spec)
    tokens = backbone.embed(images(20, 20))
    whole = backbone.run(tokens)
    first = backbone.run(tokens, 0, 1)
    rest = backbone.run(first.hidden[-1], 1)
    assert len(whole.hidden) == len(whole.ffn) == backbone.depth
    for one, other in zip(whole.hidden + whole.ffn, first.hidden + rest.hidden + first.ffn + rest.ffn, strict=True):
        assert torch.equal(one, other)
    assert backbone.run(tokens, 2, 2).hidden == []
    with pytest.raises(ValueError, match="blocks 3 to 9 of a stack of 4"):
        backbone.run(tokens, 3, 9)


def test_the_ffn_output_is_what_is_added_to_the_residual() -> None:
    backbone = random_backbone(IMAGE)
    block = backbone.stack.blocks[0]
    assert isinstance(block, Block)
    assert block.scale1 is not None
    assert block.scale2 is not None
    tokens = backbone.embed(images(20, 20))
    after, ffn = block(tokens)
    middle = tokens + block.scale1 * block.attend(block.norm1(tokens), None, None)
    torch.testing.assert_close(after - block.scale2 * ffn, middle)


@pytest.mark.parametrize("spec", [IMAGE, BEIT, dataclasses.replace(BEIT, relative_bias="shared")], ids=str)
def test_a_taken_slice_computes_the_same_and_owns_its_weights(spec: BackboneSpec) -> None:
    backbone = random_backbone(spec)
    tokens = backbone.embed(images(20, 12))
    grid = backbone.grid(20, 12)
    before = backbone.run(tokens, grid=grid)
    taken = backbone.stack.take(1, 2)
    for ours, theirs in zip(taken(before.hidden[0], grid=grid), before.hidden[1:3], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert taken.depth == taken.spec.depth == 2
    assert taken.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in taken.parameters())
    with torch.no_grad():
        for parameter in taken.parameters():
            parameter.zero_()
    for ours, theirs in zip(backbone.run(tokens, grid=grid).hidden, before.hidden, strict=True):
        assert torch.equal(ours, theirs)


def test_every_second_block_is_taken_with_its_own_bias_and_rebuilt_from_its_spec() -> None:
    backbone = random_backbone(BEIT)
    taken = backbone.stack.take(0, 2, step=2)
    rebuilt = BlockStack(StackSpec.from_json(json.loads(json.dumps(taken.spec.to_json()))))
    rebuilt.load_state_dict(taken.state_dict())
    assert torch.equal(taken.state_dict()["biases.1.table"], backbone.stack.state_dict()["biases.2.table"])
    tokens = backbone.embed(images(20, 20))
    assert torch.equal(rebuilt(tokens)[-1], taken(tokens)[-1])
    for first, count, step in ((0, 3, 2), (4, 1, 1), (-1, 1, 1), (0, 0, 1)):
        with pytest.raises(ValueError, match="of a stack of 4"):
            backbone.stack.take(first, count, step)


def test_a_slice_of_bfloat16_weights_is_trained_in_float32() -> None:
    backbone = random_backbone(IMAGE).to(torch.bfloat16)
    assert {p.dtype for p in backbone.stack.take(0, 2).parameters()} == {torch.float32}


def test_random_blocks_depend_on_their_seed_alone() -> None:
    torch.manual_seed(1)
    one = BlockStack.random(16, 2, 2, mlp_ratio=2, seed=5)
    torch.manual_seed(2)
    same, other = BlockStack.random(16, 2, 2, mlp_ratio=2, seed=5), BlockStack.random(16, 2, 2, mlp_ratio=2, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(next(iter(one.blocks)).qkv.weight, next(iter(other.blocks)).qkv.weight)
    weight = BlockStack.random(64, 4, 1, seed=0).state_dict()["blocks.0.fc1.weight"]
    assert 0.017 < float(weight.std()) < 0.021


@pytest.mark.parametrize("spec", [IMAGE, BEIT], ids=["vit", "beit"])
def test_every_weight_of_a_trained_slice_gets_a_gradient(spec: BackboneSpec) -> None:
    backbone = random_backbone(spec)
    taken = backbone.stack.take(0, 2)
    with torch.inference_mode():
        backbone(images(20, 20))  # what a frozen pass remembers must not reach the one that is trained
    tokens = backbone.embed(images(20, 20))
    out = taken.run(tokens)
    (out.hidden[-1].square().mean() + out.ffn[-1].square().mean()).backward()
    for name, parameter in taken.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


def test_gradients_flow_through_a_frozen_network_used_in_inference_mode_before() -> None:
    backbone = random_backbone(BEIT)
    with torch.inference_mode():
        backbone(images(20, 20))
    pictures = images(20, 20).requires_grad_(True)
    backbone(pictures).sum().backward()
    assert pictures.grad is not None
    assert bool(pictures.grad.any())


def test_activation_checkpointing_changes_neither_outputs_nor_gradients() -> None:
    plain = random_backbone(BEIT).stack.take(0, 3)
    saving = copy.deepcopy(plain)
    saving.checkpointing = True
    tokens = torch.randn(2, 26, 16)
    for stack in (plain, saving):
        stack(tokens)[-1].square().sum().backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_bias_is_computed_anew_when_its_table_changes() -> None:
    backbone = random_backbone(BEIT)
    before = backbone(images(20, 20))
    with torch.no_grad():
        next(iter(backbone.stack.biases)).table.mul_(-2)
    changed = backbone(images(20, 20))
    assert not torch.equal(before, changed)
    fresh = Backbone(BEIT).eval()
    fresh.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(fresh(images(20, 20)), changed)


def test_a_network_can_be_pickled_and_copied_after_use() -> None:
    backbone = random_backbone(BEIT)
    expected = backbone(images(20, 20))
    for other in (pickle.loads(pickle.dumps(backbone)), copy.deepcopy(backbone)):
        assert torch.equal(other(images(20, 20)), expected)


def test_a_relative_bias_equals_its_definition_on_its_own_grid() -> None:
    bias = RelativeBias((2, 3), heads=2)
    bias.table.data.copy_(torch.arange(bias.table.numel()).view_as(bias.table))
    found = bias((2, 3), torch.float32)[0]
    places = [(y, x) for y in range(2) for x in range(3)]
    for query, (qy, qx) in enumerate(places):
        for key, (ky, kx) in enumerate(places):
            row = (qy - ky + 1) * 5 + (qx - kx + 2)
            assert torch.equal(found[:, query + 1, key + 1], bias.table[row])
    assert torch.equal(found[:, 0, 1], bias.table[15])
    assert torch.equal(found[:, 1, 0], bias.table[16])
    assert torch.equal(found[:, 0, 0], bias.table[17])
    assert int(relative_index((2, 3), torch.device("cpu")).max()) == 17


def test_positions_of_the_learned_grid_are_not_touched_and_cls_never_is() -> None:
    table = torch.randn(26, 8)
    assert torch.equal(interpolate_positions(table, (5, 5), False), table)
    for antialias in (False, True):
        resized = interpolate_positions(table, (3, 7), antialias)
        assert resized.shape == (22, 8)
        assert torch.equal(resized[0], table[0])


def test_a_bias_on_a_grid_that_is_not_square_needs_to_be_told_so() -> None:
    backbone = random_backbone(BEIT)
    tokens = backbone.embed(images(20, 12))
    with pytest.raises(ValueError, match=r"15 patches do not make a square: pass grid"):
        backbone.run(tokens)


def test_pictures_that_patches_do_not_fill_are_refused_with_a_size_that_works() -> None:
    with pytest.raises(UsageError, match="22 x 20 px do not divide into patches of 4 px") as caught:
        random_backbone(IMAGE).embed(images(22, 20))
    assert caught.value.way_out == "choose a size that is a multiple of 4, such as 24"


def test_a_row_of_pads_alone_gives_no_nan() -> None:
    backbone = random_backbone(TEXT)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0] = True
    assert bool(backbone(torch.ones(2, 8, dtype=torch.int32), mask).isfinite().all())


@pytest.mark.parametrize("spec", [IMAGE, BEIT, TEXT], ids=["vit", "beit", "bert"])
@pytest.mark.parametrize("queries", [1, 3])
def test_asking_for_the_first_tokens_of_the_last_block_gives_the_same_numbers(spec: BackboneSpec, queries: int) -> None:
    stack = random_backbone(spec).stack
    tokens = torch.randn(2, 26, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(26) < torch.tensor([[26], [9]])
    whole, few = stack.run(tokens, mask_BT=mask), stack.run(tokens, mask_BT=mask, queries=queries)
    for one, other in zip([whole.hidden[-1], whole.ffn[-1]], [few.hidden[-1], few.ffn[-1]], strict=True):
        assert other.shape == (2, queries, 16)
        torch.testing.assert_close(other, one[:, :queries])
    assert torch.equal(few.hidden[0], whole.hidden[0])


@pytest.mark.parametrize("spec", [IMAGE, BEIT, TEXT], ids=["vit", "beit", "bert"])
def test_training_computes_what_evaluation_does(spec: BackboneSpec) -> None:
    """In training on a CPU attention is spelled out; in evaluation torch's fused kernel is used."""
    taken = random_backbone(spec).stack.take(0, 2)
    tokens = torch.randn(2, 26, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(26) < torch.tensor([[26], [9]])
    trained = taken.run(tokens, mask_BT=mask)
    with torch.no_grad():
        evaluated = taken.run(tokens, mask_BT=mask)
    for one, other in zip(trained.hidden + trained.ffn, evaluated.hidden + evaluated.ffn, strict=True):
        torch.testing.assert_close(one[mask], other[mask], atol=1e-5, rtol=1e-5)


def test_a_row_of_pads_alone_gives_no_nan_in_gradients_either() -> None:
    taken = random_backbone(TEXT).stack.take(0, 2)
    mask = torch.tensor([[True] * 8, [False] * 8])
    hidden = taken(torch.randn(2, 8, 16), mask)[-1]
    (hidden * mask[..., None]).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in taken.parameters())


def test_a_mask_and_a_bias_work_together() -> None:
    block = Block(BlockSpec(16, 2, 24)).eval()
    tokens, bias = torch.randn(2, 6, 16), torch.randn(1, 2, 6, 6)
    mask = torch.arange(6).expand(2, -1) < 4
    with torch.no_grad():
        masked, _ = block(tokens, bias, mask)
        short, _ = block(tokens[:, :4], bias[..., :4, :4], None)
    torch.testing.assert_close(masked[:, :4], short)
