"""The same numbers on a GPU: frozen passes, extraction, and a few steps of training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_extract import make_tar, quiet, tiny_config, word_tokenizer
from tiny_cache import make_cache, tiny_network

from emkum.models.backbone import BlockStack, StackSpec
from emkum.models.blocks import BlockSpec
from emkum.models.network import save_network, weights_digest
from emkum.models.passes import FrozenPass, Wanted
from emkum.shards.reader import Cache
from emkum.stage1_extract import extract as extract_module
from emkum.stage1_extract.encode import Output, encode_outputs
from emkum.stage2_train.losses import autocast, in_chunks
from emkum.stage2_train.train import Distillation, TrainConfig, train

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
    moved = statistics[0].cuda(), statistics[1].cuda()
    on_cpu, on_gpu = (
        encode_outputs([Output("f", numbers, storage, "abcd", measured)])()["f"].encoded
        for numbers, measured in ((values, statistics), (values.cuda(), moved))
    )
    difference = np.abs(on_cpu.values.astype(np.float32) - on_gpu.values.astype(np.float32)).max()
    assert difference <= (1 if storage == "int8" else 0)
    assert on_gpu.summary.relative_l2 == pytest.approx(on_cpu.summary.relative_l2, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_extraction_queues_a_batch_without_waiting_for_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    for network in (tiny_network("vit", "image"), replace(tiny_network("text", "text"), tokenizer=word_tokenizer())):
        network = replace(network, weights_sha256=weights_digest(network.backbone))
        save_network(network, tmp_path / network.name)
    (tmp_path / "tars").mkdir()
    make_tar(tmp_path / "tars" / "a.tar", 40)
    config = tiny_config(tmp_path, tmp_path, targets=("cls", "layers"), storage=storage, text_encoder=None)
    config = replace(config, teacher=(str(tmp_path / "vit"), str(tmp_path / "text")))
    quiet(replace(config, cache=tmp_path / "cpu"))
    for name in ("_start_pictures", "_start_captions"):
        start = getattr(extract_module, name)

        def strict(*arguments: Any, start: Any = start) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return start(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(extract_module, name, strict)
    quiet(replace(config, device="cuda"))
    on_cpu, on_gpu = Cache.open(tmp_path / "cpu"), Cache.open(config.cache)
    assert on_cpu.fields.keys() == on_gpu.fields.keys()
    for name, field in on_cpu.fields.items():
        rows = field.rows("train")
        np.testing.assert_allclose(on_gpu.field(name).values(rows), field.values(rows), rtol=1e-2, atol=5e-2)


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


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("ssmke", ["objectives.ctl.bank=20"]),
        ("ssmke", ["training.batch=4", "training.accumulate=2"]),
        ("image-kd", []),
        ("text-kd", ["training.batch=4", "training.accumulate=2"]),
    ],
)
@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_no_step_waits_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, overrides: list[str], storage: str
) -> None:
    """From the second batch to the last, which is logged: CUDA itself refuses a call that waits."""
    made = make_cache(tmp_path / "cache", cut=1, storage=storage)
    transfer, batches = Distillation.transfer_batch_to_device, [0]
    num_batches = 12 if "training.accumulate=2" in overrides else 6

    def transferring(self: Distillation, *args: Any) -> Any:
        batches[0] += 1
        torch.cuda.set_sync_debug_mode("error" if 1 < batches[0] < num_batches else "default")
        return transfer(self, *args)

    monkeypatch.setattr(Distillation, "transfer_batch_to_device", transferring)
    wanted = ("training.batch=8", "evaluation.split=none", *overrides)
    config = TrainConfig(made.path, recipe, wanted, tmp_path / "run", device="cuda", max_steps=6, log_every=100)
    try:
        train(config, say=lambda line: None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert batches[0] == num_batches


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_attention_runs_without_the_kernel_that_keeps_every_logit(precision: str) -> None:
    """Pictures, texts with masks, a position bias that learns, the last block's single query; forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    pictures = BlockStack.random(384, 6, 2).cuda()
    biased = BlockStack(StackSpec(BlockSpec(384, 6, 768), 2, "per_block", (14, 14))).cuda()
    tokens_BTD = torch.randn(4, 197, 384, device="cuda")
    mask_BL = torch.arange(37, device="cuda") < torch.tensor([[37], [3], [20], [1]], device="cuda")
    with sdpa_kernel(fused), autocast(precision, torch.device("cuda")):
        for stack, inputs, mask in (
            (pictures, tokens_BTD, None),
            (pictures, tokens_BTD[:, :37], mask_BL),
            (biased, tokens_BTD, None),
        ):
            stack(inputs, mask, queries=1)[-1].float().square().sum().backward()
            stack(inputs, mask)[-1].float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for stack in (pictures, biased) for p in stack.parameters())


def test_a_batch_in_chunks_takes_less_memory(tmp_path: Path) -> None:
    stack = BlockStack.random(384, 6, 4).cuda()
    tokens_BTD = torch.randn(64, 197, 384, device="cuda")

    def most(chunk: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        in_chunks(lambda tokens: (stack(tokens)[-1][:, 0],), chunk, tokens_BTD)[0].square().sum().backward()
        return torch.cuda.max_memory_allocated()

    assert most(8) < most(0) / 3
