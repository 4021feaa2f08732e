"""MAE (arXiv:2111.06377) as transformers stores it: the encoder alone, nothing masked."""

from __future__ import annotations

from emkum.models.families import vit
from emkum.models.families.checkpoint import Checkpoint, KeyMap
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.families.hf_names import legacy_name
from emkum.models.preprocessing import Preprocessing


def key_map(checkpoint: Checkpoint) -> KeyMap:
    """A ViT whose positions, sine and cosine, are a table of the file; the decoder is dropped."""
    return vit.key_map(checkpoint, "mae", "mae-b")


def _entry(name: str, repo: str, width: int, depth: int) -> CatalogueEntry:
    return CatalogueEntry(name, f"facebook/{repo}", "none", "CC-BY-NC-4.0", width, depth, patch=16, tokens=197)


FAMILIES = (
    Family(
        name="mae",
        phrase="MAE: pixels predicted at masked patches",
        modality="image",
        model_types=("vit_mae",),
        rename=legacy_name("vit."),
        key_map=key_map,
        preprocessing=Preprocessing(crop_fraction=0.9),
        entries=(_entry("mae-b", "vit-mae-base", 768, 12), _entry("mae-l", "vit-mae-large", 1024, 24)),
    ),
)
