"""Data2vec for sounds: 1 (arXiv:2202.03555) as transformers stores it, 2 (arXiv:2212.07525) as fairseq does."""

from __future__ import annotations

import re

from emkum.errors import UnsupportedNetwork
from emkum.models.audio import AudioSpec
from emkum.models.families.checkpoint import Checkpoint, KeyMap, Shapes
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.families.hf_names import activation

_HEADS = r"^(lm_head|classifier|projector|final_proj|tdnn|objective)\."
_FINE_TUNED = r"For(CTC|XVector|SequenceClassification|AudioFrameClassification|AudioClassification)"
_KERNELS, _STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)  # of every published file: 320 samples a frame
_AUDIO = "modality_encoders.AUDIO"


def key_map(checkpoint: Checkpoint) -> KeyMap:
    """Version 1. Refuses what was fine-tuned with transcripts or labels."""
    config = checkpoint.config
    heads = sorted(name for name in checkpoint.shapes if re.search(_HEADS, name))
    trained_as = [a for a in config.get("architectures") or () if re.search(_FINE_TUNED, str(a))]
    if heads or trained_as:
        sign = f"it has {heads[0]}" if heads else f"its config.json says {trained_as[0]}"
        raise UnsupportedNetwork(f"{checkpoint.label} is fine-tuned with transcripts: {sign}", "use data2vec-audio")
    act = activation(config, "gelu")
    if config.get("feat_extract_activation", "gelu") != config.get("hidden_act", "gelu"):
        raise UnsupportedNetwork(f"{checkpoint.label}: two activations, {config['feat_extract_activation']} and {act}")
    bias = bool(config.get("conv_bias", False))
    spec = AudioSpec(
        family="data2vec-audio",
        depth=int(config.get("num_hidden_layers", 12)),
        width=int(config.get("hidden_size", 768)),
        heads=int(config.get("num_attention_heads", 12)),
        mlp_width=int(config.get("intermediate_size", 3072)),
        convs=_convs(config.get("conv_dim", (512,) * 7), config.get("conv_kernel"), config.get("conv_stride")),
        position_kernel=int(config.get("conv_pos_kernel_size", 19)),
        position_layers=int(config.get("num_conv_pos_embeddings", 5)),
        position_groups=int(config.get("num_conv_pos_embedding_groups", 16)),
        conv_bias=bias,
        activation=act,
        eps=float(config.get("layer_norm_eps", 1e-5)),
        wave_eps=1e-7 if config.get("do_normalize", True) else None,  # that of transformers' feature extractor
        sample_rate=int(config.get("sampling_rate", 16_000)),
    )
    sources: dict[str, str | tuple[str, ...]] = {}
    for i in range(len(spec.convs)):
        theirs = f"feature_extractor.conv_layers.{i}"
        sources[f"embedding.convs.{i}.weight"] = f"{theirs}.conv.weight"
        if bias:
            sources[f"embedding.convs.{i}.bias"] = f"{theirs}.conv.bias"
    for end in ("weight", "bias"):
        sources |= {
            f"embedding.feature_norm.{end}": f"feature_projection.layer_norm.{end}",
            f"embedding.projection.{end}": f"feature_projection.projection.{end}",
            f"embedding.norm.{end}": f"encoder.layer_norm.{end}",
        }
        for i in range(len(spec.convs)):
            sources[f"embedding.conv_norms.{i}.{end}"] = f"feature_extractor.conv_layers.{i}.layer_norm.{end}"
        for i in range(spec.position_layers):
            sources[f"embedding.positions.{i}.{end}"] = f"encoder.pos_conv_embed.layers.{i}.conv.{end}"
        for i in range(spec.depth):
            ours, theirs = f"stack.blocks.{i}", f"encoder.layers.{i}"
            sources |= {
                f"{ours}.qkv.{end}": tuple(f"{theirs}.attention.{n}_proj.{end}" for n in ("q", "k", "v")),
                f"{ours}.proj.{end}": f"{theirs}.attention.out_proj.{end}",
                f"{ours}.norm1.{end}": f"{theirs}.layer_norm.{end}",
                f"{ours}.fc1.{end}": f"{theirs}.feed_forward.intermediate_dense.{end}",
                f"{ours}.fc2.{end}": f"{theirs}.feed_forward.output_dense.{end}",
                f"{ours}.norm2.{end}": f"{theirs}.final_layer_norm.{end}",
            }
    return KeyMap(spec, sources, drop=(r"^masked_spec_embed$",))


def recognises(shapes: Shapes) -> bool:
    """An original file of version 2, or what was fine-tuned of it."""
    return any(_AUDIO in name for name in shapes)


def second_key_map(checkpoint: Checkpoint) -> KeyMap:
    """Version 2, the student's weights, which fairseq fine-tunes; those of its moving average (_ema) are left out.

    Everything is inferred from the shapes, but the strides of the convolutions and the norms' epsilon (1e-5, as in
    base_audio_only_task.yaml). Refuses what was fine-tuned with transcripts.
    """
    shapes, label = checkpoint.shapes, checkpoint.label
    tuned = sorted(name for name in shapes if name.startswith(("w2v_encoder.", "proj.", "lm_head.", "final_proj.")))
    if tuned:
        raise UnsupportedNetwork(
            f"{label} is fine-tuned with transcripts: it has {tuned[0]}", "use base_libri.pt, data2vec2-audio"
        )
    needed = [
        f"{_AUDIO}.{name}"
        for name in ("alibi_scale", "local_encoder.conv_layers.0.0.weight", "project_features.2.weight")
    ]
    needed += [f"{_AUDIO}.relative_positional_encoder.1.0.weight", "blocks.0.mlp.fc1.weight"]
    if missing := [name for name in needed if name not in shapes]:
        raise UnsupportedNetwork(f"{label} is no data2vec2 of sounds: it lacks {missing[0]}", "use an original file")
    width = shapes[f"{_AUDIO}.project_features.2.weight"][0]
    scales = shapes[f"{_AUDIO}.alibi_scale"]  # [1 or blocks, 1, heads, 1, 1]; older files lack the first axis
    if len(scales) not in (4, 5) or scales[-3] < 2:
        raise UnsupportedNetwork(
            f"{label}: an alibi_scale of shape {scales}, which does not tell the number of heads",
            "use a file with a scale for each head, as the published ones have",
        )
    position = shapes[f"{_AUDIO}.relative_positional_encoder.1.0.weight"]
    convs = _numbers(shapes, rf"^{_AUDIO}\.local_encoder\.conv_layers\.(\d+)\.0\.weight$")
    conv_shapes = [shapes[f"{_AUDIO}.local_encoder.conv_layers.{i}.0.weight"] for i in range(convs)]
    prenet = _numbers(shapes, rf"^{_AUDIO}\.context_encoder\.blocks\.(\d+)\.norm1\.weight$")
    blocks = _numbers(shapes, r"^blocks\.(\d+)\.norm1\.weight$")
    spec = AudioSpec(
        family="data2vec2-audio",
        depth=prenet + blocks,
        width=width,
        heads=scales[-3],
        mlp_width=shapes["blocks.0.mlp.fc1.weight"][0],
        convs=_convs([s[0] for s in conv_shapes], [s[2] for s in conv_shapes], None),
        position_kernel=position[2],
        position_layers=_numbers(shapes, rf"^{_AUDIO}\.relative_positional_encoder\.(\d+)\.0\.weight$") - 1,
        position_groups=width // position[1],
        alibi=scales[0] if len(scales) == 5 else 1,
        prenet=prenet,
    )
    sources: dict[str, str | tuple[str, ...]] = {"alibi_scales": f"{_AUDIO}.alibi_scale"}
    for i in range(convs):
        theirs = f"{_AUDIO}.local_encoder.conv_layers.{i}"
        sources[f"embedding.convs.{i}.weight"] = f"{theirs}.0.weight"
        sources |= {f"embedding.conv_norms.{i}.{end}": f"{theirs}.2.1.{end}" for end in ("weight", "bias")}
    for end in ("weight", "bias"):
        sources |= {
            f"embedding.feature_norm.{end}": f"{_AUDIO}.project_features.1.{end}",
            f"embedding.projection.{end}": f"{_AUDIO}.project_features.2.{end}",
            f"embedding.norm.{end}": f"{_AUDIO}.context_encoder.norm.{end}",
        }
        for i in range(spec.position_layers):
            sources[f"embedding.positions.{i}.{end}"] = f"{_AUDIO}.relative_positional_encoder.{i + 1}.0.{end}"
        for i in range(spec.depth):
            theirs = f"{_AUDIO}.context_encoder.blocks.{i}" if i < prenet else f"blocks.{i - prenet}"
            for ours, name in (("qkv", "attn.qkv"), ("proj", "attn.proj"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2")):
                sources[f"stack.blocks.{i}.{ours}.{end}"] = f"{theirs}.{name}.{end}"
            for norm in ("norm1", "norm2"):
                sources[f"stack.blocks.{i}.{norm}.{end}"] = f"{theirs}.{norm}.{end}"
    drop = (r"^_ema\.", rf"^{_AUDIO}\.decoder\.", r"^shared_decoder\.", r"^recon_proj\.")
    return KeyMap(spec, sources, drop)


def _convs(channels: object, kernels: object, strides: object) -> tuple[tuple[int, int, int], ...]:
    kernels = _KERNELS if kernels is None else kernels
    if strides is None and tuple(kernels) == _KERNELS:  # type: ignore[arg-type]
        strides = _STRIDES
    try:
        return tuple((int(c), int(k), int(s)) for c, k, s in zip(channels, kernels, strides, strict=True))  # type: ignore
    except (TypeError, ValueError):
        raise UnsupportedNetwork(
            f"convolutions with {channels} channels, kernels {kernels} and strides {strides}",
            f"networks are read whose kernels are {_KERNELS}, or whose config.json states all three",
        ) from None


def _numbers(shapes: Shapes, pattern: str) -> int:
    """1 + the largest number in names of this pattern; 0 if there is none."""
    return 1 + max((int(match[1]) for name in shapes if (match := re.match(pattern, name))), default=-1)


FAMILIES = (
    Family(
        name="data2vec-audio",
        modality="audio",
        model_types=("data2vec-audio",),
        rename=lambda name: name.removeprefix("data2vec_audio."),
        key_map=key_map,
        default_targets=("mean", "layers"),
        layers_rule="data2vec",
        phrase="data2vec (version 1) of sound, regresses its own averaged layers",
        spec=AudioSpec,
        entries=(CatalogueEntry("data2vec-audio", "facebook/data2vec-audio-base", "none", "MIT", 768, 12),),
    ),
    Family(
        name="data2vec2-audio",
        modality="audio",
        model_types=(),
        rename=str,
        key_map=second_key_map,
        recognises=recognises,
        default_targets=("mean", "layers"),
        layers_rule="data2vec2",
        phrase="data2vec 2.0 of sound, regresses its own averaged layers; attention is biased by distance",
        spec=AudioSpec,
        entries=(
            CatalogueEntry(
                "data2vec2-audio",
                "https://dl.fbaipublicfiles.com/fairseq/data2vec2/base_libri.pt",
                "none",
                "MIT",
                768,
                12,
            ),
        ),
    ),
)
