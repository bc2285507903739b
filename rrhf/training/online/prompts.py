"""Selects the prompts that fit into a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rrhf.generation.fitting import Fitting
from rrhf.records import CandidateSet
from rrhf.training.online.rollout import RolloutWriter

FIX = "raise --model_max_length, or lower --max_new_tokens"


def fitting_prompts(
    prompts: Sequence[CandidateSet], writer: RolloutWriter, name: str
) -> tuple[list[CandidateSet], int]:
    """Prompts that leave room for a response, without their candidates; and how many of them lose
    their beginning.

    Raises:
        UserError: none fits.
    """
    fitting = Fitting(name, writer.fit, writer.codec, writer.room, FIX)
    kept = [replace(prompt, candidates=()) for prompt in fitting.select(prompts)]
    return kept, fitting.num_cut
