"""The text half of CLIP (arXiv:2103.00020) as transformers stores it, alone or within the whole of CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emkum.errors import UnsupportedNetwork
from emkum.models.backbone import BackboneSpec, Pooled
from emkum.models.families.checkpoint import Checkpoint, KeyMap, refuse_fine_tuned
from emkum.models.families.clip_vision import block_sources
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.families.hf_names import activation
from emkum.models.tokenizer import read_tokenizer


def key_map(checkpoint: Checkpoint) -> KeyMap:
    """`cls` is the pooled output before the projection into the space shared with pictures: the end of the text."""
    refuse_fine_tuned(checkpoint, r"^classifier\.", "clip-b16-text")
    config: dict[str, Any] = checkpoint.config.get("text_config", checkpoint.config)
    pooled, eos_id = _pooled(checkpoint.label, config.get("eos_token_id", 49407))
    spec = BackboneSpec(
        family="clip-text",
        modality="text",
        depth=int(config.get("num_hidden_layers", 12)),
        width=int(config.get("hidden_size", 512)),
        heads=int(config.get("num_attention_heads", 8)),
        mlp_width=int(config.get("intermediate_size", 2048)),
        activation=activation(config, "quick_gelu"),
        eps=float(config.get("layer_norm_eps", 1e-5)),
        vocab_size=int(config.get("vocab_size", 49408)),
        max_positions=int(config.get("max_position_embeddings", 77)),
        causal=True,
        pooled=pooled,
        eos_id=eos_id,
    )
    sources = block_sources(spec.depth) | {
        "embedding.tokens": "embeddings.token_embedding.weight",
        "embedding.positions": "embeddings.position_embedding.weight",
        "norm.weight": "final_layer_norm.weight",
        "norm.bias": "final_layer_norm.bias",
    }
    pictures_and_projections = (r"^vision_model\.", r"^(text|visual)_projection\.", r"^logit_scale$")
    return KeyMap(spec, sources, drop=(*pictures_and_projections, r"position_ids$"))


def _pooled(label: str, eos_id: object) -> tuple[Pooled, int]:
    """Which token is pooled. The first configurations said 2, which is wrong: there the highest id ends the text."""
    if not isinstance(eos_id, int):
        raise UnsupportedNetwork(f"{label}: texts that end in any of {eos_id}; one id is supported")
    return ("highest", 0) if eos_id == 2 else ("eos", eos_id)


def tokenizer(folder: Path) -> bytes:
    """tokenizer.json out of vocab.json and merges.txt; texts are put in lower case and in one form of Unicode."""
    if not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        return read_tokenizer(folder)
    from transformers import CLIPTokenizer

    try:
        built = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        return bytes(built.backend_tokenizer.to_str().encode("utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise UnsupportedNetwork(
            f"{folder}: vocab.json and merges.txt are no vocabulary of CLIP's: {error}",
            "put tokenizer.json beside them",
        ) from error


def _entry(name: str, repo: str, width: int) -> CatalogueEntry:
    return CatalogueEntry(name, f"openai/{repo}", "paired_text", "MIT", width, 12, tokens=77)


FAMILIES = (
    Family(
        name="clip-text",
        phrase="CLIP, its half for texts: captions matched to pictures",
        modality="text",
        model_types=("clip", "clip_text_model"),
        rename=lambda name: name.removeprefix("text_model."),
        key_map=key_map,
        tokenizer=tokenizer,
        default_targets=("cls",),
        entries=(
            _entry("clip-b32-text", "clip-vit-base-patch32", 512),
            _entry("clip-b16-text", "clip-vit-base-patch16", 512),
            _entry("clip-l14-text", "clip-vit-large-patch14", 768),
        ),
    ),
)
