"""Rows of several seeds as one row each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rrhf.evaluation.bootstrap import estimate
from rrhf.evaluation.results import measure_from_json


def pooled_rows(by_seed: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of several seeds as one: each prompt of each seed counts, intervals anew over all."""
    if len(by_seed) == 1:
        return list(by_seed[0])
    pooled = []
    for rows in zip(*by_seed, strict=True):
        metrics: dict[str, Any] = {}
        per_prompt: dict[str, Any] = {}
        for name in rows[0]["per_prompt"]:
            merged: dict[str, Any] = {"values": {}, "weights": {}}
            for seed, row in enumerate(rows):
                told = row["per_prompt"][name]
                values = {f"{seed}/{key}": value for key, value in told["values"].items()}
                merged["values"] |= values
                weights = told.get("weights") or dict.fromkeys(told["values"], 1.0)
                merged["weights"] |= {f"{seed}/{key}": w for key, w in weights.items()}
                merged["scale"] = told.get("scale", "mean")
            per_prompt[name] = merged
            metrics[name] = estimate(measure_from_json(merged)).as_dict()
        for name, value in rows[0]["metrics"].items():
            metrics.setdefault(name, value)
        pooled.append({**rows[0], "metrics": metrics, "per_prompt": per_prompt})
    return pooled
