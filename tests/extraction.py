"""`emkum extract` in real processes, on generated pictures and a random network that fills large objects fast."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from emkum.models.network import save_network
from emkum.models.preprocessing import Preprocessing
from emkum.shards.claims import CLAIMS
from tests.tiny_cache import tiny_network

ROOT = Path(__file__).parents[1]
SIDE, PATCH, WIDTH = 64, 4, 64  # 257 tokens of 64 float32 channels: 65,792 bytes a row for very little arithmetic
FAIL_SECONDS = 120  # a process that is still there by then hangs


def make_pictures(path: Path, count: int, seed: int = 0, side: int = SIDE) -> Path:
    """A tar of `count` smooth random JPEGs."""
    draw = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            small = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            small.resize((side, side), Image.Resampling.BILINEAR).save(buffer, "JPEG")
            info = tarfile.TarInfo(f"p{i:05d}.jpg")
            info.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(info, buffer)
    return path


def save_teacher(folder: Path) -> Path:
    network = tiny_network("wide", "image", depth=1, width=WIDTH, mlp_width=16, patch=PATCH, image_size=SIDE)
    save_network(replace(network, preprocessing=Preprocessing(image_size=SIDE)), folder)
    return folder


@dataclass(frozen=True)
class Extraction:
    """One command line; `start` runs it, as often as wanted, on the cache given there."""

    teacher: Path
    data: Path
    rows_per_block: int
    views: int = 1
    more: tuple[str, ...] = ()

    def arguments(self, cache: Path, *more: str) -> list[str]:
        options = {
            "--teacher": self.teacher,
            "--data": self.data,
            "--cache": cache,
            "--targets": "cls",
            "--storage": "float32",
            "--compute": "float32",
            "--size": SIDE,
            "--views": self.views,
            "--rows-per-block": self.rows_per_block,
            "--device": "cpu",
            "--threads": 2,
        }
        return ["extract", *(str(word) for pair in options.items() for word in pair), *self.more, *more]

    def start(self, cache: Path, *more: str, module: Sequence[str] = ("-m", "emkum.cli")) -> Running:
        """A process group of its own. Its messages go to a file beside the cache."""
        log = cache.with_name(f"{cache.name}-{time.monotonic_ns()}.log")
        with log.open("wb") as handle:
            process = subprocess.Popen(
                [sys.executable, *module, *self.arguments(cache, *more)],
                stderr=handle,
                stdout=handle,
                start_new_session=True,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        return Running(process, log)

    def finish(self, cache: Path, *more: str) -> str:
        """Runs the command to its end, which must be success. Returns what it said."""
        running = self.start(cache, *more)
        assert running.wait() == 0, running.text()
        return running.text()


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def last_line(self) -> str:
        return self.text().strip().splitlines()[-1]

    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self, seconds: float = FAIL_SECONDS) -> int:
        """The exit code. A process that does not end is killed, and fails the test."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it did not end within {seconds:.0f} s:\n{self.text()}") from None

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        if not self.ended():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait_for(self, sign: Callable[[], bool], seconds: float = FAIL_SECONDS) -> bool:
        """Whether the sign was seen before the process ended."""
        deadline = time.monotonic() + seconds
        while not sign():
            if self.ended():
                return False
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"no sign within {seconds:.0f} s:\n{self.text()}")
            time.sleep(0.003)
        return True


def claims(cache: Path, prefix: str) -> set[str]:
    """Names of the claims that lie there: image-... of blocks, plan... of planners."""
    try:
        return {name for name in os.listdir(cache / CLAIMS) if name.startswith(prefix)}
    except FileNotFoundError:
        return set()


def temporaries(cache: Path) -> list[Path]:
    return [path for path in cache.rglob(".*") if path.name.endswith(".tmp")]


def content(cache: Path) -> dict[str, bytes]:
    """Every committed object, receipt and table; not what names places or times."""
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and not {"hints", "claims"} & set(path.parts) and path.name != "segment.json"
        if path.parent != cache and not path.name.endswith(".tmp")
    }
