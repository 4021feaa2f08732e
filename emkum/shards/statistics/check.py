"""What is damaged among the statistics of a cache: for `emkum cache verify` and `repair`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from emkum.errors import CorruptCache
from emkum.shards.layout import group_metadata, pretty_json
from emkum.shards.statistics.kept import RECORD, STATISTICS, folder_of, metadata_of, read_record
from emkum.shards.store import Store, sha256_of
from emkum.shards.strict_json import loads


@dataclass(frozen=True)
class Damage:
    """drop: what to remove, first to last, if the statistic is lost; rewrite: what belongs at `path`, if it is not."""

    path: str
    what: str
    drop: tuple[str, ...] = ()
    rewrite: bytes | None = None


@dataclass
class Checked:
    """names: of the statistics that have a record. owned: paths that are of the format."""

    names: list[str] = field(default_factory=list)
    owned: set[str] = field(default_factory=set)
    damages: list[Damage] = field(default_factory=list)


def check_statistics(store: Store, paths: Collection[str]) -> Checked:
    """Reads every byte of every statistic. paths: of all files below `statistics/`, from the root of the cache.

    Whether a statistic is stale is no matter of damage. Raises StorageFailure of a storage that does not answer.
    """
    checked = Checked()
    for path in sorted(paths):
        if path.endswith(f"/{RECORD}"):
            _check_one(store, path.removeprefix(f"{STATISTICS}/").removesuffix(f"/{RECORD}"), paths, checked)
    parents = {STATISTICS}
    for name in checked.names:
        parts = folder_of(name).split("/")
        parents |= {"/".join(parts[:depth]) for depth in range(1, len(parts))}
    plain = pretty_json(group_metadata())
    for path in sorted({f"{folder}/zarr.json" for folder in parents} if checked.names else ()):
        _check_metadata(store, path, plain, paths, checked)
    for path in sorted(paths):  # of statistics that were removed
        if path.endswith("/zarr.json") and path not in checked.owned and _bytes(store, path) == plain:
            checked.owned.add(path)
    return checked


def _check_one(store: Store, name: str, paths: Collection[str], checked: Checked) -> None:
    record_path = f"{folder_of(name)}/{RECORD}"
    below = sorted(path for path in paths if path.startswith(f"{folder_of(name)}/") and path != record_path)
    drop = (record_path, *below)
    checked.names.append(name)
    checked.owned.add(record_path)
    try:
        record: dict[str, Any] | None = read_record(store, name)
        if record is None:
            return
        data = store.read(record_path)
        if data != pretty_json(loads(data)):
            raise ValueError("its bytes were altered")
    except (CorruptCache, ValueError) as error:
        checked.owned |= set(below)
        what = str(error.__cause__) if isinstance(error, CorruptCache) and error.__cause__ else str(error)
        checked.damages.append(Damage(record_path, f"cannot be trusted: {what}", drop))
        return
    for stated in record["arrays"].values():
        path = f"{folder_of(name)}/{stated['path']}"
        checked.owned.add(path)
        try:
            if sha256_of(store, path) != (stated["bytes"], stated["sha256"]):
                checked.damages.append(Damage(path, "holds other bytes than its record states", drop))
        except FileNotFoundError:
            checked.damages.append(Damage(path, "is missing", drop))
        except ValueError as error:  # a bad sector
            checked.damages.append(Damage(path, str(error), drop))
    for path, data in metadata_of(name, record).items():
        _check_metadata(store, path, data, paths, checked)


def _check_metadata(store: Store, path: str, data: bytes, paths: Collection[str], checked: Checked) -> None:
    checked.owned.add(path)
    found = _bytes(store, path) if path in paths else None
    if found != data:
        what = "is missing" if found is None else "differs from what the records say it must be"
        checked.damages.append(Damage(path, what, rewrite=data))


def _bytes(store: Store, path: str) -> bytes | None:
    try:
        return store.read(path)
    except FileNotFoundError:
        return None
    except ValueError:  # a bad sector
        return b""
