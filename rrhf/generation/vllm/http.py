"""JSON requests to a server, with a total deadline, a limit on the answer's size, no redirects.

A failure that a repetition may cure (no connection, a cut or late answer, status 5xx) is a
`ServerFault`; an answer that says the request itself is wrong is a `UserError`. Nothing here
imports torch.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import SplitResult, urlsplit

from rrhf.errors import UserError
from rrhf.generation.engine import EngineFault

_MAX_BYTES = 1 << 28
_MAY_PASS = (408, 425, 429)
"""Statuses below 500 after which the same request may succeed later."""


class ServerFault(EngineFault):
    """The server did not do what was asked, and may do so if asked again."""


class NotServed(UserError):
    """The server has no such address (status 404 or 405)."""


def parse_url(base_url: str) -> SplitResult:
    """Split the address of a server.

    Raises:
        UserError: it is not an address.
    """
    try:
        found = urlsplit(base_url)
        is_address = found.scheme in ("http", "https") and found.hostname and found.port != 0
    except ValueError:  # a port that is no number
        is_address = False
    if "@" in base_url or "?" in base_url or "#" in base_url:  # it may hold a key: not shown
        raise UserError(
            "--base_url: holds more than host, port and path; leave out user, password, and what "
            "follows ? or #"
        )
    if not is_address:
        raise UserError(f"--base_url {base_url}: is not an address such as http://127.0.0.1:8000")
    return found


class JsonServer:
    """Sends requests to one server; may be used by several threads at once.

    Attributes:
        base_url: the server's address.
    """

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self._url = parse_url(base_url)
        self._prefix = self._url.path.rstrip("/").removesuffix("/v1")
        self._open: set[socket.socket] = set()
        self._lock, self._is_closed = threading.Lock(), False

    def get(self, path: str, seconds: float) -> Any:
        """Return the JSON answer to a GET request; errors as in `post`."""
        return self._ask("GET", path, None, seconds)

    def post(self, path: str, body: Any, seconds: float) -> Any:
        """Return the JSON answer to a POST request; None if the answer is empty.

        Args:
            path: of the request, with its leading slash.
            body: sent as JSON.
            seconds: time for the whole request and its answer.

        Raises:
            ServerFault: there is no usable answer, but there may be one later.
            NotServed: the server has no such path.
            UserError: the server refuses the request.
        """
        return self._ask("POST", path, body, seconds)

    @contextmanager
    def hang_up(self) -> Iterator[None]:
        """Context manager: end every request in progress, and take none until it is left; threads
        that ask get a `ServerFault`. Wait for them within it."""
        with self._lock:
            self._is_closed = True
            for one in self._open:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        try:
            yield
        finally:
            self._is_closed = False

    def _ask(self, method: str, path: str, body: Any, seconds: float) -> Any:
        https = self._url.scheme == "https"
        kind = http.client.HTTPSConnection if https else http.client.HTTPConnection
        connection = kind(str(self._url.hostname), self._url.port, timeout=seconds)
        is_late = threading.Event()
        late = f"gave no complete answer within {seconds:g} s"
        try:
            connection.connect()
        except TimeoutError as error:
            raise ServerFault(late) from error
        except OSError as error:
            connection.close()
            raise ServerFault(f"cannot be reached ({error.strerror or error})") from error
        plug = connection.sock
        assert plug is not None, "the connection is open"

        def end() -> None:
            is_late.set()
            with suppress(OSError):
                plug.shutdown(socket.SHUT_RDWR)

        # A timeout of the socket restarts with every byte; this one does not.
        clock = threading.Timer(seconds, end)
        clock.daemon = True
        with self._lock:
            if self._is_closed:  # a request that connected while others were ended
                connection.close()
                raise ServerFault("was not asked, because the others were given up")
            self._open.add(plug)
        clock.start()
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(
                method, self._prefix + path, data, {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            content = answer.read(_MAX_BYTES)
            if answer.read(1):
                raise ServerFault(f"answered more than {_MAX_BYTES} bytes")
            if answer.length and not is_late.is_set():
                raise ServerFault(f"broke the connection {answer.length} bytes before the end")
        except (OSError, http.client.HTTPException) as error:
            timed_out = is_late.is_set() or isinstance(error, TimeoutError)
            why = late if timed_out else f"broke the connection ({error!r})"
            raise ServerFault(why) from error
        finally:
            clock.cancel()
            with self._lock:
                self._open.discard(plug)
            connection.close()
        if is_late.is_set():  # without Content-Length, a connection that ends looks like an end
            raise ServerFault(late)
        return self._read(path, answer.status, content)

    def _read(self, path: str, status: int, content: bytes) -> Any:
        excerpt = content[:300].decode(errors="replace")
        if status >= 500 or status in _MAY_PASS:
            raise ServerFault(f"answered with status {status}: {excerpt}")
        if status != 200:
            kind = NotServed if status in (404, 405) else UserError
            raise kind(
                f"{self.base_url}{path}: answered with status {status}: {excerpt}; check that a "
                "vLLM server runs there (`rrhf engine vllm start --help`)"
            )
        if not content:
            return None
        try:
            return json.loads(content)
        except ValueError as error:
            raise ServerFault(f"answered something that is not JSON: {excerpt}") from error
