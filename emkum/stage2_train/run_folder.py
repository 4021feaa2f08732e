"""The folder of one training run: what lies where, written whole or not at all, and read back.

What changes a run folder goes through the `os` of this module or of `durable`: tests can fail every call in turn.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from emkum.errors import AnotherWriter, NotARun, ResumeMismatch, StorageFailure, UsageError
from emkum.shards.durable import (
    TEMPORARY_SUFFIX,
    DurableFile,
    make_dir,
    remove,
    storage_errors,
    sync_dir,
    temporary_path,
    write_file,
)
from emkum.shards.store import is_url
from emkum.stage2_train.recipe import Recipe, recipe_from_table
from emkum.stage2_train.student_network import Student
from emkum.stage2_train.student_spec import StudentSpec

STUDENT_PREFIX = "student."  # of the student's tensors in a checkpoint
WEIGHTS_DIGEST = "emkum.sha256"  # in the metadata of student.safetensors
INFO_KEYS = ("command", "continue", "recipe", "cache", "identity", "seed", "precision", "total_steps")
COPY_BYTES = 16 * 2**20
SEAL = b"emkum sha256 "  # a checkpoint is a zip file; its comment is this and the hex SHA-256 of all before
SEAL_BYTES = len(SEAL) + 64


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
    def metrics_lines(self) -> Path:
        return self.dir / "metrics.jsonl"

    @property
    def last(self) -> Path:
        return self.dir / "checkpoints" / "last.ckpt"

    @property
    def previous(self) -> Path:
        return previous_of(self.last)

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
    def average(self) -> Path:
        return self.dir / "student-ema.safetensors"

    @property
    def spec(self) -> Path:
        return self.dir / "student.json"


@dataclass(frozen=True)
class LoadedRun:
    """A finished or interrupted run, its student in evaluation mode on the CPU. `info` is run.json."""

    student: Student
    recipe: Recipe
    cache_path: Path | str
    info: dict[str, Any]
    dir: Path


def load_run(run_dir: Path | str, checkpoint: str = "best") -> LoadedRun:
    """The student of a run folder: `checkpoint` "best" (by validation), "ema" (the average of weights at that step),
    "last", or the path of a checkpoint file.

    Raises NotARun for a folder without a run, or one without that checkpoint.
    """
    folder = RunFolder(Path(run_dir))
    info = read_info(folder)
    student = Student(_read_spec(folder))
    if checkpoint == "ema" and not folder.average.is_file():
        raise NotARun(
            f"{folder.dir} holds no average of weights (no {folder.average.name})",
            "train with one: --set training.ema=0.9999",
        )
    if checkpoint in ("best", "ema"):
        weights = _read_weights(folder, folder.average if checkpoint == "ema" else folder.weights)
    else:
        path = folder.last if checkpoint == "last" else Path(checkpoint)
        state = read_checkpoint(path).get("state_dict", {})
        weights = {k.removeprefix(STUDENT_PREFIX): v for k, v in state.items() if k.startswith(STUDENT_PREFIX)}
    try:
        student.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise NotARun(
            f"the weights of {folder.dir} ({checkpoint}) are not of its student.json: {reason}",
            "the folder mixes files of two runs; train again into a new one",
        ) from error
    recipe, place = recipe_from_table(info["recipe"]), info["cache"]["path"]
    return LoadedRun(student.eval(), recipe, place if is_url(place) else Path(place), info, folder.dir)


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


def write_student(folder: RunFolder, student: Student, average: Student | None = None) -> None:
    """student.safetensors, the average of its weights where there is one, student.json. Raises StorageFailure."""
    for path, network in ((folder.weights, student), (folder.average, average)):
        if network is not None:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
            write_file(path, save(tensors, {WEIGHTS_DIGEST: tensors_digest(tensors)}))
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


def _read_weights(folder: RunFolder, path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, compared with the digest it was written with: the format has none."""
    way_out = f"restore it; or read the last checkpoint instead, {folder.last}; or train again into a new folder"
    try:
        data = path.read_bytes()
        tensors = load(data)
        header_bytes = struct.unpack("<Q", data[:8])[0]
        stated = json.loads(data[8 : 8 + header_bytes]).get("__metadata__", {}).get(WEIGHTS_DIGEST)
    except (OSError, SafetensorError, ValueError) as error:
        raise NotARun(f"{path} cannot be read: {error}", way_out) from error
    if stated is not None and stated != tensors_digest(tensors):  # none: of an emkum that wrote no digest
        raise NotARun(f"{path} is damaged: its tensors are not those of its digest, {stated[:12]}...", way_out)
    return tensors


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, type, shape and bytes of each tensor, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- checkpoints -------------------------------------------------------------------------------------------------


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """One checkpoint file, durable and read back before it takes the old one's name. The old one stays beside it.

    `pieces` is added: the name of everything in it, by which a reader knows that nothing is missing.
    Raises StorageFailure; the old file then stays as it was, or the new one is there whole.
    """
    held = {name: value for name, value in checkpoint.items() if name != "pieces"}
    buffer = io.BytesIO()
    torch.save({**held, "pieces": pieces(held)}, buffer)
    _seal(buffer)
    unproven = path.with_name(f".{path.name}.tmp")
    try:
        with storage_errors(path):
            with DurableFile(unproven) as file:
                file.write(buffer.getbuffer())
                file.commit()
            _prove(unproven, path)
            if path.exists():
                _keep_previous(path)
            os.replace(unproven, path)
            sync_dir(path.parent)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(unproven)


def _prove(written: Path, path: Path) -> None:
    try:
        read_checkpoint(written, mmap=True)  # the digest reads every byte; the tensors need not be held once more
    except NotARun as error:
        raise StorageFailure(f"{path} cannot be read after writing: {error}", "check the disk, then resume") from error


def previous_of(path: Path) -> Path:
    """Where the checkpoint lies that `path` replaced."""
    return path.with_name("previous.ckpt")


def _keep_previous(path: Path) -> None:
    """A second name for the file, which is about to lose its own; a copy where the disk has no hard links."""
    previous = previous_of(path)
    second = temporary_path(previous, "link")
    try:
        os.link(path, second)
    except OSError:
        copy_durably(path, previous)
        return
    os.replace(second, previous)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(second)  # it stays where `previous` was this file already


def pieces(value: Any, name: str = "") -> list[str]:
    """The names of all that a checkpoint holds, tensors with type and shape: `emkum.rng.torch uint8 [5056]`."""
    if isinstance(value, Tensor):
        return [f"{name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"]
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, (list, tuple)):
        inner = enumerate(value)
    return [found for key, part in inner for found in pieces(part, f"{name}.{key}" if name else str(key))] or [name]


def _seal(buffer: io.BytesIO) -> None:
    """Makes the SHA-256 of a zip file its comment. torch.load does not look at the checksums inside of it."""
    with buffer.getbuffer() as data:
        assert data[-2:] == bytes(2), "torch.save wrote a zip file with a comment"
        data[-2:] = struct.pack("<H", SEAL_BYTES)
        digest = hashlib.sha256(data).hexdigest()
    buffer.seek(0, io.SEEK_END)
    buffer.write(SEAL + digest.encode())


def _check_seal(path: Path) -> None:
    """Raises ValueError unless the file is what was written."""
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        left = max(0, size - SEAL_BYTES)
        file.seek(left)
        stated = file.read(SEAL_BYTES)
        if not stated.startswith(SEAL):
            raise ValueError(f"of {size} bytes, it does not end in the digest that emkum writes")
        file.seek(0)
        digest = hashlib.sha256()
        while left:
            chunk = file.read(min(left, COPY_BYTES))
            if not chunk:
                raise ValueError("it became shorter while it was read")
            digest.update(chunk)
            left -= len(chunk)
    if stated[len(SEAL) :] != digest.hexdigest().encode():
        raise ValueError("its bytes are not those of the digest at its end")


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint, bit for bit as written, on the CPU, without running any code from it. Raises NotARun."""
    try:
        _check_seal(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise NotARun(f"no checkpoint {path}", "the run stopped before its first one; start it again") from error
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise NotARun(
            f"checkpoint {path} cannot be read: {error}", "resume from another one, or train again"
        ) from error
    if not isinstance(found, dict) or "pieces" not in found:
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
        self,
        path: Path,
        columns: list[str],
        resume_step: int | None = None,
        say: Callable[[str], None] = print,
        scored: bool = True,
    ) -> None:
        """resume_step: the checkpoint's. scored: whether the validation after that step is in the checkpoint too."""
        self.path, self.columns = path, ["step", *columns]
        kept = [",".join(self.columns)]
        if resume_step is not None and path.is_file():
            kept += self._lines_until(resume_step, scored, say)
        elif resume_step is not None:
            say(f"warning: {path} is gone: it begins again after step {resume_step}")
        write_file(path, ("\n".join(kept) + "\n").encode())

    def _lines_until(self, step: int, scored: bool, say: Callable[[str], None]) -> list[str]:
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
            elif int(cells[0]) < step or (int(cells[0]) == step and (scored or self._is_of_training(cells))):
                kept.append(line)
        return kept

    def _is_of_training(self, cells: list[str]) -> bool:
        """Lines of training have a learning rate, those of validation have not."""
        return bool(cells[self.columns.index("lr")])

    def sync(self) -> None:
        """What was appended survives a power loss: before a checkpoint that counts on it. Raises StorageFailure."""
        with storage_errors(self.path), self.path.open("rb") as file:
            os.fsync(file.fileno())

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """One line. Raises StorageFailure."""
        unknown = set(values) - set(self.columns)
        assert not unknown, f"columns {unknown} were not announced"
        cells = [str(step), *(_cell(values.get(name)) for name in self.columns[1:])]
        append_line(self.path, ",".join(cells))


def append_line(path: Path, line: str) -> None:
    """One line more in a file. Raises StorageFailure."""
    left = memoryview((line + "\n").encode())
    with storage_errors(path):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            while left:
                left = left[os.write(handle, left) :]
        finally:
            os.close(handle)


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
        for path in (folder.metrics, folder.info):  # of a process that was killed before its run began
            for torn in folder.dir.glob(f".{path.name}.*{TEMPORARY_SUFFIX}"):
                remove(torn)
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
