"""Linear layers through oneDNN where that is much faster than PyTorch's usual way.

PyTorch multiplies float32 matrices on a CPU with MKL, which does not use AVX-512 on processors that
are not Intel's; oneDNN, which comes with PyTorch as well, does. There a large linear layer takes
half the time, forward and backward, and on the few rows of a decoding step even less with weights
that were brought into oneDNN's own order before. The sums are those of MKL up to the last bits.

`fast_linears` is for inference with a fixed model, `exchange_linears` for a model that is
trained. The processor alone decides whether they do anything, so that one machine always rounds
alike. Left out on purpose: weights that are sharded by DeepSpeed, other types, autocast, compiled
models, and small products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

LEAST_WEIGHTS = 1 << 16
"""Smallest layer that `fast_linears` runs in oneDNN; below, the call costs more than it saves."""

LEAST_PRODUCTS = 1 << 20
"""Fewest multiplications of a training call that runs in oneDNN, for the same reason."""

PACKED_BYTES = 1 << 30
"""Limit on the memory of all copies of weights in oneDNN's order."""


@contextmanager
def fast_linears(model: nn.Module, pack: bool = False) -> Iterator[None]:
    """Context manager: runs a model's large linear layers in oneDNN where that is faster.

    Args:
        model: whose weights do not change meanwhile; gradients are off.
        pack: copy the weights into oneDNN's order first. It costs about as much as 20 decoding
            steps, and the memory of the copies.
    """
    layers: list[Any] = [m for m in model.modules() if _may_be_read(m)] if gains_here() else []
    room = PACKED_BYTES if pack else 0
    try:
        for layer in layers:
            weight: Tensor = layer.weight.detach()
            room -= weight.nbytes
            if room >= 0:
                weight = _op("_reorder_linear_weight")(weight)
            vars(layer)["forward"] = partial(_forward, weight, layer.bias, layer.weight)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


@cache
def gains_here() -> bool:
    """Whether this processor has AVX-512 that MKL does not use."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not found.get("avx512_f") or "AMD" not in str(found.get("cpu_name")).upper():
        return False
    try:
        weight, rows = torch.ones(16, 16), torch.ones(2, 16)
        packed = _op("_reorder_linear_weight")(weight)
        return all(bool((multiply(rows, w) == 16).all()) for w in (weight, packed))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


class OneDnnLinear(nn.Linear):
    """A linear layer that runs forward and backward in oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, which also computes what oneDNN does not support."""
        if not is_served(input, self.weight):
            return linear(input, self.weight, self.bias)
        found: Tensor = _Product.apply(input, self.weight, self.bias)
        return found


def exchange_linears(model: nn.Module) -> None:
    """Make a model's plain linear layers run in oneDNN for good, where that is faster.

    Weights, names and files stay as they are.

    Args:
        model: adapters or not, not yet spread over processes.
    """
    if not gains_here():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            module.__class__ = OneDnnLinear


def is_served(rows: Tensor, weight: Tensor) -> bool:
    """Whether `multiply` accepts these and is faster."""
    return (
        rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and rows.numel() * len(weight) >= LEAST_PRODUCTS
        and type(weight) in (Tensor, nn.Parameter)
        and not hasattr(weight, "ds_id")
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and gains_here()
    )


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows @ weight.T + bias; no gradient passes.

    Args:
        rows: [..., K] float32 on a CPU.
        weight: [N, K], may be a transposed view, or in oneDNN's own order.
        bias: [N] or None.

    Returns:
        [..., N].
    """
    found: Tensor = _op("_linear_pointwise")(rows, weight, bias, "none", [], "")
    return found


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return multiply(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()
        flat = gradient.flatten(0, -2)
        return (
            multiply(gradient, weight.T) if needs_rows else None,
            multiply(flat.T, rows.flatten(0, -2).T) if needs_weight else None,
            flat.sum(0) if needs_bias else None,
        )


def _may_be_read(module: nn.Module) -> bool:
    if type(module) not in (nn.Linear, OneDnnLinear) or "forward" in vars(module):
        return False
    weight = module.weight
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= LEAST_WEIGHTS
    )


def _forward(weight: Tensor, bias: Tensor | None, original: Tensor, rows: Tensor) -> Tensor:
    is_plain = rows.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if torch.is_grad_enabled() or not is_plain or rows.numel() == 0:
        return linear(rows, original, bias)
    return multiply(rows, weight, bias)


@cache
def _op(name: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = getattr(torch.ops.mkldnn, name).default
    return found
