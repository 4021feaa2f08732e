"""What a cache holds and what it lacks, for people and for machines."""

from __future__ import annotations

from collections import Counter
from typing import Any

from emkum.shards.layout import FORMAT
from emkum.shards.reader import Cache, Field


def describe(cache: Cache) -> dict[str, Any]:
    """Everything `emkum cache info` shows, as JSON-able values. Bytes are those of committed objects."""
    splits = {}
    for split in cache.splits:
        segments = [s for s in cache.segments if s.split == split]
        splits[split] = {
            "segments": len(segments),
            "tars": sum(len(s.sources) for s in segments),
            "pictures": sum(s.image.rows for s in segments),
            "captions": sum(s.text.rows for s in segments),
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
            f"split {split}: {s['pictures']:,} pictures, {s['captions']:,} captions, {s['tars']} tars "
            f"in {s['segments']} segments" + (f", views {s['views']}" if s["views"] else "")
        )
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
    if not description["complete"]:
        lines.append("incomplete: the `emkum extract` command of the split finishes it")
    return "\n".join(lines)


def readable_bytes(size: float) -> str:
    """1234567 -> "1.2 MB", in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
