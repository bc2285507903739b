"""The settings of a client for OpenAI-compatible servers; they become flags where one is used."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from rrhf.errors import UserError
from rrhf.ranges import COUNT, INDEX, NOT_NEGATIVE, POSITIVE, Ranged

COMPANY_URL = "https://api.openai.com/v1"
COMPANY_KEY = "OPENAI_API_KEY"
Api = Literal["chat", "completions"]

_KEY_LETTERS = 16  # a name so long has underscores
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


def host_of(base_url: str) -> str:
    """Return the host of a server's address, without its port."""
    return urlsplit(base_url).hostname or ""


def is_loopback(base_url: str) -> bool:
    """Whether an address belongs to this machine; names other than localhost do not count."""
    host = host_of(base_url)
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(kw_only=True)
class EndpointSettings(Ranged):
    """How OpenAI-compatible servers are asked, and what that may cost."""

    base_url: tuple[str, ...] = (COMPANY_URL,)
    """Address of the server, such as http://127.0.0.1:8000/v1; several share the work. All must
    serve the same model."""
    api_key_env: tuple[str, ...] = ()
    """Environment variable that holds the server's key. One for each base_url or one for all; empty
    = OPENAI_API_KEY for the company's own server, no key for others."""
    send_prompts_to: tuple[str, ...] = ()
    """Other machines that prompts may be sent to, such as api.openai.com."""
    api: Api = "chat"
    """chat = send messages; completions = send the prompt's text as it is. With chat, the server
    applies its chat template."""
    dry_run: bool = False
    """Send nothing; print how many requests, tokens and costs to expect."""
    max_requests: int = 0
    """Stop before sending more requests than this; 0 = no limit. Limits hold over all runs of a
    command, and for requests that are on their way."""
    max_total_tokens: int = 0
    """Stop before prompts and responses could have more tokens than this in all; 0 = no limit."""
    max_cost: float = 0.0
    """Stop before the cost could exceed this; 0 = no limit. In the currency of the prices."""
    input_token_price: float | None = None
    """Price of a million tokens of prompts."""
    output_token_price: float | None = None
    """Price of a million tokens of responses."""
    concurrency: int = 8
    """Number of requests that a server answers at a time."""
    requests_per_minute: int = 0
    """Send each server at most this many requests a minute; 0 = no limit."""
    tokens_per_minute: int = 0
    """Send each server requests of at most this many tokens a minute; 0 = no limit."""
    request_timeout_seconds: float = 300.0
    """A request fails if its whole response has not arrived after this many seconds."""
    max_retries: int = 10
    """How often a failed request is sent again."""
    retry_wait_seconds: float = 1.0
    """Wait before the first repetition; doubled each time, up to a minute, unless the server names
    a time (Retry-After)."""
    max_failed_requests: int = 0
    """Go on after this many requests of a run have failed for good; each is recorded with its
    reason and never used as a response."""
    max_response_bytes: int = 8 << 20
    """A longer response of the server is a failure."""
    max_samples_per_request: int = 0
    """Ask for at most this many responses at once (n); 0 = for as many as the server gives."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Name under which the server takes the maximum length of a response."""
    served_model: str = ""
    """Name under which the server answers, if it is not the name asked for, alone or with a date or
    a revision."""
    straggler_factor: float = 4.0
    """With several servers: send a request to another server too once it takes this many times the
    median; the first answer counts, and both are paid for. 0 = never."""

    RANGES: ClassVar = {
        "max_requests": INDEX,
        "max_total_tokens": INDEX,
        "max_cost": NOT_NEGATIVE,
        "input_token_price": NOT_NEGATIVE,
        "output_token_price": NOT_NEGATIVE,
        "concurrency": COUNT,
        "requests_per_minute": INDEX,
        "tokens_per_minute": INDEX,
        "request_timeout_seconds": POSITIVE,
        "max_retries": INDEX,
        "retry_wait_seconds": NOT_NEGATIVE,
        "max_failed_requests": INDEX,
        "max_response_bytes": COUNT,
        "max_samples_per_request": INDEX,
        "straggler_factor": "0 or [1, inf)",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.base_url = tuple(url.rstrip("/") for url in self.base_url)
        self.api_key_env, self.send_prompts_to = (
            tuple(self.api_key_env),
            tuple(self.send_prompts_to),
        )
        if not self.base_url:
            raise UserError("--base_url: names no server; give its address")
        for url in self.base_url:
            _check_url(url)
        if len(set(self.base_url)) < len(self.base_url):
            raise UserError("--base_url: names a server twice; raise --concurrency instead")
        for name in self.api_key_env:
            # The value may be a key, so it is not shown.
            if not _VARIABLE.fullmatch(name) or ("_" not in name and len(name) >= _KEY_LETTERS):
                raise UserError(
                    "--api_key_env: is not the name of an environment variable in capital letters; "
                    "put the key into a variable, and give the variable's name"
                )
        if len(self.api_key_env) not in (0, 1, len(self.base_url)):
            raise UserError(
                f"--api_key_env: names {len(self.api_key_env)} variables for "
                f"{len(self.base_url)} servers; give one for all, or one for each"
            )
        if self.max_cost and None in (self.input_token_price, self.output_token_price):
            raise UserError(
                f"--max_cost {self.max_cost}: needs --input_token_price and --output_token_price, "
                "the prices of a million tokens, 0 where there is none"
            )
        self._require_consent()

    def _require_consent(self) -> None:
        """Refuse servers on other machines that `send_prompts_to` does not name."""
        away = [host_of(url) for url in self.base_url if not is_loopback(url)]
        if missing := [host for host in away if host not in self.send_prompts_to]:
            hosts = " ".join(dict.fromkeys([*self.send_prompts_to, *missing]))
            raise UserError(
                f"--base_url: {', '.join(missing)} is not this machine, and every prompt would be "
                f"sent there; if you want that, add --send_prompts_to {hosts}"
            )

    def key_variables(self) -> list[str]:
        """Return the environment variable of each server's key; "" = the server takes no key."""
        if len(self.api_key_env) == 1:
            return list(self.api_key_env) * len(self.base_url)
        if self.api_key_env:
            return list(self.api_key_env)
        company = host_of(COMPANY_URL)
        return [COMPANY_KEY if host_of(url) == company else "" for url in self.base_url]

    def cost(self, input_tokens: float, output_tokens: float) -> float:
        """Return the price of so many tokens."""
        of_input, of_output = self.input_token_price or 0.0, self.output_token_price or 0.0
        return (input_tokens * of_input + output_tokens * of_output) / 1e6


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise UserError("--base_url: is not an address such as http://127.0.0.1:8000/v1") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"--base_url: an address at {parts.hostname} holds more than host, port and path; name "
            "the variable of a key with --api_key_env"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--base_url {url}: is not an address such as http://127.0.0.1:8000/v1")
