"""Linear layers through oneDNN while nothing is trained, where that is much faster.

PyTorch multiplies float32 matrices on a CPU with MKL, which does not use AVX-512 on processors that
are not Intel's; oneDNN, which comes with PyTorch as well, does. There a large linear layer takes
half the time or less, above all on the few rows of a decoding step, and more so with weights that
were brought into oneDNN's own order before. The sums are those of MKL up to the last bits.

Left out on purpose: training (these calls have no backward pass), and weights that are sharded,
adapted, watched by hooks, of other types, or small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

LEAST_WEIGHTS = 1 << 17
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


def _is_served(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):
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
    return _product(rows, weight, bias)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = _op("_linear_pointwise")(rows, weight, bias, "none", [], "")
    return product


@cache
def _op(name: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = getattr(torch.ops.mkldnn, name).default
    return found
