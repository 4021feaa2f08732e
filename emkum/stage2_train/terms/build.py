"""From a recipe to its terms: which modules, of what sizes, with what they take from the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from emkum.errors import UsageError
from emkum.models.network import load_saved
from emkum.models.targets import named_rule, recorded_rule
from emkum.models.tokenizer import MASK_TOKENS, special_ids
from emkum.shards.statistics.kept import Statistic, load
from emkum.stage2_train.augment import augments
from emkum.stage2_train.loader import BatchSource
from emkum.stage2_train.objective_recipes import (
    BranchesRecipe,
    ClsMseRecipe,
    CmliRecipe,
    CodesRecipe,
    CodesVqRecipe,
    CtlRecipe,
    DinoRecipe,
    ItcQueueRecipe,
    ItcRecipe,
    ItmRecipe,
    LayersMseRecipe,
    LogitsKlRecipe,
    MvlmRecipe,
    RankingRecipe,
    ReducedRecipe,
    TargetCmliRecipe,
)
from emkum.stage2_train.objectives.masking import Vocabulary, vocabulary
from emkum.stage2_train.recipe import Recipe
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.recipe_statistics import required_statistics
from emkum.stage2_train.samples import SampleTable
from emkum.stage2_train.shared_mlp import SHARED_LAYERS
from emkum.stage2_train.student import Student, transformer
from emkum.stage2_train.terms.bank import make_bank
from emkum.stage2_train.terms.codes import Codes, CodesVq, Dino, Reduced, as_tensor
from emkum.stage2_train.terms.contrast import Ctl, Itc, Ranking
from emkum.stage2_train.terms.masked import BranchesTerm, Hidden, Mvlm
from emkum.stage2_train.terms.match import Cmli, ItcQueue, Itm, TargetCmli
from emkum.stage2_train.terms.regress import ClsMse, LayersMse, LogitsKl
from emkum.stage2_train.terms.term import Term, Terms

if TYPE_CHECKING:
    from emkum.shards.reader import Cache, Field


@dataclass(frozen=True)
class Setting:
    """What terms are made for. Without a cache, only those that take nothing from it can be."""

    recipe: Recipe
    student: Student
    cache: Cache | None = None
    names: FieldNames = dataclasses.field(default_factory=FieldNames)
    table: SampleTable | None = None
    source: BatchSource | None = None
    seed: int = 0

    @property
    def opened(self) -> Cache:
        """The cache, for terms that take something from it."""
        assert self.cache is not None
        return self.cache

    @property
    def width(self) -> int:
        """Channels of the student's features."""
        return self.student.spec.contrast_widths[-1]

    def target(self, role: str) -> Field:
        """The field of a role."""
        return self.opened.field(self.names.targets[role])


def make_terms(setting: Setting) -> Terms:
    """The recipe's terms, in the order of ObjectivesRecipe; what they learn starts from the seed.

    Raises UsageError and MissingStatistic for what the cache does not have.
    """
    asked = setting.recipe.objectives
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        return Terms(
            [_MAKERS[name](setting, getattr(asked, name)) for name in setting.recipe.terms], augments(setting.recipe)
        )


def _itc(setting: Setting, wanted: ItcRecipe) -> Term:
    return Itc(wanted, num_layers(setting.recipe, wanted))


def _ranking(setting: Setting, wanted: RankingRecipe) -> Term:
    return Ranking(wanted, num_layers(setting.recipe, wanted))


def _itc_queue(setting: Setting, wanted: ItcQueueRecipe) -> Term:
    return ItcQueue(wanted, setting.student)


def _ctl(setting: Setting, wanted: CtlRecipe) -> Term:
    assert setting.table is not None
    assert setting.source is not None
    width = setting.target("cls").row_shape[-1]
    groups_R = None
    if wanted.duplicates:
        groups_R = torch.from_numpy(_statistic(setting, "ctl").arrays["group"].copy())
    return Ctl(wanted, make_bank(setting.recipe, setting.table, setting.source, width), groups_R)


def _cls_mse(setting: Setting, wanted: ClsMseRecipe) -> Term:
    return ClsMse(wanted, setting.recipe.kind == "pairs")


def _layers_mse(setting: Setting, wanted: LayersMseRecipe) -> Term:
    return LayersMse("layers_mse", wanted.weight)


def _logits_kl(setting: Setting, wanted: LogitsKlRecipe) -> Term:
    return LogitsKl(wanted, setting.recipe.kind == "pairs")


def _itm(setting: Setting, wanted: ItmRecipe) -> Term:
    return Itm(wanted, setting.width)


def _cmli(setting: Setting, wanted: CmliRecipe) -> Term:
    ids = setting.opened.field(str(setting.names.ids))
    return Cmli(wanted, ids.row_shape[0])


def _target_cmli(setting: Setting, wanted: TargetCmliRecipe) -> Term:
    image = setting.student.spec.image
    assert image is not None
    target = setting.target("patches")
    if not setting.names.live_prefix:
        tokens = setting.opened.field(str(setting.names.inputs)).row_shape[0] - image.num_prefix
        if tokens != target.row_shape[0]:
            raise UsageError(
                f"{target.name} has {target.row_shape[0]} patches, the student {tokens}: target-cmli compares them one "
                "by one",
                "choose a teacher with the encoder's patch size, or the encoder itself",
            )
    return TargetCmli(wanted, setting.student.spec.width, target.row_shape[-1])


def _codes(setting: Setting, wanted: CodesRecipe) -> Term:
    return Codes(wanted, setting.width, as_tensor(_statistic(setting, "codes").arrays["codes"]))


def _codes_vq(setting: Setting, wanted: CodesVqRecipe) -> Term:
    return CodesVq(wanted, setting.width, setting.target("cls").row_shape[-1])


def _dino(setting: Setting, wanted: DinoRecipe) -> Term:
    return Dino(wanted, setting.target("cls").row_shape[-1])


def _reduced(setting: Setting, wanted: ReducedRecipe) -> Term:
    target, principal = setting.target("cls"), None
    if wanted.width > target.row_shape[-1]:
        raise UsageError(
            f"objectives.reduced.width = {wanted.width}: {target.name} has {target.row_shape[-1]} channels",
            f"use fewer: --set objectives.reduced.width={target.row_shape[-1]}",
        )
    if wanted.start == "pca":
        found = _statistic(setting, "reduced")
        principal = as_tensor(found.arrays["components"]), as_tensor(found.arrays["mean"])
    return Reduced(wanted, target.row_shape[-1], principal)


def _mvlm(setting: Setting, wanted: MvlmRecipe) -> Term:
    if not wanted.word_share and not wanted.patch_share:
        raise UsageError(
            "objectives.mvlm: word_share = 0 and patch_share = 0: nothing is masked",
            "--set objectives.mvlm.word_share=0.15, or objectives.mvlm=none",
        )
    words = vocabulary_of(setting) if wanted.word_share else None
    hidden = _hidden(setting) if wanted.patch_share else None
    return Mvlm(wanted, setting.student, words, hidden, setting.opened.field(str(setting.names.ids)).row_shape[0])


def _branches(setting: Setting, wanted: BranchesRecipe) -> Term:
    spec = setting.student.spec
    if spec.text is not None and spec.text.width != spec.width:
        raise UsageError(
            f"objectives.branches: the student's text blocks have {spec.text.width} channels, its shared ones "
            f"{spec.width}: there is no mean of their layers",
            "choose an image and a text encoder of one width, as the towers of beit3 are",
        )
    rule = named_rule("thesis", "text")
    if "pair_layers" in setting.names.targets:
        target = setting.target("pair_layers")
        rule = recorded_rule(target.fingerprint, "text")
        if rule.site != "block":
            raise UsageError(
                f"{target.name} is the {rule.words}: the shared blocks give their outputs after each block alone",
                "extract it by another rule: --layers thesis",
            )
    return BranchesTerm(wanted, dataclasses.replace(rule, skip=0))


def _statistic(setting: Setting, term: str) -> Statistic:
    """What a term reads of the whole cache. Raises MissingStatistic with the command that makes it."""
    return load(setting.opened, required_statistics(setting.recipe, setting.opened, setting.names)[term])


def _hidden(setting: Setting) -> Hidden:
    """What masked patches need; UsageError where the student's input has seen its neighbours already."""
    names = setting.names
    if names.cut:
        raise UsageError(
            f"objectives.mvlm.patch_share with inputs after block {names.cut} of {names.encoder}: each token there has "
            "seen the others, so that hiding one hides little",
            "extract with --cut 0, or --set objectives.mvlm.patch_share=0",
        )
    network = load_saved(setting.opened.model_dir(str(names.encoder)))
    backbone = transformer(network)
    size = int(setting.opened.field(str(names.inputs)).fingerprint["size"])
    with torch.no_grad():
        blank_TD = backbone.embed(torch.zeros(1, 3, size, size))[0].float()
    return Hidden(as_tensor(_statistic(setting, "mvlm").arrays["codes"]), blank_TD)


def vocabulary_of(setting: Setting) -> Vocabulary:
    """The words of the text encoder's tokenizer. Raises UsageError where none of its tokens stands for a hidden one."""
    name = str(setting.names.text_encoder)
    tokenizer = load_saved(setting.opened.model_dir(name)).tokenizer
    assert tokenizer is not None
    special, mask = special_ids(tokenizer)
    if mask is None:
        raise UsageError(
            f"the tokenizer of {name} has none of {', '.join(MASK_TOKENS)}: no token can stand for a hidden word",
            "choose another text encoder, for example bert-base, or --set objectives.mvlm.word_share=0",
        )
    embedding = setting.student.text_embedding
    assert embedding is not None
    return vocabulary(len(embedding.tokens), special, mask, "cpu")


def num_layers(recipe: Recipe, term: ItcRecipe | RankingRecipe) -> int:
    """On how many of the student's layers the term is computed."""
    return SHARED_LAYERS[recipe.student.shared] if term.layers == "all" else 1


_MAKERS: dict[str, Callable[[Setting, Any], Term]] = {
    "itc": _itc,
    "ranking": _ranking,
    "ctl": _ctl,
    "cls_mse": _cls_mse,
    "layers_mse": _layers_mse,
    "logits_kl": _logits_kl,
    "itc_queue": _itc_queue,
    "itm": _itm,
    "cmli": _cmli,
    "target_cmli": _target_cmli,
    "reduced": _reduced,
    "codes": _codes,
    "codes_vq": _codes_vq,
    "dino": _dino,
    "mvlm": _mvlm,
    "branches": _branches,
}
