"""One pass of a batch through several frozen networks: each picture embedded once, shared blocks run once.

B batch, H height, W width, T tokens, D width of a network, L text positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from emkum.errors import UnsupportedNetwork, UsageError
from emkum.models import targets
from emkum.models.audio import AudioBackbone
from emkum.models.backbone import Backbone
from emkum.models.network import Network, normalise, shares_prefix
from emkum.models.resnet import ResNet

What = Literal["tokens", "cls", "patches", "layers", "logits", "mean"]


@dataclass(frozen=True)
class Wanted:
    """One output of one network. `cut`: for tokens, after how many blocks."""

    network: str
    what: What
    cut: int = 0


def chosen_device(name: str) -> torch.device:
    """The device a user named; "auto" is cuda if there is one, else the CPU. Raises UsageError for one not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used here: {error}".splitlines()[0], "use --device cpu") from None
    return device


def good_compute(device: torch.device) -> str:
    """The fastest type of matrix product the device is good at: "bfloat16" or "float32".

    CPUs count as good at bfloat16 when they have its instructions (AMX or AVX512-BF16): there it is 2 to 4 times
    faster than float32; elsewhere it is emulated and slower.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "cpu":
        good = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bfloat16" if good else "float32"
    return "float32"


class FrozenPass:
    """The frozen networks of one modality, ready to run on `device` with matrix products in `compute`.

    Residual streams, norms and outputs stay float32 whatever `compute` is. The networks given are not changed.
    """

    def __init__(
        self, networks: Sequence[Network], wanted: Sequence[Wanted], compute: str, device: torch.device | str
    ) -> None:
        self.device = torch.device(device)
        self.compute = compute
        self.wanted = tuple(wanted)
        used = [network for network in networks if any(want.network == network.name for want in wanted)]
        for network in used:
            for want in self.wanted:
                if want.network == network.name:
                    _check_wanted(network, want)
        self._shared = {network.name: _best_prefix(network, used[:i]) for i, network in enumerate(used)}
        self.networks = {n.name: n.placed(self.device, getattr(torch, compute)) for n in used}
        self.block_runs = 0  # blocks run so far, counted for the test that a shared prefix runs once

    @property
    def shared_blocks(self) -> dict[str, tuple[str, int]]:
        """For each network that reuses another's leading blocks: (that network, how many blocks)."""
        return {name: found for name, found in self._shared.items() if found is not None}

    @torch.inference_mode()
    def pictures(self, crops_BHWC: Tensor, wanted: Sequence[Wanted] | None = None) -> list[Tensor]:
        """uint8 crops -> one float32 tensor per wanted output: [B, T, D] (tokens, patches, layers) or [B, D].

        wanted: some of the pass's own outputs; only what they need is run.
        """
        crops_BHWC = crops_BHWC.to(self.device, non_blocking=True)
        return self._run(lambda network: _backbone(network).embed(normalise(network, crops_BHWC)), None, wanted)

    @torch.inference_mode()
    def texts(self, ids_BL: Tensor, mask_BL: Tensor, wanted: Sequence[Wanted] | None = None) -> list[Tensor]:
        """int ids and a bool mask (True: a real token) -> one float32 tensor per wanted output.

        Token outputs are zero where the mask is False.
        """
        ids_BL, mask_BL = (tensor.to(self.device, non_blocking=True) for tensor in (ids_BL, mask_BL))
        return self._run(lambda network: _backbone(network).embed(ids_BL, mask_BL), mask_BL, wanted)

    def _run(
        self, embed: Callable[[Network], Tensor], mask_BL: Tensor | None, chosen: Sequence[Wanted] | None
    ) -> list[Tensor]:
        chosen = self.wanted if chosen is None else chosen
        whole = {want.network for want in chosen if want.what == "layers"}  # these need every layer of their own
        stops = self._stops(chosen, whole)
        kept: dict[tuple[str, int], Tensor] = {}
        results: dict[Wanted, Tensor] = {}
        for name, network in self.networks.items():
            wanted = [want for want in chosen if want.network == name]
            outputs = [want for want in wanted if want.what != "tokens"]
            if isinstance(network.backbone, ResNet):
                if wanted:
                    results.update(_run_convnet(network, embed, wanted))
                continue
            if not outputs and not stops[name]:
                continue
            lender = None if name in whole else self._shared[name]
            start = lender[1] if lender else 0
            tokens = kept[self._computes(name, start, whole), start] if lender else embed(network).float()
            last = network.depth if outputs else max(stops[name])
            hidden = []
            for depth in range(start, last + 1):
                if depth in stops[name]:
                    kept[name, depth] = tokens
                if depth == last:
                    break
                tokens = network.backbone.run(tokens, depth, depth + 1, mask_BL).hidden[-1].float()
                self.block_runs += 1
                if name in whole:
                    hidden.append(tokens)
            for want in outputs:
                results[want] = _target(network, want, tokens, hidden, mask_BL)
        for want in chosen:
            if want not in results:
                results[want] = kept[self._computes(want.network, want.cut, whole), want.cut]
        return [results[want].float() for want in chosen]

    def _computes(self, name: str, depth: int, whole: set[str]) -> str:
        """The network that computes `name`'s tokens of this depth: itself, or one whose blocks it shares."""
        lender = None if name in whole else self._shared[name]
        return self._computes(lender[0], depth, whole) if lender and depth <= lender[1] else name

    def _stops(self, chosen: Sequence[Wanted], whole: set[str]) -> dict[str, set[int]]:
        """The depths at which each network's tokens are kept, for its own outputs or for others that start there."""
        stops: dict[str, set[int]] = {name: set() for name in self.networks}
        for want in chosen:
            if want.what == "tokens" and not isinstance(self.networks[want.network].backbone, ResNet):
                stops[self._computes(want.network, want.cut, whole)].add(want.cut)
        for name in reversed(self.networks):  # lenders come first, so their borrowers' needs are known
            lender = None if name in whole else self._shared[name]
            runs = stops[name] or any(want.network == name and want.what != "tokens" for want in chosen)
            if lender and runs:
                stops[self._computes(name, lender[1], whole)].add(lender[1])
        return stops


def _backbone(network: Network) -> Backbone | ResNet:
    assert not isinstance(network.backbone, AudioBackbone), "sounds have a pass of their own"
    return network.backbone


def _target(network: Network, want: Wanted, tokens: Tensor, hidden: list[Tensor], mask_BL: Tensor | None) -> Tensor:
    if want.what == "layers":
        return targets.layers([h.float() for h in hidden], mask_BL, final_layer_norm=network.modality == "image")
    final = network.backbone.finish(tokens).float()
    if want.what == "cls":
        return targets.cls(final)
    patches = targets.patches(final, network.num_prefix) if network.modality == "image" else final
    if mask_BL is not None:
        patches = patches * mask_BL[..., None]
        patches[:, 0] = 0  # the CLS token is not a word; positions are kept
    return patches


def _run_convnet(
    network: Network, embed: Callable[[Network], Tensor], wanted: Sequence[Wanted]
) -> dict[Wanted, Tensor]:
    assert isinstance(network.backbone, ResNet)
    features = embed(network)
    outputs = {
        "tokens": network.backbone.tokens,
        "cls": network.backbone.cls,
        "patches": network.backbone.patches,
        "logits": network.backbone.logits,
    }
    return {want: outputs[want.what](features) for want in wanted}


def _check_wanted(network: Network, want: Wanted) -> None:
    convolutional = isinstance(network.backbone, ResNet)
    if want.what == ("layers" if convolutional else "logits"):
        raise UnsupportedNetwork(
            f"target {want.what} of {network.name}, a {network.family} network",
            "choose cls or patches; `layers` needs a Transformer, `logits` a classifier",
        )
    if want.what == "tokens" and not 0 <= want.cut <= network.depth:
        raise UnsupportedNetwork(
            f"cut {want.cut} of {network.name}, which has {network.depth} blocks",
            f"choose a cut between 0 (patch embeddings) and {network.depth}",
        )


def _best_prefix(network: Network, earlier: Sequence[Network]) -> tuple[str, int] | None:
    """The earlier network with the longest common prefix, and its length in blocks; None: nothing is shared."""
    best: tuple[str, int] | None = None
    for other in earlier:
        if isinstance(network.backbone, ResNet) or isinstance(other.backbone, ResNet):
            continue
        length = shares_prefix(other, network)
        if length >= 0 and (best is None or length > best[1]):
            best = other.name, length
    return best
