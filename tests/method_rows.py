"""Rows with the values by prompt that a test gives, as an evaluation would have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rrhf.evaluation.bootstrap import Measure, estimate
from rrhf.evaluation.results import measure_to_json


def row(
    name: str,
    gold: Sequence[float],
    reward: Sequence[float],
    kl: float | None = 0.0,
    **others: Sequence[float],
) -> dict[str, Any]:
    """Values are by prompt, in one order for all rows."""
    measures = {
        metric: Measure({f"p{i}": value for i, value in enumerate(values)})
        for metric, values in {"gold": gold, "reward": reward, **others}.items()
    }
    metrics = {
        metric: estimate(measure, resamples=200).as_dict() for metric, measure in measures.items()
    }
    if kl is not None:
        metrics["kl"] = {"mean": kl, "low": kl, "high": kl, "n": len(gold)}
    return {
        "name": name,
        "metrics": metrics,
        "per_prompt": {metric: measure_to_json(measure) for metric, measure in measures.items()},
        "made_with": {"num_prompts": len(gold)},
        "notes": [],
    }


def around(mean: float, count: int = 40, spread: float = 0.2) -> list[float]:
    """So many values with this mean, half above and half below it."""
    return [mean + (spread if i % 2 else -spread) for i in range(count)]
