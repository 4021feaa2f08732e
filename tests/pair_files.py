"""Tars of captions with their pictures, tiny networks of pairs, and what these say of one pair by itself."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from emkum.models import targets
from emkum.models.catalogue import load_network
from emkum.models.multiway import Multiway
from emkum.models.network import Network, normalise, save_network
from emkum.models.tokenizer import text_ids
from emkum.shards.reader import Cache
from emkum.shards.views import Box, box_for, decode_view
from tests import test_models_beit3, test_models_vlmo
from tests.sound_files import write_tar

SIZE, POSITIONS = 20, 32
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "cat", "runs", "on", "grass", "the", "number"]
BROKEN = b"\xff\xd8\xff no picture"


def word_tokenizer() -> str:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return str(tokenizer.to_str())


def save_pairs(root: Path) -> dict[str, Path]:
    """Folders of the networks of one tiny BEiT-3 and one tiny VLMo: beit3, beit3-text, beit3-pair, vlmo-pair."""
    beit3 = test_models_beit3.write(root / "files/beit3", test_models_beit3.original_state())
    vlmo = test_models_vlmo.write(root / "files/vlmo", test_models_vlmo.original_state())
    (vlmo.parent / "tokenizer.json").write_text(word_tokenizer())
    sources = {"beit3": str(beit3), "beit3-text": f"{beit3}#text", "beit3-pair": f"{beit3}#pair"}
    sources |= {"vlmo-pair": f"{vlmo}#pair"}
    for name, source in sources.items():
        save_network(dataclasses.replace(load_network(source, name=name), supervision="paired_text"), root / name)
    return {name: root / name for name in sources}


def jpeg(seed: int) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((40, 32), Image.Resampling.BILINEAR).save(buffer, "JPEG")
    return buffer.getvalue()


def caption(seed: int) -> str:
    draw = np.random.default_rng(seed)
    return " ".join(draw.choice(WORDS[4:], int(draw.integers(1, 24))))


def pairs_tar(path: Path, count: int, seed: int = 0, alone: tuple[int, ...] = (), bad: tuple[int, ...] = ()) -> Path:
    """`count` samples with 0 to 3 captions (`alone`: without a picture; `bad`: with a broken one)."""
    members: dict[str, bytes] = {}
    for i in range(count):
        if i not in alone:
            members[f"p{i:02d}.jpg"] = BROKEN if i in bad else jpeg(seed + i)
        captions = [caption(100 * seed + 10 * i + j) for j in range(i % 4)]
        members[f"p{i:02d}.json"] = json.dumps({"captions": captions}).encode()
    return write_tar(path, members)


def lines_of(cache: Cache) -> list[dict[str, Any]]:
    return [line for split in cache.splits for line in cache.captions(split).to_pylist()]


def decoded(cache: Cache, data: Path, line: dict[str, Any]) -> tuple[np.ndarray, Box] | None:
    """Crop and box of the picture that a caption belongs to, decoded here; None where that cannot be."""
    samples = {sample["image_row"]: sample for sample in cache.samples("train").to_pylist()}
    if line["image_row"] is None:
        return None
    sample = samples[line["image_row"]]
    assert (sample["tar"], sample["key"]) == (line["tar"], line["key"])
    with open(data / sample["tar"], "rb") as tar:
        tar.seek(sample["offset"])
        found = tar.read(sample["size"])
    policy = cache.segments[0].views
    if found == BROKEN:
        return None
    return decode_view(found, SIZE, lambda w, h: box_for(policy, sample["tar"], sample["key"], 0, w, h))


def alone(network: Network, crop: np.ndarray, text: str) -> dict[str, np.ndarray]:
    """What the network says of one pair, without pads and without the pass under test."""
    backbone: object = network.backbone
    assert isinstance(backbone, Multiway)
    assert network.tokenizer is not None
    ids, length = text_ids(network.tokenizer, [text], POSITIONS)
    with torch.no_grad():
        images = normalise(network, torch.from_numpy(crop)[None])
        tokens, layout = backbone.embed(images, torch.from_numpy(ids[:, : length[0]]))
        out = backbone.run(tokens, layout)
        final = backbone.finish(out.hidden[-1], layout)
        words = final[:, layout.num_image :].clone()
        words[:, 0] = 0
        layers = targets.layers([hidden[:, layout.num_image :] for hidden in out.hidden], None, final_layer_norm=False)
    pooled = 0 if network.family == "beit3-pair" else layout.num_image
    found = {"cls": final[:, pooled], "mean": final.mean(dim=1), "layers": layers, "patches": words}
    return {target: values[0].numpy() for target, values in found.items()}
