"""The table of methods to compare: the stages that each method needs, and its last policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROUNDS, MANY_ROUNDS = 4, 8
LONGER = 5
"""Factor on the usual length for trainings that continue until gold falls."""


@dataclass(frozen=True)
class Method:
    """One method of the comparison.

    Attributes:
        title: the method's name in tables.
        stages: the stages after SFT and reward model, in order.
        online: `--method` of `rrhf train ppo`; "" if the method trains offline or not at all.
        objective: `--objective` of `rrhf train rank`, or of the online method `rank`.
        settings: the settings that define the method; settings of a study do not replace them.
        best_of: number of SFT samples from which each answer is chosen; 1 = no choice.
        curve: the title of the method's curve; "" = no curve.
    """

    title: str
    stages: tuple[str, ...] = ()
    online: str = ""
    objective: str = "rrhf"
    settings: Mapping[str, Any] = field(default_factory=dict)
    best_of: int = 1
    curve: str = ""

    @property
    def policy(self) -> str:
        """The stage that holds the method's last policy."""
        return self.stages[-1] if self.stages else "sft"

    @property
    def is_long(self) -> bool:
        """Whether the training goes on beyond the usual number of responses, until gold falls."""
        return "times_as_long" in self.settings or len(self.stages) > 2 * ROUNDS


def _rounds(count: int) -> tuple[str, ...]:
    names: list[str] = []
    for number in range(1, count + 1):
        names += [f"round-{number}", rounds_policy(number)]
    return tuple(names)


def rounds_policy(number: int) -> str:
    """Return the stage that trains round `number` of RRHF, counted from 1; round 0 is SFT."""
    return ("sft", "rrhf")[number] if number < 2 else f"rrhf-{number}"


_IP = "RRHF in rounds (IP)"

COMPARED: dict[str, Method] = {
    "sft": Method("SFT"),
    "best-of-n": Method("best of 4", best_of=4, curve="best of N"),
    "best-of-n-sft": Method(
        "best-of-4 fine-tuning", ("round-1", "best-of-n"), settings={"rrhf_weight": 0.0}
    ),
    "rrhf": Method("RRHF offline", _rounds(1), curve=_IP),
    "rrhf-2": Method("RRHF IP-2", _rounds(2), curve=_IP),
    "rrhf-4": Method(f"RRHF IP-{ROUNDS}", _rounds(ROUNDS), curve=_IP),
    "online-rrhf": Method("online RRHF (OP)", ("online-rrhf",), "rrhf", curve="online RRHF (OP)"),
    "ppo": Method("PPO", ("ppo",), "ppo", curve="PPO"),
    "rloo": Method("RLOO", ("rloo",), "rloo", curve="RLOO"),
    "grpo": Method("GRPO", ("grpo",), "grpo", curve="GRPO"),
}
"""The methods that `rrhf compare --world` trains if none are named."""


def _offline(title: str, objective: str) -> Method:
    return Method(title, ("round-1", objective), objective=objective)


def _online(title: str, name: str, **named: Any) -> Method:
    return Method(title, (name,), curve=title, **{"online": name, **named})


def _longer(key: str) -> Method:
    """Return the same online method with more rollouts."""
    method, name = COMPARED[key], f"{key}-long"
    title = f"{method.title}, {LONGER} times as long"
    return Method(title, (name,), method.online, settings={"times_as_long": LONGER}, curve=title)


FURTHER: dict[str, Method] = {
    "dpo": _offline("DPO", "dpo"),
    "dpo_pl": _offline("DPO, Plackett-Luce", "dpo_pl"),
    "ipo": _offline("IPO", "ipo"),
    "simpo": _offline("SimPO", "simpo"),
    "cpo": _offline("CPO", "cpo"),
    "orpo": _offline("ORPO", "orpo"),
    "slic": _offline("SLiC", "slic"),
    "kto": _offline("KTO", "kto"),
    "apo": _offline("APO", "apo"),
    "pro": _offline("PRO", "pro"),
    "lipo": _offline("LiPO", "lipo"),
    "listmle": _offline("ListMLE", "listmle"),
    "listnet": _offline("ListNet", "listnet"),
    "infonca": _offline("InfoNCA", "infonca"),
    "nca": _offline("NCA", "nca"),
    "mpo": _offline("MPO", "mpo"),
    "rebel": _offline("REBEL", "rebel"),
    "qrpo": _offline("QRPO", "qrpo"),
    "sppo": _offline("SPPO", "sppo"),
    "topr": _offline("TOPR", "topr"),
    "gopo": _online("GOPO", "gopo"),
    "online-dpo": _online("online DPO", "online-dpo", online="rank", objective="dpo"),
    "online-dpo_pl": _online(
        "online DPO, Plackett-Luce", "online-dpo_pl", online="rank", objective="dpo_pl"
    ),
    "ppo-long": _longer("ppo"),
    "grpo-long": _longer("grpo"),
    "rloo-long": _longer("rloo"),
    "online-rrhf-long": _longer("online-rrhf"),
    f"rrhf-{MANY_ROUNDS}": Method(f"RRHF IP-{MANY_ROUNDS}", _rounds(MANY_ROUNDS), curve=_IP),
}
"""The methods that a study adds: the other objectives, and longer trainings."""

METHODS: dict[str, Method] = COMPARED | FURTHER
BY_STAGE = {method.policy: method for method in METHODS.values()}
"""The stage that holds a method's last policy -> the method."""
