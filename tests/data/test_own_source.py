"""A data source of the user's own: a file in the working directory, from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rrhf.cli.main import main
from rrhf.data.mixing import SourceSpec, parse_mixture
from rrhf.data.prompt_text import prompt_text
from rrhf.errors import UserError
from rrhf.files import sha256_file

SOURCE = """
import math

def rows(split="train"):
    for number in range(4):
        yield {"prompt": f"{split} {number}", "response": "yes"}

def copy(path="nowhere"):
    yield {"prompt": f"from {path}", "response": "yes"}

def a_list():
    return [{"prompt": "p", "messages": ({"role": "user", "content": "hi"},)}]

def nothing():
    return None

def one_row():
    return {"prompt": "p"}

def no_rows():
    yield from ()

def texts():
    yield {"prompt": "p"}
    yield "p"

def numbers_as_columns():
    yield {1: "p"}

def a_set():
    yield {"prompt": "p"}
    yield {"prompt": {"p"}}

def endless():
    row = {"prompt": "p"}
    row["meta"] = row
    yield row

def not_a_number():
    yield {"prompt": "p", "responses": ["a", "b"], "scores": [1, math.nan]}

def wrong_column():
    yield {"prompt": "p", "response": "r"}
    yield {"prompt": "p", "response": 3}

def raises():
    yield {"prompt": "p", "response": "r"}
    raise LookupError("gone")

def leaves():
    raise SystemExit(3)

def needs(more):
    yield {"prompt": "p"}

no_function = 3
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_command_with_data_reads_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "convert", "mine:rows:3/-1,mine:rows:1", "out.jsonl"]) == 0
    rows = rows_of(place / "out.jsonl")
    assert [row["query"] for row in rows][3:] == [f"train {number}" for number in range(4)]
    assert len(rows) == 7 and {row["origin"] for row in rows} == {"mine:rows"}
    manifest = json.loads((place / "out.manifest.json").read_text())
    assert manifest["input_sha256"] == {str(place / "mine.py"): sha256_file(place / "mine.py")}
    capsys.readouterr()
    assert main(["data", "validate", "mine:rows", "mine:a_list"]) == 0
    assert capsys.readouterr().out.count("good, ") == 2
    assert main(["data", "stats", "mine:rows", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["responses"] == 4


def test_it_is_given_the_split_and_the_path_that_are_named(place: Path) -> None:
    assert main(["data", "convert", "mine:rows", "out.jsonl", "--split", "test"]) == 0
    assert rows_of(place / "out.jsonl")[0]["query"] == "test 0"
    assert main(["data", "convert", "mine:copy:1:/some/where", "copy.jsonl"]) == 0
    assert rows_of(place / "copy.jsonl")[0]["query"] == "from /some/where"
    assert main(["data", "convert", "mine:copy", "none.jsonl"]) == 0
    assert rows_of(place / "none.jsonl")[0]["query"] == "from nowhere"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("mine:nothing", "mine:nothing: returned None; yield rows, each a dictionary"),
        ("mine:one_row", "mine:one_row: returned {'prompt': 'p'}; yield rows"),
        ("mine:no_rows", "mine:no_rows: holds no rows"),
        ("mine:texts", "mine:texts[1]: row: is 'p'; yield dictionaries, such as {"),
        ("mine:numbers_as_columns", "mine:numbers_as_columns[0]: row: the column 1 is not a text"),
        ("mine:a_set", "mine:a_set[1]: row: JSON cannot hold it (Object of type set is not"),
        ("mine:endless", "mine:endless[0]: row: JSON cannot hold it (Circular reference"),
        ("mine:not_a_number", "mine:not_a_number[0]: scores[1]: is nan, not a finite number"),
        ("mine:wrong_column", "mine:wrong_column[1]: response: must be a text, is the number 3"),
        ("mine:raises", "mine:raises[1]: raised LookupError: gone (PLACE, line "),
        ("mine:leaves", "mine:leaves: called sys.exit(3) (PLACE, line "),
        (
            "mine:needs",
            "mine:needs: cannot be called with nothing: missing a required argument: 'more'",
        ),
        ("mine:no_function", "mine:no_function: mine has no function 'no_function'"),
        ("mine:absent", "mine:absent: mine has no function 'absent'"),
        ("nowhere:rows", "'nowhere:rows': 'rows' is not a proportion; write"),
        (
            "mine:raises --split x",
            "mine:raises: cannot be called with {'split': 'x'}: got an unexpected",
        ),
        ("mine:rows:1:/p", "mine:rows: cannot be called with {'path': '/p'}: got an unexpected"),
    ],
)
def test_what_is_no_source_is_one_message(
    place: Path, words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "out.jsonl").write_text("as it was")
    data, *more = words.split()
    assert main(["data", "convert", data, "out.jsonl", *more]) == 2
    out, err = capsys.readouterr()
    assert not out and f"error: {told.replace('PLACE', str(place / 'mine.py'))}" in err
    assert "Traceback" not in err
    assert (place / "out.jsonl").read_text() == "as it was"
    assert {path.name for path in place.iterdir()} <= {"mine.py", "out.jsonl", "__pycache__"}


def test_a_known_name_or_a_file_before_the_colon_is_no_module(place: Path) -> None:
    assert parse_mixture("mine:rows") == [SourceSpec("mine:rows")]
    assert parse_mixture("mine:rows:2:p")[0].path == "p"
    Path("alpaca.py").write_text("half = 3")
    Path("train.py").write_text("half = 3")
    for words in ("alpaca:half", "train.jsonl:half", "mine:rows:half"):
        with pytest.raises(UserError, match="'half' is not a proportion"):
            parse_mixture(words)
    with pytest.raises(UserError, match=r"there is no module 'a\.b' here, .* start in its folder"):
        parse_mixture("a.b:rows")


def test_import_paths_are_data_and_no_prompt() -> None:
    assert prompt_text("mine:rows, mine:copy") is None
    assert prompt_text("Say so:now, please") == "Say so:now, please"
