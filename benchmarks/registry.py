"""Every benchmark by name, and what a benchmark module has to offer.

A benchmark is a module of this package with

- `CASES`: name -> a frozen dataclass of sizes, in the order of the table; its `__str__`, where it
  has one, is what the table shows;
- `GOALS`: case -> the ratio that is to be reached at least; a case without one informs only;
- `run(case, rounds, **settings) -> dict`: compares what the variants compute, then measures them,
  and gives `benchmark`, `case`, `shape` (the case's sizes), `theory` (ratio of floating-point
  operations, or None), `relative_differences`, and `timings` (variant -> `harness.Timing`; the
  baseline first, then the variant that the goal is about, then what else informs). What cannot be
  measured here raises `harness.NotMeasured`;
- `table(result) -> str`: for the terminal.

Its results stand in the README's table `timings`, unless the module names another in `TABLE`, whose
results hold other things (`benchmarks.tables`).

It may also have `picture(result, path)`, which draws what was written; `ROUNDS` (case -> rounds,
where five are too many), `SETTINGS` (option -> its help; each is handed to `run` as a string),
`VARIANTS` (what `--variants` can ask for; `run` takes `variants`).
"""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from types import ModuleType
from typing import Any

NAMES = (
    "rrhf_step",
    "generation",
    "sampler_vllm",
    "trl_head",
    "dpo_pair",
    "objective_step",
    "dpo_commands",
    "mixed_queries",
    "scoring",
    "peak_memory",
    "scaling",
    "demo_speed",
    "ppo_iteration",
    "gpu_step",
)
"""In order of cost."""

FEW_ROUNDS = 5


def load(name: str) -> ModuleType:
    """The module of a benchmark."""
    return import_module(f"benchmarks.{name}")


def rounds_of(module: ModuleType, case: str) -> int:
    """How many rounds a case is measured in, unless another count is asked for."""
    return int(getattr(module, "ROUNDS", {}).get(case, FEW_ROUNDS))


def table_of(module: ModuleType) -> str:
    """Which table of the README its results stand in."""
    return str(getattr(module, "TABLE", "timings"))


def settings_of(module: ModuleType) -> dict[str, str]:
    """Options of its own, each with its help."""
    return dict(getattr(module, "SETTINGS", {}))


def sizes_of(shape: Any) -> str:
    """The sizes of a case, for a row of the table."""
    if type(shape).__str__ is not object.__str__:
        return str(shape)
    return ", ".join(f"{name} {value}" for name, value in asdict(shape).items())
