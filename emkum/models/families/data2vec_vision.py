"""Data2vec vision, version 1 (arXiv:2202.03555): BEiT's blocks with one shared bias, by transformers or its authors."""

from __future__ import annotations

from emkum.models.families import beit, data2vec_originals
from emkum.models.families.checkpoint import Checkpoint, KeyMap
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.families.hf_names import legacy_name
from emkum.models.preprocessing import Preprocessing


def key_map(checkpoint: Checkpoint) -> KeyMap:
    """As BEiT's. An original file has BEiT's original names."""
    if "patch_embed.proj.weight" in checkpoint.shapes:
        return data2vec_originals.vision_key_map(checkpoint)
    return beit.key_map(checkpoint, "data2vec-vision", "data2vec-vision")


FAMILIES = (
    Family(
        name="data2vec-vision",
        phrase="data2vec 1: its own averaged layers predicted at masked patches",
        modality="image",
        model_types=("data2vec-vision",),
        rename=legacy_name("data2vec_vision."),
        key_map=key_map,
        # It was trained with ImageNet's mean and deviation; the published preprocessor says 0.5.
        preprocessing=Preprocessing(interpolation="bicubic"),
        trust_preprocessor=False,
        recognises=data2vec_originals.is_vision,
        default_targets=("layers",),
        layers_rule="data2vec",
        entries=(
            CatalogueEntry(
                "data2vec-vision",
                "facebook/data2vec-vision-base",
                "none",
                "CC-BY-NC-4.0",
                width=768,
                depth=12,
                patch=16,
                tokens=197,
                notes="the hub's card says apache-2.0, the authors' repository CC-BY-NC: non-commercial to be safe",
            ),
        ),
    ),
)
