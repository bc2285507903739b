"""Scores over HTTP: which addresses are allowed, misbehaving servers, both forms, commands."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import time
from pathlib import Path

import pytest
from command_cases import error_of
from loopback_server import Asked, Reply, loopback
from reward_cases import conversation, language_model_folder
from score_cases import candidates_in, some_sets

from rrhf.cli.main import main
from rrhf.data.candidate_files import read_candidate_sets
from rrhf.errors import UserError
from rrhf.manifests import read_manifest
from rrhf.records import Candidate, CandidateSet
from rrhf.scoring.build import build_scorer, check_scorer_place
from rrhf.scoring.config import RewardModelOptions
from rrhf.scoring.http import client
from rrhf.scoring.http.addresses import parse_address, resolved
from rrhf.scoring.http.scorer import HttpScorer

TOKEN = "canary-5f0c9e7d"
SETS = [conversation("why", "a", "bb"), conversation("and", "ccc"), conversation("none")]
LENGTHS = [[1.0, 2.0], [3.0], []]


def lengths(asked: Asked) -> Reply:
    return Reply({"scores": [[float(len(r)) for r in s["responses"]] for s in asked.body["sets"]]})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FIRST_WAIT", 0.01)


# Which addresses are allowed.


@pytest.mark.parametrize(
    "url, message",
    [
        ("http://0x7f.1/score", "neither a name nor an IP address in its usual form"),
        ("http://0x7f000001/score", "in its usual form"),
        ("http://2130706433/score", "in its usual form"),
        ("http://127.1/score", "in its usual form"),
        ("http://0177.0.0.1/score", "in its usual form"),
        ("http://169.254.169.254/latest/meta-data", "sent to 169.254.169.254, which is not this"),
        ("http://[::ffff:169.254.169.254]/", "which is not this machine"),
        ("http://0.0.0.0:80/", "which is not this machine"),
        ("http://example.org/", "add --scorer_hosts example.org"),
        ("http://user:secret@127.0.0.1/", "holds a password"),
        ("http:///score", "is not a URL"),
        ("http://127.0.0.1:99999/", "is not a URL"),
        ("http://bücher.example/", "is not a URL"),
        ("http://127.0.0.1/#timeout=3", "there is no setting 'timeout'"),
        ("http://127.0.0.1/#timeout_seconds=never", "expected a number"),
        ("http://127.0.0.1/#timeout_seconds=0", "must be above 0"),
        ("http://127.0.0.1/#form", "write #NAME=VALUE"),
    ],
)
def test_addresses_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        check_scorer_place(url, RewardModelOptions())
    assert message in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "host, found, message",
    [
        ("scores.example", ["10.0.0.1", "169.254.169.254"], "address 169.254.169.254, which must"),
        ("scores.example", ["127.0.0.1"], "127.0.0.1, which must not be connected to"),
        ("scores.example", ["::ffff:127.0.0.1"], "which must not be connected to"),
        ("scores.example", ["fe80::1"], "which must not be connected to"),
        ("scores.example", ["0.0.0.0"], "which must not be connected to"),
        ("scores.example", [], "has no address"),
        ("169.254.169.254", ["169.254.169.254"], "which must not be connected to"),
        *[
            ("scores.example", [ip], "which must not be connected to")
            for ip in (
                *("fd00:ec2::254", "64:ff9b::a9fe:a9fe", "2002:7f00:1::1", "::127.0.0.1"),
                *("::ffff:0:127.0.0.1", "100.100.100.200", "64:ff9b::100.100.100.200"),
                *("240.0.0.1", "255.255.255.255", "2001:0:1::80ff:fffe", "::1"),
            )
        ],
        ("localhost", ["2002:7f00:1::1"], "which is not this machine's"),
        ("localhost", ["10.0.0.1"], "10.0.0.1, which is not this machine's"),
    ],
)
def test_an_allowed_name_may_not_lead_anywhere(host: str, found: list[str], message: str) -> None:
    scorer = HttpScorer(
        f"http://{host}/score",
        RewardModelOptions(scorer_hosts=(host,)),
        resolver=lambda name, port: found,
    )
    with pytest.raises(UserError, match=message):
        scorer.probe()


def test_a_name_that_changes_its_address_changes_nothing() -> None:
    """Rebinding: the first answer is this machine, later ones are the metadata service."""
    answers = [["127.0.0.1"], ["169.254.169.254"], ["169.254.169.254"]]
    with loopback(lengths) as server:
        scorer = HttpScorer(
            f"http://localhost:{server.port}/score", resolver=lambda *_: answers.pop(0)
        )
        assert [scorer.score(SETS) for _ in range(3)] == [LENGTHS] * 3
        assert server.asked[0].headers["Host"] == f"localhost:{server.port}"
    assert len(answers) == 2


def test_addresses_of_servers_are_allowed_also_behind_nat64() -> None:
    address = parse_address("http://scores.example/", ("scores.example",))
    found = ["10.0.0.1", "192.0.2.7", "fd12::1", "2001:db8::1", "64:ff9b::10.0.0.1", "2002:a00:1::"]
    assert resolved(address, lambda *_: found) == found


def test_the_address_that_answers_is_used_and_kept() -> None:
    """Nothing listens at the first address of this machine."""
    with loopback(lengths) as server:
        url = f"http://localhost:{server.port}/score"
        scorer = HttpScorer(url, resolver=lambda *_: ["127.0.0.2", "127.0.0.1"])
        assert scorer.score(SETS) == LENGTHS
        assert scorer._client._ips == ["127.0.0.1"]
        assert scorer.score(SETS) == LENGTHS


def test_both_loopback_addresses_are_this_machine() -> None:
    for url in ("http://[::1]:8000/score", "http://127.0.0.2/", "https://localhost/score"):
        check_scorer_place(url, RewardModelOptions())


# Servers that misbehave.


@pytest.mark.parametrize(
    "reply, message",
    [
        (Reply({"scores": [[1, 2], [3]]}), "scores has 2 lists for 3 sets"),
        (Reply({"scores": [[1, 2], [3, 4], []]}), r"scores\[1\] has 2 entries for 1 responses"),
        (Reply({"scores": [[1, "2"], [3], []]}), r"scores\[0\]\[1\] is '2'; a score is a finite"),
        (Reply({"scores": [[1, True], [3], []]}), r"scores\[0\]\[1\] is True"),
        (Reply(b'{"scores": [[1, NaN], [3], []]}'), "holds NaN, which is no number; use null"),
        (Reply(b'{"scores": [[1, 1e999], [3], []]}'), r"scores\[0\]\[1\] is inf"),
        (Reply(b'{"scores": [[1, 1%s], [3], []]}' % (b"0" * 400)), r"scores\[0\]\[1\] is 1000"),
        (Reply({"scores": None}), "scores is not a list"),
        (Reply({"rewards": [1, 2, 3]}), "scores is not a list"),
        (Reply({"scores": [[1, 2], [3], []], "too_long": [[0, 0], [0], []]}), "not true or false"),
        (Reply([1, 2, 3]), "the answer is not an object"),
        (Reply(b"<html>welcome</html>"), "is not JSON .*<html>welcome"),
        (Reply(b"[" * 100_000), "is not JSON"),
        (Reply(b" " * 3_000_000), "has 3000000 bytes, more than"),
        (Reply(b"{}", headers={"Content-Encoding": "gzip"}), "is compressed"),
        (Reply({}, 302, {"Location": "http://169.254.169.254/"}), "status 302.*not followed"),
        (Reply({"error": "no"}, 404), 'status 404 Not Found: {"error": "no"}'),
        (Reply({}, 401), "check the token"),
        (Reply({"scores": []}, length=5000), "does not answer: the answer ended .* early"),
        (Reply({}, 500), "does not answer: status 500"),
    ],
)
def test_a_wrong_answer_is_never_a_score(reply: Reply, message: str) -> None:
    with loopback(lambda asked: reply) as server:
        scorer = build_scorer(f"{server.url}/score#timeout_seconds=1")
        with pytest.raises(UserError, match=message):
            scorer.score(SETS)


def test_an_answer_without_an_end_is_cut_off() -> None:
    many = Reply(b" " * 2_000_000, length=10**12)
    refused = pytest.raises(UserError, match="has 1000000000000 bytes")
    with loopback(lambda asked: many) as server, refused:
        build_scorer(f"{server.url}/").score(SETS)


def test_the_whole_request_has_a_deadline() -> None:
    """Bytes that come one by one do not extend it."""
    with loopback(lambda asked: Reply({"scores": LENGTHS}, drip=0.2)) as server:
        started = time.monotonic()
        with pytest.raises(UserError, match="no answer in time"):
            build_scorer(f"{server.url}/#timeout_seconds=0.5").score(SETS)
        assert time.monotonic() - started < 4


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "0"}, {"Retry-After": "soon"}])
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(status: int, headers: dict[str, str]) -> None:
    left = [Reply({}, status, headers), Reply({}, status, headers)]
    with loopback(lambda asked: left.pop() if left else lengths(asked)) as server:
        assert build_scorer(f"{server.url}/").score(SETS) == LENGTHS
        assert len(server.asked) == 3


def test_a_server_that_is_away_is_waited_for_until_the_deadline() -> None:
    away = [Reply({}, 503, {"Retry-After": "0"})] * 20
    with loopback(lambda asked: away.pop() if away else lengths(asked)) as server:
        assert build_scorer(f"{server.url}/").score(SETS) == LENGTHS


def test_a_wait_beyond_the_deadline_is_not_begun() -> None:
    with loopback(lambda asked: Reply({}, 429, {"Retry-After": "3600"})) as server:
        with pytest.raises(UserError, match="status 429"):
            build_scorer(f"{server.url}/#timeout_seconds=5").score(SETS)
        assert len(server.asked) == 1


# Forms.


def test_what_is_sent_and_what_null_means() -> None:
    def answer(asked: Asked) -> Reply:
        return Reply({"scores": [[0.5, None], [-1], []], "too_long": [[False, True], [False], []]})

    with loopback(answer) as server:
        scorer = build_scorer(f"{server.url}/a/b?c=d#sets_per_request=3")
        assert scorer.score(SETS) == [[0.5, None], [-1.0], []]
        assert not scorer.fits(SETS[0], SETS[0].candidates[1])
        assert scorer.fits(SETS[0], SETS[0].candidates[0])
        asked = server.asked[0]
    assert (asked.method, asked.path) == ("POST", "/a/b?c=d")
    assert asked.body["sets"][0] == {
        "query": SETS[0].query,
        "messages": [{"role": "user", "content": "why"}],
        "responses": ["a", "bb"],
        "finish_reasons": [c.finish_reason for c in SETS[0].candidates],
    }


def test_requests_are_divided_by_number_and_by_size() -> None:
    sets = some_sets()
    want = [[float(len(c.response)) for c in s.candidates] for s in sets]
    for setting in ("sets_per_request=4", "megabytes_per_request=0.0008"):
        with loopback(lengths) as server:
            assert build_scorer(f"{server.url}/#{setting}").score(sets) == want
            assert len(server.asked) > 3
            assert sum(len(one.body["sets"]) for one in server.asked) == len(sets)


def test_the_form_of_openrlhf() -> None:
    def answer(asked: Asked) -> Reply:
        lengths = zip(asked.body["query"], asked.body["prompts"], strict=True)
        return Reply({"rewards": [len(q) - len(p) for q, p in lengths], "extra_logs": {"x": 1}})

    sets = [CandidateSet("0", "Human: hi", None, (Candidate(" a"), Candidate("bbb")))]
    with loopback(answer) as server:
        assert build_scorer(f"{server.url}/get_reward#form=openrlhf").score(sets) == [[2.0, 3.0]]
        assert server.asked[0].body["query"] == ["Human: hi a", "Human: hibbb"]


def test_lone_surrogates_and_control_characters_arrive_as_they_are() -> None:
    odd = "\ud800 \x00 \u2028 \U0001f600"
    with loopback(lambda asked: Reply({"scores": [[1]]})) as server:
        build_scorer(server.url).score([conversation("odd", odd)])
        assert server.asked[0].body["sets"][0]["responses"] == [odd]


# The token.


def test_the_token_is_sent_and_shown_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the server repeats it in an error or in scores."""
    monkeypatch.setenv("SCORER_TOKEN", TOKEN)
    raw = candidates_in(tmp_path)
    faults = [Reply({"error": f"no {TOKEN}"}, 400), Reply({"scores": TOKEN}), Reply(TOKEN.encode())]
    for number, fault in enumerate([None, *faults]):
        left = [lengths, lambda asked, fault=fault: fault or lengths(asked)]
        with loopback(
            lambda asked, left=left: left[min(len(server.asked) - 1, 1)](asked)
        ) as server:
            out = tmp_path / f"{number}.jsonl"
            url = f"{server.url}/score#token_env=SCORER_TOKEN"
            words = ["score", raw, str(out), "--scorer", url]
            assert main(words) == (2 if fault else 0)
            sent = {one.headers["Authorization"] for one in server.asked}
        assert sent == {f"Bearer {TOKEN}"}
    shown = capsys.readouterr()
    assert TOKEN not in shown.out + shown.err
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


def test_a_token_is_replaced_in_raw_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_TOKEN", "canary/01234567")
    asks = client.JsonClient(parse_address("http://127.0.0.1/"), "SCORER_TOKEN")
    assert asks.redacted('{"key": "canary\\/01234567"}') == '{"key": "[token]"}'


@pytest.mark.parametrize(
    "reply",
    [
        Reply({"scores": [["x" * 55 + TOKEN, 1], [3], []]}),
        Reply({"scores": [[1, 2], [3], []], "too_long": [["x" * 55 + TOKEN, True], [True], []]}),
        Reply(b"x" * 195 + TOKEN.encode()),
        Reply(b" " * 1995 + TOKEN.encode() + b" " * 99, 404),
    ],
)
def test_no_part_of_the_token_is_shown_where_a_text_is_cut(
    reply: Reply, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCORER_TOKEN", TOKEN)
    with loopback(lambda asked: reply) as server, pytest.raises(UserError) as refused:
        build_scorer(f"{server.url}/#token_env=SCORER_TOKEN").score(SETS)
    assert TOKEN[:4] not in str(refused.value)


def test_a_token_that_is_missing_or_would_travel_in_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"variable NO_TOKEN, which .* is not set"):
        build_scorer("http://127.0.0.1/#token_env=NO_TOKEN")
    monkeypatch.setenv("SCORER_TOKEN", TOKEN)
    options = RewardModelOptions(scorer_hosts=("scores.example",))
    with pytest.raises(UserError, match="unencrypted; use https"):
        build_scorer("http://scores.example/#token_env=SCORER_TOKEN", options)
    build_scorer("https://scores.example/#token_env=SCORER_TOKEN", options)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_https_asks_only_servers_whose_certificate_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certificate is of localhost, and trusted only where SSL_CERT_FILE names it."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    words += ["-keyout", str(key), "-out", str(certificate), "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(words, check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    monkeypatch.setenv("SCORER_TOKEN", TOKEN)
    with loopback(lengths, tls) as server:
        url = f"https://localhost:{server.port}/score#token_env=SCORER_TOKEN#timeout_seconds=5"
        with pytest.raises(UserError, match="its certificate is not valid"):
            build_scorer(url).score(SETS)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert build_scorer(url).score(SETS) == LENGTHS
        other = url.replace("localhost", "127.0.0.1")
        with pytest.raises(UserError, match="its certificate is not valid"):
            build_scorer(other).score(SETS)
        assert len(server.asked) == 1


# Commands.


def test_score_writes_what_the_server_says(tmp_path: Path) -> None:
    raw = candidates_in(tmp_path)
    with loopback(lengths) as server:
        assert main(["score", raw, str(tmp_path / "s.jsonl"), "--scorer", f"{server.url}/x"]) == 0
        name = f"{server.url}/x"
    scored = list(read_candidate_sets(tmp_path / "s.jsonl"))
    assert [s.scores for s in scored] == [
        tuple(float(len(c.response)) for c in s.candidates) for s in scored
    ]
    manifest = read_manifest(tmp_path / "s.jsonl")
    assert manifest["scorer"] == name
    assert manifest["scorer_details"]["settings"]["form"] == "sets"


def test_what_the_server_cannot_score_counts_as_unscored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(asked: Asked) -> Reply:
        return Reply({"scores": [[None for _ in s["responses"]] for s in asked.body["sets"]]})

    raw = candidates_in(tmp_path)
    with loopback(half) as server:
        said = error_of(capsys, "score", raw, f"{tmp_path}/s.jsonl", "--scorer", server.url)
    assert "candidates could not be scored, more than --max_unscored_fraction" in said


COMMANDS = {
    "score": ["{raw}", "{out}.jsonl", "--scorer={url}"],
    "train ppo": [
        *("--model_name_or_path={lm}", "--output_dir={out}", "--train_datasets={raw}"),
        "--reward_model_name_or_path={url}",
    ],
    "train iterative": [
        *("--model_name_or_path={lm}", "--output_dir={out}", "--train_datasets={raw}"),
        "--reward_model_name_or_path={url}",
    ],
    "evaluate": [
        *("--model_name_or_path={lm}", "--prompts={raw}", "--output_dir={out}", "--scorer={url}"),
    ],
    "evaluate-reward": ["--scorers", "{url}", "--data_path={raw}", "--output_dir={out}"],
    "response-gen": ["{lm}", "{out}", "--prompts={raw}", "--scorer={url}"],
    "serve-reward": ["{url}"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("is_member", [False, True], ids=["alone", "member"])
def test_a_server_that_is_away_is_found_before_any_model_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    is_member: bool,
) -> None:
    from rrhf.models import loading

    monkeypatch.setattr(
        loading, "load_tokenizer", lambda *_, **__: pytest.fail("a model is loaded")
    )
    with loopback(lengths) as server:
        away = server.url
    url = f"sum:{away}/score@0/1,function:score_cases:length_of@0/1" if is_member else away
    places = {
        "raw": candidates_in(tmp_path),
        "out": str(tmp_path / "out"),
        "lm": str(language_model_folder(tmp_path / "lm")),
        "url": url,
    }
    words = [*command.split(), *(word.format(**places) for word in COMMANDS[command])]
    said = error_of(capsys, *words)
    assert away in said and "does not answer" in said and "check that the server is running" in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.jsonl").exists()


def test_a_server_as_a_member_of_an_ensemble() -> None:
    with loopback(lengths) as server:
        scorer = build_scorer(
            f"sum:2*{server.url}/a#form=sets@0/1,function:score_cases:length_of@0/1"
        )
        assert scorer.score(SETS) == [[3.0, 6.0], [9.0], []]
    assert json.dumps(scorer.describe()) and not scorer.is_relative
    relative = build_scorer(f"sum:{server.url}#is_relative=true@0/1,length:5@0/1")
    assert relative.is_relative
