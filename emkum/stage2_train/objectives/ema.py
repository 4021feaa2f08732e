"""A network that follows another: the exponential moving average of its parameters."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def ema_update_(average: nn.Module, student: nn.Module, momentum: float) -> None:
    """p_average <- m p_average + (1 - m) p_student, for every parameter, in place; buffers are copied.

    Called once a step, after the optimiser's. Both modules have the same parameters by name. Ranks whose students are
    equal keep equal averages, without a word. Source: Tarvainen and Valpola 2017 (arXiv:1703.01780), section 2.
    """
    ours, theirs = dict(average.named_parameters()), dict(student.named_parameters())
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, parameter in ours.items():
        parameter.lerp_(theirs[name].to(parameter.dtype), 1.0 - momentum)
    for name, buffer in average.named_buffers():
        buffer.copy_(student.get_buffer(name))
