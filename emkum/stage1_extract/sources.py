"""What an extraction reads: tars and segments of the cache, what they hold and where they lie."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from emkum.errors import CorruptCache, IdentityMismatch, NoData, SourceChanged
from emkum.shards.ledger import Receipt
from emkum.shards.segments import Segment, new_sources, read_captions
from emkum.shards.store import Store
from emkum.shards.tars import SourceTar
from emkum.shards.writer import CacheWriter
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.scans import ScanMemory


def scanned(paths: Sequence[str], memory: ScanMemory) -> tuple[list[str], list[SourceTar]]:
    """(paths of tars that are unchanged since a committed scan, scans of the others)."""
    known = [path for path in paths if memory.unchanged(path)]
    unknown = set(paths) - set(known)
    return known, memory.scan([path for path in paths if path in unknown])


def with_views_of_the_split(config: ExtractConfig, segments: Sequence[Segment]) -> ExtractConfig:
    """The split's own view policy where the user named none: a second teacher takes the crops of the first."""
    if config.crop is not None or config.flip or config.jitter or config.seed:
        return config
    for segment in segments:
        if segment.split == config.split and segment.image.rows:
            views = segment.views
            return replace(config, crop=views.crop, flip=views.flip, jitter=views.jitter, seed=views.seed)
    return config


def contents(
    config: ExtractConfig, known: Sequence[str], tars: Sequence[SourceTar], segments: Sequence[Segment]
) -> tuple[bool, bool, bool]:
    """Whether there are pictures, captions and sounds."""
    pictures = any(sample.picture for tar in tars for sample in tar.samples)
    captions = any(sample.captions for tar in tars for sample in tar.samples)
    sounds = any(sample.sound for tar in tars for sample in tar.samples)
    if known:
        names = {os.path.basename(path) for path in known}
        for segment in segments:
            if names & {source.tar for source in segment.sources}:
                pictures |= segment.image.rows > 0
                captions |= segment.text.rows > 0
                sounds |= segment.audio.rows > 0
    if not pictures and not captions and not sounds:
        raise NoData(
            f"the tars in {', '.join(config.data)} hold neither pictures nor captions nor sounds",
            "emkum reads jpg, jpeg, png, webp, txt, json, wav and flac members; see docs/data.md",
        )
    return pictures, captions, sounds


def has_pairs(tars: Sequence[SourceTar], segments: Sequence[Segment], store: Store) -> bool:
    """Whether a caption of these scans or segments has a picture."""
    if any(sample.picture and sample.captions for tar in tars for sample in tar.samples):
        return True
    of_captions = (read_captions(store, segment)["image_row"] for segment in segments if segment.text.rows)
    return any(column.null_count < len(column) for column in of_captions)


def blocks_of_pictures(image_rows: pa.ChunkedArray, rows_per_block: int) -> list[int]:
    """The blocks of the pictures that captions with these image rows, some of them null, belong to; ascending."""
    found: list[int] = np.unique(image_rows.drop_null().to_numpy() // rows_per_block).tolist()
    return found


def contents_of_split(config: ExtractConfig, segments: Sequence[Segment], store: Store) -> tuple[bool, bool]:
    """Whether the cache holds pictures and captions of the split."""
    here = [segment for segment in segments if segment.split == config.split]
    if not here:
        splits = ", ".join(dict.fromkeys(segment.split for segment in segments))
        raise NoData(
            f"{store.url} has no split {config.split}; it has: {splits or 'none'}",
            "name one of these with --split, or add the split from its tars: --data in place of --from-crops",
        )
    return any(segment.image.rows for segment in here), any(segment.text.rows for segment in here)


def segments_of(writer: CacheWriter, split: str, tars: Collection[str]) -> tuple[Segment, ...]:
    """The split's segments that hold one of these tars."""
    return tuple(s for s in writer.segments if s.split == split and any(x.tar in tars for x in s.sources))


def places_at_hand(segments: Sequence[Segment], where: dict[str, str], memory: ScanMemory) -> dict[str, str]:
    """`where`, and the remembered places of other tars that still lie there unchanged."""
    sources = (source for segment in segments for source in segment.sources if source.tar not in where)
    return where | {s.tar: s.path for s in sources if os.path.exists(s.path) and memory.unchanged(s.path)}


def require_tars(segments: Sequence[Segment], where: dict[str, str], memory: ScanMemory) -> None:
    """Fills `where` with the remembered places of tars that were not named; raises SourceChanged if they changed."""
    unnamed = []
    for segment in segments:
        for source in segment.sources:
            if source.tar in where:
                continue
            where[source.tar] = source.path
            if not os.path.exists(source.path) or os.path.getsize(source.path) != source.bytes:
                raise SourceChanged(
                    f"{source.tar}, part of segment {segment.number}, is not at {source.path} "
                    f"with {source.bytes} bytes",
                    "name it in --data, or restore it",
                )
            if not memory.unchanged(source.path):
                unnamed.append(source.path)
    scanned = memory.scan(unnamed)
    new_sources(segments, segments[0].split if segments else "", scanned)
    memory.remember(scanned)


def require_objects(store: Store, receipts: dict[str, dict[tuple[int, int], Receipt]]) -> None:
    """Raises CorruptCache if an object that a receipt lists is gone or has another length: a copy may be half done."""
    folders: dict[str, dict[str, int | None]] = {}
    for field, found in receipts.items():
        for receipt in found.values():
            for listed in receipt.objects:
                folder, _, name = listed.path.rpartition("/")
                if folder not in folders:
                    folders[folder] = store.list(folder)
                size = folders[folder].get(name)
                if size != listed.bytes:
                    raise CorruptCache(
                        f"object {store.where(listed.path)} of {field} block {receipt.block}-{receipt.view} "
                        + ("is missing" if size is None else f"has {size:,} bytes")
                        + f", its receipt says {listed.bytes:,} bytes",
                        f"finish copying the cache, or drop what is damaged with `emkum cache repair {store.url}`; "
                        "the same command then redoes exactly that",
                    )


def require_rows(segments: Sequence[Segment], with_sounds: Collection[str]) -> None:
    """Raises IdentityMismatch if a segment was made of tars that hold sounds, and has no rows for them."""
    for segment in segments:
        unheard = [source.tar for source in segment.sources if source.tar in with_sounds]
        if unheard and not segment.audio.rows:
            raise IdentityMismatch(
                f"{unheard[0]} holds sounds, and segment {segment.number} was made of it by an emkum that read none",
                "extract the sounds into another folder with --cache, or write their tars again under another name",
            )
