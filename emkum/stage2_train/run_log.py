"""Where the numbers of a run are written: metrics.csv and metrics.jsonl, and to loggers that draw them."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lightning.pytorch.loggers import TensorBoardLogger

from emkum.errors import MissingPackage, UsageError
from emkum.shards.durable import storage_errors, write_file
from emkum.stage2_train.run_folder import MetricsFile, RunFolder, append_line

LOGGERS = ("tensorboard", "wandb", "wandb-offline", "none")
WANDB_PROJECT = "emkum"

Say = Callable[[str], None]


class Board(Protocol):
    """A logger that draws what metrics.csv holds."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class RunLog:
    """metrics.csv, the same lines in metrics.jsonl, and the boards, which are views of them: one that fails is said and
    left alone, and the run goes on.

    Each line of metrics.jsonl is an object of `step` and the numbers there are; one that is not finite is null.
    """

    def __init__(
        self,
        folder: RunFolder,
        columns: list[str],
        resume_step: int | None,
        scored: bool,
        loggers: tuple[str, ...],
        config: Mapping[str, Any],
        say: Say,
    ) -> None:
        """resume_step, scored: as for MetricsFile. config: what a logger shows beside the curves.

        Raises ResumeMismatch, StorageFailure; UsageError where wandb does not start.
        """
        self.say = say
        self.csv = MetricsFile(folder.metrics, columns, resume_step, say, scored)
        self.lines = folder.metrics_lines
        with folder.metrics.open(encoding="utf-8", newline="") as file:  # what of it was kept
            rows = [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]
        write_file(self.lines, "".join(f"{_json_line(row)}\n" for row in rows).encode())
        self.boards: list[Board] = []
        if "tensorboard" in loggers:
            self.boards.append(_TensorBoard(folder, resume_step))
        if "wandb" in loggers or "wandb-offline" in loggers:
            self.boards.append(_Wandb(folder, "wandb-offline" in loggers, config))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line in each. Raises StorageFailure."""
        self.csv.append(step, values)
        append_line(self.lines, _json_line({"step": step, **values}))
        for board in list(self.boards):
            try:
                board.log(values, step)
            except Exception as error:
                self._leave(board, error)

    def sync(self) -> None:
        """What was written survives a power loss. Raises StorageFailure."""
        self.csv.sync()
        with storage_errors(self.lines), self.lines.open("rb") as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        """Never raises: what broke a run is on its way already."""
        for board in list(self.boards):
            try:
                board.close()
            except Exception as error:
                self._leave(board, error)

    def _leave(self, board: Board, error: Exception) -> None:
        self.boards.remove(board)
        reason = (str(error).strip().splitlines() or [""])[0]
        self.say(f"warning: {board} takes no more numbers ({type(error).__name__}: {reason}); metrics.csv has them all")


def check_loggers(loggers: tuple[str, ...]) -> None:
    """Raise UsageError for one that does not exist, MissingPackage for one that is not installed."""
    for name in loggers:
        if name not in LOGGERS:
            raise UsageError(f"--logger {name}", f"choose of {', '.join(LOGGERS)}")
        if name.startswith("wandb"):
            _wandb_package()
    if "none" in loggers and len(loggers) > 1:
        raise UsageError(f"--logger {' --logger '.join(loggers)}", "name loggers, or none")
    if "wandb" in loggers and "wandb-offline" in loggers:
        raise UsageError("--logger wandb --logger wandb-offline", "name one of them")


def _json_line(values: Mapping[str, float]) -> str:
    return json.dumps({name: _plain(value) for name, value in values.items()})


def _plain(value: float) -> float | int | None:
    """A number as metrics.csv has it, whole ones as integers."""
    if type(value) is int or not math.isfinite(value):
        return value if type(value) is int else None
    rounded = float(f"{value:.8g}")
    return int(rounded) if rounded.is_integer() else rounded


class _TensorBoard:
    def __init__(self, folder: RunFolder, resume_step: int | None) -> None:
        purge = None if resume_step is None else resume_step + 1
        self.board = TensorBoardLogger(folder.dir, name="", version="tensorboard", purge_step=purge)

    def __str__(self) -> str:
        return "TensorBoard"

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.board.log_metrics(dict(values), step)

    def close(self) -> None:
        self.board.finalize("")


class _Wandb:
    """A run of Weights & Biases, named like the folder; a resumed one goes on in it, offline in a new folder of it."""

    def __init__(self, folder: RunFolder, offline: bool, config: Mapping[str, Any]) -> None:
        wandb = _wandb_package()
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
                name=folder.dir.name,
                id=config["wandb_id"],
                dir=str(folder.dir),
                config={name: value for name, value in config.items() if name != "wandb_id"},
                mode="offline" if offline else None,
                resume="allow",
            )
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UsageError(
                f"Weights & Biases does not start: {type(error).__name__}: {reason}",
                "log in with `wandb login`, or keep the numbers here for a later `wandb sync`: --logger wandb-offline",
            ) from error

    def __str__(self) -> str:
        return "Weights & Biases"

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def _wandb_package() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise MissingPackage(
            "wandb is not installed, and --logger wandb needs it",
            "pip install 'emkum[wandb]', or leave the flag out: metrics.csv and TensorBoard are there without it",
        ) from error
