"""Statistics kept in a cache, `statistics/<field>/<name>`: Zarr arrays beside a record that is written last."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np

from emkum.errors import CorruptCache, MissingStatistic, StaleStatistic, StorageFailure, UsageError
from emkum.shards.claims import Claims
from emkum.shards.fingerprint import digest_of
from emkum.shards.layout import ArraySpec, FieldSpec, array_metadata, group_metadata, pretty_json
from emkum.shards.ledger import with_digest, without_digest
from emkum.shards.reader import Cache
from emkum.shards.statistics.request import StatisticRequest, request_from
from emkum.shards.store import Store, read_small
from emkum.shards.strict_json import loads

STATISTICS = "statistics"
RECORD = "record.json"
_GROUP = "zarr.json"
_NO_FIELD = FieldSpec("statistics", "pooled", "float32", (1,))  # of which an array without rows takes nothing


@dataclass(frozen=True)
class Statistic:
    """arrays: name -> numbers, read-only. results: single numbers. record: all that is known of its making."""

    request: StatisticRequest
    arrays: dict[str, np.ndarray]
    results: dict[str, Any]
    record: dict[str, Any]

    @property
    def name(self) -> str:
        return self.request.name


@dataclass(frozen=True)
class Listed:
    """A kept statistic. stale: why it may not be used; "" if it may."""

    request: StatisticRequest
    stale: str
    record: dict[str, Any]


def folder_of(name: str) -> str:
    return f"{STATISTICS}/{name}"


# --- reading -------------------------------------------------------------------------------------------


def load(cache: Cache, request: StatisticRequest) -> Statistic:
    """A statistic for use, every byte checked, if it is of just what the snapshot has committed.

    Raises MissingStatistic and StaleStatistic with the command that makes it, MissingField, CorruptCache.
    """
    cache.field(request.field)
    record = read_record(cache.store, request.name)
    if record is None:
        raise MissingStatistic(f"{cache.path} keeps no {request.name}", f"make it: {request.command(cache.path)}")
    stale = why_stale(cache, request, record)
    if stale:
        raise StaleStatistic(f"{cache.path} keeps a {request.name} that {stale}", f"{request.command(cache.path)}")
    arrays = {name: _read_array(cache.store, request.name, name, stated) for name, stated in record["arrays"].items()}
    return Statistic(request, arrays, record["results"], record)


def read_record(store: Store, name: str) -> dict[str, Any] | None:
    """The record of a kept statistic; None if there is none. Raises CorruptCache for one that cannot be trusted."""
    path = f"{folder_of(name)}/{RECORD}"
    try:
        record = without_digest(loads(read_small(store, path)))
        if digest_of(record["fingerprint"]) != record["fingerprint_digest"]:
            raise ValueError("its fingerprint has another digest than it states")
        if request_from(record["fingerprint"]).name != name:
            raise ValueError(f"it is the record of {request_from(record['fingerprint']).name!a}")
        for array, stated in record["arrays"].items():
            _spec(array, stated)
            if stated["path"] != f"{array}/{_object(stated['shape'])}" or type(stated["bytes"]) is not int:
                raise ValueError(f"it states {array!a} at {stated['path']!a}")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        raise CorruptCache(f"{store.where(path)} cannot be trusted: {error}", _again(store)) from error
    return record


def why_stale(cache: Cache, request: StatisticRequest, record: Mapping[str, Any]) -> str:
    """What differs between a kept statistic and the cache as it is; "" if nothing does."""
    kept, now = record["fingerprint"], request.fingerprint(cache)
    if kept["field_fingerprint"] != now["field_fingerprint"]:
        return (
            f"is of a field made otherwise: its fingerprint was {kept['field_fingerprint'][:12]}..., now it is "
            f"{now['field_fingerprint'][:12]}..."
        )
    if kept["blocks"] != now["blocks"]:
        return f"is of {kept['blocks']} blocks of the split; {now['blocks']} are committed now"
    if kept["blocks_sha256"] != now["blocks_sha256"]:
        return f"is of other contents: the {now['blocks']} blocks of the split were made again since"
    if kept["method"] != now["method"]:
        return f"was computed by method {kept['method']}; this emkum has method {now['method']}"
    return "" if kept == now else "was made with other settings"


def kept_names(store: Store, folder: str = STATISTICS) -> list[str]:
    """Names of all statistics that have a record, sorted."""
    found = []
    for name, size in sorted(store.list(folder).items()):
        if name == RECORD:
            found.append(folder.removeprefix(f"{STATISTICS}/"))
        elif size is None and not name.startswith(".") and not name.endswith(".tmp"):
            found += kept_names(store, f"{folder}/{name}")
    return found


def kept(cache: Cache) -> list[Listed]:
    """All statistics of a cache, stale ones too. Raises CorruptCache."""
    found = []
    for name in kept_names(cache.store):
        record = read_record(cache.store, name)
        if record is None:  # removed meanwhile
            continue
        request = request_from(record["fingerprint"])
        if request.field in cache.fields:
            stale = why_stale(cache, request, record)
        else:
            stale = "is of a field that is not there"
        found.append(Listed(request, stale, record))
    return found


def _read_array(store: Store, name: str, array: str, stated: Mapping[str, Any]) -> np.ndarray:
    path = f"{folder_of(name)}/{stated['path']}"
    try:
        data = store.read(path)
    except FileNotFoundError as error:
        raise CorruptCache(f"{store.where(path)} is missing", _again(store)) from error
    if len(data) != stated["bytes"] or hashlib.sha256(data).hexdigest() != stated["sha256"]:
        raise CorruptCache(f"{store.where(path)} does not hold the bytes that its record states", _again(store))
    spec = _spec(array, stated)
    return np.frombuffer(data[:-4], np.dtype(spec.dtype).newbyteorder("<")).reshape(spec.row_shape)


def _again(store: Store) -> str:
    return f"`emkum cache repair {store.url}` removes it; the same `emkum cache stats` command makes it anew"


# --- writing -------------------------------------------------------------------------------------------


def keep(
    cache: Cache,
    request: StatisticRequest,
    arrays: Mapping[str, tuple[np.ndarray, tuple[str, ...]]],
    results: Mapping[str, Any],
    making: Mapping[str, Any],
    say: Callable[[str], None] = lambda line: None,
) -> Statistic:
    """Commits a statistic: its folder appears whole, by one rename, in place of one of the same name.

    arrays: name -> numbers and the names of their axes. making: what is recorded and never compared.
    Where another process has kept the same meanwhile, that one stays and is given back. Raises StorageFailure.
    """
    fingerprint = request.fingerprint(cache)
    files: dict[str, bytes] = {}
    stated: dict[str, Any] = {}
    for name, (values, axes) in arrays.items():
        body = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
        data = body + struct.pack("<I", google_crc32c.value(body))
        path = f"{name}/{_object(values.shape)}"
        files[path] = data
        stated[name] = {
            "path": path,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "dtype": values.dtype.name,
            "shape": list(values.shape),
            "axes": list(axes),
        }
    record = {
        "fingerprint": fingerprint,
        "fingerprint_digest": digest_of(fingerprint),
        "arrays": stated,
        "results": dict(results),
        "making": dict(making),
    }
    prefix = f"{folder_of(request.name)}/"
    files |= {path.removeprefix(prefix): data for path, data in metadata_of(request.name, record).items()}
    files[RECORD] = pretty_json(with_digest(record))  # last: by it the statistic is known
    store = cache.store
    with Claims(store) as claims, claims.planning(join=True, say=say):
        there = _whole(store, request.name)
        if there is None or there["fingerprint"] != fingerprint:
            folder = ""
            for part in folder_of(request.name).split("/")[:-1]:
                folder += f"{part}/"
                claims.check_planning()
                store.create(f"{folder}{_GROUP}", pretty_json(group_metadata()))
            claims.check_planning()
            drop(store, request.name)
            claims.check_planning()
            if not store.create_folder(folder_of(request.name), files):
                raise StorageFailure(
                    f"{store.where(folder_of(request.name))} cannot be replaced: not all of it could be removed",
                    "check the disk and the permissions, then run the same command again",
                )
    return load(cache, request)


def metadata_of(name: str, record: Mapping[str, Any]) -> dict[str, bytes]:
    """The zarr.json of a statistic's group and arrays, from its record: path from the root of the cache -> bytes."""
    attributes = {"emkum": {"statistic": name, "fingerprint_digest": record["fingerprint_digest"]}}
    files = {_GROUP: pretty_json(group_metadata(attributes))}
    for array, stated in record["arrays"].items():
        files[f"{array}/{_GROUP}"] = pretty_json(array_metadata(_NO_FIELD, _spec(array, stated), 0, 0, 0))
    return {f"{folder_of(name)}/{path}": data for path, data in files.items()}


def _whole(store: Store, name: str) -> dict[str, Any] | None:
    """The record of a statistic whose arrays are what it states."""
    try:
        record = read_record(store, name)
        for array, stated in (record or {"arrays": {}})["arrays"].items():
            _read_array(store, name, array, stated)
    except CorruptCache:
        return None
    return record


def drop(store: Store, name: str) -> None:
    """Removes a statistic, its record first."""
    store.remove(f"{folder_of(name)}/{RECORD}")
    for path in files_of(store, folder_of(name)):
        store.remove(path)
    if store.local is not None:
        store.remove(folder_of(name))  # its empty folders


def files_of(store: Store, folder: str) -> list[str]:
    """Paths of everything below a folder, unfinished writes left out."""
    found = []
    for name, size in sorted(store.list(folder).items()):
        if not name.startswith(".") and not name.endswith(".tmp"):
            found += files_of(store, f"{folder}/{name}") if size is None else [f"{folder}/{name}"]
    return found


def _object(shape: tuple[int, ...] | list[int]) -> str:
    return "c" + ".0" * len(shape)


def _spec(name: str, stated: Mapping[str, Any]) -> ArraySpec:
    """Raises ValueError, KeyError or TypeError for what no array of a statistic can be."""
    shape, dtype = tuple(stated["shape"]), stated["dtype"]
    if not name.isidentifier() or dtype not in ("float32", "float64", "int64"):
        raise ValueError(f"no array is called {name!a}, of {dtype!a}")
    if not shape or any(type(n) is not int or n < 1 for n in shape):
        raise ValueError(f"an array of shape {shape!a}")
    if stated["bytes"] != math.prod(shape) * np.dtype(dtype).itemsize + 4:
        raise ValueError(f"{stated['bytes']!a} bytes for {shape} of {dtype}")
    return ArraySpec(name, dtype, shape, tuple(stated["axes"]), per_row=False)
