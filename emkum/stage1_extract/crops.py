"""The crops that a cache keeps, as the source of pictures in place of the tars."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from emkum.errors import IncompleteCache, MissingField, UsageError
from emkum.shards.layout import CROPS, FieldSpec, ids_of_texts
from emkum.shards.ledger import read_field_records
from emkum.shards.reader import Cache, Field
from emkum.shards.store import Store
from emkum.stage1_extract.config import DEFAULT_SIZE, ExtractConfig


def crops_spec(size: int) -> FieldSpec:
    """The field of square crops with this side in pixels."""
    return FieldSpec(f"image/crops-{size}", "crops", "uint8", (size, size, 3))


def crop_sizes(store: Store) -> list[int]:
    """The sides of the crops that a cache keeps, ascending."""
    return sorted(int(found["size"]) for name in read_field_records(store) if (found := CROPS.fullmatch(name)))


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


def with_crops(config: ExtractConfig, store: Store, reads_pictures: bool = True) -> str:
    """The command that writes the crops which this run is to read, beside its own fields.

    reads_pictures: whether a network of the run reads pictures alone; else the command leaves room to name one.
    """
    size = config.size
    if size is None:  # that of the cache's other fields of pictures
        records = [record["fingerprint"].get("size") for record in read_field_records(store).values()]
        sizes = {size for size in records if size is not None}
        size = sizes.pop() if len(sizes) == 1 else None
    words = [f"emkum extract --cache {store.url} --split {config.split} --data <tars>"]
    words += [f"--teacher {teacher}" for teacher in config.teacher]
    words += [f"--encoder {config.encoder}"] if config.encoder not in (None, "none") else []
    words += [] if reads_pictures else ["--encoder <network>"]
    words += ["--store-inputs crops"]
    text_encoder = config.text_encoder or _text_encoder_of(store)
    words += [f"--text-encoder {text_encoder}"] if text_encoder else []
    words += [f"--targets {','.join(config.targets)}"] if config.targets else []
    words += [f"--layers {config.layers}"] if config.layers else []
    words += [f"--logits-top {config.logits_top}"] if config.logits_top else []
    for flag, value, default in (
        ("--name", config.name, None),
        ("--storage", config.storage, ExtractConfig.storage),
        ("--compute", config.compute, ExtractConfig.compute),
        ("--max-tokens", config.max_tokens, ExtractConfig.max_tokens),
    ):
        words += [f"{flag} {value}"] if value != default else []
    words += [f"--size {size}"] if size not in (None, DEFAULT_SIZE) else []
    words += [f"--views {config.views}"] if config.views > 1 else []
    return " ".join(words)


def _text_encoder_of(store: Store) -> str:
    """What `--text-encoder` takes to find the network whose token ids the cache has; "" for none or several."""
    records = read_field_records(store)
    found = ids_of_texts(records)
    if len(found) != 1:
        return ""
    source, name = str(records[found[0]]["environment"].get("source", "")), found[0].split("/")[1]
    return name if not source or source.startswith("pypi:") else source
