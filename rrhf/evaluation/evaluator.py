"""Measures rows on the same prompts and with the same models, so that rows can be compared.

A row holds measurements: of a policy with one decoding, of best-of-N of a policy, or of responses
that already exist (in a data set or a file). Prompts, scorer, world, reference policy,
baseline and human responses are loaded once for all rows; each row adds only its policy. A row is a
dict, ready for JSON:

    {"name": "RRHF", "metrics": {"gold": {"mean": 0.47, "low": 0.40, "high": 0.54, "n": 200}, ...},
     "per_prompt": {...}, "made_with": {...}, "counts": {...}, "cost": {...}, "notes": [...]}

`made_with` records what must be equal in rows that are compared; paired differences are computed
from `per_prompt`. The metrics and their needs are defined in `rrhf.evaluation.metrics`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

from rrhf.errors import UserError
from rrhf.evaluation.bootstrap import CONFIDENCE, RESAMPLES
from rrhf.evaluation.draft import Draft, Value, describe_decoding
from rrhf.evaluation.likelihoods import LikelihoodReader
from rrhf.evaluation.measure import MAX_UNSCORED_FRACTION, Measure
from rrhf.evaluation.metrics import METRICS, chosen_metrics
from rrhf.evaluation.metrics.spec import Metric
from rrhf.evaluation.responses import as_sets, write_responses
from rrhf.evaluation.reward import keep_best, score_sets
from rrhf.evaluation.shared import BaselineScores, Shared, fingerprint
from rrhf.generation.engine import GenerationEngine, SamplingParams
from rrhf.records import CandidateSet
from rrhf.user_code import guarded
from rrhf.worlds import gold_scores

logger = logging.getLogger(__name__)

Values = Mapping[str, Value]


class Evaluator:
    """Measures rows; the module's docstring describes them.

    Attributes:
        shared: the prompts, models and data that all rows share.
        metrics: the metrics to measure, by name; a metric whose needs are not met is left out.
        samples: row name -> the measured responses with their scores.
    """

    def __init__(
        self,
        shared: Shared,
        metrics: Sequence[str] = (),
        confidence: float = CONFIDENCE,
        resamples: int = RESAMPLES,
        max_unscored_fraction: float = MAX_UNSCORED_FRACTION,
    ) -> None:
        """Choose the metrics.

        Args:
            shared: the prompts, models and data that all rows share.
            metrics: names or import paths of metrics; empty = all listed metrics.
            confidence: confidence of the intervals.
            resamples: number of bootstrap resamples.
            max_unscored_fraction: the evaluation stops if the scorer fails on a larger share of the
                responses.
        """
        self.shared = shared
        self.metrics = chosen_metrics(metrics)
        self.confidence = confidence
        self.resamples = resamples
        shared.max_unscored_fraction = self.max_unscored_fraction = max_unscored_fraction
        if shared.only_compares and any("scorer" in self.metrics[m].needs for m in metrics):
            assert shared.scorer is not None, "who compares is a scorer"
            raise UserError(
                f"--metrics {' '.join(metrics)}: {shared.scorer.name} compares the responses to "
                "one prompt, so a mean of its scores says nothing; leave out reward"
            )
        self.samples: dict[str, list[CandidateSet]] = {}

    # Rows.

    def row(
        self,
        name: str,
        engine: GenerationEngine,
        params: SamplingParams,
        best_of: int = 1,
        policy: LikelihoodReader | None = None,
        policy_measures: Values | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Generate responses to the prompts and measure them.

        Args:
            name: the row's name.
            engine: generates the responses.
            params: decoding; `num_return_sequences` responses to each prompt are kept.
            best_of: N: of every N samples, the one with the highest score is kept.
            policy: computes likelihoods under the policy; None if that is not possible here.
            policy_measures: the result of the method `policy_measures` for this policy.
            extra: further keys of the row, such as the cost of training.
        """
        scorer = self.shared.scorer
        assert best_of == 1 or scorer is not None, "the best of N is chosen by a scorer"
        draft = Draft(name, self.shared, policy, params, best_of)
        drawn = replace(params, num_return_sequences=params.num_return_sequences * best_of)
        with draft.cost.timed("generation"):
            samples = write_responses(name, engine, self.shared.prompts, drawn)
        passes = sum(len(written) for written in samples)
        draft.cost.count_passes("policy", passes)
        draft.cost.prompt_tokens = sum(len(written[0].prompt_ids or ()) for written in samples)
        draft.cost.generated_tokens = None
        if all(sample.known_tokens is not None for one in samples for sample in one):
            draft.cost.generated_tokens = sum(x.num_tokens for one in samples for x in one)
        draft.sets = as_sets(name, self.shared.prompts, samples)
        if failed := sum(bool(sample.failure) for one in samples for sample in one):
            draft.sets = _answered(name, draft.sets, drawn.num_return_sequences, best_of)
            draft.counts["responses_not_given"] = failed
            draft.counts["prompts_without_response"] = len(samples) - len(draft.sets)
            passes = sum(len(s.candidates) for s in draft.sets)
        if scorer is not None and (best_of > 1 or not scorer.is_relative):
            with draft.cost.timed("scoring"):
                draft.sets = score_sets(scorer, draft.sets, self.max_unscored_fraction)
            draft.cost.count_passes("scorer" if best_of == 1 else "chooser", passes)
        if best_of > 1:
            draft.sets = keep_best(draft.sets, best_of)
        elif engine.capabilities.ids and engine.capabilities.logprobs:
            draft.samples = samples
        self._measure(draft, "samples")
        if policy_measures is not None:
            draft.add("policy", policy_measures)
        elif best_of == 1:
            self._measure_policy(draft)
        return self._finished(draft, describe_decoding(params, best_of), extra)

    def responses_row(
        self,
        name: str,
        sets: Sequence[CandidateSet],
        kind: str = "written",
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Measure responses that already exist.

        Args:
            name: the row's name.
            sets: the responses. Prompts of the evaluation that have no response are counted;
                responses to other prompts are left out.
            kind: recorded as the decoding of the responses.
            extra: further keys of the row.
        """
        draft, prompts = Draft(name, self.shared), self.shared.prompts
        given = {s.id: s.candidates for s in sets}
        draft.sets = [replace(s, candidates=given[s.id]) for s in prompts if given.get(s.id)]
        draft.counts["prompts_without_response"] = len(prompts) - len(draft.sets)
        if self.shared.scorer is not None and not self.shared.only_compares:
            with draft.cost.timed("scoring"):
                draft.sets = score_sets(self.shared.scorer, draft.sets, self.max_unscored_fraction)
            draft.cost.count_passes("scorer", sum(len(s.candidates) for s in draft.sets))
        return self._finished(draft, {"kind": kind}, extra)

    def set_baseline(self, name: str, sets: Sequence[CandidateSet]) -> None:
        """Set, and score, the responses with which the win rates of later rows are computed.

        Generate these responses with another seed than those of the baseline's own row: with the
        same seed, that row would be compared with itself, and every response would tie.
        """
        wanted = {s.id for s in self.shared.prompts}
        scorer, world = self.shared.scorer, self.shared.gold
        kept = [s for s in sets if s.id in wanted and s.candidates]
        rewards: dict[str, list[float | None]] = {}
        if scorer is not None and not scorer.is_relative:
            kept = score_sets(scorer, kept, self.max_unscored_fraction)
            rewards = {s.id: list(s.scores) for s in kept}
        gold = {} if world is None else gold_scores(world, kept)
        self.shared.baseline = BaselineScores(
            f"{name}#{fingerprint(kept)}", rewards, gold, {s.id: s for s in kept}
        )

    def sample(
        self, name: str, engine: GenerationEngine, params: SamplingParams
    ) -> list[CandidateSet]:
        """Generate responses to the prompts without measuring them; used for a baseline."""
        prompts = self.shared.prompts
        return as_sets(name, prompts, write_responses(name, engine, prompts, params))

    def policy_measures(self, policy: LikelihoodReader) -> tuple[Values, dict[str, int]]:
        """Measure the metrics that depend on the policy alone; return their values and counts."""
        draft = Draft("", self.shared, policy)
        self._measure_policy(draft)
        return draft.values, draft.counts

    # Parts of a row.

    def _measure_policy(self, draft: Draft) -> None:
        self._measure(draft, "policy")
        draft.counts = dict(sorted(draft.counts.items()))

    def _measure(self, draft: Draft, of: str) -> None:
        """Measure the metrics of this kind whose needs are met."""
        for name, metric in self.metrics.items():
            if metric.of == of and draft.has.issuperset(metric.needs):
                with draft.cost.timed(metric.phase) if metric.phase else nullcontext():
                    draft.add(name, _values(name, metric, draft))

    def _finished(
        self, draft: Draft, decoding: dict[str, Any], extra: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Measure the kept responses and put the row together."""
        self.samples[draft.name] = draft.sets
        draft.cost.responses = sum(len(s.candidates) for s in draft.sets)
        self._measure(draft, "responses")
        draft.cost.seconds.setdefault("likelihoods", 0.0)
        row = draft.as_row(self.made_with(decoding), self.confidence, self.resamples)
        return {**row, **self._own_columns(), **(extra or {})}

    def _own_columns(self) -> dict[str, Any]:
        """Describe the columns of metrics that are not listed, for tables; also name the columns
        that depend on the policy alone."""
        own = [metric for name, metric in self.metrics.items() if name not in METRICS]
        columns = {n: asdict(column) for metric in own for n, column in metric.columns.items()}
        of_policy = [name for metric in own if metric.of == "policy" for name in metric.columns]
        told = {"columns": columns, "columns_of_policy": of_policy}
        return {key: value for key, value in told.items() if value}

    def made_with(self, decoding: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries, for this decoding, that must be equal in rows that are compared."""
        metrics = self.metrics.values()
        own = {key: value for metric in metrics for key, value in metric.made_with.items()}
        return {
            "prompts": fingerprint(self.shared.prompts),
            "num_prompts": len(self.shared.prompts),
            "decoding": dict(decoding),
            **self.shared.describe({need for metric in metrics for need in metric.needs}),
            **own,
            "confidence": self.confidence,
        }


def _answered(
    name: str, sets: Sequence[CandidateSet], count: int, best_of: int
) -> list[CandidateSet]:
    """Keep the prompts with responses; to choose the best of N, those with all `count`.

    Raises:
        UserError: no prompt is left.
    """
    least = count if best_of > 1 else 1
    kept = [s for s in sets if len(s.candidates) >= least]
    missing = sum(count - len(s.candidates) for s in sets)
    logger.warning(
        "%s: %d responses were not given (refused, filtered or failed); %d of %d prompts are "
        "measured",
        name,
        missing,
        len(kept),
        len(sets),
    )
    if not kept:
        raise UserError(f"{name}: no prompt was answered, so there is nothing to measure")
    return kept


def _values(name: str, metric: Metric, draft: Draft) -> Values:
    """Measure a metric; a mistake in a user's own metric becomes a `UserError`."""
    if name in METRICS:
        return metric.measure(draft)
    with guarded(f"metric {name}:"):
        found: Any = metric.measure(draft)
    if not isinstance(found, Mapping):
        raise UserError(
            f"metric {name}: returned a {type(found).__name__}; return a dict of name -> Measure "
            "or number"
        )
    for column, value in found.items():
        numbers = value.values.values() if isinstance(value, Measure) else [value]
        if any(isinstance(one, float) and not math.isfinite(one) for one in numbers):
            raise UserError(
                f"metric {name}: {column!r} is not finite; leave such prompts out and count them"
            )
    return found
