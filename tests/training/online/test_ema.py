"""The moving average of a policy: its arithmetic, and its way through a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rrhf.training.core.parallel import Parallel
from rrhf.training.core.tracking import Tracker
from rrhf.training.online.ema import WeightAverage


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


def averaged(model: Tied, beta: float = 0.75) -> WeightAverage:
    return WeightAverage(model, beta, Parallel())


def begin(average: WeightAverage) -> None:
    average.begin(Tracker(), torch.optim.SGD([torch.zeros(1)]))


def average_of(average: WeightAverage, model: Tied) -> dict[str, float]:
    weights = {f"policy.{name}": value.clone() for name, value in model.state_dict().items()}
    found = average.averaged({**weights, "other": torch.zeros(1)}, "policy.")
    return {name: float(value.flatten()[0]) for name, value in found.items()}


def test_it_begins_with_the_first_weights_and_moves_a_share_of_the_way() -> None:
    model = Tied()
    model.set(8.0)
    average = averaged(model)
    begin(average)
    model.set(0.0)
    average.after_step(1, {})  # 3/4 of 8
    model.set(4.0)
    average.after_step(2, {})  # 3/4 of 6, and 1/4 of 4
    assert average_of(average, model) == {
        "policy.first.weight": 5.5,
        "policy.second.weight": 5.5,
        "policy.own": 5.5,
        "policy.frozen": 5.0,
        "other": 0.0,
    }
    assert model.own.item() == 4.0  # nothing of the training is changed


@pytest.mark.parametrize("after", [0, 1])
def test_a_resumed_average_goes_on(after: int) -> None:
    def train(average: WeightAverage, model: Tied, values: list[float]) -> WeightAverage:
        begin(average)
        for value in values:
            model.set(value)
            average.after_step(1, {})
        return average

    model = Tied()
    model.set(8.0)
    values = [0.0, 4.0]
    straight = average_of(train(averaged(model), model, values), model)
    model.set(8.0)
    saved = train(averaged(model), model, values[:after])
    tensors = {name: tensor.clone() for name, tensor in saved.tensors().items()}
    again = averaged(model)
    again.load_tensors(tensors)
    assert average_of(train(again, model, values[after:]), model) == straight


def test_where_a_checkpoint_has_no_average_it_begins_with_the_weights() -> None:
    model = Tied()
    model.set(8.0)
    average = averaged(model)
    average.load_tensors({})
    begin(average)
    model.set(0.0)
    average.after_step(1, {})
    assert average_of(average, model)["policy.own"] == 6.0
