"""PPO on the layout that computes every prompt once: the losses and gradients of padded rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_cases import RAGGED, model
from ppo_cases import build_world, settings, without_clock
from torch import Tensor
from trainer_cases import metrics_of
from transformers import AutoModelForSequenceClassification

from rrhf.algorithms.kl import KLController
from rrhf.algorithms.normalizers import RunningMeanStd
from rrhf.data.collate import TokenBatch, TokenExperience
from rrhf.models.forward.layouts import FastPolicy, build_policy
from rrhf.models.forward.logprobs import LogprobOptions
from rrhf.models.loading import disable_dropout, enable_checkpointing
from rrhf.models.policy_with_value import ActorCritic, ValueHead, ValueModel, as_reference
from rrhf.models.reward_layouts import FastRewardModel
from rrhf.training.online import ppo
from rrhf.training.online.objective import PPOObjective

FAMILIES = ["llama", "qwen3", "gpt2", "gpt_neox", "gemma2"]
CRITICS = ["separate", "shared", "lora"]
CONFIG = ppo.PPOConfig(
    "", "", train_datasets="", reward_model_name_or_path="", kl_in="loss", vf_coeff=0.5
)


def critic(name: str, layout: str) -> ValueModel:
    config = model(name).config
    config.num_labels, config.pad_token_id = 1, 2
    torch.manual_seed(3)
    found = AutoModelForSequenceClassification.from_config(
        config, attn_implementation=config._attn_implementation
    )
    with torch.no_grad():
        found.score.weight.normal_()
    disable_dropout(found)
    normalizer = RunningMeanStd()
    normalizer.update(torch.tensor([-1.0, 2.0, 3.0]))
    return ValueModel(found.eval(), normalizer, layout)


def root(name: str, kind: str, layout: str, entropy_has_gradient: bool) -> ActorCritic:
    inner: Any = model(name)
    disable_dropout(inner)
    if kind == "lora":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        inner = peft.get_peft_model(inner, config)
        torch.manual_seed(1)
        for parameter_name, weight in inner.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(weight, std=0.1)
    options = LogprobOptions(0.7, True, entropy_has_gradient=entropy_has_gradient)
    policy = build_policy(inner, layout, options)
    if kind == "separate":
        return ActorCritic(policy, critic(name, layout))
    head = ValueHead(32)
    torch.manual_seed(2)
    torch.nn.init.normal_(head.weight)
    return ActorCritic(policy, head)


def experience() -> TokenBatch:
    """Ragged responses with made-up numbers of a rollout; the second prompt is a filler."""
    generator = torch.Generator().manual_seed(5)

    def numbers() -> Tensor:
        return torch.randn(RAGGED.response_ids.shape, generator=generator) * RAGGED.response_mask

    names = ("advantages", "returns", "old_values")
    stored = {name: numbers() for name in names}
    stored |= {name: numbers() * 0.2 - 4 for name in ("old_logprobs", "reference_logprobs")}
    weights = torch.ones(RAGGED.num_prompts)
    weights[1] = 0
    return replace(RAGGED, prompt_weights=weights, experience=TokenExperience(**stored))


def step(actor: ActorCritic, config: ppo.PPOConfig) -> tuple[dict[str, float], Tensor]:
    """What is logged of a step, and its whole gradient."""
    batch = experience()
    objective = PPOObjective(config, KLController(0.1, None, 1.0))
    terms = objective(actor(batch), batch)
    counts = objective.denominators(batch)
    loss = torch.stack([t.total * t.weight / counts[n] for n, t in terms.items()]).sum()
    loss.backward()
    found = {n: float(t.total.detach()) for n, t in terms.items()}
    for term in terms.values():
        found |= {name: float(total) for name, (total, _) in term.metrics.items()}
    gradients = [p.grad.flatten() for p in actor.parameters() if p.grad is not None]
    return found, torch.cat(gradients).double()


@pytest.mark.parametrize("kind", CRITICS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_that_of_padded_rows(name: str, kind: str) -> None:
    """Checkpointing and an entropy bonus on every other family, so that both ways are gone."""
    with_more = FAMILIES.index(name) % 2 == 1
    config = replace(CONFIG, entropy_coeff=0.01 if with_more else 0.0)
    found = []
    for layout in ("padded", "shared_prefix"):
        actor = root(name, kind, layout, entropy_has_gradient=with_more).train()
        if with_more:
            enable_checkpointing(actor.policy.model)
            if kind == "lora":
                actor.policy.model.enable_input_require_grads()
        found.append(step(actor, config))
    (expected, slow), (metrics, fast) = found
    assert metrics.keys() == expected.keys()
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-4), key
    assert fast.shape == slow.shape
    assert float((fast - slow).norm() / slow.norm()) < 1e-5


def test_the_gradient_of_an_entropy_bonus_is_there_where_it_is_asked_for() -> None:
    """An entropy that is only watched must not be weighed: then the gradient would lack it."""
    config = replace(CONFIG, entropy_coeff=0.5)
    for layout in ("padded", "shared_prefix"):
        with_it, without = (
            step(root("llama", "shared", layout, asked), config)[1] for asked in (True, False)
        )
        assert float((with_it - without).norm() / with_it.norm()) > 1e-3


def test_the_logprob_pass_uses_the_layout_with_adapters_on_and_off() -> None:
    padded, fast = (root("llama", "lora", layout, False).eval() for layout in ("padded", "auto"))
    assert isinstance(fast.policy, FastPolicy) and fast.policy.layout == "shared_prefix"
    batch = experience()
    with torch.no_grad():
        for values_only in (False, True):
            expected, found = (actor(batch, values_only) for actor in (padded, fast))
            torch.testing.assert_close(found.values, expected.values, atol=1e-4, rtol=1e-5)
        with as_reference(padded.policy) as one, as_reference(fast.policy) as other:
            expected_logprobs, found_logprobs = (p(batch).logprobs for p in (one, other))
    torch.testing.assert_close(found_logprobs, expected_logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", CRITICS)
def test_a_run_is_that_of_padded_rows(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts included: the layouts that read and train are the fast ones, of every model."""
    world = build_world(tmp_path)
    critics: dict[str, dict[str, Any]] = {
        "separate": {},
        "shared": {"share_trunk": True},
        "lora": {"share_trunk": True, "use_lora": True, "gradient_checkpointing": True},
    }
    calls: dict[str, int] = {}
    for owner, method in ((FastPolicy, "_hidden"), (FastRewardModel, "run_packed")):
        plain = getattr(owner, method)

        def counted(self: Any, *args: Any, plain: Any = plain, owner: Any = owner) -> Any:
            calls[owner.__name__] = calls.get(owner.__name__, 0) + 1
            return plain(self, *args)

        monkeypatch.setattr(owner, method, counted)
    rows = {}
    for layout in ("padded", "auto"):
        changes = {"num_return_sequences": 2, "learning_rate": 1e-4, "adam_epsilon": 1e-3}
        ppo.train(settings(world, tmp_path / layout, layout=layout, **changes, **critics[kind]))
        rows[layout] = [without_clock(row) for row in metrics_of(tmp_path / layout)]
        if layout == "padded":
            assert not calls
    assert set(calls) == {"FastPolicy", "FastRewardModel"}
    for found, expected in zip(rows["auto"], rows["padded"], strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=2e-4)
