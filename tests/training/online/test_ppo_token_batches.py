"""Minibatches of experience, cut by tokens or by number: the same rows, the same update."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_cases import build_world, save_demonstrations, settings, without_clock
from safetensors.torch import load_file
from step_cases import stopped_after
from trainer_cases import metrics_of, same_weights

from rrhf.data.collate import EncodedSet
from rrhf.errors import StoppedBySignal
from rrhf.training.core.streams import StepCut
from rrhf.training.core.token_batches import SHARED, TokenBudget
from rrhf.training.online import ppo
from rrhf.training.online.stream import PPOStream

GROUPED: dict[str, Any] = {"method": "rloo", "num_return_sequences": 4, "layout": "shared_prefix"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


def stream(budget: TokenBudget | None = None, **changes: Any) -> PPOStream:
    """In the middle of a rollout of six prompts with four responses each."""
    config = settings(Path("w"), "o", **{**GROUPED, "rollout_size": 24, "ppo_epochs": 2, **changes})
    nothing: Any = None
    sizes = (config.per_device_train_batch_size, config.gradient_accumulation_steps)
    made = PPOStream(
        [nothing] * 6, nothing, config, nothing, nothing, StepCut(0, *sizes, budget=budget)
    )
    rows = [EncodedSet([p] * (8 + p), [[p, k]]) for p in range(6) for k in range(4)]
    made._number, made._place = 0, 0
    made._take(rows)
    return made


Rows = list[tuple[int, int]]
"""Prompt and number of each response."""


def rows_of(batches: Any) -> list[Rows]:
    return [[(int(row[0]), int(row[1])) for row in batch.response_ids] for batch in batches]


def whole(step: list[Rows]) -> Rows:
    return [row for batch in step for row in batch]


def passes(made: PPOStream) -> list[list[Rows]]:
    """The micro-batches of every step of the rollout."""
    found = []
    while made._place < made.steps_per_rollout:
        found.append(rows_of(made._micro_batches(made._minibatch())))
        made._place += 1
    return found


def test_responses_to_one_prompt_stand_side_by_side_in_their_minibatch() -> None:
    steps = passes(stream(per_device_train_batch_size=6, gradient_accumulation_steps=2))
    assert len(steps) == 4
    for first, second in (steps[:2], steps[2:]):
        rows = whole(first) + whole(second)
        assert sorted(rows) == [(p, k) for p in range(6) for k in range(4)]
    for step in steps:
        prompts = [p for p, _ in whole(step)]
        changes = sum(one != other for one, other in itertools.pairwise(prompts))
        assert changes == len(set(prompts)) - 1
    assert sorted(whole(steps[0])) != sorted(whole(steps[2]))  # the shuffle is still by rows


def test_a_budget_keeps_the_rows_of_each_step() -> None:
    by_number, by_tokens = passes(stream()), passes(stream(TokenBudget(40, SHARED)))
    assert [sorted(whole(s)) for s in by_tokens] == [sorted(whole(s)) for s in by_number]
    for step in by_tokens:
        for batch in step:
            assert sum(8 + p for p in {p for p, _ in batch}) + 2 * len(batch) <= 40
        # Each prompt's rows are in one micro-batch, for all of them fit.
        computed = [p for batch in step for p in {p for p, _ in batch}]
        assert len(computed) == len(set(computed))


def test_equal_prompts_are_one_prompt_whoever_holds_their_ids() -> None:
    """Rows come from other ranks or out of a checkpoint: equal ids, in lists of their own."""
    made = stream(TokenBudget(40, SHARED))
    cut = passes(made)
    again = stream(TokenBudget(40, SHARED))
    again._take([EncodedSet(list(s.prompt_ids), s.response_ids) for s in again._experience])
    assert passes(again) == cut
    shared = [list(s.prompt_ids) for s in made._experience[::4]]  # and one list for unequal ones
    assert len({size.same_prompt for size in again._sizes}) == len(shared) == 6


def test_rows_beyond_the_budget_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        made = stream(TokenBudget(14, SHARED))
        made._take(made._experience)
    (said,) = [r.message for r in caplog.records if "max_tokens_per_batch" in r.message]
    assert "4 of 24 samples of rollout 0 (with their prompts)" in said


@pytest.mark.parametrize(
    "changes",
    [
        {"share_trunk": True, "layout": "shared_prefix", "num_return_sequences": 2},
        {**GROUPED, "ptx": True},
        {"method": "rrhf", "num_return_sequences": 3, "per_device_train_batch_size": 2},
    ],
    ids=["ppo", "rloo_ptx", "rrhf"],
)
def test_a_run_cut_by_tokens_trains_the_same(
    changes: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    """Steps are small and Adam's epsilon large, or it would blow up gradients of rounding."""
    small = {"adam_epsilon": 1e-3, "learning_rate": 1e-3, "critic_learning_rate": 1e-3}
    if changes.pop("ptx", None):
        small |= {"ptx_datasets": str(save_demonstrations(tmp_path)), "ptx_coeff": 0.5}
    for name, tokens in (("number", None), ("tokens", 90)):
        ppo.train(settings(world, tmp_path / name, max_tokens_per_batch=tokens, **small | changes))
    mine, its = (
        [without_clock(row) for row in metrics_of(tmp_path / name)] for name in ("tokens", "number")
    )
    assert len(mine) == len(its)
    for row, other in zip(mine, its, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)
    one, other = (
        load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("number", "tokens")
    )
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


def test_resumed_equals_straight(world: Path, tmp_path: Path) -> None:
    changes = {**GROUPED, "max_tokens_per_batch": 90, "save_steps": 0}
    ppo.train(settings(world, tmp_path / "straight", **changes))
    with stopped_after(5), pytest.raises(StoppedBySignal):
        ppo.train(settings(world, tmp_path / "resumed", **changes))
    ppo.train(settings(world, tmp_path / "resumed", resume_from_checkpoint=True, **changes))
    assert same_weights(tmp_path / "straight" / "policy", tmp_path / "resumed" / "policy")
    assert [without_clock(row) for row in metrics_of(tmp_path / "straight")] == [
        without_clock(row) for row in metrics_of(tmp_path / "resumed")
    ]
