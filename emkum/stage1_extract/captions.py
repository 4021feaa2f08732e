"""The captions of the missing blocks, in row order, each with its picture where a field of pairs needs it.

N rows, L text positions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from emkum.shards.segments import Segment, read_captions
from emkum.shards.store import Store
from emkum.stage1_extract.encode import for_device, stacked_crops
from emkum.stage1_extract.pictures import Decoded, Picture, PictureSource, picture_table
from emkum.stage1_extract.plan import Task

NO_PICTURE = "its sample has no picture"
"""Why a caption has no row in fields of pairs: no fault of the data, so it does not count against --max-bad."""
BATCHES_AHEAD = 3  # whose pictures are decoded meanwhile


@dataclass(frozen=True)
class Caption:
    """Its row in the cache, its identity, and the row of the picture it belongs to, if there is one."""

    row: int
    image_row: int | None
    tar: str
    key: str
    text: str


@dataclass(frozen=True)
class CaptionBatch:
    """Consecutive rows of one block. `last`: the block is complete with it.

    seen: of each caption the picture it belongs to; None if there is none, or none is needed.
    """

    task: Task
    captions: tuple[Caption, ...]
    seen: tuple[Decoded | None, ...]
    last: bool

    @property
    def texts(self) -> list[str]:
        return [caption.text for caption in self.captions]

    @property
    def samples(self) -> list[tuple[str, str]]:
        """(tar, key) of each."""
        return [(caption.tar, caption.key) for caption in self.captions]

    @property
    def paired(self) -> list[tuple[int, Decoded]]:
        """Place in the batch and picture of those that have one that could be decoded."""
        return [(i, found) for i, found in enumerate(self.seen) if found is not None and found.crop is not None]

    @property
    def unpaired(self) -> dict[int, str]:
        """Place in the batch of the others, and why."""
        return {
            i: NO_PICTURE if found is None else f"its picture cannot be used: {found.reason}"
            for i, found in enumerate(self.seen)
            if found is None or found.crop is None
        }


Looked = tuple[Future[list[Decoded]], int]  # the pictures looked at together, and which of them


class CaptionStream:
    """Iterates over the batches of `tasks`; pictures are decoded some batches ahead in `threads` threads.

    source: where pictures come from; None: no task needs any. needs_pictures: whether a task does. Captions of one
    picture that follow each other share it: it is decoded once. `tasks` may be lazy: the next one is asked for when
    its first batch is.
    """

    def __init__(
        self,
        store: Store,
        tasks: Iterable[Task],
        batch_size: int,
        source: PictureSource | None = None,
        needs_pictures: Callable[[Task], bool] = lambda task: True,
        threads: int = 1,
    ) -> None:
        self._store, self._tasks, self._batch_size = store, tasks, batch_size
        self._source, self._needs_pictures = source, needs_pictures
        self._pool = None if source is None else ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._tables: tuple[int, pa.Table, pa.Table | None] | None = None  # captions, pictures of the segment at hand
        self._before: tuple[tuple[int, int], Looked] | None = None  # segment and row of the latest picture

    def __iter__(self) -> Iterator[CaptionBatch]:
        ahead: deque[tuple[Task, list[Caption], list[Looked | None], bool]] = deque()
        for coming in self._coming():
            ahead.append(coming)
            while ahead and (len(ahead) > BATCHES_AHEAD or not any(ahead[0][2])):
                yield _finished(*ahead.popleft())
        while ahead:
            yield _finished(*ahead.popleft())

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _coming(self) -> Iterator[tuple[Task, list[Caption], list[Looked | None], bool]]:
        for task in self._tasks:
            needed = self._source is not None and self._needs_pictures(task)
            captions = self._of(task)
            for first in range(0, len(captions), self._batch_size):
                batch = captions[first : first + self._batch_size]
                looked = self._looked(task, batch) if needed else list[Looked | None]([None] * len(batch))
                yield task, batch, looked, first + self._batch_size >= len(captions)

    def _of(self, task: Task) -> list[Caption]:
        segment = task.segment
        if self._tables is None or self._tables[0] != segment.number:
            pictures = None if self._source is None else picture_table(self._store, segment)
            self._tables = segment.number, caption_table(self._store, segment), pictures
        table = self._tables[1].slice(task.first_row - segment.text.first_row, task.rows)
        lines = zip(*(column.to_pylist() for column in table.columns), strict=True)
        return [Caption(task.first_row + i, *line) for i, line in enumerate(lines)]

    def _looked(self, task: Task, captions: Sequence[Caption]) -> list[Looked | None]:
        """Begins to look at the pictures of these captions, but for one that is being looked at already."""
        assert self._source is not None
        assert self._pool is not None
        assert self._tables is not None
        found: dict[tuple[int, int], Looked] = {} if self._before is None else dict([self._before])
        places = [(task.segment.number, c.image_row) for c in captions if c.image_row is not None]
        new = [place for place in dict.fromkeys(places) if place not in found]
        first_row = task.segment.image.first_row
        rows = self._tables[2].take([row - first_row for _, row in new]).to_pylist() if new else []  # type: ignore[union-attr]
        pictures = [Picture(row, **line) for (_, row), line in zip(new, rows, strict=True)]
        at_once = max(1, len(new)) if self._source.at_once else 1
        for start in range(0, len(new), at_once):
            future = self._pool.submit(self._source.look, task, pictures[start : start + at_once])
            found |= {place: (future, i) for i, place in enumerate(new[start : start + at_once])}
        if places:
            self._before = places[-1], found[places[-1]]
        return [None if c.image_row is None else found[task.segment.number, c.image_row] for c in captions]


def _finished(task: Task, captions: Sequence[Caption], looked: Sequence[Looked | None], last: bool) -> CaptionBatch:
    seen = tuple(None if one is None else one[0].result()[one[1]] for one in looked)
    return CaptionBatch(task, tuple(captions), seen, last)


def text_inputs(ids_NL: np.ndarray, length_N: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """What text networks take: ids and mask, cut to the longest text, on the host."""
    longest = int(length_N.max())
    return for_device(ids_NL[:, :longest], device), for_device(np.arange(longest) < length_N[:, None], device)


def pair_inputs(
    batch: CaptionBatch, ids_NL: np.ndarray, length_N: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What networks of pairs take: crops, ids and mask of the captions that have a picture, on the host.

    None if no caption of the batch has one. ids_NL, length_N: of all its captions.
    """
    place = [i for i, _ in batch.paired]
    if not place:
        return None
    crops = stacked_crops([found.crop for _, found in batch.paired if found.crop is not None], device)
    return crops, *text_inputs(ids_NL[place], length_N[place], device)


def caption_table(store: Store, segment: Segment) -> pa.Table:
    """The segment's captions in row order: image_row, tar, key, caption."""
    return read_captions(store, segment).select(["image_row", "tar", "key", "caption"])
