"""Losses over a prompt's whole list of candidates, of any length.

There are two kinds. Losses of an order read scores as a ranking: Plackett-Luce
(`plackett_luce_loss`), its form with temperatures from score gaps (`pro_loss`), and pairs weighted
by what exchanging them would change in the ranking's gain (`lipo_loss`). Losses of a distribution
read scores as a target for the policy's own distribution over the list: `listnet_loss`, `nca_loss`,
`mpo_loss`.

All are functions of strengths h, the numbers by which the policy ranks its candidates: implicit
rewards, beta (S - S_reference), or beta times the log-prob per token where there is no reference.

Equal scores: orders take no side between them (each text says how). A prompt whose candidates all
have the same score, or that has one or none, gives exactly zero, with zero gradient: such prompts
are left out of every denominator too (`rank_losses.has_order`).

Legend: B prompts, K candidates per prompt (padded; `valid` says which exist and have a score).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from rrhf.algorithms.masked import masked_sum
from rrhf.algorithms.pair_losses import leads
from rrhf.algorithms.point_losses import deviations, win_shares
from rrhf.algorithms.rank_losses import has_order, ordered_pairs, ranked_candidates


def plackett_luce_loss(
    strengths: Tensor,
    scores: Tensor,
    valid: Tensor,
    top: int | None = None,
    margin: float = 0.0,
) -> Tensor:
    """-log of the probability of the scores' order, candidates being drawn by e^h one by one.

    Sum over the `top` best of log(e^h_k + sum over worse j of e^h_j) - h_k. On implicit rewards it
    is DPO for rankings (Rafailov et al. 2023, arXiv:2305.18290, appendix A.3), and with `top` the
    form for the best few (Tang and Feng 2025, arXiv:2510.23631); on log-probs it is ListMLE (Xia et
    al. 2008, Listwise Approach to Learning to Rank). For K = 2 it is `logistic_loss`.

    The papers leave ties open. Here candidates of equal score do not compete with each other: each
    is drawn against the strictly worse ones alone, so the order of the file never counts. Equal
    scores that share a rank are among the `top` best together.

    Args:
        strengths: [B, K] h.
        scores: [B, K] any scale, only the order counts.
        valid: [B, K] True where a candidate exists.
        top: how many ranks are fitted; None = all of them.
        margin: taken from h_k in its own draw, as in SimPO's pair form.

    Returns:
        [B] nats; zero where no two candidates have different scores.
    """
    pairs = ordered_pairs(scores, valid)  # [B, worse, better]
    fitted = pairs.any(-2)  # those that somebody is worse than
    if top is not None:
        fitted = fitted & (pairs.sum(-1) < top)
    h = _known(strengths, valid)
    ahead = h - margin
    rest = _logsumexp(h.unsqueeze(-1), pairs, dim=-2)  # [B, better]
    # log(e^a + e^b) - a = softplus(b - a)
    losses = softplus(torch.where(fitted, rest - ahead, torch.zeros_like(h)))
    return masked_sum(losses, fitted)


def pro_loss(strengths: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """Plackett-Luce with temperatures from the score gaps: PRO's ranking term.

    Sum over k of log(e^(h_k T_k) + sum over worse i of e^(h_i (r_k - r_i))) - h_k T_k, where T_k is
    the largest gap r_k - r_i: Song et al. 2023, PRO, arXiv:2306.17492, section 3, where h is the
    log-prob per token. Candidates of equal score do not compete (the paper has no ties; the
    authors' program would add a constant for each).

    Args:
        strengths: [B, K] h.
        scores: [B, K] r; their scale counts, as temperatures.
        valid: [B, K] True where a candidate exists.

    Returns:
        [B] nats; zero where no two candidates have different scores.
    """
    pairs = ordered_pairs(scores, valid)
    gaps = torch.where(pairs, leads(scores), torch.zeros_like(leads(scores)))  # [B, worse, better]
    h = _known(strengths, valid)
    ahead = h * gaps.amax(-2)
    rest = _logsumexp(h.unsqueeze(-1) * gaps, pairs, dim=-2)
    fitted = pairs.any(-2)
    losses = softplus(torch.where(fitted, rest - ahead, torch.zeros_like(h)))
    return masked_sum(losses, fitted)


def lipo_loss(strengths: Tensor, scores: Tensor, valid: Tensor, gains: str = "order") -> Tensor:
    """Logistic loss over pairs, weighted by what an exchange of the two would change: LiPO-lambda.

    Sum over r_i > r_j of Delta_ij log(1 + e^-(h_i - h_j)), Delta_ij = |G_i - G_j| |1 / D_i - 1 /
    D_j|, G = 2^psi - 1, D = log(1 + rank by h): Liu et al. 2024, LiPO, arXiv:2402.01878. The
    published formula has a minus sign in front, which would maximise the loss. The weights
    have no gradient.

    The paper's psi is a label in [0, 1]. Candidates of equal h share no rank in the paper; before
    the first step all implicit rewards are 0, and equal ranks would give no gradient at all. Here
    the one with the lower score ranks first among equal h, as if the policy had them the wrong way
    round; the order of the file never counts.

    Args:
        strengths: [B, K] h.
        scores: [B, K] r.
        valid: [B, K] True where a candidate exists.
        gains: "order": psi is the share of the other candidates that one beats, ties half, so that
            only the order counts; "score": psi is the score itself.

    Returns:
        [B]; zero where no two candidates have different scores.
    """
    assert gains in ("order", "score"), f"{gains!r} is no kind of gain"
    pairs = ordered_pairs(scores, valid)
    h = _known(strengths, valid)
    if gains == "order":
        labels = win_shares(scores, valid, count_itself=False).to(h.dtype)
    else:
        labels = _known(scores, valid).to(h.dtype)
    gain = torch.exp2(labels) - 1
    inverse = 1 / torch.log1p(_ranks(h.detach(), scores, valid).to(h.dtype))
    weights = leads(gain).abs() * leads(inverse).abs()
    lead = torch.where(pairs, leads(h), torch.zeros_like(weights))
    return masked_sum(-logsigmoid(lead) * weights, pairs, dim=(-2, -1))


def listnet_loss(
    strengths: Tensor, scores: Tensor, valid: Tensor, temperature: float = 1.0
) -> Tensor:
    """-sum_i q_i log softmax(h)_i, q = softmax(r / temperature): probabilities of being the best.

    On log-probs: Cao et al. 2007, ListNet (Learning to Rank: From Pairwise Approach to Listwise
    Approach), with the top-one probabilities. On implicit rewards: Chen et al. 2024, InfoNCA,
    arXiv:2402.05369. Equal scores have equal targets.

    Args:
        strengths: [B, K] h.
        scores: [B, K] r; their scale counts.
        valid: [B, K] True where a candidate exists.
        temperature: of the scores, above 0; towards 0 the target is the best alone.

    Returns:
        [B] nats, at least the entropy of q; zero where no two candidates have different scores.
    """
    h = _known(strengths, valid)
    target = _softmax(scores / temperature, valid).to(h.dtype)
    normaliser = _logsumexp(h, valid, dim=-1)
    counted = ranked_candidates(scores, valid)
    return masked_sum(target * (normaliser.unsqueeze(-1) - h), counted)


def nca_loss(strengths: Tensor, scores: Tensor, valid: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum_i [q_i log sigmoid(h_i) + log sigmoid(-h_i) / K]: absolute likelihoods of candidates.

    q = softmax(r / temperature), K the number of the prompt's candidates: Chen et al. 2024, NCA,
    arXiv:2402.05369. Unlike `listnet_loss` it does not let the likelihood of the best fall.

    Args: as in `listnet_loss`; strengths are implicit rewards.

    Returns:
        [B] nats; zero where no two candidates have different scores.
    """
    h = _known(strengths, valid)
    target = _softmax(scores / temperature, valid).to(h.dtype)
    count = valid.sum(-1, keepdim=True).clamp_min(1)
    losses = -(target * logsigmoid(h) + logsigmoid(-h) / count)
    return masked_sum(losses, ranked_candidates(scores, valid))


def mpo_loss(strengths: Tensor, scores: Tensor, valid: Tensor, alpha: float = 1.0) -> Tensor:
    """-log of the weight of the candidates above the mean score, among all: a set against a set.

    -log(sum over Y+ of w e^h / sum over Y of w e^h), Y+ the candidates whose score exceeds the
    prompt's mean, w = e^(alpha |r - mean|), so that outliers on both sides weigh more: Gupta et al.
    2024, Multi-Preference Optimization (SWEPO), arXiv:2412.04628. A score that equals the mean is
    not in Y+. For K = 2 the weights cancel, and it is DPO.

    Args:
        strengths: [B, K] h.
        scores: [B, K] r; their scale counts, unless alpha is 0.
        valid: [B, K] True where a candidate exists.
        alpha: weight per unit of deviation, 0 or more; 0 = all weigh alike.

    Returns:
        [B] nats; zero where no two candidates have different scores.
    """
    counted = has_order(scores, valid)
    above, deviation = deviations(scores, valid)
    h = _known(strengths, valid) + alpha * deviation.abs().to(strengths.dtype)
    loss = _logsumexp(h, valid, dim=-1) - _logsumexp(h, above & counted.unsqueeze(-1), dim=-1)
    return torch.where(counted, loss, torch.zeros_like(loss))


def _known(values: Tensor, valid: Tensor) -> Tensor:
    """0 where no candidate exists, so that neither value nor gradient can be NaN."""
    return torch.where(valid, values, torch.zeros_like(values))


def _logsumexp(values: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Over what the mask holds; 0 where it holds nothing, with zero gradient."""
    is_empty = ~mask.any(dim, keepdim=True)
    open_values = torch.where(mask, values, torch.full_like(values, -torch.inf))
    # A row of nothing but -inf has a gradient of NaN.
    return torch.where(is_empty, torch.zeros_like(open_values), open_values).logsumexp(
        dim
    ) * ~is_empty.squeeze(dim)


def _softmax(values: Tensor, valid: Tensor) -> Tensor:
    """[B, K] over the candidates that exist; 0 elsewhere."""
    known = torch.where(valid, values, torch.full_like(values, -torch.inf))
    return torch.where(valid, known.softmax(-1), torch.zeros_like(values))


def _ranks(strengths: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """[B, K] from 1, by strength; among equals the lower score first; 1 where none exists."""
    higher = leads(strengths) < 0  # [b, k, i]: k ahead of i
    ahead = higher | ((leads(strengths) == 0) & ordered_pairs(scores, valid))
    return 1 + (ahead & valid.unsqueeze(-1)).sum(-2)
