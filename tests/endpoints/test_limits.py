"""Rates, waits and the settings of endpoints, without a server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rrhf.endpoints.limits import Pauses, Rate, backoff_seconds, retry_after_seconds
from rrhf.endpoints.replies import is_model, parse_body, read_reply
from rrhf.endpoints.secrets import Secrets, read_keys
from rrhf.endpoints.settings import EndpointSettings, is_loopback
from rrhf.errors import UserError

LOCAL = "http://127.0.0.1:8000/v1"


def test_no_minute_has_more_than_its_limit() -> None:
    rate, now, sent = Rate(10), 0.0, []
    amounts = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]
    for amount in amounts:
        now += rate.wait(amount, now) + 0.5
        assert rate.wait(amount, now) == 0
        rate.take(amount, now)
        sent.append((now, amount))
    for start, _ in sent:
        assert sum(amount for at, amount in sent if start <= at < start + 60) <= 10
    assert now < 60 * sum(amounts) / 5  # and it is not needlessly slow


def test_a_rate_says_how_long_to_wait() -> None:
    rate = Rate(10)
    assert rate.wait(99, 0.0) == 0  # more than the limit goes alone
    rate.take(4, 0.0)
    rate.take(6, 10.0)
    assert rate.wait(1, 20.0) == 40
    assert rate.wait(5, 20.0) == 50
    assert rate.wait(99, 20.0) == 50
    assert rate.wait(4, 60.0) == 0
    assert Rate(0).wait(10**9, 0.0) == 0


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(header, now=10.0) == seconds


def test_waits_double_within_bounds_and_start_again_after_an_answer() -> None:
    for failures, most in ((1, 2.0), (2, 4.0), (3, 8.0), (99, 60.0)):
        waits = [backoff_seconds(2.0, failures) for _ in range(200)]
        assert most / 2 <= min(waits) and max(waits) <= most
        assert max(waits) - min(waits) > most / 4
    pauses = Pauses(2.0)
    pauses.failed(0.0)
    pauses.failed(0.1)  # was sent before: the same failure
    assert 0.9 <= pauses.wait(0.1) <= 2
    pauses.failed(10.0)
    assert 2 <= pauses.wait(10.0) <= 4
    pauses.answered()
    pauses.failed(50.0)
    assert 1 <= pauses.wait(50.0) <= 2
    pauses.failed(50.0, 20.0)
    assert pauses.wait(50.0) == 20


@pytest.mark.parametrize(
    ("answered", "asked", "accepted", "is_same"),
    [
        ("gpt-x", "gpt-x", "", True),
        ("gpt-x-2026-08-01", "gpt-x", "", True),
        ("gpt-x-0613", "gpt-x", "", True),
        ("/models/llama@main", "/models/llama", "", True),
        ("llama@main", "llama@v2", "", False),
        ("gpt-x-mini", "gpt-x", "", False),
        ("gpt", "gpt-x", "", False),
        ("gpt-x-2026-08-01", "gpt-x-2026-07-01", "", False),
        ("llama", "llama@main", "llama", True),
        ("", "llama", "", False),
    ],
)
def test_the_model_that_answers(answered: str, asked: str, accepted: str, is_same: bool) -> None:
    assert is_model(answered, asked, accepted) is is_same


@pytest.mark.parametrize(
    ("url", "is_here"),
    [
        (LOCAL, True),
        ("http://localhost/v1", True),
        ("http://[::1]:80/v1", True),
        ("http://127.1.2.3/v1", True),
        ("http://127.0.0.1.evil.com/v1", False),
        ("http://localhost.evil.com/v1", False),
        ("http://10.0.0.1/v1", False),
        ("https://api.openai.com/v1", False),
    ],
)
def test_what_is_this_machine(url: str, is_here: bool) -> None:
    assert is_loopback(url) is is_here


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({}, "add --send_prompts_to api.openai.com"),
        ({"base_url": ()}, "names no server"),
        ({"base_url": ("127.0.0.1:8000",)}, "is not an address"),
        ({"base_url": ("http://127.0.0.1:port/v1",)}, "is not an address"),
        ({"base_url": (LOCAL, LOCAL + "/")}, "names a server twice"),
        ({"base_url": ("http://me:secret@127.0.0.1/v1",)}, "more than host, port and path"),
        ({"base_url": (LOCAL + "?key=secret",)}, "more than host, port and path"),
        ({"base_url": (LOCAL,), "api_key_env": ("sk-secret",)}, "is not the name"),
        ({"base_url": (LOCAL,), "api_key_env": ("AKIA0123456789SECRET",)}, "is not the name"),
        ({"base_url": (LOCAL,), "api_key_env": ("A", "B")}, "2 variables for 1 servers"),
        ({"base_url": (LOCAL,), "max_cost": 1.0}, "needs --input_token_price"),
        (
            {"base_url": (LOCAL,), "max_cost": 1.0, "output_token_price": 1.0},
            "needs --input_token_price",
        ),
        ({"base_url": (LOCAL,), "straggler_factor": 0.5}, "straggler_factor"),
    ],
)
def test_settings_that_are_refused(words: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        EndpointSettings(**words)
    assert told in str(error.value) and "secret" not in str(error.value).lower()


def test_keys_go_only_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "company")
    monkeypatch.setenv("OTHER", " other ")
    company, far = "https://api.openai.com/v1", "https://far.example/v1"
    both = {"base_url": (company, far), "send_prompts_to": ("api.openai.com", "far.example")}
    assert read_keys(EndpointSettings(**both)) == ["company", "none"]
    own = EndpointSettings(**both, api_key_env=("OPENAI_API_KEY", "OTHER"))
    assert read_keys(own) == ["company", "other"]
    for scheme in ("http", "HTTP"):
        plain = {"base_url": (f"{scheme}://far.example/v1",), "send_prompts_to": ("far.example",)}
        with pytest.raises(UserError, match="unencrypted"):
            read_keys(EndpointSettings(**plain, api_key_env=("OTHER",)))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY: is not set"):
        read_keys(EndpointSettings(**both))


def test_a_price_may_be_zero_if_it_is_given() -> None:
    prices = {"input_token_price": 0.0, "output_token_price": 2.0}
    assert EndpointSettings(base_url=(LOCAL,), max_cost=1.0, **prices).cost(9e9, 1e6) == 2.0


@pytest.mark.parametrize(
    "written", ["{}", "sk-canary\\/0123", "sk-canary%2F0123", 'sk-canary/0\\"1', "sk-canary/0%221"]
)
def test_a_key_is_replaced_however_it_is_written(written: str) -> None:
    plain = "sk-canary/0123"
    text = f"<{written.format(plain)}>"
    assert Secrets([plain, 'sk-canary/0"1']).redacted(text) == "<[key]>"


def test_numbers_that_json_does_not_have_are_read_as_missing() -> None:
    value = parse_body(b'{"a": NaN, "b": [-Infinity, 1e999, 0.5]}', Secrets([]))
    assert value == {"a": None, "b": [None, None, 0.5]}


@pytest.mark.parametrize("tokens", [{}, {"completion_tokens": None}, {"completion_tokens": -1}])
def test_usage_without_the_tokens_of_responses_is_not_known(tokens: dict[str, Any]) -> None:
    choice = {"message": {"content": "yes"}, "finish_reason": "stop"}
    value = {"model": "m", "choices": [choice], "usage": {"prompt_tokens": 5, **tokens}}
    assert read_reply(json.loads(json.dumps(value)), "chat", "m", "", LOCAL).usage is None
