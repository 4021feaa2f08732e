"""Captions to token ids, with a tokenizer kept as the bytes of its tokenizer.json.

N texts, L positions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from emkum.errors import UnsupportedNetwork, UsageError, WeightsUnavailable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TOKENS = 64
TILE = 16  # positions; the cache stores text in tiles of this length
_SLOW_FILES = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")


def text_ids(tokenizer: bytes, captions: Sequence[str], max_tokens: int = MAX_TOKENS) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [N, L] with the special tokens, and how many of each row are real, int32 [N].

    Longer captions are cut so that the closing special token stays. The rest of a row is the pad id. L is `max_tokens`
    rounded up to a multiple of 16.
    """
    encoder = _truncating(tokenizer, max_tokens)
    ids = np.full((len(captions), -(-max_tokens // TILE) * TILE), pad_id(tokenizer), dtype=np.int32)
    length = np.zeros(len(captions), dtype=np.int32)
    for row, encoding in enumerate(encoder.encode_batch(list(captions))):
        length[row] = len(encoding.ids)
        ids[row, : length[row]] = encoding.ids
    return ids, length


@lru_cache(maxsize=8)
def pad_id(tokenizer: bytes) -> int:
    """The id that fills a row: the tokenizer's own padding, else its [PAD] or <pad>, else 0."""
    found = json.loads(tokenizer)
    if found.get("padding"):
        return int(found["padding"]["pad_id"])
    encoder = _parsed(tokenizer)
    ids = (encoder.token_to_id(token) for token in ("[PAD]", "<pad>"))
    return next((i for i in ids if i is not None), 0)


@lru_cache(maxsize=8)
def _truncating(tokenizer: bytes, max_tokens: int) -> Tokenizer:
    encoder = _parsed(tokenizer)
    # The file's own settings (MiniLM's: 128 tokens, padded) would cut or pad before ours.
    encoder.no_truncation()
    encoder.no_padding()
    num_special = encoder.num_special_tokens_to_add(False)
    if max_tokens <= num_special:
        raise UsageError(f"at most {max_tokens} tokens, of which {num_special} are special", "allow more tokens")
    encoder.enable_truncation(max_tokens)
    return encoder


def _parsed(tokenizer: bytes) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(tokenizer.decode("utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise UnsupportedNetwork(f"a tokenizer.json that cannot be read: {error}", "save it again") from error


def read_tokenizer(folder: Path) -> bytes:
    """The tokenizer.json of a checkpoint folder, or one made of its older vocabulary files by transformers.

    Raises WeightsUnavailable if there is neither, UnsupportedNetwork if it cannot be read.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        content = path.read_bytes()
        _parsed(content)
        return content
    if not any((folder / name).is_file() for name in _SLOW_FILES):
        raise WeightsUnavailable(
            f"{folder} has no tokenizer: neither tokenizer.json nor {' nor '.join(_SLOW_FILES)}",
            "put tokenizer.json beside the weights",
        )
    from transformers import AutoTokenizer

    try:
        built = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        return built.backend_tokenizer.to_str().encode("utf-8")
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise UnsupportedNetwork(
            f"{folder}: no tokenizer could be made of its vocabulary files: {error}", "put tokenizer.json beside them"
        ) from error
