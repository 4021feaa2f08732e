"""One pass of a batch of captions and their pictures through frozen networks of pairs.

B batch, H height, W width, C colour, L text positions, T tokens (I of the picture, then L of the text), D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from emkum.errors import UnsupportedNetwork
from emkum.models import targets
from emkum.models.multiway import Layout, Multiway
from emkum.models.network import Network, normalise
from emkum.models.passes import TARGETS, Wanted, check_rule, default_rule
from emkum.models.targets import LayersMean, LayersRule

PAIR_TARGETS = ("cls", "mean", "layers", "patches")
PAIR_OUTPUTS = {
    "mean": "mean of the picture's tokens and the text's real ones, CLS and special tokens among them, after the final "
    "norm, of a caption with its picture",
    "patches": "text tokens after the final norm, of a caption with its picture",
}
"""What of a network is kept, in words; part of the fingerprint. `cls` and `layers`: see `pair_output`."""


def pair_output(network: Network, want: Wanted) -> str:
    """What of the network this output is, in words."""
    if want.what == "layers":
        return f"{(want.rule or default_rule(network)).words}, of the text of a caption with its picture"
    if want.what == "cls":
        which = "CLS of the picture" if multiway(network).spec.pooled == "image" else "first token of the text"
        return f"{which} after the final norm, of a caption with its picture"
    return PAIR_OUTPUTS[want.what]


class PairPass:
    """The frozen networks of pairs, ready to run on `device` with matrix products in `compute`.

    Residual streams, norms and outputs stay float32. Networks share nothing with each other, nor with their towers: in
    a pair every token has seen both modalities from the first block on.
    """

    def __init__(
        self, networks: Sequence[Network], wanted: Sequence[Wanted], compute: str, device: torch.device | str
    ) -> None:
        self.device = torch.device(device)
        self.compute = compute
        self.wanted = tuple(wanted)
        used = [network for network in networks if any(want.network == network.name for want in wanted)]
        self._rules: dict[Wanted, LayersRule] = {}
        for network in used:
            for want in self.wanted:
                if want.network != network.name:
                    continue
                if want.what not in PAIR_TARGETS:
                    raise UnsupportedNetwork(
                        f"target {next(target for target, what in TARGETS.items() if what == want.what)} of "
                        f"{network.name}, which reads a caption with its picture",
                        f"choose from {', '.join(PAIR_TARGETS)}",
                    )
                if want.what == "layers":
                    self._rules[want] = want.rule or default_rule(network)
                    check_rule(network, self._rules[want])
        self.networks = {n.name: n.placed(self.device, getattr(torch, compute)) for n in used}

    def only(self, wanted: Sequence[Wanted]) -> PairPass | None:
        """The pass without other outputs than these; None if nothing is left."""
        kept = [want for want in self.wanted if want in wanted]
        if len(kept) == len(self.wanted):
            return self
        return PairPass(list(self.networks.values()), kept, self.compute, self.device) if kept else None

    @torch.inference_mode()
    def pairs(
        self, crops_BHWC: Tensor, ids_BL: Tensor, mask_BL: Tensor, wanted: Sequence[Wanted] | None = None
    ) -> list[Tensor]:
        """uint8 crops, int ids and a bool mask (True: a real token) of B pairs -> one float32 tensor per wanted output.

        cls, mean: [B, D]. layers, patches: of the text alone, [B, L, D], zero where the mask is False; patches also at
        position 0, as those of texts. wanted: some of the pass's own outputs; only what they need is run.
        """
        chosen = self.wanted if wanted is None else wanted
        crops_BHWC, ids_BL, mask_BL = (
            tensor.to(self.device, non_blocking=True) for tensor in (crops_BHWC, ids_BL, mask_BL)
        )
        results: dict[Wanted, Tensor] = {}
        for name, network in self.networks.items():
            here = [want for want in chosen if want.network == name]
            if here:
                images_BCHW = normalise(network, crops_BHWC)
                results |= _run(multiway(network), images_BCHW, ids_BL, mask_BL, here, self._rules)
        return [results[want] for want in chosen]


def multiway(network: Network) -> Multiway:
    """The network's backbone, which must be one of pairs."""
    backbone: object = network.backbone
    assert isinstance(backbone, Multiway), f"{network.name} reads {network.modality}"
    return backbone


def _run(
    backbone: Multiway,
    images_BCHW: Tensor,
    ids_BL: Tensor,
    mask_BL: Tensor,
    wanted: Sequence[Wanted],
    rules: Mapping[Wanted, LayersRule],
) -> dict[Wanted, Tensor]:
    tokens_BTD, layout = backbone.embed(images_BCHW, ids_BL, mask_BL)
    tokens_BTD, first = tokens_BTD.float(), layout.num_image
    means = {want: LayersMean(rules[want], mask_BL) for want in wanted if want.what == "layers"}
    counted = {depth for mean in means.values() for depth in mean.rule.counted(backbone.depth)}
    last = backbone.depth if len(means) < len(wanted) else max(counted) + 1
    for index in range(last):
        out = backbone.run(tokens_BTD, layout, index, index + 1)
        tokens_BTD = out.hidden[-1].float()
        for mean in means.values():
            if index in mean.rule.counted(backbone.depth):
                mean.add((tokens_BTD if mean.rule.site == "block" else out.ffn[-1])[:, first:])
    found = {want: mean.result() for want, mean in means.items()}
    if len(means) < len(wanted):
        final_BTD = backbone.finish(tokens_BTD, layout).float()
        found |= {want: _of_last(backbone, want, final_BTD, layout) for want in wanted if want not in means}
    return found


def _of_last(backbone: Multiway, want: Wanted, final_BTD: Tensor, layout: Layout) -> Tensor:
    """A target of the tokens after the final norm."""
    assert layout.mask_BT is not None
    if want.what == "cls":
        return backbone.pool(final_BTD, layout)
    if want.what == "mean":
        return targets.mean(final_BTD, mask_BT=layout.mask_BT)
    first = layout.num_image
    pads_BL = ~layout.mask_BT[:, first:]
    words_BLD = final_BTD[:, first:].masked_fill(pads_BL[..., None], 0)  # not a product: a pad may hold NaN
    words_BLD[:, 0] = 0  # <s> or [CLS] is not a word; positions are kept
    return words_BLD
