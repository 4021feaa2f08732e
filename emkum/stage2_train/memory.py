"""What to change when memory does not suffice: the flags that need less of it, with the numbers of this run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from emkum.errors import OutOfMemory
from emkum.stage2_train.plan import Plan, TrainConfig
from emkum.stage2_train.recipe import Recipe

HOST_WORDS = "can't allocate memory"  # of torch's allocator on the host, which raises a RuntimeError
NEGATIVES = ("itc", "ranking")  # terms whose negatives are those of the batch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of a GPU or of the host is what was lacking."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and HOST_WORDS in str(error)


@contextlib.contextmanager
def advice_for_steps(plan: Plan) -> Iterator[None]:
    """Raises OutOfMemory in place of what a step raises where memory does not suffice."""
    with _told(lambda: _step_in_words(plan), lambda: _smaller_steps(plan.config, plan.recipe)):
        yield


@contextlib.contextmanager
def advice_for_validation(recipe: Recipe) -> Iterator[None]:
    """The same for a validation, whose batch is its own."""
    batch = recipe.evaluation.batch
    smaller = f"--set evaluation.batch={batch // 2}" if batch > 1 else "--set evaluation.split=none: no validation"
    with _told(lambda: f"a validation in batches of {batch}", lambda: smaller):
        yield


@contextlib.contextmanager
def advice_for_start() -> Iterator[None]:
    """The same for what is held in memory before the first step."""
    with _told(
        lambda: "what a run holds from its start (pooled targets, the bank, the student)",
        lambda: (
            "a smaller bank, --set objectives.ctl.bank=4096; fewer --devices: each holds its own; a smaller student"
        ),
    ):
        yield


@contextlib.contextmanager
def _told(what: Callable[[], str], way_out: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OutOfMemory(f"{what()} does not fit into memory: {reason}", f"use less: {way_out()}") from error


def _step_in_words(plan: Plan) -> str:
    config, wanted = plan.config, plan.recipe.training
    each = f", {wanted.batch // config.devices} on each of {config.devices} devices" if config.devices > 1 else ""
    chunk = f"in chunks of {config.chunk}" if config.chunk else "computed at once"
    return f"a batch of {wanted.batch}{each}, {chunk} on {plan.device} in {plan.compute},"


def _smaller_steps(config: TrainConfig, recipe: Recipe) -> str:
    """Each flag with the next smaller number, the ones that change no number first."""
    wanted, ways = recipe.training, list[str]()
    at_once = config.chunk or wanted.batch // config.devices
    if at_once > 1:
        ways.append(f"--chunk {at_once // 2} (the same losses for one more forward pass)")
    if not config.activation_checkpointing:
        ways.append("--activation-checkpointing (the same losses for about a third more time)")
    if wanted.batch % 2 == 0 and wanted.batch // 2 >= config.devices:
        fewer = [term for term in NEGATIVES if term in recipe.terms]
        note = f" (then {' and '.join(fewer)} see half the negatives)" if fewer else ""
        halves = f"training.batch={wanted.batch // 2} training.accumulate={2 * wanted.accumulate}"
        ways.append(f"--set {halves}{note}")
    if "ctl" in recipe.terms:
        bank = recipe.objectives.ctl.bank if recipe.objectives.ctl else 0
        if not isinstance(bank, int) or bank > 1:
            ways.append(f"--set objectives.ctl.bank={bank // 2 if isinstance(bank, int) else 4096}")
    return "; ".join(ways)
