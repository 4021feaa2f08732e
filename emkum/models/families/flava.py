"""FLAVA's towers for pictures and for texts (arXiv:2112.04482) as transformers stores them, alone or in the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from emkum.models.backbone import BackboneSpec
from emkum.models.families import vit
from emkum.models.families.checkpoint import Checkpoint, KeyMap, refuse_fine_tuned
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.families.hf_names import activation, legacy_name
from emkum.models.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing

# Of the whole: the other towers, the projections between them, the codebook, the heads of pre-training.
_ELSE = (
    r"^(image|text|multimodal)_model\.",
    r"^(image|text)(_to_mm)?_projection\.",
    r"^logit_scale$",
    r"^image_codebook\.",
    r"^(mim|mlm|itm|mmm_image|mmm_text)_head\.",
    r"^pooler\.",
)
_CLASSIFIER = r"^(classifier|head)\."


def image_key_map(checkpoint: Checkpoint) -> KeyMap:
    """A plain ViT; its norms were trained with the epsilon of BERT, 1e-12, which its configuration says."""
    refuse_fine_tuned(checkpoint, _CLASSIFIER, "flava")
    config: dict[str, Any] = checkpoint.config.get("image_config", checkpoint.config)
    spec = vit.image_spec("flava", config, float(config.get("layer_norm_eps", 1e-12)))
    return KeyMap(spec, vit.image_sources(spec), drop=(*_ELSE, r"^embeddings\.mask_token$"))


def text_key_map(checkpoint: Checkpoint) -> KeyMap:
    """BERT's embedding in front of the blocks of a ViT."""
    refuse_fine_tuned(checkpoint, _CLASSIFIER, "flava-text")
    config: dict[str, Any] = checkpoint.config.get("text_config", checkpoint.config)
    spec = BackboneSpec(
        family="flava",
        modality="text",
        depth=int(config.get("num_hidden_layers", 12)),
        width=int(config.get("hidden_size", 768)),
        heads=int(config.get("num_attention_heads", 12)),
        mlp_width=int(config.get("intermediate_size", 3072)),
        qkv_bias="all" if config.get("qkv_bias", True) else "none",
        activation=activation(config, "gelu"),
        eps=float(config.get("layer_norm_eps", 1e-12)),
        pre_norm=True,
        vocab_size=int(config.get("vocab_size", 30522)),
        max_positions=int(config.get("max_position_embeddings", 512)),
        token_types=int(config.get("type_vocab_size", 2)),
        pad_id=int(config.get("pad_token_id") or 0),
    )
    sources: dict[str, str | tuple[str, ...]] = {
        "embedding.tokens": "embeddings.word_embeddings.weight",
        "embedding.positions": "embeddings.position_embeddings.weight",
        "embedding.types": "embeddings.token_type_embeddings.weight",
        "embedding.norm.weight": "embeddings.LayerNorm.weight",
        "embedding.norm.bias": "embeddings.LayerNorm.bias",
    }
    drop = (*_ELSE, r"^embeddings\.(position_ids|token_type_ids)$")
    return KeyMap(spec, sources | vit.block_sources(spec), drop)


def _rename(tower: str) -> Callable[[str], str]:
    """ "flava.text_model.x" -> "x" for the tower "text_model."; the rest of the whole keeps its names."""
    of_tower = legacy_name(tower)

    def rename(name: str) -> str:
        name = name.removeprefix("flava.")
        return of_tower(name) if name.startswith((tower, "embeddings.", "encoder.", "layer")) else name

    return rename


_ENTRY = CatalogueEntry("flava", "facebook/flava-full", "paired_text", "BSD-3-Clause", 768, 12, patch=16, tokens=197)

FAMILIES = (
    Family(
        name="flava",
        phrase="FLAVA, its tower for pictures: captions matched, codes predicted at masked patches",
        modality="image",
        model_types=("flava", "flava_image_model"),
        rename=_rename("image_model."),
        key_map=image_key_map,
        preprocessing=Preprocessing(mean=CLIP_MEAN, std=CLIP_STD),
        entries=(_ENTRY,),
    ),
    Family(
        name="flava",
        phrase="FLAVA, its tower for texts: pictures matched, masked words predicted",
        modality="text",
        model_types=("flava", "flava_text_model"),
        rename=_rename("text_model."),
        key_map=text_key_map,
        default_targets=("cls",),
        entries=(dataclasses.replace(_ENTRY, name="flava-text", patch=0, tokens=512),),
    ),
)
