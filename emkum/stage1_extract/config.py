"""The settings of one extraction, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emkum.errors import UsageError
from emkum.models.passes import TARGETS
from emkum.models.supervision import Guard
from emkum.models.targets import rule_from_text
from emkum.shards.layout import (
    MAX_ROWS_PER_BLOCK,
    STORAGES,
    TEXT_TILE,
    check_cache_name,
)
from emkum.shards.segments import check_split_name
from emkum.shards.store import is_url
from emkum.shards.tars import OnTruncated
from emkum.shards.views import ViewPolicy

Cut = int | Literal["prenet"]
MAX_SECONDS = 600.0  # attention takes memory by the square of a clip's length
DEFAULT_DATA = ("./data",)
DEFAULT_SIZE = 224
OnNonfinite = Literal["stop", "quarantine"]
StoreInputs = Literal["tokens", "crops"]


@dataclass(frozen=True)
class ExtractConfig:
    """One `emkum extract`. None: the default the help text states.

    cut: after how many blocks; "prenet": after those that belong to the modality's encoder. layers: the rule of the
    target `layers`, as `rule_from_text` reads it. logits_top: keep so many of the logits, in place of all.
    """

    teacher: tuple[str, ...]
    data: tuple[str, ...] = DEFAULT_DATA
    cache: Path | str = Path("./shards")
    split: str = "train"
    encoder: str | None = None
    cut: Cut = 0
    store_inputs: StoreInputs = "tokens"
    from_crops: bool = False
    text_encoder: str | None = None
    targets: tuple[str, ...] = ()
    layers: str | None = None
    logits_top: int | None = None
    name: str | None = None
    size: int | None = None
    crop: tuple[float, float] | None = None
    flip: bool = False
    jitter: float = 0.0
    seed: int = 0
    views: int = 1
    storage: str = "float16"
    compute: str = "auto"
    max_tokens: int = 64
    max_seconds: float = 30.0
    batch_size: int = 32
    threads: int | None = None
    rows_per_block: int | None = None
    max_bad: float = 0.001
    on_nonfinite: OnNonfinite = "stop"
    on_truncated: OnTruncated = "error"
    allow_missing_eof: bool = False
    join: bool = False
    workers: int | None = None
    scheduler: str | None = None
    device: str = "auto"
    label_free: bool = False
    text_free: bool = False
    allow_teacher: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_split_name(self.split)
        _require(bool(self.teacher), "no teacher was named", "for example --teacher dinov2-s; `--teacher FOLDER` works")
        _require(self.storage in STORAGES, f"--storage {self.storage}", f"choose one of {', '.join(STORAGES)}")
        computes = ("auto", "float32", "bfloat16", "float16")
        _require(self.compute in computes, f"--compute {self.compute}", f"choose one of {', '.join(computes)}")
        unknown = [t for t in self.targets if t not in TARGETS]
        _require(not unknown, f"unknown target {', '.join(unknown)}", f"choose from {', '.join(TARGETS)}")
        _require(0 <= self.max_bad <= 1, f"--max-bad {self.max_bad}", "give a fraction between 0 and 1")
        _require(self.threads is None or self.threads > 0, f"--threads {self.threads}", "give 1 or more")
        _require(self.batch_size > 0, f"--batch-size {self.batch_size}", "give a positive number")
        _require(self.views > 0, f"--views {self.views}", "give a positive number")
        _require(0 < self.side <= 4096, f"--size {self.size}", "give the crop's side in pixels, 1 to 4096")
        _require(
            self.cut == "prenet" or (type(self.cut) is int and self.cut >= 0),
            f"--cut {self.cut}",
            "0 keeps patch embeddings, k the tokens after block k, prenet those after the encoder's prenet blocks",
        )
        for modality in ("image", "text", "audio") if self.layers is not None else ():
            rule_from_text(str(self.layers), modality)  # raises UsageError for what is no rule
        top = self.logits_top
        _require(top is None or top > 0, f"--logits-top {top}", "give how many of the largest logits to keep")
        _require(
            "logits-top" not in self.targets or top is not None,
            f"--targets {','.join(self.targets)}",
            "say how many of the largest logits to keep: --logits-top 5",
        )
        crops = self.store_inputs == "crops"
        _require(
            self.store_inputs in ("tokens", "crops"),
            f"--store-inputs {self.store_inputs}",
            "choose tokens (the default) or crops",
        )
        _require(
            not crops or self.cut == 0,
            f"--store-inputs crops with --cut {self.cut}",
            f"crops serve every cut: leave --cut out, and choose it in training with --set data.cut={self.cut}",
        )
        _require(
            not crops or self.encoder != "none",
            "--store-inputs crops with --encoder none",
            "name the encoder that training starts from, or leave --store-inputs out to keep targets only",
        )
        _require(
            not self.from_crops or self.data in ((), DEFAULT_DATA),
            f"--from-crops with --data {' '.join(self.data)}",
            "from the crops of the cache no tar is read: leave one of them out",
        )
        _require(
            self.max_tokens > 0 and self.max_tokens % TEXT_TILE == 0,
            f"--max-tokens {self.max_tokens}",
            f"give a multiple of {TEXT_TILE}",
        )
        _require(
            0.1 <= self.max_seconds <= MAX_SECONDS,
            f"--max-seconds {self.max_seconds:g}",
            f"give 0.1 to {MAX_SECONDS:g}; cut longer recordings into clips",
        )
        rows = self.rows_per_block
        _require(
            rows is None or (0 < rows <= MAX_ROWS_PER_BLOCK and rows % 16 == 0),
            f"--rows-per-block {rows}",
            f"give a multiple of 16, at most {MAX_ROWS_PER_BLOCK}",
        )
        _require(
            self.on_nonfinite in ("stop", "quarantine"),
            f"--on-nonfinite {self.on_nonfinite}",
            "choose stop (the default) or quarantine",
        )
        _require(
            self.on_truncated in ("error", "keep-complete"),
            f"--on-truncated {self.on_truncated}",
            "choose error (the default) or keep-complete",
        )
        _require(self.workers is None or self.workers > 0, f"--workers {self.workers}", "give 1 or more")
        _require(
            self.scheduler is None or is_url(self.scheduler),
            f"--scheduler {self.scheduler}",
            "give the address that `dask scheduler` prints, as tcp://host:8786",
        )
        if self.crop is not None:
            low, high = self.crop
            _require(0 < low <= high <= 1, f"--crop {low}-{high}", "give area fractions, as 0.9-1.0 or 1.0")
        if self.name is not None:
            _require(len(self.teacher) == 1, "--name with several teachers", "name one teacher per command")
            check_cache_name(self.name)
        _ = self.policy  # raises UsageError for crops, jitter and views that cannot be
        _ = self.guard

    @property
    def side(self) -> int:
        """Of the square crops, in pixels."""
        return DEFAULT_SIZE if self.size is None else self.size

    @property
    def guard(self) -> Guard:
        """What the networks of the run may have learned from."""
        return Guard(self.label_free, self.text_free, self.allow_teacher)

    @property
    def policy(self) -> ViewPolicy:
        """The split's view policy: random crops of 0.9 to 1 of the area for `train`, the centre square otherwise."""
        crop = self.crop or ((0.9, 1.0) if self.split == "train" else (1.0, 1.0))
        return ViewPolicy(crop=crop, flip=self.flip, jitter=self.jitter, seed=self.seed, count=self.views)


def _require(good: bool, what: str, way_out: str) -> None:
    if not good:
        raise UsageError(what, way_out)
