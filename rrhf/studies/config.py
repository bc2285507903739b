"""The settings of `rrhf demo` and of `rrhf compare --world`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from rrhf.errors import UserError
from rrhf.ranges import COUNT, INDEX, Ranged
from rrhf.studies.method_table import COMPARED, METHODS
from rrhf.worlds import DEFAULT, WORLDS

TUNING_SEEDS = (10, 11)
"""The seeds on which settings are chosen; no result is taken from them."""


@dataclass
class DemoConfig(Ranged):
    """Align a tiny model on a built-in task, from data to evaluation, and print a table of what
    each method gained; takes minutes on a CPU."""

    output_dir: str = field(default="runs/demo", metadata={"names": "output folder"})
    """Folder for the policies, samples and table; the same command resumes a stopped
    demonstration."""

    seeds: int = 1
    """Number of repetitions, each with its own data and weights."""

    size: Literal["full", "smoke"] = "full"
    """full, or smoke: a third of the work, for tests."""

    jobs: int = 0
    """Number of seeds to run at the same time; 0 = one for each core."""

    RANGES: ClassVar = {"seeds": COUNT, "jobs": INDEX}


def check_methods(methods: Sequence[str]) -> None:
    """Check that every name is a key of `METHODS`."""
    for method in methods:
        if method not in METHODS:
            raise UserError(f"--methods {method}: unknown; choose from {', '.join(METHODS)}")


@dataclass
class MethodsConfig(Ranged):
    """Train every method on a world, a small task whose true preference is known, and write a page
    that compares their gains and costs."""

    world: str = field(default=DEFAULT, metadata={"registry": WORLDS})
    """The world to compare the methods on, or package.module:name of your own world
    (rrhf.worlds.protocol)."""

    seeds: int = 3
    """Number of repetitions, each with its own data and weights."""

    first_seed: int = 0
    """Number of the first seed. The settings were chosen on seeds 10 and 11."""

    methods: list[str] = field(default_factory=list)
    """Methods to train; empty = all: best-of-n, best-of-n-sft, rrhf, rrhf-2, rrhf-4, online-rrhf,
    ppo, rloo, grpo. SFT is always included."""

    output_dir: str = field(default="runs/compare", metadata={"names": "output folder"})
    """Folder for the runs; the same command resumes a stopped comparison."""

    into: str = field(default="", metadata={"names": "output folder"})
    """Folder for the page, its pictures and its numbers; empty = output_dir."""

    size: Literal["full", "smoke"] = "full"
    """full, or smoke: a third of the work, for tests."""

    jobs: int = 0
    """Seeds to run at the same time; 0 = one for each core."""

    RANGES: ClassVar = {"seeds": COUNT, "first_seed": INDEX, "jobs": INDEX}

    def __post_init__(self) -> None:
        super().__post_init__()
        WORLDS[self.world]  # raises if there is no such world
        check_methods(self.methods)

    @property
    def draws_pictures(self) -> bool:
        """Whether a method has a curve, so that pictures are drawn (needs the extra `report`)."""
        return any(METHODS[method].curve for method in self.methods or COMPARED)


@dataclass
class StudyConfig(Ranged):
    """Choose the settings of every method in the same number of trials, then train all methods with
    many seeds on each world, and write the pages that compare them; takes hours."""

    output_dir: str = field(default="runs/study", metadata={"names": "output folder"})
    """Folder for the runs; the same command resumes a stopped study and adds what is missing."""

    into: str = field(default="", metadata={"names": "output folder"})
    """Folder for the pages, pictures and numbers; empty = output_dir."""

    worlds: list[str] = field(default_factory=lambda: [*WORLDS])
    """The worlds, or package.module:name of your own."""

    seeds: int = 12
    """Number of repetitions, each with its own data and weights."""

    first_seed: int = 12
    """Number of the first seed; settings are chosen on seeds 10 and 11."""

    methods: list[str] = field(default_factory=list)
    """Methods to train, as in `rrhf compare --world`; empty = all. SFT, RRHF offline and PPO are
    always included."""

    long_seeds: int = 5
    """Number of seeds on which some methods continue training until gold falls."""

    axis_seeds: int = 0
    """Number of seeds on which one thing at a time is varied: number of candidates, noise of the
    scores, data and size of the reward model, who writes the candidates, weight of the ranking
    term, seed of the sampling; writes axes.md. 5 is enough to see large effects."""

    size: Literal["full", "smoke"] = "full"
    """full, or smoke: a third of the work, for tests."""

    jobs: int = 0
    """Seeds to run at the same time; 0 = one for each core."""

    draws_pictures: ClassVar = True

    RANGES: ClassVar = {
        "seeds": COUNT,
        **dict.fromkeys(("first_seed", "long_seeds", "axis_seeds", "jobs"), INDEX),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis_seeds > self.seeds:
            raise UserError(
                f"--axis_seeds {self.axis_seeds}: must be at most --seeds {self.seeds}, since the "
                "axes start from the policies of these seeds"
            )
        for world in self.worlds:
            WORLDS[world]  # raises if there is no such world
        check_methods(self.methods)
        if taken := [s for s in TUNING_SEEDS if 0 <= s - self.first_seed < self.seeds]:
            raise UserError(
                f"--first_seed {self.first_seed} --seeds {self.seeds}: settings are chosen on seed "
                f"{taken[0]}, so it must not be among the seeds; use --first_seed 12"
            )
