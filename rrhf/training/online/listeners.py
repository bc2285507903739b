"""What may hear of a rollout that was made: a table of samples, signs that nothing is learnt."""

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
        prompts: that it answers.
        rows: its responses.
        experience: made of them.
        metrics: its row in the log.
    """

    steps_done: int
    number: int
    prompts: Sequence[CandidateSet]
    rows: Sequence[RolloutRow]
    experience: Experience
    metrics: Mapping[str, float]


class RolloutListener(Protocol):
    """Changes nothing of the training."""

    def see_rollout(self, rollout: MadeRollout) -> None: ...
