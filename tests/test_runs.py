"""`emkum runs`: what is said of run folders, whatever their state, and how two of them differ."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emkum.cli import run as emkum
from emkum.errors import NotARun
from emkum.stage2_train.runs import (
    compare_runs,
    comparison_table,
    find_runs,
    last_score,
    metrics,
    read_run,
    runs_table,
    summarise,
    time_text,
    validation,
)

INFO: dict[str, Any] = {
    "recipe": {"name": "ssmke", "training": {"batch": 8, "epochs": 2}, "objectives": {"itc": {"weight": 1.0}}},
    "cache": {"path": "/caches/flickr", "uuid": "u", "fields": {"teacher/beit2/image/cls": "d1"}},
    "identity": {"fields": {"text/minilm/ids": "d0", "teacher/beit2/image/cls": "d1"}, "rows": "r" * 64},
    "versions": {"torch": "2.13.0", "emkum": "0.3"},
    "status": "finished",
    "steps": 10,
    "total_steps": 10,
    "seconds": 7200.0,
    "device": "cuda:0",
    "seed": 3,
    "git_revision": "0123456789abcdef+",
    "score": {"name": "mean recall", "value": 41.5, "step": 5, "split": "val"},
}
METRICS = (
    "step,epoch,lr,seconds,val_mean_recall\n"
    "5,1,0.1,60,\n5,,,,41.5\n10,2,0.05,120.5,\n10,,,,40.25\n"
)  # fmt: skip


def make_run(folder: Path, lines: str = METRICS, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({**INFO, **changes}))
    (folder / "metrics.csv").write_text(lines)
    return folder


def test_a_run_is_told_with_its_scores_first_best_then_last_and_its_cost(tmp_path: Path) -> None:
    found = summarise(make_run(tmp_path / "a"), 0.69)
    assert (found.recipe, found.teacher, found.cache, found.seed) == ("ssmke", "beit2", "/caches/flickr", 3)
    assert (found.status, found.steps, found.total_steps) == ("finished", 10, 10)
    assert (found.score_name, found.best, found.last) == ("mean recall", 41.5, 40.25)
    assert found.dollars == pytest.approx(1.38)
    head, line = runs_table([found]).splitlines()
    assert " ".join(head.split()) == "run recipe teacher cache status steps score best last time cost commit"
    said = "ssmke beit2 flickr finished 10/10 mean recall 41.5 40.25 2 h 0 min $1.38 0123456789+"
    assert " ".join(line.split()[1:]) == said


def test_a_folder_without_a_run_is_unreadable() -> None:
    found = summarise(Path("nowhere"))
    assert (found.status, found.error) == ("unreadable", "nowhere holds no training run (no run.json)")


def test_on_a_cpu_no_dollars_are_said(tmp_path: Path) -> None:
    found = summarise(make_run(tmp_path / "a", device="cpu"))
    assert found.dollars is None
    assert " CPU " in runs_table([found])


def test_a_run_in_progress_is_told_by_its_log_and_one_whose_process_is_gone_is_killed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", status="running", steps=None, seconds=None, score=None)
    found = summarise(folder)
    assert (found.status, found.steps, found.seconds, found.best) == ("killed", 10, 120.5, None)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert summarise(folder).status == "running"
    assert summarise(folder).status == "killed"


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    found = summarise(make_run(tmp_path / "a", status="failed", error="training diverged"))
    assert runs_table([found]).splitlines()[-1] == f"{tmp_path / 'a'}: training diverged"


def test_the_last_score_is_the_one_that_decided_by_name(tmp_path: Path) -> None:
    losses = make_run(
        tmp_path / "b", "step,lr,val_loss\n5,0.1,\n5,,0.5\n", score={"name": "validation loss", "value": 0.4}
    )
    assert summarise(losses).last == 0.5
    assert last_score(losses, "mean recall") is None
    assert last_score(make_run(tmp_path / "c", "step,lr,val_mean_recall\n"), "mean recall") is None
    named = make_run(tmp_path / "d", "step,lr,val_image_to_text_R@1,val_mean_recall\n5,,7,40\n")
    assert last_score(named, "val_image_to_text_R@1") == 7
    assert validation(metrics(named)) == {"val_image_to_text_R@1": 7, "val_mean_recall": 40}


def test_torn_lines_of_a_log_are_no_numbers(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", "step,lr,val_loss\n5,0.1\n6,x,0.5,9\n\xff\n")
    assert metrics(folder) == [{"step": 5, "lr": 0.1}, {"step": 6, "val_loss": 0.5}, {}]


def test_runs_are_found_below_the_folders_named_each_once_and_not_inside_of_each_other(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("x/a", "x/deep/er/b", "y")]
    make_run(runs[0] / "copy")
    make_run(tmp_path / "x" / ".hidden")
    assert find_runs([tmp_path]) == runs
    assert find_runs([tmp_path / "y", tmp_path]) == [runs[2], *runs[:2]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotARun) as error:
        find_runs([tmp_path / "empty"])
    assert error.value.line() == (
        f"NotARun: no training run in {tmp_path / 'empty'} | name the folder that runs lie in: emkum runs DIR"
    )
    with pytest.raises(NotARun, match=r"no training run in .*gone, which is no folder"):
        find_runs([tmp_path / "gone"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is not JSON"),
        ("[]", "is not of an emkum run: it lacks recipe"),
        ('{"recipe": {}, "cache": 1}', "lacks cache"),
    ],
)
def test_what_is_no_run_is_listed_as_unreadable_and_not_compared(tmp_path: Path, text: str, expected: str) -> None:
    folder = make_run(tmp_path / "a")
    (folder / "run.json").write_text(text)
    assert expected in summarise(folder).error
    with pytest.raises(NotARun, match=expected):
        read_run(folder)


def test_two_runs_are_compared_in_recipe_cache_versions_and_result(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a")
    recipe = {**INFO["recipe"], "training": {"batch": 16, "epochs": 2}, "objectives": {"ctl": {"bank": "all"}}}
    second = make_run(
        tmp_path / "b",
        recipe=recipe,
        seed=4,
        cache={**INFO["cache"], "uuid": "v"},
        identity={**INFO["identity"], "rows": "q" * 64},
        versions={"torch": "2.14.0", "emkum": "0.3"},
        score={**INFO["score"], "value": 42.0},
    )
    found = compare_runs(first, second)
    told = {part: {each.path: (each.first, each.second) for each in entries} for part, entries in found.items()}
    assert told["recipe"] == {
        "training.batch": (8, 16),
        "objectives.itc.weight": (1.0, None),
        "objectives.ctl.bank": (None, "all"),
    }
    assert told["cache"] == {"uuid": ("u", "v"), "rows trained on (digest)": ("r" * 12, "q" * 12)}
    assert told["versions"] == {"torch": ("2.13.0", "2.14.0")}
    assert told["run"] == {"seed": (3, 4)}
    assert told["result"]["best"] == (41.5, 42.0)
    table = comparison_table(first, second, found)
    assert "training.batch         8" in table
    alike = comparison_table(first, first, compare_runs(first, first))
    assert alike.startswith("recipe: the same\n\ncache: the same\n\nversions: the same\n\nrun: the same\n\nresult\n")


def test_times_read_as_people_say_them() -> None:
    assert [time_text(seconds) for seconds in (None, 3.14, 59.97, 245, 12_000)] == [
        "–",
        "3.1 s",
        "1 min 0 s",
        "4 min 5 s",
        "3 h 20 min",
    ]


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command_lists_unless_compare_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "b", seed=5)
    monkeypatch.chdir(tmp_path)
    for arguments in (["runs"], ["runs", "runs"], ["runs", "list", "runs"], ["runs", "runs/a", "runs/b"]):
        assert emkum(arguments) == 0
        assert len(capsys.readouterr().out.splitlines()) == 3
    assert emkum(["runs", "--json", "--dollars-per-hour", "1"]) == 0
    assert [run["dollars"] for run in json.loads(capsys.readouterr().out)] == [2.0, 2.0]
    assert emkum(["runs", "compare", "runs/a", "runs/b"]) == 0
    assert "seed  3       5" in capsys.readouterr().out
    assert emkum(["runs", "compare", "runs/a", "runs/b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == [{"path": "seed", "first": 3, "second": 5}]
    assert emkum(["runs", "compare", "runs/a", "runs/c"]) == 2
    assert "runs/c holds no training run" in capsys.readouterr().err
    assert emkum(["runs", "--help"]) == 0
    assert "compare" in capsys.readouterr().out


def test_listing_runs_does_not_load_torch(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    code = f"import sys\nfrom emkum.cli import run\nassert run(['runs', {str(tmp_path)!r}]) == 0\n"
    code += "assert not {'torch', 'zarr', 'pyarrow'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
