"""`rrhf train STAGE`: parse, call, print; each stage is one file of `rrhf.training`.

Settings are in modules that do not import torch, so that errors are reported before it is loaded.
"""

from __future__ import annotations

import importlib
import textwrap

from rrhf.cli import elsewhere
from rrhf.cli.fields import normalise
from rrhf.cli.help_page import HELP_WIDTH
from rrhf.cli.menu import Menu
from rrhf.cli.places import read_settings
from rrhf.cli.terminal import print_once, print_repeats
from rrhf.cli.words import METHODS_BY_NAME, STAGE_WORDS, stage_meant
from rrhf.errors import EXIT_DONE, AlreadyFinished, UserError
from rrhf.training.methods.objectives import OBJECTIVES

STAGES: dict[str, tuple[str, str, str]] = {
    "sft": ("rrhf.training.methods.sft", "SFTConfig", "fine-tune a model on demonstrations"),
    "reward": (
        "rrhf.training.methods.reward",
        "RewardConfig",
        "train a reward model on preference pairs or ranked groups",
    ),
    "rank": (
        "rrhf.training.methods.rank",
        "RankConfig",
        "train a policy on scored candidates (RRHF, DPO, best of N)",
    ),
    "iterative": (
        "rrhf.training.rounds.iterative",
        "IterativeConfig",
        "train a policy by RRHF in rounds: sample, score, rank, repeat (IP-n)",
    ),
    "ppo": (
        "rrhf.training.online.ppo",
        "PPOConfig",
        "train a policy on its own responses: PPO, GRPO, online RRHF, ...",
    ),
}


MENU = Menu(
    "rrhf train",
    "stage",
    "Train a model; each stage leaves a run folder with the trained model in it.",
    {name: summary for name, (_, _, summary) in STAGES.items()},
    (
        *textwrap.wrap(
            f"{', '.join(OBJECTIVES)}: rank with that --objective",
            HELP_WIDTH,
            initial_indent="  ",
            subsequent_indent="    ",
        ),
        f"  {', '.join(METHODS_BY_NAME)}: ppo with that --method",
        "",
        "`rrhf train STAGE --help` shows flags that people often change, `--help all` every flag.",
    ),
)


def main(argv: list[str]) -> int:
    if MENU.is_shown(argv):
        return EXIT_DONE
    stage, rest = argv[0], argv[1:]
    meant = stage_meant(stage, tuple(STAGES))
    if meant is None:
        if served := elsewhere.STAGES.get(normalise(stage).lower()):
            raise UserError(f"rrhf train {stage}: {served}.")
        raise MENU.unknown(stage, STAGE_WORDS)
    module_name, config_name, _ = STAGES[meant[0]]
    config_class = getattr(importlib.import_module(f"{module_name}_config"), config_name)
    config = read_settings(config_class, rest, f"rrhf train {stage}", meant[1])
    module = importlib.import_module(module_name)
    try:
        model = module.train(config)
    except AlreadyFinished as finished:
        print_once("The run is complete already; nothing was changed.")
        model = finished.folder
    print_repeats()
    print_once(f"Trained model: {model}")
    return EXIT_DONE
