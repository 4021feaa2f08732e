"""RoBERTa (arXiv:1907.11692) and data2vec text (arXiv:2202.03555) as transformers stores them.

Their positions begin after the pad id and count real tokens only.
"""

from __future__ import annotations

from emkum.models.families import bert
from emkum.models.families.checkpoint import Checkpoint, KeyMap
from emkum.models.families.family import Family
from emkum.models.families.hf_names import legacy_name


def key_map(checkpoint: Checkpoint) -> KeyMap:
    """As BERT's, with RoBERTa's positions."""
    return bert.key_map(checkpoint, "roberta", pad_id=1, roberta_positions=True)


def data2vec_key_map(checkpoint: Checkpoint) -> KeyMap:
    """As RoBERTa's."""
    return bert.key_map(checkpoint, "data2vec-text", pad_id=1, roberta_positions=True)


FAMILY = Family("roberta", "text", ("roberta", "xlm-roberta"), legacy_name("roberta."), key_map)
DATA2VEC_FAMILY = Family("data2vec-text", "text", ("data2vec-text",), legacy_name("data2vec_text."), data2vec_key_map)
