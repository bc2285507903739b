"""Engines by name and by import path: their promises, and what is said where one lacks some."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import CannedTexts
from places import TESTS
from ppo_cases import build_world
from rollout_cases import prompts, writer
from tiny import byte_level_tokenizer, tiny_llama

from rrhf.cli.main import main
from rrhf.data.candidate_files import read_candidate_sets
from rrhf.data.chat_format import ChatCodec
from rrhf.errors import UserError
from rrhf.generation.build import ENGINES
from rrhf.generation.engine import Capabilities, Sample, SamplingParams, answers
from rrhf.generation.local.engine import LocalEngine
from rrhf.records import CandidateSet

CANNED = "engine_cases:CANNED"
TWO = SamplingParams(num_return_sequences=2, max_new_tokens=4)
SETS = [CandidateSet(str(place), "Human: Hi\n\nAssistant:") for place in range(3)]


def generate(folder: Path, *words: str) -> int:
    places = ["--prompts", str(folder / "in.jsonl"), "--output_file", str(folder / "o.jsonl")]
    return main(["generate", *places, "--model_name_or_path", "a-teacher", *words])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"prompt": word} for word in ("one", "two", "three " * 50)]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


def test_an_engine_of_texts_alone_writes_a_candidate_file(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert generate(folder, "--engine", CANNED, "--text", "Ask a friend.") == 0
    sets = list(read_candidate_sets(folder / "o.jsonl"))
    assert [s.query for s in sets] == ["one", "two"]
    assert [(c.response, c.source) for c in sets[0].candidates] == [
        ("Ask a friend.", "policy:a-teacher")
    ] * 4
    manifest = json.loads((folder / "o.manifest.json").read_text())
    assert manifest["engine"] == f"{CANNED}:a-teacher"
    assert manifest["settings"]["engine_described"]["texts"] == ["Ask a friend."]
    assert manifest["dropped_prompts"] == {"refused by the engine canned": 1}
    assert manifest["samples"] == 8 and "tokens" not in manifest
    assert manifest["tokens_per_engine_second"] is None
    assert "tokens each" not in caplog.text
    assert generate(folder, "--engine", CANNED, "--text", "Else.") == 2  # another engine, in effect


def test_an_engine_in_a_file_of_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (TESTS / "engine_cases.py").read_text()
    (folder / "my_engine.py").write_text(source.replace("You could ask a friend.", "Mine."))
    monkeypatch.chdir(folder)
    assert generate(folder, "--engine", "my_engine:CANNED") == 0
    texts = {c.response for s in read_candidate_sets(folder / "o.jsonl") for c in s.candidates}
    assert texts == {"Mine."}
    sys.modules.pop("my_engine")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--engine", CANNED, "--num_beams=4", "--do_sample=false"], "does not offer beam search"),
        (["--engine", "lokal"], "unknown engine 'lokal': choose one of local, vllm, openai_server"),
        (["--engine", "json:loads"], "every engine is a rrhf.generation.build.EngineSpec"),
        (["--text", "x"], "--text"),
        (["--engine", "local"], "a-teacher: no such model folder"),
    ],
)
def test_what_an_engine_lacks_is_one_message(
    folder: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(folder, *words) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and told in said
    assert not list(folder.glob("o.jsonl*"))


class Broken(CannedTexts):
    """Keeps none of its promises; which, says `fault`."""

    def __init__(self, fault: str) -> None:
        super().__init__("a")
        self.fault = fault
        if fault == "ids":
            self.capabilities = Capabilities(ids=True)  # type: ignore[misc]
        if fault == "logprobs":
            self.capabilities = Capabilities(logprobs=True)  # type: ignore[misc]

    def generate(self, *words: Any) -> Iterator[tuple[int, list[Sample]]]:
        found = list(super().generate(*words))
        if self.fault == "fewer":
            found[1] = (found[1][0], found[1][1][:1])
        if self.fault == "missing":
            del found[0]
        if self.fault == "twice":
            found[1] = found[0]
        if self.fault == "strange":
            found[0] = (7, found[0][1])
        return iter(found)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("fewer", "gave 1 responses to prompt 1, but 2 were requested"),
        ("missing", "left 1 of 3 prompts without a response"),
        ("twice", "answered prompt 2 of 3 twice"),
        ("strange", "answered prompt 7 of 3"),
        ("ids", "promises token ids"),
        ("logprobs", "promises log-probs"),
    ],
)
def test_an_engine_is_held_to_its_promises(fault: str, told: str) -> None:
    with pytest.raises(UserError, match=f"engine canned: {told}"):
        answers(Broken(fault), SETS, TWO)


def test_answers_are_in_the_order_of_the_prompts_whatever_order_they_come_in() -> None:
    engine = CannedTexts("a", "b")
    assert [place for place, _ in engine.generate(SETS, TWO)] == [2, 1, 0]
    assert [[one.text for one in samples] for samples in answers(engine, SETS, TWO)] == [
        ["a", "b"]
    ] * 3
    assert answers(engine, [], TWO) == []


def local() -> LocalEngine:
    tokenizer = byte_level_tokenizer()
    return LocalEngine(tiny_llama(len(tokenizer)), ChatCodec(tokenizer), max_batch_rows=2)


def test_the_local_engine_tells_the_ids_that_it_read_and_encodes_each_prompt_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = local()
    plain, calls = engine.codec.encode_prompt, []

    def counted(prompt: CandidateSet, *words: Any) -> Any:
        calls.append(prompt.id)
        return plain(prompt, *words)

    monkeypatch.setattr(engine.codec, "encode_prompt", counted)
    found = answers(engine, SETS, TWO)
    assert calls == ["0", "1", "2"]
    assert all(one.prompt_ids == plain(SETS[0]) for samples in found for one in samples)


def test_between_two_answers_of_the_local_engine_gradients_are_as_the_caller_has_them() -> None:
    engine = local()
    found = engine.generate(SETS, TWO)
    for _ in range(3):
        next(found)
        assert torch.is_grad_enabled()
    assert not list(found)
    with torch.no_grad():
        assert answers(engine, SETS[:1], TWO)
        assert not torch.is_grad_enabled()


def test_after_its_answers_the_model_is_in_the_mode_that_it_was_in() -> None:
    engine = local()
    engine.model.train()
    answers(engine, SETS, TWO)
    assert engine.model.training
    found = engine.generate(SETS, TWO)
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert engine.model.training


# Rollouts


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


def test_a_rollout_says_all_that_an_engine_lacks(world: Path) -> None:
    with pytest.raises(UserError) as told:
        writer(world, new_engine=lambda *_: CannedTexts("a"))
    assert str(told.value).startswith(
        "engine canned: does not offer token ids, log-probs of sampled tokens, the live weights of "
        "a policy in training, which a rollout needs"
    )


class Reversed(LocalEngine):
    """Another engine: the last prompt first, and every other response cut by half."""

    def generate(self, *words: Any) -> Iterator[tuple[int, list[Sample]]]:
        for place, samples in reversed(list(super().generate(*words))):
            half = [replace(s, token_ids=s.token_ids[:1], logprobs=s.logprobs[:1]) for s in samples]
            yield place, half if place % 2 else samples


def test_a_rollout_takes_any_engine_that_has_what_it_needs(world: Path) -> None:
    plain = writer(world).write(prompts(world), number=0)
    found = writer(world, new_engine=Reversed).write(prompts(world), number=0)
    for ours, theirs in zip(found.rows, plain.rows, strict=True):
        assert (ours.prompt, ours.prompt_ids) == (theirs.prompt, theirs.prompt_ids)
        kept = 1 if ours.prompt % 2 else len(theirs.token_ids)
        assert ours.token_ids == theirs.token_ids[:kept]


def test_a_rollout_encodes_no_prompt_again(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = writer(world)
    plain, calls = made.codec.encode_prompt, []

    def counted(prompt: CandidateSet, *words: Any) -> Any:
        calls.append(prompt.id)
        return plain(prompt, *words)

    monkeypatch.setattr(made.codec, "encode_prompt", counted)
    asked = prompts(world)
    made.write(asked, number=0)
    assert sorted(calls) == sorted(prompt.id for prompt in asked)


def test_engines_are_listed() -> None:
    assert list(ENGINES) == ["local", "vllm", "openai_server"] and ENGINES["local"].has_model
    assert local().describe()["engine"] == "local"
