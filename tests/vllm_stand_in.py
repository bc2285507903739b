"""A server that speaks as vLLM does, with a real tiny model in it, faulty on demand.

It keeps the keys and values of the prompts that it has read, as vLLM does, so that a cache that is
not reset really makes wrong log-probs. As a program: a model folder and a port, until it is killed.
"""

from __future__ import annotations

import contextlib
import copy
import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from rrhf.models.loading import load_causal_lm

WINDOW = 128


class StandIn:
    """A server on a port that the system chooses, until `kill`; `start` brings it back.

    Attributes:
        faults: what is wrong now: tied, cache, skip, processed (the negative controls); hang, drip,
            error, html, fewer, model, null (an answer to completions); cut (the body is).
        seen: requests by path.
        on_completion: called before each sampled answer with the number of those so far.
    """

    def __init__(self, root: Path, port: int = 0, takes_weights: bool = True) -> None:
        self.root, self.port, self.takes_weights = root, port, takes_weights
        self.window, self.dtype = WINDOW, "torch.float32"
        self.faults: set[str] = set()
        self.seen: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.on_completion: Callable[[int], None] = lambda number: None
        self._lock = threading.Lock()
        self.runs = threading.Event()  # cleared while it is paused
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Serve the weights of `root`, whatever was loaded before."""
        self.model = load_causal_lm(self.root)
        self.instance, self.cache = str(time.time_ns()), dict[tuple[int, ...], Any]()
        self._live: set[socket.socket] = set()
        self.runs.set()
        outer = self

        class Handler(_Handler):
            owner = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def kill(self) -> None:
        """Close every connection and stop answering, as SIGKILL does."""
        self._server.shutdown()
        self._server.server_close()
        for one in list(self._live):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    # What it answers.

    def models(self) -> dict[str, Any]:
        served = {"id": str(self.root), "root": str(self.root), "max_model_len": self.window}
        return {"object": "list", "data": [served]}

    def info(self) -> dict[str, Any]:
        config = {"instance_id": self.instance, "model_config": {"dtype": self.dtype}}
        return {"vllm_config": config}

    def reload(self, folder: str) -> None:
        if "skip" in self.faults:
            return
        with self._lock:
            head = self.model.lm_head.weight
            self.model = load_causal_lm(folder)
            if "tied" in self.faults:
                self.model.lm_head.weight = head

    def reset(self) -> None:
        if "cache" not in self.faults:
            self.cache.clear()

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for ids in body["prompt"]:
            for number in range(body["n"]):
                with self._lock:
                    choice = self._choice(ids, number, body)
                choices.append({"index": len(choices), "prompt_token_ids": ids, **choice})
        if "fewer" in self.faults:
            choices = choices[:-1]
        if "null" in self.faults:
            choices[0]["token_ids"] = None
        name = "another" if "model" in self.faults else body["model"]
        return {"object": "text_completion", "model": name, "choices": choices}

    def _choice(self, ids: list[int], number: int, body: dict[str, Any]) -> dict[str, Any]:
        if "prompt_logprobs" in body:  # such a request does not read the cache
            logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            found = [
                {str(token): {"logprob": float(row[token])}}
                for row, token in zip(logprobs, ids[1:], strict=False)
            ]
            return {"prompt_logprobs": [None, *found], "finish_reason": "length"}
        key = tuple(ids[:-1])
        if key not in self.cache:
            self.cache[key] = self.model(torch.tensor([ids[:-1]]), use_cache=True).past_key_values
        past, token = copy.deepcopy(self.cache[key]), ids[-1]
        generator = torch.Generator().manual_seed((body.get("seed", 0) + number) % (1 << 63))
        kept: list[int] = []
        logprobs_kept: list[float] = []
        while len(kept) < body["max_tokens"]:
            out = self.model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
            logits, past = out.logits[0, -1].float(), out.past_key_values
            shaped = _shaped(logits, body, kept)
            token = int(
                torch.multinomial(shaped.softmax(-1), 1, generator=generator)
                if body["temperature"]
                else shaped.argmax()
            )
            kept.append(token)
            reported = shaped if "processed" in self.faults else logits
            logprobs_kept.append(float(reported.log_softmax(-1)[token]))
            if token in body.get("stop_token_ids", ()):
                break
        end = "stop" if kept[-1] in body.get("stop_token_ids", ()) else "length"
        return {
            "token_ids": kept,
            "logprobs": {"token_logprobs": logprobs_kept},
            "finish_reason": end,
        }


def _shaped(logits: torch.Tensor, body: dict[str, Any], kept: list[int]) -> torch.Tensor:
    shaped = logits / (body["temperature"] or 1.0)
    if len(kept) < body.get("min_tokens", 0):
        shaped[list(body["stop_token_ids"])] = -torch.inf
    if top_k := body.get("top_k"):
        shaped[shaped < shaped.topk(top_k).values[-1]] = -torch.inf
    return shaped


class _Handler(BaseHTTPRequestHandler):
    owner: StandIn

    def log_message(self, format: str, *args: Any) -> None: ...

    def handle(self) -> None:
        self.owner._live.add(self.connection)
        with contextlib.suppress(OSError, RuntimeError):
            super().handle()
        self.owner._live.discard(self.connection)

    def do_GET(self) -> None:
        owner, path = self.owner, self.path.partition("?")[0]
        owner.seen[path] += 1
        if path == "/v1/models":
            self.answer(owner.models())
        elif path == "/server_info" and owner.takes_weights:
            self.answer(owner.info())
        else:
            self.answer({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        owner, path = self.owner, self.path.partition("?")[0]
        owner.seen[path] += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if path == "/collective_rpc":
            owner.reload(body["kwargs"]["weights_path"])
            self.answer({"results": [None]})
        elif path == "/reset_prefix_cache":
            owner.reset()
            self.answer({"success": True})
        elif path in ("/pause", "/resume"):
            (owner.runs.clear if path == "/pause" else owner.runs.set)()
            self.answer({"status": path})
        elif not owner.runs.wait(30):
            self.answer({"error": "paused"}, 500)
        elif "prompt_logprobs" in body or (body["max_tokens"] == 8 and body["n"] == 1):
            self.answer(owner.complete(body))  # a canary
        else:
            owner.seen["sampled"] += 1
            owner.bodies.append(body)
            owner.on_completion(owner.seen["sampled"])
            self.answer_completion(body)

    def answer_completion(self, body: dict[str, Any]) -> None:
        faults = self.owner.faults
        if "hang" in faults:
            time.sleep(30)
        if "error" in faults:
            return self.answer({"error": "engine died"}, 500)
        if "html" in faults:
            return self.send(200, b"<html>busy</html>")
        if "long" in faults and len(body["prompt"][0]) > 3:
            return self.answer({"error": "This model's maximum context length"}, 400)
        self.answer(self.owner.complete(body))

    def answer(self, value: dict[str, Any], status: int = 200) -> None:
        self.send(status, json.dumps(value).encode())

    def send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if "cut" in self.owner.faults:
            self.close_connection = True
            return
        drips = "drip" in self.owner.faults and self.path == "/v1/completions"
        for start in range(0, len(content), 1) if drips else [0]:
            self.wfile.write(content[start : start + 1] if drips else content)
            if drips:
                self.wfile.flush()
                time.sleep(0.05)


@contextlib.contextmanager
def stand_in(root: Path, **settings: Any) -> Iterator[StandIn]:
    """A stand-in that is killed at the end."""
    server = StandIn(root, **settings)
    try:
        yield server
    finally:
        server.kill()


if __name__ == "__main__":
    torch.set_num_threads(1)
    StandIn(Path(sys.argv[1]), int(sys.argv[2]))
    time.sleep(600)
