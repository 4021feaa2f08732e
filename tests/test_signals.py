"""SIGTERM, SIGINT, SIGHUP in every phase of `emkum extract`: 75 and one line, and the same command goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from emkum.shards.digest import digest
from emkum.shards.reader import Cache
from emkum.shards.store import LocalStore
from emkum.shards.verify import verify
from tests.conftest import TORTURE_MINUTES
from tests.extraction import ROOT, Extraction, claims, make_pictures, save_teacher, temporaries

GRACE_SECONDS = 20  # until it must have ended
LINE = r"emkum: Interrupted: stopped by {}; what was committed is kept \| the same command continues"
TOKENS = "image/wide@0/tokens"

# A driver that says when a function is reached for the n-th time, and stays there.
STAY = """
import importlib, sys, time
module, name, number, seconds, sign = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
del sys.argv[1:6]
holder = importlib.import_module(module)
*owners, last = name.split(".")
for owner in owners:
    holder = getattr(holder, owner)
real, calls = getattr(holder, last), 0

def stays(*args, **kwargs):
    global calls
    calls += 1
    if calls == number:
        open(sign, "w").close()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.05)
    return real(*args, **kwargs)

setattr(holder, last, stays)
from emkum.cli import main
main()
"""


@dataclass(frozen=True)
class Phase:
    """Where the process is when the signal comes: in a function, called for the `number`-th time."""

    name: str
    module: str
    function: str
    number: int = 1
    seconds: float = 300.0  # it stays there; what cannot be interrupted must be short
    more: tuple[str, ...] = ()
    finished_blocks: int = 0  # committed before it at least


EXTRACT = "emkum.stage1_extract.extract"
SHORT = [
    Phase("the tars are scanned", "emkum.shards.tars", "scan_tar"),
    Phase("networks are loaded", "emkum.stage1_extract.networks", "load_network"),
    Phase(
        "int8's statistics are measured", "emkum.stage1_extract.statistics", "_add_moments", more=("--storage", "int8")
    ),
    Phase("the networks run", EXTRACT, "_start_pictures", number=20, finished_blocks=1),
    # The thread that writes cannot be interrupted: it stays for a moment, and the loop waits for it.
    Phase("the write queue is full", "emkum.stage1_extract.writing", "Writing._append", 14, 6.0, finished_blocks=1),
    Phase("the last block is committed", "emkum.shards.ledger", "write_receipt_of_the_last", seconds=4.0),
]
LONG = [
    Phase("the plan is made", EXTRACT, "make_plan"),
    Phase("the segment is written", "emkum.shards.writer", "append_segment"),
    Phase("fields are declared", EXTRACT, "_declare"),
    Phase("the bill is measured", "emkum.stage1_extract.telling", "_expected_seconds"),
    Phase("pictures are decoded", "emkum.stage1_extract.pictures", "PictureStream._of"),
    Phase("a block is claimed", "emkum.shards.claims", "Claims.take", number=3),
    Phase("objects are synced", "emkum.shards.durable", "sync_dir", number=40, seconds=4.0),
    Phase("the first batch runs", EXTRACT, "_start_pictures"),
]


@pytest.fixture(scope="module")
def extraction(tmp_path_factory: pytest.TempPathFactory) -> Extraction:
    """Three blocks of 64 rows in batches of 8."""
    folder = tmp_path_factory.mktemp("source")
    make_pictures(folder / "a.tar", 180)
    return Extraction(save_teacher(folder / "wide"), folder / "a.tar", 64, more=("--batch-size", "8"))


@pytest.fixture(scope="module")
def wholes(extraction: Extraction, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], str]:
    """Digest of an uninterrupted run, by further options."""
    found = {}
    for more in ((), ("--storage", "int8")):
        cache = tmp_path_factory.mktemp("whole") / "cache"
        extraction.finish(cache, *more)
        found[more] = digest(str(cache))
    return found


def check_ended(cache: Path, finished_blocks: int) -> None:
    """Nothing unfinished is left, and what was finished is whole."""
    if (cache / "zarr.json").exists():
        assert not verify(LocalStore(cache)).findings
        assert temporaries(cache) == []
        assert claims(cache, "writer") | claims(cache, "plan") == set()
        fields = Cache.open(cache).fields
        assert not finished_blocks or len(fields[TOKENS].receipts) >= finished_blocks


@pytest.mark.parametrize("phase", SHORT + (LONG if TORTURE_MINUTES else []), ids=lambda phase: phase.name)
def test_a_signal_in_any_phase_ends_with_75_and_the_same_command_goes_on(
    phase: Phase, extraction: Extraction, wholes: dict[tuple[str, ...], str], tmp_path: Path
) -> None:
    number = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[(SHORT + LONG).index(phase) % 3]
    cache, sign = tmp_path / "cache", tmp_path / "sign"
    module, function, call = phase.module, phase.function, phase.number
    if function == "write_receipt_of_the_last":  # tokens, cls and boxes of three blocks
        module, function, call = "emkum.shards.writer", "write_receipt", 9
    driver = ("-c", STAY, module, function, str(call), str(phase.seconds), str(sign))
    running = extraction.start(cache, *phase.more, module=driver)
    try:
        assert running.wait_for(sign.exists), running.text()
        if phase.seconds < 100:
            time.sleep(0.5)
        os.kill(running.process.pid, number)
        assert running.wait(GRACE_SECONDS) == 75, running.text()
    finally:
        running.kill()
    assert re.fullmatch(LINE.format(number.name), running.last_line), running.text()
    assert "Traceback" not in running.text()
    check_ended(cache, phase.finished_blocks)
    extraction.finish(cache, *phase.more)
    assert digest(str(cache)) == wholes[phase.more]


def test_a_signal_right_after_the_start_ends_it(extraction: Extraction, tmp_path: Path) -> None:
    """Before Python has installed anything the signal kills, as it kills every program; nothing is there to lose."""
    for i, seconds in enumerate((0.02, 0.3, 0.8)):
        cache = tmp_path / f"cache{i}"
        running = extraction.start(cache)
        try:
            time.sleep(seconds)
            os.kill(running.process.pid, signal.SIGTERM)
            code = running.wait(GRACE_SECONDS)
        finally:
            running.kill()
        assert code in (75, -signal.SIGTERM), running.text()
        assert code != 75 or re.fullmatch(LINE.format("SIGTERM"), running.last_line), running.text()
        assert "Traceback" not in running.text()
        check_ended(cache, 0)


def test_a_signal_while_it_waits_for_another_that_plans(
    extraction: Extraction, wholes: dict[tuple[str, ...], str], tmp_path: Path
) -> None:
    cache, sign = tmp_path / "cache", tmp_path / "sign"
    first = extraction.start(cache, module=("-c", STAY, "emkum.shards.writer", "append_segment", "1", "300", str(sign)))
    second = None
    try:
        assert first.wait_for(sign.exists), first.text()
        second = extraction.start(cache, "--join")
        log = second.log
        assert second.wait_for(lambda: "waiting for it" in log.read_text()), second.text()
        os.kill(second.process.pid, signal.SIGINT)
        assert second.wait(GRACE_SECONDS) == 75, second.text()
        assert re.fullmatch(LINE.format("SIGINT"), second.last_line)
        assert not first.ended()
        os.kill(first.process.pid, signal.SIGTERM)
        assert first.wait(GRACE_SECONDS) == 75, first.text()
    finally:
        for running in (first, second):
            if running is not None:
                running.kill()
    check_ended(cache, 0)
    extraction.finish(cache)
    assert digest(str(cache)) == wholes[()]


def test_a_second_signal_ends_at_once_and_costs_no_block(
    extraction: Extraction, wholes: dict[tuple[str, ...], str], tmp_path: Path
) -> None:
    """The first waits for the thread that writes, which here takes a long time; the second does not."""
    cache, sign = tmp_path / "cache", tmp_path / "sign"
    driver = ("-c", STAY, "emkum.stage1_extract.writing", "Writing._append", "14", "300", str(sign))
    running = extraction.start(cache, module=driver)
    try:
        assert running.wait_for(sign.exists), running.text()
        os.kill(running.process.pid, signal.SIGTERM)
        time.sleep(1.0)
        assert not running.ended(), running.text()
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.wait(GRACE_SECONDS) == -signal.SIGTERM
    finally:
        running.kill()
    assert not verify(LocalStore(cache)).findings
    assert len(Cache.open(cache).fields[TOKENS].receipts) >= 1
    extraction.finish(cache)
    assert digest(str(cache)) == wholes[()]
    assert temporaries(cache) == []


# Where a signal meets what is not emkum's. The command is `app`; `send` sends the signal, and it is delivered there.
MEETING = """
import os, signal, sys, time
import emkum.cli
def send():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
{app}
emkum.cli.app = app
sys.argv = ["emkum", "teachers"]
emkum.cli.main()
"""
WORK = "end = time.monotonic() + 60\n    while time.monotonic() < end:\n        time.sleep(0.01)"


def meeting(app: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    code = MEETING.format(app=app.replace("WORK", WORK)).format(**more)
    command, path = [sys.executable, "-c", code], f"{folder}:{ROOT}"
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=GRACE_SECONDS)


def assert_interrupted(ended: subprocess.CompletedProcess[str]) -> None:
    assert ended.returncode == 75, (ended.returncode, ended.stderr)
    assert re.fullmatch(LINE.format("SIGTERM"), ended.stderr.strip())


@pytest.mark.parametrize(
    "error",
    [
        "RecursionError('maximum recursion depth exceeded')",
        "OSError('gone')",
        "emkum.errors.CorruptCache('a network holds no tensors', 'repair it')",
    ],
)
def test_a_signal_of_which_a_library_makes_an_error_of_its_own_is_still_a_signal(error: str, tmp_path: Path) -> None:
    """A library may fail of it in any way: it is no bug, no full disk, no damage."""
    app = """
def app(*args, **kwargs):
    try:
        send()
    except BaseException:
        raise {error}
"""
    assert_interrupted(meeting(app, tmp_path, error=error))


def test_a_signal_that_a_library_swallows_is_raised_again(tmp_path: Path) -> None:
    app = """
def app(*args, **kwargs):
    for _ in range(3):
        try:
            send() if _ == 0 else time.sleep(10)
        except BaseException:
            print("swallowed")
    WORK
"""
    ended = meeting(app, tmp_path)
    assert_interrupted(ended)
    assert ended.stdout == "swallowed\n" * 3


def test_a_signal_is_raised_once_while_what_it_stopped_is_put_in_order(tmp_path: Path) -> None:
    app = """
def app(*args, **kwargs):
    try:
        send()
    finally:
        time.sleep(1)
        print("in order")
"""
    ended = meeting(app, tmp_path)
    assert_interrupted(ended)
    assert ended.stdout == "in order\n"


@pytest.mark.parametrize("made", ["SystemExit(3)", "BrokenPipeError()"])
def test_a_signal_that_a_library_turns_into_an_end_of_its_own_is_said(made: str, tmp_path: Path) -> None:
    app = f"""
def app(*args, **kwargs):
    try:
        send()
    except BaseException:
        raise {made}
"""
    assert_interrupted(meeting(app, tmp_path))


def test_a_signal_in_a_destructor_is_raised_behind_it(tmp_path: Path) -> None:
    app = """
class Dying:
    def __del__(self):
        send()
def app(*args, **kwargs):
    Dying()
    WORK
"""
    assert_interrupted(meeting(app, tmp_path))


def test_a_signal_waits_for_the_end_of_an_import(tmp_path: Path) -> None:
    """Half imported, C++ libraries abort, and others are broken for whatever is still to be put in order."""
    (tmp_path / "half.py").write_text("import __main__\n__main__.send()\n__main__.time.sleep(0.5)\nprint('whole')\n")
    app = """
def app(*args, **kwargs):
    import half
    WORK
"""
    ended = meeting(app, tmp_path)
    assert_interrupted(ended)
    assert ended.stdout == "whole\n"


def test_a_signal_beside_the_command_itself_is_one_too(tmp_path: Path) -> None:
    assert_interrupted(meeting("app = None\nemkum.cli.run = lambda arguments: send()", tmp_path))
