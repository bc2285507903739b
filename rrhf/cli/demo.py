"""`rrhf demo`: parse, call, print; what it does stands in `rrhf.studies.demo`."""

from __future__ import annotations

import logging

from rrhf.cli.places import read_settings
from rrhf.cli.terminal import print_once
from rrhf.errors import EXIT_DONE


def main(argv: list[str]) -> int:
    from rrhf.studies.config import DemoConfig

    config = read_settings(DemoConfig, argv, "rrhf demo")
    from rrhf.studies.demo import run_demo

    # The story has its own lines; what each stage counts stands in its manifest.
    logging.getLogger("rrhf").setLevel(logging.WARNING)
    logging.getLogger("rrhf.progress").setLevel(logging.INFO)
    run_demo(config, say=print_once)
    return EXIT_DONE
