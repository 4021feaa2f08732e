"""CACHE -> STUDENT: one training run, from recipe and cache to a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from emkum.errors import StorageFailure
from emkum.shards.durable import is_full, sweep_temporaries
from emkum.stage2_train.compiled import compile_blocks, compiled_decode
from emkum.stage2_train.distillation import Distillation
from emkum.stage2_train.fast_dev_run import fast_dev_run
from emkum.stage2_train.keeper import DurableCheckpoints, RunKeeper
from emkum.stage2_train.loader import BatchLoader, CachedSource
from emkum.stage2_train.memory import advice_for_start, advice_for_steps
from emkum.stage2_train.micro_batches import MicroBatches
from emkum.stage2_train.plan import Plan, Say, TrainConfig, make_plan, run_info, run_summary
from emkum.stage2_train.ranks import Ranks, on_gpus, run_on_ranks
from emkum.stage2_train.results import RunResult, result_of
from emkum.stage2_train.resume import ResumePoint, check_same_run, resume_point
from emkum.stage2_train.run_folder import RunFolder, held, new_run, read_info, refuse_used_dir, write_info
from emkum.stage2_train.validation import Validator, make_validator

__all__ = ["Distillation", "RunResult", "TrainConfig", "train"]

LIGHTNING_ABOUT_ITSELF = (  # warnings it gives about its own code and our choice of device, as patterns
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"[GT]PU available but not used",
    r"`broadcast_buffers` is deprecated",
)


def train(config: TrainConfig, say: Say = print) -> RunResult:
    """Train the recipe's student from the cache. `say` receives one line a step of the run.

    Raises the errors of emkum.errors: UnknownRecipe, MissingField, MissingCaptions, IncompleteCache, NotARun,
    ResumeMismatch, AnotherWriter, StorageFailure, OutOfMemory, RankLost; Interrupted after SIGINT or SIGTERM, when a
    checkpoint has been written.
    """
    if config.fast_dev_run:
        return fast_dev_run(config, train, say)
    if config.devices == 1:
        return _lead(config, Ranks(), say)
    found = run_on_ranks(config.devices, train_on_rank, config, say, cuda=on_gpus(config.device))
    assert found is not None  # of rank 0
    return found


def train_on_rank(config: TrainConfig, ranks: Ranks, say: Say) -> RunResult | None:
    """One rank's share of a training of several; only the first has a result, and says something."""
    if ranks.leads:
        return _lead(config, ranks, say)
    _follow(ranks)
    return None


def _lead(config: TrainConfig, ranks: Ranks, say: Say) -> RunResult:
    """The training, and all its files; on the first rank or the only one."""
    if not config.resume or config.run_dir is None:
        refuse_used_dir(config.run_dir)  # before the work that making a plan is
        with advice_for_start():
            plan = make_plan(config, None, ranks)
        with new_run(config.run_dir, plan.recipe.name) as folder:
            return _session(plan, folder, None, say, ranks)
    folder = RunFolder(config.run_dir)
    read_info(folder)  # nothing is written where no run is
    with held(folder):
        before = read_info(folder)
        sweep_temporaries(folder.dir, 0)
        with advice_for_start():
            plan = make_plan(config, before, ranks)
        check_same_run(before, plan.identity, config)
        return _session(plan, folder, before, say, ranks)


@dataclass(frozen=True)
class Start:
    """What the first rank has decided, for the others to begin with the same."""

    config: TrainConfig
    before: dict[str, Any] | None
    dir: Path
    info: dict[str, Any]
    point: ResumePoint | None


def _follow(ranks: Ranks) -> None:
    """The same steps as the first rank's, without a word and without a file."""
    start: Start | None = ranks.shared(None)
    if start is not None:
        with advice_for_start():
            plan = make_plan(start.config, start.before, ranks)
        _fit(plan, RunFolder(start.dir), start.info, None, start.point, lambda line: None, ranks)


def _session(plan: Plan, folder: RunFolder, before: Mapping[str, Any] | None, say: Say, ranks: Ranks) -> RunResult:
    """From a plan and a folder that is ours to the end of the run; `before`: run.json of the run that goes on."""
    config = plan.config
    point = resume_point(folder, before, plan.identity, say)
    validator = make_validator(
        plan.student,
        plan.recipe,
        plan.cache,
        plan.names,
        plan.prefix,
        plan.compute,
        plan.device,
        allow_partial=config.allow_partial,
        threads=config.threads,
        average=plan.average,
        replay=plan.replay,
    )
    info = run_info(plan, folder, before, point.step if point else 0)
    for line in run_summary(plan, info, validator):
        say(line)
    if point is not None and point.scored and (point.step == len(plan.order) or point.ended):
        ranks.shared(None)
        why = ", where it ended early" if point.ended else ""
        say(f"{folder.dir} is trained to its last step, {point.step}, already{why}")
        info = {**info, **point.measured, "ended_early": point.ended, "status": "finished"}
        write_info(folder, info)
        return result_of(folder, info)
    ranks.announce(info["continue"])
    ranks.shared(Start(_decided(plan, folder), dict(before) if before else None, folder.dir, info, point))
    try:
        return _fit(plan, folder, info, validator, point, say, ranks)
    except StorageFailure as error:
        way_out = "make room" if is_full(error) or not error.way_out else error.way_out
        raise StorageFailure(error.what, f"{way_out}, then continue: {info['continue']}") from error


def _decided(plan: Plan, folder: RunFolder) -> TrainConfig:
    """The configuration with what was left open settled as here: the other ranks measure and choose nothing."""
    shuffle = plan.order.shuffle
    return dataclasses.replace(
        plan.config,
        run_dir=folder.dir,
        seed=plan.seed,
        precision=plan.compute,  # type: ignore[arg-type]  # one of Precision
        shuffle=shuffle.mode,
        mix_blocks=shuffle.window or None,
    )


def _fit(
    plan: Plan,
    folder: RunFolder,
    info: dict[str, Any],
    validator: Validator | None,
    point: ResumePoint | None,
    say: Say,
    ranks: Ranks,
) -> RunResult:
    """The steps from `point` to the end of the run. Ranks other than the first have no validator."""
    config = plan.config
    if config.compile:
        reason = compile_blocks(plan.student, plan.device)
        say(f"not compiled: {reason}" if reason else "blocks are compiled as they first run, but not for validation")
        if not reason and isinstance(plan.source, CachedSource):
            plan.source.decode = compiled_decode()
    accumulate = plan.recipe.training.accumulate
    alone = accumulate == ranks.number == 1
    loader = BatchLoader(
        plan.order if alone else MicroBatches(plan.order, accumulate, ranks.rank, ranks.number),
        plan.source,
        threads=plan.source.batches_at_once,
        prefetch=max(config.prefetch, plan.source.batches_at_once) if config.live or plan.replay else config.prefetch,
        pin=plan.device.type == "cuda",
    )
    module = Distillation(plan, ranks)
    keeper = RunKeeper(plan, folder, info, loader, module, validator, point, say, ranks)
    with quiet_lightning(), keeper:
        # One pass over a loader that knows the epochs itself: so every resume is the same, in the middle of a pass.
        trainer = Trainer(
            accelerator="gpu" if plan.device.type == "cuda" else "cpu",
            devices=_devices(plan, ranks),
            # A term may leave a part of the student alone, and that part then has no gradient on any rank.
            strategy=DDPStrategy(find_unused_parameters=True, broadcast_buffers=False) if ranks.number > 1 else "auto",
            max_epochs=1,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=plan.recipe.optimiser.clip_norm or None,
            callbacks=[keeper],
            plugins=[DurableCheckpoints(), _OneMachine(ranks)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder.dir,
        )
        # Signals are agreed on in keeper.py, on the host. Lightning asks all ranks too, and waits for the device.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        try:
            with advice_for_steps(plan):
                trainer.fit(module, loader, ckpt_path=point.path if point else None)
            return keeper.finish()
        finally:
            plan.source.close()


def _devices(plan: Plan, ranks: Ranks) -> list[int] | int:
    if plan.device.type != "cuda":
        return ranks.number
    return list(range(ranks.number)) if ranks.number > 1 else [plan.device.index or 0]


class _OneMachine(LightningEnvironment):
    """Tells Lightning which rank this process is; processes and their group are there already (ranks.py)."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return self.ranks.rank

    def node_rank(self) -> int:
        return 0


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning's own lines (devices found, tips) are not ours to print; its errors still come as exceptions.

    Of warnings, only those that Lightning's code raises about itself are silenced, each by its words.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for words in LIGHTNING_ABOUT_ITSELF:
                warnings.filterwarnings("ignore", message=words)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
