"""The engine that generates with a model in this process.

A prompt is processed once for its N responses, finished rows leave the batch, and prompts of one
batch have similar lengths. None of this changes the responses: `rrhf.generation.local.sampling`
explains the randomness. A response ends at an end id or before a stop string. In the second case
its text ends exactly before the stop string, and its ids are the tokens that lie wholly before it.

Left out on purpose: weights that are spread over devices, and engines behind a network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from rrhf.data.chat_format import ChatCodec
from rrhf.errors import UserError
from rrhf.generation.engine import Capabilities, Sample, SamplingParams
from rrhf.generation.local.beam_search import BeamSearch, Hypothesis
from rrhf.generation.local.decoders import Decoder, decoding
from rrhf.generation.local.row_loop import ByParams, Chooser, Job, RowLoop, Written
from rrhf.generation.params import check_params, prompt_room
from rrhf.generation.samples import require_fit, sample_of
from rrhf.models.eval_mode import eval_mode
from rrhf.models.loading import context_window
from rrhf.records import CandidateSet

logger = logging.getLogger(__name__)


class LocalEngine:
    """Samples from a Hugging Face causal language model.

    Attributes:
        model: the model; in eval mode and without gradients while it generates.
        codec: turns text into ids and back.
        max_batch_rows: maximum number of responses generated at the same time.
        max_prompt_tokens: longer prompts lose their oldest turns; None = as many tokens as the
            model's window allows.
        chooser: makes the `Chooser` that picks tokens, from the settings and the ids that end a
            response.
    """

    capabilities = Capabilities(ids=True, logprobs=True, beams=True, seeds=True, live_weights=True)
    chooser: Callable[[SamplingParams, frozenset[int]], Chooser] = ByParams

    def __init__(
        self,
        model: Any,
        codec: ChatCodec,
        max_batch_rows: int = 32,
        max_prompt_tokens: int | None = None,
    ) -> None:
        assert max_batch_rows >= 1, "a batch holds at least one row"
        self.model = model
        self.codec = codec
        self.max_batch_rows = max_batch_rows
        self.max_prompt_tokens = max_prompt_tokens

    def describe(self) -> dict[str, Any]:
        """Describe the engine, with the name of its model."""
        return {"engine": "local", "model": self.model.config.name_or_path or "model"}

    def fits(self, prompt: CandidateSet, params: SamplingParams) -> bool:
        """Whether the prompt, without its oldest turns if need be, leaves room for a response."""
        return self.encode_prompt(prompt, params) is not None

    def prompt_room(self, params: SamplingParams) -> int | None:
        """Return the longest prompt, in tokens, for which this model has room; None = no limit."""
        return prompt_room(context_window(self.model), params, self.max_prompt_tokens)

    def encode_prompt(self, prompt: CandidateSet, params: SamplingParams) -> list[int] | None:
        """Encode the prompt, without its oldest turns if need be; None if it does not fit."""
        return self.codec.encode_prompt(prompt, self.prompt_room(params)) or None

    def generate(
        self, prompts: Sequence[CandidateSet], params: SamplingParams
    ) -> Iterator[tuple[int, list[Sample]]]:
        """Yield the index and the N samples of each prompt, in the order in which prompts finish.

        Raises:
            UserError: settings exclude each other; a prompt does not fit (check with `fits`
                first); or there is too little memory for even one response.
        """
        check_params(params)
        jobs = []
        for prompt in prompts:
            found = self.encode_prompt(prompt, params)
            ids = require_fit(prompt, found, self.prompt_room(params))
            stops = (*self.codec.stop_strings(prompt), *params.stop_strings)
            jobs.append(Job(prompt, ids, stops, params.num_return_sequences))
        return self._write(jobs, params)

    @torch.no_grad()  # on a generator, this holds only while the generator runs
    def _write(self, jobs: list[Job], params: SamplingParams) -> Iterator[tuple[int, list[Sample]]]:
        if not jobs:
            return
        places = sorted(range(len(jobs)), key=lambda place: -len(jobs[place].ids))
        ordered = [jobs[place] for place in places]  # neighbours have similar lengths
        write = self._search_beams if params.num_beams > 1 else self._sample_rows
        with eval_mode(self.model):
            for number, written in write(ordered, params):
                job = ordered[number]
                yield places[number], [self._sample_of(job, row) for row in written]

    def _sample_rows(
        self, jobs: list[Job], params: SamplingParams
    ) -> Iterator[tuple[int, list[Written]]]:
        """Sample, or decode greedily; if memory runs out, continue with half as many rows."""
        end_ids = frozenset(self.codec.end_ids)
        loop = RowLoop(jobs, params, end_ids, self._holds_any, self.chooser(params, end_ids))
        max_rows = self.max_batch_rows
        longest = len(jobs[0].ids) + params.max_new_tokens
        with decoding(self.model, self.codec.pad_id, longest, params.max_new_tokens) as new_decoder:
            while not loop.is_done:
                try:
                    yield from loop.run(new_decoder(), max_rows)
                except (MemoryError, RuntimeError) as error:
                    rows = loop.put_back()
                    _require_memory_for_fewer(error, rows, rows > 1, jobs[0], params)
                    max_rows = rows // 2

    def _holds_any(self, ids: list[int], stops: tuple[str, ...]) -> bool:
        text = self.codec.decode_tail(ids)
        return any(stop in text for stop in stops)

    def _search_beams(
        self, jobs: list[Job], params: SamplingParams
    ) -> Iterator[tuple[int, list[Written]]]:
        """Do beam search; if memory runs out, continue with half as many prompts at a time."""
        count = max(1, self.max_batch_rows // params.num_beams)
        parts = [
            range(start, min(start + count, len(jobs))) for start in range(0, len(jobs), count)
        ]
        longest = len(jobs[0].ids) + params.max_new_tokens
        with decoding(self.model, self.codec.pad_id, longest, params.max_new_tokens) as new_decoder:
            while parts:
                part = parts.pop(0)
                try:
                    written = self._search_part([jobs[n] for n in part], params, new_decoder())
                except (MemoryError, RuntimeError) as error:
                    rows, half = len(part) * params.num_beams, len(part) // 2
                    _require_memory_for_fewer(error, rows, half > 0, jobs[part[0]], params)
                    parts[:0] = [part[:half], part[half:]]
                else:
                    yield from zip(part, written, strict=True)

    def _search_part(
        self, jobs: list[Job], params: SamplingParams, decoder: Decoder
    ) -> list[list[Written]]:
        """Search the hypotheses of each job, the best first; log-probs are at the temperature."""
        tail_tokens = max((len(s.encode()) for job in jobs for s in job.stops), default=0) + 1

        def stops(prompt: int, tokens: Sequence[int]) -> bool:
            return self._holds_any(list(tokens[-tail_tokens:]), jobs[prompt].stops)

        has_stops = any(job.stops for job in jobs)
        search = BeamSearch(len(jobs), params, self.codec.end_ids, stops if has_stops else None)
        handles, logits = decoder.read([job.ids for job in jobs])
        logits = logits.repeat_interleave(params.num_beams, dim=0)
        owners = [handle for handle in handles for _ in range(params.num_beams)]
        is_first = True
        while True:
            searching = search.searching
            scaled = logits.float() / params.temperature
            rows, tokens = search.advance(torch.log_softmax(scaled, dim=-1))
            if search.is_done:
                break
            decoder.release([handles[p] for p in searching if p not in search.searching])
            sources = rows.tolist()
            owners = [owners[row] for row in sources]
            decoder.arrange([None] * len(sources) if is_first else sources, owners)
            is_first = False
            logits = decoder.step(tokens)
        return [
            [
                Written(torch.tensor(h.tokens), torch.tensor(h.logprobs), h.finish_reason)
                for h in _enough(search.best(place, job.count), job)
            ]
            for place, job in enumerate(jobs)
        ]

    def _sample_of(self, job: Job, written: Written) -> Sample:
        ended = written.token_ids, written.logprobs, written.finish_reason
        return sample_of(self.codec, job.prompt, job.ids, job.stops, ended)


def _enough(hypotheses: list[Hypothesis], job: Job) -> list[Hypothesis]:
    if len(hypotheses) < job.count:
        raise UserError(
            f"prompt {job.prompt.id}: beam search found {len(hypotheses)} hypotheses, but "
            f"{job.count} were requested; raise max_new_tokens, or lower num_return_sequences"
        )
    return hypotheses


def _require_memory_for_fewer(
    error: Exception, rows: int, can_halve: bool, job: Job, params: SamplingParams
) -> None:
    """Log that half as many rows will be tried; raise if that cannot help.

    Raises:
        UserError: there is no memory for a single response.
        Exception: `error` itself, if it is not about memory.
    """
    is_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if not is_of_memory and "DefaultCPUAllocator" not in str(error):
        raise error
    if not can_halve:
        raise UserError(
            f"prompt {job.prompt.id}: no memory for one response of {params.max_new_tokens} tokens "
            f"after {len(job.ids)}; lower max_new_tokens or max_prompt_tokens"
        ) from error
    logger.warning("no memory for %d rows at a time; trying half as many", rows)
