"""The pages that `--help` and `--help all` show.

The short page fits on one screen: the required flags, the flags that people often change, and an
example. They stand in `rrhf.cli.short_help`; a command without an entry there shows all its flags.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import MISSING
from typing import Any

from rrhf.cli.config_files import preset_names
from rrhf.cli.fields import Flag, choices_among
from rrhf.cli.short_help import PAGES, SETTINGS
from rrhf.cli.values import is_sequence, placeholder

HELP_WIDTH = 96
TEXT_COLUMN = 36
"""The column at which the text of a flag begins on the short page."""
SENTENCE_END = re.compile(r"\. (?=[A-Z])")


def help_page(
    prog: str,
    config_class: type,
    flags: Mapping[str, Flag],
    every_flag: bool = False,
    chosen: Mapping[str, str] | None = None,
    is_fixed: bool = False,
) -> str:
    """Return the text that `--help` or `--help all` prints.

    Args:
        prog: the command, such as "rrhf score".
        config_class: the configuration; its docstring says what the command is for.
        flags: the command's flags; some may belong to other classes.
        every_flag: show all flags.
        chosen: field that chooses from a registry -> its value, if not the default.
        is_fixed: the command's name sets that choice, so the page does not offer others.
    """
    page = PAGES.get(config_class.__name__)
    if page is None or every_flag:
        return full_page(prog, config_class, flags)
    lines = heading(prog, config_class, flags)
    sections = {
        "must be given": [flag for flag in flags.values() if flag.default is MISSING],
        "often changed": [flags[name] for name in page.common],
    }
    for field in choices_among(config_class, flags):
        registry = flags[field].registry
        assert registry is not None, f"{field} chooses from a registry"
        if flags[field].part_of:  # a choice within a choice: shown once it is made, on its own page
            if field not in (chosen or {}):
                continue
            del sections["often changed"]
        choice = (chosen or {}).get(field) or str(flags[field].default)
        title = f"settings of --{field} {choice}"
        if not is_fixed and len(registry) > 1:
            others = ", ".join(name for name in registry if name != choice)
            hint = f" (add one of {others} to see its own)"
            if len(title + hint) > HELP_WIDTH:
                hint = f" (add --{field} NAME to see another's)"
            title += hint
        own = [flag for flag in flags.values() if flag.part_of and flag.part_of[-1].choice == field]
        own += [flags[name] for name in getattr(registry[choice], "shown", ())]
        few = SETTINGS.get(getattr(registry[choice].settings, "__name__", ""), ())
        sections[title] = [flag for flag in own if not few or flag.name in few]
        unused = getattr(registry[choice], "unused", ())
        for name, found in sections.items():
            sections[name] = [flag for flag in found if flag.name not in unused]
    for title, found in ((title, found) for title, found in sections.items() if found):
        lines += [f"{title}:", *(line for flag in found for line in row(flag)), ""]
    lines += ["example:", *(f"  {line}" for line in page.example.format(prog=prog).splitlines())]
    more = (
        f"In brackets: the default. `{prog} --help all` lists all {len(flags)} "
        f"flags. --config FILE (YAML or JSON) or a preset ({', '.join(preset_names())}) gives "
        "values that flags override."
    )
    return "\n".join([*lines, "", textwrap.fill(more, HELP_WIDTH)])


def row(flag: Flag) -> list[str]:
    """Return the lines of a flag on the short page: the first sentence of its help, and its
    default."""
    head = f"  --{flag.name}"
    if flag.default is not False:  # a flag that is off by default needs no value
        head += f" {shown_placeholder(flag)}"
    text = first_sentence(flag.help) + listed_names(flag)
    if flag.default is not MISSING and (flag.default or type(flag.default) in (int, float)):
        text += f" [{shown_value(flag.default)}]"
    start = f"{head}  ".ljust(TEXT_COLUMN)
    return textwrap.wrap(
        text, HELP_WIDTH, initial_indent=start, subsequent_indent=" " * TEXT_COLUMN
    ) or [head]


def first_sentence(text: str) -> str:
    """Return the first sentence of a text, without its full stop."""
    return SENTENCE_END.split(text, maxsplit=1)[0].rstrip(".")


def heading(prog: str, config_class: type, flags: Mapping[str, Flag]) -> list[str]:
    """Return the usage line, and a paragraph on what the command is for."""
    about = first_paragraph(config_class)
    bare = [shown_word(flag) for flag in flags.values() if flag.positional]
    lines = [" ".join([f"usage: {prog}", *bare, "[--flag value ...]"]), ""]
    return [*lines, textwrap.fill(about, HELP_WIDTH), ""] if about else lines


def full_page(prog: str, config_class: type, flags: Mapping[str, Flag]) -> str:
    """Return the page with all flags: the required flags, then the others by the class that defines
    them.

    Args:
        prog: the command, such as "rrhf score".
        config_class: the configuration; its own flags come first, then the flags it inherits.
        flags: the command's flags; some may belong to other classes.
    """
    lines = heading(prog, config_class, flags)
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
    lines += ["  --help", indented("Show help; `--help all` lists every flag.")]
    return "\n".join(lines)


def shown_word(flag: Flag) -> str:
    """Return a positional flag in the usage line; brackets mean that the flag may be left out."""
    word = flag.name.upper() + (" ..." if is_sequence(flag.hint) else "")
    return word if flag.default is MISSING else f"[{word}]"


def indented(text: str) -> str:
    return textwrap.fill(text, HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def first_paragraph(cls: type) -> str:
    doc = inspect.cleandoc(cls.__doc__ or "")
    is_generated = doc.startswith(f"{cls.__name__}(")
    return "" if is_generated else " ".join(doc.split("\n\n")[0].split())


def flag_lines(flag: Flag) -> list[str]:
    head = f"  --{flag.name} {shown_placeholder(flag)}"
    if flag.positional:
        head += f"   (or the bare word {flag.name.upper()})"
    if flag.aliases:
        head += "   (also " + ", ".join(f"--{alias}" for alias in flag.aliases) + ")"
    return [head, indented(f"{flag.help}{listed_names(flag)}{default_of(flag)}".strip())]


def shown_placeholder(flag: Flag) -> str:
    """Return the placeholder of a flag's value on a help page."""
    if flag.registry is None:
        return placeholder(flag.hint)
    names = "NAME" if names_are_long(flag.registry) else "{" + ",".join(flag.registry) + "}"
    return f"{names}|MODULE:NAME"


def names_are_long(registry: Collection[str]) -> bool:
    """Whether a registry has too many names for one line."""
    return len(",".join(registry)) > HELP_WIDTH - TEXT_COLUMN


def listed_names(flag: Flag) -> str:
    """Return the names that a flag accepts, if they are too long for its placeholder; else ""."""
    if flag.registry is None or not names_are_long(flag.registry):
        return ""
    return f" (one of {', '.join(flag.registry)})"


def default_of(flag: Flag) -> str:
    return "" if flag.default is MISSING else f" [default: {shown_value(flag.default)}]"


def shown_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "empty"
    return str(value) if value != "" else "empty"
