"""The same batches without the cache's numbers: pictures decoded and the frozen networks run in the training loop.

What it is for: proof that cached training equals live training, and the price of doing without a cache.

B batch, T tokens, D width.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from emkum.errors import IdentityMismatch, SourceChanged, UnknownNetwork
from emkum.models.catalogue import load_network
from emkum.models.network import Network, load_saved
from emkum.models.passes import FrozenPass, Wanted, wanted_target
from emkum.shards.tars import find_tars
from emkum.shards.views import Box, box_for, decode_view, replay_view
from emkum.stage2_train.loader import Batch, Buffers, CachedSource, HostBatch, Stored
from emkum.stage2_train.order import BatchRows
from emkum.stage2_train.samples import SampleTable

if TYPE_CHECKING:
    from emkum.shards.reader import Cache, Field
    from emkum.shards.segments import Segment
    from emkum.stage2_train.recipe_fields import FieldNames

TEACHER = re.compile(r"teacher/(?P<network>.+)/(image|text)/(?P<what>cls|patches|layers|logits|logits-top)")


@dataclass(frozen=True)
class _Picture:
    """Where one picture lies, and its identity."""

    segment: Segment
    tar: str
    key: str
    offset: int
    size: int


class LiveSource(CachedSource):
    """A `CachedSource` whose inputs and targets come from the networks; ids and rows come from the cache.

    Views are those of the cache: replayed from its stored boxes. Networks compute in the type the extraction used; in
    front of crops, where cached training runs the encoder too, in that of the training, `precision`.
    data: where the source tars lie now; without it, where they lay then.
    Raises SourceChanged for a tar that is not there as it was, IdentityMismatch for a teacher with other weights.
    """

    fresh_targets = True

    def __init__(
        self,
        cache: Cache,
        names: FieldNames,
        table: SampleTable,
        device: torch.device,
        data: Sequence[str] = (),
        *,
        precision: str = "float32",
        threads: int = 2,
    ) -> None:
        super().__init__(cache, names, table)
        self.batches_at_once = threads  # each thread decodes the pictures of one
        self._paths = _tar_paths(cache, table.split, data) if self.inputs is not None else {}
        self._pictures = _pictures(cache, table.split)
        self._boxes = _boxes(cache, table.split)
        self._handles: dict[str, int] = {}
        self._lock = threading.Lock()
        self._passes: dict[tuple[str, str], FrozenPass] = {}
        encoder = load_saved(cache.model_dir(names.encoder)) if names.encoder else None
        tokeniser = load_saved(cache.model_dir(names.text_encoder)) if names.text_encoder else None
        kept = [network for network in (encoder, tokeniser) if network is not None]
        wanted: dict[tuple[str, str], list[tuple[str, Network, Wanted]]] = {}
        if self.inputs is not None and encoder is not None:
            self._size = _crop_size(self.inputs)
            compute = self.inputs.fingerprint.get("compute") or precision
            wanted["image", compute] = [("inputs", encoder, Wanted(encoder.name, "tokens", names.cut))]
        loaded = list(kept)
        for role, field in self.targets.items():
            teacher = _teacher(field, loaded)
            loaded.append(teacher)
            found = TEACHER.fullmatch(field.name)
            assert found is not None
            want = wanted_target(teacher, found["what"], field.fingerprint)
            place = teacher.modality, str(field.fingerprint["compute"])
            wanted.setdefault(place, []).append((role, teacher, want))
        self._outputs: dict[tuple[str, str], list[str]] = {}
        for (modality, compute), members in wanted.items():
            networks = list({network.name: network for _, network, _ in members}.values())
            frozen = FrozenPass(networks, [want for _, _, want in members], compute, device)
            self._passes[modality, compute] = frozen
            self._outputs[modality, compute] = [output for output, _, _ in members]

    def read(self, rows: BatchRows, buffers: Buffers) -> HostBatch:
        buffers.wait_until_free()
        crops = ids = lengths = None
        if self.inputs is not None and rows.image_rows_B is not None and rows.views_B is not None:
            shape = (len(rows), self._size, self._size, 3)
            crops = buffers.tensor("crops", shape, torch.uint8)
            for place, (row, view) in enumerate(zip(rows.image_rows_B.tolist(), rows.views_B.tolist(), strict=True)):
                crops[place] = torch.from_numpy(self._crop(row, view))
        if self.ids is not None and rows.text_rows_B is not None:
            ids, lengths = self._read_ids(rows.text_rows_B, buffers)
        return HostBatch(rows, Stored(crops) if crops is not None else None, ids, lengths, {}, buffers)

    def prepare(self, host: HostBatch, device: torch.device) -> Batch:
        image_rows, views, ids, mask = self._common(host, device)
        outputs: dict[str, Tensor] = {}
        for (modality, compute), frozen in self._passes.items():
            if modality == "image":
                assert host.inputs is not None
                found = frozen.pictures(host.inputs.values)
            else:
                assert ids is not None
                assert mask is not None
                found = frozen.texts(ids, mask)
            # Copies made outside of inference mode, which autograd may save.
            outputs |= zip(self._outputs[modality, compute], (tensor.clone() for tensor in found), strict=True)
        host.buffers.mark_copied(device)
        inputs = outputs.pop("inputs", None)
        return Batch(image_rows, views, inputs, ids, mask, outputs, self.layers_rules, self.top_logits)

    def _crop(self, row: int, view: int) -> np.ndarray:
        """uint8 [size, size, 3], the view as it was extracted."""
        picture = self._pictures[row]
        data = os.pread(self._handle(picture.tar), picture.size, picture.offset)
        if self._boxes is not None:
            box = Box.from_row(self._boxes.read(np.array([row]), view)[0])
            return np.asarray(replay_view(data, self._size, box))
        policy = picture.segment.views
        crop, _ = decode_view(
            data, self._size, lambda width, height: box_for(policy, picture.tar, picture.key, view, width, height)
        )
        return np.asarray(crop)

    def _handle(self, tar: str) -> int:
        with self._lock:
            if tar not in self._handles:
                self._handles[tar] = os.open(self._paths[tar], os.O_RDONLY)
            return self._handles[tar]

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", {}).values():
            os.close(handle)


def _crop_size(inputs: Field) -> int:
    return int(inputs.fingerprint.get("size") or inputs.row_shape[0])


def _tar_paths(cache: Cache, split: str, data: Sequence[str]) -> dict[str, str]:
    """Where each source tar of the split lies. Raises SourceChanged for one that is not there with its length."""
    given = {os.path.basename(path): path for path in find_tars(data)} if data else {}
    paths = {}
    for segment in cache.segments:
        for source in segment.sources if segment.split == split else ():
            path = given.get(source.tar, source.path)
            if not os.path.isfile(path) or os.path.getsize(path) != source.bytes:
                raise SourceChanged(
                    f"{source.tar}, which {cache.path} was extracted from, is not at {path} with {source.bytes} bytes",
                    "say where it lies: --data FOLDER; or train from the cache, without --live",
                )
            paths[source.tar] = path
    return paths


def _pictures(cache: Cache, split: str) -> dict[int, _Picture]:
    """The pictures of the split by row."""
    found = {}
    samples = cache.samples(split)
    samples = samples.filter(samples.column("image_row").is_valid())
    segments = {source.tar: segment for segment in cache.segments for source in segment.sources}
    columns = (samples.column(name).to_pylist() for name in ("image_row", "tar", "key", "offset", "size"))
    for row, tar, key, offset, size in zip(*columns, strict=True):
        found[row] = _Picture(segments[tar], tar, key, offset, size)
    return found


def _boxes(cache: Cache, split: str) -> Field | None:
    """The stored boxes of the split's view policy."""
    policies = {segment.views.name for segment in cache.segments if segment.split == split and segment.image.rows}
    names = [f"views/{policy}/boxes" for policy in policies]
    return cache.fields.get(names[0]) if len(names) == 1 else None


def _teacher(field: Field, kept: Sequence[Network]) -> Network:
    """The network a field was made with: one the cache keeps, else loaded from where the field's record says."""
    weights = field.fingerprint["weights"]
    for network in kept:
        if network.weights_sha256 == weights:
            return network
    found = TEACHER.fullmatch(field.name)
    assert found is not None
    source = field.record["environment"]["source"]
    try:
        network = load_network(source)
    except UnknownNetwork:  # it came from a package: the field bears its name in the catalogue
        network = load_network(found["network"])
    if network.weights_sha256 != weights:
        raise IdentityMismatch(
            f"{field.name} was made with weights {weights[:12]}...; {source} has {network.weights_sha256[:12]}... now",
            "restore those weights, or train from the cache, without --live",
        )
    return network
