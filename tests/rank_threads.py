"""Two ranks as two threads: the real `Parallel` over an engine that averages as DDP does.

No process is started, so a step of two ranks costs milliseconds. What the engine does itself
(buckets, hooks, sharding) is `test_sharded_training`'s.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rrhf.training.core.parallel import Parallel

T = TypeVar("T")
PATIENCE_SECONDS = 5.0
"""A rank that waits for longer is alone: the test fails instead of hanging."""


class Meeting:
    """Where ranks exchange what each of them has."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=PATIENCE_SECONDS)
        self._brought: list[Any] = [None] * world_size

    def exchange(self, rank: int, mine: T) -> list[T]:
        """What every rank has brought, in their order."""
        self._brought[rank] = mine
        self._barrier.wait()
        found = list(self._brought)
        self._barrier.wait()
        return found


class Engine:
    """What `Parallel` uses of accelerate, for one of the ranks."""

    def __init__(self, rank: int, meeting: Meeting, model: nn.Module) -> None:
        self._rank, self._meeting, self._model = rank, meeting, model
        self._keeps_apart = False
        self.sync_gradients = True

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        every = torch.stack(self._meeting.exchange(self._rank, values.clone()))
        return {"sum": every.sum(0), "mean": every.mean(0)}[reduction]

    @contextlib.contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        self._keeps_apart = True
        yield
        self._keeps_apart = False

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        if not self._keeps_apart:
            for weight in self._model.parameters():
                assert weight.grad is not None
                every = self._meeting.exchange(self._rank, weight.grad.clone())
                weight.grad = torch.stack(every).mean(0)

    def clip_grad_norm_(self, parameters: Any, limit: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, limit)


def on_ranks(
    models: list[nn.Module], work: Callable[[int, Parallel], T]
) -> list[T | BaseException]:
    """Do the work on as many ranks as there are models; what each returns, or raises."""
    meeting = Meeting(len(models))
    outcomes: list[Any] = [None] * len(models)

    def one(rank: int) -> None:
        parallel = Parallel()
        engine: Any = Engine(rank, meeting, models[rank])
        parallel.accelerator = engine
        parallel.rank, parallel.world_size = rank, len(models)
        try:
            outcomes[rank] = work(rank, parallel)
        except BaseException as error:
            outcomes[rank] = error

    if len(models) == 1:
        one(0)
        return outcomes
    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
