"""A configuration is a dataclass; this module turns command-line words and YAML files into one.

Every field is a flag of the same name (dashes and underscores are the same), its help text is the
docstring under the field, its type decides what is accepted (`rrhf.cli.values`). `--config` names a
YAML or JSON file, or a preset, whose values flags override. An unknown name, be it a flag or a key,
is an error that names the nearest one: nothing that a user wrote is ignored. Abbreviations are not
accepted on purpose, so that a new flag can never change what an old command means.

What a class offers is read by `rrhf.cli.fields`. Left out: environment variables.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, replace
from typing import Any, TypeVar

import yaml

from rrhf.cli.config_text import MAX_BYTES, ConfigTextError, parse_json, parse_yaml
from rrhf.cli.elsewhere import what_serves
from rrhf.cli.fields import (
    Flag,
    choices_of,
    flags_of,
    near,
    nearest,
    normalise,
    own_flags,
    spellings,
)
from rrhf.cli.help_page import first_sentence, help_page, preset_names
from rrhf.cli.pages import PAGES
from rrhf.cli.terminal import process_place
from rrhf.cli.values import (
    FALSE_WORDS,
    TRUE_WORDS,
    convert,
    expected,
    is_boolean,
    is_sequence,
)
from rrhf.cli.words import meanings, spelt_out
from rrhf.errors import EXIT_DONE, UserError
from rrhf.files import with_home_folder
from rrhf.os_errors import special_file

T = TypeVar("T")

HELP_WORDS = ("-h", "--help", "--help=all")
MAX_SHOWN = 200
"""Longer values are cut in messages."""

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


def parse_config(
    config_class: type[T],
    argv: Sequence[str],
    prog: str,
    fixed: Mapping[str, Any] | None = None,
) -> T:
    """Make a configuration from command-line words.

    Args:
        config_class: a dataclass whose fields carry docstrings.
        argv: the words after the command's name.
        prog: how the command is called, for the usage line.
        fixed: values that follow from how it is called, such as the method of `rrhf train grpo`.

    Raises:
        UserError: an unknown or doubled name, a value of the wrong type, a missing value.
        SystemExit: after `--help`.
    """
    fixed = fixed or {}
    flags = flags_of(config_class)
    if choices := choices_of(config_class):
        chosen = {
            name: value
            for name in choices.values()
            if (value := fixed.get(name) or glimpsed(flags[name], flags, argv))
        }
        flags = flags_of(config_class, chosen)
    if asks_for_help(argv):
        print(help_asked_for(config_class, flags, argv, prog, fixed))
        sys.exit(EXIT_DONE)
    values = read_values(flags, argv, prog)
    for name, value in fixed.items():
        if values.get(name, value) != value:
            raise UserError(
                f"{prog}: this is --{name} {value}, but --{name} {values[name]} is given; leave "
                "out the one or the other"
            )
    return build(config_class, flags, values | dict(fixed), prog)


def asks_for_help(argv: Sequence[str]) -> bool:
    return any(word in HELP_WORDS for word in argv)


def help_asked_for(
    config_class: type,
    flags: Mapping[str, Flag],
    argv: Sequence[str],
    prog: str,
    fixed: Mapping[str, Any] | None = None,
) -> str:
    """The page that the words ask for: of all flags behind `--help all`, of a `--method` too."""
    place = next(place for place, word in enumerate(argv) if word in HELP_WORDS)
    every_flag = argv[place] == "--help=all" or list(argv[place + 1 : place + 2]) == ["all"]
    page = PAGES.get(config_class.__name__)
    choice = (fixed or {}).get(page.chosen_by) if page is not None else None
    flags = dict(flags) | {
        name: replace(flags[name], default=value) for name, value in (fixed or {}).items()
    }
    if page is not None and page.chosen_by and choice is None:
        choice = glimpsed(flags[page.chosen_by], flags, argv)
    return help_page(prog, config_class, flags, every_flag, choice, is_fixed=bool(fixed))


def glimpsed(flag: Flag, flags: Mapping[str, Flag], argv: Sequence[str]) -> str | None:
    """What the words, or else the files that they name, set a flag to; None where they do not.

    Mistakes in them are left to whoever reads all of them.
    """
    names = spelt_out(flags, spellings(flags))
    from_file = None
    for word, after in zip(argv, [*argv, ""][1:], strict=True):
        name, is_joined, joined = word.partition("=")
        value = joined if is_joined else after
        if word.startswith("--") and names.get(normalise(name)) is flag:
            return value
        is_config = word.startswith("--") and normalise(name) == "config"
        if is_config or (word == argv[0] and word.endswith(CONFIG_SUFFIXES)):
            with contextlib.suppress(UserError):
                for key, given in read_config_values(value if is_config else word).items():
                    if names.get(normalise(str(key))) is flag:
                        from_file = str(given)
    return from_file


def read_values(flags: Mapping[str, Flag], argv: Sequence[str], prog: str) -> dict[str, Any]:
    """What words and the files that they name give, by field name; words override files."""
    values, configs = read_words(flags, argv, prog)
    from_files: dict[str, Any] = {}
    for config in configs:
        from_files |= read_config_file(flags, config)
    return from_files | values


def build(
    config_class: type[T], flags: Mapping[str, Flag], values: Mapping[str, Any], prog: str
) -> T:
    """The configuration of these values; a missing one, or one that the class refuses, is told."""
    missing = [
        flag for flag in flags.values() if flag.default is MISSING and flag.name not in values
    ]
    if missing:
        lines = [f"  --{flag.name}: {flag.help}" for flag in missing]
        raise UserError("\n".join([f"{prog} needs also", *lines, f"See `{prog} --help`."]))
    given = {name: value for name, value in values.items() if not flags[name].part_of}
    try:
        for part in dict.fromkeys(flag.part_of for flag in flags.values() if flag.part_of):
            own = {n: value for n, value in values.items() if flags[n].part_of == part}
            given[part[0]] = part[1](**own)
        return config_class(**given)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{prog}: {error}") from error


def unknown(name: str, flags: Mapping[str, Flag], where: str, mark: str = "") -> str:
    """What is said of a name that is none: what it may mean, what serves instead, or what is near.

    Args:
        name: as it was typed.
        flags: of the command.
        where: the command, or the file.
        mark: two dashes for a flag, nothing for a key.
    """
    word = normalise(name)
    kind = "flag" if mark else "key"
    if meant := meanings(word, flags):
        lines = (f"  {mark}{flag.name}: {first_sentence(flag.help)}" for flag in meant)
        return "\n".join([f"{where}: {kind} {name} may mean", *lines])
    if served := what_serves(word, flags):
        return f"{where}: unknown {kind} {name}: {served}."
    if owner := chosen_elsewhere(word, flags):
        return f"{where}: {kind} {name} is a setting of --{owner}, which is not chosen."
    names = [*spellings(flags), "config"] if mark else spellings(flags)
    if close := near(word, names):
        return f"{where}: unknown {kind} {name}; did you mean {one_of(mark, close)}?"
    pointer = f" `{where} --help all` lists all flags." if mark else ""
    return f"{where}: unknown {kind} {name}.{pointer}"


def chosen_elsewhere(word: str, flags: Mapping[str, Flag]) -> str:
    """The choice, such as "objective dpo", that would make a word a flag; "" where none would."""
    for flag in flags.values():
        for name in flag.registry or ():
            settings = getattr(flag.registry and flag.registry[name], "settings", None)
            if settings is not None and word in spellings(own_flags(settings)):
                return f"{flag.name} {name}"
    return ""


def one_of(mark: str, names: Sequence[str]) -> str:
    *others, last = [f"{mark}{name}" for name in names]
    return f"{', '.join(others)} or {last}" if others else last


def read_words(
    flags: Mapping[str, Flag], argv: Sequence[str], prog: str
) -> tuple[dict[str, Any], list[str]]:
    """The values that the words give by field name, and the files or presets that they name."""
    names = spelt_out(flags, spellings(flags))
    mistakes: list[str] = []
    positionals = [flag for flag in flags.values() if flag.positional]
    values: dict[str, Any] = {}
    configs: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if positionals:
                flag = positionals.pop(0)
                taken = [word, *bare_words(words)] if is_sequence(flag.hint) else word
                values[flag.name] = checked(taken, flag, f"{prog}: {flag.name}")
            elif word.endswith(CONFIG_SUFFIXES) and not values and not configs:
                configs.append(word)
            else:
                raise UserError(f"{prog}: unexpected argument {word!r}. See `{prog} --help`.")
            continue
        name, is_joined, joined = word.partition("=")
        if normalise(name) == "config":
            configs.append(joined if is_joined else one_word(words, name, "a file or preset", prog))
            continue
        if normalise(name) not in names:
            mistakes.append(unknown(name, flags, prog, mark="--"))
            bare_words(words)
            continue
        flag = names[normalise(name)]
        if flag.name in values:
            raise UserError(f"{prog}: {flag.name} is given twice, the second time by {name}.")
        if flag in positionals:
            positionals.remove(flag)
        given = joined if is_joined else following(words, flag, name, prog)
        values[flag.name] = checked(given, flag, f"{prog}: {name}")
    refuse(mistakes)
    return values, configs


def refuse(mistakes: Sequence[str]) -> None:
    """Tell all unknown names at once.

    Raises:
        UserError: there are some.
    """
    if mistakes:
        raise UserError("\n".join(mistakes))


def following(words: list[str], flag: Flag, name: str, prog: str) -> Any:
    """Take the words that belong to a flag; a bare boolean flag is true."""
    if is_boolean(flag.hint):
        takes = bool(words) and words[0] in TRUE_WORDS + FALSE_WORDS
        return words.pop(0) if takes else "true"
    if not is_sequence(flag.hint):
        return one_word(words, name, expected(flag.hint), prog)
    return [one_word(words, name, expected(flag.hint), prog), *bare_words(words)]


def bare_words(words: list[str]) -> list[str]:
    """Take the words up to the next flag."""
    taken = []
    while words and not words[0].startswith("--"):
        taken.append(words.pop(0))
    return taken


def one_word(words: list[str], name: str, what: str, prog: str) -> str:
    if not words or words[0].startswith("--"):
        hint = f" (a value that starts with dashes: {name}={words[0]})" if words else ""
        raise UserError(f"{prog}: {name} needs a value: {what}{hint}.")
    return words.pop(0)


def checked(given: Any, flag: Flag, where: str, from_words: bool = True) -> Any:
    try:
        fits, value = convert(given, flag.hint, from_words)
    except ConfigTextError as error:
        raise UserError(f"{where}: {error}") from error
    if fits:
        return with_home(value) if flag.names and not is_prompt(flag, value) else value
    shown = repr(" ".join(given) if from_words and isinstance(given, list) else given)
    if len(shown) > MAX_SHOWN:
        shown = f"{shown[:MAX_SHOWN]}..."
    raise UserError(f"{where}: {shown} does not fit; expected {expected(flag.hint)}.")


def is_prompt(flag: Flag, value: Any) -> bool:
    """Whether the value is a prompt itself, in place of what names data."""
    if flag.names != "prompts" or not isinstance(value, str):
        return False
    from rrhf.data.prompt_text import prompt_text

    return prompt_text(value) is not None


def with_home(value: Any) -> Any:
    """A path with the home folder in place of its `~`, also behind the marks of a mixture of data.

    A shell fills in a `~` only at the beginning of a word, so neither in `--output_dir=~/x` nor in
    a file of settings.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(with_home(item) for item in value)
    if not isinstance(value, str):
        return value
    home = os.path.expanduser("~")
    if value.startswith("~"):
        with_home_folder(value)  # or refused
        value = os.path.expanduser(value)
    return re.sub(r"(?<=[,:])(\s*)~(?=/|$)", lambda found: found.group(1) + home, value)


def read_config_text(config: str) -> str:
    """The text of a configuration file, or of a preset where the name is one.

    It may come from a pipe, such as the shell's `<(...)`, which a single process reads once.
    """
    path = with_home_folder(config)
    kind = special_file(path)
    if kind and process_place()[1] > 1:
        raise UserError(
            f"--config {config}: is {kind}, which several processes cannot read; name a file"
        )
    if path.is_file() or kind:
        try:
            with open(path, encoding="utf-8") as file:
                return file.read(MAX_BYTES + 1)  # one more, so that the parser can tell
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--config {config}: cannot be read: {error}") from error
    presets = preset_names()
    if config in presets:
        return (importlib.resources.files("rrhf.presets") / f"{config}.yaml").read_text("utf-8")
    close = nearest(config, presets)
    hint = f"did you mean {close}? " if close else ""
    raise UserError(
        f"--config {config}: no such file and no such preset; {hint}Presets: {', '.join(presets)}."
    )


def read_config_values(config: str) -> dict[Any, Any]:
    """What a YAML or JSON file, or a preset, gives, under the names that stand there."""
    text = read_config_text(config)
    where = f"--config {config}"
    try:
        content = parse_json(text) if config.endswith(".json") else parse_yaml(text)
    except ConfigTextError as error:
        raise UserError(f"{where}: {error}") from error
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise UserError(f"{where}: cannot be parsed: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected `name: value` lines, found a {type(content).__name__}.")
    return content


def read_config_file(flags: Mapping[str, Flag], config: str) -> dict[str, Any]:
    """The values of a YAML or JSON file by field name."""
    where = f"--config {config}"
    content = read_config_values(config)
    names = spelt_out(flags, spellings(flags))
    mistakes: list[str] = []
    values: dict[str, Any] = {}
    for key, given in content.items():
        if normalise(str(key)) not in names:
            mistakes.append(unknown(str(key), flags, where))
            continue
        flag = names[normalise(str(key))]
        if flag.name in values:
            raise UserError(f"{where}: {key} is given twice, the second time for {flag.name}.")
        values[flag.name] = checked(given, flag, f"{where}: {key}", from_words=False)
    refuse(mistakes)
    return values
