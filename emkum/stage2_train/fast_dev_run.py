"""A few steps of a training, from end to end, in a folder that is thrown away: does it work on this machine?"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

from emkum.stage2_train.plan import Say, TrainConfig
from emkum.stage2_train.results import RunResult
from emkum.stage2_train.run_folder import RunFolder, load_run, read_checkpoint

FAST_STEPS = 3


def fast_dev_run(config: TrainConfig, train: Callable[[TrainConfig, Say], RunResult], say: Say) -> RunResult:
    """Train for FAST_STEPS, validate, write a checkpoint and read it back. The run's own folder is not touched.

    train: what the real run will call; it raises what the real run would.
    """
    with tempfile.TemporaryDirectory(prefix="emkum-fast-dev-run-") as place:
        folder = RunFolder(Path(place) / "run")
        loggers = tuple("wandb-offline" if name == "wandb" else name for name in config.loggers)
        steps = min(FAST_STEPS, config.max_steps or FAST_STEPS)
        result = train(
            dataclasses.replace(
                config, fast_dev_run=False, run_dir=folder.dir, max_steps=steps, loggers=loggers, log_every=1
            ),
            lambda line: say(line) if not line.startswith("next: ") else None,
        )
        load_run(folder.dir)
        read_checkpoint(folder.last)
        kept = sum(path.stat().st_size for path in folder.dir.rglob("*") if path.is_file())
    scored = f"a validation ({result.score_name} {result.score:.4g})" if result.score is not None else "no validation"
    say(
        f"everything works: {result.steps} steps, {scored}, a checkpoint written and read back. A run folder takes "
        f"about {kept / 2**20:,.0f} MiB, the process {result.peak_memory_bytes / 2**30:.2f} GiB of memory. Nothing was "
        "kept"
    )
    return result
