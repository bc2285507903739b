"""The message for a flag, or a key in a file of settings, that does not exist."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rrhf.cli.elsewhere import replacement_for
from rrhf.cli.fields import Flag, near, normalise, spellings
from rrhf.cli.help_page import first_sentence
from rrhf.cli.words import meanings


def unknown(name: str, flags: Mapping[str, Flag], where: str, mark: str = "") -> str:
    """Return the message for an unknown name: its likely meaning, what to use instead, or similar
    names.

    Args:
        name: the name as the user typed it.
        flags: the command's flags.
        where: the command or the file.
        mark: "--" for a flag, "" for a key of a file.
    """
    word = normalise(name)
    kind = "flag" if mark else "key"
    if meant := meanings(word, flags):
        lines = (f"  {mark}{flag.name}: {first_sentence(flag.help)}" for flag in meant)
        return "\n".join([f"{where}: {kind} {name} may mean", *lines])
    if served := replacement_for(word, flags):
        return f"{where}: unknown {kind} {name}: {served}."
    if owner := chosen_elsewhere(word, flags):
        return f"{where}: {kind} {name} is a setting of --{owner}, which is not chosen."
    names = [*spellings(flags), "config"] if mark else spellings(flags)
    if close := near(word, names):
        meant_names = " or ".join(f"{mark}{one}" for one in close)
        return f"{where}: unknown {kind} {name}; did you mean {meant_names}?"
    pointer = f" `{where} --help all` lists all flags." if mark else ""
    return f"{where}: unknown {kind} {name}.{pointer}"


def chosen_elsewhere(word: str, flags: Mapping[str, Flag]) -> str:
    """The registry choice that has this setting, such as "objective dpo"; "" if none has it."""
    return _choice_with(word, {flag.name: flag.registry or {} for flag in flags.values()})


def _choice_with(word: str, registries: Mapping[str, Mapping[str, Any]]) -> str:
    """As `chosen_elsewhere`, from field -> registry; reads no help texts, which would take long."""
    within = ""
    for choice, registry in registries.items():
        for name, entry in registry.items():
            if (settings := getattr(entry, "settings", None)) is None:
                continue
            own = {item.name: item.metadata for item in dataclasses.fields(settings)}
            if word in own or any(word in one.get("aliases", ()) for one in own.values()):
                return f"{choice} {name}"
            inner = {n: one["registry"] for n, one in own.items() if "registry" in one}
            if not within and (found := _choice_with(word, inner)):
                within = f"{choice} {name} --{found}"
    return within
