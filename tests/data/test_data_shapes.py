"""The shapes that people's data have, each through the commands: checked, converted, trained on.

For every shape the table says what its first row must become, so that nothing is emptied in
silence, and which command uses it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import shlex
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_cases import reward_model_folder
from tiny import save_tiny

from rrhf.cli.main import main
from rrhf.data.candidate_files import read_candidate_sets
from rrhf.data.columns import parse_columns
from rrhf.data.mixing import load_sets
from rrhf.data.sources import SourceCounts, read_sets
from rrhf.data.uses import count_uses, describe_uses
from rrhf.errors import UserError
from rrhf.manifests import read_manifest
from rrhf.records import CandidateSet, Message, plain_prompt

torch.set_num_threads(1)

CHOSEN, REJECTED = "human:chosen", "human:rejected"
HH = "\n\nHuman: %s\n\nAssistant:"
ASKED = "how do I keep plants alive?"


def turns(*texts: str) -> list[dict[str, str]]:
    """A conversation that the user begins."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def shared_gpt(*texts: str) -> list[dict[str, str]]:
    roles = ("human", "gpt")
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


def ultra(response: str, score: float, model: str) -> dict[str, Any]:
    """One of UltraFeedback's completions."""
    rating = {"helpfulness": {"Rating": "4", "Rationale": "so"}}
    return {
        "annotations": rating,
        "custom_system_prompt": "Be kind.",
        "model": model,
        "response": response,
        "fine-grained_score": 3.25,
        "overall_score": score,
    }


@dataclass(frozen=True)
class Shape:
    """A way in which a user's rows look.

    Attributes:
        row: the first row; the others are made of it by `other_row`.
        replies: what must be read of it: (source, text, score).
        use: the command that it is for.
        plain: the prompt is a plain text; else a conversation, or a text taken as it stands.
        unread: columns that must be named.
        suffix: of the file.
        flags: what the user must say beside the path.
    """

    row: dict[str, Any]
    replies: list[tuple[str, str, float | None]] = field(default_factory=list)
    use: str = "rank"
    plain: bool = False
    unread: tuple[str, ...] = ()
    suffix: str = ".jsonl"
    flags: tuple[str, ...] = ()


A, B, C = "ask a friend", "do not go", "buy a watering can"
PAIR = [(CHOSEN, A, None), (REJECTED, B, None)]
DEMONSTRATION = [(CHOSEN, A, None)]


def ranked(*scores: float, source: str = "") -> list[tuple[str, str, float | None]]:
    return [(source, text, score) for text, score in zip((A, B, C), scores, strict=False)]


SHAPES: dict[str, Shape] = {
    "HH transcripts": Shape(
        {"chosen": f"{HH % ASKED} {A}", "rejected": f"{HH % ASKED} {B}"}, PAIR, "reward"
    ),
    "HH transcripts, packed": Shape(
        {"chosen": f"{HH % ASKED} {A}", "rejected": f"{HH % ASKED} {B}"},
        PAIR,
        "reward",
        suffix=".jsonl.gz",
    ),
    "prompt, chosen, rejected": Shape(
        {"prompt": ASKED, "chosen": A, "rejected": B, "id": 7},
        PAIR,
        "reward",
        plain=True,
        unread=("id",),
    ),
    "conversations, binarised": Shape(
        {
            "prompt": ASKED,
            "chosen": turns(ASKED, A),
            "rejected": turns(ASKED, B),
            "score_chosen": 8.0,
        },
        PAIR,
        unread=("score_chosen",),
    ),
    "question, chosen, rejected, system": Shape(
        {"system": "Be brief.", "question": ASKED, "chosen": A, "rejected": B}, PAIR, "reward"
    ),
    "prompt, responses, scores": Shape(
        {"prompt": ASKED, "responses": [A, B, C], "scores": [1, 3, 2]},
        ranked(1, 3, 2),
        plain=True,
    ),
    "query, responses, rewards": Shape(
        {"query": ASKED, "responses": [A, B, C], "rewards": [0.5, -1, 2]},
        ranked(0.5, -1, 2),
        plain=True,
    ),
    "prompt, responses, ranks": Shape(
        {"prompt": ASKED, "responses": [A, B, C], "ranks": [2, 1, 2]},
        ranked(-2, -1, -2),
        plain=True,
    ),
    "prompt, responses": Shape(
        {"prompt": ASKED, "responses": [A, B, C]},
        [("", text, None) for text in (A, B, C)],
        "score",
        plain=True,
    ),
    "prompt, ranking": Shape(
        {"prompt": ASKED, "ranking": [A, B, C]}, ranked(-1, -2, -3), plain=True
    ),
    "UltraFeedback": Shape(
        {
            "source": "sharegpt",
            "instruction": ASKED,
            "models": ["alpaca-7b", "bard"],
            "completions": [ultra(A, 6.0, "alpaca-7b"), ultra(B, 7.5, "bard")],
            "correct_answers": ["None"],
        },
        [("teacher:alpaca-7b", A, 6.0), ("teacher:bard", B, 7.5)],
        unread=("source", "models", "correct_answers"),
    ),
    "UltraFeedback, by another score": Shape(
        {
            "instruction": ASKED,
            "completions": [ultra(A, 6.0, "a"), {**ultra(B, 7.5, "b"), "fine-grained_score": 1}],
        },
        [("teacher:a", A, 3.25), ("teacher:b", B, 1.0)],
        flags=("--columns", "score=fine-grained_score"),
    ),
    "answers with ranks, as Nectar has them": Shape(
        {
            "prompt": f"{HH % ASKED} ",
            "answers": [
                {"answer": A, "model": "x", "rank": 2.0},
                {"answer": B, "model": "y", "rank": 1.0},
            ],
            "turns": 1,
        },
        [("teacher:x", A, -2.0), ("teacher:y", B, -1.0)],
        unread=("turns",),
    ),
    "instruction, completions": Shape(
        {"instruction": ASKED, "completions": [A, B], "scores": [1, 0]}, ranked(1, 0)
    ),
    "ShareGPT": Shape(
        {"id": "x_0", "conversations": shared_gpt("hello", "hi", ASKED, A)},
        DEMONSTRATION,
        "sft",
        unread=("id",),
    ),
    "question, answer": Shape({"question": ASKED, "answer": A}, DEMONSTRATION, "sft"),
    "instruction, context, response": Shape(
        {"instruction": ASKED, "context": "in June", "response": A, "category": "open_qa"},
        DEMONSTRATION,
        "sft",
        unread=("category",),
    ),
    "prompt, response": Shape({"prompt": ASKED, "response": A}, DEMONSTRATION, "sft", plain=True),
    "own names": Shape(
        {"frage": ASKED, "antwort": A},
        DEMONSTRATION,
        "sft",
        plain=True,
        flags=("--columns", "prompt=frage,response=antwort"),
    ),
    "TSV": Shape({"prompt": ASKED, "chosen": A, "rejected": B}, PAIR, "reward", True, (), ".tsv"),
    "CSV with lists": Shape(
        {"prompt": ASKED, "responses": [A, B, C], "scores": [1, 3, 2]},
        ranked(1, 3, 2),
        plain=True,
        suffix=".csv",
    ),
    "parquet": Shape({"question": ASKED, "answer": A}, DEMONSTRATION, "sft", suffix=".parquet"),
    "one prompt a line": Shape({"prompt": ASKED}, [], "generate", True, (), ".txt"),
    "prompts": Shape({"prompt": turns(ASKED)}, [], "generate"),
    "RRHF's own": Shape(
        {"query": HH % ASKED, "responses": [f" {A}", f" {B}"], "scores": [0, 1]},
        [("", f" {A}", 0.0), ("", f" {B}", 1.0)],
    ),
}


def other_row(value: Any, number: int) -> Any:
    """A row with another prompt, by a number in place of the plants."""
    return json.loads(json.dumps(value).replace("plants", f"{number} plants"))


def cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write_shape(folder: Path, shape: Shape) -> Path:
    """Four rows of a shape as a user's file."""
    path = folder / f"data{shape.suffix}"
    rows = [shape.row, *(other_row(shape.row, number) for number in range(3))]
    if shape.suffix in (".csv", ".tsv"):
        buffer = io.StringIO()
        writer = csv.writer(buffer, delimiter="\t" if shape.suffix == ".tsv" else ",")
        writer.writerows([list(shape.row), *([cell(v) for v in row.values()] for row in rows)])
        path.write_text(buffer.getvalue())
    elif shape.suffix == ".txt":
        path.write_text("\n".join(row["prompt"] for row in rows) + "\n\n")
    elif shape.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if shape.suffix.endswith(".gz") else data)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(reward_model_folder(tmp_path_factory.mktemp("reward") / "reward"))


def use(shape: Shape, path: Path, model: str, reward_model: str, out: Path) -> dict[str, Any]:
    """Run the command that a shape is for; returns the manifest of what it left."""
    given = ["--model_name_or_path", model]
    training = [*given, "--data_path", str(path), "--output_dir", str(out), "--max_steps", "1"]
    training += ["--save_steps", "0", "--model_max_length", "100"]
    commands: dict[str, list[str]] = {
        "generate": ["generate", *given, "--prompts", str(path), "--output_file", f"{out}.jsonl"],
        "score": ["score", str(path), f"{out}.jsonl", "--scorer", reward_model],
    }
    commands["generate"] += ["--max_new_tokens", "2"]
    words = commands.get(shape.use, ["train", shape.use, *training])
    assert main([*words, *shape.flags]) == 0
    manifest = read_manifest(f"{out}.jsonl" if shape.use in commands else out)
    assert manifest is not None and manifest["status"] == "complete"
    return manifest


def triples(found: CandidateSet) -> list[tuple[str, str, float | None]]:
    return [(c.source, c.response, c.score) for c in found.candidates]


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_read_whole_and_used(
    name: str,
    model: str,
    reward_model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shape = SHAPES[name]
    path, out = write_shape(tmp_path, shape), tmp_path / "converted.jsonl"

    assert main(["data", "validate", str(path), *shape.flags]) == 0
    said = capsys.readouterr().out
    assert f"{path}: good, 4 of 4 rows" in said
    assert f"replies: {4 * len(shape.replies)} (" in said
    named = [line for line in said.splitlines() if "columns that are not read" in line]
    assert named == [f"  columns that are not read: {', '.join(shape.unread)}"] * bool(shape.unread)

    assert main(["data", "convert", str(path), str(out), *shape.flags]) == 0
    found = list(read_candidate_sets(out))
    assert len(found) == 4 and triples(found[0]) == shape.replies
    assert found[0].is_plain == shape.plain
    assert ASKED in found[0].query
    if found[0].messages is not None:
        assert found[0].messages[-1].content.startswith(ASKED)

    manifest = use(shape, path, model, reward_model, tmp_path / "run")
    if shape.use in ("sft", "rank"):
        assert manifest["data"]["prompts_used"] == 4
    if shape.use == "rank":
        assert manifest["data"]["candidates_used"] == 4 * len(shape.replies)
    if shape.use == "generate":
        assert manifest["samples"] == 16


def test_the_context_of_an_instruction_is_part_of_the_prompt(tmp_path: Path) -> None:
    path = write_shape(tmp_path, SHAPES["instruction, context, response"])
    assert main(["data", "convert", str(path), str(tmp_path / "out.jsonl")]) == 0
    first = next(iter(read_candidate_sets(tmp_path / "out.jsonl")))
    assert first.messages is not None and first.messages[0].content == f"{ASKED}\nin June"


@pytest.mark.parametrize("form", ["file", "mixture", "own names"])
@pytest.mark.parametrize("stage", ["sft", "reward", "rank"])
def test_replies_without_scores_lead_to_the_command_that_scores_them(
    stage: str,
    form: str,
    model: str,
    reward_model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(write_shape(tmp_path, SHAPES["prompt, responses"]))
    names = []
    if form == "mixture":
        path = f"{path}:0.5,{path}:2"
    elif form == "own names":
        text = Path(path).read_text().replace('"prompt"', '"meine Frage"')
        Path(path).write_text(text)
        names = ["--columns", "prompt=meine Frage"]
    given = ["--model_name_or_path", model, "--data_path", path, "--model_max_length", "100"]
    given += ["--max_steps", "1", "--save_steps", "0"]
    assert main(["train", stage, *given, *names, "--output_dir", str(tmp_path / "a")]) == 2
    command = capsys.readouterr().err.strip().rpartition("score the responses first: ")[2]
    words = shlex.split(command.replace("REWARD_MODEL", reward_model))
    scored = str(tmp_path / "scored.jsonl")
    assert main([scored if word == "SCORED.jsonl" else word for word in words[1:]]) == 0
    assert main(["data", "validate", *path.split(":0.5")[:1], *names]) == 0
    words = shlex.split(capsys.readouterr().out.partition("have no score: ")[2].splitlines()[0])
    assert words[-2:] == (names or ["--scorer", "REWARD_MODEL"])
    given[3] = scored
    assert main(["train", stage, *given, "--output_dir", str(tmp_path / "b")]) == 0


# What cannot be read says which column is missing, and the nearest name.

REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a list misspelt": (
        {"prompt": "p", "respones": ["a", "b"]},
        ("'respones'", "nearest: 'responses'", "--columns unread=respones"),
    ),
    "half a pair": ({"prompt": "p", "chosen": "a"}, ("'chosen'", "column 'rejected' is missing")),
    "scores of nothing": (
        {"prompt": "p", "scores": [1, 2]},
        ("'scores'", "column 'responses'", "missing"),
    ),
    "other names": (
        {"prompt": "p", "response_j": "a", "response_k": "b"},
        ("'response_j'", "'response_k'", "--columns unread=response_j,unread=response_k"),
    ),
    "replies without a prompt": (
        {"responses": ["a", "b"], "scores": [1, 2]},
        ("a column with the prompt is missing next to 'responses'", "--columns prompt="),
    ),
    "nothing that is known": (
        {"instrution": "p", "body": "a"},
        ("instrution (did you mean 'instruction'?)", "body"),
    ),
    "objects without a reply": (
        {"prompt": "p", "responses": [{"words": "a"}]},
        ("responses[0]", "words", "--columns response=KEY"),
    ),
    "an object whose reply is null": (
        {"prompt": "p", "completions": [{"response": "a"}, {"response": None}]},
        ("completions[1].response: is null; give the text of the reply",),
    ),
    "ranks by another name": (
        {"prompt": "p", "responses": ["a", "b"], "rank": [2, 1]},
        ("rank: is not read, but holds a number for each reply", "--columns ranks=rank "),
    ),
    "scores by another name": (
        {"query": "p", "responses": ["a", "b"], "human_rating": [2, 1.5]},
        ("--columns scores=human_rating", "--columns unread=human_rating"),
    ),
    "ranks of whom": (
        {"prompt": "p", "responses": ["a", "b"], "ranking": [2, 1]},
        ("ranking", "--columns ranks=ranking"),
    ),
    "numbers alone": ({"prompt": "p", "ranking": [2, 1]}, ("ranking: holds numbers",)),
    "too few rewards": (
        {"prompt": "p", "responses": ["a", "b"], "rewards": [1]},
        ("rewards: holds 1 entries for 2 responses",),
    ),
    "a score that is none": (
        {"prompt": "p", "responses": ["a", "b"], "ranks": [1, "two"]},
        ("ranks[1]: must be a number",),
    ),
    "nested scores that are none": (
        {"prompt": "p", "completions": [{"text": "a", "score": "N/A"}]},
        ("completions[].score[0]: must be a number",),
    ),
    "a speaker of another kind": (
        {"conversations": [{"from": "tool", "value": "a"}]},
        ("conversations[0].role", '"tool"'),
    ),
    "a speaker that is no text": (
        {"conversations": [{"from": ["human"], "value": "a"}]},
        ("conversations[0].role: is a list; must be one of",),
    ),
}


@pytest.mark.parametrize("column", ["num_tokens", "score", "rating", "rank"])
def test_a_list_by_another_name_is_read_where_it_is_named_or_left_out(
    column: str, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    for row in ({"prompt": "p"}, {"query": "p"}):
        row |= {"responses": ["a", "b"], column: [3, 1]}
        path.write_text(json.dumps(row) + "\n")
        assert load_sets(str(path), columns=f"ranks={column}")[0].scores == (-3.0, -1.0)
        assert load_sets(str(path), columns=f"scores={column}")[0].scores == (3.0, 1.0)
        assert load_sets(str(path), columns=f"unread={column}")[0].scores == (None, None)
        path.write_text(json.dumps({**row, "scores": [1, 2]}) + "\n")
        assert load_sets(str(path))[0].scores == (1.0, 2.0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_emptied_is_refused_with_the_missing_column(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, words = REFUSED[name]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert main(["data", "validate", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}:1: " in error and "Traceback" not in error
    assert all(word in error for word in words), error
    assert main(["data", "convert", str(path), str(tmp_path / "out.jsonl")]) == 2
    assert not (tmp_path / "out.jsonl").exists()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands inside a row, at any depth."""
    keys = range(len(value)) if isinstance(value, list) else value
    for key in keys if isinstance(value, (list, dict)) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def with_value(row: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = row.copy()
    changed[path[0]] = with_value(row[path[0]], path[1:], value)
    return changed


@pytest.mark.parametrize("value", [None, 7, True, "", [], ["x"], {"a": 1}], ids=json.dumps)
def test_whatever_stands_in_a_row_is_counted_or_refused_with_its_place(
    value: Any, tmp_path: Path
) -> None:
    path, tried = tmp_path / "data.jsonl", 0
    for shape in SHAPES.values():
        names = parse_columns(shape.flags[1] if shape.flags else None)
        for place in places(shape.row):
            rows = [shape.row, with_value(shape.row, place, value)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            counts = SourceCounts(is_quiet=True)
            try:
                found = list(read_sets(str(path), counts=counts, columns=names))
            except UserError as error:
                assert all(line.startswith(f"{path}:2: ") for line in str(error).splitlines())
            else:
                assert len(found) == counts.kept == 2 - counts.dropped.total()
                assert describe_uses(str(path), counts, count_uses(found))
            tried += 1
    assert tried > 150


def test_a_later_row_with_replies_that_the_first_lacks_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "p"}\n{"prompt": "q", "responses": ["a", "b"]}\n')
    assert main(["data", "validate", str(path)]) == 2
    assert f"{path}:2: row: only the prompt can be read of it, but 'responses'" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["rewards", "ranks", "ranking"])
def test_scores_that_only_a_later_row_has_are_not_lost(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    row = {"query": "q", "responses": ["a", "b"]}
    rows = [row, {**row, name: None}, {**row, name: [1, 2]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = f"{path}:3: {name}: is missing in the file's first row"
    for words in (["validate", str(path)], ["stats", str(path)], ["convert", str(path), str(out)]):
        assert main(["data", *words]) == 2
        assert said in capsys.readouterr().err
    assert main(["data", "stats", str(path), "--columns", f"unread={name}"]) == 0


@pytest.mark.parametrize(
    "row", [{"prompt": "p"}, {"query": "q", "responses": ["a"]}, {"query": "q"}]
)
def test_columns_that_are_not_read_are_named_of_every_row_once(
    row: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    rows = [{**row, "a": 1}, {**row, "b": 2}, {**row, "b": 3, "a": 4}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "validate", str(path)]) == 0
    assert "  columns that are not read: a, b\n" in capsys.readouterr().out
    caplog.clear()
    with caplog.at_level("INFO", logger="rrhf"):
        load_sets(str(path))
    told = [record.message for record in caplog.records if "not read" in record.message]
    assert ", ".join(line.rpartition("read: ")[2] for line in told) == "a, b"
    assert main(["data", "convert", str(path), str(out)]) == 0
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest["source_counts"]["columns_not_read"] == {str(path): ["a", "b"]}


def test_a_column_may_be_left_out_on_purpose(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "p", "respones": ["a"]}\n')
    out = tmp_path / "out.jsonl"
    assert main(["data", "convert", str(path), str(out), "--columns", "unread=respones"]) == 0
    assert [s.candidates for s in read_candidate_sets(out)] == [()]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("prompt", "not of the form KNOWN=YOURS"),
        ("promt=p", "did you mean 'prompt'?"),
        ("prompt=a,prompt=b", "names 'prompt' twice"),
        ("prompt=qery", "qery: is missing (--columns prompt=qery)"),
        ("prompt=body,response=body", "gives the column 'body' to prompt and to response"),
        ("prompt=body,unread=body", "gives the column 'body' to prompt and to unread"),
        ("unread=quary_text,prompt=body", "unread=quary_text: no row of DATA has a column 'quary"),
        (
            "unread=quary_text,prompt=body",
            "(did you mean 'query_text'?); the columns are body, que",
        ),
        ("response=body", ", response) are none that can be read"),
    ],
)
def test_a_mapping_that_cannot_be(
    columns: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"query_text": "p", "body": "a"}\n')
    assert main(["data", "validate", str(path), "--columns", columns]) == 2
    assert words in capsys.readouterr().err.replace(str(path), "DATA")


def test_a_column_that_no_row_has_is_told_of_all_files_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    paths[0].write_text('{"prompt": "p", "x": 1}\n')
    paths[1].write_text('{"frage": "q"}\n{"frage": "r", "y": 1}\n')
    both = [*map(str, paths)]
    good, bad = "prompt=frage,unread=x,unread=y", "prompt=frage,unread=z"
    assert main(["data", "validate", *both, "--columns", good]) == 0
    assert len(load_sets(both, columns=good)) == 3
    assert main(["data", "validate", *both, "--columns", bad]) == 2
    said = capsys.readouterr().err
    told = "--columns unread=z: no row of {} has a column 'z'; the columns are frage, prompt, x, y"
    assert told.format(", ".join(both)) in said
    for words in (["convert", both[1], str(tmp_path / "out.jsonl")], ["stats", both[1]]):
        assert main(["data", *words, "--columns", bad]) == 2
        assert "has a column 'z'" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    assert len(load_sets(both[0], columns=bad, columns_may_miss=True)) == 1
    assert "no row of" in caplog.text


def test_a_mapping_is_looked_at_before_anything_is_loaded(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "p"}\n')
    monkeypatch.setattr("rrhf.generation.stage.generate_file", None)
    words = ["--model_name_or_path", model, "--prompts", str(path)]
    words += ["--output_file", str(tmp_path / "out.jsonl"), "--columns", "promt=p"]
    assert main(["generate", *words]) == 2
    assert "did you mean 'prompt'?" in capsys.readouterr().err


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
        assert f"{path}:2: score: is " in error and "no finite number" in error
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


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_text("prompt\tanswer\na\tb\tc\n"), ":2: has 3 cells where"),
        (lambda path: path.write_text('prompt\tanswer\na\t"b" c\n'), "ends with one"),
        (lambda path: path.write_text("prompt\tprompt\na\tb\n"), ":1: two columns have one name"),
        (lambda path: path.write_bytes(b"prompt\tanswer\na\t\xff\n"), "is not UTF-8"),
    ],
)
def test_a_broken_table_says_where(
    write: Callable[[Path], Any],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "data.tsv"
    write(path)
    assert main(["data", "validate", str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and words in error


def test_a_cell_holds_tabs_and_line_breaks_in_quotes(tmp_path: Path) -> None:
    path, out = tmp_path / "data.tsv", tmp_path / "out.jsonl"
    path.write_text('prompt\tanswer\n"a\tb\nc"\t"say ""hi"""\n')
    assert main(["data", "convert", str(path), str(out)]) == 0
    [found] = read_candidate_sets(out)
    assert (found.query, found.candidates[0].response) == ("a\tb\nc", 'say "hi"')


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


def write_cells(path: Path, row: dict[str, Any], form: Callable[[Any], str], mark: str) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file, delimiter=mark)
        table.writerows([[*row], [form(value) for value in row.values()]])


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


def test_columns_without_a_name_are_named_by_their_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.csv"
    path.write_text(",prompt,response,\n0,p,a,\n")
    assert main(["data", "validate", str(path)]) == 0
    assert "columns that are not read: column 1, column 4\n" in capsys.readouterr().out


def test_the_speakers_of_a_conversation_may_have_capitals(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    row = [{"from": "Human", "value": ASKED}, {"from": "GPT", "value": A}]
    path.write_text(json.dumps({"conversations": row}) + "\n")
    [found] = load_sets(str(path))
    assert found.messages == (Message("user", ASKED),) and triples(found) == DEMONSTRATION


def test_columns_of_other_names_hold_lists_too(tmp_path: Path) -> None:
    write_cells(path := tmp_path / "data.csv", {"frage": ASKED, "texte": [A, B]}, cell, ",")
    [found] = load_sets(str(path), columns="prompt=frage,responses=texte")
    assert [c.response for c in found.candidates] == [A, B]


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


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".CSV", ".tsv", ".Tsv.GZ"])
def test_a_table_shows_its_separator_in_its_first_line(
    mark: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"data{suffix}"
    write_cells(path, {"prompt": "a, b; c\td|e", "response": A}, str, mark)
    if suffix.endswith("GZ"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    [found] = load_sets(str(path))
    assert (found.query, triples(found)) == ("a, b; c\td|e", DEMONSTRATION)
    write_cells(path, {"frage": ASKED, "antwort": A}, str, mark)
    [found] = load_sets(str(path), columns="prompt=frage,response=antwort")
    assert (found.query, triples(found)) == (ASKED, DEMONSTRATION)


@pytest.mark.parametrize("header", ["prompt", '"prompt"', "prompt,a;b;c", "\n\nprompt"])
def test_a_table_of_few_columns_is_not_cut_elsewhere(header: str, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text(f"{header}\nwhat; now{',' if ',' in header else ''}\n")
    assert [found.query for found in load_sets(str(path))] == ["what; now"]


@pytest.mark.parametrize("suffix", [".JSONL", ".Json", ".TXT", ".PARQUET"])
def test_the_case_of_a_suffix_does_not_count(suffix: str, tmp_path: Path) -> None:
    shape = Shape({"prompt": ASKED}, [], "generate", True, (), suffix.lower())
    path = tmp_path / f"data{suffix}"
    write_shape(tmp_path, shape).rename(path)
    sets = load_sets(str(path))
    assert len(sets) == 4 and {found.origin for found in sets} <= {"data", path.name}


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ('\ufeff{"prompt": "p"}\n', 1),
        ('\n \n{"prompt": "p"}\n', 1),
        ('[{"prompt": "p"},\n{"prompt": "q"}]\n', 2),
        ("[INST] p\n[1]\n", 2),
        ("[1, 2]\n", 1),
    ],
)
def test_a_text_that_is_json_is_read_as_json(text: str, prompts: int, tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text(text)
    found = load_sets(str(path))
    assert len(found) == prompts
    assert (found[0].query == "p") == ("prompt" in text)


def test_a_count_of_prompts_does_not_hold_them() -> None:
    """`data validate` reads files that do not fit into memory."""
    sets = (plain_prompt(f"{number} {'x' * 1_000_000}") for number in [*range(40), 7])
    tracemalloc.start()
    try:
        found = count_uses(sets)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found["prompts"], found["different_prompts"]) == (41, 40)
    assert peak < 15_000_000
