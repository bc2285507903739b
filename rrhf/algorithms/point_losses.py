"""Losses of single candidates against a reference, from what their scores say of each.

Scores become a target for each candidate: desirable or not (`kto_loss`), the share of candidates
that it beats (`sppo_loss`), its quantile (`qrpo_loss`), or a weight (`topr_loss`). Each loss is a
sum over the candidates of a prompt that are counted; their number is `valid.sum(-1)`.

Targets that compare a candidate with its list say nothing where all scores are equal, or where
there is only one: the caller leaves such prompts out, by `valid` (`rank_losses.ranked_candidates`).

Legend: B prompts, K candidates per prompt (padded; `valid` says which exist and have a score),
rho = S - S_reference, the log ratio of a whole response in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rrhf.algorithms.masked import masked_sum


def deviations(scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """How each score compares with the mean of its prompt.

    Args:
        scores: [B, K] any scale.
        valid: [B, K] True where a candidate exists.

    Returns:
        [B, K] bool, above the mean; [B, K] float64, score minus mean; False and 0 where no
        candidate exists. Computed in double, where a sum of float32 scores is exact, so that a
        score that equals the mean never counts as more.
    """
    known = torch.where(valid, scores, torch.zeros_like(scores)).double()
    count = valid.sum(-1, keepdim=True)
    total = known.sum(-1, keepdim=True)
    above = valid & (known * count > total)
    deviation = known - total / count.clamp_min(1)
    return above, torch.where(valid, deviation, torch.zeros_like(deviation))


def win_shares(scores: Tensor, valid: Tensor, count_itself: bool = True) -> Tensor:
    """The share of a prompt's candidates that each one beats; equal scores count half.

    Args:
        scores: [B, K] any scale, only the order counts.
        valid: [B, K] True where a candidate exists.
        count_itself: each candidate meets itself too, a tie: the estimate of Wu et al. 2024, SPPO,
            arXiv:2405.00675, from K samples. Without it the better of two beats all others.

    Returns:
        [B, K] float64 between 0 and 1; 1/2 where there is nobody to meet.
    """
    both = valid.unsqueeze(-1) & valid.unsqueeze(-2)
    mine, its = scores.unsqueeze(-1), scores.unsqueeze(-2)
    itself = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    if not count_itself:
        both = both & ~itself
    wins = (both & (mine > its)).sum(-1) + 0.5 * (both & ((mine == its) | itself)).sum(-1)
    met = both.sum(-1)
    return torch.where(met > 0, wins.double() / met.clamp_min(1), 0.5)


def quantiles(scores: Tensor, valid: Tensor) -> Tensor:
    """The share of a prompt's candidates whose score is not above one's own, itself included.

    Args:
        scores: [B, K] any scale, only the order counts.
        valid: [B, K] True where a candidate exists.

    Returns:
        [B, K] float64, above 0 and at most 1; 0 where no candidate exists.
    """
    both = valid.unsqueeze(-1) & valid.unsqueeze(-2)
    reached = (both & (scores.unsqueeze(-1) >= scores.unsqueeze(-2))).sum(-1)
    return reached.double() / valid.sum(-1, keepdim=True).clamp_min(1)


def log_ratio_of_others(log_ratios: Tensor, valid: Tensor) -> Tensor:
    """What each candidate's prompt says of the KL from the reference: KTO's reference point.

    max(0, the mean log ratio of the prompt's other candidates), without gradient. Ethayarajh et al.
    2024, KTO, arXiv:2402.01306, average over other prompts' responses in the batch;
    then a loss depends on how the batch is cut into micro-batches and ranks, and those pairs need
    forwards of their own. The other candidates of the prompt are real responses to it.

    Returns:
        [B, K] nats, 0 or more; 0 where there is no other candidate.
    """
    known = torch.where(valid, log_ratios, torch.zeros_like(log_ratios)).detach()
    others = (valid.sum(-1, keepdim=True) - valid.long()).clamp_min(1)
    return ((known.sum(-1, keepdim=True) - known) / others).clamp_min(0.0)


def kto_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    valid: Tensor,
    kl: Tensor,
    beta: float = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Desirable candidates above a reference point, undesirable ones below: no pairs are needed.

    Sum of w_D (1 - sigmoid(beta (rho - z))) over desirable and w_U (1 - sigmoid(beta (z - rho)))
    over undesirable candidates: Ethayarajh et al. 2024, KTO, arXiv:2402.01306.

    Args:
        log_ratios: [B, K] rho.
        desirable: [B, K] bool.
        valid: [B, K] True where a candidate is counted.
        kl: [B, K] z, without gradient (`log_ratio_of_others`, or zeros).
        beta: per nat.
        weights: w_D and w_U.

    Returns:
        [B]; zero where nothing is counted.
    """
    lead = torch.where(valid, beta * (log_ratios - kl), torch.zeros_like(log_ratios))
    good, bad = weights
    losses = torch.where(desirable, good * (-lead).sigmoid(), bad * lead.sigmoid())
    return masked_sum(losses, valid)


def sppo_loss(log_ratios: Tensor, shares: Tensor, valid: Tensor, eta: float) -> Tensor:
    """Sum over candidates of (rho_i - eta (P_i - 1/2))^2, P_i the probability that i wins.

    Wu et al. 2024, SPPO, arXiv:2405.00675, equation 4.7 (the log of the normaliser is taken for
    eta / 2, as there).

    Args:
        log_ratios: [B, K] rho.
        shares: [B, K] P, as `win_shares` estimates it.
        valid: [B, K] True where a candidate is counted.
        eta: nats per unit of probability, above 0.

    Returns:
        [B] nats squared; zero where nothing is counted.
    """
    missing = log_ratios - eta * (shares - 0.5).to(log_ratios.dtype)
    return masked_sum(torch.where(valid, missing, torch.zeros_like(missing)).square(), valid)


def qrpo_loss(log_ratios: Tensor, targets: Tensor, valid: Tensor, beta: float = 0.1) -> Tensor:
    """Sum over candidates of (q_i - beta log Z - beta rho_i)^2, q_i the quantile of a score.

    Quantiles of the reference's samples are uniform, so Z is known: beta (e^(1/beta) - 1).
    Matrenok et al. 2025, QRPO, arXiv:2507.08068, equation 11; log Z is computed exactly,
    where the authors' program leaves out log(1 - e^(-1/beta)).

    Args:
        log_ratios: [B, K] rho.
        targets: [B, K] q, as `quantiles` estimates it.
        valid: [B, K] True where a candidate is counted.
        beta: strength of the pull to the reference, above 0.

    Returns:
        [B]; zero where nothing is counted.
    """
    log_normaliser = math.log(beta) + 1 / beta + math.log1p(-math.exp(-1 / beta))
    missing = (targets - beta * log_normaliser).to(log_ratios.dtype) - beta * log_ratios
    return masked_sum(torch.where(valid, missing, torch.zeros_like(missing)).square(), valid)


def topr_loss(logprobs: Tensor, sampler_logprobs: Tensor, rewards: Tensor, valid: Tensor) -> Tensor:
    """REINFORCE on kept samples: plain for good ones, truncated importance sampling for bad ones.

    -sum_i c_i r_i S_i, c_i = 1 where r_i >= 0, else min(1, pi / mu) without gradient: Le Roux et
    al. 2025, TOPR, arXiv:2503.14286. A bad sample that the policy has become unlikely
    to draw has no pull left. The value falls without bound and is no measure of progress.

    Args:
        logprobs: [B, K] S in nats.
        sampler_logprobs: [B, K] log mu, of the policy that drew the samples.
        rewards: [B, K] r, above 0 for good samples.
        valid: [B, K] True where a candidate is counted.

    Returns:
        [B]; zero where nothing is counted.
    """
    log_ratios = torch.where(valid, logprobs - sampler_logprobs, torch.zeros_like(logprobs))
    kept = torch.where(rewards >= 0, 1.0, log_ratios.detach().clamp_max(0.0).exp())
    weights = torch.where(valid, kept * rewards, torch.zeros_like(logprobs)).to(logprobs.dtype)
    known = torch.where(valid, logprobs, torch.zeros_like(logprobs))
    return masked_sum(-weights * known, valid)
