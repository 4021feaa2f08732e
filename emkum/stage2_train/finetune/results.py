"""What a fine-tuning found: means and deviations over seeds, as JSON and as a table for the screen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from emkum.stage2_train.evaluate.results import STUDENT

NOT_SCORES = ("epoch", "loss", "seconds")


def over_seeds(histories: Mapping[int, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """{measure: {"mean", "deviation", "seeds": {seed: value}}} of the last epochs of a model, by seed.

    deviation: of a sample (n - 1); None of one seed.
    """
    last = {seed: history[-1] for seed, history in histories.items()}
    measures = [name for name in next(iter(last.values())) if name not in NOT_SCORES]
    found = {}
    for measure in measures:
        values = [line[measure] for line in last.values()]
        mean = sum(values) / len(values)
        squares = sum((value - mean) ** 2 for value in values)
        deviation = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else None
        seeds = {str(seed): line[measure] for seed, line in last.items()}
        found[measure] = {"mean": mean, "deviation": deviation, "seeds": seeds}
    return found


def table(results: Mapping[str, Any]) -> str:
    """Aligned text: a line a model, the student first, and what guessing gives."""
    scores: Mapping[str, Any] = results["scores"]
    measures = list(scores[STUDENT])
    several = len(results["seeds"]) > 1
    widths = [max(16 if several else 10, len(measure) + 2) for measure in measures]
    seeds = f", {len(results['seeds'])} seeds: mean and deviation" if several else f", seed {results['seeds'][0]}"
    lines = [f"{results['on']}, %{seeds}"]
    lines.append(
        f"  {'':<24}" + "".join(f"{measure:>{width}}" for measure, width in zip(measures, widths, strict=True))
    )
    for name in sorted(scores, key=lambda name: name != STUDENT):
        cells = [_cell(scores[name][measure], width) for measure, width in zip(measures, widths, strict=True)]
        lines.append(f"  {name:<24}" + "".join(cells))
    if guess := results.get("most frequent"):
        cells = [
            f"{guess[m]:.1f}".rjust(w) if m in guess else "-".rjust(w) for m, w in zip(measures, widths, strict=True)
        ]
        lines.append(f"  {'the most frequent class':<24}" + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def _cell(found: Mapping[str, Any], width: int) -> str:
    text = f"{found['mean']:.1f}"
    if found["deviation"] is not None:
        text += f" +- {found['deviation']:.1f}"
    return text.rjust(width)
