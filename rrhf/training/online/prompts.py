"""Which prompts a rollout can answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rrhf.data.prompt_formats import PromptFormats
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
    kept, left_out, cut = [], [], []
    formats = PromptFormats(writer.codec)
    for prompt in prompts:
        formats.add(prompt)
        if not writer.fits(prompt):
            left_out.append(prompt.id)
            continue
        kept.append(CandidateSet(prompt.id, prompt.query, prompt.messages, (), prompt.origin))
        if writer.is_cut(prompt):
            cut.append(prompt.id)
    if not kept:
        raise UserError(
            f"{name}: none of its {len(prompts)} prompts leaves room for --max_new_tokens within "
            "--model_max_length; raise the second, or lower the first"
        )
    if left_out:
        logger.warning(
            "%s: %d of %d prompts do not fit and are left out (first: prompt %s)",
            name,
            len(left_out),
            len(prompts),
            left_out[0],
        )
    if cut:
        logger.warning(
            "%s: %d of %d prompts are too long and lose their beginning (first: prompt %s)",
            name,
            len(cut),
            len(prompts),
            cut[0],
        )
    if formats.counts["empty"]:
        logger.warning(
            "%s: %d of %d prompts ask nothing", name, formats.counts["empty"], len(prompts)
        )
    formats.tell(name)
    return kept, len(cut)
