"""How the cost of an RRHF step grows with the number of responses, their length, the prompt's.

Original-style step against the default layout, at a small model, one axis at a time; each point is
compared, then timed. Drawn as a picture beside the result.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import NotMeasured, Ratio, timed
from benchmarks.original_step import OriginalStyle
from benchmarks.rrhf_step import Step, every_pair_violated
from benchmarks.shapes import SHAPES, Shape
from benchmarks.training_step import compared
from rrhf.models.forward.layouts import build_policy

TABLE = "scaling"
MIDDLE = SHAPES["S1"]
ORIGINAL, OURS = "original", "shared_prefix"


@dataclass(frozen=True)
class Axis:
    """One size grows, the others stay."""

    name: str
    values: tuple[int, ...]
    middle: Shape = MIDDLE

    def __str__(self) -> str:
        return f"{self.middle}, but {self.name} {self.values[0]}..{self.values[-1]}"

    def shape(self, value: int) -> Shape:
        """The shape of one point."""
        responses = self.middle.responses
        if self.name == "N":
            return replace(self.middle, responses=responses[:1] * value)
        if self.name == "P":
            return replace(self.middle, prompt=value)
        return replace(self.middle, responses=(value,) * len(responses))


CASES = {
    "n": Axis("N", (1, 2, 4, 8, 16)),
    "p": Axis("P", (64, 128, 256, 512, 1024)),
    "r": Axis("R", (16, 32, 64, 128, 256)),
}
GOALS: dict[str, float] = {}
ROUNDS = dict.fromkeys(CASES, 3)


def run(case: str, rounds: int) -> dict[str, Any]:
    """Compare and time every point of an axis."""
    axis = CASES[case]
    return {
        "benchmark": "scaling",
        "case": case,
        "shape": axis,
        "theory": None,
        "points": [_point(axis.shape(value), value, rounds) for value in axis.values],
    }


def _point(shape: Shape, value: int, rounds: int) -> dict[str, Any]:
    batch = every_pair_violated(shape)
    steps = {
        ORIGINAL: Step(OriginalStyle(shape.model()), batch),
        OURS: Step(build_policy(shape.model(), "shared_prefix"), batch),
    }
    differences = compared(steps)
    timings = timed(steps, rounds, are_warm=True)
    return {
        "value": value,
        "theory": shape.theory(),
        "relative_differences": differences,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
    }


def table(result: dict[str, Any]) -> str:
    """For people."""
    axis: Axis = result["shape"]
    found = [str(axis)]
    for point in result["points"]:
        base, ours = (_milliseconds(timing) for timing in point["timings"].values())
        ratio = Ratio(**point["timings"][OURS]["speed_up"])
        found.append(
            f"  {axis.name} {point['value']:5}  {base:8.0f} ms {ours:8.0f} ms   x {ratio}"
            f"   FLOP ratio {point['theory']:.2f}"
        )
    return "\n".join(found)


LOOKS = {ORIGINAL: ("original-style", "#777777"), OURS: ("shared prefix", "#0072b2")}
INK, FAINT = "#222222", "#e2e2e2"
WORDS = {
    "N": "N, responses of one prompt",
    "P": "P, tokens of the prompt",
    "R": "R, tokens of each response",
}


def picture(result: Mapping[str, Any], target: Path) -> None:
    """Cost on the left, ratio on the right.

    Raises:
        NotMeasured: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise NotMeasured("no picture without matplotlib: install rrhf[report]") from None
    name, points = result["shape"]["name"], result["points"]
    values = [point["value"] for point in points]
    figure = Figure(figsize=(8.8, 3.7), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    others = " ".join(part for part in result["sizes"].split(",")[0].split() if part[0] != name)
    figure.suptitle(f"One RRHF step on one CPU thread, {others}", x=0.01, ha="left", fontsize=11)
    cost, ratio = figure.subplots(1, 2)
    _draw_costs(cost, values, points)
    _draw_ratios(ratio, values, points)
    for part in (cost, ratio):
        part.set_xscale("log", base=2)
        part.set_xticks(values, [str(value) for value in values])
        part.minorticks_off()
        part.set_xlabel(WORDS[name])
        part.grid(color=FAINT, linewidth=0.6)
        part.set_axisbelow(True)
        part.spines[["top", "right"]].set_visible(False)
        part.tick_params(labelsize=9)
    figure.savefig(target)


def _draw_costs(axes: Any, values: Sequence[int], points: Sequence[Mapping[str, Any]]) -> None:
    spent = []
    for name, (words, colour) in LOOKS.items():
        heights = [_milliseconds(point["timings"][name]) for point in points]
        axes.plot(values, heights, "o-", color=colour, linewidth=1.8, markersize=4.5)
        end = {"xy": (values[-1], heights[-1]), "xytext": (7, 0), "textcoords": "offset points"}
        axes.annotate(words, color=colour, va="center", fontsize=9.5, annotation_clip=False, **end)
        spent += heights
    axes.set_yscale("log")
    low, high = 0.7 * min(spent), 1.4 * max(spent)
    steps = (digit * 10**power for power in range(6) for digit in (1, 2, 5))
    ticks = [step for step in steps if low <= step <= high]
    axes.set_ylim(low, high)
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_ylabel("CPU time of a step, ms")


def _draw_ratios(axes: Any, values: Sequence[int], points: Sequence[Mapping[str, Any]]) -> None:
    found = [Ratio(**point["timings"][OURS]["speed_up"]) for point in points]
    theory = [point["theory"] for point in points]
    medians = [one.median for one in found]
    reach = (
        [one.median - one.lowest for one in found],
        [one.highest - one.median for one in found],
    )
    style = {"color": LOOKS[OURS][1], "linewidth": 1.8, "markersize": 4.5, "capsize": 2.5}
    axes.errorbar(values, medians, reach, fmt="o-", label="measured, with its range", **style)
    axes.plot(values, theory, "--", color=INK, linewidth=1.2, label="by floating-point operations")
    axes.axhline(1, color=INK, linewidth=0.6)
    axes.set_ylim(0, 1.3 * max(*theory, *medians))
    rises = medians[-1] > medians[0]
    axes.legend(frameon=False, loc="upper left" if rises else "upper right", fontsize=9)
    axes.set_ylabel("times as fast as original-style")


def _milliseconds(timing: Mapping[str, Any]) -> float:
    return 1000 * statistics.median(timing["seconds"])
