"""Linear layers in float32 on a CPU, by the faster of the two libraries that torch brings.

Torch multiplies float32 matrices on a CPU by MKL, which goes about half as fast as oneDNN where the
processor is not of its own maker (an AMD EPYC, forwards and backwards). oneDNN is in the same build
of torch, and half precision goes by it anyway. The result is the same to rounding, and the same
bits each time.

`exchange_linears` puts it into a model, layer by layer; weights, names and files stay as they are.
Left alone: small products, where a call costs more than it saves, other devices and types,
autocast, compiled models, and builds of torch whose oneDNN cannot be called or gives something
else.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEAST_PRODUCTS = 1 << 20
"""Multiplications below which oneDNN's call costs more than it saves."""


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows @ weight.T + bias; no gradient passes.

    Args:
        rows: [..., K] float32 on a CPU.
        weight: [N, K], may be a transposed view.
        bias: [N] or None.

    Returns:
        [..., N].
    """
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return found


def is_served(rows: Tensor, weight: Tensor) -> bool:
    """Whether `multiply` takes these, and is the faster way."""
    return (
        rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and rows.numel() * len(weight) >= LEAST_PRODUCTS
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and is_usable()
    )


@functools.cache
def is_usable() -> bool:
    """Whether this build of torch has it, and it gives what torch's own product gives."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(size, 33, generator=generator) for size in (17, 29))
    try:
        with torch.no_grad():
            pairs = [
                (multiply(rows, weight), rows @ weight.T),
                (multiply(rows.T, weight[:17].T), rows.T @ weight[:17]),
            ]
            return all(torch.allclose(*pair, atol=1e-5) for pair in pairs)
    except (AttributeError, RuntimeError, TypeError):
        return False


class FastLinear(nn.Linear):
    """A linear layer that goes by `multiply` where that serves."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        if not is_served(input, self.weight):
            return super().forward(input)
        found: Tensor = _Product.apply(input, self.weight, self.bias)
        return found


def exchange_linears(model: nn.Module) -> None:
    """Make a model's plain linear layers fast ones, where its weights are float32 on a CPU."""
    if not is_usable():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            module.__class__ = FastLinear


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
