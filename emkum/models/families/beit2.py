"""BEiT-2 (arXiv:2208.06366) from its original file: the self-supervised one exists nowhere else."""

from __future__ import annotations

from emkum.errors import UnsupportedNetwork
from emkum.models.backbone import BackboneSpec
from emkum.models.families.checkpoint import Checkpoint, KeyMap, Shapes, refuse_fine_tuned
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.preprocessing import Preprocessing

TABLE = "rel_pos_bias.relative_position_bias_table"


def recognises(shapes: Shapes) -> bool:
    """Biases of queries and values alone, and a table of relative positions, shared or (fine-tuned) per block."""
    biased = any(name.endswith("relative_position_bias_table") for name in shapes)
    return biased and "blocks.0.attn.q_bias" in shapes and "patch_embed.proj.weight" in shapes


def key_map(checkpoint: Checkpoint) -> KeyMap:
    """Everything is inferred from the shapes: the file has no configuration. Refuses fine-tuned files."""
    fine_tuned = r"^(head|fc_norm)\.|^blocks\.\d+\.attn\.relative_position_bias_table$"
    refuse_fine_tuned(checkpoint, fine_tuned, "a file named ..._pt1k.pth, such as beit2 in the catalogue")
    shapes = checkpoint.shapes
    if TABLE not in shapes or "patch_embed.proj.weight" not in shapes or "blocks.0.mlp.fc1.weight" not in shapes:
        raise UnsupportedNetwork(f"{checkpoint.label} is no BEiT-2: it lacks {TABLE}", "use an original BEiT-2 file")
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    num_rows, heads = shapes[TABLE]
    grid = (round((num_rows - 3) ** 0.5) + 1) // 2
    spec = BackboneSpec(
        family="beit2",
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
)
