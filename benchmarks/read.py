"""Shuffled batches from a cache against the same rows in other formats: warm, cold, time and processor time per row.

    python benchmarks/read.py [--peer-python PYTHON] [--only NAME ...] [--rows 8192] [--rounds 5]

Rows are float16 [197, 768], 302,592 bytes, random numbers; batches of 256. Every contestant (readers.py) runs in a
process of its own and fills a batch in memory; only one runs at a time, in turn, round after round, and after every
measurement some rows are compared with what was written. Ratios are medians over the rounds, each of two measurements
of one round. Warm: all rows lie in the page cache. Cold: everything was dropped from it (posix_fadvise, looked up with
mincore), and no row is read twice; a disk behind a hypervisor may still answer from the host's memory. `cpu us` is the
processor time of all threads of the process, kernel included, per row. A peer's files are removed once it is done.

Peers that do not install beside emkum run with --peer-python, the interpreter of another environment
(pip install torch h5py tensorstore litdata mosaicml-streaming webdataset); what does not import is listed as not
installed. A peer that checks nothing is compared with emkum as shipped, which checks a row when it first reads it; one
that checks every read ("checked") with emkum checking every read (`--verify always` in training).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
from machine import machine
from readers import CONTESTANTS, OURS, OURS_INT8, PACKAGES, DataSet, remove
from synthetic import DISTINCT, random_cache, stored_rows, which_stored

ALWAYS = "emkum always"
OWN = [OURS, "emkum 1 thread", ALWAYS, "emkum never", OURS_INT8]
LIMITS = ["memmap", "memmap threads", "memmap int8", "memmap advised", "raw disk"]
PEERS = [
    ["tensorstore", "tensorstore checked", "zarr-python", "zarr-python checked"],
    ["h5py", "h5py checked"],
    *([name] for name in ("safetensors", "arrow", "webdataset", "litdata", "mds")),
]
ROW_BYTES = 302_592
NOT_COLD_ENOUGH = 0.01  # of the pages still in memory after they were dropped


def main() -> None:
    arguments = parse()
    missing: dict[str, str] = {}
    measured: dict[str, dict[str, list[dict]]] = {"warm": {}, "cold": {}}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        data = DataSet(Path(folder), arguments.rows, 197, 768, arguments.threads)
        make_rows(data)
        for group in chosen_groups(arguments.only):
            with Rivals(data, group, arguments) as rivals:
                missing |= {name: why for name, why in rivals.missing.items() if name not in rivals.served}
                print(f"{', '.join(rivals.served)}: {arguments.rounds} rounds", flush=True)
                for kind in ("warm", "cold"):
                    rounds = [rivals.round(kind, number) for number in range(arguments.rounds)]
                    ratios |= group_ratios(kind, group, rounds)
                    for name in rounds[0]:
                        measured[kind].setdefault(name, []).extend(r[name] for r in rounds)
            for name in group:
                remove(data, name)
    rows_bytes = data.row_bytes
    for kind, found in measured.items():
        print_table(kind, found, ratios)
    for name, why in missing.items():
        print(f"{name}: not installed ({why})")
    result = {
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        **{
            kind: {
                name: {key: round(statistics.median(m[key] for m in runs), 1) for key in ("rows_per_second", "cpu_us")}
                for name, runs in found.items()
            }
            for kind, found in measured.items()
        },
        "not_installed": missing,
        "rows": arguments.rows,
        "row_bytes": rows_bytes,
        "batch": arguments.batch,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "machine": machine(),
    }
    print(json.dumps(result) if arguments.json else json.dumps(result["machine"], indent=1))


def make_rows(data: DataSet) -> None:
    """The caches, the same rows raw, and which is which."""
    which = which_stored(data.rows)
    np.save(data.folder / "which.npy", which)
    for dtype in ("float16", "int8"):
        random_cache(data.folder / f"emkum.{dtype}", data.rows, data.tokens, data.width, dtype)
        distinct = stored_rows(DISTINCT, data.tokens, data.width, dtype).values
        np.save(data.folder / f"distinct.{dtype}.npy", distinct)
        with open(data.folder / f"raw.{dtype}", "wb") as file:
            for first in range(0, data.rows, 256):
                file.write(distinct[which[first : first + 256]].data)
            os.fsync(file.fileno())


def chosen_groups(only: list[str] | None) -> list[list[str]]:
    """Contestants that are measured together, in turn: ours and the limits, then ours and each peer."""
    wanted = PEERS if only is None else [group for group in PEERS if set(group) & set(only)]
    return [[*OWN, *LIMITS], *([OURS, ALWAYS, *group] for group in wanted)]


class Rivals:
    """The processes of one group, measured in turn; those that have what they need."""

    def __init__(self, data: DataSet, names: list[str], arguments: argparse.Namespace) -> None:
        self.data, self.arguments = data, arguments
        self.missing: dict[str, str] = {}
        self.served: dict[str, Process] = {}
        self.is_warm = False
        self._python: dict[str, str] = {}
        for name in names:
            self._start(name)
        for name in list(self.served):
            written = self.served[name].ask(do="write")
            if "failed" in written:
                self.missing[name] = written["failed"]
                self.served.pop(name).end()

    def round(self, kind: str, number: int) -> dict[str, dict]:
        """One measurement of each, starting with another one every round."""
        names = [name for name in self.served if getattr(CONTESTANTS[name], kind)]
        found = {}
        if kind == "warm" and not self.is_warm:
            for name in names:
                self.served[name].ask(do="warm", batch=self.arguments.batch)
            self.is_warm = True
        if kind == "cold":
            for name, process in self.served.items():
                process.ask(do="close")
                if CONTESTANTS[name].clings:
                    process.end()
                    self.served[name] = Process(name, self.data, self._python[name])
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            if kind == "cold":
                drop_from_memory(self.data.folder / CONTESTANTS[name].files)
            seconds = self.arguments.seconds * (2 if kind == "cold" else 1)
            asked = {"batch": self.arguments.batch, "seconds": seconds, "seed": number, "cold": kind == "cold"}
            found[name] = self.served[name].ask(do="measure", **asked)
            if "failed" in found[name]:
                raise SystemExit(f"{name}, {kind}: {found[name]['failed']}")
        return found

    def _start(self, name: str) -> None:
        """With the peers' interpreter, or else this one; neither may have what is needed."""
        for python in (self.arguments.peer_python, sys.executable) if name in _peers() else (sys.executable,):
            process = Process(name, self.data, python)
            hello = process.ask(do="hello")
            if "missing" not in hello:
                self.served[name], self._python[name] = process, python
                return
            self.missing[name] = hello["missing"]
            process.end()

    def __enter__(self) -> Rivals:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.served.values():
            process.end()


class Process:
    """A contestant in a process of its own: a question, an answer."""

    def __init__(self, name: str, data: DataSet, python: str) -> None:
        given = {**asdict(data), "folder": str(data.folder)}
        command = [python, str(Path(__file__).with_name("readers.py")), name, json.dumps(given)]
        self.name, self._log = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def ask(self, **question: object) -> dict:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._log.seek(0)
            raise SystemExit(f"the process of {self.name} ended:\n{self._log.read()[-2000:]}")
        found: dict = json.loads(answer)
        return found

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


def drop_from_memory(files: Path) -> None:
    """A file, or all below a folder, out of the page cache. Exits if the kernel did not do it."""
    left, total, most = 0, 0, (0, files)
    for path in [files, *files.rglob("*")]:
        if not path.is_file():
            continue
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            inside, pages = resident_pages(file.fileno())
        left, total, most = left + inside, total + pages, max(most, (inside, path))
    if left > NOT_COLD_ENOUGH * total:
        raise SystemExit(f"{left} of {total} pages stay in memory, {most[0]} of them of {most[1]}: is it on a disk?")


def resident_pages(file: int) -> tuple[int, int]:
    """Pages of a file in the page cache, and all of its pages."""
    size = os.fstat(file).st_size
    if size == 0:
        return 0, 0
    pages = -(-size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    mapped = mmap.mmap(file, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found):
        raise OSError(ctypes.get_errno(), "mincore")
    return int((np.frombuffer(found, np.uint8) & 1).sum()), pages


def group_ratios(kind: str, group: list[str], rounds: list[dict[str, dict]]) -> dict[str, float]:
    """Ours over each of the others: the median over the rounds of two rates of one round."""
    pairs = {}
    for name in rounds[0]:
        if name in OWN:
            continue
        ours = OURS_INT8 if name.endswith("int8") else ALWAYS if name.endswith("checked") else OURS
        pairs[f"{kind}_over_{name.replace(' ', '_')}"] = (ours, name)
    if "memmap" in rounds[0]:
        pairs["warm_1_thread_over_memmap"] = ("emkum 1 thread", "memmap")
        pairs["warm_always_over_memmap"] = (ALWAYS, "memmap")
    if "raw disk" in rounds[0]:
        pairs["cold_always_over_raw_disk"] = (ALWAYS, "raw disk")
    return {
        ratio: statistics.median(r[ours]["rows_per_second"] / r[other]["rows_per_second"] for r in rounds)
        for ratio, (ours, other) in pairs.items()
    }


def print_table(kind: str, found: dict[str, list[dict]], ratios: dict[str, float]) -> None:
    print(f"\n{kind:20}  {'rows/s':>8}  {'from':>8}  {'to':>8}  {'cpu us':>7}  {'ours/it':>7}  checked      form")
    for name, runs in found.items():
        rates = [run["rows_per_second"] for run in runs]
        ratio = ratios.get(f"{kind}_over_{name.replace(' ', '_')}")
        line = f"{name:20}  {statistics.median(rates):8.0f}  {min(rates):8.0f}  {max(rates):8.0f}  "
        line += (
            f"{statistics.median(run['cpu_us'] for run in runs):7.1f}  {'' if ratio is None else f'{ratio:.2f}':>7}  "
        )
        print(f"{line}{CONTESTANTS[name].checked:11}  {CONTESTANTS[name].form}")


def _peers() -> set[str]:
    return {name for name in CONTESTANTS if name.removesuffix(" checked") in PACKAGES}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="0.3 MB each, four times on the disk at once")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement; twice that for a cold one")
    parser.add_argument("--threads", type=int, default=8, help="of emkum's reads; as in emkum train")
    parser.add_argument("--only", nargs="*", choices=sorted(PACKAGES), help="which peers; no name: none of them")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to be measured; default: the folder for temporary files"
    )
    parser.add_argument("--quick", action="store_true", help="1,024 rows, one round of 0.3 s each")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.rounds, arguments.seconds = 1024, 1, 0.3
    place = arguments.folder or Path(tempfile.gettempdir())
    needed, free = arguments.rows * ROW_BYTES * 4.2, shutil.disk_usage(place).free
    if needed > free:
        parser.error(f"{needed / 1e9:.1f} GB are needed in {place}, {free / 1e9:.1f} are free")
    if arguments.batch > 800 or arguments.rows < arguments.batch:
        parser.error("a batch is of at most 800 rows, and of at most --rows")
    return arguments


if __name__ == "__main__":
    main()
