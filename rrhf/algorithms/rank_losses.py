"""Losses that make a policy's own likelihoods rank candidates as their scores do.

RRHF (Yuan et al. 2023, arXiv:2304.05302) is two terms: a hinge over every ordered pair of a
prompt's candidates, and cross-entropy on the best one. Both are given per prompt; the loop divides
by a count summed over all ranks and micro-batches, so how a batch is cut cannot change the loss.

In addition to the paper's loss there is the one that the authors' released program computes
(`released_rrhf_loss`), which differs and is the one behind the published numbers. Losses with a
reference policy or with probabilities over whole rankings are not here.

Legend: B prompts, K candidates per prompt (padded; `valid` says which exist). Scores of candidates
that do not exist are ignored whatever they hold, NaN included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rrhf.algorithms.masked import masked_sum


def sequence_scores(
    sequence_logprobs: Tensor, lengths: Tensor, length_penalty: float = 1.0
) -> Tensor:
    """The length-normalised log-prob by which a policy ranks its candidates.

    p = S / |y| ** length_penalty, S = sum_t log P(y_t | x, y_<t): equation 1 of the RRHF paper,
    where length_penalty is 1. Log-probs are negative, so a larger penalty favours *longer*
    responses; 0 compares whole-sequence log-probs.

    Args:
        sequence_logprobs: [...] S in nats.
        lengths: [...] |y| in tokens, EOS included. Zero (padding) counts as one.
        length_penalty: exponent of the length.

    Returns:
        [...] p, nats per token when length_penalty is 1.
    """
    lengths = lengths.clamp_min(1).to(sequence_logprobs.dtype)
    return sequence_logprobs / lengths**length_penalty


def ordered_pairs(scores: Tensor, valid: Tensor) -> Tensor:
    """Which candidate is worse than which: only strictly ordered, existing ones form a pair.

    Args:
        scores: [B, K] any scale, only the order counts; equal scores form no pair.
        valid: [B, K] True where a candidate exists.

    Returns:
        [B, K, K] bool; [b, i, j] is True where candidate i scores below candidate j.
    """
    both_exist = valid.unsqueeze(-1) & valid.unsqueeze(-2)
    return (scores.unsqueeze(-1) < scores.unsqueeze(-2)) & both_exist


def has_order(scores: Tensor, valid: Tensor) -> Tensor:
    """[B] True where a prompt has two candidates with different scores: something to rank."""
    return ordered_pairs(scores, valid).any(-1).any(-1)


def ranked_candidates(scores: Tensor, valid: Tensor) -> Tensor:
    """[B, K] the candidates of those prompts that have something to rank."""
    return valid & has_order(scores, valid).unsqueeze(-1)


def _excess_of_the_worse(sequence_scores: Tensor) -> Tensor:
    """[B, K, K] p_i - p_j: how much likelier the policy finds candidate i than candidate j."""
    return sequence_scores.unsqueeze(-1) - sequence_scores.unsqueeze(-2)


def rrhf_rank_loss(sequence_scores: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """Penalise every worse candidate that the policy finds likelier than a better one.

    Sum over pairs with score_i < score_j of max(0, p_i - p_j), p the length-normalised
    log-prob: Yuan et al. 2023, RRHF, arXiv:2304.05302, equation 3. There is no margin, and the
    gradient is zero where p_i = p_j.

    Args:
        sequence_scores: [B, K] p, nats per token.
        scores: [B, K] any scale, only the order counts; equal scores form no pair.
        valid: [B, K] True where a candidate exists.

    Returns:
        [B] the loss of each prompt; zero where no pair is ordered.
    """
    excess = torch.relu(_excess_of_the_worse(sequence_scores))
    return masked_sum(excess, ordered_pairs(scores, valid), dim=(-2, -1))


def best_candidate(scores: Tensor, valid: Tensor) -> Tensor:
    """The candidate that the policy is to imitate: the highest score, the first of equals.

    Args:
        scores: [B, K].
        valid: [B, K] True where a candidate exists.

    Returns:
        [B] int64 index into K; 0 for a prompt without candidates (see `valid.any(-1)`).
    """
    known = torch.where(valid, scores, torch.full_like(scores, -torch.inf))
    highest = known.max(dim=-1, keepdim=True).values
    return (valid & (known == highest)).to(torch.int64).argmax(dim=-1)


def of_best_candidate(values: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """The entry of `values` that belongs to each prompt's best candidate.

    Args:
        values: [B, K], such as sequence log-probs or lengths.
        scores: [B, K].
        valid: [B, K] True where a candidate exists.

    Returns:
        [B]; zero for a prompt without candidates.
    """
    picked = values.gather(-1, best_candidate(scores, valid).unsqueeze(-1)).squeeze(-1)
    return torch.where(valid.any(-1), picked, torch.zeros_like(picked))


def best_candidate_nll(sequence_logprobs: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy on the best candidate, summed over its tokens: RRHF's SFT term.

    -sum_t log P(y_t | x, y_<t) for the first candidate with the highest score: Yuan et al. 2023,
    RRHF, arXiv:2304.05302, equation 4.

    Args:
        sequence_logprobs: [B, K] S in nats.
        scores: [B, K].
        valid: [B, K] True where a candidate exists.

    Returns:
        [B] nats; zero for a prompt without candidates.
    """
    return -of_best_candidate(sequence_logprobs, scores, valid)


def count_ordered_pairs(scores: Tensor, valid: Tensor) -> Tensor:
    """[B] int64, how many pairs of each prompt have different scores."""
    return ordered_pairs(scores, valid).sum(dim=(-2, -1))


def count_violated_pairs(sequence_scores: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """[B] int64, in how many ordered pairs the policy finds the worse candidate likelier."""
    violated = (_excess_of_the_worse(sequence_scores) > 0) & ordered_pairs(scores, valid)
    return violated.sum(dim=(-2, -1))


def count_correct_pairs(sequence_scores: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """[B] int64, in how many ordered pairs the better candidate has the higher sequence score.

    Over `count_ordered_pairs` this is the accuracy of the policy as a reward model (RRHF paper,
    table 5). Exact ties of the policy are neither correct nor violated.
    """
    correct = (_excess_of_the_worse(sequence_scores) < 0) & ordered_pairs(scores, valid)
    return correct.sum(dim=(-2, -1))


def total_margin(sequence_scores: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """[B] sum over ordered pairs of p_better - p_worse; over the pair count, the mean margin."""
    excess = _excess_of_the_worse(sequence_scores)
    return -masked_sum(excess, ordered_pairs(scores, valid), dim=(-2, -1))


def released_rrhf_loss(
    sequence_logprobs: Tensor,
    scores: Tensor,
    valid: Tensor,
    padded_widths: Tensor,
    length_penalty: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """What the program released with the RRHF paper computes, fault for fault.

    It is the loss behind the published numbers, and not the paper's: the mask from which response
    lengths were to be counted is lost before they are, so every candidate is divided by the padded
    width L of its micro-batch (query and padding included) instead of its own length, and the
    cross-entropy is a mean over that same width:

        rank = sum over score_i < score_j of max(0, S_i - S_j) / L ** length_penalty
        sft  = -S_best / L

    So nothing is normalised by length (a longer, better response counts as a violation whenever
    its summed log-prob is lower), and the loss depends on how long the longest candidate is.

    Args:
        sequence_logprobs: [B, K] S in nats.
        scores: [B, K] only the order counts; equal scores form no pair.
        valid: [B, K] True where a candidate exists.
        padded_widths: [B] L, the longest row (query and response) of each prompt. The original
            holds one prompt in a micro-batch.
        length_penalty: exponent of L in the rank term alone.

    Returns:
        rank [B] and sft [B], not yet weighted.
    """
    widths = padded_widths.clamp_min(1).to(sequence_logprobs.dtype)
    p = sequence_logprobs / widths.unsqueeze(-1) ** length_penalty
    sft = best_candidate_nll(sequence_logprobs, scores, valid) / widths
    return rrhf_rank_loss(p, scores, valid), sft
