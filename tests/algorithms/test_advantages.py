"""Advantages against float64 loops over ragged rows, each beside a wrong variant it tells apart."""

import math
import statistics

import pytest
import torch
from torch import Tensor

from rrhf.algorithms.advantages import (
    gae,
    group_centred_rewards,
    grpo_advantages,
    mean_and_variance,
    moment_sums,
    rank_advantages,
    reward_to_go,
    rloo_advantages,
    spread_over_tokens,
    whiten,
)
from rrhf.algorithms.masked import length_mask

TOLERANCE = 1e-9  # float64, sums of at most a hundred terms of size 1
LENGTHS = (4, 1, 0, 7, 2, 5)
WIDTH = 7


def rollout(garbage: float = math.nan) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values (with garbage at padding) and the mask."""
    generator = torch.manual_seed(31)
    mask = length_mask(torch.tensor(LENGTHS), WIDTH)
    rewards, values = (
        torch.randn(len(LENGTHS), WIDTH, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    bad = torch.full_like(rewards, garbage)
    return torch.where(mask, rewards, bad), torch.where(mask, values, bad), mask


def real(table: Tensor) -> list[list[float]]:
    """The real positions of every row."""
    return [row[:length] for row, length in zip(table.tolist(), LENGTHS, strict=True)]


def padded(rows: list[list[float]]) -> Tensor:
    return torch.tensor([row + [0.0] * (WIDTH - len(row)) for row in rows], dtype=torch.float64)


def worst(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


def summed_gae(
    gamma: float, lam: float, after_the_end: float = 0.0, shift: int = 0
) -> tuple[Tensor, Tensor]:
    """A_t as the plain double sum of (gamma lambda)^l delta_{t+l}, no recursion.

    `after_the_end` stands for the value of the first pad, `shift` moves every reward to the right.
    """
    rewards, values, _ = rollout()
    advantages, returns = [], []
    for r, v in zip(real(rewards), real(values), strict=True):
        n = len(r)
        r = [r[t - shift] if t >= shift else 0.0 for t in range(n)]
        later = [*v[1:], after_the_end]
        delta = [r[t] + gamma * later[t] - v[t] for t in range(n)]
        row = [
            math.fsum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)
        ]
        advantages.append(row)
        returns.append([a + b for a, b in zip(row, v, strict=True)])
    return padded(advantages), padded(returns)


@pytest.mark.parametrize(
    ("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (1.0, 0.0), (0.5, 0.3)]
)
@pytest.mark.parametrize("garbage", [0.0, 3.0, math.nan, math.inf])
def test_gae_and_returns_equal_the_double_sum(gamma: float, lam: float, garbage: float) -> None:
    got = gae(*rollout(garbage), gamma, lam)
    for mine, expected in zip(got, summed_gae(gamma, lam), strict=True):
        assert worst(mine, expected) < TOLERANCE
        assert (mine[~rollout()[2]] == 0).all()
    if lam > 0:
        for mine, swapped in zip(got, summed_gae(lam, gamma), strict=True):
            assert gamma == lam or worst(mine, swapped) > 1e-2  # the control
    for wrong in (summed_gae(gamma, lam, after_the_end=3.0), summed_gae(gamma, lam, shift=1)):
        assert all(worst(mine, w) > 1e-2 for mine, w in zip(got, wrong, strict=True))


def test_with_lambda_one_the_returns_are_the_discounted_rewards_to_come() -> None:
    rewards, _, mask = rollout()
    _, returns = gae(*rollout(), 0.9, 1.0)
    expected = padded(
        [
            [math.fsum(0.9 ** (s - t) * r[s] for s in range(t, len(r))) for t in range(len(r))]
            for r in real(rewards)
        ]
    )
    assert worst(returns, expected) < TOLERANCE
    assert worst(reward_to_go(rewards, mask, 0.9), expected) < TOLERANCE
    assert worst(reward_to_go(rewards, mask), expected) > 1e-2  # the control: undiscounted
    exclusive = padded([[*row[1:], 0.0] if row else [] for row in real(expected)])
    assert worst(reward_to_go(rewards, mask, 0.9), exclusive) > 1e-2  # the control: from t + 1


def test_gae_steps_over_holes_in_a_row() -> None:
    rewards, values, _ = rollout(0.0)
    mask = torch.tensor([[True, False, False, True, True, False, True]])
    got = gae(rewards[3:4], values[3:4], mask, 0.9, 0.8)
    dense = gae(
        rewards[3:4, mask[0]], values[3:4, mask[0]], torch.ones(1, 4, dtype=torch.bool), 0.9, 0.8
    )
    for holed, closed in zip(got, dense, strict=True):
        assert worst(holed[:, mask[0]], closed) == 0
        assert (holed[:, ~mask[0]] == 0).all()


def test_a_wider_padding_changes_nothing() -> None:
    rewards, values, mask = rollout(0.0)
    pad = torch.full((len(LENGTHS), 3), 9.0, dtype=torch.float64)
    wide = gae(
        torch.cat([rewards, pad], 1), torch.cat([values, pad], 1), torch.cat([mask, pad < 0], 1)
    )
    for narrow, wider in zip(gae(rewards, values, mask), wide, strict=True):
        assert torch.equal(narrow, wider[:, :WIDTH])


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_equals_a_loop_over_the_whole_batch(unbiased: bool, shift_mean: bool) -> None:
    values, _, mask = rollout()
    flat = [x for row in real(values) for x in row]

    def looped(is_unbiased: bool, is_shifted: bool) -> Tensor:
        mean = statistics.fmean(flat)
        spread = math.fsum((x - mean) ** 2 for x in flat)
        variance = spread / (len(flat) - 1 if is_unbiased else len(flat))
        back = 0.0 if is_shifted else mean
        scale = math.sqrt(variance + 1e-8)
        return padded([[(x - mean) / scale + back for x in row] for row in real(values)])

    sums = moment_sums(values, mask)
    got = whiten(values, mask, sums, unbiased, shift_mean)
    assert worst(got, looped(unbiased, shift_mean)) < TOLERANCE
    assert worst(got, looped(not unbiased, shift_mean)) > 1e-3  # the control: the other variance
    assert worst(got, looped(unbiased, not shift_mean)) > 1e-3  # the control: the other mean
    per_row = torch.cat(
        [
            whiten(row[None], own[None], moment_sums(row, own), unbiased, shift_mean)
            for row, own in zip(values, mask, strict=True)
        ]
    )
    assert worst(got, per_row) > 1e-1  # the control: each row by itself
    # The control: padding counted as zeros.
    full = torch.ones_like(mask)
    wrong = whiten(values, mask, moment_sums(values.nan_to_num(0.0), full), unbiased, shift_mean)
    assert worst(got, wrong) > 1e-2


def test_moment_sums_add_up_over_ranks_of_any_cut() -> None:
    values, _, mask = rollout()
    whole = whiten(values, mask, moment_sums(values, mask))
    for cuts in ([1, 5], [3, 3], [2, 1, 3], [1] * 6):  # the third row alone is an empty rank
        parts = list(zip(values.split(cuts), mask.split(cuts), strict=True))
        sums = torch.stack([moment_sums(v, m) for v, m in parts]).sum(0)
        assert worst(torch.cat([whiten(v, m, sums) for v, m in parts]), whole) < TOLERANCE
        local = torch.cat([whiten(v, m, moment_sums(v, m)) for v, m in parts])
        assert worst(local, whole) > 1e-2  # the control: every rank by itself


@pytest.mark.parametrize("unbiased", [True, False])
def test_one_value_or_none_is_no_nan(unbiased: bool) -> None:
    value = torch.tensor([[2.5, math.nan]])
    one, none = torch.tensor([[True, False]]), torch.tensor([[False, False]])
    assert mean_and_variance(moment_sums(value, one), unbiased) == (2.5, 0.0)
    assert mean_and_variance(moment_sums(value, none), unbiased) == (0.0, 0.0)
    assert whiten(value, one, moment_sums(value, one), unbiased).tolist() == [[0.0, 0.0]]
    assert whiten(value, none, moment_sums(value, none), unbiased).tolist() == [[0.0, 0.0]]
    kept = whiten(value, one, moment_sums(value, one), unbiased, shift_mean=False)
    assert kept.tolist() == [[2.5, 0.0]]
    nobody = torch.zeros(0, 3)
    assert moment_sums(nobody, nobody.bool()).tolist() == [0.0, 0.0, 0.0]


def test_equal_values_whiten_to_zero_and_the_dtype_stays() -> None:
    values = torch.full((2, 3), 0.1)
    mask = torch.ones(2, 3, dtype=torch.bool)
    got = whiten(values, mask, moment_sums(values, mask))
    assert got.dtype == torch.float32 and float(got.abs().max()) < 1e-6
    # Far from zero the variance is still the right one: 1,000 deviations away.
    far = 1000 + torch.randn(500, 1, dtype=torch.float64, generator=torch.manual_seed(2))
    everything = torch.ones(500, 1, dtype=torch.bool)
    _, variance = mean_and_variance(moment_sums(far, everything))
    assert float(variance) == pytest.approx(statistics.variance(far.flatten().tolist()), rel=1e-8)


GROUPS = [[0.3, -1.0, 2.0, 0.5], [1.0, 4.0], [0.7], [], [0.1, 0.1, 0.1], [-2.0, -2.0, 3.0]]


def grid(fill: float = math.nan) -> tuple[Tensor, Tensor]:
    width = max(len(group) for group in GROUPS)
    rows = [group + [fill] * (width - len(group)) for group in GROUPS]
    valid = length_mask(torch.tensor([len(group) for group in GROUPS]), width)
    return torch.tensor(rows, dtype=torch.float64), valid


def compare(got: Tensor, groups: list[list[float]]) -> float:
    """The largest difference at existing candidates; the others must be exactly zero."""
    _, valid = grid()
    assert (got[~valid] == 0).all()
    pairs = zip(got.tolist(), groups, strict=True)
    return max(abs(a - b) for row, group in pairs for a, b in zip(row, group, strict=False))


GROUPED = (rloo_advantages, grpo_advantages, group_centred_rewards, rank_advantages)


def leave_one_out(group: list[float], with_itself: bool = False) -> list[float]:
    advantages = []
    for i, reward in enumerate(group):
        others = [r for j, r in enumerate(group) if j != i or with_itself]
        advantages.append(reward - statistics.fmean(others) if len(group) > 1 else 0.0)
    return advantages


def standardised(group: list[float], unbiased: bool = True) -> list[float]:
    if len(group) < 2 or len(set(group)) == 1:
        return [0.0] * len(group)
    deviation = statistics.stdev(group) if unbiased else statistics.pstdev(group)
    return [(r - statistics.fmean(group)) / (deviation + 1e-6) for r in group]


@pytest.mark.parametrize("fill", [0.0, 100.0, math.nan, math.inf, -math.inf])
def test_rloo_equals_leaving_each_one_out(fill: float) -> None:
    got = rloo_advantages(*grid(fill))
    assert compare(got, [leave_one_out(group) for group in GROUPS]) < TOLERANCE
    own = [leave_one_out(group, with_itself=True) for group in GROUPS]
    assert compare(got, own) > 1e-1  # the control: its own reward in its baseline
    assert compare(group_centred_rewards(*grid(fill)), own) < TOLERANCE


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("fill", [0.0, 100.0, math.nan, math.inf])
def test_grpo_equals_standardising_each_group(unbiased: bool, fill: float) -> None:
    got = grpo_advantages(*grid(fill), unbiased=unbiased)
    assert compare(got, [standardised(group, unbiased) for group in GROUPS]) < TOLERANCE
    other = [standardised(group, not unbiased) for group in GROUPS]
    assert compare(got, other) > 1e-2  # the control: the other deviation
    centred = [leave_one_out(group, with_itself=True) for group in GROUPS]
    assert compare(got, centred) > 1e-2  # the control: Dr. GRPO, no deviation
    flat = [r for group in GROUPS for r in group]
    mean, deviation = statistics.fmean(flat), statistics.stdev(flat)
    whole = [[(r - mean) / deviation for r in group] for group in GROUPS]
    assert compare(got, whole) > 1e-2  # the control: over the batch instead of the prompt


def test_grpo_divides_by_the_deviation_of_a_sample_unless_told_otherwise() -> None:
    """Rewards 1 and 2: deviation 1 / sqrt(2) from n - 1, and 1 / 2 from n."""
    got = grpo_advantages(torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.ones(1, 2).bool())
    assert got.tolist()[0] == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-5)


def by_rank(group: list[float]) -> list[float]:
    """The share of the others that one is above, less the share that it is below, from -2 to 2."""
    others = max(len(group) - 1, 1)
    return [2 * sum((r > o) - (r < o) for o in group) / others for r in group]


@pytest.mark.parametrize("fill", [0.0, 100.0, math.nan, math.inf, -math.inf])
def test_ranks_equal_counting_who_is_above_and_below(fill: float) -> None:
    assert compare(rank_advantages(*grid(fill)), [by_rank(group) for group in GROUPS]) < TOLERANCE
    three = rank_advantages(torch.tensor([[5.0, -1.0, 1e9]]), torch.ones(1, 3).bool())
    assert three.tolist() == [[0.0, -2.0, 2.0]]
    tied = rank_advantages(torch.tensor([[1.0, 1.0, 0.0, 3.0]]), torch.ones(1, 4).bool())
    assert tied.tolist()[0] == pytest.approx([0.0, 0.0, -2.0, 2.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_without_a_difference_give_exactly_nothing(dtype: torch.dtype) -> None:
    # The rounding of a mean, over a deviation of next to nothing, would be an advantage.
    rewards = torch.full((1, 7), 1e6 + 0.1, dtype=dtype)
    valid = torch.ones(1, 7, dtype=torch.bool)
    for function in GROUPED:
        got = function(rewards, valid)
        assert got.dtype == dtype and (got == 0).all()
        assert (function(rewards, ~valid) == 0).all()
        assert (function(rewards, valid & (torch.arange(7) == 3)) == 0).all()


def test_a_nan_among_real_rewards_is_not_hidden() -> None:
    rewards = torch.tensor([[1.0, math.nan, 2.0], [1.0, 2.0, 3.0]])
    valid = torch.ones(2, 3, dtype=torch.bool)
    for function in GROUPED:
        got = function(rewards, valid)
        assert got[0].isnan().all() and got[1].isfinite().all()


def test_reinforce_plus_plus_is_reward_to_go_whitened_over_the_batch() -> None:
    rewards, _, mask = rollout()
    to_go = reward_to_go(rewards, mask)
    got = whiten(to_go, mask, moment_sums(to_go, mask))
    table = [[math.fsum(r[t:]) for t in range(len(r))] for r in real(rewards)]
    flat = [x for row in table for x in row]
    mean, scale = statistics.fmean(flat), math.sqrt(statistics.variance(flat) + 1e-8)
    assert worst(got, padded([[(x - mean) / scale for x in row] for row in table])) < TOLERANCE
    rows = []
    for row in table:  # the control: every row by itself
        own = statistics.stdev(row) if len(row) > 1 else 1.0
        rows.append([(x - statistics.fmean(row)) / own for x in row])
    assert worst(got, padded(rows)) > 1e-1


def test_reinforce_plus_plus_with_baseline_over_the_same_parts() -> None:
    rewards, valid = grid()
    lengths = [2, 1, 3, 1, 2, 2, 1, 1, 1, 3, 2, 1, 1]  # one for each candidate, in order
    mask = length_mask(torch.tensor(lengths), 3)
    spread = spread_over_tokens(group_centred_rewards(rewards, valid)[valid], mask)
    got = whiten(spread, mask, moment_sums(spread, mask))
    centred = [x for group in GROUPS for x in leave_one_out(group, with_itself=True)]
    flat = [x for x, n in zip(centred, lengths, strict=True) for _ in range(n)]
    mean, scale = statistics.fmean(flat), math.sqrt(statistics.variance(flat) + 1e-8)
    # The control: the moments of responses in the place of those of tokens.
    other = statistics.stdev(centred)
    assert abs(scale - other) > 1e-2
    for row, (x, n) in enumerate(zip(centred, lengths, strict=True)):
        expected = [(x - mean) / scale] * n + [0.0] * (3 - n)
        assert got[row].tolist() == pytest.approx(expected, abs=TOLERANCE)


def test_advantages_are_constants() -> None:
    rewards, values, mask = rollout()
    values.requires_grad_()
    advantages, returns = gae(rewards, values, mask)
    assert not advantages.requires_grad and not returns.requires_grad
    scores, valid = grid()
    assert not grpo_advantages(scores.requires_grad_(), valid).requires_grad
