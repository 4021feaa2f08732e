"""Vision and text Transformers of usual sizes with random weights, as folders that `--teacher` takes.

Speed and memory do not depend on what a network has learned, so no weights need to be fetched.
"""

from __future__ import annotations

import string
from pathlib import Path

import torch

VISION = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}  # width, blocks, heads
TEXT = {"small": (384, 6, 12), "base": (768, 12, 12), "large": (768, 12, 12)}  # as MiniLM and BERT base
VOCABULARY = 30_522


def random_vision(folder: Path, size: str, seed: int = 0) -> Path:
    """ViT-S, B or L with patches of 16 px."""
    from transformers import ViTConfig, ViTModel

    width, depth, heads = VISION[size]
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def random_text(folder: Path, size: str, seed: int = 1) -> Path:
    """BERT with a tokenizer that makes a token of every two letters: texts twice as long as with a real one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    width, depth, heads = TEXT[size]
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *string.ascii_lowercase]
    words += ["##" + a + b for a in string.ascii_lowercase for b in string.ascii_lowercase]
    words += ["##" + a for a in string.ascii_lowercase]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
