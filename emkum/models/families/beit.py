"""BEiT (arXiv:2106.08254) as transformers stores it; data2vec vision (arXiv:2202.03555) has the same blocks."""

from __future__ import annotations

from emkum.errors import UnsupportedNetwork
from emkum.models.backbone import BackboneSpec, SharedOrNot
from emkum.models.families.checkpoint import Checkpoint, KeyMap, is_untrained_norm, refuse_fine_tuned
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.families.hf_names import activation, legacy_name, square, vision_eps
from emkum.models.preprocessing import HALF, Preprocessing

TABLE = "relative_position_bias.relative_position_bias_table"


def key_map(checkpoint: Checkpoint, family: str = "beit", instead: str = "beit") -> KeyMap:
    """Refuses classifiers and segmenters, and a trained pooler norm: both are made with labels."""
    refuse_fine_tuned(checkpoint, r"^(classifier|head|fc_norm|decode_head|auxiliary_head|fpn\d)\.", instead)
    config = checkpoint.config
    spec = BackboneSpec(
        family=family,
        modality="image",
        depth=int(config.get("num_hidden_layers", 12)),
        width=int(config.get("hidden_size", 768)),
        heads=int(config.get("num_attention_heads", 12)),
        mlp_width=int(config.get("intermediate_size", 3072)),
        layer_scale=float(config.get("layer_scale_init_value", 0.1)) > 0,
        qkv_bias="qv",
        activation=activation(config, "gelu"),
        eps=vision_eps(config),
        # BeitModel with use_mean_pooling has no norm of its own, BeitForMaskedImageModeling puts one after it.
        final_norm="layernorm.weight" in checkpoint.shapes,
        position="absolute" if config.get("use_absolute_position_embeddings", False) else "none",
        relative_bias=_relative_bias(checkpoint),
        patch=square(config.get("patch_size", 16), "patches of"),
        image_size=square(config.get("image_size", 224), "pictures of"),
    )
    sources: dict[str, str | tuple[str, ...]] = {
        "embedding.cls": "embeddings.cls_token",
        "embedding.patch.weight": "embeddings.patch_embeddings.projection.weight",
        "embedding.patch.bias": "embeddings.patch_embeddings.projection.bias",
    }
    if spec.final_norm:
        sources |= {"norm.weight": "layernorm.weight", "norm.bias": "layernorm.bias"}
    if spec.position == "absolute":
        sources["embedding.positions"] = "embeddings.position_embeddings"
    if spec.relative_bias == "shared":
        sources["stack.biases.0.table"] = f"encoder.{TABLE}"
    for i in range(spec.depth):
        ours, theirs = f"stack.blocks.{i}", f"encoder.layer.{i}"
        attention = f"{theirs}.attention.attention"
        sources[f"{ours}.qkv.weight"] = tuple(f"{attention}.{name}.weight" for name in ("query", "key", "value"))
        sources[f"{ours}.q_bias"] = f"{attention}.query.bias"
        sources[f"{ours}.v_bias"] = f"{attention}.value.bias"
        if spec.relative_bias == "per_block":
            sources[f"stack.biases.{i}.table"] = f"{attention}.{TABLE}"
        if spec.layer_scale:
            sources |= {f"{ours}.scale1": f"{theirs}.lambda_1", f"{ours}.scale2": f"{theirs}.lambda_2"}
        for end in ("weight", "bias"):
            sources |= {
                f"{ours}.norm1.{end}": f"{theirs}.layernorm_before.{end}",
                f"{ours}.proj.{end}": f"{theirs}.attention.output.dense.{end}",
                f"{ours}.norm2.{end}": f"{theirs}.layernorm_after.{end}",
                f"{ours}.fc1.{end}": f"{theirs}.intermediate.dense.{end}",
                f"{ours}.fc2.{end}": f"{theirs}.output.dense.{end}",
            }
    drop = [r"^embeddings\.mask_token$", r"^lm_head\.", r"relative_position_index$"]
    if "pooler.layernorm.weight" in checkpoint.shapes:
        if not is_untrained_norm(checkpoint, "pooler.layernorm"):
            raise UnsupportedNetwork(
                f"{checkpoint.label} is fine-tuned with labels: its pooler.layernorm (the original fc_norm) is trained",
                f"use {instead}",
            )
        drop.append(r"^pooler\.layernorm\.")
    return KeyMap(spec, sources, tuple(drop))


def _relative_bias(checkpoint: Checkpoint) -> SharedOrNot:
    shared = bool(checkpoint.config.get("use_shared_relative_position_bias", False))
    per_block = bool(checkpoint.config.get("use_relative_position_bias", False))
    if shared and per_block:
        raise UnsupportedNetwork(f"{checkpoint.label}: shared and per-block relative position biases in one network")
    if shared:
        return "shared"
    return "per_block" if per_block else "none"


FAMILIES = (
    Family(
        name="beit",
        phrase="BEiT: codes of DALL-E's dVAE predicted at masked patches",
        modality="image",
        model_types=("beit",),
        rename=legacy_name("beit."),
        key_map=key_map,
        preprocessing=Preprocessing(mean=HALF, std=HALF, interpolation="bilinear"),
        entries=(
            CatalogueEntry(
                "beit",
                "microsoft/beit-base-patch16-224-pt22k",
                "none",
                "MIT",
                width=768,
                depth=12,
                patch=16,
                tokens=197,
                notes="its tokenizer is DALL-E's dVAE",
            ),
        ),
    ),
)
