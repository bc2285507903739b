"""A configuration is a dataclass; this module turns command-line words and YAML files into one.

Every field is a flag of the same name (dashes and underscores are the same), its help text is the
docstring under the field, its type decides what is accepted (`rrhf.cli.values`). `--config` names a
YAML or JSON file, or a preset, whose values flags override. An unknown name, be it a flag or a key,
is an error that names the nearest one: nothing that a user wrote is ignored. Abbreviations are not
accepted on purpose, so that a new flag can never change what an old command means.

A field's metadata may hold `positional` (a bare word, in the order of the fields) and `aliases`
(other spellings). Left out: nested configurations and environment variables.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.resources
import inspect
import json
import sys
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rrhf.cli.values import (
    FALSE_WORDS,
    TRUE_WORDS,
    convert,
    expected,
    is_boolean,
    is_sequence,
    placeholder,
)
from rrhf.errors import EXIT_DONE, UserError

T = TypeVar("T")

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
HELP_WIDTH = 96


@dataclass(frozen=True)
class Flag:
    """One field of a configuration, as the command line sees it.

    Attributes:
        name: the field's name.
        hint: its resolved type.
        default: what it is when nothing is given; MISSING = it must be given.
        help: the docstring under the field, on one line; "" where there is none.
        positional: it may be given as a bare word, in the order of the fields.
        aliases: other spellings.
        owner: the class that defines the field.
    """

    name: str
    hint: Any
    default: Any
    help: str
    positional: bool
    aliases: tuple[str, ...]
    owner: type


def parse_config(config_class: type[T], argv: Sequence[str], prog: str) -> T:
    """Make a configuration from command-line words.

    Args:
        config_class: a dataclass whose fields carry docstrings.
        argv: the words after the command's name.
        prog: how the command is called, for the usage line.

    Raises:
        UserError: an unknown or doubled name, a value of the wrong type, a missing value.
        SystemExit: after `--help`.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(help_text(config_class, prog))
        sys.exit(EXIT_DONE)
    flags = flags_of(config_class)
    values, configs = read_words(flags, argv, prog)
    from_files: dict[str, Any] = {}
    for config in configs:
        from_files |= read_config_file(flags, config)
    values = from_files | values
    missing = [
        flag for flag in flags.values() if flag.default is MISSING and flag.name not in values
    ]
    if missing:
        lines = [f"  --{flag.name}: {flag.help}" for flag in missing]
        raise UserError("\n".join([f"{prog} needs also", *lines, f"See `{prog} --help`."]))
    try:
        return config_class(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{prog}: {error}") from error


# ---- what a configuration class offers -----------------------------------------------------------


def flags_of(config_class: type) -> dict[str, Flag]:
    """The flags of a configuration by field name, in the order of the fields."""
    assert dataclasses.is_dataclass(config_class), f"{config_class} is a dataclass"
    hints = typing.get_type_hints(config_class)
    docs = field_docs(config_class)
    flags = {}
    for item in dataclasses.fields(config_class):
        if not item.init:
            continue
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        flags[item.name] = Flag(
            name=item.name,
            hint=hints[item.name],
            default=default,
            help=docs.get(item.name, ""),
            positional=bool(item.metadata.get("positional")),
            aliases=tuple(normalise(alias) for alias in item.metadata.get("aliases", ())),
            owner=owner_of(config_class, item.name),
        )
    assert "config" not in flags, "the name `config` is taken by --config"
    return flags


def owner_of(config_class: type, name: str) -> type:
    """The class that first declares a field."""
    for cls in reversed(config_class.__mro__):
        if name in inspect.get_annotations(cls):
            return cls
    raise AssertionError(f"{name} is a field of {config_class.__name__}")


def field_docs(config_class: type) -> dict[str, str]:
    """The docstring under each field of the class and of the classes it inherits from."""
    docs: dict[str, str] = {}
    for cls in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        definition = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(definition, ast.ClassDef), f"the source of {cls.__name__} is a class"
        for node, after in zip(definition.body, definition.body[1:], strict=False):
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                docs[node.target.id] = " ".join(str(after.value.value).split())
    return docs


def spellings(flags: Mapping[str, Flag]) -> dict[str, Flag]:
    """Every accepted name, with underscores, and its flag."""
    names = dict(flags)
    for flag in flags.values():
        for alias in flag.aliases:
            assert alias not in names, f"the alias {alias!r} of {flag.name!r} is taken"
            names[alias] = flag
    return names


def normalise(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that the user most probably meant, or None."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    starting = [other for other in known if name and other.startswith(name)]
    return next(iter(close + starting), None)


def unknown(name: str, names: Iterable[str], where: str, mark: str = "") -> UserError:
    close = nearest(normalise(name), names)
    hint = f"; did you mean {mark}{close}?" if close else "."
    return UserError(f"{where}: unknown {'flag' if mark else 'key'} {name}{hint}")


# ---- words and files -----------------------------------------------------------------------------


def read_words(
    flags: Mapping[str, Flag], argv: Sequence[str], prog: str
) -> tuple[dict[str, Any], list[str]]:
    """The values that the words give by field name, and the files or presets that they name."""
    names = spellings(flags)
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
            raise unknown(name, [*names, "config"], prog, mark="--")
        flag = names[normalise(name)]
        if flag in positionals:
            positionals.remove(flag)
        given = joined if is_joined else following(words, flag, name, prog)
        values[flag.name] = checked(given, flag, f"{prog}: {name}")
    return values, configs


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
    fits, value = convert(given, flag.hint, from_words)
    if fits:
        return value
    shown = " ".join(given) if from_words and isinstance(given, list) else given
    raise UserError(f"{where}: {shown!r} does not fit; expected {expected(flag.hint)}.")


def preset_names() -> list[str]:
    """The presets that come with the package."""
    folder = importlib.resources.files("rrhf.presets")
    return sorted(
        item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")
    )


def read_config_text(config: str) -> str:
    """The text of a configuration file, or of a preset where the name is one."""
    path = Path(config)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
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


def read_config_file(flags: Mapping[str, Flag], config: str) -> dict[str, Any]:
    """The values of a YAML or JSON file by field name."""
    text = read_config_text(config)
    where = f"--config {config}"
    try:
        content = json.loads(text) if config.endswith(".json") else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise UserError(f"{where}: cannot be parsed: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected `name: value` lines, found a {type(content).__name__}.")
    names = spellings(flags)
    values: dict[str, Any] = {}
    for key, given in content.items():
        if normalise(str(key)) not in names:
            raise unknown(str(key), names, where)
        flag = names[normalise(str(key))]
        if flag.name in values:
            raise UserError(f"{where}: {key} is given twice, the second time for {flag.name}.")
        values[flag.name] = checked(given, flag, f"{where}: {key}", from_words=False)
    return values


# ---- help ----------------------------------------------------------------------------------------


def help_text(config_class: type, prog: str) -> str:
    """The help page: what the command is for, then the flags, grouped by their class."""
    flags = flags_of(config_class)
    bare = [flag for flag in flags.values() if flag.positional]
    usage = " ".join(
        [f"usage: {prog}", *(flag.name.upper() for flag in bare), "[--flag value ...]"]
    )
    about = first_paragraph(config_class)
    lines = [usage, "", *([about, ""] if about else [])]
    owners = [
        cls for cls in config_class.__mro__ if any(flag.owner is cls for flag in flags.values())
    ]
    for owner in owners:
        title = first_paragraph(owner) if owner is not config_class else ""
        lines += [f"{title.rstrip('.')}:" if title else "flags:"]
        for flag in flags.values():
            if flag.owner is owner:
                lines += flag_lines(flag)
        lines.append("")
    lines += [
        "every command:",
        "  --config FILE|PRESET",
        f"      A YAML or JSON file of such values, or a preset ({', '.join(preset_names())}); "
        "flags override it.",
        "  --help",
        "      This page.",
    ]
    return "\n".join(lines)


def first_paragraph(cls: type) -> str:
    doc = inspect.cleandoc(cls.__doc__ or "")
    is_generated = doc.startswith(f"{cls.__name__}(")
    return "" if is_generated else " ".join(doc.split("\n\n")[0].split())


def flag_lines(flag: Flag) -> list[str]:
    head = f"  --{flag.name} {placeholder(flag.hint)}"
    if flag.positional:
        head += f"   (or the bare word {flag.name.upper()})"
    if flag.aliases:
        head += "   (also " + ", ".join(f"--{alias}" for alias in flag.aliases) + ")"
    default = (
        "must be given" if flag.default is MISSING else f"default: {shown_value(flag.default)}"
    )
    text = f"{flag.help} [{default}]".strip()
    return [
        head,
        textwrap.fill(text, HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6),
    ]


def shown_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "empty"
    return str(value) if value != "" else "empty"
