"""Formats tables of a study's curves: gold at equal KL, gold at equal cost, Gao et al.'s curves.

A training's curve consists of the policies that it saved, from SFT to the last one; there is one
curve for each seed. Methods are compared after equally many responses, not where their trainings
happen to end (`rrhf.report.matching`, `rrhf.report.gao`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rrhf.report.gao import GaoFit, fit_gao
from rrhf.report.matching import KL_POINTS, Curve, Point, at_cost, at_kl, kl_curve
from rrhf.report.over_optimization import kl_of
from rrhf.report.study_table import Row
from rrhf.report.table import NOTHING, format_estimate, format_number, markdown_lines
from rrhf.report.two_level import Difference, Values, mean_over_seeds, paired

RESPONSES = (1000.0, 2000.0, 4000.0, 8000.0)
SECONDS = (10.0, 20.0, 40.0, 80.0)


@dataclass(frozen=True)
class Training:
    """The curve of one method.

    Attributes:
        title: the method's name.
        rows: for each seed the rows from SFT to the last policy; None = not trained on this seed.
        responses, seconds: for each seed the responses drawn and the processor seconds spent up to
            each row; empty for best-of-N, which trains nothing.
    """

    title: str
    rows: Sequence[Sequence[Row] | None]
    responses: Sequence[Sequence[float] | None] = ()
    seconds: Sequence[Sequence[float] | None] = ()

    @property
    def has_points(self) -> bool:
        """Whether a policy between SFT and the last policy was kept."""
        return any(rows is not None and len(rows) > 2 for rows in self.rows)

    def against_kl(self) -> list[Curve | None]:
        """Return gold against KL for each seed; None if the KL is not known."""
        return [
            None if rows is None or any(kl_of(row) is None for row in rows) else kl_curve(rows)
            for rows in self.rows
        ]

    def against(self, costs: Sequence[Sequence[float] | None]) -> list[Curve | None]:
        """Return gold against one of the costs for each seed."""
        return [
            None
            if rows is None or xs is None
            else [
                Point(x, row["per_prompt"]["gold"]["values"])
                for x, row in zip(xs, rows, strict=True)
            ]
            for rows, xs in zip(self.rows, costs, strict=True)
        ]


def kl_table(trainings: Sequence[Training], other: str) -> str:
    """Format a table of gold at each of `KL_POINTS`, with its difference from one method."""
    points = {
        training.title: [at_kl(training.against_kl(), kl) for kl in KL_POINTS]
        for training in trainings
    }
    return _table(points, [f"{kl:g} nats" for kl in KL_POINTS], other)


def responses_table(trainings: Sequence[Training], other: str) -> str:
    """Format a table of gold after equally many responses drawn and scored."""
    points = {
        training.title: [at_cost(training.against(training.responses), x) for x in RESPONSES]
        for training in trainings
        if training.responses
    }
    return _table(points, [f"{x:,.0f} responses" for x in RESPONSES], other)


def seconds_table(trainings: Sequence[Training], other: str) -> str:
    """Format a table of gold after equally many processor seconds."""
    points = {
        training.title: [at_cost(training.against(training.seconds), x) for x in SECONDS]
        for training in trainings
        if training.seconds
    }
    return _table(points, [f"{x:g} s" for x in SECONDS], other)


def gao_table(trainings: Sequence[Training]) -> str:
    """Format a table of the coefficients of Gao et al.'s curves."""
    lines = []
    for training, fit in gao_fits(trainings).items():
        peak = fit.peak()
        place = NOTHING if peak.kl is None else format_number(peak.kl, 1)
        falls = "not shown" if peak.high is None else f"from {format_number(peak.high, 1)} nats"
        cells = [_cell(fit.alpha), _cell(fit.beta), place, falls]
        lines.append([training, *cells, f"{fit.reached:.1f}", str(fit.alpha.seeds)])
    headings = ["", "alpha", "beta", "peak, nats", "gold falls", "KL reached", "seeds"]
    return markdown_lines(headings, lines)


def gao_fits(trainings: Sequence[Training]) -> dict[str, GaoFit]:
    """Return title -> fitted curve; methods without training are fitted with the form of
    best-of-N."""
    return {
        training.title: fit_gao(training.against_kl(), "rl" if training.responses else "best-of-n")
        for training in trainings
    }


def curve_numbers(trainings: Sequence[Training]) -> dict[str, Any]:
    """Return title -> gold at equal KL and the fitted curve, as JSON values."""
    fits = gao_fits(trainings)
    return {
        training.title: {
            "gold_at_kl": {
                f"{kl:g}": mean_over_seeds(at_kl(training.against_kl(), kl)).as_dict()
                for kl in KL_POINTS
            },
            "gao": fits[training.title].as_dict(),
        }
        for training in trainings
    }


def _table(
    points: Mapping[str, Sequence[Sequence[Values | None]]], headings: Sequence[str], other: str
) -> str:
    """Format two columns for each place on the axis: gold, and gold minus that of `other`. Empty
    columns are left out."""
    columns = []
    for place, heading in enumerate(headings):
        theirs = points[other][place]
        gold = {title: mean_over_seeds(found[place]) for title, found in points.items()}
        if all(found.mean is None for found in gold.values()):
            continue
        minus = {title: paired(found[place], theirs) for title, found in points.items()}
        columns.append((heading, {title: _cell(found) for title, found in gold.items()}))
        cells = {title: "" if title == other else _cell(found) for title, found in minus.items()}
        columns.append((f"minus {other}", cells))
    if not columns:
        return "No method gets so far."
    lines = [[title, *(cells[title] for _, cells in columns)] for title in points]
    return markdown_lines(["", *(heading for heading, _ in columns)], lines)


def _cell(found: Difference) -> str:
    text = format_estimate(found.as_dict(), 2)
    if found.mean is not None and found.missing:
        text += f" ({found.seeds} of {found.seeds + found.missing} seeds)"
    return text
