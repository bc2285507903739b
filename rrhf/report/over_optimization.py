"""Finds the point on a curve after which gold no longer rises with the learned reward.

Training on a reward model keeps raising the learned reward. Gold, the true preference, first rises
too, but may later stall or fall (Gao et al. 2022, arXiv:2210.10760). A curve is the rows of
one method in the order of its training, each with `reward` and `gold` for every prompt. All
differences are paired over prompts, and a difference counts only if its interval excludes zero.
The pace of gold up to a point is its gain per unit of reward; the pace is treated as exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rrhf.evaluation.bootstrap import Estimate, Measure, estimate, paired_difference
from rrhf.evaluation.results import measure_from_json

Row = Mapping[str, Any]
Kind = Literal["falls", "stalls", "slows", "follows", "flat"]


@dataclass(frozen=True)
class Divergence:
    """Where gold diverges from the rising learned reward, and how.

    Attributes:
        kind: "falls": gold falls after its peak while the reward rises. "stalls": after some point
            gold does not rise measurably, and gains less than half of the gain at its earlier pace.
            "slows": after some point gold rises, but more slowly than before. "follows": none of
            these. "flat": the reward does not rise measurably.
        reward, gold, kl: values where gold diverges; for "follows" and "flat", at the last point.
            kl is None if the row has no KL.
        reward_gain, gold_gain: gains from there to the last point; for "follows" and
            "flat", from the first point to the last.
        gold_at_pace: the gain of gold after the divergence at its earlier pace; None for
            "follows" and "flat", and if gold never rose.
    """

    kind: Kind
    reward: float
    gold: float
    kl: float | None
    reward_gain: dict[str, Any]
    gold_gain: dict[str, Any]
    gold_at_pace: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_divergence(rows: Sequence[Row]) -> Divergence:
    """Find where gold stops rising with the reward on one curve.

    Args:
        rows: two or more; the first is the row of the starting policy.
    """
    assert len(rows) >= 2, "a curve has two points"
    first, last = rows[0], rows[-1]
    peak = max(rows, key=lambda row: _mean(row, "gold"))
    if peak is not last and _rises(peak, last, "reward") and _falls(peak, last, "gold"):
        return _diverged("falls", peak, peak, last, _pace(first, peak))
    if _rises(first, last, "reward") and not _rises(first, last, "gold"):
        return _diverged("stalls", first, first, last)
    between = [
        row
        for row in rows[1:-1]
        if _rises(first, row, "reward") and _rises(row, last, "reward") and _pace(first, row) > 0
    ]
    kinds: tuple[tuple[Kind, float], ...] = (("stalls", 0.5), ("slows", 1.0))
    for kind, share in kinds:
        for row in between:
            pace = _pace(first, row)
            is_slower = _goes_slower(row, last, share * pace)
            if is_slower and (kind == "slows" or not _rises(row, last, "gold")):
                return _diverged(kind, row, row, last, pace)
    return _diverged("follows" if _rises(first, last, "reward") else "flat", last, first, last)


_SENTENCES = {
    "falls": "{name}: gold peaks at {gold:.2f}, at {place}, and falls by {gold_gain} while the "
    "reward rises by another {reward_gain}.",
    "never follows": "{name}: gold is not seen to follow at all: the reward rises by "
    "{reward_gain}, gold by {gold_gain}.",
    "stalls": "{name}: gold stops following at {place}, where it stands at {gold:.2f}: from there "
    "to the end the reward rises by {reward_gain}, gold by {gold_gain}, and at its pace so far by "
    "{gold_at_pace:.2f}.",
    "slows": "{name}: from {place} on gold follows more slowly: it rises by {gold_gain} while the "
    "reward rises by {reward_gain}; at its pace so far it would have risen by {gold_at_pace:.2f}.",
    "follows": "{name}: not seen in this range; gold still follows at {place}, after gains of "
    "{gold_gain} in gold and {reward_gain} in reward.",
    "flat": "{name}: the reward is not seen to rise, so nothing can part from it.",
}


def sentence(name: str, found: Divergence) -> str:
    """Describe what was found for a method in one sentence, with the numbers."""
    place = f"reward {found.reward:.2f}"
    if found.kl is not None:
        place += f" (KL {found.kl:.1f} nats)"
    never = found.kind == "stalls" and found.gold_at_pace is None
    return _SENTENCES["never follows" if never else found.kind].format(
        name=name,
        place=place,
        gold=found.gold,
        gold_gain=_range(found.gold_gain),
        reward_gain=_range(found.reward_gain),
        gold_at_pace=found.gold_at_pace,
    )


def _diverged(
    kind: Kind, place: Row, start: Row, end: Row, pace: float | None = None
) -> Divergence:
    reward_gain = _gain(start, end, "reward")
    assert reward_gain.mean is not None, "rows of a curve share their prompts"
    return Divergence(
        kind,
        _mean(place, "reward"),
        _mean(place, "gold"),
        kl_of(place),
        reward_gain.as_dict(),
        _gain(start, end, "gold").as_dict(),
        None if pace is None else pace * reward_gain.mean,
    )


def kl_of(row: Row) -> float | None:
    """Return the KL of a row in nats per response; for best-of-N, an upper bound; None if
    unknown."""
    metrics = row["metrics"]
    value: float | None = (metrics.get("kl") or metrics.get("kl_bound") or {}).get("mean")
    return value


def _gain(start: Row, end: Row, metric: str) -> Estimate:
    after, before = (measure_from_json(row["per_prompt"][metric]) for row in (end, start))
    return paired_difference(after, before)


def _rises(start: Row, end: Row, metric: str) -> bool:
    low = _gain(start, end, metric).low
    return low is not None and low > 0


def _falls(start: Row, end: Row, metric: str) -> bool:
    high = _gain(start, end, metric).high
    return high is not None and high < 0


def _goes_slower(start: Row, end: Row, pace: float) -> bool:
    """Whether gold measurably rises by less than `pace` per unit of reward."""
    gold, reward = (
        [measure_from_json(row["per_prompt"][metric]).values for row in (start, end)]
        for metric in ("gold", "reward")
    )
    shared = [i for i in gold[0] if all(i in values for values in (gold[1], *reward))]
    lag = {i: (gold[1][i] - gold[0][i]) - pace * (reward[1][i] - reward[0][i]) for i in shared}
    high = estimate(Measure(lag)).high
    return high is not None and high < 0


def _pace(start: Row, end: Row) -> float:
    """Compute how much gold was gained per unit of reward."""
    gold, reward = (_mean(end, metric) - _mean(start, metric) for metric in ("gold", "reward"))
    return gold / reward if reward else 0.0


def _mean(row: Row, metric: str) -> float:
    return float(row["metrics"][metric]["mean"])


def _range(gain: Mapping[str, Any]) -> str:
    return f"{gain['mean']:.2f} [{gain['low']:.2f}, {gain['high']:.2f}]"
