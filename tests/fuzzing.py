"""How long a fuzz test runs: a few hundred repeatable examples, or new ones for EMKUM_FUZZ_MINUTES minutes each.

@until_time_is_up
@fuzz_settings(examples=300)
@given(...)
def test_...
"""

from __future__ import annotations

import functools
import os
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis
import pytest

MINUTES = float(os.environ.get("EMKUM_FUZZ_MINUTES") or 0)


def fuzz_settings(examples: int) -> hypothesis.settings:
    """The same `examples` in every run; with EMKUM_FUZZ_MINUTES, other ones each time."""
    # Phases: an error is shrunk, but never explained by tracing every line, which takes minutes.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.shrink)
    return hypothesis.settings(
        max_examples=examples,
        derandomize=not MINUTES,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def until_time_is_up(test: Callable[..., None]) -> Callable[..., None]:
    """Repeat a @given test, with new examples, for EMKUM_FUZZ_MINUTES; once when that is not set."""
    if not MINUTES:
        return test

    @functools.wraps(test)
    def repeated(*args: Any, **kwargs: Any) -> None:
        rounds, end = 0, time.monotonic() + 60 * MINUTES
        while not rounds or time.monotonic() < end:
            test(*args, **kwargs)
            rounds += 1
        print(f"{test.__name__}: {rounds} rounds in {MINUTES:g} minutes")

    return pytest.mark.timeout(60 * MINUTES + 600)(repeated)


@contextmanager
def memory_below(limit_bytes: int) -> Iterator[None]:
    """Fail when Python's allocations inside grow by more than `limit_bytes` at any time."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= limit_bytes, f"{peak} bytes were allocated at once; at most {limit_bytes} are allowed"
