"""What one batch costs: the recipe's objectives on the student's outputs, weighed and summed.

B batch, T tokens, L text tokens, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from emkum.models import targets
from emkum.models.targets import LayersRule
from emkum.stage2_train.augment import augmented
from emkum.stage2_train.loader import Batch
from emkum.stage2_train.recipe import Recipe
from emkum.stage2_train.student import Student, StudentOut
from emkum.stage2_train.terms.term import Need, Seen, Side, Terms


@dataclass(frozen=True)
class Losses:
    """The weighted sum that is minimised, and what is logged beside it, each a scalar on the device.

    share: how much the batch weighs beside others of its step, where that is not the same for all: its real tokens.
    """

    total: Tensor
    parts: dict[str, Tensor]
    share: Tensor | None = None


def step_losses(student: Student, terms: Terms, recipe: Recipe, batch: Batch, chunk: int = 0, seed: int = 0) -> Losses:
    """The losses of one batch; `chunk` as in `in_chunks`, `seed` that of the run, for what is drawn at random.

    A student in training sees the batch augmented as the recipe says.
    """
    random = terms.generator(seed)
    if student.training:
        batch = augmented(batch, recipe, student, random)
    seen = see(student, terms.needs, batch, random, chunk)
    parts: dict[str, Tensor] = {}
    total = torch.zeros((), device=(batch.pictures if batch.pictures is not None else seen.mask_BL).device)
    for term in terms:
        found = term(seen)
        total = total + term.weight * found[""]
        parts |= {f"{term.name}_{suffix}" if suffix else term.name: number for suffix, number in found.items()}
    share = seen.mask_BL.sum() if recipe.kind == "texts" else None
    return Losses(total, parts, share)


def see(student: Student, needs: frozenset[Need], batch: Batch, random: torch.Generator, chunk: int = 0) -> Seen:
    """The student's outputs that the terms need, of each side that the batch has."""
    images = texts = None
    if batch.pictures is not None:
        assert student.spec.image is not None
        images = _side(
            student.encode_images,
            needs,
            students_rule(student, "layers", batch.layers_rules.get("layers")),
            student.spec.image.num_prefix,
            chunk,
            batch.pictures,
        )
    if batch.ids_BL is not None:
        assert batch.mask_BL is not None
        rule = students_rule(student, "text_layers", batch.layers_rules.get("text_layers"))
        texts = _side(student.encode_texts, needs, rule, 0, chunk, batch.ids_BL, batch.mask_BL)
    return Seen(batch, student, images, texts, random)


def _side(
    encode: Callable[..., StudentOut],
    needs: frozenset[Need],
    rule: LayersRule,
    num_prefix: int,
    chunk: int,
    *inputs: Tensor,
) -> Side:
    """The outputs of one side. The mean of its layers is taken chunk by chunk: no chunk's layers outlive it."""
    names: list[str] = []

    def outputs(*inputs: Tensor) -> tuple[Tensor, ...]:
        out = encode(
            *inputs,
            keep_ffn="layers" in needs and rule.site == "ffn",
            keep_tokens="tokens" in needs or "layers" in needs,
        )
        found = {f"layer {number}": layer for number, layer in enumerate(out.layers)}
        if out.predicted_BD is not out.layers[-1]:
            found["predicted"] = out.predicted_BD
        found |= {f"head {term}": head for term, head in out.heads.items()}
        if "tokens" in needs:
            assert out.tokens_BTD is not None
            found["tokens"] = out.tokens_BTD
        if "layers" in needs:
            mask = inputs[1] if len(inputs) > 1 else None
            found["mean"] = targets.layers_by_rule(rule, out.hidden, out.ffn, mask, num_prefix)
        names[:] = found
        return tuple(found.values())

    tensors = in_chunks(outputs, chunk, *inputs)  # fills `names`
    found = dict(zip(names, tensors, strict=True))
    layers = [tensor for name, tensor in found.items() if name.startswith("layer ")]
    heads = {name.removeprefix("head "): tensor for name, tensor in found.items() if name.startswith("head ")}
    return Side(layers, found.get("predicted", layers[-1]), heads, found.get("tokens"), found.get("mean"))


def students_rule(student: Student, role: str, rule: LayersRule | None) -> LayersRule:
    """The rule of the targets of a role (None: the thesis's) for the student's own blocks.

    They follow the blocks in front of the cut, which the rule may count among those to skip.
    """
    modality = "image" if role == "layers" else "text"
    image = student.spec.image
    if rule is None:
        return targets.named_rule("thesis", modality)
    cut = image.cut if image is not None and modality == "image" else 0
    return dataclasses.replace(rule, skip=max(0, rule.skip - cut))


def in_chunks(encode: Callable[..., tuple[Tensor, ...]], chunk: int, *inputs: Tensor) -> tuple[Tensor, ...]:
    """`encode` of so many samples at a time; 0: of all at once. The same numbers and gradients up to rounding.

    The backward pass computes each chunk again, so that activations of one chunk exist at a time: as in Gao et al.
    2021 (GradCache), a contrastive batch may be as large as its features allow, for one more forward pass.
    """
    if not chunk or chunk >= len(inputs[0]) or not torch.is_grad_enabled():
        return encode(*inputs)
    parts = zip(*(torch.split(whole, chunk) for whole in inputs), strict=True)
    # Nothing in a student is random, so no state of a generator is kept.
    found = [checkpoint(encode, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return tuple(torch.cat(pieces) for pieces in zip(*found, strict=True))


def autocast(compute: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in `compute`; norms, softmax and losses in float32."""
    if compute == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, compute))


class Journal:
    """Sums of logged scalars on the device, read once every few steps: the loop never waits for the device."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._sums: Tensor | None = None
        self._count = 0

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """One step's scalars, the same names each time."""
        self.names = list(parts)
        values = torch.stack([part.detach().float() for part in parts.values()])
        self._sums = values if self._sums is None else self._sums.to(values.device) + values
        self._count += 1

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last `take`, so that a resumed run logs what an unbroken one would have."""
        return {"names": self.names, "sums": self._sums, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.names, self._sums, self._count = list(state["names"]), state["sums"], state["count"]

    def means(self) -> dict[str, float]:
        """The means since the last `take`. Waits for the device."""
        if self._sums is None:
            return {}
        return dict(zip(self.names, (self._sums / self._count).tolist(), strict=True))

    def take(self) -> dict[str, float]:
        """The means since the last call. Waits for the device."""
        means = self.means()
        self._sums, self._count = None, 0
        return means
