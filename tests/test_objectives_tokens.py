"""Objectives of words and patches: against plain float64 loops, gradients, and captions that could break them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_objectives import plain_cross_entropy, random
from torch import Tensor

from emkum.stage2_train.objectives.cmli import BELOW, cmli, token_similarities
from emkum.stage2_train.objectives.itc import itc, unit
from emkum.stage2_train.objectives.target_cmli import empty_target, match, target_cmli
from emkum.stage2_train.objectives.words import words_only

LENGTHS = [5, 2, 4, 3]  # with CLS and SEP: three words, none, two, one


def words(lengths: list[int] = LENGTHS, width: int = 6) -> Tensor:
    return words_only(torch.arange(width) < torch.tensor(lengths)[:, None])


def directions(vectors: Tensor) -> np.ndarray:
    return vectors.numpy() / np.linalg.norm(vectors.numpy(), axis=-1, keepdims=True)


# --- words -------------------------------------------------------------------------------------------------------


def test_words_lie_between_the_first_token_and_the_last_real_one() -> None:
    found = words([6, 5, 3, 2, 1, 0])
    expected = [[1, 2, 3, 4], [1, 2, 3], [1], [], [], []]
    assert [[place for place in range(6) if row[place]] for row in found.tolist()] == expected


# --- cmli --------------------------------------------------------------------------------------------------------


def plain_similarities(images: Tensor, texts: Tensor, is_word: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Picture by picture, caption by caption, patch by patch."""
    i, t = directions(images), directions(texts)
    to_texts, to_images = np.full((len(i), len(t)), BELOW), np.zeros((len(i), len(t)))
    for b in range(len(i)):
        for c in range(len(t)):
            real = [place for place in range(t.shape[1]) if is_word[c, place]]
            if real:
                to_texts[b, c] = np.mean([max(patch @ t[c, w] for w in real) for patch in i[b]])
                to_images[b, c] = np.mean([max(patch @ t[c, w] for patch in i[b]) for w in real])
    return to_texts, to_images


def plain_cmli(images: Tensor, texts: Tensor, is_word: Tensor, rows: list[int], scale: float) -> tuple[float, float]:
    to_texts, to_images = plain_similarities(images, texts, is_word)
    has_words = is_word.any(dim=1).numpy()
    image_losses, text_losses = [], []
    for b in range(len(rows)):
        if has_words[b]:
            other = np.array([c == b or rows[c] != rows[b] for c in range(len(rows))])
            image_losses.append(plain_cross_entropy(scale * to_texts[b], b, other & has_words))
            text_losses.append(plain_cross_entropy(scale * to_images[:, b], b, other))
    return float(np.mean(image_losses)), float(np.mean(text_losses))


@pytest.mark.parametrize("chunk", [0, 1, 3, 9])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [7, 1, 7, 3], [0, 1, 1, 3]])
def test_cmli_equals_the_plain_loops_over_patches_and_words(chunk: int, rows: list[int]) -> None:
    images, texts, log_scale = random(4, 5, 3), random(4, 6, 3, seed=1), torch.tensor(1.3, dtype=torch.float64)
    found = cmli(images, texts, words(), log_scale, torch.tensor(rows), chunk=chunk)
    image_loss, text_loss = plain_cmli(images, texts, words(), rows, math.exp(1.3))
    assert found.image_loss.item() == pytest.approx(image_loss, rel=1e-12)
    assert found.text_loss.item() == pytest.approx(text_loss, rel=1e-12)
    assert found.loss.item() == pytest.approx((image_loss + text_loss) / 2, rel=1e-12)


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_similarities_in_chunks_are_those_of_all_captions_at_once(chunk: int) -> None:
    images, texts = unit(random(3, 5, 3)), unit(random(4, 6, 3, seed=1))
    plain_to_texts, plain_to_images = plain_similarities(images, texts, words())
    with torch.no_grad():
        to_texts, to_images = token_similarities(images, texts, words(), chunk)
    assert np.allclose(to_texts.numpy(), plain_to_texts, rtol=1e-12)
    assert np.allclose(to_images.numpy(), plain_to_images, rtol=1e-12)


@pytest.mark.parametrize("chunk", [0, 2])
def test_cmli_gradients_are_those_of_finite_differences(chunk: int) -> None:
    rows, is_word = torch.tensor([0, 1, 2, 0]), words()
    log_scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    inputs = random(4, 3, 2).requires_grad_(), random(4, 6, 2, seed=1).requires_grad_(), log_scale
    assert torch.autograd.gradcheck(lambda i, t, s: cmli(i, t, is_word, s, rows, chunk=chunk).loss, inputs)


def test_one_patch_and_one_word_each_are_itc() -> None:
    images, texts, rows = random(4, 1, 3), random(4, 3, 3, seed=1), torch.tensor([0, 1, 1, 2])
    log_scale = torch.tensor(1.1, dtype=torch.float64)
    found = cmli(images, texts, words([3] * 4, 3), log_scale, rows)
    expected = itc(images[:, 0], texts[:, 1], log_scale, rows)
    for name, value in vars(expected).items():
        assert getattr(found, name).item() == pytest.approx(value.item(), rel=1e-12), name


def test_cls_sep_and_padding_change_nothing_not_even_nan() -> None:
    images, texts, rows = random(4, 5, 3), random(4, 6, 3, seed=1).requires_grad_(), torch.arange(4)
    scale, is_word = torch.tensor(1.0), words()
    clean = cmli(images, texts, is_word, scale, rows).loss
    (clean_gradient,) = torch.autograd.grad(clean, texts)
    dirty = torch.where(is_word[..., None], texts.detach(), math.nan).requires_grad_()
    loss = cmli(images, dirty, is_word, scale, rows).loss
    (gradient,) = torch.autograd.grad(loss, dirty)
    assert loss.item() == clean.item()
    assert torch.equal(gradient, clean_gradient)
    assert not gradient[~is_word].any()


def test_captions_without_words_cost_nothing_and_are_candidates_for_no_picture() -> None:
    images, texts = random(3, 5, 3).requires_grad_(), random(3, 6, 3, seed=1)
    scale = torch.tensor(1.0, dtype=torch.float64)
    nothing = cmli(images, texts, words([2, 0, 1]), scale, torch.arange(3))
    nothing.loss.backward()
    assert vars(nothing) == dict.fromkeys(vars(nothing), torch.tensor(0.0))
    assert images.grad is not None
    assert not images.grad.any()
    one_pair = cmli(images, texts, words([5, 2, 2]), scale, torch.arange(3))
    assert one_pair.image_loss.item() == 0  # no other caption has words; the caption chooses among three pictures
    assert one_pair.text_loss.item() > 0


def test_cmli_of_a_batch_of_one_and_of_one_picture_is_zero() -> None:
    for rows in ([3], [3, 3, 3]):
        images, texts = random(len(rows), 4, 3), random(len(rows), 6, 3, seed=1)
        assert cmli(images, texts, words([6] * len(rows)), torch.tensor(1.0), torch.tensor(rows)).loss.item() == 0


@pytest.mark.parametrize("chunk", [0, 2])
def test_cmli_under_autocast_is_in_float32_with_finite_gradients(chunk: int) -> None:
    images, texts = random(4, 5, 8).bfloat16().requires_grad_(), random(4, 6, 8, seed=1).bfloat16().requires_grad_()
    arguments = words(), torch.tensor(4.0), torch.arange(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cmli(images, texts, *arguments, chunk=chunk)
        found.loss.backward()
    outside = cmli(images.detach().float(), texts.detach().float(), *arguments)
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(outside.loss.item(), rel=1e-6)
    for tensor in (images, texts):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


# --- target-cmli -------------------------------------------------------------------------------------------------

PROJECTION = random(2, 3, seed=8)


def plain_target_cmli(
    images: Tensor, texts: Tensor, is_word: Tensor, targets: Tensor, g: np.ndarray, empty: np.ndarray | None = None
) -> dict[str, float]:
    """Word by word; the penalty with a temperature of 0.1."""

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        a, b = g @ a, g @ b
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    captions, empties, left = [], [], []
    for b in range(len(texts)):
        errors = []
        for place in range(texts.shape[1]):
            if is_word[b, place]:
                word, patches = texts[b, place].numpy(), targets[b].numpy()
                best = max(range(len(patches)), key=lambda n: cosine(word, patches[n]))
                emptiness = -math.inf if empty is None else cosine(word, empty) - cosine(word, patches[best])
                empties.append(emptiness > 0)
                left.append(1 - 1 / (1 + math.exp(-emptiness / 0.1)) if empty is not None else 1)
                errors.append(0.0 if emptiness > 0 else float(np.mean((word - patches[best]) ** 2)))
        captions += [float(np.mean(errors))] if errors else []
    image_loss = float(np.mean((images.numpy() - targets.numpy()) ** 2))
    text_loss, penalty = float(np.mean(captions)), -math.log(np.mean(left))
    return {
        "image_loss": image_loss,
        "text_loss": text_loss,
        "loss": (image_loss + text_loss) / 2 + 0.7 * penalty,
        "empty_share": float(np.mean(empties)),
        "empty_penalty": penalty,
    }


@pytest.mark.parametrize("projection", [None, PROJECTION])
@pytest.mark.parametrize("with_empty", [False, True])
def test_target_cmli_equals_the_plain_loop_over_words(projection: Tensor | None, with_empty: bool) -> None:
    images, texts, targets = random(4, 5, 3), random(4, 6, 3, seed=1), random(4, 5, 3, seed=2)
    empty = random(3, seed=11) if with_empty else None
    found = target_cmli(
        images, texts, words(), targets, projection_ED=projection, empty_D=empty, empty_weight=0.7 * with_empty
    )
    g = np.eye(3) if projection is None else projection.numpy()
    expected = plain_target_cmli(images, texts, words(), targets, g, None if empty is None else empty.numpy())
    for name, value in expected.items():
        assert getattr(found, name).item() == pytest.approx(value, rel=1e-12, abs=1e-15), name
    assert not with_empty or 0 < expected["empty_share"] < 1


@pytest.mark.parametrize("projection", [None, PROJECTION])
@pytest.mark.parametrize("with_empty", [False, True])
def test_target_cmli_gradients_are_those_of_finite_differences(projection: Tensor | None, with_empty: bool) -> None:
    """With an empty target, words get none through it: the penalty is left out, of which they change the value."""
    targets, is_word = random(4, 3, 3, seed=2), words()
    empty = random(3, seed=11) if with_empty else None

    def loss(images: Tensor, texts: Tensor) -> Tensor:
        return target_cmli(
            images, texts, is_word, targets, projection_ED=projection, empty_D=empty, empty_weight=0.0
        ).loss

    inputs = random(4, 3, 3).requires_grad_(), random(4, 6, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs)


def test_the_penalty_gives_words_no_gradient() -> None:
    gradients = []
    for weight in (0.0, 5.0):
        texts = random(4, 6, 3, seed=1).requires_grad_()
        arguments = random(4, 3, 3), texts, words(), random(4, 3, 3, seed=2)
        target_cmli(*arguments, empty_D=random(3, seed=11), empty_weight=weight).loss.backward()
        gradients.append(texts.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]


@pytest.mark.parametrize("projection", [None, PROJECTION])
def test_the_empty_target_learns_as_if_being_empty_were_a_matter_of_degree(projection: Tensor | None) -> None:
    """Its gradient is that of 1/2 mean (1 - q) error - weight ln mean (1 - q), by finite differences."""
    texts, targets, is_word = random(4, 6, 3, seed=1), random(4, 5, 3, seed=2), words([6, 6, 6, 6])
    empty = random(3, seed=11).requires_grad_()
    arguments = random(4, 5, 3), texts, is_word, targets
    target_cmli(*arguments, projection_ED=projection, empty_D=empty, empty_weight=0.7).loss.backward()
    g = np.eye(3) if projection is None else projection.numpy()

    def surrogate(u: np.ndarray) -> float:
        terms, left = [], []
        for b in range(4):
            for place in range(1, 5):
                word, patches = texts[b, place].numpy(), targets[b].numpy()
                a, p, v = g @ word, patches @ g.T, g @ u
                cosines = p @ a / np.linalg.norm(p, axis=1) / np.linalg.norm(a)
                best = int(np.argmax(cosines))
                emptiness = a @ v / np.linalg.norm(a) / np.linalg.norm(v) - cosines[best]
                left.append(1 - 1 / (1 + math.exp(-emptiness / 0.1)))
                terms.append(left[-1] * np.mean((word - patches[best]) ** 2))
        return float(0.5 * np.mean(terms) - 0.7 * math.log(np.mean(left)))

    start, step = empty.detach().numpy(), 1e-6
    slopes = [(surrogate(start + step * axis) - surrogate(start - step * axis)) / (2 * step) for axis in np.eye(3)]
    assert empty.grad is not None
    assert np.allclose(empty.grad.numpy(), slopes, rtol=1e-6, atol=1e-9)


def test_words_that_nothing_shows_are_given_to_the_empty_target() -> None:
    """Half of the words point to a patch of their picture, half all point elsewhere; only the target learns."""
    targets, texts = torch.eye(4)[None, :3].repeat(2, 1, 1), torch.zeros(2, 6, 4)
    texts[:, [1, 2]] = torch.eye(4)[:2] + 0.01
    texts[:, [3, 4]] = torch.tensor([0.1, 0.1, 0.1, 3.0])
    empty = torch.nn.Parameter(unit(torch.tensor([0.6, 0.6, -0.5, -0.1])))
    optimiser = torch.optim.Adam([empty], 0.05)
    shares = []
    for _ in range(60):
        found = target_cmli(targets, texts, words([6, 6]), targets, empty_D=empty, empty_weight=0.1)
        optimiser.zero_grad()
        found.loss.backward()
        optimiser.step()
        shares.append(found.empty_share.item())
    assert shares[0] == 0
    assert shares[-1] == 0.5
    assert found.text_loss.item() < 0.001


def test_targets_and_the_projection_get_no_gradient() -> None:
    targets, projection = random(2, 5, 3, seed=2).requires_grad_(), PROJECTION.clone().requires_grad_()
    texts = random(2, 6, 3, seed=1).requires_grad_()
    empty = random(3, seed=3).requires_grad_()
    found = target_cmli(
        random(2, 5, 3).requires_grad_(), texts, words([5, 5]), targets, projection_ED=projection, empty_D=empty
    )
    found.loss.backward()
    assert targets.grad is None
    assert projection.grad is None
    assert empty.grad is not None


def test_a_word_finds_the_patch_of_its_own_picture() -> None:
    targets = random(2, 5, 3)
    texts = torch.stack([3 * targets[0, [4, 1]], 0.5 * targets[1, [0, 2]]])
    best, cosines = match(texts, targets)
    assert best.tolist() == [[4, 1], [0, 2]]
    assert torch.allclose(cosines, torch.ones(2, 2, dtype=torch.float64))


def test_what_is_no_word_changes_nothing_not_even_nan() -> None:
    is_word, found = words(), []
    for other in (0.0, 5.0, math.nan):
        texts = torch.where(is_word[..., None], random(4, 6, 3, seed=1), other).requires_grad_()
        empty = random(3, seed=3).requires_grad_()
        out = target_cmli(random(4, 5, 3), texts, is_word, random(4, 5, 3, seed=2), empty_D=empty)
        out.loss.backward()
        found.append((*vars(out).values(), texts.grad, empty.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=0)


def test_captions_without_words_leave_the_loss_of_the_patches() -> None:
    texts, empty = random(2, 6, 3, seed=1).requires_grad_(), random(3, seed=3).requires_grad_()
    found = target_cmli(random(2, 5, 3), texts, words([2, 0]), random(2, 5, 3, seed=2), empty_D=empty)
    found.loss.backward()
    assert found.text_loss.item() == found.empty_share.item() == found.empty_penalty.item() == 0
    assert found.loss.item() == pytest.approx(found.image_loss.item() / 2)
    assert texts.grad is not None
    assert empty.grad is not None
    assert not texts.grad.any()
    assert not empty.grad.any()


def test_an_empty_target_that_has_every_word_is_pushed_off() -> None:
    texts = random(3, 6, 4, seed=1).abs()
    empty = (texts[:, 1:4].mean(dim=(0, 1))).requires_grad_()
    found = target_cmli(
        random(3, 5, 4), texts, words([5] * 3), -random(3, 5, 4, seed=2).abs(), empty_D=empty, temperature=0.01
    )
    found.loss.backward()
    assert found.empty_share.item() == 1
    assert found.text_loss.item() == 0
    assert 0 < found.empty_penalty.item() < math.inf
    assert empty.grad is not None
    assert torch.isfinite(empty.grad).all()
    assert empty.grad.norm() > 1  # (1 - q) itself is less than the smallest step from 1


def test_target_cmli_does_not_broadcast_and_an_empty_target_starts_as_a_direction() -> None:
    with pytest.raises(AssertionError):
        target_cmli(random(2, 5, 3), random(2, 6, 3), words([3, 3]), random(2, 1, 3))
    start = empty_target(7)
    assert start.requires_grad
    assert start.norm().item() == pytest.approx(1)


def test_target_cmli_under_autocast_is_in_float32_with_finite_gradients() -> None:
    images, texts = random(4, 5, 8).bfloat16().requires_grad_(), random(4, 6, 8, seed=1).bfloat16().requires_grad_()
    targets, empty, projection = random(4, 5, 8, seed=2).float(), empty_target(8), random(3, 8, seed=3).float()
    arguments = {"projection_ED": projection, "empty_D": empty}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = target_cmli(images, texts, words(), targets, **arguments)
    outside = target_cmli(images.detach().float(), texts.detach().float(), words(), targets, **arguments)
    found.loss.backward()
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == outside.loss.item()
    for tensor in (images, texts, empty):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
