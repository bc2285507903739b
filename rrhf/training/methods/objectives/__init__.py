"""Objectives of `rrhf train rank`, a file each."""

from __future__ import annotations

from rrhf.registry import Registry
from rrhf.training.methods.objectives.spec import RankObjectiveSpec

_HERE = "rrhf.training.methods.objectives"

OBJECTIVES: Registry[RankObjectiveSpec] = Registry(
    "objective",
    RankObjectiveSpec,
    {
        "rrhf": f"{_HERE}.rrhf:RRHF",
        "raft": f"{_HERE}.raft:RAFT",
        "dpo": f"{_HERE}.dpo:DPO",
    },
)
