"""Ablations: files, what is trained and what is left alone, kills, tables, bills and curves."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tiny_cache import make_cache

from emkum.errors import (
    AblationMismatch,
    EmkumError,
    Interrupted,
    RunsFailed,
    UnknownAblation,
    UnknownRecipe,
    UsageError,
)
from emkum.shards.reader import Cache
from emkum.stage2_train.ablate import schedule
from emkum.stage2_train.ablate.ablate import AblateConfig, Result, ablate, plan_json, plan_lines, prepare
from emkum.stage2_train.ablate.curve import curve_of, svg
from emkum.stage2_train.ablate.jobs import Job, TrainFlags, make_jobs
from emkum.stage2_train.ablate.results import spread
from emkum.stage2_train.ablate.schedule import Room
from emkum.stage2_train.ablate.spec import ABLATIONS_DIR, expand, folder_name, read_ablation, shipped_ablations
from emkum.stage2_train.train import TrainConfig, train

STUB = (sys.executable, str(Path(__file__).with_name("stub_train.py")))
STOP_SECONDS = 120


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("ablate") / "cache").path


@dataclass
class Stub:
    """Ablations in a folder of their own, of trainings that take no time."""

    folder: Path
    cache: Path
    environment: pytest.MonkeyPatch
    behaviour: dict[str, Any] = field(default_factory=dict)

    def write(self, text: str) -> None:
        (self.folder / "a.toml").write_text(text)

    def run(self, **changes: Any) -> Result:
        self.environment.setenv("BEHAVIOUR", json.dumps(self.behaviour))
        return ablate(self.prepared(**changes), say=lambda line: None)

    def prepared(self, **changes: Any) -> Any:
        out = self.folder / "out"
        return prepare(
            AblateConfig(**{"file": str(self.folder / "a.toml"), "cache": self.cache, "out": out, **changes})
        )

    def log(self) -> list[str]:
        """What was started and ended since this was last called."""
        path = self.folder / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def stub(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    monkeypatch.setattr(schedule, "EMKUM", STUB)
    monkeypatch.setattr(schedule, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(schedule, "HELD_SECONDS", 0.01)
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    return Stub(tmp_path, cache, monkeypatch)


TWO = 'recipe = "ssmke"\nseeds = [0, 1]\n[[variant]]\nname = "a"\n[[variant]]\nname = "b"\nset.training.batch = 8\n'


# --- files -------------------------------------------------------------------------------------------------------


def file(folder: Path, text: str) -> Path:
    path = folder / "a.toml"
    path.write_text(text)
    return path


def test_a_grid_takes_every_combination_and_names_it_by_its_values(tmp_path: Path) -> None:
    text = 'recipe = "ssmke"\nseeds = [3]\nmax_steps = 7\n[set]\ntraining.batch = 8\n'
    text += '[grid]\n"optimiser.lr" = [1e-4, 0.01]\nobjectives.ctl.bank = ["all", 20]\n'
    found = expand(read_ablation(file(tmp_path, text)), None)
    assert [variant.name for variant in found] == [
        "lr=0.0001 bank=all",
        "lr=0.0001 bank=20",
        "lr=0.01 bank=all",
        "lr=0.01 bank=20",
    ]
    first = found[0]
    assert first.overrides == ("training.batch=8", "optimiser.lr=0.0001", 'objectives.ctl.bank="all"')
    assert (first.recipe.training.batch, first.recipe.optimiser.lr) == (8, 1e-4)
    assert first.recipe.objectives.ctl is not None
    assert first.recipe.objectives.ctl.bank == "all"
    assert dict(first.axes) == {"optimiser.lr": 1e-4, "objectives.ctl.bank": "all"}
    assert {variant.max_steps for variant in found} == {7}


def test_a_list_of_variants_has_recipes_and_settings_of_its_own_before_those_of_all(tmp_path: Path) -> None:
    text = 'recipe = "ssmke"\n[set]\ntraining.batch = 8\noptimiser.lr = 0.1\n[[variant]]\nname = "as it is"\n'
    text += '[[variant]]\nname = "no ctl"\nset.objectives.ctl = "none"\nset.optimiser.lr = 0.2\nmax_steps = 4\n'
    text += '[[variant]]\nname = "other"\nrecipe = "itc-only"\nlive = true\n'
    plain, without, other = expand(read_ablation(file(tmp_path, text)), None)
    assert (plain.recipe.terms, plain.recipe.optimiser.lr, plain.max_steps) == (("itc", "ctl"), 0.1, None)
    assert (without.recipe.terms, without.recipe.optimiser.lr, without.max_steps) == (("itc",), 0.2, 4)
    assert (other.recipe_source, other.live, other.recipe.training.batch) == ("itc-only", True, 8)
    assert expand(read_ablation(tmp_path / "a.toml"), None, max_steps=9)[1].max_steps == 9


def test_settings_of_the_command_line_go_before_those_of_the_file(tmp_path: Path) -> None:
    text = 'recipe = "ssmke"\n[set]\ntraining.batch = 8\n[[variant]]\nname = "x"\nset.data.captions = "all"\n'
    ablation = read_ablation(file(tmp_path, text))
    given = ("training.batch=16", "data.captions=one", "objectives.ctl=none", "optimiser.betas=[0.5, 0.6]")
    (variant,) = expand(ablation, None, overrides=given)
    assert (variant.recipe.training.batch, variant.recipe.data.captions, variant.recipe.terms) == (16, "one", ("itc",))
    assert variant.recipe.optimiser.betas == (0.5, 0.6)
    with pytest.raises(UsageError) as error:
        expand(ablation, None, overrides=("training.batch",))
    assert error.value.line() == (
        "UsageError: --set training.batch is not path=value | for example --set training.batch=128"
    )
    grid = read_ablation(file(tmp_path, 'recipe = "ssmke"\ngrid.optimiser.lr = [0.1]'))
    with pytest.raises(UsageError, match=r"optimiser\.lr is in \[grid\] and set too"):
        expand(grid, None, overrides=("optimiser.lr=1",))


def test_a_recipe_of_ones_own_is_named_from_the_folder_of_the_ablation(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('kind = "texts"\n[objectives.layers-mse]\n')
    (variant,) = expand(read_ablation(file(tmp_path, 'recipe = "mine.toml"')), None)
    assert (variant.name, variant.recipe_source) == ("mine", str(tmp_path / "mine.toml"))


def test_each_target_of_the_cache_is_a_variant_and_a_recipe_without_teacher_is_one(tmp_path: Path) -> None:
    @dataclass
    class Fields:
        fields: dict[str, None]

    text = '[grid]\n"data.targets" = "each"\n[[variant]]\nname = "s"\nrecipe = "ssmke"\n'
    text += '[[variant]]\nname = "i"\nrecipe = "itc-only"\n'
    held = Fields(dict.fromkeys(["teacher/dino/image/cls", "teacher/beit2/image/cls", "teacher/dino/image/layers"]))
    found = expand(read_ablation(file(tmp_path, text)), held)  # type: ignore[arg-type]
    assert [variant.name for variant in found] == ["s teacher=beit2", "s teacher=dino", "i"]
    assert found[1].recipe.data.targets == "teacher/dino/image/cls"


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("seeds = [0", UsageError, "a.toml is not TOML"),
        ('recipes = "ssmke"', UnknownAblation,
         "UnknownAblation: ablation a: there is no key recipes | did you mean recipe?"),
        ("", UsageError,
         'UsageError: ablation a names no recipe | write recipe = "..." at the top of the file, or under it'),
        ('recipe = "ssmk"', UnknownRecipe, "| did you mean ssmke?"),
        ('recipe = "ssmke"\nset.training.batsh = 1', UnknownRecipe, "| did you mean training.batch?"),
        ('recipe = "ssmke"\n[[variant]]\nname = "x"\nset.training.batch = 0', UsageError,
         "UsageError: ablation a, variant x: recipe ssmke: training.batch = 0 is not >= 1"),
        ('recipe = "ssmke"\n[[variant]]\nlive = true', UsageError,
         'UsageError: ablation a: variant 1 has no name | write name = "..." under its [[variant]]'),
        ('recipe = "ssmke"\n[[variant]]\nname = "x"\nsets = 1', UnknownAblation,
         "UnknownAblation: ablation a: variant x: there is no key sets | did you mean set?"),
        ('recipe = "ssmke"\n[[variant]]\nname = "x"\n[[variant]]\nname = "x"', UsageError,
         "UsageError: ablation a has two variants of the name x | give each a name of its own"),
        ('recipe = "ssmke"\n[[variant]]\nname = "x/"\n[[variant]]\nname = "x"', UsageError,
         "UsageError: ablation a: two variants have one folder, x: 'x/' and 'x' | give the variants other names, or "
         "take a value out that is in the grid twice"),
        ('recipe = "ssmke"\ngrid.optimiser.lr = 0.1', UsageError,
         "UsageError: ablation a: [grid] optimiser.lr = 0.1 is not a list of values | write \"optimiser.lr\" = [first, "
         "second]"),
        ('recipe = "ssmke"\ngrid.optimiser.lr = [0.1, 0.1]', UsageError,
         "UsageError: ablation a: [grid] optimiser.lr = [0.1, 0.1] has a value twice | each stands for a variant"),
        ('recipe = "ssmke"\ngrid.optimiser.lr = [0.1]\nset.optimiser.lr = 1', UsageError,
         "UsageError: ablation a: optimiser.lr is in [grid] and set too | take it out of one: the grid says its "
         "values"),
        ('recipe = "ssmke"\nseeds = [1, 1]', UsageError,
         "UsageError: ablation a: seeds = [1, 1] is not a list of different numbers from 0 | seeds = [0, 1, 2]"),
        ('recipe = "ssmke"\nmax_steps = 0', UsageError,
         "UsageError: ablation a: max_steps = 0 is not a number of steps | give 1 or more, or leave it out"),
        ('recipe = "ssmke"\nset = 1', UsageError,
         "UsageError: ablation a: set = 1 is not a table | docs/ablations.md shows a file"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_file_that_cannot_be(
    tmp_path: Path, text: str, kind: type[EmkumError], expected: str
) -> None:
    with pytest.raises(kind) as error:
        expand(read_ablation(file(tmp_path, text)), None)
    assert type(error.value) is kind
    assert expected in error.value.line()


def test_an_unknown_ablation_is_told_the_known_ones() -> None:
    with pytest.raises(UnknownAblation) as error:
        read_ablation("teacher")
    assert error.value.line() == (
        "UnknownAblation: no such ablation: teacher (shipped: data-fractions, freeze, seeds, teachers) | did you mean "
        "teachers?"
    )
    with pytest.raises(UnknownAblation, match=r"no such file: no\.toml"):
        read_ablation("no.toml")


@pytest.mark.parametrize("name", shipped_ablations())
def test_the_ablations_that_ship_say_their_command_and_can_be_trained_from_a_cache_of_pairs(
    name: str, cache: Path
) -> None:
    head = (ABLATIONS_DIR / f"{name}.toml").read_text().split("\n\n")[0]
    assert head.startswith(f"# {name}: ")
    assert f"emkum ablate {name} --cache ./shards" in head
    opened, ablation = Cache.open(cache), read_ablation(name)
    variants = expand(ablation, opened)
    assert {job.lacks for job in make_jobs(variants, ablation.seeds, opened, Path("x"), TrainFlags())} == {""}
    assert len({json.dumps(variant.recipe.to_json()) for variant in variants}) == len(variants)


def test_folders_of_variants_have_plain_names() -> None:
    assert folder_name("all, a tenth/of ../the rate lr=1e-4") == "all-a-tenth-of-..-the-rate-lr=1e-4"
    assert folder_name("../..") == "variant"


# --- what is trained ---------------------------------------------------------------------------------------------


def test_every_variant_is_trained_with_every_seed_and_the_table_has_mean_and_deviation(stub: Stub) -> None:
    stub.behaviour = {"b": 20.0}
    stub.write(TWO)
    result = stub.run()
    assert stub.log()[::2] == ["start a/seed-0", "start b/seed-0", "start a/seed-1", "start b/seed-1"]
    first, second = result.lines
    assert first.best is not None
    assert (first.best.mean, first.best.deviation, first.best.count) == (10.5, pytest.approx(0.5**0.5), 2)
    assert second.last is not None
    assert (second.last.mean, second.last.deviation) == (19.5, pytest.approx(0.5**0.5))
    assert second.numbers["val_text_to_image_R@1"].mean == 41.0
    assert (first.finished, first.steps, first.seconds, first.dollars, first.device) == ((0, 1), 5, 2.0, None, "cpu")
    lines = (stub.folder / "out" / "table.md").read_text().splitlines()
    assert lines[0] == "# Ablation a"
    assert lines[4] == "| a | 2/2 | mean recall | 10.5 ± 0.7071 | 9.5 ± 0.7071 | 5 | 2.0 s | CPU time | – |"
    assert lines[5].startswith("| b | 2/2 | mean recall | 20.5 ± 0.7071 | 19.5 ± 0.7071 |")
    written = json.loads((stub.folder / "out" / "table.json").read_text())
    assert written == result.to_json()
    assert written["variants"][1]["best"] == {"mean": 20.5, "deviation": pytest.approx(0.5**0.5), "count": 2}
    assert "trained: 4 runs, 8.0 s on a CPU, which has no price here" in written["notes"]
    result.require_all()


def test_one_seed_has_no_deviation_and_equal_seeds_have_none_at_all() -> None:
    assert spread([3.0]).text() == "3"  # type: ignore[union-attr]
    assert spread([47.2, math.nextafter(47.2, 48)]).text() == "47.2 ± 0"  # type: ignore[union-attr]
    assert spread([None]) is None


def test_the_same_command_again_leaves_finished_runs_alone_and_a_seed_more_is_trained_alone(stub: Stub) -> None:
    stub.write(TWO)
    before = stub.run().to_json()
    stub.log()
    assert stub.run().to_json() == before
    assert stub.log() == []
    stub.run(seeds=(0, 1, 2))
    assert stub.log()[::2] == ["start a/seed-2", "start b/seed-2"]


def test_a_failed_run_is_listed_with_its_error_and_stops_no_other(stub: Stub) -> None:
    stub.behaviour = {"a": "fail"}
    stub.write(TWO)
    result = stub.run()
    assert [outcome.end for outcome in result.outcomes] == ["failed", "finished", "failed", "finished"]
    table = result.table()
    assert "a        0/2, failed  –" in table
    said = "UsageError: training diverged: the loss is nan at step 3 | lower the rate"
    assert f"failed: a, seed 0: {said}" in table
    with pytest.raises(RunsFailed) as error:
        result.require_all()
    assert error.value.exit_code == 2
    log = stub.folder / "out" / "runs" / "a" / "seed-0.log"
    assert error.value.line() == (
        f"RunsFailed: 2 of 4 runs failed, the first being a, seed 0: {said} | see {log}; the same command tries them "
        "again and leaves finished ones alone"
    )
    stub.log()
    stub.behaviour = {}
    stub.run().require_all()
    assert stub.log()[::2] == ["start a/seed-0 --resume", "start a/seed-1 --resume"]


def test_the_exit_code_is_that_of_the_first_failure_and_a_killed_run_says_by_what(stub: Stub) -> None:
    stub.behaviour = {"a": "die"}
    stub.write(TWO.replace("[0, 1]", "[0]"))
    result = stub.run()
    assert "failed: a, seed 0: killed by signal 9; " in result.table()
    with pytest.raises(RunsFailed) as error:
        result.require_all()
    assert error.value.exit_code == 2


def test_a_variant_that_the_cache_cannot_feed_is_listed_with_the_command_that_feeds_it(stub: Stub) -> None:
    stub.write(TWO.replace("set.training.batch = 8", 'recipe = "shre"'))
    lines = "\n".join(plan_lines(stub.prepared()))
    assert "b: cannot run: MissingField: recipe shre needs a teacher's logits targets" in lines
    result = stub.run()
    assert result.lines[0].finished == (0, 1)
    assert "make it: emkum extract" in result.lines[1].errors[0]
    assert [line for line in stub.log() if " b/" in line] == []


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(stub: Stub) -> None:
    stub.write(TWO)
    assert plan_lines(stub.prepared())[0] == (
        f"a: 2 variants x 2 seeds = 4 runs in {stub.folder / 'out'}: 0 finished, 0 begun, 4 new"
    )
    assert not (stub.folder / "out").exists()
    stub.behaviour = {"b": "fail"}
    stub.run()
    plan = plan_json(stub.prepared())
    assert [run["state"] for run in plan["runs"]] == ["finished", "begun", "finished", "begun"]
    command = plan["runs"][3]["command"]
    assert command[:6] == ["emkum", "train", "--cache", str(stub.cache), "--recipe", "ssmke"]
    assert command[6:8] == ["--set", "training.batch=8"]
    assert command[-1] == "--resume"


# --- never mixed -------------------------------------------------------------------------------------------------


def test_a_folder_with_runs_of_another_recipe_is_refused_with_both_values(stub: Stub) -> None:
    stub.write(TWO)
    stub.run()
    stub.log()
    stub.write(TWO.replace("set.training.batch = 8", "set.training.batch = 16"))
    with pytest.raises(AblationMismatch) as error:
        stub.run()
    folder = stub.folder / "out" / "runs" / "b" / "seed-0"
    assert error.value.line() == (
        f"AblationMismatch: {folder} holds a run of something else (recipe.training.batch: 8 in the run, 16 now); 1 "
        "more folders are like it | give another --out for what is asked now; or move that folder away, and it is "
        "trained anew"
    )
    assert error.value.exit_code == 5
    assert stub.log() == []
    for seed in (0, 1):
        shutil.rmtree(folder.with_name(f"seed-{seed}"))
    stub.run()
    assert stub.log()[::2] == ["start b/seed-0", "start b/seed-1"]


def test_a_cache_that_has_grown_is_another_cache(stub: Stub, tmp_path: Path) -> None:
    stub.cache = make_cache(tmp_path / "grows", skipped_blocks=[("image/cls", 2)]).path
    stub.write(TWO)
    stub.run(flags=TrainFlags(allow_partial=True))
    grown = Cache.open(make_cache(tmp_path / "whole").path)
    for name in ("receipts", "fields"):
        shutil.copytree(tmp_path / "whole" / "_emkum" / name, stub.cache / "_emkum" / name, dirs_exist_ok=True)
    assert len(grown.field("teacher/tinyvit/image/cls").rows("train")) == 40
    with pytest.raises(
        AblationMismatch, match=r"fields\.teacher/tinyvit/image/cls\.rows\.train: \[32\] in the run, \[40\] now"
    ):
        stub.run(flags=TrainFlags(allow_partial=True))


def test_another_cache_precision_or_length_is_refused(stub: Stub, tmp_path: Path) -> None:
    stub.write(TWO)
    stub.run()
    with pytest.raises(AblationMismatch, match=r"max_steps: None in the run, 3 now"):
        stub.run(max_steps=3)
    with pytest.raises(AblationMismatch, match=r"precision: auto in the run, float32 now"):
        stub.run(flags=TrainFlags(precision="float32"))
    with pytest.raises(AblationMismatch, match=r"cache\.uuid: "):
        stub.run(cache=make_cache(tmp_path / "other").path)


def test_a_run_folder_that_was_swapped_is_noticed(stub: Stub) -> None:
    stub.write(TWO)
    stub.run()
    runs = stub.folder / "out" / "runs"
    shutil.rmtree(runs / "b" / "seed-0")
    shutil.copytree(runs / "a" / "seed-0", runs / "b" / "seed-0")
    with pytest.raises(AblationMismatch, match=r"recipe\.training\.batch: 256 in the run, 8 now"):
        stub.run()
    (runs / "b" / "seed-0.json").unlink()
    with pytest.raises(AblationMismatch, match=r"seed-0\.json does not say for what it was made"):
        stub.run()


# --- processes ---------------------------------------------------------------------------------------------------


def test_two_at_once_run_beside_each_other_and_one_at_a_time_does_not(stub: Stub) -> None:
    stub.write(TWO.replace("[0, 1]", "[0]"))
    stub.run()
    assert stub.log() == ["start a/seed-0", "end a/seed-0", "start b/seed-0", "end b/seed-0"]
    shutil.rmtree(stub.folder / "out")
    stub.behaviour = {"a": "meet", "b": "meet"}
    stub.run(jobs=2).require_all()
    assert {line.split()[0] for line in stub.log()[:2]} == {"start"}


def test_a_run_that_somebody_stopped_makes_the_command_one_to_be_repeated(stub: Stub) -> None:
    stub.write(TWO.replace("[0, 1]", "[0]"))
    stub.environment.setattr(schedule, "EMKUM", ("false",))  # its exit code is 1
    assert stub.run().outcomes[0].code == 1
    stub.environment.setattr(schedule, "EMKUM", (sys.executable, "-c", "raise SystemExit(75)"))
    with pytest.raises(Interrupted) as error:
        stub.run()
    assert error.value.line() == "Interrupted: a, seed 0 was stopped from outside | the same command continues"
    assert (stub.folder / "out" / "table.md").exists()


def command(stub: Stub) -> list[str]:
    """`emkum ablate` as a process of its own, whose trainings are stubs."""
    code = f"import emkum.stage2_train.ablate.schedule as s; s.EMKUM = {STUB!r}; s.HELD_SECONDS = 0.05\n"
    code += "import emkum.cli; emkum.cli.main()"
    words = ["ablate", str(stub.folder / "a.toml"), "--cache", str(stub.cache), "--out", str(stub.folder / "out")]
    return [sys.executable, "-c", code, *words]


@pytest.fixture
def start(stub: Stub) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts the command; what it left behind is ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def begin() -> subprocess.Popen[str]:
        stub.environment.setenv("BEHAVIOUR", json.dumps(stub.behaviour))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command(stub), start_new_session=True, **pipes))  # type: ignore[call-overload]
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def started(stub: Stub, count: int = 1) -> Callable[[], bool]:
    path = stub.folder / "log"
    return lambda: path.exists() and path.read_text().count("start") >= count


def test_two_commands_on_one_folder_share_its_runs_and_train_none_twice(
    stub: Stub, start: Callable[[], subprocess.Popen[str]]
) -> None:
    stub.write(TWO.replace("[0, 1]", "[0, 1, 2]"))
    both = [start(), start()]
    ends = [process.communicate(timeout=STOP_SECONDS) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert sorted(line for line in stub.log() if line.startswith("start")) == sorted(
        f"start {variant}/seed-{seed}" for variant in "ab" for seed in (0, 1, 2)
    )
    assert ends[0][0] == ends[1][0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_training_once_and_the_same_command_continues(
    stub: Stub, start: Callable[[], subprocess.Popen[str]], number: signal.Signals
) -> None:
    """SIGINT to the whole group, as Ctrl-C sends it: the training must not get it twice."""
    stub.behaviour = {"a": "stay"}
    stub.write(TWO)
    process = start()
    wait_for(started(stub))
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=STOP_SECONDS)
    assert process.returncode == 75
    assert said.splitlines()[-1] == (
        f"emkum: Interrupted: stopped by {number.name}; what was committed is kept; in the midst of a, seed 0 | the "
        "same command continues"
    )
    assert stub.log() == ["start a/seed-0", "stopped a/seed-0"]
    stub.behaviour = {}
    stub.run().require_all()
    assert stub.log()[0] == "start a/seed-0 --resume"


def test_after_sigkill_the_training_goes_on_and_the_next_command_waits_for_it(
    stub: Stub, start: Callable[[], subprocess.Popen[str]]
) -> None:
    stub.behaviour = {"a": "stay"}
    stub.write(TWO.replace("[0, 1]", "[0]"))
    process = start()
    wait_for(started(stub))
    process.kill()
    process.wait()
    stub.behaviour = {}
    second = start()
    assert second.stderr is not None
    said = ""
    while "waiting for another process that trains a, seed 0" not in said:
        said = second.stderr.readline()
        assert said, "it ended"
    assert stub.log() == ["start a/seed-0", "start b/seed-0", "end b/seed-0"]
    os.kill(training_of(stub.folder / "out" / "runs" / "a" / "seed-0.lock"), signal.SIGTERM)
    out, said = second.communicate(timeout=STOP_SECONDS)
    assert second.returncode == 0, said
    assert "start a/seed-0 --resume" in stub.log()
    assert "a        1/1" in out


def training_of(lock: Path) -> int:
    """The process that holds the lock file open."""
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if handle.resolve() == lock.resolve() and handle.parts[2] != str(os.getpid()):
                return int(handle.parts[2])
        except OSError:
            continue
    raise AssertionError(f"nobody holds {lock}")


# --- how many at once --------------------------------------------------------------------------------------------


def test_on_a_gpu_the_first_run_of_a_variant_is_alone_and_then_as_many_run_as_fit(stub: Stub) -> None:
    stub.write(TWO)
    stub.environment.setenv("DEVICE", "cuda:0")
    stub.run(seeds=(0,))
    stub.environment.setattr(schedule.os, "cpu_count", lambda: 3)
    a, b = stub.prepared().jobs[:2]
    room = Room(None, "auto", free=lambda device: 5 * 2**30)  # each takes 1.25 + 0.75 GiB
    assert room.has_for(a, [])
    assert not room.has_for(a, [b])
    room.learn(a)
    assert room.has_for(a, [])  # asks how much is free
    assert room.has_for(a, [a])
    assert not room.has_for(b, [a])
    assert not room.has_for(a, [b])
    room.learn(b)
    assert room.has_for(a, [b])
    assert not room.has_for(a, [a, b])  # 6 GiB of 4.75
    stub.environment.setattr(schedule.os, "cpu_count", lambda: 1)
    assert not room.has_for(a, [b])  # no more than there are processors
    silent = Room(None, "auto", free=lambda device: 0)
    silent.learn(a)
    assert silent.has_for(a, [])
    assert not silent.has_for(a, [a])


def test_on_a_cpu_one_runs_at_a_time_unless_asked(stub: Stub) -> None:
    stub.write(TWO)
    stub.run()
    a, b = stub.prepared().jobs[:2]
    room = Room(None, "cpu", free=lambda device: 2**40)
    room.learn(a)
    assert room.has_for(a, [])
    assert not room.has_for(a, [a])
    assert Room(2, "cpu").has_for(a, [b])
    assert not Room(2, "cpu").has_for(a, [a, b])
    with pytest.raises(UsageError, match="--jobs 0"):
        Room(0, "cpu")


# --- bills -------------------------------------------------------------------------------------------------------

LIVE = TWO + '[[variant]]\nname = "a live"\nlive = true\n[[variant]]\nname = "other"\nrecipe = "itc-only"\n'


def test_a_variant_trained_live_measures_what_the_others_would_have_cost(stub: Stub) -> None:
    stub.write(LIVE)
    result = stub.run()
    a, b, live, other = (line.live for line in result.lines)
    assert (a.seconds, a.ratio, a.how) == (10.0, 5.0, "measured")  # type: ignore[union-attr]
    # 5 steps of 8 at 8 s / 40 samples more each
    assert (b.seconds, b.how) == (pytest.approx(2 + 40 * 0.2), "by another variant")  # type: ignore[union-attr]
    assert live is not None
    assert live.text() == "is live"
    assert other is None  # itc-only reads no teacher: what it would cost is not known
    notes = "\n".join(result.to_json()["notes"])
    assert (
        "live: a live was trained with teacher and encoder in every step: 10.0 s a run against 2.0 s of a, 200 ms"
        in notes
    )
    assert "the cache does not record how long it took; --extraction-seconds adds" in notes


def test_without_a_live_variant_extraction_gives_an_estimate_that_says_so(stub: Stub) -> None:
    stub.write(TWO)
    result = stub.run(extraction_seconds=80.0)  # of 40 rows: 2 s each
    b = result.lines[1]
    assert b.live is not None
    assert (b.live.seconds, b.live.how) == (pytest.approx(2 + 40 * 2.0), "estimated")
    assert b.live.text() == "~1 min 22 s (41.0 x)"
    notes = "\n".join(result.to_json()["notes"])
    assert "extraction: 1 min 20 s, as given, once for all variants" in notes
    assert "live (~): estimated, not measured" in notes
    # a: 2 + 1280 * 2 s; b: 82 s; two seeds each; the cache: four runs of 2 s, and 80 s
    assert "all 4 runs from the cache: 1 min 28 s with extraction; live: 1 h 28 min" in notes


def test_with_neither_nothing_is_invented(stub: Stub) -> None:
    stub.write(TWO)
    result = stub.run()
    assert {line.live for line in result.lines} == {None}
    assert "live: not known; a variant with live = true beside its twin measures it" in "\n".join(
        result.to_json()["notes"]
    )


def test_an_estimate_is_of_variants_that_read_all_that_was_extracted(stub: Stub) -> None:
    stub.write(TWO.replace("set.training.batch = 8", 'recipe = "itc-only"'))
    lines = stub.run(extraction_seconds=80.0).lines
    assert lines[0].live is not None
    assert lines[1].live is None


def test_a_gpu_has_a_price_that_can_be_given(stub: Stub) -> None:
    stub.environment.setenv("DEVICE", "cuda:0")
    stub.environment.setenv("SECONDS", "3600")
    stub.write(TWO)
    result = stub.run(dollars_per_hour=2.0)
    assert result.lines[0].dollars == 2.0
    assert "trained: 4 runs, 4 h 0 min, $8.00 at $2 an hour" in "\n".join(result.to_json()["notes"])
    assert stub.run().lines[0].dollars == pytest.approx(0.69)
    with pytest.raises(UsageError, match="--dollars-per-hour -1"):
        stub.prepared(dollars_per_hour=-1.0)
    with pytest.raises(UsageError, match="--extraction-seconds 0"):
        stub.prepared(extraction_seconds=0.0)


# --- curves ------------------------------------------------------------------------------------------------------


def test_one_numeric_axis_draws_a_curve_with_a_line_for_everything_else(stub: Stub) -> None:
    stub.write(TWO + "[grid]\noptimiser.lr = [0.001, 0.01, 0.1]\n")
    stub.behaviour = {"b-lr=0.1": 30.0}
    result = stub.run()
    curve = curve_of(result.lines)
    assert curve is not None
    assert [(name, [point.x for point in points]) for name, points in curve.lines] == [
        ("a", [0.001, 0.01, 0.1]),
        ("b", [0.001, 0.01, 0.1]),
    ]
    root = ElementTree.fromstring((stub.folder / "out" / "curve.svg").read_text())
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"optimiser.lr (logarithmic)", "mean recall", "a", "b", "0.001", "0.01", "0.1"} <= set(texts)
    circles = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 6
    places = [float(circle.attrib["cx"]) for circle in circles[:3]]
    assert places[2] - places[1] == pytest.approx(places[1] - places[0], abs=0.2)  # logarithmic
    assert float(circles[5].attrib["cy"]) < float(circles[4].attrib["cy"])  # 30 is above 10
    assert "![mean recall over optimiser.lr](curve.svg)" in (stub.folder / "out" / "table.md").read_text()
    hostile = replace(curve, lines=(("<b>\x00", curve.lines[0][1]),))
    assert "&lt;b&gt;" in svg(hostile, "a < b")
    ElementTree.fromstring(svg(hostile, "a < b"))


@pytest.mark.parametrize("grid", ["", "[grid]\nstudent.image_pooling = ['cls', 'mean']\n",
                                  "[grid]\noptimiser.lr = [0.1, 0.2]\ntraining.epochs = [1, 2]\n"])  # fmt: skip
def test_no_numeric_axis_or_two_of_them_draw_none(stub: Stub, grid: str) -> None:
    stub.write('recipe = "ssmke"\n' + grid)
    assert curve_of(stub.run().lines) is None
    assert not (stub.folder / "out" / "curve.svg").exists()


# --- real trainings ----------------------------------------------------------------------------------------------

SET = ("training.batch=8", "student.text_blocks=1", "evaluation.every_epochs=20")
REAL = 'recipe = "ssmke"\nmax_steps = {steps}\n[set]\n' + "".join(f"{setting}\n" for setting in SET)


def emkum(*words: str) -> list[str]:
    return [sys.executable, "-m", "emkum.cli", *words]


@pytest.mark.slow
def test_real_trainings_two_at_once_and_one_that_cannot_be(tmp_path: Path, cache: Path) -> None:
    text = (
        REAL.format(steps=3) + '[[variant]]\nname = "good"\n[[variant]]\nname = "too large"\nset.training.batch = 99\n'
    )
    path = file(tmp_path, text)
    words = ("--cache", str(cache), "--out", str(tmp_path / "out"), "--jobs", "2", "--device", "cpu", "--json")
    done = subprocess.run(emkum("ablate", str(path), *words), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    good, large = json.loads(done.stdout)["variants"]
    assert (good["finished"], good["steps"], good["score_name"]) == ([0], 3, "mean recall")
    assert large["errors"] == [
        "too large, seed 0: UsageError: a batch of 99 is more than the 40 samples of split 'train' | use a smaller "
        "one: --set training.batch=20"
    ]
    assert (tmp_path / "out" / "runs" / "good" / "seed-0" / "student.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_real_ablation_that_is_killed_ends_with_the_weights_of_one_that_was_not(
    tmp_path: Path, cache: Path, number: signal.Signals
) -> None:
    steps = 400
    path = file(tmp_path, REAL.format(steps=steps))
    words = emkum("ablate", str(path), "--cache", str(cache), "--out", str(tmp_path / "out"))
    words += ["--device", "cpu", "--precision", "float32"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "out" / "runs" / "ssmke" / "seed-0"
    metrics = folder / "metrics.csv"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2)
    process.send_signal(number)
    process.communicate(timeout=STOP_SECONDS)
    assert process.returncode == (75 if number == signal.SIGTERM else -number)
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    info = json.loads((folder / "run.json").read_text())
    assert (info["status"], info["steps"]) == ("finished", steps)
    assert len(info["sessions"]) == (2 if number == signal.SIGTERM else 1)
    config = TrainConfig(cache, "ssmke", SET, tmp_path / "whole", 0, "float32", "cpu", max_steps=steps)
    train(config, say=lambda line: None)
    assert (folder / "student.safetensors").read_bytes() == (tmp_path / "whole" / "student.safetensors").read_bytes()


def test_jobs_are_made_seed_by_seed(stub: Stub) -> None:
    stub.write(TWO)
    jobs: tuple[Job, ...] = stub.prepared().jobs
    assert [(job.variant.name, job.seed) for job in jobs] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


@pytest.mark.parametrize("values", [[2.0**power for power in range(-9, 1)], [float(step) for step in range(12)]])
def test_a_curve_of_many_values_has_fewer_marks_and_every_dot_within(stub: Stub, values: list[float]) -> None:
    stub.write(f'recipe = "ssmke"\n[grid]\noptimiser.weight_decay = {values[:10]}\n')
    curve = curve_of(stub.run(jobs=2).lines)
    assert curve is not None
    root = ElementTree.fromstring(svg(curve, "a"))
    places = [float(circle.attrib["cx"]) for circle in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(places) == 10
    assert sorted(places) == places
    assert 62 <= places[0] < places[-1] <= 542
