"""The shapes that people's data have: a table of rows, and files made of them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rrhf.records import CandidateSet

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
        flags: what the user must give in addition to the path.
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


def triples(found: CandidateSet) -> list[tuple[str, str, float | None]]:
    return [(c.source, c.response, c.score) for c in found.candidates]


def write_cells(path: Path, row: dict[str, Any], form: Callable[[Any], str], mark: str) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file, delimiter=mark)
        table.writerows([[*row], [form(value) for value in row.values()]])
