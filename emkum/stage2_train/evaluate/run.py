"""Evaluates a run: from its cache, or end to end from tars, pictures and texts through the frozen networks it keeps.

With baselines the same inputs also go through the student as it was before training, and through the teacher.

Legend: N pictures, M captions or texts, B batch, T tokens, L text tokens, D width.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from emkum.errors import (
    BadPicture,
    FingerprintMismatch,
    IncompleteCache,
    MissingCaptions,
    NoData,
    TooManyBadSamples,
    UsageError,
)
from emkum.models import targets
from emkum.models.backbone import Backbone
from emkum.models.network import Network, load_saved
from emkum.models.passes import FrozenPass, Wanted, chosen_device
from emkum.models.tokenizer import text_ids
from emkum.shards.durable import write_file
from emkum.shards.reader import Cache, Field
from emkum.shards.tars import SourceSample, find_tars, read_member, scan_tars
from emkum.shards.views import ViewPolicy, box_for, decode_view
from emkum.stage2_train.evaluate.pictures import LabelledPictures, Pictures, label_retrieval
from emkum.stage2_train.evaluate.retrieval import image_text_retrieval, retrieval_chance
from emkum.stage2_train.evaluate.texts import TextPairs, text_pair_retrieval
from emkum.stage2_train.objectives.layers_mse import layers_mse
from emkum.stage2_train.recipe import CROPS, IDS, TOKENS, FieldNames, target_pattern
from emkum.stage2_train.run_folder import LoadedRun
from emkum.stage2_train.student import Student, StudentOut, build_student, masked_mean

Results = dict[str, Any]

CENTRE = ViewPolicy(crop=(1.0, 1.0))
STUDENT, BEFORE, TEACHER = "student", "student before training", "teacher"
RESULTS_FILE = "evaluation.json"


@dataclass(frozen=True)
class Settings:
    """How to evaluate; none of it changes what is measured, but `baselines`, which adds to it.

    max_bad: the share of pictures that may fail to decode. threads None: one for each core, 2 to 16.
    """

    device: str = "auto"
    batch_size: int = 256
    threads: int | None = None
    max_bad: float = 0.001
    baselines: bool = False
    progress: bool | None = None  # None: a bar where standard error is a terminal

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.threads is not None and self.threads < 1) or not 0 <= self.max_bad <= 1:
            raise UsageError(
                f"batch size {self.batch_size}, {self.threads} threads, max-bad {self.max_bad}",
                "give a batch and threads of 1 or more, and a fraction between 0 and 1",
            )


@dataclass(frozen=True)
class PairFeatures:
    """Features of one split, or of some tars, by the name of who made them; in the order of the rows.

    image_of_text: the index of each caption's picture in the feature rows, -1 for none, int64 [M].
    image_rows, text_rows: rows of the cache, None from tars.
    """

    images: Mapping[str, np.ndarray]
    texts: Mapping[str, np.ndarray]
    image_of_text: np.ndarray
    image_rows: np.ndarray | None = None
    text_rows: np.ndarray | None = None
    quarantined: tuple[str, ...] = ()


# --- what is measured ------------------------------------------------------------------------------------


def evaluate_cache(
    run: LoadedRun, cache: Cache | None = None, split: str = "val", settings: Settings | None = None
) -> Results:
    """The student on a split of its cache (`cache`, or the one it was trained on).

    Pairs: {"retrieval": {"image_to_text": {"R@1": percent, ...}, "text_to_image": {...}, "mean", "chance", ...}}.
    Picture or text runs: {"distillation": {"layers_mse": ...}} against the teacher's targets of the split.
    Raises UsageError for a split that is not there, IncompleteCache, MissingField, MissingCaptions.
    """
    settings, cache = settings or Settings(), _cache_of(run, cache)
    if run.recipe.kind != "pairs":
        return {"distillation": _distillation(run, cache, split, settings)}
    return {"retrieval": retrieval_of(cache_features(run, cache, split, settings), f"split {split}")}


def evaluate_tars(
    run: LoadedRun, tars: Sequence[str], cache: Cache | None = None, settings: Settings | None = None
) -> Results:
    """Image-text retrieval end to end on tars, patterns or folders: the whole picture's centre square, its captions.

    The same shape as `evaluate_cache`. Pictures that do not decode are left out, counted and named; their captions
    stay as distractors. Raises MissingCaptions, NoData, TooManyBadSamples, UsageError for a run without captions.
    """
    settings, cache = settings or Settings(), _cache_of(run, cache)
    _require_kind(run, "pairs", "image-text retrieval")
    found = scan_tars(find_tars(tars))
    samples = [(tar.path, sample) for tar in found for sample in tar.samples]
    with_picture = [(path, sample) for path, sample in samples if sample.picture is not None]
    if not with_picture:
        raise NoData(f"no pictures in {', '.join(tars)}", "give tars with jpg, jpeg, png or webp members")
    captions = [(text, (path, sample.key)) for path, sample in samples for text in sample.captions]
    if not captions:
        raise MissingCaptions(
            f"no captions in {', '.join(tars)}", "give tars with txt members, or json members with `captions`"
        )
    contestants = Contestants(run, cache, settings)
    pictures = _tar_pictures(with_picture)
    images, good, bad = _encode_pictures(contestants, pictures, contestants.crop_size, settings)
    place_of = {(with_picture[i][0], with_picture[i][1].key): place for place, i in enumerate(good.tolist())}
    texts = _encode_texts(contestants, [text for text, _ in captions], settings)
    owners = np.array([place_of.get(owner, -1) for _, owner in captions], dtype=np.int64)
    pairs = PairFeatures(images, texts, owners, quarantined=bad)
    return {"retrieval": retrieval_of(pairs, f"data {', '.join(tars)}")}


def evaluate_pictures(
    run: LoadedRun,
    pictures: LabelledPictures,
    size: int | None = None,
    cache: Cache | None = None,
    settings: Settings | None = None,
) -> Results:
    """CIFAR-type label retrieval of labelled pictures (`pictures.read_labelled`), end to end.

    size: the side in pixels they are resized to, a multiple of the encoder's patch; None: the cache's crop size.
    Returns {"pictures": {name: {"test_to_train": {"top-1": percent, ...}, "train_to_test": {...}, "mean", "chance",
    ...}}}. Raises UsageError for a run without pictures or a size that patches do not fill, TooManyBadSamples.
    """
    settings, cache = settings or Settings(), _cache_of(run, cache)
    if run.student.spec.image is None:
        raise UsageError(f"{run.dir} trained on {run.recipe.kind} only", "give --texts, or a run that reads pictures")
    contestants = Contestants(run, cache, settings, with_teacher=settings.baselines)
    size = contestants.crop_size if size is None else size
    contestants.check_size(size)
    bank, bank_good, bank_bad = _encode_pictures(contestants, pictures.bank, size, settings)
    queries, query_good, query_bad = _encode_pictures(contestants, pictures.queries, size, settings)
    bank_labels, query_labels = pictures.bank.labels[bank_good], pictures.queries.labels[query_good]
    by_name = {name: label_retrieval(bank[name], bank_labels, queries[name], query_labels) for name in bank}
    result = _with_baselines(by_name) | {
        "bank": len(bank_labels),
        "queries": len(query_labels),
        "classes": pictures.num_classes,
        "size": size,
        "quarantined": [*bank_bad, *query_bad],
    }
    return {"pictures": {pictures.name: result}}


def evaluate_texts(
    run: LoadedRun, pairs: TextPairs, cache: Cache | None = None, settings: Settings | None = None
) -> Results:
    """Text-pair retrieval of a QQP or MRPC file (`texts.read_text_pairs`).

    Returns {"texts": {name: {"1_to_2": {"R@1": percent, ...}, "2_to_1": {...}, "mean", "chance", "same_text", ...}}}.
    Raises UsageError for a run without a text side.
    """
    settings, cache = settings or Settings(), _cache_of(run, cache)
    if run.student.spec.text is None:
        raise UsageError(f"{run.dir} trained on {run.recipe.kind} only", "give --images, or a run that reads texts")
    contestants = Contestants(run, cache, settings, with_teacher=settings.baselines)
    features = _encode_texts(contestants, [*pairs.a, *pairs.b], settings)
    half = len(pairs)
    by_name = {n: text_pair_retrieval(f[:half], f[half:], pairs.a, pairs.b) for n, f in features.items()}
    result = _with_baselines(by_name) | {"pairs": half, "broken_lines": pairs.num_broken}
    return {"texts": {pairs.name: result}}


def cache_features(run: LoadedRun, cache: Cache, split: str, settings: Settings | None = None) -> PairFeatures:
    """Features of every picture and caption of a split, read from the cache. Quarantined pictures are left out."""
    settings = settings or Settings()
    _require_kind(run, "pairs", "image-text retrieval")
    contestants = Contestants(run, cache, settings)
    inputs, ids = contestants.inputs, contestants.ids
    captions = cache.captions(split)
    for needed in (inputs, ids):
        _refuse_missing(cache, needed, split)
    image_rows = inputs.rows(split)
    text_rows = np.intersect1d(captions["text_row"].to_numpy(), ids.rows(split))
    if not len(text_rows):
        raise MissingCaptions(
            f"split {split!r} of {cache.path} has no captions", "extract tars with captions as this split"
        )
    owner = captions["image_row"].fill_null(-1).to_numpy()[np.searchsorted(captions["text_row"].to_numpy(), text_rows)]
    place = np.searchsorted(image_rows, owner)
    there = (place < len(image_rows)) & (owner >= 0)
    there[there] = image_rows[place[there]] == owner[there]
    quarantined = tuple(
        f"{q.tar}/{q.key}: {q.reason}"
        for (block, view), receipt in inputs.receipts.items()
        if view == 0 and block in _blocks(cache, split)
        for q in receipt.quarantined
    )
    return PairFeatures(
        _encode_rows(contestants, image_rows, settings),
        _encode_ids(contestants, ids.read(text_rows), ids.lengths(text_rows), settings),
        np.where(there, place, -1),
        image_rows,
        text_rows,
        quarantined,
    )


def retrieval_of(features: PairFeatures, on: str) -> Results:
    """The section "retrieval" of the results; `on` says what was measured."""
    owners, num_images = features.image_of_text, len(features.images[STUDENT])
    by_name = {
        name: image_text_retrieval(images, features.texts[name], owners) for name, images in features.images.items()
    }
    return _with_baselines(by_name) | {
        "chance": retrieval_chance(owners, num_images),
        "on": on,
        "pictures": num_images,
        "captions": len(owners),
        "distractors": int((owners < 0).sum()),
        "quarantined": list(features.quarantined),
    }


def _with_baselines(by_name: Mapping[str, Results]) -> Results:
    """The student's numbers, and those of the others under "baselines"."""
    others = {}
    for name, numbers in by_name.items():
        if name != STUDENT:
            others[name] = {key: value for key, value in numbers.items() if key != "chance"}
    return dict(by_name[STUDENT]) | ({"baselines": others} if others else {})


def _distillation(run: LoadedRun, cache: Cache, split: str, settings: Settings) -> Results:
    """layers-mse on a split: the student's mean normalised layer against the teacher's, every token."""
    contestants = Contestants(run, cache, settings)
    target = contestants.trained_on(target_pattern(run.recipe))
    texts = run.recipe.kind == "texts"
    inputs = contestants.ids if texts else contestants.inputs
    for needed in (inputs, target):
        _refuse_missing(cache, needed, split)
    rows = np.intersect1d(inputs.rows(split), target.rows(split))
    if not len(rows):
        raise NoData(f"split {split!r} of {cache.path} has no row of {inputs.name} and {target.name}", "extract it")
    sums: dict[str, float] = dict.fromkeys(contestants.students, 0.0)
    tokens = 0
    for here in _batches(rows, settings, "distillation"):
        values = torch.from_numpy(target.values(here)).to(contestants.device)
        mask = None
        if texts:
            lengths = inputs.lengths(here)
            ids, mask = _ids_mask(inputs.read(here), lengths, contestants.device)
            values, count = values[:, : ids.shape[1]], int(lengths.sum())
            outs = contestants.out_of_texts(ids, mask)
        else:
            outs, count = contestants.out_of_tokens(contestants.tokens_of_rows(here)), values.shape[0] * values.shape[1]
        tokens += count
        for name, out in outs.items():
            mean_layer = targets.layers(out.hidden, mask, final_layer_norm=not texts)
            sums[name] += float(layers_mse(mean_layer, values, mask)) * count
    by_name = {name: {"layers_mse": total / tokens} for name, total in sums.items()}
    return _with_baselines(by_name) | {"on": f"split {split}", "rows": len(rows), "targets": target.name}


# --- who is measured -------------------------------------------------------------------------------------


@dataclass
class Contestants:
    """The student, its start and the teacher where asked for, on one device, behind the cache's frozen networks."""

    run: LoadedRun
    cache: Cache
    settings: Settings
    with_teacher: bool = False  # a teacher of one modality has no part in image-text retrieval
    students: dict[str, Student] = field(init=False)
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = chosen_device(self.settings.device)
        self.students = {STUDENT: self.run.student.to(self.device).eval()}
        self._image_network = self._kept(self.run.student.image_encoder)
        self._text_network = self._kept(self.run.student.text_encoder)
        if self.settings.baselines:
            before = student_before(self.run, self._image_network, self._text_network)
            self.students[BEFORE] = before.to(self.device).eval()
        self._image_pass: FrozenPass | None = None
        self._text_pass: FrozenPass | None = None

    def _kept(self, name: str | None) -> Network | None:
        return load_saved(self.cache.model_dir(name)) if name else None

    def _precisely(self) -> contextlib.AbstractContextManager[Any]:
        """The student's matrix products in the training's precision."""
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.precision))

    # Pictures: crops or rows -> tokens at the cut -> students; the teacher reads crops.

    @property
    def inputs(self) -> Field:
        """The field the student's picture side reads: tokens at its cut, or crops."""
        return self.trained_on(TOKENS, CROPS)

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
        return int(self.inputs.fingerprint["size"])

    @property
    def compute(self) -> str:
        """The type of matrix products in the frozen networks: the extraction's; for crops, the training's."""
        return str(self.inputs.fingerprint.get("compute") or self.precision)

    @property
    def precision(self) -> str:
        """The type of matrix products in the student: the training's, as in its validation."""
        return str(self.run.info["precision"])

    def check_size(self, size: int) -> None:
        """Raises UsageError unless patches fill a picture of this size."""
        assert self._image_network is not None
        assert isinstance(self._image_network.backbone, Backbone)
        self._image_network.backbone.grid(size, size)

    def features_of_crops(self, crops_BHWC: Tensor) -> dict[str, Tensor]:
        """Features of uint8 crops, by name; the teacher among them with baselines."""
        tokens_BTD, teacher_BD = self._through_frozen(crops_BHWC)
        features = {name: out.features_BD for name, out in self.out_of_tokens(tokens_BTD).items()}
        return features if teacher_BD is None else features | {TEACHER: teacher_BD}

    def _through_frozen(self, crops_BHWC: Tensor) -> tuple[Tensor, Tensor | None]:
        side, network = self.run.student.spec.image, self._image_network
        assert side is not None
        assert network is not None
        if self._image_pass is None:
            wanted = [Wanted(network.name, "tokens", side.cut)]
            if self.with_teacher:
                # The mean over patches, or CLS: pooled as the student is.
                wanted.append(Wanted(network.name, "cls" if side.pooling == "cls" else "patches"))
            self._image_pass = FrozenPass([network], wanted, self.compute, self.device)
        outputs = self._image_pass.pictures(crops_BHWC)
        if len(outputs) == 1:
            return outputs[0], None
        return outputs[0], outputs[1] if side.pooling == "cls" else outputs[1].mean(dim=1)

    def tokens_of_rows(self, rows: np.ndarray) -> Tensor:
        """Tokens at the cut of rows of the cache, float32 [B, T, D]; crops go through the frozen network."""
        inputs = self.inputs
        if inputs.kind == "crops":
            return self._through_frozen(torch.from_numpy(inputs.read(rows)))[0]
        return torch.from_numpy(inputs.values(rows)).to(self.device)

    @torch.inference_mode()
    def out_of_tokens(self, tokens_BTD: Tensor) -> dict[str, StudentOut]:
        """What each student makes of tokens at the cut."""
        with self._precisely():
            return {name: student.encode_images(tokens_BTD) for name, student in self.students.items()}

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

    @torch.inference_mode()
    def out_of_texts(self, ids_BL: Tensor, mask_BL: Tensor) -> dict[str, StudentOut]:
        """What each student makes of token ids."""
        with self._precisely():
            return {name: student.encode_texts(ids_BL, mask_BL) for name, student in self.students.items()}

    def features_of_texts(self, ids_BL: Tensor, mask_BL: Tensor) -> dict[str, Tensor]:
        """Features of token ids, by name; the teacher among them with baselines."""
        features = {name: out.features_BD for name, out in self.out_of_texts(ids_BL, mask_BL).items()}
        if not self.with_teacher:
            return features
        side, network = self.run.student.spec.text, self._text_network
        assert side is not None
        assert network is not None
        if self._text_pass is None:
            wanted = [Wanted(network.name, "cls"), Wanted(network.name, "patches")]
            self._text_pass = FrozenPass([network], wanted, self.precision, self.device)
        cls_BD, words_BLD = self._text_pass.texts(ids_BL, mask_BL)
        if side.pooling == "mean":
            # Over all real tokens, CLS among them.
            tokens_BLD = torch.cat([cls_BD[:, None], words_BLD[:, 1:]], dim=1)
            return features | {TEACHER: masked_mean(tokens_BLD, mask_BL)}
        return features | {TEACHER: cls_BD}


def student_before(run: LoadedRun, image_network: Network | None, text_network: Network | None) -> Student:
    """The student as it was before the first step: its blocks from the networks, the rest from the run's seed.

    Raises UsageError where these networks do not give the run's student.
    """
    spec = run.student.spec
    names = FieldNames(encoder=run.student.image_encoder, cut=spec.image.cut if spec.image else 0)
    student = build_student(run.recipe, names, image_network, text_network, spec.head_width, int(run.info["seed"]))
    if student.spec != spec:
        raise UsageError(
            f"the networks kept in the cache do not build the student of {run.dir}",
            "evaluate with the cache it was trained on, or without baselines",
        )
    return student


# --- encoding --------------------------------------------------------------------------------------------


def _encode_pictures(
    contestants: Contestants, pictures: Pictures, size: int, settings: Settings
) -> tuple[dict[str, np.ndarray], np.ndarray, tuple[str, ...]]:
    """Features by name [n, D], the indices of the pictures they are of, and what was wrong with the others."""
    parts: dict[str, list[np.ndarray]] = {}
    good: list[int] = []
    bad: list[str] = []
    batch: list[np.ndarray] = []

    def flush() -> None:
        features = contestants.features_of_crops(torch.from_numpy(np.stack(batch)))
        for name, values in features.items():
            parts.setdefault(name, []).append(values.float().cpu().numpy())
        batch.clear()

    decoded = _decode_ahead(pictures, size, settings)
    for index, crop in tqdm(decoded, "pictures", len(pictures), unit="picture", disable=_quiet(settings), leave=False):
        if isinstance(crop, BadPicture):
            name = pictures.names[index] if pictures.names is not None else f"picture {index}"
            bad.append(f"{name}: {crop.what}")
            if len(bad) > settings.max_bad * len(pictures):
                raise TooManyBadSamples(
                    f"{len(bad)} of {len(pictures)} pictures cannot be used, {settings.max_bad:g} of them may; "
                    f"the first: {'; '.join(bad[:3])}",
                    f"look at these files, or allow more: --max-bad {min(1.0, 2 * len(bad) / len(pictures)):.2g}",
                )
            continue
        good.append(index)
        batch.append(crop)
        if len(batch) == settings.batch_size:
            flush()
    if batch:
        flush()
    if not good:
        raise NoData("no picture could be decoded", "; ".join(bad[:3]) or "there is none")
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}, np.array(good), tuple(bad)


def _decode_ahead(pictures: Pictures, size: int, settings: Settings) -> Iterator[tuple[int, np.ndarray | BadPicture]]:
    """Crops in order, decoded by threads a few batches ahead; a picture that cannot be decoded gives its error."""

    def crop(index: int) -> np.ndarray | BadPicture:
        try:
            return pictures.crop(index, size)
        except BadPicture as error:
            return error

    threads = settings.threads or min(16, max(2, os.cpu_count() or 2))
    window = 2 * settings.batch_size + threads
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        ahead: deque[Future[np.ndarray | BadPicture]] = deque()
        try:
            for index in range(len(pictures)):
                while len(ahead) < window and index + len(ahead) < len(pictures):
                    ahead.append(pool.submit(crop, index + len(ahead)))
                yield index, ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _encode_rows(contestants: Contestants, rows: np.ndarray, settings: Settings) -> dict[str, np.ndarray]:
    """Picture features of rows of the cache, by name, read one batch ahead."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in contestants.students}
    for here in _batches(rows, settings, "pictures"):
        for name, out in contestants.out_of_tokens(contestants.tokens_of_rows(here)).items():
            parts[name].append(out.features_BD.float().cpu().numpy())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _encode_texts(contestants: Contestants, texts: Sequence[str], settings: Settings) -> dict[str, np.ndarray]:
    ids, lengths = contestants.tokenise(texts)
    return _encode_ids(contestants, ids, lengths, settings)


def _encode_ids(
    contestants: Contestants, ids_ML: np.ndarray, lengths_M: np.ndarray, settings: Settings
) -> dict[str, np.ndarray]:
    """Text features by name, in the order given.

    Each different text is encoded once, so that equal texts have equal features and tie exactly; in the order of
    their lengths, so that little is padded.
    """
    real_ML = np.arange(ids_ML.shape[1]) < lengths_M[:, None]
    ids_ML = np.where(real_ML, ids_ML, -1)
    unique_UL, inverse_M = np.unique(ids_ML, axis=0, return_inverse=True)
    lengths_U = (unique_UL >= 0).sum(axis=1)
    order = np.argsort(lengths_U, kind="stable")
    features: dict[str, np.ndarray] = {}
    for here in _batches(order, settings, "texts"):
        ids, mask = _ids_mask(unique_UL[here], lengths_U[here], contestants.device)
        for name, values_BD in contestants.features_of_texts(ids, mask).items():
            whole = features.setdefault(name, np.empty((len(order), values_BD.shape[1]), np.float32))
            whole[here] = values_BD.float().cpu().numpy()
    return {name: values[inverse_M.reshape(-1)] for name, values in features.items()}


def _ids_mask(ids_BL: np.ndarray, lengths_B: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 ids and bool mask, trimmed to the longest text of the batch; 0 past each text's end."""
    longest = max(1, int(lengths_B.max()))
    mask_BL = np.arange(longest) < lengths_B[:, None]
    ids_BL = np.where(mask_BL, ids_BL[:, :longest], 0).astype(np.int64)
    return torch.from_numpy(ids_BL).to(device), torch.from_numpy(mask_BL).to(device)


def _batches(rows: np.ndarray, settings: Settings, what: str) -> Iterator[np.ndarray]:
    starts = range(0, len(rows), settings.batch_size)
    for start in tqdm(starts, what, unit="batch", disable=_quiet(settings), leave=False):
        yield rows[start : start + settings.batch_size]


def _quiet(settings: Settings) -> bool | None:
    return None if settings.progress is None else not settings.progress


# --- the cache, tars -------------------------------------------------------------------------------------


def _cache_of(run: LoadedRun, cache: Cache | None) -> Cache:
    return cache if cache is not None else Cache.open(run.cache_path)


def _require_kind(run: LoadedRun, kind: str, what: str) -> None:
    if run.recipe.kind != kind:
        raise UsageError(
            f"{what} needs pictures and captions; {run.dir} trained on {run.recipe.kind}",
            "evaluate it on its cache, or with --images or --texts",
        )


def _refuse_missing(cache: Cache, needed: Field, split: str) -> None:
    missing = needed.missing(split, 1)
    if missing:
        raise IncompleteCache(
            f"{needed.name} lacks {len(missing)} blocks of split {split!r} of {cache.path}",
            "run the extract command of this split again to finish them",
        )


def _blocks(cache: Cache, split: str) -> set[int]:
    spans = [s.image.blocks(cache.rows_per_block) for s in cache.segments if s.split == split]
    return {block for span in spans for block in span}


def _tar_pictures(samples: Sequence[tuple[str, SourceSample]]) -> Pictures:
    def crop(index: int, size: int) -> np.ndarray:
        path, sample = samples[index]
        assert sample.picture is not None
        data = read_member(path, sample.picture.offset, sample.picture.size)
        return decode_view(data, size, lambda width, height: box_for(CENTRE, "", sample.key, 0, width, height))[0]

    names = [f"{os.path.basename(path)}/{sample.key}" for path, sample in samples]
    return Pictures(np.full(len(samples), -1), crop, names)


# --- results ---------------------------------------------------------------------------------------------


def merge_results(*results: Mapping[str, Any]) -> Results:
    """One object of several: later sections replace earlier ones; data sets of one section stand side by side."""
    merged: Results = {}
    for result in results:
        for section, value in result.items():
            if section in ("pictures", "texts"):
                merged[section] = {**merged.get(section, {}), **value}
            else:
                merged[section] = value
    return merged


def write_results(run_dir: str | os.PathLike[str], results: Mapping[str, Any]) -> Path:
    """Adds the results to the run folder's evaluation.json, which is replaced whole. Raises StorageFailure.

    A file that is no JSON object is replaced: it holds nothing that cannot be measured again.
    """
    path = Path(run_dir) / RESULTS_FILE
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    merged = merge_results(before if isinstance(before, dict) else {}, results)
    write_file(path, (json.dumps(merged, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())
    return path


def table(results: Mapping[str, Any]) -> str:
    """The results as aligned text for the screen."""
    parts = []
    if "retrieval" in results:
        found = results["retrieval"]
        heading = f"image-text retrieval, {found['on']}: {found['pictures']} pictures, {found['captions']} captions, %"
        ways = {"image_to_text": "picture to caption", "text_to_image": "caption to picture"}
        parts.append(_recalls(heading, found, ways) + _left_out(found))
    for name, found in results.get("pictures", {}).items():
        heading = (
            f"label retrieval, {name} at {found['size']} px: {found['queries']} queries, {found['bank']} in the bank, %"
        )
        ways = {"test_to_train": "test to train", "train_to_test": "train to test"}
        parts.append(_recalls(heading, found, ways) + _left_out(found))
    for name, found in results.get("texts", {}).items():
        ways = {"1_to_2": "1st to 2nd", "2_to_1": "2nd to 1st"}
        recalls = _recalls(f"text-pair retrieval, {name}: {found['pairs']} pairs, %", found, ways)
        same = found.get("same_text")
        parts.append(recalls + (f"\n  any identical text counts: mean {same['mean']:.1f}" if same else ""))
    if "distillation" in results:
        found = results["distillation"]
        heading = f"distillation, {found['on']}: {found['rows']} rows against {found['targets']}"
        lines = [f"  {name:<24}{numbers['layers_mse']:9.4f}" for name, numbers in _rows(found)]
        parts.append("\n".join([heading, f"  {'':<24}{'layers-mse':>9}", *lines]))
    return "\n\n".join(parts)


def _rows(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The student, then its baselines."""
    return [(STUDENT, found), *found.get("baselines", {}).items()]


def _recalls(heading: str, found: Mapping[str, Any], ways: Mapping[str, str]) -> str:
    measures = list(found[next(iter(ways))])
    groups = "".join(f"  {name:^{8 * len(measures)}}" for name in ways.values())
    columns = "".join("  " + "".join(f"{measure:>8}" for measure in measures) for _ in ways)
    lines = [heading, f"  {'':<24}{groups}", f"  {'':<24}{columns}{'mean':>10}"]
    for name, numbers in [*_rows(found), ("chance", found["chance"])]:
        cells = "".join("  " + "".join(f"{numbers[way][m]:8.1f}" for m in measures) for way in ways)
        mean = f"{numbers['mean']:10.1f}" if "mean" in numbers else ""
        lines.append(f"  {name:<24}{cells}{mean}")
    return "\n".join(line.rstrip() for line in lines)


def _left_out(found: Mapping[str, Any]) -> str:
    bad = found["quarantined"]
    return f"\n  {len(bad)} pictures left out, the first: {bad[0]}" if bad else ""
