"""Losses over lists against all permutations, up to five candidates."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from loss_cases import (
    LossCase,
    first_probability,
    has_order,
    order_probability,
    pairs,
    require_exact_zeros,
    require_invariance,
    require_that_the_mistake_is_noticed,
    require_the_slow_values,
    sigmoid,
    strengths,
)

from rrhf.algorithms.list_losses import (
    lipo_loss,
    listnet_loss,
    mpo_loss,
    nca_loss,
    plackett_luce_loss,
    pro_loss,
)
from rrhf.algorithms.pair_losses import chosen_pairs, logistic_loss


def slow_plackett_luce(top: int = 99, margin: float = 0.0, tied: bool = False) -> Any:
    """Each candidate is drawn first among itself and the worse: the sum over all orders of them."""

    def slow(h: list[float], scores: list[float], frozen: list[float]) -> float:
        total = 0.0
        for k, mine in enumerate(scores):
            worse = {i: h[i] for i in range(len(h)) if scores[i] < mine or (tied and i != k)}
            rank = 1 + sum(other > mine for other in scores)
            if worse and rank <= top:
                total -= math.log(first_probability(k, {k: h[k] - margin, **worse}))
        return total

    return slow


def slow_pro(power: int) -> Any:
    def slow(h: list[float], scores: list[float], frozen: list[float]) -> float:
        total = 0.0
        for k, mine in enumerate(scores):
            gaps = {i: (mine - scores[i]) ** power for i in range(len(h)) if scores[i] < mine}
            if gaps:
                drawn = {k: h[k] * max(gaps.values()), **{i: h[i] * g for i, g in gaps.items()}}
                total -= math.log(first_probability(k, drawn))
        return total

    return slow


def slow_lipo(gains: str, first: int = 1) -> Any:
    """Weights are the change in discounted gain when two exchange their ranks."""

    def slow(h: list[float], scores: list[float], frozen: list[float]) -> float:
        size = len(h)
        labels = scores
        if gains == "order":
            labels = [
                sum((a > b) + 0.5 * (a == b) for j, b in enumerate(scores) if j != i) / (size - 1)
                for i, a in enumerate(scores)
                if size > 1
            ]
        ranks = [
            first + sum(frozen[j] > frozen[i] for j in range(size) if j != i) for i in range(size)
        ]

        def gain(ranks: list[int]) -> float:
            return sum(
                (2**a - 1) / math.log(1 + rank) for a, rank in zip(labels, ranks, strict=True)
            )

        total = 0.0
        for i, j in pairs(scores):
            exchanged = list(ranks)
            exchanged[i], exchanged[j] = ranks[j], ranks[i]
            total += abs(gain(exchanged) - gain(ranks)) * math.log1p(math.exp(h[i] - h[j]))
        return total

    return slow


def slow_listnet(temperature: float, swapped: bool = False) -> Any:
    def slow(h: list[float], scores: list[float], frozen: list[float]) -> float:
        if not has_order(scores):
            return 0.0
        mine = dict(enumerate(h))
        its = {i: r / temperature for i, r in enumerate(scores)}
        if swapped:
            mine, its = its, mine
        return -sum(first_probability(i, its) * math.log(first_probability(i, mine)) for i in mine)

    return slow


def slow_nca(temperature: float, noise: bool = True) -> Any:
    def slow(h: list[float], scores: list[float], frozen: list[float]) -> float:
        if not has_order(scores):
            return 0.0
        its = {i: r / temperature for i, r in enumerate(scores)}
        total = 0.0
        for i, x in enumerate(h):
            total -= first_probability(i, its) * math.log(sigmoid(x))
            total -= noise * math.log(sigmoid(-x)) / len(h)
        return total

    return slow


def slow_mpo(alpha: float, one_sided: bool = False) -> Any:
    def slow(h: list[float], scores: list[float], frozen: list[float]) -> float:
        if not has_order(scores):
            return 0.0
        mean = math.fsum(scores) / len(scores)
        size = (lambda x: x) if one_sided else abs
        weights = [math.exp(alpha * size(r - mean) + x) for r, x in zip(scores, h, strict=True)]
        above = sum(w for w, r in zip(weights, scores, strict=True) if r > mean)
        return -math.log(above / sum(weights))

    return slow


CASES = {
    "plackett_luce": LossCase(
        plackett_luce_loss, slow_plackett_luce(), slow_plackett_luce(tied=True), by_order=True
    ),
    "the best": LossCase(
        lambda h, s, v: plackett_luce_loss(h, s, v, top=1),
        slow_plackett_luce(top=1),
        slow_plackett_luce(top=2),
        by_order=True,
    ),
    "the best two": LossCase(
        lambda h, s, v: plackett_luce_loss(h, s, v, top=2),
        slow_plackett_luce(top=2),
        slow_plackett_luce(),
        by_order=True,
    ),
    "margin": LossCase(
        lambda h, s, v: plackett_luce_loss(h, s, v, margin=0.6),
        slow_plackett_luce(margin=0.6),
        slow_plackett_luce(margin=-0.6),
        by_order=True,
    ),
    "pro": LossCase(pro_loss, slow_pro(1), slow_pro(-1)),
    "lipo": LossCase(lipo_loss, slow_lipo("order"), slow_lipo("order", first=2), by_order=True),
    "lipo of scores": LossCase(
        lambda h, s, v: lipo_loss(h, s, v, gains="score"), slow_lipo("score"), slow_lipo("order")
    ),
    "listnet": LossCase(
        lambda h, s, v: listnet_loss(h, s, v, 0.7), slow_listnet(0.7), slow_listnet(0.7, True)
    ),
    "nca": LossCase(
        lambda h, s, v: nca_loss(h, s, v, 0.7), slow_nca(0.7), slow_nca(0.7, noise=False)
    ),
    "mpo": LossCase(lambda h, s, v: mpo_loss(h, s, v, 0.4), slow_mpo(0.4), slow_mpo(0.4, True)),
    "mpo without weights": LossCase(
        lambda h, s, v: mpo_loss(h, s, v, 0.0), slow_mpo(0.0), slow_mpo(0.4)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_all_permutations(name: str) -> None:
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


def test_the_orders_of_a_list_have_probability_one() -> None:
    """And each has the one that drawing without replacement gives it."""
    h = strengths()[-1:]
    exist, total = torch.ones_like(h, dtype=torch.bool), 0.0
    for order in itertools.permutations(range(5)):
        scores = torch.zeros_like(h)
        scores[0, list(order)] = torch.arange(5.0, 0.0, -1.0, dtype=h.dtype)
        mine = math.exp(-float(plackett_luce_loss(h, scores, exist)))
        wanted = order_probability(order, dict(enumerate(h[0].tolist())))
        assert mine == pytest.approx(wanted, abs=1e-12)
        total += mine
    assert total == pytest.approx(1, abs=1e-12)


def test_of_two_candidates_all_know_the_same() -> None:
    h, scores = strengths()[-3:-2, :2], torch.tensor([[3.0, -1.0]], dtype=torch.float64)
    exist = torch.ones_like(h, dtype=torch.bool)
    wanted = float(logistic_loss(h, chosen_pairs(scores, exist, "all")))
    assert float(plackett_luce_loss(h, scores, exist)) == pytest.approx(wanted, abs=1e-12)
    assert float(listnet_loss(h, scores, exist, 0.01)) == pytest.approx(wanted, abs=1e-12)
    assert float(mpo_loss(h, scores, exist, 0.9)) == pytest.approx(wanted, abs=1e-12)
    a, b = h[0].tolist()
    found = float(nca_loss(h, scores, exist, 0.01))
    assert found == pytest.approx(
        -math.log(sigmoid(a)) - 0.5 * math.log(sigmoid(-a)) - 0.5 * math.log(sigmoid(-b))
    )
    margin = float(logistic_loss(h, chosen_pairs(scores, exist, "all"), 0.8))
    listed = float(plackett_luce_loss(h, scores, exist, margin=0.8))
    assert listed == pytest.approx(margin, abs=1e-12)


def test_at_the_start_of_a_run_lipo_has_a_gradient() -> None:
    """All implicit rewards are 0 then; candidates count as ranked the wrong way round."""
    scores = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    h = torch.zeros_like(scores, requires_grad=True)
    loss = lipo_loss(h, scores, torch.ones_like(scores, dtype=torch.bool))
    loss.sum().backward()
    assert h.grad is not None
    torch.testing.assert_close(h.grad[0][[1, 2, 0]], h.grad[1])
    assert h.grad[1, 2] < 0 < h.grad[1, 0]
    torch.testing.assert_close(loss[0], loss[1])


def test_strengths_of_any_size_give_finite_losses() -> None:
    h = torch.tensor([[-900.0, 0.0, 900.0]], requires_grad=True)
    scores, exist = torch.tensor([[2.0, 1.0, 0.0]]), torch.ones((1, 3), dtype=torch.bool)
    losses = (plackett_luce_loss, pro_loss, lipo_loss, listnet_loss, nca_loss, mpo_loss)
    for loss in losses:
        (slope,) = torch.autograd.grad(loss(h, scores, exist).sum(), h)
        assert slope.isfinite().all() and loss(h, scores, exist).isfinite().all()
