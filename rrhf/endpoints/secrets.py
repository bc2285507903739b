"""Keeps the keys of servers out of everything that is printed, logged or written.

A key is read from its environment variable, handed to the `openai` client, and replaced in whatever
comes back from a server before anything else sees it: some servers repeat the key in their errors.
"""

from __future__ import annotations

import json
import os
from typing import Any
from urllib.parse import quote, urlsplit

from rrhf.endpoints.settings import EndpointSettings, host_of, is_loopback
from rrhf.errors import UserError

NO_KEY = "none"
MIN_SECRET_LETTERS = 8
"""Shorter keys are placeholders, such as EMPTY; replacing them would damage texts."""
REPLACEMENT = "[key]"


def read_keys(settings: EndpointSettings) -> list[str]:
    """Return the key of each server.

    Raises:
        UserError: a variable is not set, or a key would travel unencrypted to another machine.
    """
    keys = []
    for url, variable in zip(settings.base_url, settings.key_variables(), strict=True):
        key = os.environ.get(variable, "").strip() if variable else NO_KEY
        if not key:
            raise UserError(
                f"{variable}: is not set; the server {url} needs a key in this environment "
                "variable, or in another one that --api_key_env names"
            )
        if not key.isascii() or not key.isprintable():
            raise UserError(f"{variable}: holds letters that no key has; set it again")
        if variable and urlsplit(url).scheme == "http" and not is_loopback(url):
            raise UserError(
                f"--base_url {url}: the key in {variable} would travel to {host_of(url)} "
                "unencrypted; use https"
            )
        keys.append(key)
    return keys


def forms_of(secret: str) -> set[str]:
    """Return a key as it is, and as JSON and addresses may hold it."""
    escaped = json.dumps(secret)[1:-1]
    return {secret, escaped, escaped.replace("/", "\\/"), quote(secret), quote(secret, safe="")}


class Secrets:
    """Replaces keys in texts, and halves of surrogate pairs, which no file can hold."""

    def __init__(self, keys: list[str]) -> None:
        secret = [forms_of(key) for key in keys if len(key) >= MIN_SECRET_LETTERS]
        self._keys = sorted(set().union(*secret), key=len, reverse=True)

    def redacted(self, value: Any) -> Any:
        """Return a text, or a parsed JSON value, with every key replaced."""
        if isinstance(value, str):
            for key in self._keys:
                value = value.replace(key, REPLACEMENT)
            return value.encode("utf-8", "replace").decode()
        if isinstance(value, dict):
            return {self.redacted(name): self.redacted(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self.redacted(item) for item in value]
        return value
