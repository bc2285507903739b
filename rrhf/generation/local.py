"""The engine that samples from a model in this process, tokens first.

N responses of a prompt share one reading of it, finished rows leave the batch, prompts of one batch
have similar lengths. What comes out does not depend on that: see `rrhf.generation.sampling` for the
randomness, and responses are cut out by token index, never by comparing text. A response ends at an
end id, or before a stop string: its ids are then those that lie wholly before the stop string, its
text ends exactly before it.

Left out on purpose: weights that are spread over devices, and engines behind a network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rrhf.data.chat_format import ChatCodec
from rrhf.errors import UserError
from rrhf.generation.beam_search import BeamSearch, BeamSettings, Hypothesis
from rrhf.generation.engine import Sample, SamplingParams
from rrhf.generation.incremental import IncrementalModel
from rrhf.generation.sampling import check_params, pick_tokens, sample_uniforms
from rrhf.models.loading import context_window
from rrhf.records import CandidateSet, FinishReason

logger = logging.getLogger(__name__)

# Text is looked at for stop strings every so many tokens; what was written beyond one is cut off.
STOP_CHECK_TOKENS = 8
# Finished rows leave once they are this part of the batch: each leaving copies the others' past.
LEAVING_FRACTION = 1 / 8


@dataclass(frozen=True)
class Job:
    """One prompt and which of its samples are wanted.

    Attributes:
        prompt: the set.
        ids: its prompt as tokens.
        stops: strings before which a response ends.
        first: index of the first sample.
        count: how many samples, one after the other.
    """

    prompt: CandidateSet
    ids: list[int]
    stops: tuple[str, ...]
    first: int
    count: int


@dataclass(frozen=True)
class Written:
    """A response as the loop left it: [T] ids and log-probs, not yet cut at a stop string."""

    token_ids: Tensor
    logprobs: Tensor
    finish_reason: FinishReason


def prompt_room(
    window: int | None, params: SamplingParams, max_prompt_tokens: int | None
) -> int | None:
    """Tokens that a prompt may have so that a whole response still fits; None = no limit.

    Args:
        window: positions that the model knows, or None.
        params: the settings; max_new_tokens is kept free.
        max_prompt_tokens: a limit beside it, or None.

    Raises:
        UserError: max_new_tokens alone fills the window.
    """
    if window is None:
        return max_prompt_tokens
    room = window - params.max_new_tokens
    if room < 1:
        raise UserError(
            f"max_new_tokens = {params.max_new_tokens}: leaves no room for a prompt in the "
            f"model's window of {window} tokens; lower it"
        )
    return room if max_prompt_tokens is None else min(room, max_prompt_tokens)


class LocalEngine:
    """Samples from a Hugging Face causal language model.

    Attributes:
        name: "local:<model>".
        model: the model; put into eval mode while it writes, gradients off.
        codec: text to ids and back.
        max_batch_rows: responses written at the same time, at most.
        max_prompt_tokens: longer prompts lose whole turns on the left; None = as the model's
            window allows.
    """

    def __init__(
        self,
        model: Any,
        codec: ChatCodec,
        max_batch_rows: int = 32,
        max_prompt_tokens: int | None = None,
    ) -> None:
        assert max_batch_rows >= 1, "a batch holds at least one row"
        self.name = f"local:{getattr(model.config, 'name_or_path', '') or 'model'}"
        self.model = model
        self.codec = codec
        self.max_batch_rows = max_batch_rows
        self.max_prompt_tokens = max_prompt_tokens

    def prompt_room(self, params: SamplingParams) -> int | None:
        """As the function of this name, for this model."""
        return prompt_room(context_window(self.model), params, self.max_prompt_tokens)

    def encode_prompt(self, prompt: CandidateSet, params: SamplingParams) -> list[int] | None:
        """The prompt's ids, cut by whole turns to the room; None where it does not fit."""
        return self.codec.encode_prompt(prompt, self.prompt_room(params)) or None

    def generate(
        self, prompts: Sequence[CandidateSet], params: SamplingParams
    ) -> list[list[Sample]]:
        """N samples for each prompt, in order.

        Raises:
            UserError: settings that exclude each other; a prompt that does not fit (ask
                `encode_prompt` first); no memory for a single response.
        """
        check_params(params)
        jobs = []
        for prompt in prompts:
            ids = self.encode_prompt(prompt, params)
            if ids is None:
                raise UserError(
                    f"prompt {prompt.id}: is empty, or its last turn does not fit into "
                    f"{self.prompt_room(params)} tokens; shorten it, or raise max_prompt_tokens"
                )
            stops = (*self.codec.stop_strings(prompt), *params.stop_strings)
            jobs.append(Job(prompt, ids, stops, 0, params.num_return_sequences))
        samples: list[list[Sample]] = [[] for _ in jobs]
        longest_first = sorted(range(len(jobs)), key=lambda place: -len(jobs[place].ids))
        with _evaluating(self.model), torch.no_grad():
            for places in self._batches(longest_first, params):
                batch = [jobs[place] for place in places]
                written = self._write(batch, params)
                for place, rows in zip(places, written, strict=True):
                    samples[place] = [self._sample_of(jobs[place], row) for row in rows]
        return samples

    def _batches(self, places: list[int], params: SamplingParams) -> Iterator[list[int]]:
        rows_each = max(params.num_beams, params.num_return_sequences)
        size = max(1, self.max_batch_rows // rows_each)
        for start in range(0, len(places), size):
            yield places[start : start + size]

    def _write(self, jobs: list[Job], params: SamplingParams) -> list[list[Written]]:
        """Write a batch; where memory does not suffice, write its halves."""
        rows = sum(job.count for job in jobs)
        if params.num_beams == 1 and len(jobs) == 1 and rows > self.max_batch_rows:
            return self._write_halves(jobs, params)
        try:
            if params.num_beams > 1:
                return self._search_beams(jobs, params)
            return self._sample_rows(jobs, params)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(jobs) == 1 and (rows == 1 or params.num_beams > 1):
                raise UserError(
                    f"prompt {jobs[0].prompt.id}: no memory for one response of "
                    f"{params.max_new_tokens} tokens after {len(jobs[0].ids)}; lower "
                    "max_new_tokens or max_prompt_tokens"
                ) from error
        logger.warning("no memory for %d rows at a time; trying half as many", rows)
        return self._write_halves(jobs, params)

    def _write_halves(self, jobs: list[Job], params: SamplingParams) -> list[list[Written]]:
        if len(jobs) > 1:
            middle = len(jobs) // 2
            return self._write(jobs[:middle], params) + self._write(jobs[middle:], params)
        job = jobs[0]
        count = job.count // 2
        first = Job(job.prompt, job.ids, job.stops, job.first, count)
        rest = Job(job.prompt, job.ids, job.stops, job.first + count, job.count - count)
        return [self._write([first], params)[0] + self._write([rest], params)[0]]

    def _sample_rows(self, jobs: list[Job], params: SamplingParams) -> list[list[Written]]:
        """Ancestral or greedy decoding of all rows of the jobs; all jobs have the same count."""
        device = next(self.model.parameters()).device
        count = jobs[0].count
        num_rows = len(jobs) * count
        uniforms = self._uniforms(jobs, params).to(device)  # [rows, T]
        end_ids = torch.tensor(sorted(self.codec.end_ids), device=device)
        tokens = torch.zeros((num_rows, params.max_new_tokens), dtype=torch.int64, device=device)
        logprobs = torch.zeros((num_rows, params.max_new_tokens), device=device)
        lengths = torch.full((num_rows,), params.max_new_tokens, device=device)
        model = IncrementalModel(self.model, self.codec.pad_id)
        logits = model.start([job.ids for job in jobs])
        model.repeat(count)
        logits = logits.repeat_interleave(count, dim=0)
        seen = self._seen_tokens(jobs, params, logits)
        rows = torch.arange(num_rows, device=device)  # which rows are still in the batch
        alive = torch.ones_like(rows, dtype=torch.bool)
        for step in range(params.max_new_tokens):
            forbidden = self.codec.end_ids if step < params.min_new_tokens else ()
            now = uniforms[rows, step] if params.do_sample else None
            picked, picked_logprobs = pick_tokens(logits, params, now, forbidden, seen)
            tokens[rows, step] = picked
            logprobs[rows, step] = picked_logprobs
            ended = alive & torch.isin(picked, end_ids)
            lengths[rows[ended]] = step + 1
            alive &= ~ended
            if (step + 1) % STOP_CHECK_TOKENS == 0:
                stopped = self._stopped(jobs, rows, alive, tokens[:, : step + 1])
                lengths[rows[stopped]] = step + 1
                alive &= ~stopped
            num_alive = int(alive.sum())
            if num_alive == 0 or step + 1 == params.max_new_tokens:
                break
            if seen is not None:
                seen[torch.arange(len(rows), device=device), picked] = True
            if num_alive <= len(rows) * (1 - LEAVING_FRACTION):
                kept = alive.nonzero()[:, 0]
                model.select(kept)
                rows, picked, alive = rows[kept], picked[kept], alive[kept]
                seen = None if seen is None else seen[kept]
            logits = model.step(picked)
        return _grouped(tokens.cpu(), logprobs.cpu(), lengths.tolist(), self.codec.end_ids, jobs)

    def _uniforms(self, jobs: list[Job], params: SamplingParams) -> Tensor:
        if not params.do_sample:
            return torch.zeros((0, 0), dtype=torch.float64)
        return torch.stack(
            [
                sample_uniforms(params, job.prompt.id, job.first + index)
                for job in jobs
                for index in range(job.count)
            ]
        )

    def _seen_tokens(
        self, jobs: list[Job], params: SamplingParams, logits: Tensor
    ) -> Tensor | None:
        """[R, V] True where the prompt holds the token; None where no penalty asks for it."""
        if params.repetition_penalty == 1.0:
            return None
        seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        count = jobs[0].count
        for place, job in enumerate(jobs):
            ids = torch.tensor(job.ids, device=logits.device)
            seen[place * count : (place + 1) * count, ids] = True
        return seen

    def _stopped(self, jobs: list[Job], rows: Tensor, alive: Tensor, written: Tensor) -> Tensor:
        """[rows in the batch] True where the text written so far holds a stop string.

        Only the end of it is read, the rest was read before; a find is checked on the whole.
        """
        stopped = torch.zeros_like(alive)
        bytes_of_stop = max((len(s.encode()) for job in jobs for s in job.stops), default=0)
        if bytes_of_stop == 0:
            return stopped
        tail_tokens = STOP_CHECK_TOKENS + bytes_of_stop
        tails = written[rows, -tail_tokens:].tolist()
        for place, (row, is_alive) in enumerate(zip(rows.tolist(), alive.tolist(), strict=True)):
            stops = jobs[row // jobs[0].count].stops
            if is_alive and self._holds_any(tails[place], stops):
                stopped[place] = self._holds_any(written[row].tolist(), stops)
        return stopped

    def _holds_any(self, ids: list[int], stops: tuple[str, ...]) -> bool:
        text = self.codec.decode_tail(ids)
        return any(stop in text for stop in stops)

    def _search_beams(self, jobs: list[Job], params: SamplingParams) -> list[list[Written]]:
        """The best hypotheses of each job, the best first; log-probs are at the temperature."""
        settings = BeamSettings(
            num_beams=params.num_beams,
            num_beam_groups=params.num_beam_groups,
            diversity_penalty=params.diversity_penalty,
            length_penalty=params.length_penalty,
            max_new_tokens=params.max_new_tokens,
            min_new_tokens=params.min_new_tokens,
        )
        tail_tokens = max((len(s.encode()) for job in jobs for s in job.stops), default=0) + 1

        def stops(prompt: int, tokens: Sequence[int]) -> bool:
            return self._holds_any(list(tokens[-tail_tokens:]), jobs[prompt].stops)

        has_stops = any(job.stops for job in jobs)
        search = BeamSearch(len(jobs), settings, self.codec.end_ids, stops if has_stops else None)
        model = IncrementalModel(self.model, self.codec.pad_id)
        logits = model.start([job.ids for job in jobs])
        model.repeat(params.num_beams)
        logits = logits.repeat_interleave(params.num_beams, dim=0)
        while True:
            num_rows = len(logits)
            scaled = logits.float() / params.temperature
            rows, tokens = search.advance(torch.log_softmax(scaled, dim=-1))
            if search.is_done:
                break
            if rows.tolist() != list(range(num_rows)):
                model.select(rows)
            logits = model.step(tokens)
        return [
            [
                Written(torch.tensor(h.tokens), torch.tensor(h.logprobs), h.finish_reason)
                for h in _enough(search.best(place, job.count), job)
            ]
            for place, job in enumerate(jobs)
        ]

    def _sample_of(self, job: Job, written: Written) -> Sample:
        """The response cut at its first stop string, with its text."""
        ids = written.token_ids.tolist()
        text = self.codec.decode_response(job.prompt, job.ids, ids)
        raw = self.codec.decode_tail(ids)
        starts = [place for stop in job.stops if (place := raw.find(stop)) >= 0]
        if not starts:
            return Sample(written.token_ids, written.logprobs, written.finish_reason, text)
        start = min(starts)
        text = text[: max(0, start - (len(raw) - len(text)))]
        kept = _tokens_before(start, ids, self.codec.decode_tail)
        return Sample(
            written.token_ids[:kept],
            written.logprobs[:kept],
            "stop",
            text if text.strip() else "",
        )


def _tokens_before(
    position: int, ids: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> int:
    """How many of the first tokens lie wholly before a position of the decoded text."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high + 1) // 2
        if len(decode(ids[:middle])) <= position:
            low = middle
        else:
            high = middle - 1
    return low


def _grouped(
    tokens: Tensor,
    logprobs: Tensor,
    lengths: list[int],
    end_ids: frozenset[int],
    jobs: list[Job],
) -> list[list[Written]]:
    """Rows back to their jobs, each cut to its length."""
    written: list[list[Written]] = []
    row = 0
    for job in jobs:
        written.append([])
        for _ in range(job.count):
            ids = tokens[row, : lengths[row]].clone()
            reason: FinishReason = "stop" if int(ids[-1]) in end_ids else "length"
            written[-1].append(Written(ids, logprobs[row, : lengths[row]].clone(), reason))
            row += 1
    return written


def _enough(hypotheses: list[Hypothesis], job: Job) -> list[Hypothesis]:
    if len(hypotheses) < job.count:
        raise UserError(
            f"prompt {job.prompt.id}: beam search found {len(hypotheses)} hypotheses where "
            f"{job.count} were asked for; raise max_new_tokens, or lower num_return_sequences"
        )
    return hypotheses


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "DefaultCPUAllocator" in str(error)
    )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
