"""Where a student's weights start: the cache's networks, a teacher, or the student of an earlier run."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emkum.errors import UsageError
from emkum.models.backbone import Backbone
from emkum.models.catalogue import load_network
from emkum.models.network import MODEL_JSON, Network, load_saved
from emkum.stage2_train.recipe import Recipe
from emkum.stage2_train.recipe_fields import IDS, FieldNames
from emkum.stage2_train.run_folder import RunFolder, load_run, tensors_digest
from emkum.stage2_train.student_network import Student

if TYPE_CHECKING:
    from emkum.shards.reader import Cache

FIXED_POSITIONS = ("data2vec2", "mae")  # families whose table of positions is a sine, and no parameter
TEACHER = re.compile(r"teacher/(?P<network>.+)/(?P<space>image|text|pair|audio)/[^/]+")


@dataclass(frozen=True)
class EarlierRun:
    """The best student of a run. sha256: of its tensors."""

    dir: Path
    student: Student
    sha256: str


@dataclass(frozen=True)
class Origins:
    """image, text: the frozen encoder, and the network of the tokenizer; None for a modality the student has not.

    image_from, text_from: where the blocks of each start. rest: the run whose other parts are taken. attention: the
    image network whose attention the text blocks have.
    """

    image: Network | None = None
    text: Network | None = None
    image_from: Network | EarlierRun | None = None
    text_from: Network | EarlierRun | None = None
    rest: EarlierRun | None = None
    attention: Network | None = None

    @property
    def image_shape(self) -> Network | None:
        """The network that the image blocks are like."""
        return self.image_from if isinstance(self.image_from, Network) else self.image

    @property
    def text_shape(self) -> Network | None:
        """The network that text embedding and blocks are like."""
        return self.text_from if isinstance(self.text_from, Network) else self.text


def find_origins(
    recipe: Recipe, names: FieldNames, image: Network | None, text: Network | None, cache: Cache | None
) -> Origins:
    """What the recipe's `init`, `init_image`, `init_text` and `text_attention` name.

    Raises UsageError for a name that is nothing of the kind, or for a network that does not fit; NotARun, MissingField.
    """
    wanted = recipe.student
    runs: dict[str, EarlierRun] = {}
    image_from = text_from = None
    if image is not None:
        image_from = _origin("image", wanted.origin_of_images, recipe, names, image, cache, runs)
    if text is not None:
        text_from = _origin("text", wanted.origin_of_texts, recipe, names, text, cache, runs)
    attention = None
    if text is not None and wanted.attention_of != "own":
        attention = _attention(recipe, image, text, cache)
    rest = _run(wanted.init, runs) if _is_run(wanted.init) else None
    return Origins(image, text, image_from, text_from, rest, attention)


def _origin(
    modality: str,
    wanted: str,
    recipe: Recipe,
    names: FieldNames,
    encoder: Network,
    cache: Cache | None,
    runs: dict[str, EarlierRun],
) -> Network | EarlierRun:
    if wanted == "encoder":
        return encoder
    if _is_run(wanted):
        return _run(wanted, runs)
    own = getattr(recipe.student, f"init_{modality}")
    key = "student.init" if own == "auto" else f"student.init_{modality}"
    if wanted == "teacher":
        name = _teacher(modality, names)
        if name is None and own == "auto":  # of pairs, `init = "teacher"` speaks of the modality the teacher has
            return encoder
        network = _kept(key, name, f"a teacher of kind {modality}", cache)
    elif cache is not None and wanted in cache.models:
        network = load_saved(cache.model_dir(wanted))
    elif Path(wanted).is_dir():
        saved = (Path(wanted) / MODEL_JSON).is_file()
        network = load_saved(wanted) if saved else load_network(str(Path(wanted).resolve()))
    else:
        close = difflib.get_close_matches(wanted, ["encoder", "teacher"], n=1)
        raise UsageError(
            f'{key} = "{wanted}" is neither "encoder" nor "teacher", nor a network the cache keeps, nor a folder',
            f"did you mean {close[0]}?" if close else "name the folder of a run or of a network",
        )
    _check_fits(key, network, modality, encoder)
    return network


def _check_fits(key: str, network: Network, modality: str, encoder: Network) -> None:
    """Raise UsageError where the student's blocks could not be those of `network`."""
    if network.modality != modality:
        raise UsageError(
            f"{key}: {network.name} is a network of kind {network.modality}, and the blocks are for {modality}",
            f"name a network of kind {modality}",
        )
    if modality == "text":
        if network.tokenizer != encoder.tokenizer:
            raise UsageError(
                f"{key}: {network.name} has another tokenizer than {encoder.name}, which made the ids",
                f"extract ids with --text-encoder {network.name}",
            )
        return
    if network.width != encoder.width:
        raise UsageError(
            f"{key}: {network.name} has {network.width} channels, the tokens of {encoder.name} have {encoder.width}",
            "extract tokens with that network as --encoder, or take blocks of one as wide",
        )
    stack = transformer(network).stack.spec
    placed = stack.relative_bias != "none" or stack.rotary_base
    if placed and network.num_prefix != encoder.num_prefix:
        raise UsageError(
            f"{key}: blocks of {network.name} count {network.num_prefix} tokens in front of the patches, "
            f"{encoder.name} has {encoder.num_prefix}",
            "extract tokens with that network as --encoder",
        )


def _teacher(modality: str, names: FieldNames) -> str | None:
    """The teacher for the modality, by the name of a field of targets."""
    for field in names.targets.values():
        found = TEACHER.fullmatch(field)
        if found is not None and found["space"] == modality:
            return found["network"]
    return None


def _kept(key: str, name: str | None, what: str, cache: Cache | None) -> Network:
    """The network of that name in the cache. Raises UsageError."""
    if name is None:
        raise UsageError(f"{key}: the recipe reads no target of {what}", f"leave {key} out")
    if cache is None or name not in cache.models:
        kept = ", ".join(sorted(cache.models)) if cache is not None and cache.models else "none"
        raise UsageError(
            f"{key}: the cache does not keep the network {name} (it keeps {kept})",
            f"extract with it as --encoder or --text-encoder, or name its folder: --set {key}=FOLDER",
        )
    return load_saved(cache.model_dir(name))


def _attention(recipe: Recipe, image: Network | None, text: Network, cache: Cache | None) -> Network:
    """The image network whose attention the text blocks have. Raises UsageError where none fits."""
    wanted = recipe.student.attention_of
    key = "student.text_attention" if recipe.student.text_attention != "auto" else "student.frozen_text"
    if wanted != "image":
        network = _kept(key, wanted, "pictures", cache)
    elif image is not None:
        network = image
    else:
        texts = {found["network"] for name in (cache.fields if cache else ()) if (found := IDS.fullmatch(name))}
        names = sorted(set(cache.models) - texts) if cache is not None else []
        if len(names) != 1:
            raise UsageError(
                f"{key}: the text blocks take their attention from an image network, and the cache keeps "
                f"{', '.join(names) or 'none'}",
                "choose one: --set student.text_attention=NAME"
                if names
                else "extract pictures with an image network of the text network's width as --encoder",
            )
        network = _kept(key, names[0], "pictures", cache)
    if network.modality != "image":
        raise UsageError(f"{key}: {network.name} is a network of kind {network.modality}", "name an image network")
    if network.width != text.width:
        raise UsageError(
            f"{key}: the image network {network.name} has {network.width} channels, the text network {text.name} "
            f"{text.width}, and the text blocks would have the attention of one and the rest of the other",
            "extract with two networks of one width",
        )
    if transformer(network).stack.spec.rotary_base:
        raise UsageError(
            f"{key}: the attention of {network.name} turns by the place in the picture (rotary), and a text has none",
            "choose an image network without rotary positions",
        )
    return network


def _is_run(wanted: str) -> bool:
    return wanted not in ("encoder", "teacher") and RunFolder(Path(wanted)).info.is_file()


def _run(wanted: str, runs: dict[str, EarlierRun]) -> EarlierRun:
    """The run of a folder, read once."""
    if wanted not in runs:
        run = load_run(wanted)
        runs[wanted] = EarlierRun(Path(wanted), run.student, tensors_digest(run.student.state_dict()))
    return runs[wanted]


def transformer(network: Network) -> Backbone:
    """The network's Transformer. Raises UsageError for one of pairs, or a convolutional one: they have none to give."""
    if network.modality == "pair":
        raise UsageError(
            f"{network.name} is a network of pairs, which reads a caption with its picture: no student can start from "
            "its blocks",
            "add ids of a text network to the cache with emkum extract and --text-encoder, for example beit3-text",
        )
    if not isinstance(network.backbone, Backbone):
        raise UsageError(
            f"{network.name} is a {network.family}, not a Transformer: no student can start from its blocks",
            "extract with a Transformer as --encoder; a convolutional network can be the teacher",
        )
    return network.backbone
