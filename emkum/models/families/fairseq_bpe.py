"""The tokenizer of fairseq's text networks, made of its three files: GPT-2's byte pairs, numbered by a dictionary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emkum.errors import UnsupportedNetwork, WeightsUnavailable

DICTIONARY, ENCODER, MERGES = FILES = ("dict.txt", "encoder.json", "vocab.bpe")
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # in front of the dictionary's lines; <mask> comes last


def tokenizer(folder: Path) -> bytes:
    """A tokenizers JSON that gives what fairseq does: `<s>`, then byte pairs, numbered as the dictionary's lines.

    No `</s>` at the end: the text networks of data2vec read blocks of 511 tokens cut anywhere, with `<s>` in front, so
    they hardly ever saw a `</s>` that ends a short caption. Byte pairs that are not in the dictionary are `<unk>`, and
    words such as `<s>` within a caption are text. Raises WeightsUnavailable or UnsupportedNetwork.
    """
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise WeightsUnavailable(
            f"{folder} has no tokenizer: it lacks {', '.join(missing)}",
            f"put {', '.join(FILES)} of the network's release beside the weights, or a tokenizer.json",
        )
    numbers = _numbers(folder / DICTIONARY)
    pairs = _pairs(folder / ENCODER)
    vocabulary = {token: number for number, token in enumerate(SPECIAL)}
    vocabulary["<mask>"] = unknown_from = len(SPECIAL) + len(numbers)
    for token, gpt2_number in pairs.items():
        if token in vocabulary:
            raise UnsupportedNetwork(f"{folder / ENCODER} has a byte pair {token}, which is a special token")
        # One that the dictionary lacks still takes part in longer ones, so it needs a number of its own.
        unknown_from += str(gpt2_number) not in numbers
        vocabulary[token] = numbers.get(str(gpt2_number), unknown_from)
    merges = _merges(folder / MERGES, pairs)
    model: dict[str, Any] = {"type": "BPE", "unk_token": "<unk>", "vocab": vocabulary, "merges": merges}
    if unknown_from > vocabulary["<mask>"]:
        model["unknown_from"] = vocabulary["<mask>"] + 1  # read by emkum.models.tokenizer
    made: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": model,
    }
    return json.dumps(made, ensure_ascii=True, sort_keys=True).encode()


def _numbers(path: Path) -> dict[str, int]:
    """GPT-2's number, as text -> the number in the network's table: the line, after the special tokens."""
    found: dict[str, int] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        symbol, _, count = line.rstrip().rpartition(" ")
        if not symbol or not count.isdigit() or symbol in found:
            raise UnsupportedNetwork(f"{path}: line {len(found) + 1} is {line!r}, not a new symbol and its count")
        found[symbol] = len(SPECIAL) + len(found)
    return found


def _pairs(path: Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedNetwork(f"{path} is not JSON: {error}", "fetch it again") from error
    if not isinstance(found, dict) or not all(isinstance(number, int) for number in found.values()):
        raise UnsupportedNetwork(f"{path} is no table of byte pairs and their numbers", "fetch it again")
    return found


def _merges(path: Path, pairs: dict[str, int]) -> list[list[str]]:
    """The lines after the first, which tells the version."""
    lines = path.read_text(encoding="utf-8").split("\n")[1:]
    merges = [line.split(" ") for line in lines if line]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= pairs.keys():
            raise UnsupportedNetwork(
                f"{path} joins {' '.join(merge)!r}, which {ENCODER} does not know", "take both of one release"
            )
    return merges
