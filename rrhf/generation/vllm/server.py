"""The requests that the engine makes to a vLLM server: completions, log-probs, new weights.

Answers are checked strictly: the number of choices, the ids of the prompt, one finite log-prob for
each token. An answer that fails a check is a `ServerFault`, and never becomes a sample.

vLLM's log-probs are those of its `raw_logprobs` mode (its default): before temperature and filters.
New weights, `/server_info` and the reset of the prefix cache exist only in a server that was
started with VLLM_SERVER_DEV_MODE=1, which `rrhf engine vllm start` sets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rrhf.errors import UserError
from rrhf.generation.vllm.http import JsonServer, NotServed, ServerFault
from rrhf.generation.vllm.settings import VLLMSettings

T = TypeVar("T")

_QUICK_SECONDS = 60.0
_POLL_SECONDS = 0.5
_START = "rrhf engine vllm start MODEL"


@dataclass(frozen=True)
class Served:
    """What a server says about itself.

    Attributes:
        model: the name that requests must give.
        root: the model folder with which the server was started.
        window: maximum number of tokens in a prompt with its response.
        instance: differs each time a server is started; "" if the server does not tell.
        dtype: number format of the weights; "" if the server does not tell.
        takes_weights: whether the server can be given new weights.
    """

    model: str
    root: str
    window: int
    instance: str
    dtype: str
    takes_weights: bool


@dataclass(frozen=True)
class Choice:
    """One response as the server returns it.

    Attributes:
        token_ids: at least one id; with the id that ended the response, if one did.
        logprobs: nats, one for each id, at temperature 1.
        finish_reason: "stop" or "length".
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


class VLLMServer:
    """A running vLLM server.

    Attributes:
        settings: its address, and how long to wait.
        http: sends the requests.
    """

    def __init__(self, settings: VLLMSettings) -> None:
        self.settings = settings
        self.http = JsonServer(settings.base_url)

    def describe(self) -> Served:
        """Ask the server what it serves.

        Raises:
            ServerFault: it does not answer, or not as vLLM does.
            UserError: it is no vLLM server.
        """
        listed = self.http.get("/v1/models", _QUICK_SECONDS)
        try:
            first = listed["data"][0]
            model, root, window = str(first["id"]), first.get("root"), int(first["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.settings.base_url}: is no vLLM server, because it does not say which model "
                "it serves with how many tokens; check --base_url"
            ) from error
        try:
            told = self.http.get("/server_info?config_format=json", _QUICK_SECONDS)
        except NotServed:
            return Served(model, str(root or model), window, "", "", False)
        config = _field(told, "vllm_config", dict)
        dtype = _field(config, "model_config", dict).get("dtype", "")
        dtype, instance = str(dtype).removeprefix("torch."), str(config.get("instance_id", ""))
        return Served(model, str(root or model), window, instance, dtype, True)

    def wait(self) -> Served:
        """Describe the server as soon as it answers.

        Raises:
            UserError: it does not answer within `server_wait_seconds`; the message ends with the
                command that starts one.
        """
        end = time.monotonic() + self.settings.server_wait_seconds
        while True:
            try:
                return self.describe()
            except ServerFault as fault:
                if time.monotonic() + _POLL_SECONDS > end:
                    raise UserError(self.no_answer(fault)) from fault
            time.sleep(_POLL_SECONDS)

    def require(self, takes_weights: bool) -> Served:
        """Check, before anything else is done, that the server answers and can do what is needed.

        Args:
            takes_weights: whether it will be given new weights.

        Raises:
            UserError: it does not answer, or takes no weights.
        """
        try:
            served = self.describe()
        except ServerFault as fault:
            raise UserError(self.no_answer(fault)) from fault
        if takes_weights and not served.takes_weights:
            raise UserError(
                f"--engine vllm: the server at {self.settings.base_url} takes no new weights; "
                f"start it with VLLM_SERVER_DEV_MODE=1 in its environment, as `{_START}` does"
            )
        return served

    def no_answer(self, fault: ServerFault) -> str:
        """Return the message about a server that does not answer."""
        return (
            f"--engine vllm: the server at {self.settings.base_url} {fault}; start one with "
            f"`{_START}`, or give the address of another with --base_url"
        )

    # Responses and log-probs.

    def complete(
        self, served: Served, prompts: Sequence[Sequence[int]], params: dict[str, Any]
    ) -> list[list[Choice]]:
        """Return the responses to some prompts, N for each.

        Args:
            served: the server's description.
            prompts: token ids.
            params: vLLM's sampling parameters, with "n".

        Raises:
            ServerFault: no answer, or one that lacks something.
            UserError: the server refuses the request.
        """
        count = int(params["n"])
        body = {"logprobs": 0, "return_token_ids": True, "stream": False, **params}
        choices = self._ask(served, prompts, body, count)
        read = [_read_choice(c, prompts[i // count]) for i, c in enumerate(choices)]
        return [read[i : i + count] for i in range(0, len(read), count)]

    def prompt_logprobs(
        self, served: Served, prompts: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Return the log-probs, in nats at temperature 1, of each prompt's tokens but the first;
        errors as in `complete`."""
        body = {"n": 1, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        choices = self._ask(served, prompts, body, 1)
        return [
            _read_prompt_logprobs(choice.get("prompt_logprobs"), prompt)
            for choice, prompt in zip(choices, prompts, strict=True)
        ]

    def _ask(
        self, served: Served, prompts: Sequence[Sequence[int]], body: dict[str, Any], count: int
    ) -> list[dict[str, Any]]:
        """Return the choices in order: `count` of the first prompt, then of the next."""
        whole = {"model": served.model, "prompt": [list(ids) for ids in prompts], **body}
        answer = self.http.post("/v1/completions", whole, self.settings.request_seconds)
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
            raise ServerFault("answered without choices")
        if answer.get("model") != served.model:
            raise ServerFault(f"answered as model {answer.get('model')!r}, not {served.model!r}")
        by_index = {str(c.get("index")): c for c in answer["choices"] if isinstance(c, dict)}
        wanted = [str(i) for i in range(len(prompts) * count)]
        if set(by_index) != set(wanted) or len(answer["choices"]) != len(wanted):
            raise ServerFault(
                f"gave {len(answer['choices'])} choices, but {len(wanted)} were asked for"
            )
        return [by_index[i] for i in wanted]

    # New weights.

    def resume(self) -> None:
        """Let the server go on if a program that was killed left it paused."""
        self.http.post("/resume", {}, _QUICK_SECONDS)

    def load(self, folder: Path) -> None:
        """Give the server the weights of a model folder, and let it forget what the old computed.

        Requests in progress are aborted. Whether the server now has the weights is for canaries to
        say (`rrhf.generation.vllm.canaries`).

        Raises:
            ServerFault: a step failed; the server may be paused, or hold any weights.
        """
        seconds = self.settings.request_seconds
        try:
            self.http.post("/pause?mode=abort", {}, _QUICK_SECONDS)
            call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
            self.http.post("/collective_rpc", call, seconds)
            done = self.http.post("/reset_prefix_cache", {}, _QUICK_SECONDS)
        finally:
            self.resume()
        if isinstance(done, dict) and done.get("success") is False:
            raise ServerFault("did not reset its prefix cache")


def _field(value: Any, name: str, kind: type[T]) -> T:
    """Return a field of an answer.

    Raises:
        ServerFault: the answer has no such field, or another kind of value in it.
    """
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise ServerFault(f"answered without {name}, or with something else in its place")
    return found


def _read_choice(choice: dict[str, Any], prompt: Sequence[int]) -> Choice:
    """Check a choice.

    Raises:
        ServerFault: it lacks something, or was aborted.
    """
    if choice.get("prompt_token_ids") != list(prompt):
        raise ServerFault("read other token ids than those of the prompt")
    ids, end = choice.get("token_ids"), choice.get("finish_reason")
    if end not in ("stop", "length"):
        raise ServerFault(f"ended a response with finish_reason {end!r}")
    if not isinstance(ids, list) or not ids or not all(type(one) is int for one in ids):
        raise ServerFault("gave a response without token ids")
    logprobs = _field(choice, "logprobs", dict).get("token_logprobs")
    return Choice(ids, _checked(logprobs, len(ids)), str(end))


def _read_prompt_logprobs(found: Any, prompt: Sequence[int]) -> list[float]:
    if not isinstance(found, list) or len(found) != len(prompt):
        raise ServerFault("gave no log-probs of the prompt")
    try:
        values = [
            at[str(token)]["logprob"] for at, token in zip(found[1:], prompt[1:], strict=True)
        ]
    except (KeyError, TypeError) as error:
        raise ServerFault("gave log-probs of other tokens than the prompt's") from error
    return _checked(values, len(prompt) - 1)


def _checked(logprobs: Any, count: int) -> list[float]:
    if not isinstance(logprobs, list) or len(logprobs) != count:
        raise ServerFault(f"gave no log-probs for {count} tokens")
    if not all(isinstance(one, (int, float)) and math.isfinite(one) for one in logprobs):
        raise ServerFault("gave a log-prob that is not a finite number")
    return [float(one) for one in logprobs]
