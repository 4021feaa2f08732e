"""RUN -> results: one fine-tuning, from a run folder and data with labels to a folder of its own."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from emkum.models.passes import chosen_device, good_compute
from emkum.shards.reader import Cache
from emkum.stage2_train.evaluate.results import table as retrieval_table
from emkum.stage2_train.finetune.classify import PictureTask
from emkum.stage2_train.finetune.folder import FinetuneConfig, FinetuneFolder, begin, cache_place, opened, write_json
from emkum.stage2_train.finetune.glue import GlueWork
from emkum.stage2_train.finetune.loop import Say
from emkum.stage2_train.finetune.results import table
from emkum.stage2_train.finetune.retrieval import finetune_pairs
from emkum.stage2_train.run_folder import load_run, tensors_digest


def finetune(config: FinetuneConfig, say: Say = print) -> dict[str, Any]:
    """Fine-tune and measure; what results.json holds.

    Raises UsageError, NotARun, ResumeMismatch, MissingPackage, InputDataError, TooManyBadSamples, StorageFailure;
    Interrupted, all epochs before it kept.
    """
    with opened(config) as folder:
        # Retrieval is a training run, the other two have a new head.
        results = finetune_pairs(config, folder, say) if config.task == "retrieval" else _with_head(config, folder, say)
        say(f"written to {folder.results}")
    return results


def _with_head(config: FinetuneConfig, folder: FinetuneFolder, say: Say) -> dict[str, Any]:
    started = time.perf_counter()
    run = load_run(config.run, config.checkpoint)
    place = cache_place(config, run)
    cache = Cache.open(place)
    device = chosen_device(config.device)
    compute = good_compute(device) if config.precision == "auto" else config.precision
    starts_from = {"student": tensors_digest(run.student.state_dict()), "cache": cache.uuid, "precision": compute}
    identity = {**starts_from, "baselines": config.baselines}
    kind = PictureTask if config.task == "classify" else GlueWork
    work: PictureTask | GlueWork = kind(config, run, cache, compute, identity)
    asked = {**work.identity, "seeds": list(config.seeds)}
    info = begin(folder, config, asked, {"device": str(device), "precision": compute, "cache": str(place)})
    results = {
        "task": config.task,
        "seeds": list(config.seeds),
        "settings": dataclasses.asdict(work.settings),
        "run": str(config.run),
        "device": str(device),
        "precision": compute,
        **work.run(folder, say),
    }
    write_json(folder.results, results)
    seconds = time.perf_counter() - started  # of this session
    write_json(folder.info, {**info, "status": "finished", "seconds": seconds})
    return results


def shown(results: dict[str, Any]) -> str:
    """The results as aligned text for the screen."""
    return retrieval_table(results) if results["task"] == "retrieval" else table(results)
