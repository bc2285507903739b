"""Lists that stand as text in the cells of a table, or in a field of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shape_cases import (
    ASKED,
    DEMONSTRATION,
    PAIR,
    A,
    B,
    cell,
    shared_gpt,
    triples,
    turns,
    write_cells,
)

from rrhf.cli.main import main
from rrhf.data.mixing import load_sets
from rrhf.records import Message


def printed(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


CELLS: dict[str, tuple[dict[str, Any], list[tuple[str, str, float | None]]]] = {
    "messages": ({"messages": turns(ASKED, A)}, DEMONSTRATION),
    "shared": ({"conversations": shared_gpt(ASKED, A)}, DEMONSTRATION),
    "pair": ({"chosen": turns(ASKED, A), "rejected": turns(ASKED, B)}, PAIR),
    "prompt": ({"prompt": turns(ASKED), "chosen": A, "rejected": B}, PAIR),
    "completion": ({"prompt": turns(ASKED), "completion": turns(ASKED, A)[1:]}, DEMONSTRATION),
    "replies": ({"prompt": turns(ASKED), "responses": [A, B], "scores": [1, None]}, None),
    "query": ({"query": turns(ASKED), "responses": [A, "it's"], "scores": [0.5, 2]}, None),
}


@pytest.mark.parametrize("form", [cell, printed])
@pytest.mark.parametrize("name", CELLS)
def test_a_cell_holds_a_list_as_json_or_as_python_prints_it(
    name: str, form: Callable[[Any], str], tmp_path: Path
) -> None:
    row, replies = CELLS[name]
    write_cells(path := tmp_path / "data.csv", row, form, ",")
    [found] = load_sets(str(path))
    assert found.messages == (Message("user", ASKED),)
    assert triples(found) == (
        replies or [("", text, s) for text, s in zip(row["responses"], row["scores"], strict=True)]
    )


def test_conversations_as_text_are_read_in_files_of_json_too(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    row = {"chosen": json.dumps(turns(ASKED, A)), "rejected": json.dumps(turns(ASKED, B))}
    path.write_text(json.dumps(row) + "\n")
    [found] = load_sets(str(path))
    assert triples(found) == PAIR


@pytest.mark.parametrize(
    "text",
    [
        '[{"role": "user"}]',
        '[{"role": "user", "content": "a"}] is what I sent',
        '[{"value": 1, "name": "x"}]',
        '["role", "content"]',
    ],
)
def test_a_text_with_brackets_stays_a_text(text: str, tmp_path: Path) -> None:
    write_cells(path := tmp_path / "data.csv", {"prompt": text, "response": text}, str, ",")
    [found] = load_sets(str(path))
    assert (found.query, found.candidates[0].response) == (text, text)


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("responses", "['a' 'b']"),
        ("responses", "[a, b]"),
        ("responses", "['a', open('x')]"),
        ("responses", "[" * 300),
        ("responses", "[" * 30000 + "]" * 30000),
        ("scores", "[1. 2.]"),
        ("scores", "[1.0, nan]"),
        ("messages", "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]"),
        ("chosen", "[{'role': 'user', 'content': 'a'} {'role': 'assistant', 'content': 'b'}]"),
        ("chosen", '[{"role": "user", "content": "a", }, {"role": assistant}]'),
    ],
)
def test_a_list_that_cannot_be_read_back_is_refused(
    column: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": ASKED, "responses": '["a", "b"]', "rejected": "c", column: text}
    write_cells(path := tmp_path / "data.csv", row, str, ",")
    assert main(["data", "validate", str(path), "--columns", "unread=rejected"]) == 2
    error = capsys.readouterr().err
    assert f"{path}:2: {column}: " in error and error.count("error: ") == 1
    assert "json.dumps" in error or "must be a list" in error
