"""Going on with a run: what must be the same, where it stopped, and the commands that start and continue it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from emkum.errors import NotARun, ResumeMismatch
from emkum.shards.reader import Cache
from emkum.stage2_train.loader import SampleTable
from emkum.stage2_train.recipe import FieldNames, Recipe
from emkum.stage2_train.run_folder import RunFolder, read_checkpoint

if TYPE_CHECKING:
    from emkum.stage2_train.plan import Say, TrainConfig


def run_identity(
    recipe: Recipe,
    cache: Cache,
    names: FieldNames,
    table: SampleTable,
    num_steps: int,
    seed: int,
    compute: str,
    live: bool,
) -> dict[str, Any]:
    """What must be equal for a run to be continued."""
    rows = hashlib.sha256()
    for array in (table.image_rows_N, table.text_rows_M, table.first_caption_N):
        rows.update(b"-" if array is None else array.astype("<i8").tobytes())
    return {
        "recipe": recipe.to_json(),
        "cache": cache.uuid,
        "fields": {name: cache.field(name).record["fingerprint_digest"] for name in names.needed()},
        "samples": table.num_samples,
        "rows": rows.hexdigest(),
        "steps": num_steps,
        "seed": seed,
        "precision": compute,
        "live": live,
    }


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise ResumeMismatch, both values shown, unless the run of `before` (its run.json) has the identity `now`."""
    differences = _differences(before["identity"], now)
    names = [difference for difference in differences if difference[0] == "recipe.name"]
    if differences:
        shown = "; ".join(f"{path}: {old} in the run, {new} now" for path, old, new in (names or differences)[:5])
        raise ResumeMismatch(
            f"{config.run_dir} cannot be continued with this ({shown})",
            f"continue it as it was started: {before['continue']}; or start a new run in another --run-dir",
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((prefix + key, a, b))
    return found


def continue_command(config: TrainConfig, run_dir: Path) -> str:
    """The command that goes on with a run."""
    words = ["emkum train", f"--cache {config.cache}", f"--run-dir {run_dir}", "--resume"]
    words += [f"--device {config.device}"] if config.device != "auto" else []
    words += ["--live"] if config.live else []
    words += [f"--data {pattern}" for pattern in config.data]
    words += ["--allow-partial"] if config.allow_partial else []
    return " ".join(words)


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from. measured: what run.json would have said then."""

    path: Path
    step: int
    measured: dict[str, Any]


def resume_point(folder: RunFolder, before: Mapping[str, Any] | None, say: Say) -> ResumePoint | None:
    """Where to go on; None for a new run, or one that stopped before its first checkpoint.

    A last.ckpt that cannot be read gives way to best.ckpt, and that is said. Raises NotARun if neither can.
    """
    if before is None or not (folder.last.is_file() or folder.best.is_file()):
        return None
    try:
        path, found = folder.last, read_checkpoint(folder.last)
    except NotARun as error:
        path, found = folder.best, read_checkpoint(folder.best)
        say(f"warning: {error.what}; going on from {path}")
    return ResumePoint(path, int(found["global_step"]), found["emkum"]["measured"])


def start_command(config: TrainConfig, recipe: Recipe, seed: int, run_dir: Path) -> str:
    """The command that starts this run again."""
    words = ["emkum train", f"--cache {config.cache}", f"--recipe {config.recipe or recipe.name}"]
    words += [f"--set {override}" for override in config.overrides]
    words += [f"--run-dir {run_dir}", f"--seed {seed}"]
    words += [f"--precision {config.precision}"] if config.precision != "auto" else []
    words += [f"--max-steps {config.max_steps}"] if config.max_steps else []
    words += ["--live"] if config.live else []
    words += ["--allow-partial"] if config.allow_partial else []
    return " ".join(words)


def rng_state() -> dict[str, Any]:
    """The state of every random generator a step could use, as types that weights_only loads."""
    numpy_kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(numpy_kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(words), gauss_next],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss_next))
