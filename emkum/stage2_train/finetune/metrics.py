"""Measures of a task's answers: accuracy, F1, Matthews' and Pearson's and Spearman's correlation, in percent.

As GLUE reports them (Wang et al. 2018, arXiv:1804.07461): correlations are multiplied by 100 too.

N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

POSITIVE = 1  # the class whose F1 is meant


def accuracy(answers_N: np.ndarray, truth_N: np.ndarray) -> float:
    """The share of answers that are the truth, in percent."""
    _check(answers_N, truth_N)
    return 100.0 * float(np.mean(answers_N == truth_N))


def f1(answers_N: np.ndarray, truth_N: np.ndarray) -> float:
    """Of class 1: 2 TP / (2 TP + FP + FN), in percent; 0 where that class is neither there nor answered."""
    _check(answers_N, truth_N)
    said, true = answers_N == POSITIVE, truth_N == POSITIVE
    both = int((said & true).sum())
    total = int(said.sum()) + int(true.sum())
    return 100.0 * 2 * both / total if total else 0.0


def matthews(answers_N: np.ndarray, truth_N: np.ndarray) -> float:
    """Matthews' correlation x 100, of any number of classes; 0 where all answers, or all truths, are one class.

    R_K of Gorodkin 2004: (n c - sum_k p_k t_k) / sqrt((n^2 - sum p_k^2) (n^2 - sum t_k^2)); of two classes it is
    (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN)).
    """
    _check(answers_N, truth_N)
    classes = np.union1d(answers_N, truth_N)
    said = np.array([(answers_N == c).sum() for c in classes], dtype=np.float64)
    true = np.array([(truth_N == c).sum() for c in classes], dtype=np.float64)
    n, right = float(len(truth_N)), float((answers_N == truth_N).sum())
    below = (n * n - (said * said).sum()) * (n * n - (true * true).sum())
    return 100.0 * float((n * right - (said * true).sum()) / np.sqrt(below)) if below > 0 else 0.0


def pearson(answers_N: np.ndarray, truth_N: np.ndarray) -> float:
    """The linear correlation x 100; 0 where one side is constant."""
    _check(answers_N, truth_N)
    a = np.asarray(answers_N, dtype=np.float64)
    b = np.asarray(truth_N, dtype=np.float64)
    if a.min() == a.max() or b.min() == b.max():
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return 100.0 * float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def spearman(answers_N: np.ndarray, truth_N: np.ndarray) -> float:
    """Pearson's correlation of the ranks, equal values sharing the mean of theirs, x 100."""
    return pearson(_ranks(answers_N), _ranks(truth_N))


def top(scores_NC: np.ndarray, truth_N: np.ndarray, k: int) -> float:
    """The share of samples whose class is among the k of the highest score, in percent; ties count against."""
    if len(scores_NC) != len(truth_N) or not len(truth_N):
        raise ValueError(f"{len(scores_NC)} scores for {len(truth_N)} samples")
    known = (truth_N >= 0) & (truth_N < scores_NC.shape[1])  # a class that training never saw is never right
    own_N1 = np.where(known, scores_NC[np.arange(len(truth_N)), np.where(known, truth_N, 0)], -np.inf)[:, None]
    return 100.0 * float(np.mean(((scores_NC >= own_N1).sum(axis=1) <= k) & known))


def _ranks(values_N: np.ndarray) -> np.ndarray:
    _, place_N, count = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2.0)[place_N]


def _check(answers_N: np.ndarray, truth_N: np.ndarray) -> None:
    if len(answers_N) != len(truth_N) or not len(truth_N):
        raise ValueError(f"{len(answers_N)} answers for {len(truth_N)} samples")


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "F1": f1,
    "Matthews": matthews,
    "Pearson": pearson,
    "Spearman": spearman,
}
