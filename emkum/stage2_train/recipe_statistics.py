"""Which statistics of the whole cache a recipe reads beside its fields."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emkum.shards.statistics.request import StatisticRequest
from emkum.stage2_train.recipe import Recipe
from emkum.stage2_train.recipe_fields import FieldNames

if TYPE_CHECKING:
    from emkum.shards.reader import Cache

COMPONENTS = 256  # as many as `emkum cache stats --what pca` keeps by default


def required_statistics(recipe: Recipe, cache: Cache, names: FieldNames) -> dict[str, StatisticRequest]:
    """By objective: the codebooks, principal components and near duplicates that it reads."""
    wanted, split = recipe.objectives, recipe.data.split
    found: dict[str, StatisticRequest] = {}
    if wanted.ctl and wanted.ctl.duplicates:
        found["ctl"] = StatisticRequest(names.targets["cls"], "duplicates", split, threshold=wanted.ctl.duplicates)
    if wanted.reduced and wanted.reduced.start == "pca":
        field = cache.field(names.targets["cls"])
        components = max(min(COMPONENTS, field.row_shape[-1]), wanted.reduced.width)
        found["reduced"] = StatisticRequest(field.name, "pca", split, components=components)
    if wanted.codes:
        found["codes"] = StatisticRequest(names.targets["cls"], "codebook", split, codes=wanted.codes.codes)
    if wanted.mvlm and wanted.mvlm.patch_share:
        found["mvlm"] = StatisticRequest(names.targets["patches"], "codebook", split, codes=wanted.mvlm.codes)
    return found
