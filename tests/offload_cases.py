"""A CPU in the place of a GPU for `--offload_level`: tensors move to copies in the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ppo_cases
import pytest
import torch
from torch import Tensor

from rrhf.training.core import offload
from rrhf.training.online import ppo

LINE = 64
"""Bytes. On a CPU, sums of products may be rounded differently where weights begin elsewhere."""


class CPUStore(offload.HostStore):
    """Copies that begin at the same place within a cache line as what they are copies of."""

    def put(self, name: str, tensor: Tensor) -> Tensor:
        copy = self._copies[name] = _copy(tensor)
        return copy

    def fetch(self, tensor: Tensor) -> Tensor:
        return _copy(tensor)


def _copy(tensor: Tensor) -> Tensor:
    room = torch.empty(tensor.nbytes + LINE, dtype=torch.uint8)
    start = (tensor.data_ptr() - room.data_ptr()) % LINE
    place = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return place.copy_(tensor)


@contextmanager
def offloading_on_a_cpu() -> Iterator[None]:
    """Meanwhile `--offload_level` works on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "DEVICES", ("cuda", "cpu"))
        patch.setattr(ppo, "HostStore", CPUStore)
        yield


def train_again(**arguments: Any) -> None:
    """`ppo_cases.train_again`, with offloading."""
    with offloading_on_a_cpu():
        ppo_cases.train_again(**arguments)
