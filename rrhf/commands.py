"""Commands as a person would type them: what a message ends with, so that it can be copied.

Standard library only.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from typing import Any


def next_step(*words: object) -> str:
    """A command for the next stage, ready to be pasted into a shell."""
    return shlex.join(str(word) for word in words)


def command_of(program: str, config: Any, **changes: Any) -> str:
    """The command that gives the settings of a configuration, with some of them changed.

    Args:
        program: such as "rrhf score".
        config: a dataclass; fields at their default are left out.
        changes: settings that differ from the configuration's.
    """
    flags = {item.name: item for item in dataclasses.fields(config) if item.init}
    assert changes.keys() <= flags.keys(), f"{changes} are fields of {type(config).__name__}"
    positional: list[str] = []
    named: list[str] = []
    for name, item in flags.items():
        value = changes.get(name, getattr(config, name))
        if item.metadata.get("positional"):
            positional += _words(value)
        elif name in changes or value != _default(item):
            named += [f"--{name}", *_words(value)]
    return f"{program} {shlex.join([*positional, *named])}"


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


def _words(value: Any) -> Sequence[str]:
    if isinstance(value, (list, tuple)):
        return [str(one) for one in value]
    if value is None or isinstance(value, (bool, dict)):
        return [json.dumps(value) if value is not None else "none"]
    return [str(value)]  # of a float all digits: the command must mean the same number
