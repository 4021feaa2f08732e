"""Every objective against a plain float64 reference, its gradient, and the batches that could break it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from emkum.models import targets
from emkum.stage2_train.objectives.cls_mse import cls_mse
from emkum.stage2_train.objectives.ctl import FifoBank, WholeBank, ctl
from emkum.stage2_train.objectives.itc import MAX_LOG_SCALE, clamp_log_scale, itc, start_log_scale, unit
from emkum.stage2_train.objectives.layers_mse import layers_mse


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_cross_entropy(logits: np.ndarray, label: int, allowed: np.ndarray) -> float:
    """-log softmax of one row, over the allowed candidates."""
    chosen = logits[allowed]
    top = chosen.max()
    return float(-(logits[label] - top - math.log(np.exp(chosen - top).sum())))


def plain_contrast(
    queries: Tensor, candidates: Tensor, labels: list[int], rows: list[int], of: list[int], scale: float
) -> float:
    """Cross-entropy of each query over the candidates that are its label or of another picture."""
    q = queries.numpy() / np.linalg.norm(queries.numpy(), axis=1, keepdims=True)
    c = candidates.numpy() / np.linalg.norm(candidates.numpy(), axis=1, keepdims=True)
    total = 0.0
    for i, label in enumerate(labels):
        allowed = np.array([j == label or of[j] != rows[i] for j in range(len(c))])
        total += plain_cross_entropy(scale * (c @ q[i]), label, allowed)
    return total / len(labels)


# --- itc ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [7, 7, 2, 3, 7]])
def test_itc_equals_the_plain_sum_and_other_captions_of_a_picture_are_no_negatives(rows: list[int]) -> None:
    images, texts, log_scale = random(5, 3), random(5, 3, seed=1), torch.tensor(1.3, dtype=torch.float64)
    found = itc(images, texts, log_scale, torch.tensor(rows))
    scale, labels = math.exp(1.3), list(range(5))
    image_loss = plain_contrast(images, texts, labels, rows, rows, scale)
    text_loss = plain_contrast(texts, images, labels, rows, rows, scale)
    assert found.image_loss.item() == pytest.approx(image_loss, rel=1e-12)
    assert found.text_loss.item() == pytest.approx(text_loss, rel=1e-12)
    assert found.loss.item() == pytest.approx((image_loss + text_loss) / 2, rel=1e-12)


def test_itc_gradients_are_those_of_finite_differences() -> None:
    rows = torch.tensor([0, 1, 1, 2])
    inputs = (
        random(4, 3).requires_grad_(),
        random(4, 3, seed=1).requires_grad_(),
        torch.tensor(0.7, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda i, t, s: itc(i, t, s, rows).loss, inputs)


def test_itc_of_a_batch_of_one_is_zero_and_has_zero_gradient() -> None:
    images = random(1, 3).requires_grad_()
    found = itc(images, random(1, 3, seed=1), torch.tensor(2.0), torch.tensor([5]))
    found.loss.backward()
    assert found.loss.item() == 0
    assert not images.grad.any()  # type: ignore[union-attr]


def test_a_batch_of_one_picture_only_has_no_negatives() -> None:
    found = itc(random(3, 2), random(3, 2, seed=1), torch.tensor(1.0), torch.tensor([4, 4, 4]))
    assert found.loss.item() == 0


def test_features_of_length_zero_give_a_finite_loss_and_gradient() -> None:
    images = torch.zeros(3, 4, requires_grad=True)
    itc(images, random(3, 4).float(), torch.tensor(1.0), torch.arange(3)).loss.backward()
    assert torch.isfinite(images.grad).all()  # type: ignore[arg-type]


def test_the_scale_starts_at_one_over_the_temperature_and_never_counts_for_more_than_100() -> None:
    assert math.exp(start_log_scale(0.07)) == pytest.approx(1 / 0.07)
    assert start_log_scale(1e-6) == MAX_LOG_SCALE
    images, texts, rows = random(4, 3), random(4, 3, seed=1), torch.arange(4)
    at_limit = itc(images, texts, torch.tensor(math.log(100.0), dtype=torch.float64), rows)
    beyond = itc(images, texts, torch.tensor(9.0, dtype=torch.float64), rows)
    assert beyond.loss.item() == pytest.approx(at_limit.loss.item(), rel=1e-12)


def test_a_scale_past_100_is_taken_back_in_place() -> None:
    scale = torch.nn.Parameter(torch.tensor(9.0))
    clamp_log_scale(scale)
    assert scale.item() == pytest.approx(MAX_LOG_SCALE)
    assert scale.requires_grad


def test_accuracies_count_each_direction_apart() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.9, 0.1]])  # both captions lie next to picture 0
    found = itc(images, texts, torch.tensor(0.0), torch.arange(2))
    assert found.image_accuracy.item() == 1.0
    assert found.text_accuracy.item() == 0.5


def test_losses_are_in_float32_under_autocast() -> None:
    images, texts = random(8, 16).bfloat16(), random(8, 16, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = itc(images, texts, torch.tensor(4.0), torch.arange(8))
    outside = itc(images.float(), texts.float(), torch.tensor(4.0), torch.arange(8))
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == outside.loss.item()


# --- ctl ---------------------------------------------------------------------------------------------------------


def test_ctl_equals_the_plain_sum_over_batch_and_bank() -> None:
    images, texts, candidates = random(3, 4), random(3, 4, seed=1), random(6, 4, seed=2)
    rows, of = [10, 11, 12], [10, 11, 12, 11, 99, 10]  # candidates 3 and 5 show pictures of the batch again
    found = ctl(
        images,
        texts,
        unit(candidates),
        torch.tensor(of),
        torch.arange(3),
        torch.tensor(rows),
        torch.tensor(1.1, dtype=torch.float64),
    )
    scale = math.exp(1.1)
    image_loss = plain_contrast(images, candidates, [0, 1, 2], rows, of, scale)
    text_loss = plain_contrast(texts, candidates, [0, 1, 2], rows, of, scale)
    assert found.image_loss.item() == pytest.approx(image_loss, rel=1e-12)
    assert found.text_loss.item() == pytest.approx(text_loss, rel=1e-12)
    assert found.loss.item() == pytest.approx((image_loss + text_loss) / 2, rel=1e-12)


def test_ctl_gradients_are_those_of_finite_differences() -> None:
    candidates, of, rows = unit(random(5, 3, seed=2)), torch.tensor([0, 1, 1, 5, 0]), torch.tensor([0, 1])

    def loss(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
        return ctl(images, texts, candidates, of, torch.arange(2), rows, log_scale).loss

    log_scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    inputs = random(2, 3).requires_grad_(), random(2, 3, seed=1).requires_grad_(), log_scale
    assert torch.autograd.gradcheck(loss, inputs)


def test_an_empty_bank_contrasts_within_the_batch() -> None:
    bank = FifoBank(8, 3)
    targets_BD, rows_B = random(4, 3).float(), torch.arange(4)
    candidates_ND, candidate_rows_N, labels_B = bank.candidates(targets_BD, rows_B, torch.zeros(4, dtype=torch.int64))
    assert torch.equal(candidates_ND, unit(targets_BD))
    assert candidate_rows_N.tolist() == labels_B.tolist() == [0, 1, 2, 3]


def test_a_bank_of_capacity_zero_stays_empty() -> None:
    bank = FifoBank(0, 3)
    bank.push(random(4, 3).float(), torch.arange(4))
    assert bank.candidates(random(2, 3).float(), torch.arange(2), torch.zeros(2))[0].shape == (2, 3)


def test_the_fifo_keeps_the_newest_and_forgets_the_oldest() -> None:
    bank = FifoBank(5, 2)
    for start in (0, 3, 6):  # nine rows in all
        bank.push(torch.arange(start, start + 3)[:, None].float().expand(3, 2) + 1, torch.arange(start, start + 3))
    _, rows, _ = bank.candidates(torch.ones(1, 2), torch.tensor([100]), torch.zeros(1))
    assert sorted(rows[1:].tolist()) == [4, 5, 6, 7, 8]


def test_a_batch_larger_than_the_bank_leaves_its_end_in_it() -> None:
    bank = FifoBank(3, 2)
    bank.push(random(7, 2).float(), torch.arange(7))
    assert sorted(bank.rows_G.tolist()) == [4, 5, 6]


def test_the_bank_comes_back_from_a_checkpoint_as_it_was() -> None:
    bank, other = FifoBank(5, 2), FifoBank(5, 2)
    for start in (0, 4):
        bank.push(random(4, 2, seed=start).float(), torch.arange(start, start + 4))
    other.load_state_dict(bank.state_dict())
    for one in (bank, other):
        one.push(random(2, 2, seed=9).float(), torch.tensor([20, 21]))
    assert torch.equal(bank.targets_GD, other.targets_GD)
    assert torch.equal(bank.rows_G, other.rows_G)
    assert bank.pushed == other.pushed == 10


def test_the_whole_bank_has_every_row_and_view_once_and_labels_are_their_places() -> None:
    rows_N, targets_NVD = torch.tensor([3, 8, 9]), random(3, 2, 4).float()
    bank = WholeBank(rows_N, targets_NVD)
    candidates_ND, candidate_rows_N, labels_B = bank.candidates(
        torch.zeros(2, 4), torch.tensor([9, 3]), torch.tensor([1, 0])
    )
    assert candidate_rows_N.tolist() == [3, 3, 8, 8, 9, 9]
    assert labels_B.tolist() == [5, 0]
    assert torch.allclose(candidates_ND[5], unit(targets_NVD[2, 1]))
    assert "targets_GD" not in bank.state_dict()


def test_whole_bank_and_a_fifo_that_holds_the_same_rows_give_the_same_loss() -> None:
    rows_N, targets_ND = torch.arange(6), random(6, 4).float()
    whole, fifo = WholeBank(rows_N, targets_ND[:, None]), FifoBank(4, 4)
    fifo.push(targets_ND[2:], rows_N[2:])
    images, texts, batch, zeros = random(2, 4, seed=3).float(), random(2, 4, seed=4).float(), rows_N[:2], torch.zeros(2)
    losses = []
    for bank in (whole, fifo):
        candidates = bank.candidates(targets_ND[:2], batch, zeros.long())
        losses.append(ctl(images, texts, *candidates, batch, torch.tensor(1.0)).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_fresh_targets_stand_in_for_the_banks_copies() -> None:
    targets_ND = random(4, 3).float()
    bank = WholeBank(torch.arange(4), targets_ND[:, None], fresh=True)
    fresh = targets_ND[[2]] + 0.01
    candidates_ND, _, labels_B = bank.candidates(fresh, torch.tensor([2]), torch.tensor([0]))
    assert torch.equal(candidates_ND[labels_B], unit(fresh))
    assert not torch.equal(bank.targets_GD[labels_B], unit(fresh))


# --- cls-mse -----------------------------------------------------------------------------------------------------


def test_cls_mse_is_half_the_mean_square_of_each_side() -> None:
    images, texts, target = random(3, 4), random(3, 4, seed=1), random(3, 4, seed=2)
    found = cls_mse(images, texts, target)
    plain_image = float(np.mean((images.numpy() - target.numpy()) ** 2))
    plain_text = float(np.mean((texts.numpy() - target.numpy()) ** 2))
    assert found.image_loss.item() == pytest.approx(plain_image, rel=1e-12)
    assert found.text_loss.item() == pytest.approx(plain_text, rel=1e-12)
    assert found.loss.item() == pytest.approx((plain_image + plain_text) / 2, rel=1e-12)


def test_cls_mse_does_not_broadcast() -> None:
    with pytest.raises(AssertionError):
        cls_mse(random(4, 3), random(4, 3), random(4, 1))


def test_cls_mse_gradients_are_those_of_finite_differences() -> None:
    target = random(3, 2, seed=2)
    inputs = random(3, 2).requires_grad_(), random(3, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, t: cls_mse(i, t, target).loss, inputs)


# --- layers-mse --------------------------------------------------------------------------------------------------


def plain_layers(hidden: list[np.ndarray], mask: np.ndarray | None, layer_norm: bool) -> np.ndarray:
    """Mean over layers of instance norm over real tokens, sample by sample and channel by channel."""
    total = np.zeros_like(hidden[0])
    for layer in hidden:
        for b in range(layer.shape[0]):
            real = np.ones(layer.shape[1], bool) if mask is None else mask[b]
            for d in range(layer.shape[2]):
                values = layer[b, real, d]
                total[b, real, d] += (values - values.mean()) / math.sqrt(values.var() + 1e-5)
    total /= len(hidden)
    if layer_norm:
        mean, variance = total.mean(-1, keepdims=True), total.var(-1, keepdims=True)
        total = (total - mean) / np.sqrt(variance + 1e-5)
    return total


def test_layers_mse_of_pictures_equals_the_plain_sum() -> None:
    hidden, target = [random(2, 5, 3, seed=s) for s in range(3)], random(2, 5, 3, seed=9)
    predicted = targets.layers([h.clone() for h in hidden], None, final_layer_norm=True)
    plain = plain_layers([h.numpy() for h in hidden], None, True)
    assert layers_mse(predicted, target, None).item() == pytest.approx(float(np.mean((plain - target.numpy()) ** 2)))


def test_layers_mse_of_texts_counts_real_tokens_only() -> None:
    hidden, target = [random(3, 6, 4, seed=s) for s in range(2)], random(3, 6, 4, seed=9)
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    predicted = targets.layers([h.clone() for h in hidden], mask, final_layer_norm=False)
    plain = plain_layers([h.numpy() for h in hidden], mask.numpy(), False)
    error = ((plain - target.numpy()) ** 2)[mask.numpy()]
    assert layers_mse(predicted, target, mask).item() == pytest.approx(float(error.mean()))


def test_what_lies_in_the_padding_changes_nothing_not_even_nan() -> None:
    hidden, target = random(2, 5, 3).requires_grad_(), random(2, 5, 3, seed=1)
    mask = torch.arange(5) < torch.tensor([3, 5])[:, None]
    clean = layers_mse(targets.layers([hidden], mask, False), target, mask)
    (clean_gradient,) = torch.autograd.grad(clean, hidden)
    dirty_hidden = torch.where(mask[..., None], hidden.detach(), torch.nan).requires_grad_()
    dirty_target = torch.where(mask[..., None], target, torch.nan)
    dirty = layers_mse(targets.layers([dirty_hidden], mask, False), dirty_target, mask)
    (gradient,) = torch.autograd.grad(dirty, dirty_hidden)
    assert dirty.item() == clean.item()
    assert torch.equal(gradient[mask], clean_gradient[mask])
    assert torch.isfinite(gradient).all()


def test_a_batch_of_padding_alone_costs_nothing() -> None:
    student = random(2, 3, 4).requires_grad_()
    loss = layers_mse(student, random(2, 3, 4, seed=1), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()  # type: ignore[union-attr]


def test_layers_mse_gradients_are_those_of_finite_differences() -> None:
    mask, target = torch.arange(4) < torch.tensor([4, 2])[:, None], random(2, 4, 3, seed=5)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return layers_mse(targets.layers([a, b], mask, False), target, mask)

    assert torch.autograd.gradcheck(loss, (random(2, 4, 3).requires_grad_(), random(2, 4, 3, seed=1).requires_grad_()))


def test_one_token_and_a_constant_channel_are_finite() -> None:
    ones = torch.ones(2, 1, 3, requires_grad=True)
    layers_mse(targets.layers([ones], None, True), torch.zeros(2, 1, 3), None).backward()
    assert torch.isfinite(ones.grad).all()  # type: ignore[arg-type]
