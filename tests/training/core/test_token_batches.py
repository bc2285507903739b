"""Steps cut by tokens: everything once, within the budget, equally often on each rank; and the
same update whatever the cut."""

from __future__ import annotations

import logging
import math
import random
from pathlib import Path
from typing import Any

import iterative_cases
import ppo_cases
import pytest
import torch
from safetensors.torch import load_file
from step_cases import stopped_after
from tiny import save_tiny, tiny_llama
from trainer_cases import metrics_of, ranked_rows, same_weights, write_lines

from rrhf.data.collate import EncodedSet, TokenBatch
from rrhf.errors import StoppedBySignal, UserError
from rrhf.models.forward.layouts import build_policy
from rrhf.models.forward.packed_rows import PackedPolicy
from rrhf.models.forward.packed_trunk import ATTENTION
from rrhf.training.core.measure import measure
from rrhf.training.core.parallel import Parallel
from rrhf.training.core.streams import OfflineStream, StepCut
from rrhf.training.core.token_batches import (
    _LAYOUTS,
    PACKED,
    PADDED,
    SHARED,
    Size,
    SizeTable,
    TokenBudget,
    describe_cut,
    even_batches,
    layout_of,
    micro_batches,
    tokens_of,
    warn_of_lone,
)
from rrhf.training.methods import rank, reward, sft
from rrhf.training.methods.objectives.rrhf import RRHF, RRHFSettings
from rrhf.training.methods.rank import RankConfig, RankObjective
from rrhf.training.methods.reward import RewardConfig
from rrhf.training.methods.reward_examples import _shares
from rrhf.training.methods.sft import SFTConfig

LAYOUTS = (SHARED, PACKED, PADDED)


def sizes_at_random(seed: int, count: int) -> list[Size]:
    """Long tails, several responses, and prompts that come again."""
    draw = random.Random(seed)
    prompts = [min(400, int(draw.lognormvariate(4, 0.8)) + 1) for _ in range(count)]
    found = []
    for place in range(count):
        same = draw.randrange(place + 1) if draw.random() < 0.5 else place
        responses = [int(draw.lognormvariate(3, 0.9)) + 1 for _ in range(draw.choice((1, 1, 4)))]
        prompts[place] = prompts[same]
        found.append(Size(prompts[place], tuple(responses), f"p{same}"))
    names = {size.same_prompt for size in found}
    lengths = {n: next(s.prompt for s in found if s.same_prompt == n) for n in names}
    return [Size(lengths[s.same_prompt], s.responses, s.same_prompt) for s in found]


def faults(sizes: list[Size], budget: TokenBudget, plan: list[list[list[int]]]) -> list[str]:
    """What a plan must not do."""
    found = []
    places = sorted(place for rank in plan for batch in rank for place in batch)
    if places != list(range(len(sizes))):
        found.append("not everything once")
    if len({len(rank) for rank in plan}) != 1:
        found.append("ranks differ in micro-batches")
    for batch in (batch for batches in plan for batch in batches if len(batch) > 1):
        if tokens_of([sizes[place] for place in batch], budget.layout) > budget.tokens:
            found.append("over the budget")
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_everything_once_within_the_budget_equally_often(layout: str, world_size: int) -> None:
    for seed in range(60):
        sizes = sizes_at_random(seed, count=seed % 40)
        for tokens in (1, 100, 700, 3000):
            budget = TokenBudget(tokens, layout)
            plan = micro_batches(sizes, budget, world_size)
            assert faults(sizes, budget, plan) == []
            assert len(plan) == world_size
            assert plan == micro_batches(sizes, budget, world_size), "not the same twice"
            fillers = [batch for rank in plan for batch in rank if not batch]
            assert not fillers or max(len(b) for rank in plan for b in rank) <= 1


def test_a_cut_by_number_would_be_found_out() -> None:
    """The negative control of the test above."""
    sizes = sizes_at_random(1, 24)
    budget = TokenBudget(700, PADDED)
    assert faults(sizes, budget, even_batches(24, 6, 2)) == ["over the budget"] * 4
    assert faults(sizes, budget, [[[0]], [[1], [2]]]) != []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_few_micro_batches_and_even_ones(layout: str) -> None:
    for seed in range(30):
        draw = random.Random(seed)
        sizes = [
            Size(draw.randint(16, 128), tuple(draw.randint(4, 64) for _ in range(4)))
            for _ in range(64)
        ]
        budget = TokenBudget(2048, layout)
        plan = micro_batches(sizes, budget, 2)
        least = math.ceil(sum(tokens_of([size], layout) for size in sizes) / budget.tokens / 2)
        assert len(plan[0]) <= (1.7 if layout == PADDED else 1.1) * least + 1
        loads = [
            sum(tokens_of([sizes[place] for place in batch], layout) for batch in rank)
            for rank in plan
        ]
        assert max(loads) <= 1.1 * min(loads)


def test_sorting_pads_less_than_taking_them_as_they_come() -> None:
    for seed in range(10):
        sizes = sizes_at_random(seed, 48)
        plan = micro_batches(sizes, TokenBudget(4000, PADDED))[0]
        number = len(plan)
        even = even_batches(48, math.ceil(48 / number))[0]
        computed, otherwise = (
            sum(tokens_of([sizes[place] for place in batch], PADDED) for batch in cut)
            for cut in (plan, even)
        )
        assert computed < 0.9 * otherwise


def test_rows_of_one_prompt_stay_together_where_prompts_are_shared() -> None:
    rows = [Size(100, (10,), f"prompt {place % 4}") for place in range(16)]
    together = micro_batches(rows, TokenBudget(140, SHARED))[0]
    assert sorted(together) == [[p, p + 4, p + 8, p + 12] for p in range(4)]
    # A prompt whose rows are beyond the budget is computed as often as it must be.
    parted = micro_batches(rows, TokenBudget(120, SHARED))[0]
    assert [len(batch) for batch in parted] == [2] * 8
    assert all(len({place % 4 for place in batch}) == 1 for batch in parted)
    # Two ranks part one prompt's rows rather than let one of them compute nothing.
    assert micro_batches(rows[::4], TokenBudget(500, SHARED), 2) == [[[0, 1]], [[2, 3]]]
    # One rank has nothing to gain: two prompts of three rows would fit evenly if one were parted.
    odd = [Size(100, (10,), f"prompt {place // 3}") for place in range(9)]
    assert micro_batches(odd, TokenBudget(260, SHARED))[0] == [[0, 1, 2, 3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_may_cost_all_of_its_budget_and_no_token_more(layout: str) -> None:
    """Rows of ten tokens: two fill a budget of 20, and with 19 each is by itself."""
    rows = [Size(6, (4,)) for _ in range(6)]
    assert [len(b) for b in micro_batches(rows, TokenBudget(20, layout))[0]] == [2, 2, 2]
    assert [len(b) for b in micro_batches(rows, TokenBudget(19, layout))[0]] == [1] * 6


def test_a_prompts_rows_may_cost_all_of_the_budget_and_no_token_more() -> None:
    """A prompt of 4 with rows of 8: two rows are 20 tokens, four are 36."""
    rows = [Size(4, (8,), "one") for _ in range(4)]
    lengths = {
        budget: sorted(len(b) for b in micro_batches(rows, TokenBudget(budget, SHARED))[0])
        for budget in (36, 35, 20, 19)
    }
    assert lengths == {36: [4], 35: [2, 2], 20: [2, 2], 19: [1, 1, 1, 1]}


def test_a_row_that_just_fits_is_not_warned_of() -> None:
    sizes = [Size(6, (4,)), Size(2, (3,))]
    for layout in LAYOUTS:
        assert not warn_of_lone(sizes, TokenBudget(10, layout))
        assert warn_of_lone(sizes, TokenBudget(9, layout))


def test_what_is_too_long_is_alone_and_said(caplog: pytest.LogCaptureFixture) -> None:
    sizes = [Size(50, (5,)), Size(900, (60,)), Size(40, (5,)), Size(700, (1,))]
    budget = TokenBudget(100, SHARED)
    assert micro_batches(sizes, budget)[0] == [[1], [3], [0, 2]]
    with caplog.at_level(logging.WARNING):
        assert warn_of_lone(sizes, budget)
        assert not warn_of_lone(sizes[:1], budget)
    assert [record.message for record in caplog.records] == [
        "--max_tokens_per_batch 100: 2 of 4 prompts have more tokens than that (up to 960); "
        "each of them forms its own micro-batch"
    ]


def test_what_a_cut_comes_to_is_told() -> None:
    sizes = [Size(10, (10,)), Size(10, (6,)), Size(4, (6,))]
    budget = TokenBudget(40, PADDED)
    # Rows of 20, 20 and 10, of 46 tokens in all.
    assert describe_cut([[[0, 1], [2]]], sizes, budget) == (
        "2 micro-batches a device, 25 tokens each (at most 40), 8% of them padding"
    )
    assert describe_cut([[[0]], [[1, 2]]], sizes, TokenBudget(40, SHARED)) == (
        "1 micro-batches a device, 23 tokens each (at most 26), 0% of them padding"
    )


def test_tokens_by_hand() -> None:
    sizes = [Size(10, (3, 1), "a"), Size(10, (2,), "a"), Size(4, (5, 1))]
    assert tokens_of(sizes, PADDED) == 5 * (10 + 5)
    assert tokens_of(sizes, PACKED) == 3 * 10 + 2 * 4 + 12
    assert tokens_of(sizes, SHARED) == 10 + 4 + 12
    assert tokens_of([], PADDED) == 0


def test_the_table_gives_back_the_sizes() -> None:
    examples = [EncodedSet([1] * n, [[1] * (n + k) for k in range(n)]) for n in (2, 1, 3)]
    table = SizeTable()
    for example in examples:
        table.append(example)
    assert list(table) == [Size.of(example) for example in examples] and len(table) == 3


def test_the_layout_is_the_dearest_of_a_models_parts() -> None:
    padded = build_policy(tiny_llama(), "padded")
    shared, dense = (build_policy(tiny_llama(), name) for name in ("shared_prefix", "dense_mask"))
    assert layout_of(padded, 9) == PADDED
    assert layout_of(shared, 9) == layout_of(dense, 9) == SHARED
    assert layout_of(PackedPolicy(tiny_llama(), 64), 9) == PACKED
    assert layout_of(torch.nn.ModuleList([shared, padded]), 9) == PADDED
    assert set(_LAYOUTS) == {*ATTENTION, "dense_mask", "packed"}
    shared.window = 32  # type: ignore[assignment]
    assert layout_of(shared, 32) == SHARED and layout_of(shared, 33) == PADDED


# The stream.


def examples(count: int = 23) -> list[EncodedSet]:
    return [
        EncodedSet([100 + i] * (i * 7 % 11 + 1), [[i] * (i % 4 + 1), [i]], [0.0, float(i % 3)])
        for i in range(count)
    ]


def stream(tokens: int | None, **changes: Any) -> OfflineStream:
    budget = None if tokens is None else TokenBudget(tokens, SHARED)
    sizes: dict[str, Any] = {
        name: changes.pop(name)
        for name in ("rank", "world_size", "budget", "gradient_accumulation_steps")
        if name in changes
    }
    cut = StepCut(0, 2, **{"gradient_accumulation_steps": 4, "budget": budget, **sizes})
    return OfflineStream(examples(), cut, **{"num_train_epochs": 2, **changes})


def prompts_of(batches: Any) -> list[int]:
    return sorted(
        int(batch.prompt_ids[place, -1])
        for batch in batches
        for place in range(batch.num_prompts)
        if batch.prompt_weights[place] > 0
    )


@pytest.mark.parametrize("group_by_length", [False, True])
def test_steps_keep_their_prompts(group_by_length: bool) -> None:
    by_number = list(stream(None, group_by_length=group_by_length))
    by_tokens = list(stream(40, group_by_length=group_by_length))
    assert [prompts_of(s) for s in by_tokens] == [prompts_of(s) for s in by_number]
    assert all(
        int(batch.prompt_lengths.sum() + batch.response_lengths.sum()) <= 40
        for batches in by_tokens
        for batch in batches
    )
    ranks = [list(stream(40, rank=r, world_size=2, gradient_accumulation_steps=2)) for r in (0, 1)]
    for whole, *parts in zip(stream(None), *ranks, strict=True):
        assert len(parts[0]) == len(parts[1])
        assert sorted(prompts_of(parts[0]) + prompts_of(parts[1])) == prompts_of(whole)


def test_a_rank_without_prompts_gets_the_shortest_as_a_filler() -> None:
    last = list(
        stream(500, rank=7, world_size=8, gradient_accumulation_steps=1, num_train_epochs=1)
    )[-1]
    assert prompts_of(last) == [] and last[0].num_prompts == 1


def test_another_budget_may_go_on_from_a_checkpoint_but_no_other_grouping() -> None:
    state = stream(40).state_dict()
    stream(None).load_state_dict(state)
    stream(77).load_state_dict(state)
    with pytest.raises(UserError, match="group_by_length was False in the checkpoint"):
        stream(40, group_by_length=True).load_state_dict(state)
    del state["group_by_length"]  # as runs that began before it was kept have it
    stream(40, group_by_length=True).load_state_dict(state)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_held_out_figures_do_not_depend_on_the_cut(layout: str) -> None:
    policy, objective = (
        build_policy(tiny_llama(130)),
        RankObjective(RRHF.build(RRHFSettings())),
    )
    plain = measure(policy, objective, examples(), StepCut(0, 3), Parallel())
    seen: list[int] = []

    def see(_: Any, inputs: tuple[TokenBatch]) -> None:
        (batch,) = inputs
        lengths = batch.response_lengths.split(batch.prompt_index.bincount().tolist())
        sizes = zip(batch.prompt_lengths.tolist(), lengths, strict=True)
        seen.append(tokens_of([Size(p, tuple(rs.tolist())) for p, rs in sizes], layout))

    policy.register_forward_pre_hook(see)
    by_tokens = StepCut(0, 3, budget=TokenBudget(60, layout))
    cut = measure(policy, objective, examples(), by_tokens, Parallel())
    assert cut == pytest.approx(plain, rel=1e-6)
    assert max(seen) <= 60 and len(seen) < len(examples())


def test_held_out_prompts_of_a_reward_model_go_by_tokens_too() -> None:
    budget = TokenBudget(60, PADDED)
    cuts = [StepCut(0, 3, rank=rank, world_size=2, budget=budget) for rank in (0, 1)]
    shares = [_shares(examples(), cut) for cut in cuts]
    assert len(shares[0]) == len(shares[1])
    counted = [place for share in shares for places, is_repeat in share for place in places]
    assert sorted(counted) == list(range(len(examples())))
    (lone, filler) = (_shares(examples(1), cut) for cut in cuts)
    assert lone == [([0], False)] and filler == [([0], True)]


# Whole runs.


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "model")
    write_lines(folder / "ranked.jsonl", ranked_rows(14))
    return folder


def settings(**changes: Any) -> dict[str, Any]:
    """Adam's epsilon is large, or it would blow up gradients that are all rounding."""
    return {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,
        "num_train_epochs": 2,
        "model_max_length": 100,
        "save_steps": 0,
        **changes,
    }


def train(stage: str, world: Path, out: Path, **changes: Any) -> Path:
    model, data, values = str(world / "model"), str(world / "ranked.jsonl"), settings(**changes)
    if stage == "rank":
        values = {"eval_data_path": data, **values}
        return rank.train(RankConfig(model, str(out), data_path=data, **values))
    if stage == "reward":
        return reward.train(
            RewardConfig(model, str(out), data_path=data, validation_datasets=data, **values)
        )
    return sft.train(SFTConfig(model, str(out), data_path=data, **values))


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("rank", {"layout": "shared_prefix"}),
        ("rank", {"layout": "padded"}),
        ("sft", {"packing": True}),
        ("reward", {"layout": "shared_prefix"}),
        ("reward", {"layout": "padded"}),
    ],
)
def test_a_run_cut_by_tokens_trains_the_same(
    stage: str, changes: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    folders = (
        train(stage, world, tmp_path / "number", **changes),
        train(stage, world, tmp_path / "tokens", max_tokens_per_batch=120, **changes),
    )
    for mine, its in zip(
        metrics_of(tmp_path / "tokens"), metrics_of(tmp_path / "number"), strict=True
    ):
        for name in its.keys() - {"tokens_per_second"}:
            assert mine[name] == pytest.approx(its[name], rel=1e-5, abs=1e-6), name
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)
    assert not same_weights(*folders)  # it was another cut


def test_resumed_equals_straight(world: Path, tmp_path: Path) -> None:
    changes = {"max_tokens_per_batch": 120, "layout": "shared_prefix"}
    train("rank", world, tmp_path / "straight", **changes)
    with stopped_after(3), pytest.raises(StoppedBySignal):
        train("rank", world, tmp_path / "resumed", **changes)
    train("rank", world, tmp_path / "resumed", resume_from_checkpoint=True, **changes)
    assert same_weights(tmp_path / "straight" / "policy", tmp_path / "resumed" / "policy")


@pytest.mark.parametrize("tokens", [0, -5])
@pytest.mark.parametrize("config", [RankConfig, SFTConfig, RewardConfig])
def test_a_budget_that_is_none_is_refused(config: Any, tokens: int) -> None:
    with pytest.raises(UserError, match=f"--max_tokens_per_batch {tokens}: must be 1 or more"):
        config("model", "out", data_path="data", max_tokens_per_batch=tokens)


def test_a_budget_that_is_none_is_refused_by_ppo_and_by_rounds_of_rrhf() -> None:
    for settings_of in (ppo_cases.settings, iterative_cases.settings):
        with pytest.raises(UserError, match="--max_tokens_per_batch 0: must be 1 or more"):
            settings_of(Path("world"), Path("out"), max_tokens_per_batch=0)
