"""Who is measured: the student, and with baselines its start and the whole frozen network, behind the frozen networks.

Legend: M texts, B batch, T tokens, L text tokens, D width.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from emkum.errors import FingerprintMismatch, UsageError
from emkum.models.backbone import Backbone
from emkum.models.network import Network, load_saved
from emkum.models.passes import FrozenPass, Wanted, chosen_device
from emkum.models.tokenizer import text_ids
from emkum.shards.layout import CROPS
from emkum.shards.reader import Cache, Field
from emkum.stage2_train.evaluate.encode import Settings, features_of, out_of_texts, out_of_tokens
from emkum.stage2_train.evaluate.results import BEFORE, ENCODER, STUDENT, TEACHER
from emkum.stage2_train.loader import CachedSource
from emkum.stage2_train.pixels import pixel_input
from emkum.stage2_train.recipe_fields import IDS, ROLES, TOKENS, FieldNames, target_pattern
from emkum.stage2_train.replay import Replay
from emkum.stage2_train.run_folder import LoadedRun
from emkum.stage2_train.student import Student, build_student


@dataclass
class Contestants:
    """The student, and where asked for its start and the whole frozen network, on one device."""

    run: LoadedRun
    cache: Cache
    settings: Settings
    with_frozen: bool = False  # a network of one modality has no part in image-text retrieval
    students: dict[str, Student] = field(init=False)
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = chosen_device(self.settings.device)
        self.students = {STUDENT: self.run.student.to(self.device).eval()}
        self._image_network = self._kept(self.run.student.image_encoder)
        self._text_network = self._kept(self.run.student.text_encoder)
        if self.settings.baselines:
            before = student_before(self.run, self._image_network, self._text_network, self.cache)
            self.students[BEFORE] = before.to(self.device).eval()
        self._image_pass: FrozenPass | None = None
        self._text_pass: FrozenPass | None = None

    def _kept(self, name: str | None) -> Network | None:
        return load_saved(self.cache.model_dir(name)) if name else None

    # Pictures: crops or rows -> tokens at the cut -> students; the whole frozen network reads crops.

    @property
    def inputs(self) -> Field:
        """The field the student's picture side reads: tokens at its cut, or crops."""
        return self.trained_on(TOKENS, CROPS)

    @property
    def replayed(self) -> bool:
        """Whether a student of pixels was trained on crops cut out of the tars again, as the cache keeps none."""
        trained: Mapping[str, str] = self.run.info["cache"]["fields"]
        return self.run.student.spec.pixels is not None and not any(CROPS.fullmatch(name) for name in trained)

    @property
    def ids(self) -> Field:
        """The field of token ids the student's text side reads."""
        return self.trained_on(IDS)

    def trained_on(self, *patterns: re.Pattern[str] | None) -> Field:
        """The field of this kind that the run was trained on.

        Raises MissingField, and FingerprintMismatch where the cache's field of that name was computed otherwise.
        """
        trained: Mapping[str, str] = self.run.info["cache"]["fields"]
        name = next(name for pattern in patterns if pattern for name in trained if pattern.fullmatch(name))
        found = self.cache.field(name)
        if found.record["fingerprint_digest"] != trained[name]:
            raise FingerprintMismatch(
                f"{self.cache.path} field {name} has fingerprint {found.record['fingerprint_digest'][:12]}..., "
                f"{self.run.dir} was trained on one with {trained[name][:12]}...",
                f"evaluate with its own cache, {self.run.cache_path}, or end to end with --data",
            )
        return found

    @property
    def crop_size(self) -> int:
        """The side of the crops the cache was extracted with."""
        if self.run.student.spec.pixels is not None:
            return self.run.student.spec.pixels.size
        return int(self.inputs.fingerprint["size"])

    @property
    def compute(self) -> str:
        """The type of matrix products in the frozen networks: the extraction's; for crops, the training's."""
        return self.precision if self.inputs.kind == "crops" else str(self.inputs.fingerprint["compute"])

    @property
    def precision(self) -> str:
        """The type of matrix products in the student: the training's, as in its validation."""
        return str(self.run.info["precision"])

    def check_size(self, size: int) -> None:
        """Raises UsageError unless patches fill a picture of this size."""
        network = self.run.student.network
        if network is None:
            assert self._image_network is not None
            assert isinstance(self._image_network.backbone, Backbone)
            network = self._image_network.backbone
        if isinstance(network, Backbone):  # a ResNet takes any
            network.grid(size, size)

    def frozen_name(self, network: Network) -> str:
        """TEACHER where this network's outputs are the targets the run was trained on, else ENCODER."""
        pattern = target_pattern(self.run.recipe)
        trained: Mapping[str, str] = self.run.info["cache"]["fields"]
        for name, digest in trained.items():
            if pattern and pattern.fullmatch(name) and name in self.cache.fields:
                target = self.cache.field(name)
                if target.record["fingerprint_digest"] == digest:
                    return TEACHER if target.fingerprint.get("weights") == network.weights_sha256 else ENCODER
        return ENCODER

    def features_of_crops(self, crops_BHWC: Tensor) -> dict[str, Tensor]:
        """Features of uint8 crops, by name; the frozen network among them with baselines."""
        if self.run.student.spec.pixels is not None:
            return self.features_of_tokens(pixel_input(self.run.student.spec)(crops_BHWC.to(self.device)))
        tokens_BTD, whole_BD = self._through_frozen(crops_BHWC)
        features = self.features_of_tokens(tokens_BTD)
        if whole_BD is None:
            return features
        assert self._image_network is not None
        return features | {self.frozen_name(self._image_network): whole_BD}

    def _through_frozen(self, crops_BHWC: Tensor) -> tuple[Tensor, Tensor | None]:
        side, network = self.run.student.spec.image, self._image_network
        assert side is not None
        assert network is not None
        if self._image_pass is None:
            wanted = [Wanted(network.name, "tokens", side.cut)]
            if self.with_frozen:
                # The mean over patches, or CLS: pooled as the student is.
                wanted.append(Wanted(network.name, "cls" if side.pooling == "cls" else "patches"))
            self._image_pass = FrozenPass([network], wanted, self.compute, self.device)
        outputs = self._image_pass.pictures(crops_BHWC)
        if len(outputs) == 1:
            return outputs[0], None
        return outputs[0], outputs[1] if side.pooling == "cls" else outputs[1].mean(dim=1)

    def source(self, names: FieldNames, split: str = "") -> CachedSource:
        """Batches of these fields of the cache; crops go through the frozen network.

        A student of pixels reads the crops themselves, and where the cache keeps none, those of `split` from its tars.
        """
        if self.run.student.spec.pixels is not None:
            names = dataclasses.replace(names, crop_size=self.crop_size)
            replay = Replay(self.cache, (split,), self.crop_size) if names.replayed else None
            return CachedSource(self.cache, names, None, pixel_input(self.run.student.spec), threads=2, replay=replay)
        return CachedSource(self.cache, names, None, lambda crops_BHWC: self._through_frozen(crops_BHWC)[0])

    def features_of_tokens(self, tokens_BTD: Tensor) -> dict[str, Tensor]:
        """Each student's features of tokens at the cut, or of images_BCHW."""
        return features_of(out_of_tokens(self.students, tokens_BTD, self.precision, self.device))

    # Texts.

    @property
    def max_tokens(self) -> int:
        """The length texts are cut to: the cache's."""
        return self.ids.row_shape[0]

    def tokenise(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids [M, L] and lengths [M] of texts, as the extraction makes them."""
        assert self._text_network is not None
        assert self._text_network.tokenizer is not None
        return text_ids(self._text_network.tokenizer, texts, self.max_tokens)

    def features_of_texts(self, ids_BL: Tensor, mask_BL: Tensor) -> dict[str, Tensor]:
        """Features of token ids, by name; the frozen network among them with baselines."""
        features = features_of(out_of_texts(self.students, ids_BL, mask_BL, self.precision, self.device))
        if not self.with_frozen:
            return features
        side, network = self.run.student.spec.text, self._text_network
        assert side is not None
        assert network is not None
        if self._text_pass is None:
            wanted = [Wanted(network.name, "mean" if side.pooling == "mean" else "cls")]
            self._text_pass = FrozenPass([network], wanted, self.precision, self.device)
        (pooled_BD,) = self._text_pass.texts(ids_BL, mask_BL)
        return features | {self.frozen_name(network): pooled_BD}


def student_before(
    run: LoadedRun, image_network: Network | None, text_network: Network | None, cache: Cache | None = None
) -> Student:
    """The student as it was before the first step: its blocks from the networks, the rest from the run's seed.

    Raises UsageError where these networks do not give the run's student.
    """
    spec = run.student.spec
    targets = {name: name for name in run.info["cache"].get("fields", ()) if name.startswith("teacher/")}
    names = FieldNames(encoder=run.student.image_encoder, cut=spec.image.cut if spec.image else 0, targets=targets)
    if spec.pixels is not None:
        names = dataclasses.replace(names, targets=_by_role(targets), crop_size=spec.pixels.size)
    heads = {head.term: head.width for head in spec.heads} or None
    networks = (image_network, text_network)
    seed = int(run.info["seed"])
    student = build_student(run.recipe, names, *networks, spec.head_width, seed, cache=cache, heads=heads)
    if student.spec != spec:
        raise UsageError(
            f"the networks kept in the cache do not build the student of {run.dir}",
            "evaluate with the cache it was trained on, or without baselines",
        )
    return student


def _by_role(names: Mapping[str, str]) -> dict[str, str]:
    return {role: name for name in names for role, pattern in ROLES.items() if pattern.fullmatch(name)}
