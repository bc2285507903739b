"""What is not here: commands, methods and flags of other programs are told what serves."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from command_cases import COMMANDS, FLAGS, error_of

from rrhf.cli import elsewhere, words
from rrhf.cli.fields import flags_of
from rrhf.cli.main import COMMANDS as ALL_COMMANDS
from rrhf.cli.train import STAGES
from rrhf.cli.unknown import unknown
from rrhf.studies.config import MethodsConfig


def quoted_commands(sentence: str) -> list[list[str]]:
    return [
        shlex.split(text)[1:]
        for text in re.findall(r"`([^`]*)`", sentence)
        if text.startswith("rrhf ")
    ]


def require_command(line: list[str]) -> None:
    """It exists, and so do the flags that stand behind it."""
    assert line[0] in ALL_COMMANDS, line
    command = line[0]
    if command == "train" and len(line) > 1:
        meant = words.stage_meant(line[1], tuple(STAGES))
        assert meant is not None, line
        command = f"train {meant[0]}"
    flags = flags_of(MethodsConfig) if "--world" in line else FLAGS.get(command, {})
    for word in line:
        if word.startswith("--"):
            assert word.removeprefix("--") in flags, line


SENTENCES = [*elsewhere.STAGES.items(), *elsewhere.COMMANDS.items()]


@pytest.mark.parametrize(("word", "sentence"), SENTENCES, ids=[word for word, _ in SENTENCES])
def test_a_sentence_names_what_exists(word: str, sentence: str):
    assert not sentence.endswith(".") and ". " not in sentence
    for line in quoted_commands(sentence):
        require_command(line)


@pytest.mark.parametrize("word", ["ReMax", "remax", "gkd", "prm", "lora"])
def test_a_method_that_is_not_here_is_told_what_serves(
    word: str, capsys: pytest.CaptureFixture[str]
):
    for line in (["train", word], ["train", word, "--beta", "0.1"], [word]):
        told = error_of(capsys, *line)
        assert told.startswith(f"rrhf train {word}: ") and "did you mean" not in told
        assert "`rrhf train" in told and told.count("\n") == 0


@pytest.mark.parametrize("word", ["chat", "serve", "plan", "infer", "merge", "push", "quantize"])
def test_a_command_that_is_not_here_is_told_what_serves(
    word: str, capsys: pytest.CaptureFixture[str]
):
    told = error_of(capsys, word, "x", "--y")
    assert told.startswith(f"rrhf {word}: ") and "did you mean" not in told
    assert told.count("\n") == 0


def test_other_names_of_commands_run(capsys: pytest.CaptureFixture[str]):
    assert "rrhf evaluate needs also" in error_of(capsys, "eval")
    assert "rrhf response-gen needs also" in error_of(capsys, "response_gen")
    assert "rrhf data validate needs also" in error_of(capsys, "validate")
    for word, (command, *_) in words.COMMAND_WORDS.items():
        assert command in ALL_COMMANDS and word not in ALL_COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flag_of_another_program_is_told_what_serves(command: str):
    flags, silent = FLAGS[command], []
    taken = words.spelt_out(flags)
    for word in elsewhere.FLAGS:
        if word in taken:
            continue
        if not (served := elsewhere.replacement_for(word, flags)):
            silent.append(word)
            continue
        assert elsewhere.flags_named(served) <= set(flags), (word, served)
        for line in quoted_commands(served):
            require_command(line)
        told = unknown(f"--{word}", flags, "rrhf x", mark="--")
        assert told == f"rrhf x: unknown flag --{word}: {served}." and "did you mean" not in told
    never = {"load_in_4bit", "load_in_8bit", "push_to_hub", "deepspeed", "num_gpus"}
    assert never.isdisjoint(silent)


@pytest.mark.parametrize(
    ("command", "words_", "parts"),
    [
        ("train sft", ["--load_in_4bit"], ["--use_lora"]),
        ("generate", ["--load_in_4bit", "true"], ["--bf16 halves"]),
        ("train ppo", ["--deepspeed", "ds.json"], ["ppo.sh", "deepspeed_config_file"]),
        ("train rank", ["--deepspeed=ds.json"], ["train.sh", "deepspeed_config_file"]),
        ("train sft", ["--deepspeed=ds.json"], ["accelerate launch"]),
        ("train sft", ["--push_to_hub"], ["hf upload"]),
        ("train ppo", ["--loss_type", "grpo"], ["--method"]),
        ("train rank", ["--loss_type", "sigmoid"], ["--objective", "rrhf train reward"]),
        ("train ppo", ["--beta", "0.1"], ["--kl_coeff"]),
        ("train iterative", ["--eval_strategy", "steps"], ["every round"]),
        ("train sft", ["--warmup_steps", "10"], ["--warmup_ratio"]),
        ("train sft", ["--fp16"], ["--bf16"]),
        (
            "train ppo",
            ["--critic_recompute"],
            ["--gradient_checkpointing covers policy and critic"],
        ),
        ("train sft", ["--critic_recompute"], ["no critic", "--gradient_checkpointing"]),
    ],
)
def test_what_is_said_of_flags_that_people_bring(
    command: str, words_: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
):
    told = error_of(capsys, *command.split(), *words_)
    for part in parts:
        assert part in told


def test_all_unknown_names_are_told_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    told = error_of(capsys, "train", "sft", "--fp16", "--lerning_rate", "3", "--a", "b", "--zzzz")
    assert [re.findall(r"--\w+", line)[0] for line in told.splitlines()] == [
        "--fp16",
        "--lerning_rate",
        "--a",
        "--zzzz",
    ]
    (tmp_path / "c.json").write_text('{"sharding": "stage1", "bf16": 1, "do_train": 1, "x_y": 2}')
    told = error_of(capsys, "train", "ppo", str(tmp_path / "c.json"))
    assert re.findall(r"unknown key (\w+)", told) == ["sharding", "do_train", "x_y"]
