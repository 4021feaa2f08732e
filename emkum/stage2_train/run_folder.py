"""The folder of one training run: what lies where, written whole or not at all, and read back."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from emkum.errors import AnotherWriter, NotARun, ResumeMismatch, StorageFailure, UsageError
from emkum.shards.durable import DurableFile, make_dir, storage_errors, sync_dir, write_file
from emkum.stage2_train.recipe import Recipe, recipe_from_table
from emkum.stage2_train.student import Student, StudentSpec

STUDENT_PREFIX = "student."  # of the student's tensors in a checkpoint
INFO_KEYS = ("command", "continue", "recipe", "cache", "identity", "seed", "precision", "total_steps")
COPY_BYTES = 16 * 2**20


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    dir: Path

    @property
    def recipe(self) -> Path:
        return self.dir / "recipe.toml"

    @property
    def info(self) -> Path:
        return self.dir / "run.json"

    @property
    def metrics(self) -> Path:
        return self.dir / "metrics.csv"

    @property
    def last(self) -> Path:
        return self.dir / "checkpoints" / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.dir / "checkpoints" / "best.ckpt"

    @property
    def lock(self) -> Path:
        return self.dir / ".lock"

    @property
    def weights(self) -> Path:
        return self.dir / "student.safetensors"

    @property
    def spec(self) -> Path:
        return self.dir / "student.json"


@dataclass(frozen=True)
class LoadedRun:
    """A finished or interrupted run, its student in evaluation mode on the CPU. `info` is run.json."""

    student: Student
    recipe: Recipe
    cache_path: Path
    info: dict[str, Any]
    dir: Path


def load_run(run_dir: Path | str, checkpoint: str = "best") -> LoadedRun:
    """The student of a run folder: `checkpoint` "best" (by validation), "last", or the path of a checkpoint file.

    Raises NotARun for a folder without a run, or one without that checkpoint.
    """
    folder = RunFolder(Path(run_dir))
    info = read_info(folder)
    student = Student(_read_spec(folder))
    if checkpoint == "best":
        weights = _read_weights(folder)
    else:
        path = folder.last if checkpoint == "last" else Path(checkpoint)
        state = read_checkpoint(path)["state_dict"]
        weights = {k.removeprefix(STUDENT_PREFIX): v for k, v in state.items() if k.startswith(STUDENT_PREFIX)}
    try:
        student.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise NotARun(
            f"the weights of {folder.dir} ({checkpoint}) are not of its student.json: {reason}",
            "the folder mixes files of two runs; train again into a new one",
        ) from error
    recipe = recipe_from_table(info["recipe"])
    return LoadedRun(student.eval(), recipe, Path(info["cache"]["path"]), info, folder.dir)


def read_info(folder: RunFolder) -> dict[str, Any]:
    """run.json. Raises NotARun."""
    try:
        found = json.loads(folder.info.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotARun(
            f"{folder.dir} holds no training run (no run.json)", "give the folder that `emkum train` printed"
        ) from error
    except ValueError as error:
        raise NotARun(f"{folder.info} is not JSON: {error}", "restore the folder, or train again") from error
    lacking = [key for key in INFO_KEYS if key not in found] if isinstance(found, dict) else list(INFO_KEYS)
    if lacking:
        raise NotARun(
            f"{folder.info} is not of an emkum run: it lacks {', '.join(lacking)}",
            "give the folder that `emkum train` printed",
        )
    if not isinstance(found["cache"], dict) or not {"path", "uuid"} <= set(found["cache"]):
        raise NotARun(f"{folder.info} does not name its cache", "restore the folder, or train again")
    return dict(found)


def write_info(folder: RunFolder, info: Mapping[str, Any]) -> None:
    """run.json, replaced whole. Raises StorageFailure."""
    write_file(folder.info, (json.dumps(info, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def write_student(folder: RunFolder, student: Student) -> None:
    """student.safetensors, then student.json. Raises StorageFailure."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
    write_file(folder.weights, save(tensors))
    write_file(folder.spec, (json.dumps(student.spec.to_json(), indent=2, sort_keys=True) + "\n").encode())


def _read_spec(folder: RunFolder) -> StudentSpec:
    if not folder.spec.is_file():
        raise NotARun(
            f"{folder.dir} holds a run without a student yet: it stopped before its first validation",
            f"continue it: emkum train --resume --run-dir {folder.dir}",
        )
    try:
        return StudentSpec.from_json(json.loads(folder.spec.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise NotARun(f"{folder.spec} cannot be read: {error}", "it was altered, or a newer emkum wrote it") from error


def _read_weights(folder: RunFolder) -> dict[str, Tensor]:
    try:
        return load(folder.weights.read_bytes())
    except (OSError, SafetensorError) as error:
        raise NotARun(
            f"{folder.weights} cannot be read: {error}",
            "restore it, or train again into a new folder",
        ) from error


# --- checkpoints -------------------------------------------------------------------------------------------------


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """One checkpoint file, durable before it takes the old one's name, and proven to load with weights_only.

    Raises StorageFailure; the old file then stays as it was.
    """
    buffer = io.BytesIO()
    torch.save(dict(checkpoint), buffer)
    unproven = path.with_name(f".{path.name}.tmp")
    with DurableFile(unproven) as file:
        file.write(buffer.getbuffer())
        file.commit()
    try:
        torch.load(unproven, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        unproven.unlink(missing_ok=True)
        raise StorageFailure(f"{path} cannot be read after writing: {error}", "check the disk, then resume") from error
    with storage_errors(path):
        os.replace(unproven, path)
        sync_dir(path.parent)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint, on the CPU, without running any code from it. Raises NotARun."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise NotARun(f"no checkpoint {path}", "the run stopped before its first one; start it again") from error
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise NotARun(
            f"checkpoint {path} cannot be read: {error}", "resume from another one, or train again"
        ) from error
    if not isinstance(found, dict) or "state_dict" not in found:
        raise NotARun(f"{path} is not a checkpoint of emkum", "give checkpoints/last.ckpt or best.ckpt of a run")
    return found


def copy_durably(source: Path, target: Path) -> None:
    """`target` becomes a copy of `source`, whole or not at all. No link: damage to one would be damage to both."""
    with storage_errors(target), source.open("rb") as origin, DurableFile(target) as file:
        while chunk := origin.read(COPY_BYTES):
            file.write(chunk)
        file.commit()


# --- metrics -----------------------------------------------------------------------------------------------------


class MetricsFile:
    """metrics.csv: a line for every few steps and for every validation, appended as they come.

    The columns are fixed at the start; a value that is not given is left empty. On resume the lines after the
    checkpoint's step are cut off, so that the file reads as if the run had never stopped; lines that cannot be read
    are left out, and `say` is told. Raises ResumeMismatch where the file has other columns.
    """

    def __init__(
        self, path: Path, columns: list[str], resume_step: int | None = None, say: Callable[[str], None] = print
    ) -> None:
        self.path, self.columns = path, ["step", *columns]
        kept = [",".join(self.columns)]
        if resume_step is not None and path.is_file():
            kept += self._lines_until(resume_step, say)
        write_file(path, ("\n".join(kept) + "\n").encode())

    def _lines_until(self, step: int, say: Callable[[str], None]) -> list[str]:
        header, *lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        if header != ",".join(self.columns):
            raise ResumeMismatch(
                f"{self.path} has the columns {header or 'of an empty file'}; this run writes {','.join(self.columns)}",
                f"move {self.path} away to go on with a new one",
            )
        kept = []
        for number, line in enumerate(lines, start=2):
            cells = line.split(",")
            if len(cells) != len(self.columns) or not cells[0].isdecimal():
                say(f"warning: line {number} of {self.path} cannot be read and is left out: {line[:40]!r}")
            elif int(cells[0]) <= step:
                kept.append(line)
        return kept

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """One line. Raises StorageFailure."""
        unknown = set(values) - set(self.columns)
        assert not unknown, f"columns {unknown} were not announced"
        cells = [str(step), *(_cell(values.get(name)) for name in self.columns[1:])]
        with storage_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(",".join(cells) + "\n")


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.8g}"


# --- a folder for one session ------------------------------------------------------------------------------------


def refuse_used_dir(wanted: Path | None) -> None:
    """Raise UsageError when the folder asked for holds a run already."""
    if wanted is not None and RunFolder(wanted).info.exists():
        raise UsageError(
            f"{wanted} holds a run already", f"continue it with --resume --run-dir {wanted}, or name another folder"
        )


@contextlib.contextmanager
def new_run(wanted: Path | None, name: str) -> Iterator[RunFolder]:
    """The folder of a new run, held by this process: the one asked for, or the first free of runs/<name>[-2, ...].

    A folder made here in which no run began is taken away again.
    Raises UsageError when the one asked for holds a run already, AnotherWriter when it is in use.
    """
    made = True
    if wanted is None:
        folder = RunFolder(_next_free(Path("runs"), name))
    else:
        folder, made = RunFolder(wanted), not wanted.exists()
        with storage_errors(wanted):
            make_dir(wanted)
    with held(folder):
        refuse_used_dir(wanted)
        try:
            yield folder
        finally:
            if not folder.info.exists():
                folder.lock.unlink(missing_ok=True)
                if made:
                    with contextlib.suppress(OSError):  # it holds something after all
                        folder.dir.rmdir()


def _next_free(parent: Path, name: str) -> Path:
    """Creates the first of parent/name, parent/name-2, ... that does not exist: two that ask at once get two."""
    with storage_errors(parent):
        make_dir(parent)
        number = 1
        while True:
            path = parent / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1


@contextlib.contextmanager
def held(folder: RunFolder) -> Iterator[None]:
    """Nobody else trains in the folder meanwhile; the lock goes with the process. Raises AnotherWriter."""
    with storage_errors(folder.lock):
        handle = os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AnotherWriter(
                f"another process is training in {folder.dir}", "wait for it or stop it, or name another --run-dir"
            ) from error
        yield
    finally:
        os.close(handle)


def git_revision() -> str | None:
    """The commit of the checkout emkum runs from, with "+" if it has changes; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
