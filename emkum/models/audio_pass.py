"""One pass of a batch of sounds through frozen networks: each wave embedded once a network, targets over real frames.

B batch, S samples of the wave, T frames, D width of a network.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from emkum.errors import UnsupportedNetwork, UsageError
from emkum.models import targets
from emkum.models.audio import AudioBackbone, AudioSpec
from emkum.models.network import Network
from emkum.models.passes import Wanted

AUDIO_TARGETS = ("mean", "layers", "patches")
LAST_BLOCKS = 8  # whose feed-forward outputs make the target of data2vec and data2vec 2 for sounds


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
                results |= _run(network.backbone, waves_BS, num_samples_B, here)
        return [results[want] for want in chosen]


def _spec(network: Network) -> AudioSpec:
    assert isinstance(network.backbone, AudioBackbone)
    return network.backbone.spec


def _run(
    backbone: AudioBackbone, waves_BS: Tensor, num_samples_B: Sequence[int], wanted: Sequence[Wanted]
) -> dict[Wanted, Tensor]:
    tokens_BTD, mask_BT = backbone.embed(waves_BS, num_samples_B)
    first = first_target_block(backbone)
    with_layers = any(want.what == "layers" for want in wanted)
    tokens_BTD = backbone.run(tokens_BTD, 0, first, mask_BT, keep_ffn=False).hidden[-1] if first else tokens_BTD
    out = backbone.run(tokens_BTD, first, None, mask_BT, keep_ffn=with_layers)
    final_BTD = backbone.finish(out.hidden[-1]).masked_fill(~mask_BT[..., None], 0)
    found: dict[Wanted, Tensor] = {}
    for want in wanted:
        if want.what == "layers":
            found[want] = targets.layers(out.ffn, mask_BT, final_layer_norm=False)
        elif want.what == "mean":
            found[want] = final_BTD.sum(1) / mask_BT.sum(1, keepdim=True).clamp(min=1)
        else:
            found[want] = final_BTD
    return found


def first_target_block(backbone: AudioBackbone) -> int:
    """The first block whose feed-forward output is part of `layers`.

        Y = mean_l IN(F_l)    over the last K = 8 blocks, those of the prenet left out

    F_l: output of the feed-forward network before the residual; IN over the real frames of the clip, per channel; no
    norm afterwards. data2vec (arXiv:2202.03555, base_librispeech: average_top_k_layers 8) and data2vec 2
    (arXiv:2212.07525, base_audio_only_task: average_top_k_layers 8, instance_norm_target_layer).
    """
    return max(backbone.spec.prenet, backbone.depth - LAST_BLOCKS)


def output_in_words(backbone: AudioBackbone, what: str) -> str:
    """What of the network is kept; part of the fingerprint."""
    count = backbone.depth - first_target_block(backbone)
    return {
        "mean": "mean over the frames after the last block",
        "patches": "frames after the last block",
        "layers": f"mean over the last {count} blocks of instance-normalised feed-forward outputs",
    }[what]
