"""Rewards against loops over ragged rows; the traps are the neighbours of the last token."""

import math

import pytest
import torch
from torch import Tensor

from rrhf.algorithms.rewards import (
    clip_scores,
    count_clipped,
    on_last_token,
    penalise_unfinished,
    token_rewards,
)

TOLERANCE = 1e-9  # float64, a product and a sum
WIDTH = 7
LENGTHS = [*range(1, WIDTH + 1), 3, 0]


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Scores [N], lengths [N] and KL [N, T] (dirty behind each row's end), every length in turn."""
    generator = torch.manual_seed(23)
    scores = 2 * torch.randn(len(LENGTHS), dtype=torch.float64, generator=generator)
    kl = torch.randn(len(LENGTHS), WIDTH, dtype=torch.float64, generator=generator)
    for row, length in enumerate(LENGTHS):
        kl[row, length:] = math.nan
    return scores, torch.tensor(LENGTHS), kl


def looped(
    scores: list[float],
    lengths: list[int],
    kl: list[list[float]] | None,
    beta: float,
    shift: int = 0,
) -> Tensor:
    """Token by token; `shift` puts the score that many positions after the last token."""
    table = []
    for score, length, row in zip(scores, lengths, kl or [[]] * len(scores), strict=True):
        rewards = [0.0] * WIDTH
        for t in range(length):
            if kl is not None:
                rewards[t] -= beta * row[t]
        if length and 0 <= length - 1 + shift < WIDTH:
            rewards[length - 1 + shift] += score
        table.append(rewards)
    return torch.tensor(table, dtype=torch.float64)


def worst(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


@pytest.mark.parametrize("beta", [0.0, 0.05, 3.0])
def test_token_rewards_equal_a_loop_for_every_length(beta: float) -> None:
    scores, lengths, kl = rows()
    got = token_rewards(scores, lengths, WIDTH, kl, beta)
    arguments = (scores.tolist(), LENGTHS, kl.tolist(), beta)
    assert worst(got, looped(*arguments)) < TOLERANCE
    assert worst(got, looped(*arguments, shift=1)) > 1e-2  # the control: on the first pad
    assert worst(got, looped(*arguments, shift=-1)) > 1e-2  # the control: one token early
    if beta:
        wrong_sign = looped(scores.tolist(), LENGTHS, kl.tolist(), -beta)
        assert worst(got, wrong_sign) > 1e-2


def test_the_score_stands_on_the_last_token_alone() -> None:
    scores, lengths, _ = rows()
    placed = on_last_token(scores, lengths, WIDTH)
    for row, length in enumerate(LENGTHS):
        where = [t for t in range(WIDTH) if float(placed[row, t]) != 0.0]
        assert where == ([length - 1] if length else [])
        if length:
            assert float(placed[row, length - 1]) == float(scores[row])


def test_a_mask_that_leaves_out_the_eos_is_told_apart() -> None:
    # With pad = eos, a length counted as `ids != pad` is one short: the score would move.
    pad = eos = 2
    ids = torch.tensor([[5, 6, eos, pad, pad], [5, eos, pad, pad, pad]])
    scores = torch.tensor([1.0, -1.0])
    right = on_last_token(scores, torch.tensor([3, 2]), 5)
    wrong = on_last_token(scores, (ids != pad).sum(-1), 5)
    assert right.nonzero().tolist() == [[0, 2], [1, 1]]
    assert wrong.nonzero().tolist() == [[0, 1], [1, 0]]


def test_without_kl_the_rewards_are_the_scores() -> None:
    scores, lengths, kl = rows()
    bare = token_rewards(scores, lengths, WIDTH)
    assert torch.equal(bare, on_last_token(scores, lengths, WIDTH))
    # A coefficient without a KL, and a KL without a coefficient, change nothing.
    assert torch.equal(bare, token_rewards(scores, lengths, WIDTH, None, 0.5))
    infinite = torch.full_like(kl, math.inf)
    assert torch.equal(bare, token_rewards(scores, lengths, WIDTH, infinite, 0.0))


def test_the_sum_of_a_row_is_its_sequence_reward() -> None:
    scores, lengths, kl = rows()
    got = token_rewards(scores, lengths, WIDTH, kl, 0.1).sum(-1)
    for row, length in enumerate(LENGTHS):
        divergence = math.fsum(float(kl[row, t]) for t in range(length))
        expected = float(scores[row]) - 0.1 * divergence if length else 0.0
        assert float(got[row]) == pytest.approx(expected, abs=TOLERANCE)


def test_scores_are_clipped_before_the_kl_is_added() -> None:
    scores = torch.tensor([7.0, -9.0, 4.0], dtype=torch.float64)
    lengths = torch.tensor([1, 2, 2])
    kl = torch.full((3, 2), 100.0, dtype=torch.float64)
    clipped = clip_scores(scores, 5.0)
    assert clipped.tolist() == [5.0, -5.0, 4.0]
    assert count_clipped(scores, 5.0).tolist() == [1, 1, 0]
    got = token_rewards(clipped, lengths, 2, kl, 0.1)
    assert got.tolist() == [[5.0 - 10.0, 0.0], [-10.0, -15.0], [-10.0, -6.0]]
    # The control: a clip of everything, KL included, is another thing.
    everything = clip_scores(token_rewards(scores, lengths, 2, kl, 0.1), 5.0)
    assert worst(got, everything) > 1
    assert clip_scores(scores, None) is scores
    assert count_clipped(scores, None).tolist() == [0, 0, 0]


def test_an_unfinished_response_pays_even_where_its_score_is_clipped() -> None:
    scores = torch.tensor([1.5, 1.5, -9.0], dtype=torch.float64)
    is_finished = torch.tensor([True, False, False])
    got = penalise_unfinished(clip_scores(scores, 5.0), is_finished, 2.0)
    assert got.tolist() == [1.5, -0.5, -7.0]
    swallowed = clip_scores(penalise_unfinished(scores, is_finished, 2.0), 5.0)
    assert swallowed.tolist() != got.tolist()  # the control: the other order loses the penalty
    assert penalise_unfinished(scores, is_finished, 0.0).tolist() == scores.tolist()


def test_rewards_are_constants() -> None:
    scores, lengths, _ = rows()
    kl = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.float64, requires_grad=True)
    got = token_rewards(scores.requires_grad_(), lengths, WIDTH, kl, 0.1)
    assert not got.requires_grad


def test_programming_mistakes_are_refused() -> None:
    scores, lengths, kl = rows()
    with pytest.raises(AssertionError, match="negative KL coefficient"):
        token_rewards(scores, lengths, WIDTH, kl, -0.1)
    with pytest.raises(AssertionError, match="one KL for each"):
        token_rewards(scores, lengths, WIDTH, kl[:, 1:], 0.1)
    with pytest.raises(AssertionError, match="limit"):
        clip_scores(scores, 0.0)
    with pytest.raises(AssertionError, match="negative penalty"):
        penalise_unfinished(scores, torch.ones(len(LENGTHS), dtype=torch.bool), -1.0)
    with pytest.raises(AssertionError, match="yes or no"):
        penalise_unfinished(scores, torch.ones(len(LENGTHS)), 1.0)
    with pytest.raises(AssertionError, match="longer than the table"):
        on_last_token(scores, lengths, WIDTH - 1)
    assert on_last_token(scores[:0], lengths[:0], WIDTH).shape == (0, WIDTH)
