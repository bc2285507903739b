"""Losses of lists against slow truths: what is compared, on which lists, and what must not matter.

A slow truth sees one prompt without padding, as plain lists of numbers. Its third argument holds
the strengths once more, for what has no gradient: derivatives move the first alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

Slow = Callable[[list[float], list[float], list[float]], float]

LISTS = [
    [2.0, 1.0, 1.0, 0.0, 2.0],
    [0.5, 0.5],
    [1.0],
    [-3.0, 4.0, 0.0],
    [],
    [3.0, -1.0],
    [1.5, 0.5, -0.25, 0.75],
    [1.0, 2.0, 0.0, 0.5, -1.5],
]
"""Some equal, all equal, one candidate, none, two, and any order; ragged."""

NOTHING_TO_RANK = [place for place, scores in enumerate(LISTS) if len(set(scores)) < 2]
WIDTH = max(map(len, LISTS))


@dataclass(frozen=True)
class LossCase:
    """One loss under one choice of settings.

    Attributes:
        loss: ([B, K] strengths, [B, K] scores, [B, K] valid) -> [B].
        slow: the truth for one prompt.
        mistake: what differs from it in one sign or term.
        by_order: only the order of the scores counts.
    """

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    slow: Slow
    mistake: Slow
    by_order: bool = False


def tables(lists: list[list[float]] = LISTS) -> tuple[Tensor, Tensor]:
    """[B, K] scores, NaN where no candidate exists, and [B, K] which do."""
    rows = [scores + [math.nan] * (WIDTH - len(scores)) for scores in lists]
    scores = torch.tensor(rows, dtype=torch.float64)
    return scores, ~scores.isnan()


def strengths(seed: int = 0) -> Tensor:
    """[B, K] float64, all below 0 as log-probs are; NaN where no candidate exists."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn((len(LISTS), WIDTH), generator=generator, dtype=torch.float64)
    return torch.where(tables()[1], -0.2 - drawn.abs(), torch.nan)


def known(row: Tensor, place: int) -> list[float]:
    """The numbers of a prompt, without padding."""
    found: list[float] = row[: len(LISTS[place])].tolist()
    return found


def derivative(slow: Slow, h: list[float], scores: list[float], place: int) -> float:
    """By differences of the fourth order: their error is below 1e-10 here."""
    step = 2e-4

    def at(steps: int) -> float:
        moved = list(h)
        moved[place] += steps * step
        return slow(moved, scores, h)

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


def require_the_slow_values(case: LossCase) -> None:
    """Value and gradient, with NaN in every place that is not to be read."""
    h = strengths().requires_grad_()
    found = case.loss(h, *tables())
    found.sum().backward()
    found = found.detach()
    assert h.grad is not None and found.dtype == torch.float64
    for place, scores in enumerate(LISTS):
        mine = known(h.detach()[place], place)
        assert float(found[place]) == pytest.approx(case.slow(mine, scores, mine), abs=1e-9)
        slopes = [derivative(case.slow, mine, scores, k) for k in range(len(scores))]
        assert known(h.grad[place], place) == pytest.approx(slopes, abs=1e-9)
        assert not h.grad[place, len(scores) :].any()


def require_that_the_mistake_is_noticed(case: LossCase) -> None:
    """The comparison above tells the two apart, in the value of some prompt."""
    found = case.loss(strengths(), *tables())
    gaps = []
    for place, scores in enumerate(LISTS):
        mine = known(strengths()[place], place)
        gaps.append(abs(float(found[place]) - case.mistake(mine, scores, mine)))
    assert max(gaps) > 1e-3


def require_exact_zeros(case: LossCase) -> None:
    """One candidate, none, or equal scores alone: nothing is learnt, to the last bit."""
    for dtype in (torch.float64, torch.float32):
        h = strengths().to(dtype).requires_grad_()
        scores, valid = tables()
        found = case.loss(h, scores.to(dtype), valid)
        found.sum().backward()
        found = found.detach()
        assert h.grad is not None
        for place in NOTHING_TO_RANK:
            assert float(found[place]) == 0
            assert not h.grad[place].any()
        assert all(found[place] != 0 for place in range(len(LISTS)) if place not in NOTHING_TO_RANK)


def require_invariance(case: LossCase) -> None:
    """The order of candidates, further padding, the other prompts, and a monotone map of scores."""
    h, (scores, valid) = strengths(), tables()
    found = case.loss(h, scores, valid)
    for order in (torch.arange(WIDTH).flip(0), torch.tensor([2, 0, 4, 1, 3])):
        mixed = case.loss(h[:, order], scores[:, order], valid[:, order])
        torch.testing.assert_close(mixed, found, rtol=0, atol=1e-12)
    nothing = torch.full((len(LISTS), 3), torch.nan, dtype=torch.float64)
    wider = torch.cat([valid, nothing == 0], dim=1)
    padded = case.loss(torch.cat([h, nothing], dim=1), torch.cat([scores, nothing], dim=1), wider)
    torch.testing.assert_close(padded, found, rtol=0, atol=1e-12)
    alone = [case.loss(*(x[b : b + 1] for x in (h, scores, valid))) for b in range(len(LISTS))]
    torch.testing.assert_close(torch.cat(alone), found, rtol=0, atol=1e-12)
    mapped = case.loss(h, scores.exp() - 7, valid)
    assert torch.allclose(mapped, found, rtol=0, atol=1e-9) == case.by_order


# Truths that many share


def log1p_exp(x: float) -> float:
    return math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pairs(scores: list[float]) -> Iterator[tuple[int, int]]:
    """(worse, better), all that are strictly ordered."""
    for i, j in itertools.product(range(len(scores)), repeat=2):
        if scores[i] < scores[j]:
            yield i, j


def has_order(scores: list[float]) -> bool:
    return any(True for _ in pairs(scores))


def order_probability(order: tuple[int, ...], h: dict[int, float]) -> float:
    """Of drawing candidates by e^h without replacement in this order."""
    left, found = set(order), 1.0
    for place in order:
        found *= math.exp(h[place]) / sum(math.exp(h[i]) for i in left)
        left.remove(place)
    return found


def first_probability(place: int, h: dict[int, float]) -> float:
    """That it is drawn first, summed over all orders in which it is."""
    return sum(order_probability(o, h) for o in itertools.permutations(h) if o[0] == place)
