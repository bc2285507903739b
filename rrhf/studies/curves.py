"""Makes the curves of a study's methods, with the cost up to each point."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rrhf.report.study_curves import Training
from rrhf.studies.method_table import METHODS
from rrhf.studies.methods_study import SeedResult
from rrhf.studies.rows import Row


def trainings(results: Sequence[SeedResult], methods: Sequence[str], first: str) -> list[Training]:
    """Return the curve of every method; that of an offline objective has two points, SFT and the
    trained policy.

    Args:
        results: the results of the seeds.
        methods: keys of `METHODS`.
        first: the method whose curve comes first.
    """
    by_title: dict[str, list[str]] = {}
    for key in sorted(methods, key=lambda key: key != first):
        if METHODS[key].policy != "sft" or METHODS[key].curve:
            by_title.setdefault(METHODS[key].curve or METHODS[key].title, []).append(key)
    found = []
    for title, keys in by_title.items():
        curves = [_curve(result, title, keys) for result in results]
        rows = [curve and curve[0] for curve in curves]
        costs = [] if METHODS[keys[0]].best_of > 1 else curves
        responses = [curve and curve[1] for curve in costs]
        seconds = [curve and curve[2] for curve in costs]
        found.append(Training(title, rows, responses, seconds))
    return found


def _curve(
    result: SeedResult, title: str, keys: Sequence[str]
) -> tuple[list[Row], list[float], list[float]] | None:
    """Return (rows, responses, processor seconds) of one seed; None if it was not trained there.

    The costs at the ends of methods are known, such as those of RRHF after 1, 2 and 4 rounds; costs
    between them are interpolated by the number of the point.
    """
    known = [key for key in keys if key in result.rows]
    if not known:
        return None
    rows = result.curves.get(title) or [result.rows["sft"], result.rows[known[-1]]]
    names = [row["name"] for row in rows]
    ends = [(0, 0.0, 0.0)]
    for key in known:
        cost = result.costs[key]
        if (name := result.rows[key]["name"]) in names:
            ends.append((names.index(name), cost.responses, cost.cpu_seconds))
    places, responses, seconds = zip(*ends, strict=True)
    points = range(len(rows))
    return (
        rows,
        np.interp(points, places, responses).tolist(),
        np.interp(points, places, seconds).tolist(),
    )
