"""The moving average of a policy: its arithmetic, and that the stream below it is undisturbed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rrhf.training.core.parallel import Parallel
from rrhf.training.online.ema import AveragedStream


class Tied(nn.Module):
    """Two trained weights, one of them under two names, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.own = nn.Parameter(torch.tensor([1.0]))
        self.frozen = nn.Parameter(torch.tensor([5.0]), requires_grad=False)

    @torch.no_grad()
    def set(self, value: float) -> None:
        for weight in (self.first.weight, self.own):
            weight.fill_(value)


class Inner:
    """A stream that loses a step after its first, and holds a tensor of its own."""

    def __init__(self) -> None:
        self.total_steps, self.loaded = 4, dict[str, Tensor]()

    def __iter__(self) -> Iterator[Any]:
        yield from (["a"], ["b"], ["c"])

    def observe(self, metrics: dict[str, float]) -> None:
        self.total_steps = 3

    def metrics(self) -> dict[str, float]:
        return {"m": 1.0}

    def take_news(self) -> dict[str, float]:
        return {"n": 2.0}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.total_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total_steps = state["steps"]

    def tensors(self) -> dict[str, Tensor]:
        return {"experience": torch.tensor([7.0])}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.loaded = tensors


def averaged(model: Tied, beta: float = 0.75) -> AveragedStream:
    inner: Any = Inner()
    return AveragedStream(inner, model, beta, Parallel())


def average_of(stream: AveragedStream, model: Tied) -> dict[str, float]:
    weights = {f"policy.{name}": value.clone() for name, value in model.state_dict().items()}
    found = stream.averaged({**weights, "other": torch.zeros(1)}, "policy.")
    return {name: float(value.flatten()[0]) for name, value in found.items()}


def test_it_begins_with_the_first_weights_and_moves_a_share_of_the_way() -> None:
    model = Tied()
    model.set(8.0)
    stream = averaged(model)
    steps: Any = iter(stream)
    assert next(steps) == ["a"]
    model.set(0.0)
    stream.observe({})  # 3/4 of 8
    next(steps)
    model.set(4.0)
    stream.observe({})  # 3/4 of 6, and 1/4 of 4
    assert average_of(stream, model) == {
        "policy.first.weight": 5.5,
        "policy.second.weight": 5.5,
        "policy.own": 5.5,
        "policy.frozen": 5.0,
        "other": 0.0,
    }
    assert model.own.item() == 4.0  # nothing of the training is changed


@pytest.mark.parametrize("after", [0, 1])
def test_a_resumed_average_goes_on(after: int) -> None:
    def train(stream: AveragedStream, model: Tied, values: list[float]) -> AveragedStream:
        steps: Any = iter(stream)
        for value in values:
            next(steps)
            model.set(value)
            stream.observe({})
        return stream

    model = Tied()
    model.set(8.0)
    values = [0.0, 4.0]
    straight = average_of(train(averaged(model), model, values), model)
    model.set(8.0)
    saved = averaged(model)
    next(iter(saved))
    train(saved, model, values[:after])
    tensors, state = {n: t.clone() for n, t in saved.tensors().items()}, saved.state_dict()
    assert float(tensors["experience"]) == 7.0
    again = averaged(model)
    inner: Any = again._inner
    again.load_state_dict(state)
    assert again.total_steps == inner.total_steps == (3 if after else 4)
    again.load_tensors(tensors)
    assert inner.loaded.keys() == {"experience"}
    assert average_of(train(again, model, values[after:]), model) == straight


def test_the_stream_below_says_how_many_steps_there_are() -> None:
    stream = averaged(Tied())
    next(iter(stream))
    assert stream.total_steps == 4
    stream.observe({})
    assert stream.total_steps == 3
    assert (stream.metrics(), stream.take_news()) == ({"m": 1.0}, {"n": 2.0})
