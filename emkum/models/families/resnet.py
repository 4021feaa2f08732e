"""ResNet (arXiv:1512.03385) as transformers stores it. A supervised network: its classifier is read too."""

from __future__ import annotations

from emkum.errors import UnsupportedNetwork
from emkum.models.families.checkpoint import Checkpoint, KeyMap
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.preprocessing import Preprocessing
from emkum.models.resnet import ResNetSpec


def key_map(checkpoint: Checkpoint) -> KeyMap:
    """With `logits` if the checkpoint has a classifier."""
    config, shapes = checkpoint.config, checkpoint.shapes
    if config.get("hidden_act", "relu") != "relu":
        raise UnsupportedNetwork(f"{checkpoint.label}: a ResNet with {config['hidden_act']!r}; only relu is supported")
    spec = ResNetSpec(
        stem_width=int(config.get("embedding_size", 64)),
        widths=tuple(config.get("hidden_sizes", (256, 512, 1024, 2048))),
        depths=tuple(config.get("depths", (3, 4, 6, 3))),
        layer=config.get("layer_type", "bottleneck"),
        stride_in_first_stage=bool(config.get("downsample_in_first_stage", False)),
        stride_in_first_conv=bool(config.get("downsample_in_bottleneck", False)),
        num_classes=shapes["classifier.1.weight"][0] if "classifier.1.weight" in shapes else 0,
    )
    sources: dict[str, str | tuple[str, ...]] = _conv("stem", "embedder.embedder")
    ours = 0
    for stage, depth in enumerate(spec.depths):
        for index in range(depth):
            theirs = f"encoder.stages.{stage}.layers.{index}"
            for conv in range(2 if spec.layer == "basic" else 3):
                sources |= _conv(f"layers.{ours}.convs.{conv}", f"{theirs}.layer.{conv}")
            if f"{theirs}.shortcut.convolution.weight" in shapes:
                sources |= _conv(f"layers.{ours}.shortcut", f"{theirs}.shortcut")
            ours += 1
    if spec.num_classes:
        sources |= {f"head.{end}": f"classifier.1.{end}" for end in ("weight", "bias")}
    return KeyMap(spec, sources, drop=(r"num_batches_tracked$",))


def _conv(ours: str, theirs: str) -> dict[str, str | tuple[str, ...]]:
    norm = ("weight", "bias", "running_mean", "running_var")
    sources: dict[str, str | tuple[str, ...]] = {f"{ours}.conv.weight": f"{theirs}.convolution.weight"}
    return sources | {f"{ours}.norm.{name}": f"{theirs}.normalization.{name}" for name in norm}


def _entry(name: str) -> CatalogueEntry:
    repo = name.replace("resnet", "resnet-")
    return CatalogueEntry(
        name, f"microsoft/{repo}", "class_labels", "Apache-2.0", width=2048, depth=0, patch=32, tokens=50
    )


FAMILIES = (
    Family(
        name="resnet",
        modality="image",
        model_types=("resnet",),
        rename=lambda name: name.removeprefix("resnet."),
        key_map=key_map,
        preprocessing=Preprocessing(crop_fraction=0.875),
        default_targets=("cls", "logits"),
        spec=ResNetSpec,
        entries=(_entry("resnet50"), _entry("resnet101")),
    ),
)
