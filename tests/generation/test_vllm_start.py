"""`rrhf engine vllm start`: the command that it prints and runs, by a program in vLLM's place."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny

from rrhf.cli.main import main
from rrhf.errors import UserError
from rrhf.generation.vllm import start
from rrhf.generation.vllm.start import (
    HOST,
    ServerCommand,
    StartVLLMConfig,
    free_port,
    server_command,
)
from rrhf.models.loading import load_causal_lm, load_tokenizer
from rrhf.models.untied import MARKER, write_untied_folder

FAKE = """#!/bin/sh
[ "$1" = -c ] && exit 0
echo "$VLLM_SERVER_DEV_MODE $VLLM_CPU_KVCACHE_SPACE" > {seen}
for word in "$@"; do echo "$word" >> {seen}; done
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("start") / "model")


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A program that says it has vLLM, and notes how it is called."""
    path = tmp_path / "fake python"
    path.write_text(FAKE.format(seen=tmp_path / "seen"))
    path.chmod(0o755)
    return path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, fake: Path) -> list[ServerCommand]:
    """The commands that were run: in a new process instead of this one, on a machine without a
    GPU."""
    found: list[ServerCommand] = []

    def run(command: ServerCommand) -> None:
        found.append(command)
        subprocess.run(command.words, env={**os.environ, **command.environment}, check=True)

    monkeypatch.setattr(start, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("RRHF_VLLM_PYTHON", str(fake))
    return found


def test_the_printed_command_is_run_with_an_untied_copy(
    model: Path,
    fake: Path,
    started: list[ServerCommand],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "copy"
    words = ["engine", "vllm", "start", str(model), "--served_folder", str(copy)]
    words += ["--max_model_len", "64", "--port", "8123"]
    assert main(words) == 0 and len(started) == 1
    variables, *seen = (tmp_path / "seen").read_text().splitlines()
    assert variables == "1 1"
    assert seen[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    given = dict(zip(seen[2::2], seen[3::2], strict=False))
    assert given["--model"] == str(copy) and given["--host"] == "127.0.0.1"
    assert given["--port"] == "8123" and given["--max-model-len"] == "64"
    assert given["--dtype"] == "float32" and given["--logprobs-mode"] == "raw_logprobs"
    assert {"--enforce-eager", "--no-enable-chunked-prefill"} <= set(seen)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("VLLM_SERVER_DEV_MODE=1 ") and f"'{fake}' -m" in first
    assert "--engine vllm --base_url http://127.0.0.1:8123" in second
    plain, served = load_causal_lm(model), load_causal_lm(copy)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(plain(ids).logits, served(ids).logits)
    assert served.lm_head.weight is not served.model.embed_tokens.weight
    assert load_tokenizer(copy)("a b").input_ids == load_tokenizer(model)("a b").input_ids


def test_only_an_earlier_copy_is_replaced(
    model: Path, started: list[ServerCommand], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    words = ["engine", "vllm", "start", str(model), "--max_model_len", "64", "--served_folder"]
    assert main([*words, str(mine)]) == 0, "an empty folder"
    assert main([*words, str(mine)]) == 0, "an earlier copy"
    (mine / MARKER).unlink()
    (mine / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("work")
    for place in (mine, model, tmp_path / "file"):
        before = sorted(place.iterdir()) if place.is_dir() else place.read_bytes()
        assert main([*words, str(place)]) == 2
        assert f"{place}: exists, and is not a copy" in capsys.readouterr().err
        assert before == (sorted(place.iterdir()) if place.is_dir() else place.read_bytes())
    assert len(started) == 2


def test_a_model_that_shares_no_weights_is_served_as_it_is(
    model: Path, fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untied = tmp_path / "untied"
    write_untied_folder(untied, load_causal_lm(model))
    words = ["engine", "vllm", "start", str(untied), "--python", str(fake), "--dry_run"]
    assert main([*words, "--max_model_len", "128"]) == 0
    assert f"--model {untied} " in capsys.readouterr().out
    assert not (tmp_path / "seen").exists()


def test_a_gpu_is_shared_and_needs_no_flags_of_cpus(model: Path, fake: Path) -> None:
    config = StartVLLMConfig(str(model), max_model_len=64, gpu_memory_utilization=0.25)
    command = server_command(config, str(fake), has_gpu=True)
    assert "--enforce-eager" not in command.words
    place = command.words.index("--gpu-memory-utilization")
    assert command.words[place + 1] == "0.25"
    assert "VLLM_CPU_KVCACHE_SPACE" not in command.environment


def test_a_taken_port_is_not_chosen() -> None:
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # another program has it
            taken.bind((HOST, 8000))
        assert free_port() not in (0, 8000)
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: another program"):
            free_port(port)
    assert free_port(port) == port
    with pytest.raises(UserError, match="port 70000"):
        StartVLLMConfig("model", port=70000)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["start", "{model}", "--python", "no-such-python"], "there is no such program; install"),
        (["start", "{model}", "--python", sys.executable], "this Python has no vLLM; install"),
        (
            ["start", "{model}", "--python", "{fake}"],
            "1024: the model supports 128",
        ),
        (["start", "{fake}", "--python", "{fake}"], "fake python"),
        (["stop"], "unknown action 'stop'"),
        ([], "no action given"),
    ],
)
def test_mistakes_are_told(
    model: Path, fake: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    given = [word.format(model=model, fake=fake) for word in words]
    assert main(["engine", "vllm", *given]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_served_copy_has_the_policys_log_probs_at_the_temperature(
    model: Path, tmp_path: Path, temperature: float
) -> None:
    plain = load_causal_lm(model)
    write_untied_folder(tmp_path / "copy", plain, temperature)
    assert plain.config.tie_word_embeddings
    assert not json.loads((tmp_path / "copy" / "config.json").read_text())["tie_word_embeddings"]
    ids: Any = torch.tensor([[5, 6, 7]])
    logits = load_causal_lm(tmp_path / "copy")(ids).logits
    torch.testing.assert_close(logits, plain(ids).logits / temperature)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
