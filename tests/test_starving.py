"""A run whose steps wait for their batches says so once, with figures and the flag to change."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_accumulate import configured, run
from tiny_cache import TinyCache, make_cache

from emkum.stage2_train import starving
from emkum.stage2_train.loader import CachedSource
from emkum.stage2_train.starving import Delivered, Setting, Watch, warning

SETTING = Setting(threads=8, prefetch=3, shuffle="rows", storage="float16", live=False, cores=4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    return make_cache(tmp_path_factory.mktemp("starving") / "cache", pictures=40, cut=1)


def after(seconds: float, waited: float, read: float = 0.0, busy: float = 0.0) -> Delivered:
    """100 rows of 0.3 MB a second."""
    return Delivered(seconds, waited, read, busy, int(100 * seconds), int(30e6 * seconds))


def test_the_warning_names_steps_figures_cause_and_flag() -> None:
    assert warning(after(20, 5, read=150, busy=15), SETTING, 11, 60) == (
        "warning: steps 11 to 60 waited for data 25 % of the time; the loader gave 100 rows/s, 30.0 MB/s. Its threads "
        "(8) waited for storage: 10 % of the reading on a processor, 90 % on storage. To change it: --threads 16; or "
        "--shuffle blocks, in a new run, on a hard disk or network volume; or fewer bytes a row: extract with "
        "--storage int8, or with "
        "--store-inputs crops"
    )


@pytest.mark.parametrize(
    ("found", "changes", "did", "change"),
    [
        ((600, 30), {"threads": 32, "shuffle": "blocks"}, "waited for storage", "fewer bytes a row: extract with"),
        ((150, 15), {"storage": "int8"}, "waited for storage", "a row: extract at a smaller --size"),
        ((40, 36), {}, "read 25 % of the time, 90 % of the reading on a processor", "read further ahead: --prefetch 6"),
        ((150, 100), {}, "were on 5.0 of 4 processors", "fewer bytes a row: extract with --storage int8, or with"),
        ((38, 36), {"threads": 2}, "were on 1.8 of 4 processors", "--threads 4"),
        ((150, 65), {}, "were on 3.2 of 4 processors, 43 % of the reading", "fewer bytes a row"),
        ((150, 150), {"live": True}, "were decoding pictures", "train from the cache, without --live"),
    ],
)
def test_the_flag_depends_on_what_the_threads_did(
    found: tuple[float, float], changes: dict[str, Any], did: str, change: str
) -> None:
    line = warning(after(20, 5, *found), replace(SETTING, **changes), 11, 60)
    assert f"Its threads ({changes.get('threads', 8)}) {did}" in line
    assert change in line.split("To change it: ")[1]


def test_it_comes_once_and_not_of_the_first_steps() -> None:
    watch = Watch(lambda: SETTING, 100)
    said = [watch.look(100 + step, after(step, 0.9 * step)) for step in range(1, 200)]
    assert [100 + step for step, line in enumerate(said, 1) if line] == [160]
    assert said[59].startswith("warning: steps 111 to 160 waited for data 90 %")


def test_a_run_that_fills_its_ring_and_then_never_waits_is_left_alone() -> None:
    watch = Watch(lambda: SETTING, 0)
    assert not any(watch.look(step, after(step, 9.0)) for step in range(1, 300))
    late = Watch(lambda: SETTING, 0)
    said = [late.look(step, after(step, max(0, step - 110))) for step in range(1, 300)]
    assert [step for step, line in enumerate(said, 1) if line] == [160]  # its last 50, not the mean of all


def test_the_line_of_a_step_says_what_it_waited_for() -> None:
    assert after(10, 0.04).in_words() == "waits for data 0 %"
    assert after(10, 1.2, read=20, busy=2).in_words() == "waits for data 12 % (storage)"
    assert after(10, 1.2, read=20, busy=18).in_words() == "waits for data 12 % (processor)"


def test_a_run_on_slow_storage_says_so(cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = CachedSource.read

    def slow(self: CachedSource, *args: Any) -> Any:
        time.sleep(0.05)
        return read(self, *args)

    monkeypatch.setattr(CachedSource, "read", slow)
    monkeypatch.setattr(starving, "FIRST_STEPS", 2)
    monkeypatch.setattr(starving, "WATCHED_STEPS", 5)
    lines = run(replace(configured(cache, tmp_path / "run", "image-kd", "training.batch=8"), threads=1))
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert re.match(
        r"warning: steps 3 to 7 waited for data \d+ % of the time; the loader gave [\d,]+ rows/s", warnings[0]
    )
