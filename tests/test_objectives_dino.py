"""Self-distillation against a plain float64 reference, its collapses, and the heads that follow each other."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from test_objectives_codes import plain_unit, random, softmax
from torch import nn

from emkum.stage2_train.objectives.dino import DinoHead, DinoHeads, dino
from emkum.stage2_train.objectives.ema import ema_update_

# --- dino --------------------------------------------------------------------------------------------------------


def test_dino_equals_the_plain_sum() -> None:
    images, texts, teacher, centre = random(3, 5), random(3, 5, seed=1), random(3, 5, seed=2), random(5, seed=3)
    found = dino(images, texts, teacher, centre, student_temperature=0.2, teacher_temperature=0.5)
    taught = [softmax((row - centre.numpy()) / 0.5) for row in teacher.numpy()]
    losses, kls = [], []
    for side in (images, texts):
        predicted = [softmax(row / 0.2) for row in side.numpy()]
        pairs = list(zip(taught, predicted, strict=True))
        losses.append(np.mean([-sum(p[k] * math.log(q[k]) for k in range(5)) for p, q in pairs]))
        kls.append(np.mean([sum(p[k] * math.log(p[k] / q[k]) for k in range(5)) for p, q in pairs]))
    mean = np.mean(taught, axis=0)
    assert found.image_loss.item() == pytest.approx(losses[0], rel=1e-12)
    assert found.text_loss.item() == pytest.approx(losses[1], rel=1e-12)
    assert found.loss.item() == pytest.approx(sum(losses) / 2, rel=1e-12)
    assert found.image_kl.item() == pytest.approx(kls[0], rel=1e-9)
    assert found.text_kl.item() == pytest.approx(kls[1], rel=1e-9)
    assert found.target_entropy.item() == pytest.approx(np.mean([-(p * np.log(p)).sum() for p in taught]), rel=1e-12)
    assert found.marginal_entropy.item() == pytest.approx(-(mean * np.log(mean)).sum(), rel=1e-12)


def test_dino_gradients_are_those_of_finite_differences_and_the_teacher_has_none() -> None:
    teacher, centre = random(2, 4, seed=2).requires_grad_(), random(4, seed=3)
    inputs = random(2, 4).requires_grad_(), random(2, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, t: dino(i, t, teacher.detach(), centre).loss, inputs)
    dino(*inputs, teacher, centre).loss.backward()
    assert teacher.grad is None


def test_entropies_tell_both_collapses() -> None:
    even = dino(random(3, 4), random(3, 4), torch.zeros(3, 4), torch.zeros(4))
    assert even.target_entropy.item() == pytest.approx(math.log(4))
    one = dino(random(3, 4), random(3, 4), torch.eye(4)[[2, 2, 2]], torch.zeros(4))
    assert one.marginal_entropy.item() < 1e-6
    healthy = dino(random(4, 4), random(4, 4), torch.eye(4), torch.zeros(4))
    assert healthy.marginal_entropy.item() == pytest.approx(math.log(4))
    assert healthy.target_entropy.item() < 1e-6


def test_the_centre_takes_away_a_prototype_that_wins_everywhere() -> None:
    heads = DinoHeads(3, prototypes=4, hidden=5, bottleneck=2)
    always = torch.tensor([[0.9, 0.0, 0.1, 0.0], [0.9, 0.1, 0.0, 0.0]])
    heads.update_centre_(always)
    assert torch.allclose(heads.centre_K, torch.tensor([0.09, 0.005, 0.005, 0.0]))
    for _ in range(100):
        heads.update_centre_(always)
    found = dino(always, always, always, heads.centre_K)
    assert found.marginal_entropy.item() > 1.0


def test_logits_are_cosines_with_prototypes_of_length_one() -> None:
    torch.manual_seed(0)
    head = DinoHead(3, prototypes=6, hidden=8, bottleneck=4).double()
    features = random(2, 3)
    found = head(features)
    bottleneck = head.mlp(features).detach().numpy()
    plain = [[plain_unit(b) @ plain_unit(w) for w in head.prototypes_KE.detach().numpy()] for b in bottleneck]
    assert np.allclose(found.detach().numpy(), plain)
    with torch.no_grad():
        head.prototypes_KE.mul_(7.0)
    assert torch.allclose(head(features), found)


def test_the_teachers_head_starts_as_the_students_and_follows_it() -> None:
    heads = DinoHeads(3, prototypes=4, hidden=5, bottleneck=2)
    features = random(2, 3).float()
    images, _, teacher = heads(features, features, features)
    assert torch.equal(images, teacher)
    assert not teacher.requires_grad
    before = copy.deepcopy(heads.teacher)
    with torch.no_grad():
        for parameter in heads.student.parameters():
            parameter.add_(1.0)
    heads.update_teacher_(0.9)
    for now, old in zip(heads.teacher.parameters(), before.parameters(), strict=True):
        assert torch.allclose(now - old, torch.full_like(old, 0.1), atol=1e-6)
        assert not now.requires_grad


# --- ema ---------------------------------------------------------------------------------------------------------


def test_the_average_keeps_its_momentum_of_itself_and_takes_the_buffers() -> None:
    average, student = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        average.weight.fill_(1.0), student.weight.fill_(3.0)
        student.running_mean.fill_(7.0)
    ema_update_(average, student, 0.75)
    assert average.weight.tolist() == [1.5] * 3
    assert average.running_mean.tolist() == [7.0] * 3
    assert student.weight.tolist() == [3.0] * 3


def test_modules_of_other_parameters_are_not_averaged() -> None:
    with pytest.raises(AssertionError):
        ema_update_(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.9)
