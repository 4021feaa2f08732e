"""The same numbers on a GPU: frozen passes, extraction, and a few steps of training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_cache import make_cache, tiny_network

from emkum.models.passes import FrozenPass, Wanted
from emkum.shards.reader import Cache
from emkum.stage1_extract.encode import encode_batch
from emkum.stage2_train.train import TrainConfig, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def test_a_frozen_pass_says_on_the_gpu_what_it_says_on_the_cpu() -> None:
    network = tiny_network("vit", "image")
    wanted = [Wanted("vit", "tokens", 2), Wanted("vit", "cls"), Wanted("vit", "layers")]
    crops = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    on_cpu = FrozenPass([network], wanted, "float32", "cpu").pictures(crops)
    on_gpu = FrozenPass([network], wanted, "float32", "cuda").pictures(crops)
    for a, b in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_quantising_on_the_gpu_gives_the_rows_of_the_cpu(storage: str) -> None:
    values = torch.randn(4, 6, 32)
    statistics = values.mean((0, 1)), values.std((0, 1))
    on_cpu = encode_batch(values, "f", storage, list("abcd"), statistics)
    moved = tuple(s.cuda() for s in statistics)
    on_gpu = encode_batch(values.cuda(), "f", storage, list("abcd"), (moved[0], moved[1]))
    difference = np.abs(on_cpu.values.astype(np.float32) - on_gpu.values.astype(np.float32)).max()
    assert difference <= (1 if storage == "int8" else 0)
    assert on_gpu.summary.relative_l2 == pytest.approx(on_cpu.summary.relative_l2, rel=1e-3, abs=1e-9)


def test_training_on_the_gpu_loses_as_on_the_cpu(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache")
    config = TrainConfig(
        cache=made.path, recipe="ssmke", overrides=("training.batch=8",), precision="float32", max_steps=6
    )
    scores = []
    for device in ("cpu", "cuda"):
        result = train(replace(config, device=device, run_dir=tmp_path / device), say=lambda line: None)
        lines = (result.run_dir / "metrics.csv").read_text().splitlines()
        column = lines[0].split(",").index("loss")
        scores.append([float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]])
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-3)
    assert len(Cache.open(made.path).field("image/tinyvit@2/tokens").rows("train")) == 40
