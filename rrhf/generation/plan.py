"""Plans which prompts `rrhf generate` answers, and in which batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rrhf.data.candidate_rows import candidate_set_to_row
from rrhf.data.chat_format import ChatCodec
from rrhf.data.formats import SourceCounts
from rrhf.data.jsonl import encode_row
from rrhf.data.mixing import load_sets
from rrhf.data.prompt_text import prompt_text
from rrhf.generation.config import GenerateConfig
from rrhf.generation.engine import GenerationEngine
from rrhf.generation.fitting import Fitting, fit_by_engine, fit_by_tokens
from rrhf.generation.params import prompt_room
from rrhf.models.loading import context_window
from rrhf.progress import tracked
from rrhf.records import CandidateSet, plain_prompt

# Prompts are sorted by length within this many batches, so that a batch needs little padding.
SORTED_BATCHES = 32
# The engine is given this many batches in one call: when sampling, prompts of the next batch take
# the places of finished prompts. After a kill, all prompts of an unfinished call are generated
# again.
BATCHES_OF_A_CALL = 4


@dataclass(frozen=True)
class Plan:
    """The prompts to answer, in batches.

    Attributes:
        sets: all prompts of the source.
        indices: indices in `sets` of the prompts that fit.
        ids: the ids of these prompts.
        batches: positions in `indices`; each batch is answered in one call of the engine.
        dropped: number of prompts left out, by reason.
        digest: SHA-256 of all prompts that were read.
        counts: how many prompts are cut on the left, and how many are empty.
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
    """Group prompts of similar length into batches, which do not depend on the number of processes.

    Args:
        lengths: number of tokens in each prompt.
        size: number of prompts in a batch; the last batch of a window may be smaller.
        window: number of prompts that are sorted together.
    """
    batches = []
    for start in range(0, len(lengths), window):
        positions = range(start, min(start + window, len(lengths)))
        longest_first = sorted(positions, key=lambda position: -lengths[position])
        batches += [longest_first[i : i + size] for i in range(0, len(longest_first), size)]
    return batches


def plan_prompts(
    config: GenerateConfig,
    counts: SourceCounts,
    codec: ChatCodec | None,
    engine: GenerationEngine | None = None,
) -> Plan:
    """Read the prompts once, choose those that fit, and divide them into batches.

    Args:
        config: names the source of the prompts and their limits.
        counts: filled with the number of rows that the source read, kept and dropped.
        codec: turns prompts into tokens; None if only the engine can do that.
        engine: needed if there is no codec.

    Raises:
        UserError: the source cannot be read, or no prompt fits.
    """
    sets = _read(config, counts)
    params, room = config.sampling_params(), None
    if codec is not None:
        window = context_window(config.model_name_or_path)
        room = prompt_room(window, params, config.max_prompt_tokens)
        fit_of = fit_by_tokens(codec, room)
    else:
        assert engine is not None, "without a tokenizer, an engine must say what fits"
        fit_of = fit_by_engine(engine, params)
    fitting = Fitting(config.prompts, fit_of, codec, room, "raise --max_prompt_tokens")
    digest = hashlib.sha256()
    indices, ids, lengths = [], [], []
    count = min(len(sets), config.num_prompts or len(sets))
    for index in tracked(range(count), "read prompts", "prompt"):
        prompt = sets[index]
        digest.update(encode_row([prompt.id, candidate_set_to_row(prompt)]))
        fit = fitting.add(prompt)
        if not fit.misfit:
            indices.append(index)
            ids.append(prompt.id)
            lengths.append(fit.length)
    fitting.report()
    if config.engine_spec.is_remote:
        batches = [list(range(len(ids)))]
    else:
        batches = _plan_local(config, lengths)
    found = {"prompts_cut": fitting.num_cut, "prompts_empty": fitting.formats.counts["empty"]}
    return Plan(sets, indices, ids, batches, dict(fitting.left_out), digest.hexdigest(), found)


def _plan_local(config: GenerateConfig, lengths: Sequence[int]) -> list[list[int]]:
    size = config.per_device_prompt_batch_size
    at_a_time = size if config.num_beams > 1 else size * BATCHES_OF_A_CALL
    return plan_batches(lengths, at_a_time, size * SORTED_BATCHES)


def _read(config: GenerateConfig, counts: SourceCounts) -> Sequence[CandidateSet]:
    """Read the prompts of a source, or the prompt that is given on the command line."""
    text = prompt_text(config.prompts)
    if text is None:
        return load_sets(config.prompts, config.seed, config.split, counts, config)
    counts.read = counts.kept = 1
    return [plain_prompt(text)]
