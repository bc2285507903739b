"""docs/architecture.md: its picture and table are up to date, and its paths exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from places import ROOT

from docs import architecture, files

REMAKE = "run `python docs/architecture.py`"


def test_picture_and_table_are_of_today() -> None:
    edges = architecture.imports()
    assert architecture.PICTURE.read_text() == architecture.picture(edges, architecture.floors()), (
        REMAKE
    )
    text = architecture.PAGE.read_text()
    assert architecture.page(edges, text) == text, REMAKE


def test_an_edge_is_every_kind_of_import(tmp_path: Path) -> None:
    package = tmp_path / "rrhf"
    (package / "training" / "core").mkdir(parents=True)
    (package / "data").mkdir()
    (package / "training" / "core" / "loop.py").write_text(
        "import json\nfrom rrhf.data.rows import a\n\ndef f():\n    import rrhf.files\n"
    )
    (package / "data" / "rows.py").write_text("from rrhf import errors\nfrom rrhf.data import b\n")
    assert architecture.imports(package) == {
        ("training.core", "data"),
        ("training.core", "files"),
        ("data", "errors"),
    }


def test_what_follows_from_other_arrows_is_not_drawn() -> None:
    edges = {("a", "b"), ("b", "c"), ("a", "c"), ("d", "c")}
    assert architecture.needed(edges) == [("a", "b"), ("b", "c"), ("d", "c")]
    assert architecture.needed(set()) == []


def test_arrows_go_down() -> None:
    layers = architecture.floors()
    floor = {name: number for number, layer in enumerate(layers) for name in layer}
    assert all(floor[start] <= floor[end] for start, end in architecture.imports())


def test_a_room_without_a_place_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [layer for layer in architecture.floors() if "algorithms" not in layer]
    with pytest.raises(SystemExit, match="give algorithms, endpoints a place in ROOMS"):
        architecture.picture(architecture.imports(), layers)


def test_every_path_exists_and_every_room_is_named() -> None:
    text = architecture.PAGE.read_text()
    table = text[text.index("## I want to change X") : text.index("## One training step")]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) >= 25
    paths = {path for row in rows for path in re.findall(r"`((?:rrhf/|configs/|train)\S*)`", row)}
    missing = [path for path in sorted(paths) if not list(ROOT.glob(path))]
    assert not missing
    rooms = {path.parts[1] for path in map(Path, paths) if len(path.parts) > 2}
    packages = {path.parent.name for path in (ROOT / "rrhf").glob("*/__init__.py")}
    assert packages - {"presets"} <= rooms
    walk = text[text.index("## One training step") : text.index("## Imports between rooms")]
    for name in set(re.findall(r"`([\w/]+\.py)`", walk)):
        assert list((ROOT / "rrhf").rglob(name)), name


def test_every_file_is_found_by_its_words() -> None:
    lines = [line.split("\n")[0] for line in files.found([])]
    named = {line.split(": ")[0] for line in lines}
    assert named >= {
        str(path.relative_to(ROOT)) for path in ROOT.glob("rrhf/**/*.py") if path.name[0] != "_"
    }
    assert all(line.endswith(".") and len(line.split()) > 3 for line in lines)
    average = next(line for line in files.found(["moving", "AVERAGE", "weights"]))
    assert average.startswith("rrhf/training/online/ema.py: ")
    assert list(files.found(["no such words"])) == []


def test_a_file_is_found_by_a_function_too(tmp_path: Path) -> None:
    package = tmp_path / "rrhf"
    package.mkdir()
    (package / "x.py").write_text(
        '"""Holds x. More."""\ndef _no():\n    """Blue."""\ndef shown():\n    """Red. Or."""\n'
    )
    assert list(files.found(["red"], package)) == ["rrhf/x.py: Holds x.\n    shown: Red."]
    assert list(files.found(["blue"], package)) == []
