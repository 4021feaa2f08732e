"""The contestants of benchmarks/read.py read what was written, and one that does not is found out."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if "ArgumentParser(" in path.read_text())


def imported(name: str) -> ModuleType:
    """A module of benchmarks/, whose scripts import one another by their bare names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def readers() -> ModuleType:
    return imported("readers")


@pytest.fixture(scope="module")
def rows(readers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> object:
    """2,048 rows of 512 bytes, as read.py makes them."""
    data = readers.DataSet(tmp_path_factory.mktemp("rows"), 2048, 4, 64, 2)
    imported("read").make_rows(data)
    return data


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_a_quick_form_and_a_line_for_machines(script: str) -> None:
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout
    assert "--json" in done.stdout


CONTESTANTS = [
    "emkum",
    "emkum 1 thread",
    "emkum always",
    "emkum never",
    "emkum int8",
    "memmap",
    "memmap threads",
    "memmap int8",
    "memmap advised",
    "raw disk",
    "tensorstore",
    "tensorstore checked",
    "zarr-python",
    "zarr-python checked",
    "h5py",
    "h5py checked",
    "safetensors",
    "arrow",
    "webdataset",
    "litdata",
    "mds",
]


def test_no_contestant_is_forgotten(readers: ModuleType) -> None:
    assert sorted(readers.CONTESTANTS) == sorted(CONTESTANTS)


@pytest.mark.filterwarnings("ignore")  # of the peers' own
@pytest.mark.parametrize("name", CONTESTANTS)
def test_a_contestant_reads_what_was_written(readers: ModuleType, rows: object, name: str) -> None:
    served = readers.Served(name, rows)
    missing = served.hello().get("missing")
    if missing:
        pytest.skip(missing)
    served.write()
    if name == "raw disk":
        try:
            found = served.measure(batch=64, seconds=0.01, seed=0, cold=True)
        except OSError as error:  # a file system without O_DIRECT
            pytest.skip(str(error))
    else:
        served.warm(64)
        found = served.measure(batch=64, seconds=0.01, seed=0, cold=False)
    assert found["rows"] >= 64
    assert found["rows_per_second"] > 0


def test_a_reader_that_brings_other_rows_is_found_out(readers: ModuleType, rows: object) -> None:
    served = readers.Served("memmap", rows)
    served.warm(64)
    right = served.reader

    def wrong(wanted: np.ndarray, out: np.ndarray) -> np.ndarray:
        right(wanted + 1, out)
        return wanted

    served.reader = wrong
    with pytest.raises(ValueError, match=r"row \d+ came with other numbers"):
        served.measure(batch=64, seconds=0.01, seed=0, cold=False)


def test_dropped_pages_are_looked_up(rows: object) -> None:
    read, path = imported("read"), rows.folder / "raw.float16"  # type: ignore[attr-defined]
    with open(path, "rb") as file:
        file.read()
        assert read.resident_pages(file.fileno()) == (256, 256)
    try:
        read.drop_from_memory(path)
    except SystemExit as error:  # a file system in memory
        pytest.skip(str(error))
    with open(path, "rb") as file:
        assert read.resident_pages(file.fileno()) == (0, 256)


def test_one_json_object_is_the_last_line(tmp_path: Path) -> None:
    script = [sys.executable, str(BENCHMARKS / "codec.py"), "--quick", "--json"]
    done = subprocess.run(
        script, capture_output=True, text=True, env={"EMKUM_SHARED": str(tmp_path), "PATH": "/usr/bin"}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ratios"] == {}
    assert found["skipped"] == f"nothing under {tmp_path}"
