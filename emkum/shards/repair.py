"""Undoes damage: drops what the next extract must redo, and writes again what the records already say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from emkum.shards.claims import Claims
from emkum.shards.layout import RECORDS
from emkum.shards.store import Store
from emkum.shards.verify import Finding, Progress, Report, verify
from emkum.shards.writer import read_root


@dataclass(frozen=True)
class Repair:
    """What `repair` did, or with dry_run would do. left: findings that nothing here can undo."""

    report: Report
    removed: tuple[str, ...]
    rewritten: tuple[str, ...]
    left: tuple[Finding, ...]


def repair(
    store: Store,
    *,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda line: None,
    threads: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Repair:
    """Verifies, then removes the receipts and objects of bad blocks, and nothing that is whole.

    Alone with the cache: raises AnotherWriter beside a living extraction. Whatever moment it is stopped at, the same
    command goes on. say: a line for every object removed or written.
    """
    with contextlib.ExitStack() as held:
        if RECORDS not in store.list(""):
            read_root(store)  # before a claim is written into a folder that is no cache
        if not dry_run:
            held.enter_context(held.enter_context(Claims(store)).planning(join=False, say=say))
        report = verify(store, threads=threads, progress=progress)
        # A receipt comes before its objects: a block that is half removed is found, and removed, again.
        drop = list(dict.fromkeys(path for finding in report.findings for path in finding.drop))
        rewrite = {path: data for finding in report.findings for path, data in finding.rewrite}
        would = "would be " if dry_run else ""
        for path in drop:
            if not dry_run:
                store.remove(path)
            say(f"{would}removed: {path}")
        for path, data in rewrite.items():
            if not dry_run:
                store.write(path, data)
            say(f"{would}written again: {path}")
    left = tuple(finding for finding in report.findings if not finding.repairable)
    return Repair(report, tuple(drop), tuple(rewrite), left)
