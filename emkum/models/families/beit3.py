"""BEiT-3 (arXiv:2208.10442) from its original file: the picture's tower, the text's, and both as one network of pairs.

Every weight of a block exists twice, A for the tokens of pictures and B for those of texts ("multiway"): the towers
share nothing, so either is a plain Backbone, and pairs differ in that tokens attend to both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from emkum.errors import UnsupportedNetwork, WeightsUnavailable
from emkum.models.backbone import BackboneSpec
from emkum.models.families.checkpoint import Checkpoint, KeyMap, Shapes, heads_of_64, refuse_fine_tuned
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.multiway import MultiwaySpec
from emkum.models.preprocessing import HALF, Preprocessing
from emkum.models.sentencepieces import tokenizer_of

Sources = dict[str, str | tuple[str, ...]]
Changes = dict[str, Callable[[Tensor], Tensor]]
FIRST_POSITION = 2  # row of the position tables that the first token uses, as fairseq's
INSTEAD = "the file of the pre-training, such as beit3 in the catalogue"
WAY = {"image": "A", "text": "B"}

_IMAGE_ONLY = (r"\.A\.", r"^vision_embed\.")
_TEXT_ONLY = (r"\.B\.", r"^text_embed\.")
# Heads of the pre-training: of masked words (mlm_head), and of masked patches.
_ALWAYS_DROPPED = (r"^\w+_head\.", r"^vision_embed\.mask_token$")
_ATTENTION_NORM, _FFN_NORM = "inner_attn_ln", "ffn_layernorm"


def recognises_image(shapes: Shapes) -> bool:
    """Positions of way A, and patches."""
    return _has(shapes, "encoder.embed_positions.A.weight") and _has(shapes, "vision_embed.proj.weight")


def recognises_text(shapes: Shapes) -> bool:
    """Positions of way B, and words."""
    return _has(shapes, "encoder.embed_positions.B.weight") and _has(shapes, "text_embed.weight")


def recognises_pair(shapes: Shapes) -> bool:
    """Both."""
    return recognises_image(shapes) and recognises_text(shapes)


def image_key_map(checkpoint: Checkpoint) -> KeyMap:
    """Refuses fine-tuned files; everything is inferred from the shapes."""
    _refuse_fine_tuned(checkpoint)
    changes: Changes = {"embedding.positions": _positions_in_use}
    return _tower_key_map(_image_spec(checkpoint), _image_embedding("embedding."), _TEXT_ONLY, changes)


def text_key_map(checkpoint: Checkpoint) -> KeyMap:
    """As that of the picture's tower."""
    _refuse_fine_tuned(checkpoint)
    return _tower_key_map(_text_spec(checkpoint), _text_embedding("embedding."), _IMAGE_ONLY, {})


def _tower_key_map(spec: BackboneSpec, embedding: Sources, drop: tuple[str, ...], changes: Changes) -> KeyMap:
    """drop: the tensors of the other tower."""
    sources = embedding | _ends("norm", f"encoder.layer_norm.{WAY[spec.modality]}")
    for i in range(spec.depth):
        ours = f"stack.blocks.{i}"
        sources |= _attention(ours, i, spec.modality) | _feed_forward(ours, i, spec.modality)
    return KeyMap(spec, sources, (*drop, *_ALWAYS_DROPPED), changes, {"heads": spec.heads})


def pair_key_map(checkpoint: Checkpoint) -> KeyMap:
    """Both towers, as one network."""
    _refuse_fine_tuned(checkpoint)
    spec = MultiwaySpec("beit3-pair", _image_spec(checkpoint), _text_spec(checkpoint))
    sources = _image_embedding("image.") | _text_embedding("text.")
    for i in range(spec.depth):
        for modality in WAY:
            sources |= _attention(f"stack.blocks.{i}.attentions.{modality}", i, modality)
            sources |= _feed_forward(f"stack.blocks.{i}.feed_forwards.{modality}", i, modality)
    for modality, way in WAY.items():
        sources |= _ends(f"norms.{modality}", f"encoder.layer_norm.{way}")
    changes: Changes = {"image.positions": _positions_in_use}
    return KeyMap(spec, sources, _ALWAYS_DROPPED, changes, {"heads": spec.image.heads})


def _positions_in_use(table: Tensor) -> Tensor:
    return table[FIRST_POSITION:]


def tokenizer(folder: Path) -> bytes:
    """Of beit3.spm, or the one .spm file there is. Raises WeightsUnavailable if there is none."""
    path = folder / "beit3.spm"
    found = [path] if path.is_file() else sorted(folder.glob("*.spm"))
    if len(found) != 1:
        raise WeightsUnavailable(f"{folder} has no beit3.spm, BEiT-3's tokenizer", f"put it there: {_RELEASE}beit3.spm")
    return tokenizer_of(found[0])


def _has(shapes: Shapes, name: str) -> bool:
    return name in shapes or f"beit3.{name}" in shapes


def _refuse_fine_tuned(checkpoint: Checkpoint) -> None:
    refuse_fine_tuned(checkpoint, r"^(head|fc_norm|pooler)\.", INSTEAD)
    for name in checkpoint.shapes:
        if name.startswith(("language_head.", "vision_head.", "logit_scale")):
            raise UnsupportedNetwork(f"{checkpoint.label} is tuned for retrieval: it has {name}", f"use {INSTEAD}")


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    if name not in checkpoint.shapes:
        raise UnsupportedNetwork(f"{checkpoint.label} is no BEiT-3: it lacks {name}", f"use {INSTEAD}")
    return checkpoint.shapes[name]


def _shared_spec(checkpoint: Checkpoint, way: str) -> dict[str, Any]:
    mlp_width, width = _shape(checkpoint, f"encoder.layers.0.ffn.{way}.fc1.weight")
    layers = (name.split(".")[2] for name in checkpoint.shapes if name.startswith("encoder.layers."))
    return {
        "depth": 1 + max(map(int, layers)),
        "width": width,
        "heads": heads_of_64(checkpoint.label, width),  # as both sizes have them; the file does not say
        "mlp_width": mlp_width,
    }


def _image_spec(checkpoint: Checkpoint) -> BackboneSpec:
    patch = _shape(checkpoint, "vision_embed.proj.weight")[-1]
    num_patches = _shape(checkpoint, "encoder.embed_positions.A.weight")[0] - FIRST_POSITION - 1
    return BackboneSpec(
        family="beit3",
        modality="image",
        eps=1e-5,
        sub_norm=True,
        patch=patch,
        image_size=round(num_patches**0.5) * patch,
        **_shared_spec(checkpoint, "A"),
    )


def _text_spec(checkpoint: Checkpoint) -> BackboneSpec:
    return BackboneSpec(
        family="beit3-text",
        modality="text",
        eps=1e-5,
        sub_norm=True,
        vocab_size=_shape(checkpoint, "text_embed.weight")[0],
        max_positions=_shape(checkpoint, "encoder.embed_positions.B.weight")[0],
        position_offset=FIRST_POSITION,
        pad_id=1,
        zero_pads=True,
        **_shared_spec(checkpoint, "B"),
    )


def _image_embedding(ours: str) -> Sources:
    return {
        f"{ours}cls": "vision_embed.cls_token",
        f"{ours}positions": "encoder.embed_positions.A.weight",
    } | _ends(f"{ours}patch", "vision_embed.proj")


def _text_embedding(ours: str) -> Sources:
    return {f"{ours}tokens": "text_embed.weight", f"{ours}positions": "encoder.embed_positions.B.weight"}


def _attention(ours: str, layer: int, modality: str) -> Sources:
    theirs, way = f"encoder.layers.{layer}", WAY[modality]
    qkv = {
        f"{ours}.qkv.{end}": tuple(f"{theirs}.self_attn.{name}_proj.{way}.{end}" for name in "qkv")
        for end in ("weight", "bias")
    }
    return (
        qkv
        | _ends(f"{ours}.norm1", f"{theirs}.self_attn_layer_norm.{way}")
        | _ends(f"{ours}.attention_norm", f"{theirs}.self_attn.{_ATTENTION_NORM}.{way}")
        | _ends(f"{ours}.proj", f"{theirs}.self_attn.out_proj.{way}")
    )


def _feed_forward(ours: str, layer: int, modality: str) -> Sources:
    theirs, way = f"encoder.layers.{layer}", WAY[modality]
    return (
        _ends(f"{ours}.norm2", f"{theirs}.final_layer_norm.{way}")
        | _ends(f"{ours}.fc1", f"{theirs}.ffn.{way}.fc1")
        | _ends(f"{ours}.ffn_norm", f"{theirs}.ffn.{way}.{_FFN_NORM}")
        | _ends(f"{ours}.fc2", f"{theirs}.ffn.{way}.fc2")
    )


def _ends(ours: str, theirs: str) -> Sources:
    return {f"{ours}.{end}": f"{theirs}.{end}" for end in ("weight", "bias")}


_RELEASE = "https://github.com/addf400/files/releases/download/beit3/"
_INDOMAIN = "went on with the pairs of COCO and Visual Genome"
_SIZES = {
    "beit3": ("base_patch16_224", 768, 12, ""),
    "beit3-large": ("large_patch16_224", 1024, 24, ""),
    "beit3-indomain": ("base_indomain_patch16_224", 768, 12, _INDOMAIN),
    "beit3-large-indomain": ("large_indomain_patch16_224", 1024, 24, _INDOMAIN),
}


def _entries(tower: str, tokens: int, patch: int = 0) -> tuple[CatalogueEntry, ...]:
    companions = (f"{_RELEASE}beit3.spm",) if tower != "" else ()
    return tuple(
        CatalogueEntry(
            f"{name}{tower}",
            f"{_RELEASE}beit3_{file}.pth",
            "paired_text",
            "MIT",
            width,
            depth,
            patch=patch,
            tokens=tokens,
            notes=notes,
            companions=companions,
        )
        for name, (file, width, depth, notes) in _SIZES.items()
    )


def _rename(name: str) -> str:
    return name.removeprefix("beit3.")


FAMILIES = (
    Family(
        name="beit3",
        phrase="BEiT-3, its tower of pictures: masked patches and words, alone and in pairs",
        modality="image",
        model_types=(),
        rename=_rename,
        key_map=image_key_map,
        preprocessing=Preprocessing(),
        recognises=recognises_image,
        entries=_entries("", tokens=197, patch=16),
    ),
    Family(
        name="beit3-text",
        phrase="BEiT-3, its tower of texts: masked patches and words, alone and in pairs",
        modality="text",
        model_types=(),
        rename=_rename,
        key_map=text_key_map,
        recognises=recognises_text,
        tokenizer=tokenizer,
        default_targets=("cls", "patches"),
        entries=_entries("-text", tokens=1022),
    ),
    Family(
        name="beit3-pair",
        phrase="BEiT-3, fused: a picture with its caption",
        modality="pair",
        model_types=(),
        rename=_rename,
        key_map=pair_key_map,
        preprocessing=Preprocessing(mean=HALF, std=HALF),
        recognises=recognises_pair,
        tokenizer=tokenizer,
        spec=MultiwaySpec,
        default_targets=("cls", "layers"),
        entries=_entries("-pair", tokens=197 + 64, patch=16),
    ),
)
