"""`rrhf train ppo` with bad input: one message, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ppo_cases import build_world, save_reward_model
from trainer_cases import metrics_of, write_lines

from rrhf.cli.main import main


def raises(prompts: Sequence[str], responses: Sequence[str], messages: Any) -> list[float]:
    raise ZeroDivisionError("of all things")


def gives_nan(prompts: Sequence[str], responses: Sequence[str], messages: Any) -> list[float]:
    return [math.nan for _ in responses]


def gives_too_few(prompts: Sequence[str], responses: Sequence[str], messages: Any) -> list[float]:
    return [1.0]


def prompt(text: str) -> dict[str, Any]:
    """A turn is never cut."""
    return {"query": text, "messages": [{"role": "user", "content": text}], "responses": []}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside what the other tests have: a reward model with another vocabulary, bad prompts."""
    folder = build_world(tmp_path_factory.mktemp("world"))
    save_reward_model(folder / "other_reward", vocab_size=300)
    (folder / "empty.jsonl").write_text("")
    long, short = [prompt("word " * 200)] * 3, [prompt(f"Say {number}.") for number in range(4)]
    write_lines(folder / "long.jsonl", long)
    write_lines(folder / "some_long_hh.jsonl", [*long, *short])
    texts = [{"query": row["query"], "responses": []} for row in (*long, *short)]
    write_lines(folder / "some_long_raw.jsonl", texts)
    return folder


def command(world: Path, output_dir: Path, **changes: Any) -> list[str]:
    flags = {
        "model_name_or_path": world / "model",
        "output_dir": output_dir,
        "train_datasets": world / "prompts.jsonl",
        "reward_model_name_or_path": world / "reward",
        "rollout_size": 4,
        "num_rollouts": 1,
        "max_new_tokens": 4,
        "model_max_length": 100,
        "per_device_train_batch_size": 4,
        "chat_format": "raw",
        **changes,
    }
    return [
        "train",
        "ppo",
        *(word for name, value in flags.items() for word in (f"--{name}", str(value))),
    ]


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a reward model without a head": (
        {"reward_model_name_or_path": "{world}/model"},
        ["{world}/model", "not a reward model"],
    ),
    "no reward model there": (
        {"reward_model_name_or_path": "{world}/nothing"},
        ["{world}/nothing"],
    ),
    "no model there": ({"model_name_or_path": "{world}/nothing"}, ["{world}/nothing"]),
    "all prompts too long": (
        {"train_datasets": "{world}/long.jsonl", "chat_format": "hh"},
        ["no prompt is left of 3", "--model_max_length"],
    ),
    "held-out prompts too long": (
        {"eval_datasets": "{world}/long.jsonl", "chat_format": "hh"},
        ["long.jsonl", "no prompt is left of 3"],
    ),
    "an empty prompt file": ({"train_datasets": "{world}/empty.jsonl"}, ["empty.jsonl", "no rows"]),
    "no prompt file": ({"train_datasets": "{world}/nothing.jsonl"}, ["{world}/nothing.jsonl"]),
    "a window beyond the model's": ({"model_max_length": 100000}, ["--model_max_length 100000"]),
    "no temperature": ({"temperature": 0}, ["temperature", "0.0", "above 0"]),
    "a negative temperature": ({"temperature": -1}, ["temperature", "-1.0"]),
    "one response to compare": (
        {"method": "grpo", "num_return_sequences": 1},
        ["--method grpo", "--num_return_sequences to 2"],
    ),
    "a critic with another vocabulary": (
        {"reward_critic_model_name_or_path": "{world}/other_reward"},
        ["{world}/other_reward", "share the policy's vocabulary"],
    ),
    "a function and no critic": (
        {
            "reward_model_name_or_path": "function:test_ppo_bad_input:gives_nan",
            "share_trunk": "false",
        },
        ["--reward_critic_model_name_or_path", "--share_trunk"],
    ),
    "a scorer that raises": (
        {"reward_model_name_or_path": "function:test_ppo_bad_input:raises", "share_trunk": "true"},
        ["function:test_ppo_bad_input:raises", "ZeroDivisionError: of all things", "test_ppo_bad_"],
    ),
    "a scorer that gives NaN": (
        {
            "reward_model_name_or_path": "function:test_ppo_bad_input:gives_nan",
            "share_trunk": "true",
        },
        ["4 of 4 responses could not be scored", "--max_unscored_fraction"],
    ),
    "a scorer that gives too few": (
        {
            "reward_model_name_or_path": "function:test_ppo_bad_input:gives_too_few",
            "share_trunk": "true",
        },
        ["returned 1 results for 4 responses"],
    ),
    "no such function": (
        {"reward_model_name_or_path": "function:test_ppo_bad_input:nobody"},
        ["nobody"],
    ),
    "a stop token that is none": ({"truncate_token": "no such token"}, ["--truncate_token"]),
    "a measure that no evaluation has": (
        {"eval_datasets": "{world}/prompts.jsonl", "metric_for_best_model": "bleu"},
        ["--metric_for_best_model bleu", "score"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_one_message(
    name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, words = BAD[name]
    placed = {key: str(value).format(world=world) for key, value in changes.items()}
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    for output_dir in (tmp_path / "run", tmp_path / "kept"):
        assert main(command(world, output_dir, **placed)) == 2
        told = capsys.readouterr().err
        assert told.count("error: ") == 1 and "Traceback" not in told
        message = told[told.index("error: ") :]
        for word in words:
            assert word.format(world=world) in message, message
    assert not (tmp_path / "run").exists()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["notes.txt"]
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before


def test_some_prompts_that_are_too_long_are_counted(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = {"hh": "3 of 7 prompts left out", "raw": "3 of 7 prompts are longer than"}
    for chat_format, counts in (("hh", (4, 3, 0)), ("raw", (7, 0, 3))):
        run = tmp_path / chat_format
        prompts = world / f"some_long_{chat_format}.jsonl"
        assert main(command(world, run, train_datasets=prompts, chat_format=chat_format)) == 0
        assert said[chat_format] in caplog.text
        data = json.loads((run / "manifest.json").read_text())["data"]
        assert (data["prompts"], data["prompts_left_out"], data["prompts_cut"]) == counts


@pytest.mark.parametrize(
    ("flag", "value"),
    [("top_p", 0.9), ("top_k", 5), ("repetition_penalty", 1.2), ("min_new_tokens", 2)],
)
def test_with_a_filter_the_run_goes_on_with_a_warning(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, flag: str, value: float
) -> None:
    run = tmp_path / "run"
    assert main(command(world, run, **{flag: value})) == 0
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert sum(f"--{flag} {value}" in w and "KL will be biased" in w for w in warnings) == 1
    assert metrics_of(run)
