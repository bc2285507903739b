"""Sends JSON to a server and reads its JSON answer, within limits of time and size.

Redirects are not followed, proxies not used, and compressed answers refused. Standard library only.
"""

from __future__ import annotations

import http.client
import itertools
import json
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from rrhf.endpoints.secrets import forms_of
from rrhf.errors import UserError
from rrhf.scoring.http.addresses import Address, Resolver, resolved

logger = logging.getLogger(__name__)

BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Statuses after which the same request may succeed."""
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
_CHUNK = 1 << 16
_SAID_BYTES = 2000


class Busy(Exception):
    """A failure after which the same request may succeed.

    Attributes:
        wait: how many seconds the server asks to wait; None if it does not say.
    """

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class JsonClient:
    """Posts JSON to one address.

    Args:
        address: where to.
        token_env: environment variable with the token that is sent as `Authorization: Bearer`;
            "" = none.
        resolver: finds the host's addresses; None = as the system does.

    Raises:
        UserError: the variable is not set, or the token would be sent unencrypted.
    """

    def __init__(
        self, address: Address, token_env: str = "", resolver: Resolver | None = None
    ) -> None:
        self.address = address
        self._resolver = resolver
        self._ips: list[str] | None = None
        self._token = ""
        if token_env:
            self._token = os.environ.get(token_env, "").strip()
            if not self._token:
                raise UserError(
                    f"{address.url}: the environment variable {token_env}, which should hold the "
                    "server's token, is not set"
                )
            if not self._token.isascii() or not self._token.isprintable():
                raise UserError(
                    f"{token_env}: holds a character that a token cannot have; set it again"
                )
            if address.scheme == "http" and not address.is_own:
                raise UserError(
                    f"{address.url}: the token in {token_env} would be sent to {address.host} "
                    "unencrypted; use https"
                )

    def redacted(self, text: str) -> str:
        """Replace the token in a text that came from the server; call it before cutting the text,
        since a part of the token is not found."""
        for form in sorted(forms_of(self._token), key=len, reverse=True) if self._token else ():
            text = text.replace(form, "[token]")
        return text

    def _redacted_json(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.redacted(value)
        if isinstance(value, list):
            return [self._redacted_json(item) for item in value]
        if isinstance(value, dict):
            return {self.redacted(key): self._redacted_json(item) for key, item in value.items()}
        return value

    def post(self, body: Any, max_bytes: int, seconds: float, retries: bool = True) -> Any:
        """Send a value and return the answer.

        Args:
            body: any JSON value.
            max_bytes: a longer answer is refused.
            seconds: time for everything together: connecting, waiting, repeating, reading.
            retries: repeat the request while the server is away or busy.

        Raises:
            UserError: the server does not answer in time, or not as it should.
        """
        deadline = time.monotonic() + seconds
        data = json.dumps(body, allow_nan=False).encode()
        wait = _FIRST_WAIT
        for attempt in itertools.count(1):
            try:
                return self._sent(data, max_bytes, deadline)
            except Busy as error:
                pause = wait if error.wait is None else max(error.wait, _FIRST_WAIT)
                left = deadline - time.monotonic()
                if not retries or left <= pause:
                    raise UserError(
                        f"{self.address.url}: does not answer: {error} (attempt {attempt}, limit "
                        f"{seconds:g} seconds); check that the server is running"
                    ) from None
                logger.warning("%s: %s; trying again", self.address.url, error)
                time.sleep(pause)
                wait = min(2 * wait, _LONGEST_WAIT)
        raise AssertionError("the loop ends by returning or raising")

    def _sent(self, data: bytes, max_bytes: int, deadline: float) -> Any:
        if self._ips is None:
            self._ips = resolved(self.address, self._resolver)
        left = deadline - time.monotonic()
        if left <= 0:
            raise Busy("no time is left")
        connection = _Connection(self.address, self._ips, left)
        timer = threading.Timer(left, connection.cut)
        timer.daemon = True
        timer.start()
        headers = {
            "Host": self.address.authority,
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Connection": "close",
            **({"Authorization": f"Bearer {self._token}"} if self._token else {}),
        }
        try:
            connection.request("POST", self.address.path, data, headers)
            self._ips = connection.ips
            response = connection.getresponse()
            self._check_status(response)
            content = self._content(response, max_bytes)
            if connection.was_cut:
                raise OSError("no answer in time")
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, UserError):
                raise
            if isinstance(error, ssl.SSLCertVerificationError):
                self._refuse(f"its certificate is not valid ({error.verify_message})")
            said = "no answer in time" if connection.was_cut else str(error) or type(error).__name__
            raise Busy(self.redacted(said)) from error
        finally:
            timer.cancel()
            connection.close()
        return self._parsed(content)

    def _check_status(self, response: http.client.HTTPResponse) -> None:
        status = response.status
        if status == 200:
            return
        content = response.read(_SAID_BYTES + len(self._token))
        said = self.redacted(content.decode("utf-8", "replace"))
        if len(content) > _SAID_BYTES:  # it may end within the token
            said = said[: len(said) - len(self._token)]
        said = " ".join(said.split())[:300]
        told = f"status {status} {response.reason}{': ' if said else ''}{said}"
        if status in BUSY:
            after = response.headers.get("Retry-After", "")
            raise Busy(self.redacted(told), float(after) if after.isdecimal() else None)
        if 300 <= status < 400:
            self._refuse(f"redirects (status {status}), which is not followed; name the final URL")
        if status in (401, 403):
            self._refuse(f"{told}; check the token, #token_env=NAME names its variable")
        self._refuse(told)

    def _content(self, response: http.client.HTTPResponse, max_bytes: int) -> bytes:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            self._refuse("the answer is compressed, which was not asked for")
        if (response.length or 0) > max_bytes:
            self._refuse(f"the answer has {response.length} bytes, more than {max_bytes}")
        content = b""
        while part := response.read(min(_CHUNK, max_bytes + 1 - len(content))):
            content += part
            if len(content) > max_bytes:
                self._refuse(f"the answer has more than {max_bytes} bytes")
        if response.length:
            raise OSError(f"the answer ended {response.length} bytes early")
        return content

    def _parsed(self, content: bytes) -> Any:
        def refuse_constant(name: str) -> NoReturn:
            self._refuse(f"the answer holds {name}, which is no number; use null")

        try:
            answer = json.loads(content, parse_constant=refuse_constant)
            return self._redacted_json(answer) if self._token else answer
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            begin = self.redacted(content.decode("utf-8", "replace"))[:200]
            self._refuse(f"the answer is not JSON ({error}): {begin!r}")

    def _refuse(self, why: str) -> NoReturn:
        raise UserError(f"{self.address.url}: {self.redacted(why)}")


class _Connection(http.client.HTTPConnection):
    """Connects to IP addresses that were checked before, and can be cut off at any moment.

    Attributes:
        ips: the addresses, tried in this order; after connecting, the one that answered.
    """

    def __init__(self, address: Address, ips: Sequence[str], seconds: float) -> None:
        super().__init__(address.host, address.port, timeout=seconds)
        self._address, self._seconds, self.ips = address, seconds, list(ips)
        self._raw: socket.socket | None = None
        self.was_cut = False

    def connect(self) -> None:
        for ip in list(self.ips):
            try:
                self._raw = socket.create_connection(
                    (ip, self._address.port), self._seconds / len(self.ips)
                )
            except OSError as error:
                failed = error
            else:
                self.ips = [ip]
                break
        else:
            raise failed
        self._raw.settimeout(self._seconds)
        self.sock = self._raw
        if self._address.scheme == "https":
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self._raw, server_hostname=self._address.host)

    def cut(self) -> None:
        """End the connection from another thread."""
        self.was_cut = True
        for sock in (self.sock, self._raw):
            try:
                if sock is not None:
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                continue
