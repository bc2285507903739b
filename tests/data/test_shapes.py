"""The shapes that people's data have, each through the commands: checked, converted, trained on.

For every shape the table says what its first row must become, so that nothing is emptied in
silence, and which command uses it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_cases import reward_model_folder
from shape_cases import (
    ASKED,
    DEMONSTRATION,
    SHAPES,
    A,
    Shape,
    triples,
    write_shape,
)
from tiny import save_tiny

from rrhf.cli.main import main
from rrhf.data.candidate_files import read_candidate_sets
from rrhf.data.columns import parse_columns
from rrhf.data.mixing import load_sets
from rrhf.data.sources import SourceCounts, read_sets
from rrhf.data.uses import count_uses, describe_uses
from rrhf.errors import UserError
from rrhf.manifests import read_manifest
from rrhf.records import Message

torch.set_num_threads(1)


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


def test_the_speakers_of_a_conversation_may_have_capitals(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    row = [{"from": "Human", "value": ASKED}, {"from": "GPT", "value": A}]
    path.write_text(json.dumps({"conversations": row}) + "\n")
    [found] = load_sets(str(path))
    assert found.messages == (Message("user", ASKED),) and triples(found) == DEMONSTRATION


def test_text_parts_of_a_turn_are_its_text(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    said = [{"type": "text", "text": ASKED[:5]}, {"type": "text", "text": ASKED[5:]}]
    row = {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": A}]}
    path.write_text(json.dumps(row) + "\n")
    [found] = load_sets(str(path))
    assert found.messages == (Message("user", ASKED),) and triples(found) == DEMONSTRATION
    for parts in ([{"type": "image", "url": "x"}], [], [*said, {"type": "text"}]):
        row["messages"][0]["content"] = parts
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match="content: must be a text, is a list; give the text al"):
            load_sets(str(path))
