"""Draws how much each method of a study gained over a baseline method, a panel for each world.

Needs the extra `report`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rrhf.errors import UserError
from rrhf.report.method_figures import COLOURS, FAINT, INK, UNTRAINED
from rrhf.report.study_page import WorldResults

LINE_HEIGHT, PANEL_WIDTH = 0.24, 4.6


def draw_differences(worlds: Sequence[WorldResults], baseline: str, target: Path) -> Path:
    """Draw gold minus that of the baseline, with intervals over seeds and prompts.

    Methods are in the order of their mean in the first world. Blue: the interval lies above zero;
    orange: below; grey: it contains zero. These are intervals of single comparisons.

    Args:
        worlds: the results of one or more worlds.
        baseline: key of the method that the others are compared with.
        target: the file to write.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "pictures: the package matplotlib is not installed; install rrhf[report]"
        ) from error
    found = [
        {
            key: one.minus(world.series[baseline])
            for key, one in world.series.items()
            if key != baseline
        }
        for world in worlds
    ]
    order = sorted(found[0], key=lambda key: found[0][key].mean or 0.0)
    size = (1.6 + PANEL_WIDTH * len(worlds), 1.2 + LINE_HEIGHT * len(order))
    figure = Figure(figsize=size, dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(worlds), sharey=True, squeeze=False)[0]
    for axis, world, differences in zip(panels, worlds, found, strict=True):
        axis.axvline(0, color=INK, linewidth=0.8, zorder=1)
        for height, key in enumerate(order):
            one = differences.get(key)
            if one is None or one.mean is None:
                continue
            low, high = (one.mean if end is None else end for end in (one.low, one.high))
            color = COLOURS[2] if low > 0 else COLOURS[0] if high < 0 else UNTRAINED
            axis.plot([low, high], [height, height], color=color, linewidth=2.2, zorder=2)
            axis.plot([one.mean], [height], "o", color=color, markersize=5, zorder=3)
        axis.set_title(f"{world.name}, {len(world.seeds)} seeds", loc="left", color=INK)
        axis.set_xlabel(f"gold minus {world.series[baseline].title}")
        axis.grid(axis="x", color=FAINT, linewidth=0.6)
        axis.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.tick_params(axis="y", length=0)
    titles = [worlds[0].series[key].title for key in order]
    panels[0].set_yticks(range(len(order)), titles)
    figure.savefig(target)
    return target
