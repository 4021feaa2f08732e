"""What may be named as --cache: folders and object stores, not files, slips, or memory that is gone at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from emkum.cli import run


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("memory://x", "memory://x is gone when this command ends"),
        ("s3:/bucket/x", "s3:/bucket/x is neither a folder nor a URL"),
        ("{file}", "is a file"),
    ],
)
def test_a_place_that_cannot_hold_a_cache_is_refused_at_once(
    place: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    place = place.format(file=tmp_path / "file")
    assert run(["extract", "--teacher", "nobody", "--data", str(tmp_path), "--cache", place]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (Path.cwd() / "s3:").exists()
