"""RoBERTa (arXiv:1907.11692) and data2vec text (arXiv:2202.03555) as transformers stores them.

Their positions begin after the pad id and count real tokens only.
"""

from __future__ import annotations

from emkum.models.families import bert
from emkum.models.families.checkpoint import Checkpoint, KeyMap
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.families.hf_names import legacy_name


def key_map(checkpoint: Checkpoint) -> KeyMap:
    """As BERT's, with RoBERTa's positions."""
    return bert.key_map(checkpoint, "roberta", pad_id=1, roberta_positions=True)


def data2vec_key_map(checkpoint: Checkpoint) -> KeyMap:
    """As RoBERTa's."""
    return bert.key_map(checkpoint, "data2vec-text", pad_id=1, roberta_positions=True)


FAMILIES = (
    Family(
        name="roberta",
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
        modality="text",
        model_types=("data2vec-text",),
        rename=legacy_name("data2vec_text."),
        key_map=data2vec_key_map,
        default_targets=("layers",),
        layers_rule="data2vec",
        entries=(
            CatalogueEntry(
                "data2vec-text", "facebook/data2vec-text-base", "none", "MIT", width=768, depth=12, tokens=512
            ),
        ),
    ),
)
