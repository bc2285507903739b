"""Reads a scorer's own settings from its name: `http://127.0.0.1:8000/score#timeout_seconds=60`.

Settings follow the name, each after a `#`. So every command that names a scorer takes them, each
member of an ensemble may have its own, and they are recorded wherever the name is. Standard library
only.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, TypeVar

from rrhf.errors import UserError

T = TypeVar("T")

_WORDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
}


def split_settings(name: str) -> tuple[str, dict[str, str]]:
    """Split a scorer's name into the part before the first `#`, and the settings after it.

    Raises:
        UserError: a setting has no value, or is given twice.
    """
    plain, *parts = name.split("#")
    given: dict[str, str] = {}
    for part in parts:
        key, is_set, value = part.partition("=")
        if not key.isidentifier() or not is_set or not value:
            raise UserError(f"{name}: {'#' + part!r} is no setting; write #NAME=VALUE")
        if key in given:
            raise UserError(f"{name}: #{key} is given twice; leave one out")
        given[key] = value
    return plain, given


def made_settings(settings: type[T], given: Mapping[str, Any], where: str) -> T:
    """Build settings from values by field name.

    Args:
        settings: a dataclass whose fields are texts, numbers, booleans, choices or tuples of texts.
        given: values as texts (a tuple's items are separated by "|"), or of the fields' types.
        where: the scorer's name or the settings file, for messages.

    Raises:
        UserError: a name is unknown, a value does not fit, or a value is missing.
    """
    hints = typing.get_type_hints(settings)
    known = {item.name: item for item in fields(settings) if item.init}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"{where}: there is no setting {name!r}; known: {', '.join(known)}")
        values[name] = _converted(value, hints[name], f"{where}: {name}")
    for name, item in known.items():
        if item.default is MISSING and item.default_factory is MISSING and name not in values:
            raise UserError(f"{where}: {name} is missing; add #{name}=VALUE to the scorer's name")
    return settings(**values)


def _converted(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # X | None
        hint = next(one for one in arguments if one is not type(None))
        return None if value is None else _converted(value, hint, where)
    if origin is Literal:
        if value in arguments:
            return value
        expected = f"one of {', '.join(map(str, arguments))}"
    elif origin is tuple:
        items = value.split("|") if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items):
            return tuple(items)
        expected = "a list of texts"
    elif hint is bool:
        if value in (True, False, "true", "false"):
            return value in (True, "true")
        expected = _WORDS[bool]
    else:
        expected = _WORDS[hint]
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            try:
                found = hint(value)
            except ValueError:
                found = None
            is_same = hint is str or not isinstance(value, float) or found == value
            if found is not None and is_same and (hint is str or math.isfinite(found)):
                return found
    raise UserError(f"{where}: {value!r} does not fit; expected {expected}")
