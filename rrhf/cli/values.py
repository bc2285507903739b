"""Checks and converts values by the type of their configuration field.

Values come from two places. Command-line arguments are text, so "3" may mean a number and "none"
may mean None. YAML and JSON values already have types, but YAML reads `2e-5` as text; where a
number is expected, text that spells a number is therefore accepted. NaN is never accepted.
"""

from __future__ import annotations

import collections.abc
import contextlib
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from rrhf.cli.config_text import parse_yaml

TRUE_WORDS = ("true", "True", "1")
FALSE_WORDS = ("false", "False", "0")
NONE_WORDS = ("none", "None", "null")
SEQUENCES = (list, tuple, collections.abc.Sequence)
MAX_INT = 2**63 - 1
PREFERENCE = {type(None): 0, bool: 1, int: 2, float: 3, str: 5, Path: 5}


def members(hint: Any) -> tuple[Any, ...]:
    """Return the types in a union, the strictest first; for any other type, only that type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(sorted(typing.get_args(hint), key=lambda member: PREFERENCE.get(member, 4)))
    return (hint,)


def is_boolean(hint: Any) -> bool:
    """Whether a field is boolean, so that its flag without a value means true."""
    return bool in members(hint)


def is_sequence(hint: Any) -> bool:
    """Whether a field is a list or tuple, so that its flag takes several words."""
    return any(
        member in SEQUENCES or typing.get_origin(member) in SEQUENCES for member in members(hint)
    )


def fixed_length(member: Any) -> int | None:
    """Return the number of values of a tuple type such as `tuple[float, float]`; None = any
    number."""
    arguments = typing.get_args(member)
    is_fixed = typing.get_origin(member) is tuple and arguments and arguments[-1] is not Ellipsis
    return len(arguments) if is_fixed else None


def expected(hint: Any) -> str:
    """Describe the values that a type accepts, for a message."""
    words = []
    for member in members(hint):
        arguments = typing.get_args(member)
        if member is type(None):
            words.append("none")
        elif typing.get_origin(member) is Literal:
            words.append("one of " + ", ".join(map(str, arguments)))
        elif is_sequence(member):
            count = fixed_length(member)
            words.append(f"{count} values" if count else "a list")
            if arguments:
                words[-1] += f", each {expected(arguments[0])}"
        else:
            names = {bool: "true or false", int: "a whole number", float: "a number"}
            names |= {str: "text", Path: "a path", dict: "a mapping"}
            words.append(names[typing.get_origin(member) or member])
    return " or ".join(words)


def placeholder(hint: Any) -> str:
    """Return the placeholder for a value of this type on a help page, such as INT."""
    words = []
    for member in members(hint):
        arguments = typing.get_args(member)
        if typing.get_origin(member) is Literal:
            words.append("{" + ",".join(map(str, arguments)) + "}")
        elif is_sequence(member):
            words.append(f"{placeholder(arguments[0]) if arguments else 'TEXT'} ...")
        elif member is not type(None):
            names = {bool: "true|false", int: "INT", float: "FLOAT", Path: "PATH", dict: "MAPPING"}
            words.append(names.get(typing.get_origin(member) or member, "TEXT"))
    return "|".join(words)


class Unfit(Exception):
    """A value does not fit a type."""


def convert(value: Any, hint: Any, from_words: bool) -> Any:
    """Convert a value to a field's type; for a union, to the first member that the value fits.

    Args:
        value: a word or a list of words from the command line, or a value from a file.
        hint: the field's type.
        from_words: True for the command line, where every value is text.

    Raises:
        Unfit: the value does not fit the type.
    """
    for member in members(hint):
        with contextlib.suppress(Unfit):
            return _convert_member(value, member, from_words)
    raise Unfit


def _convert_member(value: Any, member: Any, from_words: bool) -> Any:
    origin = typing.get_origin(member)
    if member is type(None):
        if value is None or (from_words and value in NONE_WORDS):
            return None
    elif origin is Literal:
        for choice in typing.get_args(member):
            if (type(choice) is type(value) and choice == value) or (
                from_words and str(choice) == value
            ):
                return choice
    elif member is bool:
        if isinstance(value, bool) or (type(value) is int and value in (0, 1)):
            return bool(value)
        if from_words and value in TRUE_WORDS + FALSE_WORDS:
            return value in TRUE_WORDS
    elif member in (int, float):
        return _convert_number(value, member)
    elif member in (str, Path):
        if isinstance(value, str):
            return member(value)
    elif dict in (member, origin):
        if from_words and isinstance(value, str):
            with contextlib.suppress(yaml.YAMLError):
                value = parse_yaml(value)
        if isinstance(value, dict):
            return value
    else:
        assert is_sequence(member), f"a configuration field of type {member} is not supported"
        return _convert_sequence(value, member, from_words)
    raise Unfit


def _convert_number(value: Any, kind: type[int] | type[float]) -> int | float:
    is_fraction = kind is int and isinstance(value, float)
    if isinstance(value, bool) or is_fraction or not isinstance(value, (int, float, str)):
        raise Unfit
    try:
        number = kind(value)
    except (ValueError, OverflowError) as error:
        raise Unfit from error
    if (kind is int and abs(number) > MAX_INT) or math.isnan(number):
        raise Unfit
    return number


def _convert_sequence(value: Any, member: Any, from_words: bool) -> Any:
    values = value if isinstance(value, (list, tuple)) else [value]
    arguments = typing.get_args(member) or (str, Ellipsis)
    count = fixed_length(member)
    if count is not None and len(values) != count:
        raise Unfit
    hints = arguments if count is not None else [arguments[0]] * len(values)
    kind = tuple if tuple in (member, typing.get_origin(member)) else list
    return kind(convert(item, hint, from_words) for item, hint in zip(values, hints, strict=True))
