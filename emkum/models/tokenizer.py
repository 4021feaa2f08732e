"""Captions to token ids, with a tokenizer kept as the bytes of its tokenizer.json, sentencepiece's in one of ours.

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
from emkum.models import sentencepieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TOKENS = 64
TILE = 16  # positions; the cache stores text in tiles of this length
MASK_TOKENS = ("[MASK]", "<mask>")
_SLOW_FILES = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")


def text_ids(tokenizer: bytes, captions: Sequence[str], max_tokens: int = MAX_TOKENS) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [N, L] with the special tokens, and how many of each row are real, int32 [N].

    Longer captions are cut so that the closing special token stays. The rest of a row is the pad id. L is `max_tokens`
    rounded up to a multiple of 16.
    """
    pieces = _pieces(tokenizer)
    rows = pieces.rows(captions, max_tokens) if pieces else _encoded(tokenizer, captions, max_tokens)
    ids = np.full((len(captions), -(-max_tokens // TILE) * TILE), pad_id(tokenizer), dtype=np.int32)
    length = np.zeros(len(captions), dtype=np.int32)
    for row, found in enumerate(rows):
        length[row] = len(found)
        ids[row, : length[row]] = found
    if pieces is None and (unknown := _unknown(tokenizer)) is not None:
        first, unknown_id = unknown
        ids[ids >= first] = unknown_id
    return ids, length


@lru_cache(maxsize=8)
def pad_id(tokenizer: bytes) -> int:
    """The id that fills a row: the tokenizer's own padding, else its [PAD] or <pad>, else 0."""
    if pieces := _pieces(tokenizer):
        return pieces.pad
    found = json.loads(tokenizer)
    if found.get("padding"):
        return int(found["padding"]["pad_id"])
    encoder = _parsed(tokenizer)
    ids = (encoder.token_to_id(token) for token in ("[PAD]", "<pad>"))
    return next((i for i in ids if i is not None), 0)


@lru_cache(maxsize=8)
def _unknown(tokenizer: bytes) -> tuple[int, int] | None:
    """The first id that stands for no row of the network's table, and the id to take in place of such ones.

    Only in tokenizers made by families.fairseq_bpe: byte pairs that a dictionary lacks still take part in longer ones.
    """
    model = json.loads(tokenizer).get("model") or {}
    first = model.get("unknown_from")
    return None if first is None else (int(first), int(model["vocab"][model["unk_token"]]))


def count_of_ids(tokenizer: bytes) -> int:
    """One more than the highest id that `text_ids` can give, of a pad too."""
    if pieces := _pieces(tokenizer):
        highest = max(pieces.bos, pieces.eos, pieces.unk, pieces.processor.get_piece_size() - 1 + pieces.offset)
    elif (unknown := _unknown(tokenizer)) is not None:
        highest = unknown[0] - 1
    else:
        highest = max(_parsed(tokenizer).get_vocab(with_added_tokens=True).values(), default=-1)
    return 1 + max(highest, pad_id(tokenizer))


def special_ids(tokenizer: bytes) -> tuple[set[int], int | None]:
    """The ids of special tokens, and that of the one which stands for a masked word; None where it has none.

    Of tokenizers of sentencepiece neither is known.
    """
    if _pieces(tokenizer) is not None:
        return set(), None
    found = _parsed(tokenizer)
    special = {number for number, token in found.get_added_tokens_decoder().items() if token.special}
    masks = [number for token in MASK_TOKENS if (number := found.token_to_id(token)) is not None]
    return special, next(iter(masks), None)


def _encoded(tokenizer: bytes, captions: Sequence[str], max_tokens: int) -> list[list[int]]:
    return [encoding.ids for encoding in _truncating(tokenizer, max_tokens).encode_batch(list(captions))]


@lru_cache(maxsize=8)
def _pieces(tokenizer: bytes) -> sentencepieces.Pieces | None:
    """The tokenizer if it is one of sentencepiece."""
    try:
        found = json.loads(tokenizer)
    except ValueError:
        return None  # whoever parses it as a tokenizer.json says so
    is_ours = isinstance(found, dict) and found.get("type") == sentencepieces.KIND
    return sentencepieces.parsed(found) if is_ours else None


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


def differing(a: bytes, b: bytes) -> tuple[str, ...]:
    """What of two tokenizers can give other ids: top-level keys of their JSON, or "pad id"; () for equal ids.

    Padding and truncation are not compared: `text_ids` has its own.
    """
    if a == b:
        return ()
    ours, theirs = json.loads(a), json.loads(b)
    keys = sorted((set(ours) | set(theirs)) - {"padding", "truncation"})
    found = tuple(key for key in keys if ours.get(key) != theirs.get(key))
    return found if pad_id(a) == pad_id(b) else (*found, "pad id")


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
        if _pieces(content) is None:
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
