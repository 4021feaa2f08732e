"""Data2vec 2.0 of texts (arXiv:2212.07525) from its original fairseq file: RoBERTa's embedding, post-norm blocks."""

from __future__ import annotations

import re
from functools import partial

from emkum.errors import UnsupportedNetwork
from emkum.models.backbone import BackboneSpec
from emkum.models.families.checkpoint import Checkpoint, KeyMap, Shapes, refuse_fine_tuned
from emkum.models.families.data2vec2 import (
    EMA,
    PRETRAINING,
    RELEASE,
    block_sources,
    count_of,
    heads_of,
    inferred_heads,
    options_of,
    stem_of,
)
from emkum.models.families.fairseq_bpe import FILES, tokenizer
from emkum.models.families.family import CatalogueEntry, Family

_EMBEDDING = "modality_encoders.TEXT.local_encoder"


def recognises(shapes: Shapes) -> bool:
    """The encoder of texts of data2vec_multi, also inside a fine-tuned model, so that it is refused by its name."""
    return any(re.match(rf"(model\.)?{_EMBEDDING}\.embed_tokens\.", name) for name in shapes)


def key_map(checkpoint: Checkpoint, teacher: bool = False) -> KeyMap:
    """teacher: the blocks of the moving average (`_ema`); the embedding has none and is the trained one.

    Shapes say all but the heads and the epsilon of the norms: the training's options do, or what was released.
    """
    refuse_fine_tuned(checkpoint, r"^(head|fc_norm|model|classification_heads)\.", "the released nlp_base.pt")
    shapes, stem = checkpoint.shapes, stem_of(checkpoint, teacher)
    blocks = EMA.rstrip(".") if teacher else "blocks"
    needed = (f"{_EMBEDDING}.embed_tokens.weight", f"{_EMBEDDING}.embed_positions.weight", f"{blocks}.0.mlp.fc1.weight")
    if missing := [name for name in needed if name not in shapes]:
        raise UnsupportedNetwork(f"{checkpoint.label} is no data2vec 2.0 of texts: it lacks {', '.join(missing)}")
    vocab_size, width = shapes[needed[0]]
    spec = BackboneSpec(
        family="data2vec2-text",
        modality="text",
        depth=count_of(shapes, blocks),
        width=width,
        heads=heads_of(checkpoint, width),
        mlp_width=shapes[needed[2]][0],
        norm_order="post",
        eps=float(options_of(checkpoint).get("norm_eps") or 1e-5),
        pre_norm=True,
        final_norm=False,
        vocab_size=vocab_size,
        max_positions=shapes[needed[1]][0],
        position_offset=2,
        position_from_mask=True,
        pad_id=1,
    )
    sources: dict[str, str | tuple[str, ...]] = {
        "embedding.tokens": needed[0],
        "embedding.positions": needed[1],
        "embedding.norm.weight": f"{_EMBEDDING}.layernorm_embedding.weight",
        "embedding.norm.bias": f"{_EMBEDDING}.layernorm_embedding.bias",
    }
    for i in range(spec.depth):
        sources |= block_sources(i, f"{blocks}.{i}")
    drop = (PRETRAINING, r"^blocks\." if stem else r"^_ema\.")
    return KeyMap(spec, sources, drop, inferred=inferred_heads(checkpoint, spec.heads))


def _entry(name: str, notes: str) -> CatalogueEntry:
    companions = tuple(f"{RELEASE}/{file}" for file in FILES)
    source = f"{RELEASE}/nlp_base.pt"
    return CatalogueEntry(name, source, "none", "MIT", 768, 12, tokens=512, notes=notes, companions=companions)


FAMILIES = (
    Family(
        name="data2vec2-text",
        phrase="data2vec 2.0: its own averaged layers predicted at masked words",
        modality="text",
        model_types=(),
        rename=str,
        key_map=key_map,
        recognises=recognises,
        tokenizer=tokenizer,
        default_targets=("layers",),
        layers_rule="data2vec2",
        entries=(_entry("data2vec2-text", "captions begin with <s> and have no </s>"),),
    ),
    Family(
        name="data2vec2-text-ema",  # of the same file, so by its name alone
        phrase="data2vec 2.0: the moving average that made its targets",
        modality="text",
        model_types=(),
        rename=str,
        key_map=partial(key_map, teacher=True),
        tokenizer=tokenizer,
        default_targets=("layers",),
        layers_rule="data2vec2",
        entries=(_entry("data2vec2-text-ema", "captions begin with <s> and have no </s>"),),
    ),
)
