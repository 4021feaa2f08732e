"""What a run needs, made ready from its configuration: recipe, rows, student, sources; and what is said of it."""

from __future__ import annotations

import dataclasses
import functools
import platform
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import emkum
from emkum.errors import UsageError
from emkum.models.network import Network, load_saved
from emkum.models.passes import FrozenPass, Wanted, chosen_device, good_compute
from emkum.shards.reader import Cache
from emkum.shards.shard_files import VERIFY, ReadThreads, Verify, machine_memory_bytes
from emkum.stage2_train.augment import check_student
from emkum.stage2_train.averaging import start_average
from emkum.stage2_train.fits import (
    check_classes,
    check_live,
    check_rule,
    check_target_shapes,
    check_tokenizer,
    target_width_of,
)
from emkum.stage2_train.live import LiveSource
from emkum.stage2_train.loader import BatchSource, CachedSource, Prefix, other_layers_rule
from emkum.stage2_train.losses import students_rule
from emkum.stage2_train.mixing import SPARE_BLOCKS, blocks_held
from emkum.stage2_train.order import Shuffle, TrainOrder
from emkum.stage2_train.pixels import batch_norm_line, check_chunk, check_layers, pixel_input
from emkum.stage2_train.ranks import Ranks, check_devices
from emkum.stage2_train.recipe import Recipe, load_recipe, recipe_from_table
from emkum.stage2_train.recipe_fields import FieldNames, choose_recipe, required_fields
from emkum.stage2_train.replay import Replay
from emkum.stage2_train.resume import check_same_run, continue_command, run_identity, start_command
from emkum.stage2_train.run_folder import RunFolder, git_revision
from emkum.stage2_train.run_log import check_loggers
from emkum.stage2_train.samples import SampleTable, sample_table
from emkum.stage2_train.storage_probe import needs_probe, probe_storage
from emkum.stage2_train.student import Student, build_student, parameter_table
from emkum.stage2_train.terms.build import Setting, make_terms
from emkum.stage2_train.terms.term import Terms
from emkum.stage2_train.validation import Validator

Say = Callable[[str], None]
Precision = Literal["auto", "float32", "bfloat16"]
SHUFFLES = ("auto", "rows", "blocks")
MIX_BLOCKS = 8
MOST_THREADS = 256
MOST_PREFETCH = 256


@dataclass(frozen=True)
class TrainConfig:
    """One `emkum train`. Everything that can change the student is in recipe, overrides, seed, precision, live,
    shuffle and mix_blocks.

    recipe None: what the cache's fields allow, or, on resume, the run's. seed None: 0, or the run's. precision
    "auto": bfloat16 where the device is good at it, else float32, or the run's. max_steps: a length in steps that
    replaces the recipe's epochs. data: where the source tars lie now, for `live`. shuffle "auto": rows, unless the
    storage is slow at single ones (or the run's own, on resume); mix_blocks: blocks that "blocks" mixes, 8 by
    default.
    verify: when checksums of what is read are looked at. threads: share the reading of a batch. chunk: samples that
    the student computes at a time, recomputed in the backward pass; 0: the whole batch. devices: GPUs, or processes on
    the CPU, that share each batch. loggers: of run_log.LOGGERS, beside metrics.csv. fast_dev_run: a few steps and a
    validation in a folder that is thrown away.
    """

    cache: Path | str = Path("shards")
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    run_dir: Path | None = None
    seed: int | None = None
    precision: Precision = "auto"
    device: str = "auto"
    live: bool = False
    data: tuple[str, ...] = ()
    resume: bool = False
    allow_partial: bool = False
    max_steps: int | None = None
    shuffle: Literal["auto", "rows", "blocks"] = "auto"
    mix_blocks: int | None = None
    verify: Verify = "first"
    threads: int = 8
    prefetch: int = 3
    log_every: int = 10
    checkpoint_minutes: float = 10.0
    activation_checkpointing: bool = False
    chunk: int = 0
    compile: bool = False
    devices: int = 1
    loggers: tuple[str, ...] = ("tensorboard",)
    fast_dev_run: bool = False

    def __post_init__(self) -> None:
        _require(self.seed is None or 0 <= self.seed < 2**63, f"--seed {self.seed}", "give a number from 0")
        known = ("auto", "float32", "bfloat16")
        _require(self.precision in known, f"--precision {self.precision}", f"choose one of {', '.join(known)}")
        _require(self.max_steps is None or self.max_steps > 0, f"--max-steps {self.max_steps}", "give 1 or more")
        _require(self.shuffle in SHUFFLES, f"--shuffle {self.shuffle}", f"choose one of {', '.join(SHUFFLES)}")
        mixed = self.mix_blocks
        _require(mixed is None or mixed > 0, f"--mix-blocks {mixed}", "give 1 or more")
        told = mixed is None or self.shuffle != "rows"
        _require(told, f"--mix-blocks {mixed} with --shuffle rows", "it says how many blocks --shuffle blocks mixes")
        _require(self.verify in VERIFY, f"--verify {self.verify}", f"choose one of {', '.join(VERIFY)}")
        _require(0 < self.threads <= MOST_THREADS, f"--threads {self.threads}", f"give 1 to {MOST_THREADS}")
        _require(
            0 < self.prefetch <= MOST_PREFETCH, f"--prefetch {self.prefetch}", f"give 1 to {MOST_PREFETCH} batches"
        )
        _require(self.chunk >= 0, f"--chunk {self.chunk}", "give 1 or more samples, or 0 for the whole batch")
        _require(self.log_every > 0, f"--log-every {self.log_every}", "give 1 or more")
        minutes = self.checkpoint_minutes
        _require(minutes >= 0, f"checkpoint_minutes {minutes}", "give minutes, from 0: after every step")
        _require(not self.resume or self.run_dir is not None, "--resume without --run-dir", "name the run's folder")
        check_devices(self.devices, self.device)
        check_loggers(self.loggers)
        alone = not (self.fast_dev_run and self.resume)
        _require(alone, "--fast-dev-run with --resume", "it trains from the start, in a folder of its own")


def _require(good: bool, what: str, way_out: str) -> None:
    if not good:
        raise UsageError(what, way_out)


@dataclass(frozen=True)
class Plan:
    """Everything a run needs, ready. `why`: the reason for the recipe where the user named none."""

    config: TrainConfig
    cache: Cache
    recipe: Recipe
    why: str
    why_shuffle: str  # one line for people; empty where there was nothing to decide
    names: FieldNames
    seed: int
    device: torch.device
    compute: str
    table: SampleTable
    order: TrainOrder
    student: Student
    terms: Terms
    average: Student | None  # of the student's weights, training.ema
    source: BatchSource
    prefix: Prefix | None
    replay: Replay | None
    identity: dict[str, Any]


def make_plan(config: TrainConfig, before: Mapping[str, Any] | None, ranks: Ranks = Ranks()) -> Plan:
    """Reads recipe and cache and builds the student. `before`: run.json of the run to continue; its choices stand."""
    cache = Cache.open(config.cache, verify=config.verify)
    recipe, why = _recipe(config, cache, before)
    if before is not None:  # before anything that another recipe would trip over
        check_same_run(before, {**before["identity"], "recipe": recipe.to_json()}, config)
    names = required_fields(recipe, cache)
    device = ranks.device(chosen_device(config.device))
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {config.device}: training runs on cpu and cuda", "use --device cpu")
    compute = _compute(config, before, device)
    seed = config.seed if config.seed is not None else int(before["seed"]) if before else 0

    table = sample_table(cache, recipe, names, recipe.data.split, allow_partial=config.allow_partial, seed=seed)
    shuffle, why_shuffle = _shuffle(config, cache, names, recipe.training.step_batch, before)
    order = _step_order(table, recipe, seed, shuffle)
    order.num_steps = recipe.training.epochs * order.steps_per_epoch
    if config.max_steps or before:
        order.num_steps = config.max_steps or int(before["total_steps"] if before else 0)

    image_network = load_saved(cache.model_dir(names.encoder)) if names.encoder else None
    text_network = load_saved(cache.model_dir(names.text_encoder)) if names.text_encoder else None
    check_tokenizer(cache, names)
    check_target_shapes(cache, names, image_network, text_network)
    target_width = target_width_of(cache, recipe, names)
    student = build_student(recipe, names, image_network, text_network, target_width, seed, cache=cache)
    check_rule(cache, recipe, names, student)
    check_student(recipe, names, student)
    if names.crop_size:
        check_layers(cache, names, student)
        check_chunk(student, config.chunk)
    student.checkpoint_activations(config.activation_checkpointing)

    prefix = frozen_prefix(image_network, names.cut, compute, device) if image_network and names.live_prefix else None
    prefix = pixel_input(student.spec) if names.crop_size else prefix
    replay = _replay(cache, recipe, names, config) if names.replayed else None
    source: BatchSource
    if config.live:
        check_live(names)
        own = prefix if names.crop_size else None
        source = LiveSource(
            cache, names, table, device, config.data, precision=compute, threads=config.threads, prefix=own
        )
    else:
        held = blocks_held(shuffle.window, cache.rows_per_block, order.batch) if shuffle.window else 0
        _require_memory(cache, names, held * ranks.number)
        source = CachedSource(cache, names, table, prefix, threads=config.threads, held_blocks=held, replay=replay)
        check_classes(names, source, target_width)
    terms = make_terms(Setting(recipe, student, cache, names, table, source, seed))
    identity = run_identity(recipe, cache, names, table, len(order), seed, compute, config.live, shuffle)
    return Plan(
        config,
        cache,
        recipe,
        why,
        why_shuffle,
        names,
        seed,
        device,
        compute,
        table,
        order,
        student,
        terms,
        start_average(student) if recipe.training.ema else None,
        source,
        prefix,
        replay,
        identity,
    )


def _shuffle(
    config: TrainConfig, cache: Cache, names: FieldNames, batch: int, before: Mapping[str, Any] | None
) -> tuple[Shuffle, str]:
    """How epochs are shuffled, and why: as asked, as the run was, or as suits the storage."""
    begun = Shuffle(**before["identity"].get("shuffle", {})) if before is not None else Shuffle()
    blocks = Shuffle("blocks", cache.rows_per_block, config.mix_blocks or begun.window or MIX_BLOCKS)
    if config.shuffle == "rows":
        return Shuffle(), "as asked"
    if config.shuffle == "blocks" or config.mix_blocks:
        return blocks, "as asked"
    if before is not None:
        return begun, "as the run began"
    fields = [cache.field(name) for name in names.needed() if cache.field(name).spec.sharded]
    if config.live or not fields:
        return Shuffle(), ""
    if cache.store.local is not None and not needs_probe(fields):
        return Shuffle(), ""
    blocks = dataclasses.replace(blocks, window=_fitting_window(cache, names, MIX_BLOCKS, batch))
    if not blocks.window:
        return Shuffle(), "blocks to mix would not fit into half of the memory"
    if cache.store.local is None:
        return blocks, "an object store answers many requests for single rows slowly; --shuffle rows overrides it"
    largest = max(fields, key=lambda field: field.num_bytes)
    threads = ReadThreads(config.threads)
    try:
        opened = functools.partial(Cache.open, cache.store, only=[largest.name], verify=config.verify)
        found = probe_storage(lambda: opened().field(largest.name), threads)
    finally:
        threads.close()
    if found is None:
        return Shuffle(), ""
    rates = f"the storage gives {found.single:,.0f} single rows a second, {found.in_order:,.0f} in order"
    if found.slow_at_single_rows:
        return blocks, f"{rates}; --shuffle rows overrides it"
    return Shuffle(), rates


def _block_bytes(cache: Cache, names: FieldNames) -> int:
    """Memory of one block of all fields that are mixed."""
    fields = [cache.field(name) for name in names.needed() if cache.field(name).spec.sharded]
    return sum(field.spec.array("values").row_bytes for field in fields) * cache.rows_per_block


def _fitting_window(cache: Cache, names: FieldNames, most: int, batch: int) -> int:
    """Blocks that can be mixed in half of the machine's memory, up to `most`; 0: not even one."""
    held = machine_memory_bytes() // 2 // _block_bytes(cache, names)
    return max(0, min(most, held - blocks_held(0, cache.rows_per_block, batch)))


def _require_memory(cache: Cache, names: FieldNames, held_blocks: int) -> None:
    """Raise UsageError where the blocks that are mixed would take more than half of the machine's memory."""
    block, limit = _block_bytes(cache, names), machine_memory_bytes() // 2
    if held_blocks * block > limit:
        raise UsageError(
            f"mixing whole blocks would hold {held_blocks} of {block / 2**20:,.1f} MiB, "
            f"{held_blocks * block / 2**30:.1f} GiB in all; half of this machine's memory is {limit / 2**30:.1f} GiB",
            f"mix fewer: --shuffle blocks --mix-blocks N (N, and {SPARE_BLOCKS} or more beside them, are held); "
            "or --shuffle rows",
        )


def _step_order(table: SampleTable, recipe: Recipe, seed: int, shuffle: Shuffle) -> TrainOrder:
    """The order of whole steps: each batch of it is what one step of the optimiser learns from."""
    batch, accumulate = recipe.training.batch, recipe.training.accumulate
    order = TrainOrder(table, batch, seed, recipe.data.captions, shuffle=shuffle)
    if accumulate == 1:
        return order
    if order.steps_per_epoch < accumulate:
        raise UsageError(
            f"training.accumulate = {accumulate}: a step of {accumulate} batches of {batch} is more than the "
            f"{order.units} samples of split {table.split!r}",
            f"use fewer: --set training.accumulate={order.steps_per_epoch}",
        )
    return TrainOrder(table, recipe.training.step_batch, seed, recipe.data.captions, shuffle=shuffle)


def _recipe(config: TrainConfig, cache: Cache, before: Mapping[str, Any] | None) -> tuple[Recipe, str]:
    """The recipe, and why it was chosen if the user named none."""
    if config.recipe is not None:
        return load_recipe(config.recipe, config.overrides), ""
    if before is not None:
        return recipe_from_table(before["recipe"], config.overrides), "the run's own"
    name, why = choose_recipe(cache, config.overrides)
    return load_recipe(name, config.overrides), why


def _compute(config: TrainConfig, before: Mapping[str, Any] | None, device: torch.device) -> str:
    if config.precision != "auto":
        return config.precision
    return str(before["precision"]) if before is not None else good_compute(device)


def _layers_line(plan: Plan) -> str:
    """What layers-mse compares, and what of its rule the student cannot follow."""
    role, name = next(iter(plan.names.targets.items()))
    rule = students_rule(plan.student, role, other_layers_rule(plan.cache.field(name)))
    depth = plan.student.depth
    fewer = rule.last is not None and rule.last > len(rule.counted(depth))
    left = f"; the student has {depth} blocks, and all that are counted take part" if fewer else ""
    return f"layers-mse: both sides are the {rule.words}{left}"


def _replay(cache: Cache, recipe: Recipe, names: FieldNames, config: TrainConfig) -> Replay:
    """The crops of the split trained on, and of the one validated on, where they come from the tars."""
    validated = {recipe.evaluation.split} & set(cache.splits)
    return Replay(cache, sorted({recipe.data.split} | validated), names.crop_size, config.data)


def frozen_prefix(network: Network, cut: int, compute: str, device: torch.device) -> Prefix:
    """uint8 crops [B, y, x, 3] -> tokens_BTD, float32: the frozen network up to the cut, for caches that keep crops."""
    frozen = FrozenPass([network], [Wanted(network.name, "tokens", cut)], compute, device)
    # A copy outside of inference mode, which autograd may save.
    return lambda crops: frozen.pictures(crops)[0].clone()


def run_info(plan: Plan, folder: RunFolder, before: Mapping[str, Any] | None, from_step: int) -> dict[str, Any]:
    """What run.json says from the start; measurements are added at the end.

    command: how the run was started, whatever continued it; sessions: every command since, and the step it began at.
    """
    cuda = plan.device.type == "cuda"
    if before is None:
        decided = plan.order.shuffle if plan.why_shuffle else None
        command = started = start_command(plan.config, plan.recipe, plan.seed, decided, folder.dir)
    else:
        command, started = continue_command(plan.config, folder.dir), before["command"]
    session = {"command": command, "from_step": from_step, "device": str(plan.device), "devices": plan.config.devices}
    return {
        "command": started,
        "sessions": [*(before.get("sessions", []) if before else []), session],
        "continue": continue_command(plan.config, folder.dir),
        "recipe": plan.recipe.to_json(),
        "cache": {
            "path": str(plan.cache.path.resolve()) if isinstance(plan.cache.path, Path) else plan.cache.path,
            "uuid": plan.cache.uuid,
            "fields": plan.identity["fields"],
            "supervision": _supervision(plan.cache, plan.names),
        },
        "identity": plan.identity,
        "seed": plan.seed,
        "precision": plan.compute,
        "device": str(plan.device),
        "device_name": torch.cuda.get_device_name(plan.device) if cuda else platform.processor() or platform.machine(),
        "live": plan.config.live,
        "shuffle": {**plan.order.shuffle.to_json(), "why": plan.why_shuffle},
        "samples": plan.table.num_samples,
        "steps_per_epoch": plan.order.steps_per_epoch,
        "total_steps": len(plan.order),
        "terms": plan.terms.summary(),
        "origins": list(plan.student.origins),
        "parameters": {
            count.part: {"trainable": count.trainable, "frozen": count.frozen}
            for count in parameter_table(plan.student, with_encoder=True)
        },
        "devices": plan.config.devices,
        "wandb_id": before["wandb_id"] if before and "wandb_id" in before else secrets.token_hex(4),
        "git_revision": git_revision(),
        "versions": {
            "emkum": emkum.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "lightning": version("lightning"),
            "numpy": np.__version__,
        },
    }


def _supervision(cache: Cache, names: FieldNames) -> dict[str, Any]:
    """What each field's network was trained on, as its record says: it goes on into the student."""
    found = {}
    for name in names.needed():
        environment = cache.field(name).record.get("environment", {})
        kept = {key: environment[key] for key in ("source", "licence", "supervision") if key in environment}
        if kept:
            found[name] = kept
    return found


def _in_front(plan: Plan) -> str:
    """What runs frozen in front of the student, for its summary."""
    if plan.names.replayed:
        return f"; crops of {plan.names.crop_size} px are cut out of the source tars again"
    if not plan.names.live_prefix or plan.names.crop_size:
        return ""
    blocks = f"the first {plan.names.cut} blocks" if plan.names.cut else "the patch embedding"
    left = "" if plan.student.image_blocks is not None else "; no block of its own is left for pictures"
    return f"; pictures go through {blocks} of {plan.names.encoder}, frozen{left}"


def _where(info: Mapping[str, Any]) -> str:
    """Device and ranks, for people."""
    count = info["devices"]
    if count == 1:
        return str(info["device"])
    return f"{count} GPUs" if str(info["device"]).startswith("cuda") else f"{count} processes of the CPU"


def run_summary(plan: Plan, info: Mapping[str, Any], validator: Validator | None) -> list[str]:
    """The lines printed before the first step."""
    recipe, table, order = plan.recipe, plan.table, plan.order
    what = {"pairs": "pictures with captions", "images": "pictures", "texts": "texts"}[recipe.kind]
    units = f"{order.units:,} captions of " if order.units != table.num_samples else ""
    views = f", {table.num_views} views" if table.num_views > 1 else ""
    accumulate = recipe.training.accumulate
    size = f"{accumulate} x {recipe.training.batch}" if accumulate > 1 else str(order.batch)
    dropped = f"; {table.dropped:,} more left out, as a field or a partner is lacking" if table.dropped else ""
    lines = [
        f"recipe {recipe.name}: {' + '.join(recipe.terms).replace('_', '-')}" + (f" ({plan.why})" if plan.why else ""),
        f"reads {', '.join(plan.names.needed())}{_in_front(plan)}",
        f"{table.split}: {units}{table.num_samples:,} {what}{views}{dropped}",
        f"{order.steps_per_epoch} batches of {size} an epoch ({order.left_over} samples of each shuffle are "
        f"left over), {len(order)} steps in all",
    ]
    if order.shuffle.mode == "blocks":
        held = "" if plan.config.live else f" in up to {plan.source.mixing_bytes / 2**30:.2g} GiB of memory"
        lines.append(f"shuffled by whole blocks, {order.shuffle.window} of them mixed{held} ({plan.why_shuffle})")
    elif plan.why_shuffle:
        lines.append(f"shuffled row by row ({plan.why_shuffle})")
    if recipe.objectives.layers_mse:
        lines.append(_layers_line(plan))
    lines += filter(None, [batch_norm_line(plan.student, plan.config.devices, recipe.training.accumulate)])
    lines += info["terms"]
    if validator is not None:
        patience = recipe.evaluation.patience
        ends = f"; the run ends after {patience} without a better {validator.name}" if patience else ""
        lines.append(f"validated every {recipe.evaluation.every_epochs} epochs on {validator.on}{ends}")
    else:
        split = recipe.evaluation.split
        lacking = [name for name in plan.names.needed() if not len(plan.cache.field(name).rows(split))]
        why = f" (it has no {' and no '.join(lacking)})" if split in plan.cache.splits and lacking else ""
        lines.append(f"nothing to validate on in a split {split!r}{why}: the last student is the best")
    lines += plan.student.origins
    trainable = frozen = 0
    for part, counts in info["parameters"].items():
        lines.append(f"  {part:16} {counts['trainable']:>12,} trained {counts['frozen']:>12,} frozen")
        trainable, frozen = trainable + counts["trainable"], frozen + counts["frozen"]
    lines.append(f"  {'student':16} {trainable:>12,} trained {frozen:>12,} frozen")
    lines.append(f"on {_where(info)} in {info['precision']}, seed {info['seed']}")
    return lines
