"""The statistics of a cache as training reads them: arrays of numpy, refused if the field has changed since."""

from __future__ import annotations

from emkum.shards.reader import Cache
from emkum.shards.statistics.kept import Statistic, load
from emkum.shards.statistics.request import StatisticRequest


def channels(cache: Cache, field: str, split: str = "train") -> Statistic:
    """arrays `mean`, `std` (of the population), `minimum`, `maximum`: float64 [D].

    Raises, as all below, MissingStatistic and StaleStatistic with the command that makes it; MissingField;
    CorruptCache.
    """
    return load(cache, StatisticRequest(field, "channels", split))


def pca(cache: Cache, field: str, components: int = 256, split: str = "train") -> Statistic:
    """arrays, float64: `components` [d, D], orthonormal rows by falling variance; `mean` [D];
    `explained_variance` [d].
    """
    return load(cache, StatisticRequest(field, "pca", split, components=components))


def codebook(cache: Cache, field: str, codes: int = 1024, seed: int = 0, split: str = "train") -> Statistic:
    """arrays: `codes` float32 [J, D], unit vectors, nearest by cosine; `counts` int64 [J], vectors of each.

    results: `usage` (share of codes with a vector), `perplexity`, `mean_cosine`.
    """
    return load(cache, StatisticRequest(field, "codebook", split, codes=codes, seed=seed))


def duplicates(cache: Cache, field: str, threshold: float = 0.95, split: str = "train") -> Statistic:
    """arrays: `group` int64 [R]: of every row up to the split's last the lowest row of its group; -1: no such row."""
    return load(cache, StatisticRequest(field, "duplicates", split, threshold=threshold))
