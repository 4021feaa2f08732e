"""What a run gave and took: the result of a training, its times, its memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emkum.stage2_train.run_folder import RunFolder


@dataclass(frozen=True)
class RunResult:
    """What a training gave. score: by validation, None where the cache has no split to validate on."""

    run_dir: Path
    recipe: str
    steps: int
    score_name: str
    score: float | None
    best_step: int
    seconds: float
    samples_per_second: float
    waited_fraction: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Spent:
    """Seconds of a run: all; those outside of validation and checkpoints; those of steps waiting for their batch."""

    seconds: float = 0.0
    training_seconds: float = 0.0
    waited_seconds: float = 0.0


def result_of(folder: RunFolder, info: Mapping[str, Any]) -> RunResult:
    """The result of a run whose run.json is complete."""
    return RunResult(
        run_dir=folder.dir,
        recipe=info["recipe"]["name"],
        steps=info["steps"],
        score_name=info["score"]["name"],
        score=info["score"]["value"],
        best_step=info["score"]["step"],
        seconds=info["seconds"],
        samples_per_second=info["samples_per_second"],
        waited_fraction=info["waited_fraction"],
        peak_memory_bytes=info["peak_memory_bytes"],
    )


def result_lines(result: RunResult, weights: Path, average: Path | None) -> list[str]:
    """For people: what it took, and where the weights lie."""
    best = f"{result.score_name} {result.score:.4g} at step {result.best_step}: " if result.score is not None else ""
    return [
        f"trained {result.steps} steps in {result.seconds:.0f} s: {result.samples_per_second:.1f} samples/s, "
        f"{100 * result.waited_fraction:.1f} % of the time waiting for data; peak memory "
        f"{result.peak_memory_bytes / 2**30:.2f} GiB",
        f"{best}{weights}" + (f"; the average of weights then: {average}" if average is not None else ""),
    ]


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held on the device; on the CPU, of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)
