"""The registry of the objectives of `rrhf train rank`; each objective is one file."""

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
        "dpo_pl": f"{_HERE}.dpo_pl:DPO_PL",
        "ipo": f"{_HERE}.ipo:IPO",
        "simpo": f"{_HERE}.simpo:SIMPO",
        "cpo": f"{_HERE}.cpo:CPO",
        "orpo": f"{_HERE}.orpo:ORPO",
        "slic": f"{_HERE}.slic:SLIC",
        "kto": f"{_HERE}.kto:KTO",
        "apo": f"{_HERE}.apo:APO",
        "pro": f"{_HERE}.pro:PRO",
        "lipo": f"{_HERE}.lipo:LIPO",
        "listmle": f"{_HERE}.listmle:LISTMLE",
        "listnet": f"{_HERE}.listnet:LISTNET",
        "infonca": f"{_HERE}.infonca:INFONCA",
        "nca": f"{_HERE}.nca:NCA",
        "mpo": f"{_HERE}.mpo:MPO",
        "rebel": f"{_HERE}.rebel:REBEL",
        "qrpo": f"{_HERE}.qrpo:QRPO",
        "sppo": f"{_HERE}.sppo:SPPO",
        "topr": f"{_HERE}.topr:TOPR",
    },
)
