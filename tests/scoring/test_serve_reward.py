"""`rrhf serve-reward`: scores through HTTP equal the local ones, and who is not answered."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_cases import error_of
from reward_cases import conversation, reward_model_folder
from score_cases import candidates_in, some_sets

from rrhf.cli.main import main
from rrhf.data.candidate_files import read_candidate_sets
from rrhf.errors import UserError
from rrhf.records import Candidate, CandidateSet
from rrhf.scoring.build import build_scorer
from rrhf.scoring.http import server as server_module
from rrhf.scoring.http.server import RewardServer
from rrhf.scoring.http.server_config import ServeRewardConfig
from rrhf.scoring.scorer import Scorer
from rrhf.signals import StopRequest

TOKEN = "canary-77aa01"


class Lengths(Scorer):
    """One point a letter; slow where asked to be, and keeps the order of requests."""

    name = "lengths"

    def __init__(self) -> None:
        self.order: list[str] = []
        self.running = 0

    def score(self, sets):
        assert self.running == 0, "one request at a time"
        self.running += 1
        try:
            texts = [c.response for s in sets for c in s.candidates]
            self.order += texts
            if "slow" in texts:
                time.sleep(0.3)
            if "user" in texts:
                raise UserError("cannot score this; shorten it")
            if "crash" in texts:
                raise RuntimeError("secret detail")
            return [
                [float("nan") if c.response == "nan" else len(c.response) / 3 for c in s.candidates]
                for s in sets
            ]
        finally:
            self.running -= 1

    def fits(self, s: CandidateSet, candidate: Candidate) -> bool:
        return candidate.response != "nan"


@contextmanager
def serving(scorer: Scorer, **settings: Any) -> Iterator[RewardServer]:
    """Serve from a thread; signals are simulated by the request that they set."""
    stop = StopRequest()
    with RewardServer(ServeRewardConfig(scorer="lengths", port=0, **settings)) as server:
        thread = threading.Thread(target=server.serve, args=(scorer, stop))
        thread.start()
        try:
            yield server
        finally:
            stop.received = signal.SIGTERM
            thread.join(10)
            assert not thread.is_alive()


def asked(
    server: RewardServer, body: Any, method: str = "POST", path: str = "/score", **headers: str
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {
        "Content-Type": "application/json",
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }
    try:
        connection.request(method, path, data, {k: v for k, v in given.items() if v})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_scores_through_http_equal_the_local_ones_to_the_last_bit(tmp_path: Path) -> None:
    """With a model whose window (256) some responses exceed; by the library, then by commands."""
    folder = reward_model_folder(tmp_path / "rm")
    sets = [*some_sets(), conversation("long " * 30, "far too long " * 40, "fits")]
    local = build_scorer(str(folder))
    with serving(build_scorer(str(folder))) as server:
        remote = build_scorer(server.url)
        want = local.score(sets)
        assert remote.score(sets) == want
        found = [[remote.fits(s, c) for c in s.candidates] for s in sets]
        assert found == [[local.fits(s, c) for c in s.candidates] for s in sets]
        assert None in want[-1] and found[-1] == [False, True]

        raw = candidates_in(tmp_path)
        assert main(["score", raw, f"{tmp_path}/there.jsonl", "--scorer", server.url]) == 0
    assert main(["score", raw, f"{tmp_path}/here.jsonl", "--scorer", str(folder)]) == 0
    there, here = (
        [s.scores for s in read_candidate_sets(tmp_path / f"{name}.jsonl")]
        for name in ("there", "here")
    )
    assert there == here


def test_another_loopback_address_is_answered() -> None:
    with serving(Lengths(), host="127.0.0.2") as server:
        assert build_scorer(server.url).score([conversation("q", "abc")]) == [[1.0]]


def test_the_form_of_openrlhf_gives_the_scores_of_the_same_text(tmp_path: Path) -> None:
    folder = reward_model_folder(tmp_path / "rm")
    texts = [("Human: hi", " there"), ("Human: and", " now what?")]
    sets = [CandidateSet(str(n), p, None, (Candidate(r),)) for n, (p, r) in enumerate(texts)]
    body = {
        "query": [p + r for p, r in texts],
        "prompts": [p for p, _ in texts],
        "labels": ["", ""],
    }
    local = build_scorer(str(folder))
    with serving(build_scorer(str(folder))) as server:
        status, answer = asked(server, body, path="/get_reward")
        through = build_scorer(f"{server.url}#form=openrlhf").score(sets)
    want = [score for scores in local.score(sets) for score in scores]
    assert (status, answer["rewards"]) == (200, want)
    assert answer["scores"] == want and answer["extra_logs"] == {}
    assert [score for scores in through for score in scores] == want


def test_what_is_not_a_number_is_null() -> None:
    with serving(Lengths()) as server:
        body = {"sets": [{"query": "q", "responses": ["nan", "abc"]}]}
        assert asked(server, body) == (200, {"scores": [[None, 1.0]], "too_long": [[True, False]]})
        assert asked(server, {"sets": []}) == (200, {"scores": []})


@pytest.mark.parametrize(
    "body, message",
    [
        ({}, "neither"),
        ([], "neither"),
        ({"sets": {}}, "sets is not a list"),
        ({"sets": [3]}, r"sets\[0\] is not an object"),
        ({"sets": [{"responses": []}]}, r"sets\[0\].query is not a text"),
        ({"sets": [{"query": "q"}]}, r"sets\[0\].responses is not a list"),
        ({"sets": [{"query": "q", "responses": [None]}]}, r"responses\[0\] is not a text"),
        (
            {"sets": [{"query": "q", "responses": ["a"], "finish_reasons": ["eos"]}]},
            "each is one of stop",
        ),
        (
            {"sets": [{"query": "q", "responses": [], "messages": [{"role": "x"}]}]},
            "no turn with a role",
        ),
        ({"query": ["a"]}, '"prompts" is missing'),
        ({"query": ["ab"], "prompts": ["b"]}, r"query\[0\] does not begin with prompts\[0\]"),
        ({"query": ["ab"], "prompts": []}, "query has 1 texts, but prompts has 0"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_requests_of_another_form(body: Any, message: str) -> None:
    with serving(Lengths()) as server:
        status, answer = asked(server, body)
    assert status == 400 and re.search(message, answer["error"])


def test_who_is_not_answered() -> None:
    body = {"sets": []}
    with serving(Lengths(), max_request_megabytes=1) as server:
        assert asked(server, body, Origin="http://evil.example")[0] == 403
        assert asked(server, body, Host="evil.example:8000")[0] == 403
        assert asked(server, body, Host="localhost:1234")[0] == 200
        assert asked(server, body, Host="[::1]:1234")[0] == 200
        assert asked(server, body, Content_Type="text/plain")[0] == 415
        assert asked(server, body, Content_Length="many")[0] == 411
        assert asked(server, body, Content_Length="2000000")[0] == 413
        assert asked(server, b"", "GET", "/health") == (200, {"status": "ok"})
        assert asked(server, b"", "GET", "/other")[0] == 404
        assert asked(server, b"", "GET", "/health", Host="evil.example")[0] == 403


def test_a_token_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_TOKEN", TOKEN)
    with serving(Lengths(), token_env="SERVE_TOKEN") as server:
        assert asked(server, {"sets": []})[0] == 401
        assert asked(server, {"sets": []}, Authorization="Bearer canary")[0] == 401
        assert asked(server, {"sets": []}, Authorization=f"Bearer {TOKEN}")[0] == 200
        scorer = build_scorer(f"{server.url}#token_env=SERVE_TOKEN")
        assert scorer.score([conversation("q", "abc")]) == [[1.0]]
        with pytest.raises(UserError, match=r"status 401 .*token_env=NAME"):
            build_scorer(server.url).score([conversation("q", "abc")])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--host", "0.0.0.0"], "other machines could reach it; name an environment variable"),
        (["--host", "scores.example"], "other machines could reach it"),
        (["--host", "0.0.0.0", "--token_env", "NO_TOKEN"], "NO_TOKEN: this variable is not set"),
        (["--port", "70000"], "port"),
        (["--host", "203.0.113.9", "--token_env", "SERVE_TOKEN"], "cannot listen there"),
    ],
)
def test_addresses_that_are_refused(capsys, monkeypatch, words, message) -> None:
    monkeypatch.setenv("SERVE_TOKEN", TOKEN)
    said = error_of(capsys, "serve-reward", "gold:help_desk", *words)
    assert message in said and TOKEN not in said


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = error_of(capsys, "serve-reward", "gold:help_desk", "--port", port)
    assert "cannot listen there" in said and "choose another port" in said


def test_requests_are_scored_one_at_a_time_in_order_and_survive_a_failure() -> None:
    scorer = Lengths()
    texts = ["slow", "user", "crash", "b", "c", "d"]
    statuses: dict[str, int] = {}
    with serving(scorer) as server:

        def ask(text: str) -> None:
            body = {"sets": [{"query": "q", "responses": [text]}]}
            statuses[text], answer = asked(server, body)
            assert "secret" not in str(answer)

        threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
        for thread in threads:
            thread.start()
            time.sleep(0.04)
        for thread in threads:
            thread.join()
    assert scorer.order == texts
    assert statuses == {"slow": 200, "user": 422, "crash": 500, "b": 200, "c": 200, "d": 200}


def test_more_requests_than_can_wait_are_told_to_come_back(monkeypatch) -> None:
    monkeypatch.setattr(server_module, "_MAX_WAITING", 1)
    statuses = []
    with serving(Lengths()) as server:

        def ask() -> None:
            statuses.append(asked(server, {"sets": [{"query": "q", "responses": ["slow"]}]})[0])

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200, 503}


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_lets_the_running_request_finish(tmp_path: Path, number: int, code: int) -> None:
    """The whole command: a slow request is under way when the signal comes."""
    (tmp_path / "own.py").write_text(
        "import time\n\n\ndef score(prompts, responses, messages):\n"
        "    open('begun', 'w').close()\n    time.sleep(1)\n"
        "    return [len(response) for response in responses]\n"
    )
    words = ["serve-reward", "function:own:score", "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "rrhf.cli.main", *words],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        url = re.search(r"at (http://127.0.0.1:\d+/score)", process.stdout.readline()).group(1)
        scores: list[Any] = []
        scorer = build_scorer(url)
        thread = threading.Thread(
            target=lambda: scores.append(scorer.score([conversation("q", "abc")]))
        )
        thread.start()
        while not (tmp_path / "begun").exists():
            time.sleep(0.02)
        process.send_signal(number)
        thread.join(20)
        assert process.wait(20) == code
        assert scores == [[[3.0]]]
        assert "the request that was being scored is answered" in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
