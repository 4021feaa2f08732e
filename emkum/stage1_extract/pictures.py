"""The pictures of the missing blocks, in row order, decoded by threads ahead of the networks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from emkum.errors import BadPicture
from emkum.shards.segments import Segment, read_samples
from emkum.shards.store import Store
from emkum.shards.tars import read_member
from emkum.shards.views import Box, ViewPolicy, box_for, decode_view
from emkum.stage1_extract.plan import Task


@dataclass(frozen=True)
class Picture:
    """Where one picture lies, and its identity."""

    tar: str
    key: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.tar}/{self.key}"


@dataclass(frozen=True)
class Decoded:
    """One picture of a batch: its crop, or why there is none."""

    picture: Picture
    crop: np.ndarray | None  # uint8 [size, size, 3]
    box: Box | None
    reason: str = ""


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of one block. `last`: the block is complete with it."""

    task: Task
    rows: tuple[Decoded, ...]
    last: bool


class PictureStream:
    """Iterates over the batches of `tasks`, decoding some batches ahead in `threads` threads.

    `tasks` may be lazy: the next one is asked for when its first picture is to be decoded.
    """

    def __init__(
        self, store: Store, tasks: Iterable[Task], paths: dict[str, str], size: int, batch_size: int, threads: int
    ) -> None:
        self._store, self._tasks, self._paths = store, tasks, paths
        self._size, self._batch_size = size, batch_size
        self._window = 4 * batch_size + threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._tables: dict[int, pa.Table] = {}  # of the segment at hand

    def __iter__(self) -> Iterator[Batch]:
        ahead: deque[tuple[Task, Future[Decoded]]] = deque()
        coming = ((task, picture) for task in self._tasks for picture in self._of(task))

        def submit() -> None:
            for task, picture in coming:
                ahead.append((task, self._pool.submit(self._decode, task.segment.views, task.view, picture)))
                if len(ahead) >= self._window:
                    break

        submit()
        while ahead:
            task, left = ahead[0][0], ahead[0][0].rows
            while left:
                count = min(self._batch_size, left)
                rows = []
                for _ in range(count):
                    rows.append(ahead.popleft()[1].result())
                    submit()
                left -= count
                yield Batch(task, tuple(rows), last=left == 0)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _of(self, task: Task) -> list[Picture]:
        if task.segment.number not in self._tables:
            self._tables = {task.segment.number: picture_table(self._store, task.segment)}
        table = self._tables[task.segment.number]
        table = table.slice(task.first_row - task.segment.image.first_row, task.rows)
        return [Picture(*line) for line in zip(*(column.to_pylist() for column in table.columns), strict=True)]

    def _decode(self, policy: ViewPolicy, view: int, picture: Picture) -> Decoded:
        data = read_member(self._paths[picture.tar], picture.offset, picture.size)
        try:
            crop, box = decode_view(
                data,
                self._size,
                lambda width, height: box_for(policy, picture.tar, picture.key, view, width, height),
            )
        except BadPicture as error:
            return Decoded(picture, None, None, error.what)
        return Decoded(picture, crop, box)


def picture_table(store: Store, segment: Segment) -> pa.Table:
    """The segment's pictures in row order: tar, key, offset, size."""
    table = read_samples(store, segment)
    return table.filter(table["image_row"].is_valid()).select(["tar", "key", "offset", "size"])
