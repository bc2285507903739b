"""Advantages: how much better a token, or a response, was than expected.

With a critic: generalised advantage estimation over tokens. Without one, the other responses to the
same prompt are the yardstick (RLOO, GRPO), or the batch is (REINFORCE++). Each method is a line or
two over these parts:

    PPO             gae -> whiten
    RLOO            rloo_advantages -> spread_over_tokens
    GRPO            grpo_advantages -> spread_over_tokens
    Dr. GRPO        group_centred_rewards -> spread_over_tokens
    REINFORCE++     reward_to_go -> whiten
      with baseline group_centred_rewards -> spread_over_tokens -> whiten

Whitening is over the batch of all ranks, so it takes sums that the caller has added up; a group,
which is one prompt's responses, never lies on two ranks. Advantages are constants: no gradient
flows through anything here. Reward shaping is not here.

Legend: N rows (responses), T positions, B prompts, K candidates per prompt (padded; `valid` says
which exist). `grid[valid]` are the rows of a grid again, in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rrhf.algorithms.masked import masked_mean, masked_sum

WHITENING_EPSILON = 1e-8
GRPO_EPSILON = 1e-6


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, and the returns that the critic is to predict.

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t = delta_t + gamma * lambda * A_{t+1},    return_t = A_t + V_t

    Schulman et al. 2015, arXiv:1506.02438, equation 16. V and A after a row's last token
    are zero: a response that was cut off for its length ends there as well. Positions outside the
    mask are stepped over, at the end of a row or within it.

    Args:
        rewards: [N, T].
        values: [N, T] V_t, what the critic expected before token t was sampled.
        mask: [N, T] True at response tokens.
        gamma: discount for each token.
        gae_lambda: 1 trusts the rewards alone, 0 the next value alone.

    Returns:
        advantages [N, T], not whitened, and returns [N, T]; zero outside the mask.
    """
    assert mask.dtype == torch.bool, "a mask is boolean; build it from lengths"
    zeros = torch.zeros_like(values)
    rewards, values = torch.where(mask, rewards, zeros), torch.where(mask, values, zeros)
    next_value = next_advantage = values.new_zeros(values.shape[0])  # [N]
    backwards = []
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        backwards.append(torch.where(here, advantage, zeros[:, t]))
        next_value = torch.where(here, values[:, t], next_value)
        next_advantage = torch.where(here, advantage, next_advantage)
    advantages = torch.stack(backwards[::-1], dim=1) if backwards else zeros
    return advantages, advantages + values


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """What is still to come: G_t = r_t + gamma * G_{t+1}.

    The advantage of REINFORCE++ (Hu et al. 2025, arXiv:2501.03262) before it is whitened over the
    global batch; the rewards include the KL penalty.

    Args:
        rewards: [N, T].
        mask: [N, T] True at response tokens.
        gamma: discount for each token.

    Returns:
        [N, T]; zero outside the mask.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, gae_lambda=1.0)[0]


@torch.no_grad()
def moment_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Sums for whitening a batch, which can be added up over ranks and micro-batches.

    Args:
        values: any shape; values outside the mask are never read.
        mask: the same shape, bool.

    Returns:
        [3] float64: sum, sum of squares, count. float64 leaves the variance right as long as the
        mean is below some 10,000 deviations.
    """
    values = values.double()
    everything = tuple(range(values.dim()))
    count = mask.expand(values.shape).sum().double()
    total = masked_sum(values, mask, everything)
    return torch.stack([total, masked_sum(values.square(), mask, everything), count])


def mean_and_variance(sums: Tensor, unbiased: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and variance from the sums of `moment_sums`.

    Args:
        sums: [3], added up over ranks.
        unbiased: divide by n - 1 (the sample's estimate), else by n (of these very values).

    Returns:
        two scalars, float64; both zero for no value at all, and the variance zero for one.
    """
    total, squares, count = sums.double()
    mean = total / count.clamp_min(1)
    deviations = (squares - count * mean.square()).clamp_min(0)
    return mean, deviations / (count - 1 if unbiased else count).clamp_min(1)


@torch.no_grad()
def whiten(
    values: Tensor,
    mask: Tensor,
    sums: Tensor,
    unbiased: bool = True,
    shift_mean: bool = True,
    epsilon: float = WHITENING_EPSILON,
) -> Tensor:
    """Normalise values to mean zero and deviation one: (x - mean) / sqrt(variance + epsilon).

    A batch of one value becomes zero, as do values that are all equal.

    Args:
        values: any shape.
        mask: the same shape, bool.
        sums: [3] of the *global* batch: `moment_sums` of every rank and micro-batch, added up.
        unbiased: which variance; see `mean_and_variance`.
        shift_mean: False adds the mean again, so that only the scale changes; for rewards, whose
            sign means something.
        epsilon: keeps the division finite.

    Returns:
        the same shape and dtype; zero outside the mask.
    """
    mean, variance = mean_and_variance(sums.to(values.device), unbiased)
    whitened = (values.double() - mean) * torch.rsqrt(variance + epsilon)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros_like(whitened)).to(values.dtype)


@torch.no_grad()
def group_centred_rewards(rewards: Tensor, valid: Tensor) -> Tensor:
    """r_i - mean of the prompt's rewards.

    The advantage of Dr. GRPO (Liu et al. 2025, arXiv:2503.20783), which leaves out the
    division by the deviation because it favours prompts that are all but solved or all but
    hopeless; and of REINFORCE++ with baseline before whitening.

    Args:
        rewards: [B, K] of whole responses, any scale.
        valid: [B, K] True where a candidate exists.

    Returns:
        [B, K]; zero where there is no candidate, only one, or all rewards are equal.
    """
    wide = rewards.double()
    mean = masked_mean(wide, valid).unsqueeze(-1)
    # Equal rewards say nothing, exactly: a rounding error over a tiny deviation would shout.
    high = torch.where(valid, wide, torch.full_like(wide, -torch.inf)).amax(-1, keepdim=True)
    low = torch.where(valid, wide, torch.full_like(wide, torch.inf)).amin(-1, keepdim=True)
    is_equal = high <= low  # False where one is NaN, which must come out as one
    centred = torch.where(valid & ~is_equal, wide - mean, torch.zeros_like(wide))
    return centred.to(rewards.dtype)


@torch.no_grad()
def rloo_advantages(rewards: Tensor, valid: Tensor) -> Tensor:
    """r_i - mean of the *other* responses' rewards: REINFORCE leave-one-out.

    Ahmadian et al. 2024, arXiv:2402.14740 (after Kool et al. 2019). Equal to n / (n - 1)
    times the distance from the mean of all n.

    Args:
        rewards: [B, K] of whole responses, KL penalty included where it is a reward.
        valid: [B, K] True where a candidate exists.

    Returns:
        [B, K]; zero where there is no candidate, and where a prompt has only one.
    """
    count = valid.sum(-1, keepdim=True).double()
    factor = count / (count - 1).clamp_min(1)
    return (factor * group_centred_rewards(rewards.double(), valid)).to(rewards.dtype)


@torch.no_grad()
def grpo_advantages(
    rewards: Tensor, valid: Tensor, unbiased: bool = True, epsilon: float = GRPO_EPSILON
) -> Tensor:
    """(r_i - mean) / (deviation + epsilon) within a prompt: Shao et al. 2024, arXiv:2402.03300.

    Section 4.1.2 of that paper. Without the division: `group_centred_rewards`.

    Args:
        rewards: [B, K] of whole responses.
        valid: [B, K] True where a candidate exists.
        unbiased: divide by n - 1 in the deviation (as published programs do), else by n.
        epsilon: on the scale of the rewards.

    Returns:
        [B, K]; zero where there is no candidate, only one, or all rewards are equal.
    """
    centred = group_centred_rewards(rewards.double(), valid)
    count = valid.sum(-1, keepdim=True)
    divisor = (count - 1 if unbiased else count).clamp_min(1)
    deviation = (centred.square().sum(-1, keepdim=True) / divisor).sqrt()
    return (centred / (deviation + epsilon)).to(rewards.dtype)


@torch.no_grad()
def rank_advantages(rewards: Tensor, valid: Tensor) -> Tensor:
    """2 - 4 (rank - 1) / (K - 1) within a prompt, from 2 for the best to -2 for the worst.

    GOPO: arXiv:2602.03876. Only the order of the rewards counts, not their scale. Equal rewards
    share the mean of their ranks.

    Args:
        rewards: [B, K] of whole responses.
        valid: [B, K] True where a candidate exists.

    Returns:
        [B, K]; zero where there is no candidate, only one, or all rewards are equal.
    """
    both = valid.unsqueeze(-1) & valid.unsqueeze(-2)
    mine, others = rewards.unsqueeze(-1), rewards.unsqueeze(-2)
    better = ((others > mine) & both).sum(-1).double()
    equal = ((others == mine) & both).sum(-1).double()
    rank = 1 + better + (equal - 1) / 2
    last = (valid.sum(-1, keepdim=True) - 1).double()
    centred = torch.where(last > 0, 2 - 4 * (rank - 1) / last.clamp_min(1), torch.zeros_like(rank))
    # NaN has no rank, and must come out as one.
    has_nan = (rewards.isnan() & valid).any(-1, keepdim=True)
    centred = torch.where(has_nan, torch.full_like(rank, torch.nan), centred)
    return torch.where(valid, centred, torch.zeros_like(rank)).to(rewards.dtype)


def spread_over_tokens(advantages: Tensor, mask: Tensor) -> Tensor:
    """The advantage of a whole response, given to each of its tokens.

    Args:
        advantages: [N].
        mask: [N, T] True at response tokens.

    Returns:
        [N, T]; zero outside the mask.
    """
    spread = advantages.unsqueeze(-1).expand(mask.shape)
    return torch.where(mask, spread, torch.zeros_like(spread))
