"""A frozen network with all that is needed to run it and to tell it from another; saved and loaded whole.

B batch, H height, W width, C colour.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emkum.errors import CorruptCache, IdentityMismatch, NewerFormat, StorageFailure, UnsupportedNetwork, UsageError
from emkum.models.audio import AudioBackbone, WaveConv
from emkum.models.backbone import Backbone, Modality
from emkum.models.families.registry import empty_backbone, frozen, spec_of
from emkum.models.preprocessing import Preprocessing, normalised
from emkum.models.resnet import ResNet
from emkum.models.whole import WholeNetwork

FORMAT = 1
MODEL_JSON, WEIGHTS, TOKENIZER = "model.json", "model.safetensors", "tokenizer.json"


@dataclass(frozen=True)
class Network:
    """A frozen network. `backbone` is in evaluation mode, without gradients, in float32 as loaded.

    name: letters a-z, digits, `.`, `_`, `-`. tokenizer: the content of tokenizer.json, text only. max_tokens: the
    default length of texts, special tokens included; 0 for images. weights_sha256: of the tensors under our names in
    float32, whatever file they came in. revision: a commit, a file's sha256 or a package version; "" if unknown.
    """

    name: str
    family: str
    modality: Modality
    backbone: Backbone | ResNet | WholeNetwork | AudioBackbone
    preprocessing: Preprocessing | None
    tokenizer: bytes | None
    max_tokens: int
    weights_sha256: str
    source: str
    revision: str
    licence: str
    supervision: str

    @property
    def width(self) -> int:
        return self.backbone.width

    @property
    def depth(self) -> int:
        return self.backbone.depth

    @property
    def num_prefix(self) -> int:
        return self.backbone.num_prefix

    @property
    def patch(self) -> int:
        """Pixels of a patch, each way; 0 for text and sound."""
        return 0 if isinstance(self.backbone, AudioBackbone) else self.backbone.spec.patch

    def placed(self, device: torch.device | str, compute: torch.dtype = torch.float32) -> Network:
        """A copy on `device` whose matrix products run in `compute`; residual stream, norms and outputs stay float32.

        For bfloat16 this gives the numbers of autocast without casting the weights in every pass.
        """
        import copy

        backbone = copy.deepcopy(self.backbone).to(device)
        if isinstance(backbone, WholeNetwork):
            backbone.compute = compute
        elif compute != torch.float32:
            for module in backbone.modules():
                if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d) and not isinstance(module, WaveConv):
                    module.to(compute)
        return dataclasses.replace(self, backbone=backbone)


def network_name(text: str) -> str:
    """`text` as a name that is safe in paths: a-z, 0-9, `.`, `_`, `-`. Raises UsageError if nothing is left of it."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.")
    if not name:
        raise UsageError(f"{text!r} gives no name for a network", "choose a name of letters and digits")
    return name


def normalise(network: Network | Preprocessing, crops_BHWC: Tensor) -> Tensor:
    """uint8 crops_BHWC -> float32 images_BCHW as the network was trained on them."""
    preprocessing = network.preprocessing if isinstance(network, Network) else network
    if preprocessing is None:
        raise UsageError("pictures for a text network", "name an image network")
    return normalised(preprocessing, crops_BHWC)


def weights_digest(backbone: nn.Module) -> str:
    """SHA-256 over the tensors of a backbone in float32: sorted name, type, shape, little-endian bytes of each."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        exact = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}\0float32\0{list(exact.shape)}\0".encode())
        digest.update(exact.numpy().astype("<f4", copy=False))
    return digest.hexdigest()


def shares_prefix(a: Network, b: Network) -> int:
    """How many leading blocks of `a` and `b` compute the same from the same input; -1 if even the embedding differs.

    Compared are the weights themselves and everything of the architecture that takes part: also how pictures are
    normalised and texts cut into tokens. Final norms do not count. Both in the same precision.
    """
    if isinstance(a.backbone, WholeNetwork) or isinstance(b.backbone, WholeNetwork):
        return -1
    if not isinstance(a.backbone, Backbone) or not isinstance(b.backbone, Backbone):
        same = a.backbone.spec == b.backbone.spec and _colours(a) == _colours(b) and _equal(a.backbone, b.backbone)
        return 0 if same else -1
    if _embedding_kind(a) != _embedding_kind(b) or not _equal(a.backbone.embedding, b.backbone.embedding):
        return -1
    ours, theirs = a.backbone.stack, b.backbone.stack
    same_kind = dataclasses.replace(ours.spec, depth=0) == dataclasses.replace(theirs.spec, depth=0)
    if not same_kind or (ours.spec.relative_bias == "shared" and not _equal(ours.biases, theirs.biases)):
        return 0
    for index in range(min(a.depth, b.depth)):
        same = _equal(ours.blocks[index], theirs.blocks[index])
        if ours.spec.relative_bias == "per_block":
            same = same and _equal(ours.biases[index], theirs.biases[index])
        if not same:
            return index
    return min(a.depth, b.depth)


def _embedding_kind(network: Network) -> tuple[Any, ...]:
    """All that the embedding's output depends on, but its weights."""
    of_spec = "modality width eps embedding_eps pre_norm position modality_embedding"
    of_image = "patch image_size num_registers patch_bias position_antialias"
    of_text = "vocab_size max_positions position_offset position_from_mask token_types pad_id zero_pads"
    spec, names = network.backbone.spec, f"{of_spec} {of_image} {of_text}".split()
    return (*(getattr(spec, name) for name in names), _colours(network), network.tokenizer)


def _colours(network: Network) -> Any:
    return network.preprocessing and (network.preprocessing.mean, network.preprocessing.std)


def _equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n].to(ours[n].device)) for n in ours
    )


def save_network(network: Network, folder: Path | str) -> None:
    """Writes the network into a folder of its own: weights, tokenizer, and model.json last.

    Does nothing if the folder holds this network already. Raises IdentityMismatch if it holds another one, and
    StorageFailure if the disk refuses.
    """
    folder = Path(folder)
    if (folder / MODEL_JSON).is_file():
        _check_same(folder, _record(network))
        return
    files = network_files(network)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            _write(folder / name, data)
    except OSError as error:
        raise StorageFailure(f"{folder} cannot be written: {error}", "free space or choose another place") from error


def network_files(network: Network) -> dict[str, bytes]:
    """The files that `load_saved` reads, by name, model.json last (docs/format.md, section 7)."""
    from safetensors.torch import save

    if isinstance(network.backbone, WholeNetwork) and network.backbone.spec.library != "transformers":
        raise UnsupportedNetwork(
            f"{network.name} ({network.family}) cannot be kept as files: its inside is code",
            "it can be a teacher; where the cache must keep it as the one that cuts texts into tokens, name a "
            "--text-encoder with the same tokenizer",
        )
    if weights_digest(network.backbone) != network.weights_sha256:
        raise ValueError(f"{network.name} was cast or changed since it was loaded; save the network as loaded")
    weights = {name: tensor.contiguous().cpu() for name, tensor in network.backbone.state_dict().items()}
    files = {WEIGHTS: save(weights, metadata={"format": "pt"})}
    if network.tokenizer is not None:
        files[TOKENIZER] = network.tokenizer
    files[MODEL_JSON] = (json.dumps(_record(network), sort_keys=True, indent=1) + "\n").encode()
    return files


def load_saved(folder: Path | str) -> Network:
    """The inverse of `save_network`.

    Raises CorruptCache for a file that is missing or whose content is not what model.json says, NewerFormat for one
    written by a newer emkum.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        record = json.loads((folder / MODEL_JSON).read_text(encoding="utf-8"))
        if record["format"] > FORMAT:
            raise NewerFormat(f"{folder} has format {record['format']}, this emkum reads {FORMAT}", "update emkum")
        backbone = empty_backbone(spec_of(record["architecture"]))
        # Copied: safetensors hands out pages of the file, which may be replaced under us.
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        backbone.load_state_dict(tensors, strict=True, assign=True)
        tokenizer = (folder / TOKENIZER).read_bytes() if record["tokenizer_sha256"] else None
        network = Network(
            name=record["name"],
            family=record["family"],
            modality=record["modality"],
            backbone=frozen(backbone),
            preprocessing=Preprocessing.from_json(record["preprocessing"]) if record["preprocessing"] else None,
            tokenizer=tokenizer,
            max_tokens=record["max_tokens"],
            weights_sha256=record["weights_sha256"],
            source=record["source"],
            revision=record["revision"],
            licence=record["licence"],
            supervision=record["supervision"],
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CorruptCache(
            f"{folder} holds no whole network: {error}",
            "restore the folder; in a cache, `emkum cache repair` drops it and the same extract command keeps it again",
        ) from error
    for what, found, said in (
        ("weights", weights_digest(network.backbone), record["weights_sha256"]),
        ("tokenizer", _sha256(tokenizer), record["tokenizer_sha256"]),
    ):
        if found != said:
            raise CorruptCache(
                f"{folder}: the {what} have sha256 {found}, {MODEL_JSON} says {said}", "restore the folder"
            )
    return network


def _record(network: Network) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": network.name,
        "family": network.family,
        "modality": network.modality,
        "architecture": network.backbone.spec.to_json(),
        "preprocessing": network.preprocessing.to_json() if network.preprocessing else None,
        "tokenizer_sha256": _sha256(network.tokenizer),
        "max_tokens": network.max_tokens,
        "weights_sha256": network.weights_sha256,
        "source": network.source,
        "revision": network.revision,
        "licence": network.licence,
        "supervision": network.supervision,
    }


def _check_same(folder: Path, record: dict[str, Any]) -> None:
    """Raises IdentityMismatch if the network in `folder` computes something else, wherever it came from."""
    found = load_saved(folder)
    kept = _record(found)
    for key in ("architecture", "preprocessing", "tokenizer_sha256", "max_tokens", "weights_sha256"):
        if kept[key] != record[key]:
            raise IdentityMismatch(
                f"{folder} holds {found.name} with {key} {kept[key]}; this one has {record[key]}",
                "give this network another name",
            )


def _sha256(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, and on the disk when it returns."""
    unfinished = path.with_name(path.name + ".tmp")
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
