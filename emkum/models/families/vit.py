"""ViT as transformers stores it, the form DINO is published in (arXiv:2104.14294); MAE and FLAVA name blocks alike."""

from __future__ import annotations

from typing import Any

from emkum.models.backbone import BackboneSpec
from emkum.models.families.checkpoint import Checkpoint, KeyMap, refuse_fine_tuned
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.families.hf_names import activation, legacy_name, square, vision_eps
from emkum.models.preprocessing import Preprocessing


def key_map(checkpoint: Checkpoint, family: str = "vit", instead: str = "dino-s16") -> KeyMap:
    """Refuses classifiers: a ViT with one was trained with labels. instead: what to use then."""
    if family == "vit" and any(
        "ForImageClassification" in str(a) for a in checkpoint.config.get("architectures") or ()
    ):
        instead += f"; or, where its classifier is meant, {checkpoint.label}#logits"
    refuse_fine_tuned(checkpoint, r"^(classifier|cls_classifier|distillation_classifier|head|fc_norm)\.", instead)
    config = checkpoint.config
    spec = image_spec(family, config, vision_eps(config))
    return KeyMap(spec, image_sources(spec), drop=(r"^pooler\.", r"^embeddings\.mask_token$", r"^decoder\."))


def image_spec(family: str, config: dict[str, Any], eps: float) -> BackboneSpec:
    """A plain ViT of config.json's numbers."""
    return BackboneSpec(
        family=family,
        modality="image",
        depth=int(config.get("num_hidden_layers", 12)),
        width=int(config.get("hidden_size", 768)),
        heads=int(config.get("num_attention_heads", 12)),
        mlp_width=int(config.get("intermediate_size", 3072)),
        qkv_bias="all" if config.get("qkv_bias", True) else "none",
        activation=activation(config, "gelu"),
        eps=eps,
        patch=square(config.get("patch_size", 16), "patches of"),
        image_size=square(config.get("image_size", 224), "pictures of"),
    )


def image_sources(spec: BackboneSpec) -> dict[str, str | tuple[str, ...]]:
    """Where the tensors of a plain ViT are."""
    return {
        "embedding.cls": "embeddings.cls_token",
        "embedding.positions": "embeddings.position_embeddings",
        "embedding.patch.weight": "embeddings.patch_embeddings.projection.weight",
        "embedding.patch.bias": "embeddings.patch_embeddings.projection.bias",
        **block_sources(spec),
    }


def block_sources(spec: BackboneSpec) -> dict[str, str | tuple[str, ...]]:
    """Where the tensors of its blocks and of its last norm are."""
    sources: dict[str, str | tuple[str, ...]] = {"norm.weight": "layernorm.weight", "norm.bias": "layernorm.bias"}
    for i in range(spec.depth):
        ours, theirs = f"stack.blocks.{i}", f"encoder.layer.{i}"
        for end in ("weight", "bias"):
            sources |= {
                f"{ours}.norm1.{end}": f"{theirs}.layernorm_before.{end}",
                f"{ours}.proj.{end}": f"{theirs}.attention.output.dense.{end}",
                f"{ours}.norm2.{end}": f"{theirs}.layernorm_after.{end}",
                f"{ours}.fc1.{end}": f"{theirs}.intermediate.dense.{end}",
                f"{ours}.fc2.{end}": f"{theirs}.output.dense.{end}",
            }
            if end == "weight" or spec.qkv_bias == "all":
                qkv = tuple(f"{theirs}.attention.attention.{name}.{end}" for name in ("query", "key", "value"))
                sources[f"{ours}.qkv.{end}"] = qkv
    return sources


def _entry(name: str, repo: str, width: int, patch: int) -> CatalogueEntry:
    tokens = 1 + (224 // patch) ** 2
    return CatalogueEntry(name, f"facebook/{repo}", "none", "Apache-2.0", width, 12, patch=patch, tokens=tokens)


FAMILIES = (
    Family(
        name="vit",
        phrase="DINO: views of a picture agree with an averaged copy",
        modality="image",
        model_types=("vit",),
        rename=legacy_name("vit."),
        key_map=key_map,
        preprocessing=Preprocessing(crop_fraction=224 / 256),
        entries=(
            _entry("dino-s16", "dino-vits16", 384, 16),
            _entry("dino-s8", "dino-vits8", 384, 8),
            _entry("dino-b16", "dino-vitb16", 768, 16),
            _entry("dino-b8", "dino-vitb8", 768, 8),
        ),
    ),
)
