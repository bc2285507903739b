"""`--engine openai_server`: the commands against a scripted server, faults and kills included."""

from __future__ import annotations

import json
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from kills import Zygote
from openai_server_cases import (
    KEY,
    KEY_VARIABLE,
    files_with,
    generate_words,
    manifest_of,
    prompts_in,
    server_words,
    sets_of,
)
from scripted_server import FAULTS, ScriptedServer, prompt_of, spread

from rrhf.cli.main import main
from rrhf.endpoints.questions import Choice
from rrhf.errors import UserError
from rrhf.generation.build import ENGINES, EngineOptions
from rrhf.generation.config import GenerateConfig
from rrhf.generation.openai_server.engine import OpenAIServerEngine, _sample
from rrhf.generation.openai_server.spec import OpenAIServerSettings
from rrhf.generation.stage import generate_file


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)


def test_every_fault_leaves_each_prompt_answered_once_and_the_key_nowhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    prompts, out = prompts_in(tmp_path, 8), tmp_path / "out" / "o.jsonl"
    faults = [*FAULTS, "echo", "refusal", "filtered"]
    fault_of = spread(faults, [f"question {n}" for n in range(8)])
    with ScriptedServer(fault_of=fault_of, most=2).running() as server:
        words = generate_words(server, prompts, out, "--request_timeout_seconds=0.5")
        assert main([*words, "--num_return_sequences=3", "--max_requests=100"]) == 0
        sent = len(server.bodies)
        assert server.keys == [f"Bearer {KEY}"] * sent
    sets, manifest = sets_of(out), manifest_of(out)
    assert list(sets) == [f"question {n}" for n in range(8)]
    assert manifest["not_given"] == {"refusal": 1, "content_filter": 1}
    texts = [c.response for one in sets.values() for c in one.candidates]
    assert len(texts) == 8 * 3 - 2 == manifest["samples"]
    echoed = [text for text in texts if "[key]" in text]
    assert echoed == ["your key is Bearer [key]"]
    for query, one in sets.items():
        assert all(c.response.endswith(query) for c in one.candidates if c.response not in echoed)
        assert {c.source for c in one.candidates} == {"teacher:a-teacher"}
    assert manifest["usage"]["requests"] == sent <= 100
    said = "".join([*capfd.readouterr(), caplog.text])
    assert "refusal" in said and "first: prompt" in said
    assert "canary" not in said and not files_with("canary", tmp_path)
    assert sorted(path.name for path in out.parent.iterdir()) == ["o.jsonl", "o.manifest.json"]


def test_the_key_stays_out_of_what_a_failed_command_leaves(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts, out = prompts_in(tmp_path), tmp_path / "out" / "o.jsonl"
    with ScriptedServer(["", *["echo 500"] * 9]).running() as server:
        words = generate_words(server, prompts, out, "--max_retries=1", "--concurrency=1")
        assert main(words) == 2
        said = "".join(capfd.readouterr())
        assert "status 500" in said and "[key] is a fine key" in said and "canary" not in said
        assert [path.name for path in sorted(out.parent.iterdir())] == [
            *("o.answers.jsonl", "o.manifest.json", "o.rank0.jsonl")
        ]
        assert not files_with("canary", tmp_path)
        server.faults.clear()
        assert main(words) == 0  # and the same command continues
        assert len(sets_of(out)) == 4 and set(server.billed.values()) == {4}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--base_url=http://127.0.0.1:9/v1", "--top_k=5"], "--top_k 5: --engine openai_server"),
        (
            ["--base_url=http://127.0.0.1:9/v1", "--num_beams=4", "--do_sample=false"],
            "--num_beams 4",
        ),
        (["--base_url=http://127.0.0.1:9/v1", "--repetition_penalty=2"], "has no use for it"),
        (
            ["--base_url=http://127.0.0.1:9/v1", "--bf16"],
            "--bf16 True: --engine openai_server has no use for it; leave it out (in response-gen, "
            "--score_bf16",
        ),
        (["--base_url=http://127.0.0.1:9/v1", "--max_prompt_tokens=9"], "--max_prompt_tokens 9"),
        ([], "add --send_prompts_to api.openai.com"),
        (["--send_prompts_to=api.openai.com"], "OPENAI_API_KEY: is not set"),
        (["--base_url=http://example.com/v1"], "example.com is not this machine"),
        (["--base_url=http://127.0.0.1:9/v1", "--api_key_env=sk-x"], "not the name of an env"),
        (["--base_url=http://127.0.0.1:9/v1", "--max_cost=1"], "needs --input_token_price"),
        (["--base_url=http://127.0.0.1:9/v1", "--api=chat"], "start the server, or correct --base"),
    ],
)
def test_mistakes_are_one_message_and_nothing_is_written(
    words: list[str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    out = tmp_path / "o.jsonl"
    command = ["generate", "--model_name_or_path=m", f"--prompts={prompts_in(tmp_path)}"]
    assert main([*command, f"--output_file={out}", "--engine=openai_server", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and told in said and "Traceback" not in said
    assert not out.exists()


def test_without_the_package_there_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)  # type: ignore[arg-type]
    out = tmp_path / "o.jsonl"
    server = ScriptedServer()
    server.url = "http://127.0.0.1:9/v1"
    assert main(generate_words(server, prompts_in(tmp_path), out)) == 2
    told = 'the package openai is not installed; pip install "rrhf[openai]"'
    assert capsys.readouterr().err == f"error: --engine openai_server: {told}\n"
    assert not list(tmp_path.glob("o.*"))


def test_a_policy_in_training_cannot_be_sampled_there() -> None:
    with pytest.raises(UserError, match="use --engine local or vllm"):
        ENGINES["openai_server"].check(None, True)  # type: ignore[misc]


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = prompts_in(tmp_path), tmp_path / "out" / "o.jsonl"
    with ScriptedServer().running() as server:
        words = generate_words(server, prompts, out, "--output_token_price=1000")
        assert main([*words, "--dry_run"]) == 0
        said = capsys.readouterr().out
        assert f"the messages of 4 prompts to {server.url}, model a-teacher: 4 to 16" in said
        assert "at most 128 tokens of responses, cost at most about 0.1280" in said
        assert not server.bodies and not out.parent.exists()
        assert main(words) == 0  # and nothing of the dry run is in its way


def test_what_is_sent(tmp_path: Path) -> None:
    row = {"query": "\n\nHuman: Hi\n\nAssistant:", "id": "secret-id", "origin": "secret-origin"}
    row |= {"responses": ["secret response"], "scores": [1.0], "sources": ["human:chosen"]}
    turns = [{"role": "user", "content": "Hi"}]
    prompts = tmp_path / "in.jsonl"
    prompts.write_text(json.dumps(row) + "\n")
    with ScriptedServer(answer=lambda *_: " Hello!\n\nHuman: you?").running() as server:
        more = ["--temperature=0.5", "--top_p=0.9", "--stop_strings", "END"]
        out = tmp_path / "chat.jsonl"
        assert main(generate_words(server, prompts, out, "--num_return_sequences=2", *more)) == 0
        assert server.bodies == [
            {
                **{"model": "a-teacher", "messages": turns, "max_tokens": 8, "n": 2},
                **{"temperature": 0.5, "top_p": 0.9, "stop": ["END"]},
            }
        ]
        (one,) = sets_of(out).values()
        assert [c.response for c in one.candidates][-1] == "secret response"  # kept here
        server.bodies.clear()
        words = ["--api=completions", "--do_sample=false", "--num_return_sequences=1"]
        words += ["--max_tokens_field=max_completion_tokens", "--send_seed"]
        out = tmp_path / "text.jsonl"
        assert main(generate_words(server, prompts, out, *words)) == 0
        assert server.bodies == [
            {
                **{"model": "a-teacher", "prompt": row["query"], "max_completion_tokens": 8},
                **{"temperature": 0.0, "top_p": 1.0, "stop": ["\n\nHuman:", "\n\nAssistant:"]},
            }
        ]
        (one,) = sets_of(out).values()
        assert one.candidates[0].response == " Hello!"
        assert one.candidates[0].finish_reason == "stop"


def test_the_blank_after_a_cue_is_removed() -> None:
    lead = [_sample(Choice(" Hi!  You?"), ["You"], has_lead).text for has_lead in (True, False)]
    assert lead == ["Hi!  ", " Hi!  "]


def test_seeds_are_sent_if_asked_for_and_differ_by_prompt_and_request(tmp_path: Path) -> None:
    prompts = prompts_in(tmp_path, 3)
    seeds = []
    with ScriptedServer(most=1).running() as server:
        for name, words in (("a", []), ("b", []), ("c", ["--seed=1"]), ("d", ["--round=1"])):
            server.bodies.clear()
            out = tmp_path / f"{name}.jsonl"
            assert main(generate_words(server, prompts, out, "--send_seed", *words)) == 0
            seeds.append({body["seed"] for body in server.bodies})
    assert [len(found) for found in seeds] == [12 + 0] * 4
    assert seeds[0] == seeds[1] and not seeds[0] & seeds[2] and not seeds[0] & seeds[3]


def test_two_teachers_next_to_a_policy_in_one_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"query": f"question {n}", "responses": [f"policy {n}"], "sources": ["policy:sft"]}
        for n in range(3)
    ]
    path = tmp_path / "policy.jsonl"
    path.write_text("".join(f"{json.dumps(row | {'scores': [0.5]})}\n" for row in rows))
    keep = ("--keep_candidates", "--num_return_sequences=1")
    with ScriptedServer().running() as server:
        for name, model in (("one", "org/first"), ("two", "second"), ("three", "second")):
            out = tmp_path / f"{name}.jsonl"
            assert main(generate_words(server, path, out, *keep, model=model)) == 0
            path = out
    sources = ["policy:sft", "teacher:org/first", "teacher:second", "teacher:second"]
    for n, one in enumerate(sets_of(path).values()):
        assert [c.source for c in one.candidates] == sources
        assert one.candidates[0].response == f"policy {n}"
        assert one.scores == (None,) * 4
    assert manifest_of(path)["dataset_responses"] == 9
    assert "already has responses of teacher:second" in caplog.text


def test_a_prompt_without_any_response_keeps_its_row(tmp_path: Path) -> None:
    prompts, out = prompts_in(tmp_path, 2), tmp_path / "o.jsonl"

    def fault_of(body: dict[str, Any]) -> str:
        return "400 context_length_exceeded" if prompt_of(body) == "question 0" else ""

    with ScriptedServer(fault_of=fault_of).running() as server:
        assert main(generate_words(server, prompts, out)) == 0
    counts = [len(one.candidates) for one in sets_of(out).values()]
    assert counts == [0, 4] and manifest_of(out)["not_given"] == {"too_long": 4}


def test_a_file_without_any_response_is_not_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = prompts_in(tmp_path, 2), tmp_path / "o.jsonl"
    with ScriptedServer(fault_of=lambda body: "400 context_length_exceeded").running() as server:
        assert main(generate_words(server, prompts, out)) == 2
    said = capsys.readouterr().err
    assert "no prompt got a response (prompt " in said and "too_long: status 400" in said
    assert not out.exists()


def test_responses_cannot_be_kept_and_left_out(tmp_path: Path) -> None:
    out, words = str(tmp_path / "o.jsonl"), {"keep_candidates": True}
    with pytest.raises(UserError, match="leave one of the two out"):
        GenerateConfig(
            "m", prompts="a prompt", output_file=out, **words, add_dataset_responses=False
        )


def test_names_that_a_server_takes_or_gives_may_change_between_runs() -> None:
    """As the message about another model's answer advises."""
    described = []
    for words in ({}, {"served_model": "b", "max_tokens_field": "max_completion_tokens"}):
        settings = OpenAIServerSettings(base_url=("http://127.0.0.1:9/v1",), **words)
        options = EngineOptions("m", lambda: None, lambda: None, 8, 256, settings, 1.0)
        described.append(OpenAIServerEngine(options).describe())
    assert described[0] == described[1]


def test_several_processes_are_refused(tmp_path: Path) -> None:
    settings = OpenAIServerSettings(base_url=("http://127.0.0.1:9/v1",))
    config = GenerateConfig(
        model_name_or_path="m",
        prompts=str(prompts_in(tmp_path)),
        output_file=str(tmp_path / "o.jsonl"),
        engine="openai_server",
        engine_settings=settings,
    )
    with pytest.raises(UserError, match="without a launcher"):
        generate_file(config, 0, 2)


# Kills


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_lose_no_answer_and_pay_none_twice(kills: int, tmp_path: Path) -> None:
    count, in_flight, wanted = 4 * kills, 1, 4
    prompts, out = prompts_in(tmp_path, count), tmp_path / "o.jsonl"
    faults = random.Random(0)

    def fault_of(body: dict[str, Any]) -> str:
        return faults.choice(["", "", "", "", "", "", "429 after 0", "500"])

    with ScriptedServer(fault_of=fault_of, most=1).running() as server:
        words = generate_words(server, prompts, out, f"--num_return_sequences={wanted}")
        words += [f"--concurrency={in_flight}", "--max_retries=100"]
        words += [f"--max_requests={4 * wanted * count}"]
        killed = 0
        with Zygote("openai_server_cases:run", {"words": words}) as zygote:
            while killed < kills:
                end = zygote.run(
                    kill_at_call=("rrhf.endpoints.ledger:Ledger.answer", 3 + killed % 9)
                )
                assert end["signal"] == signal.SIGKILL
                killed += 1
            last = zygote.run()
        assert last["exit"] == 0, last
        sets, sent = sets_of(out), len(server.bodies)
        billed = sum(server.billed.values())
    assert list(sets) == [f"question {n}" for n in range(count)]
    for query, one in sets.items():
        assert len(one.candidates) == wanted
        assert all(candidate.response.endswith(query) for candidate in one.candidates)
    assert wanted * count <= billed <= wanted * count + killed * in_flight
    assert sent <= manifest_of(out)["usage"]["requests"] <= 4 * wanted * count


def test_a_stopped_run_waits_for_answers_that_are_on_their_way(tmp_path: Path) -> None:
    prompts, out = prompts_in(tmp_path, 40), tmp_path / "o.jsonl"
    with ScriptedServer(seconds=0.5).running() as server:
        words = generate_words(server, prompts, out, "--num_return_sequences=1", "--concurrency=4")
        with Zygote("openai_server_cases:run", {"words": words}) as zygote:
            end = zygote.run(kill_after_seconds=3.0, number=signal.SIGTERM)
            assert end["exit"] == 75 and 0 < sum(server.billed.values()) < 40
            server.seconds = 0.0
            assert zygote.run()["exit"] == 0
        assert len(sets_of(out)) == 40 and set(server.billed.values()) == {1}


# Other commands


def test_response_gen_asks_a_server_and_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = prompts_in(tmp_path)
    with ScriptedServer().running() as server:
        words = ["response-gen", "a-teacher", str(tmp_path / "out"), f"--prompts={prompts}"]
        scorer = "--scorer=function:openai_server_cases:length"
        assert main([*words, scorer, *server_words(server), "--max_new_tokens=8"]) == 0
        assert "--model_name_or_path MODEL" in capsys.readouterr().out
        assert "n" in server.bodies[0] and server.bodies[0]["temperature"] == 1.0
    sets = sets_of(tmp_path / "out" / "train_data.json")
    assert all(len(one.candidates) == 4 and None not in one.scores for one in sets.values())


def test_a_server_is_evaluated_and_a_stopped_evaluation_pays_no_answer_twice(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts, out = prompts_in(tmp_path, 6), tmp_path / "rows"

    def refuse(body: dict[str, Any]) -> str:
        return "refusal" if prompt_of(body) == "question 5" else ""

    with ScriptedServer(fault_of=refuse).running() as server:
        words = ["evaluate", f"--prompts={prompts}", f"--output_dir={out}", "--max_new_tokens=8"]
        words += ["--model_name_or_path=org/teacher", *server_words(server), "--name=teacher"]
        words += ["--scorer=function:openai_server_cases:length", "--bootstrap_resamples=50"]
        assert main([*words, "--max_requests=9"]) == 2
        assert (out / "teacher.answers.jsonl").exists()
        assert main(words) == 0
        assert set(server.billed.values()) == {2}  # sampled and greedy
        assert not (out / "teacher.answers.jsonl").exists()
    for name in ("teacher", "teacher_greedy"):
        row = json.loads((out / f"{name}.json").read_text())
        assert row["metrics"]["reward"]["n"] == 5
        assert row["counts"] == row["counts"] | {
            "responses_not_given": 1,
            "prompts_without_response": 1,
        }
        assert row["usage"]["requests"] == 12
    assert "responses were not given" in caplog.text
    assert main([*words, "--dry_run"]) == 0 and "6 prompts to" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "openai", None)  # type: ignore[arg-type]
    assert main(words) == 2 and 'pip install "rrhf[openai]"' in capsys.readouterr().err
    assert not files_with("canary", tmp_path)
