"""What the objectives see of a batch, and what every term of the loss is.

B batch, T tokens, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from emkum.stage2_train.loader import Batch
from emkum.stage2_train.student import Student

Need = Literal["tokens", "layers"]


@dataclass(frozen=True)
class Side:
    """What the student made of a batch's pictures, or of its texts. All float32.

    layers: those that can meet in contrast, the features last. predicted_BD: the head's output, which is compared with
    the teacher's. heads: the outputs of heads that objectives have of their own. tokens_BTD: the last tokens, after
    the shared part; mean_BTD: the mean of the student's layers by the rule of the targets; both only where a term
    needs them.
    """

    layers: list[Tensor]
    predicted_BD: Tensor
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    tokens_BTD: Tensor | None = None
    mean_BTD: Tensor | None = None

    def of(self, term: str) -> Tensor:
        """The features that an objective compares: from its own head, else those of all."""
        return self.heads.get(term, self.layers[-1])

    def said(self, term: str) -> Tensor:
        """What an objective compares with the teacher: the output of its own head, else of the one head."""
        return self.heads.get(term, self.predicted_BD)


@dataclass(frozen=True)
class Seen:
    """One batch and what the student made of it. random: on the host, a function of the run's seed and the batch."""

    batch: Batch
    student: Student
    images: Side | None
    texts: Side | None
    random: torch.Generator

    @property
    def pair(self) -> tuple[Side, Side]:
        """Both sides of a batch of pairs."""
        assert self.images is not None
        assert self.texts is not None
        return self.images, self.texts

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the student read of a batch of pairs: tokens_BTD, ids_BL, mask_BL."""
        assert self.batch.tokens_BTD is not None
        assert self.batch.ids_BL is not None
        return self.batch.tokens_BTD, self.batch.ids_BL, self.mask_BL

    @property
    def rows_B(self) -> Tensor:
        """The picture of each sample."""
        assert self.batch.image_rows_B is not None
        return self.batch.image_rows_B

    @property
    def mask_BL(self) -> Tensor:
        """bool, True = a real token of the text."""
        assert self.batch.mask_BL is not None
        return self.batch.mask_BL


class Term(nn.Module):
    """One term of the loss. Called with a batch, it gives its loss under "", and what is logged beside it by suffix.

    needs: of a side, beside pooled features. draws: it makes random choices. columns: the suffixes of all it gives, in
    order, "" first.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    draws: ClassVar[bool] = False
    suffixes: ClassVar[tuple[str, ...]] = ("",)

    def __init__(self, name: str, weight: float) -> None:
        super().__init__()
        self.name, self.weight = name, weight

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all it gives, as they are logged."""
        return tuple(f"{self.name}_{suffix}" if suffix else self.name for suffix in self.suffixes)

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        raise NotImplementedError

    def after_step(self, student: Student) -> None:
        """Called after each step of the optimiser."""

    def summary(self) -> str:
        """A line for the start of a run; "" for none."""
        return ""


class Terms(nn.Module):
    """The terms of a recipe, with all that they learn or remember; part of a checkpoint."""

    def __init__(self, terms: Sequence[Term], augments: bool = False) -> None:
        """augments: batches are changed at random before any term sees them."""
        super().__init__()
        self.augments = augments
        self.terms = nn.ModuleDict({term.name: term for term in terms})
        self.batches = 0  # seen so far, where something draws; on the host, so that the loop never waits for the device

    def __iter__(self) -> Iterator[Term]:
        for term in self.terms.values():
            assert isinstance(term, Term)
            yield term

    def __getitem__(self, name: str) -> Term:
        term = self.terms[name]
        assert isinstance(term, Term)
        return term

    @property
    def needs(self) -> frozenset[Need]:
        """What its terms read of a side, beside pooled features."""
        return frozenset(need for term in self for need in term.needs)

    @property
    def columns(self) -> list[str]:
        """Names of everything a step logs, "loss" first."""
        return ["loss", *(column for term in self for column in term.columns)]

    def after_step(self, student: Student) -> None:
        """Called after each step of the optimiser: scales are clamped, averages follow."""
        for term in self:
            term.after_step(student)

    def summary(self) -> list[str]:
        """What is said of the terms before a run."""
        return [line for term in self if (line := term.summary())]

    def generator(self, seed: int) -> torch.Generator:
        """For the random choices of the next batch: a function of the seed and of how many there were."""
        generator = torch.Generator()
        generator.manual_seed((seed * 0x9E3779B97F4A7C15 + self.batches) % 2**63)
        self.batches += self.augments or any(term.draws for term in self)
        return generator

    def get_extra_state(self) -> dict[str, int]:
        """What `state_dict` keeps besides tensors."""
        return {"batches": self.batches}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """The inverse of `get_extra_state`."""
        self.batches = state["batches"]
