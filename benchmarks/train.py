"""Training from the cache against training with encoder and teacher in every step: same recipe, batches, precision.

    python benchmarks/train.py [--cache SHARDS] [--recipe ssmke] [--steps 20] [--rounds 3]
    python benchmarks/train.py --device cuda --memory-gib 24 --teacher-size large --batch 256

Without --cache it draws scenes and extracts them, with real networks, or with --teacher-size on random weights, where
the encoder is the teacher up to size base. Each round trains a few steps from the cache and then live, and with
--compile compiled too, each in a process of its own, so that the peak memory is its own. The speed of a run is the
median over its steps but the first fifth; ratios are medians over rounds. `step` leaves the time out that steps waited
for data: for pictures to be decoded, where a machine has few processors.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import machine
from random_networks import VISION, random_text, random_vision

from emkum.shards.datasets.scenes import write_scenes
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.extract import extract

FLAGS: dict[str, dict] = {"cached": {}, "live": {"live": True}, "compiled": {"compile": True}}


def main() -> None:
    arguments = parse()
    kinds = ["cached", "live", *(["compiled"] if arguments.compile else [])]
    with tempfile.TemporaryDirectory() as folder:
        cache = arguments.cache or drawn_cache(Path(folder), arguments)
        runs: dict[str, list[dict]] = {kind: [] for kind in kinds}
        for number in range(arguments.rounds):
            for kind, measured in runs.items():
                measured.append(train_once(cache, Path(folder) / f"{kind}{number}", kind, arguments))
                last = measured[-1]
                print(
                    f"round {number}, {kind}: {last['samples_per_second']:.1f} samples/s, "
                    f"peak {last['peak_memory_bytes'] / 2**30:.2f} GiB, waited {last['waited']:.1%}",
                    flush=True,
                )
    result = {
        "ratios": {name: round(value, 4) for name, value in ratios(runs).items()},
        **{
            f"{kind}_{name}": round(statistics.median(run[name] for run in measured), 4)
            for kind, measured in runs.items()
            for name in ("samples_per_second", "step_seconds", "waited", "peak_memory_bytes")
        },
        "recipe": arguments.recipe,
        "teacher": arguments.teacher_size or arguments.teacher,
        "precision": runs["cached"][0]["precision"],
        "batch": arguments.batch,
        "steps": arguments.steps,
        "memory_gib": arguments.memory_gib,
        "machine": machine(),
    }
    print(json.dumps(result) if arguments.json else json.dumps(result, indent=1))


def ratios(runs: dict[str, list[dict]]) -> dict[str, float]:
    """Of the runs of each round; the median over rounds."""

    def of(above: str, below: str, name: str) -> float:
        pairs = zip(runs[above], runs[below], strict=True)
        return statistics.median(a[name] / b[name] for a, b in pairs)

    found = {
        "cached_over_live_speed": of("cached", "live", "samples_per_second"),
        "live_over_cached_step": of("live", "cached", "step_seconds"),
        "cached_over_live_memory": of("cached", "live", "peak_memory_bytes"),
        "cached_waited": statistics.median(run["waited"] for run in runs["cached"]),
    }
    if "compiled" in runs:
        found["compiled_over_cached_speed"] = of("compiled", "cached", "samples_per_second")
    return found


def train_once(cache: Path, run_dir: Path, kind: str, arguments: argparse.Namespace) -> dict:
    """Figures of a short training in a process of its own."""
    wanted = {
        "cache": str(cache),
        "recipe": arguments.recipe,
        "run_dir": str(run_dir),
        "overrides": [f"training.batch={arguments.batch}", "evaluation.split=none", *(arguments.set or [])],
        "max_steps": arguments.steps,
        "log_every": max(1, arguments.steps // 5),
        "device": arguments.device,
        "precision": arguments.precision,
        "checkpoint_minutes": 60,
        **FLAGS[kind],
    }
    command = [sys.executable, __file__, "--memory-gib", str(arguments.memory_gib), "--child", json.dumps(wanted)]
    # Idle OpenMP threads sleep: where other processes share the cores, those that spin burn what the step needs, and
    # only in runs that have one team of them (docs/log.md).
    quiet = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, env=quiet)
    if done.returncode:
        sys.exit(f"{kind}: {done.stderr}")
    info = json.loads((run_dir / "run.json").read_text())
    with (run_dir / "metrics.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["samples_per_second"]][1:]
    speeds, waits = ([float(line[name]) for line in lines] for name in ("samples_per_second", "waited"))
    steps = [(1 - waited) * arguments.batch / speed for speed, waited in zip(speeds, waits, strict=True)]
    return {
        **info,
        "samples_per_second": statistics.median(speeds),
        "waited": statistics.median(waits),
        "step_seconds": statistics.median(steps),
    }


def child(wanted: dict, memory_gib: float) -> None:
    """One training; on a GPU with no more of its memory than a card of that size has."""
    from emkum.stage2_train.train import TrainConfig, train

    if memory_gib and wanted["device"] != "cpu":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gib * 2**30 / total))
    paths = {name: Path(wanted[name]) for name in ("cache", "run_dir")}
    train(TrainConfig(**{**wanted, **paths, "overrides": tuple(wanted["overrides"])}), say=lambda line: None)


def drawn_cache(folder: Path, arguments: argparse.Namespace) -> Path:
    teachers, encoder, text = (arguments.teacher,), None, arguments.text_encoder
    if arguments.teacher_size:
        size = "small" if arguments.teacher_size == "small" else "base"
        text = str(random_text(folder / "random-text", size))
        teachers = (str(random_vision(folder / f"random-{arguments.teacher_size}", arguments.teacher_size)),)
        if size != arguments.teacher_size:
            encoder = str(random_vision(folder / f"random-{size}", size))
    tars = write_scenes(folder / "scenes", 4 * arguments.batch, 1, seed=0, size=arguments.size)["train"]
    extract(
        ExtractConfig(
            teacher=teachers,
            encoder=encoder,
            data=tuple(tars),
            cache=folder / "cache",
            text_encoder=text,
            cut=arguments.cut,
            targets=("cls",),
            size=arguments.size,
            device=arguments.device,
            storage=arguments.storage,
        ),
        say=lambda line: None,
    )
    return folder / "cache"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--recipe", default="ssmke")
    parser.add_argument("--set", nargs="*", help="changes of the recipe, as in emkum train")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--teacher-size", choices=list(VISION), help="for drawn scenes: networks of random weights")
    parser.add_argument("--teacher", default="dinov2-s-imgfocus", help="for drawn scenes, without --teacher-size")
    parser.add_argument("--text-encoder", default="minilm", help="for drawn scenes, without --teacher-size")
    parser.add_argument("--cut", type=int, help="for drawn scenes: default 6, or 0 with --teacher-size")
    parser.add_argument("--size", type=int, default=224, help="for drawn scenes")
    parser.add_argument("--storage", default="float16", help="for drawn scenes")
    parser.add_argument("--compile", action="store_true", help="a third kind of run: from the cache, compiled")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-gib", type=float, default=0, help="of the GPU that a run may have; 0: all of it")
    parser.add_argument("--quick", action="store_true", help="one round of 5 steps of 32 pictures of 112 px")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.memory_gib)
        sys.exit()
    if arguments.quick:
        arguments.rounds, arguments.steps, arguments.batch, arguments.size = 1, 5, 32, 112
    if arguments.cut is None:
        arguments.cut = 0 if arguments.teacher_size else 6
    return arguments


if __name__ == "__main__":
    main()
