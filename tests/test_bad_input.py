"""Bad input through the commands that users run: one message, exit code 2, outputs as they were."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tiny import save_tiny

from rrhf.cli.main import main

GOOD = {"query": "How are you?", "responses": ["Fine.", "Go away."], "scores": [1.0, -1.0]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("bad") / "model"))


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


BAD_FILES = {
    "missing key": (lines(GOOD, {"responses": ["a"], "scores": [1]}), ":2", "query"),
    "wrong type": (lines({**GOOD, "responses": "Fine."}), ":1", "responses"),
    "score of text": (lines(GOOD, {**GOOD, "scores": ["high", 1]}), ":2", "scores"),
    "NaN score": (lines(GOOD, GOOD, {**GOOD, "scores": [float("nan"), 1]}), ":3", "scores"),
    "fewer scores": (lines({**GOOD, "scores": [1.0]}), ":1", "scores"),
    "cut line": (lines(GOOD) + b'{"query": "How", "respon', ":2", ""),
    "empty file": (b"", "", "no rows"),
    "bad bytes": (lines(GOOD) + b'{"query": "\xff"}\n', ":2", ""),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_told_by_line_before_anything_is_written(
    name: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, place, word = BAD_FILES[name]
    data = tmp_path / "data.json"
    data.write_bytes(content)
    commands = [
        ["train", "rank", "--model_name_or_path", model, "--data_path", str(data)],
        ["data", "validate", str(data)],
    ]
    commands[0] += ["--output_dir", str(tmp_path / "run"), "--model_max_length", "64"]
    for command in commands:
        assert main(command) == 2
        told = capsys.readouterr().err
        assert f"{data}{place}" in told and word in told, told
        assert "Traceback" not in told
    assert not (tmp_path / "run" / "policy").exists()
    assert data.read_bytes() == content


def test_a_cut_gzip_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = gzip.compress(lines(*[GOOD] * 200))
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    assert main(["data", "validate", str(path)]) == 2
    told = capsys.readouterr().err
    assert str(path) in told and "gzip" in told


def test_all_errors_of_a_file_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(lines(*[{**GOOD, "scores": [1.0]}] * 30))
    assert main(["data", "validate", str(path)]) == 2
    told = capsys.readouterr().err
    assert all(f"{path}:{line}: " in told for line in range(1, 21))
    assert f"{path}:21: " not in told


@pytest.mark.parametrize(
    "command",
    [
        ["train", "rank", "--learning_rte", "1e-5"],
        ["train", "reward", "--learning_rate", "fast"],
        ["generate", "--num_return_sequence", "4"],
        ["score", "--scorr", "x"],
        ["evaluate", "--num_prompt", "4"],
        ["trian"],
        ["train", "rnak"],
    ],
    ids=lambda words: " ".join(words),
)
def test_an_unknown_word_gets_the_nearest_one(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told and len(told) > 20


def test_missing_folders_are_told(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.json"
    data.write_bytes(lines(GOOD))
    missing = str(tmp_path / "nothing")
    run, out = str(tmp_path / "run"), str(tmp_path / "out.jsonl")
    train = ["train", "rank", "--output_dir", run, "--model_max_length", "64"]
    commands = [
        [*train, "--model_name_or_path", missing, "--data_path", str(data)],
        [*train, "--model_name_or_path", model, "--data_path", missing],
        ["generate", "--model_name_or_path", missing, "--prompts", str(data), "--output_file", out],
        ["score", str(data), out, "--scorer", missing],
        ["score", str(data), out, "--scorer", model],
    ]
    for command in commands:
        assert main(command) == 2, command
        told = capsys.readouterr().err
        assert "Traceback" not in told
    assert "reward" in told  # a causal model where a reward model is needed
    assert not Path(out).exists() and not Path(run).exists()
    # The fix is accepted in the same place: nothing that was refused stands in the way.
    assert main(["score", str(data), out, "--scorer", "function:statistics:mean"]) == 2
    assert main([*train, "--model_name_or_path", model, "--data_path", str(data)]) == 0


def test_what_is_odd_but_right_is_no_error(model: str, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_bytes(
        lines(
            GOOD,
            {"query": "ties", "responses": ["a", "b"], "scores": [1, 1]},
            {"query": "one", "responses": ["only"], "scores": [0.5]},
            {"query": "empty", "responses": ["", "a", "b c"], "scores": [0, 1, 2]},
        )
    )
    command = ["train", "rank", "--model_name_or_path", model, "--data_path", str(data)]
    command += ["--output_dir", str(tmp_path / "run"), "--model_max_length", "64"]
    assert main([*command, "--per_device_train_batch_size", "4"]) == 0
    assert (tmp_path / "run" / "policy" / "model.safetensors").is_file()


def test_a_second_run_in_the_same_folder_is_refused_and_loses_nothing(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.json"
    data.write_bytes(lines(GOOD))
    command = ["train", "rank", "--model_name_or_path", model, "--data_path", str(data)]
    command += ["--output_dir", str(tmp_path / "run"), "--model_max_length", "64"]
    assert main(command) == 0
    weights = (tmp_path / "run" / "policy" / "model.safetensors").read_bytes()
    assert main(command) == 2
    assert "--resume_from_checkpoint" in capsys.readouterr().err
    assert (tmp_path / "run" / "policy" / "model.safetensors").read_bytes() == weights
