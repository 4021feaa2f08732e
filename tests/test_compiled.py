"""Compiled blocks give the numbers of blocks as written, however long texts are; without a compiler the run goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_accumulate import assert_close, configured, logged, weights
from tiny_cache import NUM_TOKENS, VOCABULARY, WIDTH, TinyCache, make_cache, tiny_network

from emkum.models.network import Network
from emkum.models.quantise import decode_int8, encode_int8
from emkum.stage2_train.compiled import compile_blocks, compiled_decode, uncompiled, why_not
from emkum.stage2_train.recipe import load_recipe
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.student import Student, build_student
from emkum.stage2_train.train import train

CLS = "teacher/tinyvit/image/cls"

CPU = torch.device("cpu")
pytestmark = [  # torch about itself: the first it hides from users, by means that "error" comes before
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),
]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What the compiler has in its caches is of this test alone, and it gives up on nothing unseen."""
    import torch._dynamo

    config = torch._dynamo.config
    limit, config.fail_on_recompile_limit_hit = config.recompile_limit, True
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    config.recompile_limit, config.fail_on_recompile_limit_hit = limit, False


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    return make_cache(tmp_path_factory.mktemp("compiled") / "cache", pictures=24, val_pictures=6, cut=1)


class Counted:
    """A backend that compiles nothing and counts what it was asked for."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph


def student() -> Student:
    recipe = load_recipe("ssmke", ["student.image_blocks=3"])
    names = FieldNames("image/tinyvit@1/tokens", "tinyvit", 1, "text/tinybert/ids", {"cls": CLS})
    image: Network = tiny_network("tinyvit", "image")
    return build_student(recipe, names, image, tiny_network("tinybert", "text", seed=1), WIDTH, seed=0)


def mome() -> Student:
    names = FieldNames("image/tinyvit@1/tokens", "tinyvit", 1, "text/tinybert/ids", {"cls": CLS})
    networks = tiny_network("tinyvit", "image"), tiny_network("tinybert", "text", seed=1)
    return build_student(load_recipe("ssmke", ["student.shared=mome"]), names, *networks, WIDTH, seed=0)


def features(of: Student, length: int, batch: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randn(batch, NUM_TOKENS, WIDTH, generator=generator)
    ids = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
    mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=generator)
    mask[0] = True
    return of.encode_images(tokens).features_BD @ of.encode_texts(ids, mask).features_BD.T


def test_texts_of_every_length_are_one_compilation() -> None:
    ours, plain, backend = student(), student(), Counted()
    assert compile_blocks(ours, CPU, backend) == ""
    for length in (9, 7):
        torch.testing.assert_close(features(ours, length), features(plain, length), rtol=1e-5, atol=1e-5)
    few = backend.graphs
    for length in (2, 3, 4, 6, 8, 10, 11, 12, 13, 14, 15, 16):
        torch.testing.assert_close(features(ours, length), features(plain, length), rtol=1e-5, atol=1e-5)
    assert backend.graphs == few
    for length in (1, 5):  # one token; as many as the batch has samples: these have a version of their own
        torch.testing.assert_close(features(ours, length), features(plain, length), rtol=1e-5, atol=1e-5)
    assert backend.graphs <= 2 * few + 4
    assert list(ours.state_dict()) == list(plain.state_dict())


def test_blocks_with_experts_are_compiled_once_for_texts_of_every_length() -> None:
    ours, plain, backend = mome(), mome(), Counted()
    assert compile_blocks(ours, CPU, backend) == ""
    for length in (7, 5):
        torch.testing.assert_close(features(ours, length), features(plain, length), rtol=1e-5, atol=1e-5)
    few = backend.graphs
    for length in (3, 4, 9, 10, 11):
        torch.testing.assert_close(features(ours, length), features(plain, length), rtol=1e-5, atol=1e-5)
    assert backend.graphs == few


def test_int8_of_every_shape_is_decoded_by_one_graph() -> None:
    backend = Counted()
    decode = compiled_decode(backend)
    for shape in ((6, 5, WIDTH), (4, 5, WIDTH), (4, 3, WIDTH), (7, 9, WIDTH)):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        mean, std = values.mean((0, 1)), values.std((0, 1))
        stored, scale = encode_int8(values, mean, std)
        torch.testing.assert_close(decode(stored, scale, mean, std), decode_int8(stored, scale, mean, std))
    assert backend.graphs == 1


def test_validation_runs_as_written() -> None:
    ours, backend = student(), Counted()
    compile_blocks(ours, CPU, backend)
    before = backend.graphs
    with torch.no_grad(), uncompiled(ours):
        features(ours, 9)
    assert backend.graphs == before
    features(ours, 9)
    assert backend.graphs > before


def test_the_want_of_a_compiler_is_told_in_the_compilers_words() -> None:
    """In a process of its own: the compiler remembers that it found none."""
    code = """
import torch, torch._inductor.config
torch._inductor.config.cpp.cxx = ("/nowhere/c++",)
from emkum.stage2_train.compiled import why_not
print(why_not(torch.device("cpu")))"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert "No working C++ compiler found" in found.stdout


def test_without_a_compiler_the_run_goes_on_and_says_why(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emkum.stage2_train.compiled.why_not", lambda device, backend: "RuntimeError: no compiler")
    lines: list[str] = []
    train(configured(cache, tmp_path / "run", "image-kd", "training.batch=8", compile=True), say=lines.append)
    assert "not compiled: RuntimeError: no compiler" in lines
    assert len(logged(tmp_path / "run")) == 9


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        pytest.param("ssmke", {}, marks=pytest.mark.slow),
        pytest.param("text-kd", {"chunk": 3}, marks=pytest.mark.slow),
        ("image-kd", {"activation_checkpointing": True}),
    ],
)
def test_a_compiled_run_loses_as_one_that_is_not(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, changes: dict[str, Any]
) -> None:
    """With a backend that traces as any other does, without the minutes that machine code takes; see the next test."""
    monkeypatch.setattr(
        "emkum.stage2_train.train.compile_blocks", lambda of, device: compile_blocks(of, device, "aot_eager")
    )
    for name in ("plain", "compiled"):
        wanted = changes | {"compile": name == "compiled"}
        config = configured(cache, tmp_path / name, recipe, "training.batch=8", "evaluation.split=val", **wanted)
        train(config, say=lambda line: None)
    np.testing.assert_allclose(loss_of(tmp_path / "compiled"), loss_of(tmp_path / "plain"), rtol=1e-5)
    assert_close(weights(tmp_path / "compiled"), weights(tmp_path / "plain"), 1e-4)


def loss_of(folder: Path) -> np.ndarray:
    import csv

    with (folder / "metrics.csv").open() as file:
        return np.array([float(row["loss"]) for row in csv.DictReader(file) if row["loss"]])


@pytest.mark.slow
def test_machine_code_gives_the_same_losses_from_int8(tmp_path: Path) -> None:
    if reason := why_not(CPU):
        pytest.skip(reason)
    cache = make_cache(tmp_path / "cache", pictures=24, val_pictures=6, cut=1, storage="int8")
    for name in ("plain", "compiled"):
        config = configured(cache, tmp_path / name, "image-kd", "training.batch=8", compile=name == "compiled")
        train(config, say=lambda line: None)
    np.testing.assert_allclose(logged(tmp_path / "compiled"), logged(tmp_path / "plain"), rtol=1e-5)
