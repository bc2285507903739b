"""The client of OpenAI-compatible servers against a server that misbehaves in every way."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
from scripted_server import FAULTS, ScriptedServer, spread

from rrhf.endpoints import asking
from rrhf.endpoints.budget import Budget, Spent
from rrhf.endpoints.client import Client
from rrhf.endpoints.ledger import Ledger
from rrhf.endpoints.questions import Answer, Question
from rrhf.endpoints.secrets import Secrets
from rrhf.endpoints.server import Failure, Server
from rrhf.endpoints.settings import EndpointSettings
from rrhf.errors import NothingSent, UserError

KEY = "sk-canary/0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)


def question(number: int = 0, count: int = 1, **words: Any) -> Question:
    text = f"prompt {number}"
    body = {"model": "teacher", "messages": [{"role": "user", "content": text}], "max_tokens": 8}
    return Question(f"p{number}", body, count, 8, **words)


def settings(*servers: ScriptedServer, **words: Any) -> EndpointSettings:
    urls = tuple(server.url for server in servers)
    plain = {"api_key_env": ("TEACHER_KEY",), "retry_wait_seconds": 0.01}
    return EndpointSettings(base_url=urls, **plain | {"request_timeout_seconds": 0.6} | words)


class Memory(list[dict[str, Any]]):
    """A journal in memory."""

    def rows(self) -> list[dict[str, Any]]:
        return list(self)


def asked(client: Client, *questions: Question) -> dict[str, Answer]:
    found: dict[str, Answer] = {}
    for answer in client.ask(questions):
        assert answer.question.id not in found, "a prompt is answered once"
        found[answer.question.id] = answer
    return found


def texts(answers: dict[str, Answer]) -> dict[str, list[str]]:
    return {name: [one.text for one in answer.choices] for name, answer in answers.items()}


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_fault_the_prompt_is_asked_again_and_answered_once(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    journal = Memory()
    with ScriptedServer([fault]).running() as server:
        client = Client(settings(server), journal)
        started = time.monotonic()
        answers = asked(client, question(), question(1))
        assert time.monotonic() - started < 5
        assert {len(one) for one in texts(answers).values()} == {1}
        assert all(
            t.endswith(name.replace("p", "prompt ")) for name, (t,) in texts(answers).items()
        )
        assert len(server.bodies) == 3
        assert client.usage()["requests"] == 3
        assert client.usage()["output_tokens"] >= server.output_tokens
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert sum("choices" in row for row in journal) == 2
    assert "canary" not in caplog.text + repr(journal)


def test_all_faults_at_once_on_several_requests() -> None:
    fault_of = spread(FAULTS, [f"prompt {n}" for n in range(8)])
    with ScriptedServer(fault_of=fault_of).running() as server:
        client = Client(settings(server))
        answers = asked(client, *map(question, range(40)))
        assert all(text.endswith(f"prompt {name[1:]}") for name, (text,) in texts(answers).items())
        assert len(answers) == 40
        assert len(server.bodies) == 40 + len(FAULTS)


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        ("filtered", "content_filter"),
        ("refusal", "refusal: I will not."),
        ("400 content_filter", "content_filter: status 400"),
        ("400 context_length_exceeded", "too_long: status 400"),
        (
            '400 {"message": "This model\'s maximum context length is 64", "code": 400}',
            "too_long: status 400",
        ),
    ],
)
def test_what_a_server_will_not_answer_is_recorded_and_not_asked_again(
    fault: str, failure: str
) -> None:
    journal = Memory()
    with ScriptedServer([fault]).running() as server:
        (choice,) = asked(Client(settings(server), journal), question())["p0"].choices
        assert failure in choice.failure and choice.text == ""
        (again,) = asked(Client(settings(server), journal), question())["p0"].choices
        assert (again.text, again.failure) == ("", choice.failure)
        assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        (["401 invalid_api_key"], "status 401"),
        (["404 no_such_model"], "status 404"),
        (["400 bad_parameter"], "status 400"),
        (["400 'stop': array too long. Expected maximum length 4"], "array too long"),
        (["401 token too long"], "status 401"),
        (["403 content_filter"], "status 403"),
        (["404 context_length_exceeded"], "status 404"),
        (["429 insufficient_quota"], "insufficient_quota"),
        (["302 to http://127.0.0.1:9/"], "redirects elsewhere"),
        (["429 after 86400"], "asks to wait 86400 s"),
        (["wrong model"] * 3, "'a-cheaper-model' answered, but 'teacher' was asked"),
        (["null"] * 3, "not a text"),
        (["500"] * 3, "status 500"),
        (["hang"] * 3, "no answer within 0.6 s"),
        (["drip"] * 3, "the response took more than 0.6 s"),
        (["large"] * 3, "larger than 8388608 bytes"),
    ],
)
def test_what_cannot_pass_ends_the_run_with_one_message(faults: list[str], told: str) -> None:
    with ScriptedServer(faults).running() as server:
        client = Client(settings(server, max_retries=2, concurrency=1))
        with pytest.raises(UserError) as error:
            asked(client, question())
        assert told in str(error.value) and "continues" in str(error.value)
        assert server.url in str(error.value)
        assert "raise" not in str(error.value) or "_requests above 0" in str(error.value)
        assert len(server.bodies) == len(faults)


def test_an_error_waits_for_answers_that_are_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "STOP_SECONDS", 0.0)
    journal = Memory()

    def slow(body: dict[str, Any], number: int) -> str:
        time.sleep(0.15)
        return "late"

    def wrong_key(body: dict[str, Any]) -> str:
        return "401 invalid_api_key" if "prompt 2" in str(body) else ""

    with ScriptedServer(fault_of=wrong_key, answer=slow).running() as server:
        with pytest.raises(UserError, match="status 401"):
            asked(Client(settings(server), journal), *map(question, range(3)))
        assert sum("choices" in row for row in journal) == 2 == sum(server.billed.values())


def test_a_thread_that_is_left_behind_writes_nothing() -> None:
    journal, limits = Memory(), EndpointSettings(base_url=("http://127.0.0.1:9/v1",))
    session = asking.Session(limits, [], Ledger(journal), Budget(limits), 0)
    ended = asking.Asking(session, [])
    assert not list(ended.run())
    task = asking._Task(asking._Open(question(), {}), (0,))
    ended._attempt(asking._Attempt(task, None, 0.0), Spent(1))  # type: ignore[arg-type]
    assert not journal


def test_a_request_that_fails_for_good_may_be_recorded() -> None:
    journal = Memory()
    with ScriptedServer(
        fault_of=lambda body: "500" if "prompt 1" in str(body) else ""
    ).running() as server:
        client = Client(settings(server, max_retries=2, max_failed_requests=1), journal)
        answers = asked(client, *map(question, range(3)))
        (failed,) = answers["p1"].choices
        assert failed.failure.startswith("failed: ") and "status 500" in failed.failure
        assert [answers[name].choices[0].failure for name in ("p0", "p2")] == ["", ""]
        before = len(server.bodies)
        server.fault_of = lambda body: ""  # an outage is over: what failed is asked again
        assert texts(asked(Client(settings(server), journal), question(1)))["p1"]
        assert len(server.bodies) == before + 1


def test_keys_in_answers_are_replaced() -> None:
    journal = Memory()
    with ScriptedServer(["echo"]).running() as server:
        (choice,) = asked(Client(settings(server), journal), question())["p0"].choices
    assert choice.text == "your key is Bearer [key]"
    assert "canary" not in repr(journal)


def test_fewer_choices_than_asked_are_completed_by_further_requests() -> None:
    with ScriptedServer(most=1).running() as server:
        answers = asked(Client(settings(server)), question(0, 3, seed=5), question(1, 3, seed=5))
        assert {len(set(one)) for one in texts(answers).values()} == {3}
        assert len(server.bodies) == 6
        seeds = [body["seed"] for body in server.bodies]
        assert len(set(seeds)) == 6 and all(0 <= seed < 1 << 31 for seed in seeds)


def test_more_choices_than_asked_are_not_used() -> None:
    with ScriptedServer().running() as server:
        server.reply_plain = server.reply  # type: ignore[attr-defined]
        server.reply = lambda path, body: server.reply_plain(path, {**body, "n": 3})  # type: ignore
        answers = asked(Client(settings(server)), question(0, 2))
        assert len(answers["p0"].choices) == 2


def test_known_answers_cost_nothing_and_a_larger_number_asks_for_the_rest() -> None:
    journal = Memory()
    with ScriptedServer().running() as server:
        first = asked(Client(settings(server), journal), question(0, 2))
        client = Client(settings(server, max_requests=2), journal)
        again = asked(client, question(0, 3))
        assert texts(again)["p0"][:2] == texts(first)["p0"]
        assert len(server.bodies) == 2 and client.usage()["requests"] == 2
        assert server.billed["prompt 0"] == 3
        usage = client.usage()
        assert usage["input_tokens"] == server.input_tokens
        assert usage["output_tokens"] == server.output_tokens


@pytest.mark.parametrize(
    ("caps", "most"),
    [
        ({"max_requests": 5}, lambda s: len(s.bodies) <= 5),
        ({"max_total_tokens": 900}, lambda s: s.input_tokens + s.output_tokens <= 900),
        (
            {"max_cost": 0.0015, "input_token_price": 1.0, "output_token_price": 10.0},
            lambda s: s.input_tokens * 1e-6 + s.output_tokens * 1e-5 <= 0.0015,
        ),
    ],
)
def test_caps_are_never_passed_and_hold_over_runs(caps: dict[str, Any], most: Any) -> None:
    journal = Memory()
    with ScriptedServer(["500", "null", "cut"], seconds=0.01).running() as server:
        for _ in range(3):
            with pytest.raises(UserError, match=f"--{next(iter(caps))} .*the same command"):
                asked(Client(settings(server, **caps), journal), *map(question, range(40)))
            assert most(server)
        assert server.bodies  # some were sent
        sent = len(server.bodies)
        open_client = Client(settings(server), journal)
        asked(open_client, *map(question, range(40)))
        assert len(server.bodies) > sent
        assert all(count <= 2 for count in server.billed.values())


def test_a_request_without_outcome_counts_at_its_most() -> None:
    journal = Memory()
    with ScriptedServer().running() as server:
        asked(Client(settings(server), journal), question())
        del journal[-1]  # killed after sending
        client = Client(settings(server), journal)
        bound = question().most_tokens(1)
        assert client.usage() == {
            "requests": 1,
            "input_tokens": bound[0],
            "output_tokens": bound[1],
        }


def test_an_answer_counts_if_the_row_of_its_request_is_damaged() -> None:
    journal = Memory()
    with ScriptedServer().running() as server:
        first = asked(Client(settings(server), journal), question())
        usage = Client(settings(server), journal).usage()
        del journal[0]
        client = Client(settings(server), journal)
        assert client.usage() == usage
        assert asked(client, question()) == first and len(server.bodies) == 1


def two_servers(**words: Any) -> tuple[asking.Asking, list[Server]]:
    """Questions without any, to two servers that are not there."""
    urls = ("http://127.0.0.1:9/v1", "http://127.0.0.1:10/v1")
    limits = EndpointSettings(base_url=urls, **words)
    servers = [Server(url, "none", limits, Secrets([])) for url in urls]
    session = asking.Session(limits, servers, Ledger(None), Budget(limits), 0)
    return asking.Asking(session, []), servers


def test_a_slow_request_is_copied_only_to_another_server_that_is_free_now() -> None:
    one, (slow, other) = two_servers(max_requests=5)
    one._latencies.extend([1.0] * 3)
    late = asking._Attempt(asking._Task(asking._Open(question(), {}), (0,)), slow, 0.0)
    one._flying.append(late)
    other.pauses.failed(10.0, 7.0)
    assert one._straggler([slow, other], 10.0) is None and not late.is_copied
    one._budget.spent.requests = 5
    assert one._straggler([slow, other], 20.0) is None and not late.is_copied
    one._budget.spent.requests = 0
    copy = one._straggler([slow, other], 20.0)
    assert copy is not None and copy.failed_at == slow.url and late.is_copied


@pytest.mark.parametrize("kind", ["failed", "busy"])
def test_every_server_error_may_ask_for_a_wait(kind: Any) -> None:
    one, (server, _) = two_servers()
    attempt = asking._Attempt(asking._Task(asking._Open(question(), {}), (0,)), server, 0.0)
    now = time.monotonic()
    one._retry(attempt, Failure(kind, server.url, "status 500", 7.0))
    assert one._later[0][0] >= now + 7


def test_concurrency_is_used_and_kept() -> None:
    with ScriptedServer(seconds=0.2).running() as server:
        started = time.monotonic()
        asked(Client(settings(server, concurrency=4)), *map(question, range(12)))
        assert server.most_at_once == 4
        assert time.monotonic() - started < 12 * 0.2


def test_two_servers_share_the_work_and_a_dead_one_is_left_to_the_other() -> None:
    with (
        ScriptedServer(seconds=0.02).running() as one,
        ScriptedServer(seconds=0.02).running() as two,
    ):
        answers = asked(Client(settings(one, two, concurrency=2)), *map(question, range(20)))
        assert len(answers) == 20
        assert min(len(one.bodies), len(two.bodies)) >= 5
    with ScriptedServer().running() as two:
        both = settings(one, two)  # the first is gone
        assert len(asked(Client(both), *map(question, range(20)))) == 20


def test_a_straggler_is_sent_to_another_server_and_the_first_answer_counts() -> None:
    with (
        ScriptedServer(fault_of=lambda body: "hang").running() as slow,
        ScriptedServer(seconds=0.02).running() as fast,
    ):
        client = Client(settings(slow, fast, concurrency=2, request_timeout_seconds=20.0), Memory())
        started = time.monotonic()
        answers = asked(client, *map(question, range(12)))
        assert time.monotonic() - started < 5
        assert len(answers) == 12 and len(slow.bodies) == 2
        assert client.usage()["requests"] == 14
        cost = question().most_tokens(1)[0]
        assert client.usage()["input_tokens"] == fast.input_tokens + 2 * cost


def test_a_dry_run_sends_nothing() -> None:
    with ScriptedServer().running() as server:
        priced = settings(server, dry_run=True, input_token_price=1.0, output_token_price=4.0)
        with pytest.raises(NothingSent) as told:
            Client(priced).announce(
                [question(n, 4) for n in range(10)], "the messages of 10 prompts"
            )
        said = str(told.value)
        assert "would send the messages of 10 prompts to http://127.0.0.1" in said
        assert "10 to 40 requests, about 60 to 240 tokens" in said  # 8 bytes: 2 tokens, and 4
        assert "at most 320 tokens of responses" in said
        assert "cost at most about 0.0015" in said  # 240e-6 + 4 * 320e-6
        assert not server.bodies


def test_a_key_is_needed_only_to_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY")
    words = {"base_url": ("http://127.0.0.1:9/v1",), "api_key_env": ("TEACHER_KEY",)}
    client = Client(EndpointSettings(**words))
    client.announce([], "nothing")
    with pytest.raises(NothingSent):
        Client(EndpointSettings(**words, dry_run=True)).announce([question()], "a prompt")
    for send in (lambda: client.announce([question()], "a prompt"), lambda: asked(client)):
        with pytest.raises(UserError, match="TEACHER_KEY: is not set"):
            send()


def test_no_header_tells_more_than_the_request_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Own: secret")
    with ScriptedServer().running() as server:
        asked(Client(settings(server)), question())
        (headers,) = server.headers
    assert set(headers) <= {
        *("host", "authorization", "content-type", "content-length", "user-agent"),
        *("accept", "accept-encoding", "connection", "x-stainless-raw-response"),
    }
    assert headers["user-agent"] == "rrhf" and "secret" not in str(headers)


def test_a_proxy_of_the_environment_gets_nothing_that_is_for_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ScriptedServer().running() as server, ScriptedServer().running() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        monkeypatch.setenv("NO_PROXY", "")
        asked(Client(settings(server)), question())
        assert len(server.bodies) == 1 and not proxy.bodies
