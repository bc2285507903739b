"""Whose log-probs are taken, and what all ranks must do together, over roots made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_threads import on_ranks
from torch import Tensor, nn

from rrhf.data.collate import TokenBatch
from rrhf.models.policy_with_value import ActorCriticOutputs
from rrhf.training.core.parallel import Parallel
from rrhf.training.online.experience import RolloutRow
from rrhf.training.online.logprob_pass import LogprobPass


class Codec:
    end_id, pad_id = 1, 0


class Root(nn.Module):
    """The log-prob of a token is its number below zero, and a gap; its value is its double."""

    def __init__(self, gap: float = 0.0, has_critic: bool = True, at: int = -1) -> None:
        super().__init__()
        self.value = nn.Identity() if has_critic else None
        self.gap, self.at = gap, at
        self.read: list[tuple[list[list[int]], bool]] = []

    def forward(self, batch: TokenBatch, values_only: bool = False) -> ActorCriticOutputs:
        rows = [
            ids[:length]
            for ids, length in zip(
                batch.response_ids.tolist(), batch.response_lengths.tolist(), strict=True
            )
        ]
        self.read.append((rows, values_only))
        tokens = batch.response_ids.float()
        logprobs = -tokens + self.gap * ((tokens == self.at) if self.at >= 0 else 1)
        values = None if self.value is None else 2 * tokens
        return ActorCriticOutputs(0 * logprobs if values_only else logprobs, values)


def sampled() -> list[RolloutRow]:
    responses = ([3], [4, 6, 8], [5, 7])
    return [
        RolloutRow(place, 0, [5] * (place + 1), ids, -torch.tensor(ids).float())
        for place, ids in enumerate(responses)
    ]


def a_pass(root: Any, parallel: Parallel | None = None, recompute: bool = False) -> LogprobPass:
    codec: Any = Codec()

    def reference(batch: TokenBatch) -> Tensor:
        return -2 * batch.response_ids.float()

    return LogprobPass(root, reference, codec, parallel or Parallel(), 2, recompute)


def logprobs(read: list[RolloutRow]) -> list[list[float]]:
    return [one.old_logprobs.tolist() for one in read]


SAMPLED = [[-3.0], [-4.0, -6.0, -8.0], [-5.0, -7.0]]


def shifted(gap: float) -> list[Any]:
    return [pytest.approx([x + gap for x in row]) for row in SAMPLED]


def test_where_both_agree_those_of_sampling_stay() -> None:
    for root, read in ((Root(0.5e-4), True), (Root(0.5e-4, has_critic=False), False)):
        made = sampled()
        a_pass(root).compute(made)
        assert logprobs(made) == SAMPLED
        trial, *others = root.read
        assert trial == ([[4, 6, 8]], False)  # the longest
        assert [values_only for _, values_only in others] == [True] * (2 if read else 0)


@pytest.mark.parametrize("gap", [0.5, -0.5, 2e-4, -2e-4])
def test_where_they_differ_either_way_the_trainers_are_taken(gap: float) -> None:
    made, root = sampled(), Root(gap)
    a_pass(root).compute(made)
    assert logprobs(made) == shifted(gap)
    for one, tokens in zip(made, ([3], [4, 6, 8], [5, 7]), strict=True):
        assert one.values is not None and one.values.tolist() == [2.0 * t for t in tokens]


def test_a_gap_late_in_a_long_response_is_found() -> None:
    made = sampled()
    a_pass(Root(0.5, at=8)).compute(made)
    assert made[1].old_logprobs.tolist() == [-4.0, -6.0, -7.5]


def test_under_bf16_nothing_is_tried() -> None:
    made, root = sampled(), Root()
    a_pass(root, recompute=True).compute(made)
    assert [values_only for _, values_only in root.read] == [False, False]
    assert logprobs(made) == SAMPLED


def test_the_reference_is_read_row_by_row() -> None:
    made = sampled()
    a_pass(Root()).compute_reference(made)
    assert [one.reference_logprobs.tolist() for one in made] == [
        [2 * x for x in row] for row in SAMPLED
    ]


@pytest.mark.parametrize("gaps", [(0.0, 0.5), (0.5, 0.0)])
def test_ranks_decide_together(gaps: tuple[float, float]) -> None:
    roots: list[nn.Module] = [Root(gap) for gap in gaps]

    def work(rank: int, parallel: Parallel) -> list[list[float]]:
        made = sampled()
        a_pass(roots[rank], parallel).compute(made)
        assert {values_only for _, values_only in vars(roots[rank])["read"][1:]} == {False}
        return logprobs(made)

    assert on_ranks(roots, work) == [shifted(gap) for gap in gaps]


@pytest.mark.parametrize("counts", [(3, 1), (0, 3), (3, 0)])
def test_ranks_with_less_to_read_join_in(counts: tuple[int, int]) -> None:
    """Each forward of a root whose weights are spread is one that all ranks must make."""
    roots: list[nn.Module] = [Root(), Root()]

    def work(rank: int, parallel: Parallel) -> list[Tensor | None]:
        made = sampled()[: counts[rank]]
        a_pass(roots[rank], parallel).compute(made)
        return [one.values for one in made]

    for outcome, count in zip(on_ranks(roots, work), counts, strict=True):
        assert isinstance(outcome, list) and len(outcome) == count
        assert all(values is not None for values in outcome)
    forwards = [len(vars(root)["read"]) for root in roots]
    assert forwards == [3, 3]  # the trial, and two batches of two rows at most
