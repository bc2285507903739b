"""Losses of single candidates against loops, and the targets that scores give them."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from loss_cases import (
    LISTS,
    LossCase,
    has_order,
    require_exact_zeros,
    require_invariance,
    require_that_the_mistake_is_noticed,
    require_the_slow_values,
    sigmoid,
    strengths,
    tables,
)
from torch import Tensor

from rrhf.algorithms.point_losses import (
    deviations,
    kto_loss,
    log_ratio_of_others,
    qrpo_loss,
    quantiles,
    sppo_loss,
    topr_loss,
    win_shares,
)
from rrhf.algorithms.rank_losses import ranked_candidates

SHIFT = 1.0
"""Strengths of the cases are below 0; with this added, log ratios are on both sides."""


def kto(h: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    ratios = h + SHIFT
    counted, kl = ranked_candidates(scores, valid), log_ratio_of_others(ratios, valid)
    return kto_loss(ratios, deviations(scores, valid)[0], counted, kl, 0.5, (1.5, 0.75))


def slow_kto(with_kl: bool) -> Any:
    def slow(h: list[float], scores: list[float], frozen: list[float]) -> float:
        if not has_order(scores):
            return 0.0
        total, mean = 0.0, sum(map(Fraction, scores)) / len(scores)
        for i, (x, r) in enumerate(zip(h, scores, strict=True)):
            others = [frozen[j] + SHIFT for j in range(len(h)) if j != i]
            z = max(0.0, sum(others) / len(others)) if with_kl else 0.0
            if r > mean:
                total += 1.5 * (1 - sigmoid(0.5 * (x + SHIFT - z)))
            else:
                total += 0.75 * (1 - sigmoid(0.5 * (z - x - SHIFT)))
        return total

    return slow


def sppo(count_itself: bool) -> Any:
    def loss(h: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        counted = ranked_candidates(scores, valid)
        return sppo_loss(h + SHIFT, win_shares(scores, valid, count_itself), counted, 3.0)

    return loss


def slow_sppo(count_itself: bool) -> Any:
    def slow(h: list[float], scores: list[float], frozen: list[float]) -> float:
        if not has_order(scores):
            return 0.0
        total = 0.0
        for i, x in enumerate(h):
            met = [j for j in range(len(h)) if j != i or count_itself]
            wins = sum(
                1.0 if scores[i] > scores[j] else 0.5 * (scores[i] == scores[j]) for j in met
            )
            total += (x + SHIFT - 3.0 * (wins / len(met) - 0.5)) ** 2
        return total

    return slow


def qrpo(h: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    counted = ranked_candidates(scores, valid)
    return qrpo_loss(h + SHIFT, quantiles(scores, valid), counted, 0.4)


def slow_qrpo(with_normaliser: bool) -> Any:
    def slow(h: list[float], scores: list[float], frozen: list[float]) -> float:
        if not has_order(scores):
            return 0.0
        normaliser = 0.4 * (math.exp(1 / 0.4) - 1)
        total = 0.0
        for x, r in zip(h, scores, strict=True):
            share = sum(other <= r for other in scores) / len(scores)
            log_z = math.log(normaliser) if with_normaliser else 0.0
            total += (share - 0.4 * log_z - 0.4 * (x + SHIFT)) ** 2
        return total

    return slow


def topr(h: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    sampler = torch.full_like(h, -SHIFT)
    return topr_loss(h, sampler, deviations(scores, valid)[1], ranked_candidates(scores, valid))


def slow_topr(truncated: bool) -> Any:
    def slow(h: list[float], scores: list[float], frozen: list[float]) -> float:
        if not has_order(scores):
            return 0.0
        mean = sum(scores) / len(scores)
        total = 0.0
        for x, fixed, r in zip(h, frozen, scores, strict=True):
            kept = math.exp(fixed + SHIFT)
            kept = min(1.0, kept) if truncated else kept
            total -= (1.0 if r >= mean else kept) * (r - mean) * x
        return total

    return slow


CASES = {
    "kto": LossCase(kto, slow_kto(True), slow_kto(False)),
    "sppo": LossCase(sppo(True), slow_sppo(True), slow_sppo(False), by_order=True),
    "sppo of others": LossCase(sppo(False), slow_sppo(False), slow_sppo(True), by_order=True),
    "qrpo": LossCase(qrpo, slow_qrpo(True), slow_qrpo(False), by_order=True),
    "topr": LossCase(topr, slow_topr(True), slow_topr(False)),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_loops(name: str) -> None:
    require_the_slow_values(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_noticed(name: str) -> None:
    require_that_the_mistake_is_noticed(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_nothing_to_rank_is_exactly_zero(name: str) -> None:
    require_exact_zeros(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_what_must_not_matter(name: str) -> None:
    require_invariance(CASES[name])


def test_a_score_that_equals_the_mean_is_not_above_it() -> None:
    """Sums of decimal fractions in float32 depend on their order; these do not."""
    for scores in ([0.1, 0.1, 0.1], [0.1, 0.4, 0.7], [0.7, 0.4, 0.1], [1e7, 1e7 + 1, 1e7 + 2]):
        table = torch.tensor([scores], dtype=torch.float32)
        exact = [Fraction(x) for x in table[0].tolist()]
        above, deviation = deviations(table, torch.ones_like(table, dtype=torch.bool))
        mean = sum(exact) / len(exact)
        assert above[0].tolist() == [x > mean for x in exact]
        wanted = [float(x - mean) for x in exact]
        assert deviation[0].tolist() == pytest.approx(wanted, abs=1e-9)


def test_shares_and_quantiles_of_two_and_of_ties() -> None:
    scores, valid = tables()
    assert win_shares(scores, valid)[5, :2].tolist() == [0.75, 0.25]
    assert win_shares(scores, valid, count_itself=False)[5, :2].tolist() == [1.0, 0.0]
    assert quantiles(scores, valid)[0].tolist() == [1.0, 0.6, 0.6, 0.2, 1.0]
    for row, exist, one in zip(win_shares(scores, valid), valid, LISTS, strict=True):
        if one:  # what one wins another loses
            assert float(row[exist].mean()) == pytest.approx(0.5)


def test_a_given_threshold_needs_no_other_candidate() -> None:
    ratios = torch.tensor([[0.7]], dtype=torch.float64, requires_grad=True)
    exist = torch.ones((1, 1), dtype=torch.bool)
    loss = kto_loss(ratios, exist, exist, log_ratio_of_others(ratios, exist), 0.5)
    assert float(loss.detach()) == pytest.approx(1 - sigmoid(0.35))
    loss.sum().backward()
    assert ratios.grad is not None and float(ratios.grad) < 0


def test_a_bad_sample_that_was_unlearnt_has_no_pull_left() -> None:
    h = torch.tensor([[-400.0, -1.0]], requires_grad=True)
    rewards, exist = torch.tensor([[-1.0, 1.0]]), torch.ones((1, 2), dtype=torch.bool)
    topr_loss(h, strengths()[5:6, :2].float(), rewards, exist).sum().backward()
    assert h.grad is not None and h.grad.tolist() == [[0.0, -1.0]]
    likelier = torch.tensor([[500.0, 0.0]], requires_grad=True)
    topr_loss(likelier, torch.full((1, 2), -500.0), rewards, exist).sum().backward()
    assert likelier.grad is not None and likelier.grad.tolist() == [[1.0, -1.0]]
