"""Which rows of a split a recipe can use: those that all its fields have.

N samples, M captions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from emkum.errors import IncompleteCache, NoData

if TYPE_CHECKING:
    from emkum.shards.reader import Cache, Field
    from emkum.stage2_train.recipe import Recipe
    from emkum.stage2_train.recipe_fields import FieldNames

Kind = Literal["pairs", "images", "texts"]


@dataclass(frozen=True)
class SampleTable:
    """The rows of one split that a recipe can use: those that all its fields have.

    image_rows_N: ascending; None for texts. text_rows_M: captions grouped by picture, those of sample i at
    [first_caption_N[i], first_caption_N[i + 1]); for texts the rows themselves; None for images.
    dropped: rows of the split that some needed field lacks, quarantined pictures among them.
    """

    kind: Kind
    split: str
    image_rows_N: np.ndarray | None
    text_rows_M: np.ndarray | None
    first_caption_N: np.ndarray | None
    num_views: int
    dropped: int

    @property
    def num_samples(self) -> int:
        """Pictures for pairs and images, texts for texts."""
        rows = self.text_rows_M if self.image_rows_N is None else self.image_rows_N
        assert rows is not None
        return len(rows)


def sample_table(
    cache: Cache,
    recipe: Recipe,
    names: FieldNames,
    split: str,
    *,
    allow_partial: bool = False,
    first_view: bool = False,
    seed: int = 0,
) -> SampleTable:
    """Which rows of `split` can be read for the recipe; of its training split, the fraction that it asks for.

    Raises IncompleteCache when a needed field lacks whole blocks, unless `allow_partial`; NoData when no row is left.
    """
    image_fields = [cache.field(name) for name in names.needed() if cache.field(name).space == "image"]
    text_fields = [cache.field(name) for name in names.needed() if cache.field(name).space == "text"]
    first_view = first_view or recipe.data.views == "first"
    num_views = 1 if first_view else max(1, min((_views_of(f, split) for f in image_fields), default=1))
    if not allow_partial:
        for field in image_fields + text_fields:
            refuse_missing(cache, field, split, num_views if field.space == "image" else 1)
    image_rows = _common_rows(image_fields, split, num_views) if image_fields else None
    text_rows = _common_rows(text_fields, split, 1) if text_fields else None
    first_caption, dropped = None, 0
    if recipe.kind == "pairs":
        assert image_rows is not None
        assert text_rows is not None
        total = cache.samples(split).column("image_row")
        image_rows, text_rows, first_caption = _group_captions(cache, split, image_rows, text_rows)
        dropped = len(total) - total.null_count - len(image_rows)
    elif image_rows is not None:
        total = cache.samples(split).column("image_row")
        dropped = len(total) - total.null_count - len(image_rows)
    elif text_rows is not None:
        dropped = len(cache.captions(split)) - len(text_rows)
    table = SampleTable(recipe.kind, split, image_rows, text_rows, first_caption, num_views, dropped)
    if recipe.data.fraction < 1 and split == recipe.data.split:
        table = part_of(table, recipe.data.fraction, seed)
    if not table.num_samples:
        raise NoData(
            f"split {split!r} of {cache.path} has no row that all of {', '.join(names.needed())} hold"
            + (f", of which data.fraction = {recipe.data.fraction:g} is taken" if recipe.data.fraction < 1 else ""),
            f"run emkum extract --cache {cache.path} --split {split} again to finish them",
        )
    return table


def part_of(table: SampleTable, fraction: float, seed: int) -> SampleTable:
    """A part of the samples, rounded, drawn by the seed: a larger fraction holds all of a smaller one."""
    count = round(fraction * table.num_samples)
    kept = np.sort(np.random.default_rng([seed, 0xF4AC]).permutation(table.num_samples)[:count])
    images, texts, first = table.image_rows_N, table.text_rows_M, table.first_caption_N
    if first is not None and texts is not None:
        groups = [np.arange(first[i], first[i + 1]) for i in kept]
        texts = texts[np.concatenate(groups) if groups else np.empty(0, np.int64)]
        first = np.append(0, np.cumsum([len(group) for group in groups], dtype=np.int64))
    elif texts is not None:
        texts = texts[kept]
    return dataclasses.replace(
        table,
        image_rows_N=None if images is None else images[kept],
        text_rows_M=texts,
        first_caption_N=first,
    )


def _views_of(field: Field, split: str) -> int:
    """Leading views of which the split has at least one row."""
    for view in range(field.num_views):
        if not len(field.rows(split, view)):
            return view
    return field.num_views


def refuse_missing(cache: Cache, field: Field, split: str, num_views: int) -> None:
    """Raise IncompleteCache if the field lacks blocks of the split."""
    missing = field.missing(split, num_views)
    if missing:
        rows = sum(len(field.rows(split, view)) for view in range(num_views))
        shown = ", ".join(f"{block}-{view}" for block, view in missing[:3]) + (", ..." if len(missing) > 3 else "")
        way_out = f"finish it: the same emkum extract command on {cache.path}; or train on what is there: "
        way_out += "--allow-partial"
        if num_views > 1 and not field.missing(split, 1):  # as where a second extraction had more views
            way_out += "; or, as view 0 is complete, on that alone: --set data.views=first"
        raise IncompleteCache(
            f"{field.name} lacks {len(missing)} blocks of split {split!r} ({shown}); {rows} rows are committed", way_out
        )


def _common_rows(fields: list[Field], split: str, num_views: int) -> np.ndarray:
    rows = fields[0].rows(split, 0)
    for field in fields:
        for view in range(num_views):
            rows = np.intersect1d(rows, field.rows(split, view), assume_unique=True)
    return rows


def _group_captions(
    cache: Cache, split: str, image_rows: np.ndarray, text_rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures that have captions, their captions grouped by picture, and where each group starts."""
    captions = cache.captions(split).select(["text_row", "image_row"])  # and not millions of strings with them
    paired = captions.filter(captions.column("image_row").is_valid())
    caption_rows = paired.column("text_row").to_numpy()
    image_of = paired.column("image_row").to_numpy()
    usable = np.isin(caption_rows, text_rows) & np.isin(image_of, image_rows)
    caption_rows, image_of = caption_rows[usable], image_of[usable]
    grouped = np.lexsort((caption_rows, image_of))
    pictures, first = np.unique(image_of[grouped], return_index=True)
    return pictures, caption_rows[grouped], np.append(first, len(caption_rows))
