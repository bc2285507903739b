"""A moving average of the policy's weights, kept next to a run: often steadier than the last ones.

average = beta * average + (1 - beta) * weights, after every optimiser step, in float32, whole on
every rank. It wraps a stream, because a stream is what hears of every step and what a checkpoint
keeps; it changes nothing of the training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rrhf.data.collate import TokenBatch
from rrhf.training.core.parallel import Parallel
from rrhf.training.core.streams import LiveStream

_PREFIX = "average."


class AveragedStream:
    """A stream that averages the trained weights of a module as it goes.

    Args:
        inner: any live stream.
        module: the policy inside the actor-critic.
        beta: 0 = the last weights, towards 1 = ever longer memory.
        parallel: knows where the weights are.
    """

    def __init__(
        self, inner: LiveStream, module: nn.Module, beta: float, parallel: Parallel
    ) -> None:
        assert 0 <= beta < 1, "the share of the old average lies in [0, 1)"
        self._inner, self._module, self._beta = inner, module, beta
        self._parallel = parallel
        self._average: dict[str, Tensor] = {}
        self.total_steps = inner.total_steps

    def __iter__(self) -> Iterator[list[TokenBatch]]:
        if not self._average:
            self._average = {n: w.clone() for n, w in self._weights()}
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

    def averaged(self, weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """The actor-critic's weights in full, with averages in place of the policy's trained ones.

        Args:
            weights: of the actor-critic.
            prefix: of the policy's names among them.
        """
        # A tied weight has several names, and its average the first of them.
        first = {id(weight): name for name, weight in self._module.named_parameters()}
        named = self._module.named_parameters(remove_duplicate=False)
        known = {prefix + name: self._average.get(first[id(weight)]) for name, weight in named}
        return weights | {name: value for name, value in known.items() if value is not None}

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        return self._parallel.whole_weights(self._module, trained_only=True)
