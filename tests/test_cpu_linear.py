"""Linear layers by oneDNN give what torch's own give, and stand back where they do not serve."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_shared_prefix import MODELS, RAGGED, model, require_equal, step
from torch import Tensor, nn

from rrhf.models import cpu_linear
from rrhf.models.cpu_linear import FastLinear, exchange_linears
from rrhf.models.engines import build_policy
from rrhf.models.logprobs import Policy

pytestmark = pytest.mark.skipif(not cpu_linear.is_usable(), reason="torch has no oneDNN here")


@pytest.fixture
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no product were too small."""
    monkeypatch.setattr(cpu_linear, "LEAST_PRODUCTS", 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What oneDNN is asked for."""
    seen: list[Tensor] = []
    inner = cpu_linear.multiply

    def watched(rows: Tensor, *others: Any) -> Tensor:
        seen.append(rows)
        return inner(rows, *others)

    monkeypatch.setattr(cpu_linear, "multiply", watched)
    return seen


@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize("shape", [(9, 16), (2, 5, 16), (1, 1, 16), (0, 16)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_equals_a_plain_layer(shape: tuple[int, ...], bias: bool, trained: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(16, 11, bias=bias).requires_grad_(trained)
    fast = copy.deepcopy(plain)
    exchange_linears(fast)
    assert type(fast) is FastLinear and fast.state_dict().keys() == plain.state_dict().keys()
    gradient = torch.randn(11, *shape[:-1]).movedim(0, -1)  # not contiguous
    sides = []
    for layer in (plain, fast):
        rows = torch.linspace(-2, 2, 40)[: 16 * 2].expand(*shape[:-1], 32)[..., ::2]
        rows = rows.clone().requires_grad_()
        found = layer(rows)
        found.backward(gradient)
        sides.append([found, rows.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    for expected, found in zip(*sides, strict=True):
        assert torch.allclose(expected, found, atol=1e-5)


@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize("name", [n for n in MODELS if n != "gpt2"])  # which has no linear layers
def test_a_policy_equals_padded_rows(name: str, calls: list[Tensor]) -> None:
    policy = build_policy(model(name), "auto")
    require_equal(step(policy, RAGGED), step(Policy(model(name)), RAGGED))
    assert calls


@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize("reentrant", [True, False])
def test_with_checkpointing(reentrant: bool, calls: list[Tensor]) -> None:
    checkpointed = model("llama").train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    policy = build_policy(checkpointed, "auto").train()
    require_equal(step(policy, RAGGED), step(Policy(model("llama")), RAGGED))
    assert calls


@pytest.mark.usefixtures("_always")
def test_adapters_and_what_is_written(tmp_path: Any, calls: list[Tensor]) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(model("qwen3"), config)

    policy = build_policy(adapted(), "auto")
    require_equal(step(policy, RAGGED), step(Policy(adapted()), RAGGED))
    merged = policy.model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert torch.allclose(Policy(again)(RAGGED).logprobs, policy(RAGGED).logprobs, atol=2e-5)
    assert calls


def test_it_stands_back(calls: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """From small products, half precision and autocast."""
    layer = nn.Linear(256, 64)
    exchange_linears(layer)
    layer(torch.randn(4, 256))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(64, 256)).dtype == torch.bfloat16
    layer.bfloat16()(torch.randn(64, 256, dtype=torch.bfloat16))
    assert not calls
    layer.float()(torch.randn(64, 256))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "broken", [lambda *_: 1 / 0, lambda rows, weight, *_: rows @ weight.T + 1e-3]
)
def test_a_library_that_fails_is_not_used(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(*args: Any) -> Tensor:
        try:
            return broken(*args)
        except ZeroDivisionError as error:
            raise RuntimeError("no such kernel") from error

    cpu_linear.is_usable.cache_clear()
    monkeypatch.setattr(cpu_linear, "multiply", multiply)
    layer = nn.Linear(8, 8)
    exchange_linears(layer)
    cpu_linear.is_usable.cache_clear()
    assert type(layer) is nn.Linear
