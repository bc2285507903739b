"""A model in half precision that computes in float32: exactly as its float32 copy."""

from __future__ import annotations

import copy

import pytest
import torch
from layout_cases import MODELS, model

from rrhf.models.float32_mode import float32_mode


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_logits_are_those_of_a_float32_copy(kind, dtype):
    half = model(kind).to(dtype).eval()
    ids = torch.arange(3, 12)[None]
    expected = copy.deepcopy(half).float()(ids).logits
    before = {name: (id(weight), weight.data_ptr()) for name, weight in half.named_parameters()}
    with float32_mode(half), torch.autocast("cpu", torch.bfloat16, enabled=False):
        found = half(ids).logits
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert half(ids).logits.dtype == dtype
    after = {name: (id(weight), weight.data_ptr()) for name, weight in half.named_parameters()}
    assert after == before and all(weight.dtype == dtype for weight in half.parameters())


def test_weights_come_back_if_the_model_raises():
    half = model("llama").bfloat16()
    with pytest.raises((IndexError, RuntimeError)), float32_mode(half):
        half(torch.tensor([[10**6]]))
    assert all(weight.dtype == torch.bfloat16 for weight in half.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in half.modules())


@torch.no_grad()
def test_autocast_is_off():
    full = model("llama").eval()
    ids = torch.arange(3, 12)[None]
    expected = full(ids).logits
    with torch.autocast("cpu", torch.bfloat16), float32_mode(full):
        assert torch.equal(full(ids).logits, expected)
