"""`emkum extract` killed at random moments, again and again: what is committed stays, the same command goes on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from emkum.shards.claims import CLAIMS
from emkum.shards.digest import digest
from emkum.shards.ledger import read_receipt
from emkum.shards.reader import Cache
from emkum.shards.store import LocalStore
from emkum.shards.verify import verify
from tests.conftest import TORTURE_MINUTES
from tests.extraction import Extraction, Running, claims, content, make_pictures, save_teacher, temporaries

# Long form: 12 blocks of 64.3 MiB, killed 200 times in all. Short: 12 of 8 MiB, 8 times.
# A block is larger than all that is decoded ahead (4 batches) and queued for the disk (8 batches): so no more than
# two are in a process's hands, the one being written and the one being decoded. Of smaller blocks it may be more.
LONG = TORTURE_MINUTES > 0
ROWS_PER_BLOCK, BATCH = (1024, 32) if LONG else (128, 8)
BLOCKS, VIEWS = 3, 4
KILLS = int(os.environ.get("EMKUM_KILLS", "160" if LONG else "6"))
JOINED_KILLS = int(os.environ.get("EMKUM_JOINED_KILLS", "40" if LONG else "2"))
WORK_SECONDS = 1.5 if LONG else 0.3
SEED = int(os.environ.get("EMKUM_SEED", "0"))
TOKENS = "image/wide@0/tokens"


@dataclass
class Tally:
    """What the kills did."""

    kills: int = 0
    rounds: int = 0
    moments: dict[str, int] = field(default_factory=dict)
    claimed: list[int] = field(default_factory=list)  # blocks that a killed process had claimed and not committed
    partly: list[int] = field(default_factory=list)  # objects of blocks that it had begun to write

    def __str__(self) -> str:
        moments = ", ".join(f"{count} {moment}" for moment, count in sorted(self.moments.items()))
        lost = f"blocks claimed and lost per kill: {_mean(self.claimed)} (at most {max(self.claimed, default=0)})"
        begun = f"of these partly written: {_mean(self.partly)} (at most {max(self.partly, default=0)})"
        return f"{self.kills} kills in {self.rounds} extractions ({moments}); {lost}; {begun}"


def _mean(numbers: list[int]) -> str:
    return f"{sum(numbers) / max(len(numbers), 1):.2f}"


@dataclass
class Watch:
    """One cache while its writers are killed: nothing that was seen committed may ever change."""

    cache: Path
    seen: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # path -> inode, time, bytes

    def check(self, what: str) -> None:
        if not (self.cache / "zarr.json").exists():
            assert not self.seen, what
            return
        Cache.open(self.cache)
        report = verify(LocalStore(self.cache))
        assert not report.findings, (what, report.findings)
        store = LocalStore(self.cache)
        found = {}
        for path in sorted((self.cache / "_emkum" / "receipts").rglob("[0-9]*.json")):
            name = str(path.relative_to(self.cache))
            for listed in [name, *(one.path for one in read_receipt(store, name).objects)]:
                status = os.stat(self.cache / listed)
                found[listed] = status.st_ino, status.st_mtime_ns, status.st_size
        changed = [name for name, state in self.seen.items() if found.get(name) != state]
        assert not changed, f"{what}: committed, and written again: {changed}"
        self.seen = found

    def left_by(self, token: str) -> tuple[int, int]:
        """(blocks that the process had claimed and that still lack a receipt, blocks it had partly written)."""
        folder = self.cache / CLAIMS
        names = [name for name in claims(self.cache, "image-") if token in _text(folder / name)]
        blocks = {name.split(".")[0].removeprefix("image-") for name in names}
        fields = [path.parent for path in (self.cache / "_emkum" / "receipts").rglob("*.json")]
        done = {block for block in blocks if len(fields) and self.is_done(block)}
        partly = {path.name.split(f".{token}")[0] for path in temporaries(self.cache) if f".{token}." in path.name}
        places = {tuple(name.split(".")[2:4]) for name in partly if name.startswith(".c.")}  # (block, view)
        return len(blocks - done), len(places)

    def is_done(self, block: str) -> bool:
        fields = [
            p.relative_to(self.cache / "_emkum" / "fields") for p in (self.cache / "_emkum/fields").rglob("*.json")
        ]
        receipts = self.cache / "_emkum" / "receipts"
        return all((receipts / name.with_suffix("") / f"{block}.json").exists() for name in fields)


@pytest.fixture(scope="module")
def extraction(tmp_path_factory: pytest.TempPathFactory) -> Extraction:
    folder = tmp_path_factory.mktemp("source")
    make_pictures(folder / "a.tar", BLOCKS * ROWS_PER_BLOCK - 5)
    return Extraction(
        save_teacher(folder / "wide"), folder / "a.tar", ROWS_PER_BLOCK, VIEWS, ("--batch-size", str(BATCH))
    )


@pytest.fixture(scope="module")
def whole(extraction: Extraction, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of an uninterrupted run."""
    cache = tmp_path_factory.mktemp("whole") / "cache"
    extraction.finish(cache)
    objects = list(cache.glob(f"{TOKENS}/values/c.*"))
    assert len(objects) == BLOCKS * VIEWS
    assert not LONG or max(path.stat().st_size for path in objects) >= 64 * 2**20
    yield cache
    shutil.rmtree(cache)


def moment(draw: random.Random) -> tuple[str, float]:
    """What to wait for, and a number from 0 to 1 for how long after it the kill comes."""
    moments = ("start", "planning", "work", "object half written", "object in place", "receipt in place")
    return draw.choices(moments, (10, 10, 25, 20, 15, 20))[0], draw.random()


@dataclass
class Sign:
    """Tells when the moment has come, by what lies in the cache that was not there before."""

    cache: Path
    name: str
    part: float

    def __post_init__(self) -> None:
        self._claims, self._objects, self._receipts = claims(self.cache, ""), self._found("c."), self._found("0")
        self._bytes = self.part * ROWS_PER_BLOCK * 257 * 64 * 4

    def __call__(self) -> bool:
        if self.name in ("planning", "work"):
            prefix = "plan" if self.name == "planning" else "image-"
            return bool(claims(self.cache, prefix) - self._claims)
        if self.name == "object half written":
            sizes = [size for size in self._found(".c.").values() if size]
            return any(size >= self._bytes for size in sizes)
        if self.name == "object in place":
            return bool(self._found("c.").keys() - self._objects)
        return self.name == "start" or bool(self._found("0").keys() - self._receipts)

    @property
    def seconds(self) -> float:
        """From the sign to the kill."""
        longest = {"start": 3.0, "planning": 0.3, "work": WORK_SECONDS, "receipt in place": WORK_SECONDS / 2}
        return self.part * longest.get(self.name, 0.02)

    def _found(self, prefix: str) -> dict[str, int]:
        """Bytes of the big objects (c.), unfinished ones (.c.) or receipts (0) of the tokens."""
        folder = self.cache / (f"_emkum/receipts/{TOKENS}" if prefix == "0" else f"{TOKENS}/values")
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(folder):
                if entry.name.startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):
                        found[entry.name] = entry.stat().st_size
        return found


def kill_at(running: Running, sign: Sign) -> bool:
    """Kills the process group at this moment; False if the process ended by itself before."""
    if not running.wait_for(sign):
        return False
    deadline = time.monotonic() + sign.seconds
    while time.monotonic() < deadline and not running.ended():
        time.sleep(0.002)
    if running.ended():
        return False
    running.kill()
    return True


def token_of(cache: Path, pid: int) -> str | None:
    """The token that a process left in its claims; None if it had none yet."""
    for name in claims(cache, ""):
        record = json.loads(_text(cache / CLAIMS / name) or "{}")
        if record.get("pid") == pid:
            return str(record["token"])
    return None


def _text(path: Path) -> str:
    """Of a file that another process may remove."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def check_whole(cache: Path, whole: Path, what: str) -> None:
    assert digest(str(cache)) == digest(str(whole)), what
    expected, found = content(whole), content(cache)
    assert found.keys() == expected.keys(), what
    assert [name for name in expected if found[name] != expected[name]] == [], what
    assert temporaries(cache) == [], what
    assert claims(cache, "plan") == set(), what
    # A process that dies between the last receipt of a block and the release of its claim leaves the claim.
    assert all(Watch(cache).is_done(name.split(".")[0].removeprefix("image-")) for name in claims(cache, "image-"))


def record_kill(tally: Tally, watch: Watch, running: Running, name: str, what: str) -> None:
    tally.kills += 1
    tally.moments[name] = tally.moments.get(name, 0) + 1
    token = token_of(watch.cache, running.process.pid)
    claimed, partly = (0, 0) if token is None else watch.left_by(token)
    tally.claimed.append(claimed)
    tally.partly.append(partly)
    assert partly <= 1, f"{what}: {partly} blocks were partly written"
    assert claimed <= 2, f"{what}: {claimed} blocks were lost"  # the one being written, the one being decoded
    watch.check(what)


@pytest.mark.timeout(60 * 60)
def test_kills_at_random_moments_lose_nothing_that_is_committed(
    extraction: Extraction, whole: Path, tmp_path: Path
) -> None:
    tally = Tally()
    while tally.kills < KILLS:
        tally.rounds += 1
        cache, finished = tmp_path / f"cache{tally.rounds}", False
        watch = Watch(cache)
        draw = random.Random(f"{SEED}-{tally.rounds}")
        attempt = 0
        while not finished and tally.kills < KILLS:
            attempt += 1
            name, part = moment(draw)
            what = f"EMKUM_SEED={SEED} extraction {tally.rounds} attempt {attempt}: {name}, {part:.3f}"
            sign = Sign(cache, name, part)
            running = extraction.start(cache)
            if kill_at(running, sign):
                record_kill(tally, watch, running, name, what)
            else:
                assert running.wait() == 0, f"{what}\n{running.text()}"
                finished = True
        said = extraction.finish(cache)
        assert not finished or "nothing to do" in said, said
        watch.check("at the end")
        check_whole(cache, whole, f"EMKUM_SEED={SEED} extraction {tally.rounds}")
        shutil.rmtree(cache)
    print(f"\n{tally}")


@pytest.mark.timeout(60 * 60)
def test_one_of_two_that_share_the_work_is_killed_and_the_other_goes_on(
    extraction: Extraction, whole: Path, tmp_path: Path
) -> None:
    tally = Tally()
    while tally.kills < JOINED_KILLS:
        tally.rounds += 1
        cache = tmp_path / f"cache{tally.rounds}"
        watch = Watch(cache)
        draw = random.Random(f"{SEED}-joined-{tally.rounds}")
        started = [extraction.start(cache, "--join") for _ in range(2)]
        try:
            while tally.kills < JOINED_KILLS and not any(running.ended() for running in started):
                chosen = draw.randrange(2)
                name, part = moment(draw)
                what = f"EMKUM_SEED={SEED} joined extraction {tally.rounds} kill {tally.kills}: {name}, {part:.3f}"
                if not kill_at(started[chosen], Sign(cache, name, part)):
                    break
                record_kill(tally, watch, started[chosen], name, what)
                started[chosen] = extraction.start(cache, "--join")
            for running in started:
                assert running.wait() == 0, running.text()
        finally:
            for running in started:
                running.kill()
        extraction.finish(cache)
        watch.check("at the end")
        check_whole(cache, whole, f"EMKUM_SEED={SEED} joined extraction {tally.rounds}")
        shutil.rmtree(cache)
    print(f"\njoined: {tally}")
