"""The fields an extraction fills: what of which network they keep, and how it is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import fields as fields_of
from typing import Any

import PIL
import torch

import emkum
from emkum.errors import UnsupportedNetwork, UsageError
from emkum.models.audio_pass import AUDIO_OUTPUTS, AUDIO_TARGETS, AudioPass
from emkum.models.backbone import Backbone, TextEmbedding
from emkum.models.families.registry import CATALOGUE, family_named
from emkum.models.network import Network
from emkum.models.pair_pass import PAIR_TARGETS, PairPass, multiway, pair_output
from emkum.models.passes import (
    TARGETS,
    FrozenPass,
    Wanted,
    default_rule,
    good_compute,
    num_classes,
    rule_of,
)
from emkum.models.targets import LayersRule, named_rule
from emkum.models.tokenizer import differing as differing_tokenizers
from emkum.models.whole import WholeNetwork
from emkum.shards.fingerprint import Fingerprint
from emkum.shards.layout import (
    PAIRS,
    TEXT_TILE,
    FieldSpec,
    Kind,
    canonical_json,
)
from emkum.shards.reader import Field
from emkum.shards.sounds import DECODER as SOUND_DECODER
from emkum.shards.sounds import decoder_versions
from emkum.shards.views import DECODER, Box
from emkum.shards.writer import CacheWriter
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.crops import crops_spec
from emkum.stage1_extract.networks import Networks, blocks_before, unique

TEXT_TARGETS = ("cls", "patches", "mean", "layers")


@dataclass(frozen=True)
class PlannedField:
    """A field this run fills: where its rows come from and how they are stored."""

    spec: FieldSpec
    fingerprint: Fingerprint
    wanted: Wanted | None  # None: boxes, crops and token ids, which no network computes
    environment: dict[str, Any]

    @property
    def is_of_pairs(self) -> bool:
        """Whether a row is made of a caption and its picture."""
        return PAIRS.fullmatch(self.spec.name) is not None


def planned_fields(
    config: ExtractConfig,
    networks: Networks,
    device: torch.device,
    writer: CacheWriter,
    has_pictures: bool,
    has_captions: bool,
    crops: Field | None,
) -> tuple[dict[str, PlannedField], FrozenPass | None, FrozenPass | None]:
    """The fields of pictures alone and of captions alone, boxes, crops and ids among them, by name; their passes.

    crops: where the pictures come from, if not from tars. A pass is None where no field needs a network.
    Raises UsageError and UnsupportedNetwork for settings that a network cannot follow.
    """
    fields: dict[str, PlannedField] = {}
    image_pass = text_pass = None
    if has_pictures and (networks.encoder or networks.image_teachers):
        if crops is None:
            fields |= _fields_of_views(config)
        decoder = DECODER if crops is None else crops.fingerprint["decoder"]
        encoder = networks.encoder
        if config.store_inputs == "crops" and encoder is not None and isinstance(encoder.backbone, Backbone):
            encoder.backbone.grid(config.side, config.side)  # raises UsageError unless its patches fill the crops
        members = unique([encoder, *networks.image_teachers])
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
    if has_captions and networks.tokenizer is not None and networks.ids is not None:
        source = networks.tokenizer
        _require_positions(config, source)
        tokenizer_digest = hashlib.sha256(networks.ids.tokenizer).hexdigest()
        ids = FieldSpec(f"text/{networks.ids.name}/ids", "ids", "int32", (config.max_tokens,))
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
                _require_same_tokenizer(network, networks)
                spec = _spec(config, name, kind, want, output)
                fingerprint = Fingerprint(
                    **_common(spec, network, want, text_pass.compute),
                    tokenizer=tokenizer_digest,
                    max_tokens=config.max_tokens,
                )
                fields[name] = PlannedField(spec, fingerprint, want, _environment(network, device, want.what))
    return fields, image_pass, text_pass


def planned_pairs(
    config: ExtractConfig, networks: Networks, device: torch.device, writer: CacheWriter, crops: Field | None
) -> tuple[dict[str, PlannedField], PairPass | None]:
    """The fields of captions with their pictures, by name, and their pass; see `planned_fields`."""
    teachers, ids = unique(networks.pair_teachers), networks.ids
    if not teachers or ids is None:
        return {}, None
    wanted: dict[Wanted, tuple[str, Kind]] = {}
    for teacher in teachers:
        _require_same_tokenizer(teacher, networks)
        _require_positions(config, teacher)
        multiway(teacher).image.grid(config.side, config.side)  # raises UsageError unless its patches fill the crops
        for target in _targets_among(PAIR_TARGETS, config, teacher, "which reads a caption with its picture"):
            kind: Kind = "text_pooled" if target in ("cls", "mean") else "ragged"
            wanted[_wanted_of(config, teacher, target)] = (f"teacher/{teacher.name}/pair/{target}", kind)
    pair_pass = PairPass(teachers, list(wanted), _compute(config, device, writer, wanted), device)
    fields = {}
    for want, (name, kind) in wanted.items():
        network = pair_pass.networks[want.network]
        shape = (network.width,) if kind == "text_pooled" else (config.max_tokens, network.width)
        spec = FieldSpec(name, kind, config.storage, shape)
        assert network.preprocessing is not None
        fingerprint = Fingerprint(
            **_common(spec, network, want, pair_pass.compute),
            size=config.side,
            mean=network.preprocessing.mean,
            std=network.preprocessing.std,
            decoder=DECODER if crops is None else crops.fingerprint["decoder"],
            tokenizer=hashlib.sha256(ids.tokenizer).hexdigest(),
            max_tokens=config.max_tokens,
        )
        fields[name] = PlannedField(spec, fingerprint, want, _environment(network, device))
    return fields, pair_pass


def planned_sounds(
    config: ExtractConfig, networks: Networks, device: torch.device, writer: CacheWriter
) -> tuple[dict[str, PlannedField], AudioPass | None]:
    """The fields of sounds, by name, and their pass; see `planned_fields`."""
    teachers = unique(networks.audio_teachers)
    if not teachers:
        return {}, None
    wanted: dict[Wanted, tuple[str, Kind]] = {}
    for teacher in teachers:
        for target in _targets_among(AUDIO_TARGETS, config, teacher, "which hears sounds"):
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


def require_used(config: ExtractConfig, wanted: Sequence[Wanted]) -> None:
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


def narrowed(whole: FrozenPass | None, fields: dict[str, PlannedField], missing: set[str]) -> FrozenPass | None:
    """The pass without the outputs whose blocks are all committed; None if nothing is left."""
    if whole is None:
        return None
    kept = [f.wanted for name, f in fields.items() if name in missing and f.wanted in whole.wanted]
    if not kept or len(kept) == len(whole.wanted):
        return whole if kept else None
    return FrozenPass(list(whole.networks.values()), [w for w in kept if w], whole.compute, whole.device)


def _image_wanted(config: ExtractConfig, networks: Networks) -> dict[Wanted, tuple[str, Kind]]:
    wanted: dict[Wanted, tuple[str, Kind]] = {}
    if networks.encoder is not None and config.store_inputs == "tokens":
        name = networks.encoder.name
        cut = blocks_before(config.cut, networks.encoder)
        wanted[Wanted(name, "tokens", cut)] = (f"image/{name}@{cut}/tokens", "tokens")
    for teacher in networks.image_teachers:
        for target in _targets(config, teacher):
            kind: Kind = "tokens" if target in ("patches", "layers") else "pooled"
            kind = "top_logits" if target == "logits-top" else kind
            wanted[_wanted_of(config, teacher, target)] = (f"teacher/{teacher.name}/image/{target}", kind)
    return wanted


def _text_wanted(config: ExtractConfig, networks: Networks) -> dict[Wanted, tuple[str, Kind]]:
    wanted: dict[Wanted, tuple[str, Kind]] = {}
    for teacher in networks.text_teachers:
        for target in _targets_among(TEXT_TARGETS, config, teacher, "a text network"):
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


def _targets_among(allowed: Sequence[str], config: ExtractConfig, teacher: Network, what: str) -> list[str]:
    """`_targets`, without those that other teachers of the run have. what: the teacher is, in words."""
    chosen = [target for target in _targets(config, teacher) if target in allowed]
    if not chosen:
        raise UsageError(
            f"--targets {','.join(config.targets)} of {teacher.name}, {what}", f"choose from {', '.join(allowed)}"
        )
    return chosen


def _require_same_tokenizer(teacher: Network, networks: Networks) -> None:
    """Raises unless the teacher reads the ids that the run makes."""
    if teacher.tokenizer is None:
        raise UnsupportedNetwork(f"{teacher.name} comes without a tokenizer", "give a folder that has one")
    source = networks.tokenizer
    assert source is not None
    assert source.tokenizer is not None
    keys = differing_tokenizers(teacher.tokenizer, source.tokenizer)
    if keys and any(source is other for other in networks.teachers):
        raise UsageError(
            f"teachers {source.name} and {teacher.name} have different tokenizers: they differ in {', '.join(keys)}",
            "extract them in two commands",
        )
    if keys:
        raise UsageError(
            f"teacher {teacher.name} and text encoder {source.name} have different tokenizers: they differ "
            f"in {', '.join(keys)}",
            "use a teacher and a --text-encoder with the same tokenizer, or --text-encoder none",
        )


def _require_positions(config: ExtractConfig, network: Network) -> None:
    longest = _longest(network)
    if config.max_tokens > longest:
        raise UsageError(
            f"--max-tokens {config.max_tokens}, and {network.name} has {longest} positions",
            f"give at most {longest // TEXT_TILE * TEXT_TILE}",
        )


def _longest(network: Network) -> int:
    """The most tokens of a text that the network has positions for."""
    if isinstance(network.backbone, WholeNetwork):
        return network.backbone.spec.max_tokens
    if network.modality == "pair":
        return multiway(network).text.max_tokens
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
    if network.modality == "pair":
        outputs[want.what] = pair_output(network, want)
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
        "output": outputs[want.what] + (EXACT if exact else ""),
        "compute": compute,
        "layers": other_rule.to_json() if other_rule else None,
    }


EXACT = ", float32 head"


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
