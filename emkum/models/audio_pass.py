"""One pass of a batch of sounds through frozen networks: each wave embedded once a network, targets over real frames.

B batch, S samples of the wave, T frames, D width of a network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from emkum.errors import UnsupportedNetwork, UsageError
from emkum.models import targets
from emkum.models.audio import AudioBackbone, AudioSpec
from emkum.models.network import Network
from emkum.models.passes import Wanted, check_rule, default_rule
from emkum.models.targets import LayersMean, LayersRule

AUDIO_TARGETS = ("mean", "layers", "patches")
AUDIO_OUTPUTS = {"mean": "mean over the frames after the last block", "patches": "frames after the last block"}
"""What of a network is kept, in words; part of the fingerprint. `layers` has the words of its rule."""


class AudioPass:
    """The frozen networks of sounds, ready to run on `device` with matrix products in `compute`."""

    def __init__(
        self, networks: Sequence[Network], wanted: Sequence[Wanted], compute: str, device: torch.device | str
    ) -> None:
        self.device = torch.device(device)
        self.compute = compute
        self.wanted = tuple(wanted)
        used = [network for network in networks if any(want.network == network.name for want in wanted)]
        for want in self.wanted:
            if want.what not in AUDIO_TARGETS:
                raise UnsupportedNetwork(
                    f"target {want.what} of {want.network}, which hears sounds",
                    f"choose from {', '.join(AUDIO_TARGETS)}",
                )
        self._rules: dict[Wanted, LayersRule] = {}
        for network in used:
            for want in self.wanted:
                if (want.network, want.what) == (network.name, "layers"):
                    self._rules[want] = want.rule or default_rule(network)
                    check_rule(network, self._rules[want])
        self.networks = {n.name: n.placed(self.device, getattr(torch, compute)) for n in used}

    def only(self, wanted: Sequence[Wanted]) -> AudioPass | None:
        """The pass without other outputs than these; None if nothing is left."""
        kept = [want for want in self.wanted if want in wanted]
        return AudioPass(list(self.networks.values()), kept, self.compute, self.device) if kept else None

    def backbone(self, want: Wanted) -> AudioBackbone:
        """The network that gives this output."""
        found = self.networks[want.network].backbone
        assert isinstance(found, AudioBackbone)
        return found

    @property
    def rate(self) -> int:
        """Samples a second, the same for all networks. Raises UsageError if they disagree."""
        rates = {name: _spec(network).sample_rate for name, network in self.networks.items()}
        if len(set(rates.values())) > 1:
            raise UsageError(
                f"teachers that hear different rates: {', '.join(f'{name} {rate} Hz' for name, rate in rates.items())}",
                "name one of them in each command",
            )
        return next(iter(rates.values()))

    @property
    def least_samples(self) -> int:
        """Samples that a clip must have so that every network makes a frame of it."""
        most = 1
        for network in self.networks.values():
            samples = 1
            for _, kernel, stride in reversed(_spec(network).convs):
                samples = (samples - 1) * stride + kernel
            most = max(most, samples)
        return most

    def lengths(self, want: Wanted, num_samples_B: Sequence[int]) -> np.ndarray:
        """int32 [B]: frames of each wave in this output."""
        spec = self.backbone(want).spec
        return np.array([spec.num_frames(int(n)) for n in num_samples_B], np.int32)

    @torch.inference_mode()
    def sounds(
        self, waves_BS: Tensor, num_samples_B: Sequence[int], wanted: Sequence[Wanted] | None = None
    ) -> list[Tensor]:
        """float32 waves, zero past their samples -> one float32 tensor per wanted output.

        [B, D] for `mean`, else [B, T, D] with T frames of the longest wave, zero past each wave's own.
        wanted: some of the pass's own outputs; only what they need is run.
        """
        chosen = self.wanted if wanted is None else wanted
        waves_BS = waves_BS.to(self.device, non_blocking=True)
        results: dict[Wanted, Tensor] = {}
        for name, network in self.networks.items():
            here = [want for want in chosen if want.network == name]
            assert isinstance(network.backbone, AudioBackbone)
            if here:
                results |= _run(network.backbone, waves_BS, num_samples_B, here, self._rules)
        return [results[want] for want in chosen]


def _spec(network: Network) -> AudioSpec:
    assert isinstance(network.backbone, AudioBackbone)
    return network.backbone.spec


def _run(
    backbone: AudioBackbone,
    waves_BS: Tensor,
    num_samples_B: Sequence[int],
    wanted: Sequence[Wanted],
    rules: Mapping[Wanted, LayersRule],
) -> dict[Wanted, Tensor]:
    tokens_BTD, mask_BT = backbone.embed(waves_BS, num_samples_B)
    means = {want: LayersMean(rules[want], mask_BT) for want in wanted if want.what == "layers"}
    for index, (hidden_BTD, ffn_BTD) in enumerate(backbone.each_block(tokens_BTD, mask_BT=mask_BT)):
        tokens_BTD = hidden_BTD
        for mean in means.values():
            if index in mean.rule.counted(backbone.depth):
                mean.add(hidden_BTD if mean.rule.site == "block" else ffn_BTD)
    final_BTD = backbone.finish(tokens_BTD).masked_fill(~mask_BT[..., None], 0)
    found = {want: mean.result() for want, mean in means.items()}
    for want in wanted:
        if want.what != "layers":
            found[want] = targets.mean(final_BTD, mask_BT=mask_BT) if want.what == "mean" else final_BTD
    return found
