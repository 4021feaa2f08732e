"""The average of a student's weights over the steps: a second student, kept beside the one that is trained."""

from __future__ import annotations

import copy

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from emkum.stage2_train.student import Student


def start_average(student: Student) -> Student:
    """A copy of the student, which no gradient reaches."""
    return copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def update_average(average: Student, student: Student, decay: float, step: int) -> None:
    """average <- d average + (1 - d) student for every trained parameter, d = min(decay, (1 + t) / (10 + t)).

    So do batch norm's statistics. step: t, those done, from 1. In the first steps d is smaller, so that the average
    does not keep where training began: after t steps it looks back over about t / 10 of them, up to 1 / (1 - decay).
    Polyak averaging as an exponential mean; the ramp is that of TensorFlow's ExponentialMovingAverage(num_updates).
    What is frozen is equal in both. A function of the step alone: a resumed run goes on with the same numbers.
    """
    ours, theirs = dict(average.named_parameters()), dict(student.named_parameters())
    names = [name for name, parameter in theirs.items() if parameter.requires_grad]
    momentum = min(decay, (1 + step) / (10 + step))
    average_all = get_ema_multi_avg_fn(momentum)  # type: ignore[no-untyped-call]
    average_all([ours[name] for name in names], [theirs[name] for name in names], step)
    buffers = zip(average.buffers(), student.buffers(), strict=True)
    statistics = [(own, new) for own, new in buffers if own.is_floating_point()]
    if statistics:
        average_all([own for own, _ in statistics], [new for _, new in statistics], step)
