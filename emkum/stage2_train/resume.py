"""Going on with a run: what must be the same, where it stopped, and the commands that start and continue it."""

from __future__ import annotations

import filecmp
import hashlib
import random
import shlex
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
from emkum.stage2_train.run_folder import RunFolder, copy_durably, read_checkpoint

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
        "views": table.num_views,
        "rows": rows.hexdigest(),
        "steps": num_steps,
        "seed": seed,
        "precision": compute,
        "live": live,
        "validation": validation_identity(recipe, cache, names),
    }


def validation_identity(recipe: Recipe, cache: Cache, names: FieldNames) -> dict[str, Any] | None:
    """Which rows scores are of: what is best among scores of other rows means nothing. None without validation."""
    split = recipe.evaluation.split
    needed = FieldNames(names.inputs, names.encoder, names.cut, names.ids).needed() if recipe.kind == "pairs" else None
    rows = {name: cache.field(name).rows(split) for name in needed or names.needed()}
    if split not in cache.splits or split == recipe.data.split or not all(len(found) for found in rows.values()):
        return None
    digest = hashlib.sha256()
    for found in rows.values():
        digest.update(found.astype("<i8").tobytes() + b"-")
    for segment in cache.segments:
        if segment.split == split:
            digest.update(segment.digest.encode())
    return {"split": split, "rows": {name: len(found) for name, found in rows.items()}, "digest": digest.hexdigest()}


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
    words = ["emkum", "train", "--cache", str(config.cache), "--run-dir", str(run_dir), "--resume"]
    return shlex.join(words + _same_flags(config))


def _same_flags(config: TrainConfig) -> list[str]:
    """Flags that start and continue share."""
    words = ["--device", config.device] if config.device != "auto" else []
    words += ["--live"] if config.live else []
    for pattern in config.data:
        words += ["--data", pattern]
    words += ["--allow-partial"] if config.allow_partial else []
    words += ["--threads", str(config.threads)] if config.threads != type(config).threads else []
    words += ["--activation-checkpointing"] if config.activation_checkpointing else []
    return words


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from. measured: what run.json would have said then."""

    path: Path
    step: int
    measured: dict[str, Any]


def resume_point(folder: RunFolder, before: Mapping[str, Any] | None, say: Say) -> ResumePoint | None:
    """Where to go on; None for a new run, or one that stopped before its first checkpoint.

    A last.ckpt that cannot be read gives way to best.ckpt, and that is said. Raises NotARun if neither can.
    Makes best.ckpt anew where the last session died between writing last.ckpt and copying it.
    """
    if before is None or not (folder.last.is_file() or folder.best.is_file()):
        return None
    try:
        path, found = folder.last, read_checkpoint(folder.last)
    except NotARun as error:
        path, found = folder.best, _best_instead(folder, before, error)
        say(f"warning: {error.what}; going on from {path}, which takes its place")
        copy_durably(folder.best, folder.last)
    step = int(found["global_step"])
    if path == folder.last and found["emkum"]["best_step"] == step and not _same_bytes(folder.last, folder.best):
        copy_durably(folder.last, folder.best)
    return ResumePoint(path, step, found["emkum"]["measured"])


def _best_instead(folder: RunFolder, before: Mapping[str, Any], last: NotARun) -> dict[str, Any]:
    way_out = f"restore one of them, or start again in another --run-dir; it was started with: {before['command']}"
    if not folder.best.is_file():
        raise NotARun(f"{last.what}, and there is no {folder.best}", way_out) from last
    try:
        return read_checkpoint(folder.best)
    except NotARun as error:
        raise NotARun(f"{last.what}; {error.what}", way_out) from error


def _same_bytes(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def start_command(config: TrainConfig, recipe: Recipe, seed: int, run_dir: Path) -> str:
    """The command that starts this run again."""
    words = ["emkum", "train", "--cache", str(config.cache), "--recipe", config.recipe or recipe.name]
    for override in config.overrides:
        words += ["--set", override]
    words += ["--run-dir", str(run_dir), "--seed", str(seed)]
    words += ["--precision", config.precision] if config.precision != "auto" else []
    words += ["--max-steps", str(config.max_steps)] if config.max_steps else []
    return shlex.join(words + _same_flags(config))


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every random generator a step on `device` could use, as types that weights_only loads."""
    numpy_kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [str(numpy_kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(words), gauss_next],
    }


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss_next))
