"""Losses over pairs of one prompt's candidates: which pairs are compared, and what each costs.

A pair of responses is a list of two; a list of K gives up to K (K - 1) / 2 pairs from K forwards.
All losses here are functions of strengths: the numbers by which the policy ranks its candidates.
With a reference they are implicit rewards, h = beta (S - S_reference), S the log-prob of a whole
response in nats; without one they are log-probs, or log-probs per token (`sequence_scores`).

Each loss is a sum over the pairs of a prompt. How many these are is `pairs.sum((-2, -1))`; what a
sum is divided by is the caller's choice, since K = 8 has 28 times the pairs of K = 2.

Legend: B prompts, K candidates per prompt (padded; `valid` says which exist and have a score).
"Lead" is the strength of the better candidate minus that of the worse.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rrhf.algorithms.masked import masked_sum
from rrhf.algorithms.rank_losses import has_order, ordered_pairs


def chosen_pairs(scores: Tensor, valid: Tensor, which: str, min_gap: float = 0.0) -> Tensor:
    """The ordered pairs that are compared; equal scores never form one.

    Args:
        scores: [B, K] any scale; only the order counts where `min_gap` is 0.
        valid: [B, K] True where a candidate exists.
        which: "all"; "best-worst": the best with the worst, the first of equals each; "adjacent":
            each candidate with those of the next higher score.
        min_gap: pairs whose scores differ by less are left out, after the choice.

    Returns:
        [B, K, K] bool; [b, i, j] is True where i is the worse and j the better of a pair.
    """
    assert which in ("all", "best-worst", "adjacent"), f"{which!r} is no choice of pairs"
    pairs = ordered_pairs(scores, valid)
    if which == "best-worst":
        # The first of the best is beaten by nobody and by no index below it; likewise the worst.
        best = _first(valid & ~pairs.any(-1))
        worst = _first(valid & ~pairs.any(-2))
        pairs = pairs & worst.unsqueeze(-1) & best.unsqueeze(-2)
    elif which == "adjacent":
        # i < k < j in score for some k: a candidate lies between the two.
        between = (pairs.unsqueeze(-1) & pairs.unsqueeze(-3)).any(-2)
        pairs = pairs & ~between
    if min_gap > 0:
        pairs = pairs & (leads(scores) >= min_gap)
    return pairs


def leads(values: Tensor) -> Tensor:
    """[B, K, K] from [B, K]: [b, i, j] is by how much j exceeds i."""
    return values.unsqueeze(-2) - values.unsqueeze(-1)


def log_odds(mean_logprobs: Tensor) -> Tensor:
    """log (P / (1 - P)) of P = e^p, p the log-prob per token.

    Hong et al. 2024, ORPO, arXiv:2403.07691, equation 4.

    Args:
        mean_logprobs: [...] p, at most 0, nats per token. Above -1e-6 it counts as -1e-6 and has
            no gradient: a response that is certain has infinite odds.

    Returns:
        [...] nats.
    """
    p = mean_logprobs.clamp_max(-1e-6)
    # log (1 - e^p) loses its digits near 0 in one form, and far from 0 in the other.
    is_near = p > -math.log(2)
    near = torch.where(is_near, p, torch.full_like(p, -1.0))
    far = torch.where(is_near, torch.full_like(p, -1.0), p)
    return p - torch.where(is_near, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def logistic_loss(
    strengths: Tensor,
    pairs: Tensor,
    margin: float | Tensor = 0.0,
    label_smoothing: float = 0.0,
    robust: bool = False,
) -> Tensor:
    """Sum over pairs of -log sigmoid(lead - margin).

    On implicit rewards this is DPO: Rafailov et al. 2023, arXiv:2305.18290, equation 7. On
    beta p with margin gamma it is SimPO (Meng et al. 2024, arXiv:2405.14734, equation 6), on
    beta S the preference term of CPO (Xu et al. 2024, arXiv:2401.08417), on log odds that of ORPO
    (Hong et al. 2024, arXiv:2403.07691, equation 7). With l(x) = -log sigmoid(x), x = lead -
    margin, and a share e of labels that are the wrong way round, a pair costs

        smoothed: (1 - e) l(x) + e l(-x)                    (Mitchell 2023, conservative DPO)
        robust:   ((1 - e) l(x) - e l(-x)) / (1 - 2 e)      (Chowdhury et al. 2024,
                                                             arXiv:2403.00409, section 3.1)

    Args:
        strengths: [B, K] see the module text.
        pairs: [B, K, K] as `chosen_pairs` gives them.
        margin: by how much the better must lead; a number, or [B, K, K] indexed [b, worse, better].
        label_smoothing: e, at least 0 and below 1/2; 0 is the plain loss in both forms.
        robust: the unbiased form, which may be negative.

    Returns:
        [B] nats; zero where there is no pair.
    """
    lead = _lead_of(strengths, pairs, margin)
    losses = -logsigmoid(lead)
    if label_smoothing:
        reverse = -logsigmoid(-lead)
        if robust:
            losses = (1 - label_smoothing) * losses - label_smoothing * reverse
            losses = losses / (1 - 2 * label_smoothing)
        else:
            losses = (1 - label_smoothing) * losses + label_smoothing * reverse
    return masked_sum(losses, pairs, dim=(-2, -1))


def ipo_loss(log_ratios: Tensor, pairs: Tensor, tau: float) -> Tensor:
    """Sum over pairs of (lead - 1 / (2 tau))^2: the lead is held at a finite value.

    Azar et al. 2023, arXiv:2310.12036, equation 17.

    Args:
        log_ratios: [B, K] S - S_reference in nats, as in the equation; or both divided by the
            length, as TRL has it.
        pairs: [B, K, K] as `chosen_pairs` gives them.
        tau: strength of the pull to the reference, above 0.

    Returns:
        [B] nats squared; zero where there is no pair.
    """
    missing = _lead_of(log_ratios, pairs, 1 / (2 * tau))
    return masked_sum(missing.square(), pairs, dim=(-2, -1))


def hinge_loss(strengths: Tensor, pairs: Tensor, margin: float = 1.0) -> Tensor:
    """Sum over pairs of max(0, margin - lead).

    Zhao et al. 2023, SLiC-HF, arXiv:2305.10425, section 2, where strengths are whole-sequence
    log-probs. The gradient is zero where the lead is exactly the margin.

    Args:
        strengths: [B, K] see the module text.
        pairs: [B, K, K] as `chosen_pairs` gives them.
        margin: delta, in the units of the strengths.

    Returns:
        [B]; zero where there is no pair.
    """
    return masked_sum(torch.relu(-_lead_of(strengths, pairs, margin)), pairs, dim=(-2, -1))


def apo_zero_loss(rewards: Tensor, pairs: Tensor) -> Tensor:
    """Sum over pairs of 1 - sigmoid(h_better) + sigmoid(h_worse): better up, worse down.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7: for data whose better responses are
    better than the policy's own.

    Args:
        rewards: [B, K] implicit rewards h.
        pairs: [B, K, K] as `chosen_pairs` gives them.

    Returns:
        [B] between 0 and twice the number of pairs; zero where there is no pair.
    """
    share = _known(rewards, pairs).sigmoid()
    losses = 1 - share.unsqueeze(-2) + share.unsqueeze(-1)
    return masked_sum(losses, pairs, dim=(-2, -1))


def apo_down_loss(rewards: Tensor, pairs: Tensor) -> Tensor:
    """Sum over pairs of sigmoid(h_better) + 1 - sigmoid(h_better - h_worse): both down, worse more.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 8: for a policy that is better than its
    data.

    Args: as in `apo_zero_loss`.

    Returns:
        [B] between 0 and twice the number of pairs; zero where there is no pair.
    """
    share = _known(rewards, pairs).sigmoid()
    losses = share.unsqueeze(-2) + 1 - _lead_of(rewards, pairs).sigmoid()
    return masked_sum(losses, pairs, dim=(-2, -1))


def all_pairs(scores: Tensor, valid: Tensor) -> Tensor:
    """Every two candidates once, equal scores included, where a prompt has different scores at all.

    Args:
        scores: [B, K] any scale.
        valid: [B, K] True where a candidate exists.

    Returns:
        [B, K, K] bool; [b, i, j] is True for i below j in the list; False everywhere in a prompt
        with one candidate, with none, or with equal scores alone.
    """
    both = (valid.unsqueeze(-1) & valid.unsqueeze(-2)).triu(1)
    return both & has_order(scores, valid)[:, None, None]


def rebel_loss(log_ratios: Tensor, scores: Tensor, pairs: Tensor, eta: float) -> Tensor:
    """Sum over pairs of ((rho_i - rho_j) / eta - (r_i - r_j))^2: gaps of scores are regressed.

    Gao et al. 2024, REBEL, arXiv:2404.16767, algorithm 1. The paper draws two samples per prompt;
    here every two candidates of a list are such a pair. Equal scores are one too (their log ratios
    should be equal), in a prompt that has different scores.

    Args:
        log_ratios: [B, K] rho = S - S_reference in nats.
        scores: [B, K] r; their scale counts.
        pairs: [B, K, K] as `all_pairs` or `chosen_pairs` gives them.
        eta: nats of log ratio per unit of score, above 0.

    Returns:
        [B] squared units of score; zero where there is no pair.
    """
    gaps = torch.where(pairs, leads(scores), torch.zeros_like(leads(scores)))
    missing = _lead_of(log_ratios, pairs) / eta - gaps
    return masked_sum(missing.square(), pairs, dim=(-2, -1))


def _lead_of(strengths: Tensor, pairs: Tensor, margin: float | Tensor = 0.0) -> Tensor:
    """[B, K, K] leads minus the margin; 0 where there is no pair, so that no gradient is NaN."""
    lead = leads(strengths) - margin
    return torch.where(pairs, lead, torch.zeros_like(lead))


def _known(strengths: Tensor, pairs: Tensor) -> Tensor:
    """[B, K] 0 for candidates that are in no pair."""
    is_compared = pairs.any(-1) | pairs.any(-2)
    return torch.where(is_compared, strengths, torch.zeros_like(strengths))


def _first(flags: Tensor) -> Tensor:
    """[B, K] the first True of each row alone."""
    return flags & (flags.long().cumsum(-1) == 1)
