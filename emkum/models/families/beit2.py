"""BEiT-2 (arXiv:2208.06366) from its original file: the self-supervised one exists nowhere else."""

from __future__ import annotations

import dataclasses
import re

from emkum.errors import UnsupportedNetwork
from emkum.models.backbone import BackboneSpec
from emkum.models.families.checkpoint import Checkpoint, KeyMap, Shapes, refuse_fine_tuned
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.preprocessing import Preprocessing

_TABLE = "relative_position_bias_table"
TABLE = f"rel_pos_bias.{_TABLE}"

_FINE_TUNED = r"^(head|fc_norm)\.|^blocks\.\d+\.attn\.relative_position_bias_table$"


def recognises(shapes: Shapes) -> bool:
    """BEiT's names, and the blocks that gather patches into CLS (`cls_pt_layers`), or what fine-tuning leaves.

    BEiT's names alone are not enough: BEiT and data2vec vision have the same, and other colours or another training.
    """
    named = "blocks.0.attn.q_bias" in shapes and "patch_embed.proj.weight" in shapes
    biased = any(name.endswith("relative_position_bias_table") for name in shapes)
    return named and biased and any(re.search(rf"^cls_pt_layers\.|{_FINE_TUNED}", name) for name in shapes)


def key_map(checkpoint: Checkpoint) -> KeyMap:
    """Everything is inferred from the shapes: the file has no configuration. Refuses fine-tuned files."""
    instead = (
        "a file named ..._pt1k.pth, such as beit2 in the catalogue; or, where labels are meant, beit2-ft of the "
        f"catalogue, or the folder that emkum teachers convert {checkpoint.label} --family beit2-ft --out DIR makes"
    )
    return original_key_map(checkpoint, "beit2", instead)


def original_key_map(checkpoint: Checkpoint, family: str, instead: str) -> KeyMap:
    """Of any file with BEiT's own names, shared relative biases and no head of a classifier."""
    refuse_fine_tuned(checkpoint, _FINE_TUNED, instead)
    return _key_map(checkpoint, family, instead, TABLE)


def fine_tuned_key_map(checkpoint: Checkpoint) -> KeyMap:
    """Of a file that was fine-tuned with labels: a bias table in each block, and no norm on the tokens.

    The network classifies by `fc_norm` and `head` of the patches' mean; both are dropped, and the tokens are those it
    takes the mean of. It is read under its name in the catalogue or by `convert --family` alone: any other such file is
    refused as a self-supervised teacher.
    """
    found = _key_map(checkpoint, "beit2-ft", "a file named ..._ft21kto1k.pth", "blocks.0.attn." + _TABLE)
    assert isinstance(found.spec, BackboneSpec)
    spec = dataclasses.replace(found.spec, relative_bias="per_block", final_norm=False)
    sources = {
        ours: theirs for ours, theirs in found.sources.items() if not ours.startswith(("norm.", "stack.biases."))
    }
    sources |= {f"stack.biases.{i}.table": f"blocks.{i}.attn.{_TABLE}" for i in range(spec.depth)}
    return KeyMap(spec, sources, drop=(r"^(head|fc_norm)\.", r"relative_position_index$"))


def _key_map(checkpoint: Checkpoint, family: str, instead: str, table: str) -> KeyMap:
    shapes = checkpoint.shapes
    if table not in shapes or "patch_embed.proj.weight" not in shapes or "blocks.0.mlp.fc1.weight" not in shapes:
        raise UnsupportedNetwork(f"{checkpoint.label} is no {family}: it lacks {table}", f"use {instead}")
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    num_rows, heads = shapes[table]
    grid = (round((num_rows - 3) ** 0.5) + 1) // 2
    spec = BackboneSpec(
        family=family,
        modality="image",
        depth=1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("blocks.")),
        width=width,
        heads=heads,
        mlp_width=shapes["blocks.0.mlp.fc1.weight"][0],
        layer_scale="blocks.0.gamma_1" in shapes,
        qkv_bias="qv",
        position="absolute" if "pos_embed" in shapes else "none",
        relative_bias="shared",
        patch=patch,
        image_size=grid * patch,
    )
    sources: dict[str, str | tuple[str, ...]] = {
        "embedding.cls": "cls_token",
        "embedding.patch.weight": "patch_embed.proj.weight",
        "embedding.patch.bias": "patch_embed.proj.bias",
        "stack.biases.0.table": TABLE,
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    }
    if spec.position == "absolute":
        sources["embedding.positions"] = "pos_embed"
    for i in range(spec.depth):
        ours, theirs = f"stack.blocks.{i}", f"blocks.{i}"
        sources |= {
            f"{ours}.qkv.weight": f"{theirs}.attn.qkv.weight",
            f"{ours}.q_bias": f"{theirs}.attn.q_bias",
            f"{ours}.v_bias": f"{theirs}.attn.v_bias",
        }
        if spec.layer_scale:
            sources |= {f"{ours}.scale1": f"{theirs}.gamma_1", f"{ours}.scale2": f"{theirs}.gamma_2"}
        for end in ("weight", "bias"):
            sources |= {
                f"{ours}.norm1.{end}": f"{theirs}.norm1.{end}",
                f"{ours}.proj.{end}": f"{theirs}.attn.proj.{end}",
                f"{ours}.norm2.{end}": f"{theirs}.norm2.{end}",
                f"{ours}.fc1.{end}": f"{theirs}.mlp.fc1.{end}",
                f"{ours}.fc2.{end}": f"{theirs}.mlp.fc2.{end}",
            }
    drop = (r"^lm_head\.", r"^cls_pt_layers\.", r"relative_position_index$", r"^mask_token$")
    return KeyMap(spec, sources, drop)


_RELEASE = "https://github.com/addf400/files/releases/download/BEiT-v2/beitv2"


def _entry(name: str, file: str, width: int, depth: int, notes: str) -> CatalogueEntry:
    source = f"{_RELEASE}_{file}.pth"
    return CatalogueEntry(name, source, "none+clip_tokenizer", "MIT", width, depth, patch=16, tokens=197, notes=notes)


FAMILIES = (
    Family(
        name="beit2",
        phrase="BEiT-2: codes distilled from CLIP predicted at masked patches",
        modality="image",
        model_types=(),
        rename=str,
        key_map=key_map,
        preprocessing=Preprocessing(crop_fraction=0.9),
        recognises=recognises,
        entries=(
            _entry("beit2", "base_patch16_224_pt1k", 768, 12, "1600 epochs"),
            _entry("beit2-300e", "base_patch16_224_pt1k_300e", 768, 12, "300 epochs"),
            _entry("beit2-large", "large_patch16_224_pt1k", 1024, 24, "1600 epochs"),
        ),
    ),
    Family(
        name="beit2-ft",
        phrase="BEiT-2 fine-tuned: then a classifier of ImageNet-21k and -1k",
        modality="image",
        model_types=(),
        rename=str,
        key_map=fine_tuned_key_map,
        preprocessing=Preprocessing(crop_fraction=0.9),
        default_targets=("mean", "patches"),
        entries=(
            CatalogueEntry(
                "beit2-ft",
                f"{_RELEASE}_base_patch16_224_pt1k_ft21kto1k.pth",
                "class_labels",
                "MIT",
                width=768,
                depth=12,
                patch=16,
                tokens=197,
                notes="supervised, to compare with; it classifies by the mean of its patches",
            ),
        ),
    ),
)
