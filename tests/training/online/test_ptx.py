"""Demonstrations beside experience: what they add to a step, and to nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_cases import build_world, save_demonstrations, settings
from torch import Tensor
from trainer_cases import metrics_of, same_weights

from rrhf.algorithms.kl import KLController
from rrhf.data.collate import EncodedSet, TokenBatch, TokenExperience, collate
from rrhf.models.policy_with_value import ActorCriticOutputs
from rrhf.training.online import ppo
from rrhf.training.online.objective import PPOObjective
from rrhf.training.online.ptx import Ptx, PtxObjective


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


def objective(is_frozen: bool = False, **changes: Any) -> PtxObjective:
    config = settings(Path("w"), "o", **changes)
    inner = PPOObjective(config, KLController(config.kl_coeff))
    inner.policy_is_frozen = is_frozen
    return PtxObjective(inner, 0.5)


def demonstrations() -> TokenBatch:
    """Two that count, of three and two tokens, and a filler."""
    sets = [EncodedSet([5], [[6, 7, 8]]), EncodedSet([5, 6], [[7, 8]])]
    filler = replace(EncodedSet([9], [[8, 8, 8, 8]]), weight=0.0)
    return collate([*sets, filler], 2)


def experience() -> TokenBatch:
    stored = TokenExperience(*[torch.full((2,), -1.0)] * 4)
    return collate([EncodedSet([5], [[6, 7]], experience=[stored])], 2)


def outputs(batch: TokenBatch) -> ActorCriticOutputs:
    """Each token has probability e^-1, each value is 3."""
    logprobs = torch.where(batch.response_mask, -1.0, 0.0).requires_grad_()
    return ActorCriticOutputs(logprobs, torch.full_like(logprobs, 3.0).requires_grad_())


def gradients(found: ActorCriticOutputs, total: Tensor) -> tuple[Tensor | None, Tensor | None]:
    assert found.values is not None
    total.backward()
    return found.logprobs.grad, found.values.grad


def test_demonstrations_that_count_are_in_their_own_term_and_in_no_other() -> None:
    batch, made = demonstrations(), objective()
    found = {name: float(value) for name, value in made.denominators(batch).items()}
    assert found == {"policy": 0.0, "value": 0.0, "ptx": 5.0}
    out = outputs(batch)
    terms = made(out, batch)
    assert {name: float(term.total.detach()) for name, term in terms.items()} == {
        "policy": 0.0,
        "value": 0.0,
        "ptx": 5.0,
    }
    assert terms["ptx"].weight == 0.5
    slopes, of_values = gradients(out, terms["ptx"].total)
    wanted = -(batch.response_mask & (batch.row_weights > 0)[:, None]).float()
    assert slopes is not None and torch.equal(slopes, wanted)
    # Every weight takes part in every backward pass, or ranks would wait for its gradient.
    assert of_values is not None and bool((of_values == 0).all())


def test_experience_has_no_tokens_of_demonstrations_and_joins_their_term() -> None:
    batch, made = experience(), objective()
    assert float(made.denominators(batch)["ptx"]) == 0.0
    assert float(made.denominators(batch)["policy"]) == 2.0
    out = outputs(batch)
    slopes, of_values = gradients(out, made(out, batch)["ptx"].total)
    assert slopes is not None and of_values is not None
    assert bool((slopes == 0).all()) and bool((of_values == 0).all())


def test_while_the_critic_learns_alone_demonstrations_weigh_nothing(
    world: Path, tmp_path: Path
) -> None:
    for batch in (demonstrations(), experience()):
        assert objective(is_frozen=True)(outputs(batch), batch)["ptx"].weight == 0.0
    changes = {"ptx_datasets": str(save_demonstrations(tmp_path)), "ptx_coeff": 0.5}
    ppo.train(settings(world, tmp_path / "run", critic_warmup_steps=6, **changes))
    rows = [row for row in metrics_of(tmp_path / "run") if "loss" in row]
    assert len(rows) == 8
    for row in rows[:6]:  # neither in the gradient, nor in the norm that scales the critic's
        assert row["ptx_loss"] > 0
        assert row["loss"] == pytest.approx(0.1 * row["value_loss"], rel=1e-6)
        assert row["ptx_loss"] == pytest.approx(rows[0]["ptx_loss"], rel=0.5)
    for row in rows[6:]:
        wanted = row["policy_loss"] + 0.1 * row["value_loss"] + 0.5 * row["ptx_loss"]
        assert row["loss"] == pytest.approx(wanted, rel=1e-5)
    assert not same_weights(world / "model", tmp_path / "run" / "policy")
    ppo.train(settings(world, tmp_path / "warm", critic_warmup_steps=8, **changes))
    assert same_weights(world / "model", tmp_path / "warm" / "policy")


class Demonstrations:
    total_steps = 4

    def __init__(self) -> None:
        self.step = 0

    def __iter__(self) -> Any:
        while self.step < 4:
            self.step += 1
            yield [f"demonstration {self.step - 1}"]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def made() -> Ptx:
    others: Any = Demonstrations()
    return Ptx(others)


def test_each_step_gets_the_next_demonstrations() -> None:
    hook = made()
    assert [hook.batches() for _ in range(4)] == [[f"demonstration {n}"] for n in range(4)]


def test_demonstrations_go_on_where_they_were_saved() -> None:
    hook, resumed, anew = made(), made(), made()
    hook.batches()
    resumed.load_state_dict(hook.state_dict())
    assert resumed.batches() == ["demonstration 1"]
    anew.load_state_dict({})
    assert anew.batches() == ["demonstration 0"]
