"""Short runs of training on the CPU: their configuration, what they say and log, a signal in their midst."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_cache import TinyCache

from emkum.stage2_train import losses
from emkum.stage2_train.train import TrainConfig, train


def exact(cache: TinyCache, run_dir: Path, recipe: str, *overrides: str, **changes: Any) -> TrainConfig:
    """In float32, with every step logged. overrides: of the recipe; changes: of the configuration."""
    common = {"precision": "float32", "device": "cpu", "log_every": 1}
    return TrainConfig(cache.path, recipe, overrides, run_dir, **{**common, **changes})


def run(config: TrainConfig) -> list[str]:
    """Trains; what was said."""
    lines: list[str] = []
    train(config, say=lines.append)
    return lines


def logged(folder: Path, column: str = "loss") -> np.ndarray:
    """A column of metrics.csv, where it has a value."""
    with (folder / "metrics.csv").open() as file:
        return np.array([float(row[column]) for row in csv.DictReader(file) if row[column]])


def signal_at(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends this process SIGINT while the given batch of the process, from 1, is computed."""
    add, seen = losses.Journal.add, [0]

    def counting(self: losses.Journal, parts: Any) -> None:
        seen[0] += 1
        if seen[0] == batch:
            os.kill(os.getpid(), signal.SIGINT)
        add(self, parts)

    monkeypatch.setattr(losses.Journal, "add", counting)
