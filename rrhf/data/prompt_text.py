"""A prompt given in place of a file, as in `--prompts "How do I boil an egg?"`."""

from __future__ import annotations

import os

from rrhf.data.sources import DATA_SUFFIXES, known_names

MARK = "text:"


def prompt_text(spec: str) -> str | None:
    """The prompt that a command-line word contains, or None where it names data.

    `text:` marks one. Else it must hold a blank, and some part of it, cut at commas, must name
    nothing that data could come from: no path, no known name, no single word.
    """
    if spec.startswith(MARK):
        return spec.removeprefix(MARK)
    if os.path.exists(spec) or not any(letter.isspace() for letter in spec.strip()):
        return None
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    return None if all(_may_name_data(part) for part in parts) else spec


def _may_name_data(part: str) -> bool:
    name = part.partition(":")[0]
    return (
        not any(letter.isspace() for letter in part)
        or part.startswith((".", "/", "~"))
        or name.endswith(DATA_SUFFIXES)
        or os.path.exists(part)
        or os.path.exists(name)
        or name in known_names()
    )
