"""The folder of one fine-tuning: finetune.json says what was asked and how far it is, results.json what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import emkum
from emkum.errors import Interrupted, NotARun, StorageFailure, UsageError
from emkum.shards.durable import make_dir, storage_errors, sweep_temporaries, write_file
from emkum.shards.store import is_url
from emkum.stage2_train.finetune.loop import refuse_other
from emkum.stage2_train.finetune.settings import Schedule
from emkum.stage2_train.run_folder import LoadedRun, RunFolder, git_revision, held, read_info


@dataclass(frozen=True)
class FinetuneConfig:
    """One `emkum finetune`. `settings` is of the task's kind; data that the task does not read stays empty.

    checkpoint: which weights of the run, as in `load_run`. linear: classes from frozen features. data: of glue the
    training file and the one measured on; of classify what `--images` names; of retrieval tars to measure on. chunk: as
    that of `emkum train`.
    """

    run: Path
    task: str
    settings: Schedule
    cache: str | None = None
    out: Path | None = None
    resume: bool = False
    seeds: tuple[int, ...] = (0,)
    checkpoint: str = "best"
    baselines: bool = False
    linear: bool = False
    data: tuple[str, ...] = ()
    size: int | None = None
    glue_task: str = ""
    split: str = "train"
    test_split: str = "val"
    chunk: int = 0
    device: str = "auto"
    precision: str = "auto"
    batch_size: int = 256
    threads: int | None = None
    max_bad: float = 0.001

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UsageError(f"seeds {list(self.seeds)} are not different numbers from 0", "give them as --seeds 0,1,2")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise UsageError(f"--precision {self.precision}", "use auto, float32 or bfloat16")
        if self.resume and self.out is None:
            raise UsageError("--resume does not say what to go on with", "name its folder: --out FOLDER")


def cache_place(config: FinetuneConfig, run: LoadedRun) -> Path | str:
    """Where the cache lies: the one named, or the run's own."""
    if config.cache is None:
        return run.cache_path
    return config.cache if is_url(config.cache) else Path(config.cache)


@dataclass(frozen=True)
class FinetuneFolder:
    """Paths inside the folder."""

    dir: Path

    @property
    def info(self) -> Path:
        return self.dir / "finetune.json"

    @property
    def results(self) -> Path:
        return self.dir / "results.json"

    @property
    def features(self) -> Path:
        return self.dir / "features.safetensors"

    def job(self, name: str, seed: int) -> Path:
        """Where a model's checkpoint, weights and scores lie."""
        return self.dir / f"{name.replace(',', '').replace(' ', '-')}-seed-{seed}"


@contextlib.contextmanager
def opened(config: FinetuneConfig) -> Iterator[FinetuneFolder]:
    """The folder of a new fine-tuning, RUN/finetune-<task>-<n> or --out, or of one that goes on; held meanwhile.

    That of retrieval is held by the training itself. A folder made here in which nothing began is taken away
    again. Interrupted gets the command that continues.
    Raises NotARun for a run that is none, or where there is nothing to go on with, UsageError where --out holds a
    fine-tuning already, AnotherWriter.
    """
    read_info(RunFolder(config.run))  # nothing is written where no run is
    folder, made = _place(config)
    holds = config.task != "retrieval"
    try:
        with held(RunFolder(folder.dir)) if holds else contextlib.nullcontext():
            if not config.resume:
                _refuse_used(folder)
            if holds:
                sweep_temporaries(folder.dir, 0)
            try:
                yield folder
            except Interrupted as stopped:
                with contextlib.suppress(NotARun, StorageFailure):
                    write_json(folder.info, {**read_finetuning(folder), "status": "interrupted"})
                raise Interrupted(stopped.what, f"continue: {continue_command(config, folder.dir)}") from stopped
    finally:
        if made and not folder.info.exists():
            RunFolder(folder.dir).lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds something after all
                folder.dir.rmdir()


def start_command(config: FinetuneConfig) -> str:
    """The command that starts this fine-tuning again."""
    words = ["emkum", "finetune", str(config.run), "--task", config.task]
    words += ["--cache", config.cache] if config.cache is not None else []
    if config.task == "glue":
        words += ["--glue-task", config.glue_task]
        flags = ("--train", "--dev")
        words += [word for pair in zip(flags, config.data, strict=False) for word in pair]
    else:
        flag = "--images" if config.task == "classify" else "--data"
        words += [word for path in config.data for word in (flag, path)]
    words += ["--linear"] if config.linear else []
    words += ["--size", str(config.size)] if config.size is not None else []
    if config.task == "retrieval":
        words += ["--split", config.split, "--test-split", config.test_split]
    default = type(config.settings)()
    for field in dataclasses.fields(config.settings):
        value = getattr(config.settings, field.name)
        if value != getattr(default, field.name):
            words += ["--set", f"{field.name}={value}"]
    words += ["--seeds", ",".join(map(str, config.seeds))]
    words += ["--baselines"] if config.baselines else []
    for name in ("checkpoint", "chunk", "device", "precision", "batch_size", "threads", "max_bad"):
        if getattr(config, name) != getattr(FinetuneConfig, name):
            words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    return shlex.join(words)


def continue_command(config: FinetuneConfig, folder: Path) -> str:
    """The command that goes on with a fine-tuning."""
    return f"{start_command(config)} {shlex.join(['--out', str(folder), '--resume'])}"


def _place(config: FinetuneConfig) -> tuple[FinetuneFolder, bool]:
    if config.out is not None:
        made = not config.out.exists()
        if config.resume and not FinetuneFolder(config.out).info.is_file():
            raise NotARun(f"{config.out} holds no fine-tuning to go on with", "leave --resume out to start one")
        with storage_errors(config.out):
            make_dir(config.out)
        return FinetuneFolder(config.out), made
    with storage_errors(config.run):
        number = 1
        while True:
            path = config.run / f"finetune-{config.task}-{number}"
            try:
                path.mkdir()
                return FinetuneFolder(path), True
            except FileExistsError:
                number += 1


def _refuse_used(folder: FinetuneFolder) -> None:
    if folder.info.is_file():
        raise UsageError(
            f"{folder.dir} holds a fine-tuning already", "continue it: the same command with --resume; or name another"
        )


def read_finetuning(folder: FinetuneFolder) -> dict[str, Any]:
    """finetune.json. Raises NotARun."""
    try:
        found = json.loads(folder.info.read_text(encoding="utf-8"))
        if not isinstance(found["identity"], dict):
            raise KeyError("identity")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotARun(f"{folder.info} cannot be read: {error}", "start again in another --out") from error
    return dict(found)


def begin(
    folder: FinetuneFolder, config: FinetuneConfig, identity: Mapping[str, Any], more: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes finetune.json at the start, or compares it where the fine-tuning goes on; what it says.

    Raises ResumeMismatch where it was started with something else.
    """
    if config.resume:
        before = read_finetuning(folder)
        way_out = f"continue it as it was started: {before.get('continue')}; or name another --out"
        refuse_other(before["identity"], identity, str(folder.dir), way_out)
    info = {
        "task": config.task,
        "run": str(config.run),
        "checkpoint": config.checkpoint,
        "settings": dataclasses.asdict(config.settings),
        "seeds": list(config.seeds),
        "identity": dict(identity),
        "command": start_command(config),
        "continue": continue_command(config, folder.dir),
        "git_revision": git_revision(),
        "versions": {
            "emkum": emkum.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        **more,
        "status": "running",
    }
    write_json(folder.info, info)
    return info


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """One JSON file, replaced whole. Raises StorageFailure."""
    write_file(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())
