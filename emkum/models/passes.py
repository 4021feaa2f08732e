"""One pass of a batch through several frozen networks: each picture embedded once, shared blocks run once.

B batch, H height, W width, T tokens, D width of a network, L text positions, K classes kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from emkum.errors import UnsupportedNetwork, UsageError
from emkum.models import targets
from emkum.models.audio import AudioBackbone
from emkum.models.backbone import Backbone
from emkum.models.families.registry import family_named
from emkum.models.network import Network, normalise, shares_prefix
from emkum.models.resnet import ResNet
from emkum.models.targets import LayersMean, LayersRule
from emkum.models.whole import WholeNetwork, WholeSpec

What = Literal["tokens", "cls", "patches", "mean", "layers", "logits", "top_logits"]
TARGETS: dict[str, What] = {
    "cls": "cls",
    "patches": "patches",
    "mean": "mean",
    "layers": "layers",
    "logits": "logits",
    "logits-top": "top_logits",
}
"""What a field `teacher/<network>/<space>/<target>` keeps, by the last part of its name."""


@dataclass(frozen=True)
class Wanted:
    """One output of one network.

    cut: for tokens, after how many blocks. top: for top_logits, how many are kept. rule: for layers; None: the rule
    that the network was trained with (`default_rule`).
    """

    network: str
    what: What
    cut: int = 0
    top: int = 0
    rule: LayersRule | None = None


def wanted_target(network: Network, target: str, fingerprint: Mapping[str, Any]) -> Wanted:
    """The output that a field `teacher/.../<target>` with this fingerprint keeps of the network that made it."""
    what = TARGETS[target]
    if what == "layers":
        return Wanted(network.name, what, rule=targets.recorded_rule(fingerprint, network.modality))
    return Wanted(network.name, what, top=fingerprint["row_shape"][0] - 1 if what == "top_logits" else 0)


def default_rule(network: Network) -> LayersRule:
    """The rule of the target `layers` that the network's family was trained with; the thesis's for all others."""
    family = family_named(network.family, network.modality)
    return rule_of(network, family.layers_rule if family else "thesis")


def rule_of(network: Network, text: str) -> LayersRule:
    """The rule that `text` (what `--layers` takes) means for this network. Raises UsageError.

    Where the last so many blocks are all there are, that is what it says, so that equal rules have one fingerprint.
    """
    rule, depth = targets.rule_from_text(text, network.modality, num_prenet(network)), _num_layers(network)
    family = family_named(network.family, network.modality)
    if family is not None and text == family.layers_rule and not num_prenet(network):
        rule = replace(rule, last=family.layers_last.get(depth, rule.last))
    whole = replace(rule, last=None)
    return whole if rule.counted(depth) == whole.counted(depth) else rule


def _num_layers(network: Network) -> int:
    """Blocks whose outputs can be averaged."""
    spec = network.backbone.spec
    return spec.num_layers if isinstance(spec, WholeSpec) else network.depth


def num_prenet(network: Network) -> int:
    """Leading blocks that belong to the modality's encoder (Data2Vec2's prenet); 0 for most."""
    return int(getattr(network.backbone.spec, "prenet", 0))


def num_classes(network: Network) -> int:
    """Of the network's classifier; 0 if it has none."""
    return int(getattr(network.backbone.spec, "num_classes", 0))


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

    Residual streams, norms, outputs and classifiers stay float32 whatever `compute` is; of a ResNet and of a network in
    one piece the classifier alone. The networks given are not changed.
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
                if want.network == network.name:
                    _check_wanted(network, want)
                    if want.what == "layers":
                        self._rules[want] = want.rule or default_rule(network)
                        check_rule(network, self._rules[want])
        self._shared = {network.name: _best_prefix(network, used[:i]) for i, network in enumerate(used)}
        self.networks = {n.name: n.placed(self.device, getattr(torch, compute)) for n in used}
        self.block_runs = 0  # blocks run so far, counted for the test that a shared prefix runs once

    @property
    def shared_blocks(self) -> dict[str, tuple[str, int]]:
        """For each network that reuses another's leading blocks: (that network, how many blocks)."""
        return {name: found for name, found in self._shared.items() if found is not None}

    def own_blocks(self, name: str) -> int:
        """How many blocks run of this network for all that is wanted, those it borrows left out."""
        stops, lender = self._stops(self.wanted)[name], self._shared[name]
        whole = any(want.network == name and want.what != "tokens" for want in self.wanted)
        last = self.networks[name].depth if whole else max(stops, default=0)
        return max(0, last - (lender[1] if lender else 0))

    @torch.inference_mode()
    def pictures(self, crops_BHWC: Tensor, wanted: Sequence[Wanted] | None = None) -> list[Tensor]:
        """uint8 crops -> one float32 tensor per wanted output: [B, T, D] (tokens, patches, layers) or [B, D].

        top_logits are packed as by `targets.packed`, [B, 2K + 1].
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
        return self._run(lambda network: _backbone(network).embed(ids_BL, mask_BL), mask_BL, wanted, ids_BL)

    def _run(
        self,
        embed: Callable[[Network], Tensor],
        mask_BL: Tensor | None,
        chosen: Sequence[Wanted] | None,
        ids_BL: Tensor | None = None,
    ) -> list[Tensor]:
        chosen = self.wanted if chosen is None else chosen
        stops = self._stops(chosen)
        kept: dict[tuple[str, int], Tensor] = {}
        results: dict[Wanted, Tensor] = {}
        means = {want: self._mean(want, mask_BL) for want in chosen if want.what == "layers"}
        for name, network in self.networks.items():
            wanted = [want for want in chosen if want.network == name]
            outputs = [want for want in wanted if want.what != "tokens"]
            if isinstance(network.backbone, ResNet):
                if wanted:
                    results.update(_run_convnet(network, embed, wanted))
                continue
            if isinstance(network.backbone, WholeNetwork):
                if wanted:
                    results.update(_run_whole(network.backbone, embed(network), mask_BL, wanted, means))
                continue
            if not outputs and not stops[name]:
                continue
            lender = self._shared[name]
            start = lender[1] if lender else 0
            tokens = kept[self._computes(name, start), start] if lender else embed(network).float()
            last = network.depth if outputs else max(stops[name])
            for depth in range(start, last + 1):
                if depth in stops[name]:
                    kept[name, depth] = tokens
                if depth == last:
                    break
                out = network.backbone.run(tokens, depth, depth + 1, mask_BL)
                tokens = out.hidden[-1].float()
                self.block_runs += 1
                # To each mean as it comes, those of borrowers too: no layer is held for later.
                for want, mean in means.items():
                    counts = depth in mean.rule.counted(self.networks[want.network].depth)
                    if counts and self._computes(want.network, depth + 1) == name:
                        mean.add(tokens if mean.rule.site == "block" else out.ffn[-1])
            others = [want for want in outputs if want.what != "layers"]
            results.update(_outputs(network, others, tokens, mask_BL, ids_BL))
        results.update((want, mean.result()) for want, mean in means.items())
        for want in chosen:
            if want not in results:
                results[want] = kept[self._computes(want.network, want.cut), want.cut]
        return [results[want].float() for want in chosen]

    def _mean(self, want: Wanted, mask_BL: Tensor | None) -> LayersMean:
        return LayersMean(self._rules[want], mask_BL, self.networks[want.network].num_prefix)

    def _computes(self, name: str, depth: int) -> str:
        """The network that computes `name`'s tokens of this depth: itself, or one whose blocks it shares."""
        lender = self._shared[name]
        return self._computes(lender[0], depth) if lender and depth <= lender[1] else name

    def _stops(self, chosen: Sequence[Wanted]) -> dict[str, set[int]]:
        """The depths at which each network's tokens are kept, for its own outputs or for others that start there."""
        stops: dict[str, set[int]] = {name: set() for name in self.networks}
        for want in chosen:
            if want.what == "tokens" and not isinstance(self.networks[want.network].backbone, ResNet):
                stops[self._computes(want.network, want.cut)].add(want.cut)
        for name in reversed(self.networks):  # lenders come first, so their borrowers' needs are known
            lender = self._shared[name]
            runs = stops[name] or any(want.network == name and want.what != "tokens" for want in chosen)
            if lender and runs:
                stops[self._computes(name, lender[1])].add(lender[1])
        return stops


def _backbone(network: Network) -> Backbone | ResNet | WholeNetwork:
    assert not isinstance(network.backbone, AudioBackbone), "sounds have a pass of their own"
    return network.backbone


def _outputs(
    network: Network, wanted: Sequence[Wanted], tokens: Tensor, mask_BL: Tensor | None, ids_BL: Tensor | None
) -> dict[Wanted, Tensor]:
    """What is wanted of a Transformer's last tokens."""
    if not wanted:
        return {}
    assert not isinstance(network.backbone, WholeNetwork)
    final = network.backbone.finish(tokens).float()
    return {want: _output(network, want, final, mask_BL, ids_BL) for want in wanted}


def _output(network: Network, want: Wanted, final: Tensor, mask_BL: Tensor | None, ids_BL: Tensor | None) -> Tensor:
    picture = network.modality == "image"
    if want.what == "cls":
        backbone = network.backbone
        return backbone.pool(final, ids_BL, mask_BL) if isinstance(backbone, Backbone) else targets.cls(final)
    if want.what == "mean":
        return targets.mean(final, network.num_prefix if picture else 0, mask_BL)
    patches = targets.patches(final, network.num_prefix) if picture else final
    if mask_BL is not None:
        patches = patches.masked_fill(~mask_BL[..., None], 0)  # not a product: a pad may hold NaN
        patches[:, 0] = 0  # the CLS token is not a word; positions are kept
    return patches


def _run_convnet(
    network: Network, embed: Callable[[Network], Tensor], wanted: Sequence[Wanted]
) -> dict[Wanted, Tensor]:
    backbone = network.backbone
    assert isinstance(backbone, ResNet)
    features = embed(network)
    outputs: dict[What, Callable[[Wanted], Tensor]] = {
        "tokens": lambda want: backbone.tokens(features),
        "cls": lambda want: backbone.cls(features),
        "patches": lambda want: backbone.patches(features),
        "mean": lambda want: targets.mean(backbone.patches(features).float()),
        "logits": lambda want: backbone.logits(features),
        "top_logits": lambda want: targets.packed(targets.top_logits(backbone.logits(features).float(), want.top)),
    }
    return {want: outputs[want.what](want) for want in wanted}


def _run_whole(
    network: WholeNetwork,
    inputs: Tensor,
    mask_BL: Tensor | None,
    wanted: Sequence[Wanted],
    means: Mapping[Wanted, LayersMean],
) -> dict[Wanted, Tensor]:
    """What is wanted of it but `layers`, which go to their means."""
    given = network.outputs(inputs, mask_BL, {_WHOLE.get(want.what, want.what) for want in wanted})
    results = {}
    for want in wanted:
        if want.what == "layers":
            for index in means[want].rule.counted(len(given["layers"])):
                means[want].add(given["layers"][index])
        elif want.what == "top_logits":
            results[want] = targets.packed(targets.top_logits(given["logits"], want.top))
        else:
            results[want] = given[want.what]
    return results


_WHOLE = {"top_logits": "logits"}
_LACKING = {
    "logits": "it has no classifier",
    "layers": "its stages have different sizes, or its blocks are no plain list, so they have no mean",
}


def _check_whole(network: Network, whole: WholeNetwork, want: Wanted) -> None:
    if want.what == "tokens":
        raise UnsupportedNetwork(
            f"{network.name} as an encoder: it is run in one piece ({whole.spec.family}), so no cut of it is known",
            "name another --encoder, for example dinov2-s; it can be the teacher",
        )
    if (output := _WHOLE.get(want.what, want.what)) not in whole.spec.outputs:
        raise UnsupportedNetwork(
            f"target {next(t for t, what in TARGETS.items() if what == want.what)} of {network.name} "
            f"({whole.spec.family}): {_LACKING.get(output, 'it gives no tokens after a final norm')}",
            f"it has {', '.join(whole.spec.outputs)}",
        )


def _check_wanted(network: Network, want: Wanted) -> None:
    convolutional = isinstance(network.backbone, ResNet)
    if isinstance(network.backbone, WholeNetwork):
        _check_whole(network, network.backbone, want)
    elif want.what in (("layers",) if convolutional else ("logits", "top_logits")):
        target = next(target for target, what in TARGETS.items() if what == want.what)
        raise UnsupportedNetwork(
            f"target {target} of {network.name}, a {network.family} network",
            "choose cls or patches; `layers` needs a Transformer, `logits` a classifier",
        )
    if want.what == "top_logits" and not 0 < want.top < num_classes(network):
        raise _too_many(network, want)
    if want.what == "tokens" and not 0 <= want.cut <= network.depth:
        raise UnsupportedNetwork(
            f"cut {want.cut} of {network.name}, which has {network.depth} blocks",
            f"choose a cut between 0 (patch embeddings) and {network.depth}",
        )


def _too_many(network: Network, want: Wanted) -> UnsupportedNetwork:
    return UnsupportedNetwork(
        f"the {want.top} largest logits of {network.name}, which has {num_classes(network)} classes",
        f"keep 1 to {num_classes(network) - 1}, or all of them: the target logits",
    )


def check_rule(network: Network, rule: LayersRule) -> None:
    """Raises UnsupportedNetwork for a rule of the target `layers` that the network cannot follow."""
    whole = isinstance(network.backbone, WholeNetwork)
    depth = _num_layers(network)
    if not rule.counted(depth):
        raise UnsupportedNetwork(
            f"layers of {network.name} but the first {rule.skip}: it has {depth} blocks",
            f"skip fewer: at most {depth - 1}",
        )
    if whole and rule.site == "ffn":
        raise UnsupportedNetwork(
            f"feed-forward outputs of {network.name}, which is run in one piece ({network.family})",
            "use site=block, or the rule thesis",
        )
    if rule.prefix == "drop" and network.modality == "audio":
        raise UnsupportedNetwork(
            f"layers of {network.name}, which hears sounds, without CLS and registers: it has neither",
            "use prefix=keep",
        )
    if rule.prefix == "drop" and network.modality in ("text", "pair"):
        kept = "a text network" if network.modality == "text" else "of whose pairs the text is kept"
        raise UnsupportedNetwork(
            f"layers of {network.name}, {kept}, without CLS and registers: its CLS is a token like any other, "
            "and stays at its position",
            "use prefix=keep",
        )


def _best_prefix(network: Network, earlier: Sequence[Network]) -> tuple[str, int] | None:
    """The earlier network with the longest common prefix, and its length in blocks; None: nothing is shared."""
    best: tuple[str, int] | None = None
    for other in earlier:
        if any(isinstance(one.backbone, ResNet | WholeNetwork) for one in (network, other)):
            continue
        length = shares_prefix(other, network)
        if length >= 0 and (best is None or length > best[1]):
            best = other.name, length
    return best
