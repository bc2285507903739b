"""Finds what correlates with the differences between seeds: the reward model, and parts of gold.

Every quantity here has one value for each seed, and the tables hold Pearson correlations over the
seeds, with intervals by Fisher's transformation. With few seeds these intervals are wide, and
correlation is not causation: the tables only say where to look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rrhf.report.study_table import Series, spread
from rrhf.report.table import NOTHING, format_number, markdown_lines

PART = "part_"
NUM_PARTS = 3


def correlation(
    a: Sequence[float | None], b: Sequence[float | None]
) -> tuple[float, float, float] | None:
    """Return (r, low, high): Pearson's r and its 95 % interval, over seeds that have both values.

    None for fewer than four such seeds, or if one of the quantities does not vary.
    """
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if len(pairs) < 4:
        return None
    xs, ys = np.array(pairs).T
    if np.ptp(xs) == 0 or np.ptp(ys) == 0:
        return None
    r = float(np.clip(np.corrcoef(xs, ys)[0, 1], -1.0, 1.0))
    if abs(r) == 1:
        return r, r, r
    reach = 1.959964 / math.sqrt(len(pairs) - 3)
    middle = math.atanh(r)
    return r, math.tanh(middle - reach), math.tanh(middle + reach)


def spread_table(
    series: Mapping[str, Series], covariates: Mapping[str, Sequence[float | None]]
) -> str:
    """Format a row for each method: the deviation of gold over seeds, and what it correlates with.

    Args:
        series: key of a method -> its results by seed.
        covariates: name -> a value for each seed, such as the accuracy of the reward model.
    """
    lines = []
    for one in series.values():
        gold = one.means()
        deviation = spread(gold)
        if deviation is None:
            continue
        cells = [_cell(correlation(gold, values)) for values in covariates.values()]
        lines.append([one.title, format_number(deviation, 2), *cells, strongest_parts(one)])
    headings = ["", "sd of gold", *(f"r with {name}" for name in covariates), "parts of gold"]
    return markdown_lines(headings, lines)


def strongest_parts(one: Series) -> str:
    """Return the parts of gold that correlate most with gold over seeds, with their
    correlations."""
    parts = {
        name
        for row in one.rows
        if row is not None
        for name in row["metrics"]
        if name.startswith(PART)
    }
    found = {name: correlation(one.means(), one.means(name)) for name in sorted(parts)}
    known = {name: r for name, r in found.items() if r is not None}
    best = sorted(known, key=lambda name: -abs(known[name][0]))[:NUM_PARTS]
    words = (f"{name.removeprefix(PART)} {format_number(known[name][0], 2)}" for name in best)
    return ", ".join(words) or NOTHING


def _cell(found: tuple[float, float, float] | None) -> str:
    if found is None:
        return NOTHING
    r, low, high = (format_number(x, 2) for x in found)
    return f"{r} [{low}, {high}]"
