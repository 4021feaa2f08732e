"""Batches from a cache: threads of this process read ahead, in an order that is a pure function of seed and epoch.

B batch, T tokens, L text tokens, D width, N samples, M captions, V views.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from emkum.errors import IncompleteCache, NoData, ResumeMismatch, UsageError

if TYPE_CHECKING:
    from emkum.shards.reader import Cache, Field
    from emkum.stage2_train.recipe import FieldNames, Recipe

Kind = Literal["pairs", "images", "texts"]
LOOK_UP_SECONDS = 0.2  # how often a loader that waits looks up


# --- which rows --------------------------------------------------------------------------------------------------


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
) -> SampleTable:
    """Which rows of `split` can be read for the recipe.

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
    if not table.num_samples:
        raise NoData(
            f"split {split!r} of {cache.path} has no row that all of {', '.join(names.needed())} hold",
            f"run emkum extract --cache {cache.path} --split {split} again to finish them",
        )
    return table


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
    captions = cache.captions(split)
    paired = captions.filter(captions.column("image_row").is_valid())
    caption_rows = paired.column("text_row").to_numpy()
    image_of = paired.column("image_row").to_numpy()
    usable = np.isin(caption_rows, text_rows) & np.isin(image_of, image_rows)
    caption_rows, image_of = caption_rows[usable], image_of[usable]
    grouped = np.lexsort((caption_rows, image_of))
    pictures, first = np.unique(image_of[grouped], return_index=True)
    return pictures, caption_rows[grouped], np.append(first, len(caption_rows))


# --- in which order ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchRows:
    """The rows of one batch, int64 [B] each; None for a modality it lacks."""

    image_rows_B: np.ndarray | None
    views_B: np.ndarray | None
    text_rows_B: np.ndarray | None

    def __len__(self) -> int:
        rows = self.text_rows_B if self.image_rows_B is None else self.image_rows_B
        assert rows is not None
        return len(rows)


class Order(Protocol):
    """Which rows batch `step` holds, for every step of a pass."""

    def __len__(self) -> int: ...
    def rows(self, step: int) -> BatchRows: ...


class TrainOrder:
    """Shuffled batches over all epochs: batch `step` is a pure function of (table, batch, captions, seed, step).

    Every epoch is shuffled anew from (seed, epoch). Its last partial batch is left out: a contrastive batch of
    another size has another loss. Captions "one": each picture once an epoch, with one of its captions drawn; "all":
    each caption once.

    Ranks share each batch: rank r of n has its r-th part of batch / n rows, so that the parts put together are the
    batch of one rank, and all ranks have equally many batches of equally many rows: a collective call in every step
    never waits for a rank that has run out. `left_over`: the samples of each shuffle that are left out.
    """

    def __init__(
        self,
        table: SampleTable,
        batch: int,
        seed: int,
        captions: Literal["one", "all"] = "one",
        num_steps: int = 0,
        *,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """batch: of all ranks together. num_steps: the length of the order; 0 stands for one epoch.

        Raises UsageError if no batch can be filled, or if it cannot be shared out evenly among the ranks.
        """
        self.table, self.batch, self.seed, self.captions = table, batch, seed, captions
        self.part = rank_part(batch, rank, num_ranks)
        units = table.num_samples
        if captions == "all" and table.kind == "pairs":
            assert table.text_rows_M is not None
            units = len(table.text_rows_M)
        self.steps_per_epoch = units // batch
        if not self.steps_per_epoch:
            raise UsageError(
                f"a batch of {batch} is more than the {units} samples of split {table.split!r}",
                f"use a smaller one: --set training.batch={max(1, units // 2)}",
            )
        self.units = units
        self.left_over = units - self.steps_per_epoch * batch
        self.num_steps = num_steps or self.steps_per_epoch
        self._epoch = -1
        self._rows: tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None] = (None, None, None)

    def __len__(self) -> int:
        return self.num_steps

    def rows(self, step: int) -> BatchRows:
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._rows, self._epoch = self._shuffled(epoch), epoch
        start = place * self.batch
        here = slice(start + self.part.start, start + self.part.stop)
        images, views, texts = (rows[here] if rows is not None else None for rows in self._rows)
        return BatchRows(images, views, texts)

    def _shuffled(self, epoch: int) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        table = self.table
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
        order = random.permutation(self.units)
        if table.kind == "texts":
            assert table.text_rows_M is not None
            return None, None, table.text_rows_M[order]
        views = random.integers(table.num_views, size=self.units)
        assert table.image_rows_N is not None
        if table.kind == "images":
            return table.image_rows_N[order], views, None
        assert table.text_rows_M is not None
        assert table.first_caption_N is not None
        if self.captions == "all":
            picture = np.searchsorted(table.first_caption_N, order, side="right") - 1
            return table.image_rows_N[picture], views, table.text_rows_M[order]
        counts = np.diff(table.first_caption_N)[order]
        caption = table.first_caption_N[:-1][order] + random.integers(counts)
        return table.image_rows_N[order], views, table.text_rows_M[caption]


def rank_part(batch: int, rank: int, num_ranks: int) -> range:
    """Which rows of each batch a rank has. Raises UsageError where ranks would get unequal parts."""
    if not 0 <= rank < num_ranks:
        raise UsageError(f"rank {rank} of {num_ranks} ranks", "ranks are numbered from 0, and there is at least one")
    if batch < num_ranks:
        raise UsageError(
            f"a batch of {batch} is less than one sample for each of {num_ranks} ranks",
            f"use a larger one: --set training.batch={num_ranks}",
        )
    if batch % num_ranks:
        raise UsageError(
            f"a batch of {batch} cannot be shared out evenly among {num_ranks} ranks",
            f"use a multiple of {num_ranks}: --set training.batch={-(-batch // num_ranks) * num_ranks}",
        )
    share = batch // num_ranks
    return range(rank * share, (rank + 1) * share)


class PassOrder:
    """Every row once, in ascending order, the last partial batch included: for evaluation. View 0."""

    def __init__(self, image_rows: np.ndarray | None, text_rows: np.ndarray | None, batch: int) -> None:
        self.image_rows, self.text_rows, self.batch = image_rows, text_rows, batch
        rows = text_rows if image_rows is None else image_rows
        assert rows is not None
        self.num_rows = len(rows)

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch)

    def rows(self, step: int) -> BatchRows:
        here = slice(step * self.batch, (step + 1) * self.batch)
        images = self.image_rows[here] if self.image_rows is not None else None
        views = np.zeros(len(images), np.int64) if images is not None else None
        return BatchRows(images, views, self.text_rows[here] if self.text_rows is not None else None)


# --- from rows to tensors ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """Numbers as the cache stores them, on the host; `scale` for int8 only."""

    values: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True)
class HostBatch:
    """A batch as read: rows, inputs (tokens or crops), ids with lengths, targets. None for what it lacks."""

    rows: BatchRows
    inputs: Stored | None
    ids_BL: Tensor | None
    lengths_B: Tensor | None
    targets: Stored | None
    buffers: Buffers

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Batch:
    """A batch on the device, ready for the student. tokens_BTD and targets are float32; mask_BL True = real token.

    targets: [B, D] for pooled fields, [B, T, D] or [B, L, D] for token fields.
    """

    image_rows_B: Tensor | None
    views_B: Tensor | None
    tokens_BTD: Tensor | None
    ids_BL: Tensor | None
    mask_BL: Tensor | None
    targets: Tensor | None

    def __len__(self) -> int:
        first = self.tokens_BTD if self.tokens_BTD is not None else self.ids_BL
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

    def read(self, rows: BatchRows, buffers: Buffers) -> HostBatch:
        """The batch on the host. Called from several threads at once."""
        ...

    def prepare(self, host: HostBatch, device: torch.device) -> Batch:
        """The batch on the device, decoded. Called from the training loop."""
        ...

    def all_targets(self) -> Tensor:
        """The pooled targets of every row and view of the table, float32 [N, V, D], on the host."""
        ...


Prefix = Callable[[Tensor], Tensor]


class CachedSource:
    """Reads a recipe's fields from the cache. Pooled targets of the table's rows are held in RAM whole.

    prefix: for crops, a callable from uint8 crops [B, y, x, 3] on the device to tokens_BTD: the frozen network up to
    the cut.
    """

    fresh_targets = False

    def __init__(
        self, cache: Cache, names: FieldNames, table: SampleTable | None, prefix: Prefix | None = None
    ) -> None:
        self.inputs = cache.field(names.inputs) if names.inputs else None
        self.ids = cache.field(names.ids) if names.ids else None
        self.targets = cache.field(names.targets) if names.targets else None
        self.prefix = prefix
        pooled = self.targets is not None and self.targets.kind == "pooled"
        self.pooled = PooledTargets(self.targets, table) if pooled and self.targets and table else None
        self._statistics: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    def read(self, rows: BatchRows, buffers: Buffers) -> HostBatch:
        buffers.wait_until_free()
        inputs = targets = ids = lengths = None
        if self.inputs is not None and rows.image_rows_B is not None:
            inputs = _read_stored(self.inputs, rows.image_rows_B, rows.views_B, "inputs", buffers)
        if self.ids is not None and rows.text_rows_B is not None:
            ids, lengths = self._read_ids(rows.text_rows_B)
        if self.targets is not None:
            targets = self._read_targets(self.targets, rows, lengths, buffers)
        return HostBatch(rows, inputs, ids, lengths, targets, buffers)

    def _read_ids(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """int64 ids trimmed to the longest text of the batch, and the lengths."""
        assert self.ids is not None
        lengths = self.ids.lengths(rows)
        longest = max(1, int(lengths.max()))
        ids = self.ids.read(rows)[:, :longest].astype(np.int64)
        return torch.from_numpy(ids), torch.from_numpy(lengths.astype(np.int64))

    def all_targets(self) -> Tensor:
        assert self.pooled is not None
        return torch.from_numpy(self.pooled.values_NVD).float()

    def _read_targets(self, field: Field, rows: BatchRows, lengths: Tensor | None, buffers: Buffers) -> Stored | None:
        wanted = rows.image_rows_B if field.space == "image" else rows.text_rows_B
        if wanted is None:
            return None
        if self.pooled is not None:
            assert rows.views_B is not None
            return Stored(torch.from_numpy(self.pooled.take(wanted, rows.views_B)))
        if field.space == "image":
            return _read_stored(field, wanted, rows.views_B, "targets", buffers)
        assert lengths is not None
        stored = _read_stored(field, wanted, None, "targets", buffers)
        longest = int(lengths.max())
        scale = stored.scale[:, :longest] if stored.scale is not None else None
        return Stored(stored.values[:, :longest], scale)

    def prepare(self, host: HostBatch, device: torch.device) -> Batch:
        image_rows, views, ids, mask = self._common(host, device)
        tokens = targets = None
        if host.inputs is not None and self.inputs is not None:
            if self.inputs.kind == "crops":
                assert self.prefix is not None
                tokens = self.prefix(_to(host.inputs.values, device))
            else:
                tokens = self._decode(self.inputs, host.inputs, device)
        if host.targets is not None and self.targets is not None:
            targets = self._decode(self.targets, host.targets, device)
        host.buffers.mark_copied(device)
        return Batch(image_rows, views, tokens, ids, mask, targets)

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
        values = _to(stored.values, device)
        if stored.scale is None:
            return values.float()
        mean, std = self._channel_statistics(field, device)
        return (values.float() * _to(stored.scale, device)[..., None]) * std + mean

    def _channel_statistics(self, field: Field, device: torch.device) -> tuple[Tensor, Tensor]:
        key = (field.name, device)
        if key not in self._statistics:
            mean, std = (torch.tensor(array, device=device) for array in (field.mean, field.std))
            self._statistics[key] = (mean, std)
        return self._statistics[key]


class PooledTargets:
    """A pooled field of one split in RAM, every usable row and view: float16 as stored, or float32."""

    def __init__(self, field: Field, table: SampleTable) -> None:
        assert table.image_rows_N is not None
        self.rows_N = table.image_rows_N
        dtype = np.float16 if field.storage == "float16" else np.float32
        self.values_NVD = np.empty((len(self.rows_N), table.num_views, *field.row_shape), dtype)
        for view in range(table.num_views):
            for start in range(0, len(self.rows_N), 65536):
                rows = self.rows_N[start : start + 65536]
                values = field.read(rows, view) if field.storage == "float16" else field.values(rows, view)
                self.values_NVD[start : start + len(rows), view] = values

    def take(self, rows_B: np.ndarray, views_B: np.ndarray) -> np.ndarray:
        """[B, D] of the rows in those views."""
        taken: np.ndarray = self.values_NVD[np.searchsorted(self.rows_N, rows_B), views_B]
        return taken


def _read_stored(field: Field, rows: np.ndarray, views: np.ndarray | None, name: str, buffers: Buffers) -> Stored:
    dtype = getattr(torch, field.storage)
    values = buffers.tensor(name, (len(rows), *field.row_shape), dtype)
    view: int | np.ndarray = 0 if views is None else views
    field.read(rows, view, out=values.numpy())
    scale = torch.from_numpy(field.read_scale(rows, view)) if field.storage == "int8" else None
    return Stored(values, scale)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)


# --- the loader --------------------------------------------------------------------------------------------------


class BatchLoader:
    """Batches of an order, read ahead by threads into a ring of buffers. Sized, and resumable at every batch.

    A batch's memory is reused two batches later: whoever keeps one longer copies it. threads 0: read when asked, in
    the caller's thread. `waited_seconds` is the time the consumer stood waiting for a batch; `while_waiting` is called
    several times a second meanwhile and may raise, to give up on storage that does not answer.
    """

    def __init__(
        self, order: Order, source: BatchSource, *, threads: int = 2, prefetch: int = 3, pin: bool = False
    ) -> None:
        self.order, self.source = order, source
        self.threads, self.prefetch, self.pin = threads, prefetch if threads else 0, pin
        self.step = 0  # batches handed out so far
        self.waited_seconds = 0.0
        self.while_waiting: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[HostBatch]:
        """From the batch after the last one handed out to the end of the order."""
        slots = [Buffers(self.pin) for _ in range(self.prefetch + 2)]  # read ahead, awaited, and still in use
        pool = ThreadPoolExecutor(self.threads or 1, thread_name_prefix="emkum-loader")
        pending: deque[Future[HostBatch]] = deque()
        submitted = self.step
        try:
            while self.step < len(self.order):
                while submitted < min(len(self.order), self.step + 1 + self.prefetch):
                    rows = self.order.rows(submitted)
                    buffers = slots[submitted % len(slots)]
                    if self.threads:
                        pending.append(pool.submit(self.source.read, rows, buffers))
                    else:
                        pending.append(read_now(self.source.read, rows, buffers))
                    submitted += 1
                batch = self._awaited(pending.popleft())
                self.step += 1
                yield batch
        finally:  # after the last batch no thread reads; whoever leaves before it may do so because one of them hangs
            pool.shutdown(wait=self.step == len(self.order), cancel_futures=True)

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
