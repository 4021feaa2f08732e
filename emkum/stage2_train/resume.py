"""Going on with a run: what must be the same, where it stopped, and the commands that start and continue it."""

from __future__ import annotations

import dataclasses
import filecmp
import hashlib
import json
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
from emkum.stage2_train.order import Shuffle
from emkum.stage2_train.recipe import Recipe, recipe_from_table
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.run_folder import RunFolder, copy_durably, pieces, read_checkpoint
from emkum.stage2_train.samples import SampleTable

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
    shuffle: Shuffle,
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
        "shuffle": shuffle.to_json(),
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
    differences = _differences(_with_defaults(before["identity"]), now)
    names = [difference for difference in differences if difference[0] == "recipe.name"]
    if differences:
        shown = "; ".join(f"{path}: {old} in the run, {new} now" for path, old, new in (names or differences)[:5])
        raise ResumeMismatch(
            f"{config.run_dir} cannot be continued with this ({shown})",
            f"continue it as it was started: {before['continue']}; or start a new run in another --run-dir",
        )


def _with_defaults(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity whose recipe has every key: a run of before a key existed had its default."""
    return {"shuffle": Shuffle().to_json(), **identity, "recipe": recipe_from_table(identity["recipe"]).to_json()}


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
    words += ["--shuffle", config.shuffle] if config.shuffle != "auto" else []
    words += ["--mix-blocks", str(config.mix_blocks)] if config.mix_blocks else []
    words += ["--verify", config.verify] if config.verify != type(config).verify else []
    words += ["--threads", str(config.threads)] if config.threads != type(config).threads else []
    words += ["--prefetch", str(config.prefetch)] if config.prefetch != type(config).prefetch else []
    words += ["--activation-checkpointing"] if config.activation_checkpointing else []
    words += ["--chunk", str(config.chunk)] if config.chunk else []
    words += ["--compile"] if config.compile else []
    words += ["--devices", str(config.devices)] if config.devices > 1 else []
    if config.loggers != type(config).loggers:
        for name in config.loggers:
            words += ["--logger", name]
    return words


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from. measured: what run.json would have said then.

    scored: False where the session was stopped in the validation that follows its last step: it comes first then.
    ended: no score was better for `evaluation.patience` validations, and the run ended there.
    """

    path: Path
    step: int
    scored: bool
    measured: dict[str, Any]
    ended: bool = False


def resume_point(
    folder: RunFolder, before: Mapping[str, Any] | None, identity: Mapping[str, Any], say: Say
) -> ResumePoint | None:
    """Where to go on; None for a new run, or one that stopped before its first checkpoint.

    A last.ckpt that cannot be read gives way to the latest of previous.ckpt and best.ckpt that can, and that is said.
    Raises NotARun if none can, ResumeMismatch if something is missing in it or if it is of another run.
    Makes best.ckpt anew where the last session died between writing last.ckpt and copying it.
    """
    there = [path for path in (folder.last, folder.previous, folder.best) if path.is_file()]
    if before is None or not there:
        return None
    try:
        path, found = folder.last, read_checkpoint(folder.last)
    except NotARun as error:
        path, found = _latest_instead([path for path in there if path != folder.last], before, error)
        say(f"warning: {error.what}; going on from {path}, which takes its place, at step {found.get('global_step')}")
    check_whole(found, path, identity, before)
    step = int(found["global_step"])
    if path != folder.last:
        copy_durably(path, folder.last)
    elif "unstepped" not in found and found["emkum"]["best_step"] == step and not _same_bytes(folder.last, folder.best):
        copy_durably(folder.last, folder.best)
    kept = found["emkum"]
    return ResumePoint(path, step, kept["scored"], kept["measured"], kept.get("ended", False))


def _latest_instead(others: list[Path], before: Mapping[str, Any], last: NotARun) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of the most steps among those that can be read."""
    good, damage = [], [last.what]
    for path in others:
        try:
            good.append((path, read_checkpoint(path)))
        except NotARun as error:
            damage.append(error.what)
    if not good:
        raise NotARun(f"no checkpoint is left: {'; '.join(damage)}", _restore_or_restart(before)) from last
    return max(good, key=lambda checkpoint: checkpoint[1].get("global_step", -1))


def check_whole(found: Mapping[str, Any], path: Path, identity: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Raise ResumeMismatch if a piece that was written is missing, or if the checkpoint is of another run.

    A run that went on without its optimiser's state, say, would not be the run that was stopped.
    """
    held = {name: value for name, value in found.items() if name != "pieces"}
    missing = sorted(set(found["pieces"]) - set(pieces(held)))
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ResumeMismatch(f"checkpoint {path} lacks {shown}", _restore_or_restart(before))
    theirs, ours = (json.loads(json.dumps(whose)) for whose in (found["emkum"]["identity"], identity))
    differences = _differences(_with_defaults(theirs), _with_defaults(ours))
    if differences:
        shown = "; ".join(f"{name}: {old} in the checkpoint, {new} in the run" for name, old, new in differences[:5])
        raise ResumeMismatch(f"checkpoint {path} is of another run ({shown})", _restore_or_restart(before))


def _restore_or_restart(before: Mapping[str, Any]) -> str:
    return f"restore it, or start again in another --run-dir; the run was started with: {before['command']}"


def _same_bytes(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def start_command(config: TrainConfig, recipe: Recipe, seed: int, decided: Shuffle | None, run_dir: Path) -> str:
    """The command that starts this run again. decided: the shuffle that was chosen by what it ran on."""
    if decided is not None and config.shuffle == "auto":
        config = dataclasses.replace(config, shuffle=decided.mode, mix_blocks=decided.window or None)
    words = ["emkum", "train", "--cache", str(config.cache), "--recipe", config.recipe or recipe.name]
    for override in config.overrides:
        words += ["--set", override]
    words += ["--run-dir", str(run_dir), "--seed", str(seed)]
    words += ["--precision", config.precision] if config.precision != "auto" else []
    words += ["--max-steps", str(config.max_steps)] if config.max_steps else []
    return shlex.join(words + _same_flags(config))


def seed_rng(seed: int) -> None:
    """Every random generator of the process at the start of a run, so that two runs are alike whatever ran before."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


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
