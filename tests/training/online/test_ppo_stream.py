"""The stream of PPO over rollouts made by hand: prompts, minibatches, early ends, and its state."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_cases import settings

from rrhf.algorithms.kl import KLController
from rrhf.algorithms.normalizers import RunningMeanStd
from rrhf.data.collate import TokenBatch
from rrhf.errors import UserError
from rrhf.records import CandidateSet
from rrhf.training.core.parallel import Parallel
from rrhf.training.core.streams import StepCut
from rrhf.training.online.experience import RolloutRow
from rrhf.training.online.listeners import MadeRollout
from rrhf.training.online.rollout import Rollout
from rrhf.training.online.step_hooks import (
    UPDATE_KL,
    CriticWarmUp,
    LargestRatio,
    RolloutPasses,
)
from rrhf.training.online.stream import PPOStream


@dataclass
class Writer:
    """Answers with tokens that say which rollout, prompt and sample they are of."""

    samples: int = 1
    left_out: int = 0
    asked: list[tuple[int, list[str]]] = field(default_factory=list)

    def write(self, prompts: Sequence[CandidateSet], number: int) -> Rollout:
        self.asked.append((number, [prompt.query for prompt in prompts]))
        rows = [
            RolloutRow(
                place,
                sample,
                [50 + int(prompt.query)],
                [10 + number, 10 + place, 10 + sample],
                torch.full((3,), -1.0),
                torch.full((3,), -1.0 - 0.1 * (number + 1)),
                None,
                float(number + place + sample),
                True,
            )
            for place, prompt in enumerate(prompts)
            for sample in range(self.samples)
        ]
        counts = Counter(sampled=len(rows), empty=self.left_out)
        return Rollout(rows[self.left_out :], counts, {})


class Objective:
    """What the hooks tell it, and the ratio that they ask for."""

    def __init__(self) -> None:
        self.policy_is_frozen = False

    def take_largest_ratio(self) -> float:
        return 1.5


SIZES: dict[str, Any] = {
    "method": "reinforce_pp",
    "rollout_size": 12,
    "ppo_epochs": 2,
    "num_rollouts": 2,
    "per_device_train_batch_size": 5,
    "gradient_accumulation_steps": 1,
}


def stream(
    writer: Any = None,
    num_prompts: int = 5,
    ranks: tuple[int, int] = (0, 1),
    listeners: Any = (),
    **changes: Any,
) -> PPOStream:
    config = settings(Path("w"), "o", **SIZES | changes)
    prompts = [CandidateSet(str(n), str(n)) for n in range(num_prompts)]
    controller = KLController(0.1, 0.15, 100.0)
    normalizer = RunningMeanStd()
    writer = writer or Writer(config.num_return_sequences)
    sizes = (config.per_device_train_batch_size, config.gradient_accumulation_steps)
    cut = StepCut(0, *sizes, *ranks)
    return PPOStream(prompts, writer, config, controller, normalizer, cut, listeners)


Row = tuple[int, ...]


def rows_of(batches: list[TokenBatch]) -> list[Row]:
    """The tokens of the rows that count."""
    return [
        tuple(ids)
        for batch in batches
        for ids, weight in zip(batch.response_ids.tolist(), batch.row_weights.tolist(), strict=True)
        if weight
    ]


def test_each_pass_over_the_prompts_has_each_once_in_an_order_of_its_own() -> None:
    """Seven prompts, three a rollout: some rollouts go over the edge of a pass."""
    made = stream(num_prompts=7, rollout_size=3)
    asked = [int(prompt.query) for number in range(14) for prompt in made.prompts_of(number)]
    passes = [tuple(asked[start : start + 7]) for start in range(0, 42, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len(set(passes)) == 6
    again = stream(num_prompts=7, rollout_size=3)
    assert again.prompts_of(9) == made.prompts_of(9)
    other = stream(num_prompts=7, rollout_size=3, seed=1)
    assert [other.prompts_of(n) for n in range(7)] != [made.prompts_of(n) for n in range(7)]


@pytest.mark.parametrize("left_out", [0, 1])
def test_each_pass_over_a_rollout_has_each_row_once(left_out: int) -> None:
    """Twelve rows, or eleven, in three minibatches for batches of five."""
    writer = Writer(left_out=left_out)
    steps = [rows_of(batches) for batches in stream(writer, num_prompts=12)]
    assert len(steps) == 2 * 2 * 3
    count = 12 - left_out
    for step in steps:
        assert len(step) in (count // 3, -(-count // 3))
    for number in range(2):
        passes = []
        for epoch in range(2):
            start = (number * 2 + epoch) * 3
            rows = [row for step in steps[start : start + 3] for row in step]
            assert sorted(rows) == [(10 + number, 10 + p, 10) for p in range(left_out, 12)]
            passes.append(rows)
        assert passes[0] != passes[1]
    assert [number for number, _ in writer.asked] == [0, 1]


def test_orders_of_passes_do_not_repeat_over_rollouts() -> None:
    steps = [rows_of(batches) for batches in stream(num_prompts=12, ppo_epochs=3, num_rollouts=4)]
    every = [
        tuple(row[1] for step in steps[start : start + 3] for row in step)
        for start in range(0, len(steps), 3)
    ]
    assert len(every) == 12 == len(set(every))


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"num_rollouts": 2}, 2 * 3 * 2),
        ({"num_rollouts": -1, "num_train_epochs": 1.0, "rollout_size": 2}, 3 * 1 * 2),
        ({"num_rollouts": -1, "num_train_epochs": 2.0, "rollout_size": 4}, 3 * 1 * 2),
        ({"num_rollouts": -1, "num_train_epochs": 0.01}, 1 * 3 * 2),
        ({"num_rollouts": -1, "max_steps": 7}, 7),
        # By prompts: six of two responses, two a step.
        (
            {"method": "rrhf", "num_return_sequences": 2, "per_device_train_batch_size": 2},
            2 * 3 * 2,
        ),
    ],
)
def test_the_number_of_steps(changes: dict[str, Any], steps: int) -> None:
    made = stream(**changes)
    assert made.total_steps == steps
    assert len(list(made)) == steps


def test_two_ranks_make_a_batch_twice_as_large() -> None:
    made = stream(ranks=(0, 2))
    assert made.global_batch_size == 10 and made.total_steps == 2 * 2 * 2


def test_two_ranks_have_each_row_once_and_fillers_count_for_nothing() -> None:
    """Twelve rows in two steps of six, two a batch: three batches for two ranks."""
    found: list[list[list[Row]]] = []
    shapes = []
    for rank in range(2):
        made = stream(
            num_prompts=12,
            ranks=(rank, 2),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )
        steps = list(made)
        found.append([rows_of(batches) for batches in steps])
        shapes.append([len(batches) for batches in steps])
    assert shapes[0] == shapes[1]  # equally many forwards and backwards
    for one, other in zip(*found, strict=True):
        assert len(one) + len(other) == len({*one, *other}) == 6
    assert any(len(rows) < 4 for rows in found[1])


@pytest.mark.parametrize("max_steps", [-1, 20])
def test_an_update_that_goes_too_far_ends_the_passes_over_its_rollout(max_steps: int) -> None:
    changes = {"num_rollouts": 2 if max_steps < 0 else -1, "max_steps": max_steps}
    writer = Writer()
    made = stream(writer, num_prompts=12, **changes)
    planned, passes = made.total_steps, RolloutPasses(made, 0.1)
    rollouts = []
    for number, batches in enumerate(made):
        rollouts.append(rows_of(batches)[0][0] - 10)
        passes.after_step(number + 1, {UPDATE_KL: 0.2 if number == 1 else 0.05})
        assert passes.metrics() == {"rollout": rollouts[-1]}
    assert rollouts[:4] == [0, 0, 1, 1]
    # Four steps of the first rollout are left out; steps that are counted are made up for.
    assert made.total_steps == (planned - 4 if max_steps < 0 else planned)
    assert len(rollouts) == made.total_steps
    assert (passes.rollouts_cut, passes.steps_skipped) == (1, 4)


def test_at_the_last_step_of_a_rollout_nothing_is_left_to_leave_out() -> None:
    made = stream(num_prompts=12)
    passes = RolloutPasses(made, 0.1)
    for number, _ in enumerate(made):
        passes.after_step(number + 1, {UPDATE_KL: 9.0 if number == 5 else 0.0})
    assert made.total_steps == 12 and number == 11
    assert passes.rollouts_cut == 0


def test_without_a_target_no_rollout_ends_early() -> None:
    made = stream(num_prompts=12)
    passes = RolloutPasses(made, 0.0)
    for number, _ in enumerate(made, 1):
        passes.after_step(number, {UPDATE_KL: 9.0})
    assert made.total_steps == number == 12


@pytest.mark.parametrize("steps", [0, 2])
def test_the_critic_learns_alone_for_so_many_steps(steps: int) -> None:
    """Said once: to the objective, and of the policy's learning rate."""
    objective: Any = Objective()
    changes = {"critic_warmup_steps": steps, "method": "ppo", "share_trunk": True}
    config = settings(Path("w"), "o", **SIZES | changes)
    warm_up = CriticWarmUp(objective, config)
    frozen = []
    for step in range(1, 6):
        warm_up.before_step(step)
        frozen.append(objective.policy_is_frozen)
    assert frozen == [number < steps for number in range(5)]
    policy, value = config.groups()
    assert [policy.is_frozen(done) for done in range(5)] == frozen
    assert not any(value.is_frozen(done) for done in range(5))


def test_the_largest_ratio_is_that_of_all_ranks() -> None:
    parallel, objective = Parallel(), Objective()
    parallel.max = lambda value: value + 1.0  # type: ignore[method-assign]
    asked: Any = objective
    hook = LargestRatio(asked, parallel)
    hook.after_step(1, {})
    assert hook.metrics() == {"largest_ratio": 2.5}


def test_listeners_hear_of_each_rollout_before_its_first_step() -> None:
    heard: list[MadeRollout] = []

    class Listener:
        def see_rollout(self, rollout: MadeRollout) -> None:
            heard.append(rollout)

    made = stream(Writer(left_out=1), num_prompts=12, listeners=[Listener()])
    for number, _ in enumerate(made):
        assert len(heard) == number // 6 + 1
    assert [(one.number, one.steps_done) for one in heard] == [(0, 0), (1, 6)]
    for one in heard:
        assert [p.query for p in one.prompts] == [p.query for p in made.prompts_of(one.number)]
        assert len(one.rows) == len(one.experience.sets) == 11
        assert one.metrics["empty_fraction"] == 1 / 12
    assert heard[-1].metrics == made.rollout_metrics


def test_a_rollout_is_told_once_with_its_shares() -> None:
    made = stream(Writer(left_out=3), num_prompts=12)
    news = []
    for _ in made:
        news.append(made.take_news())
    assert [bool(row) for row in news] == [True, *[False] * 5] * 2
    assert [row["rollout"] for row in news if row] == [0.0, 1.0]
    assert news[0]["empty_fraction"] == 3 / 12  # of what was sampled
    assert news[0]["score"] == sum(range(3, 12)) / 9
    assert made.counts == {"sampled": 24, "empty": 6}


def test_the_kl_coefficient_follows_each_rollout() -> None:
    """Three tokens .1 apart, then .2; the target is .15, the horizon a hundred responses."""
    made = stream(num_prompts=12)
    coefficients = []
    for _ in made:
        if row := made.take_news():
            coefficients.append(row["kl_coefficient"])
            assert row["kl"] == pytest.approx(0.3 * len(coefficients), rel=1e-5)
    assert coefficients == pytest.approx([0.1, 0.1 * (1 + 0.2 * 12 / 100)])
    assert made._controller.coefficient == pytest.approx(0.1 * (1 + 0.2 * 12 / 100) ** 2)


def outcome(made: PPOStream) -> dict[str, Any]:
    assert made.normalizer is not None
    return {
        "coefficient": made._controller.coefficient,
        "normalizer": made.normalizer.state_dict(),
        "counts": made.counts,
        "rollout": made.rollout_metrics,
        "steps": (made.steps_done, made.total_steps),
    }


def advantages_of(batches: list[TokenBatch]) -> list[Any]:
    return [batch.experience.advantages.tolist() for batch in batches if batch.experience]


@pytest.mark.parametrize("stop", [1, 2, 5, 6, 7, 8, 12])
def test_a_stream_goes_on_where_it_was_saved(stop: int) -> None:
    changes: dict[str, Any] = {"num_prompts": 12, "num_rollouts": 3}

    def go(made: PPOStream, end: int | None = None) -> list[Any]:
        steps, passes = [], RolloutPasses(made, 0.1)
        for batches in made:
            steps.append((rows_of(batches), advantages_of(batches)))
            passes.after_step(made.steps_done, {UPDATE_KL: 9.0 if made.steps_done == 2 else 0.0})
            if made.steps_done == end:
                break
        return steps

    straight = stream(Writer(left_out=1), **changes)
    wanted = go(straight)
    first = stream(Writer(left_out=1), **changes)
    begun = go(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    tensors = {name: tensor.clone() for name, tensor in first.tensors().items()}
    resumed = stream(Writer(left_out=1), **changes)
    resumed.load_state_dict(state)
    resumed.load_tensors(tensors)
    assert begun + go(resumed) == wanted
    assert outcome(resumed) == outcome(straight)
    # An experience is kept as long as steps are left in it: the first rollout ends at step 2.
    assert bool(tensors) is (stop not in (2, 8, 14))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 5}, "seed"),
        ({"num_prompts": 6}, "prompts"),
        ({"rollout_size": 10}, "rollout_size"),
        ({"ppo_epochs": 1}, "ppo_epochs"),
        ({"per_device_train_batch_size": 4}, "global_batch_size"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"normalize_reward": True}, "normalize_reward"),
        ({"adaptive_kl": True}, "adaptive_kl"),
        ({"method": "rloo", "num_return_sequences": 2}, "method"),
    ],
)
def test_what_the_cursor_depends_on_must_be_what_it_was(changes: dict[str, Any], name: str) -> None:
    state = stream().state_dict()
    with pytest.raises(UserError, match=f"resume: {name} was"):
        stream(**changes).load_state_dict(state)


def test_responses_to_one_prompt_stand_together_in_a_minibatch() -> None:
    made = stream(
        num_prompts=6, num_return_sequences=2, rollout_size=12, per_device_train_batch_size=6
    )
    for batches in made:
        prompts = [row[1] for row in rows_of(batches)]
        assert len(list(itertools.groupby(prompts))) == len(set(prompts))
