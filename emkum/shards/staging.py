"""Buffers between a writer and the disk: filled, hashed and written at the same time, one after another."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

PIECE_BYTES = 4 << 20  # written at once: enough for a disk's full speed, a multiple of any disk's block
NUM_PIECES = 4  # one is filled, one written, and the hash may be two behind


class Staging:
    """A ring of page-aligned buffers, and the SHA-256 of all that passes through it.

    One thread fills and one hashes, so that the caller only writes; what fits in one buffer needs neither. What they
    fail with is raised by the next call.
    """

    def __init__(self) -> None:
        self.num_bytes = 0  # taken so far
        self._digest = hashlib.sha256()
        self._filler: ThreadPoolExecutor | None = None
        self._hasher: ThreadPoolExecutor | None = None
        self._buffers: list[memoryview] = []
        self._hashed: list[Future[None] | None] = []  # of each buffer, as long as it may not be filled again
        self._current = 0
        self._filled = 0  # bytes of the current buffer
        self._left = memoryview(b"")  # of the part that did not fit in

    def pieces(self, parts: Iterator[memoryview]) -> Iterator[memoryview]:
        """Takes all parts; gives out whole pieces to be written. Meanwhile a thread draws parts and fills the next.

        A piece stays as it is until the next one is asked for.
        """
        full: memoryview | None = None
        while True:
            if full is None:
                more = self._fill(parts)
            else:
                self._filler = self._filler or ThreadPoolExecutor(1, "stage")
                filling = self._filler.submit(self._fill, parts)
                yield full
                more = filling.result()
            if not more:
                return
            full = self._begin_hash()

    def rest(self) -> memoryview:
        """Gives out what is left, less than a piece."""
        return self._begin_hash() if self._filled else memoryview(b"")

    def hexdigest(self) -> str:
        """SHA-256 of all that was given out."""
        for number in range(len(self._buffers)):
            self._wait(number)
        return self._digest.hexdigest()

    def close(self) -> None:
        """Waits for the threads and ends them."""
        for thread in (self._filler, self._hasher):
            if thread is not None:
                thread.shutdown(cancel_futures=True)

    def _fill(self, parts: Iterator[memoryview]) -> bool:
        """Copies parts into the current buffer; False if they end before it is full."""
        if self._current == len(self._buffers):
            self._buffers.append(_aligned_buffer(huge=self._current > 0))  # of the first, small files touch one page
            self._hashed.append(None)
        self._wait(self._current)
        buffer = self._buffers[self._current]
        while self._filled < PIECE_BYTES:
            if not self._left:
                part = next(parts, None)
                if part is None:
                    self._left = memoryview(b"")  # an empty slice would hold on to what it is a slice of
                    return False
                self._left = part
                self.num_bytes += len(part)
            count = min(len(self._left), PIECE_BYTES - self._filled)
            buffer[self._filled : self._filled + count] = self._left[:count]
            self._filled += count
            self._left = self._left[count:]
        return True

    def _begin_hash(self) -> memoryview:
        """The current buffer's contents; the next buffer is the current one then."""
        piece = self._buffers[self._current][: self._filled]
        if self._hasher is None and self._filled < PIECE_BYTES:
            self._digest.update(piece)
        else:
            self._hasher = self._hasher or ThreadPoolExecutor(1, "sha256")
            self._hashed[self._current] = self._hasher.submit(self._digest.update, piece)
        self._current, self._filled = (self._current + 1) % NUM_PIECES, 0
        return piece

    def _wait(self, number: int) -> None:
        """Until what buffer `number` held is hashed."""
        hashed, self._hashed[number] = self._hashed[number], None
        if hashed is not None:
            hashed.result()


def _aligned_buffer(huge: bool) -> memoryview:
    """PIECE_BYTES from the start of a page. Touched first, huge pages cost a tenth, but two MiB at once."""
    memory = mmap.mmap(-1, PIECE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)
