"""The engine whose responses come from servers of OpenAI's API.

Prompts are sent as messages (chat) or as text (completions), and text comes back: no token ids and
no log-probs. What `rrhf.endpoints` decides about failures, limits and costs holds here; a response
that a server refuses or filters becomes a sample with a failure.

Left out on purpose: filters that the API does not have (top_k, repetition penalty), beam search,
and measuring prompts in tokens, because the tokenizer is the server's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from rrhf.data.conversations import HH_CUES, conversation_of
from rrhf.endpoints.client import Client
from rrhf.endpoints.questions import Choice, Question
from rrhf.errors import UserError
from rrhf.generation.build import EngineOptions
from rrhf.generation.engine import Capabilities, Sample, SamplingParams
from rrhf.generation.params import check_params
from rrhf.records import CandidateSet
from rrhf.stages.journal import JournalFile

logger = logging.getLogger(__name__)

_SENT_FILTERS = ("top_p",)


class OpenAIServerEngine:
    """Asks servers for responses.

    Args:
        options: `model_name_or_path` is the model's name on the servers, `settings` an
            `OpenAIServerSettings`.

    Raises:
        UserError: a key is missing.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._model, self._settings = options.model_name_or_path, options.settings
        self.capabilities = Capabilities(seeds=self._settings.send_seed)
        self._journal = JournalFile(options.answers_file) if options.answers_file else None
        self._client = Client(self._settings, self._journal)

    def describe(self) -> dict[str, Any]:
        """Describe what the responses depend on; names and addresses of servers do not count."""
        names = ("api", "send_seed")
        own = {name: getattr(self._settings, name) for name in names}
        return {"engine": "openai_server", "model": self._model, **own}

    def fits(self, prompt: CandidateSet, params: SamplingParams) -> bool:
        """Whether there is something to send; only the server knows whether it is too long."""
        return bool(prompt.query.strip())

    def announce(self, prompts: Sequence[CandidateSet], *params: SamplingParams) -> None:
        """Say what will be sent where; see `rrhf.generation.engine.announce`."""
        for one in params:
            _check(one)
        is_chat = self._settings.api == "chat"
        what = "messages" if is_chat else "text"
        if is_chat and (plain := sum(prompt.messages is None for prompt in prompts)):
            logger.info(
                "%d of %d prompts have no messages: the text of each is sent as the user's turn, "
                "unless it is a transcript (Human: ... Assistant:); --api completions sends it as "
                "it is",
                plain,
                len(prompts),
            )
        questions = [self._question(prompt, one) for one in params for prompt in prompts]
        self._client.announce(questions, f"the {what} of {len(prompts):,} prompts")

    def usage(self) -> dict[str, Any]:
        """Return requests, tokens and cost, and the servers that were asked."""
        return {**self._client.usage(), "servers": list(self._settings.base_url)}

    def finish(self) -> None:
        """Remove the file of answers."""
        self._client.close()
        if self._journal is not None:
            self._journal.remove()

    def generate(
        self, prompts: Sequence[CandidateSet], params: SamplingParams
    ) -> Iterator[tuple[int, list[Sample]]]:
        """Yield the index and the N samples of each prompt, in the order in which they come.

        Raises:
            UserError: a setting cannot be sent; or as in `Client.ask`.
        """
        _check(params)
        places: dict[str, list[int]] = {}
        for place, prompt in enumerate(prompts):
            places.setdefault(_name(prompt, params), []).append(place)
        answers = self._client.ask(self._question(prompt, params) for prompt in prompts)
        try:
            for answer in answers:
                place = places[answer.question.id].pop(0)
                prompt = prompts[place]
                stops = _stops(prompt, params, self._settings.api)
                has_lead = self._settings.api == "completions" and prompt.messages is not None
                yield place, [_sample(choice, stops, has_lead) for choice in answer.choices]
        finally:
            answers.close()
            if self._journal is not None:
                self._journal.close()

    def _question(self, prompt: CandidateSet, params: SamplingParams) -> Question:
        settings = self._settings
        body: dict[str, Any] = {"model": self._model}
        if settings.api == "chat":
            turns = conversation_of(prompt)
            body["messages"] = [{"role": m.role, "content": m.content} for m in turns]
        else:
            body["prompt"] = prompt.query
        body[settings.max_tokens_field] = params.max_new_tokens
        body["temperature"] = params.temperature if params.do_sample else 0.0
        body["top_p"] = params.top_p if params.do_sample else 1.0
        if stops := _stops(prompt, params, settings.api):
            body["stop"] = list(stops)
        name = _name(prompt, params)
        seed = params.seed if settings.send_seed and params.do_sample else None
        count = params.num_return_sequences
        return Question(name, body, count, params.max_new_tokens, settings.api, seed)


def _name(prompt: CandidateSet, params: SamplingParams) -> str:
    """Return the id of a question; rounds have different ones, because a seed may not be sent."""
    return f"{prompt.id}#{params.round}" if params.round else prompt.id


def _check(params: SamplingParams) -> None:
    """Refuse settings that cannot be sent, rather than ignore them.

    Raises:
        UserError: there is such a setting.
    """
    check_params(params)
    unknown = [f"{n} = {v}" for n, v in params.active_filters().items() if n not in _SENT_FILTERS]
    if params.num_beams > 1:
        unknown.append(f"num_beams = {params.num_beams}")
    if params.min_new_tokens > 1:
        unknown.append(f"min_new_tokens = {params.min_new_tokens}")
    if unknown:
        raise UserError(
            f"engine openai_server: OpenAI's API has nothing for {', '.join(unknown)}; leave that "
            "out, or use an engine that samples here (local, vllm)"
        )


def _stops(prompt: CandidateSet, params: SamplingParams, api: str) -> tuple[str, ...]:
    """Return the strings that end a response; in a transcript, the next speaker's cue is one."""
    is_transcript = api == "completions" and prompt.query.rstrip().endswith(HH_CUES["assistant"])
    return (*(HH_CUES.values() if is_transcript else ()), *params.stop_strings)


def _sample(choice: Choice, stops: Sequence[str], has_lead: bool) -> Sample:
    """Turn a choice into a sample; a response is cut at its first stop string, because some servers
    ignore the request's.

    Args:
        choice: what the server answered.
        stops: strings that end a response.
        has_lead: whether a blank may stand between the prompt's cue and the response.
    """
    text, reason = choice.text, choice.finish_reason
    starts = [place for stop in stops if (place := text.find(stop)) >= 0]
    if starts:
        text, reason = text[: min(starts)], "stop"
    text = text.removeprefix(" ") if has_lead else text
    return Sample(None, None, None, reason, text, choice.failure, choice.num_tokens)
