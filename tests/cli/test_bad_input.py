"""Bad input through the commands that users run: one message, exit code 2, outputs as they were."""

from __future__ import annotations

import gzip
import json
import os
import shutil
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


SCORER = "function:test_bad_input:by_length"
WRITERS = {
    "generate": "generate --model_name_or_path MODEL --prompts DATA --output_file OUT.jsonl "
    "--max_new_tokens 4",
    "score": f"score DATA OUT.jsonl --scorer {SCORER}",
    "response-gen": f"response-gen MODEL OUT --prompts DATA --scorer {SCORER} --max_new_tokens 4",
    "data convert": "data convert DATA OUT.jsonl",
    "data convert --to": "data convert DATA OUT.jsonl --to prompts",
    "data convert --parts": "data convert DATA OUT --parts a=0.5",
    "train sft": "train sft --model_name_or_path MODEL --data_path DATA --output_dir OUT "
    "--model_max_length 64",
    "train rank": "train rank --model_name_or_path MODEL --data_path DATA --output_dir OUT "
    "--model_max_length 64",
    "train reward": "train reward --model_name_or_path MODEL --data_path DATA --output_dir OUT "
    "--model_max_length 64",
    "train ppo": "train ppo --model_name_or_path MODEL --train_datasets DATA --output_dir OUT "
    f"--reward_model_name_or_path {SCORER} --model_max_length 64 --max_new_tokens 4",
    "train iterative": "train iterative --model_name_or_path MODEL --train_datasets DATA "
    f"--output_dir OUT --scorer {SCORER} --model_max_length 64 --max_new_tokens 4",
    "evaluate": "evaluate --model_name_or_path MODEL --prompts DATA --output_dir OUT "
    "--max_new_tokens 4",
    "evaluate --responses": "evaluate --responses DATA --prompts DATA --output_dir OUT",
    "compare": "compare ROWS --output OUT.jsonl",
    "demo": "demo --output_dir OUT",
    "compare --world": "compare --world help_desk --output_dir OUT",
}


def by_length(prompts: list[str], responses: list[str], messages: object) -> list[float]:
    return [float(len(response)) for response in responses]


@pytest.fixture(scope="module")
def sources(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the words of `WRITERS` stand for, but for the output."""
    folder = tmp_path_factory.mktemp("sources")
    data, rows = str(folder / "data.jsonl"), str(folder / "rows")
    Path(data).write_bytes(lines(*({**GOOD, "query": f"How are you, {n}?"} for n in range(6))))
    words = ["--responses", data, "--prompts", data, "--scorer", SCORER, "--output_dir", rows]
    assert main(["evaluate", *words]) == 0
    return {"MODEL": model, "DATA": data, "ROWS": rows}


@pytest.fixture
def places(sources: dict[str, str], tmp_path: Path) -> dict[str, str]:
    return {**sources, "OUT": str(tmp_path / "out")}


def words_of(command: str, places: dict[str, str]) -> list[str]:
    words = []
    for word in WRITERS[command].replace("a=0.5", "PARTS").split():
        for name, place in places.items():
            if word in (name, f"{name}.jsonl"):
                word = place + word.removeprefix(name)
                break
        words.append("{a: 0.5, b: 0.5}" if word == "PARTS" else word)
    return words


def refused(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    assert main(words) == 2, words
    told = capfd.readouterr().err
    assert "Traceback" not in told and told.count("error: ") == 1, told
    return told


def no_link(place: Path) -> Path:
    place.symlink_to(place.parent / "gone" / "x")
    return place


def no_pipe(place: Path) -> Path:
    os.mkfifo(place)
    return place


OUTPUTS = {
    "procfs": lambda place: Path("/proc/x/o" + place.suffix),
    "link": no_link,
    "pipe": no_pipe,
    "long name": lambda place: place.with_name("n" * 300 + place.suffix),
    "under a file": lambda place: Path(__file__) / place.name,
    "NUL": lambda place: place.with_name("a\0b" + place.suffix),
    "no UTF-8": lambda place: place.with_name("\udcff" + place.suffix),
    "device": lambda place: Path("/dev/null"),
}


@pytest.mark.parametrize("command", WRITERS)
def test_an_output_that_cannot_be_written_is_one_message(
    command: str, places: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for kind, make in OUTPUTS.items():
        place = tmp_path / ("out.jsonl" if "OUT.jsonl" in WRITERS[command] else "out")
        bad = make(place)
        words = [str(bad) if w == str(place) else w for w in words_of(command, places)]
        refused(words, capfd)
        assert (kind == "link") == place.is_symlink() and (kind == "pipe") == place.is_fifo()
        place.unlink(missing_ok=True)
        assert not list(tmp_path.iterdir()), kind


INPUTS = {
    "pipe": "is a pipe",
    "unfed.csv": "is a pipe",
    "/dev/stdin": "",
    "/dev/zero": "is a device",
    "/proc/x": "",
}


@pytest.mark.parametrize("command", [name for name in WRITERS if "DATA" in WRITERS[name]])
@pytest.mark.parametrize("given", INPUTS)
def test_what_can_be_read_but_once_is_no_input(
    command: str,
    given: str,
    places: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    place = Path(given) if given.startswith("/") else tmp_path / given
    if not given.startswith("/"):
        os.mkfifo(place)
    told = refused(words_of(command, {**places, "DATA": str(place)}), capfd)
    assert str(place) in told and INPUTS[given] in told, told


def test_a_model_whose_files_cannot_be_read_is_one_message(
    places: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, word in (
        ("config.json", "config.json"),
        ("manifest.json", "it is a pipe"),
        ("tokenizer.json", "is a pipe"),
        ("model.safetensors", "is a pipe"),
    ):
        folder = tmp_path / name
        shutil.copytree(places["MODEL"], folder)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        words = words_of("generate", {**places, "MODEL": str(folder)})
        assert word in refused(words, capfd)
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "gone")
    assert "leads nowhere" in refused(words, capfd)
    long = words_of("generate", {**places, "MODEL": "m" * 300})
    assert "File name too long" in refused(long, capfd)
    empty = words_of("generate", {**places, "MODEL": ""})
    assert "--model_name_or_path: is empty" in refused(empty, capfd)


def test_a_working_folder_that_was_removed_is_named(
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    os.chdir("here")
    (tmp_path / "here").rmdir()
    assert "does not exist any more" in refused(["data", "convert", "a.jsonl", "b.jsonl"], capfd)


# Refused before any work: nothing is left behind.

BAD_VALUES = {
    "no model": {"MODEL": "NOT_A_MODEL"},
    "a model that cannot be loaded": {"MODEL": "TORN_MODEL"},
    "no rows": {"DATA": "EMPTY", "ROWS": "EMPTY"},
    "faulty rows": {"DATA": "FAULTY", "ROWS": "FAULTY"},
    "no scorer": {SCORER: "function:test_bad_input:gone"},
}


@pytest.fixture(scope="module")
def bad_places(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bad-places")
    (folder / "NOT_A_MODEL").mkdir()
    (folder / "EMPTY").touch()
    (folder / "FAULTY").write_bytes(lines(GOOD, {**GOOD, "responses": 7}))
    shutil.copytree(model, folder / "TORN_MODEL")
    (folder / "TORN_MODEL" / "model.safetensors").write_bytes(b"torn")
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("command", "value"),
    [
        (command, value)
        for command in WRITERS
        for value, changes in BAD_VALUES.items()
        if set(changes) & set(WRITERS[command].split())
    ],
)
def test_a_refused_command_leaves_nothing_behind(
    command: str,
    value: str,
    places: dict[str, str],
    bad_places: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    changes = BAD_VALUES[value]
    out = str(tmp_path / "new" / "folders" / "out")
    words = words_of(command, {**places, "OUT": out})
    for word, bad in changes.items():
        bad = bad_places.get(bad, bad)
        words = [bad if found == places.get(word, word) else found for found in words]
    told = refused(words, capfd)
    assert any(bad_places.get(bad, bad.rpartition(":")[2]) in told for bad in changes.values()), (
        told
    )
    assert not list(tmp_path.rglob("*")), sorted(tmp_path.rglob("*"))
    Path(out).parent.mkdir(parents=True)
    refused(words, capfd)
    assert not list(Path(out).parent.iterdir()), sorted(tmp_path.rglob("*"))
