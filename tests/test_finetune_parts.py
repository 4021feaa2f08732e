"""What fine-tuning is made of: measures, settings, trunks, augmentation, files of GLUE, each by itself."""

from __future__ import annotations

import importlib.util
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_students import build, texts, tokens
from test_evaluate import WORDS, word_tokenizer
from tiny_cache import tiny_classifier, tiny_network
from torch import nn

from emkum.errors import (
    InputDataError,
    MissingPackage,
    NoData,
    UsageError,
)
from emkum.models.backbone import BackboneSpec
from emkum.models.network import normalise
from emkum.models.passes import FrozenPass, Wanted
from emkum.models.preprocessing import Preprocessing
from emkum.models.resnet import ResNetSpec
from emkum.stage2_train.evaluate.results import BEFORE, STUDENT
from emkum.stage2_train.finetune import augment, loop, metrics
from emkum.stage2_train.finetune.augment import Augment, drawn_from, smoothed
from emkum.stage2_train.finetune.classify import shuffled
from emkum.stage2_train.finetune.glue import joined_ids
from emkum.stage2_train.finetune.glue_files import glue_task, read_sentences
from emkum.stage2_train.finetune.loop import rate
from emkum.stage2_train.finetune.results import over_seeds, table
from emkum.stage2_train.finetune.settings import ClassifySettings, Schedule, settings_of
from emkum.stage2_train.finetune.trunks import Classifier, FrozenPrefix, NetworkTrunk, StudentTrunk, rate_factors
from emkum.stage2_train.student import Student, StudentSpec
from emkum.stage2_train.student_spec import ImageSide, PixelSide

needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm, which draws the augmentations, is not installed"
)

# --- measures --------------------------------------------------------------------------------------------


def test_measures_equal_their_definitions_written_out() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        said, true = rng.integers(0, 2, 30), rng.integers(0, 2, 30)
        pairs = list(zip(said.tolist(), true.tolist(), strict=True))
        tp, tn = pairs.count((1, 1)), pairs.count((0, 0))
        fp, fn = pairs.count((1, 0)), pairs.count((0, 1))
        assert metrics.accuracy(said, true) == pytest.approx(100 * (tp + tn) / 30)
        precision, recall = tp / (tp + fp), tp / (tp + fn)
        assert metrics.f1(said, true) == pytest.approx(100 * 2 * precision * recall / (precision + recall))
        below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        assert metrics.matthews(said, true) == pytest.approx(100 * (tp * tn - fp * fn) / below)
        x, y = rng.normal(size=30), rng.integers(0, 6, 30).astype(float)
        assert metrics.pearson(x, y) == pytest.approx(100 * np.corrcoef(x, y)[0, 1])
        ranks = [[sum(b < a for b in v) + (sum(b == a for b in v) + 1) / 2 for a in v] for v in (x, y)]
        assert metrics.spearman(x, y) == pytest.approx(100 * np.corrcoef(*ranks)[0, 1])


def test_matthews_of_three_classes_is_the_correlation_of_indicators() -> None:
    rng = np.random.default_rng(1)
    said, true = rng.integers(0, 3, 50), rng.integers(0, 3, 50)
    a, b = np.eye(3)[said], np.eye(3)[true]

    def covariance(u: np.ndarray, v: np.ndarray) -> float:
        return float(((u - u.mean(0)) * (v - v.mean(0))).sum())

    expected = 100 * covariance(a, b) / math.sqrt(covariance(a, a) * covariance(b, b))
    assert metrics.matthews(said, true) == pytest.approx(expected)


def test_measures_of_constant_answers_are_zero_and_of_nothing_are_refused() -> None:
    ones, mixed = np.ones(4, int), np.array([0, 1, 1, 0])
    assert metrics.matthews(ones, mixed) == metrics.pearson(ones, mixed) == metrics.spearman(ones, mixed) == 0
    assert metrics.f1(np.zeros(4, int), np.zeros(4, int)) == 0
    with pytest.raises(ValueError, match="0 answers for 0 samples"):
        metrics.accuracy(ones[:0], ones[:0])


def test_top_k_counts_ties_against_and_unknown_classes_as_wrong() -> None:
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 1.0, 0.0], [3.0, 2.0, 1.0]])
    assert metrics.top(scores, np.array([0, 1, 0, -1]), 1) == 25
    assert metrics.top(scores, np.array([0, 1, 0, -1]), 2) == 75
    assert metrics.top(scores, np.array([3, 3, 3, -1]), 3) == 0


def test_deviations_over_seeds_are_of_a_sample() -> None:
    histories = {s: [{"epoch": 1, "loss": 0.0, "seconds": 1.0, "top-1": v}] for s, v in ((0, 10.0), (4, 14.0))}
    found = over_seeds(histories)
    assert found == {"top-1": {"mean": 12.0, "deviation": pytest.approx(math.sqrt(8)), "seeds": {"0": 10.0, "4": 14.0}}}
    text = table({"scores": {BEFORE: found, STUDENT: found}, "seeds": [0, 4], "on": "x", "most frequent": {"top-1": 3}})
    assert text.splitlines()[0] == "x, %, 2 seeds: mean and deviation"
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["student", "student", "the"]
    assert text.splitlines()[2].split() == ["student", "12.0", "+-", "2.8"]


# --- settings --------------------------------------------------------------------------------------------


def test_the_published_settings_are_the_defaults() -> None:
    found = settings_of("classify")
    assert isinstance(found, ClassifySettings)
    assert (found.epochs, found.batch, found.lr, found.layer_decay) == (15, 256, 1e-3, 0.75)
    assert (found.mixup, found.cutmix, found.randaugment, found.randaugment_layers) == (0.8, 1.0, 9, 2)
    assert (found.erasing, found.smoothing) == (0.25, 0.1)
    plain = found.unaugmented()
    assert not plain.needs_library
    assert (plain.smallest_crop, plain.flip, plain.smoothing) == (1.0, False, 0.1)
    retrieval = settings_of("retrieval")
    assert (retrieval.epochs, retrieval.batch, retrieval.lr) == (5, 1024, 3e-5)
    assert settings_of("glue", epochs=None).epochs == 3
    assert settings_of("classify", ["layer-decay=0.81", "flip=false"], lr=0.01) == replace(
        found, layer_decay=0.81, flip=False, lr=0.01
    )


@pytest.mark.parametrize(
    ("task", "overrides", "message"),
    [
        ("clasify", [], "no task 'clasify' | did you mean classify?"),
        ("classify", ["mixap=1"], "classify has no setting mixap | did you mean mixup?"),
        ("glue", ["mixup=1"], "glue has no setting mixup | settings: epochs, batch, lr"),
        ("glue", ["warmup"], "--set warmup is not name=value | for example --set weight_decay=0.05"),
        ("glue", ["epochs=1.5"], "epochs = 1.5 is not an integer | change it with --set epochs=..."),
        ("classify", ["flip=maybe"], "flip = maybe is not true or false"),
        ("glue", ["warmup=2"], "warmup = 2 is not within 0 and 1 | give another: --set warmup=..."),
        ("glue", ["lr=nan"], "lr = nan is not within 0 and 10"),
    ],
)
def test_settings_that_cannot_be_are_refused(task: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        settings_of(task, overrides)
    assert message in error.value.line()


def test_the_rate_rises_and_falls_to_zero() -> None:
    rates = [rate(step, 20, 0.1) for step in range(21)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[11] == pytest.approx(0.5)
    assert rates[20] == pytest.approx(0)


def test_every_step_of_every_epoch_has_its_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    class Watched(torch.optim.AdamW):
        def step(self, closure=None):  # type: ignore[no-untyped-def]
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    batch = (torch.randn(4, 3),), torch.tensor([0, 1, 1, 0])
    job = loop.Job(
        name="tiny",
        dir=tmp_path,
        model=Classifier(None, 3, 2, norm=True, seed=0),
        schedule=Schedule(epochs=3, lr=0.4, warmup=0.2),
        steps=5,
        batches=lambda epoch: iter([batch] * 5),
        loss=nn.functional.cross_entropy,
        score=lambda model: {"training": float(model.training), "gradients": float(torch.is_grad_enabled())},
        compute="float32",
        device=torch.device("cpu"),
        identity={},
    )
    history = loop.run_job(job, lambda _: None)
    assert rates == pytest.approx([0.4 * rate(step, 15, 0.2) for step in range(15)])
    assert [(line["training"], line["gradients"]) for line in history] == [(0.0, 0.0)] * 3


# --- trunks ----------------------------------------------------------------------------------------------


def test_a_students_trunk_is_the_mean_of_its_patches() -> None:
    student = build().eval()
    trunk = StudentTrunk(student, "image")
    out = student.encode_images(tokens(), keep_tokens=True)
    assert out.tokens_BTD is not None
    assert torch.equal(trunk(tokens()), out.tokens_BTD[:, 1:].mean(1))
    trained = {name.split(".")[0] for name, p in student.named_parameters() if p.requires_grad}
    assert trained == {"image_blocks", "shared_blocks", "token_types", "token_type_scale", "norm"}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_students_trunk_of_texts_pools_as_it_was_trained(pooling: str) -> None:
    student = build(f"student.text_pooling={pooling}").eval()
    ids, mask = texts()
    tokens_BTD = student.encode_texts(ids, mask, keep_tokens=True).tokens_BTD
    assert tokens_BTD is not None
    found = StudentTrunk(student, "text")(ids, mask)
    expected = [t[0] if pooling == "cls" else t[m].mean(0) for t, m in zip(tokens_BTD, mask, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))
    trained = {name.split(".")[0] for name, p in student.named_parameters() if p.requires_grad}
    assert "image_blocks" not in trained
    assert "text_embedding" in trained


def test_a_student_with_an_mlp_of_one_vector_gives_what_its_second_layer_does() -> None:
    student = build(recipe="shre").eval()
    trunk = StudentTrunk(student, "image")
    found = trunk(tokens())
    assert torch.equal(found, student.encode_images(tokens()).layers[1])
    assert found.shape[1] == trunk.width


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_student_of_pixels_is_its_network(kind: str) -> None:
    network = tiny_network("vit", "image") if kind == "vit" else tiny_classifier("tinyresnet")
    spec, preprocessing = network.backbone.spec, Preprocessing(image_size=16)
    assert isinstance(spec, BackboneSpec | ResNetSpec)
    side = ImageSide("", 0, network.num_prefix, None, "mean")
    student = Student(
        StudentSpec(side, None, network.width, None, False, None, pixels=PixelSide(spec, preprocessing, 16))
    )
    trunk = StudentTrunk(student.eval(), "image")
    images = torch.randn(2, 3, 16, 16)
    assert trunk(images).shape == (2, trunk.width)
    torch.testing.assert_close(trunk(images), student.encode_images(images).features_BD)
    factors = rate_factors(Classifier(trunk, trunk.width, 3, norm=True, seed=0), 0.5)
    if kind == "vit":
        assert factors["trunk.student.network.stack.blocks.3.fc1.weight"] == 0.5
        assert factors["trunk.student.network.embedding.patch.weight"] == 0.5**5
    else:
        assert set(factors.values()) == {1.0}


def test_the_prefix_and_the_whole_network_are_those_of_the_frozen_pass() -> None:
    network = tiny_network("vit", "image")
    crops = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    frozen = FrozenPass([network], [Wanted("vit", "tokens", 2), Wanted("vit", "mean")], "float32", "cpu")
    expected_tokens, expected_mean = frozen.pictures(crops)
    found = FrozenPrefix(network, 2, "float32", torch.device("cpu"))(normalise(network, crops))
    torch.testing.assert_close(found, expected_tokens.clone())
    trunk = NetworkTrunk(network, 2, "patches").eval()
    torch.testing.assert_close(trunk(found).detach(), expected_mean.clone())
    trained = {name for name, p in trunk.named_parameters() if p.requires_grad}
    assert not [n for n in trained if ".embedding." in n or ".blocks.0." in n or ".blocks.1." in n]
    assert any(".blocks.2." in n for n in trained)
    words = tiny_network("bert", "text")
    ids, mask = texts()
    for what, pooling in (("cls", "cls"), ("mean", "mean")):
        (expected,) = FrozenPass([words], [Wanted("bert", what)], "float32", "cpu").texts(ids, mask)  # type: ignore[arg-type]
        text_trunk = NetworkTrunk(words, 0, pooling)  # type: ignore[arg-type]
        torch.testing.assert_close(text_trunk(ids, mask).detach(), expected.clone())


def test_rates_decay_block_by_block_through_shared_blocks() -> None:
    model = Classifier(StudentTrunk(build("student.image_blocks=2"), "image"), 16, 3, norm=True, seed=0)
    factors = rate_factors(model, 0.5)
    of = {
        name: factors[f"trunk.student.{name}.fc1.weight"] for name in ("image_blocks.blocks.0", "image_blocks.blocks.1")
    }
    assert of == {"image_blocks.blocks.0": 0.125, "image_blocks.blocks.1": 0.25}
    assert factors["trunk.student.shared_blocks.blocks.0.fc1.weight"] == 0.5
    assert factors["trunk.student.token_types"] == 0.5
    assert {factors[n] for n in ("norm.weight", "linear.weight", "trunk.student.norm.weight")} == {1.0}
    text = Classifier(StudentTrunk(build("student.text_blocks=2"), "text"), 16, 2, norm=False, seed=0)
    factors = rate_factors(text, 0.5)
    assert factors["trunk.student.text_embedding.tokens"] == 0.0625
    assert factors["trunk.student.text_blocks.blocks.1.fc1.weight"] == 0.25
    whole = rate_factors(
        Classifier(NetworkTrunk(tiny_network("vit", "image"), 2, "patches"), 16, 3, norm=True, seed=0), 0.5
    )
    assert whole["trunk.backbone.stack.blocks.2.fc1.weight"] == 0.25
    assert whole["trunk.backbone.norm.weight"] == 1.0


def test_a_head_is_the_same_for_a_seed_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    one, other = (Classifier(None, 4, 3, norm=True, seed=seed) for seed in (5, 6))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(one.linear.weight, Classifier(None, 4, 3, norm=True, seed=5).linear.weight)
    assert not torch.equal(one.linear.weight, other.linear.weight)


# --- batches and augmentation ----------------------------------------------------------------------------


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    first = np.concatenate(list(shuffled(10, 3, 0, 0)))
    assert len(set(first.tolist())) == len(first) == 9
    assert np.array_equal(first, np.concatenate(list(shuffled(10, 3, 0, 0))))
    assert not np.array_equal(first, np.concatenate(list(shuffled(10, 3, 0, 1))))
    assert not np.array_equal(first, np.concatenate(list(shuffled(10, 3, 1, 0))))


def test_smoothed_targets_are_those_of_cross_entropy_with_smoothing() -> None:
    logits, classes = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    loss = nn.functional.cross_entropy(logits, smoothed(classes, 4, 0.1))
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, classes, label_smoothing=0.1))


def crops_of(num: int, size: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (num, size, size, 3), dtype=np.uint8))


def test_without_augmentation_a_batch_is_the_pictures_and_needs_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "library", lambda: pytest.fail("not needed"))
    preprocessing = Preprocessing(image_size=16)
    made = Augment(ClassifySettings().unaugmented(), 16, preprocessing, 3)
    crops = crops_of(3, made.crop_size)
    images, targets = made(crops, np.array([0, 1, 2]), 0, 0, 0)
    assert torch.equal(images, normalise(preprocessing, torch.from_numpy(np.stack(crops))))
    torch.testing.assert_close(targets, torch.full((3, 3), 0.1 / 3) + 0.9 * torch.eye(3))


def test_crops_and_flips_alone_need_no_library_and_repeat_for_a_key() -> None:
    settings = replace(ClassifySettings().unaugmented(), smallest_crop=0.3, flip=True)
    made = Augment(settings, 14, Preprocessing(image_size=14), 3)
    assert made.crop_size == 16
    crops, classes = crops_of(8, 16), np.arange(8) % 3
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    one, again, other = (made(crops, classes, 0, 1, n)[0] for n in (0, 0, 1))
    assert one.shape == (8, 3, 14, 14)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_generators_go_on_after_an_error_too() -> None:
    before = random.getstate()
    with pytest.raises(ZeroDivisionError), drawn_from(1, 2):
        _ = 1 / int(random.random())
    assert random.getstate() == before


def test_without_the_library_it_is_said_how_to_get_it_or_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage) as error:
        Augment(ClassifySettings(), 16, Preprocessing(image_size=16), 3)
    assert error.value.line() == (
        "MissingPackage: timm is not installed, and augmentation needs it | pip install 'emkum[finetune]', or pip "
        "install --no-deps timm where no torchvision is wanted; --no-augment trains on the pictures as they are"
    )


def test_a_library_of_another_make_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "other" / "data").mkdir(parents=True)
    (tmp_path / "other" / "__init__.py").touch()
    (tmp_path / "other" / "data" / "auto_augment.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.setattr(augment, "PACKAGE", "other")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackage, match=r"auto_augment\.py of other cannot be used here: No module named"):
        augment.library()


@needs_timm
def test_the_library_draws_the_same_pictures_for_a_key() -> None:
    made = Augment(ClassifySettings(), 32, Preprocessing(image_size=32), 4)
    crops, classes = crops_of(9, made.crop_size), np.arange(9) % 4
    images, targets = made(crops, classes, 0, 0, 0)
    assert images.shape == (8, 3, 32, 32)  # two and two are mixed
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    again = made(crops, classes, 0, 0, 0)
    assert torch.equal(images, again[0])
    assert torch.equal(targets, again[1])
    assert not torch.equal(images, made(crops, classes, 0, 0, 1)[0])


@needs_timm
@pytest.mark.parametrize("only", [{"mixup": 0.8}, {"cutmix": 1.0}, {"randaugment": 9}, {"erasing": 1.0}])
def test_each_augmentation_changes_pictures_by_itself(only: dict[str, float]) -> None:
    plain = ClassifySettings().unaugmented()
    preprocessing = Preprocessing(image_size=32)
    crops, classes = crops_of(8, 32), np.arange(8) % 4
    images, targets = Augment(replace(plain, **only), 32, preprocessing, 4)(crops, classes, 0, 0, 3)
    as_they_are, smooth = Augment(plain, 32, preprocessing, 4)(crops, classes, 0, 0, 3)
    assert not torch.equal(images, as_they_are)
    mixes = "mixup" in only or "cutmix" in only
    assert torch.equal(targets, smooth) != mixes


@needs_timm
@pytest.mark.parametrize("only", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_targets_say_how_much_of_each_class_is_in_a_picture(only: dict[str, float]) -> None:
    settings = replace(ClassifySettings().unaugmented(), smoothing=0.0, **only)
    preprocessing = Preprocessing(image_size=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    classes = np.array([0, 1, 2, 1, 0, 2])
    crops = [np.broadcast_to(255 * np.eye(3, dtype=np.uint8)[c], (32, 32, 3)).copy() for c in classes]
    for batch in range(5):
        images, targets = Augment(settings, 32, preprocessing, 3)(crops, classes, 0, 0, batch)
        torch.testing.assert_close(images.mean(dim=(2, 3)), targets, rtol=0, atol=1e-5)


@needs_timm
def test_the_strongest_operations_run_with_this_pillow() -> None:
    settings = replace(ClassifySettings().unaugmented(), randaugment=10, randaugment_layers=10)
    made = Augment(settings, 16, Preprocessing(image_size=16), 4)
    for batch in range(10):
        assert torch.isfinite(made(crops_of(8, 16), np.arange(8) % 4, 0, 0, batch)[0]).all()


# --- files of GLUE ---------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("task", "name", "text", "first", "second", "labels"),
    [
        (
            "mrpc",
            "a.tsv",
            'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t2\t3\tHi "you\tHey\n',
            'Hi "you',
            "Hey",
            [1],
        ),
        ("qqp", "a.tsv", "id\tquestion1\tquestion2\tis_duplicate\n7\ta\tb\t0\r\n", "a", "b", [0]),
        ("mnli", "a.tsv", "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tx\tneutral\n", "a", "b", [2]),
        ("qnli", "a.tsv", "index\tquestion\tsentence\tlabel\n0\tq\ts\tnot_entailment\n", "q", "s", [1]),
        ("rte", "a.jsonl", '{"premise": "p", "hypothesis": "h", "label": 1}\n', "p", "h", [1]),
        ("stsb", "a.tsv", "index\tsentence1\tsentence2\tscore\n0\ta\tb\t3.25\n", "a", "b", [3.25]),
        ("sst-2", "a.tsv", "\ufeffsentence\tlabel\nfine \t1\n", "fine ", None, [1]),
        ("cola", "a.tsv", "gj04\t0\t*\tThey is.\ngj04\t1\t\tThey are.\n", "They is.", None, [0, 1]),
        ("cola", "a.jsonl", '{"sentence": "They are.", "label": 1}\n\n', "They are.", None, [1]),
    ],
)
def test_files_of_every_task_are_read(
    tmp_path: Path, task: str, name: str, text: str, first: str, second: str | None, labels: list[float]
) -> None:
    found = read_sentences(write(tmp_path / name, text), glue_task(task))
    assert found.first[0] == first
    assert found.second[:1] == (() if second is None else (second,))
    assert found.labels.tolist() == labels
    assert found.labels.dtype == (np.float64 if task == "stsb" else np.int64)


@pytest.mark.parametrize(
    ("task", "name", "text", "kind", "message"),
    [
        (
            "mrpc",
            "a.tsv",
            "sentence1\tlabel\na\t1\n",
            UsageError,
            "has the columns sentence1, label, and none of sentence2",
        ),
        (
            "mrpc",
            "a.tsv",
            "sentence1\tsentence2\tlabel\na\tb\t2\n",
            InputDataError,
            "line 2 of .*: label '2' is none of mrpc's",
        ),
        (
            "rte",
            "a.tsv",
            "sentence1\tsentence2\tlabel\na\tb\t\n",
            InputDataError,
            r"none of rte's \(entailment, not_entail",
        ),
        ("stsb", "a.tsv", "sentence1\tsentence2\tscore\na\tb\tnan\n", InputDataError, "label 'nan' is no number"),
        (
            "mrpc",
            "a.tsv",
            "sentence1\tsentence2\tlabel\na\t1\n",
            InputDataError,
            "1 of 2 lines of .* the first is line 2",
        ),
        ("mrpc", "a.tsv", "sentence1\tsentence2\tlabel\n", InputDataError, "holds no sentences"),
        ("cola", "a.jsonl", "[1]\n", InputDataError, "line 1 of .* is no JSON object"),
        ("cola", "a.jsonl", "{\n", InputDataError, "line 1 of .* is no JSON object: "),
    ],
)
def test_files_that_are_not_of_the_task_are_refused(
    tmp_path: Path, task: str, name: str, text: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        read_sentences(write(tmp_path / name, text), glue_task(task))


def test_a_few_broken_lines_are_counted(tmp_path: Path) -> None:
    rows = "a\tb\t1\n" * 150
    found = read_sentences(write(tmp_path / "a.tsv", f"sentence1\tsentence2\tlabel\n{rows}a\t1\n"), glue_task("qqp"))
    assert (len(found), found.num_broken) == (150, 1)
    with pytest.raises(NoData, match=r"no file .*nothing\.tsv"):
        read_sentences(tmp_path / "nothing.tsv", glue_task("qqp"))
    with pytest.raises(UsageError) as error:
        glue_task("mrcp")
    assert error.value.line() == "UsageError: no GLUE task 'mrcp' | did you mean mrpc?"


@pytest.mark.real
def test_the_real_files_of_mrpc_hold_the_published_pairs(shared: Path) -> None:
    sizes = {}
    for part in ("train", "test"):
        found = read_sentences(shared / "data" / "text" / f"msr_paraphrase_{part}.txt", glue_task("mrpc"))
        sizes[part] = len(found), int(found.labels.sum()), found.num_broken
    assert sizes == {"train": (4076, 2753, 0), "test": (1725, 1147, 0)}
    guess, truth = np.ones(1725, int), found.labels
    assert metrics.accuracy(guess, truth) == pytest.approx(66.5, abs=0.05)
    assert metrics.f1(guess, truth) == pytest.approx(79.9, abs=0.05)


def test_two_sentences_become_one_text_with_a_mark_behind_each() -> None:
    number = {word: index for index, word in enumerate(WORDS)}
    (found,) = joined_ids(word_tokenizer(), ["red square"], ["blue"], 16)
    assert found == [1, number["red"], number["square"], 2, number["blue"], 2]
    assert joined_ids(word_tokenizer(), ["red square"], (), 16) == [[1, number["red"], number["square"], 2]]
    assert joined_ids(word_tokenizer(), [""], ["red"], 16) == [[1, 2, number["red"], 2]]


def test_of_two_sentences_that_are_too_long_the_longer_one_is_cut() -> None:
    a, b = "red " * 9, "blue green big"
    (found,) = joined_ids(word_tokenizer(), [a], [b], 10)
    red = WORDS.index("red")
    assert found == [1, *[red] * 4, 2, *(WORDS.index(word) for word in b.split()), 2]
    (turned,) = joined_ids(word_tokenizer(), [b], [a], 10)
    assert turned == [1, *(WORDS.index(word) for word in b.split()), 2, *[red] * 4, 2]
    with pytest.raises(UsageError, match="two sentences in 4 tokens"):
        joined_ids(word_tokenizer(), [a], [b], 4)
