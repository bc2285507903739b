"""Linear layers through oneDNN where that is much faster than PyTorch's usual way.

PyTorch multiplies float32 matrices on a CPU with MKL, which does not use AVX-512 on processors that
are not Intel's; oneDNN, which comes with PyTorch as well, does. There a large linear layer takes
half the time, forward and backward, and on the few rows of a decoding step even less with weights
that were brought into oneDNN's own order before. The sums are those of MKL up to the last bits.

`fast_linears` is for a model that is read from for a while, `exchange_linears` for one that is
trained. The processor alone decides whether they do anything, so that one machine always rounds
alike. Left out on purpose: weights that are sharded, watched by hooks, of other types, or small.
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
"""Below, the call itself costs more than is gained."""

PACKED_BYTES = 1 << 30
"""Copies of weights in oneDNN's order may take so much memory together."""


@contextmanager
def fast_linears(model: nn.Module, pack: bool = False) -> Iterator[None]:
    """Within, the model's large linear layers go through oneDNN where this processor gains by it.

    Args:
        model: whose weights do not change meanwhile; gradients are off.
        pack: copy the weights into oneDNN's order first. It costs about as much as 20 decoding
            steps, and the memory of the copies.
    """
    layers: list[Any] = [m for m in model.modules() if _is_served(m)] if gains_here() else []
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
    """Whether this is a processor with AVX-512 on which MKL does not use it."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not found.get("avx512_f") or "AMD" not in str(found.get("cpu_name")).upper():
        return False
    try:
        weight, rows = torch.ones(16, 16), torch.ones(2, 16)
        packed = _op("_reorder_linear_weight")(weight)
        return all(bool((_product(rows, w, None) == 16).all()) for w in (weight, packed))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


class OneDnnLinear(nn.Linear):
    """A linear layer whose products, and those of its backward pass, go through oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        """As that of `nn.Linear`; what oneDNN does not serve goes that way."""
        return product(input, self.weight, self.bias)


def exchange_linears(model: nn.Module) -> int:
    """Make the model's large linear layers go through oneDNN for good; returns how many.

    The layer behind the logits stays as it is: what is trained applies it in its own way
    (`rrhf.models.head`), for which there is `product`.

    Args:
        model: a Hugging Face model, adapters or not, not yet spread over processes.
    """
    if not gains_here():
        return 0
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    head = getattr(inner, "get_output_embeddings", lambda: None)()
    layers = [m for m in model.modules() if m is not head and _is_served(m)]
    for layer in layers:
        layer.__class__ = OneDnnLinear
    return len(layers)


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows @ weight.T + bias, differentiable, through oneDNN where it gains and serves.

    Args:
        rows: [..., in].
        weight: [out, in].
        bias: [out], or None.

    Returns:
        [..., out].
    """
    if not (gains_here() and _serves(weight) and _are_served(rows)):
        return linear(rows, weight, bias)
    if not torch.is_grad_enabled():
        return _product(rows, weight, bias)
    found: Tensor = _Product.apply(rows, weight, bias)
    return found


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _product(rows, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        return (
            _product(gradient, weight.t(), None) if needs_rows else None,
            _product(flat.t(), rows.reshape(-1, rows.shape[-1]).t(), None)
            if needs_weight
            else None,
            flat.sum(0) if needs_bias else None,
        )


def _is_served(module: nn.Module) -> bool:
    if type(module) not in (nn.Linear, OneDnnLinear) or "forward" in vars(module):
        return False
    return _serves(module.weight)  # type: ignore[arg-type]


def _serves(weight: Tensor) -> bool:
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= LEAST_WEIGHTS
    )


def _are_served(rows: Tensor) -> bool:
    is_plain = rows.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return is_plain and rows.numel() > 0


def _forward(weight: Tensor, bias: Tensor | None, original: Tensor, rows: Tensor) -> Tensor:
    if torch.is_grad_enabled() or not _are_served(rows):
        return linear(rows, original, bias)
    return _product(rows, weight, bias)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = _op("_linear_pointwise")(rows, weight, bias, "none", [], "")
    return product


@cache
def _op(name: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = getattr(torch.ops.mkldnn, name).default
    return found
