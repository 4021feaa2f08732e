"""VLMo (arXiv:2111.02358) from its original file: towers of pictures and of texts, and pairs through its last experts.

One attention serves all tokens; each modality has its own feed-forward networks ("mixture of modality experts"), and in
the last blocks a third one serves pairs. Trained in three steps: the pictures' weights start from a BEiT that was
fine-tuned with the labels of ImageNet-22k and -1k; then texts; then pictures with captions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from emkum.errors import UnsupportedNetwork
from emkum.models.backbone import BackboneSpec
from emkum.models.families.checkpoint import Checkpoint, KeyMap, Shapes, refuse_fine_tuned
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.multiway import MultiwaySpec
from emkum.models.preprocessing import HALF, Preprocessing
from emkum.models.tokenizer import MAX_TOKENS

Sources = dict[str, str | tuple[str, ...]]
Changes = dict[str, Callable[[Tensor], Tensor]]
TABLE = "relative_position_bias_table"
TEXT_ROWS = 196  # tokens of the longest text the released tables know; two rows each
HEADS_WITHOUT_TABLE = 16  # of base_plus, the only one without a table of relative positions
INSTEAD = "the file of the pre-training, such as vlmo in the catalogue"

_HEADS = r"^(pooler|mlm_score|itm_score|itc_\w+_proj|logit_scale|logit_vl_scale)(\.|$)"
_INDICES = r"^((text_|text_imag_)?relative_position_index|text_embeddings\.(position_ids|token_type_ids))$"
_OF_TEXT = (r"^text_embeddings\.", r"\.(norm2|mlp)_text\.")
_OF_IMAGE = (r"^transformer\.(cls_token|pos_embed|patch_embed\..*)$", r"\.(norm2|mlp)_imag\.")
_OF_PAIRS = (r"\.(norm2|mlp)_vl\.",)
_FIRST_FFN = "transformer.blocks.0.mlp_{}.fc1.weight"


def recognises(shapes: Shapes) -> bool:
    """A feed-forward network of pictures and one of texts in every block, and one attention."""
    return {_FIRST_FFN.format("imag"), _FIRST_FFN.format("text")} <= {rename(name) for name in shapes}


def rename(name: str) -> str:
    """DeepSpeed writes the name of its wrapper in front."""
    return name.removeprefix("module.")


def image_key_map(checkpoint: Checkpoint) -> KeyMap:
    """Refuses fine-tuned files; all but one number of heads is inferred from the shapes."""
    _refuse_fine_tuned(checkpoint)
    return _tower_key_map(_image_spec(checkpoint), "imag", _image_embedding, image_table, _OF_TEXT)


def text_key_map(checkpoint: Checkpoint) -> KeyMap:
    """As that of the picture's tower."""
    _refuse_fine_tuned(checkpoint)
    spec = _text_spec(checkpoint)
    return _tower_key_map(spec, "text", _text_embedding, text_table, (*_OF_IMAGE, *_unused_positions(spec)))


def _tower_key_map(
    spec: BackboneSpec,
    expert: str,
    embedding: Callable[[str, BackboneSpec], tuple[Sources, Changes]],
    table: Callable[..., Tensor],
    drop: tuple[str, ...],
) -> KeyMap:
    """table: the rows of a layer's table of positions; drop: the tensors of the other tower."""
    sources, changes = embedding("embedding.", spec)
    for i in range(spec.depth):
        ours = f"stack.blocks.{i}"
        sources |= _attention(ours, i, spec) | _feed_forward(ours, i, expert, spec)
        if spec.relative_bias != "none":
            sources[f"stack.biases.{i}.table"] = TABLE
            changes[f"stack.biases.{i}.table"] = partial(table, layer=i, spec=spec)
    sources |= _ends("norm", "transformer.norm")
    return KeyMap(spec, sources, (*drop, *_OF_PAIRS, _HEADS, _INDICES), changes, _inferred(spec))


def pair_key_map(checkpoint: Checkpoint) -> KeyMap:
    """Both modalities as one network. Refuses a file of the step before pairs, which has no experts for them."""
    _refuse_fine_tuned(checkpoint)
    image, text = _image_spec(checkpoint), _text_spec(checkpoint)
    fused = [i for i in range(image.depth) if f"transformer.blocks.{i}.mlp_vl.fc1.weight" in checkpoint.shapes]
    if not fused or fused != list(range(fused[0], image.depth)):
        raise UnsupportedNetwork(
            f"{checkpoint.label} has no experts of pairs in its last blocks: it is of the training step before pairs",
            f"use {INSTEAD}",
        )
    # Texts stand in front of pictures in the original, so what its pooler reads is the text's [CLS].
    spec = MultiwaySpec("vlmo-pair", image, text, shared_attention=True, num_fused=len(fused), pooled="text")
    sources, changes = _image_embedding("image.", image)
    text_sources, text_changes = _text_embedding("text.", text)
    sources, changes = sources | text_sources, changes | text_changes
    for i in range(spec.depth):
        ours = f"stack.blocks.{i}"
        sources |= _attention(f"{ours}.attentions.both", i, image)
        experts = {"both": "vl"} if i in fused else {"image": "imag", "text": "text"}
        for name, theirs in experts.items():
            sources |= _feed_forward(f"{ours}.feed_forwards.{name}", i, theirs, image)
        if image.relative_bias != "none":
            bias = f"stack.biases.{i}"
            sources |= {f"{bias}.{name}": TABLE for name in ("image.table", "text.table", "cross")}
            changes[f"{bias}.image.table"] = partial(image_table, layer=i, spec=image)
            changes[f"{bias}.text.table"] = partial(text_table, layer=i, spec=text)
            changes[f"{bias}.cross"] = partial(cross_rows, layer=i, spec=text)
    sources |= _ends("norms.both", "transformer.norm")
    left_over = tuple(rf"^transformer\.blocks\.{i}\.(norm2|mlp)_(imag|text)\." for i in fused)
    drop = (*left_over, *_unused_positions(text), _HEADS, _INDICES)
    return KeyMap(spec, sources, drop, changes, _inferred(image))


# The table has a row per offset and a column per layer and head. Its rows: those of BEiT for the picture (offsets, CLS
# to patch, patch to CLS, CLS to CLS); text to picture; picture to text; those of the text: offsets, from words far
# behind to words far ahead, then again CLS to word, word to CLS, CLS to CLS.


def image_table(table: Tensor, layer: int, spec: BackboneSpec) -> Tensor:
    """The rows within the picture, as RelativeBias has them."""
    return _of_layer(table, layer, spec)[: len(table) - 2 - 2 * _words_of(table, spec)]


def text_table(table: Tensor, layer: int, spec: BackboneSpec) -> Tensor:
    """The rows within the text; RelativeBias counts from the other end, offsets of the query from the key."""
    rows = _of_layer(table, layer, spec)[-2 * _words_of(table, spec) :]
    return torch.cat([rows[:-3].flip(0), rows[-3:]])


def cross_rows(table: Tensor, layer: int, spec: BackboneSpec) -> Tensor:
    """From text to picture, from picture to text."""
    first = len(table) - 2 - 2 * _words_of(table, spec)
    return _of_layer(table, layer, spec)[first : first + 2]


def _of_layer(table: Tensor, layer: int, spec: BackboneSpec) -> Tensor:
    return table[:, layer * spec.heads : (layer + 1) * spec.heads]


def _words_of(table: Tensor, spec: BackboneSpec) -> int:
    if spec.modality == "text":
        return spec.max_positions
    side = 2 * (spec.image_size // spec.patch) - 1
    return (len(table) - side * side - 3 - 2) // 2


def _refuse_fine_tuned(checkpoint: Checkpoint) -> None:
    refuse_fine_tuned(checkpoint, r"^(vqa_classifier|nlvr2_classifier)\.", INSTEAD)
    shapes = checkpoint.shapes
    found = next((name for name in shapes if re.match(r"itc_(text|image)_proj\.", name)), None)
    if found and not any(name.startswith("itc_vl_") for name in shapes):
        raise UnsupportedNetwork(f"{checkpoint.label} is tuned for retrieval: it has {found} alone", f"use {INSTEAD}")


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    if name not in checkpoint.shapes:
        raise UnsupportedNetwork(f"{checkpoint.label} is no VLMo: it lacks {name}", f"use {INSTEAD}")
    return checkpoint.shapes[name]


def _shared_spec(checkpoint: Checkpoint, expert: str) -> dict[str, Any]:
    shapes = checkpoint.shapes
    mlp_width, width = _shape(checkpoint, _FIRST_FFN.format(expert))
    depth = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("transformer.blocks."))
    heads = shapes[TABLE][1] // depth if TABLE in shapes else HEADS_WITHOUT_TABLE
    return {"depth": depth, "width": width, "heads": heads, "mlp_width": mlp_width}


def _inferred(spec: BackboneSpec) -> dict[str, int]:
    """`KeyMap.inferred`: the heads where there is no table to count them in."""
    return {"heads": spec.heads} if spec.relative_bias == "none" else {}


def _image_spec(checkpoint: Checkpoint) -> BackboneSpec:
    shapes = checkpoint.shapes
    absolute = "transformer.pos_embed" in shapes
    if absolute:
        side = round((shapes["transformer.pos_embed"][-2] - 1) ** 0.5)
    else:
        side = _side_of_table(checkpoint)
    patch = _shape(checkpoint, "transformer.patch_embed.proj.weight")[-1]
    return BackboneSpec(
        family="vlmo",
        modality="image",
        layer_scale="transformer.blocks.0.gamma_1" in shapes,
        qkv_bias="qv",
        position="absolute" if absolute else "none",
        relative_bias="none" if absolute else "per_block",
        modality_embedding=True,
        patch=patch,
        image_size=side * patch,
        **_shared_spec(checkpoint, "imag"),
    )


def _side_of_table(checkpoint: Checkpoint) -> int:
    """Patches along the side of the picture the table was made for: of its index where the file has one."""
    num_rows = _shape(checkpoint, TABLE)[0]
    if "relative_position_index" in checkpoint.shapes:
        num_offsets = (2 * math.isqrt(checkpoint.shapes["relative_position_index"][0] - 1) - 1) ** 2
    else:
        num_offsets = num_rows - 3 - 2 - 2 * TEXT_ROWS
    side = (math.isqrt(max(num_offsets, 0)) + 1) // 2
    if (2 * side - 1) ** 2 != num_offsets:
        raise UnsupportedNetwork(
            f"{checkpoint.label}: {TABLE} has {num_rows} rows, which are not those of a square picture and "
            f"texts of {TEXT_ROWS} tokens",
            f"use {INSTEAD}",
        )
    return side


def _text_spec(checkpoint: Checkpoint) -> BackboneSpec:
    shapes = checkpoint.shapes
    biased = "transformer.pos_embed" not in shapes
    if not biased:
        words = _shape(checkpoint, "text_embeddings.position_embeddings.weight")[0]
    else:
        side = 2 * _side_of_table(checkpoint) - 1
        words = (shapes[TABLE][0] - side * side - 3 - 2) // 2
    return BackboneSpec(
        family="vlmo-text",
        modality="text",
        layer_scale="transformer.blocks.0.gamma_1" in shapes,
        qkv_bias="qv",
        position="none" if biased else "absolute",
        relative_bias="per_block" if biased else "none",
        modality_embedding=True,
        pre_norm=True,
        embedding_eps=1e-12,
        vocab_size=_shape(checkpoint, "text_embeddings.word_embeddings.weight")[0],
        max_positions=words,
        token_types=_shape(checkpoint, "text_embeddings.token_type_embeddings.weight")[0],
        **_shared_spec(checkpoint, "text"),
    )


def _unused_positions(text: BackboneSpec) -> tuple[str, ...]:
    """With relative positions the text's absolute ones lie in the file without being used."""
    return (r"^text_embeddings\.position_embeddings\.",) if text.position == "none" else ()


def _image_embedding(ours: str, spec: BackboneSpec) -> tuple[Sources, Changes]:
    sources: Sources = {f"{ours}cls": "transformer.cls_token", f"{ours}modality": "token_type_embeddings.weight"}
    if spec.position == "absolute":
        sources[f"{ours}positions"] = "transformer.pos_embed"
    sources |= _ends(f"{ours}patch", "transformer.patch_embed.proj")
    return sources, {f"{ours}modality": lambda types: types[1]}


def _text_embedding(ours: str, spec: BackboneSpec) -> tuple[Sources, Changes]:
    theirs = "text_embeddings"
    sources: Sources = {
        f"{ours}tokens": f"{theirs}.word_embeddings.weight",
        f"{ours}types": f"{theirs}.token_type_embeddings.weight",
        f"{ours}modality": "token_type_embeddings.weight",
    }
    if spec.position == "absolute":
        sources[f"{ours}positions"] = f"{theirs}.position_embeddings.weight"
    sources |= _ends(f"{ours}norm", f"{theirs}.LayerNorm")
    return sources, {f"{ours}modality": lambda types: types[0]}


def _attention(ours: str, layer: int, spec: BackboneSpec) -> Sources:
    theirs = f"transformer.blocks.{layer}"
    sources: Sources = {
        f"{ours}.qkv.weight": f"{theirs}.attn.qkv.weight",
        f"{ours}.q_bias": f"{theirs}.attn.q_bias",
        f"{ours}.v_bias": f"{theirs}.attn.v_bias",
    }
    if spec.layer_scale:
        sources[f"{ours}.scale1"] = f"{theirs}.gamma_1"
    return sources | _ends(f"{ours}.norm1", f"{theirs}.norm1") | _ends(f"{ours}.proj", f"{theirs}.attn.proj")


def _feed_forward(ours: str, layer: int, expert: str, spec: BackboneSpec) -> Sources:
    theirs = f"transformer.blocks.{layer}"
    scale: Sources = {f"{ours}.scale2": f"{theirs}.gamma_2"} if spec.layer_scale else {}
    return (
        scale
        | _ends(f"{ours}.norm2", f"{theirs}.norm2_{expert}")
        | _ends(f"{ours}.fc1", f"{theirs}.mlp_{expert}.fc1")
        | _ends(f"{ours}.fc2", f"{theirs}.mlp_{expert}.fc2")
    )


def _ends(ours: str, theirs: str) -> Sources:
    return {f"{ours}.{end}": f"{theirs}.{end}" for end in ("weight", "bias")}


_RELEASE = "https://github.com/wenhui0924/vlmo_ckpts/releases/download/vlmo/vlmo_"
_TOKENIZER = "https://huggingface.co/google-bert/bert-base-uncased/resolve/main/tokenizer.json"
_SIZES = {"vlmo": ("base", 768, 12), "vlmo-base-plus": ("base_plus", 544, 24), "vlmo-large": ("large", 1024, 24)}
_PLUS_TEXT = 40  # rows of base_plus's table of positions, which is of the training on pairs


def _entries(tower: str, num_pictures: int, longest: int = 0, patch: int = 0) -> tuple[CatalogueEntry, ...]:
    """num_pictures: tokens of a picture; longest: of a text, where the table of positions has no fewer."""
    return tuple(
        CatalogueEntry(
            f"{name}{tower}",
            f"{_RELEASE}{file}_patch16_224.pt",
            "paired_text+class_labels",
            "MIT",
            width,
            depth,
            patch=patch,
            tokens=num_pictures + (_PLUS_TEXT if file == "base_plus" else longest) if tower else num_pictures,
            notes="started from a BEiT that was fine-tuned with ImageNet's labels",
            companions=(_TOKENIZER,) if tower else (),
        )
        for name, (file, width, depth) in _SIZES.items()
    )


FAMILIES = (
    Family(
        name="vlmo",
        phrase="VLMo, its experts of pictures: masked words in pairs, captions matched to pictures",
        modality="image",
        model_types=(),
        rename=rename,
        key_map=image_key_map,
        preprocessing=Preprocessing(mean=HALF, std=HALF),
        recognises=recognises,
        entries=_entries("", 197, patch=16),
    ),
    Family(
        name="vlmo-text",
        phrase="VLMo, its experts of texts: masked words, captions matched to pictures",
        modality="text",
        model_types=(),
        rename=rename,
        key_map=text_key_map,
        recognises=recognises,
        default_targets=("cls", "patches"),
        entries=_entries("-text", 0, TEXT_ROWS),
    ),
    Family(
        name="vlmo-pair",
        phrase="VLMo, fused: a picture with its caption",
        modality="pair",
        model_types=(),
        rename=rename,
        key_map=pair_key_map,
        preprocessing=Preprocessing(mean=HALF, std=HALF),
        recognises=recognises,
        spec=MultiwaySpec,
        default_targets=("cls", "layers"),
        entries=_entries("-pair", 197, MAX_TOKENS, patch=16),
    ),
)
