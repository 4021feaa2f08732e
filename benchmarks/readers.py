"""The contestants of read.py: each writes the same rows in its own format, and reads shuffled batches of them.

    python readers.py NAME DATA

serves one contestant to read.py over stdin and stdout, one JSON object a line. It runs with whatever interpreter has
the contestant's packages, so nothing but numpy is imported before a contestant is opened. A reader is a function of
(rows, out): it fills `out` with those rows and returns their numbers; a stream, which has an order of its own, returns
the numbers it came to. Every reader is the fastest form of its library that was found; slower ones are named beside it.

The folder of the data holds `raw.float16`, the rows side by side without a header; `distinct.float16.npy`, the
different rows among them, and `which.npy`, which of those each row is; the same of int8; and one folder per format.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.machinery
import itertools
import json
import mmap
import os
import shutil
import sys
import tarfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

Read = Callable[[np.ndarray, np.ndarray], np.ndarray]
ROWS_PER_FILE = 1024  # of formats that have several files
TOKENS = "image/random@0/tokens"  # the field of synthetic.py
MOST_WARMING_SECONDS = 5.0  # of peers; ours checks every row the first time, so all rows are read before it is timed


@dataclass(frozen=True)
class DataSet:
    """Where the rows lie, their number and shape, with how many threads emkum reads, and whether from the disk."""

    folder: Path
    rows: int
    tokens: int
    width: int
    threads: int
    cold: bool = False

    def raw(self, dtype: str) -> np.ndarray:
        """All rows, mapped."""
        shape = (self.rows, self.tokens, self.width)
        return np.memmap(self.folder / f"raw.{dtype}", dtype=dtype, mode="r", shape=shape)

    @property
    def row_bytes(self) -> int:
        """Of a float16 row."""
        return self.tokens * self.width * 2


@dataclass(frozen=True)
class Contestant:
    """files: what it reads, below the data set's folder. write: makes them, if read.py did not. checked: whether a
    flipped bit is noticed in the reads that are timed. warm, cold: where it takes part. whole: all rows are read before
    it is timed warm. clings: it never lets go of what it mapped, so each cold measurement needs a new process.
    """

    files: str
    open: Callable[[DataSet], Read]
    write: Callable[[DataSet, Path], None] | None = None
    dtype: str = "float16"
    checked: str = "no"
    form: str = ""
    warm: bool = True
    cold: bool = True
    whole: bool = False
    clings: bool = False


# --- ours --------------------------------------------------------------------------------------------------------


def open_emkum(data: DataSet, dtype: str = "float16", verify: str = "first", threads: int | None = None) -> Read:
    from emkum.shards.reader import Cache
    from emkum.shards.shard_files import ReadThreads

    cache = Cache.open(data.folder / f"emkum.{dtype}", verify=verify)
    field = cache.field(TOKENS)
    pool = ReadThreads(data.threads if threads is None else threads)

    def read(rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        field.read(rows, 0, out=out, threads=pool)
        if dtype == "int8":
            field.read_scale(rows)
        return rows

    return read


# --- the physical limits -----------------------------------------------------------------------------------------


def open_direct(data: DataSet) -> Read:
    """Random rows past the page cache, 8 threads: what the disk gives. O_DIRECT wants rows of whole sectors."""
    assert data.row_bytes % 512 == 0, "rows of whole sectors"
    file = os.open(data.folder / "raw.float16", os.O_RDONLY | os.O_DIRECT)
    pool = ThreadPoolExecutor(8)
    memory = mmap.mmap(-1, 1 << 28)  # page aligned, which a numpy array is not

    def one(place: int, row: int) -> None:
        view = memoryview(memory)[place * data.row_bytes : (place + 1) * data.row_bytes]
        assert os.preadv(file, [view], row * data.row_bytes) == data.row_bytes

    def read(rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        assert len(rows) * data.row_bytes <= len(memory)
        for done in [pool.submit(one, place, row) for place, row in enumerate(rows.tolist())]:
            done.result()
        out[-8:] = np.frombuffer(memory, np.float16, len(rows) * data.row_bytes // 2).reshape(out.shape)[-8:]
        return rows

    return read


def open_memmap(data: DataSet, dtype: str = "float16", threads: int = 1, advise: bool = False) -> Read:
    """`take` in mode "clip", which writes straight into `out`; mode "raise" goes through a copy and takes 3-4 times as
    long. advise: for cold reads, the kernel is told which rows come; without it a row costs a read-ahead of megabytes.
    """
    values = data.raw(dtype)
    pool = ThreadPoolExecutor(threads)
    stride = values[0].nbytes
    if advise:
        values._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]

    def read(rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        if advise:
            for row in rows.tolist():
                start = row * stride // mmap.PAGESIZE * mmap.PAGESIZE
                values._mmap.madvise(mmap.MADV_WILLNEED, start, (row + 1) * stride - start)  # type: ignore[attr-defined]
        if threads == 1:
            values.take(rows, axis=0, mode="clip", out=out)
            return rows
        edges = np.linspace(0, len(rows), threads + 1).astype(int).tolist()
        parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
        for done in [pool.submit(values.take, rows[p], 0, out[p], "clip") for p in parts]:
            done.result()
        return rows

    return read


# --- readers of Zarr ---------------------------------------------------------------------------------------------


def write_zarr(data: DataSet, folder: Path) -> None:
    """Shards of 1,024 rows, a chunk a row, neither compressed nor checked: the layout of emkum's field without its
    checksums. Written by tensorstore, a shard a time.
    """
    import tensorstore

    chunk = [ROWS_PER_FILE, data.tokens, data.width]
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    inner = {"chunk_shape": [1, *chunk[1:]], "codecs": [little], "index_codecs": [little, {"name": "crc32c"}]}
    store = tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(folder)},
            "metadata": {
                "shape": [data.rows, *chunk[1:]],
                "data_type": "float16",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "codecs": [{"name": "sharding_indexed", "configuration": inner}],
            },
        },
        create=True,
    ).result()
    values = data.raw("float16")
    for first in range(0, data.rows, ROWS_PER_FILE):
        store[first : first + ROWS_PER_FILE].write(values[first : first + ROWS_PER_FILE]).result()


def _zarr_path(data: DataSet, checked: bool) -> Path:
    return data.folder / "emkum.float16" / TOKENS / "values" if checked else data.folder / "zarr"


def open_tensorstore(data: DataSet, checked: bool = False) -> Read:
    """Written by tensorstore's own threads into the batch, which it sees as an array: row by row, or all rows in one
    selection, whichever is faster here. Slower: reading into arrays of its own, in a loop, as futures, in a ts.Batch.
    """
    import tensorstore

    # More at a time take longer, but for a disk.
    limits = {"file_io_concurrency": {"limit": 8 if data.cold else 2}, "data_copy_concurrency": {"limit": 2}}
    place = {"driver": "file", "path": f"{_zarr_path(data, checked)}/"}
    spec = {"driver": "zarr3", "kvstore": place, "context": limits}
    store = tensorstore.open(spec, open=True, read=True).result()
    if checked:
        store = store[:, 0]  # the view

    def by_row(rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        target = tensorstore.array(out)
        for done in [target[place].write(store[row]) for place, row in enumerate(rows.tolist())]:
            done.result()
        return rows

    def at_once(rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        tensorstore.array(out).write(store[rows]).result()
        return rows

    return faster(by_row, at_once, data)


def open_zarr(data: DataSet, checked: bool = False) -> Read:
    """Row by row, or all rows in one selection: whichever is faster in this version (in 3.1 the former, by far)."""
    import zarr

    array = zarr.open_array(_zarr_path(data, checked), mode="r")
    assert isinstance(array, zarr.Array)

    def by_row(rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        for i, row in enumerate(rows.tolist()):
            out[i] = array[row, 0] if checked else array[row]
        return rows

    def at_once(rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        out[...] = array.oindex[rows, 0] if checked else array.oindex[rows]
        return rows

    return faster(by_row, at_once, data)


def faster(one: Read, other: Read, data: DataSet) -> Read:
    """The reader that takes less time for some of the rows, in memory by then."""
    rows, readers = np.arange(min(16, data.rows)), (one, other)
    out = np.empty((len(rows), data.tokens, data.width), np.float16)

    def seconds(read: Read) -> float:
        started = time.perf_counter()
        read(rows, out)
        return time.perf_counter() - started

    seconds(one)
    return min(readers, key=lambda read: min(seconds(read) for _ in range(3)))


# --- other formats -----------------------------------------------------------------------------------------------


def write_h5py(data: DataSet, folder: Path, checked: bool = False) -> None:
    import h5py

    folder.mkdir()
    values = data.raw("float16")
    chunk = {"chunks": (1, *values.shape[1:]), "fletcher32": True} if checked else {}
    with h5py.File(folder / "rows.h5", "w") as file:
        rows = file.create_dataset("rows", values.shape, "float16", **chunk)
        for first in range(0, data.rows, ROWS_PER_FILE):
            rows[first : first + ROWS_PER_FILE] = values[first : first + ROWS_PER_FILE]


def open_h5py(data: DataSet, checked: bool = False) -> Read:
    """Straight into the batch through h5py's low-level interface, from one contiguous data set; checked: from chunks of
    a row with Fletcher's checksum. Slower: read_direct, and one selection of all rows.
    """
    import h5py

    file = h5py.File(data.folder / ("h5py-checked" if checked else "h5py") / "rows.h5", "r")
    rows_in_file = file["rows"].id
    shape = (data.tokens, data.width)
    space, memory = rows_in_file.get_space(), h5py.h5s.create_simple((1, *shape))

    def read(rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        for place, row in enumerate(rows.tolist()):
            space.select_hyperslab((row, 0, 0), (1, *shape))
            rows_in_file.read(memory, space, out[place : place + 1])
        return rows

    return read


def write_safetensors(data: DataSet, folder: Path) -> None:
    import safetensors.numpy

    folder.mkdir()
    safetensors.numpy.save_file({"rows": np.asarray(data.raw("float16"))}, folder / "rows.safetensors")


def open_safetensors(data: DataSet) -> Read:
    """The tensor as torch maps it, rows taken by numpy. Slower: get_slice per row, torch.index_select."""
    import safetensors

    file = safetensors.safe_open(data.folder / "safetensors" / "rows.safetensors", "pt")
    file.__enter__()
    values = file.get_tensor("rows").numpy()

    def read(rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        values.take(rows, axis=0, mode="clip", out=out)
        return rows

    return read


def write_arrow(data: DataSet, folder: Path) -> None:
    import pyarrow

    folder.mkdir()
    values = data.raw("float16")
    schema = pyarrow.schema([("row", pyarrow.binary(data.row_bytes))])
    with pyarrow.OSFile(str(folder / "rows.arrow"), "wb") as file, pyarrow.ipc.new_file(file, schema) as writer:
        for first in range(0, data.rows, ROWS_PER_FILE):
            here = values[first : first + ROWS_PER_FILE]
            buffer = pyarrow.py_buffer(np.ascontiguousarray(here))
            column = pyarrow.FixedSizeBinaryArray.from_buffers(schema.field(0).type, len(here), [None, buffer])
            writer.write_batch(pyarrow.record_batch([column], schema=schema))


def open_arrow(data: DataSet) -> Read:
    """A mapped IPC file; rows are copied out of its record batches. Slower: `take` of a table."""
    import pyarrow

    file = pyarrow.ipc.open_file(pyarrow.memory_map(str(data.folder / "arrow" / "rows.arrow")))
    parts = []
    for number in range(file.num_record_batches):
        column = file.get_batch(number).column(0)
        parts.append(np.frombuffer(column.buffers()[1], np.float16).reshape(-1, data.tokens, data.width))

    def read(rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        for i, row in enumerate(rows.tolist()):
            out[i] = parts[row // ROWS_PER_FILE][row % ROWS_PER_FILE]
        return rows

    return read


def write_webdataset(data: DataSet, folder: Path) -> None:
    folder.mkdir()
    values = data.raw("float16")
    for first in range(0, data.rows, ROWS_PER_FILE):
        with tarfile.open(folder / f"{first // ROWS_PER_FILE:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(first, min(first + ROWS_PER_FILE, data.rows)):
                info = tarfile.TarInfo(f"{row:08d}.bin")
                info.size = data.row_bytes
                tar.addfile(info, BytesIO(values[row].data.cast("B")))


def open_webdataset(data: DataSet) -> Read:
    """A stream through a shuffle buffer of 1,000 samples, in this process. Each of its worker processes would take more
    time of the processor, not less: the samples are then copied between processes as well.
    """
    import webdataset

    tars = [str(path) for path in sorted((data.folder / "webdataset").glob("*.tar"))]
    buffer = min(1000, data.rows // 4)  # most rows are read while the clock runs

    def samples() -> Iterator[tuple[int, np.ndarray]]:
        while True:
            stream = webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(buffer, initial=buffer)
            for sample in stream:
                row = np.frombuffer(sample["bin"], np.float16).reshape(data.tokens, data.width)
                yield int(sample["__key__"]), row

    return read_stream(samples())


def read_stream(samples: Iterator[tuple[int, np.ndarray]]) -> Read:
    """A reader of (number, row) as they come. The first is taken at once: a shuffle buffer fills before the clock."""
    waiting = [next(samples)]

    def read(rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        came = np.empty(len(rows), np.int64)
        for i in range(len(rows)):
            came[i], out[i] = waiting.pop() if waiting else next(samples)
        return came

    return read


def write_litdata(data: DataSet, folder: Path) -> None:
    import torch
    from litdata.streaming import Cache

    values = data.raw("float16")
    cache = Cache(str(folder), chunk_size=ROWS_PER_FILE)
    for row in range(data.rows):
        cache[row] = {"number": row, "row": torch.from_numpy(values[row].copy())}
    cache.done()
    cache.merge()


def open_litdata(data: DataSet) -> Read:
    """Its shuffled stream in this process, decoding one sample at a time: the default decodes windows of them, of which
    a shuffled stream uses little, and reads half as fast (50 times slower of numpy arrays). Slower: dataset[row].
    """
    import litdata

    def samples() -> Iterator[tuple[int, np.ndarray]]:
        epoch = 0
        while True:
            folder = str(data.folder / "litdata")
            dataset = litdata.StreamingDataset(folder, shuffle=True, seed=epoch, batch_decode=1)
            epoch += 1
            for sample in dataset:
                yield int(sample["number"]), sample["row"].numpy()

    return read_stream(samples())


def write_mds(data: DataSet, folder: Path) -> None:
    stand_in_for_torchvision()
    from streaming import MDSWriter

    values = data.raw("float16")
    columns = {"row": f"ndarray:float16:{data.tokens},{data.width}"}
    limit = 1 << 28
    with MDSWriter(out=str(folder), columns=columns, compression=None, size_limit=limit) as writer:
        for row in range(data.rows):
            writer.write({"row": np.ascontiguousarray(values[row])})


def open_mds(data: DataSet) -> Read:
    """Rows by number from local shards, in this process."""
    stand_in_for_torchvision()
    from streaming import LocalDataset

    dataset = LocalDataset(str(data.folder / "mds"))

    def read(rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        for i, row in enumerate(rows.tolist()):
            out[i] = dataset[row]["row"]
        return rows

    return read


def stand_in_for_torchvision() -> None:
    """mosaicml-streaming imports torchvision for data sets of pictures that are not used here, and the wheel of
    torchvision does not load beside a CPU build of torch. In this process only, empty modules stand in for it.
    """
    try:
        import torchvision  # noqa: F401
    except Exception:  # ModuleNotFoundError, or RuntimeError: operator torchvision::nms does not exist
        for name in (
            "torchvision",
            "torchvision.datasets",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        ):
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            module.__path__ = []
            module.__dict__.update(dict.fromkeys(("VisionDataset", "to_tensor"), object))
            sys.modules[name] = module


# --- the list ----------------------------------------------------------------------------------------------------

OURS, OURS_INT8 = "emkum", "emkum int8"
THREADS = "Field.read, threads"
CONTESTANTS: dict[str, Contestant] = {
    OURS: Contestant("emkum.float16", open_emkum, checked="first read", form=THREADS, whole=True),
    "emkum 1 thread": Contestant(
        "emkum.float16", lambda d: open_emkum(d, threads=1), checked="first read", form="Field.read", whole=True
    ),
    "emkum always": Contestant("emkum.float16", lambda d: open_emkum(d, verify="always"), checked="yes", form=THREADS),
    "emkum never": Contestant("emkum.float16", lambda d: open_emkum(d, verify="never"), form=THREADS),
    OURS_INT8: Contestant(
        "emkum.int8", lambda d: open_emkum(d, "int8"), dtype="int8", checked="first read", form=THREADS, whole=True
    ),
    "memmap": Contestant("raw.float16", open_memmap, form="take(mode='clip', out=)", cold=False),
    "memmap threads": Contestant(
        "raw.float16", lambda d: open_memmap(d, threads=2), form="the same, 2 threads", cold=False
    ),
    "memmap int8": Contestant(
        "raw.int8", lambda d: open_memmap(d, "int8"), dtype="int8", form="take(mode='clip', out=)", cold=False
    ),
    "memmap advised": Contestant(
        "raw.float16",
        lambda d: open_memmap(d, threads=2, advise=True),
        form="MADV_WILLNEED, take, 2 threads",
        warm=False,
    ),
    "raw disk": Contestant("raw.float16", open_direct, form="O_DIRECT preadv, 8 threads", warm=False),
    "tensorstore": Contestant("zarr", open_tensorstore, write_zarr, form="written into the batch"),
    "tensorstore checked": Contestant(
        "emkum.float16", lambda d: open_tensorstore(d, True), checked="yes", form="the same, emkum's field"
    ),
    "zarr-python": Contestant("zarr", open_zarr, write_zarr, form="z[i] or oindex, the faster"),
    "zarr-python checked": Contestant(
        "emkum.float16", lambda d: open_zarr(d, True), checked="yes", form="the same, emkum's field"
    ),
    "h5py": Contestant("h5py", open_h5py, write_h5py, form="contiguous, low-level read"),
    "h5py checked": Contestant(
        "h5py-checked",
        lambda d: open_h5py(d, True),
        lambda d, folder: write_h5py(d, folder, True),
        checked="yes",
        form="chunks of a row, fletcher32",
    ),
    "safetensors": Contestant("safetensors", open_safetensors, write_safetensors, form="mapped, take(mode='clip')"),
    "arrow": Contestant("arrow", open_arrow, write_arrow, form="mapped IPC file, row copies"),
    "webdataset": Contestant("webdataset", open_webdataset, write_webdataset, form="shuffle(1000), in process"),
    "litdata": Contestant("litdata", open_litdata, write_litdata, form="shuffled stream, in process", clings=True),
    "mds": Contestant("mds", open_mds, write_mds, form="LocalDataset[i]"),
}
PACKAGES = {
    "tensorstore": "tensorstore",
    "zarr-python": "zarr",
    "h5py": "h5py",
    "safetensors": "safetensors",
    "arrow": "pyarrow",
    "webdataset": "webdataset",
    "litdata": "litdata",
    "mds": "streaming",
}


# --- the served process ------------------------------------------------------------------------------------------


class Served:
    """One contestant and what is open of it."""

    def __init__(self, name: str, data: DataSet) -> None:
        self.contestant, self.data = CONTESTANTS[name], data
        self.package = PACKAGES.get(name.removesuffix(" checked"))
        dtype = self.contestant.dtype
        self.distinct = np.load(data.folder / f"distinct.{dtype}.npy", mmap_mode="r")
        self.which = np.load(data.folder / "which.npy")
        self.reader: Read | None = None

    def hello(self) -> dict[str, Any]:
        """Why the package does not import here, if so."""
        if self.package is None:
            return {}
        try:
            if self.package == "streaming":
                stand_in_for_torchvision()
            importlib.import_module(self.package)
            return {}
        except Exception as error:
            return {"missing": f"{type(error).__name__}: {error}"[:200]}

    def write(self) -> dict[str, Any]:
        """The rows in the contestant's format, on the disk before this returns."""
        folder = self.data.folder / self.contestant.files
        if self.contestant.write is None or folder.exists():
            return {}
        started = time.perf_counter()
        self.contestant.write(self.data, folder)
        for path in folder.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        return {"seconds": time.perf_counter() - started}

    def warm(self, batch: int) -> dict[str, Any]:
        """Opens the reader and reads until its rows lie in memory."""
        self.reader = self.reader or self.contestant.open(self.data)
        out, started = self._batch(batch), time.perf_counter()
        for first in range(0, self.data.rows - batch + 1, batch):
            self.reader(np.arange(first, first + batch), out)
            if not self.contestant.whole and time.perf_counter() - started > MOST_WARMING_SECONDS:
                break
        return {}

    def measure(self, batch: int, seconds: float, seed: int, cold: bool) -> dict[str, Any]:
        """Shuffled batches for so many seconds, but at least one; cold: no row twice, through a reader of its own."""
        reader = self.contestant.open(dataclasses.replace(self.data, cold=True)) if cold else self.reader
        assert reader is not None
        out, order = self._batch(batch), np.random.default_rng(seed).permutation(self.data.rows)
        batches = len(order) // batch
        num, started, started_cpu = 0, time.perf_counter(), time.process_time()
        while num == 0 or (time.perf_counter() - started < seconds and not (cold and num == batches)):
            rows = order[num % batches * batch :][:batch]
            came = reader(rows, out)
            num += 1
        wall, cpu = time.perf_counter() - started, time.process_time() - started_cpu
        for place in range(batch - 8, batch):
            if not np.array_equal(out[place], self.distinct[self.which[came[place]]]):
                raise ValueError(f"row {came[place]} came with other numbers")
        return {"rows_per_second": num * batch / wall, "cpu_us": cpu / (num * batch) * 1e6, "rows": num * batch}

    def close(self) -> dict[str, Any]:
        """Lets go of maps and files: pages that are mapped cannot be dropped from memory."""
        self.reader = None
        gc.collect()
        return {}

    def _batch(self, batch: int) -> np.ndarray:
        return np.zeros((batch, self.data.tokens, self.data.width), self.contestant.dtype)


def serve(name: str, data: DataSet) -> None:
    """Answers one JSON object per line of stdin; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    served = Served(name, data)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = getattr(served, asked.pop("do"))(**asked)
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"[:400]}
        answers.write(json.dumps(answer) + "\n")
    if threading.active_count() > 1:  # threads of peers that nothing ends
        os._exit(0)


def remove(data: DataSet, name: str) -> None:
    """The files that the contestant wrote."""
    if CONTESTANTS[name].write is not None:
        shutil.rmtree(data.folder / CONTESTANTS[name].files, ignore_errors=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    serve(sys.argv[1], DataSet(Path(given.pop("folder")), **given))
