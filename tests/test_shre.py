"""SHRe: class distributions and ranking, a shared MLP whose every layer meets in contrast, runs of the recipes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from short_runs import exact, logged, run, signal_at
from tiny_cache import (
    CLASSES,
    NUM_TOKENS,
    POSITIONS,
    TEXT_WIDTH,
    TOP,
    VOCABULARY,
    WIDTH,
    TinyCache,
    make_cache,
    tiny_network,
)
from torch import Tensor

from emkum.errors import Interrupted, UsageError
from emkum.models.targets import top_logits, unpacked
from emkum.shards.reader import Cache
from emkum.stage2_train.evaluate.run import evaluate_cache
from emkum.stage2_train.loader import Batch, Buffers, CachedSource
from emkum.stage2_train.losses import Losses, step_losses
from emkum.stage2_train.objectives.itc import itc
from emkum.stage2_train.objectives.logits_kl import class_kl, logits_kl
from emkum.stage2_train.objectives.ranking import ranking
from emkum.stage2_train.order import TrainOrder
from emkum.stage2_train.recipe import Recipe, load_recipe
from emkum.stage2_train.recipe_fields import FieldNames, required_fields
from emkum.stage2_train.run_folder import RunFolder, load_run, read_checkpoint
from emkum.stage2_train.samples import sample_table
from emkum.stage2_train.shared_mlp import AttentionMlp, SharedMlp, SharedMlpSpec
from emkum.stage2_train.student import Student, StudentOut, StudentSpec, build_student, parameter_table
from emkum.stage2_train.terms.build import Setting, make_terms
from emkum.stage2_train.terms.term import Terms
from emkum.stage2_train.train import TrainConfig

RECIPES = ("shre", "shre-transformer")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- logits-kl ---------------------------------------------------------------------------------------------------


def plain_softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum())


def plain_kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """Mean over rows of T^2 sum_c p log(p / q)."""
    total = 0.0
    for q_logits, p_logits in zip(student, teacher, strict=True):
        p, q = plain_softmax(p_logits / temperature), plain_softmax(q_logits / temperature)
        total += sum(p[c] * (math.log(p[c]) - math.log(q[c])) for c in range(len(p)))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 0.5])
def test_logits_kl_is_half_the_divergence_of_each_side_times_the_squared_temperature(temperature: float) -> None:
    images, texts, teacher = random(5, 6), random(5, 6, seed=1), 3 * random(5, 6, seed=2)
    found = logits_kl(images, texts, teacher, temperature)
    plain_image = plain_kl(images.numpy(), teacher.numpy(), temperature)
    plain_text = plain_kl(texts.numpy(), teacher.numpy(), temperature)
    assert found.image_loss.item() == pytest.approx(plain_image, rel=1e-12)
    assert found.text_loss.item() == pytest.approx(plain_text, rel=1e-12)
    assert found.loss.item() == pytest.approx((plain_image + plain_text) / 2, rel=1e-12)
    assert class_kl(images, teacher, temperature).item() == pytest.approx(plain_image, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logits_kl_gradients_are_those_of_finite_differences(temperature: float) -> None:
    teacher = random(3, 4, seed=2)
    inputs = random(3, 4).requires_grad_(), random(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, t: logits_kl(i, t, teacher, temperature).loss, inputs)


def test_a_student_that_says_what_the_teacher_says_costs_nothing_whatever_is_added_to_all_its_logits() -> None:
    teacher = random(4, 5)
    student = (teacher + 3.5).requires_grad_()
    found = logits_kl(student, teacher, teacher)
    found.loss.backward()
    assert abs(found.loss.item()) < 1e-15
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-15


def test_a_batch_of_one_and_a_teacher_that_is_certain_are_finite() -> None:
    student = torch.zeros(1, 3, requires_grad=True)
    found = class_kl(student, torch.tensor([[60000.0, -60000.0, 0.0]]))
    found.backward()
    assert found.item() == pytest.approx(math.log(3))
    assert student.grad is not None
    assert torch.allclose(student.grad, torch.tensor([[-2 / 3, 1 / 3, 1 / 3]]))


def test_logits_kl_does_not_broadcast() -> None:
    with pytest.raises(AssertionError):
        class_kl(random(4, 3), random(4, 1))
    with pytest.raises(AssertionError):
        class_kl(random(4, 3), random(1, 3))


def test_logits_kl_is_in_float32_under_autocast() -> None:
    student, teacher = (10 * random(8, 16)).bfloat16(), 10 * random(8, 16, seed=1).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = class_kl(student, teacher)
    assert found.dtype == torch.float32
    assert found.item() == class_kl(student.float(), teacher.float()).item()


@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_largest_logits_and_the_rest_are_outcomes_of_their_own(count: int) -> None:
    images, texts, teacher = random(4, 6), random(4, 6, seed=1), 2 * random(4, 6, seed=2)
    found = logits_kl(images, texts, top_logits(teacher, count))

    def grouped(logits: np.ndarray, kept: np.ndarray) -> np.ndarray:
        p = plain_softmax(logits)
        return np.log(np.append(p[kept], np.delete(p, kept).sum()))

    order = np.argsort(-teacher.numpy(), axis=1)[:, :count]
    halves = []
    for student in (images.numpy(), texts.numpy()):
        ours = np.stack([grouped(s, kept) for s, kept in zip(student, order, strict=True)])
        theirs = np.stack([grouped(t, kept) for t, kept in zip(teacher.numpy(), order, strict=True)])
        halves.append(plain_kl(ours, theirs, 1.0))
    assert found.image_loss.item() == pytest.approx(halves[0], rel=1e-10)
    assert found.text_loss.item() == pytest.approx(halves[1], rel=1e-10)


def test_every_logit_kept_is_the_whole_distribution_and_fewer_never_cost_more() -> None:
    student, teacher = random(5, 6), random(5, 6, seed=2)
    whole = class_kl(student, teacher).item()
    costs = [class_kl(student, top_logits(teacher, count)).item() for count in (1, 2, 5)]
    assert costs == sorted(costs)
    assert costs[-1] <= whole + 1e-12
    assert class_kl(student, top_logits(teacher, 6)).item() == pytest.approx(whole, rel=1e-12)


def test_gradients_of_the_largest_logits_are_those_of_finite_differences() -> None:
    teacher = top_logits(random(3, 5, seed=2), 2)
    assert torch.autograd.gradcheck(lambda student: class_kl(student, teacher), (random(3, 5).requires_grad_(),))


def test_the_largest_logits_have_one_temperature() -> None:
    with pytest.raises(AssertionError, match="no other temperature"):
        class_kl(random(3, 5), top_logits(random(3, 5), 2), 2.0)


# --- ranking -----------------------------------------------------------------------------------------------------


def plain_hinge(queries: Tensor, candidates: Tensor, rows: list[int], margin: float) -> float:
    q = queries.numpy() / np.linalg.norm(queries.numpy(), axis=1, keepdims=True)
    c = candidates.numpy() / np.linalg.norm(candidates.numpy(), axis=1, keepdims=True)
    total = 0.0
    for i in range(len(q)):
        for j in range(len(c)):
            if rows[i] != rows[j]:
                total += max(0.0, margin - q[i] @ c[i] + q[i] @ c[j])
    return total / len(q)


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [7, 7, 2, 3, 7]])
def test_ranking_equals_the_plain_sum_and_other_captions_of_a_picture_are_no_negatives(
    rows: list[int], margin: float
) -> None:
    images, texts = random(5, 3), random(5, 3, seed=1)
    found = ranking(images, texts, margin, torch.tensor(rows))
    image_loss, text_loss = plain_hinge(images, texts, rows, margin), plain_hinge(texts, images, rows, margin)
    assert found.image_loss.item() == pytest.approx(image_loss, rel=1e-12)
    assert found.text_loss.item() == pytest.approx(text_loss, rel=1e-12)
    assert found.loss.item() == pytest.approx(image_loss + text_loss, rel=1e-12)


def test_ranking_gradients_are_those_of_finite_differences() -> None:
    rows = torch.tensor([0, 1, 1, 2])
    inputs = random(4, 3).requires_grad_(), random(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, t: ranking(i, t, 0.3, rows).loss, inputs)


@pytest.mark.parametrize("rows", [[5], [4, 4, 4]])
def test_without_another_picture_ranking_is_zero_with_zero_gradient(rows: list[int]) -> None:
    images = random(len(rows), 3).requires_grad_()
    found = ranking(images, random(len(rows), 3, seed=1), 0.1, torch.tensor(rows))
    found.loss.backward()
    assert found.loss.item() == 0
    assert not images.grad.any()  # type: ignore[union-attr]


def test_ranking_of_features_of_length_zero_is_finite() -> None:
    images = torch.zeros(3, 4, requires_grad=True)
    ranking(images, random(3, 4).float(), 0.1, torch.arange(3)).loss.backward()
    assert torch.isfinite(images.grad).all()  # type: ignore[arg-type]


def test_ranking_counts_each_direction_apart_and_is_over_when_the_margin_is_kept() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.9, 0.1]])  # both captions lie next to picture 0
    found = ranking(images, texts, 0.1, torch.arange(2))
    assert (found.image_accuracy.item(), found.text_accuracy.item()) == (1.0, 0.5)
    assert ranking(images, images, 0.9, torch.arange(2)).loss.item() == 0
    assert ranking(images, images, 1.2, torch.arange(2)).loss.item() == pytest.approx(0.4)


def test_ranking_is_in_float32_under_autocast() -> None:
    images, texts = random(8, 16).bfloat16(), random(8, 16, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ranking(images, texts, 0.1, torch.arange(8))
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == ranking(images.float(), texts.float(), 0.1, torch.arange(8)).loss.item()


# --- the student -------------------------------------------------------------------------------------------------


def built(recipe: Recipe, cut: int = 2, target_width: int | None = CLASSES, **changes: Any) -> Student:
    image = tiny_network("tinyvit", "image", **changes)
    text = tiny_network("tinybert", "text", seed=1) if recipe.kind == "pairs" else None
    names = FieldNames(
        f"image/tinyvit@{cut}/tokens", "tinyvit", cut, "text/tinybert/ids", {"logits": "teacher/r/image/logits"}
    )
    return build_student(recipe, names, image, text, target_width, seed=0)


def tokens(batch: int = 3) -> Tensor:
    return torch.randn(batch, NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))


def texts(batch: int = 3, length: int = 7) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(4))
    mask = torch.arange(length) < torch.tensor([length, 3, 5, 6])[:batch, None]
    return torch.where(mask, ids, 0), mask


def norm(vectors: np.ndarray) -> np.ndarray:
    mean, variance = vectors.mean(-1, keepdims=True), vectors.var(-1, keepdims=True)
    return np.asarray((vectors - mean) / np.sqrt(variance + 1e-6))


def gelu(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))))


def affine(linear: torch.nn.Linear, x: np.ndarray) -> np.ndarray:
    return np.asarray(x @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy())


def plain_mlp(mlp: SharedMlp, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first = affine(mlp.fc1, x)
    return first, affine(mlp.fc2, norm(gelu(first)))


def assert_layers(out: StudentOut, expected: list[np.ndarray]) -> None:
    assert [layer.shape for layer in out.layers] == [layer.shape for layer in expected]
    for found, plain in zip(out.layers, expected, strict=True):
        np.testing.assert_allclose(found.detach().numpy(), plain, rtol=1e-4, atol=1e-5)
        assert found.dtype == torch.float32


def test_the_shared_mlp_is_linear_gelu_norm_linear_norm_linear_on_the_cls() -> None:
    """Its norms have no weight yet, so the reference need not know them."""
    student = built(load_recipe("shre"))
    assert student.image_blocks is None  # cut 2 of 4: the encoder's half is behind the cut
    assert isinstance(student.shared_mlp, SharedMlp)
    assert student.shared_blocks is None
    x = tokens()
    first, second = plain_mlp(student.shared_mlp, x[:, 0].double().numpy())
    third = affine(student.head, norm(second))  # type: ignore[arg-type]
    out = student.encode_images(x)
    assert_layers(out, [first, second, third])
    assert [layer.shape[1] for layer in out.layers] == [4 * WIDTH, WIDTH, CLASSES]
    assert student.spec.contrast_widths == (4 * WIDTH, WIDTH, CLASSES)
    assert out.features_BD is out.layers[-1]
    assert out.predicted_BD is out.layers[-1]


def test_both_modalities_go_through_the_same_layers() -> None:
    student = built(load_recipe("shre"))
    assert isinstance(student.shared_mlp, SharedMlp)
    ids, mask = texts()
    hidden = student.text_blocks(student.text_embedding(ids, mask), mask)[-1]  # type: ignore[misc]
    projected = student.text_projection(hidden)[:, 0]  # type: ignore[misc]
    first, second = plain_mlp(student.shared_mlp, projected.detach().double().numpy())
    third = affine(student.head, norm(second))  # type: ignore[arg-type]
    assert_layers(student.encode_texts(ids, mask), [first, second, third])


def test_attention_in_front_makes_it_a_block_whose_second_layer_is_what_retrieval_reads() -> None:
    student = built(load_recipe("shre-transformer", ["student.shared_heads=2"]), cut=1)
    shared = student.shared_mlp
    assert isinstance(shared, AttentionMlp)
    x = student.image_blocks(tokens())[-1]  # type: ignore[misc]
    attended = shared.attention.attend(shared.attention.norm1(x), None, None)  # tested with the other blocks
    residual = (x + attended)[:, 0].detach().double().numpy()
    first, second = plain_mlp(shared.mlp, norm(residual))
    out = student.encode_images(tokens())
    assert_layers(out, [first, second])
    assert student.spec.contrast_widths == (4 * WIDTH, WIDTH)
    assert out.features_BD is out.layers[-1]
    predicted = affine(student.head, norm(residual + second))  # type: ignore[arg-type]
    np.testing.assert_allclose(out.predicted_BD.detach().numpy(), predicted, rtol=1e-4, atol=1e-5)
    assert out.predicted_BD.shape == (3, CLASSES)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_changes_no_layer(name: str, pooling: str) -> None:
    student = built(load_recipe(name, [f"student.text_pooling={pooling}"]))
    ids, mask = texts()
    longer = torch.nn.functional.pad(ids, (0, POSITIONS - ids.shape[1]), value=7)
    longer_mask = torch.nn.functional.pad(mask, (0, POSITIONS - ids.shape[1]))
    short, long = student.encode_texts(ids, mask), student.encode_texts(longer, longer_mask)
    for a, b in zip([*short.layers, short.predicted_BD], [*long.layers, long.predicted_BD], strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_mean_pooling_of_pictures_leaves_out_cls_and_registers(name: str) -> None:
    student = built(load_recipe(name, ["student.image_pooling=mean"]), num_registers=1)
    inputs = torch.cat([tokens(), tokens()[:, :1]], 1)
    out = student.encode_images(inputs)
    if isinstance(student.shared_mlp, SharedMlp):
        assert torch.allclose(out.layers[0], student.shared_mlp.fc1(inputs[:, 2:].mean(1)), atol=1e-6)
    else:
        assert isinstance(student.shared_mlp, AttentionMlp)
        assert torch.allclose(out.features_BD, student.shared_mlp(inputs)[1][:, 2:].mean(1), atol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_rebuilt_from_its_spec_and_weights_alone(name: str) -> None:
    student = built(load_recipe(name), cut=1)
    spec = StudentSpec.from_json(json.loads(json.dumps(student.spec.to_json())))
    assert spec == student.spec
    other = Student(spec)
    other.load_state_dict(student.state_dict(), strict=True)
    assert torch.equal(other.encode_images(tokens()).features_BD, student.encode_images(tokens()).features_BD)
    assert torch.equal(other.encode_texts(*texts()).predicted_BD, student.encode_texts(*texts()).predicted_BD)


def test_a_student_written_before_there_was_a_shared_mlp_is_the_same() -> None:
    student = built(load_recipe("itc-only"), target_width=None)
    written = json.loads(json.dumps(student.spec.to_json()))
    del written["shared_mlp"]  # as emkum 0.2 wrote it
    assert set(written) == {"format", "image", "text", "width", "shared", "token_types", "head_width"}
    spec = StudentSpec.from_json(written)
    assert spec == student.spec
    assert not any("mlp" in name for name in student.state_dict())
    other = Student(spec)
    other.load_state_dict(student.state_dict(), strict=True)
    out = other.encode_images(tokens())
    assert torch.equal(out.features_BD, student.encode_images(tokens()).features_BD)
    assert out.predicted_BD is out.features_BD
    assert [layer is out.features_BD for layer in out.layers] == [True]


@pytest.mark.parametrize("name", RECIPES)
def test_the_table_counts_every_parameter_once(name: str) -> None:
    student = built(load_recipe(name))
    table = {count.part: count for count in parameter_table(student)}
    assert sum(c.trainable + c.frozen for c in table.values()) == sum(p.numel() for p in student.parameters())
    mlp = (WIDTH + 1) * 4 * WIDTH + 2 * 4 * WIDTH + (4 * WIDTH + 1) * WIDTH
    attention = 0 if name == "shre" else 4 * WIDTH * (WIDTH + 1) + 2 * 2 * WIDTH
    assert table["shared MLP"].trainable == mlp + attention
    assert table["head"].trainable == (WIDTH + 1) * CLASSES


def test_the_published_shared_part_has_5_5_million_parameters() -> None:
    """768 -> 3072 -> 768 -> 1000 with its norms, as the thesis counts it."""
    spec = StudentSpec(None, None, 768, None, False, 1000, SharedMlpSpec(3072))
    assert sum(p.numel() for p in Student(spec).parameters()) == 5_499_112


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        *((name, []) for name in RECIPES),
        ("shre", ["objectives.logits-kl=none"]),
        ("shre-transformer", ["objectives.logits-kl=none"]),
        ("shre", ["objectives.itc=none", "objectives.ranking.layers=all"]),
        ("shre-transformer", ["objectives.itc.layers=last"]),
    ],
)
def test_every_trainable_parameter_gets_a_gradient(name: str, overrides: list[str]) -> None:
    recipe = load_recipe(name, [*overrides, "student.image_blocks=1"])
    student = built(recipe, target_width=CLASSES if recipe.objectives.logits_kl else None)
    terms = make_terms(Setting(recipe, student))
    step_losses(student, terms, recipe, a_batch()).total.backward()
    for parameter_name, parameter in [*student.named_parameters(), *terms.named_parameters()]:
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name


def test_without_a_target_a_head_behind_the_attention_would_do_nothing_and_is_left_out() -> None:
    student = built(load_recipe("shre-transformer", ["objectives.logits-kl=none"]), target_width=None)
    assert student.head is None
    assert student.norm is None
    assert built(load_recipe("shre", ["objectives.logits-kl=none"]), target_width=None).head is not None


def test_the_shared_layers_start_from_the_seed_with_small_matrices() -> None:
    first, again = (built(load_recipe("shre")).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert first["shared_mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.2)
    assert not first["shared_mlp.fc2.bias"].any()


# --- one step ----------------------------------------------------------------------------------------------------


def a_batch(batch: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(5)
    rows, views = torch.tensor([3, 8, 8, 5])[:batch], torch.zeros(batch, dtype=torch.int64)
    logits = torch.randn(batch, CLASSES, generator=generator)
    return Batch(rows, views, tokens(batch), *texts(batch), {"logits": logits})


def one_step(recipe: Recipe, chunk: int = 0) -> tuple[Student, Terms, Losses]:
    student = built(recipe)
    terms = make_terms(Setting(recipe, student))
    return student, terms, step_losses(student, terms, recipe, a_batch(), chunk)


def test_itc_is_the_mean_over_layers_each_with_a_scale_of_its_own() -> None:
    recipe = load_recipe("shre", ["objectives.logits-kl=none"])
    student, batch = built(recipe), a_batch()
    terms = make_terms(Setting(recipe, student))
    log_scale = terms["itc"].log_scale
    with torch.no_grad():
        log_scale.copy_(torch.tensor([0.5, 1.0, 2.0]))
    found = step_losses(student, terms, recipe, batch)
    images, captions = student.encode_images(tokens(4)).layers, student.encode_texts(*texts(4)).layers
    assert batch.image_rows_B is not None
    plain = [
        itc(i, t, torch.tensor(s), batch.image_rows_B).loss
        for i, t, s in zip(images, captions, (0.5, 1.0, 2.0), strict=True)
    ]
    assert found.total.item() == pytest.approx(sum(p.item() for p in plain) / 3, rel=1e-6)
    for number, layer in enumerate(plain, start=1):
        assert found.parts[f"itc_{number}"].item() == pytest.approx(layer.item(), rel=1e-6)
        assert found.parts[f"itc_{number}_scale"].item() == pytest.approx(math.exp((0.5, 1.0, 2.0)[number - 1]))
    found.total.backward()
    assert log_scale.grad is not None
    assert log_scale.grad.unique().numel() == 3


def test_ranking_is_the_mean_over_layers_too() -> None:
    recipe = load_recipe("shre", ["objectives.itc=none", "objectives.logits-kl=none", "objectives.ranking.layers=all"])
    student, _, found = one_step(recipe)
    images, captions = student.encode_images(tokens(4)).layers, student.encode_texts(*texts(4)).layers
    rows = a_batch().image_rows_B
    assert rows is not None
    plain = [ranking(i, t, 0.1, rows).loss.item() for i, t in zip(images, captions, strict=True)]
    assert found.total.item() == pytest.approx(sum(plain) / 3, rel=1e-6)
    assert found.parts["ranking_2"].item() == pytest.approx(plain[1], rel=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_the_last_layer_alone_is_the_features(name: str) -> None:
    recipe = load_recipe(name, ["objectives.itc.layers=last", "objectives.logits-kl=none"])
    student, _, found = one_step(recipe)
    rows = a_batch().image_rows_B
    assert rows is not None
    images, captions = student.encode_images(tokens(4)).features_BD, student.encode_texts(*texts(4)).features_BD
    expected = itc(images, captions, torch.tensor(math.log(1 / 0.07)), rows).loss
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_the_head_predicts_the_teachers_classes(name: str) -> None:
    recipe = load_recipe(name, ["objectives.itc=none", "objectives.logits-kl.temperature=2", "training.batch=4"])
    student, _, found = one_step(recipe)
    teacher = a_batch().targets["logits"]
    images, captions = student.encode_images(tokens(4)).predicted_BD, student.encode_texts(*texts(4)).predicted_BD
    assert found.total.item() == pytest.approx(logits_kl(images, captions, teacher, 2.0).loss.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("shre", []),
        ("shre-transformer", []),
        ("shre", ["objectives.ranking.layers=all"]),
        ("shre", ["objectives.ranking.weight=2"]),
        ("shre-transformer", ["objectives.itc.layers=last"]),
    ],
)
def test_what_is_logged_is_what_was_announced(name: str, overrides: list[str]) -> None:
    recipe = load_recipe(name, overrides)
    _, terms, found = one_step(recipe)
    assert ["loss", *found.parts] == terms.columns
    assert len(set(terms.columns)) == len(terms.columns)


@pytest.mark.parametrize("name", RECIPES)
def test_chunks_of_a_batch_have_its_losses_and_gradients(name: str) -> None:
    recipe = load_recipe(name, ["objectives.ranking.layers=all"])
    found = []
    for chunk in (0, 3):
        student, terms, losses = one_step(recipe, chunk)
        losses.total.backward()
        gradients = {n: p.grad for n, p in [*student.named_parameters(), *terms.named_parameters()] if p.requires_grad}
        found.append((losses.total.item(), gradients))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for parameter, gradient in found[0][1].items():
        assert (gradient - found[1][1][parameter]).norm() <= 1e-5 * gradient.norm(), parameter


def test_scales_of_all_layers_are_taken_back_to_100() -> None:
    student = built(load_recipe("shre"))
    terms = make_terms(Setting(load_recipe("shre"), student))
    log_scale = terms["itc"].log_scale
    assert log_scale.tolist() == pytest.approx([math.log(1 / 0.07)] * 3)
    with torch.no_grad():
        log_scale.copy_(torch.tensor([9.0, 1.0, 5.0]))
    terms.after_step(student)
    assert log_scale.exp().tolist() == pytest.approx([100.0, math.e, 100.0])


# --- runs --------------------------------------------------------------------------------------------------------

SMALL = ("training.batch=8", "training.epochs=3", "optimiser.lr=0.05", "optimiser.encoder_lr=0.01")
IMAGES_ALONE = ("objectives.layers-mse=none", "objectives.logits-kl.weight=1", "student.image_blocks=2")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    fields = ("tokens", "ids", "logits")
    return make_cache(tmp_path_factory.mktemp("shre") / "cache", pictures=40, views=2, cut=1, fields=fields)


def configured(cache: TinyCache, run_dir: Path, recipe: str, *overrides: str, **changes: Any) -> TrainConfig:
    return exact(cache, run_dir, recipe, *SMALL, *overrides, **changes)


@pytest.mark.parametrize(
    ("recipe", "overrides", "column"),
    [
        ("shre", [], "logits_kl"),
        ("shre-transformer", [], "logits_kl"),
        ("shre", ["objectives.itc=none", "objectives.ranking.layers=all"], "ranking"),
        ("itc-only", ["objectives.itc=none", "objectives.ranking.weight=1"], "ranking"),
        ("itc-only", ["objectives.logits-kl.weight=1", "optimiser.lr=0.3"], "logits_kl"),
        ("image-kd", list(IMAGES_ALONE), "logits_kl"),
    ],
)
def test_training_lowers_the_loss(
    cache: TinyCache, tmp_path: Path, recipe: str, overrides: list[str], column: str
) -> None:
    lines = run(configured(cache, tmp_path / "run", recipe, "training.epochs=10", *overrides))
    values = logged(tmp_path / "run", column)
    assert values[-5:].mean() < 0.95 * values[:3].mean()
    teacher = "teacher/tinyresnet/image/logits" in "\n".join(lines)
    assert teacher == (column == "logits_kl" or recipe == "shre")


def test_a_run_loads_and_is_evaluated_on_its_features(cache: TinyCache, tmp_path: Path) -> None:
    for name in RECIPES:
        run(configured(cache, tmp_path / name, name))
        loaded = load_run(tmp_path / name)
        width = CLASSES if name == "shre" else WIDTH
        assert loaded.student.encode_images(tokens()).features_BD.shape == (3, width)
        found = evaluate_cache(loaded, Cache.open(cache.path))
        assert found["retrieval"]["mean"] == pytest.approx(loaded.info["score"]["value"], abs=1e-6)


def test_classes_of_pictures_alone_are_validated_and_evaluated_as_trained(cache: TinyCache, tmp_path: Path) -> None:
    lines = run(configured(cache, tmp_path / "run", "image-kd", *IMAGES_ALONE))
    assert any("validated every" in line for line in lines)
    loaded = load_run(tmp_path / "run")
    student = loaded.student
    assert student.encode_images(tokens()).features_BD.shape == (3, WIDTH)  # what goes into the head
    opened = Cache.open(cache.path)
    field, target = opened.field("image/tinyvit@1/tokens"), opened.field("teacher/tinyresnet/image/logits")
    rows = field.rows("val")
    with torch.no_grad():
        predicted = student.encode_images(torch.from_numpy(field.values(rows))).predicted_BD
    expected = plain_kl(predicted.double().numpy(), target.values(rows).astype(np.float64), 1.0)
    found = evaluate_cache(loaded, opened)["distillation"]
    assert found["logits_kl"] == pytest.approx(expected, rel=1e-4)
    assert loaded.info["score"]["value"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stop", [3, 6])
def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, stop: int
) -> None:
    parts = ("training.accumulate=2", "objectives.ranking.layers=all")
    run(configured(cache, tmp_path / "whole", recipe, *parts))
    config = configured(cache, tmp_path / "run", recipe, *parts)
    signal_at(stop, monkeypatch)
    with pytest.raises(Interrupted):
        run(config)
    signal_at(-1, monkeypatch)
    run(replace(config, recipe=None, overrides=(), resume=True))
    whole, ours = (read_checkpoint(RunFolder(tmp_path / name).last) for name in ("whole", "run"))
    assert whole["global_step"] == ours["global_step"]
    for name, tensor in whole["state_dict"].items():
        if isinstance(tensor, Tensor):
            assert torch.equal(tensor, ours["state_dict"][name]), name
    assert np.array_equal(logged(tmp_path / "whole"), logged(tmp_path / "run"))


def test_four_batches_of_a_step_are_one_as_large_where_no_term_looks_at_other_samples(
    cache: TinyCache, tmp_path: Path
) -> None:
    alone = ("objectives.itc=none", "evaluation.split=none")
    run(configured(cache, tmp_path / "big", "shre", *alone, "training.batch=16"))
    run(configured(cache, tmp_path / "parts", "shre", *alone, "training.batch=4", "training.accumulate=4"))
    np.testing.assert_allclose(logged(tmp_path / "parts"), logged(tmp_path / "big"), rtol=1e-5)
    whole, parts = (read_checkpoint(RunFolder(tmp_path / name).last)["state_dict"] for name in ("big", "parts"))
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, parts[name], rtol=1e-5, atol=1e-5)


# --- the largest logits alone ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def top_cache(tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    """With all logits and the largest two of seven."""
    fields = ("tokens", "ids", "logits", "logits-top")
    return make_cache(tmp_path_factory.mktemp("top") / "cache", pictures=40, views=2, cut=1, fields=fields)


THE_TOP = ("data.targets=teacher/tinyresnet/image/logits-top", f"student.head_width={CLASSES}")


@pytest.mark.parametrize("with_table", [True, False])
def test_batches_hold_the_values_and_classes_of_their_rows_and_views(top_cache: TinyCache, with_table: bool) -> None:
    opened, recipe = Cache.open(top_cache.path), load_recipe("shre", THE_TOP)
    names = required_fields(recipe, opened)
    table = sample_table(opened, recipe, names, "train")
    source, cpu = CachedSource(opened, names, table if with_table else None), torch.device("cpu")
    rows = TrainOrder(table, 8, seed=0).rows(1)
    batch = source.prepare(source.read(rows, Buffers(pin=False)), cpu)
    assert batch.top_logits
    logits = batch.targets["logits"]
    assert logits.shape == (8, 2 * TOP + 1)
    found, field = unpacked(logits), opened.field("teacher/tinyresnet/image/logits")
    assert rows.image_rows_B is not None
    assert rows.views_B is not None
    assert set(rows.views_B.tolist()) == {0, 1}
    every = torch.from_numpy(field.values(rows.image_rows_B, rows.views_B))
    expected = top_logits(every, TOP)
    assert torch.equal(found.classes_BK, expected.classes_BK)
    assert torch.allclose(found.values_BK, expected.values_BK)
    assert torch.allclose(found.rest_B, expected.rest_B, atol=1e-6)


@pytest.mark.parametrize(("recipe", "overrides"), [("shre", []), ("image-kd", list(IMAGES_ALONE))])
def test_a_run_learns_from_the_largest_logits(
    top_cache: TinyCache, tmp_path: Path, recipe: str, overrides: list[str]
) -> None:
    run(configured(top_cache, tmp_path / "run", recipe, "training.epochs=10", *overrides, *THE_TOP))
    values = logged(tmp_path / "run", "logits_kl")
    assert values[-5:].mean() < 0.9 * values[:3].mean()
    evaluate_cache(load_run(tmp_path / "run"), Cache.open(top_cache.path))


def test_a_record_that_says_how_many_classes_there_are_makes_the_head(tmp_path: Path) -> None:
    fields = ("tokens", "ids", "logits-top")
    cache = make_cache(tmp_path / "cache", cut=1, fields=fields, environment={"classes": CLASSES + 2})
    run(configured(cache, tmp_path / "run", "shre", "training.epochs=1"))
    spec = json.loads(RunFolder(tmp_path / "run").spec.read_text())
    assert spec["head_width"] == CLASSES + 2


def test_of_two_fields_of_logits_one_must_be_chosen(top_cache: TinyCache) -> None:
    opened = Cache.open(top_cache.path)
    with pytest.raises(UsageError) as error:
        required_fields(load_recipe("shre"), opened)
    assert error.value.what == (
        "recipe shre: 2 fields fit data.targets: teacher/tinyresnet/image/logits, teacher/tinyresnet/image/logits-top"
    )


@pytest.mark.parametrize(
    ("override", "what", "way_out"),
    [
        (
            "objectives.logits-kl.temperature=2",
            "recipe shre: objectives.logits_kl.temperature = 2, and of teacher/tinyresnet/image/logits-top the logits "
            "that were not kept are known as one sum at temperature 1",
            "--set objectives.logits_kl.temperature=1, or extract all logits, without --logits-top",
        ),
        (
            "student.head_width=auto",
            "teacher/tinyresnet/image/logits-top keeps the 2 largest logits, and not how many classes there are",
            "say how many the teacher has: --set student.head_width=1000",
        ),
        (
            "student.head_width=4",
            "student.head_width = 4: teacher/tinyresnet/image/logits-top has class 4, the first being 0",
            "say how many classes the teacher has: --set student.head_width=1000",
        ),
    ],
)
def test_what_is_said_of_the_largest_logits(
    top_cache: TinyCache, tmp_path: Path, override: str, what: str, way_out: str
) -> None:
    with pytest.raises(UsageError) as error:
        run(configured(top_cache, tmp_path / "run", "shre", *THE_TOP, override))
    assert (error.value.what, error.value.way_out) == (what, way_out)


# --- what does not fit -------------------------------------------------------------------------------------------


def test_a_head_of_another_width_than_the_classes_is_refused_with_both(cache: TinyCache, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        run(configured(cache, tmp_path / "run", "shre", "student.head_width=5"))
    assert error.value.what == (
        "student.head_width = 5: the target teacher/tinyresnet/image/logits has 7 channels, and features are compared "
        "with it"
    )


def test_texts_keep_their_width_in_front_of_the_shared_layers() -> None:
    student = built(load_recipe("shre"))
    assert student.text_projection is not None
    assert (student.text_projection.in_features, student.text_projection.out_features) == (TEXT_WIDTH, WIDTH)
