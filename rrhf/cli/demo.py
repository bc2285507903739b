"""`rrhf demo`: parse, call, print; the work is in `rrhf.studies.demo`."""

from __future__ import annotations

from rrhf.cli.places import read_settings
from rrhf.cli.terminal import print_once, show_progress_alone
from rrhf.errors import EXIT_DONE


def main(argv: list[str]) -> int:
    from rrhf.studies.config import DemoConfig

    config = read_settings(DemoConfig, argv, "rrhf demo")
    from rrhf.studies.demo import run_demo

    show_progress_alone()
    run_demo(config, say=print_once)
    return EXIT_DONE
