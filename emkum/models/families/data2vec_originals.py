"""Data2vec version 1 (arXiv:2202.03555) from its authors' own files: of pictures and of texts."""

from __future__ import annotations

from emkum.errors import UnsupportedNetwork
from emkum.models.backbone import BackboneSpec
from emkum.models.families import beit2
from emkum.models.families.checkpoint import Checkpoint, KeyMap, Shapes, refuse_fine_tuned
from emkum.models.families.data2vec2 import count_of, heads_of

_TEXT = "encoder.sentence_encoder"


def is_vision(shapes: Shapes) -> bool:
    """BEiT's names, and a head that predicts features, as wide as the network; BEiT's own predicts codes."""
    head, cls = shapes.get("lm_head.weight"), shapes.get("cls_token")
    return beit2.TABLE in shapes and head is not None and cls is not None and head == (cls[-1], cls[-1])


def vision_key_map(checkpoint: Checkpoint) -> KeyMap:
    """As BEiT-2's."""
    return beit2.original_key_map(checkpoint, "data2vec-vision", "data2vec-vision of the catalogue")


def is_text(shapes: Shapes) -> bool:
    """A RoBERTa of fairseq with a head that predicts features; RoBERTa's own predicts words."""
    regression = any(name.startswith("encoder.regression_head.") for name in shapes)
    return regression and f"{_TEXT}.embed_tokens.weight" in shapes


def text_key_map(checkpoint: Checkpoint) -> KeyMap:
    """The weights trained; the moving average (`_ema`), the teacher of the training, is dropped."""
    refuse_fine_tuned(checkpoint, r"^classification_heads\.", "the released nlp_base.pt")
    shapes = checkpoint.shapes
    fc1, positions = f"{_TEXT}.layers.0.fc1.weight", f"{_TEXT}.embed_positions.weight"
    if missing := [name for name in (fc1, positions) if name not in shapes]:
        raise UnsupportedNetwork(f"{checkpoint.label} is no data2vec of texts: it lacks {', '.join(missing)}")
    vocab_size, width = shapes[f"{_TEXT}.embed_tokens.weight"]
    told = _heads(checkpoint)
    spec = BackboneSpec(
        family="data2vec-text",
        modality="text",
        depth=count_of(shapes, f"{_TEXT}.layers"),
        width=width,
        heads=told or heads_of(checkpoint, width),
        mlp_width=shapes[fc1][0],
        norm_order="post",
        eps=1e-5,
        pre_norm=True,
        final_norm=False,
        vocab_size=vocab_size,
        max_positions=shapes[positions][0],
        position_offset=2,
        position_from_mask=True,
        pad_id=1,
    )
    sources: dict[str, str | tuple[str, ...]] = {
        "embedding.tokens": f"{_TEXT}.embed_tokens.weight",
        "embedding.positions": positions,
        "embedding.norm.weight": f"{_TEXT}.layernorm_embedding.weight",
        "embedding.norm.bias": f"{_TEXT}.layernorm_embedding.bias",
    }
    for i in range(spec.depth):
        ours, theirs = f"stack.blocks.{i}", f"{_TEXT}.layers.{i}"
        for end in ("weight", "bias"):
            sources |= {
                f"{ours}.qkv.{end}": tuple(f"{theirs}.self_attn.{name}_proj.{end}" for name in "qkv"),
                f"{ours}.proj.{end}": f"{theirs}.self_attn.out_proj.{end}",
                f"{ours}.norm1.{end}": f"{theirs}.self_attn_layer_norm.{end}",
                f"{ours}.fc1.{end}": f"{theirs}.fc1.{end}",
                f"{ours}.fc2.{end}": f"{theirs}.fc2.{end}",
                f"{ours}.norm2.{end}": f"{theirs}.final_layer_norm.{end}",
            }
    drop = (r"^encoder\.(regression_head|lm_head|_ema)\.", r"^encoder\.sentence_encoder\.version$")
    return KeyMap(spec, sources, drop, inferred={} if told else {"heads": spec.heads})


def _heads(checkpoint: Checkpoint) -> int:
    """As the training's options say; 0 where the file holds none."""
    options = checkpoint.config.get("model") or {}
    found = ((options.get("transformer") or {}).get("encoder") or {}).get("attention_heads")
    return int(found or 0)
