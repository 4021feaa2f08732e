"""Evaluates a run: from its cache, or end to end from tars, pictures and texts through the frozen networks it keeps.

With baselines the same inputs also go through the student as it was before training, and through the whole frozen
network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from emkum.errors import MissingCaptions, NoData, UsageError
from emkum.shards.reader import Cache, Field
from emkum.shards.tars import find_tars, scan_tars
from emkum.stage2_train.evaluate.contestants import Contestants
from emkum.stage2_train.evaluate.distillation import token_distances
from emkum.stage2_train.evaluate.encode import Settings, encode_ids, encode_pictures, encode_rows, retrieval_rows
from emkum.stage2_train.evaluate.pictures import LabelledPictures, label_retrieval, tar_pictures
from emkum.stage2_train.evaluate.results import STUDENT, Results, with_baselines
from emkum.stage2_train.evaluate.retrieval import image_text_retrieval, retrieval_chance
from emkum.stage2_train.evaluate.texts import TextPairs, text_pair_retrieval
from emkum.stage2_train.order import PassOrder
from emkum.stage2_train.recipe import target_roles
from emkum.stage2_train.recipe_fields import FieldNames, target_pattern
from emkum.stage2_train.run_folder import LoadedRun
from emkum.stage2_train.samples import refuse_missing


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
    Picture or text runs: {"distillation": {"layers_mse": ...}} against the teacher's targets of the split; "logits_kl"
    of a run that has that objective.
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
    pictures = tar_pictures(with_picture, np.full(len(with_picture), -1))
    images, good, bad = encode_pictures(pictures, contestants.crop_size, contestants.features_of_crops, settings)
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
    Returns {"pictures": {"name@size": {"test_to_train": {"top-1": percent, ...}, "train_to_test": {...}, "mean",
    "chance", ...}}}. Raises UsageError for a run without pictures or a size that patches do not fill,
    TooManyBadSamples.
    """
    settings, cache = settings or Settings(), _cache_of(run, cache)
    if run.student.spec.image is None:
        raise UsageError(f"{run.dir} trained on {run.recipe.kind} only", "give --texts, or a run that reads pictures")
    contestants = Contestants(run, cache, settings, with_frozen=settings.baselines)
    size = contestants.crop_size if size is None else size
    contestants.check_size(size)
    bank, bank_good, bank_bad = encode_pictures(pictures.bank, size, contestants.features_of_crops, settings)
    queries, query_good, query_bad = encode_pictures(pictures.queries, size, contestants.features_of_crops, settings)
    bank_labels, query_labels = pictures.bank.labels[bank_good], pictures.queries.labels[query_good]
    by_name = {name: label_retrieval(bank[name], bank_labels, queries[name], query_labels) for name in bank}
    result = with_baselines(by_name) | {
        "bank": len(bank_labels),
        "queries": len(query_labels),
        "classes": pictures.num_classes,
        "size": size,
        "on": pictures.source,
        "quarantined": [*bank_bad, *query_bad],
    }
    return {"pictures": {f"{pictures.name}@{size}": result}}


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
    contestants = Contestants(run, cache, settings, with_frozen=settings.baselines)
    features = _encode_texts(contestants, [*pairs.a, *pairs.b], settings)
    half = len(pairs)
    by_name = {n: text_pair_retrieval(f[:half], f[half:], pairs.a, pairs.b) for n, f in features.items()}
    result = with_baselines(by_name) | {"pairs": half, "broken_lines": pairs.num_broken, "on": pairs.source}
    return {"texts": {pairs.name: result}}


def cache_features(run: LoadedRun, cache: Cache, split: str, settings: Settings | None = None) -> PairFeatures:
    """Features of every picture and caption of a split, read from the cache. Quarantined pictures are left out."""
    settings = settings or Settings()
    _require_kind(run, "pairs", "image-text retrieval")
    contestants = Contestants(run, cache, settings)
    inputs, ids = contestants.inputs, contestants.ids
    for needed in (inputs, ids):
        refuse_missing(cache, needed, split, 1)
    rows = retrieval_rows(cache, inputs, ids, split)
    if not len(rows.text_rows_M):
        raise MissingCaptions(
            f"split {split!r} of {cache.path} has no captions", "extract tars with captions as this split"
        )
    quarantined = tuple(
        f"{q.tar}/{q.key}: {q.reason}"
        for (block, view), receipt in inputs.receipts.items()
        if view == 0 and block in _blocks(cache, split)
        for q in receipt.quarantined
    )
    images = encode_rows(
        rows.image_rows_N,
        contestants.source(FieldNames(inputs=inputs.name)),
        contestants.features_of_tokens,
        contestants.device,
        settings.batch_size,
        progress=settings.progress,
    )
    texts = _encode_ids(contestants, ids.read(rows.text_rows_M), ids.lengths(rows.text_rows_M), settings)
    return PairFeatures(images, texts, rows.image_of_text_M, rows.image_rows_N, rows.text_rows_M, quarantined)


def retrieval_of(features: PairFeatures, on: str) -> Results:
    """The section "retrieval" of the results; `on` says what was measured."""
    owners, num_images = features.image_of_text, len(features.images[STUDENT])
    by_name = {
        name: image_text_retrieval(images, features.texts[name], owners) for name, images in features.images.items()
    }
    return with_baselines(by_name) | {
        "chance": retrieval_chance(owners, num_images),
        "on": on,
        "pictures": num_images,
        "captions": len(owners),
        "distractors": int((owners < 0).sum()),
        "quarantined": list(features.quarantined),
    }


def _distillation(run: LoadedRun, cache: Cache, split: str, settings: Settings) -> Results:
    """The recipe's term on a split: layers-mse, the mean normalised layer at every token; logits-kl, the classes."""
    contestants = Contestants(run, cache, settings)
    target = contestants.trained_on(target_pattern(run.recipe))
    (role,), texts = target_roles(run.recipe), run.recipe.kind == "texts"
    targets = {role: target.name}
    inputs = target if contestants.replayed else contestants.ids if texts else contestants.inputs
    if texts:
        _check_same_tokens(cache, inputs, target)
    for needed in (inputs, target):
        refuse_missing(cache, needed, split, 1)
    rows = np.intersect1d(inputs.rows(split), target.rows(split))
    if not len(rows):
        raise NoData(f"split {split!r} of {cache.path} has no row of {inputs.name} and {target.name}", "extract it")
    if texts:
        names, order = FieldNames(ids=inputs.name, targets=targets), PassOrder(None, rows, settings.batch_size)
    else:
        read = None if contestants.replayed else inputs.name
        names, order = FieldNames(inputs=read, targets=targets), PassOrder(rows, None, settings.batch_size)
    distances = token_distances(
        contestants.students,
        run.recipe,
        order,
        contestants.source(names, split),
        contestants.precision,
        contestants.device,
        progress=settings.progress,
    )
    by_name = {name: {run.recipe.terms[0]: distance} for name, distance in distances.items()}
    return with_baselines(by_name) | {"on": f"split {split}", "rows": len(rows), "targets": target.name}


def _check_same_tokens(cache: Cache, ids: Field, target: Field) -> None:
    """Raise UsageError where the targets are of other tokens than the ids: they are compared one by one."""
    for what in ("tokenizer", "max_tokens"):
        read, made = ids.fingerprint.get(what), target.fingerprint.get(what)
        if read != made:
            raise UsageError(
                f"{ids.name} of {cache.path} has {what} {read}, the targets {target.name} have {made}: "
                "the student's tokens are not the teacher's",
                "extract targets with this text encoder's tokenizer and --max-tokens, then train again",
            )


# --- the cache -------------------------------------------------------------------------------------------


def _encode_texts(contestants: Contestants, texts: Sequence[str], settings: Settings) -> dict[str, np.ndarray]:
    return _encode_ids(contestants, *contestants.tokenise(texts), settings)


def _encode_ids(
    contestants: Contestants, ids_ML: np.ndarray, lengths_M: np.ndarray, settings: Settings
) -> dict[str, np.ndarray]:
    return encode_ids(
        ids_ML,
        lengths_M,
        contestants.features_of_texts,
        contestants.device,
        settings.batch_size,
        progress=settings.progress,
    )


def _cache_of(run: LoadedRun, cache: Cache | None) -> Cache:
    return cache if cache is not None else Cache.open(run.cache_path)


def _require_kind(run: LoadedRun, kind: str, what: str) -> None:
    if run.recipe.kind != kind:
        raise UsageError(
            f"{what} needs pictures and captions; {run.dir} trained on {run.recipe.kind}",
            "evaluate it on its cache, or with --images or --texts",
        )


def _blocks(cache: Cache, split: str) -> set[int]:
    spans = [s.image.blocks(cache.rows_per_block) for s in cache.segments if s.split == split]
    return {block for span in spans for block in span}
