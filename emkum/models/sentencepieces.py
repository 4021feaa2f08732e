"""Tokenizers of sentencepiece as fairseq's networks number their pieces, kept as JSON that holds the whole model."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from emkum.errors import UnsupportedNetwork, UsageError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

EosPolicy = Literal["keep", "drop"]
KIND = "sentencepiece"


@dataclass(frozen=True)
class Pieces:
    """A sentencepiece model and its numbering: a piece's id is the model's plus `offset`, what it does not know `unk`.

    eos_policy: `keep` ends a text with `eos`; `drop` does not, for networks that never saw one end a short text.
    """

    processor: SentencePieceProcessor
    offset: int
    bos: int
    pad: int
    eos: int
    unk: int
    eos_policy: EosPolicy

    def rows(self, captions: Sequence[str], max_tokens: int) -> list[list[int]]:
        """The ids of each caption: bos, its pieces, eos; long ones are cut so that eos stays."""
        last = [self.eos] if self.eos_policy == "keep" else []
        num_special = 1 + len(last)
        if max_tokens <= num_special:
            raise UsageError(f"at most {max_tokens} tokens, of which {num_special} are special", "allow more tokens")
        unknown = self.processor.unk_id()
        return [
            [
                self.bos,
                *(self.unk if i == unknown else i + self.offset for i in ids[: max_tokens - num_special]),
                *last,
            ]
            for ids in self.processor.encode(list(captions), out_type=int)
        ]


def tokenizer_of(path: Path, eos_policy: EosPolicy = "keep") -> bytes:
    """The tokenizer of an .spm file in fairseq's numbering: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, piece 3 is 4.

    The same file and policy give the same bytes. Raises UnsupportedNetwork if it is no sentencepiece model.
    """
    kept = {
        "type": KIND,
        "model": base64.b64encode(path.read_bytes()).decode("ascii"),
        "offset": 1,
        "bos": 0,
        "pad": 1,
        "eos": 2,
        "unk": 3,
        "eos_policy": eos_policy,
    }
    parsed(kept, str(path))
    return json.dumps(kept, sort_keys=True).encode("ascii")


def parsed(kept: dict[str, Any], label: str = "a tokenizer of sentencepiece") -> Pieces:
    """The tokenizer that `tokenizer_of` wrote. Raises UnsupportedNetwork for one that cannot be read."""
    from sentencepiece import SentencePieceProcessor

    try:
        model = base64.b64decode(kept["model"], validate=True)
        processor = SentencePieceProcessor(model_proto=model) if model else None
        ids = {name: int(kept[name]) for name in ("offset", "bos", "pad", "eos", "unk")}
        policy = kept["eos_policy"]
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, binascii.Error) as error:
        raise UnsupportedNetwork(f"{label} cannot be read: {error}", "fetch it again") from error
    if processor is None or policy not in ("keep", "drop"):
        raise UnsupportedNetwork(f"{label} cannot be read: an empty model, or eos_policy {policy!r}", "fetch it again")
    return Pieces(processor, eos_policy=policy, **ids)
