"""MAE (arXiv:2111.06377) as transformers, timm or its authors store it: the encoder alone, nothing masked."""

from __future__ import annotations

from emkum.errors import UnsupportedNetwork
from emkum.models.families import vit
from emkum.models.families.checkpoint import Checkpoint, KeyMap, refuse_fine_tuned
from emkum.models.families.dino_originals import has_sine_positions, plain_key_map
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.families.hf_names import legacy_name
from emkum.models.preprocessing import Preprocessing

HEADS = {768: 12, 1024: 16, 1280: 16}  # of the original files, which do not tell


def key_map(checkpoint: Checkpoint) -> KeyMap:
    """A ViT whose positions, sine and cosine, are a table of the file; the decoder is dropped."""
    if "patch_embed.proj.weight" in checkpoint.shapes:
        return _original_key_map(checkpoint)
    return vit.key_map(checkpoint, "mae", "mae-b")


def _original_key_map(checkpoint: Checkpoint) -> KeyMap:
    """Of the authors' file or of timm's: named as DINO's, told apart by the positions, which nobody trained."""
    refuse_fine_tuned(checkpoint, r"^(head|fc_norm)\.", "mae-b")
    if "pos_embed" not in checkpoint.shapes or not has_sine_positions(checkpoint):
        raise UnsupportedNetwork(
            f"{checkpoint.label} is no file of MAE: its positions are not sines and cosines", "leave --family out"
        )
    return plain_key_map(checkpoint, "mae", HEADS, (r"^mask_token$", r"^decoder_"))


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
        timm_tag="mae",
        preprocessing=Preprocessing(crop_fraction=0.9),
        entries=(_entry("mae-b", "vit-mae-base", 768, 12), _entry("mae-l", "vit-mae-large", 1024, 24)),
    ),
)
