"""The same batches without the cache's numbers: pictures decoded and the frozen networks run in the training loop.

What it is for: proof that cached training equals live training, and the price of doing without a cache.

B batch, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emkum.errors import IdentityMismatch, UnknownNetwork
from emkum.models.catalogue import load_network
from emkum.models.network import Network, load_saved
from emkum.models.passes import FrozenPass, Wanted, wanted_target
from emkum.stage2_train.loader import Batch, Buffers, CachedSource, HostBatch, Prefix
from emkum.stage2_train.order import BatchRows
from emkum.stage2_train.replay import Replay
from emkum.stage2_train.samples import SampleTable

if TYPE_CHECKING:
    from emkum.shards.reader import Cache, Field
    from emkum.stage2_train.recipe_fields import FieldNames

TEACHER = re.compile(r"teacher/(?P<network>.+)/(image|text)/(?P<what>cls|patches|layers|logits|logits-top)")


class LiveSource(CachedSource):
    """A `CachedSource` whose inputs and targets come from the networks; ids and rows come from the cache.

    Views are those of the cache: replayed from its stored boxes. Networks compute in the type the extraction used; in
    front of crops, where cached training runs the encoder too, in that of the training, `precision`.
    data: where the source tars lie now; without it, where they lay then. prefix: of a student of pixels, as of
    CachedSource.
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
        prefix: Prefix | None = None,
    ) -> None:
        super().__init__(cache, names, table, prefix)
        self.batches_at_once = threads  # each thread decodes the pictures of one
        size = names.crop_size or (_crop_size(self.inputs) if self.inputs is not None else 0)
        self.replay = Replay(cache, (table.split,), size, data) if size else None
        self._passes: dict[tuple[str, str], FrozenPass] = {}
        encoder = load_saved(cache.model_dir(names.encoder)) if names.encoder else None
        tokeniser = load_saved(cache.model_dir(names.text_encoder)) if names.text_encoder else None
        kept = [network for network in (encoder, tokeniser) if network is not None]
        wanted: dict[tuple[str, str], list[tuple[str, Network, Wanted]]] = {}
        if self.inputs is not None and encoder is not None:
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
        if self.replay is not None and rows.image_rows_B is not None:
            crops = self._replayed(self.replay, rows, buffers)
        if self.ids is not None and rows.text_rows_B is not None:
            ids, lengths = self._read_ids(rows.text_rows_B, buffers)
        return HostBatch(rows, crops, ids, lengths, {}, buffers)

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
        batch = Batch(image_rows, views, inputs, ids, mask, outputs, self.layers_rules, self.top_logits)
        if not self.reads_pixels:
            return batch
        assert host.inputs is not None
        assert self.prefix is not None
        return dataclasses.replace(batch, images_BCHW=self.prefix(host.inputs.values.to(device)))


def _crop_size(inputs: Field) -> int:
    return int(inputs.fingerprint.get("size") or inputs.row_shape[0])


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
