"""Remembers which tars were scanned, by size and time, so that the same command again need not read them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from emkum.shards.durable import write_file
from emkum.shards.layout import RECORDS, pretty_json
from emkum.shards.segments import read_segments
from emkum.shards.tars import SourceTar, scan_tars


class ScanMemory:
    """A hint kept beside the cache's records; losing it costs one scan.

    A tar counts as unchanged if path, size, modification and status-change times are those of the scan, and a
    segment of the cache still has the digest that the scan found.
    """

    def __init__(self, cache: Path | str) -> None:
        self._path = Path(cache) / RECORDS / "hints" / "scans.json"
        self._entries: dict[str, list[int | str]] = {}
        self._before: dict[str, list[int | str]] = {}
        with contextlib.suppress(OSError, ValueError):
            entries = json.loads(self._path.read_bytes())
            if isinstance(entries, dict):
                self._entries = entries
        known: set[tuple[str, str]] = set()
        if self._entries:
            known = {(s.tar, s.sha256) for segment in read_segments(Path(cache)) for s in segment.sources}
        self._known = known

    def unchanged(self, path: str) -> bool:
        entry = self._entries.get(os.path.abspath(path))
        if not isinstance(entry, list) or len(entry) != 4:
            return False
        return entry[:3] == _stat(path) and (os.path.basename(path), entry[3]) in self._known

    def scan(self, paths: Sequence[str]) -> list[SourceTar]:
        """Scans tars, noting their times from before they were read."""
        for path in paths:
            self._before[os.path.abspath(path)] = _stat(path)
        return scan_tars(paths)

    def remember(self, tars: Sequence[SourceTar]) -> None:
        """Keeps what `scan` found, once its segment is committed."""
        for tar in tars:
            path = os.path.abspath(tar.path)
            self._entries[path] = [*self._before[path], tar.sha256]
        if tars:
            write_file(self._path, pretty_json(self._entries))


def _stat(path: str) -> list[int | str]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
