"""Data2vec 2.0 of pictures (arXiv:2212.07525) from its original fairseq files: no library has it.

Post-norm blocks without LayerScale, a norm in front of block 0 and none at the end, sin-cos positions on patches alone.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor

from emkum.errors import UnsupportedNetwork
from emkum.models.backbone import BackboneSpec
from emkum.models.families.checkpoint import Checkpoint, KeyMap, Shapes, heads_of_64, refuse_fine_tuned
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.preprocessing import Preprocessing

RELEASE = "https://dl.fbaipublicfiles.com/fairseq/data2vec2"
EMA = "_ema."
IMAGE = "modality_encoders.IMAGE"
PRETRAINING = r"^(_ema\.)?(modality_encoders\.\w+\.decoder|shared_decoder|recon_proj)\."
_POSITIONS = ("fixed_positional_encoder.positions", "positional_encoder.positions", "positional_encoder.pos_embed")


def recognises(shapes: Shapes) -> bool:
    """The encoder of pictures of data2vec_multi, also inside a fine-tuned model, so that it is refused by its name."""
    return any(re.match(rf"(model\.)?{IMAGE}\.local_encoder\.", name) for name in shapes)


def key_map(checkpoint: Checkpoint, teacher: bool = False) -> KeyMap:
    """teacher: the moving average of the weights (`_ema`) that made the targets, instead of the weights trained.

    Shapes say all but the heads and the epsilon of the norms: the training's options do, or what was released.
    Refuses fine-tuned files, and networks with attention biases (ALiBi), which no published configuration has.
    """
    refuse_fine_tuned(checkpoint, r"^(head|fc_norm|model)\.", "a file without _ft in its name: base_imagenet.pt")
    shapes, stem = checkpoint.shapes, stem_of(checkpoint, teacher)
    if alibi := sorted(name for name in shapes if "alibi" in name):
        raise UnsupportedNetwork(
            f"{checkpoint.label} adds biases to its attention ({alibi[0]}); no published configuration has any",
            "use one of the released files, such as data2vec2-image in the catalogue",
        )
    encoder = f"{stem}{IMAGE}"
    patch_weight = f"{encoder}.local_encoder.proj.weight"
    positions = next((n for end in _POSITIONS if (n := f"{encoder}.{end}") in shapes), f"{encoder}.{_POSITIONS[0]}")
    needed = (patch_weight, positions, f"{stem}blocks.0.mlp.fc1.weight")
    if missing := [name for name in needed if name not in shapes]:
        raise UnsupportedNetwork(f"{checkpoint.label} is no data2vec 2.0 of pictures: it lacks {', '.join(missing)}")
    width, _, patch, _ = shapes[patch_weight]
    grid = round(shapes[positions][-2] ** 0.5)
    prenet = count_of(shapes, f"{encoder}.context_encoder.blocks")
    spec = BackboneSpec(
        family="data2vec2-image",
        modality="image",
        depth=prenet + count_of(shapes, f"{stem}blocks"),
        width=width,
        heads=heads_of(checkpoint, width),
        mlp_width=shapes[f"{stem}blocks.0.mlp.fc1.weight"][0],
        norm_order="post",
        eps=float(options_of(checkpoint).get("norm_eps") or 1e-6),
        pre_norm=True,
        final_norm=False,
        patch=patch,
        image_size=grid * patch,
        prenet=prenet,
    )
    sources: dict[str, str | tuple[str, ...]] = {
        "embedding.patch.weight": patch_weight,
        "embedding.patch.bias": f"{encoder}.local_encoder.proj.bias",
        "embedding.cls": f"{encoder}.extra_tokens",
        "embedding.positions": positions,
        "embedding.norm.weight": f"{encoder}.context_encoder.norm.weight",
        "embedding.norm.bias": f"{encoder}.context_encoder.norm.bias",
    }
    for i in range(spec.depth):
        of_prenet = f"{encoder}.context_encoder.blocks.{i}"
        sources |= block_sources(i, of_prenet if i < prenet else f"{stem}blocks.{i - prenet}")
    drop = (PRETRAINING, rf"{IMAGE}\.encoder_mask$", r"^(?!_ema\.)" if teacher else r"^_ema\.")
    changes = {"embedding.positions": _without_one_of_cls}
    return KeyMap(spec, sources, drop, changes, inferred_heads(checkpoint, spec.heads))


def _without_one_of_cls(table: Tensor) -> Tensor:
    """The table of the patches [1, P, D] -> ours [1 + P, D]: CLS gets no position, which is a row of zeros."""
    patches_PD = table.reshape(-1, table.shape[-1])
    return torch.cat([patches_PD.new_zeros(1, patches_PD.shape[1]), patches_PD])


# --- what the networks of data2vec_multi have in common, for texts too -----------------------------------


def block_sources(index: int, theirs: str) -> dict[str, str | tuple[str, ...]]:
    """Of our block `index`, whose tensors stand under `theirs`."""
    parts = {"norm1": "norm1", "qkv": "attn.qkv", "proj": "attn.proj", "norm2": "norm2", "fc1": "mlp.fc1"}
    parts["fc2"] = "mlp.fc2"
    return {
        f"stack.blocks.{index}.{ours}.{end}": f"{theirs}.{their}.{end}"
        for ours, their in parts.items()
        for end in ("weight", "bias")
    }


def stem_of(checkpoint: Checkpoint, teacher: bool) -> str:
    """In front of the names of the weights asked for. Raises UnsupportedNetwork if the file has no teacher."""
    if teacher and not any(name.startswith(EMA) for name in checkpoint.shapes):
        raise UnsupportedNetwork(
            f"{checkpoint.label} holds no moving average of the weights (_ema)",
            "use the weights themselves: the name without -ema",
        )
    return EMA if teacher else ""


def count_of(shapes: Shapes, prefix: str) -> int:
    """How many blocks are numbered behind `prefix`."""
    numbers = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in shapes)
    return 1 + max((int(found[1]) for found in numbers if found), default=-1)


def options_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The options of the model that the training kept in the file; {} where it kept none."""
    found = checkpoint.config.get("model")
    return found if isinstance(found, dict) else {}


def heads_of(checkpoint: Checkpoint, width: int) -> int:
    """The attention heads, which no shape tells: as the options say, else of 64 channels, 16 of 80 in the huge one."""
    told = int(options_of(checkpoint).get("num_heads") or 0)
    return told or (16 if width == 1280 else heads_of_64(checkpoint.label, width))


def inferred_heads(checkpoint: Checkpoint, heads: int) -> dict[str, int]:
    """`KeyMap.inferred`: nothing where the options tell the heads."""
    return {} if options_of(checkpoint).get("num_heads") else {"heads": heads}


# --- entries ---------------------------------------------------------------------------------------------


def _entry(name: str, file: str, width: int, depth: int, notes: str, patch: int = 16) -> CatalogueEntry:
    tokens = 1 + (224 // patch) ** 2
    source = f"{RELEASE}/{file}"
    return CatalogueEntry(name, source, "none", "CC-BY-NC-4.0", width, depth, patch=patch, tokens=tokens, notes=notes)


# Depth -> how many last blocks the training averaged, without a prenet (fairseq, examples/data2vec/config/v2, large and
# huge: average_top_k_layers).
_LAST = {24: 18, 32: 24}

# Evaluated on the centre 224 px of 256.
_PICTURES = Preprocessing(crop_fraction=0.875)

FAMILIES = (
    Family(
        name="data2vec2-image",
        phrase="data2vec 2.0: its own averaged layers predicted at masked patches",
        modality="image",
        model_types=(),
        rename=str,
        key_map=key_map,
        preprocessing=_PICTURES,
        recognises=recognises,
        default_targets=("layers",),
        layers_rule="data2vec2",
        layers_last=_LAST,
        entries=(
            _entry("data2vec2-image", "base_imagenet.pt", 768, 12, "the first 2 blocks are its prenet"),
            _entry("data2vec2-image-large", "large_imagenet.pt", 1024, 24, "no prenet"),
            _entry("data2vec2-image-huge", "huge_imagenet.pt", 1280, 32, "no prenet", patch=14),
        ),
    ),
    Family(
        name="data2vec2-image-ema",  # of the same files, so by its name alone
        phrase="data2vec 2.0: the moving average that made its targets",
        modality="image",
        model_types=(),
        rename=str,
        key_map=partial(key_map, teacher=True),
        preprocessing=_PICTURES,
        default_targets=("layers",),
        layers_rule="data2vec2",
        layers_last=_LAST,
        entries=(_entry("data2vec2-image-ema", "base_imagenet.pt", 768, 12, "the first 2 blocks are its prenet"),),
    ),
)
