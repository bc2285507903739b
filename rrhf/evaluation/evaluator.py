"""Measures rows: one evaluator holds what all rows share, so that they can be compared.

A row is a policy under one decoding, the best of N of a policy, or responses that already exist
(those of a data set, or of an earlier file). The evaluator holds prompts, scorer, gold, reference
policy, baseline responses and human responses, loaded once; each row adds only its policy. A row is
a dict, ready for JSON:

    {"name": "RRHF", "metrics": {"gold": {"mean": 0.47, "low": 0.40, "high": 0.54, "n": 200}, ...},
     "per_prompt": {...}, "made_with": {...}, "counts": {...}, "cost": {...}, "notes": [...]}

`made_with` records what must agree between rows that are compared; paired differences are computed
from `per_prompt`. Each metric is defined in its own module.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rrhf.evaluation.bootstrap import CONFIDENCE, RESAMPLES, Measure
from rrhf.evaluation.divergence import best_of_n_bound
from rrhf.evaluation.diversity import (
    candidate_mean,
    distinct_n,
    length_in_words,
    share_empty,
    share_without_end,
)
from rrhf.evaluation.draft import Draft, describe_decoding, fingerprint
from rrhf.evaluation.gold import gold_measure, gold_scores, part_measures
from rrhf.evaluation.likelihoods import LikelihoodReader
from rrhf.evaluation.perplexity import PaperPerplexity, response_perplexity
from rrhf.evaluation.ranking_accuracy import ranking_accuracy
from rrhf.evaluation.responses import (
    as_sets,
    engine_prompt_ids,
    measure_divergence,
    write_responses,
)
from rrhf.evaluation.reward import MAX_UNSCORED_FRACTION, keep_best, reward_measure, score_sets
from rrhf.evaluation.win_rate import win_rate
from rrhf.generation.engine import GenerationEngine, SamplingParams
from rrhf.records import CandidateSet, set_id
from rrhf.scoring.scorer import Scorer
from rrhf.worlds import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Baseline:
    """Responses that win rates are measured against.

    Attributes:
        name: what results call it.
        rewards: prompt id -> scores by the evaluator's scorer.
        gold: prompt id -> gold utilities.
    """

    name: str
    rewards: dict[str, list[float | None]]
    gold: dict[str, list[float | None]]


class Evaluator:
    """Measures rows; see the module text.

    Attributes:
        prompts: the held-out prompts, ids unique.
        samples: row name -> the responses that were measured, with their scores.
    """

    def __init__(
        self,
        prompts: Sequence[CandidateSet],
        scorer: Scorer | None = None,
        gold: World | None = None,
        reference: LikelihoodReader | None = None,
        human: Sequence[CandidateSet] = (),
        pairs: Sequence[CandidateSet] = (),
        paper: PaperPerplexity | None = None,
        confidence: float = CONFIDENCE,
        resamples: int = RESAMPLES,
        max_unscored_fraction: float = MAX_UNSCORED_FRACTION,
    ) -> None:
        """Keep what all rows share.

        Args:
            prompts: held-out prompts; their candidates are ignored.
            scorer: for `reward`, `win_reward` and best-of-N.
            gold: the world, for `gold`, its parts and `win_gold`.
            reference: for `ppl_reference`, `kl` and lengths in tokens.
            human: sets whose candidates are all human references, for `ppl_human`.
            pairs: sets of two candidates, the better one first, for `pi_accuracy`.
            paper: for `ppl_paper`.
            confidence: of the intervals.
            resamples: of the bootstrap.
            max_unscored_fraction: a scorer that leaves out more stops the evaluation.
        """
        assert prompts, "an evaluation needs prompts"
        self.prompts = [replace(s, candidates=()) for s in prompts]
        assert len({s.id for s in self.prompts}) == len(self.prompts), "prompt ids are unique"
        self.scorer = scorer
        self.gold = gold
        self.reference = reference
        self.human = [_under_its_prompt(s) for s in human]
        self.pairs = [_under_its_prompt(s) for s in pairs]
        self.paper = paper
        self.confidence = confidence
        self.resamples = resamples
        self.max_unscored_fraction = max_unscored_fraction
        self.baseline: Baseline | None = None
        self.samples: dict[str, list[CandidateSet]] = {}

    # Rows.

    def row(
        self,
        name: str,
        engine: GenerationEngine,
        params: SamplingParams,
        best_of: int = 1,
        policy_measures: Mapping[str, Measure] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Sample a policy on the prompts and measure what it writes.

        Args:
            name: the row's name.
            engine: writes responses; if it has `model` and `codec` (as the local one), the policy's
                own likelihoods are measured too.
            params: decoding; `num_return_sequences` responses a prompt are kept.
            best_of: each kept response is the best by the scorer of so many.
            policy_measures: what `policy_measures` gave for this policy under another decoding.
            extra: keys to add to the row, such as what training cost.
        """
        assert best_of == 1 or self.scorer is not None, "the best of N is chosen by a scorer"
        draft = Draft(name)
        drawn = replace(params, num_return_sequences=params.num_return_sequences * best_of)
        with draft.cost.timed("generation"):
            samples = write_responses(name, engine, self.prompts, drawn)
        draft.cost.count_passes("policy", sum(len(written) for written in samples))
        draft.cost.generated_tokens = sum(len(x.token_ids) for written in samples for x in written)
        prompt_ids = engine_prompt_ids(engine, self.prompts, drawn)
        draft.cost.prompt_tokens = sum(len(ids) for ids in prompt_ids or ())
        sets = as_sets(name, self.prompts, samples)
        if self.scorer is not None:
            with draft.cost.timed("scoring"):
                sets = score_sets(self.scorer, sets, self.max_unscored_fraction)
            passes = sum(len(written) for written in samples)
            draft.cost.count_passes("scorer" if best_of == 1 else "chooser", passes)
        if best_of > 1:
            sets = keep_best(sets, best_of)
            draft.numbers["kl_bound"] = best_of_n_bound(best_of)
            draft.notes.append("the KL of best-of-N is a bound, from the policy that was sampled")
        else:
            with draft.cost.timed("likelihoods"):
                if self.reference is not None:
                    measure_divergence(draft, self.reference, engine, self.prompts, params, samples)
                draft.measures |= self._own_measures(draft, engine, policy_measures)
        return self._finished(draft, sets, describe_decoding(params, best_of), extra)

    def responses_row(
        self,
        name: str,
        sets: Sequence[CandidateSet],
        kind: str = "written",
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Measure responses that already exist: those of a data set, or of an earlier file.

        Args:
            name: the row's name.
            sets: responses by prompt id; prompts of the evaluator that have none are counted,
                other prompts are left out.
            kind: recorded as their decoding.
            extra: keys to add to the row.
        """
        draft = Draft(name)
        given = {s.id: s.candidates for s in sets}
        answered = [replace(s, candidates=given[s.id]) for s in self.prompts if given.get(s.id)]
        draft.counts["prompts_without_response"] = len(self.prompts) - len(answered)
        if self.scorer is not None:
            with draft.cost.timed("scoring"):
                answered = score_sets(self.scorer, answered, self.max_unscored_fraction)
            draft.cost.count_passes("scorer", sum(len(s.candidates) for s in answered))
        return self._finished(draft, answered, {"kind": kind}, extra)

    def set_baseline(self, name: str, sets: Sequence[CandidateSet]) -> None:
        """Responses that later rows are compared with, scored here if there is a scorer.

        Sample them with another seed than the baseline's own row, or that row ties with itself.
        """
        wanted = {s.id for s in self.prompts}
        kept = [s for s in sets if s.id in wanted and s.candidates]
        rewards: dict[str, list[float | None]] = {}
        if self.scorer is not None:
            kept = score_sets(self.scorer, kept, self.max_unscored_fraction)
            rewards = {s.id: list(s.scores) for s in kept}
        gold = gold_scores(self.gold, kept) if self.gold is not None else {}
        self.baseline = Baseline(f"{name}#{fingerprint(kept)}", rewards, gold)

    def sample(
        self, name: str, engine: GenerationEngine, params: SamplingParams
    ) -> list[CandidateSet]:
        """Responses to the prompts, unmeasured: for a baseline."""
        samples = write_responses(name, engine, self.prompts, params)
        return as_sets(name, self.prompts, samples)

    def policy_measures(
        self, reader: LikelihoodReader, counts: dict[str, int]
    ) -> dict[str, Measure]:
        """Metrics that depend on a policy but not on its decoding: `ppl_human`, `pi_accuracy`.

        Args:
            reader: the policy.
            counts: gets how many responses and pairs did not fit into its window.
        """
        measures: dict[str, Measure] = {}
        if self.human:
            measures["ppl_human"], dropped = response_perplexity(reader, self.human)
            counts["human_responses_that_do_not_fit"] = dropped
        if self.pairs:
            accuracy = ranking_accuracy(reader, self.pairs)
            measures["pi_accuracy"] = accuracy.accuracy
            measures["pi_tie"] = accuracy.tie
            counts["pairs_that_do_not_fit"] = accuracy.dropped
        return measures

    # Parts of a row.

    def _own_measures(
        self, draft: Draft, engine: Any, given: Mapping[str, Measure] | None
    ) -> dict[str, Measure]:
        if given is not None:
            return dict(given)
        model, codec = getattr(engine, "model", None), getattr(engine, "codec", None)
        if model is None or codec is None:
            return {}
        passes = sum(len(s.candidates) for s in self.human)
        passes += 2 * len(self.pairs)
        if passes:
            draft.cost.count_passes("policy_likelihood", passes)
        return self.policy_measures(LikelihoodReader(model, codec), draft.counts)

    def _finished(
        self,
        draft: Draft,
        sets: list[CandidateSet],
        decoding: dict[str, Any],
        extra: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """Measure the kept responses and put the row together."""
        self.samples[draft.name] = sets
        draft.cost.responses = sum(len(s.candidates) for s in sets)
        measures = draft.measures
        if self.scorer is not None:
            measures["reward"] = reward_measure(sets)
            draft.counts["unscored"] = sum(score is None for s in sets for score in s.scores)
        gold: dict[str, list[float | None]] = {}
        if self.gold is not None:
            gold = gold_scores(self.gold, sets)
            measures["gold"] = gold_measure(gold)
            measures |= part_measures(self.gold, sets)
        if self.baseline is not None:
            rewards = {s.id: list(s.scores) for s in sets}
            for kind, ours, theirs in (
                ("reward", rewards, self.baseline.rewards),
                ("gold", gold, self.baseline.gold),
            ):
                if ours and theirs:
                    won = win_rate(ours, theirs)
                    measures[f"win_{kind}"], measures[f"tie_{kind}"] = won.win, won.tie
                    draft.counts[f"prompts_without_{kind}_comparison"] = won.skipped
        with draft.cost.timed("likelihoods"):
            self._measure_naturalness(draft, sets)
        measures["words"] = length_in_words(sets)
        measures["without_eos"] = share_without_end(sets)
        measures["empty"] = share_empty(sets)
        texts = [candidate.response for s in sets for candidate in s.candidates]
        for n in (1, 2):
            draft.numbers[f"distinct_{n}"] = distinct_n(texts, n)
        row = draft.as_row(self.made_with(decoding), self.confidence, self.resamples)
        return {**row, **(extra or {})}

    def _measure_naturalness(self, draft: Draft, sets: list[CandidateSet]) -> None:
        if self.reference is not None:
            codec = self.reference.codec
            draft.measures["length"] = candidate_mean(
                sets, lambda s, c: float(len(codec.encode_response(s, c.response, "length")))
            )
            known = draft.reference_logprobs
            before = len(known)
            measure, dropped = response_perplexity(self.reference, sets, known)
            draft.measures["ppl_reference"] = measure
            draft.counts["responses_that_do_not_fit"] = dropped
            draft.cost.count_passes("reference", len(known) - before)
        if self.paper is not None:
            draft.measures |= self.paper.measures(sets)

    def made_with(self, decoding: Mapping[str, Any]) -> dict[str, Any]:
        """What must agree between rows that are compared, for a row of this decoding."""
        paper = self.paper
        return {
            "prompts": fingerprint(self.prompts),
            "num_prompts": len(self.prompts),
            "decoding": dict(decoding),
            "scorer": self.scorer and self.scorer.name,
            "scores_are_normalized": self.scorer and self.scorer.normalized,
            "baseline": None if self.baseline is None else self.baseline.name,
            "reference": None if self.reference is None else self.reference.name,
            "ppl_model": None if paper is None else f"{paper.name}:{paper.max_tokens}",
            "human": fingerprint(self.human) if self.human else None,
            "pairs": fingerprint(self.pairs) if self.pairs else None,
            "confidence": self.confidence,
        }


def _under_its_prompt(s: CandidateSet) -> CandidateSet:
    """The set under the id of its prompt, which all rows share: prompts are resampled, not rows."""
    return replace(s, id=set_id(s.query, s.messages))
