"""Worlds: made-up tasks whose true preference is known, each a folder.

Everything about a world is in its folder; nothing above this package names a world.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rrhf.errors import UserError
from rrhf.records import Candidate, CandidateSet
from rrhf.registry import Registry
from rrhf.user_code import guarded
from rrhf.worlds.protocol import World, WorldMaker

WORLDS: Registry[WorldMaker] = Registry(
    "world",
    WorldMaker,  # type: ignore[type-abstract]
    {"help_desk": "rrhf.worlds.help_desk.world:HelpDesk"},
)
DEFAULT = "help_desk"
"""The world of the demonstration."""


def make_world(name: str, **size_and_seed: Any) -> World:
    """The world of that name.

    Args:
        name: of a registered world, or `package.module:name` of the user's own.
        size_and_seed: as `WorldMaker` takes them; none if only the preference is needed.

    Raises:
        UserError: there is no such world, or it is no `World`.
    """
    maker = WORLDS[name]
    words = ", ".join(f"{key}={value!r}" for key, value in size_and_seed.items())
    with guarded(f"world {name}: {name.rpartition(':')[2]}({words})"):
        world = maker(**size_and_seed)
    if not isinstance(world, World):
        raise UserError(
            f"world {name}: is of type {type(world).__name__}, which is no world; derive the class "
            "from rrhf.worlds.protocol.World"
        )
    return world


def gold_of(world: World, s: CandidateSet, candidate: Candidate) -> float | None:
    """`World.gold`, with failures of a user's world turned into one message.

    Raises:
        UserError: it raised an exception, or returned neither a finite number nor None.
    """
    with guarded(f"world {world.name}: gold()"):
        found = world.gold(s, candidate)
        value = None if found is None else float(found)
    if value is None or math.isfinite(value):
        return value
    raise UserError(
        f"world {world.name}: gold() is {value} for prompt {s.id}; return a finite number, or None "
        "for a prompt of another world"
    )


def gold_scores(world: World, sets: Sequence[CandidateSet]) -> dict[str, list[float | None]]:
    """Prompt id -> the gold utility of each candidate."""
    return {s.id: [gold_of(world, s, candidate) for candidate in s.candidates] for s in sets}
