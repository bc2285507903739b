"""The page that `--help` shows, and the presets that it names."""

from __future__ import annotations

import importlib.resources
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any

from rrhf.cli.fields import Flag
from rrhf.cli.values import is_sequence, placeholder

HELP_WIDTH = 96


def preset_names() -> list[str]:
    """The presets that come with the package."""
    folder = importlib.resources.files("rrhf.presets")
    return sorted(
        item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")
    )


def help_page(prog: str, config_class: type, flags: Mapping[str, Flag]) -> str:
    """The help page: what the command is for, the flags that it needs, the others by their class.

    Args:
        prog: how the command is called.
        config_class: says what it is for; its own flags come first, those that it inherits next.
        flags: what the command takes, also of other classes.
    """
    about = first_paragraph(config_class)
    bare = [shown_word(flag) for flag in flags.values() if flag.positional]
    lines = [" ".join([f"usage: {prog}", *bare, "[--flag value ...]"]), ""]
    lines += [textwrap.fill(about, HELP_WIDTH), ""] if about else []
    required = [flag for flag in flags.values() if flag.default is MISSING]
    if required:
        lines += ["must be given:", *(line for flag in required for line in flag_lines(flag)), ""]
    family = config_class.__mro__
    others = [flag for flag in flags.values() if flag.default is not MISSING]
    owners = list(dict.fromkeys(flag.owner for flag in others))
    owners.sort(key=lambda owner: family.index(owner) if owner in family else len(family))
    for owner in owners:
        title = "" if owner is config_class else first_paragraph(owner).rstrip(".")
        lines += [f"{title or 'flags'}:"]
        for flag in others:
            if flag.owner is owner:
                lines += flag_lines(flag)
        lines.append("")
    presets = ", ".join(preset_names())
    config = f"A YAML or JSON file of such values, or a preset ({presets}); flags override it."
    lines += ["every command:", "  --config FILE|PRESET", indented(config)]
    lines += ["  --help", indented("This page.")]
    return "\n".join(lines)


def shown_word(flag: Flag) -> str:
    """A positional flag in the usage line; brackets where it may be left out."""
    word = flag.name.upper() + (" ..." if is_sequence(flag.hint) else "")
    return word if flag.default is MISSING else f"[{word}]"


def indented(text: str) -> str:
    return textwrap.fill(text, HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


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
    default = "" if flag.default is MISSING else f" [default: {shown_value(flag.default)}]"
    return [head, indented(f"{flag.help}{default}".strip())]


def shown_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "empty"
    return str(value) if value != "" else "empty"
