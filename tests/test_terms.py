"""The terms of the loss around the pure functions: what they read, learn, log, remember, and draw."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tiny_cache import NUM_TOKENS, POSITIONS, VOCABULARY, WIDTH, tiny_network

from emkum.errors import UsageError
from emkum.models.targets import named_rule
from emkum.stage2_train.loader import Batch
from emkum.stage2_train.losses import Losses, see, step_losses
from emkum.stage2_train.objectives.codes import codes_ce, nearest_codes
from emkum.stage2_train.objectives.ctl import FifoBank, ctl
from emkum.stage2_train.objectives.itc import itc, unit
from emkum.stage2_train.objectives.masking import vocabulary
from emkum.stage2_train.optimiser import parameter_groups
from emkum.stage2_train.recipe import Recipe, load_recipe
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.student import Student, build_student
from emkum.stage2_train.terms.build import Setting, make_terms
from emkum.stage2_train.terms.codes import Codes, CodesVq, Dino, Reduced
from emkum.stage2_train.terms.contrast import Ctl
from emkum.stage2_train.terms.masked import BranchesTerm, Hidden, Mvlm
from emkum.stage2_train.terms.match import Cmli, ItcQueue, Itm, TargetCmli
from emkum.stage2_train.terms.term import Term, Terms

BATCH, CODES, PATCHES = 6, 5, NUM_TOKENS - 1
NAMES = FieldNames("image/tinyvit@0/tokens", "tinyvit", 0, "text/tinybert/ids", {"cls": "teacher/tinyvit/image/cls"})


def built(recipe: Recipe) -> Student:
    of_pairs = {"width": WIDTH, "mlp_width": 32} if recipe.objectives.branches else {}
    image, text = tiny_network("tinyvit", "image"), tiny_network("tinybert", "text", seed=1, **of_pairs)
    return build_student(recipe, NAMES, image, text, WIDTH, seed=0)


def a_batch(seed: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    lengths = torch.tensor([POSITIONS, 3, 5, 4, 6, 3])
    return Batch(
        torch.tensor([3, 8, 8, 5, 1, 2]),
        torch.zeros(BATCH, dtype=torch.int64),
        randn(BATCH, NUM_TOKENS, WIDTH),
        torch.randint(5, VOCABULARY, (BATCH, POSITIONS), generator=generator),
        torch.arange(POSITIONS) < lengths[:, None],
        {
            "cls": randn(BATCH, WIDTH),
            "patches": randn(BATCH, PATCHES, WIDTH),
            "layers": randn(BATCH, NUM_TOKENS, WIDTH),
            "text_layers": randn(BATCH, POSITIONS, WIDTH),
            "pair_layers": randn(BATCH, POSITIONS, WIDTH),
        },
    )


def terms_of(recipe: Recipe, student: Student) -> Terms:
    """The recipe's terms, those that take something from a cache made by hand."""
    wanted, width = recipe.objectives, student.spec.contrast_widths[-1]
    by_hand: dict[str, Term] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codebook = torch.randn(CODES, WIDTH)
        if wanted.cmli:
            by_hand["cmli"] = Cmli(wanted.cmli, POSITIONS)
        if wanted.target_cmli:
            by_hand["target_cmli"] = TargetCmli(wanted.target_cmli, WIDTH, WIDTH)
        if wanted.codes:
            by_hand["codes"] = Codes(wanted.codes, width, codebook)
        if wanted.codes_vq:
            by_hand["codes_vq"] = CodesVq(wanted.codes_vq, width, WIDTH)
        if wanted.dino:
            by_hand["dino"] = Dino(wanted.dino, WIDTH)
        if wanted.reduced:
            by_hand["reduced"] = Reduced(wanted.reduced, WIDTH, None)
        if wanted.branches:
            by_hand["branches"] = BranchesTerm(wanted.branches, named_rule("thesis", "text"))
        if wanted.mvlm:
            words = vocabulary(VOCABULARY, range(4), 4, "cpu") if wanted.mvlm.word_share else None
            hidden = Hidden(codebook, torch.randn(NUM_TOKENS, WIDTH)) if wanted.mvlm.patch_share else None
            by_hand["mvlm"] = Mvlm(wanted.mvlm, student, words, hidden)
    plain = [name for name in recipe.terms if name not in by_hand]
    found = {term.name: term for term in make_terms(Setting(_only(recipe, plain), student))} if plain else {}
    return Terms([{**found, **by_hand}[name] for name in recipe.terms])


def _only(recipe: Recipe, terms: list[str]) -> Recipe:
    named = {f.name: None for f in dataclasses.fields(recipe.objectives) if f.name not in terms}
    return dataclasses.replace(recipe, objectives=dataclasses.replace(recipe.objectives, **named))


SMALL = ["student.image_blocks=1", "student.text_blocks=1"]
CASES: dict[str, list[str]] = {
    "queue": ["objectives.itc-queue.rows=16"],
    "momentum-queue": ["objectives.itc-queue.rows=16", "objectives.itc-queue.proximal=0.5"],
    "itm-random": ["objectives.ctl=none", "objectives.itm.fusion=product"],
    "itm-hard": ["objectives.ctl=none"],
    "cmli": [],
    "cmli-empty": [],
    "filip": ["objectives.cmli.chunk=2"],
    "reduced": ["objectives.reduced.width=4"],
    "codes-kmeans": [],
    "codes-vq": ["objectives.codes-vq.groups=4", "objectives.codes-vq.codes=6"],
    "dino": ["objectives.dino.prototypes=9"],
    "mvlm": ["objectives.mvlm.patch_share=0.4"],
    "distil-beit3": ["student.text_blocks=2"],
    "heads": ["objectives.ctl=none", "objectives.cls-mse.weight=1"],
}


def one_step(name: str, chunk: int = 0, seed: int = 0, *more: str) -> tuple[Student, Terms, Losses]:
    recipe = load_recipe(name, [*SMALL, *CASES[name], *more])
    student = built(recipe)
    terms = terms_of(recipe, student)
    return student, terms, step_losses(student, terms, recipe, a_batch(), chunk, seed)


@pytest.mark.parametrize("name", CASES)
def test_every_trainable_parameter_gets_a_gradient_and_what_is_logged_was_announced(name: str) -> None:
    student, terms, found = one_step(name)
    assert ["loss", *found.parts] == terms.columns
    assert len(set(terms.columns)) == len(terms.columns)
    assert all(part.isfinite() and part.ndim == 0 for part in found.parts.values())
    found.total.backward()
    for parameter_name, parameter in [*student.named_parameters(), *terms.named_parameters()]:
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
    stepped = {id(p) for group in parameter_groups(student, terms, load_recipe(name)) for p in group["params"]}
    assert stepped == {id(p) for p in [*student.parameters(), *terms.parameters()] if p.requires_grad}


@pytest.mark.parametrize("name", CASES)
def test_the_total_is_the_sum_of_the_terms_by_their_weights(name: str) -> None:
    _, terms, found = one_step(name)
    term = terms.columns[1] if name in ("queue", "momentum-queue") else next(t for t in reversed(list(terms))).name
    doubled = one_step(name, 0, 0, f"objectives.{term.replace('_', '-')}.weight=2")[2]
    assert doubled.total.item() == pytest.approx(found.total.item() + found.parts[term].item(), rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_chunks_of_a_batch_have_its_losses_and_gradients(name: str) -> None:
    found = []
    for chunk in (0, 4):
        student, terms, losses = one_step(name, chunk)
        losses.total.backward()
        gradients = {n: p.grad for n, p in [*student.named_parameters(), *terms.named_parameters()] if p.requires_grad}
        found.append((losses.total.item(), gradients))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for parameter, gradient in found[0][1].items():
        assert (gradient - found[1][1][parameter]).norm() <= 1e-4 * gradient.norm() + 1e-7, parameter


@pytest.mark.parametrize("name", ["itm-random", "itm-hard", "mvlm"])
def test_random_choices_follow_from_the_seed_and_the_number_of_the_batch(name: str) -> None:
    student, terms, first = one_step(name)
    assert first.total.item() == one_step(name)[2].total.item()
    others = {one_step(name, 0, seed)[2].total.item() for seed in range(1, 6)}
    assert len(others | {first.total.item()}) > 2
    recipe = load_recipe(name, [*SMALL, *CASES[name]])
    kept = copy.deepcopy(terms.state_dict())
    second = step_losses(student, terms, recipe, a_batch(), 0, 0)
    terms.load_state_dict(kept)
    assert step_losses(student, terms, recipe, a_batch(), 0, 0).total.item() == second.total.item()
    assert second.total.item() != first.total.item()


def test_a_queue_remembers_and_the_average_follows() -> None:
    student, terms, first = one_step("momentum-queue")
    term = cast(ItcQueue, terms["itc_queue"])
    assert term.queue.images.pushed == BATCH
    assert term.average is not None
    recipe = load_recipe("momentum-queue", [*SMALL, *CASES["momentum-queue"]])
    assert first.parts["itc_queue_proximal"].item() == pytest.approx(0.0, abs=1e-6)  # they are equal at the start
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    before = [p.clone() for p in term.average.parameters()]
    terms.after_step(student)
    for old, now, new in zip(before, term.average.parameters(), student.parameters(), strict=True):
        assert torch.allclose(now, 0.995 * old + 0.005 * new, atol=1e-6)
    second = step_losses(student, terms, recipe, a_batch(4))
    assert second.parts["itc_queue_proximal"].item() > 0.001
    again = terms_of(recipe, built(recipe))
    again.load_state_dict(terms.state_dict())
    assert cast(ItcQueue, again["itc_queue"]).queue.images.pushed == 2 * BATCH


def test_without_earlier_batches_a_queue_is_itc() -> None:
    student, _, found = one_step("queue")
    batch = a_batch()
    seen = see(student, frozenset(), batch, torch.Generator())
    images, texts = (side.of("itc_queue") for side in seen.pair)
    expected = itc(images, texts, torch.tensor(2.659260036932778), seen.rows_B)
    assert found.parts["itc_queue"].item() == pytest.approx(expected.loss.item(), rel=1e-5)


def test_codes_are_those_nearest_to_the_teachers_cls() -> None:
    student, terms, found = one_step("codes-kmeans")
    term = cast(Codes, terms["codes"])
    seen = see(student, frozenset(), a_batch(), torch.Generator())
    codes = nearest_codes(a_batch().targets["cls"], term.codebook_JD)
    images, texts = (term.head(side.of("codes")) for side in seen.pair)
    assert found.parts["codes"].item() == pytest.approx(codes_ce(images, texts, codes).loss.item(), rel=1e-5)
    assert "codebook_JD" not in "".join(terms.state_dict())  # it is the cache's


def test_separate_heads_are_read_by_their_own_terms() -> None:
    student, _, found = one_step("heads")
    batch = a_batch()
    with torch.no_grad():
        cast(Any, student.heads)["cls_mse"].weight.zero_()
        cast(Any, student.heads)["cls_mse"].bias.zero_()
    recipe = load_recipe("heads", [*SMALL, *CASES["heads"]])
    zeroed = step_losses(student, terms_of(recipe, student), recipe, batch)
    assert zeroed.parts["itc"].item() == found.parts["itc"].item()
    assert zeroed.parts["cls_mse"].item() == pytest.approx(batch.targets["cls"].square().mean().item(), rel=1e-5)


def test_always_no_is_logged_beside_the_accuracy_of_matching() -> None:
    found = one_step("itm-random")[2].parts
    assert found["itm_always_no"].item() == pytest.approx(2 / 3)
    assert 0 <= found["itm_accuracy"].item() <= 1


def test_matching_a_single_pair_has_no_negatives() -> None:
    recipe = load_recipe("itm-random", [*SMALL, *CASES["itm-random"]])
    student = built(recipe)
    whole = a_batch()
    assert whole.image_rows_B is not None and whole.tokens_BTD is not None  # noqa: PT018
    one = Batch(
        whole.image_rows_B[:1],
        torch.zeros(1, dtype=torch.int64),
        whole.tokens_BTD[:1],
        *(tensor[:1] for tensor in (whole.ids_BL, whole.mask_BL) if tensor is not None),
        {role: target[:1] for role, target in whole.targets.items()},
    )
    found = step_losses(student, terms_of(recipe, student), recipe, one)
    assert found.parts["itm_always_no"].item() == 0
    assert isinstance(terms_of(recipe, student)["itm"], Itm)
    assert found.total.isfinite()


def test_masking_nothing_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe("mvlm", [*SMALL, "objectives.mvlm.word_share=0"])
    with pytest.raises(UsageError, match="nothing is masked"):
        make_terms(Setting(recipe, built(recipe)))


def test_near_duplicates_are_no_negatives_of_each_other() -> None:
    """Rows 3 and 5 show nearly the same: with their groups known, neither is a candidate for the other."""
    recipe = load_recipe("no-itc", SMALL)
    student, batch = built(recipe), a_batch()
    groups = torch.arange(9)
    groups[5] = 3
    assert recipe.objectives.ctl is not None
    losses = {}
    for name, known in (("unknown", None), ("known", groups)):
        terms = Terms([Ctl(recipe.objectives.ctl, FifoBank(4, WIDTH), known)])
        losses[name] = step_losses(student, terms, recipe, batch).parts
        again = step_losses(student, terms, recipe, batch)  # with the bank filled
        assert again.total.isfinite()
        assert not any("groups" in key for key in terms.state_dict())
    seen = see(student, frozenset(), batch, torch.Generator())
    images, texts = (side.said("ctl") for side in seen.pair)
    targets, rows = unit(batch.targets["cls"]), seen.rows_B
    expected = ctl(images, texts, targets, groups[rows], torch.arange(BATCH), groups[rows], torch.tensor(2.659260037))
    assert losses["known"]["ctl"].item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert losses["known"]["ctl"].item() < losses["unknown"]["ctl"].item()
