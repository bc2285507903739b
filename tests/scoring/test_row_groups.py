"""Rows in groups: every row once, nothing shared that is not equal, few tokens."""

from __future__ import annotations

import random

import torch

from rrhf.scoring.row_groups import MASK_TOKENS, batches_of, group_batch, group_rows

CPU = torch.device("cpu")


def ids(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(5, 1000) for _ in range(length)]


def shares(rows: list[list[int]]) -> dict[tuple[int, ...], int]:
    """Rows of each group, and what they share; checks what holds for all groups."""
    groups = group_rows(rows)
    assert sorted(place for group in groups for place in group.places) == list(range(len(rows)))
    for group in groups:
        mine = [rows[place] for place in group.places]
        assert len({tuple(row[: group.shared]) for row in mine}) == 1
        assert min(map(len, mine)) >= group.shared > 0
        assert group.tokens == group.shared + sum(len(row) - group.shared for row in mine)
        assert group.longest == len(mine[0]) == max(map(len, mine))
    assert sum(group.tokens for group in groups) <= sum(map(len, rows))
    return {tuple(sorted(group.places)): group.shared for group in groups}


def test_any_rows() -> None:
    """Many equal, nested and short ones among them."""
    draw = random.Random(0)
    for _ in range(500):
        count = draw.randint(1, 8)
        shares([[draw.randint(1, 2) for _ in range(draw.randint(1, 6))] for _ in range(count)])
    assert group_rows([]) == []


def test_the_rows_of_a_prompt_are_a_group_also_under_a_common_system_message() -> None:
    system, first, second = ids(20, 0), ids(30, 1), ids(40, 2)
    rows = [[*system, *first, *ids(5, 10 + k)] for k in range(3)]
    rows += [[*system, *second, *ids(5, 20 + k)] for k in range(3)]
    assert shares([*rows[3:], *rows[:3]]) == {(0, 1, 2): 60, (3, 4, 5): 50}


def test_prompts_with_one_row_each_share_a_common_system_message() -> None:
    system, asked = ids(20, 0), ids(30, 1)
    rows = [[*system, *ids(9, 10 + k)] for k in range(3)]
    rows += [[*system, *asked, *ids(5, 20 + k)] for k in range(3)]
    assert shares(rows) == {(0, 1, 2): 20, (3, 4, 5): 50}


def test_a_prompt_that_was_cut_or_a_token_that_merged_is_another_beginning() -> None:
    old, asked = ids(30, 0), ids(30, 1)
    rows = [[*old, *asked, *ids(5, 10 + k)] for k in range(3)]
    rows += [[*asked, *ids(5, 20)], [*old, *asked[:-1], 3, *ids(5, 30)]]
    assert shares(rows) == {(0, 1, 2, 4): 59, (3,): 35}


def test_a_token_in_common_is_not_worth_a_group() -> None:
    assert shares([[1, *ids(30, k)] for k in range(3)]) == {(0,): 31, (1,): 31, (2,): 31}


def test_equal_rows_are_computed_once() -> None:
    row = ids(9, 0)
    assert shares([row, list(row)]) == {(0, 1): 9}


def test_batches_are_bounded_and_the_longest_come_first() -> None:
    prompts = [ids(length, length) for length in (40, 90, 10, 25)]
    rows = [[*prompt, *ids(4 + k, 100 + k)] for prompt in prompts for k in range(6)]
    groups = group_rows(rows)
    for limit in (1, 60, 130, 10**6):
        batches = list(batches_of(groups, rows, limit))
        parts = [part for batch in batches for part in batch]
        assert sorted(p for part in parts for p in part.places) == list(range(len(rows)))
        assert [part.longest for part in parts] == sorted((p.longest for p in parts), reverse=True)
        for batch in batches:
            is_alone = len(batch) == 1 and len(batch[0].places) == 1
            assert is_alone or sum(part.tokens for part in batch) <= limit
    assert len(list(batches_of(groups, rows, 10**6))) == 1


def test_on_a_cpu_a_batch_is_full_early_and_a_group_stays_whole() -> None:
    rows = [[*ids(900, k), *ids(300, 10 * k + j)] for k in range(3) for j in range(5)]
    rows += [ids(200, 100 + k) for k in range(3)]
    batches = list(batches_of(group_rows(rows), rows, 10**6, device=CPU))
    assert [[part.tokens for part in batch] for batch in batches] == [
        *[[2400]] * 3,
        [200] * 3,
    ]


def test_under_a_mask_of_all_tokens_batches_are_small() -> None:
    rows = [[*ids(300, k), *ids(100, 10 * k + j)] for k in range(3) for j in range(7)]
    batches = list(batches_of(group_rows(rows), rows, 10**6, by_mask=True))
    assert all(len(batch) == 1 for batch in batches)
    # 2 x 400 tokens: the prompt and five of its seven responses, then the prompt and two.
    assert sorted(batch[0].tokens for batch in batches) == [500, 500, 500, 800, 800, 800]
    assert MASK_TOKENS == 700


def test_a_batch_holds_the_rows_in_the_order_of_its_groups() -> None:
    rows = [[7, 8, 9, 5], [7, 8, 9], [7, 8, 9, 6, 4, 3], [2], [4, 6]]
    groups = group_rows(rows)
    batch = group_batch(groups, rows, 0, CPU)
    whole, mask, positions = batch.full_rows()
    places = [place for group in groups for place in group.places]
    assert [row[real.bool()].tolist() for row, real in zip(whole, mask, strict=True)] == [
        rows[place] for place in places
    ]
    assert int(positions.max()) == 5
    assert 0 in batch.response_lengths.tolist()
