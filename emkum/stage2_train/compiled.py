"""The student's blocks, and the decoding of int8, compiled: the same numbers up to rounding from fewer kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emkum.models.quantise import decode_int8
from emkum.models.resnet import ResNet

if TYPE_CHECKING:
    from emkum.models.backbone import BlockStack
    from emkum.models.multiway import MultiwayStack
    from emkum.stage2_train.student import Student

# Every block is one function to the compiler, which gives up after 8 versions of one. There are a dozen at most: with
# and without a mask, gradient of the input and fewer queries, and text of one token.
MOST_VERSIONS = 64


def compile_blocks(student: Student, device: torch.device, backend: str | Callable[..., object] = "inductor") -> str:
    """Have each block compiled when it first runs. Returns "", or why nothing here compiles; the student stays then.

    Blocks of pictures see one shape. Blocks that see texts are compiled once for every length.
    """
    if reason := why_not(device, backend):
        return reason
    if isinstance(student.network, ResNet):
        return "a ResNet has no blocks of one kind"
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = max(MOST_VERSIONS, torch._dynamo.config.recompile_limit)
    only_pictures = student.spec.text is None
    stacks: tuple[tuple[BlockStack | MultiwayStack | None, bool], ...] = (
        (student.image_blocks, False),
        (student.text_blocks, True),
        (student.shared_blocks, not only_pictures),
        (student.shared_mome, True),
        (student.network.stack if student.network is not None else None, False),
    )
    for stack, lengths_vary in stacks:
        if stack is not None:
            _compile_each(stack, lengths_vary, backend)
    student.compiled = True
    return ""


def _compile_each(stack: BlockStack | MultiwayStack, lengths_vary: bool, backend: str | Callable[..., object]) -> None:
    """Block by block, not the stack as a whole: the compiler then works on one block, however many there are."""
    for block in stack.blocks:
        block.compile(dynamic=lengths_vary, backend=backend)


def compiled_decode(
    backend: str | Callable[..., object] = "inductor",
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """decode_int8 in one pass over the numbers, of any shape: each is read as int8 and written as float32, once."""
    return torch.compile(decode_int8, dynamic=True, backend=backend)


def why_not(device: torch.device, backend: str | Callable[..., object] = "inductor") -> str:
    """Why nothing can be compiled for this device, in a line: the first of what the compiler says of a tiny function.

    "" if it can. Takes seconds, the first time on a machine.
    """

    def tiny(x: Tensor) -> Tensor:
        return (2 * x + 1).relu().sum()

    try:
        torch.compile(tiny, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler may raise: the run goes on without it, and says so
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def uncompiled(student: Student) -> contextlib.AbstractContextManager[object]:
    """Runs its blocks as they are written: for passes that are not worth their own compilation."""
    return torch.compiler.set_stance("force_eager") if student.compiled else contextlib.nullcontext()
