"""Records that carry their own digest: fields, and receipts of committed blocks (docs/format.md, sections 4 and 6)."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emkum.errors import CorruptCache
from emkum.shards.durable import write_file
from emkum.shards.fingerprint import digest_of
from emkum.shards.layout import RECORDS, canonical_json, field_from_record, pretty_json, receipt_path


@dataclass(frozen=True)
class CommittedObject:
    path: str  # from the root of the cache
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Quarantined:
    """A row left out because its source could not be used, and why."""

    row: int
    tar: str
    key: str
    reason: str


@dataclass(frozen=True)
class Receipt:
    field: str
    block: int
    view: int
    segment: int
    first_row: int
    rows: int
    fingerprint_digest: str
    objects: tuple[CommittedObject, ...]
    statistics: dict[str, float] | None
    error: dict[str, float] | None
    quarantined: tuple[Quarantined, ...]


def write_receipt(root: Path, receipt: Receipt) -> None:
    """The commit: after this the block exists."""
    path = root / receipt_path(receipt.field, receipt.block, receipt.view)
    write_file(path, pretty_json(with_digest(_to_json(receipt))))


def read_receipts(root: Path, field: str) -> dict[tuple[int, int], Receipt]:
    """All receipts of a field by (block, view). Raises CorruptCache for one that does not hold together."""
    folder = root / RECORDS / "receipts" / field
    found = {}
    if folder.is_dir():
        for path in sorted(p for p in folder.iterdir() if re.fullmatch(r"[0-9]{6,}-[0-9]+\.json", p.name)):
            receipt = _read_receipt(path)
            if path != root / receipt_path(receipt.field, receipt.block, receipt.view) or receipt.field != field:
                raise CorruptCache(
                    f"{path} is the receipt of {receipt.field} block {receipt.block}-{receipt.view}",
                    "delete this one file; the next extract redoes its block",
                )
            found[receipt.block, receipt.view] = receipt
    return found


def with_digest(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its own digest under `digest`."""
    return record | {"digest": hashlib.sha256(canonical_json(record)).hexdigest()}


def without_digest(record: Any) -> dict[str, Any]:
    """The record without its `digest`. Raises ValueError if that is not the digest of the rest."""
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    content = {key: value for key, value in record.items() if key != "digest"}
    actual = hashlib.sha256(canonical_json(content)).hexdigest()
    if actual != record.get("digest"):
        stated = str(record.get("digest"))[:12]
        raise ValueError(f"it was altered: its digest is {actual[:12]}..., it states {stated}...")
    return content


def _to_json(receipt: Receipt) -> dict[str, Any]:
    return {
        "field": receipt.field,
        "block": receipt.block,
        "view": receipt.view,
        "segment": receipt.segment,
        "first_row": receipt.first_row,
        "rows": receipt.rows,
        "fingerprint_digest": receipt.fingerprint_digest,
        "objects": [{"path": o.path, "bytes": o.bytes, "sha256": o.sha256} for o in receipt.objects],
        "statistics": receipt.statistics,
        "error": receipt.error,
        "quarantined": [{"row": q.row, "tar": q.tar, "key": q.key, "reason": q.reason} for q in receipt.quarantined],
    }


def _read_receipt(path: Path) -> Receipt:
    try:
        record = without_digest(json.loads(path.read_bytes()))
        return Receipt(
            record["field"],
            record["block"],
            record["view"],
            record["segment"],
            record["first_row"],
            record["rows"],
            record["fingerprint_digest"],
            tuple(CommittedObject(o["path"], o["bytes"], o["sha256"]) for o in record["objects"]),
            record["statistics"],
            record["error"],
            tuple(Quarantined(q["row"], q["tar"], q["key"], q["reason"]) for q in record["quarantined"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCache(
            f"receipt {path} cannot be trusted: {error}", "delete this one file; the next extract redoes its block"
        ) from error


def read_field_record(path: Path) -> dict[str, Any]:
    """A field's record. Raises CorruptCache for one that does not hold together."""
    try:
        record = without_digest(json.loads(path.read_bytes()))
        if digest_of(record["fingerprint"]) != record["fingerprint_digest"]:
            raise ValueError("its fingerprint has another digest than it states")
        field_from_record(record)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCache(
            f"field record {path} cannot be trusted: {error}", "restore it from a copy of the cache"
        ) from error
    return record
