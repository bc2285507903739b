"""Answers requests for scores over HTTP: `rrhf serve-reward`.

Requests and answers have the forms of `rrhf.scoring.http.wire`, at any path. Threads read requests
and send answers; the main thread scores one request after the other, in the order in which they
were read, so that a model is used by one at a time and a signal lets the running request finish.

A browser must not be able to ask: requests with an Origin header, or for another host than this
machine (unless a token is required), are refused, and so are bodies that are not declared as JSON.
Standard library only.
"""

from __future__ import annotations

import hmac
import json
import logging
import math
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rrhf.errors import UserError
from rrhf.records import CandidateSet
from rrhf.scoring.http.server_config import ServeRewardConfig
from rrhf.scoring.http.wire import Malformed, Scored, decode_request, encode_answer
from rrhf.scoring.scorer import Scorer
from rrhf.signals import StopRequest

logger = logging.getLogger(__name__)

_OWN_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_POLL_SECONDS = 0.1
_READ_SECONDS, _CLOSE_SECONDS = 60.0, 5.0
_MAX_WAITING = 64


class _Refused(Exception):
    """A request that is not answered with scores."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class _Job:
    """A request that waits for its scores."""

    sets: Sequence[CandidateSet]
    is_done: threading.Event = field(default_factory=threading.Event)
    scored: Scored | None = None
    refused: _Refused | None = None


class RewardServer(ThreadingHTTPServer):
    """Listens at an address; `serve` answers.

    Args:
        config: the settings.

    Raises:
        UserError: the address is taken or not this machine's, or the token's variable is not set.
    """

    daemon_threads = True
    request_queue_size = _MAX_WAITING

    def __init__(self, config: ServeRewardConfig) -> None:
        self.config = config
        self.token = os.environ.get(config.token_env, "").strip() if config.token_env else ""
        if config.token_env and not self.token:
            raise UserError(f"--token_env {config.token_env}: this variable is not set")
        self.jobs: queue.Queue[_Job] = queue.Queue(_MAX_WAITING)
        self.is_stopping = False
        self._num_open = 0
        self._lock = threading.Lock()
        self.address_family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        try:
            super().__init__((config.host, config.port), _Handler)
        except OSError as error:
            raise UserError(
                f"--host {config.host} --port {config.port}: cannot listen there "
                f"({error.strerror or error}); choose another port, or 0 for a free one"
            ) from error

    @property
    def url(self) -> str:
        """Where scores are to be had."""
        return f"http://{self.own_host}:{self.server_address[1]}/score"

    @property
    def own_host(self) -> str:
        """The host that is listened at, as URLs have it."""
        return f"[{self.config.host}]" if ":" in self.config.host else self.config.host.lower()

    def serve(self, scorer: Scorer, stop: StopRequest) -> None:
        """Answer requests until a signal comes; the request that is being scored is finished."""
        threading.Thread(target=self.serve_forever, args=(_POLL_SECONDS,), daemon=True).start()
        try:
            while stop.received is None:
                try:
                    job = self.jobs.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    continue
                _score(scorer, job)
        finally:
            self.is_stopping = True
            self.shutdown()
            while not self.jobs.empty():
                job = self.jobs.get()
                job.refused = _Refused(503, "the server is stopping")
                job.is_done.set()
            deadline = time.monotonic() + _CLOSE_SECONDS
            while self._num_open and time.monotonic() < deadline:
                time.sleep(0.01)
            self.server_close()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one connection, and count those that are open."""
        with self._lock:
            self._num_open += 1
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._num_open -= 1

    def scored(self, sets: Sequence[CandidateSet]) -> Scored:
        """Let the main thread score the sets; called by the threads of requests."""
        job = _Job(sets)
        try:
            self.jobs.put_nowait(job)
        except queue.Full:
            raise _Refused(503, f"{_MAX_WAITING} requests are waiting; ask again later") from None
        while not job.is_done.wait(_POLL_SECONDS):
            if self.is_stopping and not job.is_done.wait(_POLL_SECONDS):
                raise _Refused(503, "the server is stopping")
        if job.refused is not None:
            raise job.refused
        assert job.scored is not None, "a job is done with scores or refused"
        return job.scored

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a connection that broke off."""
        logger.warning("a connection broke off", exc_info=logger.isEnabledFor(logging.DEBUG))


def _score(scorer: Scorer, job: _Job) -> None:
    started = time.monotonic()
    try:
        found = scorer.score(job.sets)
        scores = [[_finite_or_none(score) for score in row] for row in found]
        too_long = [
            [
                score is None and not scorer.fits(s, c)
                for c, score in zip(s.candidates, row, strict=True)
            ]
            for s, row in zip(job.sets, scores, strict=True)
        ]
        job.scored = Scored(scores, too_long)
        count = sum(map(len, scores))
        logger.info("%d responses scored in %.3f seconds", count, time.monotonic() - started)
    except UserError as error:
        logger.error("%s", error)
        job.refused = _Refused(422, str(error))
    except Exception as error:
        logger.exception("the scorer failed")
        job.refused = _Refused(500, f"the scorer failed: {type(error).__name__}")
    finally:
        job.is_done.set()


def _finite_or_none(score: float | None) -> float | None:
    return None if score is None or not math.isfinite(score) else float(score)


class _Handler(BaseHTTPRequestHandler):
    """Reads one request and sends its answer."""

    server: RewardServer
    server_version, sys_version = "rrhf", ""
    timeout = 30  # of one read

    def do_GET(self) -> None:
        self._answered(self._health)

    def do_POST(self) -> None:
        self._answered(self._scores)

    def _answered(self, answer: Callable[[], dict[str, Any]]) -> None:
        try:
            self._check_sender()
            status, body = 200, answer()
        except _Refused as refused:
            status, body = refused.status, {"error": str(refused)}
        data = json.dumps(body, allow_nan=False).encode()
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        if status == 503:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(data)

    def _check_sender(self) -> None:
        """Refuse browsers, and those without the token."""
        if self.headers.get("Origin") is not None:
            raise _Refused(403, "requests of web pages are not answered")
        if self.server.token:
            given = self.headers.get("Authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
                raise _Refused(401, "the token is missing or wrong (Authorization: Bearer ...)")
        elif _host(self.headers.get("Host", "")) not in (*_OWN_HOSTS, self.server.own_host):
            raise _Refused(403, "this server answers requests for this machine only")

    def _health(self) -> dict[str, Any]:
        if self.path != "/health":
            raise _Refused(404, "GET /health, or POST a request for scores")
        return {"status": "ok"}

    def _scores(self) -> dict[str, Any]:
        try:
            form, sets = decode_request(json.loads(self._body()))
        except Malformed as error:
            raise _Refused(400, str(error)) from error
        except (ValueError, RecursionError) as error:
            raise _Refused(400, f"the request is not JSON ({error})") from error
        return encode_answer(form, self.server.scored(sets))

    def _body(self) -> bytes:
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise _Refused(415, "the Content-Type must be application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(411, "the Content-Length is missing")
        size, most = int(length), self.server.config.max_request_megabytes * 1_000_000
        if size > most:
            raise _Refused(413, f"the request has {size} bytes, more than {most}")
        deadline, body = time.monotonic() + _READ_SECONDS, b""
        while len(body) < size:
            try:
                part = self.rfile.read1(size - len(body))
            except OSError as error:
                raise _Refused(408, "the request did not arrive in time") from error
            if not part or time.monotonic() > deadline:
                raise _Refused(400 if not part else 408, "the request did not arrive whole")
            body += part
        return body

    def log_message(self, format: str, *args: Any) -> None:
        """Log requests at the level for details; a token is in no request line."""
        logger.debug("%s %s", self.address_string(), format % args)


def _host(header: str) -> str:
    """Return the host of a Host header, without its port."""
    host, colon, port = header.strip().lower().rpartition(":")
    return host if colon and port.isdecimal() else header.strip().lower()
