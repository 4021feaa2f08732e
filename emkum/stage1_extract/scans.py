"""Remembers which tars were scanned, by size and time, so that the same command again need not read them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from emkum.shards.layout import RECORDS, pretty_json
from emkum.shards.ledger import with_digest, without_digest
from emkum.shards.segments import Segment
from emkum.shards.store import Store
from emkum.shards.strict_json import loads
from emkum.shards.tars import OnTruncated, SourceTar, scan_tars

SCANS = f"{RECORDS}/hints/scans.json"


class ScanMemory:
    """A hint kept beside the cache's records; losing it costs one scan.

    A tar counts as unchanged if path, size, modification and status-change times are those of the scan, and a
    segment of the cache still has the digest that the scan found.
    """

    def __init__(self, store: Store, on_truncated: OnTruncated = "error", allow_missing_eof: bool = False) -> None:
        self._store, self._on_truncated, self._allow_missing_eof = store, on_truncated, allow_missing_eof
        self._entries: dict[str, list[int | str]] = {}
        self._before: dict[str, list[int | str]] = {}
        self._known: set[tuple[str, str]] = set()
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            self._entries = dict(without_digest(loads(store.read(SCANS)))["scans"])

    def know(self, segments: Sequence[Segment]) -> None:
        """The segments of the cache: only tars that one of them holds can be unchanged."""
        self._known = {(s.tar, s.sha256) for segment in segments for s in segment.sources}

    def unchanged(self, path: str) -> bool:
        entry = self._entries.get(os.path.abspath(path))
        if not isinstance(entry, list) or len(entry) != 5:  # 4: of a scan that did not look for sounds
            return False
        return entry[:3] == _stat(path) and (os.path.basename(path), entry[3]) in self._known

    def num_sounds(self, path: str) -> int:
        """Of a tar that is unchanged."""
        return int(self._entries[os.path.abspath(path)][4])

    def scan(self, paths: Sequence[str]) -> list[SourceTar]:
        """Scans tars, noting their times from before they were read."""
        for path in paths:
            self._before[os.path.abspath(path)] = _stat(path)
        return scan_tars(paths, on_truncated=self._on_truncated, allow_missing_eof=self._allow_missing_eof)

    def remember(self, tars: Sequence[SourceTar]) -> None:
        """Keeps what `scan` found, once its segment is committed."""
        for tar in tars:
            path = os.path.abspath(tar.path)
            num_sounds = sum(sample.sound is not None for sample in tar.samples)
            self._entries[path] = [*self._before[path], tar.sha256, num_sounds]
        if tars:
            self._store.write(SCANS, pretty_json(with_digest({"scans": self._entries})))


def _stat(path: str) -> list[int | str]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
