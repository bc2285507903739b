"""Replies that their row labels or scores: bad ones are left out, odd marks refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shape_cases import (
    turns,
)

from rrhf.cli.main import main


def test_replies_that_their_row_calls_bad_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": "p", "completion": "a", "label": label} for label in (True, False)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "validate", str(path)]) == 0
    assert "good, 1 of 2 rows; left out: 1 unwanted_reply" in capsys.readouterr().out


@pytest.mark.parametrize("score", ["NaN", "1e999", "-Infinity", "9" * 400])
def test_the_score_of_one_reply_is_finite(
    score: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    row = '{"prompt": "p", "response": "a", "score": %s}\n'
    path.write_text(row % "1" + row % score)
    for words in (["validate", str(path)], ["convert", str(path), str(out)]):
        assert main(["data", *words]) == 2
        error = capsys.readouterr().err
        assert f"{path}:2: score: is " in error and "not a finite number" in error
    assert not out.exists()


@pytest.mark.parametrize("label", [False, 0, 0.0, "False", "false", "FALSE"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completion": "a"},
        {"prompt": "p", "completion": turns("q", "a")[1:]},
        {"messages": turns("q", "a")},
        {"messages": turns("q"), "answer": "a"},
        {"input": "p", "output": "a"},
        {"dialogue": ["p", "a"]},
    ],
)
def test_a_bad_reply_is_no_demonstration_however_its_label_is_written(
    row: dict[str, Any], label: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.jsonl"
    good = "True" if isinstance(label, str) else type(label)(1)
    rows = [{**row, "label": good}, {**row, "label": label}, {**row, "label": None}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "validate", str(path)]) == 0
    assert "good, 2 of 3 rows; left out: 1 unwanted_reply" in capsys.readouterr().out


@pytest.mark.parametrize("label", ["False", "FALSE", "false", "0", "0.0"])
def test_a_bad_reply_of_a_table_is_left_out(
    label: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.csv"
    path.write_text(f"prompt,completion,label\np,a,TRUE\np,b,{label}\n")
    assert main(["data", "validate", str(path)]) == 0
    assert "good, 1 of 2 rows; left out: 1 unwanted_reply" in capsys.readouterr().out


@pytest.mark.parametrize("label", ["bad", "", 2, -1, 0.5, [0], {}])
def test_a_label_of_another_kind_is_refused(
    label: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "p", "completion": "a", "label": label}) + "\n")
    assert main(["data", "validate", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}:1: label: is " in error and "--columns unread=label" in error
