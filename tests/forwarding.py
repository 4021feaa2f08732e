"""A reader that passes everything on: what tests of storage change a call of."""

from __future__ import annotations

from collections.abc import Sequence

from emkum.shards.store import RangeReader


class ForwardingReader:
    def __init__(self, file: RangeReader) -> None:
        self._file, self.size = file, file.size

    def expect_random(self) -> None:
        self._file.expect_random()

    def expect(self, offset: int, num_bytes: int) -> None:
        self._file.expect(offset, num_bytes)

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        return self._file.read_into(buffers, offset)
