"""DPO on lists of any length: which pairs of a prompt's candidates are compared, and the loss.

Rafailov et al. 2023, arXiv:2305.18290, equation 7. A pair of responses is a list of two; a list of
K gives up to K (K - 1) / 2 pairs from K forwards.

Legend: B prompts, K candidates per prompt (padded; `valid` says which exist).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rrhf.algorithms.masked import masked_sum
from rrhf.algorithms.rank_losses import ordered_pairs


def chosen_pairs(scores: Tensor, valid: Tensor, which: str) -> Tensor:
    """The ordered pairs that are compared; equal scores never form one.

    Args:
        scores: [B, K] any scale, only the order counts.
        valid: [B, K] True where a candidate exists.
        which: "all"; "best-worst": the best with the worst, the first of equals each; "adjacent":
            each candidate with those of the next higher score.

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
    return pairs


def dpo_loss(rewards: Tensor, pairs: Tensor) -> Tensor:
    """Sum over pairs of -log sigmoid(h_better - h_worse).

    Args:
        rewards: [B, K] the implicit rewards h = beta (S - S_reference), S the log-prob of a whole
            response in nats.
        pairs: [B, K, K] as `chosen_pairs` gives them.

    Returns:
        [B] nats; zero where there is no pair.
    """
    lead = rewards.unsqueeze(-2) - rewards.unsqueeze(-1)  # [B, worse, better]
    # Where there is no pair neither value nor gradient can be NaN.
    lead = torch.where(pairs, lead, torch.zeros_like(lead))
    return masked_sum(-logsigmoid(lead), pairs, dim=(-2, -1))


def _first(flags: Tensor) -> Tensor:
    """[B, K] the first True of each row alone."""
    return flags & (flags.long().cumsum(-1) == 1)
