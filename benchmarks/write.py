"""Blocks written through emkum's writer against `dd oflag=direct` and others: rates, processor time, memory.

    python benchmarks/write.py [--folder FOLDER] [--blocks 4] [--rounds 5]

Blocks of 1,024 rows, float16 [197, 768] (302,592 bytes) or int8, random numbers, handed over 64 rows at a time as an
extraction does, and committed one after another: checksums, SHA-256, sync, rename and receipt are part of the time.
`dd` writes zeros in pieces of 8 MiB into a new file of as many bytes as the float16 blocks, without a sync. All take
turns, round after round; before each the files of the last are removed and the disk is synced. Ratios are medians over
the rounds, each of two measurements of one round. `cpu s/GB` is the processor time of all threads, `memory` how far the
peak of the process lies above what it held before. FOLDER (default: where temporary files go) must lie on the disk in
question and allow O_DIRECT.

What bounds the writer is the slower of the disk and SHA-256 on one core, which receipts need of every object: the row
`sha256` is that alone, of the same bytes in memory. Two fields are hashed by two threads.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from machine import machine
from synthetic import BATCH, TOKENS, stored_rows

from emkum.shards.codec import Encoded, Summary
from emkum.shards.fingerprint import Fingerprint
from emkum.shards.layout import FieldSpec
from emkum.shards.tars import PictureMember, SourceSample, SourceTar
from emkum.shards.views import ViewPolicy
from emkum.shards.writer import CacheWriter

ROWS, NUM_TOKENS, WIDTH = 1024, 197, 768
ROW_BYTES = NUM_TOKENS * WIDTH * 2
DD_BYTES = 8 << 20
SLOW_ROUNDS = 2  # of what is much slower than the disk
Work = tuple[int, Callable[[], None]]  # bytes, and what is timed


def main() -> None:
    arguments = parse()
    rows = {storage: stored_rows(256, NUM_TOKENS, WIDTH, storage) for storage in ("float16", "int8")}
    blocks, fp16 = arguments.blocks, rows["float16"]
    contestants: dict[str, Callable[[Path], Work]] = {
        "dd": lambda folder: dd(folder / "file", blocks),
        "sha256": lambda folder: sha256(fp16, blocks),
        "emkum": lambda folder: emkum(folder / "cache", rows, blocks, ["float16"]),
        "emkum int8": lambda folder: emkum(folder / "cache", rows, blocks, ["int8"]),
        "emkum two fields": lambda folder: emkum(folder / "cache", rows, blocks, ["float16", "float16"]),
        "tofile": lambda folder: tofile(folder, fp16, blocks),
        "zarr-python": lambda folder: zarr_python(folder / "array", fp16, blocks),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for number in range(arguments.rounds):
        names = list(contestants)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if name != "zarr-python" or number < SLOW_ROUNDS:
                with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="emkum-write-") as folder:
                    found[name].append(measured(Path(folder), contestants[name]))
        print(f"round {number}: emkum {found['emkum'][-1]['mb_per_second']:,.0f} MB/s", flush=True)
    print_table(found)
    result = {
        "ratios": {
            "write_over_dd": ratio(found, "emkum", "dd"),
            "write_int8_over_dd": ratio(found, "emkum int8", "dd"),
            "write_two_fields_over_dd": ratio(found, "emkum two fields", "dd"),
            "sha256_over_dd": ratio(found, "sha256", "dd"),
            "write_over_tofile": ratio(found, "emkum", "tofile"),
            "write_over_zarr_python": ratio(found, "emkum", "zarr-python"),
        },
        **{name: {key: round(median(runs, key), 3) for key in runs[0]} for name, runs in found.items()},
        "rows_per_block": ROWS,
        "row_bytes": ROW_BYTES,
        "blocks": arguments.blocks,
        "rounds": arguments.rounds,
        "machine": machine(),
    }
    print(json.dumps(result) if arguments.json else json.dumps(result["machine"], indent=1))


# --- measuring ---------------------------------------------------------------------------------------------


def measured(folder: Path, work: Callable[[Path], Work]) -> dict[str, float]:
    """Prepares the work, lets the disk come to rest, then does it."""
    num_bytes, write = work(folder)
    os.sync()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    processor, started = time.process_time(), time.perf_counter()
    write()
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    peak = memory("VmHWM") - before
    shutil.rmtree(folder)
    folder.mkdir()
    os.sync()
    return {
        "mb_per_second": num_bytes / seconds / 1e6,
        "cpu_seconds_per_gb": processor / num_bytes * 1e9,
        "memory_mb": peak / 1e6,
    }


def memory(name: str) -> int:
    """Bytes; VmRSS: now, VmHWM: at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def median(runs: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def ratio(found: dict[str, list[dict[str, float]]], ours: str, theirs: str) -> float:
    pairs = zip(found[ours], found[theirs], strict=False)
    return round(statistics.median(a["mb_per_second"] / b["mb_per_second"] for a, b in pairs), 3)


def print_table(found: dict[str, list[dict[str, float]]]) -> None:
    print(f"\n{'':18}{'MB/s':>10}{'cpu s/GB':>10}{'memory MB':>11}{'over dd':>9}")
    for name, runs in found.items():
        cpu = "" if name == "dd" else f"{median(runs, 'cpu_seconds_per_gb'):.2f}"
        held = "" if name in ("dd", "sha256") else f"{median(runs, 'memory_mb'):.0f}"
        print(f"{name:18}{median(runs, 'mb_per_second'):10,.0f}{cpu:>10}{held:>11}{ratio(found, name, 'dd'):9.2f}")


# --- contestants -------------------------------------------------------------------------------------------


def emkum(path: Path, rows: dict[str, Encoded], blocks: int, storages: Sequence[str]) -> Work:
    """A new cache with one token field for each storage; its blocks are written and committed."""
    writer = CacheWriter(path, ROWS)
    samples = tuple(
        SourceSample(f"{i:08d}", PictureMember(512 + 1024 * i, 100, "jpg"), (), "", None, None)
        for i in range(blocks * ROWS)
    )
    tar = SourceTar("random.tar", "random.tar", 1000, "0" * 64, samples, {}, 0)
    segment = writer.append_segment("train", ViewPolicy(), [tar])
    fields = [FieldSpec(f"{TOKENS}{i}", "tokens", s, (NUM_TOKENS, WIDTH)) for i, s in enumerate(storages)]
    for field in fields:
        moments = (np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32)) if field.storage == "int8" else None
        writer.declare_field(field, Fingerprint(field.kind, field.storage, field.row_shape), {}, moments)
        writer.grow_field(field, 1)

    def write() -> None:
        for number in segment.image.blocks(ROWS):
            with contextlib.ExitStack() as stack:
                targets = [stack.enter_context(writer.block(field, segment, number, 0)) for field in fields]
                for first in range(0, ROWS, BATCH):
                    for field, target in zip(fields, targets, strict=True):
                        target.append(batch(rows[field.storage], first))
                for target in targets:
                    target.commit()

    return sum(field.block_bytes(ROWS, ROWS) for field in fields) * blocks, write


def batch(rows: Encoded, first: int) -> Encoded:
    here = slice(first % len(rows.values), first % len(rows.values) + BATCH)
    return Encoded(rows.values[here], None if rows.scale is None else rows.scale[here], None, Summary())


def dd(path: Path, blocks: int) -> Work:
    count = -(-blocks * ROWS * ROW_BYTES // DD_BYTES)
    command = ["dd", "if=/dev/zero", f"of={path}", f"bs={DD_BYTES}", f"count={count}", "oflag=direct"]

    def write() -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"dd failed: {done.stderr.strip()}\nchoose a folder on a disk that allows O_DIRECT: --folder")

    return count * DD_BYTES, write


def sha256(rows: Encoded, blocks: int) -> Work:
    data = memoryview(rows.values).cast("B")
    times = blocks * ROWS // len(rows.values)

    def work() -> None:
        digest = hashlib.sha256()
        for _ in range(times):
            digest.update(data)

    return times * len(data), work


def tofile(folder: Path, rows: Encoded, blocks: int) -> Work:
    """A raw file for every block, through the page cache, synced; no checksum of any kind."""

    def write() -> None:
        for block in range(blocks):
            with open(folder / f"{block}", "wb") as file:
                for first in range(0, ROWS, BATCH):
                    batch(rows, first).values.tofile(file)
                os.fsync(file.fileno())

    return blocks * ROWS * ROW_BYTES, write


def zarr_python(path: Path, rows: Encoded, blocks: int) -> Work:
    """The same shards, whole ones: it rewrites a shard for every part of it. Not synced, no SHA-256."""
    import zarr

    array = zarr.create_array(
        path,
        shape=(blocks * ROWS, NUM_TOKENS, WIDTH),
        shards=(ROWS, NUM_TOKENS, WIDTH),
        chunks=(1, NUM_TOKENS, WIDTH),
        dtype="float16",
        compressors=[zarr.codecs.Crc32cCodec()],
    )

    def write() -> None:
        for block in range(blocks):
            whole = np.concatenate([rows.values] * (ROWS // len(rows.values)))
            array[block * ROWS : (block + 1) * ROWS] = whole

    return blocks * ROWS * ROW_BYTES, write


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write")
    parser.add_argument("--blocks", type=int, default=4, help="of 310 MB (float16)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="2 blocks, 3 rounds")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.blocks, arguments.rounds = 2, 3
    return arguments


if __name__ == "__main__":
    main()
