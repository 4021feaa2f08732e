"""What is regressed of a frozen network: pure functions of its tokens and layers.

B batch, T tokens, D width, C classes, K of them kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from emkum.errors import NewerFormat, UsageError

EPS = 1e-5  # of both norms below, as in data2vec

Site = Literal["block", "ffn"]
Norm = Literal["instance", "layer", "none"]
Prefix = Literal["keep", "drop"]


# --- of the last layer -----------------------------------------------------------------------------------


def cls(final_BTD: Tensor) -> Tensor:
    """The CLS token after the final norm, [B, D]: t = h_0 (the target of cls-mse and ctl)."""
    return final_BTD[:, 0]


def patches(final_BTD: Tensor, num_prefix: int) -> Tensor:
    """The tokens after CLS and registers, after the final norm, [B, T - num_prefix, D]."""
    return final_BTD[:, num_prefix:]


def mean(final_BTD: Tensor, num_prefix: int = 0, mask_BT: Tensor | None = None) -> Tensor:
    """The mean of the tokens after the final norm, [B, D]; 0 where none is real.

        y = 1/N sum_t h_t           pictures: over the patches, CLS and registers left out
        y = sum_t m_t h_t / sum m   texts: over the real tokens of the mask, special tokens too (num_prefix 0), which is
                                    the mean pooling of sentence-transformers (arXiv:1908.10084)

    mask_BT: bool, True = real; what stands elsewhere does not matter.
    """
    tokens_BTD = final_BTD[:, num_prefix:]
    if mask_BT is None:
        return tokens_BTD.mean(dim=1)
    real_BT = mask_BT[:, num_prefix:]
    summed_BD = tokens_BTD.masked_fill(~real_BT[..., None], 0).sum(dim=1)
    return summed_BD / real_BT.sum(dim=1, keepdim=True).clamp(min=1)


def logits(final_BTD: Tensor, head_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """Class logits of a linear head on CLS, [B, C]: z = W h_0 + b (the target of SHRe, arXiv:1706.00932)."""
    return F.linear(cls(final_BTD).to(head_CD.dtype), head_CD, bias_C)


@dataclass(frozen=True)
class TopLogits:
    """The K largest logits of each row, in descending order, their classes (int64), and log-sum-exp of the others.

    Of equal logits the class with the lower number comes first. The softmax of the classes kept is exact:
    p_k = exp(z_k) / (sum_j exp(z_j) + exp(rest)).
    """

    values_BK: Tensor
    classes_BK: Tensor
    rest_B: Tensor


def top_logits(logits_BC: Tensor, k: int) -> TopLogits:
    """The `k` largest of 1 to C logits; with k = C nothing is left, and `rest` is -inf."""
    if not 1 <= k <= logits_BC.shape[-1]:
        raise ValueError(f"the {k} largest of {logits_BC.shape[-1]} logits")
    sorted_BC, classes_BC = logits_BC.sort(dim=-1, descending=True, stable=True)
    return TopLogits(sorted_BC[:, :k], classes_BC[:, :k], sorted_BC[:, k:].logsumexp(dim=-1))


def packed(top: TopLogits) -> Tensor:
    """One float tensor [B, 2K + 1]: the K values, the rest, the K classes (exact in float32 below 2^24 of them)."""
    return torch.cat([top.values_BK, top.rest_B[:, None], top.classes_BK.to(top.values_BK.dtype)], dim=1)


def unpacked(packed_B: Tensor) -> TopLogits:
    """The inverse of `packed`."""
    k = packed_B.shape[1] // 2
    return TopLogits(packed_B[:, :k], packed_B[:, k + 1 :].long(), packed_B[:, k])


# --- of all layers: the rule -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LayersRule:
    """Which layers the target `layers` is the mean of, and how they are normalised.

        Y = LN(mean_l N(A_l))   or, without `final_layer_norm`,   Y = mean_l N(A_l)

    site: A_l is the output of block l, or of its feed-forward network before LayerScale and residual. last: how many
    blocks are counted, from the last one on; None: all, and so where there are fewer. skip: leading blocks that are
    never counted (Data2Vec2's prenet). norm N: instance norm over the tokens, per channel; layer norm of each token,
    without parameters; none. prefix: CLS and registers are kept, or dropped before anything is computed.
    """

    site: Site = "block"
    last: int | None = None
    skip: int = 0
    norm: Norm = "instance"
    final_layer_norm: bool = False
    prefix: Prefix = "keep"

    def __post_init__(self) -> None:
        for name, known in (("site", Site), ("norm", Norm), ("prefix", Prefix)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} {getattr(self, name)!r} of a layers rule is none of {get_args(known)}")
        if self.last is not None and (type(self.last) is not int or self.last < 1):
            raise ValueError(f"the last {self.last!r} blocks")
        if type(self.skip) is not int or self.skip < 0 or type(self.final_layer_norm) is not bool:
            raise ValueError(f"skip {self.skip!r} or final_layer_norm {self.final_layer_norm!r} of a layers rule")

    def counted(self, depth: int) -> range:
        """The blocks of a network of so many that are counted, from 0; empty where all are skipped."""
        blocks = range(self.skip, depth)
        return blocks if self.last is None else blocks[-self.last :]

    @property
    def words(self) -> str:
        """One phrase, for people and for the fingerprint's `output`."""
        blocks = (
            "all blocks"
            if self.last is None
            else "the last block"
            if self.last == 1
            else f"the last {self.last} blocks"
        )
        if self.skip:
            blocks += f" but the first {self.skip}" if self.last is None else f" (the first {self.skip} never counted)"
        how = {"instance": "instance-normalised ", "layer": "layer-normalised ", "none": ""}[self.norm]
        what = "outputs" if self.site == "block" else "feed-forward outputs"
        end = ", layer norm" if self.final_layer_norm else ""
        end += ", CLS and registers left out" if self.prefix == "drop" else ""
        return f"mean over {blocks} of {how}{what}{end}"

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> LayersRule:
        """The inverse of `to_json`. Raises ValueError or TypeError for what is no rule."""
        return cls(**found)


RULES = ("thesis", "data2vec", "data2vec2")


def named_rule(name: str, modality: str, prenet: int = 0) -> LayersRule:
    """A rule of `RULES` for a network of this modality with so many prenet blocks; pairs follow the rules of texts.

    thesis: the output of every block, instance norm, mean; for pictures layer norm at the end. All tokens.
    data2vec (arXiv:2202.03555): pictures: outputs of the last 6 blocks, layer norm, mean, layer norm, patches alone
    (data2vec_vision, engine_for_cyclical.py with its README's flags; modeling_cyclical.py takes CLS off). Texts:
    feed-forward outputs of the last 10, layer norm, mean (fairseq, text/pretraining/base.yaml). Sound: feed-forward
    outputs of the last 8, instance norm, mean (audio/pretraining/base_librispeech.yaml).
    data2vec2 (arXiv:2212.07525; fairseq, data2vec2.py make_targets, config/v2): feed-forward outputs of every block
    after the prenet (of base sound, which has none, the last 8), instance norm, mean; pictures: layer norm at the
    end, patches alone.
    """
    picture = modality == "image"
    prefix: Prefix = "drop" if picture else "keep"
    if name == "thesis":
        return LayersRule(final_layer_norm=picture)
    if name == "data2vec2":
        last = 8 if modality == "audio" and not prenet else None
        return LayersRule("ffn", last, prenet, "instance", picture, prefix)
    if name == "data2vec" and picture:
        return LayersRule("block", 6, 0, "layer", True, prefix)
    if name == "data2vec":
        return LayersRule("ffn", 8, 0, "instance") if modality == "audio" else LayersRule("ffn", 10, 0, "layer")
    raise UsageError(f"a rule {name!r} for the target layers", f"choose one of {', '.join(RULES)}")


_KEYS = {
    "site": "site",
    "last": "last",
    "skip": "skip",
    "norm": "norm",
    "final": "final_layer_norm",
    "prefix": "prefix",
}
_KEYS_IN_WORDS = "site=block|ffn, last=N|all, skip=N, norm=instance|layer|none, final=yes|no, prefix=keep|drop"


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):  # int() takes "+1", "1_0" and digits of other scripts
        raise ValueError(f"{text!r} is no number")
    return int(text)


_READ: dict[str, Callable[[str], Any]] = {
    "last": lambda text: None if text == "all" else _number(text),
    "skip": _number,
    "final": {"yes": True, "no": False}.__getitem__,
}


def rule_from_text(text: str, modality: str, prenet: int = 0) -> LayersRule:
    """What `--layers` takes: a name of RULES, or pairs as `site=ffn,last=10,norm=layer,final=no,prefix=drop`.

    Keys that are left out are those of `thesis`. Raises UsageError.
    """
    if not text.strip():
        raise UsageError("--layers without a rule", f"choose one of {', '.join(RULES)}, or give keys: {_KEYS_IN_WORDS}")
    if "=" not in text:
        return _rule_named(text, modality, prenet)
    chosen: dict[str, Any] = {}
    for pair in text.split(","):
        key, _, value = (part.strip() for part in pair.partition("="))
        if _KEYS.get(key) in chosen:
            raise UsageError(f"--layers {text}: {key} stands there twice", "give every key once")
        try:
            chosen[_KEYS[key]] = _READ.get(key, str)(value)
        except (KeyError, ValueError):
            raise UsageError(f"--layers {text}: {pair.strip()!r} is not known", f"keys: {_KEYS_IN_WORDS}") from None
    try:
        return dataclasses.replace(named_rule("thesis", modality), **chosen)
    except ValueError as error:
        raise UsageError(f"--layers {text}: {error}", f"keys: {_KEYS_IN_WORDS}") from None


def rule_as_text(rule: LayersRule, modality: str) -> str:
    """What `--layers` takes for this rule whatever the network: a name where it means the same of all, else pairs."""
    for name in ("thesis", "data2vec"):
        if rule == named_rule(name, modality):
            return name
    words: dict[Any, str] = {None: "all", True: "yes", False: "no"}
    values = {key: getattr(rule, name) for key, name in _KEYS.items()}
    return ",".join(
        f"{key}={words[value] if value is None or type(value) is bool else value}" for key, value in values.items()
    )


def _rule_named(name: str, modality: str, prenet: int) -> LayersRule:
    try:
        return named_rule(name, modality, prenet)
    except UsageError:
        raise UsageError(
            f"--layers {name}: no such rule", f"choose one of {', '.join(RULES)}, or give keys: {_KEYS_IN_WORDS}"
        ) from None


def recorded_rule(fingerprint: Mapping[str, Any], modality: str) -> LayersRule:
    """The rule a field `layers` was made with, from its fingerprint; one that states none has that of the thesis.

    Raises NewerFormat for a rule that this emkum cannot apply.
    """
    found = fingerprint.get("layers")
    if found is None:
        return named_rule("thesis", modality)
    try:
        return LayersRule.from_json(found)
    except (TypeError, ValueError) as error:
        raise NewerFormat(
            f"a field `layers` follows the rule {found}, which this emkum does not know: {error}",
            "use the newer emkum that made it: pip install --upgrade emkum",
        ) from error


# --- of all layers: the target ---------------------------------------------------------------------------


class LayersMean:
    """The target `layers` under a rule, one layer at a time, so that a layer may be freed once it is added.

    mask_BT: bool, True = real; other tokens take no part, whatever they hold, and come out 0. num_prefix: tokens that
    `prefix: drop` takes off. Float32; float64 if that comes in. Which layers are counted is the caller's to see to.
    """

    def __init__(self, rule: LayersRule, mask_BT: Tensor | None = None, num_prefix: int = 0) -> None:
        self.rule = rule
        self._first = num_prefix if rule.prefix == "drop" else 0
        self._mask_BT = None if mask_BT is None else mask_BT[:, self._first :]
        self._total_BTD: Tensor | None = None
        self._count = 0

    def add(self, layer_BTD: Tensor) -> None:
        """The next layer; it is not changed."""
        layer_BTD = layer_BTD[:, self._first :]
        exact_BTD = layer_BTD if layer_BTD.dtype == torch.float64 else layer_BTD.float()
        normed_BTD = self._normed(exact_BTD)
        self._total_BTD = normed_BTD if self._total_BTD is None else self._total_BTD.add_(normed_BTD)
        self._count += 1

    def _normed(self, layer_BTD: Tensor) -> Tensor:
        """A new tensor, to which others may be added."""
        if self.rule.norm == "instance":
            return instance_norm(layer_BTD, self._mask_BT)
        # Not a product with the mask: a pad may hold inf or NaN.
        real_BTD = layer_BTD.clone() if self._mask_BT is None else layer_BTD.masked_fill(~self._mask_BT[..., None], 0)
        return F.layer_norm(real_BTD, real_BTD.shape[-1:], eps=EPS) if self.rule.norm == "layer" else real_BTD

    def result(self) -> Tensor:
        """[B, T, D], or without the prefix."""
        if self._total_BTD is None:
            raise ValueError("a mean over no layers")
        mean_BTD = self._total_BTD.div_(self._count)
        if self.rule.final_layer_norm:
            mean_BTD = F.layer_norm(mean_BTD, mean_BTD.shape[-1:], eps=EPS)
            if self._mask_BT is not None:
                mean_BTD = mean_BTD * self._mask_BT[..., None]
        return mean_BTD


def layers(hidden: Iterable[Tensor], mask_BT: Tensor | None, final_layer_norm: bool) -> Tensor:
    """The mean of all layers, each normalised, [B, T, D] in float32 (float64 if that comes in): the thesis's rule.

        Y = LN(mean_l IN(H_l))    images: final_layer_norm=True, all tokens (CLS and registers too)
        Y = mean_l IN(H_l)        text: final_layer_norm=False, with a mask

    IN is instance norm over tokens per channel: (h - mean_t h) / sqrt(var_t h + eps), over the real tokens of the mask
    only (bool, True = real), the variance biased; LN is layer norm without parameters. Tokens outside the mask are 0.
    The objective layers-mse (data2vec, arXiv:2202.03555, with all layers instead of the top K).
    `hidden`: tokens_BTD after each block (an iterator is read once, one layer at a time).
    """
    mean_BTD = LayersMean(LayersRule(final_layer_norm=final_layer_norm), mask_BT)
    for hidden_BTD in hidden:
        mean_BTD.add(hidden_BTD)
    return mean_BTD.result()


def layers_by_rule(
    rule: LayersRule,
    hidden: Sequence[Tensor],
    ffn: Sequence[Tensor],
    mask_BT: Tensor | None = None,
    num_prefix: int = 0,
) -> Tensor:
    """The target `layers` of all blocks' outputs `hidden` or `ffn`, as the rule says; see LayersRule and LayersMean."""
    outputs = hidden if rule.site == "block" else ffn
    mean_BTD = LayersMean(rule, mask_BT, num_prefix)
    for index in rule.counted(len(outputs)):
        mean_BTD.add(outputs[index])
    return mean_BTD.result()


def instance_norm(tokens_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Each channel to mean 0 and variance 1 over the tokens of a sample; only real tokens count, others become 0."""
    if mask_BT is None:
        variance_B1D, mean_B1D = torch.var_mean(tokens_BTD, dim=1, correction=0, keepdim=True)
        return (tokens_BTD - mean_B1D) * torch.rsqrt(variance_B1D + EPS)
    real_BT1 = mask_BT[..., None]
    # Not a product with the mask: a pad may hold inf or NaN.
    tokens_BTD = tokens_BTD.masked_fill(~real_BT1, 0)
    num_real_B11 = real_BT1.sum(1, keepdim=True).clamp(min=1)
    mean_B1D = tokens_BTD.sum(1, keepdim=True) / num_real_B11
    centred_BTD = (tokens_BTD - mean_B1D).masked_fill(~real_BT1, 0)
    variance_B1D = centred_BTD.square().sum(1, keepdim=True) / num_real_B11
    return centred_BTD * torch.rsqrt(variance_B1D + EPS)
