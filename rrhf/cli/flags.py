"""Turns command-line arguments and YAML or JSON files into a configuration, which is a dataclass.

Every field is a flag of the same name (dashes and underscores are the same). The docstring under
the field is its help text, and its type decides which values are accepted (`rrhf.cli.values`).
`--config` names a YAML or JSON file, or a preset; flags override its values. An unknown flag or key
is an error that names the nearest known one, so nothing that a user wrote is ignored. Abbreviations
are not accepted on purpose, so that a new flag can never change what an old command means.

`rrhf.cli.fields` reads the flags from the class. Left out: environment variables.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, replace
from typing import Any, TypeVar

from rrhf.cli.config_files import ConfigFiles
from rrhf.cli.config_text import ConfigTextError
from rrhf.cli.fields import Flag, Part, choices_among, flags_of, normalise
from rrhf.cli.help_page import help_page
from rrhf.cli.unknown import unknown
from rrhf.cli.values import (
    FALSE_WORDS,
    TRUE_WORDS,
    Unfit,
    convert,
    expected,
    is_boolean,
    is_sequence,
)
from rrhf.cli.words import spelt_out
from rrhf.errors import EXIT_DONE, UserError
from rrhf.files import with_home_folder

T = TypeVar("T")

HELP_WORDS = ("-h", "--help", "--help=all")
MAX_SHOWN = 200
"""Longer values are cut in messages."""


def parse_config(
    config_class: type[T],
    argv: Sequence[str],
    prog: str,
    fixed: Mapping[str, str] | None = None,
) -> T:
    """Make a configuration from command-line arguments.

    Args:
        config_class: a dataclass whose fields carry docstrings.
        argv: the arguments after the command's name.
        prog: the command, such as "rrhf score", for the usage line.
        fixed: values that the command's name sets, such as the method in `rrhf train grpo`.

    Raises:
        UserError: a name is unknown or given twice, a value has the wrong type, or is missing.
        SystemExit: after `--help`.
    """
    fixed = fixed or {}
    files = ConfigFiles()
    flags, chosen = flags_of(config_class), dict[str, str]()
    with contextlib.suppress(*[UserError] if asks_for_help(argv) else []):
        seen: set[str] = set()
        # What is chosen may bring a choice of its own, as an online method brings objectives.
        while fresh := [name for name in choices_among(config_class, flags) if name not in seen]:
            for name in fresh:
                if value := fixed.get(name) or look_up(flags[name], flags, argv, files):
                    chosen[name] = value
            seen.update(fresh)
            flags = flags_of(config_class, chosen)
    if asks_for_help(argv):
        flags |= {name: replace(flags[name], default=value) for name, value in fixed.items()}
        print(help_page(prog, config_class, flags, asks_for_all(argv), chosen, bool(fixed)))
        sys.exit(EXIT_DONE)
    values = read_values(flags, argv, prog, files)
    for name, value in fixed.items():
        if values.get(name, value) != value:
            raise UserError(
                f"{prog}: this is --{name} {value}, but --{name} {values[name]} is given; leave "
                "out one of the two"
            )
    return build(config_class, flags, values | dict(fixed), prog)


def asks_for_help(argv: Sequence[str]) -> bool:
    return any(word in HELP_WORDS for word in argv)


def asks_for_all(argv: Sequence[str]) -> bool:
    """Whether the command line asks for help on every flag."""
    place = next(place for place, word in enumerate(argv) if word in HELP_WORDS)
    return argv[place] == "--help=all" or list(argv[place + 1 : place + 2]) == ["all"]


def look_up(
    flag: Flag, flags: Mapping[str, Flag], argv: Sequence[str], files: ConfigFiles
) -> str | None:
    """Look up one flag in the arguments and `--config` files before the full parse; None if not
    set.

    Errors in the arguments are not reported here but by the full parse.
    """
    names = spelt_out(flags)
    configs = [word for word in argv[:1] if is_config_file(word)]
    for word, after in zip(argv, [*argv, ""][1:], strict=True):
        name, is_joined, joined = word.partition("=")
        value = joined if is_joined else after
        if word.startswith("--") and names.get(normalise(name)) is flag:
            return value
        if name == "--config" and (is_joined or not after.startswith("--")):
            configs.append(value)
    keys = ((key, given) for config in configs for key, given in files[config].items())
    found = [str(given) for key, given in keys if names.get(normalise(str(key))) is flag]
    return found[-1] if found else None


def is_config_file(word: str) -> bool:
    """Whether a bare argument looks like a settings file, which needs no --config."""
    return not word.startswith("--") and word.endswith((".yaml", ".yml", ".json"))


def read_values(
    flags: Mapping[str, Flag], argv: Sequence[str], prog: str, files: ConfigFiles | None = None
) -> dict[str, Any]:
    """Read field name -> value from the arguments and the `--config` files, which they override."""
    files = ConfigFiles() if files is None else files
    values, configs = read_words(flags, argv, prog)
    from_files: dict[str, Any] = {}
    for config in configs:
        given = _Given(flags, f"--config {config}")
        for key, value in files[config].items():
            if flag := given.flag_of(str(key)):
                given.take(flag, str(key), value, from_words=False)
        from_files |= given.complete()
    return from_files | values


def build(
    config_class: type[T], flags: Mapping[str, Flag], values: Mapping[str, Any], prog: str
) -> T:
    """Build the configuration from values by field name.

    Raises:
        UserError: a value is missing, or the class refuses a value.
    """
    missing = [
        flag for flag in flags.values() if flag.default is MISSING and flag.name not in values
    ]
    if missing:
        lines = [f"  --{flag.name}: {flag.help}" for flag in missing]
        raise UserError("\n".join([f"{prog} needs also", *lines, f"See `{prog} --help`."]))

    def built(of: type[T], place: tuple[Part, ...]) -> T:
        given = {name: value for name, value in values.items() if flags[name].part_of == place}
        depth = len(place)
        inner = (f.part_of[: depth + 1] for f in flags.values() if f.part_of[:depth] == place)
        for parts in dict.fromkeys(parts for parts in inner if len(parts) > depth):
            given[parts[-1].field] = built(parts[-1].settings, parts)
        return of(**given)

    try:
        return built(config_class, ())
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{prog}: {error}") from error


class _Given:
    """Collects the values that a command line or a settings file gives, by field name.

    Args:
        flags: the command's flags.
        where: the command or the file, for messages.
        mark: the prefix of names in messages: "--" for flags, "" for keys of a file.
    """

    def __init__(self, flags: Mapping[str, Flag], where: str, mark: str = "") -> None:
        self.values: dict[str, Any] = {}
        self._flags, self._where, self._mark = flags, where, mark
        self._names = spelt_out(flags)
        self._mistakes: list[str] = []

    def flag_of(self, name: str) -> Flag | None:
        """Return the flag with this name; None for an unknown name, which `complete` reports."""
        flag = self._names.get(normalise(name))
        if flag is None:
            self._mistakes.append(unknown(name, self._flags, self._where, self._mark))
        return flag

    def take(self, flag: Flag, name: str, given: Any, from_words: bool = True) -> None:
        """Check and store the value of a flag.

        Raises:
            UserError: the flag already has a value, or the value does not fit.
        """
        if flag.name in self.values:
            raise UserError(
                f"{self._where}: {flag.name} is given twice, the second time by {name}."
            )
        self.values[flag.name] = checked(given, flag, f"{self._where}: {name}", from_words)

    def complete(self) -> dict[str, Any]:
        """Return all values; call this once every name has been read.

        Raises:
            UserError: some names are unknown; the message lists all of them.
        """
        if self._mistakes:
            raise UserError("\n".join(self._mistakes))
        return self.values


def read_words(
    flags: Mapping[str, Flag], argv: Sequence[str], prog: str
) -> tuple[dict[str, Any], list[str]]:
    """Parse arguments; return (field name -> value, names of `--config` files and presets)."""
    given = _Given(flags, prog, mark="--")
    positionals = [flag for flag in flags.values() if flag.positional]
    configs: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, is_joined, joined = word.partition("=")
        if not word.startswith("--"):
            if positionals:
                flag = positionals.pop(0)
                taken = [word, *bare_words(words)] if is_sequence(flag.hint) else word
                given.take(flag, flag.name, taken)
            elif is_config_file(word) and not given.values and not configs:
                configs.append(word)
            else:
                raise UserError(f"{prog}: unexpected argument {word!r}. See `{prog} --help`.")
        elif normalise(name) == "config":
            configs.append(joined if is_joined else one_word(words, name, "a file or preset", prog))
        elif (named := given.flag_of(name)) is None:
            bare_words(words)
        else:
            if named in positionals:
                positionals.remove(named)
            given.take(named, name, joined if is_joined else following(words, named, name, prog))
    return given.complete(), configs


def following(words: list[str], flag: Flag, name: str, prog: str) -> Any:
    """Remove and return the value that follows a flag; a bare boolean flag is "true"."""
    if is_boolean(flag.hint):
        takes = bool(words) and words[0] in TRUE_WORDS + FALSE_WORDS
        return words.pop(0) if takes else "true"
    first = one_word(words, name, expected(flag.hint), prog)
    return [first, *bare_words(words)] if is_sequence(flag.hint) else first


def bare_words(words: list[str]) -> list[str]:
    """Remove and return the arguments up to the next flag."""
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
    """Convert a value to the flag's type, and expand `~` in paths.

    Raises:
        UserError: the value does not fit the type.
    """
    try:
        value = convert(given, flag.hint, from_words)
    except ConfigTextError as error:
        raise UserError(f"{where}: {error}") from error
    except Unfit:
        shown = repr(" ".join(given) if from_words and isinstance(given, list) else given)
        if len(shown) > MAX_SHOWN:
            shown = f"{shown[:MAX_SHOWN]}..."
        raise UserError(f"{where}: {shown} does not fit; expected {expected(flag.hint)}.") from None
    return with_home(value) if flag.names and not is_prompt(flag, value) else value


def is_prompt(flag: Flag, value: Any) -> bool:
    """Whether the value of a flag for prompts is the text of a prompt rather than a data source."""
    if flag.names != "prompts" or not isinstance(value, str):
        return False
    from rrhf.data.prompt_text import prompt_text

    return prompt_text(value) is not None


def with_home(value: Any) -> Any:
    """Expand `~` in a path, also after the commas and colons of a data mixture.

    A shell expands `~` only at the start of a word, so not in `--output_dir=~/x` and not in a
    settings file.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(with_home(item) for item in value)
    if not isinstance(value, str):
        return value
    home = os.path.expanduser("~")
    if value.startswith("~"):
        with_home_folder(value)  # raises for an unknown user
        value = os.path.expanduser(value)
    return re.sub(r"(?<=[,:])(\s*)~(?=/|$)", lambda found: found.group(1) + home, value)
