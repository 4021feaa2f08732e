"""Cached training equals live training: the same batches and the same losses, within the error of storage."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_cache import CLASSES, POSITIONS, SIZE, make_cache, tiny_classifier, tiny_network

from emkum.errors import IdentityMismatch, SourceChanged
from emkum.models.network import save_network
from emkum.shards.reader import Cache
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.extract import extract
from emkum.stage2_train.live import LiveSource
from emkum.stage2_train.loader import Buffers, CachedSource
from emkum.stage2_train.order import TrainOrder
from emkum.stage2_train.recipe import load_recipe
from emkum.stage2_train.recipe_fields import required_fields
from emkum.stage2_train.samples import sample_table
from emkum.stage2_train.train import TrainConfig, train

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrst"]


def tokenizer() -> bytes:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return made.to_str().encode()


def write_tar(path: Path, pictures: int) -> None:
    random = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(pictures):
            image = io.BytesIO()
            pixels = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((40, 32), Image.Resampling.BICUBIC).save(image, "PNG")
            captions = [" ".join(random.choice(WORDS[4:], random.integers(2, 9))) for _ in range(2)]
            for name, data in (("png", image.getvalue()), ("json", json.dumps({"captions": captions}).encode())):
                member = tarfile.TarInfo(f"p{i:03d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def exact_config(folder: Path, **changes: Any) -> ExtractConfig:
    """Extraction from `folder`/a.tar in float32, computed and stored, blocks of 16 rows."""
    config = ExtractConfig(
        teacher=("",),
        data=(str(folder / "a.tar"),),
        size=SIZE,
        compute="float32",
        storage="float32",
        max_tokens=POSITIONS,
        batch_size=16,
        rows_per_block=16,
        device="cpu",
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar, two image networks and a text network as folders, and two caches extracted from them."""
    folder = tmp_path_factory.mktemp("live")
    write_tar(folder / "a.tar", 32)
    save_network(tiny_network("tinyvit", "image"), folder / "tinyvit")
    save_network(replace(tiny_network("other", "image", seed=7), source=str(folder / "other")), folder / "other")
    save_network(replace(tiny_network("tinybert", "text", seed=1), tokenizer=tokenizer()), folder / "tinybert")
    save_network(replace(tiny_classifier("classifier"), source=str(folder / "classifier")), folder / "classifier")
    images = exact_config(
        folder,
        teacher=(str(folder / "tinyvit"), str(folder / "other"), str(folder / "tinybert")),
        cut=1,
        targets=("cls", "layers"),
        views=2,
        flip=True,
    )
    for storage in ("float32", "float16", "int8"):
        made = replace(images, cache=folder / storage, storage=storage)
        extract(made, say=lambda line: None)
        of = {"encoder": str(folder / "tinyvit"), "text_encoder": str(folder / "tinybert")}
        for top in (None, 2):
            classes = replace(made, teacher=(str(folder / "classifier"),), targets=("logits",), logits_top=top, **of)
            extract(classes, say=lambda line: None)
    return folder


OVERRIDES = {
    "ssmke": ["data.targets=teacher/other/image/cls"],
    "cls-mse": ["data.targets=teacher/tinyvit/image/cls"],
    "image-kd": ["data.targets=teacher/other/image/layers", "student.image_blocks=2"],
    "text-kd": [],
    "shre": ["data.targets=teacher/classifier/image/logits"],
    "shre-transformer": ["data.targets=teacher/classifier/image/logits", "objectives.logits-kl.temperature=2"],
}


THE_TOP = ["data.targets=teacher/classifier/image/logits-top", f"student.head_width={CLASSES}"]


def losses(folder: Path, storage: str, recipe: str, *overrides: str, live: bool) -> np.ndarray:
    small = ("training.batch=8", "optimiser.lr=0.03", "optimiser.encoder_lr=0.003", *OVERRIDES[recipe], *overrides)
    run_dir = folder / "runs" / "-".join((storage, recipe, *overrides, str(live))).replace("/", "_")
    train(
        TrainConfig(
            folder / storage,
            recipe,
            small,
            run_dir,
            precision="float32",
            device="cpu",
            live=live,
            max_steps=20,
            log_every=1,
        ),
        say=lambda line: None,
    )
    with (run_dir / "metrics.csv").open() as file:
        return np.array([float(row["loss"]) for row in csv.DictReader(file)])


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        *((recipe, []) for recipe in OVERRIDES),
        ("ssmke", ["objectives.ctl.bank=12"]),
        ("shre", ["objectives.ranking.layers=all"]),
        ("shre", THE_TOP),
    ],
)
def test_the_losses_of_20_steps_are_those_of_live_training(folder: Path, recipe: str, overrides: list[str]) -> None:
    cached, live = (losses(folder, "float32", recipe, *overrides, live=live) for live in (False, True))
    assert len(cached) == 20
    assert np.abs(cached / live - 1).max() < 1e-5
    assert not np.array_equal(cached, cached[:1].repeat(20))


@pytest.mark.parametrize("recipe", ["ssmke", "shre"])
@pytest.mark.parametrize(("storage", "error"), [("float16", 2e-3), ("int8", 2e-2)])
def test_with_smaller_storage_they_agree_within_its_error(
    folder: Path, storage: str, error: float, recipe: str
) -> None:
    cached, live = (losses(folder, storage, recipe, live=live) for live in (False, True))
    assert np.abs(cached / live - 1).max() < error


@pytest.mark.parametrize("recipe", ["ssmke", "image-kd", "text-kd", "shre"])
def test_both_sources_give_the_same_tensors_for_the_same_rows(folder: Path, recipe: str) -> None:
    cache = Cache.open(folder / "float32")
    loaded = load_recipe(recipe, OVERRIDES[recipe])
    names = required_fields(loaded, cache)
    table = sample_table(cache, loaded, names, "train")
    rows = TrainOrder(table, 8, seed=0).rows(0)
    cpu = torch.device("cpu")
    sources = CachedSource(cache, names, table), LiveSource(cache, names, table, cpu)
    batches = [vars(source.prepare(source.read(rows, Buffers(pin=False)), cpu)) for source in sources]
    assert batches[0].keys() == batches[1].keys()
    for name, cached in batches[0].items():
        live: Any = batches[1][name]
        assert (cached is None) == (live is None), name
        if name == "targets":
            assert cached.keys() == live.keys()
            tensors = [(cached[role], live[role]) for role in cached]
        else:
            tensors = [(cached, live)] if isinstance(cached, torch.Tensor) else []
            assert tensors or cached == live, name
        for stored, computed in tensors:
            assert stored.shape == computed.shape
            assert torch.allclose(stored, computed, rtol=1e-5, atol=1e-5), name
            assert not computed.is_inference()


def test_a_tar_that_moved_is_found_with_data_and_a_changed_one_is_refused(folder: Path, tmp_path: Path) -> None:
    cache = Cache.open(folder / "float32")
    recipe = load_recipe("image-kd", OVERRIDES["image-kd"])
    names = required_fields(recipe, cache)
    table = sample_table(cache, recipe, names, "train")
    moved = tmp_path / "a.tar"
    moved.write_bytes((folder / "a.tar").read_bytes())
    LiveSource(cache, names, table, torch.device("cpu"), [str(tmp_path)])
    moved.write_bytes(b"x" * 100)
    with pytest.raises(SourceChanged, match=r"a\.tar, which .* was extracted from, is not at .* with \d+ bytes"):
        LiveSource(cache, names, table, torch.device("cpu"), [str(tmp_path)])


def test_a_teacher_whose_weights_changed_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache.open(folder / "float32")
    recipe = load_recipe("ssmke", OVERRIDES["ssmke"])
    names = required_fields(recipe, cache)
    table = sample_table(cache, recipe, names, "train")
    changed = tiny_network("other", "image", seed=8)
    monkeypatch.setattr("emkum.stage2_train.live.load_network", lambda source, **_: changed)
    with pytest.raises(IdentityMismatch, match="teacher/other/image/cls was made with weights"):
        LiveSource(cache, names, table, torch.device("cpu"))


def test_a_cache_of_crops_trains_as_one_of_tokens(tmp_path: Path) -> None:
    """The crop is exact: only the frozen blocks up to the cut run in front of the student."""
    made = make_cache(tmp_path / "cache", pictures=24, cut=1, fields=("tokens", "crops", "ids", "cls"))
    found = []
    for inputs in ("image/tinyvit@1/tokens", f"image/crops-{SIZE}"):
        overrides = (f"data.inputs={inputs}", "data.encoder=tinyvit", "data.cut=1", "training.batch=8")
        run_dir = tmp_path / inputs.replace("/", "_")
        config = TrainConfig(made.path, "ssmke", overrides, run_dir, precision="float32", device="cpu", log_every=1)
        result = train(replace(config, max_steps=6), say=lambda line: None)
        with (run_dir / "metrics.csv").open() as file:
            found.append([float(row["loss"]) for row in csv.DictReader(file) if row["loss"]] + [result.score])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
