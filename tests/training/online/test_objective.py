"""The terms of PPO's loss over one micro-batch, token by token in plain arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_cases import settings

from rrhf.algorithms.kl import KLController
from rrhf.data.collate import EncodedSet, TokenBatch, TokenExperience, collate
from rrhf.models.policy_with_value import ActorCriticOutputs
from rrhf.training.online.objective import PPOObjective


@dataclass
class Token:
    """What is known of a token: in the rollout, and now."""

    old: float
    reference: float
    advantage: float
    value_then: float
    wanted: float
    now: float
    value: float
    entropy: float

    @property
    def ratio(self) -> float:
        return math.exp(self.now - self.old)


# Ratios far up and far down with advantages of both signs; values within their clip and beyond.
ROWS = [
    [
        Token(-1.0, -1.2, 1.5, 0.0, 2.0, -0.7, 1.0, 0.4),
        Token(-2.0, -1.0, -1.0, 0.5, 0.4, -0.2, 0.6, 1.1),
        Token(-0.5, -0.6, 2.0, 1.0, 3.0, -1.5, 0.2, 0.2),
    ],
    [Token(-1.5, -1.4, -0.5, -1.0, 0.0, -2.5, -0.2, 0.9)],
]
FILLER = [Token(-9.0, -3.0, 50.0, 7.0, -40.0, -1.0, 90.0, 30.0)] * 2
TOKENS = [token for row in ROWS for token in row]


def batch(rows: list[list[Token]] = ROWS, filler: bool = True) -> TokenBatch:
    names = {
        "old_logprobs": "old",
        "reference_logprobs": "reference",
        "advantages": "advantage",
        "old_values": "value_then",
        "returns": "wanted",
    }

    def one(row: list[Token]) -> EncodedSet:
        tensors = {
            name: torch.tensor([getattr(token, field) for token in row])
            for name, field in names.items()
        }
        return EncodedSet([5, 6], [[7] * len(row)], experience=[TokenExperience(**tensors)])

    sets = [one(row) for row in rows]
    return collate([*sets, replace(one(FILLER), weight=0.0)] if filler else sets, 2)


def outputs(rows: list[list[Token]] = ROWS, filler: bool = True) -> ActorCriticOutputs:
    """With rubbish at padding."""
    rows = [*rows, FILLER] if filler else rows

    def table(name: str) -> Any:
        found = torch.full((len(rows), max(map(len, rows))), 17.0)
        for place, row in enumerate(rows):
            found[place, : len(row)] = torch.tensor([getattr(token, name) for token in row])
        return found.requires_grad_()

    return ActorCriticOutputs(table("now"), table("value"), table("entropy"))


def objective(coefficient: float = 0.05, **changes: Any) -> PPOObjective:
    config = settings(Path("w"), "o", **changes)
    return PPOObjective(config, KLController(coefficient))


def surrogate(token: Token, low: float, high: float, dual: float | None = None) -> float:
    held = min(max(token.ratio, 1 - low), 1 + high)
    loss = max(-token.ratio * token.advantage, -held * token.advantage)
    if dual is not None and token.advantage < 0:
        loss = min(loss, -dual * token.advantage)
    return loss


def value_loss(token: Token, limit: float | None) -> float:
    free = (token.value - token.wanted) ** 2
    if limit is None:
        return free / 2
    held = min(max(token.value, token.value_then - limit), token.value_then + limit)
    return max(free, (held - token.wanted) ** 2) / 2


@pytest.mark.parametrize(
    ("changes", "clips"),
    [
        ({}, (0.2, 0.2, None)),
        ({"clip_range_ratio": 0.3}, (0.3, 0.3, None)),
        ({"clip_range_ratio_high": 0.28}, (0.2, 0.28, None)),
        ({"dual_clip": 3.0}, (0.2, 0.2, 3.0)),
    ],
    ids=str,
)
def test_the_policys_term(changes: dict[str, Any], clips: tuple[float, float, float]) -> None:
    made = objective(**changes)
    term = made(outputs(), batch())["policy"]
    assert term.total.item() == pytest.approx(sum(surrogate(t, *clips) for t in TOKENS), rel=1e-5)
    assert term.weight == 1.0
    assert float(made.denominators(batch())["policy"]) == 4
    means = {name: float(total / count) for name, (total, count) in term.metrics.items()}
    assert means["ratio"] == pytest.approx(sum(t.ratio for t in TOKENS) / 4, rel=1e-5)
    assert means["entropy"] == pytest.approx(sum(t.entropy for t in TOKENS) / 4, rel=1e-5)
    every = [surrogate(t, *clips) for t in TOKENS]
    others = [surrogate(t, 0.2, 0.2) for t in TOKENS]
    assert (every != others) is bool(changes)  # the control: each setting decides some token


@pytest.mark.parametrize("limit", [0.2, 1.5, 0.0])
def test_the_critics_term(limit: float) -> None:
    term = objective(clip_range_value=limit, vf_coeff=0.3)(outputs(), batch())["value"]
    every = [value_loss(t, limit or None) for t in TOKENS]
    assert term.total.item() == pytest.approx(sum(every), rel=1e-5)
    assert term.weight == 0.3
    if limit == 0.2:
        assert every != [value_loss(t, None) for t in TOKENS]  # the control
    assert float(term.metrics["return"][0]) == pytest.approx(sum(t.wanted for t in TOKENS))


def test_the_entropy_is_a_bonus() -> None:
    term = objective(entropy_coeff=0.01)(outputs(), batch())["entropy"]
    assert term.total.item() == pytest.approx(-sum(t.entropy for t in TOKENS), rel=1e-5)
    assert term.weight == 0.01
    assert "entropy" not in objective()(outputs(), batch())


def test_the_kl_in_the_loss_is_that_from_the_reference_at_the_controllers_coefficient() -> None:
    made = objective(coefficient=0.7, kl_in="loss", kl_coeff=0.05)
    term = made(outputs(), batch())["kl"]
    gaps = [t.reference - t.now for t in TOKENS]
    assert term.total.item() == pytest.approx(
        sum(math.exp(gap) - 1 - gap for gap in gaps), rel=1e-5
    )
    assert term.weight == 0.7
    made._controller = KLController(0.2)
    assert made(outputs(), batch())["kl"].weight == 0.2
    assert "kl" not in objective(coefficient=0.7)(outputs(), batch())


def test_sums_over_a_response_are_measured_by_the_longest_there_may_be() -> None:
    changes: dict[str, Any] = {
        "loss_reduction": "sequence-sum",
        "max_new_tokens": 8,
        "kl_in": "loss",
        "entropy_coeff": 0.01,
        "vf_coeff": 0.4,
    }
    made = objective(coefficient=0.2, **changes)
    terms = made(outputs(), batch())
    weights = {name: term.weight for name, term in terms.items()}
    assert weights == pytest.approx(
        {"policy": 1 / 8, "value": 0.4 / 8, "entropy": 0.01 / 8, "kl": 0.2 / 8}
    )
    wanted = sum(surrogate(t, 0.2, 0.2) for t in TOKENS)
    assert terms["policy"].total.item() == pytest.approx(wanted, rel=1e-5)
    assert float(made.denominators(batch())["policy"]) == 2  # responses that count


def test_means_of_responses_weigh_each_alike() -> None:
    made = objective(loss_reduction="sequence-mean")
    wanted = sum(sum(surrogate(t, 0.2, 0.2) for t in row) / len(row) for row in ROWS)
    assert made(outputs(), batch())["policy"].total.item() == pytest.approx(wanted, rel=1e-5)


def test_while_the_critic_learns_alone_nothing_else_weighs() -> None:
    made = objective(kl_in="loss", entropy_coeff=0.01)
    made.policy_is_frozen = True
    weights = {name: term.weight for name, term in made(outputs(), batch()).items()}
    assert weights == {"policy": 0.0, "value": 0.1, "entropy": 0.0, "kl": 0.0}


def test_a_filler_and_padding_have_no_slope() -> None:
    made, found = objective(kl_in="loss", entropy_coeff=0.01), outputs()
    terms = made(found, batch())
    sum(term.total for term in terms.values()).backward()  # type: ignore[union-attr]
    counts = torch.tensor([[True, True, True], [True, False, False], [False] * 3])
    for tensor in (found.logprobs, found.values, found.entropy):
        assert tensor is not None and tensor.grad is not None
        assert bool((tensor.grad[~counts] == 0).all())
    assert found.values is not None and found.values.grad is not None
    assert bool((found.values.grad[counts] != 0).any())


def test_the_largest_ratio_is_that_of_all_micro_batches_since_it_was_asked_for() -> None:
    made = objective()
    largest = max(t.ratio for t in TOKENS)
    assert largest == ROWS[0][1].ratio
    for row in ROWS:  # the largest is in the first of them
        made(outputs([row]), batch([row]))
    assert made.take_largest_ratio() == pytest.approx(largest, rel=1e-5)
    assert made.take_largest_ratio() == 0.0
    made(outputs(ROWS[1:]), batch(ROWS[1:]))
    assert made.take_largest_ratio() == pytest.approx(ROWS[1][0].ratio, rel=1e-5)
