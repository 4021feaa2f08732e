"""What tests of networks with towers of pictures, texts and pairs share: inputs, strict loading, saving, a pass.

B batch, T tokens, D width, L text tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emkum.errors import UnsupportedNetwork
from emkum.models.catalogue import load_network
from emkum.models.network import Network
from emkum.models.passes import FrozenPass, Wanted, What
from tests.parity import TOLERANCE, assert_saved_whole, relative

PATCH, GRID, WORDS = 4, 5, 60
LENGTHS = (9, 4, 1, 12)
TARGETS: tuple[What, ...] = ("cls", "patches", "layers")


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padded_texts(lengths: tuple[int, ...] = LENGTHS, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Ids and mask; whatever stands in the pads must not matter, so it is no pad id."""
    mask_BL = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randint(4, WORDS, mask_BL.shape, generator=torch.Generator().manual_seed(seed)), mask_BL


def outputs(network: Network) -> Tensor:
    """What it gives where no pad is."""
    ids, mask = padded_texts()
    images = random(len(LENGTHS), 3, GRID * PATCH, (GRID + 1) * PATCH)
    inputs = {"image": (images,), "text": (ids, mask), "pair": (images, ids, mask)}[network.modality]
    final: Tensor = network.backbone(*inputs)
    if network.modality == "pair":
        return final[:, : -max(LENGTHS)]
    return final[mask] if network.modality == "text" else final


def assert_strict(load: Callable[[dict[str, Tensor]], Network], state: dict[str, Tensor], name: str) -> None:
    """A file without the tensor, with another one in its layer, or with the tensor of another shape is each refused."""
    stable = name.removeprefix("beit3.")
    with pytest.raises(UnsupportedNetwork, match=f"it lacks {re.escape(stable)}"):
        load({other: tensor for other, tensor in state.items() if other != name})
    layer = stable[: stable.index(".1.")]
    with pytest.raises(UnsupportedNetwork, match=rf"unknown tensors {re.escape(layer)}\.1\.extra\.weight"):
        load(state | {f"{layer}.1.extra.weight": torch.zeros(1)})
    with pytest.raises(UnsupportedNetwork, match=rf"{re.escape(stable)} has shape \(7,\)"):
        load(state | {name: torch.zeros(7)})


def assert_saved_and_rounded(network: Network, folder: Path) -> None:
    """Saved and loaded it gives the same numbers, and in bfloat16 nearly these, as float32."""
    again = assert_saved_whole(network, folder)
    with torch.no_grad():
        assert torch.equal(outputs(again), outputs(network))
        rounded = outputs(network.placed("cpu", torch.bfloat16))
        assert rounded.dtype == torch.float32
        assert 0 < relative(rounded, outputs(network)) < 0.05


def assert_towers_pass(path: Path, width: int) -> None:
    """Stage 1's pass runs the towers of pictures and of texts in the file; pads are zeros."""
    image, text = load_network(str(path), name="i"), load_network(f"{path}#text", name="t")
    crops = torch.randint(0, 256, (2, GRID * PATCH, GRID * PATCH, 3), dtype=torch.uint8)
    frozen = FrozenPass([image], [Wanted("i", what) for what in TARGETS], "float32", "cpu")
    cls, patches, layers = frozen.pictures(crops)
    num_patches = GRID * GRID
    assert (cls.shape, patches.shape) == ((2, width), (2, num_patches, width))
    assert layers.shape == (2, 1 + num_patches, width)
    ids, mask = padded_texts()
    frozen = FrozenPass([text], [Wanted("t", what) for what in TARGETS], "float32", "cpu")
    cls, words, layers = frozen.texts(ids, mask)
    with torch.no_grad():
        assert relative(cls, text.backbone(ids, mask)[:, 0]) < TOLERANCE
    assert not words[~mask].any()
    assert not layers[~mask].any()
