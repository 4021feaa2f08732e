"""Students of pixels: crops of the cache, or of the tars again, against cached targets; and augmentations of both."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_extract import make_tar, networks, quiet, tiny_config  # noqa: F401  (a fixture)
from tiny_cache import CLASSES, NUM_TOKENS, SIZE, WIDTH, make_cache, tiny_classifier, tiny_network
from torch import Tensor
from torch.nn.functional import batch_norm, mse_loss

from emkum.errors import EmkumError, Interrupted, MissingField, SourceChanged, UnknownNetwork, UsageError
from emkum.models.network import Network, normalise, save_network
from emkum.models.resnet import BatchNorm, ResNetSpec
from emkum.models.targets import LayersRule, layers, packed, top_logits
from emkum.shards.reader import Cache
from emkum.stage2_train.augment import augmented, mixed, with_fewer_tokens
from emkum.stage2_train.averaging import start_average, update_average
from emkum.stage2_train.evaluate.encode import Settings
from emkum.stage2_train.evaluate.pictures import read_labelled
from emkum.stage2_train.evaluate.run import evaluate_cache, evaluate_pictures
from emkum.stage2_train.loader import Batch, Buffers, CachedSource
from emkum.stage2_train.losses import step_losses
from emkum.stage2_train.objectives.logits_kl import class_kl
from emkum.stage2_train.optimiser import layer_factors, parameter_groups
from emkum.stage2_train.order import TrainOrder
from emkum.stage2_train.pixels import batch_norm_line, build_pixel_student, pixel_input
from emkum.stage2_train.recipe import Recipe, load_recipe
from emkum.stage2_train.recipe_fields import FieldNames, required_fields
from emkum.stage2_train.recipe_listing import needs
from emkum.stage2_train.replay import Replay
from emkum.stage2_train.run_folder import load_run
from emkum.stage2_train.samples import sample_table
from emkum.stage2_train.student import Student, StudentSpec, parameter_table
from emkum.stage2_train.student_spec import ImageSide, PixelSide
from emkum.stage2_train.terms.build import Setting, make_terms
from emkum.stage2_train.terms.term import Terms
from emkum.stage2_train.train import TrainConfig, train

LOGITS, TOP = "teacher/tinyresnet/image/logits", "teacher/tinyresnet/image/logits-top"
LAYERS, CLS = "teacher/vit/image/layers", "teacher/vit/image/cls"
CROPS = f"image/crops-{SIZE}"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, networks: Path) -> Path:  # noqa: F811
    """Caches `crops` and `tokens`, of the same views and targets, the second without crops; their tars beside them."""
    folder = tmp_path_factory.mktemp("pixels")
    for network in (tiny_classifier("tinyresnet"), tiny_network("vit", "image")):
        save_network(replace(network, source=str(folder / network.name)), folder / network.name)
    for split, num in (("train", 24), ("val", 10)):
        (folder / split).mkdir()
        make_tar(folder / split / f"{split}.tar", num, seed=num)
        config = tiny_config(folder, networks, split=split, data=(str(folder / split),), text_encoder="none")
        config = replace(config, teacher=(str(folder / "vit"),), cut=0)
        config = replace(config, views=2 if split == "train" else 1, flip=split == "train")
        for kept in ("crops", "tokens"):
            made = replace(config, cache=folder / kept, store_inputs=kept)
            quiet(replace(made, targets=("cls", "layers")))
            classifier = (str(folder / "tinyresnet"),)
            quiet(replace(made, teacher=classifier, encoder=str(folder / "vit"), targets=("logits",)))
    return folder


def config_of(cache: Path, recipe: str, run_dir: Path, *overrides: str, **changes: Any) -> TrainConfig:
    wanted = ("training.batch=8", "evaluation.batch=4", *overrides)
    made = TrainConfig(cache, recipe, wanted, run_dir, precision="float32", device="cpu", log_every=1, loggers=())
    return replace(made, **{"max_steps": 6, **changes})


def silent(line: str) -> None: ...


def column(run_dir: Path, name: str) -> list[float]:
    with (run_dir / "metrics.csv").open() as file:
        return [float(line[name]) for line in csv.DictReader(file) if line[name]]


def message(error: pytest.ExceptionInfo[EmkumError]) -> str:
    return error.value.line()


def crops(batch: int = 4, size: int = SIZE, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def folder_of(network: Network, place: Path) -> str:
    save_network(network, place)
    return str(place)


def pixel_student(
    network: Network,
    place: Path,
    recipe: str = "resnet-kd",
    *overrides: str,
    target: int | None = CLASSES,
    anew: bool = False,
) -> tuple[Student, Recipe]:
    named = ("random:" if anew else "") + folder_of(network, place)
    loaded = load_recipe(recipe, [f"student.pixels={named}", *overrides])
    role = {"resnet-kd": {"logits": LOGITS}, "vit-kd": {"layers": LAYERS}}[recipe]
    names = FieldNames(CROPS, targets=role, crop_size=SIZE)
    return build_pixel_student(loaded, names, target if "logits" in role else None, 0, None), loaded


# --- the student -------------------------------------------------------------------------------------------------


def test_a_resnet_student_is_the_network_with_its_own_classifier(tmp_path: Path) -> None:
    network = tiny_classifier("tinyresnet")
    student, _ = pixel_student(network, tmp_path / "n")
    images = pixel_input(student.spec)(crops())
    torch.testing.assert_close(images, normalise(network, crops()), rtol=0, atol=0)
    student.eval()
    out = student.encode_images(images)
    tokens = network.backbone.embed(images)  # type: ignore[operator]
    torch.testing.assert_close(out.predicted_BD, network.backbone.logits(tokens), rtol=0, atol=0)  # type: ignore[operator]
    torch.testing.assert_close(out.features_BD, tokens[:, 0], rtol=0, atol=0)
    assert student.origins == (
        f"network: tinyresnet (weights sha256 {network.weights_sha256[:12]}, none), with its own classifier",
    )
    assert {row.part: row.frozen for row in parameter_table(student)} == {"head": 0, "network": 0}


def test_a_classifier_of_other_classes_is_new_and_new_weights_are_the_seeds(tmp_path: Path) -> None:
    network = tiny_classifier("tinyresnet")
    other, _ = pixel_student(network, tmp_path / "n", target=CLASSES + 2)
    assert other.head is not None
    assert other.head.weight.shape[0] == CLASSES + 2
    assert 0.01 < float(other.head.weight.detach().std()) < 0.03
    first, recipe = pixel_student(network, tmp_path / "n", anew=True)
    names = FieldNames(CROPS, targets={"logits": LOGITS}, crop_size=SIZE)
    again, third = (build_pixel_student(recipe, names, CLASSES, seed, None) for seed in (0, 1))
    stem = "network.stem.conv.weight"
    assert torch.equal(first.state_dict()[stem], again.state_dict()[stem])
    assert not torch.equal(first.state_dict()[stem], third.state_dict()[stem])
    assert not torch.equal(first.state_dict()[stem], other.state_dict()[stem])
    weight = first.state_dict()["network.layers.1.convs.1.conv.weight"]
    assert float(first.state_dict()["head.weight"].std()) < 0.03  # and not its own classifier, of deviation 0.7
    assert float(weight.std()) == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.1)  # He: 2 / (channels out x 3 x 3)
    assert first.origins == ("network: new weights in the shape of tinyresnet",)


def test_resnet_50_has_its_published_number_of_parameters() -> None:
    spec = ResNetSpec(64, (256, 512, 1024, 2048), (3, 4, 6, 3))
    side = PixelSide(spec, tiny_classifier("n").preprocessing, 224)  # type: ignore[arg-type]
    with torch.device("meta"):
        student = Student(StudentSpec(ImageSide("r", 0, 1, None, "cls"), None, 2048, None, False, 1000, pixels=side))
    counts = {row.part: row.trainable for row in parameter_table(student)}
    assert counts == {"head": 2_049_000, "network": 23_508_032}  # torchvision's 25,557,032


@pytest.mark.parametrize("changes", [{}, {"relative_bias": "per_block", "position": "none", "num_registers": 0}])
def test_a_vit_student_gives_every_layer_as_the_network_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    network = tiny_network("vit2", "image", **changes)
    student, _ = pixel_student(network, tmp_path / "n", "vit-kd")
    assert student.head is None
    assert student.norm is None
    assert student.depth == 4
    images = normalise(network, crops())
    out = student.encode_images(images, keep_ffn=True, keep_tokens=True)
    whole = network.backbone.run(network.backbone.embed(images))  # type: ignore[union-attr, operator]
    for ours, theirs in zip([*out.hidden, *out.ffn], [*whole.hidden, *whole.ffn], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    final = network.backbone.finish(whole.hidden[-1])  # type: ignore[operator]
    assert out.tokens_BTD is not None
    torch.testing.assert_close(out.tokens_BTD, final, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.features_BD, out.tokens_BTD[:, 0], rtol=0, atol=0)


def test_a_spec_goes_there_and_back_and_an_old_one_has_no_pixels(tmp_path: Path) -> None:
    for place, network, recipe in (
        ("r", tiny_classifier("tinyresnet"), "resnet-kd"),
        ("v", tiny_network("v", "image"), "vit-kd"),
    ):
        student, _ = pixel_student(network, tmp_path / place, recipe)
        found = StudentSpec.from_json(json.loads(json.dumps(student.spec.to_json(), sort_keys=True)))
        assert found == student.spec
        Student(found).load_state_dict(student.state_dict(), strict=True)
    assert "pixels" not in dataclasses.replace(student.spec, pixels=None).to_json()


def test_new_vit_weights_keep_a_fixed_table_of_positions(tmp_path: Path) -> None:
    fixed = replace(tiny_network("d2v", "image"), family="data2vec2-image")
    student, _ = pixel_student(fixed, tmp_path / "f", "vit-kd", anew=True)
    name = "network.embedding.positions"
    assert torch.equal(student.state_dict()[name], fixed.backbone.state_dict()["embedding.positions"])
    assert {n for n, p in student.named_parameters() if not p.requires_grad} == {name}
    learned, _ = pixel_student(tiny_network("v", "image"), tmp_path / "l", "vit-kd", anew=True)
    assert not torch.equal(learned.state_dict()[name], student.state_dict()[name])
    assert float(learned.state_dict()[name].std()) == pytest.approx(0.02, rel=0.3)
    assert all(p.requires_grad for p in learned.parameters())


def test_batch_norm_is_that_of_torch_in_training_and_frozen_otherwise() -> None:
    norm, plain = BatchNorm(3), torch.nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)) * 2 + 1
    for _ in range(3):
        torch.testing.assert_close(norm(x), plain(x))
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    torch.testing.assert_close(norm.running_var, plain.running_var)
    norm.eval()
    before = norm.running_mean.clone()
    torch.testing.assert_close(norm(x), batch_norm(x, before, norm.running_var, norm.weight, norm.bias))
    assert torch.equal(norm.running_mean, before)


def test_it_is_said_where_batch_norm_does_not_see_the_whole_batch(tmp_path: Path) -> None:
    student, _ = pixel_student(tiny_classifier("tinyresnet"), tmp_path / "n")
    assert batch_norm_line(student, 1, 1) == ""
    assert batch_norm_line(student, 1, 4) == "batch norm is over each of the 4 parts of a step's batch"
    assert batch_norm_line(student, 2, 2).endswith(
        "4 parts of a step's batch; the statistics of the first process are kept"
    )
    assert batch_norm_line(pixel_student(tiny_network("v", "image"), tmp_path / "v", "vit-kd")[0], 2, 2) == ""


def test_an_average_of_weights_has_the_averaged_statistics(tmp_path: Path) -> None:
    student, _ = pixel_student(tiny_classifier("tinyresnet"), tmp_path / "n")
    average = start_average(student)
    student.encode_images(pixel_input(student.spec)(crops()))
    name = "network.stem.norm.running_mean"
    new, old = student.state_dict()[name], average.state_dict()[name].clone()
    assert not torch.equal(new, old)
    update_average(average, student, 0.5, 100)
    torch.testing.assert_close(average.state_dict()[name], (new + old) / 2)


def test_rates_are_of_pretrained_networks_or_new_ones(tmp_path: Path) -> None:
    rates = ("optimiser.lr=1e-2", "optimiser.encoder_lr=1e-3", "training.batch=256")

    def found(student: Student, recipe: Recipe) -> dict[str, float]:
        names = {id(p): name for name, p in student.named_parameters()}
        groups = parameter_groups(student, Terms([]), recipe)
        return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}

    own = found(*pixel_student(tiny_classifier("tinyresnet"), tmp_path / "n", "resnet-kd", *rates))
    assert (own["network.stem.conv.weight"], own["head.weight"]) == (1e-3, 1e-2)
    new = found(*pixel_student(tiny_classifier("tinyresnet"), tmp_path / "n", "resnet-kd", *rates, anew=True))
    assert set(new.values()) == {1e-2}
    own = found(
        *pixel_student(tiny_classifier("t"), tmp_path / "m", "resnet-kd", *rates, "optimiser.image_encoder_lr=2e-4")
    )
    assert own["network.stem.conv.weight"] == 2e-4
    vit, _ = pixel_student(tiny_network("v", "image"), tmp_path / "v", "vit-kd")
    factors = layer_factors(vit, 0.5)
    assert factors["network.stack.blocks.3.qkv.weight"] == 0.5
    assert factors["network.stack.blocks.0.qkv.weight"] == 0.5**4
    assert factors["network.embedding.patch.weight"] == 0.5**5
    assert "network.norm.weight" not in factors
    with pytest.raises(
        UsageError, match=r"optimiser\.layer_decay = 0\.5 is by blocks, and a ResNet as student has none"
    ):
        layer_factors(pixel_student(tiny_classifier("tinyresnet"), tmp_path / "n")[0], 0.5)


# --- objectives --------------------------------------------------------------------------------------------------


def batch_of(student: Student, **targets: Tensor) -> Batch:
    return Batch(
        torch.arange(4),
        torch.zeros(4, dtype=torch.int64),
        None,
        None,
        None,
        targets,
        images_BCHW=pixel_input(student.spec)(crops()),
    )


def test_logits_kl_of_all_logits_and_of_the_largest(tmp_path: Path) -> None:
    student, recipe = pixel_student(tiny_classifier("tinyresnet"), tmp_path / "n")
    student.eval()
    taught = torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(5))
    batch = batch_of(student, logits=taught)
    terms = make_terms(Setting(recipe, student))
    said = student.encode_images(batch.images_BCHW).predicted_BD  # type: ignore[arg-type]
    losses = step_losses(student, terms, recipe, batch)
    torch.testing.assert_close(losses.total, class_kl(said, taught))
    losses.total.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student.parameters())
    top = top_logits(taught, 3)
    found = step_losses(student, terms, recipe, replace(batch, targets={"logits": packed(top)}, top_logits=True))
    torch.testing.assert_close(found.total, class_kl(said, top))
    assert terms.columns == ["loss", "logits_kl"]


@pytest.mark.parametrize("rule", [None, LayersRule("ffn", 2, 1, "layer", True, "drop")])
def test_layers_mse_follows_the_rule_of_the_targets(tmp_path: Path, rule: LayersRule | None) -> None:
    student, recipe = pixel_student(tiny_network("v", "image"), tmp_path / "n", "vit-kd")
    first = 0 if rule is None else 1
    taught = torch.randn(4, NUM_TOKENS - first, WIDTH, generator=torch.Generator().manual_seed(5))
    batch = replace(batch_of(student, layers=taught), layers_rules={} if rule is None else {"layers": rule})
    losses = step_losses(student, make_terms(Setting(recipe, student)), recipe, batch)
    out = student.encode_images(batch.images_BCHW, keep_ffn=True)  # type: ignore[arg-type]
    if rule is None:
        mean = layers(out.hidden, None, final_layer_norm=True)
    else:
        width = (WIDTH,)
        normed = [torch.nn.functional.layer_norm(f[:, 1:], width, eps=1e-5) for f in out.ffn[2:]]
        mean = torch.nn.functional.layer_norm(torch.stack(normed).mean(0), width, eps=1e-5)
    torch.testing.assert_close(losses.total, mse_loss(mean, taught), rtol=1e-4, atol=1e-6)
    chunked = step_losses(student, make_terms(Setting(recipe, student)), recipe, batch, chunk=3)
    torch.testing.assert_close(chunked.total, losses.total)


@pytest.mark.parametrize("width", [WIDTH, WIDTH + 3])
def test_cls_mse_compares_the_cls_itself_or_a_head_of_the_targets_width(tmp_path: Path, width: int) -> None:
    network = tiny_network("v", "image")
    wanted = [
        f"student.pixels={folder_of(network, tmp_path / 'n')}",
        "objectives.cls_mse.weight=1",
        "objectives.layers_mse=none",
    ]
    recipe = load_recipe("vit-kd", wanted)
    student = build_pixel_student(recipe, FieldNames(CROPS, targets={"cls": CLS}, crop_size=SIZE), width, 0, None)
    assert (student.head is None) == (width == WIDTH)
    taught = torch.randn(4, width, generator=torch.Generator().manual_seed(5))
    batch = batch_of(student, cls=taught)
    out = student.encode_images(batch.images_BCHW)  # type: ignore[arg-type]
    terms = make_terms(Setting(recipe, student))
    losses = step_losses(student, terms, recipe, batch)
    torch.testing.assert_close(losses.total, mse_loss(out.predicted_BD, taught))
    assert out.predicted_BD.shape == (4, width)
    assert terms.columns == ["loss", "cls_mse"]
    losses.total.backward()
    assert all(p.grad is not None for p in student.parameters())


def test_a_student_behind_a_frozen_network_takes_cls_mse_of_pictures_too(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", fields=("tokens", "cls", "ids")).path
    wanted = ("objectives.layers_mse=none", "objectives.cls_mse.weight=1", "data.cut=2", "student.image_blocks=2")
    train(config_of(cache, "image-kd", tmp_path / "run", *wanted), silent)
    losses = column(tmp_path / "run", "loss")
    assert losses == pytest.approx(column(tmp_path / "run", "cls_mse"))
    assert losses[-1] < losses[0]


# --- runs --------------------------------------------------------------------------------------------------------


def resnet(places: Path) -> str:
    return f"student.pixels=random:{places / 'tinyresnet'}"


def vit(networks: Path) -> str:  # noqa: F811
    return f"student.pixels={networks / 'other'}"


def test_a_run_on_crops_lowers_its_loss_and_is_evaluated(places: Path, tmp_path: Path, networks: Path) -> None:  # noqa: F811
    said: list[str] = []
    config = config_of(
        places / "crops", "resnet-kd", tmp_path / "run", resnet(places), "optimiser.lr=0.1", max_steps=20
    )
    result = train(config, said.append)
    assert f"reads {CROPS}, {LOGITS}" in said
    assert "network: new weights in the shape of tinyresnet" in said
    assert "train: 24 pictures, 2 views" in said
    losses = column(tmp_path / "run", "loss")
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    run = load_run(tmp_path / "run")
    assert not run.student.training
    scored = evaluate_cache(run, settings=Settings(batch_size=4, device="cpu", baselines=True))["distillation"]
    assert scored["logits_kl"] == pytest.approx(result.score, rel=1e-5)
    (name,) = scored["baselines"]
    assert scored["baselines"][name]["logits_kl"] != scored["logits_kl"]
    random = np.random.default_rng(0)
    shapes = {"x_train": random.integers(0, 256, (12, 20, 20, 3), np.uint8), "y_train": np.arange(12) % 3}
    shapes |= {"x_test": random.integers(0, 256, (6, 20, 20, 3), np.uint8), "y_test": np.arange(6) % 3}
    np.savez(tmp_path / "set.npz", **shapes)
    found = evaluate_pictures(run, read_labelled(tmp_path / "set.npz"), settings=Settings(device="cpu", baselines=True))
    assert list(found["pictures"]) == [f"set@{SIZE}"]
    assert set(found["pictures"][f"set@{SIZE}"]["baselines"]) == {name}
    larger = evaluate_pictures(run, read_labelled(tmp_path / "set.npz"), 24, settings=Settings(device="cpu"))
    assert list(larger["pictures"]) == ["set@24"]


def test_the_command_that_feeds_resnet_kd_makes_a_cache_it_trains_from(places: Path, tmp_path: Path) -> None:
    assert "--teacher resnet101 --text-encoder none --store-inputs crops --encoder" in needs("resnet-kd").commands[0]
    for split in ("train", "val"):
        config = tiny_config(places, places, split=split, data=(str(places / split),), text_encoder="none", cut=0)
        made = replace(config, cache=tmp_path / "cache", teacher=(str(places / "tinyresnet"),), targets=("logits",))
        quiet(replace(made, encoder=str(places / "vit"), store_inputs="crops"))
    assert train(config_of(tmp_path / "cache", "resnet-kd", tmp_path / "run", resnet(places)), silent).steps == 6


def test_a_batch_has_the_pictures_of_its_views_and_the_loss_is_that_of_plain_code(places: Path, tmp_path: Path) -> None:
    cache = Cache.open(places / "crops")
    recipe = load_recipe("resnet-kd", [f"student.pixels={places / 'tinyresnet'}"])
    names = required_fields(recipe, cache)
    assert (names.inputs, names.crop_size, names.replayed, names.encoder) == (CROPS, SIZE, False, None)
    table = sample_table(cache, recipe, names, "train")
    student = build_pixel_student(recipe, names, CLASSES, 0, cache)
    source = CachedSource(cache, names, table, pixel_input(student.spec))
    rows = TrainOrder(table, 8, 0).rows(0)
    assert set(rows.views_B.tolist()) == {0, 1}  # type: ignore[union-attr]
    batch = source.prepare(source.read(rows, Buffers(False)), torch.device("cpu"))
    assert batch.tokens_BTD is None
    assert len(batch) == 8
    stored = cache.field(CROPS).read(rows.image_rows_B, rows.views_B)
    network = tiny_classifier("tinyresnet")
    torch.testing.assert_close(batch.images_BCHW, normalise(network, torch.from_numpy(stored)), rtol=0, atol=0)
    student.eval()  # the teacher itself: nothing is left to learn, of either view
    assert float(step_losses(student, make_terms(Setting(recipe, student)), recipe, batch).total.detach()) < 1e-6


@pytest.mark.parametrize("recipe", ["resnet-kd", "vit-kd"])
def test_crops_of_the_tars_are_crops_of_the_cache_and_live_is_cached(
    places: Path,
    tmp_path: Path,
    networks: Path,  # noqa: F811
    recipe: str,
) -> None:
    student = resnet(places) if recipe == "resnet-kd" else vit(networks)
    found, scores, said = [], [], list[str]()
    for name, cache, live in (
        ("a", "crops", False),
        ("b", "tokens", False),
        ("c", "crops", True),
        ("d", "tokens", True),
    ):
        config = config_of(places / cache, recipe, tmp_path / name, student, live=live)
        train(config, said.append)
        found.append(column(tmp_path / name, "loss"))
        scores.append(evaluate_cache(load_run(tmp_path / name), settings=Settings(batch_size=4, device="cpu")))
    target = LOGITS if recipe == "resnet-kd" else LAYERS
    assert f"reads {target}; crops of {SIZE} px are cut out of the source tars again" in said
    term = recipe.replace("resnet-kd", "logits_kl").replace("vit-kd", "layers_mse")
    for losses, scored in zip(found[1:], scores[1:], strict=True):
        assert losses == pytest.approx(found[0], rel=1e-5)
        assert scored["distillation"][term] == pytest.approx(scores[0]["distillation"][term], rel=1e-4)
    assert len(set(found[0])) == 6


def test_tars_that_moved_are_found_and_missing_ones_are_said(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(places / "tokens", tmp_path / "cache")
    (tmp_path / "now").mkdir()
    cache = Cache.open(tmp_path / "cache")
    rows, views = np.array([3, 0]), np.array([1, 0])
    kept = Cache.open(places / "crops").field(CROPS).read(rows, views)
    out = np.empty((2, SIZE, SIZE, 3), np.uint8)
    Replay(cache, ("train", "val"), SIZE).fill(rows, views, out)
    np.testing.assert_array_equal(out, kept)
    shutil.copy(places / "train" / "train.tar", tmp_path / "now" / "train.tar")
    monkeypatch.setattr("emkum.stage2_train.replay.os.path.isfile", lambda path: str(tmp_path) in str(path))
    with pytest.raises(SourceChanged, match=r"train\.tar, which .* was extracted from, is not at") as caught:
        Replay(cache, ("train",), SIZE)
    assert caught.value.way_out.endswith("a student of pixels from a cache with crops")
    out[:] = 0
    Replay(cache, ("train",), SIZE, [str(tmp_path / "now")]).fill(rows, views, out)
    np.testing.assert_array_equal(out, kept)


@pytest.mark.parametrize(
    "more", [(), ("data.mixup=0.8", "training.ema=0.9", "training.accumulate=2", "training.batch=4")]
)
def test_a_stopped_run_goes_on_to_the_same_weights_and_statistics(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    from emkum.stage2_train.keeper import RunKeeper

    config = config_of(places / "crops", "resnet-kd", tmp_path / "whole", resnet(places), *more)
    train(config, silent)
    stopped = replace(config, run_dir=tmp_path / "stopped")
    logged = RunKeeper._log

    def stop(self: RunKeeper, step: int) -> None:
        logged(self, step)
        if step == 4:
            self.stop_signal = 15

    with monkeypatch.context() as patch:
        patch.setattr(RunKeeper, "_log", stop)
        with pytest.raises(Interrupted):
            train(stopped, silent)
    train(replace(stopped, resume=True), silent)
    for file in ("student.safetensors", *(("student-ema.safetensors",) if more else ())):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes()
    statistics = load_run(tmp_path / "whole").student.state_dict()["network.stem.norm.running_mean"]
    assert float(statistics.abs().max()) > 0
    assert column(tmp_path / "whole", "loss") == column(tmp_path / "stopped", "loss")


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "overrides", "said"),
    [
        ("ssmke", ["student.pixels=resnet50"], "is for kind images, and this recipe is of pairs"),
        ("text-kd", ["student.pixels=resnet50"], "is for kind images, and this recipe is of texts"),
        ("resnet-kd", ["student.image_blocks=3"], "student.image_blocks = 3 has no effect"),
        ("resnet-kd", ["student.shared_blocks=2"], "student.shared_blocks has no effect"),
        ("resnet-kd", ["student.token_types=before"], "student.token_types has no effect"),
        ("resnet-kd", ["data.cut=2"], "data.cut = 2 has no effect"),
        ("resnet-kd", ["student.pixels=random:"], "names no network | say whose shape: random:resnet50"),
        ("resnet-kd", ["data.token_dropout=0.5"], "data.token_dropout = 0.5 is of cached tokens"),
        ("image-kd", ["data.mixup=0.001"], "data.mixup = 0.001 mixes nothing | use 0.01 or more, or 0 for none"),
        ("image-kd", ["data.mixup=11"], "data.mixup = 11 is not within 0 and 10"),
        ("ssmke", ["data.mixup=1"], "objectives.itc takes each sample as one of its own"),
        ("cls-mse", ["data.mixup=1", "objectives.itc=none"], "a sample of pairs has words, which do not mix"),
        ("text-kd", ["data.mixup=1"], "a sample of texts has words, which do not mix"),
        ("mvlm", ["data.token_dropout=0.5", "objectives.mvlm.patch_share=0.4"], "which hides patches itself"),
        ("positions-shared", ["data.token_dropout=0.5"], "counted by the place in the row"),
        ("image-kd", ["data.token_dropout=1"], "data.token_dropout = 1 is not within 0 and 1, below 1"),
    ],
)  # fmt: skip
def test_recipes_that_contradict_themselves(recipe: str, overrides: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe, overrides)
    assert said in " ".join(message(caught).split())


def test_networks_and_caches_that_do_not_fit(places: Path, tmp_path: Path, networks: Path) -> None:  # noqa: F811
    def refused(recipe: str, *overrides: str, cache: str = "crops", **changes: Any) -> str:
        with pytest.raises((UsageError, MissingField, UnknownNetwork)) as caught:
            train(config_of(places / cache, recipe, tmp_path / "run", *overrides, **changes), silent)
        return " ".join(message(caught).split())

    text = refused("vit-kd", f"student.pixels={networks / 'text'}")
    assert "is a network of kind text | name one of pictures" in text
    assert "and has no blocks whose outputs layers-mse could compare" in refused("vit-kd", resnet(places))
    wide = tiny_network("wide", "image", width=20)
    found = refused("vit-kd", f"student.pixels={folder_of(wide, tmp_path / 'wide')}")
    assert f"{LAYERS} has 5 tokens of 16 channels, the student 5 of 20: layers-mse compares them one by one" in found
    coarse = folder_of(tiny_network("coarse", "image", patch=12, image_size=24), tmp_path / "coarse")
    found = refused("vit-kd", f"student.pixels={coarse}")
    assert "crops of 16 px do not divide into patches of 12 px (coarse)" in found
    found = refused("resnet-kd", resnet(places), "data.inputs=image/vit@0/tokens", cache="tokens")
    assert "data.inputs = image/vit@0/tokens is no field of crops, and a student of pixels reads them" in found
    found = refused("resnet-kd", resnet(places), "data.inputs=image/crops-32")
    assert "reads image/crops-32; the cache" in found
    assert "--chunk 4 with a ResNet as student: its batch norm is over the whole batch" in refused(
        "resnet-kd", resnet(places), chunk=4
    )
    assert "--activation-checkpointing with a ResNet as student" in refused(
        "resnet-kd", resnet(places), activation_checkpointing=True
    )
    assert "no-such" in refused("resnet-kd", "student.pixels=no-such-network")
    found = refused("resnet-kd", resnet(places), "student.head_width=5")
    assert f"student.head_width = 5: the target {LOGITS} has {CLASSES} channels" in found


def test_mixup_of_the_largest_logits_and_dropout_behind_a_position_bias_are_refused(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", fields=("crops", "logits-top"), environment={"classes": CLASSES}).path
    place = folder_of(tiny_classifier("tinyresnet"), tmp_path / "n")
    config = config_of(cache, "resnet-kd", tmp_path / "run", f"student.pixels={place}")
    train(config, silent)
    assert evaluate_cache(load_run(tmp_path / "run"), settings=Settings(device="cpu"))["distillation"]["logits_kl"] >= 0
    with pytest.raises(UsageError, match=f"data.mixup = 0.5: of {TOP} two pictures have different classes"):
        train(replace(config, run_dir=tmp_path / "other", overrides=(*config.overrides, "data.mixup=0.5")), silent)
    biased = tiny_network("biased", "image", relative_bias="per_block")
    tokens = make_cache(tmp_path / "t", fields=("tokens", "layers", "ids")).path
    wanted = ("student.image_blocks=2", "data.token_dropout=0.5")
    init = f"student.init={folder_of(biased, tmp_path / 'b')}"
    with pytest.raises(
        UsageError, match=r"data\.token_dropout = 0\.5: the student's blocks have a relative position bias"
    ):
        train(config_of(tokens, "image-kd", tmp_path / "run2", *wanted, init), silent)


# --- augmentations -----------------------------------------------------------------------------------------------


def numbered(num_tokens: int, batch: int = 4, width: int = 3) -> Tensor:
    return (torch.arange(batch)[:, None, None] * 100.0 + torch.arange(num_tokens)[:, None]).expand(
        batch, num_tokens, width
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_targets_of_tokens_are_those_of_the_tokens_that_stay() -> None:
    targets = {"layers": numbered(10) + 0.5, "patches": numbered(10)[:, 1:] + 0.25, "cls": torch.ones(4, 3)}
    found = with_fewer_tokens(Batch(None, None, numbered(10), None, None, targets), 0.5, 1, generator())
    assert found.tokens_BTD is not None
    assert found.tokens_BTD.shape == (4, 6, 3)  # CLS, and 5 of 9 patches, rounded
    assert torch.equal(found.tokens_BTD[:, 0], numbered(10)[:, 0])
    assert torch.equal(found.targets["layers"], found.tokens_BTD + 0.5)
    assert torch.equal(found.targets["patches"], found.tokens_BTD[:, 1:] + 0.25)
    assert found.targets["cls"] is targets["cls"]
    dropped = {"layers": numbered(10)[:, 1:] + 0.5}  # a rule without the prefix
    found = with_fewer_tokens(Batch(None, None, numbered(10), None, None, dropped), 0.5, 1, generator())
    assert torch.equal(found.targets["layers"], found.tokens_BTD[:, 1:] + 0.5)  # type: ignore[index]


def test_a_mixture_of_logits_is_one_of_probabilities() -> None:
    logits = torch.randn(4, 6, generator=generator()) * 4
    layers_BTD, weight = numbered(5), torch.tensor(0.3)
    batch = Batch(None, None, numbered(5), None, None, {"logits": logits, "layers": layers_BTD})
    found = mixed(batch, weight, temperature=2.0)
    swapped = [1, 0, 3, 2]
    wanted = 0.3 * (logits / 2).softmax(1) + 0.7 * (logits[swapped] / 2).softmax(1)
    torch.testing.assert_close((found.targets["logits"] / 2).softmax(1), wanted)
    assert found.tokens_BTD is not None
    torch.testing.assert_close(found.tokens_BTD, 0.3 * numbered(5) + 0.7 * numbered(5)[swapped])
    torch.testing.assert_close(found.targets["layers"], found.tokens_BTD)
    sure = torch.tensor([[200.0, -200.0], [-200.0, 200.0]])
    found = mixed(Batch(None, None, numbered(2, 2), None, None, {"logits": sure}), torch.tensor(1.0))
    assert torch.isfinite(found.targets["logits"]).all()


def test_pictures_are_mixed_as_their_targets_are(tmp_path: Path) -> None:
    student, recipe = pixel_student(tiny_classifier("tinyresnet"), tmp_path / "n", "resnet-kd", "data.mixup=1")
    batch = batch_of(student, logits=torch.randn(4, CLASSES, generator=generator(5)))
    found = augmented(batch, recipe, student, generator(3))
    assert found.images_BCHW is not None
    assert batch.images_BCHW is not None
    swapped = [1, 0, 3, 2]
    ours, one, other = (t.flatten(1) for t in (found.images_BCHW, batch.images_BCHW, batch.images_BCHW[swapped]))
    weight = ((ours - other) * (one - other)).sum() / (one - other).square().sum()
    assert 0 < float(weight) < 1
    probabilities = batch.targets["logits"].softmax(1)
    torch.testing.assert_close(
        found.targets["logits"].softmax(1), weight * probabilities + (1 - weight) * probabilities[swapped]
    )


@torch.no_grad()
def test_only_a_student_in_training_sees_augmented_batches_each_its_own(tmp_path: Path) -> None:
    student, recipe = pixel_student(tiny_classifier("tinyresnet"), tmp_path / "n", "resnet-kd", "data.mixup=1")
    batch = batch_of(student, logits=torch.randn(4, CLASSES, generator=generator(5)))
    for module in student.modules():
        module.training = isinstance(module, Student)  # so that batch norm is alike from call to call
    terms = make_terms(Setting(recipe, student))
    first, second = (float(step_losses(student, terms, recipe, batch, seed=1).total) for _ in range(2))
    again = float(step_losses(student, make_terms(Setting(recipe, student)), recipe, batch, seed=1).total)
    plain = load_recipe("resnet-kd", [f"student.pixels={tmp_path / 'n'}"])
    without = float(step_losses(student, make_terms(Setting(plain, student)), plain, batch, seed=1).total)
    assert first == again
    assert len({first, second, without}) == 3
    student.eval()
    assert float(step_losses(student, terms, recipe, batch).total) == without


@pytest.mark.parametrize("change", ["data.token_dropout=0.5", "data.mixup=0.8"])
def test_runs_with_augmentations_are_other_runs_that_learn_and_validate_without(tmp_path: Path, change: str) -> None:
    cache = make_cache(tmp_path / "c", cut=0, fields=("tokens", "layers", "ids")).path
    found, scores = [], []
    for name, more in (("plain", ()), ("one", (change,)), ("two", (change,))):
        config = config_of(cache, "image-kd", tmp_path / name, "student.image_blocks=2", *more)
        result = train(replace(config, max_steps=10), silent)
        found.append(column(tmp_path / name, "loss"))
        scores.append(result.score)
        scored = evaluate_cache(load_run(tmp_path / name), settings=Settings(device="cpu"))
        assert scored["distillation"]["layers_mse"] == pytest.approx(result.score, rel=1e-5)
    assert found[1] == found[2]
    assert found[0][0] != found[1][0]
    assert np.mean(found[1][-3:]) < np.mean(found[1][:3])
