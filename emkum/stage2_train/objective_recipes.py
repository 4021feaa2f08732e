"""The tables of a recipe under [objectives]: one dataclass for each term of the loss, with its ranges.

Ranges are checked by recipe.py; what a term computes is in objectives/, how it is fed in terms/.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

Layers = Literal["last", "all"]


def ranged(default: Any, low: float, high: float = math.inf, *, below: bool = False) -> Any:
    """A dataclass field whose number (or every number of a tuple) lies in [low, high]; below: in [low, high)."""
    return field(default=default, metadata={"range": (low, high), "below": below})


@dataclass(frozen=True)
class ItcRecipe:
    """Image-text contrast; see objectives/itc.py. `layers`: the student's features, or every layer of its shared MLP,
    each with its own temperature, and the mean of their losses."""

    weight: float = ranged(1.0, 0.0)
    temperature: float = ranged(0.07, 0.01, 10.0)  # the start of the learned one
    layers: Layers = "last"


@dataclass(frozen=True)
class CtlRecipe:
    """Contrastive target loss; see objectives/ctl.py. `bank`: rows of the FIFO, "all" rows of the cache, or "auto":
    a FIFO of 65,536 rows, and every row where the cache has no more than that. `duplicates`: pictures whose targets
    have this cosine or more count as one, and are no negatives of each other (`emkum cache stats --what duplicates`);
    0: those of one row only."""

    weight: float = ranged(1.0, 0.0)
    temperature: float = ranged(0.07, 0.01, 10.0)
    bank: int | Literal["auto", "all"] = field(default="auto", metadata={"range": (0, 2**31)})
    duplicates: float = ranged(0.0, 0.0, 1.0)


@dataclass(frozen=True)
class ClsMseRecipe:
    """Regression of the teacher's CLS; see objectives/cls_mse.py."""

    weight: float = ranged(1.0, 0.0)


@dataclass(frozen=True)
class LayersMseRecipe:
    """Regression of the teacher's mean layer at every token; see objectives/layers_mse.py."""

    weight: float = ranged(1.0, 0.0)


@dataclass(frozen=True)
class LogitsKlRecipe:
    """The teacher's class distribution, predicted by the head; see objectives/logits_kl.py."""

    weight: float = ranged(1.0, 0.0)
    temperature: float = ranged(1.0, 0.01, 100.0)  # T; fixed


@dataclass(frozen=True)
class RankingRecipe:
    """Hinge on cosines of pairs and others; see objectives/ranking.py. `layers` as for itc."""

    weight: float = ranged(1.0, 0.0)
    margin: float = ranged(0.1, 0.0, 2.0)
    layers: Layers = "last"


@dataclass(frozen=True)
class ItcQueueRecipe:
    """Image-text contrast with a queue of earlier features; see objectives/itc_queue.py.

    keys: the student's own features, or those of a momentum encoder, which follows the student by `momentum` a step.
    proximal: weight of the distance between the features of now and the momentum encoder's; 0: none.
    """

    weight: float = ranged(1.0, 0.0)
    temperature: float = ranged(0.07, 0.01, 10.0)
    rows: int = ranged(65_536, 1, 2**24)
    keys: Literal["own", "momentum"] = "own"
    momentum: float = ranged(0.995, 0.0, 1.0, below=True)
    proximal: float = ranged(0.0, 0.0)


@dataclass(frozen=True)
class ItmRecipe:
    """Matching: does the caption belong to the picture? See objectives/itm.py. `fusion`: "sum" of the two features, as
    in the thesis, which cannot tell pairs apart; or their "product", channel by channel."""

    weight: float = ranged(1.0, 0.0)
    negatives: Literal["random", "hard"] = "random"
    fusion: Literal["sum", "product"] = "sum"


@dataclass(frozen=True)
class CmliRecipe:
    """Contrast by the most similar token of the other side; see objectives/cmli.py. `chunk`: captions at a time."""

    weight: float = ranged(1.0, 0.0)
    temperature: float = ranged(0.07, 0.01, 10.0)
    chunk: int = ranged(32, 1)


@dataclass(frozen=True)
class TargetCmliRecipe:
    """Each word regresses the teacher's most similar patch; see objectives/target_cmli.py.

    empty: words may match a learned target that stands for "shows nothing", and regress nothing then.
    """

    weight: float = ranged(1.0, 0.0)
    empty: bool = False


@dataclass(frozen=True)
class ReducedRecipe:
    """Regression in fewer dimensions; see objectives/reduced.py. `start`: of the projections, at random or by the
    principal components of the cached targets (`emkum cache stats --what pca`)."""

    weight: float = ranged(1.0, 0.0)
    width: int = ranged(64, 1)
    momentum: float = ranged(0.999, 0.0, 1.0, below=True)
    start: Literal["random", "pca"] = "random"
    variance: float = ranged(5.0, 0.0)  # weight of the guard against collapse


@dataclass(frozen=True)
class CodesRecipe:
    """Classification of the target's nearest code; see objectives/codes.py. `codes`: of the codebook in the cache
    (`emkum cache stats --what codebook`)."""

    weight: float = ranged(1.0, 0.0)
    codes: int = ranged(1024, 2)


@dataclass(frozen=True)
class CodesVqRecipe:
    """Classification of the codes of a learned quantiser; see objectives/codes_vq.py. `groups`: codes a picture."""

    weight: float = ranged(1.0, 0.0)
    groups: int = ranged(8, 1)
    codes: int = ranged(1024, 2)
    momentum: float = ranged(0.99, 0.0, 1.0, below=True)


@dataclass(frozen=True)
class DinoRecipe:
    """Self-distillation over learned prototypes; see objectives/dino.py."""

    weight: float = ranged(1.0, 0.0)
    prototypes: int = ranged(4096, 2)
    student_temperature: float = ranged(0.1, 0.01, 10.0)
    teacher_temperature: float = ranged(0.04, 0.01, 10.0)
    momentum: float = ranged(0.996, 0.0, 1.0, below=True)
    centre: float = ranged(0.9, 0.0, 1.0, below=True)  # how much of the centre stays each step


@dataclass(frozen=True)
class MvlmRecipe:
    """Masked words given the picture, masked patches given the caption; see objectives/mvlm.py.

    Shares are of the real words and of the patches; a share of 0 leaves that half out. `codes`: of the codebook of the
    teacher's patches in the cache, which masked patches are classified by.
    """

    weight: float = ranged(1.0, 0.0)
    word_share: float = ranged(0.15, 0.0, 0.9)
    patch_share: float = ranged(0.4, 0.0, 0.9)
    codes: int = ranged(1024, 2)


@dataclass(frozen=True)
class BranchesRecipe:
    """Regression of a multimodal teacher's layers: pictures, texts, and texts that see their picture; see
    objectives/branches.py. Weights of the three beside each other."""

    weight: float = ranged(1.0, 0.0)
    image: float = ranged(1.0, 0.0)
    text: float = ranged(1.0, 0.0)
    fused: float = ranged(1.0, 0.0)


@dataclass(frozen=True)
class ObjectivesRecipe:
    """The terms of the loss. A term whose table is absent is not computed."""

    itc: ItcRecipe | None = None
    itc_queue: ItcQueueRecipe | None = None
    ctl: CtlRecipe | None = None
    cls_mse: ClsMseRecipe | None = None
    layers_mse: LayersMseRecipe | None = None
    logits_kl: LogitsKlRecipe | None = None
    ranking: RankingRecipe | None = None
    itm: ItmRecipe | None = None
    cmli: CmliRecipe | None = None
    target_cmli: TargetCmliRecipe | None = None
    reduced: ReducedRecipe | None = None
    codes: CodesRecipe | None = None
    codes_vq: CodesVqRecipe | None = None
    dino: DinoRecipe | None = None
    mvlm: MvlmRecipe | None = None
    branches: BranchesRecipe | None = None
