"""One screen of help for every command: complete, true and short."""

from __future__ import annotations

import re
import resource
import shlex
import subprocess
import sys
from dataclasses import MISSING

import pytest
from command_cases import COMMANDS, flags_for

from rrhf.cli.fields import own_flags
from rrhf.cli.flags import parse_config, read_words
from rrhf.cli.help_page import help_page
from rrhf.cli.main import main
from rrhf.cli.short_help import PAGES
from rrhf.errors import UserError
from rrhf.training.methods.objectives import OBJECTIVES
from rrhf.training.online.methods import METHODS
from rrhf.training.online.ppo_config import PPOConfig

ONE_SCREEN = 60
FEW_FLAGS = ("demo", "fetch", "compare", "compare --world help_desk")
FEW_FLAGS += ("data convert", "data stats", "data validate")


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    assert end.value.code == 0
    return capsys.readouterr().out.splitlines()


def flags_on(lines: list[str]) -> list[str]:
    """The flags that a page explains, in order."""
    return [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]


@pytest.mark.parametrize("command", [*COMMANDS, *FEW_FLAGS])
def test_help_is_one_screen(command: str, capsys: pytest.CaptureFixture[str]):
    lines = shown(capsys, *command.split(), "--help")
    assert len(lines) <= ONE_SCREEN
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_help_of_an_objective_is_one_screen(objective: str, capsys: pytest.CaptureFixture[str]):
    lines = shown(capsys, "train", "rank", "--objective", objective, "--help")
    assert len(lines) <= ONE_SCREEN
    settings = OBJECTIVES[objective].settings
    assert settings is not None
    assert set(own_flags(settings)) <= set(flags_on(lines))


@pytest.mark.parametrize("method", METHODS)
def test_help_of_a_method_shows_its_settings(method: str, capsys: pytest.CaptureFixture[str]):
    lines = shown(capsys, "train", "ppo", "--method", method, "--help")
    assert len(lines) <= ONE_SCREEN
    place = next(n for n, line in enumerate(lines) if line.startswith("settings of --method"))
    assert f"--method {method} " in lines[place]
    record = METHODS[method]
    own = [] if record.settings is None else list(own_flags(record.settings))
    assert flags_on(lines[place:]) == [*own, *record.shown]
    assert shown(capsys, "train", "ppo", "-h", f"--rl-algorithm={method}") == lines
    critic = {"critic_learning_rate", "share_trunk", "gae_lambda", "clip_range_value"}
    assert critic.isdisjoint(flags_on(lines)) == (method != "ppo")


def test_help_without_a_method_shows_those_of_the_default(capsys: pytest.CaptureFixture[str]):
    plain = shown(capsys, "train", "ppo", "--help")
    assert plain == shown(capsys, "train", "ppo", "--help", "--method", "ppo")
    with pytest.raises(UserError, match="unknown method 'no-such': choose one of ppo, rloo"):
        parse_config(PPOConfig, ["--method", "no-such", "--help"], "rrhf train ppo")


def test_an_engine_without_settings_has_no_section(capsys: pytest.CaptureFixture[str]):
    assert not [line for line in shown(capsys, "evaluate", "--help") if "settings of" in line]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_parts_of_a_page(command: str, capsys: pytest.CaptureFixture[str]):
    page, flags = PAGES[COMMANDS[command].__name__], flags_for(command)
    required = [flag.name for flag in flags.values() if flag.default is MISSING]
    text = "\n".join(shown(capsys, *command.split(), "--help"))
    needed = text.partition("must be given:\n")[2].partition("\n\n")[0]
    changed = text.partition("often changed:\n")[2].partition("\n\n")[0]
    assert flags_on(needed.splitlines()) == required
    assert flags_on(changed.splitlines()) == list(page.common)
    assert len(page.common) == min(10, len(flags) - len(required))
    assert set(page.common).isdisjoint(required)
    assert f"`rrhf {command} --help all` lists all {len(flags)} flags." in " ".join(text.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_a_page_is_accepted(command: str):
    """It names files that are not there; all else about it is right."""
    text = PAGES[COMMANDS[command].__name__].example.format(prog=f"rrhf {command}")
    words = shlex.split(text.replace("\\\n", " "))
    assert words[: len(command.split()) + 1] == ["rrhf", *command.split()]
    given = words[len(command.split()) + 1 :]
    flags = flags_for(command)
    values, _ = read_words(flags, given, command)
    missing = {flag.name for flag in flags.values() if flag.default is MISSING} - set(values)
    assert not missing
    if command != "response-gen":
        parse_config(COMMANDS[command], given, command)


@pytest.mark.parametrize("command", [*COMMANDS, *FEW_FLAGS])
@pytest.mark.parametrize("asked", [["--help", "all"], ["--help=all"], ["-h", "all"]])
def test_help_all_shows_every_flag(
    command: str, asked: list[str], capsys: pytest.CaptureFixture[str]
):
    found = flags_on(shown(capsys, *command.split(), *asked))
    if command in COMMANDS:
        assert set(found) == set(flags_for(command)) | {"config", "help"}
    assert len(set(found)) == len(found)


def test_every_page_belongs_to_a_command():
    assert set(PAGES) == {config.__name__ for config in COMMANDS.values()}
    for command, config in COMMANDS.items():
        assert help_page(f"rrhf {command}", config, flags_for(command))


def test_help_costs_a_few_times_a_bare_interpreter():
    """A bound without seconds: the least processor time of some starts, against a bare one.

    Bare is an interpreter with YAML; 4.4 times that is measured, with torch it is a hundred times.
    """

    def seconds(*words: str) -> float:
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        return end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime

    bare, helped, mistaken = [], [], []
    code = "import sys; from rrhf.cli.main import main; sys.exit(main(sys.argv[1:]) != {})"
    for _ in range(5):
        bare.append(seconds("-c", "import yaml"))
        helped.append(seconds("-m", "rrhf.cli.main", "train", "ppo", "--help"))
        mistaken.append(seconds("-c", code.format(2), "train", "ppo", "--no_such_flag"))
    assert min(helped) < 8 * min(bare)
    assert min(mistaken) < 8 * min(bare)


@pytest.mark.parametrize("command", [*COMMANDS, *FEW_FLAGS, "", "train", "data"])
def test_a_page_says_what_its_command_does(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a sentence right below the usage line, before any list."""
    if command in ("", "train", "data"):
        assert main([*command.split(), "--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
    else:
        lines = shown(capsys, *command.split(), "--help")
    assert lines[0].startswith("usage: rrhf") and not lines[1]
    about = " ".join(lines[2 : lines.index("", 2)])
    assert re.fullmatch(r"[A-Z][\w-]+\b.*\.", about) and len(about.split()) >= 6, about
