"""docs/data.md: the command that it shows prints what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rrhf.cli.main import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def test_validate_prints_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = re.search(r"```\n\$ rrhf (data validate mine.jsonl)\n(.*?)```", PAGE.read_text(), re.S)
    assert shown is not None
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "id": n,
            "prompt": f"Where is {n}?",
            "responses": ["Here.", "There.", "?"],
            "ranks": [1, 2, 3],
        }
        for n in range(4)
    ]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(shown[1].split()) == 0
    assert capsys.readouterr().out == shown[2]
