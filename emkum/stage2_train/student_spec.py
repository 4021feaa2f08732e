"""What a student is, but for its weights: dataclasses with a JSON round trip, from which it is built anew."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from emkum.models.backbone import BackboneSpec, StackSpec
from emkum.models.blocks import BlockSpec
from emkum.models.families.registry import spec_of
from emkum.models.multiway import MultiwayStackSpec
from emkum.models.preprocessing import Preprocessing
from emkum.models.resnet import ResNetSpec
from emkum.stage2_train.shared_mlp import SharedMlpSpec

Pooling = Literal["cls", "mean"]
TOKEN_TYPE_SCALE = 1e-5  # THESIS.md section 1: LayerScale start of the token-type embedding


@dataclass(frozen=True)
class ImageSide:
    """The student's blocks for pictures; they start from tokens of `encoder` at depth `cut`. None: no block."""

    encoder: str
    cut: int
    num_prefix: int
    stack: StackSpec | None
    pooling: Pooling


@dataclass(frozen=True)
class PixelSide:
    """A student of pixels: a whole network, how its pictures are normalised, the side of the crops it learns from.

    architecture: of the network without a classifier, in place of which the student has its head.
    """

    architecture: BackboneSpec | ResNetSpec
    preprocessing: Preprocessing
    size: int


@dataclass(frozen=True)
class TextSide:
    """The student's embedding and blocks for texts, from the start of `encoder`; `width` is theirs."""

    encoder: str
    embedding: BackboneSpec
    stack: StackSpec | None
    pooling: Pooling

    @property
    def width(self) -> int:
        return self.embedding.width


@dataclass(frozen=True)
class HeadSpec:
    """A linear head of one objective: `term`, its name in the recipe, and the channels of its output."""

    term: str
    width: int


@dataclass(frozen=True)
class StudentSpec:
    """Everything that decides what a student computes, but its weights. JSON round trip by to_json and from_json.

    width: of the image side, the shared blocks and the head's input. head_width None: no final norm and no head,
    features are pooled from the last block (unimodal students). shared_mlp, shared_mome: in place of shared blocks.

    heads: in place of the one head; the first is that of the features, and head_width its width. types_before: token
    types are added in front of the modalities' blocks, not behind. token_type_scale: LayerScale's start, 0 for none.
    shared_positions: rows of a table that both modalities take positions from, in front of the shared part. projection:
    a norm and a linear layer for each modality there. pixels: a network that reads pictures, in place of image blocks;
    it has a final norm of its own, and head_width None then means that it has no head.
    """

    image: ImageSide | None
    text: TextSide | None
    width: int
    shared: StackSpec | None
    token_types: bool
    head_width: int | None
    shared_mlp: SharedMlpSpec | None = None
    shared_mome: MultiwayStackSpec | None = None
    heads: tuple[HeadSpec, ...] = ()
    types_before: bool = False
    token_type_scale: float = TOKEN_TYPE_SCALE
    shared_positions: int = 0
    projection: bool = False
    pixels: PixelSide | None = None

    @property
    def contrast_widths(self) -> tuple[int, ...]:
        """Channels of each of `StudentOut.layers`."""
        if self.shared_mlp is None:
            return (self.head_width or self.width,)
        widths = self.shared_mlp.hidden, self.width
        return widths if self.shared_mlp.heads else (*widths, self.head_width or self.width)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types. Fields that came after emkum 0.3 are left out where they have their default."""
        plain = dataclasses.asdict(self)
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name not in _FIRST_FIELDS}
        plain = {key: value for key, value in plain.items() if getattr(self, key) != defaults.get(key, _NOTHING)}
        return {"format": 1, **plain}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> StudentSpec:
        """The inverse of `to_json`. Raises ValueError for keys it does not know, KeyError for one that is lacking."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(found) - known - {"format"}):
            raise ValueError(f"unknown keys {', '.join(unknown)}")
        image, text, mome, pixels = found["image"], found["text"], found.get("shared_mome"), found.get("pixels")
        own: dict[str, Any] = {
            "image": ImageSide(**{**image, "stack": _stack_from(image["stack"])}) if image else None,
            "text": TextSide(
                **{
                    **text,
                    "embedding": BackboneSpec.from_json(text["embedding"]),
                    "stack": _stack_from(text["stack"]),
                }
            )
            if text
            else None,
            "shared": _stack_from(found["shared"]),
            "shared_mlp": SharedMlpSpec(**found["shared_mlp"]) if found.get("shared_mlp") else None,  # emkum 0.2: none
            "shared_mome": mome_from(mome) if mome else None,
            "heads": tuple(HeadSpec(**head) for head in found.get("heads", ())),
            "pixels": _pixels_from(pixels) if pixels else None,
        }
        plain = {key: value for key, value in found.items() if key not in own and key != "format"}
        for key in ("width", "token_types", "head_width"):
            plain[key] = found[key]
        return cls(**own, **plain)


_FIRST_FIELDS = ("image", "text", "width", "shared", "token_types", "head_width", "shared_mlp")  # never add to it
_NOTHING = object()


def _stack_from(found: dict[str, Any] | None) -> StackSpec | None:
    return StackSpec.from_json(found) if found else None


def _pixels_from(found: dict[str, Any]) -> PixelSide:
    architecture = spec_of(found["architecture"])
    assert isinstance(architecture, BackboneSpec | ResNetSpec)
    return PixelSide(architecture, Preprocessing.from_json(found["preprocessing"]), int(found["size"]))


def mome_from(found: dict[str, Any]) -> MultiwayStackSpec:
    """The inverse of dataclasses.asdict, as read from JSON."""
    return MultiwayStackSpec(**{**found, "block": BlockSpec(**found["block"]), "grid": tuple(found["grid"])})
