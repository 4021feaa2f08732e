"""A real cache of a few dozen random samples and two tiny random networks, for tests of training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from emkum.models import targets
from emkum.models.backbone import Backbone, BackboneSpec
from emkum.models.network import Network, network_files, normalise, save_network, weights_digest
from emkum.models.preprocessing import Preprocessing
from emkum.models.resnet import ResNet, ResNetSpec
from emkum.shards.codec import encode
from emkum.shards.fingerprint import Fingerprint
from emkum.shards.layout import FieldSpec
from emkum.shards.segments import Segment
from emkum.shards.tars import PictureMember, SourceSample, SourceTar
from emkum.shards.views import ViewPolicy
from emkum.shards.writer import CacheWriter

SIZE, PATCH, WIDTH, TEXT_WIDTH, POSITIONS, VOCABULARY, CLASSES = 16, 8, 16, 12, 16, 40, 7
TOP = 2  # of the classes
NUM_TOKENS = 1 + (SIZE // PATCH) ** 2


def tiny_network(name: str, modality: str, seed: int = 0, depth: int = 4, **changes: object) -> Network:
    """A random Transformer of 16 (pictures) or 12 (texts) channels."""
    common = {"family": "dinov2" if modality == "image" else "bert", "modality": modality, "depth": depth, "heads": 2}
    if modality == "image":
        own = {"width": WIDTH, "mlp_width": 32, "patch": PATCH, "image_size": SIZE, "layer_scale": True}
    else:
        own = {"width": TEXT_WIDTH, "mlp_width": 24, "vocab_size": VOCABULARY, "max_positions": POSITIONS}
        own |= {"norm_order": "post", "pre_norm": True, "final_norm": False, "token_types": 2}
    backbone = Backbone(BackboneSpec(**{**common, **own, **changes}))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in backbone.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            elif parameter_name.endswith(("scale1", "scale2")):  # LayerScale: blocks that do something
                parameter.normal_(1, 0.1, generator=generator)
            elif not parameter_name.endswith("weight"):
                parameter.normal_(0, 0.1, generator=generator)
    backbone.eval().requires_grad_(False)
    return Network(
        name=name,
        family=str(common["family"]),
        modality=modality,  # type: ignore[arg-type]
        backbone=backbone,
        preprocessing=Preprocessing(image_size=SIZE) if modality == "image" else None,
        tokenizer=None if modality == "image" else b'{"version": "1.0", "model": {"type": "WordLevel"}}',
        max_tokens=0 if modality == "image" else POSITIONS,
        weights_sha256=weights_digest(backbone),
        source=f"random:{name}",
        revision="",
        licence="none",
        supervision="none",
    )


def tiny_classifier(name: str, seed: int = 2, classes: int = CLASSES) -> Network:
    """A random ResNet of two layers whose logits differ from picture to picture."""
    backbone = ResNet(ResNetSpec(4, (8, 16), (1, 1), layer="basic", num_classes=classes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 3 * parameter[0].numel() ** -0.5, generator=generator)
    backbone.eval().requires_grad_(False)
    network = tiny_network(name, "image")
    return replace(network, family="resnet", backbone=backbone, weights_sha256=weights_digest(backbone))


def save_networks(root: Path, networks: Mapping[str, Network]) -> Path:
    """Each in a folder of its name here, under the digest of the weights it has now."""
    for folder, network in networks.items():
        save_network(replace(network, weights_sha256=weights_digest(network.backbone)), root / folder)
    return root


@dataclass(frozen=True)
class TinyCache:
    """Where it lies, and what it was made from."""

    path: Path
    encoder: Network
    text_encoder: Network


def make_cache(
    path: Path,
    *,
    pictures: int = 40,
    val_pictures: int = 12,
    captions: int = 2,
    storage: str = "float32",
    views: int = 1,
    cut: int = 2,
    fields: Sequence[str] = ("tokens", "ids", "cls", "layers", "text_layers"),
    quarantined: Sequence[int] = (),
    rows_per_block: int = 16,
    skipped_blocks: Sequence[tuple[str, int]] = (),
    environment: Mapping[str, object] = MappingProxyType({}),
    seed: int = 0,
) -> TinyCache:
    """A cache with splits train and val.

    quarantined: train image rows. skipped_blocks: (end of a field's name, block) that are never committed.
    """
    encoder, text_encoder = tiny_network("tinyvit", "image", seed), tiny_network("tinybert", "text", seed + 1)
    writer = CacheWriter(path, rows_per_block)
    random = np.random.default_rng(seed)
    for split, count, num_views in (("train", pictures, views), ("val", val_pictures, 1)):
        if not count:
            continue
        segment = writer.append_segment(
            split, ViewPolicy(crop=(0.9, 1.0), count=num_views), [_tar(split, count, captions)]
        )
        crops = random.integers(0, 256, (count, num_views, SIZE, SIZE, 3), dtype=np.uint8)
        bad = list(quarantined) if split == "train" else []
        for name, spec, values, lengths in _fields(
            fields, storage, cut, encoder, text_encoder, crops, captions, random
        ):
            statistics = _statistics(values) if spec.storage == "int8" else None
            fingerprint = Fingerprint(
                spec.kind, spec.storage, spec.row_shape, weights=encoder.weights_sha256, size=SIZE, compute="float32"
            )
            writer.declare_field(
                spec,
                fingerprint,
                {"source": f"random:{name}", **environment},
                writer_statistics(writer, spec, statistics),
            )
            writer.grow_field(spec, num_views)
            skipped = [block for word, block in skipped_blocks if spec.name.endswith(word)]
            _commit(writer, spec, segment, values, lengths, writer_statistics(writer, spec, statistics), bad, skipped)
    for network in (encoder, text_encoder):
        writer.keep_network(network.name, network_files(network))
    return TinyCache(path, encoder, text_encoder)


_FROZEN: dict[tuple[Path, str], tuple[np.ndarray, np.ndarray]] = {}


def writer_statistics(
    writer: CacheWriter, spec: FieldSpec, measured: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Channel statistics of the first split, reused by the next."""
    return None if measured is None else _FROZEN.setdefault((writer.path, spec.name), measured)


def _tar(split: str, count: int, captions: int) -> SourceTar:
    samples = tuple(
        SourceSample(
            f"{split}{i:04d}",
            PictureMember(512 + 1024 * i, 100, "jpg"),
            tuple(f"{split} caption {i} {c}" for c in range(captions)),
            "json",
            None,
            None,
        )
        for i in range(count)
    )
    digest = hashlib.sha256(split.encode()).hexdigest()
    return SourceTar(f"{split}.tar", f"{split}.tar", 1000, digest, samples, {}, 0)


def _fields(fields, storage, cut, encoder, text_encoder, crops_NVHWC, captions, random):  # type: ignore[no-untyped-def]
    """(short name, spec, float32 values [N, V, ...] or [M, ...], lengths) of each wanted field."""
    flat = torch.from_numpy(crops_NVHWC).flatten(0, 1)
    shape = crops_NVHWC.shape[:2]
    with torch.no_grad():
        embedded = encoder.backbone.embed(normalise(encoder, flat))
        hidden = encoder.backbone.run(embedded).hidden
        tokens = ([embedded, *hidden])[cut]
        final = encoder.backbone.finish(hidden[-1])
        found = {
            "tokens": (f"image/tinyvit@{cut}/tokens", "tokens", tokens),
            "cls": ("teacher/tinyvit/image/cls", "pooled", targets.cls(final)),
            "layers": ("teacher/tinyvit/image/layers", "tokens", targets.layers(hidden, None, True)),
        }
        if "logits" in fields or "logits-top" in fields:
            resnet = tiny_classifier("tinyresnet")
            logits = resnet.backbone.logits(resnet.backbone.embed(normalise(resnet, flat)))  # type: ignore[operator]
            found["logits"] = ("teacher/tinyresnet/image/logits", "pooled", logits)
            top = targets.packed(targets.top_logits(logits, TOP))
            found["logits-top"] = ("teacher/tinyresnet/image/logits-top", "top_logits", top)
        for word, (name, kind, values) in found.items():
            if word in fields:
                array = values.unflatten(0, shape).numpy()
                row_shape = (TOP + 1,) if kind == "top_logits" else array.shape[2:]  # and their classes
                yield word, FieldSpec(name, kind, storage, row_shape), array, None
        if "crops" in fields:
            yield "crops", FieldSpec(f"image/crops-{SIZE}", "crops", "uint8", (SIZE, SIZE, 3)), crops_NVHWC, None
        num_texts = shape[0] * captions
        lengths = random.integers(4, POSITIONS - 2, num_texts).astype(np.int32)
        ids = random.integers(1, VOCABULARY, (num_texts, POSITIONS)).astype(np.int32)
        mask = np.arange(POSITIONS) < lengths[:, None]
        ids[~mask] = 0
        if "ids" in fields:
            yield "ids", FieldSpec("text/tinybert/ids", "ids", "int32", (POSITIONS,)), ids, lengths
        if "text_layers" in fields:
            mask_BL = torch.from_numpy(mask)
            embedded = text_encoder.backbone.embed(torch.from_numpy(ids).long(), mask_BL)
            values = targets.layers(text_encoder.backbone.run(embedded, mask_BT=mask_BL).hidden, mask_BL, False).numpy()
            yield (
                "text_layers",
                FieldSpec("teacher/tinybert/text/layers", "ragged", storage, values.shape[1:]),
                values,
                lengths,
            )


def _statistics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    flat = values.reshape(-1, values.shape[-1])
    return flat.mean(0).astype(np.float32), (flat.std(0) + 1e-6).astype(np.float32)


def _commit(
    writer: CacheWriter,
    spec: FieldSpec,
    segment: Segment,
    values: np.ndarray,
    lengths: np.ndarray | None,
    statistics: tuple[np.ndarray, np.ndarray] | None,
    bad: Sequence[int],
    skipped: Sequence[int],
) -> None:
    span = segment.span(spec.space)
    for block in span.blocks(writer.rows_per_block):
        if block in skipped:
            continue
        first, count = span.block_rows(block, writer.rows_per_block)
        for view in range(values.shape[1] if spec.space == "image" else 1):
            with writer.block(spec, segment, block, view) as target:
                for row in range(first, first + count):
                    here = row - span.first_row
                    if spec.space == "image" and row in bad:
                        target.quarantine("train.tar", f"train{here:04d}", "broken")
                        continue
                    one = values[here : here + 1, view] if spec.space == "image" else values[here : here + 1]
                    length = None if lengths is None else lengths[here : here + 1]
                    target.append(_encoded(one, spec, statistics, length))
                target.commit()


def _encoded(one, spec, statistics, length):  # type: ignore[no-untyped-def]
    if spec.kind in ("crops", "ids"):
        from emkum.shards.codec import Encoded, Summary

        return Encoded(one, None, length, Summary())
    if spec.kind == "top_logits":
        count = spec.row_shape[0]
        return replace(encode(one[:, :count], spec.storage), classes=one[:, count:].astype(np.int32))
    mean, std = statistics or (None, None)
    return encode(one, spec.storage, mean, std, length)
