"""How often a response is better than the baseline's response to the same prompt.

Each response to a prompt is compared with each of the baseline's responses. A tie counts half; the
share of ties is reported too. Another sample of the baseline itself should win about half of the
comparisons.

A scorer whose scores compare the responses to one prompt, such as `judge:pairwise`, is shown the
two responses of each comparison together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rrhf.evaluation.measure import Measure
from rrhf.evaluation.metrics.spec import Column, Metric
from rrhf.evaluation.reward import score_sets
from rrhf.records import CandidateSet
from rrhf.scoring.scorer import Scorer

if TYPE_CHECKING:
    from rrhf.evaluation.draft import Draft

# Through rounding, the score of a text depends on the other texts of its batch.
TIE_MARGIN = 1e-5


@dataclass(frozen=True)
class WinRate:
    """The result of a comparison with the baseline.

    Attributes:
        win: for each prompt, the share of wins plus half the share of ties, 0..1.
        tie: for each prompt, the share of ties, 0..1.
        skipped: number of prompts for which the row or the baseline has no scored response.
    """

    win: Measure
    tie: Measure
    skipped: int


def win_rate(
    scores: Mapping[str, Sequence[float | None]],
    baseline: Mapping[str, Sequence[float | None]],
    tie_margin: float = TIE_MARGIN,
) -> WinRate:
    """Compare scores with the baseline's, prompt by prompt.

    Args:
        scores: prompt id -> the score of each response; None = not scored, left out.
        baseline: prompt id -> the score of each of the baseline's responses.
        tie_margin: scores that differ by at most this much count as equal.
    """
    wins: dict[str, float] = {}
    ties: dict[str, float] = {}
    for prompt_id, ours in scores.items():
        differences = [
            a - b
            for a in ours
            for b in baseline.get(prompt_id, ())
            if a is not None and b is not None
        ]
        if not differences:
            continue
        tied = sum(abs(difference) <= tie_margin for difference in differences)
        won = sum(difference > tie_margin for difference in differences)
        wins[prompt_id] = (won + tied / 2) / len(differences)
        ties[prompt_id] = tied / len(differences)
    return WinRate(Measure(wins), Measure(ties), len(scores) - len(wins))


def compared_win_rate(
    scorer: Scorer,
    sets: Sequence[CandidateSet],
    baseline: Mapping[str, CandidateSet],
    max_unscored_fraction: float,
) -> tuple[WinRate, int]:
    """Compare responses with the baseline's, each pair scored together.

    Args:
        scorer: scores the two responses of a pair.
        sets: the prompts with their responses.
        baseline: prompt id -> the baseline's responses.
        max_unscored_fraction: share of the pairs on which the scorer may fail.

    Returns:
        the result, and the number of pairs without scores, which are left out.

    Raises:
        UserError: the scorer failed on a larger share of the pairs.
    """
    pairs = [
        replace(s, candidates=(ours, theirs))
        for s in sets
        if s.id in baseline
        for ours in s.candidates
        for theirs in baseline[s.id].candidates
    ]
    scored = score_sets(scorer, pairs, max_unscored_fraction)
    won: dict[str, list[float]] = {}
    for pair in scored:
        ours, theirs = pair.scores
        if ours is not None and theirs is not None:
            won.setdefault(pair.id, []).append((ours > theirs) + (ours == theirs) / 2)
    wins = {prompt: sum(found) / len(found) for prompt, found in won.items()}
    ties = {prompt: found.count(0.5) / len(found) for prompt, found in won.items()}
    failed = len(pairs) - sum(map(len, won.values()))
    return WinRate(Measure(wins), Measure(ties), len(sets) - len(wins)), failed


def measure(draft: Draft) -> Mapping[str, Measure]:
    """Compute win rates by reward and by gold, where both the row and the baseline have scores."""
    baseline = draft.shared.baseline
    assert baseline is not None
    measures: dict[str, Measure] = {}
    shared = draft.shared
    if shared.scorer is not None and shared.only_compares:
        found, failed = compared_win_rate(
            shared.scorer, draft.sets, baseline.sets, shared.max_unscored_fraction
        )
        measures |= {"win_reward": found.win, "tie_reward": found.tie}
        draft.counts["prompts_without_reward_comparison"] = found.skipped
        draft.counts["comparisons_without_verdict"] = failed
    for kind, ours, theirs in (
        ("reward", {s.id: list(s.scores) for s in draft.sets}, baseline.rewards),
        ("gold", draft.gold, baseline.gold),
    ):
        if ours and theirs:
            won = win_rate(ours, theirs)
            measures |= {f"win_{kind}": won.win, f"tie_{kind}": won.tie}
            draft.counts[f"prompts_without_{kind}_comparison"] = won.skipped
    return measures


WIN_RATE = Metric(
    {
        "win_reward": Column(
            "win (reward)", better="↑", summary="wins by reward", summary_rank=4, is_relative=True
        ),
        "tie_reward": Column("tie (reward)", gain=False),
        "win_gold": Column(
            "win (gold)", better="↑", summary="wins by gold", summary_rank=3, is_relative=True
        ),
        "tie_gold": Column("tie (gold)", gain=False),
    },
    measure,
    needs=("baseline", "judge"),
)
