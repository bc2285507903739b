"""`rrhf study NAME`: parse, call, print; each study is one file of `rrhf.studies`."""

from __future__ import annotations

import importlib

from rrhf.cli.compare import compare_methods
from rrhf.cli.fields import nearest
from rrhf.cli.places import read_settings
from rrhf.cli.terminal import print_once
from rrhf.errors import EXIT_DONE, UserError

STUDIES: dict[str, tuple[str, str, str]] = {
    "hh-reward": (
        "rrhf.studies.hh_reward",
        "HHRewardConfig",
        "reward models against plain baselines on real preference pairs, in folds",
    ),
    "methods": (
        "rrhf.studies.methods",
        "MethodsConfig",
        "RRHF offline, in rounds and online, best-of-N, PPO, RLOO and GRPO on the embedded world",
    ),
}


def usage() -> str:
    lines = [f"  {name:<12}{summary}" for name, (_, _, summary) in STUDIES.items()]
    return "\n".join(
        [
            "usage: rrhf study NAME [--flag value ...]",
            "",
            "studies:",
            *lines,
            "",
            "`rrhf study NAME --help` lists its flags.",
        ]
    )


def main(argv: list[str]) -> int:
    if not argv:
        raise UserError(f"rrhf study: no study given\n\n{usage()}")
    name, rest = argv[0], argv[1:]
    if name in ("-h", "--help"):
        print(usage())
        return EXIT_DONE
    if name not in STUDIES:
        close = nearest(name, list(STUDIES))
        hint = f"did you mean {close!r}? " if close else ""
        raise UserError(f"rrhf study: unknown study {name!r}; {hint}Studies: {', '.join(STUDIES)}.")
    module_name, config_name, _ = STUDIES[name]
    if name == "methods":
        return compare_methods(rest, "rrhf study methods")
    config_class = getattr(importlib.import_module("rrhf.studies.config"), config_name)
    config = read_settings(config_class, rest, f"rrhf study {name}")
    results = importlib.import_module(module_name).run(config)
    print_once(f"Results: {results}")
    return EXIT_DONE
