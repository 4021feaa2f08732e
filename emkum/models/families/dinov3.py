"""DINOv3 (arXiv:2508.10104), its Transformers, as transformers stores them."""

from __future__ import annotations

from typing import Any

from emkum.errors import UnsupportedNetwork
from emkum.models.backbone import BackboneSpec
from emkum.models.blocks import QkvBias
from emkum.models.families.checkpoint import Checkpoint, KeyMap, refuse_fine_tuned
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.families.hf_names import activation, square
from emkum.models.preprocessing import Preprocessing

_QKV_BIAS: dict[tuple[bool, ...], QkvBias] = {
    (True, True, True): "all",
    (True, False, True): "qv",
    (False, False, False): "none",
}


def key_map(checkpoint: Checkpoint) -> KeyMap:
    """No table of positions: queries and keys of patches are turned by where these lie in the picture."""
    refuse_fine_tuned(checkpoint, r"^(classifier|head|fc_norm)\.", "the backbone alone, such as dinov3-b")
    config = checkpoint.config
    _check(checkpoint.label, config)
    gated = bool(config.get("use_gated_mlp", False))
    spec = BackboneSpec(
        family="dinov3",
        modality="image",
        depth=int(config.get("num_hidden_layers", 12)),
        width=int(config.get("hidden_size", 384)),
        heads=int(config.get("num_attention_heads", 6)),
        mlp_width=int(config.get("intermediate_size", 1536)),
        layer_scale=True,
        qkv_bias=_qkv_bias(checkpoint.label, config),
        activation=activation(config, "gelu"),
        eps=float(config.get("layer_norm_eps", 1e-5)),
        position="none",
        patch=square(config.get("patch_size", 16), "patches of"),
        image_size=square(config.get("image_size", 224), "pictures of"),
        num_registers=int(config.get("num_register_tokens", 0)),
        gated=gated,
        rotary_base=float(config.get("rope_theta", 100.0)),
    )
    sources: dict[str, str | tuple[str, ...]] = {
        "embedding.cls": "embeddings.cls_token",
        "embedding.patch.weight": "embeddings.patch_embeddings.weight",
        "embedding.patch.bias": "embeddings.patch_embeddings.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    }
    if spec.num_registers:
        sources["embedding.registers"] = "embeddings.register_tokens"
    for i in range(spec.depth):
        ours, theirs = f"stack.blocks.{i}", f"layer.{i}"
        sources[f"{ours}.scale1"] = f"{theirs}.layer_scale1.lambda1"
        sources[f"{ours}.scale2"] = f"{theirs}.layer_scale2.lambda1"
        sources[f"{ours}.qkv.weight"] = tuple(f"{theirs}.attention.{name}_proj.weight" for name in "qkv")
        if spec.qkv_bias == "all":
            sources[f"{ours}.qkv.bias"] = tuple(f"{theirs}.attention.{name}_proj.bias" for name in "qkv")
        elif spec.qkv_bias == "qv":
            sources |= {f"{ours}.{name}_bias": f"{theirs}.attention.{name}_proj.bias" for name in "qv"}
        for end in ("weight", "bias"):
            gate, up = f"{theirs}.mlp.gate_proj.{end}", f"{theirs}.mlp.up_proj.{end}"
            sources |= {
                f"{ours}.norm1.{end}": f"{theirs}.norm1.{end}",
                f"{ours}.proj.{end}": f"{theirs}.attention.o_proj.{end}",
                f"{ours}.norm2.{end}": f"{theirs}.norm2.{end}",
                f"{ours}.fc1.{end}": (gate, up) if gated else up,
                f"{ours}.fc2.{end}": f"{theirs}.mlp.down_proj.{end}",
            }
    drop = [r"^embeddings\.mask_token$"]
    if 0 in checkpoint.shapes.get("embeddings.register_tokens", ()):
        drop.append(r"^embeddings\.register_tokens$")
    return KeyMap(spec, sources, tuple(drop))


def _check(label: str, config: dict[str, Any]) -> None:
    without = [name for name in ("proj_bias", "mlp_bias") if not config.get(name, True)]
    if without:
        raise UnsupportedNetwork(f"{label}: a DINOv3 with {without[0]} = false", "no size of the release is made so")


def _qkv_bias(label: str, config: dict[str, Any]) -> QkvBias:
    names = {"query_bias": True, "key_bias": False, "value_bias": True}
    flags = tuple(bool(config.get(name, default)) for name, default in names.items())
    if flags not in _QKV_BIAS:
        said = ", ".join(f"{name} = {str(flag).lower()}" for name, flag in zip(names, flags, strict=True))
        raise UnsupportedNetwork(f"{label}: a DINOv3 with {said}", "no size of the release is made so")
    return _QKV_BIAS[flags]


def _rename(name: str) -> str:
    """The names on disk; in memory the blocks stand one level deeper."""
    return name.removeprefix("model.") if name.startswith("model.layer.") else name


def _entry(name: str, repo: str, width: int, depth: int) -> CatalogueEntry:
    source = f"facebook/dinov3-{repo}-pretrain-lvd1689m"
    notes = "behind terms on the hub: accept them there, then log in"
    licence = "DINOv3 licence (custom)"
    return CatalogueEntry(name, source, "none", licence, width, depth, patch=16, tokens=201, notes=notes)


FAMILIES = (
    Family(
        name="dinov3",
        phrase="DINOv3: views of a picture agree with an averaged copy",
        modality="image",
        model_types=("dinov3_vit",),
        rename=_rename,
        key_map=key_map,
        preprocessing=Preprocessing(),
        entries=(
            _entry("dinov3-s", "vits16", 384, 12),
            _entry("dinov3-s-plus", "vits16plus", 384, 12),
            _entry("dinov3-b", "vitb16", 768, 12),
            _entry("dinov3-l", "vitl16", 1024, 24),
            _entry("dinov3-h-plus", "vith16plus", 1280, 32),
        ),
    ),
)
