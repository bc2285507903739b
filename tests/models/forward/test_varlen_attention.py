"""Two varlen calls give what padded rows give; a slow and exact kernel stands in for the real."""

from __future__ import annotations

import itertools
from typing import Any, cast

import flash_stand_in
import pytest
import torch
from layout_cases import RAGGED, SHAPES, at_the_edge, batch, model, require_equal, step
from transformers import PreTrainedModel

from rrhf.errors import UserError
from rrhf.models.forward import varlen_attention
from rrhf.models.forward.layouts import FastPolicy, build_policy
from rrhf.models.forward.logprobs import Policy
from rrhf.models.forward.self_check import BASES
from rrhf.models.forward.shared_prefix import dense_mask, lay_out
from rrhf.models.forward.varlen_attention import _order, _reordered, calls_of


@pytest.fixture(autouse=True)
def _kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_stand_in.install(monkeypatch)


def flash(name: str) -> PreTrainedModel:
    return flash_stand_in.with_flash(model(name))


NAMES = ["llama", "qwen3", "gpt2", "gpt_neox", "gemma2_window", "mistral_window"]


@pytest.mark.parametrize("name", NAMES)
def test_equals_padded_rows(name: str) -> None:
    for b in SHAPES.values():
        policy = build_policy(flash(name), "auto")
        assert isinstance(policy, FastPolicy) and policy.layout == "shared_prefix"
        assert policy.model.config._attn_implementation == "rrhf_shared_prefix_varlen"
        require_equal(step(policy, b), step(Policy(model(name)), b))


@pytest.mark.parametrize("beyond", [-1, 0, 1, 2])
@pytest.mark.parametrize("name", ["mistral_window", "gemma2_window"])
def test_rows_at_the_edge_of_a_window(name: str, beyond: int) -> None:
    b, policy = at_the_edge(7, beyond), build_policy(flash(name), "shared_prefix")
    require_equal(step(policy, b), step(Policy(model(name)), b))


@pytest.mark.parametrize("count", range(1, 9))
def test_any_number_of_candidates(count: int) -> None:
    for lengths in ([5] * count, [1 + 3 * k % 7 for k in range(count)]):
        b = batch([(6, lengths), (4, lengths[::-1])])
        policy = build_policy(flash("llama"), "shared_prefix")
        require_equal(step(policy, b), step(Policy(model("llama")), b))


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_checkpointing(reentrant: bool) -> None:
    checkpointed = flash("llama")
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    policy = build_policy(checkpointed.train(), "shared_prefix")
    require_equal(step(policy, RAGGED), step(Policy(model("llama")), RAGGED))


def test_each_response_reads_its_prompt_and_then_itself() -> None:
    """Also where prompts of very different lengths lie in buckets of their own."""
    b = batch([(400, [60, 50]), (20, [5, 6]), (22, [5]), (390, [55, 1, 60]), (21, [6, 6])])
    for packed in (lay_out(b), lay_out(b, whole=True), lay_out(RAGGED)):
        calls = calls_of(packed, packed.ids.device)
        assert calls.keys is not None and calls.key_bounds is not None
        parts = _order(packed)
        order = _reordered(torch.arange(packed.ids.shape[1]), packed.sizes, parts)
        sizes = [packed.sizes[place] for place in parts]
        back = sorted(range(len(parts)), key=parts.index)
        assert torch.equal(_reordered(order, sizes, back), torch.arange(len(order)))
        sees = dense_mask(packed, False, torch.float32)[0, 0][order][:, order]
        assert int(calls.prompt_bounds[-1]) == calls.prompts
        assert calls.own_bounds is not None
        ends = calls.key_bounds.tolist()
        for row, (start, end) in enumerate(itertools.pairwise(ends)):
            last = calls.prompts + int(calls.own_bounds[row + 1]) - 1
            read = calls.keys[start:end]
            assert read.tolist() == sees[last].nonzero().flatten().tolist()


def test_generation_and_padded_rows_go_by_the_ordinary_kernel() -> None:
    plain, ours = model("qwen3"), flash("qwen3")
    build_policy(ours, "shared_prefix")
    assert torch.allclose(Policy(plain)(RAGGED).logprobs, Policy(ours)(RAGGED).logprobs, atol=2e-5)
    prompt = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 5]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    outputs = [
        cast(Any, one).generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False)
        for one in (plain, ours)
    ]
    assert torch.equal(*outputs)


def test_mixed_precision_is_what_the_kernel_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3's norms leave queries and keys in float32 there."""
    seen: set[torch.dtype] = set()

    def watched(*tensors: torch.Tensor, **more: object) -> torch.Tensor:
        seen.update(tensor.dtype for tensor in tensors[:3])
        return flash_stand_in.flash_attn_varlen_func(*tensors, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(varlen_attention, "load_varlen", lambda: watched)
    build_policy(flash("qwen3"), "shared_prefix")
    assert seen == {torch.bfloat16}


def test_weights_that_are_not_yet_where_the_kernel_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The layout is tried over sdpa; then flash attention is put in."""
    caplog.set_level("INFO", "rrhf")
    monkeypatch.setattr(varlen_attention, "DEVICES", ("cuda",))
    monkeypatch.setattr(varlen_attention, "load_varlen", None)
    for layout in ("auto", "flex_attention"):
        one = flash("llama").requires_grad_(False)
        policy = build_policy(one, layout)
        assert isinstance(policy, FastPolicy)
        assert BASES[one.config._attn_implementation] == "flash_attention_2"
    assert [record.getMessage() for record in caplog.records if record.name.startswith("rrhf")] == [
        "layout: LlamaForCausalLM uses shared_prefix over flash_attention_2",
        "layout: LlamaForCausalLM uses flex_attention over flash_attention_2",
    ]


def test_a_kernel_that_sees_too_much_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As flash attention before 2.1 did: the first query of a row at its first key."""

    def top_left(q: torch.Tensor, *others: object, **more: object) -> torch.Tensor:
        flipped = [x.flip(0) for x in (q, *others[:2])]  # type: ignore[attr-defined]
        return flash_stand_in.flash_attn_varlen_func(*flipped, *others[2:], **more)  # type: ignore[arg-type]

    monkeypatch.setattr(varlen_attention, "load_varlen", lambda: top_left)
    one = flash("llama")
    with pytest.raises(UserError, match="differ from those of padded rows"):
        build_policy(one, "shared_prefix")
    assert one.config._attn_implementation == "flash_attention_2"
    policy = build_policy(one, "auto")
    assert isinstance(policy, FastPolicy) and policy.layout == "rows"
