"""DINO's and DINOv2's original files: a plain ViT under the names that timm made common, without a config.json."""

from __future__ import annotations

from emkum.errors import UnsupportedNetwork
from emkum.models.backbone import BackboneSpec
from emkum.models.families.checkpoint import Checkpoint, KeyMap, Shapes, refuse_fine_tuned
from emkum.models.families.family import Family
from emkum.models.preprocessing import Preprocessing

TEACHER = "teacher.backbone."  # in DINO's full checkpoint, beside the student, their heads and the optimiser
HEAD_WIDTH = 64  # of every size of both


def recognises_dino(shapes: Shapes) -> bool:
    """A plain ViT with a table of positions, without LayerScale; or a linear classifier alone, to say what it is."""
    return (_is_vit(shapes) and not _has(shapes, "blocks.0.ls1.gamma")) or _is_linear(shapes)


def recognises_dinov2(shapes: Shapes) -> bool:
    """A plain ViT with LayerScale and a mask token."""
    return _is_vit(shapes) and _has(shapes, "blocks.0.ls1.gamma") and _has(shapes, "mask_token")


def _is_vit(shapes: Shapes) -> bool:
    needed = ("cls_token", "pos_embed", "patch_embed.proj.bias", "blocks.0.attn.qkv.bias", "blocks.0.norm1.weight")
    return all(_has(shapes, name) for name in needed) and not _has(shapes, "blocks.0.gamma_1")


def _has(shapes: Shapes, name: str) -> bool:
    return name in shapes or TEACHER + name in shapes


def _is_linear(shapes: Shapes) -> bool:
    return set(shapes) in ({f"{prefix}linear.{end}" for end in ("weight", "bias")} for prefix in ("", "module."))


def dino_key_map(checkpoint: Checkpoint) -> KeyMap:
    """Of a full checkpoint the teacher, which is what DINO publishes."""
    refuse_fine_tuned(checkpoint, r"^(head|fc_norm)\.|^(module\.)?linear\.", "the backbone alone, such as dino-b16")
    return _key_map(checkpoint, "vit", (r"^(student|teacher\.head|optimizer|dino_loss|fp16_scaler)\.",))


def dinov2_key_map(checkpoint: Checkpoint) -> KeyMap:
    """With or without registers, of any size."""
    refuse_fine_tuned(checkpoint, r"^(head|fc_norm|linear_head)\.", "the backbone alone, such as dinov2-b")
    return _key_map(checkpoint, "dinov2", (r"^mask_token$",))


def _key_map(checkpoint: Checkpoint, family: str, drop: tuple[str, ...]) -> KeyMap:
    shapes = checkpoint.shapes
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    layer_scale, gated = "blocks.0.ls1.gamma" in shapes, "blocks.0.mlp.w12.weight" in shapes
    first, second = ("w12", "w3") if gated else ("fc1", "fc2")
    registers = shapes["register_tokens"][1] if "register_tokens" in shapes else 0
    spec = BackboneSpec(
        family=family,
        modality="image",
        depth=1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("blocks.")),
        width=width,
        heads=width // HEAD_WIDTH,
        mlp_width=shapes[f"blocks.0.mlp.{second}.weight"][1],
        layer_scale=layer_scale,
        activation="silu" if gated else "gelu",
        patch=patch,
        image_size=_side(checkpoint) * patch,
        num_registers=registers,
        position_antialias=registers > 0,
        gated=gated,
    )
    sources: dict[str, str | tuple[str, ...]] = {"embedding.cls": "cls_token", "embedding.positions": "pos_embed"}
    if registers:
        sources["embedding.registers"] = "register_tokens"
    for end in ("weight", "bias"):
        sources |= {f"embedding.patch.{end}": f"patch_embed.proj.{end}", f"norm.{end}": f"norm.{end}"}
    for i in range(spec.depth):
        ours, theirs = f"stack.blocks.{i}", f"blocks.{i}"
        if layer_scale:
            sources |= {f"{ours}.scale1": f"{theirs}.ls1.gamma", f"{ours}.scale2": f"{theirs}.ls2.gamma"}
        for end in ("weight", "bias"):
            sources |= {
                f"{ours}.norm1.{end}": f"{theirs}.norm1.{end}",
                f"{ours}.qkv.{end}": f"{theirs}.attn.qkv.{end}",
                f"{ours}.proj.{end}": f"{theirs}.attn.proj.{end}",
                f"{ours}.norm2.{end}": f"{theirs}.norm2.{end}",
                f"{ours}.fc1.{end}": f"{theirs}.mlp.{first}.{end}",
                f"{ours}.fc2.{end}": f"{theirs}.mlp.{second}.{end}",
            }
    return KeyMap(spec, sources, drop)


def _side(checkpoint: Checkpoint) -> int:
    """Rows of patches that the table of positions is for."""
    num_patches = checkpoint.shapes["pos_embed"][1] - 1
    side: int = round(num_patches**0.5)
    if side * side != num_patches:
        raise UnsupportedNetwork(
            f"{checkpoint.label}: pos_embed has {num_patches + 1} rows, which is not CLS and a square of patches",
            "use an original file of DINO or DINOv2",
        )
    return side


FAMILIES = (
    Family(
        name="vit",
        phrase="DINO: views of a picture agree with an averaged copy",
        modality="image",
        model_types=(),
        rename=lambda name: name.removeprefix(TEACHER),
        key_map=dino_key_map,
        preprocessing=Preprocessing(crop_fraction=224 / 256),
        recognises=recognises_dino,
    ),
    Family(
        name="dinov2",
        phrase="DINOv2: views of a picture agree with an averaged copy",
        modality="image",
        model_types=(),
        rename=str,
        key_map=dinov2_key_map,
        preprocessing=Preprocessing(crop_fraction=224 / 256),
        recognises=recognises_dinov2,
    ),
)
