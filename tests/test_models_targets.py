"""Targets against their equations written out in float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from emkum.errors import NewerFormat, UsageError
from emkum.models import targets
from emkum.models.targets import LayersRule, named_rule

EPS = 1e-5


def layers_reference(hidden: list[np.ndarray], lengths: list[int], final_layer_norm: bool) -> np.ndarray:
    """Y = LN(mean_l IN(H_l)), sample by sample, over the real tokens."""
    out = np.zeros_like(hidden[0])
    for sample, length in enumerate(lengths):
        normed = []
        for layer in hidden:
            real = layer[sample, :length]
            normed.append((real - real.mean(0)) / np.sqrt(real.var(0) + EPS))
        mean = np.mean(normed, axis=0)
        if final_layer_norm:
            centred = mean - mean.mean(1, keepdims=True)
            mean = centred / np.sqrt(mean.var(1, keepdims=True) + EPS)
        out[sample, :length] = mean
    return out


def random_layers(shape: tuple[int, ...], num: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(loc=index, scale=1 + index, size=shape) for index in range(num)]


@pytest.mark.parametrize("norm", [True, False], ids=["images", "without-norm"])
def test_layers_of_pictures_are_the_normed_mean_over_all_tokens(norm: bool) -> None:
    hidden = random_layers((3, 7, 5))
    found = targets.layers([torch.from_numpy(h).float() for h in hidden], None, final_layer_norm=norm)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), layers_reference(hidden, [7, 7, 7], norm), atol=2e-6)


def test_layers_of_texts_leave_pads_out_of_the_statistics_and_zero() -> None:
    hidden, lengths = random_layers((3, 9, 5)), [9, 4, 1]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    found = targets.layers([torch.from_numpy(h).float() for h in hidden], mask, final_layer_norm=False)
    np.testing.assert_allclose(found.numpy(), layers_reference(hidden, lengths, False), atol=2e-6)
    assert not found[~mask].any()


def test_more_pads_whatever_they_hold_change_nothing() -> None:
    hidden = [torch.from_numpy(h).float() for h in random_layers((2, 6, 5))]
    short = targets.layers(hidden, torch.ones(2, 6, dtype=torch.bool), final_layer_norm=False)
    garbage = torch.full((2, 10, 5), float("nan"))
    garbage[:, ::2] = float("inf")
    mask = torch.arange(16).expand(2, -1) < 6
    long = targets.layers([torch.cat([h, garbage], 1) for h in hidden], mask, final_layer_norm=False)
    torch.testing.assert_close(long[:, :6], short)
    assert not long[:, 6:].any()


def test_layers_without_a_mask_equal_a_mask_of_real_tokens_alone() -> None:
    hidden = [torch.from_numpy(h).float() for h in random_layers((2, 6, 5))]
    for norm in (True, False):
        everything = torch.ones(2, 6, dtype=torch.bool)
        one, other = targets.layers(hidden, None, norm), targets.layers(hidden, everything, norm)
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_layers_are_computed_in_float32_from_bfloat16_and_may_come_one_by_one() -> None:
    hidden = [torch.from_numpy(h).bfloat16() for h in random_layers((2, 6, 5))]
    found = targets.layers(iter(hidden), None, final_layer_norm=True)
    assert found.dtype == torch.float32
    assert torch.equal(found, targets.layers([h.float() for h in hidden], None, final_layer_norm=True))
    with pytest.raises(ValueError, match="no layers"):
        targets.layers([], None, True)


@pytest.mark.parametrize("masked", [False, True])
def test_layers_have_the_right_gradient(masked: bool) -> None:
    hidden = [torch.from_numpy(h).requires_grad_(True) for h in random_layers((2, 4, 3), num=2)]
    mask = torch.tensor([[True] * 4, [True, True, False, False]]) if masked else None
    assert torch.autograd.gradcheck(lambda *h: targets.layers(h, mask, not masked), hidden)


def test_a_channel_that_never_varies_gives_zeros_and_not_nan() -> None:
    constant = torch.full((1, 5, 3), 7.0)
    assert not targets.layers([constant], None, final_layer_norm=True).any()
    mask = torch.zeros(1, 5, dtype=torch.bool)
    assert not targets.layers([constant], mask, final_layer_norm=False).any()


def test_cls_patches_and_logits_are_the_tokens_they_say() -> None:
    final = torch.randn(2, 8, 5)
    assert torch.equal(targets.cls(final), final[:, 0])
    assert torch.equal(targets.patches(final, num_prefix=3), final[:, 3:])
    head, bias = torch.randn(4, 5), torch.randn(4)
    expected = final[:, 0].double().numpy() @ head.double().numpy().T + bias.double().numpy()
    np.testing.assert_allclose(targets.logits(final, head, bias).numpy(), expected, atol=1e-5)


# --- rules ---------------------------------------------------------------------------------------------------


def norm_reference(real: np.ndarray, norm: str) -> np.ndarray:
    """One layer of one sample, [T, D]: instance norm over its tokens, layer norm over its channels, or as it is."""
    if norm == "none":
        return real
    axis = 0 if norm == "instance" else 1
    return (real - real.mean(axis, keepdims=True)) / np.sqrt(real.var(axis, keepdims=True) + EPS)


def rule_reference(
    rule: LayersRule, hidden: list[np.ndarray], ffn: list[np.ndarray], lengths: list[int], num_prefix: int
) -> np.ndarray:
    """The target of a rule, in float64, one sample and one layer after the other."""
    layers = (hidden if rule.site == "block" else ffn)[rule.skip :]
    layers = layers[-rule.last :] if rule.last else layers
    first = num_prefix if rule.prefix == "drop" else 0
    out = np.zeros_like(layers[0][:, first:])
    for sample, length in enumerate(lengths):
        mean = np.mean([norm_reference(layer[sample, first:length], rule.norm) for layer in layers], axis=0)
        out[sample, : length - first] = norm_reference(mean, "layer") if rule.final_layer_norm else mean
    return out


ALL_RULES = [
    LayersRule(site, last, skip, norm, final, prefix)
    for site in ("block", "ffn")
    for last, skip in ((None, 0), (2, 0), (None, 1), (9, 1))
    for norm in ("instance", "layer", "none")
    for final in (True, False)
    for prefix in ("keep", "drop")
]


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: "-".join(map(str, rule.to_json().values())))
def test_every_rule_is_its_equation_whatever_the_pads_hold(rule: LayersRule, masked: bool) -> None:
    hidden, ffn = random_layers((3, 7, 5)), [-2 * layer**2 for layer in random_layers((3, 7, 5))]
    lengths = [7, 5, 3] if masked else [7, 7, 7]
    want = rule_reference(rule, hidden, ffn, lengths, num_prefix=2)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    ours = [[torch.from_numpy(layer).float() for layer in layers] for layers in (hidden, ffn)]
    if masked:
        ours = [[layer.masked_fill(~mask[..., None], float("nan")) for layer in layers] for layers in ours]
    before = [[layer.clone() for layer in layers] for layers in ours]
    found = targets.layers_by_rule(rule, *ours, mask if masked else None, num_prefix=2)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), want, atol=5e-6, rtol=1e-5)
    for layers, kept in zip(ours, before, strict=True):  # in place, but not over what was given
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(layers, kept, strict=True))


def test_the_rule_of_the_thesis_gives_the_bits_of_the_target_as_it_was() -> None:
    hidden = [torch.from_numpy(h).float() for h in random_layers((2, 6, 5))]
    for modality, mask in (("image", None), ("text", torch.arange(6).expand(2, -1) < 4)):
        rule = named_rule("thesis", modality)
        found = targets.layers_by_rule(rule, hidden, [], mask)
        assert torch.equal(found, targets.layers(hidden, mask, final_layer_norm=modality == "image"))


@pytest.mark.parametrize(
    ("name", "modality", "prenet", "rule"),
    [
        ("thesis", "image", 2, LayersRule("block", None, 0, "instance", True, "keep")),
        ("thesis", "text", 0, LayersRule("block", None, 0, "instance", False, "keep")),
        ("data2vec", "image", 0, LayersRule("block", 6, 0, "layer", True, "drop")),
        ("data2vec", "text", 0, LayersRule("ffn", 10, 0, "layer", False, "keep")),
        ("data2vec", "audio", 0, LayersRule("ffn", 8, 0, "instance", False, "keep")),
        ("data2vec2", "image", 2, LayersRule("ffn", None, 2, "instance", True, "drop")),
        ("data2vec2", "text", 0, LayersRule("ffn", None, 0, "instance", False, "keep")),
        ("data2vec2", "audio", 0, LayersRule("ffn", 8, 0, "instance", False, "keep")),
        ("data2vec2", "audio", 8, LayersRule("ffn", None, 8, "instance", False, "keep")),
    ],
)
def test_the_named_rules_are_those_of_the_papers_code(name: str, modality: str, prenet: int, rule: LayersRule) -> None:
    assert named_rule(name, modality, prenet) == rule
    assert targets.rule_from_text(name, modality, prenet) == rule


def test_data2vec2_of_pictures_is_make_targets_of_fairseq() -> None:
    """As fairseq writes it: extra tokens off, [B, T, C] -> [B, C, T], F.instance_norm, sum over layers, layer norm."""
    ffn = [torch.from_numpy(layer) for layer in random_layers((3, 7, 5), num=6)]
    layers = [torch.nn.functional.instance_norm(layer[:, 1:].transpose(1, 2)) for layer in ffn[2:]]
    summed = layers[0].transpose(1, 2).clone()
    for layer in layers[1:]:
        summed.add_(layer.transpose(1, 2))
    want = torch.nn.functional.layer_norm(summed.div_(len(layers)), (5,))
    found = targets.layers_by_rule(named_rule("data2vec2", "image", prenet=2), [], ffn, None, num_prefix=1)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_one_token_alone_gives_zeros_under_instance_norm_and_numbers_under_layer_norm() -> None:
    hidden = [torch.from_numpy(h).float() for h in random_layers((2, 1, 5))]
    assert not targets.layers_by_rule(LayersRule(norm="instance", final_layer_norm=True), hidden, []).any()
    found = targets.layers_by_rule(LayersRule(norm="layer"), hidden, [])
    assert torch.isfinite(found).all() and found.any()  # noqa: PT018


@pytest.mark.parametrize("norm", ["instance", "layer", "none"])
def test_the_gradient_of_a_rule_is_right_and_not_nan_where_pads_are(norm: str) -> None:
    rule = LayersRule("ffn", 2, 1, norm, True, "drop")  # type: ignore[arg-type]
    ffn = [torch.from_numpy(layer).requires_grad_(True) for layer in random_layers((2, 5, 3))]
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    assert torch.autograd.gradcheck(lambda *f: targets.layers_by_rule(rule, [], list(f), mask, 1), ffn)
    dirty = [layer.detach().masked_fill(~mask[..., None], float("nan")).requires_grad_(True) for layer in ffn]
    targets.layers_by_rule(rule, [], dirty, mask, 1).square().sum().backward()
    assert dirty[0].grad is None  # skipped, or earlier than the last two
    assert torch.isfinite(dirty[-1].grad).all()  # type: ignore[arg-type]


def test_the_blocks_a_rule_counts() -> None:
    assert list(LayersRule().counted(4)) == [0, 1, 2, 3]
    assert list(LayersRule(last=2).counted(4)) == [2, 3]
    assert list(LayersRule(last=9).counted(4)) == [0, 1, 2, 3]
    assert list(LayersRule(skip=3, last=2).counted(4)) == [3]
    assert list(LayersRule(skip=4).counted(4)) == []


@pytest.mark.parametrize("rule", ALL_RULES[::7], ids=str)
def test_a_rule_survives_json_and_says_what_it_is(rule: LayersRule) -> None:
    assert LayersRule.from_json(json.loads(json.dumps(rule.to_json()))) == rule
    assert len({other.words for other in ALL_RULES}) == len(ALL_RULES)


def test_rules_in_words() -> None:
    words = "mean over all blocks of instance-normalised outputs"  # as fingerprints of emkum 0.1 and 0.2 say it
    assert named_rule("thesis", "text").words == words
    assert named_rule("thesis", "image").words == f"{words}, layer norm"
    assert (
        named_rule("data2vec", "text").words == "mean over the last 10 blocks of layer-normalised feed-forward outputs"
    )
    assert named_rule("data2vec2", "image", 2).words == (
        "mean over all blocks but the first 2 of instance-normalised feed-forward outputs, layer norm, CLS and "
        "registers left out"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("d2v", "--layers d2v: no such rule"),
        ("site=mlp", "site 'mlp' of a layers rule is none of"),
        ("size=ffn", "'size=ffn' is not known"),
        ("last=some", "'last=some' is not known"),
        ("last=0", "the last 0 blocks"),
        ("skip=-1", "'skip=-1' is not known"),
        ("final=maybe", "'final=maybe' is not known"),
        ("site=ffn,last", "'last' is not known"),
        ("last=1_0", "'last=1_0' is not known"),
        ("last=+2", "'last=+2' is not known"),
        ("skip=\u0661", "'skip=\u0661' is not known"),
        ("last=2,skip=1,last=3", "--layers last=2,skip=1,last=3: last stands there twice"),
        (" ", "--layers without a rule"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_with_all_that_can(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        targets.rule_from_text(text, "image")
    assert words in caught.value.what
    keys = "site=block|ffn, last=N|all, skip=N, norm=instance|layer|none, final=yes|no"
    assert ("give every key once" if "twice" in words else keys) in caught.value.way_out


@pytest.mark.parametrize("modality", ["image", "text", "audio"])
def test_a_rule_as_text_is_read_back_as_the_same_rule(modality: str) -> None:
    for rule in (*ALL_RULES, *(named_rule(name, modality, 2) for name in targets.RULES)):
        assert targets.rule_from_text(targets.rule_as_text(rule, modality), modality) == rule
    assert targets.rule_as_text(named_rule("data2vec", modality), modality) == "data2vec"
    assert targets.rule_as_text(named_rule("thesis", modality), modality) == "thesis"
    assert targets.rule_as_text(LayersRule("ffn", None, 2, "layer", True, "drop"), modality) == (
        "site=ffn,last=all,skip=2,norm=layer,final=yes,prefix=drop"
    )


def test_keys_that_are_left_out_are_those_of_the_thesis() -> None:
    assert targets.rule_from_text("site=ffn, last=10,norm=layer,final=no,prefix=drop", "image") == LayersRule(
        "ffn", 10, 0, "layer", False, "drop"
    )
    assert targets.rule_from_text("last=all", "image") == named_rule("thesis", "image")
    assert targets.rule_from_text("skip=1", "text") == LayersRule(skip=1)


def test_a_field_without_a_rule_has_the_thesiss_and_an_unknown_one_is_of_a_newer_emkum() -> None:
    assert targets.recorded_rule({}, "image") == named_rule("thesis", "image")
    rule = named_rule("data2vec2", "text")
    assert targets.recorded_rule({"layers": rule.to_json()}, "text") == rule
    for strange in ({"site": "attention"}, {"median": True}, "thesis"):
        with pytest.raises(NewerFormat, match="which this emkum does not know"):
            targets.recorded_rule({"layers": strange}, "image")


# --- mean and top logits -------------------------------------------------------------------------------------


def test_the_mean_is_over_patches_or_over_real_tokens_special_ones_among_them() -> None:
    final = np.random.default_rng(0).normal(size=(3, 7, 5))
    tokens = torch.from_numpy(final).float()
    np.testing.assert_allclose(targets.mean(tokens, num_prefix=2).numpy(), final[:, 2:].mean(1), atol=1e-6)
    lengths = [7, 2, 0]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    dirty = tokens.masked_fill(~mask[..., None], float("nan"))
    want = [final[i, :length].mean(0) if length else np.zeros(5) for i, length in enumerate(lengths)]
    np.testing.assert_allclose(targets.mean(dirty, mask_BT=mask).numpy(), want, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_top_logits_give_the_exact_probabilities_of_the_classes_kept(k: int) -> None:
    logits = np.random.default_rng(0).normal(scale=4, size=(5, 7))
    top = targets.top_logits(torch.from_numpy(logits).float(), k)
    order = np.argsort(-logits, axis=1)
    np.testing.assert_array_equal(top.classes_BK.numpy(), order[:, :k])
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    values, rest = top.values_BK.double().numpy(), top.rest_B.double().numpy()
    assert (np.diff(values, axis=1) <= 0).all()
    total = np.exp(values).sum(1) + np.exp(rest)
    np.testing.assert_allclose(np.exp(values) / total[:, None], np.take_along_axis(softmax, order[:, :k], 1), rtol=1e-5)
    np.testing.assert_allclose(np.exp(rest) / total, np.take_along_axis(softmax, order[:, k:], 1).sum(1), rtol=1e-5)


def test_of_equal_logits_the_lower_class_comes_first_and_large_ones_do_not_overflow() -> None:
    top = targets.top_logits(torch.tensor([[1e4, 3.0, 1e4, 1e4, -1e4]]), 2)
    assert top.classes_BK.tolist() == [[0, 2]]
    assert top.rest_B.tolist() == [1e4]
    everything = targets.top_logits(torch.tensor([[1.0, 2.0]]), 2)
    assert everything.classes_BK.tolist() == [[1, 0]]
    assert everything.rest_B.tolist() == [float("-inf")]
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"the {k} largest of 5 logits"):
            targets.top_logits(torch.zeros(1, 5), k)


def test_packed_top_logits_are_unpacked_as_they_were() -> None:
    top = targets.top_logits(torch.randn(4, 9, generator=torch.Generator().manual_seed(0)), 3)
    packed = targets.packed(top)
    assert packed.shape == (4, 7)
    again = targets.unpacked(packed)
    assert torch.equal(again.values_BK, top.values_BK)
    assert torch.equal(again.classes_BK, top.classes_BK)
    assert torch.equal(again.rest_B, top.rest_B)
