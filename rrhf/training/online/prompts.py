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
    """Select the prompts that leave room for a response.

    Returns:
        The prompts, with their candidates removed, and how many of them will be cut at the start.

    Raises:
        UserError: no prompt fits.
    """
    fitting = Fitting(name, writer.fit, writer.codec, writer.room, FIX)
    kept = [replace(prompt, candidates=()) for prompt in fitting.select(prompts)]
    return kept, fitting.num_cut
