"""Lets a model in half precision compute in float32 for a moment, without a copy of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def float32_mode(model: Any) -> Iterator[None]:
    """Context manager: compute in float32.

    The weights of a module are widened while the module is called, and are afterwards as they were,
    so the memory of one module is all that is needed in addition. Autocast is off. Quantised
    weights stay as they are.

    Args:
        model: a model that is not sharded, without gradients.
    """
    narrow: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def widen(module: nn.Module, args: Any) -> None:
        own = [p for p in module.parameters(recurse=False) if _is_half(p)]
        narrow[module] = [(parameter, parameter.data) for parameter in own]
        for parameter in own:
            parameter.data = parameter.data.float()

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        for parameter, weight in narrow.pop(module, ()):
            parameter.data = weight

    handles = []
    for module in model.modules():
        if any(map(_is_half, module.parameters(recurse=False))):
            handles.append(module.register_forward_pre_hook(widen))
            handles.append(module.register_forward_hook(restore, always_call=True))
    device = next(model.parameters()).device.type
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _is_half(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.dtype.itemsize == 2
