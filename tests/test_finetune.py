"""Whole fine-tunings of tiny students: what is learned, measured, kept, stopped and gone on with."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_evaluate import WORDS, extract_config, pairs_tar, trained, word_tokenizer, write_npz
from tiny_cache import tiny_network

import emkum.cli as cli
from emkum.errors import (
    AnotherWriter,
    InputDataError,
    Interrupted,
    NotARun,
    ResumeMismatch,
    TooManyBadSamples,
    UsageError,
)
from emkum.models.network import save_network
from emkum.models.passes import FrozenPass, Wanted
from emkum.shards.reader import Cache
from emkum.stage1_extract.extract import extract
from emkum.stage2_train.evaluate.results import BEFORE, STUDENT, TEACHER
from emkum.stage2_train.evaluate.run import evaluate_cache
from emkum.stage2_train.finetune import classify, glue_files, loop
from emkum.stage2_train.finetune.classify import Classes
from emkum.stage2_train.finetune.folder import FinetuneConfig, continue_command
from emkum.stage2_train.finetune.settings import ClassifySettings, GlueSettings, RetrievalSettings
from emkum.stage2_train.finetune.start import finetune
from emkum.stage2_train.run_folder import LoadedRun, RunFolder, held, load_run, read_checkpoint

needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm, which draws the augmentations, is not installed"
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# --- whole fine-tunings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A cache of 24 + 12 random pictures, and a run of each kind on it."""

    root: Path
    cache: Cache
    pairs: LoadedRun
    images: LoadedRun
    texts: LoadedRun


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("finetune")
    save_network(tiny_network("vit", "image"), root / "vit")
    save_network(replace(tiny_network("bert", "text"), tokenizer=word_tokenizer()), root / "bert")
    for split, num, seed in (("train", 24, 0), ("val", 12, 1)):
        pairs_tar(root / f"{split}.tar", num, seed)
        config = extract_config(root, split)
        extract(config, lambda _: None)
        extract(replace(config, teacher=(str(root / "bert"),), text_encoder=None, targets=("layers",)), lambda _: None)
    once = "training.epochs=1"
    return World(
        root,
        Cache.open(root / "cache"),
        trained(root, "ssmke", "pairs", once),
        trained(root, "image-kd", "images", "student.image_blocks=1", once),
        trained(root, "text-kd", "texts", once),
    )


def colours(path: Path, train: int = 24, test: int = 9) -> Path:
    """Pictures of one colour each, red, green or blue with noise: classes that a linear layer tells apart."""
    rng = np.random.default_rng(0)
    parts = {}
    for part, num in (("train", train), ("test", test)):
        labels = np.arange(num) % 3
        pictures = rng.integers(0, 60, (num, 20, 20, 3))
        pictures[np.arange(num), :, :, labels] += 180
        parts |= {f"x_{part}": pictures.astype(np.uint8), f"y_{part}": labels * 10}
    return write_npz(path, **parts)


def picture_config(world: World, out: Path, npz: Path, **changes: object) -> FinetuneConfig:
    settings = replace(ClassifySettings().unaugmented(), epochs=3, batch=8, lr=1e-2)
    config = FinetuneConfig(world.images.dir, "classify", settings, out=out, data=(str(npz),), device="cpu")
    return replace(config, **{"precision": "float32", **changes})


def quiet(line: str) -> None:
    """For `say`."""


def weights(out: Path, name: str = "student-seed-0") -> dict[str, torch.Tensor]:
    return load_file(out / name / "weights.safetensors")


def test_a_linear_layer_on_frozen_features_tells_colours_apart(world: World, tmp_path: Path) -> None:
    npz = colours(tmp_path / "colours.npz")
    settings = replace(ClassifySettings(), epochs=60, batch=8, lr=3e-2)
    config = picture_config(world, tmp_path / "out", npz, settings=settings, linear=True, baselines=True, seeds=(0, 1))
    lines: list[str] = []
    results = finetune(config, lines.append)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["scores"]) == {STUDENT, BEFORE, TEACHER}
    for found in results["scores"].values():
        assert found["top-1"]["mean"] == 100
        assert set(found["top-1"]["seeds"]) == {"0", "1"}
    assert results["most frequent"]["top-1"] == pytest.approx(100 / 3)
    assert (results["train"], results["test"], results["classes"]) == (24, 9, 3)
    assert results["settings"]["mixup"] == 0
    assert results["trained"] == dict.fromkeys(results["scores"], 16 * 2 + 16 * 3 + 3)
    assert set(weights(tmp_path / "out")) == {"norm.weight", "norm.bias", "linear.weight", "linear.bias"}
    assert lines[0] == "colours: 24 pictures of 3 classes to learn from, 9 to measure on, at 16 px"
    assert json.loads((tmp_path / "out" / "finetune.json").read_text())["status"] == "finished"
    assert not list((tmp_path / "out").rglob("*.ckpt"))
    # Of a head alone only the last epoch is said: the others are over in milliseconds.
    assert [line for line in lines if "epoch" in line] == [line for line in lines if "epoch 60 of 60" in line]


def test_features_are_encoded_once_and_read_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npz = colours(tmp_path / "colours.npz")
    config = picture_config(world, tmp_path / "out", npz, linear=True)
    first = finetune(config, quiet)
    (tmp_path / "out" / "student-seed-0" / "scores.json").unlink()
    monkeypatch.setattr(classify, "encode_pictures", lambda *_: pytest.fail("encoded again"))
    assert finetune(replace(config, resume=True), quiet)["scores"] == first["scores"]
    (tmp_path / "out" / "student-seed-0" / "scores.json").unlink()
    arrays = dict(np.load(npz))
    arrays["x_test"] = arrays["x_test"][::-1]
    np.savez(npz, **arrays)  # the same labels
    with pytest.raises(ResumeMismatch, match="pictures: "):
        finetune(replace(config, resume=True), quiet)
    (tmp_path / "out2").mkdir()
    shutil.copy(tmp_path / "out" / "features.safetensors", tmp_path / "out2")
    with pytest.raises(pytest.fail.Exception):  # those are of other pictures
        finetune(replace(config, out=tmp_path / "out2"), quiet)


def test_features_of_the_linear_probe_are_the_students_means_of_patches(world: World, tmp_path: Path) -> None:
    npz = colours(tmp_path / "colours.npz")
    finetune(picture_config(world, tmp_path / "out", npz, linear=True), quiet)
    found = load_file(tmp_path / "out" / "features.safetensors")
    run, network = load_run(world.images.dir), tiny_network("vit", "image")
    pictures = classify.labelled_sets([str(npz)])[0].queries
    crops = torch.from_numpy(np.stack([pictures.crop(index, 16) for index in range(len(pictures))]))
    (tokens_BTD,) = FrozenPass([network], [Wanted("vit", "tokens", 2)], "float32", "cpu").pictures(crops)
    with torch.no_grad():
        final = run.student.encode_images(tokens_BTD, keep_tokens=True).tokens_BTD
    assert final is not None
    torch.testing.assert_close(found["test/student"], final[:, 1:].mean(1))


def test_all_of_a_student_learns_but_the_prefix(world: World, tmp_path: Path) -> None:
    npz = colours(tmp_path / "colours.npz")
    results = finetune(picture_config(world, tmp_path / "out", npz, baselines=True), quiet)
    assert results["scores"][STUDENT]["top-1"]["mean"] > 60
    before, after = world.images.student.state_dict(), weights(tmp_path / "out")
    moved = [
        n for n in after if n.startswith("trunk.") and not torch.equal(after[n], before[n[len("trunk.student.") :]])
    ]
    assert any("image_blocks.blocks.0" in name for name in moved)
    assert "trunk.backbone.stack.blocks.2.fc1.weight" in weights(tmp_path / "out", "teacher-seed-0")
    assert results["trained"][STUDENT] == sum(tensor.numel() for tensor in after.values())
    history = json.loads((tmp_path / "out" / "student-seed-0" / "scores.json").read_text())["history"]
    assert [line["epoch"] for line in history] == [1, 2, 3]
    assert history[-1]["loss"] < history[0]["loss"]


class Stopper:
    """`say` that is interrupted when a line comes that holds these words."""

    def __init__(self, words: str) -> None:
        self.words = words

    def __call__(self, line: str) -> None:
        if self.words in line:
            raise Interrupted("stopped by SIGTERM; what was committed is kept")


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_fine_tuning_that_is_stopped_and_goes_on_has_the_same_weights(
    world: World, tmp_path: Path, epoch: int
) -> None:
    npz = colours(tmp_path / "colours.npz")
    settings = replace(ClassifySettings().unaugmented(), epochs=3, batch=8, smallest_crop=0.5, flip=True)
    whole = picture_config(world, tmp_path / "whole", npz, settings=settings, seeds=(0, 1))
    stopped = replace(whole, out=tmp_path / "stopped")
    finetune(whole, quiet)
    with pytest.raises(Interrupted) as error:
        # The line comes before the checkpoint of its epoch.
        finetune(stopped, Stopper(f"seed 1: epoch {epoch} of 3"))
    assert error.value.way_out == f"continue: {continue_command(stopped, tmp_path / 'stopped')}"
    info = json.loads((tmp_path / "stopped" / "finetune.json").read_text())
    assert info["status"] == "interrupted"
    lines: list[str] = []
    finetune(replace(stopped, resume=True), lines.append)
    assert "student, seed 0: is trained already" in lines
    assert ("student, seed 1: goes on after epoch 1" in lines) == (epoch == 2)
    for name in ("student-seed-0", "student-seed-1"):
        ours, theirs = weights(tmp_path / "stopped", name), weights(tmp_path / "whole", name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    scores = [json.loads((tmp_path / out / "results.json").read_text())["scores"] for out in ("whole", "stopped")]
    assert scores[0] == scores[1]


def test_a_signal_ends_the_command_and_the_next_goes_on(world: World, tmp_path: Path) -> None:
    npz, out = colours(tmp_path / "c.npz"), tmp_path / "out"
    words = [str(world.images.dir), "--task", "classify", "--images", str(npz), "--no-augment", "--device", "cpu"]
    words += ["--precision", "float32", "--epochs", "2000", "--batch", "8", "--out", str(out)]
    command = [sys.executable, "-m", "emkum.cli", "finetune", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(cli.__file__).parents[1]) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "epoch 3 of" in line:
                process.send_signal(signal.SIGTERM)
        assert process.wait(60) == Interrupted.exit_code
    assert line.startswith("emkum: Interrupted: stopped by SIGTERM; what was committed is kept | continue: emkum fine")
    done = len(read_checkpoint(out / "student-seed-0" / "last.ckpt")["history"])
    assert done >= 2
    epochs = []
    with pytest.MonkeyPatch.context() as patch:

        def epoch(job: object, model: object, optimiser: object, number: int, total: int) -> float:
            epochs.append(number)
            raise Interrupted("enough")

        patch.setattr(loop, "_epoch", epoch)
        assert cli.run(shlex.split(line.partition("continue: ")[2])[1:]) == Interrupted.exit_code
    assert epochs == [done]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(world: World, tmp_path: Path) -> None:
    npz = colours(tmp_path / "colours.npz")
    config = picture_config(world, tmp_path / "out", npz)
    finetune(replace(config, out=tmp_path / "whole"), quiet)
    with pytest.raises(Interrupted):
        finetune(config, Stopper("epoch 3 of 3"))
    last = tmp_path / "out" / "student-seed-0" / "last.ckpt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    lines: list[str] = []
    finetune(replace(config, resume=True), lines.append)
    assert any(line.startswith(f"warning: checkpoint {last} cannot be read") for line in lines)
    assert "student, seed 0: goes on after epoch 1" in lines
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_another_fine_tuning_is_not_gone_on_with(world: World, tmp_path: Path) -> None:
    npz = colours(tmp_path / "colours.npz")
    config = picture_config(world, tmp_path / "out", npz)
    with pytest.raises(NotARun, match="holds no fine-tuning to go on with"):
        finetune(replace(config, resume=True), quiet)
    assert not (tmp_path / "out").exists()
    with pytest.raises(Interrupted):
        finetune(config, Stopper("epoch 2 of 3"))
    with pytest.raises(UsageError, match=r"out holds a fine-tuning already"):
        finetune(config, quiet)
    with pytest.raises(ResumeMismatch) as error:
        finetune(replace(config, resume=True, size=24), quiet)
    assert "is of another fine-tuning (size: 16 there, 24 now) | continue it as it was started: emkum finetune" in (
        error.value.line()
    )
    with pytest.raises(ResumeMismatch, match=r"seeds: \[0\] there, \[1\] now"):
        finetune(replace(config, resume=True, seeds=(1,)), quiet)
    with held(RunFolder(tmp_path / "out")), pytest.raises(AnotherWriter):
        finetune(replace(config, resume=True), quiet)
    finetune(replace(config, resume=True), quiet)


def test_folders_are_numbered_under_the_run_and_empty_ones_taken_away(world: World, tmp_path: Path) -> None:
    npz = colours(tmp_path / "colours.npz")
    config = picture_config(world, tmp_path / "out", npz, linear=True)
    with pytest.raises(UsageError, match=r"pictures of 17 x 17 px do not divide"):
        finetune(replace(config, out=None, size=17), quiet)
    assert not list(world.images.dir.glob("finetune-*"))
    for number in (1, 2):
        finetune(replace(config, out=None), quiet)
        assert (world.images.dir / f"finetune-classify-{number}" / "results.json").is_file()


def test_a_loss_that_is_no_number_stops_the_fine_tuning(world: World, tmp_path: Path) -> None:
    settings = replace(ClassifySettings().unaugmented(), epochs=3, batch=4, lr=10.0, warmup=0.0, clip_norm=0.0)
    config = picture_config(world, tmp_path / "out", colours(tmp_path / "c.npz"), settings=settings)
    broken = replace(config, settings=settings)
    original = classify.F.cross_entropy

    def cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return original(outputs, targets) * float("nan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify.F, "cross_entropy", cross_entropy)
        with pytest.raises(UsageError, match=r"diverged: the loss of epoch 1 of student, seed 0 is nan"):
            finetune(broken, quiet)


def test_broken_pictures_are_left_out_and_counted(world: World, tmp_path: Path) -> None:
    from test_evaluate import labelled_tar

    train = labelled_tar(tmp_path / "train.tar", ["cat", "dog"] * 4, broken=1)
    test = labelled_tar(tmp_path / "test.tar", ["cat", "dog", "emu"])
    config = picture_config(world, tmp_path / "out", train, data=(str(train), str(test)))
    with pytest.raises(TooManyBadSamples, match=r"1 of 8 pictures cannot be used, 0.001 of them may; the first: train"):
        finetune(config, quiet)
    lines: list[str] = []
    results = finetune(replace(config, out=tmp_path / "more", max_bad=0.5), lines.append)
    assert [line.split(":")[0] for line in results["quarantined"]] == ["train.tar/001"]
    assert results["classes"] == 2
    assert lines[0].endswith("1 of a class that is not learned count as wrong")


def test_classes_are_counted_from_the_training_pictures(tmp_path: Path) -> None:
    sets = classify.labelled_sets(
        [write_npz(tmp_path / "a.npz", y_train=np.array([7, 3, 7, 3, 9, 9]), y_test=np.array([9, 4, 3, 11]))]
    )
    found = Classes.of(sets[0])
    assert found.num == 3
    assert found.train_N.tolist() == [1, 0, 1, 0, 2, 2]
    assert found.test_M.tolist() == [2, -1, 0, -1]
    one = classify.labelled_sets([write_npz(tmp_path / "b.npz", y_train=np.zeros(6, int))])
    with pytest.raises(InputDataError, match="are all of one class"):
        Classes.of(one[0])


@needs_timm
def test_a_student_learns_from_augmented_pictures(world: World, tmp_path: Path) -> None:
    settings = replace(ClassifySettings(), epochs=2, batch=8)
    config = picture_config(world, tmp_path / "out", colours(tmp_path / "c.npz"), settings=settings)
    results = finetune(config, quiet)
    assert results["settings"]["randaugment"] == 9
    again = finetune(replace(config, out=tmp_path / "again"), quiet)
    assert again["scores"] == results["scores"]
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "again")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# --- GLUE ------------------------------------------------------------------------------------------------


def red_or_not(path: Path, num: int, seed: int) -> Path:
    """Single sentences, of label 1 where the first word is red."""
    rng = np.random.default_rng(seed)
    lines = ["sentence\tlabel"]
    for index in range(num):
        first = "red" if index % 2 else "blue"
        lines.append(f"{first} {' '.join(rng.choice(WORDS[6:], rng.integers(1, 6)))}\t{index % 2}")
    return write(path, "\n".join(lines) + "\n")


def text_config(world: World, out: Path, task: str, train: Path, dev: Path, **changes: object) -> FinetuneConfig:
    settings = replace(GlueSettings(), epochs=6, batch=8, lr=1e-2, max_tokens=16)
    config = FinetuneConfig(world.texts.dir, "glue", settings, out=out, glue_task=task, device="cpu")
    return replace(config, **{"data": (str(train), str(dev)), "precision": "float32", **changes})


def test_a_task_of_glue_is_learned_and_set_beside_its_baselines(world: World, tmp_path: Path) -> None:
    train, dev = red_or_not(tmp_path / "train.tsv", 64, 0), red_or_not(tmp_path / "dev.tsv", 20, 1)
    results = finetune(text_config(world, tmp_path / "out", "sst2", train, dev, baselines=True, seeds=(0, 1)), quiet)
    assert set(results["scores"]) == {STUDENT, BEFORE, TEACHER}
    assert results["scores"][STUDENT]["accuracy"]["mean"] > 85
    assert results["most frequent"] == {"accuracy": 50.0, "mean": 50.0}
    assert (results["train"], results["test"], results["max_tokens"]) == (64, 20, 16)
    assert "trunk.student.text_embedding.tokens" in weights(tmp_path / "out")


@pytest.mark.parametrize(
    ("task", "measures"), [("stsb", {"Pearson", "Spearman", "mean"}), ("mrpc", {"accuracy", "F1", "mean"})]
)
def test_pairs_and_numbers_are_measured_as_glue_does(
    world: World, tmp_path: Path, task: str, measures: set[str]
) -> None:
    rng = np.random.default_rng(0)
    lines = ["sentence1\tsentence2\tlabel"]
    for _ in range(24):
        a, b = rng.choice(["circle", "square"]), rng.choice(["red", "blue"])
        lines.append(f"{a}\t{b}\t{int(b == 'red')}")
    path = write(tmp_path / "a.tsv", "\n".join(lines))
    config = text_config(world, tmp_path / "out", task, path, path, run=world.pairs.dir)
    results = finetune(replace(config, settings=replace(config.settings, epochs=30, lr=3e-3)), quiet)
    found = {name: value["mean"] for name, value in results["scores"][STUDENT].items()}
    assert set(found) == measures
    assert found["mean"] == pytest.approx(np.mean([value for name, value in found.items() if name != "mean"]))
    assert found["mean"] > 90
    assert ("most frequent" in results) == (task == "mrpc")


def test_a_glue_task_goes_on_where_it_stopped(world: World, tmp_path: Path) -> None:
    train, dev = red_or_not(tmp_path / "train.tsv", 30, 0), red_or_not(tmp_path / "dev.tsv", 10, 1)
    config = text_config(world, tmp_path / "stopped", "sst2", train, dev)
    finetune(replace(config, out=tmp_path / "whole"), quiet)
    with pytest.raises(Interrupted):
        finetune(config, Stopper("epoch 4 of 6"))
    finetune(replace(config, resume=True), quiet)
    ours, theirs = weights(tmp_path / "stopped"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    red_or_not(dev, 12, 2)
    with pytest.raises(ResumeMismatch, match=r"dev: .* there, .* now"):
        finetune(replace(config, resume=True), quiet)


def test_answers_do_not_depend_on_the_other_texts_of_a_batch(world: World, tmp_path: Path) -> None:
    train, dev = red_or_not(tmp_path / "train.tsv", 16, 0), red_or_not(tmp_path / "dev.tsv", 20, 1)
    config = text_config(world, tmp_path / "a", "sst2", train, dev)
    one = finetune(config, quiet)["scores"]
    assert finetune(replace(config, out=tmp_path / "b", batch_size=1), quiet)["scores"] == one


@pytest.mark.real
def test_a_tiny_student_reads_real_pairs(world: World, tmp_path: Path, shared: Path) -> None:
    data = {}
    for part, num in (("train", 160), ("test", 80)):
        lines = (shared / "data" / "text" / f"msr_paraphrase_{part}.txt").read_text(encoding="utf-8-sig").split("\n")
        data[part] = write(tmp_path / f"{part}.tsv", "\n".join(lines[: 1 + num]))
    config = text_config(world, tmp_path / "out", "mrpc", data["train"], data["test"])
    results = finetune(replace(config, settings=GlueSettings(epochs=1, max_tokens=64)), quiet)
    assert (results["train"], results["test"], results["max_tokens"]) == (160, 80, 16)
    assert 0 < results["scores"][STUDENT]["accuracy"]["mean"] <= 100


# --- retrieval -------------------------------------------------------------------------------------------


def pair_config(world: World, out: Path, **changes: object) -> FinetuneConfig:
    settings = RetrievalSettings(epochs=1, batch=8, lr=1e-3)
    config = FinetuneConfig(world.pairs.dir, "retrieval", settings, out=out, device="cpu", precision="float32")
    return replace(config, **changes)


def test_retrieval_goes_on_from_the_run_and_is_measured_beside_it(world: World, tmp_path: Path) -> None:
    lines: list[str] = []
    results = finetune(pair_config(world, tmp_path / "out"), lines.append)
    before = evaluate_cache(load_run(world.pairs.dir))["retrieval"]
    found = results["retrieval"]
    # What the student was before this training is the student of the run.
    assert found["baselines"][BEFORE]["image_to_text"] == before["image_to_text"]
    assert found["baselines"][BEFORE]["text_to_image"] == before["text_to_image"]
    tuned = load_run(tmp_path / "out")
    assert tuned.recipe.student.head_width == world.pairs.student.spec.head_width  # of the target, which itc lacks
    assert tuned.recipe.terms == ("itc",)
    assert tuned.recipe.optimiser.lr == pytest.approx(1e-3 * 256 / 8)
    assert tuned.recipe.optimiser.encoder_lr == tuned.recipe.optimiser.lr
    assert tuned.student.spec == world.pairs.student.spec
    origin = next(line for line in lines if line.startswith("weights of"))
    assert "not taken" not in origin
    moved = itertools.starmap(
        torch.equal, zip(tuned.student.state_dict().values(), world.pairs.student.state_dict().values(), strict=True)
    )
    assert not all(moved)
    assert json.loads((tmp_path / "out" / "finetune.json").read_text())["status"] == "finished"
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["retrieval"] == found


def test_retrieval_can_be_measured_on_tars_and_goes_on(world: World, tmp_path: Path) -> None:
    config = pair_config(world, tmp_path / "out", data=(str(world.root / "val.tar"),))
    with pytest.raises(Interrupted) as error:
        finetune(config, Stopper("next: emkum evaluate"))
    assert "--task retrieval" in error.value.way_out
    results = finetune(replace(config, resume=True), quiet)
    assert results["retrieval"]["on"].startswith("data ")
    assert results["retrieval"]["pictures"] == 12


def test_retrieval_is_refused_where_it_cannot_be(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"retrieval needs pictures and captions; .* trained on images"):
        finetune(pair_config(world, tmp_path / "out", run=world.images.dir), quiet)
    with pytest.raises(UsageError, match="trains from one seed, not from 2"):
        finetune(pair_config(world, tmp_path / "out", seeds=(0, 1)), quiet)
    with pytest.raises(UsageError, match="--checkpoint last: retrieval starts from the best"):
        finetune(pair_config(world, tmp_path / "out", checkpoint="last"), quiet)
    assert not (tmp_path / "out").exists()
    from tiny_cache import make_cache

    other = make_cache(tmp_path / "other")
    with pytest.raises(UsageError) as error:
        finetune(pair_config(world, tmp_path / "out", cache=str(other.path)), quiet)
    assert "has neither image/vit@2/tokens, which the student of" in error.value.line()
    assert error.value.way_out == "extract it: --encoder vit --cut 2"


# --- the command -----------------------------------------------------------------------------------------


def test_the_command_prints_a_table_or_json(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    npz = colours(tmp_path / "colours.npz")
    words = [
        "finetune",
        str(world.images.dir),
        "--task",
        "classify",
        "--images",
        str(npz),
        "--linear",
        "--device",
        "cpu",
    ]
    assert cli.run([*words, "--out", str(tmp_path / "a"), "--epochs", "2", "--set", "smoothing=0", "warmup=0"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("classes of colours at 16 px, linear layer on frozen features, %, seed 0\n")
    assert captured.err.endswith(f"written to {tmp_path / 'a' / 'results.json'}\n")
    assert cli.run([*words, "--out", str(tmp_path / "b"), "--epochs", "2", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert (results["settings"]["epochs"], results["settings"]["smoothing"]) == (2, 0.1)


def test_the_command_that_continues_is_the_one_that_started(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    npz, out = colours(tmp_path / "c.npz"), tmp_path / "out"
    words = [str(world.images.dir), "--task", "classify", "--images", str(npz), "--no-augment", "--seeds", "0,2"]
    words += ["--device", "cpu", "--precision", "float32", "--epochs", "1", "--batch", "8", "--lr", "0.002"]
    assert cli.run(["finetune", *words, "--out", str(out)]) == 0
    capsys.readouterr()
    again = shlex.split(json.loads((out / "finetune.json").read_text())["continue"])
    assert again[:2] == ["emkum", "finetune"]
    assert cli.run(again[1:]) == 0
    assert "student, seed 2: is trained already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "classfy"], "no task 'classfy' | did you mean classify?"),
        (["--task", "glue", "--linear"], "--linear is of --task classify; this is --task glue | leave it out"),
        (["--task", "classify", "--train", "x"], "--train is of --task glue; this is --task classify"),
        (["--task", "classify", "--seeds", "a"], "--seeds a is not a list of numbers | give them as 0,1,2"),
        (["--task", "classify", "--seeds", "1,1"], "seeds [1, 1] are not different numbers from 0"),
        (["--task", "classify", "--resume"], "--resume does not say what to go on with | name its folder"),
        (["--task", "classify", "--precision", "half"], "--precision half | use auto, float32 or bfloat16"),
        (["--task", "classify"], "no pictures to learn from | --images FILE.npz, or two labelled tars"),
        (["--task", "glue"], "trained on images only | use --task classify, or a run with texts"),
    ],
)
def test_flags_that_cannot_work_are_refused(
    world: World, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["finetune", str(world.images.dir), *words, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
    assert glue_files.TASKS  # the table is read without torch


def test_a_folder_that_is_no_run_is_said_and_nothing_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["finetune", str(tmp_path / "nothing"), "--task", "glue", "--out", str(tmp_path / "out")]) == 2
    assert f"NotARun: {tmp_path / 'nothing'} holds no training run (no run.json)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_pictures_are_refused_by_a_run_of_texts(world: World, tmp_path: Path) -> None:
    npz = colours(tmp_path / "c.npz")
    with pytest.raises(UsageError, match="trained on texts only"):
        finetune(picture_config(world, tmp_path / "out", npz, run=world.texts.dir), quiet)
    with pytest.raises(UsageError, match="--images names 2 sets of pictures"):
        finetune(picture_config(world, tmp_path / "out", npz, data=(str(npz), str(npz))), quiet)
    with pytest.raises(UsageError, match="GLUE needs a file to learn from and one to measure on"):
        finetune(text_config(world, tmp_path / "out", "sst2", npz, npz, data=(str(npz),)), quiet)
