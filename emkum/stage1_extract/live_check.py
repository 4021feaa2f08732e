"""A sample of a cache against the live networks: `emkum cache verify --sample N --teacher T`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emkum.errors import (
    CorruptCache,
    FingerprintMismatch,
    IncompleteCache,
    MissingField,
    NoData,
    SourceChanged,
    UsageError,
)
from emkum.models.audio_pass import AudioPass
from emkum.models.catalogue import load_network
from emkum.models.network import Network
from emkum.models.pair_pass import PairPass
from emkum.models.passes import TARGETS, FrozenPass, Wanted, chosen_device, wanted_target
from emkum.models.tokenizer import differing as differing_tokenizers
from emkum.shards.audit import printable
from emkum.shards.fingerprint import differences
from emkum.shards.layout import FORMAT, PAIRS, canonical_json
from emkum.shards.reader import Cache, Field
from emkum.shards.sounds import DECODER as SOUND_DECODER
from emkum.shards.sounds import require_decoder
from emkum.shards.store import Store
from emkum.shards.tars import find_tars
from emkum.shards.views import DECODER
from emkum.stage1_extract.crops import crops_spec
from emkum.stage1_extract.recompute import (
    MIN_COSINE,
    Compared,
    Place,
    Work,
    holds,
    recompute,
    rows_at_hand,
    segment_of,
)

DECODE_THREADS = 4
_FIELD = re.compile(
    r"image/(?P<encoder>.+)@(?P<cut>[0-9]+)/tokens|teacher/(?P<teacher>.+)/(?:image|text|pair|audio)/(?P<target>[a-z-]+)"
)
Progress = Callable[[int, int], None]  # rows computed so far, of all


@dataclass(frozen=True)
class SampleConfig:
    """What to draw and from where. data: where the tars lie now; empty: where they were extracted from."""

    rows: int
    teacher: tuple[str, ...]
    data: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int = 32
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.rows == 0 and self.teacher:
            raise UsageError("--teacher without --sample", "say how many rows to compute again: --sample 64")
        if self.rows < 1:
            raise UsageError(f"--sample {self.rows}", "give the number of rows to compute again, 1 or more")
        if not self.teacher:
            raise UsageError("--sample without --teacher", "name the network that the cache was made with")
        if self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size}", "give a positive number")


@dataclass(frozen=True)
class FieldSample:
    """What computing some rows of one field again gave. Cosines are None for boxes and ids, which must be equal.

    largest_error: of any number, storage included. storage_error: the largest that the rows' receipts state.
    """

    field: str
    rows: int
    lowest_cosine: float | None
    mean_cosine: float | None
    largest_error: float
    storage_error: float
    wrong: tuple[Compared, ...]


@dataclass(frozen=True)
class SampleReport:
    url: str
    device: str
    fields: tuple[FieldSample, ...]
    absent: tuple[str, ...]  # tars that are not at hand
    from_crops: bool  # whether the pictures of these came from the cache's crops; if not, no row of theirs was drawn

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "absent_tars": list(self.absent),
            "absent_tars_from_crops": self.from_crops,
            "fields": {sample.field: _field_json(sample) for sample in self.fields},
            "agrees": not any(sample.wrong for sample in self.fields),
        }


def load_teachers(place: Store | Path | str, config: SampleConfig) -> list[Network]:
    """The networks that were named. Raises as `check_sample` does where no field comes from one of them.

    A damaged cache is left to whoever reads it whole.
    """
    networks = [load_network(source) for source in config.teacher]
    with contextlib.suppress(CorruptCache):
        cache = Cache.open(place)
        for network in networks:
            _fields_of(cache, network)
    return networks


def check_sample(
    place: Store | Path | str,
    config: SampleConfig,
    networks: Sequence[Network],
    progress: Progress = lambda done, total: None,
) -> SampleReport:
    """Draws `config.rows` committed rows of every field that comes from these networks, and computes them again.

    Pictures of tars that are not at hand come from the cache's crops, if it keeps some of their size. Settings are
    the fields' own: crop size, views, compute type, tokenizer. Rows that do not agree are in the report.
    Raises MissingField where no field bears a network's name, FingerprintMismatch where one does and has other
    weights, SourceChanged for a tar that is not what it was, NoData if neither tars nor crops are at hand.
    """
    cache = Cache.open(place)
    fields = {name: network for network in networks for name in _fields_of(cache, network)}
    device = chosen_device(config.device)
    absent: set[str] = set()
    compared: dict[str, list[Compared]] = defaultdict(list)
    random = np.random.default_rng(config.seed)
    works = [_with_tars(cache, work, config.data, absent) for work in _works(cache, fields, device)]
    drawn = [_draw(cache, work, config.rows, random) for work in works]
    total, done = sum(map(len, drawn)), 0
    for work, chosen in zip(works, drawn, strict=True):
        before: Place | None = None
        for found in recompute(cache, work, chosen, config.batch_size, DECODE_THREADS):
            compared[found.field].append(found)
            if found.place != before:
                before, done = found.place, done + 1
                progress(min(done, total), total)
    unread = sorted(set(fields) - set(compared))
    if unread:
        raise IncompleteCache(
            f"{cache.store.url} holds no row of {', '.join(unread)} whose tar is at hand",
            "finish the extraction, or say where the tars lie: --data FOLDER",
        )
    samples = tuple(_summary(name, found) for name, found in sorted(compared.items()))
    from_crops = any(work.kept is not None for work in works)
    return SampleReport(cache.store.url, str(device), samples, tuple(sorted(absent)), from_crops)


def require_agreement(report: SampleReport) -> None:
    """Raises CorruptCache naming the first rows that do not agree."""
    wrong = [found for sample in report.fields for found in sample.wrong]
    if wrong:
        first = "; ".join(f"{found.field}, {found.name}: {found.problem}" for found in wrong[:3])
        raise CorruptCache(
            f"{report.url}: {len(wrong)} rows are not what their networks say: {first}",
            "`--json` lists all; the checksums of `emkum cache verify` tell damage from rows that were computed "
            "otherwise; then extract into another folder with --cache",
        )


def table(report: SampleReport) -> str:
    """The report as lines for a screen."""
    header = ("field", "rows", "lowest cosine", "mean cosine", "largest error", "storage alone", "verdict")
    rows: list[tuple[str, ...]] = [header]
    for sample in report.fields:
        cosines = ["-" if cosine is None else f"{cosine:.6f}" for cosine in (sample.lowest_cosine, sample.mean_cosine)]
        verdict = f"{len(sample.wrong)} rows disagree" if sample.wrong else "agrees"
        errors = [f"{error:.2g}" for error in (sample.largest_error, sample.storage_error)]
        rows.append((sample.field, f"{sample.rows:,}", *cosines, *errors, verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for sample in report.fields:
        lines += [f"{found.field}, {found.name}: {found.problem}" for found in sample.wrong[:10]]
        if len(sample.wrong) > 10:
            lines.append(f"and {len(sample.wrong) - 10} more of {sample.field}: --json lists all")
    if report.absent:
        what = "pictures from the cache's crops for" if report.from_crops else "no row of"
        lines.append(f"{what} {len(report.absent)} tars that are not at hand: {', '.join(report.absent[:5])}")
    lines.append(f"computed on {report.device}; a row agrees with a cosine of {MIN_COSINE} or more")
    return "\n".join(map(printable, lines))


# --- whose fields they are -------------------------------------------------------------------------------


def _fields_of(cache: Cache, network: Network) -> list[str]:
    """The fields that this network computed, by its weights. Its name alone is not enough."""
    named, found = [], []
    for field in cache.fields.values():
        parts = _FIELD.fullmatch(field.name)
        weights = field.fingerprint.get("weights")
        if parts is None or weights is None or parts["target"] not in (None, *TARGETS):
            continue
        if weights == network.weights_sha256:
            _require_same(cache, field, network)
            found.append(field.name)
        elif network.name in (parts["encoder"], parts["teacher"]):
            named.append(field)
    if not found and named:
        _require_same(cache, named[0], network)
    if not found:
        known = {
            parts["encoder"] or parts["teacher"]: str(field.fingerprint.get("weights"))[:12]
            for field in cache.fields.values()
            if (parts := _FIELD.fullmatch(field.name))
        }
        listed = ", ".join(f"{name} (weights {digest}...)" for name, digest in sorted(known.items()))
        raise MissingField(
            f"{cache.store.url} has no field of {network.name} (weights {network.weights_sha256[:12]}...); it has "
            f"fields of: {listed or 'no network'}",
            "name one of these with --teacher",
        )
    return found


def _require_same(cache: Cache, field: Field, network: Network) -> None:
    """Raises FingerprintMismatch if the network, or this emkum, computes the field differently today."""
    now: dict[str, Any] = {
        "format": FORMAT,
        "weights": network.weights_sha256,
        "family": network.family,
        "architecture": hashlib.sha256(canonical_json(network.backbone.spec.to_json())).hexdigest(),
        "decoder": SOUND_DECODER if field.space == "audio" else DECODER,
    }
    if network.preprocessing is not None:
        now |= {"mean": list(network.preprocessing.mean), "std": list(network.preprocessing.std)}
    cached = field.fingerprint
    if network.tokenizer is not None and cached.get("tokenizer"):
        kept = _kept_tokenizer(cache, cached["tokenizer"])  # may have other bytes and give the same ids
        same = kept is not None and not differing_tokenizers(network.tokenizer, kept)
        now["tokenizer"] = cached["tokenizer"] if same else hashlib.sha256(network.tokenizer).hexdigest()
    asked = cached | {key: value for key, value in now.items() if cached.get(key) is not None}
    found = differences(cached, asked)
    if found:
        raise FingerprintMismatch(
            f"{cache.store.url} field {field.name} was not computed with this {network.name}: " + "; ".join(found),
            "name the network that the cache was made with; `emkum cache info --json` shows where it came from",
        )


# --- what is computed together ---------------------------------------------------------------------------


def _works(cache: Cache, fields: Mapping[str, Network], device: Any) -> list[Work]:
    """Fields with the same settings share one pass; boxes and ids go with those they belong to."""
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name in fields:
        field, keys = cache.field(name), ("compute", "size", "tokenizer", "max_tokens", "max_seconds")
        reads = "pair" if PAIRS.fullmatch(name) else field.space
        groups[reads, *(field.fingerprint.get(key) for key in keys)].append(name)
    works = []
    for (reads, compute, size, tokenizer, max_tokens, max_seconds), names in groups.items():
        networks = {fields[name].name: fields[name] for name in names}
        wanted: dict[str, Wanted | None] = {name: _wanted(cache.field(name), fields[name]) for name in names}
        outputs = list(dict.fromkeys(want for want in wanted.values() if want is not None))
        if reads == "audio":
            require_decoder()
            sounds = AudioPass(list(networks.values()), outputs, compute, device)
            works.append(Work("audio", wanted, None, {}, audio_pass=sounds, max_seconds=max_seconds))
            continue
        if reads == "pair":
            pairs = PairPass(list(networks.values()), outputs, compute, device)
            content, kept = _tokenizer(cache, tokenizer, networks.values()), cache.fields.get(crops_spec(size).name)
            read = {"tokenizer": content, "max_tokens": max_tokens, "size": size, "kept": kept}
            works.append(Work("text", wanted, None, {}, **read, pair_pass=pairs))
            continue
        frozen = FrozenPass(list(networks.values()), outputs, compute, device)
        if reads == "image":
            policies = {segment.views.name for segment in cache.segments if segment.image.rows}
            boxes = [f"views/{policy}/boxes" for policy in sorted(policies)]
            crops = crops_spec(size).name
            wanted |= {name: None for name in (*boxes, crops) if name in cache.fields}
            works.append(Work("image", wanted, frozen, {}, size=size, kept=cache.fields.get(crops)))
        else:
            ids = [f for f in cache.fields.values() if f.kind == "ids" and f.fingerprint.get("tokenizer") == tokenizer]
            wanted |= {field.name: None for field in ids if field.fingerprint.get("max_tokens") == max_tokens}
            content = _tokenizer(cache, tokenizer, networks.values())
            works.append(Work("text", wanted, frozen, {}, tokenizer=content, max_tokens=max_tokens))
    return works


def _wanted(field: Field, network: Network) -> Wanted:
    parts = _FIELD.fullmatch(field.name)
    assert parts is not None
    if parts["encoder"]:
        return Wanted(network.name, "tokens", int(parts["cut"]))
    return wanted_target(network, parts["target"], field.fingerprint)


def _tokenizer(cache: Cache, digest: str, networks: Collection[Network]) -> bytes:
    """The tokenizer that the cache keeps, or the network's own, which is the same."""
    return _kept_tokenizer(cache, digest) or next(n.tokenizer for n in networks if n.tokenizer is not None)


def _kept_tokenizer(cache: Cache, digest: str) -> bytes | None:
    for model in cache.models:
        path = cache.model_dir(model) / "tokenizer.json"
        if path.is_file() and hashlib.sha256(content := path.read_bytes()).hexdigest() == digest:
            return content
    return None


# --- which rows ------------------------------------------------------------------------------------------


def _with_tars(cache: Cache, work: Work, data: Sequence[str], absent: set[str]) -> Work:
    """The work with the places of the tars; adds to `absent` those that lie nowhere."""
    if not work.reads_tars:
        return work
    given = {os.path.basename(path): path for path in find_tars(data)} if data else {}
    if given and not any(source.tar in given for segment in cache.segments for source in segment.sources):
        raise NoData(
            f"--data {' '.join(data)} holds none of the tars that {cache.store.url} was extracted from: "
            f"{', '.join(sorted(given)[:3])}",
            "say where those lie, or leave --data out where they have not moved",
        )
    paths = {}
    for segment in cache.segments:
        for source in segment.sources if segment.span(work.space).rows else ():
            path = given.get(source.tar, source.path)
            if not os.path.isfile(path):
                absent.add(source.tar)
                continue
            if os.path.getsize(path) != source.bytes:
                raise SourceChanged(
                    f"{path} has {os.path.getsize(path):,} bytes; the cache was extracted from {source.bytes:,}",
                    "say where the original lies: --data FOLDER",
                )
            paths[source.tar] = path
    if not paths and work.kept is None:
        raise NoData(
            f"none of the {len(absent)} tars that {cache.store.url} was extracted from is at hand",
            "say where they lie now: --data FOLDER",
        )
    return dataclasses.replace(work, paths=paths)


def _draw(cache: Cache, work: Work, count: int, random: np.random.Generator) -> dict[Place, tuple[str, ...]]:
    """`count` rows of every field that a network computes, the same ones where several hold them."""
    fields = [cache.field(name) for name, want in work.wanted.items() if want is not None]
    num_views = max(field.num_views for field in fields)
    at_hand = [rows_at_hand(cache, work, view) for view in range(num_views)]
    committed = {field.name: _codes(cache, field, at_hand, num_views) for field in fields}
    order = random.permutation(np.unique(np.concatenate(list(committed.values()))))
    chosen: dict[Place, list[str]] = defaultdict(list)
    for name, codes in committed.items():
        for code in order[np.isin(order, codes)][:count].tolist():
            chosen[Place(*divmod(code, num_views))].append(name)
    beside = [cache.field(name) for name, want in work.wanted.items() if want is None]
    for place, listed in chosen.items():
        listed += [f.name for f in beside if _belongs(cache, f, place) and holds(f, place, cache.rows_per_block)]
    return {place: tuple(listed) for place, listed in chosen.items()}


def _codes(cache: Cache, field: Field, at_hand: Sequence[np.ndarray], num_views: int) -> np.ndarray:
    """row * num_views + view of every committed row of the field that is at hand."""
    found = [np.empty(0, np.int64)]
    for view in range(field.num_views):
        rows = np.concatenate([field.rows(split, view) for split in cache.splits])
        found.append(np.intersect1d(rows, at_hand[view], assume_unique=True) * num_views + view)
    return np.concatenate(found)


def _belongs(cache: Cache, field: Field, place: Place) -> bool:
    """Boxes belong to the segments of one view policy."""
    return field.kind != "boxes" or field.name == f"views/{segment_of(cache, 'image', place.row).views.name}/boxes"


# --- the report ------------------------------------------------------------------------------------------


def _summary(name: str, found: Sequence[Compared]) -> FieldSample:
    cosines = [one.cosine for one in found if one.cosine is not None]
    return FieldSample(
        name,
        len(found),
        min(cosines, default=None),
        sum(cosines) / len(cosines) if cosines else None,
        max(one.error for one in found),
        max(one.storage_error for one in found),
        tuple(one for one in found if one.problem),
    )


def _field_json(sample: FieldSample) -> dict[str, Any]:
    return {
        "rows": sample.rows,
        "lowest_cosine": sample.lowest_cosine,
        "mean_cosine": sample.mean_cosine,
        "largest_error": _finite(sample.largest_error),
        "storage_error": sample.storage_error,
        "agrees": not sample.wrong,
        "wrong": [
            {
                "row": one.place.row,
                "view": one.place.view,
                "tar": one.tar,
                "key": one.key,
                "cosine": _finite(one.cosine),
                "error": _finite(one.error),
                "allowed": one.allowed,
                "problem": one.problem,
            }
            for one in sample.wrong
        ],
    }


def _finite(value: float | None) -> float | None:
    """JSON knows no inf and no NaN."""
    return value if value is not None and np.isfinite(value) else None
