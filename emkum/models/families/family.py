"""What a family is: which checkpoints it reads and how, how it wants its inputs, and the catalogue's entries of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from emkum.models.backbone import Modality
from emkum.models.families.checkpoint import Checkpoint, KeyMap, Shapes
from emkum.models.preprocessing import Preprocessing

Supervision = Literal[
    "none",
    "none+clip_tokenizer",
    "paired_text",
    "paired_text+class_labels",
    "text_pairs",
    "class_labels",
    "transcripts",
    "unknown",
]


@dataclass(frozen=True)
class PackageFile:
    """A file or folder `inside` the package `module`, installed as `requirement` (with --no-deps)."""

    requirement: str
    module: str
    inside: str


@dataclass(frozen=True)
class CatalogueEntry:
    """A network by name. `source`: a hub id or a URL; `package`: a Python package that holds it, tried first.

    supervision: `none` no labels, no text; `none+clip_tokenizer` no labels, but its tokenizer was distilled from CLIP;
    `paired_text` pictures with captions; `text_pairs` texts that belong together; `class_labels`; `transcripts` of
    speech. width, depth: of its blocks. patch: pixels, 0 but for pictures. size: the side of the pictures it is run on,
    in pixels. tokens: of one sample, CLS and registers included (texts: at most; 0 where the length of a sound
    decides). classes: of its logits. targets: what is kept of it unless the user says; () is the family's. companions:
    URLs of further files that are fetched beside, the tokenizer's. sha256: of the file behind a URL, where it is known;
    revision: a commit of the hub, where it is pinned. family and modality are filled in by the registry.
    """

    name: str
    source: str
    supervision: Supervision
    licence: str
    width: int
    depth: int
    patch: int = 0
    size: int = 224
    tokens: int = 0
    targets: tuple[str, ...] = ()
    classes: int = 0
    notes: str = ""
    package: PackageFile | None = None
    companions: tuple[str, ...] = ()
    sha256: str = ""
    revision: str = ""
    family: str = ""
    modality: Modality = "image"


@dataclass(frozen=True)
class Family:
    """`model_types`: the values of config.json's model_type it reads. `rename`: a name on disk -> its stable name.

    `key_map` takes a checkpoint under stable names. phrase: what it is, for the list of teachers.
    `trust_preprocessor` is False where the published preprocessor_config.json is known to be wrong; then
    `preprocessing` alone holds.
    recognises: whether tensors of these names and shapes, without any config.json, are an original file of the family.
    timm_tag: how timm tags its weights in config.json, where their tensors are named as another family's.
    tokenizer: the bytes of a tokenizer from the folder of the checkpoint, where it is not a tokenizer.json.
    default_targets: what is kept of a teacher unless the user says. layers_rule: which rule `layers` follows then, a
    name of `emkum.models.targets`; layers_last: depth -> how many last blocks it counts in networks without a prenet,
    where that is not as the name says. spec: the class of its architectures, if it is none of emkum.models.backbone.
    """

    name: str
    modality: Modality
    model_types: tuple[str, ...]
    rename: Callable[[str], str]
    key_map: Callable[[Checkpoint], KeyMap]
    preprocessing: Preprocessing | None = None
    trust_preprocessor: bool = True
    recognises: Callable[[Shapes], bool] | None = None
    timm_tag: str = ""
    tokenizer: Callable[[Any], bytes] | None = None
    default_targets: tuple[str, ...] = ("cls", "patches")
    layers_rule: str = "thesis"
    layers_last: Mapping[int, int] = field(default_factory=dict)
    spec: type | None = None
    phrase: str = ""
    entries: tuple[CatalogueEntry, ...] = ()
