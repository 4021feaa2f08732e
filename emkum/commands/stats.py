"""`emkum cache stats`: statistics of a whole field, computed with dask and kept in the cache."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from emkum.commands.places import cache_place

if TYPE_CHECKING:
    from emkum.shards.statistics.kept import Statistic


def cache_stats(
    cache: Annotated[
        str, typer.Argument(help="Folder of the cache, or its URL in an object store (s3://bucket/folder).")
    ] = "./shards",
    field: Annotated[
        Optional[str],  # noqa: UP045 (Typer reads it)
        typer.Option(
            help="The field, as `emkum cache info` names it, e.g. teacher/dinov2-s/image/cls. Without it, the "
            "statistics that the cache keeps are listed."
        ),
    ] = None,
    what: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="channels|pca|codebook|duplicates",
            help="channels: mean and standard deviation of every channel. pca: principal components. codebook: "
            "spherical k-means. duplicates: groups of rows that are nearly the same.",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Of which split. Banks and codebooks for training use train.")] = "train",
    components: Annotated[int, typer.Option(help="For pca: how many components to keep.")] = 256,
    codes: Annotated[int, typer.Option(help="For codebook: how many codes.")] = 1024,
    seed: Annotated[int, typer.Option(help="For codebook: of the draw of the first codes.")] = 0,
    start: Annotated[
        str,
        typer.Option(
            metavar="k-means++|rows",
            help="For codebook: how the first codes are drawn: far from each other, or evenly.",
        ),
    ] = "k-means++",
    iterations: Annotated[
        int,
        typer.Option(help="For codebook: passes over all vectors at most; it ends earlier when nothing is gained."),
    ] = 20,
    threshold: Annotated[
        float,
        typer.Option(
            help="For duplicates: the cosine from which two rows are nearly the same; what is linked through "
            "others is one group."
        ),
    ] = 0.95,
    workers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Threads of this process. Default: one a processor."),
    ] = None,
    scheduler: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Address of a running Dask scheduler (tcp://host:8786), whose workers do the work. They must see the "
            "cache at the same path or URL."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object to stdout, everything else to stderr.")
    ] = False,
) -> None:
    """Statistics of all vectors of a field that are committed; kept in the cache, under statistics/.

    The same command again does nothing while the field stays as it is. When the field has grown or changed, training
    refuses the old statistic, and this command makes it anew.
    """
    from emkum.errors import UsageError
    from emkum.shards.reader import Cache
    from emkum.shards.statistics.cluster import connected
    from emkum.shards.statistics.compute import compute
    from emkum.shards.statistics.passes import Threads
    from emkum.shards.statistics.request import WHATS, StatisticRequest

    if field is None and what is None:
        listing = _listing(Cache.open(cache_place(cache)))
        print(json.dumps({"path": cache, "statistics": listing}, indent=1) if as_json else _table(cache, listing))
        return
    if field is None or what is None:
        raise UsageError(
            "--field and --what go together",
            f"--field: as `emkum cache info {cache}` names it; --what: {', '.join(WHATS)}; neither lists what is kept",
        )
    if workers is not None and (workers < 1 or scheduler is not None):
        raise UsageError(
            f"--workers {workers} cannot work", "give 1 or more threads, or a --scheduler, which has its own"
        )
    request = StatisticRequest(
        field, cast(Any, what), split, components, codes, seed, cast(Any, start), iterations, threshold
    )
    opened = Cache.open(cache_place(cache), only=[field] if _is_there(cache, field) else None)
    with contextlib.ExitStack() as held:
        engine = held.enter_context(connected(scheduler)) if scheduler is not None else Threads(workers)
        bar = held.enter_context(_Bar())
        found = compute(opened, request, engine, bar.say, bar.show)
    print(json.dumps(_told(cache, found), indent=1) if as_json else _summary(found))


def _is_there(cache: str, field: str) -> bool:
    """Whether the field has a record; if it has none, the whole cache is opened and says which fields there are."""
    from emkum.shards.layout import field_record_path
    from emkum.shards.store import exists, open_store

    return exists(open_store(cache_place(cache)), field_record_path(field))


def _listing(cache: Any) -> list[dict[str, Any]]:
    from emkum.shards.statistics.kept import kept

    return [
        {"name": one.request.name, "stale": one.stale, "command": one.request.command(cache.path)} | one.record
        for one in kept(cache)
    ]


def _table(cache: str, listing: list[dict[str, Any]]) -> str:
    lines = [
        f"{one['name']}: {one['making']['vectors']:,} vectors of {one['making']['width']}"
        + (f"; STALE: it {one['stale']}\n    {one['command']}" if one["stale"] else "")
        for one in listing
    ]
    return "\n".join(lines) if lines else f"{cache} keeps no statistics: --field F --what pca makes one"


def _told(cache: str, found: Statistic) -> dict[str, Any]:
    return {
        "path": cache,
        "name": found.name,
        "arrays": {name: list(values.shape) for name, values in found.arrays.items()},
        "results": found.results,
        "making": found.record["making"],
        "fingerprint": found.record["fingerprint"],
    }


def _summary(found: Statistic) -> str:
    arrays = ", ".join(f"{name} {' x '.join(map(str, values.shape))}" for name, values in found.arrays.items())
    making, results = found.record["making"], found.results
    lines = [
        f"{found.name}: {arrays}",
        f"of {making['vectors']:,} vectors in {making['seconds']:,.1f} s with {making['engine']}",
    ]
    if found.request.what == "pca":
        lines.append(f"the components explain {100 * results['explained']:.1f} % of the variance")
    elif found.request.what == "codebook":
        lines.append(
            f"mean cosine {results['mean_cosine']:.4f} after {len(results['mean_cosine_by_pass'])} passes, "
            f"{100 * results['usage']:.1f} % of the codes used, perplexity {results['perplexity']:,.0f}, "
            f"{results['restarted']} codes begun anew"
        )
    elif found.request.what == "duplicates":
        lines.append(
            f"{results['groups']:,} groups of {results['rows_in_groups']:,} rows, the largest of {results['largest']:,}"
        )
    return "\n".join(lines)


class _Bar:
    """Progress on stderr, if that is a terminal, and lines beside it. A context manager."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._bar = tqdm(unit="", unit_scale=True, leave=False, disable=not sys.stderr.isatty())

    def show(self, what: str, done: int, total: int) -> None:
        if done < self._bar.n:
            self._bar.reset()
        self._bar.total = total
        self._bar.set_description_str(what, refresh=False)
        self._bar.update(done - self._bar.n)

    def say(self, line: str) -> None:
        self._bar.clear()
        print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
