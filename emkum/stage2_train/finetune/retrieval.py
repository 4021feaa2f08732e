"""Retrieval: the run's student trained further with contrast alone (itc), by `emkum train`, and measured by R@k.

The recipe is `finetune-retrieval` with the student of the run: its shape, and its weights (`student.init`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from emkum.errors import UsageError
from emkum.shards.layout import CROPS
from emkum.shards.reader import Cache
from emkum.stage2_train.evaluate.encode import Settings
from emkum.stage2_train.evaluate.results import merge_results, write_results
from emkum.stage2_train.evaluate.run import evaluate_cache, evaluate_tars
from emkum.stage2_train.finetune.folder import FinetuneConfig, FinetuneFolder, begin, cache_place, write_json
from emkum.stage2_train.finetune.loop import Say
from emkum.stage2_train.recipe import BATCH_OF_RATES
from emkum.stage2_train.run_folder import LoadedRun, RunFolder, load_run
from emkum.stage2_train.student_recipe import StudentRecipe
from emkum.stage2_train.train import TrainConfig, train

RECIPE = "finetune-retrieval"
RATES = ("weight_decay", "warmup", "layer_decay", "clip_norm")  # of the settings, and of the recipe's [optimiser]


def recipe_overrides(config: FinetuneConfig, run: LoadedRun, cache: Cache) -> tuple[str, ...]:
    """What `--set` would say to `finetune-retrieval` for this run: its student and its contrast, then the settings.

    Rates of a recipe are for 256 samples and grow with the batch; that of the settings is the rate itself.
    Raises UsageError for a run that is not of pictures and captions, or a cache without what its student reads.
    """
    spec, before, settings = run.student.spec, run.recipe.student, config.settings
    if spec.image is None or spec.text is None:
        raise UsageError(
            f"retrieval needs pictures and captions; {run.dir} trained on {run.recipe.kind}",
            "use --task classify or glue, or a run of both, such as of recipe ssmke",
        )
    student: dict[str, Any] = {
        field.name: getattr(before, field.name)
        for field in dataclasses.fields(StudentRecipe)
        if getattr(before, field.name) != field.default
    }
    for own in ("init_image", "init_text", "image_start", "text_start"):
        student.pop(own, None)  # every block has the run's weights
    for side in ("image", "text"):
        stack = getattr(spec, side).stack
        student[f"{side}_blocks"] = stack.depth if stack is not None else 0
    student["init"] = str(config.run)
    if spec.head_width is not None and not spec.heads:
        student["head_width"] = spec.head_width
    values = {f"student.{name}": value for name, value in student.items()}
    if run.recipe.objectives.itc is not None:
        values |= {f"objectives.itc.{name}": value for name, value in _contrast(run).items()}
    rate = settings.lr * BATCH_OF_RATES / settings.batch
    values |= {"optimiser.lr": rate, "optimiser.encoder_lr": rate}
    values |= {f"optimiser.{name}": getattr(settings, name) for name in RATES}
    values |= {"training.epochs": settings.epochs, "training.batch": settings.batch}
    values |= {"data.split": config.split, "evaluation.split": config.test_split}
    values |= {"data.ids": f"text/{spec.text.encoder}/ids", **_inputs(run, cache)}
    return tuple(f"{name}={json.dumps(value)}" for name, value in values.items())


def _contrast(run: LoadedRun) -> dict[str, Any]:
    """The run's own settings of itc, but its weight beside other objectives."""
    itc: Mapping[str, Any] = run.recipe.to_json()["objectives"]["itc"]
    return {name: value for name, value in itc.items() if name != "weight"}


def finetune_pairs(config: FinetuneConfig, folder: FinetuneFolder, say: Say) -> dict[str, Any]:
    """Train, then measure the student and what it was before on the test split, or on tars; what results.json says."""
    if len(config.seeds) != 1:
        raise UsageError(
            f"retrieval trains from one seed, not from {len(config.seeds)}", "run the command once for each seed"
        )
    if config.checkpoint != "best":
        raise UsageError(
            f"--checkpoint {config.checkpoint}: retrieval starts from the best student of a run", "leave it out"
        )
    run = load_run(config.run)
    place = cache_place(config, run)
    overrides = recipe_overrides(config, run, Cache.open(place))
    identity = {"recipe": list(overrides), "cache": str(place), "seeds": list(config.seeds)}
    info = begin(folder, config, identity, {"recipe": RECIPE})
    say(f"recipe {RECIPE}, with the student of {config.run}: " + " ".join(f"--set {one}" for one in overrides))
    asked = TrainConfig(
        cache=place,
        recipe=RECIPE,
        overrides=overrides,
        run_dir=folder.dir,
        resume=RunFolder(folder.dir).info.is_file(),
        seed=config.seeds[0],
        precision=config.precision,  # type: ignore[arg-type]  # checked by FinetuneConfig
        device=config.device,
        chunk=config.chunk,
    )
    train(asked, say)
    tuned = load_run(folder.dir, "last")  # the best one was chosen by what is measured here
    settings = Settings(config.device, config.batch_size, config.threads, config.max_bad, baselines=True)
    found = (
        evaluate_tars(tuned, config.data, None, settings)
        if config.data
        else evaluate_cache(tuned, None, config.test_split, settings)
    )
    write_results(folder.dir, found)
    results = {"task": "retrieval", "seeds": list(config.seeds), **merge_results(found)}
    write_json(folder.results, results)
    write_json(folder.info, {**info, "status": "finished"})
    return results


def _inputs(run: LoadedRun, cache: Cache) -> dict[str, Any]:
    """Which inputs of the cache the run's student reads. Raises UsageError where there are none."""
    side = run.student.spec.image
    assert side is not None
    tokens = f"image/{side.encoder}@{side.cut}/tokens"
    if tokens in cache.fields:
        return {"data.inputs": tokens}
    if any(CROPS.fullmatch(name) for name in cache.fields):
        return {"data.encoder": side.encoder, "data.cut": side.cut}
    raise UsageError(
        f"{cache.path} has neither {tokens}, which the student of {run.dir} reads, nor crops",
        f"extract it: --encoder {side.encoder} --cut {side.cut}",
    )
