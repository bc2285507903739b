"""docs/extending.md: its files are written as they stand there, and its commands run."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from places import ROOT
from ppo_cases import save_prompts, save_reward_model
from tiny import save_tiny
from trainer_cases import metrics_of, ranked_rows, write_lines

from rrhf.cli.main import main
from rrhf.data.candidate_files import read_candidate_sets
from rrhf.evaluation.results import load_row

PAGE = ROOT / "docs" / "extending.md"
SECTION = re.compile(
    r"`(?P<file>\w+\.py)`:\n\n```python\n(?P<code>.*?)```\n\n```\n(?P<command>rrhf .*?)```"
    r"(?:\n\nIt prints:\n\n```\n(?P<output>.*?)```)?",
    re.DOTALL,
)
SMALLER = ["--model_max_length", "100", "--max_steps", "2"]
ONLINE = [*SMALLER, "--max_new_tokens", "6", "--rollout_size", "8"]


class Example(NamedTuple):
    """A file of the page, the words of its command, and the lines that the page says it prints."""

    code: str
    words: list[str]
    output: list[str]


def examples() -> dict[str, Example]:
    """File -> its example."""
    return {
        match["file"]: Example(
            match["code"],
            shlex.split(match["command"].replace("\\\n", " ")),
            [line for line in (match["output"] or "").splitlines() if line],
        )
        for match in SECTION.finditer(PAGE.read_text())
    }


EXAMPLES = examples()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the files of the page and what its commands name, as the working directory."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "MODEL")
    save_reward_model(tmp_path / "REWARD_MODEL")
    write_lines(tmp_path / "SCORED.jsonl", ranked_rows())
    save_prompts(tmp_path / "PROMPTS.jsonl")
    for file, example in EXAMPLES.items():
        (tmp_path / file).write_text(example.code)
    yield tmp_path
    for file in EXAMPLES:  # the next test has its files elsewhere
        sys.modules.pop(Path(file).stem, None)


def run(words: list[str], *more: str) -> None:
    named = [f"{word}.jsonl" if word in ("SCORED", "PROMPTS") else word for word in words[1:]]
    assert words[0] == "rrhf"
    assert main([*named, *more]) == 0


def settings_of(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "settings.json").read_text())
    return found


def test_every_section_has_its_example() -> None:
    sections = re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE)
    assert len(EXAMPLES) == len(sections) >= 7


def test_the_objective(place: Path) -> None:
    words = EXAMPLES["plackett_luce.py"].words
    run(words, *SMALLER)
    settings = settings_of("RUN/ranked")
    assert settings["objective"] == "plackett_luce:PLACKETT_LUCE" and settings["beta"] == 0.2
    # 10 of 12 prompts have several candidates; before the first step every order is as likely.
    assert metrics_of(place / "RUN/ranked")[0]["plackett_luce_loss"] > 0
    run(words, *SMALLER, "--resume_from_checkpoint")


def test_the_objective_on_pairs_is_dpo(place: Path) -> None:
    """Of two candidates the Plackett-Luce model knows what Bradley and Terry know."""
    rows = [{**row, "responses": ["yes", "or no"], "scores": [1, 0]} for row in ranked_rows()]
    data = write_lines(place / "pairs.jsonl", rows)
    found = []
    for objective in ("plackett_luce:PLACKETT_LUCE", "dpo"):
        out = place / objective.partition(":")[0]
        words = [
            "--model_name_or_path",
            "MODEL",
            "--data_path",
            str(data),
            "--output_dir",
            str(out),
        ]
        words += ["--objective", objective, "--beta", "0.3", "--learning_rate", "1e-3"]
        assert main(["train", "rank", *words, "--model_max_length", "100"]) == 0
        found.append([row["loss"] for row in metrics_of(out)])
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0][-1] < found[0][0]


def test_the_method(place: Path) -> None:
    words = EXAMPLES["mean_baseline.py"].words
    run(words, *ONLINE)
    settings = settings_of("RUN/online")
    assert settings["method"] == "mean_baseline:MEAN_BASELINE" and settings["positive_only"]
    assert not (place / "RUN/online/value").exists()


@pytest.fixture
def sums(place: Path) -> Path:
    """The same folder with the file that the first section makes."""
    run(EXAMPLES["sums.py"].words)
    return place


def test_the_data_source(sums: Path) -> None:
    sets = list(read_candidate_sets(sums / "sums.jsonl"))
    assert len(sets) == 10 and {s.scores for s in sets} == {(1.0, 0.5, 0.0)}
    ranked = ["--data_path", "sums:ranked", "--output_dir", "RUN/sums", *SMALLER]
    assert main(["train", "rank", "--model_name_or_path", "MODEL", *ranked]) == 0
    assert metrics_of(sums / "RUN/sums")[0]["loss"] > 0


@pytest.mark.parametrize("file", [file for file, example in EXAMPLES.items() if example.output])
def test_what_is_printed_is_what_the_page_says(
    file: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    if file != "sums.py":
        run(EXAMPLES["sums.py"].words)
        capsys.readouterr()
        caplog.clear()
    run(EXAMPLES[file].words)
    printed = [*capsys.readouterr().out.splitlines(), *caplog.messages]
    assert [line for line in EXAMPLES[file].output if line not in printed] == []


def test_the_engine(sums: Path) -> None:
    run(EXAMPLES["canned.py"].words)
    sets = list(read_candidate_sets("canned.jsonl"))
    assert {c.response for s in sets for c in s.candidates} == {"Ask a friend."}
    assert [len(s.candidates) for s in sets] == [4] * 10


def test_the_scorer(sums: Path) -> None:
    run(EXAMPLES["brief.py"].words)
    scored = list(read_candidate_sets("brief.jsonl"))
    assert {s.scores for s in scored} == {(-3.0, -3.0, -5.0)}
    online = (
        "train ppo --model_name_or_path MODEL --train_datasets PROMPTS.jsonl --output_dir RUN/brief"
    )
    assert main([*online.split(), "--scorer", "brief:Brief", *ONLINE]) == 0
    assert metrics_of(sums / "RUN/brief")[0]["score"] <= 0


def test_the_metric(sums: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(EXAMPLES["guesses.py"].words)
    row = load_row("ROWS/sums.json")
    assert set(row["metrics"]) == {"guesses"} and "guesses" in row["per_prompt"]
    policy = "evaluate --model_name_or_path MODEL --prompts sums.jsonl --output_dir POLICY"
    policy += " --scorer REWARD_MODEL --metrics reward,guesses:GUESSES --max_new_tokens 6"
    capsys.readouterr()
    assert main(policy.split()) == 0
    assert "guesses" in capsys.readouterr().out
    assert set(load_row("POLICY/MODEL.json")["metrics"]) == {"reward", "guesses"}


def test_the_world(sums: Path) -> None:
    run(EXAMPLES["arithmetic.py"].words)
    metrics = load_row("GOLD/sums.json")["metrics"]
    # Of three replies to each prompt the first is right and the last guesses.
    assert metrics["gold"]["mean"] == pytest.approx(1 / 3)
    assert metrics["part_guesses"]["mean"] == pytest.approx(1 / 3)
    spec = "gold:arithmetic:Arithmetic"
    assert main(["score", "sums.jsonl", "gold.jsonl", "--scorer", spec]) == 0
    assert {s.scores for s in read_candidate_sets("gold.jsonl")} == {(1.0, 0.0, 0.0)}
