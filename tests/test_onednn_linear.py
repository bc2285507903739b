"""Linear layers through oneDNN against PyTorch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rrhf.models import onednn_linear
from rrhf.models.onednn_linear import (
    LEAST_WEIGHTS,
    OneDnnLinear,
    exchange_linears,
    fast_linears,
    gains_here,
    product,
)


@pytest.fixture
def served(monkeypatch) -> None:
    """As on a processor that gains, whatever this one is."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(onednn_linear, "gains_here", lambda: True)


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
    with fast_linears(model.bfloat16()):
        assert not any("forward" in vars(layer) for layer in model)


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


def gradients(model: nn.Module, rows: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    rows = rows.detach().requires_grad_()
    model(rows).square().sum().backward()
    return [rows.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("shape", [(1, 512), (8, 1, 512), (2, 33, 512)])
def test_gradients_are_those_of_pytorch(served, shape):
    plain, exchanged = layers(), layers()
    assert exchange_linears(exchanged) == 2
    assert [type(layer) is OneDnnLinear for layer in exchanged] == [True, True, False]
    rows = torch.randn(shape)
    pairs = zip(gradients(exchanged, rows), gradients(plain, rows), strict=True)
    for mine, theirs in pairs:
        assert float((mine - theirs).norm() / theirs.norm()) < 2e-6


def test_a_frozen_weight_gets_no_gradient_and_costs_none(served):
    model = layers()
    exchange_linears(model)
    for layer in model[:2]:
        layer.weight.requires_grad_(False)
    rows = torch.randn(3, 512, requires_grad=True)
    model(rows).sum().backward()
    assert rows.grad is not None and model[0].weight.grad is None
    assert model[0].bias.grad is not None


def test_a_trained_model_may_be_copied_and_read_from_quickly(served):
    model = layers()
    exchange_linears(model)
    copied = copy.deepcopy(model)
    rows = torch.randn(3, 512)
    with torch.no_grad(), fast_linears(copied, pack=True):
        assert "forward" in vars(copied[0]) and "forward" not in vars(model[0])
        torch.testing.assert_close(copied(rows), layers()(rows), atol=1e-5, rtol=1e-5)


def test_the_head_of_a_language_model_stays(served):
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    assert exchange_linears(model) == 7
    assert type(model.lm_head) is nn.Linear
    assert set(model.state_dict()) == set(LlamaForCausalLM(config).state_dict())


def test_products_of_other_types_and_on_other_processors_go_the_usual_way(served, monkeypatch):
    weight, rows = torch.randn(512, 256), torch.randn(4, 256)
    half = product(rows.bfloat16(), weight.bfloat16())
    torch.testing.assert_close(half, nn.functional.linear(rows.bfloat16(), weight.bfloat16()))
    monkeypatch.setattr(onednn_linear, "gains_here", lambda: False)
    assert exchange_linears(layers()) == 0
    monkeypatch.setattr(onednn_linear, "_product", None)
    torch.testing.assert_close(product(rows, weight), nn.functional.linear(rows, weight))
