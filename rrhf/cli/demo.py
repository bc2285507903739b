"""`rrhf demo`: parse, call, print; what it does stands in `rrhf.studies.demo`."""

from __future__ import annotations

from rrhf.cli.flags import parse_config
from rrhf.cli.terminal import print_once
from rrhf.errors import EXIT_DONE


def main(argv: list[str]) -> int:
    from rrhf.studies.demo import DemoConfig, run_demo

    run_demo(parse_config(DemoConfig, argv, "rrhf demo"), say=print_once)
    return EXIT_DONE
