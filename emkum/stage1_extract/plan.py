"""What an extraction will do, before it does it: networks, segments, fields, missing blocks, bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from emkum.errors import StorageFailure
from emkum.models.audio_pass import AudioPass
from emkum.models.pair_pass import PairPass
from emkum.models.passes import FrozenPass, chosen_device
from emkum.shards.audit import readable_bytes
from emkum.shards.claims import Claims
from emkum.shards.layout import Space, model_dir
from emkum.shards.ledger import Receipt
from emkum.shards.reader import Field
from emkum.shards.segments import (
    Segment,
    new_sources,
    read_captions,
    read_segments,
    require_same_views,
    require_split,
)
from emkum.shards.store import Store, exists, open_store
from emkum.shards.tars import SourceTar, find_tars
from emkum.shards.writer import CacheWriter, read_root, require_cache_or_empty
from emkum.stage1_extract.agreement import check_record, new_defaults
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.crops import chosen_size, open_crops, require_crops, with_crops
from emkum.stage1_extract.fields import (
    PlannedField,
    narrowed,
    planned_fields,
    planned_pairs,
    planned_sounds,
    require_used,
)
from emkum.stage1_extract.networks import (
    Networks,
    completed,
    keep_networks,
    load_networks,
    num_bytes,
    require_pairs,
    require_sounds,
    with_ids,
)
from emkum.stage1_extract.scans import ScanMemory
from emkum.stage1_extract.sources import (
    blocks_of_pictures,
    contents,
    contents_of_split,
    has_pairs,
    places_at_hand,
    require_objects,
    require_rows,
    require_tars,
    scanned,
    segments_of,
    with_views_of_the_split,
)


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
    pair_pass: PairPass | None = None
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
    known, tars = scanned(paths, memory)
    if config.from_crops:
        has_pictures, has_captions = contents_of_split(config, segments, store)
        has_sounds = False  # crops hold none
        has_pictures = has_pictures and bool(networks.image_teachers or networks.encoder or networks.pair_teachers)
        if has_pictures:
            config = replace(config, size=chosen_size(store, config.size, _command_with_crops(config, store, networks)))
    else:
        has_pictures, has_captions, has_sounds = contents(config, known, tars, segments)
    networks = completed(networks, config, has_pictures, has_captions)
    if networks.pair_teachers:
        names = {os.path.basename(path) for path in known}  # also of another split: make_plan says so
        read = [
            s
            for s in segments
            if (s.split == config.split if config.from_crops else any(source.tar in names for source in s.sources))
        ]
        require_pairs(networks, has_pairs(tars, read, store))
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
    pair_pass: PairPass | None = None


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
    config = with_views_of_the_split(config, writer.segments)
    fresh = new_sources(writer.segments, config.split, tars)
    if networks.audio_teachers:
        with_sounds = {tar.name for tar in tars if any(sample.sound for sample in tar.samples)}
        with_sounds |= {os.path.basename(path) for path in found.known if memory.num_sounds(path)}
        require_rows(writer.segments, with_sounds)
    for path in found.known:
        require_split(writer.segments, config.split, os.path.basename(path))
    if any(sample.picture for tar in fresh for sample in tar.samples):
        require_same_views(writer.segments, config.split, config.policy)
    crops = open_crops(found.store, config.side) if config.from_crops and found.has_pictures else None
    networks = with_ids(networks, config, found.store)
    fields, image_pass, text_pass = planned_fields(
        config, networks, found.device, writer, found.has_pictures, found.has_captions, crops
    )
    pairs, pair_pass = planned_pairs(config, networks, found.device, writer, crops)
    sounds, audio_pass = planned_sounds(config, networks, found.device, writer)
    fields |= pairs | sounds
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
    notes += _about_pairs(networks, found.store)
    read = {}
    if crops is not None:
        crops = open_crops(found.store, config.side)  # again: of its blocks, too, some may have been cleared
        read = {crops.name: crops.receipts}
    require_objects(found.store, receipts | read)
    names = {tar.name for tar in tars} | {os.path.basename(path) for path in found.known}
    if config.from_crops:
        names = {source.tar for segment in writer.segments for source in segment.sources}
    where = {os.path.basename(path): path for path in found.paths}
    tokenizer = networks.ids.tokenizer if networks.ids else None
    segments = segments_of(writer, config.split, names)
    if any(field.spec.space == "image" or field.is_of_pairs for field in fields.values()):
        require_same_views(segments, config.split, config.policy)
    if not config.from_crops:
        require_tars(segments, where, memory)
    tasks = _tasks(config, writer.rows_per_block, fields, segments, receipts)
    if crops is not None:
        places = {(task.block, task.view) for task in tasks if fields[task.fields[0]].spec.space == "image"}
        places |= _blocks_of_pictures(tasks, fields, found.store, writer.rows_per_block)
        require_crops(crops, places, found.store, _command_with_crops(config, found.store, networks))
    if (fresh or tasks) and any(receipts.values()):
        paths = {} if config.from_crops else places_at_hand(writer.segments, where, memory)
        recorded = {name: field for name, field in fields.items() if writer.field_record(name) is not None}
        held = {name: receipts[name] for name in recorded}
        passes = image_pass, text_pass, tokenizer, paths, crops, audio_pass, pair_pass
        check(Committed(config, found.store, recorded, held, *passes))
    keep_networks(writer, networks)
    if fresh:
        writer.append_segment(config.split, config.policy, fresh)
    memory.remember(tars)
    segments = segments_of(writer, config.split, names)
    tasks = _tasks(config, writer.rows_per_block, fields, segments, receipts)
    missing = {name for task in tasks for name in task.fields}
    image_pass, text_pass = (narrowed(p, fields, missing) for p in (image_pass, text_pass))
    if audio_pass is not None:
        audio_pass = audio_pass.only([w for name in missing if (w := fields[name].wanted) is not None])
    if pair_pass is not None:
        of_pairs = [fields[name] for name in missing if fields[name].is_of_pairs]
        pair_pass = pair_pass.only([field.wanted for field in of_pairs if field.wanted is not None])
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
        pair_pass,
        notes,
    )


def _about_pairs(networks: Networks, store: Store) -> tuple[str, ...]:
    """Of a network of pairs that makes the ids: what it takes, and that no student's text side starts from it."""
    lines = []
    for name, network in ((network.name, network) for network in networks.kept if network.modality == "pair"):
        if not exists(store, f"{model_dir(name)}/model.json"):
            size = readable_bytes(num_bytes(network))
            lines.append(f"the cache keeps the network {name}, whose tokenizer makes the ids, whole: {size}")
        if networks.encoder is not None:
            lines.append(f"text/{name}/ids: no student's text side starts from {name}: name a --text-encoder for it")
    return tuple(lines)


def _command_with_crops(config: ExtractConfig, store: Store, networks: Networks) -> str:
    return with_crops(config, store, reads_pictures=bool(networks.image_teachers or networks.encoder))


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


def _blocks_of_pictures(
    tasks: Sequence[Task], fields: dict[str, PlannedField], store: Store, rows_per_block: int
) -> set[tuple[int, int]]:
    """(block, 0) of the pictures that the tasks' captions belong to, where a field of pairs is missing."""
    found: set[tuple[int, int]] = set()
    segment, rows = None, None
    for task in tasks:
        if not any(fields[name].is_of_pairs for name in task.fields):
            continue
        if task.segment is not segment:
            segment, rows = task.segment, read_captions(store, task.segment)["image_row"]
        assert rows is not None
        here = rows.slice(task.first_row - task.segment.text.first_row, task.rows)
        found |= {(block, 0) for block in blocks_of_pictures(here, rows_per_block)}
    return found


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
