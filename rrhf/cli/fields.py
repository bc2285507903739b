"""What a configuration class offers: its fields as flags, the docstring under each as help text.

A field's metadata may hold `positional` (a bare word, in the order of the fields), `aliases` (other
spellings) and `names` (what a path leads to: `rrhf.cli.places`). Left out: nested configurations.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import textwrap
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any


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
        names: what its value names (`rrhf.cli.places`); "" where it is no path.
        owner: the class that defines the field.
    """

    name: str
    hint: Any
    default: Any
    help: str
    positional: bool
    aliases: tuple[str, ...]
    owner: type
    names: str = ""


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
            names=item.metadata.get("names", ""),
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
