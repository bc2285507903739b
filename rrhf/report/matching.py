"""Compares methods at the same point of an axis: equal KL, equal responses scored, equal cost.

The final policy of a method depends on where its training happens to end. To compare methods
fairly, their checkpoints are treated as curves gold(x), one for each seed, and interpolated at the
same x: KL to the starting policy (in sqrt(KL), in which gold is closest to linear), responses
scored, or processor seconds. The result has values by prompt, which `two_level.paired` compares:

    paired(at_kl(curves_of_ppo, 2.0), at_kl(curves_of_rrhf, 2.0))

Each seed may have its own KL. For example, with the KL of a method's policies and the curves of
best-of-N, the difference says how far the method is from the frontier of best-of-N.

Nothing is extrapolated: a seed whose curve never reaches x has no value at x, and counts as
missing. If methods reach x only for some seeds, the comparison is about these seeds. KL need not
rise throughout training; the value is taken where the curve first reaches x.

Limit: if several seeds share prompts, the interval ignores that the KL of a checkpoint would be
different on other prompts. If each seed has its own prompts, nothing is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rrhf.report.over_optimization import kl_of
from rrhf.report.two_level import Values

KL_POINTS = (1.0, 2.0, 4.0)
"""KL, in nats per response, at which methods are compared."""


@dataclass(frozen=True)
class Point:
    """A checkpoint on a curve.

    Attributes:
        x: place on the axis, such as KL in nats, responses scored, or seconds.
        values: prompt id -> the metric.
    """

    x: float
    values: Values


Curve = Sequence[Point]
"""The points of one seed in the order of training, beginning with the starting policy."""


def kl_curve(rows: Sequence[Mapping[str, Any]], metric: str = "gold") -> list[Point]:
    """Make a curve of evaluation rows against KL; the KL of every row must be known."""
    points = []
    for row in rows:
        kl = kl_of(row)
        assert kl is not None, f"{row['name']} has no KL"
        points.append(Point(max(0.0, kl), row["per_prompt"][metric]["values"]))
    return points


def at_kl(
    curves: Sequence[Curve | None], kl: float | Sequence[float | None]
) -> list[Values | None]:
    """Interpolate each seed's values by prompt at a KL, linearly in sqrt(KL).

    Args:
        curves: the curve of each seed; None = the method has no curve for this seed.
        kl: KL in nats, the same for all seeds or one for each.

    Returns:
        The values of each seed; None = the curve does not reach the KL.
    """
    wanted = [kl] * len(curves) if isinstance(kl, int | float) else kl
    return [
        None if curve is None or x is None else _at(curve, x, math.sqrt)
        for curve, x in zip(curves, wanted, strict=True)
    ]


def at_cost(curves: Sequence[Curve | None], cost: float) -> list[Values | None]:
    """Interpolate each seed's values by prompt at a cost (responses, seconds), linearly; None = not
    reached."""
    return [None if curve is None else _at(curve, cost, float) for curve in curves]


def _at(curve: Curve, x: float, scale: Any) -> Values | None:
    """Return the values where the curve first reaches x.

    These are the values of one checkpoint, or the mean of two neighbouring checkpoints, weighted by
    their distance from x, over the prompts that both have.
    """
    for place, point in enumerate(curve):
        if point.x == x:
            return point.values
        following = curve[min(place + 1, len(curve) - 1)]
        if not min(point.x, following.x) < x < max(point.x, following.x):
            continue
        share = (scale(x) - scale(point.x)) / (scale(following.x) - scale(point.x))
        return {
            p: (1 - share) * a + share * b
            for p, a in point.values.items()
            if a is not None and (b := following.values.get(p)) is not None
        }
    return None
