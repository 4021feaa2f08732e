"""The frozen networks of an extraction: loaded, completed with the encoders nobody named, kept in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from emkum.errors import (
    CorruptCache,
    FingerprintMismatch,
    MissingCaptions,
    NoData,
    StorageFailure,
    UnsupportedNetwork,
    UsageError,
    WeightsUnavailable,
)
from emkum.models.backbone import Modality
from emkum.models.catalogue import load_network
from emkum.models.network import Network, network_files
from emkum.models.passes import num_prenet
from emkum.models.tokenizer import differing as differing_tokenizers
from emkum.models.whole import WholeNetwork
from emkum.shards.layout import check_cache_name, model_dir
from emkum.shards.ledger import read_field_records
from emkum.shards.sounds import require_decoder
from emkum.shards.store import Store, exists
from emkum.shards.strict_json import loads
from emkum.shards.writer import CacheWriter
from emkum.stage1_extract.config import Cut, ExtractConfig

DEFAULT_TEXT_ENCODER = "bert-base"


@dataclass(frozen=True)
class Ids:
    """The token ids of a run, `text/<name>/ids`, and the tokenizer.json that makes them."""

    name: str
    tokenizer: bytes


@dataclass(frozen=True)
class Networks:
    encoder: Network | None  # images
    text_encoder: Network | None
    teachers: tuple[Network, ...]
    ids: Ids | None = None  # see `with_ids`

    @property
    def tokenizer(self) -> Network | None:
        """The network whose tokenizer makes the ids, unless those of the cache do."""
        if self.text_encoder is not None:
            return self.text_encoder
        return next(iter([*self.text_teachers, *self.pair_teachers]), None)

    @property
    def kept(self) -> list[Network]:
        """Those that the cache keeps: what a student starts from, and what makes the ids."""
        source = self.tokenizer
        makes_ids = source is not None and self.ids is not None and self.ids.name == source.name
        return [network for network in (self.encoder, source if makes_ids else None) if network is not None]

    @property
    def text_teachers(self) -> list[Network]:
        return [t for t in self.teachers if t.modality == "text"]

    @property
    def pair_teachers(self) -> list[Network]:
        return [t for t in self.teachers if t.modality == "pair"]

    @property
    def audio_teachers(self) -> list[Network]:
        return [t for t in self.teachers if t.modality == "audio"]

    @property
    def image_teachers(self) -> list[Network]:
        return [t for t in self.teachers if t.modality == "image"]


def load_networks(config: ExtractConfig) -> Networks:
    loaded: dict[str, Network] = {}

    def load(source: str, name: str | None = None) -> Network:
        if source not in loaded:
            loaded[source] = load_network(source, name=name)
            config.guard.check_loaded(source, loaded[source].supervision, loaded[source].modality)
            check_cache_name(loaded[source].name)
        return loaded[source]

    teachers = tuple(load(source, config.name) for source in config.teacher)
    encoder = load(config.encoder) if config.encoder and config.encoder != "none" else None
    if encoder is not None and encoder.modality != "image":
        raise UsageError(
            f"--encoder {config.encoder} is {_KINDS[encoder.modality]}",
            "give it as --text-encoder instead"
            if encoder.modality == "text"
            else "give a network that reads pictures, for example dinov2-s; this one can be the teacher",
        )
    text_encoder = None
    if config.text_encoder and config.text_encoder != "none":
        text_encoder = load(config.text_encoder)
        if text_encoder.modality != "text":
            raise UsageError(
                f"--text-encoder {config.text_encoder} is {_KINDS[text_encoder.modality]}",
                "give a text network, for example bert-base or minilm",
            )
    return Networks(encoder, text_encoder, teachers)


_KINDS: dict[Modality, str] = {
    "image": "an image network",
    "text": "a text network",
    "audio": "an audio network",
    "pair": "a network of pairs",
}


def completed(networks: Networks, config: ExtractConfig, has_pictures: bool, has_captions: bool) -> Networks:
    """Fills in the encoders that were not named: the first teacher of the modality, or bert-base for captions.

    From crops neither: the cache holds the student's inputs. But a text teacher needs its own ids. A teacher of pairs
    completes neither: ids are made with its tokenizer.
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
    if encoder is not None and blocks_before(config.cut, encoder) > encoder.depth:
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
        elif encoder is not None and not config.from_crops and not networks.pair_teachers:  # the ids lie there already
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
    for teacher in networks.pair_teachers:
        if not has_pictures or not has_captions:
            kind, lacking = (MissingCaptions, "captions") if has_pictures else (NoData, "pictures")
            raise kind(
                f"teacher {teacher.name} reads captions with their pictures and the data has no {lacking}",
                "give tars whose samples hold a picture and a caption; see docs/data.md",
            )
    return Networks(encoder if has_pictures else None, text_encoder if has_captions else None, networks.teachers)


def with_ids(networks: Networks, config: ExtractConfig, store: Store) -> Networks:
    """Settles whose ids the run writes: those of the network that has the tokenizer.

    Where that is a network of pairs, from which no student's text side starts, and the cache holds the same ids of
    another network, the run goes on with these. Raises UnsupportedNetwork for a network without a tokenizer.
    """
    source = networks.tokenizer
    if source is None:
        return networks
    if source.tokenizer is None:
        raise UnsupportedNetwork(f"{source.name} comes without a tokenizer", "give a folder that has one")
    ids = _ids_of_cache(source.name, source.tokenizer, config.max_tokens, store) if source.modality == "pair" else None
    return replace(networks, ids=ids or Ids(source.name, source.tokenizer))


def _ids_of_cache(teacher: str, tokenizer: bytes, max_tokens: int, store: Store) -> Ids | None:
    """The cache's ids of as many positions that a tokenizer equal to this one made, if it has such.

    Of several those that fields of the teacher were made with, then its own: what is there is gone on with.
    """
    records = read_field_records(store)
    fields = [record for name, record in records.items() if name.startswith(f"teacher/{teacher}/pair/")]
    in_use = {record["fingerprint"].get("tokenizer") for record in fields}
    found: dict[tuple[bool, bool, str], Ids] = {}
    for field, record in records.items():
        if record["kind"] != "ids" or record["fingerprint"].get("max_tokens") != max_tokens:
            continue
        name, digest = field.split("/")[1], str(record["fingerprint"].get("tokenizer"))
        known = tokenizer if _sha256(tokenizer) == digest else _kept_tokenizer(store, name, digest)
        if known is not None and not differing_tokenizers(tokenizer, known):
            found[digest not in in_use, name != teacher, name] = Ids(name, known)
    return found[min(found)] if found else None


def _kept_tokenizer(store: Store, name: str, digest: str) -> bytes | None:
    """The tokenizer that the cache keeps with this network, if it is the one of this digest."""
    path = f"{model_dir(name)}/tokenizer.json"
    content = store.read(path) if exists(store, path) else b""
    return content if _sha256(content) == digest else None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def require_pairs(networks: Networks, has_pairs: bool) -> None:
    """Raises NoData if there are teachers of pairs, and no caption has a picture."""
    if networks.pair_teachers and not has_pairs:
        raise NoData(
            f"teacher {networks.pair_teachers[0].name} reads captions with their pictures; in the data no sample has "
            "both",
            "give a picture and its captions the same key; see docs/data.md",
        )


def require_sounds(networks: Networks, config: ExtractConfig, has_sounds: bool) -> None:
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


def _require_known_inside(encoder: Network | None, flag: str) -> None:
    """Raises UnsupportedNetwork for an encoder that is run in one piece."""
    if encoder is not None and isinstance(encoder.backbone, WholeNetwork):
        raise UnsupportedNetwork(
            f"{flag} {encoder.name}: it is run in one piece ({encoder.family}), so no cut of it is known",
            f"name another, for example {flag} {'dinov2-s' if encoder.modality == 'image' else DEFAULT_TEXT_ENCODER}; "
            "it can be the teacher",
        )


def blocks_before(cut: Cut, encoder: Network) -> int:
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


def keep_networks(writer: CacheWriter, networks: Networks) -> None:
    """Stores the frozen encoders in the cache, so that training needs nothing else."""
    store = writer.store
    for network in networks.kept:
        record = f"{model_dir(network.name)}/model.json"
        if not exists(store, record):
            needed = num_bytes(network)
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


def num_bytes(network: Network) -> int:
    """What its parameters take in the cache."""
    return sum(tensor.numel() * 4 for tensor in network.backbone.state_dict().values())


def unique(networks: Sequence[Network | None]) -> list[Network]:
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
