"""Records that carry their own digest: fields, and receipts of committed blocks (docs/format.md, sections 4 and 6)."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from emkum.errors import CorruptCache
from emkum.shards.fingerprint import digest_of
from emkum.shards.layout import (
    MAX_VIEWS,
    RECORDS,
    canonical_json,
    field_from_record,
    field_record_path,
    pretty_json,
    receipt_path,
)
from emkum.shards.store import Store, read_small
from emkum.shards.strict_json import loads

REQUESTS_AT_A_TIME = 16
_RECEIPT_NAME = re.compile(r"([0-9]{6,})-[0-9]+\.json")


@dataclass(frozen=True)
class CommittedObject:
    """marks: of a shard, the number of some of its chunks and their crc32c: cheap proof that it is no other shard."""

    path: str  # from the root of the cache
    bytes: int
    sha256: str
    marks: tuple[tuple[int, int], ...] = ()


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


def write_receipt(store: Store, receipt: Receipt) -> bool:
    """The commit: after this the block exists. False if it has another receipt already, which stays."""
    return store.create(receipt_path(receipt.field, receipt.block, receipt.view), receipt_bytes(receipt))


def receipt_bytes(receipt: Receipt) -> bytes:
    return pretty_json(with_digest(_to_json(receipt)))


def require_fingerprint(store: Store, receipts: Iterable[Receipt], fingerprint_digest: str) -> None:
    """Raises CorruptCache for a receipt of a field that was computed otherwise."""
    for receipt in receipts:
        if receipt.fingerprint_digest != fingerprint_digest:
            raise CorruptCache(
                f"receipt of {receipt.field} block {receipt.block}-{receipt.view} belongs to fingerprint "
                f"{str(receipt.fingerprint_digest)[:12]}..., the field has {fingerprint_digest[:12]}...",
                f"`emkum cache repair {store.url}` drops it; the same extract command redoes its block",
            )


def receipt_names(store: Store, field: str) -> list[str]:
    """Paths of all receipts of a field."""
    folder = f"{RECORDS}/receipts/{field}"
    names = store.names(folder)
    return [f"{folder}/{name}" for name in sorted(names) if _RECEIPT_NAME.fullmatch(name)]


def receipt_fields(store: Store, folder: str = f"{RECORDS}/receipts") -> list[str]:
    """Names of all fields that have receipts, whether they have a record or not."""
    found = []
    names = store.names(folder)
    if any(_RECEIPT_NAME.fullmatch(name) for name in names):
        found.append(folder.removeprefix(f"{RECORDS}/receipts/"))
    for name in sorted(names):
        if not name.endswith((".json", ".tmp")) and not name.startswith("."):
            found += receipt_fields(store, f"{folder}/{name}")
    return found


def read_receipts(store: Store, field: str) -> dict[tuple[int, int], Receipt]:
    """All receipts of a field by (block, view). Raises CorruptCache for one that does not hold together."""
    paths = receipt_names(store, field)
    if store.local is None:  # every read is a request: many at a time
        with ThreadPoolExecutor(REQUESTS_AT_A_TIME) as pool:
            receipts = list(pool.map(lambda path: read_receipt(store, path), paths))
    else:
        receipts = [read_receipt(store, path) for path in paths]
    return {(receipt.block, receipt.view): receipt for receipt in receipts}


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
        "objects": [
            {"path": o.path, "bytes": o.bytes, "sha256": o.sha256}
            | ({"marks": [list(mark) for mark in o.marks]} if o.marks else {})
            for o in receipt.objects
        ],
        "statistics": receipt.statistics,
        "error": receipt.error,
        "quarantined": [{"row": q.row, "tar": q.tar, "key": q.key, "reason": q.reason} for q in receipt.quarantined],
    }


def last_block(store: Store, field: str) -> int:
    """The highest number of a block with a receipt, by the receipts' names; -1 if there is none."""
    names = store.names(f"{RECORDS}/receipts/{field}")
    return max((int(found[1]) for name in names if (found := _RECEIPT_NAME.fullmatch(name))), default=-1)


def read_receipt(store: Store, path: str) -> Receipt:
    """One receipt. Raises CorruptCache for one that does not hold together, or that bears another's name."""
    try:
        record = without_digest(loads(read_small(store, path)))
        receipt = Receipt(
            record["field"],
            record["block"],
            record["view"],
            record["segment"],
            record["first_row"],
            record["rows"],
            record["fingerprint_digest"],
            tuple(
                CommittedObject(o["path"], o["bytes"], o["sha256"], tuple((m[0], m[1]) for m in o.get("marks", ())))
                for o in record["objects"]
            ),
            record["statistics"],
            record["error"],
            tuple(Quarantined(q["row"], q["tar"], q["key"], q["reason"]) for q in record["quarantined"]),
        )
        _check_numbers(receipt)
        if path != receipt_path(receipt.field, receipt.block, receipt.view):
            raise ValueError(f"it is the receipt of {receipt.field} block {receipt.block}-{receipt.view}")
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CorruptCache(
            f"receipt {store.where(path)} cannot be trusted: {error}",
            f"`emkum cache repair {store.url}` drops it; the same extract command then redoes its block",
        ) from error
    return receipt


def _check_numbers(receipt: Receipt) -> None:
    numbers = [receipt.block, receipt.view, receipt.segment, receipt.first_row, receipt.rows]
    numbers += [o.bytes for o in receipt.objects] + [q.row for q in receipt.quarantined]
    numbers += [number for o in receipt.objects for mark in o.marks for number in mark]
    if any(type(number) is not int or not 0 <= number < 2**62 for number in numbers) or receipt.view >= MAX_VIEWS:
        raise ValueError("it holds numbers that cannot be")


def field_record_paths(store: Store, folder: str = f"{RECORDS}/fields") -> list[str]:
    """Paths of all field records, sorted. Unfinished writes are passed over."""
    found = []
    for name, size in sorted(store.list(folder).items()):
        path = f"{folder}/{name}"
        if size is None:
            found += field_record_paths(store, path)
        elif name.endswith(".json") and not name.startswith("."):
            found.append(path)
    return found


def read_field_records(store: Store) -> dict[str, dict[str, Any]]:
    """The records of all fields, by name. Raises as `read_field_record`."""
    records = (read_field_record(store, path) for path in field_record_paths(store))
    return {str(record["field"]): record for record in records}


def read_field_record(store: Store, path: str) -> dict[str, Any]:
    """A field's record. Raises CorruptCache for one that does not hold together."""
    try:
        record = without_digest(loads(read_small(store, path)))
        if digest_of(record["fingerprint"]) != record["fingerprint_digest"]:
            raise ValueError("its fingerprint has another digest than it states")
        field = field_from_record(record)
        if field_record_path(field.name) != path or posixpath.normpath(field.name) != field.name:
            raise ValueError(f"it is the record of {field.name!r}")
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CorruptCache(
            f"field record {store.where(path)} cannot be trusted: {error}",
            f"`emkum cache repair {store.url}` says what can be done",
        ) from error
    return record
