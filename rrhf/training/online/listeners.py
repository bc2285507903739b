"""The interface of listeners, such as the sample table, that are called with each rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rrhf.records import CandidateSet
from rrhf.training.online.experience import Experience, RolloutRow


@dataclass(frozen=True)
class MadeRollout:
    """A finished rollout, as listeners see it before the first step that trains on it.

    Attributes:
        steps_done: optimiser steps before the rollout.
        number: number of the rollout, from 0.
        prompts: the prompts of the rollout.
        rows: the responses.
        experience: the training examples made from the responses.
        metrics: the rollout's row in the metrics log.
    """

    steps_done: int
    number: int
    prompts: Sequence[CandidateSet]
    rows: Sequence[RolloutRow]
    experience: Experience
    metrics: Mapping[str, float]


class RolloutListener(Protocol):
    """An observer that is called with each rollout and does not affect the training."""

    def see_rollout(self, rollout: MadeRollout) -> None: ...
