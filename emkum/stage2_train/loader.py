"""Batches from a cache: threads of this process read ahead into a ring of buffers.

B batch, T tokens, L text tokens, D width, N samples, V views.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from emkum.errors import ResumeMismatch
from emkum.models.quantise import decode_int8
from emkum.models.targets import LayersRule, recorded_rule
from emkum.shards.shard_files import ReadThreads
from emkum.stage2_train.mixing import MixingBuffer
from emkum.stage2_train.order import BatchRows, Order
from emkum.stage2_train.samples import SampleTable

if TYPE_CHECKING:
    from emkum.shards.reader import Cache, Field
    from emkum.stage2_train.recipe_fields import FieldNames
    from emkum.stage2_train.replay import Replay

LOOK_UP_SECONDS = 0.2  # how often a loader that waits looks up


# --- from rows to tensors ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """Numbers as the cache stores them, on the host; `scale` for int8 only. longest: positions used of texts."""

    values: Tensor
    scale: Tensor | None = None
    longest: int | None = None


@dataclass(frozen=True)
class HostBatch:
    """A batch as read: rows, inputs (tokens or crops), ids with lengths, targets by role. None for what it lacks."""

    rows: BatchRows
    inputs: Stored | None
    ids_BL: Tensor | None
    lengths_B: Tensor | None
    targets: Mapping[str, Stored]
    buffers: Buffers

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_bytes(self) -> int:
        """Of its numbers."""
        read = [self.inputs, *self.targets.values()]
        stored = [tensor for one in read if one for tensor in (one.values, one.scale)]
        return sum(tensor.nbytes for tensor in (*stored, self.ids_BL) if tensor is not None)


@dataclass(frozen=True)
class Batch:
    """A batch on the device, ready for the student. tokens_BTD and targets are float32; mask_BL True = real token.

    targets, by role (`recipe.target_roles`): [B, D] for pooled fields, [B, T, D] or [B, L, D] for token fields.
    layers_rules, by role: which layers of the teacher they are the mean of, where that is not the rule of the thesis.
    top_logits: the logits are `models.targets.packed`. images_BCHW: of a student of pixels, in place of tokens_BTD.
    """

    image_rows_B: Tensor | None
    views_B: Tensor | None
    tokens_BTD: Tensor | None
    ids_BL: Tensor | None
    mask_BL: Tensor | None
    targets: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    layers_rules: Mapping[str, LayersRule] = dataclasses.field(default_factory=dict)
    top_logits: bool = False
    images_BCHW: Tensor | None = None

    @property
    def pictures(self) -> Tensor | None:
        """What the student reads of pictures: tokens_BTD, or images_BCHW."""
        return self.tokens_BTD if self.images_BCHW is None else self.images_BCHW

    def __len__(self) -> int:
        first = self.pictures if self.pictures is not None else self.ids_BL
        assert first is not None
        return len(first)


class Buffers:
    """Host memory of one slot of the ring, reused from batch to batch; pinned for a GPU."""

    def __init__(self, pin: bool) -> None:
        self.pin = pin
        self._tensors: dict[str, Tensor] = {}
        self.copied: torch.cuda.Event | None = None  # set when the copies to the device have been queued

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor of at most this slot's largest batch so far."""
        held = self._tensors.get(name)
        if held is None or held.dtype != dtype or held.shape[1:] != shape[1:] or len(held) < shape[0]:
            held = torch.empty(shape, dtype=dtype, pin_memory=self.pin)
            self._tensors[name] = held
        return held[: shape[0]]

    def wait_until_free(self) -> None:
        """Block until the device has read what lies here."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None

    def mark_copied(self, device: torch.device) -> None:
        """Remember that copies from here were queued on the device's current stream."""
        if device.type == "cuda":
            self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.copied.record(torch.cuda.current_stream(device))


class BatchSource(Protocol):
    """Where tensors come from: the cache, or the frozen networks running live. Both give the same batches.

    fresh_targets: a batch's targets are computed anew, so a bank that holds them already is to use the new ones.
    """

    fresh_targets: bool
    reading: ReadThreads | None  # what shares the reading of a batch; counts what it spends
    batches_at_once: int  # that are best read side by side
    mixing_bytes: int  # memory that whole blocks take, at most

    def expect(self, rows: BatchRows) -> None:
        """A batch of these rows will be read soon."""
        ...

    def close(self) -> None:
        """Nothing will be read any more."""
        ...

    def read(self, rows: BatchRows, buffers: Buffers) -> HostBatch:
        """The batch on the host. Called from several threads at once."""
        ...

    def prepare(self, host: HostBatch, device: torch.device) -> Batch:
        """The batch on the device, decoded. Called from the training loop."""
        ...

    def all_targets(self) -> Tensor:
        """The teacher's CLS of every row and view of the table, float32 [N, V, D], on the host."""
        ...


Prefix = Callable[[Tensor], Tensor]


class CachedSource:
    """Reads a recipe's fields from the cache. Pooled targets of the table's rows are held in RAM whole.

    prefix: for crops, a callable from uint8 crops [B, y, x, 3] on the device to tokens_BTD: the frozen network up to
    the cut; of a student of pixels, to images_BCHW (pixels.py). replay: of such a student where the cache keeps no
    crops. threads: share the reading of each batch; 0: the calling thread reads alone. held_blocks: for an order of
    whole blocks, how many of them are held in memory (mixing.blocks_held); 0: rows are read one by one.
    """

    fresh_targets = False
    batches_at_once = 2  # so that the pieces of one fill the pauses of the other

    def __init__(
        self,
        cache: Cache,
        names: FieldNames,
        table: SampleTable | None,
        prefix: Prefix | None = None,
        *,
        threads: int = 0,
        held_blocks: int = 0,
        replay: Replay | None = None,
    ) -> None:
        self.replay, self.reads_pixels = replay, bool(names.crop_size)
        if replay is not None:
            self.batches_at_once = max(2, threads)  # each thread decodes the pictures of one
        self.inputs = cache.field(names.inputs) if names.inputs else None
        self.ids = cache.field(names.ids) if names.ids else None
        self.targets = {role: cache.field(name) for role, name in names.targets.items()}
        rules = {role: other_layers_rule(field) for role, field in self.targets.items()}
        self.layers_rules = {role: rule for role, rule in rules.items() if rule is not None}
        self.top_logits = "logits" in self.targets and self.targets["logits"].kind == "top_logits"
        self.prefix = prefix
        self.decode: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = decode_int8  # or a compiled one
        self.reading = ReadThreads(threads) if threads else None
        self._mixed: dict[str, MixingBuffer] = {}
        if held_blocks:
            for field in (self.inputs, *self.targets.values()):
                if field is not None and field.spec.sharded:
                    self._mixed[field.name] = MixingBuffer(field, cache.rows_per_block, held_blocks)
        self.mixing_bytes = sum(mixed.capacity_bytes for mixed in self._mixed.values())
        self.pooled = {
            role: PooledTargets(field, table)
            for role, field in self.targets.items()
            if field.kind in ("pooled", "top_logits") and table is not None
        }
        self._statistics: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._queued: dict[torch.device, torch.cuda.Event] = {}  # all steps up to the one before the last batch

    def expect(self, rows: BatchRows) -> None:
        for mixed in self._mixed.values():
            wanted, views = _rows_in(mixed.field, rows)
            if wanted is not None:
                mixed.expect(wanted, views)

    def read(self, rows: BatchRows, buffers: Buffers) -> HostBatch:
        buffers.wait_until_free()
        inputs = ids = lengths = None
        if self.inputs is not None and rows.image_rows_B is not None:
            inputs = self._read_stored(self.inputs, rows, "inputs", buffers)
        elif self.replay is not None and rows.image_rows_B is not None:
            inputs = self._replayed(self.replay, rows, buffers)
        if self.ids is not None and rows.text_rows_B is not None:
            ids, lengths = self._read_ids(rows.text_rows_B, buffers)
        targets = {role: self._read_targets(role, rows, lengths, buffers) for role in self.targets}
        return HostBatch(rows, inputs, ids, lengths, targets, buffers)

    def _replayed(self, replay: Replay, rows: BatchRows, buffers: Buffers) -> Stored:
        """The crops of a batch, cut out of the tars again."""
        assert rows.image_rows_B is not None
        assert rows.views_B is not None
        crops = buffers.tensor("crops", (len(rows), replay.size, replay.size, 3), torch.uint8)
        replay.fill(rows.image_rows_B, rows.views_B, crops.numpy())
        return Stored(crops)

    def _read_ids(self, rows: np.ndarray, buffers: Buffers) -> tuple[Tensor, Tensor]:
        """int64 ids trimmed to the longest text of the batch, and the lengths."""
        assert self.ids is not None
        lengths = buffers.tensor("lengths", (len(rows),), torch.int64)
        lengths.numpy()[:] = self.ids.lengths(rows)
        longest = max(1, int(lengths.max()))
        ids = buffers.tensor("ids", (len(rows) * longest,), torch.int64).view(len(rows), longest)
        ids.numpy()[:] = self.ids.read(rows)[:, :longest]
        return ids, lengths

    def all_targets(self) -> Tensor:
        return torch.from_numpy(self.pooled["cls"].values_NVD).float()

    def _read_targets(self, role: str, rows: BatchRows, lengths: Tensor | None, buffers: Buffers) -> Stored:
        field = self.targets[role]
        wanted, _ = _rows_in(field, rows)
        assert wanted is not None, f"{role} of a batch without rows of {field.space}s"
        if role in self.pooled:
            assert rows.views_B is not None
            held = self.pooled[role]
            pooled = buffers.tensor(role, (len(wanted), held.width), held.dtype)
            held.take(wanted, rows.views_B, pooled.numpy())
            return Stored(pooled)
        if field.kind == "top_logits":
            return Stored(torch.from_numpy(packed_rows(field, wanted, 0 if rows.views_B is None else rows.views_B)))
        stored = self._read_stored(field, rows, role, buffers)
        if field.space == "image":
            return stored
        assert lengths is not None
        return dataclasses.replace(stored, longest=int(lengths.max()))

    def _read_stored(self, field: Field, rows: BatchRows, name: str, buffers: Buffers) -> Stored:
        wanted, views = _rows_in(field, rows)
        assert wanted is not None
        values = buffers.tensor(name, (len(wanted), *field.row_shape), getattr(torch, field.storage))
        mixed = self._mixed.get(field.name)
        if mixed is not None:
            mixed.take(wanted, views, values.numpy())
        else:
            field.read(wanted, views, out=values.numpy(), threads=self.reading)
        if field.storage != "int8":
            return Stored(values)
        scale = buffers.tensor(f"{name} scale", (len(wanted), *field.row_shape[:-1]), torch.float32)
        field.read_scale(wanted, views, out=scale.numpy())
        return Stored(values, scale)

    def close(self) -> None:
        """Ends its threads, and frees the blocks it holds."""
        for mixed in self._mixed.values():
            mixed.close()
        if self.reading is not None:
            self.reading.close()

    def prepare(self, host: HostBatch, device: torch.device) -> Batch:
        if device.type != "cuda":
            return self._with_prefix(self._moved(host, device))
        # On a stream of its own, so that the copies of the next batch run beside the step of this one.
        compute = torch.cuda.current_stream(device)
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        copies = self._streams[device]
        if device in self._queued:  # no more than two batches ahead of the steps, or memory fills with them
            copies.wait_event(self._queued[device])
        self._queued[device] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._queued[device].record(compute)
        with torch.cuda.stream(copies):
            batch = self._moved(host, device)
        compute.wait_stream(copies)
        whole = (getattr(batch, spec.name) for spec in dataclasses.fields(batch))
        for tensor in (*whole, *batch.targets.values()):
            if isinstance(tensor, Tensor):
                tensor.record_stream(compute)
        return self._with_prefix(batch)

    def _moved(self, host: HostBatch, device: torch.device) -> Batch:
        """The batch on the device and decoded, but for crops, which stay what they are in place of tokens."""
        image_rows, views, ids, mask = self._common(host, device)
        tokens = None
        if host.inputs is not None and (self.inputs is None or self.inputs.kind == "crops"):
            tokens = _to(host.inputs.values, device)
        elif host.inputs is not None and self.inputs is not None:
            tokens = self._decode(self.inputs, host.inputs, device)
        targets = {role: self._decode(self.targets[role], stored, device) for role, stored in host.targets.items()}
        host.buffers.mark_copied(device)
        return Batch(image_rows, views, tokens, ids, mask, targets, self.layers_rules, self.top_logits)

    def _with_prefix(self, batch: Batch) -> Batch:
        if batch.tokens_BTD is None or (self.inputs is not None and self.inputs.kind != "crops"):
            return batch
        assert self.prefix is not None
        if self.reads_pixels:
            return dataclasses.replace(batch, tokens_BTD=None, images_BCHW=self.prefix(batch.tokens_BTD))
        return dataclasses.replace(batch, tokens_BTD=self.prefix(batch.tokens_BTD))

    def _common(
        self, host: HostBatch, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Image rows, views, ids and mask on the device."""
        image_rows = views = ids = mask = None
        if host.rows.image_rows_B is not None and host.rows.views_B is not None:
            image_rows = _to(torch.from_numpy(host.rows.image_rows_B), device)
            views = _to(torch.from_numpy(host.rows.views_B), device)
        if host.ids_BL is not None and host.lengths_B is not None:
            ids, lengths = _to(host.ids_BL, device), _to(host.lengths_B, device)
            mask = torch.arange(ids.shape[1], device=device)[None, :] < lengths[:, None]
        return image_rows, views, ids, mask

    def _decode(self, field: Field, stored: Stored, device: torch.device) -> Tensor:
        """float32 on the device: value = (stored * scale) * std + mean for int8 (docs/format.md, section 4)."""
        values = _to(stored.values, device)[:, : stored.longest]  # whole, as pinned memory is only copied in one piece
        if stored.scale is None:
            return values.float()
        scale = _to(stored.scale, device)[:, : stored.longest]
        mean, std = self._channel_statistics(field, device)
        return self.decode(values, scale, mean, std)

    def _channel_statistics(self, field: Field, device: torch.device) -> tuple[Tensor, Tensor]:
        key = (field.name, device)
        if key not in self._statistics:
            mean, std = (torch.tensor(array, device=device) for array in (field.mean, field.std))
            self._statistics[key] = (mean, std)
        return self._statistics[key]


def other_layers_rule(field: Field | None) -> LayersRule | None:
    """The rule of a field of layers that does not follow the thesis's; None for every other field."""
    if field is None or field.fingerprint.get("layers") is None:
        return None
    return recorded_rule(field.fingerprint, field.space)


class PooledTargets:
    """A pooled field of one split in RAM, every usable row and view: float16 as stored, or float32.

    The largest logits lie there in float32, with their classes, as `packed_rows` makes them.
    """

    def __init__(self, field: Field, table: SampleTable) -> None:
        assert table.image_rows_N is not None
        self.rows_N = table.image_rows_N
        as_stored, is_top = field.storage == "float16", field.kind == "top_logits"
        self.width = 2 * field.row_shape[0] - 1 if is_top else field.row_shape[0]
        dtype = np.float16 if as_stored and not is_top else np.float32
        self.values_NVD = np.empty((len(self.rows_N), table.num_views, self.width), dtype)
        for view in range(table.num_views):
            for start in range(0, len(self.rows_N), 65536):
                rows = self.rows_N[start : start + 65536]
                read = functools.partial(packed_rows, field) if is_top else field.read if as_stored else field.values
                self.values_NVD[start : start + len(rows), view] = read(rows, view)
            field.forget_plain()  # what was read lies in values_NVD now

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.values_NVD.dtype == np.float16 else torch.float32

    def take(self, rows_B: np.ndarray, views_B: np.ndarray, out_BD: np.ndarray) -> None:
        """Fills [B, D] with the rows in those views."""
        places_B = np.minimum(np.searchsorted(self.rows_N, rows_B), len(self.rows_N) - 1)
        assert np.array_equal(self.rows_N[places_B], rows_B), "rows that the table does not have"
        num_views = self.values_NVD.shape[1]
        flat_MD = self.values_NVD.reshape(-1, self.values_NVD.shape[-1])
        flat_MD.take(places_B * num_views + views_B, axis=0, out=out_BD, mode="clip")


def packed_rows(field: Field, rows: np.ndarray, views: np.ndarray | int) -> np.ndarray:
    """float32 [N, 2K + 1] of a field of the largest logits, laid out as by `emkum.models.targets.packed`."""
    return np.concatenate([field.values(rows, views), field.classes(rows, views).astype(np.float32)], axis=1)


def _rows_in(field: Field, rows: BatchRows) -> tuple[np.ndarray | None, np.ndarray | int]:
    """The batch's rows, and their views, in the field's space."""
    if field.space == "text":
        return rows.text_rows_B, 0
    return rows.image_rows_B, 0 if rows.views_B is None else rows.views_B


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)


# --- the loader --------------------------------------------------------------------------------------------------


class BatchLoader:
    """Batches of an order, read ahead by threads into a ring of buffers. Sized, and resumable at every batch.

    A batch's memory is reused two batches later: whoever keeps one longer copies it. threads: batches read at once (how
    many threads share one batch is the source's); 0: read when asked, in the caller's thread. `while_waiting` is called
    several times a second while the consumer waits and may raise, to give up on storage that does not answer.

    Counted: waited_seconds, that the consumer stood waiting; rows_read and bytes_read; read_seconds, that threads spent
    on reading, all of them together, and busy_seconds, what of that they were on a processor.
    """

    def __init__(
        self, order: Order, source: BatchSource, *, threads: int = 2, prefetch: int = 3, pin: bool = False
    ) -> None:
        self.order, self.source = order, source
        self.threads, self.prefetch, self.pin = threads, prefetch if threads else 0, pin
        self.step = 0  # batches handed out so far
        self.waited_seconds = 0.0
        self.rows_read = self.bytes_read = 0
        self._read_seconds = self._busy_seconds = 0.0  # of the threads that read a batch each
        self._counting = threading.Lock()
        self.while_waiting: Callable[[], None] = lambda: None

    @property
    def read_seconds(self) -> float:
        reading = self.source.reading
        return reading.seconds if reading is not None and reading.seconds else self._read_seconds

    @property
    def busy_seconds(self) -> float:
        reading = self.source.reading
        return reading.busy_seconds if reading is not None and reading.seconds else self._busy_seconds

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[HostBatch]:
        """From the batch after the last one handed out to the end of the order."""
        slots = [Buffers(self.pin) for _ in range(self.prefetch + 2)]  # read ahead, awaited, and still in use
        pool = ThreadPoolExecutor(self.threads or 1, thread_name_prefix="emkum-loader")
        pending: deque[Future[HostBatch]] = deque()
        submitted = expected = self.step
        try:
            while self.step < len(self.order):
                while submitted < min(len(self.order), self.step + 1 + self.prefetch):
                    rows = self.order.rows(submitted)
                    buffers = slots[submitted % len(slots)]
                    if self.threads:
                        pending.append(pool.submit(self._read, rows, buffers))
                    else:
                        pending.append(read_now(self._read, rows, buffers))
                    submitted += 1
                ahead = min(len(self.order), submitted + self.order.look_ahead)
                for step in range(max(expected, submitted), ahead):
                    self.source.expect(self.order.rows(step))
                expected = max(expected, ahead)
                batch = self._awaited(pending.popleft())
                self.step += 1
                yield batch
        finally:  # after the last batch no thread reads; whoever leaves before it may do so because one of them hangs
            pool.shutdown(wait=self.step == len(self.order), cancel_futures=True)

    def _read(self, rows: BatchRows, buffers: Buffers) -> HostBatch:
        began, began_busy = time.perf_counter(), time.thread_time()
        batch = self.source.read(rows, buffers)
        with self._counting:
            self._read_seconds += time.perf_counter() - began
            self._busy_seconds += time.thread_time() - began_busy
            self.rows_read += len(rows)
            self.bytes_read += batch.num_bytes
        return batch

    def _awaited(self, reading: Future[HostBatch]) -> HostBatch:
        asked = time.perf_counter()
        while not wait([reading], timeout=LOOK_UP_SECONDS).done:
            self.while_waiting()
        self.waited_seconds += time.perf_counter() - asked
        return reading.result()

    def state_dict(self) -> dict[str, int]:
        """Where to go on: the number of batches handed out, and the length it belongs to."""
        return {"step": self.step, "num_steps": len(self.order)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ResumeMismatch when the state is of an order of another length."""
        if state["num_steps"] != len(self.order):
            raise ResumeMismatch(
                f"the checkpoint is of a run of {state['num_steps']} steps; this one has {len(self.order)}",
                "resume with the recipe, batch and cache it was started with",
            )
        self.step = state["step"]


def read_now(read: Callable[[BatchRows, Buffers], HostBatch], rows: BatchRows, buffers: Buffers) -> Future[HostBatch]:
    """What a pool's `submit` does, in the thread that calls."""
    done: Future[HostBatch] = Future()
    done.set_result(read(rows, buffers))
    return done
