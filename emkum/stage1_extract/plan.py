"""What an extraction will do, before it does it: networks, segments, fields, missing blocks, bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, Literal

import PIL
import torch

import emkum
from emkum.errors import (
    CorruptCache,
    FingerprintMismatch,
    IdentityMismatch,
    MissingCaptions,
    NoData,
    SourceChanged,
    StorageFailure,
    UnsupportedNetwork,
    UsageError,
    WeightsUnavailable,
)
from emkum.models.audio_pass import AUDIO_OUTPUTS, AUDIO_TARGETS, AudioPass
from emkum.models.backbone import Backbone, Modality, TextEmbedding
from emkum.models.catalogue import load_network
from emkum.models.families.registry import CATALOGUE, family_named
from emkum.models.network import Network, network_files
from emkum.models.passes import (
    TARGETS,
    FrozenPass,
    Wanted,
    chosen_device,
    default_rule,
    good_compute,
    num_classes,
    num_prenet,
    rule_of,
)
from emkum.models.sources import read_source
from emkum.models.supervision import Guard
from emkum.models.targets import LayersRule, named_rule, recorded_rule, rule_as_text, rule_from_text
from emkum.models.tokenizer import differing as differing_tokenizers
from emkum.models.whole import WholeNetwork
from emkum.shards.claims import Claims
from emkum.shards.fingerprint import Fingerprint, differing, require_same
from emkum.shards.layout import (
    MAX_ROWS_PER_BLOCK,
    STORAGES,
    TEXT_TILE,
    FieldSpec,
    Kind,
    Space,
    canonical_json,
    check_cache_name,
    model_dir,
)
from emkum.shards.ledger import Receipt, field_record_paths, read_field_record
from emkum.shards.reader import Field
from emkum.shards.segments import (
    Segment,
    check_split_name,
    new_sources,
    read_segments,
    require_same_views,
    require_split,
)
from emkum.shards.sounds import DECODER as SOUND_DECODER
from emkum.shards.sounds import decoder_versions, require_decoder
from emkum.shards.store import Store, exists, is_url, open_store
from emkum.shards.strict_json import loads
from emkum.shards.tars import OnTruncated, SourceTar, find_tars
from emkum.shards.views import DECODER, Box, ViewPolicy
from emkum.shards.writer import CacheWriter, read_root, require_cache_or_empty
from emkum.stage1_extract.crops import chosen_size, crops_spec, open_crops, require_crops
from emkum.stage1_extract.scans import ScanMemory

OnNonfinite = Literal["stop", "quarantine"]
StoreInputs = Literal["tokens", "crops"]
Cut = int | Literal["prenet"]
IMAGE_TARGETS = ("cls", "patches", "mean", "layers", "logits")
TEXT_TARGETS = ("cls", "patches", "mean", "layers")
MAX_SECONDS = 600.0  # attention takes memory by the square of a clip's length
DEFAULT_TEXT_ENCODER = "bert-base"
DEFAULT_DATA = ("./data",)
DEFAULT_SIZE = 224


@dataclass(frozen=True)
class ExtractConfig:
    """One `emkum extract`. None: the default the help text states.

    cut: after how many blocks; "prenet": after those that belong to the modality's encoder. layers: the rule of the
    target `layers`, as `rule_from_text` reads it. logits_top: keep so many of the logits, in place of all.
    """

    teacher: tuple[str, ...]
    data: tuple[str, ...] = DEFAULT_DATA
    cache: Path | str = Path("./shards")
    split: str = "train"
    encoder: str | None = None
    cut: Cut = 0
    store_inputs: StoreInputs = "tokens"
    from_crops: bool = False
    text_encoder: str | None = None
    targets: tuple[str, ...] = ()
    layers: str | None = None
    logits_top: int | None = None
    name: str | None = None
    size: int | None = None
    crop: tuple[float, float] | None = None
    flip: bool = False
    jitter: float = 0.0
    seed: int = 0
    views: int = 1
    storage: str = "float16"
    compute: str = "auto"
    max_tokens: int = 64
    max_seconds: float = 30.0
    batch_size: int = 32
    threads: int | None = None
    rows_per_block: int | None = None
    max_bad: float = 0.001
    on_nonfinite: OnNonfinite = "stop"
    on_truncated: OnTruncated = "error"
    allow_missing_eof: bool = False
    join: bool = False
    workers: int | None = None
    scheduler: str | None = None
    device: str = "auto"
    label_free: bool = False
    text_free: bool = False
    allow_teacher: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_split_name(self.split)
        _require(bool(self.teacher), "no teacher was named", "for example --teacher dinov2-s; `--teacher FOLDER` works")
        _require(self.storage in STORAGES, f"--storage {self.storage}", f"choose one of {', '.join(STORAGES)}")
        computes = ("auto", "float32", "bfloat16", "float16")
        _require(self.compute in computes, f"--compute {self.compute}", f"choose one of {', '.join(computes)}")
        unknown = [t for t in self.targets if t not in TARGETS]
        _require(not unknown, f"unknown target {', '.join(unknown)}", f"choose from {', '.join(TARGETS)}")
        _require(0 <= self.max_bad <= 1, f"--max-bad {self.max_bad}", "give a fraction between 0 and 1")
        _require(self.threads is None or self.threads > 0, f"--threads {self.threads}", "give 1 or more")
        _require(self.batch_size > 0, f"--batch-size {self.batch_size}", "give a positive number")
        _require(self.views > 0, f"--views {self.views}", "give a positive number")
        _require(0 < self.side <= 4096, f"--size {self.size}", "give the crop's side in pixels, 1 to 4096")
        _require(
            self.cut == "prenet" or (type(self.cut) is int and self.cut >= 0),
            f"--cut {self.cut}",
            "0 keeps patch embeddings, k the tokens after block k, prenet those after the encoder's prenet blocks",
        )
        for modality in ("image", "text", "audio") if self.layers is not None else ():
            rule_from_text(str(self.layers), modality)  # raises UsageError for what is no rule
        top = self.logits_top
        _require(top is None or top > 0, f"--logits-top {top}", "give how many of the largest logits to keep")
        crops = self.store_inputs == "crops"
        _require(
            self.store_inputs in ("tokens", "crops"),
            f"--store-inputs {self.store_inputs}",
            "choose tokens (the default) or crops",
        )
        _require(
            not crops or self.cut == 0,
            f"--store-inputs crops with --cut {self.cut}",
            f"crops serve every cut: leave --cut out, and choose it in training with --set data.cut={self.cut}",
        )
        _require(
            not crops or self.encoder != "none",
            "--store-inputs crops with --encoder none",
            "name the encoder that training starts from, or leave --store-inputs out to keep targets only",
        )
        _require(
            not self.from_crops or self.data in ((), DEFAULT_DATA),
            f"--from-crops with --data {' '.join(self.data)}",
            "from the crops of the cache no tar is read: leave one of them out",
        )
        _require(
            self.max_tokens > 0 and self.max_tokens % TEXT_TILE == 0,
            f"--max-tokens {self.max_tokens}",
            f"give a multiple of {TEXT_TILE}",
        )
        _require(
            0.1 <= self.max_seconds <= MAX_SECONDS,
            f"--max-seconds {self.max_seconds:g}",
            f"give 0.1 to {MAX_SECONDS:g}; cut longer recordings into clips",
        )
        rows = self.rows_per_block
        _require(
            rows is None or (0 < rows <= MAX_ROWS_PER_BLOCK and rows % 16 == 0),
            f"--rows-per-block {rows}",
            f"give a multiple of 16, at most {MAX_ROWS_PER_BLOCK}",
        )
        _require(
            self.on_nonfinite in ("stop", "quarantine"),
            f"--on-nonfinite {self.on_nonfinite}",
            "choose stop (the default) or quarantine",
        )
        _require(
            self.on_truncated in ("error", "keep-complete"),
            f"--on-truncated {self.on_truncated}",
            "choose error (the default) or keep-complete",
        )
        _require(self.workers is None or self.workers > 0, f"--workers {self.workers}", "give 1 or more")
        _require(
            self.scheduler is None or is_url(self.scheduler),
            f"--scheduler {self.scheduler}",
            "give the address that `dask scheduler` prints, as tcp://host:8786",
        )
        if self.crop is not None:
            low, high = self.crop
            _require(0 < low <= high <= 1, f"--crop {low}-{high}", "give area fractions, as 0.9-1.0 or 1.0")
        if self.name is not None:
            _require(len(self.teacher) == 1, "--name with several teachers", "name one teacher per command")
            check_cache_name(self.name)
        _ = self.policy  # raises UsageError for crops, jitter and views that cannot be
        _ = self.guard

    @property
    def side(self) -> int:
        """Of the square crops, in pixels."""
        return DEFAULT_SIZE if self.size is None else self.size

    @property
    def guard(self) -> Guard:
        """What the networks of the run may have learned from."""
        return Guard(self.label_free, self.text_free, self.allow_teacher)

    @property
    def policy(self) -> ViewPolicy:
        """The split's view policy: random crops of 0.9 to 1 of the area for `train`, the centre square otherwise."""
        crop = self.crop or ((0.9, 1.0) if self.split == "train" else (1.0, 1.0))
        return ViewPolicy(crop=crop, flip=self.flip, jitter=self.jitter, seed=self.seed, count=self.views)


@dataclass(frozen=True)
class PlannedField:
    """A field this run fills: where its rows come from and how they are stored."""

    spec: FieldSpec
    fingerprint: Fingerprint
    wanted: Wanted | None  # None: boxes, crops and token ids, which no network computes
    environment: dict[str, Any]


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
    networks: _Networks
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
    networks = _load_networks(config)
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
    networks = _complete(networks, config, has_pictures, has_captions)
    _require_sounds(networks, config, has_sounds)
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
    fields, image_pass, text_pass = _fields(
        config, networks, found.device, writer, found.has_pictures, found.has_captions, crops
    )
    sounds, audio_pass = _audio_fields(config, networks, found.device, writer)
    fields |= sounds
    _require_used(config, [field.wanted for field in fields.values() if field.wanted])
    guard = config.guard.record()
    fields = {name: replace(field, environment=field.environment | guard) for name, field in fields.items()}
    for field in fields.values():
        _check_record(writer, field)
    writer.clear_unfinished(claims)
    writer.require_segments()
    receipts = {name: writer.receipts(name) for name in fields}
    new = {name for name, found in receipts.items() if not found and writer.field_record(name) is None}
    notes = () if config.targets else tuple(_new_defaults(writer, fields, new))
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
    _keep_networks(writer, networks)
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
    image_pass, text_pass = (_narrowed(p, fields, missing) for p in (image_pass, text_pass))
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


# --- networks ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Networks:
    encoder: Network | None  # images
    text_encoder: Network | None
    teachers: tuple[Network, ...]

    @property
    def tokenizer(self) -> Network | None:
        """The text network whose tokenizer makes the ids."""
        if self.text_encoder is not None:
            return self.text_encoder
        return next((t for t in self.teachers if t.modality == "text"), None)

    @property
    def text_teachers(self) -> list[Network]:
        return [t for t in self.teachers if t.modality == "text"]

    @property
    def audio_teachers(self) -> list[Network]:
        return [t for t in self.teachers if t.modality == "audio"]

    @property
    def image_teachers(self) -> list[Network]:
        return [t for t in self.teachers if t.modality == "image"]


def _load_networks(config: ExtractConfig) -> _Networks:
    loaded: dict[str, Network] = {}

    def load(source: str, name: str | None = None) -> Network:
        if source not in loaded:
            entry = read_source(source).entry
            _refuse_pairs(source, entry.modality if entry else None)  # before gigabytes of it are fetched
            loaded[source] = load_network(source, name=name)
            config.guard.check_loaded(source, loaded[source].supervision, loaded[source].modality)
            _refuse_pairs(source, loaded[source].modality)
            check_cache_name(loaded[source].name)
        return loaded[source]

    teachers = tuple(load(source, config.name) for source in config.teacher)
    encoder = load(config.encoder) if config.encoder and config.encoder != "none" else None
    if encoder is not None and encoder.modality != "image":
        raise UsageError(
            f"--encoder {config.encoder} is a {encoder.modality} network", "give it as --text-encoder instead"
        )
    text_encoder = None
    if config.text_encoder and config.text_encoder != "none":
        text_encoder = load(config.text_encoder)
        if text_encoder.modality != "text":
            raise UsageError(
                f"--text-encoder {config.text_encoder} is an {text_encoder.modality} network",
                "give a text network, for example bert-base or minilm",
            )
    return _Networks(encoder, text_encoder, teachers)


def _refuse_pairs(source: str, modality: Modality | None) -> None:
    if modality == "pair":
        towers = source.removesuffix("-pair") if source in CATALOGUE else source.removesuffix("#pair")
        raise UsageError(
            f"{source} takes a picture with its caption; extract keeps fields of pictures and fields of texts",
            f"name its towers: --teacher {towers} for pictures, --teacher '{towers}#text' for texts",
        )


def _complete(networks: _Networks, config: ExtractConfig, has_pictures: bool, has_captions: bool) -> _Networks:
    """Fills in the encoders that were not named: the first teacher of the modality, or bert-base for captions.

    From crops neither: the cache holds the student's inputs. But a text teacher needs its own ids.
    """
    encoder, text_encoder = networks.encoder, networks.text_encoder
    wants_inputs = config.encoder != "none" and not config.from_crops
    if has_pictures and encoder is None and networks.image_teachers and wants_inputs:
        encoder = next((t for t in networks.image_teachers if t.depth), None)
        if encoder is None:
            raise UsageError(
                f"teacher {networks.image_teachers[0].name} has no Transformer blocks that a student could start from",
                "name the student's encoder, for example --encoder dinov2-s, or --encoder none to keep targets only",
            )
    if config.store_inputs == "crops" and encoder is None and has_pictures and not config.from_crops:
        raise UsageError(
            "--store-inputs crops without a network that reads pictures",
            "name the one that training starts from, for example --encoder dinov2-s",
        )
    _require_known_inside(encoder, "--encoder")
    _require_known_inside(text_encoder, "--text-encoder")
    if encoder is not None and _blocks_before(config.cut, encoder) > encoder.depth:
        raise UsageError(
            f"--cut {config.cut} of {encoder.name}, which has {encoder.depth} blocks",
            f"choose a cut between 0 (patch embeddings) and {encoder.depth}",
        )
    if has_captions and text_encoder is None and config.text_encoder != "none":
        if networks.text_teachers:
            text_encoder = next((t for t in networks.text_teachers if not isinstance(t.backbone, WholeNetwork)), None)
            if text_encoder is None:
                raise UsageError(
                    f"teacher {networks.text_teachers[0].name} is run in one piece: it has no blocks that a student "
                    "could start from",
                    "name the student's --text-encoder, with the same tokenizer, or --text-encoder none to keep "
                    "targets only",
                )
        elif encoder is not None and not config.from_crops:  # the ids lie there already
            text_encoder = _default_text_encoder()
    if networks.image_teachers and not has_pictures:
        raise NoData(
            f"teacher {networks.image_teachers[0].name} reads pictures and the data has none",
            "give tars with jpg, jpeg, png or webp members, or a text teacher",
        )
    if networks.text_teachers and not has_captions:
        raise MissingCaptions(
            f"teacher {networks.text_teachers[0].name} reads captions and the data has none",
            "give tars with txt members, or json members with `captions` or `caption`",
        )
    return _Networks(encoder if has_pictures else None, text_encoder if has_captions else None, networks.teachers)


def _require_sounds(networks: _Networks, config: ExtractConfig, has_sounds: bool) -> None:
    """Raises unless the teachers of sounds, if there are any, can hear some."""
    if not networks.audio_teachers:
        return
    teacher = networks.audio_teachers[0]
    if config.from_crops:
        raise UsageError(
            f"teacher {teacher.name} hears sounds, and --from-crops reads no tar",
            "name the tars: --data in place of --from-crops",
        )
    if not has_sounds:
        raise NoData(
            f"teacher {teacher.name} hears sounds and the data has none",
            "give tars with wav or flac members",
        )
    require_decoder()


def _require_rows(segments: Sequence[Segment], with_sounds: Collection[str]) -> None:
    """Raises IdentityMismatch if a segment was made of tars that hold sounds, and has no rows for them."""
    for segment in segments:
        unheard = [source.tar for source in segment.sources if source.tar in with_sounds]
        if unheard and not segment.audio.rows:
            raise IdentityMismatch(
                f"{unheard[0]} holds sounds, and segment {segment.number} was made of it by an emkum that read none",
                "extract the sounds into another folder with --cache, or write their tars again under another name",
            )


def _require_known_inside(encoder: Network | None, flag: str) -> None:
    """Raises UnsupportedNetwork for an encoder that is run in one piece."""
    if encoder is not None and isinstance(encoder.backbone, WholeNetwork):
        raise UnsupportedNetwork(
            f"{flag} {encoder.name}: it is run in one piece ({encoder.family}), so no cut of it is known",
            f"name another, for example {flag} {'dinov2-s' if encoder.modality == 'image' else DEFAULT_TEXT_ENCODER}; "
            "it can be the teacher",
        )


def _blocks_before(cut: Cut, encoder: Network) -> int:
    """The blocks in front of the cut. Raises UsageError for `prenet` of a network that has none."""
    if cut != "prenet":
        return cut
    if not num_prenet(encoder):
        raise UsageError(
            f"--cut prenet of {encoder.name}, a {encoder.family} network, which has no prenet blocks",
            f"choose a number between 0 (patch embeddings) and {encoder.depth}",
        )
    return num_prenet(encoder)


def _default_text_encoder() -> Network:
    try:
        return load_network(DEFAULT_TEXT_ENCODER)
    except WeightsUnavailable as error:
        raise WeightsUnavailable(
            f"the data has captions, and their text encoder, by default {DEFAULT_TEXT_ENCODER}, is not to be had: "
            + error.what,
            f"{error.way_out.replace('--teacher', '--text-encoder')}; or choose another, for example "
            "--text-encoder minilm, or --text-encoder none",
        ) from error


def _keep_networks(writer: CacheWriter, networks: _Networks) -> None:
    """Stores the frozen encoders in the cache, so that training needs nothing else."""
    store = writer.store
    for network in (networks.encoder, networks.tokenizer):
        if network is None:
            continue
        record = f"{model_dir(network.name)}/model.json"
        if not exists(store, record):
            needed = sum(tensor.numel() * 4 for tensor in network.backbone.state_dict().values())
            free = store.free_bytes()
            if free is not None and needed > free:
                raise StorageFailure(
                    f"{store.url} keeps the network {network.name} in {needed:,} bytes, {free:,} are free",
                    f"free {needed - free:,} bytes more, or write to another folder with --cache",
                )
            writer.keep_network(network.name, network_files(network))
            continue
        try:
            kept = loads(store.read(record))
            weights, shape = str(kept["weights_sha256"]), kept["architecture"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptCache(
                f"{store.where(record)} cannot be read: {error}",
                f"`emkum cache repair {store.url}` drops this network; the same command keeps it again",
            ) from error
        if weights != network.weights_sha256 or shape != network.backbone.spec.to_json():
            raise FingerprintMismatch(
                f"{store.url} keeps a network {network.name} with weights {weights[:12]}...; this one has "
                f"{network.weights_sha256[:12]}..." + (", another shape" if weights == network.weights_sha256 else ""),
                "give this network another name with --name or in its config, or write to another folder with --cache",
            )


# --- fields --------------------------------------------------------------------------------------------


def _fields(
    config: ExtractConfig,
    networks: _Networks,
    device: torch.device,
    writer: CacheWriter,
    has_pictures: bool,
    has_captions: bool,
    crops: Field | None,
) -> tuple[dict[str, PlannedField], FrozenPass | None, FrozenPass | None]:
    fields: dict[str, PlannedField] = {}
    image_pass = text_pass = None
    if has_pictures and (networks.encoder or networks.image_teachers):
        if crops is None:
            fields |= _fields_of_views(config)
        decoder = DECODER if crops is None else crops.fingerprint["decoder"]
        encoder = networks.encoder
        if config.store_inputs == "crops" and encoder is not None and isinstance(encoder.backbone, Backbone):
            encoder.backbone.grid(config.side, config.side)  # raises UsageError unless its patches fill the crops
        members = _unique([encoder, *networks.image_teachers])
        wanted = _image_wanted(config, networks)
        outputs: Sequence[torch.Tensor] = ()
        if wanted:
            image_pass = FrozenPass(members, list(wanted), _compute(config, device, writer, wanted), device)
            outputs = image_pass.pictures(torch.zeros(1, config.side, config.side, 3, dtype=torch.uint8))
        for (want, (name, kind)), output in zip(wanted.items(), outputs, strict=True):
            assert image_pass is not None
            network = image_pass.networks[want.network]
            spec = _spec(config, name, kind, want, output)
            assert network.preprocessing is not None
            fingerprint = Fingerprint(
                **_common(spec, network, want, image_pass.compute),
                size=config.side,
                mean=network.preprocessing.mean,
                std=network.preprocessing.std,
                decoder=decoder,
            )
            fields[name] = PlannedField(spec, fingerprint, want, _environment(network, device, want.what))
    if has_captions and networks.tokenizer is not None and (networks.text_encoder or networks.text_teachers):
        source = networks.tokenizer
        if source.tokenizer is None:
            raise UnsupportedNetwork(f"{source.name} comes without a tokenizer", "give a folder that has one")
        longest = _longest(source)
        if config.max_tokens > longest:
            raise UsageError(
                f"--max-tokens {config.max_tokens}, and {source.name} has {longest} positions",
                f"give at most {longest // TEXT_TILE * TEXT_TILE}",
            )
        tokenizer_digest = hashlib.sha256(source.tokenizer).hexdigest()
        ids = FieldSpec(f"text/{source.name}/ids", "ids", "int32", (config.max_tokens,))
        fields[ids.name] = PlannedField(
            ids,
            Fingerprint("ids", "int32", ids.row_shape, tokenizer=tokenizer_digest, max_tokens=config.max_tokens),
            None,
            _environment(source, device),
        )
        wanted = _text_wanted(config, networks)
        if wanted:
            text_pass = FrozenPass(
                networks.text_teachers, list(wanted), _compute(config, device, writer, wanted), device
            )
            mask = torch.ones(1, config.max_tokens, dtype=torch.bool)
            outputs = text_pass.texts(torch.zeros(1, config.max_tokens, dtype=torch.int64), mask)
            for (want, (name, kind)), output in zip(wanted.items(), outputs, strict=True):
                network = text_pass.networks[want.network]
                if network.tokenizer is None:
                    raise UnsupportedNetwork(f"{network.name} comes without a tokenizer", "give a folder that has one")
                if keys := differing_tokenizers(network.tokenizer, source.tokenizer):
                    raise UsageError(
                        f"teacher {network.name} and text encoder {source.name} have different tokenizers: they differ "
                        f"in {', '.join(keys)}",
                        "use a teacher and a --text-encoder with the same tokenizer, or --text-encoder none",
                    )
                spec = _spec(config, name, kind, want, output)
                fingerprint = Fingerprint(
                    **_common(spec, network, want, text_pass.compute),
                    tokenizer=tokenizer_digest,
                    max_tokens=config.max_tokens,
                )
                fields[name] = PlannedField(spec, fingerprint, want, _environment(network, device, want.what))
    return fields, image_pass, text_pass


def _audio_fields(
    config: ExtractConfig, networks: _Networks, device: torch.device, writer: CacheWriter
) -> tuple[dict[str, PlannedField], AudioPass | None]:
    teachers = _unique(networks.audio_teachers)
    if not teachers:
        return {}, None
    wanted: dict[Wanted, tuple[str, Kind]] = {}
    for teacher in teachers:
        targets = [target for target in _targets(config, teacher) if target in AUDIO_TARGETS]
        if not targets:
            raise UsageError(
                f"--targets {','.join(config.targets)} of {teacher.name}, which hears sounds",
                f"choose from {', '.join(AUDIO_TARGETS)}",
            )
        for target in targets:
            kind: Kind = "audio_pooled" if target == "mean" else "audio_ragged"
            wanted[_wanted_of(config, teacher, target)] = (f"teacher/{teacher.name}/audio/{target}", kind)
    audio_pass = AudioPass(teachers, list(wanted), _compute(config, device, writer, wanted), device)
    rate = audio_pass.rate
    fields = {}
    for want, (name, kind) in wanted.items():
        network, spec = audio_pass.networks[want.network], audio_pass.backbone(want).spec
        frames = spec.num_frames(round(config.max_seconds * rate))
        positions = -(-max(frames, 1) // TEXT_TILE) * TEXT_TILE
        shape = (spec.width,) if kind == "audio_pooled" else (positions, spec.width)
        field = FieldSpec(name, kind, config.storage, shape)
        fingerprint = Fingerprint(
            **_common(field, network, want, audio_pass.compute),
            decoder=SOUND_DECODER,
            max_seconds=float(config.max_seconds),
        )
        environment = _environment(network, device, want.what) | decoder_versions()
        fields[name] = PlannedField(field, fingerprint, want, environment)
    return fields, audio_pass


def _spec(config: ExtractConfig, name: str, kind: Kind, want: Wanted, output: torch.Tensor) -> FieldSpec:
    if kind != "top_logits":
        return FieldSpec(name, kind, config.storage, tuple(output.shape[1:]))
    # So few numbers that int8 with its statistics would save nothing.
    return FieldSpec(name, kind, "float16" if config.storage == "int8" else config.storage, (want.top + 1,))


def _require_used(config: ExtractConfig, wanted: Sequence[Wanted]) -> None:
    """Raises UsageError for a flag that says how a target is made which no field of the run is."""
    targets = {want.what for want in wanted}
    if config.layers is not None and "layers" not in targets:
        raise UsageError(
            f"--layers {config.layers}, and layers is no target of {', '.join(config.teacher)} here",
            "add it: --targets layers",
        )
    if config.logits_top is not None and "top_logits" not in targets:
        raise UsageError(
            f"--logits-top {config.logits_top}, and no teacher of {', '.join(config.teacher)} has logits",
            "name a classifier as --teacher, for example resnet50, or leave --logits-top out",
        )


def _fields_of_views(config: ExtractConfig) -> dict[str, PlannedField]:
    """Boxes, and crops if they are kept."""
    boxes = FieldSpec(f"views/{config.policy.name}/boxes", "boxes", "float32", (len(fields_of(Box)),))
    found = {
        boxes.name: PlannedField(boxes, Fingerprint("boxes", "float32", boxes.row_shape, decoder=DECODER), None, {})
    }
    if config.store_inputs == "crops":
        crops = crops_spec(config.side)
        fingerprint = Fingerprint("crops", "uint8", crops.row_shape, size=config.side, decoder=DECODER)
        found[crops.name] = PlannedField(
            crops, fingerprint, None, {"emkum": emkum.__version__, "pillow": PIL.__version__}
        )
    return found


def _narrowed(whole: FrozenPass | None, fields: dict[str, PlannedField], missing: set[str]) -> FrozenPass | None:
    """The pass without the outputs whose blocks are all committed; None if nothing is left."""
    if whole is None:
        return None
    kept = [f.wanted for name, f in fields.items() if name in missing and f.wanted in whole.wanted]
    if not kept or len(kept) == len(whole.wanted):
        return whole if kept else None
    return FrozenPass(list(whole.networks.values()), [w for w in kept if w], whole.compute, whole.device)


def _image_wanted(config: ExtractConfig, networks: _Networks) -> dict[Wanted, tuple[str, Kind]]:
    wanted: dict[Wanted, tuple[str, Kind]] = {}
    if networks.encoder is not None and config.store_inputs == "tokens":
        name = networks.encoder.name
        cut = _blocks_before(config.cut, networks.encoder)
        wanted[Wanted(name, "tokens", cut)] = (f"image/{name}@{cut}/tokens", "tokens")
    for teacher in networks.image_teachers:
        for target in _targets(config, teacher):
            kind: Kind = "tokens" if target in ("patches", "layers") else "pooled"
            kind = "top_logits" if target == "logits-top" else kind
            wanted[_wanted_of(config, teacher, target)] = (f"teacher/{teacher.name}/image/{target}", kind)
    return wanted


def _text_wanted(config: ExtractConfig, networks: _Networks) -> dict[Wanted, tuple[str, Kind]]:
    wanted: dict[Wanted, tuple[str, Kind]] = {}
    for teacher in networks.text_teachers:
        targets = [target for target in _targets(config, teacher) if target in TEXT_TARGETS]
        if not targets:
            raise UsageError(
                f"--targets {','.join(config.targets)} of {teacher.name}, a text network",
                f"choose from {', '.join(TEXT_TARGETS)}",
            )
        for target in targets:
            kind: Kind = "text_pooled" if target in ("cls", "mean") else "ragged"
            wanted[_wanted_of(config, teacher, target)] = (f"teacher/{teacher.name}/text/{target}", kind)
    return wanted


def _wanted_of(config: ExtractConfig, teacher: Network, target: str) -> Wanted:
    what = TARGETS[target]
    top = config.logits_top if what == "top_logits" else None
    return Wanted(teacher.name, what, top=top or 0, rule=_rule(config, teacher) if what == "layers" else None)


def _rule(config: ExtractConfig, teacher: Network) -> LayersRule:
    if config.layers is None:
        return default_rule(teacher)
    return rule_of(teacher, config.layers)


def _targets(config: ExtractConfig, teacher: Network) -> list[str]:
    """What is kept of a teacher, by the last part of the fields' names: as named, else its default.

    With --logits-top the largest logits, in place of all where those were asked for.
    """
    chosen = list(config.targets or _default_targets(teacher))
    if config.logits_top is None:
        return chosen
    if config.targets and "logits" not in chosen and num_classes(teacher):
        chosen.append("logits")
    return ["logits-top" if target == "logits" else target for target in chosen]


def _longest(network: Network) -> int:
    """The most tokens of a text that the network has positions for."""
    if isinstance(network.backbone, WholeNetwork):
        return network.backbone.spec.max_tokens
    assert isinstance(network.backbone, Backbone)
    assert isinstance(network.backbone.embedding, TextEmbedding)
    return network.backbone.embedding.max_tokens


def _default_targets(teacher: Network) -> tuple[str, ...]:
    """What is kept of a teacher if the user does not say: what the catalogue says, else its family."""
    if isinstance(teacher.backbone, WholeNetwork):
        return teacher.backbone.spec.default_targets
    entry, family = CATALOGUE.get(teacher.name), family_named(teacher.family, teacher.modality)
    if entry is not None and (entry.family, entry.modality) == (teacher.family, teacher.modality):
        return entry.targets
    if family is not None:
        return family.default_targets
    if teacher.modality == "text":
        return ("layers",)
    if teacher.modality == "audio":
        return ("mean", "layers")
    return ("cls", "patches") if teacher.depth else ("cls", "logits")


def _common(spec: FieldSpec, network: Network, want: Wanted, compute: str) -> dict[str, Any]:
    averaged = "patch tokens" if network.modality == "image" else "real tokens, special ones among them,"
    pools_first = getattr(network.backbone.spec, "pooled", "first") == "first"
    outputs = {
        "tokens": f"tokens after block {want.cut}" if want.cut else "patch embeddings, positions, CLS",
        "cls": f"{'CLS' if pools_first else 'the end of the text'} after the final norm",
        "patches": "patch tokens after the final norm",
        "mean": f"mean of the {averaged} after the final norm",
        "layers": want.rule.words if want.rule else "",
        "logits": "classifier logits",
        "top_logits": f"the {want.top} largest classifier logits, log-sum-exp of the others",
    } | (AUDIO_OUTPUTS if network.modality == "audio" else {})
    exact = want.what in ("logits", "top_logits") and compute != "float32" and _has_exact_logits(network)
    # A field without an entry has the rule of the thesis: so had all, before there were others.
    other_rule = want.rule if want.rule != named_rule("thesis", network.modality) else None
    return {
        "kind": spec.kind,
        "storage": spec.storage,
        "row_shape": spec.row_shape,
        "weights": network.weights_sha256,
        "family": network.family,
        "architecture": hashlib.sha256(canonical_json(network.backbone.spec.to_json())).hexdigest(),
        "output": outputs[want.what] + (_EXACT if exact else ""),
        "compute": compute,
        "layers": other_rule.to_json() if other_rule else None,
    }


_EXACT = ", float32 head"


def _has_exact_logits(network: Network) -> bool:
    """Whether the classifier computes in float32 whatever the rest does."""
    backbone = network.backbone
    return bool(backbone.classifiers) if isinstance(backbone, WholeNetwork) else True


def _environment(network: Network, device: torch.device, what: str = "") -> dict[str, Any]:
    library: dict[str, Any] = {}
    if isinstance(network.backbone, WholeNetwork):
        library = {"library": network.backbone.version} if network.backbone.version else {}
        if network.backbone.labels and what in ("logits", "top_logits"):
            library["labels"] = list(network.backbone.labels)
    if what == "top_logits":
        library["classes"] = num_classes(network)
    return library | {
        "emkum": emkum.__version__,
        "torch": str(torch.__version__),
        "pillow": PIL.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "source": network.source,
        "revision": network.revision,
        "licence": network.licence,
        "supervision": network.supervision,
    }


def _compute(config: ExtractConfig, device: torch.device, writer: CacheWriter, wanted: dict[Wanted, Any]) -> str:
    """The type of matrix products: as asked; else as the cache's fields have it; else what the device is good at."""
    if config.compute != "auto":
        return config.compute
    for name, _ in wanted.values():
        record = writer.field_record(name)
        if record is not None and record["fingerprint"].get("compute"):
            return str(record["fingerprint"]["compute"])
    return good_compute(device)


def _check_record(writer: CacheWriter, field: PlannedField) -> None:
    """Refuses a field that the cache holds with another fingerprint, before anything is changed."""
    record = writer.field_record(field.spec.name)
    if record is not None:
        cached = record["fingerprint"]
        asked = replace(field.fingerprint, statistics=cached.get("statistics"))
        require_same(field.spec.name, cached, asked, writer.store.url, _way_back(field.spec, cached, asked))


_BESIDE = "give the teacher another name with --name, or write to another folder with --cache"


def _way_back(spec: FieldSpec, cached: dict[str, Any], asked: Fingerprint) -> str:
    """The flag that goes on with a field which differs from this run's in that alone; "" where there is none."""
    keys = set(differing(cached, asked.to_json()))
    if not keys or not keys <= {"layers", "output", "row_shape"}:
        return ""
    if "layers" in keys:
        modality = spec.name.split("/")[2]
        return (
            f"go on with the rule of the cache: --layers {rule_as_text(recorded_rule(cached, modality), modality)}; "
            f"or {_BESIDE}"
        )
    if spec.kind == "top_logits" and "row_shape" in keys:
        return f"go on with as many as the cache has: --logits-top {cached['row_shape'][0] - 1}; or {_BESIDE}"
    if asked.output == f"{cached.get('output')}{_EXACT}":
        return f"they were rounded to {asked.compute} by emkum 0.2 and are not any more: {_BESIDE}"
    return ""


def _new_defaults(writer: CacheWriter, fields: dict[str, PlannedField], new: Collection[str]) -> list[str]:
    """A line for every target that nobody named and that is new beside others of the same network: defaults change."""
    lines = []
    for name, field in fields.items():
        before = name.rpartition("/")[0]
        if name not in new or field.wanted is None or field.wanted.what in ("tokens", "top_logits"):
            continue
        others = {other: writer.field_record(f"{before}/{other}") for other in TARGETS}
        weights = field.fingerprint.weights
        there = [o for o, record in others.items() if record and record["fingerprint"].get("weights") == weights]
        if there:
            now = [other.rpartition("/")[2] for other in fields if other.startswith(f"{before}/")]
            lines.append(
                f"new field {name} beside {', '.join(there)}: the default targets of {field.wanted.network} are now "
                f"{', '.join(now)}; --targets {','.join(there)} goes on with what is there"
            )
    return lines


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


def _unique(networks: Sequence[Network | None]) -> list[Network]:
    found: dict[str, Network] = {}
    for network in networks:
        if network is None:
            continue
        other = found.setdefault(network.name, network)
        if other.weights_sha256 != network.weights_sha256:
            raise UsageError(
                f"two networks are called {network.name} and have different weights", "name one of them with --name"
            )
    return list(found.values())


def _require(good: bool, what: str, way_out: str) -> None:
    if not good:
        raise UsageError(what, way_out)
