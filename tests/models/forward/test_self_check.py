"""The trial of a layout: what it notices beyond numbers, and that it leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layout_cases import RAGGED, model
from torch import Tensor

from rrhf.errors import UserError
from rrhf.models.forward import flex_attention, prefix_attention
from rrhf.models.forward import self_check as engine_trial
from rrhf.models.forward.layouts import FastPolicy, build_policy
from rrhf.models.forward.logprobs import Policy


class _Wrong(torch.autograd.Function):
    """As it is forwards; backwards a tenth too large, or nothing at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float | None) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.factor is None:
            raise NotImplementedError("this kernel has no backward pass")
        return gradient * ctx.factor, None


@pytest.mark.parametrize(
    ("factor", "said"), [(1.1, "gradients differ .* by 0.1 of"), (None, "no backward pass")]
)
def test_a_backward_pass_that_is_wrong_or_missing(
    factor: float | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = prefix_attention.attend
    monkeypatch.setattr(
        prefix_attention,
        "attend",
        lambda q, k, v, *more: inner(q, k, _Wrong.apply(v, factor), *more),
    )
    with pytest.raises(UserError, match=said):
        build_policy(model("llama"), "shared_prefix")
    frozen = build_policy(model("llama").requires_grad_(False), "shared_prefix")
    assert isinstance(frozen, FastPolicy), "forwards nothing is wrong"


def test_recomputation_with_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent with reentrant checkpointing: the log-probs are right, and the gradient is not."""
    inner = prefix_attention.attend
    checkpointed = model("llama").train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": True})
    checkpointed.enable_input_require_grads()

    def other_when_recomputed(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        return inner(q, k, v if not torch.is_grad_enabled() else v.flip(2), *more)

    monkeypatch.setattr(prefix_attention, "attend", other_when_recomputed)
    with pytest.raises(UserError, match="gradients differ"):
        build_policy(checkpointed, "shared_prefix")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_trace_is_left(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = prefix_attention.attend
    # As dropout would, had a model hidden some from the trial.
    monkeypatch.setattr(prefix_attention, "attend", lambda *args: inner(*args) + 0 * torch.rand(()))
    one = model(name).train()
    one.activation_checkpointing_enable({"use_reentrant": False})
    Policy(one)(RAGGED).logprobs.sum().backward()
    frozen = next(one.parameters()).requires_grad_(False)
    before = {n: (p.detach().clone(), p.grad, p.requires_grad) for n, p in one.named_parameters()}
    modes = [module.training for module in one.modules()]
    hooks = len(one.get_input_embeddings()._forward_hooks)
    drawn = torch.random.get_rng_state()
    build_policy(one, "shared_prefix")
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert modes == [module.training for module in one.modules()]
    assert hooks == len(one.get_input_embeddings()._forward_hooks)
    assert not frozen.requires_grad
    for n, p in one.named_parameters():
        assert torch.equal(p, before[n][0])
        assert (p.grad is before[n][1]) and p.requires_grad == before[n][2]


def test_gradients_of_large_weights_are_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_trial, "PROBE_SIZE", 32)
    one = model("llama")
    seen = set()
    for parameter in one.parameters():
        parameter.register_hook(lambda gradient: seen.add(gradient.numel()))
    build_policy(one, "shared_prefix")
    assert seen == {32}


class TestFlexAttention:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2_window", "mistral_window"])
    def test_scores_equal_padded_rows(self, name: str) -> None:
        """On a CPU forwards alone."""
        frozen = model(name).requires_grad_(False)
        policy = build_policy(frozen, "flex_attention")
        assert isinstance(policy, FastPolicy) and policy.window is None
        expected = Policy(model(name))(RAGGED).logprobs
        assert torch.allclose(policy(RAGGED).logprobs, expected, atol=2e-5)
        assert torch.allclose(Policy(frozen)(RAGGED).logprobs, expected, atol=2e-5)

    def test_on_a_cpu_it_does_not_train(self, caplog: pytest.LogCaptureFixture) -> None:
        """Refused by name, with what torch says of it; `auto` goes on to padded rows."""
        one = model("llama")
        with pytest.raises(UserError, match=r"does not support backward on CPU.*--layout auto"):
            build_policy(one, "flex_attention")
        assert one.config._attn_implementation == "sdpa"
        build_policy(one, "auto")
        assert not [record for record in caplog.records if record.levelname == "WARNING"]

    def test_mixed_precision_is_one_precision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Qwen3's norms leave queries and keys in float32 there, which a kernel refuses."""
        seen: set[torch.dtype] = set()
        inner = prefix_attention.attend_flex

        def watched(*states: Any) -> torch.Tensor:
            seen.update(state.dtype for state in states[:3])
            return inner(*states)

        monkeypatch.setattr(prefix_attention, "attend_flex", watched)
        policy = build_policy(model("qwen3").requires_grad_(False), "flex_attention")
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            policy(RAGGED)
        assert seen == {torch.bfloat16}

    def test_windows_and_caps_are_no_numbers_where_they_are_compiled(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Compiled for any length, a number becomes a symbol, which the kernel cannot have."""
        held: list[Any] = []
        inner = flex_attention.flex_attention

        def watched(*states: Any, score_mod: Any, block_mask: Any, **more: Any) -> torch.Tensor:
            for function in (score_mod, block_mask.mask_mod):
                held.extend(cell.cell_contents for cell in function.__closure__)
            return inner(*states, score_mod=score_mod, block_mask=block_mask, **more)

        monkeypatch.setattr(flex_attention, "flex_attention", watched)
        policy = build_policy(model("gemma2_window").requires_grad_(False), "flex_attention")
        policy(RAGGED)
        assert held
        assert not [one for one in held if one is not None and not isinstance(one, torch.Tensor)]

    def test_no_dropout_of_weights(self) -> None:
        one = model("gpt2").requires_grad_(False)
        policy = build_policy(one, "flex_attention").train()
        with pytest.raises(NotImplementedError, match="no dropout"):
            policy(RAGGED)


def test_the_trial_keeps_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled attention refuses a backward pass that does."""
    kept: list[bool] = []
    inner = prefix_attention.attend

    def watched(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        def note(_: torch.Tensor) -> None:
            kept.append(torch._C._autograd._get_current_graph_task_keep_graph())

        if query.requires_grad:
            query.register_hook(note)
        return inner(query, *rest)

    monkeypatch.setattr(prefix_attention, "attend", watched)
    build_policy(model("llama"), "shared_prefix")
    assert kept and not any(kept)
