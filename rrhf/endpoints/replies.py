"""Reads the body of a server's reply, and tells responses from everything else.

Status 200 promises nothing: bodies are cut or HTML, lists of choices are missing or empty, contents
are null, and another model may have answered. Whatever is not a response of the model is an error
here, and never becomes one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rrhf.endpoints.questions import Choice
from rrhf.endpoints.secrets import Secrets
from rrhf.endpoints.settings import Api

MAX_SHOWN = 200
"""Letters of a body that messages show."""

_VERSION = re.compile(r"-(\d{4}|\d{4}-\d{2}-\d{2}|\d{8})|@[\w.-]+")


class BadReply(ValueError):
    """A reply with status 200 that holds no usable response; the message says why."""


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens that a request cost: of the prompt, and of all its responses."""

    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Reply:
    """A reply whose every choice could be read.

    Attributes:
        choices: the choices, at least one.
        usage: as the server reports it; None if it does not.
    """

    choices: list[Choice]
    usage: Usage | None


def shown(text: str) -> str:
    """Return the beginning of a text on one line, for messages."""
    words = " ".join(text.split())
    return f"{words[:MAX_SHOWN]}..." if len(words) > MAX_SHOWN else words


def parse_body(body: bytes, secrets: Secrets) -> Any:
    """Parse the body of a reply, and replace keys in it.

    Raises:
        BadReply: the body is not JSON.
    """
    text = body.decode("utf-8", "replace")
    try:
        return secrets.redacted(
            json.loads(text, parse_constant=lambda _: None, parse_float=_finite)
        )
    except (ValueError, RecursionError):
        what = shown(secrets.redacted(text)) or "an empty body"
        raise BadReply(f"the body is not JSON: {what}") from None


def _finite(text: str) -> float | None:
    """Parse a number; None if it is too large, as for NaN, which no file here can hold."""
    return number if math.isfinite(number := float(text)) else None


def read_reply(value: Any, api: Api, asked: str, accepted: str, server: str) -> Reply:
    """Check a parsed body and read its choices.

    Args:
        value: the parsed body.
        api: the API that was asked.
        asked: the model that was asked for.
        accepted: a further name that the server may answer with; "" = none.
        server: address of the server.

    Raises:
        BadReply: the body is no reply, a choice is no response, or another model answered.
    """
    if not isinstance(value, dict):
        raise BadReply(f"the body is not a JSON object: {shown(json.dumps(value))}")
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices:
        raise BadReply(f"no choices in the body: {shown(json.dumps(value))}")
    model = value.get("model")
    if not isinstance(model, str) or not is_model(model, asked, accepted):
        raise BadReply(
            f"the model {model!r} answered, but {asked!r} was asked; if that is right, add "
            f"--served_model {model}"
        )
    usage = _usage(value.get("usage"))
    num_tokens = _shares(usage.output_tokens if usage else None, len(choices))
    read = [
        read_choice(data, api, model, server, count)
        for data, count in zip(choices, num_tokens, strict=True)
    ]
    return Reply(read, usage)


def is_model(answered: str, asked: str, accepted: str = "") -> bool:
    """Whether an answer's `model` is the one asked for: the same name, alone or with a
    date (-2026-08-01) or a revision (@main)."""
    if answered == asked or (accepted and answered == accepted):
        return True
    return answered.startswith(asked) and bool(_VERSION.fullmatch(answered[len(asked) :]))


def _usage(value: Any) -> Usage | None:
    """Read the numbers of tokens; None if a number is missing or wrong."""
    if not isinstance(value, dict):
        return None
    inputs, outputs = value.get("prompt_tokens"), value.get("completion_tokens")
    if not (isinstance(inputs, int) and isinstance(outputs, int) and min(inputs, outputs) >= 0):
        return None
    return Usage(inputs, outputs)


def _shares(total: int | None, count: int) -> list[int | None]:
    """Divide the tokens of all choices among them as evenly as possible."""
    if total is None:
        return [None] * count
    return [total // count + (place < total % count) for place in range(count)]


def read_choice(
    data: Any, api: Api, model: str, server: str, num_tokens: int | None = None
) -> Choice:
    """Read one choice: a response, a refusal, or a filtered response.

    Raises:
        BadReply: it is none of these.
    """
    if not isinstance(data, Mapping):
        raise BadReply(f"a choice is not a JSON object: {shown(json.dumps(data))}")
    message = data.get("message") if api == "chat" else {"content": data.get("text")}
    if not isinstance(message, Mapping):
        raise BadReply(f"a choice has no message: {shown(json.dumps(data))}")
    reason, text, failure = data.get("finish_reason"), message.get("content"), ""
    if reason == "content_filter":
        failure = "content_filter"
    elif isinstance(refusal := message.get("refusal"), str) and refusal:
        failure = f"refusal: {shown(refusal)}"
    elif not isinstance(text, str):
        raise BadReply(f"the content of a choice is not a text: {shown(json.dumps(data))}")
    elif reason not in ("stop", "length", None, "eos", "eos_token"):
        failure = f"finish_reason {shown(str(reason))}"
    ended: dict[str, Literal["stop", "length"]] = {
        "stop": "stop",
        "eos": "stop",
        "eos_token": "stop",
        "length": "length",
    }
    return Choice(
        "" if failure else str(text),
        ended.get(str(reason), "unknown"),
        failure,
        num_tokens,
        model,
        server,
        data,
    )
