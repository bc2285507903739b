"""`rrhf train STAGE`: parse, call, print; each stage is one file of `rrhf.training`.

Settings stand in modules that do not import torch, so that mistakes are told before it is loaded.
"""

from __future__ import annotations

import importlib

from rrhf.cli import elsewhere
from rrhf.cli.fields import near, normalise
from rrhf.cli.places import read_settings
from rrhf.cli.terminal import print_once, tell_repeats
from rrhf.cli.words import STAGE_WORDS, stage_meant
from rrhf.errors import EXIT_DONE, AlreadyFinished, UserError
from rrhf.training.methods.objectives import OBJECTIVES
from rrhf.training.online.methods import METHODS

STAGES: dict[str, tuple[str, str, str]] = {
    "sft": ("rrhf.training.methods.sft", "SFTConfig", "supervised fine-tuning on demonstrations"),
    "reward": (
        "rrhf.training.methods.reward",
        "RewardConfig",
        "a reward model on pairs or ranked groups",
    ),
    "rank": ("rrhf.training.methods.rank", "RankConfig", "a policy on ranked candidates (RRHF)"),
    "iterative": (
        "rrhf.training.rounds.iterative",
        "IterativeConfig",
        "a policy by RRHF in rounds: sample, score, rank, and again (IP-n)",
    ),
    "ppo": (
        "rrhf.training.online.ppo",
        "PPOConfig",
        "a policy on its own answers: PPO, online RRHF",
    ),
}


def usage() -> str:
    critic_free = [name for name in METHODS if name not in ("ppo", "rrhf")]
    lines = [f"  {name:<11}{summary}" for name, (_, _, summary) in STAGES.items()]
    return "\n".join(
        [
            "usage: rrhf train STAGE [--flag value ...]",
            "",
            "stages:",
            *lines,
            f"  {', '.join(OBJECTIVES)}: rank with that --objective",
            f"  {', '.join(critic_free)}: ppo with that --method",
            "",
            "`rrhf train STAGE --help` shows what people change, `--help all` every flag.",
        ]
    )


def unknown_stage(word: str) -> UserError:
    """What serves in its place, or what was probably meant."""
    if served := elsewhere.STAGES.get(normalise(word).lower()):
        return UserError(f"rrhf train {word}: {served}.")
    close = near(word, [*STAGES, *STAGE_WORDS])
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return UserError(f"rrhf train: unknown stage {word!r}; {hint}Stages: {', '.join(STAGES)}.")


def main(argv: list[str]) -> int:
    if not argv:
        raise UserError(f"rrhf train: no stage given\n\n{usage()}")
    stage, rest = argv[0], argv[1:]
    if stage in ("-h", "--help"):
        print(usage())
        return EXIT_DONE
    meant = stage_meant(stage, tuple(STAGES))
    if meant is None:
        raise unknown_stage(stage)
    module_name, config_name, _ = STAGES[meant[0]]
    config_class = getattr(importlib.import_module(f"{module_name}_config"), config_name)
    config = read_settings(config_class, rest, f"rrhf train {stage}", meant[1])
    module = importlib.import_module(module_name)
    try:
        model = module.train(config)
    except AlreadyFinished as finished:
        print_once("The run is complete already; nothing was changed.")
        model = finished.folder
    tell_repeats()
    print_once(f"Trained model: {model}")
    return EXIT_DONE
