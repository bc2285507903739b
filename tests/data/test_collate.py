"""Batches keep every id in its place, whatever the lengths."""

from __future__ import annotations

import pytest
import torch

from rrhf.data.collate import EncodedSet, TokenExperience, collate, padded_groups

SETS = [
    EncodedSet([5, 6, 7], [[8, 9], [10]], scores=[0.5, -1.0]),
    EncodedSet([5], [[11, 12, 13]], scores=[2.0], weight=0.0),
]


def test_rows_join_prompt_and_response_without_a_gap() -> None:
    batch = collate(SETS, pad_id=9)  # 9 is also a real token: masks must not look at ids
    ids, mask, positions = batch.full_rows()
    rows = [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)]
    assert rows == [[5, 6, 7, 8, 9], [5, 6, 7, 10], [5, 11, 12, 13]]
    assert positions[2].tolist() == [0, 0, 0, 1, 2, 3]
    assert positions[0, :5].tolist() == [0, 1, 2, 3, 4]
    assert batch.response_mask.sum(1).tolist() == [2, 1, 3]
    assert batch.row_weights.tolist() == [1.0, 1.0, 0.0]


def test_scores_need_every_set() -> None:
    assert collate(SETS, 0).scores is not None
    assert collate([*SETS, EncodedSet([1], [[2]])], 0).scores is None


def test_groups_are_a_grid_of_prompts_by_candidates() -> None:
    batch = collate(SETS, 0)
    assert batch.scores is not None
    values = batch.scores.clone().requires_grad_()
    grid, valid = padded_groups(values, batch.prompt_index, 2)
    assert grid.tolist() == [[0.5, -1.0], [2.0, 0.0]]
    assert valid.tolist() == [[True, True], [True, False]]
    grid.sum().backward()
    assert values.grad is not None and torch.equal(values.grad, torch.ones(3))


def test_a_batch_moves_whole() -> None:
    moved = collate(SETS, 0).to("meta")
    assert moved.prompt_ids.device.type == moved.row_weights.device.type == "meta"


def stored(*advantages: float) -> TokenExperience:
    return TokenExperience(-torch.tensor(advantages), torch.tensor(advantages))


def test_experience_stands_next_to_its_tokens() -> None:
    sets = [
        EncodedSet([5], [[8, 9, 7], [10]], experience=[stored(0.5, 1.5, -1.0), stored(3.0)]),
        EncodedSet([5, 6], [[1, 2]], experience=[stored(4.0, 0.25)]),
    ]
    found = collate(sets, pad_id=0).to("cpu").experience
    assert found is not None and found.old_values is None
    assert found.advantages.tolist() == [[0.5, 1.5, -1.0], [3.0, 0.0, 0.0], [4.0, 0.25, 0.0]]
    assert torch.equal(found.old_logprobs, -found.advantages)
    assert collate([EncodedSet([5], [[8, 9]])], 0).experience is None
    with pytest.raises(AssertionError, match="for each response token"):
        collate([EncodedSet([5], [[8, 9]], experience=[stored(1.0)])], 0)
