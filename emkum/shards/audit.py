"""What a cache holds and what it lacks, for people and for machines."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from emkum.errors import UsageError
from emkum.shards.durable import write_file
from emkum.shards.layout import FORMAT, Space
from emkum.shards.reader import Cache, Field
from emkum.shards.record_check import require_sound
from emkum.shards.repair import Repair
from emkum.shards.statistics.kept import STATISTICS, kept
from emkum.shards.store import Store
from emkum.shards.verify import Finding, Report, first_rows, sample_keys

MAX_SHOWN = 8  # rows and samples of one finding, and quarantined samples, on a screen


def describe(cache: Cache) -> dict[str, Any]:
    """Everything `emkum cache info` shows, as JSON-able values. Bytes are those of committed objects."""
    require_sound(cache)
    splits = {}
    for split in cache.splits:
        segments = [s for s in cache.segments if s.split == split]
        splits[split] = {
            "segments": len(segments),
            "tars": sum(len(s.sources) for s in segments),
            "pictures": sum(s.image.rows for s in segments),
            "captions": sum(s.text.rows for s in segments),
            **({"sounds": sounds} if (sounds := sum(s.audio.rows for s in segments)) else {}),
            "truncated": [{"tar": x.tar, "byte": x.truncated} for s in segments for x in s.sources if x.truncated],
            "views": next((s.views.name for s in segments if s.image.rows), None),
        }
    fields = {name: _describe_field(cache, field) for name, field in cache.fields.items()}
    return {
        "path": str(cache.path),
        "uuid": cache.uuid,
        "format": FORMAT,
        "rows_per_block": cache.rows_per_block,
        "splits": splits,
        "fields": fields,
        "quarantined": _quarantined(cache),
        "models": cache.models,
        "statistics": [{"name": one.request.name, "stale": one.stale} for one in kept(cache)],
        "bytes": sum(field["bytes"] for field in fields.values()),
        "complete": not any(field["missing_blocks"] for field in fields.values()),
    }


def _quarantined(cache: Cache) -> list[dict[str, str]]:
    """The samples left out of any field, each once, with the reason."""
    found = {
        (q.tar, q.key): q.reason
        for field in cache.fields.values()
        for receipt in field.receipts.values()
        for q in receipt.quarantined
    }
    return [{"tar": tar, "key": key, "reason": reason} for (tar, key), reason in sorted(found.items())]


def _describe_field(cache: Cache, field: Field) -> dict[str, Any]:
    rows = {split: len(field.rows(split)) for split in cache.splits}
    missing = {split: len(field.missing(split)) for split in cache.splits}
    reasons: Counter[str] = Counter()
    for receipt in field.receipts.values():
        reasons.update(q.reason for q in receipt.quarantined)
    errors = [r.error["relative_l2"] for r in field.receipts.values() if r.error]
    worst = [r.error["max_abs"] for r in field.receipts.values() if r.error]
    return {
        "kind": field.kind,
        "storage": field.storage,
        "row_shape": list(field.row_shape),
        "views": field.num_views,
        "rows": {split: count for split, count in rows.items() if count},
        "bytes": field.num_bytes,
        "missing_blocks": sum(missing.values()),
        "missing": {split: count for split, count in missing.items() if count},
        "quarantined": dict(reasons),
        "relative_l2_error": sum(errors) / len(errors) if errors else None,
        "max_abs_error": max(worst) if worst else None,
        "fingerprint_digest": field.record["fingerprint_digest"],
        "fingerprint": field.fingerprint,
        "environment": field.record["environment"],
    }


def table(description: dict[str, Any]) -> str:
    """The description as lines for a screen."""
    lines = [
        f"{description['path']}: format {description['format']}, {readable_bytes(description['bytes'])}, "
        f"blocks of {description['rows_per_block']} rows, uuid {description['uuid']}"
    ]
    for split, s in description["splits"].items():
        lines.append(
            f"split {split}: {s['pictures']:,} pictures, {s['captions']:,} captions, "
            + (f"{s['sounds']:,} sounds, " if "sounds" in s else "")
            + f"{s['tars']} tars "
            f"in {s['segments']} segments" + (f", views {s['views']}" if s["views"] else "")
        )
        lines += [f"  {t['tar']} was cut off at byte {t['byte']:,}: its whole samples are in" for t in s["truncated"]]
    if not description["splits"]:
        lines.append("no segment yet: nothing was extracted")
    header = ("field", "rows", "row", "stored as", "bytes", "error", "fingerprint", "missing")
    rows = [header]
    for name, field in description["fields"].items():
        rows.append(
            (
                name,
                " ".join(f"{split} {count:,}" for split, count in field["rows"].items()) or "none",
                " x ".join(map(str, field["row_shape"])) + (f" x {field['views']} views" if field["views"] > 1 else ""),
                field["storage"],
                readable_bytes(field["bytes"]),
                "exact" if field["relative_l2_error"] is None else f"{field['relative_l2_error']:.1e}",
                field["fingerprint_digest"][:12],
                f"{field['missing_blocks']} blocks" if field["missing_blocks"] else "-",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    quarantined = description["quarantined"]
    lines += [f"quarantined {q['tar']}/{q['key']}: {q['reason']}" for q in quarantined[:10]]
    if len(quarantined) > 10:
        lines.append(f"and {len(quarantined) - 10} more: --json lists all")
    if description["splits"] and not description["fields"]:
        lines.append("nothing was extracted yet: run the `emkum extract` command again")
    lines.append(f"networks kept: {', '.join(description['models']) or 'none'}")
    lines += [
        f"statistic {one['name']}" + (f": STALE, it {one['stale']}" if one["stale"] else "")
        for one in description["statistics"]
    ]
    if not description["complete"]:
        lines.append("incomplete: the `emkum extract` command of the split finishes it")
    return "\n".join(map(printable, lines))


def readable_bytes(size: float) -> str:
    """1234567 -> "1.2 MB", in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


# --- what verify found -----------------------------------------------------------------------------------


def report_json(store: Store, report: Report) -> dict[str, Any]:
    """All of a report; of every finding all rows, and the (tar, key) of each."""
    return {
        "path": report.url,
        "sealed": report.sealed,
        "checked": {
            "segments": report.segments,
            "fields": report.fields,
            "blocks": report.blocks,
            "objects": report.objects,
            "bytes": report.bytes,
            "networks": report.networks,
            "statistics": report.statistics,
        },
        "findings": _findings_json(store, report.findings),
        "incomplete": dict(report.incomplete),
        "notes": list(report.notes),
    }


def _findings_json(store: Store, findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [_finding_json(*one) for one in zip(findings, sample_keys(store, findings), strict=True)]


def _finding_json(finding: Finding, samples: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {
        "path": finding.path,
        "what": finding.what,
        "way_out": finding.way_out,
        "repairable": finding.repairable,
        "field": finding.field,
        "block": finding.block,
        "view": finding.view,
        "segment": finding.segment,
        "space": finding.space,
        "rows": list(finding.row_numbers()),
        "samples": [list(sample) for sample in samples],
    }


def report_table(store: Store, report: Report) -> str:
    """The report as lines for a screen."""
    lines = [
        f"{report.url}: checked {report.objects:,} objects of {report.blocks:,} blocks, "
        f"{readable_bytes(report.bytes)}; {report.segments} segments, {report.fields} fields, "
        f"{report.networks} networks" + (f", {report.statistics} statistics" if report.statistics else "")
    ]
    samples = sample_keys(store, [first_rows(finding, MAX_SHOWN) for finding in report.findings])
    for finding, shown in zip(report.findings, samples, strict=True):
        lines.append(f"DAMAGED {finding.path}: {finding.what}")
        if finding.rows:
            lines.append(f"    {_rows_line(finding, shown)}")
        lines.append(f"    {finding.way_out}")
    for name, count in report.incomplete.items():
        lines.append(f"incomplete: {name} lacks {count:,} blocks; the `emkum extract` command of the split adds them")
    lines += [f"note: {note}" for note in report.notes]
    if not report.findings:
        lines.append("no damage")
    return "\n".join(map(printable, lines))


def _rows_line(finding: Finding, shown: Sequence[tuple[str, str]]) -> str:
    runs = [str(first) if end == first + 1 else f"{first} to {end - 1}" for first, end in finding.rows]
    samples = [f"{tar}/{key}" for tar, key in shown]
    more = finding.num_rows - len(samples)
    return (
        f"{finding.space} {'row' if finding.num_rows == 1 else 'rows'} {', '.join(runs[:MAX_SHOWN])}"
        + (", ..." if len(runs) > MAX_SHOWN else "")
        + (f": {', '.join(samples)}" if samples else "")
        + (f" and {more:,} more: --json lists all" if samples and more else "")
    )


def printable(line: str) -> str:
    """The line without what could move a terminal's cursor: names come from the data."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def repair_json(store: Store, done: Repair) -> dict[str, Any]:
    return {
        "path": done.report.url,
        "removed": list(done.removed),
        "written_again": list(done.rewritten),
        "findings": _findings_json(store, done.report.findings),
        "left": [finding.path for finding in done.left],
        "redo": redone_blocks(done.report),
    }


def repair_table(done: Repair, dry_run: bool) -> str:
    """What was repaired, what was not, and the next command, as lines for a screen."""
    report, would = done.report, "would be " if dry_run else ""
    lines = [f"LEFT {finding.path}: {finding.what}\n    {finding.way_out}" for finding in done.left]
    if not report.findings:
        lines.append(f"{report.url}: no damage, nothing to repair")
    else:
        repaired = len(report.findings) - len(done.left)
        lines.append(
            f"{report.url}: {repaired} of {len(report.findings)} findings {would}repaired; "
            f"{len(done.removed)} files {would}removed, {len(done.rewritten)} {would}written again"
        )
        for name, count in redone_blocks(report).items():
            lines.append(f"to be redone: {name}, {count} {'block' if count == 1 else 'blocks'}")
        lost = [finding for finding in report.findings if finding.repairable and not finding.rewrite]
        if any(finding.path.startswith(f"{STATISTICS}/") for finding in lost):
            lines.append("next: the same `emkum cache stats` commands again, for the statistics that were removed")
        if any(not finding.path.startswith(f"{STATISTICS}/") for finding in lost):
            splits = f" of split {', '.join(report.splits)}" if report.splits else ""
            lines.append(f"next: the same `emkum extract` command{splits} again; it redoes that and nothing else")
    return "\n".join(printable(part) for line in lines for part in line.split("\n"))


def redone_blocks(report: Report) -> dict[str, int]:
    """Field -> its blocks that the next extract computes again."""
    blocks = {(f.field, f.block, f.view) for f in report.findings if f.field and f.block is not None and f.repairable}
    return dict(sorted(Counter(name for name, _, _ in blocks if name).items()))


# --- samples that were left out --------------------------------------------------------------------------


@dataclass(frozen=True)
class LeftOut:
    """A row that fields lack because its source could not be used.

    offset, size: of the picture or sound in the tar, in bytes.
    """

    split: str
    tar: str
    key: str
    space: Space
    row: int
    reason: str
    fields: tuple[str, ...]
    offset: int | None
    size: int | None


def left_out(cache: Cache) -> list[LeftOut]:
    """Every quarantined row, once for each reason, in the order of the splits, spaces and rows."""
    require_sound(cache)
    fields: dict[tuple[str, Space, int, str, str, str], set[str]] = defaultdict(set)
    for field in cache.fields.values():
        for receipt in field.receipts.values():
            split = cache.segments[receipt.segment].split
            for q in receipt.quarantined:
                fields[split, field.spec.space, q.row, q.tar, q.key, q.reason].add(field.name)
    rows: dict[tuple[str, Space], list[int]] = defaultdict(list)
    for split, space, row, *_ in fields:
        if space != "text":
            rows[split, space].append(row)
    places = {(s, row): p for (split, s), here in rows.items() for row, p in _places(cache, split, s, here).items()}
    order = {split: number for number, split in enumerate(cache.splits)}
    found = []
    for split, space, row, tar, key, reason in sorted(fields, key=lambda one: (order[one[0]], *one[1:])):
        names = tuple(sorted(fields[split, space, row, tar, key, reason]))
        offset, size = places.get((space, row), (None, None))
        found.append(LeftOut(split, tar, key, space, row, reason, names, offset, size))
    return found


def _places(cache: Cache, split: str, space: Space, rows: Sequence[int]) -> dict[int, tuple[int, int]]:
    """row -> (offset, size) of the picture or sound in its tar."""
    table = cache.samples(split) if space == "image" else cache.sounds(split)
    table = table.filter(pc.is_in(table[f"{space}_row"], pa.array(rows, pa.int64())))
    lists = (table[name].to_pylist() for name in (f"{space}_row", "offset", "size"))
    return {row: (offset, size) for row, offset, size in zip(*lists, strict=True)}


def left_out_table(samples: Sequence[LeftOut]) -> str:
    """The samples as lines for a screen, with counts by reason."""
    lines = []
    for s in samples:
        place = f", byte {s.offset:,}, {s.size:,} bytes" if s.offset is not None else ""
        lines.append(f"{s.split} {s.space} row {s.row}: {s.tar}/{s.key}{place}: {s.reason} ({', '.join(s.fields)})")
    reasons = Counter(s.reason for s in samples)
    lines += [f"{count:,} x {reason}" for reason, count in reasons.most_common()]
    lines.append(f"{len(samples):,} quarantined")
    return "\n".join(map(printable, lines))


def left_out_json(samples: Sequence[LeftOut]) -> dict[str, Any]:
    reasons = Counter(s.reason for s in samples)
    return {"quarantined": [dataclasses.asdict(s) for s in samples], "reasons": dict(reasons.most_common())}


def export_left_out(samples: Sequence[LeftOut], path: Path) -> None:
    """Writes the list as .csv, .json or .parquet. Raises UsageError for another ending, and StorageFailure."""
    rows = [dataclasses.asdict(s) for s in samples]
    if path.suffix == ".json":
        data = (json.dumps(left_out_json(samples), indent=1) + "\n").encode()
    elif path.suffix == ".csv":
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, [field.name for field in dataclasses.fields(LeftOut)])
        table.writeheader()
        table.writerows(row | {"fields": " ".join(row["fields"])} for row in rows)
        data = text.getvalue().encode()
    elif path.suffix == ".parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, _LEFT_OUT), sink, write_page_checksum=True)
        data = sink.getvalue()
    else:
        raise UsageError(f"{path} ends in none of .csv, .json, .parquet", "name the file so: --out quarantine.csv")
    write_file(path, data)


_LEFT_OUT = pa.schema(
    [(name, pa.string()) for name in ("split", "tar", "key", "space")]
    + [("row", pa.int64()), ("reason", pa.string()), ("fields", pa.list_(pa.string()))]
    + [("offset", pa.int64()), ("size", pa.int64())]
)
