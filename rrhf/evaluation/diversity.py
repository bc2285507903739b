"""How varied and how long the responses are.

distinct-n (Li et al. 2016, arXiv:1510.03055): different n-grams of words over all n-grams, taken
over all responses together. It falls with the amount of text, so it compares only rows with as many
responses of similar length. Resampling would count every doubled prompt as repetition, so it has no
interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rrhf.evaluation.bootstrap import Measure
from rrhf.records import Candidate, CandidateSet


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams of blank-separated words, as a share of all; None where there are none."""
    assert n >= 1, "an n-gram has at least one word"
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        words = text.split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else None


def candidate_mean(
    sets: Sequence[CandidateSet], value: Callable[[CandidateSet, Candidate], float]
) -> Measure:
    """The mean of something over a prompt's candidates; prompts without any are left out."""
    return Measure(
        {
            s.id: sum(value(s, c) for c in s.candidates) / len(s.candidates)
            for s in sets
            if s.candidates
        }
    )


def length_in_words(sets: Sequence[CandidateSet]) -> Measure:
    """Blank-separated words in a response."""
    return candidate_mean(sets, lambda _, candidate: float(len(candidate.response.split())))


def share_empty(sets: Sequence[CandidateSet]) -> Measure:
    """Share of responses without a word."""
    return candidate_mean(sets, lambda _, candidate: float(not candidate.response.strip()))


def share_without_end(sets: Sequence[CandidateSet]) -> Measure:
    """Share of responses that reached the length limit instead of an end ("without EOS")."""
    return candidate_mean(sets, lambda _, candidate: float(candidate.finish_reason == "length"))
