"""docs/coming_from.md: every flag, value and command that its tables name exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
from coming_from_cases import FLAGS, PAGE, ROOT, SCRIPTS, SECTIONS, section, spans, table_rows

from rrhf.cli.fields import normalise, spellings
from rrhf.cli.flags import read_words
from rrhf.cli.main import COMMANDS
from rrhf.cli.words import spelt_out
from rrhf.data.mixing import parse_mixture
from rrhf.errors import UserError


def takes(command: str, words: Sequence[str]) -> bool:
    """Whether a command knows these flags and their values fit."""
    if command == "data validate":
        words = ["--data", *words]  # its bare words are any number of files
    try:
        read_words(FLAGS[command], words, command)
    except UserError:
        return False
    return True


def somebody_takes(words: Sequence[str]) -> bool:
    if len(words) == 1:
        accepted = (spelt_out(flags) for flags in FLAGS.values())
        return any(normalise(words[0]) in names for names in accepted)
    return any(takes(command, words) for command in FLAGS)


def check_span(span: str) -> bool:
    """Whether a piece of code on the page names flags or commands; if so, they must exist."""
    words = shlex.split(span)
    if words[:2] == ["accelerate", "launch"] and len(words) > 2:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file(), span
        words = ["rrhf", *words[words.index("rrhf.cli.main") + 1 :]]
    if words[0].endswith(".sh"):
        words = ["bash", *words]
    if words[0] == "bash" and Path(words[1]).name in SCRIPTS:
        return check_script(span, Path(words[1]).name, words[2:])
    if words[0] == "rrhf":
        words = words[1:]
    for command in FLAGS:
        parts = command.split()
        if words[: len(parts)] == parts:
            rest = words[len(parts) :]
            assert takes(command, rest), f"`{span}`: {command} does not take it"
            if command == "data convert" and rest:
                assert parse_mixture(rest[0])
            return True
    if words[0].startswith("configs/"):
        assert (ROOT / words[0]).is_file(), span
    if words[0].startswith("--") and words != ["--help"] and words[0] != "--config":
        assert somebody_takes(words), f"`{span}`: no command takes it"
        return True
    known = {"COMMAND", *COMMANDS}
    assert not span.startswith("rrhf ") or words[0] in known, f"`{span}`: no such command"
    return False


def check_script(span: str, script: str, words: list[str]) -> bool:
    command, names = SCRIPTS[script]
    if "--launch" in words:
        assert script in ("train.sh", "ppo.sh"), span
        assert "configs/launch.sh" in (ROOT / script).read_text(), span
        where = words.index("--launch")
        launch = words[where + 1]
        assert launch == "FILE" or (ROOT / "configs" / f"{launch}.yaml").is_file(), span
        words = words[:where] + words[where + 2 :]
    bare = [] if not words or words[0].startswith("--") else words[: len(names)]
    assert len(bare) in (0, len(names)), f"`{span}`: {script} takes {len(names)} words first"
    assert takes(command, words[len(bare) :]), f"`{span}`: {script} does not take it"
    return True


def test_every_flag_that_the_page_names_exists_and_takes_its_value() -> None:
    rows = [row for title in SECTIONS for row in table_rows(section(title))]
    assert all(len(row) == 3 for row in rows)
    theirs_left_out = " ".join(cell for row in rows for cell in row[1:])
    prose = PAGE.read_text().partition("\n## ")[0]
    checked = [span for span in spans(theirs_left_out + prose) if check_span(span)]
    assert len(checked) > 80


def test_where_the_page_says_that_a_flag_is_the_same_it_is() -> None:
    rows = [row for title in SECTIONS for row in table_rows(section(title))]
    counted = 0
    for known, here, _ in rows:
        words = [word.strip(",") for span in spans(known) for word in span.split()]
        if here.startswith("the same flag and values"):
            name, *values = words
            for value in values:
                assert takes("train reward", [f"--{normalise(name)}", value]), (known, value)
                counted += 1
        elif here.startswith("the same flag"):
            named = re.match(r"the same flags? in `rrhf (train \w+)`", here)
            for word in words:
                flag = f"--{normalise(word)}"
                where = [FLAGS[named.group(1)]] if named else FLAGS.values()
                assert any(normalise(flag) in spellings(flags) for flags in where), (known, word)
                counted += 1
    assert counted > 20


def test_a_flag_that_does_not_exist_would_be_found() -> None:
    with pytest.raises(AssertionError, match="no command takes it"):
        check_span("--loss_typ average")
    with pytest.raises(AssertionError, match="does not take it"):
        check_span("train reward --loss_type averag")
    with pytest.raises(AssertionError, match="does not take it"):
        check_span("train sft --loss_type average")
    with pytest.raises(AssertionError):
        check_span("train.sh --launch zero9")
