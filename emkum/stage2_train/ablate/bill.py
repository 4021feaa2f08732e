"""What an ablation cost, and what it would have cost with teacher and encoder in every step.

The latter is measured, or estimated from what extraction took, or not known; which of these is always said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from emkum.errors import UsageError
from emkum.stage2_train.ablate.jobs import Job, run_of
from emkum.stage2_train.runs import DOLLARS_PER_HOUR, dollars_text, time_text

if TYPE_CHECKING:
    from emkum.shards.reader import Cache

How = Literal["itself", "measured", "by another variant", "estimated"]


@dataclass(frozen=True)
class LiveCost:
    """What a run of a variant takes live. how: the variant is live itself; it was trained live too; the difference
    was measured on another variant that reads the same fields; estimated from the seconds of extraction."""

    seconds: float
    ratio: float  # to the seconds from the cache
    dollars: float | None
    how: How

    def text(self) -> str:
        """`34.1 s (3.4 x)`; `~` in front of an estimate."""
        if self.how == "itself":
            return "is live"
        return f"{'~' if self.how == 'estimated' else ''}{time_text(self.seconds)} ({self.ratio:.1f} x)"


@dataclass(frozen=True)
class Pair:
    """A variant that was trained live, beside the same from the cache. seconds: of a run; extra_seconds: a sample."""

    live: str
    cached: str
    fields: tuple[str, ...]
    live_seconds: float
    cached_seconds: float
    extra_seconds: float

    def text(self) -> str:
        """What was measured, for people."""
        return (
            f"live: {self.live} was trained with teacher and encoder in every step: {time_text(self.live_seconds)} a "
            f"run against {time_text(self.cached_seconds)} of {self.cached}, {self.extra_seconds * 1000:.3g} ms more "
            "a sample"
        )


@dataclass(frozen=True)
class Bill:
    """Prices and what is known of the way without a cache.

    extraction_seconds: as the user gave them, None if not; row_seconds: of them a row of the training split, for the
    fields `extracted`: all that the variants read. It says nothing of a variant that reads fewer.
    """

    dollars_per_hour: float = DOLLARS_PER_HOUR
    extraction_seconds: float | None = None
    row_seconds: float | None = None
    extracted: frozenset[str] = frozenset()
    pairs: tuple[Pair, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.dollars_per_hour < 1e6:
            raise UsageError(f"--dollars-per-hour {self.dollars_per_hour:g}", "give a price, 0 or more")
        if self.extraction_seconds is not None and not 0 < self.extraction_seconds < 1e12:
            raise UsageError(f"--extraction-seconds {self.extraction_seconds:g}", "give seconds, more than 0")

    def live(self, job: Job, done: Sequence[Job]) -> LiveCost | None:
        """What a run of the variant would have taken live; None where that is not known. done: its finished jobs."""
        infos = [info for each in done if (info := run_of(each))]
        if not infos:
            return None
        seconds = _mean([info["seconds"] for info in infos])
        on_gpu = all(str(info.get("device", "")).startswith("cuda") for info in infos)
        how: How
        if job.variant.live:
            found, how = seconds, "itself"
        elif own := [pair for pair in self.pairs if pair.cached == job.variant.name]:
            found, how = own[0].live_seconds, "measured"
        elif alike := [pair for pair in self.pairs if pair.fields == job.fields]:
            extra = _mean([pair.extra_seconds for pair in alike])
            found, how = seconds + extra * _samples(job, infos[0]), "by another variant"
        elif self.row_seconds is not None and self.extracted == set(job.fields):
            found, how = seconds + self.row_seconds * _samples(job, infos[0]), "estimated"
        else:
            return None
        dollars = found / 3600 * self.dollars_per_hour if on_gpu else None
        return LiveCost(found, found / max(seconds, 1e-9), dollars, how)

    def notes(self, lines_live: Sequence[LiveCost | None], counts: Sequence[int]) -> list[str]:
        """What is said of extraction and of the way without a cache. counts: finished runs of each line."""
        said = []
        if self.extraction_seconds is None:
            said.append(
                "extraction: the cache does not record how long it took; --extraction-seconds adds what "
                "emkum extract said"
            )
        else:
            said.append(f"extraction: {time_text(self.extraction_seconds)}, as given, once for all variants")
        said += [pair.text() for pair in self.pairs]
        hows = {cost.how for cost in lines_live if cost}
        if "by another variant" in hows:
            said.append("live of the others that read the same fields: their own time, and that more a sample")
        if "estimated" in hows:
            said.append(
                "live (~): estimated, not measured: a run's own time, and for every sample what extraction took a row, "
                "which holds writing the cache too; of variants that read all fields alone"
            )
        if not hows - {"itself"}:
            said.append(
                "live: not known; a variant with live = true beside its twin measures it, --extraction-seconds "
                "estimates it"
            )
        total = self._total(lines_live, counts)
        return said + ([total] if total else [])

    def _total(self, lines_live: Sequence[LiveCost | None], counts: Sequence[int]) -> str:
        runs = [(cost, count) for cost, count in zip(lines_live, counts, strict=True) if count]
        costs = [(cost, count) for cost, count in runs if cost and cost.how != "itself"]
        if not costs or any(cost is None for cost, _ in runs):
            return ""
        live = sum(cost.seconds * count for cost, count in costs)
        cached = sum(cost.seconds / cost.ratio * count for cost, count in costs) + (self.extraction_seconds or 0)
        with_extraction = " with extraction" if self.extraction_seconds else ", extraction not counted"
        priced = all(cost.dollars is not None for cost, _ in costs)
        hour = self.dollars_per_hour / 3600
        prices = f" ({dollars_text(cached * hour)} and {dollars_text(live * hour)})" if priced else ""
        return (
            f"all {sum(count for _, count in costs)} runs from the cache: {time_text(cached)}{with_extraction}; live: "
            f"{time_text(live)}{prices}"
        )

    def to_json(self) -> dict[str, Any]:
        """What the numbers rest on."""
        return {
            "dollars_per_hour": self.dollars_per_hour,
            "extraction_seconds": self.extraction_seconds,
            "extraction_seconds_a_row": self.row_seconds,
            "measured_live": [vars(pair) | {"fields": list(pair.fields)} for pair in self.pairs],
        }


def make_bill(
    jobs: Sequence[Job], cache: Cache, dollars_per_hour: float, extraction_seconds: float | None = None
) -> Bill:
    """The bill of jobs as they are now: variants trained live are paired with their twins from the cache."""
    done: dict[str, list[Job]] = {}
    for job in jobs:
        if (run_of(job) or {}).get("status") == "finished":
            done.setdefault(job.variant.name, []).append(job)
    pairs = []
    for live in done.values():
        if live[0].variant.live:
            twins = [found for found in done.values() if _twins(live[0], found[0])]
            pairs += [_pair(live, twin) for twin in twins]
    row_seconds = None
    fed = [job for job in jobs if not job.lacks]
    every = frozenset(name for job in fed for name in job.fields)
    whole = [job for job in fed if set(job.fields) == every]
    if extraction_seconds is not None and whole and (rows := _rows(whole[0], cache)):
        row_seconds = extraction_seconds / rows
    return Bill(dollars_per_hour, extraction_seconds, row_seconds, every, tuple(pairs))


def _twins(live: Job, cached: Job) -> bool:
    """Whether the two differ in nothing but that one reads the cache."""
    keys = ("recipe", "max_steps", "precision", "cache")
    return not cached.variant.live and all(live.asked[key] == cached.asked[key] for key in keys)


def _pair(live: Sequence[Job], cached: Sequence[Job]) -> Pair:
    slow, fast = ([info for job in jobs if (info := run_of(job))] for jobs in (live, cached))
    extra = _mean([1 / info["samples_per_second"] for info in slow])
    extra -= _mean([1 / info["samples_per_second"] for info in fast])
    seconds = [_mean([info["seconds"] for info in infos]) for infos in (slow, fast)]
    return Pair(live[0].variant.name, cached[0].variant.name, live[0].fields, seconds[0], seconds[1], extra)


def _rows(job: Job, cache: Cache) -> int:
    """Rows of all views of the training split, of the field that has most."""
    split = job.variant.recipe.data.split
    fields = [cache.field(name) for name in job.fields]
    seen = [field for field in fields if field.space == "image"] or fields
    return max((sum(len(field.rows(split, view)) for view in range(field.num_views)) for field in seen), default=0)


def _samples(job: Job, info: dict[str, Any]) -> int:
    """Samples that a run was trained on, each as often as it came."""
    return int(info["steps"]) * job.variant.recipe.training.step_batch


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
