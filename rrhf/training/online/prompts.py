"""Which prompts a rollout can answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rrhf.errors import UserError
from rrhf.records import CandidateSet
from rrhf.training.online.rollout import RolloutWriter

logger = logging.getLogger(__name__)


def fitting_prompts(
    prompts: Sequence[CandidateSet], writer: RolloutWriter, name: str
) -> tuple[list[CandidateSet], int]:
    """Prompts that leave room for a response, without the candidates they may bring; and how many
    of them lose their beginning.

    Raises:
        UserError: none fits.
    """
    kept, left_out, cut = [], 0, 0
    for prompt in prompts:
        if writer.fits(prompt):
            kept.append(CandidateSet(prompt.id, prompt.query, prompt.messages, (), prompt.origin))
            is_cut = writer.is_cut(prompt)
            if is_cut and not cut:
                logger.info("first prompt cut: %s %.60r", prompt.id, prompt.query)
            cut += is_cut
        elif not left_out:
            left_out = 1
            logger.info("first prompt left out: %s %.60r", prompt.id, prompt.query)
        else:
            left_out += 1
    if not kept:
        raise UserError(
            f"{name}: none of its {len(prompts)} prompts leaves room for --max_new_tokens within "
            "--model_max_length; raise the second, or lower the first"
        )
    if left_out:
        logger.warning("%s: %d of %d prompts do not fit", name, left_out, len(prompts))
    if cut:
        logger.warning(
            "%s: %d of %d prompts are too long and lose their beginning", name, cut, len(prompts)
        )
    return kept, cut
