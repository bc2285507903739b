"""The parts of the programme, in the order in which they run.

A part is a module of this package with

- `items(setting) -> list[str]`: what it checks or measures, each small enough to be lost;
- `run(item, setting) -> dict`: a `line` for people and numbers for machines; `passed` where it may
  fail. What cannot be done on this machine raises `NotMeasured` with the reason.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

PARTS: dict[str, tuple[str, int]] = {
    "preflight": ("what is installed here, what the card does, what will be left out", 60),
    "tests": ("tests/gpu", 180),
    "layouts": ("every layout against padded rows", 180),
    "step": ("a training step of a 1B- and a 7B-shaped model", 330),
    "ppo": ("an iteration of PPO at 1B", 240),
    "sampling": ("responses at 1B against generate", 90),
    "training": ("each paradigm, killed and resumed", 330),
    "offload": ("PPO with weights and optimiser in host memory", 90),
}
"""What each is for, and its seconds: 25 minutes together."""


def load(name: str) -> ModuleType:
    """The module of a part."""
    return import_module(f"benchmarks.gpu.{name}")
