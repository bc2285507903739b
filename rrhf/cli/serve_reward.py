"""`rrhf serve-reward`: parse, call, print; the work is in `rrhf.scoring.http.server`."""

from __future__ import annotations

from rrhf.cli.places import read_settings
from rrhf.cli.terminal import print_once
from rrhf.errors import EXIT_DONE


def main(argv: list[str]) -> int:
    from rrhf.scoring.http.server_config import ServeRewardConfig

    config = read_settings(ServeRewardConfig, argv, "rrhf serve-reward")
    from rrhf.scoring.build import build_scorer, check_scorer
    from rrhf.scoring.http.server import RewardServer
    from rrhf.signals import caught_signals

    with caught_signals() as stop, RewardServer(config) as server:
        check_scorer(config.scorer, config)
        scorer = stop.run(lambda: build_scorer(config.scorer, config), "nothing was served")
        print_once(f"Serving {scorer.name} at {server.url}; Ctrl-C stops")
        server.serve(scorer, stop)
        stop.raise_if_received("the request that was being scored is answered; nothing is lost")
    return EXIT_DONE
