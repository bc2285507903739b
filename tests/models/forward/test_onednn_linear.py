"""Linear layers through oneDNN against PyTorch's own; they stand back where they do not serve."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from layout_cases import MODELS, RAGGED, model, require_equal, step
from torch import Tensor, nn

from rrhf.models.forward import onednn_linear
from rrhf.models.forward.layouts import build_policy
from rrhf.models.forward.logprobs import Policy
from rrhf.models.forward.onednn_linear import (
    LEAST_WEIGHTS,
    OneDnnLinear,
    exchange_linears,
    fast_linears,
    gains_here,
)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that gains, whatever this one is."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(onednn_linear, "gains_here", lambda: True)


@pytest.fixture
def _all(served: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And as if no product were too small."""
    monkeypatch.setattr(onednn_linear, "LEAST_PRODUCTS", 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What oneDNN is asked for."""
    seen: list[Tensor] = []
    inner = onednn_linear.multiply

    def watched(rows: Tensor, *others: Any) -> Tensor:
        seen.append(rows)
        return inner(rows, *others)

    monkeypatch.setattr(onednn_linear, "multiply", watched)
    return seen


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 256), nn.Linear(256, 512, bias=False), nn.Linear(512, 8))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("shape", [(1, 512), (8, 1, 512), (2, 7, 512)])
def test_products_are_those_of_pytorch(served, pack, shape):
    model = layers()
    rows = torch.randn(*shape, 2)[..., 0]  # not contiguous
    with torch.no_grad():
        plain = model(rows)
        with fast_linears(model, pack):
            assert "forward" in vars(model[0]) and "forward" in vars(model[1])
            assert "forward" not in vars(model[2]), "too small to gain"
            torch.testing.assert_close(model(rows), plain, atol=1e-5, rtol=1e-5)
    assert not any("forward" in vars(layer) for layer in model)


def test_the_layers_come_back_whatever_happens(served):
    model = layers()
    with pytest.raises(KeyError), fast_linears(model, pack=True):
        raise KeyError
    assert not any("forward" in vars(layer) for layer in model)


def test_what_it_cannot_do_goes_the_usual_way(served):
    model = layers()
    rows = torch.randn(3, 512)
    with fast_linears(model, pack=True):
        model(rows).sum().backward()
        assert model[0].weight.grad is not None, "gradients are on"
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert model(rows).dtype == torch.bfloat16
        with torch.no_grad():
            assert model(rows[:0]).shape == (0, 8)
    for other in (model.bfloat16(), model.half()):  # not copied, so PyTorch is as fast
        with fast_linears(other):
            assert not any("forward" in vars(layer) for layer in other)


def test_copies_in_bfloat16_give_the_products_of_pytorch(served, calls):
    if not onednn_linear.has_bfloat16():
        pytest.skip("this processor does not multiply in bfloat16")
    model = layers().bfloat16()
    rows = torch.randn(8, 1, 512).bfloat16()
    with torch.no_grad():
        plain = model(rows)
        with fast_linears(model, pack=True):
            found = model(rows)
            assert len(calls) == 2, "the third layer is too small to gain"
            assert model(rows.float().half().bfloat16()).dtype == torch.bfloat16
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, plain, atol=0.02, rtol=0.02)


def test_packed_copies_stay_within_their_room(served, monkeypatch):
    monkeypatch.setattr(onednn_linear, "PACKED_BYTES", 8 * LEAST_WEIGHTS)
    model = layers()
    with torch.no_grad(), fast_linears(model, pack=True):
        first, second = (vars(layer)["forward"].args[0] for layer in model[:2])
        assert first.is_mkldnn and not second.is_mkldnn


def test_it_is_told_by_the_processor(monkeypatch):
    for name, expected in (("AMD EPYC", True), ("Intel(R) Xeon(R)", False)):
        found = {"avx512_f": True, "cpu_name": name}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        gains_here.cache_clear()
        assert gains_here() == (expected and torch.backends.mkldnn.is_available())
    gains_here.cache_clear()


# ---- for training --------------------------------------------------------------------------------


@pytest.mark.usefixtures("_all")
@pytest.mark.parametrize("shape", [(9, 16), (2, 5, 16), (1, 1, 16), (0, 16)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_equals_a_plain_layer(shape: tuple[int, ...], bias: bool, trained: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(16, 11, bias=bias).requires_grad_(trained)
    fast = copy.deepcopy(plain)
    exchange_linears(fast)
    assert type(fast) is OneDnnLinear and fast.state_dict().keys() == plain.state_dict().keys()
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


@pytest.mark.usefixtures("_all")
@pytest.mark.parametrize("name", [n for n in MODELS if n != "gpt2"])  # which has no linear layers
def test_a_policy_equals_padded_rows(name: str, calls: list[Tensor]) -> None:
    policy = build_policy(model(name), "auto")
    require_equal(step(policy, RAGGED), step(Policy(model(name)), RAGGED))
    assert calls


@pytest.mark.usefixtures("_all")
@pytest.mark.parametrize("reentrant", [True, False])
def test_with_checkpointing(reentrant: bool, calls: list[Tensor]) -> None:
    checkpointed = model("llama").train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    policy = build_policy(checkpointed, "auto").train()
    require_equal(step(policy, RAGGED), step(Policy(model("llama")), RAGGED))
    assert calls


@pytest.mark.usefixtures("_all")
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


@pytest.mark.usefixtures("served")
def test_it_stands_back(calls: list[Tensor]) -> None:
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


@pytest.mark.usefixtures("served")
def test_a_trained_model_may_be_copied_and_read_from_quickly() -> None:
    trained = layers()
    exchange_linears(trained)
    copied = copy.deepcopy(trained)
    rows = torch.randn(3, 512)
    with torch.no_grad(), fast_linears(copied, pack=True):
        assert "forward" in vars(copied[0]) and "forward" not in vars(trained[0])
        torch.testing.assert_close(copied(rows), layers()(rows), atol=1e-5, rtol=1e-5)


def test_on_other_processors_nothing_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_linear, "gains_here", lambda: False)
    plain = layers()
    exchange_linears(plain)
    assert all(type(layer) is nn.Linear for layer in plain)
