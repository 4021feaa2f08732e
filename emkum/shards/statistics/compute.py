"""Computes a statistic of a field and keeps it in the cache, unless the cache has it."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import emkum
from emkum.errors import UsageError
from emkum.shards.reader import Cache, Field
from emkum.shards.statistics.channels import channel_moments
from emkum.shards.statistics.codebook import make_codebook
from emkum.shards.statistics.duplicates import forget_tiles, near_duplicates
from emkum.shards.statistics.kept import Statistic, keep, load, read_record, why_stale
from emkum.shards.statistics.passes import Engine, Progress, Threads
from emkum.shards.statistics.pca import principal_components, require_components
from emkum.shards.statistics.request import StatisticRequest
from emkum.shards.statistics.vectors import POOLED_KINDS, Vectors, close_all, vectors_of

Arrays = dict[str, tuple[np.ndarray, tuple[str, ...]]]


def compute(
    cache: Cache,
    request: StatisticRequest,
    engine: Engine | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> Statistic:
    """The statistic of what the snapshot has committed: the kept one if it is of just that, else made and kept.

    Raises UsageError, MissingField, IncompleteCache, CorruptCache, StorageFailure.
    """
    field = cache.field(request.field)
    record = read_record(cache.store, request.name)
    if record is not None:
        stale = why_stale(cache, request, record)
        if not stale:
            say(f"{request.name} is kept already, of the same {record['fingerprint']['blocks']} blocks: nothing to do")
            return load(cache, request)
        say(f"the {request.name} that is kept {stale}: it is made anew")
    vectors = vectors_of(cache, request.field, request.split, request.what == "duplicates")
    missing = len(field.missing(request.split))
    if missing:
        say(f"{request.field} lacks {missing} blocks of {request.split}: the statistic is of what is committed")
    if request.what == "duplicates" and field.kind not in POOLED_KINDS:
        raise UsageError(
            f"{request.field} holds {field.kind}; near-duplicates are looked for in a field of one vector a row",
            "choose a teacher's cls or mean field",
        )
    engine = engine or Threads()
    say(f"{request.name}: {vectors.num_vectors:,} vectors of {vectors.width}, with {engine}")
    started = time.perf_counter()
    try:
        arrays, results = _make(request, vectors, field, engine, progress)
    finally:
        close_all()
        forget_tiles()
    making = {
        "seconds": round(time.perf_counter() - started, 3),
        "engine": str(engine),
        "rows": vectors.num_rows,
        "vectors": vectors.num_vectors,
        "width": vectors.width,
        "versions": _versions(),
    }
    return keep(cache, request, arrays, results, making, say)


def _make(
    request: StatisticRequest, vectors: Vectors, field: Field, engine: Engine, progress: Progress
) -> tuple[Arrays, dict[str, Any]]:
    def tell(done: int, total: int) -> None:
        progress(request.what, done, total)

    if request.what == "channels":
        found = channel_moments(vectors, engine, tell)
        std_D = np.sqrt(found.squares_D / found.count)
        numbers = {"mean": found.mean_D, "std": std_D, "minimum": found.minimum_D, "maximum": found.maximum_D}
        return {name: (values, ("channel",)) for name, values in numbers.items()}, {}
    if request.what == "pca":
        require_components(vectors, request.components, field.kind in POOLED_KINDS)
        pca = principal_components(vectors, request.components, engine, tell)
        explained = float(pca.explained_variance_d.sum() / pca.total_variance) if pca.total_variance else 1.0
        return {
            "components": (pca.components_dD, ("component", "channel")),
            "mean": (pca.mean_D, ("channel",)),
            "explained_variance": (pca.explained_variance_d, ("component",)),
        }, {"total_variance": pca.total_variance, "explained": explained}
    if request.what == "codebook":
        book = make_codebook(
            vectors,
            request.codes,
            engine,
            seed=request.seed,
            start=request.start,
            iterations=request.iterations,
            progress=progress,
        )
        return {"codes": (book.codes_JD, ("code", "channel")), "counts": (book.counts_J, ("code",))}, {
            "usage": book.usage,
            "perplexity": book.perplexity,
            "mean_cosine": book.mean_cosine[-1],
            "mean_cosine_by_pass": list(book.mean_cosine),
            "restarted": book.restarted,
        }
    groups = near_duplicates(vectors, request.threshold, engine, tell)
    sizes = groups.sizes
    return {"group": (groups.group_R, (f"{field.space}_row",))}, {
        "groups": len(sizes),
        "rows_in_groups": int(sizes.sum()),
        "largest": int(sizes[0]) if len(sizes) else 0,
    }


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("numpy", "dask")}
    return {"emkum": emkum.__version__, "python": platform.python_version()} | found
