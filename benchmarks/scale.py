"""What a row of a shuffled batch costs in caches of a thousand rows to a million; what opening them costs.

    python benchmarks/scale.py [--rows 1024 16384 131072 1048576]

Rows are float16 [197, 768], 302,592 bytes, in blocks of 1,024; batches of 256 in the order of training. A million of
them would be 310 GB: here every block is a hard link to one block of real rows with real checksums, and has its own
name, receipt, index and file handle. So the bytes always lie in the page cache, whatever the size, and what is seen is
what emkum and the file system spend on a larger cache: more receipts, indices and open files, longer permutations.
Every size has a process of its own; they are measured in turn, and ratios are medians over rounds of two costs of one
round.

`--verify always` (the default here) makes a read the same work in every cache. With `first`, as in training, a small
cache has been checked, and is mapped, after the first epoch, and one that is larger than memory never is mapped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine
from synthetic import TOKENS, random_cache, repeated_cache

from emkum.cli import allow_open_files
from emkum.shards.reader import Cache
from emkum.stage2_train.loader import Buffers, CachedSource
from emkum.stage2_train.order import TrainOrder
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.samples import SampleTable

WARMING_BATCHES = 40  # by then 1,024 blocks have all been read from
FIGURES = ("us_per_row", "cpu_us_per_row", "rows_per_second")


def main() -> None:
    arguments = parse()
    allow_open_files()  # as the command does; the processes that are measured inherit it
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        served = {rows: Served(made(Path(folder), rows), arguments) for rows in arguments.rows}
        opened = {rows: process.ask("start") for rows, process in served.items()}
        rounds = []
        for number in range(arguments.rounds):
            order = arguments.rows[number % len(arguments.rows) :] + arguments.rows[: number % len(arguments.rows)]
            rounds.append({rows: served[rows].ask("measure") for rows in order})
        for process in served.values():
            process.end()
    print(f"\n{'rows':>9}  {'blocks':>6}  {'us/row':>7}  {'cpu us':>7}  {'open s':>7}  {'1st batch s':>11}  {'MiB':>6}")
    table, smallest = {}, arguments.rows[0]
    ratios = {}
    for rows in arguments.rows:
        found = {name: statistics.median(r[rows][name] for r in rounds) for name in FIGURES} | opened[rows]
        table[str(rows)] = {name: round(value, 4) for name, value in found.items()}
        line = f"{rows:9,}  {rows // 1024:6,}  {found['us_per_row']:7.1f}  {found['cpu_us_per_row']:7.1f}  "
        print(f"{line}{found['open_seconds']:7.2f}  {found['first_batch_seconds']:11.2f}  {found['memory_mib']:6.0f}")
        if rows != smallest:
            for name in ("us_per_row", "cpu_us_per_row"):
                ratio = statistics.median(r[rows][name] / r[smallest][name] for r in rounds)
                ratios[f"{name}_{rows}_over_{smallest}"] = round(ratio, 3)
    result = {
        "ratios": ratios,
        "by_rows": table,
        "verify": arguments.verify,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "machine": machine(),
    }
    print(json.dumps(result) if arguments.json else json.dumps({k: result[k] for k in ("ratios", "machine")}, indent=1))


def made(folder: Path, rows: int) -> Path:
    """The cache of so many rows."""
    block, path = folder / "block", folder / str(rows)
    if not block.exists():
        random_cache(block, 1024)
    repeated_cache(path, rows, block)
    print(f"made {rows:,} rows", flush=True)
    return path


class Served:
    """One cache, read in a process of its own."""

    def __init__(self, path: Path, arguments: argparse.Namespace) -> None:
        given = {"path": str(path), "verify": arguments.verify, "threads": arguments.threads}
        given |= {"batch": arguments.batch, "seconds": arguments.seconds}
        command = [sys.executable, __file__, "--serve", json.dumps(given)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(what, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("a reading process ended; what it said is above")
        found: dict[str, float] = json.loads(answer)
        return found

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(path: str, verify: Any, threads: int, batch: int, seconds: float) -> None:
    """Answers a line per question: start, then measure, again and again."""
    memory = memory_mib()
    buffers = Buffers(pin=False)
    for line in sys.stdin:
        if line.strip() == "start":
            started = time.perf_counter()
            cache = Cache.open(path, verify=verify)
            opened = time.perf_counter()
            table = SampleTable("images", "train", cache.field(TOKENS).rows("train"), None, None, 1, 0)
            order = TrainOrder(table, batch, seed=0, num_steps=1 << 30)
            source = CachedSource(cache, FieldNames(inputs=TOKENS), None, threads=threads)
            source.read(order.rows(0), buffers)
            first = time.perf_counter()
            for step in range(1, WARMING_BATCHES):
                source.read(order.rows(step), buffers)
            used = memory_mib() - memory - batch * 302_592 / 2**20
            answer = {"open_seconds": opened - started, "first_batch_seconds": first - opened, "memory_mib": used}
            step = WARMING_BATCHES
        else:
            began, began_cpu, first_step = time.perf_counter(), time.process_time(), step
            while time.perf_counter() - began < seconds:
                source.read(order.rows(step), buffers)
                step += 1
            rows, wall = (step - first_step) * batch, time.perf_counter() - began
            cpu = time.process_time() - began_cpu
            answer = {
                "us_per_row": wall / rows * 1e6,
                "cpu_us_per_row": cpu / rows * 1e6,
                "rows_per_second": rows / wall,
            }
        print(json.dumps(answer), flush=True)


def memory_mib() -> float:
    """Memory of this process that is not of files: what it took for itself."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1024, 16384, 131072, 1048576], help="multiples of 1,024"
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1), help="that share a batch")
    parser.add_argument("--verify", choices=("first", "always", "never"), default="always")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement")
    parser.add_argument("--folder", type=Path, help="0.3 GB and the records; default: the folder for temporary files")
    parser.add_argument("--quick", action="store_true", help="1,024 and 131,072 rows, three rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.rounds = [1024, 131072], 3
    if any(rows % 1024 for rows in arguments.rows):
        parser.error("--rows wants multiples of 1,024")
    return arguments


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve(**json.loads(sys.argv[2]))
    else:
        main()
