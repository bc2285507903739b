"""Wombat's recipe: responses of a policy and two teachers, judged, trained on and evaluated."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai_server_cases import sets_of
from scripted_judge import judge
from scripted_server import ScriptedServer
from tiny import byte_level_tokenizer, tiny_llama
from vllm_real import PYTHON, real_server, save_head_dim_32

from rrhf.cli.main import main

SERVING = "RRHF_SERVING_PYTHON"
START_SECONDS = 120.0


def grade(conversation: str, reply: str) -> int:
    """The judge's taste, 1 to 5: the share of letters that are an e."""
    return 1 + min(int(5 * reply.count("e") / max(len(reply), 1)), 4)


def model_in(folder: Path, seed: int) -> Path:
    tokenizer = byte_level_tokenizer(chat=True)
    tiny_llama(len(tokenizer), seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def scripted(folder: Path, names: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """(address, model) of servers that repeat one word."""
    with ExitStack() as opened:
        found = []
        for name, word in zip(names, ("eee ", "o e "), strict=True):
            server = ScriptedServer(answer=lambda body, number, word=word: word * 4)
            found.append((opened.enter_context(server.running()).url, name))
        yield found


@contextmanager
def served(folder: Path, names: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """(address, model) of servers of tiny models by `transformers serve`."""
    python = os.environ.get(SERVING)
    if not python:
        pytest.skip(f"{SERVING} does not name a Python that has transformers[serving]")
    with ExitStack() as opened:
        found = []
        for seed, name in enumerate(names):
            model = model_in(folder / name, seed + 1)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            words = [python, "-m", "transformers.cli.transformers", "serve", str(model)]
            words += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
            clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            log = opened.enter_context(open(folder / f"{name}.log", "wb"))
            process = subprocess.Popen(
                words, env=clean | {"HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log, cwd=folder
            )
            opened.callback(process.wait, 30)
            opened.callback(process.kill)
            found.append((f"http://127.0.0.1:{port}", str(model)))
        for address, _ in found:
            _wait_for(f"{address}/health", folder)
        yield [(f"{address}/v1", model) for address, model in found]


@contextmanager
def served_by_both(folder: Path, names: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """As `served`, the second one by vLLM."""
    if not PYTHON:
        pytest.skip("RRHF_VLLM_PYTHON names no Python of an environment with vLLM")
    first, second = names
    model = save_head_dim_32(folder / second)
    byte_level_tokenizer(chat=True).save_pretrained(model)
    with (
        served(folder, [first]) as found,
        real_server(model, folder / "vllm.log", more=("--max_model_len", "256")) as vllm,
    ):
        with urllib.request.urlopen(f"{vllm.url}/v1/models", timeout=10) as told:
            name = json.load(told)["data"][0]["id"]
        yield [*found, (f"{vllm.url}/v1", name)]


def _wait_for(address: str, folder: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
            assert time.monotonic() < until, f"no server at {address}:\n{logs}"
            time.sleep(0.2)


@pytest.mark.parametrize(
    "servers",
    [scripted, *(pytest.param(one, marks=pytest.mark.slow) for one in (served, served_by_both))],
)
def test_responses_of_two_teachers_are_judged_trained_on_and_evaluated(
    servers: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*words: object) -> None:
        assert main([str(word) for word in words]) == 0, words

    monkeypatch.chdir(tmp_path)

    for name in ("train", "heldout"):
        rows = ({"prompt": f"Human: say {name} {number}"} for number in range(8))
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    policy, path = model_in(tmp_path / "sft", 0), tmp_path / "policy.jsonl"
    sampling = ("--max_new_tokens=12", "--num_return_sequences=1", "--keep_candidates")
    generate = ("generate", *sampling, "--model_name_or_path")
    run(*generate, policy, "--prompts", tmp_path / "train.jsonl", "--output_file", path)
    with servers(tmp_path, ("first", "second")) as found:
        for (url, model), api in zip(found, ("chat", "completions"), strict=True):
            words = ("--engine", "openai_server", "--base_url", url, "--api", api)
            output = tmp_path / f"with_{api}.jsonl"
            run(*generate, model, "--prompts", path, "--output_file", output, *words)
            path = output
    authors = ["policy:sft", *(f"teacher:{model}" for _, model in found)]
    for one in sets_of(path).values():
        assert [c.source for c in one.candidates] == authors
        assert len({c.response for c in one.candidates}) == 3
    scored = tmp_path / "scored.jsonl"
    with judge(grade).running() as judging:
        asked = f"#model=judge#base_url={judging.url}"
        run("score", path, scored, f"--scorer=judge:wombat{asked}")
    assert len(judging.bodies) == 9  # eight lists, and the example
    run(
        *("train", "rank", "--model_name_or_path", policy, "--data_path", scored),
        *("--output_dir", tmp_path / "run", "--learning_rate=1e-2", "--num_train_epochs=12"),
        *(
            "--per_device_train_batch_size=4",
            "--gradient_accumulation_steps=1",
            "--model_max_length=128",
        ),
    )
    with judge(grade).running() as judging:
        run(
            *("evaluate", "--model_name_or_path", tmp_path / "run", "--baseline", policy),
            *("--prompts", tmp_path / "heldout.jsonl", "--output_dir", tmp_path / "rows"),
            *("--max_new_tokens=12", "--bootstrap_resamples=50", "--name=trained"),
            f"--scorer=judge:rubric#model=judge#base_url={judging.url}",
        )
    rows = {
        path.stem: json.loads(path.read_text())["metrics"]["reward"]["mean"]
        for path in (tmp_path / "rows").glob("*.json")
        if "manifest" not in path.name
    }
    # The scripted teachers' words are learnt; what two random models say may be hard to learn.
    assert rows["trained"] > (rows["sft"] + 0.5 if servers is scripted else -1)
