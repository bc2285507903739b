"""Does the policy itself prefer the better response? RRHF's policy as a reward model.

p = sum of log P(token) / tokens, EOS included (Yuan et al. 2023, RRHF, arXiv:2304.05302,
equation 1 and table 5); a pair is right where p of the chosen is above p of the rejected, and a tie
counts half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rrhf.evaluation.bootstrap import Measure
from rrhf.evaluation.likelihoods import LikelihoodReader, Row
from rrhf.records import CHOSEN_SOURCE, REJECTED_SOURCE, Candidate, CandidateSet


@dataclass(frozen=True)
class RankingAccuracy:
    """Attributes:
    accuracy: share of pairs that are ranked rightly, ties half, by prompt.
    tie: share of ties.
    dropped: pairs that did not fit into the model's window, or had no token to read.
    """

    accuracy: Measure
    tie: Measure
    dropped: int


def chosen_and_rejected(s: CandidateSet) -> list[tuple[Candidate, Candidate]]:
    """Every pair of a human's chosen and rejected response that are not the same text."""
    chosen = [c for c in s.candidates if c.source == CHOSEN_SOURCE]
    rejected = [c for c in s.candidates if c.source == REJECTED_SOURCE]
    return [(a, b) for a in chosen for b in rejected if a.response != b.response]


def ranking_accuracy(reader: LikelihoodReader, sets: Sequence[CandidateSet]) -> RankingAccuracy:
    """`pi_accuracy` of a policy on the pairs that the sets hold."""
    rows: list[Row] = []
    owners: list[str] = []
    dropped = 0
    for s in sets:
        for pair in chosen_and_rejected(s):
            encoded = [reader.encode(s, candidate) for candidate in pair]
            readable = [row for row in encoded if row is not None and row[1]]
            if len(readable) < 2:
                dropped += 1
                continue
            rows += readable
            owners.append(s.id)
    means = [float(logprobs.double().mean()) for logprobs in reader.read(rows)]
    right: dict[str, list[float]] = {}
    tied: dict[str, list[float]] = {}
    for owner, chosen, rejected in zip(owners, means[::2], means[1::2], strict=True):
        right.setdefault(owner, []).append((chosen > rejected) + (chosen == rejected) / 2)
        tied.setdefault(owner, []).append(float(chosen == rejected))
    return RankingAccuracy(
        Measure({owner: sum(v) / len(v) for owner, v in right.items()}),
        Measure({owner: sum(v) / len(v) for owner, v in tied.items()}),
        dropped,
    )
