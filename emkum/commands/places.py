"""Where a cache lies, from what the user typed."""

from __future__ import annotations

import re
from pathlib import Path

from emkum.errors import UsageError


def cache_place(text: str) -> Path | str:
    """A folder, or the URL of one in an object store. Raises UsageError for what is neither."""
    from emkum.shards.store import is_url

    if text.startswith("memory:"):
        raise UsageError(f"{text} is gone when this command ends", "name a folder, or an object store")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)", text):
        raise UsageError(f"{text} is neither a folder nor a URL", "a URL has two slashes, as s3://bucket/folder")
    if not is_url(text) and Path(text).exists() and not Path(text).is_dir():
        raise UsageError(f"{text} is a file", "--cache names the folder of a cache")
    return text if is_url(text) else Path(text)
