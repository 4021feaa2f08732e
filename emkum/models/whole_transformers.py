"""Any single-tower vision or text model of transformers, from a checkpoint folder, run in one piece.

B batch, H height, W width, T tokens, D width.
"""

from __future__ import annotations

import contextlib
import inspect
import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emkum.errors import UnsupportedNetwork
from emkum.models import whole
from emkum.models.families.checkpoint import Checkpoint, read_json
from emkum.models.families.registry import FAMILIES
from emkum.models.preprocessing import Preprocessing, read_preprocessor
from emkum.models.whole import Described, Heard, WholeNetwork, WholeSpec

_NOT_IDENTITY = (  # of config.json: says nothing of what is computed, or is kept elsewhere
    "architectures",
    "transformers_version",
    "_name_or_path",
    "torch_dtype",
    "dtype",
    "id2label",
    "label2id",
    "_num_labels",
    "use_cache",
)
_CLASSIFIER = r"ForImageClassification(WithTeacher)?$"
_SUPERVISED = r"For(Image|Sequence|Token)Classification|ForQuestionAnswering|ForMultipleChoice|Segmentation|Detection"
_CLS_NAMES = r"(^|[._])(cls_token|class_token|class_embedding|cls_embedding)$"
_POOLER = r"(^|\.)pooler\."
_FIRST_LENGTH = 512  # the longest text of a network whose positions have no table


def is_readable(config: Mapping[str, Any]) -> bool:
    """Whether config.json is of a type that no family reads and transformers may."""
    model_type = config.get("model_type")
    return bool(model_type) and all(model_type not in family.model_types for family in FAMILIES)


def supervision(config: Mapping[str, Any]) -> str:
    """ "class_labels" for a checkpoint with the head of a supervised task, else "unknown"."""
    heads = [name for name in config.get("architectures") or () if re.search(_SUPERVISED, str(name))]
    return "class_labels" if heads else "unknown"


def read_whole(folder: Path, checkpoint: Checkpoint, classifier: bool) -> tuple[WholeNetwork, Preprocessing | None]:
    """The network in a checkpoint folder, in float32, and how it wants its pictures (None: it reads texts).

    With the classifier of an image classification checkpoint. `classifier`: raise UnsupportedNetwork if there is none.
    Strict: no tensor may be missing but a pooler's, none left over but those of a head that is not used.
    """
    raw, label = checkpoint.config, checkpoint.label
    with_logits = _has_logits(raw, classifier, label)
    config = _config(folder, raw, label)
    model = _loaded(folder, config, with_logits, label)
    modality = _modality(model, raw, label)
    described = Described(
        library="transformers",
        name=type(model).__name__,
        config={key: value for key, value in raw.items() if key not in _NOT_IDENTITY},
        module=model,
        run=_run_pictures if modality == "image" else _run_texts,
        has_cls=any(re.search(_CLS_NAMES, name) for name in model.state_dict()),
        patch=_patch(config),
        max_tokens=_max_tokens(model) if modality == "text" else 0,
        labels=_labels(config) if with_logits else (),
        version=_version(),
    )
    if modality == "text":
        return whole.of_texts(described, described.max_tokens), None
    preprocessing = read_preprocessing(folder, label)
    return whole.of_pictures(described, preprocessing), preprocessing


def outline(folder: Path, checkpoint: Checkpoint, classifier: bool) -> tuple[str, tuple[str, ...], Any]:
    """Of `read_whole`, without the weights: what it reads, its outputs as far as they are known, its preprocessing.

    Raises UnsupportedNetwork for what it refuses because of the type, the configuration or the preprocessor.
    """
    raw, label = checkpoint.config, checkpoint.label
    with_logits = _has_logits(raw, classifier, label)
    modality = _modality(_class_for(_config(folder, raw, label), with_logits, label), raw, label)
    outputs = ("cls", "logits") if with_logits else ("cls", "patches") if modality == "image" else ()
    return modality, outputs, read_preprocessing(folder, label) if modality == "image" else None


def _has_logits(raw: Mapping[str, Any], asked: bool, label: str) -> bool:
    found = any(re.search(_CLASSIFIER, str(name)) for name in raw.get("architectures") or ())
    if asked and not found:
        raise UnsupportedNetwork(
            f"{label} has no classifier: its config.json says {', '.join(raw.get('architectures') or ['nothing'])}",
            "leave #logits out, or use a checkpoint of ...ForImageClassification",
        )
    return found


def rebuilt(spec: WholeSpec) -> WholeNetwork:
    """A network of this shape without its weights. Raises UnsupportedNetwork for a class transformers has not."""
    import transformers

    made = getattr(transformers, spec.name, None)
    if not (isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)):
        raise UnsupportedNetwork(f"{spec.family}: transformers {transformers.__version__} has no such model")
    labels: dict[str, Any] = {"num_labels": spec.num_classes} if spec.num_classes else {}
    config = transformers.AutoConfig.for_model(**spec.config, **labels)
    with torch.device("cpu"), _quiet():  # buffers that are not saved are computed here, whatever device is around
        model = made(config, **_without_pooler(made))
    run = _run_pictures if spec.modality == "image" else _run_texts
    return WholeNetwork(spec, model, run, version=_version())


def read_preprocessing(folder: Path, label: str) -> Preprocessing:
    """What the folder says of its pictures. Raises UnsupportedNetwork if it says nothing: no guess is made."""
    found: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name)
            found = found.get("image_processor", found)
            break
    normalises = found.get("do_normalize", True) is not False
    if not found or (normalises and not ("image_mean" in found and "image_std" in found)):
        raise UnsupportedNetwork(
            f"{label} does not say how its pictures are normalised: "
            + ("its preprocessor_config.json has no image_mean" if found else "there is no preprocessor_config.json"),
            "put preprocessor_config.json with image_mean, image_std and size beside config.json",
        )
    read = read_preprocessor(found, Preprocessing())
    processor = str(found.get("image_processor_type") or found.get("feature_extractor_type") or "")
    if processor.startswith("EfficientNet"):
        if found.get("rescale_offset"):
            raise UnsupportedNetwork(f"{label}: a preprocessor with rescale_offset", "write a function of your own")
        if found.get("include_top", True):  # it divides by the deviation a second time
            red, green, blue = (std * std for std in read.std)
            return Preprocessing(read.image_size, read.mean, (red, green, blue), read.crop_fraction, read.interpolation)
    return read


# --- loading -------------------------------------------------------------------------------------------------


def _config(folder: Path, raw: Mapping[str, Any], label: str) -> Any:
    import transformers

    if "auto_map" in raw and raw.get("model_type") not in transformers.CONFIG_MAPPING:
        raise UnsupportedNetwork(
            f"{label} needs Python code that lies beside its weights ({raw['auto_map']}); emkum runs no code of data",
            "run it in a function of your own: --teacher my_module:function",
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        known = ", ".join(sorted({t for family in FAMILIES for t in family.model_types}))
        raise UnsupportedNetwork(
            f"{label} is of type {raw.get('model_type')!r}, which neither emkum nor {_version()} reads",
            f"update transformers, or use another; types with a family of their own: {known}",
        ) from error
    if config.is_encoder_decoder:
        raise UnsupportedNetwork(f"{label} is an encoder with a decoder ({raw.get('model_type')})", _OWN)
    towers = [name for name in ("vision_config", "text_config", "audio_config") if getattr(config, name, None)]
    if towers:
        raise UnsupportedNetwork(f"{label} has several towers or one inside another ({', '.join(towers)})", _OWN)
    return config


_OWN = "run the part you want in a function of your own: --teacher my_module:function"


def _class_for(config: Any, with_logits: bool, label: str) -> Any:
    """transformers' class of the trunk, or of the trunk with its classifier. Raises UnsupportedNetwork."""
    import transformers

    classes: Any = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING if with_logits else transformers.MODEL_MAPPING
    made: Any = classes.get(type(config), None)
    made = made[0] if isinstance(made, list | tuple) else made
    if made is None:
        raise UnsupportedNetwork(f"{label}: {_version()} has no model for a config of {config.model_type!r}", _OWN)
    return made


def _loaded(folder: Path, config: Any, with_logits: bool, label: str) -> Any:
    made = _class_for(config, with_logits, label)
    try:
        with _quiet():
            model, told = made.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                weights_only=True,  # of pytorch_model.bin
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told, and refused below
                **_without_pooler(made),
            )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise UnsupportedNetwork(
            f"{label} cannot be read by {_version()} as {made.__name__}: {str(error).strip().splitlines()[0][:200]}",
            "check that the folder is whole",
        ) from error
    parts = {name for name, _ in model.named_children()} | {name for name, _ in model.named_parameters(recurse=False)}
    missing = sorted(name for name in told["missing_keys"] if not re.search(_POOLER, name))
    left_over = sorted(
        name
        for name in told["unexpected_keys"]
        if not re.search(_POOLER, name) and (with_logits or name.partition(".")[0] in parts)
    )
    mismatched = sorted(f"{name} {tuple(found)} for {tuple(ours)}" for name, found, ours in told["mismatched_keys"])
    problems = {"lacks": missing, "has unknown tensors": left_over, "has of another shape": mismatched}
    if any(problems.values()):
        said = "; it ".join(f"{what} {', '.join(names[:6])}" for what, names in problems.items() if names)
        raise UnsupportedNetwork(f"{label} is not a whole {made.__name__}: it {said}", "use a whole checkpoint")
    return model


def _without_pooler(made: Any) -> dict[str, bool]:
    """A pooler that pre-training did not train is added unless one says so."""
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(made.__init__).parameters else {}


def _modality(model: Any, raw: Mapping[str, Any], label: str) -> str:
    found = {"pixel_values": "image", "input_ids": "text"}.get(model.main_input_name)
    if found is None:
        raise UnsupportedNetwork(
            f"{label} reads {model.main_input_name} ({raw.get('model_type')}), neither pictures nor texts", _OWN
        )
    return found


def _patch(config: Any) -> int:
    patch = getattr(config, "patch_size", 0)
    if isinstance(patch, list | tuple):
        patch = patch[0] if len(set(patch)) == 1 else 0
    return patch if isinstance(patch, int) else 0


def _max_tokens(model: Any) -> int:
    """The longest text. Positions of RoBERTa's kind start after the pad id, and their table is longer by so much."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return _FIRST_LENGTH
    for name, module in model.named_modules():
        if "position" in name and isinstance(module, nn.Embedding) and module.num_embeddings == longest:
            return longest - (module.padding_idx + 1 if module.padding_idx is not None else 0)
    return longest


def _labels(config: Any) -> tuple[str, ...]:
    """Names of the classes, () where nobody gave them any."""
    names = tuple(str(config.id2label[index]) for index in sorted(config.id2label))
    return () if all(name == f"LABEL_{index}" for index, name in enumerate(names)) else names


def _version() -> str:
    import transformers

    return f"transformers {transformers.__version__}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' bars and remarks are not ours to show: what matters of them is checked."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# --- running -------------------------------------------------------------------------------------------------


def _run_pictures(module: Any, inputs: Tensor, mask_BL: Tensor | None, wanted: Collection[str]) -> dict[str, Any]:
    more: dict[str, Any] = {}
    at = getattr(module.config, "image_size", None)
    own = tuple(at) if isinstance(at, list | tuple) else (at, at)
    if own != tuple(inputs.shape[2:]) and "interpolate_pos_encoding" in inspect.signature(module.forward).parameters:
        more["interpolate_pos_encoding"] = True
    blocks = _blocks(module) if "layers" in wanted else ()
    with Heard([module.base_model]) as heard, Heard(blocks) as heard_blocks:
        output = module(pixel_values=inputs, **more)
    last = _tokens(heard.outputs[-1])
    given: dict[str, Any] = {"tokens": whole.places(last) if last.ndim == 4 else last}
    if (logits := getattr(output, "logits", None)) is not None:
        given["logits"] = logits
    layers = [_tokens(found) for found in heard_blocks.outputs]
    if layers and all(layer.shape == given["tokens"].shape for layer in layers):
        given["layers"] = layers
    return given


def _run_texts(module: Any, inputs: Tensor, mask_BL: Tensor | None, wanted: Collection[str]) -> dict[str, Any]:
    assert mask_BL is not None
    with Heard(_blocks(module) if "layers" in wanted else ()) as heard:
        output = module(input_ids=inputs, attention_mask=mask_BL.long())
    given: dict[str, Any] = {"tokens": _tokens(output)}
    layers = [_tokens(found) for found in heard.outputs]
    if layers and all(layer.shape == given["tokens"].shape for layer in layers):
        given["layers"] = layers
    return given


def _tokens(output: Any) -> Tensor:
    """The tensor that a model or a block hands on; never a pooler's."""
    if isinstance(output, Tensor):
        return output
    found: Tensor = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    return found


def _blocks(module: Any) -> list[nn.Module]:
    """The blocks, where there is one list of as many modules as the configuration counts layers; else none.

    Their own outputs: of `output_hidden_states` transformers 5 replaces the last one by that of the final norm.
    """
    depth = getattr(module.config, "num_hidden_layers", None)
    lists = [m for m in module.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return list(lists[0]) if len(lists) == 1 else []
