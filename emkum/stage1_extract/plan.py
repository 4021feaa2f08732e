"""What an extraction will do, before it does it: networks, segments, fields, missing blocks, bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch

from emkum.errors import (
    CorruptCache,
    IdentityMismatch,
    NoData,
    SourceChanged,
    StorageFailure,
)
from emkum.models.audio_pass import AudioPass
from emkum.models.passes import (
    FrozenPass,
    chosen_device,
)
from emkum.shards.claims import Claims
from emkum.shards.layout import (
    Space,
)
from emkum.shards.ledger import Receipt, field_record_paths, read_field_record
from emkum.shards.reader import Field
from emkum.shards.segments import (
    Segment,
    new_sources,
    read_segments,
    require_same_views,
    require_split,
)
from emkum.shards.store import Store, open_store
from emkum.shards.tars import SourceTar, find_tars
from emkum.shards.writer import CacheWriter, read_root, require_cache_or_empty
from emkum.stage1_extract.config import DEFAULT_SIZE, ExtractConfig
from emkum.stage1_extract.crops import chosen_size, open_crops, require_crops
from emkum.stage1_extract.fields import (
    PlannedField,
    check_record,
    narrowed,
    new_defaults,
    planned_fields,
    planned_sounds,
    require_used,
)
from emkum.stage1_extract.networks import (
    Networks,
    completed,
    keep_networks,
    load_networks,
    require_sounds,
)
from emkum.stage1_extract.scans import ScanMemory


@dataclass(frozen=True)
class Task:
    """One block of one view, and the fields that still lack it."""

    segment: Segment
    block: int
    view: int
    fields: tuple[str, ...]
    first_row: int
    rows: int  # padding not counted


@dataclass(frozen=True)
class Plan:
    config: ExtractConfig
    writer: CacheWriter
    fields: dict[str, PlannedField]
    receipts: dict[str, dict[tuple[int, int], Receipt]]  # of each field, as they were when the plan was made
    image_pass: FrozenPass | None
    text_pass: FrozenPass | None
    tokenizer: bytes | None
    tasks: tuple[Task, ...]
    segments: tuple[Segment, ...]
    paths: dict[str, str]  # tar name -> where it lies now
    crops: Field | None  # where the pictures come from, if not from tars
    filtered: int  # samples with neither picture, caption nor sound
    duplicate_keys: int  # keys that appear in more than one tar
    audio_pass: AudioPass | None = None
    notes: tuple[str, ...] = ()  # what the user should know before the run

    @property
    def store(self) -> Store:
        return self.writer.store

    @property
    def num_rows(self) -> int:
        """Rows to compute, pictures (each view counts), captions and sounds together."""
        return sum(task.rows for task in self.tasks)

    @property
    def num_bytes(self) -> int:
        """Bytes the missing blocks will take at most (ragged rows counted in full)."""
        return sum(self.field_bytes(name) for name in self.fields)

    def field_bytes(self, name: str, tiles_per_row: int | None = None) -> int:
        """Bytes of a field's missing blocks; see FieldSpec.block_bytes."""
        size, spec = self.writer.rows_per_block, self.fields[name].spec
        return sum(spec.block_bytes(task.rows, size, tiles_per_row) for task in self.tasks if name in task.fields)


@dataclass(frozen=True)
class Survey:
    """What a run found before it touches the cache: the tars, the networks, and what the settings come to.

    From crops there are no tars, and `config.size` is that of the crops.
    """

    config: ExtractConfig
    store: Store
    device: torch.device
    paths: list[str]  # all tars that were named
    known: list[str]  # those of them that are unchanged since a committed scan
    tars: list[SourceTar]  # scans of the others
    networks: Networks
    memory: ScanMemory
    has_pictures: bool
    has_captions: bool
    has_sounds: bool = False


def survey(config: ExtractConfig) -> Survey:
    """Scans the tars and loads the networks; writes nothing.

    Raises AnotherWriter before the slow part if the cache is being written and `join` is not set, and RefusedTeacher
    before anything is fetched.
    """
    config.guard.check(s for s in (*config.teacher, config.encoder, config.text_encoder) if s and s != "none")
    paths = [] if config.from_crops else find_tars(config.data)
    device = chosen_device(config.device)
    store = open_store(config.cache)
    segments: Sequence[Segment] = ()
    if config.from_crops or require_cache_or_empty(store):
        read_root(store)
        if not config.join:
            Claims(store).require_alone()
        segments = read_segments(store)
    networks = load_networks(config)
    memory = ScanMemory(store, config.on_truncated, config.allow_missing_eof)
    memory.know(segments)
    known, tars = _scan(paths, memory)
    if config.from_crops:
        has_pictures, has_captions = _contents_of_split(config, segments, store)
        has_sounds = False  # crops hold none
        has_pictures = has_pictures and bool(networks.image_teachers or networks.encoder)
        if has_pictures:
            config = replace(config, size=chosen_size(store, config.size, _with_crops(config, store)))
    else:
        has_pictures, has_captions, has_sounds = _contents(config, known, tars, segments)
    networks = completed(networks, config, has_pictures, has_captions)
    require_sounds(networks, config, has_sounds)
    return Survey(config, store, device, paths, known, tars, networks, memory, has_pictures, has_captions, has_sounds)


@dataclass(frozen=True)
class Committed:
    """The fields of a run as the cache holds them, before the run adds to them."""

    config: ExtractConfig
    store: Store
    fields: dict[str, PlannedField]
    receipts: dict[str, dict[tuple[int, int], Receipt]]
    image_pass: FrozenPass | None
    text_pass: FrozenPass | None
    tokenizer: bytes | None
    paths: dict[str, str]  # tar name -> where it lies, of the tars that are at hand as they were
    crops: Field | None  # where the pictures come from, if not from tars
    audio_pass: AudioPass | None = None


def make_plan(
    found: Survey,
    claims: Claims,
    check: Callable[[Committed], None] = lambda held: None,
) -> Plan:
    """Opens or creates the cache, and lists the missing blocks. The caller alone is planning, and holds `claims`.

    What dead processes left is cleared before blocks are counted, so that it is missing. Written are the cache's root,
    the frozen networks and a segment of new tars. Raises before that where the cache was made otherwise; `check` does
    so too, and is called if the run adds to fields that hold rows.
    """
    config, memory, tars, networks = found.config, found.memory, found.tars, found.networks
    writer = CacheWriter(found.store, config.rows_per_block, claims.check_planning)
    memory.know(writer.segments)
    config = _with_views_of_the_split(config, writer.segments)
    fresh = new_sources(writer.segments, config.split, tars)
    if networks.audio_teachers:
        with_sounds = {tar.name for tar in tars if any(sample.sound for sample in tar.samples)}
        with_sounds |= {os.path.basename(path) for path in found.known if memory.num_sounds(path)}
        _require_rows(writer.segments, with_sounds)
    for path in found.known:
        require_split(writer.segments, config.split, os.path.basename(path))
    if any(sample.picture for tar in fresh for sample in tar.samples):
        require_same_views(writer.segments, config.split, config.policy)
    crops = open_crops(found.store, config.side) if config.from_crops and found.has_pictures else None
    fields, image_pass, text_pass = planned_fields(
        config, networks, found.device, writer, found.has_pictures, found.has_captions, crops
    )
    sounds, audio_pass = planned_sounds(config, networks, found.device, writer)
    fields |= sounds
    require_used(config, [field.wanted for field in fields.values() if field.wanted])
    guard = config.guard.record()
    fields = {name: replace(field, environment=field.environment | guard) for name, field in fields.items()}
    for field in fields.values():
        check_record(writer, field)
    writer.clear_unfinished(claims)
    writer.require_segments()
    receipts = {name: writer.receipts(name) for name in fields}
    new = {name for name, found in receipts.items() if not found and writer.field_record(name) is None}
    notes = () if config.targets else tuple(new_defaults(writer, fields, new))
    read = {}
    if crops is not None:
        crops = open_crops(found.store, config.side)  # again: of its blocks, too, some may have been cleared
        read = {crops.name: crops.receipts}
    _require_objects(found.store, receipts | read)
    names = {tar.name for tar in tars} | {os.path.basename(path) for path in found.known}
    if config.from_crops:
        names = {source.tar for segment in writer.segments for source in segment.sources}
    where = {os.path.basename(path): path for path in found.paths}
    tokenizer = networks.tokenizer.tokenizer if networks.tokenizer else None
    segments = _segments_of(writer, config.split, names)
    tasks = _tasks(config, writer.rows_per_block, fields, segments, receipts)
    if crops is not None:
        places = {(task.block, task.view) for task in tasks if fields[task.fields[0]].spec.space == "image"}
        require_crops(crops, places, found.store, _with_crops(config, found.store))
    if (fresh or tasks) and any(receipts.values()):
        paths = {} if config.from_crops else _at_hand(writer.segments, where, memory)
        recorded = {name: field for name, field in fields.items() if writer.field_record(name) is not None}
        held = {name: receipts[name] for name in recorded}
        check(
            Committed(config, found.store, recorded, held, image_pass, text_pass, tokenizer, paths, crops, audio_pass)
        )
    keep_networks(writer, networks)
    if fresh:
        writer.append_segment(config.split, config.policy, fresh)
    memory.remember(tars)
    segments = _segments_of(writer, config.split, names)
    if any(field.spec.space == "image" for field in fields.values()):
        require_same_views(segments, config.split, config.policy)
    if not config.from_crops:
        _require_tars(segments, where, memory)
    tasks = _tasks(config, writer.rows_per_block, fields, segments, receipts)
    missing = {name for task in tasks for name in task.fields}
    image_pass, text_pass = (narrowed(p, fields, missing) for p in (image_pass, text_pass))
    if audio_pass is not None:
        audio_pass = audio_pass.only([w for name in missing if (w := fields[name].wanted) is not None])
    keys = [(t.name, s.key) for t in fresh for s in t.samples]
    return Plan(
        config,
        writer,
        fields,
        receipts,
        image_pass,
        text_pass,
        tokenizer,
        tasks,
        segments,
        where,
        crops,
        sum(tar.filtered for tar in tars),
        len(keys) - len({key for _, key in keys}),
        audio_pass,
        notes,
    )


def _require_rows(segments: Sequence[Segment], with_sounds: Collection[str]) -> None:
    """Raises IdentityMismatch if a segment was made of tars that hold sounds, and has no rows for them."""
    for segment in segments:
        unheard = [source.tar for source in segment.sources if source.tar in with_sounds]
        if unheard and not segment.audio.rows:
            raise IdentityMismatch(
                f"{unheard[0]} holds sounds, and segment {segment.number} was made of it by an emkum that read none",
                "extract the sounds into another folder with --cache, or write their tars again under another name",
            )


# --- data ----------------------------------------------------------------------------------------------


def _scan(paths: Sequence[str], memory: ScanMemory) -> tuple[list[str], list[SourceTar]]:
    """(paths of tars that are unchanged since a committed scan, scans of the others)."""
    known = [path for path in paths if memory.unchanged(path)]
    unknown = set(paths) - set(known)
    return known, memory.scan([path for path in paths if path in unknown])


def _with_views_of_the_split(config: ExtractConfig, segments: Sequence[Segment]) -> ExtractConfig:
    """The split's own view policy where the user named none: a second teacher takes the crops of the first."""
    if config.crop is not None or config.flip or config.jitter or config.seed:
        return config
    for segment in segments:
        if segment.split == config.split and segment.image.rows:
            views = segment.views
            return replace(config, crop=views.crop, flip=views.flip, jitter=views.jitter, seed=views.seed)
    return config


def _contents(
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


def _contents_of_split(config: ExtractConfig, segments: Sequence[Segment], store: Store) -> tuple[bool, bool]:
    """Whether the cache holds pictures and captions of the split."""
    here = [segment for segment in segments if segment.split == config.split]
    if not here:
        splits = ", ".join(dict.fromkeys(segment.split for segment in segments))
        raise NoData(
            f"{store.url} has no split {config.split}; it has: {splits or 'none'}",
            "name one of these with --split, or add the split from its tars: --data in place of --from-crops",
        )
    return any(segment.image.rows for segment in here), any(segment.text.rows for segment in here)


def _with_crops(config: ExtractConfig, store: Store) -> str:
    """The command that writes the crops which this run is to read, beside its own fields."""
    size = config.size
    if size is None:  # that of the cache's other fields of pictures
        records = [read_field_record(store, path)["fingerprint"].get("size") for path in field_record_paths(store)]
        sizes = {size for size in records if size is not None}
        size = sizes.pop() if len(sizes) == 1 else None
    words = [f"emkum extract --cache {store.url} --split {config.split} --data <tars>"]
    words += [f"--teacher {teacher}" for teacher in config.teacher]
    words += [f"--encoder {config.encoder}"] if config.encoder not in (None, "none") else []
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
    records = [read_field_record(store, path) for path in field_record_paths(store)]
    found = [record for record in records if record["kind"] == "ids"]
    if len(found) != 1:
        return ""
    source = str(found[0]["environment"].get("source", ""))
    return str(found[0]["field"]).split("/")[1] if not source or source.startswith("pypi:") else source


def _segments_of(writer: CacheWriter, split: str, tars: Collection[str]) -> tuple[Segment, ...]:
    """The split's segments that hold one of these tars."""
    return tuple(s for s in writer.segments if s.split == split and any(x.tar in tars for x in s.sources))


def _at_hand(segments: Sequence[Segment], where: dict[str, str], memory: ScanMemory) -> dict[str, str]:
    """`where`, and the remembered places of other tars that still lie there unchanged."""
    sources = (source for segment in segments for source in segment.sources if source.tar not in where)
    return where | {s.tar: s.path for s in sources if os.path.exists(s.path) and memory.unchanged(s.path)}


def _require_tars(segments: Sequence[Segment], where: dict[str, str], memory: ScanMemory) -> None:
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


def _require_objects(store: Store, receipts: dict[str, dict[tuple[int, int], Receipt]]) -> None:
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


def _tasks(
    config: ExtractConfig,
    rows_per_block: int,
    fields: dict[str, PlannedField],
    segments: Sequence[Segment],
    receipts: dict[str, dict[tuple[int, int], Receipt]],
) -> tuple[Task, ...]:
    tasks = []
    views: dict[Space, int] = {"text": 1, "audio": 1, "image": config.views}
    for space, num_views in views.items():
        names = [name for name, field in fields.items() if field.spec.space == space]
        for segment in segments if names else ():
            span = segment.span(space)
            for block in span.blocks(rows_per_block):
                for view in range(num_views):
                    lacking = tuple(name for name in names if (block, view) not in receipts[name])
                    if lacking:
                        first, rows = span.block_rows(block, rows_per_block)
                        tasks.append(Task(segment, block, view, lacking, first, rows))
    return tuple(tasks)


def require_room(plan: Plan) -> None:
    """Raises StorageFailure if what is sure to be written does not fit; ragged rows count one tile each.

    For a process that writes alone: what others have begun would count twice.
    """
    needed = sum(plan.field_bytes(name, 1 if f.spec.is_ragged else None) for name, f in plan.fields.items())
    free = plan.store.free_bytes()
    if free is not None and needed > free:
        raise StorageFailure(
            f"the missing blocks need {needed:,} bytes in {plan.store.url}, {free:,} are free",
            f"free {needed - free:,} bytes more, use --storage int8, --store-inputs crops, or fewer --targets",
        )
