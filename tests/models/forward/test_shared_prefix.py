"""Every prompt once gives the log-probs and the gradients of padded rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from layout_cases import (
    MODELS,
    RAGGED,
    SHAPES,
    V,
    at_the_edge,
    batch,
    model,
    require_equal,
    step,
)
from torch import Tensor
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    MistralForCausalLM,
)

from rrhf.data.collate import TokenBatch
from rrhf.errors import UserError
from rrhf.models.forward import packed_trunk, prefix_attention
from rrhf.models.forward import self_check as engine_trial
from rrhf.models.forward.layouts import FastPolicy, build_policy
from rrhf.models.forward.logprobs import LogprobOptions, Policy
from rrhf.models.forward.self_check import misfit
from rrhf.models.forward.shared_prefix import dense_mask, lay_out


def fast(name: str, layout: str) -> Policy:
    return (
        FastPolicy(model(name), layout) if layout == "rows" else build_policy(model(name), layout)
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["shared_prefix", "dense_mask", "rows"])
def test_equals_padded_rows(name: str, layout: str) -> None:
    for b in SHAPES.values():
        policy = fast(name, layout)
        require_equal(step(policy, b), step(Policy(model(name)), b))
        assert bool((policy(b).logprobs[~b.response_mask] == 0).all())


@pytest.mark.parametrize("beyond", [-1, 0, 1, 2])
@pytest.mark.parametrize("name", ["mistral_window", "gemma2_window", "gemma3_window"])
@pytest.mark.parametrize("layout", ["shared_prefix", "dense_mask"])
def test_rows_at_the_edge_of_a_window(name: str, layout: str, beyond: int) -> None:
    """One token too many or too few in sight would move the log-prob of the last."""
    b, policy = at_the_edge(7, beyond), fast(name, layout)
    require_equal(step(policy, b), step(Policy(model(name)), b))
    if layout == "dense_mask":  # it knows no windows: what they would cut goes as padded rows
        assert isinstance(policy, FastPolicy)
        assert (policy.packed(b) is None) is (beyond > 0)


@pytest.mark.parametrize("beyond", [-1, 0, 1, 2])
def test_flex_attention_sees_what_its_window_holds(beyond: int) -> None:
    packed = lay_out(at_the_edge(7, beyond))
    mask = prefix_attention.Prefix(packed).block_mask(7).mask_mod
    places = torch.arange(packed.ids.shape[1])
    position = packed.position_ids[0]
    wanted = dense_mask(packed, False, torch.float32)[0, 0]
    wanted = wanted & (position[:, None] - position < 7)
    zero = torch.zeros((), dtype=torch.long)
    assert torch.equal(mask(zero, zero, places[:, None], places[None]), wanted)


@pytest.mark.parametrize("count", range(1, 9))
def test_any_number_of_candidates(count: int) -> None:
    for lengths in ([5] * count, [1 + 3 * k % 7 for k in range(count)]):
        b = batch([(6, lengths), (4, lengths[::-1])])
        expected = step(Policy(model("llama")), b)
        require_equal(step(fast("llama", "shared_prefix"), b), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_window"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("layout", ["shared_prefix", "dense_mask"])
def test_with_checkpointing(name: str, reentrant: bool, layout: str) -> None:
    disabled = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    plain, checkpointed = model(name), model(name)
    for one in (plain, checkpointed):
        for module in one.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        vars(one.config).update({k: v for k, v in disabled.items() if hasattr(one.config, k)})
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    policy = build_policy(checkpointed.train(), layout).train()
    assert isinstance(policy, FastPolicy)
    calls = 0
    inner = prefix_attention.attend if layout == "shared_prefix" else packed_trunk.dense_mask

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return inner(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        where = prefix_attention if layout == "shared_prefix" else packed_trunk
        patch.setattr(where, inner.__name__, counted)
        require_equal(step(policy, RAGGED), step(Policy(plain), RAGGED))
    # Two layers, forward and again in the backward pass: so recomputation really took place.
    assert calls == (4 if layout == "shared_prefix" else int(policy.window is None))


def test_entropy_mean_and_hidden_states() -> None:
    asked = LogprobOptions(0.7, with_entropy=True, with_mean_logprobs=True)
    expected, expected_hidden = Policy(model("llama"), asked).with_hidden(RAGGED)
    policy = build_policy(model("llama"), "shared_prefix", asked)
    found, hidden = policy.with_hidden(RAGGED)
    for name in ("logprobs", "mean_logprobs", "entropy"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), atol=2e-5)
    mask = RAGGED.response_mask
    assert torch.allclose(hidden[mask], expected_hidden[mask], atol=2e-5)


def test_adapters_with_a_frozen_head() -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(model("qwen3"), config)

    found, expected = (
        step(build_policy(adapted(), e), RAGGED) for e in ("shared_prefix", "padded")
    )
    require_equal(found, expected)
    assert len(expected[2]) < 2000  # adapters alone


def test_a_head_with_adapters_is_run_as_it_is() -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(1)
        targets = ["q_proj", "lm_head"]
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        return peft.get_peft_model(model("qwen3"), config)

    found, expected = (
        step(build_policy(adapted(), e), RAGGED) for e in ("shared_prefix", "padded")
    )
    require_equal(found, expected)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(autocast: bool) -> None:
    """No farther from float32 than padded rows in bfloat16 are, to within their own rounding."""
    exact = step(Policy(model("llama")), RAGGED)

    def half(layout: str) -> tuple[float, Tensor, Tensor]:
        inner = model("llama") if autocast else model("llama").bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return step(build_policy(inner, layout), RAGGED)

    def off(found: tuple[float, Tensor, Tensor]) -> tuple[float, float]:
        gradient = float((found[2] - exact[2]).norm() / exact[2].norm())
        return float((found[1] - exact[1]).abs().max()), gradient

    (logprob, gradient), (padded_logprob, padded_gradient) = (
        off(half("shared_prefix")),
        off(half("padded")),
    )
    assert logprob < 2 * padded_logprob + 0.01
    assert gradient < 2 * padded_gradient + 0.01


def test_each_token_sees_its_own_row_and_no_more() -> None:
    """The layout against the batch, token by token."""
    packed = lay_out(RAGGED)
    sees = dense_mask(packed, False, torch.float32)[0, 0]
    ids, positions = packed.ids[0], packed.position_ids[0]
    seen = set()
    for place, row, column in zip(
        packed.predicted_from.tolist(), packed.row.tolist(), packed.column.tolist(), strict=True
    ):
        prompt = int(RAGGED.prompt_index[row])
        whole = RAGGED.prompt_ids[prompt, -int(RAGGED.prompt_lengths[prompt]) :].tolist()
        whole += RAGGED.response_ids[row, :column].tolist()
        visible = sees[place].nonzero().squeeze(-1)
        ordered = visible[positions[visible].argsort()]
        assert ids[ordered].tolist() == whole
        assert positions[ordered].tolist() == list(range(len(whole)))
        seen.add((row, column))
    lengths = RAGGED.response_lengths.tolist()
    assert seen == {(row, column) for row, r in enumerate(lengths) for column in range(r)}
    additive = dense_mask(packed, True, torch.float32)[0, 0]
    assert torch.equal(additive == 0, sees) and float(additive.min()) < -1e30


def test_prompt_tokens_pass_once_even_where_a_batch_repeats_them() -> None:
    b = batch([(7, [3, 4])])
    twice = TokenBatch(
        b.prompt_ids.repeat(2, 1),
        b.prompt_lengths.repeat(2),
        b.response_ids,
        b.response_lengths,
        torch.tensor([0, 1]),
        torch.ones(2),
    )
    for one in (b, twice):
        assert lay_out(one).ids.shape == (1, 7 + 2 + 3)
    found = build_policy(model("llama"), "shared_prefix")(twice).logprobs
    assert torch.allclose(found, Policy(model("llama"))(twice).logprobs, atol=2e-5)


def test_a_prompt_is_not_kept_once_for_each_response(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keys and values are joined to those of the responses again in the backward pass."""
    policy = build_policy(model("llama"), "shared_prefix")
    kept: list[tuple[int, ...]] = []
    inner = prefix_attention._in_pieces

    def watched(*args: Any) -> Any:
        found = inner(*args)
        if isinstance(found, Tensor):
            kept.append(tuple(found.shape))
        return found

    monkeypatch.setattr(prefix_attention, "_in_pieces", watched)
    outputs = policy(batch([(40, [4, 4, 4])])).logprobs
    assert kept and not [shape for shape in kept if len(shape) == 4 and shape[2] > 40]
    monkeypatch.setattr(prefix_attention, "_in_pieces", None)
    outputs.sum().backward()


def test_checkpointing_lets_go_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that are kept beside would stay for all layers."""
    checkpointed = model("llama").train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    policy = build_policy(checkpointed, "shared_prefix").train()
    monkeypatch.setattr(prefix_attention, "_in_pieces", None)
    policy(batch([(40, [4, 4, 4])])).logprobs.sum().backward()


def test_buckets_waste_little_and_lose_nothing() -> None:
    """Prompts of very different lengths are not padded to the longest; short ones share a call."""
    b = batch([(400, [60, 50]), (20, [5, 6]), (22, [5]), (390, [55, 60]), (21, [6, 6])])
    packed = lay_out(b)
    assert [bucket.prompts.rows for bucket in packed.buckets] == [3, 2]
    assert sum(packed.sizes) == packed.ids.shape[1] == len(packed.group)
    assert [bucket.longest for bucket in packed.buckets] == [26, 459]


def test_generation_and_padded_rows_of_the_model_stay_as_they_were() -> None:
    before, after = model("llama"), model("llama")
    build_policy(after, "shared_prefix")
    assert after.config._attn_implementation == "rrhf_shared_prefix"
    assert torch.equal(Policy(before)(RAGGED).logprobs, Policy(after)(RAGGED).logprobs)
    prompt = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 5]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    outputs = [
        one.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False)
        for one in (before, after)
    ]
    assert torch.equal(*outputs)
    assert before.config.to_dict() == after.config.to_dict()
    assert "attn" not in after.config.to_json_string()


class TestTrial:
    """What cannot be served is noticed before it is used."""

    def test_responses_that_see_each_other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Even in new weights, where log-probs hardly depend on the context."""
        fresh = model("llama")
        for parameter in fresh.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        monkeypatch.setattr(
            prefix_attention,
            "attend",
            lambda q, k, v, *_: torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            ).transpose(1, 2),
        )
        for one in (fresh, model("llama")):
            with pytest.raises(UserError, match=r"--layout shared_prefix: .* differ from"):
                build_policy(one, "shared_prefix")
            assert one.config._attn_implementation == "sdpa"

    def test_auto_falls_back_and_says_so_once(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(prefix_attention, "attend", None)
        policy = build_policy(model("llama"), "auto")
        assert isinstance(policy, FastPolicy) and policy.layout == "dense_mask"
        assert [r.levelname for r in caplog.records if r.name.startswith("rrhf")] == ["WARNING"]
        assert "shared_prefix: TypeError" in caplog.text

    def test_dropout_is_off_meanwhile(self) -> None:
        """And the model is left training, or not, as it was."""
        for is_training in (True, False):
            one = model("gpt2").train(is_training)
            build_policy(one, "shared_prefix")
            assert one.training is is_training

    def test_layers_with_a_state(self) -> None:
        torch.manual_seed(0)
        config = MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, state_size=4)
        policy = build_policy(MambaForCausalLM(config).eval(), "auto")
        assert type(policy) is Policy or (
            isinstance(policy, FastPolicy) and policy.layout == "rows" and misfit(policy) is None
        )

    def test_logits_shaped_in_an_unknown_way(self) -> None:
        odd = model("llama")
        inner = odd.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            outputs = inner(*args, **kwargs)
            outputs.logits = outputs.logits * 1.01
            return outputs

        odd.forward = forward  # type: ignore[method-assign]
        assert type(build_policy(odd, "auto")) is Policy
        assert odd.config._attn_implementation == "sdpa"

    def test_additive_masks_for_eager_attention(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A mask of True and False would be added as 1 and 0."""
        inner = packed_trunk.dense_mask
        monkeypatch.setattr(packed_trunk, "dense_mask", lambda p, _, dtype: inner(p, False, dtype))
        with pytest.raises(UserError, match="log-probs differ"):
            build_policy(model("gemma2"), "dense_mask")

    def test_windows_that_layers_do_not_tell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Then rows beyond the window go as padded rows; the short ones of the trial would not
        have shown it."""
        short, long = batch([(4, [3, 3])]), batch([(9, [6, 8, 2])])
        monkeypatch.setattr(MistralForCausalLM, "_rrhf_silent", True, raising=False)
        silent = model("mistral_window")
        inner = prefix_attention.attend
        monkeypatch.setattr(
            prefix_attention,
            "attend",
            lambda q, k, v, layout, rules, *more: inner(
                q, k, v, layout, replace(rules, window=None), *more
            ),
        )
        # As if no layer had said anything.
        monkeypatch.setattr(
            engine_trial, "Prefix", lambda layout: prefix_attention.Prefix(layout, Deaf())
        )
        silent.config.sliding_window = 16
        policy = build_policy(silent, "shared_prefix")
        assert isinstance(policy, FastPolicy) and policy.window == 16
        policy.window = silent.config.sliding_window = 7
        for b in (short, long):
            assert torch.allclose(policy(b).logprobs, Policy(silent)(b).logprobs, atol=2e-5)


class Deaf(list[Any]):
    def append(self, _: Any) -> None: ...


def test_other_attention_is_left_as_it_is() -> None:
    one = model("llama")
    one.config._attn_implementation_internal = "flash_attention_3"
    with pytest.raises(UserError, match="its attention is flash_attention_3"):
        build_policy(one, "shared_prefix")
    assert one.config._attn_implementation == "flash_attention_3"
