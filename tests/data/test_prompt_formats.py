"""What reaches a model of a prompt that is no conversation: in the template, as it is, and told."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_level_tokenizer, save_tiny, sentencepiece_like_tokenizer

from rrhf.cli.main import main
from rrhf.data.candidate_files import read_candidate_sets
from rrhf.data.chat_format import ChatCodec
from rrhf.data.mixing import load_sets
from rrhf.data.prompt_text import prompt_text
from rrhf.generation.local.engine import LocalEngine
from rrhf.generation.local.row_loop import Job, Written
from rrhf.manifests import read_manifest
from rrhf.models.loading import load_causal_lm
from rrhf.records import CandidateSet, Message, plain_prompt, set_id

torch.set_num_threads(1)

ASKED = "how do I keep plants alive?"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """A model without, and one with a chat template."""
    folder = tmp_path_factory.mktemp("models")
    return {chat: str(save_tiny(folder / f"chat-{chat}", chat=chat)) for chat in (False, True)}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def generate(model: str, prompts: str, output: Path, *flags: str) -> list[CandidateSet]:
    given = ["--model_name_or_path", model, "--prompts", prompts, "--output_file", str(output)]
    assert main(["generate", *given, "--max_new_tokens", "3", *flags]) == 0
    return list(read_candidate_sets(output))


# Plain prompts.


@pytest.mark.parametrize("chat", [False, True])
def test_a_plain_prompt_is_a_turn_where_there_is_a_template_and_else_as_it_is(chat: bool) -> None:
    codec = ChatCodec(byte_level_tokenizer(chat=chat, bos=False))
    prompt = plain_prompt(ASKED)
    turn = CandidateSet("id", "unused", (Message("user", ASKED),))
    text = CandidateSet("id", ASKED)
    assert codec.prompt_text(prompt) == codec.prompt_text(turn if chat else text)
    assert codec.encode_prompt(prompt) == codec.encode_prompt(turn if chat else text)
    for chat_format in ("raw", "hh", "alpaca"):  # as if nothing but the text were known
        told = ChatCodec(byte_level_tokenizer(chat=chat, bos=False), chat_format)
        assert told.prompt_text(prompt) == told.prompt_text(text)
        assert told.response_text(prompt, "x") == told.response_text(text, "x")


def test_the_id_of_a_plain_prompt_is_that_of_its_text() -> None:
    """So that the same prompts are drawn the same responses as when only their text was known."""
    assert plain_prompt(ASKED).id == set_id(ASKED) != set_id(ASKED, (Message("user", "other"),))
    assert not CandidateSet("id", ASKED, (Message("system", ASKED),)).is_plain


@pytest.mark.parametrize(
    ("chat", "row", "told"),
    [
        (True, {"prompt": ASKED}, "1 of 1 prompts are plain text: each becomes a user's turn"),
        (False, {"prompt": ASKED}, "plain text and go to the model as they are"),
        (True, {"query": ASKED}, "without its chat template (--chat_format chat_template"),
        (False, {"query": ASKED}, None),
        (True, {"prompt": [{"role": "user", "content": ASKED}]}, None),
    ],
)
def test_how_prompts_are_sent_is_told_in_one_line(
    chat: bool,
    row: dict[str, Any],
    told: str | None,
    models: dict[bool, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = write(tmp_path / "prompts.jsonl", row)
    with caplog.at_level("INFO", logger="rrhf"):
        generate(models[chat], path, tmp_path / "out.jsonl")
    lines = [line for line in caplog.messages if " prompts are " in line]
    assert len(lines) == (told is not None)
    assert told is None or (told in lines[0] and lines[0].startswith(f"{path}: "))
    caplog.clear()
    with caplog.at_level("INFO", logger="rrhf"):  # who chose a format is not told of it
        generate(models[chat], path, tmp_path / "raw.jsonl", "--chat_format", "raw")
    assert " prompts are " not in caplog.text


def test_what_was_sampled_in_a_template_is_trained_on_in_it(
    models: dict[bool, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The candidate file keeps that the prompt is plain."""
    path = write(tmp_path / "prompts.jsonl", {"prompt": ASKED})
    [found] = generate(models[True], path, tmp_path / "out.jsonl")
    assert found.is_plain and found.query == ASKED
    codec = ChatCodec(byte_level_tokenizer(chat=True))
    assert "<|start|>user" in codec.prompt_text(found)
    rows = write(tmp_path / "sft.jsonl", {"prompt": ASKED, "response": "ask a friend"})
    given = ["--model_name_or_path", models[True], "--data_path", rows]
    with caplog.at_level("INFO", logger="rrhf"):
        out = ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--save_steps", "0"]
        assert main(["train", "sft", *given, *out, "--model_max_length", "100"]) == 0
    assert f"{rows}: 1 of 1 prompts are plain text: each becomes a user's turn" in caplog.text


# Prompts that are cut or ask nothing.


def test_prompts_cut_or_empty_are_counted_and_told(
    models: dict[bool, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"query": ASKED}, {"query": "plants " * 60}, {"query": " "}]
    path = write(tmp_path / "prompts.jsonl", *rows)
    with caplog.at_level("INFO", logger="rrhf"):
        generate(models[False], path, tmp_path / "out.jsonl", "--max_prompt_tokens", "40")
    manifest = read_manifest(tmp_path / "out.jsonl")
    assert manifest is not None
    assert (manifest["prompts_cut"], manifest["prompts_empty"]) == (1, 1)
    assert "1 of 3 prompts are longer than 40 tokens and lose their beginning" in caplog.text
    assert "1 of 3 prompts ask nothing" in caplog.text


def test_a_prompt_that_fits_to_the_token_is_not_cut(
    models: dict[bool, str], tmp_path: Path
) -> None:
    codec = ChatCodec(byte_level_tokenizer())
    length = len(codec.encode_prompt(plain_prompt(ASKED)) or ())
    path = write(tmp_path / "prompts.jsonl", {"prompt": ASKED})
    for room, cut in ((length, 0), (length - 1, 1)):
        output = tmp_path / f"{room}.jsonl"
        generate(models[False], path, output, "--max_prompt_tokens", str(room))
        assert (read_manifest(output) or {})["prompts_cut"] == cut


@pytest.mark.parametrize("row", [{"prompt": " "}, {"question": "", "answer": "a"}])
def test_a_row_that_asks_nothing_is_left_out_and_counted(
    row: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "data.jsonl", row, {name: "a" for name in row})
    assert main(["data", "validate", path]) == 0
    assert "good, 1 of 2 rows; left out: 1 empty_prompt" in capsys.readouterr().out


# A prompt in place of a file.


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("How do I boil an egg?", "How do I boil an egg?"),
        ("First this, then that, please", "First this, then that, please"),
        ("text:Hello", "Hello"),
        ("tell me of /etc/hosts, alpaca", "tell me of /etc/hosts, alpaca"),
        ("Hello, world", "Hello, world"),
        ("Yes, no, maybe", "Yes, no, maybe"),
        ("alpaca", None),
        ("alpaca:0.5, rm-static", None),
        ("alpacca, rm-static", None),
        ("alpacca:0.5, helpful_harmles", None),
        ("rm-static, mine", None),
        ("some/thing, other/thing", None),
        ("no such file.jsonl", None),
        ("./my prompts", None),
        ("some/thing", None),
    ],
)
def test_what_is_a_prompt_and_what_names_data(spec: str, text: str | None) -> None:
    assert prompt_text(spec) == text


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "my prompts", {"prompt": "p"})
    assert prompt_text("my prompts") is None


@pytest.mark.parametrize("chat", [False, True])
def test_generate_answers_a_prompt_of_the_command_line(
    chat: bool, models: dict[bool, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = "How do I boil an egg, please?"
    [found] = generate(models[chat], asked, tmp_path / "out.jsonl")
    assert found.query == asked and len(found.candidates) == 4
    shown = capsys.readouterr().out
    assert all(f"[{i}] {c.response}" in shown for i, c in enumerate(found.candidates, start=1))


@pytest.mark.parametrize(
    "asked", ["Hello", "what is in my file.jsonl", "alpacca, rm-static", "a:b"]
)
def test_what_names_nothing_says_how_a_prompt_is_given(
    asked: str, models: dict[bool, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model_name_or_path", models[False], "--output_file", str(tmp_path / "o.jsonl")]
    assert main(["generate", *given, "--prompts", asked]) == 2
    said = capsys.readouterr().err.strip()
    words = shlex.split(said.rpartition("a prompt itself is given as ")[2])
    assert words == ["--prompts", f"text:{asked}"]
    assert prompt_text(words[1]) == asked


@pytest.mark.parametrize("words", [["evaluate", "--prompts"], ["train", "ppo", "--prompts"]])
def test_a_text_where_data_are_named_says_how_it_becomes_a_file(
    words: list[str],
    models: dict[bool, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--model_name_or_path", models[False], "--output_dir", "out"]
    given += ["--scorer" if "evaluate" in words else "--reward_model", "gold:help_desk"]
    asked = r"What's this \n\c, then? 100 %s"
    assert main([*words, asked, *given]) == 2
    command = capsys.readouterr().err.strip().rpartition("and name that: ")[2]
    subprocess.run(command, shell=True, check=True)
    [found] = load_sets("prompts.txt")
    assert found.query == asked


# Responses that end inside a character.


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_like_tokenizer])
@pytest.mark.parametrize("text", ["see \u65e5\u672c", "see \U0001f642"])
def test_a_response_that_ends_inside_a_character_ends_before_it(make: Any, text: str) -> None:
    codec = ChatCodec(make(), "raw")
    prompt = CandidateSet("id", "a")
    ids = codec.encode_response(prompt, text, "length")
    whole = codec.decode_response(prompt, ids)
    assert whole == text
    for missing in (1, 2):
        cut = codec.decode_response(prompt, ids[:-missing])
        assert cut == text[:-1], "the bytes of the last character are not all there"


def test_a_sample_is_cut_before_half_a_character_and_at_its_stop_string(
    models: dict[bool, str],
) -> None:
    codec = ChatCodec(byte_level_tokenizer(), "hh")
    engine = LocalEngine(load_causal_lm(models[False]), codec)
    prompt = CandidateSet("id", "\n\nHuman: a\n\nAssistant:", (Message("user", "a"),))
    for text, stops, expected in (
        ("see \u65e5", (), "see "),
        ("ab STOP cd \u65e5", ("STOP",), "ab "),
        ("\u65e5", (), ""),
        ("ENDING", (" END",), ""),  # with the blank that the format puts before a response
    ):
        ids = codec.encode_response(prompt, text, "length")[:-1]
        written = Written(torch.tensor(ids), torch.zeros(len(ids)), "length")
        sample = engine._sample_of(Job(prompt, [1], stops, 1), written)
        assert sample.text == expected
        assert stops or sample.token_ids.tolist() == ids  # what was sampled is trained on
