"""ResNet (arXiv:1512.03385) as transformers stores it. A supervised network: its classifier is read too."""

from __future__ import annotations

from emkum.errors import UnsupportedNetwork
from emkum.models.families.checkpoint import Checkpoint, KeyMap, Shapes
from emkum.models.families.family import CatalogueEntry, Family
from emkum.models.families.timm_folders import require_name
from emkum.models.preprocessing import Preprocessing
from emkum.models.resnet import ResNetSpec

PLAIN = r"^resnet(18|26|34|50|101|152)(\.|$)"  # timm's names of what we compute


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


def recognises_timm(shapes: Shapes) -> bool:
    """The names of timm and torchvision."""
    return {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.0.conv1.weight"} <= set(shapes)


def timm_key_map(checkpoint: Checkpoint) -> KeyMap:
    """Everything is inferred from the shapes, but for strides, which are those of version 1.5.

    Refuses a folder of timm that is named as a variant: of resnetblur50 and others the tensors are a resnet50's.
    """
    require_name(checkpoint, PLAIN, "its tensors are named as a plain ResNet's, but it may compute otherwise")
    shapes = checkpoint.shapes
    last = "conv3" if "layer1.0.conv3.weight" in shapes else "conv2"
    depths = tuple(1 + max(int(n.split(".")[1]) for n in shapes if n.startswith(f"layer{s}.")) for s in range(1, 5))
    spec = ResNetSpec(
        stem_width=shapes["conv1.weight"][0],
        widths=tuple(shapes[f"layer{stage}.0.{last}.weight"][0] for stage in range(1, 5)),
        depths=depths,
        layer="bottleneck" if last == "conv3" else "basic",
        num_classes=shapes["fc.weight"][0] if "fc.weight" in shapes else 0,
    )
    sources = _timm_conv("stem", "conv1", "bn1")
    ours = 0
    for stage, depth in enumerate(depths, start=1):
        for theirs in (f"layer{stage}.{index}" for index in range(depth)):
            for conv in range(1, int(last[-1]) + 1):
                sources |= _timm_conv(f"layers.{ours}.convs.{conv - 1}", f"{theirs}.conv{conv}", f"{theirs}.bn{conv}")
            if f"{theirs}.downsample.0.weight" in shapes:
                sources |= _timm_conv(f"layers.{ours}.shortcut", f"{theirs}.downsample.0", f"{theirs}.downsample.1")
            ours += 1
    if spec.num_classes:
        sources |= {f"head.{end}": f"fc.{end}" for end in ("weight", "bias")}
    return KeyMap(spec, sources, drop=(r"num_batches_tracked$",))


def _timm_conv(ours: str, conv: str, norm: str) -> dict[str, str | tuple[str, ...]]:
    names = ("weight", "bias", "running_mean", "running_var")
    sources: dict[str, str | tuple[str, ...]] = {f"{ours}.conv.weight": f"{conv}.weight"}
    return sources | {f"{ours}.norm.{name}": f"{norm}.{name}" for name in names}


def _timm_entry(name: str, model: str) -> CatalogueEntry:
    return CatalogueEntry(
        name, f"timm/{model}", "class_labels", "Apache-2.0", 2048, 0, patch=32, tokens=50, classes=1000
    )


def _entry(name: str) -> CatalogueEntry:
    repo = name.replace("resnet", "resnet-")
    return CatalogueEntry(
        name, f"microsoft/{repo}", "class_labels", "Apache-2.0", 2048, 0, patch=32, tokens=50, classes=1000
    )


FAMILIES = (
    Family(
        name="resnet",
        phrase="ResNet: a classifier of ImageNet-1k",
        modality="image",
        model_types=("resnet",),
        rename=lambda name: name.removeprefix("resnet."),
        key_map=key_map,
        preprocessing=Preprocessing(crop_fraction=0.875),
        default_targets=("cls", "logits"),
        spec=ResNetSpec,
        entries=(_entry("resnet50"), _entry("resnet101")),
    ),
    Family(
        name="resnet-timm",
        phrase="ResNet by timm's recipe A1: a classifier of ImageNet-1k",
        modality="image",
        model_types=(),
        rename=str,
        key_map=timm_key_map,
        preprocessing=Preprocessing(crop_fraction=0.95),
        recognises=recognises_timm,
        default_targets=("cls", "logits"),
        entries=(
            _timm_entry("resnet50-a1", "resnet50.a1_in1k"),
            _timm_entry("resnet101-a1", "resnet101.a1_in1k"),
        ),
    ),
)
