"""Runs linear layers in oneDNN where that is much faster than PyTorch's default.

PyTorch multiplies float32 matrices on a CPU with MKL, which does not use AVX-512 on processors that
are not Intel's; oneDNN, which comes with PyTorch as well, does. On such processors a large linear
layer takes half the time in oneDNN, forward and backward, and even less on the few rows of a
decoding step if the weights have been copied into oneDNN's memory layout before. Results differ
from those of MKL only by rounding.

`fast_linears` is for inference with a fixed model, `exchange_linears` for a model that is trained.
Whether they change anything depends only on the processor, so that one machine always rounds in the
same way. Both functions leave alone: weights that DeepSpeed has sharded, autocast, compiled models,
and small products.

In bfloat16, PyTorch itself multiplies in oneDNN where the processor has such instructions. Copied
weights still halve the time of a decoding step, so `fast_linears` copies those as well; it leaves
alone layers in bfloat16 that it does not copy, and both functions leave alone other number formats.
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
"""Number of weights of the smallest layer that `fast_linears` runs in oneDNN; for smaller layers
the call costs more than it saves."""

LEAST_PRODUCTS = 1 << 20
"""Number of multiplications of the smallest training call that runs in oneDNN, for the same
reason."""

PACKED_BYTES = 1 << 30
"""Limit on the memory of all copies of weights in oneDNN's memory layout."""


@contextmanager
def fast_linears(model: nn.Module, pack: bool = False) -> Iterator[None]:
    """Context manager: run a model's large linear layers in oneDNN where that is faster.

    Args:
        model: its weights must not change inside the context, and gradients must be off.
        pack: first copy the weights into oneDNN's memory layout, which takes the time of about 20
            decoding steps, and memory for the copies.
    """
    layers: list[Any] = [m for m in model.modules() if _may_be_read(m)] if gains_here() else []
    room = PACKED_BYTES if pack else 0
    try:
        for layer in layers:
            weight: Tensor = layer.weight.detach()
            room -= weight.nbytes
            if room >= 0:
                weight = _op("_reorder_linear_weight")(weight)
            elif weight.dtype != torch.float32:
                continue
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


@cache
def has_bfloat16() -> bool:
    """Whether this processor multiplies numbers in bfloat16."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16"))


class OneDnnLinear(nn.Linear):
    """A linear layer that runs forward and backward in oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer; `nn.Linear` computes what oneDNN does not support."""
        if not is_served(input, self.weight):
            return linear(input, self.weight, self.bias)
        found: Tensor = _Product.apply(input, self.weight, self.bias)
        return found


def exchange_linears(model: nn.Module) -> None:
    """Make a model's plain linear layers run in oneDNN permanently, where that is faster.

    Weights, names and files stay as they are.

    Args:
        model: with or without adapters, not yet distributed over processes.
    """
    if not gains_here():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            module.__class__ = OneDnnLinear


def is_served(rows: Tensor, weight: Tensor) -> bool:
    """Whether `multiply` accepts these tensors and is faster than PyTorch's default."""
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
    """Compute rows @ weight.T + bias in oneDNN, without a gradient.

    Args:
        rows: [..., K] float32 on a CPU.
        weight: [N, K]; may be a transposed view, or be in oneDNN's memory layout.
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
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and has_bfloat16()))
        and weight.numel() >= LEAST_WEIGHTS
    )


def _forward(weight: Tensor, bias: Tensor | None, original: Tensor, rows: Tensor) -> Tensor:
    is_plain = rows.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")
    if torch.is_grad_enabled() or not is_plain or rows.numel() == 0:
        return linear(rows, original, bias)
    return multiply(rows, weight, bias)


@cache
def _op(name: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = getattr(torch.ops.mkldnn, name).default
    return found
