"""The pictures of the missing blocks, in row order, decoded by threads ahead of the networks.

N rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from emkum.errors import BadPicture
from emkum.shards.reader import Field
from emkum.shards.segments import Segment, read_samples
from emkum.shards.store import Store
from emkum.shards.tars import read_member
from emkum.shards.views import Box, box_for, decode_view
from emkum.stage1_extract.plan import Plan, Task


@dataclass(frozen=True)
class Picture:
    """Its row in the cache, its identity, and where it lies in its tar."""

    row: int
    tar: str
    key: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.tar}/{self.key}"


@dataclass(frozen=True)
class Decoded:
    """One picture of a batch: its crop, or why there is none. box: where the crop lay; None if the cache kept it."""

    picture: Picture
    crop: np.ndarray | None  # uint8 [size, size, 3]
    box: Box | None
    reason: str = ""


@dataclass(frozen=True)
class PictureSource:
    """Where crops come from. look: the crops of some pictures in a task's view; called in threads.

    at_once: whether it rather looks at a batch than at one picture.
    """

    look: Callable[[Task, Sequence[Picture]], list[Decoded]]
    at_once: bool = False


def from_tars(paths: Mapping[str, str], size: int) -> PictureSource:
    """Decodes pictures from the tars at `paths` (tar name -> where it lies)."""

    def decoded(task: Task, picture: Picture) -> Decoded:
        data = read_member(paths[picture.tar], picture.offset, picture.size)
        policy, tar, key = task.segment.views, picture.tar, picture.key
        try:
            crop, box = decode_view(
                data, size, lambda width, height: box_for(policy, tar, key, task.view, width, height)
            )
        except BadPicture as error:
            return Decoded(picture, None, None, error.what)
        return Decoded(picture, crop, box)

    return PictureSource(lambda task, pictures: [decoded(task, picture) for picture in pictures])


def from_crops(crops: Field) -> PictureSource:
    """Reads what a run from tars kept; what that could not decode has the reason it gave."""
    crops.reads_in_order = True
    reasons = {(q.row, view): q.reason for (_, view), receipt in crops.receipts.items() for q in receipt.quarantined}

    def look(task: Task, pictures: Sequence[Picture]) -> list[Decoded]:
        good = [picture.row for picture in pictures if (picture.row, task.view) not in reasons]
        kept = iter(crops.read(np.array(good, np.int64), task.view))
        return [
            Decoded(picture, None, None, reason)
            if (reason := reasons.get((picture.row, task.view))) is not None
            else Decoded(picture, next(kept), None)
            for picture in pictures
        ]

    return PictureSource(look, at_once=True)


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of one block. `last`: the block is complete with it."""

    task: Task
    rows: tuple[Decoded, ...]
    last: bool


def picture_source(plan: Plan) -> PictureSource:
    """Where the pictures of a run come from."""
    return from_tars(plan.paths, plan.config.side) if plan.crops is None else from_crops(plan.crops)


class PictureStream:
    """Iterates over the batches of `tasks`, looking at some batches ahead in `threads` threads.

    `tasks` may be lazy: the next one is asked for when its first picture is to be decoded.
    """

    def __init__(
        self, store: Store, tasks: Iterable[Task], source: PictureSource, batch_size: int, threads: int
    ) -> None:
        self._store, self._tasks, self._source = store, tasks, source
        self._batch_size = batch_size
        self._at_once = batch_size if source.at_once else 1
        self._window = -(-(4 * batch_size + threads) // self._at_once)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._tables: dict[int, pa.Table] = {}  # of the segment at hand

    def __iter__(self) -> Iterator[Batch]:
        ahead: deque[tuple[Task, Future[list[Decoded]]]] = deque()
        coming = ((task, pictures) for task in self._tasks for pictures in self._of(task))

        def submit() -> None:
            for task, pictures in coming:
                ahead.append((task, self._pool.submit(self._source.look, task, pictures)))
                if len(ahead) >= self._window:
                    break

        submit()
        while ahead:
            task, left = ahead[0][0], ahead[0][0].rows
            while left:
                count = min(self._batch_size, left)
                rows: list[Decoded] = []
                while len(rows) < count:
                    rows += ahead.popleft()[1].result()
                    submit()
                left -= count
                yield Batch(task, tuple(rows), last=left == 0)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _of(self, task: Task) -> Iterator[list[Picture]]:
        """The task's pictures in row order, as many at a time as are looked at together."""
        if task.segment.number not in self._tables:
            self._tables = {task.segment.number: picture_table(self._store, task.segment)}
        table = self._tables[task.segment.number]
        table = table.slice(task.first_row - task.segment.image.first_row, task.rows)
        lines = zip(*(column.to_pylist() for column in table.columns), strict=True)
        pictures = [Picture(task.first_row + i, *line) for i, line in enumerate(lines)]
        for first in range(0, len(pictures), self._at_once):
            yield pictures[first : first + self._at_once]


def picture_table(store: Store, segment: Segment) -> pa.Table:
    """The segment's pictures in row order: tar, key, offset, size."""
    table = read_samples(store, segment)
    return table.filter(table["image_row"].is_valid()).select(["tar", "key", "offset", "size"])
