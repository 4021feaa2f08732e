"""RoBERTa (arXiv:1907.11692) and data2vec text (arXiv:2202.03555) by transformers, the latter by fairseq too.

Their positions begin after the pad id and count real tokens only.
"""

from __future__ import annotations

from pathlib import Path

from emkum.models.families import bert, data2vec_originals, fairseq_bpe
from emkum.models.families.checkpoint import Checkpoint, KeyMap
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.families.hf_names import legacy_name
from emkum.models.tokenizer import read_tokenizer


def key_map(checkpoint: Checkpoint) -> KeyMap:
    """As BERT's, with RoBERTa's positions."""
    return bert.key_map(checkpoint, "roberta", pad_id=1, roberta_positions=True)


def data2vec_key_map(checkpoint: Checkpoint) -> KeyMap:
    """As RoBERTa's. An original file has fairseq's names."""
    if any(name.startswith("encoder.sentence_encoder.") for name in checkpoint.shapes):
        return data2vec_originals.text_key_map(checkpoint)
    return bert.key_map(checkpoint, "data2vec-text", pad_id=1, roberta_positions=True)


def _tokenizer(folder: Path) -> bytes:
    """Of the original release, else of transformers' older vocabulary files, which end a caption with `</s>`."""
    return fairseq_bpe.tokenizer(folder) if (folder / fairseq_bpe.DICTIONARY).is_file() else read_tokenizer(folder)


FAMILIES = (
    Family(
        name="roberta",
        phrase="RoBERTa: masked words predicted",
        modality="text",
        model_types=("roberta", "xlm-roberta"),
        rename=legacy_name("roberta."),
        key_map=key_map,
        default_targets=("layers",),
        entries=(
            CatalogueEntry("roberta-base", "FacebookAI/roberta-base", "none", "MIT", width=768, depth=12, tokens=512),
        ),
    ),
    Family(
        name="data2vec-text",
        phrase="data2vec 1: its own averaged layers predicted at masked words",
        modality="text",
        model_types=("data2vec-text",),
        rename=legacy_name("data2vec_text."),
        key_map=data2vec_key_map,
        recognises=data2vec_originals.is_text,
        tokenizer=_tokenizer,
        default_targets=("layers",),
        layers_rule="data2vec",
        entries=(
            CatalogueEntry(
                "data2vec-text", "facebook/data2vec-text-base", "none", "MIT", width=768, depth=12, tokens=512
            ),
        ),
    ),
)
