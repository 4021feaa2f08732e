"""The vision half of CLIP (arXiv:2103.00020) as transformers stores it, alone or within the whole of CLIP."""

from __future__ import annotations

from typing import Any

from emkum.models.backbone import BackboneSpec
from emkum.models.families.checkpoint import Checkpoint, KeyMap, refuse_fine_tuned
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.families.hf_names import activation, square
from emkum.models.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing


def key_map(checkpoint: Checkpoint) -> KeyMap:
    """CLS is the pooled output before the projection into the space shared with text."""
    refuse_fine_tuned(checkpoint, r"^classifier\.", "clip-b16")
    config: dict[str, Any] = checkpoint.config.get("vision_config", checkpoint.config)
    spec = BackboneSpec(
        family="clip-vision",
        modality="image",
        depth=int(config.get("num_hidden_layers", 12)),
        width=int(config.get("hidden_size", 768)),
        heads=int(config.get("num_attention_heads", 12)),
        mlp_width=int(config.get("intermediate_size", 3072)),
        activation=activation(config, "quick_gelu"),
        eps=float(config.get("layer_norm_eps", 1e-5)),
        pre_norm=True,
        patch_bias=False,
        patch=square(config.get("patch_size", 32), "patches of"),
        image_size=square(config.get("image_size", 224), "pictures of"),
    )
    sources = block_sources(spec.depth) | {
        "embedding.cls": "embeddings.class_embedding",
        "embedding.positions": "embeddings.position_embedding.weight",
        "embedding.patch.weight": "embeddings.patch_embedding.weight",
    }
    for end in ("weight", "bias"):
        sources[f"embedding.norm.{end}"] = f"pre_layrnorm.{end}"
        sources[f"norm.{end}"] = f"post_layernorm.{end}"
    text_and_projections = (r"^text_model\.", r"^(text|visual)_projection\.", r"^logit_scale$")
    return KeyMap(spec, sources, drop=(*text_and_projections, r"position_ids$"))


def block_sources(depth: int) -> dict[str, str | tuple[str, ...]]:
    """Where the tensors of the blocks are; both halves of CLIP name them alike."""
    sources: dict[str, str | tuple[str, ...]] = {}
    for i in range(depth):
        ours, theirs = f"stack.blocks.{i}", f"encoder.layers.{i}"
        for end in ("weight", "bias"):
            sources |= {
                f"{ours}.norm1.{end}": f"{theirs}.layer_norm1.{end}",
                f"{ours}.qkv.{end}": tuple(f"{theirs}.self_attn.{name}_proj.{end}" for name in "qkv"),
                f"{ours}.proj.{end}": f"{theirs}.self_attn.out_proj.{end}",
                f"{ours}.norm2.{end}": f"{theirs}.layer_norm2.{end}",
                f"{ours}.fc1.{end}": f"{theirs}.mlp.fc1.{end}",
                f"{ours}.fc2.{end}": f"{theirs}.mlp.fc2.{end}",
            }
    return sources


def _entry(name: str, repo: str, width: int, depth: int, patch: int) -> CatalogueEntry:
    tokens = 1 + (224 // patch) ** 2
    return CatalogueEntry(name, f"openai/{repo}", "paired_text", "MIT", width, depth, patch=patch, tokens=tokens)


FAMILIES = (
    Family(
        name="clip-vision",
        phrase="CLIP, its half for pictures: captions matched to pictures",
        modality="image",
        model_types=("clip", "clip_vision_model"),
        rename=lambda name: name.removeprefix("vision_model."),
        key_map=key_map,
        preprocessing=Preprocessing(mean=CLIP_MEAN, std=CLIP_STD),
        entries=(
            _entry("clip-b32", "clip-vit-base-patch32", 768, 12, 32),
            _entry("clip-b16", "clip-vit-base-patch16", 768, 12, 16),
            _entry("clip-l14", "clip-vit-large-patch14", 1024, 24, 14),
        ),
    ),
)
