"""`rrhf compare`: parse, call, print.

Given rows it puts them into one table (`rrhf.report.compare`); given `--world` it makes the rows
first, by training every method (`rrhf.studies.methods`).
"""

from __future__ import annotations

import logging

from rrhf.cli.places import read_settings
from rrhf.cli.terminal import print_once
from rrhf.errors import EXIT_DONE


def main(argv: list[str]) -> int:
    if any(word.partition("=")[0] == "--world" for word in argv):
        return compare_methods(argv, "rrhf compare")
    from rrhf.report.config import CompareConfig

    config = read_settings(CompareConfig, argv, "rrhf compare")
    from rrhf.report.compare import compare

    print_once(compare(config).text)
    return EXIT_DONE


def compare_methods(argv: list[str], prog: str) -> int:
    """Train and compare the methods themselves."""
    from rrhf.studies.config import MethodsConfig

    config = read_settings(MethodsConfig, argv, prog)
    from rrhf.studies.methods import run

    # As in the demonstration, the study has its own lines.
    logging.getLogger("rrhf").setLevel(logging.WARNING)
    logging.getLogger("rrhf.progress").setLevel(logging.INFO)
    print_once(run(config, say=print_once).read_text())
    return EXIT_DONE
