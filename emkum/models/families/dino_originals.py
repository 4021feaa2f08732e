"""DINO's and DINOv2's original files: a plain ViT under the names that timm made common, without a config.json."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from emkum.errors import UnsupportedNetwork
from emkum.models.backbone import BackboneSpec
from emkum.models.families.checkpoint import Checkpoint, KeyMap, Shapes, refuse_fine_tuned
from emkum.models.families.family import Family
from emkum.models.families.timm_folders import require_name
from emkum.models.preprocessing import Preprocessing

TEACHER = "teacher.backbone."  # in DINO's full checkpoint, beside the student, their heads and the optimiser
HEADS = {384: 6, 768: 12, 1024: 16, 1536: 24}  # of the widths that were released of both: no shape tells
SINES = 0.01  # how far a table that was kept in bfloat16 may be from its sines


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
    """Of a full checkpoint the teacher, which is what DINO publishes. MAE's files have the same names: refused."""
    refuse_fine_tuned(checkpoint, r"^(head|fc_norm)\.|^(module\.)?linear\.", "the backbone alone, such as dino-b16")
    require_name(checkpoint, r"dino(?!v)", "its tensors are named as DINO's, but it was trained otherwise")
    if has_sine_positions(checkpoint):
        raise UnsupportedNetwork(
            f"{checkpoint.label} has positions of sines and cosines: it is a file of MAE, not of DINO",
            f"say so: emkum teachers convert {checkpoint.label} --family mae",
        )
    return plain_key_map(checkpoint, "vit", HEADS, (r"^(student|teacher\.head|optimizer|dino_loss|fp16_scaler)\.",))


def dinov2_key_map(checkpoint: Checkpoint) -> KeyMap:
    """With or without registers, of any size."""
    refuse_fine_tuned(checkpoint, r"^(head|fc_norm|linear_head)\.", "the backbone alone, such as dinov2-b")
    require_name(checkpoint, "dinov2", "its tensors are named as DINOv2's, but it was trained otherwise")
    return plain_key_map(checkpoint, "dinov2", HEADS, (r"^mask_token$",))


def has_sine_positions(checkpoint: Checkpoint) -> bool:
    """Whether the table of positions is MAE's: zeros for CLS, then sines and cosines, never trained."""
    shape = checkpoint.shapes["pos_embed"]
    side = round((shape[1] - 1) ** 0.5)
    if side * side != shape[1] - 1 or shape[2] % 4:
        return False
    found_TD = checkpoint.tensor("pos_embed")[0].double()
    return bool((found_TD - sine_positions(side, shape[2])).abs().max() < SINES)


def sine_positions(side: int, width: int) -> Tensor:
    """MAE's table (arXiv:2111.06377, appendix), float64 [1 + side*side, width]: of the column, then of the row."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    along = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    patches = torch.cat([along.repeat(side, 1), along.repeat_interleave(side, 0)], dim=1)
    return torch.cat([patches.new_zeros(1, width), patches])


def plain_key_map(checkpoint: Checkpoint, family: str, heads: Mapping[int, int], drop: tuple[str, ...]) -> KeyMap:
    """A plain ViT under timm's names. heads: of each width that was released; others are refused."""
    shapes = checkpoint.shapes
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    if width not in heads:
        raise UnsupportedNetwork(
            f"{checkpoint.label} is {width} wide and does not say how many heads its attention has; those of widths "
            f"{', '.join(map(str, heads))} are known ({family})",
            "use a released file, or a folder of transformers, whose config.json says it",
        )
    layer_scale, gated = "blocks.0.ls1.gamma" in shapes, "blocks.0.mlp.w12.weight" in shapes
    first, second = ("w12", "w3") if gated else ("fc1", "fc2")
    registers = shapes["register_tokens"][1] if "register_tokens" in shapes else 0
    spec = BackboneSpec(
        family=family,
        modality="image",
        depth=1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("blocks.")),
        width=width,
        heads=heads[width],
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
    return KeyMap(spec, sources, drop, inferred={"heads": spec.heads})


def _side(checkpoint: Checkpoint) -> int:
    """Rows of patches that the table of positions is for."""
    num_patches = checkpoint.shapes["pos_embed"][1] - 1
    side: int = round(num_patches**0.5)
    if side * side != num_patches:
        raise UnsupportedNetwork(
            f"{checkpoint.label}: pos_embed has {num_patches + 1} rows, which is not CLS and a square of patches",
            "use an original file as it was released",
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
