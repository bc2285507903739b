"""Where the true preference stops following the reward model, said from the rows of a curve.

A policy that is trained on a reward model raises its score for as long as one trains; what people
want follows for a while and then may not (Gao et al. 2022, arXiv:2210.10760). A curve is the rows
of one method in the order of its training, each with `reward` and `gold` by prompt. All differences
are paired over prompts, and only those whose interval leaves out zero are believed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rrhf.evaluation.bootstrap import Estimate, paired_difference
from rrhf.evaluation.results import measure_from_json

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Parting:
    """What became of gold while the learned reward rose.

    Attributes:
        kind: falls: after its peak gold falls, while reward rises; stalls: from some point on
            reward rises and gold is not seen to; follows: neither is seen; flat: the reward itself
            is not seen to rise.
        reward, gold, kl: at the point from which on gold no longer follows; at the last point where
            it follows to the end. kl is None where no policy of its own has one.
        reward_gain, gold_gain: from there to the last point; from the first to the last point where
            it follows.
    """

    kind: Literal["falls", "stalls", "follows", "flat"]
    reward: float
    gold: float
    kl: float | None
    reward_gain: dict[str, Any]
    gold_gain: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def parting(rows: Sequence[Row]) -> Parting:
    """Look for it on one curve.

    Args:
        rows: two or more, the first one before the method did anything.
    """
    assert len(rows) >= 2, "a curve has two points"
    last = rows[-1]
    peak = max(rows, key=lambda row: float(row["metrics"]["gold"]["mean"]))
    if peak is not last and _rises(peak, last, "reward") and _falls(peak, last, "gold"):
        return _parting("falls", peak, peak, last)
    for row in rows[:-1]:
        if _rises(row, last, "reward") and not _rises(row, last, "gold"):
            return _parting("stalls", row, row, last)
    kind: Literal["follows", "flat"] = "follows" if _rises(rows[0], last, "reward") else "flat"
    return _parting(kind, last, rows[0], last)


def sentence(name: str, found: Parting) -> str:
    """One sentence a method, with the numbers that it rests on."""
    reward, gold = found.reward_gain, found.gold_gain
    place = f"reward {found.reward:.2f}"
    if found.kl is not None:
        place += f" (KL {found.kl:.1f} nats)"
    if found.kind == "falls":
        return (
            f"{name}: gold peaks at {found.gold:.2f}, at {place}, and falls by {_range(gold)} "
            f"while the reward rises by another {_range(reward)}."
        )
    if found.kind == "stalls":
        return (
            f"{name}: gold stops following at {place}, where it stands at {found.gold:.2f}: from "
            f"there to the end the reward rises by {_range(reward)}, gold by {_range(gold)}."
        )
    if found.kind == "follows":
        return (
            f"{name}: not seen in this range; gold still follows at {place}, after gains of "
            f"{_range(gold)} in gold and {_range(reward)} in reward."
        )
    return f"{name}: the reward is not seen to rise, so nothing can part from it."


def _parting(
    kind: Literal["falls", "stalls", "follows", "flat"], place: Row, start: Row, end: Row
) -> Parting:
    metrics = place["metrics"]
    return Parting(
        kind,
        metrics["reward"]["mean"],
        metrics["gold"]["mean"],
        kl_of(place),
        _gain(start, end, "reward").as_dict(),
        _gain(start, end, "gold").as_dict(),
    )


def kl_of(row: Row) -> float | None:
    """Nats a response; the bound where a row is the best of several samples."""
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


def _range(gain: Mapping[str, Any]) -> str:
    return f"{gain['mean']:.2f} [{gain['low']:.2f}, {gain['high']:.2f}]"
