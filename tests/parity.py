"""What the tests of every family ask of it: the numbers of another implementation, strict loading, saving, a pass.

B batch, T tokens, D width, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emkum.errors import UnsupportedNetwork
from emkum.models.backbone import Backbone
from emkum.models.catalogue import load_network
from emkum.models.network import Network, load_saved, normalise, save_network
from emkum.models.passes import FrozenPass, Wanted

TOLERANCE = 1e-5  # relative, in the L2 norm
GRIDS = [(5, 5), (8, 8), (3, 3), (7, 4)]
PATCH = 4


@dataclass
class Layers:
    """What a network computes on the way: what block 0 takes, what each block gives, feed-forward outputs, the end."""

    hidden: list[Tensor] = field(default_factory=list)
    ffn: list[Tensor] = field(default_factory=list)
    final: Tensor | None = None


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).detach().norm() / theirs.norm())


def recorded(model: nn.Module, block: str, ffn: str, run: Callable[[], Tensor]) -> Layers:
    """What another implementation computes in `run`, which returns its end. block, ffn: its modules, with {} as i."""
    found, hooks, depth = Layers(), [], 0
    names = {name for name, _ in model.named_modules()}

    def first(_module: nn.Module, args: tuple[Any, ...], more: dict[str, Any]) -> None:
        found.hidden.append(args[0] if args else more["hidden_states"])

    def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found.hidden.append(output[0] if isinstance(output, tuple) else output)

    while block.format(depth) in names:
        module = model.get_submodule(block.format(depth))
        if depth == 0:
            hooks.append(module.register_forward_pre_hook(first, with_kwargs=True))
        hooks.append(module.register_forward_hook(after))
        inner = model.get_submodule(ffn.format(depth))
        hooks.append(inner.register_forward_hook(lambda _module, _inputs, output: found.ffn.append(output)))
        depth += 1
    with torch.no_grad():
        found.final = run()
    for hook in hooks:
        hook.remove()
    assert depth > 1
    return found


def ours_on_pictures(network: Network, images_BCHW: Tensor) -> Layers:
    backbone = network.backbone
    assert isinstance(backbone, Backbone)
    tokens = backbone.embed(images_BCHW)
    out = backbone.run(tokens, grid=backbone.grid(*images_BCHW.shape[2:]))
    final = backbone.finish(out.hidden[-1])
    assert torch.equal(backbone(images_BCHW), final)
    return Layers([tokens, *out.hidden], out.ffn, final)


def ours_on_texts(network: Network, ids_BL: Tensor, mask_BL: Tensor) -> Layers:
    backbone = network.backbone
    assert isinstance(backbone, Backbone)
    tokens = backbone.embed(ids_BL.int(), mask_BL)
    out = backbone.run(tokens, mask_BT=mask_BL)
    return Layers([tokens, *out.hidden], out.ffn, backbone.finish(out.hidden[-1]))


def assert_same(ours: Layers, theirs: Layers, mask_BL: Tensor | None = None) -> None:
    """Layer by layer; of texts the real tokens."""
    assert ours.final is not None
    assert theirs.final is not None
    pairs = zip([*ours.hidden, *ours.ffn, ours.final], [*theirs.hidden, *theirs.ffn, theirs.final], strict=True)
    for one, other in pairs:
        assert relative(*((one, other) if mask_BL is None else (one[mask_BL], other[mask_BL]))) < TOLERANCE


def pictures(grid: tuple[int, int]) -> Tensor:
    size = grid[0] * PATCH, grid[1] * PATCH
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def texts(vocabulary: int, lengths: Sequence[int] = (9, 4, 3, 16), num_positions: int = 16) -> tuple[Tensor, Tensor]:
    """Random ids from 5 on and the mask of the real ones; the pads are random too."""
    mask_BL = torch.arange(num_positions) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(2)
    return torch.randint(5, vocabulary, (len(lengths), num_positions), generator=generator), mask_BL


def assert_strict(folder: Path, tensor: str, tower: str = "") -> None:
    """A folder without `tensor`, with one too many, and with `tensor` of another shape are each refused."""
    path, source = folder / "model.safetensors", str(folder) + tower
    whole = load_file(path)
    load_network(source)
    save_file({name: t for name, t in whole.items() if name != tensor}, path)
    with pytest.raises(UnsupportedNetwork, match="lacks "):
        load_network(source)
    save_file(whole | {"encoder.extra": torch.zeros(1)}, path)
    with pytest.raises(UnsupportedNetwork, match=r"unknown tensors encoder\.extra"):
        load_network(source)
    save_file(whole | {tensor: torch.zeros(7)}, path)
    with pytest.raises(UnsupportedNetwork, match=r"has shape \(.*config.json implies"):
        load_network(source)
    save_file(whole, path)
    load_network(source)


def assert_saved_whole(network: Network, folder: Path) -> Network:
    """Saved and loaded, the network is the same, under the same digest. Returns the loaded one."""
    save_network(network, folder)
    again = load_saved(folder)
    assert again.weights_sha256 == network.weights_sha256
    assert again.backbone.spec == network.backbone.spec
    theirs = network.backbone.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.backbone.state_dict().items())
    assert (again.family, again.modality, again.tokenizer) == (network.family, network.modality, network.tokenizer)
    return again


def assert_pictures_pass(network: Network, grid: tuple[int, int] = (5, 5)) -> None:
    """Stage 1's pass gives the network's numbers, and in bfloat16 nearly these."""
    size = grid[0] * PATCH, grid[1] * PATCH
    crops = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    wanted = [Wanted(network.name, "cls"), Wanted(network.name, "patches"), Wanted(network.name, "layers")]
    cls_BD, patches_BPD, layers_BTD = FrozenPass([network], wanted, "float32", "cpu").pictures(crops)
    final = ours_on_pictures(network, normalise(network, crops)).final
    assert final is not None
    assert relative(cls_BD, final[:, 0]) < TOLERANCE
    assert relative(patches_BPD, final[:, network.num_prefix :]) < TOLERANCE
    assert patches_BPD.shape[1] == grid[0] * grid[1]
    assert layers_BTD.shape == final.shape
    rough = FrozenPass([network], wanted, "bfloat16", "cpu").pictures(crops)
    assert relative(rough[0], cls_BD) < 0.05
    assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in rough)


def assert_texts_pass(network: Network, ids_BL: Tensor, mask_BL: Tensor, cls_BD: Tensor) -> None:
    """As `assert_pictures_pass`. cls_BD: the other implementation's."""
    wanted = [Wanted(network.name, "cls"), Wanted(network.name, "patches"), Wanted(network.name, "layers")]
    cls, words_BLD, layers_BLD = FrozenPass([network], wanted, "float32", "cpu").texts(ids_BL.int(), mask_BL)
    final = ours_on_texts(network, ids_BL, mask_BL).final
    assert final is not None
    assert relative(cls, cls_BD) < TOLERANCE
    words = mask_BL.clone()
    words[:, 0] = False
    assert relative(words_BLD[words], final[words]) < TOLERANCE
    assert not words_BLD[~words].any()
    assert not layers_BLD[~mask_BL].any()
    rough = FrozenPass([network], wanted, "bfloat16", "cpu").texts(ids_BL.int(), mask_BL)
    assert relative(rough[0], cls_BD) < 0.05
    assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in rough)
