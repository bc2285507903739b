"""What is asked of a server, and what comes back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from rrhf.endpoints.settings import Api

TEMPLATE_TOKENS = 64
"""Upper bound of the tokens that a server's template adds to a message."""
BYTES_PER_TOKEN = 4
"""Bytes of a token in estimates; in bounds, a token has at least one byte."""


@dataclass(frozen=True)
class Question:
    """A prompt for which a server is to write `count` responses.

    Attributes:
        id: id of the prompt; prompts of the same text have different ids.
        body: the request without `n` and `seed`: `model`, `messages` or `prompt` (a text, or token
            ids), and parameters by the names of the API.
        count: number of responses.
        max_tokens: maximum number of tokens in a response, as `body` has it.
        api: chat or completions.
        seed: if not None, each request has a seed of its own, derived from this and the index of
            its first response.
    """

    id: str
    body: Mapping[str, Any]
    count: int = 1
    max_tokens: int = 0
    api: Api = "chat"
    seed: int | None = None

    @cached_property
    def key(self) -> str:
        """Identifies the question in the ledger: 32 hex digits over all it consists of.

        The server's address is not part of it, so a server may restart at another port, and several
        servers may share the work.
        """
        parts = [self.id, self.api, dict(self.body), self.seed]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def model(self) -> str:
        return str(self.body["model"])

    def request(self, first: int, count: int) -> dict[str, Any]:
        """Return the body of the request for `count` responses, the first of index `first`."""
        body = dict(self.body)
        if count > 1:
            body["n"] = count
        if self.seed is not None:
            body["seed"] = request_seed(self.seed, self.id, first)
        return body

    def _prompt_units(self) -> tuple[int, int]:
        """Return (bytes of text or number of ids, number of messages)."""
        if "messages" in self.body:
            texts = [str(message["content"]) for message in self.body["messages"]]
            return sum(len(text.encode("utf-8", "replace")) for text in texts), len(texts)
        prompt = self.body["prompt"]
        return len(prompt.encode("utf-8", "replace") if isinstance(prompt, str) else prompt), 0

    @property
    def estimated_prompt_tokens(self) -> int:
        """Estimated number of tokens in the prompt, one for every `BYTES_PER_TOKEN` bytes."""
        units, messages = self._prompt_units()
        if isinstance(self.body.get("prompt"), str) or messages:
            units = -(-units // BYTES_PER_TOKEN)
        return units + 4 * messages

    @property
    def most_prompt_tokens(self) -> int:
        """Upper bound of the number of tokens in the prompt, one for each byte."""
        units, messages = self._prompt_units()
        return units + TEMPLATE_TOKENS * (messages + 1)

    def most_tokens(self, count: int) -> tuple[int, int]:
        """Return upper bounds of the (input, output) tokens of a request for `count` responses."""
        return self.most_prompt_tokens, self.max_tokens * count


def request_seed(seed: int, prompt: str, first: int) -> int:
    """Return the seed of a request, 31 bits; requests of a prompt have different seeds."""
    said = json.dumps([seed, prompt, first]).encode()
    return int.from_bytes(hashlib.sha256(said).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class Choice:
    """One response.

    Attributes:
        text: the response; "" if there is none.
        finish_reason: "stop", "length" or "unknown".
        failure: why there is no response ("refusal: ...", "content_filter", ...); "" if there is.
        num_tokens: number of tokens that the server reports for it; None if it reports none.
        model: the model that answered.
        server: address of the server that answered.
        data: the choice as the server sent it.
    """

    text: str
    finish_reason: Literal["stop", "length", "unknown"] = "unknown"
    failure: str = ""
    num_tokens: int | None = None
    model: str = ""
    server: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """All choices of a question, in the order of their indices."""

    question: Question
    choices: tuple[Choice, ...]
