"""Crops cut out of the source tars again, each as it was extracted: the same box of the same picture."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from emkum.errors import SourceChanged
from emkum.shards.tars import find_tars
from emkum.shards.views import Box, box_for, decode_view, replay_view

if TYPE_CHECKING:
    from emkum.shards.reader import Cache, Field
    from emkum.shards.segments import Segment


@dataclass(frozen=True)
class _Picture:
    """Where one picture lies, and its identity."""

    segment: Segment
    tar: str
    key: str
    offset: int
    size: int


class Replay:
    """The crops of some splits, by row and view, from where their tars lie now. Called from several threads at once.

    size: the side of the crops. data: where the tars lie; without it, where they lay at the extraction.
    Raises SourceChanged for a tar that is not there as it was.
    """

    def __init__(self, cache: Cache, splits: Sequence[str], size: int, data: Sequence[str] = ()) -> None:
        self.size = size
        self._paths: dict[str, dict[str, str]] = {split: _tar_paths(cache, split, data) for split in splits}
        self._boxes = {split: _boxes(cache, split) for split in splits}
        self._pictures: dict[int, _Picture] = {}
        for split in splits:
            self._pictures |= _pictures(cache, split)
        self._handles: dict[str, int] = {}
        self._lock = threading.Lock()

    def fill(self, rows_B: np.ndarray, views_B: np.ndarray, crops_BHWC: np.ndarray) -> None:
        """Writes the crops of these rows in those views, uint8 [B, size, size, 3]."""
        for place, (row, view) in enumerate(zip(rows_B.tolist(), views_B.tolist(), strict=True)):
            crops_BHWC[place] = self._crop(row, view)

    def _crop(self, row: int, view: int) -> np.ndarray:
        """uint8 [size, size, 3], the view as it was extracted."""
        picture = self._pictures[row]
        split = picture.segment.split
        data = os.pread(self._handle(self._paths[split][picture.tar]), picture.size, picture.offset)
        boxes = self._boxes[split]
        if boxes is not None:
            box = Box.from_row(boxes.read(np.array([row]), view)[0])
            return np.asarray(replay_view(data, self.size, box))
        policy = picture.segment.views
        crop, _ = decode_view(
            data, self.size, lambda width, height: box_for(policy, picture.tar, picture.key, view, width, height)
        )
        return np.asarray(crop)

    def _handle(self, path: str) -> int:
        with self._lock:
            if path not in self._handles:
                self._handles[path] = os.open(path, os.O_RDONLY)
            return self._handles[path]

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", {}).values():
            os.close(handle)


def _tar_paths(cache: Cache, split: str, data: Sequence[str]) -> dict[str, str]:
    """Where each source tar of the split lies. Raises SourceChanged for one that is not there with its length."""
    given = {os.path.basename(path): path for path in find_tars(data)} if data else {}
    paths = {}
    for segment in cache.segments:
        for source in segment.sources if segment.split == split else ():
            path = given.get(source.tar, source.path)
            if not os.path.isfile(path) or os.path.getsize(path) != source.bytes:
                raise SourceChanged(
                    f"{source.tar}, which {cache.path} was extracted from, is not at {path} with {source.bytes} bytes",
                    "say where it lies: --data FOLDER; or train from the cache, without --live; a student of pixels "
                    "from a cache with crops",
                )
            paths[source.tar] = path
    return paths


def _pictures(cache: Cache, split: str) -> dict[int, _Picture]:
    """The pictures of the split by row."""
    found = {}
    samples = cache.samples(split)
    samples = samples.filter(samples.column("image_row").is_valid())
    segments = {source.tar: segment for segment in cache.segments for source in segment.sources}
    columns = (samples.column(name).to_pylist() for name in ("image_row", "tar", "key", "offset", "size"))
    for row, tar, key, offset, size in zip(*columns, strict=True):
        found[row] = _Picture(segments[tar], tar, key, offset, size)
    return found


def _boxes(cache: Cache, split: str) -> Field | None:
    """The stored boxes of the split's view policy."""
    policies = {segment.views.name for segment in cache.segments if segment.split == split and segment.image.rows}
    names = [f"views/{policy}/boxes" for policy in policies]
    return cache.fields.get(names[0]) if len(names) == 1 else None
