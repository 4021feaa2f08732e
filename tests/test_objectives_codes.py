"""Objectives on codes, prototypes and projections against plain float64 references, and the batches that break them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from emkum.errors import UsageError
from emkum.stage2_train.objectives import codes as codes_file
from emkum.stage2_train.objectives.codes import codes_ce, nearest_codes
from emkum.stage2_train.objectives.codes_vq import ProductCodebooks, SubCodeHead, codes_vq
from emkum.stage2_train.objectives.dino import DinoHeads, dino
from emkum.stage2_train.objectives.reduced import ReducedHeads, reduced, variance_guard


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def plain_unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


# --- reduced -----------------------------------------------------------------------------------------------------


def plain_guard(rows: np.ndarray, floor: float) -> float:
    """Channel by channel, deviations from the mean of each."""
    count, width = rows.shape
    units = np.stack([plain_unit(row) * math.sqrt(width) for row in rows])
    total = 0.0
    for channel in range(width):
        mean = sum(units[:, channel]) / count
        variance = sum((value - mean) ** 2 for value in units[:, channel]) / (count - 1)
        total += max(0.0, floor - math.sqrt(variance + 1e-4))
    return total / width


@pytest.mark.parametrize("floor", [0.5, 1.0])
def test_reduced_equals_the_plain_sum(floor: float) -> None:
    images, texts, target = random(5, 3) + 1.5, random(5, 3, seed=1) - 1, random(5, 3, seed=2)
    found = reduced(images, texts, target, floor=floor, guard_weight=2.0)
    distances, guards = [], []
    for side in (images, texts):
        pairs = zip(side.numpy(), target.numpy(), strict=True)
        distances.append(np.mean([((plain_unit(h) - plain_unit(t)) ** 2).sum() for h, t in pairs]))
        guards.append(plain_guard(side.numpy(), floor))
    assert any(guards)
    assert found.image_loss.item() == pytest.approx(distances[0], rel=1e-12)
    assert found.text_loss.item() == pytest.approx(distances[1], rel=1e-12)
    assert found.image_guard.item() == pytest.approx(guards[0], rel=1e-12)
    assert found.text_guard.item() == pytest.approx(guards[1], rel=1e-12)
    assert found.loss.item() == pytest.approx(sum(distances) / 2 + 2.0 * sum(guards) / 2, rel=1e-12)


def test_reduced_gradients_are_those_of_finite_differences_and_the_target_has_none() -> None:
    target = random(4, 3, seed=2).requires_grad_()
    inputs = random(4, 3).requires_grad_(), random(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, t: reduced(i, t, target.detach()).loss, inputs)
    reduced(*inputs, target).loss.backward()
    assert target.grad is None


def test_a_batch_of_one_has_no_guard_and_one_of_copies_has_all_of_it() -> None:
    one = reduced(random(1, 3), random(1, 3, seed=1), random(1, 3, seed=2))
    assert one.image_guard.item() == one.text_guard.item() == 0
    copies = random(1, 3).expand(4, 3).clone().requires_grad_()
    found = reduced(copies, copies, random(4, 3, seed=2))
    found.loss.backward()
    assert found.image_guard.item() == pytest.approx(1 - 0.01)  # 1 - sqrt(eps)
    assert torch.isfinite(copies.grad).all()  # type: ignore[arg-type]


def test_directions_spread_evenly_are_left_alone() -> None:
    axes = torch.cat([torch.eye(4), -torch.eye(4)]).double()
    assert variance_guard(axes, 1.0).item() == 0


def test_the_guard_keeps_projections_apart_where_the_distance_alone_pulls_them_into_one_point() -> None:
    """A feature that knows only part of the target, and two projections that may agree on anything."""
    targets = random(64, 8, seed=1).float()
    features = 0.7 * targets @ random(8, 8, seed=2).float() + 0.7 * random(64, 8, seed=3).float()
    spread = {}
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        heads = ReducedHeads(8, 4)
        optimiser = torch.optim.Adam(heads.student.parameters(), 0.05)
        for _ in range(300):
            optimiser.zero_grad()
            reduced(*heads(features, features, targets), guard_weight=weight).loss.backward()
            optimiser.step()
            heads.update_(0.9)
        spread[weight] = nn.functional.normalize(heads.teacher(targets), dim=1).std(dim=0).mean().item() * 2
    assert spread[0.0] < 0.01
    assert spread[5.0] > 0.7


def test_projections_start_as_principal_components_and_the_teachers_follows() -> None:
    heads = ReducedHeads(5, 3).double()
    components, mean = random(4, 5, seed=3), random(5, seed=4)  # one component more than is wanted
    heads.start(components, mean)
    inputs = random(2, 5), random(2, 5, seed=1), random(2, 5, seed=2)
    for given, projected in zip(inputs, heads(*inputs), strict=True):
        plain = [[float(c @ (x - mean)) for c in components[:3]] for x in given]
        assert np.allclose(projected.detach().numpy(), plain)
    with torch.no_grad():
        heads.student.weight.add_(1.0)
    before = heads.teacher.weight.clone()
    heads.update_(0.999)
    assert torch.allclose(heads.teacher.weight - before, torch.full_like(before, 0.001))
    assert not heads.teacher.weight.requires_grad
    with pytest.raises(AssertionError, match="4 components for 5"):
        ReducedHeads(5, 5).start(components.float(), mean.float())


def test_reduced_does_not_broadcast() -> None:
    with pytest.raises(AssertionError):
        reduced(random(4, 3), random(4, 3), random(1, 3))


# --- codes -------------------------------------------------------------------------------------------------------


def test_codes_are_nearest_by_angle_not_by_distance() -> None:
    codebook = torch.tensor([[10.0, 1.0], [0.1, 0.1], [0.0, -3.0]])
    vectors = torch.tensor([[1.0, 0.0], [0.3, 0.2], [9.0, 9.0], [0.01, -0.5], [0.0, 0.0]])
    assert nearest_codes(vectors, codebook).tolist() == [0, 1, 1, 2, 0]


def test_codes_of_patches_keep_their_axes_however_many_are_compared_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    patches, codebook = random(3, 7, 4), random(6, 4, seed=1)
    whole = nearest_codes(patches, codebook)
    units = [plain_unit(code) for code in codebook.numpy()]
    plain = [[np.argmax([code @ patch for code in units]) for patch in row] for row in patches.numpy()]
    assert whole.tolist() == plain
    monkeypatch.setattr(codes_file, "ROWS_AT_ONCE", 4)
    assert torch.equal(nearest_codes(patches, codebook), whole)


def test_codes_ce_is_half_the_mean_of_each_side() -> None:
    images, texts, codes = random(4, 6), random(4, 6, seed=1), torch.tensor([5, 0, 0, 2])
    found = codes_ce(images, texts, codes)
    plain = [
        np.mean([-math.log(softmax(row)[code]) for row, code in zip(side.numpy(), codes.tolist(), strict=True)])
        for side in (images, texts)
    ]
    right = [np.mean(side.numpy().argmax(1) == codes.numpy()) for side in (images, texts)]
    assert found.image_loss.item() == pytest.approx(plain[0], rel=1e-12)
    assert found.text_loss.item() == pytest.approx(plain[1], rel=1e-12)
    assert found.loss.item() == pytest.approx(sum(plain) / 2, rel=1e-12)
    assert found.image_accuracy.item() == pytest.approx(right[0])
    assert found.text_accuracy.item() == pytest.approx(right[1])


def test_code_gradients_are_those_of_finite_differences() -> None:
    codes = torch.tensor([3, 0, 3])
    inputs = random(3, 4).requires_grad_(), random(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, t: codes_ce(i, t, codes).loss, inputs)
    many = torch.tensor([[3, 0], [1, 1]])
    inputs = random(2, 2, 4).requires_grad_(), random(2, 2, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, t: codes_vq(i, t, many).loss, inputs)


# --- codes-vq ----------------------------------------------------------------------------------------------------


class PlainCodebook:
    """One part's codebook, row by row and code by code, in float64."""

    def __init__(self, codes: int, channels: int, momentum: float, dead: float) -> None:
        self.sums, self.counts = np.zeros((codes, channels)), np.zeros(codes)
        self.momentum, self.dead = momentum, dead

    def code_of(self, row: np.ndarray) -> tuple[int, float]:
        cosines = [s @ row / np.linalg.norm(s) if n else -math.inf for s, n in zip(self.sums, self.counts, strict=True)]
        return int(np.argmax(cosines)), max(cosines)

    def update(self, rows: list[np.ndarray]) -> tuple[float, float, float]:
        found = [self.code_of(row) for row in rows]
        for code in range(len(self.counts)):
            mine = [row for row, (its, fit) in zip(rows, found, strict=True) if its == code and fit > -math.inf]
            self.counts[code] = self.momentum * self.counts[code] + (1 - self.momentum) * len(mine)
            self.sums[code] = self.momentum * self.sums[code] + (1 - self.momentum) * np.sum(mine or [0 * rows[0]], 0)
        share = len(rows) / len(self.counts)
        dead = [code for code in range(len(self.counts)) if self.counts[code] < self.dead * share]
        worst = sorted(range(len(rows)), key=lambda row: found[row][1])
        restarted = [(code, row) for code, row in zip(dead, worst, strict=False) if found[row][1] < 0.9999]
        for code, row in restarted:
            self.sums[code], self.counts[code] = share * rows[row], share
        shares = self.counts / self.counts.sum()
        entropy = -sum(s * math.log(s) for s in shares if s)
        return math.exp(entropy), 1 - len(dead) / len(self.counts), len(restarted) / len(self.counts)


@pytest.mark.parametrize("codes", [3, 16])  # fewer and more than a batch has rows
def test_codebooks_follow_the_plain_moving_averages(codes: int) -> None:
    books = ProductCodebooks(6, groups=2, codes=codes, momentum=0.6, dead=0.3).double()
    plain = [PlainCodebook(codes, 3, 0.6, 0.3) for _ in range(2)]
    for step in range(12):
        targets = random(5, 6, seed=step)
        usage = books.update_(targets)
        parts = [[plain_unit(row[s * 3 : s * 3 + 3]) for row in targets.numpy()] for s in range(2)]
        expected = np.mean([book.update(rows) for book, rows in zip(plain, parts, strict=True)], axis=0)
        assert [usage.perplexity.item(), usage.used.item(), usage.restarted.item()] == pytest.approx(expected, abs=1e-6)
        assert np.allclose(books.counts_SJ, [book.counts for book in plain])
        assert np.allclose(books.sums_SJC, [book.sums for book in plain])
        found = books.codes(targets)
        assert found.tolist() == [[plain[s].code_of(parts[s][row])[0] for s in range(2)] for row in range(5)]


def test_the_first_batch_gives_each_row_a_code_and_later_batches_fill_the_rest() -> None:
    books = ProductCodebooks(4, groups=2, codes=10)
    first = books.update_(random(4, 4).float())
    assert (first.used.item(), first.restarted.item()) == (0, pytest.approx(0.4))
    assert books.codes(random(4, 4).float()).tolist() == [[row, row] for row in range(4)]
    for seed in (1, 2, 3):
        books.update_(random(4, 4, seed=seed).float())
    assert (books.counts_SJ > 0).all()


def test_a_codebook_larger_than_the_data_leaves_codes_empty_and_never_chooses_them() -> None:
    books, targets = ProductCodebooks(4, groups=1, codes=20), random(6, 4).float()
    for _ in range(30):
        usage = books.update_(targets)
    assert usage.used.item() == pytest.approx(6 / 20)
    assert usage.restarted.item() == 0
    assert usage.perplexity.item() == pytest.approx(6, rel=1e-3)
    assert sorted(books.codes(targets)[:, 0].tolist()) == list(range(6))
    assert books.codes(-targets).max().item() < 6


def test_copies_of_one_row_share_a_code_and_a_code_that_lost_its_rows_begins_again() -> None:
    books, row = ProductCodebooks(2, groups=1, codes=2, momentum=0.5), torch.tensor([[1.0, 0.0]])
    books.update_(row.expand(3, 2))
    assert books.codes(row.expand(3, 2)).unique().numel() == 1
    for _ in range(8):
        books.update_(row.expand(3, 2))
    usage = books.update_(torch.tensor([[1.0, 0.0], [1.0, 0.01], [-1.0, 0.0]]))
    assert usage.restarted.item() == pytest.approx(0.5)
    assert books.codes(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))[:, 0].unique().numel() == 2


def test_codebooks_come_back_from_a_checkpoint_as_they_were() -> None:
    books, other = ProductCodebooks(4, groups=2, codes=8), ProductCodebooks(4, groups=2, codes=8)
    books.update_(random(5, 4).float())
    other.load_state_dict(books.state_dict())
    for each in (books, other):
        each.update_(random(5, 4, seed=1).float())
    assert torch.equal(books.sums_SJC, other.sums_SJC)
    assert torch.equal(books.counts_SJ, other.counts_SJ)


def test_codes_vq_is_the_mean_over_parts() -> None:
    images, texts, codes = random(3, 2, 5), random(3, 2, 5, seed=1), torch.tensor([[4, 0], [1, 1], [2, 3]])
    found = codes_vq(images, texts, codes)
    places = [(b, s) for b in range(3) for s in range(2)]
    plain = [
        np.mean([-math.log(softmax(side[b, s].numpy())[codes[b, s]]) for b, s in places]) for side in (images, texts)
    ]
    right = np.mean([int(images[b, s].argmax()) == codes[b, s] for b, s in places])
    assert found.image_loss.item() == pytest.approx(plain[0], rel=1e-12)
    assert found.text_loss.item() == pytest.approx(plain[1], rel=1e-12)
    assert found.loss.item() == pytest.approx(sum(plain) / 2, rel=1e-12)
    assert found.image_accuracy.item() == pytest.approx(right)


def test_the_head_has_the_logits_of_each_part_apart() -> None:
    head = SubCodeHead(4, groups=3, codes=5)
    features = random(2, 4).float()
    assert head(features).shape == (2, 3, 5)
    assert torch.allclose(head(features)[:, 1], features @ head.weight[5:10].T + head.bias[5:10])


def test_a_target_that_does_not_divide_into_so_many_parts_is_refused() -> None:
    with pytest.raises(UsageError) as raised:
        ProductCodebooks(384, groups=7, codes=4)
    assert raised.value.line() == (
        "UsageError: objectives.codes-vq.groups = 7: the 384 channels of the target do not divide into 7 equal parts | "
        "use a number that divides them: --set objectives.codes-vq.groups=6"
    )


# --- all ---------------------------------------------------------------------------------------------------------


def test_gradients_are_finite_under_autocast_to_bfloat16() -> None:
    features = [random(6, 8, seed=s).bfloat16().requires_grad_() for s in range(2)]
    targets = random(6, 8, seed=2).float()
    heads, dinos, head = ReducedHeads(8, 3), DinoHeads(8, 16, 12, 4), SubCodeHead(8, 2, 5)
    books, linear = ProductCodebooks(8, groups=2, codes=5), nn.Linear(8, 5)
    exact = ProductCodebooks(8, groups=2, codes=5)
    for _ in range(2):
        exact.update_(targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            books.update_(targets)
        logits = dinos(*features, targets)
        found = [
            reduced(*heads(*features, targets)),
            codes_ce(linear(features[0]), linear(features[1]), nearest_codes(targets, random(5, 8, seed=4).float())),
            codes_vq(head(features[0]), head(features[1]), books.codes(targets)),
            dino(*logits, dinos.centre_K),
        ]
    assert all(each.loss.dtype == torch.float32 for each in found)
    assert all(z.dtype == torch.float32 for z in logits)
    assert torch.equal(books.sums_SJC, exact.sums_SJC)
    sum(each.loss for each in found).backward()
    trained = [*heads.student.parameters(), *dinos.student.parameters(), *head.parameters(), *linear.parameters()]
    for parameter in (*features, *trained):
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.any()


def test_a_batch_of_one_is_finite() -> None:
    features = [random(1, 8, seed=s).float().requires_grad_() for s in range(2)]
    target = random(1, 8, seed=2).float()
    books, head, dinos = ProductCodebooks(8, groups=2, codes=5), SubCodeHead(8, 2, 5), DinoHeads(8, 16, 12, 4)
    books.update_(target)
    loss = reduced(*ReducedHeads(8, 3)(*features, target)).loss + dino(*dinos(*features, target), dinos.centre_K).loss
    loss = loss + codes_vq(head(features[0]), head(features[1]), books.codes(target)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(each.grad).all() for each in features)  # type: ignore[arg-type]


def test_nothing_waits_for_the_device() -> None:
    """Fake tensors have shapes and no numbers: what asks for one fails there."""
    books, head, dinos = ProductCodebooks(8, 2, 5), SubCodeHead(8, 2, 5), DinoHeads(8, 16, 12, 4)
    heads = ReducedHeads(8, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        features, targets = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
        books.update_(targets)
        logits = dinos(features, features, targets)
        total = reduced(*heads(features, features, targets)).loss + dino(*logits, dinos.centre_K).loss
        total = total + codes_vq(head(features), head(features), books.codes(targets)).loss
        total = total + codes_ce(features, features, nearest_codes(targets, torch.randn(8, 8))).loss
        total.backward()
        heads.update_(), dinos.update_centre_(logits[2]), dinos.update_teacher_()
        with pytest.raises(DataDependentOutputException):
            total.item()  # the watch works
