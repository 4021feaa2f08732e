"""The crops that a cache keeps, as the source of pictures in place of the tars."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from emkum.errors import IncompleteCache, MissingField, UsageError
from emkum.shards.layout import CROPS, FieldSpec
from emkum.shards.ledger import field_record_paths, read_field_record
from emkum.shards.reader import Cache, Field
from emkum.shards.store import Store


def crops_spec(size: int) -> FieldSpec:
    """The field of square crops with this side in pixels."""
    return FieldSpec(f"image/crops-{size}", "crops", "uint8", (size, size, 3))


def crop_sizes(store: Store) -> list[int]:
    """The sides of the crops that a cache keeps, ascending."""
    names = (str(read_field_record(store, path)["field"]) for path in field_record_paths(store))
    return sorted(int(found["size"]) for name in names if (found := CROPS.fullmatch(name)))


def chosen_size(store: Store, asked: int | None, makes_them: str) -> int:
    """The side of the crops to read: the one asked for, or the only one there is.

    makes_them: the command that writes crops. Raises MissingField, or UsageError where several would do.
    """
    sizes = crop_sizes(store)
    if not sizes:
        raise MissingField(f"{store.url} keeps no crops to extract from", f"make them from the tars: {makes_them}")
    listed = " and ".join(f"{size} px" for size in sizes)
    if asked is None and len(sizes) > 1:
        raise UsageError(f"{store.url} keeps crops of {listed}", f"choose one, for example --size {sizes[0]}")
    if asked is not None and asked not in sizes:
        raise MissingField(
            f"{store.url} keeps crops of {listed}; this run asks for --size {asked}",
            "leave --size out: crops of another size are other crops, and can only be made from the tars",
        )
    return sizes[0] if asked is None else asked


def open_crops(store: Store, size: int) -> Field:
    """The crops of `size` pixels as the cache holds them now. Raises CorruptCache where their record is missing."""
    name = crops_spec(size).name
    return Cache.open(store, only=[name]).field(name)


def require_crops(crops: Field, places: Collection[tuple[int, int]], store: Store, makes_them: str) -> None:
    """Raises IncompleteCache if the crops of one of these (block, view) are not committed."""
    lacking: Sequence[tuple[int, int]] = sorted(place for place in places if place not in crops.receipts)
    if lacking:
        block, view = lacking[0]
        raise IncompleteCache(
            f"{store.url} lacks {crops.name} of {len(lacking)} of the {len(places)} blocks to extract, the first "
            f"block {block} view {view}",
            f"finish them from the tars: {makes_them}",
        )
