"""Reward-model losses against loops over pairs and tokens."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rrhf.algorithms import reward_losses

WIDTH = 8


@dataclass
class Group:
    """One prompt: ids and preference of each response."""

    ids: list[list[int]]
    preferences: list[float]


GROUPS = [
    Group([[5, 6, 2], [5, 7, 8, 9, 2]], [1.0, 0.0]),  # differ at 1, the better is shorter
    Group([[1, 2], [1, 3, 4, 2], [9, 2], [1, 3, 2]], [0.0, 3.0, 1.0, 1.0]),  # a group with a tie
    Group([[4, 4, 2]], [1.0]),  # alone: no pair
    Group([[4, 4, 4], [4, 4, 4, 7, 2]], [0.0, 1.0]),  # cut short inside the common beginning
    Group([[6, 6, 2], [6, 6, 2]], [0.0, 1.0]),  # the same tokens
    Group([[2], [3, 2]], [1.0, 0.0]),  # an empty response is its EOS
]

LOSS_TYPES = ("sequence-wise", "token-wise", "per_sample", "average", "last_token")


def neg_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(-x, 0.0)


def grids(seed: int = 0, garbage: float = math.nan) -> dict[str, Tensor]:
    width = max(len(group.ids) for group in GROUPS)
    shape = (len(GROUPS), width)
    generator = torch.manual_seed(seed)
    token_scores = torch.randn(*shape, WIDTH, dtype=torch.float64, generator=generator)
    ids = torch.zeros(*shape, WIDTH, dtype=torch.int64)
    lengths = torch.zeros(shape, dtype=torch.int64)
    preferences = torch.full(shape, garbage, dtype=torch.float64)
    valid = torch.zeros(shape, dtype=torch.bool)
    for b, group in enumerate(GROUPS):
        for k, response in enumerate(group.ids):
            ids[b, k, : len(response)] = torch.tensor(response)
            lengths[b, k] = len(response)
            preferences[b, k] = group.preferences[k]
            valid[b, k] = True
    token_scores[~valid] = garbage
    end = token_scores.gather(-1, (lengths - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return {
        "token_scores": token_scores,
        "ids": ids,
        "lengths": lengths,
        "preferences": preferences,
        "valid": valid,
        "end": end,
    }


def ordered(group: Group) -> list[tuple[int, int]]:
    pairs = itertools.permutations(range(len(group.ids)), 2)
    return [(i, j) for i, j in pairs if group.preferences[i] < group.preferences[j]]


def slow_pair(
    g: dict[str, Tensor], b: int, worse: int, better: int, loss_type: str, margin: float
) -> float | None:
    left, right = GROUPS[b].ids[worse], GROUPS[b].ids[better]
    scores = {k: g["token_scores"][b, k].tolist() for k in (worse, better)}
    if loss_type in ("sequence-wise", "last_token"):
        lead = scores[better][len(right) - 1] - scores[worse][len(left) - 1]
        return neg_log_sigmoid(lead - margin)
    start = 0
    while left[start : start + 1] == right[start : start + 1]:
        if start == len(left):
            return None
        start += 1
    if loss_type == "average":
        means = []
        for k, response in ((worse, left), (better, right)):
            own = scores[k][start : len(response)] or scores[k][len(response) - 1 : len(response)]
            means.append(sum(own) / len(own))
        return neg_log_sigmoid(means[1] - means[0] - margin)
    total, count = 0.0, 0
    for t in range(start, max(len(left), len(right))):
        total += neg_log_sigmoid(scores[better][t] - scores[worse][t] - margin)
        count += 1
    return total / count


def fast(
    g: dict[str, Tensor], loss_type: str, margin: float | Tensor = 0.0
) -> tuple[Tensor, Tensor]:
    if loss_type in reward_losses.TOKEN_LOSS_TYPES:
        return reward_losses.token_pair_loss(
            g["token_scores"],
            g["ids"],
            g["lengths"],
            g["preferences"],
            g["valid"],
            loss_type,
            margin,
        )
    return reward_losses.pairwise_loss(g["end"], g["preferences"], g["valid"], margin)


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_each_loss_type_equals_the_slow_oracle(loss_type: str, margin: float) -> None:
    g = grids()
    totals, counts = fast(g, loss_type, margin)
    for b, group in enumerate(GROUPS):
        slow = [slow_pair(g, b, i, j, loss_type, margin) for i, j in ordered(group)]
        known = [loss for loss in slow if loss is not None]
        assert int(counts[b]) == len(known)
        assert float(totals[b]) == pytest.approx(math.fsum(known), abs=1e-9)


def test_loss_types_differ_from_each_other() -> None:
    g = grids()
    values = {name: float(fast(g, name)[0].sum()) for name in LOSS_TYPES}
    assert values["token-wise"] == values["per_sample"]
    assert values["sequence-wise"] == values["last_token"]
    assert len(set(values.values())) == 3


def test_the_pair_loss_is_binary_cross_entropy_of_the_difference() -> None:
    end = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    preferences = torch.tensor([[1.0, 0.0]])
    totals, counts = reward_losses.pairwise_loss(end, preferences, preferences >= 0)
    peer = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(1.5, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    )
    assert float(totals) == pytest.approx(float(peer), abs=1e-12) and counts.tolist() == [1]


def test_margins_follow_the_preferences() -> None:
    g = grids()
    margins = reward_losses.preference_margins(g["preferences"], 0.25)
    for loss_type in ("sequence-wise", "token-wise", "average"):
        totals, _ = fast(g, loss_type, margins)
        for b, group in enumerate(GROUPS):
            slow = [
                slow_pair(
                    g, b, i, j, loss_type, 0.25 * (group.preferences[j] - group.preferences[i])
                )
                for i, j in ordered(group)
            ]
            known = math.fsum(loss for loss in slow if loss is not None)
            assert float(totals[b]) == pytest.approx(known, abs=1e-9)


@pytest.mark.parametrize("loss_type", ["sequence-wise", "token-wise", "average"])
def test_gradients_are_right_and_padding_cannot_make_them_nan(loss_type: str) -> None:
    clean = grids(garbage=0.0)

    def loss(token_scores: Tensor) -> Tensor:
        index = (clean["lengths"] - 1).clamp_min(0).unsqueeze(-1)
        end = token_scores.gather(-1, index).squeeze(-1)
        return fast({**clean, "token_scores": token_scores, "end": end}, loss_type)[0].sum()

    scores = clean["token_scores"].clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (scores,))
    dirty = grids(garbage=math.nan)["token_scores"].requires_grad_()
    loss(dirty).backward()
    assert dirty.grad is not None
    assert bool(dirty.grad[clean["valid"]].isfinite().all())


def test_candidate_order_does_not_matter() -> None:
    g = grids()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {key: value[:, order] for key, value in g.items()}
    for loss_type in LOSS_TYPES:
        one, two = fast(g, loss_type), fast(shuffled, loss_type)
        assert torch.allclose(one[0], two[0], atol=1e-12, rtol=0)
        assert torch.equal(one[1], two[1])


def test_token_wise_does_not_read_behind_the_longer_response() -> None:
    g = grids()
    longest = torch.where(g["valid"], g["lengths"], 0).max(-1).values
    behind = torch.arange(WIDTH) >= longest[:, None, None]
    dirty = torch.where(behind, torch.nan, g["token_scores"])
    ids = torch.where(torch.arange(WIDTH) < g["lengths"].unsqueeze(-1), g["ids"], 777)
    ids[:, 0] += torch.where(ids[:, 0] == 777, 1, 0)  # paddings that differ from each other
    one = fast(g, "token-wise")
    two = fast({**g, "token_scores": dirty, "ids": ids}, "token-wise")
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_mean_over_pairs_weighs_prompts_alike() -> None:
    totals, counts = fast(grids(), "sequence-wise")
    means, prompts = reward_losses.mean_over_pairs(totals, counts)
    assert counts.tolist() == [1, 5, 0, 1, 1, 1]
    assert prompts.tolist() == [1, 1, 0, 1, 1, 1]
    assert float(means[1]) == pytest.approx(float(totals[1]) / 5)
    assert float(means[2]) == 0.0


def test_equal_and_lone_responses_form_no_token_pair() -> None:
    _, counts = fast(grids(), "token-wise")
    assert counts.tolist() == [1, 5, 0, 1, 0, 1]


def test_first_difference_ignores_padding() -> None:
    left = torch.tensor([[1, 2, 0, 90], [1, 2, 3, 90], [1, 2, 90, 90]])
    right = torch.tensor([[1, 2, 0, 91], [1, 5, 91, 91], [1, 2, 90, 4]])
    lengths = (torch.tensor([2, 3, 2]), torch.tensor([2, 2, 4]))
    assert reward_losses.first_difference(left, right, lengths).tolist() == [2, 1, 2]
