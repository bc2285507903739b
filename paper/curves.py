"""Training curves of run folders as one picture (needs matplotlib: the extra `report`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rrhf.errors import UserError

Curves = Mapping[str, Sequence[tuple[float, float]]]


def read_curve(run: Path, metric: str) -> list[tuple[float, float]]:
    """(step, value) of a metric, from the run's metrics.jsonl."""
    points = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row.get(metric) is not None:
            points.append((float(row["step"]), float(row[metric])))
    return points


def smoothed(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """The mean of the last `window` values at each point."""
    values = [value for _, value in points]
    means = []
    for place, (step, _) in enumerate(points):
        recent = values[max(0, place + 1 - window) : place + 1]
        means.append((step, sum(recent) / len(recent)))
    return means


def draw_curves(panels: Mapping[str, Curves], target: Path, window: int = 8) -> Path:
    """One panel a title: each curve's points in grey, its running mean over `window` in colour.

    Args:
        panels: title -> name -> points.
        target: the picture's file.
        window: points of a running mean.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "curves: the package matplotlib is not installed; install rrhf[report]"
        ) from error
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), color="0.8", linewidth=0.8)
            axis.plot(*zip(*smoothed(points, window), strict=True), label=name)
        axis.set_title(title)
        axis.set_xlabel("optimiser step")
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend(frameon=False)
    figure.savefig(target)
    return target
