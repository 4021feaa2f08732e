"""The sounds of the missing blocks, in row order, decoded by threads ahead of the networks.

N rows, S samples of the wave.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from emkum.errors import BadSound
from emkum.shards.segments import Segment, read_sounds
from emkum.shards.sounds import Sound, decode_sound
from emkum.shards.store import Store
from emkum.shards.tars import read_member
from emkum.stage1_extract.plan import Plan, Task

BATCH_SECONDS = 160  # of sound in one forward pass, pads counted: attention takes memory by the square of a clip's


@dataclass(frozen=True)
class Clip:
    """Its row in the cache, its identity, and where it lies in its tar."""

    row: int
    tar: str
    key: str
    offset: int
    size: int
    ext: str

    @property
    def name(self) -> str:
        return f"{self.tar}/{self.key}"


@dataclass(frozen=True)
class Heard:
    """One clip of a batch: its sound, or why there is none."""

    clip: Clip
    sound: Sound | None
    reason: str = ""


@dataclass(frozen=True)
class Ears:
    """How sounds are decoded. paths: tar name -> where it lies. least_samples: shorter ones give no frame."""

    paths: Mapping[str, str]
    rate: int
    max_seconds: float
    least_samples: int

    def hear(self, clip: Clip) -> Heard:
        """Decodes one clip. Called in threads."""
        data = read_member(self.paths[clip.tar], clip.offset, clip.size)
        try:
            sound = decode_sound(data, clip.ext, self.rate, self.max_seconds)
        except BadSound as error:
            return Heard(clip, None, error.what)
        found, least = len(sound.samples_S), self.least_samples
        if found < least:
            lasts = f"lasts {1000 * found / self.rate:.1f} ms; one frame takes {1000 * least / self.rate:g} ms"
            return Heard(clip, None, lasts)
        return Heard(clip, sound)


def ears_of(plan: Plan) -> Ears:
    assert plan.audio_pass is not None
    return Ears(plan.paths, plan.audio_pass.rate, plan.config.max_seconds, plan.audio_pass.least_samples)


@dataclass(frozen=True)
class SoundBatch:
    """Consecutive rows of one block. `last`: the block is complete with it."""

    task: Task
    rows: tuple[Heard, ...]
    last: bool


def waves(sounds: Sequence[Sound]) -> tuple[np.ndarray, list[int]]:
    """float32 [N, S], zero past each sound's samples, and how many those are."""
    num_samples = [len(sound.samples_S) for sound in sounds]
    waves_NS = np.zeros((len(sounds), max(num_samples)), np.float32)
    for i, sound in enumerate(sounds):
        waves_NS[i, : num_samples[i]] = sound.samples_S
    return waves_NS, num_samples


class SoundStream:
    """Iterates over the batches of `tasks`: at most `batch_size` rows, and BATCH_SECONDS or one row.

    `tasks` may be lazy: the next one is asked for when its first sound is to be decoded.
    """

    def __init__(self, store: Store, tasks: Iterable[Task], ears: Ears, batch_size: int, threads: int) -> None:
        self._store, self._tasks, self._ears = store, tasks, ears
        self._batch_size = batch_size
        self._window = 2 * batch_size + threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._table: tuple[int, pa.Table] | None = None  # of the segment at hand

    def __iter__(self) -> Iterator[SoundBatch]:
        ahead: deque[tuple[Task, Future[Heard]]] = deque()
        coming = ((task, clip) for task in self._tasks for clip in self._of(task))

        def submit() -> None:
            for task, clip in coming:
                ahead.append((task, self._pool.submit(self._ears.hear, clip)))
                if len(ahead) >= self._window:
                    break

        submit()
        while ahead:
            task, left = ahead[0][0], ahead[0][0].rows
            rows: list[Heard] = []
            longest = 0
            while left:
                heard = ahead.popleft()[1].result()
                submit()
                samples = 0 if heard.sound is None else len(heard.sound.samples_S)
                if rows and self._is_full(len(rows), max(longest, samples)):
                    yield SoundBatch(task, tuple(rows), last=False)
                    rows, longest = [], 0
                rows.append(heard)
                longest = max(longest, samples)
                left -= 1
            yield SoundBatch(task, tuple(rows), last=True)

    def _is_full(self, rows: int, longest: int) -> bool:
        """Whether one more row, after which the longest has so many samples, would be too much."""
        return rows >= self._batch_size or (rows + 1) * longest > BATCH_SECONDS * self._ears.rate

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _of(self, task: Task) -> Iterator[Clip]:
        if self._table is None or self._table[0] != task.segment.number:
            self._table = task.segment.number, sound_table(self._store, task.segment)
        table = self._table[1].slice(task.first_row - task.segment.audio.first_row, task.rows)
        lines = zip(*(column.to_pylist() for column in table.columns), strict=True)
        for i, line in enumerate(lines):
            yield Clip(task.first_row + i, *line)


def sound_table(store: Store, segment: Segment) -> pa.Table:
    """The segment's sounds in row order: tar, key, offset, size, ext."""
    return read_sounds(store, segment).select(["tar", "key", "offset", "size", "ext"])
