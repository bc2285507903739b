"""Linear layers through oneDNN against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rrhf.models import onednn_linear
from rrhf.models.onednn_linear import LEAST_WEIGHTS, fast_linears, gains_here


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
    monkeypatch.setattr(onednn_linear, "PACKED_BYTES", 4 * LEAST_WEIGHTS)
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
