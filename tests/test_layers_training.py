"""layers-mse by the rule of its targets: what the student's side is, and that cached training equals live training."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_live import exact_config, tokenizer, write_tar
from test_models_targets import rule_reference
from tiny_cache import NUM_TOKENS, VOCABULARY, WIDTH, tiny_network

from emkum.errors import UsageError
from emkum.models.network import save_network
from emkum.models.targets import RULES, LayersRule, named_rule
from emkum.shards.reader import Cache
from emkum.stage1_extract.extract import extract
from emkum.stage2_train.loader import Batch
from emkum.stage2_train.losses import step_losses, students_rule
from emkum.stage2_train.recipe import load_recipe
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.student import Student, build_student
from emkum.stage2_train.terms.build import Setting, make_terms
from emkum.stage2_train.train import TrainConfig, train

OTHERS = {
    "all-but-one": "site=ffn,skip=1,norm=layer,final=no",
    "many": "last=3,norm=none",
    "one": "skip=2,last=1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar, and a cache with a picture and a text teacher's layers by every rule, each under a name of its own."""
    folder = tmp_path_factory.mktemp("rules")
    write_tar(folder / "a.tar", 16)
    save_network(tiny_network("tinyvit", "image", prenet=1), folder / "tinyvit")
    save_network(replace(tiny_network("other", "image", seed=7), source=str(folder / "other")), folder / "other")
    text = replace(tiny_network("tinybert", "text", seed=1), tokenizer=tokenizer(), source=str(folder / "tinybert"))
    save_network(text, folder / "tinybert")
    config = exact_config(
        folder,
        cache=folder / "cache",
        encoder=str(folder / "tinyvit"),
        text_encoder=str(folder / "tinybert"),
        cut="prenet",
        targets=("layers",),
    )
    for name, rule in {**{rule: rule for rule in RULES}, **OTHERS}.items():
        for teacher in ("other", "tinybert"):
            made = replace(config, teacher=(str(folder / teacher),), name=f"{teacher}-{name}", layers=rule)
            extract(made, say=lambda line: None)
    return folder


def run(folder: Path, recipe: str, *overrides: str, live: bool = False, steps: int = 6) -> tuple[np.ndarray, list[str]]:
    """The losses of a few steps, and what was said."""
    said: list[str] = []
    name = "-".join((recipe, *overrides, str(live), str(steps))).replace("/", "_")
    if recipe == "text-kd":
        overrides = ("data.ids=text/tinybert/ids", *overrides)
    small = ("training.batch=8", "optimiser.lr=0.03", "optimiser.encoder_lr=0.003", *overrides)
    config = TrainConfig(folder / "cache", recipe, small, folder / "runs" / name, precision="float32", device="cpu")
    train(replace(config, live=live, max_steps=steps, log_every=1), say=said.append)
    with (folder / "runs" / name / "metrics.csv").open() as file:
        return np.array([float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]), said


@pytest.mark.parametrize("rule", [*RULES, *OTHERS])
@pytest.mark.parametrize(("recipe", "teacher"), [("image-kd", "other"), ("text-kd", "tinybert")])
def test_by_every_rule_the_losses_are_those_of_live_training(
    folder: Path, recipe: str, teacher: str, rule: str
) -> None:
    space = "image" if recipe == "image-kd" else "text"
    overrides = (f"data.targets=teacher/{teacher}-{rule}/{space}/layers", f"student.{space}_blocks=3")
    cached, _ = run(folder, recipe, *overrides)
    live, _ = run(folder, recipe, *overrides, live=True)
    assert len(cached) == 6
    assert np.abs(cached / live - 1).max() < 1e-5
    assert not np.array_equal(cached, cached[:1].repeat(6))


def test_rules_give_losses_of_their_own(folder: Path) -> None:
    first = [
        run(folder, "image-kd", f"data.targets=teacher/other-{rule}/image/layers", "student.image_blocks=3", steps=2)[
            0
        ][0]
        for rule in (*RULES, *OTHERS)
    ]
    assert len({round(float(loss), 4) for loss in first}) == len(first)


# --- the student's side --------------------------------------------------------------------------------------

STUDENT_RULES = [
    named_rule("thesis", "image"),
    named_rule("data2vec", "image"),
    named_rule("data2vec2", "image", prenet=3),
    LayersRule("ffn", 1, 0, "layer", False, "keep"),
    LayersRule("block", None, 3, "none", True, "keep"),
]


def students(kind: str, *overrides: str) -> Student:
    recipe = load_recipe(f"{kind}-kd", overrides)
    image, text = tiny_network("tinyvit", "image"), tiny_network("tinybert", "text", seed=1)
    names = FieldNames(encoder="tinyvit", cut=2) if kind == "image" else FieldNames(ids="text/tinybert/ids")
    networks = (image, None) if kind == "image" else (None, text)
    return build_student(recipe, names, *networks, None, seed=0)


@pytest.mark.parametrize("rule", STUDENT_RULES, ids=lambda rule: rule.words)
def test_the_students_pictures_follow_the_rule_of_the_targets(rule: LayersRule) -> None:
    """The student is the encoder's blocks 2 and 3: of a rule that skips 3, it skips 1."""
    student = students("image", "student.image_blocks=all")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, NUM_TOKENS, WIDTH, generator=generator)
    out = student.image_blocks.run(tokens)  # type: ignore[union-attr]
    own = replace(rule, skip=max(0, rule.skip - 2))
    layers = [[layer.double().detach().numpy() for layer in found] for found in (out.hidden, out.ffn)]
    predicted = rule_reference(own, *layers, [NUM_TOKENS] * 3, 1)
    target = torch.randn(predicted.shape, generator=generator)
    recipe = load_recipe("image-kd")
    given = None if rule == named_rule("thesis", "image") else rule
    batch = Batch(None, None, tokens, None, None, {"layers": target}, {} if given is None else {"layers": given})
    terms = make_terms(Setting(recipe, student))
    for losses in (step_losses(student, terms, recipe, batch), step_losses(student, terms, recipe, batch, 2)):
        assert float(losses.total.detach()) == pytest.approx(np.square(predicted - target.numpy()).mean(), rel=1e-5)
    losses.total.backward()
    trained = [block.fc2.weight.grad is not None for block in student.image_blocks.blocks]  # type: ignore[union-attr]
    assert trained[-1]


@pytest.mark.parametrize("name", RULES)
def test_the_students_texts_follow_the_rule_and_pads_take_no_part(name: str) -> None:
    student, rule = students("text", "student.text_blocks=all"), named_rule(name, "text")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (3, 8), generator=generator)
    lengths = [8, 3, 5]
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    out = student.text_blocks.run(student.text_embedding(ids, mask), mask_BT=mask)  # type: ignore[union-attr, misc]
    layers = [[layer.double().detach().numpy() for layer in found] for found in (out.hidden, out.ffn)]
    predicted = rule_reference(rule, *layers, lengths, 1)
    target = torch.randn(predicted.shape, generator=generator).masked_fill(~mask[..., None], float("nan"))
    rules = {} if name == "thesis" else {"text_layers": rule}
    batch = Batch(None, None, None, ids, mask, {"text_layers": target}, rules)
    want = np.square(predicted - target.numpy())[mask.numpy()].mean()
    recipe = load_recipe("text-kd")
    found = step_losses(student, make_terms(Setting(recipe, student)), recipe, batch)
    assert float(found.total.detach()) == pytest.approx(want, rel=1e-5)


def test_feed_forward_outputs_are_kept_only_where_they_are_asked_for() -> None:
    student, tokens = students("image", "student.image_blocks=all"), torch.randn(2, NUM_TOKENS, WIDTH)
    assert student.encode_images(tokens).ffn == []
    out = student.encode_images(tokens, keep_ffn=True)
    assert len(out.ffn) == len(out.hidden) == student.depth


def test_without_a_rule_in_the_record_it_is_the_thesiss_and_the_cut_is_taken_off_what_is_skipped() -> None:
    image, text = students("image", "student.image_blocks=all"), students("text")
    assert students_rule(image, "layers", None) == named_rule("thesis", "image")
    assert students_rule(text, "text_layers", None) == named_rule("thesis", "text")
    assert [students_rule(image, "layers", LayersRule(skip=skip)).skip for skip in (1, 2, 3)] == [0, 0, 1]
    assert students_rule(text, "text_layers", LayersRule(skip=3)).skip == 3


# --- what is said --------------------------------------------------------------------------------------------


def test_the_summary_says_the_rule_and_that_a_student_has_fewer_blocks(folder: Path) -> None:
    _, said = run(folder, "image-kd", "data.targets=teacher/other-many/image/layers", steps=1)
    words = "layers-mse: both sides are the mean over the last 3 blocks of outputs, layer norm"
    assert f"{words}; the student has 1 blocks, and all that are counted take part" in said
    _, said = run(folder, "text-kd", "data.targets=teacher/tinybert-thesis/text/layers", steps=1)
    assert "layers-mse: both sides are the mean over all blocks of instance-normalised outputs" in said


def test_a_rule_that_counts_none_of_the_students_blocks_is_refused(folder: Path) -> None:
    """Two blocks are skipped, of which one lies in front of the cut; the student has one."""
    with pytest.raises(UsageError) as caught:
        run(folder, "image-kd", "data.targets=teacher/other-one/image/layers", "student.image_blocks=1")
    assert "the student has 1 blocks, and none is counted" in caught.value.what
    assert "train more of them" in caught.value.way_out


def test_targets_of_other_tokens_are_refused(folder: Path) -> None:
    cache = Cache.open(folder / "cache")
    assert cache.field("teacher/other-data2vec2/image/layers").row_shape == (NUM_TOKENS - 1, WIDTH)
    assert cache.field("teacher/other-thesis/image/layers").row_shape == (NUM_TOKENS, WIDTH)
