"""A server of OpenAI's API on loopback that answers as it is told, faults included."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = (
    "429",
    "429 after 0",
    "429 after date",
    "500",
    "503",
    "hang",
    "drip",
    "drip head",
    "cut",
    "html",
    "empty",
    "null",
    "no choices",
    "error in 200",
    "wrong model",
    "not utf-8",
    "array",
    "deep",
    "large",
    "gzip",
    "reset",
    "echo 500",
)
"""Faults after which a client should ask again."""

HANG_SECONDS = 30.0


def prompt_of(body: dict[str, Any]) -> str:
    """The text that a request asks about."""
    return str(body["prompt"] if "prompt" in body else body["messages"][-1]["content"])


def spread(faults: Sequence[str], prompts: Sequence[str]) -> Callable[[dict[str, Any]], str]:
    """Return a `fault_of` that gives each prompt its share of the faults, then none: no prompt gets
    so many replies without a response that a client gives it up."""
    waiting = {prompt: list(faults[start :: len(prompts)]) for start, prompt in enumerate(prompts)}

    def fault_of(body: dict[str, Any]) -> str:
        left = waiting.get(prompt_of(body))
        return left.pop(0) if left else ""

    return fault_of


class ScriptedServer:
    """Answers "NUMBER: PROMPT", where NUMBER counts the responses to this prompt.

    Args:
        faults: what the first requests meet, one each; then requests are answered.
        fault_of: the fault of a request, from its body; "" = none. Instead of `faults`.
        most: how many responses a request gets at the most, whatever it asks for.
        model: the model that is named in answers; "" = the one asked for.
        seconds: how long an answer takes.
        answer: the text of a response, from the request and its number.

    Attributes:
        bodies: the requests, in the order in which they came.
        keys: the values of their Authorization headers.
        headers: all their headers.
        billed: number of responses that were made, by prompt.
        input_tokens, output_tokens: what the answers cost.
    """

    def __init__(
        self,
        faults: Sequence[str] = (),
        fault_of: Callable[[dict[str, Any]], str] | None = None,
        most: int = 100,
        model: str = "",
        seconds: float = 0.0,
        answer: Callable[[dict[str, Any], int], str] | None = None,
    ) -> None:
        self.faults, self.fault_of = list(faults), fault_of
        self.most, self.model, self.seconds = most, model, seconds
        self.answer = answer or (lambda body, number: f"{number}: {prompt_of(body)}")
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.billed: Counter[str] = Counter()
        self.input_tokens = self.output_tokens = 0
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.url = ""

    def next_fault(self, body: dict[str, Any]) -> str:
        if self.fault_of is not None:
            return self.fault_of(body)
        return self.faults.pop(0) if self.faults else ""

    def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Make the responses to a request, and bill them."""
        prompt = prompt_of(body)
        choices = []
        limit = body.get("max_tokens", body.get("max_completion_tokens"))
        spent = 0
        for index in range(min(body.get("n", 1), self.most)):
            with self._lock:
                number = self.billed[prompt]
                self.billed[prompt] += 1
            text = self.answer(body, number)
            words = text.split(" ")
            ended = limit is None or len(words) <= limit
            text = text if ended else " ".join(words[:limit])
            spent += len(text.split(" "))
            said = (
                {"text": text}
                if path.endswith("/v1/completions")
                else {"message": {"role": "assistant", "content": text}}
            )
            choices.append({"index": index, "finish_reason": "stop" if ended else "length", **said})
        read = len(json.dumps(body.get("messages", prompt))) // 4
        with self._lock:
            self.input_tokens += read
            self.output_tokens += spent
        return {
            "id": "1",
            "object": "chat.completion",
            "model": self.model or body["model"],
            "choices": choices,
            "usage": {
                "prompt_tokens": read,
                "completion_tokens": spent,
                "total_tokens": read + spent,
            },
        }

    def handle(self, to: _Handler) -> None:
        """Answer one request."""
        body = json.loads(to.rfile.read(int(to.headers["Content-Length"])))
        key = to.headers.get("Authorization", "")
        with self._lock:
            self.bodies.append(body)
            self.keys.append(key)
            self.headers.append({name.lower(): value for name, value in to.headers.items()})
            fault = self.next_fault(body)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if self.seconds:
                self._over.wait(self.seconds)
            self._answer(to, body, key, fault)
        finally:
            with self._lock:
                self._at_once -= 1

    def _answer(self, to: _Handler, body: dict[str, Any], key: str, fault: str) -> None:
        if fault == "hang":
            self._over.wait(HANG_SECONDS)
            to.close_connection = True
            return
        if fault == "reset":
            to.close_connection = True
            return
        if fault == "drip head":
            self._drip(to, b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 2000)
            return
        if (
            fault.split()[0] in ("400", "401", "403", "404", "429", "500", "503", "302")
            if fault
            else False
        ):
            self._refuse(to, fault)
            return
        if fault == "echo 500":
            to.send(500, json.dumps({"error": {"message": f"{key} is a fine key"}}).encode())
            return
        whole = {
            "html": b"<html><body>Welcome</body></html>",
            "empty": b"",
            "not utf-8": b"\xff\xfe{}",
            "array": b"[1, 2]",
            "deep": b"[" * 100_000,
            "large": b'{"choices": "' + b"x" * (9 << 20) + b'"}',
            "error in 200": json.dumps({"error": {"message": f"overloaded, {key}"}}).encode(),
        }.get(fault)
        if whole is not None:
            to.send(200, whole, "text/html" if fault == "html" else "application/json")
            return
        value = self.reply(to.path, body)
        if fault == "null":
            for choice in value["choices"]:
                choice.get("message", choice)["content" if "message" in choice else "text"] = None
        elif fault == "no choices":
            value["choices"] = []
        elif fault == "wrong model":
            value["model"] = "a-cheaper-model"
        elif fault == "filtered":
            value["choices"][0]["finish_reason"] = "content_filter"
        elif fault == "refusal":
            value["choices"][0]["message"] |= {"content": None, "refusal": "I will not."}
        elif fault == "echo":
            value["choices"][0]["message"]["content"] = f"your key is {key}"
        data = json.dumps(value).encode()
        if fault == "cut":
            to.send(200, data[: len(data) // 2], length=len(data))
            to.close_connection = True
        elif fault == "drip":
            to.send(200, b"", length=len(data))
            self._drip(to, data)
        elif fault == "gzip":
            to.send(200, data, encoding="gzip")
        else:
            to.send(200, data)

    def _refuse(self, to: _Handler, fault: str) -> None:
        status, _, rest = fault.partition(" ")
        headers = {}
        if rest.startswith("after"):
            wait = rest.removeprefix("after ")
            headers["Retry-After"] = (
                formatdate(time.time(), usegmt=True) if wait == "date" else wait
            )
        elif rest.startswith("to "):
            headers["Location"] = rest.removeprefix("to ")
        message = {"error": {"message": f"no: {rest}", "code": rest or None}}
        data = rest if rest.startswith("{") else json.dumps(message)
        to.send(int(status), data.encode(), headers=headers)

    def _drip(self, to: _Handler, data: bytes) -> None:
        to.close_connection = True
        for byte in data:
            if self._over.wait(0.05):
                return
            to.wfile.write(bytes([byte]))
            to.wfile.flush()

    @contextmanager
    def running(self) -> Iterator[ScriptedServer]:
        """Serve on a free port of loopback."""

        class Handler(_Handler):
            script = self

        server = _Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            server.shutdown()
            server.server_close()


class _Quiet(ThreadingHTTPServer):
    """Clients that hang up are expected."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: ScriptedServer

    def do_POST(self) -> None:
        self.script.handle(self)

    def send(
        self,
        status: int,
        body: bytes,
        kind: str = "application/json",
        length: int | None = None,
        encoding: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if encoding:
            self.send_header("Content-Encoding", encoding)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: Any) -> None:
        pass
