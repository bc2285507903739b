"""What goes on next to optimiser steps: averages, demonstrations, early ends, tables of samples.

A hook hears of every step and may keep a state; a stream knows nothing of it. The loop calls hooks
on every rank, in the order in which it was given them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rrhf.data.collate import TokenBatch
from rrhf.training.core.tracking import Tracker


class Hook:
    """Does nothing; a subclass overrides what it needs.

    Attributes:
        name: under which a checkpoint keeps its state and tensors; "" = it has none.
    """

    name: str = ""

    def begin(self, tracker: Tracker, optimizer: torch.optim.Optimizer) -> None:
        """Before the first step of this process, after a checkpoint was restored.

        Args:
            tracker: of the run.
            optimizer: prepared.
        """

    def before_step(self, step: int) -> None:
        """Before optimiser step number `step`, counted from 1."""

    def batches(self) -> list[TokenBatch]:
        """Further micro-batches of the step that comes."""
        return []

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """After that step, with its metrics."""

    def metrics(self) -> dict[str, float]:
        """What it adds to the row of the step just done."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what a checkpoint knew; an empty state: to the beginning."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint, the same on every rank."""
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take them up again; called after `load_state_dict`."""


class Hooks:
    """The hooks of a run, and their part of a checkpoint.

    Args:
        hooks: in the order in which they are called.
    """

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._all = hooks
        self._named = {hook.name: hook for hook in hooks if hook.name}
        assert len(self._named) == sum(bool(hook.name) for hook in hooks), "two hooks share a name"

    def begin(self, tracker: Tracker, optimizer: torch.optim.Optimizer) -> None:
        for hook in self._all:
            hook.begin(tracker, optimizer)

    def before_step(self, step: int) -> list[TokenBatch]:
        """Tell all of them; returns what they add to the step."""
        for hook in self._all:
            hook.before_step(step)
        return [batch for hook in self._all for batch in hook.batches()]

    def after_step(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Tell all of them; returns what they add to the row."""
        for hook in self._all:
            hook.after_step(step, metrics)
        return {name: value for hook in self._all for name, value in hook.metrics().items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: hook.state_dict() for name, hook in self._named.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a whole checkpoint; an empty one: go back to the beginning."""
        # Version 0.1 kept these states next to the stream's, or among its own.
        places = [state["hooks"]] if "hooks" in state else [state, state.get("stream", {})]
        for name, hook in self._named.items():
            hook.load_state_dict(next((place[name] for place in places if name in place), {}))

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name, hook in self._named.items()
            for key, value in hook.tensors().items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give each its own; returns those of the stream."""
        left = dict(tensors)
        for name, hook in self._named.items():
            keys = [key for key in left if key.startswith(f"{name}.")]
            hook.load_tensors({key.removeprefix(f"{name}."): left.pop(key) for key in keys})
        return left
