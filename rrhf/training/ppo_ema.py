"""A moving average of the policy's weights, kept beside a run: often steadier than the last ones.

average = beta * average + (1 - beta) * weights, after every optimiser step, in float32. It wraps a
stream, because a stream is what hears of every step and what a checkpoint keeps; it changes nothing
of the training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rrhf.data.collate import TokenBatch
from rrhf.training.streams import LiveStream

_PREFIX = "average."


class AveragedStream:
    """A stream that averages the trained weights of a module as it goes.

    Args:
        inner: any live stream.
        module: the policy inside the root; its weights must lie whole on each rank.
        beta: 0 = the last weights, towards 1 = ever longer memory.
    """

    def __init__(self, inner: LiveStream, module: nn.Module, beta: float) -> None:
        assert 0 <= beta < 1, "the share of the old average lies in [0, 1)"
        self._inner, self._module, self._beta = inner, module, beta
        self._average: dict[str, Tensor] = {}
        self.total_steps = inner.total_steps

    def __iter__(self) -> Iterator[list[TokenBatch]]:
        if not self._average:
            self._average = {n: p.detach().clone() for n, p in self._weights()}
        yield from self._inner

    @torch.no_grad()
    def observe(self, metrics: dict[str, float]) -> None:
        """Take the weights after a step into the average."""
        self._inner.observe(metrics)
        self.total_steps = self._inner.total_steps
        for name, weight in self._weights():
            self._average[name].lerp_(weight, 1 - self._beta)

    def metrics(self) -> dict[str, float]:
        return self._inner.metrics()

    def take_news(self) -> dict[str, float]:
        return self._inner.take_news()

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state)
        self.total_steps = self._inner.total_steps

    def tensors(self) -> dict[str, Tensor]:
        average = {_PREFIX + name: value.cpu() for name, value in self._average.items()}
        return {**self._inner.tensors(), **average}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        mine = {n: t for n, t in tensors.items() if n.startswith(_PREFIX)}
        self._inner.load_tensors({n: t for n, t in tensors.items() if n not in mine})
        self._average = {
            name: mine[_PREFIX + name].to(weight.device) for name, weight in self._weights()
        }

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The module with the averaged weights, for as long as the context lasts."""
        last = {name: weight.detach().clone() for name, weight in self._weights()}
        self._set(self._average)
        try:
            yield
        finally:
            self._set(last)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, weight in self._weights():
            weight.copy_(values[name])

    def _weights(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self._module.named_parameters() if p.requires_grad]
