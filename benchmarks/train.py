"""Training from the cache against training with encoder and teacher in every step: same recipe, batches, precision.

    python benchmarks/train.py [--cache SHARDS] [--recipe ssmke] [--steps 10] [--rounds 3]

Without --cache it draws scenes and extracts them. Each round trains a few steps from the cache and then live, each in a
process of its own, so that the peak memory is its own; ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import machine

from emkum.shards.datasets.scenes import write_scenes
from emkum.stage1_extract.extract import extract
from emkum.stage1_extract.plan import ExtractConfig


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        cache = arguments.cache or drawn_cache(Path(folder), arguments)
        runs: dict[str, list[dict]] = {"cached": [], "live": []}
        for number in range(arguments.rounds):
            for kind, measured in runs.items():
                measured.append(train_once(cache, Path(folder) / f"{kind}{number}", kind == "live", arguments))
                last = measured[-1]
                print(
                    f"round {number}, {kind}: {last['samples_per_second']:.1f} samples/s, "
                    f"peak {last['peak_memory_bytes'] / 2**30:.2f} GiB, waited {last['waited_fraction']:.1%}",
                    flush=True,
                )
    pairs = list(zip(runs["cached"], runs["live"], strict=True))
    ratios = {
        "cached_over_live_speed": statistics.median(
            c["samples_per_second"] / x["samples_per_second"] for c, x in pairs
        ),
        "cached_over_live_memory": statistics.median(c["peak_memory_bytes"] / x["peak_memory_bytes"] for c, x in pairs),
    }
    result = {
        "ratios": {name: round(value, 4) for name, value in ratios.items()},
        **{
            f"{kind}_{name}": round(statistics.median(run[name] for run in measured), 3)
            for kind, measured in runs.items()
            for name in ("samples_per_second", "peak_memory_bytes", "seconds_per_step")
        },
        "recipe": arguments.recipe,
        "batch": runs["cached"][0]["batch"],
        "steps": arguments.steps,
        "machine": machine(),
    }
    print(json.dumps(result) if arguments.json else json.dumps(result, indent=1))


def train_once(cache: Path, run_dir: Path, live: bool, arguments: argparse.Namespace) -> dict:
    """run.json's figures of a short training in its own process."""
    command = [sys.executable, "-m", "emkum.cli", "train", "--cache", str(cache), "--recipe", arguments.recipe]
    command += ["--run-dir", str(run_dir), "--max-steps", str(arguments.steps), "--device", arguments.device]
    command += ["--set", f"training.batch={arguments.batch}", "evaluation.split=none"]
    done = subprocess.run([*command, "--live"] if live else command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    info = json.loads((run_dir / "run.json").read_text())
    return {**info, "batch": arguments.batch, "seconds_per_step": arguments.batch / info["samples_per_second"]}


def drawn_cache(folder: Path, arguments: argparse.Namespace) -> Path:
    tars = write_scenes(folder / "scenes", max(64, 4 * arguments.batch), 1, seed=0, size=arguments.size)["train"]
    extract(
        ExtractConfig(
            teacher=(arguments.teacher,),
            data=tuple(tars),
            cache=folder / "cache",
            text_encoder=arguments.text_encoder,
            cut=arguments.cut,
            targets=("cls",),
            size=arguments.size,
            device=arguments.device,
        ),
        say=lambda line: None,
    )
    return folder / "cache"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--recipe", default="ssmke")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--teacher", default="dinov2-s-imgfocus", help="for drawn scenes")
    parser.add_argument("--text-encoder", default="minilm", help="for drawn scenes")
    parser.add_argument("--cut", type=int, default=6, help="for drawn scenes")
    parser.add_argument("--size", type=int, default=224, help="for drawn scenes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one round of 3 steps of 32 pictures of 112 px")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.steps, arguments.batch, arguments.size = 1, 3, 32, 112
    return arguments


if __name__ == "__main__":
    main()
