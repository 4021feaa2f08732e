"""The loop queues work and goes on: nothing in a step that is not logged waits for what the device computes."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_accumulate import configured
from tiny_cache import TinyCache, make_cache

from emkum.stage2_train.train import Distillation, train

WAITING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__array__")
RECIPES = [
    ("ssmke", ["objectives.ctl.bank=20"], {}),
    ("ssmke", ["objectives.ctl.bank=all", "training.batch=4", "training.accumulate=2"], {"chunk": 3}),
    ("cls-mse", [], {"activation_checkpointing": True}),
    ("image-kd", [], {}),
    ("text-kd", ["training.batch=4", "training.accumulate=2"], {}),
    ("shre", ["objectives.ranking.layers=all"], {}),
    ("shre-transformer", ["training.batch=4", "training.accumulate=2"], {"chunk": 3}),
]
FIELDS = ("tokens", "ids", "cls", "layers", "text_layers", "logits")


@pytest.fixture(scope="module", params=["float32", "int8"])
def cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> TinyCache:
    folder = tmp_path_factory.mktemp("waiting")
    return make_cache(folder / "cache", pictures=40, cut=1, storage=request.param, fields=FIELDS)


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the training thread made a number of a tensor."""
    found: list[str] = []

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def watching(self: torch.Tensor, *args: Any, **options: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                found.append(f"Tensor.{name} in " + "".join(traceback.format_stack(limit=4)[:-1]))
            return original(self, *args, **options)

        return watching

    for name in WAITING:
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    return found


@pytest.mark.parametrize(("recipe", "overrides", "changes"), RECIPES)
def test_no_step_but_those_that_are_logged_makes_a_number_of_a_tensor(
    cache: TinyCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    waited: list[str],
    recipe: str,
    overrides: list[str],
    changes: dict[str, Any],
) -> None:
    """From the end of the first step to the end of the last but one; the last is logged."""
    transfer, seen = Distillation.transfer_batch_to_device, list[int]()

    def transferring(self: Distillation, *args: Any) -> Any:
        seen.append(len(waited))
        return transfer(self, *args)

    monkeypatch.setattr(Distillation, "transfer_batch_to_device", transferring)
    config = configured(
        cache, tmp_path / "run", recipe, "training.batch=8", "evaluation.every_epochs=9", *overrides, **changes
    )
    train(replace(config, log_every=1000, max_steps=6), say=lambda line: None)
    assert len(seen) in (6, 12)
    assert not waited[seen[1] : seen[-1]], waited[seen[1]]
    assert len(waited) > seen[-1]  # the last step is logged: the watch works
