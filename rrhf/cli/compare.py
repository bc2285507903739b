"""`rrhf compare`: parse, call, print.

Given evaluation results (rows), the command prints them as one table (`rrhf.report.compare`). Given
`--world`, it first trains and evaluates every method (`rrhf.studies.methods`).
"""

from __future__ import annotations

from rrhf.cli.places import read_settings
from rrhf.cli.terminal import print_once, show_progress_alone
from rrhf.errors import EXIT_DONE

PROG = "rrhf compare"


def main(argv: list[str]) -> int:
    if any(word.partition("=")[0] == "--world" for word in argv):
        return compare_methods(argv)
    from rrhf.report.config import CompareConfig

    config = read_settings(CompareConfig, argv, PROG)
    from rrhf.report.compare import compare

    print_once(compare(config).text)
    return EXIT_DONE


def compare_methods(argv: list[str]) -> int:
    """Train all methods on a world, then compare them."""
    from rrhf.studies.config import MethodsConfig

    config = read_settings(MethodsConfig, argv, PROG)
    from rrhf.studies.methods import run

    show_progress_alone()
    print_once(run(config, say=print_once).read_text())
    return EXIT_DONE
