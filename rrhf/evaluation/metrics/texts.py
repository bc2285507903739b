"""How long the responses are, and whether they end: means over the responses of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rrhf.evaluation.measure import Measure, candidate_mean
from rrhf.evaluation.metrics.spec import Column, Metric
from rrhf.records import CandidateSet

if TYPE_CHECKING:
    from rrhf.evaluation.draft import Draft


def length_in_words(sets: Sequence[CandidateSet]) -> Measure:
    """Blank-separated words in a response."""
    return candidate_mean(sets, lambda _, candidate: float(len(candidate.response.split())))


def share_empty(sets: Sequence[CandidateSet]) -> Measure:
    """Share of responses without a word."""
    return candidate_mean(sets, lambda _, candidate: float(not candidate.response.strip()))


def share_without_end(sets: Sequence[CandidateSet]) -> Measure:
    """Share of responses that reached the length limit instead of an end ("without EOS")."""
    return candidate_mean(sets, lambda _, candidate: float(candidate.finish_reason == "length"))


def measure_length(draft: Draft) -> Mapping[str, Measure]:
    """Tokens of the reference's tokenizer in a response, without its end."""
    assert draft.shared.reference is not None
    encode = draft.shared.reference.codec.encode_response
    return {
        "length": candidate_mean(
            draft.sets, lambda s, c: float(len(encode(s, c.response, "length")))
        )
    }


LENGTH = Metric(
    {"length": Column("tokens", 1)}, measure_length, needs=("reference",), phase="likelihoods"
)
WORDS = Metric(
    {"words": Column("words", 1, shown=False)},
    lambda draft: {"words": length_in_words(draft.sets)},
)
WITHOUT_EOS = Metric(
    {"without_eos": Column("no EOS", better="↓", gain=False)},
    lambda draft: {"without_eos": share_without_end(draft.sets)},
)
EMPTY = Metric(
    {"empty": Column("empty", better="↓", shown=False)},
    lambda draft: {"empty": share_empty(draft.sets)},
)
