"""Fixtures shared by all tests: where real data lies, and quiet threads on small machines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# `make torture` sets it: tests that have a long form run it.
TORTURE_MINUTES = float(os.environ.get("EMKUM_TORTURE_MINUTES", "0"))
SHARED = Path(os.environ.get("EMKUM_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture
def small_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small doubles under the names of released files count as these, though their measures are others."""
    from emkum.models import supervision

    monkeypatch.setattr(supervision, "misfit", lambda entry, spec: "")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and weights; tests that need it are marked `real`."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"real data not found at {SHARED}; set EMKUM_SHARED to the folder that holds data/ and weights/")
    return SHARED
