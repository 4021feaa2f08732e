"""The time of a training step that our loader feeds from disk, over the same step fed from memory.

    python benchmarks/loader.py [--rows-per-second 1500] [--step-threads 2 1] [--device cuda]

Rows are float16 [197, 768], 302,592 bytes; batches of 256. The step is a real one: the batch is decoded
(CachedSource.prepare), one Transformer block runs forward and backward in bfloat16 on the first few tokens of each
row, and AdamW steps. So many tokens are taken that the step from memory consumes about --rows-per-second. The feeds
run in turn, some steps each, round after round; ratios are medians over rounds of two times of one round. Only how the
batch comes to memory differs:

    memory       batches that were read before; what the others are compared with
    warm         BatchLoader; the file lies in the page cache and every row was checked before
    cold         BatchLoader; the file was dropped from the page cache, every row is checked
    int8         as cold, from a cache of int8, over int8 from memory
    workers N    torch's DataLoader with N worker processes, cold: each reads whole batches with our reader

On two cores the step and the loader share the processor: what the loader takes is the step's loss, so next to the ratio
stands the share of the machine that the reading threads took. --step-threads 1 leaves them a core, as a GPU does.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import machine
from read import ROW_BYTES, drop_from_memory
from synthetic import TOKENS, random_cache
from torch.utils.data import DataLoader, Dataset

from emkum.models.backbone import BlockStack
from emkum.shards.reader import Cache
from emkum.stage2_train.loader import BatchLoader, Buffers, CachedSource, HostBatch, Stored
from emkum.stage2_train.order import TrainOrder
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.samples import SampleTable

WIDTH, NUM_TOKENS = 768, 197
START = 4  # steps of a feed that are not timed: until then it has not read ahead
IN_MEMORY = 4  # different batches of the feed from memory


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    ratios: dict[str, float] = {}
    tables = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        caches = {}
        for storage in ("float16", "int8"):
            caches[storage] = Path(folder) / storage
            random_cache(caches[storage], arguments.rows, NUM_TOKENS, WIDTH, storage)
        for place, threads in enumerate(arguments.step_threads):
            torch.set_num_threads(threads)
            feeds = Feeds(caches, arguments, device)
            step = Step(device)
            step.fit(feeds.memory("float16"), arguments.batch / arguments.rows_per_second)
            rounds = [
                {name: timed(name, feeds, step, number, arguments.steps) for name in arguments.feeds}
                for number in range(arguments.rounds)
            ]
            suffix = "" if place == 0 else f"_{threads}_threads"
            for name in arguments.feeds:
                if not name.endswith("memory"):
                    ratios[f"step_{name.replace(' ', '_')}_over_memory{suffix}"] = over_memory(name, rounds)
            tables[threads] = print_table(threads, step, rounds, arguments.batch)
    result = {
        "ratios": {name: round(value, 4) for name, value in ratios.items()},
        "feeds_by_step_threads": tables,
        "rows": arguments.rows,
        "row_bytes": ROW_BYTES,
        "batch": arguments.batch,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "loader_threads": arguments.threads,
        "device": arguments.device,
        "machine": machine(),
    }
    print(json.dumps(result) if arguments.json else json.dumps(result["machine"], indent=1))


# --- the step ----------------------------------------------------------------------------------------------------


class Step:
    """One Transformer block, trained on the first `tokens` tokens of each row towards random targets."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.tokens = device, 1
        self.stack = BlockStack.random(WIDTH, 12, 1).to(device)
        self.optimiser = torch.optim.AdamW(self.stack.parameters(), lr=1e-5, fused=True)
        self.target_TD = torch.randn(NUM_TOKENS, WIDTH, device=device)

    def __call__(self, source: CachedSource, host: HostBatch) -> None:
        tokens_BTD = source.prepare(host, self.device).tokens_BTD
        assert tokens_BTD is not None
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            out_BTD = self.stack(tokens_BTD[:, : self.tokens])[-1]
        loss = (out_BTD.float() - self.target_TD[: self.tokens]).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.optimiser.zero_grad()

    def fit(self, feed: Feed, seconds: float) -> None:
        """Takes as many tokens as make the step last `seconds`."""
        for _ in range(2):
            found = {}
            for self.tokens in (2, 8):
                found[self.tokens] = statistics.median(self.times(feed, 4)[1:])
            per_token = max(1e-6, (found[8] - found[2]) / 6)
            self.tokens = round(min(max((seconds - found[2]) / per_token + 2, 1), NUM_TOKENS))
            if abs(statistics.median(self.times(feed, 4)[1:]) - seconds) < 0.1 * seconds:
                return

    def times(self, feed: Feed, steps: int) -> list[float]:
        """Seconds of each step, waiting for its batch included."""
        found, source, batches = [], feed.source, iter(feed.batches)
        started = time.perf_counter()
        for _ in range(steps):
            self(source, next(batches))
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - started)
            started = time.perf_counter()
        return found


# --- the feeds ---------------------------------------------------------------------------------------------------


@dataclass
class Feed:
    """Batches without end, and the source that decodes them. busy: seconds its threads were on a processor so far."""

    source: CachedSource
    batches: Iterator[HostBatch]
    busy: Callable[[], float] = lambda: 0.0


class Feeds:
    """Makes each feed, by its name."""

    def __init__(self, caches: dict[str, Path], arguments: argparse.Namespace, device: torch.device) -> None:
        self.caches, self.arguments, self.device = caches, arguments, device
        self._kept: dict[str, Feed] = {}

    def make(self, name: str, seed: int) -> Feed:
        if name.endswith("memory"):
            return self.memory("int8" if name.startswith("int8") else "float16")
        if name == "warm":
            if name not in self._kept:
                self._kept[name] = self._loader("float16", seed)
                for _ in range(self.arguments.rows // self.arguments.batch):
                    next(self._kept[name].batches)
            return self._kept[name]
        storage = "int8" if name == "int8" else "float16"
        self._kept.pop("warm", None)  # it maps the file: what is mapped stays in memory
        gc.collect()
        drop_from_memory(self.caches[storage] / TOKENS)
        if name.startswith("workers"):
            return self._workers(int(name.split()[1]), seed)
        return self._loader(storage, seed)

    def memory(self, storage: str) -> Feed:
        key = f"{storage} memory"
        if key not in self._kept:
            source, order = self._source(storage), self._order(0)
            pin = self.device.type == "cuda"
            batches = [source.read(order.rows(i), Buffers(pin)) for i in range(IN_MEMORY)]
            self._kept[key] = Feed(source, cycled(batches))
        return self._kept[key]

    def _loader(self, storage: str, seed: int) -> Feed:
        loader = BatchLoader(
            self._order(seed),
            self._source(storage),
            threads=CachedSource.batches_at_once,
            pin=self.device.type == "cuda",
        )
        return Feed(loader.source, iter(loader), lambda: loader.busy_seconds)  # type: ignore[arg-type]

    def _workers(self, number: int, seed: int) -> Feed:
        batches = Batches(self.caches["float16"], self._order(seed))
        pin = self.device.type == "cuda"
        loader = DataLoader(batches, batch_size=None, num_workers=number, pin_memory=pin)
        hosts = (batches.as_read(place, values) for place, values in enumerate(loader))
        return Feed(self._source("float16"), hosts)

    def _source(self, storage: str) -> CachedSource:
        cache = Cache.open(self.caches[storage])
        return CachedSource(cache, FieldNames(inputs=TOKENS), None, threads=self.arguments.threads)

    def _order(self, seed: int) -> TrainOrder:
        field = Cache.open(self.caches["float16"]).field(TOKENS)
        table = SampleTable("images", "train", field.rows("train"), None, None, 1, 0)
        return TrainOrder(table, self.arguments.batch, seed, num_steps=1 << 30)


class Batches(Dataset[torch.Tensor]):
    """Whole batches for torch's DataLoader; its workers open the cache each for itself."""

    def __init__(self, path: Path, order: TrainOrder) -> None:
        self.path, self.order = path, order
        self._cache: Cache | None = None

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> torch.Tensor:
        self._cache = self._cache or Cache.open(self.path)
        rows = self.order.rows(place).image_rows_B
        assert rows is not None
        values = torch.empty(len(rows), NUM_TOKENS, WIDTH, dtype=torch.float16)
        self._cache.field(TOKENS).read(rows, out=values.numpy())
        return values

    def as_read(self, place: int, values: torch.Tensor) -> HostBatch:
        return HostBatch(self.order.rows(place), Stored(values), None, None, None, Buffers(False))


# --- timing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """seconds: a step, on average. busy: the share of the machine's cores that the reading threads took meanwhile."""

    seconds: float
    busy: float


def timed(name: str, feeds: Feeds, step: Step, number: int, steps: int) -> Timed:
    """Some steps of one feed, after those in which it starts."""
    feed = feeds.make(name, number + 1)
    step.times(feed, START)
    busy = feed.busy()
    seconds = sum(step.times(feed, steps))
    return Timed(seconds / steps, (feed.busy() - busy) / seconds / (os.cpu_count() or 1))


def print_table(threads: int, step: Step, rounds: list[dict[str, Timed]], batch: int) -> dict[str, dict[str, float]]:
    print(f"\nthe step on {threads} threads, {step.tokens} tokens a row")
    print(f"{'feed':12}  {'ms a step':>9}  {'from':>7}  {'to':>7}  {'over memory':>11}  {'rows/s':>7}  reading threads")
    table = {}
    for name in rounds[0]:
        seconds = [r[name].seconds for r in rounds]
        ratio = over_memory(name, rounds)
        middle, busy = statistics.median(seconds), statistics.median(r[name].busy for r in rounds)
        line = f"{name:12}  {middle * 1e3:9.1f}  {min(seconds) * 1e3:7.1f}  {max(seconds) * 1e3:7.1f}  {ratio:11.3f}  "
        print(f"{line}{batch / middle:7.0f}  {busy:15.1%}", flush=True)
        table[name] = {"seconds": round(middle, 5), "rows_per_second": round(batch / middle, 1), "busy": round(busy, 4)}
    return table


def over_memory(name: str, rounds: list[dict[str, Timed]]) -> float:
    memory = "int8 memory" if name.startswith("int8") else "memory"
    return statistics.median(r[name].seconds / r[memory].seconds for r in rounds)


def cycled(batches: list[HostBatch]) -> Iterator[HostBatch]:
    while True:
        yield from batches


def parse() -> argparse.Namespace:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="0.45 MB each on the disk")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rows-per-second", type=float, default=1500.0, help="what the step from memory consumes")
    parser.add_argument("--step-threads", type=int, nargs="+", default=sorted({cores, max(1, cores - 1)}, reverse=True))
    parser.add_argument("--threads", type=int, default=8, help="of our loader; as in emkum train")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="of torch's DataLoader")
    parser.add_argument("--steps", type=int, default=20, help="timed, of each feed in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to be measured; default: the folder for temporary files"
    )
    parser.add_argument("--quick", action="store_true", help="one round of 4 steps, one number of threads")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.rounds, arguments.rows = 4, 1, 3328
        arguments.step_threads, arguments.workers = arguments.step_threads[:1], [1]
    arguments.feeds = ["memory", "warm", "cold", "int8 memory", "int8", *(f"workers {n}" for n in arguments.workers)]
    if arguments.rows < (START + arguments.steps + 5) * arguments.batch:
        parser.error(
            f"--rows {arguments.rows} are read twice in {START + arguments.steps + 5} batches of {arguments.batch}"
        )
    return arguments


if __name__ == "__main__":
    main()
