"""`--engine vllm` outside training: requests, checks of the answers, faults, other weights."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_level_tokenizer, save_tiny
from vllm_stand_in import StandIn, stand_in

from rrhf.cli.main import main
from rrhf.data.candidate_files import read_candidate_sets
from rrhf.data.chat_format import ChatCodec
from rrhf.data.collate import EncodedSet, collate
from rrhf.errors import UserError
from rrhf.generation.build import ENGINES, EngineOptions
from rrhf.generation.engine import SamplingParams, answers
from rrhf.generation.local.engine import LocalEngine
from rrhf.generation.vllm.http import JsonServer, ServerFault
from rrhf.generation.vllm.settings import VLLMSettings
from rrhf.models.forward.logprobs import Policy
from rrhf.models.loading import load_causal_lm
from rrhf.records import CandidateSet

SETS = [CandidateSet(str(place), f"Human: Hi {place}\n\nAssistant:") for place in range(3)]
THREE = SamplingParams(num_return_sequences=3, max_new_tokens=6, seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture
def server(model: Path) -> Iterator[StandIn]:
    with stand_in(model) as running:
        yield running


def settings(server: StandIn, **changes: Any) -> VLLMSettings:
    quick = {"request_seconds": 20.0, "server_wait_seconds": 5.0}
    return VLLMSettings(base_url=server.url, **{**quick, **changes})


def engine(server: StandIn, policy: Path | None = None, **changes: Any) -> Any:
    codec, path = ChatCodec(byte_level_tokenizer(), "raw"), str(policy or server.root)
    loaded = load_causal_lm(path)
    made = EngineOptions(path, lambda: loaded, lambda: codec, settings=settings(server, **changes))
    return ENGINES["vllm"].build(made)


def test_ids_and_log_probs_are_those_of_the_policy(server: StandIn, model: Path) -> None:
    policy = Policy(load_causal_lm(model))
    codec = ChatCodec(byte_level_tokenizer(), "raw")
    for prompt, samples in zip(SETS, answers(engine(server), SETS, THREE), strict=True):
        assert len({tuple(s.token_ids.tolist()) for s in samples if s.token_ids is not None}) > 1
        for sample in samples:
            assert sample.token_ids is not None and sample.logprobs is not None
            assert sample.prompt_ids == codec.encode_prompt(prompt)
            rows = EncodedSet(list(sample.prompt_ids or ()), [sample.token_ids.tolist()])
            read = policy(collate([rows], 2)).logprobs[0].detach()
            torch.testing.assert_close(sample.logprobs, read, atol=1e-4, rtol=0)
            ended = sample.token_ids[-1].item() in codec.end_ids
            assert sample.finish_reason == ("stop" if ended else "length")
            assert sample.text == codec.decode_response(prompt, sample.token_ids.tolist())


def test_a_seed_gives_the_same_requests_in_any_order_and_number(server: StandIn) -> None:
    made = engine(server)
    first = answers(made, SETS, THREE)
    again = answers(made, SETS[::-1], THREE)[::-1]
    assert [[s.text for s in one] for one in first] == [[s.text for s in one] for one in again]
    seeds = {body["seed"] for body in server.bodies}
    assert len(seeds) == 3 and len(server.bodies) == 6
    other = answers(made, SETS, SamplingParams(3, 6, seed=5, round=1))
    assert [s.text for s in other[0]] != [s.text for s in first[0]]
    assert {body["seed"] for body in server.bodies[6:]}.isdisjoint(seeds)


def test_greedy_responses_and_stop_strings_are_those_of_the_local_engine(
    server: StandIn, model: Path
) -> None:
    """The stand-in knows no stop strings, so that a response is cut here."""
    local = LocalEngine(load_causal_lm(model), ChatCodec(byte_level_tokenizer(), "raw"))
    params = SamplingParams(1, 20, do_sample=False, stop_strings=("e",))
    for mine, its in zip(
        answers(engine(server), SETS, params), answers(local, SETS, params), strict=True
    ):
        assert (mine[0].text, mine[0].finish_reason) == (its[0].text, its[0].finish_reason)
        assert mine[0].token_ids is not None and its[0].token_ids is not None
        assert mine[0].token_ids.tolist() == its[0].token_ids.tolist()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("hang", "gave no complete answer within 0.6 s"),
        ("drip", "gave no complete answer within 0.6 s"),
        ("error", "answered with status 500"),
        ("html", "not JSON: <html>busy"),
        ("fewer", "gave 2 choices, but 3 were asked for"),
        ("model", "answered as model 'another'"),
        ("null", "gave a response without token ids"),
    ],
)
def test_each_fault_is_named_after_its_repetitions(server: StandIn, fault: str, said: str) -> None:
    made = engine(server, server_retries=1, request_seconds=0.6, check_weights=False)
    server.faults.add(fault)
    started = time.monotonic()
    with pytest.raises(UserError, match=said) as caught:
        answers(made, SETS[:1], THREE)
    assert "--server_retries 1 times" in str(caught.value)
    assert server.seen["sampled"] == 2 and time.monotonic() - started < 10


def test_a_fault_that_passes_is_repeated_with_the_same_requests(server: StandIn) -> None:
    wanted = answers(engine(server), SETS, THREE)

    def fail_once(number: int) -> None:
        server.faults.clear()
        if number == 5:
            server.faults.add("error")

    server.on_completion = fail_once
    found = answers(engine(server), SETS, THREE)
    assert [[s.text for s in one] for one in found] == [[s.text for s in one] for one in wanted]
    assert 7 <= server.seen["sampled"] <= 9


def test_a_refusal_is_not_repeated(server: StandIn) -> None:
    server.faults.add("long")
    with pytest.raises(UserError, match=r"status 400: .*maximum context length"):
        answers(engine(server), SETS[:1], THREE)
    assert server.seen["sampled"] == 1


def test_a_server_with_other_weights_is_given_those_of_the_policy(
    server: StandIn, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", seed=7)
    mine = answers(engine(server, other), SETS, THREE)
    assert server.seen["/collective_rpc"] == 1
    with stand_in(other) as its:
        assert [[s.text for s in one] for one in answers(engine(its), SETS, THREE)] == [
            [s.text for s in one] for one in mine
        ]
        assert its.seen["/collective_rpc"] == 0


def test_two_commands_on_one_server_never_get_each_others_text(
    server: StandIn, tmp_path: Path
) -> None:
    """The second gives the server its weights, while the first believes that it has its own."""
    first, second = engine(server), engine(server, save_tiny(tmp_path / "other", seed=7))
    mine, its, again = (
        [sample.text for sample in answers(one, SETS[:1], THREE)[0]]
        for one in (first, second, first)
    )
    assert mine == again != its
    assert server.seen["/collective_rpc"] == 2


def test_a_server_that_takes_no_weights_is_refused_where_it_has_others(
    model: Path, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", seed=7)
    with stand_in(model, takes_weights=False) as server:
        assert len(answers(engine(server), SETS, THREE)) == 3
        with pytest.raises(UserError, match=r"disagrees .*`rrhf engine vllm start .*other`"):
            answers(engine(server, other), SETS, THREE)


def test_responses_of_a_server_that_was_restarted_are_dropped(
    server: StandIn, tmp_path: Path
) -> None:
    """It was given weights that a restarted server does not have."""
    other = save_tiny(tmp_path / "other", seed=7)
    wanted = answers(engine(server, other), SETS, THREE)
    made = engine(server, other)

    def restart(number: int) -> None:
        if number == 5:  # as if between two requests
            server.model, server.instance = load_causal_lm(server.root), "another"
            server.cache.clear()

    server.on_completion = restart
    found = answers(made, SETS, THREE)
    assert [[s.text for s in one] for one in found] == [[s.text for s in one] for one in wanted]
    assert server.seen["/collective_rpc"] == 2


def generate(folder: Path, model: Path, *words: str) -> int:
    (folder / "in.jsonl").write_text("".join(f'{{"prompt": "{w}"}}\n' for w in ("one", "two")))
    places = ["--prompts", str(folder / "in.jsonl"), "--output_file", str(folder / "o.jsonl")]
    fixed = ["--model_name_or_path", str(model), "--max_new_tokens", "6", "--engine", "vllm"]
    return main(["generate", *places, *fixed, "--max_prompt_tokens", "64", *words])


def test_generate_writes_a_candidate_file(server: StandIn, tmp_path: Path) -> None:
    assert generate(tmp_path, server.root, "--base_url", server.url) == 0
    sets = list(read_candidate_sets(tmp_path / "o.jsonl"))
    assert [len(s.candidates) for s in sets] == [4, 4]
    manifest = json.loads((tmp_path / "o.manifest.json").read_text())
    assert manifest["settings"]["engine"] == "vllm" and manifest["tokens"] > 8


def test_a_missing_server_is_one_message_before_any_model_is_loaded(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    server.kill()
    monkeypatch.setattr("rrhf.generation.stage.load_causal_lm", None)
    started = time.monotonic()
    assert generate(tmp_path, server.root, "--base_url", server.url) == 2
    assert time.monotonic() - started < 5
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "rrhf engine vllm start" in said
    assert not (tmp_path / "o.jsonl").exists()
    server.start()


def test_a_window_that_is_too_small_is_said(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.window = 40
    assert generate(tmp_path, server.root, "--base_url", server.url) == 2
    assert "--max_model_len 70" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:port", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="is not an address"):
        VLLMSettings(base_url=url)


@pytest.mark.parametrize("url", ["http://me:hush@x:1", "http://x?key=hush", "http://x:p#hush"])
def test_an_address_with_a_secret_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(UserError, match="holds more than host, port and path") as caught:
        VLLMSettings(base_url=url)
    assert "hush" not in str(caught.value)


def test_what_is_not_a_vllm_server_is_refused(server: StandIn) -> None:
    with pytest.raises(UserError, match=r"status 404.*engine vllm start"):
        JsonServer(f"{server.url}/else").get("/v1/other", 5)
    server.models = lambda: {"data": []}  # type: ignore[method-assign]
    with pytest.raises(UserError, match="is no vLLM server"):
        engine(server)


def test_an_evaluation_measures_the_kl_of_its_samples(server: StandIn, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    words = ["--model_name_or_path", server.root, "--prompts", tmp_path / "in.jsonl"]
    words += ["--reference_model_name_or_path", server.root, "--output_dir", tmp_path / "rows"]
    words += ["--engine", "vllm", "--base_url", server.url, "--max_new_tokens", 6, "--name", "its"]
    assert main(["evaluate", *map(str, words), "--max_prompt_tokens", "64"]) == 0
    row = json.loads((tmp_path / "rows" / "its.json").read_text())
    assert row["config"]["engine"] == "vllm" and abs(row["metrics"]["kl"]["mean"]) < 1e-4


def test_an_answer_that_is_cut_or_of_another_kind_is_a_fault(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each passes: a wait repeats the request, and nothing is read into a piece of an answer."""
    asked = engine(server, check_weights=False).server
    served = asked.describe()
    server.faults.add("cut")
    for ask in (asked.describe, asked.resume):
        with pytest.raises(ServerFault, match="broke the connection"):
            ask()
    server.faults.clear()
    for told in ([], {"vllm_config": "text"}, {"vllm_config": {"model_config": 1}}):
        monkeypatch.setattr(server, "info", lambda told=told: told)
        with pytest.raises(ServerFault, match="answered without"):
            asked.describe()
    for part in ({"index": []}, {"token_ids": 5}, {"logprobs": [1]}, {"prompt_token_ids": 1}):
        choice = {"index": 0, "prompt_token_ids": [5], "finish_reason": "stop", "token_ids": [6]}
        answer = {"model": served.model, "choices": [{**choice, **part}]}
        monkeypatch.setattr(server, "complete", lambda body, answer=answer: answer)
        with pytest.raises(ServerFault):
            asked.complete(served, [[5]], {"n": 1, "max_tokens": 2})


def test_a_folder_for_weights_that_cannot_be_written_is_refused_at_the_start(
    server: StandIn, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.* cannot be written"):
        engine(server, sync_folder=str(tmp_path / "file" / "weights"))


def test_a_pause_whose_answer_is_lost_is_taken_back(server: StandIn, tmp_path: Path) -> None:
    asked = engine(server, check_weights=False).server
    real, paths = asked.http.post, []

    def post(path: str, body: Any, seconds: float) -> Any:
        paths.append(path)
        real(path, body, seconds)
        if path.startswith("/pause"):
            raise ServerFault("gave no complete answer")

    asked.http.post = post
    with pytest.raises(ServerFault, match="gave no complete answer"):
        asked.load(tmp_path)
    assert paths[-1] == "/resume" and server.runs.is_set()


def test_a_request_that_connects_while_others_are_ended_is_ended_too(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = JsonServer(server.url)
    real = HTTPConnection.connect
    with ExitStack() as until:

        def connect(connection: HTTPConnection) -> None:
            real(connection)
            until.enter_context(asked.hang_up())

        monkeypatch.setattr(HTTPConnection, "connect", connect)
        with pytest.raises(ServerFault, match="the others were given up"):
            asked.get("/v1/models", 5)
    monkeypatch.setattr(HTTPConnection, "connect", real)
    assert asked.get("/v1/models", 5)["data"]


def test_a_cut_connection_is_a_fault(server: StandIn) -> None:
    server.on_completion = lambda number: server.kill()
    made = engine(server, check_weights=False, server_retries=0)
    with pytest.raises(UserError, match=r"broke the connection|cannot be reached"):
        answers(made, SETS[:1], THREE)
    with pytest.raises(ServerFault):
        made.server.describe()
    server.start()
