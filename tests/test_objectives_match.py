"""Matching, the feature queue and its regularisation: against plain float64 sums, gradients, and odd batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_objectives import plain_contrast, random
from torch import Tensor

from emkum.stage2_train.objectives.ema import ema_update_
from emkum.stage2_train.objectives.itc import itc
from emkum.stage2_train.objectives.itc_queue import FeatureQueue, itc_queue
from emkum.stage2_train.objectives.itm import MatchHead, draw, itm, similarities
from emkum.stage2_train.objectives.kept import choose_kept, mean_kept
from emkum.stage2_train.objectives.proximal import proximal

CHANCE = math.log(3) - 2 / 3 * math.log(2)  # cross-entropy of (1/3, 2/3) with itself


def uniforms(batch: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, 2 * batch, generator=torch.Generator().manual_seed(seed))


# --- means over what counts --------------------------------------------------------------------------------------


def test_a_mean_counts_what_is_kept_and_the_rest_has_no_gradient() -> None:
    values = torch.tensor([[1.0, math.nan, 4.0], [2.0, math.inf, 0.0]], requires_grad=True)
    found = mean_kept(values, torch.tensor([True, False, True]))
    found.sum().backward()
    assert found.tolist() == [2.5, 1.0]
    assert values.grad is not None
    assert values.grad.tolist() == [[0.5, 0, 0.5]] * 2
    assert mean_kept(values[0], torch.zeros(3, dtype=torch.bool)).item() == 0


def test_choosing_counts_the_rows_that_are_kept() -> None:
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0], [9.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    loss, accuracy = choose_kept(logits, torch.tensor([0, 1, 1, 1]), torch.tensor([True, True, False, True]))
    assert loss.item() == pytest.approx((2 * math.log1p(math.exp(-3)) + math.log1p(math.exp(3))) / 3)
    assert accuracy.item() == pytest.approx(2 / 3)


# --- itm ---------------------------------------------------------------------------------------------------------


def plain_draw(allowed: list[int], uniform: np.ndarray, logits: np.ndarray) -> int:
    """The allowed candidate whose logit with Gumbel noise is largest."""
    return max(allowed, key=lambda j: logits[j] - math.log(-math.log(uniform[j])))


def plain_itm(head: MatchHead, images: Tensor, texts: Tensor, rows: list[int], uniform: Tensor, scale: float) -> dict:
    """Pair by pair. scale: of the cosines that negatives are drawn by; 0: at random."""
    i, t, u = images.numpy(), texts.numpy(), uniform.numpy().reshape(len(rows), 2, len(rows))
    weights = {name: parameter.detach().numpy() for name, parameter in head.named_parameters()}

    def judged(a: int, b: int, matches: bool) -> tuple[float, bool]:
        picture = weights["image.weight"] @ i[a] + weights["image.bias"]
        caption = weights["text.weight"] @ t[b] + weights["text.bias"]
        fused = picture + caption if head.fusion == "sum" else picture * caption
        no, yes = weights["answer.weight"] @ fused + weights["answer.bias"]
        right, wrong = (yes, no) if matches else (no, yes)
        return math.log1p(math.exp(wrong - right)), (yes > no) == matches

    def cosines(a: np.ndarray, others: np.ndarray) -> np.ndarray:
        return scale * np.array([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in others])

    kinds: dict[str, list[tuple[float, bool]]] = {"pair": [], "image": [], "text": []}
    for k in range(len(rows)):
        kinds["pair"].append(judged(k, k, True))
        wrong = [j for j in range(len(rows)) if rows[j] != rows[k]]
        if wrong:
            kinds["image"].append(judged(k, plain_draw(wrong, u[k, 0], cosines(i[k], t)), False))
            kinds["text"].append(judged(plain_draw(wrong, u[k, 1], cosines(t[k], i)), k, False))
    every = [judgement for kind in kinds.values() for judgement in kind]
    found = {f"{name}_loss": float(np.mean([loss for loss, _ in kind])) for name, kind in kinds.items() if kind}
    found["loss"] = float(np.mean([loss for loss, _ in every]))
    found["accuracy"] = float(np.mean([right for _, right in every]))
    found["always_no"] = 1 - len(rows) / len(every)
    return found


@pytest.mark.parametrize("fusion", ["sum", "product"])
@pytest.mark.parametrize("scale", [0.0, 4.0])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [7, 7, 2, 3, 7]])
def test_itm_equals_the_plain_sum_over_pairs(fusion: str, scale: float, rows: list[int]) -> None:
    head = MatchHead(3, fusion).double()  # type: ignore[arg-type]
    images, texts, uniform = random(5, 3), random(5, 3, seed=1), uniforms(5)
    hard = similarities(images, texts, torch.tensor(math.log(scale), dtype=torch.float64)) if scale else None
    found = itm(head, images, texts, torch.tensor(rows), uniform, hard)
    for name, value in plain_itm(head, images, texts, rows, uniform, scale).items():
        assert getattr(found, name).item() == pytest.approx(value, rel=1e-12), name


@pytest.mark.parametrize("fusion", ["sum", "product"])
def test_itm_gradients_are_those_of_finite_differences(fusion: str) -> None:
    head = MatchHead(2, fusion).double()  # type: ignore[arg-type]
    rows, uniform = torch.tensor([0, 1, 1, 2]), uniforms(4)
    names, parameters = zip(*head.named_parameters(), strict=True)

    def loss(images: Tensor, texts: Tensor, *weights: Tensor) -> Tensor:
        def called(*features: Tensor) -> Tensor:
            return torch.func.functional_call(head, dict(zip(names, weights, strict=True)), features)

        return itm(called, images, texts, rows, uniform).loss

    assert torch.autograd.gradcheck(
        loss, (random(4, 2).requires_grad_(), random(4, 2, seed=1).requires_grad_(), *parameters)
    )


def test_negatives_are_drawn_as_often_as_their_similarity_says_and_never_of_the_same_picture() -> None:
    tries, logits = 40_000, torch.tensor([9.0, 1.0, 0.0, -1.0])
    allowed = torch.tensor([False, True, True, True])
    uniform = torch.rand(tries, 4, generator=torch.Generator().manual_seed(3))
    for wanted, shares in ((logits, logits[1:].softmax(0)), (None, torch.full((3,), 1 / 3))):
        given = None if wanted is None else wanted.expand(tries, 4)
        found = draw(allowed.expand(tries, 4), uniform, given).bincount(minlength=4) / tries
        assert found[0] == 0
        assert torch.allclose(found[1:], shares, atol=0.01)  # three standard deviations are 0.007


def test_a_uniform_number_of_zero_draws_no_forbidden_candidate() -> None:
    assert draw(torch.tensor([[False, True, False]]), torch.zeros(1, 3)).tolist() == [1]


@pytest.mark.parametrize("rows", [[4], [4, 4, 4]])
def test_without_another_picture_only_the_true_pairs_are_judged(rows: list[int]) -> None:
    head = MatchHead(3).double()
    images, texts = random(len(rows), 3).requires_grad_(), random(len(rows), 3, seed=1)
    found = itm(head, images, texts, torch.tensor(rows), uniforms(len(rows)))
    found.loss.backward()
    assert found.loss.item() == pytest.approx(found.pair_loss.item(), rel=1e-12)
    assert found.image_loss.item() == found.text_loss.item() == found.always_no.item() == 0
    assert images.grad is not None
    assert torch.isfinite(images.grad).all()


def test_a_sum_of_projections_cannot_match_and_a_product_can() -> None:
    """Each picture and caption is the wrong one once; features match exactly: the thesis's fusion stays at chance."""
    features = torch.eye(4, dtype=torch.float64)
    rows, losses = torch.arange(4), {}
    uniform = torch.full((4, 2, 4), 0.1)
    for k in range(4):
        uniform[k, :, (k + 1) % 4] = 0.9  # the pair beside it, both ways: each picture and caption once
    for fusion in ("sum", "product"):
        torch.manual_seed(0)
        head = MatchHead(4, fusion).double()  # type: ignore[arg-type]
        optimiser = torch.optim.Adam(head.parameters(), 0.05)
        for _ in range(150):
            found = itm(head, features, features, rows, uniform.flatten(1))
            optimiser.zero_grad()
            found.loss.backward()
            optimiser.step()
            assert fusion == "product" or found.loss.item() >= CHANCE - 1e-12
        losses[fusion] = found.loss.item()
        assert found.always_no.item() == pytest.approx(2 / 3)
        assert found.accuracy.item() == pytest.approx(2 / 3 if fusion == "sum" else 1.0)
    assert losses["sum"] == pytest.approx(CHANCE, abs=1e-3)
    assert losses["product"] < 0.05


def test_similarities_are_those_of_itc_and_constant() -> None:
    images, texts = random(3, 4).requires_grad_(), random(3, 4, seed=1)
    to_texts, to_images = similarities(images, texts, torch.tensor(9.0, dtype=torch.float64))
    plain = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in texts.numpy()] for a in images.tolist()])
    assert np.allclose(to_texts.numpy(), 100 * plain)  # the scale counts for 100 at most
    assert np.allclose(to_images.numpy(), 100 * plain.T)
    assert not to_texts.requires_grad


def test_itm_under_autocast_has_a_float32_loss_and_finite_gradients() -> None:
    head, images, texts = MatchHead(8), random(6, 8).bfloat16().requires_grad_(), random(6, 8, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hard = similarities(images, texts, torch.tensor(3.0))
        found = itm(head, images, texts, torch.arange(6), uniforms(6), hard)
    found.loss.backward()
    assert found.loss.dtype == torch.float32
    for tensor in (images, *head.parameters()):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
    assert itm(MatchHead(8).bfloat16(), images, texts, torch.arange(6), uniforms(6)).loss.dtype == torch.float32


# --- itc-queue ---------------------------------------------------------------------------------------------------


def filled(capacity: int, width: int, pushes: list[list[int]]) -> tuple[FeatureQueue, list[Tensor], list[int]]:
    """A queue, what it should hold (images, texts), and the rows of that: a plain list of the last pushes."""
    queue, images, texts, rows = FeatureQueue(capacity, width).double(), [], [], []
    for seed, pushed in enumerate(pushes):
        images += list(random(len(pushed), width, seed=100 + seed))
        texts += list(random(len(pushed), width, seed=200 + seed))
        rows += pushed
        queue.push(
            random(len(pushed), width, seed=100 + seed), random(len(pushed), width, seed=200 + seed), ids(pushed)
        )
    return queue, [torch.stack(images[-capacity:]), torch.stack(texts[-capacity:])], rows[-capacity:]


def ids(rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


@pytest.mark.parametrize("capacity", [2, 5, 9, 50], ids=["tiny", "wrapped", "half-filled", "larger than the data"])
@pytest.mark.parametrize("momentum", [False, True])
def test_itc_queue_equals_the_plain_sum_over_batch_and_queue(capacity: int, momentum: bool) -> None:
    """Rows 1 and 3 of the batch come again in the queue, and 3 twice in the batch."""
    queue, (queue_images, queue_texts), queue_rows = filled(capacity, 3, [[8, 1, 3], [9, 3, 1]])
    rows, images, texts = [3, 1, 3, 0], random(4, 3), random(4, 3, seed=1)
    keys = (random(4, 3, seed=2), random(4, 3, seed=3)) if momentum else None
    log_scale = torch.tensor(1.2, dtype=torch.float64)
    found = itc_queue(images, texts, log_scale, ids(rows), queue, keys)
    key_images, key_texts = keys or (images, texts)
    every, labels = rows + queue_rows, list(range(4))
    image_loss = plain_contrast(images, torch.cat([key_texts, queue_texts]), labels, rows, every, math.exp(1.2))
    text_loss = plain_contrast(texts, torch.cat([key_images, queue_images]), labels, rows, every, math.exp(1.2))
    assert found.image_loss.item() == pytest.approx(image_loss, rel=1e-12)
    assert found.text_loss.item() == pytest.approx(text_loss, rel=1e-12)
    assert found.loss.item() == pytest.approx((image_loss + text_loss) / 2, rel=1e-12)


def test_an_empty_queue_gives_itc_with_its_gradient() -> None:
    gradients = []
    for objective in (itc, itc_queue):
        images = random(4, 3).requires_grad_()
        arguments = (images, random(4, 3, seed=1), torch.tensor(1.0, dtype=torch.float64), ids([0, 1, 1, 2]))
        found = objective(*arguments, *([FeatureQueue(7, 3).double()] if objective is itc_queue else []))  # type: ignore[operator]
        found.loss.backward()
        gradients.append((found.loss.detach(), images.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("momentum", [False, True])
def test_itc_queue_gradients_are_those_of_finite_differences(momentum: bool) -> None:
    queue, _, _ = filled(4, 3, [[8, 1, 3]])
    keys = (random(3, 3, seed=2).requires_grad_(), random(3, 3, seed=3)) if momentum else None

    def loss(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
        return itc_queue(images, texts, log_scale, ids([3, 3, 0]), queue, keys).loss

    log_scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    inputs = random(3, 3).requires_grad_(), random(3, 3, seed=1).requires_grad_(), log_scale
    assert torch.autograd.gradcheck(loss, inputs)
    loss(*inputs).backward()
    assert keys is None or keys[0].grad is None  # a momentum encoder learns nothing from it


def test_a_queue_larger_than_the_data_holds_no_negative_of_the_own_picture() -> None:
    queue = FeatureQueue(50, 2).double()
    pair = torch.eye(2, dtype=torch.float64)[:1]
    for _ in range(6):
        queue.push(pair, pair, ids([5]))
    found = itc_queue(pair, pair, torch.tensor(1.0, dtype=torch.float64), ids([5]), queue)
    assert found.loss.item() == 0
    other = itc_queue(pair, pair, torch.tensor(0.0, dtype=torch.float64), ids([6]), queue)
    assert other.loss.item() == pytest.approx(math.log(7))  # six equal negatives beside the pair itself


def test_a_pushed_batch_does_not_change_the_gradient_of_the_loss_before_it() -> None:
    gradients = []
    for pushing in (False, True):
        queue, _, _ = filled(3, 3, [[8, 1, 3]])
        images = random(2, 3).requires_grad_()
        loss = itc_queue(images, random(2, 3, seed=1), torch.tensor(1.0), ids([0, 2]), queue).loss
        if pushing:
            queue.push(images, images, ids([0, 2]))
        loss.backward()
        gradients.append(images.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]


def test_the_queue_comes_back_from_a_checkpoint_as_it_was() -> None:
    queue, _, _ = filled(5, 3, [[0, 1, 2, 3], [4, 5]])
    other = FeatureQueue(5, 3).double()
    other.load_state_dict(queue.state_dict())
    losses = []
    for one in (queue, other):
        one.push(random(2, 3, seed=7), random(2, 3, seed=8), ids([6, 7]))
        losses.append(itc_queue(random(2, 3), random(2, 3, seed=1), torch.tensor(1.0), ids([6, 9]), one).loss)
    assert torch.equal(*losses)
    for name, value in queue.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]) if isinstance(value, Tensor) else value == {"pushed": 8}


def test_itc_queue_under_autocast_is_in_float32_with_finite_gradients() -> None:
    queue = FeatureQueue(6, 16)
    queue.push(random(4, 16, seed=5).bfloat16(), random(4, 16, seed=6).bfloat16(), ids([5, 6, 7, 8]))
    images, texts = random(4, 16).bfloat16().requires_grad_(), random(4, 16, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = itc_queue(images, texts, torch.tensor(4.0), torch.arange(4), queue)
    outside = itc_queue(images.float(), texts.float(), torch.tensor(4.0), torch.arange(4), queue)
    found.loss.backward()
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == outside.loss.item()
    assert images.grad is not None
    assert torch.isfinite(images.grad).all()


def test_keys_of_an_average_network_follow_the_student() -> None:
    student, average = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    average.load_state_dict(student.state_dict())
    with torch.no_grad():
        student.weight += 1.0
    before = average.weight.detach().clone()
    ema_update_(average, student, 0.995)
    torch.testing.assert_close(average.weight.detach(), before + 0.005)


# --- proximal ----------------------------------------------------------------------------------------------------


def test_proximal_is_half_the_strength_times_the_mean_squared_distance_of_directions() -> None:
    features = [random(3, 4, seed=seed) for seed in range(4)]
    now_images, now_texts, old_images, old_texts = (
        np.array([row / np.linalg.norm(row) for row in f.numpy()]) for f in features
    )
    found = proximal(*features, strength=30.0)
    image_loss = 15 * float(np.mean([((a - b) ** 2).sum() for a, b in zip(now_images, old_images, strict=True)]))
    text_loss = 15 * float(np.mean([((a - b) ** 2).sum() for a, b in zip(now_texts, old_texts, strict=True)]))
    assert found.image_loss.item() == pytest.approx(image_loss, rel=1e-12)
    assert found.text_loss.item() == pytest.approx(text_loss, rel=1e-12)
    assert found.loss.item() == pytest.approx((image_loss + text_loss) / 2, rel=1e-12)


def test_proximal_gradients_are_those_of_finite_differences_and_none_goes_to_the_old_features() -> None:
    old = random(3, 4, seed=2).requires_grad_(), random(3, 4, seed=3).requires_grad_()
    inputs = random(3, 4).requires_grad_(), random(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, t: proximal(i, t, *old, strength=2.0).loss, inputs)
    proximal(*inputs, *old, strength=2.0).loss.backward()
    assert old[0].grad is None
    assert old[1].grad is None


def test_features_that_have_not_moved_cost_nothing_and_opposite_ones_twice_the_strength() -> None:
    features = random(2, 3)
    assert proximal(features, features, 7 * features, features, strength=3.0).loss.item() == pytest.approx(0, abs=1e-20)
    assert proximal(features, features, -features, -features, strength=3.0).loss.item() == pytest.approx(6.0)


def test_proximal_does_not_broadcast() -> None:
    with pytest.raises(AssertionError):
        proximal(random(3, 4), random(3, 4), random(1, 4), random(3, 4), strength=1.0)


def test_proximal_of_bfloat16_features_is_in_float32_with_finite_gradients() -> None:
    images = random(3, 8).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = proximal(images, images, random(3, 8, seed=1).bfloat16(), images, strength=2.0)
    found.loss.backward()
    assert found.loss.dtype == torch.float32
    assert images.grad is not None
    assert torch.isfinite(images.grad).all()
