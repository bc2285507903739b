"""What a configuration field accepts: its type turned into checks, conversions and words.

Values come from two places. Command-line words are text, so "3" may be a number and "none" nothing;
YAML and JSON values have types already, but YAML reads `2e-5` as text, so text that spells a number
is taken where a number is expected. NaN is never a number.
"""

from __future__ import annotations

import collections.abc
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
    """The alternatives of a union, the strictest first; a type that is none stands alone."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(sorted(typing.get_args(hint), key=lambda member: PREFERENCE.get(member, 4)))
    return (hint,)


def is_boolean(hint: Any) -> bool:
    """True where a bare flag means true."""
    return bool in members(hint)


def is_sequence(hint: Any) -> bool:
    """True where a flag takes several words."""
    return any(
        member in SEQUENCES or typing.get_origin(member) in SEQUENCES for member in members(hint)
    )


def fixed_length(member: Any) -> int | None:
    """The number of values of a tuple type such as `tuple[float, float]`; None = any number."""
    arguments = typing.get_args(member)
    is_fixed = typing.get_origin(member) is tuple and arguments and arguments[-1] is not Ellipsis
    return len(arguments) if is_fixed else None


def expected(hint: Any) -> str:
    """What a value may be, in words for a message."""
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
    """How a value stands in the help."""
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


def convert(value: Any, hint: Any, from_words: bool) -> tuple[bool, Any]:
    """(True, the value as the first alternative that it fits), or (False, None).

    Args:
        value: a word or a list of words of the command line, or a value read from a file.
        hint: the field's type.
        from_words: True for the command line, where everything is text.
    """
    for member in members(hint):
        fits, converted = convert_member(value, member, from_words)
        if fits:
            return True, converted
    return False, None


def convert_member(value: Any, member: Any, from_words: bool) -> tuple[bool, Any]:
    origin = typing.get_origin(member)
    if member is type(None):
        return value is None or (from_words and value in NONE_WORDS), None
    if origin is Literal:
        return convert_choice(value, typing.get_args(member), from_words)
    if member is bool:
        if isinstance(value, bool) or (type(value) is int and value in (0, 1)):
            return True, bool(value)
        return from_words and value in TRUE_WORDS + FALSE_WORDS, value in TRUE_WORDS
    if member in (int, float):
        return convert_number(value, member)
    if member in (str, Path):
        return (True, member(value)) if isinstance(value, str) else (False, None)
    if member is dict or origin is dict:
        return convert_mapping(value, from_words)
    assert is_sequence(member), f"a configuration field of type {member} is not supported"
    return convert_sequence(value, member, from_words)


def convert_choice(value: Any, choices: tuple[Any, ...], from_words: bool) -> tuple[bool, Any]:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return True, choice
        if from_words and str(choice) == value:
            return True, choice
    return False, None


def convert_number(value: Any, kind: type[int] | type[float]) -> tuple[bool, Any]:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False, None
    if kind is int and isinstance(value, float):
        return False, None
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        return False, None
    if kind is int and abs(number) > MAX_INT:
        return False, None
    return (False, None) if math.isnan(number) else (True, number)


def convert_mapping(value: Any, from_words: bool) -> tuple[bool, Any]:
    if from_words and isinstance(value, str):
        try:
            value = parse_yaml(value)
        except yaml.YAMLError:
            return False, None
    return (True, value) if isinstance(value, dict) else (False, None)


def convert_sequence(value: Any, member: Any, from_words: bool) -> tuple[bool, Any]:
    values = value if isinstance(value, (list, tuple)) else [value]
    arguments = typing.get_args(member) or (str, Ellipsis)
    count = fixed_length(member)
    if count is not None and len(values) != count:
        return False, None
    hints = arguments if count is not None else [arguments[0]] * len(values)
    done = [convert(item, hint, from_words) for item, hint in zip(values, hints, strict=True)]
    kind = tuple if tuple in (member, typing.get_origin(member)) else list
    return all(fits for fits, _ in done), kind(item for _, item in done)
