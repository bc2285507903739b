"""PPO's losses and metrics against float64 loops over real tokens, with wrong variants beside."""

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rrhf.algorithms.masked import length_mask
from rrhf.algorithms.ppo_losses import (
    REDUCTIONS,
    Clips,
    entropy_losses,
    explained_variance,
    explained_variance_sums,
    largest_ratio,
    log_ratios,
    policy_losses,
    policy_metrics,
    reduce_rows,
    reduction_counts,
    value_losses,
    value_metrics,
)

TOLERANCE = 1e-9  # float64, products of a few terms of size 1 to 10, sums of a hundred
LENGTHS = (5, 1, 0, 9, 3, 7, 2)
WIDTH = 9
CLIPS: dict[str, tuple[float, float, float | None]] = {
    "symmetric": (0.2, 0.2, None),
    "asymmetric": (0.2, 0.5, None),
    "low only": (0.1, 10.0, None),
    "dual": (0.2, 0.2, 1.5),
    "asymmetric dual": (0.3, 0.1, 2.0),
}


def mask() -> Tensor:
    return length_mask(torch.tensor(LENGTHS), WIDTH)


def batch(garbage: float = math.nan) -> tuple[Tensor, Tensor, Tensor]:
    """New and old log-probs, and advantages, with ratios from 0.1 to 10 and both signs."""
    generator = torch.manual_seed(47)
    shape = len(LENGTHS), WIDTH
    old = -3 * torch.rand(shape, dtype=torch.float64, generator=generator)
    new = old + 0.8 * torch.randn(shape, dtype=torch.float64, generator=generator)
    advantages = torch.randn(shape, dtype=torch.float64, generator=generator)
    bad = torch.full_like(old, garbage)
    new, old, advantages = (torch.where(mask(), x, bad) for x in (new, old, advantages))
    return new, old, advantages


def critic(garbage: float = math.nan) -> tuple[Tensor, Tensor, Tensor]:
    """Values, old values and returns; about half of the values beyond a clip of 0.3."""
    generator = torch.manual_seed(53)
    shape = len(LENGTHS), WIDTH
    old, returns = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    new = old + 0.4 * torch.randn(shape, dtype=torch.float64, generator=generator)
    bad = torch.full_like(old, garbage)
    new, old, returns = (torch.where(mask(), x, bad) for x in (new, old, returns))
    return new, old, returns


def each_token(function: Callable[..., float], *tables: Tensor) -> Tensor:
    """A table of what a scalar function gives for each real token; zero elsewhere."""
    out = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            out[row, t] = function(*(float(table[row, t]) for table in tables))
    return out


def worst(left: Tensor, right: Tensor) -> float:
    return float((left - right).detach().abs().max())


def one_policy_loss(
    low: float, high: float, dual: float | None, temperature_ratio: float = 1.0
) -> Callable[[float, float, float], float]:
    """The loss of one token, by cases instead of minima."""

    def loss(new: float, old: float, a: float) -> float:
        ratio = math.exp(new * temperature_ratio) / math.exp(old)
        if a >= 0:
            return -a * (1 + high) if ratio > 1 + high else -a * ratio
        bounded = (1 - low) if ratio < 1 - low else ratio
        if dual is not None and bounded > dual:
            bounded = dual
        return -a * bounded

    return loss


def one_policy_gradient(
    low: float, high: float, dual: float | None
) -> Callable[[float, float, float], float]:
    """Its derivative by the new log-prob: -A * ratio where nothing is clipped, else zero."""

    def slope(new: float, old: float, a: float) -> float:
        ratio = math.exp(new - old)
        if (a >= 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low):
            return 0.0
        if a < 0 and dual is not None and ratio > dual:
            return 0.0
        return -a * ratio

    return slope


@pytest.mark.parametrize("garbage", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("name", CLIPS)
def test_policy_losses_and_gradients_equal_the_cases(name: str, garbage: float) -> None:
    low, high, dual = CLIPS[name]
    new, old, advantages = batch(garbage)
    new.requires_grad_()
    got = policy_losses(new, old, advantages, mask(), Clips(low, high, dual))
    tables = new.detach(), old, advantages
    assert worst(got, each_token(one_policy_loss(low, high, dual), *tables)) < TOLERANCE
    got.sum().backward()
    assert new.grad is not None
    slopes = each_token(one_policy_gradient(low, high, dual), *tables)
    assert worst(new.grad, slopes) < TOLERANCE

    for other, clips in CLIPS.items():  # the controls: every other kind of clip
        if other != name:
            assert worst(got, each_token(one_policy_loss(*clips), *tables)) > 1e-2
    unbounded = each_token(one_policy_loss(low, high, None), *tables)
    assert dual is None or worst(got, unbounded) > 1e-2  # the control: without the dual clip
    shifted = torch.cat([advantages[:, 1:], advantages[:, :1]], dim=1).nan_to_num(0, 0, 0)
    wrong = policy_losses(new, old, shifted, mask(), Clips(low, high, dual))
    assert worst(got, wrong) > 1e-2  # the control: the advantage of the next token
    hot = one_policy_loss(low, high, dual, temperature_ratio=0.7)
    assert worst(got, each_token(hot, *tables)) > 1e-2  # the control: another temperature


def test_ratios_are_one_before_the_first_step_unless_the_temperature_is_dropped() -> None:
    logits = torch.randn(1, 6, 11, dtype=torch.float64, generator=torch.manual_seed(3))
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9]])
    everything = torch.ones(1, 6, dtype=torch.bool)

    def gathered(temperature: float) -> Tensor:
        logprobs = (logits / temperature).log_softmax(-1)
        return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    new = gathered(0.7).requires_grad_()
    advantages = torch.tensor([[1.0, -2.0, 0.5, 3.0, -1.0, 0.0]], dtype=torch.float64)
    assert torch.equal(log_ratios(new, gathered(0.7), everything), torch.zeros_like(new))
    assert float(largest_ratio(new, gathered(0.7), everything)) == 1.0
    assert float(largest_ratio(gathered(1.0), gathered(0.7), everything)) > 1.1  # the control
    losses = policy_losses(new, gathered(0.7), advantages, everything)
    assert torch.equal(losses, -advantages)
    losses.sum().backward()
    assert new.grad is not None and torch.equal(new.grad, -advantages)  # the plain policy gradient


def test_the_log_ratio_is_held_at_twenty() -> None:
    new = torch.tensor([[-1.0, -600.0]], requires_grad=True)
    old = torch.tensor([[-600.0, -1.0]])
    both = torch.ones(1, 2, dtype=torch.bool)
    losses = policy_losses(new, old, torch.tensor([[-1.0, 1.0]]), both)
    losses.sum().backward()
    assert losses.isfinite().all() and losses[0, 0].item() == pytest.approx(math.exp(20))
    assert new.grad is not None and new.grad.tolist() == [[0.0, 0.0]]


def one_value_loss(clip: float | None, factor: float = 0.5) -> Callable[..., float]:
    def loss(v: float, old: float, r: float) -> float:
        errors = [(v - r) ** 2]
        if clip is not None:
            held = old + clip if v > old + clip else old - clip if v < old - clip else v
            errors.append((held - r) ** 2)
        return factor * sorted(errors)[-1]

    return loss


@pytest.mark.parametrize("garbage", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("clip", [None, 0.3, 5.0])
def test_value_losses_equal_the_cases(clip: float | None, garbage: float) -> None:
    values, old, returns = critic(garbage)
    values.requires_grad_()
    got = value_losses(values, old, returns, mask(), clip)
    tables = values.detach(), old, returns
    assert worst(got, each_token(one_value_loss(clip), *tables)) < TOLERANCE
    got.sum().backward()

    def slope(v: float, o: float, r: float) -> float:
        if clip is not None and abs(v - o) > clip:
            held = o + math.copysign(clip, v - o)
            if abs(held - r) > abs(v - r):
                return 0.0
        return v - r

    assert values.grad is not None
    assert worst(values.grad, each_token(slope, *tables)) < TOLERANCE
    assert worst(got, each_token(one_value_loss(clip, 1.0), *tables)) > 1e-2  # without the half
    assert worst(got, each_token(one_value_loss(0.1), *tables)) > 1e-2  # another clip
    if clip == 0.3:

        def smaller(v: float, o: float, r: float) -> float:
            held = min(max(v, o - 0.3), o + 0.3)
            return 0.5 * min((v - r) ** 2, (held - r) ** 2)

        assert worst(got, each_token(smaller, *tables)) > 1e-2  # the minimum for the maximum


def looped_mean(table: Tensor, reduction: str) -> float:
    """The mean over everything, written out."""
    rows = [row[:n] for row, n in zip(table.tolist(), LENGTHS, strict=True) if n]
    if reduction == "token-mean":
        return math.fsum(x for row in rows for x in row) / sum(LENGTHS)
    sums = [math.fsum(row) / (len(row) if reduction == "sequence-mean" else 1) for row in rows]
    return math.fsum(sums) / len(rows)


@pytest.mark.parametrize("loss", ["policy", "dual", "value", "entropy"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_totals_over_counts_do_not_depend_on_how_the_batch_is_cut(
    reduction: str, loss: str
) -> None:
    if loss == "value":
        table = value_losses(*critic(), mask(), 0.3)
        oracle = each_token(one_value_loss(0.3), *critic())
    elif loss == "entropy":
        table = entropy_losses(-batch()[1], mask())
        oracle = each_token(lambda old: old, batch()[1])
    else:
        dual = 1.5 if loss == "dual" else None
        table = policy_losses(*batch(), mask(), Clips(dual=dual))
        oracle = each_token(one_policy_loss(0.2, 0.2, dual), *batch())
    expected = looped_mean(oracle, reduction)
    means = []
    for cuts in ([7], [3, 4], [1, 2, 4], [2, 1, 1, 3], [1] * 7):  # the third row is empty
        pieces = list(zip(table.split(cuts), mask().split(cuts), strict=True))
        parts = [reduce_rows(losses, own, reduction) for losses, own in pieces]
        for (_, counts), (_, own) in zip(parts, pieces, strict=True):
            assert torch.equal(counts, reduction_counts(own, reduction))
        total = sum(float(totals.sum()) for totals, _ in parts)
        count = sum(int(counts.sum()) for _, counts in parts)
        assert total / count == pytest.approx(expected, abs=TOLERANCE)
        own_means = [float(t.sum()) / max(int(c.sum()), 1) for t, c in parts]
        means.append(sum(own_means) / len(own_means))
    for wrong in means[1:]:
        assert abs(wrong - expected) > 1e-4  # the control: a mean of micro-batches' means
    for other in REDUCTIONS:
        if other != reduction:
            assert abs(looped_mean(oracle, other) - expected) > 1e-3  # the control
    padded_mean = float(table.mean())
    assert abs(padded_mean - expected) > 1e-3  # the control: padding in the mean


def test_an_unknown_reduction_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="token-mean, sequence-mean, sequence-sum"):
        reduce_rows(batch()[0], mask(), "batchmean")


def test_padding_in_a_reduction_reaches_no_gradient() -> None:
    for reduction in REDUCTIONS:
        table = batch(math.nan)[0].requires_grad_()
        reduce_rows(table, mask(), reduction)[0].sum().backward()
        assert table.grad is not None and table.grad.isfinite().all()
        assert (table.grad[~mask()] == 0).all()


@pytest.mark.parametrize("name", CLIPS)
def test_policy_metrics_equal_counts_by_hand(name: str) -> None:
    low, high, dual = CLIPS[name]
    new, old, advantages = batch()
    got = policy_metrics(new, old, advantages, mask(), Clips(low, high, dual))
    tokens = [
        (float(new[n, t]), float(old[n, t]), float(advantages[n, t]))
        for n, length in enumerate(LENGTHS)
        for t in range(length)
    ]
    ratios = [math.exp(x - y) for x, y, _ in tokens]
    clipped = sum(
        (a > 0 and r > 1 + high) or (a < 0 and r < 1 - low)
        for r, (_, _, a) in zip(ratios, tokens, strict=True)
    )
    expected = {
        "ratio": math.fsum(ratios),
        "clip_share": clipped,
        "approximate_kl_k1": math.fsum(y - x for x, y, _ in tokens),
        "approximate_kl_k3": math.fsum(r - 1 - math.log(r) for r in ratios),
    }
    if dual is not None:
        expected["dual_clip_share"] = sum(
            a < 0 and r > dual for r, (_, _, a) in zip(ratios, tokens, strict=True)
        )
        assert expected["dual_clip_share"] > 0
    assert got.keys() == expected.keys()
    for key, (total, count) in got.items():
        assert float(total) == pytest.approx(expected[key], abs=TOLERANCE)
        assert int(count) == sum(LENGTHS)
        assert not total.requires_grad
    assert float(largest_ratio(new, old, mask())) == pytest.approx(max(ratios))
    # Controls: a clip share that looks at the ratio alone, and the KL the other way round.
    outside = sum(r > 1 + high or r < 1 - low for r in ratios)
    assert outside != clipped
    reverse = math.fsum(1 / r - 1 + math.log(r) for r in ratios)
    assert abs(reverse - expected["approximate_kl_k3"]) > 1e-2


def test_ratio_metrics_without_a_token() -> None:
    nothing = torch.zeros_like(mask())
    new, old, advantages = batch()
    assert float(largest_ratio(new, old, nothing)) == 0.0
    assert float(largest_ratio(new[:0], old[:0], nothing[:0])) == 0.0
    for total, count in policy_metrics(new, old, advantages, nothing).values():
        assert float(total) == 0.0 and int(count) == 0
    # All ratios below one: padding's ratio of one must not be the largest.
    assert float(largest_ratio(old - 1, old, mask())) == pytest.approx(math.exp(-1))


def test_value_metrics_equal_counts_by_hand() -> None:
    values, old, returns = critic()
    got = value_metrics(values, old, returns, mask(), 0.3)
    real = [
        (float(values[n, t]), float(old[n, t]), float(returns[n, t]))
        for n, length in enumerate(LENGTHS)
        for t in range(length)
    ]
    decided = 0
    for v, o, r in real:
        held = min(max(v, o - 0.3), o + 0.3)
        decided += abs(held - r) > abs(v - r)
    assert 0 < decided < sum(abs(v - o) > 0.3 for v, o, _ in real)  # not every one outside counts
    assert float(got["value_clip_share"][0]) == decided
    assert float(got["value"][0]) == pytest.approx(math.fsum(v for v, _, _ in real))
    assert float(got["return"][0]) == pytest.approx(math.fsum(r for _, _, r in real))
    assert {int(count) for _, count in got.values()} == {sum(LENGTHS)}
    unclipped = value_metrics(values, old, returns, mask(), None)
    assert float(unclipped["value_clip_share"][0]) == 0


def test_a_value_within_its_clip_is_not_touched_by_rounding() -> None:
    values, _, returns = (table.float() for table in critic(0.0))
    old = values + 1000.3  # old + (value - old) is not the value: 3e-5 apart
    clipped = value_losses(values, old, returns, mask(), 2000.0)
    assert torch.equal(clipped, value_losses(values, old, returns, mask(), None))
    assert float(value_metrics(values, old, returns, mask(), 2000.0)["value_clip_share"][0]) == 0


def test_explained_variance_over_ranks_equals_the_whole() -> None:
    values, _, returns = critic()
    real = [
        (float(values[n, t]), float(returns[n, t]))
        for n, length in enumerate(LENGTHS)
        for t in range(length)
    ]
    errors = statistics.pvariance([r - v for v, r in real])
    expected = 1 - errors / statistics.pvariance([r for _, r in real])
    cuts = [1, 2, 1, 3]
    pieces = zip(values.split(cuts), returns.split(cuts), mask().split(cuts), strict=True)
    parts = [explained_variance_sums(*piece) for piece in pieces]
    assert explained_variance(torch.stack(parts).sum(0)) == pytest.approx(expected, abs=TOLERANCE)
    assert abs(statistics.fmean(explained_variance(p) for p in parts) - expected) > 1e-2  # control
    second_moments = 1 - statistics.fmean((r - v) ** 2 for v, r in real) / statistics.fmean(
        r**2 for _, r in real
    )
    assert abs(second_moments - expected) > 1e-4  # the control: without the means


def test_explained_variance_at_its_edges() -> None:
    _, _, returns = critic(0.0)
    assert explained_variance(explained_variance_sums(returns, returns, mask())) == 1.0
    constant = torch.full_like(returns, 0.1)
    assert explained_variance(explained_variance_sums(constant, returns, mask())) == pytest.approx(
        0.0, abs=TOLERANCE
    )
    assert explained_variance(explained_variance_sums(-returns, returns, mask())) == pytest.approx(
        -3.0
    )
    assert explained_variance(explained_variance_sums(returns, constant, mask())) == 0.0
    nothing = torch.zeros_like(mask())
    assert explained_variance(explained_variance_sums(returns, returns, nothing)) == 0.0


def test_programming_mistakes_are_refused() -> None:
    with pytest.raises(AssertionError, match="dual clip"):
        policy_losses(*batch(), mask(), Clips(dual=1.0))
    with pytest.raises(AssertionError, match="distance from 1"):
        policy_losses(*batch(), mask(), Clips(low=-0.2))
    with pytest.raises(AssertionError, match="freeze"):
        value_losses(*critic(), mask(), 0.0)
    with pytest.raises(AssertionError, match="boolean"):
        value_losses(*critic(), mask().float())
