"""What objectives share: which pairs they compare, how a loss is counted, and the SFT term.

A loss per prompt is a sum over parts: pairs, candidates, or the list as one. `averaged` divides by
the parts of a prompt, or leaves that to the trainer, which divides by those of the whole batch.
Nothing here imports torch when it is imported, so that flags are read without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from rrhf.ranges import NOT_NEGATIVE, check_ranges
from rrhf.training.methods.objectives.spec import RankedGroups, RankLoss, RankTerms

if TYPE_CHECKING:
    from torch import Tensor

Measure = Callable[[RankedGroups, "Tensor", "Tensor | None"], "tuple[Tensor, Tensor]"]
"""Groups and log-probs as `RankLoss.terms` gets them -> [B] loss, [B, K] strengths."""

PairMeasure = Callable[[RankedGroups, "Tensor", "Tensor | None", "Tensor"], "tuple[Tensor, Tensor]"]
"""The same with the pairs, [B, K, K]."""

SFTReduction = Literal["prompt", "response", "token"]

ONLY_SFT = "the rank term stays zero and only the SFT term trains"


@dataclass
class PairSettings:
    """Which pairs of a list are compared, and how their losses are averaged."""

    pairs: Literal["all", "best-worst", "adjacent"] = "all"
    """Which pairs of a list are compared: all = every two of different scores; best-worst = the
    best with the worst; adjacent = each with those of the next higher score."""

    pair_reduction: Literal["prompt", "pair"] = "prompt"
    """prompt = the mean over a prompt's pairs, averaged over the prompts that have some; pair = the
    mean over all pairs, so that longer lists weigh more."""

    min_score_gap: float = 0.0
    """Pairs whose scores differ by less are not compared."""

    def __post_init__(self) -> None:
        check_ranges(self, {"min_score_gap": NOT_NEGATIVE})


def log_ratios(
    groups: RankedGroups, logprobs: Tensor, reference: Tensor | None, per_token: bool = False
) -> Tensor:
    """[B, K] log p - log p_reference of whole responses, or per token, in nats."""
    from rrhf.algorithms.rank_losses import sequence_scores

    assert reference is not None, "this objective needs a reference"
    found = logprobs - reference
    return sequence_scores(found, groups.lengths) if per_token else found


def averaged(
    name: str,
    parts: Callable[[RankedGroups], Tensor],
    measure: Measure,
    by_prompt: bool = True,
    without_order: str | None = "nothing is learnt",
) -> RankLoss:
    """One term from a sum over the parts of each prompt.

    Args:
        name: of the term.
        parts: [B] how many parts each prompt's sum has.
        measure: the sums, and by what the policy ranks.
        by_prompt: the mean over a prompt's parts, averaged over the prompts that have some; else
            the mean over all parts.
        without_order: as in `RankLoss`.
    """

    def counts(groups: RankedGroups) -> dict[str, Tensor]:
        count = parts(groups)
        return {name: count.clamp_max(1) if by_prompt else count}

    def terms(groups: RankedGroups, logprobs: Tensor, reference: Tensor | None) -> RankTerms:
        loss, strengths = measure(groups, logprobs, reference)
        if by_prompt:
            loss = loss / parts(groups).clamp_min(1)
        strengths = strengths.detach()
        metrics = {}
        if reference is not None:
            total = (strengths * groups.valid).sum(-1)
            metrics["implicit_reward"] = (total, groups.valid.sum(-1))
        return RankTerms({name: loss}, strengths, metrics)

    return RankLoss({name: 1.0}, counts, terms, without_order)


def over_pairs(name: str, settings: PairSettings, measure: PairMeasure) -> RankLoss:
    """One term from a sum over the pairs that the settings choose."""
    from rrhf.algorithms.pair_losses import chosen_pairs

    def pairs_of(groups: RankedGroups) -> Tensor:
        return chosen_pairs(groups.scores, groups.valid, settings.pairs, settings.min_score_gap)

    def measured(
        groups: RankedGroups, logprobs: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return measure(groups, logprobs, reference, pairs_of(groups))

    def count(groups: RankedGroups) -> Tensor:
        return pairs_of(groups).sum((-2, -1))

    loss = averaged(name, count, measured, settings.pair_reduction == "prompt")
    if not settings.min_score_gap:
        return loss

    def terms(groups: RankedGroups, logprobs: Tensor, reference: Tensor | None) -> RankTerms:
        found = loss.terms(groups, logprobs, reference)
        compared = {"compared_pairs_per_prompt": (count(groups), groups.weights)}
        return replace(found, metrics=found.metrics | compared)

    return replace(loss, terms=terms)


def over_lists(name: str, measure: Measure) -> RankLoss:
    """One term from a number for each list, averaged over the prompts with something to rank."""
    from rrhf.algorithms.rank_losses import has_order

    return averaged(name, lambda g: has_order(g.scores, g.valid).long(), measure)


def sft_counts(groups: RankedGroups, reduction: SFTReduction) -> Tensor:
    """[B] what each prompt adds to the denominator of cross-entropy on its best candidate."""
    import torch

    from rrhf.algorithms.rank_losses import of_best_candidate

    if reduction == "token":
        return of_best_candidate(groups.lengths, groups.scores, groups.valid)
    return torch.ones_like(groups.weights)


def sft_losses(groups: RankedGroups, logprobs: Tensor, reduction: SFTReduction) -> Tensor:
    """[B] cross-entropy on the best candidate: a sum over its tokens, or (response) their mean."""
    from rrhf.algorithms.rank_losses import best_candidate_nll, of_best_candidate

    loss = best_candidate_nll(logprobs, groups.scores, groups.valid)
    if reduction == "response":
        loss = loss / of_best_candidate(groups.lengths, groups.scores, groups.valid).clamp_min(1)
    return loss


def with_sft(
    rank: RankLoss,
    weight: float,
    reduction: SFTReduction,
    factors: Callable[[RankedGroups], Any] = lambda groups: 1.0,
) -> RankLoss:
    """The same with cross-entropy on the best candidate, as the term `sft`.

    Args:
        rank: the other terms.
        weight: of the new one.
        reduction: see `sft_counts` and `sft_losses`.
        factors: [B] by which each prompt's loss is multiplied.
    """

    def counts(groups: RankedGroups) -> dict[str, Tensor]:
        return {**rank.counts(groups), "sft": sft_counts(groups, reduction)}

    def terms(groups: RankedGroups, logprobs: Tensor, reference: Tensor | None) -> RankTerms:
        found = rank.terms(groups, logprobs, reference)
        loss = sft_losses(groups, logprobs, reduction) * factors(groups)
        return replace(found, losses={**found.losses, "sft": loss})

    weights = {**rank.weights, "sft": weight}
    without_order = ONLY_SFT if weight > 0 else rank.without_order
    return replace(rank, weights=weights, counts=counts, terms=terms, without_order=without_order)
