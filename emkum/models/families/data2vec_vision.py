"""Data2vec vision, version 1 (arXiv:2202.03555), as transformers stores it: BEiT's blocks with one shared bias."""

from __future__ import annotations

from emkum.models.families import beit
from emkum.models.families.checkpoint import Checkpoint, KeyMap
from emkum.models.families.family import Family
from emkum.models.families.hf_names import legacy_name
from emkum.models.preprocessing import Preprocessing


def key_map(checkpoint: Checkpoint) -> KeyMap:
    """As BEiT's."""
    return beit.key_map(checkpoint, "data2vec-vision", "data2vec-vision")


FAMILY = Family(
    name="data2vec-vision",
    modality="image",
    model_types=("data2vec-vision",),
    rename=legacy_name("data2vec_vision."),
    key_map=key_map,
    # It was trained with ImageNet's mean and deviation; the published preprocessor says 0.5.
    preprocessing=Preprocessing(interpolation="bicubic"),
    trust_preprocessor=False,
)
