"""Nothing public takes so much that a caller must count: records say what belongs together."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rrhf

MOST = 7


def signatures(node: ast.AST, owner: str = "") -> Iterator[tuple[str, list[str]]]:
    """Names of functions and methods below a node, and of what each is given."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from signatures(child, f"{owner}{child.name}.")
        elif isinstance(child, ast.FunctionDef):
            a = child.args
            names = [one.arg for one in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
            yield f"{owner}{child.name}", [name for name in names if name not in ("self", "cls")]


def is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.replace("__init__", "init").split("."))


@pytest.mark.parametrize(
    ("room", "least"),
    [
        ("training", 200),
        ("data", 150),
        ("scoring", 20),
        ("algorithms", 50),
        ("generation", 50),
        ("evaluation", 50),
        ("models", 80),
        ("cli", 60),
        ("studies", 10),
        ("worlds", 20),
        ("report", 20),
        (".", 80),
    ],
)
def test_nothing_public_takes_more_than_seven_parameters(room: str, least: int) -> None:
    folder = Path(rrhf.__file__).parent / room
    found = [
        (path.relative_to(folder), name, given)
        for path in sorted(folder.glob("*.py" if room == "." else "**/*.py"))
        for name, given in signatures(ast.parse(path.read_text(encoding="utf-8")))
        if is_public(name)
    ]
    assert len(found) > least
    assert not [one for one in found if len(one[2]) > MOST]
