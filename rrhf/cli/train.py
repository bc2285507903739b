"""`rrhf train STAGE`: parse, call, print; each stage is one file of `rrhf.training`.

Settings stand in modules that do not import torch, so that mistakes are told before it is loaded.
"""

from __future__ import annotations

import importlib

from rrhf.cli.fields import nearest
from rrhf.cli.places import read_settings
from rrhf.cli.terminal import print_once, tell_repeats
from rrhf.errors import EXIT_DONE, AlreadyFinished, UserError

STAGES: dict[str, tuple[str, str, str]] = {
    "sft": ("rrhf.training.sft", "SFTConfig", "supervised fine-tuning on demonstrations"),
    "reward": ("rrhf.training.reward", "RewardConfig", "a reward model on pairs or ranked groups"),
    "rank": ("rrhf.training.rank", "RankConfig", "a policy on ranked candidates (RRHF)"),
    "iterative": (
        "rrhf.training.iterative",
        "IterativeConfig",
        "a policy by RRHF in rounds: sample, score, rank, and again (IP-n)",
    ),
    "ppo": ("rrhf.training.ppo", "PPOConfig", "a policy on its own answers: PPO, online RRHF"),
}


def usage() -> str:
    lines = [f"  {name:<11}{summary}" for name, (_, _, summary) in STAGES.items()]
    return "\n".join(
        [
            "usage: rrhf train STAGE [--flag value ...]",
            "",
            "stages:",
            *lines,
            "",
            "`rrhf train STAGE --help` lists its flags.",
        ]
    )


def main(argv: list[str]) -> int:
    if not argv:
        raise UserError(f"rrhf train: no stage given\n\n{usage()}")
    stage, rest = argv[0], argv[1:]
    if stage in ("-h", "--help"):
        print(usage())
        return EXIT_DONE
    if stage not in STAGES:
        close = nearest(stage, STAGES)
        hint = f"did you mean {close!r}? " if close else ""
        raise UserError(f"rrhf train: unknown stage {stage!r}; {hint}Stages: {', '.join(STAGES)}.")
    module_name, config_name, _ = STAGES[stage]
    config_class = getattr(importlib.import_module(f"{module_name}_config"), config_name)
    config = read_settings(config_class, rest, f"rrhf train {stage}")
    module = importlib.import_module(module_name)
    try:
        model = module.train(config)
    except AlreadyFinished as finished:
        print_once("The run is complete already; nothing was changed.")
        model = finished.folder
    tell_repeats()
    print_once(f"Trained model: {model}")
    return EXIT_DONE
