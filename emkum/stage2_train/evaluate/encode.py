"""From pictures, texts and rows of a cache to features: one way for validation during training and for evaluation.

Legend: N pictures, M captions or texts, U different texts, B batch, T tokens, L text tokens, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from emkum.errors import BadPicture, NoData, TooManyBadSamples, UsageError
from emkum.shards.reader import Cache, Field
from emkum.shards.shard_files import cores
from emkum.stage2_train.evaluate.pictures import Pictures
from emkum.stage2_train.loader import BatchLoader, BatchSource
from emkum.stage2_train.losses import autocast
from emkum.stage2_train.order import PassOrder
from emkum.stage2_train.student import Student, StudentOut

ByName = Mapping[str, Tensor]  # features [B, D] by the name of who made them


@dataclass(frozen=True)
class Settings:
    """How to evaluate; none of it changes what is measured, but `baselines`, which adds to it.

    max_bad: the share of pictures that may fail to decode. threads None: for decoding, one for each core, 2 to 16.
    """

    device: str = "auto"
    batch_size: int = 256
    threads: int | None = None
    max_bad: float = 0.001
    baselines: bool = False
    progress: bool | None = None  # None: a bar where standard error is a terminal

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.threads is not None and self.threads < 1) or not 0 <= self.max_bad <= 1:
            raise UsageError(
                f"batch size {self.batch_size}, {self.threads} threads, max-bad {self.max_bad}",
                "give a batch and threads of 1 or more, and a fraction between 0 and 1",
            )


# --- students --------------------------------------------------------------------------------------------


@torch.no_grad()
def out_of_tokens(
    students: Mapping[str, Student], tokens_BTD: Tensor, compute: str, device: torch.device
) -> dict[str, StudentOut]:
    """What each student makes of tokens at its cut, matrix products in `compute`."""
    with autocast(compute, device):
        return {name: student.encode_images(tokens_BTD) for name, student in students.items()}


@torch.no_grad()
def out_of_texts(
    students: Mapping[str, Student], ids_BL: Tensor, mask_BL: Tensor, compute: str, device: torch.device
) -> dict[str, StudentOut]:
    """What each student makes of token ids, matrix products in `compute`."""
    with autocast(compute, device):
        return {name: student.encode_texts(ids_BL, mask_BL) for name, student in students.items()}


def features_of(outs: Mapping[str, StudentOut]) -> dict[str, Tensor]:
    """The features alone, [B, D] by name."""
    return {name: out.features_BD for name, out in outs.items()}


# --- rows of a cache -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RetrievalRows:
    """Every picture and caption of a split: those without a partner are candidates too. image_of_text_M: -1, none."""

    image_rows_N: np.ndarray
    text_rows_M: np.ndarray
    image_of_text_M: np.ndarray


def retrieval_rows(cache: Cache, inputs: Field, ids: Field, split: str) -> RetrievalRows:
    """The committed pictures and captions of a split, and which caption is whose."""
    image_rows = inputs.rows(split)
    captions = cache.captions(split)
    text_rows = captions.column("text_row").to_numpy()
    owners = captions.column("image_row").fill_null(-1).to_numpy()
    kept = np.isin(text_rows, ids.rows(split))
    text_rows, owners = text_rows[kept], owners[kept]
    there = np.isin(owners, image_rows)
    return RetrievalRows(image_rows, text_rows, np.where(there, np.searchsorted(image_rows, owners), -1))


def encode_rows(
    rows_N: np.ndarray,
    source: BatchSource,
    encode: Callable[[Tensor], ByName],
    device: torch.device,
    batch_size: int,
    *,
    threads: int = 2,
    progress: bool | None = False,
) -> dict[str, np.ndarray]:
    """Picture features of rows of the cache, float32 [N, D] by name; view 0, read ahead by threads.

    encode: tokens_BTD at the cut -> features by name. The source's frozen prefix, if it has one, runs outside of it
    and so in its own precision.
    """
    loader = BatchLoader(PassOrder(rows_N, None, batch_size), source, threads=threads, pin=device.type == "cuda")
    parts: dict[str, list[np.ndarray]] = {}
    for host in tqdm(loader, "pictures", unit="batch", disable=quiet(progress), leave=False):
        tokens_BTD = source.prepare(host, device).tokens_BTD
        assert tokens_BTD is not None
        for name, features_BD in encode(tokens_BTD).items():
            parts.setdefault(name, []).append(features_BD.float().cpu().numpy())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def encode_ids(
    ids_ML: np.ndarray,
    lengths_M: np.ndarray,
    encode: Callable[[Tensor, Tensor], ByName],
    device: torch.device,
    batch_size: int,
    *,
    progress: bool | None = False,
) -> dict[str, np.ndarray]:
    """Text features, float32 [M, D] by name, in the order given. encode: ids_BL, mask_BL -> features by name.

    Each different text is encoded once, so that equal texts have equal features and tie exactly; in the order of
    their lengths, so that little is padded.
    """
    real_ML = np.arange(ids_ML.shape[1]) < lengths_M[:, None]
    unique_UL, inverse_M = np.unique(np.where(real_ML, ids_ML, -1), axis=0, return_inverse=True)
    lengths_U = (unique_UL >= 0).sum(axis=1)
    order_U = np.argsort(lengths_U, kind="stable")
    features: dict[str, np.ndarray] = {}
    starts = range(0, len(order_U), batch_size)
    for start in tqdm(starts, "texts", unit="batch", disable=quiet(progress), leave=False):
        here = order_U[start : start + batch_size]
        ids_BL, mask_BL = _ids_mask(unique_UL[here], lengths_U[here], device)
        for name, values_BD in encode(ids_BL, mask_BL).items():
            whole = features.setdefault(name, np.empty((len(order_U), values_BD.shape[1]), np.float32))
            whole[here] = values_BD.float().cpu().numpy()
    return {name: values[inverse_M.reshape(-1)] for name, values in features.items()}


def _ids_mask(ids_BL: np.ndarray, lengths_B: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 ids and bool mask, trimmed to the longest text of the batch; 0 past each text's end."""
    longest = max(1, int(lengths_B.max()))
    mask_BL = np.arange(longest) < lengths_B[:, None]
    ids_BL = np.where(mask_BL, ids_BL[:, :longest], 0).astype(np.int64)
    return torch.from_numpy(ids_BL).to(device), torch.from_numpy(mask_BL).to(device)


# --- picture files ---------------------------------------------------------------------------------------


def encode_pictures(
    pictures: Pictures, size: int, encode: Callable[[Tensor], ByName], settings: Settings
) -> tuple[dict[str, np.ndarray], np.ndarray, tuple[str, ...]]:
    """Features by name [n, D], the indices of the pictures they are of, and what was wrong with the others.

    encode: uint8 crops [B, size, size, 3] -> features by name. Raises TooManyBadSamples, NoData.
    """
    parts: dict[str, list[np.ndarray]] = {}
    good: list[int] = []
    bad: list[str] = []
    batch: list[np.ndarray] = []

    def flush() -> None:
        for name, values in encode(torch.from_numpy(np.stack(batch))).items():
            parts.setdefault(name, []).append(values.float().cpu().numpy())
        batch.clear()

    decoded = _decode_ahead(pictures, size, settings)
    disable = quiet(settings.progress)
    for index, crop in tqdm(decoded, "pictures", len(pictures), unit="picture", disable=disable, leave=False):
        if isinstance(crop, BadPicture):
            name = pictures.names[index] if pictures.names is not None else f"picture {index}"
            bad.append(f"{name}: {crop.what}")
            if len(bad) > settings.max_bad * len(pictures):
                raise TooManyBadSamples(
                    f"{len(bad)} of {len(pictures)} pictures cannot be used, {settings.max_bad:g} of them may; "
                    f"the first: {'; '.join(bad[:3])}",
                    f"look at these files, or allow more: --max-bad {min(1.0, 2 * len(bad) / len(pictures)):.2g}",
                )
            continue
        good.append(index)
        batch.append(crop)
        if len(batch) == settings.batch_size:
            flush()
    if batch:
        flush()
    if not good:
        raise NoData("no picture could be decoded", "; ".join(bad[:3]) or "there is none")
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}, np.array(good), tuple(bad)


def _decode_ahead(pictures: Pictures, size: int, settings: Settings) -> Iterator[tuple[int, np.ndarray | BadPicture]]:
    """Crops in order, decoded by threads a few batches ahead; a picture that cannot be decoded gives its error."""

    def crop(index: int) -> np.ndarray | BadPicture:
        try:
            return pictures.crop(index, size)
        except BadPicture as error:
            return error

    threads = settings.threads or min(16, max(2, cores()))
    window = 2 * settings.batch_size + threads
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        ahead: deque[Future[np.ndarray | BadPicture]] = deque()
        try:
            for index in range(len(pictures)):
                while len(ahead) < window and index + len(ahead) < len(pictures):
                    ahead.append(pool.submit(crop, index + len(ahead)))
                yield index, ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def quiet(progress: bool | None) -> bool | None:
    """tqdm's `disable`; None: a bar where standard error is a terminal."""
    return None if progress is None else not progress
