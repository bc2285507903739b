"""What there is to do, and whether what stands on disk was begun for the same."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rrhf.data.candidate_rows import candidate_set_to_row
from rrhf.data.chat_format import ChatCodec
from rrhf.data.formats import SourceCounts
from rrhf.data.jsonl import encode_row
from rrhf.data.mixing import load_sets
from rrhf.data.prompt_formats import PromptFormats
from rrhf.data.prompt_text import prompt_text
from rrhf.errors import UserError
from rrhf.generation.config import GenerateConfig
from rrhf.generation.local.engine import prompt_room
from rrhf.models.loading import context_window
from rrhf.progress import tracked
from rrhf.records import CandidateSet, plain_prompt

logger = logging.getLogger(__name__)

# Prompts are sorted by length within so many batches, so that a batch holds little padding.
SORTED_BATCHES = 32
# So many batches are handed to the engine at a time: where samples are drawn, those of the next
# take the places of finished ones. What is killed in between is made again as a whole.
BATCHES_OF_A_CALL = 4


@dataclass(frozen=True)
class Plan:
    """The prompts that are to be answered, and in which batches.

    Attributes:
        sets: the source, by index.
        indices: of the prompts that fit.
        ids: their ids.
        batches: positions in `indices`, cut over the whole list; each is answered in one call.
        dropped: prompts left out, by reason.
        digest: SHA-256 over all prompts read.
        counts: of the prompts read, how many are cut on the left, and how many ask nothing.
    """

    sets: Sequence[CandidateSet]
    indices: list[int]
    ids: list[str]
    batches: list[list[int]]
    dropped: dict[str, int]
    digest: str
    counts: dict[str, int] = field(default_factory=dict)

    def prompts_of(self, batch: Iterable[int]) -> list[CandidateSet]:
        return [self.sets[self.indices[position]] for position in batch]


def plan_batches(lengths: Sequence[int], size: int, window: int) -> list[list[int]]:
    """Positions in batches of similar length; depends on nothing but the whole list and the size.

    Args:
        lengths: tokens of each prompt.
        size: prompts of a batch; the last of a window may be shorter.
        window: so many prompts are sorted together.
    """
    batches = []
    for start in range(0, len(lengths), window):
        positions = range(start, min(start + window, len(lengths)))
        longest_first = sorted(positions, key=lambda position: -lengths[position])
        batches += [longest_first[i : i + size] for i in range(0, len(longest_first), size)]
    return batches


def plan_prompts(config: GenerateConfig, codec: ChatCodec, counts: SourceCounts) -> Plan:
    """Read the source once: which prompts fit, how long they are, what all of it hashes to.

    Args:
        config: names source, limit and room.
        codec: how prompts become tokens.
        counts: filled with what the source dropped.

    Raises:
        UserError: the source cannot be read, or no prompt fits.
    """
    sets = _read(config, counts)
    window = context_window(config.model_name_or_path)
    room = prompt_room(window, config.sampling_params(), config.max_prompt_tokens)
    count = min(len(sets), config.num_prompts or len(sets))
    digest = hashlib.sha256()
    indices, ids, lengths = [], [], []
    dropped: Counter[str] = Counter()
    first: dict[str, str] = {}
    formats = PromptFormats(codec)
    num_cut = 0
    for index in tracked(range(count), "read prompts", "prompt"):
        prompt = sets[index]
        digest.update(encode_row([prompt.id, candidate_set_to_row(prompt)]))
        formats.add(prompt)
        tokens = codec.encode_prompt(prompt)
        if tokens is not None and room is not None and len(tokens) > room:
            tokens = codec.encode_prompt(prompt, room)
            num_cut += bool(tokens)
        if not tokens:
            reason = "empty" if tokens == [] else f"last turn longer than {room} tokens"
            first.setdefault(reason, prompt.id)
            dropped[reason] += 1
            continue
        indices.append(index)
        ids.append(prompt.id)
        lengths.append(len(tokens))
    if not ids:
        why = ", ".join(f"{number} {reason}" for reason, number in dropped.items())
        raise UserError(
            f"{config.prompts}: no prompt is left of {count}{f' ({why})' if why else ''}; raise "
            "max_prompt_tokens, or name other prompts"
        )
    for reason, number in dropped.items():
        logger.warning(
            "%s: %d of %d prompts left out: %s (first: prompt %s)",
            config.prompts,
            number,
            count,
            reason,
            first[reason],
        )
    if num_cut:
        logger.warning(
            "%s: %d of %d prompts are longer than %d tokens and lose their beginning "
            "(--max_prompt_tokens allows more)",
            config.prompts,
            num_cut,
            count,
            room,
        )
    if formats.counts["empty"]:
        logger.warning(
            "%s: %d of %d prompts ask nothing", config.prompts, formats.counts["empty"], count
        )
    formats.tell(config.prompts)
    size = config.per_device_prompt_batch_size
    at_a_time = size if config.num_beams > 1 else size * BATCHES_OF_A_CALL
    batches = plan_batches(lengths, at_a_time, size * SORTED_BATCHES)
    told = {"prompts_cut": num_cut, "prompts_empty": formats.counts["empty"]}
    return Plan(sets, indices, ids, batches, dict(dropped), digest.hexdigest(), told)


def _read(config: GenerateConfig, counts: SourceCounts) -> Sequence[CandidateSet]:
    """The prompts of a source, or the one that the command line gives."""
    text = prompt_text(config.prompts)
    if text is None:
        return load_sets(
            config.prompts,
            config.seed,
            config.split,
            counts,
            accept_edited=config.accept_edited_files,
            columns=config.columns,
            columns_may_miss=config.columns_may_miss,
        )
    counts.read = counts.kept = 1
    return [plain_prompt(text)]
