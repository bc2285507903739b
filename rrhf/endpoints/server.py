"""One server, asked through the `openai` package.

The package makes the request; everything that protects a run is done here: one attempt a call (its
own repetitions are off), a deadline for the whole response, a limit on its size, no redirects (a
redirect would carry prompts elsewhere), no proxy to this machine, and errors without keys.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from typing import Any, Literal

from rrhf.endpoints.limits import Pauses, Rate, retry_after_seconds
from rrhf.endpoints.questions import Question
from rrhf.endpoints.replies import BadReply, Reply, parse_body, read_reply, shown
from rrhf.endpoints.secrets import Secrets
from rrhf.endpoints.settings import COMPANY_URL, EndpointSettings, host_of, is_loopback
from rrhf.errors import UserError

CONNECT_SECONDS = 10.0

Kind = Literal["busy", "unreachable", "failed", "malformed", "refused", "wrong"]
# The package would also send facts of this machine, and, to every server, the organisation and
# further headers that environment variables name. It reads the last of these after the response.
_HEADERS = (
    *("host", "authorization", "content-type", "content-length", "transfer-encoding"),
    *("accept", "accept-encoding", "connection", "x-stainless-raw-response"),
)
_COMPANY_HEADERS = ("openai-organization", "openai-project")
_FILTERED = ("content_filter", "content_policy_violation")
_TOO_LONG = ("context_length_exceeded", "exceed_context_size_error")
_TOO_LONG_WORDS = ("maximum context length", "max_model_len")  # vLLM has no code for it


class Failure(Exception):
    """A request that brought no response.

    Attributes:
        kind: "busy" (the server asks to wait), "unreachable" (no connection: nothing was sent),
            "failed" (an error of the server, or no answer in time), "malformed" (an answer that is
            none), "refused" (the server will not answer this prompt), or "wrong" (the server will
            answer no request like this one).
        wait_seconds: how long the server asks to wait; None = it does not say.
        is_free: whether the server certainly did not bill the request.
        reason: the message without the server's address.
    """

    def __init__(
        self,
        kind: Kind,
        server: str,
        reason: str,
        wait_seconds: float | None = None,
        is_free: bool = False,
    ) -> None:
        super().__init__(f"{server}: {reason}")
        self.reason = reason
        self.kind, self.wait_seconds, self.is_free = kind, wait_seconds, is_free


class _OutOfBounds(Exception):
    """A response that is too large, or did not arrive in time."""


def _refused(status: int, text: str) -> str:
    """Return why a server will not answer one prompt, from a reply with an error: "content_filter",
    "too_long", or "" if other prompts would meet the same error."""
    if status not in (400, 413, 422):
        return ""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    error = value.get("error", value) if isinstance(value, dict) else None
    said = error if isinstance(error, dict) else {}
    codes = (said.get("code"), said.get("type"))
    if any(code in _FILTERED for code in codes):
        return "content_filter"
    has_words = any(word in str(said.get("message")).lower() for word in _TOO_LONG_WORDS)
    is_coded = isinstance(codes[0], str) and codes[0]
    is_too_long = any(code in _TOO_LONG for code in codes) or (has_words and not is_coded)
    return "too_long" if status == 413 or is_too_long else ""


def require_openai(place: str) -> None:
    """Refuse a setting that needs the `openai` package if the package is missing.

    Args:
        place: the setting, for the message, such as "--engine openai_server".
    """
    if sys.modules.get("openai") is None and importlib.util.find_spec("openai") is None:
        raise UserError(f'{place}: the package openai is not installed; pip install "rrhf[openai]"')


class Server:
    """A server of OpenAI's API, and when it may be asked.

    Args:
        url: its address.
        key: its key.
        settings: limits of requests.
        secrets: replaces keys in what comes back.

    Attributes:
        requests, tokens: what was sent in the last minute.
        pauses: when it may be asked again after a failure.
        num_in_flight: number of requests that it is answering.
        is_there: whether it ever answered; None = it was not asked yet.
    """

    def __init__(self, url: str, key: str, settings: EndpointSettings, secrets: Secrets) -> None:
        self.url = url
        self._settings, self._secrets = settings, secrets
        self.requests = Rate(settings.requests_per_minute)
        self.tokens = Rate(settings.tokens_per_minute)
        self.pauses = Pauses(settings.retry_wait_seconds)
        self.num_in_flight = 0
        self.is_there: bool | None = None
        self._client = self._new_client(key)

    def _new_client(self, key: str) -> Any:
        """Make the client; its import takes about a second, so it is done here."""
        require_openai("--base_url")
        import openai

        settings, limit = self._settings, self._settings.request_timeout_seconds
        # The package comes with httpx or with httpx2, depending on its version.
        kinds = openai.DefaultHttpxClient.__mro__
        name = next(kind.__module__ for kind in kinds if kind.__name__ == "Client").partition(".")[
            0
        ]
        httpx = importlib.import_module(name)
        self._transport_error: type[Exception] = httpx.HTTPError

        class Bounded(httpx.SyncByteStream):  # type: ignore[name-defined, misc]
            """A body that ends with an error when it is too large or too slow."""

            def __init__(self, stream: Any, deadline: float) -> None:
                self._stream, self._deadline = stream, deadline

            def __iter__(self) -> Iterator[bytes]:
                size = 0
                for part in self._stream:
                    size += len(part)
                    if size > settings.max_response_bytes:
                        raise _OutOfBounds(
                            f"the response is larger than {settings.max_response_bytes} bytes"
                        )
                    if time.monotonic() > self._deadline:
                        raise _OutOfBounds(f"the response took more than {limit:g} s")
                    yield part

            def close(self) -> None:
                self._stream.close()

        is_company = host_of(self.url) == host_of(COMPANY_URL)
        sent = (*_HEADERS, *_COMPANY_HEADERS) if is_company else _HEADERS

        def started(request: Any) -> None:
            request.extensions["deadline"] = time.monotonic() + limit
            for header in [one for one in request.headers if one.lower() not in sent]:
                del request.headers[header]
            request.headers["User-Agent"] = "rrhf"

        def bounded(response: Any) -> None:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise _OutOfBounds("the response is compressed, which was not asked for")
            response.stream = Bounded(response.stream, response.request.extensions["deadline"])

        return openai.OpenAI(
            base_url=self.url,
            api_key=key,
            max_retries=0,
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultHttpxClient(
                timeout=httpx.Timeout(limit, connect=min(CONNECT_SECONDS, limit)),
                follow_redirects=False,
                trust_env=not is_loopback(self.url),
                event_hooks={"request": [started], "response": [bounded]},
            ),
        )

    def wait(self, tokens: int, now: float) -> float:
        """Return the seconds until a request of so many tokens may be sent."""
        return max(self.pauses.wait(now), self.requests.wait(1, now), self.tokens.wait(tokens, now))

    def ask(self, question: Question, first: int, count: int) -> Reply:
        """Send one request for `count` responses, and read its reply.

        Raises:
            Failure: there is no usable reply.
        """
        body = question.request(first, count)
        asked = {name: body.pop(name) for name in ("model", "messages", "prompt") if name in body}
        client = self._client
        api = client.chat.completions if question.api == "chat" else client.completions
        import openai

        try:
            response = api.with_raw_response.create(**asked, extra_body=body).http_response
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        except openai.APITimeoutError:
            limit = self._settings.request_timeout_seconds
            raise self._failure("failed", f"no answer within {limit:g} s") from None
        except (openai.APIConnectionError, self._transport_error, _OutOfBounds) as error:
            raise self._lost(error) from None
        try:
            value = parse_body(response.content, self._secrets)
            if isinstance(value, dict) and value.get("error"):
                raise BadReply(f"an error with status 200: {shown(str(value['error']))}")
            return read_reply(
                value, question.api, question.model, self._settings.served_model, self.url
            )
        except BadReply as error:
            raise self._failure("malformed", str(error)) from None

    def _failure(self, kind: Kind, message: str, *words: Any) -> Failure:
        return Failure(kind, self.url, self._secrets.redacted(message), *words)

    def _lost(self, error: Exception) -> Failure:
        """Describe a request without a whole response."""
        cause = error.__cause__ or error
        if isinstance(cause, _OutOfBounds):
            return self._failure("failed", str(cause))
        name = type(cause).__name__
        is_unsent = name in ("ConnectError", "ConnectTimeout", "ProxyError")
        what = "cannot be reached" if is_unsent else "the connection broke"
        message = f"{what} ({name}: {shown(str(cause))})"
        return self._failure("unreachable" if is_unsent else "failed", message, None, is_unsent)

    def _refusal(self, error: Any) -> Failure:
        """Describe a reply with a status other than 200."""
        status, headers = error.status_code, error.response.headers
        try:
            text = self._secrets.redacted(error.response.text)
        except Exception:  # the body was cut, or not read: the status says enough
            text = ""
        message = f"status {status}: {shown(text) or 'an empty body'}"
        wait = retry_after_seconds(headers.get("retry-after"))
        if 300 <= status < 400:
            message = f"status {status}: redirects elsewhere; give the final address"
            return self._failure("wrong", message, None, True)
        if status == 429 and "insufficient_quota" in text.lower():
            return self._failure("wrong", message, None, True)
        if status in (429, 503):
            return self._failure("busy", message, wait, True)
        if status >= 500 or status in (408, 409, 425):
            return self._failure("failed", message, wait)
        if why := _refused(status, text):
            return self._failure("refused", f"{why}: {message}", None, why == "too_long")
        return self._failure("wrong", message, None, True)

    def close(self) -> None:
        self._client.close()
