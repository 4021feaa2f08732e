"""One SHA-256 of everything that is committed, whoever committed it, when, where and in what order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from emkum.errors import CorruptCache
from emkum.shards.block_check import stated_objects
from emkum.shards.layout import FORMAT, canonical_json, model_dir, object_path, segment_dir
from emkum.shards.ledger import without_digest
from emkum.shards.reader import Cache, Field
from emkum.shards.record_check import require_sound
from emkum.shards.store import Store, exists, sha256_of
from emkum.shards.strict_json import loads
from emkum.shards.writer import NETWORK_FILES

NETWORK_CONTENT = ("model.safetensors", "tokenizer.json")  # model.json also says where the weights came from
Stated = tuple[str, int, str]  # path, bytes, SHA-256


def digest(place: Store | Path | str, *, trust_receipts: bool = False, threads: int | None = None) -> str:
    """64 hex digits. docs/format.md, section 8, says of what.

    Every object is read and must have the SHA-256 that its record states, unless `trust_receipts`.
    Raises CorruptCache naming the first that has not, and what `Cache.open` raises.
    """
    cache = Cache.open(place)
    require_sound(cache)
    total = hashlib.sha256()
    total.update(_line({"format": FORMAT, "rows_per_block": cache.rows_per_block}))
    if not trust_receipts:
        _require_equal(cache.store, _all_stated(cache), threads)
    for segment in cache.segments:
        total.update(_line({"segment": segment.number, "digest": segment.digest}))
    for name, field in sorted(cache.fields.items()):
        total.update(_line(_field_content(field)))
        for (block, view), receipt in sorted(field.receipts.items()):
            content = {
                "field": name,
                "block": block,
                "view": view,
                "segment": receipt.segment,
                "rows": receipt.rows,
                "objects": sorted([o.path, o.bytes, o.sha256] for o in receipt.objects),
                "quarantined": [[q.row, q.tar, q.key, q.reason] for q in receipt.quarantined],
            }
            total.update(_line(content))
    for name in cache.models:
        total.update(_line({"network": name, "files": _network_content(cache.store, name, trust_receipts)}))
    return total.hexdigest()


def _line(content: dict[str, Any]) -> bytes:
    return canonical_json(content) + b"\n"


def _field_content(field: Field) -> dict[str, Any]:
    record = field.record
    return {key: record[key] for key in ("field", "kind", "arrays", "fingerprint_digest", "statistics")}


def _all_stated(cache: Cache) -> Iterator[Stated]:
    """Every object but the networks', as its record states it."""
    for segment in cache.segments:
        for name, sha256 in sorted(segment.parquet.items()):
            yield f"{segment_dir(segment.number)}/{name}", -1, sha256
    for field in cache.fields.values():
        for name, stated in sorted(field.record["statistics"].items()):
            yield object_path(field.spec, field.spec.array(name), 0, 0), stated["bytes"], stated["sha256"]
        for receipt in field.receipts.values():
            for committed in stated_objects(field.spec, receipt).values():
                yield committed.path, committed.bytes, committed.sha256


def _require_equal(store: Store, stated: Iterator[Stated], threads: int | None) -> None:
    def check(one: Stated) -> None:
        path, size, sha256 = one
        try:
            found_size, found = sha256_of(store, path)
        except FileNotFoundError as error:
            raise _corrupt(store, f"{store.where(path)} is missing") from error
        if found != sha256 or size not in (-1, found_size):
            raise _corrupt(store, f"{store.where(path)} does not have the bytes that its record states")

    with ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1)) as pool:
        for _ in pool.map(check, stated):
            pass


def _network_content(store: Store, name: str, trust_receipts: bool) -> list[list[Any]]:
    folder = model_dir(name)
    stated: dict[str, Any] = {}
    if exists(store, f"{folder}/{NETWORK_FILES}"):
        try:
            files = without_digest(loads(store.read(f"{folder}/{NETWORK_FILES}")))["files"]
            stated = {file: [file, files[file]["bytes"], files[file]["sha256"]] for file in files}
        except (ValueError, KeyError, TypeError) as error:
            raise _corrupt(store, f"{store.where(f'{folder}/{NETWORK_FILES}')} cannot be trusted: {error}") from error
    content = []
    for file in NETWORK_CONTENT:
        if trust_receipts and file in stated:
            content.append(stated[file])
            continue
        try:
            found = [file, *sha256_of(store, f"{folder}/{file}")]
        except FileNotFoundError:
            found = None
        if stated.get(file, found) != found:
            raise _corrupt(store, f"{store.where(f'{folder}/{file}')} does not have the bytes that its record states")
        if found is not None:
            content.append(found)
    return content


def _corrupt(store: Store, what: str) -> CorruptCache:
    return CorruptCache(what, f"see all that is damaged: emkum cache verify {store.url}")
