"""Actor and critic in one root: which position a value belongs to, its scale, its folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_level_tokenizer, save_tiny, tiny_llama
from transformers import AutoModelForSequenceClassification

from rrhf.algorithms.normalizers import RunningMeanStd
from rrhf.data.collate import EncodedSet, TokenBatch, collate
from rrhf.errors import UserError
from rrhf.models.forward.layouts import build_policy
from rrhf.models.forward.logprobs import LogprobOptions, Policy
from rrhf.models.policy_with_value import (
    ActorCritic,
    ValueHead,
    ValueModel,
    as_reference,
    new_value_head,
    require_same_vocabulary,
    write_value_folder,
)
from rrhf.models.reward_model import HEAD, RewardModel, init_reward_model

SETS = [
    EncodedSet([5, 6, 7, 8], [[9, 10, 11], [12]]),
    EncodedSet([13], [[14, 15, 16, 17]]),
]


def batch() -> TokenBatch:
    return collate(SETS, pad_id=2)


def score_model() -> Any:
    """A sequence classifier on the tiny trunk, with a head that is far from zero."""
    from transformers import LlamaForSequenceClassification

    config = tiny_llama().config
    config.num_labels = 1
    torch.manual_seed(3)
    return LlamaForSequenceClassification(config).eval()


def critic(normalizer: RunningMeanStd | None = None) -> ActorCritic:
    return ActorCritic(Policy(tiny_llama()), ValueModel(score_model(), normalizer))


def test_a_value_is_of_the_state_before_its_token() -> None:
    """Independent: one unpadded row at a time, the model's own trunk and head."""
    root = critic()
    values = root(batch()).values
    model = score_model()
    row = 0
    for s in SETS:
        for response in s.response_ids:
            ids = torch.tensor([[*s.prompt_ids, *response]])
            hidden = model.base_model(input_ids=ids).last_hidden_state[0]
            every = (hidden @ model.score.weight.T).squeeze(-1)
            before = every[len(s.prompt_ids) - 1 : -1]  # position p predicts token p + 1
            torch.testing.assert_close(values[row, : len(response)], before, atol=1e-5, rtol=0)
            assert values[row, len(response) :].eq(0).all()
            row += 1


def test_the_log_probs_are_the_policys() -> None:
    outputs = critic()(batch())
    torch.testing.assert_close(outputs.logprobs, Policy(tiny_llama())(batch()).logprobs)
    only_values = critic()(batch(), values_only=True)
    torch.testing.assert_close(only_values.values, outputs.values)
    assert ActorCritic(Policy(tiny_llama()))(batch()).values is None


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_values_alone_need_no_head(layout: str) -> None:
    model = tiny_llama(64)
    root = ActorCritic(build_policy(model, layout), new_value_head(model))
    with torch.no_grad():
        root.value.weight.normal_()
    seen: list[tuple[int, ...]] = []
    expected = root(batch()).values
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    found = root(batch(), values_only=True)
    torch.testing.assert_close(found.values, expected, atol=1e-5, rtol=1e-5)
    assert found.logprobs.eq(0).all()
    assert [shape[1] for shape in seen] == ([1] if layout == "padded" else [])


def test_a_first_value_is_on_the_scale_of_the_scores() -> None:
    """The last value of a response that the scorer would see is what the scorer gives."""
    normalizer = RunningMeanStd()
    normalizer.update(torch.tensor([1.0, 3.0]))  # mean 2, deviation 1
    plain, rescaled = critic()(batch()).values, critic(normalizer)(batch()).values
    mask = batch().response_mask
    torch.testing.assert_close(rescaled[mask], (plain[mask] - 2.0) / 1.0)
    scores = RewardModel(score_model())(batch())  # read at the last token
    longer = collate([EncodedSet([13], [[14, 15, 16, 17, 18]])], pad_id=2)
    torch.testing.assert_close(critic()(longer).values[0, -1], scores[2], atol=1e-5, rtol=0)


def test_one_trunk_begins_at_zero_and_trains_both() -> None:
    model = tiny_llama()
    root = ActorCritic(Policy(model, LogprobOptions(with_entropy=True)), new_value_head(model))
    outputs = root(batch())
    assert outputs.values.eq(0).all()
    plain = Policy(tiny_llama(), LogprobOptions(with_entropy=True))(batch())
    torch.testing.assert_close(outputs.logprobs, plain.logprobs)
    torch.testing.assert_close(outputs.entropy, plain.entropy)
    assert isinstance(root.value, ValueHead)
    with torch.no_grad():
        root.value.weight.fill_(0.1)
    root(batch()).values.sum().backward()
    assert root.value.weight.grad is not None
    trunk = model.model.layers[0].self_attn.q_proj.weight
    assert trunk.grad is not None and trunk.grad.abs().sum() > 0


@pytest.mark.parametrize("shares_trunk", [False, True])
def test_the_value_folder_loads_like_a_reward_model(tmp_path: Path, shares_trunk: bool) -> None:
    tokenizer = byte_level_tokenizer()
    policy_folder = save_tiny(tmp_path / "policy")
    model = tiny_llama(len(tokenizer))
    value: ValueHead | ValueModel = (
        new_value_head(model)
        if shares_trunk
        else ValueModel(init_reward_model(policy_folder, 5, tokenizer.pad_token_id))
    )
    if isinstance(value, ValueHead):
        torch.nn.init.normal_(value.weight)
    root = ActorCritic(Policy(model), value)
    (tmp_path / "value").mkdir()
    write_value_folder(tmp_path / "value", root, policy_folder, tokenizer, tokenizer.pad_token_id)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "value")
    again = ActorCritic(Policy(model), ValueModel(loaded.eval()))
    torch.testing.assert_close(again(batch()).values, root(batch()).values, atol=1e-5, rtol=0)
    assert getattr(loaded, HEAD).weight.abs().sum() > 0


def test_adapters_off_are_the_reference() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = Policy(peft.get_peft_model(tiny_llama(), config))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_()
        moved = policy(batch()).logprobs
        with as_reference(policy) as reference:
            still = reference(batch()).logprobs
    torch.testing.assert_close(still, Policy(tiny_llama())(batch()).logprobs)
    assert (moved - still).abs().max() > 1e-2


def test_another_vocabulary_is_refused() -> None:
    one = byte_level_tokenizer()
    require_same_vocabulary(one, byte_level_tokenizer(), "critic")
    with pytest.raises(UserError, match="share the policy's vocabulary"):
        require_same_vocabulary(one, byte_level_tokenizer(vocab_size=300), "critic")


@pytest.mark.parametrize("is_detached", [True, False])
def test_a_detached_value_loss_reaches_its_head_alone(is_detached: bool) -> None:
    root = ActorCritic(Policy(tiny_llama()), ValueHead(32), detach_value_trunk=is_detached)
    assert isinstance(root.value, ValueHead)
    with torch.no_grad():
        root.value.weight.fill_(0.1)
    values = root(batch()).values
    plain = ActorCritic(Policy(tiny_llama()), root.value)(batch()).values
    assert torch.equal(values, plain)
    values.square().sum().backward()
    moved = {name for name, p in root.named_parameters() if p.grad is not None and p.grad.any()}
    assert "value.weight" in moved
    assert (moved == {"value.weight"}) is is_detached
