"""Scores responses with any scorer, and keeps the best of N.

Responses without a score are left out and counted. If the scorer fails on too many of them, the
evaluation stops, because a mean over the others would mislead; a response that exceeds the window
of a reward model is not a failure and is only reported.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from rrhf.errors import UserError
from rrhf.evaluation.measure import MAX_UNSCORED_FRACTION
from rrhf.progress import Progress
from rrhf.records import CandidateSet
from rrhf.scoring.scorer import Scorer

logger = logging.getLogger(__name__)

_SETS_AT_A_TIME = 64


def score_sets(
    scorer: Scorer,
    sets: Sequence[CandidateSet],
    max_unscored_fraction: float = MAX_UNSCORED_FRACTION,
) -> list[CandidateSet]:
    """Score the candidates of all sets; existing scores are replaced.

    Raises:
        UserError: the scorer failed on more than `max_unscored_fraction` of the candidates, or no
            candidate has a score.
    """
    scored: list[CandidateSet] = []
    too_long = 0
    with Progress("score", len(sets), "prompt") as progress:
        for start in range(0, len(sets), _SETS_AT_A_TIME):
            part = sets[start : start + _SETS_AT_A_TIME]
            for s, scores in zip(part, scorer.score(part), strict=True):
                candidates = tuple(
                    replace(candidate, score=_finite_or_none(score))
                    for candidate, score in zip(s.candidates, scores, strict=True)
                )
                too_long += sum(
                    candidate.score is None and not scorer.fits(s, candidate)
                    for candidate in candidates
                )
                scored.append(replace(s, candidates=candidates))
            progress.advance(len(part))
    _check_scored(scorer.name, scored, max_unscored_fraction, too_long)
    return scored


def _check_scored(
    name: str, sets: Sequence[CandidateSet], max_unscored_fraction: float, too_long: int
) -> None:
    """Check, and log, how many candidates have no score; `too_long` of them exceed the scorer's
    window.

    Raises:
        UserError: the scorer failed on more than the given share of all candidates, or all
            responses are too long.
    """
    total = sum(len(s.candidates) for s in sets)
    missing = [s.id for s in sets for score in s.scores if score is None]
    failed = len(missing) - too_long
    if too_long and too_long == total:
        raise UserError(
            f"scorer {name}: all {total} responses exceed its window; use a reward model with a "
            "longer window, or lower max_new_tokens and max_prompt_tokens"
        )
    if failed > max_unscored_fraction * total:
        raise UserError(
            f"scorer {name}: gave no score to {failed} of {total} responses (first: prompt "
            f"{missing[0]}), more than max_unscored_fraction {max_unscored_fraction}; fix the "
            "scorer, or measure the rest: the same command with --max_unscored_fraction 1"
        )
    if missing:
        logger.warning(
            "%s: %d of %d responses have no score and are left out (%d exceed its window)",
            name,
            len(missing),
            total,
            too_long,
        )


def _finite_or_none(score: float | None) -> float | None:
    return None if score is None or not math.isfinite(score) else float(score)


def keep_best(sets: Sequence[CandidateSet], n: int) -> list[CandidateSet]:
    """Keep, of every n successive candidates, the one with the highest score (the first, if equal).

    Args:
        sets: prompts with a multiple of n candidates each; candidates without a score lose.
        n: number of candidates from which one is kept.
    """
    kept = []
    for s in sets:
        assert len(s.candidates) % n == 0, f"{len(s.candidates)} is not a multiple of {n}"
        best = []
        for start in range(0, len(s.candidates), n):
            group = s.candidates[start : start + n]
            best.append(max(group, key=lambda c: -math.inf if c.score is None else c.score))
        kept.append(replace(s, candidates=tuple(best)))
    return kept
