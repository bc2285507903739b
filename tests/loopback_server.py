"""A server on loopback whose answers a test decides, request by request."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Asked:
    """A request as the server got it."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Reply:
    """What the server answers. `body` is sent as JSON unless it is bytes; `length` is the
    Content-Length, if another than the body's; `drip` is the time between two bytes."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    drip: float = 0.0


@dataclass
class Loopback:
    """The running server: where it is, and what it was asked."""

    port: int
    asked: list[Asked]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def loopback(
    answer: Callable[[Asked], Reply], tls: ssl.SSLContext | None = None
) -> Iterator[Loopback]:
    """Run the server while the block runs; `tls` makes it speak https."""
    asked: list[Asked] = []

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            one = Asked(self.command, self.path, dict(self.headers), json.loads(data or b"null"))
            asked.append(one)
            reply = answer(one)
            body = reply.body
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(reply.status)
            length = len(content) if reply.length is None else reply.length
            for key, value in {"Content-Length": str(length), **reply.headers}.items():
                self.send_header(key, value)
            self.end_headers()
            try:
                for byte in content if reply.drip else ():
                    time.sleep(reply.drip)
                    self.wfile.write(bytes([byte]))
                self.wfile.write(b"" if reply.drip else content)
            except OSError:
                return
            self.close_connection = True

        do_GET = do_POST

        def log_message(self, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Loopback(server.server_address[1], asked)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
