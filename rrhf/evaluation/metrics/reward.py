"""The mean score by the scorer of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rrhf.evaluation.measure import Measure
from rrhf.evaluation.metrics.spec import Column, Metric
from rrhf.records import CandidateSet

if TYPE_CHECKING:
    from rrhf.evaluation.draft import Draft


def reward_measure(sets: Sequence[CandidateSet]) -> Measure:
    """The mean score of a prompt's candidates; prompts without any score are left out."""
    means = {}
    for s in sets:
        known = [score for score in s.scores if score is not None]
        if known:
            means[s.id] = sum(known) / len(known)
    return Measure(means)


def measure(draft: Draft) -> Mapping[str, Measure]:
    """`reward`; responses without a score are counted."""
    draft.counts["unscored"] = sum(score is None for s in draft.sets for score in s.scores)
    return {"reward": reward_measure(draft.sets)}


REWARD = Metric(
    {"reward": Column("reward", better="↑", summary="reward", summary_rank=2)},
    measure,
    needs=("scorer",),
)
