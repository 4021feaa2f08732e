"""Ranks and recalls: against a naive reference, by hand, and where numbers usually lie."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from emkum.errors import NonFiniteFeature, UsageError
from emkum.stage2_train.evaluate.retrieval import (
    chance,
    image_text_retrieval,
    on_grid,
    ranks,
    retrieval_chance,
)


def naive_rank(query: np.ndarray, candidates: np.ndarray, right: list[bool]) -> int:
    """One query, in plain loops: wrong candidates at least as good as the best right one, and one."""
    cosines = [float(np.dot(query / np.linalg.norm(query), c / np.linalg.norm(c))) for c in candidates]
    best = max((cos for cos, is_right in zip(cosines, right, strict=True) if is_right), default=float("-inf"))
    return 1 + sum(cos >= best for cos, is_right in zip(cosines, right, strict=True) if not is_right)


def naive_retrieval(images: np.ndarray, texts: np.ndarray, image_of_text: list[int], ks: tuple[int, ...]) -> dict:
    image_ranks = [
        naive_rank(image, texts, [owner == number for owner in image_of_text])
        for number, image in enumerate(images)
        if number in image_of_text
    ]
    text_ranks = [
        naive_rank(text, images, [owner == number for number in range(len(images))])
        for text, owner in zip(texts, image_of_text, strict=True)
        if owner >= 0
    ]
    there = {f"R@{k}": 100 * np.mean([rank <= k for rank in image_ranks]) for k in ks}
    back = {f"R@{k}": 100 * np.mean([rank <= k for rank in text_ranks]) for k in ks}
    mean = np.mean([*there.values(), *back.values()])
    return {"image_to_text": there, "text_to_image": back, "mean": mean}


def assert_same(result: dict, expected: dict) -> None:
    assert result["image_to_text"] == pytest.approx(expected["image_to_text"])
    assert result["text_to_image"] == pytest.approx(expected["text_to_image"])
    assert result["mean"] == pytest.approx(expected["mean"])


@pytest.mark.parametrize("seed", range(5))
def test_recalls_equal_a_naive_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image_of_text = rng.integers(-1, 30, size=90).tolist()
    images = rng.normal(size=(30, 8)).astype(np.float32)
    # Captions lie near their picture, some far; the scale is no matter.
    texts = np.stack([images[max(owner, 0)] for owner in image_of_text]) + rng.normal(size=(90, 8))
    texts = (texts * rng.uniform(0.1, 10, size=(90, 1))).astype(np.float32)
    result = image_text_retrieval(images, texts, image_of_text, ks=(1, 3, 10))
    assert_same(result, naive_retrieval(images, texts, image_of_text, (1, 3, 10)))


def test_a_small_example_by_hand() -> None:
    images = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    texts = np.array([[0.9, 0.1], [-0.8, 0.6], [0.1, 0.9], [-1.0, 0.05]])
    image_of_text = [0, 0, 1, 1]
    # Picture 0: caption 0 is nearest. Picture 1: caption 2 is. Picture 2 has no caption: no query.
    # Captions 0 and 2: their picture first. Caption 1: pictures 2 (.8), 1 (.6), 0 (-.8): rank 3. Caption 3: rank 2.
    result = image_text_retrieval(images, texts, image_of_text, ks=(1, 2, 3))
    assert result["image_to_text"] == {"R@1": 100.0, "R@2": 100.0, "R@3": 100.0}
    assert result["text_to_image"] == {"R@1": 50.0, "R@2": 75.0, "R@3": 100.0}
    assert result["mean"] == pytest.approx((300 + 225) / 6)


def test_any_caption_counts_and_further_right_ones_do_not_stand_in_the_way() -> None:
    images = np.eye(2)
    # Picture 0 has five captions, four of them nearer to it than the best wrong one.
    texts = np.array([[1, 0.1], [1, 0.2], [1, 0.3], [1, 0.4], [0, 1], [0.9, 1]])
    result = image_text_retrieval(images, texts, [0, 0, 0, 0, 0, 1], ks=(1, 2))
    assert result["image_to_text"] == {"R@1": 50.0, "R@2": 100.0}


def test_captions_without_picture_distract_and_pictures_without_caption_are_no_queries() -> None:
    images = np.array([[1.0, 0.0], [0.0, 1.0]])
    texts = np.array([[0.9, 0.5], [1.0, 0.0]])
    alone = image_text_retrieval(images, texts[:1], [0], ks=(1,))
    distracted = image_text_retrieval(images, texts, [0, -1], ks=(1, 2))
    assert alone["image_to_text"] == {"R@1": 100.0}
    assert distracted["image_to_text"] == {"R@1": 0.0, "R@2": 100.0}
    # The caption without a picture asks nothing: one text query, and it finds its picture.
    assert distracted["text_to_image"] == {"R@1": 100.0, "R@2": 100.0}


def test_one_picture_with_one_caption_is_found() -> None:
    result = image_text_retrieval(np.ones((1, 3)), np.ones((1, 3)), [0])
    assert result["mean"] == 100.0


@pytest.mark.parametrize("value", [1.0, 0.1, 1e-30, 1e30, 0.0])
@pytest.mark.parametrize("width", [1, 3, 384, 1000])
def test_equal_features_give_the_worst_recall(value: float, width: int) -> None:
    images = np.full((50, width), value, dtype=np.float32)
    texts = np.full((250, width), value, dtype=np.float32)
    result = image_text_retrieval(images, texts, np.repeat(np.arange(50), 5), ks=(1, 10, 49))
    assert result["mean"] == 0.0


def test_equal_rows_tie_exactly_wherever_they_stand() -> None:
    rng = np.random.default_rng(0)
    # 301 copies of one feature: matrix products of other shapes would round their edges differently.
    images = np.repeat(rng.normal(size=(1, 137)).astype(np.float32), 301, axis=0)
    query = rng.normal(size=(301, 137)).astype(np.float32)
    groups = np.arange(301)
    found = ranks(on_grid(query, "query"), on_grid(images, "picture"), groups, groups, scores_per_chunk=7 * 301)
    assert (found == 301).all()


def test_chunks_change_nothing() -> None:
    rng = np.random.default_rng(1)
    images, texts = rng.normal(size=(83, 33)), rng.normal(size=(201, 33))
    owners = rng.integers(-1, 83, size=201)
    whole = image_text_retrieval(images, texts, owners)
    for scores_per_chunk in (1, 100, 201 * 5, 201 * 82):
        assert image_text_retrieval(images, texts, owners, scores_per_chunk=scores_per_chunk) == whole


def test_the_order_of_candidates_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    images, texts = rng.normal(size=(40, 16)), rng.integers(-1, 2, size=(120, 16)).astype(np.float32)
    owners = np.repeat(np.arange(40), 3)
    order = rng.permutation(120)
    assert image_text_retrieval(images, texts, owners) == image_text_retrieval(images, texts[order], owners[order])


def test_torch_and_numpy_half_and_float_agree() -> None:
    rng = np.random.default_rng(3)
    images, texts = rng.normal(size=(20, 8)).astype(np.float16), rng.normal(size=(20, 8)).astype(np.float16)
    expected = image_text_retrieval(images, texts, np.arange(20))
    assert image_text_retrieval(torch.tensor(images), torch.tensor(texts), torch.arange(20)) == expected
    assert image_text_retrieval(images.astype(np.float64), texts.astype(np.float32), list(range(20))) == expected
    needs_grad = torch.tensor(images).to(torch.float32).requires_grad_()
    assert image_text_retrieval(needs_grad, torch.tensor(texts), torch.arange(20)) == expected


@pytest.mark.parametrize(("side", "named"), list(itertools.product([0, 1], [np.nan, np.inf])))
def test_a_feature_that_is_not_finite_is_an_error(side: int, named: float) -> None:
    features = [np.ones((4, 3)), np.ones((4, 3))]
    features[side][2, 1] = named
    with pytest.raises(NonFiniteFeature, match=f"{['picture', 'text'][side]} feature 2 of 4 holds NaN or infinity"):
        image_text_retrieval(features[0], features[1], np.arange(4))


def test_no_caption_of_a_picture_is_a_usage_error() -> None:
    for texts, owners in ((np.ones((2, 3)), [-1, -1]), (np.ones((0, 3)), [])):
        with pytest.raises(UsageError, match="no caption belongs to a picture"):
            image_text_retrieval(np.ones((2, 3)), texts, owners)


def test_numbers_of_pictures_are_checked() -> None:
    with pytest.raises(ValueError, match="2 texts but 1 numbers"):
        image_text_retrieval(np.ones((2, 3)), np.ones((2, 3)), [0])
    with pytest.raises(ValueError, match="picture 2 of only 2"):
        image_text_retrieval(np.ones((2, 3)), np.ones((2, 3)), [0, 2])
    with pytest.raises(ValueError, match="whole numbers"):
        image_text_retrieval(np.ones((2, 3)), np.ones((2, 3)), np.array([0.0, 1.0]))


def test_a_query_without_a_right_candidate_never_hits() -> None:
    features = on_grid(np.eye(3), "query")
    assert ranks(features, features, np.array([0, 5, -1]), np.array([0, 1, -1])).tolist() == [1, 4, 4]


def test_chance_is_what_random_features_reach() -> None:
    rng = np.random.default_rng(4)
    owners = np.concatenate([np.repeat(np.arange(20), 3), np.full(10, -1), np.repeat(np.arange(5), 2)])
    expected = retrieval_chance(owners, 25, ks=(1, 5))
    runs = [
        image_text_retrieval(rng.normal(size=(25, 16)), rng.normal(size=(len(owners), 16)), owners, ks=(1, 5))
        for _ in range(300)
    ]
    for way in ("image_to_text", "text_to_image"):
        for name, value in expected[way].items():
            assert np.mean([run[way][name] for run in runs]) == pytest.approx(value, abs=1.0)
    assert expected["text_to_image"] == pytest.approx({"R@1": 4.0, "R@5": 20.0})


def test_chance_by_hand() -> None:
    # Two of four candidates are right: 1/2 at the first draw; missed twice: 1/2 * 1/3.
    found = chance(np.array([0]), np.array([0, 0, 1, 1]), ks=(1, 2, 3, 9))
    assert found == pytest.approx({"R@1": 50.0, "R@2": 100 * 5 / 6, "R@3": 100.0, "R@9": 100.0})
    assert chance(np.array([7]), np.array([0, 1]), ks=(2,)) == {"R@2": 0.0}
