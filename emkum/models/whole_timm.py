"""Any model of timm by its name with a pretrained tag, run in one piece.

B batch, H height, W width, T tokens, D width.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Collection
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from emkum.errors import MissingPackage, UnknownNetwork, UnsupportedNetwork, WeightsUnavailable
from emkum.models import whole
from emkum.models.families.family import Supervision
from emkum.models.preprocessing import Preprocessing
from emkum.models.whole import Described, Heard, WholeNetwork

PREFIX = "timm:"

# The tag says what the weights have seen: the first rule that fits holds. docs/teachers.md lists them.
_SUPERVISION: tuple[tuple[str, Supervision], ...] = (
    (r"(^|_)ft(_|$)|_in(1k|12k|21k|22k)_in(1k|12k|21k|22k)", "class_labels"),
    (r"openai|laion|clip|webli|dfn|datacomp|merged2b|metaclip|siglip|aimv2", "paired_text"),
    (r"dino|lvd\d|sat\d|mae|ijepa|fb_moco|swav|simsiam", "none"),
    (r"^mim_", "none+clip_tokenizer"),
    (r"ssl_|swsl|in1k|in12k|in21k|in22k|jft|inat|goog", "class_labels"),
)


def supervision(tag: str) -> Supervision:
    """What weights of this tag have seen beside pictures; "unknown" for a tag that no rule fits."""
    return next((found for pattern, found in _SUPERVISION if re.search(pattern, tag)), "unknown")


def read_whole(name: str) -> tuple[WholeNetwork, Preprocessing, Supervision, str]:
    """The pretrained model, how it wants its pictures, its supervision and licence.

    Raises MissingPackage without a timm that works, UnknownNetwork, UnsupportedNetwork, WeightsUnavailable.
    """
    timm = _timm()
    if not timm.is_model(name):
        raise _unknown(timm, name)
    try:
        published = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise _unknown(timm, name) from error
    if published is None or not published.has_weights:
        instead = ", ".join(_with_weights(timm, name))
        raise UnsupportedNetwork(f"timm has no weights for {name}", f"name one of {instead}")
    tag = str(published.tag or name.partition(".")[2])
    # Weights without a classifier want their norm on every token; with one it stays where the classifier needs it.
    options: dict[str, Any] = {} if published.num_classes else {"num_classes": 0, "global_pool": ""}
    model, options = _made(timm, name, options)
    preprocessing = Preprocessing(
        image_size=int(published.input_size[-1]),
        mean=tuple(published.mean),
        std=tuple(published.std),
        crop_fraction=float(published.crop_pct or 1.0),
        interpolation=str(published.interpolation or "bicubic"),
    )
    described = Described(
        library="timm",
        name=f"{name.partition('.')[0]}.{tag}" if tag else name,
        config=options,
        module=model,
        run=_run,
        has_cls=getattr(model, "cls_token", None) is not None,
        num_prefix=int(getattr(model, "num_prefix_tokens", 0)),
        version=f"timm {timm.__version__}",
    )
    network = whole.of_pictures(described, preprocessing)
    return network, preprocessing, supervision(tag), str(published.license or "unknown")


def _timm() -> ModuleType:
    try:
        timm: ModuleType = importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("timm", "torchvision"):
            raise
        raise MissingPackage(
            f"{error.name} is not installed, and {PREFIX}NAME needs it", "pip install 'emkum[timm]'"
        ) from error
    except (RuntimeError, OSError, ImportError) as error:
        import torch

        raise MissingPackage(
            f"timm cannot be imported: {str(error).strip().splitlines()[0]}. Its torchvision{_torchvision_version()} "
            f"was built for another torch than {torch.__version__} (the one on PyPI is built for CUDA)",
            "install the torchvision that belongs to this torch, from the place that torch came from; or uninstall it: "
            "everything but timm works without it",
        ) from error
    return timm


def _torchvision_version() -> str:
    from importlib import metadata

    try:
        return f" {metadata.version('torchvision')}"
    except metadata.PackageNotFoundError:
        return ""


def _made(timm: ModuleType, name: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model, and the options it was made with: of any size of picture where it can be."""
    try:
        try:
            sized = {**options, "dynamic_img_size": True}
            return timm.create_model(name, pretrained=True, **sized), sized
        except TypeError:  # a model that has no such option
            return timm.create_model(name, pretrained=True, **options), options
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsUnavailable(
            f"timm cannot load {name}: {str(error).strip().splitlines()[0][:200]}",
            "where there is a network, run the same command once; timm keeps weights in the hub's own cache",
        ) from error


def _unknown(timm: ModuleType, name: str) -> UnknownNetwork:
    close = difflib.get_close_matches(name, timm.list_models(pretrained=True), n=3, cutoff=0.5)
    names = " or ".join(PREFIX + found for found in close)
    hint = f"did you mean {names}?" if close else "timm.list_models() lists them"
    return UnknownNetwork(f"timm has no model {name}", hint)


def _with_weights(timm: ModuleType, name: str) -> list[str]:
    found = [PREFIX + model for model in timm.list_models(f"{name.partition('.')[0]}*", pretrained=True)]
    return found[:3] or ["timm.list_models(pretrained=True)"]


def _run(module: Any, inputs: Tensor, mask_BL: Tensor | None, wanted: Collection[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    with Heard(_blocks(module) if "layers" in wanted else ()) as heard:
        features = module.forward_features(inputs)
    tokens_BTD = _tokens(module, features)
    if tokens_BTD is not None and not _norm_is_behind(module):
        given["tokens"] = tokens_BTD
    layers = [found for found in heard.outputs if isinstance(found, Tensor)]
    if layers and tokens_BTD is not None and all(layer.shape == tokens_BTD.shape for layer in layers):
        given["layers"] = layers
    if getattr(module, "num_classes", 0) and {"logits", *wanted} & {"logits"}:
        given["logits"] = module.forward_head(features)
    return given


def _tokens(module: Any, features: Tensor) -> Tensor | None:
    """tokens_BTD of what forward_features gives: tokens, or a feature map in either order of axes."""
    if features.ndim == 4:
        last = str(getattr(module, "output_fmt", "NCHW")).endswith("NHWC")
        return features.flatten(1, 2) if last else whole.places(features)
    return features if features.ndim == 3 else None


def _norm_is_behind(module: Any) -> bool:
    """Whether the final norm stands behind the pooling, so that the tokens never got it: only logits are right then."""
    return not isinstance(getattr(module, "fc_norm", nn.Identity()), nn.Identity)


def _blocks(module: Any) -> list[nn.Module]:
    blocks = getattr(module, "blocks", None)
    return list(blocks) if isinstance(blocks, nn.Sequential | nn.ModuleList) else []
