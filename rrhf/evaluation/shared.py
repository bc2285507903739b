"""The prompts, models and data that all rows of an evaluation share."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rrhf.evaluation.likelihoods import LikelihoodReader
from rrhf.evaluation.measure import MAX_UNSCORED_FRACTION
from rrhf.evaluation.paper_perplexity import PaperPerplexity
from rrhf.records import CandidateSet, set_id
from rrhf.scoring.scorer import Scorer
from rrhf.worlds import World


@dataclass(frozen=True)
class BaselineScores:
    """Scores of the responses that win rates are measured against.

    Attributes:
        name: the baseline's name in results.
        rewards: prompt id -> scores by the evaluation's scorer.
        gold: prompt id -> gold utilities.
        sets: prompt id -> the responses.
    """

    name: str
    rewards: dict[str, list[float | None]]
    gold: dict[str, list[float | None]]
    sets: dict[str, CandidateSet] = field(default_factory=dict)


@dataclass
class Shared:
    """The prompts, models and data that all rows of an evaluation share; None or empty = not given.

    Attributes:
        prompts: held-out prompts with unique ids; their candidates are dropped.
        scorer: scores responses, and chooses the best of N.
        gold: the world that knows how good a response is.
        reference: the reference policy.
        human: sets whose candidates are all human references.
        pairs: sets of two candidates, the better one first.
        paper: the model of `ppl_paper`.
        baseline: scores of the responses that win rates are measured against.
        max_unscored_fraction: share of responses, or of comparisons, on which the scorer may fail.
    """

    prompts: Sequence[CandidateSet]
    scorer: Scorer | None = None
    gold: World | None = None
    reference: LikelihoodReader | None = None
    human: Sequence[CandidateSet] = ()
    pairs: Sequence[CandidateSet] = ()
    paper: PaperPerplexity | None = None
    baseline: BaselineScores | None = None
    max_unscored_fraction: float = MAX_UNSCORED_FRACTION

    def __post_init__(self) -> None:
        assert self.prompts, "an evaluation needs prompts"
        self.prompts = [replace(s, candidates=()) for s in self.prompts]
        assert len({s.id for s in self.prompts}) == len(self.prompts), "prompt ids are unique"
        self.human, self.pairs = map(_by_prompt_id, (self.human, self.pairs))

    @property
    def has(self) -> set[str]:
        """What every row has, as keys of `rrhf.evaluation.metrics.spec.NEEDS`.

        A scorer that only compares the responses to a prompt is a judge, but gives no scores.
        """
        there = {name for name, value in vars(self).items() if value is not None and value != []}
        there |= {"judge"} if there & {"scorer", "gold"} else set()
        return there - {"scorer"} if self.only_compares else there

    @property
    def only_compares(self) -> bool:
        """Whether the scores of one policy's responses alone would mean nothing."""
        return self.scorer is not None and self.scorer.is_relative

    def describe(self, needs: Collection[str]) -> dict[str, Any]:
        """Describe what must agree between compared rows: the scorer, and what the metrics need."""
        reference, paper, baseline = self.reference, self.paper, self.baseline
        needed = {
            "baseline": ("baseline", baseline and baseline.name),
            "reference": ("reference", reference and reference.name),
            "paper": ("ppl_model", paper and f"{paper.name}:{paper.max_tokens}"),
            "human": ("human", fingerprint(self.human) if self.human else None),
            "pairs": ("pairs", fingerprint(self.pairs) if self.pairs else None),
        }
        return {
            "scorer": self.scorer and self.scorer.name,
            "scores_are_normalized": self.scorer and self.scorer.normalized,
            **dict(described for need, described in needed.items() if need in needs),
        }


def _by_prompt_id(sets: Sequence[CandidateSet]) -> list[CandidateSet]:
    """Give each set the id of its prompt, because prompts are resampled, not rows of a file."""
    return [replace(s, id=set_id(s.query, s.messages)) for s in sets]


def fingerprint(sets: Sequence[CandidateSet]) -> str:
    """Return 16 hex digits that identify prompts and responses, whatever the order of the
    prompts."""
    digest = hashlib.sha256()
    for s in sorted(sets, key=lambda s: s.id):
        for text in (s.id, s.query, *s.responses):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "big") + data)
        digest.update(b"\n")
    return digest.hexdigest()[:16]
