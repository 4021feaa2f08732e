"""The trainings of an ablation: where each lies, what it was asked to be, and how far it is.

Beside the run folder `seed-0` of a variant lie `seed-0.json`, what was asked when it began; `seed-0.log`, what the
training said; and `seed-0.lock`, which the training holds for as long as it lives, whatever becomes of its parent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from emkum.errors import AblationMismatch, EmkumError, NotARun, UsageError
from emkum.shards.durable import write_file
from emkum.stage2_train.ablate.spec import Variant, folder_name
from emkum.stage2_train.recipe import recipe_from_table
from emkum.stage2_train.recipe_fields import required_fields
from emkum.stage2_train.runs import Difference, differences, read_run

if TYPE_CHECKING:
    from emkum.shards.reader import Cache

State = Literal["finished", "begun", "new"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainFlags:
    """Flags of `emkum train` that all trainings of an ablation share."""

    device: str = "auto"
    precision: Precision = "auto"
    threads: int | None = None
    allow_partial: bool = False
    data: tuple[str, ...] = ()  # for variants that train live

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise UsageError(f"--precision {self.precision}", "choose one of auto, float32, bfloat16")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads {self.threads}", "give 1 or more")

    def words(self, live: bool) -> list[str]:
        """As on a command line."""
        words = ["--device", self.device, "--precision", self.precision]
        words += ["--threads", str(self.threads)] if self.threads else []
        words += ["--allow-partial"] if self.allow_partial else []
        for pattern in self.data if live else ():
            words += ["--data", pattern]
        return words


@dataclass(frozen=True)
class Job:
    """One training. lacks: why the cache cannot feed it, empty if it can. fields: of the cache, that it reads."""

    variant: Variant
    seed: int
    folder: Path
    asked: Mapping[str, Any]
    cache: str
    flags: TrainFlags
    lacks: str = ""
    fields: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def record(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def lock(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.lock")

    def arguments(self) -> list[str]:
        """Of `emkum`: the training from its start, or on from where it stopped."""
        variant = self.variant
        words = ["train", "--cache", self.cache, "--recipe", variant.recipe_source]
        for override in variant.overrides:
            words += ["--set", override]
        words += ["--run-dir", str(self.folder), "--seed", str(self.seed), *self.flags.words(variant.live)]
        words += ["--live"] if variant.live else []
        words += ["--max-steps", str(variant.max_steps)] if variant.max_steps else []
        return [*words, "--resume"] if (self.folder / "run.json").exists() else words

    def state(self) -> State:
        """How far it is. Raises AblationMismatch if the folder holds a run that is not this one."""
        if not (self.folder / "run.json").exists():
            return "new"
        self._require_same()
        return "finished" if read_run(self.folder).get("status") == "finished" else "begun"

    def begin(self) -> None:
        """Records what is asked, before the first run of the folder. Raises StorageFailure."""
        if not (self.folder / "run.json").exists():
            write_file(self.record, (json.dumps(self.asked, indent=1, sort_keys=True) + "\n").encode())

    def _require_same(self) -> None:
        info = read_run(self.folder)
        try:
            begun = json.loads(self.record.read_text(encoding="utf-8"))
            if not isinstance(begun, dict):
                raise ValueError("no JSON object")
        except (OSError, ValueError) as error:
            raise AblationMismatch(
                f"{self.folder} holds a run, and {self.record} does not say for what it was made: {error}",
                f"move {self.folder} away, or give another --out",
            ) from error
        own = {"recipe": info["recipe"], "seed": info.get("seed"), "live": info.get("live", False)}
        found = differences(_comparable({**begun, **own}), _comparable(self.asked))
        if info["cache"].get("uuid") != begun.get("cache", {}).get("uuid"):
            found.append(Difference("cache.uuid", info["cache"].get("uuid"), self.asked["cache"]["uuid"]))
        if found:
            shown = "; ".join(f"{each.path}: {each.first} in the run, {each.second} now" for each in found[:5])
            more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
            raise AblationMismatch(
                f"{self.folder} holds a run of something else ({shown}{more})",
                "give another --out for what is asked now; or move that folder away, and it is trained anew",
            )


def make_jobs(
    variants: Sequence[Variant], seeds: Sequence[int], cache: Cache, out: Path, flags: TrainFlags
) -> list[Job]:
    """Every variant with every seed, seed by seed, so that a first line of each variant comes early."""
    made = []
    for seed in seeds:
        for variant in variants:
            names: tuple[str, ...] = ()
            lacks = ""
            try:
                names = required_fields(variant.recipe, cache).needed()
            except EmkumError as error:
                lacks = error.line()
            asked = {
                "recipe": variant.recipe.to_json(),
                "seed": seed,
                "live": variant.live,
                "max_steps": variant.max_steps,
                "precision": flags.precision,
                "cache": cache_state(cache, names, (variant.recipe.data.split, variant.recipe.evaluation.split)),
            }
            folder = out / "runs" / folder_name(variant.name) / f"seed-{seed}"
            made.append(Job(variant, seed, folder, asked, str(cache.path), flags, lacks, names))
    return made


def cache_state(cache: Cache, names: Sequence[str], splits: Sequence[str]) -> dict[str, Any]:
    """What of a cache decides the result of a training: how its fields were computed, and which rows they have.

    A row that comes or goes, or a source that is added, is another state.
    """
    return {
        "uuid": cache.uuid,
        "fields": {
            name: {
                "fingerprint": cache.field(name).record["fingerprint_digest"],
                "rows": {split: _rows(cache, name, split) for split in splits if split in cache.splits},
            }
            for name in names
        },
        "sources": {
            split: [segment.digest for segment in cache.segments if segment.split == split] for split in splits
        },
    }


def _rows(cache: Cache, name: str, split: str) -> list[int]:
    """Rows of each view."""
    field = cache.field(name)
    return [len(field.rows(split, view)) for view in range(field.num_views)]


def error_of(job: Job) -> str:
    """Why its training failed: the last line that it said as an error, else the last of all."""
    try:
        lines = job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "it left no log"
    said = [line.removeprefix("emkum: ") for line in lines if line.startswith("emkum: ")]
    return (said or lines or ["it said nothing"])[-1]


def run_of(job: Job) -> dict[str, Any] | None:
    """run.json of the job; None where there is none yet."""
    try:
        return read_run(job.folder)
    except NotARun:
        return None


def _comparable(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with every key: one of before a key existed had its default. A name changes nothing."""
    recipe = recipe_from_table(asked["recipe"]).to_json()
    return {**asked, "recipe": {key: value for key, value in recipe.items() if key != "name"}}
