"""The settings of `rrhf demo` and of `rrhf compare --world`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rrhf.errors import UserError
from rrhf.ranges import COUNT, INDEX, check_ranges
from rrhf.studies.method_table import METHODS
from rrhf.worlds import DEFAULT, WORLDS


@dataclass
class DemoConfig:
    """Run every stage on the embedded world and print the table."""

    output_dir: str = field(default="runs/demo", metadata={"names": "output folder"})
    """Where policy, samples and table go; a stopped demonstration goes on from there."""

    seeds: int = 1
    """How many times to do everything, each with other data and weights."""

    size: Literal["full", "smoke"] = "full"
    """full, or smoke: a third of the work, for tests."""

    jobs: int = 0
    """Seeds at the same time; 0 = one for each core."""

    def __post_init__(self) -> None:
        check_ranges(self, {"seeds": COUNT, "jobs": INDEX})


@dataclass
class MethodsConfig:
    """Train and compare all methods on a world, whose true preference is known."""

    world: str = field(default=DEFAULT, metadata={"registry": WORLDS})
    """The world to compare the methods on; package.module:name for one of your own
    (rrhf.worlds.protocol)."""

    seeds: int = 3
    """How many times to do everything, each with other data and weights."""

    first_seed: int = 0
    """Number of the first; settings were chosen on 10 and 11."""

    methods: list[str] = field(default_factory=list)
    """Which methods; empty = all: best-of-n, best-of-n-sft, rrhf, rrhf-2, rrhf-4, online-rrhf, ppo,
    rloo, grpo. SFT is always there."""

    output_dir: str = field(default="runs/compare", metadata={"names": "output folder"})
    """Run folders go here; what was stopped goes on from there."""

    into: str = field(default="", metadata={"names": "output folder"})
    """Write page, pictures and numbers to this folder; empty = output_dir."""

    size: Literal["full", "smoke"] = "full"
    """full, or smoke: a third of the work, for tests."""

    jobs: int = 0
    """Seeds at the same time; 0 = one for each core."""

    def __post_init__(self) -> None:
        check_ranges(self, {"seeds": COUNT, "first_seed": INDEX, "jobs": INDEX})
        WORLDS[self.world]  # or refused
        for method in self.methods:
            if method not in METHODS:
                raise UserError(f"--methods {method}: unknown; choose from {', '.join(METHODS)}")

    @property
    def draws_pictures(self) -> bool:
        """Whether some method has a curve, so that the report needs the extra `report`."""
        return any(METHODS[method].curve for method in self.methods or METHODS)
