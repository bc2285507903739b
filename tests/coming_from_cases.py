"""docs/coming_from.md as data: its sections, commands and tables, and the commands it may name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from command_cases import COMMANDS, flags_for

from rrhf.cli import data
from rrhf.cli.fields import flags_of
from rrhf.data.convert import ConvertConfig
from rrhf.report.config import CompareConfig

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "coming_from.md"
SECTIONS = ("PaddleNLP's RLHF", "EasyRLHF", "SheepRL's RLHF", "RRHF and Wombat")

# A script's words are those of the command that it starts.
SCRIPTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "train.sh": ("train rank", ("--model_name_or_path", "--output_dir", "--data_path")),
    "ppo.sh": (
        "train ppo",
        ("--model_name_or_path", "--reward_model_name_or_path", "--output_dir", "--train_datasets"),
    ),
    "response_gen.sh": ("response-gen", ("--model_name_or_path", "--output_dir")),
    "scoring_responses.sh": ("score", ("--input_file", "--output_file")),
}

OTHERS: dict[str, type] = {
    "compare": CompareConfig,
    "data convert": ConvertConfig,
    "data stats": data.StatsConfig,
    "data validate": data.ValidateConfig,
}
CONFIGS = {**COMMANDS, **OTHERS}
"""The commands that the page may name, and what each is configured by."""
FLAGS = {
    **{name: flags_for(name) for name in COMMANDS},
    **{name: flags_of(config) for name, config in OTHERS.items()},
}


def section(title: str) -> str:
    """The text under a heading of the second level."""
    _, _, rest = PAGE.read_text().partition(f"\n## {title}\n")
    assert rest, f"the page has the section {title!r}"
    return rest.partition("\n## ")[0]


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """One command as it stands on the page: its words, or a file that is written by `cat`."""

    words: tuple[str, ...]
    content: str = ""


def steps(shell: str) -> Iterator[Step]:
    """The commands of a fence; backslashes join lines, `cat >FILE <<'WORD'` writes a file."""
    lines = iter(shell.replace("\\\n", " ").splitlines())
    for line in lines:
        if here := re.fullmatch(r"cat >(\S+) <<'(\w+)'", line):
            content = iter(lambda: next(lines), here.group(2))
            yield Step(("cat", here.group(1)), "\n".join(content) + "\n")
        elif line.strip():
            yield Step(tuple(shlex.split(line, comments=True)))


def table_rows(text: str) -> list[list[str]]:
    """The cells of a section's table, heading and rule left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def command_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """(command, its arguments) of a line that starts `rrhf` or one of the scripts."""
    if words[0] == "bash":
        command, names = SCRIPTS[Path(words[1]).name]
        given = zip(names, words[2:], strict=False)
        return command, [*(word for pair in given for word in pair), *words[2 + len(names) :]]
    assert words[0] == "rrhf", f"{shlex.join(words)}: the page starts rrhf or bash"
    count = 2 if words[1] in ("train", "data") else 1
    return " ".join(words[1 : 1 + count]), list(words[1 + count :])
