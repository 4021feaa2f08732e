"""Masked modelling and the three branches: what is hidden, and losses against plain float64 references."""

from __future__ import annotations

import math
import random as random_module

import numpy as np
import pytest
import torch
from test_objectives_codes import random, softmax
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from emkum.stage2_train.objectives.branches import Branches, BranchWeights, branches_mse
from emkum.stage2_train.objectives.masking import IGNORED, Vocabulary, mask_patches, mask_words, vocabulary
from emkum.stage2_train.objectives.mvlm import MaskedPatchHead, MaskedWordHead, masked_ce, tokens_at

CLS, SEP, MASK, PAD = 1, 2, 3, 0


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def words_of(size: int = 50) -> Vocabulary:
    return vocabulary(size, {PAD, CLS, SEP}, MASK, "cpu")


def texts(lengths: list[int], longest: int, size: int = 50, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids with CLS in front, SEP at the end and padding; lengths count both."""
    ids = torch.randint(MASK + 1, size, (len(lengths), longest), generator=generator(seed))
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    ids[:, 0] = CLS
    ids[torch.arange(len(lengths)), torch.tensor(lengths).clamp(min=1) - 1] = SEP
    return ids.masked_fill(~mask, PAD), mask


# --- words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.15, 0.5, 1.0])
def test_of_each_text_its_share_of_words_is_chosen_and_never_a_special_token(share: float) -> None:
    lengths = [12, 12, 3, 5, 8, 2]  # the last has no word
    ids, mask = texts(lengths, 12)
    for seed in range(20):
        found = mask_words(ids, mask, words_of(), share, generator(seed))
        for row, length in enumerate(lengths):
            chosen = found.labels_BK[row] != IGNORED
            expected = 0 if length == 2 else max(1, math.floor(share * (length - 2) + 0.5))
            assert int(chosen.sum()) == expected
            places = found.places_BK[row, chosen]
            assert len(set(places.tolist())) == expected
            assert torch.equal(found.labels_BK[row, chosen], ids[row, places])
            assert not set(ids[row, places].tolist()) & {PAD, CLS, SEP, MASK}
            others = torch.ones(12, dtype=torch.bool).index_fill(0, places, False)
            assert torch.equal(found.ids_BL[row, others], ids[row, others])


def test_eight_in_ten_chosen_words_are_masked_one_is_another_and_one_stays() -> None:
    ids, mask = texts([64] * 400, 64, size=1000)
    found = mask_words(ids, mask, words_of(1000), 0.5, generator())
    chosen = found.labels_BK != IGNORED
    shown, stood = found.ids_BL.gather(1, found.places_BK)[chosen], found.labels_BK[chosen]
    assert (shown == MASK).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (shown == stood).float().mean().item() == pytest.approx(0.1, abs=0.02)
    other = shown[(shown != MASK) & (shown != stood)]
    assert len(other) / len(shown) == pytest.approx(0.1, abs=0.02)
    assert other.min() > MASK  # a word, never a special token
    assert other.max() == 999
    assert other.float().mean().item() == pytest.approx(500, abs=30)


def test_what_lies_in_the_padding_is_no_word_whatever_its_id() -> None:
    ids, mask = texts([12] * 20, 12)
    mask[:, 4:] = False
    found = mask_words(ids, mask, words_of(), 1.0, generator())
    assert (found.labels_BK != IGNORED).sum(dim=1).tolist() == [3] * 20
    assert torch.equal(found.ids_BL[:, 4:], ids[:, 4:])


def test_every_word_is_chosen_as_often() -> None:
    ids, mask = texts([10] * 3000, 10)
    found = mask_words(ids, mask, words_of(), 0.25, generator())
    counts = torch.bincount(found.places_BK[found.labels_BK != IGNORED], minlength=10)
    assert counts[[0, 9]].tolist() == [0, 0]
    assert (counts[1:9] / counts.sum()).tolist() == pytest.approx([1 / 8] * 8, abs=0.015)


def test_the_same_generator_hides_the_same_words_and_another_does_not() -> None:
    ids, mask = texts([12] * 4, 12)
    first, again, other = (mask_words(ids, mask, words_of(), 0.3, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.ids_BL, again.ids_BL)
    assert torch.equal(first.places_BK, again.places_BK)
    assert not torch.equal(first.ids_BL, other.ids_BL)


def test_padding_to_another_length_hides_the_same_words() -> None:
    ids, mask = texts([6, 5], 6)
    longer_ids, longer_mask = (nn.functional.pad(each, (0, 4)) for each in (ids, mask))
    short = mask_words(ids, mask, words_of(), 0.5, generator(), length=10)
    long = mask_words(longer_ids, longer_mask, words_of(), 0.5, generator(), length=10)
    assert torch.equal(short.ids_BL, long.ids_BL[:, :6])
    assert not torch.equal(short.ids_BL, ids)


def test_a_batch_of_padding_alone_has_no_word_hidden_and_costs_nothing() -> None:
    ids, mask = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.bool)
    found = mask_words(ids, mask, words_of(), 0.5, generator())
    assert torch.equal(found.ids_BL, ids)
    assert (found.labels_BK == IGNORED).all()
    tokens = torch.full((2, 5, 4), torch.nan, requires_grad=True)
    head = nn.Linear(4, 50)
    loss = masked_ce(head(tokens_at(tokens, found.places_BK, found.labels_BK)), found.labels_BK)
    loss.loss.backward()
    assert loss.loss.item() == loss.accuracy.item() == 0
    assert not tokens.grad.any()  # type: ignore[union-attr]
    assert not head.weight.grad.any()


# --- patches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "share", "hidden"), [((14, 14), 0.4, 78), ((7, 9), 0.4, 25), ((2, 2), 0.1, 1)])
def test_every_picture_hides_as_many_patches_as_asked(grid: tuple[int, int], share: float, hidden: int) -> None:
    found = mask_patches(50, grid, share, generator(), "cpu")
    assert found.places_BM.shape == (50, hidden)
    assert found.mask_BN.sum(dim=1).tolist() == [hidden] * 50
    for mask, places in zip(found.mask_BN, found.places_BM, strict=True):
        assert torch.equal(mask.nonzero()[:, 0], places)
    assert len({tuple(row.tolist()) for row in found.places_BM}) > 1


def plain_blocks(draw: random_module.Random, size: int, hidden: int) -> np.ndarray:
    """One picture, block by block until none fits any more: BEiT's algorithm 1. It may hide a few fewer."""
    mask = np.zeros((size, size))
    tries = 0
    while mask.sum() < hidden and tries < 10:
        left = hidden - mask.sum()
        area, ratio = draw.uniform(16, left), math.exp(draw.uniform(math.log(0.3), -math.log(0.3)))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height < size and width < size:
            top, start = draw.randint(0, size - height), draw.randint(0, size - width)
            block = np.zeros((size, size))
            block[top : top + height, start : start + width] = 1
            if 0 < (block * (1 - mask)).sum() <= left:
                mask, tries = np.maximum(mask, block), 0
        tries += 1
    return mask


def test_hidden_patches_lie_in_blocks_as_the_plain_algorithm_lays_them() -> None:
    """How often each place is hidden, and how long the outlines are: means over pictures."""
    draw = random_module.Random(0)
    plain = np.stack([plain_blocks(draw, 14, 78) for _ in range(600)])
    found = mask_patches(600, (14, 14), 0.4, generator(), "cpu").mask_BN.view(-1, 14, 14).numpy().astype(float)
    assert np.abs(plain.mean(0) - found.mean(0)).max() < 0.13  # the corners 0.05, the middle 0.7; six deviations
    assert np.abs(plain.mean(0) - found.mean(0)).mean() < 0.03
    outlines = [sum(np.abs(np.diff(masks, axis=axis)).sum() for axis in (1, 2)) / 600 for masks in (plain, found)]
    assert outlines[1] == pytest.approx(outlines[0], rel=0.05)  # 41 here; 175 if patches were drawn one by one


def test_the_same_generator_hides_the_same_patches() -> None:
    first, again, other = (mask_patches(3, (7, 7), 0.4, generator(seed), "cpu").mask_BN for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_hiding_patches_leaves_the_others_and_the_prefix() -> None:
    head = MaskedPatchHead(3, 5).double()
    tokens, positions = random(2, 6, 3), random(6, 3, seed=1)  # CLS, a register and four patches
    mask = torch.tensor([[True, False, False, True], [False] * 4])
    shown, placed = head.hide(tokens, mask), head.hide(tokens, mask, positions)
    for b in range(2):
        for t in range(6):
            hidden = t >= 2 and bool(mask[b, t - 2])
            token = head.mask_token_D if hidden else tokens[b, t]
            assert torch.equal(shown[b, t], token)
            assert torch.equal(placed[b, t], token + positions[t] if hidden else token)


# --- the loss ----------------------------------------------------------------------------------------------------


def test_masked_ce_is_the_mean_over_the_hidden_places() -> None:
    logits, labels = random(3, 4, 6), torch.tensor([[5, IGNORED, 0, 1], [IGNORED] * 4, [2, 2, IGNORED, IGNORED]])
    found = masked_ce(logits, labels)
    places = [(b, k) for b in range(3) for k in range(4) if labels[b, k] != IGNORED]
    losses = [-math.log(softmax(logits[b, k].numpy())[labels[b, k]]) for b, k in places]
    right = [int(logits[b, k].argmax()) == labels[b, k] for b, k in places]
    assert found.loss.item() == pytest.approx(np.mean(losses), rel=1e-7)
    assert found.accuracy.item() == pytest.approx(np.mean(right))


def test_masked_gradients_are_those_of_finite_differences_through_the_places() -> None:
    places, labels = torch.tensor([[2, 0], [1, 3]]), torch.tensor([[1, 4], [0, IGNORED]])

    def loss(tokens: Tensor, weight: Tensor) -> Tensor:
        return masked_ce(tokens_at(tokens, places, labels) @ weight, labels).loss

    assert torch.autograd.gradcheck(loss, (random(2, 4, 3).requires_grad_(), random(3, 5, seed=1).requires_grad_()))


def test_tokens_are_taken_where_the_words_were() -> None:
    tokens = random(2, 4, 3)
    taken = tokens_at(tokens, torch.tensor([[2, 0], [1, 3]]), torch.tensor([[1, 4], [0, IGNORED]]))
    assert torch.equal(taken[0], tokens[0, [2, 0]])
    assert torch.equal(taken[1, 0], tokens[1, 1])
    assert not taken[1, 1].any()


def test_the_word_head_multiplies_with_the_given_embeddings() -> None:
    head, embeddings = MaskedWordHead(4, 7, embedding_width=3).double(), random(7, 3, seed=1)
    with torch.no_grad():
        head.bias_V.copy_(random(7, seed=2))
    tokens = random(2, 1, 4)
    found = head(tokens, embeddings).detach()
    for row in range(2):
        linear = head.transform.weight.detach().numpy() @ tokens[row, 0].numpy() + head.transform.bias.detach().numpy()
        curved = np.array([x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in linear])
        normed = (curved - curved.mean()) / math.sqrt(curved.var() + 1e-12)
        plain = [embeddings[v].numpy() @ normed + head.bias_V[v].item() for v in range(7)]
        assert np.allclose(found[row, 0].numpy(), plain)
    assert all(parameter is not embeddings for parameter in head.parameters())
    assert "embeddings_VE" not in head.state_dict()


# --- branches ----------------------------------------------------------------------------------------------------


def network(seed: int, *, width: int = 4) -> Branches:
    images, texts = random(2, 5, width, seed=seed), random(2, 2, 3, width, seed=seed + 1)
    return Branches(images, *texts)


def test_branches_are_the_weighted_sum_of_means_over_real_tokens() -> None:
    student, teacher, mask = network(0), network(10), torch.tensor([[True, True, False], [True, False, False]])
    found = branches_mse(student, teacher, mask, BranchWeights(image=2.0, text=3.0, fused=0.5))

    def plain(name: str, real: list[tuple[int, int]]) -> float:
        ours, theirs = getattr(student, name).numpy(), getattr(teacher, name).numpy()
        return float(np.mean([((ours[b, t] - theirs[b, t]) ** 2).mean() for b, t in real]))

    words = [(0, 0), (0, 1), (1, 0)]
    image = plain("image_BTD", [(b, t) for b in range(2) for t in range(5)])
    text, fused = plain("text_BLD", words), plain("fused_BLD", words)
    assert found.image_loss.item() == pytest.approx(image, rel=1e-7)
    assert found.text_loss.item() == pytest.approx(text, rel=1e-7)
    assert found.fused_loss.item() == pytest.approx(fused, rel=1e-7)
    assert found.loss.item() == pytest.approx(2 * image + 3 * text + 0.5 * fused, rel=1e-7)


def test_branch_gradients_are_those_of_finite_differences() -> None:
    teacher, mask = network(10, width=2), torch.tensor([[True, True, False], [True, False, False]])

    def loss(*parts: Tensor) -> Tensor:
        return branches_mse(Branches(*parts), teacher, mask, BranchWeights(fused=2.0)).loss

    student = network(0, width=2)
    inputs = tuple(part.requires_grad_() for part in (student.image_BTD, student.text_BLD, student.fused_BLD))
    assert torch.autograd.gradcheck(loss, inputs)


def test_branches_of_padding_alone_cost_the_picture_only_and_do_not_broadcast() -> None:
    student, teacher = network(0), network(10)
    found = branches_mse(student, teacher, torch.zeros(2, 3, dtype=torch.bool), BranchWeights())
    assert found.text_loss.item() == found.fused_loss.item() == 0
    assert found.loss.item() == found.image_loss.item() > 0
    narrow = Branches(teacher.image_BTD, teacher.text_BLD[:, :1], teacher.fused_BLD)
    with pytest.raises(AssertionError, match="text_BLD"):
        branches_mse(student, narrow, torch.ones(2, 3, dtype=torch.bool), BranchWeights())


# --- all ---------------------------------------------------------------------------------------------------------


def test_gradients_are_finite_under_autocast_to_bfloat16() -> None:
    ids, mask = texts([8, 4], 8)
    hidden, patches = (
        mask_words(ids, mask, words_of(), 0.3, generator()),
        mask_patches(2, (3, 3), 0.4, generator(), "cpu"),
    )
    word_head, patch_head = MaskedWordHead(6, 50), MaskedPatchHead(6, 5)
    embeddings = random(50, 6, seed=3).float().requires_grad_()
    text, picture = random(2, 8, 6).bfloat16().requires_grad_(), random(2, 10, 6, seed=1).float().requires_grad_()
    codes = torch.randint(5, patches.places_BM.shape, generator=generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        words = masked_ce(word_head(tokens_at(text, hidden.places_BK, hidden.labels_BK), embeddings), hidden.labels_BK)
        seen = patch_head.hide(picture, patches.mask_BN)[:, 1:]
        named = masked_ce(patch_head(tokens_at(seen, patches.places_BM, codes)), codes)
        branches = branches_mse(
            Branches(seen, text, text), Branches(seen.detach() + 1, text.detach(), text.detach()), mask, BranchWeights()
        )
    loss = words.loss + named.loss + branches.loss
    assert loss.dtype == torch.float32
    loss.backward()
    for leaf in (text, picture, embeddings, *word_head.parameters(), *patch_head.parameters()):
        assert torch.isfinite(leaf.grad).all()  # type: ignore[arg-type]
        assert leaf.grad.any()  # type: ignore[union-attr]


def test_nothing_waits_for_the_device() -> None:
    """Fake tensors have shapes and no numbers: what asks for one fails there."""
    words, word_head, patch_head = words_of(), MaskedWordHead(6, 50), MaskedPatchHead(6, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids, mask, tokens = torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8).bool(), torch.randn(2, 10, 6)
        hidden = mask_words(ids, mask, words, 0.3, generator())
        patches = mask_patches(2, (3, 3), 0.4, generator(), "cpu")
        taken = tokens_at(tokens[:, :8], hidden.places_BK, hidden.labels_BK)
        loss = masked_ce(word_head(taken, torch.randn(50, 6)), hidden.labels_BK).loss
        shown = patch_head.hide(tokens, patches.mask_BN)
        sides = Branches(tokens, tokens[:, :8], tokens[:, :8])
        loss = loss + patch_head(shown).sum() + branches_mse(sides, sides, mask, BranchWeights()).loss
        assert loss.shape == ()
