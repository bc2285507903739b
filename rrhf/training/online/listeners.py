"""Listeners that are called with each rollout: tables of samples, warnings of no learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rrhf.records import CandidateSet
from rrhf.training.online.experience import Experience, RolloutRow


@dataclass(frozen=True)
class MadeRollout:
    """A rollout, before the first step that is trained on it.

    Attributes:
        steps_done: optimiser steps before it.
        number: of the rollout, from 0.
        prompts: of the rollout.
        rows: its responses.
        experience: made from them.
        metrics: its row in the log.
    """

    steps_done: int
    number: int
    prompts: Sequence[CandidateSet]
    rows: Sequence[RolloutRow]
    experience: Experience
    metrics: Mapping[str, float]


class RolloutListener(Protocol):
    """Is called with each rollout; does not affect the training."""

    def see_rollout(self, rollout: MadeRollout) -> None: ...
